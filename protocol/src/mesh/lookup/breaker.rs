//! Breaker: keeps lookups from waiting for a cache that does not answer.
//!
//! After [`FAILURES_MAX`] failures in a row it opens, and the cache counts as not asked: a laptop
//! on a train answers in milliseconds. A probe finds out whether the cache is back. It is one
//! question, about a path that somebody wanted meanwhile, and nobody waits for it; where nobody
//! wanted anything, nothing is sent.

use std::time::{Duration, Instant};

use super::super::Chance;
use crate::store_path::StorePathHash;

/// Failures in a row that open the breaker. One may be a lost packet.
const FAILURES_MAX: u32 = 2;

/// The first pause before a probe; doubles with every failed one up to [`PROBE_PAUSE_MAX`].
const PROBE_PAUSE_MIN: Duration = Duration::from_secs(5);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(300);

/// So that an office does not probe its anchor in step.
const PROBE_JITTER_PERCENT: u32 = 25;

/// A probe of which nothing was heard by then is lost, and another one may be sent.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Breaker {
    /// In a row, while closed.
    failures: u32,
    open: Option<Open>,
}

struct Open {
    pause: Duration,
    probe_at: Instant,
    /// While a probe is under way.
    probing_since: Option<Instant>,
    /// What was last wanted and not asked for.
    wanted: Option<StorePathHash>,
}

impl Breaker {
    /// Whether lookups may wait for this cache.
    pub(super) fn is_closed(&self) -> bool {
        self.open.is_none()
    }

    /// When the next probe is possible; `None` while closed.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        self.open.as_ref().map(|open| open.probe_at)
    }

    /// Notes what could not be asked for; a probe will ask.
    pub(super) fn want(&mut self, hash: StorePathHash) {
        if let Some(open) = &mut self.open {
            open.wanted = Some(hash);
        }
    }

    /// When a probe is to be sent, if one is.
    pub(super) fn due(&self) -> Option<Instant> {
        let open = self.open.as_ref()?;
        let lost_at = open.probing_since.map(|since| since + PROBE_TIMEOUT);
        let at = lost_at.map_or(open.probe_at, |at| at.max(open.probe_at));
        open.wanted.map(|_| at)
    }

    /// Returns what to probe with, if it is time to.
    pub(super) fn probe(&mut self, now: Instant) -> Option<StorePathHash> {
        if self.due().is_none_or(|at| at > now) {
            return None;
        }
        let open = self.open.as_mut()?;
        open.probing_since = Some(now);
        open.wanted.take()
    }

    /// The cache answered, whatever it said.
    pub(super) fn answered(&mut self) {
        *self = Breaker::default();
    }

    /// The cache failed. Returns whether that opened the breaker.
    pub(super) fn failed(&mut self, chance: &mut Chance, now: Instant) -> bool {
        match &mut self.open {
            Some(open) if open.probing_since.is_some() => {
                open.probing_since = None;
                open.pause = (open.pause * 2).min(PROBE_PAUSE_MAX);
                open.probe_at = now + chance.jitter(open.pause, PROBE_JITTER_PERCENT);
                false
            }
            // Asked before it opened, when that was already known.
            Some(_) => false,
            None => {
                self.failures += 1;
                if self.failures < FAILURES_MAX {
                    return false;
                }
                let pause = PROBE_PAUSE_MIN;
                self.open = Some(Open {
                    pause,
                    probe_at: now + chance.jitter(pause, PROBE_JITTER_PERCENT),
                    probing_since: None,
                    wanted: None,
                });
                true
            }
        }
    }

    /// Begins anew: on another network, what failed may work.
    pub(super) fn reset(&mut self) {
        *self = Breaker::default();
    }
}
