//! Tokens: who is at the door, and may they.
//!
//! Ours are signed by a key of the anchor (`<state>/token-key`, 0600) and listed in the catalog;
//! Attic's are proved with the secret or public key that it was configured with. A token counts while
//! its dates allow and until it is revoked, which is looked up at every request, so revoking takes
//! effect with the next one. A lost catalog forgets which tokens were made, not which were revoked ([`revoked`]).
//!
//! A bearer without the right learns why; one without a token learns nothing: a cache that is
//! private and one that does not exist are the same answer. Signatures are compared in constant time
//! by the libraries that check them; identities and digests looked up in the catalog are no secrets.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::BASE64;
use granary_protocol::certificate::UnixTime;
use granary_protocol::hash::{FileHash, sha256};
use granary_protocol::signature::{KeyName, PublicKey, SecretKey};
use granary_protocol::token::{Algorithm, Claims, Permission, Token, TokenError, Untimely};
use http::HeaderMap;
use jsonwebtoken::DecodingKey;
use rusqlite::{OptionalExtension, Transaction, params};
use zeroize::Zeroizing;

use super::cache::{CacheName, Keys, KeysError, write_secret};
use super::catalog::{Catalog, CatalogError, signed};
use super::members::{Members, is_void};
use super::object_store::ObjectStore;
use super::revoked::{self, RevokeError};
use crate::anchor::catalog::unsigned;
use crate::secret::exposed;
use crate::serve::credentials;

/// Largest key file read; a 4096-bit RSA key has some 3 KiB.
const KEY_BYTES_MAX: u64 = 64 * 1024;

const SECONDS_PER_DAY: u64 = 86_400;

/// The name in the key file. It is of no consequence: tokens carry no key name.
const KEY_NAME: &str = "granary-tokens";

/// Proves tokens and knows which were revoked; `Clone` is cheap.
#[derive(Clone)]
pub struct Tokens {
    catalog: Catalog,
    /// Where revocations are kept.
    storage: ObjectStore,
    key: PublicKey,
    attic: Option<Arc<(Algorithm, DecodingKey)>>,
    /// Whose tokens end with their membership.
    members: Option<Arc<Members>>,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bearer {
    Nobody,
    Somebody(Claims),
}

/// Why a request is refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Denied {
    #[error("a token is needed here")]
    Unauthorized,
    #[error("the token is not valid: {0}")]
    TokenInvalid(String),
    #[error("the token has expired")]
    TokenExpired,
    #[error("the token is not valid yet")]
    TokenEarly,
    #[error("the token was revoked")]
    TokenRevoked,
    #[error("the token of {subject:?} does not allow to {permission} cache {cache}")]
    MissingPermission {
        subject: String,
        permission: Permission,
        cache: String,
    },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

/// Why the keys of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenKeyError {
    #[error("cannot read the token key {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the token key {path} has more than {KEY_BYTES_MAX} bytes", path = .path.display())]
    TooLarge { path: PathBuf },
    #[error("the token key {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod 0600 {path}", path = .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the token key {path} is malformed: {problem}", path = .path.display())]
    Malformed { path: PathBuf, problem: String },
    #[error(transparent)]
    Keys(#[from] KeysError),
}

/// A token of ours as the catalog lists it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Listed {
    pub id: String,
    pub subject: String,
    /// As it stands in the token.
    pub claims: String,
    pub issued: u64,
    pub expires: Option<u64>,
    pub revoked: Option<u64>,
}

/// The key that signs our tokens, made at first use. Blocks.
pub fn token_key(state: &Path) -> Result<SecretKey, TokenKeyError> {
    let path = state.join("token-key");
    let read = |source| TokenKeyError::Read {
        path: path.clone(),
        source,
    };
    if !path.exists() {
        let name = KeyName::new(KEY_NAME).unwrap_or_else(|_| unreachable!("a constant"));
        let key = Keys::generate(name)?;
        write_secret(&path, key.to_nix_string().as_bytes()).map_err(read)?;
        return Ok(key);
    }
    let text = read_secret(&path)?;
    text.trim()
        .parse()
        .map_err(|error| TokenKeyError::Malformed {
            path: path.clone(),
            problem: format!("{error}"),
        })
}

