//! Relay: signed records of other writers, kept to be passed on.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::announcement::{Delta, SignedHead};
use crate::availability::{Cursor, HashPrefix};
use crate::message::{Message, SNAPSHOT_PREFIXES_MAX};
use crate::peer::PeerId;

/// Operations of other writers kept to answer pulls; 4 MiB. What is dropped is told by snapshots.
const OPERATIONS_KEPT_MAX: usize = 262_144;

/// Sets of several pages that are being read by somebody; 32 MiB each at the worst.
const VERSIONS_MAX: usize = 4;

/// How long after the last page a set is kept as it was.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Relay {
    /// The last deltas of each writer, each following the one before.
    tails: BTreeMap<PeerId, VecDeque<Delta>>,
    operations: usize,
    /// The newest proved head of each writer.
    heads: BTreeMap<PeerId, SignedHead>,
    versions: BTreeMap<PeerId, Version>,
}

/// A set at one position, held while its pages are turned.
struct Version {
    head: SignedHead,
    prefixes: Vec<HashPrefix>,
    used_at: Instant,
}

impl Relay {
    /// Keeps a proved delta that continued our copy.
    pub(super) fn keep_delta(&mut self, delta: &Delta) {
        self.keep_head(delta.head());
        let tail = self.tails.entry(delta.writer()).or_default();
        let follows = |last: &Delta| last.head().head().cursor == delta.after();
        if !tail.back().is_none_or(follows) {
            let dropped: usize = tail.drain(..).map(|delta| delta.operations().len()).sum();
            self.operations -= dropped;
        }
        self.operations += delta.operations().len();
        tail.push_back(delta.clone());
        while self.operations > OPERATIONS_KEPT_MAX {
            // Whoever has most gives first.
            let longest = self
                .tails
                .iter()
                .max_by_key(|(_, tail)| tail.len())
                .map(|(writer, _)| *writer);
            let Some(tail) = longest.and_then(|writer| self.tails.get_mut(&writer)) else {
                break;
            };
            let Some(dropped) = tail.pop_front() else {
                break;
            };
            self.operations -= dropped.operations().len();
        }
    }

    pub(super) fn keep_head(&mut self, head: &SignedHead) {
        self.heads.insert(head.head().writer, head.clone());
    }

    /// The deltas seen no longer lead to our copy of the set.
    pub(super) fn drop_tail(&mut self, writer: &PeerId) {
        if let Some(tail) = self.tails.remove(writer) {
            let dropped: usize = tail.iter().map(|delta| delta.operations().len()).sum();
            self.operations -= dropped;
        }
    }

    pub(super) fn forget(&mut self, writer: &PeerId) {
        self.drop_tail(writer);
        self.heads.remove(writer);
        self.versions.remove(writer);
    }

    /// Returns the proof of a writer's set at `cursor`.
    pub(super) fn head(&self, writer: &PeerId, cursor: Cursor) -> Option<&SignedHead> {
        let head = self.heads.get(writer)?;
        (head.head().cursor == cursor).then_some(head)
    }

    /// Returns the deltas that lead from `after` to the end, if all of them are here.
    pub(super) fn deltas_after(&self, writer: &PeerId, after: Cursor) -> Option<Vec<Delta>> {
        let tail = self.tails.get(writer)?;
        let reaches = |delta: &&Delta| {
            let end = delta.head().head().cursor;
            end.epoch == after.epoch && end.sequence > after.sequence
        };
        let deltas: Vec<Delta> = tail.iter().filter(reaches).cloned().collect();
        let first = deltas.first()?;
        (first.after().sequence <= after.sequence).then_some(deltas)
    }

    /// Cuts a set into pages; returns the first, and holds the others if there are any.
    pub(super) fn first_page(
        &mut self,
        head: SignedHead,
        prefixes: Vec<HashPrefix>,
        now: Instant,
    ) -> Message {
        let page = page(&head, None, &prefixes);
        if prefixes.len() > SNAPSHOT_PREFIXES_MAX {
            if self.versions.len() >= VERSIONS_MAX
                && let Some(oldest) = self.versions.iter().min_by_key(|(_, one)| one.used_at)
            {
                let oldest = *oldest.0;
                self.versions.remove(&oldest);
            }
            let version = Version {
                head,
                prefixes,
                used_at: now,
            };
            self.versions.insert(version.head.head().writer, version);
        }
        page
    }

    /// Returns the page behind `after` of the set that was at `cursor`, if it is still held.
    pub(super) fn next_page(
        &mut self,
        writer: &PeerId,
        cursor: Cursor,
        after: HashPrefix,
        now: Instant,
    ) -> Option<Message> {
        let version = self.versions.get_mut(writer)?;
        if version.head.head().cursor != cursor {
            return None;
        }
        version.used_at = now;
        Some(page(&version.head, Some(after), &version.prefixes))
    }

    /// Operations kept, and how many may be.
    pub(super) fn operations(&self) -> (usize, usize) {
        (self.operations, OPERATIONS_KEPT_MAX)
    }

    /// Sets held, and how many may be.
    pub(super) fn versions(&self) -> (usize, usize) {
        (self.versions.len(), VERSIONS_MAX)
    }

    /// Lets go of sets that nobody reads any more.
    pub(super) fn tick(&mut self, now: Instant) {
        self.versions
            .retain(|_, version| version.used_at + VERSION_TIMEOUT > now);
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let unread = self.versions.values();
        unread
            .map(|version| version.used_at + VERSION_TIMEOUT)
            .min()
    }
}

fn page(head: &SignedHead, after: Option<HashPrefix>, prefixes: &[HashPrefix]) -> Message {
    let start = after.map_or(0, |after| prefixes.partition_point(|one| *one <= after));
    let rest = prefixes.get(start..).unwrap_or_default();
    let length = rest.len().min(SNAPSHOT_PREFIXES_MAX);
    Message::Snapshot {
        head: head.clone(),
        after,
        prefixes: rest[..length].to_vec(),
        is_last: length == rest.len(),
    }
}
