//! The catalog's NARs: what lies in storage, whoever names it.

use granary_protocol::hash::{FileHash, NarHash};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

use super::{Catalog, CatalogError, signed, unsigned};

/// A NAR that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredNar {
    pub nar_hash: NarHash,
    pub nar_size: u64,
    pub file_hash: FileHash,
    pub file_size: u64,
}

impl Catalog {
    /// Returns a NAR that is stored, damaged or not.
    pub async fn nar_row(&self, nar_hash: NarHash) -> Result<Option<StoredNar>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars WHERE nar_hash = ?1",
                )?
                .query_row([nar_hash.as_bytes()], nar_row)
                .optional()
        })
        .await
    }

    /// Returns a NAR that is stored.
    pub async fn nar(&self, nar_hash: NarHash) -> Result<Option<StoredNar>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars
                     WHERE nar_hash = ?1 AND damaged IS NULL",
                )?
                .query_row([nar_hash.as_bytes()], nar_row)
                .optional()
        })
        .await
    }

    /// Returns a NAR that is stored, for somebody who is about to name it: the collector lets it be for
    /// another day.
    pub async fn hold_nar(&self, nar_hash: NarHash) -> Result<Option<StoredNar>, CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached(
                    "UPDATE nars SET unused_since = NULL
                     WHERE nar_hash = ?1 AND unused_since IS NOT NULL",
                )?
                .execute([nar_hash.as_bytes()])?;
            transaction
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars
                     WHERE nar_hash = ?1 AND damaged IS NULL",
                )?
                .query_row([nar_hash.as_bytes()], nar_row)
                .optional()
        })
        .await
    }

    /// Whether a complete path of this cache has the NAR: who may read the cache may read that.
    ///
    /// A path that a collection has hidden counts: who read its narinfo before comes for the NAR after,
    /// and the collection may yet find that it is in use. Its NAR is there for another day anyway.
    pub async fn cache_has_nar(&self, cache: i64, nar_hash: NarHash) -> Result<bool, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT 1 FROM paths WHERE cache = ?1 AND nar_hash = ?2 AND state IN (1, 2)",
                )?
                .exists(params![cache, nar_hash.as_bytes()])
        })
        .await
    }

    /// Notes that a NAR is stored, and under which name it came into a cache, if it has one.
    pub async fn received(
        &self,
        nar: StoredNar,
        came: Option<(i64, String)>,
        now: u64,
    ) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            insert_nar(transaction, &nar, now)?;
            if let Some((cache, name)) = came {
                transaction
                    .prepare_cached(
                        "INSERT INTO received (cache, name, nar_hash, at) VALUES (?1, ?2, ?3, ?4)
                         ON CONFLICT (cache, name) DO UPDATE SET nar_hash = ?3, at = ?4",
                    )?
                    .execute(params![cache, name, nar.nar_hash.as_bytes(), signed(now)])?;
            }
            Ok(())
        })
        .await
    }

    /// Returns the NAR that came into a cache under this name.
    pub async fn received_as(
        &self,
        cache: i64,
        name: String,
    ) -> Result<Option<StoredNar>, CatalogError> {
        self.read(move |connection| find_received(connection, cache, &name))
            .await
    }

    /// Returns the NAR that came into a cache under this name, for somebody who will not send it again: it
    /// is kept as if it had come just now.
    pub async fn hold_received(
        &self,
        cache: i64,
        name: String,
        now: u64,
    ) -> Result<Option<StoredNar>, CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached("UPDATE received SET at = ?3 WHERE cache = ?1 AND name = ?2")?
                .execute(params![cache, name, signed(now)])?;
            find_received(transaction, cache, &name)
        })
        .await
    }

    /// Notes that a path of the cache has the NAR that came into it: it counts as that path's from here on.
    pub async fn described(&self, cache: i64, nar_hash: NarHash) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached("UPDATE received SET at = 0 WHERE cache = ?1 AND nar_hash = ?2")?
                .execute(params![cache, nar_hash.as_bytes()])
                .map(drop)
        })
        .await
    }

    /// Returns how many NARs are in storage, and their bytes.
    pub async fn stored(&self) -> Result<(u64, u64), CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT count(*), coalesce(sum(file_size), 0) FROM nars")?
                .query_row([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))
        })
        .await
    }
}

pub(super) fn insert_nar(
    transaction: &Transaction<'_>,
    nar: &StoredNar,
    now: u64,
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached(
            "INSERT INTO nars (nar_hash, nar_size, file_hash, file_size, stored, scrubbed)
             VALUES (?1, ?2, ?3, ?4, ?5, ?5)
             ON CONFLICT (nar_hash) DO UPDATE SET unused_since = NULL, damaged = NULL, unread = NULL,
             file_hash = ?3, file_size = ?4",
        )?
        .execute(params![
            nar.nar_hash.as_bytes(),
            signed(nar.nar_size),
            nar.file_hash.as_bytes(),
            signed(nar.file_size),
            signed(now),
        ])
        .map(drop)
}

fn find_received(
    connection: &Connection,
    cache: i64,
    name: &str,
) -> rusqlite::Result<Option<StoredNar>> {
    connection
        .prepare_cached(
            "SELECT nars.nar_hash, nar_size, file_hash, file_size
             FROM received JOIN nars ON nars.nar_hash = received.nar_hash
             WHERE cache = ?1 AND name = ?2 AND damaged IS NULL",
        )?
        .query_row(params![cache, name], nar_row)
        .optional()
}

pub fn nar_row(row: &Row<'_>) -> rusqlite::Result<StoredNar> {
    Ok(StoredNar {
        nar_hash: NarHash::from_bytes(row.get(0)?),
        nar_size: unsigned(row, 1)?,
        file_hash: FileHash::from_bytes(row.get(2)?),
        file_size: unsigned(row, 3)?,
    })
}
