//! The substituter: the endpoint that Nix asks, on loopback.
//!
//! The local store answers first, then the mesh. Whatever goes wrong behind it, Nix hears 200 or
//! 404 (NIX.md §0): the listener stands before the store is open and stays while everything else
//! ends; a NAR without a source is 404 before its first byte; a NAR that turns out wrong is cut
//! before its last 64 KiB ([`assembly`]).

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::stream;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::mesh::LookupOutcome;
use granary_protocol::narinfo::{NarUrl, VerifiedNarInfo};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use http::header::HOST;
use http::{HeaderMap, Method, Request, Response};
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::binary_cache::PeerCaches;
use crate::config::Config;
use crate::mesh::MeshHandle;
use crate::metrics::Metrics;
use crate::serve::nar::{self, Part};
use crate::serve::respond::{self, Body};
use crate::serve::{Route, connection, is_own_host};
use crate::status;
use crate::store::LocalStore;
use crate::store::shared::SharingRules;

mod assembly;

use assembly::{Assembly, Tainted};

/// How long an idle connection is kept. curl reuses connections for 118 s and is annoyed by one
/// that closes as it writes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Connections at once. Nix opens 25 per process.
const CONNECTIONS_MAX: usize = 4096;

/// Pause after accept failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Chunks of a fetched NAR waiting for Nix to read. With hyper's frames of at most 400 KiB, this
/// bounds the memory of one stream.
const CHUNKS_WAITING_MAX: usize = 4;

/// How long a narinfo waits for the mesh. The mind answers within 0.9 s; this is for a mesh whose
/// disk hangs.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// What stands behind the listener once everything is open.
pub struct Engine {
    pub store: Arc<dyn LocalStore>,
    pub rules: Arc<SharingRules>,
    /// Empty on a machine that belongs to no mesh, or not yet.
    pub joined: OnceLock<Joined>,
    pub about: status::About,
}

/// The way to other members.
pub struct Joined {
    pub mesh: MeshHandle,
    pub peers: Arc<PeerCaches>,
    /// What our own certificate says; `None` when it says nothing sensible.
    pub certificate: Option<status::CertificateAbout>,
}

