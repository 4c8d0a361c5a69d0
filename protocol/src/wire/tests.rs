use data_encoding::HEXLOWER;
use proptest::prelude::*;

use super::*;
use crate::certificate::{Certificate, UnixTime};
use crate::contact::Contact;
use crate::message::PROTOCOL_VERSION;
use crate::peer::PeerKey;
use crate::revocation::Revocations;
use crate::signature::SecretKey;

fn key() -> PeerKey {
    PeerKey::from_seed([7; 32])
}

fn writer() -> PeerId {
    key().peer_id()
}

fn contact() -> SignedContact {
    Contact {
        certificate: certificate(),
        number: 3,
        addresses: vec!["10.0.0.1:4727".parse().unwrap()],
        transfer_port: Some(4728),
    }
    .sign(&key())
    .unwrap()
}

fn head(epoch: u64, sequence: u64) -> SignedHead {
    let set = [HashPrefix(8)].into_iter().collect();
    SignedHead::of_set(&key(), at(epoch, sequence), &set)
}

fn delta(operations: Vec<Operation>) -> Delta {
    let set = SetDigest::of(&[HashPrefix(1)]);
    Delta::sign(&key(), at(1, u64::MAX), 1, set, operations)
}

fn certificate() -> SignedCertificate {
    let mesh = SecretKey::from_seed("home".parse().unwrap(), [1; 32]);
    Certificate {
        peer: writer(),
        name: "desk".into(),
        permissions: "share".parse().unwrap(),
        not_before: UnixTime(1),
        not_after: UnixTime(2),
        serial: 3,
    }
    .sign(&mesh)
    .unwrap()
}

fn revocations() -> SignedRevocations {
    let mut list = Revocations {
        number: 4,
        ..Revocations::default()
    };
    list.revoke(writer(), UnixTime(9)).unwrap();
    let mesh = SecretKey::from_seed("home".parse().unwrap(), [1; 32]);
    list.sign(&mesh).unwrap()
}

fn at(epoch: u64, sequence: u64) -> Cursor {
    Cursor { epoch, sequence }
}

fn hash(byte: u8) -> StorePathHash {
    StorePathHash::from_bytes([byte; 20])
}

fn examples() -> Vec<Message> {
    vec![
        Message::Knock {
            version: PROTOCOL_VERSION,
            badge: certificate().badge().clone(),
        },
        Message::Hello {
            version: PROTOCOL_VERSION,
            certificate: certificate(),
        },
        Message::About {
            store_dir: StoreDir::default(),
            contact: contact(),
            cursor: at(5, 6),
            summary: Summary([4; 32]),
            wish: Wish::Urgent,
        },
        Message::Revocations(revocations()),
        Message::RevocationsKnown { number: u64::MAX },
        Message::Goodbye,
        Message::Neighbour { wish: Wish::No },
        Message::Summary {
            summary: Summary([9; 32]),
        },
        Message::Cursors {
            cursors: vec![
                WriterCursor {
                    writer: PeerId::from_public_key([1; 32]),
                    contact: 5,
                    cursor: None,
                },
                WriterCursor {
                    writer: PeerId::from_public_key([2; 32]),
                    contact: u64::MAX,
                    cursor: Some(at(1, 2)),
                },
            ],
            is_complete: true,
        },
        Message::Contact(contact()),
        Message::Delta(delta(vec![
            Operation::Add(HashPrefix(1)),
            Operation::Remove(HashPrefix(u64::MAX)),
            Operation::Add(HashPrefix(0)),
        ])),
        Message::Pull {
            writer: writer(),
            contact: 0,
            after: None,
        },
        Message::Pull {
            writer: writer(),
            contact: 9,
            after: Some(at(9, 0)),
        },
        Message::PullPage {
            writer: writer(),
            cursor: at(9, 1),
            after: HashPrefix(u64::MAX),
        },
        Message::Snapshot {
            head: head(3, 300),
            after: None,
            prefixes: vec![HashPrefix(0), HashPrefix(1), HashPrefix(u64::MAX)],
            is_last: true,
        },
        Message::Snapshot {
            head: head(3, 300),
            after: Some(HashPrefix(7)),
            prefixes: vec![HashPrefix(8)],
            is_last: false,
        },
        Message::NothingNewer { writer: writer() },
        Message::Lookup {
            request: 1,
            hashes: vec![hash(1), hash(2)],
        },
        Message::Answers {
            request: 1,
            answers: vec![
                Answer {
                    hash: hash(1),
                    narinfo: Some("StorePath: x\n".into()),
                },
                Answer {
                    hash: hash(2),
                    narinfo: None,
                },
            ],
        },
    ]
}

