//! Revoked: tokens that count no more, as the bucket remembers them.
//!
//! What proves a token outlives the catalog: our key is copied with a backup, Attic's is another's. So a revocation
//! lies in the bucket as well, `revoked/<SHA-256 of the id>.json`, from where a rebuild puts it into the catalog,
//! which is what requests look at. An id, or the digest of a token without one, opens nothing.

use std::collections::{BTreeMap, BTreeSet};

use futures::TryStreamExt;
use granary_protocol::hash::sha256;
use granary_protocol::nix32;
use rusqlite::params;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::catalog::{Catalog, CatalogError, signed, unsigned};
use super::object_store::{ObjectStore, StorageError};

const FOLDER: &str = "revoked";

/// Largest such object: an id is some 20 characters, another anchor's at most what a token has.
const BYTES_MAX: u64 = 64 * 1024;

/// Why a revocation is not sure to last.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(
        "the token counts no more, but would again if the catalog had to be rebuilt: {source}; revoke it again when storage answers"
    )]
    Storage {
        #[from]
        source: StorageError,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Revocation {
    id: String,
    /// Seconds since 1970.
    at: u64,
}

fn key(id: &str) -> String {
    format!("{FOLDER}/{}.json", nix32::encode(&sha256(id.as_bytes())))
}

/// Revokes an id from the next request on, then for ever; `false` when it was before.
pub async fn revoke(
    catalog: &Catalog,
    storage: &ObjectStore,
    id: String,
    at: u64,
) -> Result<bool, RevokeError> {
    let is_new = insert(catalog, id.clone(), at).await?;
    // Also when it was before: storage may have failed then.
    keep(storage, Revocation { id, at }).await?;
    Ok(is_new)
}

async fn insert(catalog: &Catalog, id: String, at: u64) -> Result<bool, CatalogError> {
    let inserted = catalog.write(move |transaction| {
        transaction.execute(
            "INSERT OR IGNORE INTO revoked (id, at) VALUES (?1, ?2)",
            params![id, signed(at)],
        )
    });
    Ok(inserted.await? > 0)
}

async fn keep(storage: &ObjectStore, revocation: Revocation) -> Result<(), StorageError> {
    let object = serde_json::json!(revocation).to_string();
    storage.put(&key(&revocation.id), object.into()).await
}

/// Puts what the bucket remembers into a catalog; returns how many objects are no revocation.
pub async fn restore(catalog: &Catalog, storage: &ObjectStore) -> Result<u64, RevokeError> {
    let mut left_out = 0;
    let mut objects = storage.list(FOLDER);
    while let Some(object) = objects.try_next().await? {
        let bytes = match storage.get(&object.key, BYTES_MAX).await {
            // None of ours, as one that does not parse.
            Err(StorageError::TooLarge { .. }) => None,
            bytes => bytes?,
        };
        match serde_json::from_slice(&bytes.unwrap_or_default()) {
            Ok(Revocation { id, at }) => {
                insert(catalog, id, at).await?;
            }
            Err(error) => {
                warn!(key = object.key, %error, "left out what is no revocation");
                left_out += 1;
            }
        }
    }
    Ok(left_out)
}

/// Gives the bucket the revocations that only the catalog knows: of a version that kept them nowhere else, or
/// that storage did not take.
pub async fn keep_all(catalog: &Catalog, storage: &ObjectStore) -> Result<(), RevokeError> {
    let known = catalog.read(|connection| {
        let mut statement = connection.prepare("SELECT id, at FROM revoked")?;
        let revocations = statement.query_map([], |row| {
            let (id, at) = (row.get(0)?, unsigned(row, 1)?);
            Ok(Revocation { id, at })
        })?;
        revocations.collect::<rusqlite::Result<Vec<_>>>()
    });
    let mut missing: BTreeMap<String, Revocation> = BTreeMap::new();
    for revocation in known.await? {
        missing.insert(key(&revocation.id), revocation);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let kept = storage.list(FOLDER).map_ok(|object| object.key);
    let kept: BTreeSet<String> = kept.try_collect().await?;
    missing.retain(|key, _| !kept.contains(key));
    for revocation in missing.into_values() {
        keep(storage, revocation).await?;
    }
    Ok(())
}
