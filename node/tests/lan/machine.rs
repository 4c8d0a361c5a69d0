//! A machine: a namespace, a Nix store, a state folder, a configuration, and perhaps a running node.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::Duration;

use granary::identity::Identity;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::admission::{self, MeshKey};
use crate::http::{self, Response};
use crate::network::{Bridge, Namespace};
use crate::nix::{Nix, SigningKey};
use crate::process::{self, Finished, wait_for};
use crate::status::Status;

pub const SUBSTITUTER_PORT: u16 = 4726;
pub const MESH_PORT: u16 = 4727;
pub const TRANSFER_PORT: u16 = 4728;

/// A node answers long before this; it is here to end a hang.
const START_DEADLINE: Duration = Duration::from_secs(20);
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// mDNS repeats its questions after one and three seconds; a busy test machine needs some more.
const LINK_DEADLINE: Duration = Duration::from_secs(20);
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);
/// How much of a node's log is shown when a test fails.
const LOG_LINES_SHOWN: usize = 60;

/// A home: one bridge, one mesh, one key that builders sign with.
pub struct Lan {
    // Fields drop in this order; machines are dropped before by the test, which borrows from here.
    bridge: Bridge,
    pub mesh: MeshKey,
    pub builder_key: SigningKey,
    folder: Folder,
}

impl Lan {
    pub fn new() -> Lan {
        let folder = Folder::new("lan");
        Lan {
            bridge: Bridge::new(),
            mesh: MeshKey::create(folder.path(), "mesh"),
            builder_key: SigningKey::create(folder.path(), "builder-1"),
            folder,
        }
    }

    /// A machine that trusts the builders' key; its node is not admitted to any mesh yet.
    pub fn stranger(&self, name: &str) -> Machine {
        self.place(name, None, &self.builder_key.public)
    }

    /// An admitted machine, whose Nix and node trust this key alone.
    pub fn believer(&self, name: &str, key: &str) -> Machine {
        let mut machine = self.place(name, None, key);
        machine.admit(&self.mesh, &[]);
        machine
    }

    /// A machine admitted to this LAN's mesh.
    pub fn machine(&self, name: &str) -> Machine {
        let mut machine = self.place(name, None, &self.builder_key.public);
        machine.admit(&self.mesh, &[]);
        machine
    }

    /// An admitted machine whose Nix signs what it builds.
    pub fn builder(&self, name: &str) -> Machine {
        let trusted = &self.builder_key.public;
        let mut machine = self.place(name, Some(&self.builder_key), trusted);
        machine.admit(&self.mesh, &[]);
        machine
    }

    pub fn bridge(&self) -> &Bridge {
        &self.bridge
    }

    /// The key of another mesh, made on the same LAN.
    pub fn other_mesh(&self) -> MeshKey {
        MeshKey::create(self.folder.path(), "other-mesh")
    }

    /// A namespace on this LAN without Nix and without a node.
    pub fn plug(&self, name: &str) -> Namespace {
        self.bridge.plug(name)
    }

    fn place(&self, name: &str, signing: Option<&SigningKey>, trusted: &str) -> Machine {
        let folder = Folder::new(name);
        let namespace = self.bridge.plug(name);
        let nix = Nix::new(folder.path(), &[trusted], signing);
        nix.initialize(&namespace);
        let state = folder.path().join("state");
        let peer_id = admission::peer_id(&state);
        Machine {
            node: None,
            namespace,
            nix,
            peer_id,
            settings: Settings {
                mesh_key: Some(self.mesh.public.clone()),
                certificate: None,
                ticket_file: None,
                mdns: true,
                peers: Vec::new(),
                trusted_keys: vec![trusted.to_owned()],
                trusts_members: true,
                deny: Vec::new(),
                transfer: SocketAddr::from((Ipv4Addr::UNSPECIFIED, TRANSFER_PORT)),
                mesh_extra: String::new(),
                extra: String::new(),
            },
            name: name.to_owned(),
            role: "node",
            may_log_errors: false,
            folder,
        }
    }
}

