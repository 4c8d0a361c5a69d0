//! Floods: what a member that means harm, or a crowd of strangers, costs the others. Nodes are processes of their
//! own, so that what they take can be seen; who floods them is this one, over real connections.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use granary::crowd::Crowd;
use granary::identity::Identity;
use granary::mesh::links::Limits;
use granary::mesh::swarm::{Network, NetworkEvent};
use granary::serve::tls;
use granary::status::Report;
use granary_protocol::availability::{Cursor, HashPrefix};
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::message::{
    CURSORS_MAX, LOOKUP_HASHES_MAX, Message, PROTOCOL_VERSION, Summary, WriterCursor,
};
use granary_protocol::peer::PeerId;
use granary_protocol::wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::client::{Answer, Client};
use crate::machine::{
    GENEROUS, LARGE_BYTES, MESH_PORT, Machine, SMALL_BYTES, Sample, TRANSFER_PORT, key, until,
};
use crate::process::Node;

/// Paths that are looked up for the first time during a flood, one after another.
const PATHS: usize = 8;

/// The longest that another member waits for a narinfo meanwhile, and asks again where the answer of 1 s was 404: two
/// cores are shared with those who flood.
const LOOKUP_MAX: Duration = Duration::from_secs(3);

/// Connections that ask for narinfos without end, ones that fetch without end, and ones that never read.
const ASKING: usize = 8;
const FETCHING: usize = 16;
const STANDING: usize = 24;

/// More than a stranger's address may fail in a burst.
const STRANGERS: usize = 1_000;

const MEMORY_KILOBYTES_MAX: u64 = 256 * 1024;

/// What one member may hold: twice its 32 streams, with a file each, and the strangers of one address.
const DESCRIPTORS_MAX: usize = 64 + 32 + 64 + 32;

/// A node, and where it answers.
struct Running {
    node: Node,
    endpoint: SocketAddr,
}

impl Running {
    fn start(machine: &Machine) -> Running {
        machine.admit();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        let node = Node::start(machine, Some(&listener), &[]);
        Running { node, endpoint }
    }

    fn get(&self, target: &str) -> Answer {
        let mut client = Client::new(TcpStream::connect(self.endpoint).unwrap());
        client.request("GET", target, "");
        client.answer(false)
    }

    fn report(&self) -> Option<Report> {
        let answer = self.get("/api/v1/status");
        (answer.status == 200).then(|| serde_json::from_slice(&answer.body).unwrap())
    }

    fn refusals(&self, reason: &str) -> u64 {
        let report = self.report().unwrap();
        report.refusals.get(reason).copied().unwrap_or(0)
    }
}

/// Two members, one of which has something, and both machines.
struct Pair {
    desktop: Machine,
    _laptop: Machine,
    holder: Running,
    asker: Running,
    small: Vec<Sample>,
    large: Sample,
}

impl Pair {
    fn new() -> Pair {
        let (desktop, mut laptop) = (Machine::new(), Machine::new());
        let small: Vec<_> = (0..PATHS)
            .map(|number| desktop.add(&format!("small-{number}"), SMALL_BYTES + number))
            .collect();
        let large = desktop.add("large", LARGE_BYTES);
        let holder = Running::start(&desktop);
        laptop.peers = vec![desktop.address];
        let asker = Running::start(&laptop);
        until("the laptop hears of the paths", || {
            let heard = |report: Report| report.peers.iter().any(|peer| peer.paths > PATHS as u64);
            asker.report().is_some_and(heard)
        });
        Pair {
            desktop,
            _laptop: laptop,
            holder,
            asker,
            small,
            large,
        }
    }

    /// Looks up everything and fetches the large path; returns how long the slowest lookup and the fetch took.
    fn use_all(&self) -> (Duration, Duration) {
        let mut slowest = Duration::ZERO;
        for path in &self.small {
            let asked = Instant::now();
            until("a narinfo", || {
                self.asker.get(&path.narinfo()).status == 200
            });
            slowest = slowest.max(asked.elapsed());
        }
        let asked = Instant::now();
        assert_eq!(self.asker.get(&self.large.narinfo()).status, 200);
        let answer = self.asker.get(&self.large.short());
        assert_eq!(answer.status, 200);
        assert!(answer.body == self.large.nar);
        (slowest, asked.elapsed())
    }
}

/// A member that follows every protocol and no custom.
#[derive(Clone)]
struct Flooder {
    identity: Identity,
    certificate: SignedCertificate,
    ended: CancellationToken,
    /// What it said, or was told, so often.
    count: Arc<AtomicU64>,
}

