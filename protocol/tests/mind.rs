//! Arbitrary inputs to one mind: whatever a peer says and however the network behaves, the mind
//! keeps the promises on its first page.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use granary_protocol::announcement::{Delta, SetDigest, SignedHead};
use granary_protocol::availability::{Cursor, HashPrefix, MemoryIndex, Operation};
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::contact::{Contact, SignedContact};
use granary_protocol::hash::NarHash;
use granary_protocol::mesh::{
    Blame, CacheRole, Config, FetchId, Input, LookupId, LookupOutcome, Mesh, Output, Source,
};
use granary_protocol::message::{Answer, Message, PROTOCOL_VERSION, Summary, Wish, WriterCursor};
use granary_protocol::narinfo::{NarInfo, VerifiedNarInfo};
use granary_protocol::peer::{PeerId, PeerKey};
use granary_protocol::revocation::Revocations;
use granary_protocol::signature::{SecretKey, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use proptest::prelude::*;
use proptest::sample::select;

const START: u64 = 1_700_000_000;

/// Most outputs of one input: a flush to every peer, a dial of every peer, an answer to every lookup.
const OUTPUTS_MAX: usize = 64;

fn key(name: &str, seed: u8) -> SecretKey {
    SecretKey::from_seed(name.parse().unwrap(), [seed; 32])
}

fn peer_key(number: u8) -> PeerKey {
    PeerKey::from_seed([number; 32])
}

fn peer(number: u8) -> PeerId {
    peer_key(number).peer_id()
}

/// The mind under test is number 4, whose id lies among those of the others.
const ME: u8 = 4;

#[test]
fn there_are_lesser_and_greater_ids_than_ours() {
    assert!(OTHERS.iter().any(|number| peer(*number) < peer(ME)));
    assert!(OTHERS.iter().any(|number| peer(*number) > peer(ME)));
}

const OTHERS: [u8; 4] = [1, 2, 3, 5];

fn certificate(number: u8, mesh: &SecretKey, lifetime: u64) -> SignedCertificate {
    Certificate {
        peer: peer(number),
        name: "node".into(),
        permissions: "share".parse().unwrap(),
        not_before: UnixTime(START),
        not_after: UnixTime(START.saturating_add(lifetime)),
        serial: 1,
    }
    .sign(mesh)
    .unwrap()
}

fn hash(number: u8) -> StorePathHash {
    StorePathHash::from_bytes([number; 20])
}

fn narinfo(number: u8, key: &SecretKey) -> String {
    let dir = StoreDir::default();
    let text = format!(
        "StorePath: /nix/store/{}-hello\nURL: nar/x.nar\nCompression: none\n\
         NarHash: {}\nNarSize: 1000\nReferences: \n",
        hash(number),
        NarHash::from_bytes([number; 32])
    );
    let mut narinfo = NarInfo::parse(&text, &dir).unwrap();
    narinfo.signatures = vec![key.sign(narinfo.fingerprint(&dir).as_bytes())];
    narinfo.to_text(&dir)
}

fn verified(number: u8) -> Arc<VerifiedNarInfo> {
    let text = narinfo(number, &key("builder-1", 2));
    let narinfo = NarInfo::parse(&text, &StoreDir::default()).unwrap();
    let trust = TrustedKeys::from_iter([key("builder-1", 2).public_key()]);
    Arc::new(VerifiedNarInfo::verify(narinfo, &trust, &StoreDir::default()).unwrap())
}

fn any_peer() -> impl Strategy<Value = PeerId> {
    select(OTHERS.to_vec()).prop_map(peer)
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    (1u8..20).prop_map(|host| SocketAddr::from(([10, 0, 0, host], 4727)))
}

fn any_hash() -> impl Strategy<Value = StorePathHash> {
    (1u8..5).prop_map(hash)
}

fn any_number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..8, Just(u64::MAX), Just(u64::MAX - 1)]
}

fn any_cursor() -> impl Strategy<Value = Cursor> {
    (0u64..3, any_number()).prop_map(|(epoch, sequence)| Cursor { epoch, sequence })
}

fn any_prefix() -> impl Strategy<Value = HashPrefix> {
    prop_oneof![
        any_hash().prop_map(|hash| HashPrefix::from(&hash)),
        any_number().prop_map(HashPrefix)
    ]
}

