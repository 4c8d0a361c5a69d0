//! Membership: who is known, who is linked, who proved to belong, who is well.
//!
//! A peer is one peer however many addresses and connections it has. Presence is a connection, not
//! an mDNS record: discovery only supplies addresses to dial. The dialler says Hello first, the
//! other side answers only a Hello that verifies, so whoever merely connects learns nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Chance, Config, Output, PeerView};
use crate::availability::AvailabilityIndex;
use crate::certificate::{Certificate, NotAMember, SignedCertificate, UnixTime};
use crate::message::PROTOCOL_VERSION;
use crate::peer::PeerId;
use crate::signature::PublicKey;
use crate::store_path::StoreDir;

/// Peers remembered at once. Discovery is unauthenticated, so this bounds what a flood can cost.
const KNOWN_PEERS_MAX: usize = 1024;

/// Addresses remembered per peer, latest first: interfaces × families of an ordinary machine.
const ADDRESSES_MAX: usize = 8;

/// A dial that the hands have not reported on by then is taken as failed.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a connection may stand before its Hello must have arrived and been verified.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Two nodes discover each other at once; the one with the greater id leaves the other this much
/// time to dial, so that one connection comes to stand instead of two.
const DIAL_DEFER: Duration = Duration::from_millis(500);

/// First pause after a failed dial or a lost link; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
const RETRY_JITTER_PERCENT: u32 = 25;

/// Pause before a peer is dialled again that proved not to be a member. It may be admitted meanwhile.
const REFUSED_RETRY: Duration = Duration::from_secs(60);

/// Pause before a peer is dialled again that said goodbye: as long as a restart takes. Discovery need
/// not notice so short an absence, and a peer behind a firewall cannot dial us. One that stays away
/// backs off like any other.
const GOODBYE_RETRY: Duration = Duration::from_secs(5);

/// First quarantine of a peer that lied; doubles with every lie up to [`QUARANTINE_MAX`].
const QUARANTINE_MIN: Duration = Duration::from_secs(30);
const QUARANTINE_MAX: Duration = Duration::from_secs(3600);

/// Why a connection was closed by us. Each is counted; the words are the labels of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    OtherMesh,
    BadSignature,
    OtherPeer,
    NotYetValid,
    Expired,
    MalformedCertificate,
    MayNotShare,
    NoHello,
    OutOfTurn,
    Garbage,
    Version,
    OtherStoreDir,
    TooManyPeers,
}

