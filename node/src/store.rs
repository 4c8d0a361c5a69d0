//! The local Nix store: what this machine holds, read and never written.
//!
//! [`LocalStore`] is the seam. It answers what is known about a path, gives its NAR from any
//! offset, and tells which paths come and go. [`NixStore`] is the real one: Nix's SQLite database
//! is the truth about validity, the file system has the contents, inotify only says when to look.
//! [`MemoryStore`] is its twin for tests; what an anchor publishes, two stores as one ([`Beside`]), and one that may
//! come later ([`Awaited`]) stand behind the same seam. One conformance suite (`tests/store.rs`) holds for all of them.
//!
//! Invariants: a path is given only while its row is in the database; a NAR whose size differs
//! from the registered one is refused before its first byte; a stream that cannot continue ends
//! in an error and never in padding. Holding a [`Nar`] keeps its path from the garbage collector as
//! far as this machine allows ([`roots`]), until the last stream of it has ended.
//!
//! Build logs, the build trace and debug information ([`Records`]) stand beside the seam, so that
//! nothing which faces peers can come by them.

pub mod database;
pub mod nar;
pub mod roots;
pub mod watcher;
pub mod memory;
pub mod hidden;
pub mod shared;
pub mod beside;
pub mod awaited;
pub mod log;
pub mod trace;
pub mod debug;

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use futures::future::BoxFuture;
use granary_protocol::{
    content_address::ContentAddress,
    hash::{FileHash, NarHash},
    nar::LayoutError,
    narinfo::{Compression, NarInfo, nar_url},
    signature::Signature,
    store_path::{StoreDir, StorePath, StorePathHash},
};
use tokio::sync::mpsc;

pub use awaited::Awaited;
pub use beside::Beside;
pub use database::{Database, RowProblem};
pub use memory::MemoryStore;
pub use nar::{Kept, Nar, NarError};
pub use watcher::StoreEvent;

use nar::{LayoutCache, Opened};
use roots::Roots;

/// Paths of one batch query: as many as one message between peers asks for (DESIGN §5).
pub const BATCH_MAX: usize = 256;

/// A Nix store of this machine.
pub trait LocalStore: Send + Sync {
    /// Returns the directory that store paths are spelled with, wherever the files really are.
    fn dir(&self) -> &StoreDir;

    /// Returns what the store knows about the valid path with this hash; `None` when there is none.
    fn path_info(&self, hash: StorePathHash)
    -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>>;

    /// Returns the same for several hashes at once, in their order.
    ///
    /// A row that is malformed counts as absent here, so that it cannot hide its neighbours.
    /// # Panics
    /// With more than [`BATCH_MAX`] hashes.
    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>>;

    /// Opens the NAR of a path, and holds the path against collection until the result is dropped.
    ///
    /// `None` when the path is valid no longer.
    /// # Errors
    /// [`StoreError::Corrupt`] when the files would make a NAR of another size than registered.
    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>>;

    /// Reports every valid path, then every change, until the receiver is dropped.
    ///
    /// Must be called inside a tokio runtime. A slow receiver delays the watcher, never loses events.
    fn watch(&self) -> mpsc::Receiver<StoreEvent>;
}

/// What the store's database says about one valid path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    pub store_path: StorePath,
    pub nar_hash: NarHash,
    /// Bytes of the uncompressed NAR; never 0.
    pub nar_size: u64,
    /// May contain `store_path` itself.
    pub references: BTreeSet<StorePath>,
    pub deriver: Option<StorePath>,
    /// Well-formed signatures in the order found; not verified.
    pub signatures: Vec<Signature>,
    /// What the path claims to be computed from; not verified.
    pub ca: Option<ContentAddress>,
    /// Whether this machine built the path itself.
    pub ultimate: bool,
    pub registration_time: SystemTime,
    /// The row's number: rises with every registration and is never used again by one database. 0 for what is in
    /// none of Nix.
    pub id: i64,
}

impl PathInfo {
    /// Drops the signatures that are meant for this machine alone; whatever leaves it goes without them.
    pub fn drop_own_signatures(&mut self) {
        self.signatures.retain(|signature| {
            let name = signature.key_name().as_str();
            !name.starts_with(crate::loopback_key::NAME_PREFIX)
        });
    }

