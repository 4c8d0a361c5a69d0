//! Network: who can reach whom, how long a frame takes, and how links come and go.
//!
//! A link is an ordered, reliable stream, as libp2p over TCP gives it: a lost packet is a delay, and what
//! really vanishes are the frames of a link that dies. A link that is cut without a word (sleep,
//! partition) stands until pings fail; a frame sent meanwhile arrives late if the network heals first. On
//! request frames are dropped, doubled and reordered as well, to see that the mind needs no more than
//! it says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use granary_protocol::mesh::Input;
use granary_protocol::message::Message;
use granary_protocol::peer::PeerId;
use sha2::{Digest, Sha256};

use crate::world::{Event, World};

/// Ping interval and timeout of the swarm: a silent link is given up after 10 to 25 s.
const PING_FAILS: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(25)];

/// A dial into nothing is given up then (`HANDSHAKE_DEADLINE` of the swarm).
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a leader keeps an old link when a new connection appears (`REDUNDANT_GRACE` of links).
const REDUNDANT_GRACE: Duration = Duration::from_secs(2);

/// After a cut heals, TCP waits for its retransmission timer.
const RESENT: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];

/// A lost packet costs a retransmission timeout.
const RETRANSMISSION: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(200)];

/// Frames that wait on a link before its owner hangs up (`OUTGOING_FRAMES_MAX` of links).
const FRAMES_WAITING_MAX: usize = 4096;

/// Round trips of a new link: TCP, Noise, yamux and the substream.
const HANDSHAKE_ROUND_TRIPS: u32 = 4;

/// What travels on the control plane.
pub struct Frame {
    /// `None` for bytes that are no message.
    pub message: Option<Message>,
    pub kind: &'static str,
    /// With the four of its length.
    pub bytes: u64,
    pub digest: u64,
}

impl Frame {
    pub fn new(message: Option<Message>, body: &[u8]) -> Rc<Frame> {
        let digest = Sha256::digest(body);
        let mut first = [0u8; 8];
        first.copy_from_slice(&digest[..8]);
        Rc::new(Frame {
            kind: message.as_ref().map_or("garbage", Message::kind),
            message,
            bytes: 4 + body.len() as u64,
            digest: u64::from_be_bytes(first),
        })
    }
}

/// One machine's place in the network.
pub struct Host {
    pub subnet: usize,
    pub address: SocketAddr,
    pub bits_per_s: u64,
    pub resend_permille: u32,
    /// Accepts no connections from outside.
    pub is_walled: bool,
    /// Machines of one island reach each other.
    pub island: usize,
    /// The interface is busy sending until then.
    free_at: Duration,
}

/// A pair of machines, the lesser first.
pub type Pair = (usize, usize);

pub struct Link {
    pub generation: u64,
    /// Whether each end takes the link for standing; the end of the lesser machine first.
    pub is_up: [bool; 2],
    /// When the last frame of each direction (by sender) arrives, so that none overtakes it.
    arrives: [Duration; 2],
    /// Sent while the ends could not reach each other, by sender.
    waiting: Vec<(usize, Rc<Frame>)>,
    pub cut_since: Option<Duration>,
    /// An end has another address: nothing arrives on it any more.
    is_dead: bool,
}

#[derive(Default)]
pub struct Network {
    pub hosts: Vec<Host>,
    pub by_address: BTreeMap<SocketAddr, usize>,
    pub links: BTreeMap<Pair, Link>,
    /// Places taken in each subnet.
    places: BTreeMap<usize, usize>,
    next_generation: u64,
    /// Whether frames are dropped, doubled and reordered.
    pub is_stressed: bool,
}

pub fn pair(one: usize, other: usize) -> Pair {
    (one.min(other), one.max(other))
}

/// Which end of a pair a machine is.
pub fn end_of(pair: Pair, machine: usize) -> usize {
    usize::from(pair.1 == machine)
}

fn machine_at(pair: Pair, end: usize) -> usize {
    if end == 0 { pair.0 } else { pair.1 }
}

