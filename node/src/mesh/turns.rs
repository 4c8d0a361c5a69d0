//! Turns: how much of the loop's time one peer may take with what it says.
//!
//! All peers share the thread of the mesh. Frames are taken from them in turn, so that none waits behind another's
//! queue; but frames differ in what they cost by a thousand times, and nothing keeps a peer from sending without
//! end. So each pays for its frames out of an [`Allowance`] of its own, in seconds of work; and while one owes, its
//! frames are left where they are: its queue fills, it is not read from any more, and TCP slows it down.
//!
//! Invariant: what a peer owes outlives its connections, so that it gains nothing by coming back.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::FutureExt;
use libp2p::PeerId;
use libp2p::swarm::ConnectionId;
use tokio::time::Sleep;

use crate::allowance::{Allowance, Rate};

/// Seconds of work: a peer may keep the loop busy for a quarter of the time, and for two seconds at once. To take in a
/// set of 12,400 paths costs some 50 ms; in a large mesh one neighbour may bring those of a hundred others.
const RATE: Rate = Rate {
    burst: 2.0,
    per_second: 0.25,
};

/// What a frame costs at least, with its decryption and its way through the loop; and so 1,000 a second are the most
/// that one peer can say for long. Lookups leave at most every 2 ms, announcements every 50.
const FRAME: Duration = Duration::from_micros(250);

/// What a byte costs at least; and so 4 MB a second are the most for long, after 32 MB at once.
const BYTE: Duration = Duration::from_nanos(60);

/// What reading one narinfo for a peer costs, on another thread: a query and its text.
const NARINFO: Duration = Duration::from_micros(20);

/// What a link costs that comes to stand: a handshake, and the mind's beginnings with a peer.
const LINK: Duration = Duration::from_millis(5);

/// Peers whose allowance is remembered because it is not full. Beyond it those that owe least are forgiven.
const PEERS_MAX: usize = 1024;

/// What something that a peer said has cost.
#[derive(Clone, Copy, Debug)]
pub struct Cost(Duration);

impl Cost {
    pub fn of_link() -> Cost {
        Cost(LINK)
    }

    /// A frame of so many bytes that kept the loop busy for so long, and has so many narinfos read.
    pub fn of_frame(bytes: usize, busy: Duration, narinfos: usize) -> Cost {
        let bytes = BYTE.saturating_mul(u32::try_from(bytes).unwrap_or(u32::MAX));
        let narinfos = NARINFO.saturating_mul(u32::try_from(narinfos).unwrap_or(u32::MAX));
        Cost(FRAME.max(bytes).max(busy) + narinfos)
    }
}

/// Whose turn it is not.
#[derive(Default)]
pub struct Turns {
    /// Those that are not full.
    allowances: BTreeMap<PeerId, Allowance>,
    /// Connections with frames that wait until their peer owes nothing.
    held: Vec<(Instant, ConnectionId)>,
    next: Option<Pin<Box<Sleep>>>,
}

impl Turns {
    /// Takes what something cost from its peer.
    pub fn charge(&mut self, peer: PeerId, cost: Cost, now: Instant) {
        if self.allowances.len() >= PEERS_MAX && !self.allowances.contains_key(&peer) {
            self.allowances
                .retain(|_, allowance| !allowance.is_full(RATE, now));
        }
        if self.allowances.len() >= PEERS_MAX && !self.allowances.contains_key(&peer) {
            let least = self
                .allowances
                .iter()
                .min_by_key(|(_, allowance)| allowance.owed(RATE, now));
            let least = least.map(|(peer, _)| *peer);
            least.map(|peer| self.allowances.remove(&peer));
        }
        let fresh = || Allowance::new(RATE, now);
        let allowance = self.allowances.entry(peer).or_insert_with(fresh);
        allowance.take(RATE, cost.0.as_secs_f64(), now);
    }

    /// How long a peer has to wait until its next frame is taken.
    pub fn owed(&self, peer: &PeerId, now: Instant) -> Duration {
        let allowance = self.allowances.get(peer);
        allowance.map_or(Duration::ZERO, |allowance| allowance.owed(RATE, now))
    }

    /// Remembers a connection whose frames wait for so long.
    pub fn hold(&mut self, connection: ConnectionId, wait: Duration, now: Instant) {
        self.held.push((now + wait, connection));
        self.next = None;
    }

    /// Waits for a connection whose frames may be taken again.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionId> {
        loop {
            let first = self.held.iter().enumerate().min_by_key(|(_, held)| held.0);
            let Some((position, (at, _))) = first else {
                return Poll::Pending;
            };
            let (position, at) = (position, *at);
            if at <= Instant::now() {
                self.next = None;
                return Poll::Ready(self.held.swap_remove(position).1);
            }
            let sleep = || Box::pin(tokio::time::sleep_until(at.into()));
            let next = self.next.get_or_insert_with(sleep);
            std::task::ready!(next.poll_unpin(cx));
            self.next = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        crate::identity::Identity::from_seed(&[number; 32]).peer_id()
    }

    #[test]
    fn who_says_too_much_waits_and_nobody_else_does() {
        let now = Instant::now();
        let mut turns = Turns::default();
        let (loud, quiet) = (peer(1), peer(2));
        let small = Cost::of_frame(100, Duration::ZERO, 0);
        let mut said = 0;
        while turns.owed(&loud, now).is_zero() {
            turns.charge(loud, small, now);
            said += 1;
        }
        assert!((8_000..8_010).contains(&said), "{said}");
        assert!(turns.owed(&quiet, now).is_zero());
        let second = now + Duration::from_secs(1);
        let mut said = 0;
        while turns.owed(&loud, second).is_zero() {
            turns.charge(loud, small, second);
            said += 1;
        }
        assert!((990..1_010).contains(&said), "{said}");
    }

    #[test]
    fn a_frame_costs_what_it_took_what_it_weighs_and_what_it_has_read() {
        let ms = Duration::from_millis;
        assert_eq!(Cost::of_frame(1, ms(7), 0).0, ms(7));
        assert_eq!(Cost::of_frame(1_000_000, ms(7), 0).0, ms(60));
        assert_eq!(Cost::of_frame(1, ms(7), 256).0, ms(7) + NARINFO * 256);
    }

    #[test]
    fn what_is_remembered_of_strangers_is_bounded_and_the_worst_stay() {
        let now = Instant::now();
        let mut turns = Turns::default();
        let worst = peer(0);
        turns.charge(worst, Cost(Duration::from_secs(9)), now);
        for number in 0..PEERS_MAX as u64 + 10 {
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&(number + 1).to_le_bytes());
            let peer = crate::identity::Identity::from_seed(&seed).peer_id();
            turns.charge(peer, Cost::of_link(), now);
        }
        assert_eq!(turns.allowances.len(), PEERS_MAX);
        assert!(turns.owed(&worst, now) > Duration::from_secs(20));
    }
}