    /// Returns the narinfo under which this node serves the path: uncompressed, at its own URL.
    pub fn to_narinfo(&self) -> NarInfo {
        NarInfo {
            store_path: self.store_path.clone(),
            url: nar_url(&self.store_path.hash(), &self.nar_hash),
            compression: Compression::None,
            file_hash: Some(FileHash::from_bytes(*self.nar_hash.as_bytes())),
            file_size: Some(self.nar_size),
            nar_hash: self.nar_hash,
            nar_size: self.nar_size,
            references: self.references.clone(),
            deriver: self.deriver.clone(),
            signatures: self.signatures.clone(),
            ca: self.ca,
            dropped_signatures: 0,
        }
    }
}

/// Where a store's parts are; differs from the defaults for chroot stores and in tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// How paths are spelled in the database: `/nix/store`.
    pub dir: StoreDir,
    /// Where the files are: the same, or `<root>/nix/store` for `nix --store <root>`.
    pub real_dir: PathBuf,
    /// `/nix/var/nix/db/db.sqlite`, or `<root>/nix/var/nix/db/db.sqlite`.
    pub database: PathBuf,
    /// `/nix/var/nix/daemon-socket/socket`; without a daemon there, paths are held by a file.
    pub daemon_socket: PathBuf,
}

impl StoreConfig {
    /// The store of `nix --store <root>`.
    pub fn chroot(dir: StoreDir, root: &Path) -> StoreConfig {
        let database = root.join("nix/var/nix/db/db.sqlite");
        StoreConfig {
            real_dir: root.join(dir.as_str().trim_start_matches('/')),
            daemon_socket: daemon_socket(state_dir(&database)),
            database,
            dir,
        }
    }

    /// Returns Nix's state folder: `/nix/var/nix`.
    pub fn state_dir(&self) -> &Path {
        state_dir(&self.database)
    }
}

/// Returns the state folder in which a database stands, as `<state>/db/db.sqlite`.
pub fn state_dir(database: &Path) -> &Path {
    let state_dir = database.parent().and_then(Path::parent);
    state_dir.unwrap_or(Path::new("/"))
}

/// Returns where the daemon of a store listens.
pub fn daemon_socket(state_dir: &Path) -> PathBuf {
    state_dir.join("daemon-socket").join("socket")
}

/// What Nix keeps beside the store paths. None of it is ever shared with peers.
pub struct Records {
    pub logs: log::BuildLogs,
    /// For the build trace.
    pub database: Arc<Database>,
    pub debug_info: debug::DebugInfo,
}

/// Why the store could not answer. Absence is not an error.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("there is no Nix database at {file}: is Nix installed, and is [store] database right?", file = .file.display())]
    NoDatabase { file: PathBuf },
    #[error("cannot read {file}", file = .file.display())]
    File { file: PathBuf, source: io::Error },
    #[error("the Nix database at {file} has schema {found:?}, refusing to read it: only schema 10 is known", file = .file.display())]
    Schema { file: PathBuf, found: String },
    #[error(
        "the Nix database {file} has no -wal file and this user may not create one, nor is there a Nix daemon that would: start it, run as root, or use a Nix (2.22 or newer) that keeps the file",
        file = .file.display()
    )]
    NoWal {
        file: PathBuf,
        source: rusqlite::Error,
    },
    #[error("cannot read the Nix database {file}", file = .file.display())]
    Database {
        file: PathBuf,
        source: rusqlite::Error,
    },
    #[error("the Nix database says something malformed about {path}")]
    Row { path: String, source: RowProblem },
    #[error("cannot start a thread to read the Nix database")]
    Thread { source: io::Error },
    #[error("the readers of the Nix database have stopped")]
    Stopped,
    #[error("{path} cannot be made into a nar")]
    Layout { path: String, source: LayoutError },
    #[error("{path} is neither a file, a directory nor a symlink: no nar can hold it")]
    Special { path: String },
    #[error(transparent)]
    Contents { source: NarError },
    #[error("cannot read what the anchor publishes: {source}")]
    Published {
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("as many stored nars are being read as may be at once")]
    Busy,
    #[error(
        "{path} would make a nar of {found} bytes, the Nix database says {registered}: refusing to serve it; run nix-store --verify --check-contents"
    )]
    Corrupt {
        path: String,
        found: u64,
        registered: u64,
    },
}