impl Refusal {
    pub fn word(self) -> &'static str {
        match self {
            Refusal::OtherMesh => "other_mesh",
            Refusal::BadSignature => "bad_signature",
            Refusal::OtherPeer => "other_peer",
            Refusal::NotYetValid => "not_yet_valid",
            Refusal::Expired => "expired",
            Refusal::MalformedCertificate => "malformed_certificate",
            Refusal::MayNotShare => "may_not_share",
            Refusal::NoHello => "no_hello",
            Refusal::OutOfTurn => "out_of_turn",
            Refusal::Garbage => "garbage",
            Refusal::Version => "version",
            Refusal::OtherStoreDir => "other_store_dir",
            Refusal::TooManyPeers => "too_many_peers",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl From<&NotAMember> for Refusal {
    fn from(reason: &NotAMember) -> Refusal {
        match reason {
            NotAMember::OtherMesh { .. } => Refusal::OtherMesh,
            NotAMember::BadSignature => Refusal::BadSignature,
            NotAMember::OtherPeer { .. } => Refusal::OtherPeer,
            NotAMember::NotYetValid { .. } => Refusal::NotYetValid,
            NotAMember::Expired { .. } => Refusal::Expired,
            NotAMember::Malformed(_) => Refusal::MalformedCertificate,
            NotAMember::MayNotShare { .. } => Refusal::MayNotShare,
        }
    }
}

/// How far the acquaintance with a peer has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Known by address only; dialled again later.
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
    Nothing,
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
    Departed(PeerId),
}

pub(super) struct Membership {
    me: PeerId,
    mesh_key: PublicKey,
    store_dir: StoreDir,
    /// The wall clock when it was last read, to date certificates.
    clock: Option<(UnixTime, Instant)>,
    peers: BTreeMap<PeerId, Peer>,
    seeds: Vec<Seed>,
    refusals: BTreeMap<Refusal, u64>,
}

struct Peer {
    /// Latest first, at most [`ADDRESSES_MAX`].
    addresses: Vec<SocketAddr>,
    state: State,
    /// Failures in a row, for the back-off.
    failures: u32,
    retry_at: Option<Instant>,
    quarantine: Option<Quarantine>,
}

enum State {
    Away,
    Dialling {
        since: Instant,
    },
    Greeting {
        address: SocketAddr,
        since: Instant,
        said_hello: bool,
    },
    Linked {
        address: SocketAddr,
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

/// An address of an unknown peer.
struct Seed {
    peer: Option<PeerId>,
    failures: u32,
    /// `None` while a dial is under way.
    retry_at: Option<Instant>,
    dialled_at: Option<Instant>,
}

impl Membership {
    pub(super) fn new(me: PeerId, config: &Config, now: Instant) -> Membership {
        let seed = || Seed {
            peer: None,
            failures: 0,
            retry_at: Some(now),
            dialled_at: None,
        };
        Membership {
            me,
            mesh_key: config.mesh_key.clone(),
            store_dir: config.store_dir.clone(),
            clock: None,
            peers: BTreeMap::new(),
            seeds: std::iter::repeat_with(seed).take(config.seeds).collect(),
            refusals: BTreeMap::new(),
        }
    }

    pub(super) fn clock_read(&mut self, unix: UnixTime, now: Instant) {
        self.clock = Some((unix, now));
    }

    pub(super) fn woke(&mut self, now: Instant) {
        self.network_changed(now);
    }

    /// Forgets back-offs: what failed on the old network may work on this one.
    pub(super) fn network_changed(&mut self, now: Instant) {
        for peer in self
            .peers
            .values_mut()
            .filter(|peer| matches!(peer.state, State::Away))
        {
            peer.failures = 0;
            peer.retry_at = Some(now);
        }
        for seed in self.seeds.iter_mut().filter(|seed| seed.retry_at.is_some()) {
            seed.failures = 0;
            seed.retry_at = Some(now);
        }
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
                .is_some_and(|retry| retry > at + RETRY_MAX / 2);
            if !keeps_away {
                peer.retry_at = Some(peer.retry_at.map_or(at, |retry| retry.min(at)));
            }
        }
    }

    pub(super) fn lost(&mut self, id: PeerId) {
        let is_away = |peer: &Peer| matches!(peer.state, State::Away) && peer.quarantine.is_none();
        if self.peers.get(&id).is_some_and(is_away) {
            self.peers.remove(&id);
        }
    }

    pub(super) fn link_up(
        &mut self,
        id: PeerId,
        address: SocketAddr,
        outbound: bool,
        seed: Option<usize>,
        now: Instant,
    ) -> Event {
        if let Some(seed) = seed.and_then(|seed| self.seeds.get_mut(seed)) {
            seed.leads_to(id);
        }
        let Some(peer) = self.entry(id) else {
            *self.refusals.entry(Refusal::TooManyPeers).or_default() += 1;
            return Event::Refused {
                peer: id,
                refusal: Refusal::TooManyPeers,
                was_linked: false,
            };
        };
        // Who dialled speaks first. After a simultaneous dial both did.
        let said_hello = outbound || matches!(peer.state, State::Dialling { .. });
        if outbound {
            peer.learn(address);
        }
        peer.state = State::Greeting {
            address,
            since: now,
            said_hello,
        };
        if said_hello {
            Event::SayHello(id)
        } else {
            Event::Nothing
        }
    }

    pub(super) fn link_down(&mut self, id: PeerId, chance: &mut Chance, now: Instant) -> Event {
        let was_linked = self.is_linked(&id);
        // Who was refused, or said goodbye, is left alone under either name.
        let not_before = self.peers.get(&id).and_then(|peer| peer.retry_at);
        for seed in self.seeds.iter_mut().filter(|seed| seed.peer == Some(id)) {
            if was_linked {
                seed.failures = 0;
            }
            seed.back_off(chance, now);
            seed.retry_at = seed.retry_at.max(not_before);
        }
        let Some(peer) = self.peers.get_mut(&id) else {
            return Event::Nothing;
        };
        peer.state = State::Away;
        if was_linked {
            peer.failures = 0;
        }
        if peer.retry_at.is_none_or(|at| at <= now) {
            peer.back_off(chance, now);
        }
        if peer.addresses.is_empty() && peer.quarantine.is_none() {
            self.peers.remove(&id);
        }
        if was_linked {
            Event::Departed(id)
        } else {
            Event::Nothing
        }
    }

    pub(super) fn dial_failed(&mut self, id: PeerId, chance: &mut Chance, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id)
            && matches!(peer.state, State::Dialling { .. })
        {
            peer.state = State::Away;
            peer.back_off(chance, now);
        }
    }

    pub(super) fn seed_failed(&mut self, seed: usize, chance: &mut Chance, now: Instant) {
        if let Some(seed) = self.seeds.get_mut(seed) {
            seed.back_off(chance, now);
        }
    }

    /// The seed is dialled again when the connection to that peer is lost, or soon when it was already.
    pub(super) fn seed_found(
        &mut self,
        seed: usize,
        id: PeerId,
        chance: &mut Chance,
        now: Instant,
    ) {
        let is_connected =
            |peer: &Peer| matches!(peer.state, State::Greeting { .. } | State::Linked { .. });
        if !self.peers.get(&id).is_some_and(is_connected) {
            self.seed_failed(seed, chance, now);
        } else if let Some(seed) = self.seeds.get_mut(seed) {
            seed.leads_to(id);
        }
    }

