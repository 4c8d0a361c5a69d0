//! The LAN's share: what the configuration says about machines without Granary, read and bound at start.
//!
//! The key that signs for them is one of its own. The loopback key is refused: what it signs would be believed by
//! machines that cannot know what this one believed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use granary_protocol::signature::{SecretKey, SignatureError};
use tokio::net::TcpListener;
use tracing::warn;
use zeroize::Zeroizing;

use super::{StartError, is_missing_ipv6, listen};
use crate::config::Config;
use crate::loopback_key;
use crate::secret;
use crate::serve::lan::{LanToken, Rules};
use crate::state_folder;
use crate::upload::{TokenFileError, read_token};

/// Largest key file read; a key has some 130 bytes.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// Why the LAN's share cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("share.http-token-file: {0}")]
    Token(#[from] TokenFileError),
    #[error(
        "share.http-token-file: {path} is empty, and everybody could show that, refusing to use it",
        path = .path.display()
    )]
    EmptyToken { path: PathBuf },
    #[error("share.http-sign-key-file: cannot read {path}: {source}", path = .path.display())]
    Key { path: PathBuf, source: io::Error },
    #[error(
        "share.http-sign-key-file: {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod 0600 {path}",
        path = .path.display()
    )]
    ExposedKey { path: PathBuf, mode: u32 },
    #[error("share.http-sign-key-file: {path} is no secret key: {source}", path = .path.display())]
    MalformedKey {
        path: PathBuf,
        source: SignatureError,
    },
    #[error(
        "share.http-sign-key-file: {path} is a loopback key, refusing to sign for other machines with it; make one with nix-store --generate-binary-cache-key",
        path = .path.display()
    )]
    LoopbackKey { path: PathBuf },
}

/// What is ready to be opened once there is a store.
#[derive(Default)]
pub struct Share {
    pub listeners: Vec<TcpListener>,
    pub rules: Rules,
    pub key: Option<Box<SecretKey>>,
}

impl Share {
    /// Takes the ports, so that one in use is an error at start and not a warning later.
    pub fn prepare(config: &Config) -> Result<Share, StartError> {
        if config.share.http.is_empty() {
            return Ok(Share::default());
        }
        let mut share = read(config)?;
        for address in &config.share.http {
            match listen(*address, "machines without Granary", "share") {
                Ok(listener) => share.listeners.push(listener),
                Err(StartError::Listen { source, .. }) if is_missing_ipv6(*address, &source) => {
                    warn!(%address, "left out an IPv6 address, this machine has none");
                }
                Err(error) => return Err(error),
            }
        }
        for remark in config.remarks() {
            warn!("{remark}");
        }
        Ok(share)
    }
}

/// Reads the token and the key, and takes no port.
pub fn read(config: &Config) -> Result<Share, ShareError> {
    let share = &config.share;
    let token = share.http_token_file.as_ref().map(token_of).transpose()?;
    let key = share
        .http_sign_key_file
        .as_deref()
        .map(key_of)
        .transpose()?;
    Ok(Share {
        listeners: Vec::new(),
        rules: Rules {
            token,
            hosts: share.http_hosts.clone(),
        },
        key: key.map(Box::new),
    })
}

fn token_of(path: &PathBuf) -> Result<LanToken, ShareError> {
    let token = read_token(path)?;
    match token.is_empty() {
        true => Err(ShareError::EmptyToken { path: path.clone() }),
        false => Ok(LanToken::new(&token)),
    }
}

fn key_of(path: &Path) -> Result<SecretKey, ShareError> {
    let path = path.to_owned();
    let failed = |source| ShareError::Key {
        path: path.clone(),
        source,
    };
    let metadata = fs::metadata(&path).map_err(failed)?;
    if let Some(mode) = secret::exposed(&path, &metadata) {
        return Err(ShareError::ExposedKey { path, mode });
    }
    let text = state_folder::read(&path, KEY_FILE_BYTES_MAX).map_err(failed)?;
    let text = Zeroizing::new(text.unwrap_or_default());
    let key: SecretKey = match text.trim().parse() {
        Ok(key) => key,
        Err(source) => return Err(ShareError::MalformedKey { path, source }),
    };
    match key.name().as_str().starts_with(loopback_key::NAME_PREFIX) {
        true => Err(ShareError::LoopbackKey { path }),
        false => Ok(key),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_that_protect_nothing_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str, mode| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let with = |token: Option<PathBuf>, key: Option<PathBuf>| {
            let mut config = Config::default();
            config.share.http_token_file = token;
            config.share.http_sign_key_file = key;
            read(&config).map(|share| (share.rules.token.is_some(), share.key.is_some()))
        };
        let key = loopback_key::load_or_create(&folder.path().join("loopback-key")).unwrap();
        let own = SecretKey::from_seed("lan-1".parse().unwrap(), [1; 32]);
        let own = write("own", &own.to_nix_string(), 0o600);
        let token = write("token", "word\n", 0o600);
        assert_eq!(with(Some(token), Some(own)).unwrap(), (true, true));
        let error = with(Some(write("empty", " \n", 0o600)), None).unwrap_err();
        assert!(matches!(error, ShareError::EmptyToken { .. }), "{error}");
        let error = with(Some(write("seen", "word", 0o644)), None).unwrap_err();
        assert!(matches!(error, ShareError::Token(_)), "{error}");
        let loopback = write("copied", &key.to_nix_string(), 0o600);
        let error = with(None, Some(loopback)).unwrap_err();
        assert!(matches!(error, ShareError::LoopbackKey { .. }), "{error}");
        let error = with(None, Some(write("shown", "x", 0o640))).unwrap_err();
        assert!(matches!(error, ShareError::ExposedKey { .. }), "{error}");
        let error = with(None, Some(write("word", "x", 0o600))).unwrap_err();
        assert!(matches!(error, ShareError::MalformedKey { .. }), "{error}");
    }
}
