//! Graph: one cache's paths as a collection sees them, and what of them goes.
//!
//! Pure: read once from the catalog, then only computed with. Whatever it says, a path goes referrers
//! first, and is looked at again in the transaction that hides it.

use std::collections::{BTreeMap, BTreeSet};

use granary_protocol::hash::NarHash;
use granary_protocol::store_path::StorePathHash;
use rusqlite::Connection;

use crate::anchor::catalog::unsigned;

/// One cache's paths as the plan sees them.
pub struct Graph {
    paths: BTreeMap<StorePathHash, Node>,
    references: BTreeMap<StorePathHash, Vec<StorePathHash>>,
}

struct Node {
    base_name: String,
    /// Seconds since 1970.
    last_used: u64,
    nar_hash: NarHash,
    /// Bytes of its NAR in storage, which other paths may have as well.
    file_size: u64,
}

impl Graph {
    /// Reads the complete paths of a cache.
    pub fn read(connection: &Connection, cache: i64) -> rusqlite::Result<Graph> {
        let mut paths = BTreeMap::new();
        let mut statement = connection.prepare_cached(
            "SELECT hash, base_name, last_used, paths.nar_hash, file_size FROM paths
             JOIN nars ON nars.nar_hash = paths.nar_hash WHERE cache = ?1 AND state = 1",
        )?;
        let mut rows = statement.query([cache])?;
        while let Some(row) = rows.next()? {
            let hash = StorePathHash::from_bytes(row.get(0)?);
            let node = Node {
                base_name: row.get(1)?,
                last_used: unsigned(row, 2)?,
                nar_hash: NarHash::from_bytes(row.get(3)?),
                file_size: unsigned(row, 4)?,
            };
            paths.insert(hash, node);
        }
        let mut references: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut statement =
            connection.prepare_cached("SELECT hash, reference FROM edges WHERE cache = ?1")?;
        let mut rows = statement.query([cache])?;
        while let Some(row) = rows.next()? {
            let hash = StorePathHash::from_bytes(row.get(0)?);
            let reference = StorePathHash::from_bytes(row.get(1)?);
            references.entry(hash).or_default().push(reference);
        }
        Ok(Graph { paths, references })
    }

    pub fn len(&self) -> usize {
        self.paths.len()
    }

    pub fn base_name(&self, hash: &StorePathHash) -> Option<&str> {
        self.paths.get(hash).map(|node| node.base_name.as_str())
    }

    /// What is not kept since it, and what references it, was not used since `cutoff`; referrers before
    /// what they reference.
    pub fn expired(&self, cutoff: u64, pins: &BTreeSet<StorePathHash>) -> Vec<StorePathHash> {
        let is_root = |hash: &StorePathHash, used: u64| used >= cutoff || pins.contains(hash);
        let roots = self
            .paths
            .iter()
            .filter(|(hash, node)| is_root(hash, node.last_used));
        let mut waiting: Vec<StorePathHash> = roots.map(|(hash, _)| *hash).collect();
        let mut kept = BTreeSet::new();
        while let Some(hash) = waiting.pop() {
            if kept.insert(hash) {
                waiting.extend(self.references.get(&hash).into_iter().flatten());
            }
        }
        let expired = self.paths.keys().filter(|hash| !kept.contains(hash));
        let expired: BTreeSet<StorePathHash> = expired.copied().collect();
        let mut referrers: BTreeMap<StorePathHash, usize> = BTreeMap::new();
        let references = |hash: &StorePathHash| {
            let references = self.references.get(hash).into_iter().flatten();
            references
                .filter(|reference| expired.contains(reference))
                .copied()
        };
        for hash in &expired {
            for reference in references(hash) {
                *referrers.entry(reference).or_default() += 1;
            }
        }
        let free = expired.iter().filter(|hash| !referrers.contains_key(hash));
        let mut free: Vec<StorePathHash> = free.copied().collect();
        let mut order = Vec::with_capacity(expired.len());
        while let Some(hash) = free.pop() {
            order.push(hash);
            for reference in references(&hash) {
                if let Some(count) = referrers.get_mut(&reference) {
                    *count -= 1;
                    if *count == 0 {
                        free.push(reference);
                    }
                }
            }
        }
        order
    }

