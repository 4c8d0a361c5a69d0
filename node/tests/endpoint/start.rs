//! Starts that go wrong, and the command line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use granary::config::Config;
use granary::daemon::Daemon;

use crate::machine::{MESH_PORT, Machine, SMALL_BYTES, TRANSFER_PORT, noise, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_endpoint_answers_before_there_is_a_store() {
    for spoil in [
        |_: &Path| {},
        |db: &Path| fs::write(db, noise(100_000)).unwrap(),
        |db: &Path| {
            let sql = "CREATE TABLE ValidPaths (nonsense)";
            rusqlite::Connection::open(db)
                .unwrap()
                .execute_batch(sql)
                .unwrap();
        },
    ] {
        let mut machine = Machine::new();
        let path = machine.add("small", SMALL_BYTES);
        let (db, aside) = (
            machine.folder().join("nix/var/nix/db"),
            machine.folder().join("aside"),
        );
        fs::rename(&db, &aside).unwrap();
        fs::create_dir(&db).unwrap();
        spoil(&db.join("db.sqlite"));
        machine.start().await;
        let info = machine.get("/nix-cache-info");
        assert_eq!(info.line("StoreDir"), Some("/nix/store"));
        assert_eq!(machine.get(&path.narinfo()).status, 404);
        let nar = machine.get(&path.short());
        assert_eq!(nar.status, 404);
        nar.assert_below_nar();
        // Found when it appears.
        fs::remove_dir_all(&db).unwrap();
        fs::rename(&aside, &db).unwrap();
        machine.wait_for(&path);
        assert!(machine.get(&path.short()).body == path.nar);
        machine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_cannot_succeed_names_its_subject_and_leaves_nothing() {
    let mut machine = Machine::new();
    machine.admit();
    let taken = TcpListener::bind((machine.address, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let config = |from: &str, to: &str| {
        let text = machine.config_text();
        assert!(text.contains(from));
        Config::parse(&text.replace(from, to)).unwrap()
    };
    let substituter = config("127.0.0.1:0", &address.to_string());
    let mesh = config(
        &format!("{}:{MESH_PORT}", machine.address),
        &address.to_string(),
    );
    let transfer = config(
        &format!("{}:{TRANSFER_PORT}", machine.address),
        &address.to_string(),
    );
    for (config, key) in [
        (substituter, "[substituter]"),
        (mesh, "[mesh]"),
        (transfer, "[mesh]"),
    ] {
        let error = Daemon::start(config).await.err().unwrap().to_string();
        assert!(
            error.contains(&address.to_string()) && error.contains(key),
            "{error}"
        );
    }

    // A failed start frees the port that it had taken.
    let free = {
        let listener = TcpListener::bind((machine.address, 0)).unwrap();
        listener.local_addr().unwrap()
    };
    let identity = machine.state().join("identity");
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o644)).unwrap();
    let exposed = config("127.0.0.1:0", &free.to_string());
    let error = Daemon::start(exposed.clone())
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("identity") && error.contains("chmod 0600"),
        "{error}"
    );
    until("the port", || TcpListener::bind(free).is_ok());

    let file = machine.folder().join("file");
    fs::write(&file, "").unwrap();
    let state = config(
        &machine.state().display().to_string(),
        &file.join("state").display().to_string(),
    );
    let error = Daemon::start(state).await.err().unwrap().to_string();
    assert!(error.contains(&file.display().to_string()), "{error}");

    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();
    machine.daemon = Some(Daemon::start(exposed).await.unwrap());
    machine.stop().await;
}

/// Runs the program itself, as a person would.
fn granary(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(arguments)
        .env_remove("GRANARY_CONFIG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).unwrap().permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_says_what_is_wrong_once() {
    let mut machine = Machine::new();
    let file = machine.folder().join("granary.toml");
    let config = file.to_str().unwrap();
    let check = |text: &str, arguments: &[&str], status: i32, words: &[&str]| {
        fs::write(&file, text).unwrap();
        let output = granary(&[arguments, &["--config", config]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        for word in words {
            assert_eq!(said.matches(word).count(), 1, "{word}: {said}");
        }
    };
    check(
        "[trust]\nkey = []\n",
        &["node"],
        1,
        &["granary.toml", "line 2", "did you mean `keys`"],
    );
    check(
        &machine.config_text(),
        &["status"],
        1,
        &["is `granary node` running"],
    );
    let taken = TcpListener::bind((machine.address, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = machine.config_text().replace("127.0.0.1:0", &address);
    check(
        &text,
        &["node"],
        1,
        &[&address, "Address already in use", "[substituter]"],
    );
    check(
        &text.replace("db.sqlite", "none.sqlite"),
        &["check-config"],
        1,
        &["none.sqlite"],
    );
    check(&text, &["frobnicate"], 2, &["unrecognized subcommand"]);

    // A certificate of this mesh that another machine owns.
    let other = Machine::new();
    other.admit();
    machine.admit();
    fs::copy(
        other.state().join("certificate"),
        machine.state().join("certificate"),
    )
    .unwrap();
    check(&text, &["check-config"], 1, &["the certificate"]);
    machine.admit();
    check(&text, &["check-config"], 0, &[]);

    // Folders and keys are their owner's alone.
    let state = machine.folder().join("new/state");
    assert!(
        granary(&["identity", "--state-dir", state.to_str().unwrap()])
            .status
            .success()
    );
    assert_eq!(
        (mode(&state), mode(&state.join("identity"))),
        (0o700, 0o600)
    );
    let mesh_key = machine.folder().join("mesh.key");
    let created = granary(&["mesh", "create", "--key-file", mesh_key.to_str().unwrap()]);
    assert!(created.status.success());
    assert_eq!(mode(&mesh_key), 0o600);
    let secret = fs::read_to_string(&mesh_key).unwrap();
    let printed = String::from_utf8_lossy(&created.stdout).into_owned();
    assert!(!printed.contains(secret.split_once(':').unwrap().1.trim()));

    // Names with the odd characters that Nix allows, and folders below a path.
    let odd = machine.add("a+b?c=d", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&odd);
    let text = machine
        .config_text()
        .replace("127.0.0.1:0", &machine.endpoint().to_string());
    fs::write(&file, text).unwrap();
    let base_name = odd.path.strip_prefix("/nix/store/").unwrap();
    for path in [
        odd.path.clone(),
        base_name.to_owned(),
        odd.hash.clone(),
        format!("{}/nix/store/x y", odd.path),
    ] {
        let output = granary(&["why", &path, "--config", config]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && said.contains(&odd.path),
            "{path}: {output:?}"
        );
        assert!(said.contains("200 from the local store"), "{said}");
    }
    let output = granary(&["why", "hello", "--config", config]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hello"));
    let output = granary(&["status", "--config", config]);
    assert!(output.status.success());
    machine.stop().await;
}

#[test]
fn a_missing_store_is_an_error_once_and_a_signal_ends_the_program_well() {
    let machine = Machine::new();
    machine.admit();
    let database = machine.folder().join("nix/var/nix/db/db.sqlite");
    let aside = machine.folder().join("aside");
    fs::rename(&database, &aside).unwrap();
    let file = machine.folder().join("granary.toml");
    fs::write(&file, machine.config_text()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["node", "--config", file.to_str().unwrap()])
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut lines = Vec::new();
    let mut read_until = |words: &str| {
        for line in log.by_ref() {
            lines.push(line.unwrap());
            if lines[lines.len() - 1].contains(words) {
                return;
            }
        }
        panic!("never said {words:?}: {lines:#?}");
    };
    read_until("could not open the store");
    // Two more attempts fail without a word.
    thread::sleep(Duration::from_millis(4500));
    fs::rename(&aside, &database).unwrap();
    read_until("joined the mesh");
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    read_until("stopping");
    assert!(child.wait().unwrap().success());
    let errors = lines.iter().filter(|line| line.contains("ERROR")).count();
    assert_eq!(errors, 1, "{lines:#?}");
    assert!(
        lines.iter().any(|line| line.contains("db.sqlite")),
        "{lines:#?}"
    );
    let secret = fs::read(machine.state().join("identity")).unwrap();
    let secret: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(!lines.iter().any(|line| line.contains(&secret)));
}
