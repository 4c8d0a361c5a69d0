//! A provider whose disk lies: Nix never completes the path from it.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::machine::{Lan, Machine};
use crate::nix;

const OFFERED: Duration = Duration::from_secs(10);

/// Flips one bit in the middle of a file of a store path, behind Nix's back.
fn flip_one_bit(machine: &Machine, store_path: &str) {
    let file = machine.nix.real_path(store_path).join("content");
    let size = fs::metadata(&file).expect("stat content").len();
    fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("make writable");
    let mut open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file)
        .expect("open content");
    let mut byte = [0];
    open.seek(SeekFrom::Start(size / 2)).expect("seek");
    open.read_exact(&mut byte).expect("read");
    open.seek(SeekFrom::Start(size / 2)).expect("seek");
    open.write_all(&[byte[0] ^ 1]).expect("write");
    drop(open);
    fs::set_permissions(&file, Permissions::from_mode(0o444)).expect("make read-only");
}

fn check_never_completed(bytes: usize) {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("damaged", bytes));
    let whole = desktop.build(&nix::folder_of("whole", bytes));
    flip_one_bit(&desktop, &path);
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&whole, OFFERED);

    // Straight from the endpoint: not one answer may look complete.
    if let Some(url) = laptop.narinfo(&path).line("URL") {
        let nar = laptop.get(&format!("/{url}"));
        assert!(
            nar.status == 404 || !nar.is_complete(),
            "{} bytes were served as if whole",
            nar.body.len()
        );
    }
    let realised = laptop.realise(&path);
    assert!(!realised.status.success(), "{realised}");
    assert!(!laptop.is_valid(&path));
    let copied = laptop.copy(&path);
    assert!(!copied.status.success(), "{copied}");
    assert!(!laptop.is_valid(&path));

    // What is sound on the same provider can be had, if not from it then at least without an error:
    // a blamed provider may be left alone for a while, and the endpoint answers all the same.
    assert!(matches!(laptop.narinfo(&whole).status, 200 | 404));
    laptop.assert_sound();
}

#[test]
fn damaged_small_path_never_completes() {
    check_never_completed(1_000);
}

#[test]
fn damaged_path_larger_than_what_is_held_back_never_completes() {
    check_never_completed(5_000_000);
}

/// Enough paths that the damaged provider is asked first for one of them, whatever the order.
const PATHS: usize = 8;

/// Two machines hold the same paths, on one of them all damaged. Substitutes each into a third and
/// returns how many first attempts failed; every second attempt must succeed.
fn attempts_spoiled_beside_a_sound_provider(bytes: usize) -> usize {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut tower = lan.machine("tower");
    let mut laptop = lan.machine("laptop");
    let name = |number| format!("damaged-{number}");
    let paths: Vec<String> = (0..PATHS)
        .map(|number| desktop.build(&nix::folder_of(&name(number), bytes)))
        .collect();
    desktop.start();
    tower.start();
    for path in &paths {
        tower.wait_offered(path, OFFERED);
        tower.realise(path).expect_success();
        flip_one_bit(&desktop, path);
    }

    laptop.start();
    laptop.wait_linked(&[&desktop, &tower]);
    let mut spoiled = 0;
    for path in &paths {
        laptop.wait_offered(path, OFFERED);
        let first = laptop.realise(path);
        if !first.status.success() {
            println!("first attempt: {first}");
            assert!(!laptop.is_valid(path));
            spoiled += 1;
            laptop.realise(path).expect_success();
        }
    }
    laptop.assert_sound();
    spoiled
}

#[test]
fn damaged_provider_of_small_paths_is_replaced_unnoticed() {
    // All of it is held back until it is proved, so nothing wrong has reached Nix.
    assert_eq!(attempts_spoiled_beside_a_sound_provider(1_000), 0);
}

#[test]
fn damaged_provider_of_large_paths_spoils_one_attempt_at_most() {
    // What came before the last 64 KiB cannot be taken back. The liar is blamed and not asked again.
    let spoiled = attempts_spoiled_beside_a_sound_provider(5_000_000);
    assert!(spoiled <= 1, "{spoiled} attempts were spoiled");
}
