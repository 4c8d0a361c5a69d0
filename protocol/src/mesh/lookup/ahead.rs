//! Ahead: what Nix will ask next, asked before it does.
//!
//! After a narinfo Nix asks for those of its references, and some clients one after another
//! (`nix copy` of 2.8: 121 paths, 121 round trips). So references of what was found wait here to be
//! asked with nobody waiting, and theirs in turn. Every lookup of a client pays for a few of
//! them ([`CREDIT_PER_LOOKUP`]), which bounds what sources are asked however large closures are.

use std::collections::{BTreeSet, VecDeque};

use crate::store_path::StorePathHash;

/// Questions ahead that run at once: enough to hide the latency of an upstream (32 per 50 ms), too
/// few to keep a member or a cache from answering what somebody waits for.
pub(super) const RUNNING_MAX: usize = 32;

/// Paths that wait to be asked ahead. Beyond it they are not, which costs a round trip later.
pub(super) const WAITING_MAX: usize = 1024;

/// Questions ahead that each lookup of a client pays for: on average every path of a closure is
/// asked for once, so a few are plenty.
const CREDIT_PER_LOOKUP: u32 = 4;

/// What can be saved up, and is there at first: the closure of a large package.
const CREDIT_MAX: u32 = 256;

pub(super) struct Ahead {
    waiting: VecDeque<StorePathHash>,
    is_waiting: BTreeSet<StorePathHash>,
    credit: u32,
}

impl Ahead {
    pub(super) fn new() -> Ahead {
        Ahead {
            waiting: VecDeque::new(),
            is_waiting: BTreeSet::new(),
            credit: CREDIT_MAX,
        }
    }

    /// A client's lookup found something.
    pub(super) fn pay(&mut self) {
        self.credit = (self.credit + CREDIT_PER_LOOKUP).min(CREDIT_MAX);
    }

    /// Lets references of a found path wait.
    pub(super) fn add(&mut self, references: impl IntoIterator<Item = StorePathHash>) {
        for hash in references {
            if self.waiting.len() >= WAITING_MAX {
                return;
            }
            if self.is_waiting.insert(hash) {
                self.waiting.push_back(hash);
            }
        }
    }

    /// Returns the next path to ask for, if there is one and it is paid for.
    pub(super) fn next(&mut self) -> Option<StorePathHash> {
        if self.credit == 0 {
            return None;
        }
        let hash = self.waiting.pop_front()?;
        self.is_waiting.remove(&hash);
        Some(hash)
    }

    /// A question was asked.
    pub(super) fn spend(&mut self) {
        self.credit = self.credit.saturating_sub(1);
    }

    /// Whether [`Ahead::next`] has something.
    pub(super) fn has_more(&self) -> bool {
        self.credit > 0 && !self.waiting.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
