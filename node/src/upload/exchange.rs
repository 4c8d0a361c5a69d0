//! Exchange: a job of CI, or a member of the mesh, proves who it is, and gets a token of an anchor for it.
//!
//! GitHub Actions tells a job with `permissions: id-token: write` where it gets a proof for an audience; other
//! systems put one into the environment. The anchor (`anchor/oidc.rs`) looks at it and gives a token for an hour; a push
//! that takes longer proves it again in time ([`Exchange::keep`]). Nothing is sent where somebody on the way could read it: the proof goes over HTTPS, or to loopback, except to an
//! anchor that speaks HTTP, which its tokens do as well. A member's proof is good once and for one cache
//! ([`super::member`]).

use std::mem::Discriminant;
use std::time::Duration;

use granary_protocol::certificate::mesh_tag;
use granary_protocol::signature::PublicKey;
use granary_protocol::token::TOKEN_BYTES_MAX;
use reqwest::{Client, RequestBuilder, StatusCode, Url};
use serde::Deserialize;
use tracing::{debug, warn};
use zeroize::Zeroizing;

use super::Target;
use super::member::{Membership, MembershipError};
use crate::authority::{self, Authorities, is_safe};

/// Where members show their assertions, and ask whose members may.
const MEMBER_PATH: &str = "api/v1/member/token";

/// How long each of the two may take to answer. The anchor asks the issuer meanwhile, which gets 5 s twice.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// An anchor that is not there is known by that.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer read: a token in JSON.
const ANSWER_BYTES_MAX: usize = TOKEN_BYTES_MAX + 4096;

/// Longest life of a token that is believed. Ours have an hour; what anybody says must not overflow a clock.
pub(super) const LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// A token is renewed when only this part of its life is left: of an hour twenty minutes, in which an issuer or
/// anchor that is away may come back.
const RENEWAL_PART: u32 = 3;

/// Pause after a renewal that failed; of short lives a part, so that several fit.
const RENEWAL_PAUSE: Duration = Duration::from_secs(60);
const RENEWAL_PAUSE_PART: u32 = 10;

/// Whatever an anchor says of a token's life, it is asked no more often than this.
const RENEWAL_PAUSE_MIN: Duration = Duration::from_secs(1);

/// Where a job's proof comes from.
pub enum Proof {
    /// It is there.
    Given(Zeroizing<String>),
    /// It is asked for, with what shows that we are the job.
    Asked { url: Url, bearer: Zeroizing<String> },
    /// It is signed by this machine, which is a member of the anchor's mesh.
    Member(Box<Membership>),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("{cache} is no address of a cache")]
    NoAddress { cache: String },
    #[error("cannot set out to ask for a token: {source}")]
    Client { source: reqwest::Error },
    #[error("{url} is neither https nor on loopback, refusing to show it who this job is")]
    Insecure { url: String },
    #[error("{url} did not answer: {source}")]
    Silent { url: String, source: reqwest::Error },
    #[error(
        "{url} speaks HTTP without TLS\nhint: write http:// for https:// in the address of the cache"
    )]
    NoTls { url: String },
    #[error("{url} answered {status}: {said}")]
    Refused {
        url: String,
        status: StatusCode,
        /// What an anchor calls it, for programs.
        name: String,
        said: String,
    },
    #[error(
        "{url} gives members no tokens (it answered {status})\nhint: only an anchor that is a member of this mesh does; give its [[anchor]] a token-file"
    )]
    NoMembers { url: String, status: StatusCode },
    #[error("{url} is of another mesh\nhint: give its [[anchor]] a token-file")]
    OtherMesh { url: String },
    #[error("{url} has more than {ANSWER_BYTES_MAX} bytes to say")]
    TooLarge { url: String },
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error("the answer of {url} has no token")]
    Malformed { url: String },
}

/// What GitHub answers.
#[derive(Deserialize)]
struct Given {
    value: String,
}

