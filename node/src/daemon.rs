//! The daemon: wires everything up, in the order that keeps Nix content.
//!
//! The endpoint's listeners come first and go last. A store that cannot be opened, or a certificate
//! that is not there yet, does not stop the endpoint from answering: both are waited for. Beside an anchor, which has
//! something to share without it, the store is not waited for.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime, mesh_tag};
use granary_protocol::mesh::{CacheRole, Config as MindConfig};
use granary_protocol::peer::PeerId;
use granary_protocol::signature::{KeyName, PublicKey, SecretKey};
use granary_protocol::voucher::Voucher;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::admission::{self, Admission};
use crate::anchor::Anchor;
use crate::anchor::published::Published;
use crate::authority::{Authorities, AuthorityError};
use crate::binary_cache::{PeerCaches, Strangers, WebCache, WebCaches, WebSetupError};
use crate::clock::unix_time;
use crate::config::Config;
use crate::credential::Credential;
use crate::crowd::Crowd;
use crate::identity::Identity;
use crate::listener::{Address, Listener, bind_tcp};
use crate::log::chain;
use crate::loopback_key::{self, LoopbackKeyError};
use crate::mesh;
use crate::place::Place;
use crate::serve::lan::{LanPort, Rules};
use crate::serve::members::{Entrance, MembersPort, Newcomers};
use crate::serve::tls;
use crate::state_folder;
use crate::status::{About, CertificateAbout, MeshAbout};
use crate::store::hidden::{Hidden, HiddenError};
use crate::store::shared::{Readers, SharedStore, SharingRules};
use crate::store::{Beside, LocalStore, Records};
use crate::substituter::{Engine, Joined, Substituter};
use crate::upload::exchange::ExchangeError;
use crate::upload::{TokenFileError, Uploader, uploader};

mod history;
mod holdings;
mod renewal;
pub mod share;
mod tokens;

pub use holdings::Holdings;
use renewal::Keeper;
use share::{Share, ShareError};

