//! How soon a neighbour knows what changed in a store.

use std::time::Duration;

use crate::machine::Lan;
use crate::nix;

/// The promise: built here, fetchable there; and the same for what was collected.
const PROMISED: Duration = Duration::from_secs(2);
const LINKED_AND_KNOWN: Duration = Duration::from_secs(10);

#[test]
fn path_built_after_both_are_up_is_fetchable_within_two_seconds() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    desktop.wait_linked(&[&laptop]);
    for round in 0..5 {
        let expression = nix::folder_of(&format!("fresh-{round}"), 100_000);
        // The laptop asks before there is anything: what it remembers of the miss must not outlive it.
        let expected = desktop.output_of(&expression);
        assert_eq!(laptop.narinfo(&expected).status, 404);
        let path = desktop.build(&expression);
        assert_eq!(path, expected);
        let elapsed = laptop.wait_offered(&path, PROMISED);
        println!("round {round}: offered {elapsed:.0?} after the build ended");
        laptop.realise(&path).expect_success();
        assert!(laptop.is_valid(&path));
    }
    laptop.assert_sound();
}

#[test]
fn collected_path_is_no_longer_offered_after_two_seconds() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let deleted = desktop.build(&nix::folder_of("deleted", 1_000));
    let collected = desktop.build(&nix::folder_of("collected", 100_000));
    desktop.start();
    laptop.start();
    for path in [&deleted, &collected] {
        laptop.wait_offered(path, LINKED_AND_KNOWN);
    }

    desktop.delete(&deleted);
    let elapsed = laptop.wait_gone(&deleted, PROMISED);
    println!("nix-store --delete: gone after {elapsed:.0?}");
    assert_eq!(
        laptop.narinfo(&collected).status,
        200,
        "what is still there is still offered"
    );

    desktop.collect_garbage();
    let elapsed = laptop.wait_gone(&collected, PROMISED);
    println!("nix-store --gc: gone after {elapsed:.0?}");
    assert!(!laptop.realise(&collected).status.success());
    assert!(!laptop.is_valid(&collected));
}

#[test]
fn paths_of_a_machine_that_left_are_no_longer_offered() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("gone", 1_000));
    desktop.start();
    laptop.start();
    laptop.wait_offered(&path, LINKED_AND_KNOWN);
    desktop.stop();
    laptop.wait_gone(&path, LINKED_AND_KNOWN);
}
