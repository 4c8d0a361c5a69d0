//! Lookup: from a store path hash to a verified narinfo, by asking as few sources as possible.
//!
//! The index says which peers to ask, so a path that nobody holds costs no packet, unless an anchor
//! or an upstream must be asked. The best source is asked first; when it takes longer than it usually does,
//! the next one is asked as well. One query serves everyone who waits for the same hash,
//! and questions to one source travel together. A query always ends by its deadline; what is
//! answered later still fills the memory.
//!
//! Order: peers on the local network, other peers, anchors, upstreams; within each by how fast they
//! answer, then by how much they have to answer, then by lot. An answer from afar waits out its
//! own hedge window for a peer nearby that was asked before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{BreakerView, CacheRole, Candidate, Chance, FetchId, LookupId, Lots, Size, SourceId};
use crate::availability::HashPrefix;
use crate::hash::NarHash;
use crate::message::{ANSWERS_BYTES_MAX, Answer, LOOKUP_HASHES_MAX};
use crate::narinfo::{NarInfo, Proof, Unverified, VerifiedNarInfo};
use crate::peer::PeerId;
use crate::signature::TrustedKeys;
use crate::store_path::{StoreDir, StorePath, StorePathHash};

mod questions;
mod latency;
mod breaker;
mod memory;
mod ahead;

use ahead::Ahead;
use breaker::Breaker;
use latency::Latencies;
use memory::{Misses, Remembered, is_fresh};
use questions::{BATCH_WINDOW, Questions};

/// Nix asks for narinfos while its scheduler waits, so an answer later than this is worth less
/// than a 404 (NIX.md §5.5: hard cap about 1 s).
const LOOKUP_DEADLINE: Duration = Duration::from_millis(900);

/// Queries under way at once; Nix keeps at most a few hundred open. Beyond it, the answer is 404.
const QUERIES_MAX: usize = 16_384;

/// Paths looked at for asking ahead per input, so that none holds up what comes next: each costs
/// two visits of the index.
const AHEAD_PER_STEP: usize = 16;

/// What a step in looking up means for the rest of the mind.
pub(super) enum Event {
    Ask {
        source: SourceId,
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
    /// The caches were asked on behalf of a fetch; what they said is in the memory.
    CachesAsked {
        fetch: FetchId,
    },
}

pub(super) struct Lookups {
    lots: Lots,
    roles: Vec<CacheRole>,
    queries: BTreeMap<Wanted, Query>,
    questions: Questions,
    latencies: Latencies,
    breakers: Vec<Breaker>,
    remembered: Remembered,
    misses: Misses,
    ahead: Ahead,
    /// Nothing has to be done before this, so that an input costs no look at every open query.
    due: Option<(Instant, &'static str)>,
}

/// What a query is for: any narinfo of a path, or, for a fetch that has lost its peers, exactly this
/// NAR from a cache.
type Wanted = (StorePathHash, Option<NarHash>);

struct Query {
    waiting: Vec<Waiting>,
    /// Not asked yet, best first.
    candidates: VecDeque<Candidate>,
    /// Asked, not answered; and whether an answer from afar waits for it.
    asked: BTreeMap<SourceId, bool>,
    /// An answer from afar, until `hedge_at`.
    held: Option<Arc<VerifiedNarInfo>>,
    hedge_at: Instant,
    deadline: Instant,
    is_ahead: bool,
}

struct Waiting {
    waiter: Waiter,
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiter {
    Client(LookupId),
    Fetch(FetchId),
}

/// What makes a narinfo true.
pub(super) struct Belief<'a> {
    pub(super) trust: &'a TrustedKeys,
    pub(super) store_dir: &'a StoreDir,
    /// Whether a peer's word counts for what it built. That ends with its membership, unlike a proof by
    /// signature.
    pub(super) may_vouch: &'a dyn Fn(&PeerId) -> bool,
}

impl Belief<'_> {
    fn verify(&self, narinfo: NarInfo) -> Result<VerifiedNarInfo, Unverified> {
        VerifiedNarInfo::verify_vouched(narinfo, self.trust, self.store_dir, self.may_vouch)
    }

