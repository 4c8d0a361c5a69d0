//! The mind of the mesh: whom to tell, whom to ask, when to switch, whom to blame.
//!
//! [`Mesh`] is a state machine without I/O. The hands feed it [`Input`]s with the time at which
//! they happened, drain [`Output`]s after each, and call it again with [`Input::Tick`] no later
//! than [`Mesh::deadline`]. NAR bytes never pass through here; the mind only learns how far a
//! transfer got.
//!
//! The four parts below know nothing of each other. Each returns what happened as events, and this
//! file passes them on: membership says who is usable, gossip what they hold, lookup asks them,
//! fetch picks one and replaces it.
//!
//! Invariants: no output ever names a peer that is not linked and admitted, except to dial it, to
//! knock, to say Hello and to hang up; every collection is bounded by a named limit; two minds given the same
//! seed and the same inputs produce the same outputs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Instant;

use crate::availability::{AvailabilityIndex, Cursor, HashPrefix};
use crate::certificate::Certificate;
use crate::message::{Answer, Message, Summary};
use crate::peer::PeerId;
use crate::store_path::StorePathHash;

mod face;
mod chance;
mod view;
mod source;
mod records;
mod revocations;
mod membership;
mod gossip;
mod lookup;
mod fetch;

use chance::Chance;
pub use face::{Blame, Config, FetchId, Input, LookupId, LookupOutcome, Output};
pub use source::{CacheRole, Source};
use source::{Candidate, Lots, SourceId};
pub use view::{BreakerView, CacheView, PeerView, Size};

use membership::{Event as MemberEvent, Shown};
pub use membership::{PeerState, Refusal};

/// Reads of the local store under way for one peer: as many as 16,384 hashes need. An honest peer
/// has no more queries open; what exceeds it goes unanswered, and the asker turns to another.
const READS_PER_PEER_MAX: usize = 64;

/// Messages for one peer that wait until it is linked: a few batches of lookups. One that does not
/// fit goes unsaid, and the lookup turns to another peer.
const WAITING_MESSAGES_MAX: usize = 16;

/// The state machine. See the module's documentation for how to drive it.
pub struct Mesh {
    me: PeerId,
    config: Config,
    chance: Chance,
    outputs: VecDeque<Output>,
    /// What [`Output::ReadLocal`] asked for and was not answered yet, of linked peers.
    reads: BTreeSet<(PeerId, u64)>,
    /// What is said to peers as soon as they are linked, and the transfers opened then.
    waiting: BTreeMap<PeerId, Waiting>,
    /// Whether the proofs that the index kept were read.
    is_restored: bool,
    /// What this node knows of everybody, and at which versions of contacts and logs it was so.
    summary: Option<((u64, u64), Summary)>,
    membership: membership::Membership,
    gossip: gossip::Gossip,
    lookups: lookup::Lookups,
    fetches: fetch::Fetches,
}

#[derive(Default)]
struct Waiting {
    messages: Vec<Message>,
    transfers: Vec<(FetchId, u32, u64)>,
}

impl Mesh {
    /// `seed` decides every random choice; a node draws it from the system, a simulation from its own seed.
    ///
    /// # Panics
    /// When `config.key` is not that of `me`.
    pub fn new(me: PeerId, config: Config, seed: u64, now: Instant) -> Mesh {
        assert_eq!(me, config.key.peer_id(), "a node signs with its own key");
        let mut chance = Chance::new(seed);
        let lots = Lots::new(chance.number());
        Mesh {
            me,
            membership: membership::Membership::new(&config, now),
            gossip: gossip::Gossip::new(config.key.clone(), &mut chance, now),
            lookups: lookup::Lookups::new(config.caches.clone(), lots),
            fetches: fetch::Fetches::new(lots),
            outputs: VecDeque::new(),
            reads: BTreeSet::new(),
            waiting: BTreeMap::new(),
            is_restored: false,
            summary: None,
            config,
            chance,
        }
    }

