//! Peers that lie, die, stall or are asked for too much, and clients that read slowly or leave.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use granary::status;

use crate::client::Client;
use crate::machine::{GATE_BYTES, GENEROUS, LARGE_BYTES, Machine, SMALL_BYTES, Sample, until};
use crate::proxy::Proxy;

/// Asks for a NAR and takes note of what came when.
fn check_wrong_bytes_never_complete(machine: &Machine, path: &Sample) {
    let first = machine.get(&path.short());
    first.assert_below_nar();
    match path.nar.len() > 64 * 1024 {
        true => {
            assert_eq!((first.status, first.is_complete), (200, false));
            assert!(first.body.len() <= path.nar.len() - 64 * 1024);
        }
        false => assert_eq!((first.status, first.body.len()), (404, 0)),
    }
    // What Nix does next.
    let retry = machine.ask(
        "GET",
        &path.short(),
        &format!("Range: bytes={}-\r\n", first.body.len()),
    );
    retry.assert_below_nar();
    assert_eq!(retry.status, 404);
    let report = machine.status();
    assert_eq!(report.nars_mismatched, 1);
    let quarantine = report
        .peers
        .iter()
        .find_map(|peer| peer.quarantine.as_ref());
    assert!(quarantine.unwrap().offence.contains("another hash"));
    let why = machine.get(&format!("/api/v1/why/{}", path.hash));
    let why: status::Why = serde_json::from_slice(&why.body).unwrap();
    assert_eq!(
        (why.status, why.announced_by.len(), why.usable.len()),
        (404, 1, 0),
        "{why}"
    );
    assert!(
        why.reasons
            .iter()
            .any(|reason| reason.contains("quarantine")),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_lies_is_cut_and_another_holder_takes_over() {
    for bytes in [SMALL_BYTES, 300_000] {
        let mut liar = Machine::new();
        let path = liar.add("lie", bytes);
        liar.corrupt(&path.path);
        let mut honest = Machine::new();
        let true_path = honest.add("lie", bytes);
        let mut asker = Machine::new();
        asker.peers = vec![liar.address, honest.address];
        liar.start().await;
        asker.start().await;
        asker.wait_for(&path);
        check_wrong_bytes_never_complete(&asker, &path);

        honest.start().await;
        asker.wait_for(&path);
        let answer = asker.get(&path.short());
        assert!(answer.status == 200 && answer.body == true_path.nar);
        for mut machine in [asker, liar, honest] {
            machine.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_whose_files_vanished_comes_from_a_peer_although_its_row_is_there() {
    let mut peer = Machine::new();
    let path = peer.add("vanished", SMALL_BYTES);
    let mut asker = Machine::new();
    asker.add("vanished", SMALL_BYTES);
    asker.peers = vec![peer.address];
    peer.start().await;
    asker.start().await;
    asker.wait_linked(1);
    std::fs::remove_file(asker.real(&path.path)).unwrap();
    let answer = asker.get(&path.short());
    assert_eq!((answer.status, answer.is_complete), (200, true));
    assert!(answer.body == path.nar);
    peer.stop().await;
    asker.stop().await;
}

/// Two providers of the same large NAR behind proxies, and one who fetches.
async fn two_holders() -> ([(Machine, Arc<Proxy>); 2], Machine, Sample) {
    let mut asker = Machine::new();
    let mut path = None;
    let mut holders = Vec::new();
    for _ in 0..2 {
        let mut holder = Machine::new();
        path = Some(holder.add("large", LARGE_BYTES));
        let proxy = Proxy::before(&mut holder);
        asker.peers.push(holder.address);
        holder.start().await;
        holders.push((holder, proxy));
    }
    asker.start().await;
    asker.wait_linked(2);
    let path = path.unwrap();
    asker.wait_for(&path);
    (holders.try_into().ok().unwrap(), asker, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_dies_is_replaced_within_one_answer() {
    let ([a, b], mut asker, path) = two_holders().await;
    for (_, proxy) in [&a, &b] {
        proxy.allow(GATE_BYTES);
    }
    let mut client = asker.connect();
    client.request("GET", &path.short(), "");
    until("the gate", || a.1.is_stuck() || b.1.is_stuck());
    let (mut serving, mut other) = if a.1.is_stuck() { (a, b) } else { (b, a) };
    other.1.allow(u64::MAX);
    serving.1.cut();
    serving.0.stop().await;
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.is_complete), (200, true));
    assert!(answer.body == path.nar);
    // The other one brought what was missing, and not everything again.
    assert!(other.1.passed.load(Ordering::SeqCst) < LARGE_BYTES as u64 - GATE_BYTES / 2);
    other.0.stop().await;
    asker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_stalls_is_replaced_within_seconds() {
    let ([a, b], mut asker, path) = two_holders().await;
    for (_, proxy) in [&a, &b] {
        proxy.allow(GATE_BYTES);
    }
    let mut client = asker.connect();
    client.request("GET", &path.short(), "");
    until("the gate", || a.1.is_stuck() || b.1.is_stuck());
    let stalled = Instant::now();
    let (serving, other) = if a.1.is_stuck() { (&a, &b) } else { (&b, &a) };
    other.1.allow(u64::MAX);
    // Of the other's bytes, the first one ends the stall.
    let reader = thread::spawn(move || client.answer(false));
    until("the other provider", || {
        other.1.passed.load(Ordering::SeqCst) > 100_000
    });
    let took = stalled.elapsed();
    assert!(
        took > Duration::from_millis(1500) && took < Duration::from_millis(3500),
        "{took:?}"
    );
    let answer = reader.join().unwrap();
    assert_eq!((answer.status, answer.is_complete), (200, true));
    assert!(answer.body == path.nar);
    serving.1.allow(u64::MAX);
    asker.stop().await;
    for (mut machine, _) in [a, b] {
        machine.stop().await;
    }
}

/// A provider behind a proxy, and a client with a small buffer that has asked for its NAR.
async fn one_holder() -> (Machine, Arc<Proxy>, Machine, Sample) {
    let mut provider = Machine::new();
    let path = provider.add("large", LARGE_BYTES);
    let proxy = Proxy::before(&mut provider);
    let mut asker = Machine::new();
    asker.peers.push(provider.address);
    provider.start().await;
    asker.start().await;
    asker.wait_for(&path);
    (provider, proxy, asker, path)
}

/// A client that takes in little before it reads.
async fn reluctant(machine: &Machine) -> Client {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    let stream = socket.connect(machine.endpoint()).await.unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    Client::new(stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_is_waited_for_and_its_provider_kept() {
    let (mut provider, proxy, mut asker, path) = one_holder().await;
    let mut client = reluctant(&asker).await;
    client.request("GET", &path.short(), "");
    // Longer than a provider may stall: here it is Nix that does not read.
    thread::sleep(Duration::from_secs(3));
    assert!(proxy.passed.load(Ordering::SeqCst) < LARGE_BYTES as u64);
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.is_complete), (200, true));
    assert!(answer.body == path.nar);
    assert_eq!(proxy.accepted.load(Ordering::SeqCst), 1);
    asker.stop().await;
    provider.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_the_transfer() {
    let (mut provider, proxy, mut asker, path) = one_holder().await;
    proxy.allow(GATE_BYTES);
    let mut client = asker.connect();
    client.request("GET", &path.short(), "");
    until("the gate", || proxy.is_stuck());
    drop(client);
    // The proxy sees the asker hang up: its own end of the connection reads the end.
    until("the end of the transfer", || {
        let open = proxy.open.lock().unwrap();
        open[0].set_nonblocking(true).unwrap();
        matches!(open[0].peek(&mut [0]), Ok(0)) || open[0].peer_addr().is_err()
    });
    proxy.allow(u64::MAX);
    let again = asker.get(&path.short());
    assert!(again.body == path.nar);
    let started = Instant::now();
    asker.stop().await;
    provider.stop().await;
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "tasks were left behind"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_finishes_what_is_under_way() {
    let (mut provider, proxy, asker, path) = one_holder().await;
    proxy.allow(GATE_BYTES);
    let mut client = asker.connect();
    client.request("GET", &path.short(), "");
    until("the gate", || proxy.is_stuck());
    let mut asker = asker;
    let daemon = asker.daemon.take().unwrap();
    let address = daemon.tcp().unwrap();
    let stopping = tokio::spawn(async move { daemon.stop().await });
    until("the goodbye", || {
        let mut other = Client::new(TcpStream::connect(address).unwrap());
        other.request("GET", "/nix-cache-info", "");
        other
            .answer(false)
            .head
            .to_lowercase()
            .contains("connection: close")
    });
    // Long enough for the provider to hear that we leave, were it told already.
    thread::sleep(Duration::from_secs(1));
    proxy.allow(u64::MAX);
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.is_complete), (200, true));
    assert!(answer.body == path.nar);
    stopping.await.unwrap();
    provider.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_provider_is_waited_for() {
    let mut provider = Machine::new();
    let path = provider.add("large", LARGE_BYTES);
    let small = provider.add("small", SMALL_BYTES);
    let proxy = Proxy::before(&mut provider);
    provider.extra = "[limits]\nstreams-per-peer = 1\n".into();
    let mut asker = Machine::new();
    asker.peers.push(provider.address);
    provider.start().await;
    asker.start().await;
    asker.wait_for(&path);
    asker.wait_for(&small);

    proxy.allow(GATE_BYTES);
    let (mut first, mut second) = (asker.connect(), asker.connect());
    first.request("GET", &path.short(), "");
    until("the gate", || proxy.is_stuck());
    // A HEAD takes no place, and a NAR waits for one.
    assert_eq!(asker.ask("HEAD", &small.short(), "").status, 200);
    second.request("GET", &small.short(), "");
    second
        .stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let early = second.stream.peek(&mut [0]);
    assert!(early.is_err(), "answered while the provider was busy");
    second.stream.set_read_timeout(Some(GENEROUS)).unwrap();
    proxy.allow(u64::MAX);
    let answers = (first.answer(false), second.answer(false));
    assert!(answers.0.body == path.nar);
    assert_eq!(answers.1.status, 200);
    assert!(answers.1.body == small.nar);
    asker.stop().await;
    provider.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_changes_a_byte_breaks_the_connection_and_blames_nobody_for_a_lie() {
    let (mut holder, proxy, mut asker, path) = one_holder().await;
    proxy.tampers.store(true, Ordering::SeqCst);
    let answer = asker.get(&path.short());
    // Nothing that was changed on the way gets out of TLS.
    assert!(!(answer.status == 200 && answer.is_complete));
    assert!(path.nar.starts_with(&answer.body));
    assert_eq!(asker.status().nars_mismatched, 0);
    proxy.tampers.store(false, Ordering::SeqCst);
    until("the path to be fetched again", || {
        let answer = asker.get(&path.short());
        answer.status == 200 && answer.body == path.nar
    });
    asker.stop().await;
    holder.stop().await;
}