    /// Whether what was true once still is.
    fn holds(&self, narinfo: &VerifiedNarInfo) -> bool {
        match narinfo.proof() {
            Proof::Vouched(peer) => (self.may_vouch)(peer),
            Proof::Signed(_) | Proof::ContentAddressed | Proof::Local => true,
        }
    }
}

impl Lookups {
    pub(super) fn new(roles: Vec<CacheRole>, lots: Lots) -> Lookups {
        Lookups {
            lots,
            breakers: roles.iter().map(|_| Breaker::default()).collect(),
            roles,
            queries: BTreeMap::new(),
            questions: Questions::default(),
            latencies: Latencies::default(),
            remembered: Remembered::default(),
            misses: Misses::default(),
            ahead: Ahead::new(),
            due: None,
        }
    }

    /// Starts or joins the query for `hash`; `peers` are those that may be asked.
    pub(super) fn start(
        &mut self,
        lookup: LookupId,
        hash: StorePathHash,
        peers: Vec<Candidate>,
        belief: &Belief<'_>,
        now: Instant,
    ) -> Vec<Event> {
        let until = now + LOOKUP_DEADLINE;
        let waiter = Waiter::Client(lookup);
        if let Some(query) = self.queries.get_mut(&(hash, None)) {
            query.waiting.push(Waiting { waiter, until });
            query.deadline = until;
            query.is_ahead = false;
            let hedge_at = query.hedge_at;
            self.wake_at(hedge_at, "hedge a lookup");
            return Vec::new();
        }
        let (breakers, roles) = (&self.breakers, &self.roles);
        let is_believed = |source: &SourceId, at: Instant| match source {
            SourceId::Peer(_) => peers.iter().any(|peer| peer.source == *source),
            SourceId::Cache(cache) => {
                breakers.get(*cache).is_some_and(Breaker::is_closed)
                    && is_fresh_of(roles, *cache, at, now)
            }
        };
        if let Some(narinfo) = self
            .remembered
            .recall(&hash, is_believed, |known| belief.holds(known))
        {
            self.look_ahead(&narinfo, true, now);
            return vec![Event::Found { lookup, narinfo }];
        }
        self.want(&hash);
        let candidates = self.candidates(&hash, peers, now);
        if candidates.is_empty() || self.queries.len() >= QUERIES_MAX {
            return vec![Event::NotFound { lookup }];
        }
        let waiting = vec![Waiting { waiter, until }];
        self.ask_about((hash, None), waiting, candidates, now)
    }

    /// Asks the caches for exactly this NAR on behalf of a fetch, which is told by
    /// [`Event::CachesAsked`]. Returns `None` when there is none to ask.
    pub(super) fn ask_caches(
        &mut self,
        fetch: FetchId,
        hash: StorePathHash,
        nar_hash: NarHash,
        now: Instant,
    ) -> Option<Vec<Event>> {
        let waiting = Waiting {
            waiter: Waiter::Fetch(fetch),
            until: now + LOOKUP_DEADLINE,
        };
        let wanted = (hash, Some(nar_hash));
        if let Some(query) = self.queries.get_mut(&wanted) {
            query.deadline = waiting.until;
            query.waiting.push(waiting);
            return Some(Vec::new());
        }
        self.want(&hash);
        let mut candidates = self.candidates(&hash, Vec::new(), now);
        let remembered = &self.remembered;
        let is_known = |source: &SourceId| remembered.was_told_by(&hash, &nar_hash, source);
        candidates.retain(|candidate| !is_known(&candidate.source));
        if candidates.is_empty() || self.queries.len() >= QUERIES_MAX {
            return None;
        }
        Some(self.ask_about(wanted, vec![waiting], candidates, now))
    }