    /// Takes in one thing that happened at `now`; afterwards drain [`Mesh::poll`].
    ///
    /// `now` never goes backwards between calls.
    pub fn handle(&mut self, index: &mut dyn AvailabilityIndex, input: Input, now: Instant) {
        if let Input::ClockRead { unix } = &input {
            self.membership.clock_read(*unix, now);
            self.restore(index, now);
        }
        let unix = self.membership.unix(now);
        self.gossip.start(index, unix, &mut self.chance);
        match input {
            Input::Tick | Input::ClockRead { .. } => {}
            Input::Woke => {
                self.membership.woke(now);
                self.gossip.woke();
                self.lookups.network_changed();
                self.fetches.network_changed();
                // Whoever is still there knows what was missed.
                let message = Message::Summary {
                    summary: self.summary(index),
                };
                self.tell_neighbours(&message, &[]);
            }
            Input::NetworkChanged => {
                self.membership.network_changed(now);
                self.lookups.network_changed();
                self.fetches.network_changed();
            }
            Input::OwnAddresses { addresses } => {
                if self.membership.own_addresses(addresses, now) {
                    self.keep_own(index);
                    self.tell_own_contact();
                }
            }
            Input::Certificate { certificate } => {
                self.config.certificate = certificate.clone();
                if self.membership.own_certificate(certificate, now) {
                    self.keep_own(index);
                    self.tell_own_contact();
                }
                for peer in self.membership.linked() {
                    self.say_hello(peer);
                }
            }
            Input::Shutdown => {
                for peer in self.membership.linked() {
                    self.send(peer, Message::Goodbye);
                }
            }
            Input::Discovered { peer, addresses } => {
                self.membership.discovered(peer, addresses, now);
            }
            Input::Lost { peer } => self.membership.lost(peer),
            Input::LinkUp {
                peer,
                address,
                outbound,
                seed,
            } => {
                let was_linked = self.membership.is_linked(&peer);
                let event = self.membership.link_up(peer, address, outbound, seed, now);
                // A link that begins anew proves that the old one ended, whoever saw that first.
                if was_linked {
                    self.departed(index, peer, now);
                }
                self.member_events(index, event, now);
            }
            Input::LinkDown { peer } => {
                let event = self.membership.link_down(peer, &mut self.chance, now);
                self.member_events(index, event, now);
            }
            Input::DialFailed { peer } => {
                let event = self.membership.dial_failed(peer, &mut self.chance, now);
                self.member_events(index, event, now);
            }
            Input::SeedFailed { seed } => self.membership.seed_failed(seed, &mut self.chance, now),
            Input::SeedFound { seed, peer } => {
                self.membership
                    .seed_found(seed, peer, &mut self.chance, now);
            }
            Input::Garbage { peer } => {
                let events = self.membership.refuse(peer, Refusal::Garbage, now);
                self.member_events(index, events, now);
            }
            Input::Revocations { list } => self.revocations_told(index, None, list, now),
            Input::Received { peer, message } => self.received(index, peer, message, now),
            Input::LocalPaths { all } => self.gossip.local_paths(&all, now),
            Input::LocalChanged { added, removed } => {
                self.gossip.local_changed(&added, &removed, now);
            }
            Input::LocalAnswers {
                peer,
                request,
                answers,
            } => {
                self.local_answers(peer, request, answers);
            }
            Input::Lookup { lookup, hash } => {
                let candidates = self.candidates(index, &hash, now);
                let members = &self.membership;
                let may_vouch = |peer: &PeerId| members.may_vouch(peer);
                let belief = belief(&self.config, &may_vouch);
                let events = self.lookups.start(lookup, hash, candidates, &belief, now);
                self.lookup_events(index, events, now);
            }
            Input::CancelLookup { lookup, hash } => self.lookups.cancel(lookup, &hash),
            Input::Fetch { fetch, narinfo } => {
                let narinfo = narinfo.narinfo();
                let (hash, nar_hash) = (narinfo.store_path.hash(), narinfo.nar_hash);
                let sources = self.sources(index, &hash, &nar_hash, now);
                let events = self.fetches.start(fetch, hash, nar_hash, &sources, now);
                self.fetch_events(index, events, now);
            }
            Input::CacheAnswers {
                cache,
                request,
                answers,
            } => self.answers(index, SourceId::Cache(cache), request, answers, now),
            Input::CacheFailed { cache, request } => {
                let chance = &mut self.chance;
                let events = self.lookups.request_failed(cache, request, chance, now);
                self.lookup_events(index, events, now);
            }
            Input::TransferProgress {
                fetch,
                attempt,
                at,
                held_up,
            } => {
                if self.fetches.progress(fetch, attempt, at, held_up, now)
                    && let Some(sources) = self.sources_of(index, fetch, now)
                {
                    let events = self.fetches.replace(fetch, &sources, now);
                    self.fetch_events(index, events, now);
                }
            }
            Input::TransferEnded {
                fetch,
                attempt,
                outcome,
            } => {
                self.transfer_ended(index, fetch, attempt, outcome, now);
            }
            Input::FetchMismatch { fetch } => self.mismatch(fetch, now),
            Input::FetchDone { fetch } => {
                self.fetches.finish(fetch);
            }
        }
        self.tick(index, now);
    }

