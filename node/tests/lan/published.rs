//! An anchor as a member of the mesh: what its public caches hold, and what storage lost.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::admission;
use crate::anchor::{Anchor, PORT};
use crate::durable::noise;
use crate::http;
use crate::machine::{Lan, MESH_PORT, Machine, SUBSTITUTER_PORT, TRANSFER_PORT, hash_of};

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

/// The command that makes a token to push to a cache.
fn token(cache: &str) -> [&str; 8] {
    [
        "token",
        "create",
        "--subject",
        "lan",
        "--cache",
        cache,
        "--allow",
        "pull,push",
    ]
}

/// Pushes a path from a machine to a cache of the anchor beside a node.
fn push(nas: &Machine, from: &mut Machine, cache: &str, path: &str) {
    let token = nas.granary(&token(cache)).expect_success();
    push_to(nas.namespace.address, &token, from, cache, path);
}

fn push_to(address: Ipv4Addr, token: &str, from: &mut Machine, cache: &str, path: &str) {
    let file = from.state().join(format!("{cache}.token"));
    fs::write(&file, token).expect("write token");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set mode");
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
    // The node beside the anchor says why it shares a path that its own store does not have.
    let why = nas.granary(&["why", &path]).expect_success();
    let reason = "shared with members: the public cache team of this machine's anchor publishes it";
    assert!(
        why.contains(reason) && why.contains("not in the local store"),
        "{why}"
    );
    let why = nas.granary(&["why", &secret]).expect_success();
    assert!(
        !why.contains("publishes it") && !why.contains("cache secret"),
        "{why}"
    );

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

/// What a machine's metrics count of answers that came from other members.
fn from_peers(machine: &Machine, name: &str) -> u64 {
    let metrics = machine.get("/metrics");
    let text = String::from_utf8_lossy(&metrics.body).into_owned();
    let counter = format!("{name}{{source=\"peer\"}} ");
    let count = text.lines().find_map(|line| line.strip_prefix(&counter));
    let count = count.unwrap_or_else(|| panic!("no {counter} in {text}"));
    count.parse().expect("a number")
}

#[test]
fn a_machine_without_nix_shares_what_its_anchor_publishes_and_finds_what_others_have() {
    let lan = Lan::new();
    let mut nas = lan.builder("nas");
    let own = nas.build(&noise("own", 10_000));
    let database = nas.nix.database();
    let folder = database.parent().expect("a folder");
    let aside = folder.with_file_name("aside");
    fs::rename(folder, &aside).expect("take Nix away");
    nas.role = "up";
    // Healthy with no store, for there is none to wait for.
    nas.start();
    let health = String::from_utf8(nas.get("/health").body).expect("text");
    assert!(health.contains(r#""store":"none""#), "{health}");
    let key = nas
        .granary(&["cache", "create", "team", "--public"])
        .expect_success();
    let mut desk = lan.builder("desk");
    let path = desk.build(&noise("published", 6_000_000));
    push(&nas, &mut desk, "team", &path);
    let other = desk.build(&noise("other", 10_000));
    desk.start();
    nas.wait_offered(&other, DEADLINE);
    assert_eq!(
        nas.get(&format!("/log/{}-x.drv", hash_of(&own))).status,
        404
    );
    desk.stop();

    let mut laptop = lan.believer("laptop", key.trim());
    laptop.start();
    laptop.wait_linked(&[&nas]);
    laptop.wait_offered(&path, DEADLINE);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    assert_eq!(from_peers(&laptop, "granary_nars_total"), 1);
    nas.granary(&["rm", "team", &path]).expect_success();
    laptop.delete(&path);
    laptop.wait_gone(&path, DEADLINE);
    laptop.stop();

    // Nix comes, or the disk that it is on.
    desk.start();
    assert_eq!(desk.narinfo(&own).status, 404);
    fs::rename(&aside, folder).expect("give Nix back");
    desk.wait_offered(&own, DEADLINE);
    desk.realise(&own).expect_success();
    let health = String::from_utf8(nas.get("/health").body).expect("text");
    assert!(health.contains(r#""store":"open""#), "{health}");
    nas.stop();
}

#[test]
fn an_anchor_by_itself_is_a_member_that_serves_its_public_caches() {
    let lan = Lan::new();
    let mut anchor = Anchor::new(&lan, "nas", "");
    let certificate = anchor.state().with_file_name("certificate");
    let peer_id = admission::peer_id(&anchor.state());
    lan.mesh.admit(&peer_id, &certificate, &[]);
    anchor.settings = format!(
        "member = true\n[substituter]\nlisten = []\n\
         [mesh]\nkey = {:?}\ncertificate-file = {certificate:?}\n\
         listen = [\"0.0.0.0:{MESH_PORT}\"]\ntransfer = [\"0.0.0.0:{TRANSFER_PORT}\"]\n",
        lan.mesh.public
    );
    anchor.start();
    let keys = [
        &["cache", "create", "team", "--public"][..],
        &["cache", "create", "secret"][..],
    ]
    .map(|arguments| anchor.run(arguments));
    let mut desk = lan.machine("desk");
    let path = desk.build(&noise("published", 6_000_000));
    let secret = desk.build(&noise("secret", 10_000));
    for (cache, path) in [("team", &path), ("secret", &secret)] {
        let token = anchor.run(&token(cache));
        push_to(anchor.namespace.address, &token, &mut desk, cache, path);
    }
    drop(desk);

    // It knows of no anchor, and trusts what the caches sign.
    let mut laptop = lan.believer("laptop", &keys[0]);
    laptop.settings.trusted_keys = keys.to_vec();
    laptop.start();
    laptop.wait_offered(&path, DEADLINE);
    assert_eq!(laptop.status().linked(), [peer_id]);
    let narinfo = laptop.narinfo(&path);
    let signature = narinfo.line("Sig").expect("a signature");
    assert!(signature.starts_with("team-1:"), "{signature}");
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    assert!(from_peers(&laptop, "granary_narinfos_total") > 0);
    assert_eq!(from_peers(&laptop, "granary_nars_total"), 1);
    assert_eq!(laptop.narinfo(&secret).status, 404);
    // Nix asks nobody there.
    let endpoint = SocketAddr::from((Ipv4Addr::LOCALHOST, SUBSTITUTER_PORT));
    let refused = anchor
        .namespace
        .inside(|| http::get(endpoint, "/nix-cache-info"));
    assert!(refused.is_err());

    laptop.delete(&path);
    laptop.wait_offered(&path, DEADLINE);
    anchor.run(&["rm", "team", &path]);
    laptop.wait_gone(&path, WITHDRAWN);
    anchor.run(&["cache", "configure", "secret", "--public"]);
    laptop.wait_offered(&secret, WITHDRAWN);
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
