//! When membership has to look at its peers again.

use std::time::Instant;

/// The earliest thing that time demands, or an earlier moment: a look in vain costs little, and what
/// is put off need not be found again among thousands.
pub(super) struct Due {
    at: Option<(Instant, &'static str)>,
    /// Something changed that may concern everybody.
    is_now: bool,
}

impl Due {
    pub(super) fn new() -> Due {
        Due {
            at: None,
            is_now: true,
        }
    }

    /// Everybody is looked at in the next step.
    pub(super) fn now(&mut self) {
        self.is_now = true;
    }

    /// Nothing is put off beyond `at`.
    pub(super) fn by(&mut self, at: Option<(Instant, &'static str)>) {
        self.at = [self.at, at]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at);
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.is_now || self.at.is_some_and(|(at, _)| at <= now)
    }

    /// Everybody was looked at, and nothing is to be done before `next`.
    pub(super) fn looked(&mut self, next: Option<(Instant, &'static str)>) {
        self.at = next;
        self.is_now = false;
    }

    pub(super) fn at(&self) -> Option<(Instant, &'static str)> {
        self.at
    }
}
