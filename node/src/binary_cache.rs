//! Client of a binary cache: brings NARs over HTTP, resumes them, and proves them while they stream.
//!
//! A member's transfer port is a binary cache that answers Range requests over mutual TLS, so one
//! GET from any offset is all there is to a transfer, and continuing elsewhere is the same GET at
//! another address. [`HeldBack`] is what makes it safe to pass bytes on before the whole NAR is
//! known: the end is held back until the hash of everything is right.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use granary_protocol::hash::{NarHash, NarHasher};
use granary_protocol::mesh::Blame;
use granary_protocol::narinfo::nar_url;
use granary_protocol::peer::PeerId;
use granary_protocol::store_path::StorePathHash;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, HOST, RANGE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;

use crate::identity;
use crate::serve::tls::{Connector, TlsError};

/// Bytes of a NAR that reach Nix only when the hash of the whole is right (DESIGN §5). Nix cannot
/// finish a path without them, whatever it has already written.
pub const HELD_BACK_BYTES: u64 = 64 * 1024;

/// Idle connections kept per peer: Nix fetches up to 16 paths at once.
const IDLE_CONNECTIONS_MAX: usize = 16;

/// An idle connection older than this is not used again; less than the server's patience.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// From the request to the head of the answer. The mind replaces a provider that is silent for 2 s;
/// this ends what it forgot.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two chunks of a NAR. The mind replaces a provider long before; this ends a transfer that
/// goes on after the mesh has stopped.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes read ahead per connection, and so the size of the largest chunk. Six such chunks may
/// be in memory for one stream, which is to stay below 2 MiB (DESIGN §11).
const READ_BYTES_MAX: usize = 256 * 1024;

/// Why a transfer did not start or broke off.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("{peer} does not have the NAR")]
    Absent { peer: PeerId },
    #[error("{peer} sends us as many NARs as it may")]
    Busy { peer: PeerId },
    #[error("{peer} answered {found}, expected {expected}")]
    Answer {
        peer: PeerId,
        found: String,
        expected: String,
    },
    #[error("connection to {peer} failed: {source}")]
    Connect { peer: PeerId, source: Box<TlsError> },
    #[error("{peer} did not answer within {RESPONSE_TIMEOUT:?}")]
    TimedOut { peer: PeerId },
    #[error("{peer} sent nothing for {SILENCE_TIMEOUT:?}")]
    Silent { peer: PeerId },
    #[error("transfer from {peer} broke off: {source}")]
    Broken { peer: PeerId, source: hyper::Error },
    #[error("{peer} is named by no valid key")]
    NoKey { peer: PeerId },
}

impl TransferError {
    pub fn blame(&self) -> Blame {
        match self {
            TransferError::Absent { .. } => Blame::Absent,
            _ => Blame::Peer,
        }
    }
}

/// Which NAR, and how long it is.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub store_path_hash: StorePathHash,
    pub nar_hash: NarHash,
    pub nar_size: u64,
}

/// Brings NARs from members over mutual TLS.
pub struct PeerCaches {
    connector: Connector,
    /// Connections that may take another request, latest last.
    idle: Mutex<BTreeMap<PeerId, Vec<Idle>>>,
}

struct Idle {
    connection: Connection,
    address: SocketAddr,
    since: Instant,
}

type Connection = SendRequest<Empty<Bytes>>;

/// The rest of a NAR on its way from one peer. Dropping it aborts the transfer.
pub struct Transfer<'a> {
    caches: &'a PeerCaches,
    peer: PeerId,
    address: SocketAddr,
    /// Kept for the next transfer once this one has ended.
    connection: Option<Connection>,
    body: Incoming,
}

impl PeerCaches {
    pub fn new(connector: Connector) -> PeerCaches {
        PeerCaches {
            connector,
            idle: Mutex::default(),
        }
    }

