//! OIDC: a job of CI shows what its system says of it, and gets a token of this anchor for an hour.
//!
//! `POST /api/v1/oidc/token {"token": jwt}` → `{"token", "expires", "expires_in"}` (seconds since 1970, and from
//! here on). The token of an issuer that the configuration names is proved with the issuer's keys (RFC 7517), its claims are compared with rules, and
//! the rules that match say what the token of ours allows. No secret is stored at the CI's, and none leaks that is
//! good for more than an hour.
//!
//! What holds: RS256 and ES256 alone, and each with a key of its own kind, so nothing is proved with a public
//! key taken for a secret, and nothing without a signature. Issuer, audience and dates must be right. Keys are
//! fetched over HTTPS (over HTTP from loopback), bounded in bytes and time, kept for an hour, and asked for again
//! when a token names an unknown one, once a minute at most: strangers cannot have us ask more. While the issuer
//! does not answer, keys that are at most a day old are used on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::http::{Method, StatusCode, request::Parts};
use data_encoding::BASE64URL_NOPAD;
use granary_protocol::certificate::UnixTime;
use granary_protocol::nix32;
use granary_protocol::signature::SecretKey;
use granary_protocol::token::{
    Claims, Grant, SUBJECT_BYTES_MAX, TOKEN_BYTES_MAX, Token, TokenError,
};
use hyper::body::Incoming;
use jsonwebtoken::{Algorithm, DecodingKey};
use regex::Regex;
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::Value;
use tracing::{info, warn};

use super::Anchor;
use super::catalog::CatalogError;
use super::http::{Answer, Refusal, json_body};
use crate::authority::{Authorities, AuthorityError, is_safe};
use crate::serve::respond;

/// For how long a token of ours is good: the push of a large closure over a home's line.
pub const TOKEN_SECONDS: u64 = 3600;

/// How far clocks may differ: as for our own tokens.
const CLOCK_SKEW_SECONDS: u64 = 60;

/// Longest life of an issuer's token that is believed; GitHub's have five minutes, GitLab's an hour by default.
const LIFE_SECONDS_MAX: u64 = 24 * 3600;

/// Largest set of keys, or description of an issuer, that is read; GitHub's have 9 and 1 KiB.
const DOCUMENT_BYTES_MAX: usize = 256 * 1024;

/// Keys of one issuer; GitHub has four.
const KEYS_MAX: usize = 100;

/// How long an issuer may take for one document. A job waits for it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Keys are asked for again when they are as old as that: what an issuer withdrew ends within the hour.
const FRESH_SECONDS: u64 = 3600;

/// Keys of an issuer that does not answer are used until they are as old as that.
const STALE_SECONDS: u64 = 24 * 3600;

/// Between two questions to an issuer, whatever tokens name and whether it answers.
const REFETCH_SECONDS: u64 = 60;

/// A token in JSON.
const BODY_BYTES_MAX: usize = TOKEN_BYTES_MAX + 1024;

/// In front of the ids of tokens that were traded; these are forgotten when they are over.
const ID_PREFIX: &str = "oidc-";

/// An issuer that is believed, and what for.
#[derive(Debug, Clone)]
pub struct Options {
    pub issuer: String,
    pub audience: String,
    /// Where its keys are; told by its `/.well-known/openid-configuration` when absent.
    pub jwks_url: Option<Url>,
    /// Certificates (PEM) trusted beside the system's.
    pub ca_file: Option<std::path::PathBuf>,
    /// For how many seconds a token of ours is good; [`TOKEN_SECONDS`].
    pub token_seconds: u64,
    pub rules: Vec<Rule>,
}

/// What jobs may do whose claims all match.
#[derive(Debug, Clone)]
pub struct Rule {
    /// What a claim must be like, as a whole; never empty, which would be everybody's.
    pub claims: BTreeMap<String, Regex>,
    pub grants: Vec<Grant>,
}

/// All issuers that are believed.
pub struct Issuers {
    issuers: Vec<Issuer>,
    /// Signs what is given for theirs.
    key: SecretKey,
}

struct Issuer {
    options: Options,
    client: Client,
    keys: Mutex<Keys>,
    /// Held while they are fetched: others who need that wait for the same.
    asking: tokio::sync::Mutex<()>,
}

/// What is known of an issuer's keys, and when that was learned, in seconds since 1970.
#[derive(Default)]
struct Keys {
    known: BTreeMap<String, Key>,
    fetched: Option<u64>,
    asked: Option<u64>,
}

