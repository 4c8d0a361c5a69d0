//! Membership: who is known, who is linked, who proved to belong, who is well.
//!
//! A peer is one peer however many addresses and connections it has. Presence is a connection, not
//! an mDNS record: discovery only supplies addresses to dial. Who is at the other end is found out
//! step by step ([`greeting`]).
//!
//! Up to [`FULL_MESH_MEMBERS_MAX`] members everyone is linked to everyone. In a larger mesh a node
//! keeps a few neighbours for the exchange of records ([`neighbours`]), knows the others by their
//! contacts, and links them when it wants something of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Chance, Config, PeerView, Size};
use crate::availability::AvailabilityIndex;
use crate::certificate::{Certificate, UnixTime};
use crate::contact::{Contact, SignedContact};
use crate::message::Wish;
use crate::peer::{PeerId, PeerKey};
use crate::revocation::SignedRevocations;
use crate::signature::PublicKey;
use crate::store_path::StoreDir;

mod refusal;
mod greeting;
mod seeds;
mod contacts;
mod revoked;
mod neighbours;
mod due;

use due::Due;
pub use refusal::Refusal;
pub(super) use revoked::Shown;
use seeds::Seeds;

/// Up to so many members, this node included, everyone is linked to everyone and nothing is relayed:
/// 63 links and a message to each per batch are nothing to a machine, and there is no shorter way.
const FULL_MESH_MEMBERS_MAX: usize = 64;

/// A large mesh is taken as small again below this, so that one machine that comes and goes at the
/// limit does not make everybody link and unlink.
const FULL_MESH_AGAIN_MEMBERS: usize = 56;

/// Peers remembered at once, members and others: four times the largest mesh that is promised. A
/// peer takes about 1 KiB.
pub(super) const KNOWN_PEERS_MAX: usize = 4096;

/// Of these, peers that proved nothing: discovery is unauthenticated, and this bounds what a flood
/// can push out.
const UNPROVED_PEERS_MAX: usize = 1024;

/// Links at once. Beyond it, the guest that was quiet longest has to go.
const LINKS_MAX: usize = 256;

/// A link that was made to ask something, in a large mesh, is closed after this long without use.
const GUEST_IDLE: Duration = Duration::from_secs(120);

/// Addresses remembered per peer, latest first: interfaces × families of an ordinary machine.
const ADDRESSES_MAX: usize = 8;

/// A dial that the hands have not reported on by then is taken as failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long something that is wanted of a peer waits for it to be dialled. A machine on the local
/// network that is awake answers within a tenth of it; one that sleeps, or hides behind a firewall,
/// would hold up every lookup until [`DIAL_TIMEOUT`].
const DIAL_HOPE: Duration = Duration::from_millis(500);

/// How long a connection may stand before its Hello must have arrived and been verified.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Two nodes discover each other at once; the one with the greater id leaves the other this much
/// time to dial, so that one connection comes to stand instead of two.
const DIAL_DEFER: Duration = Duration::from_millis(500);

/// First pause after a failed dial or a lost link; doubles up to [`RETRY_MAX`]. A packet per
/// sleeping laptop every 20 s is little, and whoever comes back is found within 25 s even where
/// nothing announces it.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(20);
const RETRY_JITTER_PERCENT: u32 = 25;

/// How long a seed is left alone whose link ended, by a node of a large mesh that has neighbours: a
/// few seeds cannot keep links to everybody, and would drop one for each that comes back. Not for
/// ever, because a seed may be all that leads from one half of a mesh to the other.
const SEED_REST: Duration = Duration::from_secs(300);

/// Pause before a peer is dialled again that proved not to be a member. It may be admitted meanwhile.
const REFUSED_RETRY: Duration = Duration::from_secs(60);

/// Pause before a peer is dialled again that said goodbye: as long as a restart takes. Discovery need
/// not notice so short an absence, and a peer behind a firewall cannot dial us. One that stays away
/// backs off like any other.
const GOODBYE_RETRY: Duration = Duration::from_secs(5);

/// First quarantine of a peer that lied; doubles with every lie up to [`QUARANTINE_MAX`].
const QUARANTINE_MIN: Duration = Duration::from_secs(30);
const QUARANTINE_MAX: Duration = Duration::from_secs(3600);

