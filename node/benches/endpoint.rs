//! How soon the endpoint answers: p50 and p99 of what Nix waits for.
//!
//! Real nodes over real chroot stores in one process, on loopback; the 1 GiB path is worth a store in memory:
//! `TMPDIR=/dev/shm cargo bench -p granary --bench endpoint`. One connection, one request after another; a "first
//! byte" is the first byte of the body. Compare only figures of one run.

use std::time::{Duration, Instant};

#[path = "../tests/endpoint/client.rs"]
#[allow(dead_code, reason = "shared with the endpoint's tests")]
mod client;
#[path = "../tests/endpoint/machine.rs"]
#[allow(dead_code, reason = "shared with the endpoint's tests")]
mod machine;

use client::Client;
use machine::{Machine, SMALL_BYTES, Sample};

const REQUESTS: usize = 5000;
const FIRST_BYTES: usize = 500;
const RANGES: usize = 500;
const RANGE_BYTES: usize = 64 * 1024;
const PEERS: usize = 3;
const GIBIBYTE: usize = 1 << 30;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure());
}

async fn measure() {
    let mut asker = Machine::new();
    let own = asker.add("own", SMALL_BYTES);
    let large = asker.add("large", GIBIBYTE);
    let mut peers = Vec::new();
    let mut theirs = Vec::new();
    for number in 0..PEERS {
        let mut peer = Machine::new();
        theirs.push(peer.add(&format!("theirs-{number}"), 1_000_000 + number));
        peer.start().await;
        asker.peers.push(peer.address);
        peers.push(peer);
    }
    // Nothing is there: what an anchor that is switched off looks like to a node that knows its address.
    asker.peers.push(machine::own_address());
    asker.start().await;
    asker.wait_linked(PEERS);

    println!("{:<44} {:>9} {:>9} {:>9}", "", "p50", "p99", "worst");
    let absent = "/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo";
    report(
        "narinfo of a local path",
        narinfos(&asker, &own.narinfo(), 200),
    );
    report(
        "narinfo of an absent path, 3 peers",
        narinfos(&asker, absent, 404),
    );
    report(
        "narinfo of a peer's path, known",
        narinfos(&asker, &theirs[0].narinfo(), 200),
    );
    report("first byte of a local nar", first_bytes(&asker, &[own]));
    report(
        "first byte of a peer's nar, 1 MB",
        first_bytes(&asker, &theirs),
    );
    report(
        "range of 64 KiB anywhere in a local 1 GiB nar",
        ranges(&asker, &large),
    );
    asker.stop().await;
    for mut peer in peers {
        peer.stop().await;
    }
}

fn narinfos(machine: &Machine, target: &str, status: u16) -> Vec<Duration> {
    let mut client = machine.connect();
    let ask = |_| {
        let start = Instant::now();
        client.request("GET", target, "");
        assert_eq!(client.answer(false).status, status);
        start.elapsed()
    };
    (0..REQUESTS).map(ask).collect()
}

fn first_bytes(machine: &Machine, paths: &[Sample]) -> Vec<Duration> {
    let mut client = machine.connect();
    let ask = |number| {
        let path: &Sample = &paths[number % paths.len()];
        let start = Instant::now();
        let took = first_byte(&mut client, &path.short(), "", start);
        assert!(rest(&mut client, path.nar.len()) == path.nar);
        took
    };
    (0..FIRST_BYTES).map(ask).collect()
}

fn ranges(machine: &Machine, path: &Sample) -> Vec<Duration> {
    let mut client = machine.connect();
    let step = (path.nar.len() - RANGE_BYTES) / RANGES;
    let ask = |number: usize| {
        // Back and forth, so that nothing is read ahead.
        let from = step * (number * 211 % RANGES);
        let headers = format!("Range: bytes={from}-{}\r\n", from + RANGE_BYTES - 1);
        let took = first_byte(&mut client, &path.short(), &headers, Instant::now());
        assert!(rest(&mut client, RANGE_BYTES) == path.nar[from..from + RANGE_BYTES]);
        took
    };
    (0..RANGES).map(ask).collect()
}

/// Asks for a NAR and waits until some of it is there.
fn first_byte(client: &mut Client, target: &str, headers: &str, start: Instant) -> Duration {
    client.request("GET", target, headers);
    let head = client.head();
    assert!(head.starts_with("HTTP/1.1 20"), "{head}");
    while client.rest.is_empty() {
        assert!(client.read());
    }
    start.elapsed()
}

/// The body of the answer that is coming.
fn rest(client: &mut Client, length: usize) -> Vec<u8> {
    while client.rest.len() < length {
        assert!(client.read());
    }
    std::mem::take(&mut client.rest)
}

fn report(what: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() * percent / 100).min(took.len() - 1)];
    println!(
        "{what:<44} {:>9.1?} {:>9.1?} {:>9.1?}",
        at(50),
        at(99),
        at(100)
    );
}
