//! How fast the pipes are: bytes over the mutual TLS of the data plane, frames over a link of the control plane.
//!
//! Both ends in one process, on loopback, so the figures hold the work of both machines. Compare only figures of one
//! run; plain TCP tells what the machine gave at that moment. Run with `cargo bench -p granary --bench pipes`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use granary::crowd::Crowd;
use granary::identity::Identity;
use granary::mesh::links::{Limits, SendError};
use granary::mesh::swarm::{Network, NetworkEvent};
use granary::serve::tls::{acceptor, connector};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

const TRANSFER_BYTES: usize = 256 << 20;
const FRAME_TRANSFER_BYTES: usize = 64 << 20;

fn main() {
    divan::main();
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// One connection, written and read in pieces of this many bytes.
#[divan::bench(args = [16 << 10, 64 << 10, 256 << 10], sample_count = 5, sample_size = 1)]
fn mutual_tls(bencher: Bencher, piece: usize) {
    let runtime = runtime();
    let (mut source, mut target) = runtime.block_on(async {
        let server = Identity::from_seed(&[1; 32]);
        let client = Identity::from_seed(&[2; 32]);
        let deadline = Duration::from_secs(10);
        let acceptor = acceptor(&server, None, deadline).unwrap();
        let connector = connector(&client, deadline).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            acceptor.accept(socket, |_| true).await.unwrap().0
        });
        let target = connector.connect(address, server.peer_id()).await.unwrap();
        (accepted.await.unwrap(), target)
    });
    bencher
        .counter(BytesCount::new(TRANSFER_BYTES))
        .bench_local(|| {
            runtime.block_on(transfer(&mut source, &mut target, piece));
        });
}

/// The same over TCP alone, to know what the machine gives at this moment.
#[divan::bench(args = [256 << 10], sample_count = 5, sample_size = 1)]
fn plain_tcp(bencher: Bencher, piece: usize) {
    let runtime = runtime();
    let (mut source, mut target) = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        (listener.accept().await.unwrap().0, target)
    });
    bencher
        .counter(BytesCount::new(TRANSFER_BYTES))
        .bench_local(|| {
            runtime.block_on(transfer(&mut source, &mut target, piece));
        });
}

async fn transfer(
    source: &mut (impl AsyncWriteExt + Unpin),
    target: &mut (impl AsyncReadExt + Unpin),
    piece: usize,
) {
    let write = async {
        let piece = vec![7; piece];
        for _ in 0..TRANSFER_BYTES / piece.len() {
            source.write_all(&piece).await.unwrap();
        }
        source.flush().await.unwrap();
    };
    let read = async {
        let mut piece = vec![0; piece];
        let mut rest = TRANSFER_BYTES;
        while rest > 0 {
            let length = piece.len().min(rest);
            rest -= target.read(&mut piece[..length]).await.unwrap();
        }
    };
    tokio::join!(write, read);
}

/// Frames of this many bytes over one link: an announcement, a batch of lookups, a chunk of a snapshot.
#[divan::bench(args = [100, 8 << 10, 256 << 10], sample_count = 5, sample_size = 1)]
fn link(bencher: Bencher, frame: usize) {
    let runtime = runtime();
    let (mut a, mut b) = runtime.block_on(async {
        let limits = Limits::new(1 << 20);
        let crowd = || Crowd::before_members(Arc::default());
        let listen = ["127.0.0.1:0".parse().unwrap()];
        let mut a = Network::new(&Identity::from_seed(&[1; 32]), &listen, limits, crowd()).unwrap();
        let mut b = Network::new(&Identity::from_seed(&[2; 32]), &listen, limits, crowd()).unwrap();
        let NetworkEvent::Listening(address) = b.next().await else {
            panic!("not listening");
        };
        a.dial(b.peer_id(), vec![address]);
        let (mut up_a, mut up_b) = (false, false);
        while !(up_a && up_b) {
            tokio::select! {
                event = a.next() => up_a |= matches!(event, NetworkEvent::LinkUp { .. }),
                event = b.next() => up_b |= matches!(event, NetworkEvent::LinkUp { .. }),
            }
        }
        (a, b)
    });
    // Small frames cost by the piece: fewer bytes of them.
    let count = (FRAME_TRANSFER_BYTES / frame).min(100_000);
    let body = Bytes::from(vec![7; frame]);
    let peer = b.peer_id();
    bencher
        .counter(BytesCount::new(count * frame))
        .counter(divan::counter::ItemsCount::new(count))
        .bench_local(|| {
            runtime.block_on(async {
                let (mut sent, mut received) = (0, 0);
                while received < count {
                    while sent < count {
                        match a.send(peer, body.clone()) {
                            Ok(()) => sent += 1,
                            Err(SendError::Refused { .. }) => break,
                            Err(other) => panic!("{other}"),
                        }
                    }
                    match b.next().await {
                        NetworkEvent::Frame { .. } => received += 1,
                        other => panic!("{other:?}"),
                    }
                }
            });
        });
}
