//! Serving a store over HTTP: the routes of a binary cache, answered from a
//! [`LocalStore`](crate::store::LocalStore).
//!
//! One set of routes and answers, mounted on loopback for Nix (`substituter.rs` adds the mesh behind
//! them), on the members' port behind mutual TLS ([`members`]) and on the LAN's port for machines
//! without Granary ([`lan`]); the store is the shared part of this machine's on both. Requests are GET or HEAD and have no body; everything in
//! them is parsed strictly and bounded by hyper's limits on the head.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use granary_protocol::narinfo::NarUrl;
use granary_protocol::network::Reach;
use granary_protocol::store_path::{StorePath, StorePathHash};
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub mod respond;
pub mod narinfo;
pub mod nar;
mod pieces;
pub mod listing;
pub mod log;
pub mod trace;
pub mod debug;
pub mod browse;
pub mod members;
pub mod credentials;
pub mod lan;
mod turns;
pub mod tls;

use browse::FilePath;
use respond::Body;

use crate::store::debug::BuildId;
use crate::store::trace::{OutputName, RealisationId};

/// Longest path and query looked at. The longest of ours is a NAR's, with 100 bytes.
const TARGET_BYTES_MAX: usize = 4096;

/// Most bytes of a request's head; Nix sends some 200.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    CacheInfo,
    NarInfo(StorePathHash),
    /// The same as JSON, for people and their scripts.
    NarInfoJson(StorePathHash),
    Listing(StorePathHash),
    Nar(NarUrl),
    /// The build log of a derivation.
    Log(StorePath),
    /// What a derivation's output turned out to be, as Nix 2.4 to 2.34 asks.
    Realisation(RealisationId),
    /// The same as Nix 2.35 asks.
    TraceEntry(StorePath, OutputName),
    DebugInfo(BuildId),
    /// A file or folder of a store path, for a browser.
    Browse(StorePathHash, FilePath),
    /// For a person with a browser.
    Page,
    /// The reasons for one answer, for the same.
    WhyPage(String),
    Health,
    Metrics,
    Status,
    /// A store path or its hash.
    Why(String),
    /// Below `/nar/` or not: answers there say `Accept-Ranges` whatever happens.
    Unknown {
        is_nar: bool,
    },
}

impl Route {
    /// Finds the route of a request target.
    pub fn of(uri: &http::Uri) -> Route {
        let path = uri.path();
        let unknown = Route::Unknown {
            is_nar: path.starts_with("/nar/"),
        };
        let target = uri.path_and_query().map_or("", |target| target.as_str());
        if target.len() > TARGET_BYTES_MAX {
            return unknown;
        }
        Route::find(path, target).unwrap_or(unknown)
    }

    fn find(path: &str, target: &str) -> Option<Route> {
        match path {
            "/" => return Some(Route::Page),
            "/nix-cache-info" => return Some(Route::CacheInfo),
            "/health" => return Some(Route::Health),
            "/metrics" => return Some(Route::Metrics),
            "/api/v1/status" => return Some(Route::Status),
            _ => {}
        }
        if let Some(asked) = target.strip_prefix("/why?path=") {
            return Some(Route::WhyPage(decoded(&asked.replace('+', " "))?));
        }
        if let Some(path) = path.strip_prefix("/api/v1/why/") {
            return Some(Route::Why(path.to_owned()));
        }
        if target.starts_with("/nar/") {
            return NarUrl::parse(&target[1..]).map(Route::Nar);
        }
        if let Some(path) = path.strip_prefix("/serve/") {
            let (hash, path) = match path.split_once('/') {
                Some((hash, path)) => (hash, FilePath::parse(path)?),
                None => (path, FilePath::root()),
            };
            return Some(Route::Browse(hash.parse().ok()?, path));
        }
        // Names of store paths may have a `?`, which Nix does not escape.
        if let Some(name) = target.strip_prefix("/log/") {
            let derivation = StorePath::from_base_name(&decoded(name)?).ok()?;
            return derivation.is_derivation().then_some(Route::Log(derivation));
        }
        if let Some(name) = target.strip_prefix("/realisations/") {
            let id = decoded(name.strip_suffix(".doi")?)?;
            return id.parse().ok().map(Route::Realisation);
        }
        if let Some(name) = target.strip_prefix("/build-trace-v2/") {
            let (derivation, output) = name.strip_suffix(".doi")?.split_once('/')?;
            let derivation = StorePath::from_base_name(&decoded(derivation)?).ok()?;
            let output = decoded(output)?.parse().ok()?;
            return derivation
                .is_derivation()
                .then_some(Route::TraceEntry(derivation, output));
        }
        if let Some(id) = path.strip_prefix("/debuginfo/") {
            let id = id.strip_suffix(".debug").unwrap_or(id);
            return id.parse().ok().map(Route::DebugInfo);
        }
        let (hash, kind) = path.strip_prefix('/')?.split_once('.')?;
        let hash = hash.parse().ok()?;
        let query = target.split_once('?').map(|(_, query)| query);
        match kind {
            "narinfo" if query == Some("json") => Some(Route::NarInfoJson(hash)),
            "narinfo" => Some(Route::NarInfo(hash)),
            "ls" => Some(Route::Listing(hash)),
            _ => None,
        }
    }