/// What Attic's tokens are proved with: `hs256:<base64 secret>`, or an RSA public key as PEM, plain or
/// in base-64 as in Attic's configuration. Blocks.
pub fn attic_key(path: &Path) -> Result<(Algorithm, DecodingKey), TokenKeyError> {
    let malformed = |problem: String| TokenKeyError::Malformed {
        path: path.to_owned(),
        problem,
    };
    let text = read_secret(path)?;
    let text = text.trim();
    if let Some(secret) = text.strip_prefix("hs256:") {
        let secret = BASE64.decode(secret.trim().as_bytes());
        let secret = Zeroizing::new(secret.map_err(|error| malformed(error.to_string()))?);
        return Ok((Algorithm::Hs256, DecodingKey::from_secret(&secret)));
    }
    let pem = match text.strip_prefix("rs256:").unwrap_or(text) {
        pem if pem.contains("-----BEGIN") => Zeroizing::new(pem.as_bytes().to_vec()),
        base64 => {
            let packed: String = base64.split_whitespace().collect();
            let pem = BASE64.decode(packed.as_bytes());
            Zeroizing::new(pem.map_err(|error| malformed(error.to_string()))?)
        }
    };
    let key = DecodingKey::from_rsa_pem(&pem);
    let key = key.map_err(|error| malformed(format!("{error}; an RSA public key is expected, which openssl rsa -in private.pem -pubout makes")))?;
    Ok((Algorithm::Rs256, key))
}