    /// Returns a path whose narinfo somebody will want soon, for [`Lookups::start_ahead`]. At most
    /// [`AHEAD_PER_STEP`] times between two inputs; `step` counts them.
    pub(super) fn next_ahead(&mut self, step: &mut usize, now: Instant) -> Option<StorePathHash> {
        if !self.ahead.has_more() || self.is_looking_ahead_enough() {
            // The end of one of them is an input that asks again.
            return None;
        }
        if *step >= AHEAD_PER_STEP {
            self.wake_at(now + BATCH_WINDOW, "look ahead");
            return None;
        }
        *step += 1;
        self.ahead.next()
    }

    /// Asks for a path that nobody waits for.
    pub(super) fn start_ahead(
        &mut self,
        hash: StorePathHash,
        peers: Vec<Candidate>,
        now: Instant,
    ) -> Vec<Event> {
        if self.is_known(&hash, now) {
            return Vec::new();
        }
        let mut candidates = self.candidates(&hash, peers, now);
        // What nobody wants yet is no reason to wait for who did not answer.
        candidates.retain(|candidate| !self.latencies.is_silent(&candidate.source));
        if candidates.is_empty() {
            return Vec::new();
        }
        self.ahead.spend();
        self.ask_about((hash, None), Vec::new(), candidates, now)
    }

    /// Stops waiting; the query goes on for the others and for the memory.
    pub(super) fn cancel(&mut self, lookup: LookupId, hash: &StorePathHash) {
        if let Some(query) = self.queries.get_mut(&(*hash, None)) {
            let waiter = Waiter::Client(lookup);
            query.waiting.retain(|waiting| waiting.waiter != waiter);
        }
    }

    /// Reads the answers of a source.
    pub(super) fn answers(
        &mut self,
        source: SourceId,
        request: u64,
        answers: Vec<Answer>,
        belief: &Belief<'_>,
        chance: &mut Chance,
        now: Instant,
    ) -> Vec<Event> {
        // Too late to know what it was about, or about a lost link: not worth a word.
        let Some(heard) = self.questions.answered(source, request, answers, now) else {
            return Vec::new();
        };
        let mut events = Vec::new();
        if let (SourceId::Peer(peer), true) = (source, heard.has_unasked) {
            let offence = "answered what was not asked";
            events.push(Event::Lied { peer, offence });
        }
        if heard.answers.is_empty() {
            return events;
        }
        self.latencies.answered(source, heard.took);

        let mut nonsense = None;
        for Answer { hash, narinfo } in heard.answers {
            let Some(text) = narinfo else {
                events.extend(self.has_not(hash, source, now));
                continue;
            };
            let parsed = match NarInfo::parse(&text, belief.store_dir) {
                Ok(narinfo) if narinfo.store_path.hash() == hash => narinfo,
                Ok(_) => {
                    nonsense = Some("sent a narinfo of another path");
                    events.extend(self.failed(&hash, source, now));
                    continue;
                }
                Err(_) => {
                    nonsense = Some("sent a malformed narinfo");
                    events.extend(self.failed(&hash, source, now));
                    continue;
                }
            };
            match belief.verify(parsed) {
                Ok(narinfo) => events.extend(self.told(hash, source, Arc::new(narinfo), now)),
                // Not a lie: the source may trust keys that we do not.
                Err(_) => {
                    if let SourceId::Cache(cache) = source {
                        self.learn_miss(hash, cache, now);
                    }
                    events.extend(self.failed(&hash, source, now));
                }
            }
        }
        match (source, nonsense) {
            (SourceId::Peer(peer), Some(offence)) => events.push(Event::Lied { peer, offence }),
            (SourceId::Cache(cache), Some(_)) => {
                events.extend(self.cache_failed(cache, chance, now));
            }
            (SourceId::Cache(cache), None) => self.cache_answered(cache),
            (SourceId::Peer(_), None) => {}
        }
        events
    }

