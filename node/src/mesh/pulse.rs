//! The pulse: whether the other end of a connection still answers.
//!
//! A peer that lost its power or its network says nothing, and TCP takes minutes to notice. So one side asks the other
//! for an echo of eight bytes over a substream of their own: every [`INTERVAL`], and at once when there is reason to
//! doubt ([`Pulse::feel`]): this machine's network changed, or the peer owes an answer. libp2p's ping cannot be asked
//! to hurry, and forgives the first failure.
//!
//! One of the two asking is enough: a question that follows another shows that the answer arrived, so who is asked
//! knows as much as who asks. The side that dialled asks; the other one does when it has not been asked for a little
//! longer, or is in doubt itself.
//!
//! Invariants: one question is under way per connection; one that is not answered in time is reported once, and the
//! connection is not asked again; what the other side asks costs eight bytes of memory.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::io::{AsyncReadExt, AsyncWriteExt};
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::handler::ConnectionEvent;
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
    NetworkBehaviour, NotifyHandler, Stream, StreamUpgradeError, SubstreamProtocol,
    THandlerInEvent, ToSwarm,
};
use libp2p::{PeerId, StreamProtocol};
use tokio::time::{Instant, Sleep};

const PROTOCOL: StreamProtocol = StreamProtocol::new("/granary/pulse/1");

/// Between two questions, and how long one of them may take. A peer that vanished without a word is noticed within
/// their sum even when nobody wants anything of it.
const INTERVAL: Duration = Duration::from_secs(5);
const LIMIT: Duration = Duration::from_secs(5);

/// The interval of the side that did not dial, counted from when it was last asked: longer by what a question may be
/// late on a machine under load, so that both sides do not ask at the same time for ever.
const LISTENER_INTERVAL: Duration = Duration::from_millis(5500);

/// How long a question may take that is asked in doubt. On a LAN an answer takes a millisecond; a machine under load
/// needs some hundred, and losing a link costs it a second.
const LIMIT_IN_DOUBT: Duration = Duration::from_secs(1);

/// What is echoed. That it comes back is all that counts, so it need not be unpredictable.
const BEAT: [u8; 8] = *b"granary\n";

/// The peer did not answer on this connection.
#[derive(Debug)]
pub struct Missed {
    pub peer: PeerId,
    pub connection: ConnectionId,
}

/// Asks on every connection.
#[derive(Default)]
pub struct Pulse {
    connections: BTreeMap<ConnectionId, PeerId>,
    events: VecDeque<ToSwarm<Missed, Doubt>>,
}

/// From the behaviour to a connection: ask at once.
#[derive(Debug)]
pub struct Doubt;

/// From a connection to the behaviour: there was no answer.
#[derive(Debug)]
pub struct Silent;

impl Pulse {
    /// Asks the peers that `is_doubted` names for a sign of life, at once.
    pub fn feel(&mut self, is_doubted: impl Fn(&PeerId) -> bool) {
        for (connection, peer) in &self.connections {
            if is_doubted(peer) {
                self.events.push_back(ToSwarm::NotifyHandler {
                    peer_id: *peer,
                    handler: NotifyHandler::One(*connection),
                    event: Doubt,
                });
            }
        }
    }
}

impl NetworkBehaviour for Pulse {
    type ConnectionHandler = Handler;
    type ToSwarm = Missed;

