//! Lookup: from a store path hash to a verified narinfo, by asking as few peers as possible.
//!
//! The index says whom to ask, so a path that nobody holds costs no packet. The fastest provider
//! is asked first; when it takes longer than it usually does, the next one is asked as well, and
//! the first verified answer wins. One query serves everyone who waits for the same hash, and
//! queries to one peer travel together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LookupId;
use crate::message::{ANSWERS_BYTES_MAX, Answer, LOOKUP_HASHES_MAX};
use crate::narinfo::{NarInfo, VerifiedNarInfo};
use crate::peer::PeerId;
use crate::signature::TrustedKeys;
use crate::store_path::{StoreDir, StorePathHash};

/// How long queries to one peer are collected. Nix sends its narinfo requests in bursts of up to
/// 25 connections; together they cost one message and one database visit.
const BATCH_WINDOW: Duration = Duration::from_millis(2);

/// Nix asks for narinfos while its scheduler waits, so an answer later than this is worth less
/// than a 404 (NIX.md §5.5: hard cap about 1 s).
const LOOKUP_DEADLINE: Duration = Duration::from_millis(900);

/// The shortest wait before a second peer is asked; below it, a hedge would only race the first answer.
const HEDGE_MIN: Duration = Duration::from_millis(20);

/// The wait for a peer that was never asked.
const HEDGE_UNKNOWN: Duration = Duration::from_millis(50);

/// Answer times remembered per peer, to take the 90th percentile of.
const LATENCIES_KEPT: usize = 32;

/// Peers whose answer times are remembered.
const LATENCIES_MAX: usize = 1024;

/// Verified narinfos remembered. What was proved once stays true; only who holds the path changes.
/// About 1 KiB each.
const REMEMBERED_MAX: usize = 8192;

/// Queries under way at once; Nix keeps at most a few hundred open. Beyond it, the answer is 404.
const QUERIES_MAX: usize = 16_384;

/// What a step in looking up means for the rest of the mind.
pub(super) enum Event {
    Ask {
        peer: PeerId,
        request: u64,
        hashes: Vec<StorePathHash>,
    },
    HaveNot {
        peer: PeerId,
        hash: StorePathHash,
    },
    Lied {
        peer: PeerId,
        offence: &'static str,
    },
    Found {
        lookup: LookupId,
        narinfo: Arc<VerifiedNarInfo>,
    },
    NotFound {
        lookup: LookupId,
    },
}

pub(super) struct Lookups {
    queries: BTreeMap<StorePathHash, Query>,
    batches: BTreeMap<PeerId, Batch>,
    /// Requests on the wire.
    requests: BTreeMap<(PeerId, u64), Request>,
    next_request: u64,
    latencies: BTreeMap<PeerId, Latency>,
    remembered: BTreeMap<StorePathHash, Arc<VerifiedNarInfo>>,
    /// Keys of `remembered`, oldest first.
    remembered_order: VecDeque<StorePathHash>,
    /// Nothing has to be done before this, so that an input costs no look at every open query.
    due: Option<(Instant, &'static str)>,
}

struct Latency {
    /// The last [`LATENCIES_KEPT`] answer times.
    recent: VecDeque<Duration>,
    /// Their 90th percentile, at least [`HEDGE_MIN`].
    hedge_delay: Duration,
}

struct Query {
    waiting: Vec<LookupId>,
    /// Not asked yet, best first.
    candidates: VecDeque<PeerId>,
    /// Asked, not answered.
    asked: BTreeSet<PeerId>,
    hedge_at: Instant,
    deadline: Instant,
}

struct Batch {
    hashes: Vec<StorePathHash>,
    send_at: Instant,
}

struct Request {
    sent_at: Instant,
    hashes: BTreeSet<StorePathHash>,
}

impl Lookups {
    pub(super) fn new() -> Lookups {
        Lookups {
            queries: BTreeMap::new(),
            batches: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_request: 0,
            latencies: BTreeMap::new(),
            remembered: BTreeMap::new(),
            remembered_order: VecDeque::new(),
            due: None,
        }
    }

