//! What stands beside the binary outside NixOS (`packaging/`): units, man pages, completions, the Debian package.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging")
}

fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output
}

fn granary(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command.args(arguments);
    command
}

fn words(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The keys of a unit's section, each with its values in order.
fn section(unit: &str, name: &str) -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(packaging().join("systemd").join(unit)).unwrap();
    let mut keys = BTreeMap::<_, Vec<_>>::new();
    let mut is_in = false;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with('[') {
            is_in = line == format!("[{name}]");
        } else if let (true, Some((key, value))) = (is_in, line.split_once('=')) {
            keys.entry(key.to_owned())
                .or_default()
                .push(value.to_owned());
        }
    }
    keys
}

#[test]
fn units_forbid_what_the_nixos_modules_forbid() {
    let file = packaging().join("../nixos/unit.nix");
    let output = run(Command::new("nix-instantiate")
        .env("NIX_REMOTE", "dummy://")
        .args(["--eval", "--strict", "--json"])
        .arg(file));
    let hardening: Value = serde_json::from_slice(&output.stdout).unwrap();
    for unit in ["granary.service", "granary-anchor.service"] {
        let ours = section(unit, "Service");
        for (key, expected) in hardening.as_object().unwrap() {
            let found = ours
                .get(key)
                .unwrap_or_else(|| panic!("{unit} has no {key}"));
            let one = |value: &Value| match value {
                Value::String(word) => word.clone(),
                other => other.to_string(),
            };
            match expected.as_array() {
                // systemd takes several values in one line or one in each.
                Some(list) => assert_eq!(
                    found.join(" "),
                    list.iter().map(one).collect::<Vec<_>>().join(" "),
                    "{key}"
                ),
                None => assert_eq!(found, &[one(expected)], "{key}"),
            }
        }
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units_and_little_exposed() {
    let folder = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for name in [
        "granary.socket",
        "granary.service",
        "granary-anchor.service",
    ] {
        let text = fs::read_to_string(packaging().join("systemd").join(name)).unwrap();
        // What is started must be there to be found.
        let text = text.replace("/usr/bin/granary", env!("CARGO_BIN_EXE_granary"));
        let unit = folder.path().join(name);
        fs::write(&unit, text).unwrap();
        units.push(unit);
    }
    let output = run(Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    for unit in &units[1..] {
        // Tenths; beyond 4.0 systemd calls a unit "medium", up to 2.0 "ok" is its best.
        run(Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=20"])
            .arg(unit));
    }
}

#[test]
fn every_command_has_a_man_page_and_every_page_that_a_unit_names_is_there() {
    let folder = tempfile::tempdir().unwrap();
    run(granary(&["man"]).arg(folder.path()));
    let pages: BTreeSet<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let help = words(&run(&mut granary(&["help"])));
    let commands: Vec<_> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .map(|line| line.split_whitespace().next().unwrap())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() >= 20, "{commands:?}");
    for command in commands {
        assert!(pages.contains(&format!("granary-{command}.1")), "{command}");
    }
    for unit in [
        "granary.socket",
        "granary.service",
        "granary-anchor.service",
    ] {
        for page in &section(unit, "Unit")["Documentation"] {
            let page = page.strip_prefix("man:").unwrap().replace("(1)", ".1");
            assert!(pages.contains(&page), "{page}");
        }
    }
    let page = fs::read_to_string(folder.path().join("granary.1")).unwrap();
    assert!(
        page.contains(".TH") && page.contains("Exit status"),
        "{page}"
    );
}

#[test]
fn bash_completes_commands_and_their_options() {
    let script = words(&run(&mut granary(&["completions", "bash"])));
    let complete = |line: &str, last: usize| {
        let program = format!(
            "{script}\nCOMP_WORDS=({line}); COMP_CWORD={last}; \
             _granary granary \"${{COMP_WORDS[{last}]}}\" \"${{COMP_WORDS[{last}-1]}}\"; echo \"${{COMPREPLY[@]}}\""
        );
        words(&run(Command::new("bash").args(["-c", &program])))
    };
    assert_eq!(complete("granary pus", 1), "push\n");
    assert!(complete("granary push --tok", 2).contains("--token-file"));
    for shell in ["zsh", "fish"] {
        let script = words(&run(&mut granary(&["completions", shell])));
        assert!(script.contains("check-config"), "{shell}");
    }
}

#[test]
fn the_debian_package_has_all_of_it_and_nothing_of_the_builder() {
    let folder = tempfile::tempdir().unwrap();
    let binary = env!("CARGO_BIN_EXE_granary");
    let script = packaging().join("deb");
    let mut pack = Command::new(script);
    pack.env("GRANARY_DEB_COMPRESSION", "none");
    let made = words(&run(pack.arg(binary).arg(folder.path())));
    let file = made.trim();
    let listing = words(&run(Command::new("dpkg-deb").args(["--contents", file])));
    for line in listing.lines() {
        assert!(line.contains("root/root"), "{line}");
        assert_ne!(&line[8..9], "w", "others may write: {line}");
    }
    for path in [
        "/usr/bin/granary",
        "/lib/systemd/system/granary.service",
        "/lib/systemd/system/granary.socket",
        "/lib/systemd/system/granary-anchor.service",
        "/usr/lib/sysusers.d/granary.conf",
        "/usr/share/man/man1/granary-push.1.gz",
        "/usr/share/man/man5/granary.toml.5.gz",
        "/usr/share/bash-completion/completions/granary",
        "/usr/share/doc/granary/copyright",
    ] {
        assert!(
            listing.lines().any(|line| line.ends_with(path)),
            "{path} is not in {listing}"
        );
    }
    // Unpacked, it is a binary that runs and a configuration that it accepts.
    let root = folder.path().join("root");
    run(Command::new("dpkg-deb")
        .args(["--extract", file])
        .arg(&root));
    let installed = root.join("usr/bin/granary");
    let version = words(&run(Command::new(&installed).arg("--version")));
    let field = words(&run(
        Command::new("dpkg-deb").args(["--field", file, "Version"])
    ));
    assert_eq!(version, format!("granary {field}"));
    for name in ["granary.toml", "anchor.toml"] {
        run(Command::new(&installed)
            .args(["check-config", "--offline"])
            .arg(root.join("etc/granary").join(name))
            .env_remove("GRANARY_CONFIG"));
    }
}
