//! Arbitrary inputs and messages to the mind: it does not panic, it does not grow without bound, it
//! says nothing to strangers, and a tick leaves nothing due.
//!
//! The bytes are a program: one byte chooses what happens, the next ones how. Frames of peers are
//! either bytes as they come or a message of the kind that leads on.
#![no_main]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use granary_protocol::announcement::{Delta, SetDigest, SignedHead};
use granary_protocol::availability::{Cursor, HashPrefix, MemoryIndex, Operation};
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::contact::{Contact, SignedContact};
use granary_protocol::hash::NarHash;
use granary_protocol::mesh::{Blame, CacheRole, Config, FetchId, Input, LookupId, Mesh, Output};
use granary_protocol::message::{Answer, Message, PROTOCOL_VERSION, Summary, Wish, WriterCursor};
use granary_protocol::narinfo::{NarInfo, VerifiedNarInfo};
use granary_protocol::peer::{PeerId, PeerKey};
use granary_protocol::signature::{SecretKey, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use granary_protocol::wire;
use libfuzzer_sys::fuzz_target;

const START: UnixTime = UnixTime(1_700_000_000);
const PEERS: u8 = 6;

/// Outputs of one input: a page of everything to everyone is far below.
const OUTPUTS_MAX: usize = 4096;

fn key(name: &str) -> SecretKey {
    SecretKey::from_seed(name.parse().unwrap(), [name.len() as u8; 32])
}

fn peer_key(number: u8) -> PeerKey {
    PeerKey::from_seed([number % PEERS + 1; 32])
}

fn peer(number: u8) -> PeerId {
    signed().peers[usize::from(number % PEERS)]
}

fn hash(number: u8) -> StorePathHash {
    StorePathHash::from_bytes([number; 20])
}

/// Signing is slow, so it is done once.
struct Signed {
    peers: Vec<PeerId>,
    /// With a transfer port, and without.
    contacts: Vec<[SignedContact; 2]>,
    certificates: Vec<SignedCertificate>,
    narinfos: Vec<String>,
}

fn signed() -> &'static Signed {
    static SIGNED: OnceLock<Signed> = OnceLock::new();
    SIGNED.get_or_init(|| {
        let certificate = |number: u8| {
            let certificate = Certificate {
                peer: peer_key(number).peer_id(),
                name: "node".into(),
                permissions: "share".parse().unwrap(),
                not_before: START,
                not_after: UnixTime(START.0 + 3600),
                serial: 1,
            };
            certificate.sign(&key("home")).unwrap()
        };
        let contact = |number: u8| {
            [Some(4728), None].map(|transfer_port| {
                let contact = Contact {
                    certificate: certificate(number),
                    number: 1,
                    addresses: vec![SocketAddr::from(([10, 0, 1, number], 4727))],
                    transfer_port,
                };
                contact.sign(&peer_key(number)).unwrap()
            })
        };
        let dir = StoreDir::default();
        let narinfo = |number: u8| {
            let base_name = |number: u8| format!("{}-hello", hash(number));
            let references: Vec<String> = (1..=number % 8)
                .map(|step| base_name(number.wrapping_add(step)))
                .collect();
            let text = format!(
                "StorePath: /nix/store/{}\nURL: nar/x.nar\nCompression: none\n\
                 NarHash: {}\nNarSize: 1000000000\nReferences: {}\n",
                base_name(number),
                NarHash::from_bytes([number; 32]),
                references.join(" ")
            );
            let mut narinfo = NarInfo::parse(&text, &dir).unwrap();
            narinfo.signatures = vec![key("builder").sign(narinfo.fingerprint(&dir).as_bytes())];
            narinfo.to_text(&dir)
        };
        Signed {
            peers: (0..PEERS).map(|number| peer_key(number).peer_id()).collect(),
            contacts: (0..PEERS).map(contact).collect(),
            certificates: (0..PEERS).map(certificate).collect(),
            narinfos: (0..=u8::MAX).map(narinfo).collect(),
        }
    })
}

fn verified(number: u8) -> Arc<VerifiedNarInfo> {
    let dir = StoreDir::default();
    let narinfo = NarInfo::parse(&signed().narinfos[usize::from(number)], &dir).unwrap();
    let trust = TrustedKeys::from_iter([key("builder").public_key()]);
    Arc::new(VerifiedNarInfo::verify(narinfo, &trust, &dir).unwrap())
}

