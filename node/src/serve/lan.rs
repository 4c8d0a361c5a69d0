//! The LAN's port: the shared part of the store over plain HTTP, for machines without Granary; and over TLS on the
//! members' port, for strangers, what is shared in public.
//!
//! It gives what is in this machine's store and shared ([`Readers::Lan`](crate::store::shared::Readers)), and asks
//! nobody else; what is hidden or denied cannot be told from what is not there. Off unless `share.http` is set.
//!
//! Anybody on the network may connect, so: a token, if there is one, comes before everything else; without one a
//! Host header must be an address, or a name that no web page of the internet can have, for a page can make a
//! browser behind the router resolve the page's own name to this machine; who asks too fast waits ([`Turns`]); and
//! who opens too many connections loses its oldest ([`Crowd`]).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use granary_protocol::cache_info::CacheInfo;
use granary_protocol::hash::sha256;
use granary_protocol::network::Reach;
use http::header::HOST;
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::listing::{self, Listings};
use super::narinfo as narinfo_json;
use super::respond::{self, Body};
use super::turns::Turns;
use super::{Ended, Route, connection, credentials, host_name, is_within, nar};
use crate::crowd::{Bounds, Crowd, Stranger, crowd_of};
use crate::metrics::{Metrics, Refused, Share};
use crate::store::{LocalStore, PathInfo, StoreError};

/// How long an idle connection is kept. curl keeps its own for 118 s, and opens another one.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections of machines of the LAN, and of strangers, at once. Nix opens 25 per process, and several machines may
/// stand behind one router.
const CONNECTIONS: Bounds = Bounds {
    all: 512,
    per_address: 128,
};

/// Before cache.nixos.org, which has 40, and after a node of one's own, which has 10.
const PRIORITY: i32 = 30;

/// Pause after accept failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Names below these are of private networks; none is delegated, so no page of the internet has one.
const PRIVATE_DOMAINS: [&str; 5] = [".local", ".lan", ".home.arpa", ".internal", ".localhost"];

/// The token that clients show, kept as its digest: comparing digests tells nothing about the token by its time.
pub struct LanToken([u8; 32]);

impl LanToken {
    pub fn new(token: &str) -> LanToken {
        LanToken(sha256(token.as_bytes()))
    }

    fn is_shown(&self, headers: &HeaderMap) -> bool {
        let Ok(Some(shown)) = credentials::presented(headers) else {
            return false;
        };
        let shown = sha256(shown.as_bytes());
        let differing = self.0.iter().zip(shown);
        // Every byte is looked at, wherever the first difference is.
        differing.fold(0, |all, (own, shown)| all | (own ^ shown)) == 0
    }
}

/// Who may ask.
#[derive(Default)]
pub struct Rules {
    pub token: Option<LanToken>,
    /// Names in the Host header that are accepted beside addresses and names of private networks.
    pub hosts: Vec<String>,
}

/// Serves machines of the LAN.
pub struct LanPort {
    shared: Arc<dyn LocalStore>,
    rules: Rules,
    metrics: Arc<Metrics>,
    counts: Arc<Share>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    crowd: Arc<Crowd>,
    turns: Turns,
    listings: Listings,
}

