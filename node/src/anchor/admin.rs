//! Administration of caches: make, configure, rotate, delete.
//!
//! The order survives a crash: a key is written before the settings that name it, settings go into
//! the bucket before the catalog, and a cache that is deleted disappears from the catalog first ([`deletion`]).

use std::collections::BTreeSet;

use granary_protocol::narinfo::NarInfo;
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::{StoreDir, StorePathHash};

use super::Anchor;
use super::cache::{
    CacheName, KEYS_MAX, Keys, KeysError, PinName, Settings, SettingsError, next_key_name,
};
use super::catalog::{CacheRow, Catalog, CatalogError, PathRow};
use super::ingest::finish;
use super::object_store::StorageError;

mod administration;
mod deletion;

pub use administration::{Administration, AdministrationError};

/// Paths that are signed again between two looks at the catalog.
const RESIGN_BATCH: usize = 256;

/// What a cache shall be like; `None` leaves a setting as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    pub public: Option<bool>,
    pub priority: Option<i32>,
    pub store_dir: Option<String>,
    pub upstream_keys: Option<Vec<String>>,
    /// `Some(None)`: for ever.
    pub retention: Option<Option<u64>>,
    /// `Some(None)`: no limit.
    pub size_cap: Option<Option<u64>>,
    pub quota: Option<Option<u64>>,
    pub subject_quota: Option<Option<u64>>,
    /// Paths that are kept whatever the retention says.
    pub pinned: Vec<StorePathHash>,
    /// Under which name they are pinned, the last of them as the newest, and how many of that name stay.
    pub pinned_as: Option<(PinName, Option<usize>)>,
    /// Whatever name they have.
    pub unpinned: Vec<StorePathHash>,
    /// All pins of a name.
    pub unpinned_name: Option<PinName>,
}

/// Why a cache could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cache {name} exists already")]
    Exists { name: CacheName },
    #[error("there is no cache {name}")]
    NoSuchCache { name: CacheName },
    #[error("cache {name} has paths of {found}, its store directory cannot become {wanted}")]
    StoreDir {
        name: CacheName,
        found: String,
        wanted: String,
    },
    #[error("cache {name} does not hold {absent} of the paths that are to be pinned")]
    Pin { name: CacheName, absent: usize },
    #[error(transparent)]
    Administration(#[from] AdministrationError),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl Changes {
    fn apply(&self, settings: &mut Settings) {
        let changes = self.clone();
        settings.public = changes.public.unwrap_or(settings.public);
        settings.priority = changes.priority.unwrap_or(settings.priority);
        settings.retention = changes.retention.unwrap_or(settings.retention);
        settings.size_cap = changes.size_cap.unwrap_or(settings.size_cap);
        settings.quota = changes.quota.unwrap_or(settings.quota);
        settings.subject_quota = changes.subject_quota.unwrap_or(settings.subject_quota);
        let pinned = changes.pinned.iter().map(ToString::to_string);
        match changes.pinned_as {
            None => settings.pins.extend(pinned),
            Some((name, keep)) => {
                let pins = settings.named_pins.entry(name).or_default();
                for pin in pinned {
                    pins.retain(|known| *known != pin);
                    pins.insert(0, pin);
                }
                pins.truncate(keep.unwrap_or(usize::MAX));
            }
        }
        for pin in &changes.unpinned {
            let pin = pin.to_string();
            settings.pins.remove(&pin);
            for pins in settings.named_pins.values_mut() {
                pins.retain(|known| *known != pin);
            }
        }
        if let Some(name) = &changes.unpinned_name {
            settings.named_pins.remove(name);
        }
        settings.named_pins.retain(|_, pins| !pins.is_empty());
        if let Some(store_dir) = changes.store_dir {
            settings.store_dir = store_dir;
        }
        if let Some(upstream_keys) = changes.upstream_keys {
            settings.upstream_keys = upstream_keys;
        }
    }
}

impl Anchor {
    /// Makes a cache that signs with this key, or with a new one.
    pub async fn create_cache(
        &self,
        name: &CacheName,
        changes: &Changes,
        key: Option<SecretKey>,
    ) -> Result<CacheRow, AdminError> {
        let _held = self.administration.hold().await?;
        if self.catalog.cache(name).await?.is_some() {
            return Err(AdminError::Exists { name: name.clone() });
        }
        if self.is_being_deleted(name).await? {
            self.end_deletion(name).await?;
        }
        let key = match key {
            Some(key) => key,
            None => Keys::generate(next_key_name(name, &[]))?,
        };
        let mut settings = Settings::new(&key.public_key());
        changes.apply(&mut settings);
        settings.check()?;
        self.store_keys(name, vec![key]).await?;
        self.store_settings(name, settings).await
    }