struct Program<'a>(&'a [u8]);

impl<'a> Program<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?).min(self.0.len());
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(bytes)
    }

    fn answers(&mut self) -> Option<Vec<Answer>> {
        let answer = |number: &u8| Answer {
            hash: hash(*number),
            narinfo: match number % 8 {
                0 => None,
                1 => Some("nonsense".into()),
                2 => Some(signed().narinfos[usize::from(number.wrapping_add(1))].clone()),
                _ => Some(signed().narinfos[usize::from(*number)].clone()),
            },
        };
        Some(self.bytes()?.iter().map(answer).collect())
    }

    fn cursor(&mut self) -> Option<Cursor> {
        let (epoch, sequence) = (u64::from(self.byte()? % 3), u64::from(self.byte()?));
        Some(Cursor { epoch, sequence })
    }

    fn contact(&mut self) -> Option<SignedContact> {
        let choice = self.byte()?;
        let contacts = &signed().contacts[usize::from(choice % PEERS)];
        Some(contacts[usize::from(choice / PEERS % 2)].clone())
    }

    fn message(&mut self) -> Option<Message> {
        Some(match self.byte()? % 11 {
            0 => wire::decode(self.bytes()?).unwrap_or(Message::Goodbye),
            10 => Message::Knock {
                version: PROTOCOL_VERSION,
                badge: signed().certificates[usize::from(self.byte()? % PEERS)]
                    .badge()
                    .clone(),
            },
            1 => Message::Hello {
                version: PROTOCOL_VERSION,
                certificate: signed().certificates[usize::from(self.byte()? % PEERS)].clone(),
            },
            2 => Message::About {
                store_dir: StoreDir::default(),
                contact: self.contact()?,
                cursor: self.cursor()?,
                summary: Summary([0; 32]),
                wish: match self.byte()? % 3 {
                    0 => Wish::No,
                    1 => Wish::Yes,
                    _ => Wish::Urgent,
                },
            },
            3 => {
                let (writer, cursor) = (self.byte()?, self.cursor()?);
                let operation = |number: &u8| match number % 4 {
                    0 => Operation::Remove(HashPrefix::from(&hash(*number))),
                    _ => Operation::Add(HashPrefix::from(&hash(*number))),
                };
                let operations: Vec<Operation> = self.bytes()?.iter().map(operation).collect();
                let cursor = Cursor {
                    sequence: cursor.sequence + operations.len() as u64,
                    ..cursor
                };
                let (key, set) = (peer_key(writer), SetDigest([0; 32]));
                Message::Delta(Delta::sign(&key, cursor, 1, set, operations))
            }
            4 => {
                let (writer, cursor) = (self.byte()?, self.cursor()?);
                let prefixes: BTreeSet<HashPrefix> = self
                    .bytes()?
                    .iter()
                    .map(|number| HashPrefix::from(&hash(*number)))
                    .collect();
                Message::Snapshot {
                    head: SignedHead::of_set(&peer_key(writer), cursor, &prefixes),
                    after: None,
                    prefixes: prefixes.into_iter().collect(),
                    is_last: true,
                }
            }
            5 => Message::Lookup {
                request: u64::from(self.byte()?),
                hashes: self.bytes()?.iter().map(|number| hash(*number)).collect(),
            },
            6 => Message::Pull {
                writer: peer(self.byte()?),
                contact: 0,
                after: Some(self.cursor()?),
            },
            7 => Message::Cursors {
                cursors: vec![WriterCursor {
                    writer: peer(self.byte()?),
                    contact: u64::from(self.byte()? % 3),
                    cursor: Some(self.cursor()?),
                }],
                is_complete: self.0.len() % 2 > 0,
            },
            8 => Message::Contact(self.contact()?),
            _ => Message::Answers {
                request: u64::from(self.byte()?),
                answers: self.answers()?,
            },
        })
    }

    fn input(&mut self, number: u64) -> Option<Input> {
        let choice = self.byte()?;
        let one = self.byte()?;
        let address = SocketAddr::from(([10 + one % 2 * 193, 0, 0, one], 4727));
        let fetch = FetchId(number.saturating_sub(u64::from(one % 4)));
        Some(match choice % 24 {
            0 => Input::Woke,
            1 => Input::NetworkChanged,
            2 => Input::ClockRead { unix: START },
            3 => Input::Discovered {
                peer: peer(one),
                addresses: vec![address],
            },
            4 | 5 => Input::LinkUp {
                peer: peer(one),
                address,
                outbound: choice % 2 == 0,
                seed: None,
            },
            6 => Input::LinkDown { peer: peer(one) },
            7 => Input::DialFailed { peer: peer(one) },
            8 => Input::Garbage { peer: peer(one) },
            9 => Input::LocalChanged {
                added: self.bytes()?.iter().map(|number| hash(*number)).collect(),
                removed: vec![hash(one)],
            },
            10 => Input::LocalAnswers {
                peer: peer(one),
                request: u64::from(self.byte()?),
                answers: self.answers()?,
            },
            11 | 12 => Input::Lookup {
                lookup: LookupId(number),
                hash: hash(one),
            },
            13 => Input::CancelLookup {
                lookup: LookupId(number.saturating_sub(1)),
                hash: hash(one),
            },
            14 => Input::Fetch {
                fetch: FetchId(number),
                narinfo: verified(one),
            },
            15 => Input::TransferProgress {
                fetch,
                attempt: u32::from(self.byte()? % 4),
                at: u64::from(self.byte()?) << (self.byte()? % 56),
                held_up: Duration::from_millis(u64::from(one)),
            },
            16 => Input::TransferEnded {
                fetch,
                attempt: u32::from(self.byte()? % 4),
                outcome: match one / 4 % 4 {
                    0 => Ok(()),
                    1 => Err(Blame::Absent),
                    2 => Err(Blame::Peer),
                    _ => Err(Blame::Local),
                },
            },
            17 => Input::FetchMismatch { fetch },
            18 => Input::CacheAnswers {
                cache: usize::from(one % 3),
                request: u64::from(self.byte()?),
                answers: self.answers()?,
            },
            19 => Input::CacheFailed {
                cache: usize::from(one % 3),
                request: u64::from(self.byte()?),
            },
            _ => Input::Received {
                peer: peer(one),
                message: self.message()?,
            },
        })
    }
}