    /// What goes beside `expired` so that the NARs of the rest have at most `cap` bytes in storage: the least
    /// recently used closures, referrers before what they reference. What was used since `recent`, or is
    /// pinned, stays, and with it what it references, however much that is.
    pub fn over_cap(
        &self,
        expired: &[StorePathHash],
        cap: u64,
        recent: u64,
        pins: &BTreeSet<StorePathHash>,
    ) -> Vec<StorePathHash> {
        let expired: BTreeSet<&StorePathHash> = expired.iter().collect();
        let kept = self
            .paths
            .iter()
            .filter(|(hash, _)| !expired.contains(hash));
        let mut roots: Vec<(u64, StorePathHash)> = kept
            .map(|(hash, node)| match pins.contains(hash) {
                true => (u64::MAX, *hash),
                false => (node.last_used, *hash),
            })
            .collect();
        // A path counts as used when the last of its referrers was. From the last used downwards, each
        // walk reaches what no later use has.
        roots.sort_unstable_by(|a, b| b.cmp(a));
        let mut seen = BTreeSet::new();
        // A walk may lead to what an earlier one found, never the other way round: so the last goes first.
        let mut walks: Vec<(u64, Vec<StorePathHash>)> = Vec::new();
        for (used, root) in roots {
            walks.push((used, self.referrers_first(root, &mut seen)));
        }
        let mut holders: BTreeMap<NarHash, usize> = BTreeMap::new();
        let mut bytes = 0u64;
        let nodes = |hash: &StorePathHash| self.paths.get(hash);
        for node in walks.iter().flat_map(|(_, walk)| walk).filter_map(nodes) {
            let count = holders.entry(node.nar_hash).or_default();
            if *count == 0 {
                bytes = bytes.saturating_add(node.file_size);
            }
            *count += 1;
        }
        let mut over = Vec::new();
        for (used, walk) in walks.iter().rev() {
            for hash in walk {
                let Some(node) = nodes(hash).filter(|_| bytes > cap && *used < recent) else {
                    return over;
                };
                over.push(*hash);
                if let Some(count) = holders.get_mut(&node.nar_hash) {
                    *count -= 1;
                    if *count == 0 {
                        bytes -= node.file_size;
                    }
                }
            }
        }
        over
    }

    /// The closure of a path but for what was seen, each path before what it references.
    fn referrers_first(
        &self,
        root: StorePathHash,
        seen: &mut BTreeSet<StorePathHash>,
    ) -> Vec<StorePathHash> {
        let mut done = Vec::new();
        // A path, and whether what it references is done.
        let mut waiting = vec![(root, false)];
        while let Some((hash, is_done)) = waiting.pop() {
            if is_done {
                done.push(hash);
            } else if self.paths.contains_key(&hash) && seen.insert(hash) {
                waiting.push((hash, true));
                let references = self.references.get(&hash).into_iter().flatten();
                waiting.extend(references.map(|reference| (*reference, false)));
            }
        }
        done.reverse();
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u8) -> StorePathHash {
        StorePathHash::from_bytes([number; 20])
    }

    /// Paths as (number, time of last use, references).
    fn graph(paths: &[(u8, u64, &[u8])]) -> Graph {
        let path = |(number, used, _): &(u8, u64, &[u8])| {
            let node = Node {
                base_name: number.to_string(),
                last_used: *used,
                // Those of one tens digit are the same build.
                nar_hash: NarHash::from_bytes([*number / 10; 32]),
                file_size: 10,
            };
            (hash(*number), node)
        };
        let references = |(number, _, references): &(u8, u64, &[u8])| {
            (
                hash(*number),
                references.iter().map(|number| hash(*number)).collect(),
            )
        };
        Graph {
            paths: paths.iter().map(path).collect(),
            references: paths.iter().map(references).collect(),
        }
    }

