//! Downloads: one for each NAR on its way, however many clients wait for it.
//!
//! An [`Assembly`](super::assembly) brings the bytes once, in the order in which Nix reads; every reader takes them
//! from a window over them at a pace of its own. As long as the window holds what a newcomer wants
//! to begin with, it joins; later it gets a download of its own. Who reads so slowly that others would wait for
//! it is let go, and goes on with a download of its own where it stands. Nothing is kept on disk: a disk that is
//! full or hangs must not come between Nix and a peer.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::VerifiedNarInfo;
use granary_protocol::store_path::StorePathHash;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use super::assembly::{Assembly, Cut, Sources};

/// Chunks on their way from the assembly to the window.
const CHUNKS_WAITING_MAX: usize = 2;

/// Bytes of a NAR that wait for its slowest reader. Most NARs fit in as a whole, so that whoever asks while one
/// is on its way has a part in it; of a larger one it is what arrives in the first moments.
const WINDOW_BYTES: u32 = 8 << 20;

/// All wide windows together. Beyond it windows are narrow.
const WINDOWS_BYTES_MAX: usize = 64 << 20;

/// A narrow window: enough to keep a socket busy while the next bytes come. 500 slow readers of as many
/// NARs take 125 MiB of it.
const NARROW_WINDOW_BYTES: u32 = 256 << 10;

/// What a chunk counts at least, for the memory that it takes beside its bytes.
const CHUNK_WEIGHT_MIN: u32 = 4096;

/// How long, all in all, others wait for the slowest reader before it is let go.
const PATIENCE: Duration = Duration::from_secs(1);

/// The downloads that can be joined, the newest of each NAR.
pub struct Downloads {
    running: Mutex<BTreeMap<(StorePathHash, NarHash), Arc<Download>>>,
    room: Arc<Semaphore>,
}

struct Download {
    window: Mutex<Window>,
    /// Something is there to read, or never will be.
    arrived: Notify,
    /// Somebody read or left.
    taken: Notify,
    patience: Duration,
    /// The share in [`WINDOWS_BYTES_MAX`] that the window takes.
    _room: Option<OwnedSemaphorePermit>,
}

struct Window {
    /// Chunks with the offsets of their first bytes, without a gap.
    chunks: VecDeque<(u64, Bytes)>,
    start: u64,
    end: u64,
    weight: u64,
    weight_max: u64,
    /// Where each reader stands.
    readers: BTreeMap<u64, u64>,
    next_reader: u64,
    /// How it ended; nothing follows, and nobody joins after a failure.
    ended: Option<Result<(), Cut>>,
}

/// What is to be done about the next bytes.
enum Room {
    Some,
    /// The slowest reader has to read first; `is_felt` when another one waits for more.
    None {
        is_felt: bool,
    },
    /// Nobody reads.
    Unwanted,
}

enum Taken {
    Bytes(Bytes),
    Nothing,
    End,
    Cut(Cut),
    LetGo,
}

/// One client's view of a download: the bytes of its range, in order.
pub struct Reader {
    sources: Sources,
    narinfo: Arc<VerifiedNarInfo>,
    feed: Feed,
    at: u64,
    to: u64,
}

enum Feed {
    Shared {
        download: Arc<Download>,
        reader: u64,
    },
    Alone(mpsc::Receiver<Result<Bytes, Cut>>),
}

impl Default for Downloads {
    fn default() -> Downloads {
        Downloads {
            running: Mutex::default(),
            room: Arc::new(Semaphore::new(WINDOWS_BYTES_MAX)),
        }
    }
}

