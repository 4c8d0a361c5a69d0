//! View: what the mind shows of itself, for status and for those who check its bounds.

use std::net::SocketAddr;
use std::time::Duration;

use super::{CacheRole, PeerState};
use crate::certificate::{Permissions, UnixTime};
use crate::peer::PeerId;

/// What is known of one peer, for status.
#[derive(Clone, Debug)]
pub struct PeerView {
    pub peer: PeerId,
    /// From its certificate, once admitted.
    pub name: Option<String>,
    /// From its certificate, as the name is.
    pub permissions: Option<Permissions>,
    /// When its certificate ends.
    pub expires: Option<UnixTime>,
    /// How long ago it was linked last; zero while it is, `None` if it was not since the start.
    pub seen: Option<Duration>,
    pub state: PeerState,
    pub address: Option<SocketAddr>,
    /// How many paths it says it holds.
    pub paths: u64,
    /// Seconds until it is trusted with questions again, and what it did.
    pub quarantine: Option<(Duration, &'static str)>,
    /// Within what time it usually answers a lookup (90 % of them), once it has.
    pub answers_within: Option<Duration>,
    /// How fast NARs usually come from it, once one has.
    pub bytes_per_second: Option<u64>,
}

/// What is known of one cache outside the mesh, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheView {
    pub role: CacheRole,
    pub breaker: BreakerView,
    /// As of a peer.
    pub answers_within: Option<Duration>,
    pub bytes_per_second: Option<u64>,
}

/// Whether a cache is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerView {
    Closed,
    /// It failed, and is not asked until a probe gets an answer.
    Open {
        probe_in: Duration,
    },
}

/// How many there are of something that could grow, and how many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub what: &'static str,
    pub count: usize,
    pub limit: usize,
}
