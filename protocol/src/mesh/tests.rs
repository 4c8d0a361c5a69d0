//! Several minds in one process, with a network of fixed latency between them and virtual time.

mod membership;
mod gossip;
mod lookup;
mod caches;
mod fetch;
mod large;
mod revocations;
mod vouchers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::*;
use crate::announcement::{Delta, SetDigest, SignedHead};
use crate::availability::{MemoryIndex, Operation};
use crate::certificate::{SignedCertificate, UnixTime};
use crate::contact::{Contact, SignedContact};
use crate::message::{PROTOCOL_VERSION, Summary, Wish};
use crate::narinfo::{NarInfo, VerifiedNarInfo};
use crate::peer::PeerKey;
use crate::revocation::SignedRevocations;
use crate::signature::{SecretKey, TrustedKeys};
use crate::store_path::StoreDir;

/// More nodes than any test has.
const NODES_MAX: usize = 120;

const LATENCY: Duration = Duration::from_millis(1);
const START: UnixTime = UnixTime(1_700_000_000);

fn mesh_key(name: &str) -> SecretKey {
    SecretKey::from_seed(name.parse().unwrap(), [1; 32])
}

fn builder() -> SecretKey {
    SecretKey::from_seed("builder-1".parse().unwrap(), [2; 32])
}

fn certificate(peer: PeerId, mesh: &SecretKey) -> SignedCertificate {
    Certificate {
        peer,
        name: format!("node-{}", peer.as_public_key()[0]),
        permissions: "share".parse().unwrap(),
        not_before: START,
        not_after: UnixTime(START.0 + 86_400),
        serial: 1,
    }
    .sign(mesh)
    .unwrap()
}

fn hash(number: u8) -> StorePathHash {
    StorePathHash::from_bytes([number; 20])
}

/// A narinfo signed by the builder.
fn narinfo(number: u8) -> String {
    narinfo_of_build(number, number, &[])
}

/// The same for one of several builds of a path, which differ in their NARs.
fn narinfo_of_build(number: u8, build: u8, references: &[u8]) -> String {
    let base_name = |number: u8| format!("{}-hello-{number}", hash(number));
    let nar_hash = crate::hash::NarHash::from_bytes([build; 32]);
    let references: Vec<String> = references.iter().map(|number| base_name(*number)).collect();
    let unsigned = format!(
        "StorePath: /nix/store/{}\nURL: nar/x.nar\nCompression: none\n\
         NarHash: {nar_hash}\nNarSize: 1000\nReferences: {}\n",
        base_name(number),
        references.join(" ")
    );
    let mut narinfo = NarInfo::parse(&unsigned, &StoreDir::default()).unwrap();
    let fingerprint = narinfo.fingerprint(&StoreDir::default());
    narinfo.signatures = vec![builder().sign(fingerprint.as_bytes())];
    narinfo.to_text(&StoreDir::default())
}

struct Node {
    mind: Mesh,
    index: MemoryIndex,
    /// What it serves; a missing entry is HaveNot.
    narinfos: BTreeMap<StorePathHash, String>,
    admitted: BTreeSet<PeerId>,
    outcomes: Vec<(LookupId, LookupOutcome)>,
    transfers: Vec<(FetchId, u32, PeerId, u64)>,
    stopped: Vec<(FetchId, u32)>,
    failed: Vec<FetchId>,
    sent: Vec<(PeerId, &'static str)>,
    is_deaf: bool,
    /// The list of revocations that it was told to keep.
    kept: Option<SignedRevocations>,
}

struct Lan {
    now: Instant,
    nodes: Vec<Node>,
    /// Deliveries by time, then by order.
    mail: BTreeMap<(Instant, u64), (usize, Input)>,
    posted: u64,
    links: BTreeSet<(usize, usize)>,
    /// Nodes that nobody can dial.
    is_gone: BTreeSet<usize>,
    /// Nodes that swallow what is dialled to them.
    is_silent: BTreeSet<usize>,
}

/// The keys of all nodes, so that greater numbers have greater names.
fn keys() -> &'static [PeerKey] {
    static KEYS: OnceLock<Vec<PeerKey>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let mut keys: Vec<PeerKey> = (0..NODES_MAX)
            .map(|number| PeerKey::from_seed([number as u8 + 1; 32]))
            .collect();
        keys.sort_by_key(PeerKey::peer_id);
        keys
    })
}

