//! Assembly: one NAR, brought together from one or several peers while Nix reads it.
//!
//! The mind says from whom; this moves the bytes, reports how far it got, and continues elsewhere at
//! the same byte. It always starts at byte 0, even for a later range, since only the whole NAR can
//! be proved. When the whole turns out wrong, it depends on what Nix has: nothing yet, and another
//! round begins without the liar; something, and the answer is cut and its continuation refused
//! ([`Tainted`]), because right bytes after wrong ones would make Nix fail on the hash.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::Either;
use granary_protocol::mesh::Source;
use granary_protocol::narinfo::VerifiedNarInfo;
use granary_protocol::store_path::StorePathHash;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::activity::{self, Activity};
use crate::binary_cache::{
    HeldBack, Origin, PeerCaches, Transfer, TransferError, Wanted, WebCaches, WrongBytes,
};
use crate::mesh::{Fetch, MeshHandle, Order};
use crate::metrics::{Counter, Metrics, SourceKind};

/// How often a running transfer is reported to the mind: well within its stall timeout of 2 s.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Wrong NARs after which a fetch is given up. Each puts a liar in quarantine; more of them hold the
/// same path only in a mesh that has other troubles.
const LIES_MAX: u32 = 3;

/// How long a NAR waits for a place at providers that are busy, and how often it asks. Nix waits
/// 300 s for a byte, and builds what it is refused.
const BUSY_PATIENCE: Duration = Duration::from_secs(120);
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// How long the continuation of a cut answer is refused. Nix retries within about five seconds.
const TAINTED_FOR: Duration = Duration::from_secs(30);

/// Cut answers remembered.
const TAINTED_MAX: usize = 256;

/// A NAR on its way to Nix could not be brought to its end; the connection is cut.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Cut {
    #[error("every source of the nar failed")]
    NoSource,
    #[error("every source of the nar is busy")]
    Busy,
    #[error(transparent)]
    Wrong(#[from] WrongBytes),
}

/// NARs of which Nix was given wrong bytes a moment ago.
#[derive(Default)]
pub struct Tainted(Mutex<VecDeque<(StorePathHash, Instant)>>);

impl Tainted {
    pub fn contains(&self, hash: &StorePathHash) -> bool {
        let tainted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tainted
            .iter()
            .any(|(one, since)| one == hash && since.elapsed() < TAINTED_FOR)
    }

    fn insert(&self, hash: StorePathHash) {
        let mut tainted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tainted.retain(|(_, since)| since.elapsed() < TAINTED_FOR);
        if tainted.len() == TAINTED_MAX {
            tainted.pop_front();
        }
        tainted.push_back((hash, Instant::now()));
    }
}

/// What every assembly works with.
#[derive(Clone)]
pub struct Sources {
    pub mesh: MeshHandle,
    pub peers: Arc<PeerCaches>,
    pub caches: Arc<WebCaches>,
    pub metrics: Arc<Metrics>,
    pub activity: Arc<Activity>,
    pub tainted: Arc<Tainted>,
    /// Whatever brings bytes ends before the mesh does.
    pub tasks: TaskTracker,
}

/// Brings one NAR and passes `from..to` of it on.
pub struct Assembly {
    sources: Sources,
    transfer: activity::Transfer,
    narinfo: Arc<VerifiedNarInfo>,
    from: u64,
    to: u64,
    sender: mpsc::Sender<Result<Bytes, Cut>>,
}

/// How an attempt to transfer ended.
enum Attempt {
    /// Every promised byte arrived.
    Complete,
    Failed(TransferError),
    /// The mind gave an order meanwhile.
    Ordered(Order),
    /// Nobody reads any more.
    Unwanted,
    Wrong(WrongBytes),
}

impl Assembly {
    pub fn new(
        sources: Sources,
        narinfo: Arc<VerifiedNarInfo>,
        range: Range<u64>,
        sender: mpsc::Sender<Result<Bytes, Cut>>,
    ) -> Assembly {
        let path = narinfo.narinfo().store_path.to_string();
        Assembly {
            transfer: sources.activity.begin(path, narinfo.narinfo().nar_size),
            sources,
            narinfo,
            from: range.start,
            to: range.end,
            sender,
        }
    }

