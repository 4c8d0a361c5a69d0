//! Web: binary caches outside the mesh, anchors and upstreams, over ordinary HTTP.
//!
//! What they say is material to judge: narinfos go to the mind as text, NARs come out unpacked and
//! are proved like any other. 404, 403 and 410 mean "not here"; everything else that is not the
//! thing itself is the cache's failure, which its breaker counts.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use granary_protocol::mesh::CacheRole;
use granary_protocol::message::Answer;
use granary_protocol::narinfo::{Compression, NARINFO_BYTES_MAX, NarInfo};
use granary_protocol::store_path::StorePathHash;
use http::StatusCode;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, Url};
use tokio::sync::Semaphore;
use tracing::debug;

use super::stock::{self, Memory, StockError, Told};
use super::strangers::{self, Strangers};
use super::unpack::{self, Unpacked, Unpackers};
use super::{Origin, RESPONSE_TIMEOUT, SILENCE_TIMEOUT, Transfer, TransferError, Wanted};
use crate::authority::Authorities;
use crate::credential::Credential;
use crate::log::chain;

/// Time for name resolution, TCP and TLS. The mind waits for nobody that long; a connection that
/// comes to stand later is of use to the next request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// As many redirects as curl follows for Nix lead nowhere; object stores need one or two.
const REDIRECTS_MAX: usize = 5;

/// Requests for narinfos that one cache answers at once. Over HTTP/1 each takes a connection; Nix
/// opens 25.
const NARINFOS_AT_ONCE: usize = 32;

/// Idle connections kept per cache, and for how long.
const IDLE_CONNECTIONS_MAX: usize = NARINFOS_AT_ONCE;
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// One cache of the configuration.
#[derive(Clone, Debug)]
pub struct WebCache {
    pub role: CacheRole,
    pub url: Url,
    /// Shown to this cache's own server only.
    pub credential: Credential,
    pub authorities: Authorities,
}

