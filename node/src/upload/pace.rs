//! Pace: a limit on the bytes that leave in a second, over everything that is sent at once.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Bytes that may leave at once. Small enough that a line of 64 kB/s still carries something every
/// second, so that nobody takes the limit for a dead line.
pub const PIECE_BYTES: usize = 64 * 1024;

/// What was not used is forgotten after this long, so that a pause is not followed by a flood.
const CREDIT: Duration = Duration::from_millis(250);

/// Hands out the right to send.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When everything that was granted has left.
    free: Mutex<Instant>,
}

impl Pace {
    /// # Panics
    /// With a rate of 0.
    pub fn new(bytes_per_second: u64) -> Pace {
        assert!(bytes_per_second > 0, "nothing could be sent");
        Pace {
            bytes_per_second,
            free: Mutex::new(Instant::now()),
        }
    }

    /// Waits until so many bytes may leave.
    ///
    /// Cancel-safe, but what was waited for counts as sent.
    pub async fn take(&self, bytes: usize) {
        let until = self.grant(bytes, Instant::now());
        tokio::time::sleep_until(until).await;
    }

    fn grant(&self, bytes: usize, now: Instant) -> Instant {
        let lasts = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(CREDIT).unwrap_or(now);
        let begin = (*free).max(earliest);
        *free = begin + lasts;
        begin
    }

    /// How many bytes leave in so much time.
    pub fn bytes_in(&self, time: Duration) -> u64 {
        self.bytes_per_second.saturating_mul(time.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_carries_its_bytes_and_a_pause_little_more() {
        let pace = Pace::new(1000);
        let start = Instant::now();
        let mut granted = 0;
        while pace.grant(100, start) < start + Duration::from_secs(1) {
            granted += 100;
        }
        assert!((1000..=1300).contains(&granted), "{granted}");
        let later = start + Duration::from_secs(60);
        let mut granted = 0;
        while pace.grant(100, later) < later + Duration::from_secs(1) {
            granted += 100;
        }
        assert!((1200..=1300).contains(&granted), "{granted}");
    }
}
