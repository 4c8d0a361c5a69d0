//! The watcher: which paths become valid and which cease to be, soon after they do.
//!
//! inotify says when to look and the database says what is true. A path in the store directory may
//! be half unpacked, the end of a lock may be a collector's tidying, and some registrations take no
//! lock; but rows get ids that only rise and are never used again. So after each wake-up, the rows
//! above the greatest id seen are new, and a count of rows that differs from what is known means
//! that some are gone. A row is reported only when it was read, a removal only when the row was
//! looked for and missing.
//!
//! What no wake-up tells (an overflown queue, a row updated in place by `nix store sign`, a
//! database put in the place of another) is found by a comparison of all rows.

use std::{collections::BTreeMap, io, path::Path, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use granary_protocol::store_path::StorePathHash;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, warn};

use super::{
    BATCH_MAX, Database, PathInfo, StoreConfig, StoreError,
    database::{FileId, Newer, Summary},
};

/// Time from a wake-up to looking: commits come in bursts, and announcements are batched as long.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// The least time between two comparisons of all rows. One reads some 10 MB per 100,000 paths,
/// and a collection deletes rows one by one; with this spacing removals are still told within 2 s.
const COMPARISON_SPACING: Duration = Duration::from_secs(1);

/// How often all rows are compared although nothing asked for it.
const RESCAN: Duration = Duration::from_secs(60);

/// How often to look when inotify cannot be had, and when to try again after an error.
const POLL: Duration = Duration::from_secs(1);

/// Rows of one summary query: a read transaction of some 5 ms.
const SUMMARIES_MAX: usize = 8192;

/// Events that wait for the receiver; beyond it the watcher waits.
const EVENTS_MAX: usize = 16;

/// Bytes of inotify events read at once: some 100 of them.
const INOTIFY_BUFFER_BYTES: usize = 8 * 1024;

/// A change of the set of valid paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// These are valid: from before, since now, or again with other signatures. At most [`BATCH_MAX`].
    Added(Vec<PathInfo>),
    /// Every path that was valid when watching began has been given. Comes once.
    Complete,
    /// These are valid no longer.
    Removed(Vec<StorePathHash>),
}

/// Watches a store from a task that ends when the receiver is dropped.
pub(super) fn watch(
    config: Arc<StoreConfig>,
    database: Arc<Database>,
) -> mpsc::Receiver<StoreEvent> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let watcher = Watcher {
        config,
        database,
        events,
        known: BTreeMap::new(),
        last_id: 0,
        rows: 0,
        file: None,
        is_complete: false,
        compared: None,
    };
    tokio::spawn(async move {
        // The only end is that of the receiver.
        let Err(Closed) = watcher.run().await;
    });
    receiver
}

struct Watcher {
    config: Arc<StoreConfig>,
    database: Arc<Database>,
    events: mpsc::Sender<StoreEvent>,
    /// The rows seen, by the hash of their path.
    known: BTreeMap<StorePathHash, Known>,
    /// The greatest id seen.
    last_id: i64,
    /// Rows seen, malformed ones included, which `known` may lack.
    rows: u64,
    /// The database that `known` was read from.
    file: Option<FileId>,
    is_complete: bool,
    /// When all rows were last compared.
    compared: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Known {
    /// [`Summary::stamp`].
    stamp: u64,
    /// Whether the receiver knows the path. It does not when the row is malformed, or was gone
    /// before it could be read in full.
    is_told: bool,
}

/// The receiver is gone.
struct Closed;

/// Why one look at the database ended early.
enum Interrupted {
    Closed,
    Failed(StoreError),
}

impl From<Closed> for Interrupted {
    fn from(_: Closed) -> Interrupted {
        Interrupted::Closed
    }
}

impl From<StoreError> for Interrupted {
    fn from(error: StoreError) -> Interrupted {
        Interrupted::Failed(error)
    }
}

/// What woke the watcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    /// Something was written: look for changes.
    Look,
    /// Events were lost or the watched directories replaced: compare everything.
    Compare,
}

impl Watcher {
    async fn run(mut self) -> Result<std::convert::Infallible, Closed> {
        let mut notices = Notices::default();
        notices.restart(&self.config);
        let mut is_failing = false;
        let mut wake = Wake::Compare;
        loop {
            let result = match wake {
                Wake::Look => self.look().await,
                Wake::Compare => self.compare().await,
            };
            let next = match result {
                Ok(next) => {
                    is_failing = false;
                    next
                }
                Err(Interrupted::Closed) => return Err(Closed),
                Err(Interrupted::Failed(error)) => {
                    if !is_failing {
                        let error: &dyn std::error::Error = &error;
                        warn!(error, "could not read the Nix database; trying again");
                    }
                    is_failing = true;
                    Some((Instant::now() + POLL, Wake::Compare))
                }
            };
            wake = self.sleep(&mut notices, next).await?;
        }
    }

