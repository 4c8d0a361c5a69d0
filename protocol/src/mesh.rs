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
//! say Hello and to hang up; every collection is bounded by a named limit; two minds given the same
//! seed and the same inputs produce the same outputs.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use crate::certificate::{Certificate, SignedCertificate, UnixTime};
use crate::message::{Answer, Message};
use crate::narinfo::VerifiedNarInfo;
use crate::peer::PeerId;
use crate::signature::{PublicKey, TrustedKeys};
use crate::store_path::{StoreDir, StorePathHash};

mod view;
mod source;
mod membership;
mod gossip;
mod lookup;
mod fetch;

pub use source::{CacheRole, Source};
use source::{Candidate, Lots, SourceId};
pub use view::{BreakerView, CacheView, PeerView, Size};

pub use membership::{PeerState, Refusal};

/// Reads of the local store under way for one peer: as many as 16,384 hashes need. An honest peer
/// has no more queries open; what exceeds it goes unanswered, and the asker turns to another.
const READS_PER_PEER_MAX: usize = 64;

/// What a node is told once, at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Public half of the key that admits members.
    pub mesh_key: PublicKey,
    /// This node's own certificate, shown to others.
    pub certificate: SignedCertificate,
    /// Keys whose signatures make a narinfo true.
    pub trust: TrustedKeys,
    pub store_dir: StoreDir,
    /// Where this node serves NARs to members.
    pub transfer_port: Option<u16>,
    /// How many addresses of unknown peers (`mesh.peers`) the hands can dial, numbered from 0.
    pub seeds: usize,
    /// Binary caches outside the mesh that the hands can ask, numbered from 0 in order of preference.
    pub caches: Vec<CacheRole>,
}

/// Chosen by the hands to recognise an outcome; never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LookupId(pub u64);

/// Chosen by the hands to recognise an outcome; never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FetchId(pub u64);

/// Whose fault a failure is; decides about retry, penalty and what Nix is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The provider does not have it (any more). Its hint is dropped, nobody is penalised.
    Absent,
    /// The provider broke off, stalled or answered nonsense. Another one continues.
    Peer,
    /// This node cannot go on, whoever provides.
    Local,
}

/// Everything that can happen to a node.
#[derive(Clone, Debug)]
pub enum Input {
    /// The deadline passed.
    Tick,
    /// The wall clock reads this; given at start, after sleep and when the clock is set.
    ClockRead {
        unix: UnixTime,
    },
    /// The machine was suspended: whatever was believed about others may be hours old.
    Woke,
    /// An address or route came or went: back-offs are worth forgetting.
    NetworkChanged,
    /// The node is about to stop.
    Shutdown,
    /// mDNS (or a person) says that a peer may be found at these addresses.
    Discovered {
        peer: PeerId,
        addresses: Vec<SocketAddr>,
    },
    /// mDNS says that a peer left. Connections decide about presence, not this.
    Lost {
        peer: PeerId,
    },
    /// A connection stands and the other end proved to hold this identity; nothing more.
    LinkUp {
        peer: PeerId,
        address: SocketAddr,
        outbound: bool,
        seed: Option<usize>,
    },
    LinkDown {
        peer: PeerId,
    },
    DialFailed {
        peer: PeerId,
    },
    SeedFailed {
        seed: usize,
    },
    /// The address of a seed leads to a peer that is linked already.
    SeedFound {
        seed: usize,
        peer: PeerId,
    },
    Received {
        peer: PeerId,
        message: Message,
    },
    /// Bytes arrived that are no message.
    Garbage {
        peer: PeerId,
    },
    /// All paths that this machine shares, given once at start and after every full scan.
    LocalPaths {
        all: Vec<StorePathHash>,
    },
    /// Changes since then.
    LocalChanged {
        added: Vec<StorePathHash>,
        removed: Vec<StorePathHash>,
    },
    /// The answer to [`Output::ReadLocal`].
    LocalAnswers {
        peer: PeerId,
        request: u64,
        answers: Vec<Answer>,
    },
    Lookup {
        lookup: LookupId,
        hash: StorePathHash,
    },
    /// Nobody waits for this lookup any more.
    CancelLookup {
        lookup: LookupId,
        hash: StorePathHash,
    },
    /// Bring the NAR of this narinfo, from its first byte.
    Fetch {
        fetch: FetchId,
        narinfo: Arc<VerifiedNarInfo>,
    },
    /// What a cache says about hashes of [`Output::AskCache`]; any part of them, in any number of pieces.
    CacheAnswers {
        cache: usize,
        request: u64,
        answers: Vec<Answer>,
    },
    /// What was not answered of this request will not be: the cache does not answer, or nonsense.
    CacheFailed {
        cache: usize,
        request: u64,
    },
    /// The transfer reached byte `at` of the NAR, or is held up by its reader, who is not to blame.
    /// To be reported several times a second while either is so.
    TransferProgress {
        fetch: FetchId,
        attempt: u32,
        at: u64,
        /// How long this transfer waited for its reader since it began.
        held_up: Duration,
    },
    /// The transfer delivered everything that was missing, or broke off for this reason.
    TransferEnded {
        fetch: FetchId,
        attempt: u32,
        outcome: Result<(), Blame>,
    },
    /// The assembled NAR does not have the promised NarHash; the fetch is over.
    FetchMismatch {
        fetch: FetchId,
    },
    /// The fetch is over: complete and proved, or not wanted any more.
    FetchDone {
        fetch: FetchId,
    },
}

