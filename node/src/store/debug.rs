//! Debug information: which store path holds it for a build id.
//!
//! Nixpkgs puts the debug symbols of a package into an output of their own, whose name ends with
//! `-debug`, as `lib/debug/.build-id/<2>/<rest>.debug`. The paths with such names are remembered;
//! a question looks for one file in each of them. They are found by the database's rising ids, so
//! after the first question only new rows are read, and no question walks the store.

use std::{collections::BTreeMap, str::FromStr, sync::Arc};

use granary_protocol::store_path::{StorePath, StorePathHash};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat},
    io::Errno,
};
use tokio::{sync::Mutex, task::spawn_blocking};

use super::{Database, StoreConfig, StoreError, database::FileId};

/// Paths whose names end with `-debug`, at most; the newest are kept. Each costs one look at the
/// disk per question, some 5 µs.
const DEBUG_PATHS_MAX: usize = 4096;

/// Rows of one query: a read transaction of some milliseconds.
const ROWS_MAX: usize = 8192;

/// Hexadecimal digits of a build id: GNU ld makes 40, others 16 to 64.
const BUILD_ID_DIGITS: std::ops::RangeInclusive<usize> = 4..=128;

/// The id that a linker gave to a binary, in lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildId(String);

/// Why a text is no build id.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a build id")]
pub struct BuildIdError {
    text: String,
}

/// Finds debug information in one store.
pub struct DebugInfo {
    config: Arc<StoreConfig>,
    database: Arc<Database>,
    /// Held across a query, so that questions at once read new rows once.
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    file: Option<FileId>,
    last_id: i64,
    paths: BTreeMap<i64, StorePath>,
}

impl DebugInfo {
    pub fn new(config: Arc<StoreConfig>, database: Arc<Database>) -> DebugInfo {
        DebugInfo {
            config,
            database,
            known: Mutex::default(),
        }
    }

    /// Returns the paths that hold the debug information of `id` on this disk; normally one.
    ///
    /// Whether they are still valid is for the caller to ask.
    pub async fn find(&self, id: &BuildId) -> Result<Vec<StorePathHash>, StoreError> {
        let paths: Vec<StorePath> = {
            let mut known = self.known.lock().await;
            self.learn(&mut known).await?;
            known.paths.values().cloned().collect()
        };
        let real_dir = self.config.real_dir.clone();
        let member = id.member();
        spawn_blocking(move || {
            let mut found = Vec::new();
            for path in paths {
                let file = real_dir.join(path.base_name());
                match holds(&file, &member) {
                    Ok(true) => found.push(path.hash()),
                    Ok(false) => {}
                    Err(error) => {
                        return Err(StoreError::File {
                            file,
                            source: error.into(),
                        });
                    }
                }
            }
            Ok(found)
        })
        .await
        .map_err(|_| StoreError::Stopped)?
    }

    /// Reads the rows that were not there at the last question.
    async fn learn(&self, known: &mut Known) -> Result<(), StoreError> {
        loop {
            let newer = self
                .database
                .names_after(known.last_id, "-debug", ROWS_MAX)
                .await?;
            if known.file != Some(newer.file) {
                // Another database: its ids say nothing about what is known.
                let is_first = known.last_id == 0;
                *known = Known {
                    file: Some(newer.file),
                    ..Known::default()
                };
                if !is_first {
                    continue;
                }
            }
            let Some(last_id) = newer.last_id else {
                return Ok(());
            };
            known.last_id = last_id;
            known.paths.extend(newer.paths);
            while known.paths.len() > DEBUG_PATHS_MAX {
                known.paths.pop_first();
            }
        }
    }
}

/// Looks for a regular file below a path, one component at a time and never through a symlink.
fn holds(path: &std::path::Path, member: &str) -> Result<bool, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let look = || -> Result<bool, Errno> {
        let mut directory = openat(CWD, path, flags, Mode::empty())?;
        let mut names = member.split('/').peekable();
        while let Some(name) = names.next() {
            if names.peek().is_some() {
                directory = openat(&directory, name, flags, Mode::empty())?;
            } else {
                let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                return Ok(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
            }
        }
        Ok(false)
    };
    match look() {
        // Not there, or something else is.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
        result => result,
    }
}

impl BuildId {
    /// Returns the file that holds this id's debug information, below its store path.
    pub fn member(&self) -> String {
        let (folder, rest) = self.0.split_at(2);
        format!("lib/debug/.build-id/{folder}/{rest}.debug")
    }
}

impl FromStr for BuildId {
    type Err = BuildIdError;

    fn from_str(text: &str) -> Result<BuildId, BuildIdError> {
        let is_hexadecimal = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match BUILD_ID_DIGITS.contains(&text.len()) && text.bytes().all(is_hexadecimal) {
            true => Ok(BuildId(text.to_owned())),
            false => Err(BuildIdError {
                text: text.chars().take(*BUILD_ID_DIGITS.end()).collect(),
            }),
        }
    }
}
