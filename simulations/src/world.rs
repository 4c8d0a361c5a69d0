//! World: virtual time, the queue of what happens, and the loop that runs it.
//!
//! One seed decides everything. Events happen one at a time, in the order of their time and then of
//! their making; each is traced. A run has phases: machines start and settle; faults and work, with safety
//! checked at every event; calm, when faults are over and repair is demanded; then, if the scenario
//! asks for it, figures on a quiet network.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use granary_protocol::announcement::SignedHead;
use granary_protocol::availability::{AvailabilityIndex, Cursor, HashPrefix};
use granary_protocol::certificate::UnixTime;
use granary_protocol::contact::Contact;
use granary_protocol::mesh::{CacheRole, Config, Input, Mesh};
use granary_protocol::narinfo::VerifiedNarInfo;
use granary_protocol::peer::PeerId;
use granary_protocol::signature::{SecretKey, TrustedKeys};
use granary_protocol::wire;

use crate::chance::Chance;
use crate::checker::{self, Violation, liveness};
use crate::content::{Content, PathId, digest};
use crate::faults::Fault;
use crate::index::{Pool, SharedIndex};
use crate::liar::Liar;
use crate::machine::{Brain, Machine, START, TRANSFER_PORT, key};
use crate::network::{Frame, Network, Pair};
use crate::report::Report;
use crate::scenario::{Cache, Role, Scenario};
use crate::trace::{Trace, TraceHash};
use crate::transfer::{Flow, FlowId, Request};
use crate::workload::Work;

/// mDNS is heard within this time.
const DISCOVERY: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(1200)];

/// From start until the store is read for the first time.
const STORE_SCAN: Duration = Duration::from_millis(50);

/// How often the wall clock is read (`CLOCK_INTERVAL` of the node).
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);

/// How long ago those who know each other from before met.
const WARM_SINCE: Duration = Duration::from_secs(86_400);

/// How often a liar thinks of something.
const STIR_INTERVAL: Duration = Duration::from_millis(700);

/// How often the state of the mesh is sampled for the picture.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Readers whose indexes are sampled: all of a small mesh, some of a large one.
const SAMPLED_READERS_MAX: usize = 60;

/// Everything that can happen.
pub enum Event {
    /// The process starts.
    Start(usize),
    Tick {
        machine: usize,
        incarnation: u32,
    },
    Clock {
        machine: usize,
        incarnation: u32,
    },
    /// Something the hands did comes back to the mind.
    Input {
        machine: usize,
        incarnation: u32,
        input: Box<Input>,
    },
    LocalPaths {
        machine: usize,
        incarnation: u32,
    },
    /// mDNS tells `machine` of `other`.
    Discovered {
        machine: usize,
        other: usize,
    },
    Dialled {
        from: usize,
        incarnation: u32,
        peer: Option<PeerId>,
        target: Option<usize>,
        seed: Option<usize>,
    },
    Relinked {
        from: usize,
        to: usize,
        seed: Option<usize>,
    },
    Accepted {
        from: usize,
        to: usize,
        generation: u64,
    },
    Frame {
        from: usize,
        to: usize,
        generation: u64,
        frame: Rc<Frame>,
    },
    LinkEnds {
        key: Pair,
        generation: u64,
        end: usize,
    },
    Silence {
        key: Pair,
        generation: u64,
        end: usize,
        since: Option<Duration>,
    },
    Requested(Request),
    FlowStep(FlowId),
    Imported {
        machine: usize,
        incarnation: u32,
        path: PathId,
    },
    AskAgain {
        machine: usize,
        incarnation: u32,
        path: PathId,
    },
    Again {
        machine: usize,
        incarnation: u32,
        path: PathId,
        narinfo: Arc<VerifiedNarInfo>,
        lies: u32,
        started: Duration,
    },
    /// The store's watcher sees that paths are gone.
    Collected {
        machine: usize,
        incarnation: u32,
        removed: Vec<PathId>,
    },
    Stir(usize),
    Work(Work),
    Fault(Fault),
    Sample,
    /// Faults are over.
    Calm,
    /// Every index must be right.
    /// The number of times that it was put off, because something was too fresh to be known.
    JudgeIndexes {
        again: u32,
    },
    /// Every want must be delivered.
    JudgeDeliveries,
    /// A window of the report begins or ends.
    Mark(&'static str),
}

impl Event {
    /// The machine that has to be awake for this; frames and flows see for themselves.
    fn sleeper(&self) -> Option<usize> {
        match self {
            Event::Start(machine)
            | Event::Clock { machine, .. }
            | Event::Input { machine, .. }
            | Event::LocalPaths { machine, .. }
            | Event::Discovered { machine, .. }
            | Event::Dialled { from: machine, .. }
            | Event::Relinked { from: machine, .. }
            | Event::Accepted { to: machine, .. }
            | Event::Imported { machine, .. }
            | Event::AskAgain { machine, .. }
            | Event::Collected { machine, .. }
            | Event::Again { machine, .. } => Some(*machine),
            Event::LinkEnds { key, end, .. } => Some(if *end == 0 { key.0 } else { key.1 }),
            Event::Requested(request) => Some(request.client),
            _ => None,
        }
    }

