//! Collection: what no cache keeps any longer is deleted, paths first, NARs a day later.
//!
//! A cache with a retention keeps what was used since then, what is pinned, and everything that these
//! reference. A NAR that no path has is marked, and deleted once it has been so for [`GRACE`]; so are
//! objects that the catalog does not know, which crashes leave. [`Anchor::plan`] only looks;
//! [`Anchor::collect`] does it.
//!
//! Safe beside pushes and itself interrupted anywhere: a path goes only when nobody relies on it and
//! nothing that stays references it, decided in the transaction that hides it ([`super::uses`]), and after
//! its referrers; a push that relies on it checks in the transaction that writes it down. So a path that
//! stays was visible all the time. A NAR goes under the lock that pushes of it take, its row before its
//! object. A retention that would empty a cache is refused: more often the clock is wrong than the cache
//! forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use granary_protocol::hash::NarHash;
use granary_protocol::store_path::StorePathHash;
use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::catalog::{CacheRow, CatalogError, signed, unsigned};
use super::ingest::IngestError;
use super::{Anchor, nar_key, to_its_end};

/// How long a NAR without a path is kept: a push that is interrupted in the evening goes on in the
/// morning, and Nix describes some NARs long after it has put them.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);

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
}

/// What expires in one cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expired {
    pub cache: String,
    /// Base names, referrers before what they reference.
    pub paths: Vec<String>,
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

/// One cache's paths as the plan sees them.
struct Graph {
    /// Base name and time of last use.
    paths: BTreeMap<StorePathHash, (String, u64)>,
    references: BTreeMap<StorePathHash, Vec<StorePathHash>>,
}

impl Graph {
    fn read(connection: &Connection, cache: i64) -> rusqlite::Result<Graph> {
        let mut paths = BTreeMap::new();
        let mut statement = connection.prepare_cached(
            "SELECT hash, base_name, last_used FROM paths WHERE cache = ?1 AND state = 1",
        )?;
        let mut rows = statement.query([cache])?;
        while let Some(row) = rows.next()? {
            let hash = StorePathHash::from_bytes(row.get(0)?);
            paths.insert(hash, (row.get(1)?, unsigned(row, 2)?));
        }
        let mut references: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut statement =
            connection.prepare_cached("SELECT hash, reference FROM edges WHERE cache = ?1")?;
        let mut rows = statement.query([cache])?;
        while let Some(row) = rows.next()? {
            let hash = StorePathHash::from_bytes(row.get(0)?);
            let reference = StorePathHash::from_bytes(row.get(1)?);
            references.entry(hash).or_default().push(reference);
        }
        Ok(Graph { paths, references })
    }

    /// What is not kept, referrers before what they reference.
    fn expired(&self, cutoff: u64, pins: &BTreeSet<StorePathHash>) -> Vec<StorePathHash> {
        let is_root = |hash: &StorePathHash, used: u64| used >= cutoff || pins.contains(hash);
        let roots = self
            .paths
            .iter()
            .filter(|(hash, (_, used))| is_root(hash, *used));
        let mut waiting: Vec<StorePathHash> = roots.map(|(hash, _)| *hash).collect();
        let mut kept = BTreeSet::new();
        while let Some(hash) = waiting.pop() {
            if kept.insert(hash) {
                waiting.extend(self.references.get(&hash).into_iter().flatten());
            }
        }
        let expired = self.paths.keys().filter(|hash| !kept.contains(hash));
        let expired: BTreeSet<StorePathHash> = expired.copied().collect();
        let mut referrers: BTreeMap<StorePathHash, usize> = BTreeMap::new();
        let references = |hash: &StorePathHash| {
            let references = self.references.get(hash).into_iter().flatten();
            references
                .filter(|reference| expired.contains(reference))
                .copied()
        };
        for hash in &expired {
            for reference in references(hash) {
                *referrers.entry(reference).or_default() += 1;
            }
        }
        let free = expired.iter().filter(|hash| !referrers.contains_key(hash));
        let mut free: Vec<StorePathHash> = free.copied().collect();
        let mut order = Vec::with_capacity(expired.len());
        while let Some(hash) = free.pop() {
            order.push(hash);
            for reference in references(&hash) {
                if let Some(count) = referrers.get_mut(&reference) {
                    *count -= 1;
                    if *count == 0 {
                        free.push(reference);
                    }
                }
            }
        }
        order
    }
}