impl Flooder {
    fn new() -> Flooder {
        let identity = Identity::from_seed(&[9; 32]);
        let certificate = Certificate {
            peer: PeerId::from_public_key(identity.public_key()),
            name: "flooder".into(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(0),
            not_after: UnixTime(u64::MAX / 2),
            serial: 1,
        };
        Flooder {
            certificate: certificate.sign(&key("mesh")).unwrap(),
            identity,
            ended: CancellationToken::new(),
            count: Arc::default(),
        }
    }

    /// Everything that costs the other side more than this one, again and again.
    fn words(&self, holder: PeerId) -> Vec<Bytes> {
        let writers = (0..CURSORS_MAX as u32).map(|number| {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&number.to_be_bytes());
            WriterCursor {
                writer: PeerId::from_public_key(key),
                contact: u64::MAX,
                cursor: None,
            }
        });
        let words = [
            Message::Cursors {
                cursors: writers.collect(),
                is_complete: true,
            },
            Message::Pull {
                writer: holder,
                contact: 0,
                after: None,
            },
            Message::PullPage {
                writer: holder,
                cursor: Cursor {
                    epoch: 1,
                    sequence: 1,
                },
                after: HashPrefix(0),
            },
            Message::Summary {
                summary: Summary([7; 32]),
            },
        ];
        let words = words.iter().map(|word| Bytes::from(wire::encode(word)));
        words.collect()
    }

    async fn say_without_end(self, address: SocketAddr, path: Sample) {
        let listen = [SocketAddr::from(([127, 0, 0, 1], 0))];
        let limits = Limits::new(wire::FRAME_BYTES_MAX);
        let crowd = Crowd::before_members(Arc::default());
        let mut network = Network::new(&self.identity, &listen, limits, crowd).unwrap();
        network.dial_unknown(address);
        let mut told: Option<(_, Vec<Bytes>)> = None;
        let mut number = 0;
        while !self.ended.is_cancelled() {
            while let Some((peer, words)) = &told {
                // Each lookup has a number of its own, and is the only word that is made anew.
                let frame = match number % 8 {
                    0 => {
                        let request = number;
                        let hashes = vec![path.hash.parse().unwrap(); LOOKUP_HASHES_MAX];
                        Bytes::from(wire::encode(&Message::Lookup { request, hashes }))
                    }
                    _ => words[number as usize % words.len()].clone(),
                };
                if network.send(*peer, frame).is_err() {
                    break;
                }
                number += 1;
                self.count.fetch_add(1, Ordering::Relaxed);
            }
            let event = tokio::time::timeout(Duration::from_millis(20), network.next()).await;
            match event {
                Ok(NetworkEvent::LinkUp { peer, .. }) => {
                    let knock = Message::Knock {
                        version: PROTOCOL_VERSION,
                        badge: self.certificate.badge().clone(),
                    };
                    let _ = network.send(peer, Bytes::from(wire::encode(&knock)));
                }
                Ok(NetworkEvent::Frame { peer, bytes }) if told.is_none() => {
                    if let Ok(Message::Hello { certificate, .. }) = wire::decode(&bytes) {
                        let hello = Message::Hello {
                            version: PROTOCOL_VERSION,
                            certificate: self.certificate.clone(),
                        };
                        let _ = network.send(peer, Bytes::from(wire::encode(&hello)));
                        let holder = certificate.claims().unwrap().peer;
                        told = Some((peer, self.words(holder)));
                    }
                }
                Ok(NetworkEvent::LinkDown { .. } | NetworkEvent::DialFailed { .. }) => {
                    told = None;
                    network.dial_unknown(address);
                }
                _ => {}
            }
        }
    }

