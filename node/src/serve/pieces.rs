//! Pieces: the NAR of a local path for a member whose link may be slower than zstd.
//!
//! One task reads the NAR and packs it, a piece ahead of the one that waits for the link; [`Pace`] hears how
//! long each side waits and says in which form the next piece goes. What a link to a member carries is kept
//! for the next NAR, so that a link known to be faster than zstd gets whole NARs as they are, without any of this, and
//! small ones are packed for a link known to be slower.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use granary_protocol::pieces::{
    self, Costs, Form, HEAD_BYTES, LEVELS, OFFER_HEADER, PIECE_BYTES_MAX, Pace, Piece,
};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;
use zstd::bulk::Compressor;

use super::nar::LocalNar;
use super::respond::{self, Body};
use crate::metrics::Metrics;
use crate::store::NarError;

/// A NAR smaller than this fits in a few packets however it is sent.
const NAR_BYTES_MIN: u64 = 4096;

/// How long what a link carried is believed without another look at it: a laptop may change from a cable to
/// Wi-Fi under the same name.
const LINK_KNOWN_FOR: Duration = Duration::from_secs(60);

/// Pieces that wait for the link: it is asked for the next before that one is gone.
const PIECES_WAITING_MAX: usize = 1;

/// What packs the pieces of all streams.
pub struct Packers {
    /// One for each processor: more would only wait for each other. A piece that finds none goes as it is.
    room: Arc<Semaphore>,
    /// Contexts of about 1 MiB, at most one for each place.
    idle: Mutex<Vec<Compressor<'static>>>,
    costs: Mutex<Costs>,
}

/// What the way to one member carries, as far as it was measured.
#[derive(Default)]
pub struct Link(Mutex<Option<(f64, Instant)>>);

/// A piece ready for the link.
struct Made {
    piece: Piece,
    /// With the head before the contents if they are packed, and so in one buffer.
    wire: Bytes,
}

impl Packers {
    pub fn new() -> Arc<Packers> {
        let processors = available_parallelism().map_or(1, usize::from);
        Arc::new(Packers {
            room: Arc::new(Semaphore::new(processors)),
            idle: Mutex::default(),
            costs: Mutex::default(),
        })
    }

    /// Packs a piece on the blocking pool, leaving room for its head; `None` when all places are taken, or zstd fails.
    async fn pack(self: &Arc<Packers>, level: usize, contents: Bytes) -> Option<Vec<u8>> {
        let permit = self.room.clone().try_acquire_owned().ok()?;
        let packers = self.clone();
        let packed = spawn_blocking(move || {
            let _permit = permit;
            packers.pack_here(level, &contents)
        });
        match packed.await {
            Ok(Ok(packed)) => Some(packed),
            Ok(Err(error)) => {
                info!(%error, "could not pack a piece of a nar, sent it as it is");
                None
            }
            Err(_) => None,
        }
    }

    fn pack_here(&self, level: usize, contents: &[u8]) -> std::io::Result<Vec<u8>> {
        let started = Instant::now();
        let mut compressor = match lock(&self.idle).pop() {
            Some(compressor) => compressor,
            None => Compressor::new(LEVELS[0])?,
        };
        compressor.set_compression_level(LEVELS.get(level).copied().unwrap_or(LEVELS[0]))?;
        let mut wire = vec![0; HEAD_BYTES + zstd::zstd_safe::compress_bound(contents.len())];
        let length = compressor.compress_to_buffer(contents, &mut wire[HEAD_BYTES..])?;
        wire.truncate(HEAD_BYTES + length);
        lock(&self.idle).push(compressor);
        let took = started.elapsed();
        lock(&self.costs).measured(level, contents.len(), took);
        Ok(wire)
    }
}

impl Link {
    fn known(&self) -> Option<f64> {
        let known = lock(&self.0).filter(|(_, at)| at.elapsed() < LINK_KNOWN_FOR);
        known.map(|(rate, _)| rate)
    }

    /// Whether pieces are worth a thought: not on a link that was faster than zstd a moment ago.
    fn may_gain(&self, packers: &Packers) -> bool {
        self.known()
            .is_none_or(|rate| !lock(&packers.costs).is_outrun_by(rate))
    }
}

/// Returns the offset from which the sender of a request would take a NAR of `size` bytes in pieces, where that
/// may be of use.
pub fn offered(headers: &HeaderMap, size: u64, packers: &Packers, link: &Link) -> Option<u64> {
    let mut values = headers.get_all(OFFER_HEADER).iter();
    let (value, None) = (values.next()?, values.next()) else {
        return None;
    };
    let text = value.to_str().ok()?;
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let from: u64 = text.parse().ok().filter(|_| is_number)?;
    let is_worth_it = size.checked_sub(from)? >= NAR_BYTES_MIN && link.may_gain(packers);
    is_worth_it.then_some(from)
}