    /// Reads a Hello: the only message that is read from a peer that is not a member yet.
    pub(super) fn hello(
        &mut self,
        id: PeerId,
        version: u32,
        certificate: &SignedCertificate,
        now: Instant,
    ) -> Event {
        let Some(peer) = self.peers.get(&id) else {
            return Event::Nothing;
        };
        let (said_hello, linked) = match &peer.state {
            State::Greeting {
                said_hello,
                address,
                ..
            } => (*said_hello, Err(*address)),
            // A member shows a renewed certificate.
            State::Linked {
                address,
                transfer_port,
                ..
            } => (true, Ok((*address, *transfer_port))),
            State::Away | State::Dialling { .. } => return Event::Nothing,
        };
        if version < PROTOCOL_VERSION {
            return self.refuse(id, Refusal::Version, now);
        }
        let unix = self.unix(now);
        match certificate.verify(&self.mesh_key, &id, unix) {
            Err(reason) => self.refuse(id, Refusal::from(&reason), now),
            Ok(certificate) => {
                let certificate = Box::new(certificate);
                let (address, transfer_port) = linked.unwrap_or_else(|address| (address, None));
                let peer = self.peers.get_mut(&id).expect("looked up above");
                peer.state = State::Linked {
                    address,
                    certificate: certificate.clone(),
                    transfer_port,
                };
                peer.failures = 0;
                peer.retry_at = None;
                match linked {
                    Ok(_) => Event::Nothing,
                    Err(_) => Event::Admitted {
                        peer: id,
                        certificate,
                        say_hello: !said_hello,
                    },
                }
            }
        }
    }

    pub(super) fn about(
        &mut self,
        id: PeerId,
        store_dir: &StoreDir,
        port: Option<u16>,
        now: Instant,
    ) -> Event {
        if *store_dir != self.store_dir {
            return self.refuse(id, Refusal::OtherStoreDir, now);
        }
        if let Some(Peer {
            state: State::Linked { transfer_port, .. },
            ..
        }) = self.peers.get_mut(&id)
        {
            *transfer_port = port;
        }
        Event::Nothing
    }

    /// The peer leaves on purpose, perhaps to be back at once.
    pub(super) fn goodbye(&mut self, id: PeerId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.retry_at = Some(now + GOODBYE_RETRY);
        }
    }

    /// Refuses a peer that said something else before Hello; ignores one that is gone already.
    pub(super) fn spoke_out_of_turn(&mut self, id: PeerId, now: Instant) -> Event {
        match self.peers.get(&id).map(|peer| &peer.state) {
            Some(State::Greeting { .. }) => self.refuse(id, Refusal::OutOfTurn, now),
            _ => Event::Nothing,
        }
    }