impl Network {
    pub fn add(&mut self, subnet: usize, bits_per_s: u64, resend_permille: u32, is_walled: bool) {
        let number = self.hosts.len();
        let address = self.new_address(subnet);
        self.hosts.push(Host {
            subnet,
            address,
            bits_per_s,
            resend_permille,
            is_walled,
            island: 0,
            free_at: Duration::ZERO,
        });
        self.by_address.insert(address, number);
    }

    /// Gives a machine another address in another place of its subnet.
    pub fn move_away(&mut self, machine: usize) {
        let address = self.new_address(self.hosts[machine].subnet);
        let old = std::mem::replace(&mut self.hosts[machine].address, address);
        self.by_address.remove(&old);
        self.by_address.insert(address, machine);
    }

    fn new_address(&mut self, subnet: usize) -> SocketAddr {
        let place = self.places.entry(subnet).or_default();
        *place += 1;
        crate::machine::address(subnet, *place - 1)
    }
}

impl World {
    /// Packets go both ways: on a link that stands, nobody asks about walls.
    pub fn can_talk(&self, one: usize, other: usize) -> bool {
        self.network.hosts[one].island == self.network.hosts[other].island
            && !self.machines[one].is_asleep
            && !self.machines[other].is_asleep
    }

    /// Packets of a link arrive.
    fn carries(&self, key: Pair) -> bool {
        let is_dead = self
            .network
            .links
            .get(&key)
            .is_some_and(|link| link.is_dead);
        !is_dead && self.can_talk(key.0, key.1)
    }

    /// A connection can be opened.
    pub fn can_connect(&self, from: usize, to: usize) -> bool {
        self.can_talk(from, to) && !self.network.hosts[to].is_walled
    }

    /// One way, once.
    pub fn latency(&mut self, one: usize, other: usize) -> Duration {
        let network = &self.scenario.network;
        let mut micros = self.noise.between(network.latency_us);
        if self.network.hosts[one].subnet != self.network.hosts[other].subnet {
            micros += self.noise.between(network.routed_us);
        }
        let resend = [one, other].map(|machine| self.network.hosts[machine].resend_permille);
        let mut latency = Duration::from_micros(micros);
        if self.noise.happens(resend[0].max(resend[1])) {
            latency += self.noise.duration(RETRANSMISSION[0], RETRANSMISSION[1]);
        }
        latency
    }

    /// Begins a dial; its outcome follows as [`Event::Dialled`].
    pub fn dial(
        &mut self,
        from: usize,
        peer: Option<PeerId>,
        to: &[SocketAddr],
        seed: Option<usize>,
    ) {
        let wanted = peer.and_then(|peer| self.number_of(&peer));
        let found: BTreeSet<usize> = to
            .iter()
            .filter_map(|address| self.network.by_address.get(address).copied())
            .collect();
        let target = match wanted {
            Some(wanted) => found.contains(&wanted).then_some(wanted),
            None if peer.is_some() => None,
            None => found.first().copied(),
        };
        let is_linked = target.is_some_and(|target| self.is_up_at(from, target));
        let delay = match target {
            Some(_) if is_linked => Duration::from_micros(100),
            Some(target) if self.can_connect(from, target) => {
                2 * HANDSHAKE_ROUND_TRIPS * self.latency(from, target)
            }
            // Somebody else lives there by now, and says so.
            None if found.iter().any(|other| self.can_connect(from, *other)) => {
                Duration::from_millis(5)
            }
            _ => DIAL_TIMEOUT,
        };
        let event = Event::Dialled {
            from,
            incarnation: self.machines[from].incarnation,
            peer,
            target,
            seed,
        };
        self.post(delay, event);
    }

