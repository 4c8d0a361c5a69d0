//! The anchor's HTTP: connections, routes, and every refusal.
//!
//! ```text
//! GET    /; POST /login  /logout                                                             page.rs
//! GET    /health  /metrics                                                                    health.rs, counts.rs
//! GET    /<cache>/nix-cache-info  /<cache>/<hash>.narinfo  /<cache>/nar/…  /<cache>/log/… …   read.rs
//! PUT    the same                                                                             put.rs
//! GET    /api/v1/caches/<cache>                                                               stock.rs
//! POST   /api/v1/caches/<cache>/narinfos                                                      read.rs
//! *      /api/v1/caches/<cache>/missing  …/uploads                                              uploads.rs
//! DELETE /api/v1/caches/<cache>/paths/<hash>; POST …/keys; GET, POST /api/v1/collection         here
//! POST   /api/v1/scrub                                                                       scrub.rs
//! POST   /api/v1/oidc/token                                                                  oidc.rs
//! POST   /api/v1/member/token                                                                members.rs
//! *      /_api/v1/…  /<cache>/attic-cache-info                                                attic.rs
//! ```
//!
//! A refusal is one sentence and a name, as JSON that Attic's client prints. A PUT of Nix is never
//! answered with 5xx, upon which clients up to 2.32 send an empty body and hang for minutes: what is
//! our fault is 424 there. A request that we refuse is read a little further, so that a client that
//! is still sending hears the answer before the connection ends.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::http::header::{
    CONTENT_LENGTH, EXPECT, HeaderName, RETRY_AFTER, TRANSFER_ENCODING, WWW_AUTHENTICATE,
};
use ::http::{HeaderValue, Method, Request, Response, StatusCode, Version, request::Parts};
use futures::FutureExt;
use granary_protocol::signature::SecretKey;
use granary_protocol::token::Permission;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};
use zeroize::Zeroizing;

use super::accesses::Access;
use super::admin::AdminError;
use super::cache::{CacheName, CacheNameError, KeysError};
use super::catalog::{CacheRow, CatalogError};
use super::counts::Noted;
use super::ingest::IngestError;
use super::object_store::StorageError;
use super::tls::{HTTP_2, Tls};
use super::tokens::{Bearer, Denied};
use super::{
    Anchor, attic, counts, health, members, oidc, page, put, read, scrub, stock, to_its_end,
    uploads,
};
use crate::crowd::{Bounds, Crowd, Stranger};
use crate::log::chain;
use crate::serve::{
    self,
    respond::{self, Body},
};

/// Connections at once; beyond it new ones wait. Nix opens 25, an office has some dozens of machines.
const CONNECTIONS_MAX: usize = 2048;

/// How long a connection may be idle. curl keeps them for 118 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(125);

/// Connections that have not asked anything yet; the oldest make room for others, so that who asks always gets in.
/// Beyond half of all connections they could hold those up who do; one address may be a proxy's.
const UNASKED: Bounds = Bounds {
    all: 1024,
    per_address: 512,
};

/// How long a client may take in nothing of what it asked for before its connection ends: it holds one of
/// [`CONNECTIONS_MAX`]. A laptop that sleeps asks again.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Most bytes of a request's head. Attic's client sends up to 4 KiB of metadata in a header.
const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Requests at once on one connection of HTTP/2. Nix from 2.34 has up to 125 under way.
const STREAMS_MAX: u32 = 128;

/// Bytes that a client may send ahead of us, in one request and in all of a connection: a line of 1 Gbit/s
/// and 30 ms is kept full.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// After how much silence a client of HTTP/2 is asked whether it is there, and how long it may take to say.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest request target looked at.
const TARGET_BYTES_MAX: usize = 4096;

/// What is read of a body that is refused, and for how long, so that its sender hears why.
const DRAIN_BYTES_MAX: usize = 16 * 1024 * 1024;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client of an API shall wait when we are the problem.
const RETRY_AFTER_SECONDS: u64 = 5;

/// Largest body with a signing key.
const ROTATION_BYTES_MAX: usize = 4096;

