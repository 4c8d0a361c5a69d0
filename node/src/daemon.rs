//! The daemon: wires everything up, in the order that keeps Nix content.
//!
//! The loopback listener comes first and goes last. A store that cannot be opened, or a certificate
//! that is not there yet, does not stop the endpoint from answering: both are waited for.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use granary_protocol::certificate::{SignedCertificate, mesh_tag};
use granary_protocol::mesh::Config as MindConfig;
use granary_protocol::peer::PeerId;
use granary_protocol::signature::PublicKey;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::binary_cache::PeerCaches;
use crate::clock::unix_time;
use crate::config::Config;
use crate::identity::Identity;
use crate::mesh;
use crate::serve::members::MembersPort;
use crate::serve::tls;
use crate::status::{About, CertificateAbout, MeshAbout};
use crate::store::shared::{SharedStore, SharingRules};
use crate::store::{LocalStore, NixStore};
use crate::substituter::{Engine, Joined, Substituter};

/// How often what is missing (a store, a certificate) is looked for again.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// How long running answers may take to end at shutdown. Nix resumes what is cut.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// TLS handshakes on the transfer port that take longer are given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest certificate file looked at.
const CERTIFICATE_FILE_BYTES_MAX: u64 = 16 * 1024;

/// A running node.
pub struct Daemon {
    pub substituter: SocketAddr,
    endpoint: Arc<Substituter>,
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
        address: SocketAddr,
        purpose: &'static str,
        key: &'static str,
        source: io::Error,
    },
    #[error("cannot make the state folder {path}: {source}", path = .path.display())]
    StateDir { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Identity(#[from] crate::identity::IdentityError),
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] tls::TlsSetupError),
}

