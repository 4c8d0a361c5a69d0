//! Member: the transfer port of another node as a binary cache, over mutual TLS.
//!
//! One GET under the canonical URL, from any offset. A member serves a NAR as it is, or in pieces where it finds
//! that faster and this node said that it takes them. Of nodes of other meshes, which share in public, it is the same port.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use granary_protocol::narinfo::{NARINFO_BYTES_MAX, nar_url};
use granary_protocol::peer::PeerId;
use granary_protocol::pieces::{self, OFFER_HEADER, Thirst};
use granary_protocol::store_path::StorePathHash;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, HOST, RANGE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;

use super::pieces::{Pieces, PiecesError};
use super::{Origin, RESPONSE_TIMEOUT, SILENCE_TIMEOUT, TransferError, Wanted};
use crate::identity;
use crate::serve::tls::Connector;

/// Idle connections kept per peer: Nix fetches up to 16 paths at once.
const IDLE_CONNECTIONS_MAX: usize = 16;

/// An idle connection older than this is not used again; less than the server's patience.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Most bytes read ahead per connection, and so the size of the largest chunk. Six such chunks may
/// be in memory for one stream, which is to stay below 2 MiB (DESIGN §11).
const READ_BYTES_MAX: usize = 256 * 1024;

/// From the last byte of a NAR in pieces to the end of its answer, which comes in the same packet. A connection
/// on which it does not is not used again.
const END_TIMEOUT: Duration = Duration::from_millis(100);

/// Brings NARs from members over mutual TLS.
pub struct PeerCaches {
    connector: Connector,
    /// Connections that may take another request, latest last.
    idle: Mutex<BTreeMap<PeerId, Vec<Idle>>>,
    /// Whether pieces of a peer are of use here.
    thirsts: Mutex<BTreeMap<PeerId, Thirst>>,
}

struct Idle {
    connection: Connection,
    address: SocketAddr,
    since: Instant,
}

type Connection = SendRequest<Empty<Bytes>>;

/// The rest of a NAR on its way from one peer. Dropping it aborts the transfer.
pub struct FromMember<'a> {
    caches: &'a PeerCaches,
    peer: PeerId,
    address: SocketAddr,
    /// Kept for the next transfer once this one has ended.
    connection: Option<Connection>,
    body: Incoming,
    /// `None` when the NAR comes as it is.
    pieces: Option<Pieces>,
    /// The last bytes, until the end of the answer was seen.
    last: Option<Bytes>,
    begun: Instant,
    waited: Duration,
    bytes: u64,
}

impl PeerCaches {
    pub fn new(connector: Connector) -> PeerCaches {
        PeerCaches {
            connector,
            idle: Mutex::default(),
            thirsts: Mutex::default(),
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
    ) -> Result<FromMember<'_>, TransferError> {
        // On the same machine nothing is gained.
        let takes_pieces = !address.ip().is_loopback() && self.takes_pieces(&peer);
        let ask = |connection| ask(connection, address, wanted, from, takes_pieces);
        let answer = async {
            if let Some(connection) = self.take_idle(&peer, address) {
                // The server may just have closed it; then nothing was sent and a new one is due.
                if let Ok(answer) = ask(connection).await {
                    return Ok(answer);
                }
            }
            let connection = self.connect(peer, address).await?;
            ask(connection)
                .await
                .map_err(|source| TransferError::Broken { peer, source })
        };
        let answer = tokio::time::timeout(RESPONSE_TIMEOUT, answer).await;
        let (connection, response) = answer.map_err(|_| TransferError::TimedOut {
            origin: Origin::Peer(peer),
        })??;
        let is_in_pieces = check_head(&response, peer, wanted, from, takes_pieces)?;
        let connection = Some(connection);
        Ok(FromMember {
            caches: self,
            peer,
            address,
            connection,
            body: response.into_body(),
            pieces: is_in_pieces.then(|| Pieces::new(wanted.nar_size - from)),
            last: None,
            begun: Instant::now(),
            waited: Duration::ZERO,
            bytes: 0,
        })
    }

