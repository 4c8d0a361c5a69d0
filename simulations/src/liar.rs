//! Liar: a member with a valid certificate that keeps every form and no promise.
//!
//! It announces paths it does not hold, answers lookups with narinfos that are malformed, of another path
//! or signed by nobody, serves wrong bytes, passes on records of others that it changed or that are
//! old, floods whoever it is linked to, and now and then sends bytes that are no message. It speaks [`Message`]s itself, since a mind would not let it lie.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;

use granary_protocol::announcement::{Delta, SetDigest, SignedHead};
use granary_protocol::availability::{Cursor, HashPrefix, Operation};
use granary_protocol::certificate::SignedCertificate;
use granary_protocol::contact::{Contact, SignedContact};
use granary_protocol::mesh::{Input, Output};
use granary_protocol::message::{Answer, Message, PROTOCOL_VERSION, Summary, Wish, WriterCursor};
use granary_protocol::peer::{PeerId, PeerKey};
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::StorePathHash;

use crate::chance::Chance;
use crate::content::{Content, PathId};
use crate::machine::{START, TRANSFER_PORT};

/// Paths in one false announcement.
const FALSE_PATHS: usize = 64;

/// Messages of one flood.
const FLOOD: usize = 50;

/// What a liar does.
pub enum Act {
    Output(Output),
    /// Sends bytes as they are.
    Raw(PeerId, Vec<u8>),
}

/// Records of others that it keeps, to pass them on changed or late.
const HEARD_MAX: usize = 64;

pub struct Liar {
    certificate: SignedCertificate,
    key: PeerKey,
    contact: SignedContact,
    /// Signs narinfos that nobody trusts.
    stranger: SecretKey,
    heard: VecDeque<Delta>,
    /// What it says it holds, and how often it changed that.
    claimed: BTreeSet<HashPrefix>,
    sequence: u64,
    greeted: BTreeSet<PeerId>,
    linked: BTreeSet<PeerId>,
    /// Lies are told until the faults end; afterwards it only keeps the form.
    pub is_tired: bool,
}

impl Liar {
    pub fn new(certificate: SignedCertificate, key: PeerKey, address: SocketAddr) -> Liar {
        let contact = Contact {
            certificate: certificate.clone(),
            number: START.0,
            addresses: vec![address],
            transfer_port: Some(TRANSFER_PORT),
        };
        let contact = contact.sign(&key).expect("an ordinary contact");
        let name = "stranger-1".parse().expect("a key name");
        Liar {
            certificate,
            key,
            contact,
            stranger: SecretKey::from_seed(name, [9; 32]),
            heard: VecDeque::new(),
            claimed: BTreeSet::new(),
            sequence: 0,
            greeted: BTreeSet::new(),
            linked: BTreeSet::new(),
            is_tired: false,
        }
    }

    /// Reacts to what happens to it.
    pub fn hear(&mut self, input: Input, content: &mut Content, chance: &mut Chance) -> Vec<Act> {
        let mut acts = Vec::new();
        match input {
            Input::Discovered { peer, addresses } if !self.linked.contains(&peer) => {
                acts.push(Act::Output(Output::Dial { peer, addresses }));
            }
            Input::LinkUp { peer, outbound, .. } => {
                self.greeted.remove(&peer);
                if outbound {
                    self.greet(peer, &mut acts);
                }
            }
            Input::LinkDown { peer } => {
                self.greeted.remove(&peer);
                self.linked.remove(&peer);
            }
            Input::Received { peer, message } => {
                self.reply(peer, message, content, chance, &mut acts)
            }
            _ => {}
        }
        acts
    }

