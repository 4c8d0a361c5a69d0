//! Chance: the dice of the mind, which fall the same way for the same seed.

use std::time::Duration;

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64;

/// The mind's only source of randomness, from the seed it was given.
pub(super) struct Chance(Pcg64);

impl Chance {
    pub(super) fn new(seed: u64) -> Chance {
        Chance(Pcg64::seed_from_u64(seed))
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns `duration`, more or less `percent` of it, so that nodes do not act in step.
    pub(super) fn jitter(&mut self, duration: Duration, percent: u32) -> Duration {
        let span = duration * percent / 100;
        let nanos = u64::try_from(span.as_nanos())
            .unwrap_or(u64::MAX / 2)
            .max(1);
        duration - span + Duration::from_nanos(self.number() % (2 * nanos))
    }

    pub(super) fn pick<'a, T>(&mut self, among: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(among.len()).ok().filter(|count| *count > 0)?;
        among.get((self.number() % count) as usize)
    }

    /// Takes one out of `among`, whose order is lost.
    pub(super) fn draw<T>(&mut self, among: &mut Vec<T>) -> Option<T> {
        let count = u64::try_from(among.len()).ok().filter(|count| *count > 0)?;
        Some(among.swap_remove((self.number() % count) as usize))
    }
}
