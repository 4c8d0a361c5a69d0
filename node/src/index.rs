//! SqliteIndex: the availability index on disk, so that a restart sends cursors and not sets.
//!
//! Disposable by design: a file that is damaged or of another version is set aside and made anew,
//! an error while running is counted and answered as if nothing were known. Prefixes and cursors
//! are unsigned 64-bit numbers and SQLite's are signed; flipping the top bit keeps their order.
//!
//! Used by the mesh's own thread only; its calls block.

use std::fs;
use std::path::{Path, PathBuf};

use granary_protocol::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use granary_protocol::peer::PeerId;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension, params};
use tracing::warn;

/// Written to `user_version`. A file with another number is made anew.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
    CREATE TABLE writers (
        id INTEGER PRIMARY KEY, peer BLOB NOT NULL UNIQUE,
        epoch INTEGER NOT NULL, sequence INTEGER NOT NULL, proof BLOB
    ) STRICT;
    CREATE TABLE holdings (
        writer INTEGER NOT NULL, prefix INTEGER NOT NULL, is_hidden INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (writer, prefix)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX holders ON holdings (prefix, writer);
";

/// An [`AvailabilityIndex`] in a file.
pub struct SqliteIndex {
    connection: Connection,
    errors: u64,
}

/// Why the index could not be opened, even as a new file.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the availability index at {path}: {source}", path = .path.display())]
pub struct IndexError {
    path: PathBuf,
    source: rusqlite::Error,
}

impl SqliteIndex {
    /// Opens the index at `path`; what cannot be used is moved to `<path>.damaged` and replaced.
    pub fn open(path: &Path) -> Result<SqliteIndex, IndexError> {
        match SqliteIndex::try_open(path) {
            Ok(index) => Ok(index),
            Err(error) => {
                warn!(path = %path.display(), %error, "set aside an unusable availability index");
                for suffix in ["", "-wal", "-shm"] {
                    let mut name = path.as_os_str().to_owned();
                    name.push(suffix);
                    let mut aside = path.as_os_str().to_owned();
                    aside.push(".damaged");
                    aside.push(suffix);
                    // What is not there need not be moved; what cannot be moved fails below.
                    let _ = fs::rename(name, aside);
                }
                SqliteIndex::try_open(path).map_err(|source| IndexError {
                    path: path.to_owned(),
                    source,
                })
            }
        }
    }

    /// An index that lives as long as the process.
    pub fn in_memory() -> Result<SqliteIndex, IndexError> {
        let open = || SqliteIndex::prepare(Connection::open_in_memory()?);
        open().map_err(|source| IndexError {
            path: PathBuf::from(":memory:"),
            source,
        })
    }

    /// How many operations failed since the start.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    fn try_open(path: &Path) -> rusqlite::Result<SqliteIndex> {
        let index = SqliteIndex::prepare(Connection::open(path)?)?;
        // Finds torn pages now, while there is a remedy.
        let check: String = index
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if check == "ok" {
            Ok(index)
        } else {
            Err(rusqlite::Error::InvalidQuery)
        }
    }

    fn prepare(connection: Connection) -> rusqlite::Result<SqliteIndex> {
        connection.pragma_update(None, "journal_mode", "wal")?;
        // A power cut may lose the last changes; the log's numbers reveal that to every reader.
        connection.pragma_update(None, "synchronous", "normal")?;
        // Else SQLite compiles a statement anew for each value bound to it, in the hope of a better plan.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        connection.set_prepared_statement_cache_capacity(32);
        let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        match version {
            SCHEMA_VERSION => {}
            0 => {
                connection.execute_batch(&format!(
                    "BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
                ))?;
            }
            _ => return Err(rusqlite::Error::InvalidQuery),
        }
        Ok(SqliteIndex {
            connection,
            errors: 0,
        })
    }

    fn change(&mut self, change: impl FnOnce(&rusqlite::Transaction) -> rusqlite::Result<()>) {
        let outcome = self.connection.transaction().and_then(|transaction| {
            change(&transaction)?;
            transaction.commit()
        });
        if let Err(error) = outcome {
            self.errors += 1;
            warn!(%error, "could not write the availability index");
        }
    }

    fn ask<T: Default>(&self, question: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> T {
        question(&self.connection).unwrap_or_else(|error| {
            warn!(%error, "could not read the availability index");
            T::default()
        })
    }
}

fn signed(number: u64) -> i64 {
    (number ^ (1 << 63)).cast_signed()
}

fn unsigned(number: i64) -> u64 {
    number.cast_unsigned() ^ (1 << 63)
}

fn cursor(row: &rusqlite::Row<'_>, from: usize) -> rusqlite::Result<Cursor> {
    Ok(Cursor {
        epoch: unsigned(row.get(from)?),
        sequence: unsigned(row.get(from + 1)?),
    })
}

/// Sets the cursor of a writer and returns its row.
fn set_cursor(
    transaction: &rusqlite::Transaction,
    writer: &PeerId,
    cursor: Cursor,
) -> rusqlite::Result<i64> {
    transaction
        .prepare_cached(
            "INSERT INTO writers (peer, epoch, sequence) VALUES (?1, ?2, ?3)
             ON CONFLICT (peer) DO UPDATE SET epoch = ?2, sequence = ?3 RETURNING id",
        )?
        .query_row(
            params![
                writer.as_public_key(),
                signed(cursor.epoch),
                signed(cursor.sequence)
            ],
            |row| row.get(0),
        )
}

const INSERT: &str = "INSERT INTO holdings (writer, prefix) VALUES (?1, ?2)
     ON CONFLICT DO UPDATE SET is_hidden = 0";

const PROVIDERS: &str = "SELECT peer FROM holdings JOIN writers ON id = writer
     WHERE prefix = ?1 AND NOT is_hidden ORDER BY peer";

impl AvailabilityIndex for SqliteIndex {
    fn cursor(&self, writer: &PeerId) -> Option<Cursor> {
        self.ask(|connection| {
            connection
                .prepare_cached("SELECT epoch, sequence FROM writers WHERE peer = ?1")?
                .query_row([writer.as_public_key()], |row| cursor(row, 0))
                .optional()
        })
    }

    fn writers(&self) -> Vec<(PeerId, Cursor)> {
        self.ask(|connection| {
            connection
                .prepare_cached("SELECT peer, epoch, sequence FROM writers ORDER BY peer")?
                .query_map([], |row| {
                    Ok((PeerId::from_public_key(row.get(0)?), cursor(row, 1)?))
                })?
                .collect()
        })
    }

    fn apply(&mut self, writer: &PeerId, cursor: Cursor, operations: &[Operation]) {
        self.change(|transaction| {
            let row = set_cursor(transaction, writer, cursor)?;
            let mut insert = transaction.prepare_cached(INSERT)?;
            let mut delete = transaction
                .prepare_cached("DELETE FROM holdings WHERE writer = ?1 AND prefix = ?2")?;
            for operation in operations {
                match operation {
                    Operation::Add(prefix) => insert.execute([row, signed(prefix.0)])?,
                    Operation::Remove(prefix) => delete.execute([row, signed(prefix.0)])?,
                };
            }
            Ok(())
        });
    }

    fn replace(&mut self, writer: &PeerId, cursor: Cursor, prefixes: &[HashPrefix]) {
        self.change(|transaction| {
            let row = set_cursor(transaction, writer, cursor)?;
            transaction.execute("DELETE FROM holdings WHERE writer = ?1", [row])?;
            let mut insert = transaction.prepare_cached(INSERT)?;
            for prefix in prefixes {
                insert.execute([row, signed(prefix.0)])?;
            }
            Ok(())
        });
    }

    fn withdraw(&mut self, writer: &PeerId, prefix: HashPrefix) {
        self.change(|transaction| {
            transaction
                .prepare_cached(
                    "UPDATE holdings SET is_hidden = 1 WHERE prefix = ?2
                     AND writer = (SELECT id FROM writers WHERE peer = ?1)",
                )?
                .execute(params![writer.as_public_key(), signed(prefix.0)])
                .map(drop)
        });
    }

    fn keep_proof(&mut self, writer: &PeerId, proof: &[u8]) {
        self.change(|transaction| {
            transaction
                .prepare_cached("UPDATE writers SET proof = ?2 WHERE peer = ?1")?
                .execute(params![writer.as_public_key(), proof])
                .map(drop)
        });
    }

    fn proof(&self, writer: &PeerId) -> Option<Vec<u8>> {
        self.ask(|connection| {
            connection
                .prepare_cached("SELECT proof FROM writers WHERE peer = ?1")?
                .query_row([writer.as_public_key()], |row| row.get(0))
                .optional()
                .map(Option::flatten)
        })
    }

    fn forget(&mut self, writer: &PeerId) {
        self.change(|transaction| {
            transaction.execute(
                "DELETE FROM holdings WHERE writer = (SELECT id FROM writers WHERE peer = ?1)",
                [writer.as_public_key()],
            )?;
            transaction
                .execute(
                    "DELETE FROM writers WHERE peer = ?1",
                    [writer.as_public_key()],
                )
                .map(drop)
        });
    }

    fn providers(&self, prefix: HashPrefix) -> Vec<PeerId> {
        self.ask(|connection| {
            connection
                .prepare_cached(PROVIDERS)?
                .query_map([signed(prefix.0)], |row| {
                    Ok(PeerId::from_public_key(row.get(0)?))
                })?
                .collect()
        })
    }

    fn prefixes(
        &self,
        writer: &PeerId,
        after: Option<HashPrefix>,
        limit: usize,
    ) -> Vec<HashPrefix> {
        let Some(from) = after.map_or(Some(0), |after| after.0.checked_add(1)) else {
            return Vec::new();
        };
        self.ask(|connection| {
            connection
                .prepare_cached(
                    "SELECT prefix FROM holdings
                     WHERE writer = (SELECT id FROM writers WHERE peer = ?1) AND prefix >= ?2
                     ORDER BY prefix LIMIT ?3",
                )?
                .query_map(
                    params![
                        writer.as_public_key(),
                        signed(from),
                        i64::try_from(limit).unwrap_or(i64::MAX)
                    ],
                    |row| Ok(HashPrefix(unsigned(row.get(0)?))),
                )?
                .collect()
        })
    }

    fn count(&self, writer: &PeerId) -> u64 {
        self.ask(|connection| {
            connection
                .prepare_cached(
                    "SELECT count(*) FROM holdings
                     WHERE writer = (SELECT id FROM writers WHERE peer = ?1)",
                )?
                .query_row([writer.as_public_key()], |row| row.get::<_, i64>(0))
        })
        .cast_unsigned()
    }
}

#[cfg(test)]
mod tests {
    use granary_protocol::availability::conformance;
    use rusqlite::StatementStatus;

    use super::*;

    const WRITER: PeerId = PeerId::from_public_key([1; 32]);
    const AT: Cursor = Cursor {
        epoch: 1,
        sequence: 2,
    };

    #[test]
    fn sqlite_index_conforms() {
        conformance::run(|| SqliteIndex::in_memory().unwrap());
    }

    #[test]
    fn a_question_is_compiled_once() {
        let index = SqliteIndex::in_memory().unwrap();
        for prefix in 0..4 {
            index.providers(HashPrefix(prefix));
        }
        let statement = index.connection.prepare_cached(PROVIDERS).unwrap();
        assert_eq!(statement.get_status(StatementStatus::Run), 4);
        assert_eq!(statement.get_status(StatementStatus::RePrepare), 0);
    }

    #[test]
    fn a_restart_finds_everything_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.sqlite");
        let mut index = SqliteIndex::open(&path).unwrap();
        index.replace(&WRITER, AT, &[HashPrefix(5)]);
        drop(index);
        let index = SqliteIndex::open(&path).unwrap();
        assert_eq!(index.cursor(&WRITER), Some(AT));
        assert_eq!(index.providers(HashPrefix(5)), [WRITER]);
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.sqlite");
        fs::write(&path, "this is no database, however long the text may be").unwrap();
        let index = SqliteIndex::open(&path).unwrap();
        assert_eq!(index.cursor(&WRITER), None);
        assert!(folder.path().join("index.sqlite.damaged").exists());
    }

    #[test]
    fn a_file_of_another_version_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index.sqlite");
        Connection::open(&path)
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        assert_eq!(SqliteIndex::open(&path).unwrap().cursor(&WRITER), None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let Err(error) = SqliteIndex::open(Path::new("/proc/nowhere/index.sqlite")) else {
            panic!("opened a file in /proc");
        };
        assert!(
            error.to_string().contains("/proc/nowhere/index.sqlite"),
            "{error}"
        );
    }
}
