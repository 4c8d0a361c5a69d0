//! The supervisor's view: what systemd is told (`sd_notify(3)`), if it is there.
//!
//! `READY=1` once Nix is answered, `STOPPING=1` when the end begins, and `WATCHDOG=1` for as long as the
//! node is alive: the reactor that runs this task, and the mesh's loop, which must answer. A node
//! that only looks alive is restarted. The store is not asked: a disk that hangs is no reason to
//! restart, and would hang the next process as well.

use std::future::Future;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{debug, warn};

/// Pings per deadline: one may be late.
const PINGS: u32 = 3;

/// Says that Nix is answered.
pub fn ready() {
    say(NotifyState::Ready);
}

/// Says that the end has begun, and that it may take `limit`.
pub fn stopping(limit: Duration) {
    say(NotifyState::Stopping);
    // systemd's own limit may be shorter than what running transfers get.
    let micros = u32::try_from(limit.as_micros()).unwrap_or(u32::MAX);
    say(NotifyState::ExtendTimeoutUsec(micros));
}

/// Pings while `is_alive` says so; ends at once when nobody asked for it.
pub async fn watch<F: Future<Output = bool>>(is_alive: impl Fn() -> F) {
    let Some(deadline) = sd_notify::watchdog_enabled() else {
        return;
    };
    let ping = || say(NotifyState::Watchdog);
    ping_while(is_alive, deadline, ping).await;
}

async fn ping_while<F: Future<Output = bool>>(
    is_alive: impl Fn() -> F,
    deadline: Duration,
    ping: impl Fn(),
) {
    let mut interval = tokio::time::interval(deadline / PINGS);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        match tokio::time::timeout(deadline / PINGS, is_alive()).await {
            Ok(true) => ping(),
            Ok(false) | Err(_) => warn!("the mesh does not answer, telling the watchdog nothing"),
        }
    }
}

fn say(state: NotifyState<'_>) {
    // Without a service manager it succeeds and does nothing.
    if let Err(error) = sd_notify::notify(&[state]) {
        debug!(%error, "could not tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Asks until there were `questions`; returns how many pings that made.
    async fn pings(questions: u32, is_alive: fn(u32) -> bool) -> u32 {
        let (asked, pings) = (AtomicU32::new(0), AtomicU32::new(0));
        let watch = ping_while(
            || {
                let number = asked.fetch_add(1, Ordering::Relaxed);
                async move {
                    if !is_alive(number) && number.is_multiple_of(2) {
                        std::future::pending::<()>().await;
                    }
                    is_alive(number)
                }
            },
            Duration::from_millis(3 * u64::from(PINGS)),
            || {
                pings.fetch_add(1, Ordering::Relaxed);
            },
        );
        let enough = async {
            while asked.load(Ordering::Relaxed) <= questions {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = watch => unreachable!("it has no end"),
            () = enough => pings.load(Ordering::Relaxed),
        }
    }

    #[tokio::test]
    async fn the_watchdog_hears_of_life_and_of_nothing_else() {
        assert!(pings(10, |_| true).await >= 10);
        assert_eq!(pings(10, |_| false).await, 0);
        assert_eq!(pings(10, |number| number < 3).await, 3);
    }
}