    /// The process this is meant for.
    fn process(&self) -> Option<(usize, u32)> {
        match self {
            Event::Tick {
                machine,
                incarnation,
            }
            | Event::Clock {
                machine,
                incarnation,
            }
            | Event::Input {
                machine,
                incarnation,
                ..
            }
            | Event::LocalPaths {
                machine,
                incarnation,
            }
            | Event::Dialled {
                from: machine,
                incarnation,
                ..
            }
            | Event::Imported {
                machine,
                incarnation,
                ..
            }
            | Event::AskAgain {
                machine,
                incarnation,
                ..
            }
            | Event::Collected {
                machine,
                incarnation,
                ..
            }
            | Event::Again {
                machine,
                incarnation,
                ..
            } => Some((*machine, *incarnation)),
            _ => None,
        }
    }
}

/// Changes of a writer's set on their way to everyone.
struct Announcement {
    cursor: Cursor,
    happened: Vec<Duration>,
    unaware: BTreeSet<usize>,
}

/// What a run leaves behind.
pub struct Outcome {
    pub report: Report,
    pub hash: TraceHash,
    pub violation: Option<Violation>,
}

pub struct World {
    pub scenario: Scenario,
    pub seed: u64,
    pub now: Duration,
    /// Where virtual time begins; its value decides nothing.
    base: Instant,
    queue: BTreeMap<(Duration, u64), Event>,
    posted: u64,
    pub events: u64,
    pub content: Content,
    pub machines: Vec<Machine>,
    pub numbers: BTreeMap<PeerId, usize>,
    pub network: Network,
    pub flows: BTreeMap<FlowId, Flow>,
    pub next_flow: u64,
    /// Flows by the machine that serves or brings them.
    pub uploads: Vec<u64>,
    pub downloads: Vec<u64>,
    pub last_frame: Option<Rc<Frame>>,
    /// What happened to sleepers.
    deferred: BTreeMap<usize, Vec<Event>>,
    announcements: BTreeMap<usize, Vec<Announcement>>,
    pub pool: Pool,
    mesh_key: SecretKey,
    /// Latencies and losses; what liars do; work and faults.
    pub noise: Chance,
    pub mischief: Chance,
    pub chance: Chance,
    pub trace: Trace,
    pub report: Report,
    pub violation: Option<Violation>,
    /// Who has seen through which liar.
    pub liars_seen: BTreeSet<(usize, usize)>,
    pub is_calm: bool,
    pub is_anchor_away: bool,
    /// Paths from here on were made after the start.
    pub first_new_path: PathId,
}

impl World {
    /// Makes the machines, their contents and everything that will be done to them.
    pub fn new(scenario: Scenario, seed: u64, copy: Option<Box<dyn io::Write>>) -> World {
        let mut chance = Chance::new(seed);
        let (noise, mischief) = (chance.fork(), chance.fork());
        let total = scenario.machines.count + scenario.machines.liars;
        let name = "simulated".parse().expect("a key name");
        let mut world = World {
            seed,
            now: Duration::ZERO,
            base: base(),
            queue: BTreeMap::new(),
            posted: 0,
            events: 0,
            content: Content::new(seed),
            machines: Vec::new(),
            numbers: BTreeMap::new(),
            network: Network::default(),
            flows: BTreeMap::new(),
            next_flow: 0,
            uploads: vec![0; total + scenario.cache.len()],
            downloads: vec![0; total],
            last_frame: None,
            deferred: BTreeMap::new(),
            announcements: BTreeMap::new(),
            pool: Pool::default(),
            mesh_key: SecretKey::from_seed(name, digest(seed, "mesh", 0)),
            noise,
            mischief,
            chance,
            trace: Trace::new(copy),
            report: Report::new(&scenario, seed, total),
            violation: None,
            liars_seen: BTreeSet::new(),
            is_calm: false,
            is_anchor_away: false,
            first_new_path: PathId(0),
            scenario,
        };
        world.network.is_stressed = true;
        world.settle_machines(total);
        world.furnish();
        world.plan();
        world
    }

