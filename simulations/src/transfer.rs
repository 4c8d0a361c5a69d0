//! Transfer: NAR bytes as sizes and durations on shared interfaces.
//!
//! A flow gets an equal share of its server's and its client's interface, whichever is less, and looks
//! at its share anew with every report of its progress; so a change elsewhere reaches it within a
//! quarter of a second, as it would through TCP.

use std::net::SocketAddr;
use std::time::Duration;

use granary_protocol::mesh::{Blame, FetchId, Input};

use crate::content::PathId;
use crate::machine::{Brain, CONTROL_PORT, TRANSFER_PORT};
use crate::report::NarSource;
use crate::scenario::{Cache, Role};
use crate::world::{Event, World};

/// How often a transfer is reported to the mind (`PROGRESS_INTERVAL` of the assembly).
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// A server that does not answer is given up then (`RESPONSE_TIMEOUT` of the client).
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// NARs that a machine serves one peer at once (`limits.streams-per-peer`).
const STREAMS_PER_PEER_MAX: usize = 32;

/// From request to first byte, beyond the round trips: open the path, fill the pipe.
const SERVER_DELAY: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowId(pub u64);

pub struct Flow {
    client: usize,
    incarnation: u32,
    server: usize,
    server_incarnation: u32,
    fetch: FetchId,
    attempt: u32,
    size: u64,
    at: u64,
    bytes_per_s: u64,
    since: Duration,
    is_wrong: bool,
}

/// A request on its way to a server.
#[derive(Clone, Debug)]
pub struct Request {
    pub client: usize,
    pub incarnation: u32,
    pub server: Option<usize>,
    pub fetch: FetchId,
    pub attempt: u32,
    pub path: PathId,
    pub from: u64,
}

impl World {
    /// Caches come after the machines where places are counted.
    pub fn place_of_cache(&self, cache: usize) -> usize {
        self.machines.len() + cache
    }

    fn cache_at(&self, place: usize) -> Option<&Cache> {
        let cache = place.checked_sub(self.machines.len())?;
        self.scenario.cache.get(cache)
    }

    /// Whether packets go both ways between a machine and another one or a cache.
    pub fn reaches(&self, machine: usize, place: usize) -> bool {
        match self.cache_at(place) {
            Some(cache) => {
                let is_away = self.is_anchor_away && cache.role == Role::Anchor;
                let is_online = self.network.hosts[machine].island == 0;
                is_online && !self.machines[machine].is_asleep && !is_away
            }
            None => place < self.machines.len() && self.can_talk(machine, place),
        }
    }

    pub fn way_to(&mut self, machine: usize, place: usize) -> Duration {
        match self.cache_at(place).map(|cache| cache.latency_us) {
            Some(latency) => Duration::from_micros(self.noise.between(latency)),
            None => self.latency(machine, place),
        }
    }

    /// Caches hold everything that there was at the start.
    pub fn is_in_caches(&self, path: PathId) -> bool {
        path < self.first_new_path
    }

    pub fn a_cache_has(&self, machine: usize, path: PathId) -> bool {
        let mut places = (0..self.scenario.cache.len()).map(|cache| self.place_of_cache(cache));
        self.is_in_caches(path) && places.any(|place| self.reaches(machine, place))
    }

    fn can_open(&self, client: usize, place: usize) -> bool {
        match self.cache_at(place) {
            Some(_) => self.reaches(client, place),
            None => self.can_connect(client, place),
        }
    }

    /// Begins a transfer from a cache, or from whoever lives at `address`, who must be `server`.
    pub fn request(&mut self, mut request: Request, address: Option<SocketAddr>) {
        if let Some(address) = address {
            let control = SocketAddr::new(address.ip(), CONTROL_PORT);
            let there = self.network.by_address.get(&control).copied();
            let is_right = address.port() == TRANSFER_PORT && there == request.server;
            request.server = there.filter(|_| is_right);
        }
        let delay = match request.server {
            Some(server) if self.can_open(request.client, server) => {
                4 * self.way_to(request.client, server) + SERVER_DELAY
            }
            Some(_) => RESPONSE_TIMEOUT,
            None => Duration::from_millis(2),
        };
        self.post(delay, Event::Requested(request));
    }

    /// The server answers: with bytes, with 404, with 503, or not at all.
    pub fn requested(&mut self, request: Request) {
        let Request {
            client,
            incarnation,
            fetch,
            attempt,
            path,
            from,
            ..
        } = request;
        if self.machines[client].incarnation != incarnation {
            return;
        }
        let assembly = self.machines[client].assemblies.get(&fetch);
        if !assembly.is_some_and(|assembly| assembly.attempt == attempt && !assembly.is_over) {
            return;
        }
        let failed = |blame| Input::TransferEnded {
            fetch,
            attempt,
            outcome: Err(blame),
        };
        let serves = request
            .server
            .filter(|server| self.can_open(client, *server) && self.serves(*server, client));
        let Some(server) = serves else {
            return self.think(client, failed(Blame::Peer));
        };
        let streams = self.flows.values();
        let streams = streams.filter(|flow| flow.server == server && flow.client == client);
        let is_busy = streams.count() >= STREAMS_PER_PEER_MAX;
        if is_busy && server < self.machines.len() {
            if let Some(assembly) = self.machines[client].assemblies.get_mut(&fetch) {
                assembly.is_busy = true;
            }
            return self.think(client, failed(Blame::Peer));
        }
        let machine = self.machines.get(server);
        let is_wrong = machine.is_some_and(|machine| machine.is_liar);
        let is_held = match machine {
            Some(machine) => machine.store.contains(&path),
            None => self.is_in_caches(path),
        };
        if !is_wrong && !is_held {
            return self.think(client, failed(Blame::Absent));
        }
        self.next_flow += 1;
        let id = FlowId(self.next_flow);
        let flow = Flow {
            client,
            incarnation,
            server,
            server_incarnation: machine.map_or(0, |machine| machine.incarnation),
            fetch,
            attempt,
            size: self.content.nar_size(path),
            at: from,
            bytes_per_s: 0,
            since: self.now,
            is_wrong,
        };
        self.uploads[server] += 1;
        self.downloads[client] += 1;
        self.flows.insert(id, flow);
        if let Some(assembly) = self.machines[client].assemblies.get_mut(&fetch) {
            assembly.flow = Some(id);
        }
        self.pace(id);
    }