fn key(number: usize) -> PeerKey {
    keys()[number].clone()
}

fn id(number: usize) -> PeerId {
    keys()[number].peer_id()
}

/// The number of a node, from its name.
fn number_of(peer: PeerId) -> usize {
    let found = keys().binary_search_by_key(&peer, PeerKey::peer_id);
    found.expect("a peer of these tests")
}

fn contact_of(number: usize) -> SignedContact {
    Contact {
        certificate: certificate(id(number), &mesh_key("home")),
        number: 1,
        addresses: vec![address(number)],
        transfer_port: Some(4728),
    }
    .sign(&key(number))
    .unwrap()
}

fn about(number: usize, cursor: Cursor) -> Message {
    Message::About {
        store_dir: StoreDir::default(),
        contact: contact_of(number),
        cursor,
        summary: Summary([0; 32]),
        wish: Wish::Yes,
    }
}

/// What a node signs of changes of its set.
fn delta_of(number: usize, after: Cursor, operations: Vec<Operation>) -> Message {
    let cursor = Cursor {
        sequence: after.sequence + operations.len() as u64,
        ..after
    };
    // Nobody compares the digest of a set that is not told whole.
    let (count, set) = (1, SetDigest([0; 32]));
    Message::Delta(Delta::sign(&key(number), cursor, count, set, operations))
}

/// What a node signs of its set.
fn head_of(number: usize, cursor: Cursor, set: &[HashPrefix]) -> SignedHead {
    SignedHead::of_set(&key(number), cursor, &set.iter().copied().collect())
}

fn address(number: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, number as u8 + 1)), 4727)
}

fn config(number: usize, certificate: SignedCertificate) -> Config {
    Config {
        key: key(number),
        mesh_key: mesh_key("home").public_key(),
        certificate,
        trust: TrustedKeys::from_iter([builder().public_key()]),
        trusts_members: true,
        store_dir: StoreDir::default(),
        transfer_port: Some(4728),
        seeds: 0,
        caches: Vec::new(),
    }
}

impl Lan {
    fn new(count: usize) -> Lan {
        Lan::with(count, |number| certificate(id(number), &mesh_key("home")))
    }

    fn with(count: usize, certificate: impl Fn(usize) -> SignedCertificate) -> Lan {
        let now = Instant::now_for_tests();
        let node = |number: usize| {
            let config = config(number, certificate(number));
            Node {
                mind: Mesh::new(id(number), config, number as u64, now),
                index: MemoryIndex::new(),
                narinfos: BTreeMap::new(),
                admitted: BTreeSet::new(),
                outcomes: Vec::new(),
                transfers: Vec::new(),
                stopped: Vec::new(),
                failed: Vec::new(),
                sent: Vec::new(),
                is_deaf: false,
                kept: None,
            }
        };
        let nodes = (0..count).map(node).collect();
        let mut lan = Lan {
            now,
            nodes,
            mail: BTreeMap::new(),
            posted: 0,
            links: BTreeSet::new(),
            is_gone: BTreeSet::new(),
            is_silent: BTreeSet::new(),
        };
        for number in 0..count {
            lan.input(number, Input::ClockRead { unix: START });
            lan.input(number, Input::LocalPaths { all: vec![] });
        }
        lan
    }

    fn introduce_everyone(&mut self) {
        for one in 0..self.nodes.len() {
            for other in 0..self.nodes.len() {
                if one != other {
                    let (peer, addresses) = (id(other), vec![address(other)]);
                    self.input(one, Input::Discovered { peer, addresses });
                }
            }
        }
        self.run(Duration::from_secs(2));
    }

    /// Lets one node find another.
    fn meet(&mut self, one: usize, other: usize) {
        let (peer, addresses) = (id(other), vec![address(other)]);
        self.input(one, Input::Discovered { peer, addresses });
        self.run(Duration::from_secs(2));
    }

    fn input(&mut self, number: usize, input: Input) {
        let node = &mut self.nodes[number];
        node.mind.handle(&mut node.index, input, self.now);
        while let Some(output) = self.nodes[number].mind.poll() {
            self.obey(number, output);
        }
    }

    fn post(&mut self, to: usize, after: Duration, input: Input) {
        self.mail
            .insert((self.now + after, self.posted), (to, input));
        self.posted += 1;
    }