    /// The route's name in the metrics: one of [`crate::metrics::ROUTES`].
    pub fn word(&self) -> &'static str {
        match self {
            Route::CacheInfo => "cache-info",
            Route::NarInfo(_) | Route::NarInfoJson(_) => "narinfo",
            Route::Listing(_) => "listing",
            Route::Nar(_) => "nar",
            Route::Log(_) => "log",
            Route::Realisation(_) | Route::TraceEntry(..) => "trace",
            Route::DebugInfo(_) => "debuginfo",
            Route::Browse(..) => "browse",
            Route::Page
            | Route::WhyPage(_)
            | Route::Health
            | Route::Metrics
            | Route::Status
            | Route::Why(_) => "about",
            Route::Unknown { .. } => "unknown",
        }
    }

    pub fn is_nar(&self) -> bool {
        matches!(self, Route::Nar(_) | Route::Unknown { is_nar: true })
    }
}

/// Undoes percent-encoding; `None` when that gives no text.
fn decoded(text: &str) -> Option<String> {
    String::from_utf8(decoded_bytes(text)?).ok()
}

/// Undoes percent-encoding; `None` when a `%` is followed by something else than two digits.
fn decoded_bytes(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        bytes.push(match first {
            b'%' => {
                let (digits, after) = rest.split_at_checked(2)?;
                rest = after;
                let digit = |byte: u8| char::from(byte).to_digit(16);
                // Two digits make less than 256.
                (digit(digits[0])? * 16 + digit(digits[1])?) as u8
            }
            byte => byte,
        });
    }
    Some(bytes)
}

/// How long a client that has connected and not asked yet is waited for at the end: its request may be on
/// the way, and a closed connection would lose it.
const FIRST_REQUEST: Duration = Duration::from_millis(250);

/// How a connection ended, as far as that is not its client's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Ended {
    Well,
    /// Upon a request that is no HTTP, too long, or ambiguous.
    Malformed,
}