/// The endpoint; answers from its first moment on, with 404 until the engine is there.
pub struct Substituter {
    engine: OnceLock<Engine>,
    store_dir: StoreDir,
    priority: i32,
    listen: SocketAddr,
    pub metrics: Arc<Metrics>,
    tainted: Arc<Tainted>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Substituter {
    pub fn new(
        config: &Config,
        listen: SocketAddr,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Arc<Substituter> {
        Arc::new(Substituter {
            engine: OnceLock::new(),
            store_dir: config.store.dir.clone(),
            priority: config.substituter.priority,
            listen,
            metrics: Arc::new(Metrics::default()),
            tainted: Arc::default(),
            shutdown,
            tasks,
        })
    }

    /// Puts the engine behind the listener.
    ///
    /// # Panics
    /// When there is one already.
    pub fn start(&self, engine: Engine) {
        assert!(
            self.engine.set(engine).is_ok(),
            "the engine is started once"
        );
    }

    pub fn engine(&self) -> Option<&Engine> {
        self.engine.get()
    }

    /// Accepts connections until shutdown.
    pub async fn accept(self: Arc<Substituter>, listener: TcpListener) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // Waiting clients stay in the backlog rather than being refused.
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((socket, _)) => {
                    // Without it every small answer waits 40 ms for the client's delayed ACK.
                    if let Err(error) = socket.set_nodelay(true) {
                        debug!(%error, "could not set TCP_NODELAY");
                    }
                    let substituter = self.clone();
                    self.tasks.spawn(async move {
                        let shutdown = substituter.shutdown.clone();
                        connection(socket, PATIENCE, shutdown, |request| {
                            let substituter = substituter.clone();
                            async move { substituter.answer(request).await }
                        })
                        .await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn answer(self: Arc<Substituter>, request: Request<Incoming>) -> Response<Body> {
        let route = Route::of(request.uri());
        let host = request
            .headers()
            .get(HOST)
            .map(|host| host.to_str().unwrap_or("?"));
        if host.is_some_and(|host| !is_own_host(host, self.listen)) {
            return respond::foreign_host(route.is_nar());
        }
        if route == Route::CacheInfo {
            let info = CacheInfo {
                store_dir: self.store_dir.clone(),
                want_mass_query: true,
                priority: self.priority,
            };
            return respond::cache_info(info.to_string());
        }
        let Some(engine) = self.engine.get() else {
            return respond::not_found(route.is_nar());
        };
        match route {
            Route::CacheInfo => unreachable!("answered above"),
            Route::NarInfo(hash) => self.narinfo(engine, hash).await,
            Route::Nar(url) => {
                self.nar(engine, url, request.method(), request.headers())
                    .await
            }
            Route::Health => respond::json("{\"ready\":true}\n".into()),
            Route::Status => respond::json(status::report(self.sources(engine)).await),
            Route::Why(path) => match status::why(self.sources(engine), &path).await {
                Some(report) => respond::json(report),
                None => respond::not_found(false),
            },
            Route::Unknown { is_nar } => respond::not_found(is_nar),
        }
    }

    async fn narinfo(&self, engine: &Engine, hash: StorePathHash) -> Response<Body> {
        match engine.store.path_info(hash).await {
            Ok(Some(info)) => {
                self.metrics.narinfos_local.add(1);
                return respond::narinfo(info.to_narinfo().to_text(&self.store_dir));
            }
            Ok(None) => {}
            Err(error) => self.store_trouble(&error),
        }
        match look_up(engine, hash).await {
            Some(narinfo) => {
                self.metrics.narinfos_peer.add(1);
                debug!(%hash, source = "peer", "answered a narinfo");
                let narinfo = VerifiedNarInfo::clone(&narinfo).served_uncompressed();
                respond::narinfo(narinfo.narinfo().to_text(&self.store_dir))
            }
            None => {
                self.metrics.narinfos_absent.add(1);
                respond::not_found(false)
            }
        }
    }

    async fn nar(
        &self,
        engine: &Engine,
        url: NarUrl,
        method: &Method,
        headers: &HeaderMap,
    ) -> Response<Body> {
        match nar::open(&engine.store, &url).await {
            Ok(Some(local)) => {
                self.metrics.nars_local.add(1);
                return local.respond(method, headers, |_| {});
            }
            Ok(None) => {}
            Err(error) => self.store_trouble(&error),
        }
        let narinfo = look_up(engine, url.store_path_hash)
            .await
            .filter(|narinfo| {
                url.nar_hash
                    .is_none_or(|nar_hash| nar_hash == narinfo.narinfo().nar_hash)
            });
        let (Some(narinfo), Some(Joined { mesh, peers, .. })) = (narinfo, engine.joined.get())
        else {
            self.metrics.nars_absent.add(1);
            return respond::not_found(true);
        };
        let size = narinfo.narinfo().nar_size;
        let part = Part::of(headers, size);
        let bytes = part.bytes(size);
        if *method == Method::HEAD || bytes.is_empty() {
            return nar::answer(&part, size, Body::default());
        }

        if bytes.start > 0 && self.tainted.contains(&url.store_path_hash) {
            self.metrics.nars_absent.add(1);
            return respond::not_found(true);
        }

        let (sender, mut chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
        let assembly = Assembly {
            mesh: mesh.clone(),
            narinfo,
            from: bytes.start,
            to: bytes.end,
            sender,
            peers: peers.clone(),
            metrics: self.metrics.clone(),
            tainted: self.tainted.clone(),
        };
        self.tasks.spawn(assembly.run());
        // Nothing is promised before there is something to send.
        match chunks.recv().await {
            Some(Ok(first)) => {
                let first = stream::iter([Ok(first)]);
                let rest = stream::poll_fn(move |context| chunks.poll_recv(context));
                let body = respond::stream(futures::StreamExt::chain(first, rest));
                nar::answer(&part, size, body)
            }
            Some(Err(_)) | None => {
                self.metrics.nars_absent.add(1);
                respond::not_found(true)
            }
        }
    }

    fn sources<'a>(&'a self, engine: &'a Engine) -> status::Sources<'a> {
        status::Sources {
            about: &engine.about,
            store: engine.store.as_ref(),
            rules: &engine.rules,
            mesh: engine.joined.get().map(|joined| &joined.mesh),
            certificate: engine
                .joined
                .get()
                .and_then(|joined| joined.certificate.as_ref()),
            metrics: &self.metrics,
        }
    }

    fn store_trouble(&self, error: &dyn std::error::Error) {
        self.metrics.store_errors.add(1);
        warn!(%error, "could not answer from the store, asking the mesh");
    }
}

/// Finds out about a path in the mesh.
async fn look_up(engine: &Engine, hash: StorePathHash) -> Option<Arc<VerifiedNarInfo>> {
    let lookup = engine.joined.get()?.mesh.lookup(hash);
    match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
        Ok(LookupOutcome::Found { narinfo, .. }) => Some(narinfo),
        Ok(LookupOutcome::NotFound) => None,
        Err(_) => {
            warn!(%hash, "the mesh did not answer a lookup in time");
            None
        }
    }
}
