use data_encoding::HEXLOWER;
use proptest::prelude::*;

use super::*;
use crate::certificate::{Certificate, UnixTime};
use crate::message::PROTOCOL_VERSION;
use crate::peer::PeerId;
use crate::signature::SecretKey;

fn certificate() -> SignedCertificate {
    let mesh = SecretKey::from_seed("home".parse().unwrap(), [1; 32]);
    Certificate {
        peer: PeerId::from_public_key([7; 32]),
        name: "desk".into(),
        permissions: "share".parse().unwrap(),
        not_before: UnixTime(1),
        not_after: UnixTime(2),
        serial: 3,
    }
    .sign(&mesh)
    .unwrap()
}

fn at(epoch: u64, sequence: u64) -> Cursor {
    Cursor { epoch, sequence }
}

fn hash(byte: u8) -> StorePathHash {
    StorePathHash::from_bytes([byte; 20])
}

fn examples() -> Vec<Message> {
    vec![
        Message::Hello {
            version: PROTOCOL_VERSION,
            certificate: certificate(),
        },
        Message::About {
            store_dir: StoreDir::default(),
            transfer_port: Some(4728),
            head: at(5, 6),
        },
        Message::Goodbye,
        Message::Head { head: at(1, 2) },
        Message::Delta {
            after: at(1, 2),
            operations: vec![
                Operation::Add(HashPrefix(1)),
                Operation::Remove(HashPrefix(u64::MAX)),
                Operation::Add(HashPrefix(0)),
            ],
        },
        Message::Pull { after: None },
        Message::Pull {
            after: Some(at(9, 0)),
        },
        Message::PullPage {
            epoch: 9,
            after: HashPrefix(u64::MAX),
        },
        Message::Snapshot {
            head: at(3, 300),
            after: None,
            prefixes: vec![HashPrefix(0), HashPrefix(1), HashPrefix(u64::MAX)],
            is_last: true,
        },
        Message::Snapshot {
            head: at(3, 300),
            after: Some(HashPrefix(7)),
            prefixes: vec![HashPrefix(8)],
            is_last: false,
        },
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
        (
            Message::Head { head: at(1, 2) },
            "01220b0901000000000000001002",
        ),
        (Message::Pull { after: None }, "013200"),
        (
            Message::PullPage {
                epoch: 9,
                after: HashPrefix(3),
            },
            "013a12090900000000000000110300000000000000",
        ),
        (
            Message::Delta {
                after: at(1, 2),
                operations: vec![
                    Operation::Add(HashPrefix(1)),
                    Operation::Remove(HashPrefix(2)),
                ],
            },
            "012a220a0b090100000000000000100212100100000000000000020000000000000\
             01a0101",
        ),
        (
            Message::Snapshot {
                head: at(1, 2),
                after: Some(HashPrefix(7)),
                prefixes: vec![HashPrefix(8), HashPrefix(300)],
                is_last: true,
            },
            "01421d0a0b09010000000000000010021107000000000000001a0301a4022001",
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
    let after = Some(Position {
        epoch: 1,
        sequence: 1,
    });
    let prefixes = vec![1; DELTA_OPERATIONS_MAX + 1];
    assert_eq!(
        too_many(Kind::Delta(Delta {
            after,
            prefixes,
            removed: vec![]
        })),
        "delta"
    );
    let steps = vec![1; SNAPSHOT_PREFIXES_MAX + 1];
    let snapshot = Snapshot {
        head: after,
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
    let head = Some(Position {
        epoch: 1,
        sequence: 1,
    });
    let delta = |removed: &[u32]| {
        Kind::Delta(Delta {
            after: head,
            prefixes: vec![1, 2],
            removed: removed.into(),
        })
    };
    assert_eq!(field(delta(&[2])), "removed");
    assert_eq!(field(delta(&[1, 0])), "removed");
    assert_eq!(field(delta(&[0, 0])), "removed");
    let snapshot = |after, steps: &[u64]| {
        Kind::Snapshot(Snapshot {
            head,
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
    let about = |store_dir: &str, transfer_port| {
        Kind::About(About {
            store_dir: store_dir.into(),
            transfer_port,
            head,
        })
    };
    assert_eq!(field(about("nix/store", 1)), "store_dir");
    assert_eq!(field(about("/nix/store", 65_536)), "transfer_port");
    let unplaced = Delta {
        after: None,
        prefixes: vec![],
        removed: vec![],
    };
    assert_eq!(field(Kind::Delta(unplaced)), "position");
}

#[test]
fn full_messages_stay_within_a_frame() {
    let delta = Message::Delta {
        after: at(u64::MAX, u64::MAX),
        operations: vec![Operation::Remove(HashPrefix(u64::MAX)); DELTA_OPERATIONS_MAX],
    };
    let spread = u64::MAX / SNAPSHOT_PREFIXES_MAX as u64;
    let snapshot = Message::Snapshot {
        head: at(u64::MAX, u64::MAX),
        after: None,
        prefixes: (1..=SNAPSHOT_PREFIXES_MAX as u64)
            .map(|n| HashPrefix(n * spread))
            .collect(),
        is_last: true,
    };
    assert!(encode(&delta).len() <= 256 * 1024);
    assert!(encode(&snapshot).len() <= 256 * 1024);
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
    fn damaged_messages_never_panic(which in 0..12usize, at in any::<prop::sample::Index>(), bits in 1..=255u8) {
        let mut bytes = encode(&examples()[which]);
        let position = at.index(bytes.len());
        bytes[position] ^= bits;
        let _ = decode(&bytes);
    }
}
