//! Order: what is pushed, what goes first, and when a failure is tried again. Decisions alone: the
//! time and chance are arguments.

use std::fmt;
use std::time::Duration;

/// Pause after the first break of a line; doubled after each, up to the maximum.
const ATTEMPT_PAUSE_MIN: Duration = Duration::from_millis(250);
const ATTEMPT_PAUSE_MAX: Duration = Duration::from_secs(15);

/// Pause of the whole queue after the anchor was not to be had; doubled after each time. The maximum
/// is what a laptop that comes home waits at most, and a connection a minute costs nobody anything.
const AWAY_PAUSE_MIN: Duration = Duration::from_secs(1);
const AWAY_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Pause of one path that the anchor refused; doubled after each time. It is never given up: what
/// refused it (a size limit, a missing reference) may be mended, and one question a day costs nothing.
const PATH_PAUSE_MIN: Duration = Duration::from_secs(30);
pub const PATH_PAUSE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Pause after an anchor gave a member no token; doubled after each time. The minimum is what a machine waits that was
/// just made a member; a question every five minutes costs an anchor nothing that will never answer it.
const TOKEN_PAUSE_MIN: Duration = Duration::from_secs(5);
const TOKEN_PAUSE_MAX: Duration = Duration::from_secs(300);

/// Longest that an anchor may ask us to wait.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Paths of one round, whose closures are asked for at once and held against collection meanwhile.
pub const ROUND_MAX: usize = 32;

/// NAR bytes of a round's paths: what a newly built path waits for on a slow line.
const ROUND_BYTES_MAX: u64 = 256 << 20;

/// What decides about one path that the store has.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    pub is_derivation: bool,
    /// Nix registered the path as built on this machine.
    pub is_built_here: bool,
    /// It follows from its contents, nobody signed it, and it was not built: an added source.
    pub is_source: bool,
    /// Its name matches `share.deny`.
    pub is_denied: bool,
    /// Somebody hid it.
    pub is_hidden: bool,
    /// Its name matches `upload.filter`, or there is none.
    pub is_wanted: bool,
}

/// Why a path is not pushed by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Derivation,
    Denied,
    Hidden,
    Source,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Derivation => "it is a derivation",
            Reason::Denied => "its name matches share.deny",
            Reason::Hidden => "it was hidden with granary hide",
            Reason::Source => "it is an unsigned source, and upload.sources is false",
        })
    }
}

impl Facts {
    /// Whether the queue takes the path up.
    pub fn is_queued(&self) -> bool {
        self.is_built_here && self.is_wanted && !self.is_denied && !self.is_derivation
    }

    /// Why the path may not even go along with one that references it.
    pub fn stays(&self, are_sources_pushed: bool) -> Option<Reason> {
        if self.is_derivation {
            Some(Reason::Derivation)
        } else if self.is_denied {
            Some(Reason::Denied)
        } else if self.is_hidden {
            Some(Reason::Hidden)
        } else if self.is_source && !are_sources_pushed {
            Some(Reason::Source)
        } else {
            None
        }
    }
}

/// How many of the paths that are due, in their order, make the next round; given their NAR sizes.
pub fn round(nar_sizes: impl IntoIterator<Item = u64>) -> usize {
    let mut bytes = 0u64;
    let mut count = 0;
    for nar_size in nar_sizes {
        bytes = bytes.saturating_add(nar_size);
        // One at least, however large it is.
        if count == ROUND_MAX || (count > 0 && bytes > ROUND_BYTES_MAX) {
            break;
        }
        count += 1;
    }
    count
}

/// Pause before a request is repeated that failed so many times in a row.
pub fn attempt_pause(failures: u32, retry_after: Option<Duration>, chance: u32) -> Duration {
    let pause = doubled(ATTEMPT_PAUSE_MIN, failures, ATTEMPT_PAUSE_MAX);
    later(jittered(pause, chance), retry_after, chance)
}

/// Pause of the queue after the anchor was not to be had so many times in a row.
pub fn away_pause(failures: u32, retry_after: Option<Duration>, chance: u32) -> Duration {
    let pause = doubled(AWAY_PAUSE_MIN, failures, AWAY_PAUSE_MAX);
    later(jittered(pause, chance), retry_after, chance)
}

/// Pause of a path that was refused so many times.
pub fn path_pause(failures: u32, chance: u32) -> Duration {
    jittered(doubled(PATH_PAUSE_MIN, failures, PATH_PAUSE_MAX), chance)
}

