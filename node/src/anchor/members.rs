//! Members: a machine of the mesh shows its certificate, and gets a token of this anchor for an hour.
//!
//! `GET /api/v1/member/token` → `{"mesh": tag}`, by which a machine sees that the anchor is of its mesh before it shows who it is.
//! `POST /api/v1/member/token {"assertion": line}` → `{"token", "expires", "expires_in"}`. The assertion
//! ([`granary_protocol::assertion`]) is signed by the machine's key and names one cache, which a `push:` permission of its
//! certificate must cover; the token is good for pulls from that cache and pushes to it.
//!
//! What holds: an assertion is good once, for minutes, for a cache one of whose keys it names. A token says in its id of which
//! mesh and whose it is and when the certificate began, and is refused as soon as the list of revocations voids that
//! certificate. The list is a file that this machine's membership keeps; so an anchor whose own certificate is not good
//! gives no such tokens.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use ::http::{Method, StatusCode, request::Parts};
use granary_protocol::assertion::{
    ASSERTION_SECONDS, ASSERTION_TEXT_BYTES_MAX, AssertionError, GRANTED, NONCE_BYTES, NotAsserted,
    SignedAssertion,
};
use granary_protocol::certificate::{
    CERTIFICATE_BYTES_MAX, Certificate, SignedCertificate, UnixTime, mesh_tag,
};
use granary_protocol::nix32;
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::SignedRevocations;
use granary_protocol::signature::{PublicKey, SecretKey};
use granary_protocol::token::{Claims, Grant, Pattern, Token, TokenError};
use hyper::body::Incoming;
use serde::Deserialize;
use tracing::{info, warn};

use super::Anchor;
use super::cache::{CacheName, CacheNameError};
use super::catalog::CatalogError;
use super::http::{Answer, Refusal, json_body};
use super::oidc::TOKEN_SECONDS;
use crate::mesh::revocations::{self, RevocationsFileError};
use crate::serve::respond;
use crate::state_folder;

/// In front of the ids of members' tokens.
const ID_PREFIX: &str = "member-";

/// In front of their names in tokens, in the access log and for quotas.
const SUBJECT_PREFIX: &str = "member:";

/// An assertion in JSON.
const BODY_BYTES_MAX: usize = ASSERTION_TEXT_BYTES_MAX + 1024;

/// For how long an assertion is remembered: it may be dated ahead by as much as it may be old.
const SHOWN_SECONDS: u64 = 2 * ASSERTION_SECONDS;

/// Assertions of one machine in [`SHOWN_SECONDS`]; a node shows one per cache in forty minutes, in a minute while
/// its tokens are refused, and some when it is started again and again.
const SHOWN_PER_PEER_MAX: usize = 32;

/// Assertions that are remembered, of all members: some 100 bytes each.
const SHOWN_MAX: usize = 16 * 1024;

/// Which mesh's members get tokens.
#[derive(Debug, Clone)]
pub struct Options {
    pub mesh: PublicKey,
    /// Where this machine's membership keeps the list of revocations.
    pub revocations: PathBuf,
    /// And its certificate.
    pub certificate: PathBuf,
}

/// Proves members, and remembers what they showed.
pub struct Members {
    options: Options,
    /// Signs their tokens.
    key: SecretKey,
    put_out: Mutex<PutOut>,
    shown: Mutex<Shown>,
    /// In the ids of tokens: those of another mesh are not ours to believe.
    tag: String,
}

/// The list of revocations as it was read last.
#[derive(Default)]
struct PutOut {
    /// Of the file: when it was changed, and its length.
    version: Option<(SystemTime, u64)>,
    list: Option<SignedRevocations>,
    /// Whether the last reading failed, which was said.
    is_unread: bool,
}

/// Nonces, whose they are, and until when they are remembered.
#[derive(Default)]
struct Shown(BTreeMap<[u8; NONCE_BYTES], (PeerId, u64)>);

