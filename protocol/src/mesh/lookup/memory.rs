//! Memory: narinfos that were proved, who told them, and what caches said they do not have.
//!
//! What was proved once stays true, except for vouchers, which last as long as their member; else only who
//! holds the path changes. So a narinfo is answered from here while one of those who told it is still
//! believed to have it: a peer until it withdraws the path, a cache for as long as paths stay in its like.
//! What a cache does not have is believed for a short while, or until somebody announces the path: whoever
//! has built it may have pushed it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{CacheRole, SourceId};
use crate::availability::HashPrefix;
use crate::hash::NarHash;
use crate::narinfo::{Proof, VerifiedNarInfo};
use crate::store_path::StorePathHash;

/// Verified narinfos remembered, about 1 KiB each: several closures of a system.
pub(super) const REMEMBERED_MAX: usize = 8192;

/// Sources remembered per narinfo. One that is still there is enough; the index knows the others.
const TELLERS_MAX: usize = 8;

/// How long an anchor's "I have it" is believed. What is taken out of an anchor has to be gone everywhere within a
/// minute, and an anchor tells nobody whom it only answers over HTTP.
const ANCHOR_HIT: Duration = Duration::from_secs(30);

/// How long an upstream's is: cache.nixos.org never takes a path back, and one that another has collected costs a
/// fetch that goes elsewhere.
const UPSTREAM_HIT: Duration = Duration::from_secs(3600);

/// How long that of strangers is: they collect garbage like any machine, and withdraw nothing.
const STRANGERS_HIT: Duration = Duration::from_secs(30);

/// How long an anchor's "I do not have it" is believed. Somebody pushes to an anchor while others
/// work, and not every pusher announces.
const ANCHOR_MISS: Duration = Duration::from_secs(30);

/// How long an upstream's is: what it lacks is mostly built here, and stays lacking. Long enough for
/// the evaluation, the dry run and the build of one command to ask once.
const UPSTREAM_MISS: Duration = Duration::from_secs(60);

/// How long that of strangers is: they come and go, and one that came may have it.
const STRANGERS_MISS: Duration = Duration::from_secs(5);

/// Misses remembered: as many as Nix keeps in memory itself. About 100 bytes each.
pub(super) const MISSES_MAX: usize = 65_536;

#[derive(Default)]
pub(super) struct Remembered {
    known: BTreeMap<StorePathHash, Told>,
    /// Keys of `known` by when they were last of use.
    by_age: BTreeMap<u64, StorePathHash>,
    next_age: u64,
}

struct Told {
    narinfo: Arc<VerifiedNarInfo>,
    /// Who said so, of one and the same NAR; a cache with the narinfo as it gave it.
    tellers: BTreeMap<SourceId, Word>,
    age: u64,
}

/// What a source last said of a path.
struct Word {
    narinfo: Arc<VerifiedNarInfo>,
    at: Instant,
}

/// Whether what a cache said at a time may still be answered without asking it again.
pub(super) fn is_fresh(role: CacheRole, at: Instant, now: Instant) -> bool {
    let believed = match role {
        CacheRole::Anchor => ANCHOR_HIT,
        CacheRole::Upstream => UPSTREAM_HIT,
        CacheRole::Strangers => STRANGERS_HIT,
    };
    now.saturating_duration_since(at) < believed
}