impl Anchor {
    /// Says what [`Anchor::collect`] would do.
    pub async fn plan(&self) -> Result<Collection, IngestError> {
        self.write_used().await?;
        let now = self.now();
        let mut plan = Collection::default();
        for cache in self.catalog.caches().await? {
            if let Some((expired, _)) = self.expired(&cache, now).await? {
                plan.caches.push(expired);
            }
        }
        let cutoff = signed(now.saturating_sub(GRACE.as_secs()));
        (plan.nars, plan.nar_file_bytes, plan.waiting) = self
            .catalog
            .read(move |connection| {
                connection.query_row(
                    "SELECT coalesce(sum(unused_since <= ?1), 0),
                            coalesce(sum(file_size) FILTER (WHERE unused_since <= ?1), 0),
                            coalesce(sum(unused_since IS NULL OR unused_since > ?1), 0)
                     FROM nars
                     WHERE NOT EXISTS (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)
                     AND NOT EXISTS (SELECT 1 FROM received WHERE received.nar_hash = nars.nar_hash AND at > ?1)",
                    [cutoff],
                    |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?, unsigned(row, 2)?)),
                )
            })
            .await?;
        plan.orphans = self.orphans(now).await?.len() as u64;
        Ok(plan)
    }

    /// What expires in a cache; `None` when it keeps everything.
    async fn expired(
        &self,
        cache: &CacheRow,
        now: u64,
    ) -> Result<Option<(Expired, Vec<StorePathHash>)>, CatalogError> {
        let Some(retention) = cache.settings.retention else {
            return Ok(None);
        };
        let pins: BTreeSet<StorePathHash> = cache
            .settings
            .pins
            .iter()
            .filter_map(|pin| pin.parse().ok())
            .collect();
        let (id, cutoff) = (cache.id, now.saturating_sub(retention));
        let (names, hashes, of) = self
            .catalog
            .read(move |connection| {
                let graph = Graph::read(connection, id)?;
                let hashes = graph.expired(cutoff, &pins);
                let name = |hash| graph.paths.get(hash).map(|(name, _)| name.clone());
                let names: Vec<String> = hashes.iter().filter_map(name).collect();
                Ok((names, hashes, graph.paths.len()))
            })
            .await?;
        let is_emptied = names.len() == of && of > EMPTIED_MAX;
        let refused = is_emptied.then(|| {
            format!(
                "retention of cache {} would delete all {of} paths (the clock reads {now} seconds after 1970), refusing",
                cache.name
            )
        });
        let expired = Expired {
            cache: cache.name.to_string(),
            paths: names,
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
        self.recover().await?;
        self.write_used().await?;
        let now = self.now();
        let mut done = Collection::default();
        for cache in self.catalog.caches().await? {
            let Some((mut expired, hashes)) = self.expired(&cache, now).await? else {
                continue;
            };
            if let Some(refused) = &expired.refused {
                warn!(cache = %cache.name, refused, "collected nothing of a cache");
                done.caches.push(expired);
                continue;
            }
            let cutoff = now.saturating_sub(cache.settings.retention.unwrap_or(now));
            let mut removed = Vec::new();
            for (hash, name) in hashes.into_iter().zip(std::mem::take(&mut expired.paths)) {
                if self.remove(&cache, hash, Some(cutoff)).await? {
                    removed.push(name);
                }
            }
            expired.paths = removed;
            done.caches.push(expired);
        }
        self.collect_nars(now, &mut done).await?;
        for nar_hash in self.orphans(now).await? {
            done.orphans += u64::from(self.remove_nar(nar_hash, NarRow::Absent).await?);
        }
        let paths: usize = done.caches.iter().map(|expired| expired.paths.len()).sum();
        info!(
            paths,
            nars = done.nars,
            bytes = done.nar_file_bytes,
            waiting = done.waiting,
            orphans = done.orphans,
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
                anchor.storage.delete(&name.narinfo_key(&hash)).await?;
                anchor.catalog.forget_path(cache, hash).await?;
            }
            Ok(is_hidden)
        })
        .await
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
    ) -> Result<(), IngestError> {
        let cutoff = signed(now.saturating_sub(GRACE.as_secs()));
        let now = signed(now);
        // First those that are used again, then those that are not any more, then those whose time has come.
        let due: Vec<(NarHash, u64)> = self
            .catalog
            .write(move |transaction| {
                transaction.execute("DELETE FROM received WHERE at <= ?1", [cutoff])?;
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
                    [now],
                )?;
                transaction
                    .prepare("SELECT nar_hash, file_size FROM nars WHERE unused_since <= ?1")?
                    .query_map([cutoff], |row| {
                        Ok((NarHash::from_bytes(row.get(0)?), unsigned(row, 1)?))
                    })?
                    .collect()
            })
            .await?;
        for (nar_hash, file_size) in due {
            if self.remove_nar(nar_hash, NarRow::Unused).await? {
                done.nars += 1;
                done.nar_file_bytes += file_size;
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

    /// NARs in the bucket that the catalog does not know, older than [`GRACE`].
    async fn orphans(&self, now: u64) -> Result<Vec<NarHash>, IngestError> {
        let mut orphans = Vec::new();
        let mut objects = self.storage.list("nar");
        while let Some(object) = objects.try_next().await? {
            let name = object
                .key
                .rsplit('/')
                .next()
                .and_then(|name| name.strip_suffix(".nar.zst"));
            let Some(Ok(nar_hash)) = name.map(NarHash::from_nix32) else {
                continue;
            };
            let is_old = object.modified.saturating_add(GRACE.as_secs()) <= now;
            if is_old && self.catalog.nar_row(nar_hash).await?.is_none() {
                orphans.push(nar_hash);
            }
        }
        Ok(orphans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u8) -> StorePathHash {
        StorePathHash::from_bytes([number; 20])
    }

    /// Paths as (number, time of last use, references).
    fn graph(paths: &[(u8, u64, &[u8])]) -> Graph {
        let path =
            |(number, used, _): &(u8, u64, &[u8])| (hash(*number), (number.to_string(), *used));
        let references = |(number, _, references): &(u8, u64, &[u8])| {
            (
                hash(*number),
                references.iter().map(|number| hash(*number)).collect(),
            )
        };
        Graph {
            paths: paths.iter().map(path).collect(),
            references: paths.iter().map(references).collect(),
        }
    }

    fn expired(graph: &Graph, pins: &[u8]) -> Vec<u8> {
        let pins = pins.iter().map(|number| hash(*number)).collect();
        graph
            .expired(100, &pins)
            .iter()
            .map(|hash| hash.as_bytes()[0])
            .collect()
    }

    #[test]
    fn what_a_used_path_references_is_kept_however_old() {
        let graph = graph(&[
            (1, 100, &[2]),
            (2, 0, &[3]),
            (3, 0, &[]),
            (4, 99, &[3, 5]),
            (5, 0, &[]),
        ]);
        assert_eq!(expired(&graph, &[]), [4, 5]);
        assert_eq!(expired(&graph, &[5]), [4]);
        assert_eq!(expired(&graph, &[4]), [0u8; 0]);
    }

    #[test]
    fn referrers_go_before_what_they_reference() {
        let graph = graph(&[
            (9, 0, &[1, 5]),
            (5, 0, &[1, 7]),
            (1, 0, &[]),
            (7, 0, &[8]),
            (8, 0, &[]),
        ]);
        let order = expired(&graph, &[]);
        let at = |number| order.iter().position(|found| *found == number).unwrap();
        assert_eq!(order.len(), 5);
        assert!(at(9) < at(5) && at(5) < at(7) && at(7) < at(8) && at(5) < at(1));
    }

    #[test]
    fn references_that_are_not_here_do_not_matter() {
        let graph = graph(&[(1, 0, &[66]), (2, 100, &[77])]);
        assert_eq!(expired(&graph, &[]), [1]);
    }
}
