//! What a person hides: store paths that stay on this machine whatever the rules say.
//!
//! A file of the state folder, one base name or hash a line, written by `granary hide` and read again
//! by the running node when it changes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use granary_protocol::store_path::{StorePath, StorePathHash};

use crate::state_folder;

/// Paths hidden at once. They are named by hand; who hides more wants `share.deny`.
pub const HIDDEN_MAX: usize = 10_000;

/// Largest file read: so many lines of the longest base name (211 bytes and more of a name than any has).
const FILE_BYTES_MAX: u64 = 4 << 20;

/// The paths that are hidden, each with the words in which it was named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hidden(BTreeMap<StorePathHash, String>);

/// Why it is not known, or cannot be said, what is hidden.
#[derive(Debug, thiserror::Error)]
pub enum HiddenError {
    #[error("cannot {action} the list of hidden paths {path}: {source}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("line {line} of the list of hidden paths {path} is no store path, refusing to share anything by it", path = .path.display())]
    Line { path: PathBuf, line: usize },
    #[error("more than {HIDDEN_MAX} paths would be hidden; use share.deny for names")]
    TooMany,
}

impl Hidden {
    /// Reads the file; without one nothing is hidden.
    ///
    /// # Errors
    /// A line that cannot be read could have hidden something, so it is an error.
    pub fn load(path: &Path) -> Result<Hidden, HiddenError> {
        let read = state_folder::read(path, FILE_BYTES_MAX);
        let text = read.map_err(|source| HiddenError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let mut hidden = Hidden::default();
        for (line, text) in text.unwrap_or_default().lines().enumerate() {
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            let hash = hash_of(text).ok_or_else(|| HiddenError::Line {
                path: path.to_owned(),
                line: line + 1,
            })?;
            hidden.insert(hash, text)?;
        }
        Ok(hidden)
    }

    /// Writes the file, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), HiddenError> {
        let text: String = self.0.values().map(|name| format!("{name}\n")).collect();
        state_folder::write(path, text.as_bytes()).map_err(|source| HiddenError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Hides a path, called `name`: its base name or hash. `false` when it was hidden already.
    pub fn insert(&mut self, hash: StorePathHash, name: &str) -> Result<bool, HiddenError> {
        if self.0.len() >= HIDDEN_MAX && !self.0.contains_key(&hash) {
            return Err(HiddenError::TooMany);
        }
        Ok(self.0.insert(hash, name.to_owned()).is_none())
    }

    /// Shows a path again; `false` when it was not hidden.
    pub fn remove(&mut self, hash: &StorePathHash) -> bool {
        self.0.remove(hash).is_some()
    }

    pub fn contains(&self, hash: &StorePathHash) -> bool {
        self.0.contains_key(hash)
    }

    /// The words in which the paths were named.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(String::as_str)
    }

    /// What is hidden here and not in `other`.
    pub fn without<'a>(&'a self, other: &'a Hidden) -> impl Iterator<Item = StorePathHash> + 'a {
        let is_new = |hash: &&StorePathHash| !other.contains(hash);
        self.0.keys().filter(is_new).copied()
    }
}

/// Reads a base name or a hash.
fn hash_of(text: &str) -> Option<StorePathHash> {
    let path = StorePath::from_base_name(text).map(|path| path.hash());
    path.ok().or_else(|| text.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60";

    #[test]
    fn what_is_hidden_survives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hidden");
        assert_eq!(Hidden::load(&file).unwrap(), Hidden::default());
        let mut hidden = Hidden::default();
        let hash = hash_of(NAME).unwrap();
        assert!(hidden.insert(hash, NAME).unwrap());
        assert!(!hidden.insert(hash, NAME).unwrap());
        hidden.save(&file).unwrap();
        let mut read = Hidden::load(&file).unwrap();
        assert_eq!(read, hidden);
        assert_eq!(read.names().collect::<Vec<_>>(), [NAME]);
        assert!(read.remove(&hash) && !read.contains(&hash));
        assert_eq!(hidden.without(&read).collect::<Vec<_>>(), [hash]);
    }

    #[test]
    fn a_line_that_could_have_hidden_something_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hidden");
        std::fs::write(&file, format!("{NAME}\nnet-tools\n")).unwrap();
        let error = Hidden::load(&file).unwrap_err();
        assert!(
            matches!(error, HiddenError::Line { line: 2, .. }),
            "{error}"
        );
    }
}