    pub fn dialled(
        &mut self,
        from: usize,
        peer: Option<PeerId>,
        target: Option<usize>,
        seed: Option<usize>,
    ) {
        let reached = target
            .filter(|target| self.can_connect(from, *target) && self.machines[*target].is_up());
        let Some(to) = reached else {
            return self.dial_failed(from, peer, seed);
        };
        let key = pair(from, to);
        let (here, there) = (end_of(key, from), end_of(key, to));
        let ends = self.network.links.get(&key).map(|link| link.is_up);
        match ends {
            // The connection is one too many.
            Some(is_up) if is_up[here] => {
                if let Some(seed) = seed {
                    let peer = self.machines[to].peer;
                    self.think(from, Input::SeedFound { seed, peer });
                }
                self.dial_failed(from, peer, None);
            }
            Some(is_up) if is_up[there] => {
                self.post(REDUNDANT_GRACE, Event::Relinked { from, to, seed });
            }
            _ => self.link(from, to, seed),
        }
    }

    /// The other end gave its old link up for the new connection.
    pub fn relinked(&mut self, from: usize, to: usize, seed: Option<usize>) {
        let key = pair(from, to);
        let peer = self.machines[to].peer;
        let is_up_here = self.is_up_at(from, to);
        if is_up_here
            || !self.can_talk(from, to)
            || !self.machines[from].is_up()
            || !self.machines[to].is_up()
        {
            if !is_up_here && self.machines[from].is_up() {
                self.dial_failed(from, Some(peer), seed);
            }
            return;
        }
        if self
            .network
            .links
            .remove(&key)
            .is_some_and(|link| link.is_up[end_of(key, to)])
        {
            let peer = self.machines[from].peer;
            self.think(to, Input::LinkDown { peer });
        }
        self.link(from, to, seed);
    }

    fn dial_failed(&mut self, from: usize, peer: Option<PeerId>, seed: Option<usize>) {
        if let Some(seed) = seed {
            self.think(from, Input::SeedFailed { seed });
        }
        if let Some(peer) = peer {
            self.think(from, Input::DialFailed { peer });
        }
    }

    fn link(&mut self, from: usize, to: usize, seed: Option<usize>) {
        let key = pair(from, to);
        self.network.next_generation += 1;
        let generation = self.network.next_generation;
        let known_there = self.now + self.latency(from, to);
        let mut arrives = [self.now; 2];
        arrives[end_of(key, from)] = known_there;
        self.network.links.insert(
            key,
            Link {
                generation,
                is_up: [true, true],
                arrives,
                waiting: Vec::new(),
                cut_since: None,
                is_dead: false,
            },
        );
        let accepted = Event::Accepted {
            from,
            to,
            generation,
        };
        self.post(known_there - self.now, accepted);
        let (peer, address) = (self.machines[to].peer, self.network.hosts[to].address);
        self.think(
            from,
            Input::LinkUp {
                peer,
                address,
                outbound: true,
                seed,
            },
        );
    }

    /// The other side of a dial sees the link too.
    pub fn accepted(&mut self, from: usize, to: usize, generation: u64) {
        let key = pair(from, to);
        let link = self.network.links.get(&key);
        if !link.is_some_and(|link| link.generation == generation && link.is_up[end_of(key, to)]) {
            return;
        }
        // An inbound connection comes from a port of no use.
        let address = SocketAddr::new(self.network.hosts[from].address.ip(), 50_000);
        let peer = self.machines[from].peer;
        self.think(
            to,
            Input::LinkUp {
                peer,
                address,
                outbound: false,
                seed: None,
            },
        );
    }

    /// Whether `machine` takes its link to `other` for standing.
    pub fn is_up_at(&self, machine: usize, other: usize) -> bool {
        let key = pair(machine, other);
        let link = self.network.links.get(&key);
        link.is_some_and(|link| link.is_up[end_of(key, machine)])
    }

