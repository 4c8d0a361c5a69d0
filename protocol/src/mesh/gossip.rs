//! Gossip: every node keeps one numbered log of what it shares, and a copy of everybody else's set.
//!
//! Each set has one writer, so a position ([`Cursor`]) says exactly what a reader lacks. Changes are
//! batched for [`BATCH_WINDOW`] and pushed to all linked members; a reader that sees a gap pulls,
//! and gets either the missing operations or, when the log does not reach back that far, the
//! whole set in pages. A writer only ever speaks for itself here: the sender of a message is its
//! writer, proved by the connection.
//!
//! The pages of a snapshot need no state at the writer. The reader keeps the head of the first
//! page; operations after it are idempotent and applied in order, so what changed while it was
//! turning pages comes out right.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::Chance;
use crate::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use crate::message::{DELTA_OPERATIONS_MAX, Message, SNAPSHOT_PREFIXES_MAX};
use crate::peer::PeerId;
use crate::store_path::StorePathHash;

/// How long changes are collected before they are sent: an install of 1,000 paths becomes a few
/// messages, and 50 ms are invisible next to the second in which a path must be known.
const BATCH_WINDOW: Duration = Duration::from_millis(50);

/// Operations kept to answer pulls; 1 MiB of memory. A reader further behind gets a snapshot,
/// which is smaller than the log by then.
const LOG_OPERATIONS_MAX: usize = 65_536;

/// Largest set accepted from one writer: 32 MiB while a snapshot is collected. Deltas may exceed it
/// by [`LOG_OPERATIONS_MAX`], since counting a set costs a scan of it and is done that rarely.
const SET_PREFIXES_MAX: usize = 4_194_304;

/// A pull that was not answered by then may be repeated.
const PULL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the head is told to one random peer, so that a lost message is noticed.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);
const REPAIR_JITTER_PERCENT: u32 = 20;

/// A message that no honest peer sends.
pub(super) struct Nonsense;

pub(super) struct Gossip {
    me: PeerId,
    /// Position after the last operation of our log; `None` before the index was first seen.
    head: Option<Cursor>,
    /// Whether the epoch began in this process, which then cannot have lost a part of it.
    began_epoch: bool,
    /// The last operations up to `head`, oldest first.
    log: VecDeque<Operation>,
    pending: Vec<Operation>,
    flush_at: Option<Instant>,
    /// What is being pulled from linked peers.
    pulls: BTreeMap<PeerId, Pull>,
    repair_at: Instant,
}

struct Pull {
    since: Instant,
    snapshot: Option<Collected>,
}

struct Collected {
    head: Cursor,
    prefixes: Vec<HashPrefix>,
}

impl Gossip {
    pub(super) fn new(me: PeerId, chance: &mut Chance, now: Instant) -> Gossip {
        Gossip {
            me,
            head: None,
            began_epoch: false,
            log: VecDeque::new(),
            pending: Vec::new(),
            flush_at: None,
            pulls: BTreeMap::new(),
            repair_at: now + chance.jitter(REPAIR_INTERVAL, REPAIR_JITTER_PERCENT),
        }
    }

    /// Continues the log where the index left it, or starts a new epoch when it left nothing.
    pub(super) fn start(&mut self, index: &mut dyn AvailabilityIndex, chance: &mut Chance) {
        if self.head.is_none() {
            match index.cursor(&self.me) {
                Some(head) => self.head = Some(head),
                None => self.new_epoch(index, chance),
            }
        }
    }

    /// Position of the own log.
    pub(super) fn head(&self) -> Cursor {
        self.head.unwrap_or(Cursor {
            epoch: 0,
            sequence: 0,
        })
    }

    /// Takes in the complete set of shared paths: whatever differs from the index becomes operations.
    pub(super) fn local_paths(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        all: &[StorePathHash],
        now: Instant,
    ) {
        // What waits to be told is in the set, or is not true any more.
        self.pending.clear();
        let wanted: BTreeSet<HashPrefix> = all.iter().map(HashPrefix::from).collect();
        let mut known = BTreeSet::new();
        loop {
            let page = index.prefixes(&self.me, known.last().copied(), SNAPSHOT_PREFIXES_MAX);
            if page.is_empty() {
                break;
            }
            known.extend(page);
        }
        let removed = known
            .difference(&wanted)
            .map(|prefix| Operation::Remove(*prefix));
        let added = wanted
            .difference(&known)
            .map(|prefix| Operation::Add(*prefix));
        self.pending.extend(removed.chain(added));
        self.schedule(now);
    }

