//! Chance: the only source of randomness of a run, and integers only, so that no machine's
//! floating point can change a trace.

use std::time::Duration;

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64;

/// A stream of random choices.
#[derive(Clone, Debug)]
pub struct Chance(Pcg64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(Pcg64::seed_from_u64(seed))
    }

    /// Returns a stream of its own, so that drawing more here changes nothing there.
    pub fn fork(&mut self) -> Chance {
        Chance::new(self.number())
    }

    pub fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns a number below `bound`; 0 when the bound is.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.number() % (bound.max(1) as u64)) as usize
    }

    /// Returns a number from `min` to `max`, both included.
    pub fn between(&mut self, [min, max]: [u64; 2]) -> u64 {
        min + self.number() % (max.saturating_sub(min) + 1)
    }

    pub fn duration(&mut self, min: Duration, max: Duration) -> Duration {
        let span = [min, max].map(|one| u64::try_from(one.as_nanos()).unwrap_or(u64::MAX / 2));
        Duration::from_nanos(self.between(span))
    }

    pub fn happens(&mut self, permille: u32) -> bool {
        permille > 0 && self.number() % 1000 < u64::from(permille)
    }

    pub fn pick<T: Copy>(&mut self, among: &[T]) -> Option<T> {
        let index = self.below(among.len());
        among.get(index).copied()
    }

    /// Returns `count` different numbers below `bound`, or all of them, in no order.
    pub fn sample(&mut self, count: usize, bound: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..bound).collect();
        let count = count.min(bound);
        for index in 0..count {
            let other = index + self.below(bound - index);
            all.swap(index, other);
        }
        all.truncate(count);
        all
    }

    /// Returns a rank below `bound` by Zipf's law (exponent 1): the first is drawn twice as often as
    /// the second, three times as often as the third.
    pub fn zipf(&mut self, bound: usize) -> usize {
        const SCALE: u64 = 1 << 32;
        let weight = |rank: usize| SCALE / (rank as u64 + 1);
        let total: u64 = (0..bound).map(weight).sum();
        let mut left = self.number() % total.max(1);
        for rank in 0..bound {
            match left.checked_sub(weight(rank)) {
                Some(rest) => left = rest,
                None => return rank,
            }
        }
        bound.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_no_twins() {
        let mut sample = Chance::new(1).sample(7, 10);
        sample.sort_unstable();
        sample.dedup();
        assert_eq!(sample.len(), 7);
        assert_eq!(Chance::new(1).sample(7, 3).len(), 3);
    }

    #[test]
    fn low_ranks_are_drawn_more_often() {
        let mut chance = Chance::new(2);
        let mut drawn = [0u32; 10];
        for _ in 0..10_000 {
            drawn[chance.zipf(10)] += 1;
        }
        assert!(
            drawn[0] > drawn[1] && drawn[1] > drawn[4] && drawn[4] > drawn[9],
            "{drawn:?}"
        );
        assert!(drawn[9] > 0);
    }
}