/// How often what is missing (a store, a certificate) is looked for again.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// How long running answers may take to end at shutdown. Nix resumes what is cut.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// TLS handshakes on the transfer port that take longer are given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A running node.
pub struct Daemon {
    /// Where Nix is answered.
    pub listening: Vec<Address>,
    endpoint: Arc<Substituter>,
    history: Arc<history::Keeper>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "cannot listen on {address} for {purpose}: {source}\nhint: is another granary running? see [{key}] in the configuration"
    )]
    Listen {
        address: Address,
        purpose: &'static str,
        key: &'static str,
        source: io::Error,
    },
    #[error("cannot make the state folder {path}: {source}", path = .path.display())]
    StateDir { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Identity(#[from] crate::identity::IdentityError),
    #[error(transparent)]
    LoopbackKey(#[from] LoopbackKeyError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error(transparent)]
    Hidden(#[from] HiddenError),
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] tls::TlsSetupError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("anchor {url}: {source}")]
    Token { url: String, source: TokenFileError },
    #[error("anchor {url}: the token {path} has characters that HTTP does not carry", path = .path.display())]
    NoToken { url: String, path: PathBuf },
    #[error(transparent)]
    Web(#[from] WebSetupError),
    #[error("the system gave no random bytes: {0}")]
    NoRandomness(getrandom::Error),
}

impl Daemon {
    /// Starts a node that listens where the configuration says.
    ///
    /// # Errors
    /// What a person must mend: a port that is taken, a state folder or identity that is unusable.
    pub async fn start(config: Config) -> Result<Daemon, StartError> {
        Daemon::start_on(Vec::new(), config).await
    }

    /// Starts a node on these listeners, without any where the configuration says. Returns once Nix is answered;
    /// store and mesh follow by themselves.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub async fn start_on(listeners: Vec<Listener>, config: Config) -> Result<Daemon, StartError> {
        Daemon::start_with(Holdings::Store, listeners, config).await
    }

    /// The same for what a node beside an anchor of this process shares.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub async fn start_with(
        holdings: Holdings,
        listeners: Vec<Listener>,
        config: Config,
    ) -> Result<Daemon, StartError> {
        let listeners = match listeners.is_empty() {
            true => bind(&config.substituter.listen)?,
            false => listeners,
        };
        let shutdown = CancellationToken::new();
        // A start that fails leaves nothing behind.
        let guard = shutdown.clone().drop_guard();
        let tasks = TaskTracker::new();
        let endpoint = Substituter::new(&config, tasks.clone());
        let closing = endpoint.close_on_drop();
        let mut listening = Vec::new();
        for listener in listeners {
            let address = listener.address().clone();
            if let Address::Tcp(tcp) = &address
                && !tcp.ip().is_loopback()
            {
                // Nix's own endpoint shows everything in the store, shared or not.
                warn!(%address, "the substituter listens on more than loopback: whoever reaches it may read the whole store");
            }
            listening.push(address);
            endpoint.open(listener);
        }

        make_state_dir(&config.state_dir).map_err(|source| StartError::StateDir {
            path: config.state_dir.clone(),
            source,
        })?;
        let identity = Identity::load_or_create(&config.identity_file())?;
        let history = history::Keeper::new(config.history_file(), endpoint.clone());
        let history = Arc::new(history);
        let believes_members = config.trust.members && config.mesh.key.is_some();
        let loopback_key = match believes_members {
            true => Some(loopback_key::load_or_create(&config.loopback_key_file())?),
            false => None,
        };
        let credentials = tokens::gather(&config, &identity, &shutdown, &tasks)?;
        let caches = Arc::new(web_caches(&config, &identity, &credentials)?);
        let share = Share::prepare(&config)?;
        let place = Place::follow(config.mesh.networks.clone(), shutdown.clone());
        let mut transfer = Vec::new();
        if config.mesh.key.is_some() {
            for address in &config.mesh.transfer {
                match listen(*address, "transfers", "mesh") {
                    Ok(listener) => transfer.push(listener),
                    // The IPv6 half of the default, on a machine without IPv6.
                    Err(StartError::Listen { source, .. })
                        if is_missing_ipv6(*address, &source) =>
                    {
                        warn!(%address, "left out an IPv6 address, this machine has none");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        // Taken now, so that a port in use is an error at start and not a warning later.
        let mesh_ports = match config.mesh.key {
            Some(_) => probe(&config.mesh.listen)?,
            None => config.mesh.listen.clone(),
        };
        let changes = state_folder::changes(&config.state_dir);
        let folder = changes.clone();
        let hidden = Hidden::load(&config.hidden_file())?;
        let (hide, hidden) = watch::channel(Arc::new(hidden));
        tasks.spawn(follow_hidden(
            config.hidden_file(),
            changes,
            hide,
            shutdown.clone(),
        ));
        let start = Start {
            config,
            holdings,
            identity,
            loopback_key,
            hidden,
            changes: folder,
            caches,
            credentials,
            share,
            place,
            endpoint: endpoint.clone(),
            shutdown: shutdown.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(start.run(mesh_ports, transfer));
        let (keeper, end) = (history.clone(), shutdown.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = end.cancelled() => {}
                () = keeper.run() => {}
            }
        });
        for address in &listening {
            info!(%address, "answering Nix");
        }
        guard.disarm();
        closing.disarm();
        Ok(Daemon {
            listening,
            endpoint,
            history,
            shutdown,
            tasks,
        })
    }

    /// The first TCP address on which Nix is answered.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.listening.iter().find_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        })
    }

    /// Whether the node does its work: the mesh's loop answers, if there is one.
    pub async fn is_alive(&self) -> bool {
        match self.mesh() {
            Some(mesh) => mesh.snapshot().await.is_some() || self.shutdown.is_cancelled(),
            None => true,
        }
    }

    /// Finishes what runs, says goodbye to the mesh, and closes the listeners last.
    ///
    /// In this order: who leaves the mesh is no member any more, and its transfers are closed; and Nix
    /// is answered as long as possible. Takes at most [`Daemon::STOP_TIMEOUT`].
    pub async fn stop(&self) {
        self.endpoint.retire();
        self.shutdown.cancel();
        self.tasks.close();
        let (drained, ()) = tokio::join!(
            tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait()),
            self.endpoint.drain(DRAIN_TIMEOUT),
        );
        if drained.is_err() {
            info!(
                tasks = self.tasks.len(),
                "cut the transfers that were still running"
            );
        }
        let goodbye = async {
            if let Some(mesh) = self.mesh() {
                mesh.shutdown().await;
            }
        };
        // A disk that hangs must not hold up the end.
        let _ = tokio::join!(
            tokio::time::timeout(DRAIN_TIMEOUT, goodbye),
            tokio::time::timeout(DRAIN_TIMEOUT, self.history.finish()),
        );
        self.endpoint.close(DRAIN_TIMEOUT).await;
    }

    /// The longest that [`Daemon::stop`] takes.
    pub const STOP_TIMEOUT: Duration = Duration::from_secs(3 * DRAIN_TIMEOUT.as_secs() + 1);

    fn mesh(&self) -> Option<mesh::MeshHandle> {
        Some(self.endpoint.engine()?.joined()?.mesh.clone())
    }
}

/// What happens after the listener is up.
struct Start {
    config: Config,
    holdings: Holdings,
    identity: Identity,
    loopback_key: Option<SecretKey>,
    hidden: watch::Receiver<Arc<Hidden>>,
    /// Of the state folder.
    changes: watch::Receiver<()>,
    caches: Arc<WebCaches>,
    /// Of the anchors, in their order.
    credentials: Vec<Credential>,
    share: Share,
    place: Place,
    endpoint: Arc<Substituter>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Start {
    async fn run(mut self, mesh_ports: Vec<SocketAddr>, transfer: Vec<TcpListener>) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.open(mesh_ports, transfer) => {}
        }
    }

    fn rules(&self) -> Arc<SharingRules> {
        Arc::new(SharingRules {
            enabled: self.config.share.enable,
            deny: self.config.share.deny.clone(),
            trust: self.config.trusted_keys(),
            hidden: self.hidden.clone(),
        })
    }

    fn start_engine(&self, store: Arc<dyn LocalStore>, records: Option<Records>) {
        self.endpoint.start(Engine::new(
            store,
            records,
            self.rules(),
            self.about(),
            self.loopback_key.clone(),
        ));
    }

    /// Has the endpoint say of a path which caches have it shared.
    fn name_publishers(&self, published: Arc<Published>) {
        let publishers = move |hash| {
            let published = published.clone();
            let caches = async move {
                let caches = published.publishing(hash).await;
                caches.unwrap_or_else(|error| {
                    warn!(%hash, error = chain(&error), "could not ask the catalog which caches have a path");
                    Vec::new()
                })
            };
            Box::pin(caches) as BoxFuture<'static, _>
        };
        if let Some(engine) = self.endpoint.engine() {
            // Set once: there is one anchor.
            let _ = engine.publishers.set(Box::new(publishers));
        }
    }

    async fn bring_up(
        &self,
        store: Arc<dyn LocalStore>,
        share: Share,
        mesh_ports: Vec<SocketAddr>,
        transfer: Vec<TcpListener>,
    ) {
        let rules = self.rules();
        self.open_share(share, store.clone(), rules.clone());
        let public = self.public(store.clone(), &rules);
        let voucher = Voucher::new(self.identity.key());
        let readers = Readers::Members(voucher);
        let own = Arc::new(SharedStore::new(store, rules.clone(), readers));
        let published = |anchor: &Arc<Anchor>| {
            let dir = self.config.store.dir.clone();
            let published = Arc::new(Published::new(anchor.clone(), dir, rules));
            self.name_publishers(published.clone());
            published
        };
        let shared: Arc<dyn LocalStore> = match &self.holdings {
            Holdings::Store => own,
            Holdings::StoreAndAnchor(anchor) => Arc::new(Beside::new(own, published(anchor))),
            Holdings::Anchor(anchor) => published(anchor),
        };
        let has_caches = !self.caches.roles().is_empty();
        let Some(mesh_key) = self.config.mesh.key.clone() else {
            match has_caches {
                true => info!("mesh.key is not set, asking anchors and upstreams only"),
                false => info!("mesh.key is not set, serving this machine only"),
            }
            if has_caches {
                self.ask_caches_alone(shared).await;
            }
            return;
        };
        let admission = self.admission(&mesh_key);
        let keeper = Keeper {
            config: self.config.clone(),
            identity: self.identity.clone(),
            admission: admission.clone(),
        };
        let certificate = match keeper.read() {
            Ok(certificate) => certificate,
            Err(_) => {
                if has_caches {
                    // What waits for an administrator must not keep Nix from its caches.
                    self.ask_caches_alone(shared.clone()).await;
                }
                keeper.wait().await
            }
        };
        let about = watch::channel(renewal::about_certificate(&certificate));
        let part = Part {
            mesh_key: mesh_key.clone(),
            certificate: certificate.clone(),
            about: about.1,
            mesh_ports,
            transfer,
            admission,
            public,
        };
        match self.join(part, shared).await {
            Ok(mesh) => {
                let keep = keeper.keep(mesh, about.0, self.changes.clone(), certificate);
                let shutdown = self.shutdown.clone();
                self.tasks.spawn(async move {
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = keep => {}
                    }
                });
            }
            Err(error) => {
                error!(mesh = %mesh_key, %error, "could not join the mesh, serving this machine only")
            }
        }
    }

    /// Admits others, if the mesh key is here.
    fn admission(&self, mesh_key: &PublicKey) -> Option<Arc<Admission>> {
        let file = self.config.mesh_key_file();
        if !file.exists() {
            return None;
        }
        match admission::read_mesh_key(&file) {
            Ok(key) if key.public_key() == *mesh_key => Some(Arc::new(Admission::new(
                key,
                self.config.state_dir.clone(),
                self.config.tickets_file(),
                self.config.pending_file(),
                self.config.revocations_file(),
            ))),
            Ok(_) => {
                warn!(file = %file.display(), "the mesh key in the state folder is another mesh's, admitting nobody");
                None
            }
            Err(error) => {
                error!(file = %file.display(), %error, "admitting nobody");
                None
            }
        }
    }

    /// Begins to push what this machine builds, if it is told where to.
    fn push_builds(&self, store: Arc<dyn LocalStore>) {
        let Some(mut options) = upload_options(&self.config) else {
            return;
        };
        let mut anchors = self.config.anchor.iter().zip(&self.credentials);
        let target = anchors.find(|(anchor, _)| anchor.url.as_str() == options.url);
        options.credential = target.map(|(_, credential)| credential.clone());
        let uploader = Arc::new(Uploader::new(options, self.hidden.clone()));
        if let Some(engine) = self.endpoint.engine() {
            // Set once: this function runs once per process.
            let _ = engine.uploader.set(uploader.clone());
        }
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                never = uploader.run(store) => match never {},
            }
        });
    }

    /// Lets machines without Granary read.
    fn open_share(&self, share: Share, store: Arc<dyn LocalStore>, rules: Arc<SharingRules>) {
        let key = share.key.map(|key| *key);
        let port = LanPort::new(
            Arc::new(SharedStore::new(store, rules, Readers::Lan(key))),
            share.rules,
            self.endpoint.metrics.clone(),
            self.endpoint.metrics.lan.clone(),
            self.shutdown.clone(),
            self.tasks.clone(),
        );
        for listener in share.listeners {
            let reach = self.place.reach.clone();
            self.tasks.spawn(port.clone().accept(listener, reach));
        }
    }

    /// What answers strangers, if something is shared in public.
    fn public(&self, store: Arc<dyn LocalStore>, rules: &SharingRules) -> Option<Arc<LanPort>> {
        if !self.config.share.public {
            return None;
        }
        let rules = SharingRules {
            trust: self.config.share.public_keys.iter().cloned().collect(),
            ..rules.clone()
        };
        Some(LanPort::new(
            Arc::new(SharedStore::new(store, Arc::new(rules), Readers::Strangers)),
            Rules::default(),
            self.endpoint.metrics.clone(),
            self.endpoint.metrics.strangers.clone(),
            self.shutdown.clone(),
            self.tasks.clone(),
        ))
    }

    async fn ask_caches_alone(&self, shared: Arc<dyn LocalStore>) {
        if let Err(error) = self.join_nobody(shared).await {
            let caches = self.caches.roles().len();
            error!(caches, %error, "could not set out to ask anchors and upstreams");
        }
    }

    /// A mesh of this node alone, of which nobody hears: the mind asks anchors and upstreams.
    async fn join_nobody(&self, shared: Arc<dyn LocalStore>) -> Result<(), StartError> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(StartError::NoRandomness)?;
        let name: KeyName = "nobody".parse().expect("a word is a key name");
        let key = SecretKey::from_seed(name, seed);
        let certificate = Certificate {
            peer: PeerId::from_public_key(self.identity.public_key()),
            name: "alone".into(),
            permissions: "share".parse().expect("a permission"),
            not_before: UnixTime(0),
            not_after: UnixTime(u64::MAX),
            serial: 1,
        };
        let certificate = certificate.sign(&key).expect("its fields are well-formed");
        let part = Part {
            mesh_key: key.public_key(),
            certificate,
            about: watch::channel(None).1,
            mesh_ports: Vec::new(),
            transfer: Vec::new(),
            admission: None,
            public: None,
        };
        self.join(part, shared).await.map(drop)
    }

    async fn join(
        &self,
        part: Part,
        shared: Arc<dyn LocalStore>,
    ) -> Result<mesh::MeshHandle, StartError> {
        let Part {
            mesh_key,
            certificate,
            about,
            mesh_ports,
            transfer,
            admission,
            public,
        } = part;
        let me = PeerId::from_public_key(self.identity.public_key());
        if let Err(problem) = certificate.verify(&mesh_key, &me, unix_time()) {
            // Shown all the same: the clock may be ours that is wrong. Others will say.
            warn!(%problem, file = %self.config.certificate_file().display(), "our certificate will be refused");
        }
        let transfer_port = transfer
            .first()
            .and_then(|listener| listener.local_addr().ok())
            .map(|address| address.port());
        let is_alone = mesh_ports.is_empty();
        let has_mdns = self.config.mesh.mdns && !is_alone;
        let mdns = has_mdns.then(|| mesh::Mdns {
            mesh_tag: mesh_tag(&mesh_key),
            transfer_port: transfer_port.unwrap_or(0),
            port: self.config.mesh.mdns_port,
            is_public: public.is_some(),
            interfaces: self.config.mesh.interfaces.clone(),
        });
        let seeds = match is_alone {
            true => Vec::new(),
            false => self.config.mesh.peers.clone(),
        };
        let revocations = (!is_alone).then(|| mesh::revocations::RevocationsFile {
            path: self.config.revocations_file(),
            mesh_key: mesh_key.clone(),
            changes: self.changes.clone(),
        });
        let crowd = Crowd::before_members(self.endpoint.metrics.clone());
        let options = mesh::Options {
            mind: MindConfig {
                key: self.identity.key(),
                mesh_key,
                certificate,
                trust: self.config.trusted_keys(),
                trusts_members: self.loopback_key.is_some(),
                store_dir: self.config.store.dir.clone(),
                transfer_port,
                seeds: seeds.len(),
                caches: self.caches.roles(),
            },
            listen: mesh_ports,
            seeds,
            caches: self.caches.clone(),
            place: self.place.clone(),
            mdns,
            revocations,
            crowd: crowd.clone(),
            // What one that hears of nobody would keep has nobody to read it.
            index_file: (!is_alone).then(|| self.config.index_file()),
        };
        let admitting = admission.as_deref().map(Admission::identity);
        let mut acceptor = tls::acceptor(&self.identity, admitting.as_ref(), HANDSHAKE_TIMEOUT)?;
        if public.is_some() {
            acceptor.open_to_strangers();
        }
        let connector = tls::connector(&self.identity, HANDSHAKE_TIMEOUT)?;
        tokio::task::spawn_blocking(tls::gather_randomness);
        let mesh = mesh::start(&self.identity, shared.clone(), options).await?;
        if !is_alone {
            info!(address = %mesh.listening(), ?transfer_port, "joined the mesh");
        }
        let port = MembersPort::new(
            Entrance {
                acceptor,
                crowd,
                newcomers: admission.map(|admission| newcomers(admission, self.endpoint.clone())),
                public,
            },
            shared,
            mesh.members(),
            self.config.limits.streams_per_peer,
            self.endpoint.metrics.clone(),
            self.shutdown.clone(),
            self.tasks.clone(),
        );
        for listener in transfer {
            let reach = self.place.reach.clone();
            self.tasks.spawn(port.clone().accept(listener, reach));
        }
        let peers = Arc::new(PeerCaches::new(connector));
        if !is_alone {
            // It holds the mesh, and one that is replaced shall end with its last fetch.
            let (mesh, shutdown) = (mesh.clone(), self.shutdown.clone());
            self.tasks
                .spawn(drop_departed(mesh, peers.clone(), shutdown));
        }
        if let Some(engine) = self.endpoint.engine() {
            engine.join(Joined {
                is_member: !is_alone,
                mesh: mesh.clone(),
                peers,
                caches: self.caches.clone(),
                certificate: about,
            });
        }
        for cache in 0..self.caches.roles().len() {
            // So that the first who looks at the status has something to see.
            let _ = self.caches.stock(cache);
        }
        Ok(mesh)
    }

    fn about(&self) -> About {
        About {
            peer_id: self.identity.peer_id().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh: self.config.mesh.key.as_ref().map(|key| MeshAbout {
                key: key.to_string(),
                // Known once the node has joined.
                certificate: None,
            }),
        }
    }
}