    /// Takes in changes of the set of shared paths.
    ///
    /// A removal of what was never announced is kept to ourselves: it would tell that it was here.
    pub(super) fn local_changed(
        &mut self,
        index: &dyn AvailabilityIndex,
        added: &[StorePathHash],
        removed: &[StorePathHash],
        now: Instant,
    ) {
        let announced_next: BTreeSet<HashPrefix> =
            self.pending.iter().map(Operation::prefix).collect();
        let was_announced = |prefix: &HashPrefix| {
            announced_next.contains(prefix) || index.providers(*prefix).contains(&self.me)
        };
        let removed = removed.iter().map(HashPrefix::from).filter(was_announced);
        let mut operations: Vec<Operation> = removed.map(Operation::Remove).collect();
        operations.extend(added.iter().map(|hash| Operation::Add(hash.into())));
        self.pending.append(&mut operations);
        self.schedule(now);
    }

    /// Returns the deltas for everyone, once the batch window has passed.
    pub(super) fn flush(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        now: Instant,
    ) -> Vec<Message> {
        if self.flush_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.commit(index)
    }

    /// Returns whom to tell our head, when it is time to.
    pub(super) fn tick(
        &mut self,
        linked: &[PeerId],
        chance: &mut Chance,
        now: Instant,
    ) -> Option<(PeerId, Message)> {
        if self.repair_at > now {
            return None;
        }
        self.repair_at = now + chance.jitter(REPAIR_INTERVAL, REPAIR_JITTER_PERCENT);
        let peer = chance.pick(linked)?;
        Some((*peer, Message::Head { head: self.head() }))
    }

    pub(super) fn woke(&mut self, now: Instant) {
        self.repair_at = now;
        self.pulls.clear();
    }

    pub(super) fn departed(&mut self, peer: PeerId) {
        self.pulls.remove(&peer);
    }

    /// Reads where a writer's log stands, and pulls when our copy differs.
    pub(super) fn head_told(
        &mut self,
        index: &dyn AvailabilityIndex,
        writer: PeerId,
        head: Cursor,
        now: Instant,
    ) -> Vec<Message> {
        if index.cursor(&writer) == Some(head) {
            Vec::new()
        } else {
            self.ask(index, writer, now)
        }
    }

    /// Applies what continues our copy of the sender's set; a gap is pulled.
    pub(super) fn delta(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        writer: PeerId,
        after: Cursor,
        operations: &[Operation],
        now: Instant,
    ) -> Result<Vec<Message>, Nonsense> {
        let is_collecting = self
            .pulls
            .get(&writer)
            .is_some_and(|pull| pull.snapshot.is_some());
        if is_collecting {
            // The pull that follows the last page brings these operations.
            return Ok(Vec::new());
        }
        let Some(cursor) = index.cursor(&writer) else {
            return Ok(self.ask(index, writer, now));
        };
        if cursor.epoch != after.epoch || after.sequence > cursor.sequence {
            return Ok(self.ask(index, writer, now));
        }
        let known = usize::try_from(cursor.sequence - after.sequence).unwrap_or(usize::MAX);
        if let Some(news) = operations.get(known..)
            && !news.is_empty()
        {
            let Some(sequence) = cursor.sequence.checked_add(news.len() as u64) else {
                return Err(Nonsense);
            };
            let counted = |sequence: u64| sequence / LOG_OPERATIONS_MAX as u64;
            if counted(sequence) != counted(cursor.sequence)
                && index.count(&writer) > SET_PREFIXES_MAX as u64
            {
                return Err(Nonsense);
            }
            index.apply(
                &writer,
                Cursor {
                    epoch: cursor.epoch,
                    sequence,
                },
                news,
            );
        }
        self.pulls.remove(&writer);
        Ok(Vec::new())
    }

    /// Answers a reader of our log. Also returns whether a new epoch began.
    ///
    /// A reader that is ahead of us shows that we lost part of our log (a crash, a restored
    /// backup): numbers would be used twice, so a new epoch begins. Of an epoch that began in this
    /// process nothing can be lost, so a reader that lies has the set sent anew once at most.
    pub(super) fn pull(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        after: Option<Cursor>,
        chance: &mut Chance,
    ) -> (Vec<Message>, bool) {
        let head = self.head();
        let Some(after) = after else {
            return (vec![self.page(index, None)], false);
        };
        if after.epoch == head.epoch && after.sequence > head.sequence && !self.began_epoch {
            self.new_epoch(index, chance);
            return (vec![self.page(index, None)], true);
        }
        let missing = head.sequence.wrapping_sub(after.sequence);
        let reaches_back = after.epoch == head.epoch && missing <= self.log.len() as u64;
        if !reaches_back {
            return (vec![self.page(index, None)], false);
        }
        let start = self.log.len() - missing as usize;
        let operations: Vec<Operation> = self.log.range(start..).copied().collect();
        if operations.is_empty() {
            return (vec![Message::Delta { after, operations }], false);
        }
        (deltas(after, &operations), false)
    }

    /// Answers the request for a later page of our set.
    pub(super) fn pull_page(
        &self,
        index: &dyn AvailabilityIndex,
        epoch: u64,
        after: HashPrefix,
    ) -> Vec<Message> {
        let after = (epoch == self.head().epoch).then_some(after);
        vec![self.page(index, after)]
    }