    fn settle_machines(&mut self, total: usize) {
        let machines = self.scenario.machines.clone();
        for number in 0..total {
            let is_liar = number >= machines.count;
            let is_wifi = self.chance.below(100) < machines.wifi_percent;
            let is_walled =
                !is_liar && number > 0 && self.chance.below(100) < machines.walled_percent;
            let network = &self.scenario.network;
            let mbit = if is_wifi {
                network.wifi_mbit
            } else {
                network.wired_mbit
            };
            let resend = if is_wifi {
                network.wifi_resend_permille
            } else {
                0
            };
            self.network.add(
                number % machines.subnets,
                mbit * 1_000_000,
                resend,
                is_walled,
            );
            let index = SharedIndex::new(&self.pool);
            let machine = Machine::new(self.seed, number, is_liar, &self.mesh_key, index);
            self.numbers.insert(machine.peer, number);
            self.machines.push(machine);
        }
    }

    /// Gives every machine its paths, and the indexes what they know from before.
    fn furnish(&mut self) {
        let machines = self.scenario.machines.clone();
        let common = machines.paths * machines.common_percent / 100;
        let mut pins = Vec::new();
        for _ in 0..machines.pins {
            let paths: Vec<PathId> = (0..common)
                .map(|_| self.content.add(&mut self.chance))
                .collect();
            let mut prefixes: Vec<HashPrefix> = paths
                .iter()
                .map(|path| self.content.prefix(*path))
                .collect();
            prefixes.sort_unstable();
            pins.push((paths, prefixes));
        }
        let mut sets = Vec::new();
        for number in 0..machines.count {
            let (paths, prefixes) = &pins[number % machines.pins];
            let own: Vec<PathId> = (common..machines.paths)
                .map(|_| self.content.add(&mut self.chance))
                .collect();
            for path in paths.iter().chain(&own) {
                self.machines[number].add(*path, &self.content);
            }
            let own = own.iter().map(|path| self.content.prefix(*path)).collect();
            sets.push(self.pool.warm(&self.machines[number].peer, prefixes, own));
        }
        if !machines.warm {
            return;
        }
        let known = machines.count - machines.joiners;
        let epoch = (START.0 - WARM_SINCE.as_secs()) << 20;
        for (writer, set) in sets.iter().enumerate().take(known) {
            let machine = &self.machines[writer];
            let sequence = machine.store.len() as u64;
            let cursor = Cursor { epoch, sequence };
            let prefixes = machine.store.iter().map(|path| self.content.prefix(*path));
            let prefixes: BTreeSet<HashPrefix> = prefixes.collect();
            let key = key(self.seed, writer);
            let head = SignedHead::of_set(&key, cursor, &prefixes);
            let contact = Contact {
                certificate: machine.certificate.clone(),
                number: START.0 - WARM_SINCE.as_secs(),
                addresses: vec![self.network.hosts[writer].address],
                transfer_port: Some(TRANSFER_PORT),
            };
            let contact = contact.sign(&key).expect("an ordinary contact");
            let (peer, proof) = (machine.peer, wire::encode_proof(&contact, &head));
            for reader in 0..known {
                let index = &mut self.machines[reader].index;
                index.warm(peer, cursor, set, &proof);
            }
        }
    }

