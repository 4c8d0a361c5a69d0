//! Whoever holds a key of their own and no certificate of this mesh, and follows every protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use granary::crowd::Crowd;
use granary::identity::Identity;
use granary::mesh::links::Limits;
use granary::mesh::swarm::{Network, NetworkEvent};
use granary::serve::tls;
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::message::{Message, PROTOCOL_VERSION};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::Revocations;
use granary_protocol::signature::SecretKey;
use granary_protocol::wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::{
    GENEROUS, MESH_PORT, Machine, SMALL_BYTES, Sample, TRANSFER_PORT, key, own_address, until,
};

/// The longest that a stranger waits for a word: beyond the 5 s in which a Hello is due.
const PATIENCE: Duration = Duration::from_secs(10);

fn stranger() -> Identity {
    Identity::from_seed(&[9; 32])
}

/// A member that shares a path, and knows that the stranger was put out at second 5.
async fn desktop() -> (Machine, Sample) {
    let mut desktop = Machine::new();
    let mut list = Revocations {
        number: 1,
        ..Revocations::default()
    };
    let me = PeerId::from_public_key(stranger().public_key());
    list.revoke(me, UnixTime(5)).unwrap();
    desktop.admit();
    let file = desktop.state().join("revocations");
    std::fs::write(file, list.sign(&key("mesh")).unwrap().to_text()).unwrap();
    let path = desktop.add("secret", SMALL_BYTES);
    desktop.start().await;
    until("the desktop shares its path", || {
        desktop.status().paths_held == 1
    });
    (desktop, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_hears_no_byte_on_the_transfer_port() {
    let (mut desktop, path) = desktop().await;
    let address = SocketAddr::from((desktop.address, TRANSFER_PORT));
    let connector = tls::connector(&stranger(), GENEROUS).unwrap();
    let expected = Identity::load_or_create(&desktop.state().join("identity")).unwrap();
    // The handshake succeeds, since a key is all that it takes.
    let mut stream = connector
        .connect(address, expected.peer_id())
        .await
        .unwrap();
    for target in [path.narinfo(), path.short()] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        // The other side may have closed already.
        let _ = stream.write_all(request.as_bytes()).await;
    }
    let mut heard = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard)).await;
    assert!(read.is_ok(), "the connection stayed open");
    assert_eq!(heard, b"");
    assert_eq!(desktop.status().refusals.get("transfer"), Some(&1));
    desktop.stop().await;
}