/// What an anchor answers.
#[derive(Deserialize)]
struct Traded {
    token: String,
    /// Seconds from here on in which it is good.
    expires_in: u64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Said {
    error: String,
    message: String,
}

/// Whose members an anchor gives tokens.
#[derive(Deserialize)]
struct Mesh {
    mesh: String,
}

/// A job and an anchor, between which proofs are traded for tokens.
pub struct Exchange {
    client: Client,
    /// The anchor's address, with a slash at its end.
    root: Url,
    audience: String,
    proof: Proof,
}

/// A token, and for how long it is good from when it was given.
pub struct Token {
    pub text: Zeroizing<String>,
    pub life: Duration,
}

impl ExchangeError {
    /// What is the same when the same goes wrong again: messages may name the time.
    pub(super) fn kind(&self) -> (Discriminant<ExchangeError>, &str) {
        let name = match self {
            ExchangeError::Refused { name, .. } => name,
            _ => "",
        };
        (std::mem::discriminant(self), name)
    }
}

impl Exchange {
    /// Gets ready to prove who this job is to the anchor that has this cache; asks nobody. `audience` is the
    /// anchor's address unless it goes by another name.
    pub fn new(
        cache: &str,
        audience: Option<&str>,
        proof: Proof,
        authorities: &Authorities,
    ) -> Result<Exchange, ExchangeError> {
        let root = root(cache)?;
        let client = authorities.client(|| {
            Client::builder()
                .timeout(ANSWER_TIMEOUT)
                .connect_timeout(CONNECT_TIMEOUT)
                // A redirect would send the proof elsewhere.
                .redirect(reqwest::redirect::Policy::none())
        });
        let client = client.map_err(|source| ExchangeError::Client { source })?;
        let audience = audience.unwrap_or(root.as_str().trim_end_matches('/'));
        Ok(Exchange {
            client,
            audience: audience.to_owned(),
            root,
            proof,
        })
    }

    /// Trades the proof, asked for or signed anew where that can be done, for a token.
    pub async fn token(&self) -> Result<Token, ExchangeError> {
        let (path, question) = match &self.proof {
            Proof::Given(proof) => issuers(proof),
            Proof::Asked { url, bearer } => {
                let place = place(url);
                if !is_safe(url) {
                    return Err(ExchangeError::Insecure { url: place });
                }
                let mut url = url.clone();
                url.query_pairs_mut()
                    .append_pair("audience", &self.audience);
                let request = self.client.get(url).bearer_auth(bearer.as_str());
                let bytes = answer(request, &place).await?;
                let given: Given = read(&bytes, place)?;
                issuers(&given.value)
            }
            Proof::Member(membership) => {
                let certificate = membership.certificate()?;
                // Who we are is nobody's business but our mesh's.
                self.find_mesh(&membership.mesh).await?;
                let assertion = membership.assertion(certificate)?;
                let question = serde_json::json!({ "assertion": assertion });
                (MEMBER_PATH, question)
            }
        };
        let (url, place) = self.below(path)?;
        let request = self
            .client
            .post(url)
            .header(reqwest::header::CONTENT_TYPE, "application/json")
            .body(question.to_string());
        let bytes = answer(request, &place).await?;
        let traded: Traded = read(&bytes, place)?;
        Ok(Token {
            text: Zeroizing::new(traded.token),
            life: Duration::from_secs(traded.expires_in).min(LIFE_MAX),
        })
    }

    /// Asks the anchor whether it is of this mesh; it learns nothing by that.
    async fn find_mesh(&self, mesh: &PublicKey) -> Result<(), ExchangeError> {
        let (url, place) = self.below(MEMBER_PATH)?;
        let answered = answer(self.client.get(url), &place).await;
        let bytes = answered.map_err(|error| match error {
            ExchangeError::Refused { url, status, .. } if status.is_client_error() => {
                ExchangeError::NoMembers { url, status }
            }
            other => other,
        })?;
        let answered: Mesh = read(&bytes, place.clone())?;
        match answered.mesh == mesh_tag(mesh) {
            true => Ok(()),
            false => Err(ExchangeError::OtherMesh { url: place }),
        }
    }