/// What this node's part in a mesh is.
struct Part {
    mesh_key: PublicKey,
    certificate: SignedCertificate,
    about: watch::Receiver<Option<CertificateAbout>>,
    mesh_ports: Vec<SocketAddr>,
    transfer: Vec<TcpListener>,
    admission: Option<Arc<Admission>>,
    /// Answers strangers.
    public: Option<Arc<LanPort>>,
}

/// Lets those in who want to join.
fn newcomers(admission: Arc<Admission>, endpoint: Arc<Substituter>) -> Newcomers {
    Arc::new(move |stream, peer| {
        let (admission, metrics) = (admission.clone(), endpoint.metrics.clone());
        Box::pin(async move {
            let outcome = admission.attend(stream, peer).await;
            metrics.joins.count(outcome);
        })
    })
}

/// What the configuration says about pushing; `None` when nothing is pushed by itself.
pub fn upload_options(config: &Config) -> Option<uploader::Options> {
    let upload = &config.upload;
    let anchor = config.anchor_of(upload.cache.as_deref()?)?;
    Some(uploader::Options {
        file: config.uploads_file(),
        url: anchor.url.to_string(),
        token_file: config.token_file_of(anchor)?,
        credential: None,
        ca_file: anchor.ca_file.clone(),
        rate: upload.rate.map(|rate| rate.0),
        filter: upload.filter.clone(),
        deny: config.share.deny.clone(),
        sources: upload.sources,
        trust: config.trusted_keys(),
    })
}

