//! Catalog: SQLite that knows what the bucket holds.
//!
//! An index, never the truth: `granary anchor rebuild` makes it anew from the bucket. It also keeps
//! what the bucket must not tell (tokens) and what is of no use after a loss (when a path was last
//! used). One thread writes, in groups: what is waiting shares one transaction and one fsync, each
//! in a savepoint of its own. A few threads read.
//!
//! Invariants: a row of `nars` is written after its object was stored; a row of `paths` is
//! [`PathState::Storing`] from before its narinfo is put until after; only `Ready` ones are shown.
//! A NAR that a row of `paths` names is never deleted. A NAR that is damaged ([`super::scrub`]), and a path that
//! has one, are as good as absent, but where a function says otherwise.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use granary_protocol::hash::NarHash;
use granary_protocol::store_path::StorePathHash;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use tokio::sync::{mpsc, oneshot, watch};

use super::cache::{CacheName, Settings};
use super::uses::CachePath;

mod nars;

pub use nars::StoredNar;
use nars::insert_nar;
pub(super) use nars::nar_row;

/// Each entry takes a database from the version of its position to the next. Never edited, only
/// added to.
const MIGRATIONS: &[&str] = &[
    include_str!("catalog/1.sql"),
    include_str!("catalog/2.sql"),
    include_str!("catalog/3.sql"),
    include_str!("catalog/4.sql"),
    include_str!("catalog/5.sql"),
    include_str!("catalog/6.sql"),
    include_str!("catalog/7.sql"),
    include_str!("catalog/8.sql"),
];

/// Threads that read.
const READERS: usize = 3;

/// Questions waiting; beyond it callers wait.
const QUEUE_MAX: usize = 1024;

/// Changes that share one transaction at most, so that the first does not wait for long.
const GROUP_MAX: usize = 64;

/// How long a statement waits for another process: `granary token` and its like write as well.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The catalog of one anchor; `Clone` is cheap, and the threads end with the last clone.
#[derive(Clone)]
pub struct Catalog {
    writer: mpsc::Sender<Job>,
    readers: mpsc::Sender<Question>,
    commits: watch::Receiver<()>,
}

/// Runs one change; what it returns is told the outcome of the commit.
type Job = Box<dyn FnOnce(&Transaction<'_>) -> Told + Send>;
type Told = Box<dyn FnOnce(Result<(), CatalogError>) + Send>;
type Question = Box<dyn FnOnce(&Connection) + Send>;

/// Why the catalog could not answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CatalogError {
    #[error("cannot open the catalog {path}: {source}", path = .path.display())]
    Open {
        path: PathBuf,
        source: Arc<rusqlite::Error>,
    },
    #[error(
        "the catalog {path} has version {found}, this granary knows {known}: use the newer one, or move the file away and run granary anchor rebuild",
        path = .path.display()
    )]
    Version {
        path: PathBuf,
        found: i64,
        known: usize,
    },
    #[error("the catalog {path} is damaged ({problem}): move it away and run granary anchor rebuild", path = .path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error("cannot start a thread for the catalog: {source}")]
    Thread { source: Arc<io::Error> },
    #[error("cannot {action} the catalog: {source}")]
    Sqlite {
        action: &'static str,
        source: Arc<rusqlite::Error>,
    },
    #[error("the catalog has stopped")]
    Stopped,
}

/// A cache and its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheRow {
    pub id: i64,
    pub name: CacheName,
    pub settings: Settings,
}

/// How far a path has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// Its narinfo is being put into the bucket: perhaps there, not acknowledged.
    Storing = 0,
    /// Complete and served.
    Ready = 1,
    /// Its narinfo is being deleted; not served.
    Leaving = 2,
}

/// A path of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRow {
    pub hash: StorePathHash,
    pub base_name: String,
    pub nar_hash: NarHash,
    /// As it lies in the bucket.
    pub narinfo: String,
}