    /// Asks `peer` for a NAR from byte `from`.
    ///
    /// Returns when the head of the answer has arrived and promises exactly the missing bytes.
    pub async fn nar(
        &self,
        peer: PeerId,
        address: SocketAddr,
        wanted: Wanted,
        from: u64,
    ) -> Result<Transfer<'_>, TransferError> {
        let answer = async {
            if let Some(connection) = self.take_idle(&peer, address) {
                // The server may just have closed it; then nothing was sent and a new one is due.
                if let Ok(answer) = ask(connection, address, wanted, from).await {
                    return Ok(answer);
                }
            }
            let connection = self.connect(peer, address).await?;
            ask(connection, address, wanted, from)
                .await
                .map_err(|source| TransferError::Broken { peer, source })
        };
        let answer = tokio::time::timeout(RESPONSE_TIMEOUT, answer).await;
        let (connection, response) = answer.map_err(|_| TransferError::TimedOut { peer })??;
        check_head(&response, peer, wanted, from)?;
        let connection = Some(connection);
        Ok(Transfer {
            caches: self,
            peer,
            address,
            connection,
            body: response.into_body(),
        })
    }

    async fn connect(
        &self,
        peer: PeerId,
        address: SocketAddr,
    ) -> Result<Connection, TransferError> {
        let id = identity::peer_id_of(peer.as_public_key());
        let id = id.ok_or(TransferError::NoKey { peer })?;
        let connect = self.connector.connect(address, id).await;
        let stream = connect.map_err(|source| TransferError::Connect {
            peer,
            source: Box::new(source),
        })?;
        let handshake = Builder::new()
            .max_buf_size(READ_BYTES_MAX)
            .handshake(TokioIo::new(stream));
        let (sender, connection) = handshake
            .await
            .map_err(|source| TransferError::Broken { peer, source })?;
        // Ends by itself when the sender is dropped; its errors reach the sender.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }

    fn take_idle(&self, peer: &PeerId, address: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.get_mut(peer)?;
        connections.retain(|idle| {
            idle.since.elapsed() < IDLE_TIMEOUT
                && idle.address == address
                && !idle.connection.is_closed()
        });
        let newest = connections.pop().map(|idle| idle.connection);
        if connections.is_empty() {
            idle.remove(peer);
        }
        newest
    }

    fn keep_idle(&self, peer: PeerId, address: SocketAddr, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.entry(peer).or_default();
        if connections.len() < IDLE_CONNECTIONS_MAX {
            connections.push(Idle {
                connection,
                address,
                since: Instant::now(),
            });
        }
    }

    /// Drops the idle connections to peers that are no members any more.
    pub fn retain(&self, is_member: impl Fn(&PeerId) -> bool) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|peer, _| is_member(peer));
    }
}

impl Transfer<'_> {
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The next bytes; `None` at the end of what was promised. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        let peer = self.peer;
        loop {
            let frame = tokio::time::timeout(SILENCE_TIMEOUT, self.body.frame()).await;
            let frame = match frame.map_err(|_| TransferError::Silent { peer })? {
                Some(Ok(frame)) => Some(frame),
                Some(Err(source)) => return Err(TransferError::Broken { peer, source }),
                None => None,
            };
            if self.body.is_end_stream()
                && let Some(connection) = self.connection.take()
            {
                self.caches.keep_idle(peer, self.address, connection);
            }
            match frame.map(|frame| frame.into_data()) {
                Some(Ok(data)) => return Ok(Some(data)),
                Some(Err(_)) => {}
                None => return Ok(None),
            }
        }
    }
}

async fn ask(
    mut connection: Connection,
    address: SocketAddr,
    wanted: Wanted,
    from: u64,
) -> Result<(Connection, http::Response<Incoming>), hyper::Error> {
    connection.ready().await?;
    let url = format!("/{}", nar_url(&wanted.store_path_hash, &wanted.nar_hash));
    let mut request = Request::get(url).header(HOST, address.to_string());
    if from > 0 {
        request = request.header(RANGE, format!("bytes={from}-"));
    }
    let request = request
        .body(Empty::new())
        .expect("a NAR's URL and an address are valid in HTTP");
    let response = connection.send_request(request).await?;
    Ok((connection, response))
}

fn check_head(
    response: &http::Response<Incoming>,
    peer: PeerId,
    wanted: Wanted,
    from: u64,
) -> Result<(), TransferError> {
    let status = response.status();
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
        return Err(TransferError::Absent { peer });
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return Err(TransferError::Busy { peer });
    }
    let text = |name| {
        response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let (expected_status, expected_range) = if from == 0 {
        (StatusCode::OK, None)
    } else {
        let last = wanted.nar_size.saturating_sub(1);
        let range = format!("bytes {from}-{last}/{}", wanted.nar_size);
        (StatusCode::PARTIAL_CONTENT, Some(range))
    };
    let found_range = text(CONTENT_RANGE.as_str());
    let found_size = response.body().size_hint().exact();
    let is_as_expected = status == expected_status
        && found_range == expected_range.as_deref()
        && found_size == Some(wanted.nar_size - from)
        && text(CONTENT_ENCODING.as_str()).is_none();
    if is_as_expected {
        return Ok(());
    }
    Err(TransferError::Answer {
        peer,
        found: format!("{status}, range {found_range:?}, {found_size:?} bytes"),
        expected: format!(
            "{expected_status}, range {expected_range:?}, {} bytes",
            wanted.nar_size - from
        ),
    })
}

/// A NAR that is passed on while it arrives, except for its end.
///
/// At most [`HELD_BACK_BYTES`] and one chunk are kept.
pub struct HeldBack {
    wanted: Wanted,
    hasher: NarHasher,
    at: u64,
    held: VecDeque<Bytes>,
    held_bytes: u64,
}

/// Why bytes are not those of the promised NAR.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WrongBytes {
    #[error("nar of {hash} is {found}, its narinfo promises {promised}; dropped {bytes} bytes")]
    Hash {
        hash: StorePathHash,
        found: NarHash,
        promised: NarHash,
        bytes: u64,
    },
    #[error("nar of {hash} has more than the promised {promised} bytes")]
    TooLong { hash: StorePathHash, promised: u64 },
}

