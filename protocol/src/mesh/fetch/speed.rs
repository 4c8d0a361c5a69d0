//! Speed: how many bytes per second each source usually brings, and whether it failed lately.
//!
//! Learned from every transfer, also from those that broke off: a source that stalls brings little
//! for the time it took.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::super::SourceId;

/// Speed assumed of a source that never transferred anything: 100 MB/s, a wired LAN. Optimistic,
/// so that newcomers are tried.
const SPEED_UNKNOWN: u64 = 100_000_000;

/// A transfer that is both shorter and smaller than this says more about latency than about speed.
const SAMPLE_BYTES_MIN: u64 = 1024 * 1024;
const SAMPLE_DURATION_MIN: Duration = Duration::from_secs(1);

/// How long a failure makes others preferable. It may have been the network, and who is never
/// asked cannot show that it is well.
const FAILURE_REMEMBERED: Duration = Duration::from_secs(60);

/// Sources whose speed is remembered.
pub(super) const SPEEDS_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Speeds {
    known: BTreeMap<SourceId, Speed>,
}

#[derive(Default)]
struct Speed {
    /// Bytes per second, a moving average over transfers.
    usual: Option<u64>,
    /// When it last failed, until it succeeds.
    failed_at: Option<Instant>,
}

impl Speeds {
    /// Takes in that a transfer brought `bytes` in `took`, not counting what it waited for us.
    pub(super) fn learn(&mut self, source: SourceId, bytes: u64, took: Duration) {
        if bytes < SAMPLE_BYTES_MIN && took < SAMPLE_DURATION_MIN {
            return;
        }
        let speed = bytes_per_second(bytes, took);
        let usual = &mut self.entry(source).usual;
        *usual = Some(match *usual {
            None => speed,
            Some(usual) => (usual.saturating_mul(3).saturating_add(speed)) / 4,
        });
    }

    pub(super) fn failed(&mut self, source: SourceId, now: Instant) {
        self.entry(source).failed_at = Some(now);
    }

    pub(super) fn worked(&mut self, source: SourceId) {
        self.entry(source).failed_at = None;
    }

    /// The usual speed, in bytes per second; `None` before the first transfer.
    pub(super) fn usual(&self, source: &SourceId) -> Option<u64> {
        self.known.get(source)?.usual
    }

    /// A number that is equal for sources about equally fast and greater for a slower one, while
    /// `load` other transfers share its speed.
    pub(super) fn slowness(&self, source: &SourceId, load: u64) -> u32 {
        let speed = self.usual(source).unwrap_or(SPEED_UNKNOWN);
        u64::BITS - (speed / (load + 1)).max(1).ilog2()
    }

    pub(super) fn has_failed(&self, source: &SourceId, now: Instant) -> bool {
        let failed_at = self.known.get(source).and_then(|speed| speed.failed_at);
        failed_at.is_some_and(|at| at + FAILURE_REMEMBERED > now)
    }

    /// Forgets everything: another network has other speeds.
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    fn entry(&mut self, source: SourceId) -> &mut Speed {
        if !self.known.contains_key(&source) && self.known.len() >= SPEEDS_MAX {
            self.known.pop_first();
        }
        self.known.entry(source).or_default()
    }
}

pub(super) fn bytes_per_second(bytes: u64, took: Duration) -> u64 {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1_000_000) / micros
}
