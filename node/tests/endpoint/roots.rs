//! Paths are kept from Nix's garbage collector while they are sent, whoever asks and whichever way there is.
//!
//! `GRANARY_COLLECTOR_NIX="nix-versions run trixie"` puts that command before the daemon and the collector, to run the
//! same tests with another release of Nix.

use std::ffi::OsString;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use futures::StreamExt;
use granary::store::roots::HOLD_LIMIT;
use granary::store::{LocalStore, Nar, NixStore, StoreConfig};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::client::Client;
use crate::machine::{Machine, Sample, noise, until};

/// Files of a path, and bytes of each: together more than every buffer on the way takes in.
const FILES: usize = 100;
const FILE_BYTES: usize = 140_000;

/// How paths are held on a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Daemon,
    File,
}

/// The real Nix daemon on a machine's store. Dropping it ends the daemon and its children.
struct NixDaemon(Child);

impl NixDaemon {
    fn start(machine: &Machine) -> NixDaemon {
        let socket = config(machine).daemon_socket;
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let mut socket_path = OsString::from("NIX_DAEMON_SOCKET_PATH=");
        socket_path.push(&socket);
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(release())
            .args(["env", "-u", "NIX_REMOTE"])
            .arg(socket_path)
            .args(["nix-daemon", "--store"])
            .arg(machine.folder())
            .args(["--option", "build-users-group", ""])
            .env("HOME", machine.folder())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        until("the nix daemon", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        NixDaemon(child)
    }

    /// How many clients it serves.
    fn children(&self) -> usize {
        self.processes().len()
    }

    /// One for each client.
    fn processes(&self) -> Vec<Pid> {
        let id = self.0.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let pids = children.split_whitespace();
        pids.map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap())
            .collect()
    }
}

