//! The log of a daemon, in each form: what a program, the journal and a person read of it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here takes.
const GENEROUS: Duration = Duration::from_secs(30);

/// A configuration of a node and an anchor that have nothing, and a store that is not there.
fn folder(extra: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    let root = folder.path();
    let config = format!(
        "state-dir = {state:?}\n[store]\ndatabase = {database:?}\n[substituter]\nlisten = \"127.0.0.1:0\"\n\
         [anchor-server]\nlisten = \"127.0.0.1:0\"\n{extra}",
        state = root.join("state"),
        database = root.join("no/such/db.sqlite"),
    );
    fs::write(root.join("granary.toml"), config).unwrap();
    folder
}

fn granary(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    for variable in [
        "RUST_LOG",
        "GRANARY_CONFIG",
        "GRANARY_LOG_FORMAT",
        "JOURNAL_STREAM",
    ] {
        command.env_remove(variable);
    }
    command.args(arguments);
    command.arg("--config").arg(folder.join("granary.toml"));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn terminate(child: &Child) {
    let id = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
}

/// Runs a daemon until it says this, then ends it; returns every line of its stderr.
fn lines(mut command: Command, awaited: &str) -> Vec<String> {
    let mut child = command.spawn().unwrap();
    let mut lines = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains(awaited) {
            terminate(&child);
        }
        lines.push(line);
    }
    assert!(child.wait().unwrap().success(), "{lines:#?}");
    lines
}

fn objects(lines: &[String]) -> Vec<Value> {
    let parse = |line: &String| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        for key in ["timestamp", "level", "message", "target"] {
            assert!(value[key].is_string(), "no {key} in {line}");
        }
        value
    };
    lines.iter().map(parse).collect()
}

#[test]
fn every_line_of_a_daemons_log_is_json_when_asked_for() {
    let folder = folder("");
    let mut command = granary(folder.path(), &["node", "--log-format", "json"]);
    // With whatever the libraries have to say.
    command.env("RUST_LOG", "trace");
    let said = objects(&lines(command, "could not open the store"));
    let levels = |level: &str| said.iter().filter(|one| one["level"] == level).count();
    assert!(levels("INFO") > 0 && levels("ERROR") == 1, "{said:#?}");
    let error = said.iter().find(|one| one["level"] == "ERROR").unwrap();
    let database = error["database"].as_str();
    assert!(database.is_some_and(|path| path.ends_with("no/such/db.sqlite")));
    let stopping = said.iter().any(|one| one["message"] == "stopping");
    assert!(stopping, "{said:#?}");
}

#[test]
fn the_configuration_names_the_form_and_the_command_line_wins() {
    let folder = folder("[log]\nformat = \"json\"\n");
    let said = objects(&lines(
        granary(folder.path(), &["anchor"]),
        "anchor is answering",
    ));
    assert!(said.iter().any(|one| one["address"].is_string()));
    let text = lines(
        granary(folder.path(), &["anchor", "--log-format", "text"]),
        "anchor is answering",
    );
    assert!(text.iter().all(|line| !line.starts_with('{')), "{text:?}");
}

#[test]
fn a_daemon_that_cannot_start_says_so_in_the_form_that_was_asked_for() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = folder("");
    let file = folder.path().join("granary.toml");
    let address = taken.local_addr().unwrap().to_string();
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("127.0.0.1:0", &address)).unwrap();
    let output = granary(folder.path(), &["--log-format", "json", "node"]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<_> = String::from_utf8(output.stderr)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    let said = objects(&lines);
    let last = said.last().unwrap();
    assert_eq!(last["level"], "ERROR");
    assert_eq!(last["command"], "node");
    assert!(
        last["error"].as_str().unwrap().contains(&address),
        "{last:?}"
    );
}

