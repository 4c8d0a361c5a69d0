//! Awaited: a store that may come later, and holds nothing until then.
//!
//! A machine that keeps an anchor may have no Nix, or a disk with Nix on it that is mounted after the start. What is not
//! here yet is absent, not in trouble: others are told of nothing, and of everything once it is there.

use std::sync::Arc;

use futures::future::{self, BoxFuture};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use tokio::sync::{mpsc, watch};

use super::{LocalStore, Nar, PathInfo, StoreError, StoreEvent};

/// Changes waiting for a slow reader; beyond it the watcher waits.
const EVENTS_MAX: usize = 16;

/// The store that comes, if one does; never another after it.
pub type Arrival = watch::Sender<Option<Arc<dyn LocalStore>>>;

/// A store that is empty until it is there.
pub struct Awaited {
    dir: StoreDir,
    store: watch::Receiver<Option<Arc<dyn LocalStore>>>,
}

impl Awaited {
    /// An empty store below `dir`, and how another takes its place. Without the latter it stays empty.
    pub fn new(dir: StoreDir) -> (Awaited, Arrival) {
        let (arrival, store) = watch::channel(None);
        (Awaited { dir, store }, arrival)
    }

    fn store(&self) -> Option<Arc<dyn LocalStore>> {
        self.store.borrow().clone()
    }
}

impl LocalStore for Awaited {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        match self.store() {
            Some(store) => Box::pin(async move { store.path_info(hash).await }),
            None => Box::pin(future::ok(None)),
        }
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        match self.store() {
            Some(store) => Box::pin(async move { store.path_infos(hashes).await }),
            None => Box::pin(future::ok(hashes.iter().map(|_| None).collect())),
        }
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        match self.store() {
            Some(store) => Box::pin(async move { store.nar(info).await }),
            None => Box::pin(future::ok(None)),
        }
    }

    /// What is not here yet is told as changes when it comes: the set is complete without it.
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        if let Some(store) = self.store() {
            return store.watch();
        }
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let watching = Watching {
            store: self.store.clone(),
            sender,
        };
        tokio::spawn(async move {
            // It ends with its reader, or with the store.
            let _ = watching.run().await;
        });
        events
    }
}

struct Watching {
    store: watch::Receiver<Option<Arc<dyn LocalStore>>>,
    sender: mpsc::Sender<StoreEvent>,
}

/// Nobody listens any more, or nothing can be said.
struct Ended;

impl Watching {
    async fn run(mut self) -> Result<(), Ended> {
        self.send(StoreEvent::Complete).await?;
        let mut events = tokio::select! {
            () = self.sender.closed() => return Err(Ended),
            events = Watching::arrival(&mut self.store) => events,
        };
        loop {
            let event = tokio::select! {
                () = self.sender.closed() => return Err(Ended),
                event = events.recv() => event.ok_or(Ended)?,
            };
            if !matches!(event, StoreEvent::Complete) {
                self.send(event).await?;
            }
        }
    }

    /// Waits for the store, for ever if none comes.
    async fn arrival(
        store: &mut watch::Receiver<Option<Arc<dyn LocalStore>>>,
    ) -> mpsc::Receiver<StoreEvent> {
        loop {
            if let Some(store) = &*store.borrow_and_update() {
                return store.watch();
            }
            if store.changed().await.is_err() {
                future::pending::<()>().await;
            }
        }
    }

    async fn send(&self, event: StoreEvent) -> Result<(), Ended> {
        self.sender.send(event).await.map_err(|_| Ended)
    }
}
