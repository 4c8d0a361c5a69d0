//! Import: takes over what an atticd kept, so that its clients need a new address and nothing else.
//!
//! Caches come with their names, settings and signing keys, paths with everything that was said about them.
//! Each NAR is put together from its chunks, read by the strict decoder, hashed and packed like any that is pushed,
//! references first; what does not prove right is left out and told. What is here is skipped, so an import that was
//! interrupted, or left something out, is simply run again. It is for an anchor that does not run: the locks that
//! order pushes and collections live in one process.
//!
//! [`source`] reads what atticd wrote; nothing there is changed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{self, StreamExt};
use granary_protocol::narinfo::NarInfo;
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::StorePathHash;
use serde::Serialize;
use tracing::{info, warn};

use super::Anchor;
use super::admin::{AdminError, Changes};
use super::cache::{CacheName, SettingsError};
use super::catalog::{CacheRow, CatalogError};
use super::ingest::IngestError;
use super::intake::{Intake, IntakeError};

pub mod source;

use source::{Attic, Cache, Chunk, ChunkBody, ChunkError, Found, Listed, SourceError};

/// Paths that are taken over at once: enough for some cores, and to hide the round trips of storage.
const PATHS_PARALLEL: usize = 4;

/// Chunks of one NAR that are asked for ahead. atticd makes them 64 KiB large on the average, so that a
/// request to S3 costs more than its bytes.
const CHUNKS_AHEAD: usize = 16;

/// Things left out that are told one by one; the others are counted.
const LEFT_OUT_SHOWN: usize = 1000;

/// What an import came to.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Imported {
    pub caches: Vec<ImportedCache>,
    /// Paths that are here since this run, and those that were here before.
    pub paths: u64,
    pub present: u64,
    /// Bytes of the NARs that this run read, unpacked.
    pub nar_bytes: u64,
    pub left_out: u64,
    /// At most [`LEFT_OUT_SHOWN`] of them, with reasons.
    pub reasons: Vec<LeftOut>,
}

/// A cache that was taken over.
#[derive(Debug, Clone, Serialize)]
pub struct ImportedCache {
    pub name: String,
    pub public_key: String,
    /// How many paths it had there.
    pub paths: u64,
    pub is_new: bool,
    /// Whether its paths were kept for as long as the server was configured to, which its database does not say.
    pub has_default_retention: bool,
}

/// Something that was not taken over.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    pub cache: String,
    /// `None` for the whole cache.
    pub path: Option<String>,
    pub reason: String,
}

/// Why an import ends early. Run again, it goes on.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Ingest(#[from] IngestError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

/// How far an import has come.
#[derive(Debug, Default)]
pub struct Progress {
    pub paths: AtomicU64,
    pub paths_done: AtomicU64,
    pub nar_bytes: AtomicU64,
}

