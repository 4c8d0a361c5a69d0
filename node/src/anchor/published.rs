//! Published: what the public caches hold, as a store, so that a node beside the anchor shares it with its mesh.
//!
//! Anybody may read a public cache who reaches the anchor, so members may be told of its paths and fetch them. A cache
//! that is not public is not looked at here: nothing of it can be told, not even by how long an answer takes. What a
//! person hides or denies on this node stays out as well ([`SharingRules`]).
//!
//! A path that several public caches hold is told of once, with the signatures of all. NARs are unpacked here, since
//! members read raw bytes from any offset. What changes is read from the catalog's own log of changes, which other
//! processes write to as well.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use granary_protocol::narinfo::{Compression, NarInfo, SIGNATURES_MAX};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::{error, warn};

use super::cache::CacheName;
use super::catalog::{CacheRow, Catalog, CatalogError, StoredNar, cache_row, signed, unsigned};
use super::read::seek_table;
use super::{Anchor, nar_key};
use crate::binary_cache::Unpacked;
use crate::store::shared::SharingRules;
use crate::store::{BATCH_MAX, Kept, LocalStore, Nar, NarError, PathInfo, StoreError, StoreEvent};

/// NARs that members read at once. Each takes a thread and some 3 MiB; beyond it they are told to come again.
const STREAMS_MAX: usize = 32;

/// How often changes are looked for that another process made: `granary cache configure`.
const POLL: Duration = Duration::from_secs(5);

/// Events that wait for the receiver; beyond it the catalog is not read further.
const EVENTS_MAX: usize = 16;

/// The public caches of an anchor, as one store.
pub struct Published {
    anchor: Arc<Anchor>,
    dir: StoreDir,
    rules: Arc<SharingRules>,
    streams: Arc<Semaphore>,
}

/// A path, and which caches hold it.
struct Found {
    info: PathInfo,
    caches: Vec<CacheRow>,
}

impl Published {
    /// Shows paths below `dir` that the rules let out.
    pub fn new(anchor: Arc<Anchor>, dir: StoreDir, rules: Arc<SharingRules>) -> Published {
        Published {
            anchor,
            dir,
            rules,
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        }
    }

    /// The names of the caches for which members are told of a path; that somebody wonders is no use of it.
    pub async fn publishing(&self, hash: StorePathHash) -> Result<Vec<String>, StoreError> {
        let found = self.view().find(vec![hash]).await?.into_iter().flatten();
        let caches = found.flat_map(|found| found.caches);
        Ok(caches.map(|cache| cache.name.to_string()).collect())
    }

    fn view(&self) -> View {
        View {
            catalog: self.anchor.catalog.clone(),
            dir: self.dir.clone(),
            rules: self.rules.clone(),
        }
    }

    /// Looks paths up for somebody who will come for their NARs: they stay.
    async fn relied_on(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> Result<Vec<Option<Found>>, StoreError> {
        assert!(hashes.len() <= BATCH_MAX);
        let mut used = BTreeSet::new();
        for found in self.view().find(hashes.clone()).await?.iter().flatten() {
            let hash = found.info.store_path.hash();
            for cache in &found.caches {
                if self.anchor.note_use(cache.id, hash) {
                    used.insert(hash);
                }
            }
        }
        if used.is_empty() {
            return Ok(hashes.iter().map(|_| None).collect());
        }
        // What went before it was noted is not here after all.
        let found = self.view().find(hashes.clone()).await?;
        let found = hashes.iter().zip(found);
        let noted = found.map(|(hash, found)| found.filter(|_| used.contains(hash)));
        Ok(noted.collect())
    }
}

impl LocalStore for Published {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(async move {
            let found = self.relied_on(vec![hash]).await?.into_iter().next();
            Ok(found.flatten().map(|found| found.info))
        })
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        Box::pin(async move {
            let found = self.relied_on(hashes).await?.into_iter();
            Ok(found.map(|found| Some(found?.info)).collect())
        })
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        Box::pin(async move {
            let hash = info.store_path.hash();
            let found = self.relied_on(vec![hash]).await?.into_iter().next();
            let found = found.flatten();
            let Some(found) = found.filter(|found| found.info.nar_hash == info.nar_hash) else {
                return Ok(None);
            };
            let stored = self.anchor.catalog.nar(info.nar_hash).await;
            let (Some(stored), Some(cache)) =
                (stored.map_err(unreadable)?, found.caches.into_iter().next())
            else {
                return Ok(None);
            };
            let permit = self.streams.clone().try_acquire_owned();
            let kept = KeptNar {
                anchor: self.anchor.clone(),
                stored,
                cache: cache.name,
                _permit: permit.map_err(|_| StoreError::Busy)?,
            };
            Ok(Some(Nar::kept(stored.nar_size, Arc::new(kept))))
        })
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let watching = Watching {
            view: self.view(),
            sender,
            shown: BTreeSet::new(),
            read_to: None,
        };
        tokio::spawn(watching.run());
        events
    }
}

