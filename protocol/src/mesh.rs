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

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use crate::availability::{AvailabilityIndex, Cursor, HashPrefix};
use crate::certificate::{Certificate, SignedCertificate, UnixTime};
use crate::contact::SignedContact;
use crate::hash::sha256;
use crate::message::{Answer, Message, Summary, WriterCursor};
use crate::narinfo::VerifiedNarInfo;
use crate::peer::{PeerId, PeerKey};
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

/// Messages for one peer that wait until it is linked: a few batches of lookups. One that does not
/// fit goes unsaid, and the lookup turns to another peer.
const WAITING_MESSAGES_MAX: usize = 16;

/// What a node is told once, at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's own key, with which it signs what it announces.
    pub key: PeerKey,
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
    /// Where others can reach this node's control plane, best first.
    OwnAddresses {
        addresses: Vec<SocketAddr>,
    },
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
    /// What is said to peers as soon as they are linked, and the transfers opened then.
    waiting: BTreeMap<PeerId, Waiting>,
    /// Whether the proofs that the index kept were read.
    is_restored: bool,
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
        let mut chance = Chance(Pcg64::seed_from_u64(seed));
        Mesh {
            me,
            membership: membership::Membership::new(&config, now),
            gossip: gossip::Gossip::new(config.key.clone(), &mut chance, now),
            lookups: lookup::Lookups::new(),
            fetches: fetch::Fetches::new(),
            outputs: VecDeque::new(),
            reads: BTreeSet::new(),
            waiting: BTreeMap::new(),
            is_restored: false,
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
                self.lookups.woke();
                // Whoever is still there knows what was missed.
                let message = Message::Summary {
                    summary: self.summary(index),
                };
                self.tell_neighbours(&message, &[]);
            }
            Input::NetworkChanged => self.membership.network_changed(now),
            Input::OwnAddresses { addresses } => {
                if self.membership.own_addresses(addresses, now) {
                    self.tell_own_contact();
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
                let providers = self.providers(index, &hash, now);
                let events = self.lookups.start(lookup, hash, providers, now);
                self.lookup_events(index, events, now);
            }
            Input::CancelLookup { lookup, hash } => self.lookups.cancel(lookup, &hash),
            Input::Fetch { fetch, narinfo } => {
                let hash = narinfo.narinfo().store_path.hash();
                let providers = self.providers(index, &hash, now);
                let events = self.fetches.start(fetch, hash, &providers, now);
                self.fetch_events(index, events, now);
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

    /// Returns the peers that say they hold a path and may be asked for it, best first: those that
    /// are linked, then those that could be.
    pub fn providers(
        &self,
        index: &dyn AvailabilityIndex,
        hash: &StorePathHash,
        now: Instant,
    ) -> Vec<PeerId> {
        let mut providers = index.providers(HashPrefix::from(hash));
        providers.retain(|peer| *peer != self.me && self.membership.is_usable(peer, now));
        self.lookups.order(&mut providers);
        providers.sort_by_key(|peer| !self.membership.is_linked(peer));
        providers
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
            Message::Hello { .. } => unreachable!("handled above"),
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
                let ours = self.known(index);
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

    /// Everything that is said about writers, and is not of this node's own log.
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
                    mut news,
                    added,
                } => {
                    let (writer, cursor) = (head.head().writer, head.head().cursor);
                    let Some(contact) = self.membership.contact(&writer) else {
                        continue;
                    };
                    drop(added);
                    let number = contact.contact().number;
                    index.keep_proof(&writer, &crate::wire::encode_proof(contact, &head));
                    self.gossip.learned(&writer, number, Some(cursor));
                    if let Message::Cursors { cursors, .. } = &mut news {
                        for known in cursors {
                            known.contact = number;
                        }
                    }
                    if self.membership.relays() {
                        self.tell_neighbours(&news, &[from, writer]);
                    }
                }
            }
        }
    }

    /// Reads what a member says of itself, passed on by `from`.
    fn contact_told(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        contact: SignedContact,
        now: Instant,
    ) {
        match self.membership.contact_told(contact.clone(), now) {
            Ok(true) => self.contact_news(index, from, contact),
            Ok(false) => {}
            Err(crate::contact::NotAContact::BadSignature { .. }) => {
                let events = self.membership.refuse(from, Refusal::Garbage, now);
                self.member_events(index, events, now);
            }
            // Its certificate may have ended, or our clock be wrong.
            Err(crate::contact::NotAContact::NotAMember(_)) => {}
        }
    }

    fn contact_news(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        contact: SignedContact,
    ) {
        let peer = contact.peer();
        if peer == self.me {
            return self.tell_own_contact();
        }
        let number = contact.contact().number;
        self.gossip.learned(&peer, number, index.cursor(&peer));
        if self.membership.relays() {
            self.tell_neighbours(&Message::Contact(contact), &[from, peer]);
        }
    }

    /// Whether a record of our own log is from a future that we lost; then a new epoch began.
    fn own_future(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        head: &crate::announcement::SignedHead,
        now: Instant,
    ) -> bool {
        if head.head().writer != self.me {
            return false;
        }
        let unix = self.membership.unix(now);
        let began = self.gossip.own_future(index, head, unix, &mut self.chance);
        if began {
            self.tell_own_cursor();
        }
        began
    }

    /// What this node knows of everybody, ascending.
    fn known(&self, index: &dyn AvailabilityIndex) -> Vec<WriterCursor> {
        let mut cursors = index.writers().into_iter().peekable();
        let known = |(writer, contact): (PeerId, u64)| {
            while cursors.next_if(|(other, _)| *other < writer).is_some() {}
            let cursor = cursors.next_if(|(other, _)| *other == writer);
            WriterCursor {
                writer,
                contact,
                cursor: cursor.map(|(_, cursor)| cursor),
            }
        };
        let mut all: Vec<WriterCursor> = self.membership.contacts().map(known).collect();
        all.truncate(crate::message::CURSORS_MAX);
        all
    }

    fn summary(&self, index: &dyn AvailabilityIndex) -> Summary {
        let known = self.known(index);
        let mut bytes = Vec::with_capacity(known.len() * 56);
        for one in known {
            bytes.extend(one.writer.as_public_key());
            bytes.extend(one.contact.to_be_bytes());
            // No log stands at the very end of numbers.
            let cursor = one.cursor.unwrap_or(Cursor {
                epoch: u64::MAX,
                sequence: u64::MAX,
            });
            bytes.extend(cursor.epoch.to_be_bytes());
            bytes.extend(cursor.sequence.to_be_bytes());
        }
        Summary(sha256(&bytes))
    }

    fn compare_summary(&mut self, index: &dyn AvailabilityIndex, peer: PeerId, theirs: Summary) {
        if self.summary(index) != theirs {
            let cursors = self.known(index);
            let is_complete = true;
            self.send(
                peer,
                Message::Cursors {
                    cursors,
                    is_complete,
                },
            );
        }
    }

    /// Reads the proofs that the index kept over a restart: who the writers are, and that they said so.
    fn restore(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) {
        if std::mem::replace(&mut self.is_restored, true) {
            return;
        }
        for (writer, cursor) in index.writers() {
            let proof = index.proof(&writer);
            let Some(Ok((contact, head))) = proof.map(|proof| crate::wire::decode_proof(&proof))
            else {
                continue;
            };
            let is_of_writer = contact.peer() == writer && head.head().writer == writer;
            if !is_of_writer || self.membership.contact_told(contact, now).is_err() {
                continue;
            }
            if head.head().cursor == cursor && head.is_proved() {
                self.gossip.remember(&head);
            }
        }
    }

    /// Tells everybody linked where our own log stands now, in a way that makes them pull.
    fn tell_own_cursor(&mut self) {
        let Some(contact) = self.membership.own_contact() else {
            return;
        };
        let own = WriterCursor {
            writer: self.me,
            contact: contact.contact().number,
            cursor: Some(self.gossip.cursor()),
        };
        let message = Message::Cursors {
            cursors: vec![own],
            is_complete: false,
        };
        for peer in self.membership.linked() {
            self.send(peer, message.clone());
        }
    }

    fn tell_own_contact(&mut self) {
        if let Some(contact) = self.membership.own_contact().cloned() {
            for peer in self.membership.linked() {
                self.send(peer, Message::Contact(contact.clone()));
            }
        }
    }

    fn tell_neighbours(&mut self, message: &Message, except: &[PeerId]) {
        for peer in self.membership.neighbours() {
            if !except.contains(&peer) {
                self.send(peer, message.clone());
            }
        }
    }

    fn member_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: impl IntoIterator<Item = membership::Event>,
        now: Instant,
    ) {
        for event in events {
            self.member_event(index, event, now);
        }
    }

    fn member_event(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        event: membership::Event,
        now: Instant,
    ) {
        match event {
            membership::Event::Dial { peer, addresses } => {
                self.outputs.push_back(Output::Dial { peer, addresses });
            }
            membership::Event::DialSeed { seed } => {
                self.outputs.push_back(Output::DialSeed { seed });
            }
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
                } else {
                    self.unreachable(index, peer, now);
                }
            }
            membership::Event::Admitted {
                peer,
                certificate,
                say_hello,
            } => self.admitted(index, peer, certificate, say_hello),
            membership::Event::Departed(peer) => self.departed(index, peer, now),
            membership::Event::Released(peer) => {
                let refusal = None;
                self.outputs.push_back(Output::Hangup { peer, refusal });
                self.departed(index, peer, now);
            }
            membership::Event::Unreachable(peer) => self.unreachable(index, peer, now),
            membership::Event::Tell { peer, wish } => {
                self.send(peer, Message::Neighbour { wish });
            }
            membership::Event::NewContact(contact) => {
                self.contact_news(index, contact.peer(), contact);
            }
            membership::Event::Forgotten(peer) => {
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
                && let Some(address) = self.membership.transfer_address(&peer)
            {
                self.outputs.push_back(Output::Transfer {
                    fetch,
                    attempt,
                    peer,
                    address,
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
                    self.send_when_linked(index, peer, Message::Lookup { request, hashes }, now);
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
        self.fetch_events(index, events, now);
    }

    fn fetch_events(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        events: Vec<fetch::Event>,
        now: Instant,
    ) {
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
                            // Usable providers are linked, or are dialled for this.
                            let waiting = self.waiting.entry(peer).or_default();
                            waiting.transfers.push((fetch, attempt, from));
                            self.want(index, peer, now);
                            continue;
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
        let events = self.membership.tick(&mut self.chance, now);
        self.member_events(index, events, now);

        for delta in self.gossip.flush(index, now) {
            self.tell_neighbours(&Message::Delta(delta), &[]);
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

        let events = self.lookups.tick(now);
        self.lookup_events(index, events, now);

        for (fetch, hash) in self.fetches.stalled(now) {
            let providers = self.providers(index, &hash, now);
            let events = self.fetches.switch(fetch, &providers, now);
            self.fetch_events(index, events, now);
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
