//! Revocations: how the list of those who were put out spreads, and what else it ends.
//!
//! Whoever is linked is told its number; the side that knows less asks, the other gives. A list that
//! is news is passed on at once to everybody linked, so that it crosses the mesh in as many steps as
//! the mesh has; who is linked anew gets it one question later.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::Instant;

use super::{MemberEvent, Mesh, Output, Refusal, Shown, SourceId};
use crate::availability::AvailabilityIndex;
use crate::message::Message;
use crate::peer::PeerId;
use crate::revocation::SignedRevocations;

impl Mesh {
    /// The newest list of revocations that this node knows.
    pub fn revocations(&self) -> Option<&SignedRevocations> {
        self.membership.revocations()
    }

    /// Takes in a list that a peer sent, or that a person gave.
    pub(super) fn revocations_told(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: Option<PeerId>,
        list: SignedRevocations,
        now: Instant,
    ) {
        let events = match self.membership.revocations_told(&list, now) {
            Ok(Shown::New(events)) => events,
            Ok(Shown::Known) => return,
            Ok(Shown::Old) => {
                match (from, self.membership.revocations().cloned()) {
                    // Somebody put an old list where ours is kept.
                    (None, Some(list)) => self.outputs.push_back(Output::KeepRevocations { list }),
                    _ => self.revocations_known(from),
                }
                return;
            }
            Err(_) => {
                if let Some(from) = from {
                    let events = self.membership.refuse(from, Refusal::Garbage, now);
                    self.member_events(index, events, now);
                }
                return;
            }
        };
        self.outputs
            .push_back(Output::KeepRevocations { list: list.clone() });
        let out = |event: &MemberEvent| match event {
            MemberEvent::Forgotten(peer) | MemberEvent::Refused { peer, .. } => Some(*peer),
            _ => None,
        };
        let out: BTreeSet<PeerId> = events.iter().filter_map(out).collect();
        self.member_events(index, events, now);
        for peer in out {
            for fetch in self.fetches.of(SourceId::Peer(peer)) {
                if let Some(sources) = self.sources_of(index, fetch, now) {
                    let events = self.fetches.switch(fetch, &sources, now);
                    self.fetch_events(index, events, now);
                }
            }
        }
        for peer in self.membership.linked() {
            if Some(peer) != from {
                self.give_revocations(peer);
            }
        }
    }

    /// Reads which list a peer knows: gives it ours, or asks for its.
    pub(super) fn revocations_number_told(&mut self, peer: PeerId, number: u64) {
        let own = self.membership.revocations_number();
        match own.cmp(&number) {
            Ordering::Greater => self.give_revocations(peer),
            Ordering::Less => self.send(peer, Message::RevocationsKnown { number: own }),
            Ordering::Equal => {}
        }
    }

    fn give_revocations(&mut self, peer: PeerId) {
        if let Some(list) = self.membership.give_revocations(&peer) {
            self.send(peer, Message::Revocations(list));
        }
    }

    /// Tells which list we have; without any there is nothing to tell.
    pub(super) fn revocations_known(&mut self, to: Option<PeerId>) {
        let number = self.membership.revocations_number();
        if let Some(peer) = to.filter(|_| number > 0) {
            self.send(peer, Message::RevocationsKnown { number });
        }
    }
}