    /// Works until the NAR is delivered and proved, cannot be, or is not wanted any more.
    pub async fn run(self) {
        let started = Instant::now();
        let mut lies = 0;
        loop {
            let fetch = self.sources.mesh.fetch(self.narinfo.clone()).await;
            let mut held = HeldBack::new(self.wanted());
            let Err(cut) = self.round(fetch, &mut held).await else {
                return;
            };
            let has_passed_on = held.released() > self.from;
            match &cut {
                Cut::Wrong(_) if !has_passed_on && lies < LIES_MAX => lies += 1,
                Cut::Busy if !has_passed_on && started.elapsed() < BUSY_PATIENCE => {
                    tokio::select! {
                        () = tokio::time::sleep(BUSY_PAUSE) => {}
                        () = self.sender.closed() => return,
                    }
                }
                _ => {
                    if matches!(cut, Cut::Wrong(_)) && has_passed_on {
                        self.sources.tainted.insert(self.wanted().store_path_hash);
                    }
                    // A reader that is gone needs no word.
                    let _ = self.sender.send(Err(cut)).await;
                    return;
                }
            }
        }
    }

    /// Fetches from byte 0 to the end, from as many providers as it takes.
    async fn round(&self, mut fetch: Fetch, held: &mut HeldBack) -> Result<(), Cut> {
        let hash = self.wanted().store_path_hash;
        let started = Instant::now();
        let mut order = fetch.order().await;
        let mut is_busy = false;
        // Nobody can tell which of them lied.
        let mut contributors = Vec::new();
        let last = loop {
            let (attempt, from) = match order {
                Order::Open { attempt, source } => (attempt, source),
                Order::Stop { .. } => {
                    order = fetch.order().await;
                    continue;
                }
                Order::Fail => {
                    debug!(%hash, at = held.at(), "no source is left for a nar");
                    return Err(if is_busy { Cut::Busy } else { Cut::NoSource });
                }
            };
            let mut held_up = Duration::ZERO;
            let opened = {
                let open = self.open(&from, held.at());
                let open = std::pin::pin!(open);
                match futures::future::select(open, std::pin::pin!(fetch.change())).await {
                    Either::Left((opened, _)) => Ok(opened),
                    Either::Right((ordered, _)) => Err(ordered),
                }
            };
            let outcome = match opened {
                Ok(Ok(transfer)) => {
                    let origin = self.origin(&from).to_string();
                    if !contributors.contains(&origin) {
                        contributors.push(origin);
                    }
                    let count = self.kind(&from).nar_bytes(&self.sources.metrics);
                    self.pump(&mut fetch, attempt, transfer, count, held, &mut held_up)
                        .await
                }
                Ok(Err(error)) => Attempt::Failed(error),
                Err(ordered) => Attempt::Ordered(ordered),
            };
            match outcome {
                Attempt::Complete => {
                    fetch.progress(attempt, held.at(), held_up).await;
                    fetch.ended(attempt, Ok(())).await;
                    break self.kind(&from);
                }
                Attempt::Failed(error) => {
                    is_busy |= error.is_busy();
                    let from = self.origin(&from);
                    info!(%hash, %from, at = held.at(), %error, "transfer failed");
                    fetch.progress(attempt, held.at(), held_up).await;
                    fetch.ended(attempt, Err(error.blame())).await;
                    order = fetch.order().await;
                }
                Attempt::Ordered(ordered) => {
                    let from = self.origin(&from);
                    info!(%hash, %from, at = held.at(), "stopped a transfer");
                    order = ordered;
                }
                Attempt::Unwanted => return Ok(()),
                Attempt::Wrong(wrong) => {
                    fetch.progress(attempt, held.at(), held_up).await;
                    return Err(self.blame(fetch, wrong, &contributors).await);
                }
            }
        };
        let (mut position, mut held_up) = (held.released(), Duration::ZERO);
        let rest = match held.finish() {
            Ok(rest) => rest,
            Err(wrong) => return Err(self.blame(fetch, wrong, &contributors).await),
        };
        for bytes in rest {
            let length = bytes.len() as u64;
            if !self.pass_on(None, position, bytes, &mut held_up).await {
                return Ok(());
            }
            position += length;
        }
        last.nars(&self.sources.metrics).add(1);
        let (bytes, elapsed_ms) = (self.wanted().nar_size, started.elapsed().as_millis() as u64);
        info!(%hash, source = last.word(), bytes, elapsed_ms, "fetched nar");
        Ok(())
    }