/// How far the acquaintance with a peer has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Known by address or contact only; dialled later, or when something is wanted of it.
    Away,
    Dialling,
    /// Connected, membership not proved yet.
    Greeting,
    /// Connected and admitted.
    Linked,
}

impl PeerState {
    pub fn word(self) -> &'static str {
        match self {
            PeerState::Away => "away",
            PeerState::Dialling => "dialling",
            PeerState::Greeting => "greeting",
            PeerState::Linked => "linked",
        }
    }
}

/// What a step in membership means for the rest of the mind.
pub(super) enum Event {
    Dial {
        peer: PeerId,
        addresses: Vec<SocketAddr>,
    },
    DialSeed {
        seed: usize,
    },
    /// Show our badge to whom we dialled.
    Knock(PeerId),
    SayHello(PeerId),
    Admitted {
        peer: PeerId,
        certificate: Box<Certificate>,
        say_hello: bool,
    },
    Refused {
        peer: PeerId,
        refusal: Refusal,
        was_linked: bool,
    },
    /// The link is gone.
    Departed(PeerId),
    /// The link is not needed any more, and is closed.
    Released(PeerId),
    /// The peer could not be reached.
    Unreachable(PeerId),
    /// Tell a linked peer whether we want it among our neighbours.
    Tell {
        peer: PeerId,
        wish: Wish,
    },
    /// A member reached us by a newer contact than we knew.
    NewContact(SignedContact),
    /// The peer is no member any more.
    Forgotten(PeerId),
}

pub(super) struct Membership {
    me: PeerId,
    key: PeerKey,
    mesh_key: PublicKey,
    store_dir: StoreDir,
    /// What this node says of itself; signed when the clock has been read.
    own: Contact,
    own_signed: Option<SignedContact>,
    /// What the process before this one said, until we say something.
    own_kept: Option<SignedContact>,
    /// The wall clock when it was last read, to date certificates.
    clock: Option<(UnixTime, Instant)>,
    peers: BTreeMap<PeerId, Peer>,
    /// Keys of `peers` whose state is [`State::Linked`].
    linked: BTreeSet<PeerId>,
    /// Keys of `peers` that are dialled or connected: the few among thousands that time runs for.
    busy: BTreeSet<PeerId>,
    /// Keys of `linked` that we want as neighbours.
    wished: BTreeSet<PeerId>,
    /// When the first contact expires, or before.
    contact_expires_at: Option<Instant>,
    /// Counts changes of what is known of members, this node included.
    contacts_version: u64,
    /// Whether there are too many members to link them all.
    is_large: bool,
    neighbours_checked_at: Option<Instant>,
    seeds: Seeds,
    refusals: BTreeMap<Refusal, u64>,
    /// Signed by the mesh key, which was verified.
    revocations: Option<SignedRevocations>,
    due: Due,
}

struct Peer {
    /// Latest first, at most [`ADDRESSES_MAX`].
    addresses: Vec<SocketAddr>,
    state: State,
    /// Failures in a row, for the back-off.
    failures: u32,
    /// Not dialled before; in a small mesh, dialled then.
    retry_at: Option<Instant>,
    /// Something is wanted of it: dialled even in a large mesh.
    is_wanted: bool,
    quarantine: Option<Quarantine>,
    /// Proves that it is a member, linked or not.
    contact: Option<Box<Proved>>,
    neighbour: neighbours::Wishes,
    /// When something was last asked of it, or by it.
    used_at: Option<Instant>,
    /// Number of the list of revocations that it was given last over this link; 0 before the first.
    revocations_given: u64,
    /// When its last link ended.
    left_at: Option<Instant>,
}

struct Proved {
    signed: SignedContact,
    certificate: Certificate,
}

enum State {
    Away,
    Dialling {
        since: Instant,
    },
    Greeting {
        address: SocketAddr,
        since: Instant,
        outbound: bool,
        said_hello: bool,
    },
    Linked {
        address: SocketAddr,
        outbound: bool,
        certificate: Box<Certificate>,
        transfer_port: Option<u16>,
    },
}

#[derive(Clone, Copy)]
struct Quarantine {
    until: Instant,
    offences: u32,
    offence: &'static str,
}

