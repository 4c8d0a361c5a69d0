//! Networks that come and go: Nix is answered as if nothing had happened, and peers are found again.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::machine::{Lan, Machine};
use crate::nix;
use crate::process::wait_for;

const OFFERED: Duration = Duration::from_secs(10);

/// Longest answer, while it is not known yet that the peer is gone.
const WORST: Duration = Duration::from_secs(1);
/// 99 of 100 answers, once it is known.
const KNOWN: Duration = Duration::from_millis(50);
/// How soon it must be known though nobody tells: two turns of the pulse, and some patience.
const NOTICED: Duration = Duration::from_secs(12);
/// How soon a path of the peer is offered again after the network is back.
const RECOVERED: Duration = Duration::from_secs(3);

const ANSWERS: usize = 300;

const PATHS: usize = 4;

/// The desktop, which has the path, and the laptop, which wants it.
type Act = fn(desktop: &Machine, laptop: &Machine);

/// Asks for the path while the way to its only holder is gone, then gives the way back.
fn check(trouble: Act, remedy: Act, recovered: Duration) {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let mut paths: Vec<String> = (0..PATHS)
        .map(|number| desktop.build(&nix::folder_of(&format!("roaming-{number}"), 1000)))
        .collect();
    let path = paths.pop().expect("several paths");
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    desktop.wait_linked(&[&laptop]);
    laptop.wait_offered(&path, OFFERED);

    trouble(&desktop, &laptop);
    // What was found before is answered from memory, so most are new: only the peer could tell about them.
    let mut wanted = paths.iter().chain([&path]).cycle();
    let mut ask = || {
        let wanted = wanted.next().expect("an endless iterator");
        let start = Instant::now();
        let status = laptop.narinfo(wanted).status;
        assert!(matches!(status, 200 | 404), "status {status}");
        (start.elapsed(), status)
    };
    let mut worst = Duration::ZERO;
    let (noticed, ()) = wait_for("the peer's absence is known", NOTICED, || {
        let (took, status) = ask();
        worst = worst.max(took);
        match status == 404 && took < KNOWN {
            true => Ok(()),
            false => Err(format!("status {status} after {took:?}")),
        }
    });
    let mut answers: Vec<Duration> = (0..ANSWERS).map(|_| ask().0).collect();
    answers.sort_unstable();
    let (median, late) = (answers[ANSWERS / 2], answers[ANSWERS * 99 / 100]);
    worst = worst.max(answers[ANSWERS - 1]);
    assert!(worst <= WORST, "an answer took {worst:?}");
    assert!(late <= KNOWN, "one answer in a hundred took {late:?}");

    remedy(&desktop, &laptop);
    let again = laptop.wait_offered(&path, recovered);
    println!(
        "noticed after {noticed:.0?}, worst {worst:.0?}, then median {median:.1?} and p99 {late:.1?}; back after {again:.0?}"
    );
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
}

#[test]
fn pulled_cable_is_noticed_and_survived() {
    check(
        |_, laptop| laptop.namespace.cable().pull(),
        |_, laptop| laptop.namespace.cable().plug(),
        RECOVERED,
    );
}

#[test]
fn interface_that_goes_down_is_noticed_and_survived() {
    check(
        |_, laptop| laptop.namespace.ip("link set eth0 down"),
        |_, laptop| laptop.namespace.ip("link set eth0 up"),
        RECOVERED,
    );
}

#[test]
fn another_address_after_a_while_without_any_is_a_new_beginning() {
    check(
        |_, laptop| laptop.namespace.ip("address flush dev eth0"),
        |_, laptop| {
            laptop
                .namespace
                .ip("address add 10.47.0.99/24 broadcast + dev eth0")
        },
        RECOVERED,
    );
}

#[test]
fn peer_that_lost_its_cable_is_noticed_and_found_again() {
    check(
        |desktop, _| desktop.namespace.cable().pull(),
        |desktop, _| desktop.namespace.cable().plug(),
        RECOVERED,
    );
}

/// No interface goes down on either side, so nobody is told: only asking finds out.
const RECOVERED_UNTOLD: Duration = Duration::from_secs(8);

#[test]
fn peer_whose_packets_vanish_is_noticed_and_found_again() {
    check(
        |desktop, _| desktop.namespace.cable().swallow_packets(),
        |desktop, _| desktop.namespace.cable().pass_packets(),
        RECOVERED_UNTOLD,
    );
}

#[test]
fn stopped_peer_is_noticed_and_found_again() {
    check(
        |desktop, _| desktop.signal(Signal::STOP),
        |desktop, _| desktop.signal(Signal::CONT),
        RECOVERED_UNTOLD,
    );
}

#[test]
fn address_that_changes_at_once_costs_seconds_at_most() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("moving", 1000));
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    let ip = |arguments: &str| laptop.namespace.ip(arguments);
    ip("address flush dev eth0");
    ip("address add 10.47.0.99/24 broadcast + dev eth0");
    // The link that is left over is known to be dead before another one stands: either answer will do, in time.
    let mut answered = Vec::new();
    let (elapsed, ()) = wait_for("the peer is linked from its new address", RECOVERED, || {
        let start = Instant::now();
        let status = laptop.narinfo(&path).status;
        answered.push((start.elapsed(), status));
        let remote = desktop.status().to_string();
        match status == 200 && remote.contains("10.47.0.99") {
            true => Ok(()),
            false => Err(format!("status {status}, {remote}")),
        }
    });
    let worst = answered.iter().max().map(|(took, _)| *took);
    println!("linked again after {elapsed:.0?}, worst answer {worst:.0?}");
    assert!(worst <= Some(WORST), "{answered:?}");
}
