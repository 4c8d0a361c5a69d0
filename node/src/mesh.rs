//! The mesh: one loop around the mind, with libp2p, mDNS and the local store as its hands.
//!
//! Runs on a thread of its own with a runtime of its own, because the mind's index is SQLite and a
//! slow disk must not stall an HTTP answer. Everybody else holds a [`MeshHandle`]. The loop takes
//! one event at a time, hands it to [`granary_protocol::mesh::Mesh`], and carries out what comes
//! back; it decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use granary_protocol::availability::{AvailabilityIndex, Cursor};
use granary_protocol::certificate::SignedCertificate;
use granary_protocol::mesh::{
    Blame, CacheView, Config as MindConfig, FetchId, Input, LookupId, LookupOutcome, Mesh, Output,
    PeerView, Refusal,
};
use granary_protocol::message::{Answer, Message, PROTOCOL_VERSION};
use granary_protocol::narinfo::VerifiedNarInfo;
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::SignedRevocations;
use granary_protocol::store_path::StorePathHash;
use granary_protocol::wire;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::binary_cache::WebCaches;
use crate::clock::{ALARM_INTERVAL, Alarm, Clock, unix_time};
use crate::crowd::Crowd;
use crate::identity::{self, Identity};
use crate::index::{IndexError, SqliteIndex};
use crate::place::Place;
use crate::store::{LocalStore, StoreEvent};

pub mod discovery;
mod door;
mod doubt;
mod fetch;
mod gate;
pub mod links;
pub mod pulse;
mod reach;
pub mod revocations;
pub mod roaming;
pub mod swarm;
mod turns;

use discovery::{Discovery, DiscoveryEvent};
use doubt::{ANSWER_PATIENCE, UNSETTLED};
pub use fetch::{Fetch, Order};
use links::DownReason;
use revocations::{RevocationsFile, RevocationsFileError};
use roaming::Roaming;
use swarm::{DialError, Network, NetworkError, NetworkEvent};
use turns::Cost;

/// Commands waiting for the loop; beyond it, those who ask wait.
const COMMANDS_MAX: usize = 1024;

/// Orders waiting for one fetch: an attempt is opened, stopped, or failed, one after another.
const ORDERS_MAX: usize = 8;

/// Database visits for one peer under way at once: both readers and as many that wait for one, so that another
/// peer's visit, or Nix's, waits behind few.
const LOCAL_READS_MAX: usize = 4;

/// Refusals that are logged at WARN; further ones are counted and logged at DEBUG.
const REFUSALS_TOLD_MAX: usize = 256;

/// How often the wall clock is read again, to date certificates after it was set.
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);

/// Time that Goodbye and mDNS's farewell get at shutdown.
const FAREWELL: Duration = Duration::from_millis(300);

/// What the loop is told at start.
pub struct Options {
    pub mind: MindConfig,
    pub listen: Vec<SocketAddr>,
    /// `host:port` of unknown peers; their number is `mind.seeds`.
    pub seeds: Vec<String>,
    pub mdns: Option<Mdns>,
    /// `None` keeps it in memory.
    pub index_file: Option<PathBuf>,
    /// `None` keeps no list of revocations.
    pub revocations: Option<RevocationsFile>,
    /// Where strangers stand.
    pub crowd: Arc<Crowd>,
    /// What `mind.caches` numbers.
    pub caches: Arc<WebCaches>,
    /// Where this node is to be heard and reached.
    pub place: Place,
}

/// How this node finds others on the local network.
pub struct Mdns {
    pub mesh_tag: String,
    pub transfer_port: u16,
    pub port: u16,
    pub interfaces: Vec<String>,
    /// Whether strangers are told that this node shares in public.
    pub is_public: bool,
}