impl Membership {
    pub(super) fn new(config: &Config, now: Instant) -> Membership {
        Membership {
            me: config.key.peer_id(),
            key: config.key.clone(),
            mesh_key: config.mesh_key.clone(),
            store_dir: config.store_dir.clone(),
            own: Contact {
                certificate: config.certificate.clone(),
                number: 0,
                addresses: Vec::new(),
                transfer_port: config.transfer_port,
            },
            own_signed: None,
            own_kept: None,
            clock: None,
            peers: BTreeMap::new(),
            linked: BTreeSet::new(),
            busy: BTreeSet::new(),
            wished: BTreeSet::new(),
            contact_expires_at: None,
            contacts_version: 0,
            is_large: false,
            neighbours_checked_at: None,
            seeds: Seeds::new(config.seeds, now),
            refusals: BTreeMap::new(),
            revocations: None,
            due: Due::new(),
        }
    }

    pub(super) fn clock_read(&mut self, unix: UnixTime, now: Instant) {
        self.due.now();
        self.clock = Some((unix, now));
        // A clock that was set changes what has ended.
        self.contact_expires_at = Some(now);
    }

    pub(super) fn woke(&mut self, now: Instant) {
        self.network_changed(now);
    }

    /// Forgets back-offs: what failed on the old network may work on this one.
    pub(super) fn network_changed(&mut self, now: Instant) {
        self.due.now();
        for peer in self
            .peers
            .values_mut()
            .filter(|peer| matches!(peer.state, State::Away))
        {
            peer.failures = 0;
            peer.retry_at = Some(now);
        }
        self.seeds.forget_failures(now);
    }

    pub(super) fn discovered(&mut self, id: PeerId, addresses: Vec<SocketAddr>, now: Instant) {
        if id == self.me || addresses.is_empty() {
            return;
        }
        let defers = self.me > id;
        let Some(peer) = self.entry(id) else { return };
        let mut is_news = false;
        for address in addresses.iter().take(ADDRESSES_MAX).rev() {
            is_news |= peer.learn(*address);
        }
        // An unchanged record must not shorten a back-off, or a flood of them would.
        if is_news && matches!(peer.state, State::Away) {
            let at = if defers { now + DIAL_DEFER } else { now };
            let keeps_away = peer
                .retry_at
                .is_some_and(|retry| retry > at + REFUSED_RETRY / 2);
            if !keeps_away {
                peer.retry_at = Some(peer.retry_at.map_or(at, |retry| retry.min(at)));
            }
        }
        self.changed(&id);
    }

    pub(super) fn lost(&mut self, id: PeerId) {
        let is_idle = |peer: &Peer| {
            matches!(peer.state, State::Away) && peer.quarantine.is_none() && peer.contact.is_none()
        };
        if self.peers.get(&id).is_some_and(is_idle) {
            self.peers.remove(&id);
            self.due.now();
        }
    }

    pub(super) fn link_up(
        &mut self,
        id: PeerId,
        address: SocketAddr,
        outbound: bool,
        seed: Option<usize>,
        now: Instant,
    ) -> Option<Event> {
        if let Some(seed) = seed {
            self.seeds.leads_to(seed, id);
            self.due.now();
        }
        if self.entry(id).is_none() {
            *self.refusals.entry(Refusal::TooManyPeers).or_default() += 1;
            return Some(Event::Refused {
                peer: id,
                refusal: Refusal::TooManyPeers,
                was_linked: false,
            });
        }
        self.linked.remove(&id);
        self.forget_wishes(&id);
        self.busy.insert(id);
        let peer = self.peers.get_mut(&id)?;
        peer.revocations_given = 0;
        // Who dialled speaks first. After a simultaneous dial both did.
        let knocks = outbound || matches!(peer.state, State::Dialling { .. });
        if outbound {
            peer.learn(address);
        }
        peer.state = State::Greeting {
            address,
            since: now,
            outbound,
            said_hello: false,
        };
        self.changed(&id);
        knocks.then_some(Event::Knock(id))
    }

    pub(super) fn link_down(
        &mut self,
        id: PeerId,
        chance: &mut Chance,
        now: Instant,
    ) -> Option<Event> {
        self.due.now();
        let was_linked = self.linked.remove(&id);
        self.busy.remove(&id);
        self.forget_wishes(&id);
        // Who was refused, or said goodbye, is left alone under either name.
        let mut not_before = self.peers.get(&id).and_then(|peer| peer.retry_at);
        if self.is_at_home() {
            let pause = chance.jitter(SEED_REST, RETRY_JITTER_PERCENT);
            not_before = not_before.max(Some(now + pause));
        }
        self.seeds
            .link_down(id, was_linked, not_before, chance, now);
        let peer = self.peers.get_mut(&id)?;
        peer.state = State::Away;
        if was_linked {
            peer.failures = 0;
            peer.left_at = Some(now);
        }
        if peer.retry_at.is_none_or(|at| at <= now) {
            peer.back_off(chance, now);
        }
        if peer.addresses.is_empty() && peer.quarantine.is_none() && peer.contact.is_none() {
            self.peers.remove(&id);
        }
        Some(if was_linked {
            Event::Departed(id)
        } else {
            Event::Unreachable(id)
        })
    }