    /// Ends the acquaintance for now: counted, hung up, not dialled for [`REFUSED_RETRY`].
    pub(super) fn refuse(&mut self, id: PeerId, refusal: Refusal, now: Instant) -> Event {
        *self.refusals.entry(refusal).or_default() += 1;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Event::Nothing;
        };
        let was_linked = matches!(peer.state, State::Linked { .. });
        peer.state = State::Away;
        peer.failures = peer.failures.saturating_add(1);
        peer.retry_at = Some(now + REFUSED_RETRY);
        Event::Refused {
            peer: id,
            refusal,
            was_linked,
        }
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
        let is_linked = |peer: &Peer| matches!(peer.state, State::Linked { .. });
        self.peers.get(id).is_some_and(is_linked)
    }

    /// Linked, offers transfers, and not in quarantine.
    pub(super) fn is_usable(&self, id: &PeerId, now: Instant) -> bool {
        self.peers.get(id).is_some_and(|peer| {
            matches!(
                peer.state,
                State::Linked {
                    transfer_port: Some(_),
                    ..
                }
            ) && peer
                .quarantine
                .is_none_or(|quarantine| quarantine.until <= now)
        })
    }

    pub(super) fn linked(&self) -> Vec<PeerId> {
        let is_linked = |(_, peer): &(&PeerId, &Peer)| matches!(peer.state, State::Linked { .. });
        self.peers
            .iter()
            .filter(is_linked)
            .map(|(id, _)| *id)
            .collect()
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
            let (state, address, name) = match &peer.state {
                State::Away => (PeerState::Away, peer.addresses.first().copied(), None),
                State::Dialling { .. } => {
                    (PeerState::Dialling, peer.addresses.first().copied(), None)
                }
                State::Greeting { address, .. } => (PeerState::Greeting, Some(*address), None),
                State::Linked {
                    address,
                    certificate,
                    ..
                } => (
                    PeerState::Linked,
                    Some(*address),
                    Some(certificate.name.clone()),
                ),
            };
            let quarantine = peer.quarantine.filter(|quarantine| quarantine.until > now);
            PeerView {
                peer: *id,
                name,
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

    /// Does what time demands: overdue Hellos, expired certificates, due dials (into `dials`).
    pub(super) fn tick(&mut self, dials: &mut Vec<Output>, now: Instant) -> Vec<Event> {
        let unix = self.unix(now);
        let mut refused = Vec::new();
        for (id, peer) in &mut self.peers {
            match &peer.state {
                State::Greeting { since, .. } if *since + HELLO_TIMEOUT <= now => {
                    refused.push((*id, Refusal::NoHello));
                }
                State::Linked { certificate, .. } if certificate.not_after <= unix => {
                    refused.push((*id, Refusal::Expired));
                }
                State::Dialling { since } if *since + DIAL_TIMEOUT <= now => {
                    peer.state = State::Away;
                    peer.failures = peer.failures.saturating_add(1);
                    peer.retry_at = Some(now + RETRY_MAX);
                }
                State::Away
                    if peer.retry_at.is_some_and(|at| at <= now) && !peer.addresses.is_empty() =>
                {
                    peer.state = State::Dialling { since: now };
                    peer.retry_at = None;
                    dials.push(Output::Dial {
                        peer: *id,
                        addresses: peer.addresses.clone(),
                    });
                }
                _ => {}
            }
        }
        for (number, seed) in self.seeds.iter_mut().enumerate() {
            if seed.retry_at.is_some_and(|at| at <= now) {
                seed.retry_at = None;
                seed.dialled_at = Some(now);
                dials.push(Output::DialSeed { seed: number });
            } else if seed.dialled_at.is_some_and(|at| at + DIAL_TIMEOUT <= now) {
                seed.dialled_at = None;
                seed.retry_at = Some(now + RETRY_MAX);
            }
        }
        refused
            .into_iter()
            .map(|(id, refusal)| self.refuse(id, refusal, now))
            .collect()
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let peers = self.peers.values().filter_map(|peer| match &peer.state {
            State::Greeting { since, .. } => Some((*since + HELLO_TIMEOUT, "hello overdue")),
            State::Dialling { since } => Some((*since + DIAL_TIMEOUT, "dial overdue")),
            State::Linked { certificate, .. } => Some((
                self.instant_of(certificate.not_after)?,
                "certificate expires",
            )),
            State::Away if peer.addresses.is_empty() => None,
            State::Away => peer.retry_at.map(|at| (at, "dial again")),
        });
        let seeds = self
            .seeds
            .iter()
            .filter_map(|seed| match (seed.retry_at, seed.dialled_at) {
                (Some(at), _) => Some((at, "dial seed")),
                (None, Some(at)) => Some((at + DIAL_TIMEOUT, "seed overdue")),
                (None, None) => None,
            });
        peers.chain(seeds).min_by_key(|(at, _)| *at)
    }

    /// Returns the peer's entry, made if there is room; the peer that failed most makes room.
    fn entry(&mut self, id: PeerId) -> Option<&mut Peer> {
        if !self.peers.contains_key(&id) && self.peers.len() >= KNOWN_PEERS_MAX {
            let is_idle = |(_, peer): &(&PeerId, &Peer)| {
                matches!(peer.state, State::Away) && peer.failures > 0
            };
            let idle = self.peers.iter().filter(is_idle);
            let idle = idle
                .max_by_key(|(_, peer)| peer.failures)
                .map(|(id, _)| *id)?;
            self.peers.remove(&idle);
        }
        Some(self.peers.entry(id).or_insert_with(|| Peer {
            addresses: Vec::new(),
            state: State::Away,
            failures: 0,
            retry_at: None,
            quarantine: None,
        }))
    }

    /// The wall clock at `now`; before it was ever read, the start of 1970, when nothing is valid.
    fn unix(&self, now: Instant) -> UnixTime {
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

impl Seed {
    /// Failures stay until the peer proves membership; what answers here may be a stranger.
    fn leads_to(&mut self, id: PeerId) {
        self.peer = Some(id);
        self.retry_at = None;
        self.dialled_at = None;
    }

    fn back_off(&mut self, chance: &mut Chance, now: Instant) {
        self.peer = None;
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + pause_after(self.failures, chance));
        self.dialled_at = None;
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

    fn back_off(&mut self, chance: &mut Chance, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + pause_after(self.failures, chance));
    }
}

fn pause_after(failures: u32, chance: &mut Chance) -> Duration {
    let doubled = RETRY_MIN * 2u32.saturating_pow(failures.saturating_sub(1).min(16));
    chance.jitter(doubled.min(RETRY_MAX), RETRY_JITTER_PERCENT)
}