    /// Starts or joins the query for `hash` among `providers` (best first).
    pub(super) fn start(
        &mut self,
        lookup: LookupId,
        hash: StorePathHash,
        providers: Vec<PeerId>,
        now: Instant,
    ) -> Vec<Event> {
        if let Some(query) = self.queries.get_mut(&hash) {
            query.waiting.push(lookup);
            return Vec::new();
        }
        if providers.is_empty() || self.queries.len() >= QUERIES_MAX {
            return vec![Event::NotFound { lookup }];
        }
        if let Some(narinfo) = self.remembered.get(&hash) {
            return vec![Event::Found {
                lookup,
                narinfo: narinfo.clone(),
            }];
        }
        let query = Query {
            waiting: vec![lookup],
            candidates: providers.into(),
            asked: BTreeSet::new(),
            hedge_at: now,
            deadline: now + LOOKUP_DEADLINE,
        };
        self.queries.insert(hash, query);
        self.ask_next(&hash, now)
    }

    /// Stops waiting; the query goes on for the others and for the memory.
    pub(super) fn cancel(&mut self, lookup: LookupId, hash: &StorePathHash) {
        if let Some(query) = self.queries.get_mut(hash) {
            query.waiting.retain(|one| *one != lookup);
        }
    }

    /// Reads the answers of a peer.
    pub(super) fn answers(
        &mut self,
        peer: PeerId,
        request: u64,
        answers: Vec<Answer>,
        trust: &TrustedKeys,
        store_dir: &StoreDir,
        now: Instant,
    ) -> Vec<Event> {
        let key = (peer, request);
        // Late, after the deadline or a lost link; not worth a word.
        let Some(asked) = self.requests.get_mut(&key) else {
            return Vec::new();
        };
        let took = now.saturating_duration_since(asked.sent_at);
        let is_asked = |answer: &Answer| asked.hashes.remove(&answer.hash);
        let (answers, unasked): (Vec<Answer>, Vec<Answer>) =
            answers.into_iter().partition(is_asked);
        if asked.hashes.is_empty() {
            self.requests.remove(&key);
        }
        self.learn_latency(peer, took);

        let mut events = Vec::new();
        if !unasked.is_empty() {
            events.push(Event::Lied {
                peer,
                offence: "answered what was not asked",
            });
        }
        for Answer { hash, narinfo } in answers {
            let Some(text) = narinfo else {
                events.push(Event::HaveNot { peer, hash });
                events.extend(self.failed(&hash, peer, now));
                continue;
            };
            let parsed = match NarInfo::parse(&text, store_dir) {
                Ok(narinfo) if narinfo.store_path.hash() == hash => narinfo,
                Ok(_) => {
                    events.push(Event::Lied {
                        peer,
                        offence: "sent a narinfo of another path",
                    });
                    events.extend(self.failed(&hash, peer, now));
                    continue;
                }
                Err(_) => {
                    events.push(Event::Lied {
                        peer,
                        offence: "sent a malformed narinfo",
                    });
                    events.extend(self.failed(&hash, peer, now));
                    continue;
                }
            };
            match VerifiedNarInfo::verify(parsed, trust, store_dir) {
                Ok(narinfo) => events.extend(self.found(hash, Arc::new(narinfo))),
                // Not a lie: the peer may trust keys that we do not.
                Err(_) => events.extend(self.failed(&hash, peer, now)),
            }
        }
        events
    }

