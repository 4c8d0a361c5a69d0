//! Links: one ordered, bounded pipe of frames to each peer, over however many connections exist.
//!
//! A libp2p behaviour for `/granary/control/1`. A frame is its length (u32, big endian) and its body; what the body
//! means is the codec's business. A **link** is one substream that carries frames both ways, on one connection.
//! Both sides agree which: the peer with the smaller id **leads** and opens the substream, the other one waits for it.
//! So a link begins and ends on both sides together, and a handshake that is restarted at [`Event::LinkUp`] finds
//! its counterpart restarted too. (With a substream per direction and several connections, one side could see its
//! link fail while the other side saw nothing.)
//!
//! Several connections arise when both sides dial at once. Whoever dialled a connection that is not needed closes it.
//! A leader who finds that the other side keeps such a connection concludes that its link is dead over there,
//! and moves to the new one after [`REDUNDANT_GRACE`]; a laptop that changed networks need not wait for a pulse to be missed.
//!
//! Invariants: a frame that [`Links::send`] accepted arrives, in order and once, or `LinkDown` follows; frames of one
//! peer reach the consumer between its `LinkUp` and its `LinkDown`; queues are bounded in frames and in bytes, and
//! when the consumer is slow, or the peer said more than its share ([`Turns`]), we stop reading, which stops the sender;
//! nothing is allocated for a length merely declared.
//!
//! Frames cross between the connection's task and the behaviour in a [`pipe`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::io::AsyncReadExt;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::handler::ConnectionEvent;
use libp2p::swarm::{
    CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent,
    ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, Stream, StreamUpgradeError,
    SubstreamProtocol, THandlerInEvent, ToSwarm,
};
use libp2p::{PeerId, StreamProtocol};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tracing::debug;

use super::turns::{Cost, Turns};
use crate::crowd::Crowd;

mod pipe;

use pipe::{Pipe, read_frames, write_frames};

/// The name under which both sides negotiate the substream.
pub const PROTOCOL: StreamProtocol = StreamProtocol::new("/granary/control/1");

/// Frames waiting to be written to one peer. A burst of 64 k operations in snapshots of 256 KiB is a few dozen frames,
/// a busy lookup batch a few hundred; beyond it the peer does not read and [`Links::send`] refuses.
pub const OUTGOING_FRAMES_MAX: usize = 4096;

/// Bytes waiting to be written to one peer, unless one frame may be larger. A full snapshot of a LAN node (≤ 1 MB) fits
/// several times; 64 peers that do not read hold 512 MiB at worst, and only until [`STALL_TIMEOUT`].
pub const OUTGOING_BYTES_MAX: usize = 8 << 20;

/// Frames of one peer that wait for the consumer. Beyond it we do not read, and the peer's queue fills up instead.
pub const INCOMING_FRAMES_MAX: usize = 1024;

/// Bytes of one peer that wait for the consumer; one frame that was begun below the limit may exceed it.
pub const INCOMING_BYTES_MAX: usize = 2 << 20;

/// From connection to link. Two round trips are enough; a peer that needs longer does not speak our protocol.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// A write without progress, or a frame begun and not continued, ends the link. Longer than a Wi-Fi roam.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a leader lets the dialler of a second connection close it by itself: a few round trips on a busy machine.
pub const REDUNDANT_GRACE: Duration = Duration::from_secs(1);

/// The bounds of every link.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub frame_bytes_max: usize,
    pub outgoing_frames_max: usize,
    pub outgoing_bytes_max: usize,
    pub incoming_frames_max: usize,
    pub incoming_bytes_max: usize,
    pub open_deadline: Duration,
    pub stall_timeout: Duration,
    pub redundant_grace: Duration,
}

