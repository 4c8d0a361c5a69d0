//! Membership: a node whose certificate allows to push to a cache gets the token for that by itself.
//!
//! It signs who it is and for which cache ([`granary_protocol::assertion`]), and the anchor, which is of the same mesh,
//! gives a token for an hour. The token is kept in a file of the state folder, where pushes of the node and of
//! `granary push` read it as any, and is shown when caches are asked; it is renewed while a third of its life is left, and when the anchor refuses it.

use std::io;
use std::mem::Discriminant;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use granary_protocol::assertion::{Assertion, AssertionError, NONCE_BYTES, may_push};
use granary_protocol::certificate::{
    CERTIFICATE_BYTES_MAX, CertificateError, Permissions, SignedCertificate,
};
use granary_protocol::peer::PeerKey;
use granary_protocol::signature::PublicKey;
use tracing::{debug, warn};
use zeroize::Zeroizing;

use super::exchange::{Exchange, ExchangeError, LIFE_MAX, Token, renewal_after};
use super::order;
use super::target::chance;
use crate::clock::{self, Clock, unix_time};
use crate::credential::CredentialSource;
use crate::log::chain;
use crate::state_folder;

/// How long what is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Pauses {
    /// Whatever an anchor says of a token's life, and however often it refuses one, it is asked no more often.
    pub least: Duration,
    /// From a new token on. One that is refused sooner is refused for another reason than its age.
    pub to_refusal: Duration,
    /// To the next look at a certificate that does not allow enough. Nobody is asked for that.
    pub to_certificate: Duration,
}

impl Default for Pauses {
    fn default() -> Pauses {
        Pauses {
            least: Duration::from_secs(5),
            to_refusal: Duration::from_secs(60),
            to_certificate: Duration::from_secs(5),
        }
    }
}

/// Who this machine is, and which cache it pushes to.
pub struct Membership {
    pub key: PeerKey,
    /// Whose members we are.
    pub mesh: PublicKey,
    /// Read for every assertion: a certificate is renewed while we run.
    pub certificate_file: PathBuf,
    pub cache: String,
    /// By one of which the anchor is known that may hear it.
    pub cache_keys: Vec<PublicKey>,
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
    /// Reads the certificate, a small file.
    ///
    /// # Errors
    /// Also when it does not allow to push to the cache.
    pub fn certificate(&self) -> Result<SignedCertificate, MembershipError> {
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
        match may_push(&permissions, &self.cache) {
            true => Ok(certificate),
            false => Err(MembershipError::NotAllowed {
                permissions,
                cache: self.cache.clone(),
            }),
        }
    }

    /// Says who this machine is, once and now.
    pub fn assertion(&self, certificate: SignedCertificate) -> Result<String, MembershipError> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(MembershipError::NoRandomness)?;
        let assertion = Assertion {
            certificate,
            cache: self.cache.clone(),
            cache_keys: self.cache_keys.clone(),
            issued: unix_time(),
            nonce,
        };
        Ok(assertion.sign(&self.key)?.to_text())
    }
}

/// Where a member's token is put.
pub struct Kept {
    /// Read by whoever pushes.
    file: PathBuf,
    /// Shown when the cache is asked.
    source: CredentialSource,
    /// Until when the token is good; `None` while there is none.
    until: Option<Instant>,
    clock: Clock,
    /// What was said last of why there is no new one.
    told: Option<Kind>,
}

/// What is the same when the same goes wrong again.
type Kind = (Option<Discriminant<ExchangeError>>, String);