/// Says `words` to the desktop and returns how many frames came back before it hung up.
async fn frames_heard(desktop: &Machine, words: Vec<Message>) -> usize {
    let address = SocketAddr::from((desktop.address, MESH_PORT));
    let listen = [SocketAddr::from(([127, 0, 0, 1], 0))];
    let limits = Limits::new(wire::FRAME_BYTES_MAX);
    let mut network = Network::new(
        &stranger(),
        &listen,
        limits,
        Crowd::before_members(Arc::default()),
    )
    .unwrap();
    network.dial_unknown(address);
    let mut heard = 0;
    let conversation = async {
        loop {
            match network.next().await {
                NetworkEvent::LinkUp { peer, .. } => {
                    for word in &words {
                        network.send(peer, Bytes::from(wire::encode(word))).unwrap();
                    }
                }
                NetworkEvent::Frame { .. } => heard += 1,
                NetworkEvent::LinkDown { .. } => return,
                NetworkEvent::DialFailed { reason, .. } => panic!("could not connect: {reason}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, conversation)
        .await
        .expect("the desktop hangs up");
    heard
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_hears_no_word_on_the_control_plane() {
    let (mut desktop, path) = desktop().await;
    let me = PeerId::from_public_key(stranger().public_key());
    let signed = |mesh: SecretKey, peer: PeerId, from: u64, not_after: u64, allow: &str| {
        let certificate = Certificate {
            peer,
            name: "stranger".into(),
            permissions: allow.parse().unwrap(),
            not_before: UnixTime(from),
            not_after: UnixTime(not_after),
            serial: 1,
        };
        certificate.sign(&mesh).unwrap()
    };
    let hello_of = |certificate: SignedCertificate| Message::Hello {
        version: PROTOCOL_VERSION,
        certificate,
    };
    let hello = |mesh: SecretKey, peer: PeerId, not_after: u64| {
        hello_of(signed(mesh, peer, 0, not_after, "share"))
    };
    let knock = |version: u32, certificate: SignedCertificate| Message::Knock {
        version,
        badge: certificate.badge().clone(),
    };
    // One that would do, but for what is wrong with it below.
    let good = || signed(key("mesh"), me, 6, u64::MAX, "share");
    let lookup = Message::Lookup {
        request: 1,
        hashes: vec![path.hash.parse().unwrap()],
    };
    let someone = PeerId::from_public_key(Identity::from_seed(&[8; 32]).public_key());
    let forged = SecretKey::from_seed("mesh".parse().unwrap(), [77; 32]);
    let refused = [
        ("no_hello", vec![]),
        ("out_of_turn", vec![lookup.clone()]),
        (
            "out_of_turn",
            vec![Message::Pull {
                writer: someone,
                contact: 0,
                after: None,
            }],
        ),
        (
            "other_mesh",
            vec![hello(key("another-mesh"), me, u64::MAX), lookup.clone()],
        ),
        (
            "bad_signature",
            vec![hello(forged, me, u64::MAX), lookup.clone()],
        ),
        (
            "other_peer",
            vec![hello(key("mesh"), someone, u64::MAX), lookup.clone()],
        ),
        ("expired", vec![hello(key("mesh"), me, 1), lookup.clone()]),
        (
            "not_yet_valid",
            vec![hello_of(signed(
                key("mesh"),
                me,
                u64::MAX / 2,
                u64::MAX,
                "share",
            ))],
        ),
        (
            "may_not_share",
            vec![hello_of(signed(key("mesh"), me, 6, u64::MAX, "vouch"))],
        ),
        ("revoked", vec![hello(key("mesh"), me, u64::MAX)]),
        // The same by the badge alone, of which a member's is answered.
        (
            "version",
            vec![knock(PROTOCOL_VERSION - 1, good()), lookup.clone()],
        ),
        (
            "revoked",
            vec![knock(
                PROTOCOL_VERSION,
                signed(key("mesh"), me, 5, u64::MAX, "share"),
            )],
        ),
        // Recorded from a member, and said again by another key.
        (
            "other_peer",
            vec![knock(
                PROTOCOL_VERSION,
                signed(key("mesh"), someone, 6, u64::MAX, "share"),
            )],
        ),
        (
            "bad_signature",
            vec![knock(
                PROTOCOL_VERSION,
                signed(
                    SecretKey::from_seed("mesh".parse().unwrap(), [77; 32]),
                    me,
                    6,
                    u64::MAX,
                    "share",
                ),
            )],
        ),
    ];
    let mut before = std::collections::BTreeMap::new();
    for (reason, words) in refused {
        assert_eq!(frames_heard(&desktop, words).await, 0, "{reason}");
        let refusals = desktop.status().refusals;
        let count = refusals.get(reason).copied().unwrap_or(0);
        let before = before.insert(reason, count).unwrap_or(0);
        assert!(count > before, "{reason}: {refusals:?}");
    }
    desktop.stop().await;
}

/// More than the transfer port has room for, members and strangers together.
const CROWD: usize = 1_200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_silent_strangers_keeps_no_member_from_its_transfers() {
    let (mut desktop, path) = desktop().await;
    let mut laptop = Machine::new();
    laptop.peers = vec![desktop.address];
    laptop.start().await;
    laptop.wait_for(&path);
    let address = SocketAddr::from((desktop.address, TRANSFER_PORT));
    let refused = || desktop.status().refusals.get("transfer").copied();
    let mut crowd = Vec::new();
    for _ in 0..CROWD {
        crowd.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    // While they all wait for a handshake that is given up after 5 s.
    let answer = laptop.get(&path.short());
    assert_eq!(answer.status, 200);
    assert!(answer.body == path.nar);
    until("those without room to be sent away", || {
        refused().is_some_and(|refused| refused as usize > CROWD / 2)
    });
    drop(crowd);
    laptop.stop().await;
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_opens_connections_without_end_is_bounded_by_itself() {
    let (mut desktop, path) = desktop().await;
    let (mut greedy, mut laptop) = (Machine::new(), Machine::new());
    for machine in [&mut greedy, &mut laptop] {
        machine.peers = vec![desktop.address];
        machine.start().await;
        machine.wait_for(&path);
    }
    let identity =
        |machine: &Machine| Identity::load_or_create(&machine.state().join("identity")).unwrap();
    let connector = tls::connector(&identity(&greedy), GENEROUS).unwrap();
    let address = SocketAddr::from((desktop.address, TRANSFER_PORT));
    let expected = identity(&desktop).peer_id();
    let mut streams = Vec::new();
    // Twice as many as it may have: 32 streams, and two connections for each.
    for _ in 0..128 {
        streams.push(connector.connect(address, expected).await.unwrap());
    }
    until("the others to be dropped", || {
        let refusals = desktop.status().refusals;
        refusals.get("transfer").is_some_and(|count| *count >= 64)
    });
    let answer = laptop.get(&path.short());
    assert_eq!(answer.status, 200);
    assert!(answer.body == path.nar);
    drop(streams);
    for machine in [&mut greedy, &mut laptop, &mut desktop] {
        machine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_that_is_dialled_learns_neither_name_nor_permissions() {
    let place = own_address();
    let listen = [SocketAddr::from((place, MESH_PORT))];
    let limits = Limits::new(wire::FRAME_BYTES_MAX);
    let mut network = Network::new(
        &stranger(),
        &listen,
        limits,
        Crowd::before_members(Arc::default()),
    )
    .unwrap();
    let mut desktop = Machine::new();
    // As it would dial whoever announces its mesh's tag.
    desktop.peers = vec![place];
    desktop.start().await;
    let me = PeerId::from_public_key(stranger().public_key());
    let forged = Message::Hello {
        version: PROTOCOL_VERSION,
        certificate: Certificate {
            peer: me,
            name: "stranger".into(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(0),
            not_after: UnixTime(u64::MAX),
            serial: 1,
        }
        .sign(&SecretKey::from_seed("mesh".parse().unwrap(), [77; 32]))
        .unwrap(),
    };
    let mut heard = Vec::new();
    let conversation = async {
        loop {
            match network.next().await {
                NetworkEvent::Frame { peer, bytes } => {
                    heard.push(bytes);
                    network
                        .send(peer, Bytes::from(wire::encode(&forged)))
                        .unwrap();
                }
                NetworkEvent::LinkDown { .. } => return,
                _ => {}
            }
        }
    };
    tokio::time::timeout(GENEROUS, conversation)
        .await
        .expect("the desktop hangs up");
    let [knock] = &heard[..] else {
        panic!("{} frames", heard.len());
    };
    assert!(matches!(wire::decode(knock), Ok(Message::Knock { .. })));
    for word in ["machine-", "share"] {
        let is_told = knock
            .windows(word.len())
            .any(|part| part == word.as_bytes());
        assert!(!is_told, "{word}");
    }
    let refusals = desktop.status().refusals;
    assert!(refusals.contains_key("bad_signature"), "{refusals:?}");
    desktop.stop().await;
}