impl Limits {
    /// The limits of a node whose codec has frames of at most this many bytes.
    pub fn new(frame_bytes_max: usize) -> Self {
        assert!(frame_bytes_max > 0);
        assert!(u32::try_from(frame_bytes_max).is_ok());
        Self {
            frame_bytes_max,
            outgoing_frames_max: OUTGOING_FRAMES_MAX,
            outgoing_bytes_max: OUTGOING_BYTES_MAX.max(frame_bytes_max),
            incoming_frames_max: INCOMING_FRAMES_MAX,
            incoming_bytes_max: INCOMING_BYTES_MAX,
            open_deadline: OPEN_DEADLINE,
            stall_timeout: STALL_TIMEOUT,
            redundant_grace: REDUNDANT_GRACE,
        }
    }
}

/// What happened to the links.
#[derive(Debug)]
pub enum Event {
    /// Frames may be sent and will be received. `address` is the remote end; for an inbound connection its port
    /// is of no use for dialling.
    LinkUp {
        peer: PeerId,
        connection: ConnectionId,
        address: Multiaddr,
        outbound: bool,
    },
    /// What was sent and not answered may be lost. Another `LinkUp` may follow at once, over a surviving connection.
    LinkDown {
        peer: PeerId,
        reason: DownReason,
    },
    Frame {
        peer: PeerId,
        bytes: Bytes,
    },
    /// A connection ended that never was a link.
    Unlinked {
        peer: PeerId,
        connection: ConnectionId,
        reason: DownReason,
    },
}

/// Why a link, or a connection that was to become one, ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DownReason {
    #[error("the peer closed the link")]
    ClosedByPeer,
    #[error("we hung up")]
    HungUp,
    #[error("the peer announced a frame of {declared} bytes, the limit is {max}")]
    FrameTooLarge { declared: usize, max: usize },
    #[error("the peer sent an empty frame")]
    FrameEmpty,
    #[error("the link ended in the middle of a frame")]
    FrameTruncated,
    #[error("the peer did not read for {after:?}")]
    WriteStalled { after: Duration },
    #[error("the peer did not finish a frame for {after:?}")]
    ReadStalled { after: Duration },
    #[error("the peer gave no sign of life")]
    Unresponsive,
    #[error("the peer does not speak {PROTOCOL}")]
    ProtocolUnsupported,
    #[error("no link was opened within {after:?}")]
    OpenTimedOut { after: Duration },
    #[error("the link moved to another connection")]
    Superseded,
    #[error("another connection to the same peer is in use")]
    Redundant,
    #[error("the connection failed: {0}")]
    Failed(Arc<io::Error>),
}

impl DownReason {
    /// Whether the peer broke the protocol, so that its other connections are closed too.
    pub fn is_violation(&self) -> bool {
        matches!(
            self,
            Self::FrameTooLarge { .. } | Self::FrameEmpty | Self::ProtocolUnsupported
        )
    }
}

impl From<io::Error> for DownReason {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::*;
        match error.kind() {
            ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof | WriteZero => {
                Self::ClosedByPeer
            }
            _ => Self::Failed(Arc::new(error)),
        }
    }
}

/// Why a frame was not taken. It was not queued, and the link stands as it did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("no link to {peer}")]
    NoLink { peer: PeerId },
    #[error(
        "{peer} does not read: {frames} frames ({bytes} bytes) are queued for it, refused one more"
    )]
    Refused {
        peer: PeerId,
        frames: usize,
        bytes: usize,
    },
    #[error("frame of {bytes} bytes for {peer}, a frame has 1 to {max}")]
    FrameSize {
        peer: PeerId,
        bytes: usize,
        max: usize,
    },
}

/// The behaviour: all links of this node.
pub struct Links {
    me: PeerId,
    limits: Limits,
    connections: HashMap<ConnectionId, Connection>,
    /// Ordered, so that a run does not depend on a hash seed.
    peers: BTreeMap<PeerId, Peer>,
    events: VecDeque<ToSwarm<Event, Command>>,
    /// Connections with frames to read, each at most once, in turn: a peer that sends much does not starve others.
    ready: mpsc::UnboundedReceiver<ConnectionId>,
    turns: Turns,
    /// Where it is counted when somebody has to wait.
    crowd: Arc<Crowd>,
    ready_sender: mpsc::UnboundedSender<ConnectionId>,
}

