//! Bounds: what many and slow clients may take, measured on a process from outside.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use granary::config::Config;
use granary::listener::{Address, Listener};
use granary::status::{About, Report};
use granary::store::debug::DebugInfo;
use granary::store::log::BuildLogs;
use granary::store::shared::SharingRules;
use granary::store::{
    Database, LocalStore, MemoryStore, Nar, PathInfo, Records, StoreConfig, StoreError, StoreEvent,
};
use granary::substituter::{Engine, Substituter};
use granary_protocol::nar::Tree;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use tokio_util::task::TaskTracker;

use crate::client::Client;
use crate::machine::{Machine, SMALL_BYTES, Sample, until};
use crate::process::Node;

/// Memory of a node at its busiest.
const MEMORY_KILOBYTES_MAX: u64 = 256 * 1024;

const IDLE_CLIENTS: usize = 1_000;
const PARALLEL_REQUESTS: usize = 200;

const SLOW_READERS: usize = 500;
/// What each of them reads: 10 kB a second.
const SLOW_BYTES: usize = 1_000;
const SLOW_PAUSE: Duration = Duration::from_millis(100);
const SLOW_ROUNDS: usize = 50;
const SLOW_FILE_BYTES: u64 = 1 << 30;

/// The longest that anyone else may wait meanwhile; two cores are shared with the readers themselves.
const OTHERS_MAX: Duration = Duration::from_secs(2);

/// Files that a node may hold longer than the requests that needed them: its database's.
const DESCRIPTORS_SLACK: usize = 8;

fn connect(address: SocketAddr) -> Client {
    Client::new(TcpStream::connect(address).unwrap())
}

fn status(client: &mut Client, target: &str) -> u16 {
    client.request("GET", target, "");
    client.answer(false).status
}

/// A process over a store with one small path, and where it answers.
fn node(machine: &Machine, path: &Sample) -> (Node, SocketAddr) {
    machine.admit();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let node = Node::start(machine, Some(&listener), &[]);
    until("the store", || {
        status(&mut connect(address), &path.narinfo()) == 200
    });
    // With everything open that stays open: the mesh begins after the store.
    until("the mesh to offer the path", || {
        let mut client = connect(address);
        client.request("GET", "/api/v1/status", "");
        let answer = client.answer(false);
        let report: Report = serde_json::from_slice(&answer.body).unwrap();
        report.paths_held > 0
    });
    (node, address)
}

fn wait_for_baseline(node: &Node, baseline: usize) {
    until("files to be closed", || {
        node.descriptors() <= baseline + DESCRIPTORS_SLACK
    });
}

#[test]
fn a_thousand_idle_clients_and_two_hundred_requests_at_once_are_served() {
    let machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    let (node, address) = node(&machine, &path);
    let baseline = node.descriptors();

    let mut idle: Vec<_> = (0..IDLE_CLIENTS).map(|_| connect(address)).collect();
    for client in &mut idle {
        assert_eq!(status(client, "/nix-cache-info"), 200);
    }
    assert!(node.descriptors() >= IDLE_CLIENTS);
    thread::scope(|scope| {
        let requests: Vec<_> = (0..PARALLEL_REQUESTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = connect(address);
                    assert_eq!(status(&mut client, &path.narinfo()), 200);
                    client.request("GET", &path.short(), "");
                    assert!(client.answer(false).body == path.nar);
                })
            })
            .collect();
        for request in requests {
            request.join().unwrap();
        }
    });
    // The idle ones are still welcome.
    for client in &mut idle {
        assert_eq!(status(client, &path.narinfo()), 200);
    }
    let memory = node.kilobytes("VmHWM");
    assert!(memory < MEMORY_KILOBYTES_MAX, "{memory} kB");
    drop(idle);
    wait_for_baseline(&node, baseline);
    node.stop();
}

/// Registers a sparse file as a path, behind Nix's back: what is read are zeros.
fn add_large(machine: &Machine) -> String {
    let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
    let base_name = format!("{hash}-large");
    let file = File::create(machine.folder().join("nix/store").join(&base_name)).unwrap();
    file.set_len(SLOW_FILE_BYTES).unwrap();
    // What stands around the contents of one file: 112 bytes.
    let nar_size = SLOW_FILE_BYTES + 112;
    let db = machine.folder().join("nix/var/nix/db/db.sqlite");
    let db = rusqlite::Connection::open(db).unwrap();
    db.execute(
        "INSERT INTO ValidPaths (path, hash, registrationTime, narSize) VALUES (?, ?, 1, ?)",
        rusqlite::params![
            format!("/nix/store/{base_name}"),
            format!("sha256:{}", "0".repeat(64)),
            nar_size as i64
        ],
    )
    .unwrap();
    format!("/nar/{hash}.nar")
}

