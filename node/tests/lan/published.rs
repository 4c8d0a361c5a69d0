//! An anchor as a member of the mesh: what its public caches hold, and what storage lost.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::anchor::PORT;
use crate::durable::noise;
use crate::http;
use crate::machine::{Lan, Machine, hash_of};

const DEADLINE: Duration = Duration::from_secs(30);
/// What `granary cache configure` did in another process is looked for every 5 s; DESIGN allows a deletion 60.
const WITHDRAWN: Duration = Duration::from_secs(30);

/// A machine with an anchor beside its node.
fn nas(lan: &Lan) -> Machine {
    let mut nas = lan.machine("nas");
    nas.role = "up";
    nas.start();
    nas
}

/// Pushes a path from a machine to a cache of the anchor.
fn push(nas: &Machine, from: &mut Machine, cache: &str, path: &str) {
    let token = nas.granary(&[
        "token",
        "create",
        "--subject",
        "lan",
        "--cache",
        cache,
        "--allow",
        "pull,push",
    ]);
    let file = from.state().join(format!("{cache}.token"));
    fs::write(&file, token.expect_success()).expect("write token");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set mode");
    let address = nas.namespace.address;
    from.settings.extra =
        format!("[[anchor]]\nurl = \"http://{address}:{PORT}/{cache}\"\ntoken-file = {file:?}\n");
    from.granary(&["push", cache, path]).expect_success();
    from.settings.extra.clear();
}

#[test]
fn what_public_caches_hold_is_found_through_the_mesh_alone() {
    let lan = Lan::new();
    let nas = nas(&lan);
    let mut keys = Vec::new();
    for arguments in [
        &["cache", "create", "team", "--public"][..],
        &["cache", "create", "secret"][..],
    ] {
        let key = nas.granary(arguments).expect_success();
        keys.push(key.trim().to_owned());
    }
    let mut desk = lan.machine("desk");
    // Larger than a frame.
    let path = desk.build(&noise("published", 9_000_000));
    let secret = desk.build(&noise("secret", 10_000));
    push(&nas, &mut desk, "team", &path);
    push(&nas, &mut desk, "secret", &secret);
    drop(desk);

    // It knows of no anchor.
    let mut laptop = lan.believer("laptop", &keys[0]);
    laptop.settings.trusted_keys = keys;
    laptop.start();
    laptop.wait_linked(&[&nas]);
    laptop.wait_offered(&path, DEADLINE);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    assert_eq!(laptop.narinfo(&secret).status, 404);

    nas.granary(&["cache", "configure", "secret", "--public"])
        .expect_success();
    laptop.wait_offered(&secret, WITHDRAWN);
    nas.granary(&["cache", "configure", "secret", "--private"])
        .expect_success();
    laptop.wait_gone(&secret, WITHDRAWN);

    laptop.delete(&path);
    laptop.wait_offered(&path, DEADLINE);
    nas.granary(&["hide", &path]).expect_success();
    laptop.wait_gone(&path, DEADLINE);
    nas.granary(&["unhide", &path]).expect_success();
    laptop.wait_offered(&path, DEADLINE);
    nas.granary(&["rm", "team", &path]).expect_success();
    laptop.wait_gone(&path, DEADLINE);
}

#[test]
fn a_nar_that_storage_damaged_is_brought_again_from_a_peer() {
    let lan = Lan::new();
    let mut nas = nas(&lan);
    nas.may_log_errors = true;
    nas.granary(&["cache", "create", "team", "--public"])
        .expect_success();
    let mut desk = lan.builder("desk");
    let path = desk.build(&noise("precious", 6_000_000));
    push(&nas, &mut desk, "team", &path);
    let narinfo = || {
        let address = SocketAddr::from((nas.namespace.address, PORT));
        let target = format!("/team/{}.narinfo", hash_of(&path));
        let get = || http::get(address, &target).expect("an answer");
        nas.namespace.inside(get)
    };
    let url = narinfo().line("URL").expect("a URL").to_owned();
    let name = url.strip_prefix("nar/").expect("a nar").to_owned();
    let object: PathBuf = ["storage/nar", &name[..2], &name].iter().collect();
    let object = nas.state().join(object);
    let whole = fs::read(&object).expect("an object");
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&object, bytes).expect("damage it");

    // Nobody is there who has it.
    let scrub = ["anchor", "scrub"];
    let said = nas.granary(&scrub);
    assert_eq!(said.status.code(), Some(1), "{said}");
    assert_eq!(narinfo().status, 404);
    desk.start();
    nas.wait_linked(&[&desk]);
    nas.wait_offered(&path, DEADLINE);
    let said = nas.granary(&scrub).expect_success();
    assert!(said.contains("brought again"), "{said}");
    assert_eq!(narinfo().status, 200);
    assert!(fs::read(&object).expect("an object") == whole);
}
