//! The members' port: the shared part of the store, over mutual TLS.
//!
//! A peer is served while it is a member. Admission happens on the control plane; here the peer id
//! that TLS proved is looked up in the set of linked members, before the first request and for as
//! long as the connection stands. Everyone else is closed after the handshake without a byte of
//! application data, and shares a small room with others ([`Crowd`]) until then. Where the mesh key is,
//! those who ask to join are handed to who admits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::peer::PeerId;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::server;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::crowd::Crowd;
use super::respond::{self, Body};
use super::tls::{Acceptor, Purpose, TlsError};
use super::{Route, connection, nar};
use crate::identity;
use crate::metrics::Metrics;
use crate::store::{LocalStore, StoreError};

/// How long an idle connection of a member is kept; longer than members keep theirs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections of all members together.
const CONNECTIONS_MAX: usize = 1024;

/// Connections of one member for each stream that it may have: some wait idle for the next request, and
/// on some is said that there are too many streams. One that opens more takes them from itself alone.
const CONNECTIONS_PER_STREAM: usize = 2;

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
    /// `None` where the mesh key is not.
    pub newcomers: Option<Newcomers>,
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
    crowd: Arc<Crowd>,
}

/// What one member may take.
#[derive(Clone)]
struct Room {
    streams: Arc<Semaphore>,
    connections: Arc<Semaphore>,
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
            crowd: Arc::default(),
        })
    }

    /// Accepts connections until shutdown.
    pub async fn accept(self: Arc<MembersPort>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
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
        let stranger = self.crowd.enter(address.ip());
        let accepted = tokio::select! {
            accepted = self.entrance.acceptor.accept(socket, is_admitted) => accepted,
            () = stranger.sent_away() => {
                self.metrics.transfers_refused.add(1);
                debug!(%address, "dropped a connection in its handshake, there are too many");
                return;
            }
        };
        drop(stranger);
        let (stream, peer, purpose) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                self.metrics.transfers_refused.add(1);
                match &error {
                    TlsError::NotAdmitted { .. } => warn!(%error, "refused a transfer"),
                    _ => debug!(%error, "refused a transfer"),
                }
                return;
            }
        };
        let Some(key) = identity::ed25519_of(&peer) else {
            return;
        };
        let peer = PeerId::from_public_key(key);
        if purpose == Purpose::Joining {
            if let Some(newcomers) = &self.entrance.newcomers {
                newcomers(stream, peer).await;
            }
            return;
        }
        let room = self.room(peer);
        let all = self.connections.clone().try_acquire_owned();
        let (Ok(_own), Ok(_one_of_all)) = (room.connections.try_acquire_owned(), all) else {
            self.metrics.transfers_refused.add(1);
            debug!(%peer, %address, "dropped a connection of a member, there are too many");
            return;
        };
        let requests = connection(stream, PATIENCE, self.shutdown.clone(), |request| {
            let port = self.clone();
            async move { port.answer(peer, request).await }
        });
        tokio::select! {
            () = requests => {}
            () = self.departure(peer) => debug!(%peer, %address, "closed the transfers of a peer that left"),
        }
    }

    async fn answer(
        self: Arc<MembersPort>,
        peer: PeerId,
        request: Request<Incoming>,
    ) -> Response<Body> {
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
                        let response = local.respond(method, headers, sent).await;
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
        let room = rooms.entry(peer).or_insert_with(|| Room {
            streams: Arc::new(Semaphore::new(streams)),
            connections: Arc::new(Semaphore::new(streams * CONNECTIONS_PER_STREAM)),
        });
        room.clone()
    }
}
