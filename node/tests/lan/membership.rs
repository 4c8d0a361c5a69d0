//! Members that push by their certificates alone.

use std::fs;
use std::time::Duration;

use crate::anchor::PORT;
use crate::durable::noise;
use crate::machine::{Lan, Machine};
use crate::process::wait_for;

/// Of DESIGN §11 for a push, and some for the token.
const PUSHED: Duration = Duration::from_secs(30);
/// The promise.
const CUT: Duration = Duration::from_secs(5);

/// What a machine's configuration says of the private cache: its address and key, and no token.
fn table(nas: &Machine, key: &str) -> String {
    let address = nas.namespace.address;
    format!("[[anchor]]\nurl = \"http://{address}:{PORT}/team\"\npublic-keys = [{key:?}]\n")
}

fn stock(nas: &Machine) -> String {
    nas.granary(&["cache", "info", "team", "--json"])
        .expect_success()
}

#[test]
fn a_member_whose_certificate_allows_it_pushes_and_pulls_without_a_token_until_it_is_put_out() {
    let lan = Lan::new();
    let mut nas = lan.machine("nas");
    nas.role = "up";
    nas.start();
    let key = nas.granary(&["cache", "create", "team"]).expect_success();
    let key = key.trim();

    let mut desk = lan.builder("desk");
    desk.admit(&lan.mesh, &["--name", "desk", "--allow", "share,push:te*"]);
    desk.settings.trusted_keys = vec![key.to_owned()];
    desk.settings.extra = format!("{}[upload]\ncache = \"team\"\n", table(&nas, key));
    desk.start();
    let path = desk.build(&noise("of-a-member", 100_000));
    wait_for("the path is at the anchor", PUSHED, || {
        let stock = stock(&nas);
        match stock.contains("\"paths\":0") || stock.contains("\"paths\": 0") {
            true => Err(format!("{stock}\n{}", desk.status())),
            false => Ok(()),
        }
    });
    let tokens = nas.granary(&["token", "list"]).expect_success();
    assert!(tokens.contains("desk"), "{tokens}");
    // By hand, with the token that the node got.
    let more = desk.build(&noise("by-hand", 10_000));
    desk.granary(&["push", "team", &more]).expect_success();

    // Who may only share is told why.
    let mut visitor = lan.builder("visitor");
    visitor.admit(&lan.mesh, &["--name", "visitor", "--allow", "share"]);
    visitor.settings.extra = desk.settings.extra.clone();
    visitor.start();
    visitor.build(&noise("of-a-visitor", 10_000));
    wait_for("the visitor is told", PUSHED, || {
        let status = visitor.granary(&["status"]).stdout;
        match status.contains("not push:team") {
            true => Ok(()),
            false => Err(status),
        }
    });

    // The cache is private: another member reads it by its certificate, with the builder away.
    desk.stop();
    let mut laptop = lan.believer("laptop", key);
    laptop.admit(
        &lan.mesh,
        &["--name", "laptop", "--allow", "share,push:team"],
    );
    laptop.settings.trusted_keys = vec![key.to_owned()];
    laptop.settings.extra = table(&nas, key);
    laptop.start();
    laptop.wait_offered(&path, PUSHED);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();

    desk.start();
    let secret = lan.mesh.secret_file.to_str().expect("a path of letters");
    let token = || {
        let files = fs::read_dir(desk.state()).expect("list the state folder");
        let mut files = files.map(|file| file.expect("a file").path());
        let file = files.find(|file| file.extension().is_some_and(|word| word == "token"));
        file.expect("a member's token")
    };
    let kept = desk.state().join("kept");
    // With its mode.
    fs::copy(token(), &kept).expect("keep the token");
    nas.granary(&["mesh", "revoke", "desk", "--key-file", secret])
        .expect_success();
    let kept = kept.to_str().expect("a path of letters");
    wait_for("its token is refused", CUT, || {
        let pushed = desk.granary(&["push", "team", &more, "--token-file", kept]);
        match pushed.stderr.contains("revoked") {
            true => Ok(()),
            false => Err(pushed.to_string()),
        }
    });
}