/// Answers with the NAR from byte `from` on, in pieces. `sent` hears of the NAR's bytes as the link takes them.
///
/// `None` for a path that vanished: the first piece is made before the answer begins.
pub async fn respond(
    local: LocalNar,
    from: u64,
    packers: Arc<Packers>,
    link: Arc<Link>,
    metrics: Arc<Metrics>,
    sent: impl Fn(u64) + Send + 'static,
) -> Option<Response<Body>> {
    let size = local.nar.size();
    let pace = Arc::new(Mutex::new(Pace::new(link.known())));
    let (sender, mut made) = mpsc::channel(PIECES_WAITING_MAX);
    let chunks = local.nar.stream(from..size);
    let making = make(chunks, packers, pace.clone(), sender);
    let making = AbortOnDropHandle::new(tokio::spawn(making));
    let first = match made.recv().await {
        Some(Ok(first)) => first,
        Some(Err(error)) => {
            info!(%error, "could not begin a nar");
            return None;
        }
        None => return None,
    };
    let sending = Sending {
        _making: making,
        made,
        next: Some(first),
        contents: None,
        left: size - from,
        pace,
        link,
        metrics,
    };
    let body = stream::unfold((sending, sent), |(mut sending, sent)| async move {
        let mut sent = sent;
        let bytes = sending.step(&mut sent).await?;
        Some((bytes, (sending, sent)))
    });
    let mut response = Response::new(respond::stream(body.boxed()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(pieces::CONTENT_TYPE));
    headers.insert(OFFER_HEADER, HeaderValue::from(from));
    Some(respond::with_ranges(response, true))
}

/// Makes pieces until the NAR ends or nobody takes them.
async fn make(
    mut chunks: impl Stream<Item = Result<Bytes, NarError>> + Unpin,
    packers: Arc<Packers>,
    pace: Arc<Mutex<Pace>>,
    sender: mpsc::Sender<Result<Made, NarError>>,
) {
    while let Some(chunk) = chunks.next().await {
        let mut chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                // Whoever does not wait for it needs no word.
                let _ = sender.send(Err(error)).await;
                return;
            }
        };
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(PIECE_BYTES_MAX as usize));
            let made = make_piece(piece, &packers, &pace).await;
            if sender.send(Ok(made)).await.is_err() {
                return;
            }
        }
    }
}

async fn make_piece(chunk: Bytes, packers: &Arc<Packers>, pace: &Mutex<Pace>) -> Made {
    let bytes = chunk.len();
    let form = lock(pace).form(&lock(&packers.costs));
    if let Form::Packed(level) = form
        && let Some(mut wire) = packers.pack(level, chunk.clone()).await
    {
        let wire_bytes = wire.len() - HEAD_BYTES;
        lock(pace).packed(level, bytes, wire_bytes.min(bytes));
        if wire_bytes < bytes
            && let Some(piece) = Piece::new(wire_bytes, bytes)
        {
            wire[..HEAD_BYTES].copy_from_slice(&piece.to_head());
            let wire = wire.into();
            return Made { piece, wire };
        }
    }
    let piece = Piece::new(bytes, bytes).expect("neither empty nor too large");
    Made { piece, wire: chunk }
}

/// The body of an answer in pieces.
struct Sending {
    _making: AbortOnDropHandle<()>,
    made: mpsc::Receiver<Result<Made, NarError>>,
    /// The first, for which nobody waited.
    next: Option<Made>,
    /// What follows a head that was sent by itself.
    contents: Option<Bytes>,
    left: u64,
    pace: Arc<Mutex<Pace>>,
    link: Arc<Link>,
    metrics: Arc<Metrics>,
}

impl Sending {
    /// The next bytes; `None` after the last, and after an error.
    async fn step(&mut self, sent: &mut (impl Fn(u64) + Send)) -> Option<Result<Bytes, NarError>> {
        if let Some(contents) = self.contents.take() {
            return Some(Ok(contents));
        }
        if self.left == 0 {
            return None;
        }
        let made = match self.next.take() {
            Some(first) => first,
            None => {
                let asked = Instant::now();
                let made = match self.made.recv().await {
                    Some(Ok(made)) => made,
                    Some(Err(error)) => {
                        self.left = 0;
                        return Some(Err(error));
                    }
                    // Its task ends before the NAR does only when the process does.
                    None => {
                        self.left = 0;
                        return Some(Err(NarError::Stopped));
                    }
                };
                let given = Instant::now();
                let carries = lock(&self.pace).given(made.piece.wire_bytes(), asked, given);
                if let Some(rate) = carries {
                    *lock(&self.link.0) = Some((rate, given));
                }
                made
            }
        };
        let bytes = made.piece.bytes() as u64;
        self.left = self.left.saturating_sub(bytes);
        sent(bytes);
        if made.piece.is_packed() {
            self.metrics.packed_bytes.add(bytes);
            self.metrics
                .packed_wire_bytes
                .add(made.piece.wire_bytes() as u64);
            return Some(Ok(made.wire));
        }
        self.contents = Some(made.wire);
        Some(Ok(Bytes::copy_from_slice(&made.piece.to_head())))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
