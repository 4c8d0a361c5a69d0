//! The command line as a person meets it: what it prints, what it leaves behind, how it refuses.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use granary_protocol::certificate::{SignedCertificate, UnixTime};
use granary_protocol::signature::PublicKey;

fn granary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command.env("RUST_LOG", "warn").env_remove("GRANARY_CONFIG");
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    granary()
        .current_dir(folder)
        .args(arguments)
        .output()
        .expect("run granary")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "failed: {}", stderr(output));
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must fail with status 1, and returns what it says.
fn refusal(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert_eq!(
        output.status.code(),
        Some(1),
        "{arguments:?}: {}",
        stderr(&output)
    );
    assert!(output.stdout.is_empty());
    stderr(&output)
}

#[test]
fn demo_succeeds_with_real_nix() {
    let folder = tempfile::tempdir().unwrap();
    let output = granary()
        .arg("demo")
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(
        text.contains("nix (Nix)") && text.contains("verified 42 NarHashes"),
        "{text}"
    );
    assert!(!stderr(&output).contains("ERROR"), "{}", stderr(&output));
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "the demo left something behind"
    );
}

#[test]
fn demo_succeeds_without_nix() {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = granary();
    demo.arg("demo")
        .env("TMPDIR", folder.path())
        .env("PATH", "/nowhere");
    let output = demo.output().unwrap();
    let text = stdout(&output);
    assert!(
        text.contains("Nix is not installed") && text.contains("verified 42 NarHashes"),
        "{text}"
    );
    assert!(!stderr(&output).contains("ERROR"), "{}", stderr(&output));
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "the demo left something behind"
    );
}

#[test]
fn a_mesh_is_made_once_and_its_certificates_verify() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let printed = stdout(&run(
        folder,
        &[
            "mesh",
            "create",
            "--public-file",
            "mesh.pub",
            "--name",
            "home",
        ],
    ));
    let mesh: PublicKey = printed.trim().parse().unwrap();
    assert_eq!(mesh.name().as_str(), "home");
    assert_eq!(
        fs::read_to_string(folder.join("mesh.pub")).unwrap(),
        printed
    );
    let mode = fs::metadata(folder.join("mesh.key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = refusal(folder, &["mesh", "create"]);
    assert!(
        again.contains("mesh.key") && again.contains("exists"),
        "{again}"
    );

    let peer = stdout(&run(folder, &["identity", "--state-dir", "state"]));
    let peer = peer.trim();
    stdout(&run(
        folder,
        &[
            "mesh",
            "admit",
            peer,
            "--name",
            "desk",
            "--allow",
            "share,push:main",
            "--days",
            "7",
        ],
    ));
    let text = fs::read_to_string(folder.join("certificate")).unwrap();
    let certificate = SignedCertificate::from_text(&text).unwrap();
    let claims = certificate.claims().unwrap();
    assert_eq!(
        (
            claims.name.as_str(),
            claims.permissions.to_string().as_str()
        ),
        ("desk", "share,push:main")
    );
    assert_eq!(claims.not_after.0 - claims.not_before.0, 7 * 86_400);
    let verified = certificate.verify(&mesh, &peer.parse().unwrap(), UnixTime(claims.not_before.0));
    assert_eq!(verified, Ok(claims));
}

#[test]
fn a_mesh_made_here_has_this_machine_as_its_member_and_gives_tickets() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Nobody listens on port 1, so no node is asked.
    let config = "state-dir = \"state\"\n[substituter]\nlisten = \"127.0.0.1:1\"\n";
    fs::write(folder.join("granary.toml"), config).unwrap();
    let run =
        |arguments: &[&str]| run(folder, &[arguments, &["--config", "granary.toml"]].concat());
    let printed = stdout(&run(&["mesh", "create", "--here", "--name", "home"]));
    let mesh: PublicKey = printed.lines().next().unwrap().parse().unwrap();
    for name in ["mesh.key", "identity", "certificate", "joined"] {
        let mode = fs::metadata(folder.join("state").join(name)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600, "{name}");
    }
    let text = fs::read_to_string(folder.join("state/certificate")).unwrap();
    let certificate = SignedCertificate::from_text(&text).unwrap();
    let claims = certificate.claims().unwrap();
    let peer = stdout(&run(&["identity"]));
    assert_eq!(claims.peer.to_string(), peer.trim());
    let verified = certificate.verify(&mesh, &claims.peer, UnixTime(claims.not_before.0));
    assert_eq!(verified, Ok(claims));
    let ticket = stdout(&run(&["mesh", "ticket", "--host", "desk.lan"]));
    assert!(ticket.starts_with("granary-ticket-1:"), "{ticket}");
    // A second one would leave the members of the first without a key.
    let again = run(&["mesh", "create", "--here"]);
    assert!(
        stderr(&again).contains("belongs to mesh home:"),
        "{}",
        stderr(&again)
    );
}

#[test]
fn the_identity_is_made_once_and_kept_secret() {
    let folder = tempfile::tempdir().unwrap();
    let first = stdout(&run(folder.path(), &["identity", "--state-dir", "state"]));
    assert!(first.starts_with("12D3KooW"), "{first}");
    assert_eq!(
        stdout(&run(folder.path(), &["identity", "--state-dir", "state"])),
        first
    );
    let file = folder.path().join("state/identity");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let refused = refusal(folder.path(), &["identity", "--state-dir", "state"]);
    assert!(
        refused.contains("0644") && refused.contains("chmod 0600"),
        "{refused}"
    );
}

