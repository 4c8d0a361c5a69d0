//! `granary demo`: the main job on one machine, with nothing set up.
//!
//! Makes a mesh and two nodes with stores of their own in a temporary folder, puts a closure into
//! the desktop's, and substitutes it into the laptop's through discovery, lookup and transfer. The
//! stores are real Nix's where Nix is installed; without it the demo lays them out itself. Both
//! nodes are the daemon that ships, and what is printed was measured.

use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use granary_protocol::certificate::{Certificate, UnixTime};
use granary_protocol::hash::NarHasher;
use granary_protocol::peer::PeerId;
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::StorePathHash;
use tokio::process::Command;

use crate::clock::unix_time;
use crate::config::Config;
use crate::daemon::Daemon;
use crate::identity::Identity;
use crate::loopback;
use crate::status::{Report, human_bytes};
use crate::store::{LocalStore, NixStore, StoreConfig};

mod closure;
mod folder;

use closure::Closure;
use folder::FolderStore;

/// Time for the two nodes to find each other and to learn what the other holds.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Between two looks at whether they have.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How much a certificate for the demo is good for.
const CERTIFICATE_SECONDS: u64 = 3600;

/// Prints a line. Whoever reads may have gone, as `head` does; the demo goes on and cleans up.
macro_rules! say {
    ($($text:tt)*) => {
        drop(writeln!(std::io::stdout(), $($text)*))
    };
}

/// Runs the demo and prints what happens.
///
/// # Errors
/// Whatever keeps the closure from arriving whole: then the demo has failed.
pub async fn run() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("granary-demo-").tempdir()?;
    let nix = nix_version().await;
    match &nix {
        Some(version) => say!(
            "stores   {version}, two chroot stores in {}",
            folder.path().display()
        ),
        None => say!(
            "stores   Nix is not installed; two stores laid out by the demo in {}",
            folder.path().display()
        ),
    }

    let closure = Closure::make()?;
    say!(
        "closure  {} paths, {}",
        closure.paths.len(),
        human_bytes(closure.nar_bytes())
    );
    let desktop = Machine::lay(folder.path(), "desktop", nix.is_some()).await?;
    let laptop = Machine::lay(folder.path(), "laptop", nix.is_some()).await?;
    desktop.fill(&closure, folder.path()).await?;

    let mesh = secret_key("demo-mesh")?;
    let mdns_port = free_udp_port()?;
    let desktop_node = desktop.start(&mesh, &closure, mdns_port).await?;
    let laptop_node = laptop.start(&mesh, &closure, mdns_port).await?;
    say!(
        "nodes    desktop on http://{}, laptop on http://{}",
        desktop_node.substituter,
        laptop_node.substituter
    );

    let started = Instant::now();
    let peer = wait_until_linked(laptop_node.substituter, closure.paths.len() as u64).await?;
    say!(
        "mesh     found each other by mDNS, linked, and exchanged {} paths in {:.1} s",
        peer.paths,
        started.elapsed().as_secs_f64()
    );

    let started = Instant::now();
    laptop.substitute(&closure, laptop_node.substituter).await?;
    let elapsed = started.elapsed();
    say!(
        "fetched  {} paths, {} in {:.2} s ({}/s) with {}",
        closure.paths.len(),
        human_bytes(closure.nar_bytes()),
        elapsed.as_secs_f64(),
        human_bytes((closure.nar_bytes() as f64 / elapsed.as_secs_f64()) as u64),
        if nix.is_some() {
            "nix copy, signatures required"
        } else {
            "the demo's own client"
        },
    );

    let verified = laptop.verify(&closure).await?;
    say!("verified {verified} NarHashes, read back from the laptop's disk");
    let report = report(laptop_node.substituter).await?;
    say!(
        "moved    {} from the desktop over mutual TLS",
        human_bytes(report.bytes.received)
    );
    ensure!(
        report.bytes.received >= closure.nar_bytes(),
        "some bytes did not come from the desktop"
    );

    laptop_node.stop().await;
    desktop_node.stop().await;
    say!("\nNext: README.md says how to do this with two machines.");
    Ok(())
}

