//! Identity: the ed25519 key that names this machine in the mesh.
//!
//! One file of 32 secret bytes (the seed of RFC 8032), made at first start, mode 0600. Its public half
//! is the [`PeerId`] on the control plane and in the certificates of the data plane.
//! It signs for nobody else: the loopback key and an anchor's cache keys are other keys.
//!
//! Invariants: a key file is whole or absent, even after a crash; a file that others may read is refused;
//! the secret never reaches a log.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use granary_protocol::peer::PeerKey;
use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use zeroize::Zeroizing;

use crate::secret;

/// Bytes of the seed, and so of the file.
const SEED_BYTES: usize = 32;

/// Returns the raw ed25519 public key inside a peer id; `None` for an id of any other kind of key.
pub fn ed25519_of(peer: &PeerId) -> Option<[u8; 32]> {
    granary_protocol::peer::PeerId::from_multihash(&peer.to_bytes())
        .map(|peer| *peer.as_public_key())
}

/// Returns the peer id of a raw ed25519 public key; `None` if the bytes are not a point of the curve.
pub fn peer_id_of(key: &[u8; 32]) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(key).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// The key of this machine.
#[derive(Clone)]
pub struct Identity {
    keypair: ed25519::Keypair,
    peer_id: PeerId,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot {action} identity key {path}: {source}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "identity key {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod 0600 {path}",
        path = path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("identity key {path} is not a regular file, refusing to use it", path = path.display())]
    NotAFile { path: PathBuf },
    #[error(
        "identity key {path} has {length} bytes, a key has {SEED_BYTES}; move it away to start with a new identity",
        path = path.display()
    )]
    WrongLength { path: PathBuf, length: u64 },
    #[error("the system gave no random bytes for a new identity key: {0}")]
    NoRandomness(getrandom::Error),
}

impl Identity {
    /// Loads the key at `path`, or makes one there at first start.
    ///
    /// Two processes that start together agree: the first file stays, the other process loads it.
    ///
    /// # Errors
    /// [`IdentityError::Exposed`] and the other refusals leave the file as it is; a new identity is never made
    /// in place of a file that cannot be used, because certificates and peers hold on to the old one.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            loaded => return loaded,
        }
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        getrandom::fill(seed.as_mut()).map_err(IdentityError::NoRandomness)?;
        match create(path, &seed) {
            Err(IdentityError::Io { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists =>
            {
                Self::load(path)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(Self::from_seed(&seed)),
        }
    }

    /// Returns the key with which this node signs what it announces.
    pub fn key(&self) -> PeerKey {
        let secret = self.keypair.secret();
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        seed.copy_from_slice(secret.as_ref());
        PeerKey::from_seed(*seed)
    }

    /// Returns the identity of a seed that is kept elsewhere, or that a test chose.
    pub fn from_seed(seed: &[u8; SEED_BYTES]) -> Self {
        // The constructor wipes the buffer that it is given.
        let mut seed = Zeroizing::new(*seed);
        let secret = ed25519::SecretKey::try_from_bytes(seed.as_mut_slice())
            .expect("every 32 bytes are an ed25519 seed");
        let keypair = ed25519::Keypair::from(secret);
        let peer_id = PublicKey::from(keypair.public()).to_peer_id();
        Self { keypair, peer_id }
    }

    /// The name of this machine in the mesh.
    pub fn peer_id(&self) -> PeerId {
        self.peer_id
    }

    /// The raw public key behind [`Identity::peer_id`].
    pub fn public_key(&self) -> [u8; 32] {
        self.keypair.public().to_bytes()
    }

    /// The key as libp2p wants it: for Noise, and to sign the certificates of the data plane.
    pub fn keypair(&self) -> Keypair {
        self.keypair.clone().into()
    }

    fn load(path: &Path) -> Result<Self, IdentityError> {
        let io_error = |action| {
            move |source| IdentityError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = File::open(path).map_err(io_error("open"))?;
        // Asked of the open file, so that what is checked is what is read.
        let metadata = file.metadata().map_err(io_error("examine"))?;
        if !metadata.is_file() {
            return Err(IdentityError::NotAFile {
                path: path.to_owned(),
            });
        }
        if let Some(mode) = secret::exposed(path, &metadata) {
            return Err(IdentityError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        if metadata.len() != SEED_BYTES as u64 {
            return Err(IdentityError::WrongLength {
                path: path.to_owned(),
                length: metadata.len(),
            });
        }
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        file.read_exact(seed.as_mut()).map_err(io_error("read"))?;
        Ok(Self::from_seed(&seed))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("peer_id", &self.peer_id)
            .finish_non_exhaustive()
    }
}

/// Writes the seed so that `path` is either absent or whole: temporary file, fsync, link, fsync of the folder.
fn create(path: &Path, seed: &[u8; SEED_BYTES]) -> Result<(), IdentityError> {
    let io_error = |source| IdentityError::Io {
        action: "create",
        path: path.to_owned(),
        source,
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // tempfile makes files with mode 0600, whatever the umask.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io_error)?;
    file.write_all(seed).map_err(io_error)?;
    // The node runs as whom the folder belongs to, also when root asked for the identity first.
    secret::give_to_owner(file.as_file(), path).map_err(io_error)?;
    file.as_file().sync_all().map_err(io_error)?;
    file.persist_noclobber(path)
        .map_err(|error| io_error(error.error))?;
    OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECTORY.bits() as i32)
        .open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(io_error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_survives_a_restart_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        let first = Identity::load_or_create(&path).unwrap();
        let second = Identity::load_or_create(&path).unwrap();
        assert_eq!(first.peer_id(), second.peer_id());
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert_eq!(metadata.len(), 32);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        Identity::load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::load_or_create(&path).unwrap_err();
        assert!(
            matches!(error, IdentityError::Exposed { mode: 0o640, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("chmod 0600"), "{error}");
    }

    #[test]
    fn damaged_key_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        std::fs::write(&path, b"short").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let error = Identity::load_or_create(&path).unwrap_err();
        assert!(
            matches!(error, IdentityError::WrongLength { length: 5, .. }),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn debug_hides_the_secret() {
        let text = format!("{:?}", Identity::from_seed(&[0xab; 32]));
        assert!(text.contains("12D3KooW"), "{text}");
        assert!(!text.contains("171") && !text.contains("abab"), "{text}");
    }

    #[test]
    fn peer_id_and_raw_key_are_two_forms_of_one_thing() {
        let identity = Identity::from_seed(&[7; 32]);
        let raw = ed25519_of(&identity.peer_id()).unwrap();
        assert_eq!(raw, identity.public_key());
        assert_eq!(peer_id_of(&raw), Some(identity.peer_id()));
        assert_eq!(ed25519_of(&PeerId::random()), None);
        // y = 2 is on no point of the curve.
        let mut no_point = [0; 32];
        no_point[0] = 2;
        assert_eq!(peer_id_of(&no_point), None);
    }
}