    /// Waits for a reason to look, at the latest until `next`.
    async fn sleep(
        &self,
        notices: &mut Notices,
        next: Option<(Instant, Wake)>,
    ) -> Result<Wake, Closed> {
        let compared = self.compared.unwrap_or_else(Instant::now);
        let (mut until, mut reason) = next.unwrap_or((compared + RESCAN, Wake::Compare));
        if !notices.is_live() && until > Instant::now() + POLL {
            (until, reason) = (Instant::now() + POLL, Wake::Look);
        }
        let noticed = tokio::select! {
            () = self.events.closed() => return Err(Closed),
            () = sleep_until(until) => None,
            noticed = notices.next() => Some(noticed),
        };
        let wake = match noticed {
            Some(noticed) => {
                sleep(DEBOUNCE).await;
                noticed.max(notices.drain())
            }
            None => reason,
        };
        // Events were lost, or inotify could not be had before; either is seen to before looking,
        // so that nothing happens unnoticed in between.
        if wake == Wake::Compare && (noticed.is_some() || !notices.is_live()) {
            notices.restart(&self.config);
        }
        Ok(wake)
    }

    /// Reports new rows; when the count says that others are gone, compares everything, at once or
    /// at the returned time.
    async fn look(&mut self) -> Result<Option<(Instant, Wake)>, Interrupted> {
        loop {
            let newer = self.database.newer(self.last_id, BATCH_MAX).await?;
            if self.file != Some(newer.file) {
                return self.compare().await;
            }
            let is_last = newer.rows.len() < BATCH_MAX;
            let count = newer.count;
            self.add(newer).await?;
            if !is_last {
                continue;
            }
            if count == self.rows {
                return Ok(None);
            }
            let earliest = self
                .compared
                .map_or_else(Instant::now, |compared| compared + COMPARISON_SPACING);
            if earliest > Instant::now() {
                return Ok(Some((earliest, Wake::Compare)));
            }
            return self.compare().await;
        }
    }

    /// Reports all differences between what is known and what is in the database.
    async fn compare(&mut self) -> Result<Option<(Instant, Wake)>, Interrupted> {
        self.compared = Some(Instant::now());
        let mut present = BTreeMap::new();
        let mut last_id = 0;
        let mut count = 0;
        let mut file = None;
        loop {
            let part = self.database.summaries(last_id, SUMMARIES_MAX).await?;
            // Replaced while we read: the next look starts over.
            if file.is_some_and(|file| file != part.file) {
                return Ok(Some((Instant::now() + POLL, Wake::Compare)));
            }
            file = Some(part.file);
            let Some(id) = part.last_id else { break };
            last_id = id;
            count += part.count;
            for Summary { hash, stamp } in part.rows {
                present.insert(hash, stamp);
            }
        }
        let mut removed = Vec::new();
        self.known.retain(|hash, known| {
            let is_present = present.contains_key(hash);
            if !is_present && known.is_told {
                removed.push(*hash);
            }
            is_present
        });
        for hashes in removed.chunks(BATCH_MAX) {
            self.send(StoreEvent::Removed(hashes.to_vec())).await?;
        }
        present.retain(|hash, stamp| {
            self.known
                .get(hash)
                .is_none_or(|known| known.stamp != *stamp)
        });
        let changed: Vec<_> = present.into_iter().collect();
        for changed in changed.chunks(BATCH_MAX) {
            let hashes = changed.iter().map(|(hash, _)| *hash).collect();
            let infos = self.database.path_infos(hashes).await?;
            for ((hash, stamp), info) in changed.iter().zip(&infos) {
                let known = self.known.entry(*hash).or_insert(Known {
                    stamp: *stamp,
                    is_told: false,
                });
                known.stamp = *stamp;
                known.is_told |= info.is_some();
            }
            let infos: Vec<_> = infos.into_iter().flatten().collect();
            if !infos.is_empty() {
                self.send(StoreEvent::Added(infos)).await?;
            }
        }
        self.rows = count;
        self.last_id = last_id;
        self.file = file;
        if !self.is_complete {
            self.is_complete = true;
            self.send(StoreEvent::Complete).await?;
        }
        // What was registered meanwhile.
        Ok(Some((Instant::now(), Wake::Look)))
    }