    pub(super) fn dial_failed(
        &mut self,
        id: PeerId,
        chance: &mut Chance,
        now: Instant,
    ) -> Option<Event> {
        let peer = self.peers.get_mut(&id)?;
        if !matches!(peer.state, State::Dialling { .. }) {
            return None;
        }
        peer.state = State::Away;
        peer.back_off(chance, now);
        self.busy.remove(&id);
        self.changed(&id);
        Some(Event::Unreachable(id))
    }

    pub(super) fn seed_failed(&mut self, seed: usize, chance: &mut Chance, now: Instant) {
        self.due.now();
        self.seeds.failed(seed, chance, now);
    }

    /// The seed is dialled again when the connection to that peer is lost, or soon when it was already.
    pub(super) fn seed_found(
        &mut self,
        seed: usize,
        id: PeerId,
        chance: &mut Chance,
        now: Instant,
    ) {
        self.due.now();
        let is_connected =
            |peer: &Peer| matches!(peer.state, State::Greeting { .. } | State::Linked { .. });
        if self.peers.get(&id).is_some_and(is_connected) {
            self.seeds.leads_to(seed, id);
        } else {
            self.seeds.failed(seed, chance, now);
        }
    }

    /// Ends the link to the guest that was quiet longest, if there are too many links.
    fn make_room(&mut self, newest: &PeerId) -> Option<Event> {
        if self.linked.len() <= LINKS_MAX {
            return None;
        }
        let is_guest = |id: &&PeerId| {
            *id != newest
                && self
                    .peers
                    .get(id)
                    .is_some_and(|peer| !peer.neighbour.is_mutual())
        };
        let used_at = |id: &&PeerId| self.peers.get(id).and_then(|peer| peer.used_at);
        let guest = *self.linked.iter().filter(is_guest).min_by_key(used_at)?;
        self.release(guest)
    }

    fn release(&mut self, id: PeerId) -> Option<Event> {
        let peer = self.peers.get_mut(&id)?;
        peer.state = State::Away;
        peer.retry_at = None;
        self.linked.remove(&id);
        self.busy.remove(&id);
        self.forget_wishes(&id);
        self.changed(&id);
        Some(Event::Released(id))
    }

