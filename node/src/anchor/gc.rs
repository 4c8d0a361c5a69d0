//! Collection: what no cache keeps any longer is deleted, paths first, NARs a day later.
//!
//! A cache with a retention keeps what was used since then, what is pinned, and everything that these
//! reference. One that is larger than its size cap loses the closures that were not used for longest, but for
//! what is pinned or was used within [`RECENT`]. A NAR that no path has is marked, and deleted once it has been so for [`GRACE`]; so are
//! objects that the catalog does not know, which crashes leave. Neither goes while a narinfo in the bucket names it
//! ([`orphans`]). [`Anchor::plan`] only looks; [`Anchor::collect`] does it.
//!
//! Safe beside pushes and itself interrupted anywhere: a path goes only when nobody relies on it and
//! nothing that stays references it, decided in the transaction that hides it ([`super::uses`]), and after
//! its referrers; a push that relies on it checks in the transaction that writes it down. So a path that
//! stays was visible all the time. A NAR goes under the lock that pushes of it take, its row before its
//! object. A retention that would empty a cache is refused: more often the clock is wrong than the cache
//! forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use granary_protocol::hash::NarHash;
use granary_protocol::store_path::StorePathHash;
use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::cache::CacheName;
use super::catalog::{CacheRow, CatalogError, signed, unsigned};
use super::ingest::IngestError;
use super::object_store::{StorageError, problem};
use super::{Anchor, FORMAT_KEY, nar_key, to_its_end};

mod graph;
mod orphans;

use graph::Graph;

/// How long a NAR without a path is kept: a push that is interrupted in the evening goes on in the
/// morning, and Nix describes some NARs long after it has put them.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);

/// What was used since then stays also in a cache that is too large: somebody may be pushing what references
/// it, or have been told of it.
const RECENT: Duration = Duration::from_secs(3600);

/// How long storage may take in all to fail. One that refuses does so at once; one that is away takes half a minute for
/// each object, and is not asked about the others.
const FAILING_MAX: Duration = Duration::from_secs(60);

/// A cache with fewer paths may be emptied by its retention.
const EMPTIED_MAX: usize = 10;

/// What a collection would do, or did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collection {
    pub caches: Vec<Expired>,
    /// NARs without a path whose time has come, and their bytes in storage.
    pub nars: u64,
    pub nar_file_bytes: u64,
    /// NARs without a path that wait for [`GRACE`] to end.
    pub waiting: u64,
    /// Objects of NARs that the catalog does not know.
    pub orphans: u64,
    /// NARs that would go, if narinfos in storage that the catalog does not know did not name them.
    #[serde(default)]
    pub spared: u64,
    /// What storage would not delete, or tell of; tried again by the next one.
    #[serde(default)]
    pub failed: u64,
}

/// What expires in one cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expired {
    pub cache: String,
    /// Base names, referrers before what they reference.
    pub paths: Vec<String>,
    /// How many of them go for the size cap alone.
    #[serde(default)]
    pub over_cap: usize,
    /// Of how many.
    pub of: usize,
    /// Why nothing of it is done.
    pub refused: Option<String>,
}

/// What the catalog says of a NAR that is to go.
enum NarRow {
    Unused,
    Absent,
}

/// What storage failed to do of a run that goes on without it: one object that cannot be deleted, for its rights or a
/// lock on it, must not keep all others.
#[derive(Default)]
pub(super) struct Failures {
    pub count: u64,
    spent: Duration,
}

impl Failures {
    /// Waits for a step; `None` when storage failed. The log is told of the first.
    ///
    /// # Errors
    /// Other failures, and that of storage on which more than [`FAILING_MAX`] was spent.
    pub(super) async fn spare<T>(
        &mut self,
        step: impl Future<Output = Result<T, IngestError>>,
    ) -> Result<Option<T>, IngestError> {
        let started = Instant::now();
        let error = match step.await {
            Err(IngestError::Storage(error)) => error,
            outcome => return outcome.map(Some),
        };
        self.spent += started.elapsed();
        if self.spent > FAILING_MAX {
            return Err(error.into());
        }
        if self.count == 0 {
            let problem = problem(&error);
            warn!(
                problem,
                "storage failed for an object, the others are gone on with"
            );
        }
        self.count += 1;
        Ok(None)
    }
}

