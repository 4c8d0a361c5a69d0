//! The swarm: connections to other nodes (TCP, Noise, yamux) and the links over them, as one [`Network`].
//!
//! `Network` moves frames and says who is there. Who may stay is the mind's decision: it hears
//! [`NetworkEvent::LinkUp`] for every stranger and hangs up when the Hello does not convince.
//!
//! Invariants: every dial ends in exactly one `LinkUp` of that peer or one [`NetworkEvent::DialFailed`]; whoever comes
//! in has a place in the [`Crowd`] until it is [`Network::admitted`], and no other room; the swarm moves only
//! while [`Network::next`] is awaited, its connections move by themselves within the limits of [`links`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use granary_protocol::network::Reach;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent};
use libp2p::core::upgrade::Version;
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{Config, ConnectionId, NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{PeerId, Transport, noise, tcp, yamux};
use tokio::sync::watch;
use tokio::time::Sleep;
use tracing::{debug, warn};

use super::door::{Door, Registry};
use super::gate::Gate;
use super::links::{self, DownReason, Limits, Links, SendError};
use super::pulse::{Missed, Pulse};
use super::turns::Cost;
use crate::crowd::Crowd;
use crate::identity::Identity;

/// Connections to one peer: one in use, one from a simultaneous dial, and one of each kind that is still being closed.
const CONNECTIONS_PER_PEER_MAX: u32 = 4;

/// All connections: 256 links of the mind, and as many strangers until their Hello is judged. Half of the 1,024 file
/// descriptors that a process has by default.
const CONNECTIONS_MAX: u32 = 512;

/// Handshakes with those who came in: never reached, since there are fewer places in the [`Crowd`].
const PENDING_INBOUND_MAX: u32 = 512;

/// Dials under way. Beyond it a dial fails with [`DialError::Denied`] and the mind tries later.
const PENDING_OUTBOUND_MAX: u32 = 64;

/// From TCP connect to yamux: three round trips and two signatures, with room for a loaded machine.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How long closing a connection may take to flush last words to a peer that may not be reading.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// Never reached, since links keep their connection: libp2p's 10 s would make peers flap if that ever changed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Substreams of one connection: the link, a pulse in each direction, and surplus ones on their way out.
const SUBSTREAMS_MAX: usize = 16;

/// Addresses of one dial. A machine has a few; a longer list is somebody making us scan a network.
pub const DIAL_ADDRESSES_MAX: usize = 16;

/// What happened on the network.
#[derive(Debug)]
pub enum NetworkEvent {
    /// We are reachable here. Comes once per address of every interface, also later when one appears.
    Listening(SocketAddr),
    /// The address went away.
    NotListening(SocketAddr),
    LinkUp {
        peer: PeerId,
        /// The other end. Of an inbound link only the IP address is of use, the port is not where the peer listens.
        remote: SocketAddr,
        outbound: bool,
    },
    /// What was sent and not answered may be lost; a `LinkUp` over another connection may follow at once.
    LinkDown {
        peer: PeerId,
        reason: DownReason,
    },
    Frame {
        peer: PeerId,
        bytes: Bytes,
    },
    /// `peer` is who was meant, or who answered at an address dialled without a name.
    DialFailed {
        peer: Option<PeerId>,
        addresses: Vec<SocketAddr>,
        reason: DialError,
    },
}

/// Why a dial brought no link.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("that is this node")]
    OwnId,
    #[error("there is a link already")]
    AlreadyLinked,
    #[error("no usable address")]
    NoAddress,
    #[error("{found} answered instead")]
    WrongPeer { found: PeerId },
    #[error("too many connections")]
    Denied,
    #[error("we hung up")]
    HungUp,
    #[error("the network changed")]
    NetworkChanged,
    #[error("{}", describe(.0))]
    Unreachable(Vec<(SocketAddr, io::Error)>),
    #[error("the connection ended before there was a link: {0}")]
    Unlinked(DownReason),
}

fn describe(errors: &[(SocketAddr, io::Error)]) -> String {
    let texts: Vec<_> = errors
        .iter()
        .map(|(address, error)| format!("{address}: {error}"))
        .collect();
    texts.join("; ")
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("cannot listen for peers on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot set up Noise: {0}")]
    Noise(#[from] noise::Error),
}

/// Our connections and links.
pub struct Network {
    me: PeerId,
    swarm: Swarm<Behaviour>,
    strangers: Registry,
    /// What was decided without the swarm and waits for [`Network::next`].
    events: VecDeque<NetworkEvent>,
    /// Dials that have ended neither in a link nor in a failure; bounded by the connection limits.
    dials: HashMap<ConnectionId, Dial>,
}