#[test]
fn five_hundred_slow_readers_take_little_memory_and_harm_nobody() {
    let machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    let large = add_large(&machine);
    let (node, address) = node(&machine, &path);
    let baseline = node.descriptors();

    let mut readers: Vec<_> = (0..SLOW_READERS)
        .map(|_| {
            let mut client = connect(address);
            client.request("GET", &large, "");
            client
        })
        .collect();
    for reader in &mut readers {
        let head = reader.head();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        reader.stream.set_nonblocking(true).unwrap();
    }
    let mut longest = Duration::ZERO;
    let mut buffer = vec![0; SLOW_BYTES];
    for _ in 0..SLOW_ROUNDS {
        let round = Instant::now();
        for reader in &mut readers {
            match reader.stream.read(&mut buffer) {
                Ok(0) => panic!("a slow reader was cut off"),
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        let asked = Instant::now();
        let mut other = connect(address);
        for target in ["/health", &path.narinfo(), &path.short()] {
            assert_eq!(status(&mut other, target), 200);
        }
        longest = longest.max(asked.elapsed());
        // The pace is what this is about.
        thread::sleep(SLOW_PAUSE.saturating_sub(round.elapsed()));
    }
    assert!(longest < OTHERS_MAX, "others waited for {longest:?}");
    let memory = node.kilobytes("VmHWM");
    assert!(memory < MEMORY_KILOBYTES_MAX, "{memory} kB");
    println!("memory {memory} kB, others at most {longest:?}");
    drop(readers);
    wait_for_baseline(&node, baseline);
    node.stop();
}

/// A store on a disk that hangs: whoever asks it waits.
///
/// Of what is in it, it remembers the metadata.
struct HungStore(MemoryStore);

impl LocalStore for HungStore {
    fn dir(&self) -> &StoreDir {
        self.0.dir()
    }

    fn path_info(
        &self,
        hash: StorePathHash,
    ) -> BoxFuture<'_, Result<Option<PathInfo>, StoreError>> {
        Box::pin(async move {
            match self.0.path_info(hash).await {
                Ok(None) => std::future::pending().await,
                known => known,
            }
        })
    }

    fn path_infos(
        &self,
        _: Vec<StorePathHash>,
    ) -> BoxFuture<'_, Result<Vec<Option<PathInfo>>, StoreError>> {
        Box::pin(std::future::pending())
    }

    fn nar<'a>(&'a self, _: &'a PathInfo) -> BoxFuture<'a, Result<Option<Nar>, StoreError>> {
        Box::pin(std::future::pending())
    }

    fn watch(&self) -> tokio::sync::mpsc::Receiver<StoreEvent> {
        self.0.watch()
    }
}

/// An endpoint over a store of the test's own.
fn endpoint(folder: &std::path::Path, store: Arc<dyn LocalStore>) -> SocketAddr {
    let config = Config::parse(&format!("state-dir = {folder:?}\n")).unwrap();
    let store_config = Arc::new(StoreConfig {
        dir: StoreDir::default(),
        real_dir: folder.to_owned(),
        database: folder.join("db.sqlite"),
        daemon_socket: folder.join("socket"),
    });
    let database = Arc::new(Database::start(store_config.clone()).unwrap());
    let endpoint = Substituter::new(&config, TaskTracker::new());
    let records = Records {
        logs: BuildLogs::new(folder.join("log")),
        database: database.clone(),
        debug_info: DebugInfo::new(store_config, database),
    };
    let rules = Arc::new(SharingRules {
        enabled: true,
        deny: Vec::new(),
        trust: TrustedKeys::new(),
        hidden: tokio::sync::watch::channel(Arc::default()).1,
    });
    let about = About {
        peer_id: String::new(),
        version: String::new(),
        mesh: None,
    };
    endpoint.start(Engine::new(store, Some(records), rules, about, None));
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let Address::Tcp(address) = *listener.address() else {
        unreachable!("bound to TCP");
    };
    endpoint.open(listener);
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_hangs_delays_no_sign_of_life_and_is_given_up_for_404() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(HungStore(MemoryStore::new(StoreDir::default())));
    let address = endpoint(folder.path(), store);
    let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
    let mut waiting: Vec<_> = (0..PARALLEL_REQUESTS)
        .map(|_| {
            let mut client = connect(address);
            client.request("GET", &format!("/{hash}.narinfo"), "");
            client
        })
        .collect();
    let asked = Instant::now();
    for target in ["/health", "/nix-cache-info", "/metrics"] {
        assert_eq!(status(&mut connect(address), target), 200);
    }
    assert!(asked.elapsed() < Duration::from_millis(500), "held up");
    let mut nar = connect(address);
    nar.request("GET", &format!("/nar/{hash}.nar"), "");
    for client in waiting.iter_mut().chain([&mut nar]) {
        assert_eq!(client.answer(false).status, 404);
    }
    assert!(asked.elapsed() < Duration::from_secs(3), "not given up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nar_that_does_not_begin_is_given_up_for_404() {
    let folder = tempfile::tempdir().unwrap();
    let store = MemoryStore::new(StoreDir::default());
    let target = b"nowhere".to_vec();
    let info = store.add("hung", Tree::Symlink { target }).unwrap();
    let address = endpoint(folder.path(), Arc::new(HungStore(store)));
    let hash = info.store_path.hash();
    let mut client = connect(address);
    assert_eq!(status(&mut client, &format!("/{hash}.narinfo")), 200);
    assert_eq!(status(&mut client, &format!("/nar/{hash}.nar")), 404);
}
