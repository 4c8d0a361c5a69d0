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

use crate::availability::{AvailabilityIndex, Cursor, HashPrefix};
use crate::certificate::{Certificate, SignedCertificate, UnixTime};
use crate::message::{Answer, Message};
use crate::narinfo::VerifiedNarInfo;
use crate::peer::PeerId;
use crate::signature::{PublicKey, TrustedKeys};
use crate::store_path::{StoreDir, StorePathHash};

mod membership;
mod gossip;
mod lookup;
mod fetch;

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
    /// The transfer reached byte `at` of the NAR, or is held up by its reader, who is not to blame.
    TransferProgress {
        fetch: FetchId,
        attempt: u32,
        at: u64,
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
    /// Open a transfer from byte `from` of the NAR.
    Transfer {
        fetch: FetchId,
        attempt: u32,
        peer: PeerId,
        address: SocketAddr,
        from: u64,
    },
    /// Abort the running transfer of this fetch; another one or [`Output::FetchFailed`] follows.
    StopTransfer {
        fetch: FetchId,
        attempt: u32,
    },
    /// Every provider was tried. The fetch is over.
    FetchFailed {
        fetch: FetchId,
    },
}

/// What a lookup found out.
#[derive(Clone, Debug, PartialEq)]
pub enum LookupOutcome {
    Found {
        narinfo: Arc<VerifiedNarInfo>,
        providers: Vec<PeerId>,
    },
    NotFound,
}

/// What is known of one peer, for status.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub peer: PeerId,
    /// From its certificate, once admitted.
    pub name: Option<String>,
    pub state: PeerState,
    pub address: Option<SocketAddr>,
    /// How many paths it says it holds.
    pub paths: u64,
    /// Seconds until it is trusted with questions again, and what it did.
    pub quarantine: Option<(Duration, &'static str)>,
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
        Mesh {
            me,
            membership: membership::Membership::new(me, &config, now),
            gossip: gossip::Gossip::new(me, &mut chance, now),
            lookups: lookup::Lookups::new(),
            fetches: fetch::Fetches::new(),
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
                self.lookups.woke();
            }
            Input::NetworkChanged => self.membership.network_changed(now),
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
                let providers = self.providers(index, &hash, now);
                let events = self.lookups.start(lookup, hash, providers, now);
                self.lookup_events(index, events, now);
            }
            Input::CancelLookup { lookup, hash } => self.lookups.cancel(lookup, &hash),
            Input::Fetch { fetch, narinfo } => {
                let hash = narinfo.narinfo().store_path.hash();
                let providers = self.providers(index, &hash, now);
                let events = self.fetches.start(fetch, hash, &providers, now);
                self.fetch_events(index, events);
            }
            Input::TransferProgress { fetch, attempt, at } => {
                self.fetches.progress(fetch, attempt, at, now);
            }
            Input::TransferEnded {
                fetch,
                attempt,
                outcome,
            } => {
                self.transfer_ended(index, fetch, attempt, outcome, now);
            }
            Input::FetchMismatch { fetch } => {
                for peer in self.fetches.finish(fetch) {
                    self.membership
                        .quarantine(peer, "sent a NAR with another hash", now);
                }
            }
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
        self.membership.views(index, now)
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
        let mut providers = index.providers(HashPrefix::from(hash));
        providers.retain(|peer| *peer != self.me && self.membership.is_usable(peer, now));
        self.lookups.order(&mut providers);
        providers
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
                let events = self.lookups.answers(
                    peer,
                    request,
                    answers,
                    &self.config.trust,
                    &self.config.store_dir,
                    now,
                );
                self.lookup_events(index, events, now);
            }
        }
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
                    peer,
                    request,
                    hashes,
                } => {
                    self.send(peer, Message::Lookup { request, hashes });
                }
                lookup::Event::HaveNot { peer, hash } => {
                    index.withdraw(&peer, HashPrefix::from(&hash));
                }
                lookup::Event::Lied { peer, offence } => {
                    self.membership.quarantine(peer, offence, now);
                }
                lookup::Event::Found { lookup, narinfo } => {
                    let hash = narinfo.narinfo().store_path.hash();
                    let providers = self.providers(index, &hash, now);
                    let outcome = LookupOutcome::Found { narinfo, providers };
                    self.outputs
                        .push_back(Output::LookupDone { lookup, outcome });
                }
                lookup::Event::NotFound { lookup } => {
                    let outcome = LookupOutcome::NotFound;
                    self.outputs
                        .push_back(Output::LookupDone { lookup, outcome });
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
        let Some((hash, peer)) = self.fetches.running(fetch, attempt) else {
            return;
        };
        if outcome == Err(Blame::Absent) {
            index.withdraw(&peer, HashPrefix::from(&hash));
        }
        let providers = self.providers(index, &hash, now);
        let events = self.fetches.ended(fetch, outcome, &providers, now);
        self.fetch_events(index, events);
    }

    fn fetch_events(&mut self, _index: &dyn AvailabilityIndex, events: Vec<fetch::Event>) {
        for event in events {
            let output = match event {
                fetch::Event::Open {
                    fetch,
                    attempt,
                    peer,
                    from,
                } => {
                    match self.membership.transfer_address(&peer) {
                        Some(address) => Output::Transfer {
                            fetch,
                            attempt,
                            peer,
                            address,
                            from,
                        },
                        None => {
                            // Usable providers have one; it may have departed in this very step.
                            self.fetches.finish(fetch);
                            Output::FetchFailed { fetch }
                        }
                    }
                }
                fetch::Event::Stop { fetch, attempt } => Output::StopTransfer { fetch, attempt },
                fetch::Event::Failed { fetch } => Output::FetchFailed { fetch },
            };
            self.outputs.push_back(output);
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

        let events = self.lookups.tick(now);
        self.lookup_events(index, events, now);

        for (fetch, hash) in self.fetches.stalled(now) {
            let providers = self.providers(index, &hash, now);
            let events = self.fetches.switch(fetch, &providers, now);
            self.fetch_events(index, events);
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