    async fn open(&self, from: &Source, at: u64) -> Result<Transfer<'_>, TransferError> {
        match from {
            Source::Peer { peer, address } => {
                let opened = self
                    .sources
                    .peers
                    .nar(*peer, *address, self.wanted(), at)
                    .await;
                opened.map(Transfer::Member)
            }
            Source::Cache { cache, narinfo } => {
                self.sources
                    .caches
                    .transfer(*cache, narinfo.narinfo(), at)
                    .await
            }
        }
    }

    fn kind(&self, from: &Source) -> SourceKind {
        match from {
            Source::Peer { .. } => SourceKind::Peer,
            Source::Cache { cache, .. } => SourceKind::of(self.sources.caches.roles().get(*cache)),
        }
    }

    fn origin(&self, from: &Source) -> Origin {
        match from {
            Source::Peer { peer, .. } => Origin::Peer(*peer),
            Source::Cache { cache, .. } => {
                Origin::Cache(self.sources.caches.name(*cache).unwrap_or_default())
            }
        }
    }

    /// Moves one transfer's bytes until it ends, one way or another.
    async fn pump(
        &self,
        fetch: &mut Fetch,
        attempt: u32,
        mut transfer: Transfer<'_>,
        count: &Counter,
        held: &mut HeldBack,
        held_up: &mut Duration,
    ) -> Attempt {
        let mut reported = None::<Instant>;
        loop {
            let bytes = tokio::select! {
                biased;
                ordered = fetch.change() => return Attempt::Ordered(ordered),
                bytes = transfer.next() => bytes,
                () = self.sender.closed() => return Attempt::Unwanted,
            };
            let bytes = match bytes {
                Ok(Some(bytes)) => bytes,
                // What the head promised is what was missing, so the end is completion.
                Ok(None) => return Attempt::Complete,
                Err(error) => return Attempt::Failed(error),
            };
            count.add(bytes.len() as u64);
            if let Some(peer) = transfer.peer() {
                self.sources
                    .metrics
                    .traffic
                    .received(&peer, bytes.len() as u64);
            }
            if let Err(wrong) = held.push(bytes) {
                return Attempt::Wrong(wrong);
            }
            self.transfer.progress(held.at(), transfer.peer());
            if reported.is_none_or(|reported| reported.elapsed() >= PROGRESS_INTERVAL) {
                fetch.progress(attempt, held.at(), *held_up).await;
                reported = Some(Instant::now());
            }
            loop {
                let position = held.released();
                let Some(bytes) = held.release() else { break };
                if !self
                    .pass_on(Some((fetch, attempt, held.at())), position, bytes, held_up)
                    .await
                {
                    return Attempt::Unwanted;
                }
            }
            // Known here already; waiting for the end of the body would let an order come between.
            if held.at() == self.wanted().nar_size {
                return Attempt::Complete;
            }
        }
    }

    /// Sends what `from..to` covers of `bytes`, which begin at `position`. False when nobody reads.
    ///
    /// While Nix does not read, the mind is told how far the `running` transfer is and how long it was
    /// `held_up`, so that it does not take the provider for stalled or slow.
    async fn pass_on(
        &self,
        running: Option<(&Fetch, u32, u64)>,
        position: u64,
        bytes: Bytes,
        held_up: &mut Duration,
    ) -> bool {
        let end = position + bytes.len() as u64;
        let first = self.from.clamp(position, end);
        let last = self.to.clamp(first, end);
        // Both offsets are at most the length of `bytes`.
        let bytes = bytes.slice((first - position) as usize..(last - position) as usize);
        if bytes.is_empty() {
            return !self.sender.is_closed();
        }
        if let Ok(permit) = self.sender.try_reserve() {
            permit.send(Ok(bytes));
            return true;
        }
        loop {
            let since = Instant::now();
            let reserved = tokio::time::timeout(PROGRESS_INTERVAL, self.sender.reserve()).await;
            *held_up += since.elapsed();
            match reserved {
                Ok(Ok(permit)) => {
                    permit.send(Ok(bytes));
                    return true;
                }
                Ok(Err(_)) => return false,
                Err(_) => {
                    if let Some((fetch, attempt, at)) = running {
                        fetch.progress(attempt, at, *held_up).await;
                    }
                }
            }
        }
    }

    async fn blame(&self, fetch: Fetch, wrong: WrongBytes, contributors: &[String]) -> Cut {
        self.sources.metrics.nars_mismatched.add(1);
        let from = contributors.join(", ");
        warn!(%from, error = %wrong, "received a nar with wrong bytes");
        fetch.mismatch().await;
        Cut::Wrong(wrong)
    }

    fn wanted(&self) -> Wanted {
        let narinfo = self.narinfo.narinfo();
        Wanted {
            store_path_hash: narinfo.store_path.hash(),
            nar_hash: narinfo.nar_hash,
            nar_size: narinfo.nar_size,
        }
    }
}
