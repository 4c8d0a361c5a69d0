//! Pushing to the anchor and pulling from it, beside atticd.
//!
//! What was pushed is pulled from either by the real Nix, into an empty store.
//!
//! Attic's own client needs the headers of a newer Nix than Debian's, so its part is played by [`client`]: what it
//! sends, in its order and with its five uploads at a time, out of our own reader of the store. It starts faster
//! than the real one, so the ratios do not flatter us.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use granary::store::{BATCH_MAX, LocalStore, NixStore, PathInfo, StoreConfig};
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::anchor::{Anchor, PORT};
use crate::machine::{Lan, Machine};
use crate::process;
use crate::rivals::{ATTIC_PORT, Attic};
use crate::{in_turn, median, row};

/// The word that makes this program Attic's client: see [`client`].
pub const CLIENT: &str = "attic-push";

/// Uploads at a time, Attic's default.
const JOBS: usize = 5;

const DEADLINE: Duration = Duration::from_secs(300);

pub fn measure(lan: &Lan, desktop: &Machine, atticd: Option<&Path>, top: &str, large: &str) {
    for (what, path) in [("300 paths", top), ("1 GiB", large)] {
        let (known, attic_known) = (RefCell::default(), RefCell::default());
        let (pulled, attic_pulled) = (RefCell::default(), RefCell::default());
        let cold = in_turn(
            || {
                let anchor = start_anchor(lan);
                let push = || granary(desktop, &anchor, path);
                let took = push();
                note(&known, push());
                let address = (anchor.anchor.namespace.address, PORT).into();
                note(&pulled, pull(lan, address, "team", path));
                took
            },
            atticd.map(|program| {
                let (attic_known, attic_pulled) = (&attic_known, &attic_pulled);
                move || {
                    let namespace = lan.plug("attic");
                    let attic = Attic::start(program, &namespace);
                    let address = SocketAddr::from((namespace.address, ATTIC_PORT));
                    let push = |is_first| attic_push(desktop, address, &attic, path, is_first);
                    let took = push(true);
                    note(attic_known, push(false));
                    note(attic_pulled, pull(lan, address, "bench", path));
                    took
                }
            }),
        );
        // Of seconds, so that a ratio below 1 is the faster anchor.
        row(&format!("push of {what}, all new"), "s", cold, "<= 0.33");
        row(
            &format!("push of {what}, all known"),
            "s",
            (
                median(known.take()).expect("one round at least"),
                median(attic_known.take()),
            ),
            "<= 0.1",
        );
        row(
            &format!("pull of {what} by nix copy"),
            "s",
            (
                median(pulled.take()).expect("one round at least"),
                median(attic_pulled.take()),
            ),
            "",
        );
    }
}

/// Seconds that the real Nix takes to bring a closure into an empty store. Each cache signs with a key of its own,
/// which is not what is measured.
fn pull(lan: &Lan, address: SocketAddr, cache: &str, path: &str) -> f64 {
    let laptop = lan.machine("laptop");
    let from = format!("http://{address}/{cache}");
    let arguments = ["copy", "--no-check-sigs", "--from", &from, path];
    let done = laptop.nix.run(&laptop.namespace, "nix", &arguments);
    let took = done.elapsed.as_secs_f64();
    done.expect_success();
    took
}

fn note(figures: &RefCell<Vec<f64>>, figure: f64) {
    figures.borrow_mut().push(figure);
}

fn start_anchor(lan: &Lan) -> Running {
    let settings = format!("listen = \"0.0.0.0:{PORT}\"\n");
    let mut anchor = Anchor::new(lan, "anchor", &settings);
    anchor.run(&["cache", "create", "team", "--public"]);
    let token = anchor.token();
    anchor.start();
    Running { anchor, token }
}

/// An anchor with a cache, and a token for it.
struct Running {
    anchor: Anchor,
    token: String,
}

/// Seconds that `granary push` takes.
fn granary(desktop: &Machine, to: &Running, path: &str) -> f64 {
    let url = format!("http://{}:{PORT}/team", to.anchor.namespace.address);
    let config = desktop.state().with_file_name("granary.toml");
    let mut command = desktop.namespace.command(env!("CARGO_BIN_EXE_granary"));
    command
        .args(["push", &url, path])
        .arg("--config")
        .arg(config);
    command.env("GRANARY_TOKEN", &to.token);
    seconds(&mut command)
}

/// Seconds that Attic's client takes, or what stands for it here.
fn attic_push(
    desktop: &Machine,
    address: SocketAddr,
    attic: &Attic,
    path: &str,
    is_first: bool,
) -> f64 {
    let program = std::env::current_exe().expect("this program");
    let program = program.to_str().expect("UTF-8 path");
    let mut command = desktop.namespace.command(program);
    command.args([CLIENT, &address.to_string(), path]);
    command.arg(&desktop.nix.root);
    command.arg(if is_first { "make" } else { "use" });
    command.env("ATTIC_TOKEN", attic.token());
    seconds(&mut command)
}

fn seconds(command: &mut Command) -> f64 {
    let done = process::run(command, DEADLINE);
    let took = done.elapsed.as_secs_f64();
    done.expect_success();
    took
}