impl Remembered {
    /// Takes in what `source` told. Of two builds of one path, the one told last is kept.
    pub(super) fn told(
        &mut self,
        hash: StorePathHash,
        source: SourceId,
        narinfo: Arc<VerifiedNarInfo>,
        now: Instant,
    ) {
        let age = self.next_age;
        self.next_age += 1;
        let told = self.known.entry(hash).or_insert_with(|| Told {
            narinfo: narinfo.clone(),
            tellers: BTreeMap::new(),
            age,
        });
        if told.narinfo.narinfo().nar_hash != narinfo.narinfo().nar_hash {
            told.narinfo = narinfo.clone();
            told.tellers.clear();
        } else if matches!(told.narinfo.proof(), Proof::Vouched(_)) {
            // A lasting proof is better, and another voucher as good.
            told.narinfo = narinfo.clone();
        }
        if told.tellers.len() >= TELLERS_MAX && !told.tellers.contains_key(&source) {
            // Peers come first in this order, and there are more of them than caches.
            told.tellers.pop_first();
        }
        // Of a peer only the name matters: it serves every NAR under the canonical URL.
        let as_told = match source {
            SourceId::Peer(_) => told.narinfo.clone(),
            SourceId::Cache(_) => narinfo,
        };
        let word = Word {
            narinfo: as_told,
            at: now,
        };
        told.tellers.insert(source, word);
        self.by_age.remove(&told.age);
        told.age = age;
        self.by_age.insert(age, hash);
        while self.known.len() > REMEMBERED_MAX
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.known.remove(&oldest);
        }
    }

    /// Returns the narinfo if it still holds and one of those who told it, each at its time, is believed; it is
    /// forgotten later than others.
    pub(super) fn recall(
        &mut self,
        hash: &StorePathHash,
        is_believed: impl Fn(&SourceId, Instant) -> bool,
        holds: impl Fn(&VerifiedNarInfo) -> bool,
    ) -> Option<Arc<VerifiedNarInfo>> {
        let told = self.known.get_mut(hash)?;
        if !holds(&told.narinfo) || !told.is_believed(is_believed) {
            return None;
        }
        self.by_age.remove(&told.age);
        told.age = self.next_age;
        self.by_age.insert(told.age, *hash);
        self.next_age += 1;
        Some(told.narinfo.clone())
    }

    /// Whether one of those who told of a path is believed.
    pub(super) fn is_told(
        &self,
        hash: &StorePathHash,
        is_believed: impl Fn(&SourceId, Instant) -> bool,
    ) -> bool {
        let told = self.known.get(hash);
        told.is_some_and(|told| told.is_believed(is_believed))
    }

    /// Whether `source` told of exactly this NAR.
    pub(super) fn was_told_by(
        &self,
        hash: &StorePathHash,
        nar_hash: &NarHash,
        source: &SourceId,
    ) -> bool {
        let told = self.known.get(hash);
        told.is_some_and(|told| {
            told.narinfo.narinfo().nar_hash == *nar_hash && told.tellers.contains_key(source)
        })
    }

    /// The caches that told of exactly this NAR, each with its own narinfo.
    pub(super) fn caches<'a>(
        &'a self,
        hash: &StorePathHash,
        nar_hash: &NarHash,
    ) -> impl Iterator<Item = (usize, &'a Arc<VerifiedNarInfo>)> {
        let told = self.known.get(hash);
        let told = told.filter(|told| told.narinfo.narinfo().nar_hash == *nar_hash);
        let tellers = told.into_iter().flat_map(|told| &told.tellers);
        tellers.filter_map(|(source, word)| match source {
            SourceId::Cache(cache) => Some((*cache, &word.narinfo)),
            SourceId::Peer(_) => None,
        })
    }

    /// `source` says that it does not have the path.
    pub(super) fn withdraw(&mut self, hash: &StorePathHash, source: &SourceId) {
        let Some(told) = self.known.get_mut(hash) else {
            return;
        };
        told.tellers.remove(source);
        if told.tellers.is_empty() {
            self.by_age.remove(&told.age);
            self.known.remove(hash);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }
}

impl Told {
    fn is_believed(&self, is_believed: impl Fn(&SourceId, Instant) -> bool) -> bool {
        let mut tellers = self.tellers.iter();
        tellers.any(|(source, word)| is_believed(source, word.at))
    }
}

#[derive(Default)]
pub(super) struct Misses {
    until: BTreeMap<(HashPrefix, StorePathHash, usize), Instant>,
    /// The same by time.
    by_time: BTreeSet<(Instant, HashPrefix, StorePathHash, usize)>,
}

impl Misses {
    pub(super) fn learn(
        &mut self,
        hash: StorePathHash,
        cache: usize,
        role: CacheRole,
        now: Instant,
    ) {
        let believed = match role {
            CacheRole::Anchor => ANCHOR_MISS,
            CacheRole::Upstream => UPSTREAM_MISS,
            CacheRole::Strangers => STRANGERS_MISS,
        };
        let (prefix, until) = (HashPrefix::from(&hash), now + believed);
        if let Some(before) = self.until.insert((prefix, hash, cache), until) {
            self.by_time.remove(&(before, prefix, hash, cache));
        }
        self.by_time.insert((until, prefix, hash, cache));
        while let Some((first, prefix, hash, cache)) = self.by_time.first().copied() {
            if first > now && self.until.len() <= MISSES_MAX {
                break;
            }
            self.by_time.pop_first();
            self.until.remove(&(prefix, hash, cache));
        }
    }

    pub(super) fn contains(&self, hash: &StorePathHash, cache: usize, now: Instant) -> bool {
        let until = self.until.get(&(HashPrefix::from(hash), *hash, cache));
        until.is_some_and(|until| *until > now)
    }

    /// Somebody has a path with this prefix: the caches may have it as well.
    pub(super) fn announced(&mut self, prefix: HashPrefix) {
        let (least, greatest) = ([0; 20], [u8::MAX; 20]);
        let first = (prefix, StorePathHash::from_bytes(least), 0);
        let last = (prefix, StorePathHash::from_bytes(greatest), usize::MAX);
        let found: Vec<_> = self.until.range(first..=last).collect();
        let found: Vec<_> = found.into_iter().map(|(key, at)| (*key, *at)).collect();
        for (key @ (prefix, hash, cache), until) in found {
            self.until.remove(&key);
            self.by_time.remove(&(until, prefix, hash, cache));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.until.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.until.clear();
        self.by_time.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.until.len()
    }
}
