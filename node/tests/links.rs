//! Links between real networks on loopback: order, limits, and what hostile or dead peers cause.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use granary::crowd::Crowd;
use granary::identity::Identity;
use granary::mesh::links::{DownReason, Limits, SendError};
use granary::mesh::swarm::{DialError, Network, NetworkError, NetworkEvent};
use libp2p::PeerId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const FRAME_BYTES_MAX: usize = 1 << 20;

/// Generous: reached only by a failing test.
const PATIENCE: Duration = Duration::from_secs(30);

fn limits() -> Limits {
    Limits::new(FRAME_BYTES_MAX)
}

/// Two identities, the one with the smaller peer id (the leader) first.
fn identities() -> (Identity, Identity) {
    let (one, two) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
    if one.peer_id() < two.peer_id() {
        (one, two)
    } else {
        (two, one)
    }
}

async fn network(identity: &Identity, limits: Limits) -> (Network, SocketAddr) {
    let mut network = Network::new(
        identity,
        &["127.0.0.1:0".parse().unwrap()],
        limits,
        Crowd::before_members(Arc::default()),
    )
    .unwrap();
    match timeout(PATIENCE, network.next()).await.unwrap() {
        NetworkEvent::Listening(address) => (network, address),
        other => panic!("{other:?}"),
    }
}

/// The next event of either network; drops the other one's half-finished `next` each time.
async fn either(a: &mut Network, b: &mut Network) -> (PeerId, NetworkEvent) {
    let (me_a, me_b) = (a.peer_id(), b.peer_id());
    timeout(PATIENCE, async {
        tokio::select! {
            event = a.next() => (me_a, event),
            event = b.next() => (me_b, event),
        }
    })
    .await
    .expect("an event")
}

async fn until_linked(a: &mut Network, b: &mut Network) {
    let (mut up_a, mut up_b) = (false, false);
    while !(up_a && up_b) {
        match either(a, b).await {
            (at, NetworkEvent::LinkUp { peer, .. }) if at == a.peer_id() => {
                assert_eq!(peer, b.peer_id());
                up_a = true;
            }
            (_, NetworkEvent::LinkUp { peer, .. }) => {
                assert_eq!(peer, a.peer_id());
                up_b = true;
            }
            (at, other) => panic!("{at}: {other:?}"),
        }
    }
}

async fn linked(limits_a: Limits, limits_b: Limits) -> (Network, Network) {
    let (one, two) = identities();
    let (mut a, _) = network(&one, limits_a).await;
    let (mut b, address) = network(&two, limits_b).await;
    a.dial(two.peer_id(), vec![address]);
    until_linked(&mut a, &mut b).await;
    (a, b)
}