    fn obey(&mut self, number: usize, output: Output) {
        let to = number_of;
        let me = id(number);
        match output {
            Output::Dial { peer, .. } => {
                let other = to(peer);
                if self.is_gone.contains(&other) || self.is_gone.contains(&number) {
                    return self.post(number, LATENCY, Input::DialFailed { peer });
                }
                if self.is_silent.contains(&other) {
                    return;
                }
                if self.links.insert((number.min(other), number.max(other))) {
                    let link = |peer, address, outbound| Input::LinkUp {
                        peer,
                        address,
                        outbound,
                        seed: None,
                    };
                    self.post(number, LATENCY, link(peer, address(other), true));
                    self.post(other, LATENCY, link(me, address(number), false));
                }
            }
            Output::DialSeed { .. } => unreachable!("no seeds here"),
            Output::Hangup { peer, .. } => self.unlink(number, to(peer)),
            Output::Send { peer, message } => {
                let is_greeting = matches!(message, Message::Knock { .. } | Message::Hello { .. });
                let may_speak = is_greeting || self.nodes[number].admitted.contains(&peer);
                assert!(
                    may_speak,
                    "{} said to a peer that is not admitted",
                    message.kind()
                );
                self.nodes[number].sent.push((peer, message.kind()));
                // What travels is bytes.
                let message = crate::wire::decode(&crate::wire::encode(&message)).unwrap();
                let other = to(peer);
                let is_linked = self.links.contains(&(number.min(other), number.max(other)));
                if is_linked && !self.nodes[other].is_deaf {
                    self.post(other, LATENCY, Input::Received { peer: me, message });
                }
            }
            Output::Admitted { peer, .. } => {
                assert!(self.nodes[number].admitted.insert(peer), "admitted twice");
            }
            Output::KeepRevocations { list } => self.nodes[number].kept = Some(list),
            Output::Departed { peer } => {
                assert!(
                    self.nodes[number].admitted.remove(&peer),
                    "departed without being there"
                );
            }
            Output::ReadLocal {
                peer,
                request,
                hashes,
            } => {
                let narinfos = &self.nodes[number].narinfos;
                let answer = |hash: StorePathHash| Answer {
                    hash,
                    narinfo: narinfos.get(&hash).cloned(),
                };
                let answers = hashes.into_iter().map(answer).collect();
                self.post(
                    number,
                    LATENCY,
                    Input::LocalAnswers {
                        peer,
                        request,
                        answers,
                    },
                );
            }
            Output::LookupDone { lookup, outcome } => {
                self.nodes[number].outcomes.push((lookup, outcome));
            }
            Output::AskCache { .. } => unreachable!("no caches here"),
            Output::Transfer {
                fetch,
                attempt,
                source,
                from,
            } => {
                let Source::Peer { peer, .. } = source else {
                    unreachable!("no caches here")
                };
                self.nodes[number]
                    .transfers
                    .push((fetch, attempt, peer, from));
            }
            Output::StopTransfer { fetch, attempt } => {
                self.nodes[number].stopped.push((fetch, attempt));
            }
            Output::FetchFailed { fetch } => self.nodes[number].failed.push(fetch),
        }
    }

    fn unlink(&mut self, one: usize, other: usize) {
        self.links.remove(&(one.min(other), one.max(other)));
        self.post(one, LATENCY, Input::LinkDown { peer: id(other) });
        self.post(other, LATENCY, Input::LinkDown { peer: id(one) });
    }

