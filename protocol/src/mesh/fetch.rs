//! Fetch: which source brings a NAR, from which byte, and when another one takes over.
//!
//! The bytes stay with the hands, who report how far they got. A source that dies, stalls, crawls or
//! no longer has the path is replaced at the same byte. Members come first; caches when no member
//! is left to try, and then those are tried once more whose trouble may have passed. Every source
//! is tried at most [`ATTEMPTS_PER_SOURCE`] times, so a fetch always ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::{Blame, FetchId, Lots, Size, SourceId};
use crate::hash::NarHash;
use crate::store_path::StorePathHash;

mod speed;

use speed::{Speeds, bytes_per_second};

/// A source that delivers nothing for this long is replaced. Long enough for a disk to spin up,
/// short enough that Nix (300 s) never notices.
const STALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A source below this share of its usual speed for [`CRAWL_WINDOW`] is replaced, if there is
/// another one: its disk or its Wi-Fi has trouble. Not a fixed speed, since every link has its own.
const CRAWL_PERCENT: u64 = 10;
const CRAWL_WINDOW: Duration = Duration::from_secs(5);

/// How often the course of a transfer is noted, to know its speed over the last [`CRAWL_WINDOW`].
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Once for the path, once more for a connection that merely broke.
const ATTEMPTS_PER_SOURCE: u32 = 2;

/// Fetches at once: one per request for a NAR, of which a Nix makes at most a few hundred. Beyond
/// it, they fail.
const FETCHES_MAX: usize = 16_384;

/// What a step in fetching means for the rest of the mind.
pub(super) enum Event {
    Open {
        fetch: FetchId,
        attempt: u32,
        source: SourceId,
        from: u64,
    },
    Stop {
        fetch: FetchId,
        attempt: u32,
    },
    /// No member is left to try: the caches may have the same NAR. [`Fetches::resume`] follows.
    AskCaches {
        fetch: FetchId,
        hash: StorePathHash,
        nar_hash: NarHash,
    },
    Failed {
        fetch: FetchId,
    },
}

pub(super) struct Fetches {
    lots: Lots,
    fetches: BTreeMap<FetchId, Fetch>,
    speeds: Speeds,
}

struct Fetch {
    hash: StorePathHash,
    nar_hash: NarHash,
    /// How far the NAR got.
    at: u64,
    transfer: Option<Transfer>,
    /// Attempts so far, which also numbers the transfers.
    attempts: u32,
    tried: BTreeMap<SourceId, u32>,
    /// Whose bytes are in what was assembled.
    contributors: BTreeSet<SourceId>,
    caches: Caches,
}

/// What a fetch knows of caches that may have the same NAR.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caches {
    NotAsked,
    Asking,
    Asked,
}

struct Transfer {
    source: SourceId,
    from: u64,
    since: Instant,
    progress_at: Instant,
    /// How long it waited for its reader.
    held_up: Duration,
    /// Its course over the last [`CRAWL_WINDOW`], oldest first.
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    /// Time the transfer was not held up, since it began.
    busy: Duration,
    at: u64,
}

impl Fetches {
    pub(super) fn new(lots: Lots) -> Fetches {
        Fetches {
            lots,
            fetches: BTreeMap::new(),
            speeds: Speeds::default(),
        }
    }

    pub(super) fn start(
        &mut self,
        fetch: FetchId,
        hash: StorePathHash,
        nar_hash: NarHash,
        sources: &[SourceId],
        now: Instant,
    ) -> Vec<Event> {
        if self.fetches.len() >= FETCHES_MAX {
            return vec![Event::Failed { fetch }];
        }
        let state = Fetch {
            hash,
            nar_hash,
            at: 0,
            transfer: None,
            attempts: 0,
            tried: BTreeMap::new(),
            contributors: BTreeSet::new(),
            caches: Caches::NotAsked,
        };
        self.fetches.insert(fetch, state);
        self.open(fetch, sources, now)
    }

    /// Takes in how far a transfer got, and for how long it waited for its reader in all.
    ///
    /// Returns whether it crawls, and is to be replaced by [`Fetches::replace`] if that is possible.
    pub(super) fn progress(
        &mut self,
        fetch: FetchId,
        attempt: u32,
        at: u64,
        held_up: Duration,
        now: Instant,
    ) -> bool {
        let Some(fetch) = self.fetches.get_mut(&fetch) else {
            return false;
        };
        let Some(transfer) = &mut fetch.transfer else {
            return false;
        };
        if fetch.attempts != attempt {
            return false;
        }
        transfer.progress_at = now;
        transfer.held_up = transfer.held_up.max(held_up);
        if at > fetch.at {
            fetch.contributors.insert(transfer.source);
            fetch.at = at;
        }
        let usual = self.speeds.usual(&transfer.source);
        transfer.crawls(fetch.at, usual, now)
    }

    /// Returns what a running transfer is about; `None` when it was stopped meanwhile.
    pub(super) fn running(&self, fetch: FetchId, attempt: u32) -> Option<Running> {
        let fetch = self.fetches.get(&fetch)?;
        let transfer = fetch.transfer.as_ref()?;
        (fetch.attempts == attempt).then_some(Running {
            hash: fetch.hash,
            nar_hash: fetch.nar_hash,
            source: transfer.source,
        })
    }