    /// Returns the next thing to do; drain it after every [`Mesh::handle`].
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Returns when [`Input::Tick`] is due at the latest, and why. Changes with every `handle`.
    pub fn deadline(&self) -> Option<(Instant, &'static str)> {
        let deadlines = [
            self.membership.deadline(),
            self.gossip.deadline(),
            self.lookups.deadline(),
            self.fetches.deadline(),
        ];
        deadlines.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Returns every known peer, ordered by PeerId.
    pub fn peers(&self, index: &dyn AvailabilityIndex, now: Instant) -> Vec<PeerView> {
        let mut views = self.membership.views(index, now);
        for view in &mut views {
            let source = SourceId::Peer(view.peer);
            view.answers_within = self.lookups.usual(&source);
            view.bytes_per_second = self.fetches.usual(&source);
        }
        views
    }

    /// Returns every cache of the configuration, in its order.
    pub fn caches(&self, now: Instant) -> Vec<CacheView> {
        let breakers = self.lookups.breakers(now).enumerate();
        let view = |(cache, (role, breaker))| CacheView {
            role,
            breaker,
            answers_within: self.lookups.usual(&SourceId::Cache(cache)),
            bytes_per_second: self.fetches.usual(&SourceId::Cache(cache)),
        };
        breakers.map(view).collect()
    }

    /// Returns how much there is of what grows with what others do, to check that it stays bounded.
    pub fn sizes(&self) -> Vec<Size> {
        let mut sizes = self.lookups.sizes();
        sizes.extend(self.fetches.sizes());
        sizes.extend(self.membership.sizes());
        sizes.extend(self.gossip.sizes());
        sizes.push(Size {
            what: "peers that something waits for",
            count: self.waiting.len(),
            limit: membership::KNOWN_PEERS_MAX,
        });
        sizes
    }

    /// Returns how often connections were refused, by reason.
    pub fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        self.membership.refusals()
    }

    /// Returns the peers that say they hold a path and may be asked for it, best first: those that
    /// are linked, then those that could be.
    pub fn providers(
        &self,
        index: &dyn AvailabilityIndex,
        hash: &StorePathHash,
        now: Instant,
    ) -> Vec<PeerId> {
        let mut candidates = self.candidates(index, hash, now);
        self.lookups.order(hash, &mut candidates);
        let peer = |candidate: Candidate| match candidate.source {
            SourceId::Peer(peer) => Some(peer),
            SourceId::Cache(_) => None,
        };
        candidates.into_iter().filter_map(peer).collect()
    }