/// What differs between the configurations of machines.
pub struct Settings {
    pub mesh_key: Option<String>,
    pub certificate: Option<PathBuf>,
    pub ticket_file: Option<PathBuf>,
    pub mdns: bool,
    pub peers: Vec<String>,
    pub trusted_keys: Vec<String>,
    pub trusts_members: bool,
    pub deny: Vec<String>,
    /// Where the data plane listens.
    pub transfer: SocketAddr,
    /// Further keys of `[mesh]`.
    pub mesh_extra: String,
    /// Further keys of `[share]`, and tables.
    pub extra: String,
}

/// One machine on the LAN. Dropping it ends the node, then fails the test over ERROR lines.
pub struct Machine {
    node: Option<Child>,
    pub namespace: Namespace,
    pub nix: Nix,
    pub name: String,
    pub peer_id: String,
    pub settings: Settings,
    /// The command that its node is started with: `node`, or `up` for one with an anchor beside it.
    pub role: &'static str,
    /// True when this test provokes something that an operator must act on.
    pub may_log_errors: bool,
    folder: Folder,
}

impl Machine {
    /// Puts a certificate of this mesh, for this machine, into its configuration.
    pub fn admit(&mut self, mesh: &MeshKey, more: &[&str]) {
        let peer_id = self.peer_id.clone();
        self.admit_as(mesh, &peer_id, more);
    }

    /// The same with a certificate that was issued to `peer_id`.
    pub fn admit_as(&mut self, mesh: &MeshKey, peer_id: &str, more: &[&str]) {
        let file = self.folder.path().join("certificate");
        mesh.admit(peer_id, &file, more);
        self.settings.mesh_key = Some(mesh.public.clone());
        self.settings.certificate = Some(file);
    }

    /// Starts the node and waits until its endpoint is healthy.
    ///
    /// The node dies with the thread that called this, so call it from the test's own.
    pub fn start(&mut self) {
        assert!(self.node.is_none(), "{} runs already", self.name);
        let config = self.write_config();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .expect("open log");
        let mut command = self.namespace.command(env!("CARGO_BIN_EXE_granary"));
        command
            .arg(self.role)
            .arg("--config")
            .arg(config)
            .env("NO_COLOR", "1");
        command
            .stdout(log.try_clone().expect("duplicate log"))
            .stderr(log);
        self.node = Some(command.spawn().expect("start the node"));
        let what = format!("{} answers /health", self.name);
        wait_for(&what, START_DEADLINE, || {
            if let Some(status) = self.exited() {
                panic!(
                    "the node of {} ended with {status}\n{}",
                    self.name,
                    self.log()
                );
            }
            match self.try_get("/health") {
                Ok(response) if response.status == 200 => Ok(()),
                Ok(response) => Err(format!("status {}", response.status)),
                Err(error) => Err(error.to_string()),
            }
        });
    }