impl Downloads {
    /// Reads `range` of a NAR, from a download under way where there is one, else from a new one.
    pub fn read(
        self: &Arc<Downloads>,
        sources: Sources,
        narinfo: Arc<VerifiedNarInfo>,
        range: Range<u64>,
    ) -> Reader {
        let size = narinfo.narinfo().nar_size;
        let key = (
            narinfo.narinfo().store_path.hash(),
            narinfo.narinfo().nar_hash,
        );
        let mut running = self.running();
        let joined = running.get(&key).and_then(|download| {
            let reader = download.window().join(range.start)?;
            Some((download.clone(), reader))
        });
        let feed = match joined {
            Some((download, reader)) => Feed::Shared { download, reader },
            None => {
                let wide = u64::from(WINDOW_BYTES).min(size) as u32;
                let room = self.room.clone().try_acquire_many_owned(wide).ok();
                let window = room.as_ref().map_or(NARROW_WINDOW_BYTES, |_| wide);
                let download = Arc::new(Download::new(window, PATIENCE, room));
                let reader = download.window().add_reader(range.start);
                // The whole, as only the whole can be proved: it serves every range.
                let chunks = assemble(&sources, narinfo.clone(), 0..size);
                running.insert(key, download.clone());
                let (downloads, running) = (self.clone(), download.clone());
                sources.tasks.spawn(async move {
                    running.fill(chunks, size).await;
                    running.wait_for_readers().await;
                    downloads.forget(&key, &running);
                });
                Feed::Shared { download, reader }
            }
        };
        Reader {
            sources,
            narinfo,
            feed,
            at: range.start,
            to: range.end,
        }
    }

