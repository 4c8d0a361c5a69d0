//! SharedIndex: an availability index that shares equal sets between machines.
//!
//! A thousand machines that each know a thousand sets of 12,400 paths hold 10^10 entries, nearly all of
//! them the same. Here a set is immutable and interned by its writer, its fingerprint and its size: two
//! machines that know the same set of a writer hold one copy, and one whose copy differs holds
//! another. Bases are shared between writers too, since most machines of a pin hold the same paths.
//!
//! Passes [`granary_protocol::availability::conformance`], as the SQLite index of a node does.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};

use granary_protocol::availability::{AvailabilityIndex, Cursor, HashPrefix, Operation};
use granary_protocol::peer::PeerId;
use sha2::{Digest, Sha256};

/// Differences from its base that a set carries before it gets a base of its own: small enough to copy
/// with every change, large enough that an ordinary day makes no new base.
const DIFFERENCES_MAX: usize = 1024;

/// Sum of a mixed 128 bits per member: independent of order, and cheap to change by one member.
/// Nobody chooses members against it, so it need not withstand that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint(u128);

impl Fingerprint {
    pub fn of<'a>(prefixes: impl IntoIterator<Item = &'a HashPrefix>) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        for prefix in prefixes {
            fingerprint.add(*prefix);
        }
        fingerprint
    }

    pub fn add(&mut self, prefix: HashPrefix) {
        self.0 = self.0.wrapping_add(mixed(prefix));
    }

    pub fn remove(&mut self, prefix: HashPrefix) {
        self.0 = self.0.wrapping_sub(mixed(prefix));
    }
}

/// Two rounds of splitmix64 with different constants, side by side.
fn mixed(prefix: HashPrefix) -> u128 {
    let mix = |mut number: u64| {
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    };
    let low = mix(prefix.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let high = mix(prefix.0.wrapping_add(0x3c6e_f372_fe94_f82b));
    u128::from(high) << 64 | u128::from(low)
}

/// Members in ascending order, shared by the sets that differ little from it.
type Base = Rc<[HashPrefix]>;

/// One writer's set at one moment.
struct Set {
    base: Base,
    /// Members beyond the base, and members of the base that are gone; ascending.
    added: Vec<HashPrefix>,
    removed: Vec<HashPrefix>,
    fingerprint: Fingerprint,
    count: u64,
}

impl Set {
    fn contains(&self, prefix: HashPrefix) -> bool {
        if self.added.binary_search(&prefix).is_ok() {
            return true;
        }
        self.removed.binary_search(&prefix).is_err() && self.base.binary_search(&prefix).is_ok()
    }

    /// Members greater than `after`, ascending.
    fn after(&self, after: Option<HashPrefix>) -> impl Iterator<Item = HashPrefix> + '_ {
        let start = |set: &[HashPrefix]| set.partition_point(|one| Some(*one) <= after);
        let mut base = self.base[start(&self.base)..]
            .iter()
            .filter(|one| self.removed.binary_search(one).is_err())
            .copied()
            .peekable();
        let mut added = self.added[start(&self.added)..].iter().copied().peekable();
        std::iter::from_fn(move || match (base.peek(), added.peek()) {
            (Some(one), Some(other)) if one < other => base.next(),
            (_, Some(_)) => added.next(),
            (_, None) => base.next(),
        })
    }
}

/// Where equal sets of one run meet. Cheap to clone.
#[derive(Clone, Default)]
pub struct Pool(Rc<RefCell<Interned>>);

#[derive(Default)]
struct Interned {
    sets: BTreeMap<(PeerId, Fingerprint, u64), Weak<Set>>,
    bases: BTreeMap<(Fingerprint, usize), Weak<[HashPrefix]>>,
    /// By writer and the first bytes of their hash.
    proofs: BTreeMap<(PeerId, u64), Weak<[u8]>>,
    /// Entries at which those of dropped sets are cleared away.
    sweep_at: usize,
}

impl Pool {
    fn base(&self, prefixes: &[HashPrefix]) -> Base {
        let mut pool = self.0.borrow_mut();
        let key = (Fingerprint::of(prefixes), prefixes.len());
        if let Some(base) = pool.bases.get(&key).and_then(Weak::upgrade) {
            return base;
        }
        let base: Base = prefixes.into();
        pool.bases.insert(key, Rc::downgrade(&base));
        base
    }