    /// A member's port serves whom the mind admitted; a liar and a cache serve everyone.
    fn serves(&self, server: usize, client: usize) -> bool {
        let peer = self.machines[client].peer;
        let Some(machine) = self.machines.get(server) else {
            return true;
        };
        match &machine.brain {
            Brain::Off => false,
            Brain::Liar(_) => true,
            Brain::Honest(_) => machine.admitted.contains(&peer),
        }
    }

    /// Gives a flow its share until its next step.
    fn pace(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(&id) else {
            return;
        };
        let (client, server) = (flow.client, flow.server);
        let share = |place: usize, flows: u64| {
            let bits_per_s = match self.cache_at(place) {
                Some(cache) => cache.mbit * 1_000_000,
                None => self.network.hosts[place].bits_per_s,
            };
            bits_per_s / 8 / flows.max(1)
        };
        let is_stalled = self.machines.get(server).is_some_and(|one| one.is_stalled);
        let is_flowing = self.reaches(client, server) && !is_stalled;
        let bytes_per_s = if is_flowing {
            let shares = [
                share(server, self.uploads[server]),
                share(client, self.downloads[client]),
            ];
            shares[0].min(shares[1]).max(1)
        } else {
            0
        };
        let left = flow.size - flow.at;
        let until_end = match bytes_per_s {
            0 => PROGRESS_INTERVAL,
            rate => Duration::from_nanos(left.saturating_mul(1_000_000_000).div_ceil(rate)),
        };
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.bytes_per_s = bytes_per_s;
            flow.since = self.now;
        }
        self.post(until_end.min(PROGRESS_INTERVAL), Event::FlowStep(id));
    }

    /// Bytes arrived; the mind is told, and the flow goes on or ends.
    pub fn flow_step(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else {
            return;
        };
        let elapsed = self.now - flow.since;
        let bytes = u128::from(flow.bytes_per_s) * elapsed.as_nanos() / 1_000_000_000;
        let bytes = u64::try_from(bytes)
            .unwrap_or(u64::MAX)
            .min(flow.size - flow.at);
        flow.at += bytes;
        flow.since = self.now;
        let (client, server, fetch, attempt) = (flow.client, flow.server, flow.fetch, flow.attempt);
        let (at, size, is_wrong) = (flow.at, flow.size, flow.is_wrong);
        let machine = self.machines.get(server);
        let incarnation = machine.map_or(0, |machine| machine.incarnation);
        let is_server_gone = incarnation != flow.server_incarnation;
        if self.machines[client].incarnation != flow.incarnation {
            return self.drop_flow(id);
        }
        let source = match self.cache_at(server).map(|cache| cache.role) {
            _ if is_wrong => NarSource::Wrong,
            Some(Role::Upstream) => NarSource::Upstream,
            Some(Role::Anchor) => NarSource::Anchor,
            None if server == 0 && self.scenario.machines.anchor => NarSource::Anchor,
            None => NarSource::Peer,
        };
        self.report.moved(source, bytes, self.now);
        if let Some(assembly) = self.machines[client].assemblies.get_mut(&fetch) {
            assembly.at = at;
            assembly.is_wrong |= is_wrong && bytes > 0;
        }
        let progress = Input::TransferProgress {
            fetch,
            attempt,
            at,
            held_up: Duration::ZERO,
        };
        if at == size {
            self.drop_flow(id);
            self.think(client, progress);
            self.think(
                client,
                Input::TransferEnded {
                    fetch,
                    attempt,
                    outcome: Ok(()),
                },
            );
            return self.assembled(client, fetch);
        }
        if is_server_gone && self.reaches(client, server) {
            self.drop_flow(id);
            let outcome = Err(Blame::Peer);
            return self.think(
                client,
                Input::TransferEnded {
                    fetch,
                    attempt,
                    outcome,
                },
            );
        }
        if bytes > 0 {
            self.think(client, progress);
        }
        self.pace(id);
    }

    /// Ends a flow without a word.
    pub fn drop_flow(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.remove(&id) {
            self.uploads[flow.server] -= 1;
            self.downloads[flow.client] -= 1;
            if let Some(assembly) = self.machines[flow.client].assemblies.get_mut(&flow.fetch)
                && assembly.flow == Some(id)
            {
                assembly.flow = None;
            }
        }
    }
}