fn any_operation() -> impl Strategy<Value = Operation> {
    (any_prefix(), any::<bool>()).prop_map(|(prefix, added)| {
        if added {
            Operation::Add(prefix)
        } else {
            Operation::Remove(prefix)
        }
    })
}

fn any_answer() -> impl Strategy<Value = Answer> {
    let builder = || key("builder-1", 2);
    let text = prop_oneof![
        4 => (1u8..5).prop_map(move |number| Some(narinfo(number, &builder()))),
        1 => (1u8..5).prop_map(|number| Some(narinfo(number, &key("stranger", 9)))),
        1 => Just(Some("StorePath: nonsense".to_owned())),
        2 => Just(None),
    ];
    (any_hash(), text).prop_map(|(hash, narinfo)| Answer { hash, narinfo })
}

fn any_hello() -> impl Strategy<Value = Message> {
    let number = select(OTHERS.to_vec());
    let mesh = prop_oneof![9 => Just("home"), 1 => Just("office")];
    let lifetime = select(vec![60, 86_400, u64::MAX]);
    (number, mesh, lifetime, 0..10u8).prop_map(|(number, mesh, lifetime, version)| Message::Hello {
        version: PROTOCOL_VERSION - u32::from(version == 0),
        certificate: certificate(number, &key(mesh, 1), lifetime),
    })
}

/// A member, or this node itself.
fn any_writer() -> impl Strategy<Value = u8> {
    prop_oneof![9 => select(OTHERS.to_vec()), 1 => Just(ME)]
}

fn contact_of(number: u8, rising: u64, port: Option<u16>, mesh: &str) -> SignedContact {
    Contact {
        certificate: certificate(number, &key(mesh, 1), 86_400),
        number: rising,
        addresses: vec![SocketAddr::from(([10, 0, 0, number], 4727))],
        transfer_port: port,
    }
    .sign(&peer_key(number))
    .unwrap()
}

fn any_contact() -> impl Strategy<Value = SignedContact> {
    let mesh = prop_oneof![9 => Just("home"), 1 => Just("office")];
    (any_writer(), any_number(), any::<bool>(), mesh).prop_map(|(number, rising, port, mesh)| {
        contact_of(number, rising, port.then_some(4728), mesh)
    })
}

/// Now and then signed by another than it names.
fn any_signed_head() -> impl Strategy<Value = SignedHead> {
    let set = prop::collection::btree_set(any_prefix(), 0..5);
    (any_writer(), any_cursor(), set, 0..10u8).prop_map(|(number, cursor, set, forged)| {
        let signed = SignedHead::of_set(&peer_key(number), cursor, &set);
        let mut head = signed.head().clone();
        if forged == 0 {
            head.cursor.sequence = head.cursor.sequence.wrapping_add(1);
        }
        SignedHead::from_parts(head, *signed.signature())
    })
}

fn any_delta() -> impl Strategy<Value = Delta> {
    let operations = prop::collection::vec(any_operation(), 0..4);
    (any_writer(), any_cursor(), operations, 0..10u8).prop_map(
        |(number, after, operations, forged)| {
            let cursor = Cursor {
                sequence: after.sequence.saturating_add(operations.len() as u64),
                ..after
            };
            let count = operations.len() as u64;
            let signed = Delta::sign(
                &peer_key(number),
                cursor,
                count,
                SetDigest([0; 32]),
                operations.clone(),
            );
            let mut operations = operations;
            if forged == 0 {
                operations.push(Operation::Add(HashPrefix(1)));
            }
            Delta::from_parts(signed.head().clone(), operations)
        },
    )
}

fn any_cursors() -> impl Strategy<Value = Message> {
    let one = (any_writer(), any_number(), prop::option::of(any_cursor()));
    (prop::collection::vec(one, 0..5), any::<bool>()).prop_map(|(known, is_complete)| {
        let known: BTreeMap<PeerId, WriterCursor> = known
            .into_iter()
            .map(|(number, contact, cursor)| {
                let writer = peer(number);
                let known = WriterCursor {
                    writer,
                    contact,
                    cursor,
                };
                (writer, known)
            })
            .collect();
        Message::Cursors {
            cursors: known.into_values().collect(),
            is_complete,
        }
    })
}