/// Everything a mind can ask of its hands.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    Dial {
        peer: PeerId,
        addresses: Vec<SocketAddr>,
    },
    DialSeed {
        seed: usize,
    },
    /// Close every connection to the peer, on both planes.
    Hangup {
        peer: PeerId,
        refusal: Option<Refusal>,
    },
    Send {
        peer: PeerId,
        message: Message,
    },
    /// The peer proved membership: the data plane may serve it.
    Admitted {
        peer: PeerId,
        certificate: Box<Certificate>,
    },
    /// The peer is not linked any more: the data plane closes.
    Departed {
        peer: PeerId,
    },
    /// Read the narinfos of what this machine shares and answer with [`Input::LocalAnswers`].
    ReadLocal {
        peer: PeerId,
        request: u64,
        hashes: Vec<StorePathHash>,
    },
    LookupDone {
        lookup: LookupId,
        outcome: LookupOutcome,
    },
    /// Ask a cache for narinfos, and answer with [`Input::CacheAnswers`] or [`Input::CacheFailed`].
    AskCache {
        cache: usize,
        request: u64,
        hashes: Vec<StorePathHash>,
    },
    /// Open a transfer from byte `from` of the NAR.
    Transfer {
        fetch: FetchId,
        attempt: u32,
        source: Source,
        from: u64,
    },
    /// Abort the running transfer of this fetch; another one or [`Output::FetchFailed`] follows.
    StopTransfer {
        fetch: FetchId,
        attempt: u32,
    },
    /// Every source was tried. The fetch is over.
    FetchFailed {
        fetch: FetchId,
    },
}

/// What a lookup found out.
#[derive(Clone, Debug, PartialEq)]
pub enum LookupOutcome {
    Found {
        narinfo: Arc<VerifiedNarInfo>,
        /// Peers that say they hold the path, best first.
        providers: Vec<PeerId>,
        /// Caches that have this very NAR, in order of preference.
        caches: Vec<usize>,
    },
    NotFound,
}

/// The state machine. See the module's documentation for how to drive it.
pub struct Mesh {
    me: PeerId,
    config: Config,
    chance: Chance,
    outputs: VecDeque<Output>,
    /// What [`Output::ReadLocal`] asked for and was not answered yet, of linked peers.
    reads: BTreeSet<(PeerId, u64)>,
    membership: membership::Membership,
    gossip: gossip::Gossip,
    lookups: lookup::Lookups,
    fetches: fetch::Fetches,
}

impl Mesh {
    /// `seed` decides every random choice; a node draws it from the system, a simulation from its own seed.
    pub fn new(me: PeerId, config: Config, seed: u64, now: Instant) -> Mesh {
        let mut chance = Chance(Pcg64::seed_from_u64(seed));
        let lots = Lots::new(chance.number());
        Mesh {
            me,
            membership: membership::Membership::new(me, &config, now),
            gossip: gossip::Gossip::new(me, &mut chance, now),
            lookups: lookup::Lookups::new(config.caches.clone(), lots),
            fetches: fetch::Fetches::new(lots),
            outputs: VecDeque::new(),
            reads: BTreeSet::new(),
            config,
            chance,
        }
    }