async fn next(network: &mut Network) -> NetworkEvent {
    timeout(PATIENCE, network.next()).await.expect("an event")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousand_frames_each_way_arrive_in_order() {
    let (mut a, mut b) = linked(limits(), limits()).await;
    let frame = |index: u32| {
        let mut frame = index.to_be_bytes().to_vec();
        // Sizes from 4 bytes up, and every 100th frame as large as allowed.
        let length = if index % 100 == 99 {
            FRAME_BYTES_MAX
        } else {
            4 + (index as usize * 37) % 5000
        };
        frame.resize(length, index as u8);
        Bytes::from(frame)
    };
    let (mut sent, mut received) = ([0u32; 2], [0u32; 2]);
    while received != [1000, 1000] {
        // What is refused is sent again later: the link stands.
        for (side, network, peer) in [
            (0, &mut a, b.peer_id()),
            (1, &mut b, identities().0.peer_id()),
        ] {
            while sent[side] < 1000 {
                match network.send(peer, frame(sent[side])) {
                    Ok(()) => sent[side] += 1,
                    Err(SendError::Refused { .. }) => break,
                    Err(other) => panic!("{other}"),
                }
            }
        }
        match either(&mut a, &mut b).await {
            (at, NetworkEvent::Frame { bytes, .. }) => {
                let side = usize::from(at != a.peer_id());
                assert_eq!(bytes, frame(received[side]));
                received[side] += 1;
            }
            (at, other) => panic!("{at}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_frame_ends_the_link_and_is_reported() {
    let (mut a, mut b) = linked(limits(), Limits::new(1000)).await;
    a.send(b.peer_id(), Bytes::from(vec![1; 1000])).unwrap();
    a.send(b.peer_id(), Bytes::from(vec![2; 1001])).unwrap();
    match next(&mut b).await {
        NetworkEvent::Frame { bytes, .. } => assert_eq!(bytes.len(), 1000),
        other => panic!("{other:?}"),
    }
    match next(&mut b).await {
        NetworkEvent::LinkDown { peer, reason } => {
            assert_eq!(peer, a.peer_id());
            assert!(
                matches!(
                    reason,
                    DownReason::FrameTooLarge {
                        declared: 1001,
                        max: 1000
                    }
                ),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(!b.is_linked(&a.peer_id()));
    match either(&mut a, &mut b).await {
        (at, NetworkEvent::LinkDown { .. }) => assert_eq!(at, a.peer_id()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_of_impossible_size_are_not_taken() {
    let (mut a, b) = linked(limits(), limits()).await;
    for bytes in [0, FRAME_BYTES_MAX + 1] {
        let error = a
            .send(b.peer_id(), Bytes::from(vec![0; bytes]))
            .unwrap_err();
        assert_eq!(
            error,
            SendError::FrameSize {
                peer: b.peer_id(),
                bytes,
                max: FRAME_BYTES_MAX
            }
        );
    }
    let stranger = PeerId::random();
    assert_eq!(
        a.send(stranger, Bytes::from_static(b"x")),
        Err(SendError::NoLink { peer: stranger })
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simultaneous_dial_ends_as_one_usable_link() {
    let (one, two) = identities();
    for round in 0..5u8 {
        let limits = Limits {
            redundant_grace: Duration::from_millis(500),
            ..limits()
        };
        let (mut a, address_a) = network(&one, limits).await;
        let (mut b, address_b) = network(&two, limits).await;
        a.dial(b.peer_id(), vec![address_b]);
        b.dial(a.peer_id(), vec![address_a]);
        until_linked(&mut a, &mut b).await;
        // Past the grace period nothing moves: the second connection was closed by its dialler.
        let mut echoed = 0;
        a.send(b.peer_id(), Bytes::from(vec![round])).unwrap();
        let quiet = timeout(Duration::from_secs(1), async {
            loop {
                match either(&mut a, &mut b).await {
                    (at, NetworkEvent::Frame { bytes, .. }) if at == b.peer_id() => {
                        b.send(a.peer_id(), bytes).unwrap();
                    }
                    (_, NetworkEvent::Frame { .. }) => echoed += 1,
                    (at, other) => panic!("round {round}, {at}: {other:?}"),
                }
            }
        });
        assert!(quiet.await.is_err());
        assert_eq!(echoed, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn death_of_one_side_is_seen_by_the_other() {
    let (a, mut b) = linked(limits(), limits()).await;
    let peer = a.peer_id();
    drop(a);
    match next(&mut b).await {
        NetworkEvent::LinkDown { peer: lost, .. } => assert_eq!(lost, peer),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        b.send(peer, Bytes::from_static(b"x")),
        Err(SendError::NoLink { peer })
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_queue_refuses_and_loses_nothing() {
    let (mut a, mut b) = linked(limits(), limits()).await;
    let peer = b.peer_id();
    // B is not asked for events, so its connection stops reading, and A's queue fills.
    let mut sent = 0u32;
    let mut refusals = 0;
    while refusals < 50 {
        let mut frame = vec![0; 64 << 10];
        frame[..4].copy_from_slice(&sent.to_be_bytes());
        match a.send(peer, Bytes::from(frame)) {
            Ok(()) => {
                sent += 1;
                refusals = 0;
            }
            Err(SendError::Refused { bytes, .. }) => {
                assert!(bytes <= limits().outgoing_bytes_max);
                refusals += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(other) => panic!("{other}"),
        }
        // Both queues, the windows of yamux, the buffers of the kernel: far below what we would like to send.
        assert!(
            sent < 512,
            "a peer that does not read took {sent} frames of 64 KiB"
        );
    }
    for index in 0..sent {
        match either(&mut a, &mut b).await {
            (at, NetworkEvent::Frame { bytes, .. }) if at == peer => {
                assert_eq!(bytes[..4], index.to_be_bytes());
            }
            (at, other) => panic!("{at}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peer_that_never_reads_loses_its_link() {
    let impatient = Limits {
        stall_timeout: Duration::from_millis(300),
        ..limits()
    };
    let (mut a, b) = linked(impatient, limits()).await;
    let peer = b.peer_id();
    let reason = loop {
        match a.send(peer, Bytes::from(vec![0; 64 << 10])) {
            Ok(()) => tokio::task::yield_now().await,
            Err(SendError::Refused { .. }) => match next(&mut a).await {
                NetworkEvent::LinkDown { reason, .. } => break reason,
                other => panic!("{other:?}"),
            },
            Err(other) => panic!("{other}"),
        }
    };
    assert!(
        matches!(reason, DownReason::WriteStalled { .. }),
        "{reason}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hangup_delivers_the_last_word_and_closes_at_once() {
    let (mut a, mut b) = linked(limits(), limits()).await;
    b.send(a.peer_id(), Bytes::from_static(b"never read"))
        .unwrap();
    a.send(b.peer_id(), Bytes::from_static(b"you are revoked"))
        .unwrap();
    a.hangup(b.peer_id());
    match next(&mut a).await {
        NetworkEvent::LinkDown { reason, .. } => {
            assert!(matches!(reason, DownReason::HungUp), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    match either(&mut a, &mut b).await {
        (at, NetworkEvent::Frame { bytes, .. }) => {
            assert_eq!(at, b.peer_id());
            assert_eq!(bytes, &b"you are revoked"[..]);
        }
        other => panic!("{other:?}"),
    }
    match either(&mut a, &mut b).await {
        (at, NetworkEvent::LinkDown { .. }) => assert_eq!(at, b.peer_id()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peer_can_link_again_right_after_a_hangup() {
    let (one, two) = identities();
    let (mut a, _) = network(&one, limits()).await;
    let (mut b, address) = network(&two, limits()).await;
    for _ in 0..5 {
        a.dial(b.peer_id(), vec![address]);
        let (mut up_a, mut up_b) = (false, false);
        while !(up_a && up_b) {
            match either(&mut a, &mut b).await {
                (at, NetworkEvent::LinkUp { .. }) if at == a.peer_id() => up_a = true,
                (_, NetworkEvent::LinkUp { .. }) => up_b = true,
                (_, NetworkEvent::LinkDown { .. }) => {}
                (at, other) => panic!("{at}: {other:?}"),
            }
        }
        a.hangup(b.peer_id());
    }
}

/// The same machine comes back on a new connection while the old one looks alive from here, as after a change of network.
async fn returning_peer_takes_over(home: Identity, roaming: Identity) {
    let (mut a, address) = network(&home, limits()).await;
    let (mut before, _) = network(&roaming, limits()).await;
    before.dial(a.peer_id(), vec![address]);
    until_linked(&mut a, &mut before).await;
    let (mut after, _) = network(&roaming, limits()).await;
    after.dial(a.peer_id(), vec![address]);
    let (mut down, mut up_here, mut up_there) = (false, false, false);
    while !(down && up_here && up_there) {
        // `before` is never polled again: its connections stand, but it does not close any.
        match timeout(PATIENCE, async {
            tokio::select! {
                event = a.next() => (true, event),
                event = after.next() => (false, event),
            }
        })
        .await
        .unwrap()
        {
            (true, NetworkEvent::LinkDown { reason, .. }) => {
                assert!(matches!(reason, DownReason::Superseded), "{reason}");
                down = true;
            }
            (true, NetworkEvent::LinkUp { .. }) => {
                assert!(down, "a new link is announced after the end of the old one");
                up_here = true;
            }
            (false, NetworkEvent::LinkUp { .. }) => up_there = true,
            (here, other) => panic!("here: {here}, {other:?}"),
        }
    }
    a.send(roaming.peer_id(), Bytes::from_static(b"hello"))
        .unwrap();
    match next(&mut after).await {
        NetworkEvent::Frame { bytes, .. } => assert_eq!(bytes, &b"hello"[..]),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn returning_follower_takes_over_its_dead_link() {
    let (leader, follower) = identities();
    returning_peer_takes_over(leader, follower).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn returning_leader_takes_over_its_dead_link() {
    let (leader, follower) = identities();
    returning_peer_takes_over(follower, leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unnamed_address_learns_its_peer() {
    let (one, two) = identities();
    for (here, there) in [(&one, &two), (&two, &one)] {
        let (mut a, _) = network(here, limits()).await;
        let (mut b, address) = network(there, limits()).await;
        a.dial_unknown(address);
        until_linked(&mut a, &mut b).await;
        a.dial_unknown(address);
        match either(&mut a, &mut b).await {
            (
                at,
                NetworkEvent::DialFailed {
                    peer,
                    addresses,
                    reason: DialError::AlreadyLinked,
                },
            ) => {
                assert_eq!(at, a.peer_id());
                assert_eq!(peer, Some(b.peer_id()));
                assert_eq!(addresses, [address]);
            }
            other => panic!("{other:?}"),
        }
        assert!(a.is_linked(&b.peer_id()) && b.is_linked(&a.peer_id()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dial_that_cannot_succeed_says_why() {
    let (one, two) = identities();
    let (mut a, address_a) = network(&one, limits()).await;
    let (mut b, address_b) = network(&two, limits()).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = free.local_addr().unwrap();
    drop(free);
    let stranger = Identity::from_seed(&[9; 32]).peer_id();

    let mut reason = async |peer, address: SocketAddr| {
        a.dial(peer, vec![address]);
        match either(&mut a, &mut b).await {
            (_, NetworkEvent::DialFailed { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let own = reason(one.peer_id(), address_a).await;
    assert!(matches!(own, DialError::OwnId), "{own}");
    let link_local = reason(two.peer_id(), "[fe80::1]:4727".parse().unwrap()).await;
    assert!(matches!(link_local, DialError::NoAddress), "{link_local}");
    let refused = reason(two.peer_id(), closed).await;
    assert!(
        matches!(&refused, DialError::Unreachable(errors) if errors.len() == 1 && errors[0].0 == closed),
        "{refused}"
    );
    let wrong = reason(stranger, address_b).await;
    assert!(
        matches!(wrong, DialError::WrongPeer { found } if found == two.peer_id()),
        "{wrong}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_do_no_harm() {
    let (one, two) = identities();
    let (mut a, _) = network(&one, limits()).await;
    let (mut b, address) = network(&two, limits()).await;
    // All at once: those whose first bytes announce a long handshake message wait until its deadline.
    let client = |seed: u64| async move {
        let silent = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut state = seed;
        let noise: Vec<u8> = (0..10_000)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        // The other side may close at any time, that is the point.
        let _ = client.write_all(&noise).await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        assert!(answer.len() < 1000, "{} bytes for garbage", answer.len());
        silent
    };
    let garbage = tokio::spawn(futures::future::join_all((0..20).map(client)));
    while !garbage.is_finished() {
        tokio::select! {
            event = b.next() => panic!("{event:?}"),
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
        }
    }
    let _silent = garbage.await.unwrap();
    a.dial(b.peer_id(), vec![address]);
    until_linked(&mut a, &mut b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn taken_port_is_an_error_that_names_it() {
    let (one, two) = identities();
    let (_a, address) = network(&one, limits()).await;
    match Network::new(
        &two,
        &[address],
        limits(),
        Crowd::before_members(Arc::default()),
    ) {
        Err(error @ NetworkError::Listen { .. }) => {
            assert!(error.to_string().contains(&address.to_string()), "{error}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("two nodes share {address}"),
    }
}