impl Daemon {
    /// Starts a node. Returns once Nix is answered; store and mesh follow by themselves.
    ///
    /// # Errors
    /// What a person must mend: a port that is taken, a state folder or identity that is unusable.
    pub async fn start(config: Config) -> Result<Daemon, StartError> {
        let listener = listen(config.substituter.listen, "Nix", "substituter").await?;
        let address = listener.local_addr().map_err(|source| StartError::Listen {
            address: config.substituter.listen,
            purpose: "Nix",
            key: "substituter",
            source,
        })?;
        if !address.ip().is_loopback() {
            // Nix's own endpoint shows everything in the store, shared or not.
            warn!(%address, "substituter.listen is not a loopback address: whoever reaches it may read the whole store");
        }
        let shutdown = CancellationToken::new();
        // A start that fails leaves no listener behind.
        let guard = shutdown.clone().drop_guard();
        let tasks = TaskTracker::new();
        let endpoint = Substituter::new(&config, address, shutdown.clone(), tasks.clone());
        tasks.spawn(endpoint.clone().accept(listener));

        make_state_dir(&config.state_dir).map_err(|source| StartError::StateDir {
            path: config.state_dir.clone(),
            source,
        })?;
        let identity = Identity::load_or_create(&config.identity_file())?;
        let mut transfer = Vec::new();
        if config.mesh.key.is_some() {
            for address in &config.mesh.transfer {
                match listen(*address, "transfers", "mesh").await {
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
            Some(_) => probe(&config.mesh.listen).await?,
            None => config.mesh.listen.clone(),
        };
        let start = Start {
            config,
            identity,
            endpoint: endpoint.clone(),
            shutdown: shutdown.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(start.run(mesh_ports, transfer));
        info!(%address, "answering Nix");
        guard.disarm();
        Ok(Daemon {
            substituter: address,
            endpoint,
            shutdown,
            tasks,
        })
    }

    /// Finishes running answers and says goodbye to the mesh.
    ///
    /// In this order: who leaves the mesh is no member any more, and its transfers are closed.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait())
            .await
            .is_err()
        {
            info!(
                tasks = self.tasks.len(),
                "cut the answers that were still running"
            );
        }
        if let Some(joined) = self
            .endpoint
            .engine()
            .and_then(|engine| engine.joined.get())
        {
            // A mesh whose disk hangs must not hold up the end.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, joined.mesh.shutdown()).await;
        }
    }
}

/// What happens after the listener is up.
struct Start {
    config: Config,
    identity: Identity,
    endpoint: Arc<Substituter>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Start {
    async fn run(self, mesh_ports: Vec<SocketAddr>, transfer: Vec<TcpListener>) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.bring_up(mesh_ports, transfer) => {}
        }
    }

    async fn bring_up(&self, mesh_ports: Vec<SocketAddr>, transfer: Vec<TcpListener>) {
        let store = self.open_store().await;
        let rules = Arc::new(SharingRules {
            enabled: self.config.share.enable,
            deny: self.config.share.deny.clone(),
            trust: self.config.trusted_keys(),
        });
        self.endpoint.start(Engine {
            store: store.clone(),
            rules: rules.clone(),
            joined: OnceLock::new(),
            about: self.about(),
        });
        let Some(mesh_key) = self.config.mesh.key.clone() else {
            info!("mesh.key is not set, serving this machine only");
            return;
        };
        let certificate = self.certificate().await;
        let shared = Arc::new(SharedStore::new(store, rules));
        if let Err(error) = self
            .join(mesh_key, certificate, shared, mesh_ports, transfer)
            .await
        {
            error!(%error, "could not join the mesh, serving this machine only");
        }
    }

    async fn open_store(&self) -> Arc<dyn LocalStore> {
        let mut is_first = true;
        loop {
            match NixStore::open(self.config.store_config()).await {
                Ok(store) => return Arc::new(store),
                Err(error) => {
                    if std::mem::take(&mut is_first) {
                        error!(error = %chain(&error), "could not open the store, trying again until it opens");
                    }
                }
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    fn read_certificate(&self) -> Result<SignedCertificate, String> {
        let path = self.config.certificate_file();
        let read = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let length = fs::metadata(&path).map_err(|error| read(&error))?.len();
        if length > CERTIFICATE_FILE_BYTES_MAX {
            return Err(read(&"too large for a certificate"));
        }
        let text = fs::read_to_string(&path).map_err(|error| read(&error))?;
        SignedCertificate::from_text(&text).map_err(|error| read(&error))
    }

    /// Reads our certificate, as soon as there is one.
    async fn certificate(&self) -> SignedCertificate {
        let mut last_problem = String::new();
        loop {
            match self.read_certificate() {
                Ok(certificate) => return certificate,
                Err(problem) if problem != last_problem => {
                    let peer_id = self.identity.peer_id();
                    warn!(
                        %problem, %peer_id,
                        "not a member yet, waiting for a certificate: granary mesh admit <peer id>"
                    );
                    last_problem = problem;
                }
                Err(_) => {}
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn join(
        &self,
        mesh_key: PublicKey,
        certificate: SignedCertificate,
        shared: Arc<dyn LocalStore>,
        mesh_ports: Vec<SocketAddr>,
        transfer: Vec<TcpListener>,
    ) -> Result<(), StartError> {
        let me = PeerId::from_public_key(self.identity.public_key());
        if let Err(problem) = certificate.verify(&mesh_key, &me, unix_time()) {
            // Shown all the same: the clock may be ours that is wrong. Others will say.
            warn!(%problem, file = %self.config.certificate_file().display(), "our certificate will be refused");
        }
        let own = certificate.claims().ok().map(|own| CertificateAbout {
            name: own.name,
            permissions: own.permissions.to_string(),
            expires: own.not_after.0,
        });
        let transfer_port = transfer
            .first()
            .and_then(|listener| listener.local_addr().ok())
            .map(|address| address.port());
        let mdns = self.config.mesh.mdns.then(|| mesh::Mdns {
            mesh_tag: mesh_tag(&mesh_key),
            transfer_port: transfer_port.unwrap_or(0),
            port: self.config.mesh.mdns_port,
            interfaces: self.config.mesh.interfaces.clone(),
        });
        let options = mesh::Options {
            mind: MindConfig {
                key: self.identity.key(),
                mesh_key,
                certificate,
                trust: self.config.trusted_keys(),
                store_dir: self.config.store.dir.clone(),
                transfer_port,
                seeds: self.config.mesh.peers.len(),
                caches: Vec::new(),
            },
            listen: mesh_ports,
            seeds: self.config.mesh.peers.clone(),
            mdns,
            index_file: self.config.index_file(),
        };
        let acceptor = tls::acceptor(&self.identity, HANDSHAKE_TIMEOUT)?;
        let connector = tls::connector(&self.identity, HANDSHAKE_TIMEOUT)?;
        let mesh = mesh::start(&self.identity, shared.clone(), options).await?;
        info!(address = %mesh.listening(), ?transfer_port, "joined the mesh");
        let port = MembersPort::new(
            acceptor,
            shared,
            mesh.members(),
            self.config.limits.streams_per_peer,
            self.endpoint.metrics.clone(),
            self.shutdown.clone(),
            self.tasks.clone(),
        );
        for listener in transfer {
            self.tasks.spawn(port.clone().accept(listener));
        }
        let peers = Arc::new(PeerCaches::new(connector));
        self.tasks.spawn(drop_departed(
            mesh.clone(),
            peers.clone(),
            self.shutdown.clone(),
        ));
        if let Some(engine) = self.endpoint.engine() {
            // Set once: this function runs once per process.
            let _ = engine.joined.set(Joined {
                mesh,
                peers,
                certificate: own,
            });
        }
        Ok(())
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

async fn listen(
    address: SocketAddr,
    purpose: &'static str,
    key: &'static str,
) -> Result<TcpListener, StartError> {
    // IPv4 and IPv6 sockets are separate, as the configuration writes them.
    let bind = || {
        let socket = match address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
        }
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    bind().map_err(|source| StartError::Listen {
        address,
        purpose,
        key,
        source,
    })
}

/// Finds out whether the control plane's ports are free; the swarm binds them later, on its thread.
async fn probe(addresses: &[SocketAddr]) -> Result<Vec<SocketAddr>, StartError> {
    let mut free = Vec::new();
    let mut missing = None;
    for address in addresses {
        match listen(*address, "peers", "mesh").await {
            Ok(_) => free.push(*address),
            Err(StartError::Listen {
                source,
                purpose,
                key,
                address,
            }) if is_missing_ipv6(address, &source) => {
                missing = Some(StartError::Listen {
                    source,
                    purpose,
                    key,
                    address,
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

/// An error and those of its causes that it does not name itself.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
