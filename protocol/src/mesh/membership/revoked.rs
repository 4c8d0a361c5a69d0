//! Revoked: what the mesh key's list of revocations does to those who are known, and whose word counts.

use std::time::Instant;

use super::{Event, Membership, Refusal, State};
use crate::certificate::{Badge, Certificate, NotAMember};
use crate::peer::PeerId;
use crate::revocation::{NotOurRevocations, Revocations, SignedRevocations};

/// What became of a list that somebody showed.
pub(crate) enum Shown {
    /// It is newer than ours, and holds from here on.
    New(Vec<Event>),
    /// It is the one we have.
    Known,
    /// It is older than ours, and changes nothing.
    Old,
}

impl Membership {
    /// The newest list that is known.
    pub(crate) fn revocations(&self) -> Option<&SignedRevocations> {
        self.revocations.as_ref()
    }

    /// The number of the newest list; 0 before the first.
    pub(crate) fn revocations_number(&self) -> u64 {
        self.revoked().map_or(0, |list| list.number)
    }

    /// Returns the list for a peer that knows less; once over each link, however often it asks.
    ///
    /// A list may have 160 kB, and a question has a few bytes.
    pub(crate) fn give_revocations(&mut self, to: &PeerId) -> Option<SignedRevocations> {
        let number = self.revocations_number();
        let peer = self.peers.get_mut(to)?;
        if peer.revocations_given >= number {
            return None;
        }
        peer.revocations_given = number;
        self.revocations.clone()
    }

    /// Takes in a list, whoever shows it.
    ///
    /// # Errors
    /// When the mesh key did not sign it.
    pub(crate) fn revocations_told(
        &mut self,
        signed: &SignedRevocations,
        now: Instant,
    ) -> Result<Shown, NotOurRevocations> {
        // Told by many at once, and proved before.
        if self.revocations.as_ref() == Some(signed) {
            return Ok(Shown::Known);
        }
        let list = signed.verify(&self.mesh_key)?;
        let known = self.revocations_number();
        if list.number < known {
            *self.refusals.entry(Refusal::OldRevocations).or_default() += 1;
            return Ok(Shown::Old);
        }
        if list.number == known && self.revocations.is_some() {
            return Ok(Shown::Known);
        }
        self.revocations = Some(signed.clone());
        self.due.now();
        let mut events = Vec::new();
        let mut linked = Vec::new();
        for (id, peer) in &mut self.peers {
            if let State::Linked { certificate, .. } = &peer.state
                && list.is_revoked(certificate)
            {
                linked.push(*id);
            }
            if let Some(known) = &peer.contact
                && list.is_revoked(&known.certificate)
            {
                peer.contact = None;
                self.contacts_version += 1;
                events.push(Event::Forgotten(*id));
            }
        }
        for id in linked {
            // First hung up, then forgotten.
            let refused = self.refuse(id, Refusal::Revoked, now);
            events.splice(0..0, refused);
        }
        Ok(Shown::New(events))
    }

    /// Whether the peer is a member that may vouch for what it built.
    pub(crate) fn may_vouch(&self, id: &PeerId) -> bool {
        let Some(peer) = self.peers.get(id) else {
            return false;
        };
        // While linked, what its Hello showed; else what its contact carries. Either holds.
        match (&peer.state, &peer.contact) {
            (State::Linked { certificate, .. }, _) => certificate.permissions.vouch,
            (_, Some(known)) => known.certificate.permissions.vouch,
            _ => false,
        }
    }

    /// Passes a certificate on unless it was revoked.
    pub(super) fn unless_revoked(
        &self,
        certificate: Certificate,
    ) -> Result<Certificate, NotAMember> {
        match self.revoked() {
            Some(list) if list.is_revoked(&certificate) => Err(NotAMember::Revoked {
                name: certificate.name,
            }),
            _ => Ok(certificate),
        }
    }

    /// The same for a badge.
    pub(super) fn unless_revoked_badge(&self, badge: Badge) -> Result<Badge, NotAMember> {
        match self.revoked() {
            Some(list) if list.is_revoked_badge(&badge) => Err(NotAMember::Revoked {
                name: badge.peer.to_string(),
            }),
            _ => Ok(badge),
        }
    }

    fn revoked(&self) -> Option<&Revocations> {
        // Verified before it was kept.
        self.revocations.as_ref().map(SignedRevocations::claims)
    }
}
