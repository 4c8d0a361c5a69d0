//! The node's own pushes: what is built reaches the anchor, whatever dies on the way.
//!
//! `GRANARY_QUEUE_ROUNDS=50` has the loop of kills go on that long.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use granary_protocol::token::Permission::{Pull, Push};

use crate::rig::{GENEROUS, Machine, Rig, hash};

/// A machine whose node pushes to a cache of an anchor.
pub struct Pusher {
    machine: Machine,
    url: String,
    /// `[share]` and what follows, and what belongs into `[upload]`.
    extra: String,
    upload: String,
    process: Option<Child>,
}

impl Pusher {
    pub fn new(url: &str, token: &str) -> Pusher {
        let pusher = Pusher {
            machine: Machine::new(&[]),
            url: url.to_owned(),
            extra: String::new(),
            upload: String::new(),
            process: None,
        };
        pusher.set_token(token);
        pusher
    }

    fn file(&self, name: &str) -> PathBuf {
        self.machine.folder().join(name)
    }

    fn set_token(&self, token: &str) {
        fs::write(self.file("token"), token).unwrap();
        fs::set_permissions(self.file("token"), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn config(&self) -> PathBuf {
        let root = self.machine.folder().display();
        let text = format!(
            "state-dir = \"{root}/state\"\n\
             [store]\nreal-dir = \"{root}/nix/store\"\ndatabase = \"{root}/nix/var/nix/db/db.sqlite\"\n\
             [substituter]\nlisten = \"unix:{root}/socket\"\n\
             [[anchor]]\nurl = \"{}\"\ntoken-file = \"{root}/token\"\n\
             [upload]\ncache = \"main\"\n{}{}",
            self.url, self.upload, self.extra
        );
        let file = self.file("granary.toml");
        // A node that starts must not find it half written.
        if fs::read_to_string(&file).ok().as_ref() != Some(&text) {
            fs::write(&file, text).unwrap();
        }
        file
    }

    pub fn granary(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        command
            .args(arguments)
            .env("GRANARY_CONFIG", self.config())
            .env_remove("http_proxy")
            .env_remove("RUST_LOG");
        command
    }

    pub fn start(&mut self) {
        let mut options = fs::File::options();
        options.create(true).append(true);
        let log = options.open(self.file("log")).unwrap();
        let mut command = self.granary(&["node"]);
        self.process = Some(command.stderr(log).stdout(Stdio::null()).spawn().unwrap());
    }

    /// kill -9.
    fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// What `granary status --json` says about pushing, if the node answers.
    fn status(&self) -> Option<serde_json::Value> {
        let output = self.granary(&["status", "--json"]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(status["upload"].clone())
    }

    fn wait(&self, what: &str, mut is_so: impl FnMut(&serde_json::Value) -> bool) {
        let started = Instant::now();
        loop {
            let status = self.status();
            if status.as_ref().is_some_and(&mut is_so) {
                return;
            }
            let log = || fs::read_to_string(self.file("log")).unwrap();
            assert!(
                started.elapsed() < GENEROUS,
                "{what}: {status:?}\n{}",
                log()
            );
        }
    }

    fn wait_idle(&self) {
        self.wait("an empty queue", |upload| upload["paths_waiting"] == 0);
    }

    /// Builds a path that nothing compresses.
    fn build_noise(&self, bytes: u64) -> String {
        let file = self.file("noise.nix");
        let text = format!(
            "derivation {{ name = \"noise\"; system = builtins.currentSystem; builder = \"/bin/sh\";\n\
             PATH = \"/bin:/usr/bin\"; args = [ \"-c\" \"head -c {bytes} /dev/urandom > $out\" ]; }}"
        );
        fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        self.machine.nix("nix-build", &["--no-out-link", file])
    }

    /// Builds paths that reference nothing.
    fn build(&self, names: &[String], bytes: usize) -> Vec<String> {
        let one = |name: &String| {
            format!(
                "(derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\";\n\
                 PATH = \"/bin:/usr/bin\"; args = [ \"-c\" \"yes {name} | head -c {bytes} > $out\" ]; }})"
            )
        };
        let list: Vec<String> = names.iter().map(one).collect();
        let file = self.file("list.nix");
        fs::write(&file, format!("[ {} ]", list.join("\n"))).unwrap();
        let built = self
            .machine
            .nix("nix-build", &["--no-out-link", file.to_str().unwrap()]);
        let mut built: Vec<String> = built.lines().map(str::to_owned).collect();
        built.sort();
        built
    }

    fn errors(&self) -> Vec<String> {
        let log = fs::read_to_string(self.file("log")).unwrap_or_default();
        let is_error = |line: &&str| line.contains(" ERROR ") || line.contains("panicked");
        log.lines().filter(is_error).map(str::to_owned).collect()
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.kill();
        }
        if !std::thread::panicking() {
            assert_eq!(self.errors(), Vec::<String>::new());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_does_not_fit_keeps_no_other_waiting_and_is_not_sent_every_minute() {
    const BYTES: u64 = 3_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let changes = granary::anchor::admin::Changes {
        quota: Some(Some(1_000_000)),
        ..Default::default()
    };
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let name = "main".parse().unwrap();
    anchor.configure_cache(&name, &changes).await.unwrap();
    let line = line(rig.address());
    let mut pusher = Pusher::new(&format!("http://{}/main", line.address), &token);
    tokio::task::block_in_place(|| {
        pusher.start();
        let large = pusher.build_noise(BYTES);
        pusher.wait("the refusal", |upload| upload["paths_failed"] == 1);
        let names = ["small".to_owned()];
        let small = pusher.build(&names, 1000);
        let started = Instant::now();
        while !holds(&rig, &small[0]) {
            assert!(started.elapsed() < GENEROUS, "{:?}", pusher.status());
        }
        assert!(!holds(&rig, &large));
        assert!(line.bytes.load(Ordering::Relaxed) < 2 * BYTES);
    });
}

fn holds(rig: &Rig, path: &str) -> bool {
    rig.get(&format!("/main/{}.narinfo", hash(path))).status == 200
}

/// Carries connections to the anchor, and counts them and what goes there.
struct Line {
    address: SocketAddr,
    connections: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

fn line(anchor: SocketAddr) -> Line {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let line = Line {
        address: listener.local_addr().unwrap(),
        connections: Arc::default(),
        bytes: Arc::default(),
    };
    let (connections, bytes) = (line.connections.clone(), line.bytes.clone());
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            connections.fetch_add(1, Ordering::Relaxed);
            let Ok(server) = TcpStream::connect(anchor) else {
                continue;
            };
            let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let bytes = bytes.clone();
            std::thread::spawn(move || {
                let (mut from, mut to) = (client, server);
                let mut buffer = [0; 16 * 1024];
                while let Ok(length @ 1..) = from.read(&mut buffer) {
                    bytes.fetch_add(length as u64, Ordering::Relaxed);
                    if to.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut down, &mut up);
                let _ = up.shutdown(Shutdown::Both);
            });
        }
    });
    line
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_built_is_pushed_with_its_closure_and_nothing_else() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    tokio::task::block_in_place(|| {
        let mut pusher = Pusher::new(&rig.url("main"), &token);
        pusher.extra = "[share]\ndeny = [\"^denied-\"]\n".to_owned();
        // Before the node ever ran.
        let before = pusher.machine.build();
        let hidden = pusher.build(&["hidden-1".to_owned()], 10);
        let hide = pusher.granary(&["hide", &hidden[0]]).output().unwrap();
        assert!(hide.status.success(), "{hide:?}");
        pusher.start();
        pusher.wait("what was there", |_| {
            before.iter().all(|path| holds(&rig, path))
        });

        // While it runs: a source that somebody added is no build, and does not go along with one.
        let secret = pusher.file("secret.txt");
        fs::write(&secret, "a secret").unwrap();
        let secret = secret.to_str().unwrap();
        let source = pusher.machine.nix("nix-store", &["--add", secret]);
        let denied = pusher.build(&["denied-1".to_owned()], 10);
        let file = pusher.file("referrer.nix");
        let text = format!(
            "derivation {{ name = \"referrer\"; system = builtins.currentSystem; builder = \"/bin/sh\";\n\
             args = [ \"-c\" \"echo ${{builtins.storePath {source}}} > $out\" ]; }}"
        );
        fs::write(&file, text).unwrap();
        let referrer = pusher
            .machine
            .nix("nix-build", &["--no-out-link", file.to_str().unwrap()]);
        let plain = pusher.build(&["plain-1".to_owned()], 10);
        pusher.wait("the build", |_| holds(&rig, &plain[0]));
        pusher.wait("one that stays", |upload| upload["paths_staying"] == 2);
        pusher.wait_idle();
        for path in [&source, &denied[0], &hidden[0], &referrer] {
            assert!(!holds(&rig, path), "{path}");
        }
        let upload = pusher.status().unwrap();
        assert_eq!(upload["paths_pushed"], 4, "{upload}");
        let problem = upload["problem"].as_str().unwrap();
        assert!(problem.contains("referrer") && problem.contains("upload.sources"));

        // Somebody names it.
        let queued = pusher
            .granary(&["push", "main", "--queue", &referrer])
            .output();
        assert!(queued.unwrap().status.success());
        pusher.wait("what was named", |_| holds(&rig, &referrer));
        assert!(holds(&rig, &source));
        let other = pusher
            .granary(&["push", "other", "--queue", &referrer])
            .output();
        let said = String::from_utf8(other.unwrap().stderr).unwrap();
        assert!(said.contains("not to other"), "{said}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_that_is_away_or_refuses_is_waited_for() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let line = line(rig.address());
    let url = format!("http://{}/main", line.address);
    let mut pusher = Pusher::new(&url, "x.y.z");
    pusher.start();
    let first = tokio::task::block_in_place(|| {
        let first = pusher.build(&["first".to_owned()], 1000);
        pusher.wait("a refusal", |upload| {
            let problem = upload["problem"].as_str();
            problem.is_some_and(|problem| problem.contains("TokenInvalid"))
        });
        pusher.set_token(&token);
        pusher.wait("the new token", |_| holds(&rig, &first[0]));
        pusher.wait("a good end", |upload| upload["problem"].is_null());
        first
    });
    let address = rig.address();
    rig.stop().await;
    let second = tokio::task::block_in_place(|| {
        let second = pusher.build(&["second".to_owned()], 1000);
        pusher.wait("a pause", |upload| {
            upload["retry_in"].is_number() && upload["paths_waiting"] == 1
        });
        // Nix is answered as if nothing were.
        let why = pusher.granary(&["why", &second[0]]).output().unwrap();
        assert!(String::from_utf8_lossy(&why.stdout).contains("200 from the local store"));
        second
    });
    rig.start_at(address).await;
    tokio::task::block_in_place(|| {
        pusher.wait("the anchor's return", |_| holds(&rig, &second[0]));
        assert!(holds(&rig, &first[0]));
        pusher.wait_idle();
        // Pushed is pushed: after a restart the anchor is not even asked.
        pusher.kill();
        let connections = line.connections.load(Ordering::Relaxed);
        pusher.start();
        let third = pusher.build(&["third".to_owned()], 1000);
        pusher.wait("a third", |_| holds(&rig, &third[0]));
        pusher.wait_idle();
        assert_eq!(pusher.status().unwrap()["paths_pushed"], 1);
        // A question, and one upload.
        assert!(line.connections.load(Ordering::Relaxed) <= connections + 2);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_cannot_be_used_harms_nothing_and_is_used_when_it_can_be() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    tokio::task::block_in_place(|| {
        let mut pusher = Pusher::new(&rig.url("main"), &token);
        let built = pusher.build(&["built".to_owned()], 1000);
        // Stands for a disk that is full: no file can be made there.
        let file = pusher.file("state/uploads.sqlite");
        fs::create_dir_all(&file).unwrap();
        pusher.start();
        pusher.wait("a complaint", |upload| {
            let problem = upload["problem"].as_str();
            problem.is_some_and(|problem| problem.contains("upload queue"))
        });
        let why = pusher.granary(&["why", &built[0]]).output().unwrap();
        assert!(String::from_utf8_lossy(&why.stdout).contains("200 from the local store"));
        fs::remove_dir(&file).unwrap();
        pusher.wait("the queue", |_| holds(&rig, &built[0]));

        // A damaged one is made anew, which costs a question.
        pusher.wait_idle();
        pusher.kill();
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(pusher.file(&format!("state/uploads.sqlite{suffix}")));
        }
        fs::write(&file, "nonsense, and more of it than a header has").unwrap();
        pusher.start();
        let again = pusher.build(&["again".to_owned()], 1000);
        pusher.wait("a build after it", |_| holds(&rig, &again[0]));
        assert!(pusher.file("state/uploads.sqlite.damaged").exists());
        pusher.wait_idle();
        assert_eq!(pusher.status().unwrap()["paths_pushed"], 1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_keep_to_the_rate_that_they_may_have() {
    const BYTES: u64 = 600_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    tokio::task::block_in_place(|| {
        let mut pusher = Pusher::new(&rig.url("main"), &token);
        pusher.upload = "rate = \"300kB/s\"\n".to_owned();
        let noise = pusher.build_noise(BYTES);
        pusher.start();
        pusher.wait("progress", |upload| {
            let current = upload["current"].as_array();
            current.is_some_and(|current| !current.is_empty())
        });
        let started = Instant::now();
        pusher.wait("the whole", |_| holds(&rig, &noise));
        assert!(started.elapsed() > Duration::from_secs(1));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_in_a_large_nar_goes_on_where_it_was() {
    const BYTES: u64 = 40_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let line = line(rig.address());
    let url = format!("http://{}/main", line.address);
    tokio::task::block_in_place(|| {
        let mut pusher = Pusher::new(&url, &token);
        pusher.upload = "rate = \"20MB/s\"\n".to_owned();
        let noise = pusher.build_noise(BYTES);
        pusher.start();
        pusher.wait("half of it", |_| {
            line.bytes.load(Ordering::Relaxed) > BYTES / 2
        });
        pusher.kill();
        pusher.start();
        pusher.wait("all of it", |_| holds(&rig, &noise));
    });
    let bytes = line.bytes.load(Ordering::Relaxed);
    assert!(bytes < BYTES * 5 / 4, "{bytes} bytes for {BYTES}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_at_any_moment_pushes_everything_once() {
    const PATHS: usize = 3;
    const BYTES: usize = 300_000;
    let rounds = std::env::var("GRANARY_QUEUE_ROUNDS");
    let rounds: usize = rounds.map_or(4, |rounds| rounds.parse().unwrap());
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let line = line(rig.address());
    let url = format!("http://{}/main", line.address);
    tokio::task::block_in_place(|| {
        let mut pusher = Pusher::new(&url, &token);
        let mut built = Vec::new();
        let mut chance = 0x9e37_79b9_u64;
        for round in 0..rounds {
            let name = |number| format!("round-{round}-{number}");
            // Half of the rounds build before the start, half while the node runs.
            if round % 2 == 0 {
                built.extend(pusher.build(&(0..PATHS).map(name).collect::<Vec<_>>(), BYTES));
            }
            pusher.start();
            if round % 2 == 1 {
                built.extend(pusher.build(&(0..PATHS).map(name).collect::<Vec<_>>(), BYTES));
            }
            chance = chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Anywhere between its first instruction and the last byte of its pushes.
            std::thread::sleep(Duration::from_millis((chance >> 33) % 600));
            pusher.kill();
        }
        pusher.start();
        pusher.wait("everything", |_| built.iter().all(|path| holds(&rig, path)));
        assert_eq!(built.len(), rounds * PATHS);
        let narinfos = rig.objects();
        let narinfos = narinfos.iter().filter(|key| key.ends_with(".narinfo"));
        assert_eq!(narinfos.count(), built.len());
        // Of what was under way at each kill, no more than what the line held is sent again.
        let (sent, whole) = (line.bytes.load(Ordering::Relaxed), built.len() * BYTES);
        assert!(sent < whole as u64 * 3 / 2, "{sent} bytes for {whole}");
        // Nothing is left to be done, whatever is done to the node.
        pusher.wait_idle();
        pusher.kill();
        pusher.start();
        let last = pusher.build(&["last".to_owned()], 1000);
        pusher.wait("the last", |_| holds(&rig, &last[0]));
        pusher.wait_idle();
        assert_eq!(pusher.status().unwrap()["paths_pushed"], 1);
    });
}