    /// A cache will not answer the rest of a request.
    pub(super) fn request_failed(
        &mut self,
        cache: usize,
        request: u64,
        chance: &mut Chance,
        now: Instant,
    ) -> Vec<Event> {
        let source = SourceId::Cache(cache);
        let Some(asked) = self.questions.failed(source, request) else {
            return Vec::new();
        };
        let mut events = Vec::new();
        if asked.is_news {
            self.latencies.unanswered(source);
            events = self.cache_failed(cache, chance, now);
        }
        for hash in &asked.hashes {
            events.extend(self.failed(hash, source, now));
        }
        events
    }

    /// A cache failed us, here or in a transfer.
    pub(super) fn cache_failed(
        &mut self,
        cache: usize,
        chance: &mut Chance,
        now: Instant,
    ) -> Vec<Event> {
        let breaker = self.breakers.get_mut(cache);
        if !breaker.is_some_and(|breaker| breaker.failed(chance, now)) {
            return Vec::new();
        }
        // It counts as not asked from here on: nobody waits for it any longer.
        let source = SourceId::Cache(cache);
        self.questions.drop_unsent(source);
        self.give_up_on(source, now)
    }

    /// A cache did what it is there for, here or in a transfer.
    pub(super) fn cache_answered(&mut self, cache: usize) {
        if let Some(breaker) = self.breakers.get_mut(cache) {
            breaker.answered();
        }
    }

    /// A source turned out not to have the NAR it told of, or a wrong one. Returns whether it had
    /// told of it: if not, it may hold another build of the same path.
    pub(super) fn lost(
        &mut self,
        hash: StorePathHash,
        nar_hash: &NarHash,
        source: SourceId,
        now: Instant,
    ) -> bool {
        let had_told = self.remembered.was_told_by(&hash, nar_hash, &source);
        if had_told {
            self.remembered.withdraw(&hash, &source);
        }
        if let SourceId::Cache(cache) = source {
            self.learn_miss(hash, cache, now);
        }
        had_told
    }

    /// A writer announced these paths: what caches lack may have changed with it.
    pub(super) fn announced(&mut self, prefixes: impl IntoIterator<Item = HashPrefix>) {
        if self.misses.is_empty() {
            return;
        }
        for prefix in prefixes {
            self.misses.announced(prefix);
        }
    }

    /// Gives up on everything that was asked of a peer that is gone.
    pub(super) fn departed(&mut self, peer: PeerId, now: Instant) -> Vec<Event> {
        let source = SourceId::Peer(peer);
        self.questions.drop_unsent(source);
        self.questions.forget(source);
        self.give_up_on(source, now)
    }

    /// Forgets what was learned about the network: after a sleep, or on another one.
    pub(super) fn network_changed(&mut self) {
        self.latencies.clear();
        self.misses.clear();
        for breaker in &mut self.breakers {
            breaker.reset();
        }
        // What was asked over the old network says nothing about the new one.
        self.questions.excuse_all();
    }

    /// Sends due batches, hedges slow queries, ends overdue ones, counts what was not answered.
    pub(super) fn tick(&mut self, chance: &mut Chance, now: Instant) -> Vec<Event> {
        if self.due.is_none_or(|(at, _)| at > now) {
            return Vec::new();
        }
        let mut events = Vec::new();
        for source in self.questions.unanswered(now) {
            self.latencies.unanswered(source);
            if let SourceId::Cache(cache) = source {
                events.extend(self.cache_failed(cache, chance, now));
            }
        }
        let overdue = keys_where(&self.queries, |query| {
            query.deadline <= now || query.waiting.iter().any(|waiting| waiting.until <= now)
        });
        for wanted in overdue {
            events.extend(self.overdue(&wanted, now));
        }
        let held = keys_where(&self.queries, |query| {
            query.hedge_at <= now && query.held.is_some()
        });
        for wanted in held {
            let held = self.queries.get_mut(&wanted);
            if let Some(narinfo) = held.and_then(|query| query.held.take()) {
                events.extend(self.found(&wanted, narinfo, now));
            }
        }
        let slow = keys_where(&self.queries, |query| {
            query.hedge().is_some_and(|at| at <= now)
        });
        for wanted in slow {
            events.extend(self.ask_next(&wanted, now));
        }
        for cache in 0..self.breakers.len() {
            events.extend(self.probe(cache, now));
        }
        for (source, hashes) in self.questions.due(now) {
            events.extend(self.ask(source, hashes, now));
        }
        self.questions.forget_old(now);
        self.due = self.next_due(now);
        events
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        self.due
    }