    fn forget(&self, key: &(StorePathHash, NarHash), ended: &Arc<Download>) {
        let mut running = self.running();
        if running
            .get(key)
            .is_some_and(|download| Arc::ptr_eq(download, ended))
        {
            running.remove(key);
        }
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<(StorePathHash, NarHash), Arc<Download>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn assemble(
    sources: &Sources,
    narinfo: Arc<VerifiedNarInfo>,
    range: Range<u64>,
) -> mpsc::Receiver<Result<Bytes, Cut>> {
    let (sender, chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
    let assembly = Assembly::new(sources.clone(), narinfo, range, sender);
    sources.tasks.spawn(assembly.run());
    chunks
}

impl Download {
    fn new(window_bytes: u32, patience: Duration, room: Option<OwnedSemaphorePermit>) -> Download {
        let window = Window {
            chunks: VecDeque::new(),
            start: 0,
            end: 0,
            weight: 0,
            weight_max: window_bytes.into(),
            readers: BTreeMap::new(),
            next_reader: 0,
            ended: None,
        };
        Download {
            window: Mutex::new(window),
            arrived: Notify::new(),
            taken: Notify::new(),
            patience,
            _room: room,
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves what arrives into the window, at the pace of the readers, until `to`, a failure, or nobody reads.
    async fn fill(&self, mut chunks: mpsc::Receiver<Result<Bytes, Cut>>, to: u64) {
        let mut felt = Duration::ZERO;
        loop {
            let room = self.window().make_room();
            match room {
                Room::Unwanted => return,
                Room::None { is_felt: false } => self.taken.notified().await,
                Room::None { is_felt: true } => {
                    let since = Instant::now();
                    let patience = self.patience.saturating_sub(felt);
                    match tokio::time::timeout(patience, self.taken.notified()).await {
                        Ok(()) => felt += since.elapsed(),
                        Err(_) => {
                            felt = Duration::ZERO;
                            self.window().let_slowest_go();
                            self.arrived.notify_waiters();
                        }
                    }
                }
                Room::Some => {
                    let chunk = tokio::select! {
                        chunk = chunks.recv() => chunk,
                        // It may have been the last reader.
                        () = self.taken.notified() => continue,
                    };
                    let is_over = self.window().take_in(chunk, to);
                    self.arrived.notify_waiters();
                    if is_over {
                        return;
                    }
                }
            }
        }
    }

    /// Until then it can be joined, if it did not fail.
    async fn wait_for_readers(&self) {
        while !self.window().is_unwanted() {
            self.taken.notified().await;
        }
    }

    fn take(&self, reader: u64, to: u64) -> Taken {
        let taken = self.window().take(reader, to);
        if matches!(taken, Taken::Bytes(_)) {
            self.taken.notify_one();
        }
        taken
    }

    fn leave(&self, reader: u64) {
        self.window().readers.remove(&reader);
        self.taken.notify_one();
    }
}

impl Window {
    /// A place for one more reader, if what it wants is not gone.
    fn join(&mut self, at: u64) -> Option<u64> {
        let is_failed = matches!(self.ended, Some(Err(_)));
        // Without a reader the end has begun.
        (at >= self.start && !is_failed && !self.is_unwanted()).then(|| self.add_reader(at))
    }

    fn add_reader(&mut self, at: u64) -> u64 {
        let reader = self.next_reader;
        self.next_reader += 1;
        self.readers.insert(reader, at);
        reader
    }

    fn is_unwanted(&self) -> bool {
        self.readers.is_empty()
    }

    /// Drops what everybody has read as far as there must be room for more.
    fn make_room(&mut self) -> Room {
        let Some(slowest) = self.readers.values().min().copied() else {
            return Room::Unwanted;
        };
        while self.weight >= self.weight_max
            && let Some((offset, chunk)) = self.chunks.front()
            && offset + chunk.len() as u64 <= slowest
        {
            self.weight -= weight(chunk);
            self.start = offset + chunk.len() as u64;
            self.chunks.pop_front();
        }
        if self.weight < self.weight_max {
            return Room::Some;
        }
        let is_felt = self.readers.values().any(|at| *at >= self.end);
        Room::None { is_felt }
    }

    /// Appends a chunk, or the end. True when nothing follows.
    fn take_in(&mut self, chunk: Option<Result<Bytes, Cut>>, to: u64) -> bool {
        match chunk {
            Some(Ok(chunk)) => {
                self.weight += weight(&chunk);
                let offset = self.end;
                self.end += chunk.len() as u64;
                self.chunks.push_back((offset, chunk));
            }
            Some(Err(cut)) => self.ended = Some(Err(cut)),
            None if self.end == to => self.ended = Some(Ok(())),
            // The assembly was ended from outside.
            None => self.ended = Some(Err(Cut::NoSource)),
        }
        self.ended.is_some()
    }

    fn take(&mut self, reader: u64, to: u64) -> Taken {
        let Some(at) = self.readers.get_mut(&reader) else {
            return Taken::LetGo;
        };
        if *at >= to {
            return Taken::End;
        }
        let next = self.chunks.partition_point(|(offset, _)| offset <= at);
        let chunk = next.checked_sub(1).and_then(|last| self.chunks.get(last));
        if let Some((offset, chunk)) = chunk {
            let end = offset + chunk.len() as u64;
            if *at < end {
                // Both are at most the length of the chunk.
                let bytes = chunk.slice((*at - offset) as usize..(end.min(to) - offset) as usize);
                *at += bytes.len() as u64;
                return Taken::Bytes(bytes);
            }
        }
        match &self.ended {
            None => Taken::Nothing,
            Some(Ok(())) => Taken::End,
            Some(Err(cut)) => Taken::Cut(cut.clone()),
        }
    }

    /// Takes their places from those for whom the first chunk is kept.
    fn let_slowest_go(&mut self) {
        let Some((offset, chunk)) = self.chunks.front() else {
            return;
        };
        let end = offset + chunk.len() as u64;
        self.readers.retain(|_, at| *at >= end);
    }
}

fn weight(chunk: &Bytes) -> u64 {
    (chunk.len() as u64).max(CHUNK_WEIGHT_MIN.into())
}

impl Reader {
    /// The next bytes; `None` after the last. After an error nothing follows. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, Cut>> {
        loop {
            let (download, reader) = match &mut self.feed {
                Feed::Alone(chunks) => return chunks.recv().await,
                Feed::Shared { download, reader } => (download.clone(), *reader),
            };
            let mut arrived = pin!(download.arrived.notified());
            // Before looking, or what arrives in between is missed.
            arrived.as_mut().enable();
            match download.take(reader, self.to) {
                Taken::Bytes(bytes) => {
                    self.at += bytes.len() as u64;
                    return Some(Ok(bytes));
                }
                Taken::Nothing => arrived.await,
                Taken::End => return None,
                Taken::Cut(cut) => return Some(Err(cut)),
                Taken::LetGo => {
                    let range = self.at..self.to;
                    let chunks = assemble(&self.sources, self.narinfo.clone(), range);
                    self.feed = Feed::Alone(chunks);
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Feed::Shared { download, reader } = &self.feed {
            download.leave(*reader);
        }
    }
}

#[cfg(test)]
mod tests;