/// How long a body that is not a NAR may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Pause after an accept that failed, as when file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a refusal is called for a token that does not allow what was asked (RFC 6750 §3.1: `insufficient_scope`).
const MISSING_PERMISSION: &str = "MissingPermission";

/// An answer that says no.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    /// One word for programs: `NoSuchCache`, `TokenExpired`.
    pub name: &'static str,
    pub message: String,
    /// What is for the log alone: our own trouble.
    pub trouble: Option<String>,
}

impl Refusal {
    pub fn new(status: StatusCode, name: &'static str, message: impl Into<String>) -> Refusal {
        Refusal {
            status,
            name,
            message: message.into(),
            trouble: None,
        }
    }

    pub fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, "RequestError", message)
    }

    /// Refuses a NAR that is larger than this anchor takes.
    pub fn too_large(bytes_max: u64) -> Refusal {
        let message = format!("nars of more than {bytes_max} bytes are not taken");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestError", message)
    }

    pub fn not_found(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    pub fn no_such_cache(name: &CacheName) -> Refusal {
        let message = format!("there is no cache {name}");
        Refusal::new(StatusCode::NOT_FOUND, "NoSuchCache", message)
    }

    /// Our own trouble: told to the log in full, to the client in general.
    pub fn ours(error: &(dyn std::error::Error + 'static)) -> Refusal {
        let refusal = match is_about_room(error) {
            true => {
                let message =
                    "a disk of the anchor is full, nothing was kept of this, try again later";
                Refusal::new(StatusCode::INSUFFICIENT_STORAGE, "StorageFull", message)
            }
            false => {
                let message = "the anchor's storage or catalog failed, see its log";
                Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "InternalError", message)
            }
        };
        Refusal {
            trouble: Some(chain(error)),
            ..refusal
        }
    }

    fn respond(self) -> Response<Body> {
        let body = serde_json::json!({
            "code": self.status.as_u16(),
            "error": self.name,
            "message": self.message,
        });
        let text = format!("{body}\n");
        let mut response = respond::small(self.status, "application/json", text);
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            let problem = match self.name {
                "Unauthorized" => "Bearer realm=\"granary\"".to_owned(),
                name => format!(
                    "Bearer realm=\"granary\", error=\"invalid_token\", error_description=\"{name}\""
                ),
            };
            if let Ok(value) = HeaderValue::from_str(&problem) {
                headers.append(WWW_AUTHENTICATE, value);
            }
            let basic = HeaderValue::from_static("Basic realm=\"granary\"");
            headers.append(WWW_AUTHENTICATE, basic);
        }
        if self.name == MISSING_PERMISSION {
            let problem = "Bearer realm=\"granary\", error=\"insufficient_scope\"";
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(problem));
        }
        let is_to_come_back = matches!(
            self.status,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE
        );
        if is_to_come_back || self.name == uploads::NAR_UNDERWAY {
            headers.insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Refusal {
        let name = match &denied {
            Denied::Unauthorized => "Unauthorized",
            Denied::TokenInvalid(_) => "TokenInvalid",
            Denied::TokenExpired => "TokenExpired",
            Denied::TokenEarly => "TokenNotYetValid",
            Denied::TokenRevoked => "TokenRevoked",
            Denied::MissingPermission { .. } => {
                let message = denied.to_string();
                return Refusal::new(StatusCode::FORBIDDEN, MISSING_PERMISSION, message);
            }
            Denied::Catalog(error) => return Refusal::ours(error),
        };
        Refusal::new(StatusCode::UNAUTHORIZED, name, denied.to_string())
    }
}