    /// Lies to everyone it is linked to; called now and then.
    pub fn stir(
        &mut self,
        wanted: &[PathId],
        content: &mut Content,
        chance: &mut Chance,
    ) -> Vec<Act> {
        let mut acts = Vec::new();
        if self.is_tired {
            return acts;
        }
        let operation = |_| {
            let path = chance.pick(wanted).map(|path| content.prefix(path));
            Operation::Add(path.unwrap_or(HashPrefix(chance.number())))
        };
        let mut operations: Vec<Operation> = (0..FALSE_PATHS).map(operation).collect();
        operations.retain(|operation| self.claimed.insert(operation.prefix()));
        self.sequence += operations.len() as u64;
        let linked: Vec<PeerId> = self.linked.iter().copied().collect();
        let delta = self.delta(self.cursor(), operations);
        for peer in &linked {
            say(*peer, Message::Delta(delta.clone()), &mut acts);
        }
        let Some(victim) = chance.pick(&linked) else {
            return acts;
        };
        match chance.below(7) {
            // Numbers that cannot follow, truly signed.
            0 => {
                let cursor = Cursor {
                    epoch: u64::MAX,
                    sequence: u64::MAX,
                };
                let operations = vec![Operation::Remove(HashPrefix(chance.number()))];
                let delta = self.delta(cursor, operations);
                say(victim, Message::Delta(delta), &mut acts);
            }
            // Somebody else's word, changed.
            4 => {
                if let Some(heard) = chance.pick(&(0..self.heard.len()).collect::<Vec<_>>()) {
                    let delta = &self.heard[heard];
                    let mut operations = delta.operations().to_vec();
                    operations.push(Operation::Remove(HashPrefix(chance.number())));
                    let changed = Delta::from_parts(delta.head().clone(), operations);
                    say(victim, Message::Delta(changed), &mut acts);
                }
            }
            // Somebody else's word of long ago, and news of a log that nobody wrote.
            5 => {
                if let Some(delta) = self.heard.front() {
                    say(victim, Message::Delta(delta.clone()), &mut acts);
                }
                let writer = chance.pick(&linked).unwrap_or(victim);
                let cursor = Cursor {
                    epoch: u64::MAX,
                    sequence: chance.number(),
                };
                let cursors = vec![WriterCursor {
                    writer,
                    contact: u64::MAX,
                    cursor: Some(cursor),
                }];
                let is_complete = chance.happens(500);
                let cursors = Message::Cursors {
                    cursors,
                    is_complete,
                };
                say(victim, cursors, &mut acts);
            }
            // Questions without end.
            1 => {
                for request in 0..FLOOD as u64 {
                    let hashes = (0..256).map(|_| random_hash(chance)).collect();
                    say(victim, Message::Lookup { request, hashes }, &mut acts);
                }
            }
            // Answers to nothing.
            2 => {
                for request in 0..FLOOD as u64 {
                    let answers = vec![Answer {
                        hash: random_hash(chance),
                        narinfo: None,
                    }];
                    say(victim, Message::Answers { request, answers }, &mut acts);
                }
            }
            // Pulls the whole set again and again.
            3 => {
                for _ in 0..FLOOD {
                    let pull = Message::Pull {
                        writer: victim,
                        contact: 0,
                        after: None,
                    };
                    say(victim, pull, &mut acts);
                }
            }
            // No message at all.
            _ => {
                let length = 1 + chance.below(200);
                let bytes = (0..length).map(|_| chance.number() as u8).collect();
                acts.push(Act::Raw(victim, bytes));
            }
        }
        acts
    }

    fn reply(
        &mut self,
        peer: PeerId,
        message: Message,
        content: &mut Content,
        chance: &mut Chance,
        acts: &mut Vec<Act>,
    ) {
        match message {
            Message::Knock { .. } => self.greet(peer, acts),
            Message::Hello { .. } => {
                self.greet(peer, acts);
                self.linked.insert(peer);
                let about = Message::About {
                    store_dir: content.dir().clone(),
                    contact: self.contact.clone(),
                    cursor: self.cursor(),
                    summary: Summary([0; 32]),
                    wish: Wish::Yes,
                };
                say(peer, about, acts);
            }
            Message::Pull { writer, .. } if writer == self.key.peer_id() => {
                say(peer, Message::Contact(self.contact.clone()), acts);
                let snapshot = Message::Snapshot {
                    head: SignedHead::of_set(&self.key, self.cursor(), &self.claimed),
                    after: None,
                    prefixes: self.claimed.iter().copied().collect(),
                    is_last: true,
                };
                say(peer, snapshot, acts);
            }
            Message::Delta(delta) => {
                self.heard.push_back(delta);
                if self.heard.len() > HEARD_MAX {
                    self.heard.pop_front();
                }
            }
            Message::Lookup { request, hashes } => {
                let answers = hashes
                    .into_iter()
                    .map(|hash| self.lie(hash, content, chance))
                    .collect();
                say(peer, Message::Answers { request, answers }, acts);
            }
            _ => {}
        }
    }

    fn lie(&self, hash: StorePathHash, content: &mut Content, chance: &mut Chance) -> Answer {
        let Some(path) = content.find(&hash) else {
            return Answer {
                hash,
                narinfo: None,
            };
        };
        let narinfo = match chance.below(6) {
            0 => None,
            1 => Some("StorePath: nonsense\n".to_owned()),
            2 => Some(content.narinfo_signed(path, &self.stranger)),
            // True words about another path.
            3 => Some(
                content
                    .narinfo(PathId(path.0.saturating_sub(1)))
                    .to_string(),
            ),
            // A true signature over something else.
            4 => Some(content.narinfo(path).replace("NarSize: ", "NarSize: 1")),
            // The truth, so that the wrong bytes are asked for.
            _ => Some(content.narinfo(path).to_string()),
        };
        Answer { hash, narinfo }
    }

    fn greet(&mut self, peer: PeerId, acts: &mut Vec<Act>) {
        if self.greeted.insert(peer) {
            let certificate = self.certificate.clone();
            say(
                peer,
                Message::Hello {
                    version: PROTOCOL_VERSION,
                    certificate,
                },
                acts,
            );
        }
    }

    /// Signs operations that lead to `cursor`.
    fn delta(&self, cursor: Cursor, operations: Vec<Operation>) -> Delta {
        let count = self.claimed.len() as u64;
        let set = SetDigest::of(&self.claimed);
        Delta::sign(&self.key, cursor, count, set, operations)
    }

    fn cursor(&self) -> Cursor {
        Cursor {
            epoch: START.0 << 20,
            sequence: self.sequence,
        }
    }
}

fn say(peer: PeerId, message: Message, acts: &mut Vec<Act>) {
    acts.push(Act::Output(Output::Send { peer, message }));
}

fn random_hash(chance: &mut Chance) -> StorePathHash {
    let mut bytes = [0u8; 20];
    bytes
        .iter_mut()
        .for_each(|byte| *byte = chance.number() as u8);
    StorePathHash::from_bytes(bytes)
}
