//! Activity: what this node does for Nix at the moment, and what it did last, for whoever looks at it.
//!
//! The substituter writes, the status reads. Nothing is decided by it, nothing of it is kept beyond
//! the process, and both lists are bounded: the oldest lookup makes room, and a transfer leaves when
//! its [`Transfer`] is dropped, whatever ended it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use granary_protocol::peer::PeerId;
use granary_protocol::store_path::StorePathHash;
use serde::{Deserialize, Serialize};

/// Lookups remembered: what a person reads through. Nix asks hundreds in a second.
const LOOKUPS_MAX: usize = 30;

/// Transfers shown at once; Nix fetches 16 at a time. More are under way, but not shown.
const TRANSFERS_MAX: usize = 64;

/// Everything that is under way or was a moment ago.
#[derive(Default)]
pub struct Activity {
    lookups: Mutex<VecDeque<(Instant, LookupView)>>,
    transfers: Arc<Mutex<Transfers>>,
}

#[derive(Default)]
struct Transfers {
    next: u64,
    running: BTreeMap<u64, (Instant, TransferView)>,
}

/// A NAR that comes from the mesh or a cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferView {
    /// Name of the store path, with its hash.
    pub path: String,
    /// Bytes of the NAR that are here.
    pub bytes: u64,
    pub nar_size: u64,
    /// The peer that sends the rest; `None` for an anchor or upstream, and before the first byte.
    pub peer_id: Option<String>,
    pub seconds: u64,
}

/// A narinfo that Nix asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookupView {
    pub hash: String,
    /// Name of the store path with its hash, where it was found.
    pub path: Option<String>,
    /// `local`, `peer`, `anchor`, `upstream` or `nowhere`.
    pub source: String,
    /// How long the answer took.
    pub microseconds: u64,
    pub seconds_ago: u64,
}

/// The place of one running transfer, until it is dropped.
pub struct Transfer {
    number: Option<u64>,
    transfers: Arc<Mutex<Transfers>>,
}

impl Activity {
    /// Remembers the answer to a question for a narinfo.
    pub fn looked_up(
        &self,
        hash: StorePathHash,
        path: Option<String>,
        source: &'static str,
        took: Duration,
    ) {
        let view = LookupView {
            hash: hash.to_string(),
            path,
            source: source.to_owned(),
            microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            seconds_ago: 0,
        };
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        if lookups.len() == LOOKUPS_MAX {
            lookups.pop_front();
        }
        lookups.push_back((Instant::now(), view));
    }

    /// Shows a transfer until the returned value is dropped.
    pub fn begin(&self, path: String, nar_size: u64) -> Transfer {
        let mut transfers = self
            .transfers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let number = (transfers.running.len() < TRANSFERS_MAX).then_some(transfers.next);
        transfers.next += 1;
        if let Some(number) = number {
            let view = TransferView {
                path,
                bytes: 0,
                nar_size,
                peer_id: None,
                seconds: 0,
            };
            transfers.running.insert(number, (Instant::now(), view));
        }
        Transfer {
            number,
            transfers: self.transfers.clone(),
        }
    }

    /// The last lookups, newest first.
    pub fn lookups(&self) -> Vec<LookupView> {
        let lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        let view = |(at, view): &(Instant, LookupView)| LookupView {
            seconds_ago: at.elapsed().as_secs(),
            ..view.clone()
        };
        lookups.iter().rev().map(view).collect()
    }

    /// Transfers under way, oldest first.
    pub fn transfers(&self) -> Vec<TransferView> {
        let transfers = self
            .transfers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let view = |(since, view): &(Instant, TransferView)| TransferView {
            seconds: since.elapsed().as_secs(),
            ..view.clone()
        };
        transfers.running.values().map(view).collect()
    }
}

impl Transfer {
    /// Says how far the NAR has come, and who sends it.
    pub fn progress(&self, bytes: u64, peer: Option<PeerId>) {
        let Some(number) = self.number else { return };
        let mut transfers = self
            .transfers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, view)) = transfers.running.get_mut(&number) {
            view.bytes = bytes;
            view.peer_id = peer.map(|peer| peer.to_string());
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let mut transfers = self
                .transfers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            transfers.running.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_is_shown_until_it_is_dropped() {
        let activity = Activity::default();
        let transfer = activity.begin("x-hello".into(), 100);
        transfer.progress(40, None);
        let shown = activity.transfers();
        assert_eq!((shown[0].bytes, shown[0].nar_size), (40, 100));
        drop(transfer);
        assert!(activity.transfers().is_empty());
    }

    #[test]
    fn both_lists_are_bounded_and_the_newest_lookup_stands_first() {
        let activity = Activity::default();
        let hashes: Vec<StorePathHash> = ["0", "1"]
            .iter()
            .map(|digit| digit.repeat(32).parse().unwrap())
            .collect();
        for _ in 0..LOOKUPS_MAX {
            activity.looked_up(hashes[0], None, "nowhere", Duration::ZERO);
        }
        activity.looked_up(hashes[1], None, "peer", Duration::from_millis(3));
        let lookups = activity.lookups();
        assert_eq!(lookups.len(), LOOKUPS_MAX);
        assert_eq!(
            (&lookups[0].source[..], lookups[0].microseconds),
            ("peer", 3000)
        );
        let transfers: Vec<_> = (0..TRANSFERS_MAX + 5)
            .map(|_| activity.begin("x".into(), 1))
            .collect();
        assert_eq!(activity.transfers().len(), TRANSFERS_MAX);
        drop(transfers);
        assert!(activity.transfers().is_empty());
    }
}
