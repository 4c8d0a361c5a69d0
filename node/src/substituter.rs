//! The substituter: the endpoint that Nix asks, on loopback.
//!
//! The local store answers first, then the mesh. Whatever goes wrong behind it, Nix hears 200 or
//! 404 (NIX.md §0): the listener stands before the store is open and stays while everything else
//! ends; a NAR without a source is 404 before its first byte; a NAR that turns out wrong is cut
//! before its last 64 KiB ([`assembly`]). How connections come and go is the [`door`]'s affair.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::stream;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::mesh::LookupOutcome;
use granary_protocol::narinfo::{NarInfo, NarUrl, Proof, VerifiedNarInfo};
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use http::header::{CONNECTION, HOST};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::activity::Activity;
use crate::binary_cache::{PeerCaches, WebCaches};
use crate::clock::unix_time;
use crate::config::Config;
use crate::history::{History, Spans, Tally};
use crate::listener::Address;
use crate::mesh::MeshHandle;
use crate::metrics::{Metrics, Refused, SourceKind};
use crate::serve::listing::{self, FetchedListing, Listings};
use crate::serve::log::LogPlaces;
use crate::serve::nar::{self, Part};
use crate::serve::narinfo as narinfo_json;
use crate::serve::respond::{self, Body};
use crate::serve::{Route, browse, debug as debug_info, is_own_host, log, trace};
use crate::status::{self, page};
use crate::store::shared::SharingRules;
use crate::store::{LocalStore, PathInfo, Records, StoreError};
use crate::upload::Uploader;

mod assembly;
mod door;
mod downloads;

use assembly::{Sources, Tainted};
use door::Door;
use downloads::{Downloads, Reader};

/// How long a narinfo waits for the mesh. The mind answers within 0.9 s; this is for a mesh whose
/// disk hangs.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the store gets to say whether it has a path: a query takes 20 µs, and a disk that hangs
/// must not hold up Nix, which asks for one path after another.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the store gets to begin a NAR: a disk that slept needs some seconds to spin up, and
/// beyond that another source is faster.
const NAR_TIMEOUT: Duration = Duration::from_secs(10);

/// What stands behind the listener once everything is open.
pub struct Engine {
    pub store: Arc<dyn LocalStore>,
    /// `None` while there is no store; set once.
    pub records: OnceLock<Records>,
    pub rules: Arc<SharingRules>,
    pub about: status::About,
    /// Set beside an anchor.
    pub publishers: OnceLock<status::Publishers>,
    /// Set where the node pushes by itself.
    pub uploader: OnceLock<Arc<Uploader>>,
    /// Signs what only a member vouches for; `None` where members are not believed.
    loopback_key: Option<SecretKey>,
    joined: RwLock<Option<Arc<Joined>>>,
}

/// The way to other members, and to caches outside the mesh.
pub struct Joined {
    /// False for a mind that has no mesh, or no certificate yet, and asks caches alone.
    pub is_member: bool,
    pub mesh: MeshHandle,
    pub peers: Arc<PeerCaches>,
    pub caches: Arc<WebCaches>,
    /// What our own certificate says; `None` when it says nothing sensible. Changes when it is renewed.
    pub certificate: watch::Receiver<Option<status::CertificateAbout>>,
}

impl Engine {
    pub fn new(
        store: Arc<dyn LocalStore>,
        records: Option<Records>,
        rules: Arc<SharingRules>,
        about: status::About,
        loopback_key: Option<SecretKey>,
    ) -> Engine {
        Engine {
            store,
            records: records.map_or_else(OnceLock::new, OnceLock::from),
            rules,
            about,
            publishers: OnceLock::new(),
            uploader: OnceLock::new(),
            loopback_key,
            joined: RwLock::default(),
        }
    }

    /// Sends lookups and fetches that begin from here on this way. Those under way end on theirs.
    pub fn join(&self, joined: Joined) {
        let mut place = self.joined.write().unwrap_or_else(PoisonError::into_inner);
        *place = Some(Arc::new(joined));
    }