#[test]
fn every_message_survives_the_wire() {
    for message in examples() {
        assert_eq!(decode(&encode(&message)).as_ref(), Ok(&message));
    }
}

/// The bytes of version 1. A change here breaks nodes already in the field: it needs a new
/// WIRE_VERSION, or a field that old readers may skip.
#[test]
fn golden_bytes_do_not_change() {
    let golden = [
        (Message::Goodbye, "011a00"),
        (Message::Neighbour { wish: Wish::Yes }, "0122020801"),
        (
            Message::PullPage {
                writer: PeerId::from_public_key([1; 32]),
                cursor: at(1, 2),
                after: HashPrefix(3),
            },
            "013a380a20010101010101010101010101010101010101010101010101010101\
             0101010101120b0901000000000000001002190300000000000000",
        ),
        (
            Message::Delta(delta(vec![
                Operation::Add(HashPrefix(1)),
                Operation::Remove(HashPrefix(2)),
            ])),
            "012ae3010acb010a20ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b\
             92421eea691446d22c121409010000000000000010ffffffffffffffffff0118\
             012220cd2662154e6d76b2b2b92e70c0cac3ccf534f9b74eb5b89819ec509083\
             d00a5028fdffffffffffffffff01322076e9de5dbca8421ce231f583f44b591c\
             c303a5cf37c4787d95da3d771a61164f3a40933730591b47f726b7493969e48c\
             02d2d3091a1c45a779b1eb08c67aef8e9f3d3848f53efc0813eb7ef2472332e4\
             9847b9f12ffe15b6d2dba764b5fc1888ca051210010000000000000002000000\
             000000001a0101",
        ),
        (
            Message::Snapshot {
                head: head(1, 2),
                after: Some(HashPrefix(7)),
                prefixes: vec![HashPrefix(8), HashPrefix(300)],
                is_last: true,
            },
            "0142cc010ab9010a20ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b\
             92421eea691446d22c120b0901000000000000001002180122204c0e071832d5\
             27694adea57b50dd7b2164c2a47c02940dcf26fa07c44d6d222a28023220e3b0\
             c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b8553a40\
             00cd3299edd3edc28029e4457e0fc5deede30e3c98d7b4bd6eb4aff4d037fd05\
             fb91e915e5efc3ef65658b959f792bd3514246365b85a8f57f9f273c80c75900\
             1107000000000000001a0301a4022001",
        ),
        (
            Message::Contact(contact()),
            "016a8f020aca010aba010a480a20ea4a6c63e29c520abef5507b132ec5f99547\
             76aebebe7b92421eea691446d22c1001180222207cd408ef4d9b7925bb6c0deb\
             7e24ce02087d5208edd3fc2485f3df783be8e20e125d686f6d653a72762f6970\
             72774a584c4e6942344173366d49447964536c3147434b6939552b5a5471694f\
             573557686541767651665566697a527831636233432f6d36566a35736d722f49\
             4134594953734f63424c724c4e593243413d3d1a0f0a046465736b1205736861\
             7265180310031a060a000001127720f82412403c2d9d039c99b3cbd4e56f3e12\
             839ec9c07211beb4970f6eb2f410bbd54883e2e281f608252d48c87996478653\
             d9fc0aab6169229934651abae245c54c75b809",
        ),
    ];
    for (message, bytes) in golden {
        let bytes = bytes.replace(char::is_whitespace, "");
        assert_eq!(HEXLOWER.encode(&encode(&message)), bytes, "{message:?}");
        assert_eq!(
            decode(&HEXLOWER.decode(bytes.as_bytes()).unwrap()),
            Ok(message)
        );
    }
}

