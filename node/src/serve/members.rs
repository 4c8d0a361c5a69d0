//! The members' port: the shared part of the store, over mutual TLS.
//!
//! A peer is served while it is a member. Admission happens on the control plane; here the peer id
//! that TLS proved is looked up in the set of linked members, before the first request and for as
//! long as the connection stands. What one member takes is bounded for itself: connections, how fast it makes them,
//! streams, and requests in a second, so that a flood slows down who makes it. Everyone else is closed after the handshake without a byte of
//! application data, and shares a small room with others ([`Crowd`]) until then. Where the mesh key is,
//! those who ask to join are handed to who admits; where something is shared in public, strangers who ask for that
//! are answered by another service ([`LanPort`]) over another view of the store.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::network::Reach;
use granary_protocol::peer::PeerId;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::server;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::lan::LanPort;
use super::pieces::{self, Link, Packers};
use super::respond::{self, Body};
use super::tls::{Acceptor, Purpose, TlsError};
use super::{Ended, Route, connection, is_within, nar};
use crate::allowance::{Allowance, Rate};
use crate::crowd::Crowd;
use crate::identity;
use crate::metrics::{Metrics, Refused};
use crate::store::{LocalStore, StoreError};

/// How long an idle connection of a member is kept; longer than members keep theirs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections of all members together.
const CONNECTIONS_MAX: usize = 1024;

/// Connections of one member for each stream that it may have: some wait idle for the next request, and
/// on some is said that there are too many streams. One that opens more takes them from itself alone.
const CONNECTIONS_PER_STREAM: usize = 2;

/// Connections that one member makes: it keeps those that it has, so a burst is one for each of its streams,
/// as often as a Wi-Fi takes them all. Each costs us half a millisecond.
const CONNECTION_RATE: Rate = Rate {
    burst: 256.0,
    per_second: 32.0,
};

/// Requests of one member, whatever they are for: a burst is a closure of small paths, and further ones wait. Nix
/// on the other side registers some hundred paths in a second; one request costs us a third of a millisecond.
const REQUEST_RATE: Rate = Rate {
    burst: 4096.0,
    per_second: 1024.0,
};

/// Said to whoever asks; members choose by measurement.
const PRIORITY: i32 = 10;

/// Pause after accept failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes over the connection of somebody who wants to be admitted.
pub type Newcomers =
    Arc<dyn Fn(server::TlsStream<TcpStream>, PeerId) -> BoxFuture<'static, ()> + Send + Sync>;

/// How connections come in, and who takes those that are not for transfers.
pub struct Entrance {
    pub acceptor: Acceptor,
    /// Where strangers stand.
    pub crowd: Arc<Crowd>,
    /// `None` where the mesh key is not.
    pub newcomers: Option<Newcomers>,
    /// Answers strangers; `None` where nothing is shared in public.
    pub public: Option<Arc<LanPort>>,
}

/// Serves members.
pub struct MembersPort {
    pub entrance: Entrance,
    pub shared: Arc<dyn LocalStore>,
    pub members: watch::Receiver<Arc<BTreeSet<PeerId>>>,
    pub streams_per_peer: usize,
    pub metrics: Arc<Metrics>,
    pub shutdown: CancellationToken,
    pub tasks: TaskTracker,
    /// Only members get into it, so it has at most as many entries as there were members.
    rooms: Mutex<BTreeMap<PeerId, Room>>,
    connections: Arc<Semaphore>,
    packers: Arc<Packers>,
}

/// What one member may take.
#[derive(Clone)]
struct Room {
    streams: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    allowances: Arc<Mutex<Allowances>>,
    link: Arc<Link>,
}

struct Allowances {
    connections: Allowance,
    requests: Allowance,
}