    /// Takes in one thing that happened at `now`; afterwards drain [`Mesh::poll`].
    ///
    /// `now` never goes backwards between calls.
    pub fn handle(&mut self, index: &mut dyn AvailabilityIndex, input: Input, now: Instant) {
        self.gossip.start(index, &mut self.chance);
        match input {
            Input::Tick => {}
            Input::ClockRead { unix } => self.membership.clock_read(unix, now),
            Input::Woke => {
                self.membership.woke(now);
                self.gossip.woke(now);
                self.lookups.network_changed();
                self.fetches.network_changed();
            }
            Input::NetworkChanged => {
                self.membership.network_changed(now);
                self.lookups.network_changed();
                self.fetches.network_changed();
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
                self.member_event(index, event, now);
            }
            Input::LinkDown { peer } => {
                let event = self.membership.link_down(peer, &mut self.chance, now);
                self.member_event(index, event, now);
            }
            Input::DialFailed { peer } => self.membership.dial_failed(peer, &mut self.chance, now),
            Input::SeedFailed { seed } => self.membership.seed_failed(seed, &mut self.chance, now),
            Input::SeedFound { seed, peer } => {
                self.membership
                    .seed_found(seed, peer, &mut self.chance, now);
            }
            Input::Garbage { peer } => {
                let event = self.membership.refuse(peer, Refusal::Garbage, now);
                self.member_event(index, event, now);
            }
            Input::Received { peer, message } => self.received(index, peer, message, now),
            Input::LocalPaths { all } => self.gossip.local_paths(index, &all, now),
            Input::LocalChanged { added, removed } => {
                self.gossip.local_changed(index, &added, &removed, now);
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
                let events = self.lookups.start(lookup, hash, candidates, now);
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
        sizes
    }

    /// Returns how often connections were refused, by reason.
    pub fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        self.membership.refusals()
    }

    /// Returns the linked peers that say they hold a path and may be asked for it, best first.
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
        self.gossip.head()
    }