/// What a path's row is made of.
#[derive(Debug, Clone)]
pub struct NewPath {
    pub cache: i64,
    pub path: PathRow,
    pub references: Vec<StorePathHash>,
    pub nar: StoredNar,
    /// Whether its references must be here.
    pub is_complete: bool,
    /// The subject of the token by which it came.
    pub subject: Option<String>,
    /// Seconds since 1970.
    pub now: u64,
}

/// What came of writing a path down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// Its narinfo is to be put.
    Written,
    /// A reference that must be here is not.
    NoReference,
    /// The path is complete with another NAR, which stays: its narinfo must not be replaced.
    AnotherBuild,
}

/// How much a cache, or all of them, hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub paths: u64,
    /// Bytes of all NARs, each path counted.
    pub nar_bytes: u64,
    /// Bytes in storage, each NAR counted once.
    pub file_bytes: u64,
}

impl Catalog {
    /// Opens the catalog, or makes it; an older one is brought up to date.
    ///
    /// Blocks; called at start.
    /// # Errors
    /// [`CatalogError`]. A damaged file is refused, not replaced: it may hold tokens.
    pub fn open(path: &Path) -> Result<Catalog, CatalogError> {
        let opening = |source| CatalogError::Open {
            path: path.to_owned(),
            source: Arc::new(source),
        };
        let mut connection = Connection::open(path).map_err(opening)?;
        prepare(&connection).map_err(opening)?;
        migrate(&mut connection, path, opening)?;
        let check: String = connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(opening)?;
        if check != "ok" {
            return Err(CatalogError::Damaged {
                path: path.to_owned(),
                problem: check,
            });
        }
        let (writer, jobs) = mpsc::channel(QUEUE_MAX);
        let (committed, commits) = watch::channel(());
        let work = move || write(connection, jobs, committed);
        spawn("catalog-writer".to_owned(), work)?;
        let (readers, questions) = mpsc::channel::<Question>(QUEUE_MAX);
        let questions = Arc::new(Mutex::new(questions));
        for number in 0..READERS {
            let connection = Connection::open(path).map_err(opening)?;
            prepare(&connection).map_err(opening)?;
            let questions = questions.clone();
            spawn(format!("catalog-reader-{number}"), move || {
                // One thread waits in the queue, the others for the lock around it.
                while let Some(question) = {
                    let mut queue = questions.lock().unwrap_or_else(PoisonError::into_inner);
                    queue.blocking_recv()
                } {
                    question(&connection);
                }
            })?;
        }
        Ok(Catalog {
            writer,
            readers,
            commits,
        })
    }

    /// Changes with each transaction of this process; others may write as well.
    pub(super) fn commits(&self) -> watch::Receiver<()> {
        self.commits.clone()
    }

    /// Asks something.
    pub async fn read<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, CatalogError> {
        let (answer, answered) = oneshot::channel();
        let question: Question = Box::new(move |connection| {
            // Whoever asked may be gone; then nobody minds.
            let _ = answer.send(question(connection));
        });
        let sent = self.readers.send(question).await;
        sent.map_err(|_| CatalogError::Stopped)?;
        let answer = answered.await.map_err(|_| CatalogError::Stopped)?;
        answer.map_err(sqlite("read"))
    }

