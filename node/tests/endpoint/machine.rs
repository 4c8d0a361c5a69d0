//! Machines: a chroot store that the real nix writes, and a real daemon over it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use granary::config::Config;
use granary::daemon::{Daemon, StartError};
use granary::identity::Identity;
use granary::status;
use granary_protocol::certificate::{Certificate, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::signature::{KeyName, SecretKey};
use tempfile::TempDir;

use crate::client::{Answer, Client};

/// How long anything may take in a test that is not about time: for machines under load.
pub const GENEROUS: Duration = Duration::from_secs(20);

/// Small enough to be held back whole, and large enough to outlast every buffer on the way.
pub const SMALL_BYTES: usize = 20_000;
pub const LARGE_BYTES: usize = 32 * 1024 * 1024;

/// What a proxy lets through before a test acts: fits into the buffers of a client that does not read.
pub const GATE_BYTES: u64 = 2 * 1024 * 1024;

pub const TRANSFER_PORT: u16 = 4728;
pub const MESH_PORT: u16 = 4727;

/// A loopback address that no other test, in this process or another, uses.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 64 | (process >> 8) as u8 & 63, process as u8, number)
}

pub fn key(name: &str) -> SecretKey {
    SecretKey::from_seed(KeyName::new(name).unwrap(), [name.len() as u8; 32])
}

/// A machine with Nix and a node.
pub struct Machine {
    pub root: TempDir,
    pub address: Ipv4Addr,
    pub peers: Vec<Ipv4Addr>,
    /// Where the data plane listens, if not at `address`.
    pub transfer: Option<Ipv4Addr>,
    pub extra: String,
    /// `substituter.listen`, as TOML.
    pub listen: String,
    /// Further lines of nix.conf.
    pub nix_conf: String,
    pub daemon: Option<Daemon>,
}

impl Machine {
    /// A machine with an empty store.
    pub fn new() -> Machine {
        let machine = Machine {
            root: TempDir::new().unwrap(),
            address: own_address(),
            peers: Vec::new(),
            transfer: None,
            extra: String::new(),
            listen: "\"127.0.0.1:0\"".into(),
            nix_conf: String::new(),
            daemon: None,
        };
        machine.nix("nix-store", &["--init"]);
        machine
    }

    pub fn folder(&self) -> &Path {
        self.root.path()
    }

    pub fn try_nix(&self, program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .env("HOME", self.folder())
            .env_remove("NIX_REMOTE")
            .env("NIX_CONF_DIR", self.folder())
            .env(
                "NIX_CONFIG",
                format!(
                    "experimental-features = nix-command\nbuild-users-group =\nsubstituters =\n\
                     trusted-public-keys = {}\nnarinfo-cache-negative-ttl = 0\n{}",
                    key("test-1").public_key(),
                    self.nix_conf
                ),
            )
            .output()
            .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"))
    }

