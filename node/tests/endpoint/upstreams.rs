//! Anchors and upstreams behind the endpoint: packed in every way, slow, silent, lying, cut short.

use std::fs::{self, Permissions};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use granary::config::Config;
use granary::daemon::Daemon;
use granary::history::{self, Spans};
use granary::status;

use crate::machine::{GATE_BYTES, LARGE_BYTES, Machine, SMALL_BYTES, Sample, own_address, until};
use crate::proxy::Proxy;
use crate::web::{Web, gzip_narinfo};

/// A cache that holds one path, packed, and a machine that knows nobody else.
async fn upstream_of(name: &str, bytes: usize, compression: &str) -> (Arc<Web>, Machine, Sample) {
    let builder = Machine::new();
    let path = builder.add(name, bytes);
    let web = Web::new();
    web.take(&builder, &path, compression);
    let mut machine = Machine::new();
    machine.extra = web.as_upstream();
    machine.start().await;
    wait_ready(&machine);
    (web, machine, path)
}

/// Until caches are asked.
fn wait_ready(machine: &Machine) {
    until("the mind", || !machine.status().caches.is_empty());
}

fn timed(machine: &Machine, target: &str) -> (u16, Duration) {
    let started = Instant::now();
    let status = machine.get(target).status;
    (status, started.elapsed())
}

/// What `/health` says about the mesh.
fn mesh_of(machine: &Machine) -> String {
    let health: serde_json::Value = serde_json::from_slice(&machine.get("/health").body).unwrap();
    health["mesh"].as_str().unwrap().to_owned()
}

