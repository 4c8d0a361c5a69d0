//! Health: whether storage and catalog answer, and the spool has room, asked by whoever watches the anchor.
//!
//! One probe is under way at a time, whoever asks: storage that hangs holds one thread, not one for each
//! question, and those who ask are told so within [`PROBE_TIMEOUT`]. The log is told of changes, not of questions: an
//! open page asks every two seconds.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::http::StatusCode;
use granary_protocol::seekable::FRAME_RAW_BYTES;
use tracing::{error, info, warn};

use super::http::{Answer, Refusal};
use super::ingest::IngestError;
use super::{Anchor, FORMAT_KEY, to_its_end};
use crate::serve::respond;

/// How long storage may take. S3 answers within a tenth of a second; what watches us gives up after
/// ten, as a rule.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// For how long a good answer is given again.
const PROBE_FRESH: Duration = Duration::from_secs(1);

/// Free bytes of the spool below which pushes are about to fail: a frame for each of those that are taken in at
/// once.
const SPOOL_FREE_MIN: u64 = super::INTAKES_PARALLEL as u64 * FRAME_RAW_BYTES as u64;

/// How the anchor is.
#[derive(Default)]
pub struct Health {
    /// When the last probe went well; held by the one that is under way.
    well: Arc<tokio::sync::Mutex<Option<Instant>>>,
    /// What the log was told last.
    told: Mutex<State>,
}

/// As far as the log tells them apart.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Well,
    /// No room for pushes.
    Full,
    /// Storage or catalog fails, or does not answer.
    Failing,
}

impl Health {
    /// Notes a state; whether the log is to be told of it.
    fn is_news(&self, state: State) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *told, state) != state
    }
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Asked(#[from] IngestError),
    #[error("storage {location} has no {FORMAT_KEY}, it is not the one that the anchor began with")]
    Another { location: String },
    #[error("the disk of the spool {path} has {free} bytes left, pushes need {SPOOL_FREE_MIN}", path = .path.display())]
    Full { path: PathBuf, free: u64 },
    #[error("cannot examine the spool {path}: {source}", path = .path.display())]
    Spool { path: PathBuf, source: io::Error },
}

/// Looks for room in the spool. Blocks.
fn check_spool(path: PathBuf) -> Result<(), ProbeError> {
    match rustix::fs::statvfs(&path) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            match free < SPOOL_FREE_MIN {
                true => Err(ProbeError::Full { path, free }),
                false => Ok(()),
            }
        }
        Err(errno) => Err(ProbeError::Spool {
            path,
            source: errno.into(),
        }),
    }
}

/// Answers `/health`: 200, or 503 and why.
pub async fn answer(anchor: &Arc<Anchor>) -> Answer {
    answer_within(anchor, PROBE_TIMEOUT).await
}

async fn answer_within(anchor: &Arc<Anchor>, timeout: Duration) -> Answer {
    match problem(anchor, timeout).await {
        None => Ok(respond::small(
            StatusCode::OK,
            "text/plain; charset=utf-8",
            "ok\n",
        )),
        Some(problem) => Err(Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "InternalError",
            problem,
        )),
    }
}

/// What is wrong, in words for whoever may ask; the log has the rest.
pub async fn problem(anchor: &Arc<Anchor>, timeout: Duration) -> Option<String> {
    match tokio::time::timeout(timeout, probe(anchor)).await {
        Ok(Ok(())) => {
            if anchor.health.is_news(State::Well) {
                info!(
                    storage = anchor.storage.location(),
                    "the anchor is well again"
                );
            }
            None
        }
        Ok(Err(problem @ ProbeError::Full { .. })) => {
            if anchor.health.is_news(State::Full) {
                error!(spool = %anchor.spool.display(), %problem, "nothing can be taken in");
            }
            Some("the disk of the spool is full".to_owned())
        }
        Ok(Err(problem)) => {
            if anchor.health.is_news(State::Failing) {
                error!(storage = anchor.storage.location(), %problem, "storage or catalog is not well");
            }
            Some("storage or catalog failed, see the log".to_owned())
        }
        Err(_) => {
            // Who waits for less than a probe may take does not know yet.
            if timeout >= PROBE_TIMEOUT && anchor.health.is_news(State::Failing) {
                warn!(?timeout, "storage or catalog did not answer");
            }
            Some(format!(
                "storage or catalog did not answer within {timeout:?}"
            ))
        }
    }
}

async fn probe(anchor: &Arc<Anchor>) -> Result<(), ProbeError> {
    let mut well = anchor.health.well.clone().lock_owned().await;
    if well.is_some_and(|at| at.elapsed() < PROBE_FRESH) {
        return Ok(());
    }
    let anchor = anchor.clone();
    // Whoever asked may have gone away; then this goes on, and holds back the next.
    to_its_end(async move {
        *well = None;
        anchor.catalog.caches().await.map_err(IngestError::from)?;
        let is_own = anchor.has_own_storage().await;
        if !is_own.map_err(IngestError::from)? {
            let location = anchor.storage.location().to_owned();
            return Err(ProbeError::Another { location });
        }
        let spool = anchor.spool.clone();
        let checked = tokio::task::spawn_blocking(move || check_spool(spool)).await;
        checked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        *well = Some(Instant::now());
        Ok(())
    })
    .await
}