    /// Changes settings of a cache.
    pub async fn configure_cache(
        &self,
        name: &CacheName,
        changes: &Changes,
    ) -> Result<CacheRow, AdminError> {
        let _held = self.administration.hold().await?;
        let cache = self.existing(name).await?;
        let mut settings = cache.settings;
        let found = settings.store_dir.clone();
        changes.apply(&mut settings);
        settings.check()?;
        if settings.store_dir != found && self.catalog.totals(Some(cache.id)).await?.paths > 0 {
            return Err(AdminError::StoreDir {
                name: name.clone(),
                found,
                wanted: settings.store_dir,
            });
        }
        let used: Vec<_> = changes
            .pinned
            .iter()
            .map(|hash| ((cache.id, *hash), self.now()))
            .collect();
        let pinned = used.len();
        // A collection that was planned before sees that they are used. Before settings, which would let older pins go
        // for one that is not there.
        let found = self.catalog.used(used).await?;
        if found < pinned {
            return Err(AdminError::Pin {
                name: name.clone(),
                absent: pinned - found,
            });
        }
        self.store_settings(name, settings).await
    }

    /// Gives a cache another signing key, imported or new, and signs every path with it.
    ///
    /// The old keys go on signing, until `retire` leaves only the first, once that has signed everything.
    /// So after a crash anywhere every path is signed by a key that the settings name. Not beside a running anchor in another process, whose collector would not know
    /// of it.
    pub async fn rotate_key(
        &self,
        name: &CacheName,
        key: Option<SecretKey>,
        retire: bool,
    ) -> Result<CacheRow, AdminError> {
        let _held = self.administration.hold().await?;
        let cache = self.existing(name).await?;
        // Before anything says that it has begun.
        let (store, checked) = (self.keys.clone(), name.clone());
        let check = move || store.check_changeable(&checked);
        let checked = tokio::task::spawn_blocking(check).await;
        checked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        let mut keys = match self.signing_keys(name).await {
            // After the state folder was lost.
            Err(KeysError::Missing { .. }) => Vec::new(),
            keys => keys?,
        };
        if retire {
            // The rotation may have been interrupted, and some paths be signed by the old keys alone.
            self.sign_again(&cache, &keys).await?;
            keys.truncate(1);
        } else {
            let key = match key {
                Some(key) => key,
                None => Keys::generate(next_key_name(name, &cache.settings.public_keys))?,
            };
            keys.retain(|old| old.name() != key.name());
            keys.insert(0, key);
            // More would not be read back.
            if keys.len() > KEYS_MAX {
                return Err(KeysError::Enough {
                    cache: name.clone(),
                }
                .into());
            }
        }
        self.catalog.begin_rotation(cache.id).await?;
        {
            // A push that signs with the old keys is listed, or done, before paths are signed again.
            let _alone = self.signing.write().await;
            self.store_keys(name, keys.clone()).await?;
        }
        self.end_rotation(cache, &keys).await
    }

    /// Has the settings name the keys that there are, and everything signed by them.
    async fn end_rotation(
        &self,
        cache: CacheRow,
        keys: &[SecretKey],
    ) -> Result<CacheRow, AdminError> {
        let mut settings = cache.settings;
        settings.public_keys = keys
            .iter()
            .map(|key| key.public_key().to_string())
            .collect();
        let cache = self.store_settings(&cache.name, settings).await?;
        self.sign_again(&cache, keys).await?;
        self.catalog.end_rotation(cache.id).await?;
        Ok(cache)
    }

    /// Finishes rotations that the last run left; one that cannot be finished waits for the next start. Safe
    /// beside pushes.
    pub async fn resume_rotations(&self) -> Result<(), AdminError> {
        let rotating = self.catalog.rotations().await?;
        for cache in self.catalog.caches().await? {
            if !rotating.contains(&cache.id) {
                continue;
            }
            let name = cache.name.clone();
            match self.resume_rotation(cache).await {
                Ok(0) => {}
                Ok(keys) => {
                    tracing::info!(cache = %name, keys, "finished a rotation of keys that was interrupted");
                }
                Err(error) => {
                    tracing::error!(cache = %name, %error, "could not finish a rotation of keys");
                }
            }
        }
        Ok(())
    }

