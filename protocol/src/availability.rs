//! Availability: who says they hold which store path, as far as this node knows.
//!
//! Every set has exactly one writer, the holder, whose changes are numbered (DESIGN §4). An index
//! stores, per writer, the set and the [`Cursor`] up to which its changes were applied. It is a
//! **hint**: losing it costs a download of the sets, never correctness. So no method fails; an
//! implementation with a broken disk answers as if it were empty and counts the error.
//!
//! Implementations: [`MemoryIndex`] here, `SqliteIndex` in the node. Both pass [`conformance`].

use std::collections::{BTreeMap, BTreeSet};

use crate::peer::PeerId;
use crate::store_path::StorePathHash;

/// The first 8 bytes of a store path hash, as announced on the wire.
///
/// 64 of 160 bits: with 4 million paths in a mesh, two share a prefix with a chance of 4 in 10
/// million, and then one lookup asks a peer in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HashPrefix(pub u64);

impl From<&StorePathHash> for HashPrefix {
    fn from(hash: &StorePathHash) -> HashPrefix {
        let mut first = [0u8; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        HashPrefix(u64::from_be_bytes(first))
    }
}

/// A position in one writer's log: its `epoch`, and how many changes it had made in it.
///
/// A writer that lost its state starts a new epoch; cursors of different epochs do not compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    pub epoch: u64,
    pub sequence: u64,
}

/// One numbered change of a writer's set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    Add(HashPrefix),
    Remove(HashPrefix),
}

impl Operation {
    pub fn prefix(&self) -> HashPrefix {
        match self {
            Operation::Add(prefix) | Operation::Remove(prefix) => *prefix,
        }
    }
}

/// What is known of the sets of all writers, this node's own among them.
pub trait AvailabilityIndex {
    /// Returns the position up to which `writer`'s changes are applied; `None` when nothing is known.
    fn cursor(&self, writer: &PeerId) -> Option<Cursor>;

    /// Returns every writer with a cursor, ordered by PeerId.
    fn writers(&self) -> Vec<(PeerId, Cursor)>;

    /// Applies `operations` in order and moves the cursor to `cursor`, both or neither.
    ///
    /// The caller has checked that they continue the stored cursor without a gap.
    fn apply(&mut self, writer: &PeerId, cursor: Cursor, operations: &[Operation]);

    /// Replaces the whole set of `writer` by `prefixes` (strictly ascending).
    fn replace(&mut self, writer: &PeerId, cursor: Cursor, prefixes: &[HashPrefix]);

    /// Hides one hint that proved wrong (the holder said HaveNot) from [`AvailabilityIndex::providers`].
    ///
    /// The set and the cursor stay as the writer announced them, since others are told the whole of
    /// it. The hint shows again when the writer announces the path anew, or its set is replaced.
    fn withdraw(&mut self, writer: &PeerId, prefix: HashPrefix);

    /// Keeps a proof of what the writer announced, opaque bytes, in place of an earlier one.
    ///
    /// Nothing is kept for a writer without a cursor.
    fn keep_proof(&mut self, writer: &PeerId, proof: &[u8]);

    /// Returns the proof that was kept last; it may be of an earlier cursor.
    fn proof(&self, writer: &PeerId) -> Option<Vec<u8>>;

    /// Drops everything known of `writer`.
    fn forget(&mut self, writer: &PeerId);

    /// Returns the writers whose set contains `prefix` unhidden, ordered by PeerId.
    ///
    /// Empty when nobody is known, which is not proof of absence.
    fn providers(&self, prefix: HashPrefix) -> Vec<PeerId>;

    /// Returns up to `limit` members of `writer`'s set that are greater than `after`, ascending.
    fn prefixes(&self, writer: &PeerId, after: Option<HashPrefix>, limit: usize)
    -> Vec<HashPrefix>;

    /// Returns the size of `writer`'s set.
    fn count(&self, writer: &PeerId) -> u64;
}

/// An index in memory: the twin of the SQLite index for simulations and tests.
#[derive(Clone, Debug, Default)]
pub struct MemoryIndex {
    writers: BTreeMap<PeerId, Announced>,
}

#[derive(Clone, Debug)]
struct Announced {
    cursor: Cursor,
    set: BTreeSet<HashPrefix>,
    hidden: BTreeSet<HashPrefix>,
    proof: Option<Vec<u8>>,
}

impl MemoryIndex {
    pub fn new() -> MemoryIndex {
        MemoryIndex::default()
    }
}

impl AvailabilityIndex for MemoryIndex {
    fn cursor(&self, writer: &PeerId) -> Option<Cursor> {
        self.writers.get(writer).map(|announced| announced.cursor)
    }