    /// Ends the node by SIGTERM, and asserts that it goes in order and in time.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let what = format!("{} stops", self.name);
        let (_, status) = wait_for(&what, STOP_DEADLINE, || {
            self.exited().ok_or_else(|| "still running".to_owned())
        });
        assert!(
            status.success(),
            "the node of {} ended with {status}\n{}",
            self.name,
            self.log()
        );
        self.node = None;
    }

    /// Ends the node by SIGKILL, as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut node) = self.node.take() {
            let _ = node.kill();
            let _ = node.wait();
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the node");
    }

    /// The process of the running node.
    pub fn pid(&self) -> Pid {
        let node = self.node.as_ref();
        Pid::from_child(node.unwrap_or_else(|| panic!("{} has no node running", self.name)))
    }

    pub fn is_running(&mut self) -> bool {
        self.node.is_some() && self.exited().is_none()
    }

    /// GET at the endpoint that this machine's Nix asks.
    pub fn get(&self, path: &str) -> Response {
        self.try_get(path)
            .unwrap_or_else(|error| panic!("{} did not answer GET {path}: {error}", self.name))
    }

    /// The narinfo of a store path, as this machine's Nix would get it.
    pub fn narinfo(&self, store_path: &str) -> Response {
        self.get(&format!("/{}.narinfo", hash_of(store_path)))
    }

    fn try_get(&self, path: &str) -> std::io::Result<Response> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, SUBSTITUTER_PORT));
        self.namespace.inside(|| http::get(address, path))
    }

    /// Where others reach a port of this machine.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.namespace.address), port)
    }

    pub fn status(&self) -> Status {
        Status::parse(&self.granary(&["status", "--json"]).expect_success())
    }

    /// Waits until exactly these machines are linked.
    pub fn wait_linked(&self, others: &[&Machine]) {
        let mut expected: Vec<&str> = others.iter().map(|other| other.peer_id.as_str()).collect();
        expected.sort_unstable();
        let what = format!("{} is linked to {} peers", self.name, others.len());
        wait_for(&what, LINK_DEADLINE, || {
            let status = self.status();
            let mut linked = status.linked();
            linked.sort_unstable();
            if linked == expected {
                Ok(())
            } else {
                Err(status.to_string())
            }
        });
    }

    /// Waits until the endpoint offers the path; returns how long that took.
    pub fn wait_offered(&self, store_path: &str, deadline: Duration) -> Duration {
        self.wait_narinfo(store_path, 200, deadline)
    }

    /// Waits until the endpoint answers that nobody has the path; returns how long that took.
    pub fn wait_gone(&self, store_path: &str, deadline: Duration) -> Duration {
        self.wait_narinfo(store_path, 404, deadline)
    }

    fn wait_narinfo(&self, store_path: &str, expected: u16, deadline: Duration) -> Duration {
        let what = format!("{} answers {expected} for {store_path}", self.name);
        let (elapsed, ()) = wait_for(&what, deadline, || match self.narinfo(store_path).status {
            status if status == expected => Ok(()),
            status @ (200 | 404) => Err(format!("status {status}")),
            // Nix aborts the whole build over anything else (NIX.md, fact 1).
            status => panic!("{} answered {status} for a narinfo", self.name),
        });
        elapsed
    }

    /// Runs a command of the `granary` binary with this machine's configuration.
    pub fn granary(&self, arguments: &[&str]) -> Finished {
        let config = self.write_config();
        let mut command = self.namespace.command(env!("CARGO_BIN_EXE_granary"));
        command
            .args(arguments)
            .arg("--config")
            .arg(config)
            .env("NO_COLOR", "1");
        process::run(&mut command, COMMAND_DEADLINE)
    }

    /// Builds an expression with this machine's Nix; asks the node first when it runs.
    pub fn build(&mut self, expression: &str) -> String {
        let ask_node = self.is_running();
        self.nix.build(&self.namespace, expression, ask_node)
    }

    /// `nix-store --realise`: substitutes a closure through the node.
    pub fn realise(&self, store_path: &str) -> Finished {
        self.nix
            .run(&self.namespace, "nix-store", &["--realise", store_path])
    }

    /// `nix copy --from` the node into this machine's store.
    pub fn copy(&self, store_path: &str) -> Finished {
        self.nix.run(
            &self.namespace,
            "nix",
            &["copy", "--from", "http://127.0.0.1:4726", store_path],
        )
    }

    /// Deletes one path from this machine's store.
    pub fn delete(&self, store_path: &str) {
        self.nix
            .run(&self.namespace, "nix-store", &["--delete", store_path])
            .expect_success();
    }

    /// Runs the garbage collector over everything that no root holds.
    pub fn collect_garbage(&self) {
        self.nix
            .run(&self.namespace, "nix-store", &["--gc"])
            .expect_success();
    }

    pub fn is_valid(&self, store_path: &str) -> bool {
        self.nix.is_valid(&self.namespace, store_path)
    }

    pub fn closure(&self, store_path: &str) -> Vec<String> {
        self.nix.closure(&self.namespace, store_path)
    }

    pub fn assert_sound(&self) {
        self.nix.assert_sound(&self.namespace);
    }

    /// The output path that building the expression would give.
    pub fn output_of(&self, expression: &str) -> String {
        self.nix.output_of(&self.namespace, expression)
    }

    /// Everything that this machine's node has logged.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Where its node keeps its own files.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The key that names it in the mesh, as whoever broke into it would have it.
    pub fn keypair(&self) -> libp2p::identity::Keypair {
        let file = self.state().join("identity");
        let identity = Identity::load_or_create(&file).expect("an identity");
        identity.keypair()
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("node.log")
    }

    fn exited(&mut self) -> Option<ExitStatus> {
        self.node.as_mut()?.try_wait().expect("wait for the node")
    }

    fn write_config(&self) -> PathBuf {
        let Settings {
            mesh_key,
            certificate,
            ticket_file,
            mdns,
            peers,
            trusted_keys,
            trusts_members,
            deny,
            transfer,
            mesh_extra,
            extra,
        } = &self.settings;
        let mesh_key = mesh_key
            .as_ref()
            .map(|key| format!("key = {key:?}\n"))
            .unwrap_or_default();
        let certificate = certificate
            .as_ref()
            .map(|file| format!("certificate-file = {file:?}\n"))
            .unwrap_or_default();
        let ticket_file = ticket_file
            .as_ref()
            .map(|file| format!("ticket-file = {file:?}\n"))
            .unwrap_or_default();
        let text = format!(
            "state-dir = {:?}\n\
             [store]\ndir = \"/nix/store\"\nreal-dir = {:?}\ndatabase = {:?}\n\
             [substituter]\nlisten = \"127.0.0.1:{SUBSTITUTER_PORT}\"\npriority = 10\n\
             [mesh]\n{mesh_key}{certificate}{ticket_file}\
             listen = [\"0.0.0.0:{MESH_PORT}\"]\ntransfer = [\"{transfer}\"]\n\
             mdns = {mdns}\npeers = {peers:?}\ninterfaces = []\n{mesh_extra}\
             [trust]\nkeys = {trusted_keys:?}\nmembers = {trusts_members}\n\
             [share]\nenable = true\ndeny = {deny:?}\n{extra}",
            self.folder.path().join("state"),
            self.nix.store_folder(),
            self.nix.database(),
        );
        let file = self.folder.path().join("granary.toml");
        fs::write(&file, text).expect("write configuration");
        file
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let log = self.log();
        if thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
            eprintln!("-- the node of {} logged last:\n{shown}", self.name);
            return;
        }
        let may_log = self.may_log_errors;
        let errors: Vec<&str> = log
            .lines()
            .filter(|line| is_panic(line) || (is_error(line) && !may_log))
            .collect();
        assert!(
            errors.is_empty(),
            "the node of {} logged errors:\n{}",
            self.name,
            errors.join("\n")
        );
    }
}

/// True for a line that `tracing` wrote at ERROR: the level stands right behind the time.
fn is_error(line: &str) -> bool {
    line.split_whitespace().take(3).any(|word| word == "ERROR")
}

/// True for the message of a panic, which no test may declare.
fn is_panic(line: &str) -> bool {
    line.contains("panicked at")
}

/// The hash part of a store path.
pub fn hash_of(store_path: &str) -> &str {
    let name = store_path.rsplit('/').next().expect("a store path");
    name.split('-').next().expect("a hash")
}

/// A temporary folder, removed at the end unless `GRANARY_LAN_KEEP` is set.
struct Folder(Option<TempDir>);

impl Folder {
    fn new(name: &str) -> Folder {
        Folder(Some(
            tempfile::Builder::new()
                .prefix(&format!("granary-{name}-"))
                .tempdir()
                .expect("temporary folder"),
        ))
    }

    fn path(&self) -> &Path {
        self.0.as_ref().expect("present until dropped").path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Some(folder) = self.0.take()
            && std::env::var_os("GRANARY_LAN_KEEP").is_some()
        {
            eprintln!("kept {}", folder.keep().display());
        }
    }
}