    /// Returns how many keys sign the cache; 0 when there is nothing to finish.
    async fn resume_rotation(&self, cache: CacheRow) -> Result<usize, AdminError> {
        let _held = self.administration.hold().await?;
        // It may have been deleted, or rotated again, since.
        let cache = match self.catalog.cache(&cache.name).await? {
            Some(found) if found.id == cache.id => found,
            _ => return Ok(0),
        };
        let keys = self.signing_keys(&cache.name).await?;
        let cache = self.end_rotation(cache, &keys).await?;
        Ok(cache.settings.public_keys.len())
    }

    async fn sign_again(&self, cache: &CacheRow, keys: &[SecretKey]) -> Result<(), AdminError> {
        let dir = cache.settings.store_dir()?;
        let mut after = None;
        loop {
            let paths = self
                .catalog
                .paths_after(cache.id, after, RESIGN_BATCH)
                .await?;
            let Some(last) = paths.last() else {
                return Ok(());
            };
            after = Some(last.hash);
            let mut unsigned = Vec::new();
            for path in &paths {
                if self.signed_again(cache, path, keys, &dir).await?.is_some() {
                    unsigned.push(path.hash);
                }
            }
            self.catalog
                .begin_rewrites(cache.id, unsigned.clone())
                .await?;
            for hash in unsigned {
                let _held = self.path_locks.lock((cache.id, hash)).await;
                // It may have been removed, or published anew, since the batch was read.
                let text = match self.catalog.path_row(cache.id, hash).await? {
                    Some(path) => self.signed_again(cache, &path, keys, &dir).await?,
                    None => None,
                };
                match text {
                    Some(text) => {
                        let key = cache.name.narinfo_key(&hash);
                        self.storage.put(&key, text.clone().into()).await?;
                        self.catalog.finish_path(cache.id, hash, text).await?;
                    }
                    None => self.catalog.forget_rewrite(cache.id, hash).await?,
                }
            }
        }
    }

    /// Returns a path's narinfo with the signatures of these keys; `None` when it has them.
    async fn signed_again(
        &self,
        cache: &CacheRow,
        path: &PathRow,
        keys: &[SecretKey],
        dir: &StoreDir,
    ) -> Result<Option<String>, AdminError> {
        let stored = self.catalog.nar_row(path.nar_hash).await?;
        let (Ok(mut narinfo), Some(stored)) = (NarInfo::parse(&path.narinfo, dir), stored) else {
            tracing::error!(cache = %cache.name, hash = %path.hash, "could not sign a path again, its narinfo is malformed");
            return Ok(None);
        };
        finish(&mut narinfo, &stored, keys, &self.trust, dir);
        let text = narinfo.to_text(dir);
        Ok((text != path.narinfo).then_some(text))
    }

    async fn existing(&self, name: &CacheName) -> Result<CacheRow, AdminError> {
        let cache = self.catalog.cache(name).await?;
        cache.ok_or_else(|| AdminError::NoSuchCache { name: name.clone() })
    }

    async fn store_keys(&self, name: &CacheName, keys: Vec<SecretKey>) -> Result<(), KeysError> {
        let (store, name) = (self.keys.clone(), name.clone());
        let stored = tokio::task::spawn_blocking(move || store.store(&name, &keys)).await;
        stored.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    async fn store_settings(
        &self,
        name: &CacheName,
        settings: Settings,
    ) -> Result<CacheRow, AdminError> {
        let json = settings.to_json();
        self.storage.put(&name.settings_key(), json.into()).await?;
        let id = self.catalog.set_cache(name, &settings, self.now()).await?;
        Ok(CacheRow {
            id,
            name: name.clone(),
            settings,
        })
    }
}

impl Catalog {
    async fn begin_rotation(&self, cache: i64) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            let insert = "INSERT OR IGNORE INTO rotations (cache) VALUES (?1)";
            transaction.execute(insert, [cache]).map(drop)
        })
        .await
    }

    async fn end_rotation(&self, cache: i64) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            let delete = "DELETE FROM rotations WHERE cache = ?1";
            transaction.execute(delete, [cache]).map(drop)
        })
        .await
    }

    async fn rotations(&self) -> Result<BTreeSet<i64>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT cache FROM rotations")?
                .query_map([], |row| row.get(0))?
                .collect()
        })
        .await
    }
}
