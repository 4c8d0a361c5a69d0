//! The shape of the house (ARCHITECTURE.md), held by a test.
//!
//! A new edge between modules, a file that grew past what one sitting reads, a protocol that reaches
//! for the machine: each is a decision. It is made here, in the same commit as the code that needs it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which modules of `node` each module may name, in reading order.
///
/// A module may name only modules that stand above it, so there can be no circle. Modules of one
/// folder (`store/*`, `mesh/*`) count as the module they belong to.
const EDGES: &[(&str, &[&str])] = &[
    ("clock", &[]),
    // How an error and its causes are said, by whoever says them.
    ("log", &[]),
    ("secret", &[]),
    ("identity", &["secret"]),
    ("metrics", &[]),
    // Counts by the hour and day; it is given the time.
    ("history", &["metrics"]),
    ("activity", &[]),
    ("allowance", &[]),
    ("listener", &[]),
    ("supervisor", &[]),
    // Its files belong to whom secrets belong to.
    ("state_folder", &["secret"]),
    ("authority", &[]),
    ("loopback_key", &["secret", "state_folder"]),
    // What a browser is shown, of a node and of an anchor.
    ("page", &[]),
    // What a person hides is a file of the state folder. Signatures by the loopback key are shown to nobody.
    ("store", &["state_folder", "loopback_key"]),
    // Where a machine joined is a file of the state folder. A daemon is told in which form to log.
    (
        "config",
        // From where keys may be taken.
        &["log", "authority", "store", "listener", "state_folder"],
    ),
    ("index", &[]),
    ("place", &[]),
    ("credential", &[]),
    // Who stands there is counted.
    ("crowd", &["allowance", "metrics"]),
    // Strangers stand in one crowd, on whatever port they came; members have allowances.
    (
        "serve",
        &["store", "identity", "metrics", "allowance", "crowd"],
    ),
    (
        "binary_cache",
        &["authority", "credential", "identity", "log", "serve"],
    ),
    (
        "mesh",
        // The mind asks caches for narinfos through the loop, as it asks peers.
        // A list of revocations is a file of the state folder.
        &[
            "index",
            // Where the machine is says where to announce.
            "place",
            "store",
            "binary_cache",
            "clock",
            "identity",
            "state_folder",
            // Who is not admitted stands in the crowd; who says too much waits.
            "allowance",
            "crowd",
        ],
    ),
    // It knows newcomers by TLS, and who was put out by the file of revocations.
    (
        "admission",
        &[
            "clock",
            "identity",
            "mesh",
            "secret",
            "serve",
            "state_folder",
        ],
    ),
    // It sends what the store has, to whatever anchor; it shares no code with that.
    (
        "upload",
        // A member's token is a file of the state folder.
        &[
            "store",
            "clock",
            "log",
            "secret",
            "authority",
            // A member's is shown to its caches as well.
            "credential",
            "state_folder",
        ],
    ),
    (
        "status",
        &[
            "page",
            "mesh",
            "store",
            "metrics",
            "activity",
            "history",
            "upload",
            // What anchors told of their caches is shown as it came.
            "binary_cache",
        ],
    ),
    (
        "substituter",
        &[
            // A page says for how long a certificate lasts.
            "clock",
            // What it does is shown while it does it.
            "activity",
            "history",
            "mesh",
            "store",
            "binary_cache",
            "serve",
            "status",
            "config",
            "metrics",
            "listener",
            "upload",
        ],
    ),
    // The durable role knows its own files, how answers, ranges and pages are written, numbers for Prometheus,
    // which files may hold a secret, and whom to trust when it asks an issuer for keys. What it publishes stands behind
    // the seam of the store, for the node beside it to share; it unpacks as a node does.
    (
        "anchor",
        &[
            "page",
            "store",
            "serve",
            "binary_cache",
            "log",
            "metrics",
            "secret",
            "authority",
            "credential",
            // Who has not asked anything yet may have to make room.
            "crowd",
            // Members get tokens while this machine's own certificate is good, and until the file that the mesh keeps says
            // that they were put out.
            "mesh",
            "state_folder",
        ],
    ),
    ("nix_conf", &[]),
    // The daemon wires everything, and only the command line and the demo start one. It may have an anchor beside it.
    (
        "daemon",
        &[
            "anchor",
            "clock",
            "log",
            // Whose file is one of the state folder.
            "history",
            "config",
            "crowd",
            "loopback_key",
            // A key that signs for the LAN is for its owner alone.
            "secret",
            "admission",
            "identity",
            "state_folder",
            "authority",
            "credential",
            "listener",
            "store",
            "serve",
            "binary_cache",
            "mesh",
            // Where the machine is says which connections are taken.
            "place",
            "status",
            "substituter",
            "upload",
        ],
    ),
    ("loopback", &["listener"]),
    (
        "demo",
        &[
            "clock", "config", "identity", "listener", "store", "daemon", "loopback", "status",
        ],
    ),
    (
        "doctor",
        &[
            "clock",
            "log",
            "config",
            "identity",
            "state_folder",
            "authority",
            "store",
            "upload",
            "status",
            "nix_conf",
            "daemon",
            "loopback",
        ],
    ),
    (
        "cli",
        &[
            // The mesh key that root makes is the node's.
            "secret",
            "clock",
            "log",
            "config",
            "loopback_key",
            "admission",
            "identity",
            "state_folder",
            "authority",
            "listener",
            "supervisor",
            "store",
            "status",
            "daemon",
            "loopback",
            "demo",
            "anchor",
            "upload",
            "nix_conf",
            "doctor",
            // A list of revocations is made with the mesh key, and read by the mesh.
            "mesh",
        ],
    ),
];

