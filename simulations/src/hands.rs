//! Hands: what a node does with its mind's outputs, and what Nix asks of the node, in virtual time.
//!
//! Follows `node/src/mesh.rs` (links, reads of the store), `node/src/substituter.rs` (a narinfo, then a
//! NAR that looks the path up once more) and `substituter/assembly.rs` (one NAR from several
//! sources, its hash at the end).

use std::rc::Rc;
use std::time::Duration;

use granary_protocol::mesh::{FetchId, Input, LookupId, LookupOutcome, Output, Source};
use granary_protocol::message::{Answer, Message};
use granary_protocol::wire;

use crate::checker;
use crate::content::PathId;
use crate::liar::Act;
use crate::machine::{Assembly, Brain, FETCHES_MAX, Stage, Want};
use crate::network::Frame;
use crate::transfer::{RESPONSE_TIMEOUT, Request};
use crate::world::{Event, World};

/// Reading narinfos from the database for a peer.
const STORE_READ: Duration = Duration::from_millis(1);

/// From the end of a NAR until the store contains the path and says so.
const IMPORT: Duration = Duration::from_millis(20);

/// How long a person or a timer waits before Nix asks again for what it did not get.
const RETRY: Duration = Duration::from_secs(5);

/// Held back until the hash is right (`HELD_BACK_BYTES` of the client).
const HELD_BACK_BYTES: u64 = 64 * 1024;

/// Wrong NARs after which a fetch is given up (`LIES_MAX` of the assembly).
const LIES_MAX: u32 = 3;

/// How long, and how often, a NAR asks busy providers (`BUSY_PATIENCE`, `BUSY_PAUSE`).
const BUSY_PATIENCE: Duration = Duration::from_secs(120);
const BUSY_PAUSE: Duration = Duration::from_millis(200);

impl World {
    /// Gives a machine's mind an input and carries out everything it wants.
    pub fn think(&mut self, number: usize, input: Input) {
        let line = crate::describe::input(&input, &self.numbers);
        self.trace.record(self.now, number, format_args!("{line}"));
        self.events += 1;
        let instant = self.instant();
        let machine = &mut self.machines[number];
        match &mut machine.brain {
            Brain::Off => return,
            Brain::Honest(mind) => {
                mind.handle(&mut machine.index, input, instant);
                let mut outputs = 0;
                while let Brain::Honest(mind) = &mut self.machines[number].brain {
                    let Some(output) = mind.poll() else { break };
                    outputs += 1;
                    self.obey(number, output);
                }
                checker::bounds::outputs(self, number, outputs);
            }
            Brain::Liar(liar) => {
                let acts = liar.hear(input, &mut self.content, &mut self.mischief);
                self.act(number, acts);
            }
        }
        self.after(number);
    }

    /// Does what a liar does. Its messages are read like any bytes from outside.
    pub fn act(&mut self, number: usize, acts: Vec<Act>) {
        for act in acts {
            let (peer, bytes) = match act {
                Act::Output(Output::Send { peer, message }) => (peer, wire::encode(&message)),
                Act::Output(output) => {
                    self.obey(number, output);
                    continue;
                }
                Act::Raw(peer, bytes) => (peer, bytes),
            };
            if let Some(to) = self.number_of(&peer) {
                let message = wire::decode(&bytes).ok();
                self.send(number, to, Frame::new(message, &bytes));
            }
        }
    }