/// Why a member gets no token.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Malformed(#[from] AssertionError),
    #[error(transparent)]
    NotAsserted(#[from] NotAsserted),
    #[error("the certificate was revoked")]
    Revoked,
    #[error("this assertion was shown before")]
    Repeated,
    #[error("too many assertions were shown within {SHOWN_SECONDS} s")]
    TooMany,
    #[error("this anchor is no member of its mesh now: {0}")]
    NoMember(String),
    #[error("this anchor has no cache {cache} with a key that was named for it")]
    OtherCache { cache: String },
    #[error(transparent)]
    Name(#[from] CacheNameError),
    #[error("what the certificate gives is no token: {0}")]
    Unusable(#[from] TokenError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Refusal {
        let message = format!("no token for this machine: {refused}");
        match &refused {
            Refused::Malformed(_) | Refused::Name(_) => Refusal::bad_request(message),
            Refused::TooMany => {
                Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TooManyAssertions", message)
            }
            Refused::NotAsserted(NotAsserted::MayNotPush { .. }) => {
                Refusal::new(StatusCode::FORBIDDEN, "MissingPermission", message)
            }
            Refused::Unusable(_) | Refused::Catalog(_) => Refusal::ours(&refused),
            Refused::NoMember(_) => {
                Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "NoMember", message)
            }
            Refused::NotAsserted(NotAsserted::Untimely { .. }) => {
                Refusal::new(StatusCode::FORBIDDEN, "ClocksApart", message)
            }
            Refused::Revoked => Refusal::new(StatusCode::FORBIDDEN, "CertificateRevoked", message),
            Refused::OtherCache { .. } => {
                Refusal::new(StatusCode::FORBIDDEN, "OtherCache", message)
            }
            _ => Refusal::new(StatusCode::FORBIDDEN, "AssertionRefused", message),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    assertion: String,
}

/// Answers `/api/v1/member/token`.
pub(super) async fn answer(anchor: &Anchor, parts: &Parts, body: &mut Incoming) -> Answer {
    let Some(members) = &anchor.members else {
        return Err(Refusal::not_found("this anchor is no member of a mesh"));
    };
    match parts.method {
        Method::GET => {
            let answer = serde_json::json!({ "mesh": members.tag });
            return Ok(respond::json(answer.to_string()));
        }
        Method::POST => {}
        _ => {
            let message = "this method is not answered here";
            return Err(Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "RequestError",
                message,
            ));
        }
    }
    let Question { assertion } = json_body(body, BODY_BYTES_MAX).await?;
    let now = anchor.now();
    let given = members.trade(anchor, &assertion, now).await;
    let (expires, text) = given.inspect_err(|refused| {
        // What it says is from outside, and shown with its signs escaped.
        info!(refused = ?refused.to_string(), "gave no token to a member");
    })?;
    let answer = serde_json::json!({
        "token": text,
        "expires": expires,
        // A clock that differs from ours does not change this.
        "expires_in": expires.saturating_sub(now),
    });
    Ok(respond::json(answer.to_string()))
}

impl Members {
    /// Reads who was put out. Blocks.
    ///
    /// # Errors
    /// When that is not known: it must not count as nobody.
    pub fn new(options: Options, key: SecretKey) -> Result<Members, RevocationsFileError> {
        let put_out = PutOut {
            version: version(&options),
            list: revocations::read(&options.revocations, &options.mesh)?,
            is_unread: false,
        };
        Ok(Members {
            tag: mesh_tag(&options.mesh),
            options,
            key,
            put_out: Mutex::new(put_out),
            shown: Mutex::default(),
        })
    }

    async fn trade(&self, anchor: &Anchor, text: &str, now: u64) -> Result<(u64, String), Refused> {
        let assertion = SignedAssertion::from_text(text)?;
        let certificate = assertion.verify(&self.options.mesh, UnixTime(now))?;
        self.prove_own(UnixTime(now)).await?;
        if self.is_put_out(&certificate.peer, certificate.not_before) {
            return Err(Refused::Revoked);
        }
        let assertion = assertion.claims();
        let other = || Refused::OtherCache {
            cache: assertion.cache.clone(),
        };
        let name = CacheName::new(&assertion.cache)?;
        let cache = anchor.catalog.cache(&name).await?.ok_or_else(other)?;
        let mut keys = assertion.cache_keys.iter().map(PublicKey::to_string);
        if !keys.any(|key| cache.settings.public_keys.contains(&key)) {
            return Err(other());
        }
        let pattern = assertion.cache.parse::<Pattern>()?;
        let expires = now
            .saturating_add(TOKEN_SECONDS)
            .min(certificate.not_after.0);
        let claims = Claims {
            id: Some(id_of(&self.tag, &certificate, assertion.nonce)),
            // Machines choose their names: none may be taken for whom a person gave a token.
            subject: format!("{SUBJECT_PREFIX}{}", certificate.name),
            not_before: None,
            expires: Some(UnixTime(expires)),
            grants: vec![Grant {
                pattern,
                permissions: GRANTED.to_vec(),
            }],
        };
        let text = claims.mint(&self.key);
        // Proves that whoever reads it will take it.
        Token::parse(&text)?;
        // Only what a member signed is remembered, so that nobody else can fill the memory.
        self.shown
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .note(assertion.nonce, certificate.peer, now)?;
        info!(subject = ?claims.subject, id = claims.id, "gives a token to a member");
        // One that was shown to an anchor before its restart is known by its token.
        let is_new = anchor
            .tokens
            .traded(claims, ID_PREFIX, UnixTime(now))
            .await?;
        match is_new {
            true => Ok((expires, text)),
            false => Err(Refused::Repeated),
        }
    }

    /// Proves that this machine is a member, and so hears of revocations.
    async fn prove_own(&self, now: UnixTime) -> Result<(), Refused> {
        let (path, mesh) = (self.options.certificate.clone(), self.options.mesh.clone());
        let prove = move || {
            let text = state_folder::read(&path, 2 * CERTIFICATE_BYTES_MAX as u64);
            let text = text.map_err(|error| error.to_string())?;
            let text = text.ok_or("it has no certificate")?;
            let certificate = SignedCertificate::from_text(&text);
            let certificate = certificate.map_err(|error| error.to_string())?;
            let claims = certificate.claims().map_err(|error| error.to_string())?;
            let proved = certificate.verify(&mesh, &claims.peer, now);
            proved.map(drop).map_err(|error| error.to_string())
        };
        let proved = tokio::task::spawn_blocking(prove).await;
        let proved = proved.unwrap_or_else(|error| Err(error.to_string()));
        proved.map_err(Refused::NoMember)
    }

    /// Whether a certificate is void that begins then.
    fn is_put_out(&self, peer: &PeerId, not_before: UnixTime) -> bool {
        let mut put_out = self.put_out.lock().unwrap_or_else(PoisonError::into_inner);
        let version = version(&self.options);
        if version != put_out.version {
            match revocations::read(&self.options.revocations, &self.options.mesh) {
                Ok(list) => {
                    // One that was removed was read; the membership puts it back.
                    put_out.list = list.or(put_out.list.take());
                    put_out.is_unread = false;
                    put_out.version = version;
                }
                Err(error) => {
                    if !put_out.is_unread {
                        warn!(%error, "could not read a new list of revocations, the old one holds");
                    }
                    put_out.is_unread = true;
                    // What is wrong with the file itself stays wrong until it is another one.
                    if !matches!(error, RevocationsFileError::Io { .. }) {
                        put_out.version = version;
                    }
                }
            }
        }
        let list = put_out.list.as_ref();
        list.is_some_and(|list| list.claims().is_void(peer, not_before))
    }
}

/// Whose token has this id, of that mesh, and when the certificate began; `None` for what is none of its members'.
fn member_of(tag: &str, id: &str) -> Option<(PeerId, UnixTime)> {
    let mut parts = id.strip_prefix(ID_PREFIX)?.split('-');
    let _ = parts.next().filter(|other| *other == tag)?;
    let peer = parts.next()?.parse().ok()?;
    let not_before = parts.next()?.parse().ok()?;
    Some((peer, UnixTime(not_before)))
}

/// Whether the holder of a token that we signed was put out of the mesh, or the mesh is no longer ours.
pub(super) fn is_void(members: Option<&Arc<Members>>, id: Option<&str>) -> bool {
    let Some(id) = id.filter(|id| id.starts_with(ID_PREFIX)) else {
        return false;
    };
    members.is_none_or(|members| match member_of(&members.tag, id) {
        Some((peer, not_before)) => members.is_put_out(&peer, not_before),
        None => true,
    })
}

/// What says whose a token is: the mesh's tag, the machine, the beginning of its certificate, and what it said.
fn id_of(tag: &str, certificate: &Certificate, nonce: [u8; NONCE_BYTES]) -> String {
    let (peer, not_before) = (&certificate.peer, certificate.not_before.0);
    let nonce = nix32::encode(&nonce);
    format!("{ID_PREFIX}{tag}-{peer}-{not_before}-{nonce}")
}

fn version(options: &Options) -> Option<(SystemTime, u64)> {
    let metadata = std::fs::metadata(&options.revocations).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

impl Shown {
    fn note(&mut self, nonce: [u8; NONCE_BYTES], peer: PeerId, now: u64) -> Result<(), Refused> {
        self.0.retain(|_, (_, until)| *until >= now);
        if self.0.contains_key(&nonce) {
            return Err(Refused::Repeated);
        }
        let own = self.0.values().filter(|(other, _)| *other == peer).count();
        if own >= SHOWN_PER_PEER_MAX || self.0.len() >= SHOWN_MAX {
            return Err(Refused::TooMany);
        }
        let until = now.saturating_add(SHOWN_SECONDS);
        self.0.insert(nonce, (peer, until));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    #[test]
    fn an_assertion_is_good_once_and_one_machine_keeps_no_other_out() {
        let mut shown = Shown::default();
        let nonce = |number: usize| {
            let mut nonce = [0; NONCE_BYTES];
            nonce[..8].copy_from_slice(&number.to_be_bytes());
            nonce
        };
        for number in 0..SHOWN_PER_PEER_MAX {
            assert!(shown.note(nonce(number), peer(1), 1000).is_ok());
        }
        let again = shown.note(nonce(0), peer(1), 1000);
        assert!(matches!(again, Err(Refused::Repeated)));
        let stolen = shown.note(nonce(0), peer(2), 1000 + SHOWN_SECONDS);
        assert!(matches!(stolen, Err(Refused::Repeated)));
        let more = shown.note(nonce(99), peer(1), 1000);
        assert!(matches!(more, Err(Refused::TooMany)));
        assert!(shown.note(nonce(99), peer(2), 1000).is_ok());
        // What is over is forgotten: its date refuses it.
        let later = 1001 + SHOWN_SECONDS;
        assert!(shown.note(nonce(0), peer(1), later).is_ok());
    }

    #[test]
    fn the_id_of_a_token_says_whose_it_is() {
        let certificate = Certificate {
            peer: peer(3),
            name: "laptop".to_owned(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(17),
            not_after: UnixTime(99),
            serial: 1,
        };
        let id = id_of("ours", &certificate, [5; NONCE_BYTES]);
        assert_eq!(member_of("ours", &id), Some((peer(3), UnixTime(17))));
        assert_eq!(member_of("theirs", &id), None);
        assert!(is_void(None, Some(&id)), "no mesh, no members");
        for other in ["", "oidc-abc", "member", "member-", "member-ours-x-1-y"] {
            assert_eq!(member_of("ours", other), None, "{other}");
        }
        assert!(is_void(None, Some("member-ours-x-1-y")));
        assert!(!is_void(None, Some("oidc-abc")) && !is_void(None, None));
    }
}