impl HeldBack {
    pub fn new(wanted: Wanted) -> HeldBack {
        HeldBack {
            wanted,
            hasher: NarHasher::new(),
            at: 0,
            held: VecDeque::new(),
            held_bytes: 0,
        }
    }

    /// How many bytes have arrived.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// How many bytes have been given out.
    pub fn released(&self) -> u64 {
        self.at - self.held_bytes
    }

    /// Takes bytes in; [`HeldBack::release`] gives out what may go.
    pub fn push(&mut self, bytes: Bytes) -> Result<(), WrongBytes> {
        let length = bytes.len() as u64;
        if length > self.wanted.nar_size - self.at {
            let (hash, promised) = (self.wanted.store_path_hash, self.wanted.nar_size);
            return Err(WrongBytes::TooLong { hash, promised });
        }
        self.hasher.update(&bytes);
        self.at += length;
        self.held_bytes += length;
        self.held.push_back(bytes);
        Ok(())
    }

    /// Returns bytes that more than [`HELD_BACK_BYTES`] have followed.
    pub fn release(&mut self) -> Option<Bytes> {
        let excess = self
            .held_bytes
            .checked_sub(HELD_BACK_BYTES)
            .filter(|excess| *excess > 0)?;
        let first = self.held.front_mut()?;
        // What is beyond usize is certainly more than one chunk.
        let excess = usize::try_from(excess).unwrap_or(usize::MAX);
        let released = if excess >= first.len() {
            self.held.pop_front()?
        } else {
            first.split_to(excess)
        };
        self.held_bytes -= released.len() as u64;
        Some(released)
    }

    /// Gives the end out, if all bytes together are the promised NAR. To be called once, at the end.
    pub fn finish(&mut self) -> Result<VecDeque<Bytes>, WrongBytes> {
        let found = std::mem::take(&mut self.hasher).finish();
        if self.at == self.wanted.nar_size && found == self.wanted.nar_hash {
            Ok(std::mem::take(&mut self.held))
        } else {
            Err(WrongBytes::Hash {
                hash: self.wanted.store_path_hash,
                found,
                promised: self.wanted.nar_hash,
                bytes: self.held_bytes,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(nar: &[u8]) -> Wanted {
        let mut hasher = NarHasher::new();
        hasher.update(nar);
        Wanted {
            store_path_hash: StorePathHash::from_bytes([1; 20]),
            nar_hash: hasher.finish(),
            nar_size: nar.len() as u64,
        }
    }

    /// Pushes `nar` in chunks; returns what was given out before the end, and the end.
    fn pass(nar: &[u8], wanted: Wanted, chunk: usize) -> (Vec<u8>, Result<Vec<u8>, WrongBytes>) {
        let mut held = HeldBack::new(wanted);
        let mut out = Vec::new();
        for chunk in nar.chunks(chunk) {
            if let Err(wrong) = held.push(Bytes::copy_from_slice(chunk)) {
                return (out, Err(wrong));
            }
            while let Some(released) = held.release() {
                out.extend_from_slice(&released);
            }
            assert!(held.held_bytes <= HELD_BACK_BYTES);
        }
        (
            out,
            held.finish()
                .map(|rest| rest.into_iter().flatten().collect()),
        )
    }

    #[test]
    fn a_true_nar_passes_byte_for_byte_at_any_chunking() {
        let nar: Vec<u8> = (0..300_000u32).map(|number| (number % 251) as u8).collect();
        for chunk in [1000, 65_536, 65_537, 300_000] {
            let (mut out, rest) = pass(&nar, wanted(&nar), chunk);
            assert_eq!(out.len() as u64, nar.len() as u64 - HELD_BACK_BYTES);
            out.extend(rest.unwrap());
            assert!(out == nar);
        }
    }

    #[test]
    fn a_false_byte_anywhere_keeps_the_end_back() {
        let nar = vec![7u8; 200_000];
        for position in [0, 100_000, 199_999] {
            let mut changed = nar.clone();
            changed[position] = 8;
            let (out, rest) = pass(&changed, wanted(&nar), 10_000);
            assert_eq!(out.len() as u64, 200_000 - HELD_BACK_BYTES);
            assert!(matches!(rest, Err(WrongBytes::Hash { .. })));
        }
    }

    #[test]
    fn a_small_nar_is_held_back_whole() {
        let nar = vec![7u8; 500];
        let (out, rest) = pass(&nar, wanted(&nar), 100);
        assert!(out.is_empty());
        assert_eq!(rest.unwrap(), nar);
    }

    #[test]
    fn too_short_and_too_long_are_wrong() {
        let nar = vec![7u8; 1000];
        let (_, rest) = pass(&nar[..999], wanted(&nar), 100);
        assert!(matches!(rest, Err(WrongBytes::Hash { .. })));
        let long = vec![7u8; 1001];
        let (_, rest) = pass(&long, wanted(&nar), 100);
        assert!(matches!(
            rest,
            Err(WrongBytes::TooLong { promised: 1000, .. })
        ));
    }
}