/// The store of the Nix that is installed here.
pub struct NixStore {
    config: Arc<StoreConfig>,
    database: Arc<Database>,
    layouts: LayoutCache,
    roots: Roots,
}

impl NixStore {
    /// Opens the store and reads its database once.
    ///
    /// # Errors
    /// When there is no database, its schema is unknown, or it cannot be read; the text says what
    /// to do. Later a database that vanishes or changes is reopened by itself.
    pub async fn open(config: StoreConfig) -> Result<NixStore, StoreError> {
        let config = Arc::new(config);
        let store = NixStore {
            roots: Roots::start(&config)?,
            database: Arc::new(Database::start(config.clone())?),
            config,
            layouts: LayoutCache::default(),
        };
        store.read(|database| database.check()).await?;
        Ok(store)
    }

    /// Reads the database, if need be by having the Nix daemon open it first.
    async fn read<'a, T, F>(&'a self, read: impl Fn(&'a Database) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        match read(&self.database).await {
            Err(StoreError::NoWal { .. }) if self.roots.wake_daemon().await => {
                read(&self.database).await
            }
            result => result,
        }
    }

    /// Returns what is kept beside the paths; build logs are in `log_dir` (`/nix/var/log/nix`).
    pub fn records(&self, log_dir: PathBuf) -> Records {
        Records {
            logs: log::BuildLogs::new(log_dir),
            database: self.database.clone(),
            debug_info: debug::DebugInfo::new(self.config.clone(), self.database.clone()),
        }
    }

    /// Reads a small path in one go. Read first, checked second: a collection deletes the row before it touches the
    /// files, so the bytes of a path that is valid after they were read are its own.
    async fn read_whole(&self, info: &PathInfo) -> Result<Option<Nar>, StoreError> {
        let (config, store_path, nar_size) =
            (self.config.clone(), info.store_path.clone(), info.nar_size);
        let read = nar::blocking(move || match Opened::open(&config, &store_path, None)? {
            Some(opened) => opened.read_whole(nar_size),
            None => Ok(None),
        });
        match read.await? {
            Some(nar) if self.is_valid(info).await? => Ok(Some(nar)),
            _ => Ok(None),
        }
    }

    /// Opens a path and keeps it until the last stream is done. Held first, checked second: a collection that starts
    /// in between spares the path, and one that was running has deleted the row before it touches the files.
    async fn hold(&self, info: &PathInfo) -> Result<Option<Nar>, StoreError> {
        let hold = self.roots.hold(&info.store_path).await;
        let (config, store_path) = (self.config.clone(), info.store_path.clone());
        let opened = nar::blocking(move || Opened::open(&config, &store_path, hold)).await?;
        let Some(opened) = opened else {
            return Ok(None);
        };
        if !self.is_valid(info).await? {
            return Ok(None);
        }
        let layout = self.layouts.layout(&opened, info).await?;
        Ok(layout.map(|layout| Nar::new(layout, opened)))
    }

    async fn is_valid(&self, info: &PathInfo) -> Result<bool, StoreError> {
        let row = self.path_info(info.store_path.hash()).await?;
        Ok(row.is_some_and(|row| {
            row.store_path == info.store_path
                && row.nar_hash == info.nar_hash
                && row.nar_size == info.nar_size
        }))
    }
}

impl LocalStore for NixStore {
    fn dir(&self) -> &StoreDir {
        &self.config.dir
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(self.read(move |database| database.path_info(hash)))
    }

    fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        assert!(hashes.len() <= BATCH_MAX);
        Box::pin(self.read(move |database| database.path_infos(hashes.clone())))
    }

    fn nar<'a>(&'a self, info: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        Box::pin(async move {
            let nar = match info.nar_size {
                ..=nar::WHOLE_BYTES_MAX => self.read_whole(info).await,
                _ => self.hold(info).await,
            };
            match nar {
                Ok(nar) => Ok(nar),
                // What looks corrupt may be half collected.
                Err(error) => match self.is_valid(info).await? {
                    true => Err(error),
                    false => Ok(None),
                },
            }
        })
    }

    fn watch(&self) -> mpsc::Receiver<StoreEvent> {
        watcher::watch(self.config.clone(), self.database.clone())
    }
}