/// Parts of `std` that act on the machine, which the protocol must not name.
const PROTOCOL_MUST_NOT_NAME: &[&str] = &[
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "std::env",
    "std::os",
    "std::time::SystemTime",
    "std::time::UNIX_EPOCH",
];
/// Plain values that happen to live in a module named above.
const PROTOCOL_MAY_NAME: &[&str] = &[
    "std::net::IpAddr",
    "std::net::Ipv4Addr",
    "std::net::Ipv6Addr",
    "std::net::SocketAddr",
    "std::net::SocketAddrV4",
    "std::net::SocketAddrV6",
    "std::net::AddrParseError",
];
/// Crates that perform I/O, read clocks or draw randomness.
const PROTOCOL_MUST_NOT_DEPEND_ON: &[&str] = &[
    "tokio",
    "libp2p",
    "hyper",
    "rusqlite",
    "reqwest",
    "rustls",
    "mio",
    "rand",
    "getrandom",
    "socket2",
];

/// Past this, ask whether two nouns live in one file.
const FILE_LINES_MAX: usize = 1_000;
/// Longer files, each with the reason.
const LONGER_FILES: &[(&str, &str)] = &[];

#[test]
fn modules_of_the_node_name_only_what_the_table_allows() {
    assert_empty(edge_violations(&sources("node/src")));
    for (position, (module, allowed)) in EDGES.iter().enumerate() {
        for name in *allowed {
            let above = EDGES[..position].iter().any(|(other, _)| other == name);
            assert!(
                above,
                "the table lets {module} name {name}, which does not stand above it"
            );
        }
    }
}

#[test]
fn siblings_in_the_mind_do_not_name_each_other() {
    assert_empty(sibling_violations(&sources("protocol/src/mesh")));
}

#[test]
fn protocol_does_not_name_the_machine() {
    assert_empty(machine_violations(&sources("protocol/src")));
}

#[test]
fn protocol_and_simulations_depend_on_nothing_that_acts() {
    for package in ["granary-protocol", "granary-simulations"] {
        let crates = crates_under(package);
        assert!(crates.contains("sha2"), "cargo tree lists {crates:?}");
        let found: Vec<_> = PROTOCOL_MUST_NOT_DEPEND_ON
            .iter()
            .filter(|name| crates.contains(**name))
            .collect();
        assert!(found.is_empty(), "{package} depends on {found:?}");
    }
}

#[test]
fn files_stay_readable_in_one_sitting() {
    assert_empty(length_violations(&workspace_sources()));
}

#[test]
fn every_error_in_the_log_names_its_subject_in_a_field() {
    assert_empty(subject_violations(&sources("node/src")));
}

