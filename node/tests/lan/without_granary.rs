//! Machines without Granary: their Nix substitutes from a node's LAN port.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::machine::{Lan, Machine};
use crate::network::Namespace;
use crate::nix::{self, Nix, SigningKey};
use crate::process::Finished;

const LAN_PORT: u16 = 4729;

/// A machine that has Nix and nothing else.
struct Visitor {
    namespace: Namespace,
    nix: Nix,
}

impl Visitor {
    fn new(lan: &Lan, name: &str, folder: &Path, trusted: &str) -> Visitor {
        let folder = folder.join(name);
        fs::create_dir(&folder).expect("make folder");
        let namespace = lan.plug(name);
        let nix = Nix::new(&folder, &[trusted], None);
        nix.initialize(&namespace);
        Visitor { namespace, nix }
    }

    fn realise(&self, server: &Machine, path: &str, more: &[&str]) -> Finished {
        let url = format!("http://{}", server.at(LAN_PORT));
        let mut arguments = vec!["--realise", path, "--option", "substituters", &url];
        arguments.extend(more);
        self.nix.run(&self.namespace, "nix-store", &arguments)
    }
}

fn write_secret(path: &Path, text: &str) {
    fs::write(path, text).expect("write secret");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("set mode");
}

#[test]
fn nix_without_a_node_substitutes_with_one_key_and_a_token() {
    let lan = Lan::new();
    let folder = tempfile::tempdir().expect("temporary folder");
    let key = SigningKey::create(folder.path(), "lan-1");
    let token = folder.path().join("token");
    write_secret(&token, "correct-horse\n");
    fs::set_permissions(&key.secret_file, Permissions::from_mode(0o600)).expect("set mode");
    // Its Nix signs nothing: what it built is signed as it is given.
    let mut server = lan.machine("server");
    let path = server.build(&nix::folder_of("built", 100_000));
    server.settings.extra = format!(
        "http = \"0.0.0.0:{LAN_PORT}\"\nhttp-token-file = {token:?}\nhttp-sign-key-file = {:?}\n",
        key.secret_file
    );
    server.start();

    let visitor = Visitor::new(&lan, "visitor", folder.path(), &key.public);
    assert!(!visitor.realise(&server, &path, &[]).status.success());
    let netrc = folder.path().join("netrc");
    let machine = server.at(LAN_PORT).ip();
    write_secret(
        &netrc,
        &format!("machine {machine} login nix password correct-horse\n"),
    );
    let with_token = ["--option", "netrc-file", netrc.to_str().expect("UTF-8")];
    visitor
        .realise(&server, &path, &with_token)
        .expect_success();
    assert!(visitor.nix.is_valid(&visitor.namespace, &path));
    visitor.nix.assert_sound(&visitor.namespace);
    // Who trusts another key takes nothing.
    let wary = Visitor::new(&lan, "wary", folder.path(), &lan.builder_key.public);
    assert!(!wary.realise(&server, &path, &with_token).status.success());
    server.stop();
}

#[test]
fn nix_without_a_node_substitutes_what_the_builder_signed() {
    let lan = Lan::new();
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut server = lan.builder("server");
    let path = server.build(&nix::folder_of("built", 3_000_000));
    server.settings.extra = format!("http = \"0.0.0.0:{LAN_PORT}\"\n");
    server.start();
    let visitor = Visitor::new(&lan, "visitor", folder.path(), &lan.builder_key.public);
    visitor.realise(&server, &path, &[]).expect_success();
    visitor.nix.assert_sound(&visitor.namespace);
    server.stop();
}