    /// The peer leaves on purpose, perhaps to be back at once.
    pub(super) fn goodbye(&mut self, id: PeerId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.retry_at = Some(now + GOODBYE_RETRY);
            self.changed(&id);
        }
    }

    /// Ends the acquaintance for now: counted, hung up, not dialled for [`REFUSED_RETRY`].
    pub(super) fn refuse(&mut self, id: PeerId, refusal: Refusal, now: Instant) -> Vec<Event> {
        *self.refusals.entry(refusal).or_default() += 1;
        self.forget_wishes(&id);
        let Some(peer) = self.peers.get_mut(&id) else {
            return Vec::new();
        };
        peer.state = State::Away;
        peer.failures = peer.failures.saturating_add(1);
        peer.retry_at = Some(now + REFUSED_RETRY);
        peer.is_wanted = false;
        self.busy.remove(&id);
        self.changed(&id);
        vec![Event::Refused {
            peer: id,
            refusal,
            was_linked: self.linked.remove(&id),
        }]
    }

    /// Stops asking a peer that lied. It stays linked, since its announcements may be honest.
    ///
    /// What comes to light during a quarantine was said before it, often in the same message: it
    /// does not count again.
    pub(super) fn quarantine(&mut self, id: PeerId, offence: &'static str, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id)
            && peer
                .quarantine
                .is_none_or(|quarantine| quarantine.until <= now)
        {
            let offences = peer.quarantine.map_or(0, |quarantine| quarantine.offences);
            let pause = QUARANTINE_MIN * 2u32.saturating_pow(offences.min(16));
            let until = now + pause.min(QUARANTINE_MAX);
            peer.quarantine = Some(Quarantine {
                until,
                offences: offences.saturating_add(1),
                offence,
            });
        }
    }

    pub(super) fn is_linked(&self, id: &PeerId) -> bool {
        self.linked.contains(id)
    }

    /// Offers transfers, is not in quarantine, and is linked or could be at once.
    pub(super) fn is_usable(&self, id: &PeerId, now: Instant) -> bool {
        self.peers.get(id).is_some_and(|peer| {
            let may_be_asked = peer
                .quarantine
                .is_none_or(|quarantine| quarantine.until <= now);
            may_be_asked
                && match &peer.state {
                    State::Linked { transfer_port, .. } => transfer_port.is_some(),
                    State::Greeting { .. } | State::Dialling { .. } | State::Away => {
                        self.is_large
                            && !peer.is_slow_to_dial(now)
                            && !peer.addresses.is_empty()
                            && peer.retry_at.is_none_or(|at| at <= now)
                            && peer
                                .contact
                                .as_ref()
                                .is_some_and(|known| known.signed.contact().transfer_port.is_some())
                    }
                }
        })
    }

    /// Whether a link to the peer is coming to stand.
    pub(super) fn is_on_its_way(&self, id: &PeerId) -> bool {
        let is_coming =
            |peer: &Peer| matches!(peer.state, State::Dialling { .. } | State::Greeting { .. });
        self.peers.get(id).is_some_and(is_coming)
    }

    /// Something is wanted of a peer: keeps its link, or dials it if there is an address.
    pub(super) fn want(&mut self, id: &PeerId, now: Instant) -> Option<Event> {
        let peer = self.peers.get_mut(id)?;
        peer.used_at = Some(now);
        if !matches!(peer.state, State::Away) || peer.addresses.is_empty() {
            return None;
        }
        peer.is_wanted = true;
        self.busy.insert(*id);
        let dial = peer.dial(*id, now);
        self.changed(id);
        Some(dial)
    }

    pub(super) fn linked(&self) -> Vec<PeerId> {
        self.linked.iter().copied().collect()
    }

    /// Where the peer is, or may be.
    pub(super) fn address(&self, id: &PeerId) -> Option<SocketAddr> {
        let peer = self.peers.get(id)?;
        match &peer.state {
            State::Linked { address, .. } | State::Greeting { address, .. } => Some(*address),
            State::Away | State::Dialling { .. } => peer.addresses.first().copied(),
        }
    }

    pub(super) fn transfer_address(&self, id: &PeerId) -> Option<SocketAddr> {
        match &self.peers.get(id)?.state {
            State::Linked {
                address,
                transfer_port: Some(port),
                ..
            } => Some(SocketAddr::new(address.ip(), *port)),
            _ => None,
        }
    }

    pub(super) fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> + '_ {
        self.refusals
            .iter()
            .map(|(refusal, count)| (*refusal, *count))
    }

    pub(super) fn views(&self, index: &dyn AvailabilityIndex, now: Instant) -> Vec<PeerView> {
        let view = |(id, peer): (&PeerId, &Peer)| {
            let (state, address) = match &peer.state {
                State::Away => (PeerState::Away, peer.addresses.first().copied()),
                State::Dialling { .. } => (PeerState::Dialling, peer.addresses.first().copied()),
                State::Greeting { address, .. } => (PeerState::Greeting, Some(*address)),
                State::Linked { address, .. } => (PeerState::Linked, Some(*address)),
            };
            let certificate = match (&peer.state, &peer.contact) {
                (State::Linked { certificate, .. }, _) => Some(certificate.as_ref()),
                (_, Some(known)) => Some(&known.certificate),
                _ => None,
            };
            let left = || Some(now.saturating_duration_since(peer.left_at?));
            let quarantine = peer.quarantine.filter(|quarantine| quarantine.until > now);
            PeerView {
                peer: *id,
                name: certificate.map(|one| one.name.clone()),
                permissions: certificate.map(|one| one.permissions.clone()),
                expires: certificate.map(|one| one.not_after),
                seen: match state {
                    PeerState::Linked => Some(Duration::ZERO),
                    _ => left(),
                },
                state,
                address,
                paths: index.count(id),
                quarantine: quarantine
                    .map(|quarantine| (quarantine.until - now, quarantine.offence)),
                answers_within: None,
                bytes_per_second: None,
            }
        };
        self.peers.iter().map(view).collect()
    }

    pub(super) fn sizes(&self) -> [Size; 2] {
        let size = |what, count, limit| Size { what, count, limit };
        [
            size("peers", self.peers.len(), KNOWN_PEERS_MAX),
            size("links", self.linked.len(), LINKS_MAX),
        ]
    }

    /// Does what time demands: overdue Hellos, expired certificates, due dials, neighbours.
    pub(super) fn tick(&mut self, chance: &mut Chance, now: Instant) -> Vec<Event> {
        if !self.due.is_due(now) {
            return Vec::new();
        }
        let mut events = self.check_neighbours(chance, now);
        let unix = self.unix(now);
        let mut refused = Vec::new();
        let mut idle = Vec::new();
        let mut gone = Vec::new();
        for id in &self.busy {
            let Some(peer) = self.peers.get_mut(id) else {
                continue;
            };
            match &peer.state {
                State::Greeting { since, .. } if *since + HELLO_TIMEOUT <= now => {
                    refused.push((*id, Refusal::NoHello));
                }
                State::Linked { certificate, .. } if certificate.not_after <= unix => {
                    refused.push((*id, Refusal::Expired));
                }
                State::Linked { .. }
                    if self.is_large && peer.idle_at().is_some_and(|at| at <= now) =>
                {
                    idle.push(*id);
                }
                State::Dialling { since } if *since + DIAL_TIMEOUT <= now => {
                    peer.state = State::Away;
                    peer.failures = peer.failures.saturating_add(1);
                    peer.retry_at = Some(now + RETRY_MAX);
                    peer.is_wanted = false;
                    gone.push(*id);
                    events.push(Event::Unreachable(*id));
                }
                State::Dialling { since } if peer.is_wanted && *since + DIAL_HOPE <= now => {
                    peer.is_wanted = false;
                    events.push(Event::Unreachable(*id));
                }
                _ => {}
            }
        }
        for id in gone {
            self.busy.remove(&id);
        }
        if !self.is_large {
            for (id, peer) in &mut self.peers {
                if matches!(peer.state, State::Away)
                    && peer.retry_at.is_some_and(|at| at <= now)
                    && !peer.addresses.is_empty()
                {
                    events.push(peer.dial(*id, now));
                    self.busy.insert(*id);
                }
            }
        }
        let seeds = self.seeds.tick(now);
        events.extend(seeds.into_iter().map(|seed| Event::DialSeed { seed }));
        for (id, refusal) in refused {
            events.extend(self.refuse(id, refusal, now));
        }
        for id in idle {
            events.extend(self.release(id));
        }
        if self.contact_expires_at.is_some_and(|at| at <= now) {
            events.extend(self.forget_expired(unix));
        }
        self.due.looked(self.next_due());
        events
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        self.due.at()
    }

    /// What time demands of one peer may have changed. In a small mesh that may concern the others too.
    fn changed(&mut self, id: &PeerId) {
        if !self.is_large {
            return self.due.now();
        }
        let next = self.peers.get(id).and_then(|peer| self.next_of(peer));
        self.due.by(next);
        self.due.by(self.neighbours_deadline());
    }

    fn next_due(&self) -> Option<(Instant, &'static str)> {
        let busy = self.busy.iter().filter_map(|id| self.peers.get(id));
        let busy = busy.filter_map(|peer| self.next_of(peer));
        // In a large mesh nobody is dialled because of the time, and nobody is looked at for it.
        let is_small = !self.is_large;
        let away = is_small.then(|| self.peers.values()).into_iter().flatten();
        let away =
            away.filter(|peer| matches!(peer.state, State::Away) && !peer.addresses.is_empty());
        let away = away.filter_map(|peer| peer.retry_at.map(|at| (at, "dial again")));
        let others = [
            self.contact_expires_at.map(|at| (at, "contact expires")),
            self.seeds.deadline(),
            self.neighbours_deadline(),
        ];
        let all = busy.chain(away).chain(others.into_iter().flatten());
        all.min_by_key(|(at, _)| *at)
    }

    /// What time demands next of a peer that is dialled or connected.
    fn next_of(&self, peer: &Peer) -> Option<(Instant, &'static str)> {
        let of_state = match &peer.state {
            State::Greeting { since, .. } => Some((*since + HELLO_TIMEOUT, "hello overdue")),
            State::Dialling { since } if peer.is_wanted => {
                Some((*since + DIAL_HOPE, "dial is slow"))
            }
            State::Dialling { since } => Some((*since + DIAL_TIMEOUT, "dial overdue")),
            State::Linked { certificate, .. } => self
                .instant_of(certificate.not_after)
                .map(|at| (at, "certificate expires")),
            State::Away => None,
        };
        let idle = peer.idle_at().filter(|_| self.is_large);
        let both = [of_state, idle.map(|at| (at, "close an idle link"))];
        both.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Returns the peer's entry, made if there is room; the peer that failed most makes room.
    fn entry(&mut self, id: PeerId) -> Option<&mut Peer> {
        if !self.peers.contains_key(&id) {
            let is_unproved =
                |peer: &Peer| peer.contact.is_none() && !matches!(peer.state, State::Linked { .. });
            // Counted only where it can matter: it costs a look at every peer.
            let is_full = self.peers.len() >= KNOWN_PEERS_MAX
                || self.peers.len() >= UNPROVED_PEERS_MAX
                    && self.peers.values().filter(|peer| is_unproved(peer)).count()
                        >= UNPROVED_PEERS_MAX;
            if is_full {
                let is_idle = |(_, peer): &(&PeerId, &Peer)| {
                    matches!(peer.state, State::Away) && peer.failures > 0 && is_unproved(peer)
                };
                let idle = self.peers.iter().filter(is_idle);
                let idle = idle
                    .max_by_key(|(_, peer)| peer.failures)
                    .map(|(id, _)| *id)?;
                self.peers.remove(&idle);
            }
        }
        if !self.is_large {
            self.due.now();
        }
        Some(self.peers.entry(id).or_insert_with(|| Peer {
            addresses: Vec::new(),
            state: State::Away,
            failures: 0,
            retry_at: None,
            is_wanted: false,
            quarantine: None,
            contact: None,
            neighbour: neighbours::Wishes::default(),
            used_at: None,
            revocations_given: 0,
            left_at: None,
        }))
    }

    /// The wall clock at `now`; before it was ever read, the start of 1970, when nothing is valid.
    pub(super) fn unix(&self, now: Instant) -> UnixTime {
        self.clock.map_or(UnixTime(0), |(unix, at)| {
            UnixTime(
                unix.0
                    .saturating_add(now.saturating_duration_since(at).as_secs()),
            )
        })
    }

    fn instant_of(&self, unix: UnixTime) -> Option<Instant> {
        let (read, at) = self.clock?;
        at.checked_add(Duration::from_secs(unix.0.saturating_sub(read.0)))
    }
}

