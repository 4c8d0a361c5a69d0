//! Membership: a node whose certificate allows to push to a cache gets the token for that by itself.
//!
//! It signs who it is and for which cache ([`granary_protocol::assertion`]), and the anchor, which is of the same mesh,
//! gives a token for an hour. The token is kept in a file of the state folder, where pushes of the node and of
//! `granary push` read it as any, and is shown when caches are asked; it is renewed while a third of its life is left.

use std::io;
use std::path::PathBuf;

use granary_protocol::assertion::{Assertion, AssertionError, NONCE_BYTES, may_push};
use granary_protocol::certificate::{
    CERTIFICATE_BYTES_MAX, CertificateError, Permissions, SignedCertificate,
};
use granary_protocol::peer::PeerKey;
use granary_protocol::signature::PublicKey;
use http::HeaderValue;
use tokio::sync::watch;
use tracing::{debug, warn};
use zeroize::Zeroizing;

use super::exchange::{Exchange, ExchangeError, RENEWAL_PAUSE, renewal_after};
use crate::clock::unix_time;
use crate::state_folder;

/// Who this machine is, and which cache it pushes to.
pub struct Membership {
    pub key: PeerKey,
    /// Read for every assertion: a certificate is renewed while we run.
    pub certificate_file: PathBuf,
    pub cache: String,
    /// By which the anchor is known that may hear it.
    pub cache_key: PublicKey,
}

/// Why this machine cannot say who it is.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("cannot read the certificate {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("this machine has no certificate yet")]
    NoCertificate,
    #[error("the certificate {path} is malformed: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: CertificateError,
    },
    #[error(
        "the certificate of this machine allows {permissions}, not push:{cache}\nhint: join by a ticket that allows it (granary mesh ticket --allow share,push:{cache}), or give the [[anchor]] a token-file"
    )]
    NotAllowed {
        permissions: Permissions,
        cache: String,
    },
    #[error("cannot say which cache is meant: {0}")]
    Cache(#[from] AssertionError),
    #[error("the system gave no random bytes: {0}")]
    NoRandomness(getrandom::Error),
}

impl Membership {
    /// Says who this machine is, once and now. Reads a small file.
    pub fn assertion(&self) -> Result<String, MembershipError> {
        let path = || self.certificate_file.clone();
        // Base-64 and white space.
        let text = state_folder::read(&self.certificate_file, 2 * CERTIFICATE_BYTES_MAX as u64);
        let text = text.map_err(|source| MembershipError::Read {
            path: path(),
            source,
        })?;
        let text = text.ok_or(MembershipError::NoCertificate)?;
        let malformed = |source| MembershipError::Malformed {
            path: path(),
            source,
        };
        let certificate = SignedCertificate::from_text(&text).map_err(malformed)?;
        let permissions = certificate.claims().map_err(malformed)?.permissions;
        if !may_push(&permissions, &self.cache) {
            return Err(MembershipError::NotAllowed {
                permissions,
                cache: self.cache.clone(),
            });
        }
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(MembershipError::NoRandomness)?;
        let assertion = Assertion {
            certificate,
            cache: self.cache.clone(),
            cache_key: self.cache_key.clone(),
            issued: unix_time(),
            nonce,
        };
        Ok(assertion.sign(&self.key)?.to_text())
    }
}

/// Where a member's token is put.
pub struct Kept {
    /// Read by whoever pushes.
    pub file: PathBuf,
    /// Shown when the cache is asked; `None` while there is none.
    pub header: watch::Sender<Option<HeaderValue>>,
    /// Why there is none.
    pub problem: watch::Sender<Option<String>>,
}

/// Gets a token and renews it. Has no end; cancel-safe.
pub async fn keep(exchange: Exchange, kept: Kept) {
    loop {
        let pause = match exchange.token().await {
            Ok(token) => {
                let life = token.life;
                match kept.put(token.text).await {
                    Ok(()) => {
                        debug!(file = %kept.file.display(), "got a token as a member");
                        kept.problem.send_replace(None);
                        renewal_after(life)
                    }
                    Err(error) => {
                        kept.fail(format!(
                            "cannot write the token to {}: {error}",
                            kept.file.display()
                        ));
                        RENEWAL_PAUSE
                    }
                }
            }
            Err(error) => {
                let is_quiet = matches!(
                    error,
                    // Most members push nothing, or wait for a person.
                    ExchangeError::Membership(
                        MembershipError::NotAllowed { .. } | MembershipError::NoCertificate
                    )
                );
                match is_quiet {
                    true => drop(kept.problem.send_replace(Some(error.to_string()))),
                    false => kept.fail(error.to_string()),
                }
                RETRY_PAUSE
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Pause after a question that got no token: a machine that was just made a member, or an anchor that just
/// started, is not to be waited for long, and the question is small.
const RETRY_PAUSE: std::time::Duration = std::time::Duration::from_secs(5);

impl Kept {
    async fn put(&self, token: Zeroizing<String>) -> io::Result<()> {
        let bearer = Zeroizing::new(format!("Bearer {}", token.as_str()));
        let value = HeaderValue::from_str(&bearer);
        let mut value = value.map_err(|_| io::Error::other("it is no token"))?;
        value.set_sensitive(true);
        let file = self.file.clone();
        let write = move || {
            state_folder::write(
                &file,
                Zeroizing::new(format!("{}\n", token.as_str())).as_bytes(),
            )
        };
        let written = tokio::task::spawn_blocking(write).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error)))?;
        self.header.send_replace(Some(value));
        Ok(())
    }

    /// Says a problem when it is a new one.
    fn fail(&self, problem: String) {
        let is_new = self.problem.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&problem);
            *known = Some(problem.clone());
            is_new
        });
        if is_new {
            warn!(%problem, "got no token as a member, asking again");
        }
    }
}