impl Anchor {
    /// Says what [`Anchor::collect`] would do.
    pub async fn plan(&self) -> Result<Collection, IngestError> {
        self.write_used().await?;
        let now = self.now();
        let mut plan = Collection::default();
        for cache in self.catalog.caches().await? {
            if let Some((expired, _)) = self.leaving(&cache, now).await? {
                plan.caches.push(expired);
            }
        }
        let cutoff = signed(now.saturating_sub(GRACE.as_secs()));
        let (due, waiting) = self
            .catalog
            .read(move |connection| {
                let mut due = BTreeMap::new();
                let mut waiting = 0;
                let mut unused = connection.prepare(
                    "SELECT nar_hash, file_size, coalesce(unused_since <= ?1, 0) FROM nars
                     WHERE NOT EXISTS (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)
                     AND NOT EXISTS (SELECT 1 FROM received WHERE received.nar_hash = nars.nar_hash AND at > ?1)",
                )?;
                let mut rows = unused.query([cutoff])?;
                while let Some(row) = rows.next()? {
                    match row.get(2)? {
                        true => {
                            due.insert(NarHash::from_bytes(row.get(0)?), unsigned(row, 1)?);
                        }
                        false => waiting += 1,
                    }
                }
                Ok((due, waiting))
            })
            .await?;
        plan.waiting = waiting;
        let going = self.going(&due, now, &mut plan).await?;
        for nar_hash in going {
            match due.get(&nar_hash) {
                Some(file_size) => {
                    plan.nars += 1;
                    plan.nar_file_bytes += file_size;
                }
                None => plan.orphans += 1,
            }
        }
        Ok(plan)
    }

    /// What goes of a cache; `None` when it keeps everything.
    async fn leaving(
        &self,
        cache: &CacheRow,
        now: u64,
    ) -> Result<Option<(Expired, Vec<StorePathHash>)>, CatalogError> {
        let settings = &cache.settings;
        if settings.retention.is_none() && settings.size_cap.is_none() {
            return Ok(None);
        }
        let pins: BTreeSet<StorePathHash> = cache
            .settings
            .pinned()
            .filter_map(|pin| pin.parse().ok())
            .collect();
        let cutoff = settings
            .retention
            .map(|retention| now.saturating_sub(retention));
        let (id, size_cap) = (cache.id, settings.size_cap);
        let recent = now.saturating_sub(RECENT.as_secs());
        let (names, hashes, over_cap, of) = self
            .catalog
            .read(move |connection| {
                let graph = Graph::read(connection, id)?;
                let mut hashes = match cutoff {
                    Some(cutoff) => graph.expired(cutoff, &pins),
                    None => Vec::new(),
                };
                let over = match size_cap {
                    Some(cap) => graph.over_cap(&hashes, cap, recent, &pins),
                    None => Vec::new(),
                };
                let over_cap = over.len();
                hashes.extend(over);
                let name = |hash| graph.base_name(hash).map(str::to_owned);
                let names: Vec<String> = hashes.iter().filter_map(name).collect();
                Ok((names, hashes, over_cap, graph.len()))
            })
            .await?;
        // A size cap does what it says, whatever the clock reads.
        let is_emptied = names.len() == of && of > EMPTIED_MAX && over_cap == 0;
        let refused = is_emptied.then(|| {
            format!(
                "retention of cache {} would delete all {of} paths (the clock reads {now} seconds after 1970), refusing",
                cache.name
            )
        });
        let expired = Expired {
            cache: cache.name.to_string(),
            paths: names,
            over_cap,
            of,
            refused,
        };
        Ok(Some((expired, hashes)))
    }

    /// Deletes what expired and what nothing names; says what was done.
    ///
    /// One at a time: a second call waits for the first.
    pub async fn collect(self: &Arc<Self>) -> Result<Collection, IngestError> {
        let _held = self.collecting.lock().await;
        let outcome = self.collect_alone().await;
        self.counts.collected(&outcome);
        outcome
    }

