//! Progress: how far a push has come, for a bar or a status page. Counted by whoever sends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use granary_protocol::store_path::StorePath;
use serde::{Deserialize, Serialize};

/// Counts of one push, or of all that a node makes.
#[derive(Debug, Default)]
pub struct Progress {
    planned: Mutex<Plan>,
    paths_done: AtomicU64,
    bytes_done: AtomicU64,
    current: Mutex<BTreeMap<StorePath, Arc<Sent>>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Plan {
    paths: u64,
    nar_bytes: u64,
}

/// One NAR that is being sent.
#[derive(Debug)]
struct Sent {
    bytes: AtomicU64,
    of: u64,
}

/// How far it has come at one moment. Bytes are of uncompressed NARs.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    pub paths: u64,
    pub paths_done: u64,
    pub nar_bytes: u64,
    /// Those of the NARs under way among them.
    pub nar_bytes_done: u64,
    pub current: Vec<UnderWay>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderWay {
    /// Base name of the store path.
    pub path: String,
    pub bytes: u64,
    pub nar_size: u64,
}

/// The place of one NAR in a [`Progress`]; leaves it when dropped.
pub struct Place<'a> {
    progress: &'a Progress,
    path: StorePath,
    sent: Arc<Sent>,
}

/// Counts bytes of one NAR as they are read.
#[derive(Clone)]
pub struct Meter(Arc<Sent>);

impl Progress {
    /// Adds to what is to be done.
    pub fn plan(&self, paths: u64, nar_bytes: u64) {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        planned.paths += paths;
        planned.nar_bytes += nar_bytes;
    }

    /// Takes a place for a NAR of this size.
    pub fn begin(&self, path: &StorePath, nar_size: u64) -> Place<'_> {
        let sent = Arc::new(Sent {
            bytes: AtomicU64::new(0),
            of: nar_size,
        });
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.insert(path.clone(), sent.clone());
        Place {
            progress: self,
            path: path.clone(),
            sent,
        }
    }

    pub fn stage(&self) -> Stage {
        let planned = *self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = |(path, sent): (&StorePath, &Arc<Sent>)| UnderWay {
            path: path.base_name(),
            bytes: sent.bytes.load(Ordering::Relaxed),
            nar_size: sent.of,
        };
        let current: Vec<_> = {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.iter().map(under_way).collect()
        };
        let sending: u64 = current.iter().map(|one| one.bytes).sum();
        Stage {
            paths: planned.paths,
            paths_done: self.paths_done.load(Ordering::Relaxed),
            nar_bytes: planned.nar_bytes,
            nar_bytes_done: self.bytes_done.load(Ordering::Relaxed) + sending,
            current,
        }
    }
}

impl Place<'_> {
    /// Says from which byte on the NAR is sent next.
    pub fn at(&self, offset: u64) {
        self.sent.bytes.store(offset, Ordering::Relaxed);
    }

    pub fn meter(&self) -> Meter {
        Meter(self.sent.clone())
    }

    /// The NAR is where it should be.
    pub fn done(self) {
        self.progress.paths_done.fetch_add(1, Ordering::Relaxed);
        let of = self.sent.of;
        self.progress.bytes_done.fetch_add(of, Ordering::Relaxed);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let current = self.progress.current.lock();
        let mut current = current.unwrap_or_else(PoisonError::into_inner);
        current.remove(&self.path);
    }
}

impl Meter {
    pub fn add(&self, bytes: u64) {
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nar_under_way_counts_from_where_it_goes_on() {
        let progress = Progress::default();
        progress.plan(2, 300);
        let path = StorePath::from_base_name("00000000000000000000000000000000-a").unwrap();
        let place = progress.begin(&path, 200);
        place.meter().add(150);
        place.at(100);
        place.meter().add(20);
        let stage = progress.stage();
        assert_eq!((stage.paths_done, stage.nar_bytes_done), (0, 120));
        assert_eq!(stage.current[0].bytes, 120);
        place.done();
        let stage = progress.stage();
        assert_eq!((stage.paths_done, stage.nar_bytes_done), (1, 200));
        assert!(stage.current.is_empty());
    }
}