#[derive(Clone)]
struct Key {
    algorithm: Algorithm,
    decoding: Arc<DecodingKey>,
}

/// Why an issuer cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("cannot set out to ask issuer {issuer}: {source}")]
    Client {
        issuer: String,
        source: reqwest::Error,
    },
}

/// Why the keys of an issuer are not known.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{url} is neither https nor on loopback, refusing to take keys from it")]
    Insecure { url: Url },
    #[error("{url} did not answer: {source}")]
    Silent { url: Url, source: reqwest::Error },
    #[error("{url} answered {status}")]
    Status { url: Url, status: StatusCode },
    #[error("{url} has more than {DOCUMENT_BYTES_MAX} bytes")]
    TooLarge { url: Url },
    #[error("{url} has more than {KEYS_MAX} keys")]
    TooManyKeys { url: Url },
    #[error("{url} is not the json that is expected: {source}")]
    Json { url: Url, source: serde_json::Error },
    #[error("{url} speaks for issuer {found:?}")]
    OtherIssuer { url: Url, found: String },
    #[error("{issuer:?} and the place of its keys are no addresses")]
    NoAddress { issuer: String },
}

/// Why a job gets no token.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("this is no token of an issuer: {problem}")]
    Malformed { problem: &'static str },
    #[error("it is signed by {algorithm:?}, only RS256 and ES256 are accepted")]
    Algorithm { algorithm: String },
    #[error("its issuer {issuer:?} is none that this anchor believes")]
    Issuer { issuer: String },
    #[error("its audience is not {expected:?}")]
    Audience { expected: String },
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet")]
    Early,
    #[error("it is good for more than a day, refusing to believe it")]
    LongLived,
    #[error("its key {key:?} is none of the issuer's")]
    UnknownKey { key: String },
    #[error("its signature does not verify with the issuer's key")]
    Signature,
    #[error("the issuer's keys are not known at the moment")]
    NoKeys,
    #[error("no rule of this anchor fits its claims")]
    NoRule,
    #[error("what the rules give is no token: {0}")]
    Unusable(#[from] TokenError),
    #[error("the system gave no random bytes: {0}")]
    NoRandomness(getrandom::Error),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Refusal {
        let message = format!("no token for this job: {refused}");
        match &refused {
            Refused::NoRule => Refusal::new(StatusCode::FORBIDDEN, "NoRule", message),
            Refused::NoKeys => {
                Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "NoIssuerKeys", message)
            }
            Refused::Malformed { .. } => Refusal::bad_request(message),
            Refused::Unusable(_) | Refused::NoRandomness(_) | Refused::Catalog(_) => {
                Refusal::ours(&refused)
            }
            _ => Refusal::new(StatusCode::FORBIDDEN, "TokenRefused", message),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    token: String,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    /// Extensions that must be understood (RFC 7515, 4.1.11); we understand none.
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct Description {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct PublicKey {
    kid: String,
    kty: String,
    #[serde(rename = "use")]
    purpose: Option<String>,
    alg: Option<String>,
    n: Option<String>,
    e: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// An issuer's token that was read, and not yet proved.
struct Shown<'a> {
    algorithm: Algorithm,
    key: String,
    message: &'a str,
    signature: &'a str,
    claims: serde_json::Map<String, Value>,
}

/// Answers `/api/v1/oidc/token`.
pub(super) async fn answer(anchor: &Anchor, parts: &Parts, body: &mut Incoming) -> Answer {
    if parts.method != Method::POST {
        let message = "this method is not answered here";
        return Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "RequestError",
            message,
        ));
    }
    let Some(issuers) = &anchor.issuers else {
        return Err(Refusal::not_found("this anchor believes no issuer"));
    };
    let Question { token } = json_body(body, BODY_BYTES_MAX).await?;
    let (claims, text) = issuers
        .trade(&token, anchor.now())
        .await
        .inspect_err(|refused| {
            // What it says is from outside, and shown with its signs escaped.
            info!(refused = ?refused.to_string(), "gave no token for one of an issuer");
        })?;
    let now = anchor.now();
    let expires = claims.expires.map_or(now, |time| time.0);
    info!(subject = ?claims.subject, id = claims.id, "gave a token for one of an issuer");
    anchor
        .tokens
        .traded(claims, ID_PREFIX, UnixTime(now))
        .await?;
    let answer = serde_json::json!({
        "token": text,
        "expires": expires,
        // A clock that differs from ours does not change this.
        "expires_in": expires.saturating_sub(now),
    });
    Ok(respond::json(answer.to_string()))
}

impl Issuers {
    /// Gets ready to ask them; asks none. Blocks.
    pub fn new(options: Vec<Options>, key: SecretKey) -> Result<Issuers, IssuerError> {
        let mut issuers = Vec::new();
        for options in options {
            let authorities = Authorities::read(options.ca_file.as_deref())?;
            let begin = || {
                Client::builder()
                    .timeout(FETCH_TIMEOUT)
                    // Keys come from where the configuration or the issuer says, and from nowhere else.
                    .redirect(reqwest::redirect::Policy::none())
            };
            let client = authorities.client(begin);
            let client = client.map_err(|source| IssuerError::Client {
                issuer: options.issuer.clone(),
                source,
            })?;
            issuers.push(Issuer {
                options,
                client,
                keys: Mutex::default(),
                asking: tokio::sync::Mutex::default(),
            });
        }
        Ok(Issuers { issuers, key })
    }

    /// Proves an issuer's token, and makes the one of ours that its claims are worth.
    async fn trade(&self, text: &str, now: u64) -> Result<(Claims, String), Refused> {
        let shown = Shown::parse(text)?;
        let named = shown.text("iss").unwrap_or_default();
        let issuers = self.issuers.iter();
        let issuers: Vec<_> = issuers
            .filter(|issuer| issuer.options.issuer == named)
            .collect();
        if issuers.is_empty() {
            return Err(Refused::Issuer {
                issuer: excerpt(named),
            });
        }
        // One issuer may stand there for several audiences.
        let issuer = issuers
            .iter()
            .find(|issuer| shown.is_for(&issuer.options.audience));
        let issuer = issuer.ok_or_else(|| Refused::Audience {
            expected: issuers[0].options.audience.clone(),
        })?;
        // Before its keys are asked for: what is over costs nobody a question.
        shown.check_time(now)?;
        let key = issuer.key(&shown.key, now).await?;
        if key.algorithm != shown.algorithm {
            return Err(Refused::Signature);
        }
        let verified = jsonwebtoken::crypto::verify(
            shown.signature,
            shown.message.as_bytes(),
            &key.decoding,
            key.algorithm,
        );
        if !verified.unwrap_or(false) {
            return Err(Refused::Signature);
        }
        let grants: Vec<_> = issuer
            .options
            .rules
            .iter()
            .filter(|rule| rule.fits(&shown.claims))
            .flat_map(|rule| rule.grants.clone())
            .collect();
        if grants.is_empty() {
            return Err(Refused::NoRule);
        }
        let mut id = [0; 10];
        getrandom::fill(&mut id).map_err(Refused::NoRandomness)?;
        let claims = Claims {
            id: Some(format!("{ID_PREFIX}{}", nix32::encode(&id))),
            subject: subject(shown.text("sub").unwrap_or("a job")),
            not_before: None,
            expires: Some(UnixTime(now.saturating_add(issuer.options.token_seconds))),
            grants: merged(grants),
        };
        let text = claims.mint(&self.key);
        // Proves that whoever reads it will take it.
        Token::parse(&text)?;
        Ok((claims, text))
    }
}

/// What several rules give for one pattern counts together: of a token, the first alone would.
fn merged(grants: Vec<Grant>) -> Vec<Grant> {
    let mut merged: Vec<Grant> = Vec::new();
    for grant in grants {
        match merged.iter_mut().find(|one| one.pattern == grant.pattern) {
            None => merged.push(grant),
            Some(one) => {
                for permission in grant.permissions {
                    if !one.permissions.contains(&permission) {
                        one.permissions.push(permission);
                    }
                }
            }
        }
    }
    merged
}

/// A subject that a token may have.
fn subject(text: &str) -> String {
    let plain = text.chars().filter(|c| !c.is_control());
    let mut subject = String::new();
    for c in plain {
        if subject.len() + c.len_utf8() > SUBJECT_BYTES_MAX {
            break;
        }
        subject.push(c);
    }
    subject
}

fn excerpt(text: &str) -> String {
    text.chars().take(100).collect()
}

impl Rule {
    fn fits(&self, claims: &serde_json::Map<String, Value>) -> bool {
        !self.claims.is_empty()
            && self.claims.iter().all(|(name, shape)| {
                match claims.get(name) {
                    Some(Value::String(text)) => shape.is_match(text),
                    Some(value @ (Value::Bool(_) | Value::Number(_))) => {
                        shape.is_match(&value.to_string())
                    }
                    // Lists and the like are no facts to compare with a text.
                    _ => false,
                }
            })
    }
}

impl Keys {
    /// A key that nobody has to be asked about.
    fn fresh(&self, id: &str, now: u64) -> Option<Key> {
        let key = self.known.get(id)?;
        is_within(FRESH_SECONDS, self.fetched, now).then(|| key.clone())
    }
}

fn is_within(seconds: u64, since: Option<u64>, now: u64) -> bool {
    since.is_some_and(|since| now < since.saturating_add(seconds))
}

impl<'a> Shown<'a> {
    fn parse(text: &'a str) -> Result<Shown<'a>, Refused> {
        let malformed = |problem| Refused::Malformed { problem };
        let text = text.trim();
        if text.len() > TOKEN_BYTES_MAX {
            return Err(malformed("it is too long"));
        }
        let parts = || {
            let (message, signature) = text.rsplit_once('.')?;
            let (header, claims) = message.split_once('.')?;
            let header = BASE64URL_NOPAD.decode(header.as_bytes()).ok()?;
            let claims = BASE64URL_NOPAD.decode(claims.as_bytes()).ok()?;
            BASE64URL_NOPAD.decode(signature.as_bytes()).ok()?;
            Some((message, header, claims, signature))
        };
        let (message, header, claims, signature) =
            parts().ok_or_else(|| malformed("it is not three parts of url-safe base-64"))?;
        let header: Header = serde_json::from_slice(&header)
            .map_err(|_| malformed("its header is not the json that is expected"))?;
        let algorithm = match header.alg.as_str() {
            "RS256" => Algorithm::RS256,
            "ES256" => Algorithm::ES256,
            other => {
                return Err(Refused::Algorithm {
                    algorithm: excerpt(other),
                });
            }
        };
        if header.crit.is_some() {
            return Err(malformed("it has extensions that must be understood"));
        }
        let key = header.kid.ok_or_else(|| malformed("it names no key"))?;
        let claims = serde_json::from_slice(&claims)
            .map_err(|_| malformed("its claims are not the json that is expected"))?;
        Ok(Shown {
            algorithm,
            key,
            message,
            signature,
            claims,
        })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.claims.get(name)?.as_str()
    }

    fn is_for(&self, audience: &str) -> bool {
        match self.claims.get("aud") {
            Some(Value::String(found)) => found == audience,
            Some(Value::Array(all)) => all.iter().any(|found| found == audience),
            _ => false,
        }
    }

    fn check_time(&self, now: u64) -> Result<(), Refused> {
        // A date that is no number is none.
        let time = |name: &str| match self.claims.get(name) {
            None => Ok(None),
            Some(value) => {
                let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0);
                let seconds = seconds.map(|seconds| seconds as u64);
                seconds.map(Some).ok_or(Refused::Malformed {
                    problem: "its dates are no numbers",
                })
            }
        };
        let expires = time("exp")?.ok_or(Refused::Malformed {
            problem: "it does not say when it ends",
        })?;
        if now > expires.saturating_add(CLOCK_SKEW_SECONDS) {
            return Err(Refused::Expired);
        }
        for name in ["nbf", "iat"] {
            if let Some(start) = time(name)?
                && now.saturating_add(CLOCK_SKEW_SECONDS) < start
            {
                return Err(Refused::Early);
            }
        }
        match expires > now.saturating_add(LIFE_SECONDS_MAX) {
            true => Err(Refused::LongLived),
            false => Ok(()),
        }
    }
}

impl Issuer {
    /// Finds a key of the issuer's, asking for it where that may help.
    async fn key(&self, id: &str, now: u64) -> Result<Key, Refused> {
        // Whoever needs no question waits for nobody else's.
        if let Some(key) = self.known().fresh(id, now) {
            return Ok(key);
        }
        let _asking = self.asking.lock().await;
        let is_worth_asking = {
            let mut keys = self.known();
            let is_needed =
                keys.fresh(id, now).is_none() && !is_within(REFETCH_SECONDS, keys.asked, now);
            if is_needed {
                keys.asked = Some(now);
            }
            is_needed
        };
        if is_worth_asking {
            match self.fetch().await {
                Ok(known) => {
                    let mut keys = self.known();
                    keys.known = known;
                    keys.fetched = Some(now);
                }
                Err(error) => {
                    let issuer = &self.options.issuer;
                    warn!(issuer, %error, "could not fetch the keys of an issuer");
                }
            }
        }
        let keys = self.known();
        match keys.known.get(id) {
            _ if !is_within(STALE_SECONDS, keys.fetched, now) => Err(Refused::NoKeys),
            Some(key) => Ok(key.clone()),
            None => Err(Refused::UnknownKey { key: excerpt(id) }),
        }
    }

    fn known(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn fetch(&self) -> Result<BTreeMap<String, Key>, FetchError> {
        let url = match &self.options.jwks_url {
            Some(url) => url.clone(),
            None => self.described().await?,
        };
        let bytes = self.document(&url).await?;
        let set: KeySet = serde_json::from_slice(&bytes).map_err(|source| FetchError::Json {
            url: url.clone(),
            source,
        })?;
        if set.keys.len() > KEYS_MAX {
            return Err(FetchError::TooManyKeys { url });
        }
        // Keys of kinds that we do not take stand beside those that we do.
        Ok(set.keys.into_iter().filter_map(usable).collect())
    }

    /// Where the issuer says that its keys are.
    async fn described(&self) -> Result<Url, FetchError> {
        let issuer = &self.options.issuer;
        let place = issuer.trim_end_matches('/');
        let url = Url::parse(&format!("{place}/.well-known/openid-configuration"));
        let url = url.map_err(|_| FetchError::NoAddress {
            issuer: issuer.clone(),
        })?;
        let bytes = self.document(&url).await?;
        let description: Description =
            serde_json::from_slice(&bytes).map_err(|source| FetchError::Json {
                url: url.clone(),
                source,
            })?;
        if description.issuer != *issuer {
            return Err(FetchError::OtherIssuer {
                url,
                found: excerpt(&description.issuer),
            });
        }
        Url::parse(&description.jwks_uri).map_err(|_| FetchError::NoAddress {
            issuer: issuer.clone(),
        })
    }

    async fn document(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
        if !is_safe(url) {
            return Err(FetchError::Insecure { url: url.clone() });
        }
        let silent = |source: reqwest::Error| FetchError::Silent {
            url: url.clone(),
            source: source.without_url(),
        };
        let mut response = self.client.get(url.clone()).send().await.map_err(silent)?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status {
                url: url.clone(),
                status: response.status(),
            });
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(silent)? {
            if bytes.len() + chunk.len() > DOCUMENT_BYTES_MAX {
                return Err(FetchError::TooLarge { url: url.clone() });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

/// Reads a key that tokens may be signed with.
fn usable(value: Value) -> Option<(String, Key)> {
    let key: PublicKey = serde_json::from_value(value).ok()?;
    if key
        .purpose
        .as_deref()
        .is_some_and(|purpose| purpose != "sig")
    {
        return None;
    }
    let (algorithm, name, decoding) = match (key.kty.as_str(), key.crv.as_deref()) {
        ("RSA", _) => {
            let decoding = DecodingKey::from_rsa_components(&key.n?, &key.e?);
            (Algorithm::RS256, "RS256", decoding.ok()?)
        }
        ("EC", Some("P-256")) => {
            let decoding = DecodingKey::from_ec_components(&key.x?, &key.y?);
            (Algorithm::ES256, "ES256", decoding.ok()?)
        }
        _ => return None,
    };
    if key.alg.is_some_and(|alg| alg != name) {
        return None;
    }
    let decoding = Arc::new(decoding);
    let key_of = Key {
        algorithm,
        decoding,
    };
    Some((key.kid, key_of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_rules_give_for_one_cache_counts_together() {
        use granary_protocol::token::Permission::{Pull, Push};
        let grant = |pattern: &str, permissions: &[_]| Grant {
            pattern: pattern.parse().unwrap(),
            permissions: permissions.to_vec(),
        };
        let all = merged(vec![
            grant("main", &[Pull]),
            grant("ci-*", &[Push]),
            grant("main", &[Push, Pull]),
        ]);
        assert_eq!(all, [grant("main", &[Pull, Push]), grant("ci-*", &[Push])]);
    }
}
