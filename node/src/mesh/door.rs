//! The door of the control plane: whoever comes in stands in the [`Crowd`] until the mind admits it.
//!
//! A transport around the one that does the handshakes. A stranger's place is made when it connects, and lives in
//! its connection, so that it ends with it; [`Registry::admitted`] takes those of a member away. Who is sent away
//! meanwhile loses its connection, in the handshake or after.
//!
//! Invariant: every inbound connection of a peer that is not admitted has a place.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::{Multiaddr, PeerId, Transport};

use super::swarm::socket_addr_of;
use crate::crowd::{Crowd, Stranger};

/// What a handshake ends in.
type Connected = (PeerId, StreamMuxerBox);

/// A transport whose inbound connections stand in the crowd.
pub struct Door {
    transport: Boxed<Connected>,
    crowd: Arc<Crowd>,
    registry: Registry,
}

/// The connections that stand in the crowd, by who is at their other end.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<BTreeMap<PeerId, Vec<Weak<Place>>>>>);

/// The place of one connection; empty once its peer was admitted.
struct Place(Mutex<Option<Stranger>>);

impl Place {
    fn take(&self) -> Option<Stranger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_strangers(&self) -> bool {
        let place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        place.is_some()
    }
}

impl Registry {
    /// The peer is a member: its connections leave the crowd.
    pub fn admitted(&self, peer: &PeerId) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_peer = places.remove(peer).unwrap_or_default();
        for stranger in of_peer.iter().filter_map(|place| place.upgrade()?.take()) {
            stranger.prove();
        }
    }

    fn enter(&self, peer: PeerId, stranger: Stranger) -> Arc<Place> {
        let place = Arc::new(Place(Mutex::new(Some(stranger))));
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as the crowd has room for, and those of connections that are gone.
        places.retain(|_, places| {
            places.retain(|place| place.strong_count() > 0);
            !places.is_empty()
        });
        places.entry(peer).or_default().push(Arc::downgrade(&place));
        place
    }
}

impl Door {
    pub fn new(transport: Boxed<Connected>, crowd: Arc<Crowd>, registry: Registry) -> Door {
        Door {
            transport,
            crowd,
            registry,
        }
    }
}

impl Transport for Door {
    type Output = Connected;
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, io::Result<Connected>>;
    type Dial = <Boxed<Connected> as Transport>::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.transport.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.transport.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        self.transport.dial(address, options)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        let event = std::task::ready!(Pin::new(&mut self.transport).poll(cx));
        Poll::Ready(match event {
            TransportEvent::Incoming {
                listener_id,
                upgrade,
                local_addr,
                send_back_addr,
            } => {
                let address = socket_addr_of(&send_back_addr);
                let stranger = address.and_then(|address| self.crowd.enter(address.ip()));
                let upgrade = match stranger {
                    Some(stranger) => greet(upgrade, stranger, self.registry.clone()).boxed(),
                    // Dropping the handshake closes the connection.
                    None => std::future::ready(Err(refused("came too often"))).boxed(),
                };
                TransportEvent::Incoming {
                    listener_id,
                    upgrade,
                    local_addr,
                    send_back_addr,
                }
            }
            event => event.map_upgrade(|upgrade| upgrade.boxed()),
        })
    }
}

async fn greet(
    handshake: impl Future<Output = io::Result<Connected>>,
    stranger: Stranger,
    registry: Registry,
) -> io::Result<Connected> {
    let sent_away = stranger.sent_away();
    let (peer, muxer) = tokio::select! {
        connected = handshake => connected?,
        () = sent_away => return Err(refused("made room for others in its handshake")),
    };
    let sent_away = stranger.sent_away().boxed();
    let guarded = Guarded {
        muxer,
        place: registry.enter(peer, stranger),
        sent_away: Some(sent_away),
    };
    Ok((peer, StreamMuxerBox::new(guarded)))
}

fn refused(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        format!("a stranger {why}"),
    )
}

/// A connection that holds its place, and fails when that is needed for others.
struct Guarded {
    muxer: StreamMuxerBox,
    place: Arc<Place>,
    /// `None` once its peer was admitted.
    sent_away: Option<BoxFuture<'static, ()>>,
}

impl StreamMuxer for Guarded {
    type Substream = <StreamMuxerBox as StreamMuxer>::Substream;
    type Error = io::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        Pin::new(&mut self.muxer).poll_inbound(cx)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        Pin::new(&mut self.muxer).poll_outbound(cx)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        if let Some(sent_away) = &mut self.sent_away
            && sent_away.poll_unpin(cx).is_ready()
        {
            self.sent_away = None;
            if self.place.is_strangers() {
                return Poll::Ready(Err(refused("made room for others")));
            }
        }
        Pin::new(&mut self.muxer).poll(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.muxer).poll_close(cx)
    }
}
