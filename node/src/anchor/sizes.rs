//! Sizes: how much a cache holds, and how much it may.
//!
//! A cache is as large as the NARs of its paths are in storage, each counted once, and in every cache that
//! has it. Its *size cap* is what a collection brings it down to ([`super::gc`]); its *quota* is where pushes
//! are refused: at once when it is full, and before a path is published that would not fit. Those under way
//! at one time may go beyond it together.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use granary_protocol::hash::NarHash;
use serde::Serialize;

use super::Anchor;
use super::catalog::{CacheRow, Catalog, CatalogError, unsigned};
use super::ingest::IngestError;

/// After how long the catalog is asked again how full a cache is; what is pushed meanwhile is added here.
/// Adding up a million paths takes it a second.
const COUNT_INTERVAL: Duration = Duration::from_secs(30);

/// What caches with a quota hold, by number.
#[derive(Default)]
pub struct Fullness(Mutex<BTreeMap<i64, (Instant, u64)>>);

impl Fullness {
    fn known(&self, cache: i64) -> Option<u64> {
        let counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, bytes) = counted.get(&cache)?;
        (at.elapsed() < COUNT_INTERVAL).then_some(*bytes)
    }

    fn set(&self, cache: i64, bytes: u64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counted.insert(cache, (Instant::now(), bytes));
    }

    /// Something was published.
    fn add(&self, cache: i64, bytes: u64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, held)) = counted.get_mut(&cache) {
            *held = held.saturating_add(bytes);
        }
    }

    /// Something was removed: the catalog knows what is left.
    pub fn forget(&self, cache: i64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counted.remove(&cache);
    }
}

impl Anchor {
    /// Refuses when a cache is full, before anything is taken in for it.
    pub(super) async fn check_full(&self, cache: &CacheRow) -> Result<(), IngestError> {
        // One byte more is the least that anything has.
        self.check_room(cache, 1).await
    }

    /// Refuses a path whose NAR does not fit; returns by how much it fills the cache.
    pub(super) async fn check_quota(
        &self,
        cache: &CacheRow,
        nar_hash: NarHash,
        file_size: u64,
    ) -> Result<u64, IngestError> {
        if cache.settings.quota.is_none() {
            return Ok(0);
        }
        let more = match self.catalog.cache_has_nar(cache.id, nar_hash).await? {
            true => 0,
            false => file_size,
        };
        self.check_room(cache, more).await?;
        Ok(more)
    }

    async fn check_room(&self, cache: &CacheRow, more: u64) -> Result<(), IngestError> {
        let Some(quota) = cache.settings.quota else {
            return Ok(());
        };
        let held = match self.fullness.known(cache.id) {
            Some(held) => held,
            None => {
                let held = self.catalog.totals(Some(cache.id)).await?.file_bytes;
                self.fullness.set(cache.id, held);
                held
            }
        };
        match held.saturating_add(more) > quota {
            true => Err(IngestError::Quota {
                cache: cache.name.clone(),
                held,
                quota,
            }),
            false => Ok(()),
        }
    }

    /// Notes that a path was published.
    pub(super) fn filled(&self, cache: &CacheRow, more: u64) {
        self.fullness.add(cache.id, more);
    }
}

/// What can be told of a cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    pub paths: u64,
    /// Those of them that are answered 404, since their NARs are damaged.
    pub damaged_paths: u64,
    /// Different NARs.
    pub nars: u64,
    /// Bytes of all NARs, each path counted.
    pub nar_bytes: u64,
    /// Bytes in storage, each NAR counted once.
    pub file_bytes: u64,
    /// Of these, those of NARs that other caches have as well.
    pub shared_file_bytes: u64,
    /// Seconds since 1970; `None` of an empty cache.
    pub last_pushed: Option<u64>,
    /// As it was written down, at most half a minute ago.
    pub last_used: Option<u64>,
    pub least_recently_used: Option<u64>,
}

impl Catalog {
    /// Returns what can be told of a cache.
    pub async fn statistics(&self, cache: i64) -> Result<Statistics, CatalogError> {
        self.read(move |connection| {
            let mut statistics = connection
                .prepare_cached(
                    "SELECT count(*), coalesce(sum(damaged IS NOT NULL), 0), coalesce(sum(nar_size), 0),
                            max(registered), max(last_used), min(last_used)
                     FROM paths JOIN nars ON nars.nar_hash = paths.nar_hash
                     WHERE cache = ?1 AND state = 1",
                )?
                .query_row([cache], |row| {
                    let time = |column| -> rusqlite::Result<Option<u64>> {
                        let time: Option<i64> = row.get(column)?;
                        Ok(time.and_then(|time| u64::try_from(time).ok()))
                    };
                    Ok(Statistics {
                        paths: unsigned(row, 0)?,
                        damaged_paths: unsigned(row, 1)?,
                        nar_bytes: unsigned(row, 2)?,
                        last_pushed: time(3)?,
                        last_used: time(4)?,
                        least_recently_used: time(5)?,
                        ..Statistics::default()
                    })
                })?;
            (statistics.nars, statistics.file_bytes, statistics.shared_file_bytes) = connection
                .prepare_cached(
                    "SELECT count(*), coalesce(sum(file_size), 0),
                            coalesce(sum(file_size) FILTER (WHERE EXISTS (
                                SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash
                                AND cache <> ?1 AND state = 1)), 0)
                     FROM nars WHERE nar_hash IN
                         (SELECT nar_hash FROM paths WHERE cache = ?1 AND state = 1)",
                )?
                .query_row([cache], |row| {
                    Ok((unsigned(row, 0)?, unsigned(row, 1)?, unsigned(row, 2)?))
                })?;
            Ok(statistics)
        })
        .await
    }
}