fn any_wish() -> impl Strategy<Value = Wish> {
    select(vec![Wish::No, Wish::Yes, Wish::Urgent])
}

fn any_message() -> impl Strategy<Value = Message> {
    prop_oneof![
        1 => any_hello(),
        3 => (any::<bool>(), any_contact(), any_cursor(), any_wish()).prop_map(|(other, contact, cursor, wish)| Message::About {
            store_dir: StoreDir::new(if other { "/gnu/store" } else { "/nix/store" }).unwrap(),
            contact,
            cursor,
            summary: Summary([1; 32]),
            wish,
        }),
        1 => (any_number(), any_writer(), any::<bool>()).prop_map(|(number, writer, forged)| {
            let mut list = Revocations { number, ..Revocations::default() };
            list.revoke(peer(writer), UnixTime(u64::MAX)).unwrap();
            Message::Revocations(list.sign(&key("home", if forged { 2 } else { 1 })).unwrap())
        }),
        1 => any_number().prop_map(|number| Message::RevocationsKnown { number }),
        1 => Just(Message::Goodbye),
        1 => any_wish().prop_map(|wish| Message::Neighbour { wish }),
        1 => Just(Message::Summary { summary: Summary([1; 32]) }),
        2 => any_cursors(),
        2 => any_contact().prop_map(Message::Contact),
        3 => any_delta().prop_map(Message::Delta),
        1 => (any_writer(), any_number(), prop::option::of(any_cursor()))
            .prop_map(|(writer, contact, after)| Message::Pull { writer: peer(writer), contact, after }),
        1 => (any_writer(), any_cursor(), any_prefix())
            .prop_map(|(writer, cursor, after)| Message::PullPage { writer: peer(writer), cursor, after }),
        1 => any_writer().prop_map(|writer| Message::NothingNewer { writer: peer(writer) }),
        3 => (any_signed_head(), prop::option::of(any_prefix()), prop::collection::btree_set(any_prefix(), 0..5), any::<bool>())
            .prop_map(|(head, after, prefixes, is_last)| Message::Snapshot {
                head,
                after,
                prefixes: prefixes.into_iter().collect(),
                is_last,
            }),
        1 => (0u64..4, prop::collection::vec(any_hash(), 0..4))
            .prop_map(|(request, hashes)| Message::Lookup { request, hashes }),
        4 => (0u64..8, prop::collection::vec(any_answer(), 0..3))
            .prop_map(|(request, answers)| Message::Answers { request, answers }),
    ]
}

/// What happens next; the driver turns it into one or more inputs.
#[derive(Clone, Debug)]
enum Step {
    Wait(Duration),
    Input(Input),
    /// The course of an ordinary acquaintance, so that much of what follows meets a member.
    Admit {
        peer: u8,
        outbound: bool,
        port: bool,
        shares: Vec<HashPrefix>,
    },
    Lookup(u8),
    Cancel(usize),
    Fetch(u8),
    /// A cache answers what it was last asked, with another build if asked to.
    Answer(bool),
    /// Says something about the latest transfer.
    Report(Option<Result<(), Blame>>),
}

