//! Neighbours: the links over which records travel.
//!
//! In a small mesh every link is one. In a large one each node keeps [`NEIGHBOURS_MIN`] to [`NEIGHBOURS_MAX`],
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
/// vanish, and has a diameter of 4 at 1,000 nodes. Each record arrives about as many times. Below
/// it a node asks for more.
const NEIGHBOURS_MIN: usize = 8;

/// Whoever has as many lets nobody in unless it has to. That half as many again find room as are
/// looked for is what makes most who are asked say yes: between a target of 10 and this limit, a
/// newcomer to a mesh of 250 had to ask 30.
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
        if !self.is_large {
            return self.linked.iter().copied().collect();
        }
        let wished = self.wished().filter(|(_, wishes)| wishes.is_mutual());
        wished.map(|(id, _)| *id).collect()
    }

    /// The linked peers that we want, and what they want.
    fn wished(&self) -> impl Iterator<Item = (&PeerId, &Wishes)> {
        let wishes = |id| self.peers.get(id).map(|peer| (id, &peer.neighbour));
        self.wished.iter().filter_map(wishes)
    }

    /// Wants a linked peer as a neighbour, or no more.
    fn wish_for(&mut self, id: &PeerId, is_wished: bool) -> Option<&mut Wishes> {
        let peer = self.peers.get_mut(id)?;
        peer.neighbour.ours = is_wished;
        if is_wished {
            self.wished.insert(*id);
        } else {
            self.wished.remove(id);
        }
        Some(&mut peer.neighbour)
    }

    /// With the link ends what both sides wanted.
    pub(super) fn forget_wishes(&mut self, id: &PeerId) {
        self.wished.remove(id);
        if let Some(peer) = self.peers.get_mut(id) {
            peer.neighbour = Wishes::default();
        }
    }

    /// Whether this is a large mesh in which we have enough neighbours to hear everything.
    pub(super) fn is_at_home(&self) -> bool {
        self.is_large && self.mutual() >= NEIGHBOURS_MIN / 2
    }

    /// Whether what is heard is passed on.
    pub(crate) fn relays(&self) -> bool {
        self.is_large
    }

    /// What we want of a peer that was admitted just now.
    pub(super) fn first_wish(&mut self, id: PeerId, now: Instant) {
        let has_room = !self.is_large || self.engaged(now) < NEIGHBOURS_MAX;
        // Who was dialled to be asked something is a guest.
        let is_guest = self.is_large && self.peers.get(&id).is_some_and(|peer| peer.is_wanted);
        let is_wished = has_room && !is_guest;
        self.forget_wishes(&id);
        if let Some(wishes) = self.wish_for(&id, is_wished) {
            wishes.asked_at = is_wished.then_some(now);
        }
    }

    /// How we put our wish to a linked peer.
    pub(crate) fn wish(&self, id: &PeerId) -> Wish {
        match self.peers.get(id) {
            Some(peer) if peer.neighbour.ours => {
                if self.is_large && !self.is_at_home() {
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
        let is_large = self.is_large;
        let has_room = self.engaged(now) < NEIGHBOURS_MAX;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Vec::new();
        };
        let wishes = &mut peer.neighbour;
        wishes.theirs = wish != Wish::No;
        let tell = |wish| Event::Tell { peer: id, wish };
        let mut events = Vec::new();
        if wish == Wish::No {
            if is_large && wishes.ours {
                wishes.asked_at = None;
                wishes.declined_at = Some(now);
                self.wish_for(&id, false);
                // Both sides know that it is over.
                events.push(tell(Wish::No));
            }
            self.changed(&id);
            return events;
        }
        wishes.asked_at = None;
        // Who parted a moment ago has crossed words with us: taking each at its word would go on for ever.
        let is_declined = wishes.is_declined(now);
        if wishes.ours {
            // Both want it.
        } else if is_large && wish != Wish::Urgent && (!has_room || is_declined) {
            events.push(tell(Wish::No));
        } else {
            if is_large && !has_room {
                events.extend(self.part_with_one(Some(&id), chance, now));
            }
            self.wish_for(&id, true);
            events.push(tell(Wish::Yes));
        }
        self.changed(&id);
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
        let is_unheard =
            |wishes: &Wishes| wishes.asked_at.is_some_and(|at| at + WISH_TIMEOUT <= now);
        let unheard = self.wished().filter(|(_, wishes)| is_unheard(wishes));
        let unheard: Vec<PeerId> = unheard.map(|(id, _)| *id).collect();
        for id in unheard {
            events.extend(self.decline(&id, now));
        }
        for _ in 0..self.mutual().saturating_sub(NEIGHBOURS_MAX).div_ceil(4) {
            events.extend(self.part_with_one(None, chance, now));
        }
        let busy = self.busy.iter().filter_map(|id| self.peers.get(id));
        let seeking = busy.filter(|peer| {
            matches!(peer.state, State::Dialling { .. } | State::Greeting { .. }) && !peer.is_wanted
        });
        let engaged = self.engaged(now) + seeking.count();
        events.extend(self.seek(NEIGHBOURS_MIN.saturating_sub(engaged), chance, now));
        events
    }

    /// When the neighbours want mending again.
    pub(super) fn neighbours_deadline(&self) -> Option<(Instant, &'static str)> {
        let checked_at = self.neighbours_checked_at?;
        let is_waiting = self.wished().any(|(_, wishes)| wishes.asked_at.is_some());
        let is_well = (NEIGHBOURS_MIN..=NEIGHBOURS_MAX).contains(&self.mutual()) && !is_waiting;
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
                self.wished.insert(*id);
                events.push(Event::Tell {
                    peer: *id,
                    wish: Wish::Yes,
                });
            }
        }
        events
    }

    fn mutual(&self) -> usize {
        let mutual = self.wished().filter(|(_, wishes)| wishes.is_mutual());
        mutual.count()
    }

    /// Neighbours, and those that were asked to be.
    fn engaged(&self, now: Instant) -> usize {
        let is_engaged = |wishes: &Wishes| {
            let is_asked = wishes.asked_at.is_some_and(|at| at + WISH_TIMEOUT > now);
            wishes.theirs || is_asked
        };
        let engaged = self.wished().filter(|(_, wishes)| is_engaged(wishes));
        engaged.count()
    }

    /// Wants a linked peer no more, and tells it; the link stays as long as it is used.
    fn decline(&mut self, id: &PeerId, now: Instant) -> Option<Event> {
        let wishes = self.wish_for(id, false)?;
        wishes.asked_at = None;
        wishes.declined_at = Some(now);
        Some(Event::Tell {
            peer: *id,
            wish: Wish::No,
        })
    }

    /// Ends one neighbourhood, but not that with `spared`.
    fn part_with_one(
        &mut self,
        spared: Option<&PeerId>,
        chance: &mut Chance,
        now: Instant,
    ) -> Option<Event> {
        let mut neighbours = self.neighbours();
        neighbours.retain(|id| Some(id) != spared);
        let id = *chance.pick(&neighbours)?;
        self.decline(&id, now)
    }

    /// Asks so many linked guests to be neighbours, and where there are too few, dials others for it.
    fn seek(&mut self, count: usize, chance: &mut Chance, now: Instant) -> Vec<Event> {
        let mut events = Vec::new();
        if count == 0 {
            return events;
        }
        let is_free = |peer: &Peer| !peer.neighbour.ours && !peer.neighbour.is_declined(now);
        let is_guest = |id: &&PeerId| self.peers.get(id).is_some_and(is_free);
        let mut guests: Vec<PeerId> = self.linked.iter().filter(is_guest).copied().collect();
        while events.len() < count
            && let Some(id) = chance.draw(&mut guests)
        {
            if let Some(wishes) = self.wish_for(&id, true) {
                wishes.asked_at = (!wishes.theirs).then_some(now);
            }
            let wish = self.wish(&id);
            events.push(Event::Tell { peer: id, wish });
        }
        if events.len() == count {
            return events;
        }
        let may_be_dialled = |(_, peer): &(&PeerId, &Peer)| {
            matches!(peer.state, State::Away)
                && !peer.addresses.is_empty()
                && peer.retry_at.is_none_or(|at| at <= now)
        };
        let away = self.peers.iter().filter(may_be_dialled);
        let mut away: Vec<PeerId> = away.map(|(id, _)| *id).collect();
        while events.len() < count
            && let Some(id) = chance.draw(&mut away)
        {
            if let Some(peer) = self.peers.get_mut(&id) {
                events.push(peer.dial(id, now));
                self.busy.insert(id);
            }
        }
        events
    }
}
