//! MemoryStore: the twin of the real store, for tests.
//!
//! Paths are added and removed by the test; NARs come from [`Tree`]s through the same layout and
//! the same chunks as those of real files.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::UNIX_EPOCH,
};

use futures::future::{self, BoxFuture};
use granary_protocol::{
    hash::{NarHasher, compress_hash, sha256},
    nar::{FileIndex, Layout, LayoutError, Tree},
    store_path::{StoreDir, StorePath, StorePathError, StorePathHash},
};
use tokio::sync::mpsc;

use super::{
    BATCH_MAX, LocalStore, Nar, NarError, PathInfo, StoreError, StoreEvent,
    nar::{Contents, Patience, Progress, ReadContents},
};

/// Events that a watcher may leave unread: more than any test makes.
const EVENTS_MAX: usize = 4096;

/// A store in memory.
pub struct MemoryStore {
    dir: StoreDir,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    paths: BTreeMap<StorePathHash, (PathInfo, Arc<Held>)>,
    watchers: Vec<mpsc::Sender<StoreEvent>>,
    id: i64,
}

impl MemoryStore {
    pub fn new(dir: StoreDir) -> MemoryStore {
        MemoryStore {
            dir,
            state: Mutex::default(),
        }
    }

    /// Adds a tree under a name, as if built here; its hash part follows from both.
    ///
    /// # Errors
    /// When no NAR can hold the tree.
    /// # Panics
    /// When `name` is not one of a store path.
    pub fn add(&self, name: &str, tree: Tree) -> Result<PathInfo, LayoutError> {
        let nar = tree.nar()?;
        let mut hasher = NarHasher::new();
        hasher.update(&nar);
        let made_of = [name.as_bytes(), b"\0", &nar].concat();
        let hash = StorePathHash::from_bytes(compress_hash(&sha256(&made_of)));
        let store_path: Result<StorePath, StorePathError> = StorePath::new(hash, name);
        let info = PathInfo {
            store_path: store_path.expect("a store path's name"),
            nar_hash: hasher.finish(),
            nar_size: nar.len() as u64,
            references: BTreeSet::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
            registration_time: UNIX_EPOCH,
            id: 0,
        };
        self.insert(info, tree)
    }

    /// Adds a path with all that is to be known about it, and returns it with its new id.
    ///
    /// `nar_size` and `nar_hash` are believed, so that a test can make a corrupt path.
    pub fn insert(&self, info: PathInfo, tree: Tree) -> Result<PathInfo, LayoutError> {
        let layout = Arc::new(tree.layout()?);
        let mut state = self.state();
        state.id += 1;
        let info = PathInfo {
            id: state.id,
            ..info
        };
        let held = Arc::new(Held { layout, tree });
        state
            .paths
            .insert(info.store_path.hash(), (info.clone(), held));
        state.tell(StoreEvent::Added(vec![info.clone()]));
        Ok(info)
    }

    /// Removes a path; open NARs of it can be read to their end.
    pub fn remove(&self, hash: StorePathHash) {
        let mut state = self.state();
        if state.paths.remove(&hash).is_some() {
            state.tell(StoreEvent::Removed(vec![hash]));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|error| error.into_inner())
    }
}

impl State {
    fn info(&self, hash: &StorePathHash) -> Option<PathInfo> {
        self.paths.get(hash).map(|(info, _)| info.clone())
    }

    fn tell(&mut self, event: StoreEvent) {
        self.watchers
            .retain(|watcher| watcher.try_send(event.clone()).is_ok());
    }
}

impl LocalStore for MemoryStore {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(future::ready(Ok(self.state().info(&hash))))
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        assert!(hashes.len() <= BATCH_MAX);
        let state = self.state();
        let infos = hashes.iter().map(|hash| state.info(hash)).collect();
        Box::pin(future::ready(Ok(infos)))
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        let state = self.state();
        let result = match state.paths.get(&info.store_path.hash()) {
            Some((row, held)) if row.nar_hash == info.nar_hash => {
                match held.layout.nar_size() == row.nar_size {
                    true => Ok(Some(Nar::new(held.layout.clone(), held.clone()))),
                    false => Err(StoreError::Corrupt {
                        path: row.store_path.base_name(),
                        found: held.layout.nar_size(),
                        registered: row.nar_size,
                    }),
                }
            }
            _ => Ok(None),
        };
        Box::pin(future::ready(result))
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let mut state = self.state();
        let infos = state.paths.values().map(|(info, _)| info.clone()).collect();
        let first = [StoreEvent::Added(infos), StoreEvent::Complete];
        for event in first {
            // The channel was made above and has room.
            let _ = events.try_send(event);
        }
        state.watchers.push(events);
        receiver
    }
}

/// One path's contents.
struct Held {
    layout: Arc<Layout>,
    tree: Tree,
}

impl Contents for Held {
    fn reader(self: Arc<Self>) -> Box<dyn ReadContents> {
        Box::new(self)
    }
}

impl ReadContents for Arc<Held> {
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
        _: Patience,
    ) -> Result<Progress, NarError> {
        let contents = self.tree.contents(layout, file);
        let offset = offset as usize;
        chunk.extend_from_slice(&contents[offset..offset + length]);
        Ok(Progress::Read)
    }
}
