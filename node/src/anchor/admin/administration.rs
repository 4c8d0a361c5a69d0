//! Administration: one at a time reads settings of caches, changes and writes them, in whichever process.
//!
//! Commands change caches beside a running anchor. What one of them read before a rotation would, once written, name
//! the old keys again.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::secret;

/// How soon a file that another process locks is looked at again. A change takes some round trips to storage.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

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

    /// Waits until nobody else changes a cache; what was read before is not to be relied on. Cancel-safe.
    pub(in crate::anchor) async fn hold(&self) -> Result<Held<'_>, AdministrationError> {
        loop {
            // A thread that waited for the lock could not be called off when the anchor ends.
            match self.try_hold().await? {
                Some(held) => return Ok(held),
                None => tokio::time::sleep(LOCK_PAUSE).await,
            }
        }
    }

    /// The same unless another process changes a cache now; in this one it waits its turn.
    pub(in crate::anchor) async fn try_hold(
        &self,
    ) -> Result<Option<Held<'_>>, AdministrationError> {
        let alone = self.alone.lock().await;
        let path = self.file.clone();
        let locked = tokio::task::spawn_blocking(move || {
            let file = File::create(&path)?;
            // A command that root gives may be the first to make it.
            secret::give_to_owner(&file, &path)?;
            match file.try_lock() {
                Ok(()) => Ok(Some(file)),
                Err(TryLockError::WouldBlock) => Ok(None),
                Err(TryLockError::Error(error)) => Err(error),
            }
        })
        .await;
        let locked = locked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let file = locked.map_err(|source| AdministrationError {
            path: self.file.clone(),
            source,
        })?;
        Ok(file.map(|file| Held {
            _file: file,
            _alone: alone,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_holds_it_at_a_time_in_whichever_process() {
        let folder = tempfile::tempdir().unwrap();
        let ours = Administration::in_folder(folder.path());
        // A file that is opened anew is locked as another process would.
        let theirs = Administration::in_folder(folder.path());
        let held = theirs.hold().await.unwrap();
        assert!(ours.try_hold().await.unwrap().is_none());
        let (held_at_last, ()) = tokio::join!(ours.hold(), async { drop(held) });
        assert!(theirs.try_hold().await.unwrap().is_none());
        drop(held_at_last);
        assert!(theirs.try_hold().await.unwrap().is_some());
    }
}
