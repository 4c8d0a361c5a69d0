//! Administration: one at a time reads settings of caches, changes and writes them, in whichever process.
//!
//! Commands change caches beside a running anchor. What one of them read before a rotation would, once written, name
//! the old keys again.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::secret;

/// Orders changes of caches by a lock within the process, and one on a file among processes.
#[derive(Debug)]
pub struct Administration {
    file: PathBuf,
    alone: tokio::sync::Mutex<()>,
}

/// Why nobody can be held off.
#[derive(Debug, thiserror::Error)]
#[error("cannot lock {path}, by which changes of caches wait for each other: {source}", path = .path.display())]
pub struct AdministrationError {
    path: PathBuf,
    source: io::Error,
}

/// Holds others off until it is dropped, or the process ends.
#[derive(Debug)]
pub struct Held<'a> {
    // The file first: who waits within the process finds it free.
    _file: File,
    _alone: tokio::sync::MutexGuard<'a, ()>,
}

impl Administration {
    pub(in crate::anchor) fn in_folder(state: &Path) -> Administration {
        Administration {
            file: state.join("administration"),
            alone: tokio::sync::Mutex::default(),
        }
    }

    /// Waits until nobody else changes a cache; what was read before is not to be relied on.
    pub(in crate::anchor) async fn hold(&self) -> Result<Held<'_>, AdministrationError> {
        let alone = self.alone.lock().await;
        let path = self.file.clone();
        let locked = tokio::task::spawn_blocking(move || {
            let file = File::create(&path)?;
            // A command that root gives may be the first to make it.
            secret::give_to_owner(&file, &path)?;
            file.lock()?;
            Ok(file)
        })
        .await;
        let locked = locked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        match locked {
            Ok(file) => Ok(Held {
                _file: file,
                _alone: alone,
            }),
            Err(source) => Err(AdministrationError {
                path: self.file.clone(),
                source,
            }),
        }
    }
}