    /// Lets virtual time pass, delivering mail and ticking every mind at its deadline.
    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            let mail = self.mail.first_key_value().map(|((at, _), _)| *at);
            let ticks = self
                .nodes
                .iter()
                .filter_map(|node| node.mind.deadline().map(|(at, _)| at));
            let Some(next) = mail.into_iter().chain(ticks).min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if mail.is_some_and(|at| at <= self.now) {
                let (_, (to, input)) = self.mail.pop_first().unwrap();
                self.input(to, input);
            } else {
                for number in 0..self.nodes.len() {
                    let due = self.nodes[number]
                        .mind
                        .deadline()
                        .is_some_and(|(at, _)| at <= self.now);
                    if due {
                        self.input(number, Input::Tick);
                        let after = self.nodes[number].mind.deadline();
                        assert!(
                            after.is_none_or(|(at, _)| at > self.now),
                            "a tick left {after:?} due"
                        );
                    }
                }
            }
        }
        self.now = end;
    }

    fn share(&mut self, number: usize, paths: &[u8]) {
        for path in paths {
            self.nodes[number]
                .narinfos
                .insert(hash(*path), narinfo(*path));
        }
        let added = paths.iter().map(|path| hash(*path)).collect();
        self.input(
            number,
            Input::LocalChanged {
                added,
                removed: vec![],
            },
        );
    }

    fn look_up(&mut self, number: usize, path: u8) -> LookupOutcome {
        let lookup = LookupId(u64::from(path) + 1000 * self.nodes[number].outcomes.len() as u64);
        self.input(
            number,
            Input::Lookup {
                lookup,
                hash: hash(path),
            },
        );
        self.run(Duration::from_secs(1));
        let (done, outcome) = self.nodes[number]
            .outcomes
            .last()
            .expect("the lookup ended")
            .clone();
        assert_eq!(done, lookup);
        outcome
    }

    fn is_found(&mut self, number: usize, path: u8) -> bool {
        matches!(self.look_up(number, path), LookupOutcome::Found { .. })
    }

    /// The holders of a path in the order in which `number` would ask them.
    fn asked_in_order(&self, number: usize, path: u8) -> Vec<usize> {
        let node = &self.nodes[number];
        let providers = node.mind.providers(&node.index, &hash(path), self.now);
        let number = |peer: &PeerId| number_of(*peer);
        providers.iter().map(number).collect()
    }

    fn knows(&self, number: usize, holder: usize, path: u8) -> bool {
        self.nodes[number]
            .index
            .providers(HashPrefix::from(&hash(path)))
            .contains(&id(holder))
    }

    fn refusals(&self, number: usize) -> Vec<(Refusal, u64)> {
        self.nodes[number].mind.refusals().collect()
    }
}

/// The one place in this crate that reads a clock: virtual time has to start somewhere.
trait NowForTests {
    fn now_for_tests() -> Instant;
}

impl NowForTests for Instant {
    #[allow(clippy::disallowed_methods)]
    fn now_for_tests() -> Instant {
        Instant::now()
    }
}

/// One mind without a network around it: what it wants is looked at instead of done.
struct Alone {
    mind: Mesh,
    index: MemoryIndex,
    now: Instant,
}

impl Alone {
    fn new(seeds: usize) -> Alone {
        Alone::with(seeds, 1, &[])
    }

    fn with(seeds: usize, seed: u64, caches: &[CacheRole]) -> Alone {
        let now = Instant::now_for_tests();
        let config = Config {
            key: key(0),
            mesh_key: mesh_key("home").public_key(),
            certificate: certificate(id(0), &mesh_key("home")),
            trust: TrustedKeys::from_iter([builder().public_key()]),
            trusts_members: true,
            store_dir: StoreDir::default(),
            transfer_port: Some(4728),
            seeds,
            caches: caches.to_vec(),
        };
        let mut alone = Alone {
            mind: Mesh::new(id(0), config, seed, now),
            index: MemoryIndex::new(),
            now,
        };
        alone.input(Input::ClockRead { unix: START });
        alone
    }

    fn input(&mut self, input: Input) -> Vec<Output> {
        self.mind.handle(&mut self.index, input, self.now);
        std::iter::from_fn(|| self.mind.poll()).collect()
    }

    fn receive(&mut self, number: usize, message: Message) -> Vec<Output> {
        let peer = id(number);
        self.input(Input::Received { peer, message })
    }

    fn link(&mut self, number: usize, seed: Option<usize>) -> Vec<Output> {
        self.link_at(number, address(number), seed)
    }

    fn link_at(&mut self, number: usize, at: SocketAddr, seed: Option<usize>) -> Vec<Output> {
        self.input(Input::LinkUp {
            peer: id(number),
            address: at,
            outbound: seed.is_some(),
            seed,
        })
    }

    /// Links a member that offers transfers and holds `shares`.
    fn admit(&mut self, number: usize, shares: Vec<HashPrefix>) {
        self.admit_at(number, address(number), shares);
    }