struct Dial {
    peer: Option<PeerId>,
    addresses: Vec<SocketAddr>,
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    // First, so that who comes from elsewhere takes no room from others.
    gate: Gate,
    limits: connection_limits::Behaviour,
    pulse: Pulse,
    // Last, so that it makes no handler for a connection that the limits deny.
    links: Links,
}

impl Network {
    /// Starts to listen on these addresses. Port 0 takes a free one; `Listening` tells which.
    ///
    /// Must run inside a tokio runtime.
    ///
    /// # Errors
    /// [`NetworkError::Listen`] names the first address that cannot be had. An unspecified IPv6 address is left out
    /// with a warning on a machine without IPv6.
    pub fn new(
        identity: &Identity,
        listen: &[SocketAddr],
        limits: Limits,
        crowd: Arc<Crowd>,
    ) -> Result<Self, NetworkError> {
        let me = identity.peer_id();
        let mut yamux = yamux::Config::default();
        yamux.set_max_num_streams(SUBSTREAMS_MAX);
        let transport = tcp::tokio::Transport::new(tcp::Config::new().nodelay(true))
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(&identity.keypair())?)
            .multiplex(yamux)
            .timeout(HANDSHAKE_DEADLINE)
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(ClosesInTime::new(muxer))))
            .boxed();
        let strangers = Registry::default();
        let transport = Door::new(transport, crowd.clone(), strangers.clone()).boxed();
        let behaviour = Behaviour {
            gate: Gate::default(),
            limits: connection_limits::Behaviour::new(
                ConnectionLimits::default()
                    .with_max_pending_incoming(Some(PENDING_INBOUND_MAX))
                    .with_max_pending_outgoing(Some(PENDING_OUTBOUND_MAX))
                    .with_max_established(Some(CONNECTIONS_MAX))
                    .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER_MAX)),
            ),
            pulse: Pulse::default(),
            links: Links::new(me, limits, crowd),
        };
        let config = Config::with_tokio_executor()
            .with_idle_connection_timeout(IDLE_TIMEOUT)
            .with_max_negotiating_inbound_streams(SUBSTREAMS_MAX);
        let mut swarm = Swarm::new(transport, behaviour, me, config);

        // Before the first one is ours: a dual-stack probe of [::] would collide with our own 0.0.0.0.
        let mut usable = Vec::with_capacity(listen.len());
        for &address in listen {
            match probe(address) {
                Ok(()) => usable.push(address),
                Err(source) if is_missing_ipv6(address, &source) => {
                    warn!(%address, error = %source, "left out address, this machine has no IPv6");
                }
                Err(source) => return Err(NetworkError::Listen { address, source }),
            }
        }
        for address in usable {
            swarm.listen_on(multiaddr_of(address)).map_err(|error| {
                let source = match error {
                    libp2p::TransportError::Other(source) => source,
                    unsupported => io::Error::other(unsupported.to_string()),
                };
                NetworkError::Listen { address, source }
            })?;
        }
        Ok(Self {
            me,
            swarm,
            strangers,
            events: VecDeque::new(),
            dials: HashMap::new(),
        })
    }

    /// Drops connections to addresses that are not within reach, before a byte is read or sent.
    pub fn keep_within(&mut self, reach: watch::Receiver<Arc<Reach>>) {
        self.swarm.behaviour_mut().gate.reach = Some(reach);
    }

    pub fn peer_id(&self) -> PeerId {
        self.me
    }

    /// Where we can be reached, without link-local addresses.
    pub fn listening(&self) -> Vec<SocketAddr> {
        self.swarm
            .listeners()
            .filter_map(socket_addr_of)
            .filter(|address| !is_link_local_v6(address.ip()))
            .collect()
    }

    pub fn is_linked(&self, peer: &PeerId) -> bool {
        self.swarm.behaviour().links.is_linked(peer)
    }

    /// Connects to a peer at the first of these addresses that works.
    ///
    /// A dial to the same peer that is under way stands for this one too. Link-local IPv6 addresses are skipped, since
    /// libp2p has no place for their zone.
    pub fn dial(&mut self, peer: PeerId, addresses: Vec<SocketAddr>) {
        if peer == self.me {
            return self.dial_failed(Some(peer), addresses, DialError::OwnId);
        }
        if self.is_linked(&peer) {
            return self.dial_failed(Some(peer), addresses, DialError::AlreadyLinked);
        }
        if self.dials.values().any(|dial| dial.peer == Some(peer)) {
            debug!(%peer, "joined dial under way");
            return;
        }
        let usable: Vec<_> = addresses
            .iter()
            .copied()
            .filter(is_dialable)
            .take(DIAL_ADDRESSES_MAX)
            .collect();
        if usable.is_empty() {
            return self.dial_failed(Some(peer), addresses, DialError::NoAddress);
        }
        let options = DialOpts::peer_id(peer)
            // A connection that is being closed still counts as connected, and we may want a new one before it is gone.
            .condition(PeerCondition::Always)
            // Two nodes that dial each other from their listening ports would meet in one TCP connection,
            // on which both believe to be the dialler, and the handshake fails.
            .allocate_new_port()
            .addresses(usable.iter().copied().map(multiaddr_of).collect())
            .build();
        self.start_dial(options, Some(peer), usable);
    }

    /// Connects to whoever is at this address; the handshake tells who that is.
    ///
    /// Somebody to whom there is a link already is reported as `DialFailed` with that peer and
    /// [`DialError::AlreadyLinked`], so that a configured `host:port` learns its name.
    pub fn dial_unknown(&mut self, address: SocketAddr) {
        if !is_dialable(&address) {
            return self.dial_failed(None, vec![address], DialError::NoAddress);
        }
        let options = DialOpts::unknown_peer_id()
            .address(multiaddr_of(address))
            .allocate_new_port()
            .build();
        self.start_dial(options, None, vec![address]);
    }

    /// The peer proved to be a member, and its connections take no room from strangers any more.
    pub fn admitted(&mut self, peer: &PeerId) {
        self.strangers.admitted(peer);
    }

    /// Takes what something cost from what a peer may take of the loop's time.
    pub fn charge(&mut self, peer: PeerId, cost: Cost) {
        self.swarm.behaviour_mut().links.charge(peer, cost);
    }

    /// Queues a frame for a linked peer; see [`Links::send`].
    pub fn send(&mut self, peer: PeerId, frame: Bytes) -> Result<(), SendError> {
        self.swarm.behaviour_mut().links.send(peer, frame)
    }

    /// Asks linked peers for a sign of life at once; one that gives none within a second loses its link.
    pub fn doubt(&mut self, is_doubted: impl Fn(&PeerId) -> bool) {
        self.swarm.behaviour_mut().pulse.feel(is_doubted);
    }

    /// Gives up every dial under way, each with a `DialFailed`: they were begun on another network.
    pub fn give_up_dials(&mut self) {
        for (_, Dial { peer, addresses }) in std::mem::take(&mut self.dials) {
            if let Some(peer) = peer {
                // The answer says only whether there was a connection.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
            self.dial_failed(peer, addresses, DialError::NetworkChanged);
        }
    }

    /// Closes all connections to a peer and gives up dialling it. `LinkDown` follows if there was a link,
    /// and no frame of that peer comes any more.
    pub fn hangup(&mut self, peer: PeerId) {
        self.swarm.behaviour_mut().links.hang_up(peer);
        // Aborts pending dials as well. The answer says only whether there was a connection.
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    /// Waits for the next event. Cancel-safe: an event is lost only together with the `Network`.
    ///
    /// A consumer that is slow to call this slows its peers down, within the limits of their links.
    pub async fn next(&mut self) -> NetworkEvent {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            let event = self.swarm.select_next_some().await;
            if let Some(event) = self.translate(event) {
                return event;
            }
        }
    }

    /// The next event that needs no waiting for the network: what was decided here.
    pub fn decided(&mut self) -> Option<NetworkEvent> {
        self.events.pop_front()
    }

    fn start_dial(&mut self, options: DialOpts, peer: Option<PeerId>, addresses: Vec<SocketAddr>) {
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, Dial { peer, addresses });
            }
            Err(error) => self.dial_failed(peer, addresses, dial_error_of(error)),
        }
    }

    fn dial_failed(&mut self, peer: Option<PeerId>, addresses: Vec<SocketAddr>, reason: DialError) {
        self.events.push_back(NetworkEvent::DialFailed {
            peer,
            addresses,
            reason,
        });
    }

    fn translate(&mut self, event: SwarmEvent<BehaviourEvent>) -> Option<NetworkEvent> {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Links(event)) => self.translate_link(event),
            SwarmEvent::Behaviour(BehaviourEvent::Pulse(Missed { peer, connection })) => {
                debug!(%peer, "felt no pulse");
                let links = &mut self.swarm.behaviour_mut().links;
                links.fail(connection, DownReason::Unresponsive);
                None
            }
            SwarmEvent::NewListenAddr { address, .. } => socket_addr_of(&address)
                .filter(|address| !is_link_local_v6(address.ip()))
                .map(NetworkEvent::Listening),
            SwarmEvent::ExpiredListenAddr { address, .. } => socket_addr_of(&address)
                .filter(|address| !is_link_local_v6(address.ip()))
                .map(NetworkEvent::NotListening),
            SwarmEvent::ListenerClosed {
                addresses, reason, ..
            } => {
                if let Err(error) = reason {
                    warn!(?addresses, %error, "lost listener for peers");
                }
                let addresses = addresses.iter().filter_map(socket_addr_of);
                self.events
                    .extend(addresses.map(NetworkEvent::NotListening));
                None
            }
            SwarmEvent::ListenerError { error, .. } => {
                warn!(%error, "failed to accept a peer");
                None
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => self.end_dial(connection_id, None, dial_error_of(error)),
            SwarmEvent::IncomingConnectionError {
                send_back_addr,
                error,
                ..
            } => {
                debug!(remote = %send_back_addr, %error, "refused connection");
                None
            }
            _ => None,
        }
    }

    fn translate_link(&mut self, event: links::Event) -> Option<NetworkEvent> {
        match event {
            links::Event::LinkUp {
                peer,
                connection,
                address,
                outbound,
            } => {
                self.dials.remove(&connection);
                let remote = socket_addr_of(&address).expect("TCP is our only transport");
                Some(NetworkEvent::LinkUp {
                    peer,
                    remote,
                    outbound,
                })
            }
            links::Event::LinkDown { peer, reason } => {
                Some(NetworkEvent::LinkDown { peer, reason })
            }
            links::Event::Frame { peer, bytes } => Some(NetworkEvent::Frame { peer, bytes }),
            links::Event::Unlinked {
                peer,
                connection,
                reason,
            } => {
                debug!(%peer, %reason, "closed connection without link");
                let reason = match reason {
                    DownReason::Redundant => DialError::AlreadyLinked,
                    DownReason::HungUp => DialError::HungUp,
                    reason => DialError::Unlinked(reason),
                };
                self.end_dial(connection, Some(peer), reason)
            }
        }
    }

    fn end_dial(
        &mut self,
        connection: ConnectionId,
        answered: Option<PeerId>,
        reason: DialError,
    ) -> Option<NetworkEvent> {
        let dial = self.dials.remove(&connection)?;
        // The peer was quicker: `LinkUp` has answered this dial.
        if dial.peer.is_some_and(|peer| self.is_linked(&peer)) {
            return None;
        }
        Some(NetworkEvent::DialFailed {
            peer: dial.peer.or(answered),
            addresses: dial.addresses,
            reason,
        })
    }
}