    fn known(&self, writer: &PeerId, fingerprint: Fingerprint, count: u64) -> Option<Rc<Set>> {
        let pool = self.0.borrow();
        pool.sets.get(&(*writer, fingerprint, count))?.upgrade()
    }

    fn keep(&self, writer: &PeerId, set: Set) -> Rc<Set> {
        let set = Rc::new(set);
        let mut pool = self.0.borrow_mut();
        let key = (*writer, set.fingerprint, set.count);
        pool.sets.insert(key, Rc::downgrade(&set));
        if pool.sets.len() >= pool.sweep_at {
            pool.sets.retain(|_, set| set.strong_count() > 0);
            pool.bases.retain(|_, base| base.strong_count() > 0);
            pool.proofs.retain(|_, proof| proof.strong_count() > 0);
            pool.sweep_at = 2 * pool.sets.len() + 1024;
        }
        set
    }

    fn proof(&self, writer: &PeerId, bytes: &[u8]) -> Rc<[u8]> {
        let digest = Sha256::digest(bytes);
        let mut first = [0u8; 8];
        first.copy_from_slice(&digest[..8]);
        let mut pool = self.0.borrow_mut();
        let key = (*writer, u64::from_be_bytes(first));
        if let Some(known) = pool.proofs.get(&key).and_then(Weak::upgrade)
            && *known == *bytes
        {
            return known;
        }
        let proof: Rc<[u8]> = bytes.into();
        pool.proofs.insert(key, Rc::downgrade(&proof));
        proof
    }

    /// Interns a set that differs from `base` by what it has beyond it.
    pub fn warm(&self, writer: &PeerId, base: &[HashPrefix], added: Vec<HashPrefix>) -> WarmSet {
        let mut fingerprint = Fingerprint::of(base);
        let mut added = added;
        added.sort_unstable();
        added.dedup();
        added.retain(|prefix| base.binary_search(prefix).is_err());
        for prefix in &added {
            fingerprint.add(*prefix);
        }
        let count = (base.len() + added.len()) as u64;
        if let Some(set) = self.known(writer, fingerprint, count) {
            return WarmSet(set);
        }
        let set = Set {
            base: self.base(base),
            added,
            removed: Vec::new(),
            fingerprint,
            count,
        };
        WarmSet(self.keep(writer, set))
    }

    fn of(&self, writer: &PeerId, prefixes: &[HashPrefix]) -> Rc<Set> {
        let (fingerprint, count) = (Fingerprint::of(prefixes), prefixes.len() as u64);
        if let Some(set) = self.known(writer, fingerprint, count) {
            return set;
        }
        let set = Set {
            base: self.base(prefixes),
            added: Vec::new(),
            removed: Vec::new(),
            fingerprint,
            count,
        };
        self.keep(writer, set)
    }

    /// Returns the set after operations, in order.
    fn changed(&self, writer: &PeerId, set: &Rc<Set>, operations: &[Operation]) -> Rc<Set> {
        let mut last = BTreeMap::new();
        for operation in operations {
            last.insert(operation.prefix(), matches!(operation, Operation::Add(_)));
        }
        last.retain(|prefix, is_member| set.contains(*prefix) != *is_member);
        if last.is_empty() {
            return set.clone();
        }
        let (mut fingerprint, mut count) = (set.fingerprint, set.count);
        for (prefix, is_member) in &last {
            if *is_member {
                fingerprint.add(*prefix);
                count += 1;
            } else {
                fingerprint.remove(*prefix);
                count -= 1;
            }
        }
        if let Some(set) = self.known(writer, fingerprint, count) {
            return set;
        }
        let mut added: BTreeSet<HashPrefix> = set.added.iter().copied().collect();
        let mut removed: BTreeSet<HashPrefix> = set.removed.iter().copied().collect();
        for (prefix, is_member) in last {
            if is_member {
                if !removed.remove(&prefix) {
                    added.insert(prefix);
                }
            } else if !added.remove(&prefix) {
                removed.insert(prefix);
            }
        }
        let mut set = Set {
            base: set.base.clone(),
            added: added.into_iter().collect(),
            removed: removed.into_iter().collect(),
            fingerprint,
            count,
        };
        if set.added.len() + set.removed.len() > DIFFERENCES_MAX {
            let members: Vec<HashPrefix> = set.after(None).collect();
            set.base = self.base(&members);
            set.added.clear();
            set.removed.clear();
        }
        self.keep(writer, set)
    }
}

/// A set that machines know from before the run, as after a restart with a kept index.
#[derive(Clone)]
pub struct WarmSet(Rc<Set>);