    /// What a fetch brings; `None` when it is over.
    pub(super) fn wanted(&self, fetch: FetchId) -> Option<(StorePathHash, NarHash)> {
        let fetch = self.fetches.get(&fetch)?;
        Some((fetch.hash, fetch.nar_hash))
    }

    /// From whom a fetch is being brought.
    pub(super) fn source_of(&self, fetch: FetchId) -> Option<SourceId> {
        let transfer = self.fetches.get(&fetch)?.transfer.as_ref()?;
        Some(transfer.source)
    }

    /// Takes in the end of the running transfer.
    pub(super) fn ended(
        &mut self,
        id: FetchId,
        outcome: Result<(), Blame>,
        sources: &[SourceId],
        now: Instant,
    ) -> Vec<Event> {
        let Some(source) = self.end_transfer(id, now) else {
            return Vec::new();
        };
        match outcome {
            Ok(()) => {
                self.speeds.worked(source);
                Vec::new()
            }
            Err(Blame::Local) => {
                self.fetches.remove(&id);
                vec![Event::Failed { fetch: id }]
            }
            Err(Blame::Absent) => {
                if let Some(fetch) = self.fetches.get_mut(&id) {
                    fetch.tried.insert(source, ATTEMPTS_PER_SOURCE);
                }
                self.open(id, sources, now)
            }
            Err(Blame::Peer) => {
                self.speeds.failed(source, now);
                self.open(id, sources, now)
            }
        }
    }

    /// Replaces a source that stalled, if need be by another try of the same.
    pub(super) fn switch(&mut self, id: FetchId, sources: &[SourceId], now: Instant) -> Vec<Event> {
        let Some(source) = self.end_transfer(id, now) else {
            return Vec::new();
        };
        self.speeds.failed(source, now);
        let attempt = self.fetches.get(&id).map_or(0, |fetch| fetch.attempts);
        let mut events = vec![Event::Stop { fetch: id, attempt }];
        events.extend(self.open(id, sources, now));
        events
    }

    /// Replaces a source that crawls, but only by another one: slow is better than nothing.
    pub(super) fn replace(
        &mut self,
        id: FetchId,
        sources: &[SourceId],
        now: Instant,
    ) -> Vec<Event> {
        let running = self
            .fetches
            .get(&id)
            .and_then(|fetch| fetch.transfer.as_ref());
        let Some(current) = running.map(|transfer| transfer.source) else {
            return Vec::new();
        };
        let others: Vec<SourceId> = sources
            .iter()
            .copied()
            .filter(|one| *one != current)
            .collect();
        let has_failed = |source: &SourceId| self.speeds.has_failed(source, now);
        match self.best(id, &others, now) {
            Some(other) if !has_failed(&other) => self.switch(id, &others, now),
            _ => Vec::new(),
        }
    }

