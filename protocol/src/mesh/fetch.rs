//! Fetch: which provider brings a NAR, from which byte, and when another one takes over.
//!
//! The bytes stay with the hands, who report how far they got. A provider that dies, stalls or no
//! longer has the path is replaced at the same byte; every provider is tried at most
//! [`ATTEMPTS_PER_PROVIDER`] times, so a fetch always ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{Blame, FetchId};
use crate::peer::PeerId;
use crate::store_path::StorePathHash;

/// A provider that delivers nothing for this long is replaced. Long enough for a disk to spin up,
/// short enough that Nix (300 s) never notices.
const STALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Once for the path, once more for a connection that merely broke.
const ATTEMPTS_PER_PROVIDER: u32 = 2;

/// Speed assumed of a provider that never transferred anything: 100 MB/s, a wired LAN. Optimistic,
/// so that newcomers are tried.
const SPEED_UNKNOWN: u64 = 100_000_000;

/// Transfers shorter than this say more about latency than about speed.
const SPEED_SAMPLE_BYTES_MIN: u64 = 1024 * 1024;

/// Peers whose speed is remembered.
const SPEEDS_MAX: usize = 1024;

/// What a step in fetching means for the rest of the mind.
pub(super) enum Event {
    Open {
        fetch: FetchId,
        attempt: u32,
        peer: PeerId,
        from: u64,
    },
    Stop {
        fetch: FetchId,
        attempt: u32,
    },
    Failed {
        fetch: FetchId,
    },
}

pub(super) struct Fetches {
    fetches: BTreeMap<FetchId, Fetch>,
    /// Bytes per second, averaged over transfers.
    speeds: BTreeMap<PeerId, u64>,
}

struct Fetch {
    hash: StorePathHash,
    /// How far the NAR got.
    at: u64,
    transfer: Option<Transfer>,
    /// Attempts so far, which also numbers the transfers.
    attempts: u32,
    tried: BTreeMap<PeerId, u32>,
    /// Whose bytes are in what was assembled.
    contributors: BTreeSet<PeerId>,
}

struct Transfer {
    peer: PeerId,
    from: u64,
    since: Instant,
    progress_at: Instant,
}

impl Fetches {
    pub(super) fn new() -> Fetches {
        Fetches {
            fetches: BTreeMap::new(),
            speeds: BTreeMap::new(),
        }
    }

    pub(super) fn start(
        &mut self,
        fetch: FetchId,
        hash: StorePathHash,
        providers: &[PeerId],
        now: Instant,
    ) -> Vec<Event> {
        let state = Fetch {
            hash,
            at: 0,
            transfer: None,
            attempts: 0,
            tried: BTreeMap::new(),
            contributors: BTreeSet::new(),
        };
        self.fetches.insert(fetch, state);
        self.open(fetch, providers, now)
    }

    pub(super) fn progress(&mut self, fetch: FetchId, attempt: u32, at: u64, now: Instant) {
        if let Some(fetch) = self.fetches.get_mut(&fetch)
            && fetch.attempts == attempt
            && let Some(transfer) = &mut fetch.transfer
        {
            transfer.progress_at = now;
            if at > fetch.at {
                fetch.contributors.insert(transfer.peer);
                fetch.at = at;
            }
        }
    }

    /// Returns what a running transfer is about; `None` when it was stopped meanwhile.
    pub(super) fn running(&self, fetch: FetchId, attempt: u32) -> Option<(StorePathHash, PeerId)> {
        let fetch = self
            .fetches
            .get(&fetch)
            .filter(|fetch| fetch.attempts == attempt)?;
        Some((fetch.hash, fetch.transfer.as_ref()?.peer))
    }

