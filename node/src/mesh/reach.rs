//! Reach: where this node announces itself, as the machine comes into networks and leaves them, and whom it finds there.
//!
//! Where `mesh.networks` names some, mDNS runs on the interfaces of these alone, and on none while it is not decided. It
//! ends without a goodbye, which would be heard in the network that the machine came into.

use granary_protocol::mesh::Input;
use granary_protocol::network::Reach;
use granary_protocol::peer::PeerId;
use tracing::{debug, warn};

use super::Loop;
use super::discovery::{Config, Discovery, DiscoveryEvent};
use crate::identity;
use crate::place::Place;

impl Loop {
    /// Announces this node where it was decided.
    pub(super) fn reach_decided(&mut self) {
        let reach = self.place.reach.borrow_and_update().clone();
        self.keep_quiet();
        self.discovery = self.mdns.as_ref().and_then(|mdns| begin(mdns, &reach));
    }

    /// Looks for neighbours anew, after the network changed; where networks are chosen, once this one is known.
    pub(super) fn look_for_neighbours(&mut self) {
        let is_everywhere = matches!(**self.place.reach.borrow(), Reach::Everywhere);
        if !is_everywhere {
            self.keep_quiet();
            self.place.look_again();
        } else if let Some(discovery) = &mut self.discovery {
            discovery.restart();
        }
        // Those who are here will be found again.
        if let Some(strangers) = self.caches.strangers() {
            strangers.clear();
        }
    }

    /// Interfaces with addresses that are on no network of `mesh.networks`.
    pub(super) fn silent(&self) -> Vec<String> {
        let reach = self.place.reach.borrow();
        reach.silent().map(str::to_owned).collect()
    }

    pub(super) fn discovery_event(&mut self, event: DiscoveryEvent) {
        match event {
            DiscoveryEvent::Found {
                peer, addresses, ..
            } => {
                if let Some(key) = identity::ed25519_of(&peer) {
                    let peer = PeerId::from_public_key(key);
                    debug!(%peer, ?addresses, "discovered a peer");
                    self.think(Input::Discovered { peer, addresses });
                }
            }
            DiscoveryEvent::Lost { peer } => {
                if let Some(key) = identity::ed25519_of(&peer) {
                    self.think(Input::Lost {
                        peer: PeerId::from_public_key(key),
                    });
                }
            }
            DiscoveryEvent::FoundStranger { peer, address } => {
                if let (Some(strangers), Some(key)) =
                    (self.caches.strangers(), identity::ed25519_of(&peer))
                {
                    debug!(%peer, %address, "found a node of another mesh that shares in public");
                    strangers.found(PeerId::from_public_key(key), address);
                }
            }
            DiscoveryEvent::LostStranger { peer } => {
                if let (Some(strangers), Some(key)) =
                    (self.caches.strangers(), identity::ed25519_of(&peer))
                {
                    strangers.lost(&PeerId::from_public_key(key));
                }
            }
        }
    }

    fn keep_quiet(&mut self) {
        if let Some(discovery) = self.discovery.take() {
            discovery.hush();
        }
    }
}

/// Starts mDNS within reach; `None` where there is no network to announce in, and when it cannot be started.
pub(super) fn begin(mdns: &Config, reach: &Reach) -> Option<Discovery> {
    match Discovery::new(within(mdns, reach)?) {
        Ok(discovery) => Some(discovery),
        Err(error) => {
            warn!(%error, "could not start discovery, going on with configured peers only");
            None
        }
    }
}

/// The interfaces that are both wanted and within reach; `None` without any.
fn within(mdns: &Config, reach: &Reach) -> Option<Config> {
    let Reach::Within { interfaces, .. } = reach else {
        return Some(mdns.clone());
    };
    let is_wanted = |name: &&String| mdns.interfaces.is_empty() || mdns.interfaces.contains(name);
    let interfaces: Vec<_> = interfaces.iter().filter(is_wanted).cloned().collect();
    (!interfaces.is_empty()).then(|| Config {
        interfaces,
        ..mdns.clone()
    })
}

/// Waits until it was decided anew where to be heard; for ever where that is everywhere.
pub(super) async fn decided(place: &mut Place) {
    if place.reach.changed().await.is_err() {
        std::future::pending().await
    }
}
