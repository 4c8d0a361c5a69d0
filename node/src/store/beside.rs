//! Beside: two stores as one, the second for what the first does not hold.
//!
//! A path is there while either holds it. Of two NARs of one path the first store's is told of; that of the second is
//! given to whoever asks for that very one. A store that fails does not hide what the other has.

use std::sync::Arc;

use futures::future::BoxFuture;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use tokio::sync::mpsc;
use tracing::warn;

use super::{BATCH_MAX, LocalStore, Nar, PathInfo, StoreError, StoreEvent};

/// Changes waiting for a slow reader; beyond it both stores' watchers wait.
const EVENTS_MAX: usize = 16;

/// Two stores that spell paths with one directory.
pub struct Beside {
    first: Arc<dyn LocalStore>,
    second: Arc<dyn LocalStore>,
}

impl Beside {
    pub fn new(first: Arc<dyn LocalStore>, second: Arc<dyn LocalStore>) -> Beside {
        Beside { first, second }
    }
}

impl LocalStore for Beside {
    fn dir(&self) -> &StoreDir {
        self.first.dir()
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(async move {
            let first = self.first.path_info(hash).await;
            if let Ok(Some(info)) = first {
                return Ok(Some(info));
            }
            match self.second.path_info(hash).await? {
                Some(info) => Ok(Some(info)),
                None => first,
            }
        })
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        Box::pin(async move {
            let first = self.first.path_infos(hashes.clone()).await;
            let mut infos = match first {
                Ok(infos) => infos,
                Err(error) => {
                    let infos = self.second.path_infos(hashes).await?;
                    // Who is told of nothing shall hear why.
                    return match infos.iter().any(Option::is_some) {
                        true => Ok(infos),
                        false => Err(error),
                    };
                }
            };
            let places = infos.iter_mut().zip(hashes);
            let (places, missing): (Vec<_>, Vec<_>) =
                places.filter(|(info, _)| info.is_none()).unzip();
            if !missing.is_empty() {
                match self.second.path_infos(missing).await {
                    Ok(found) => {
                        for (place, found) in places.into_iter().zip(found) {
                            *place = found;
                        }
                    }
                    Err(error) => warn!(%error, "could not ask the second of two stores"),
                }
            }
            Ok(infos)
        })
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        Box::pin(async move {
            let first = self.first.path_info(info.store_path.hash()).await;
            let is_first = matches!(&first, Ok(Some(known)) if known.nar_hash == info.nar_hash);
            let nar = match is_first {
                true => self.first.nar(info).await,
                false => Ok(None),
            };
            match nar {
                Ok(Some(nar)) => Ok(Some(nar)),
                gone => match self.second.nar(info).await? {
                    Some(nar) => Ok(Some(nar)),
                    None => gone,
                },
            }
        })
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (sender, both) = mpsc::channel(EVENTS_MAX);
        let watching = Watching {
            first: self.first.clone(),
            second: self.second.clone(),
            incomplete: 2,
            sender,
        };
        let (first, second) = (self.first.watch(), self.second.watch());
        tokio::spawn(async move {
            // It ends with its reader, or with a store.
            let _ = watching.run(first, second).await;
        });
        both
    }
}

/// Makes one story of what happens to two stores.
struct Watching {
    first: Arc<dyn LocalStore>,
    second: Arc<dyn LocalStore>,
    /// Stores of which not everything was told yet.
    incomplete: u8,
    sender: mpsc::Sender<StoreEvent>,
}

/// Nobody listens any more, or nothing can be said.
struct Ended;

impl Watching {
    async fn run(
        mut self,
        mut first: mpsc::Receiver<StoreEvent>,
        mut second: mpsc::Receiver<StoreEvent>,
    ) -> Result<(), Ended> {
        loop {
            let (event, other) = tokio::select! {
                event = first.recv() => (event, self.second.clone()),
                event = second.recv() => (event, self.first.clone()),
            };
            match event.ok_or(Ended)? {
                StoreEvent::Added(infos) => self.send(StoreEvent::Added(infos)).await?,
                StoreEvent::Removed(gone) => self.removed(gone, other).await?,
                StoreEvent::Complete => {
                    self.incomplete -= 1;
                    if self.incomplete == 0 {
                        self.send(StoreEvent::Complete).await?;
                    }
                }
            }
        }
    }

    /// What the other store holds is still there. Each removal is looked at after it happened, so of two that meet
    /// the later one is told.
    async fn removed(
        &self,
        gone: Vec<StorePathHash>,
        other: Arc<dyn LocalStore>,
    ) -> Result<(), Ended> {
        for gone in gone.chunks(BATCH_MAX) {
            let mut gone = gone.to_vec();
            match other.path_infos(gone.clone()).await {
                Ok(held) => {
                    let mut held = held.iter();
                    gone.retain(|_| held.next().is_some_and(Option::is_none));
                }
                // A withdrawal too many costs a lookup, one too few a failed transfer.
                Err(error) => {
                    warn!(%error, "could not ask whether the other of two stores holds what went")
                }
            }
            if !gone.is_empty() {
                self.send(StoreEvent::Removed(gone)).await?;
            }
        }
        Ok(())
    }

    async fn send(&self, event: StoreEvent) -> Result<(), Ended> {
        self.sender.send(event).await.map_err(|_| Ended)
    }
}