    /// Takes in the end of the running transfer.
    pub(super) fn ended(
        &mut self,
        id: FetchId,
        outcome: Result<(), Blame>,
        providers: &[PeerId],
        now: Instant,
    ) -> Vec<Event> {
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return Vec::new();
        };
        let Some(transfer) = fetch.transfer.take() else {
            return Vec::new();
        };
        match outcome {
            Ok(()) => {
                let bytes = fetch.at.saturating_sub(transfer.from);
                self.learn_speed(
                    transfer.peer,
                    bytes,
                    now.saturating_duration_since(transfer.since),
                );
                Vec::new()
            }
            Err(Blame::Local) => {
                self.fetches.remove(&id);
                vec![Event::Failed { fetch: id }]
            }
            Err(Blame::Absent) => {
                fetch.tried.insert(transfer.peer, ATTEMPTS_PER_PROVIDER);
                self.open(id, providers, now)
            }
            Err(Blame::Peer) => self.open(id, providers, now),
        }
    }

    /// Replaces a provider that stalled.
    pub(super) fn switch(&mut self, id: FetchId, providers: &[PeerId], now: Instant) -> Vec<Event> {
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return Vec::new();
        };
        let mut events = Vec::new();
        if fetch.transfer.take().is_some() {
            events.push(Event::Stop {
                fetch: id,
                attempt: fetch.attempts,
            });
        }
        events.extend(self.open(id, providers, now));
        events
    }

    /// Forgets a fetch and returns whose bytes it was made of.
    pub(super) fn finish(&mut self, fetch: FetchId) -> BTreeSet<PeerId> {
        self.fetches
            .remove(&fetch)
            .map(|fetch| fetch.contributors)
            .unwrap_or_default()
    }

    /// Returns the fetches whose provider delivered nothing for [`STALL_TIMEOUT`].
    pub(super) fn stalled(&self, now: Instant) -> Vec<(FetchId, StorePathHash)> {
        let is_stalled = |transfer: &Transfer| transfer.progress_at + STALL_TIMEOUT <= now;
        let stalled = |(id, fetch): (&FetchId, &Fetch)| {
            fetch
                .transfer
                .as_ref()
                .is_some_and(is_stalled)
                .then_some((*id, fetch.hash))
        };
        self.fetches.iter().filter_map(stalled).collect()
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let transfers = self
            .fetches
            .values()
            .filter_map(|fetch| fetch.transfer.as_ref());
        transfers
            .map(|transfer| (transfer.progress_at + STALL_TIMEOUT, "transfer stalls"))
            .min()
    }

    /// Opens a transfer from the best provider that may still be tried, or gives up.
    fn open(&mut self, id: FetchId, providers: &[PeerId], now: Instant) -> Vec<Event> {
        let best = self.best(id, providers);
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return Vec::new();
        };
        let Some(peer) = best else {
            self.fetches.remove(&id);
            return vec![Event::Failed { fetch: id }];
        };
        *fetch.tried.entry(peer).or_default() += 1;
        fetch.attempts += 1;
        fetch.transfer = Some(Transfer {
            peer,
            from: fetch.at,
            since: now,
            progress_at: now,
        });
        vec![Event::Open {
            fetch: id,
            attempt: fetch.attempts,
            peer,
            from: fetch.at,
        }]
    }

    /// The provider with the most speed left per transfer, the least tried first.
    fn best(&self, id: FetchId, providers: &[PeerId]) -> Option<PeerId> {
        let fetch = self.fetches.get(&id)?;
        let tried = |peer: &PeerId| fetch.tried.get(peer).copied().unwrap_or(0);
        let share = |peer: &PeerId| {
            let transfers = self
                .fetches
                .values()
                .filter_map(|fetch| fetch.transfer.as_ref());
            let load = transfers.filter(|transfer| transfer.peer == *peer).count() as u64;
            self.speeds.get(peer).copied().unwrap_or(SPEED_UNKNOWN) / (load + 1)
        };
        let allowed = providers
            .iter()
            .filter(|peer| tried(peer) < ATTEMPTS_PER_PROVIDER);
        allowed
            .min_by_key(|peer| (tried(peer), std::cmp::Reverse(share(peer))))
            .copied()
    }

    fn learn_speed(&mut self, peer: PeerId, bytes: u64, took: Duration) {
        if bytes < SPEED_SAMPLE_BYTES_MIN {
            return;
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let speed = bytes.saturating_mul(1_000_000) / micros;
        if !self.speeds.contains_key(&peer) && self.speeds.len() >= SPEEDS_MAX {
            self.speeds.pop_first();
        }
        let known = self.speeds.entry(peer).or_insert(speed);
        *known = (known.saturating_mul(3).saturating_add(speed)) / 4;
    }
}
