//! Contacts: what members say of themselves, and what this node says of itself.

use std::net::SocketAddr;
use std::time::Instant;

use super::{ADDRESSES_MAX, Event, Membership, Peer, Proved, State};
use crate::certificate::{Certificate, SignedCertificate, UnixTime};
use crate::contact::{CONTACT_ADDRESSES_MAX, NotAContact, SignedContact};
use crate::peer::PeerId;

impl Membership {
    /// Takes in what this process's forerunner said of itself: while nothing else is true, it is not
    /// said anew, and a restart costs nobody a word.
    pub(crate) fn own_contact_kept(&mut self, kept: SignedContact) {
        self.own.number = self.own.number.max(kept.contact().number);
        if self.own_signed.is_none() && kept.is_signed() {
            self.own_kept = Some(kept);
        }
    }

    /// Where this node can be reached; returns whether that is news for others.
    pub(crate) fn own_addresses(&mut self, addresses: Vec<SocketAddr>, now: Instant) -> bool {
        let before = self.own_signed.clone();
        self.own.addresses = addresses;
        self.own.addresses.truncate(CONTACT_ADDRESSES_MAX);
        let is_said = |signed: &SignedContact| signed.contact().addresses == self.own.addresses;
        if self.clock.is_some() && !before.as_ref().is_some_and(is_said) {
            self.sign_own(now);
        }
        self.own_signed != before
    }

    /// Takes a new certificate of this node; returns whether what was said of it is to be said anew.
    pub(crate) fn own_certificate(&mut self, certificate: SignedCertificate, now: Instant) -> bool {
        self.own.certificate = certificate;
        let was_said = self.own_signed.is_some();
        if was_said {
            self.sign_own(now);
        }
        was_said
    }

    /// What this node says of itself; `None` before the first member or address.
    pub(crate) fn own_contact(&self) -> Option<&SignedContact> {
        self.own_signed.as_ref()
    }

    pub(super) fn sign_own(&mut self, now: Instant) {
        self.contacts_version += 1;
        let is_same = |kept: &SignedContact| {
            let kept = kept.contact();
            kept.addresses == self.own.addresses
                && kept.transfer_port == self.own.transfer_port
                && kept.certificate == self.own.certificate
        };
        if let Some(kept) = self.own_kept.take()
            && is_same(&kept)
        {
            self.own_signed = Some(kept);
            return;
        }
        self.own.number = self.unix(now).0.max(self.own.number.saturating_add(1));
        // A certificate that does not decode admits us nowhere, and needs no contact.
        self.own_signed = self.own.clone().sign(&self.key).ok();
    }

    /// Takes in what a member says of itself, whoever passes it on; returns whether it is news.
    ///
    /// # Errors
    /// What is wrong with it. An expired one is no lie of whoever kept it a little longer.
    pub(crate) fn contact_told(
        &mut self,
        signed: SignedContact,
        now: Instant,
    ) -> Result<bool, NotAContact> {
        let id = signed.peer();
        let number = signed.contact().number;
        if id == self.me {
            if self.own_signed.is_some() && number > self.own.number {
                // Said before our state was lost, or our clock set back.
                signed.verify(&self.mesh_key, self.unix(now))?;
                self.own.number = number;
                self.sign_own(now);
                return Ok(true);
            }
            return Ok(false);
        }
        let is_known = |known: &Proved| known.signed.contact().number >= number;
        let known = self.peers.get(&id).and_then(|peer| peer.contact.as_deref());
        if known.is_some_and(is_known) {
            return Ok(false);
        }
        let certificate = signed.verify(&self.mesh_key, self.unix(now))?;
        let certificate = self.unless_revoked(certificate)?;
        Ok(self.keep_contact(signed, certificate, now))
    }

    /// Takes in a contact that was verified before an index kept it over a restart.
    pub(crate) fn contact_kept(
        &mut self,
        signed: SignedContact,
        now: Instant,
    ) -> Result<(), NotAContact> {
        let certificate = signed.recall(&self.mesh_key, self.unix(now))?;
        let certificate = self.unless_revoked(certificate)?;
        self.keep_contact(signed, certificate, now);
        Ok(())
    }

    fn keep_contact(
        &mut self,
        signed: SignedContact,
        certificate: Certificate,
        now: Instant,
    ) -> bool {
        let Some(peer) = self.entry(signed.peer()) else {
            return false;
        };
        for address in &signed.contact().addresses {
            let ip = address.ip();
            // Whoever signs this must not make us dial ourselves, or everybody.
            let is_place = !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast();
            if is_place
                && address.port() > 0
                && !peer.addresses.contains(address)
                && peer.addresses.len() < ADDRESSES_MAX
            {
                peer.addresses.push(*address);
            }
        }
        if let State::Linked { transfer_port, .. } = &mut peer.state {
            *transfer_port = signed.contact().transfer_port;
        } else if peer.contact.is_none() && peer.retry_at.is_none() {
            peer.retry_at = Some(now);
        }
        let not_after = certificate.not_after;
        peer.contact = Some(Box::new(Proved {
            signed,
            certificate,
        }));
        if !self.is_large {
            self.due.now();
        }
        self.contacts_version += 1;
        let expires_at = self.instant_of(not_after);
        self.due.by(expires_at.map(|at| (at, "contact expires")));
        let known = self.contact_expires_at.into_iter();
        self.contact_expires_at = known.chain(expires_at).min();
        true
    }

    /// Forgets members whose certificate has ended.
    pub(super) fn forget_expired(&mut self, unix: UnixTime) -> Vec<Event> {
        let mut forgotten = Vec::new();
        let mut next: Option<UnixTime> = None;
        for (id, peer) in &mut self.peers {
            let Some(known) = &peer.contact else { continue };
            let not_after = known.certificate.not_after;
            if not_after <= unix {
                peer.contact = None;
                forgotten.push(Event::Forgotten(*id));
            } else {
                next = Some(next.map_or(not_after, |next| next.min(not_after)));
            }
        }
        self.contacts_version += forgotten.len() as u64;
        self.contact_expires_at = next.and_then(|next| self.instant_of(next));
        forgotten
    }

    /// Changes whenever what [`Membership::contacts`] returns does.
    pub(crate) fn contacts_version(&self) -> u64 {
        self.contacts_version
    }

    /// Every member known by its contact, this node included: its number, ordered by PeerId.
    pub(crate) fn contacts(&self) -> impl Iterator<Item = (PeerId, u64)> + '_ {
        let own = self.own_signed.as_ref().map(|_| (self.me, self.own.number));
        let number = |(id, peer): (&PeerId, &Peer)| {
            let known = peer.contact.as_ref()?;
            Some((*id, known.signed.contact().number))
        };
        let lesser = self.peers.range(..self.me).filter_map(number);
        lesser
            .chain(own)
            .chain(self.peers.range(self.me..).filter_map(number))
    }

    pub(crate) fn contact(&self, id: &PeerId) -> Option<&SignedContact> {
        if *id == self.me {
            return self.own_signed.as_ref();
        }
        let known = self.peers.get(id)?.contact.as_ref()?;
        Some(&known.signed)
    }

    pub(crate) fn is_member(&self, id: &PeerId) -> bool {
        self.contact(id).is_some()
    }
}
