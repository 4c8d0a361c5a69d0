//! Pulls: whose log is behind, who offers what is missing, and who is being asked for it.
//!
//! A node that comes into a large mesh learns of a thousand writers at once. It asks for a few at
//! a time, and not all of one neighbour, so that links carry other words in between.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::is_newer;
use crate::announcement::SignedHead;
use crate::availability::{Cursor, HashPrefix};
use crate::message::CURSORS_MAX;
use crate::peer::PeerId;

/// A pull that made no progress for this long is given up; another offer is tried.
const PULL_TIMEOUT: Duration = Duration::from_secs(10);

/// Pulls under way at once: a page of 256 KiB each, 8 MiB of answers in the queues of all links.
const PULLS_MAX: usize = 32;

/// Of these, asked of one peer: 2 MiB wait in one link's queue at most.
const PULLS_PER_PEER_MAX: usize = 8;

/// Offers remembered per writer; further ones are heard again by the next repair.
const OFFERS_MAX: usize = 8;

/// Writers that something is offered of: as many as one complete list has. Whoever makes up more
/// is not heard; whoever is crowded out by them is offered again by the next repair.
const WRITERS_MAX: usize = CURSORS_MAX;

#[derive(Default)]
pub(super) struct Pulls {
    /// Who says to know more than we do, and what, by writer.
    offers: BTreeMap<PeerId, BTreeMap<PeerId, Offer>>,
    running: BTreeMap<PeerId, Pull>,
}

/// How far somebody says to know a writer.
#[derive(Clone, Copy)]
pub(super) struct Offer {
    /// Number of the contact; 0 if that is not what is offered.
    pub(super) contact: u64,
    pub(super) cursor: Option<Cursor>,
}

pub(super) struct Pull {
    pub(super) from: PeerId,
    since: Instant,
    /// The pages of a snapshot so far.
    pub(super) collected: Option<Collected>,
    /// Who told of more while the pages were turned.
    pub(super) outrun: Option<(PeerId, Offer)>,
}

pub(super) struct Collected {
    pub(super) head: SignedHead,
    pub(super) prefixes: Vec<HashPrefix>,
}

impl Pulls {
    /// Notes that `from` knows more of `writer` than we do.
    pub(super) fn offer(&mut self, writer: PeerId, from: PeerId, offer: Offer) {
        if self.offers.len() >= WRITERS_MAX && !self.offers.contains_key(&writer) {
            return;
        }
        let offers = self.offers.entry(writer).or_default();
        if offers.len() < OFFERS_MAX || writer == from || offers.contains_key(&from) {
            offers.insert(from, offer);
        }
    }

    /// Begins the pulls for which there is room: whom to ask, for which writer.
    pub(super) fn begin(&mut self, now: Instant) -> Vec<(PeerId, PeerId)> {
        if self.offers.is_empty() || self.running.len() >= PULLS_MAX {
            return Vec::new();
        }
        let mut load: BTreeMap<PeerId, usize> = BTreeMap::new();
        for pull in self.running.values() {
            *load.entry(pull.from).or_default() += 1;
        }
        let mut begun = Vec::new();
        for (writer, offers) in &self.offers {
            if self.running.len() + begun.len() >= PULLS_MAX {
                break;
            }
            if self.running.contains_key(writer) {
                continue;
            }
            // The writer itself knows best; otherwise whoever has least to do.
            let load_of = |peer: &PeerId| load.get(peer).copied().unwrap_or(0);
            let free = offers
                .keys()
                .filter(|peer| load_of(peer) < PULLS_PER_PEER_MAX);
            let Some(from) = free.min_by_key(|peer| (*peer != writer, load_of(peer), **peer))
            else {
                continue;
            };
            *load.entry(*from).or_default() += 1;
            begun.push((*from, *writer));
        }
        for (from, writer) in &begun {
            if let Some(offers) = self.offers.get_mut(writer) {
                offers.remove(from);
                if offers.is_empty() {
                    self.offers.remove(writer);
                }
            }
            let pull = Pull {
                from: *from,
                since: now,
                collected: None,
                outrun: None,
            };
            self.running.insert(*writer, pull);
        }
        begun
    }

    /// The pull of `writer` that `from` was asked for, which made progress by this.
    pub(super) fn progressed(
        &mut self,
        writer: &PeerId,
        from: PeerId,
        now: Instant,
    ) -> Option<&mut Pull> {
        let pull = self
            .running
            .get_mut(writer)
            .filter(|pull| pull.from == from)?;
        pull.since = now;
        Some(pull)
    }

    /// The pull of `writer`, if pages of a snapshot are being collected.
    pub(super) fn collecting(&mut self, writer: &PeerId) -> Option<&mut Pull> {
        let pull = self.running.get_mut(writer)?;
        pull.collected.is_some().then_some(pull)
    }

    /// Ends the pull of `writer`, if it is `from` that was asked.
    pub(super) fn end(&mut self, writer: &PeerId, from: PeerId) {
        if self
            .running
            .get(writer)
            .is_some_and(|pull| pull.from == from)
        {
            self.running.remove(writer);
        }
    }

    /// We know `writer` this far: what offers no more is forgotten.
    pub(super) fn learned(&mut self, writer: &PeerId, contact: u64, cursor: Option<Cursor>) {
        if let Some(offers) = self.offers.get_mut(writer) {
            offers.retain(|_, offer| offer.contact > contact || is_newer(offer.cursor, cursor));
            if offers.is_empty() {
                self.offers.remove(writer);
            }
        }
    }

    pub(super) fn forget(&mut self, writer: &PeerId) {
        self.offers.remove(writer);
        self.running.remove(writer);
    }

    /// Forgets what a peer offered and was asked for.
    pub(super) fn departed(&mut self, peer: PeerId) {
        self.running.retain(|_, pull| pull.from != peer);
        self.offers.retain(|_, offers| {
            offers.remove(&peer);
            !offers.is_empty()
        });
    }

    pub(super) fn clear(&mut self) {
        self.running.clear();
        self.offers.clear();
    }

    /// Pulls under way, and how many may be.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.running.len(), PULLS_MAX)
    }

    /// Writers that something is offered of, and how many may be.
    pub(super) fn offered(&self) -> (usize, usize) {
        (self.offers.len(), WRITERS_MAX)
    }

    /// Gives up pulls that made no progress.
    pub(super) fn tick(&mut self, now: Instant) {
        self.running
            .retain(|_, pull| pull.since + PULL_TIMEOUT > now);
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let overdue = self.running.values().map(|pull| pull.since + PULL_TIMEOUT);
        overdue.min()
    }
}
