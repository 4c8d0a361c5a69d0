//! Queue: which paths wait for being pushed, and what became of the others, in a file of SQLite.
//!
//! One row for each path that was built here and is still in the store, so the file is as bounded as
//! that. A row outlives the push, or the next start would ask the anchor again about everything, and
//! bring back what somebody removed there. The file is disposable: without it everything is asked
//! about once, and nothing that the anchor has is sent. So a damaged one is set aside and made anew.
//!
//! `granary push --queue` writes to it from another process, beside a running node.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use granary_protocol::store_path::{StorePath, StorePathHash};
use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, ErrorCode, OptionalExtension, Transaction, TransactionBehavior, params,
};
use tracing::warn;

use super::order;

/// Written to `user_version`. A file with another number is made anew.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
    CREATE TABLE uploads (
        hash TEXT PRIMARY KEY, name TEXT NOT NULL, nar_size INTEGER NOT NULL,
        -- The row of the path in Nix's database: the newest is pushed first.
        registered INTEGER NOT NULL,
        is_asked INTEGER NOT NULL, state INTEGER NOT NULL,
        failures INTEGER NOT NULL DEFAULT 0,
        -- Seconds since 1970.
        not_before INTEGER NOT NULL DEFAULT 0,
        problem TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX waiting ON uploads (state, is_asked DESC, registered DESC);
    -- Uploads that were begun and are not complete, as the anchor calls them, and when.
    CREATE TABLE begun (hash TEXT PRIMARY KEY, upload TEXT NOT NULL, at INTEGER NOT NULL) STRICT;
    CREATE TABLE target (url TEXT NOT NULL) STRICT;
";

/// Values of `state`.
const WAITING: i64 = 0;
const SETTLED: i64 = 1;
const STAYS: i64 = 2;

/// Seconds after which an upload that was begun is of no use: the anchor has forgotten it.
const BEGUN_SECONDS: u64 = 3600;

/// Uploads that are remembered at once; more than run at once in an hour of breaks.
const BEGUN_MAX: i64 = 1000;

/// How long a statement waits for the other process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const IMMEDIATE: TransactionBehavior = TransactionBehavior::Immediate;

/// The queue of one node; `Clone` is cheap.
#[derive(Clone)]
pub struct Queue {
    connection: Arc<Mutex<Connection>>,
}

/// Why the queue could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("cannot open the upload queue {path}: {source}", path = .path.display())]
    Open {
        path: PathBuf,
        source: rusqlite::Error,
    },
    #[error("cannot use the upload queue: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("a thread that used the upload queue has ended")]
    Stopped,
}

/// A path that may be pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: StorePath,
    pub nar_size: u64,
    /// The number of its row in Nix's database.
    pub registered: i64,
}

/// A path whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    pub path: StorePath,
    pub nar_size: u64,
    /// Somebody named it.
    pub is_asked: bool,
    pub failures: u32,
}

/// What a push of a path came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// It is where it should be.
    Done,
    /// It is not to leave this machine, for this reason.
    Stays(String),
    /// Tried again at this time, in seconds since 1970.
    Later { not_before: u64, problem: String },
    /// It is not in the store any more.
    Gone,
}

/// How things stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    pub waiting: u64,
    /// Of the waiting paths, without what they reference.
    pub waiting_bytes: u64,
    /// Not to leave this machine.
    pub staying: u64,
    /// Waiting, and refused before.
    pub failed: u64,
    /// Why one of those was refused.
    pub problem: Option<String>,
}