    /// Posts the starts, the work, the faults and the judgements.
    fn plan(&mut self) {
        let machines = self.scenario.machines.clone();
        let (settle, calm, judgement) = (
            self.scenario.settle(),
            self.scenario.calm(),
            self.scenario.judgement(),
        );
        let spread = Duration::from_millis(machines.boot_spread_ms);
        for number in 0..self.machines.len() {
            let mut at = self.chance.duration(Duration::ZERO, spread);
            let is_joiner = number < machines.count && number >= machines.count - machines.joiners;
            if is_joiner {
                at += settle / 2;
            }
            self.post(at, Event::Start(number));
        }
        self.post(settle, Event::Mark("settled"));
        for (at, work) in crate::workload::plan(self) {
            self.post(at, Event::Work(work));
        }
        self.first_new_path = self.content.next();
        let mut plans = self.chance.fork();
        for (at, fault) in crate::faults::plan(&self.scenario, &mut plans) {
            self.post(at, Event::Fault(fault));
        }
        self.post(calm, Event::Calm);
        self.post(
            calm + liveness::INDEX_WITHIN,
            Event::JudgeIndexes { again: 0 },
        );
        self.post(judgement, Event::JudgeDeliveries);
        self.post(Duration::ZERO, Event::Sample);
    }

    pub fn instant(&self) -> Instant {
        self.base + self.now
    }

    pub fn number_of(&self, peer: &PeerId) -> Option<usize> {
        self.numbers.get(peer).copied()
    }

    pub fn post(&mut self, after: Duration, event: Event) {
        self.queue.insert((self.now + after, self.posted), event);
        self.posted += 1;
    }

    /// Returns the machines that stand in a machine's `mesh.peers`.
    pub fn seeds_of(&self, number: usize) -> Vec<usize> {
        let seeds = 0..self
            .scenario
            .network
            .seeds
            .min(self.scenario.machines.count);
        seeds.filter(|seed| *seed != number).collect()
    }

    /// Runs to the end, or to the first broken promise.
    pub fn run(mut self) -> io::Result<Outcome> {
        let end = self.scenario.judgement() + crate::workload::measures_last(&self.scenario);
        while let Some(entry) = self.queue.first_entry() {
            let at = entry.key().0;
            if at > end || self.violation.is_some() {
                break;
            }
            let event = entry.remove();
            self.now = at;
            self.happen(event);
        }
        if self.violation.is_none() {
            checker::quarantine::check(&mut self, true);
            checker::bounds::sizes(&mut self);
            self.report
                .check_bounds()
                .into_iter()
                .for_each(|seen| self.violated(0, "figures", seen));
        }
        self.report.events = self.events;
        self.report.trace_lines = self.trace.lines();
        self.report.liars_seen = self.liars_seen.len() as u64;
        let hash = self.trace.finish()?;
        self.report.trace_hash = hash.to_string();
        self.report.violation = self.violation.as_ref().map(Violation::to_string);
        Ok(Outcome {
            report: self.report,
            hash,
            violation: self.violation,
        })
    }