    /// Gives up on everything that was asked of a peer that is gone.
    pub(super) fn departed(&mut self, peer: PeerId, now: Instant) -> Vec<Event> {
        self.batches.remove(&peer);
        self.requests.retain(|(asked, _), _| *asked != peer);
        let waits = |(_, query): &(&StorePathHash, &Query)| query.asked.contains(&peer);
        let hashes: Vec<StorePathHash> = self
            .queries
            .iter()
            .filter(waits)
            .map(|(hash, _)| *hash)
            .collect();
        for query in self.queries.values_mut() {
            query.candidates.retain(|candidate| *candidate != peer);
        }
        hashes
            .iter()
            .flat_map(|hash| self.failed(hash, peer, now))
            .collect()
    }

    /// Forgets answer times, which say little about the network after a sleep.
    pub(super) fn woke(&mut self) {
        self.latencies.clear();
    }

    /// Sends due batches, hedges slow queries, ends overdue ones.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<Event> {
        if self.due.is_none_or(|(at, _)| at > now) {
            return Vec::new();
        }
        let mut events = Vec::new();
        let overdue: Vec<StorePathHash> = keys_where(&self.queries, |query| query.deadline <= now);
        for hash in overdue {
            events.extend(self.not_found(&hash));
        }
        let slow = keys_where(&self.queries, |query| {
            query.hedge_at <= now && !query.candidates.is_empty()
        });
        for hash in slow {
            events.extend(self.ask_next(&hash, now));
        }
        let due = keys_where(&self.batches, |batch| batch.send_at <= now);
        for peer in due {
            events.extend(self.send_batch(peer, now));
        }
        self.requests.retain(|_, request| request.forget_at() > now);
        self.due = self.next_due();
        events
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        self.due
    }

    fn next_due(&self) -> Option<(Instant, &'static str)> {
        let queries = self.queries.values().flat_map(|query| {
            let hedge = (query.hedge_at, "hedge a lookup");
            let hedge = (!query.candidates.is_empty()).then_some(hedge);
            [Some((query.deadline, "lookup overdue")), hedge]
        });
        let batches = self
            .batches
            .values()
            .map(|batch| Some((batch.send_at, "send lookups")));
        let requests = self.requests.values();
        let requests = requests.map(|request| Some((request.forget_at(), "forget a question")));
        let all = queries.chain(batches).chain(requests).flatten();
        all.min_by_key(|(at, _)| *at)
    }

    /// Orders providers by how fast they usually answer; unknown ones as if they took a while.
    pub(super) fn order(&self, providers: &mut [PeerId]) {
        providers.sort_by_key(|peer| self.hedge_delay(peer));
    }

    fn ask_next(&mut self, hash: &StorePathHash, now: Instant) -> Vec<Event> {
        let Some(query) = self.queries.get_mut(hash) else {
            return Vec::new();
        };
        let Some(peer) = query.candidates.pop_front() else {
            let is_hopeless = query.asked.is_empty();
            return if is_hopeless {
                self.not_found(hash)
            } else {
                Vec::new()
            };
        };
        query.asked.insert(peer);
        let delay = self.hedge_delay(&peer);
        let send_at = now + BATCH_WINDOW;
        if let Some(query) = self.queries.get_mut(hash) {
            query.hedge_at = send_at + delay;
        }
        // Whatever else comes of this is due later, and that tick finds out when.
        if self.due.is_none_or(|(at, _)| at > send_at) {
            self.due = Some((send_at, "send lookups"));
        }
        let fresh = || Batch {
            hashes: Vec::new(),
            send_at,
        };
        let batch = self.batches.entry(peer).or_insert_with(fresh);
        batch.hashes.push(*hash);
        let is_full = batch.hashes.len() >= LOOKUP_HASHES_MAX;
        if is_full {
            self.send_batch(peer, now)
        } else {
            Vec::new()
        }
    }

    fn send_batch(&mut self, peer: PeerId, now: Instant) -> Vec<Event> {
        let Some(mut batch) = self.batches.remove(&peer) else {
            return Vec::new();
        };
        // A query may have been answered by another peer while the batch was collected.
        batch.hashes.retain(|hash| self.queries.contains_key(hash));
        if batch.hashes.is_empty() {
            return Vec::new();
        }
        let request = self.next_request;
        self.next_request += 1;
        let sent = Request {
            sent_at: now,
            hashes: batch.hashes.iter().copied().collect(),
        };
        self.requests.insert((peer, request), sent);
        vec![Event::Ask {
            peer,
            request,
            hashes: batch.hashes,
        }]
    }

