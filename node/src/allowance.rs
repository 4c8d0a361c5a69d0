//! Allowance: what one party may take of something, at once and in the long run.
//!
//! A bucket that fills by itself: what is taken beyond its contents is owed, and whoever owes waits, so that
//! a burst costs nothing and a flood is slowed to its rate. Time is given, so that it can be tested.

use std::time::{Duration, Instant};

/// So much at once, and so much in every second.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    pub burst: f64,
    pub per_second: f64,
}

/// What is left of a [`Rate`].
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Below nothing when something is owed.
    left: f64,
    at: Instant,
}

impl Allowance {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Allowance {
        Allowance {
            left: rate.burst,
            at: now,
        }
    }

    /// Takes `amount`, whether it is there or not; returns how long to wait until nothing is owed.
    pub fn take(&mut self, rate: Rate, amount: f64, now: Instant) -> Duration {
        self.left = self.contents(rate, now) - amount;
        self.at = now;
        self.owed(rate, now)
    }

    /// How long to wait until nothing is owed.
    pub fn owed(&self, rate: Rate, now: Instant) -> Duration {
        let owed = -self.contents(rate, now) / rate.per_second;
        Duration::try_from_secs_f64(owed).unwrap_or(Duration::ZERO)
    }

    /// Whether everything that was taken has been filled in again, so that it need not be remembered.
    pub fn is_full(&self, rate: Rate, now: Instant) -> bool {
        self.contents(rate, now) >= rate.burst
    }

    fn contents(&self, rate: Rate, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.left + passed * rate.per_second).min(rate.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        burst: 10.0,
        per_second: 2.0,
    };

    #[test]
    fn a_burst_costs_nothing_and_what_exceeds_it_is_owed() {
        let now = Instant::now();
        let mut allowance = Allowance::new(RATE, now);
        assert_eq!(allowance.take(RATE, 10.0, now), Duration::ZERO);
        assert!(!allowance.is_full(RATE, now));
        assert_eq!(allowance.take(RATE, 4.0, now), Duration::from_secs(2));
        let later = now + Duration::from_secs(2);
        assert_eq!(allowance.owed(RATE, later), Duration::ZERO);
        assert_eq!(allowance.take(RATE, 1.0, later), Duration::from_millis(500));
        // However long nothing was taken, it is no more than full.
        let much_later = now + Duration::from_secs(1_000);
        assert!(allowance.is_full(RATE, much_later));
        assert_eq!(
            allowance.take(RATE, 12.0, much_later),
            Duration::from_secs(1)
        );
    }
}
