//! Uses: who relies on a path, decided together with what goes.
//!
//! Whoever is told that a path is here relies on it, and leaves a note before it is told; the collector
//! takes a path only if there is no note. Both look here under one lock, so that of a note and a
//! departure exactly one comes first. A departure is claimed inside the transaction that hides the
//! path, after everything else there spoke for it, and stands until that has been committed: a path
//! that is hidden does not come back, and one that stays was never hidden.
//!
//! Notes are written down as times of last use now and then ([`Uses::noted`], [`Uses::written`]); until
//! that is durable they are found here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use granary_protocol::store_path::StorePathHash;

/// Notes kept, some 25 MB. While there are as many, further ones are lost, and nothing is let go.
const NOTES_MAX: usize = 500_000;

/// A path of a cache.
pub type CachePath = (i64, StorePathHash);

/// The notes of one anchor; `Clone` is cheap.
#[derive(Clone, Default)]
pub struct Uses(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// When each was used last, in seconds since 1970.
    notes: BTreeMap<CachePath, u64>,
    leaving: BTreeSet<CachePath>,
}

/// A path that is being hidden; drop it when that is committed, or given up.
pub struct Leaving {
    uses: Uses,
    path: CachePath,
}

impl Uses {
    /// Notes that somebody will rely on a path; `false` when it is on its way out, and is not here.
    ///
    /// To be followed by a look whether the path is there: what that finds stays.
    pub fn note(&self, path: CachePath, now: u64) -> bool {
        let mut state = self.state();
        if state.leaving.contains(&path) {
            return false;
        }
        if state.notes.len() < NOTES_MAX || state.notes.contains_key(&path) {
            state.notes.insert(path, now);
        }
        true
    }

    /// Claims that a path goes; `None` when somebody relies on it.
    pub fn leave(&self, path: CachePath) -> Option<Leaving> {
        let mut state = self.state();
        if state.notes.contains_key(&path) || state.notes.len() >= NOTES_MAX {
            return None;
        }
        state.leaving.insert(path);
        Some(Leaving {
            uses: self.clone(),
            path,
        })
    }

    /// Whether somebody relies on a path as far as can be told before it is claimed.
    pub fn is_noted(&self, path: CachePath) -> bool {
        self.state().notes.contains_key(&path)
    }

    /// What is to be written down.
    pub fn noted(&self) -> Vec<(CachePath, u64)> {
        let state = self.state();
        state.notes.iter().map(|(path, at)| (*path, *at)).collect()
    }

    /// Forgets notes that are written down, but for those that were renewed meanwhile.
    pub fn written(&self, notes: &[(CachePath, u64)]) {
        let mut state = self.state();
        for (path, at) in notes {
            if state.notes.get(path) == Some(at) {
                state.notes.remove(path);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.uses.state().leaving.remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: CachePath = (1, StorePathHash::from_bytes([7; 20]));

    #[test]
    fn of_a_use_and_a_departure_one_comes_first() {
        let uses = Uses::default();
        assert!(uses.note(PATH, 10));
        assert!(uses.leave(PATH).is_none());
        uses.written(&[(PATH, 10)]);
        let leaving = uses.leave(PATH);
        assert!(leaving.is_some());
        assert!(!uses.note(PATH, 11), "it is on its way out");
        drop(leaving);
        assert!(uses.note(PATH, 11));
    }

    #[test]
    fn a_note_that_was_renewed_while_it_was_written_down_stays() {
        let uses = Uses::default();
        uses.note(PATH, 10);
        let noted = uses.noted();
        uses.note(PATH, 11);
        uses.written(&noted);
        assert_eq!(uses.noted(), [(PATH, 11)]);
    }

    #[test]
    fn nothing_goes_while_uses_are_lost() {
        let uses = Uses::default();
        for number in 0..NOTES_MAX as i64 {
            uses.note((number, PATH.1), 1);
        }
        assert!(uses.note((-1, PATH.1), 1), "told all the same");
        assert!(uses.leave((-2, PATH.1)).is_none());
    }
}
