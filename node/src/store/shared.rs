//! The shared part of a store: what others may know of and fetch, members and machines of the LAN.
//!
//! Everything that faces others gets this store instead of the real one, so that a path that is not
//! shared cannot be told from one that is not here. The rules are
//! [`granary_protocol::sharing`]'s; this gathers their facts.

use std::sync::Arc;

use futures::future::BoxFuture;
use granary_protocol::narinfo::SIGNATURES_MAX;
use granary_protocol::sharing::{Facts, Sharing};
use granary_protocol::signature::{SecretKey, Signature, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use granary_protocol::voucher::Voucher;
use regex::Regex;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use super::hidden::Hidden;
use super::{BATCH_MAX, LocalStore, Nar, PathInfo, StoreError, StoreEvent};

/// Changes waiting for a slow reader; beyond it the watcher waits.
const EVENTS_MAX: usize = 16;

/// What decides about sharing: the configuration, and what a person hides meanwhile.
#[derive(Clone, Debug)]
pub struct SharingRules {
    pub enabled: bool,
    pub deny: Vec<Regex>,
    pub trust: TrustedKeys,
    /// Changes take effect at once: on what is announced, and on every answer that begins after.
    pub hidden: watch::Receiver<Arc<Hidden>>,
}

impl SharingRules {
    pub fn is_hidden(&self, hash: &StorePathHash) -> bool {
        self.hidden.borrow().contains(hash)
    }

    /// Says whether a path is shared, and by which rule.
    pub fn decide(&self, info: &PathInfo, dir: &StoreDir) -> Sharing {
        let fingerprint = info.to_narinfo().fingerprint(dir);
        let denied_by = self
            .deny
            .iter()
            .find(|deny| deny.is_match(info.store_path.name()));
        Sharing::decide(Facts {
            enabled: self.enabled,
            is_hidden: self.is_hidden(&info.store_path.hash()),
            denied_by: denied_by.map(Regex::as_str),
            is_derivation: info.store_path.is_derivation(),
            ultimate: info.ultimate,
            signed_by: self
                .trust
                .verify(fingerprint.as_bytes(), &info.signatures)
                .map(|key| key.name()),
            is_published: false,
        })
    }

    /// The same for a path that a public cache of the anchor beside this node holds.
    pub fn decide_published(&self, store_path: &StorePath) -> Sharing {
        let denied_by = self
            .deny
            .iter()
            .find(|deny| deny.is_match(store_path.name()));
        Sharing::decide(Facts {
            enabled: self.enabled,
            is_hidden: self.is_hidden(&store_path.hash()),
            denied_by: denied_by.map(Regex::as_str),
            is_derivation: store_path.is_derivation(),
            ultimate: false,
            signed_by: None,
            is_published: true,
        })
    }

    /// What these readers are told of a path; `None` when it is not shared with them.
    ///
    /// Without the signatures that are meant for this machine alone.
    fn shown(&self, mut info: PathInfo, dir: &StoreDir, readers: &Readers) -> Option<PathInfo> {
        if !self.decide(&info, dir).is_shared() {
            return None;
        }
        info.drop_own_signatures();
        if let Readers::Strangers = readers {
            self.leave_what_is_public(&mut info, dir);
        }
        let fingerprint = || info.to_narinfo().fingerprint(dir);
        let signature = match readers {
            Readers::Members(voucher) if info.ultimate => Some(voucher.sign(&fingerprint())),
            Readers::Lan(Some(key)) => Some(key.sign(fingerprint().as_bytes())),
            Readers::Members(_) | Readers::Lan(None) | Readers::Strangers => None,
        };
        if let Some(signature) = signature
            && info.signatures.len() < SIGNATURES_MAX
            && !info.signatures.contains(&signature)
        {
            info.signatures.push(signature);
        }
        readers.may_have(&info).then_some(info)
    }

    /// Takes out what says more than a public cache does: who else signed the path, and what it was made from.
    fn leave_what_is_public(&self, info: &mut PathInfo, dir: &StoreDir) {
        let fingerprint = info.to_narinfo().fingerprint(dir);
        let is_trusted = |signature: &Signature| {
            let signature = std::slice::from_ref(signature);
            let key = self.trust.verify(fingerprint.as_bytes(), signature);
            key.is_some()
        };
        info.signatures.retain(is_trusted);
        info.deriver = None;
        info.ultimate = false;
    }
}

/// Who reads, and so what is said of a path beside the signatures that it has.
pub enum Readers {
    /// Other members, to whom this node vouches for what it built, in its own name, whether they let it count or not.
    Members(Voucher),
    /// Machines without a node, who know keys alone. What they are given is signed by this key; without it they
    /// are given what they can prove all the same.
    Lan(Option<SecretKey>),
    /// Nodes of other meshes, of a store whose rules trust public keys alone: what one of these signed, with no
    /// other word.
    Strangers,
}

impl Readers {
    /// Whether these readers could prove a shared path.
    fn may_have(&self, info: &PathInfo) -> bool {
        match self {
            Readers::Members(_) | Readers::Lan(Some(_)) => true,
            Readers::Lan(None) => info.ca.is_some() || !info.signatures.is_empty(),
            // Of those in what `shown` leaves, each is by a public key. What a store names beside them it says itself.
            Readers::Strangers => !info.ultimate && !info.signatures.is_empty(),
        }
    }
}

/// A store that shows only what is shared.
pub struct SharedStore {
    store: Arc<dyn LocalStore>,
    rules: Arc<SharingRules>,
    readers: Arc<Readers>,
}

impl SharedStore {
    pub fn new(
        store: Arc<dyn LocalStore>,
        rules: Arc<SharingRules>,
        readers: Readers,
    ) -> SharedStore {
        SharedStore {
            store,
            rules,
            readers: Arc::new(readers),
        }
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
            Ok(info.and_then(|info| self.rules.shown(info, self.dir(), &self.readers)))
        })
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        Box::pin(async move {
            let mut infos = self.store.path_infos(hashes).await?;
            let (rules, dir) = (self.rules.clone(), self.dir().clone());
            let readers = self.readers.clone();
            // Some 40 µs each, and a peer asks for hundreds: on the mesh's own thread, its timers
            // would wait.
            let decide = move || {
                for info in &mut infos {
                    *info = info
                        .take()
                        .and_then(|info| rules.shown(info, &dir, &readers));
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
            let is_shared = self.rules.decide(info, self.dir()).is_shared();
            match is_shared && self.readers.may_have(info) {
                true => self.store.nar(info).await,
                false => Ok(None),
            }
        })
    }

    /// Reports shared paths only. A removal may name a path that was never shared.
    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (sender, shared) = mpsc::channel(EVENTS_MAX);
        let watching = Watching {
            store: self.store.clone(),
            rules: self.rules.clone(),
            sender,
        };
        let all = self.store.watch();
        tokio::spawn(async move {
            // It ends with its reader, or with the store.
            let _ = watching.run(all).await;
        });
        shared
    }
}

