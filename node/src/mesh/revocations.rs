//! The list of revocations on this machine: a file of the state folder, kept over restarts, and the
//! way in which a person gives the node a new one.

use std::io;
use std::path::{Path, PathBuf};

use granary_protocol::mesh::Input;
use granary_protocol::revocation::{
    NotOurRevocations, REVOCATIONS_TEXT_BYTES_MAX, RevocationsError, SignedRevocations,
};
use granary_protocol::signature::PublicKey;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use super::Loop;
use crate::state_folder;

/// Where the list is kept.
pub struct RevocationsFile {
    pub path: PathBuf,
    /// Whose signature a list must have.
    pub mesh_key: PublicKey,
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
    #[error(
        "{path} is no list of this mesh, refusing to go on without knowing who was put out: {source}; remove it if this machine was in another mesh",
        path = .path.display()
    )]
    NotOurs {
        path: PathBuf,
        source: NotOurRevocations,
    },
}

/// Reads a list that the mesh key signed; `None` when there is no file.
pub fn read(
    path: &Path,
    mesh_key: &PublicKey,
) -> Result<Option<SignedRevocations>, RevocationsFileError> {
    let text = state_folder::read(path, REVOCATIONS_TEXT_BYTES_MAX as u64);
    let text = text.map_err(|source| RevocationsFileError::Io {
        path: path.to_owned(),
        source,
    })?;
    let list = text.map(|text| SignedRevocations::from_text(&text));
    let list = list
        .transpose()
        .map_err(|source| RevocationsFileError::Malformed {
            path: path.to_owned(),
            source,
        })?;
    if let Some(list) = &list {
        list.verify(mesh_key)
            .map_err(|source| RevocationsFileError::NotOurs {
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(list)
}

/// Writes a list, whole or not at all.
pub fn write(path: &Path, list: &SignedRevocations) -> io::Result<()> {
    state_folder::write(path, format!("{}\n", list.to_text()).as_bytes())
}

impl Loop {
    /// Tells the mind what a process before this one kept, or a person put there.
    pub(super) fn read_revocations(&mut self) -> Result<(), RevocationsFileError> {
        let Some(file) = &self.revocations else {
            return Ok(());
        };
        if let Some(list) = read(&file.path, &file.mesh_key)? {
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

    /// Keeps a list: one that came from the mesh, is in the file already, or was replaced there by an
    /// older one.
    pub(super) fn keep_revocations(&mut self, list: &SignedRevocations) {
        let (number, revoked) = (list.claims().number, list.claims().revoked.len());
        // At most 220 kB, rarely, on the thread that writes the index as well.
        let kept = self.revocations.as_ref().and_then(|file| {
            // What cannot be read is written over.
            read(&file.path, &file.mesh_key).ok().flatten()
        });
        if kept.as_ref() == Some(list) {
            info!(number, revoked, "read the list of revocations");
        } else if self.revocations_number >= number {
            warn!(
                number,
                "an older list of revocations was put in the place of ours, putting ours back"
            );
        } else {
            info!(number, revoked, "learned of a new list of revocations");
        }
        self.revocations_number = number;
        if list.claims().revoked.contains_key(&self.me) {
            warn!("this machine is on the list of revocations: others close their links to it");
        }
        self.unkept_revocations = None;
        if kept.as_ref() != Some(list)
            && let Err(error) = self.write_revocations(list)
        {
            warn!(%error, "could not keep the list of revocations, trying again");
            self.unkept_revocations = Some(list.clone());
        }
    }

    fn write_revocations(&self, list: &SignedRevocations) -> io::Result<()> {
        match &self.revocations {
            Some(file) => write(&file.path, list),
            None => Ok(()),
        }
    }

    /// Writes a list that could not be written before: whoever reads the file, as the anchor beside us does, does not know
    /// yet who was put out.
    pub(super) fn keep_unkept_revocations(&mut self) {
        let Some(list) = &self.unkept_revocations else {
            return;
        };
        match self.write_revocations(list) {
            Ok(()) => {
                info!("kept the list of revocations at last");
                self.unkept_revocations = None;
            }
            Err(error) => debug!(%error, "could not keep the list of revocations again"),
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

#[cfg(test)]
mod tests {
    use granary_protocol::revocation::Revocations;
    use granary_protocol::signature::SecretKey;

    use super::*;

    #[test]
    fn a_list_is_read_only_if_this_mesh_signed_it() {
        let key = |name: &str, seed| SecretKey::from_seed(name.parse().unwrap(), [seed; 32]);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("revocations");
        let ours = key("home", 1).public_key();
        assert!(matches!(read(&file, &ours), Ok(None)));
        let list = Revocations::default().sign(&key("home", 1)).unwrap();
        write(&file, &list).unwrap();
        assert_eq!(read(&file, &ours).unwrap(), Some(list));
        for other in [key("office", 1), key("home", 2)] {
            let error = read(&file, &other.public_key()).unwrap_err();
            assert!(
                matches!(error, RevocationsFileError::NotOurs { .. }),
                "{error}"
            );
        }
    }
}
