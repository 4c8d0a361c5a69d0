//! Accesses: what was asked of the anchor's caches last, for whoever looks at its status page.
//!
//! Only requests about a cache that the asker may know stand here, so nobody writes strange names into it. Bounded:
//! the oldest makes room. Nothing is kept beyond the process; the log is what keeps.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::cache::CacheName;

/// What a person reads through.
const ACCESSES_MAX: usize = 30;

/// Characters of an address that are kept.
const PATH_CHARACTERS_MAX: usize = 120;

/// A request that was answered.
#[derive(Debug, Clone)]
pub struct Access {
    pub cache: CacheName,
    pub method: String,
    pub path: String,
    pub status: u16,
    /// By the name in the token; `None` for who showed none.
    pub subject: Option<String>,
    pub elapsed_ms: u64,
    pub at: Instant,
}

#[derive(Default)]
pub struct Accesses(Mutex<VecDeque<Access>>);

impl Accesses {
    pub fn note(&self, mut access: Access) {
        if let Some((end, _)) = access.path.char_indices().nth(PATH_CHARACTERS_MAX) {
            access.path.truncate(end);
            access.path.push('…');
        }
        let mut accesses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        accesses.truncate(ACCESSES_MAX - 1);
        accesses.push_front(access);
    }

    /// The newest first.
    pub fn all(&self) -> Vec<Access> {
        let accesses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        accesses.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_stand_first_and_are_bounded() {
        let accesses = Accesses::default();
        for number in 0..100 {
            accesses.note(Access {
                cache: "main".parse().unwrap(),
                method: "GET".to_owned(),
                path: format!("/{number}/{}", "ü".repeat(1000)),
                status: 200,
                subject: None,
                elapsed_ms: 1,
                at: Instant::now(),
            });
        }
        let all = accesses.all();
        assert_eq!(all.len(), ACCESSES_MAX);
        assert!(all[0].path.starts_with("/99/ü") && all[29].path.starts_with("/70/"));
        assert_eq!(all[0].path.chars().count(), PATH_CHARACTERS_MAX + 1);
    }
}