fn any_input() -> impl Strategy<Value = Input> {
    let hashes = || prop::collection::vec(any_hash(), 0..4);
    prop_oneof![
        1 => Just(Input::Tick),
        1 => (0u64..200_000).prop_map(|after| Input::ClockRead { unix: UnixTime(START + after) }),
        1 => Just(Input::Woke),
        1 => Just(Input::NetworkChanged),
        1 => prop::collection::vec(any_address(), 0..4).prop_map(|addresses| Input::OwnAddresses { addresses }),
        1 => Just(Input::Shutdown),
        3 => (any_peer(), prop::collection::vec(any_address(), 0..12))
            .prop_map(|(peer, addresses)| Input::Discovered { peer, addresses }),
        1 => any_peer().prop_map(|peer| Input::Lost { peer }),
        2 => (any_peer(), any_address(), any::<bool>(), prop::option::of(0usize..3))
            .prop_map(|(peer, address, outbound, seed)| Input::LinkUp { peer, address, outbound, seed }),
        2 => any_peer().prop_map(|peer| Input::LinkDown { peer }),
        1 => any_peer().prop_map(|peer| Input::DialFailed { peer }),
        1 => (0usize..3).prop_map(|seed| Input::SeedFailed { seed }),
        1 => (0usize..3, any_peer()).prop_map(|(seed, peer)| Input::SeedFound { seed, peer }),
        20 => (any_peer(), any_message()).prop_map(|(peer, message)| Input::Received { peer, message }),
        1 => any_peer().prop_map(|peer| Input::Garbage { peer }),
        1 => hashes().prop_map(|all| Input::LocalPaths { all }),
        1 => (hashes(), hashes()).prop_map(|(added, removed)| Input::LocalChanged { added, removed }),
        1 => (any_peer(), 0u64..4, prop::collection::vec(any_answer(), 0..3))
            .prop_map(|(peer, request, answers)| Input::LocalAnswers { peer, request, answers }),
        4 => (0usize..3, 0u64..8, prop::collection::vec(any_answer(), 0..3))
            .prop_map(|(cache, request, answers)| Input::CacheAnswers { cache, request, answers }),
        2 => (0usize..3, 0u64..8).prop_map(|(cache, request)| Input::CacheFailed { cache, request }),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        Just(Ok(())),
        select(vec![Blame::Absent, Blame::Peer, Blame::Local]).prop_map(Err)
    ];
    prop_oneof![
        3 => select(vec![1u64, 20, 500, 5_000, 60_000]).prop_map(|ms| Step::Wait(Duration::from_millis(ms))),
        12 => any_input().prop_map(Step::Input),
        3 => (select(OTHERS.to_vec()), any::<bool>(), any::<bool>(), prop::collection::btree_set(any_prefix(), 0..5))
            .prop_map(|(peer, outbound, port, shares)| Step::Admit {
                peer,
                outbound,
                port,
                shares: shares.into_iter().collect(),
            }),
        4 => (1u8..5).prop_map(Step::Lookup),
        1 => (0usize..8).prop_map(Step::Cancel),
        2 => (1u8..5).prop_map(Step::Fetch),
        3 => any::<bool>().prop_map(Step::Answer),
        2 => prop::option::of(outcome).prop_map(Step::Report),
    ]
}

/// The hands of one mind, which check every output.
struct Hands {
    mind: Mesh,
    index: MemoryIndex,
    now: Instant,
    connected: BTreeSet<PeerId>,
    admitted: BTreeSet<PeerId>,
    open_lookups: BTreeMap<LookupId, StorePathHash>,
    open_fetches: BTreeSet<FetchId>,
    transfer: Option<(FetchId, u32)>,
    question: Option<(usize, u64, Vec<StorePathHash>)>,
    next_id: u64,
    /// Everything the mind wanted, to compare two runs.
    trace: Vec<String>,
}

impl Hands {
    fn new(start: Instant) -> Hands {
        let config = Config {
            key: peer_key(ME),
            mesh_key: key("home", 1).public_key(),
            certificate: certificate(ME, &key("home", 1), 86_400),
            trust: TrustedKeys::from_iter([key("builder-1", 2).public_key()]),
            trusts_members: true,
            store_dir: StoreDir::default(),
            transfer_port: Some(4728),
            seeds: 2,
            caches: vec![CacheRole::Anchor, CacheRole::Upstream],
        };
        let mut hands = Hands {
            mind: Mesh::new(peer(ME), config, 7, start),
            index: MemoryIndex::new(),
            now: start,
            connected: BTreeSet::new(),
            admitted: BTreeSet::new(),
            open_lookups: BTreeMap::new(),
            open_fetches: BTreeSet::new(),
            transfer: None,
            question: None,
            next_id: 0,
            trace: Vec::new(),
        };
        hands.input(Input::ClockRead {
            unix: UnixTime(START),
        });
        hands
    }