    fn failed(&mut self, hash: &StorePathHash, peer: PeerId, now: Instant) -> Vec<Event> {
        let asked = self
            .queries
            .get_mut(hash)
            .is_some_and(|query| query.asked.remove(&peer));
        if asked {
            self.ask_next(hash, now)
        } else {
            Vec::new()
        }
    }

    fn found(&mut self, hash: StorePathHash, narinfo: Arc<VerifiedNarInfo>) -> Vec<Event> {
        if self.remembered.insert(hash, narinfo.clone()).is_none() {
            self.remembered_order.push_back(hash);
        }
        if self.remembered_order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.remembered_order.pop_front()
        {
            self.remembered.remove(&oldest);
        }
        let waiting = self
            .queries
            .remove(&hash)
            .map_or(Vec::new(), |query| query.waiting);
        let found = |lookup| Event::Found {
            lookup,
            narinfo: narinfo.clone(),
        };
        waiting.into_iter().map(found).collect()
    }

    fn not_found(&mut self, hash: &StorePathHash) -> Vec<Event> {
        let waiting = self
            .queries
            .remove(hash)
            .map_or(Vec::new(), |query| query.waiting);
        waiting
            .into_iter()
            .map(|lookup| Event::NotFound { lookup })
            .collect()
    }

    fn learn_latency(&mut self, peer: PeerId, took: Duration) {
        if !self.latencies.contains_key(&peer) && self.latencies.len() >= LATENCIES_MAX {
            self.latencies.pop_first();
        }
        let latency = self.latencies.entry(peer).or_insert_with(|| Latency {
            recent: VecDeque::new(),
            hedge_delay: HEDGE_UNKNOWN,
        });
        if latency.recent.len() == LATENCIES_KEPT {
            latency.recent.pop_front();
        }
        latency.recent.push_back(took);
        let mut sorted: Vec<Duration> = latency.recent.iter().copied().collect();
        sorted.sort_unstable();
        latency.hedge_delay = sorted[sorted.len() * 9 / 10].max(HEDGE_MIN);
    }

    fn hedge_delay(&self, peer: &PeerId) -> Duration {
        let known = self.latencies.get(peer);
        known.map_or(HEDGE_UNKNOWN, |latency| latency.hedge_delay)
    }
}

impl Request {
    /// An answer later than this is not waited for by anyone.
    fn forget_at(&self) -> Instant {
        self.sent_at + 2 * LOOKUP_DEADLINE
    }
}

/// Cuts answers into messages that keep [`ANSWERS_BYTES_MAX`]; a narinfo beyond it is HaveNot.
pub(super) fn split_answers(answers: Vec<Answer>) -> Vec<Vec<Answer>> {
    let mut messages = Vec::new();
    let mut current: Vec<Answer> = Vec::new();
    let mut bytes = 0;
    for mut answer in answers {
        let mut size = answer.narinfo.as_ref().map_or(0, String::len);
        if size > ANSWERS_BYTES_MAX {
            answer.narinfo = None;
            size = 0;
        }
        if bytes + size > ANSWERS_BYTES_MAX || current.len() == LOOKUP_HASHES_MAX {
            messages.push(std::mem::take(&mut current));
            bytes = 0;
        }
        bytes += size;
        current.push(answer);
    }
    if !current.is_empty() {
        messages.push(current);
    }
    messages
}

fn keys_where<K: Copy + Ord, V>(map: &BTreeMap<K, V>, holds: impl Fn(&V) -> bool) -> Vec<K> {
    map.iter()
        .filter(|(_, value)| holds(value))
        .map(|(key, _)| *key)
        .collect()
}