    async fn add(&mut self, newer: Newer) -> Result<(), Closed> {
        let mut added = Vec::new();
        for (id, stamp, registered) in newer.rows {
            self.last_id = id;
            self.rows += 1;
            match registered {
                Ok(info) => {
                    let is_told = true;
                    self.known
                        .insert(info.store_path.hash(), Known { stamp, is_told });
                    added.push(info);
                }
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    debug!(error, "left out a malformed row");
                }
            }
        }
        if !added.is_empty() {
            self.send(StoreEvent::Added(added)).await?;
        }
        Ok(())
    }

    async fn send(&self, event: StoreEvent) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }
}

/// inotify on the directories of the store and of its database; silent when it cannot be had.
#[derive(Default)]
struct Notices {
    stream: Option<EventStream<Vec<u8>>>,
    is_warned: bool,
}

/// Events of one wake-up that are looked at; the rest of a flood makes the next wake-up.
const DRAIN_MAX: usize = 4096;

impl Notices {
    fn restart(&mut self, config: &StoreConfig) {
        // The old watches go first, for their number is limited per user.
        self.stream = None;
        match start_inotify(config) {
            Ok(stream) => {
                self.stream = Some(stream);
                self.is_warned = false;
            }
            Err(error) => {
                if !self.is_warned {
                    let error: &dyn std::error::Error = &error;
                    warn!(
                        error,
                        "could not set up inotify; looking at the Nix database every second"
                    );
                }
                self.is_warned = true;
            }
        }
    }

    fn is_live(&self) -> bool {
        self.stream.is_some()
    }

    /// Waits for an event that matters. Cancel-safe.
    async fn next(&mut self) -> Wake {
        loop {
            let Some(stream) = &mut self.stream else {
                return std::future::pending().await;
            };
            match stream.next().await {
                Some(Ok(event)) => {
                    if let Some(wake) = wake_of(event.mask, event.name.as_deref()) {
                        return wake;
                    }
                }
                Some(Err(_)) | None => {
                    self.stream = None;
                    return Wake::Compare;
                }
            }
        }
    }

    /// Takes all events that are there already.
    fn drain(&mut self) -> Wake {
        let mut wake = Wake::Look;
        for _ in 0..DRAIN_MAX {
            match self.next().now_or_never() {
                Some(other) => wake = wake.max(other),
                None => break,
            }
        }
        wake
    }
}

fn start_inotify(config: &StoreConfig) -> io::Result<EventStream<Vec<u8>>> {
    let inotify = Inotify::init()?;
    let gone = WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
    inotify.watches().add(
        &config.real_dir,
        WatchMask::DELETE | WatchMask::MOVED_FROM | gone,
    )?;
    inotify.watches().add(
        config.database.parent().unwrap_or(Path::new("/")),
        WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | gone,
    )?;
    inotify.into_event_stream(vec![0; INOTIFY_BUFFER_BYTES])
}

/// Says what an event is worth. In the store: the end of a lock or of a path. Beside the database:
/// any write but those to the shared memory of the WAL, which our own readers make.
fn wake_of(mask: EventMask, name: Option<&std::ffi::OsStr>) -> Option<Wake> {
    let lost = EventMask::Q_OVERFLOW
        | EventMask::IGNORED
        | EventMask::DELETE_SELF
        | EventMask::MOVE_SELF
        | EventMask::UNMOUNT;
    if mask.intersects(lost) {
        return Some(Wake::Compare);
    }
    let is_shared_memory = name.is_some_and(|name| name.as_encoded_bytes().ends_with(b"-shm"));
    (!is_shared_memory).then_some(Wake::Look)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_events_and_replaced_directories_ask_for_a_comparison() {
        let check = |mask, name: Option<&str>, expected| {
            assert_eq!(
                wake_of(mask, name.map(AsRef::as_ref)),
                expected,
                "{mask:?} {name:?}"
            );
        };
        check(EventMask::Q_OVERFLOW, None, Some(Wake::Compare));
        check(EventMask::IGNORED, None, Some(Wake::Compare));
        check(EventMask::DELETE_SELF, None, Some(Wake::Compare));
        check(EventMask::MOVE_SELF, None, Some(Wake::Compare));
        check(EventMask::MODIFY, Some("db.sqlite-wal"), Some(Wake::Look));
        check(EventMask::MODIFY, Some("db.sqlite"), Some(Wake::Look));
        check(EventMask::MODIFY, Some("db.sqlite-shm"), None);
        check(EventMask::DELETE, Some("x.lock"), Some(Wake::Look));
        check(EventMask::MOVED_FROM, Some("x"), Some(Wake::Look));
        assert!(Wake::Compare > Wake::Look);
    }
}