/// What one machine knows of one writer.
struct Known {
    cursor: Cursor,
    set: Rc<Set>,
    /// Hints that proved wrong; few, and not shared.
    hidden: BTreeSet<HashPrefix>,
    proof: Option<Rc<[u8]>>,
}

/// What one machine knows of all writers. See the module's documentation.
pub struct SharedIndex {
    pool: Pool,
    writers: BTreeMap<PeerId, Known>,
    /// Writers whose set or cursor changed since [`SharedIndex::take_changed`].
    changed: BTreeSet<PeerId>,
    /// What holders denied, for the checker, until they announce it anew.
    denied: BTreeSet<(PeerId, HashPrefix)>,
}

impl SharedIndex {
    pub fn new(pool: &Pool) -> SharedIndex {
        SharedIndex {
            pool: pool.clone(),
            writers: BTreeMap::new(),
            changed: BTreeSet::new(),
            denied: BTreeSet::new(),
        }
    }

    /// Puts in a set known from before the run.
    pub fn warm(&mut self, writer: PeerId, cursor: Cursor, set: &WarmSet, proof: &[u8]) {
        let proof = Some(self.pool.proof(&writer, proof));
        let (set, hidden) = (set.0.clone(), BTreeSet::new());
        let known = Known {
            cursor,
            set,
            hidden,
            proof,
        };
        self.writers.insert(writer, known);
    }

    /// Returns fingerprint and size of what is known of a writer's set.
    pub fn fingerprint(&self, writer: &PeerId) -> Option<(Fingerprint, u64)> {
        let known = self.writers.get(writer)?;
        Some((known.set.fingerprint, known.set.count))
    }

    /// Returns the writers that changed since this was last asked.
    pub fn take_changed(&mut self) -> BTreeSet<PeerId> {
        std::mem::take(&mut self.changed)
    }

    /// Notes that a holder said HaveNot.
    pub fn deny(&mut self, writer: PeerId, prefix: HashPrefix) {
        self.denied.insert((writer, prefix));
    }

    /// Says whether the holder said HaveNot and has not announced the path since.
    pub fn is_denied(&self, writer: &PeerId, prefix: HashPrefix) -> bool {
        self.denied.contains(&(*writer, prefix))
    }

    fn announced_anew(&mut self, writer: &PeerId, operations: &[Operation]) {
        if self.denied.is_empty() {
            return;
        }
        for operation in operations {
            if let Operation::Add(prefix) = operation {
                self.denied.remove(&(*writer, *prefix));
            }
        }
    }
}

impl AvailabilityIndex for SharedIndex {
    fn cursor(&self, writer: &PeerId) -> Option<Cursor> {
        self.writers.get(writer).map(|known| known.cursor)
    }

    fn writers(&self) -> Vec<(PeerId, Cursor)> {
        let known = self.writers.iter();
        known
            .map(|(writer, known)| (*writer, known.cursor))
            .collect()
    }

    fn apply(&mut self, writer: &PeerId, cursor: Cursor, operations: &[Operation]) {
        let pool = self.pool.clone();
        let known = self.writers.entry(*writer).or_insert_with(|| Known {
            cursor,
            set: pool.of(writer, &[]),
            hidden: BTreeSet::new(),
            proof: None,
        });
        known.cursor = cursor;
        known.set = pool.changed(writer, &known.set, operations);
        if !known.hidden.is_empty() {
            for operation in operations {
                known.hidden.remove(&operation.prefix());
            }
        }
        self.changed.insert(*writer);
        self.announced_anew(writer, operations);
    }

    fn replace(&mut self, writer: &PeerId, cursor: Cursor, prefixes: &[HashPrefix]) {
        let known = Known {
            cursor,
            set: self.pool.of(writer, prefixes),
            hidden: BTreeSet::new(),
            proof: None,
        };
        self.writers.insert(*writer, known);
        self.changed.insert(*writer);
        if !self.denied.is_empty() {
            for prefix in prefixes {
                self.denied.remove(&(*writer, *prefix));
            }
        }
    }

    fn withdraw(&mut self, writer: &PeerId, prefix: HashPrefix) {
        if let Some(known) = self.writers.get_mut(writer)
            && known.set.contains(prefix)
        {
            known.hidden.insert(prefix);
        }
    }

    fn keep_proof(&mut self, writer: &PeerId, proof: &[u8]) {
        if let Some(known) = self.writers.get_mut(writer) {
            known.proof = Some(self.pool.proof(writer, proof));
        }
    }

