//! A store laid out by the demo, for machines without Nix: a folder of paths and a database of
//! Nix's schema 10, which the node reads as it reads Nix's own.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use granary_protocol::hash::{Hash, NarHasher};
use granary_protocol::nar::{Decoder, Event};
use granary_protocol::narinfo::NarInfo;
use granary_protocol::store_path::StoreDir;
use rusqlite::{Connection, params};

use crate::store::StoreConfig;

/// What Nix 2.3 and later create, as far as a reader sees it.
const SCHEMA: &str = "
    CREATE TABLE ValidPaths (
        id integer primary key autoincrement not null, path text unique not null,
        hash text not null, registrationTime integer not null, deriver text, narSize integer,
        ultimate integer, sigs text, ca text
    );
    CREATE TABLE Refs (
        referrer integer not null, reference integer not null, primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict
    );
    CREATE INDEX IndexReferrer ON Refs(referrer);
    CREATE INDEX IndexReference ON Refs(reference);
";

/// A store that is written to.
pub struct FolderStore {
    dir: StoreDir,
    real_dir: PathBuf,
    database: Connection,
}

impl FolderStore {
    pub fn create(config: &StoreConfig) -> Result<()> {
        fs::create_dir_all(&config.real_dir)?;
        let folder = config
            .database
            .parent()
            .context("the database has a folder")?;
        fs::create_dir_all(folder)?;
        fs::write(folder.join("schema"), "10")?;
        let database = Connection::open(&config.database)?;
        database.pragma_update(None, "journal_mode", "wal")?;
        database.execute_batch(SCHEMA)?;
        Ok(())
    }

    pub fn open(config: &StoreConfig) -> Result<FolderStore> {
        Ok(FolderStore {
            dir: config.dir.clone(),
            real_dir: config.real_dir.clone(),
            database: Connection::open(&config.database)?,
        })
    }

    /// Unpacks a NAR, proves its hash, and registers the path; its references must be there.
    pub fn add(&self, narinfo: &NarInfo, nar: &[u8]) -> Result<()> {
        let mut hasher = NarHasher::new();
        hasher.update(nar);
        let found = hasher.finish();
        ensure!(
            found == narinfo.nar_hash,
            "{} came as {found}",
            narinfo.store_path
        );
        unpack(nar, &self.real_dir.join(narinfo.store_path.base_name()))?;

        let signatures: Vec<String> = narinfo.signatures.iter().map(ToString::to_string).collect();
        let full = |path| self.dir.display(path);
        // Unchecked, because only exclusive access begins one otherwise; there is one writer.
        let transaction = self.database.unchecked_transaction()?;
        transaction.execute(
            "INSERT INTO ValidPaths (path, hash, registrationTime, narSize, sigs)
             VALUES (?1, ?2, unixepoch(), ?3, ?4)",
            params![
                full(&narinfo.store_path),
                Hash::sha256(*narinfo.nar_hash.as_bytes()).to_base16(),
                i64::try_from(narinfo.nar_size)?,
                signatures.join(" "),
            ],
        )?;
        let referrer = transaction.last_insert_rowid();
        for reference in &narinfo.references {
            let added = transaction.execute(
                "INSERT INTO Refs SELECT ?1, id FROM ValidPaths WHERE path = ?2",
                params![referrer, full(reference)],
            )?;
            ensure!(
                added == 1,
                "{} refers to {reference}, which is not there",
                narinfo.store_path
            );
        }
        transaction.commit()?;
        Ok(())
    }
}

/// Unpacks a NAR as `target`. The decoder refuses names that could lead elsewhere.
fn unpack(mut nar: &[u8], target: &Path) -> Result<()> {
    let mut decoder = Decoder::new();
    let mut path = target.to_owned();
    let mut file: Option<File> = None;
    // How many names `path` has beyond the directory that is being filled.
    let mut entered = Vec::new();
    while let Some(event) = decoder.next(&mut nar)? {
        match event {
            Event::Entry { name } => {
                if entered.last() == Some(&true) {
                    path.pop();
                }
                path.push(std::ffi::OsStr::from_bytes(name));
                if let Some(last) = entered.last_mut() {
                    *last = true;
                }
            }
            Event::Directory => {
                fs::create_dir(&path)?;
                entered.push(false);
            }
            Event::EndDirectory => {
                if entered.pop() == Some(true) {
                    path.pop();
                }
            }
            Event::Regular { executable, .. } => {
                let created = File::create_new(&path)?;
                let mode = if executable { 0o555 } else { 0o444 };
                created.set_permissions(fs::Permissions::from_mode(mode))?;
                file = Some(created);
            }
            Event::Contents(bytes) => {
                file.as_mut()
                    .context("contents follow a file")?
                    .write_all(bytes)?;
            }
            Event::Symlink { target } => symlink(std::ffi::OsStr::from_bytes(target), &path)?,
            Event::End => {}
        }
    }
    decoder.finish()?;
    Ok(())
}