/// One of the two machines.
struct Machine {
    name: &'static str,
    /// Holds `store` (the chroot of Nix), `state`, and Nix's own cache and configuration.
    folder: PathBuf,
    has_nix: bool,
}

impl Machine {
    async fn lay(parent: &Path, name: &'static str, has_nix: bool) -> Result<Machine> {
        let machine = Machine {
            name,
            folder: parent.join(name),
            has_nix,
        };
        std::fs::create_dir(&machine.folder)?;
        std::fs::create_dir(machine.root())?;
        if has_nix {
            let mut command = machine.nix("nix-store")?;
            command.args(["--init", "--store"]).arg(machine.root());
            succeed(command, "nix-store --init").await?;
        } else {
            FolderStore::create(&machine.store())?;
        }
        Ok(machine)
    }

    fn root(&self) -> PathBuf {
        self.folder.join("store")
    }

    fn store(&self) -> StoreConfig {
        StoreConfig {
            dir: closure::store_dir(),
            real_dir: self.root().join("nix/store"),
            database: self.root().join("nix/var/nix/db/db.sqlite"),
        }
    }

    /// Puts the closure into this machine's store.
    async fn fill(&self, closure: &Closure, scratch: &Path) -> Result<()> {
        if !self.has_nix {
            let store = FolderStore::open(&self.store())?;
            for path in &closure.paths {
                store.add(&path.narinfo, &path.nar)?;
            }
            return Ok(());
        }
        let cache = scratch.join("cache");
        closure.write_binary_cache(&cache)?;
        self.copy(closure, &format!("file://{}", cache.display()))
            .await?;
        std::fs::remove_dir_all(cache)?;
        Ok(())
    }

    async fn start(&self, mesh: &SecretKey, closure: &Closure, mdns_port: u16) -> Result<Daemon> {
        let mut config = Config {
            state_dir: self.folder.join("state"),
            ..Config::default()
        };
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let store = self.store();
        config.store.real_dir = Some(store.real_dir);
        config.store.database = store.database;
        config.substituter.listen = loopback;
        config.mesh.key = Some(mesh.public_key());
        config.mesh.listen = vec![loopback];
        config.mesh.transfer = vec![loopback];
        config.mesh.mdns_port = mdns_port;
        config.mesh.interfaces = vec!["lo".into()];
        config.trust.keys = vec![closure.key.public_key()];

        std::fs::create_dir(&config.state_dir)?;
        let identity = Identity::load_or_create(&config.identity_file())?;
        let now = unix_time();
        let certificate = Certificate {
            peer: PeerId::from_public_key(identity.public_key()),
            name: self.name.into(),
            permissions: "share".parse()?,
            not_before: now,
            not_after: UnixTime(now.0 + CERTIFICATE_SECONDS),
            serial: 1,
        };
        std::fs::write(config.certificate_file(), certificate.sign(mesh)?.to_text())?;
        Ok(Daemon::start(config).await?)
    }

    /// Brings the closure into this machine's store through its own node.
    async fn substitute(&self, closure: &Closure, node: SocketAddr) -> Result<()> {
        if self.has_nix {
            return self.copy(closure, &format!("http://{node}")).await;
        }
        let store = FolderStore::open(&self.store())?;
        // References first, as Nix does it.
        for path in &closure.paths {
            let hash = path.narinfo.store_path.hash();
            let text = loopback::get(node, &format!("/{hash}.narinfo")).await?;
            let text = text.with_context(|| format!("the laptop's node does not know {hash}"))?;
            let narinfo = closure.check(&String::from_utf8(text)?)?;
            let nar = loopback::get(node, &format!("/{}", narinfo.url)).await?;
            store.add(
                &narinfo,
                &nar.context("the laptop's node did not deliver a nar")?,
            )?;
        }
        Ok(())
    }

