//! The list of revocations on this machine: a file of the state folder, kept over restarts, and the
//! way in which a person gives the node a new one.

use std::io;
use std::path::{Path, PathBuf};

use granary_protocol::mesh::Input;
use granary_protocol::revocation::{
    REVOCATIONS_TEXT_BYTES_MAX, RevocationsError, SignedRevocations,
};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::Loop;
use crate::state_folder;

/// Where the list is kept.
pub struct RevocationsFile {
    pub path: PathBuf,
    /// Whether it may have changed.
    pub changes: watch::Receiver<()>,
}

/// Why it is not known who was revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevocationsFileError {
    #[error("cannot read the list of revocations {path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is no list of revocations: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: RevocationsError,
    },
}

/// Reads a list; `None` when there is no file.
pub fn read(path: &Path) -> Result<Option<SignedRevocations>, RevocationsFileError> {
    let text = state_folder::read(path, REVOCATIONS_TEXT_BYTES_MAX as u64);
    let text = text.map_err(|source| RevocationsFileError::Io {
        path: path.to_owned(),
        source,
    })?;
    let list = text.map(|text| SignedRevocations::from_text(&text));
    list.transpose()
        .map_err(|source| RevocationsFileError::Malformed {
            path: path.to_owned(),
            source,
        })
}

/// Writes a list, whole or not at all.
pub fn write(path: &Path, list: &SignedRevocations) -> io::Result<()> {
    state_folder::write(path, format!("{}\n", list.to_text()).as_bytes())
}

impl Loop {
    /// Tells the mind what a process before this one kept, or a person put there.
    pub(super) fn read_revocations(&mut self) -> Result<(), RevocationsFileError> {
        let path = self.revocations.as_ref().map(|file| file.path.clone());
        if let Some(list) = path.map(|path| read(&path)).transpose()?.flatten() {
            self.think(Input::Revocations { list });
        }
        Ok(())
    }

    pub(super) fn revocations_changed(&mut self) {
        if let Err(error) = self.read_revocations() {
            let file = self
                .revocations
                .as_ref()
                .map(|file| file.path.display().to_string());
            error!(file, %error, "could not read a new list of revocations, the old one holds");
        }
    }

    /// Keeps a newer list, which came from the mesh or is in the file already.
    pub(super) fn keep_revocations(&mut self, list: &SignedRevocations) {
        let (number, count) = (list.claims().number, list.claims().revoked.len());
        info!(
            number,
            revoked = count,
            "learned of a new list of revocations"
        );
        if list.claims().revoked.contains_key(&self.me) {
            warn!("this machine is on the list of revocations: others close their links to it");
        }
        let Some(file) = &self.revocations else {
            return;
        };
        // Some hundred bytes, on the thread that writes the index as well.
        let is_there = read(&file.path).is_ok_and(|known| known.as_ref() == Some(list));
        if !is_there && let Err(error) = write(&file.path, list) {
            warn!(%error, "could not keep the list of revocations, it must be heard of again after a restart");
        }
    }
}

pub(super) async fn changed(file: &mut Option<RevocationsFile>) {
    if let Some(file) = file
        && file.changes.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}
