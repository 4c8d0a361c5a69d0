//! Nix's database, read only: which paths are valid and what is registered about them.
//!
//! SQLite in WAL mode, written by Nix while we read (`libstore/local-store.cc`, schema 10). Opened
//! with `mode=ro` and never `immutable`, which would miss everything in the WAL. Queries run on
//! threads of their own, so a busy database stalls neither tokio's reactor nor its blocking pool.
//! Read transactions cover at most one chunk of rows, for a long reader keeps Nix from truncating
//! the WAL.
//!
//! The file is looked at before each query and reopened when it is another one.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, UNIX_EPOCH},
};

use granary_protocol::{
    content_address::ContentAddressError,
    hash::HashError,
    store_path::{StorePath, StorePathError, StorePathHash},
};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, params};
use tokio::sync::oneshot;

use super::{PathInfo, StoreConfig, StoreError};

/// Threads that read the database. Readers of a WAL do not block each other; two let a narinfo
/// be answered while the watcher reads a long chunk, and a query costs some 20 µs.
const READERS: usize = 2;

/// Queries waiting for a reader; beyond it callers wait to enqueue.
const QUEUE_MAX: usize = 1024;

/// How long one statement waits for a lock. Nix holds exclusive ones only to recover or, without
/// WAL, to commit.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// Attempts at one query when SQLite reports a race (a checkpoint or recovery under way).
const ATTEMPTS: usize = 3;

/// The only schema that Nix 2.3 to 2.36 and Lix write.
const SCHEMA: &str = "10";

/// The readers of one database. Dropping it ends their threads.
pub struct Database {
    queries: flume::Sender<Query>,
}

type Query = Box<dyn FnOnce(&mut Reader) + Send>;

/// What identifies a database file: it is another one when Nix or an operator replaced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

/// One row, which may be malformed without making the others unreadable.
pub type Registered = Result<PathInfo, StoreError>;

/// The rows after one id, and how many rows there are, from one snapshot.
pub struct Newer {
    pub file: FileId,
    /// Id, [`Summary::stamp`] and what is registered, in ascending order of id.
    pub rows: Vec<(i64, u64, Registered)>,
    /// All valid paths; only to be compared when `rows` reached the end.
    pub count: u64,
}

/// A row as the watcher compares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub hash: StorePathHash,
    /// Changes when signatures were added or the path was built here after all.
    pub stamp: u64,
}

/// A part of all rows, in ascending order of id.
pub struct Summaries {
    pub file: FileId,
    /// Those whose path is well-formed.
    pub rows: Vec<Summary>,
    /// How many were read, malformed ones included.
    pub count: u64,
    /// The greatest id read; `None` at the end of the table.
    pub last_id: Option<i64>,
}

/// Paths after one id whose names have one ending.
pub struct Names {
    pub file: FileId,
    /// Each with its id.
    pub paths: Vec<(i64, StorePath)>,
    /// The greatest id read; `None` at the end of the table.
    pub last_id: Option<i64>,
}

/// What is wrong with one row.
#[derive(Debug, thiserror::Error)]
pub enum RowProblem {
    #[error("column {column} is unreadable")]
    Column {
        column: &'static str,
        source: rusqlite::types::FromSqlError,
    },
    #[error("its path is not a store path")]
    Path { source: StorePathError },
    #[error("its hash is malformed")]
    Hash { source: HashError },
    #[error("its nar size is {size:?}")]
    Size { size: Option<i64> },
    #[error("its deriver is not a store path")]
    Deriver { source: StorePathError },
    #[error("it references something that is not a store path")]
    Reference { source: StorePathError },
    #[error("its content address is malformed")]
    ContentAddress { source: ContentAddressError },
}

impl Database {
    /// Starts the reader threads; the file is opened by the first query.
    ///
    /// # Errors
    /// [`StoreError::Thread`].
    pub fn start(config: Arc<StoreConfig>) -> Result<Database, StoreError> {
        let (queries, queue) = flume::bounded::<Query>(QUEUE_MAX);
        for number in 0..READERS {
            let queue = queue.clone();
            let mut reader = Reader {
                config: config.clone(),
                open: None,
            };
            thread::Builder::new()
                .name(format!("store-reader-{number}"))
                .spawn(move || {
                    for query in queue {
                        query(&mut reader);
                    }
                })
                .map_err(|source| StoreError::Thread { source })?;
        }
        Ok(Database { queries })
    }