struct Connection {
    peer: PeerId,
    address: Multiaddr,
    outbound: bool,
    pipe: Arc<Pipe>,
    /// Our request to open a link on it: none yet, after the grace period, or at once.
    asked: Asked,
    /// Its end was reported and it is being closed; nothing that it still says counts.
    is_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    No,
    Later,
    Now,
}

#[derive(Default)]
struct Peer {
    /// In the order in which they were established.
    connections: Vec<ConnectionId>,
    link: Option<ConnectionId>,
}

impl Links {
    pub fn new(me: PeerId, limits: Limits, crowd: Arc<Crowd>) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "holds one token per connection whose bounded queue is not empty, and one for a new link"
        )]
        let (ready_sender, ready) = mpsc::unbounded_channel();
        Self {
            me,
            limits,
            connections: HashMap::new(),
            peers: BTreeMap::new(),
            events: VecDeque::new(),
            ready,
            turns: Turns::default(),
            crowd,
            ready_sender,
        }
    }

    /// Queues a frame for a peer; it leaves in order, soon after the swarm's tasks run.
    ///
    /// # Errors
    /// [`SendError::Refused`] when the peer's queue is full. The frame is not queued and the link stands: drop what can
    /// be repeated, or [`Links::hang_up`] and start anew.
    pub fn send(&mut self, peer: PeerId, frame: Bytes) -> Result<(), SendError> {
        let max = self.limits.frame_bytes_max;
        if frame.is_empty() || frame.len() > max {
            let bytes = frame.len();
            return Err(SendError::FrameSize { peer, bytes, max });
        }
        let connection = self
            .link_of(&peer)
            .and_then(|id| self.connections.get(&id))
            .ok_or(SendError::NoLink { peer })?;
        connection
            .pipe
            .push_outgoing(frame, &self.limits)
            .map_err(|(frames, bytes)| SendError::Refused {
                peer,
                frames,
                bytes,
            })
    }

    /// Takes what something cost from what a peer may take; while it owes, its frames wait.
    pub fn charge(&mut self, peer: PeerId, cost: Cost) {
        self.turns.charge(peer, cost, Instant::now());
    }

    pub fn is_linked(&self, peer: &PeerId) -> bool {
        self.link_of(peer).is_some()
    }

    /// Closes every connection to a peer. What it sent and was not yet consumed is dropped.
    ///
    /// What was queued for it is still written as far as its window allows, so that a last word may arrive.
    pub fn hang_up(&mut self, peer: PeerId) {
        self.events.retain(|event| {
            !matches!(event, ToSwarm::GenerateEvent(Event::Frame { peer: from, .. }) if *from == peer)
        });
        // One by one: closing all by the peer's name would take along a dial that is begun after this.
        self.close_all(peer, DownReason::HungUp, Unread::Dropped);
    }

    /// Ends one connection for a reason that was found outside, such as a missing pulse.
    pub fn fail(&mut self, connection: ConnectionId, reason: DownReason) {
        self.end(connection, reason, Unread::Delivered);
    }

    fn link_of(&self, peer: &PeerId) -> Option<ConnectionId> {
        self.peers.get(peer).and_then(|peer| peer.link)
    }

    fn leads(&self, peer: &PeerId) -> bool {
        self.me < *peer
    }

    fn handler(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        outbound: bool,
    ) -> Handler {
        let pipe = Arc::new(Pipe::new(id, self.ready_sender.clone()));
        // Another behaviour may still deny the connection, so it counts only after `ConnectionEstablished`.
        let handler = Handler::new(self.leads(&peer), pipe.clone(), self.limits);
        self.connections.insert(
            id,
            Connection {
                peer,
                address: address.clone(),
                outbound,
                pipe,
                asked: Asked::No,
                is_over: false,
            },
        );
        handler
    }

    /// Brings the connections of a peer in order after any change: opens a link if there is none, closes what is not needed.
    fn settle(&mut self, peer: PeerId) {
        let leads = self.leads(&peer);
        let Some(entry) = self.peers.get(&peer) else {
            return;
        };
        let link = entry.link;
        let others: Vec<_> = entry
            .connections
            .iter()
            .copied()
            .filter(|id| Some(*id) != link && !self.connections[id].is_over)
            .collect();
        if link.is_some() {
            for id in others {
                let connection = self.connections.get_mut(&id).expect("listed");
                if connection.outbound {
                    self.end(id, DownReason::Redundant, Unread::Dropped);
                } else if leads && connection.asked == Asked::No {
                    connection.asked = Asked::Later;
                    self.command(peer, id, Command::OpenLater);
                }
            }
        } else if leads {
            let is_opening = |id| self.connections[id].asked == Asked::Now;
            if !others.iter().any(is_opening)
                && let Some(id) = others.first()
            {
                self.connections.get_mut(id).expect("listed").asked = Asked::Now;
                self.command(peer, *id, Command::Open);
            }
        }
    }

    fn command(&mut self, peer_id: PeerId, connection: ConnectionId, event: Command) {
        self.events.push_back(ToSwarm::NotifyHandler {
            peer_id,
            handler: NotifyHandler::One(connection),
            event,
        });
    }

    /// The substream is open: this connection carries the link from here on.
    fn opened(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        if connection.is_over {
            return;
        }
        let peer = connection.peer;
        if let Some(previous) = self.link_of(&peer) {
            self.end_only(previous, DownReason::Superseded, Unread::Delivered);
        }
        let connection = &self.connections[&id];
        self.peers.entry(peer).or_default().link = Some(id);
        self.events.push_back(ToSwarm::GenerateEvent(Event::LinkUp {
            peer,
            connection: id,
            address: connection.address.clone(),
            outbound: connection.outbound,
        }));
        // Frames may have come before this notice; their token found no link.
        let _ = self.ready_sender.send(id);
        self.settle(peer);
    }

    /// Reports the end of a connection and has it closed; a violation takes the peer's other connections along.
    fn end(&mut self, id: ConnectionId, reason: DownReason, unread: Unread) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let peer = connection.peer;
        if reason.is_violation() {
            self.end_only(id, reason.clone(), unread);
            self.close_all(peer, reason, unread);
        } else {
            self.end_only(id, reason, unread);
            self.settle(peer);
        }
    }

    fn close_all(&mut self, peer: PeerId, reason: DownReason, unread: Unread) {
        let ids = self
            .peers
            .get(&peer)
            .map(|peer| peer.connections.clone())
            .unwrap_or_default();
        for id in ids {
            self.end_only(id, reason.clone(), unread);
        }
    }

    fn end_only(&mut self, id: ConnectionId, reason: DownReason, unread: Unread) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.is_over {
            return;
        }
        connection.is_over = true;
        let peer = connection.peer;
        let entry = self.peers.entry(peer).or_default();
        if entry.link == Some(id) {
            entry.link = None;
            // Who owes would have by hanging up what it has to wait for.
            let owes = !self.turns.owed(&peer, Instant::now()).is_zero();
            if unread == Unread::Delivered && !owes {
                while let Some((bytes, _)) = connection.pipe.pop_incoming() {
                    self.events
                        .push_back(ToSwarm::GenerateEvent(Event::Frame { peer, bytes }));
                }
            }
            debug!(%peer, %reason, "lost link");
            self.events
                .push_back(ToSwarm::GenerateEvent(Event::LinkDown { peer, reason }));
        } else {
            self.events
                .push_back(ToSwarm::GenerateEvent(Event::Unlinked {
                    peer,
                    connection: id,
                    reason,
                }));
        }
        self.events.push_back(ToSwarm::CloseConnection {
            peer_id: peer,
            connection: CloseConnection::One(id),
        });
    }

    fn closed(&mut self, event: ConnectionClosed<'_>) {
        let reason = match event.cause {
            Some(libp2p::swarm::ConnectionError::IO(error)) => {
                io::Error::new(error.kind(), error.to_string()).into()
            }
            Some(libp2p::swarm::ConnectionError::KeepAliveTimeout) | None => {
                DownReason::ClosedByPeer
            }
        };
        self.end_only(event.connection_id, reason, Unread::Delivered);
        self.connections.remove(&event.connection_id);
        if let Some(peer) = self.peers.get_mut(&event.peer_id) {
            peer.connections.retain(|id| *id != event.connection_id);
            if peer.connections.is_empty() {
                self.peers.remove(&event.peer_id);
            }
        }
        self.settle(event.peer_id);
    }

    /// Takes one frame of the connection whose turn it is.
    fn receive(&mut self, id: ConnectionId) -> Option<Event> {
        let connection = self.connections.get(&id)?;
        let peer = connection.peer;
        if self.link_of(&peer) != Some(id) {
            return None;
        }
        let now = Instant::now();
        let wait = self.turns.owed(&peer, now);
        if !wait.is_zero() {
            self.crowd.slowed();
            self.turns.hold(id, wait, now);
            return None;
        }
        let (bytes, more) = connection.pipe.pop_incoming()?;
        if more {
            let _ = self.ready_sender.send(id);
        }
        Some(Event::Frame { peer, bytes })
    }
}