    /// The caches believed to have exactly this NAR and able to give it, in order of preference.
    pub(super) fn caches(
        &self,
        hash: &StorePathHash,
        nar_hash: &NarHash,
    ) -> Vec<(usize, Arc<VerifiedNarInfo>)> {
        let told = self.remembered.caches(hash, nar_hash);
        let is_well = |(cache, _): &(usize, _)| self.is_closed(*cache);
        let mut caches: Vec<_> = told
            .filter(is_well)
            .map(|(cache, narinfo)| (cache, narinfo.clone()))
            .collect();
        caches.sort_by_key(|(cache, _)| (self.roles.get(*cache).copied(), *cache));
        caches
    }

    /// Sorts peers, best first.
    pub(super) fn order(&self, hash: &StorePathHash, peers: &mut [Candidate]) {
        let load = self.questions.load();
        peers.sort_by_cached_key(|peer| {
            let source = &peer.source;
            (
                self.latencies.is_silent(source),
                !peer.is_linked,
                !peer.is_near,
                self.latencies.pace(source),
                load.get(source).copied().unwrap_or(0),
                self.lots.draw(hash, source),
            )
        });
    }

    pub(super) fn lots(&self) -> Lots {
        self.lots
    }

    /// The 90th percentile of a source's answer times.
    pub(super) fn usual(&self, source: &SourceId) -> Option<Duration> {
        self.latencies.usual(source)
    }

    /// The breaker of each cache, by number.
    pub(super) fn breakers(&self, now: Instant) -> impl Iterator<Item = (CacheRole, BreakerView)> {
        let view = move |(role, breaker): (&CacheRole, &Breaker)| {
            let view = match breaker.probe_at() {
                None => BreakerView::Closed,
                Some(at) => BreakerView::Open {
                    probe_in: at.saturating_duration_since(now),
                },
            };
            (*role, view)
        };
        self.roles.iter().zip(&self.breakers).map(view)
    }

    /// How much there is of everything that could grow.
    pub(super) fn sizes(&self) -> Vec<Size> {
        let size = |what, count, limit| Size { what, count, limit };
        vec![
            size("queries", self.queries.len(), QUERIES_MAX),
            size("questions", self.questions.len(), questions::QUESTIONS_MAX),
            size("latencies", self.latencies.len(), latency::LATENCIES_MAX),
            size(
                "remembered narinfos",
                self.remembered.len(),
                memory::REMEMBERED_MAX,
            ),
            size("misses of caches", self.misses.len(), memory::MISSES_MAX),
            size("paths ahead", self.ahead.len(), ahead::WAITING_MAX),
        ]
    }

    fn next_due(&self, now: Instant) -> Option<(Instant, &'static str)> {
        let queries = self.queries.values().flat_map(|query| {
            let waiting = query.waiting.iter().map(|waiting| waiting.until).min();
            let overdue = waiting.map_or(query.deadline, |until| until.min(query.deadline));
            let held = query
                .held
                .is_some()
                .then_some((query.hedge_at, "answer from afar"));
            let hedge = query.hedge().map(|at| (at, "hedge a lookup"));
            [Some((overdue, "lookup overdue")), held, hedge]
        });
        let probes = self.breakers.iter().map(Breaker::due);
        let probes = probes.map(|due| due.map(|at| (at, "probe a cache")));
        let ahead = self.ahead.has_more() && !self.is_looking_ahead_enough();
        let ahead = ahead.then_some((now + BATCH_WINDOW, "look ahead"));
        let questions = self.questions.deadline();
        let all = queries.chain(probes).chain([questions, ahead]);
        all.flatten().min_by_key(|(at, _)| *at)
    }