impl Peer {
    /// Puts the address first; returns whether it is a new one.
    fn learn(&mut self, address: SocketAddr) -> bool {
        let known = self.addresses.iter().position(|one| *one == address);
        if let Some(known) = known {
            self.addresses.remove(known);
        }
        self.addresses.insert(0, address);
        self.addresses.truncate(ADDRESSES_MAX);
        known.is_none()
    }

    fn dial(&mut self, id: PeerId, now: Instant) -> Event {
        self.state = State::Dialling { since: now };
        self.retry_at = None;
        Event::Dial {
            peer: id,
            addresses: self.addresses.clone(),
        }
    }

    /// Whether a dial takes longer than one that leads anywhere.
    fn is_slow_to_dial(&self, now: Instant) -> bool {
        matches!(self.state, State::Dialling { since } if since + DIAL_HOPE <= now)
    }

    fn back_off(&mut self, chance: &mut Chance, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + pause_after(self.failures, chance));
        self.is_wanted = false;
    }

    /// When the link to a guest that we dialled is closed, in a large mesh.
    fn idle_at(&self) -> Option<Instant> {
        let is_ours = matches!(self.state, State::Linked { outbound: true, .. });
        let is_guest = is_ours && !self.neighbour.ours && !self.neighbour.theirs;
        self.used_at.filter(|_| is_guest).map(|at| at + GUEST_IDLE)
    }
}

fn pause_after(failures: u32, chance: &mut Chance) -> Duration {
    let doubled = RETRY_MIN * 2u32.saturating_pow(failures.saturating_sub(1).min(16));
    chance.jitter(doubled.min(RETRY_MAX), RETRY_JITTER_PERCENT)
}