/// What becomes of frames that were received and not consumed when a link ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unread {
    Delivered,
    Dropped,
}

impl NetworkBehaviour for Links {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _local_address: &Multiaddr,
        remote_address: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(id, peer, remote_address, false))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _role_override: Endpoint,
        _port_use: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(id, peer, address, true))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(event) => {
                let peer = self.peers.entry(event.peer_id).or_default();
                peer.connections.push(event.connection_id);
                self.settle(event.peer_id);
            }
            FromSwarm::ConnectionClosed(event) => self.closed(event),
            // Denied by another behaviour after we made a handler for it.
            FromSwarm::DialFailure(event) => {
                self.connections.remove(&event.connection_id);
            }
            FromSwarm::ListenFailure(event) => {
                self.connections.remove(&event.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _peer: PeerId, id: ConnectionId, notice: Notice) {
        match notice {
            Notice::Opened => self.opened(id),
            Notice::Ended(reason) => self.end(id, reason, Unread::Delivered),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(event);
            }
            while let Poll::Ready(id) = self.turns.poll(cx) {
                let _ = self.ready_sender.send(id);
            }
            match self.ready.poll_recv(cx) {
                Poll::Ready(Some(id)) => {
                    if let Some(event) = self.receive(id) {
                        return Poll::Ready(ToSwarm::GenerateEvent(event));
                    }
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// From the behaviour to a connection: open the link here.
#[derive(Debug)]
pub enum Command {
    Open,
    OpenLater,
}

/// From a connection to the behaviour.
#[derive(Debug)]
pub enum Notice {
    Opened,
    Ended(DownReason),
}

/// One connection's part: negotiates the substream and drives both its directions.
pub struct Handler {
    leads: bool,
    pipe: Arc<Pipe>,
    limits: Limits,
    state: State,
    notices: VecDeque<Notice>,
}

enum State {
    Waiting {
        deadline: std::pin::Pin<Box<Sleep>>,
        /// When to ask for the substream.
        opening: Option<std::pin::Pin<Box<Sleep>>>,
        is_requested: bool,
    },
    Open {
        reader: BoxFuture<'static, DownReason>,
        writer: BoxFuture<'static, DownReason>,
    },
    Ended,
}

impl Handler {
    fn new(leads: bool, pipe: Arc<Pipe>, limits: Limits) -> Self {
        Self {
            leads,
            pipe,
            limits,
            state: State::Waiting {
                deadline: Box::pin(tokio::time::sleep(limits.open_deadline)),
                opening: None,
                is_requested: false,
            },
            notices: VecDeque::new(),
        }
    }

    fn open(&mut self, substream: Stream) {
        // One substream in the life of a connection: a second one is reset by dropping it.
        if !matches!(self.state, State::Waiting { .. }) {
            debug!(connection = %self.pipe.connection, "dropped surplus substream");
            return;
        }
        let (source, target) = substream.split();
        let (pipe, limits) = (self.pipe.clone(), self.limits);
        let reader = async move { read_frames(source, &pipe, &limits).await }.boxed();
        let pipe = self.pipe.clone();
        let writer = async move { write_frames(target, &pipe, &limits).await }.boxed();
        self.state = State::Open { reader, writer };
        self.notices.push_back(Notice::Opened);
    }

    fn end(&mut self, reason: DownReason) {
        self.state = State::Ended;
        self.notices.push_back(Notice::Ended(reason));
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Command;
    type ToBehaviour = Notice;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ())
            .with_timeout(self.limits.open_deadline)
    }

    fn connection_keep_alive(&self) -> bool {
        true
    }

    fn on_behaviour_event(&mut self, command: Command) {
        let delay = match command {
            Command::Open => Duration::ZERO,
            Command::OpenLater => self.limits.redundant_grace,
        };
        if let State::Waiting { opening, .. } = &mut self.state {
            *opening = Some(Box::pin(tokio::time::sleep(delay)));
        }
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(event) => self.open(event.protocol),
            // Only the leader opens links; a substream from the other side is reset by dropping it.
            ConnectionEvent::FullyNegotiatedInbound(_) if self.leads => {
                debug!(connection = %self.pipe.connection, "dropped substream of a peer that does not lead");
            }
            ConnectionEvent::FullyNegotiatedInbound(event) => self.open(event.protocol),
            ConnectionEvent::DialUpgradeError(event) => {
                let reason = match event.error {
                    StreamUpgradeError::Timeout => DownReason::OpenTimedOut {
                        after: self.limits.open_deadline,
                    },
                    StreamUpgradeError::NegotiationFailed => DownReason::ProtocolUnsupported,
                    StreamUpgradeError::Io(error) => error.into(),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                self.end(reason);
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), Notice>> {
        loop {
            if let Some(notice) = self.notices.pop_front() {
                return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(notice));
            }
            let reason = match &mut self.state {
                State::Waiting {
                    deadline,
                    opening,
                    is_requested,
                } => {
                    if !*is_requested
                        && let Some(opening) = opening
                        && opening.poll_unpin(cx).is_ready()
                    {
                        *is_requested = true;
                        return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                            protocol: self.listen_protocol(),
                        });
                    }
                    if deadline.poll_unpin(cx).is_pending() {
                        return Poll::Pending;
                    }
                    DownReason::OpenTimedOut {
                        after: self.limits.open_deadline,
                    }
                }
                // What the peer still said comes before our failure to answer.
                State::Open { reader, writer } => match reader.poll_unpin(cx) {
                    Poll::Ready(reason) => reason,
                    Poll::Pending => match writer.poll_unpin(cx) {
                        Poll::Ready(reason) => reason,
                        Poll::Pending => return Poll::Pending,
                    },
                },
                State::Ended => return Poll::Pending,
            };
            self.end(reason);
        }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Option<Notice>> {
        // A connection that ends is noticed in the same step in which its last bytes arrive, so they are still unread.
        // And what the peer's window admits is still handed over; closing the connection flushes it.
        if let State::Open { reader, writer } = &mut self.state {
            let _ = reader.poll_unpin(cx);
            let _ = writer.poll_unpin(cx);
            self.state = State::Ended;
        }
        Poll::Ready(None)
    }
}