#[test]
fn no_test_is_ignored() {
    assert_empty(ignore_violations(&workspace_sources()));
}

#[test]
fn the_table_of_conformance_names_tests_that_exist() {
    let table = fs::read_to_string(workspace().join("node/tests/CONFORMANCE.md"));
    let table = table.expect("read the table");
    let mut sources = Vec::new();
    read_into(&workspace().join("node/tests"), &mut sources);
    read_into(&workspace().join("protocol/tests"), &mut sources);
    assert_empty(conformance_violations(&table, &sources));
}

#[test]
fn security_names_tests_that_exist() {
    let text = fs::read_to_string(workspace().join("SECURITY.md")).expect("read SECURITY.md");
    let mut sources = Vec::new();
    for folder in ["node/tests", "node/src", "protocol/tests", "protocol/src"] {
        read_into(&workspace().join(folder), &mut sources);
    }
    let named = |text: &str| named_tests(text).len();
    assert!(named(&text) > 30, "the file names its tests");
    // Each row of a table is a claim.
    let rows = text.lines().filter(|line| line.starts_with("| "));
    let bare = rows.filter(|row| !row.contains("| tests |") && named(row) == 0);
    assert_empty(bare.map(|row| format!("no test: {row}")).collect());
    let missing = named_tests(&text)
        .into_iter()
        .filter(|name| !exists(name, &sources));
    assert_empty(
        missing
            .map(|(file, name)| format!("there is no {file}::{name}"))
            .collect(),
    );
}

// The rules, each from sources to complaints, so that the tests below can break them.

struct Source {
    /// Relative to the workspace, with `/`.
    path: String,
    text: String,
}

/// Whoever filters a log looks for the cache, the file, the peer; an error alone has them in its words only.
fn subject_violations(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        for (at, _) in source.text.match_indices("error!(") {
            let arguments = &source.text[at + "error!(".len()..];
            // Facts in fields come first, then the constant message: after `(` or a comma, but not after `=`.
            let message = arguments.match_indices('"').find(|(quote, _)| {
                let before = arguments[..*quote].trim_end();
                before.is_empty() || before.ends_with(',')
            });
            let fields = message.map_or(arguments, |(message, _)| &arguments[..message]);
            let is_subject = |field: &str| {
                let name = field.split('=').next().unwrap_or_default();
                let name = name.trim().trim_start_matches(['%', '?']);
                !matches!(name, "" | "error" | "problem")
            };
            if !fields.split(',').any(is_subject) {
                let line = source.text[..at].lines().count();
                violations.push(format!(
                    "{}:{line}: an error without its subject",
                    source.path
                ));
            }
        }
    }
    violations
}

fn edge_violations(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        let inside = source
            .path
            .strip_prefix("node/src/")
            .expect("a file of the node");
        let (module, is_top) = match inside.split_once('/') {
            Some((module, _)) => (module, false),
            None => (inside.strip_suffix(".rs").expect("a Rust file"), true),
        };
        if matches!(module, "lib" | "main") {
            continue;
        }
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == module) else {
            violations.push(format!(
                "{}: module {module} is not in the table of edges",
                source.path
            ));
            continue;
        };
        for path in named_paths(&code_of(&source.text)) {
            let names: Vec<&str> = path.split("::").collect();
            match names.as_slice() {
                ["crate", name, ..]
                    if *name != module
                        && EDGES.iter().any(|(other, _)| other == name)
                        && !allowed.contains(name) =>
                {
                    violations.push(format!(
                        "{}: {module} must not name {name} ({path})",
                        source.path
                    ));
                }
                // `super` would reach another module past the table.
                ["super", "super", ..] => {
                    violations.push(format!("{}: write crate:: for {path}", source.path))
                }
                ["super", ..] if is_top => {
                    violations.push(format!("{}: write crate:: for {path}", source.path))
                }
                _ => {}
            }
        }
    }
    violations
}

