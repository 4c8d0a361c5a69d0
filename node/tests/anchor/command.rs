//! The `granary` program as an anchor: started, administered, killed.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::rig::{Answer, GENEROUS, Machine, ask, bearer, hash};

/// A process that is killed when it is dropped.
pub struct Anchor {
    process: Child,
    pub address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Place {
    pub folder: TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place::with("")
    }

    /// With more in `[anchor-server]`.
    pub fn with(more: &str) -> Place {
        let place = Place {
            folder: TempDir::new().unwrap(),
        };
        let text = format!(
            "state-dir = \"{}/state\"\n[anchor-server]\nlisten = \"127.0.0.1:0\"\n{more}",
            place.folder.path().display()
        );
        std::fs::write(place.config(), text).unwrap();
        place
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("granary.toml")
    }

    pub fn catalog(&self) -> PathBuf {
        self.path().join("state/anchor/catalog.sqlite")
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The program with this place's configuration.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        command
            .env("GRANARY_CONFIG", self.config())
            .env_remove("RUST_LOG");
        command
    }

    pub fn granary(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    /// What a command that must succeed prints.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.granary(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "granary {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Why a command that must fail says that it failed.
    pub fn fail(&self, arguments: &[&str]) -> String {
        let output = self.granary(arguments);
        assert!(!output.status.success(), "granary {arguments:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// An anchor that is given this folder of credentials, as systemd does.
    fn start_with_credentials(&self, folder: &Path) -> Anchor {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        self.start_as(command.arg("anchor").env("CREDENTIALS_DIRECTORY", folder))
    }

    pub fn start(&self) -> Anchor {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        self.start_as(command.arg("anchor"))
    }

    /// The same with a file system of so many bytes on a folder, which only it sees.
    pub fn start_with_small_disk(&self, folder: &Path, size: &str) -> Anchor {
        let script = format!(
            "mount -t tmpfs -o size={size} tmpfs '{}' && exec '{}' anchor",
            folder.display(),
            env!("CARGO_BIN_EXE_granary")
        );
        let mut command = Command::new("unshare");
        let own = ["--user", "--map-root-user", "--mount"];
        self.start_as(command.args(own).args(["sh", "-c", &script]))
    }

    fn start_as(&self, command: &mut Command) -> Anchor {
        let mut process = command
            .env("GRANARY_CONFIG", self.config())
            .env("RUST_LOG", "granary=info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = loop {
            let Some(Ok(line)) = lines.next() else {
                panic!("the anchor did not start: {said}");
            };
            said.push_str(&line);
            if let Some((_, rest)) = line.split_once("anchor is answering address=") {
                break rest.split(' ').next().unwrap().parse().unwrap();
            }
        };
        // Its pipe must not fill up.
        let log = Arc::new(Mutex::new(said));
        let writing = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = writing.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        Anchor {
            process,
            address,
            log,
        }
    }
}

impl Anchor {
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Where a path lies that only the anchor's process sees.
    pub fn sees(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.process.id()));
        root.join(path.strip_prefix("/").unwrap())
    }

    /// kill -9.
    pub fn kill(&mut self) {
        // It may have been killed before.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Waits until the log has a line with this in it, and returns that.
    pub fn logged(&self, text: &str) -> String {
        let started = Instant::now();
        loop {
            let found = {
                let log = self.log.lock().unwrap();
                log.lines()
                    .find(|line| line.contains(text))
                    .map(str::to_owned)
            };
            if let Some(line) = found {
                return line;
            }
            assert!(started.elapsed() < GENEROUS, "never logged: {text}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many lines of the log have this in them; waits until there are so many.
    pub fn logged_times(&self, text: &str, least: usize) -> usize {
        let started = Instant::now();
        loop {
            let lines = {
                let log = self.log.lock().unwrap();
                log.lines().filter(|line| line.contains(text)).count()
            };
            if lines >= least {
                return lines;
            }
            assert!(started.elapsed() < GENEROUS, "logged {lines} times: {text}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn get(&self, target: &str, token: &str) -> Answer {
        ask(
            self.address,
            "GET",
            target,
            &[("Authorization", &bearer(token))],
            b"",
        )
    }
}

#[test]
fn an_anchor_is_run_and_administered_from_the_command_line() {
    let place = Place::new();
    let anchor = place.start();
    // It made its default cache; others are made beside it while it runs.
    assert!(
        place
            .run(&["cache", "list"])
            .starts_with("main  private  0 paths")
    );
    let key = place.run(&["cache", "create", "team", "--priority", "30"]);
    assert!(key.starts_with("team-1:"), "{key}");
    assert!(
        place
            .fail(&["cache", "create", "team"])
            .contains("cache team exists already")
    );
    assert!(
        place
            .fail(&["cache", "create", "../x"])
            .contains("cannot be called")
    );
    let token = place.run(&[
        "token",
        "create",
        "--subject",
        "ci",
        "--cache",
        "te*",
        "--allow",
        "pull,push",
    ]);

    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let url = format!("http://{}/team", anchor.address);
    builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
    let info = place.run(&["cache", "info", "team", "--json"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (&info["paths"], &info["settings"]["priority"]),
        (&3.into(), &30.into())
    );

    // Rotation: a client that trusts either key is content until the old one is retired.
    let keys = place.run(&["cache", "rotate-key", "team"]);
    let keys: Vec<&str> = keys.lines().collect();
    assert_eq!((keys.len(), keys[1]), (2, key.as_str()));
    for key in &keys {
        let client = Machine::new(&[key]);
        client.login(&token);
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
    }
    assert_eq!(
        place.run(&["cache", "rotate-key", "team", "--retire"]),
        keys[0]
    );
    let narinfo = anchor.get(&format!("/team/{}.narinfo", hash(&closure[0])), &token);
    assert!(
        narinfo.text().contains("Sig: team-2:") && !narinfo.text().contains("Sig: team-1:"),
        "{}",
        narinfo.text()
    );

    // A path that is removed is gone with the next request; the others stay.
    place.run(&["rm", "team", &closure[2]]);
    assert_eq!(
        anchor
            .get(&format!("/team/{}.narinfo", hash(&closure[2])), &token)
            .status,
        404
    );
    assert_eq!(
        anchor
            .get(&format!("/team/{}.narinfo", hash(&closure[1])), &token)
            .status,
        200
    );
    assert!(
        place
            .fail(&["rm", "team", &closure[2]])
            .contains("does not hold")
    );

    // Everybody may read it, then nobody with that token.
    place.run(&["cache", "configure", "team", "--public"]);
    assert_eq!(anchor.get("/team/nix-cache-info", "garbage").status, 200);
    place.run(&["cache", "configure", "team", "--private"]);
    let listed = place.run(&["token", "list"]);
    let id = listed.split(' ').next().unwrap();
    assert!(
        listed.contains("ci  364 days left") || listed.contains("ci  365 days left"),
        "{listed}"
    );
    place.run(&["token", "revoke", id]);
    assert_eq!(
        anchor.get("/team/nix-cache-info", &token).error(),
        "TokenRevoked"
    );
    assert!(place.run(&["token", "list"]).contains("revoked"));
    assert!(
        place
            .fail(&["token", "revoke", "nonsense"])
            .contains("there is no token nonsense")
    );
    assert!(place.fail(&["cache", "delete", "team"]).contains("--yes"));
    place.run(&["cache", "delete", "team", "--yes"]);
    assert!(!place.run(&["cache", "list"]).contains("team"));
}

#[test]
fn a_second_anchor_and_a_rebuild_keep_away_from_a_running_one() {
    let place = Place::new();
    let anchor = place.start();
    assert!(
        place
            .fail(&["anchor"])
            .contains("another granary anchor works in")
    );
    assert!(
        place
            .fail(&["anchor", "rebuild"])
            .contains("another granary anchor works in")
    );
    drop(anchor);
    assert!(
        place
            .run(&["anchor", "rebuild"])
            .starts_with("found 1 cache with 0 paths")
    );
    drop(place.start());
}

#[test]
fn secrets_are_for_the_owner_alone() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    place.run(&["cache", "create", "main"]);
    let state = place.path().join("state/anchor");
    for file in ["keys/main", "token-key"] {
        assert_eq!(
            std::fs::metadata(state.join(file)).unwrap().mode() & 0o777,
            0o600,
            "{file}"
        );
    }
    assert_eq!(std::fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
    // Nothing of it is in storage.
    let key = std::fs::read_to_string(state.join("keys/main")).unwrap();
    let secret = key.trim().split(':').nth(1).unwrap();
    let settings =
        std::fs::read_to_string(place.path().join("state/storage/caches/main/cache.json")).unwrap();
    assert!(
        !settings.contains(&secret[..40]) && settings.contains("main-1:"),
        "{settings}"
    );
}

#[test]
fn a_rotation_of_keys_that_are_a_credential_is_refused_and_leaves_nothing() {
    let place = Place::new();
    place.run(&["cache", "create", "main"]);
    let credentials = place.path().join("credentials");
    std::fs::create_dir(&credentials).unwrap();
    let key = place.path().join("state/anchor/keys/main");
    std::fs::copy(&key, credentials.join("cache-main")).unwrap();
    let _anchor = place.start_with_credentials(&credentials);
    for retire in [&[][..], &["--retire"]] {
        let refused = place.fail(&[&["cache", "rotate-key", "main"], retire].concat());
        assert!(refused.contains("come from a credential"), "{refused}");
    }
    let catalog = rusqlite::Connection::open(place.catalog()).unwrap();
    let count = catalog.query_row("SELECT count(*) FROM rotations", [], |row| row.get(0));
    assert_eq!(count, Ok(0));
}