    fn admit_at(&mut self, number: usize, at: SocketAddr, shares: Vec<HashPrefix>) {
        self.link_at(number, at, None);
        let head = Cursor {
            epoch: 1,
            sequence: 1,
        };
        self.receive(number, hello(number, "home"));
        self.receive(number, about(number, head));
        let snapshot = Message::Snapshot {
            head: head_of(number, head, &shares),
            after: None,
            prefixes: shares,
            is_last: true,
        };
        self.receive(number, snapshot);
    }

    /// Everything the mind wants while time passes.
    fn wait(&mut self, duration: Duration) -> Vec<Output> {
        let end = self.now + duration;
        let mut outputs = Vec::new();
        while let Some((at, _)) = self.mind.deadline().filter(|(at, _)| *at <= end) {
            self.now = at;
            outputs.extend(self.input(Input::Tick));
        }
        self.now = end;
        outputs
    }

    /// Begins a lookup; returns what it leads to until its question is on its way.
    fn look_up(&mut self, path: u8) -> Vec<Output> {
        let (lookup, hash) = (LookupId(path.into()), hash(path));
        let mut outputs = self.input(Input::Lookup { lookup, hash });
        outputs.extend(self.wait(Duration::from_millis(2)));
        outputs
    }

    /// A peer answers one hash of a request.
    fn peer_says(
        &mut self,
        number: usize,
        request: u64,
        path: u8,
        narinfo: Option<String>,
    ) -> Vec<Output> {
        let answers = vec![Answer {
            hash: hash(path),
            narinfo,
        }];
        self.receive(number, Message::Answers { request, answers })
    }

    /// A cache answers one hash of a request.
    fn cache_says(
        &mut self,
        cache: usize,
        request: u64,
        path: u8,
        narinfo: Option<String>,
    ) -> Vec<Output> {
        let answers = vec![Answer {
            hash: hash(path),
            narinfo,
        }];
        self.input(Input::CacheAnswers {
            cache,
            request,
            answers,
        })
    }

    fn view(&self, number: usize) -> Option<PeerView> {
        let views = self.mind.peers(&self.index, self.now);
        views.into_iter().find(|view| view.peer == id(number))
    }
}

fn hello(number: usize, mesh: &str) -> Message {
    Message::Hello {
        version: PROTOCOL_VERSION,
        certificate: certificate(id(number), &mesh_key(mesh)),
    }
}

/// The prefixes of paths, for an announcement.
fn prefixes(paths: impl IntoIterator<Item = u8>) -> Vec<HashPrefix> {
    let mut prefixes: Vec<HashPrefix> = paths
        .into_iter()
        .map(|path| HashPrefix::from(&hash(path)))
        .collect();
    prefixes.sort();
    prefixes
}

/// Which caches were asked: number, request, hashes.
fn asked_caches(outputs: &[Output]) -> Vec<(usize, u64, Vec<StorePathHash>)> {
    let asked = |output: &Output| match output {
        Output::AskCache {
            cache,
            request,
            hashes,
        } => Some((*cache, *request, hashes.clone())),
        _ => None,
    };
    outputs.iter().filter_map(asked).collect()
}

/// Which peers were asked: number, request, hashes.
fn asked_peers(outputs: &[Output]) -> Vec<(usize, u64, Vec<StorePathHash>)> {
    let asked = |output: &Output| match output {
        Output::Send {
            peer,
            message: Message::Lookup { request, hashes },
        } => {
            let number = number_of(*peer);
            Some((number, *request, hashes.clone()))
        }
        _ => None,
    };
    outputs.iter().filter_map(asked).collect()
}

/// How lookups ended: the build that was found, or nothing.
fn ended(outputs: &[Output]) -> Vec<(u64, Option<u8>)> {
    let ended = |output: &Output| match output {
        Output::LookupDone { lookup, outcome } => {
            let build = match outcome {
                LookupOutcome::Found { narinfo, .. } => {
                    Some(narinfo.narinfo().nar_hash.as_bytes()[0])
                }
                LookupOutcome::NotFound => None,
            };
            Some((lookup.0, build))
        }
        _ => None,
    };
    outputs.iter().filter_map(ended).collect()
}

fn dials(outputs: &[Output]) -> usize {
    let is_dial =
        |output: &&Output| matches!(output, Output::Dial { .. } | Output::DialSeed { .. });
    outputs.iter().filter(is_dial).count()
}
