//! Heal: a damaged NAR is brought again from whoever still has it.
//!
//! Asked are binary caches: the node on this machine first, which stands for its store, its mesh and whatever else it
//! knows, then upstreams. What they send is a push like any other: it is taken in, and stored only if it is the NAR
//! that was lost, by its hash and size. So nobody has to be trusted. Until then the paths stay unserved, and a push
//! puts them right as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use granary_protocol::hash::NarHash;
use granary_protocol::mesh::CacheRole;
use granary_protocol::narinfo::NarInfo;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use reqwest::Url;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::catalog::{CacheRow, Catalog, CatalogError, StoredNar, nar_row, signed};
use super::ingest::IngestError;
use super::intake::{Encoding, Intake, IntakeError};
use super::{Anchor, to_its_end};
use crate::authority::Authorities;
use crate::binary_cache::{FromWeb, TransferError, WebCache, WebCaches, WebSetupError};
use crate::credential::Credential;

/// How often damaged NARs are looked for elsewhere: who has one may have been asleep.
const INTERVAL: Duration = Duration::from_secs(60);

/// NARs looked for at once and in one go. After a disk has died there are many, and those who are asked have other
/// things to do.
const BATCH: usize = 64;

/// Paths under which a NAR is asked for; contents rarely have several.
const PATHS_MAX: usize = 8;

/// Where lost NARs are asked for.
#[derive(Debug, Clone)]
pub struct Source {
    pub url: Url,
    pub authorities: Authorities,
}

/// Those who are asked, in this order.
pub(super) struct Sources(WebCaches, usize);

impl Sources {
    pub(super) fn new(sources: Vec<Source>) -> Result<Sources, WebSetupError> {
        let known = sources.len();
        let cache = |source: Source| WebCache {
            role: CacheRole::Upstream,
            url: source.url,
            credential: Credential::none(),
            authorities: source.authorities,
        };
        let caches = WebCaches::new(sources.into_iter().map(cache).collect(), None)?;
        Ok(Sources(caches, known))
    }
}

/// A NAR under one of its names: a cache, and its directory.
type Name = (CacheRow, StoreDir);

