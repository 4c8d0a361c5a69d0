//! Metrics: what this node counts about itself, shown by `granary status`.
//!
//! Counters only grow. Peers are not labels of anything that outlives them; the bytes moved with
//! each are kept apart in [`Traffic`], bounded by the number of members.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use granary_protocol::peer::PeerId;
use serde::Serialize;

/// Peers whose traffic is remembered; more than a mesh has members.
const PEERS_MAX: usize = 1024;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// narinfos answered from the local store.
    pub narinfos_local: Counter,
    /// narinfos answered by asking peers.
    pub narinfos_peer: Counter,
    /// narinfos answered with 404.
    pub narinfos_absent: Counter,
    /// NARs started from the local store for Nix.
    pub nars_local: Counter,
    /// NARs brought whole and proved from peers.
    pub nars_peer: Counter,
    /// NARs that were asked for and could not be brought.
    pub nars_absent: Counter,
    /// NARs whose bytes did not have the promised NarHash.
    pub nars_mismatched: Counter,
    /// Connections to the transfer port by peers that are not admitted, or that failed the handshake.
    pub transfers_refused: Counter,
    /// Errors of the local store's database while answering.
    pub store_errors: Counter,
    /// NAR bytes moved with peers.
    pub traffic: Traffic,
}

/// NAR bytes moved with each peer.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<BTreeMap<PeerId, Bytes>>);

/// NAR bytes in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    pub sent: u64,
    pub received: u64,
}

impl Traffic {
    pub fn sent(&self, peer: &PeerId, bytes: u64) {
        self.change(peer, |moved| moved.sent += bytes);
    }

    pub fn received(&self, peer: &PeerId, bytes: u64) {
        self.change(peer, |moved| moved.received += bytes);
    }

    pub fn with(&self, peer: &PeerId) -> Bytes {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers.get(peer).copied().unwrap_or_default()
    }

    pub fn total(&self) -> Bytes {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers.values().fold(Bytes::default(), |total, moved| Bytes {
            sent: total.sent + moved.sent,
            received: total.received + moved.received,
        })
    }

    fn change(&self, peer: &PeerId, change: impl FnOnce(&mut Bytes)) {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.contains_key(peer) || peers.len() < PEERS_MAX {
            change(peers.entry(*peer).or_default());
        }
    }
}