impl LanPort {
    pub fn new(
        shared: Arc<dyn LocalStore>,
        rules: Rules,
        metrics: Arc<Metrics>,
        counts: Arc<Share>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Arc<LanPort> {
        Arc::new(LanPort {
            shared,
            rules,
            metrics,
            counts,
            shutdown,
            tasks,
            crowd: Crowd::of_anybody(CONNECTIONS),
            turns: Turns::default(),
            listings: Listings::default(),
        })
    }

    /// Accepts connections within reach until shutdown.
    pub async fn accept(
        self: Arc<LanPort>,
        listener: TcpListener,
        reach: watch::Receiver<Arc<Reach>>,
    ) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((socket, address)) if !is_within(&reach, &socket) => {
                    debug!(%address, "dropped a connection from no network of mesh.networks");
                }
                Ok((socket, address)) => {
                    if let Err(error) = socket.set_nodelay(true) {
                        debug!(%error, "could not set TCP_NODELAY");
                    }
                    // Here, so that the crowd has them in the order in which they came.
                    // Nothing is held against anybody here, so everybody has a place.
                    let Some(stranger) = self.crowd.enter(address.ip()) else {
                        continue;
                    };
                    let port = self.clone();
                    self.tasks
                        .spawn(async move { port.serve(socket, address, stranger).await });
                }
                Err(error) => {
                    warn!(%error, "could not accept a connection from the LAN");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Answers on a connection that was accepted elsewhere, until it ends.
    pub async fn attend<S>(self: &Arc<LanPort>, stream: S, address: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Nothing is held against anybody here, so everybody has a place.
        if let Some(stranger) = self.crowd.enter(address.ip()) {
            self.serve(stream, address, stranger).await;
        }
    }

    async fn serve<S>(self: &Arc<LanPort>, stream: S, address: SocketAddr, stranger: Stranger)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let requests = connection(stream, PATIENCE, self.shutdown.clone(), |request| {
            let port = self.clone();
            async move { port.answer(crowd_of(address.ip()), request).await }
        });
        tokio::select! {
            ended = requests => if ended == Ended::Malformed {
                self.metrics.refused(Refused::Malformed);
            },
            () = stranger.sent_away() => {
                self.counts.connections_dropped.add(1);
                debug!(%address, "dropped a connection from the LAN, there are too many");
            }
        }
    }

    async fn answer(
        self: Arc<LanPort>,
        address: IpAddr,
        request: Request<Incoming>,
    ) -> Response<Body> {
        self.turns.take(address).await;
        let route = Route::of(request.uri());
        let response = match self.refusal(&route, request.headers()) {
            Some(refusal) => refusal,
            None => self.route(route, &request).await,
        };
        self.counts.count(response.status());
        response
    }

    /// What is said to who may not ask, whatever it asks for.
    fn refusal(&self, route: &Route, headers: &HeaderMap) -> Option<Response<Body>> {
        match &self.rules.token {
            Some(token) if !token.is_shown(headers) => Some(respond::unauthorized(route.is_nar())),
            // No page knows the token, under whatever name.
            Some(_) => None,
            None => {
                let host = headers.get(HOST)?;
                let is_accepted = host
                    .to_str()
                    .is_ok_and(|host| is_local_host(host, &self.rules.hosts));
                (!is_accepted).then(|| respond::unknown_host(route.is_nar()))
            }
        }
    }

    async fn route(&self, route: Route, request: &Request<Incoming>) -> Response<Body> {
        let is_nar = route.is_nar();
        let dir = self.shared.dir();
        let answer = match route {
            Route::CacheInfo => {
                let info = CacheInfo {
                    store_dir: dir.clone(),
                    want_mass_query: true,
                    priority: PRIORITY,
                };
                Ok(Some(respond::cache_info(info.to_string())))
            }
            Route::NarInfo(hash) => {
                let text = |info: PathInfo| respond::narinfo(info.to_narinfo().to_text(dir));
                self.shared.path_info(hash).await.map(|info| info.map(text))
            }
            Route::NarInfoJson(hash) => {
                let text =
                    |info: PathInfo| respond::json(narinfo_json::to_json(&info.to_narinfo(), dir));
                self.shared.path_info(hash).await.map(|info| info.map(text))
            }
            Route::Listing(hash) => match self.listings.place().await {
                Some(place) => {
                    let answer = listing::local(&self.shared, hash, place).await;
                    answer.map(Result::ok)
                }
                None => Ok(None),
            },
            Route::Nar(url) => match nar::open(&self.shared, &url).await {
                Ok(Some(local)) => {
                    let counts = self.counts.clone();
                    let sent = move |bytes| counts.nar_bytes.add(bytes);
                    let (method, headers) = (request.method(), request.headers());
                    Ok(local.respond(method, headers, sent).await)
                }
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            },
            // Named one by one, so that a new route is not given to the LAN without a thought. What stands
            // beside the shared paths says more of this machine than they do.
            Route::Page
            | Route::WhyPage(_)
            | Route::Log(_)
            | Route::Realisation(_)
            | Route::TraceEntry(..)
            | Route::DebugInfo(_)
            | Route::Browse(..)
            | Route::Health
            | Route::Metrics
            | Route::Status
            | Route::Why(_)
            | Route::Unknown { .. } => Ok(None),
        };
        self.or_absent(answer, is_nar)
    }

    fn or_absent(
        &self,
        answer: Result<Option<Response<Body>>, StoreError>,
        is_nar: bool,
    ) -> Response<Body> {
        match answer {
            Ok(Some(response)) => response,
            Ok(None) => respond::not_found(is_nar),
            Err(error) => {
                self.metrics.store_errors.add(1);
                warn!(%error, "could not serve the LAN from the store");
                respond::not_found(is_nar)
            }
        }
    }
}

/// Whether a Host header is an address, or a name that no page of the internet can have: one without a dot, one of
/// a private network, or one that the configuration lists.
fn is_local_host(host: &str, more: &[String]) -> bool {
    let name = host_name(host).to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    let is_address = name.parse::<IpAddr>().is_ok();
    let is_private = !name.contains('.')
        || PRIVATE_DOMAINS
            .iter()
            .any(|domain| name.len() > domain.len() && name.ends_with(domain));
    let is_listed = more.iter().any(|more| more.eq_ignore_ascii_case(name));
    is_address || is_listed || (is_private && !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_accepted_that_no_page_of_the_internet_can_have() {
        let more = ["cache.example.org".to_owned()];
        let check = |host: &str, expected| {
            assert_eq!(is_local_host(host, &more), expected, "{host}");
        };
        for host in [
            "192.168.1.5:4729",
            "[fd00::5]:4729",
            "nas",
            "NAS:4729",
            "nas.local",
            "nas.lan.",
            "nas.home.arpa:4729",
            "localhost:4729",
            "Cache.Example.ORG:4729",
        ] {
            check(host, true);
        }
        for host in [
            "",
            ".",
            ":4729",
            "evil.example",
            "nas.evil.example:4729",
            "192.168.1.5.evil.example",
            "nas.local.evil.example",
            "evil.cache.example.org",
            ".local",
            "notlan.example",
        ] {
            check(host, false);
        }
    }

    #[test]
    fn a_token_is_shown_as_bearer_or_as_password_and_whole() {
        let token = LanToken::new("secret");
        let check = |value: Option<&str>, expected| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(http::header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(token.is_shown(&headers), expected, "{value:?}");
        };
        check(Some("Bearer secret"), true);
        // `printf x:secret | base64`, and the same with other passwords.
        check(Some("Basic eDpzZWNyZXQ="), true);
        check(Some("Basic eDpzZWNyZXQx"), false);
        check(Some("Basic c2VjcmV0"), false);
        for wrong in [
            "Bearer secre",
            "Bearer secrets",
            "Bearer",
            "Bearer ",
            "secret",
        ] {
            check(Some(wrong), false);
        }
        check(None, false);
    }
}