    fn handle_established_inbound_connection(
        &mut self,
        _id: ConnectionId,
        _peer: PeerId,
        _local_address: &Multiaddr,
        _remote_address: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(Handler::new(LISTENER_INTERVAL))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _id: ConnectionId,
        _peer: PeerId,
        _address: &Multiaddr,
        _role_override: Endpoint,
        _port_use: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(Handler::new(INTERVAL))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(event) => {
                self.connections.insert(event.connection_id, event.peer_id);
            }
            FromSwarm::ConnectionClosed(event) => {
                self.connections.remove(&event.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        Silent: Silent,
    ) {
        let missed = Missed { peer, connection };
        self.events.push_back(ToSwarm::GenerateEvent(missed));
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Missed, THandlerInEvent<Self>>> {
        match self.events.pop_front() {
            Some(event) => Poll::Ready(event),
            // Whatever adds one is followed by a poll.
            None => Poll::Pending,
        }
    }
}

/// One connection's part: asks, and answers what the other side asks.
pub struct Handler {
    question: Question,
    /// Of the next question while none is under way, else of the answer.
    alarm: Pin<Box<Sleep>>,
    /// Between two questions of this side, as long as the other one asks nothing.
    interval: Duration,
    /// Ends when a question was answered.
    answering: Option<BoxFuture<'static, io::Result<Stream>>>,
}

enum Question {
    /// None is under way; the substream of the last one is kept.
    None(Option<Stream>),
    /// The substream is being opened; asked for already, or about to be.
    Opening {
        is_requested: bool,
    },
    Asked(BoxFuture<'static, io::Result<Stream>>),
    /// The last one was not answered, or the other side does not know the protocol.
    Over,
}

impl Handler {
    fn new(interval: Duration) -> Handler {
        Handler {
            question: Question::None(None),
            alarm: Box::pin(tokio::time::sleep(interval)),
            interval,
            answering: None,
        }
    }

    fn ask(&mut self, limit: Duration) {
        let Question::None(stream) = &mut self.question else {
            return;
        };
        self.question = match stream.take() {
            Some(stream) => Question::Asked(beat(stream).boxed()),
            None => Question::Opening {
                is_requested: false,
            },
        };
        self.alarm.as_mut().reset(Instant::now() + limit);
    }
}

async fn beat(mut stream: Stream) -> io::Result<Stream> {
    stream.write_all(&BEAT).await?;
    stream.flush().await?;
    let mut echo = [0; BEAT.len()];
    stream.read_exact(&mut echo).await?;
    match echo == BEAT {
        true => Ok(stream),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Echoes once; an error is the end of the substream.
async fn answer(mut stream: Stream) -> io::Result<Stream> {
    let mut bytes = [0; BEAT.len()];
    stream.read_exact(&mut bytes).await?;
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(stream)
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Doubt;
    type ToBehaviour = Silent;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ())
    }

    fn on_behaviour_event(&mut self, Doubt: Doubt) {
        match self.question {
            Question::None(_) => self.ask(LIMIT_IN_DOUBT),
            Question::Opening { .. } | Question::Asked(_) => {
                let sooner = Instant::now() + LIMIT_IN_DOUBT;
                if sooner < self.alarm.deadline() {
                    self.alarm.as_mut().reset(sooner);
                }
            }
            Question::Over => {}
        }
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(event) => {
                if matches!(self.question, Question::Opening { .. }) {
                    self.question = Question::Asked(beat(event.protocol).boxed());
                }
            }
            // A second one takes the place of the first, which its owner has given up.
            ConnectionEvent::FullyNegotiatedInbound(event) => {
                self.answering = Some(answer(event.protocol).boxed());
            }
            ConnectionEvent::DialUpgradeError(event) => {
                if matches!(event.error, StreamUpgradeError::NegotiationFailed) {
                    self.question = Question::Over;
                }
                // Anything else is no answer, and the alarm says so.
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), Silent>> {
        while let Some(answering) = &mut self.answering
            && let Poll::Ready(answered) = answering.poll_unpin(cx)
        {
            self.answering = answered.ok().map(|stream| answer(stream).boxed());
            if self.answering.is_some() && matches!(self.question, Question::None(_)) {
                self.alarm.as_mut().reset(Instant::now() + self.interval);
            }
        }
        loop {
            match &mut self.question {
                Question::Over => return Poll::Pending,
                Question::Opening { is_requested } if !*is_requested => {
                    *is_requested = true;
                    return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                        protocol: SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ()),
                    });
                }
                Question::Asked(asked) => match asked.poll_unpin(cx) {
                    Poll::Ready(Ok(stream)) => {
                        self.question = Question::None(Some(stream));
                        self.alarm.as_mut().reset(Instant::now() + self.interval);
                    }
                    Poll::Ready(Err(_)) => {
                        self.question = Question::Over;
                        return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(Silent));
                    }
                    Poll::Pending => {}
                },
                Question::None(_) | Question::Opening { .. } => {}
            }
            if self.alarm.poll_unpin(cx).is_pending() {
                return Poll::Pending;
            }
            match self.question {
                Question::None(_) => self.ask(LIMIT),
                _ => {
                    self.question = Question::Over;
                    return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(Silent));
                }
            }
        }
    }
}
