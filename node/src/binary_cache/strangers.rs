//! Strangers: nodes of other meshes near by that share in public, together as one cache.
//!
//! They are found by mDNS ([`Strangers::found`]), told apart by nothing but their keys, and believed in nothing: what they
//! say of a path counts only if a trusted key signed it, what they send only if its hash is right. Each learns which
//! paths it is asked for, so they are asked only where `mesh.strangers` says so, and after everybody else.
//!
//! Invariants: at most [`STRANGERS_MAX`] are known, at most [`ASKED_MAX`] asked for one path; who does not answer in
//! [`ANSWER_TIMEOUT`] has nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use granary_protocol::peer::PeerId;
use granary_protocol::store_path::StorePathHash;
use tracing::debug;

use super::member::{FromMember, PeerCaches};
use super::{Origin, TransferError, Wanted};
use crate::serve::tls::Connector;

/// Strangers known at once; a hall may be full of them, and a few have what all have.
const STRANGERS_MAX: usize = 16;

/// Strangers asked for one path, the nearest by a draw that differs for each path.
const ASKED_MAX: usize = 4;

/// How long they get. The mind takes a cache for silent after 0.9 s.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(600);

/// Paths of which it is remembered who told of them; beyond it all are forgotten, and asked about again.
const TOLD_MAX: usize = 4096;

/// The nodes of other meshes that may be asked.
pub struct Strangers {
    client: PeerCaches,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Their transfer ports.
    strangers: BTreeMap<PeerId, SocketAddr>,
    told: BTreeMap<StorePathHash, PeerId>,
}

impl Strangers {
    /// `connector` speaks the protocol of those who are not admitted.
    pub fn new(connector: Connector) -> Strangers {
        Strangers {
            client: PeerCaches::new(connector),
            known: Mutex::default(),
        }
    }

    /// Takes in one that was found, or that moved.
    pub fn found(&self, peer: PeerId, address: SocketAddr) {
        let mut known = self.known();
        if known.strangers.len() < STRANGERS_MAX || known.strangers.contains_key(&peer) {
            known.strangers.insert(peer, address);
        }
    }

    pub fn lost(&self, peer: &PeerId) {
        self.known().strangers.remove(peer);
        self.client.retain(|other| other != peer);
    }

    /// Forgets all of them, when the network has changed.
    pub fn clear(&self) {
        *self.known() = Known::default();
        self.client.retain(|_| false);
    }

    /// Asks for a narinfo; `None` when nobody has it, or nobody is there.
    pub async fn narinfo(&self, hash: StorePathHash) -> Option<String> {
        let asked = self.drawn(&hash);
        let ask = |(peer, address)| async move {
            let answer = self.client.narinfo(peer, address, hash);
            match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(narinfo)) => Some((peer, narinfo?)),
                Ok(Err(error)) => {
                    debug!(%peer, %hash, %error, "a stranger failed");
                    None
                }
                Err(_) => None,
            }
        };
        let mut answers: FuturesUnordered<_> = asked.into_iter().map(ask).collect();
        while let Some(answer) = answers.next().await {
            if let Some((peer, narinfo)) = answer {
                let mut known = self.known();
                if known.told.len() >= TOLD_MAX {
                    known.told.clear();
                }
                known.told.insert(hash, peer);
                return Some(narinfo);
            }
        }
        None
    }

    /// Asks who told of a path for its NAR, from byte `from`.
    pub async fn nar(&self, wanted: Wanted, from: u64) -> Result<FromMember<'_>, TransferError> {
        let told = {
            let known = self.known();
            let peer = known.told.get(&wanted.store_path_hash).copied();
            peer.and_then(|peer| Some((peer, *known.strangers.get(&peer)?)))
        };
        let Some((peer, address)) = told else {
            let origin = Origin::Cache(NAME.into());
            return Err(TransferError::Absent { origin });
        };
        self.client.nar(peer, address, wanted, from).await
    }

    /// Those to ask for a path.
    fn drawn(&self, hash: &StorePathHash) -> Vec<(PeerId, SocketAddr)> {
        let known = self.known();
        let all = known.strangers.iter();
        let mut all: Vec<_> = all.map(|(peer, address)| (*peer, *address)).collect();
        let lot = |peer: &PeerId| {
            let bytes = peer.as_public_key().iter().zip(hash.as_bytes());
            bytes.fold(0u64, |lot, (key, hash)| {
                lot.wrapping_mul(31)
                    .wrapping_add(u64::from(key ^ hash))
                    .rotate_left(7)
            })
        };
        all.sort_by_key(|(peer, _)| lot(peer));
        all.truncate(ASKED_MAX);
        all
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all of them together are called in logs and status.
pub const NAME: &str = "strangers near by";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;
    use crate::serve::tls;

    #[tokio::test]
    async fn strangers_are_few_and_forgotten_with_the_network() {
        let identity = Identity::from_seed(&[1; 32]);
        let connector = tls::connector(&identity, ANSWER_TIMEOUT).unwrap();
        let strangers = Strangers::new(connector);
        let hash: StorePathHash = "0123456789abcdfghijklmnpqrsvwxyz".parse().unwrap();
        assert_eq!(strangers.narinfo(hash).await, None);
        let peer = |seed: u8| {
            let identity = Identity::from_seed(&[seed; 32]);
            PeerId::from_public_key(identity.public_key())
        };
        for seed in 0..100 {
            strangers.found(peer(seed), "127.0.0.1:1".parse().unwrap());
        }
        assert_eq!(strangers.known().strangers.len(), STRANGERS_MAX);
        assert_eq!(strangers.drawn(&hash).len(), ASKED_MAX);
        assert_eq!(strangers.drawn(&hash), strangers.drawn(&hash));
        // Nobody listens there.
        assert_eq!(strangers.narinfo(hash).await, None);
        strangers.lost(&peer(0));
        assert_eq!(strangers.known().strangers.len(), STRANGERS_MAX - 1);
        strangers.clear();
        assert!(strangers.drawn(&hash).is_empty());
    }
}