    /// Returns the position of this node's own log.
    pub fn head(&self) -> Cursor {
        self.gossip.cursor()
    }

    fn received(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        peer: PeerId,
        message: Message,
        now: Instant,
    ) {
        if let Message::Knock { version, badge } = &message {
            let events = self.membership.knocked(peer, *version, badge, now);
            return self.member_events(index, events, now);
        }
        if let Message::Hello {
            version,
            certificate,
        } = &message
        {
            let events = self.membership.hello(peer, *version, certificate, now);
            return self.member_events(index, events, now);
        }
        if !self.membership.is_linked(&peer) {
            // The hands may still deliver what was under way when we hung up: only a peer that we
            // are getting to know is refused for speaking out of turn.
            let events = self.membership.spoke_out_of_turn(peer, now);
            return self.member_events(index, events, now);
        }
        match message {
            Message::Knock { .. } | Message::Hello { .. } => unreachable!("handled above"),
            Message::About {
                store_dir,
                contact,
                cursor,
                summary,
                wish,
            } => {
                let events = self.membership.about(peer, &store_dir, contact, now);
                self.member_events(index, events, now);
                if self.membership.is_linked(&peer) {
                    let events = self.membership.wish_told(peer, wish, &mut self.chance, now);
                    self.member_events(index, events, now);
                    self.gossip.cursor_told(index, peer, cursor);
                    self.compare_summary(index, peer, summary);
                }
            }
            Message::Goodbye => self.membership.goodbye(peer, now),
            Message::Neighbour { wish } => {
                let events = self.membership.wish_told(peer, wish, &mut self.chance, now);
                self.member_events(index, events, now);
            }
            Message::Summary { summary } => self.compare_summary(index, peer, summary),
            Message::Cursors {
                cursors,
                is_complete,
            } => {
                let ours = if is_complete {
                    self.known(index)
                } else {
                    self.known_of(index, &cursors)
                };
                let lacks = self.gossip.compare(peer, &ours, &cursors, is_complete);
                if !lacks.is_empty() {
                    let cursors = lacks;
                    let is_complete = false;
                    self.send(
                        peer,
                        Message::Cursors {
                            cursors,
                            is_complete,
                        },
                    );
                }
            }
            Message::Contact(contact) => self.contact_told(index, peer, contact, now),
            Message::Delta(delta) => {
                let writer = delta.writer();
                if self.own_future(index, delta.head(), now) {
                    return;
                }
                let is_member = self.membership.is_member(&writer);
                let events = self.gossip.delta(index, peer, delta, is_member);
                self.gossip_events(index, events, now);
            }
            Message::Pull {
                writer,
                contact,
                after,
            } => {
                if let Some(known) = self.membership.contact(&writer)
                    && known.contact().number > contact
                    && known.is_signed()
                {
                    let contact = Message::Contact(known.clone());
                    self.send(peer, contact);
                }
                let unix = self.membership.unix(now);
                let chance = &mut self.chance;
                let events = self
                    .gossip
                    .pull(index, peer, writer, after, unix, chance, now);
                self.gossip_events(index, events, now);
            }
            Message::PullPage {
                writer,
                cursor,
                after,
            } => {
                let page = self.gossip.pull_page(index, writer, cursor, after, now);
                self.send(peer, page);
            }
            Message::Snapshot {
                head,
                after,
                prefixes,
                is_last,
            } => {
                if self.own_future(index, &head, now) {
                    return;
                }
                let is_member = self.membership.is_member(&head.head().writer);
                let events = self
                    .gossip
                    .snapshot(index, peer, head, after, prefixes, is_last, is_member, now);
                self.gossip_events(index, events, now);
            }
            Message::Revocations(list) => self.revocations_told(index, Some(peer), list, now),
            Message::RevocationsKnown { number } => self.revocations_number_told(peer, number),
            Message::NothingNewer { writer } => self.gossip.nothing_newer(peer, &writer),
            Message::Lookup { request, hashes } => {
                let reads = self.reads.range((peer, 0)..=(peer, u64::MAX)).count();
                if reads < READS_PER_PEER_MAX && self.reads.insert((peer, request)) {
                    self.outputs.push_back(Output::ReadLocal {
                        peer,
                        request,
                        hashes,
                    });
                }
            }
            Message::Answers { request, answers } => {
                self.answers(index, SourceId::Peer(peer), request, answers, now);
            }
        }
    }

