//! Doubt: what the loop does when peers may be gone without a word.
//!
//! After a change of the network, after waking, and when a peer owes an answer, linked peers are asked for a sign of
//! life ([`pulse`](super::pulse)); what was begun on another network is given up. What follows from a link that turns
//! out dead is the mind's to decide.

use std::time::{Duration, Instant};

use granary_protocol::mesh::Input;
use tracing::info;

use super::Loop;
use crate::identity;

/// How long a peer that was asked for narinfos may say nothing before it is asked for a sign of life. Within the time
/// that a lookup waits, so that the next lookup need not wait for a peer that is gone.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_millis(300);

/// How long after a change of the network a link that turns out dead is taken as lost by it: its peer is dialled anew at
/// once, without a pause. More than the time in which a doubted link is found out.
pub(super) const UNSETTLED: Duration = Duration::from_secs(3);

impl Loop {
    pub(super) fn network_changed(&mut self) {
        info!("network changed");
        self.look_around();
        // After the dials that were given up, so that their back-off is forgotten too.
        self.think(Input::NetworkChanged);
    }

    /// Finds out who is still there, and lets go of what was begun on another network.
    pub(super) fn look_around(&mut self) {
        self.unsettled_since = Some(Instant::now());
        self.network.doubt(|_| true);
        self.network.give_up_dials();
        while let Some(event) = self.network.decided() {
            self.network_event(event);
        }
        self.look_for_neighbours();
    }

    /// Asks those for a sign of life who owe an answer for too long.
    pub(super) fn doubt_silent(&mut self) {
        let asked = &mut self.asked;
        let silent: Vec<_> = asked
            .extract_if(.., |_, since| since.elapsed() >= ANSWER_PATIENCE)
            .filter_map(|(peer, _)| identity::peer_id_of(peer.as_public_key()))
            .collect();
        self.network.doubt(|peer| silent.contains(peer));
    }
}