fn read_secret(path: &Path) -> Result<Zeroizing<String>, TokenKeyError> {
    let read = |source| TokenKeyError::Read {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(read)?;
    if let Some(mode) = exposed(path, &metadata) {
        return Err(TokenKeyError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    if metadata.len() > KEY_BYTES_MAX {
        return Err(TokenKeyError::TooLarge {
            path: path.to_owned(),
        });
    }
    fs::read_to_string(path).map(Zeroizing::new).map_err(read)
}

impl Tokens {
    pub fn new(
        catalog: Catalog,
        storage: ObjectStore,
        key: PublicKey,
        attic: Option<(Algorithm, DecodingKey)>,
        members: Option<Arc<Members>>,
    ) -> Tokens {
        Tokens {
            catalog,
            storage,
            key,
            attic: attic.map(Arc::new),
            members,
        }
    }

    /// Reads and proves what a request carries.
    ///
    /// # Errors
    /// For a token that does not count. No token at all is [`Bearer::Nobody`].
    pub async fn bearer(&self, headers: &HeaderMap, now: UnixTime) -> Result<Bearer, Denied> {
        match token_in(headers)? {
            None => Ok(Bearer::Nobody),
            Some(text) => Ok(Bearer::Somebody(self.prove(&text, now).await?)),
        }
    }

    /// Reads and proves a token.
    ///
    /// # Errors
    /// For one that does not count.
    pub async fn prove(&self, text: &str, now: UnixTime) -> Result<Claims, Denied> {
        let invalid = |error: TokenError| Denied::TokenInvalid(error.to_string());
        let token = Token::parse(text).map_err(invalid)?;
        if !self.is_genuine(&token) {
            return Err(Denied::TokenInvalid(
                "its signature does not verify with a key of this anchor".to_owned(),
            ));
        }
        match token.claims.check_time(now) {
            Ok(()) => {}
            Err(Untimely::Expired) => return Err(Denied::TokenExpired),
            Err(Untimely::Early) => return Err(Denied::TokenEarly),
        }
        let id = token.claims.id.as_deref();
        if is_void(self.members.as_ref(), id) {
            return Err(Denied::TokenRevoked);
        }
        if self.is_revoked(revocation_id(&token.claims, text)).await? {
            return Err(Denied::TokenRevoked);
        }
        Ok(token.claims)
    }

    /// Notes a token that was made, so that it can be listed and revoked.
    pub async fn issued(&self, claims: Claims, now: UnixTime) -> Result<(), CatalogError> {
        self.catalog
            .write(move |transaction| insert(transaction, "INSERT", &claims, now).map(drop))
            .await
    }

    /// Notes a token that was given for an issuer's or a member's word, whose ids begin with `prefix`; forgets those that
    /// ended more than a day ago, for every job gets one. Returns whether its id is a new one.
    pub async fn traded(
        &self,
        claims: Claims,
        prefix: &'static str,
        now: UnixTime,
    ) -> Result<bool, CatalogError> {
        let ended = signed(now.0.saturating_sub(SECONDS_PER_DAY));
        self.catalog
            .write(move |transaction| {
                transaction.execute(
                    "DELETE FROM tokens WHERE substr(id, 1, length(?1)) = ?1 AND expires < ?2",
                    params![prefix, ended],
                )?;
                let inserted = insert(transaction, "INSERT OR IGNORE", &claims, now)?;
                Ok(inserted > 0)
            })
            .await
    }

    /// Every token that was made here, the newest first.
    pub async fn list(&self) -> Result<Vec<Listed>, CatalogError> {
        self.catalog
            .read(|connection| {
                connection
                    .prepare(
                        "SELECT tokens.id, subject, claims, issued, expires, revoked.at
                         FROM tokens LEFT JOIN revoked ON revoked.id = tokens.id
                         ORDER BY issued DESC, tokens.id",
                    )?
                    .query_map([], |row| {
                        let optional = |column| -> rusqlite::Result<Option<u64>> {
                            let number: Option<i64> = row.get(column)?;
                            Ok(number.and_then(|number| u64::try_from(number).ok()))
                        };
                        Ok(Listed {
                            id: row.get(0)?,
                            subject: row.get(1)?,
                            claims: row.get(2)?,
                            issued: unsigned(row, 3)?,
                            expires: optional(4)?,
                            revoked: optional(5)?,
                        })
                    })?
                    .collect()
            })
            .await
    }

    /// Revokes a token by its id, or by its own text when it has none; `false` when it was before. Returns when that
    /// outlives the catalog.
    pub async fn revoke(&self, id_or_token: &str, now: UnixTime) -> Result<bool, RevokeError> {
        let id = match Token::parse(id_or_token) {
            Ok(token) => revocation_id(&token.claims, id_or_token),
            Err(_) => id_or_token.to_owned(),
        };
        revoked::revoke(&self.catalog, &self.storage, id, now.0).await
    }

    /// Makes what was revoked outlive the catalog, as far as it does not yet.
    pub async fn keep_revoked(&self) -> Result<(), RevokeError> {
        revoked::keep_all(&self.catalog, &self.storage).await
    }

    fn is_genuine(&self, token: &Token) -> bool {
        match (token.algorithm, self.attic.as_deref()) {
            (Algorithm::EdDsa, _) => token.is_signed_by(&self.key),
            // The algorithm is the key's: a public key must never be taken for a shared secret.
            (algorithm, Some((expected, key))) if algorithm == *expected => {
                let algorithm = match expected {
                    Algorithm::Hs256 => jsonwebtoken::Algorithm::HS256,
                    _ => jsonwebtoken::Algorithm::RS256,
                };
                let message = token.message.as_bytes();
                jsonwebtoken::crypto::verify(&token.signature, message, key, algorithm)
                    .unwrap_or(false)
            }
            _ => false,
        }
    }

    async fn is_revoked(&self, id: String) -> Result<bool, CatalogError> {
        self.catalog
            .read(move |connection| {
                connection
                    .prepare_cached("SELECT 1 FROM revoked WHERE id = ?1")?
                    .query_row([id], |_| Ok(()))
                    .optional()
            })
            .await
            .map(|found| found.is_some())
    }
}

impl Bearer {
    /// Whether this bearer may do something to a cache.
    ///
    /// # Errors
    /// [`Denied::Unauthorized`] for nobody, [`Denied::MissingPermission`] for somebody.
    pub fn may(&self, permission: Permission, cache: &CacheName) -> Result<(), Denied> {
        match self {
            Bearer::Nobody => Err(Denied::Unauthorized),
            Bearer::Somebody(claims) if claims.allows(cache.as_str(), permission) => Ok(()),
            Bearer::Somebody(claims) => Err(Denied::MissingPermission {
                subject: claims.subject.clone(),
                permission,
                cache: cache.to_string(),
            }),
        }
    }

    /// Whether this bearer may learn that a cache exists.
    pub fn knows(&self, cache: &CacheName) -> bool {
        match self {
            Bearer::Nobody => false,
            Bearer::Somebody(claims) => claims.knows(cache.as_str()),
        }
    }

    /// Who it is, by the name in the token.
    pub fn subject(&self) -> Option<&str> {
        match self {
            Bearer::Nobody => None,
            Bearer::Somebody(claims) => Some(&claims.subject),
        }
    }
}

/// Writes the row of a token; returns how many rows that made.
fn insert(
    transaction: &Transaction<'_>,
    verb: &'static str,
    claims: &Claims,
    now: UnixTime,
) -> rusqlite::Result<usize> {
    transaction.execute(
        &format!(
            "{verb} INTO tokens (id, subject, claims, issued, expires) VALUES (?1, ?2, ?3, ?4, ?5)"
        ),
        params![
            claims.id,
            claims.subject,
            claims.to_json(),
            signed(now.0),
            claims.expires.map(|time| signed(time.0))
        ],
    )
}

fn revocation_id(claims: &Claims, text: &str) -> String {
    match &claims.id {
        Some(id) => id.clone(),
        None => FileHash::from_bytes(sha256(text.as_bytes())).to_string(),
    }
}

fn token_in(headers: &HeaderMap) -> Result<Option<Zeroizing<String>>, Denied> {
    credentials::presented(headers).map_err(|problem| Denied::TokenInvalid(problem.to_owned()))
}