    fn answers(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        source: SourceId,
        request: u64,
        answers: Vec<Answer>,
        now: Instant,
    ) {
        let members = &self.membership;
        let may_vouch = |peer: &PeerId| members.may_vouch(peer);
        let belief = belief(&self.config, &may_vouch);
        let chance = &mut self.chance;
        let events = self
            .lookups
            .answers(source, request, answers, &belief, chance, now);
        self.lookup_events(index, events, now);
    }

    fn gossip_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: Vec<gossip::Event>,
        now: Instant,
    ) {
        for event in events {
            match event {
                gossip::Event::Send { to, message } => self.send(to, message),
                gossip::Event::Nonsense { from } => {
                    let events = self.membership.refuse(from, Refusal::Garbage, now);
                    self.member_events(index, events, now);
                }
                gossip::Event::BeganEpoch => self.tell_own_cursor(),
                gossip::Event::Changed {
                    from,
                    head,
                    news,
                    added,
                } => {
                    self.lookups.announced(added);
                    self.set_changed(index, from, &head, news);
                }
            }
        }
    }

    fn member_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: impl IntoIterator<Item = MemberEvent>,
        now: Instant,
    ) {
        for event in events {
            self.member_event(index, event, now);
        }
    }

    fn member_event(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        event: MemberEvent,
        now: Instant,
    ) {
        match event {
            MemberEvent::Dial { peer, addresses } => {
                self.outputs.push_back(Output::Dial { peer, addresses });
            }
            MemberEvent::DialSeed { seed } => {
                self.outputs.push_back(Output::DialSeed { seed });
            }
            MemberEvent::Knock(peer) => self.knock(peer),
            MemberEvent::SayHello(peer) => self.say_hello(peer),
            MemberEvent::Refused {
                peer,
                refusal,
                was_linked,
            } => {
                self.outputs.push_back(Output::Hangup {
                    peer,
                    refusal: Some(refusal),
                });
                if was_linked {
                    self.departed(index, peer, now);
                } else {
                    self.unreachable(index, peer, now);
                }
            }
            MemberEvent::Admitted {
                peer,
                certificate,
                say_hello,
            } => self.admitted(index, peer, certificate, say_hello),
            MemberEvent::Departed(peer) => self.departed(index, peer, now),
            MemberEvent::Released(peer) => {
                let refusal = None;
                self.outputs.push_back(Output::Hangup { peer, refusal });
                self.departed(index, peer, now);
            }
            MemberEvent::Unreachable(peer) => self.unreachable(index, peer, now),
            MemberEvent::Tell { peer, wish } => {
                self.send(peer, Message::Neighbour { wish });
            }
            MemberEvent::NewContact(contact) => {
                self.contact_news(index, contact.peer(), contact);
            }
            MemberEvent::Forgotten(peer) => {
                index.forget(&peer);
                self.gossip.forget(&peer);
            }
        }
    }

    fn admitted(
        &mut self,
        index: &dyn AvailabilityIndex,
        peer: PeerId,
        certificate: Box<Certificate>,
        say_hello: bool,
    ) {
        if say_hello {
            self.say_hello(peer);
        }
        self.outputs
            .push_back(Output::Admitted { peer, certificate });
        self.revocations_known(Some(peer));
        if let Some(contact) = self.membership.own_contact().cloned() {
            let about = Message::About {
                store_dir: self.config.store_dir.clone(),
                contact,
                cursor: self.gossip.cursor(),
                summary: self.summary(index),
                wish: self.membership.wish(&peer),
            };
            self.send(peer, about);
        }
        let waiting = self.waiting.remove(&peer).unwrap_or_default();
        for message in waiting.messages {
            self.send(peer, message);
        }
        for (fetch, attempt, from) in waiting.transfers {
            if self.fetches.running(fetch, attempt).is_some()
                && let Some(source) = self.source(fetch, SourceId::Peer(peer))
            {
                self.outputs.push_back(Output::Transfer {
                    fetch,
                    attempt,
                    source,
                    from,
                });
            }
        }
    }

    fn departed(&mut self, index: &mut dyn AvailabilityIndex, peer: PeerId, now: Instant) {
        self.outputs.push_back(Output::Departed { peer });
        self.reads.retain(|(reader, _)| *reader != peer);
        self.gossip.departed(peer);
        self.unreachable(index, peer, now);
    }

    /// What was asked of the peer, or was about to be, is asked of others.
    fn unreachable(&mut self, index: &mut dyn AvailabilityIndex, peer: PeerId, now: Instant) {
        let waiting = self.waiting.remove(&peer).unwrap_or_default();
        let events = self.lookups.departed(peer, now);
        self.lookup_events(index, events, now);
        for (fetch, attempt, _) in waiting.transfers {
            self.transfer_ended(index, fetch, attempt, Err(Blame::Peer), now);
        }
    }

    fn knock(&mut self, peer: PeerId) {
        let badge = self.config.certificate.badge().clone();
        self.send(
            peer,
            Message::Knock {
                version: crate::message::PROTOCOL_VERSION,
                badge,
            },
        );
    }

    fn say_hello(&mut self, peer: PeerId) {
        let certificate = self.config.certificate.clone();
        self.send(
            peer,
            Message::Hello {
                version: crate::message::PROTOCOL_VERSION,
                certificate,
            },
        );
    }

    fn local_answers(&mut self, peer: PeerId, request: u64, answers: Vec<Answer>) {
        // Read for a link that is gone, or never asked for.
        if !self.reads.remove(&(peer, request)) {
            return;
        }
        for answers in lookup::split_answers(answers) {
            self.send(peer, Message::Answers { request, answers });
        }
    }

    fn lookup_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: Vec<lookup::Event>,
        now: Instant,
    ) {
        for event in events {
            match event {
                lookup::Event::Ask {
                    source,
                    request,
                    hashes,
                } => match source {
                    SourceId::Peer(peer) => {
                        let message = Message::Lookup { request, hashes };
                        self.send_when_linked(index, peer, message, now);
                    }
                    SourceId::Cache(cache) => self.outputs.push_back(Output::AskCache {
                        cache,
                        request,
                        hashes,
                    }),
                },
                lookup::Event::HaveNot { peer, hash } => {
                    index.withdraw(&peer, HashPrefix::from(&hash));
                }
                lookup::Event::Lied { peer, offence } => {
                    self.membership.quarantine(peer, offence, now);
                }
                lookup::Event::Found { lookup, narinfo } => {
                    let hash = narinfo.narinfo().store_path.hash();
                    let providers = self.providers(index, &hash, now);
                    let caches = self.lookups.caches(&hash, &narinfo.narinfo().nar_hash);
                    let outcome = LookupOutcome::Found {
                        narinfo,
                        providers,
                        caches: caches.into_iter().map(|(cache, _)| cache).collect(),
                    };
                    self.outputs
                        .push_back(Output::LookupDone { lookup, outcome });
                }
                lookup::Event::NotFound { lookup } => {
                    let outcome = LookupOutcome::NotFound;
                    self.outputs
                        .push_back(Output::LookupDone { lookup, outcome });
                }
                lookup::Event::CachesAsked { fetch } => {
                    if let Some(sources) = self.sources_of(index, fetch, now) {
                        let events = self.fetches.resume(fetch, &sources, now);
                        self.fetch_events(index, events, now);
                    }
                }
            }
        }
    }

    fn transfer_ended(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        fetch: FetchId,
        attempt: u32,
        outcome: Result<(), Blame>,
        now: Instant,
    ) {
        let Some(running) = self.fetches.running(fetch, attempt) else {
            return;
        };
        let fetch::Running {
            hash,
            nar_hash,
            source,
        } = running;
        let is_lost =
            outcome == Err(Blame::Absent) && self.lookups.lost(hash, &nar_hash, source, now);
        let mut released = Vec::new();
        match source {
            // One that never told of this NAR may hold another build of the path, which a lookup is
            // to find: its hint stays.
            SourceId::Peer(peer) if is_lost => index.withdraw(&peer, HashPrefix::from(&hash)),
            SourceId::Peer(_) => {}
            SourceId::Cache(cache) => match outcome {
                Err(Blame::Peer) => {
                    released = self.lookups.cache_failed(cache, &mut self.chance, now);
                }
                Ok(()) | Err(Blame::Absent) => self.lookups.cache_answered(cache),
                Err(Blame::Local) => {}
            },
        }
        let sources = self.sources(index, &hash, &nar_hash, now);
        let events = self.fetches.ended(fetch, outcome, &sources, now);
        self.fetch_events(index, events, now);
        self.lookup_events(index, released, now);
    }

    /// Everyone who contributed to a wrong NAR is held responsible; nobody can tell who lied.
    fn mismatch(&mut self, fetch: FetchId, now: Instant) {
        let Some(finished) = self.fetches.finish(fetch) else {
            return;
        };
        for source in finished.contributors {
            match source {
                SourceId::Peer(peer) => {
                    self.membership
                        .quarantine(peer, "sent a NAR with another hash", now);
                }
                SourceId::Cache(_) => {
                    self.lookups
                        .lost(finished.hash, &finished.nar_hash, source, now);
                }
            }
        }
    }

    fn fetch_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: Vec<fetch::Event>,
        now: Instant,
    ) {
        for event in events {
            match event {
                fetch::Event::Open {
                    fetch,
                    attempt,
                    source,
                    from,
                } => self.open(index, fetch, attempt, source, from, now),
                fetch::Event::Stop { fetch, attempt } => self
                    .outputs
                    .push_back(Output::StopTransfer { fetch, attempt }),
                fetch::Event::AskCaches {
                    fetch,
                    hash,
                    nar_hash,
                } => match self.lookups.ask_caches(fetch, hash, nar_hash, now) {
                    Some(asks) => self.lookup_events(index, asks, now),
                    None => {
                        let sources = self.sources(index, &hash, &nar_hash, now);
                        let events = self.fetches.resume(fetch, &sources, now);
                        self.fetch_events(index, events, now);
                    }
                },
                fetch::Event::Failed { fetch } => {
                    self.outputs.push_back(Output::FetchFailed { fetch });
                }
            }
        }
    }

    /// Opens a transfer; a peer that is not linked is dialled for it.
    fn open(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        fetch: FetchId,
        attempt: u32,
        id: SourceId,
        from: u64,
        now: Instant,
    ) {
        match (self.source(fetch, id), id) {
            (Some(source), _) => self.outputs.push_back(Output::Transfer {
                fetch,
                attempt,
                source,
                from,
            }),
            (None, SourceId::Peer(peer)) => {
                let waiting = self.waiting.entry(peer).or_default();
                waiting.transfers.push((fetch, attempt, from));
                self.want(index, peer, now);
            }
            // It lost the NAR in this very step.
            (None, SourceId::Cache(_)) => {
                self.transfer_ended(index, fetch, attempt, Err(Blame::Peer), now);
            }
        }
    }

    fn tick(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) {
        let events = self.membership.tick(&mut self.chance, now);
        self.member_events(index, events, now);

        let deltas = self.gossip.flush(index, now);
        if self.membership.relays() && !deltas.iter().all(gossip::is_pushed) {
            self.tell_own_cursor();
        } else {
            for delta in deltas {
                self.tell_neighbours(&Message::Delta(delta), &[]);
            }
        }
        if self.gossip.tick(&mut self.chance, now)
            && let Some(peer) = self.chance.pick(&self.membership.neighbours()).copied()
        {
            let message = Message::Summary {
                summary: self.summary(index),
            };
            self.send(peer, message);
        }
        for (from, writer) in self.gossip.begin_pulls(now) {
            let contact = self.membership.contact(&writer);
            let contact = contact.map_or(0, |contact| contact.contact().number);
            let after = if writer == self.me {
                Some(self.gossip.cursor())
            } else {
                index.cursor(&writer)
            };
            self.send(
                from,
                Message::Pull {
                    writer,
                    contact,
                    after,
                },
            );
        }

        for fetch in self.fetches.stalled(now) {
            if let Some(SourceId::Cache(cache)) = self.fetches.source_of(fetch) {
                let events = self.lookups.cache_failed(cache, &mut self.chance, now);
                self.lookup_events(index, events, now);
            }
            if let Some(sources) = self.sources_of(index, fetch, now) {
                let events = self.fetches.switch(fetch, &sources, now);
                self.fetch_events(index, events, now);
            }
        }

        // Last, because stalled fetches ask the caches.
        let events = self.lookups.tick(&mut self.chance, now);
        self.lookup_events(index, events, now);
        self.look_ahead(index, now);

        // Whoever was dialled for all that has deadlines of its own by now.
        for event in self.membership.tick(&mut self.chance, now) {
            self.member_event(index, event, now);
        }
    }

    /// Asks for what Nix will ask for next, unless this machine has it.
    fn look_ahead(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) {
        let mut step = 0;
        while let Some(hash) = self.lookups.next_ahead(&mut step, now) {
            let is_here = index.providers(HashPrefix::from(&hash)).contains(&self.me);
            if !is_here {
                let candidates = self.candidates(index, &hash, now);
                let events = self.lookups.start_ahead(hash, candidates, now);
                self.lookup_events(index, events, now);
            }
        }
    }

    /// Sends to a peer that may have to be dialled first.
    fn send_when_linked(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        peer: PeerId,
        message: Message,
        now: Instant,
    ) {
        if self.membership.is_linked(&peer) {
            let used = self.membership.want(&peer, now);
            debug_assert!(used.is_none(), "a linked peer is not dialled");
            return self.send(peer, message);
        }
        let waiting = self.waiting.entry(peer).or_default();
        if waiting.messages.len() < WAITING_MESSAGES_MAX {
            waiting.messages.push(message);
        }
        self.want(index, peer, now);
    }

    /// Dials a peer for what waits for it; where that cannot be, others are asked.
    fn want(&mut self, index: &mut dyn AvailabilityIndex, peer: PeerId, now: Instant) {
        let event = self.membership.want(&peer, now);
        if event.is_none() && !self.membership.is_on_its_way(&peer) {
            return self.unreachable(index, peer, now);
        }
        self.member_events(index, event, now);
    }

    fn send(&mut self, peer: PeerId, message: Message) {
        self.outputs.push_back(Output::Send { peer, message });
    }
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

/// What makes a narinfo true for this node.
fn belief<'a>(config: &'a Config, may_vouch: &'a dyn Fn(&PeerId) -> bool) -> lookup::Belief<'a> {
    lookup::Belief {
        trust: &config.trust,
        store_dir: &config.store_dir,
        may_vouch: match config.trusts_members {
            true => may_vouch,
            false => &|_| false,
        },
    }
}

#[cfg(test)]
mod tests;
