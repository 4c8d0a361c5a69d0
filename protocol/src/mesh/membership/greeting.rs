//! Greeting: from a connection to a member.
//!
//! Somebody must speak first, without knowing to whom. The dialler does, since it chose to connect:
//! it shows its badge (Knock), which proves membership and tells neither name nor permissions. The
//! other side answers a badge that verifies with its certificate (Hello), and gets the dialler's
//! when that one verifies. So whoever merely connects learns nothing, and whoever is merely dialled
//! learns of a member what it announces anyway, and for how long it is one.

use std::time::Instant;

use super::{Event, Membership, Refusal, State};
use crate::certificate::{SignedBadge, SignedCertificate};
use crate::contact::{NotAContact, SignedContact};
use crate::message::PROTOCOL_VERSION;
use crate::peer::PeerId;
use crate::store_path::StoreDir;

impl Membership {
    /// Reads a badge: a member's is answered with our certificate.
    pub(crate) fn knocked(
        &mut self,
        id: PeerId,
        version: u32,
        badge: &SignedBadge,
        now: Instant,
    ) -> Vec<Event> {
        let Some(State::Greeting { .. }) = self.peers.get(&id).map(|peer| &peer.state) else {
            // A member has no more to prove, and who is gone needs no answer.
            return Vec::new();
        };
        if version < PROTOCOL_VERSION {
            return self.refuse(id, Refusal::Version, now);
        }
        let badge = badge.verify(&self.mesh_key, &id, self.unix(now));
        if let Err(reason) = badge.and_then(|badge| self.unless_revoked_badge(badge)) {
            return self.refuse(id, Refusal::from(&reason), now);
        }
        match self.peers.get_mut(&id).map(|peer| &mut peer.state) {
            Some(State::Greeting { said_hello, .. }) if !*said_hello => {
                *said_hello = true;
                vec![Event::SayHello(id)]
            }
            // However often it knocks.
            _ => Vec::new(),
        }
    }

    /// Reads a certificate: of a peer that is to be a member, or of a member that had it renewed.
    pub(crate) fn hello(
        &mut self,
        id: PeerId,
        version: u32,
        certificate: &SignedCertificate,
        now: Instant,
    ) -> Vec<Event> {
        let Some(peer) = self.peers.get(&id) else {
            return Vec::new();
        };
        let (address, outbound, said_hello, was_linked) = match &peer.state {
            State::Greeting {
                address,
                outbound,
                said_hello,
                ..
            } => (*address, *outbound, *said_hello, None),
            // A member shows a renewed certificate.
            State::Linked {
                address,
                outbound,
                transfer_port,
                ..
            } => (*address, *outbound, true, Some(*transfer_port)),
            State::Away | State::Dialling { .. } => return Vec::new(),
        };
        if version < PROTOCOL_VERSION {
            return self.refuse(id, Refusal::Version, now);
        }
        let certificate = certificate.verify(&self.mesh_key, &id, self.unix(now));
        let certificate = certificate.and_then(|proved| self.unless_revoked(proved));
        let certificate = match certificate {
            Ok(certificate) => Box::new(certificate),
            Err(reason) => return self.refuse(id, Refusal::from(&reason), now),
        };
        let Some(peer) = self.peers.get_mut(&id) else {
            return Vec::new();
        };
        let known_port = || peer.contact.as_ref()?.signed.contact().transfer_port;
        peer.state = State::Linked {
            address,
            outbound,
            transfer_port: was_linked.unwrap_or_else(known_port),
            certificate: certificate.clone(),
        };
        peer.failures = 0;
        peer.retry_at = None;
        if was_linked.is_some() {
            self.changed(&id);
            return Vec::new();
        }
        peer.used_at = Some(now);
        self.linked.insert(id);
        self.first_wish(id, now);
        if self.own_signed.is_none() {
            self.sign_own(now);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.is_wanted = false;
        }
        self.changed(&id);
        let mut events = vec![Event::Admitted {
            peer: id,
            certificate,
            say_hello: !said_hello,
        }];
        events.extend(self.make_room(&id));
        events
    }

    /// Reads what an admitted peer says of itself.
    pub(crate) fn about(
        &mut self,
        id: PeerId,
        store_dir: &StoreDir,
        contact: SignedContact,
        now: Instant,
    ) -> Vec<Event> {
        if *store_dir != self.store_dir {
            return self.refuse(id, Refusal::OtherStoreDir, now);
        }
        if contact.peer() != id {
            return self.refuse(id, Refusal::Garbage, now);
        }
        match self.contact_told(contact.clone(), now) {
            Ok(true) => vec![Event::NewContact(contact)],
            Ok(false) => {
                // We may have heard of it before it was linked.
                if let Some(peer) = self.peers.get_mut(&id)
                    && let Some(known) = &peer.contact
                    && let State::Linked { transfer_port, .. } = &mut peer.state
                {
                    *transfer_port = known.signed.contact().transfer_port;
                }
                Vec::new()
            }
            Err(NotAContact::NotAMember(reason)) => self.refuse(id, Refusal::from(&reason), now),
            Err(NotAContact::BadSignature { .. }) => self.refuse(id, Refusal::Garbage, now),
        }
    }

    /// Refuses a peer that said something else than Knock and Hello; ignores one that is gone already.
    pub(crate) fn spoke_out_of_turn(&mut self, id: PeerId, now: Instant) -> Vec<Event> {
        match self.peers.get(&id).map(|peer| &peer.state) {
            Some(State::Greeting { .. }) => self.refuse(id, Refusal::OutOfTurn, now),
            _ => Vec::new(),
        }
    }
}