/// Why one path is not taken over.
#[derive(Debug, thiserror::Error)]
enum PathError {
    #[error("its nar never came in whole")]
    NoNar,
    #[error("{0}")]
    Claims(String),
    #[error("its nar has {found} chunks, {promised} were promised")]
    Chunks { found: usize, promised: usize },
    #[error("nars of more than {max} bytes are not taken")]
    TooLarge { max: u64 },
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    #[error(transparent)]
    Ingest(#[from] IngestError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<IntakeError> for PathError {
    fn from(error: IntakeError) -> PathError {
        PathError::Ingest(error.into())
    }
}

/// Takes over the caches of an atticd, or those that are named.
pub async fn attic(
    anchor: &Arc<Anchor>,
    attic: &Attic,
    only: &[CacheName],
    progress: &Progress,
) -> Result<Imported, ImportError> {
    let import = Import {
        anchor,
        attic,
        progress,
        imported: Mutex::default(),
    };
    for cache in attic.caches().await? {
        if only.is_empty() || only.iter().any(|name| name.as_str() == cache.name) {
            import.cache(cache).await?;
        }
    }
    Ok(import
        .imported
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

struct Import<'a> {
    anchor: &'a Arc<Anchor>,
    attic: &'a Attic,
    progress: &'a Progress,
    imported: Mutex<Imported>,
}

impl Import<'_> {
    async fn cache(&self, cache: Cache) -> Result<(), ImportError> {
        let (id, name) = (cache.id, cache.name.clone());
        let has_default_retention = cache.retention.is_none();
        let (row, is_new) = match self.settle(cache).await? {
            Ok(settled) => settled,
            Err(reason) => {
                self.leave_out(&name, None, reason);
                return Ok(());
            }
        };
        let listing = self.attic.paths(id).await?;
        let paths = (listing.paths.len() + listing.malformed.len()) as u64;
        for path in listing.malformed {
            let reason = "its row in the database is malformed".to_owned();
            self.leave_out(&name, Some(path), reason);
        }
        self.progress.paths.fetch_add(paths, Ordering::Relaxed);
        self.note(|imported| {
            imported.caches.push(ImportedCache {
                name,
                public_key: row
                    .settings
                    .public_keys
                    .first()
                    .cloned()
                    .unwrap_or_default(),
                paths,
                is_new,
                has_default_retention,
            });
        });
        for layer in layers(listing.paths) {
            let mut taking = stream::iter(layer)
                .map(|listed| self.path(&row, listed))
                .buffer_unordered(PATHS_PARALLEL);
            while let Some(taken) = taking.next().await {
                taken?;
            }
        }
        Ok(())
    }

    /// Has the anchor hold a cache of this name that signs with its key; tells whether it is new, or why it cannot.
    async fn settle(&self, cache: Cache) -> Result<Result<(CacheRow, bool), String>, ImportError> {
        let name = match CacheName::new(&cache.name) {
            Ok(name) => name,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let key: SecretKey = match cache.keypair.trim().parse() {
            Ok(key) => key,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let upstream_keys = match serde_json::from_str(&cache.upstream_keys) {
            Ok(names) => names,
            Err(error) => return Ok(Err(format!("its upstream keys are malformed: {error}"))),
        };
        let changes = Changes {
            public: Some(cache.is_public),
            priority: Some(cache.priority),
            store_dir: Some(cache.store_dir),
            upstream_keys: Some(upstream_keys),
            retention: Some(cache.retention.filter(|seconds| *seconds > 0)),
            ..Changes::default()
        };
        let public_key = key.public_key().to_string();
        let settled = match self.anchor.catalog.cache(&name).await? {
            None => {
                let created = self.anchor.create_cache(&name, &changes, Some(key)).await;
                created.map(|row| (row, true))
            }
            Some(row) if row.settings.public_keys.contains(&public_key) => Ok((row, false)),
            Some(row) if self.anchor.catalog.totals(Some(row.id)).await?.paths == 0 => {
                // As the anchor makes one at its first start. Nobody has anything that its own key signed.
                self.take_place(&name, &changes, key).await
            }
            // One that is in use gets a key more, as in a rotation.
            Some(_) => {
                let rotated = self.anchor.rotate_key(&name, Some(key), false).await;
                rotated.map(|row| (row, false))
            }
        };
        match settled {
            Ok(settled) => {
                info!(cache = %name, key = public_key, is_new = settled.1, "took over a cache");
                Ok(Ok(settled))
            }
            Err(AdminError::Settings(error)) => Ok(Err(error.to_string())),
            Err(error @ AdminError::Keys(_)) => Ok(Err(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    async fn take_place(
        &self,
        name: &CacheName,
        changes: &Changes,
        key: SecretKey,
    ) -> Result<(CacheRow, bool), AdminError> {
        self.anchor.configure_cache(name, changes).await?;
        self.anchor.rotate_key(name, Some(key), false).await?;
        let row = self.anchor.rotate_key(name, None, true).await?;
        Ok((row, true))
    }

    async fn path(&self, cache: &CacheRow, listed: Listed) -> Result<(), ImportError> {
        let known = self.anchor.catalog.path(cache.id, listed.hash).await?;
        let outcome = match known {
            Some(_) => Ok(None),
            None => self.take(cache, listed.id).await.map(Some),
        };
        self.progress.paths_done.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(None) => self.note(|imported| imported.present += 1),
            Ok(Some(nar_bytes)) => self.note(|imported| {
                imported.paths += 1;
                imported.nar_bytes += nar_bytes;
            }),
            // What is wrong here is wrong for all of them.
            Err(PathError::Source(error)) => return Err(error.into()),
            Err(PathError::Catalog(error)) => return Err(error.into()),
            Err(PathError::Ingest(error)) if error.is_ours() => return Err(error.into()),
            Err(PathError::Chunk(ChunkError::Setup(error))) => {
                return Err(SourceError::from(error).into());
            }
            Err(error) => {
                let path = self.attic.path(listed.id).await?;
                let path = path.map(|found| found.metadata.store_path);
                let path = path.unwrap_or_else(|| listed.hash.to_string());
                self.leave_out(cache.name.as_str(), Some(path), error.to_string());
            }
        }
        Ok(())
    }

    /// Takes over a path that is not here; returns how many bytes of NAR were read for it.
    async fn take(&self, cache: &CacheRow, id: i64) -> Result<u64, PathError> {
        let Found {
            metadata,
            nar,
            chunks: promised,
        } = self.attic.path(id).await?.ok_or(PathError::NoNar)?;
        let dir = cache.settings.store_dir().map_err(IngestError::from)?;
        let narinfo = metadata.narinfo(&dir);
        let narinfo = narinfo.map_err(|refusal| PathError::Claims(refusal.message))?;
        let max = self.anchor.nar_bytes_max;
        if narinfo.nar_size > max {
            return Err(PathError::TooLarge { max });
        }
        // Before the work of reading it.
        self.anchor.check_claims(cache, &narinfo).await?;
        if let Some(stored) = self.anchor.catalog.hold_nar(narinfo.nar_hash).await? {
            self.anchor.describe(cache, narinfo, stored, None).await?;
            return Ok(0);
        }
        let chunks = self.attic.chunks(nar).await?;
        if chunks.len() != promised {
            return Err(PathError::Chunks {
                found: chunks.len(),
                promised,
            });
        }
        let chunks = chunks.into_iter().collect::<Result<Vec<_>, _>>()?;
        let nar_size = narinfo.nar_size;
        self.read(cache, narinfo, chunks).await?;
        Ok(nar_size)
    }

    async fn read(
        &self,
        cache: &CacheRow,
        narinfo: NarInfo,
        chunks: Vec<Chunk>,
    ) -> Result<(), PathError> {
        let _slot = self.anchor.intakes.acquire().await;
        let mut intake = Intake::new(Some(&self.anchor.spool), narinfo.nar_size)?;
        let opened = stream::iter(chunks).map(|chunk| self.open(chunk));
        let mut opened = std::pin::pin!(opened.buffered(CHUNKS_AHEAD));
        while let Some(chunk) = opened.next().await {
            let (chunk, body) = chunk?;
            let before = intake.offset();
            let (filled, outcome) = intake.fill(body, chunk.encoding).await;
            outcome?;
            intake = filled.ok_or(IntakeError::Stopped)?;
            let read = intake.offset() - before;
            self.progress.nar_bytes.fetch_add(read, Ordering::Relaxed);
        }
        let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
        let taken = taken.map_err(|_| IntakeError::Stopped)??;
        let taken = Arc::new(taken);
        self.anchor.publish(cache, narinfo, taken, None).await?;
        Ok(())
    }

    async fn open(&self, chunk: Chunk) -> Result<(Chunk, ChunkBody), ChunkError> {
        let body = self.attic.open_chunk(&chunk).await?;
        Ok((chunk, body))
    }

    fn note(&self, change: impl FnOnce(&mut Imported)) {
        let mut imported = self.imported.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut imported);
    }

    fn leave_out(&self, cache: &str, path: Option<String>, reason: String) {
        warn!(cache, path, reason, "left something out");
        self.note(|imported| {
            imported.left_out += 1;
            if imported.reasons.len() < LEFT_OUT_SHOWN {
                imported.reasons.push(LeftOut {
                    cache: cache.to_owned(),
                    path,
                    reason,
                });
            }
        });
    }
}

/// Orders paths so that each stands in a later layer than all that it references.
fn layers(paths: Vec<Listed>) -> Vec<Vec<Listed>> {
    let places: HashMap<StorePathHash, usize> = paths
        .iter()
        .enumerate()
        .map(|(place, path)| (path.hash, place))
        .collect();
    let mut referrers = vec![Vec::new(); paths.len()];
    let mut waits_for = vec![0usize; paths.len()];
    for (place, path) in paths.iter().enumerate() {
        for reference in &path.references {
            if let Some(&other) = places.get(reference)
                && other != place
            {
                referrers[other].push(place);
                waits_for[place] += 1;
            }
        }
    }
    let mut paths: Vec<Option<Listed>> = paths.into_iter().map(Some).collect();
    let mut layers = Vec::new();
    let mut ready: Vec<usize> = (0..paths.len())
        .filter(|&place| waits_for[place] == 0)
        .collect();
    while !ready.is_empty() {
        let mut next = Vec::new();
        for &place in &ready {
            for &referrer in &referrers[place] {
                waits_for[referrer] -= 1;
                if waits_for[referrer] == 0 {
                    next.push(referrer);
                }
            }
        }
        let layer = ready.iter().filter_map(|&place| paths[place].take());
        layers.push(layer.collect());
        ready = next;
    }
    // Paths that reference each other are none of Nix; they are told as such when they are taken.
    layers.push(paths.into_iter().flatten().collect());
    layers
}