    /// Collects one page of a writer's set, and asks for the next.
    #[expect(
        clippy::too_many_arguments,
        reason = "they are the fields of one message"
    )]
    pub(super) fn snapshot(
        &mut self,
        index: &mut dyn AvailabilityIndex,
        writer: PeerId,
        head: Cursor,
        after: Option<HashPrefix>,
        prefixes: Vec<HashPrefix>,
        is_last: bool,
        now: Instant,
    ) -> Result<Vec<Message>, Nonsense> {
        // A page that nobody asked for, or that arrives after the pull was given up.
        let Some(pull) = self.pulls.get_mut(&writer) else {
            return Ok(Vec::new());
        };
        pull.since = now;
        let collected = match after {
            None => pull.snapshot.insert(Collected {
                head,
                prefixes: Vec::new(),
            }),
            Some(after) => match &mut pull.snapshot {
                Some(collected)
                    if collected.prefixes.last() == Some(&after)
                        && collected.head.epoch == head.epoch =>
                {
                    collected
                }
                _ => return Ok(Vec::new()),
            },
        };
        if !is_last && prefixes.is_empty()
            || collected.prefixes.len() + prefixes.len() > SET_PREFIXES_MAX
        {
            return Err(Nonsense);
        }
        collected.prefixes.extend(prefixes);
        if !is_last {
            let after = *collected.prefixes.last().expect("the page was not empty");
            return Ok(vec![Message::PullPage {
                epoch: head.epoch,
                after,
            }]);
        }
        let first = collected.head;
        index.replace(&writer, first, &collected.prefixes);
        self.pulls.remove(&writer);
        // What changed while the pages were turned, and the deltas that were ignored meanwhile.
        Ok(if after.is_some() {
            self.ask(index, writer, now)
        } else {
            Vec::new()
        })
    }

    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        let repair = (self.repair_at, "tell head");
        Some(
            self.flush_at
                .map_or(repair, |at| repair.min((at, "flush announcements"))),
        )
    }

    fn ask(&mut self, index: &dyn AvailabilityIndex, writer: PeerId, now: Instant) -> Vec<Message> {
        let is_waiting = |pull: &Pull| now < pull.since + PULL_TIMEOUT;
        if self.pulls.get(&writer).is_some_and(is_waiting) {
            return Vec::new();
        }
        self.pulls.insert(
            writer,
            Pull {
                since: now,
                snapshot: None,
            },
        );
        vec![Message::Pull {
            after: index.cursor(&writer),
        }]
    }

    fn page(&self, index: &dyn AvailabilityIndex, after: Option<HashPrefix>) -> Message {
        // One more than fits tells whether this is the last page.
        let mut prefixes = index.prefixes(&self.me, after, SNAPSHOT_PREFIXES_MAX + 1);
        let is_last = prefixes.len() <= SNAPSHOT_PREFIXES_MAX;
        prefixes.truncate(SNAPSHOT_PREFIXES_MAX);
        Message::Snapshot {
            head: self.head(),
            after,
            prefixes,
            is_last,
        }
    }

    fn schedule(&mut self, now: Instant) {
        if !self.pending.is_empty() && self.flush_at.is_none() {
            self.flush_at = Some(now + BATCH_WINDOW);
        }
    }

    /// Writes pending operations to the index and the log, and returns them as deltas.
    fn commit(&mut self, index: &mut dyn AvailabilityIndex) -> Vec<Message> {
        self.flush_at = None;
        let operations = std::mem::take(&mut self.pending);
        if operations.is_empty() {
            return Vec::new();
        }
        let after = self.head();
        let head = Cursor {
            sequence: after.sequence + operations.len() as u64,
            ..after
        };
        index.apply(&self.me, head, &operations);
        self.head = Some(head);
        self.log.extend(&operations);
        let excess = self.log.len().saturating_sub(LOG_OPERATIONS_MAX);
        self.log.drain(..excess);
        deltas(after, &operations)
    }

    fn new_epoch(&mut self, index: &mut dyn AvailabilityIndex, chance: &mut Chance) {
        let head = Cursor {
            epoch: chance.number(),
            sequence: 0,
        };
        index.apply(&self.me, head, &[]);
        self.head = Some(head);
        self.began_epoch = true;
        self.log.clear();
    }
}

/// Cuts operations that follow `after` into messages of bounded size.
fn deltas(after: Cursor, operations: &[Operation]) -> Vec<Message> {
    let mut sequence = after.sequence;
    let message = |operations: &[Operation]| {
        let after = Cursor {
            epoch: after.epoch,
            sequence,
        };
        sequence += operations.len() as u64;
        Message::Delta {
            after,
            operations: operations.to_vec(),
        }
    };
    operations
        .chunks(DELTA_OPERATIONS_MAX)
        .map(message)
        .collect()
}
