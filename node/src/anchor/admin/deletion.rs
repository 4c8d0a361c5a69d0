//! Deletion of a cache: gone from the answers at once, then from storage, however often that is interrupted.
//!
//! The transaction that forgets a cache notes its name, and the note goes once nothing of it is left. What is noted
//! is gone on with by the next start, by each collection of a running anchor, by whoever deletes the cache again, and
//! before a cache of that name is made: else the old one's paths would be taken for the new one's.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use tracing::{info, warn};

use super::AdminError;
use crate::anchor::Anchor;
use crate::anchor::cache::CacheName;
use crate::anchor::catalog::{Catalog, CatalogError, forget_cache, stored_name};
use crate::anchor::object_store::problem;

/// Objects that storage may refuse to delete before the others are left for the next time.
const FAILURES_MAX: usize = 10;

impl Anchor {
    /// Deletes a cache with everything in it; NARs that no other cache has wait for the collector.
    ///
    /// # Errors
    /// When storage fails, the cache is gone all the same, and what is left of it goes later.
    pub async fn delete_cache(&self, name: &CacheName) -> Result<(), AdminError> {
        let _held = self.administration.hold().await?;
        match self.existing(name).await {
            Ok(cache) => self.catalog.begin_deletion(cache.id, name).await?,
            // Again, for what is left.
            Err(AdminError::NoSuchCache { .. }) if self.is_being_deleted(name).await? => {}
            Err(error) => return Err(error),
        }
        self.counts.forget(name);
        self.end_deletion(name).await
    }

    /// Goes on with deletions that were interrupted; one that fails waits for the next time. Safe beside pushes.
    pub async fn resume_deletions(&self) -> Result<(), AdminError> {
        for name in self.catalog.deletions().await? {
            let _held = self.administration.hold().await?;
            // It may have been finished since, and a cache of that name be there again.
            if !self.is_being_deleted(&name).await? {
                continue;
            }
            match self.end_deletion(&name).await {
                Ok(()) => info!(cache = %name, "finished the deletion of a cache"),
                Err(AdminError::Storage(error)) => {
                    let problem = problem(&error);
                    warn!(cache = %name, problem, "could not delete all that is left of a cache");
                }
                Err(error) => {
                    warn!(cache = %name, %error, "could not delete all that is left of a cache");
                }
            }
        }
        Ok(())
    }

    pub(in crate::anchor) async fn is_being_deleted(
        &self,
        name: &CacheName,
    ) -> Result<bool, AdminError> {
        Ok(self.catalog.deletions().await?.contains(name))
    }

    /// Deletes what there is of a cache beside its rows. The caller is alone with all caches.
    pub(super) async fn end_deletion(&self, name: &CacheName) -> Result<(), AdminError> {
        // A push that began before is done: it would put a narinfo that nobody deletes.
        drop(self.signing.write().await);
        // Settings first: what is left of a cache without settings is rubbish to a rebuild.
        self.storage.delete(&name.settings_key()).await?;
        let (keys, deleting) = (self.keys.clone(), name.clone());
        let deleted = tokio::task::spawn_blocking(move || keys.delete(&deleting)).await;
        deleted.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        let mut objects = self.storage.list(&format!("caches/{name}"));
        let mut failures = Vec::new();
        while let Some(object) = objects.try_next().await? {
            failures.extend(self.storage.delete(&object.key).await.err());
            if failures.len() >= FAILURES_MAX {
                break;
            }
        }
        match failures.pop() {
            Some(error) => Err(error.into()),
            None => Ok(self.catalog.end_deletion(name).await?),
        }
    }
}

impl Catalog {
    /// Forgets a cache and all its paths, and notes that storage has them; their NARs wait for the collector.
    async fn begin_deletion(&self, cache: i64, name: &CacheName) -> Result<(), CatalogError> {
        let name = name.clone();
        self.write(move |transaction| {
            let note = "INSERT OR IGNORE INTO deletions (cache) VALUES (?1)";
            transaction.execute(note, [name.as_str()])?;
            forget_cache(transaction, cache)
        })
        .await
    }

    async fn end_deletion(&self, name: &CacheName) -> Result<(), CatalogError> {
        let name = name.clone();
        self.write(move |transaction| {
            let delete = "DELETE FROM deletions WHERE cache = ?1";
            transaction.execute(delete, [name.as_str()]).map(drop)
        })
        .await
    }

    /// Returns the caches that were deleted and of which storage may still have something.
    pub async fn deletions(&self) -> Result<BTreeSet<CacheName>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT cache FROM deletions")?
                .query_map([], |row| stored_name(&row.get::<_, String>(0)?))?
                .collect()
        })
        .await
    }
}