/// Why there is no mesh.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Revocations(#[from] RevocationsFileError),
    #[error("cannot start the mesh's thread: {0}")]
    Thread(#[source] std::io::Error),
    #[error("cannot make a timer: {0}")]
    Alarm(#[source] std::io::Error),
    #[error("the system gave no random bytes: {0}")]
    NoRandomness(getrandom::Error),
    #[error("the mesh's thread ended while starting")]
    Ended,
}

/// Talks to the loop. Cheap to clone.
#[derive(Clone)]
pub struct MeshHandle {
    commands: mpsc::Sender<Command>,
    members: watch::Receiver<Arc<BTreeSet<PeerId>>>,
    next_id: Arc<AtomicU64>,
    listening: SocketAddr,
}

/// What the mesh knows, for status.
#[derive(Debug)]
pub struct Snapshot {
    pub head: Cursor,
    /// Paths this node announces.
    pub paths: u64,
    pub peers: Vec<PeerView>,
    /// Anchors and upstreams, by name.
    pub caches: Vec<(Arc<str>, CacheView)>,
    pub refusals: Vec<(Refusal, u64)>,
    /// Number of the newest list of revocations; 0 before the first.
    pub revocations: u64,
    /// mDNS announcements that were passed over: of other meshes, and malformed ones.
    pub foreign_announcements: u64,
    pub malformed_announcements: u64,
    /// Interfaces with addresses that are on no network of `mesh.networks`.
    pub silent: Vec<String>,
    /// Writes of the availability index that failed.
    pub index_errors: u64,
}

/// What the mesh would do about one path.
#[derive(Debug)]
pub struct Knowledge {
    /// Everyone whose announcements contain it, usable or not.
    pub announced_by: Vec<PeerId>,
    /// Those who may be asked, best first.
    pub usable: Vec<PeerId>,
    pub peers: Vec<PeerView>,
}

enum Command {
    Lookup {
        hash: StorePathHash,
        id: LookupId,
        answer: oneshot::Sender<LookupOutcome>,
    },
    Cancel(LookupId, StorePathHash),
    Fetch {
        id: FetchId,
        narinfo: Arc<VerifiedNarInfo>,
        orders: mpsc::Sender<Order>,
    },
    Report(Input),
    FetchDone(FetchId),
    Certificate(SignedCertificate),
    Snapshot(oneshot::Sender<Snapshot>),
    Knowledge(StorePathHash, oneshot::Sender<Knowledge>),
    Shutdown(oneshot::Sender<()>),
}

/// Starts the loop on its own thread. `shared` is what other members may see.
pub async fn start(
    identity: &Identity,
    shared: Arc<dyn LocalStore>,
    options: Options,
) -> Result<MeshHandle, MeshError> {
    let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
    let (members_sender, members) = watch::channel(Arc::default());
    let (started_sender, started) = oneshot::channel();
    let identity = identity.clone();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        match runtime {
            Err(error) => drop(started_sender.send(Err(MeshError::Thread(error)))),
            Ok(runtime) => runtime.block_on(async move {
                match Loop::new(&identity, shared, options, receiver, members_sender).await {
                    Err(error) => drop(started_sender.send(Err(error))),
                    Ok((mut mesh, listening)) => {
                        drop(started_sender.send(Ok(listening)));
                        mesh.run().await;
                        let done = mesh.shutdown.take();
                        // Its port is free before it is said that it ended.
                        drop(mesh);
                        if let Some(done) = done {
                            // Whoever asked may have stopped waiting.
                            let _ = done.send(());
                        }
                    }
                }
            }),
        }
    };
    std::thread::Builder::new()
        .name("mesh".into())
        .spawn(run)
        .map_err(MeshError::Thread)?;
    let listening = started.await.map_err(|_| MeshError::Ended)??;
    Ok(MeshHandle {
        commands,
        members,
        next_id: Arc::new(AtomicU64::new(1)),
        listening,
    })
}