fn unreadable(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Published {
        source: Box::new(error),
    }
}

/// What may be told, as the catalog has it.
#[derive(Clone)]
struct View {
    catalog: Catalog,
    dir: StoreDir,
    rules: Arc<SharingRules>,
}

impl View {
    /// Looks paths up, in the order asked. On a thread of the catalog, since each narinfo is parsed.
    async fn find(&self, hashes: Vec<StorePathHash>) -> Result<Vec<Option<Found>>, StoreError> {
        let view = self.clone();
        let found = self.catalog.read(move |connection| {
            let caches = view.public_caches(connection)?;
            let find = |hash: &StorePathHash| view.find_in(connection, &caches, hash);
            hashes.iter().map(find).collect()
        });
        found.await.map_err(unreadable)
    }

    /// The public caches with this store directory, the one that clients ask first before the others.
    fn public_caches(&self, connection: &Connection) -> rusqlite::Result<Vec<CacheRow>> {
        let mut caches: Vec<CacheRow> = connection
            .prepare_cached("SELECT id, name, settings FROM caches ORDER BY name")?
            .query_map([], cache_row)?
            .collect::<Result<_, _>>()?;
        caches.retain(|cache| {
            let dir = cache.settings.store_dir();
            cache.settings.public && dir.is_ok_and(|dir| dir == self.dir)
        });
        caches.sort_by_key(|cache| cache.settings.priority);
        Ok(caches)
    }

    fn find_in(
        &self,
        connection: &Connection,
        caches: &[CacheRow],
        hash: &StorePathHash,
    ) -> rusqlite::Result<Option<Found>> {
        let mut found: Option<Found> = None;
        for cache in caches {
            let row = connection
                .prepare_cached(
                    "SELECT narinfo, registered FROM paths
                     JOIN nars ON nars.nar_hash = paths.nar_hash
                     WHERE cache = ?1 AND hash = ?2 AND state = 1 AND damaged IS NULL",
                )?
                .query_row(params![cache.id, hash.as_bytes()], |row| {
                    Ok((row.get::<_, String>(0)?, unsigned(row, 1)?))
                })
                .optional()?;
            let Some((narinfo, registered)) = row else {
                continue;
            };
            let narinfo = match NarInfo::parse(&narinfo, &self.dir) {
                Ok(narinfo) => narinfo,
                Err(error) => {
                    error!(cache = %cache.name, %hash, %error, "a narinfo in the catalog is malformed");
                    continue;
                }
            };
            match &mut found {
                None => {
                    found = Some(Found {
                        info: path_info(narinfo, registered),
                        caches: vec![cache.clone()],
                    });
                }
                Some(found) if found.info.nar_hash == narinfo.nar_hash => {
                    found.add_signatures(narinfo);
                    found.caches.push(cache.clone());
                }
                // Another build, of which only the first cache's is told.
                Some(_) => {}
            }
        }
        let is_shared = |found: &Found| {
            let path = &found.info.store_path;
            self.rules.decide_published(path).is_shared()
        };
        Ok(found.filter(is_shared))
    }

    /// Returns every path of a public cache, hidden and damaged ones as well.
    async fn all(&self) -> Result<BTreeSet<StorePathHash>, StoreError> {
        let view = self.clone();
        let caches = self
            .catalog
            .read(move |connection| view.public_caches(connection));
        let mut all = BTreeSet::new();
        for cache in caches.await.map_err(unreadable)? {
            let mut after = None;
            loop {
                let page = self.catalog.hashes_after(cache.id, after, BATCH_MAX).await;
                let page = page.map_err(unreadable)?;
                let Some(last) = page.last() else { break };
                after = Some(*last);
                all.extend(page);
            }
        }
        Ok(all)
    }
}

