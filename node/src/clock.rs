//! The clock: time that counts suspension, and the wall clock.
//!
//! `Instant` stands still while a laptop sleeps, so a deadline of ten seconds would still be ten
//! seconds away after a night. [`Clock::now`] adds the time spent suspended (the difference between
//! Linux's CLOCK_BOOTTIME and CLOCK_MONOTONIC), so that everything overdue is overdue on waking,
//! and [`Clock::woke`] says that it happened.

use std::time::{Duration, Instant, SystemTime};

use granary_protocol::certificate::UnixTime;
use rustix::time::{ClockId, clock_gettime};

/// A suspension shorter than this changes nothing worth re-learning.
const SLEEP_MIN: Duration = Duration::from_secs(2);

/// Reads the clocks of this machine.
#[derive(Debug)]
pub struct Clock {
    /// Suspended time when the clock was made, and when [`Clock::woke`] was last asked.
    suspended_at_start: Duration,
    suspended_last: Duration,
}

impl Clock {
    #[expect(clippy::new_without_default, reason = "it reads the clock")]
    pub fn new() -> Clock {
        let suspended = suspended();
        Clock {
            suspended_at_start: suspended,
            suspended_last: suspended,
        }
    }

    /// Monotonic time that goes on during suspension.
    pub fn now(&self) -> Instant {
        Instant::now() + suspended().saturating_sub(self.suspended_at_start)
    }

    /// Returns whether the machine was suspended since this was last asked.
    pub fn woke(&mut self) -> bool {
        let suspended = suspended();
        let slept = suspended.saturating_sub(self.suspended_last);
        self.suspended_last = suspended;
        slept >= SLEEP_MIN
    }
}

/// The wall clock in seconds.
pub fn unix_time() -> UnixTime {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    UnixTime(since.as_secs())
}

fn suspended() -> Duration {
    // Monotonic first: the time between the two readings must not count as suspended below zero.
    let monotonic = read(ClockId::Monotonic);
    read(ClockId::Boottime).saturating_sub(monotonic)
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_forward_and_a_running_machine_is_not_waking() {
        let mut clock = Clock::new();
        let first = clock.now();
        assert!(clock.now() >= first);
        assert!(!clock.woke());
    }
}
