//! Machine: one host with a mind (or a liar), its index, its store and what it wants.
//!
//! Holds state only; what happens to it is decided by [`crate::world`] and what its mind wants is
//! carried out by [`crate::hands`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::mesh::{FetchId, LookupId, Mesh};
use granary_protocol::narinfo::VerifiedNarInfo;
use granary_protocol::peer::{PeerId, PeerKey};
use granary_protocol::signature::SecretKey;

use crate::content::{Content, PathId, digest};
use crate::index::{Fingerprint, SharedIndex};
use crate::liar::Liar;
use crate::transfer::FlowId;

/// Wall clock at the start of a run.
pub const START: UnixTime = UnixTime(1_700_000_000);

/// NARs that Nix fetches at once (`max-substitution-jobs`).
pub const FETCHES_MAX: usize = 16;

/// Who decides on a machine.
pub enum Brain {
    /// The process does not run.
    Off,
    Honest(Box<Mesh>),
    Liar(Box<Liar>),
}

/// A path that somebody at this machine waits for.
#[derive(Clone, Debug)]
pub struct Want {
    pub since: Duration,
    /// When Nix asked last.
    pub asked_at: Duration,
    pub stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In the queue, or waiting to be tried again.
    Waiting,
    NarInfo(LookupId),
    /// The NAR request looks the path up once more.
    Nar(LookupId),
    Fetching(FetchId),
}

/// One NAR coming together, as `substituter/assembly.rs` does it.
pub struct Assembly {
    pub path: PathId,
    pub narinfo: Arc<VerifiedNarInfo>,
    pub started: Duration,
    /// Bytes assembled.
    pub at: u64,
    /// Some of them are not the path's.
    pub is_wrong: bool,
    /// The attempt under way; 0 before the first.
    pub attempt: u32,
    pub source: Option<usize>,
    pub flow: Option<FlowId>,
    pub is_busy: bool,
    pub lies: u32,
    /// Whether this round is over for the mind.
    pub is_over: bool,
}

pub struct Machine {
    pub peer: PeerId,
    pub certificate: SignedCertificate,
    pub is_liar: bool,
    pub brain: Brain,
    /// Counts starts of the process: what was meant for an earlier one is dropped.
    pub incarnation: u32,
    pub is_asleep: bool,
    /// Starts again when its time comes, at the latest when faults end.
    pub index: SharedIndex,
    pub store: BTreeSet<PathId>,
    /// Fingerprint of `store`.
    pub truth: Fingerprint,
    /// When paths came that were not there at start.
    pub held_since: BTreeMap<PathId, Duration>,
    pub tick_at: Option<Duration>,
    pub admitted: BTreeSet<PeerId>,
    pub lookups: BTreeMap<LookupId, PathId>,
    pub assemblies: BTreeMap<FetchId, Assembly>,
    pub wants: BTreeMap<PathId, Want>,
    pub queue: VecDeque<PathId>,
    pub active: usize,
    pub next_id: u64,
    /// When the machine or its network was last disturbed by a fault.
    pub disturbed_at: Duration,
    pub is_full: bool,
    pub is_stalled: bool,
    /// Changes of the store that the own log does not contain yet: when they happened.
    pub untold: Vec<Duration>,
}

impl Machine {
    pub fn new(
        seed: u64,
        number: usize,
        is_liar: bool,
        mesh: &SecretKey,
        index: SharedIndex,
    ) -> Machine {
        let peer = key(seed, number).peer_id();
        let certificate = Certificate {
            peer,
            name: format!("machine-{number}"),
            permissions: "share".parse().expect("a permission"),
            not_before: START,
            not_after: UnixTime(START.0 + 30 * 86_400),
            serial: number as u64,
        };
        Machine {
            peer,
            certificate: certificate.sign(mesh).expect("an ordinary certificate"),
            is_liar,
            brain: Brain::Off,
            incarnation: 0,
            is_asleep: false,
            index,
            store: BTreeSet::new(),
            truth: Fingerprint::default(),
            held_since: BTreeMap::new(),
            tick_at: None,
            admitted: BTreeSet::new(),
            lookups: BTreeMap::new(),
            assemblies: BTreeMap::new(),
            wants: BTreeMap::new(),
            queue: VecDeque::new(),
            active: 0,
            next_id: 0,
            disturbed_at: Duration::ZERO,
            is_full: false,
            is_stalled: false,
            untold: Vec::new(),
        }
    }

    /// Runs and is awake.
    pub fn is_up(&self) -> bool {
        !self.is_asleep && !matches!(self.brain, Brain::Off)
    }

    /// Puts a path into the store; false when it was there.
    pub fn add(&mut self, path: PathId, content: &Content) -> bool {
        let is_new = self.store.insert(path);
        if is_new {
            self.truth.add(content.prefix(path));
        }
        is_new
    }

    /// Takes a path out of the store; false when it was not there.
    pub fn remove(&mut self, path: PathId, content: &Content) -> bool {
        let was_there = self.store.remove(&path);
        if was_there {
            self.truth.remove(content.prefix(path));
            self.held_since.remove(&path);
        }
        was_there
    }

    pub fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Forgets what a process holds in memory.
    pub fn lose_memory(&mut self) {
        self.brain = Brain::Off;
        self.incarnation += 1;
        self.tick_at = None;
        self.admitted.clear();
        self.lookups.clear();
        self.assemblies.clear();
        self.untold.clear();
        self.active = 0;
        self.queue.clear();
        for (path, want) in &mut self.wants {
            want.stage = Stage::Waiting;
            self.queue.push_back(*path);
        }
    }
}

/// Returns the node key of a machine.
pub fn key(seed: u64, number: usize) -> PeerKey {
    PeerKey::from_seed(digest(seed, "node", number as u64))
}

/// Where links are accepted, and where NARs are served.
pub const CONTROL_PORT: u16 = 4727;
pub const TRANSFER_PORT: u16 = 4728;

/// Returns the control address of a place in a subnet.
pub fn address(subnet: usize, place: usize) -> SocketAddr {
    let byte = |number: usize| u8::try_from(number % 256).unwrap_or_default();
    SocketAddr::from((
        [10, byte(subnet), byte(place / 250), byte(place % 250 + 1)],
        CONTROL_PORT,
    ))
}
