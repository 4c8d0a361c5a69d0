//! The anchor: the durable role, which keeps what machines collect or lose, and signs it centrally.
//!
//! Object storage holds everything that is needed to start again; SQLite is an index of it that can
//! be made anew; the signing keys stay in the state folder (DESIGN §7).
//!
//! ```text
//! granary.json                                  format version
//! nar/<2>/<narhash>.nar.zst                     zstd in frames of 4 MiB, with a seek table
//! caches/<name>/cache.json                      settings and public keys
//! caches/<name>/narinfo/<hash>.narinfo          complete, validated, signed; written last
//! caches/<name>/files/…                         logs, listings and realisations as clients sent them
//! revoked/<digest>.json                         tokens that count no more
//! ```
//!
//! Invariants: bytes first, no narinfo without its NAR, no row without content; what was acknowledged
//! is in the bucket; only what was hashed here is signed; a cache that is not public says nothing to
//! those who may not read it, not even that it exists.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use granary_protocol::hash::NarHash;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::StorePathHash;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

pub mod object_store;
pub mod frames;
pub mod catalog;
pub mod uses;
pub mod cache;
pub mod revoked;
pub mod tokens;
pub mod oidc;
pub mod members;
pub mod intake;
pub mod ingest;
pub mod sizes;
pub mod gc;
pub mod scrub;
pub mod heal;
pub mod admin;
pub mod counts;
pub mod health;
pub mod tls;
pub mod accesses;
pub mod sessions;
pub mod http;
pub mod page;
pub mod stock;
pub mod read;
pub mod published;
pub mod repack;
pub mod put;
pub mod attic;
pub mod uploads;
pub mod rebuild;
pub mod import;
pub mod server;

use crate::binary_cache::{Unpackers, WebSetupError};
use crate::mesh::revocations::RevocationsFileError;

use self::object_store::{ObjectStore, S3Options, SetupError, StorageError};
use cache::Keys;
use catalog::{Catalog, CatalogError};
use tokens::{TokenKeyError, Tokens};
use uses::{CachePath, Uses};

/// The layout that this version writes and reads.
const FORMAT: u32 = 1;

const FORMAT_KEY: &str = "granary.json";

/// Largest object of text that is read from the bucket: that of a narinfo.
const NARINFO_BYTES_MAX: u64 = granary_protocol::narinfo::NARINFO_BYTES_MAX as u64;

/// NARs that are taken in at once; the others wait. With 16 MiB each, and a decompressor, this keeps
/// the anchor below 512 MiB.
const INTAKES_PARALLEL: usize = 16;

/// The wall clock; a test may set it ahead.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    ahead_seconds: Arc<AtomicU64>,
}

impl Clock {
    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.unwrap_or_default().as_secs() + self.ahead_seconds.load(Ordering::Relaxed)
    }

    pub fn advance(&self, by: Duration) {
        self.ahead_seconds
            .fetch_add(by.as_secs(), Ordering::Relaxed);
    }
}

/// What an anchor is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// The anchor's own folder: catalog, keys, spool.
    pub state: PathBuf,
    /// `file:///folder`, `s3://bucket/prefix` or `memory:`.
    pub storage: String,
    pub s3: S3Options,
    /// Keys whose signatures are kept on paths that come with them.
    pub trust: TrustedKeys,
    /// Where the key is that proves Attic's tokens.
    pub attic_key: Option<PathBuf>,
    /// Issuers whose tokens are traded for ours.
    pub oidc: Vec<oidc::Options>,
    /// The mesh whose members get tokens by their certificates.
    pub members: Option<members::Options>,
    /// Largest NAR taken in.
    pub nar_bytes_max: u64,
    /// What the server shows to clients; plain HTTP without.
    pub tls: Option<tls::Files>,
    /// After how long a stored NAR is read again, by and by; never without.
    pub scrub_after: Option<Duration>,
    /// Whom to ask for NARs that were found damaged, the nearest first.
    pub heal_from: Vec<heal::Source>,
    pub clock: Clock,
}