impl MeshHandle {
    /// Asks the mesh for a path. Dropping the future withdraws the question.
    ///
    /// Ends within a second; a mesh that has stopped knows nothing.
    pub async fn lookup(&self, hash: StorePathHash) -> LookupOutcome {
        let id = LookupId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (answer, outcome) = oneshot::channel();
        let mut withdraw = Withdraw {
            asked: Some((id, hash)),
            commands: self.commands.clone(),
        };
        let outcome = match self
            .commands
            .send(Command::Lookup { hash, id, answer })
            .await
        {
            Ok(()) => outcome.await.unwrap_or(LookupOutcome::NotFound),
            Err(_) => LookupOutcome::NotFound,
        };
        withdraw.asked = None;
        outcome
    }

    /// Begins to fetch a NAR; the orders say from whom.
    pub async fn fetch(&self, narinfo: Arc<VerifiedNarInfo>) -> Fetch {
        let id = FetchId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        // A mesh that has stopped drops the sender, which reads as a failed fetch.
        let _ = self
            .commands
            .send(Command::Fetch {
                id,
                narinfo,
                orders: sender,
            })
            .await;
        Fetch {
            id,
            orders,
            commands: self.commands.clone(),
        }
    }

    /// The peers that proved membership and are linked now.
    pub fn members(&self) -> watch::Receiver<Arc<BTreeSet<PeerId>>> {
        self.members.clone()
    }

    /// Where the control plane listens.
    pub fn listening(&self) -> SocketAddr {
        self.listening
    }

    /// Shows others this certificate of ours from here on.
    pub async fn renew(&self, certificate: SignedCertificate) {
        // A mesh that has stopped shows nothing.
        let _ = self.commands.send(Command::Certificate(certificate)).await;
    }

    /// `None` when the mesh has stopped.
    pub async fn snapshot(&self) -> Option<Snapshot> {
        self.ask(Command::Snapshot).await
    }

    /// `None` when the mesh has stopped.
    pub async fn knowledge(&self, hash: StorePathHash) -> Option<Knowledge> {
        self.ask(|answer| Command::Knowledge(hash, answer)).await
    }

    /// Says goodbye to everyone and ends the loop.
    pub async fn shutdown(&self) {
        self.ask(Command::Shutdown).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.commands.send(command(sender)).await.ok()?;
        answer.await.ok()
    }
}

/// Withdraws a lookup whose asker went away.
struct Withdraw {
    asked: Option<(LookupId, StorePathHash)>,
    commands: mpsc::Sender<Command>,
}

impl Drop for Withdraw {
    fn drop(&mut self) {
        if let Some((id, hash)) = self.asked {
            // When the loop is that busy, the lookup ends by its own deadline.
            let _ = self.commands.try_send(Command::Cancel(id, hash));
        }
    }
}

struct Loop {
    me: PeerId,
    clock: Clock,
    mind: Mesh,
    index: SqliteIndex,
    network: Network,
    place: Place,
    /// What is announced where this node is heard; `None` where it is never.
    mdns: Option<discovery::Config>,
    discovery: Option<Discovery>,
    /// `None` where netlink cannot be had.
    roaming: Option<Roaming>,
    alarm: Alarm,
    /// When the network changed or the machine woke last.
    unsettled_since: Option<Instant>,
    /// Peers that owe an answer, and since when.
    asked: BTreeMap<PeerId, Instant>,
    commands: mpsc::Receiver<Command>,
    shared: Arc<dyn LocalStore>,
    caches: Arc<WebCaches>,
    store_events: mpsc::Receiver<StoreEvent>,
    /// Paths heard of before the first complete set; `None` afterwards.
    first_set: Option<Vec<StorePathHash>>,
    revocations: Option<RevocationsFile>,
    /// Of the list that was kept last; 0 before the first.
    revocations_number: u64,
    /// The list that could not be written.
    unkept_revocations: Option<SignedRevocations>,
    /// Results of tasks that the loop started.
    results_sender: mpsc::Sender<TaskResult>,
    results: mpsc::Receiver<TaskResult>,
    /// Of peers that asked since they were linked.
    local_reads: BTreeMap<PeerId, Arc<Semaphore>>,
    seeds: Vec<String>,
    /// Addresses of a seed that are being dialled, to know it by when it answers.
    seed_dials: BTreeMap<SocketAddr, usize>,
    lookups: BTreeMap<LookupId, oneshot::Sender<LookupOutcome>>,
    fetches: BTreeMap<FetchId, mpsc::Sender<Order>>,
    refusals_told: BTreeSet<(PeerId, Refusal)>,
    members: watch::Sender<Arc<BTreeSet<PeerId>>>,
    shutdown: Option<oneshot::Sender<()>>,
}