    fn happen(&mut self, event: Event) {
        if let Some(machine) = event.sleeper()
            && self.machines[machine].is_asleep
        {
            return self.deferred.entry(machine).or_default().push(event);
        }
        if let Some((machine, incarnation)) = event.process()
            && self.machines[machine].incarnation != incarnation
        {
            return;
        }
        match event {
            Event::Start(machine) => self.start(machine),
            Event::Tick { machine, .. } => self.tick(machine),
            Event::Clock { machine, .. } => self.read_clock(machine),
            Event::Input { machine, input, .. } => self.think(machine, *input),
            Event::LocalPaths { machine, .. } => {
                let store = self.machines[machine].store.iter();
                let all = store.map(|path| self.content.hash(*path)).collect();
                // A set that everybody knows from before is no news.
                let one = &self.machines[machine];
                let truth = (one.truth, one.store.len() as u64);
                if one.index.fingerprint(&one.peer) != Some(truth) {
                    self.machines[machine].untold.push(self.now);
                }
                self.think(machine, Input::LocalPaths { all });
            }
            Event::Discovered { machine, other } => {
                let (peer, address) =
                    (self.machines[other].peer, self.network.hosts[other].address);
                if self.can_talk(machine, other) && self.machines[other].is_up() {
                    self.think(
                        machine,
                        Input::Discovered {
                            peer,
                            addresses: vec![address],
                        },
                    );
                }
            }
            Event::Dialled {
                from,
                peer,
                target,
                seed,
                ..
            } => self.dialled(from, peer, target, seed),
            Event::Relinked { from, to, seed } => self.relinked(from, to, seed),
            Event::Accepted {
                from,
                to,
                generation,
            } => self.accepted(from, to, generation),
            Event::Frame {
                from,
                to,
                generation,
                frame,
            } => self.arrived(from, to, generation, frame),
            Event::LinkEnds {
                key,
                generation,
                end,
            } => self.link_ends(key, generation, end),
            Event::Silence {
                key,
                generation,
                end,
                since,
            } => self.silence(key, generation, end, since),
            Event::Requested(request) => self.requested(request),
            Event::FlowStep(flow) => self.flow_step(flow),
            Event::Imported { machine, path, .. } => self.imported(machine, path),
            Event::AskAgain { machine, path, .. } => {
                self.machines[machine].queue.push_back(path);
                self.ask_next(machine);
            }
            Event::Again {
                machine,
                path,
                narinfo,
                lies,
                started,
                ..
            } => {
                self.again(machine, path, narinfo, lies, started);
            }
            Event::Collected {
                machine, removed, ..
            } => self.collected(machine, removed),
            Event::Stir(machine) => self.stir(machine),
            Event::Work(work) => self.work(work),
            Event::Fault(fault) => self.strike(fault),
            Event::Sample => self.sample(),
            Event::Calm => self.calm(),
            Event::JudgeIndexes { again } => {
                if self.scenario.phases.judges
                    && liveness::indexes(self)
                    && again < liveness::JUDGED_AGAIN_MAX
                {
                    let again = again + 1;
                    self.post(
                        self.now + liveness::NEWS_WITHIN,
                        Event::JudgeIndexes { again },
                    );
                }
            }
            Event::JudgeDeliveries => {
                if self.scenario.phases.judges {
                    liveness::deliveries(self);
                }
                self.report.mark("judged", self.now);
            }
            Event::Mark(word) => self.report.mark(word, self.now),
        }
    }

    /// The process starts and reads its index, its clock and its store.
    pub fn start(&mut self, number: usize) {
        if !matches!(self.machines[number].brain, Brain::Off) {
            return;
        }
        self.trace.record(self.now, number, format_args!("start"));
        let seed = self.chance.number();
        let machine = &self.machines[number];
        let brain = if machine.is_liar {
            let (certificate, key) = (machine.certificate.clone(), key(self.seed, number));
            let address = self.network.hosts[number].address;
            Brain::Liar(Box::new(Liar::new(certificate, key, address)))
        } else {
            let config = Config {
                key: key(self.seed, number),
                caches: self.scenario.cache.iter().map(role).collect(),
                mesh_key: self.mesh_key.public_key(),
                certificate: machine.certificate.clone(),
                trust: TrustedKeys::from_iter([self.content.builder()]),
                trusts_members: true,
                store_dir: self.content.dir().clone(),
                transfer_port: Some(TRANSFER_PORT),
                seeds: self.seeds_of(number).len(),
            };
            Brain::Honest(Box::new(Mesh::new(
                machine.peer,
                config,
                seed,
                self.instant(),
            )))
        };
        let is_liar = machine.is_liar;
        let incarnation = machine.incarnation;
        self.machines[number].brain = brain;
        self.machines[number].disturbed_at = self.now;
        self.report.started(number);
        self.read_clock(number);
        self.tell_addresses(number);
        if is_liar {
            self.post(STIR_INTERVAL, Event::Stir(number));
        } else {
            self.post(
                STORE_SCAN,
                Event::LocalPaths {
                    machine: number,
                    incarnation,
                },
            );
        }
        self.advertise(number);
        self.ask_next(number);
    }

    /// A node knows where it listens, not whether a firewall lets anybody in.
    pub fn tell_addresses(&mut self, number: usize) {
        let addresses = vec![self.network.hosts[number].address];
        self.think(number, Input::OwnAddresses { addresses });
    }