    fn received(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        peer: PeerId,
        message: Message,
        now: Instant,
    ) {
        if let Message::Hello {
            version,
            certificate,
        } = &message
        {
            let event = self.membership.hello(peer, *version, certificate, now);
            return self.member_event(index, event, now);
        }
        if !self.membership.is_linked(&peer) {
            // The hands may still deliver what was under way when we hung up: only a peer that we
            // are getting to know is refused for speaking out of turn.
            let event = self.membership.spoke_out_of_turn(peer, now);
            return self.member_event(index, event, now);
        }
        match message {
            Message::Hello { .. } => unreachable!("handled above"),
            Message::About {
                store_dir,
                transfer_port,
                head,
            } => {
                let event = self.membership.about(peer, &store_dir, transfer_port, now);
                self.member_event(index, event, now);
                if self.membership.is_linked(&peer) {
                    let sends = self.gossip.head_told(index, peer, head, now);
                    self.send_all(peer, sends);
                }
            }
            Message::Goodbye => self.membership.goodbye(peer, now),
            Message::Head { head } => {
                let sends = self.gossip.head_told(index, peer, head, now);
                self.send_all(peer, sends);
            }
            Message::Delta { after, operations } => {
                let added = operations.iter().filter_map(|operation| match operation {
                    Operation::Add(prefix) => Some(*prefix),
                    Operation::Remove(_) => None,
                });
                self.lookups.announced(added);
                let sends = self.gossip.delta(index, peer, after, &operations, now);
                self.replication(index, peer, sends, now);
            }
            Message::Pull { after } => {
                let (sends, restarted) = self.gossip.pull(index, after, &mut self.chance);
                self.send_all(peer, sends);
                if restarted {
                    let head = self.gossip.head();
                    for other in self
                        .membership
                        .linked()
                        .into_iter()
                        .filter(|one| *one != peer)
                    {
                        self.send(other, Message::Head { head });
                    }
                }
            }
            Message::PullPage { epoch, after } => {
                let sends = self.gossip.pull_page(index, epoch, after);
                self.send_all(peer, sends);
            }
            Message::Snapshot {
                head,
                after,
                prefixes,
                is_last,
            } => {
                self.lookups.announced(prefixes.iter().copied());
                let sends = self
                    .gossip
                    .snapshot(index, peer, head, after, prefixes, is_last, now);
                self.replication(index, peer, sends, now);
            }
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
        let events = self.lookups.answers(
            source,
            request,
            answers,
            &self.config.trust,
            &self.config.store_dir,
            &mut self.chance,
            now,
        );
        self.lookup_events(index, events, now);
    }

    fn replication(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        peer: PeerId,
        sends: Result<Vec<Message>, gossip::Nonsense>,
        now: Instant,
    ) {
        match sends {
            Ok(sends) => self.send_all(peer, sends),
            Err(gossip::Nonsense) => {
                let event = self.membership.refuse(peer, Refusal::Garbage, now);
                self.member_event(index, event, now);
            }
        }
    }

    fn member_event(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        event: membership::Event,
        now: Instant,
    ) {
        match event {
            membership::Event::Nothing => {}
            membership::Event::SayHello(peer) => self.say_hello(peer),
            membership::Event::Refused {
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
                }
            }
            membership::Event::Admitted {
                peer,
                certificate,
                say_hello,
            } => {
                if say_hello {
                    self.say_hello(peer);
                }
                self.outputs
                    .push_back(Output::Admitted { peer, certificate });
                let about = Message::About {
                    store_dir: self.config.store_dir.clone(),
                    transfer_port: self.config.transfer_port,
                    head: self.gossip.head(),
                };
                self.send(peer, about);
            }
            membership::Event::Departed(peer) => self.departed(index, peer, now),
        }
    }

    fn departed(&mut self, index: &mut dyn AvailabilityIndex, peer: PeerId, now: Instant) {
        self.outputs.push_back(Output::Departed { peer });
        self.reads.retain(|(reader, _)| *reader != peer);
        self.gossip.departed(peer);
        let events = self.lookups.departed(peer, now);
        self.lookup_events(index, events, now);
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
                    SourceId::Peer(peer) => self.send(peer, Message::Lookup { request, hashes }),
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
                } => match self.source(fetch, source) {
                    Some(source) => self.outputs.push_back(Output::Transfer {
                        fetch,
                        attempt,
                        source,
                        from,
                    }),
                    // It may have departed in this very step.
                    None => self.transfer_ended(index, fetch, attempt, Err(Blame::Peer), now),
                },
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

    fn tick(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) {
        let mut dials = Vec::new();
        for event in self.membership.tick(&mut dials, now) {
            self.member_event(index, event, now);
        }
        self.outputs.extend(dials);

        for message in self.gossip.flush(index, now) {
            for peer in self.membership.linked() {
                self.send(peer, message.clone());
            }
        }
        let linked = self.membership.linked();
        if let Some((peer, message)) = self.gossip.tick(&linked, &mut self.chance, now) {
            self.send(peer, message);
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

    fn send(&mut self, peer: PeerId, message: Message) {
        self.outputs.push_back(Output::Send { peer, message });
    }

    fn send_all(&mut self, peer: PeerId, messages: Vec<Message>) {
        for message in messages {
            self.send(peer, message);
        }
    }
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

/// The mind's only source of randomness, from the seed it was given.
struct Chance(Pcg64);

impl Chance {
    fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns `duration`, more or less `percent` of it, so that nodes do not act in step.
    fn jitter(&mut self, duration: Duration, percent: u32) -> Duration {
        let span = duration * percent / 100;
        let nanos = u64::try_from(span.as_nanos())
            .unwrap_or(u64::MAX / 2)
            .max(1);
        duration - span + Duration::from_nanos(self.number() % (2 * nanos))
    }

    fn pick<'a, T>(&mut self, among: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(among.len()).ok().filter(|count| *count > 0)?;
        among.get((self.number() % count) as usize)
    }
}

#[cfg(test)]
mod tests;
