//! The main job: what one machine built, the other's Nix substitutes.

use std::time::Duration;

use crate::machine::Lan;
use crate::nix;

/// A snapshot of a few hundred paths is known well before this; see `freshness` for the tight bound.
const OFFERED: Duration = Duration::from_secs(10);

#[test]
fn closure_of_300_paths_is_substituted_through_mdns_with_signatures_required() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let mut tablet = lan.machine("tablet");
    let top = desktop.build(nix::CLOSURE);
    assert_eq!(desktop.closure(&top).len(), nix::CLOSURE_PATHS);

    desktop.start();
    laptop.start();
    desktop.wait_linked(&[&laptop]);
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&top, OFFERED);
    let held = desktop.status().paths_held();
    assert!(
        held >= nix::CLOSURE_PATHS as u64,
        "the desktop shares {held} paths"
    );
    let realised = laptop.realise(&top);
    println!("nix-store --realise: {:.1?}", realised.elapsed);
    realised.expect_success();
    assert_eq!(laptop.closure(&top), desktop.closure(&top));
    laptop.assert_sound();
    let received = laptop.status().bytes_received();
    assert!(
        received >= nix::CLOSURE_BYTES_MIN,
        "{received} bytes came from peers"
    );
    let sent = desktop.status().bytes_sent();
    assert!(sent >= nix::CLOSURE_BYTES_MIN, "{sent} bytes went to peers");

    // The same with `nix copy`, into a third machine that may take from either.
    tablet.start();
    tablet.wait_linked(&[&desktop, &laptop]);
    tablet.wait_offered(&top, OFFERED);
    let copied = tablet.copy(&top);
    println!("nix copy --from: {:.1?}", copied.elapsed);
    copied.expect_success();
    assert_eq!(tablet.closure(&top), desktop.closure(&top));
    tablet.assert_sound();

    for machine in [&mut desktop, &mut laptop, &mut tablet] {
        machine.stop();
    }
}

#[test]
fn client_refuses_a_closure_signed_by_a_key_it_does_not_trust() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("foreign", 1000));
    // The laptop's node trusts nobody; its Nix still trusts the builder.
    laptop.settings.trusted_keys = Vec::new();
    laptop.settings.trusts_members = false;
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    crate::process::assert_throughout(
        "no unproved narinfo is served",
        Duration::from_secs(2),
        || match laptop.narinfo(&path).status {
            404 => Ok(()),
            status => Err(format!("status {status}")),
        },
    );
    assert!(!laptop.realise(&path).status.success());
    assert!(!laptop.is_valid(&path));
}

#[test]
fn restarted_node_finds_its_peers_and_their_paths_again() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("kept", 100_000));
    desktop.start();
    laptop.start();
    laptop.wait_offered(&path, OFFERED);
    laptop.kill();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
}

#[test]
fn peers_named_in_the_configuration_are_found_without_mdns() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    desktop.settings.mdns = false;
    laptop.settings.mdns = false;
    laptop.settings.peers = vec![desktop.at(crate::machine::MESH_PORT).to_string()];
    let path = desktop.build(&nix::folder_of("named", 100_000));
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
}
