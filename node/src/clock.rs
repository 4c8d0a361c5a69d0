//! The clock: time that counts suspension, and the wall clock.
//!
//! `Instant` stands still while a laptop sleeps, so a deadline of ten seconds would still be ten
//! seconds away after a night. [`Clock::now`] adds the time spent suspended (the difference between
//! Linux's CLOCK_BOOTTIME and CLOCK_MONOTONIC), so that everything overdue is overdue on waking,
//! and [`Clock::woke`] says that it happened. Timers stand still too: [`Alarm`] is one that does not,
//! so that waking is noticed at once and not when the next timer would have been due.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime};

use granary_protocol::certificate::UnixTime;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// A suspension shorter than this changes nothing worth re-learning.
const SLEEP_MIN: Duration = Duration::from_secs(2);

/// How often the mesh lets its alarm ring: a sleep shorter than this may be noticed that much later.
pub const ALARM_INTERVAL: Duration = Duration::from_secs(5);

/// Reads the clocks of this machine.
pub struct Clock {
    /// How long the machine has been suspended since it started.
    suspended: Box<dyn Fn() -> Duration + Send>,
    /// That when the clock was made, and when [`Clock::woke`] was last asked.
    suspended_at_start: Duration,
    suspended_last: Duration,
}

impl Clock {
    #[expect(clippy::new_without_default, reason = "it reads the clock")]
    pub fn new() -> Clock {
        Clock::with(suspended)
    }

    /// A clock of a machine that was suspended as long as `suspended` says whenever it is asked.
    pub fn with(suspended: impl Fn() -> Duration + Send + 'static) -> Clock {
        let at_start = suspended();
        Clock {
            suspended: Box::new(suspended),
            suspended_at_start: at_start,
            suspended_last: at_start,
        }
    }

    /// Monotonic time that goes on during suspension.
    pub fn now(&self) -> Instant {
        Instant::now() + (self.suspended)().saturating_sub(self.suspended_at_start)
    }

    /// Returns whether the machine was suspended since this was last asked.
    pub fn woke(&mut self) -> bool {
        let suspended = (self.suspended)();
        let slept = suspended.saturating_sub(self.suspended_last);
        self.suspended_last = suspended;
        slept >= SLEEP_MIN
    }
}

/// Rings at every interval of the time that goes on during suspension: on waking, at once.
pub struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// An interval of 0 never rings. Must run inside a tokio runtime.
    pub fn every(interval: Duration) -> io::Result<Alarm> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        let interval = Timespec {
            tv_sec: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let every = Itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every)?;
        #[expect(
            deprecated,
            reason = "its successor is an unsafe function; an OwnedFd keeps what that one asks for"
        )]
        let timer = AsyncFd::new(timer)?;
        Ok(Alarm(timer))
    }

    /// Waits for the next ring. Cancel-safe.
    pub async fn rings(&self) {
        loop {
            let Ok(mut ready) = self.0.readable().await else {
                // The runtime is going down.
                return std::future::pending().await;
            };
            let mut count = [0; 8];
            match rustix::io::read(self.0.get_ref(), &mut count) {
                Ok(_) => return,
                Err(_) => ready.clear_ready(),
            }
        }
    }
}

/// Waits so long in the time that goes on during suspension. Cancel-safe.
pub async fn pass(time: Duration) {
    // An alarm of 0 never rings.
    match Alarm::every(time.max(Duration::from_millis(1))) {
        Ok(alarm) => alarm.rings().await,
        // Out of file descriptors: late after a night is better than never.
        Err(_) => tokio::time::sleep(time).await,
    }
}

/// The wall clock in seconds.
pub fn unix_time() -> UnixTime {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    UnixTime(since.as_secs())
}

fn suspended() -> Duration {
    // Monotonic first: the time between the two readings must not count as suspended below zero.
    let monotonic = read(ClockId::Monotonic);
    read(ClockId::Boottime).saturating_sub(monotonic)
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn time_goes_forward_and_a_running_machine_is_not_waking() {
        let mut clock = Clock::new();
        let first = clock.now();
        assert!(clock.now() >= first);
        assert!(!clock.woke());
    }

    #[test]
    fn a_night_counts_and_is_told_once() {
        let seconds = Arc::new(AtomicU64::new(1000));
        let slept = seconds.clone();
        let suspended = move || Duration::from_secs(slept.load(Ordering::SeqCst));
        let mut clock = Clock::with(suspended);
        let evening = clock.now();
        assert!(!clock.woke());
        seconds.fetch_add(8 * 3600, Ordering::SeqCst);
        assert!(clock.now() - evening >= Duration::from_secs(8 * 3600));
        assert!(clock.woke());
        assert!(!clock.woke());
        // A nod.
        seconds.fetch_add(1, Ordering::SeqCst);
        assert!(!clock.woke());
    }

    #[tokio::test]
    async fn an_alarm_rings_again_and_again() {
        let interval = Duration::from_millis(20);
        let start = Instant::now();
        let alarm = Alarm::every(interval).unwrap();
        for _ in 0..3 {
            alarm.rings().await;
        }
        assert!(start.elapsed() >= interval);
        pass(Duration::ZERO).await;
        pass(interval).await;
        assert!(start.elapsed() >= 2 * interval);
    }
}
