//! What the fuzzers start from is what is spoken: each seed below `fuzz/corpus` that this file makes is
//! read, and is what the code writes.
//!
//! After a change of a format: `GRANARY_WRITE_SEEDS=1 cargo test -p granary-protocol --test seeds`.

use std::fs;
use std::path::Path;

use granary_protocol::announcement::{Delta, SetDigest, SignedHead};
use granary_protocol::assertion::Assertion;
use granary_protocol::availability::{Cursor, HashPrefix, Operation};
use granary_protocol::certificate::{Certificate, SignedBadge, SignedCertificate, UnixTime};
use granary_protocol::contact::{Contact, SignedContact};
use granary_protocol::message::{Answer, Message, PROTOCOL_VERSION, Summary, Wish, WriterCursor};
use granary_protocol::peer::{PeerId, PeerKey};
use granary_protocol::revocation::{Revocations, SignedRevocations};
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::{StoreDir, StorePathHash};
use granary_protocol::ticket::{Refused, Reply, Request, Secret, Ticket};
use granary_protocol::token::{Claims, Grant, Permission, Token};
use granary_protocol::wire;

fn seed(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let file = folder.join(name);
    if std::env::var_os("GRANARY_WRITE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        fs::write(&file, bytes).unwrap();
    }
    let found = fs::read(&file).unwrap_or_default();
    assert!(found == bytes, "the seed {file:?} is outdated");
}

/// Not the key against which the fuzzers verify, so that nothing may.
fn mesh() -> SecretKey {
    SecretKey::from_seed("home".parse().unwrap(), [42; 32])
}

fn writer() -> PeerKey {
    PeerKey::from_seed([7; 32])
}

fn certificate() -> SignedCertificate {
    Certificate {
        peer: writer().peer_id(),
        name: "desk".into(),
        permissions: "share,vouch,push:team-*".parse().unwrap(),
        not_before: UnixTime(1),
        not_after: UnixTime(2),
        serial: 3,
    }
    .sign(&mesh())
    .unwrap()
}

fn contact() -> SignedContact {
    Contact {
        certificate: certificate(),
        number: 3,
        addresses: vec![
            "10.0.0.1:4727".parse().unwrap(),
            "[fd00::1]:4727".parse().unwrap(),
        ],
        transfer_port: Some(4728),
    }
    .sign(&writer())
    .unwrap()
}

fn revocations() -> SignedRevocations {
    let mut list = Revocations {
        number: 4,
        ..Revocations::default()
    };
    list.revoke(writer().peer_id(), UnixTime(9)).unwrap();
    list.revoke(PeerId::from_public_key([8; 32]), UnixTime(10))
        .unwrap();
    list.sign(&mesh()).unwrap()
}

fn messages() -> Vec<(&'static str, Message)> {
    let at = |epoch, sequence| Cursor { epoch, sequence };
    let peer = writer().peer_id();
    let hash = |byte| StorePathHash::from_bytes([byte; 20]);
    let set = [HashPrefix(8), HashPrefix(u64::MAX)].into_iter().collect();
    let head = SignedHead::of_set(&writer(), at(3, 300), &set);
    let operations = vec![
        Operation::Add(HashPrefix(1)),
        Operation::Remove(HashPrefix(u64::MAX)),
    ];
    let digest = SetDigest::of(&[HashPrefix(1)]);
    let version = PROTOCOL_VERSION;
    vec![
        (
            "knock",
            Message::Knock {
                version,
                badge: certificate().badge().clone(),
            },
        ),
        (
            "hello",
            Message::Hello {
                version,
                certificate: certificate(),
            },
        ),
        (
            "about",
            Message::About {
                store_dir: StoreDir::default(),
                contact: contact(),
                cursor: at(5, 6),
                summary: Summary([4; 32]),
                wish: Wish::Urgent,
            },
        ),
        ("goodbye", Message::Goodbye),
        ("neighbour", Message::Neighbour { wish: Wish::Yes }),
        (
            "summary",
            Message::Summary {
                summary: Summary([9; 32]),
            },
        ),
        (
            "cursors",
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
        ),
        ("contact", Message::Contact(contact())),
        (
            "delta",
            Message::Delta(Delta::sign(
                &writer(),
                at(1, u64::MAX),
                1,
                digest,
                operations,
            )),
        ),
        (
            "pull",
            Message::Pull {
                writer: peer,
                contact: 9,
                after: Some(at(9, 0)),
            },
        ),
        (
            "page",
            Message::PullPage {
                writer: peer,
                cursor: at(9, 1),
                after: HashPrefix(u64::MAX),
            },
        ),
        (
            "snapshot",
            Message::Snapshot {
                head,
                after: Some(HashPrefix(7)),
                prefixes: vec![HashPrefix(8), HashPrefix(u64::MAX)],
                is_last: true,
            },
        ),
        ("nothing-newer", Message::NothingNewer { writer: peer }),
        (
            "lookup",
            Message::Lookup {
                request: 1,
                hashes: vec![hash(1), hash(2)],
            },
        ),
        (
            "answers",
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
        ),
        ("revocations", Message::Revocations(revocations())),
        (
            "revocations-known",
            Message::RevocationsKnown { number: u64::MAX },
        ),
    ]
}