/// The caches of the configuration, anchors first.
fn web_caches(
    config: &Config,
    identity: &Identity,
    credentials: &[Credential],
) -> Result<WebCaches, StartError> {
    let mut caches = Vec::new();
    for (anchor, credential) in config.anchor.iter().zip(credentials) {
        caches.push(WebCache {
            role: CacheRole::Anchor,
            url: anchor.url.clone(),
            credential: credential.clone(),
            authorities: Authorities::read(anchor.ca_file.as_deref())?,
        });
    }
    for upstream in &config.upstream {
        caches.push(WebCache {
            role: CacheRole::Upstream,
            url: upstream.url.clone(),
            credential: Credential::none(),
            authorities: Authorities::read(upstream.ca_file.as_deref())?,
        });
    }
    let strangers = match config.mesh.strangers {
        true => Some(Strangers::new(tls::stranger(identity, HANDSHAKE_TIMEOUT)?)),
        false => None,
    };
    Ok(WebCaches::new(caches, strangers)?)
}

/// Reads what is hidden whenever that may have changed, until shutdown.
async fn follow_hidden(
    file: PathBuf,
    mut changes: watch::Receiver<()>,
    hide: watch::Sender<Arc<Hidden>>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
        let path = file.clone();
        let read = tokio::task::spawn_blocking(move || Hidden::load(&path)).await;
        match read {
            Ok(Ok(hidden)) => {
                hide.send_if_modified(|current| {
                    let is_news = **current != hidden;
                    if is_news {
                        *current = Arc::new(hidden);
                    }
                    is_news
                });
            }
            Ok(Err(error)) => {
                error!(file = %file.display(), error = %chain(&error), "could not read what is hidden, it stays as it was");
            }
            Err(_) => return,
        }
    }
}