    fn expired(graph: &Graph, pins: &[u8]) -> Vec<u8> {
        let pins = pins.iter().map(|number| hash(*number)).collect();
        graph
            .expired(100, &pins)
            .iter()
            .map(|hash| hash.as_bytes()[0])
            .collect()
    }

    #[test]
    fn what_a_used_path_references_is_kept_however_old() {
        let graph = graph(&[
            (1, 100, &[2]),
            (2, 0, &[3]),
            (3, 0, &[]),
            (4, 99, &[3, 5]),
            (5, 0, &[]),
        ]);
        assert_eq!(expired(&graph, &[]), [4, 5]);
        assert_eq!(expired(&graph, &[5]), [4]);
        assert_eq!(expired(&graph, &[4]), [0u8; 0]);
    }

    #[test]
    fn referrers_go_before_what_they_reference() {
        let graph = graph(&[
            (9, 0, &[1, 5]),
            (5, 0, &[1, 7]),
            (1, 0, &[]),
            (7, 0, &[8]),
            (8, 0, &[]),
        ]);
        let order = expired(&graph, &[]);
        let at = |number| order.iter().position(|found| *found == number).unwrap();
        assert_eq!(order.len(), 5);
        assert!(at(9) < at(5) && at(5) < at(7) && at(7) < at(8) && at(5) < at(1));
    }

    #[test]
    fn references_that_are_not_here_do_not_matter() {
        let graph = graph(&[(1, 0, &[66]), (2, 100, &[77])]);
        assert_eq!(expired(&graph, &[]), [1]);
    }

    fn over_cap(graph: &Graph, cap: u64, recent: u64, pins: &[u8]) -> Vec<u8> {
        let pins = pins.iter().map(|number| hash(*number)).collect();
        let over = graph.over_cap(&[], cap, recent, &pins);
        over.iter().map(|hash| hash.as_bytes()[0]).collect()
    }

    #[test]
    fn the_least_recently_used_closures_go_until_the_rest_fits() {
        let graph = graph(&[
            (10, 50, &[20]),
            (20, 1, &[30]),
            (30, 2, &[]),
            (40, 7, &[30, 50]),
            (50, 3, &[]),
            (60, 5, &[]),
        ]);
        // 20 and 30 are as young as 10, which references them; 50 as young as 40.
        assert_eq!(over_cap(&graph, 60, 100, &[]), [0u8; 0]);
        assert_eq!(over_cap(&graph, 59, 100, &[]), [60]);
        assert_eq!(over_cap(&graph, 40, 100, &[]), [60, 40]);
        assert_eq!(over_cap(&graph, 30, 100, &[]), [60, 40, 50]);
        assert_eq!(over_cap(&graph, 0, 100, &[]), [60, 40, 50, 10, 20, 30]);
        // Pins keep closures, and so does a use a moment ago.
        assert_eq!(over_cap(&graph, 0, 100, &[40]), [60, 10, 20]);
        assert_eq!(over_cap(&graph, 0, 7, &[]), [60]);
        let expired = [hash(60)];
        let over = graph.over_cap(&expired, 49, 100, &BTreeSet::new());
        assert_eq!(over, [hash(40)]);
    }

    #[test]
    fn a_nar_is_freed_with_the_last_of_its_paths() {
        let graph = graph(&[(10, 1, &[]), (11, 2, &[]), (12, 9, &[]), (20, 3, &[])]);
        assert_eq!(over_cap(&graph, 20, 100, &[]), [0u8; 0]);
        assert_eq!(over_cap(&graph, 10, 100, &[]), [10, 11, 20]);
    }

    #[test]
    fn of_paths_used_at_one_time_referrers_go_first() {
        for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
            let [a, b, c] = order;
            let (a, b, c) = (a * 10, b * 10, c * 10);
            let graph = graph(&[(a, 5, &[b]), (b, 5, &[c]), (c, 5, &[])]);
            assert_eq!(over_cap(&graph, 10, 100, &[]), [a, b], "{order:?}");
        }
    }
}