/// Why caches cannot be asked at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up HTTP for anchors and upstreams: {0}")]
pub struct WebSetupError(#[from] reqwest::Error);

/// Asks the caches of the configuration, by their number. The number after the last one is that of all strangers, where
/// they are asked.
pub struct WebCaches {
    caches: Vec<Known>,
    strangers: Option<Strangers>,
    unpackers: Unpackers,
}

struct Known {
    /// That of the others, unless it trusts certificates of its own.
    client: Client,
    role: CacheRole,
    /// Ends with a slash.
    base: Url,
    credential: Credential,
    /// For logs and errors: without whatever secrets the URL holds.
    name: Arc<str>,
    narinfos: Semaphore,
    stock: Memory,
}

/// Why a cache did not answer for a narinfo.
#[derive(Debug, thiserror::Error)]
pub enum NarInfoRequestError {
    #[error("request failed: {0}")]
    Request(#[from] reqwest::Error),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("narinfo has more than {NARINFO_BYTES_MAX} bytes")]
    TooLarge,
    #[error("narinfo is no text")]
    NoText,
    #[error("narinfo is encoded as {0:?}")]
    Encoding(String),
    #[error("narinfo does not unpack: {0}")]
    Unpack(#[source] io::Error),
    #[error("did not answer within {RESPONSE_TIMEOUT:?}")]
    TimedOut,
    #[error("this node stops")]
    Stopping,
}

fn client(authorities: &Authorities) -> Result<Client, WebSetupError> {
    Ok(authorities.client(|| {
        Client::builder()
            .user_agent(concat!("granary/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::limited(REDIRECTS_MAX))
    })?)
}

impl WebCaches {
    pub fn new(
        caches: Vec<WebCache>,
        strangers: Option<Strangers>,
    ) -> Result<WebCaches, WebSetupError> {
        let shared = client(&Authorities::default())?;
        let known = |cache: WebCache| {
            Ok::<_, WebSetupError>(Known {
                client: match cache.authorities.is_empty() {
                    true => shared.clone(),
                    false => client(&cache.authorities)?,
                },
                role: cache.role,
                name: name_of(&cache.url),
                base: with_slash(cache.url),
                credential: cache.credential,
                narinfos: Semaphore::new(NARINFOS_AT_ONCE),
                stock: Memory::default(),
            })
        };
        Ok(WebCaches {
            caches: caches.into_iter().map(known).collect::<Result<_, _>>()?,
            strangers,
            unpackers: Unpackers::default(),
        })
    }

    /// The roles, for the mind.
    pub fn roles(&self) -> Vec<CacheRole> {
        let roles = self.caches.iter().map(|cache| cache.role);
        let strangers = self.strangers.iter().map(|_| CacheRole::Strangers);
        roles.chain(strangers).collect()
    }

    /// What a cache is called in logs and status.
    pub fn name(&self, cache: usize) -> Option<Arc<str>> {
        match self.caches.get(cache) {
            Some(cache) => Some(cache.name.clone()),
            None => self.strangers_of(cache).map(|_| strangers::NAME.into()),
        }
    }

    /// What an anchor told last of the cache that is used of it; it is asked anew in the background when that is
    /// long ago. `None` for others, and while nothing was told.
    pub fn stock(self: &Arc<Self>, cache: usize) -> Option<Told> {
        let known = self.caches.get(cache)?;
        if known.role != CacheRole::Anchor {
            return None;
        }
        let now = Instant::now();
        if known.stock.is_due(now) {
            let caches = self.clone();
            tokio::spawn(async move { caches.ask_for_stock(cache).await });
        }
        known.stock.told(now)
    }

    async fn ask_for_stock(&self, cache: usize) {
        let Some(known) = self.caches.get(cache) else {
            return;
        };
        let Some(url) = stock::address(&known.base) else {
            return;
        };
        let answer = async { stock::read(self.get(known, url, None).await?).await };
        let answer = tokio::time::timeout(stock::TIMEOUT, answer).await;
        match answer.unwrap_or(Err(StockError::TimedOut)) {
            Ok(told) => known.stock.tell(told, Instant::now()),
            // Its breaker says whether it is away, and other caches than Granary's do not know the question.
            Err(error) => {
                debug!(cache = %known.name, error = %chain(&error), "an anchor did not tell what it holds");
            }
        }
    }

    /// Nodes of other meshes, where they are asked.
    pub fn strangers(&self) -> Option<&Strangers> {
        self.strangers.as_ref()
    }

    fn strangers_of(&self, cache: usize) -> Option<&Strangers> {
        self.strangers
            .as_ref()
            .filter(|_| cache == self.caches.len())
    }

    /// Asks for narinfos; answers come as they arrive. What fails is left out, and when the cache
    /// cannot be reached at all, so is everything else.
    pub fn narinfos(
        &self,
        cache: usize,
        hashes: Vec<StorePathHash>,
    ) -> impl Stream<Item = Answer> + '_ {
        let asked = hashes.into_iter().map(move |hash| async move {
            if let Some(strangers) = self.strangers_of(cache) {
                let narinfo = strangers.narinfo(hash).await;
                return Some(Ok(Answer { hash, narinfo }));
            }
            let known = self.caches.get(cache)?;
            let answer = tokio::time::timeout(RESPONSE_TIMEOUT, self.narinfo(known, hash)).await;
            let answer = answer.unwrap_or(Err(NarInfoRequestError::TimedOut));
            match answer {
                Ok(narinfo) => Some(Ok(Answer { hash, narinfo })),
                Err(error) => {
                    debug!(cache = %known.name, %hash, error = %chain(&error), "a cache failed");
                    let is_away =
                        matches!(&error, NarInfoRequestError::Request(error) if error.is_connect());
                    is_away.then_some(Err(()))
                }
            }
        });
        let answers = futures::stream::iter(asked).buffer_unordered(NARINFOS_AT_ONCE);
        let answers = answers.filter_map(|answer| async { answer });
        // The first request that finds nobody ends the rest, which would find nobody either.
        answers
            .take_while(|answer| std::future::ready(answer.is_ok()))
            .filter_map(|answer| std::future::ready(answer.ok()))
    }

    async fn narinfo(
        &self,
        cache: &Known,
        hash: StorePathHash,
    ) -> Result<Option<String>, NarInfoRequestError> {
        let permit = cache.narinfos.acquire().await;
        let _permit = permit.map_err(|_| NarInfoRequestError::Stopping)?;
        let Ok(url) = cache.base.join(&format!("{hash}.narinfo")) else {
            return Ok(None);
        };
        let mut response = self.get(cache, url, None).await?;
        let status = response.status();
        if is_absent(status) {
            return Ok(None);
        }
        if status != StatusCode::OK {
            return Err(NarInfoRequestError::Status(status));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if body.len() + chunk.len() > NARINFO_BYTES_MAX {
                return Err(NarInfoRequestError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        let encoding = match encoding_of(&response) {
            Ok(Compression::None) => None,
            Ok(encoding) => Some(encoding),
            Err(other) => return Err(NarInfoRequestError::Encoding(other)),
        };
        if let Some(encoding) = encoding {
            // A few kilobytes: quicker than a thread.
            body = unpack::all(encoding, &body, NARINFO_BYTES_MAX)
                .map_err(NarInfoRequestError::Unpack)?;
        }
        let text = String::from_utf8(body).map_err(|_| NarInfoRequestError::NoText)?;
        Ok(Some(text))
    }

    /// Asks a cache, or strangers, for the NAR of a narinfo that they gave, from byte `from` of the NAR.
    ///
    /// Returns when the head of the answer has arrived.
    pub async fn transfer(
        &self,
        cache: usize,
        narinfo: &NarInfo,
        from: u64,
    ) -> Result<Transfer<'_>, TransferError> {
        let Some(strangers) = self.strangers_of(cache) else {
            return self.nar(cache, narinfo, from).await.map(Transfer::Web);
        };
        let wanted = Wanted {
            store_path_hash: narinfo.store_path.hash(),
            nar_hash: narinfo.nar_hash,
            nar_size: narinfo.nar_size,
        };
        strangers.nar(wanted, from).await.map(Transfer::Stranger)
    }

    /// Asks a cache for the NAR of a narinfo that it gave, from byte `from` of the NAR.
    ///
    /// Returns when the head of the answer has arrived.
    pub async fn nar(
        &self,
        cache: usize,
        narinfo: &NarInfo,
        from: u64,
    ) -> Result<FromWeb, TransferError> {
        let Some(cache) = self.caches.get(cache) else {
            let origin = Origin::Cache("a cache that is not configured".into());
            return Err(TransferError::Absent { origin });
        };
        let name = cache.name.clone();
        let origin = || Origin::Cache(name.clone());
        if !unpack::is_known(narinfo.compression) {
            return Err(TransferError::Compression {
                cache: name,
                compression: narinfo.compression,
            });
        }
        let url = cache.base.join(&narinfo.url).ok();
        let url = url.filter(|url| matches!(url.scheme(), "http" | "https"));
        let Some(url) = url else {
            return Err(TransferError::Url {
                cache: name,
                url: narinfo.url.clone(),
            });
        };
        // Offsets of the packed file mean nothing: such a one is read from its beginning.
        let range = (narinfo.compression == Compression::None && from > 0).then_some(from);
        let answer = tokio::time::timeout(RESPONSE_TIMEOUT, self.get(cache, url, range)).await;
        let response = answer
            .map_err(|_| TransferError::TimedOut { origin: origin() })?
            .map_err(|source| TransferError::Web {
                cache: name.clone(),
                source,
            })?;
        let status = response.status();
        if is_absent(status) {
            return Err(TransferError::Absent { origin: origin() });
        }
        let answered = |found: String, expected: &str| TransferError::Answer {
            origin: origin(),
            found,
            expected: expected.to_owned(),
        };
        let begins_at = match (status, range) {
            (StatusCode::OK, _) => 0,
            (StatusCode::PARTIAL_CONTENT, Some(from)) => {
                let range = response.headers().get(CONTENT_RANGE);
                let range = range.and_then(|range| range.to_str().ok()).unwrap_or("");
                if !range.starts_with(&format!("bytes {from}-")) {
                    let expected = format!("a range from {from}");
                    return Err(answered(format!("{status}, range {range:?}"), &expected));
                }
                from
            }
            _ => return Err(answered(status.to_string(), "200 or 206")),
        };
        let encoding = match encoding_of(&response) {
            Ok(encoding) => encoding,
            Err(other) => return Err(answered(format!("encoding {other:?}"), "one we know")),
        };
        if begins_at > 0 && encoding != Compression::None {
            return Err(answered("an encoded range".into(), "none"));
        }
        let layers: Vec<Compression> = [encoding, narinfo.compression]
            .into_iter()
            .filter(|layer| *layer != Compression::None)
            .collect();
        let body = response
            .bytes_stream()
            .map(|piece| piece.map_err(io::Error::other));
        let bytes = if layers.is_empty() {
            Body::Plain {
                pieces: Box::pin(body),
                skip: from - begins_at,
                left: narinfo.nar_size.saturating_sub(from),
            }
        } else {
            let unpacked = self
                .unpackers
                .start(layers, body, from, narinfo.nar_size)
                .map_err(|source| TransferError::Unpack {
                    cache: name.clone(),
                    source,
                })?;
            Body::Packed(unpacked.ok_or(TransferError::NoUnpacker)?)
        };
        Ok(FromWeb { cache: name, bytes })
    }

    async fn get(
        &self,
        cache: &Known,
        url: Url,
        from: Option<u64>,
    ) -> Result<Response, reqwest::Error> {
        let is_own = url.origin() == cache.base.origin();
        let mut request = cache.client.get(url);
        let shown = cache.credential.header().filter(|_| is_own);
        if let Some(header) = &shown {
            request = request.header(AUTHORIZATION, header);
        }
        if let Some(from) = from {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let response = request.send().await?;
        if let Some(header) = shown
            && response.status() == StatusCode::UNAUTHORIZED
        {
            cache.credential.refuse(&header);
        }
        Ok(response)
    }
}

/// The rest of a NAR on its way from a cache.
pub struct FromWeb {
    cache: Arc<str>,
    bytes: Body,
}

enum Body {
    Plain {
        pieces: std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
        /// Bytes that were not asked for, from a server that does not know ranges.
        skip: u64,
        /// Bytes wanted after those.
        left: u64,
    },
    Packed(Unpacked),
}

impl FromWeb {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        let broken = |source| TransferError::Unpack {
            cache: self.cache.clone(),
            source,
        };
        match &mut self.bytes {
            Body::Packed(unpacked) => unpacked.next().await.transpose().map_err(broken),
            Body::Plain { pieces, skip, left } => loop {
                if *left == 0 {
                    return Ok(None);
                }
                let piece = tokio::time::timeout(SILENCE_TIMEOUT, pieces.next()).await;
                let piece = piece.map_err(|_| TransferError::Silent {
                    origin: Origin::Cache(self.cache.clone()),
                })?;
                let Some(piece) = piece else {
                    let problem = format!("the answer ends {left} bytes too early");
                    return Err(broken(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        problem,
                    )));
                };
                let mut piece = piece.map_err(broken)?;
                let length = |number: u64, piece: &Bytes| {
                    usize::try_from(number).map_or(piece.len(), |number| number.min(piece.len()))
                };
                let skipped = length(*skip, &piece);
                let _ = piece.split_to(skipped);
                *skip -= skipped as u64;
                piece.truncate(length(*left, &piece));
                *left -= piece.len() as u64;
                if !piece.is_empty() {
                    return Ok(Some(piece));
                }
            },
        }
    }
}

/// 403 is how object stores say it of what may not be listed.
fn is_absent(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE
    )
}

/// Servers that store things encoded send them so without being asked (NIX.md §1.1).
fn encoding_of(response: &Response) -> Result<Compression, String> {
    let Some(encoding) = response.headers().get(CONTENT_ENCODING) else {
        return Ok(Compression::None);
    };
    match encoding.to_str().unwrap_or("?") {
        "" | "identity" => Ok(Compression::None),
        "gzip" | "x-gzip" => Ok(Compression::Gzip),
        "br" => Ok(Compression::Brotli),
        "zstd" => Ok(Compression::Zstd),
        "xz" => Ok(Compression::Xz),
        "bzip2" => Ok(Compression::Bzip2),
        other => Err(other.to_owned()),
    }
}

fn with_slash(mut url: Url) -> Url {
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    url
}

fn name_of(url: &Url) -> Arc<str> {
    let mut url = url.clone();
    // Only URLs without a host have no user information to remove.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.as_str().trim_end_matches('/').into()
}