    fn writers(&self) -> Vec<(PeerId, Cursor)> {
        self.writers
            .iter()
            .map(|(writer, announced)| (*writer, announced.cursor))
            .collect()
    }

    fn apply(&mut self, writer: &PeerId, cursor: Cursor, operations: &[Operation]) {
        let announced = self.writers.entry(*writer).or_insert_with(|| Announced {
            cursor,
            set: BTreeSet::new(),
            hidden: BTreeSet::new(),
            proof: None,
        });
        announced.cursor = cursor;
        for operation in operations {
            announced.hidden.remove(&operation.prefix());
            match operation {
                Operation::Add(prefix) => announced.set.insert(*prefix),
                Operation::Remove(prefix) => announced.set.remove(prefix),
            };
        }
    }

    fn replace(&mut self, writer: &PeerId, cursor: Cursor, prefixes: &[HashPrefix]) {
        let announced = Announced {
            cursor,
            set: prefixes.iter().copied().collect(),
            hidden: BTreeSet::new(),
            proof: None,
        };
        self.writers.insert(*writer, announced);
    }

    fn withdraw(&mut self, writer: &PeerId, prefix: HashPrefix) {
        if let Some(announced) = self.writers.get_mut(writer)
            && announced.set.contains(&prefix)
        {
            announced.hidden.insert(prefix);
        }
    }

    fn keep_proof(&mut self, writer: &PeerId, proof: &[u8]) {
        if let Some(announced) = self.writers.get_mut(writer) {
            announced.proof = Some(proof.to_vec());
        }
    }

    fn proof(&self, writer: &PeerId) -> Option<Vec<u8>> {
        self.writers.get(writer)?.proof.clone()
    }

    fn forget(&mut self, writer: &PeerId) {
        self.writers.remove(writer);
    }

    fn providers(&self, prefix: HashPrefix) -> Vec<PeerId> {
        let holds = |(writer, announced): (&PeerId, &Announced)| {
            let holds = announced.set.contains(&prefix) && !announced.hidden.contains(&prefix);
            holds.then_some(*writer)
        };
        self.writers.iter().filter_map(holds).collect()
    }

    fn prefixes(
        &self,
        writer: &PeerId,
        after: Option<HashPrefix>,
        limit: usize,
    ) -> Vec<HashPrefix> {
        let Some(announced) = self.writers.get(writer) else {
            return Vec::new();
        };
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let rest = announced.set.range((from, std::ops::Bound::Unbounded));
        rest.take(limit).copied().collect()
    }

    fn count(&self, writer: &PeerId) -> u64 {
        self.writers
            .get(writer)
            .map_or(0, |announced| announced.set.len() as u64)
    }
}

/// The suite that every [`AvailabilityIndex`] passes; panics on the first difference.
///
/// `make` returns a new, empty index each time it is called.
pub mod conformance {
    use super::*;

    pub fn run<I: AvailabilityIndex>(mut make: impl FnMut() -> I) {
        an_empty_index_knows_nothing(make());
        changes_apply_in_order_and_move_the_cursor(make());
        sets_of_writers_are_separate(make());
        a_snapshot_replaces_what_was_there(make());
        a_withdrawn_hint_is_hidden_until_it_is_announced_again(make());
        a_proof_is_kept_beside_the_set(make());
        pages_cover_the_set_once_and_in_order(make());
        extreme_numbers_survive(make());
    }

    const A: PeerId = PeerId::from_public_key([1; 32]);
    const B: PeerId = PeerId::from_public_key([2; 32]);

    fn at(epoch: u64, sequence: u64) -> Cursor {
        Cursor { epoch, sequence }
    }

    fn an_empty_index_knows_nothing(mut index: impl AvailabilityIndex) {
        assert_eq!(index.cursor(&A), None);
        assert!(index.writers().is_empty());
        assert!(index.providers(HashPrefix(1)).is_empty());
        assert!(index.prefixes(&A, None, 10).is_empty());
        assert_eq!(index.count(&A), 0);
        index.withdraw(&A, HashPrefix(1));
        index.forget(&A);
        assert_eq!(index.cursor(&A), None);
    }

    fn changes_apply_in_order_and_move_the_cursor(mut index: impl AvailabilityIndex) {
        use Operation::{Add, Remove};
        index.apply(
            &A,
            at(7, 4),
            &[
                Add(HashPrefix(1)),
                Add(HashPrefix(2)),
                Remove(HashPrefix(1)),
                Add(HashPrefix(2)),
            ],
        );
        assert_eq!(index.cursor(&A), Some(at(7, 4)));
        assert!(index.providers(HashPrefix(1)).is_empty());
        assert_eq!(index.providers(HashPrefix(2)), [A]);
        assert_eq!(index.count(&A), 1);
        index.apply(&A, at(7, 5), &[Remove(HashPrefix(2))]);
        assert_eq!(index.cursor(&A), Some(at(7, 5)));
        assert_eq!(index.count(&A), 0);
        index.apply(&A, at(7, 5), &[]);
        assert_eq!(index.cursor(&A), Some(at(7, 5)));
    }