impl Found {
    fn add_signatures(&mut self, narinfo: NarInfo) {
        let signatures = &mut self.info.signatures;
        for signature in narinfo.signatures {
            if signatures.len() < SIGNATURES_MAX && !signatures.contains(&signature) {
                signatures.push(signature);
            }
        }
    }
}

fn path_info(narinfo: NarInfo, registered: u64) -> PathInfo {
    let since = Duration::from_secs(registered);
    PathInfo {
        store_path: narinfo.store_path,
        nar_hash: narinfo.nar_hash,
        nar_size: narinfo.nar_size,
        references: narinfo.references,
        deriver: narinfo.deriver,
        signatures: narinfo.signatures,
        ca: narinfo.ca,
        // Whoever pushed it built it: here, nobody can vouch for that.
        ultimate: false,
        registration_time: SystemTime::UNIX_EPOCH
            .checked_add(since)
            .unwrap_or(SystemTime::UNIX_EPOCH),
        id: 0,
    }
}

/// A NAR in storage, unpacked while it is read.
struct KeptNar {
    anchor: Arc<Anchor>,
    stored: StoredNar,
    cache: CacheName,
    _permit: OwnedSemaphorePermit,
}

impl Kept for KeptNar {
    fn stream(self: Arc<Self>, range: Range<u64>) -> BoxStream<'static, Result<Bytes, NarError>> {
        let opening = self.clone();
        let opened = stream::once(async move { opening.open(range).await });
        opened
            .map_ok(Unpacked::into_stream)
            .try_flatten()
            .map_err(move |source| NarError::Kept {
                nar: self.stored.nar_hash.to_string(),
                source,
            })
            .boxed()
    }
}

impl KeptNar {
    /// Begins to read with the frame that has the first byte.
    async fn open(&self, range: Range<u64>) -> io::Result<Unpacked> {
        // From the beginning it is one request, without the table.
        let (file, skip) = match range.start {
            0 => (0..self.stored.file_size, 0),
            start => {
                let table = seek_table(&self.anchor, &self.stored).await;
                let table = table.map_err(|refusal| {
                    io::Error::other(refusal.trouble.unwrap_or(refusal.message))
                })?;
                let position = table.locate(start).ok_or(io::ErrorKind::UnexpectedEof)?;
                (position.file, u64::from(position.skip))
            }
        };
        let key = nar_key(&self.stored.nar_hash);
        let packed = self.anchor.storage.read(&key, file).await;
        let packed = packed.map_err(io::Error::other)?;
        let packed = packed.ok_or(io::ErrorKind::NotFound)?;
        let counts = self.anchor.counts.of(&self.cache);
        counts.nars.add(1);
        let packed = packed
            .inspect_ok(move |bytes| counts.nar_sent_bytes.add(bytes.len() as u64))
            .map_err(io::Error::other);
        let length = range.end - range.start;
        let unpacked =
            self.anchor
                .unpackers
                .start(vec![Compression::Zstd], packed, skip, skip + length)?;
        unpacked.ok_or_else(|| io::ErrorKind::ResourceBusy.into())
    }
}

/// Tells what comes and goes.
struct Watching {
    view: View,
    sender: mpsc::Sender<StoreEvent>,
    /// What was told of, and not withdrawn.
    shown: BTreeSet<StorePathHash>,
    /// Number of the last change that was read; `None` when everything has to be looked at.
    read_to: Option<i64>,
}

/// Why there is nothing to tell at the moment, or any more.
enum Silence {
    Unread(StoreError),
    /// Nobody listens any more.
    Unheard,
}

impl From<StoreError> for Silence {
    fn from(error: StoreError) -> Silence {
        Silence::Unread(error)
    }
}

impl Watching {
    async fn run(mut self) {
        let mut commits = self.view.catalog.commits();
        let mut hidden = self.view.rules.hidden.clone();
        let mut is_complete = false;
        let mut is_trouble_told = false;
        // Whoever could hide more may be gone: then nothing is hidden or shown any more.
        let mut may_change = true;
        loop {
            commits.borrow_and_update();
            match self.catch_up().await {
                Ok(()) => is_trouble_told = false,
                Err(Silence::Unheard) => return,
                Err(Silence::Unread(error)) => {
                    if !std::mem::replace(&mut is_trouble_told, true) {
                        warn!(%error, "could not read what to announce, trying again");
                    }
                }
            }
            // Without the catalog there is nothing to serve either; the node's own store need not wait for it.
            if !std::mem::replace(&mut is_complete, true)
                && self.sender.send(StoreEvent::Complete).await.is_err()
            {
                return;
            }
            tokio::select! {
                changed = commits.changed() => if changed.is_err() { return },
                changed = hidden.changed(), if may_change => {
                    may_change = changed.is_ok();
                    self.read_to = None;
                }
                () = tokio::time::sleep(POLL) => {}
                () = self.sender.closed() => return,
            }
        }
    }