/// Why an anchor does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot make the anchor's state folder {path}: {source}", path = .path.display())]
    State { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(
        "storage {location} has format {found}, this granary knows {FORMAT}, refusing to touch it"
    )]
    Format { location: String, found: u32 },
    #[error("{FORMAT_KEY} in storage {location} is malformed: {source}")]
    Malformed {
        location: String,
        source: serde_json::Error,
    },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    TokenKey(#[from] TokenKeyError),
    #[error(transparent)]
    Issuer(#[from] oidc::IssuerError),
    #[error(transparent)]
    Revocations(#[from] RevocationsFileError),
    #[error(transparent)]
    Revoked(#[from] revoked::RevokeError),
    #[error(transparent)]
    Sources(#[from] WebSetupError),
    #[error(
        "storage {location} holds caches that the catalog {path} does not know: run granary anchor rebuild",
        path = .path.display()
    )]
    CatalogLost { location: String, path: PathBuf },
    #[error(
        "storage {location} has no {FORMAT_KEY}, but the catalog {path} knows what was stored there, refusing to touch it: mount its disk or bring it back; if all of it is lost, move the catalog away to begin anew",
        path = .path.display()
    )]
    StorageLost { location: String, path: PathBuf },
}

/// An open anchor.
pub struct Anchor {
    pub storage: ObjectStore,
    pub catalog: Catalog,
    pub tokens: Tokens,
    keys: Keys,
    trust: TrustedKeys,
    spool: PathBuf,
    nar_bytes_max: u64,
    clock: Clock,
    /// Held while a NAR is stored, or deleted.
    nar_locks: Locks<NarHash>,
    /// Held while a path's narinfo and row change. Taken after the NAR's.
    path_locks: Locks<CachePath>,
    intakes: Semaphore,
    uploads: uploads::Uploads,
    /// Read by those who sign with the keys that there are, written by those who change the keys.
    signing: tokio::sync::RwLock<()>,
    /// Serialises what reads settings, changes and writes them.
    administration: admin::Administration,
    /// One collection at a time.
    collecting: tokio::sync::Mutex<()>,
    uses: Uses,
    counts: counts::Counts,
    fullness: sizes::Fullness,
    health: health::Health,
    accesses: accesses::Accesses,
    sessions: sessions::Sessions,
    issuers: Option<oidc::Issuers>,
    members: Option<Arc<members::Members>>,
    sources: heal::Sources,
    unpackers: Unpackers,
    batches: read::Batches,
}

#[derive(Serialize, Deserialize)]
struct Format {
    format: u32,
}

impl Anchor {
    /// Opens storage, catalog and keys; makes what is missing. Blocks for a moment.
    pub async fn open(options: Options) -> Result<Arc<Anchor>, OpenError> {
        let spool = options.state.join("spool");
        let catalog_file = options.state.join("catalog.sqlite");
        let is_new = !catalog_file.exists();
        make_folders(&options.state, &spool)?;
        let storage = ObjectStore::open(&options.storage, &options.s3)?;
        let storage = storage.noting(&options.state.join("multipart"));
        let is_begun = check_format(&storage).await?;
        let catalog = Catalog::open(&catalog_file)?;
        if !is_begun {
            begin(&storage, &catalog, &catalog_file).await?;
        }
        if is_new && rebuild::holds_caches(&storage).await? {
            // Left as it was, so that the next start says the same.
            for suffix in ["", "-wal", "-shm"] {
                let mut file = catalog_file.clone().into_os_string();
                file.push(suffix);
                let _ = fs::remove_file(file);
            }
            return Err(OpenError::CatalogLost {
                location: options.storage,
                path: catalog_file,
            });
        }
        Anchor::assemble(options, spool, storage, catalog)
    }

    fn assemble(
        options: Options,
        spool: PathBuf,
        storage: ObjectStore,
        catalog: Catalog,
    ) -> Result<Arc<Anchor>, OpenError> {
        let token_key = tokens::token_key(&options.state)?;
        let public = token_key.public_key();
        let issuers = match options.oidc.is_empty() {
            true => None,
            false => Some(oidc::Issuers::new(options.oidc, token_key.clone())?),
        };
        let members = options.members;
        let members = members.map(|options| members::Members::new(options, token_key));
        let members = members.transpose()?.map(Arc::new);
        let attic = options.attic_key.as_deref().map(tokens::attic_key);
        Ok(Arc::new(Anchor {
            tokens: Tokens::new(
                catalog.clone(),
                storage.clone(),
                public,
                attic.transpose()?,
                members.clone(),
            ),
            issuers,
            members,
            sources: heal::Sources::new(options.heal_from)?,
            unpackers: Unpackers::default(),
            batches: read::Batches::default(),
            keys: Keys::in_folder(&options.state),
            trust: options.trust,
            nar_bytes_max: options.nar_bytes_max,
            clock: options.clock,
            storage,
            catalog,
            nar_locks: Locks::default(),
            path_locks: Locks::default(),
            intakes: Semaphore::new(INTAKES_PARALLEL),
            uploads: uploads::Uploads::new(&spool),
            spool,
            signing: tokio::sync::RwLock::new(()),
            administration: admin::Administration::in_folder(&options.state),
            collecting: tokio::sync::Mutex::new(()),
            uses: Uses::default(),
            counts: counts::Counts::default(),
            fullness: sizes::Fullness::default(),
            health: health::Health::default(),
            accesses: accesses::Accesses::default(),
            sessions: sessions::Sessions::default(),
        }))
    }

    fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Whether storage is the one that the anchor began with, and not the empty folder of a disk that is not mounted.
    async fn has_own_storage(&self) -> Result<bool, StorageError> {
        Ok(self.storage.size(FORMAT_KEY).await?.is_some())
    }

    /// Notes that somebody is about to be told that a path is here, and will rely on it; `false` when it is
    /// on its way out.
    fn note_use(&self, cache: i64, hash: StorePathHash) -> bool {
        self.uses.note((cache, hash), self.now())
    }

    /// Writes down which paths were used since the last time.
    pub async fn write_used(&self) -> Result<(), CatalogError> {
        let noted = self.uses.noted();
        if noted.is_empty() {
            return Ok(());
        }
        self.catalog.used(noted.clone()).await?;
        // Until here the collector must find them in one place or the other.
        self.uses.written(&noted);
        Ok(())
    }
}

/// Runs a change to its end, also when whoever asked for it goes away meanwhile: storage may do what it was
/// asked for after the locks around it are gone, and undo what came next.
async fn to_its_end<T: Send + 'static>(change: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(change).await {
        Ok(outcome) => outcome,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is ending, and with it whoever waits here.
        Err(_) => std::future::pending().await,
    }
}

fn make_folders(state: &Path, spool: &Path) -> Result<(), OpenError> {
    for folder in [state, spool] {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder);
        made.map_err(|source| OpenError::State {
            path: folder.to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// Whether storage says that an anchor has begun with it.
///
/// # Errors
/// When it says that in another format.
async fn check_format(storage: &ObjectStore) -> Result<bool, OpenError> {
    let Some(bytes) = storage.get(FORMAT_KEY, NARINFO_BYTES_MAX).await? else {
        return Ok(false);
    };
    match serde_json::from_slice::<Format>(&bytes) {
        Ok(Format { format: FORMAT }) => Ok(true),
        Ok(Format { format: found }) => Err(OpenError::Format {
            location: storage.location().to_owned(),
            found,
        }),
        Err(source) => Err(OpenError::Malformed {
            location: storage.location().to_owned(),
            source,
        }),
    }
}

/// Marks storage as begun with.
///
/// # Errors
/// When the catalog knows what was stored: a disk that is not mounted is an empty folder, which would count as the
/// right one from then on.
async fn begin(storage: &ObjectStore, catalog: &Catalog, path: &Path) -> Result<(), OpenError> {
    if !catalog.is_empty().await? {
        return Err(OpenError::StorageLost {
            location: storage.location().to_owned(),
            path: path.to_owned(),
        });
    }
    let format = Format { format: FORMAT };
    let text = serde_json::to_string(&format).unwrap_or_else(|_| unreachable!("a number"));
    storage.put(FORMAT_KEY, text.into()).await?;
    Ok(())
}

/// Where a NAR lies in the bucket: 1,024 folders, so that none grows beyond what file systems like.
pub fn nar_key(nar_hash: &NarHash) -> String {
    let name = nar_hash.nix32();
    let (folder, _) = name.split_at(2);
    format!("nar/{folder}/{name}.nar.zst")
}

/// Under which URL a NAR is served, relative to the cache. It says nothing but the contents, so it
/// stays true for as long as clients remember it.
pub fn nar_url(nar_hash: &NarHash) -> String {
    format!("nar/{}.nar.zst", nar_hash.nix32())
}

/// One lock for each thing that is being changed.
struct Locks<K>(Mutex<BTreeMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for Locks<K> {
    fn default() -> Locks<K> {
        Locks(Mutex::default())
    }
}

impl<K: Ord> Locks<K> {
    async fn lock(&self, key: K) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // As many as there are requests at most, once those that nobody holds are gone.
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(&key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(key, Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