impl MembersPort {
    pub fn new(
        entrance: Entrance,
        shared: Arc<dyn LocalStore>,
        members: watch::Receiver<Arc<BTreeSet<PeerId>>>,
        streams_per_peer: usize,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Arc<MembersPort> {
        Arc::new(MembersPort {
            entrance,
            shared,
            members,
            streams_per_peer,
            metrics,
            shutdown,
            tasks,
            rooms: Mutex::default(),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            packers: Packers::new(),
        })
    }

    /// Accepts connections within reach until shutdown.
    pub async fn accept(
        self: Arc<MembersPort>,
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
                    self.metrics.transfers_refused.add(1);
                    debug!(%address, "dropped a connection from no network of mesh.networks");
                }
                Ok((socket, address)) => {
                    let port = self.clone();
                    self.tasks
                        .spawn(async move { port.serve(socket, address).await });
                }
                Err(error) => {
                    warn!(%error, "could not accept a member's connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(self: &Arc<MembersPort>, socket: TcpStream, address: SocketAddr) {
        let is_admitted = |peer: &libp2p::PeerId| {
            identity::ed25519_of(peer)
                .is_some_and(|key| self.is_member(&PeerId::from_public_key(key)))
        };
        let Some(stranger) = self.entrance.crowd.enter(address.ip()) else {
            self.metrics.transfers_refused.add(1);
            debug!(%address, "dropped a connection, strangers came from there too often");
            return;
        };
        let accepted = tokio::select! {
            accepted = self.entrance.acceptor.accept(socket, is_admitted) => accepted,
            () = stranger.sent_away() => {
                self.metrics.transfers_refused.add(1);
                debug!(%address, "dropped a connection in its handshake, there are too many");
                return;
            }
        };
        let (stream, peer, purpose) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                self.metrics.transfers_refused.add(1);
                match &error {
                    TlsError::NotAdmitted { .. } => {
                        self.metrics.refused(Refused::NotAdmitted);
                        warn!(%error, "refused a transfer");
                    }
                    _ => {
                        self.metrics.refused(Refused::Handshake);
                        debug!(%error, "refused a transfer");
                    }
                }
                return;
            }
        };
        let Some(key) = identity::ed25519_of(&peer) else {
            return;
        };
        let peer = PeerId::from_public_key(key);
        match purpose {
            Purpose::Joining => {
                // A stranger still, but no longer on its way in: who admits has room of its own.
                drop(stranger);
                if let Some(newcomers) = &self.entrance.newcomers {
                    newcomers(stream, peer).await;
                }
                return;
            }
            Purpose::Public => {
                // What answers those has room for them as well.
                drop(stranger);
                if let Some(public) = &self.entrance.public {
                    public.attend(stream, address).await;
                }
                return;
            }
            Purpose::Transfer => {}
        }
        let room = self.room(peer);
        let all = self.connections.clone().try_acquire_owned();
        let own = room.connections.clone().try_acquire_owned();
        let (Ok(_own), Ok(_one_of_all), true) = (own, all, room.may_connect()) else {
            self.metrics.transfers_refused.add(1);
            self.metrics.refused(Refused::Connections);
            debug!(%peer, %address, "dropped a connection of a member, there are too many");
            return;
        };
        stranger.prove();
        let requests = connection(stream, PATIENCE, self.shutdown.clone(), |request| {
            let port = self.clone();
            async move { port.answer(peer, request).await }
        });
        tokio::select! {
            ended = requests => if ended == Ended::Malformed {
                self.metrics.refused(Refused::Malformed);
            },
            () = self.departure(peer) => debug!(%peer, %address, "closed the transfers of a peer that left"),
        }
    }