/// Serves one connection until it ends, or until `shutdown` lets it finish its last answer.
///
/// `patience` is how long an idle connection is kept, and how long a head may take to come. Errors of the connection
/// are the client's affair and end it.
pub async fn connection<S, H, F>(
    stream: S,
    patience: Duration,
    shutdown: CancellationToken,
    handle: H,
) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<Body>>,
{
    let has_asked = AtomicBool::new(false);
    let is_ambiguous = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        has_asked.store(true, Ordering::Relaxed);
        let is_readable = matches!(*request.method(), Method::GET | Method::HEAD);
        let is_nar = Route::of(request.uri()).is_nar();
        let has_body = announces_body(request.headers());
        is_ambiguous.fetch_or(has_body && is_readable, Ordering::Relaxed);
        let answer = (is_readable && !has_body).then(|| handle(request));
        async move {
            Ok::<_, Infallible>(match answer {
                Some(answer) => answer.await,
                None if is_readable => respond::no_body(is_nar),
                None if has_body => respond::closing(respond::method_not_allowed(is_nar)),
                None => respond::method_not_allowed(is_nar),
            })
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let ended = until_end(connection, &has_asked, shutdown).await;
    match is_ambiguous.into_inner() {
        true => Ended::Malformed,
        false => ended,
    }
}

/// Whether a body follows a request's head. Where none is read, whoever stands before us may see another end of the
/// request than we do, and let pass as its body what we would take for the next request.
pub fn announces_body(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH);
    headers.contains_key(TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

/// Runs a connection until it ends, or until `shutdown` lets it finish its last answer, which may be its
/// first: `has_asked` says whether a request has come.
pub async fn until_end<I, S>(
    connection: http1::Connection<I, S>,
    has_asked: &AtomicBool,
    shutdown: CancellationToken,
) -> Ended
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: HttpService<Incoming, ResBody = Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut connection = std::pin::pin!(connection);
    let ended = |outcome: Result<(), hyper::Error>| match outcome {
        Err(error) if error.is_parse() => Ended::Malformed,
        _ => Ended::Well,
    };
    tokio::select! {
        outcome = connection.as_mut() => return ended(outcome),
        () = shutdown.cancelled() => {}
    }
    if !has_asked.load(Ordering::Relaxed) {
        // To be told to finish is for hyper to close what has not asked yet.
        let first = tokio::time::timeout(FIRST_REQUEST, connection.as_mut());
        if let Ok(outcome) = first.await {
            return ended(outcome);
        }
    }
    connection.as_mut().graceful_shutdown();
    ended(connection.await)
}

/// Whether who connected may be listened to, by the address of ours that it came to.
fn is_within(reach: &watch::Receiver<Arc<Reach>>, socket: &TcpStream) -> bool {
    let local = socket.local_addr();
    local.is_ok_and(|local| reach.borrow().admits(local.ip()))
}

/// Whether a Host header names this machine's loopback, or the very address that is listened on.
///
/// A web page can make a browser resolve its own name to 127.0.0.1, but not send another Host.
pub fn is_own_host(host: &str, listen: SocketAddr) -> bool {
    let name = host_name(host);
    match name.parse::<std::net::IpAddr>() {
        Ok(ip) => ip.is_loopback() || ip == listen.ip(),
        Err(_) => name.eq_ignore_ascii_case("localhost"),
    }
}

/// A Host header's name or address, without its port and an address's brackets.
fn host_name(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() && !name.ends_with(':') => name,
        _ => host,
    };
    name.strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_first_request_that_comes_as_everything_ends_is_answered() {
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        let (mut client, server) = tokio::io::duplex(4096);
        let serving = tokio::spawn(connection(
            server,
            FIRST_REQUEST * 40,
            shutdown,
            |_| async { respond::not_found(false) },
        ));
        // Until it waits for something to read.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        client
            .write_all(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 404"), "{answer:?}");
        assert_eq!(serving.await.unwrap(), Ended::Well);
    }

    fn route(target: &str) -> Route {
        Route::of(&target.parse().unwrap())
    }

    #[test]
    fn routes_are_found() {
        let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
        let nar_hash = "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s";
        assert_eq!(route("/nix-cache-info"), Route::CacheInfo);
        assert_eq!(
            route(&format!("/{hash}.narinfo")),
            Route::NarInfo(hash.parse().unwrap())
        );
        for target in [
            format!("/nar/{hash}-{nar_hash}.nar"),
            format!("/nar/{nar_hash}.nar?hash={hash}"),
            format!("/nar/{hash}.nar"),
        ] {
            let Route::Nar(url) = route(&target) else {
                panic!("{target}")
            };
            assert_eq!(url.store_path_hash.to_string(), hash);
        }
        let derivation = format!("{hash}-a+b?c=d.drv");
        let path = StorePath::from_base_name(&derivation).unwrap();
        for log in [&derivation, &derivation.replace('?', "%3F")] {
            assert_eq!(route(&format!("/log/{log}")), Route::Log(path.clone()));
        }
        assert_eq!(
            route(&format!("/build-trace-v2/{derivation}/out.doi")),
            Route::TraceEntry(path, "out".parse().unwrap())
        );
        let id = format!("sha256:{}!out", "0".repeat(64));
        for name in [&id, &id.replace(':', "%3a").replace('!', "%21")] {
            assert_eq!(
                route(&format!("/realisations/{name}.doi")),
                Route::Realisation(id.parse().unwrap())
            );
        }
        let hash: StorePathHash = hash.parse().unwrap();
        assert_eq!(route(&format!("/{hash}.ls")), Route::Listing(hash));
        assert_eq!(
            route(&format!("/{hash}.narinfo?json")),
            Route::NarInfoJson(hash)
        );
        assert_eq!(
            route(&format!("/serve/{hash}")),
            Route::Browse(hash, FilePath::root())
        );
        assert_eq!(route("/"), Route::Page);
        assert_eq!(route("/why?path=%2Fa+b"), Route::WhyPage("/a b".into()));
        assert_eq!(route("/health"), Route::Health);
        assert_eq!(route("/api/v1/why/abc"), Route::Why("abc".into()));
    }

    #[test]
    fn everything_else_is_unknown() {
        for target in [
            "/why",
            "/why?path=%f",
            "/favicon.ico",
            "/..",
            "/%2e%2e/etc/passwd",
            "/x.narinfo",
            "/.narinfo",
            "/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo/x",
            "/00bgd045z0d4icpbc2yyz4gx48ak44la.nar",
            "/log/00bgd045z0d4icpbc2yyz4gx48ak44la-a",
            "/log/00bgd045z0d4icpbc2yyz4gx48ak44la-%",
            "/log/00bgd045z0d4icpbc2yyz4gx48ak44la-%ff.drv",
            "/realisations/x.doi",
            "/build-trace-v2/00bgd045z0d4icpbc2yyz4gx48ak44la-a.drv/a%2fb.doi",
            "/serve",
            "/serve/00bgd045z0d4icpbc2yyz4gx48ak44la/../x",
        ] {
            assert_eq!(route(target), Route::Unknown { is_nar: false }, "{target}");
        }
        for target in [
            "/nar/x",
            "/nar/",
            "/nar/../x.nar",
            &format!("/nar/{}", "a".repeat(8000)),
        ] {
            assert_eq!(route(target), Route::Unknown { is_nar: true }, "{target}");
        }
    }

    #[test]
    fn only_own_names_are_accepted_as_host() {
        let listen: SocketAddr = "127.0.0.1:4726".parse().unwrap();
        for host in [
            "localhost",
            "LOCALHOST:4726",
            "127.0.0.1:4726",
            "127.0.0.5",
            "[::1]:4726",
            "::1",
        ] {
            assert!(is_own_host(host, listen), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:4726",
            "192.168.1.2",
            "localhost.evil.example",
            "",
        ] {
            assert!(!is_own_host(host, listen), "{host}");
        }
        assert!(is_own_host(
            "192.168.1.2:4726",
            "192.168.1.2:4726".parse().unwrap()
        ));
    }
}