/// Pause of a member that got no token so many times in a row.
pub fn token_pause(failures: u32, chance: u32) -> Duration {
    jittered(doubled(TOKEN_PAUSE_MIN, failures, TOKEN_PAUSE_MAX), chance)
}

fn doubled(first: Duration, failures: u32, max: Duration) -> Duration {
    let factor = 1 << failures.saturating_sub(1).min(20);
    first.saturating_mul(factor).min(max)
}

/// Between three quarters of the pause and the whole, so that many clients do not come at once.
fn jittered(pause: Duration, chance: u32) -> Duration {
    pause.mul_f64(0.75 + 0.25 * f64::from(chance) / f64::from(u32::MAX))
}

/// What the anchor asks for is the least, and spread to a quarter more.
fn later(pause: Duration, retry_after: Option<Duration>, chance: u32) -> Duration {
    let asked = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
    let spread = 1.0 + 0.25 * f64::from(chance) / f64::from(u32::MAX);
    pause.max(asked.mul_f64(spread))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built() -> Facts {
        Facts {
            is_derivation: false,
            is_built_here: true,
            is_source: false,
            is_denied: false,
            is_hidden: false,
            is_wanted: true,
        }
    }

    #[test]
    fn what_was_built_here_is_queued_unless_its_name_says_no() {
        assert!(built().is_queued());
        let not = [
            Facts {
                is_derivation: true,
                ..built()
            },
            Facts {
                is_built_here: false,
                ..built()
            },
            Facts {
                is_denied: true,
                ..built()
            },
            Facts {
                is_wanted: false,
                ..built()
            },
        ];
        assert!(not.iter().all(|facts| !facts.is_queued()));
    }

    #[test]
    fn secrets_do_not_go_along_with_what_references_them() {
        let substituted = Facts {
            is_built_here: false,
            is_wanted: false,
            ..built()
        };
        assert_eq!(substituted.stays(false), None);
        let source = Facts {
            is_source: true,
            ..substituted
        };
        assert_eq!(source.stays(false), Some(Reason::Source));
        assert_eq!(source.stays(true), None);
        let denied = Facts {
            is_denied: true,
            ..source
        };
        assert_eq!(denied.stays(true), Some(Reason::Denied));
        let hidden = Facts {
            is_hidden: true,
            ..substituted
        };
        assert_eq!(hidden.stays(true), Some(Reason::Hidden));
        let derivation = Facts {
            is_derivation: true,
            ..denied
        };
        assert_eq!(derivation.stays(true), Some(Reason::Derivation));
    }

    #[test]
    fn a_round_is_bounded_in_paths_and_bytes_and_never_empty() {
        assert_eq!(round([]), 0);
        assert_eq!(round([u64::MAX, 1]), 1);
        assert_eq!(round([200 << 20, 56 << 20, 1]), 2);
        assert_eq!(round([1; 100]), ROUND_MAX);
    }

    #[test]
    fn pauses_double_up_to_their_maximum_and_differ_by_chance() {
        let seconds = |number| Duration::from_secs(number);
        assert_eq!(away_pause(1, None, u32::MAX), seconds(1));
        assert_eq!(away_pause(4, None, u32::MAX), seconds(8));
        assert_eq!(away_pause(4, None, 0), seconds(6));
        assert_eq!(away_pause(u32::MAX, None, u32::MAX), seconds(60));
        assert_eq!(path_pause(u32::MAX, u32::MAX), PATH_PAUSE_MAX);
        assert_eq!(token_pause(1, u32::MAX), seconds(5));
        assert_eq!(token_pause(u32::MAX, 0), seconds(225));
        assert_eq!(attempt_pause(0, None, u32::MAX), ATTEMPT_PAUSE_MIN);
        assert_eq!(attempt_pause(u32::MAX, None, u32::MAX), ATTEMPT_PAUSE_MAX);
    }

    #[test]
    fn what_the_anchor_asks_for_is_waited_within_reason() {
        let asked = Some(Duration::from_secs(100));
        assert_eq!(away_pause(1, asked, 0), Duration::from_secs(100));
        assert_eq!(attempt_pause(1, asked, u32::MAX), Duration::from_secs(125));
        let absurd = Some(Duration::from_secs(u64::MAX));
        assert_eq!(away_pause(1, absurd, 0), RETRY_AFTER_MAX);
    }
}