#[test]
fn versions_and_kinds_of_the_future_are_named() {
    assert_eq!(decode(&[]), Err(WireError::Empty));
    assert_eq!(decode(&[2, 0x1a, 0]), Err(WireError::Version { found: 2 }));
    // Field 99 is nothing that this version knows.
    assert_eq!(decode(&[1, 0x9a, 0x06, 0x00]), Err(WireError::UnknownKind));
    assert_eq!(
        decode(&vec![1; FRAME_BYTES_MAX + 1]),
        Err(WireError::FrameTooLarge(FRAME_BYTES_MAX + 1))
    );
}

#[test]
fn fields_added_later_are_skipped() {
    // A Goodbye that carries an unknown field 5.
    assert_eq!(decode(&[1, 0x1a, 0x02, 0x28, 0x01]), Ok(Message::Goodbye));
}

fn frame(kind: Kind) -> Vec<u8> {
    let mut bytes = vec![WIRE_VERSION];
    Frame { kind: Some(kind) }.encode(&mut bytes).unwrap();
    bytes
}

#[test]
fn counts_beyond_the_limits_are_refused() {
    let too_many = |kind| match decode(&frame(kind)) {
        Err(WireError::TooMany { message, .. }) => message,
        other => panic!("{other:?}"),
    };
    let statement = Some(Statement::from(&head(1, 1)));
    let prefixes = vec![1; DELTA_OPERATIONS_MAX + 1];
    assert_eq!(
        too_many(Kind::Delta(OneDelta {
            head: statement.clone(),
            prefixes,
            removed: vec![]
        })),
        "delta"
    );
    let steps = vec![1; SNAPSHOT_PREFIXES_MAX + 1];
    let snapshot = Snapshot {
        head: statement,
        after: None,
        steps,
        is_last: true,
    };
    assert_eq!(too_many(Kind::Snapshot(snapshot)), "snapshot");
    let hashes = vec![0; 20 * (LOOKUP_HASHES_MAX + 1)];
    assert_eq!(
        too_many(Kind::Lookup(Lookup { request: 1, hashes })),
        "lookup"
    );
    let answer = OneAnswer {
        hash: vec![0; 20],
        narinfo: Some("x".repeat(ANSWERS_BYTES_MAX / 2 + 1)),
    };
    let answers = Answers {
        request: 1,
        answers: vec![answer.clone(), answer],
    };
    assert_eq!(too_many(Kind::Answers(answers)), "answers");
    let answer = OneAnswer {
        hash: vec![0; 20],
        narinfo: None,
    };
    let answers = Answers {
        request: 1,
        answers: vec![answer; LOOKUP_HASHES_MAX + 1],
    };
    assert_eq!(too_many(Kind::Answers(answers)), "answers");
}

