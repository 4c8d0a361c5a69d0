//! Neighbours: the links over which records travel.
//!
//! In a small mesh every link is one. In a large one each node keeps [`NEIGHBOURS_TARGET`] or so,
//! chosen at random, so that the mesh holds together whichever machines fall asleep, and a record
//! reaches everyone in a few steps. A link counts when both sides want it; so nobody is without
//! somebody who tells it things. A node that has none at all asks urgently, and is let in by
//! whoever it asks, who parts with another neighbour for it.

use std::time::{Duration, Instant};

use super::{Event, FULL_MESH_AGAIN_MEMBERS, FULL_MESH_MEMBERS_MAX, Membership, Peer, State};
use crate::mesh::Chance;
use crate::message::Wish;
use crate::peer::PeerId;

/// A random graph with this many links per node stays in one piece although a third of its nodes
/// vanish, and has a diameter of 4 at 1,000 nodes. Each record arrives about as many times.
const NEIGHBOURS_TARGET: usize = 10;

/// Below it new ones are asked urgently enough to be let in; above [`NEIGHBOURS_MAX`] some are let go.
const NEIGHBOURS_MIN: usize = 8;
const NEIGHBOURS_MAX: usize = 12;

/// How often a node that has too few or too many looks for a remedy.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A wish that was not returned by then will not be.
const WISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Who declined is not asked again before.
const DECLINED_PAUSE: Duration = Duration::from_secs(60);

/// What two linked peers want of each other.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) ours: bool,
    pub(super) theirs: bool,
    /// When we wished without being wished for.
    asked_at: Option<Instant>,
    declined_at: Option<Instant>,
}

impl Wishes {
    pub(super) fn is_mutual(&self) -> bool {
        self.ours && self.theirs
    }

    fn is_declined(&self, now: Instant) -> bool {
        self.declined_at.is_some_and(|at| at + DECLINED_PAUSE > now)
    }
}

impl Membership {
    /// The linked peers that records are exchanged with.
    pub(crate) fn neighbours(&self) -> Vec<PeerId> {
        let is_neighbour = |id: &&PeerId| {
            let peer = self.peers.get(id);
            !self.is_large || peer.is_some_and(|peer| peer.neighbour.is_mutual())
        };
        self.linked.iter().filter(is_neighbour).copied().collect()
    }

    /// Whether what is heard is passed on.
    pub(crate) fn relays(&self) -> bool {
        self.is_large
    }

    /// What we want of a peer that was admitted just now.
    pub(super) fn first_wish(&mut self, id: PeerId, now: Instant) {
        let has_room = !self.is_large || self.engaged(now) < NEIGHBOURS_MAX;
        if let Some(peer) = self.peers.get_mut(&id) {
            // Who was dialled to be asked something is a guest.
            let wishes = Wishes {
                ours: has_room && !(self.is_large && peer.is_wanted),
                ..Wishes::default()
            };
            peer.neighbour = wishes;
            peer.neighbour.asked_at = peer.neighbour.ours.then_some(now);
        }
    }

    /// How we put our wish to a linked peer.
    pub(crate) fn wish(&self, id: &PeerId) -> Wish {
        match self.peers.get(id) {
            Some(peer) if peer.neighbour.ours => {
                if self.is_large && self.mutual() < NEIGHBOURS_MIN / 2 {
                    Wish::Urgent
                } else {
                    Wish::Yes
                }
            }
            _ => Wish::No,
        }
    }

