//! Rebuild: the catalog made anew from the bucket alone.
//!
//! Every `cache.json`, every narinfo below it, and for each the NAR that it names: its object must be
//! there with the size that the narinfo says. What does not fit is left out and counted, never
//! deleted. Of tokens the bucket knows only which were revoked; times of last use it does not know, and
//! paths count as used now.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use granary_protocol::narinfo::NarInfo;
use granary_protocol::store_path::{StoreDir, StorePath};
use tracing::{info, warn};

use super::cache::{CacheName, Settings};
use super::catalog::{Catalog, CatalogError, NewPath, PathRow, StoredNar, forget_cache};
use super::object_store::{ObjectStore, StorageError};
use super::{
    NARINFO_BYTES_MAX, OpenError, Options, begin, check_format, make_folders, nar_key, nar_url,
    revoked,
};

pub(super) const CACHES_FOLDER: &str = "caches";

/// What a rebuild found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub caches: u64,
    pub paths: u64,
    /// Objects that are no narinfo of ours, or whose NAR is missing, or no revocation.
    pub left_out: u64,
}

/// Whether a bucket holds any cache.
pub async fn holds_caches(storage: &ObjectStore) -> Result<bool, StorageError> {
    Ok(storage.list(CACHES_FOLDER).try_next().await?.is_some())
}

/// Makes the catalog of the anchor's state folder say what the bucket holds, and nothing else of caches and paths. Of
/// a catalog that is there, tokens stay.
///
/// Safe to be repeated; interrupted, the next start looks into the bucket for each path. Not to be run beside an
/// anchor.
pub async fn rebuild(options: &Options) -> Result<Found, OpenError> {
    make_folders(&options.state, &options.state.join("spool"))?;
    let storage = ObjectStore::open(&options.storage, &options.s3)?;
    let is_begun = check_format(&storage).await?;
    let catalog_file = options.state.join("catalog.sqlite");
    let catalog = Catalog::open(&catalog_file)?;
    if !is_begun {
        begin(&storage, &catalog, &catalog_file).await?;
    }
    let mut found = Found {
        // First, for a catalog that serves must know them.
        left_out: revoked::restore(&catalog, &storage).await?,
        ..Found::default()
    };
    let deleted = catalog.deletions().await?;
    catalog.begin_rebuild().await?;
    let mut ids = BTreeSet::new();
    let (caches, left_out) = caches(&storage).await?;
    found.left_out += left_out;
    for (name, settings) in caches {
        if deleted.contains(&name) {
            warn!(cache = %name, "left out a cache that is being deleted");
            continue;
        }
        let dir = match settings.store_dir() {
            Ok(dir) => dir,
            Err(error) => {
                warn!(cache = %name, %error, "left out a cache with malformed settings");
                found.left_out += 1;
                continue;
            }
        };
        let id = catalog
            .set_cache(&name, &settings, options.clock.now())
            .await?;
        found.caches += 1;
        ids.insert(id);
        let mut objects = storage.list(&name.narinfo_folder());
        while let Some(object) = objects.try_next().await? {
            match read_path(&storage, &name, &dir, &object.key).await? {
                Some((path, nar, references)) => {
                    let (hash, text) = (path.hash, path.narinfo.clone());
                    let new = NewPath {
                        cache: id,
                        path,
                        references,
                        nar,
                        // In the order of the bucket, references may come later.
                        is_complete: false,
                        subject: None,
                        now: options.clock.now(),
                    };
                    catalog.begin_path(new).await?;
                    catalog.finish_path(id, hash, text).await?;
                    found.paths += 1;
                }
                None => {
                    warn!(key = object.key, "left out what is no complete path");
                    found.left_out += 1;
                }
            }
        }
        info!(cache = %name, paths = found.paths, "rebuilt the catalog of a cache");
    }
    catalog.end_rebuild(ids).await?;
    Ok(found)
}