impl From<IngestError> for Refusal {
    fn from(error: IngestError) -> Refusal {
        let name = match &error {
            IngestError::Intake(intake) if intake.is_ours() => return Refusal::ours(&error),
            IngestError::Storage(_) | IngestError::Catalog(_) | IngestError::Settings(_) => {
                return Refusal::ours(&error);
            }
            IngestError::Keys(KeysError::Missing { .. }) => {
                warn!(%error, "refused a push");
                let message =
                    "this cache has no signing key at the moment, ask who runs the anchor";
                return Refusal::new(StatusCode::CONFLICT, "NoSigningKey", message);
            }
            IngestError::Keys(_) => return Refusal::ours(&error),
            IngestError::Quota { held, quota, .. }
            | IngestError::SubjectQuota { held, quota, .. } => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                let name = match held < quota {
                    // A smaller path may fit.
                    true => "PathOverQuota",
                    false => "QuotaExceeded",
                };
                return Refusal::new(status, name, error.to_string());
            }
            IngestError::MissingReferences { .. } => "MissingReferences",
            IngestError::NoNar { .. } => "NoSuchNar",
            IngestError::NarHash { .. } | IngestError::NarSize { .. } => "NarMismatch",
            IngestError::ContentAddress { .. } => "FalseContentAddress",
            IngestError::Intake(_) => "RequestError",
        };
        Refusal::new(StatusCode::BAD_REQUEST, name, chain(&error))
    }
}

impl From<AdminError> for Refusal {
    fn from(error: AdminError) -> Refusal {
        match &error {
            AdminError::Exists { .. } => Refusal::new(
                StatusCode::BAD_REQUEST,
                "CacheAlreadyExists",
                error.to_string(),
            ),
            AdminError::NoSuchCache { name } => Refusal::no_such_cache(name),
            AdminError::StoreDir { .. } | AdminError::Settings(_) => {
                Refusal::bad_request(error.to_string())
            }
            AdminError::Keys(KeysError::Credential { .. } | KeysError::Enough { .. }) => {
                Refusal::bad_request(error.to_string())
            }
            AdminError::Pin { .. } => Refusal::not_found(error.to_string()),
            AdminError::Administration(_)
            | AdminError::Keys(_)
            | AdminError::Storage(_)
            | AdminError::Catalog(_) => Refusal::ours(&error),
        }
    }
}

impl From<CatalogError> for Refusal {
    fn from(error: CatalogError) -> Refusal {
        Refusal::ours(&error)
    }
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Refusal {
        Refusal::ours(&error)
    }
}

impl From<CacheNameError> for Refusal {
    fn from(error: CacheNameError) -> Refusal {
        Refusal::bad_request(error.to_string())
    }
}

pub type Answer = Result<Response<Body>, Refusal>;