    /// Asks `peer` for the narinfo of a path, which members tell on the control plane and strangers here; `None` when
    /// it has none.
    pub async fn narinfo(
        &self,
        peer: PeerId,
        address: SocketAddr,
        hash: StorePathHash,
    ) -> Result<Option<String>, TransferError> {
        let broken = |source| TransferError::Broken { peer, source };
        let url = format!("/{hash}.narinfo");
        let from_idle = match self.take_idle(&peer, address) {
            // The server may just have closed it; then nothing was sent and a new one is due.
            Some(connection) => send(connection, address, &url, 0, false).await.ok(),
            None => None,
        };
        let (connection, response) = match from_idle {
            Some(answer) => answer,
            None => {
                let connection = self.connect(peer, address).await?;
                send(connection, address, &url, 0, false)
                    .await
                    .map_err(broken)?
            }
        };
        let status = response.status();
        let body = Limited::new(response.into_body(), NARINFO_BYTES_MAX);
        let body = body.collect().await;
        let body = body.map_err(|_| TransferError::NoNarInfo { peer })?;
        self.keep_idle(peer, address, connection);
        match status {
            StatusCode::OK => match String::from_utf8(body.to_bytes().to_vec()) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(TransferError::NoNarInfo { peer }),
            },
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(TransferError::NoNarInfo { peer }),
        }
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
        drop(idle);
        self.thirsts().retain(|peer, _| is_member(peer));
    }

    fn takes_pieces(&self, peer: &PeerId) -> bool {
        let thirsts = self.thirsts();
        thirsts
            .get(peer)
            .is_none_or(|thirst| thirst.is_felt(Instant::now()))
    }

    fn thirsts(&self) -> MutexGuard<'_, BTreeMap<PeerId, Thirst>> {
        self.thirsts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FromMember<'_> {
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The next bytes; `None` at the end of what was promised. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        loop {
            if self.last.is_some() {
                self.end().await;
                return Ok(self.last.take());
            }
            let in_pieces = match &mut self.pieces {
                None => None,
                Some(pieces) if pieces.left() == 0 => return Ok(None),
                Some(pieces) => match pieces.next().await {
                    Ok(Some(bytes)) if pieces.left() == 0 => {
                        self.last = Some(bytes);
                        continue;
                    }
                    Ok(Some(bytes)) => return Ok(Some(bytes)),
                    Ok(None) => Some(pieces),
                    Err(source) => return Err(self.broken(source)),
                },
            };
            let since = Instant::now();
            let frame = tokio::time::timeout(SILENCE_TIMEOUT, self.body.frame()).await;
            self.waited += since.elapsed();
            let peer = self.peer;
            let frame = frame.map_err(|_| TransferError::Silent {
                origin: Origin::Peer(peer),
            })?;
            let frame = frame
                .transpose()
                .map_err(|source| TransferError::Broken { peer, source })?;
            let data = match frame.map(|frame| frame.into_data()) {
                Some(Ok(data)) => Some(data),
                Some(Err(_)) => continue,
                None => None,
            };
            self.bytes += data.as_ref().map_or(0, |data| data.len() as u64);
            match (in_pieces, data) {
                (Some(pieces), Some(data)) => pieces.arrived(data),
                (Some(pieces), None) => {
                    let left = pieces.left();
                    return Err(self.broken(PiecesError::Short { left }));
                }
                (None, data) => {
                    if self.body.is_end_stream() {
                        self.keep_connection();
                    }
                    return Ok(data);
                }
            }
        }
    }

    /// Waits for the end of an answer in pieces, which says nothing of its length.
    async fn end(&mut self) {
        let frame = tokio::time::timeout(END_TIMEOUT, self.body.frame()).await;
        if matches!(frame, Ok(None)) {
            self.keep_connection();
        }
    }

    fn keep_connection(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.caches.keep_idle(self.peer, self.address, connection);
        }
    }

    fn broken(&self, source: PiecesError) -> TransferError {
        TransferError::Pieces {
            peer: self.peer,
            source,
        }
    }
}

impl Drop for FromMember<'_> {
    fn drop(&mut self) {
        let (now, time) = (Instant::now(), self.begun.elapsed());
        let mut thirsts = self.caches.thirsts();
        let thirst = thirsts.entry(self.peer).or_default();
        thirst.transferred(self.bytes, self.waited, time, now);
    }
}

async fn ask(
    connection: Connection,
    address: SocketAddr,
    wanted: Wanted,
    from: u64,
    takes_pieces: bool,
) -> Result<(Connection, http::Response<Incoming>), hyper::Error> {
    let url = format!("/{}", nar_url(&wanted.store_path_hash, &wanted.nar_hash));
    send(connection, address, &url, from, takes_pieces).await
}

async fn send(
    mut connection: Connection,
    address: SocketAddr,
    url: &str,
    from: u64,
    takes_pieces: bool,
) -> Result<(Connection, http::Response<Incoming>), hyper::Error> {
    connection.ready().await?;
    let mut request = Request::get(url).header(HOST, address.to_string());
    if from > 0 {
        request = request.header(RANGE, format!("bytes={from}-"));
    }
    if takes_pieces {
        request = request.header(OFFER_HEADER, from);
    }
    let request = request
        .body(Empty::new())
        .expect("our URLs and an address are valid in HTTP");
    let response = connection.send_request(request).await?;
    Ok((connection, response))
}

/// Returns whether the answer is in pieces.
fn check_head(
    response: &http::Response<Incoming>,
    peer: PeerId,
    wanted: Wanted,
    from: u64,
    takes_pieces: bool,
) -> Result<bool, TransferError> {
    let status = response.status();
    if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
        return Err(TransferError::Absent {
            origin: Origin::Peer(peer),
        });
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return Err(TransferError::Busy {
            origin: Origin::Peer(peer),
        });
    }
    let text = |name| {
        response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let is_in_pieces = takes_pieces
        && status == StatusCode::OK
        && text(OFFER_HEADER) == Some(from.to_string().as_str())
        && text(CONTENT_TYPE.as_str()) == Some(pieces::CONTENT_TYPE)
        && text(CONTENT_ENCODING.as_str()).is_none();
    if is_in_pieces {
        return Ok(true);
    }
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
        return Ok(false);
    }
    Err(TransferError::Answer {
        origin: Origin::Peer(peer),
        found: format!("{status}, range {found_range:?}, {found_size:?} bytes"),
        expected: format!(
            "{expected_status}, range {expected_range:?}, {} bytes",
            wanted.nar_size - from
        ),
    })
}