    async fn collect_alone(self: &Arc<Self>) -> Result<Collection, IngestError> {
        // The catalog would forget what a disk that is not mounted still has.
        if !self.has_own_storage().await? {
            let location = self.storage.location().to_owned();
            let key = FORMAT_KEY;
            return Err(StorageError::Another { location, key }.into());
        }
        let mut failures = Failures::default();
        self.recover_sparing(&mut failures).await?;
        self.write_used().await?;
        let now = self.now();
        let mut done = Collection::default();
        for cache in self.catalog.caches().await? {
            let Some((mut expired, hashes)) = self.leaving(&cache, now).await? else {
                continue;
            };
            if let Some(refused) = &expired.refused {
                warn!(cache = %cache.name, refused, "collected nothing of a cache");
                done.caches.push(expired);
                continue;
            }
            let retained = now.saturating_sub(cache.settings.retention.unwrap_or(now));
            let recent = now.saturating_sub(RECENT.as_secs());
            let of_retention = hashes.len() - expired.over_cap;
            let mut removed = Vec::new();
            expired.over_cap = 0;
            let names = std::mem::take(&mut expired.paths);
            for (number, (hash, name)) in hashes.into_iter().zip(names).enumerate() {
                let is_over_cap = number >= of_retention;
                let cutoff = if is_over_cap { recent } else { retained };
                let removing = self.remove(&cache, hash, Some(cutoff));
                if failures.spare(removing).await? == Some(true) {
                    removed.push(name);
                    expired.over_cap += usize::from(is_over_cap);
                }
            }
            expired.paths = removed;
            done.caches.push(expired);
        }
        self.collect_nars(now, &mut done, &mut failures).await?;
        done.failed = failures.count;
        let paths: usize = done.caches.iter().map(|expired| expired.paths.len()).sum();
        info!(
            paths,
            nars = done.nars,
            bytes = done.nar_file_bytes,
            waiting = done.waiting,
            orphans = done.orphans,
            spared = done.spared,
            failed = done.failed,
            "collected garbage"
        );
        Ok(done)
    }

    /// Hides a path, deletes its narinfo, forgets it; `false` when it stays.
    ///
    /// With `used_before` it goes only if nobody has used it since, and nothing that stays references it.
    pub(super) async fn remove(
        self: &Arc<Self>,
        cache: &CacheRow,
        hash: StorePathHash,
        used_before: Option<u64>,
    ) -> Result<bool, IngestError> {
        let (anchor, cache, name) = (self.clone(), cache.id, cache.name.clone());
        to_its_end(async move {
            let _held = anchor.path_locks.lock((cache, hash)).await;
            let is_hidden = match used_before {
                None => anchor.catalog.hide_path(cache, hash).await?,
                // Spares a transaction.
                Some(_) if anchor.uses.is_noted((cache, hash)) => false,
                Some(used_before) => {
                    let uses = anchor.uses.clone();
                    let claim = move || uses.leave((cache, hash));
                    let catalog = &anchor.catalog;
                    let hidden = catalog.hide_unused(cache, hash, used_before, claim).await?;
                    hidden.is_some()
                }
            };
            if is_hidden {
                anchor.delete_objects(&name, &hash).await?;
                anchor.catalog.forget_path(cache, hash).await?;
                anchor.fullness.forget(cache);
            }
            Ok(is_hidden)
        })
        .await
    }

    /// Deletes what the bucket has of a path that is hidden, but for its NAR. Logs and realisations are of derivations.
    ///
    /// The caller holds the path's lock, and its row says that it goes until this is done.
    pub(super) async fn delete_objects(
        &self,
        cache: &CacheName,
        hash: &StorePathHash,
    ) -> Result<(), StorageError> {
        self.storage.delete(&cache.listing_key(hash)).await?;
        self.storage.delete(&cache.narinfo_key(hash)).await
    }

    /// Deletes a NAR that nothing names; `false` when something does after all.
    async fn remove_nar(
        self: &Arc<Self>,
        nar_hash: NarHash,
        row: NarRow,
    ) -> Result<bool, IngestError> {
        let anchor = self.clone();
        to_its_end(async move {
            let _held = anchor.nar_locks.lock(nar_hash).await;
            let is_unnamed = match row {
                NarRow::Unused => anchor.forget_nar(nar_hash).await?,
                // It may have been pushed since it was listed.
                NarRow::Absent => anchor.catalog.nar_row(nar_hash).await?.is_none(),
            };
            if is_unnamed {
                anchor.storage.delete(&nar_key(&nar_hash)).await?;
            }
            Ok(is_unnamed)
        })
        .await
    }