/// What a task that the loop started comes back with.
enum TaskResult {
    Input(Input),
    SeedResolved { seed: usize, address: SocketAddr },
}

impl Loop {
    async fn new(
        identity: &Identity,
        shared: Arc<dyn LocalStore>,
        options: Options,
        commands: mpsc::Receiver<Command>,
        members: watch::Sender<Arc<BTreeSet<PeerId>>>,
    ) -> Result<(Loop, SocketAddr), MeshError> {
        let me = PeerId::from_public_key(identity.public_key());
        let clock = Clock::new();
        let index = match &options.index_file {
            Some(file) => SqliteIndex::open(file)?,
            None => SqliteIndex::in_memory()?,
        };
        let limits = links::Limits::new(wire::FRAME_BYTES_MAX);
        let mut network = Network::new(identity, &options.listen, limits, options.crowd)?;
        let listening = match options.listen.first() {
            Some(_) => first_address(&mut network).await,
            // A node by itself, which only asks anchors and upstreams.
            None => SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        let mut place = options.place;
        network.keep_within(place.reach.clone());
        let mdns = options.mdns.map(|mdns| discovery::Config {
            me: identity.peer_id(),
            version: PROTOCOL_VERSION,
            mesh_tag: mdns.mesh_tag,
            listen_port: listening.port(),
            transfer_port: mdns.transfer_port,
            mdns_port: mdns.port,
            is_public: mdns.is_public,
            finds_strangers: options.caches.strangers().is_some(),
            interfaces: mdns.interfaces,
        });
        let discovery = mdns
            .as_ref()
            .and_then(|mdns| reach::begin(mdns, &place.reach.borrow_and_update()));
        let mut seed = [0u8; 8];
        getrandom::fill(&mut seed).map_err(MeshError::NoRandomness)?;
        let now = clock.now();
        let mind = Mesh::new(me, options.mind, u64::from_ne_bytes(seed), now);
        let (results_sender, results) = mpsc::channel(COMMANDS_MAX);
        let mut mesh = Loop {
            me,
            clock,
            mind,
            index,
            network,
            place,
            mdns,
            discovery,
            roaming: Roaming::new()
                .inspect_err(|error| warn!(%error, "changes of the network will not be noticed"))
                .ok(),
            alarm: Alarm::every(ALARM_INTERVAL).map_err(MeshError::Alarm)?,
            unsettled_since: None,
            asked: BTreeMap::new(),
            commands,
            store_events: shared.watch(),
            shared,
            caches: options.caches,
            first_set: Some(Vec::new()),
            revocations: options.revocations,
            revocations_number: 0,
            unkept_revocations: None,
            results_sender,
            results,
            local_reads: BTreeMap::new(),
            seeds: options.seeds,
            seed_dials: BTreeMap::new(),
            lookups: BTreeMap::new(),
            fetches: BTreeMap::new(),
            refusals_told: BTreeSet::new(),
            members,
            shutdown: None,
        };
        // Before anybody is let in, or remembered.
        mesh.read_revocations()?;
        mesh.think(Input::ClockRead { unix: unix_time() });
        mesh.tell_own_addresses();
        Ok((mesh, listening))
    }

    /// Tells the mind where others can reach this node.
    fn tell_own_addresses(&mut self) {
        let mut addresses = self.network.listening();
        addresses.retain(|address| is_reachable(address.ip()));
        self.think(Input::OwnAddresses { addresses });
    }

    async fn run(&mut self) {
        let mut clock_read = tokio::time::interval(CLOCK_INTERVAL);
        clock_read.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while self.shutdown.is_none() {
            let now = self.clock.now();
            let deadline = self
                .mind
                .deadline()
                .map(|(at, _)| at.saturating_duration_since(now));
            let asked_first = self.asked.values().min();
            let patience = asked_first.map(|since| ANSWER_PATIENCE.saturating_sub(since.elapsed()));
            tokio::select! {
                event = self.network.next() => self.network_event(event),
                event = next_discovery(&mut self.discovery) => self.discovery_event(event),
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command),
                    // Nobody holds a handle: the start was given up halfway.
                    None => break,
                },
                Some(event) = self.store_events.recv() => self.store_event(event),
                Some(result) = self.results.recv() => self.task_result(result),
                () = revocations::changed(&mut self.revocations) => self.revocations_changed(),
                () = network_changed(&mut self.roaming) => self.network_changed(),
                () = reach::decided(&mut self.place) => self.reach_decided(),
                // What it wakes for is looked at below.
                () = self.alarm.rings() => {}
                () = sleep(patience) => self.doubt_silent(),
                _ = clock_read.tick() => {
                    self.keep_unkept_revocations();
                    self.think(Input::ClockRead { unix: unix_time() });
                }
                () = sleep(deadline) => self.think(Input::Tick),
            }
            if self.clock.woke() {
                info!("machine woke from sleep");
                self.think(Input::ClockRead { unix: unix_time() });
                self.look_around();
                self.think(Input::Woke);
            }
        }
        self.think(Input::Shutdown);
        let farewell = async {
            // Only moving the network carries the goodbyes out.
            loop {
                self.network.next().await;
            }
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
        if let Some(discovery) = self.discovery.take() {
            discovery.shutdown().await;
        }
    }

