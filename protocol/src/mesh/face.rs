//! The face of the mind: everything that goes in and comes out of [`Mesh`](super::Mesh).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{CacheRole, Refusal, Source};
use crate::certificate::{Certificate, SignedCertificate, UnixTime};
use crate::message::{Answer, Message};
use crate::narinfo::VerifiedNarInfo;
use crate::peer::{PeerId, PeerKey};
use crate::revocation::SignedRevocations;
use crate::signature::{PublicKey, TrustedKeys};
use crate::store_path::{StoreDir, StorePathHash};

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
    /// Whether what members built and vouch for is true as well.
    pub trusts_members: bool,
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
    /// This node has a new certificate, to be shown from here on.
    Certificate {
        certificate: SignedCertificate,
    },
    /// A person gave this list of revocations, or a process before this one kept it.
    Revocations {
        list: SignedRevocations,
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
    /// Keep this list of revocations, newer than any before, for the processes after this one.
    KeepRevocations {
        list: SignedRevocations,
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