    pub fn send(&mut self, from: usize, to: usize, frame: Rc<Frame>) {
        let key = pair(from, to);
        let end = end_of(key, from);
        self.report.sent(from, &frame);
        let can_talk = self.carries(key);
        let Some(link) = self.network.links.get_mut(&key) else {
            return;
        };
        if !link.is_up[end] {
            return;
        }
        if !can_talk {
            link.waiting.push((end, frame));
            if link.waiting.len() > FRAMES_WAITING_MAX {
                self.hangup(from, to);
            }
            return;
        }
        let is_stressed = self.network.is_stressed;
        let [drop, double, overtake] = [
            self.scenario.network.drop_permille,
            self.scenario.network.duplicate_permille,
            self.scenario.network.reorder_permille,
        ];
        if is_stressed && self.noise.happens(drop) {
            self.trace
                .record(self.now, from, format_args!("dropped {to} {}", frame.kind));
            return;
        }
        let overtakes = is_stressed && self.noise.happens(overtake);
        self.put_on_wire(key, end, frame.clone(), overtakes);
        if is_stressed && self.noise.happens(double) {
            self.put_on_wire(key, end, frame, true);
        }
    }

    fn put_on_wire(&mut self, key: Pair, end: usize, frame: Rc<Frame>, overtakes: bool) {
        let (from, to) = (machine_at(key, end), machine_at(key, 1 - end));
        let latency = self.latency(from, to);
        let host = &mut self.network.hosts[from];
        let on_wire = Duration::from_nanos(frame.bytes * 8_000_000_000 / host.bits_per_s);
        host.free_at = host.free_at.max(self.now) + on_wire;
        let mut arrival = host.free_at + latency;
        let Some(link) = self.network.links.get_mut(&key) else {
            return;
        };
        let generation = link.generation;
        if overtakes {
            arrival += self
                .noise
                .duration(Duration::ZERO, Duration::from_millis(20));
        } else {
            arrival = arrival.max(link.arrives[end]);
            link.arrives[end] = arrival;
        }
        let event = Event::Frame {
            from,
            to,
            generation,
            frame,
        };
        self.post(arrival - self.now, event);
    }

    /// A frame reaches the other end, if that still stands.
    pub fn arrived(&mut self, from: usize, to: usize, generation: u64, frame: Rc<Frame>) {
        let key = pair(from, to);
        let can_talk = self.carries(key);
        let Some(link) = self.network.links.get_mut(&key) else {
            return;
        };
        if link.generation != generation || !link.is_up[end_of(key, to)] {
            return;
        }
        if !can_talk {
            link.waiting.push((end_of(key, from), frame));
            return;
        }
        let peer = self.machines[from].peer;
        self.report.received(to, &frame);
        self.trace.record(
            self.now,
            to,
            format_args!(
                "frame {from} {} {} {:016x}",
                frame.kind, frame.bytes, frame.digest
            ),
        );
        match &frame.message {
            Some(message) => {
                self.noted(to, from, message);
                let message = message.clone();
                self.think(to, Input::Received { peer, message });
            }
            None => self.think(to, Input::Garbage { peer }),
        }
    }

    /// One end closes the link in order; both learn of it.
    pub fn hangup(&mut self, machine: usize, other: usize) {
        let key = pair(machine, other);
        let end = end_of(key, machine);
        let Some(link) = self.network.links.get(&key) else {
            return;
        };
        if link.is_up[end] {
            let generation = link.generation;
            self.post(
                Duration::from_micros(50),
                Event::LinkEnds {
                    key,
                    generation,
                    end,
                },
            );
        }
        self.end_spreads(key, end);
    }

    /// The link is gone at one end; the other learns of it as soon as packets reach it.
    pub fn end_spreads(&mut self, key: Pair, end: usize) {
        let (from, to) = (machine_at(key, end), machine_at(key, 1 - end));
        let can_talk = self.carries(key);
        let latency = self.latency(from, to);
        let Some(link) = self.network.links.get(&key) else {
            return;
        };
        if can_talk && link.is_up[1 - end] {
            let event = Event::LinkEnds {
                key,
                generation: link.generation,
                end: 1 - end,
            };
            // What was sent before the end arrives before it.
            let after = link.arrives[end].max(self.now) - self.now;
            self.post(after.max(latency), event);
        }
    }

