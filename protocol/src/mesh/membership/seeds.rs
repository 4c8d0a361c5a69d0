//! Seeds: configured addresses (`mesh.peers`) whose peers are not known beforehand.

use std::time::Instant;

use super::{DIAL_TIMEOUT, RETRY_MAX, pause_after};
use crate::mesh::Chance;
use crate::peer::PeerId;

pub(super) struct Seeds(Vec<Seed>);

/// An address of an unknown peer.
struct Seed {
    peer: Option<PeerId>,
    failures: u32,
    /// `None` while a dial is under way or its peer is connected.
    retry_at: Option<Instant>,
    dialled_at: Option<Instant>,
}

impl Seeds {
    pub(super) fn new(count: usize, now: Instant) -> Seeds {
        let seed = || Seed {
            peer: None,
            failures: 0,
            retry_at: Some(now),
            dialled_at: None,
        };
        Seeds(std::iter::repeat_with(seed).take(count).collect())
    }

    /// The network is another one: what failed may work.
    pub(super) fn forget_failures(&mut self, now: Instant) {
        for seed in self.0.iter_mut().filter(|seed| seed.retry_at.is_some()) {
            seed.failures = 0;
            seed.retry_at = Some(now);
        }
    }

    pub(super) fn leads_to(&mut self, seed: usize, peer: PeerId) {
        if let Some(seed) = self.0.get_mut(seed) {
            seed.leads_to(peer);
        }
    }

    pub(super) fn failed(&mut self, seed: usize, chance: &mut Chance, now: Instant) {
        if let Some(seed) = self.0.get_mut(seed) {
            seed.back_off(chance, now);
        }
    }

    /// The peer behind some seeds is not connected any more, and is not dialled before `not_before`.
    pub(super) fn link_down(
        &mut self,
        peer: PeerId,
        was_linked: bool,
        not_before: Option<Instant>,
        chance: &mut Chance,
        now: Instant,
    ) {
        for seed in self.0.iter_mut().filter(|seed| seed.peer == Some(peer)) {
            if was_linked {
                seed.failures = 0;
            }
            seed.back_off(chance, now);
            seed.retry_at = seed.retry_at.max(not_before);
        }
    }

    /// Returns the seeds to dial.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<usize> {
        let mut dials = Vec::new();
        for (number, seed) in self.0.iter_mut().enumerate() {
            if seed.retry_at.is_some_and(|at| at <= now) {
                seed.retry_at = None;
                seed.dialled_at = Some(now);
                dials.push(number);
            } else if seed.dialled_at.is_some_and(|at| at + DIAL_TIMEOUT <= now) {
                seed.dialled_at = None;
                seed.retry_at = Some(now + RETRY_MAX);
            }
        }
        dials
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let due = self
            .0
            .iter()
            .filter_map(|seed| match (seed.retry_at, seed.dialled_at) {
                (Some(at), _) => Some((at, "dial seed")),
                (None, Some(at)) => Some((at + DIAL_TIMEOUT, "seed overdue")),
                (None, None) => None,
            });
        due.min_by_key(|(at, _)| *at)
    }
}

impl Seed {
    /// Failures stay until the peer proves membership; what answers here may be a stranger.
    fn leads_to(&mut self, id: PeerId) {
        self.peer = Some(id);
        self.retry_at = None;
        self.dialled_at = None;
    }

    fn back_off(&mut self, chance: &mut Chance, now: Instant) {
        self.peer = None;
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + pause_after(self.failures, chance));
        self.dialled_at = None;
    }
}
