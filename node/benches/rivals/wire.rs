//! The data plane between two nodes, beside TLS alone with the same cipher in the same run.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use granary::identity::Identity;
use granary::serve::tls;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::load::{Load, nar_url};
use crate::machine::{Lan, Machine, SUBSTITUTER_PORT, TRANSFER_PORT, hash_of};
use crate::{LARGE_BYTES, OFFERED, in_turn, row};

const DEADLINE: Duration = Duration::from_secs(10);

/// What a node writes at once.
const PIECE_BYTES: usize = 256 << 10;

/// Enough for what one stream takes to stand out of what the process takes anyway.
const STREAMS: u32 = 64;

pub fn measure(lan: &Lan, desktop: &Machine, large: &str) {
    let mut laptop = lan.machine("laptop");
    laptop.start();
    laptop.wait_linked(&[desktop]);
    laptop.wait_offered(large, OFFERED);

    let own = SocketAddr::from((Ipv4Addr::LOCALHOST, SUBSTITUTER_PORT));
    let target = nar_url(&laptop, own, hash_of(large));
    row(
        "node to node, 1 GiB (beside: TLS alone)",
        "MB/s",
        in_turn(
            || {
                laptop
                    .namespace
                    .inside(|| transfer(&laptop, desktop, &target))
            },
            Some(|| alone(&laptop, desktop)),
        ),
        ">= 0.85",
    );
    let targets = [target.clone()];
    let through = || Load::run(&laptop, own, &targets, 1, 3 * crate::SAMPLE).bytes / 1e6;
    row(
        "through the endpoint of the other node, verified",
        "MB/s",
        (through(), None),
        "",
    );
    let memory = laptop
        .namespace
        .inside(|| memory(&laptop, desktop, &target));
    row(
        "memory of the holder for a stream",
        "MiB",
        (memory, None),
        "<= 2 MiB",
    );
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn identity(machine: &Machine) -> Identity {
    Identity::load_or_create(&machine.state().join("identity")).expect("an identity")
}

/// Opens a stream of the NAR, as the member that `laptop` is.
async fn open(laptop: &Machine, desktop: &Machine, target: &str) -> impl AsyncRead + Unpin + use<> {
    let connector = tls::connector(&identity(laptop), DEADLINE).expect("a connector");
    let address = desktop.at(TRANSFER_PORT);
    let expected = identity(desktop).peer_id();
    let mut stream = connector.connect(address, expected).await.expect("connect");
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("write");
    stream
}

/// Returns MB/s.
fn transfer(laptop: &Machine, desktop: &Machine, target: &str) -> f64 {
    runtime().block_on(async {
        let mut stream = open(laptop, desktop, target).await;
        let started = Instant::now();
        let bytes = drain(&mut stream).await;
        assert!(bytes > LARGE_BYTES as u64, "{bytes} bytes came");
        bytes as f64 / started.elapsed().as_secs_f64() / 1e6
    })
}

/// The same bytes over the same TLS and the same cable, from memory and to nowhere.
fn alone(laptop: &Machine, desktop: &Machine) -> f64 {
    let (tell, told) = mpsc::sync_channel(1);
    thread::scope(|scope| {
        scope.spawn(|| desktop.namespace.inside(|| send_alone(desktop, tell)));
        let address = told.recv().expect("an address");
        laptop.namespace.inside(|| receive_alone(address))
    })
}

fn ends() -> (Identity, Identity) {
    (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]))
}

fn send_alone(desktop: &Machine, tell: mpsc::SyncSender<SocketAddr>) {
    runtime().block_on(async {
        let acceptor = tls::acceptor(&ends().0, None, DEADLINE).expect("an acceptor");
        let listener = TcpListener::bind((desktop.namespace.address, 0)).await;
        let listener = listener.expect("bind");
        let address = listener.local_addr().expect("an address");
        tell.send(address).expect("somebody listens");
        let (socket, _) = listener.accept().await.expect("accept");
        let (mut stream, ..) = acceptor.accept(socket, |_| true).await.expect("a session");
        let piece = vec![0; PIECE_BYTES];
        for _ in 0..LARGE_BYTES / PIECE_BYTES {
            stream.write_all(&piece).await.expect("write");
        }
        stream.shutdown().await.expect("end");
    });
}

/// Returns MB/s.
fn receive_alone(address: SocketAddr) -> f64 {
    runtime().block_on(async {
        let (server, client) = ends();
        let connector = tls::connector(&client, DEADLINE).expect("a connector");
        let connect = connector.connect(address, server.peer_id()).await;
        let mut stream = connect.expect("connect");
        let started = Instant::now();
        let bytes = drain(&mut stream).await;
        bytes as f64 / started.elapsed().as_secs_f64() / 1e6
    })
}

async fn drain(stream: &mut (impl AsyncRead + Unpin)) -> u64 {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer).await.expect("read") {
            0 => return bytes,
            read => bytes += read as u64,
        }
    }
}

/// Returns by how many MiB the holder grows for each stream whose reader stands still.
fn memory(laptop: &Machine, desktop: &Machine, target: &str) -> f64 {
    runtime().block_on(async {
        let before = resident(desktop);
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = open(laptop, desktop, target).await;
            let mut first = [0; 1];
            stream.read_exact(&mut first).await.expect("a first byte");
            streams.push(stream);
        }
        (resident(desktop) - before) / f64::from(STREAMS)
    })
}

/// MiB of memory that a node holds.
fn resident(machine: &Machine) -> f64 {
    let file = format!("/proc/{}/status", machine.pid().as_raw_pid());
    let status = std::fs::read_to_string(file).expect("a process");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("its memory");
    let kibibytes: f64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kibibytes / 1024.0
}