    /// An end of a link learns that it is over.
    pub fn link_ends(&mut self, key: Pair, generation: u64, end: usize) {
        let machine = machine_at(key, end);
        let Some(link) = self.network.links.get_mut(&key) else {
            return;
        };
        if link.generation != generation || !link.is_up[end] {
            return;
        }
        link.is_up[end] = false;
        let is_over = !link.is_up[1 - end];
        if is_over {
            self.network.links.remove(&key);
        } else {
            self.end_spreads(key, end);
        }
        let peer = self.machines[machine_at(key, 1 - end)].peer;
        self.think(machine, Input::LinkDown { peer });
    }

    /// A machine's process is gone, its kernel says so.
    pub fn process_ends(&mut self, machine: usize) {
        for key in self.links_of(machine) {
            let end = end_of(key, machine);
            if let Some(link) = self.network.links.get_mut(&key) {
                link.is_up[end] = false;
                if link.is_up[1 - end] {
                    self.end_spreads(key, end);
                } else {
                    self.network.links.remove(&key);
                }
            }
        }
    }

    pub fn links_of(&self, machine: usize) -> Vec<Pair> {
        let links = self.network.links.keys();
        links
            .filter(|(one, other)| *one == machine || *other == machine)
            .copied()
            .collect()
    }

    /// Somebody fell asleep, woke, left or came back: links are cut or heal.
    pub fn reachability_changed(&mut self) {
        let keys: Vec<Pair> = self.network.links.keys().copied().collect();
        for key in keys {
            let can_talk = self.carries(key);
            let Some(link) = self.network.links.get_mut(&key) else {
                continue;
            };
            match (can_talk, link.cut_since) {
                (false, None) => {
                    link.cut_since = Some(self.now);
                    self.await_silence(key);
                }
                // Who was asleep when the link was cut begins to wait for an answer to its pings.
                (false, Some(_)) => {}
                (true, Some(_)) => {
                    link.cut_since = None;
                    let waiting = std::mem::take(&mut link.waiting);
                    let is_up = link.is_up;
                    if is_up == [true, true] {
                        self.resend(key, waiting);
                    } else {
                        let gone = usize::from(is_up[0]);
                        self.end_spreads(key, gone);
                    }
                }
                (true, None) => {}
            }
        }
    }

    /// A machine has another address: it drops its old links at once, the others find out.
    pub fn abandon(&mut self, key: Pair, machine: usize) {
        let end = end_of(key, machine);
        let Some(link) = self.network.links.get_mut(&key) else {
            return;
        };
        link.is_dead = true;
        let generation = link.generation;
        self.post(
            Duration::from_millis(1),
            Event::LinkEnds {
                key,
                generation,
                end,
            },
        );
    }

    /// Both ends wait for pings that do not come; a sleeper does so when it is awake.
    pub fn await_silence(&mut self, key: Pair) {
        let Some(link) = self.network.links.get(&key) else {
            return;
        };
        let (generation, since) = (link.generation, link.cut_since);
        for end in [0, 1] {
            let after = self.noise.duration(PING_FAILS[0], PING_FAILS[1]);
            self.post(
                after,
                Event::Silence {
                    key,
                    generation,
                    end,
                    since,
                },
            );
        }
    }

    /// Pings went unanswered since the link was cut.
    pub fn silence(&mut self, key: Pair, generation: u64, end: usize, since: Option<Duration>) {
        let is_same = |link: &&Link| {
            link.generation == generation && link.cut_since == since && since.is_some()
        };
        if self.network.links.get(&key).filter(is_same).is_none() {
            return;
        }
        if self.machines[machine_at(key, end)].is_up() {
            self.link_ends(key, generation, end);
        }
    }

    fn resend(&mut self, key: Pair, waiting: Vec<(usize, Rc<Frame>)>) {
        let after = self.now + self.noise.duration(RESENT[0], RESENT[1]);
        if let Some(link) = self.network.links.get_mut(&key) {
            link.arrives = link.arrives.map(|arrives| arrives.max(after));
        }
        for (end, frame) in waiting {
            self.put_on_wire(key, end, frame, false);
        }
    }
}