    /// Gives the mind an input and carries out everything it wants.
    fn think(&mut self, input: Input) {
        self.mind.handle(&mut self.index, input, self.clock.now());
        while let Some(output) = self.mind.poll() {
            self.obey(output);
        }
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Dial { peer, addresses } => match identity::peer_id_of(peer.as_public_key()) {
                Some(id) => self.network.dial(id, addresses),
                None => debug!(%peer, "could not dial a peer whose key is no point of the curve"),
            },
            Output::DialSeed { seed } => self.dial_seed(seed),
            Output::Hangup { peer, refusal } => {
                if let Some(refusal) = refusal {
                    self.log_refusal(peer, refusal);
                }
                if let Some(id) = identity::peer_id_of(peer.as_public_key()) {
                    self.network.hangup(id);
                }
            }
            Output::Send { peer, message } => self.send(peer, &message),
            Output::Admitted { peer, certificate } => {
                info!(%peer, name = %certificate.name, "linked a member");
                if let Some(id) = identity::peer_id_of(peer.as_public_key()) {
                    self.network.admitted(&id);
                }
                self.members.send_modify(|members| {
                    Arc::make_mut(members).insert(peer);
                });
            }
            Output::KeepRevocations { list } => self.keep_revocations(&list),
            Output::Departed { peer } => {
                info!(%peer, "lost the link to a member");
                self.local_reads.remove(&peer);
                self.members.send_modify(|members| {
                    Arc::make_mut(members).remove(&peer);
                });
            }
            Output::ReadLocal {
                peer,
                request,
                hashes,
            } => self.read_local(peer, request, hashes),
            Output::LookupDone { lookup, outcome } => {
                if let Some(answer) = self.lookups.remove(&lookup) {
                    // Whoever asked may have gone.
                    let _ = answer.send(outcome);
                }
            }
            Output::AskCache {
                cache,
                request,
                hashes,
            } => self.ask_cache(cache, request, hashes),
            Output::Transfer {
                fetch,
                attempt,
                source,
                ..
            } => self.order(fetch, Order::Open { attempt, source }),
            Output::StopTransfer { fetch, attempt } => {
                // It stalled: the provider may be gone, and its next lookup need not find that out.
                self.network.doubt(|_| true);
                self.order(fetch, Order::Stop { attempt });
            }
            Output::FetchFailed { fetch } => {
                self.order(fetch, Order::Fail);
                self.fetches.remove(&fetch);
            }
        }
    }

    /// Says each refusal aloud once, so that a stranger cannot fill the log; all are counted.
    fn log_refusal(&mut self, peer: PeerId, refusal: Refusal) {
        let is_news = self.refusals_told.len() < REFUSALS_TOLD_MAX
            && self.refusals_told.insert((peer, refusal));
        if is_news {
            warn!(%peer, %refusal, "refused a peer");
        } else {
            debug!(%peer, %refusal, "refused a peer");
        }
    }

    fn order(&mut self, fetch: FetchId, order: Order) {
        // A full channel belongs to a task that hears nothing any more; dropping it ends the fetch.
        if let Some(orders) = self.fetches.get(&fetch)
            && orders.try_send(order).is_err()
        {
            self.fetches.remove(&fetch);
        }
    }

    fn send(&mut self, peer: PeerId, message: &Message) {
        let Some(id) = identity::peer_id_of(peer.as_public_key()) else {
            return;
        };
        if let Err(error) = self.network.send(id, Bytes::from(wire::encode(message))) {
            // A peer that reads too slowly loses the link: what it misses it pulls when it is back.
            debug!(%peer, message = message.kind(), %error, "could not send");
            self.network.hangup(id);
        } else if matches!(message, Message::Lookup { .. }) {
            self.asked.entry(peer).or_insert_with(Instant::now);
        }
    }

    fn dial_seed(&mut self, seed: usize) {
        let Some(host) = self.seeds.get(seed).cloned() else {
            return;
        };
        let results = self.results_sender.clone();
        tokio::spawn(async move {
            // The first address only: a seed is one place. Resolving blocks, so it has a task.
            let resolved = tokio::net::lookup_host(&host).await;
            let address = resolved.ok().and_then(|mut addresses| addresses.next());
            let result = match address {
                Some(address) => TaskResult::SeedResolved { seed, address },
                None => {
                    debug!(seed = host, "could not resolve a configured peer");
                    TaskResult::Input(Input::SeedFailed { seed })
                }
            };
            // The loop may have ended meanwhile.
            let _ = results.send(result).await;
        });
    }

    fn read_local(&mut self, peer: PeerId, request: u64, hashes: Vec<StorePathHash>) {
        let shared = self.shared.clone();
        let results = self.results_sender.clone();
        let permits = self
            .local_reads
            .entry(peer)
            .or_insert_with(|| Arc::new(Semaphore::new(LOCAL_READS_MAX)))
            .clone();
        tokio::spawn(async move {
            let Ok(_permit) = permits.acquire_owned().await else {
                return;
            };
            let read = shared.path_infos(hashes.clone()).await;
            let infos = read.unwrap_or_else(|error| {
                warn!(%error, "could not read the store for a peer");
                Vec::new()
            });
            let mut infos = infos.into_iter();
            let answer = |hash| Answer {
                hash,
                narinfo: infos
                    .next()
                    .flatten()
                    .map(|info| info.to_narinfo().to_text(shared.dir())),
            };
            let answers = hashes.into_iter().map(answer).collect();
            let input = Input::LocalAnswers {
                peer,
                request,
                answers,
            };
            // The loop may have ended meanwhile.
            let _ = results.send(TaskResult::Input(input)).await;
        });
    }

    fn ask_cache(&mut self, cache: usize, request: u64, hashes: Vec<StorePathHash>) {
        let caches = self.caches.clone();
        let results = self.results_sender.clone();
        tokio::spawn(async move {
            let mut left = hashes.len();
            let mut answers = std::pin::pin!(caches.narinfos(cache, hashes));
            while let Some(answer) = answers.next().await {
                left -= 1;
                let input = Input::CacheAnswers {
                    cache,
                    request,
                    answers: vec![answer],
                };
                if results.send(TaskResult::Input(input)).await.is_err() {
                    return;
                }
            }
            if left > 0 {
                let input = Input::CacheFailed { cache, request };
                // The loop may have ended meanwhile.
                let _ = results.send(TaskResult::Input(input)).await;
            }
        });
    }

    fn cache_views(&self) -> Vec<(Arc<str>, CacheView)> {
        let views = self.mind.caches(self.clock.now()).into_iter().enumerate();
        let named = views.filter_map(|(cache, view)| Some((self.caches.name(cache)?, view)));
        named.collect()
    }

    fn task_result(&mut self, result: TaskResult) {
        match result {
            TaskResult::Input(input) => self.think(input),
            TaskResult::SeedResolved { seed, address } => {
                self.seed_dials.insert(address, seed);
                self.network.dial_unknown(address);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Lookup { hash, id, answer } => {
                self.lookups.insert(id, answer);
                self.think(Input::Lookup { lookup: id, hash });
            }
            Command::Cancel(lookup, hash) => {
                self.lookups.remove(&lookup);
                self.think(Input::CancelLookup { lookup, hash });
            }
            Command::Fetch {
                id,
                narinfo,
                orders,
            } => {
                self.fetches.insert(id, orders);
                self.think(Input::Fetch { fetch: id, narinfo });
            }
            Command::Report(input) => {
                if let Input::TransferEnded {
                    outcome: Err(Blame::Peer),
                    ..
                } = &input
                {
                    self.network.doubt(|_| true);
                }
                self.think(input);
            }
            Command::FetchDone(fetch) => {
                self.fetches.remove(&fetch);
                self.think(Input::FetchDone { fetch });
            }
            Command::Certificate(certificate) => self.think(Input::Certificate { certificate }),
            Command::Snapshot(answer) => {
                let _ = answer.send(Snapshot {
                    head: self.mind.head(),
                    paths: self.index.count(&self.me),
                    peers: self.mind.peers(&self.index, self.clock.now()),
                    caches: self.cache_views(),
                    refusals: self.mind.refusals().collect(),
                    revocations: self
                        .mind
                        .revocations()
                        .map_or(0, |list| list.claims().number),
                    foreign_announcements: self
                        .discovery
                        .as_ref()
                        .map_or(0, Discovery::foreign_total),
                    malformed_announcements: self
                        .discovery
                        .as_ref()
                        .map_or(0, Discovery::malformed_total),
                    silent: self.silent(),
                    index_errors: self.index.errors(),
                });
            }
            Command::Knowledge(hash, answer) => {
                let now = self.clock.now();
                let mut announced_by = self.index.providers((&hash).into());
                announced_by.retain(|peer| *peer != self.me);
                let _ = answer.send(Knowledge {
                    announced_by,
                    usable: self.mind.providers(&self.index, &hash, now),
                    peers: self.mind.peers(&self.index, now),
                });
            }
            Command::Shutdown(done) => self.shutdown = Some(done),
        }
    }

    fn store_event(&mut self, event: StoreEvent) {
        let hashes = |infos: Vec<crate::store::PathInfo>| -> Vec<StorePathHash> {
            infos
                .into_iter()
                .map(|info| info.store_path.hash())
                .collect()
        };
        match (event, &mut self.first_set) {
            (StoreEvent::Added(infos), Some(set)) => set.extend(hashes(infos)),
            (StoreEvent::Removed(gone), Some(set)) => set.retain(|hash| !gone.contains(hash)),
            (StoreEvent::Complete, set) => {
                let all = set.take().unwrap_or_default();
                info!(paths = all.len(), "read the store");
                self.think(Input::LocalPaths { all });
            }
            (StoreEvent::Added(infos), None) => {
                self.think(Input::LocalChanged {
                    added: hashes(infos),
                    removed: Vec::new(),
                });
            }
            (StoreEvent::Removed(removed), None) => {
                self.think(Input::LocalChanged {
                    added: Vec::new(),
                    removed,
                });
            }
        }
    }

    fn frame(&mut self, id: libp2p::PeerId, bytes: &[u8]) {
        let Some(key) = identity::ed25519_of(&id) else {
            return;
        };
        let began = Instant::now();
        let peer = PeerId::from_public_key(key);
        self.asked.remove(&peer);
        let mut narinfos = 0;
        match wire::decode(bytes) {
            Ok(message) => {
                if let Message::Lookup { hashes, .. } = &message {
                    narinfos = hashes.len();
                }
                self.think(Input::Received { peer, message });
            }
            Err(error) => {
                debug!(%peer, %error, "received garbage");
                self.think(Input::Garbage { peer });
            }
        }
        let cost = Cost::of_frame(bytes.len(), began.elapsed(), narinfos);
        self.network.charge(id, cost);
    }

    fn network_event(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Listening(address) => {
                debug!(%address, "listening for peers");
                self.tell_own_addresses();
            }
            NetworkEvent::NotListening(address) => {
                debug!(%address, "stopped listening for peers");
                self.tell_own_addresses();
            }
            NetworkEvent::LinkUp {
                peer,
                remote,
                outbound,
            } => {
                let Some(key) = identity::ed25519_of(&peer) else {
                    // Another kind of key cannot be certified.
                    return self.network.hangup(peer);
                };
                self.network.charge(peer, Cost::of_link());
                let seed = self.seed_dials.remove(&remote);
                let peer = PeerId::from_public_key(key);
                self.think(Input::LinkUp {
                    peer,
                    address: remote,
                    outbound,
                    seed,
                });
            }
            NetworkEvent::LinkDown { peer, reason } => {
                if let Some(key) = identity::ed25519_of(&peer) {
                    let peer = PeerId::from_public_key(key);
                    self.asked.remove(&peer);
                    debug!(%peer, %reason, "link ended");
                    if reason.is_violation() {
                        self.think(Input::Garbage { peer });
                    }
                    self.think(Input::LinkDown { peer });
                    let is_unsettled = self
                        .unsettled_since
                        .is_some_and(|since| since.elapsed() < UNSETTLED);
                    if is_unsettled && matches!(reason, DownReason::Unresponsive) {
                        // The change took it, so the change is what there is to get over.
                        self.think(Input::NetworkChanged);
                    }
                }
            }
            NetworkEvent::Frame { peer, bytes } => self.frame(peer, &bytes),
            NetworkEvent::DialFailed {
                peer,
                addresses,
                reason,
            } => {
                debug!(?peer, ?addresses, %reason, "dial failed");
                let peer = peer
                    .as_ref()
                    .and_then(identity::ed25519_of)
                    .map(PeerId::from_public_key);
                for address in addresses {
                    let Some(seed) = self.seed_dials.remove(&address) else {
                        continue;
                    };
                    self.think(match (&reason, peer) {
                        (DialError::AlreadyLinked, Some(peer)) => Input::SeedFound { seed, peer },
                        _ => Input::SeedFailed { seed },
                    });
                }
                if let Some(peer) = peer {
                    self.think(Input::DialFailed { peer });
                }
            }
        }
    }
}

/// Whether an address of this machine means anything to another.
pub fn is_reachable(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        // A scope is needed to dial these, and libp2p knows none.
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || is_link_local)
}

/// Waits until the swarm knows its port; other nodes must be told one that works.
async fn first_address(network: &mut Network) -> SocketAddr {
    loop {
        if let Some(address) = network.listening().first() {
            return *address;
        }
        network.next().await;
    }
}

async fn next_discovery(discovery: &mut Option<Discovery>) -> DiscoveryEvent {
    match discovery {
        Some(discovery) => discovery.next().await,
        None => std::future::pending().await,
    }
}

async fn network_changed(roaming: &mut Option<Roaming>) {
    match roaming {
        Some(roaming) => roaming.changed().await,
        None => std::future::pending().await,
    }
}

async fn sleep(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}