    /// Proves that the database can be read.
    pub async fn check(&self) -> Result<(), StoreError> {
        self.run(|reader, _| reader.query_row("SELECT id FROM ValidPaths LIMIT 1", [], |_| Ok(())))
            .await
            .map(|_: Option<()>| ())
    }

    /// Returns what is registered about the path with this hash; `None` when it is not valid.
    ///
    /// # Errors
    /// [`StoreError::Row`] when the row is malformed.
    pub async fn path_info(&self, hash: StorePathHash) -> Result<Option<PathInfo>, StoreError> {
        self.run(move |reader, _| reader.find(hash))
            .await?
            .transpose()
    }

    /// Returns the same for each hash; malformed rows count as absent.
    pub async fn path_infos(
        &self,
        hashes: Vec<StorePathHash>,
    ) -> Result<Vec<Option<PathInfo>>, StoreError> {
        self.run(move |reader, _| {
            hashes
                .iter()
                .map(|hash| Ok(reader.find(*hash)?.and_then(Result::ok)))
                .collect()
        })
        .await
    }

    /// Returns up to `limit` rows after `id`, the oldest first.
    pub async fn newer(&self, id: i64, limit: usize) -> Result<Newer, StoreError> {
        self.run(move |reader, file| {
            let sql = format!(
                "SELECT {COLUMNS}, {STAMP} FROM ValidPaths WHERE id > ? ORDER BY id LIMIT ?"
            );
            let mut statement = reader.connection.prepare_cached(&sql)?;
            let mut rows = statement.query(params![id, limit as i64])?;
            let mut newer = Newer {
                file,
                rows: Vec::new(),
                count: 0,
            };
            while let Some(row) = rows.next()? {
                let stamp = row.get::<_, i64>(9)? as u64;
                newer
                    .rows
                    .push((row.get(0)?, stamp, reader.registered(row)?));
            }
            newer.count = reader
                .connection
                .prepare_cached("SELECT count(*) FROM ValidPaths")?
                .query_row([], |row| row.get::<_, i64>(0))? as u64;
            Ok(newer)
        })
        .await
    }

    /// Returns up to `limit` rows after `id` in short; those with a malformed path are left out.
    pub async fn summaries(&self, id: i64, limit: usize) -> Result<Summaries, StoreError> {
        self.run(move |reader, file| {
            let sql = format!(
                "SELECT id, path, {STAMP} FROM ValidPaths WHERE id > ? ORDER BY id LIMIT ?"
            );
            let mut statement = reader.connection.prepare_cached(&sql)?;
            let mut rows = statement.query(params![id, limit as i64])?;
            let mut summaries = Summaries {
                file,
                rows: Vec::new(),
                count: 0,
                last_id: None,
            };
            while let Some(row) = rows.next()? {
                summaries.last_id = Some(row.get(0)?);
                summaries.count += 1;
                let path = row.get_ref(1)?.as_str().ok();
                if let Some(path) = path.and_then(|path| reader.config.dir.parse_path(path).ok()) {
                    summaries.rows.push(Summary {
                        hash: path.hash(),
                        stamp: row.get::<_, i64>(2)? as u64,
                    });
                }
            }
            Ok(summaries)
        })
        .await
    }

    /// Reads up to `limit` rows after `id`, and returns those whose path ends with `ending`.
    pub async fn names_after(
        &self,
        id: i64,
        ending: &'static str,
        limit: usize,
    ) -> Result<Names, StoreError> {
        self.run(move |reader, file| {
            let sql = "SELECT id, path FROM ValidPaths WHERE id > ? ORDER BY id LIMIT ?";
            let mut statement = reader.connection.prepare_cached(sql)?;
            let mut rows = statement.query(params![id, limit as i64])?;
            let mut names = Names {
                file,
                paths: Vec::new(),
                last_id: None,
            };
            while let Some(row) = rows.next()? {
                let id = row.get(0)?;
                names.last_id = Some(id);
                let path = row.get_ref(1)?.as_str().ok();
                let path = path.filter(|path| path.ends_with(ending));
                let path = path.and_then(|path| reader.config.dir.parse_path(path).ok());
                names.paths.extend(path.map(|path| (id, path)));
            }
            Ok(names)
        })
        .await
    }

