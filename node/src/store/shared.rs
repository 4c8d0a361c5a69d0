//! The shared part of a store: what other members may know of and fetch.
//!
//! Everything that faces peers gets this store instead of the real one, so that a path that is not
//! shared cannot be told from one that is not here. The rules are
//! [`granary_protocol::sharing`]'s; this gathers their facts.

use std::sync::Arc;

use futures::future::BoxFuture;
use granary_protocol::sharing::{Facts, Sharing};
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use regex::Regex;
use tokio::sync::mpsc;

use super::{LocalStore, Nar, PathInfo, StoreError, StoreEvent};

/// Changes waiting for a slow reader; beyond it the watcher waits.
const EVENTS_MAX: usize = 16;

/// What decides about sharing, from the configuration.
#[derive(Clone, Debug)]
pub struct SharingRules {
    pub enabled: bool,
    pub deny: Vec<Regex>,
    pub trust: TrustedKeys,
}

impl SharingRules {
    /// Says whether a path is shared, and by which rule.
    pub fn decide(&self, info: &PathInfo, dir: &StoreDir) -> Sharing {
        let fingerprint = info.to_narinfo().fingerprint(dir);
        let denied_by = self
            .deny
            .iter()
            .find(|deny| deny.is_match(info.store_path.name()));
        Sharing::decide(Facts {
            enabled: self.enabled,
            denied_by: denied_by.map(Regex::as_str),
            is_derivation: info.store_path.is_derivation(),
            ultimate: info.ultimate,
            signed_by: self
                .trust
                .verify(fingerprint.as_bytes(), &info.signatures)
                .map(|key| key.name()),
        })
    }
}

/// A store that shows only what is shared.
pub struct SharedStore {
    store: Arc<dyn LocalStore>,
    rules: Arc<SharingRules>,
}

impl SharedStore {
    pub fn new(store: Arc<dyn LocalStore>, rules: Arc<SharingRules>) -> SharedStore {
        SharedStore { store, rules }
    }
}

impl LocalStore for SharedStore {
    fn dir(&self) -> &StoreDir {
        self.store.dir()
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(async move {
            let info = self.store.path_info(hash).await?;
            Ok(info.filter(|info| self.rules.decide(info, self.dir()).is_shared()))
        })
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        Box::pin(async move {
            let mut infos = self.store.path_infos(hashes).await?;
            let (rules, dir) = (self.rules.clone(), self.dir().clone());
            // Some 40 µs each, and a peer asks for hundreds: on the mesh's own thread, its timers
            // would wait.
            let decide = move || {
                let is_shared = |info: &PathInfo| rules.decide(info, &dir).is_shared();
                for info in &mut infos {
                    *info = info.take().filter(is_shared);
                }
                infos
            };
            tokio::task::spawn_blocking(decide)
                .await
                .map_err(|_| StoreError::Stopped)
        })
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        Box::pin(async move {
            match self.rules.decide(info, self.dir()).is_shared() {
                true => self.store.nar(info).await,
                false => Ok(None),
            }
        })
    }

    /// Reports shared paths only. A removal may name a path that was never shared.
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let mut all = self.store.watch();
        let (sender, shared) = mpsc::channel(EVENTS_MAX);
        let (rules, dir) = (self.rules.clone(), self.dir().clone());
        tokio::spawn(async move {
            while let Some(event) = all.recv().await {
                let event = match event {
                    StoreEvent::Added(infos) => {
                        // Verifying signatures of a whole store takes a while; not on the reactor.
                        let (rules, dir) = (rules.clone(), dir.clone());
                        let decide = move || {
                            let is_shared = |info: &PathInfo| rules.decide(info, &dir).is_shared();
                            infos.into_iter().filter(is_shared).collect::<Vec<_>>()
                        };
                        match tokio::task::spawn_blocking(decide).await {
                            Ok(infos) => StoreEvent::Added(infos),
                            Err(_) => return,
                        }
                    }
                    event => event,
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        shared
    }
}
