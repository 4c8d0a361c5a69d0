//! The NixOS modules (`nixos/`), evaluated by the Nix that is here: what each example becomes, and that
//! mistakes are named where they are made.
//!
//! The modules meet a small `lib` of our own, so that no network is needed. With `GRANARY_NIXPKGS_LIB`
//! (a folder with nixpkgs' `lib`; that of June 2026 evaluates with Nix 2.8) and `GRANARY_NIX_INSTANTIATE` (words of a command)
//! they meet the real one. `GRANARY_UPDATE=1` writes `nixos/tests/expected.json` anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn nixos() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../nixos")
}

/// Evaluates an expression in which `evaluate` is `nixos/tests/evaluate.nix`.
fn instantiate(expression: &str) -> Output {
    let words = std::env::var("GRANARY_NIX_INSTANTIATE").unwrap_or("nix-instantiate".into());
    let mut words = words.split_whitespace();
    let file = nixos().join("tests/evaluate.nix");
    let arguments = match std::env::var("GRANARY_NIXPKGS_LIB") {
        Ok(lib) => format!("{{ lib = import {lib}; }}"),
        Err(_) => "{ }".into(),
    };
    let expression = format!(
        "let evaluate = import {} {arguments}; in {expression}",
        file.display()
    );
    Command::new(words.next().expect("a command"))
        .args(words)
        // Nothing is built and nothing is written: no store is needed.
        .env("NIX_REMOTE", "dummy://")
        .args(["--eval", "--strict", "--json", "--expr", &expression])
        .output()
        .expect("run nix-instantiate")
}

fn examples() -> Value {
    let output = instantiate("evaluate.examples");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Says where two values differ, so that nobody has to compare a thousand lines.
fn differences(place: &str, expected: &Value, found: &Value, out: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for name in expected.keys().chain(found.keys()) {
                let none = Value::Null;
                let (a, b) = (
                    expected.get(name).unwrap_or(&none),
                    found.get(name).unwrap_or(&none),
                );
                differences(&format!("{place}.{name}"), a, b, out);
            }
        }
        (a, b) if a != b => out.push(format!("{place}: expected {a}, found {b}")),
        _ => {}
    }
}

#[test]
fn every_example_becomes_the_units_settings_and_toml_that_are_written_down() {
    let found = examples();
    let file = nixos().join("tests/expected.json");
    if std::env::var_os("GRANARY_UPDATE").is_some_and(|word| word == "1") {
        let text = serde_json::to_string_pretty(&found).unwrap();
        fs::write(&file, format!("{text}\n")).unwrap();
    }
    let expected: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let mut problems = Vec::new();
    differences("", &expected, &found, &mut problems);
    problems.dedup();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn the_toml_of_every_example_passes_check_config() {
    let folder = tempfile::tempdir().unwrap();
    let mut checked = 0;
    for (name, example) in examples().as_object().unwrap() {
        for (role, toml) in example["toml"].as_object().unwrap() {
            let Some(toml) = toml.as_str() else { continue };
            let file = folder.path().join(format!("{name}-{role}.toml"));
            fs::write(&file, toml).unwrap();
            let output = Command::new(env!("CARGO_BIN_EXE_granary"))
                .args(["check-config", "--offline"])
                .arg(&file)
                .env_remove("GRANARY_CONFIG")
                .output()
                .unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{error}\n{toml}");
            checked += 1;
        }
    }
    assert!(checked >= 9, "{checked} files");
}

#[test]
fn every_unit_is_hardened_and_unprivileged() {
    for (name, example) in examples().as_object().unwrap() {
        for (unit, service) in example["services"].as_object().unwrap() {
            assert_eq!(service["isHardened"], true, "{unit} of {name}");
            let user = unit.strip_suffix("-keys").unwrap_or(unit);
            assert_eq!(service["serviceConfig"]["User"], user, "{name}");
            assert!(
                example["users"]["users"][user].is_object(),
                "{unit} of {name}"
            );
        }
    }
}

#[test]
fn a_wrong_option_is_named_at_evaluation() {
    for (module, name) in [
        (
            "services.granary.openFirewal = true",
            "services.granary.openFirewal",
        ),
        (
            "services.granary.settings.substituter.priority = \"high\"",
            "services.granary.settings.substituter.priority",
        ),
        (
            "services.granary.settings.mesh.peers = \"desk:4727\"",
            "services.granary.settings.mesh.peers",
        ),
        ("services.granary.anchors = [ { urls = \"x\"; } ]", "urls"),
        (
            "services.granary.anchors = [ { url = \"http://x/main\"; tokenFile = \"/nix/store/x\"; } ]",
            "services.granary.anchors",
        ),
        (
            "services.granary.ticketFile = \"/nix/store/x\"",
            "services.granary.ticketFile",
        ),
        (
            "services.granary.settings.substituter.listen = [ \"unix:/run/x\" ]",
            "services.granary.settings.substituter.listen",
        ),
        (
            "services.granary-anchor = { enable = true; ticketFile = \"/x\"; }",
            "services.granary-anchor is to be a member beside services.granary",
        ),
        (
            "services.granary-anchor.s3Credentials = \"/x\"",
            "services.granary-anchor.s3Credentials",
        ),
        (
            "keystone.binaryCache.enable = true",
            "keystone.binaryCache.publicKey",
        ),
        (
            "keystone.binaryCache.pubKey = \"x\"",
            "keystone.binaryCache.pubKey",
        ),
    ] {
        let keystone = nixos().join("keystone.nix");
        let output = instantiate(&format!(
            "evaluate.evaluate {{ imports = [ {} {{ services.granary.enable = true; }} ]; {module}; }}",
            keystone.display(),
        ));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{module} was accepted");
        assert!(error.contains(name), "{module}: {error}");
    }
}

#[test]
fn a_key_that_no_option_knows_is_named_when_the_file_is_checked() {
    let node = nixos().join("node.nix");
    let output = instantiate(&format!(
        "(evaluate.evaluate {{ imports = [ {} ]; services.granary.enable = true; services.granary.settings.mesh.pears = [ ]; }}).toml.node",
        node.display(),
    ));
    let toml: Value = serde_json::from_slice(&output.stdout).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("granary.toml");
    fs::write(&file, toml.as_str().unwrap()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["check-config", "--offline"])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    for part in ["line ", "`pears`", "did you mean `peers`"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn every_nix_file_is_well_formed() {
    let mut files = vec![nixos().join("../flake.nix")];
    for folder in ["", "tests", "examples"] {
        for entry in fs::read_dir(nixos().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "nix") {
                files.push(path);
            }
        }
    }
    let output = Command::new("nix-instantiate")
        .env("NIX_REMOTE", "dummy://")
        .arg("--parse")
        .args(&files)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert!(files.len() > 15);
}
