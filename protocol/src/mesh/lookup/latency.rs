//! Latency: how long each source usually takes to answer, and whether it answered lately at all.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::super::SourceId;

/// The shortest wait before a second source is asked; below it, a hedge would only race the first
/// answer.
pub(super) const HEDGE_MIN: Duration = Duration::from_millis(20);

/// The longest, so that three sources get their turn within the deadline of 900 ms.
const HEDGE_MAX: Duration = Duration::from_millis(300);

/// The wait for a peer that was never asked: a LAN answers within a few milliseconds, a laptop
/// whose disk sleeps does not.
const HEDGE_UNKNOWN_PEER: Duration = Duration::from_millis(50);

/// The wait for a cache that was never asked: name resolution, TCP and TLS come before the answer.
const HEDGE_UNKNOWN_CACHE: Duration = Duration::from_millis(150);

/// Answer times remembered per source, to take the 90th percentile of.
const LATENCIES_KEPT: usize = 32;

/// Sources whose answer times are remembered.
pub(super) const LATENCIES_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Latencies {
    known: BTreeMap<SourceId, Latency>,
}

#[derive(Default)]
struct Latency {
    /// The last [`LATENCIES_KEPT`] answer times.
    recent: VecDeque<Duration>,
    /// Their 90th percentile.
    usual: Option<Duration>,
    /// The last question got no answer.
    is_silent: bool,
}

impl Latencies {
    pub(super) fn answered(&mut self, source: SourceId, took: Duration) {
        let latency = self.entry(source);
        latency.is_silent = false;
        if latency.recent.len() == LATENCIES_KEPT {
            latency.recent.pop_front();
        }
        latency.recent.push_back(took);
        let mut sorted: Vec<Duration> = latency.recent.iter().copied().collect();
        sorted.sort_unstable();
        latency.usual = sorted.get(sorted.len() * 9 / 10).copied();
    }

    pub(super) fn unanswered(&mut self, source: SourceId) {
        self.entry(source).is_silent = true;
    }

    /// The 90th percentile of its answer times; `None` before the first answer.
    pub(super) fn usual(&self, source: &SourceId) -> Option<Duration> {
        self.known.get(source)?.usual
    }

    /// Whether its last question got no answer. Others are asked first until it answers again.
    pub(super) fn is_silent(&self, source: &SourceId) -> bool {
        self.known
            .get(source)
            .is_some_and(|latency| latency.is_silent)
    }

    /// How long to wait for `source` before the next one is asked too.
    pub(super) fn hedge_delay(&self, source: &SourceId) -> Duration {
        if self.is_silent(source) {
            return HEDGE_MIN;
        }
        let unknown = match source {
            SourceId::Peer(_) => HEDGE_UNKNOWN_PEER,
            SourceId::Cache(_) => HEDGE_UNKNOWN_CACHE,
        };
        let usual = self.usual(source).unwrap_or(unknown);
        usual.clamp(HEDGE_MIN, HEDGE_MAX)
    }

    /// A number that is equal for sources about equally fast: it grows when the time doubles.
    pub(super) fn pace(&self, source: &SourceId) -> u32 {
        let micros = self.hedge_delay(source).as_micros();
        (micros / HEDGE_MIN.as_micros()).max(1).ilog2()
    }

    /// Forgets everything: after a sleep or on another network it says little.
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    fn entry(&mut self, source: SourceId) -> &mut Latency {
        if !self.known.contains_key(&source) && self.known.len() >= LATENCIES_MAX {
            self.known.pop_first();
        }
        self.known.entry(source).or_default()
    }
}