    async fn answer(
        self: Arc<MembersPort>,
        peer: PeerId,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let wait = self.room(peer).request();
        if !wait.is_zero() {
            // At most one request of each of its connections waits.
            self.metrics.refused(Refused::RequestsSlowed);
            tokio::time::sleep(wait).await;
        }
        match Route::of(request.uri()) {
            Route::CacheInfo => {
                let info = CacheInfo {
                    store_dir: self.shared.dir().clone(),
                    want_mass_query: true,
                    priority: PRIORITY,
                };
                respond::cache_info(info.to_string())
            }
            Route::NarInfo(hash) => match self.shared.path_info(hash).await {
                Ok(Some(info)) => respond::narinfo(info.to_narinfo().to_text(self.shared.dir())),
                Ok(None) => respond::not_found(false),
                Err(error) => self.trouble(&error, false),
            },
            Route::Nar(url) => {
                let Some(permit) = self.stream_permit(peer) else {
                    self.metrics.refused(Refused::Streams);
                    return respond::busy();
                };
                match nar::open(&self.shared, &url).await {
                    Ok(Some(local)) => {
                        let metrics = self.metrics.clone();
                        let sent = move |bytes| {
                            // The permit lives as long as the body does.
                            let _ = &permit;
                            metrics.traffic.sent(&peer, bytes);
                        };
                        let (method, headers) = (request.method(), request.headers());
                        let (packers, link) = (&self.packers, self.room(peer).link);
                        let offered = match *method {
                            Method::GET => {
                                pieces::offered(headers, local.nar.size(), packers, &link)
                            }
                            _ => None,
                        };
                        let response = match offered {
                            Some(from) => {
                                let (packers, metrics) = (packers.clone(), self.metrics.clone());
                                pieces::respond(local, from, packers, link, metrics, sent).await
                            }
                            None => local.respond(method, headers, sent).await,
                        };
                        response.unwrap_or_else(|| respond::not_found(true))
                    }
                    Ok(None) => respond::not_found(true),
                    // Nothing is wrong, and the path is still here.
                    Err(StoreError::Busy) => respond::busy(),
                    Err(error) => self.trouble(&error, true),
                }
            }
            // Named one by one, so that a new route is not given to members without a thought. What
            // stands beside the shared paths says more of this machine than they do.
            route @ (Route::NarInfoJson(_)
            | Route::Page
            | Route::WhyPage(_)
            | Route::Listing(_)
            | Route::Log(_)
            | Route::Realisation(_)
            | Route::TraceEntry(..)
            | Route::DebugInfo(_)
            | Route::Browse(..)
            | Route::Health
            | Route::Metrics
            | Route::Status
            | Route::Why(_)
            | Route::Unknown { .. }) => respond::not_found(route.is_nar()),
        }
    }

    fn trouble(&self, error: &dyn std::error::Error, is_nar: bool) -> Response<Body> {
        self.metrics.store_errors.add(1);
        warn!(%error, "could not serve a member from the store");
        respond::not_found(is_nar)
    }

    fn is_member(&self, peer: &PeerId) -> bool {
        self.members.borrow().contains(peer)
    }

    /// Waits until the peer is no member any more.
    async fn departure(&self, peer: PeerId) {
        let mut members = self.members.clone();
        // The mesh having ended is no departure: what is under way may finish.
        if members
            .wait_for(|members| !members.contains(&peer))
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    fn stream_permit(&self, peer: PeerId) -> Option<OwnedSemaphorePermit> {
        self.room(peer).streams.try_acquire_owned().ok()
    }

    fn room(&self, peer: PeerId) -> Room {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        let streams = self.streams_per_peer;
        let room = rooms.entry(peer).or_insert_with(|| Room::new(streams));
        room.clone()
    }
}

impl Room {
    fn new(streams: usize) -> Room {
        Room {
            streams: Arc::new(Semaphore::new(streams)),
            connections: Arc::new(Semaphore::new(streams * CONNECTIONS_PER_STREAM)),
            allowances: Arc::new(Mutex::new(Allowances {
                connections: Allowance::new(CONNECTION_RATE, Instant::now()),
                requests: Allowance::new(REQUEST_RATE, Instant::now()),
            })),
            link: Arc::default(),
        }
    }

    /// Takes one connection, unless too many were made in a short time.
    fn may_connect(&self) -> bool {
        let mut allowances = self.allowances();
        let (connections, now) = (&mut allowances.connections, Instant::now());
        let may = connections.owed(CONNECTION_RATE, now).is_zero();
        if may {
            connections.take(CONNECTION_RATE, 1.0, now);
        }
        may
    }

    /// Takes one request, and returns how long it has to wait.
    fn request(&self) -> Duration {
        let now = Instant::now();
        self.allowances().requests.take(REQUEST_RATE, 1.0, now)
    }

    fn allowances(&self) -> MutexGuard<'_, Allowances> {
        self.allowances
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room() -> Room {
        Room::new(1)
    }

    #[test]
    fn a_member_that_asks_without_end_waits_and_one_that_asks_much_does_not() {
        let room = room();
        let waits = (0..5_000).map(|_| room.request());
        let at_once = waits.take_while(Duration::is_zero).count();
        assert!((4_096..4_500).contains(&at_once), "{at_once}");
        for _ in 0..1_024 {
            room.request();
        }
        let last = room.request();
        assert!(last > Duration::from_millis(500), "{last:?}");
    }

    #[test]
    fn a_member_that_connects_again_and_again_is_refused() {
        let room = room();
        let came = (0..1_000).take_while(|_| room.may_connect()).count();
        assert!((256..300).contains(&came), "{came}");
    }
}
