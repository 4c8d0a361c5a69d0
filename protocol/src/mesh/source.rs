//! Source: whoever may be asked for a narinfo or a NAR, a member of the mesh or a cache outside it.
//!
//! Caches (anchors and upstreams) are numbered by the configuration; the mind knows no more of
//! them than their role. Here is who may be asked for what, where each is, and what tells two equal
//! sources apart, so that lookup and fetch choose alike ([`Lots`]).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::{FetchId, Mesh};
use crate::availability::{AvailabilityIndex, HashPrefix};
use crate::hash::NarHash;
use crate::narinfo::VerifiedNarInfo;
use crate::peer::PeerId;
use crate::store_path::StorePathHash;

/// What a cache outside the mesh is to us. They are asked in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CacheRole {
    /// Keeps what this mesh built; ours.
    Anchor,
    /// Somebody else's, such as cache.nixos.org.
    Upstream,
    /// Nodes of other meshes near by, together.
    Strangers,
}

impl CacheRole {
    pub fn word(self) -> &'static str {
        match self {
            CacheRole::Anchor => "anchor",
            CacheRole::Upstream => "upstream",
            CacheRole::Strangers => "strangers",
        }
    }
}

/// From where a transfer comes.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    Peer {
        peer: PeerId,
        address: SocketAddr,
    },
    /// `narinfo` is as that cache gave it, since its URL and compression are that cache's own.
    Cache {
        cache: usize,
        narinfo: Arc<VerifiedNarInfo>,
    },
}

/// A source by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SourceId {
    Peer(PeerId),
    /// Numbered as in `Config.caches`.
    Cache(usize),
}

/// A source that may be asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) source: SourceId,
    /// Whether it can be asked without being dialled first.
    pub(super) is_linked: bool,
    /// Whether it is on the local network.
    pub(super) is_near: bool,
}

/// Peers considered for one path. In a large mesh hundreds hold what everybody has; a few dozen drawn
/// among them are as good, and cost no more to compare than in a small one.
const CANDIDATES_MAX: usize = 64;

/// Decides between sources that are equally good.
///
/// Every node draws differently and for every path anew (rendezvous hashing), so that equal
/// sources share the load of a mesh in which everybody wants the same closure.
#[derive(Clone, Copy)]
pub(super) struct Lots {
    seed: u64,
}

impl Lots {
    pub(super) fn new(seed: u64) -> Lots {
        Lots { seed }
    }

    /// The lower lot goes first.
    pub(super) fn draw(&self, hash: &StorePathHash, source: &SourceId) -> u64 {
        let mut lot = self.seed;
        for byte in hash.as_bytes() {
            lot = mix(lot ^ u64::from(*byte));
        }
        match source {
            SourceId::Peer(peer) => {
                for byte in peer.as_public_key() {
                    lot = mix(lot ^ u64::from(*byte));
                }
            }
            SourceId::Cache(cache) => lot = mix(lot ^ *cache as u64),
        }
        lot
    }
}

impl Mesh {
    /// The peers that may be asked for a path, in no order.
    pub(super) fn candidates(
        &self,
        index: &dyn AvailabilityIndex,
        hash: &StorePathHash,
        now: Instant,
    ) -> Vec<Candidate> {
        let providers = index.providers(HashPrefix::from(hash)).into_iter();
        let usable =
            providers.filter(|peer| *peer != self.me && self.membership.is_usable(peer, now));
        let candidate = |peer: PeerId| {
            let address = self.membership.address(&peer);
            Candidate {
                source: SourceId::Peer(peer),
                is_linked: self.membership.is_linked(&peer),
                is_near: address.is_some_and(|address| is_local_network(address.ip())),
            }
        };
        let mut candidates: Vec<Candidate> = usable.map(candidate).collect();
        if candidates.len() > CANDIDATES_MAX {
            candidates.sort_by_cached_key(|one| {
                (!one.is_linked, self.lookups.lots().draw(hash, &one.source))
            });
            candidates.truncate(CANDIDATES_MAX);
        }
        candidates
    }

    /// Everyone known to have a NAR: peers that hold the path, and caches in order of preference.
    pub(super) fn sources(
        &self,
        index: &dyn AvailabilityIndex,
        hash: &StorePathHash,
        nar_hash: &NarHash,
        now: Instant,
    ) -> Vec<SourceId> {
        let peers = self.candidates(index, hash, now).into_iter();
        let caches = self.lookups.caches(hash, nar_hash).into_iter();
        peers
            .map(|peer| peer.source)
            .chain(caches.map(|(cache, _)| SourceId::Cache(cache)))
            .collect()
    }

    /// The same for a fetch; `None` when it is over.
    pub(super) fn sources_of(
        &self,
        index: &dyn AvailabilityIndex,
        fetch: FetchId,
        now: Instant,
    ) -> Option<Vec<SourceId>> {
        let (hash, nar_hash) = self.fetches.wanted(fetch)?;
        Some(self.sources(index, &hash, &nar_hash, now))
    }

    /// Where a source is, for the hands.
    pub(super) fn source(&self, fetch: FetchId, source: SourceId) -> Option<Source> {
        match source {
            SourceId::Peer(peer) => {
                let address = self.membership.transfer_address(&peer)?;
                Some(Source::Peer { peer, address })
            }
            SourceId::Cache(cache) => {
                let (hash, nar_hash) = self.fetches.wanted(fetch)?;
                let caches = self.lookups.caches(&hash, &nar_hash);
                let narinfo = caches.into_iter().find(|(known, _)| *known == cache)?.1;
                Some(Source::Cache { cache, narinfo })
            }
        }
    }
}

/// The finaliser of splitmix64: every bit of the input changes half of the output.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Whether an address belongs to a local network by its kind: private, link-local or loopback.
///
/// A neighbour reached over its global IPv6 address counts as far, which costs it a tie.
pub(super) fn is_local_network(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local() || v4.is_loopback(),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_local_network(IpAddr::V4(v4)),
            None => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unique_local(),
        },
    }
}