#[test]
fn fields_that_contradict_each_other_are_refused() {
    let field = |kind| match decode(&frame(kind)) {
        Err(WireError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let statement = Statement::from(&head(1, 1));
    let delta = |removed: &[u32]| {
        Kind::Delta(OneDelta {
            head: Some(statement.clone()),
            prefixes: vec![1, 2],
            removed: removed.into(),
        })
    };
    assert_eq!(field(delta(&[2])), "removed");
    assert_eq!(field(delta(&[1, 0])), "removed");
    assert_eq!(field(delta(&[0, 0])), "removed");
    let snapshot = |after, steps: &[u64]| {
        Kind::Snapshot(Snapshot {
            head: Some(statement.clone()),
            after,
            steps: steps.into(),
            is_last: true,
        })
    };
    assert_eq!(field(snapshot(None, &[1, 0])), "steps");
    assert_eq!(field(snapshot(Some(5), &[0])), "steps");
    assert_eq!(field(snapshot(Some(5), &[u64::MAX])), "steps");
    assert_eq!(
        field(Kind::Lookup(Lookup {
            request: 1,
            hashes: vec![0; 21]
        })),
        "hashes"
    );
    let about = |store_dir: &str, summary: usize, wish| {
        Kind::About(About {
            store_dir: store_dir.into(),
            contact: contact().to_bytes(),
            cursor: Some(at(1, 1).into()),
            summary: vec![0; summary],
            wish,
        })
    };
    assert_eq!(field(about("nix/store", 32, 1)), "store_dir");
    assert_eq!(field(about("/nix/store", 31, 1)), "summary");
    assert_eq!(field(about("/nix/store", 32, 3)), "wish");
    let changed = |change: fn(&mut Statement)| {
        let mut statement = statement.clone();
        change(&mut statement);
        Kind::Delta(OneDelta {
            head: Some(statement),
            prefixes: vec![],
            removed: vec![],
        })
    };
    assert_eq!(field(changed(|head| head.cursor = None)), "position");
    assert_eq!(field(changed(|head| head.writer.truncate(31))), "writer");
    assert_eq!(field(changed(|head| head.set.push(0))), "set");
    assert_eq!(field(changed(|head| head.operations.clear())), "operations");
    assert_eq!(
        field(changed(|head| head.signature.truncate(63))),
        "signature"
    );
    let twice = OneCursor {
        writer: vec![1; 32],
        contact: 1,
        cursor: None,
    };
    let cursors = Cursors {
        cursors: vec![twice.clone(), twice],
        is_complete: true,
    };
    assert_eq!(field(Kind::Cursors(cursors)), "writer");
}

#[test]
fn a_proof_survives_the_place_where_it_is_kept() {
    let (contact, head) = (contact(), head(1, 2));
    let kept = encode_proof(&contact, &head);
    assert_eq!(decode_proof(&kept), Ok((contact, head)));
    for length in 0..kept.len() {
        // A torn write is an error or another value, never a panic.
        let _ = decode_proof(&kept[..length]);
    }
}

#[test]
fn full_messages_stay_within_a_frame() {
    let operations = vec![Operation::Remove(HashPrefix(u64::MAX)); DELTA_OPERATIONS_MAX];
    let delta = Message::Delta(delta(operations));
    let spread = u64::MAX / SNAPSHOT_PREFIXES_MAX as u64;
    let snapshot = Message::Snapshot {
        head: head(u64::MAX, u64::MAX),
        after: None,
        prefixes: (1..=SNAPSHOT_PREFIXES_MAX as u64)
            .map(|n| HashPrefix(n * spread))
            .collect(),
        is_last: true,
    };
    assert!(encode(&delta).len() <= 256 * 1024);
    let cursor = |number: usize| {
        let mut key = [0xff; 32];
        key[..2].copy_from_slice(&(number as u16).to_be_bytes());
        WriterCursor {
            writer: PeerId::from_public_key(key),
            contact: u64::MAX,
            cursor: Some(at(u64::MAX, u64::MAX)),
        }
    };
    let cursors = Message::Cursors {
        cursors: (0..CURSORS_MAX).map(cursor).collect(),
        is_complete: true,
    };
    assert!(encode(&snapshot).len() <= 256 * 1024);
    assert!(encode(&cursors).len() <= 512 * 1024);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = decode(&bytes);
        if let Some(first) = bytes.first_mut() {
            *first = WIRE_VERSION;
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(decode(&encode(&message)), Ok(message));
            }
        }
    }

    #[test]
    fn damaged_messages_never_panic(which in 0..16usize, at in any::<prop::sample::Index>(), bits in 1..=255u8) {
        let mut bytes = encode(&examples()[which]);
        let position = at.index(bytes.len());
        bytes[position] ^= bits;
        let _ = decode(&bytes);
    }
}