    /// A linked peer says what it wants.
    pub(crate) fn wish_told(
        &mut self,
        id: PeerId,
        wish: Wish,
        chance: &mut Chance,
        now: Instant,
    ) -> Vec<Event> {
        self.is_changed = true;
        let engaged = self.engaged(now);
        let is_large = self.is_large;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Vec::new();
        };
        peer.neighbour.theirs = wish != Wish::No;
        if wish == Wish::No {
            if is_large && peer.neighbour.ours {
                peer.neighbour.ours = false;
                peer.neighbour.asked_at = None;
                peer.neighbour.declined_at = Some(now);
                // Both sides know that it is over.
                return vec![Event::Tell {
                    peer: id,
                    wish: Wish::No,
                }];
            }
            return Vec::new();
        }
        peer.neighbour.asked_at = None;
        if peer.neighbour.ours {
            return Vec::new();
        }
        let mut events = Vec::new();
        let has_room = engaged < NEIGHBOURS_MAX;
        // Who parted a moment ago has crossed words with us: taking each at its word would go on for ever.
        let is_declined = peer.neighbour.is_declined(now);
        if is_large && wish != Wish::Urgent && (!has_room || is_declined) {
            return vec![Event::Tell {
                peer: id,
                wish: Wish::No,
            }];
        }
        if is_large && !has_room {
            events.extend(self.part_with_one(Some(&id), chance, now));
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.neighbour.ours = true;
        }
        events.push(Event::Tell {
            peer: id,
            wish: Wish::Yes,
        });
        events
    }

    /// Finds out whether everyone can be linked, and mends too few or too many neighbours.
    pub(super) fn check_neighbours(&mut self, chance: &mut Chance, now: Instant) -> Vec<Event> {
        // Counting looks at everybody: in a large mesh, not more often than anything is mended.
        let is_early = self
            .neighbours_checked_at
            .is_some_and(|at| at + CHECK_INTERVAL > now);
        if self.is_large && is_early {
            return Vec::new();
        }
        let mut events = self.recount(now);
        if !self.is_large {
            self.neighbours_checked_at = None;
            return events;
        }
        self.neighbours_checked_at = Some(now);
        for id in &self.linked {
            let Some(peer) = self.peers.get_mut(id) else {
                continue;
            };
            let wishes = &mut peer.neighbour;
            if wishes.asked_at.is_some_and(|at| at + WISH_TIMEOUT <= now) {
                wishes.asked_at = None;
                wishes.ours = false;
                wishes.declined_at = Some(now);
                events.push(Event::Tell {
                    peer: *id,
                    wish: Wish::No,
                });
            }
        }
        let mutual = self.mutual();
        for _ in 0..mutual.saturating_sub(NEIGHBOURS_MAX).div_ceil(4) {
            events.extend(self.part_with_one(None, chance, now));
        }
        let busy = self.busy.iter().filter_map(|id| self.peers.get(id));
        let seeking = busy.filter(|peer| {
            matches!(peer.state, State::Dialling { .. } | State::Greeting { .. }) && !peer.is_wanted
        });
        let mut engaged = self.engaged(now) + seeking.count();
        while engaged < NEIGHBOURS_TARGET {
            let Some(event) = self.seek_one(chance, now) else {
                break;
            };
            events.push(event);
            engaged += 1;
        }
        events
    }

    /// When the neighbours want mending again.
    pub(super) fn neighbours_deadline(&self, now: Instant) -> Option<(Instant, &'static str)> {
        if !self.is_large {
            return None;
        }
        let mut linked = self.linked.iter().filter_map(|id| self.peers.get(id));
        let is_waiting = linked.any(|peer| peer.neighbour.asked_at.is_some());
        let mutual = self.mutual();
        let is_well = (NEIGHBOURS_MIN..=NEIGHBOURS_MAX).contains(&mutual) && !is_waiting;
        let checked_at = self.neighbours_checked_at.unwrap_or(now);
        (!is_well).then_some((checked_at + CHECK_INTERVAL, "mend the neighbours"))
    }

    /// Counts the members that could be linked, and changes over between a small and a large mesh.
    fn recount(&mut self, now: Instant) -> Vec<Event> {
        let could_be_linked = |peer: &Peer| match peer.state {
            State::Linked { .. } => true,
            _ => peer.contact.is_some() || !peer.addresses.is_empty() && peer.failures == 0,
        };
        let members = 1 + self
            .peers
            .values()
            .filter(|peer| could_be_linked(peer))
            .count();
        let was_large = self.is_large;
        self.is_large = if was_large {
            members >= FULL_MESH_AGAIN_MEMBERS
        } else {
            members > FULL_MESH_MEMBERS_MAX
        };
        if self.is_large || !was_large {
            return Vec::new();
        }
        let mut events = Vec::new();
        for (id, peer) in &mut self.peers {
            if matches!(peer.state, State::Away) && peer.retry_at.is_none() {
                peer.retry_at = Some(now);
            }
            if matches!(peer.state, State::Linked { .. }) && !peer.neighbour.ours {
                peer.neighbour.ours = true;
                events.push(Event::Tell {
                    peer: *id,
                    wish: Wish::Yes,
                });
            }
        }
        events
    }

    fn mutual(&self) -> usize {
        let is_mutual = |id: &&PeerId| {
            let peer = self.peers.get(id);
            peer.is_some_and(|peer| peer.neighbour.is_mutual())
        };
        self.linked.iter().filter(is_mutual).count()
    }

    /// Neighbours, and those that were asked to be.
    fn engaged(&self, now: Instant) -> usize {
        let is_engaged = |id: &&PeerId| {
            self.peers.get(id).is_some_and(|peer| {
                let wishes = &peer.neighbour;
                let is_asked = wishes.asked_at.is_some_and(|at| at + WISH_TIMEOUT > now);
                wishes.ours && (wishes.theirs || is_asked)
            })
        };
        self.linked.iter().filter(is_engaged).count()
    }

    /// Ends one neighbourhood, but not that with `spared`; the link stays as long as it is used.
    fn part_with_one(
        &mut self,
        spared: Option<&PeerId>,
        chance: &mut Chance,
        now: Instant,
    ) -> Option<Event> {
        let mut neighbours = self.neighbours();
        neighbours.retain(|id| Some(id) != spared);
        let id = *chance.pick(&neighbours)?;
        let wishes = &mut self.peers.get_mut(&id)?.neighbour;
        wishes.ours = false;
        wishes.declined_at = Some(now);
        Some(Event::Tell {
            peer: id,
            wish: Wish::No,
        })
    }

    /// Asks a linked guest to be a neighbour, or dials somebody for it.
    fn seek_one(&mut self, chance: &mut Chance, now: Instant) -> Option<Event> {
        let is_free = |peer: &Peer| !peer.neighbour.ours && !peer.neighbour.is_declined(now);
        let guests = self
            .linked
            .iter()
            .filter(|id| self.peers.get(id).is_some_and(is_free));
        let guests: Vec<PeerId> = guests.copied().collect();
        if let Some(id) = chance.pick(&guests).copied() {
            let peer = self.peers.get_mut(&id)?;
            peer.neighbour.ours = true;
            peer.neighbour.asked_at = (!peer.neighbour.theirs).then_some(now);
            return Some(Event::Tell {
                peer: id,
                wish: self.wish(&id),
            });
        }
        let may_be_dialled = |(_, peer): &(&PeerId, &Peer)| {
            matches!(peer.state, State::Away)
                && !peer.addresses.is_empty()
                && peer.retry_at.is_none_or(|at| at <= now)
                && is_free(peer)
        };
        let away: Vec<PeerId> = self
            .peers
            .iter()
            .filter(may_be_dialled)
            .map(|(id, _)| *id)
            .collect();
        let id = *chance.pick(&away)?;
        self.busy.insert(id);
        let peer = self.peers.get_mut(&id)?;
        Some(peer.dial(id, now))
    }
}