    /// Runs a program of the real nix on this machine's store.
    pub fn nix(&self, program: &str, arguments: &[&str]) -> String {
        let store = self.folder().to_str().unwrap();
        let arguments = [arguments, &["--store", store]].concat();
        let output = self.try_nix(program, &arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Adds a signed file of `bytes` bytes; the same name gives the same contents everywhere.
    pub fn add(&self, name: &str, bytes: usize) -> Sample {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join(name);
        fs::write(&file, noise(bytes)).unwrap();
        self.add_file(&file)
    }

    /// Adds a file or folder and signs the path.
    pub fn add_file(&self, file: &Path) -> Sample {
        let path = self.nix("nix-store", &["--add", file.to_str().unwrap()]);
        let secret = self.folder().join("secret");
        fs::write(&secret, key("test-1").to_nix_string().as_bytes()).unwrap();
        self.nix(
            "nix",
            &[
                "store",
                "sign",
                "--key-file",
                secret.to_str().unwrap(),
                &path,
            ],
        );
        self.sample(&path)
    }

    /// Lets this machine build, and sign what it builds, with content-addressed derivations too.
    pub fn equip(&mut self) {
        let secret = self.folder().join("secret");
        fs::write(&secret, key("test-1").to_nix_string().as_bytes()).unwrap();
        let paths = ["/bin", "/usr", "/lib", "/lib64"];
        let paths: Vec<_> = paths
            .into_iter()
            .filter(|path| Path::new(path).exists())
            .collect();
        self.nix_conf = format!(
            "extra-experimental-features = ca-derivations\nsandbox-fallback = false\n\
             sandbox-paths = {}\nsecret-key-files = {}\n",
            paths.join(" "),
            secret.display()
        );
    }

    /// Builds an expression; returns its derivation and its output.
    pub fn build(&self, expression: &str) -> (String, String) {
        let file = self.folder().join("build.nix");
        fs::write(&file, expression).unwrap();
        let file = file.to_str().unwrap();
        let output = self.nix("nix-build", &["--no-out-link", file]);
        (self.nix("nix-instantiate", &[file]), output)
    }

    /// Copies closures into a binary cache that Nix itself writes, for comparison.
    pub fn cache_of(&self, paths: &[&str], parameters: &str) -> TempDir {
        let cache = TempDir::new().unwrap();
        let to = format!("file://{}?{parameters}", cache.path().display());
        self.nix(
            "nix",
            &[&["copy", "--no-check-sigs", "--to", &to], paths].concat(),
        );
        cache
    }

    /// What is known of a path in the store, however it got there.
    pub fn sample(&self, path: &str) -> Sample {
        let dumped = Command::new("nix-store")
            .arg("--dump")
            .arg(self.real(path))
            .output();
        Sample {
            hash: path["/nix/store/".len()..][..32].to_owned(),
            nar: dumped.unwrap().stdout,
            path: path.to_owned(),
        }
    }

    pub fn real(&self, path: &str) -> PathBuf {
        self.folder().join(path.trim_start_matches('/'))
    }

    /// Changes one byte in the middle of a file, behind Nix's back.
    pub fn corrupt(&self, path: &str) {
        let file = self.real(path);
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&file, bytes).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o444)).unwrap();
    }

    pub fn state(&self) -> PathBuf {
        self.folder().join("state")
    }

    pub fn config_text(&self) -> String {
        let root = self.folder().display();
        let peers: Vec<_> = self
            .peers
            .iter()
            .map(|ip| format!("{ip}:{MESH_PORT}"))
            .collect();
        format!(
            "state-dir = \"{root}/state\"\n\
             [store]\nreal-dir = \"{root}/nix/store\"\ndatabase = \"{root}/nix/var/nix/db/db.sqlite\"\n\
             [substituter]\nlisten = {listen}\n\
             [mesh]\nkey = \"{mesh}\"\nlisten = [\"{ip}:{MESH_PORT}\"]\n\
             transfer = [\"{transfer}:{TRANSFER_PORT}\"]\nmdns = false\npeers = {peers:?}\n\
             [trust]\nkeys = [\"{trusted}\"]\n{extra}",
            mesh = key("mesh").public_key(),
            ip = self.address,
            transfer = self.transfer.unwrap_or(self.address),
            trusted = key("test-1").public_key(),
            listen = self.listen,
            extra = self.extra,
        )
    }

    /// Makes the identity and a certificate for it.
    pub fn admit(&self) {
        fs::create_dir_all(self.state()).unwrap();
        let identity = Identity::load_or_create(&self.state().join("identity")).unwrap();
        let certificate = Certificate {
            peer: PeerId::from_public_key(identity.public_key()),
            name: format!("machine-{}", self.address),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(0),
            not_after: UnixTime(u64::MAX / 2),
            serial: 1,
        };
        let signed = certificate.sign(&key("mesh")).unwrap();
        fs::write(self.state().join("certificate"), signed.to_text()).unwrap();
    }

    pub async fn try_start(&self) -> Result<Daemon, StartError> {
        Daemon::start(Config::parse(&self.config_text()).unwrap()).await
    }

    pub async fn start(&mut self) {
        self.admit();
        self.daemon = Some(self.try_start().await.unwrap());
    }

    pub async fn stop(&mut self) {
        self.daemon.take().unwrap().stop().await;
    }

    pub fn endpoint(&self) -> SocketAddr {
        self.daemon.as_ref().unwrap().tcp().unwrap()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.endpoint())
    }

    pub fn connect(&self) -> Client {
        Client::new(TcpStream::connect(self.endpoint()).unwrap())
    }

    /// One request on a connection of its own.
    pub fn ask(&self, method: &str, target: &str, headers: &str) -> Answer {
        let mut client = self.connect();
        client.request(method, target, headers);
        client.answer(method == "HEAD")
    }

    pub fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, "")
    }

    /// Waits for it: a node that has not opened its store yet has nothing to say.
    pub fn status(&self) -> status::Report {
        let mut answer = self.get("/api/v1/status");
        until("a status", || {
            if answer.status != 200 {
                answer = self.get("/api/v1/status");
            }
            answer.status == 200
        });
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub fn wait_for(&self, path: &Sample) {
        until("a narinfo", || self.get(&path.narinfo()).status == 200);
    }

    pub fn wait_linked(&self, peers: usize) {
        until("links", || {
            let linked = |peer: &&status::Peer| peer.state == "linked" && peer.paths > 0;
            self.status().peers.iter().filter(linked).count() == peers
        });
    }
}

/// A store path and what its NAR is.
pub struct Sample {
    pub path: String,
    pub hash: String,
    pub nar: Vec<u8>,
}

impl Sample {
    pub fn narinfo(&self) -> String {
        format!("/{}.narinfo", self.hash)
    }

    /// The URL without a NarHash.
    pub fn short(&self) -> String {
        format!("/nar/{}.nar", self.hash)
    }
}

/// Bytes that do not repeat, the same for every call.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut state = bytes as u64 | 1;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Asks again until it is so; each question is a visit to the daemon.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + GENEROUS;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::yield_now();
    }
}