    /// Changes something; returns once it is durable.
    ///
    /// Cancel-safe in that the change is made whole or not at all.
    pub async fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, CatalogError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |transaction| {
            let outcome = in_savepoint(transaction, change);
            Box::new(move |committed: Result<(), CatalogError>| {
                let outcome = outcome.map_err(sqlite("write"));
                let _ = answer.send(committed.and(outcome));
            })
        });
        let sent = self.writer.send(job).await;
        sent.map_err(|_| CatalogError::Stopped)?;
        answered.await.map_err(|_| CatalogError::Stopped)?
    }

    /// Returns a cache by name.
    pub async fn cache(&self, name: &CacheName) -> Result<Option<CacheRow>, CatalogError> {
        let name = name.clone();
        self.read(move |connection| {
            connection
                .prepare_cached("SELECT id, name, settings FROM caches WHERE name = ?1")?
                .query_row([name.as_str()], cache_row)
                .optional()
        })
        .await
    }

    /// Returns every cache, by name.
    pub async fn caches(&self) -> Result<Vec<CacheRow>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT id, name, settings FROM caches ORDER BY name")?
                .query_map([], cache_row)?
                .collect()
        })
        .await
    }

    /// Whether it knows of nothing in storage.
    pub async fn is_empty(&self) -> Result<bool, CatalogError> {
        self.read(|connection| {
            let query =
                "SELECT NOT EXISTS (SELECT 1 FROM caches) AND NOT EXISTS (SELECT 1 FROM nars)";
            connection.query_row(query, [], |row| row.get(0))
        })
        .await
    }

    /// Adds a cache or replaces its settings; returns its number.
    pub async fn set_cache(
        &self,
        name: &CacheName,
        settings: &Settings,
        now: u64,
    ) -> Result<i64, CatalogError> {
        let (name, settings) = (name.clone(), settings.to_json());
        self.write(move |transaction| {
            transaction
                .prepare_cached(
                    "INSERT INTO caches (name, settings, created) VALUES (?1, ?2, ?3)
                     ON CONFLICT (name) DO UPDATE SET settings = ?2 RETURNING id",
                )?
                .query_row(params![name.as_str(), settings, signed(now)], |row| {
                    row.get(0)
                })
        })
        .await
    }

    /// Returns a path that is complete, its NAR damaged or not.
    pub async fn path_row(
        &self,
        cache: i64,
        hash: StorePathHash,
    ) -> Result<Option<PathRow>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT hash, base_name, nar_hash, narinfo FROM paths
                     WHERE cache = ?1 AND hash = ?2 AND state = 1",
                )?
                .query_row(params![cache, hash.as_bytes()], path_row)
                .optional()
        })
        .await
    }

    /// Returns a path that is complete.
    pub async fn path(
        &self,
        cache: i64,
        hash: StorePathHash,
    ) -> Result<Option<PathRow>, CatalogError> {
        self.read(move |connection| find_path(connection, cache, &hash))
            .await
    }

    /// Returns those of the paths that are complete, from the end of what was asked and until their narinfos have
    /// so many bytes, and which are left.
    pub async fn some_paths(
        &self,
        cache: i64,
        mut hashes: Vec<StorePathHash>,
        bytes: usize,
    ) -> Result<(Vec<PathRow>, Vec<StorePathHash>), CatalogError> {
        self.read(move |connection| {
            let (mut found, mut held) = (Vec::new(), 0);
            while held < bytes
                && let Some(hash) = hashes.pop()
            {
                if let Some(path) = find_path(connection, cache, &hash)? {
                    held += path.narinfo.len();
                    found.push(path);
                }
            }
            Ok((found, hashes))
        })
        .await
    }

    /// Returns those of the paths that are not complete in this cache.
    pub async fn missing(
        &self,
        cache: i64,
        hashes: Vec<StorePathHash>,
    ) -> Result<Vec<StorePathHash>, CatalogError> {
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(
                "SELECT 1 FROM paths WHERE cache = ?1 AND hash = ?2 AND state = 1
                 AND NOT EXISTS (SELECT 1 FROM nars WHERE nars.nar_hash = paths.nar_hash AND damaged IS NOT NULL)",
            )?;
            let mut missing = Vec::new();
            for hash in hashes {
                if !statement.exists(params![cache, hash.as_bytes()])? {
                    missing.push(hash);
                }
            }
            Ok(missing)
        })
        .await
    }

    /// Returns complete paths of a cache after `after`, in order, their NARs damaged or not.
    pub async fn paths_after(
        &self,
        cache: i64,
        after: Option<StorePathHash>,
        limit: usize,
    ) -> Result<Vec<PathRow>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT hash, base_name, nar_hash, narinfo FROM paths
                     WHERE cache = ?1 AND state = 1 AND hash > ?2 ORDER BY hash LIMIT ?3",
                )?
                .query_map(
                    params![
                        cache,
                        after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec()),
                        signed(limit as u64)
                    ],
                    path_row,
                )?
                .collect()
        })
        .await
    }

    /// Writes a path down before its narinfo is put, so that a crash in between is found.
    ///
    /// A path that is complete stays complete: only its narinfo changes, with
    /// [`Catalog::finish_path`].
    pub async fn begin_path(&self, new: NewPath) -> Result<Begun, CatalogError> {
        self.write(move |transaction| {
            let NewPath {
                cache,
                path,
                references,
                nar,
                is_complete,
                subject,
                now,
            } = new;
            if is_complete {
                let mut present = transaction.prepare_cached(
                    "SELECT 1 FROM paths WHERE cache = ?1 AND hash = ?2 AND state = 1",
                )?;
                for reference in &references {
                    if !present.exists(params![cache, reference.as_bytes()])? {
                        return Ok(Begun::NoReference);
                    }
                }
            }
            insert_nar(transaction, &nar, now)?;
            let written = transaction
                .prepare_cached(
                    "INSERT INTO paths (cache, hash, base_name, nar_hash, narinfo, state, registered, last_used, subject)
                     VALUES (?1, ?2, ?3, ?4, ?5, 0, ?6, ?6, ?7)
                     ON CONFLICT (cache, hash) DO UPDATE SET base_name = ?3, nar_hash = ?4, narinfo = ?5,
                     state = 0, last_used = ?6, subject = ?7
                     WHERE state <> 1 OR (nar_hash <> ?4 AND EXISTS (
                         SELECT 1 FROM nars WHERE nars.nar_hash = paths.nar_hash AND damaged IS NOT NULL))",
                )?
                .execute(params![
                    cache,
                    path.hash.as_bytes(),
                    path.base_name,
                    path.nar_hash.as_bytes(),
                    path.narinfo,
                    signed(now),
                    subject,
                ])?;
            if written == 0 {
                // It may have been damaged when it was looked for, and put right since.
                let is_same = transaction
                    .prepare_cached(
                        "SELECT 1 FROM paths WHERE cache = ?1 AND hash = ?2 AND nar_hash = ?3",
                    )?
                    .exists(params![
                        cache,
                        path.hash.as_bytes(),
                        path.nar_hash.as_bytes()
                    ])?;
                if !is_same {
                    return Ok(Begun::AnotherBuild);
                }
                insert_rewrite(transaction, cache, &path.hash)?;
            } else {
                // What another build of it referenced.
                transaction
                    .prepare_cached("DELETE FROM edges WHERE cache = ?1 AND hash = ?2")?
                    .execute(params![cache, path.hash.as_bytes()])?;
            }
            let mut edge = transaction.prepare_cached(
                "INSERT OR IGNORE INTO edges (cache, hash, reference) VALUES (?1, ?2, ?3)",
            )?;
            for reference in references {
                edge.execute(params![cache, path.hash.as_bytes(), reference.as_bytes()])?;
            }
            Ok(Begun::Written)
        })
        .await
    }

    /// Says that a path's narinfo is in the bucket, and what it says.
    pub async fn finish_path(
        &self,
        cache: i64,
        hash: StorePathHash,
        narinfo: String,
    ) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached(
                    "UPDATE paths SET state = 1, narinfo = ?3 WHERE cache = ?1 AND hash = ?2",
                )?
                .execute(params![cache, hash.as_bytes(), narinfo])?;
            forget_rewrite(transaction, cache, &hash)
        })
        .await
    }

    /// Notes that narinfos of complete paths will be replaced, each with [`Catalog::finish_path`], so that a
    /// crash in between is found.
    pub async fn begin_rewrites(
        &self,
        cache: i64,
        hashes: Vec<StorePathHash>,
    ) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            let mut hashes = hashes.iter();
            hashes.try_for_each(|hash| insert_rewrite(transaction, cache, hash))
        })
        .await
    }

    /// Says that a path's narinfo was not replaced after all.
    pub async fn forget_rewrite(
        &self,
        cache: i64,
        hash: StorePathHash,
    ) -> Result<(), CatalogError> {
        self.write(move |transaction| forget_rewrite(transaction, cache, &hash))
            .await
    }

    /// Returns the paths whose narinfo was being replaced when a crash came.
    pub async fn rewrites(&self) -> Result<Vec<(i64, CacheName, StorePathHash)>, CatalogError> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT caches.id, name, hash FROM rewrites JOIN caches ON caches.id = rewrites.cache",
                )?
                .query_map([], |row| {
                    let name: String = row.get(1)?;
                    let hash = StorePathHash::from_bytes(row.get(2)?);
                    Ok((row.get(0)?, stored_name(&name)?, hash))
                })?
                .collect()
        })
        .await
    }

    /// Returns the paths that a crash left in a state, with their cache's name.
    pub async fn in_state(
        &self,
        state: PathState,
    ) -> Result<Vec<(i64, CacheName, PathRow)>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT hash, base_name, nar_hash, narinfo, caches.id, caches.name
                     FROM paths JOIN caches ON caches.id = paths.cache WHERE state = ?1",
                )?
                .query_map([state as i64], |row| {
                    let name: String = row.get(5)?;
                    Ok((row.get(4)?, stored_name(&name)?, path_row(row)?))
                })?
                .collect()
        })
        .await
    }

    /// Hides a path before its narinfo is deleted; `false` when it is not there.
    pub async fn hide_path(&self, cache: i64, hash: StorePathHash) -> Result<bool, CatalogError> {
        self.write(move |transaction| hide(transaction, cache, &hash))
            .await
    }

    /// Hides a path if it was used before that time only, no path that stays references it, and then
    /// `claim` lets it go: what the collector saw may be over.
    ///
    /// `None` when it stays. What was claimed is dropped after the commit, or with a failure.
    pub async fn hide_unused<C: Send + 'static>(
        &self,
        cache: i64,
        hash: StorePathHash,
        used_before: u64,
        claim: impl FnOnce() -> Option<C> + Send + 'static,
    ) -> Result<Option<C>, CatalogError> {
        self.write(move |transaction| {
            let is_free = transaction
                .prepare_cached(
                    "SELECT 1 FROM paths WHERE cache = ?1 AND hash = ?2 AND state = 1 AND last_used < ?3
                     AND NOT EXISTS (
                         SELECT 1 FROM edges JOIN paths AS referrer
                         ON referrer.cache = edges.cache AND referrer.hash = edges.hash
                         WHERE edges.cache = ?1 AND edges.reference = ?2 AND referrer.state <> 2)",
                )?
                .exists(params![cache, hash.as_bytes(), signed(used_before)])?;
            let Some(claimed) = is_free.then(claim).flatten() else {
                return Ok(None);
            };
            hide(transaction, cache, &hash)?;
            Ok(Some(claimed))
        })
        .await
    }

    /// Forgets a path whose narinfo is not in the bucket.
    pub async fn forget_path(&self, cache: i64, hash: StorePathHash) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached("DELETE FROM edges WHERE cache = ?1 AND hash = ?2")?
                .execute(params![cache, hash.as_bytes()])?;
            transaction
                .prepare_cached("DELETE FROM paths WHERE cache = ?1 AND hash = ?2 AND state <> 1")?
                .execute(params![cache, hash.as_bytes()])?;
            forget_rewrite(transaction, cache, &hash)
        })
        .await
    }

    /// Writes down when paths were last used, in seconds since 1970; returns how many of them are here.
    pub async fn used(&self, paths: Vec<(CachePath, u64)>) -> Result<usize, CatalogError> {
        self.write(move |transaction| {
            let mut statement = transaction.prepare_cached(
                "UPDATE paths SET last_used = max(last_used, ?3)
                 WHERE cache = ?1 AND hash = ?2 AND state = 1",
            )?;
            let mut found = 0;
            for ((cache, hash), at) in paths {
                found += statement.execute(params![cache, hash.as_bytes(), signed(at)])?;
            }
            Ok(found)
        })
        .await
    }

    /// Returns how far a path has come; `None` when it is not here.
    pub async fn state(
        &self,
        cache: i64,
        hash: StorePathHash,
    ) -> Result<Option<PathState>, CatalogError> {
        self.read(move |connection| {
            let state = connection
                .prepare_cached("SELECT state FROM paths WHERE cache = ?1 AND hash = ?2")?
                .query_row(params![cache, hash.as_bytes()], |row| row.get::<_, i64>(0))
                .optional()?;
            Ok(state.map(|state| match state {
                0 => PathState::Storing,
                1 => PathState::Ready,
                _ => PathState::Leaving,
            }))
        })
        .await
    }

    /// Returns what a cache holds, or all of them together.
    pub async fn totals(&self, cache: Option<i64>) -> Result<Totals, CatalogError> {
        self.read(move |connection| {
            let (paths, nar_bytes) = connection
                .prepare_cached(
                    "SELECT count(*), coalesce(sum(nar_size), 0) FROM paths
                     JOIN nars ON nars.nar_hash = paths.nar_hash
                     WHERE state = 1 AND (?1 IS NULL OR cache = ?1)",
                )?
                .query_row([cache], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
            let file_bytes = connection
                .prepare_cached(
                    "SELECT coalesce(sum(file_size), 0) FROM nars WHERE ?1 IS NULL OR nar_hash IN
                     (SELECT nar_hash FROM paths WHERE cache = ?1 AND state = 1)",
                )?
                .query_row([cache], |row| unsigned(row, 0))?;
            Ok(Totals {
                paths,
                nar_bytes,
                file_bytes,
            })
        })
        .await
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<(), CatalogError> {
    let spawned = thread::Builder::new().name(name).spawn(work);
    spawned.map(drop).map_err(|source| CatalogError::Thread {
        source: Arc::new(source),
    })
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // What was acknowledged must survive a power cut.
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", "on")?;
    // Else SQLite compiles a statement anew for each value bound to it, in the hope of a better plan.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn migrate(
    connection: &mut Connection,
    path: &Path,
    opening: impl Fn(rusqlite::Error) -> CatalogError,
) -> Result<(), CatalogError> {
    // Two processes may start together; the second waits here, then finds the work done.
    let transaction = connection
        .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
        .map_err(&opening)?;
    let found: i64 = transaction
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(&opening)?;
    let done = usize::try_from(found).unwrap_or(usize::MAX);
    let Some(pending) = MIGRATIONS.get(done..) else {
        return Err(CatalogError::Version {
            path: path.to_owned(),
            found,
            known: MIGRATIONS.len(),
        });
    };
    for migration in pending {
        transaction.execute_batch(migration).map_err(&opening)?;
    }
    transaction
        .pragma_update(None, "user_version", MIGRATIONS.len() as i64)
        .map_err(&opening)?;
    transaction.commit().map_err(opening)
}

/// The writer's thread.
fn write(mut connection: Connection, mut jobs: mpsc::Receiver<Job>, committed: watch::Sender<()>) {
    let path = connection.path().map(str::to_owned);
    while let Some(first) = jobs.blocking_recv() {
        let transaction =
            match connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate) {
                Ok(transaction) => transaction,
                Err(source) => {
                    tracing::error!(path, error = %source, "could not begin to write the catalog");
                    // Its sender learns of it by the closed channel.
                    drop(first);
                    continue;
                }
            };
        let mut told = vec![first(&transaction)];
        while told.len() < GROUP_MAX
            && let Ok(next) = jobs.try_recv()
        {
            told.push(next(&transaction));
        }
        let outcome = transaction.commit().map_err(sqlite("write"));
        for told in told {
            told(outcome.clone());
        }
        committed.send_replace(());
    }
}

fn in_savepoint<T>(
    transaction: &Transaction<'_>,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    transaction.execute_batch("SAVEPOINT change")?;
    let outcome = change(transaction);
    transaction.execute_batch(match outcome {
        Ok(_) => "RELEASE change",
        Err(_) => "ROLLBACK TO change; RELEASE change",
    })?;
    outcome
}

fn sqlite(action: &'static str) -> impl Fn(rusqlite::Error) -> CatalogError {
    move |source| CatalogError::Sqlite {
        action,
        source: Arc::new(source),
    }
}

/// Forgets a cache and all of its rows, those that others refer to last.
pub(super) fn forget_cache(transaction: &Transaction<'_>, cache: i64) -> rusqlite::Result<()> {
    for table in ["edges", "rewrites", "rotations", "paths", "received"] {
        transaction.execute(&format!("DELETE FROM {table} WHERE cache = ?1"), [cache])?;
    }
    transaction
        .execute("DELETE FROM caches WHERE id = ?1", [cache])
        .map(drop)
}

fn insert_rewrite(
    transaction: &Transaction<'_>,
    cache: i64,
    hash: &StorePathHash,
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("INSERT OR IGNORE INTO rewrites (cache, hash) VALUES (?1, ?2)")?
        .execute(params![cache, hash.as_bytes()])
        .map(drop)
}

fn forget_rewrite(
    transaction: &Transaction<'_>,
    cache: i64,
    hash: &StorePathHash,
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("DELETE FROM rewrites WHERE cache = ?1 AND hash = ?2")?
        .execute(params![cache, hash.as_bytes()])
        .map(drop)
}

fn hide(transaction: &Transaction<'_>, cache: i64, hash: &StorePathHash) -> rusqlite::Result<bool> {
    let changed = transaction
        .prepare_cached("UPDATE paths SET state = 2 WHERE cache = ?1 AND hash = ?2 AND state = 1")?
        .execute(params![cache, hash.as_bytes()])?;
    Ok(changed > 0)
}

fn find_path(
    connection: &Connection,
    cache: i64,
    hash: &StorePathHash,
) -> rusqlite::Result<Option<PathRow>> {
    connection
        .prepare_cached(
            "SELECT hash, base_name, paths.nar_hash, narinfo FROM paths
             JOIN nars ON nars.nar_hash = paths.nar_hash
             WHERE cache = ?1 AND hash = ?2 AND state = 1 AND damaged IS NULL",
        )?
        .query_row(params![cache, hash.as_bytes()], path_row)
        .optional()
}

pub(super) fn path_row(row: &Row<'_>) -> rusqlite::Result<PathRow> {
    Ok(PathRow {
        hash: StorePathHash::from_bytes(row.get(0)?),
        base_name: row.get(1)?,
        nar_hash: NarHash::from_bytes(row.get(2)?),
        narinfo: row.get(3)?,
    })
}

pub(super) fn cache_row(row: &Row<'_>) -> rusqlite::Result<CacheRow> {
    let name: String = row.get(1)?;
    let settings: String = row.get(2)?;
    let settings = Settings::from_json(settings.as_bytes()).map_err(malformed)?;
    Ok(CacheRow {
        id: row.get(0)?,
        name: stored_name(&name)?,
        settings,
    })
}

pub(super) fn stored_name(name: &str) -> rusqlite::Result<CacheName> {
    CacheName::new(name).map_err(malformed)
}

fn malformed(error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(error))
}

/// SQLite's integers are signed; sizes and times of ours stay below 2^63.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}