    fn is_looking_ahead_enough(&self) -> bool {
        let running = self.queries.values().filter(|query| query.is_ahead).count();
        running >= ahead::RUNNING_MAX || self.queries.len() >= QUERIES_MAX / 2
    }

    fn wake_at(&mut self, at: Instant, why: &'static str) {
        if self.due.is_none_or(|(due, _)| due > at) {
            self.due = Some((at, why));
        }
    }

    /// Whether nothing would come of asking for a path that nobody waits for. A peer that told of it may be gone;
    /// then whoever wants the path asks others.
    fn is_known(&self, hash: &StorePathHash, now: Instant) -> bool {
        let is_believed = |source: &SourceId, at: Instant| match source {
            SourceId::Peer(_) => true,
            SourceId::Cache(cache) => is_fresh_of(&self.roles, *cache, at, now),
        };
        self.remembered.is_told(hash, is_believed) || self.queries.contains_key(&(*hash, None))
    }

    fn is_closed(&self, cache: usize) -> bool {
        self.breakers.get(cache).is_some_and(Breaker::is_closed)
    }

    /// Peers and then caches, as far as they may be asked, best first.
    fn candidates(
        &self,
        hash: &StorePathHash,
        mut peers: Vec<Candidate>,
        now: Instant,
    ) -> VecDeque<Candidate> {
        self.order(hash, &mut peers);
        let mut caches: Vec<usize> = (0..self.roles.len()).collect();
        caches.sort_by_key(|cache| self.roles.get(*cache).copied());
        let mut candidates = VecDeque::from(peers);
        for cache in caches {
            if self.is_closed(cache) && !self.misses.contains(hash, cache, now) {
                let source = SourceId::Cache(cache);
                candidates.push_back(Candidate {
                    source,
                    is_linked: true,
                    is_near: false,
                });
            }
        }
        candidates
    }

    /// Somebody wants this: a reason to find out whether caches that were given up are back.
    fn want(&mut self, hash: &StorePathHash) {
        for breaker in &mut self.breakers {
            breaker.want(*hash);
        }
        let due = self.breakers.iter().filter_map(Breaker::due).min();
        if let Some(at) = due {
            self.wake_at(at, "probe a cache");
        }
    }

    fn ask_about(
        &mut self,
        wanted: Wanted,
        waiting: Vec<Waiting>,
        candidates: VecDeque<Candidate>,
        now: Instant,
    ) -> Vec<Event> {
        let query = Query {
            is_ahead: waiting.is_empty(),
            waiting,
            candidates,
            asked: BTreeMap::new(),
            held: None,
            hedge_at: now,
            deadline: now + LOOKUP_DEADLINE,
        };
        self.queries.insert(wanted, query);
        self.ask_next(&wanted, now)
    }

    /// Asks the next candidate; without one, and with nobody left to answer, the query ends.
    fn ask_next(&mut self, wanted: &Wanted, now: Instant) -> Vec<Event> {
        let Some(query) = self.queries.get_mut(wanted) else {
            return Vec::new();
        };
        let Some(Candidate {
            source, is_near, ..
        }) = query.candidates.pop_front()
        else {
            if !query.asked.is_empty() {
                return Vec::new();
            }
            return match query.held.take() {
                Some(narinfo) => self.found(wanted, narinfo, now),
                None => self.not_found(wanted),
            };
        };
        // One that did not answer the last time is not worth holding an answer back for.
        let is_waited_for = is_near && !self.latencies.is_silent(&source);
        query.asked.insert(source, is_waited_for);
        let send_at = now + BATCH_WINDOW;
        query.hedge_at = send_at + self.latencies.hedge_delay(&source);
        let is_ahead = query.is_ahead;
        // Whatever else comes of this is due later, and that tick finds out when.
        self.wake_at(send_at, "send lookups");
        match self.questions.collect(source, is_ahead, wanted.0, now) {
            Some(full) => self.ask(source, full, now),
            None => Vec::new(),
        }
    }

