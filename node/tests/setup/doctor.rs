//! `granary doctor`: finds what is broken on purpose, and its advice mends it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::machine::{Machine, free_port};
use crate::up::Up;

/// What the doctor says about a subject; the worst of it.
fn finding(machine: &Machine, subject: &str) -> serde_json::Value {
    let output = machine.granary(&["doctor", "--json"]).output().unwrap();
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let is_failed = |one: &&serde_json::Value| one["verdict"] == "failed";
    let has_failed = findings.iter().any(|one| is_failed(&one));
    assert_eq!(output.status.code(), Some(i32::from(has_failed)));
    let about = findings.iter().filter(|one| one["subject"] == subject);
    let about: Vec<_> = about.collect();
    let worst = about
        .iter()
        .copied()
        .find(is_failed)
        .or(about.first().copied());
    let said = || panic!("nothing about {subject} in {findings:#?}");
    worst.cloned().unwrap_or_else(said)
}

fn assert_well(machine: &Machine, subject: &str) {
    let finding = finding(machine, subject);
    assert_ne!(finding["verdict"], "failed", "{finding}");
}

/// Asserts that the doctor sees it, and returns its advice and its command.
fn assert_broken(machine: &Machine, subject: &str, found: &str) -> (String, String) {
    let finding = finding(machine, subject);
    assert_eq!(finding["verdict"], "failed", "{finding}");
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    assert!(text("found").contains(found), "{finding}");
    (text("advice"), text("command"))
}

/// Runs a command of the doctor's as a person would.
fn follow(machine: &Machine, command: &str) {
    let program = Path::new(env!("CARGO_BIN_EXE_granary"));
    let path = format!("{}:/usr/bin:/bin", program.parent().unwrap().display());
    let granary = machine.granary(&[]);
    let mut shell = Command::new("sh");
    for (name, value) in granary.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    let output = shell.args(["-c", command]).env("PATH", path).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// An HTTP server that lives in 1994.
fn old_clock() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let answer = "HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
                          Content-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    format!("http://{address}/old")
}