fn sibling_violations(sources: &[Source]) -> Vec<String> {
    let name_of = |source: &Source| {
        source
            .path
            .rsplit('/')
            .next()
            .and_then(|file| file.strip_suffix(".rs"))
            .map(str::to_owned)
    };
    let siblings: Vec<String> = sources.iter().filter_map(name_of).collect();
    let mut violations = Vec::new();
    for source in sources {
        let own = name_of(source);
        for path in named_paths(&code_of(&source.text)) {
            let inside = path
                .strip_prefix("super::")
                .or_else(|| path.strip_prefix("crate::mesh::"));
            let named = inside
                .and_then(|inside| inside.split("::").next())
                .map(str::to_owned);
            if named.is_some()
                && named != own
                && named.as_ref().is_some_and(|named| siblings.contains(named))
            {
                violations.push(format!("{}: names its sibling ({path})", source.path));
            }
        }
    }
    violations
}

fn machine_violations(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        for path in named_paths(&code_of(&source.text)) {
            let is_in =
                |banned: &&&str| path == **banned || path.starts_with(&format!("{banned}::"));
            if PROTOCOL_MUST_NOT_NAME.iter().any(|banned| is_in(&banned))
                && !PROTOCOL_MAY_NAME.iter().any(|value| is_in(&value))
            {
                violations.push(format!("{}: names {path}", source.path));
            }
        }
    }
    violations
}

fn length_violations(sources: &[Source]) -> Vec<String> {
    let is_listed = |path: &str| LONGER_FILES.iter().any(|(listed, _)| *listed == path);
    sources
        .iter()
        .map(|source| (source, source.text.lines().count()))
        .filter(|(source, lines)| *lines > FILE_LINES_MAX && !is_listed(&source.path))
        .map(|(source, lines)| {
            format!(
                "{} has {lines} lines; do two nouns live in it?",
                source.path
            )
        })
        .collect()
}

fn ignore_violations(sources: &[Source]) -> Vec<String> {
    // Spelled in two parts, or this file would find itself.
    let needle = concat!("#[", "ignore");
    sources
        .iter()
        .filter(|source| source.text.contains(needle))
        .map(|source| format!("{}: a skipped promise is a broken one", source.path))
        .collect()
}

/// Checks that every client depends on, whatever else Granary does.
const CHECKS: std::ops::RangeInclusive<u32> = 1..=55;

fn conformance_violations(table: &str, sources: &[Source]) -> Vec<String> {
    let rows: Vec<(u32, &str)> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "))
        .filter_map(|(number, row)| Some((number.parse().ok()?, row)))
        .collect();
    let mut violations = Vec::new();
    for check in CHECKS {
        if !rows.iter().any(|(number, _)| *number == check) {
            violations.push(format!("check {check} has no row"));
        }
    }
    for (number, row) in rows {
        let names = named_tests(row);
        if names.is_empty() {
            violations.push(format!("check {number} names no test"));
        }
        for (file, function) in names {
            if !exists(&(file, function), sources) {
                violations.push(format!("check {number}: there is no {file}::{function}"));
            }
        }
    }
    violations
}

/// The names in backticks that are a file and a function.
fn named_tests(text: &str) -> Vec<(&str, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|name| name.split_once("::")).collect()
}

fn exists((file, function): &(&str, &str), sources: &[Source]) -> bool {
    let (end, function) = (format!("/{file}.rs"), format!("fn {function}("));
    let is_it = |source: &Source| source.path.ends_with(&end) && source.text.contains(&function);
    sources.iter().any(is_it)
}

// Reading the workspace.

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_owned()
}

/// The Rust files under a folder, without unit tests in files of their own (`tests.rs`).
fn sources(folder: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    read_into(&workspace().join(folder), &mut sources);
    sources
        .retain(|source| !source.path.ends_with("/tests.rs") && !source.path.contains("/tests/"));
    sources
}

/// Every Rust file of the three crates: sources, tests, benches, fuzz targets.
fn workspace_sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for package in ["protocol", "node", "simulations"] {
        read_into(&workspace().join(package), &mut sources);
    }
    assert!(
        sources.len() > 20,
        "found {} files: is the workspace elsewhere?",
        sources.len()
    );
    sources
}