    /// Runs a query in one read transaction on a reader's thread.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        query: impl Fn(&Open<'_>, FileId) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job: Query = Box::new(move |reader| {
            // Whoever asked may be gone; then nobody minds.
            let _ = answer.send(reader.run(query));
        });
        self.queries
            .send_async(job)
            .await
            .map_err(|_| StoreError::Stopped)?;
        answered.await.map_err(|_| StoreError::Stopped)?
    }
}

/// One thread's connection.
struct Reader {
    config: Arc<StoreConfig>,
    open: Option<(FileId, Connection)>,
}

impl Reader {
    fn run<T>(
        &mut self,
        query: impl Fn(&Open<'_>, FileId) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let mut attempt = 1;
        loop {
            self.ensure_open()?;
            let config = self.config.clone();
            let Some((file, connection)) = &self.open else {
                unreachable!("opened above");
            };
            // One snapshot for all statements of a query; ended by the rollback on drop.
            let result = connection.unchecked_transaction().and_then(|transaction| {
                let open = Open {
                    config: &config,
                    connection: &transaction,
                };
                query(&open, *file)
            });
            match result {
                Ok(value) => return Ok(value),
                Err(error) => {
                    self.open = None;
                    if attempt < ATTEMPTS && is_race(&error) {
                        attempt += 1;
                        continue;
                    }
                    return Err(self.error(error));
                }
            }
        }
    }

    fn ensure_open(&mut self) -> Result<(), StoreError> {
        let file = self.file_id()?;
        if self.open.as_ref().is_some_and(|(open, _)| *open == file) {
            return Ok(());
        }
        self.open = None;
        self.check_schema()?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.config.database, flags)
            .and_then(|connection| {
                connection.busy_timeout(BUSY_TIMEOUT)?;
                // Else SQLite compiles a statement anew for each value bound to it, in the hope of a better plan.
                connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
                Ok(connection)
            })
            .map_err(|error| self.error(error))?;
        self.open = Some((file, connection));
        Ok(())
    }

    fn file_id(&self) -> Result<FileId, StoreError> {
        let file = &self.config.database;
        match fs::metadata(file) {
            Ok(metadata) => Ok(FileId {
                device: metadata.dev(),
                inode: metadata.ino(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::NoDatabase { file: file.clone() })
            }
            Err(source) => Err(StoreError::File {
                file: file.clone(),
                source,
            }),
        }
    }

    fn check_schema(&self) -> Result<(), StoreError> {
        let file: PathBuf = self.config.database.with_file_name("schema");
        let found = fs::read_to_string(&file).map_err(|source| StoreError::File {
            file: file.clone(),
            source,
        })?;
        match found.trim() {
            SCHEMA => Ok(()),
            found => Err(StoreError::Schema {
                file,
                found: found.chars().take(32).collect(),
            }),
        }
    }

    fn error(&self, source: rusqlite::Error) -> StoreError {
        let file = self.config.database.clone();
        match source.sqlite_error_code() {
            // A read-only connection "writes" only the shared memory beside a WAL.
            Some(ErrorCode::ReadOnly) => StoreError::NoWal { file, source },
            _ => StoreError::Database { file, source },
        }
    }
}

/// A connection inside a read transaction.
pub(super) struct Open<'a> {
    pub config: &'a StoreConfig,
    pub connection: &'a Connection,
}

/// The columns of a row, in the order that [`Open::registered`] reads.
const COLUMNS: &str = "id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca";

/// [`Summary::stamp`]: signatures are only ever appended. A damaged `ultimate` counts as 0.
const STAMP: &str = "ifnull(length(sigs), 0) * 2 + (ifnull(ultimate, 0) = 1)";