/// Serves clients until `shutdown`; connections end with their last answer.
pub async fn accept(
    anchor: Arc<Anchor>,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let strangers = Crowd::of_anybody(UNASKED);
    let admit = |slot, (stream, peer): (TcpStream, SocketAddr)| {
        // Small answers must not wait for the last one's acknowledgement. A socket that is gone
        // already will say so when it is read.
        let _ = stream.set_nodelay(true);
        drop_unread(&stream, UNREAD_TIMEOUT);
        // Who has not asked yet may have to make room.
        let Some(stranger) = strangers.enter(peer.ip()) else {
            return;
        };
        let client = Client {
            anchor: anchor.clone(),
            peer,
            stranger: Arc::new(Mutex::new(Some(stranger))),
            is_secure: tls.is_some(),
            tasks: tasks.clone(),
        };
        tasks.spawn(client.speak(stream, tls.clone(), shutdown.clone(), slot));
    };
    loop {
        let slot = slots.clone().acquire_owned();
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async { (slot.await, listener.accept().await) } => accepted,
        };
        match accepted {
            (Ok(slot), Ok(accepted)) => admit(slot, accepted),
            _ => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
    // Those in the backlog have connected, as far as they know.
    while let Ok(slot) = slots.clone().try_acquire_owned()
        && let Some(Ok(accepted)) = listener.accept().now_or_never()
    {
        admit(slot, accepted);
    }
}

/// Lets the system end a connection whose other end takes in nothing for so long.
fn drop_unread(stream: &TcpStream, after: Duration) {
    let milliseconds = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(stream, milliseconds) {
        debug!(%error, "could not limit how long a connection may stay unread");
    }
}

/// Whether a request came over TLS, among its extensions.
#[derive(Debug, Clone, Copy)]
pub struct IsSecure(pub bool);

/// Whether the client speaks TLS, to us or to what stands before us.
pub(super) fn is_secure(parts: &Parts) -> bool {
    let forwarded = parts.headers.get("x-forwarded-proto");
    let own = parts.extensions.get::<IsSecure>();
    forwarded.is_some_and(|value| value == "https") || own.is_some_and(|IsSecure(own)| *own)
}

/// Who is at the other end of a connection.
#[derive(Clone)]
struct Client {
    anchor: Arc<Anchor>,
    peer: SocketAddr,
    /// Its place among those who have not asked anything yet; `None` once it has.
    stranger: Arc<Mutex<Option<Stranger>>>,
    is_secure: bool,
    tasks: TaskTracker,
}

impl Client {
    async fn speak(
        self,
        stream: TcpStream,
        tls: Option<Arc<Tls>>,
        shutdown: CancellationToken,
        _slot: OwnedSemaphorePermit,
    ) {
        let peer = self.peer;
        let sent_away = self.place().as_ref().map(Stranger::sent_away);
        let sent_away = async {
            if let Some(sent_away) = sent_away {
                sent_away.await;
            }
            // It may have asked in the same moment, and gets its answer.
            if self.place().is_none() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.clone().speak_until_end(stream, tls, shutdown) => {}
            () = sent_away => debug!(%peer, "dropped a connection that asked nothing, there are too many"),
        }
    }

    async fn speak_until_end(
        self,
        stream: TcpStream,
        tls: Option<Arc<Tls>>,
        shutdown: CancellationToken,
    ) {
        let Some(tls) = tls else {
            return self.speak_http_1(stream, shutdown).await;
        };
        let peer = self.peer;
        match tls.accept(stream).await {
            Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(HTTP_2) => {
                self.speak_http_2(stream, shutdown).await;
            }
            Ok(stream) => self.speak_http_1(stream, shutdown).await,
            Err(error) => debug!(%peer, %error, "a client did not agree on TLS"),
        }
    }

    async fn speak_http_1(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        shutdown: CancellationToken,
    ) {
        let has_asked = AtomicBool::new(false);
        let service = service_fn(|request| {
            has_asked.store(true, Ordering::Relaxed);
            let client = self.clone();
            async move { Ok::<_, Infallible>(client.answer(request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service);
        // What was malformed has heard so.
        let _ = serve::until_end(connection, &has_asked, shutdown).await;
    }

    async fn speak_http_2(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        shutdown: CancellationToken,
    ) {
        let asked = Arc::new(AtomicU64::new(0));
        let counted = asked.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            counted.fetch_add(1, Ordering::Relaxed);
            let client = self.clone();
            async move {
                // A request whose stream is reset is dropped where it stands, unlike with HTTP/1. What an
                // upload has brought so far must outlive that.
                if request.method() == Method::PUT {
                    let tasks = client.tasks.clone();
                    let answering = tasks.spawn(async move { client.answer(request).await });
                    return answering.await.map_err(io::Error::other);
                }
                Ok(client.answer(request).await)
            }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_header_list_size(HEAD_BYTES_MAX as u32)
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let idle = async {
            let mut before = asked.load(Ordering::Relaxed);
            loop {
                tokio::time::sleep(IDLE_TIMEOUT).await;
                let after = asked.load(Ordering::Relaxed);
                if before == after {
                    return;
                }
                before = after;
            }
        };
        tokio::select! {
            _ = connection.as_mut() => return,
            () = shutdown.cancelled() => {}
            // What is under way ends all the same.
            () = idle => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }

    fn place(&self) -> MutexGuard<'_, Option<Stranger>> {
        self.stranger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        self.place().take();
        let is_http_1 = request.version() < Version::HTTP_2;
        let is_chunked = request.headers().contains_key(TRANSFER_ENCODING);
        let is_readable = matches!(*request.method(), Method::GET | Method::HEAD);
        if is_http_1 && is_readable && serve::announces_body(request.headers()) {
            return respond::no_body(is_below_nar(request.uri().path()));
        }
        let response = self.answer_known(request).await;
        match is_http_1 && is_chunked {
            // There may have been a length as well (RFC 9112 §6.1), by which something before us found another end.
            true => respond::closing(response),
            false => response,
        }
    }

    async fn answer_known(&self, mut request: Request<Incoming>) -> Response<Body> {
        request.extensions_mut().insert(IsSecure(self.is_secure));
        answer(&self.anchor, request, self.peer).await
    }
}

async fn answer(
    anchor: &Arc<Anchor>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Response<Body> {
    let started = Instant::now();
    let (mut parts, mut body) = request.into_parts();
    let noted = Noted::default();
    parts.extensions.insert(noted.clone());
    let is_nar = is_below_nar(parts.uri.path());
    let is_api = ["/_api/", "/api/"]
        .iter()
        .any(|api| parts.uri.path().starts_with(api));
    let is_nix_put = parts.method == Method::PUT && !is_api;
    let outcome = route(anchor, &parts, &mut body).await;
    let mut response = match outcome {
        Ok(response) => response,
        Err(mut refusal) => {
            count(anchor, &noted, refusal.status);
            if let Some(error) = &refusal.trouble {
                error!(method = %parts.method, path = parts.uri.path(), error, "could not answer");
            }
            if is_nix_put && refusal.status.is_server_error() {
                refusal.status = StatusCode::FAILED_DEPENDENCY;
            }
            debug!(%peer, name = refusal.name, message = refusal.message, "refused a request");
            // Who asked for permission to send has not sent.
            if !parts.headers.contains_key(EXPECT) {
                drain(&mut body).await;
            }
            refusal.respond()
        }
    };
    response = respond::with_ranges(response, is_nar);
    if parts.method == Method::HEAD {
        *response.body_mut() = Body::default();
    }
    if let Some(cache) = noted.cache_name() {
        anchor.accesses.note(Access {
            cache: cache.clone(),
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            status: response.status().as_u16(),
            subject: noted.subject().map(str::to_owned),
            elapsed_ms: started.elapsed().as_millis() as u64,
            at: started,
        });
    }
    info!(
        target: "granary::access",
        %peer, method = %parts.method, path = parts.uri.path(), status = response.status().as_u16(),
        elapsed_ms = started.elapsed().as_millis() as u64,
        // With whatever signs it has: a token's maker chose it.
        subject = noted.subject().map(tracing::field::debug), "answered"
    );
    response
}

fn count(anchor: &Anchor, noted: &Noted, status: StatusCode) {
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        anchor.counts.requests_denied.add(1);
    }
    match noted.cache() {
        Some(cache) if status.is_server_error() => cache.requests_failed.add(1),
        Some(cache) if status != StatusCode::NOT_FOUND => cache.requests_refused.add(1),
        _ => {}
    }
}

/// Whether a path is `/<cache>/nar/…`, where every answer says `Accept-Ranges`.
fn is_below_nar(path: &str) -> bool {
    path.split('/').nth(2) == Some("nar")
}

async fn drain(body: &mut Incoming) {
    let mut read = 0;
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, |bytes| bytes.len());
            if read > DRAIN_BYTES_MAX {
                return;
            }
        }
    };
    // A sender that is slower than that will find the connection closed.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, reading).await;
}

async fn route(anchor: &Arc<Anchor>, parts: &Parts, body: &mut Incoming) -> Answer {
    let target = parts
        .uri
        .path_and_query()
        .map_or("", |target| target.as_str());
    if target.len() > TARGET_BYTES_MAX {
        let message = format!("the address has {} characters", target.len());
        return Err(Refusal::new(
            StatusCode::URI_TOO_LONG,
            "RequestError",
            message,
        ));
    }
    let segments: Vec<&str> = parts.uri.path().split('/').skip(1).collect();
    let is_get = matches!(parts.method, Method::GET | Method::HEAD);
    match segments.as_slice() {
        [""] if is_get => page::answer(anchor, parts).await,
        ["login"] if parts.method == Method::POST => page::log_in(anchor, parts, body).await,
        ["logout"] if parts.method == Method::POST => page::log_out(anchor, parts),
        ["health"] if is_get => health::answer(anchor).await,
        ["metrics"] if is_get => counts::answer(anchor, parts).await,
        ["_api", "v1", rest @ ..] => attic::answer(anchor, parts, rest, body).await,
        ["api", "v1", "caches", cache] if is_get => stock::answer(anchor, parts, cache).await,
        ["api", "v1", "caches", cache, "narinfos"] if parts.method == Method::POST => {
            read::narinfos(anchor, parts, cache, body).await
        }
        ["api", "v1", "caches", cache, "paths", hash] if parts.method == Method::DELETE => {
            remove_path(anchor, parts, cache, hash).await
        }
        ["api", "v1", "caches", cache, "keys"] if parts.method == Method::POST => {
            rotate_key(anchor, parts, cache, body).await
        }
        ["api", "v1", "collection"] => collection(anchor, parts).await,
        ["api", "v1", "oidc", "token"] => oidc::answer(anchor, parts, body).await,
        ["api", "v1", "member", "token"] => members::answer(anchor, parts, body).await,
        ["api", "v1", "scrub"] => scrub::answer(anchor, parts, body).await,
        ["api", "v1", "caches", cache, rest @ ..] => {
            uploads::answer(anchor, parts, cache, rest, body).await
        }
        ["" | "api" | "_api" | "health" | "metrics", ..] => {
            Err(Refusal::not_found("there is nothing at this address"))
        }
        [cache, "attic-cache-info"] if is_get => {
            attic::cache_config(anchor, parts, &CacheName::new(cache)?).await
        }
        [cache, rest @ ..] if is_get => {
            read::answer(anchor, parts, &cache_name(cache)?, rest).await
        }
        [cache, rest @ ..] if parts.method == Method::PUT => {
            put::answer(anchor, parts, &cache_name(cache)?, rest, body).await
        }
        _ => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "RequestError",
            "this method is not answered here",
        )),
    }
}