    fn sets_of_writers_are_separate(mut index: impl AvailabilityIndex) {
        index.apply(&B, at(1, 1), &[Operation::Add(HashPrefix(9))]);
        index.apply(&A, at(2, 1), &[Operation::Add(HashPrefix(9))]);
        assert_eq!(index.providers(HashPrefix(9)), [A, B]);
        assert_eq!(index.writers(), [(A, at(2, 1)), (B, at(1, 1))]);
        index.forget(&A);
        assert_eq!(index.providers(HashPrefix(9)), [B]);
        assert_eq!(index.writers(), [(B, at(1, 1))]);
    }

    fn a_snapshot_replaces_what_was_there(mut index: impl AvailabilityIndex) {
        index.apply(&A, at(1, 1), &[Operation::Add(HashPrefix(9))]);
        index.replace(&A, at(2, 50), &[HashPrefix(1), HashPrefix(3)]);
        assert!(index.providers(HashPrefix(9)).is_empty());
        assert_eq!(index.providers(HashPrefix(3)), [A]);
        assert_eq!((index.cursor(&A), index.count(&A)), (Some(at(2, 50)), 2));
        index.replace(&A, at(3, 0), &[]);
        assert_eq!((index.cursor(&A), index.count(&A)), (Some(at(3, 0)), 0));
    }

    fn a_withdrawn_hint_is_hidden_until_it_is_announced_again(mut index: impl AvailabilityIndex) {
        let both = [HashPrefix(1), HashPrefix(2)];
        index.replace(&A, at(1, 2), &both);
        index.withdraw(&A, HashPrefix(1));
        index.withdraw(&A, HashPrefix(3));
        assert!(index.providers(HashPrefix(1)).is_empty());
        assert!(index.providers(HashPrefix(3)).is_empty());
        assert_eq!(index.providers(HashPrefix(2)), [A]);
        assert_eq!(
            index.prefixes(&A, None, 10),
            both,
            "the set is as announced"
        );
        assert_eq!((index.cursor(&A), index.count(&A)), (Some(at(1, 2)), 2));
        index.apply(&A, at(1, 3), &[Operation::Add(HashPrefix(1))]);
        assert_eq!(index.providers(HashPrefix(1)), [A]);
        index.withdraw(&A, HashPrefix(1));
        index.replace(&A, at(2, 2), &both);
        assert_eq!(index.providers(HashPrefix(1)), [A]);
    }

    fn a_proof_is_kept_beside_the_set(mut index: impl AvailabilityIndex) {
        index.keep_proof(&A, &[1, 2]);
        assert_eq!(index.proof(&A), None, "of what?");
        assert_eq!(index.cursor(&A), None);
        index.apply(&A, at(1, 1), &[Operation::Add(HashPrefix(9))]);
        assert_eq!(index.proof(&A), None);
        index.keep_proof(&A, &[1, 2]);
        index.keep_proof(&A, &[3]);
        assert_eq!(index.proof(&A), Some(vec![3]));
        index.apply(&A, at(1, 2), &[Operation::Remove(HashPrefix(9))]);
        assert_eq!(index.proof(&A), Some(vec![3]));
        index.forget(&A);
        assert_eq!(index.proof(&A), None);
    }

    fn pages_cover_the_set_once_and_in_order(mut index: impl AvailabilityIndex) {
        let all: Vec<HashPrefix> = (0..10).map(|n| HashPrefix(n * n)).collect();
        index.replace(&A, at(1, 10), &all);
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = index.prefixes(&A, after, 3);
            assert!(page.len() <= 3);
            let Some(last) = page.last() else { break };
            after = Some(*last);
            seen.extend(page);
        }
        assert_eq!(seen, all);
    }

    fn extreme_numbers_survive(mut index: impl AvailabilityIndex) {
        let all = [
            HashPrefix(0),
            HashPrefix(i64::MAX as u64),
            HashPrefix(1 << 63),
            HashPrefix(u64::MAX),
        ];
        index.replace(&A, at(u64::MAX, u64::MAX), &all);
        assert_eq!(index.cursor(&A), Some(at(u64::MAX, u64::MAX)));
        assert_eq!(index.prefixes(&A, None, 10), all);
        assert_eq!(
            index.prefixes(&A, Some(HashPrefix(i64::MAX as u64)), 10),
            all[2..]
        );
        assert_eq!(index.providers(HashPrefix(u64::MAX)), [A]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_index_conforms() {
        conformance::run(MemoryIndex::new);
    }
}