    /// The caches were asked; goes on if nothing is under way.
    pub(super) fn resume(&mut self, id: FetchId, sources: &[SourceId], now: Instant) -> Vec<Event> {
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return Vec::new();
        };
        fetch.caches = Caches::Asked;
        if fetch.transfer.is_some() {
            return Vec::new();
        }
        self.open(id, sources, now)
    }

    /// Forgets a fetch and returns what was fetched, and whose bytes it was made of.
    pub(super) fn finish(&mut self, fetch: FetchId) -> Option<Finished> {
        let fetch = self.fetches.remove(&fetch)?;
        Some(Finished {
            hash: fetch.hash,
            nar_hash: fetch.nar_hash,
            contributors: fetch.contributors,
        })
    }

    /// Forgets speeds, which are those of another network.
    pub(super) fn network_changed(&mut self) {
        self.speeds.clear();
    }

    /// Returns the fetches whose source delivered nothing for [`STALL_TIMEOUT`].
    pub(super) fn stalled(&self, now: Instant) -> Vec<FetchId> {
        let is_stalled = |transfer: &Transfer| transfer.progress_at + STALL_TIMEOUT <= now;
        let stalled = |(id, fetch): (&FetchId, &Fetch)| {
            let transfer = fetch.transfer.as_ref()?;
            is_stalled(transfer).then_some(*id)
        };
        self.fetches.iter().filter_map(stalled).collect()
    }

    /// Returns the fetches that a source is delivering to.
    pub(super) fn of(&self, source: SourceId) -> Vec<FetchId> {
        let is_its = |transfer: &Transfer| transfer.source == source;
        let of = |(id, fetch): (&FetchId, &Fetch)| is_its(fetch.transfer.as_ref()?).then_some(*id);
        self.fetches.iter().filter_map(of).collect()
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

    /// The usual speed of a source in bytes per second.
    pub(super) fn usual(&self, source: &SourceId) -> Option<u64> {
        self.speeds.usual(source)
    }

    /// How much there is of everything that could grow.
    pub(super) fn sizes(&self) -> Vec<Size> {
        let size = |what, count, limit| Size { what, count, limit };
        vec![
            size("fetches", self.fetches.len(), FETCHES_MAX),
            size("speeds", self.speeds.len(), speed::SPEEDS_MAX),
        ]
    }

    /// Opens a transfer from the best source that may still be tried, asks for more, or gives up.
    fn open(&mut self, id: FetchId, sources: &[SourceId], now: Instant) -> Vec<Event> {
        let best = self.best(id, sources, now);
        let Some(fetch) = self.fetches.get_mut(&id) else {
            return Vec::new();
        };
        let mut events = Vec::new();
        // The second time round it is worth knowing what else there is.
        let is_fresh = best.is_some_and(|source| !fetch.tried.contains_key(&source));
        if !is_fresh && fetch.caches == Caches::NotAsked {
            fetch.caches = Caches::Asking;
            events.push(Event::AskCaches {
                fetch: id,
                hash: fetch.hash,
                nar_hash: fetch.nar_hash,
            });
        }
        match best {
            Some(source) => {
                *fetch.tried.entry(source).or_default() += 1;
                fetch.attempts += 1;
                fetch.transfer = Some(Transfer::new(source, fetch.at, now));
                events.push(Event::Open {
                    fetch: id,
                    attempt: fetch.attempts,
                    source,
                    from: fetch.at,
                });
            }
            None if fetch.caches == Caches::Asking => {}
            None => {
                self.fetches.remove(&id);
                events.push(Event::Failed { fetch: id });
            }
        }
        events
    }

    /// The least tried; of those a member rather than a cache, one that did not fail lately, the
    /// one with the most speed left per transfer. Caches are in order of preference.
    fn best(&self, id: FetchId, sources: &[SourceId], now: Instant) -> Option<SourceId> {
        let fetch = self.fetches.get(&id)?;
        let tried = |source: &SourceId| fetch.tried.get(source).copied().unwrap_or(0);
        let load = |source: &SourceId| {
            let transfers = self
                .fetches
                .values()
                .filter_map(|one| one.transfer.as_ref());
            transfers
                .filter(|transfer| transfer.source == *source)
                .count() as u64
        };
        let allowed = sources.iter().enumerate();
        let allowed = allowed.filter(|(_, source)| tried(source) < ATTEMPTS_PER_SOURCE);
        let best = allowed.min_by_key(|(place, source)| {
            let is_cache = matches!(source, SourceId::Cache(_));
            let (slowness, lot) = if is_cache {
                (0, *place as u64)
            } else {
                let lot = self.lots.draw(&fetch.hash, source);
                (self.speeds.slowness(source, load(source)), lot)
            };
            let has_failed = self.speeds.has_failed(source, now);
            (tried(source), is_cache, has_failed, slowness, lot)
        });
        best.map(|(_, source)| *source)
    }

    /// Ends the running transfer and learns from its course.
    fn end_transfer(&mut self, id: FetchId, now: Instant) -> Option<SourceId> {
        let fetch = self.fetches.get_mut(&id)?;
        let transfer = fetch.transfer.take()?;
        let bytes = fetch.at.saturating_sub(transfer.from);
        let busy = transfer.busy(now);
        self.speeds.learn(transfer.source, bytes, busy);
        Some(transfer.source)
    }
}

/// What a running transfer is about.
pub(super) struct Running {
    pub(super) hash: StorePathHash,
    pub(super) nar_hash: NarHash,
    pub(super) source: SourceId,
}

/// What a fetch that is over was about.
pub(super) struct Finished {
    pub(super) hash: StorePathHash,
    pub(super) nar_hash: NarHash,
    pub(super) contributors: BTreeSet<SourceId>,
}

impl Transfer {
    fn new(source: SourceId, from: u64, now: Instant) -> Transfer {
        let start = Sample {
            busy: Duration::ZERO,
            at: from,
        };
        Transfer {
            source,
            from,
            since: now,
            progress_at: now,
            held_up: Duration::ZERO,
            samples: VecDeque::from([start]),
        }
    }

    /// How long it ran without waiting for its reader.
    fn busy(&self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.since);
        elapsed.saturating_sub(self.held_up)
    }

    /// Notes where it is; returns whether it was too slow over the whole of the last window.
    fn crawls(&mut self, at: u64, usual: Option<u64>, now: Instant) -> bool {
        let busy = self.busy(now);
        let is_due = |last: &Sample| busy >= last.busy + SAMPLE_INTERVAL;
        if self.samples.back().is_some_and(is_due) {
            self.samples.push_back(Sample { busy, at });
        }
        // The oldest sample that is still a whole window old is where the window begins.
        while let Some(second) = self.samples.get(1)
            && second.busy + CRAWL_WINDOW <= busy
        {
            self.samples.pop_front();
        }
        let (Some(start), Some(usual)) = (self.samples.front(), usual) else {
            return false;
        };
        let window = busy.saturating_sub(start.busy);
        if window < CRAWL_WINDOW {
            return false;
        }
        let speed = bytes_per_second(at.saturating_sub(start.at), window);
        speed < usual / 100 * CRAWL_PERCENT
    }
}