    async fn catch_up(&mut self) -> Result<(), Silence> {
        loop {
            let catalog = &self.view.catalog;
            let Some(read_to) = self.read_to else {
                let newest = catalog.newest_change().await.map_err(unreadable)?;
                let mut hashes = self.view.all().await?;
                // What is there no longer is withdrawn.
                hashes.extend(&self.shown);
                let hashes: Vec<_> = hashes.into_iter().collect();
                for batch in hashes.chunks(BATCH_MAX) {
                    self.tell(batch.to_vec()).await?;
                }
                self.read_to = Some(newest);
                continue;
            };
            let changes = catalog.changes_after(read_to, BATCH_MAX).await;
            let changes = changes.map_err(unreadable)?;
            let Some((last, _)) = changes.last() else {
                return Ok(());
            };
            let last = *last;
            let is_gap = changes
                .first()
                .is_some_and(|(first, _)| *first > read_to + 1);
            let hashes: Option<BTreeSet<_>> = changes.into_iter().map(|(_, hash)| hash).collect();
            match hashes.filter(|_| !is_gap) {
                Some(hashes) => {
                    self.tell(hashes.into_iter().collect()).await?;
                    self.read_to = Some(last);
                }
                None => self.read_to = None,
            }
        }
    }

    /// Says what is true of these paths, where something else was said before.
    async fn tell(&mut self, hashes: Vec<StorePathHash>) -> Result<(), Silence> {
        let found = self.view.find(hashes.clone()).await?;
        let mut added = Vec::new();
        let mut removed = Vec::new();
        for (hash, found) in hashes.into_iter().zip(found) {
            match found {
                Some(found) => {
                    if self.shown.insert(hash) {
                        added.push(found.info);
                    }
                }
                None => {
                    if self.shown.remove(&hash) {
                        removed.push(hash);
                    }
                }
            }
        }
        if !removed.is_empty() {
            self.send(StoreEvent::Removed(removed)).await?;
        }
        if !added.is_empty() {
            self.send(StoreEvent::Added(added)).await?;
        }
        Ok(())
    }

    async fn send(&self, event: StoreEvent) -> Result<(), Silence> {
        self.sender.send(event).await.map_err(|_| Silence::Unheard)
    }
}

impl Catalog {
    /// Returns the hashes of complete paths of a cache after `after`, in order, their NARs damaged or not.
    async fn hashes_after(
        &self,
        cache: i64,
        after: Option<StorePathHash>,
        limit: usize,
    ) -> Result<Vec<StorePathHash>, CatalogError> {
        self.read(move |connection| {
            let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
            connection
                .prepare_cached(
                    "SELECT hash FROM paths
                     WHERE cache = ?1 AND state = 1 AND hash > ?2 ORDER BY hash LIMIT ?3",
                )?
                .query_map(params![cache, after, signed(limit as u64)], |row| {
                    Ok(StorePathHash::from_bytes(row.get(0)?))
                })?
                .collect()
        })
        .await
    }

    /// Returns the number of the last change; 0 before the first.
    async fn newest_change(&self) -> Result<i64, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT coalesce(max(number), 0) FROM changes")?
                .query_row([], |row| row.get(0))
        })
        .await
    }

    /// Returns changes after one, with their numbers: of a path, or of the settings of some cache.
    async fn changes_after(
        &self,
        number: i64,
        limit: usize,
    ) -> Result<Vec<(i64, Option<StorePathHash>)>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT number, hash FROM changes WHERE number > ?1 ORDER BY number LIMIT ?2",
                )?
                .query_map(params![number, signed(limit as u64)], |row| {
                    let hash: Option<[u8; 20]> = row.get(1)?;
                    Ok((row.get(0)?, hash.map(StorePathHash::from_bytes)))
                })?
                .collect()
        })
        .await
    }
}