    fn obey(&mut self, number: usize, output: Output) {
        let line = crate::describe::output(&output, &self.numbers);
        self.trace.record(self.now, number, format_args!("{line}"));
        checker::output(self, number, &output);
        match output {
            Output::Dial { peer, addresses } => self.dial(number, Some(peer), &addresses, None),
            Output::DialSeed { seed } => {
                let address = self
                    .seeds_of(number)
                    .get(seed)
                    .map(|seed| self.network.hosts[*seed].address);
                self.dial(number, None, address.as_slice(), Some(seed));
            }
            Output::Hangup { peer, refusal } => {
                if let Some(refusal) = refusal {
                    self.report.refused(refusal.word());
                }
                if let Some(other) = self.number_of(&peer) {
                    self.hangup(number, other);
                }
            }
            Output::Send { peer, message } => {
                if let Some(to) = self.number_of(&peer) {
                    let frame = self.frame(number, message);
                    self.send(number, to, frame);
                }
            }
            Output::Admitted { peer, .. } => {
                self.machines[number].admitted.insert(peer);
            }
            // No scenario revokes anybody.
            Output::KeepRevocations { .. } => {}
            Output::Departed { peer } => {
                self.machines[number].admitted.remove(&peer);
            }
            Output::ReadLocal {
                peer,
                request,
                hashes,
            } => {
                let incarnation = self.machines[number].incarnation;
                let input = self.answer(number, peer, request, &hashes);
                self.post(
                    STORE_READ,
                    Event::Input {
                        machine: number,
                        incarnation,
                        input: Box::new(input),
                    },
                );
            }
            Output::LookupDone { lookup, outcome } => self.looked_up(number, lookup, outcome),
            Output::AskCache {
                cache,
                request,
                hashes,
            } => self.ask_cache(number, cache, request, &hashes),
            Output::Transfer {
                fetch,
                attempt,
                source,
                from,
            } => {
                let (server, address) = match source {
                    Source::Peer { peer, address } => (self.number_of(&peer), Some(address)),
                    Source::Cache { cache, .. } => (Some(self.place_of_cache(cache)), None),
                };
                let Some(assembly) = self.machines[number].assemblies.get_mut(&fetch) else {
                    return;
                };
                assembly.attempt = attempt;
                assembly.source = server;
                let request = Request {
                    client: number,
                    server,
                    fetch,
                    attempt,
                    path: assembly.path,
                    from,
                    incarnation: self.machines[number].incarnation,
                };
                self.request(request, address);
            }
            Output::StopTransfer { fetch, .. } => self.stop_flow(number, fetch),
            Output::FetchFailed { fetch } => self.fetch_failed(number, fetch),
        }
    }

    /// Returns the frame of a message, encoded once for all it goes to.
    fn frame(&mut self, number: usize, message: Message) -> Rc<Frame> {
        if let Some(frame) = &self.last_frame
            && frame.message.as_ref() == Some(&message)
        {
            return frame.clone();
        }
        let body = wire::encode(&message);
        checker::bounds::frame(self, number, &message, &body);
        let frame = Frame::new(Some(message), &body);
        self.last_frame = Some(frame.clone());
        frame
    }