/// What Attic's client does: `<address> <path> <store root> make|use`, where `make` makes the cache first.
pub fn client(arguments: &[String]) {
    let [address, path, root, first] = arguments else {
        panic!("{arguments:?}");
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let dir = StoreDir::default();
        let store = NixStore::open(StoreConfig::chroot(dir.clone(), Path::new(root))).await;
        let store = Arc::new(store.expect("a store"));
        let address = address.parse().expect("an address");
        let token = std::env::var("ATTIC_TOKEN").expect("a token");
        let mut connection = Connection::open(address, &token).await;
        if first == "make" {
            let settings = serde_json::json!({
                "keypair": "Generate", "is_public": true, "store_dir": "/nix/store",
                "priority": 40, "upstream_cache_key_names": [],
            });
            connection
                .post("/_api/v1/cache-config/bench", &settings)
                .await;
        }
        let top = dir.parse_path(path).expect("a store path");
        let closure = closure(&store, top.hash()).await;
        let hashes: Vec<String> = closure.keys().map(ToString::to_string).collect();
        let question = serde_json::json!({"cache": "bench", "store_path_hashes": hashes});
        let missing = connection
            .post("/_api/v1/get-missing-paths", &question)
            .await;
        let missing: Vec<PathInfo> = missing["missing_paths"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|hash| {
                let hash = hash.as_str().and_then(|hash| hash.parse().ok());
                closure[&hash.expect("a hash")].clone()
            })
            .collect();
        let queue = Arc::new(Mutex::new(VecDeque::from(missing)));
        let jobs = (0..JOBS).map(|_| {
            let (queue, store, token) = (queue.clone(), store.clone(), token.clone());
            tokio::spawn(async move {
                let mut connection = Connection::open(address, &token).await;
                loop {
                    let next = queue.lock().expect("a queue").pop_front();
                    match next {
                        Some(info) => connection.upload(&store, &info).await,
                        None => break,
                    }
                }
            })
        });
        for job in jobs.collect::<Vec<_>>() {
            job.await.expect("an upload");
        }
    });
}

/// Everything that a path needs.
async fn closure(store: &NixStore, top: StorePathHash) -> BTreeMap<StorePathHash, PathInfo> {
    let mut known: BTreeMap<StorePathHash, PathInfo> = BTreeMap::new();
    let mut next = BTreeSet::from([top]);
    while !next.is_empty() {
        let batch = std::iter::from_fn(|| next.pop_first());
        let batch = batch.take(BATCH_MAX).collect();
        for info in store.path_infos(batch).await.expect("a store") {
            let info = info.expect("a valid path");
            next.extend(info.references.iter().map(StorePath::hash));
            known.insert(info.store_path.hash(), info);
        }
        next.retain(|hash| !known.contains_key(hash));
    }
    known
}

/// A kept connection with a token.
struct Connection {
    stream: TcpStream,
    token: String,
}

impl Connection {
    async fn open(address: SocketAddr, token: &str) -> Connection {
        let stream = TcpStream::connect(address).await.expect("connect");
        stream.set_nodelay(true).expect("no delay");
        Connection {
            stream,
            token: token.to_owned(),
        }
    }

    async fn post(&mut self, target: &str, body: &serde_json::Value) -> serde_json::Value {
        let body = body.to_string();
        self.head(
            "POST",
            target,
            "Content-Type: application/json\r\n",
            body.len() as u64,
        )
        .await;
        self.write(body.as_bytes()).await;
        let answer = self.answer().await;
        serde_json::from_slice(&answer).unwrap_or_default()
    }

    async fn upload(&mut self, store: &NixStore, info: &PathInfo) {
        let texts = |path: &StorePath| path.to_string();
        let metadata = serde_json::json!({
            "cache": "bench",
            "store_path_hash": info.store_path.hash().to_string(),
            "store_path": StoreDir::default().display(&info.store_path).to_string(),
            "references": info.references.iter().map(texts).collect::<Vec<_>>(),
            "system": null,
            "deriver": info.deriver.as_ref().map(texts),
            "sigs": [],
            "ca": null,
            "nar_hash": info.nar_hash.to_string(),
            "nar_size": info.nar_size,
        });
        let headers = format!("X-Attic-Nar-Info: {metadata}\r\n");
        self.head("PUT", "/_api/v1/upload-path", &headers, info.nar_size)
            .await;
        let nar = store.nar(info).await.expect("a store").expect("a nar");
        let mut bytes = nar.stream(0..u64::MAX);
        while let Some(piece) = bytes.next().await {
            self.write(&piece.expect("a readable nar")).await;
        }
        self.answer().await;
    }

    async fn head(&mut self, method: &str, target: &str, headers: &str, length: u64) {
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n{headers}Content-Length: {length}\r\n\r\n",
            self.token
        );
        self.write(head.as_bytes()).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("write");
    }

    /// The body of an answer, which must be 200.
    async fn answer(&mut self) -> Vec<u8> {
        let mut read = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&read).to_ascii_lowercase();
            if let Some((head, _)) = text.split_once("\r\n\r\n") {
                assert!(head.starts_with("http/1.1 200"), "{text}");
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "));
                let length: usize = length.map_or(0, |length| length.parse().expect("a length"));
                if read.len() == head.len() + 4 + length {
                    return read.split_off(head.len() + 4);
                }
            }
            let count = self.stream.read_buf(&mut read).await.expect("read");
            assert!(count > 0, "the connection was closed");
        }
    }
}