impl Catalog {
    /// Takes every path for one of which it is not known whether its narinfo is in the bucket.
    async fn begin_rebuild(&self) -> Result<(), CatalogError> {
        self.write(|transaction| {
            // Its NAR may be gone; Nix puts it again.
            transaction.execute("DELETE FROM received", [])?;
            transaction
                .execute("UPDATE paths SET state = 0", [])
                .map(drop)
        })
        .await
    }

    /// Forgets the paths, NARs and caches that were not found.
    async fn end_rebuild(&self, found: BTreeSet<i64>) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            let known: Vec<i64> = transaction
                .prepare("SELECT id FROM caches")?
                .query_map([], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            for cache in known.into_iter().filter(|cache| !found.contains(cache)) {
                forget_cache(transaction, cache)?;
            }
            transaction.execute("DELETE FROM paths WHERE state <> 1", [])?;
            for table in ["edges", "rewrites"] {
                let lost = format!(
                    "DELETE FROM {table} WHERE NOT EXISTS (SELECT 1 FROM paths
                     WHERE paths.cache = {table}.cache AND paths.hash = {table}.hash)"
                );
                transaction.execute(&lost, [])?;
            }
            let unnamed = "DELETE FROM nars WHERE NOT EXISTS
                           (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)";
            transaction.execute(unnamed, []).map(drop)
        })
        .await
    }
}

/// Returns the caches, and of how many the settings are not to be read.
async fn caches(storage: &ObjectStore) -> Result<(Vec<(CacheName, Settings)>, u64), StorageError> {
    // A bucket cannot be asked for its folders by every store alike; the listing names them all.
    let mut names = BTreeSet::new();
    let mut objects = storage.list(CACHES_FOLDER);
    while let Some(object) = objects.try_next().await? {
        let name = object.key.split('/').nth(1).map(CacheName::new);
        if let Some(Ok(name)) = name {
            names.insert(name);
        }
    }
    let (mut caches, mut left_out) = (Vec::new(), 0);
    for name in names {
        let json = storage.get(&name.settings_key(), NARINFO_BYTES_MAX).await?;
        match json.as_deref().map(Settings::from_json) {
            Some(Ok(settings)) => caches.push((name, settings)),
            Some(Err(error)) => {
                warn!(cache = %name, %error, "left out a cache with malformed settings");
                left_out += 1;
            }
            None => warn!(cache = %name, "left out a cache without settings, it was being deleted"),
        }
    }
    Ok((caches, left_out))
}

type Complete = (
    PathRow,
    StoredNar,
    Vec<granary_protocol::store_path::StorePathHash>,
);

/// Reads one narinfo; `None` when it, or its NAR, is not what it should be.
async fn read_path(
    storage: &ObjectStore,
    cache: &CacheName,
    dir: &StoreDir,
    key: &str,
) -> Result<Option<Complete>, StorageError> {
    let Some(bytes) = storage.get(key, NARINFO_BYTES_MAX).await? else {
        return Ok(None);
    };
    let Ok(text) = String::from_utf8(bytes.to_vec()) else {
        return Ok(None);
    };
    let Ok(narinfo) = NarInfo::parse(&text, dir) else {
        return Ok(None);
    };
    let hash = narinfo.store_path.hash();
    let (Some(file_hash), Some(file_size)) = (narinfo.file_hash, narinfo.file_size) else {
        return Ok(None);
    };
    let is_own = cache.narinfo_key(&hash) == key && narinfo.url == nar_url(&narinfo.nar_hash);
    if !is_own || storage.size(&nar_key(&narinfo.nar_hash)).await? != Some(file_size) {
        return Ok(None);
    }
    let references = narinfo.references.iter().map(StorePath::hash);
    let references = references.filter(|reference| *reference != hash).collect();
    let path = PathRow {
        hash,
        base_name: narinfo.store_path.base_name(),
        nar_hash: narinfo.nar_hash,
        narinfo: text,
    };
    let nar = StoredNar {
        nar_hash: narinfo.nar_hash,
        nar_size: narinfo.nar_size,
        file_hash,
        file_size,
    };
    Ok(Some((path, nar, references)))
}