/// A name that cannot be is as absent as one that is not.
fn cache_name(name: &str) -> Result<CacheName, Refusal> {
    CacheName::new(name).map_err(|error| Refusal::not_found(error.to_string()))
}

/// Takes a path out of a cache.
async fn remove_path(anchor: &Arc<Anchor>, parts: &Parts, cache: &str, hash: &str) -> Answer {
    let name = CacheName::new(cache)?;
    let (cache, _) = anchor.cache_for(parts, &name, Permission::Delete).await?;
    let hash = hash.parse();
    let hash = hash.map_err(|_| Refusal::bad_request("this is no hash of a store path"))?;
    match anchor.remove_path(&cache, hash).await? {
        true => Ok(empty(StatusCode::NO_CONTENT)),
        false => {
            let message = format!("cache {name} does not hold it");
            Err(Refusal::new(StatusCode::NOT_FOUND, "NoSuchObject", message))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rotation {
    /// In Nix's format; a new one when absent.
    key: Option<String>,
    /// Only the newest key goes on signing.
    #[serde(default)]
    retire: bool,
}

/// Signs a cache with another key: `{"key": text, "retire": bool}` → `{"public_keys": […]}`.
async fn rotate_key(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &str,
    body: &mut Incoming,
) -> Answer {
    let name = CacheName::new(cache)?;
    anchor
        .cache_for(parts, &name, Permission::Configure)
        .await?;
    let Rotation { key, retire } = json_body(body, ROTATION_BYTES_MAX).await?;
    let key = key.map(Zeroizing::new);
    let key = key.map(|key| key.parse::<SecretKey>()).transpose();
    let key = key.map_err(|error| Refusal::bad_request(error.to_string()))?;
    let changing = anchor.clone();
    let rotated = async move { changing.rotate_key(&name, key, retire).await };
    let cache = to_its_end(rotated).await?;
    let answer = serde_json::json!({ "public_keys": cache.settings.public_keys });
    Ok(respond::json(answer.to_string()))
}

/// Says what a collection would do (GET), or does it (POST); for who may delete from every cache.
async fn collection(anchor: &Arc<Anchor>, parts: &Parts) -> Answer {
    match anchor.bearer(parts).await? {
        Bearer::Nobody => return Err(Denied::Unauthorized.into()),
        Bearer::Somebody(claims) if claims.allows("*", Permission::Delete) => {}
        Bearer::Somebody(claims) => {
            return Err(Denied::MissingPermission {
                subject: claims.subject,
                permission: Permission::Delete,
                cache: "*".to_owned(),
            }
            .into());
        }
    }
    let collection = match parts.method {
        Method::GET => anchor.plan().await?,
        Method::POST => anchor.collect().await?,
        _ => {
            return Err(Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "RequestError",
                "this method is not answered here",
            ));
        }
    };
    let text = serde_json::to_string(&collection).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::json(text))
}

impl Anchor {
    /// Finds a cache for a bearer who wants to do something to it.
    ///
    /// # Errors
    /// To nobody a cache that is private and one that is not there are the same.
    pub(super) async fn cache_for(
        &self,
        parts: &Parts,
        name: &CacheName,
        permission: Permission,
    ) -> Result<(CacheRow, Bearer), Refusal> {
        let bearer = self.bearer(parts).await;
        let cache = self.catalog.cache(name).await?;
        let is_open = permission == Permission::Pull
            && cache.as_ref().is_some_and(|cache| cache.settings.public);
        let found = match (cache, bearer) {
            // A stale token in a netrc must not keep anybody from a public cache.
            (Some(cache), bearer) if is_open => Ok((cache, bearer.unwrap_or(Bearer::Nobody))),
            (_, Err(denied)) => Err(denied.into()),
            (Some(cache), Ok(bearer)) => {
                bearer.may(permission, name)?;
                Ok((cache, bearer))
            }
            (None, Ok(bearer)) if bearer.knows(name) => Err(Refusal::no_such_cache(name)),
            (None, Ok(bearer)) => {
                bearer.may(permission, name)?;
                Err(Refusal::no_such_cache(name))
            }
        };
        if let Ok((cache, _)) = &found {
            self.note_cache(parts, &cache.name);
        }
        found
    }
}

/// Reads a small body whole.
pub(super) async fn small_body(
    body: &mut Incoming,
    bytes_max: usize,
) -> Result<bytes::Bytes, Refusal> {
    let collecting = async {
        let collected = Limited::new(body, bytes_max).collect().await;
        let collected = collected.map_err(|error| broken_body(&*error, bytes_max))?;
        Ok(collected.to_bytes())
    };
    in_time(collecting).await
}

/// Reads a body with as much patience as we have with one that is not a NAR.
pub(super) async fn in_time<T>(
    reading: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    let read = tokio::time::timeout(BODY_TIMEOUT, reading).await;
    read.unwrap_or_else(|_| {
        Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            "RequestError",
            "the body took too long",
        ))
    })
}

