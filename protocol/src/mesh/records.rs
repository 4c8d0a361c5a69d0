//! Records: what the mind does about what is said of writers, between gossip, membership and index.
//!
//! Gossip knows logs and sets, membership knows who is a member and by what contact. A record counts
//! when both agree, and then its proof is kept in the index and, in a large mesh, it is passed on.

use std::time::Instant;

use super::{Mesh, Refusal};
use crate::announcement::SignedHead;
use crate::availability::{AvailabilityIndex, Cursor};
use crate::contact::{NotAContact, SignedContact};
use crate::hash::sha256;
use crate::message::{CURSORS_MAX, Message, Summary, WriterCursor};
use crate::peer::PeerId;
use crate::wire;

impl Mesh {
    /// A writer's set changed here: keeps the proof, and passes the news on.
    pub(super) fn set_changed(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        head: &SignedHead,
        mut news: Message,
    ) {
        let (writer, cursor) = (head.head().writer, head.head().cursor);
        let Some(contact) = self.membership.contact(&writer) else {
            return;
        };
        let number = contact.contact().number;
        index.keep_proof(&writer, &wire::encode_proof(contact, head));
        self.gossip.learned(&writer, number, Some(cursor));
        if let Message::Cursors { cursors, .. } = &mut news {
            for known in cursors {
                known.contact = number;
            }
        }
        if self.membership.relays() {
            self.tell_neighbours(&news, &[from, writer]);
        }
    }

    /// Reads what a member says of itself, passed on by `from`.
    pub(super) fn contact_told(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        contact: SignedContact,
        now: Instant,
    ) {
        match self.membership.contact_told(contact.clone(), now) {
            Ok(true) => self.contact_news(index, from, contact),
            Ok(false) => {}
            Err(NotAContact::BadSignature { .. }) => {
                let events = self.membership.refuse(from, Refusal::Garbage, now);
                self.member_events(index, events, now);
            }
            // Its certificate may have ended, or our clock be wrong.
            Err(NotAContact::NotAMember(_)) => {}
        }
    }

    pub(super) fn contact_news(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        from: PeerId,
        contact: SignedContact,
    ) {
        let peer = contact.peer();
        if peer == self.me {
            return self.tell_own_contact();
        }
        let number = contact.contact().number;
        self.gossip.learned(&peer, number, index.cursor(&peer));
        if self.membership.relays() {
            self.tell_neighbours(&Message::Contact(contact), &[from, peer]);
        }
    }

    /// Whether a record of our own log is from a future that we lost; then a new epoch began.
    pub(super) fn own_future(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        head: &SignedHead,
        now: Instant,
    ) -> bool {
        if head.head().writer != self.me {
            return false;
        }
        let unix = self.membership.unix(now);
        let began = self.gossip.own_future(index, head, unix, &mut self.chance);
        if began {
            self.tell_own_cursor();
        }
        began
    }

    /// What this node knows of everybody, ascending.
    pub(super) fn known(&self, index: &dyn AvailabilityIndex) -> Vec<WriterCursor> {
        let mut cursors = index.writers().into_iter().peekable();
        let known = |(writer, contact): (PeerId, u64)| {
            while cursors.next_if(|(other, _)| *other < writer).is_some() {}
            let cursor = cursors.next_if(|(other, _)| *other == writer);
            WriterCursor {
                writer,
                contact,
                cursor: cursor.map(|(_, cursor)| cursor),
            }
        };
        let mut all: Vec<WriterCursor> = self.membership.contacts().map(known).collect();
        all.truncate(CURSORS_MAX);
        all
    }

    /// What this node knows of the writers that somebody tells of, ascending as those are.
    pub(super) fn known_of(
        &self,
        index: &dyn AvailabilityIndex,
        told: &[WriterCursor],
    ) -> Vec<WriterCursor> {
        let known = |told: &WriterCursor| {
            let contact = self.membership.contact(&told.writer)?;
            Some(WriterCursor {
                writer: told.writer,
                contact: contact.contact().number,
                cursor: index.cursor(&told.writer),
            })
        };
        told.iter().filter_map(known).collect()
    }

    /// The digest of [`Mesh::known`], worked out when something changed since.
    pub(super) fn summary(&mut self, index: &dyn AvailabilityIndex) -> Summary {
        let version = (self.membership.contacts_version(), self.gossip.version());
        match self.summary {
            Some((at, summary)) if at == version => summary,
            _ => {
                let summary = self.summary_anew(index);
                self.summary = Some((version, summary));
                summary
            }
        }
    }

    fn summary_anew(&self, index: &dyn AvailabilityIndex) -> Summary {
        let known = self.known(index);
        let mut bytes = Vec::with_capacity(known.len() * 56);
        for one in known {
            bytes.extend(one.writer.as_public_key());
            bytes.extend(one.contact.to_be_bytes());
            // No log stands at the very end of numbers.
            let cursor = one.cursor.unwrap_or(Cursor {
                epoch: u64::MAX,
                sequence: u64::MAX,
            });
            bytes.extend(cursor.epoch.to_be_bytes());
            bytes.extend(cursor.sequence.to_be_bytes());
        }
        Summary(sha256(&bytes))
    }

    pub(super) fn compare_summary(
        &mut self,
        index: &dyn AvailabilityIndex,
        peer: PeerId,
        theirs: Summary,
    ) {
        if self.summary(index) != theirs {
            let cursors = self.known(index);
            let is_complete = true;
            self.send(
                peer,
                Message::Cursors {
                    cursors,
                    is_complete,
                },
            );
        }
    }

    /// Reads the proofs that the index kept over a restart: who the writers are, and that they said so.
    pub(super) fn restore(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) {
        if std::mem::replace(&mut self.is_restored, true) {
            return;
        }
        for (writer, cursor) in index.writers() {
            let proof = index.proof(&writer);
            let Some(Ok((contact, head))) = proof.map(|proof| wire::decode_proof(&proof)) else {
                continue;
            };
            if contact.peer() != writer || head.head().writer != writer {
                continue;
            }
            if writer == self.me {
                self.membership.own_contact_kept(contact);
            } else if self.membership.contact_kept(contact, now).is_err() {
                continue;
            }
            // Whether it is proved is found out when somebody asks for it.
            if head.head().cursor == cursor {
                self.gossip.remember(&head);
            }
        }
    }

    /// Keeps what this node says of itself, for the process after this one.
    pub(super) fn keep_own(&mut self, index: &mut dyn AvailabilityIndex) {
        if let Some(contact) = self.membership.own_contact() {
            let proof = wire::encode_proof(contact, &self.gossip.own_head());
            index.keep_proof(&self.me, &proof);
        }
    }

    /// Tells everybody linked where our own log stands now, in a way that makes them pull.
    pub(super) fn tell_own_cursor(&mut self) {
        let Some(contact) = self.membership.own_contact() else {
            return;
        };
        let own = WriterCursor {
            writer: self.me,
            contact: contact.contact().number,
            cursor: Some(self.gossip.cursor()),
        };
        let message = Message::Cursors {
            cursors: vec![own],
            is_complete: false,
        };
        for peer in self.membership.linked() {
            self.send(peer, message.clone());
        }
    }

    pub(super) fn tell_own_contact(&mut self) {
        if let Some(contact) = self.membership.own_contact().cloned() {
            for peer in self.membership.linked() {
                self.send(peer, Message::Contact(contact.clone()));
            }
        }
    }

    pub(super) fn tell_neighbours(&mut self, message: &Message, except: &[PeerId]) {
        for peer in self.membership.neighbours() {
            if !except.contains(&peer) {
                self.send(peer, message.clone());
            }
        }
    }
}