/// Gets a token and renews it, before its time is over or when it is refused. Has no end; cancel-safe.
pub async fn keep(exchange: Exchange, mut kept: Kept, pauses: Pauses) {
    let mut failures = 0;
    let mut is_refused = false;
    loop {
        kept.source.forget_refusals();
        let (least, most) = match exchange.token().await {
            Ok(token) => {
                let is_put = kept.put(&token).await;
                failures = if is_put { 0 } else { failures + 1 };
                match is_put {
                    true => (pauses.to_refusal, renewal_after(token.life)),
                    false => (pauses.least, order::token_pause(failures, chance())),
                }
            }
            Err(error) => {
                kept.fail(&error);
                let is_over = kept.until.is_none_or(|until| kept.clock.now() >= until);
                if is_over || is_refused {
                    kept.withdraw().await;
                }
                let pause = match error {
                    ExchangeError::Membership(_) => pauses.to_certificate,
                    _ => {
                        failures += 1;
                        order::token_pause(failures, chance())
                    }
                };
                (pauses.least, pause)
            }
        };
        clock::pass(least.min(most).max(pauses.least)).await;
        tokio::select! {
            () = clock::pass(most.saturating_sub(least)) => is_refused = false,
            () = kept.source.refused() => is_refused = true,
        }
    }
}

impl Kept {
    /// Begins with what a process before this one kept, if it is good yet. Reads a small file.
    pub fn new(file: PathBuf, source: CredentialSource) -> Kept {
        let clock = Clock::new();
        let mut kept = Kept {
            file,
            source,
            until: None,
            clock,
            told: None,
        };
        kept.source.fail("has not asked the anchor yet".to_owned());
        // Whatever is wrong with it, another one is got.
        let text = super::read_token(&kept.file).ok();
        let life = text.as_deref().and_then(|text| life(text));
        if let Some((text, life)) = text.zip(life)
            && kept.source.show(&text).is_ok()
        {
            kept.until = Some(kept.clock.now() + life);
        }
        kept
    }

    /// Returns whether it is where everybody finds it.
    async fn put(&mut self, token: &Token) -> bool {
        if self.source.show(&token.text).is_err() {
            self.warn(
                (None, String::new()),
                "what the anchor gave is no token".to_owned(),
            );
            return false;
        }
        self.until = Some(self.clock.now() + token.life);
        let (file, text) = (self.file.clone(), token.text.clone());
        let write = move || {
            let line = Zeroizing::new(format!("{}\n", text.as_str()));
            state_folder::write(&file, line.as_bytes())
        };
        if let Err(error) = blocking(write).await {
            let problem = format!("cannot write the token to {}: {error}", self.file.display());
            self.warn((None, String::new()), problem);
            return false;
        }
        self.told = None;
        debug!(file = %self.file.display(), "got a token as a member");
        true
    }

    /// Takes the token back, so that nobody shows what is good for nothing.
    async fn withdraw(&mut self) {
        self.until = None;
        self.source.withdraw();
        let file = self.file.clone();
        let removed = blocking(move || std::fs::remove_file(file)).await;
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            debug!(%error, file = %self.file.display(), "could not remove a token that is over");
        }
    }

    fn fail(&mut self, error: &ExchangeError) {
        let problem = chain(error);
        let is_expected = matches!(
            error,
            // Most members push nothing, or wait for a person; and some caches are not of this mesh.
            ExchangeError::Membership(
                MembershipError::NotAllowed { .. } | MembershipError::NoCertificate
            ) | ExchangeError::NoMembers { .. }
                | ExchangeError::OtherMesh { .. }
        );
        let (kind, name) = error.kind();
        match is_expected {
            true => self.source.fail(problem),
            false => self.warn((Some(kind), name.to_owned()), problem),
        }
    }

    /// Says a problem, aloud when it is a new one.
    fn warn(&mut self, kind: Kind, problem: String) {
        if self.told.as_ref() != Some(&kind) {
            warn!(%problem, "got no token as a member, asking again");
        }
        self.told = Some(kind);
        self.source.fail(problem);
    }
}

/// For how long a token is good yet; `None` for one that is over, or is no token. Nothing is proved.
fn life(text: &str) -> Option<Duration> {
    let expires = granary_protocol::token::Token::parse(text)
        .ok()?
        .claims
        .expires?;
    let seconds = expires.0.checked_sub(unix_time().0)?;
    (seconds > 0).then(|| Duration::from_secs(seconds).min(LIFE_MAX))
}

async fn blocking(act: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let done = tokio::task::spawn_blocking(act).await;
    done.unwrap_or_else(|error| Err(io::Error::other(error)))
}