impl Queue {
    /// Opens the queue of pushes to `target`; a damaged file is moved to `<path>.damaged` and replaced.
    ///
    /// What was pushed to another target waits again. Blocks.
    pub fn open(path: &Path, target: &str) -> Result<Queue, QueueError> {
        let opened = match try_open(path) {
            Err(error) if is_damage(&error) => {
                warn!(path = %path.display(), %error, "set aside an unusable upload queue");
                for suffix in ["", "-wal", "-shm"] {
                    let mut name = path.as_os_str().to_owned();
                    name.push(suffix);
                    let mut aside = path.as_os_str().to_owned();
                    aside.push(".damaged");
                    aside.push(suffix);
                    // What is not there need not be moved; what cannot be moved fails below.
                    let _ = fs::rename(name, aside);
                }
                try_open(path)
            }
            opened => opened,
        };
        let opened = opened.and_then(|mut connection| {
            aim(&mut connection, target)?;
            Ok(connection)
        });
        let connection = opened.map_err(|source| QueueError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Queue {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Takes up paths that are not there yet; returns how many.
    pub async fn offer(&self, entries: Vec<Entry>) -> Result<usize, QueueError> {
        self.change(move |transaction| {
            let mut insert = transaction.prepare_cached(
                "INSERT INTO uploads (hash, name, nar_size, registered, is_asked, state)
                 VALUES (?1, ?2, ?3, ?4, 0, ?5) ON CONFLICT DO NOTHING",
            )?;
            let mut added = 0;
            for entry in entries {
                added += insert.execute(params![
                    entry.path.hash().to_string(),
                    entry.path.name(),
                    signed(entry.nar_size),
                    entry.registered,
                    WAITING,
                ])?;
            }
            Ok(added)
        })
        .await
    }

    /// Puts paths first that somebody named, whatever became of them before.
    pub async fn ask(&self, entries: Vec<Entry>) -> Result<(), QueueError> {
        self.change(move |transaction| {
            for entry in entries {
                transaction.execute(
                    "INSERT INTO uploads (hash, name, nar_size, registered, is_asked, state)
                     VALUES (?1, ?2, ?3, ?4, 1, ?5) ON CONFLICT DO UPDATE
                     SET is_asked = 1, state = ?5, failures = 0, not_before = 0, problem = NULL",
                    params![
                        entry.path.hash().to_string(),
                        entry.path.name(),
                        signed(entry.nar_size),
                        entry.registered,
                        WAITING,
                    ],
                )?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets paths that were collected.
    pub async fn remove(&self, hashes: Vec<StorePathHash>) -> Result<(), QueueError> {
        self.change(move |transaction| {
            let mut delete = transaction.prepare_cached("DELETE FROM uploads WHERE hash = ?1")?;
            for hash in hashes {
                delete.execute([hash.to_string()])?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets all but these and those that somebody named: they went while nobody looked, or the
    /// configuration leaves them out.
    pub async fn retain(&self, kept: BTreeSet<StorePathHash>) -> Result<(), QueueError> {
        self.change(move |transaction| {
            let mut select = transaction.prepare("SELECT hash FROM uploads WHERE NOT is_asked")?;
            let mut delete = transaction.prepare("DELETE FROM uploads WHERE hash = ?1")?;
            let mut gone = Vec::new();
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let text: String = row.get(0)?;
                if !text.parse().is_ok_and(|hash| kept.contains(&hash)) {
                    gone.push(text);
                }
            }
            for hash in gone {
                delete.execute([hash])?;
            }
            Ok(())
        })
        .await
    }

    /// Lets what stays here be judged again, since the configuration may be another.
    pub async fn reconsider(&self) -> Result<(), QueueError> {
        self.change(|transaction| {
            transaction
                .execute(
                    "UPDATE uploads SET state = ?1, problem = NULL WHERE state = ?2",
                    [WAITING, STAYS],
                )
                .map(drop)
        })
        .await
    }

    /// Returns those whose turn it is, in this order: named ones, then the newest.
    ///
    /// At most [`order::ROUND_MAX`].
    pub async fn due(&self, now: u64) -> Result<Vec<Due>, QueueError> {
        let rows = self.change(move |transaction| {
            let mut select = transaction.prepare_cached(
                "SELECT hash, name, nar_size, is_asked, failures FROM uploads
                 WHERE state = ?1 AND (not_before <= ?2 OR not_before > ?3)
                 ORDER BY is_asked DESC, registered DESC LIMIT ?4",
            )?;
            let rows = select.query_map(
                params![
                    WAITING,
                    signed(now),
                    // A clock that was wrong when this was written must not hold a path up for ever.
                    signed(now.saturating_add(order::PATH_PAUSE_MAX.as_secs())),
                    order::ROUND_MAX as i64,
                ],
                |row| {
                    let (hash, name): (String, String) = (row.get(0)?, row.get(1)?);
                    let due = |path| {
                        Ok(Due {
                            path,
                            nar_size: row.get::<_, i64>(2)?.cast_unsigned(),
                            is_asked: row.get(3)?,
                            failures: row.get(4)?,
                        })
                    };
                    match StorePath::from_base_name(&format!("{hash}-{name}")) {
                        Ok(path) => due(path).map(Ok),
                        Err(_) => Ok(Err(hash)),
                    }
                },
            )?;
            let rows: Vec<Result<Due, String>> = rows.collect::<rusqlite::Result<_>>()?;
            for malformed in rows.iter().filter_map(|row| row.as_ref().err()) {
                warn!(
                    hash = malformed,
                    "dropped a malformed row of the upload queue"
                );
                transaction.execute("DELETE FROM uploads WHERE hash = ?1", [malformed])?;
            }
            Ok(rows)
        });
        Ok(rows.await?.into_iter().flatten().collect())
    }

    /// Returns when the next of those that wait for their time is due, in seconds since 1970.
    pub async fn next_due(&self) -> Result<Option<u64>, QueueError> {
        self.change(|transaction| {
            transaction
                .query_row(
                    "SELECT min(not_before) FROM uploads WHERE state = ?1",
                    [WAITING],
                    |row| row.get::<_, Option<i64>>(0),
                )
                .map(|time| time.map(i64::cast_unsigned))
        })
        .await
    }

    /// Writes down what became of paths.
    pub async fn settle(&self, settled: Vec<(StorePath, Settled)>) -> Result<(), QueueError> {
        self.change(move |transaction| {
            for (path, settled) in settled {
                let hash = path.hash().to_string();
                match settled {
                    Settled::Done => transaction.execute(
                        "UPDATE uploads SET state = ?2, problem = NULL WHERE hash = ?1",
                        params![hash, SETTLED],
                    )?,
                    Settled::Stays(reason) => transaction.execute(
                        "UPDATE uploads SET state = ?2, problem = ?3 WHERE hash = ?1",
                        params![hash, STAYS, reason],
                    )?,
                    Settled::Later {
                        not_before,
                        problem,
                    } => transaction.execute(
                        "UPDATE uploads SET failures = min(failures + 1, 1000), not_before = ?2,
                         problem = ?3 WHERE hash = ?1",
                        params![hash, signed(not_before), problem],
                    )?,
                    Settled::Gone => {
                        transaction.execute("DELETE FROM uploads WHERE hash = ?1", [hash])?
                    }
                };
            }
            Ok(())
        })
        .await
    }

    /// Writes down that an upload was begun, or, without its id, that it is over.
    pub async fn mark(
        &self,
        hash: StorePathHash,
        upload: Option<String>,
        now: u64,
    ) -> Result<(), QueueError> {
        self.change(move |transaction| {
            let hash = hash.to_string();
            match upload {
                Some(upload) => transaction.execute(
                    "INSERT INTO begun VALUES (?1, ?2, ?3)
                     ON CONFLICT DO UPDATE SET upload = ?2, at = ?3",
                    params![hash, upload, signed(now)],
                ),
                None => transaction.execute("DELETE FROM begun WHERE hash = ?1", [hash]),
            }
            .map(drop)
        })
        .await
    }

    /// Returns the uploads that were begun and may still be known.
    pub async fn begun(&self, now: u64) -> Result<BTreeMap<StorePathHash, String>, QueueError> {
        self.change(move |transaction| {
            let earliest = signed(now.saturating_sub(BEGUN_SECONDS));
            transaction.execute(
                "DELETE FROM begun WHERE at < ?1 OR at > ?2",
                [earliest, signed(now)],
            )?;
            let mut select = transaction.prepare("SELECT hash, upload FROM begun LIMIT ?1")?;
            let rows = select.query_map([BEGUN_MAX], |row| {
                Ok((row.get::<_, String>(0)?, row.get(1)?))
            })?;
            let mut begun = BTreeMap::new();
            for row in rows {
                let (hash, upload) = row?;
                // One that is malformed costs a NAR that is begun anew.
                if let Ok(hash) = hash.parse() {
                    begun.insert(hash, upload);
                }
            }
            Ok(begun)
        })
        .await
    }

    pub async fn count(&self) -> Result<Count, QueueError> {
        self.change(|transaction| {
            let (waiting, bytes, failed): (i64, i64, i64) = transaction.query_row(
                "SELECT count(*), coalesce(sum(nar_size), 0), coalesce(sum(failures > 0), 0)
                 FROM uploads WHERE state = ?1",
                [WAITING],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )?;
            let staying: i64 = transaction.query_row(
                "SELECT count(*) FROM uploads WHERE state = ?1",
                [STAYS],
                |row| row.get(0),
            )?;
            let problem = transaction.query_row(
                "SELECT hash || '-' || name || ': ' || problem FROM uploads
                 WHERE problem IS NOT NULL AND state != ?1
                 ORDER BY state, is_asked DESC, registered DESC LIMIT 1",
                [SETTLED],
                |row| row.get(0),
            );
            Ok(Count {
                waiting: waiting.cast_unsigned(),
                waiting_bytes: bytes.cast_unsigned(),
                staying: staying.cast_unsigned(),
                failed: failed.cast_unsigned(),
                problem: problem.optional()?,
            })
        })
        .await
    }

    /// A number that changes when another process has written.
    pub async fn version(&self) -> Result<i64, QueueError> {
        // Inside a transaction it would not change.
        self.run(|connection| connection.query_row("PRAGMA data_version", [], |row| row.get(0)))
            .await
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        self.run(|connection| {
            // At once for writing: one that only becomes so may find that another process was faster.
            let transaction = connection.transaction_with_behavior(IMMEDIATE)?;
            let changed = change(&transaction)?;
            transaction.commit()?;
            Ok(changed)
        })
        .await
    }

    /// Uses the connection on a thread that may block.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        let connection = self.connection.clone();
        let run = move || {
            let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut connection)
        };
        match tokio::task::spawn_blocking(run).await {
            Ok(outcome) => Ok(outcome?),
            Err(_) => Err(QueueError::Stopped),
        }
    }
}

/// SQLite's numbers have a sign; no real size or time needs the bit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Whether the file is of no use, rather than not to be had at the moment.
fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    ) || matches!(error, rusqlite::Error::InvalidQuery)
}

fn try_open(path: &Path) -> rusqlite::Result<Connection> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Else SQLite compiles a statement anew for each value bound to it, in the hope of a better plan.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // A power cut may lose the last changes: then something is asked about once more.
    connection.pragma_update(None, "synchronous", "normal")?;
    // Two processes may open it at once; one of them makes it.
    let transaction = connection.transaction_with_behavior(IMMEDIATE)?;
    let version: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match version {
        SCHEMA_VERSION => {}
        0 => transaction
            .execute_batch(&format!("{SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};"))?,
        _ => return Err(rusqlite::Error::InvalidQuery),
    }
    transaction.commit()?;
    let check: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    match check.as_str() {
        "ok" => Ok(connection),
        _ => Err(rusqlite::Error::InvalidQuery),
    }
}

/// Notes where the pushes go. What was done or left out for another target is to be done.
fn aim(connection: &mut Connection, target: &str) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(IMMEDIATE)?;
    let found = transaction.query_row("SELECT url FROM target", [], |row| row.get::<_, String>(0));
    if found.optional()?.as_deref() != Some(target) {
        transaction.execute("DELETE FROM target", [])?;
        transaction.execute("DELETE FROM begun", [])?;
        transaction.execute("INSERT INTO target VALUES (?1)", [target])?;
        transaction.execute(
            "UPDATE uploads SET state = ?1, failures = 0, not_before = 0, problem = NULL",
            [WAITING],
        )?;
    }
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u32) -> Entry {
        let path = StorePath::from_base_name(&format!("{number:032}-path-{number}"));
        Entry {
            path: path.unwrap(),
            nar_size: u64::from(number),
            registered: i64::from(number),
        }
    }

    fn names(due: &[Due]) -> Vec<String> {
        due.iter().map(|due| due.path.name().to_owned()).collect()
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Place {
            Place(tempfile::tempdir().unwrap())
        }

        fn file(&self) -> PathBuf {
            self.0.path().join("uploads.sqlite")
        }

        fn open(&self) -> Queue {
            Queue::open(&self.file(), "http://nas/main").unwrap()
        }
    }

    #[tokio::test]
    async fn the_newest_goes_first_after_what_was_asked_for_and_once_only() {
        let place = Place::new();
        let queue = place.open();
        assert_eq!(queue.offer(vec![entry(1), entry(3)]).await.unwrap(), 2);
        assert_eq!(queue.offer(vec![entry(1), entry(2)]).await.unwrap(), 1);
        queue.ask(vec![entry(1)]).await.unwrap();
        let due = queue.due(100).await.unwrap();
        assert_eq!(names(&due), ["path-1", "path-3", "path-2"]);
        assert!(due[0].is_asked && !due[1].is_asked);
        assert_eq!(queue.count().await.unwrap().waiting_bytes, 6);

        let done = due.into_iter().map(|due| (due.path, Settled::Done));
        queue.settle(done.collect()).await.unwrap();
        drop(queue);
        let queue = place.open();
        assert_eq!(queue.offer(vec![entry(1), entry(2)]).await.unwrap(), 0);
        assert_eq!(queue.due(100).await.unwrap(), []);
        queue.ask(vec![entry(2)]).await.unwrap();
        assert_eq!(names(&queue.due(100).await.unwrap()), ["path-2"]);
    }

    #[tokio::test]
    async fn what_failed_waits_for_its_time_and_a_wrong_clock_holds_up_nothing() {
        let place = Place::new();
        let queue = place.open();
        queue.offer(vec![entry(1), entry(2)]).await.unwrap();
        let later = Settled::Later {
            not_before: 150,
            problem: "no".to_owned(),
        };
        let settled = vec![(entry(2).path, later)];
        queue.settle(settled).await.unwrap();
        assert_eq!(names(&queue.due(149).await.unwrap()), ["path-1"]);
        assert_eq!(names(&queue.due(150).await.unwrap()), ["path-2", "path-1"]);
        queue
            .settle(vec![(entry(1).path, Settled::Gone)])
            .await
            .unwrap();
        assert_eq!(queue.next_due().await.unwrap(), Some(150));
        assert_eq!(queue.due(100).await.unwrap(), []);
        let count = queue.count().await.unwrap();
        assert_eq!((count.waiting, count.failed), (1, 1));
        assert!(count.problem.unwrap().ends_with("path-2: no"));

        let settled = Settled::Later {
            not_before: 1 << 40,
            problem: "the year 36812".to_owned(),
        };
        queue.settle(vec![(entry(2).path, settled)]).await.unwrap();
        assert_eq!(queue.due(100).await.unwrap()[0].failures, 2);
    }

    #[tokio::test]
    async fn what_left_the_store_is_forgotten() {
        let place = Place::new();
        let queue = place.open();
        queue
            .offer(vec![entry(1), entry(2), entry(3)])
            .await
            .unwrap();
        queue.ask(vec![entry(4)]).await.unwrap();
        queue.remove(vec![entry(1).path.hash()]).await.unwrap();
        let kept = BTreeSet::from([entry(2).path.hash()]);
        queue.retain(kept).await.unwrap();
        assert_eq!(names(&queue.due(100).await.unwrap()), ["path-4", "path-2"]);
    }

    #[tokio::test]
    async fn another_target_and_another_configuration_are_another_matter() {
        let place = Place::new();
        let queue = place.open();
        queue.offer(vec![entry(1), entry(2)]).await.unwrap();
        let stays = Settled::Stays("a secret".to_owned());
        let settled = vec![(entry(1).path, Settled::Done), (entry(2).path, stays)];
        queue.settle(settled).await.unwrap();
        assert_eq!(queue.count().await.unwrap().staying, 1);
        queue.reconsider().await.unwrap();
        assert_eq!(names(&queue.due(100).await.unwrap()), ["path-2"]);
        let queue = Queue::open(&place.file(), "http://nas/other").unwrap();
        assert_eq!(names(&queue.due(100).await.unwrap()), ["path-2", "path-1"]);
    }

    #[tokio::test]
    async fn a_damaged_file_is_set_aside_and_made_anew() {
        let place = Place::new();
        fs::write(place.file(), "this is no database, however long the text").unwrap();
        let queue = place.open();
        assert_eq!(queue.due(100).await.unwrap(), []);
        assert!(place.0.path().join("uploads.sqlite.damaged").exists());
    }

    #[tokio::test]
    async fn an_upload_is_remembered_until_it_is_over_or_forgotten_by_the_anchor() {
        let place = Place::new();
        let queue = place.open();
        for (number, at) in [(1, 10_000), (2, 10_000), (3, 6_000), (4, 99_999)] {
            let upload = Some(format!("upload-{number}"));
            let hash = entry(number).path.hash();
            queue.mark(hash, upload, at).await.unwrap();
        }
        queue
            .mark(entry(2).path.hash(), None, 10_000)
            .await
            .unwrap();
        drop(queue);
        let begun = place.open().begun(10_001).await.unwrap();
        let expected = BTreeMap::from([(entry(1).path.hash(), "upload-1".to_owned())]);
        assert_eq!(begun, expected);
    }

    #[tokio::test]
    async fn another_process_is_noticed() {
        let place = Place::new();
        let (queue, other) = (place.open(), place.open());
        let before = queue.version().await.unwrap();
        queue.offer(vec![entry(1)]).await.unwrap();
        assert_eq!(queue.version().await.unwrap(), before);
        other.ask(vec![entry(2)]).await.unwrap();
        assert_ne!(queue.version().await.unwrap(), before);
    }
}
