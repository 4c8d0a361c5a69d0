//! The own log: what this node announces, as numbered operations that it signs.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::announcement::{Delta, SetDigest, SignedHead};
use crate::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use crate::certificate::UnixTime;
use crate::mesh::Chance;
use crate::message::{DELTA_OPERATIONS_MAX, SNAPSHOT_PREFIXES_MAX};
use crate::peer::PeerKey;
use crate::store_path::StorePathHash;

/// How long changes are collected before they are sent: an install of 1,000 paths becomes a few
/// messages, and 50 ms are invisible next to the second in which a path must be known.
const BATCH_WINDOW: Duration = Duration::from_millis(50);

/// Operations kept to answer pulls; 1 MiB of memory. A reader further behind gets a snapshot,
/// which is smaller than the log by then.
const LOG_OPERATIONS_MAX: usize = 65_536;

/// Bits of an epoch below the clock's seconds, drawn by chance: two epochs that begin in one second,
/// or at a clock that stands still, differ all the same.
const EPOCH_CHANCE_BITS: u32 = 20;

pub(super) struct OwnLog {
    key: PeerKey,
    /// Position after the last operation; `None` before the index was first seen.
    cursor: Option<Cursor>,
    /// Whether the epoch began in this process, which then cannot have lost a part of it.
    began_epoch: bool,
    /// What is announced at `cursor`.
    set: BTreeSet<HashPrefix>,
    /// The last operations up to `cursor`, oldest first. Each made a difference to the set, so that
    /// the set before it can be worked out.
    log: VecDeque<Operation>,
    pending: Vec<Operation>,
    flush_at: Option<Instant>,
    /// The signed head at `cursor`, once somebody asked for it.
    head: Option<SignedHead>,
    /// Counts changes of `cursor`.
    version: u64,
}

impl OwnLog {
    pub(super) fn new(key: PeerKey) -> OwnLog {
        OwnLog {
            key,
            cursor: None,
            began_epoch: false,
            set: BTreeSet::new(),
            log: VecDeque::new(),
            pending: Vec::new(),
            flush_at: None,
            head: None,
            version: 0,
        }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Continues the log where the index left it, or starts a new epoch when it left nothing.
    pub(super) fn start(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        unix: UnixTime,
        chance: &mut Chance,
    ) {
        if self.cursor.is_some() {
            return;
        }
        let me = self.key.peer_id();
        match index.cursor(&me) {
            None => self.new_epoch(index, 0, unix, chance),
            Some(cursor) => {
                self.cursor = Some(cursor);
                loop {
                    let after = self.set.last().copied();
                    let page = index.prefixes(&me, after, SNAPSHOT_PREFIXES_MAX);
                    if page.is_empty() {
                        break;
                    }
                    self.set.extend(page);
                }
            }
        }
    }

    pub(super) fn cursor(&self) -> Cursor {
        self.cursor.unwrap_or(Cursor {
            epoch: 0,
            sequence: 0,
        })
    }

    /// Operations kept, and how many may be.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.log.len(), LOG_OPERATIONS_MAX)
    }

    pub(super) fn set(&self) -> &BTreeSet<HashPrefix> {
        &self.set
    }

    /// Whether nothing of this epoch can have been lost.
    pub(super) fn began_epoch(&self) -> bool {
        self.began_epoch
    }

    /// Signs where the log stands.
    pub(super) fn head(&mut self) -> SignedHead {
        let cursor = self.cursor();
        let sign = || SignedHead::of_set(&self.key, cursor, &self.set);
        self.head.get_or_insert_with(sign).clone()
    }

    /// Takes in the complete set of shared paths: whatever differs becomes operations.
    pub(super) fn local_paths(&mut self, all: &[StorePathHash], now: Instant) {
        // What waits to be told is in the set, or is not true any more.
        let wanted: BTreeSet<HashPrefix> = all.iter().map(HashPrefix::from).collect();
        let removed = self.set.difference(&wanted);
        let added = wanted.difference(&self.set);
        self.pending = removed
            .map(|prefix| Operation::Remove(*prefix))
            .chain(added.map(|prefix| Operation::Add(*prefix)))
            .collect();
        self.schedule(now);
    }