    async fn copy(&self, closure: &Closure, from: &str) -> Result<()> {
        let mut command = self.nix("nix")?;
        command
            .args([
                "--extra-experimental-features",
                "nix-command",
                "copy",
                "--from",
                from,
                "--to",
            ])
            .arg(self.root())
            .args([
                "--option",
                "trusted-public-keys",
                &closure.key.public_key().to_string(),
            ])
            .args(closure.roots());
        succeed(command, "nix copy").await
    }

    /// One of Nix's commands, with no configuration or cache but this machine's.
    fn nix(&self, program: &str) -> Result<Command> {
        let configuration = self.folder.join("nix-conf");
        std::fs::create_dir_all(&configuration)?;
        let text = "substituters =\nrequire-sigs = true\nbuild-users-group =\n";
        std::fs::write(configuration.join("nix.conf"), text)?;
        let mut command = Command::new(program);
        command
            .env("NIX_CONF_DIR", &configuration)
            .env("HOME", &self.folder)
            .env("XDG_CACHE_HOME", self.folder.join("cache"))
            .kill_on_drop(true);
        for variable in [
            "NIX_REMOTE",
            "NIX_CONFIG",
            "NIX_PATH",
            "NIX_USER_CONF_FILES",
        ] {
            command.env_remove(variable);
        }
        Ok(command)
    }

    /// Reads every path of the closure back from this machine's disk; returns how many are right.
    async fn verify(&self, closure: &Closure) -> Result<usize> {
        let store: Arc<dyn LocalStore> = Arc::new(NixStore::open(self.store()).await?);
        for path in &closure.paths {
            let hash: StorePathHash = path.narinfo.store_path.hash();
            let info = store.path_info(hash).await?;
            let info = info.with_context(|| {
                format!(
                    "{} is not valid on the {}",
                    path.narinfo.store_path, self.name
                )
            })?;
            let nar = store.nar(&info).await?;
            let nar = nar.with_context(|| format!("{} is gone", info.store_path))?;
            let mut hasher = NarHasher::new();
            let mut chunks = nar.stream(0..nar.size());
            while let Some(chunk) = chunks.next().await {
                hasher.update(&chunk?);
            }
            let found = hasher.finish();
            ensure!(
                found == path.narinfo.nar_hash,
                "{} has {found} on the {}, it was made as {}",
                info.store_path,
                self.name,
                path.narinfo.nar_hash
            );
        }
        Ok(closure.paths.len())
    }
}

async fn succeed(mut command: Command, what: &str) -> Result<()> {
    let output = command
        .output()
        .await
        .with_context(|| format!("cannot run {what}"))?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "{what} failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    )
}

async fn nix_version() -> Option<String> {
    let output = Command::new("nix").arg("--version").output().await.ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

async fn report(node: SocketAddr) -> Result<Report> {
    let text = loopback::get(node, "/api/v1/status")
        .await?
        .context("the node is not ready")?;
    Ok(serde_json::from_slice(&text)?)
}

async fn wait_until_linked(node: SocketAddr, paths: u64) -> Result<crate::status::Peer> {
    let wait = async {
        loop {
            // Not ready yet is what is being waited for.
            if let Ok(report) = report(node).await {
                let peer = report.peers.into_iter().find(|peer| peer.state == "linked");
                if let Some(peer) = peer.filter(|peer| peer.paths >= paths) {
                    return peer;
                }
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::time::timeout(DISCOVERY_TIMEOUT, wait)
        .await
        .context("the two nodes did not find each other on the loopback interface")
}

fn secret_key(name: &str) -> Result<SecretKey> {
    let mut seed = [0u8; 32];
    getrandom::fill(&mut seed)?;
    Ok(SecretKey::from_seed(name.parse()?, seed))
}

/// A UDP port of its own, so that the demo neither hears nor disturbs real nodes.
fn free_udp_port() -> Result<u16> {
    Ok(UdpSocket::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