    fn input(&mut self, input: Input) {
        match &input {
            Input::LinkUp { peer, .. } => drop(self.connected.insert(*peer)),
            Input::LinkDown { peer } => drop(self.connected.remove(peer)),
            _ => {}
        }
        let is_tick = matches!(input, Input::Tick);
        self.mind.handle(&mut self.index, input, self.now);
        let mut outputs = 0;
        while let Some(output) = self.mind.poll() {
            self.trace.push(format!("{output:?}"));
            self.check(output);
            outputs += 1;
        }
        assert!(outputs <= OUTPUTS_MAX, "{outputs} outputs of one input");
        if is_tick {
            let due = self.mind.deadline();
            assert!(
                due.is_none_or(|(at, _)| at > self.now),
                "a tick left {due:?} due"
            );
        }
        for size in self.mind.sizes() {
            assert!(size.count <= size.limit, "{size:?}");
        }
        let linked = self
            .mind
            .peers(&self.index, self.now)
            .into_iter()
            .filter(|view| view.state == granary_protocol::mesh::PeerState::Linked)
            .map(|view| view.peer);
        assert_eq!(
            linked.collect::<BTreeSet<_>>(),
            self.admitted,
            "Admitted and Departed tell who is linked"
        );
    }

    fn check(&mut self, output: Output) {
        match output {
            Output::Dial { peer, addresses } => {
                assert!(!self.admitted.contains(&peer), "dials a linked peer");
                assert!((1..=8).contains(&addresses.len()));
            }
            Output::DialSeed { seed } => assert!(seed < 2),
            Output::Hangup { peer, .. } => drop(self.connected.remove(&peer)),
            Output::Send { peer, message } => {
                assert!(self.connected.contains(&peer), "sends where no link is");
                let is_hello = matches!(message, Message::Knock { .. } | Message::Hello { .. });
                assert!(
                    is_hello || self.admitted.contains(&peer),
                    "{} to a stranger",
                    message.kind()
                );
            }
            Output::Admitted { peer, certificate } => {
                assert_eq!(certificate.peer, peer);
                assert!(self.connected.contains(&peer));
                assert!(self.admitted.insert(peer), "admitted twice");
            }
            Output::Departed { peer } => {
                assert!(self.admitted.remove(&peer), "departed without being there");
            }
            Output::ReadLocal { peer, .. } => assert!(self.admitted.contains(&peer)),
            Output::KeepRevocations { list } => {
                assert!(list.verify(&key("home", 1).public_key()).is_ok());
            }
            Output::LookupDone { lookup, outcome } => {
                let hash = self.open_lookups.remove(&lookup).expect("an open lookup");
                if let LookupOutcome::Found {
                    narinfo,
                    providers,
                    caches,
                } = outcome
                {
                    assert_eq!(narinfo.narinfo().store_path.hash(), hash);
                    assert!(providers.iter().all(|peer| self.admitted.contains(peer)));
                    assert!(caches.iter().all(|cache| *cache < 2));
                }
            }
            Output::AskCache {
                cache,
                request,
                hashes,
            } => {
                assert!(cache < 2 && (1..=256).contains(&hashes.len()));
                self.question = Some((cache, request, hashes));
            }
            Output::Transfer {
                fetch,
                attempt,
                source,
                ..
            } => {
                match source {
                    Source::Peer { peer, .. } => assert!(self.admitted.contains(&peer)),
                    Source::Cache { cache, .. } => assert!(cache < 2),
                }
                assert!(self.open_fetches.contains(&fetch));
                self.transfer = Some((fetch, attempt));
            }
            Output::StopTransfer { fetch, .. } => assert!(self.open_fetches.contains(&fetch)),
            Output::FetchFailed { fetch } => {
                assert!(self.open_fetches.remove(&fetch), "failed twice");
            }
        }
    }