    /// Takes in changes of the set of shared paths.
    pub(super) fn local_changed(
        &mut self,
        added: &[StorePathHash],
        removed: &[StorePathHash],
        now: Instant,
    ) {
        let removed = removed.iter().map(|hash| Operation::Remove(hash.into()));
        let added = added.iter().map(|hash| Operation::Add(hash.into()));
        self.pending.extend(removed.chain(added));
        self.schedule(now);
    }

    fn schedule(&mut self, now: Instant) {
        if !self.pending.is_empty() && self.flush_at.is_none() {
            self.flush_at = Some(now + BATCH_WINDOW);
        }
    }

    pub(super) fn flush_at(&self) -> Option<Instant> {
        self.flush_at
    }

    /// Returns the deltas for everyone, once the batch window has passed.
    pub(super) fn flush(&mut self, index: &mut dyn AvailabilityIndex, now: Instant) -> Vec<Delta> {
        if self.flush_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.flush_at = None;
        let before = self.cursor();
        let set = &mut self.set;
        // A removal of what was never announced is kept to ourselves: it would tell that it was here.
        let operations: Vec<Operation> = std::mem::take(&mut self.pending)
            .into_iter()
            .filter(|operation| match operation {
                Operation::Add(prefix) => set.insert(*prefix),
                Operation::Remove(prefix) => set.remove(prefix),
            })
            .collect();
        if operations.is_empty() {
            return Vec::new();
        }
        let cursor = Cursor {
            sequence: before.sequence + operations.len() as u64,
            ..before
        };
        index.apply(&self.key.peer_id(), cursor, &operations);
        self.version += 1;
        self.cursor = Some(cursor);
        self.head = None;
        self.log.extend(&operations);
        let deltas = self.deltas_after(before.sequence).unwrap_or_default();
        let excess = self.log.len().saturating_sub(LOG_OPERATIONS_MAX);
        self.log.drain(..excess);
        deltas
    }

    /// Signs everything after `sequence` anew; `None` when the log does not reach back that far.
    pub(super) fn deltas_after(&self, sequence: u64) -> Option<Vec<Delta>> {
        let cursor = self.cursor();
        let missing = usize::try_from(cursor.sequence.checked_sub(sequence)?).ok()?;
        let start = self.log.len().checked_sub(missing)?;
        let operations: Vec<Operation> = self.log.range(start..).copied().collect();
        let mut set = self.set.clone();
        let mut end = cursor;
        let mut deltas = Vec::new();
        for piece in operations.rchunks(DELTA_OPERATIONS_MAX) {
            let (count, digest) = (set.len() as u64, SetDigest::of(&set));
            deltas.push(Delta::sign(&self.key, end, count, digest, piece.to_vec()));
            for operation in piece.iter().rev() {
                match operation {
                    Operation::Add(prefix) => set.remove(prefix),
                    Operation::Remove(prefix) => set.insert(*prefix),
                };
            }
            end.sequence -= piece.len() as u64;
        }
        deltas.reverse();
        Some(deltas)
    }

    /// Begins to count anew, above every epoch that was `heard` of.
    pub(super) fn new_epoch(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        heard: u64,
        unix: UnixTime,
        chance: &mut Chance,
    ) {
        // What waits to be told stays pending and follows in the new epoch.
        let drawn = chance.number() >> (u64::BITS - EPOCH_CHANCE_BITS);
        let clock = unix.0.saturating_mul(1 << EPOCH_CHANCE_BITS);
        let epoch = clock.saturating_add(drawn).max(heard.saturating_add(1));
        let sequence = self.set.len() as u64;
        let cursor = Cursor { epoch, sequence };
        let prefixes: Vec<HashPrefix> = self.set.iter().copied().collect();
        index.replace(&self.key.peer_id(), cursor, &prefixes);
        self.version += 1;
        self.cursor = Some(cursor);
        self.began_epoch = true;
        self.log.clear();
        self.head = None;
    }
}