    fn read_clock(&mut self, machine: usize) {
        let incarnation = self.machines[machine].incarnation;
        let unix = UnixTime(START.0 + self.now.as_secs());
        self.think(machine, Input::ClockRead { unix });
        self.post(
            CLOCK_INTERVAL,
            Event::Clock {
                machine,
                incarnation,
            },
        );
    }

    /// mDNS: the machine is heard by others, and hears them.
    pub fn advertise(&mut self, number: usize) {
        let is_heard_everywhere = self.scenario.network.mdns_is_routed;
        for other in 0..self.machines.len() {
            let is_near = is_heard_everywhere
                || self.network.hosts[other].subnet == self.network.hosts[number].subnet;
            if other != number
                && is_near
                && self.machines[other].is_up()
                && self.can_talk(number, other)
            {
                let [min, max] = DISCOVERY;
                let (here, there) = (self.noise.duration(min, max), self.noise.duration(min, max));
                self.post(
                    here,
                    Event::Discovered {
                        machine: number,
                        other,
                    },
                );
                self.post(
                    there,
                    Event::Discovered {
                        machine: other,
                        other: number,
                    },
                );
            }
        }
    }

    fn tick(&mut self, number: usize) {
        let now = self.now;
        let instant = self.instant();
        let machine = &mut self.machines[number];
        if machine.tick_at != Some(now) {
            return;
        }
        machine.tick_at = None;
        if machine.is_asleep {
            return;
        }
        let Brain::Honest(mind) = &machine.brain else {
            return;
        };
        if mind.deadline().is_none_or(|(at, _)| at > instant) {
            return self.schedule(number);
        }
        self.think(number, Input::Tick);
        if let Brain::Honest(mind) = &self.machines[number].brain
            && let Some((at, why)) = mind.deadline()
            && at <= instant
        {
            self.violated(number, "bounds", format!("a tick left it due: {why}"));
        }
    }

    /// Sees to it that the mind is called at its deadline.
    fn schedule(&mut self, number: usize) {
        let machine = &self.machines[number];
        let Brain::Honest(mind) = &machine.brain else {
            return;
        };
        let Some((deadline, _)) = mind.deadline() else {
            return;
        };
        let at = deadline.saturating_duration_since(self.base).max(self.now);
        if machine.tick_at.is_some_and(|due| due <= at) {
            return;
        }
        let incarnation = machine.incarnation;
        self.machines[number].tick_at = Some(at);
        self.post(
            at - self.now,
            Event::Tick {
                machine: number,
                incarnation,
            },
        );
    }

    /// After a mind was given something: what changed in its index, and when it is due again.
    pub fn after(&mut self, number: usize) {
        self.schedule(number);
        let me = self.machines[number].peer;
        let changed = self.machines[number].index.take_changed();
        for peer in changed {
            if peer == me {
                self.announced(number);
            } else if let Some(writer) = self.number_of(&peer) {
                self.learned(number, writer);
            }
        }
    }

    fn announced(&mut self, writer: usize) {
        let machine = &mut self.machines[writer];
        let Some(cursor) = machine.index.cursor(&machine.peer) else {
            return;
        };
        let happened = std::mem::take(&mut machine.untold);
        if happened.is_empty() {
            return;
        }
        let is_reader = |other: &usize| {
            *other != writer
                && matches!(self.machines[*other].brain, Brain::Honest(_))
                && self.can_talk(writer, *other)
        };
        let unaware: BTreeSet<usize> = (0..self.machines.len()).filter(is_reader).collect();
        let announcement = Announcement {
            cursor,
            happened,
            unaware,
        };
        self.announcements
            .entry(writer)
            .or_default()
            .push(announcement);
    }