#[test]
fn messages_are_seeds_as_they_travel() {
    for (name, message) in messages() {
        let bytes = wire::encode(&message);
        assert_eq!(wire::decode(&bytes), Ok(message));
        seed("wire", name, &bytes);
    }
    let set = [HashPrefix(8)].into_iter().collect();
    let cursor = Cursor {
        epoch: 3,
        sequence: 300,
    };
    let head = SignedHead::of_set(&writer(), cursor, &set);
    let proof = wire::encode_proof(&contact(), &head);
    assert_eq!(wire::decode_proof(&proof), Ok((contact(), head)));
    seed("wire", "proof", &proof);
}

#[test]
fn certificates_are_seeds_whole_and_as_badges() {
    let signed = certificate();
    assert_eq!(
        SignedBadge::from_bytes(&signed.badge().to_bytes()).as_ref(),
        Ok(signed.badge())
    );
    seed("certificate", "text", signed.to_text().as_bytes());
    seed("certificate", "bytes", &signed.to_bytes());
    seed("certificate", "badge", &signed.badge().to_bytes());
    let assertion = Assertion {
        certificate: signed,
        cache: "main".to_owned(),
        cache_keys: vec![mesh().public_key()],
        issued: UnixTime(1),
        nonce: [9; 16],
    };
    let assertion = assertion.sign(&writer()).unwrap();
    seed("certificate", "assertion", assertion.to_text().as_bytes());
    seed("certificate", "permissions", b"share,vouch,push:team-*");
    seed(
        "certificate",
        "peer",
        writer().peer_id().to_string().as_bytes(),
    );
    seed(
        "certificate",
        "key",
        mesh().public_key().to_string().as_bytes(),
    );
}

#[test]
fn lists_of_revocations_are_seeds() {
    seed("revocation", "text", revocations().to_text().as_bytes());
    seed("revocation", "bytes", &revocations().to_bytes());
}

#[test]
fn tickets_and_words_about_joining_are_seeds() {
    let secret = || Secret::from_bytes([9; 16]);
    let ticket = Ticket {
        mesh: mesh().public_key(),
        admits: vec!["10.0.0.1:4728".into(), "[fd00::1]:4728".into()],
        peers: vec!["desk.lan:4727".into()],
        secret: Some(secret()),
        expires: UnixTime(1000),
    };
    seed("ticket", "text", ticket.to_text().unwrap().as_bytes());
    let name = || "desk".to_owned();
    let requests = [
        (
            "join",
            Request::Join {
                secret: secret(),
                name: name(),
            },
        ),
        ("ask", Request::Ask { name: name() }),
        (
            "renew",
            Request::Renew {
                certificate: certificate(),
            },
        ),
    ];
    for (name, request) in requests {
        seed("ticket", name, &request.to_bytes());
    }
    let replies = [
        ("admitted", Reply::Certificate(certificate())),
        ("refused", Reply::Refused(Refused::UsedUp)),
    ];
    for (name, reply) in replies {
        seed("ticket", name, &reply.to_bytes());
    }
}

#[test]
fn tokens_are_seeds_whole_and_as_their_claims() {
    let grant = |pattern: &str, permissions: &[Permission]| Grant {
        pattern: pattern.parse().unwrap(),
        permissions: permissions.to_vec(),
    };
    let claims = Claims {
        id: Some("abc".into()),
        subject: "alice \"the\" \u{1F980}".into(),
        not_before: Some(UnixTime(1000)),
        expires: Some(UnixTime(2000)),
        grants: vec![grant("main", &Permission::ALL), grant("*", &[])],
    };
    let text = claims.mint(&mesh());
    assert_eq!(
        Token::parse(&text).map(|token| token.claims).as_ref(),
        Ok(&claims)
    );
    seed("token", "text", text.as_bytes());
    seed("token", "claims", claims.to_json().as_bytes());
}