#[test]
fn each_broken_set_up_is_found_and_the_advice_mends_it() {
    let mut machine = Machine::new();
    machine.make_store();
    let state = machine.file("state");
    fs::create_dir(&state).unwrap();
    set_mode(&state, 0o700);
    let key_file = state.join("mesh.key").display().to_string();
    let mesh_key = machine.run(&["mesh", "create", "--key-file", &key_file]);
    let (mesh, transfer, anchor) = (free_port(), free_port(), free_port());
    let url = format!("http://127.0.0.1:{anchor}/main");
    let healthy = format!(
        "[mesh]\nkey = \"{}\"\nlisten = [\"127.0.0.1:{mesh}\"]\n\
         transfer = [\"127.0.0.1:{transfer}\"]\nmdns = false\n\
         [[anchor]]\nurl = \"{url}\"\ntoken-file = \"{}/anchor.token\"\n\
         [anchor-server]\nlisten = \"127.0.0.1:{anchor}\"\n[upload]\ncache = \"main\"\n",
        mesh_key.trim(),
        state.display()
    );
    machine.extra = healthy.clone();
    let up = Up::start(&machine);
    up.wait("the lines", || up.said().contains("granary token create"));
    machine.run(&["use"]);
    up.wait("a healthy machine", || {
        let output = machine.granary(&["doctor"]).output().unwrap();
        output.status.success()
    });

    // Nix.
    let conf = fs::read_to_string(machine.nix_conf()).unwrap();
    let without = |word: &str| {
        let lines = conf.lines().filter(|line| !line.contains(word));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    machine.extra = format!("{healthy}[trust]\nkeys = [\"{KEY}\"]\n");
    for (word, subject, found) in [
        (
            "substituters",
            "nix substituter",
            "not among the substituters",
        ),
        ("none", "nix keys", "does not trust desk-1"),
        ("ttl", "nix memory of misses", "3600 s"),
    ] {
        fs::write(machine.nix_conf(), without(word)).unwrap();
        let (_, command) = assert_broken(&machine, subject, found);
        follow(&machine, &command);
        assert_well(&machine, subject);
    }
    machine.extra = healthy.clone();

    // Modes.
    let token = state.join("anchor.token");
    for (path, mode, subject) in [
        (&state, 0o755, "state folder"),
        (&state.join("identity"), 0o644, "identity"),
        (&token, 0o640, "token"),
    ] {
        set_mode(path, mode);
        let (_, command) = assert_broken(&machine, subject, "mode");
        follow(&machine, &command);
        assert_well(&machine, subject);
    }

    // The certificate: none, expired, of another mesh.
    let certificate = state.join("certificate");
    let other = machine.file("other.key").display().to_string();
    machine.run(&["mesh", "create", "--key-file", &other]);
    let peer = machine.run(&["identity"]).trim().to_owned();
    let admit = |key: &str, days: &str| {
        let out = certificate.display().to_string();
        let admit = [
            "mesh",
            "admit",
            &peer,
            "--key-file",
            key,
            "--out",
            &out,
            "--days",
            days,
        ];
        machine.run(&admit);
    };
    for found in ["there is no certificate", "expired", "does not verify"] {
        match found {
            "expired" => admit(&key_file, "0"),
            "does not verify" => admit(&other, "30"),
            _ => fs::remove_file(&certificate).unwrap(),
        }
        let (advice, _) = assert_broken(&machine, "certificate", found);
        assert!(
            advice.contains(&format!("granary mesh admit {peer}")),
            "{advice}"
        );
        admit(&key_file, "30");
        assert_well(&machine, "certificate");
    }

    // The token.
    fs::write(&token, "x.y.z").unwrap();
    let (advice, _) = assert_broken(&machine, "token", "TokenInvalid");
    assert!(
        advice.contains(
            "granary token create --subject <this machine> --cache main --allow pull,push"
        )
    );
    let create = [
        "token",
        "create",
        "--subject",
        "x",
        "--cache",
        "main",
        "--allow",
        "pull,push",
    ];
    fs::write(&token, machine.run(&create)).unwrap();
    assert_well(&machine, "token");

    // The cache's name, the clock, the store, the file itself.
    let breaks = [
        (
            healthy
                .replace("/main\"", "/mian\"")
                .replace("\"main\"", "\"mian\""),
            "token",
            "refuses it",
        ),
        (
            healthy
                .replace(&url, &old_clock())
                .replace("\"main\"", "\"old\""),
            "clock",
            "apart",
        ),
        (
            format!("{healthy}[substitutor]\n"),
            "configuration",
            "did you mean `substituter`",
        ),
    ];
    for (broken, subject, found) in breaks {
        machine.extra = broken;
        assert_broken(&machine, subject, found);
    }
    machine.extra = healthy;
    for subject in ["anchor", "clock"] {
        assert_well(&machine, subject);
    }
    let database = machine.file("nix/var/nix/db/db.sqlite");
    let aside = machine.file("aside.sqlite");
    up.stop();

    // Nothing runs.
    assert_broken(&machine, "node", "no node answers");
    assert_broken(&machine, "anchor", "");
    let taken = TcpListener::bind(("127.0.0.1", mesh)).unwrap();
    assert_broken(&machine, "mesh ports", "cannot be had");
    drop(taken);
    assert_well(&machine, "mesh ports");
    fs::rename(&database, &aside).unwrap();
    assert_broken(&machine, "store", "no Nix database");
    // A machine that has no nix.conf either keeps an anchor without Nix.
    let conf = machine.file("conf.aside");
    fs::rename(machine.nix_conf(), &conf).unwrap();
    let said = machine.granary(&["doctor"]).output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("no Nix is here"), "{said}");
    assert!(!said.contains("nix substituter"), "{said}");
    fs::rename(&conf, machine.nix_conf()).unwrap();
    fs::rename(&aside, &database).unwrap();
    let up = Up::start(&machine);
    up.wait("a healthy machine", || {
        let output = machine.granary(&["doctor"]).output().unwrap();
        output.status.success()
    });
    up.stop();
}

const KEY: &str = "desk-1:2PRfJyUtYp1J5YhTn1gPbTRkoSJpJGeTTYYoVYXUsyI=";