impl Drop for NixDaemon {
    fn drop(&mut self) {
        for child in self.processes() {
            // It may just have ended.
            let _ = kill_process(child, Signal::KILL);
        }
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Words before the programs of the release of Nix to be tested.
fn release() -> Vec<String> {
    let words = std::env::var("GRANARY_COLLECTOR_NIX").unwrap_or_default();
    words.split_whitespace().map(str::to_owned).collect()
}

fn config(machine: &Machine) -> StoreConfig {
    StoreConfig::chroot(StoreDir::default(), machine.folder())
}

/// Adds a signed folder of many files that only a root keeps from being collected.
fn add_folder(machine: &Machine, name: &str) -> (Sample, PathBuf) {
    let folder = TempDir::new().unwrap();
    let source = folder.path().join(name);
    fs::create_dir(&source).unwrap();
    for number in 0..FILES {
        let contents = noise(FILE_BYTES + number + name.len());
        fs::write(source.join(format!("{number:03}")), contents).unwrap();
    }
    let path = machine.add_file(&source);
    let root = machine.folder().join("nix/var/nix/gcroots").join(name);
    symlink(&path.path, &root).unwrap();
    (path, root)
}

/// The garbage collector, running again and again.
struct Collector {
    is_over: Arc<AtomicBool>,
    begun: Arc<AtomicU64>,
    ended: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    fn start(machine: &Machine) -> Collector {
        let mut collector = Collector {
            is_over: Arc::default(),
            begun: Arc::default(),
            ended: Arc::default(),
            thread: None,
        };
        let store = machine.folder().to_owned();
        let (is_over, begun, ended) = (
            collector.is_over.clone(),
            collector.begun.clone(),
            collector.ended.clone(),
        );
        collector.thread = Some(thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                begun.fetch_add(1, Ordering::SeqCst);
                collect(&store);
                ended.fetch_add(1, Ordering::SeqCst);
            }
        }));
        collector
    }

    /// Waits for the end of a collection that began after this was called.
    fn wait_for_another(&self) {
        let begun = self.begun.load(Ordering::SeqCst);
        until("another collection", || {
            self.ended.load(Ordering::SeqCst) > begun
        });
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn collect(store: &Path) {
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .args(release())
        .args(["nix-store", "--gc", "--store"])
        .arg(store)
        .env("HOME", store)
        .env_remove("NIX_REMOTE")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn ask_for_nar(machine: &Machine, path: &Sample) -> Client {
    let mut client = machine.connect();
    client.request("GET", &path.short(), "");
    // The head is there, so the path is held and its files are being read.
    assert!(client.stream.peek(&mut [0]).is_ok_and(|length| length == 1));
    client
}

/// Ten transfers to this machine's Nix and ten to a peer's, each with a collection in its middle that would take the
/// path if nothing held it.
async fn check_transfers_outlive_collections(way: Way) {
    const ROUNDS: usize = 10;
    let mut provider = Machine::new();
    let nix_daemon = (way == Way::Daemon).then(|| NixDaemon::start(&provider));
    let paths: Vec<_> = (0..ROUNDS)
        .map(|round| add_folder(&provider, &format!("folder-{round}")))
        .collect();
    let mut asker = Machine::new();
    asker.peers.push(provider.address);
    provider.start().await;
    asker.start().await;
    let collector = Collector::start(&provider);
    let mut exact = 0;
    for (path, root) in &paths {
        asker.wait_for(path);
        let mut local = ask_for_nar(&provider, path);
        let mut fetched = ask_for_nar(&asker, path);
        fs::remove_file(root).unwrap();
        collector.wait_for_another();
        assert!(
            provider.real(&path.path).exists(),
            "{path:?} was collected",
            path = path.path
        );
        for client in [&mut local, &mut fetched] {
            let answer = client.answer(false);
            assert_eq!((answer.status, answer.is_complete), (200, true));
            assert!(answer.body == path.nar);
            exact += 1;
        }
        // Held no more: so it was the hold that kept it.
        until("the collection of what was sent", || {
            !provider.real(&path.path).exists()
        });
    }
    assert_eq!(exact, 2 * ROUNDS);
    drop(collector);
    if let Some(nix_daemon) = nix_daemon {
        until("the end of idle connections", || nix_daemon.children() == 0);
    }
    asker.stop().await;
    provider.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_outlive_collections_through_the_nix_daemon() {
    check_transfers_outlive_collections(Way::Daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_outlive_collections_by_a_file_of_roots() {
    check_transfers_outlive_collections(Way::File).await;
}

async fn open_nar(store: &NixStore, path: &Sample) -> Option<Nar> {
    let hash: StorePathHash = path.hash.parse().unwrap();
    let info = store.path_info(hash).await.unwrap()?;
    store.nar(&info).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holds_share_a_connection_and_end_with_the_last_stream() {
    let machine = Machine::new();
    let nix_daemon = NixDaemon::start(&machine);
    let (path, root) = add_folder(&machine, "shared");
    fs::remove_file(root).unwrap();
    let store = NixStore::open(config(&machine)).await.unwrap();
    let mut nars = Vec::new();
    for _ in 0..20 {
        nars.push(open_nar(&store, &path).await.unwrap());
    }
    until("one connection for all", || nix_daemon.children() == 1);
    let stream = nars[0].stream(0..u64::MAX);
    drop(nars);
    collect(machine.folder());
    assert!(machine.real(&path.path).exists());
    let nar: Vec<u8> = stream.map(|chunk| chunk.unwrap().to_vec()).concat().await;
    assert!(nar == path.nar);
    until("the release", || nix_daemon.children() == 0);
    collect(machine.folder());
    assert!(!machine.real(&path.path).exists());
    assert!(open_nar(&store, &path).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nix_daemon_that_hangs_delays_the_first_nar_only_and_a_file_holds() {
    let machine = Machine::new();
    let (path, root) = add_folder(&machine, "hung");
    fs::remove_file(root).unwrap();
    let socket = config(&machine).daemon_socket;
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    // Accepts by the kernel's hand, and says nothing.
    let _listener = UnixListener::bind(&socket).unwrap();
    let store = NixStore::open(config(&machine)).await.unwrap();
    let mut took = Vec::new();
    for _ in 0..5 {
        let started = Instant::now();
        let nar = open_nar(&store, &path).await;
        took.push(started.elapsed());
        collect(machine.folder());
        assert!(nar.is_some() && machine.real(&path.path).exists());
    }
    assert!(
        took[0] < HOLD_LIMIT + Duration::from_millis(500),
        "{took:?}"
    );
    assert!(
        took[1..].iter().all(|took| *took < HOLD_LIMIT / 2),
        "{took:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nix_daemon_that_dies_and_comes_back_is_used_again() {
    let machine = Machine::new();
    let (path, root) = add_folder(&machine, "again");
    fs::remove_file(root).unwrap();
    let store = NixStore::open(config(&machine)).await.unwrap();
    for _ in 0..2 {
        let nix_daemon = NixDaemon::start(&machine);
        let nar = open_nar(&store, &path).await;
        assert!(nar.is_some());
        until("the connection", || nix_daemon.children() == 1);
        drop(nix_daemon);
        fs::remove_file(config(&machine).daemon_socket).unwrap();
        // Without it there is the file.
        let nar = open_nar(&store, &path).await;
        collect(machine.folder());
        assert!(nar.is_some() && machine.real(&path.path).exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_deleted_against_every_root_is_cut_and_then_404() {
    let mut machine = Machine::new();
    let (path, root) = add_folder(&machine, "deleted");
    fs::remove_file(root).unwrap();
    machine.start().await;
    machine.wait_for(&path);
    let mut client = ask_for_nar(&machine, &path);
    // Nothing of Nix's own deletes what is held, so the hold is broken by hand.
    let process = std::process::id().to_string();
    let roots = machine.folder().join("nix/var/nix/temproots").join(process);
    fs::remove_file(roots).unwrap();
    machine.nix("nix-store", &["--delete", &path.path]);
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.is_complete), (200, false));
    assert!(answer.body.len() < path.nar.len());
    assert!(path.nar.starts_with(&answer.body), "wrong bytes were sent");
    let headers = format!("Range: bytes={}-\r\n", answer.body.len());
    let rest = machine.ask("GET", &path.short(), &headers);
    assert_eq!((rest.status, rest.body.len()), (404, 0));
    rest.assert_below_nar();
    assert_eq!(machine.get(&path.narinfo()).status, 404);
    machine.stop().await;
}

/// A user who owns nothing of the store.
const NOBODY: u32 = 65534;

#[test]
fn a_node_without_privileges_reads_what_an_idle_nix_leaves_and_serves_it() {
    let machine = Machine::new();
    let path = machine.add("public", 100_000);
    let folder = machine.folder();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    let state = folder.join("state-of-nobody");
    fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(NOBODY), Some(NOBODY)).unwrap();
    let program = folder.join("granary");
    fs::copy(env!("CARGO_BIN_EXE_granary"), &program).unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = free.local_addr().unwrap();
    drop(free);
    let config_file = folder.join("granary.toml");
    let text = format!(
        "state-dir = {state:?}\n[store]\nreal-dir = {:?}\ndatabase = {:?}\n[substituter]\nlisten = \"{endpoint}\"\n",
        config(&machine).real_dir,
        config(&machine).database,
    );
    fs::write(&config_file, text).unwrap();
    let granary = |command: &str| {
        let nobody = NOBODY.to_string();
        let mut words = Command::new("setpriv");
        words
            .args(["--pdeathsig", "KILL", "--clear-groups"])
            .args(["--reuid", &nobody, "--regid", &nobody])
            .arg(&program)
            .args([command, "--config"])
            .arg(&config_file);
        words
    };

    // Without a daemon there is no way, and the sentence says what to do.
    let refused = granary("check-config").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("Nix daemon"),
        "{said}"
    );

    let nix_daemon = NixDaemon::start(&machine);
    let mut node = granary("node").stderr(Stdio::null()).spawn().unwrap();
    let ask = |target: &str| {
        let mut client = Client::new(TcpStream::connect(endpoint).ok()?);
        client.request("GET", target, "");
        Some(client.answer(false))
    };
    until("the narinfo", || {
        ask(&path.narinfo()).is_some_and(|answer| answer.status == 200)
    });
    let nar = ask(&path.short()).unwrap();
    assert!(nar.status == 200 && nar.body == path.nar);
    // The connection that keeps the database open stays, the one for the transfer goes.
    until("the release", || nix_daemon.children() == 1);
    let later = machine.add("later", 1000);
    assert_eq!(ask(&later.narinfo()).unwrap().status, 200);
    node.kill().unwrap();
    node.wait().unwrap();
}