/// Why a [`Limited`] body was not read to its end.
pub(super) fn broken_body(error: &(dyn std::error::Error + 'static), bytes_max: usize) -> Refusal {
    match error.is::<http_body_util::LengthLimitError>() {
        true => Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestError",
            format!("the body has more than {bytes_max} bytes"),
        ),
        false => Refusal::bad_request(format!("the body ended early: {error}")),
    }
}

/// Reads a JSON body.
pub(super) async fn json_body<T: serde::de::DeserializeOwned>(
    body: &mut Incoming,
    bytes_max: usize,
) -> Result<T, Refusal> {
    let bytes = small_body(body, bytes_max).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Refusal::bad_request(format!(
            "the body is not the json that is expected: {error}"
        ))
    })
}

/// Sets a header whose value is ours and plain.
pub(super) fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// An answer without a body, that says so.
pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, HeaderValue::from(0));
    response
}

/// Whether a disk that is full is the cause.
fn is_about_room(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let sqlite = cause.downcast_ref::<Arc<rusqlite::Error>>();
        let sqlite = sqlite.and_then(|error| error.sqlite_error_code());
        matches!(
            io,
            Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        ) || sqlite == Some(rusqlite::ErrorCode::DiskFull)
    })
}

/// Listens where the configuration says.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_connection_whose_other_end_reads_nothing_ends() {
        let listener = listen((std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (_client, (mut server, _)) = (client.unwrap(), accepted.unwrap());
        drop_unread(&server, Duration::from_secs(1));
        let sending = async { while server.write_all(&[0; 64 * 1024]).await.is_ok() {} };
        let ended = tokio::time::timeout(Duration::from_secs(60), sending).await;
        ended.expect("it ends");
    }
}
