//! Builds that nobody signed: believed of members that may vouch, for as long as they are members.

use std::time::Duration;

use crate::machine::{Lan, Machine};
use crate::nix;
use crate::process::wait_for;

/// The promise.
const SPREAD: Duration = Duration::from_secs(2);
const CUT: Duration = Duration::from_secs(5);
const OFFERED: Duration = Duration::from_secs(10);

/// A member whose Nix signs nothing.
fn builder(lan: &Lan, name: &str, allow: &str) -> Machine {
    let mut machine = lan.stranger(name);
    machine.nix.take_host_release();
    machine.admit(&lan.mesh, &["--name", name, "--allow", allow]);
    machine
}

fn use_node(machine: &Machine) {
    let file = machine.nix.configuration_file();
    let file = file.to_str().expect("a path of letters");
    let said = machine.granary(&["use", "--nix-conf", file]);
    assert!(said.expect_success().contains("granary-loopback-"));
}

fn why(machine: &Machine, path: &str) -> String {
    machine.granary(&["why", path]).expect_success()
}

#[test]
fn what_a_vouching_member_builds_is_substituted_with_no_key_but_the_machines_own() {
    let lan = Lan::new();
    let mut desktop = builder(&lan, "desktop", "share,vouch");
    // It trusts a key that signed nothing here.
    let mut laptop = lan.machine("laptop");
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    let path = desktop.build(&nix::folder_of("unsigned", 100_000));
    let elapsed = laptop.wait_offered(&path, SPREAD);
    println!("offered {elapsed:.2?} after the build had ended");

    // Nix itself decides, and knows no key of anybody so far.
    assert!(!laptop.realise(&path).status.success());
    use_node(&laptop);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    let other = desktop.build(&nix::folder_of("another", 1000));
    laptop.wait_offered(&other, SPREAD);
    let said = why(&laptop, &other);
    assert!(
        said.contains("built by desktop (") && said.contains("may vouch"),
        "{said}"
    );

    // The signatures by loopback keys are nobody else's business.
    let narinfo = laptop.narinfo(&path).text();
    assert!(narinfo.contains("Sig: granary-loopback-"), "{narinfo}");
    assert!(
        narinfo.contains(&format!("Sig: {}:", desktop.peer_id)),
        "{narinfo}"
    );

    // Who is put out vouches for nothing any more.
    let key = lan.mesh.secret_file.to_str().expect("a path of letters");
    let revoke = ["mesh", "revoke", "desktop", "--key-file", key];
    laptop.granary(&revoke).expect_success();
    laptop.wait_gone(&other, CUT);
    assert!(!laptop.realise(&other).status.success());
}

#[test]
fn nobody_else_can_make_nix_accept_a_build() {
    let lan = Lan::new();
    let mut guest = builder(&lan, "guest", "share");
    let mut desktop = builder(&lan, "desktop", "share,vouch");
    let mut laptop = lan.machine("laptop");
    let mut strict = lan.machine("strict");
    strict.settings.trusts_members = false;
    let of_guest = guest.build(&nix::folder_of("of-the-guest", 1000));
    let of_desktop = desktop.build(&nix::folder_of("of-the-desktop", 1000));
    guest.start();
    desktop.start();
    laptop.start();
    strict.start();
    use_node(&laptop);
    laptop.wait_offered(&of_desktop, OFFERED);
    for machine in [&laptop, &strict] {
        for builder in [&guest, &desktop] {
            wait_for("the announcement arrives", OFFERED, || {
                let status = machine.status();
                match status.paths_of(&builder.peer_id) {
                    Some(1) => Ok(()),
                    _ => Err(status.to_string()),
                }
            });
        }
    }
    assert_eq!(laptop.narinfo(&of_guest).status, 404);
    assert!(!laptop.realise(&of_guest).status.success());
    let said = why(&laptop, &of_guest);
    assert!(said.contains("nor may they vouch for it"), "{said}");

    assert_eq!(strict.narinfo(&of_desktop).status, 404);
    let said = why(&strict, &of_desktop);
    assert!(said.contains("trust.members is false"), "{said}");
    assert!(!strict.state().join("loopback-key").exists());
}