    fn answer(
        &mut self,
        number: usize,
        peer: granary_protocol::peer::PeerId,
        request: u64,
        hashes: &[granary_protocol::store_path::StorePathHash],
    ) -> Input {
        let mut answers = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let held = self.content.find(hash);
            let held = held.filter(|path| self.machines[number].store.contains(path));
            let narinfo = held.map(|path| self.content.narinfo(path).to_string());
            answers.push(Answer {
                hash: *hash,
                narinfo,
            });
        }
        Input::LocalAnswers {
            peer,
            request,
            answers,
        }
    }

    /// Asks a cache for narinfos over HTTP; one that is away does not even refuse.
    fn ask_cache(
        &mut self,
        number: usize,
        cache: usize,
        request: u64,
        hashes: &[granary_protocol::store_path::StorePathHash],
    ) {
        let place = self.place_of_cache(cache);
        let (delay, input) = if self.reaches(number, place) {
            let mut answers = Vec::with_capacity(hashes.len());
            for hash in hashes {
                let held = self.content.find(hash);
                let held = held.filter(|path| self.is_in_caches(*path));
                let narinfo = held.map(|path| self.content.narinfo(path).to_string());
                answers.push(Answer {
                    hash: *hash,
                    narinfo,
                });
            }
            let input = Input::CacheAnswers {
                cache,
                request,
                answers,
            };
            (2 * self.way_to(number, place), input)
        } else {
            (RESPONSE_TIMEOUT, Input::CacheFailed { cache, request })
        };
        let incarnation = self.machines[number].incarnation;
        let event = Event::Input {
            machine: number,
            incarnation,
            input: Box::new(input),
        };
        self.post(delay, event);
    }

    /// Somebody at this machine wants a path.
    pub fn want(&mut self, number: usize, path: PathId) {
        let now = self.now;
        let machine = &mut self.machines[number];
        if machine.store.contains(&path) || machine.wants.contains_key(&path) {
            return;
        }
        let want = Want {
            since: now,
            asked_at: now,
            stage: Stage::Waiting,
        };
        machine.wants.insert(path, want);
        machine.queue.push_back(path);
        self.ask_next(number);
    }

    /// Nix asks for as much at once as it does.
    pub fn ask_next(&mut self, number: usize) {
        while self.machines[number].active < FETCHES_MAX && self.machines[number].is_up() {
            let Some(path) = self.machines[number].queue.pop_front() else {
                return;
            };
            if !self.machines[number].wants.contains_key(&path) {
                continue;
            }
            self.machines[number].active += 1;
            self.look_up(number, path, Stage::NarInfo);
        }
    }

    fn look_up(&mut self, number: usize, path: PathId, stage: fn(LookupId) -> Stage) {
        let machine = &mut self.machines[number];
        let lookup = LookupId(machine.next_id());
        machine.lookups.insert(lookup, path);
        if let Some(want) = machine.wants.get_mut(&path) {
            want.stage = stage(lookup);
            want.asked_at = self.now;
        }
        let hash = self.content.hash(path);
        // The mind may answer within the call that asks, so the question is an event of its own.
        let incarnation = self.machines[number].incarnation;
        let input = Box::new(Input::Lookup { lookup, hash });
        self.post(
            Duration::ZERO,
            Event::Input {
                machine: number,
                incarnation,
                input,
            },
        );
    }

    fn looked_up(&mut self, number: usize, lookup: LookupId, outcome: LookupOutcome) {
        let Some(path) = self.machines[number].lookups.remove(&lookup) else {
            return;
        };
        let Some(want) = self.machines[number].wants.get(&path).cloned() else {
            return;
        };
        // The second lookup of a NAR is answered from memory and would flatter the figures.
        if matches!(want.stage, Stage::NarInfo(_)) {
            let is_found = matches!(outcome, LookupOutcome::Found { .. });
            self.report.looked_up(self.now - want.asked_at, is_found);
        }
        match outcome {
            LookupOutcome::NotFound => {
                if self.is_false_not_found(number, path) {
                    self.report.false_not_found += 1;
                    self.trace
                        .record(self.now, number, format_args!("false-not-found {}", path.0));
                }
                self.give_up(number, path, RETRY);
            }
            LookupOutcome::Found { .. } if matches!(want.stage, Stage::NarInfo(_)) => {
                self.look_up(number, path, Stage::Nar);
            }
            LookupOutcome::Found { narinfo, .. } => {
                self.begin(number, path, narinfo, 0, self.now);
            }
        }
    }

    fn begin(
        &mut self,
        number: usize,
        path: PathId,
        narinfo: std::sync::Arc<granary_protocol::narinfo::VerifiedNarInfo>,
        lies: u32,
        started: Duration,
    ) {
        let machine = &mut self.machines[number];
        let fetch = FetchId(machine.next_id());
        let assembly = Assembly {
            path,
            narinfo: narinfo.clone(),
            started,
            at: 0,
            is_wrong: false,
            attempt: 0,
            source: None,
            flow: None,
            is_busy: false,
            lies,
            is_over: false,
        };
        machine.assemblies.insert(fetch, assembly);
        if let Some(want) = machine.wants.get_mut(&path) {
            want.stage = Stage::Fetching(fetch);
        }
        let incarnation = machine.incarnation;
        let input = Box::new(Input::Fetch { fetch, narinfo });
        self.post(
            Duration::ZERO,
            Event::Input {
                machine: number,
                incarnation,
                input,
            },
        );
    }

    fn stop_flow(&mut self, number: usize, fetch: FetchId) {
        let flow = self.machines[number]
            .assemblies
            .get(&fetch)
            .and_then(|assembly| assembly.flow);
        if let Some(flow) = flow {
            self.drop_flow(flow);
        }
    }

    /// The mind has nobody left to ask.
    fn fetch_failed(&mut self, number: usize, fetch: FetchId) {
        self.stop_flow(number, fetch);
        let Some(assembly) = self.machines[number].assemblies.remove(&fetch) else {
            return;
        };
        let has_passed_on = assembly.at > HELD_BACK_BYTES;
        let may_wait = self.now < assembly.started + BUSY_PATIENCE;
        if assembly.is_busy && !has_passed_on && may_wait {
            let again = Event::Again {
                machine: number,
                incarnation: self.machines[number].incarnation,
                path: assembly.path,
                narinfo: assembly.narinfo,
                lies: assembly.lies,
                started: assembly.started,
            };
            return self.post(BUSY_PAUSE, again);
        }
        self.report.fetches_failed += 1;
        self.give_up(number, assembly.path, RETRY);
    }

    /// Another round of the same assembly.
    pub fn again(
        &mut self,
        number: usize,
        path: PathId,
        narinfo: std::sync::Arc<granary_protocol::narinfo::VerifiedNarInfo>,
        lies: u32,
        started: Duration,
    ) {
        if self.machines[number].wants.contains_key(&path) {
            self.begin(number, path, narinfo, lies, started);
        }
    }

    /// Every byte is there; the hash tells whether they are right.
    pub fn assembled(&mut self, number: usize, fetch: FetchId) {
        let Some(assembly) = self.machines[number].assemblies.remove(&fetch) else {
            return;
        };
        let path = assembly.path;
        if assembly.is_wrong {
            self.report.mismatches += 1;
            self.think(number, Input::FetchMismatch { fetch });
            let has_passed_on = assembly.at > HELD_BACK_BYTES;
            if !has_passed_on && assembly.lies < LIES_MAX {
                return self.begin(
                    number,
                    path,
                    assembly.narinfo,
                    assembly.lies + 1,
                    assembly.started,
                );
            }
            return self.give_up(number, path, RETRY);
        }
        self.think(number, Input::FetchDone { fetch });
        if self.machines[number].is_full {
            return self.give_up(number, path, RETRY);
        }
        let incarnation = self.machines[number].incarnation;
        self.post(
            IMPORT,
            Event::Imported {
                machine: number,
                incarnation,
                path,
            },
        );
    }

    /// The store contains what was fetched.
    pub fn imported(&mut self, number: usize, path: PathId) {
        let machine = &mut self.machines[number];
        if let Some(want) = machine.wants.remove(&path) {
            machine.active = machine.active.saturating_sub(1);
            self.report.delivered(self.now - want.since);
        }
        self.store_changes(number, &[path], &[]);
        self.ask_next(number);
    }

    /// Nix goes without the path for now; whoever wants it asks again later.
    fn give_up(&mut self, number: usize, path: PathId, pause: Duration) {
        let machine = &mut self.machines[number];
        machine.active = machine.active.saturating_sub(1);
        if let Some(want) = machine.wants.get_mut(&path) {
            want.stage = Stage::Waiting;
        }
        let incarnation = machine.incarnation;
        self.post(
            pause,
            Event::AskAgain {
                machine: number,
                incarnation,
                path,
            },
        );
        self.ask_next(number);
    }

    /// The store changed, and its watcher says so.
    pub fn store_changes(&mut self, number: usize, added: &[PathId], removed: &[PathId]) {
        let now = self.now;
        let machine = &mut self.machines[number];
        let mut added: Vec<PathId> = added.to_vec();
        added.retain(|path| machine.add(*path, &self.content));
        let mut removed: Vec<PathId> = removed.to_vec();
        removed.retain(|path| machine.remove(*path, &self.content));
        for path in &added {
            machine.held_since.insert(*path, now);
        }
        if added.is_empty() && removed.is_empty() || !machine.is_up() {
            return;
        }
        machine.untold.push(now);
        let hashes = |paths: &[PathId]| paths.iter().map(|path| self.content.hash(*path)).collect();
        let input = Input::LocalChanged {
            added: hashes(&added),
            removed: hashes(&removed),
        };
        self.think(number, input);
    }

    /// Whether somebody should have been asked who holds the path: a machine that has held it long
    /// enough for everyone to know, with neither end disturbed of late.
    fn is_false_not_found(&self, number: usize, path: PathId) -> bool {
        /// As long as repair may take.
        const KNOWN_AFTER: Duration = Duration::from_secs(35);
        let is_settled =
            |machine: usize| self.now >= self.machines[machine].disturbed_at + KNOWN_AFTER;
        let holds = |other: usize| {
            let machine = &self.machines[other];
            let since = machine.held_since.get(&path).copied().unwrap_or_default();
            other != number
                && !machine.is_liar
                && machine.is_up()
                && machine.store.contains(&path)
                && self.now >= since + KNOWN_AFTER
                && is_settled(other)
                && self.can_connect(number, other)
        };
        self.now >= self.scenario.settle()
            && is_settled(number)
            && ((0..self.machines.len()).any(holds) || self.a_cache_has(number, path))
    }
}
