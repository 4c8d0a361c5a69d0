//! The loopback key: with it this node tells the Nix of this machine that it believes a path.
//!
//! Nix believes keys, and a member that vouches for what it built has none that Nix knows. So the node,
//! having proved the voucher, signs the answer on loopback with a key of its own, which this machine's
//! nix.conf alone trusts (`granary use`). One more machine in the mesh is then no line more in any
//! nix.conf, and none stays in there that was put out of it.
//!
//! A file of the state folder in the format of Nix's `secret-key-files`, random, made at first use.
//!
//! Invariants: the key never leaves the machine, nor does a signature by it (`store/shared`); a file that
//! others may read is refused.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use granary_protocol::nix32;
use granary_protocol::signature::{KeyName, SecretKey, SignatureError};
use zeroize::Zeroizing;

use crate::secret;
use crate::state_folder;

/// How the names of all loopback keys begin; what follows is random, so that no two have one name.
pub const NAME_PREFIX: &str = "granary-loopback-";

/// Random bytes of a name.
const NAME_BYTES: usize = 5;

/// Largest file read; a key has some 130 bytes.
const FILE_BYTES_MAX: u64 = 4096;

/// Why there is no loopback key.
#[derive(Debug, thiserror::Error)]
pub enum LoopbackKeyError {
    #[error("cannot {action} the loopback key {path}: {source}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the loopback key {path} has mode {mode:04o}, others may read it, refusing to use it; remove it to have another one made, and run granary use",
        path = .path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{path} is no secret key: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: SignatureError,
    },
    #[error("the system gave no random bytes for a loopback key: {0}")]
    NoRandomness(getrandom::Error),
}

/// Reads the key; `None` when there is none.
pub fn load(path: &Path) -> Result<Option<SecretKey>, LoopbackKeyError> {
    let failed = |source| LoopbackKeyError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let Some(text) = state_folder::read(path, FILE_BYTES_MAX).map_err(failed)? else {
        return Ok(None);
    };
    let text = Zeroizing::new(text);
    let metadata = fs::metadata(path).map_err(failed)?;
    if let Some(mode) = secret::exposed(path, &metadata) {
        return Err(LoopbackKeyError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let key = text.trim().parse();
    key.map(Some).map_err(|source| LoopbackKeyError::Malformed {
        path: path.to_owned(),
        source,
    })
}

/// Reads the key, or makes one at first use. Its folder must be there.
///
/// Two processes that start together agree.
pub fn load_or_create(path: &Path) -> Result<SecretKey, LoopbackKeyError> {
    if let Some(key) = load(path)? {
        return Ok(key);
    }
    let failed = |source| LoopbackKeyError::Io {
        action: "make",
        path: path.to_owned(),
        source,
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let _lock = state_folder::lock(folder).map_err(failed)?;
    if let Some(key) = load(path)? {
        return Ok(key);
    }
    let (mut seed, mut name) = (Zeroizing::new([0; 32]), [0; NAME_BYTES]);
    getrandom::fill(seed.as_mut()).map_err(LoopbackKeyError::NoRandomness)?;
    getrandom::fill(&mut name).map_err(LoopbackKeyError::NoRandomness)?;
    let name = KeyName::new(&format!("{NAME_PREFIX}{}", nix32::encode(&name)));
    let key = SecretKey::from_seed(name.expect("letters, digits and hyphens"), *seed);
    let text = key.to_nix_string();
    state_folder::write(path, text.as_bytes()).map_err(failed)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_private_and_stays_and_no_two_are_alike() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loopback-key");
        assert!(load(&path).unwrap().is_none());
        let first = load_or_create(&path).unwrap().public_key();
        assert_eq!(load_or_create(&path).unwrap().public_key(), first);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = load_or_create(&folder.path().join("other")).unwrap();
        assert_ne!(other.name(), first.name());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loopback-key");
        load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = load_or_create(&path).unwrap_err();
        assert!(
            matches!(error, LoopbackKeyError::Exposed { mode: 0o644, .. }),
            "{error}"
        );
    }
}