    /// What stands below the anchor's root, and how that is called in errors.
    fn below(&self, path: &str) -> Result<(Url, String), ExchangeError> {
        let url = self.root.join(path);
        let url = url.map_err(|_| ExchangeError::NoAddress {
            cache: self.root.to_string(),
        })?;
        let place = place(&url);
        Ok((url, place))
    }

    /// Renews the token of a target again and again, before the one that it has is over. Has no end.
    ///
    /// While that fails the push goes on with the token it has, and says so when that one is over. Cancel-safe.
    pub async fn keep(&self, target: &Target, mut life: Duration) {
        let mut pause = renewal_after(life);
        loop {
            tokio::time::sleep(pause).await;
            pause = match self.token().await {
                Ok(token) => {
                    target.renew(token.text);
                    life = token.life;
                    debug!("renewed the token");
                    renewal_after(life)
                }
                Err(error) => {
                    warn!(%error, "could not renew the token, trying again until it is over");
                    RENEWAL_PAUSE
                        .min(life / RENEWAL_PAUSE_PART)
                        .max(RENEWAL_PAUSE_MIN)
                }
            };
        }
    }
}

/// When a token is renewed that is good for so long.
pub(super) fn renewal_after(life: Duration) -> Duration {
    (life - life / RENEWAL_PART).max(RENEWAL_PAUSE_MIN)
}

/// Where an issuer's proof is traded, and the question.
fn issuers(proof: &str) -> (&'static str, serde_json::Value) {
    ("api/v1/oidc/token", serde_json::json!({ "token": proof }))
}

/// The address of the anchor that has a cache: what stands before its last word.
fn root(cache: &str) -> Result<Url, ExchangeError> {
    let no_address = || ExchangeError::NoAddress {
        cache: cache.to_owned(),
    };
    let mut url = Url::parse(cache.trim_end_matches('/')).map_err(|_| no_address())?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(no_address());
    }
    url.set_query(None);
    url.set_fragment(None);
    url.path_segments_mut()
        .map_err(|()| no_address())?
        .pop()
        .push("");
    Ok(url)
}

/// An address for an error: its query may be a secret.
fn place(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8], url: String) -> Result<T, ExchangeError> {
    serde_json::from_slice(bytes).map_err(|_| ExchangeError::Malformed { url })
}

async fn answer(request: RequestBuilder, url: &str) -> Result<Zeroizing<Vec<u8>>, ExchangeError> {
    let silent = |source: reqwest::Error| match authority::speaks_no_tls(&source) {
        true => ExchangeError::NoTls {
            url: url.to_owned(),
        },
        false => ExchangeError::Silent {
            url: url.to_owned(),
            source: source.without_url(),
        },
    };
    let mut response = request.send().await.map_err(silent)?;
    let mut bytes = Zeroizing::new(Vec::new());
    while let Some(chunk) = response.chunk().await.map_err(silent)? {
        if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(ExchangeError::TooLarge {
                url: url.to_owned(),
            });
        }
        bytes.extend_from_slice(&chunk);
    }
    if response.status().is_success() {
        return Ok(bytes);
    }
    let said = serde_json::from_slice::<Said>(&bytes).unwrap_or_default();
    // They are printed for a person.
    let printable = |text: String| {
        text.chars()
            .filter(|c| !c.is_control())
            .take(1000)
            .collect()
    };
    Err(ExchangeError::Refused {
        url: url.to_owned(),
        status: response.status(),
        name: printable(said.error),
        said: printable(said.message),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_anchor_is_what_stands_before_the_cache() {
        for (cache, expected) in [
            ("http://nas.lan:4730/main", "http://nas.lan:4730/"),
            ("https://anchor.example/main/", "https://anchor.example/"),
            (
                "https://x.example/granary/main",
                "https://x.example/granary/",
            ),
        ] {
            assert_eq!(root(cache).unwrap().as_str(), expected);
        }
        for wrong in ["main", "file:///main", ""] {
            assert!(root(wrong).is_err(), "{wrong}");
        }
    }
}
