//! The conference: machines of different meshes on one network, who share what everybody may have.

use std::time::Duration;

use crate::machine::{Lan, hash_of};
use crate::nix;
use crate::process::wait_for;

/// mDNS repeats its questions after one and three seconds, and a miss is believed for five.
const FOUND: Duration = Duration::from_secs(20);

#[test]
fn a_node_of_another_mesh_brings_what_a_public_key_signed_and_nothing_else() {
    let lan = Lan::new();
    let mut speaker = lan.builder("speaker");
    let mut guest = lan.stranger("guest");
    let mut shy = lan.stranger("shy");
    let elsewhere = lan.other_mesh();
    for machine in [&mut guest, &mut shy] {
        machine.admit(&elsewhere, &[]);
    }
    // The builders' key stands for that of a public cache.
    let path = speaker.build(&nix::folder_of("public", 3_000_000));
    speaker.settings.extra = format!(
        "public = true\npublic-keys = [{:?}]\n",
        lan.builder_key.public
    );
    guest.settings.mesh_extra = "strangers = true\n".into();
    for machine in [&mut speaker, &mut guest, &mut shy] {
        machine.start();
    }
    guest.wait_offered(&path, FOUND);
    // Who did not say so asks no stranger.
    assert_eq!(shy.narinfo(&path).status, 404);
    guest.realise(&path).expect_success();
    guest.assert_sound();
    let caches = guest.granary(&["status"]).expect_success();
    assert!(caches.contains("strangers near by"), "{caches}");
    assert!(speaker.status().linked().is_empty());
    // What is hidden meanwhile is gone for strangers too.
    speaker.granary(&["hide", &path]).expect_success();
    guest
        .nix
        .run(&guest.namespace, "nix-store", &["--delete", &path])
        .expect_success();
    let nar = format!("/nar/{}.nar", hash_of(&path));
    wait_for("the stranger has nothing to give", FOUND, || {
        match guest.get(&nar).status {
            404 => Ok(()),
            status => Err(format!("status {status}")),
        }
    });
    for machine in [&mut speaker, &mut guest, &mut shy] {
        machine.stop();
    }
}