/// Listens where Nix is to be answered.
fn bind(addresses: &[Address]) -> Result<Vec<Listener>, StartError> {
    let bind = |address: &Address| {
        Listener::bind(address).map_err(|source| StartError::Listen {
            address: address.clone(),
            purpose: "Nix",
            key: "substituter",
            source,
        })
    };
    addresses.iter().map(bind).collect()
}

/// Closes idle connections to peers as they stop being members.
async fn drop_departed(
    mesh: mesh::MeshHandle,
    peers: Arc<PeerCaches>,
    shutdown: CancellationToken,
) {
    let mut members = mesh.members();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = members.changed() => if changed.is_err() { return },
        }
        let now = members.borrow_and_update().clone();
        peers.retain(|peer| now.contains(peer));
    }
}

fn listen(
    address: SocketAddr,
    purpose: &'static str,
    key: &'static str,
) -> Result<TcpListener, StartError> {
    bind_tcp(address).map_err(|source| StartError::Listen {
        address: Address::Tcp(address),
        purpose,
        key,
        source,
    })
}

/// Finds out whether the control plane's ports are free; the swarm binds them later, on its thread.
fn probe(addresses: &[SocketAddr]) -> Result<Vec<SocketAddr>, StartError> {
    let mut free = Vec::new();
    let mut missing = None;
    for address in addresses {
        match listen(*address, "peers", "mesh") {
            Ok(_) => free.push(*address),
            Err(StartError::Listen { source, .. }) if is_missing_ipv6(*address, &source) => {
                missing = Some(StartError::Listen {
                    source,
                    purpose: "peers",
                    key: "mesh",
                    address: Address::Tcp(*address),
                });
            }
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some(error) if free.is_empty() => Err(error),
        _ => Ok(free),
    }
}

fn is_missing_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    let missing = [
        rustix::io::Errno::AFNOSUPPORT,
        rustix::io::Errno::ADDRNOTAVAIL,
    ];
    address.is_ipv6()
        && address.ip().is_unspecified()
        && missing
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Makes the folder of the identity and index, for its owner alone.
pub fn make_state_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}