/// Tells whether the address can be listened on.
///
/// libp2p listens with SO_REUSEPORT, so a second node of the same user would quietly share the port, and each would
/// get half of the connections. This socket has no such option, and so learns the truth.
fn probe(address: SocketAddr) -> io::Result<()> {
    if address.port() == 0 {
        return Ok(());
    }
    TcpListener::bind(address).map(drop)
}

fn is_missing_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    let is_missing = [
        rustix::io::Errno::AFNOSUPPORT,
        rustix::io::Errno::ADDRNOTAVAIL,
    ]
    .iter()
    .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
    address.is_ipv6() && address.ip().is_unspecified() && is_missing
}

fn dial_error_of(error: libp2p::swarm::DialError) -> DialError {
    use libp2p::swarm::DialError as Theirs;
    match error {
        Theirs::LocalPeerId { .. } => DialError::OwnId,
        Theirs::WrongPeerId { obtained, .. } => DialError::WrongPeer { found: obtained },
        // libp2p drops addresses on which we listen ourselves.
        Theirs::NoAddresses => DialError::NoAddress,
        Theirs::DialPeerConditionFalse(_) => DialError::AlreadyLinked,
        Theirs::Aborted => DialError::HungUp,
        Theirs::Denied { .. } => DialError::Denied,
        Theirs::Transport(errors) => DialError::Unreachable(
            errors
                .into_iter()
                .filter_map(|(address, error)| {
                    let error = match error {
                        libp2p::TransportError::Other(error) => error,
                        unsupported => io::Error::other(unsupported.to_string()),
                    };
                    Some((socket_addr_of(&address)?, error))
                })
                .collect(),
        ),
    }
}

fn multiaddr_of(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

pub(super) fn socket_addr_of(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

fn is_dialable(address: &SocketAddr) -> bool {
    let ip = address.ip();
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !is_link_local_v6(ip)
}

fn is_link_local_v6(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// A muxer whose closing has a deadline.
///
/// libp2p waits for a graceful close without end, and a peer that stops reading would keep its connection, its
/// descriptor and its place under the limits for as long as it likes.
struct ClosesInTime<M> {
    muxer: M,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<M> ClosesInTime<M> {
    fn new(muxer: M) -> Self {
        Self {
            muxer,
            deadline: None,
        }
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for ClosesInTime<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<M::Substream, M::Error>> {
        Pin::new(&mut self.muxer).poll_inbound(cx)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<M::Substream, M::Error>> {
        Pin::new(&mut self.muxer).poll_outbound(cx)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        Pin::new(&mut self.muxer).poll(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        if let Poll::Ready(result) = Pin::new(&mut self.muxer).poll_close(cx) {
            return Poll::Ready(result);
        }
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE_DEADLINE)));
        deadline.poll_unpin(cx).map(Ok)
    }
}