    /// Asks for `target` on a connection of its own until the end, and reads at least so much of each answer; of
    /// `usize::MAX` not a byte, so that the answer stands.
    async fn ask_without_end(
        self,
        address: SocketAddr,
        holder: libp2p::PeerId,
        target: String,
        answer_bytes: usize,
    ) {
        let connector = tls::connector(&self.identity, GENEROUS).unwrap();
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut buffer = vec![0; 256 * 1024];
        while !self.ended.is_cancelled() {
            let Ok(mut stream) = connector.connect(address, holder).await else {
                continue;
            };
            while stream.write_all(request.as_bytes()).await.is_ok() {
                self.count.fetch_add(1, Ordering::Relaxed);
                if answer_bytes == usize::MAX {
                    return self.ended.cancelled().await;
                }
                let mut left = answer_bytes;
                while left > 0 {
                    let read = stream.read(&mut buffer).await.unwrap_or(0);
                    if read == 0 || self.ended.is_cancelled() {
                        break;
                    }
                    left = left.saturating_sub(read);
                }
                if left > 0 {
                    break;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_by_a_member_slows_down_that_member_alone() {
    let pair = tokio::task::spawn_blocking(Pair::new).await.unwrap();
    let transfer = SocketAddr::from((pair.desktop.address, TRANSFER_PORT));
    let control = SocketAddr::from((pair.desktop.address, MESH_PORT));
    let holder = Identity::load_or_create(&pair.desktop.state().join("identity")).unwrap();
    let holder = holder.peer_id();
    let baseline = pair.holder.node.descriptors();

    let (talker, asker, fetcher) = (Flooder::new(), Flooder::new(), Flooder::new());
    let path = || Sample {
        path: pair.large.path.clone(),
        hash: pair.large.hash.clone(),
        nar: Vec::new(),
    };
    let mut floods = vec![tokio::spawn(
        talker.clone().say_without_end(control, path()),
    )];
    let member = |name: &str| {
        let report = pair.holder.report();
        report.is_some_and(|report| {
            let is_linked = |peer: &granary::status::Peer| {
                peer.state == "linked" && peer.name.as_deref() == Some(name)
            };
            report.peers.iter().any(is_linked)
        })
    };
    tokio::task::block_in_place(|| until("the flooder is a member", || member("flooder")));
    let mut ask = |of: &Flooder, target: String, bytes| {
        let asking = of.clone().ask_without_end(transfer, holder, target, bytes);
        floods.push(tokio::spawn(asking));
    };
    for _ in 0..ASKING {
        ask(&asker, pair.large.narinfo(), 1);
    }
    for _ in 0..STANDING {
        ask(&fetcher, pair.large.short(), usize::MAX);
    }
    for _ in 0..FETCHING {
        ask(&fetcher, pair.large.short(), LARGE_BYTES);
    }
    tokio::task::block_in_place(|| {
        until("it is refused on both planes", || {
            let counts = ["messages_slowed", "streams"];
            counts.iter().all(|reason| pair.holder.refusals(reason) > 0)
        });
    });
    let (lookup, fetch) = tokio::task::block_in_place(|| pair.use_all());
    let descriptors = pair.holder.node.descriptors();
    let memory = pair.holder.node.kilobytes("VmHWM");
    for flooder in [&talker, &asker, &fetcher] {
        flooder.ended.cancel();
    }
    println!(
        "lookups at most {lookup:?}, a fetch {fetch:?}, {memory} kB, {descriptors} descriptors \
         ({baseline} before); said {}, asked {}, fetched {}",
        talker.count.load(Ordering::Relaxed),
        asker.count.load(Ordering::Relaxed),
        fetcher.count.load(Ordering::Relaxed),
    );
    assert!(lookup < LOOKUP_MAX, "a lookup took {lookup:?}");
    assert!(memory < MEMORY_KILOBYTES_MAX, "{memory} kB");
    assert!(
        descriptors < baseline + DESCRIPTORS_MAX,
        "{descriptors} descriptors, {baseline} before"
    );
    for flood in floods {
        flood.await.unwrap();
    }
    tokio::task::block_in_place(|| {
        pair.holder.node.stop();
        pair.asker.node.stop();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_strangers_on_the_control_plane_keeps_no_member_from_it() {
    let pair = tokio::task::spawn_blocking(Pair::new).await.unwrap();
    let control = SocketAddr::from((pair.desktop.address, MESH_PORT));
    // Half of them open a handshake and leave it there, half say nothing at all.
    let strangers: Vec<_> = (0..STRANGERS)
        .filter_map(|number| {
            let mut stream = TcpStream::connect(control).ok()?;
            if number % 2 == 0 {
                let hello = b"\x13/multistream/1.0.0\n\x07/noise\n";
                let _ = std::io::Write::write_all(&mut stream, hello);
            }
            Some(stream)
        })
        .collect();
    let mut late = Machine::new();
    late.peers = vec![pair.desktop.address];
    tokio::task::block_in_place(|| {
        // Those who were there go on, and who comes gets in.
        assert!(pair.use_all().0 < LOOKUP_MAX);
        let late = Running::start(&late);
        until("one that comes late is linked", || {
            let linked = |report: Report| report.peers.iter().any(|peer| peer.state == "linked");
            late.report().is_some_and(linked)
        });
        assert!(pair.holder.refusals("crowded") as usize > STRANGERS / 2);
        assert!(pair.holder.node.descriptors() < 256);
        late.node.stop();
        drop(strangers);
        pair.holder.node.stop();
        pair.asker.node.stop();
    });
}