fn read_into(folder: &Path, sources: &mut Vec<Source>) {
    // A folder that does not exist yet has no sources; one that cannot be read is a failure.
    if !folder.exists() {
        return;
    }
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .expect("list folder")
        .map(|entry| entry.expect("read entry").path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                read_into(&path, sources);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path
                .strip_prefix(workspace())
                .expect("a file of the workspace");
            let text = fs::read_to_string(&path).expect("read source");
            sources.push(Source {
                path: relative.to_string_lossy().into_owned(),
                text,
            });
        }
    }
}

/// The names of the crates that a package is linked with.
fn crates_under(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--package",
            package,
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--locked",
            "--offline",
        ])
        .current_dir(workspace())
        .output()
        .expect("run cargo tree");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect()
}

// Reading Rust, as much of it as the rules need.

/// The code of a file without its comments and without what follows `#[cfg(test)]`.
fn code_of(text: &str) -> String {
    let code = text
        .lines()
        .take_while(|line| line.trim() != "#[cfg(test)]");
    code.map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Every path in the code that starts at `crate`, `super` or `std`, with groups written out:
/// `use crate::{a, b::{c, d}}` names `crate::a`, `crate::b::c` and `crate::b::d`.
fn named_paths(code: &str) -> BTreeSet<String> {
    let tokens = tokens(code);
    let mut paths = BTreeSet::new();
    for (position, token) in tokens.iter().enumerate() {
        let starts =
            matches!(*token, "crate" | "super" | "std") && tokens.get(position + 1) == Some(&"::");
        if starts && (position == 0 || tokens[position - 1] != "::") {
            read_path(&tokens[position..], "", &mut paths);
        }
    }
    paths
}

/// Reads one path or group from the front of `tokens` and returns how many it took.
fn read_path(tokens: &[&str], before: &str, paths: &mut BTreeSet<String>) -> usize {
    let mut path = before.to_owned();
    let mut taken = 0;
    loop {
        match tokens.get(taken) {
            Some(&"{") => {
                taken += 1;
                while let Some(token) = tokens.get(taken) {
                    match *token {
                        "}" => return taken + 1,
                        "," => taken += 1,
                        "as" => taken += 2,
                        // One step at least, whatever stands there: broken code must not stop us.
                        _ => taken += read_path(&tokens[taken..], &path, paths).max(1),
                    }
                }
                return taken;
            }
            Some(name) if *name == "*" || name.starts_with(is_name) => {
                if !path.is_empty() {
                    path.push_str("::");
                }
                path.push_str(name);
                taken += 1;
            }
            _ => break,
        }
        if tokens.get(taken) != Some(&"::") {
            break;
        }
        taken += 1;
    }
    if taken > 0 {
        paths.insert(path);
    }
    taken
}

fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = if is_name(first) {
            rest.find(|character| !is_name(character))
                .unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

fn is_name(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

fn assert_empty(violations: Vec<String>) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

// The rules can fail.

fn source(path: &str, text: &str) -> Vec<Source> {
    vec![Source {
        path: path.to_owned(),
        text: text.to_owned(),
    }]
}

#[test]
fn paths_are_read_from_uses_groups_and_expressions() {
    let check = |code: &str, expected: &[&str]| {
        let paths = named_paths(&code_of(code));
        assert_eq!(
            paths.iter().map(String::as_str).collect::<Vec<_>>(),
            expected,
            "{code}"
        );
    };
    check("use crate::mesh::Mesh;", &["crate::mesh::Mesh"]);
    check(
        "use crate::{mesh, store::{Database as D, nar::*}};",
        &[
            "crate::mesh",
            "crate::store::Database",
            "crate::store::nar::*",
        ],
    );
    check(
        "fn f() { let x = crate::daemon::run(std::env::args()); }",
        &["crate::daemon::run", "std::env::args"],
    );
    check(
        "use crate::{\n    index,\n    mesh::{self, Links},\n};\nuse std::fs;",
        &[
            "crate::index",
            "crate::mesh::Links",
            "crate::mesh::self",
            "std::fs",
        ],
    );
    check(
        "use std::{collections::BTreeMap, fs};",
        &["std::collections::BTreeMap", "std::fs"],
    );
    check(
        "/// See [`crate::daemon`].\nfn f() {} // crate::daemon",
        &[],
    );
    check(
        "fn f() {}\n#[cfg(test)]\nmod tests { use crate::daemon; }",
        &[],
    );
    check("pub(crate) fn f() { my_crate::x(); core::std::y(); }", &[]);
    check("use crate::{mesh", &["crate::mesh"]);
}

#[test]
fn errors_without_a_subject_are_found() {
    let check = |text: &str, expected: usize| {
        let violations = subject_violations(&source("node/src/mesh.rs", text));
        assert_eq!(violations.len(), expected, "{text}: {violations:?}");
    };
    check(r#"error!(%hash, %error, "could not, and why");"#, 0);
    check(r#"error!(state = "open", "could not");"#, 0);
    check(r#"error!(%error, "could not");"#, 1);
    check(r#"error!("could not, for {peer}");"#, 1);
    check("error!(\n    problem = text,\n    \"could not\"\n);", 1);
}

#[test]
fn edges_outside_the_table_are_found() {
    let check = |path: &str, text: &str, expected: usize| {
        let violations = edge_violations(&source(path, text));
        assert_eq!(violations.len(), expected, "{path}: {text}: {violations:?}");
    };
    check("node/src/serve/nar.rs", "use crate::store::Database;", 0);
    check("node/src/serve/nar.rs", "use crate::mesh::Handle;", 1);
    check(
        "node/src/serve/nar.rs",
        "use super::respond; use crate::serve::tls;",
        0,
    );
    check("node/src/serve/nar.rs", "use super::super::mesh;", 1);
    check("node/src/store.rs", "use super::mesh;", 1);
    check("node/src/mesh.rs", "use crate::{daemon::Daemon, index};", 1);
    check("node/src/cli.rs", "crate::daemon::run()", 0);
    check("node/src/manager.rs", "", 1);
}

#[test]
fn siblings_that_name_each_other_are_found() {
    let mut sources = source(
        "protocol/src/mesh/fetch.rs",
        "use super::lookup::Lookup; use crate::mesh::gossip;",
    );
    sources.extend(source(
        "protocol/src/mesh/lookup.rs",
        "use super::Input; use crate::peer::Peer;",
    ));
    sources.extend(source(
        "protocol/src/mesh/gossip.rs",
        "use super::gossip::Cursor;",
    ));
    assert_eq!(sibling_violations(&sources).len(), 2);
}

#[test]
fn machine_in_the_protocol_is_found() {
    let check = |text: &str, expected: usize| {
        let violations = machine_violations(&source("protocol/src/wire.rs", text));
        assert_eq!(violations.len(), expected, "{text}: {violations:?}");
    };
    check("use std::net::SocketAddr;", 0);
    check("use std::net::{IpAddr, TcpStream};", 1);
    check("use std::{fs::File, time::{Duration, SystemTime}};", 2);
    check("std::env::var(\"HOME\")", 1);
    check("use std::net;", 1);
}

#[test]
fn missing_checks_and_tests_are_found() {
    let source = Source {
        path: "node/tests/endpoint/answers.rs".into(),
        text: "fn it_is_so() {}".into(),
    };
    let rows: String = (1..*CHECKS.end())
        .map(|number| format!("| {number} | x | `answers::it_is_so` |\n"))
        .collect();
    let sources = [source];
    let found = conformance_violations(&rows, &sources);
    assert_eq!(found, ["check 55 has no row"]);
    let found = conformance_violations(&format!("{rows}| 55 | x | `answers::not_so` |"), &sources);
    assert_eq!(found, ["check 55: there is no answers::not_so"]);
    let found = conformance_violations(&format!("{rows}| 55 | x | none |"), &sources);
    assert_eq!(found, ["check 55 names no test"]);
}

#[test]
fn long_files_and_ignored_tests_are_found() {
    assert_eq!(
        length_violations(&source(
            "node/src/mesh.rs",
            &"\n".repeat(FILE_LINES_MAX + 1)
        ))
        .len(),
        1
    );
    assert_eq!(
        length_violations(&source("node/src/mesh.rs", &"\n".repeat(FILE_LINES_MAX))).len(),
        0
    );
    assert_eq!(
        ignore_violations(&source(
            "node/tests/x.rs",
            concat!("#[test]\n#[", "ignore]\nfn f() {}")
        ))
        .len(),
        1
    );
}