#[test]
fn admission_refuses_what_it_cannot_certify() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    stdout(&run(folder, &["mesh", "create"]));
    let peer = stdout(&run(folder, &["identity", "--state-dir", "state"]));
    let peer = peer.trim();
    assert!(refusal(folder, &["mesh", "admit", peer, "--name", "a b"]).contains("a b"));
    assert!(refusal(folder, &["mesh", "admit", peer, "--key-file", "nowhere"]).contains("nowhere"));
    fs::write(folder.join("other"), "home:AAAA").unwrap();
    fs::set_permissions(folder.join("other"), fs::Permissions::from_mode(0o644)).unwrap();
    let exposed = refusal(folder, &["mesh", "admit", peer, "--key-file", "other"]);
    assert!(exposed.contains("chmod 0600"), "{exposed}");
    fs::set_permissions(folder.join("other"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(refusal(folder, &["mesh", "admit", peer, "--key-file", "other"]).contains("other"));
    for misuse in [
        vec!["mesh", "admit", "12D3"],
        vec!["mesh", "admit", peer, "--allow", "admin"],
    ] {
        assert_eq!(run(folder, &misuse).status.code(), Some(2), "{misuse:?}");
    }
    assert!(!folder.join("certificate").exists());
}

#[test]
fn check_config_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let check = |text: &str, arguments: &[&str]| {
        fs::write(folder.join("granary.toml"), text).unwrap();
        run(
            folder,
            &[&["check-config", "--config", "granary.toml"], arguments].concat(),
        )
    };
    let state = format!("state-dir = {:?}\n", folder.join("state"));
    assert!(stdout(&check(&state, &["--offline"])).contains("fine"));
    // What is meant for another machine names files that are not here.
    let ticket = format!("{state}[mesh]\nticket-file = \"/nowhere/ticket\"\n");
    assert!(stdout(&check(&ticket, &["--offline"])).contains("fine"));
    let missing = check(&ticket, &[]);
    assert!(stderr(&missing).contains("/nowhere/ticket"));
    let unknown = check("[trust]\nkey = []\n", &[]);
    assert_eq!(unknown.status.code(), Some(1));
    let text = stderr(&unknown);
    assert!(
        text.contains("granary.toml") && text.contains("did you mean `keys`"),
        "{text}"
    );
    let no_store = check(
        &format!("{state}[store]\ndatabase = \"/nowhere/db.sqlite\"\n"),
        &[],
    );
    assert!(
        stderr(&no_store).contains("/nowhere/db.sqlite"),
        "{}",
        stderr(&no_store)
    );
    assert!(
        refusal(folder, &["check-config", "--config", "missing.toml"]).contains("missing.toml")
    );
}

#[test]
fn a_port_that_is_taken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let config = format!(
        "state-dir = {:?}\n[substituter]\nlisten = \"{address}\"\n",
        folder.path().join("state")
    );
    fs::write(folder.path().join("granary.toml"), config).unwrap();
    let refused = refusal(folder.path(), &["node", "--config", "granary.toml"]);
    assert!(
        refused.contains(&address.to_string()) && refused.contains("in use"),
        "{refused}"
    );
}

#[test]
fn questions_to_a_node_that_does_not_run_say_so() {
    let folder = tempfile::tempdir().unwrap();
    // Bound and dropped: a port where nobody listens.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    fs::write(
        folder.path().join("granary.toml"),
        format!("[substituter]\nlisten = \"{address}\"\n"),
    )
    .unwrap();
    for question in [
        vec!["status"],
        vec!["why", "00bgd045z0d4icpbc2yyz4gx48ak44la"],
    ] {
        let refused = refusal(
            folder.path(),
            &[&question[..], &["--config", "granary.toml"]].concat(),
        );
        assert!(
            refused.contains(&address.to_string()) && refused.contains("granary node"),
            "{refused}"
        );
    }
}

#[test]
fn secrets_that_others_may_read_are_taken_as_credentials_of_systemd_only() {
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("credentials");
    fs::create_dir(&credentials).unwrap();
    let key = credentials.join("attic");
    fs::write(&key, "hs256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o440)).unwrap();
    let config = folder.path().join("anchor.toml");
    let text = format!(
        "state-dir = {:?}\n[anchor-server]\nattic-token-key-file = {key:?}\n",
        folder.path()
    );
    fs::write(&config, text).unwrap();
    let list = ["cache", "list", "--config", "anchor.toml"];
    let exposed = refusal(folder.path(), &list);
    assert!(exposed.contains("0440"), "{exposed}");
    let mut command = granary();
    command.current_dir(folder.path()).args(list);
    let output = command.env("CREDENTIALS_DIRECTORY", &credentials).output();
    stdout(&output.unwrap());
}

#[test]
fn an_anchor_that_shall_be_a_member_joins_by_a_credential_or_says_how() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("anchor.toml");
    let text = format!(
        "state-dir = {:?}\n[anchor-server]\nmember = true\n",
        folder.path()
    );
    fs::write(&config, text).unwrap();
    let start = ["anchor", "--config", "anchor.toml"];
    let refused = refusal(folder.path(), &start);
    assert!(refused.contains("granary join <ticket>"), "{refused}");

    let credentials = folder.path().join("credentials");
    fs::create_dir(&credentials).unwrap();
    let ticket = credentials.join("ticket");
    fs::write(&ticket, "nonsense").unwrap();
    fs::set_permissions(&ticket, fs::Permissions::from_mode(0o440)).unwrap();
    let mut command = granary();
    command.current_dir(folder.path()).args(start);
    let output = command.env("CREDENTIALS_DIRECTORY", &credentials).output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains(ticket.to_str().unwrap()), "{said}");
}