    fn learned(&mut self, reader: usize, writer: usize) {
        let Some(cursor) = self.machines[reader]
            .index
            .cursor(&self.machines[writer].peer)
        else {
            return;
        };
        let disturbed = self.machines[reader]
            .disturbed_at
            .max(self.machines[writer].disturbed_at);
        let Some(announcements) = self.announcements.get_mut(&writer) else {
            return;
        };
        for announcement in announcements.iter_mut() {
            let is_there = cursor.epoch == announcement.cursor.epoch
                && cursor.sequence >= announcement.cursor.sequence;
            if !is_there || !announcement.unaware.remove(&reader) {
                continue;
            }
            let undisturbed = announcement
                .happened
                .iter()
                .filter(|happened| **happened > disturbed);
            for happened in undisturbed {
                self.report.learned(*happened, self.now);
                if announcement.unaware.is_empty() {
                    self.report.everyone_learned(*happened, self.now);
                }
            }
        }
        announcements.retain(|announcement| !announcement.unaware.is_empty());
    }

    fn stir(&mut self, number: usize) {
        let honest = self.scenario.machines.count;
        let wanted = self
            .machines
            .iter()
            .take(honest)
            .flat_map(|machine| machine.wants.keys());
        let wanted: Vec<PathId> = wanted.copied().collect();
        let Brain::Liar(liar) = &mut self.machines[number].brain else {
            return;
        };
        let acts = liar.stir(&wanted, &mut self.content, &mut self.mischief);
        self.act(number, acts);
        self.post(STIR_INTERVAL, Event::Stir(number));
    }

    /// Faults end: everyone wakes, starts and comes back.
    fn calm(&mut self) {
        self.is_calm = true;
        self.is_anchor_away = false;
        self.network.is_stressed = false;
        self.trace.record(self.now, 0, format_args!("calm"));
        for number in 0..self.machines.len() {
            let was_away = std::mem::take(&mut self.network.hosts[number].island) != 0;
            let machine = &mut self.machines[number];
            if was_away {
                machine.disturbed_at = self.now;
            }
            machine.is_full = false;
            machine.is_stalled = false;
            if let Brain::Liar(liar) = &mut machine.brain {
                liar.is_tired = true;
            }
        }
        for number in 0..self.machines.len() {
            self.wake(number);
            self.start(number);
        }
        self.reachability_changed();
        for number in 0..self.machines.len() {
            self.advertise(number);
        }
        self.report.mark("calm", self.now);
    }

    /// A machine opens its eyes: what happened meanwhile happens to it, and its clock says how long it was.
    pub fn wake(&mut self, number: usize) {
        if !self.machines[number].is_asleep {
            return;
        }
        self.machines[number].is_asleep = false;
        self.machines[number].disturbed_at = self.now;
        self.trace.record(self.now, number, format_args!("wake"));
        let unix = UnixTime(START.0 + self.now.as_secs());
        self.think(number, Input::ClockRead { unix });
        self.think(number, Input::Woke);
        for event in self.deferred.remove(&number).unwrap_or_default() {
            self.post(Duration::ZERO, event);
        }
        let cut = |key: &Pair| {
            self.network
                .links
                .get(key)
                .is_some_and(|link| link.cut_since.is_some())
        };
        for key in self
            .links_of(number)
            .into_iter()
            .filter(cut)
            .collect::<Vec<_>>()
        {
            self.await_silence(key);
        }
        self.reachability_changed();
        self.advertise(number);
        // What was wanted while the machine slept is asked for.
        self.ask_next(number);
    }

    fn sample(&mut self) {
        let honest = self.scenario.machines.count;
        let step = honest.div_ceil(SAMPLED_READERS_MAX).max(1);
        let (pairs, exact) = liveness::agreement(self, (0..honest).step_by(step));
        self.report.sample(self.now, pairs, exact);
        if self.now.as_secs().is_multiple_of(5) {
            checker::quarantine::check(self, false);
            checker::bounds::sizes(self);
        }
        let interval = if honest > SAMPLED_READERS_MAX { 10 } else { 1 } * SAMPLE_INTERVAL;
        self.post(interval, Event::Sample);
    }
}

fn role(cache: &Cache) -> CacheRole {
    match cache.role {
        Role::Anchor => CacheRole::Anchor,
        Role::Upstream => CacheRole::Upstream,
    }
}

/// Returns where virtual time begins. Only differences to it are ever looked at.
#[expect(
    clippy::disallowed_methods,
    reason = "an Instant cannot be made otherwise; its value decides nothing"
)]
fn base() -> Instant {
    Instant::now()
}