    async fn collect_nars(
        self: &Arc<Self>,
        now: u64,
        done: &mut Collection,
        failures: &mut Failures,
    ) -> Result<(), IngestError> {
        let cutoff = signed(now.saturating_sub(GRACE.as_secs()));
        let marked = signed(now);
        // First those that are used again, then those that are not any more, then those whose time has come.
        let due: BTreeMap<NarHash, u64> = self
            .catalog
            .write(move |transaction| {
                // The name by which a client sent the NAR of a path that is here is asked for again (repack.rs).
                transaction.execute(
                    "DELETE FROM received WHERE at <= ?1 AND NOT EXISTS (
                     SELECT 1 FROM paths WHERE paths.nar_hash = received.nar_hash AND paths.cache = received.cache)",
                    [cutoff],
                )?;
                transaction.execute(
                    "UPDATE nars SET unused_since = NULL WHERE unused_since IS NOT NULL AND (
                     EXISTS (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)
                     OR EXISTS (SELECT 1 FROM received WHERE received.nar_hash = nars.nar_hash))",
                    [],
                )?;
                transaction.execute(
                    "UPDATE nars SET unused_since = ?1 WHERE unused_since IS NULL
                     AND NOT EXISTS (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)
                     AND NOT EXISTS (SELECT 1 FROM received WHERE received.nar_hash = nars.nar_hash)",
                    [marked],
                )?;
                transaction
                    .prepare("SELECT nar_hash, file_size FROM nars WHERE unused_since <= ?1")?
                    .query_map([cutoff], |row| {
                        Ok((NarHash::from_bytes(row.get(0)?), unsigned(row, 1)?))
                    })?
                    .collect()
            })
            .await?;
        for nar_hash in self.going(&due, now, done).await? {
            let file_size = due.get(&nar_hash);
            let row = match file_size {
                Some(_) => NarRow::Unused,
                None => NarRow::Absent,
            };
            if failures.spare(self.remove_nar(nar_hash, row)).await? != Some(true) {
                continue;
            }
            match file_size {
                Some(file_size) => {
                    done.nars += 1;
                    done.nar_file_bytes += file_size;
                }
                None => done.orphans += 1,
            }
        }
        done.waiting = self
            .catalog
            .read(|connection| {
                connection.query_row(
                    "SELECT count(*) FROM nars WHERE unused_since IS NOT NULL",
                    [],
                    |row| unsigned(row, 0),
                )
            })
            .await?;
        Ok(())
    }

    /// Returns which NARs are to go: those that are due, and those that the catalog does not know, but for what the
    /// bucket keeps.
    async fn going(
        &self,
        due: &BTreeMap<NarHash, u64>,
        now: u64,
        collection: &mut Collection,
    ) -> Result<BTreeSet<NarHash>, IngestError> {
        let mut going = self.orphans(now).await?;
        going.extend(due.keys());
        collection.spared = self.spare_named(&mut going).await?;
        Ok(going)
    }

    /// Deletes the row of a NAR, unless a push has named it since it was found unused.
    async fn forget_nar(&self, nar_hash: NarHash) -> Result<bool, CatalogError> {
        self.catalog
            .write(move |transaction| {
                let is_used = transaction
                    .query_row(
                        "SELECT 1 FROM paths WHERE nar_hash = ?1 UNION SELECT 1 FROM received WHERE nar_hash = ?1
                         UNION SELECT 1 FROM nars WHERE nar_hash = ?1 AND unused_since IS NULL",
                        [nar_hash.as_bytes()],
                        |_| Ok(()),
                    )
                    .optional()?;
                if is_used.is_some() {
                    return Ok(false);
                }
                transaction.execute("DELETE FROM nars WHERE nar_hash = ?1", params![nar_hash.as_bytes()])?;
                Ok(true)
            })
            .await
    }
}