impl Open<'_> {
    fn find(&self, hash: StorePathHash) -> rusqlite::Result<Option<Registered>> {
        let prefix = format!("{}/{hash}", self.config.dir.as_str());
        let sql = format!("SELECT {COLUMNS} FROM ValidPaths WHERE path >= ? ORDER BY path LIMIT 1");
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query([&prefix])?;
        match rows.next()? {
            Some(row) if bytes(row, 1)?.starts_with(prefix.as_bytes()) => {
                Ok(Some(self.registered(row)?))
            }
            _ => Ok(None),
        }
    }

    fn registered(&self, row: &Row<'_>) -> rusqlite::Result<Registered> {
        let id: i64 = row.get(0)?;
        let mut references = Vec::new();
        let mut statement = self.connection.prepare_cached(
            "SELECT path FROM Refs JOIN ValidPaths ON reference = id WHERE referrer = ?",
        )?;
        let mut rows = statement.query([id])?;
        while let Some(row) = rows.next()? {
            references.push(String::from_utf8_lossy(bytes(row, 0)?).into_owned());
        }
        Ok(self
            .path_info(id, row, references)
            .map_err(|source| StoreError::Row {
                path: match row.get_ref(1) {
                    Ok(path) => path
                        .as_bytes()
                        .unwrap_or_default()
                        .escape_ascii()
                        .to_string(),
                    Err(_) => format!("row {id}"),
                },
                source,
            }))
    }

    fn path_info(
        &self,
        id: i64,
        row: &Row<'_>,
        references: Vec<String>,
    ) -> Result<PathInfo, RowProblem> {
        let dir = &self.config.dir;
        let store_path = dir
            .parse_path(text(row, 1, "path")?.unwrap_or_default())
            .map_err(|source| RowProblem::Path { source })?;
        let nar_hash = text(row, 2, "hash")?
            .unwrap_or_default()
            .parse()
            .map_err(|source| RowProblem::Hash { source })?;
        let registration_time = integer(row, 3, "registrationTime")?.unwrap_or_default();
        let deriver = match text(row, 4, "deriver")? {
            None | Some("") => None,
            Some(path) => Some(
                dir.parse_path(path)
                    .map_err(|source| RowProblem::Deriver { source })?,
            ),
        };
        let size = integer(row, 5, "narSize")?;
        let nar_size = match size.map(u64::try_from) {
            Some(Ok(nar_size)) if nar_size > 0 => nar_size,
            _ => return Err(RowProblem::Size { size }),
        };
        let ultimate = integer(row, 6, "ultimate")?.is_some_and(|ultimate| ultimate != 0);
        // One malformed signature makes current clients refuse the whole narinfo, so it is dropped.
        let signatures = text(row, 7, "sigs")?
            .unwrap_or_default()
            .split_ascii_whitespace()
            .filter_map(|signature| signature.parse().ok())
            .collect();
        let ca = match text(row, 8, "ca")? {
            None | Some("") => None,
            Some(ca) => Some(
                ca.parse()
                    .map_err(|source| RowProblem::ContentAddress { source })?,
            ),
        };
        let references = references
            .iter()
            .map(|path| dir.parse_path(path))
            .collect::<Result<BTreeSet<StorePath>, _>>()
            .map_err(|source| RowProblem::Reference { source })?;
        Ok(PathInfo {
            store_path,
            nar_hash,
            nar_size,
            references,
            deriver,
            signatures,
            ca,
            ultimate,
            registration_time: UNIX_EPOCH
                + Duration::from_secs(registration_time.clamp(0, i64::from(u32::MAX)) as u64),
            id,
        })
    }

    fn query_row<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Option<T>> {
        self.connection.query_row(sql, params, read).optional()
    }
}

fn bytes<'r>(row: &'r Row<'_>, column: usize) -> rusqlite::Result<&'r [u8]> {
    Ok(row.get_ref(column)?.as_bytes().unwrap_or_default())
}

fn text<'r>(
    row: &'r Row<'_>,
    index: usize,
    column: &'static str,
) -> Result<Option<&'r str>, RowProblem> {
    row.get_ref(index)
        .map_or(Ok(None), |value| value.as_str_or_null())
        .map_err(|source| RowProblem::Column { column, source })
}

fn integer(row: &Row<'_>, index: usize, column: &'static str) -> Result<Option<i64>, RowProblem> {
    row.get_ref(index)
        .map_or(Ok(None), |value| value.as_i64_or_null())
        .map_err(|source| RowProblem::Column { column, source })
}

/// Says whether a second attempt can help: the file was being recovered, checkpointed or replaced.
fn is_race(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::FileLockingProtocolFailed
                | ErrorCode::SchemaChanged
        )
    )
}