fuzz_target!(|bytes: &[u8]| {
    // The only clock there is: where virtual time starts does not matter.
    let mut now = Instant::now();
    let me = peer(2);
    let config = Config {
        key: peer_key(2),
        mesh_key: key("home").public_key(),
        certificate: signed().certificates[2].clone(),
        trust: TrustedKeys::from_iter([key("builder").public_key()]),
        trusts_members: true,
        store_dir: StoreDir::default(),
        transfer_port: Some(4728),
        seeds: 1,
        caches: vec![CacheRole::Upstream, CacheRole::Anchor],
    };
    let mut mind = Mesh::new(me, config, 1, now);
    let mut index = MemoryIndex::new();
    let mut admitted = BTreeSet::new();
    let mut handle = |mind: &mut Mesh, input: Input, now: Instant| {
        let is_tick = matches!(input, Input::Tick);
        mind.handle(&mut index, input, now);
        let mut outputs = 0;
        while let Some(output) = mind.poll() {
            outputs += 1;
            match output {
                Output::Admitted { peer, .. } => assert!(admitted.insert(peer)),
                Output::Departed { peer } => assert!(admitted.remove(&peer)),
                Output::Send { peer, message } => {
                    let is_hello =
                        matches!(message, Message::Knock { .. } | Message::Hello { .. });
                    assert!(is_hello || admitted.contains(&peer));
                }
                _ => {}
            }
        }
        assert!(outputs <= OUTPUTS_MAX);
        for size in mind.sizes() {
            assert!(size.count <= size.limit, "{size:?}");
        }
        let due = mind.deadline();
        assert!(!is_tick || due.is_none_or(|(at, _)| at > now), "{due:?}");
    };
    handle(&mut mind, Input::ClockRead { unix: START }, now);
    let mut program = Program(bytes);
    let mut number = 0;
    while let Some(input) = program.input(number) {
        number += 1;
        handle(&mut mind, input, now);
        // Time passes by the length of what is left to do: replayable, and of every size.
        let pause = Duration::from_millis(1 << (program.0.len() % 14));
        let end = now + pause;
        for _ in 0..64 {
            let Some((at, _)) = mind.deadline().filter(|(at, _)| *at <= end) else {
                break;
            };
            now = now.max(at);
            handle(&mut mind, Input::Tick, now);
        }
        now = now.max(end);
    }
});
