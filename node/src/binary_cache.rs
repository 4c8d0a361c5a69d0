//! Client of a binary cache: brings NARs over HTTP, resumes them, and proves them while they stream.
//!
//! A member, an anchor and an upstream differ in how they are reached and in how they pack a NAR;
//! what comes out here is the same for all: the bytes of the uncompressed NAR from any offset
//! ([`Transfer`]), so that one can continue where another one broke off. [`HeldBack`] is what makes it
//! safe to pass bytes on before the whole NAR is known.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use granary_protocol::hash::NarHash;
use granary_protocol::mesh::Blame;
use granary_protocol::narinfo::Compression;
use granary_protocol::peer::PeerId;
use granary_protocol::store_path::StorePathHash;

use crate::serve::tls::TlsError;

mod held_back;
mod member;
mod strangers;
mod pieces;
mod web;
mod stock;
mod unpack;

pub use held_back::{HELD_BACK_BYTES, HeldBack, WrongBytes};
pub use member::PeerCaches;
pub use pieces::PiecesError;
pub use stock::{Collected, Stock, Told};
pub use strangers::Strangers;
pub use unpack::{Unpacked, Unpackers};
pub use web::{FromWeb, WebCache, WebCaches, WebSetupError};

/// From the request to the head of the answer. The mind replaces a source that is silent for 2 s;
/// this ends what it forgot.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two chunks of a NAR. The mind replaces a source long before; this ends a transfer that
/// goes on after the mesh has stopped.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Who sends a NAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Peer(PeerId),
    /// By its URL.
    Cache(Arc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Peer(peer) => peer.fmt(f),
            Origin::Cache(url) => f.write_str(url),
        }
    }
}

/// Why a transfer did not start or broke off.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("{origin} does not have the NAR")]
    Absent { origin: Origin },
    #[error("{origin} sends us as many NARs as it may")]
    Busy { origin: Origin },
    #[error("{origin} answered {found}, expected {expected}")]
    Answer {
        origin: Origin,
        found: String,
        expected: String,
    },
    #[error("connection to {peer} failed: {source}")]
    Connect { peer: PeerId, source: Box<TlsError> },
    #[error("{origin} did not answer within {RESPONSE_TIMEOUT:?}")]
    TimedOut { origin: Origin },
    #[error("{origin} sent nothing for {SILENCE_TIMEOUT:?}")]
    Silent { origin: Origin },
    #[error("transfer from {peer} broke off: {source}")]
    Broken { peer: PeerId, source: hyper::Error },
    #[error("{peer} answered for a narinfo with something that is none")]
    NoNarInfo { peer: PeerId },
    #[error("{peer} sent a NAR in pieces that cannot be read: {source}")]
    Pieces { peer: PeerId, source: PiecesError },
    #[error("{peer} is named by no valid key")]
    NoKey { peer: PeerId },
    #[error("{cache} could not be asked: {source}")]
    Web {
        cache: Arc<str>,
        source: reqwest::Error,
    },
    #[error("{cache} packs the NAR as {compression}, which this node does not unpack")]
    Compression {
        cache: Arc<str>,
        compression: Compression,
    },
    #[error("{cache} names no URL that HTTP can fetch: {url:?}")]
    Url { cache: Arc<str>, url: String },
    #[error("{cache} sent a NAR that does not unpack: {source}")]
    Unpack { cache: Arc<str>, source: io::Error },
    #[error("as many NARs as may be are being unpacked")]
    NoUnpacker,
}

impl TransferError {
    pub fn blame(&self) -> Blame {
        match self {
            // A cache that packs in another way has nothing for us, and is well.
            TransferError::Absent { .. }
            | TransferError::Compression { .. }
            | TransferError::Url { .. } => Blame::Absent,
            TransferError::NoUnpacker => Blame::Local,
            _ => Blame::Peer,
        }
    }

    /// Whether waiting helps.
    pub fn is_busy(&self) -> bool {
        matches!(self, TransferError::Busy { .. } | TransferError::NoUnpacker)
    }
}

/// Which NAR, and how long it is.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub store_path_hash: StorePathHash,
    pub nar_hash: NarHash,
    pub nar_size: u64,
}

/// The rest of a NAR on its way. Dropping it aborts the transfer.
pub enum Transfer<'a> {
    Member(member::FromMember<'a>),
    /// From a node of another mesh.
    Stranger(member::FromMember<'a>),
    Web(web::FromWeb),
}

impl Transfer<'_> {
    /// The member that sends, if one does.
    pub fn peer(&self) -> Option<PeerId> {
        match self {
            Transfer::Member(transfer) => Some(transfer.peer()),
            Transfer::Stranger(_) | Transfer::Web(_) => None,
        }
    }

    /// The next bytes; `None` at the end of what was promised. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        match self {
            Transfer::Member(transfer) | Transfer::Stranger(transfer) => transfer.next().await,
            Transfer::Web(transfer) => transfer.next().await,
        }
    }
}