/// A narinfo that nobody has; every number is another one.
fn unknown(number: u8) -> String {
    let digit = char::from(b'a' + number % 4);
    format!(
        "/{}{digit}{}.narinfo",
        "0".repeat(15 + usize::from(number / 4)),
        "1".repeat(16 - usize::from(number / 4))
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_from_where_is_known_after_a_restart_and_a_broken_file_is_begun_anew() {
    let (_web, mut machine, path) = upstream_of("counted", SMALL_BYTES, "none").await;
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    assert_eq!(machine.get(&path.short()).status, 200);
    let size = path.nar.len() as u64;
    let counted = |machine: &Machine| {
        let history = machine.status().history;
        let of = |spans: &[history::Span]| {
            let total = Spans::total(spans);
            (total.upstream, total.upstream_bytes)
        };
        assert_eq!(of(&history.hours), of(&history.days));
        of(&history.days)
    };
    let first = counted(&machine);
    assert_eq!(first, (1, size));
    machine.stop().await;
    machine.start().await;
    wait_ready(&machine);
    assert_eq!(counted(&machine), first);
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    assert_eq!(counted(&machine), (2, size));
    machine.stop().await;

    let file = machine.state().join("history.json");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    for broken in ["", "{\"hours\": 3}", &"[".repeat(200_000)] {
        fs::write(&file, broken).unwrap();
        machine.start().await;
        wait_ready(&machine);
        assert_eq!(counted(&machine), (0, 0));
        machine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_compression_of_an_upstream_is_one_byte_string_to_nix() {
    let builder = Machine::new();
    let web = Web::new();
    let mut paths = Vec::new();
    for (number, compression) in ["none", "xz", "bzip2", "gzip", "zstd", "br"]
        .iter()
        .enumerate()
    {
        let path = builder.add(compression, 300_000 + number);
        web.take(&builder, &path, compression);
        paths.push((path, *compression));
    }
    let mut machine = Machine::new();
    machine.extra = web.as_upstream();
    machine.start().await;
    wait_ready(&machine);
    for (path, compression) in &paths {
        let narinfo = machine.get(&path.narinfo());
        assert_eq!(narinfo.status, 200, "{compression}");
        assert_eq!(narinfo.line("Compression"), Some("none"));
        assert!(narinfo.line("Sig").unwrap().starts_with("test-1:"));
        let url = format!("/{}", narinfo.line("URL").unwrap());
        let whole = machine.get(&url);
        whole.assert_below_nar();
        assert!(
            whole.status == 200 && whole.body == path.nar,
            "{compression}"
        );
        let rest = machine.ask("GET", &url, "Range: bytes=123456-\r\n");
        assert_eq!((rest.status, rest.is_complete), (206, true));
        assert!(rest.body == path.nar[123_456..], "{compression}");
    }
    // And the real client, with Granary as its only substituter.
    let client = Machine::new();
    for (path, _) in &paths {
        client.nix("nix", &["copy", "--from", &machine.url(), &path.path]);
        client.nix("nix", &["store", "verify", &path.path]);
    }
    // A client has a NAR a moment before it is counted.
    until("all to be counted", || machine.status().nars.upstream == 18);
    let report = machine.status();
    assert!(report.narinfos.upstream >= 6, "{report}");
    assert_eq!(report.caches[0].role, "upstream");
    assert_eq!(report.caches[0].failed_probe_in, None);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_of_no_mesh_asks_upstreams_all_the_same() {
    let builder = Machine::new();
    let path = builder.add("lonely", SMALL_BYTES);
    let web = Web::new();
    web.take(&builder, &path, "xz");
    let mut machine = Machine::new();
    machine.extra = web.as_upstream();
    let text = machine.config_text();
    let mesh_key = text
        .lines()
        .find(|line| line.starts_with("key = "))
        .unwrap();
    let config = Config::parse(&text.replace(mesh_key, "")).unwrap();
    machine.daemon = Some(Daemon::start(config).await.unwrap());
    machine.wait_for(&path);
    assert!(machine.get(&path.short()).body == path.nar);
    let report = machine.status();
    assert!(report.about.mesh.is_none() && report.peers.is_empty());
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_waits_for_its_certificate_asks_upstreams_meanwhile() {
    let mut peer = Machine::new();
    let (near, far) = (peer.add("near", 300_000), peer.add("far", SMALL_BYTES));
    let web = Web::new();
    web.take(&peer, &far, "xz");
    peer.start().await;
    let mut machine = Machine::new();
    machine.extra = web.as_upstream();
    machine.peers = vec![peer.address];
    machine.daemon = Some(machine.try_start().await.unwrap());
    machine.wait_for(&far);
    assert!(machine.get(&far.short()).body == far.nar);
    assert_eq!(machine.get(&near.narinfo()).status, 404);
    assert_eq!(mesh_of(&machine), "waiting");
    let report = machine.status();
    assert!(
        report.about.mesh.unwrap().certificate.is_none(),
        "not a member"
    );

    machine.admit();
    machine.wait_linked(1);
    machine.wait_for(&near);
    assert!(machine.get(&near.short()).body == near.nar);
    assert!(machine.get(&far.short()).body == far.nar);
    assert_eq!(mesh_of(&machine), "joined");
    machine.stop().await;
    peer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_a_peer_has_comes_from_the_peer() {
    let mut peer = Machine::new();
    let path = peer.add("near", 300_000);
    let web = Web::new();
    web.take(&peer, &path, "xz");
    let mut machine = Machine::new();
    machine.extra = web.as_upstream();
    machine.peers = vec![peer.address];
    peer.start().await;
    machine.start().await;
    machine.wait_linked(1);
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    assert!(machine.get(&path.short()).body == path.nar);
    assert!(web.requests.lock().unwrap().is_empty());
    assert_eq!(machine.status().nars.peer, 1);
    machine.stop().await;
    peer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_goes_on_where_the_last_peer_broke_off() {
    for compression in ["none", "zstd"] {
        let mut peer = Machine::new();
        let path = peer.add("large", LARGE_BYTES);
        let proxy = Proxy::before(&mut peer);
        let web = Web::new();
        web.take(&peer, &path, compression);
        let mut machine = Machine::new();
        machine.extra = web.as_upstream();
        machine.peers = vec![peer.address];
        peer.start().await;
        machine.start().await;
        machine.wait_linked(1);
        proxy.allow(GATE_BYTES);
        let mut client = machine.connect();
        client.request("GET", &path.short(), "");
        until("the gate", || proxy.is_stuck());
        assert!(web.requests.lock().unwrap().is_empty());
        proxy.cut();
        peer.stop().await;
        let answer = client.answer(false);
        assert_eq!(
            (answer.status, answer.is_complete),
            (200, true),
            "{compression}"
        );
        assert!(answer.body == path.nar);
        let [from] = web.nars_asked()[..] else {
            panic!("{:?}", web.requests)
        };
        // Offsets of a packed file mean nothing.
        assert_eq!(from > 1_000_000, compression == "none", "{from}");
        machine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_is_cut_in_mid_nar_is_asked_for_the_rest() {
    for (compression, ignores_ranges) in [("none", false), ("none", true), ("xz", false)] {
        let (web, mut machine, path) = upstream_of("cut", 3_000_000, compression).await;
        web.set(|manners| {
            manners.cut_next_nar_at = Some(1_000_000);
            manners.ignores_ranges = ignores_ranges;
        });
        let answer = machine.get(&path.short());
        assert_eq!(
            (answer.status, answer.is_complete),
            (200, true),
            "{compression}"
        );
        assert!(answer.body == path.nar);
        assert_eq!(web.nars_asked().len(), 2);
        let resumes = compression == "none" && !ignores_ranges;
        assert_eq!(web.nars_asked()[1] > 0, resumes, "{:?}", web.nars_asked());
        machine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_clients_wait_for_a_nar_it_is_downloaded_once() {
    let (web, mut machine, path) = upstream_of("awaited", 3_000_000, "zstd").await;
    // So long that all have asked before the first byte comes.
    web.set(|manners| manners.delay = Duration::from_millis(300));
    let middle = format!("bytes=1000000-{}", path.nar.len() - 1);
    thread::scope(|scope| {
        for client in 0..24 {
            let (machine, path, middle) = (&machine, &path, &middle);
            scope.spawn(move || {
                let (headers, from) = match client % 8 {
                    0 => (format!("Range: {middle}\r\n"), 1_000_000),
                    _ => (String::new(), 0),
                };
                let answer = machine.ask("GET", &path.short(), &headers);
                assert!(answer.is_complete);
                assert!(answer.body == path.nar[from..]);
            });
        }
    });
    assert_eq!(web.nars_asked(), [0]);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_on_holds_up_no_other() {
    let (web, mut machine, path) = upstream_of("shared", 48_000_000, "none").await;
    web.set(|manners| manners.delay = Duration::from_millis(300));
    let mut slow = machine.connect();
    slow.request("GET", &path.short(), "");
    let answer = machine.get(&path.short());
    assert!(answer.is_complete && answer.body == path.nar);
    assert!(slow.answer(false).body == path.nar);
    let asked = web.nars_asked().len();
    assert!(asked <= 2, "{asked}");
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_an_upstream_never_complete() {
    for (bytes, compression) in [(SMALL_BYTES, "none"), (300_000, "none"), (300_000, "xz")] {
        let (web, mut machine, path) = upstream_of("lie", bytes, compression).await;
        web.set(|manners| manners.is_lying = true);
        let answer = machine.get(&path.short());
        answer.assert_below_nar();
        assert!(answer.status == 404 || !answer.is_complete, "{compression}");
        assert!(answer.body.len() <= path.nar.len().saturating_sub(64 * 1024));
        let range = format!("Range: bytes={}-\r\n", answer.body.len());
        assert_eq!(machine.ask("GET", &path.short(), &range).status, 404);
        machine.stop().await;
    }
}

/// Asks for what nobody has until the breaker knows, then as fast as it must be.
fn check_waits_are_bounded(machine: &Machine) {
    let mut number = 0;
    until("the breaker", || {
        number += 1;
        let (status, took) = timed(machine, &unknown(number));
        assert_eq!(status, 404);
        assert!(took < Duration::from_millis(1300), "{took:?}");
        let report = machine.status();
        report.caches[0].failed_probe_in.is_some()
    });
    assert!(number <= 3, "{number} waits");
    let mut waits: Vec<Duration> = (20..60)
        .map(|number| {
            let (status, took) = timed(machine, &unknown(number));
            assert_eq!(status, 404);
            took
        })
        .collect();
    waits.sort_unstable();
    let median = waits[waits.len() / 2];
    assert!(median < Duration::from_millis(50), "{waits:?}");
    let why = machine.get(&format!("/api/v1/why/{}", &unknown(60)[1..33]));
    let why: status::Why = serde_json::from_slice(&why.body).unwrap();
    let says = |word: &str| why.reasons.iter().any(|reason| reason.contains(word));
    assert!(says("does not answer"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_accepts_and_says_nothing_is_soon_not_waited_for_and_found_again() {
    let (web, mut machine, path) = upstream_of("later", SMALL_BYTES, "xz").await;
    web.set(|manners| manners.is_silent = true);
    check_waits_are_bounded(&machine);
    web.set(|manners| manners.is_silent = false);
    // A probe is due after five seconds or so; whoever asks meanwhile triggers it.
    machine.wait_for(&path);
    assert!(machine.get(&path.short()).body == path.nar);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_anchor_whose_packets_are_dropped_is_soon_not_waited_for() {
    // A full backlog makes the kernel drop what comes to it, like a firewall does.
    let address = SocketAddr::from((own_address(), 8080));
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let soon = Duration::from_millis(200);
    let mut fillers = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, soon) {
        fillers.push(stream);
        assert!(fillers.len() < 16, "nothing is dropped");
    }
    let mut machine = Machine::new();
    machine.extra = format!("[[anchor]]\nurl = \"http://{address}/main\"\n");
    machine.start().await;
    wait_ready(&machine);
    check_waits_are_bounded(&machine);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_in_trouble_is_404_to_nix() {
    let (web, mut machine, path) = upstream_of("trouble", SMALL_BYTES, "xz").await;
    for status in [500, 503, 429, 401, 301, 200] {
        // 200 with something else is what a captive portal says.
        web.set(|manners| manners.status = Some(status));
        let (found, took) = timed(&machine, &path.narinfo());
        assert_eq!(found, 404, "{status}");
        assert!(took < Duration::from_millis(1300), "{took:?}");
    }
    let report = machine.status();
    assert!(report.caches[0].failed_probe_in.is_some());
    web.set(|manners| manners.status = None);
    machine.wait_for(&path);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_anchor_is_shown_the_token_and_asked_before_upstreams() {
    let builder = Machine::new();
    let path = builder.add("private", SMALL_BYTES);
    let (anchor, upstream) = (Web::new(), Web::new());
    anchor.take(&builder, &path, "zstd");
    upstream.take(&builder, &path, "xz");
    anchor.set(|manners| manners.token = Some("secret-token".into()));
    let mut machine = Machine::new();
    let token = machine.folder().join("token");
    fs::write(&token, "secret-token\n").unwrap();
    fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
    machine.extra = format!(
        "{}[[anchor]]\nurl = \"{}\"\ntoken-file = {token:?}\n",
        upstream.as_upstream(),
        anchor.url()
    );
    machine.start().await;
    machine.wait_for(&path);
    assert!(machine.get(&path.short()).body == path.nar);
    assert_eq!(anchor.nars_asked(), [0]);
    assert!(upstream.nars_asked().is_empty());
    assert_eq!(machine.status().nars.anchor, 1);
    let status = machine.get("/api/v1/status");
    assert!(!String::from_utf8_lossy(&status.body).contains("secret-token"));
    machine.stop().await;

    // One who may not read hears what those hear who ask for what is not there.
    fs::write(&token, "another").unwrap();
    machine.address = own_address();
    machine.start().await;
    machine.wait_for(&path);
    assert!(machine.get(&path.short()).body == path.nar);
    assert_eq!(upstream.nars_asked(), [0]);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_narinfo_that_is_stored_encoded_is_read() {
    let (web, mut machine, path) = upstream_of("encoded", SMALL_BYTES, "xz").await;
    gzip_narinfo(web.folder.path(), &path);
    let narinfo = machine.get(&path.narinfo());
    assert_eq!(narinfo.status, 200);
    assert_eq!(narinfo.header("content-encoding"), None);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_upstream_lacks_is_not_asked_again_at_once_and_a_burst_is_asked_at_once() {
    let (web, mut machine, _) = upstream_of("burst", SMALL_BYTES, "xz").await;
    let delay = Duration::from_millis(200);
    web.set(|manners| manners.delay = delay);
    let started = Instant::now();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..24)
            .map(|number| {
                let machine = &machine;
                scope.spawn(move || assert_eq!(machine.get(&unknown(number)).status, 404))
            })
            .collect();
        clients
            .into_iter()
            .for_each(|client| client.join().unwrap());
    });
    assert!(
        started.elapsed() < delay * 24 / 2,
        "one after the other: {:?}",
        started.elapsed()
    );
    let asked = web.narinfos_asked();
    for number in 0..24 {
        let (status, took) = timed(&machine, &unknown(number));
        assert_eq!(status, 404);
        assert!(took < delay, "{took:?}");
    }
    assert_eq!(web.narinfos_asked(), asked);
    machine.stop().await;
}