impl Anchor {
    /// Brings a damaged NAR again; `false` when nobody had it.
    ///
    /// # Errors
    /// When it was brought, and could not be stored.
    pub(super) async fn heal(self: &Arc<Self>, nar: StoredNar) -> Result<bool, IngestError> {
        let names = self.names(nar.nar_hash).await?;
        for source in 0..self.sources.1 {
            let asked = names.keys().copied().collect();
            let answers = self.sources.0.narinfos(source, asked);
            let mut answers = std::pin::pin!(answers);
            while let Some(answer) = answers.next().await {
                let Some((cache, dir)) = names.get(&answer.hash) else {
                    continue;
                };
                let Some(Ok(narinfo)) = answer.narinfo.map(|text| NarInfo::parse(&text, dir))
                else {
                    continue;
                };
                // Another build of the path is of no use.
                if (narinfo.nar_hash, narinfo.nar_size) != (nar.nar_hash, nar.nar_size) {
                    continue;
                }
                match self.bring(source, &narinfo, nar, cache).await {
                    Ok(()) => {
                        let from = self.sources.0.name(source);
                        info!(nar_hash = %nar.nar_hash, from = from.as_deref(), "brought a damaged nar again");
                        return Ok(true);
                    }
                    Err(error) if is_theirs(&error) => {
                        let from = self.sources.0.name(source);
                        debug!(nar_hash = %nar.nar_hash, from = from.as_deref(), %error, "could not bring a damaged nar again");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(false)
    }

    async fn bring(
        self: &Arc<Self>,
        source: usize,
        narinfo: &NarInfo,
        nar: StoredNar,
        cache: &CacheRow,
    ) -> Result<(), IngestError> {
        let failed = |error: TransferError| IntakeError::Body {
            source: std::io::Error::other(error),
        };
        let _slot = self.intakes.acquire().await;
        let body = self.sources.0.nar(source, narinfo, 0).await;
        let body = stream::try_unfold(body.map_err(failed)?, next).boxed();
        let intake = Intake::new(Some(&self.spool), nar.nar_size)?;
        let (intake, outcome) = intake.fill(body, Encoding::None).await;
        outcome?;
        let intake = intake.ok_or(IntakeError::Stopped)?;
        let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
        let taken = taken.map_err(|_| IntakeError::Stopped)??;
        if taken.nar_hash != nar.nar_hash {
            return Err(IngestError::NarHash {
                path: narinfo.store_path.clone(),
                found: taken.nar_hash,
                promised: nar.nar_hash,
            });
        }
        let (anchor, cache) = (self.clone(), cache.clone());
        to_its_end(async move {
            let _held = anchor.nar_locks.lock(taken.nar_hash).await;
            // Pushed or collected meanwhile, there is nothing to put right.
            if !anchor.catalog.is_damaged(taken.nar_hash).await? {
                return Ok(());
            }
            anchor.take_nar(&cache, &taken, None).await.map(drop)
        })
        .await
    }

    /// Returns paths that have a NAR, each with a cache that holds it.
    async fn names(&self, nar_hash: NarHash) -> Result<BTreeMap<StorePathHash, Name>, IngestError> {
        let caches = self.catalog.caches().await?;
        let mut names = BTreeMap::new();
        for (cache, hash) in self.catalog.rows_of(nar_hash).await? {
            if let Some(cache) = caches.iter().find(|row| row.id == cache)
                && names.len() < PATHS_MAX
            {
                let dir = cache.settings.store_dir()?;
                names.insert(hash, (cache.clone(), dir));
            }
        }
        Ok(names)
    }

    /// Looks for damaged NARs elsewhere, those after this one; returns after which it goes on.
    ///
    /// # Errors
    /// With the NAR that could not be stored, so that it does not hold up those after it.
    pub async fn heal_some(
        self: &Arc<Self>,
        after: Option<NarHash>,
    ) -> Result<Option<NarHash>, (Option<NarHash>, IngestError)> {
        let damaged = self.catalog.damaged_after(after, BATCH).await;
        let damaged = damaged.map_err(|error| (after, error.into()))?;
        for nar in &damaged {
            let healed = self.heal(*nar).await;
            healed.map_err(|error| (Some(nar.nar_hash), error))?;
        }
        let is_end = damaged.len() < BATCH;
        Ok(damaged.last().map(|nar| nar.nar_hash).filter(|_| !is_end))
    }
}

/// Whether another source may do better.
fn is_theirs(error: &IngestError) -> bool {
    match error {
        // A body that broke off is nobody's fault here.
        IngestError::Intake(error) => !error.is_ours(),
        error => !error.is_ours(),
    }
}

async fn next(mut body: FromWeb) -> Result<Option<(bytes::Bytes, FromWeb)>, std::io::Error> {
    let next = body.next().await.map_err(std::io::Error::other)?;
    Ok(next.map(|bytes| (bytes, body)))
}

/// Looks for what is damaged again and again.
pub async fn keep_healing(anchor: Arc<Anchor>, shutdown: CancellationToken) {
    let mut after = None;
    // In this round of all that is damaged, and whether the log knows.
    let (mut has_failed, mut is_trouble_told) = (false, false);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let healing = tokio::select! {
            () = shutdown.cancelled() => return,
            healing = anchor.heal_some(after) => healing,
        };
        after = match healing {
            Ok(after) => {
                if after.is_none() {
                    is_trouble_told &= std::mem::take(&mut has_failed);
                }
                after
            }
            Err((after, error)) => {
                has_failed = true;
                if !std::mem::replace(&mut is_trouble_told, true) {
                    error!(storage = anchor.storage.location(), %error, "could not store damaged nars anew");
                }
                after
            }
        };
    }
}

impl Catalog {
    async fn is_damaged(&self, nar_hash: NarHash) -> Result<bool, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached("SELECT 1 FROM nars WHERE nar_hash = ?1 AND damaged IS NOT NULL")?
                .exists([nar_hash.as_bytes()])
        })
        .await
    }

    /// Returns damaged NARs in the order of their hashes.
    async fn damaged_after(
        &self,
        after: Option<NarHash>,
        limit: usize,
    ) -> Result<Vec<StoredNar>, CatalogError> {
        self.read(move |connection| {
            let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
            connection
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars
                     WHERE damaged IS NOT NULL AND nar_hash > ?1 ORDER BY nar_hash LIMIT ?2",
                )?
                .query_map(rusqlite::params![after, signed(limit as u64)], nar_row)?
                .collect()
        })
        .await
    }
}