    /// `None` on a machine that can ask nobody, or not yet.
    pub fn joined(&self) -> Option<Arc<Joined>> {
        let place = self.joined.read().unwrap_or_else(PoisonError::into_inner);
        place.clone()
    }
}

/// The endpoint; answers from its first moment on, with 404 until the engine is there.
pub struct Substituter {
    engine: OnceLock<Engine>,
    store_dir: StoreDir,
    priority: i32,
    is_in_mesh: bool,
    pub metrics: Arc<Metrics>,
    activity: Arc<Activity>,
    history: Mutex<History>,
    downloads: Arc<Downloads>,
    tainted: Arc<Tainted>,
    listings: Listings,
    log_places: LogPlaces,
    door: Door,
    /// Fetches from the mesh, which end before the mesh does.
    fetches: TaskTracker,
}

impl Substituter {
    pub fn new(config: &Config, fetches: TaskTracker) -> Arc<Substituter> {
        Arc::new(Substituter {
            engine: OnceLock::new(),
            store_dir: config.store.dir.clone(),
            priority: config.substituter.priority,
            is_in_mesh: config.mesh.key.is_some(),
            metrics: Arc::new(Metrics::default()),
            activity: Arc::default(),
            history: Mutex::default(),
            downloads: Arc::default(),
            tainted: Arc::default(),
            listings: Listings::default(),
            log_places: LogPlaces::default(),
            door: Door::default(),
            fetches,
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

    /// Goes on with what was counted before the process began.
    pub fn remember(&self, history: History) {
        *self.history.lock().unwrap_or_else(PoisonError::into_inner) = history;
    }

    /// What was counted until this moment, and before.
    pub fn history(&self) -> History {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.count(Tally::of(&self.metrics), unix_time());
        history.clone()
    }

    pub fn engine(&self) -> Option<&Engine> {
        self.engine.get()
    }

    /// Answers a GET or HEAD.
    async fn answer(
        self: Arc<Substituter>,
        request: Request<Incoming>,
        address: &Address,
    ) -> Response<Body> {
        let route = Route::of(request.uri());
        let word = route.word();
        let mut response = match is_foreign(request.headers(), address) {
            true => {
                self.metrics.refused(Refused::Host);
                respond::foreign_host(route.is_nar())
            }
            false => self.route(route, request.method(), request.headers()).await,
        };
        if self.is_retiring() {
            let headers = response.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        self.metrics
            .requests
            .count(word, response.status().as_u16());
        response
    }

    async fn route(&self, route: Route, method: &Method, headers: &HeaderMap) -> Response<Body> {
        match &route {
            Route::CacheInfo => {
                let info = CacheInfo {
                    store_dir: self.store_dir.clone(),
                    want_mass_query: true,
                    priority: self.priority,
                };
                return respond::cache_info(info.to_string());
            }
            Route::Health => return self.health(),
            Route::Metrics => return self.exposition().await,
            Route::Page | Route::WhyPage(_) if self.engine.get().is_none() => {
                return respond::page(page::starting(), page::policy());
            }
            _ => {}
        }
        let Some(engine) = self.engine.get() else {
            return respond::not_found(route.is_nar());
        };
        let records = engine.records.get();
        match route {
            Route::CacheInfo | Route::Health | Route::Metrics => unreachable!("answered above"),
            Route::NarInfo(hash) => match self.narinfo(engine, hash).await {
                Some(narinfo) => respond::narinfo(narinfo.to_text(&self.store_dir)),
                None => respond::not_found(false),
            },
            Route::NarInfoJson(hash) => match self.narinfo(engine, hash).await {
                Some(narinfo) => respond::json(narinfo_json::to_json(&narinfo, &self.store_dir)),
                None => respond::not_found(false),
            },
            Route::Nar(url) => self.nar(engine, url, method, headers).await,
            Route::Listing(hash) => self.listing(engine, hash).await,
            Route::Log(derivation) if let Some(records) = records => {
                log::answer(&records.logs, &self.log_places, &derivation, method).await
            }
            Route::Realisation(id) if let Some(records) = records => {
                self.or_absent(trace::realisation(&records.database, id).await)
            }
            Route::TraceEntry(derivation, output) if let Some(records) = records => {
                self.or_absent(trace::entry(&records.database, derivation, output).await)
            }
            Route::DebugInfo(id) if let Some(records) = records => {
                let store = engine.store.as_ref();
                self.or_absent(debug_info::answer(store, &records.debug_info, &id).await)
            }
            // No Nix is here that could have recorded anything.
            Route::Log(_) | Route::Realisation(_) | Route::TraceEntry(..) | Route::DebugInfo(_) => {
                respond::not_found(false)
            }
            Route::Browse(hash, path) => {
                self.or_absent(browse::answer(&engine.store, hash, path, method, headers).await)
            }
            Route::Page => {
                let joined = engine.joined();
                let report = status::report(self.sources(engine, joined.as_deref())).await;
                respond::page(page::page(&report, unix_time()), page::policy())
            }
            Route::WhyPage(asked) => {
                let joined = engine.joined();
                let why = status::why(self.sources(engine, joined.as_deref()), &asked).await;
                respond::page(page::why(&asked, why.as_ref()), page::policy())
            }
            Route::Status => {
                let joined = engine.joined();
                let report = status::report(self.sources(engine, joined.as_deref())).await;
                respond::json(status::to_json(&report))
            }
            Route::Why(path) => {
                let joined = engine.joined();
                match status::why(self.sources(engine, joined.as_deref()), &path).await {
                    Some(why) => respond::json(status::to_json(&why)),
                    None => respond::not_found(false),
                }
            }
            Route::Unknown { is_nar } => respond::not_found(is_nar),
        }
    }

    /// Says how the node stands, from memory alone: a hung disk must not hide that we are alive.
    fn health(&self) -> Response<Body> {
        let engine = self.engine.get();
        let mesh = match engine.and_then(Engine::joined) {
            Some(joined) if joined.is_member => "joined",
            _ if self.is_in_mesh => "waiting",
            _ => "none",
        };
        let store = match engine.map(|engine| engine.records.get()) {
            Some(Some(_)) => "open",
            Some(None) => "none",
            None => "waiting",
        };
        let text = format!(
            "{{\"ready\":{},\"store\":\"{store}\",\"mesh\":\"{mesh}\"}}\n",
            engine.is_some()
        );
        match engine {
            Some(_) => respond::json(text),
            None => respond::not_ready(text),
        }
    }

    async fn exposition(&self) -> Response<Body> {
        let engine = self.engine.get();
        let joined = engine.and_then(Engine::joined);
        let mesh = joined.as_deref().filter(|joined| joined.is_member);
        let mesh = mesh.map(|joined| &joined.mesh);
        let uploader = engine.and_then(|engine| engine.uploader.get());
        let upload = uploader.map(|uploader| uploader.view());
        let gauges = status::gauges(engine.is_some(), mesh, upload.as_ref()).await;
        respond::metrics(self.metrics.exposition(gauges))
    }

    /// Finds a narinfo: in the store, else in the mesh.
    async fn narinfo(&self, engine: &Engine, hash: StorePathHash) -> Option<NarInfo> {
        let started = Instant::now();
        let (narinfo, source) = match self.local_info(engine, hash).await {
            Some(info) => {
                self.metrics.narinfos_local.add(1);
                (Some(info.to_narinfo()), "local")
            }
            None => match look_up(engine, hash).await {
                Some((narinfo, kind)) => {
                    kind.narinfos(&self.metrics).add(1);
                    debug!(%hash, source = kind.word(), "answered a narinfo");
                    let mut narinfo = VerifiedNarInfo::clone(&narinfo).served_uncompressed();
                    if let (Proof::Vouched(_), Some(key)) = (narinfo.proof(), &engine.loopback_key)
                    {
                        narinfo.sign(key, &self.store_dir);
                    }
                    (Some(narinfo.narinfo().clone()), kind.word())
                }
                None => {
                    self.metrics.narinfos_absent.add(1);
                    (None, "nowhere")
                }
            },
        };
        let took = started.elapsed();
        self.metrics.narinfo_time.observe(took);
        let path = narinfo
            .as_ref()
            .map(|narinfo| narinfo.store_path.to_string());
        self.activity.looked_up(hash, path, source, took);
        narinfo
    }

    /// Asks the store; `None` also when it cannot say, or not in time.
    async fn local_info(&self, engine: &Engine, hash: StorePathHash) -> Option<PathInfo> {
        match tokio::time::timeout(STORE_TIMEOUT, engine.store.path_info(hash)).await {
            Ok(Ok(info)) => info,
            Ok(Err(error)) => {
                self.store_trouble(&error);
                None
            }
            Err(_) => {
                self.metrics.store_errors.add(1);
                warn!(%hash, "the store did not say in time whether it has a path, asking the mesh");
                None
            }
        }
    }

    /// Gives the listing of a path's NAR: from the store, else from the NAR that a peer sends.
    async fn listing(&self, engine: &Engine, hash: StorePathHash) -> Response<Body> {
        let Some(place) = self.listings.place().await else {
            return respond::not_found(false);
        };
        let place = match listing::local(&engine.store, hash, place).await {
            Ok(Ok(response)) => return response,
            Ok(Err(place)) => place,
            Err(error) => {
                self.store_trouble(&error);
                return respond::not_found(false);
            }
        };
        let narinfo = look_up(engine, hash).await.map(|(narinfo, _)| narinfo);
        let narinfo =
            narinfo.filter(|narinfo| narinfo.narinfo().nar_size <= listing::FETCHED_BYTES_MAX);
        let (Some(narinfo), Some(joined)) = (narinfo, engine.joined()) else {
            return respond::not_found(false);
        };
        let size = narinfo.narinfo().nar_size;
        let mut reader = self.bring(&joined, narinfo, 0..size);
        let mut listing = FetchedListing::default();
        loop {
            match reader.next().await {
                Some(Ok(chunk)) if listing.push(&chunk) => {}
                // Not brought, not proved, or too large a tree.
                Some(_) => return respond::not_found(false),
                None => return listing.answer(hash, place).await,
            }
        }
    }

    fn or_absent(&self, answer: Result<Response<Body>, StoreError>) -> Response<Body> {
        answer.unwrap_or_else(|error| {
            self.metrics.store_errors.add(1);
            warn!(error = %error, "could not answer from the store");
            respond::not_found(false)
        })
    }

    async fn nar(
        &self,
        engine: &Engine,
        url: NarUrl,
        method: &Method,
        headers: &HeaderMap,
    ) -> Response<Body> {
        let local = self.local_nar(engine, &url, method, headers);
        match tokio::time::timeout(NAR_TIMEOUT, local).await {
            Ok(Some(response)) => {
                self.metrics.nars_local.add(1);
                return response;
            }
            Ok(None) => {}
            Err(_) => self.store_trouble(&"the store did not begin a nar in time"),
        }
        let narinfo = look_up(engine, url.store_path_hash)
            .await
            .map(|(narinfo, _)| narinfo)
            .filter(|narinfo| {
                url.nar_hash
                    .is_none_or(|nar_hash| nar_hash == narinfo.narinfo().nar_hash)
            });
        let (Some(narinfo), Some(joined)) = (narinfo, engine.joined()) else {
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

        if self.is_retiring() {
            // It would be cut when the mesh ends.
            self.metrics.nars_absent.add(1);
            return respond::not_found(true);
        }
        let mut reader = self.bring(&joined, narinfo, bytes);
        // Nothing is promised before there is something to send.
        match reader.next().await {
            Some(Ok(first)) => {
                let first = stream::iter([Ok(first)]);
                let rest = stream::unfold(reader, |mut reader| async {
                    let next = reader.next().await?;
                    Some((next, reader))
                });
                let body = respond::stream(futures::StreamExt::chain(first, rest));
                nar::answer(&part, size, body)
            }
            Some(Err(_)) | None => {
                self.metrics.nars_absent.add(1);
                respond::not_found(true)
            }
        }
    }

    /// Answers from the store; `None` also when it cannot say, or does not begin.
    async fn local_nar(
        &self,
        engine: &Engine,
        url: &NarUrl,
        method: &Method,
        headers: &HeaderMap,
    ) -> Option<Response<Body>> {
        let info = self.local_info(engine, url.store_path_hash).await?;
        match nar::open_known(&engine.store, url, info).await {
            Ok(local) => local?.respond(method, headers, |_| {}).await,
            Err(error) => {
                self.store_trouble(&error);
                None
            }
        }
    }

    /// Brings a NAR from the mesh; the bytes in `range` of it arrive at the reader.
    fn bring(&self, joined: &Joined, narinfo: Arc<VerifiedNarInfo>, range: Range<u64>) -> Reader {
        let sources = Sources {
            mesh: joined.mesh.clone(),
            peers: joined.peers.clone(),
            caches: joined.caches.clone(),
            metrics: self.metrics.clone(),
            activity: self.activity.clone(),
            tainted: self.tainted.clone(),
            tasks: self.fetches.clone(),
        };
        self.downloads.read(sources, narinfo, range)
    }

    fn sources<'a>(
        &'a self,
        engine: &'a Engine,
        joined: Option<&'a Joined>,
    ) -> status::Sources<'a> {
        status::Sources {
            about: &engine.about,
            store: engine.store.as_ref(),
            rules: &engine.rules,
            publishers: engine.publishers.get(),
            mesh: joined.map(|joined| &joined.mesh),
            certificate: joined.and_then(|joined| joined.certificate.borrow().clone()),
            caches: joined.map(|joined| &joined.caches),
            upload: engine.uploader.get().map(|uploader| uploader.view()),
            metrics: &self.metrics,
            activity: &self.activity,
            history: self.spans(),
            trusts_members: engine.loopback_key.is_some(),
        }
    }

    fn spans(&self) -> Spans {
        self.history().spans(unix_time())
    }

    fn store_trouble(&self, error: &dyn std::fmt::Display) {
        self.metrics.store_errors.add(1);
        warn!(%error, "could not answer from the store, asking the mesh");
    }
}

/// Whether a request's Host is not one of ours. On a Unix socket no web page can get here.
fn is_foreign(headers: &HeaderMap, address: &Address) -> bool {
    let (Some(host), Address::Tcp(address)) = (headers.get(HOST), address) else {
        return false;
    };
    !is_own_host(host.to_str().unwrap_or("?"), *address)
}

/// Finds out about a path in the mesh and beyond it, and who has it.
async fn look_up(
    engine: &Engine,
    hash: StorePathHash,
) -> Option<(Arc<VerifiedNarInfo>, SourceKind)> {
    let joined = engine.joined()?;
    let lookup = joined.mesh.lookup(hash);
    match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
        Ok(LookupOutcome::Found {
            narinfo,
            providers,
            caches,
        }) => {
            let kind = match caches.first() {
                Some(cache) if providers.is_empty() => {
                    SourceKind::of(joined.caches.roles().get(*cache))
                }
                _ => SourceKind::Peer,
            };
            Some((narinfo, kind))
        }
        Ok(LookupOutcome::NotFound) => None,
        Err(_) => {
            warn!(%hash, "the mesh did not answer a lookup in time");
            None
        }
    }
}
