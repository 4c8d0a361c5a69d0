//! Sizes: how much a cache holds, and how much it may.
//!
//! A cache is as large as the NARs of its paths are in storage, each counted once, and in every cache that
//! has it; for its quota also those that came and that no path names yet. Its *size cap* is what a collection brings it down to ([`super::gc`]); its *quota* is where pushes
//! are refused: at once when it is full, and before a path is published that would not fit. Those under way
//! at one time may go beyond it together. The *subject quota* is the same for what of a cache came by one
//! token subject; a path is of whoever pushed it first.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use granary_protocol::hash::NarHash;
use rusqlite::params;
use serde::Serialize;

use super::Anchor;
use super::catalog::{CacheRow, Catalog, CatalogError, unsigned};
use super::ingest::IngestError;

/// After how long the catalog is asked again how full a cache is; what is pushed meanwhile is added here.
/// Adding up a million paths takes it a second.
const COUNT_INTERVAL: Duration = Duration::from_secs(30);

/// A cache by its number, or what of it came by one subject.
type Share = (i64, Option<String>);

/// What shares with a quota hold.
#[derive(Default)]
pub struct Fullness(Mutex<BTreeMap<Share, (Instant, u64)>>);

impl Fullness {
    fn known(&self, share: &Share) -> Option<u64> {
        let counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, bytes) = counted.get(share)?;
        (at.elapsed() < COUNT_INTERVAL).then_some(*bytes)
    }

    fn set(&self, share: Share, bytes: u64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Subjects come and go.
        counted.retain(|_, (at, _)| at.elapsed() < COUNT_INTERVAL);
        counted.insert(share, (Instant::now(), bytes));
    }

    /// Something was published.
    fn add(&self, share: &Share, bytes: u64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, held)) = counted.get_mut(share) {
            *held = held.saturating_add(bytes);
        }
    }

    /// Something was removed: the catalog knows what is left.
    pub fn forget(&self, cache: i64) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counted.retain(|(counted, _), _| *counted != cache);
    }
}

/// By how much a path fills its cache, and the share of who pushed it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filling {
    cache: u64,
    subject: u64,
}

impl Anchor {
    /// Refuses when a cache is full, or has enough of who pushes, before anything is taken in for it.
    pub(super) async fn check_full(
        &self,
        cache: &CacheRow,
        subject: Option<&str>,
    ) -> Result<(), IngestError> {
        // One byte more is the least that anything has.
        let least = Filling {
            cache: 1,
            subject: 1,
        };
        self.check_room(cache, subject, least).await
    }

    /// Refuses a path whose NAR does not fit; returns by how much it fills the cache.
    pub(super) async fn check_quota(
        &self,
        cache: &CacheRow,
        subject: Option<&str>,
        nar_hash: NarHash,
        file_size: u64,
    ) -> Result<Filling, IngestError> {
        let mut filling = Filling::default();
        if cache.settings.quota.is_some() && !self.catalog.counts_nar(cache.id, nar_hash).await? {
            filling.cache = file_size;
        }
        if cache.settings.subject_quota.is_some()
            && let Some(subject) = subject
            && !self
                .catalog
                .subject_has_nar(cache.id, subject, nar_hash)
                .await?
        {
            filling.subject = file_size;
        }
        self.check_room(cache, subject, filling).await?;
        Ok(filling)
    }

    async fn check_room(
        &self,
        cache: &CacheRow,
        subject: Option<&str>,
        more: Filling,
    ) -> Result<(), IngestError> {
        if let Some(quota) = cache.settings.quota {
            let held = self.held((cache.id, None)).await?;
            if held.saturating_add(more.cache) > quota {
                return Err(IngestError::Quota {
                    cache: cache.name.clone(),
                    held,
                    quota,
                });
            }
        }
        if let (Some(quota), Some(subject)) = (cache.settings.subject_quota, subject) {
            let held = self.held((cache.id, Some(subject.to_owned()))).await?;
            if held.saturating_add(more.subject) > quota {
                return Err(IngestError::SubjectQuota {
                    cache: cache.name.clone(),
                    subject: subject.to_owned(),
                    held,
                    quota,
                });
            }
        }
        Ok(())
    }

    async fn held(&self, share: Share) -> Result<u64, CatalogError> {
        if let Some(held) = self.fullness.known(&share) {
            return Ok(held);
        }
        let held = match share.1.clone() {
            None => self.catalog.cache_bytes(share.0).await?,
            Some(subject) => self.catalog.subject_bytes(share.0, subject).await?,
        };
        self.fullness.set(share, held);
        Ok(held)
    }

    /// Returns the bytes in storage of what came by a subject, as its quota counts them.
    pub(super) async fn held_by(&self, cache: i64, subject: &str) -> Result<u64, CatalogError> {
        self.held((cache, Some(subject.to_owned()))).await
    }

    /// Notes that a path was published.
    pub(super) fn filled(&self, cache: &CacheRow, subject: Option<&str>, filling: Filling) {
        self.fullness.add(&(cache.id, None), filling.cache);
        if let Some(subject) = subject {
            let share = (cache.id, Some(subject.to_owned()));
            self.fullness.add(&share, filling.subject);
        }
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
    /// Whether a cache's quota counts the NAR.
    async fn counts_nar(&self, cache: i64, nar_hash: NarHash) -> Result<bool, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT 1 FROM paths WHERE cache = ?1 AND nar_hash = ?2 AND state IN (1, 2)
                     UNION ALL SELECT 1 FROM received WHERE cache = ?1 AND nar_hash = ?2 AND at > 0",
                )?
                .exists(params![cache, nar_hash.as_bytes()])
        })
        .await
    }

    /// Returns the bytes in storage that a cache's quota counts, each NAR once.
    async fn cache_bytes(&self, cache: i64) -> Result<u64, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT coalesce(sum(file_size), 0) FROM nars WHERE nar_hash IN
                     (SELECT nar_hash FROM paths WHERE cache = ?1 AND state = 1
                      UNION SELECT nar_hash FROM received WHERE cache = ?1 AND at > 0)",
                )?
                .query_row([cache], |row| unsigned(row, 0))
        })
        .await
    }

    /// Whether a path that came by this subject has the NAR.
    async fn subject_has_nar(
        &self,
        cache: i64,
        subject: &str,
        nar_hash: NarHash,
    ) -> Result<bool, CatalogError> {
        let subject = subject.to_owned();
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT 1 FROM paths WHERE cache = ?1 AND nar_hash = ?2 AND subject = ?3 AND state = 1",
                )?
                .exists(params![cache, nar_hash.as_bytes(), subject])
        })
        .await
    }

    /// Returns the bytes in storage of what came by a subject, each NAR counted once.
    async fn subject_bytes(&self, cache: i64, subject: String) -> Result<u64, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT coalesce(sum(file_size), 0) FROM nars WHERE nar_hash IN
                     (SELECT nar_hash FROM paths WHERE cache = ?1 AND subject = ?2 AND state = 1)",
                )?
                .query_row(params![cache, subject], |row| unsigned(row, 0))
        })
        .await
    }

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