    /// Puts a question on the wire.
    fn ask(
        &mut self,
        source: SourceId,
        mut hashes: BTreeSet<StorePathHash>,
        now: Instant,
    ) -> Vec<Event> {
        // A query may have been answered by another source while the batch was collected.
        hashes.retain(|hash| !self.asking(hash, &source).is_empty());
        if hashes.is_empty() {
            return Vec::new();
        }
        self.send(source, hashes, now)
    }

    fn send(
        &mut self,
        source: SourceId,
        hashes: BTreeSet<StorePathHash>,
        now: Instant,
    ) -> Vec<Event> {
        let request = self.questions.sent(source, hashes.clone(), now);
        if let Some((at, why)) = self.questions.deadline() {
            self.wake_at(at, why);
        }
        vec![Event::Ask {
            source,
            request,
            hashes: hashes.into_iter().collect(),
        }]
    }

    /// Asks a cache whose breaker is open whether it is back.
    fn probe(&mut self, cache: usize, now: Instant) -> Vec<Event> {
        let breaker = self.breakers.get_mut(cache);
        match breaker.and_then(|breaker| breaker.probe(now)) {
            Some(hash) => self.send(SourceId::Cache(cache), BTreeSet::from([hash]), now),
            None => Vec::new(),
        }
    }

    /// The queries about `hash` that wait for `source`.
    fn asking(&self, hash: &StorePathHash, source: &SourceId) -> Vec<Wanted> {
        let greatest = NarHash::from_bytes([u8::MAX; 32]);
        let queries = self.queries.range((*hash, None)..=(*hash, Some(greatest)));
        let asking = queries.filter(|(_, query)| query.asked.contains_key(source));
        asking.map(|(wanted, _)| *wanted).collect()
    }

    fn give_up_on(&mut self, source: SourceId, now: Instant) -> Vec<Event> {
        for query in self.queries.values_mut() {
            query
                .candidates
                .retain(|candidate| candidate.source != source);
        }
        let asking = keys_where(&self.queries, |query| query.asked.contains_key(&source));
        asking
            .iter()
            .flat_map(|(hash, _)| self.failed(hash, source, now))
            .collect()
    }

    fn has_not(&mut self, hash: StorePathHash, source: SourceId, now: Instant) -> Vec<Event> {
        self.remembered.withdraw(&hash, &source);
        let mut events = Vec::new();
        match source {
            SourceId::Peer(peer) => events.push(Event::HaveNot { peer, hash }),
            SourceId::Cache(cache) => self.learn_miss(hash, cache, now),
        }
        events.extend(self.failed(&hash, source, now));
        events
    }

    fn learn_miss(&mut self, hash: StorePathHash, cache: usize, now: Instant) {
        if let Some(role) = self.roles.get(cache) {
            self.misses.learn(hash, cache, *role, now);
        }
    }

    /// `source` is of no help to the queries about `hash`.
    fn failed(&mut self, hash: &StorePathHash, source: SourceId, now: Instant) -> Vec<Event> {
        let mut events = Vec::new();
        for wanted in self.asking(hash, &source) {
            let Some(query) = self.queries.get_mut(&wanted) else {
                continue;
            };
            query.asked.remove(&source);
            if query.held.is_none() {
                events.extend(self.ask_next(&wanted, now));
            } else if !query.waits_for_near()
                && let Some(narinfo) = query.held.take()
            {
                events.extend(self.found(&wanted, narinfo, now));
            }
        }
        events
    }