#[test]
fn rust_log_chooses_what_is_said_and_a_malformed_one_is_told() {
    let folder = folder("");
    let mut quiet = granary(folder.path(), &["node"]);
    quiet.env("RUST_LOG", "error");
    let said = lines(quiet, "could not open the store");
    assert!(said.iter().all(|line| line.contains("ERROR")), "{said:?}");
    let mut malformed = granary(folder.path(), &["node"]);
    malformed.env("RUST_LOG", "granary=loudly");
    let said = lines(malformed, "could not open the store");
    assert!(
        said[0].contains("WARN") && said[0].contains("granary=loudly"),
        "{said:?}"
    );
}

/// Fields of an entry in the journal's native protocol.
fn entry(mut bytes: &[u8]) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let line = String::from_utf8(bytes[..end].to_vec()).unwrap();
        bytes = &bytes[end + 1..];
        match line.split_once('=') {
            Some((name, value)) => fields.push((name.to_owned(), value.to_owned())),
            None => {
                let (length, rest) = bytes.split_at(8);
                let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
                let value = String::from_utf8(rest[..length].to_vec()).unwrap();
                fields.push((line, value));
                bytes = &rest[length + 1..];
            }
        }
    }
    fields
}

/// A daemon in a mount namespace whose `/run` is ours, with a journal that listens there or not.
fn in_own_run(folder: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user", "sh", "-c"]);
    command.arg("mount --bind \"$RUN\" /run && exec \"$GRANARY\" node --config \"$FILE\"");
    command.env("RUN", folder.join("run"));
    command.env("GRANARY", env!("CARGO_BIN_EXE_granary"));
    command.env("FILE", folder.join("granary.toml"));
    command.env_remove("RUST_LOG").stdout(Stdio::null());
    command
}

#[test]
fn under_systemd_the_journal_gets_fields_and_priorities() {
    let folder = folder("");
    let root = folder.path();
    fs::create_dir_all(root.join("run/systemd/journal")).unwrap();
    let journal = UnixDatagram::bind(root.join("run/systemd/journal/socket")).unwrap();
    journal.set_read_timeout(Some(GENEROUS)).unwrap();
    // systemd names the file that stderr is.
    let stderr = File::create(root.join("stderr")).unwrap();
    let metadata = stderr.metadata().unwrap();
    let mut command = in_own_run(root);
    command.env(
        "JOURNAL_STREAM",
        format!("{}:{}", metadata.dev(), metadata.ino()),
    );
    let mut child = command.stderr(stderr).spawn().unwrap();
    let mut buffer = vec![0; 65_536];
    let mut receive = || {
        let read = journal.recv(&mut buffer).expect("the journal hears");
        entry(&buffer[..read])
    };
    let get = |entry: &[(String, String)], name: &str| {
        let found = entry.iter().find(|(field, _)| field == name);
        found.map(|(_, value)| value.clone())
    };
    let (mut answering, mut failing) = (None, None);
    while answering.is_none() || failing.is_none() {
        let said = receive();
        match get(&said, "MESSAGE").as_deref() {
            Some("answering Nix") => answering = Some(said),
            Some(text) if text.starts_with("could not open the store") => failing = Some(said),
            _ => {}
        }
    }
    let (answering, failing) = (answering.unwrap(), failing.unwrap());
    assert_eq!(get(&answering, "PRIORITY").as_deref(), Some("6"));
    assert_eq!(
        get(&answering, "SYSLOG_IDENTIFIER").as_deref(),
        Some("granary")
    );
    assert!(get(&answering, "GRANARY_ADDRESS").is_some_and(|text| text.starts_with("127.0.0.1:")));
    assert_eq!(get(&failing, "PRIORITY").as_deref(), Some("3"));
    assert!(get(&failing, "GRANARY_DATABASE").is_some_and(|text| text.ends_with("db.sqlite")));
    terminate(&child);
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_to_string(root.join("stderr")).unwrap(), "");
}

#[test]
fn a_journal_that_is_not_there_costs_the_fields_and_no_word() {
    let folder = folder("");
    fs::create_dir_all(folder.path().join("run")).unwrap();
    let mut command = in_own_run(folder.path());
    command.env("GRANARY_LOG_FORMAT", "journald");
    command.stderr(Stdio::piped());
    let said = lines(command, "could not open the store");
    assert!(said[0].contains("could not reach the journal"), "{said:?}");
}