    fn proof(&self, writer: &PeerId) -> Option<Vec<u8>> {
        let proof = self.writers.get(writer)?.proof.as_ref();
        proof.map(|proof| proof.to_vec())
    }

    fn forget(&mut self, writer: &PeerId) {
        self.writers.remove(writer);
    }

    fn providers(&self, prefix: HashPrefix) -> Vec<PeerId> {
        // Many writers share a base, which is searched once.
        let mut bases: Vec<(*const HashPrefix, bool)> = Vec::new();
        let mut is_in = |base: &Base| {
            let key = base.as_ptr();
            if let Some((_, is_in)) = bases.iter().find(|(one, _)| *one == key) {
                return *is_in;
            }
            let is_in = base.binary_search(&prefix).is_ok();
            bases.push((key, is_in));
            is_in
        };
        let mut holds = |(writer, known): (&PeerId, &Known)| {
            let set = &known.set;
            let is_member = set.added.binary_search(&prefix).is_ok()
                || is_in(&set.base) && set.removed.binary_search(&prefix).is_err();
            (is_member && !known.hidden.contains(&prefix)).then_some(*writer)
        };
        self.writers.iter().filter_map(&mut holds).collect()
    }

    fn prefixes(
        &self,
        writer: &PeerId,
        after: Option<HashPrefix>,
        limit: usize,
    ) -> Vec<HashPrefix> {
        let known = self.writers.get(writer);
        known.map_or(Vec::new(), |known| {
            known.set.after(after).take(limit).collect()
        })
    }

    fn count(&self, writer: &PeerId) -> u64 {
        self.writers.get(writer).map_or(0, |known| known.set.count)
    }
}

#[cfg(test)]
mod tests {
    use granary_protocol::availability::conformance;

    use super::*;

    const A: PeerId = PeerId::from_public_key([1; 32]);

    fn at(sequence: u64) -> Cursor {
        Cursor { epoch: 1, sequence }
    }

    #[test]
    fn shared_index_conforms() {
        let pool = Pool::default();
        conformance::run(|| SharedIndex::new(&pool));
    }

    #[test]
    fn equal_sets_are_one_copy_however_they_came_about() {
        let pool = Pool::default();
        let (mut one, mut other) = (SharedIndex::new(&pool), SharedIndex::new(&pool));
        one.replace(&A, at(2), &[HashPrefix(1), HashPrefix(2)]);
        other.apply(&A, at(1), &[Operation::Add(HashPrefix(2))]);
        other.apply(&A, at(2), &[Operation::Add(HashPrefix(1))]);
        assert!(Rc::ptr_eq(&one.writers[&A].set, &other.writers[&A].set));
        one.apply(&A, at(3), &[Operation::Remove(HashPrefix(1))]);
        assert_eq!(other.prefixes(&A, None, 9), [HashPrefix(1), HashPrefix(2)]);
        assert_eq!(one.prefixes(&A, None, 9), [HashPrefix(2)]);
        assert_ne!(one.fingerprint(&A), other.fingerprint(&A));
    }

    #[test]
    fn a_set_far_from_its_base_gets_its_own() {
        let pool = Pool::default();
        let mut index = SharedIndex::new(&pool);
        let base: Vec<HashPrefix> = (0..5000).map(|n| HashPrefix(2 * n)).collect();
        index.replace(&A, at(0), &base);
        let change = |n| match n % 2 {
            0 => Operation::Remove(HashPrefix(n)),
            _ => Operation::Add(HashPrefix(n)),
        };
        let mut expected: BTreeSet<HashPrefix> = base.iter().copied().collect();
        for n in 0..3000u64 {
            index.apply(&A, at(n + 1), &[change(n)]);
            if n % 2 == 0 {
                expected.remove(&HashPrefix(n));
            } else {
                expected.insert(HashPrefix(n));
            }
        }
        let expected: Vec<HashPrefix> = expected.into_iter().collect();
        assert_eq!(index.prefixes(&A, None, 10_000), expected);
        assert!(index.writers[&A].set.added.len() <= DIFFERENCES_MAX);
        assert_eq!(
            index.fingerprint(&A),
            Some((Fingerprint::of(&expected), expected.len() as u64))
        );
        assert_eq!(index.providers(HashPrefix(1)), [A]);
        assert!(index.providers(HashPrefix(0)).is_empty());
    }
}