    /// `source` told of a narinfo that proved true.
    fn told(
        &mut self,
        hash: StorePathHash,
        source: SourceId,
        narinfo: Arc<VerifiedNarInfo>,
        now: Instant,
    ) -> Vec<Event> {
        self.remembered.told(hash, source, narinfo.clone(), now);
        let mut events = Vec::new();
        for wanted in self.asking(&hash, &source) {
            let is_other_build = wanted
                .1
                .is_some_and(|nar_hash| nar_hash != narinfo.narinfo().nar_hash);
            let Some(query) = self.queries.get_mut(&wanted) else {
                continue;
            };
            let is_near = query.asked.remove(&source).unwrap_or(false);
            if is_other_build {
                events.extend(self.ask_next(&wanted, now));
            } else if !is_near && query.hedge_at > now && query.waits_for_near() {
                query.held.get_or_insert_with(|| narinfo.clone());
                let hedge_at = query.hedge_at;
                self.wake_at(hedge_at, "answer from afar");
            } else {
                events.extend(self.found(&wanted, narinfo.clone(), now));
            }
        }
        events
    }

    fn found(
        &mut self,
        wanted: &Wanted,
        narinfo: Arc<VerifiedNarInfo>,
        now: Instant,
    ) -> Vec<Event> {
        let Some(query) = self.queries.remove(wanted) else {
            return Vec::new();
        };
        let has_client = |waiting: &Waiting| matches!(waiting.waiter, Waiter::Client(_));
        let is_paid = query.waiting.iter().any(has_client);
        self.look_ahead(&narinfo, is_paid, now);
        let found = |waiting: Waiting| match waiting.waiter {
            Waiter::Client(lookup) => Event::Found {
                lookup,
                narinfo: narinfo.clone(),
            },
            Waiter::Fetch(fetch) => Event::CachesAsked { fetch },
        };
        query.waiting.into_iter().map(found).collect()
    }

    fn not_found(&mut self, wanted: &Wanted) -> Vec<Event> {
        let waiting = self.queries.remove(wanted).map(|query| query.waiting);
        let waiting = waiting.unwrap_or_default().into_iter();
        waiting.map(|waiting| waiting.waiter.in_vain()).collect()
    }

    /// Ends what waited long enough, and the query when nobody waits longer.
    fn overdue(&mut self, wanted: &Wanted, now: Instant) -> Vec<Event> {
        let Some(query) = self.queries.get_mut(wanted) else {
            return Vec::new();
        };
        if let Some(narinfo) = query.held.take() {
            return self.found(wanted, narinfo, now);
        }
        if query.deadline <= now {
            return self.not_found(wanted);
        }
        let overdue = query.waiting.extract_if(.., |waiting| waiting.until <= now);
        overdue.map(|waiting| waiting.waiter.in_vain()).collect()
    }

    fn look_ahead(&mut self, narinfo: &VerifiedNarInfo, is_paid: bool, now: Instant) {
        if is_paid {
            self.ahead.pay();
        }
        let references = narinfo.narinfo().references.iter().map(StorePath::hash);
        let unknown: Vec<_> = references
            .filter(|hash| !self.is_known(hash, now))
            .collect();
        self.ahead.add(unknown);
        if self.ahead.has_more() {
            self.wake_at(now + BATCH_WINDOW, "look ahead");
        }
    }
}

impl Query {
    /// When the next candidate is to be asked although the last one has not answered.
    fn hedge(&self) -> Option<Instant> {
        let is_worth_it = !self.candidates.is_empty() && !self.is_ahead && self.held.is_none();
        is_worth_it.then_some(self.hedge_at)
    }

    fn waits_for_near(&self) -> bool {
        self.asked.values().any(|is_near| *is_near)
    }
}

impl Waiter {
    fn in_vain(self) -> Event {
        match self {
            Waiter::Client(lookup) => Event::NotFound { lookup },
            Waiter::Fetch(fetch) => Event::CachesAsked { fetch },
        }
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

/// Whether what a cache said at a time still counts.
fn is_fresh_of(roles: &[CacheRole], cache: usize, at: Instant, now: Instant) -> bool {
    let role = roles.get(cache);
    role.is_some_and(|role| is_fresh(*role, at, now))
}

fn keys_where<K: Copy + Ord, V>(map: &BTreeMap<K, V>, holds: impl Fn(&V) -> bool) -> Vec<K> {
    map.iter()
        .filter(|(_, value)| holds(value))
        .map(|(key, _)| *key)
        .collect()
}