    /// Lets time pass, ticking at every deadline and never more often than that is worth.
    fn wait(&mut self, duration: Duration) {
        let end = self.now + duration;
        let mut ticks = 0;
        while let Some((at, why)) = self.mind.deadline().filter(|(at, _)| *at <= end) {
            self.now = self.now.max(at);
            self.input(Input::Tick);
            ticks += 1;
            let enough = 200 + 50 * duration.as_secs();
            assert!(ticks < enough, "{ticks} ticks in {duration:?}, now: {why}");
        }
        self.now = end;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Wait(duration) => self.wait(duration),
            Step::Input(input) => self.input(input),
            Step::Admit {
                peer: number,
                outbound,
                port,
                shares,
            } => {
                let peer = peer(number);
                if self.admitted.contains(&peer) {
                    return;
                }
                let address = SocketAddr::from(([10, 0, 0, number], 4727));
                self.input(Input::LinkUp {
                    peer,
                    address,
                    outbound,
                    seed: None,
                });
                let head = Cursor {
                    epoch: 1,
                    sequence: 1,
                };
                let set = shares.iter().copied().collect();
                for message in [
                    Message::Hello {
                        version: PROTOCOL_VERSION,
                        certificate: certificate(number, &key("home", 1), 86_400),
                    },
                    Message::About {
                        store_dir: StoreDir::default(),
                        contact: contact_of(number, 1, port.then_some(4728), "home"),
                        cursor: head,
                        summary: Summary([0; 32]),
                        wish: Wish::Yes,
                    },
                    Message::Snapshot {
                        head: SignedHead::of_set(&peer_key(number), head, &set),
                        after: None,
                        prefixes: shares,
                        is_last: true,
                    },
                ] {
                    self.input(Input::Received { peer, message });
                }
            }
            Step::Lookup(number) => {
                let (lookup, hash) = (LookupId(self.id()), hash(number));
                self.open_lookups.insert(lookup, hash);
                self.input(Input::Lookup { lookup, hash });
            }
            Step::Cancel(which) => {
                let open = self.open_lookups.iter().nth(which);
                if let Some((lookup, hash)) = open.map(|(lookup, hash)| (*lookup, *hash)) {
                    self.open_lookups.remove(&lookup);
                    self.input(Input::CancelLookup { lookup, hash });
                }
            }
            Step::Fetch(number) => {
                let fetch = FetchId(self.id());
                self.open_fetches.insert(fetch);
                self.input(Input::Fetch {
                    fetch,
                    narinfo: verified(number),
                });
            }
            Step::Answer(is_other_build) => {
                let Some((cache, request, hashes)) = self.question.take() else {
                    return;
                };
                let answer = |hash: StorePathHash| {
                    let number = hash.as_bytes()[0];
                    let text = narinfo(number, &key("builder-1", 2));
                    let other = NarHash::from_bytes([number + 1; 32]);
                    let own = NarHash::from_bytes([number; 32]);
                    let narinfo = match is_other_build {
                        // The signature does not cover it, so this one is not believed.
                        true => text.replace(&own.to_string(), &other.to_string()),
                        false => text,
                    };
                    Answer {
                        hash,
                        narinfo: Some(narinfo),
                    }
                };
                let answers = hashes.into_iter().map(answer).collect();
                self.input(Input::CacheAnswers {
                    cache,
                    request,
                    answers,
                });
            }
            Step::Report(outcome) => {
                let Some((fetch, attempt)) = self.transfer else {
                    return;
                };
                self.input(match outcome {
                    Some(outcome) => Input::TransferEnded {
                        fetch,
                        attempt,
                        outcome,
                    },
                    None => Input::TransferProgress {
                        fetch,
                        attempt,
                        at: 10,
                        held_up: Duration::ZERO,
                    },
                });
                if outcome == Some(Ok(())) {
                    self.open_fetches.remove(&fetch);
                    let mismatch = attempt % 2 == 0;
                    self.input(if mismatch {
                        Input::FetchMismatch { fetch }
                    } else {
                        Input::FetchDone { fetch }
                    });
                    self.transfer = None;
                }
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "virtual time has to start somewhere"
)]
fn start() -> Instant {
    Instant::now()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_the_mind_keeps_its_promises(steps in prop::collection::vec(any_step(), 1..80)) {
        let start = start();
        let run = || {
            let mut hands = Hands::new(start);
            for step in steps.clone() {
                hands.step(step);
            }
            hands.wait(Duration::from_millis(901));
            assert!(hands.open_lookups.is_empty(), "a lookup never ended");
            hands.wait(Duration::from_secs(60));
            assert!(hands.open_fetches.is_empty(), "a fetch that nobody serves never ended");
            hands.trace
        };
        prop_assert_eq!(run(), run(), "the same inputs, the same outputs");
    }
}