/// Turns what happens to the store and to what is hidden into changes of what is shared.
struct Watching {
    store: Arc<dyn LocalStore>,
    rules: Arc<SharingRules>,
    sender: mpsc::Sender<StoreEvent>,
}

/// Nobody listens any more, or nothing can be said.
struct Ended;

impl Watching {
    async fn run(self, mut all: mpsc::Receiver<StoreEvent>) -> Result<(), Ended> {
        let mut changes = self.rules.hidden.clone();
        let mut hidden = changes.borrow_and_update().clone();
        // Whoever could hide more may be gone: then nothing is hidden or shown any more.
        let mut may_change = true;
        loop {
            tokio::select! {
                event = all.recv() => match event.ok_or(Ended)? {
                    StoreEvent::Added(infos) => self.added(infos).await?,
                    event => self.send(event).await?,
                },
                changed = changes.changed(), if may_change => {
                    may_change = changed.is_ok();
                    let before = std::mem::replace(&mut hidden, changes.borrow_and_update().clone());
                    self.hidden_changed(&before, &hidden).await?;
                }
            }
        }
    }

    async fn added(&self, infos: Vec<PathInfo>) -> Result<(), Ended> {
        // Verifying signatures of a whole store takes a while; not on the reactor.
        let (rules, dir) = (self.rules.clone(), self.store.dir().clone());
        let decide = move || {
            let is_shared = |info: &PathInfo| rules.decide(info, &dir).is_shared();
            infos.into_iter().filter(is_shared).collect::<Vec<_>>()
        };
        let shared = tokio::task::spawn_blocking(decide).await;
        self.send(StoreEvent::Added(shared.map_err(|_| Ended)?))
            .await
    }

    async fn hidden_changed(&self, before: &Hidden, after: &Hidden) -> Result<(), Ended> {
        let gone: Vec<_> = after.without(before).collect();
        for gone in gone.chunks(BATCH_MAX) {
            self.send(StoreEvent::Removed(gone.to_vec())).await?;
        }
        let shown: Vec<_> = before.without(after).collect();
        for shown in shown.chunks(BATCH_MAX) {
            match self.store.path_infos(shown.to_vec()).await {
                Ok(infos) => self.added(infos.into_iter().flatten().collect()).await?,
                // The path is served all the same to whoever asks; it is announced after a restart.
                Err(error) => warn!(%error, "could not announce paths that are shown again"),
            }
        }
        Ok(())
    }

    async fn send(&self, event: StoreEvent) -> Result<(), Ended> {
        self.sender.send(event).await.map_err(|_| Ended)
    }
}
