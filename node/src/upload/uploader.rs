//! Uploader: pushes by itself what this machine builds.
//!
//! Two halves. One follows the store and writes what was built here into the [`Queue`]; since the
//! store's watcher begins with every path that is there, what was built while no node ran is found as
//! well. The other takes rounds from the queue, pushes them, and writes down what became of them. When
//! the anchor is away it waits, and everything else of the node goes on.
//!
//! A queue that cannot be used (a full disk, a damaged file) is closed, and opened again later; then the
//! store is gone through from its beginning, so nothing is missed.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::{StorePath, StorePathHash};
use regex::Regex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, info, warn};

use super::order::{self, Facts};
use super::pace::Pace;
use super::progress::{Progress, UnderWay};
use super::queue::{Count, Due, Entry, Queue, QueueError, Settled};
use super::target::{Marks, chance};
use super::{Extent, Outcome, PushError, Root, Target, TokenFileError, push_round, read_token};
use crate::authority::{Authorities, AuthorityError};
use crate::clock::unix_time;
use crate::credential::{Credential, bearer};
use crate::log::chain;
use crate::store::hidden::Hidden;
use crate::store::{LocalStore, PathInfo, StoreEvent};

/// How often to look for what `granary push --queue` wrote. A question takes 20 µs.
const POLL: Duration = Duration::from_secs(2);

/// Marks waiting to be written; six uploads make two each.
const MARKS_MAX: usize = 64;

/// When a queue that cannot be used is opened again.
const REOPEN: Duration = Duration::from_secs(5);

/// What is pushed, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the queue is kept.
    pub file: PathBuf,
    /// The cache of an anchor.
    pub url: String,
    /// Read again for every round, so that a new token is taken without a restart.
    pub token_file: PathBuf,
    /// What it gets as a member, if the token in the file is that: why there is none, and who hears that it is refused.
    pub credential: Option<Credential>,
    /// Certificates that count beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Bytes that may leave in a second.
    pub rate: Option<u64>,
    /// Names that are pushed; all when empty.
    pub filter: Vec<Regex>,
    /// Names that never leave this machine.
    pub deny: Vec<Regex>,
    /// Whether unsigned sources go along with what references them.
    pub sources: bool,
    /// Keys by which an upstream's paths are recognised.
    pub trust: TrustedKeys,
}

/// The uploader of one node, for those who show how it is doing.
pub struct Uploader {
    options: Options,
    hidden: watch::Receiver<Arc<Hidden>>,
    progress: Progress,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    count: Count,
    /// Why nothing is pushed, and when it is tried again.
    trouble: Option<(String, Instant)>,
}

/// How the uploader is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The address of the cache that is pushed to.
    pub cache: String,
    pub paths_waiting: u64,
    /// Of NARs, without what they reference.
    pub bytes_waiting: u64,
    /// Waiting paths that were refused before.
    pub paths_failed: u64,
    /// Built here, but not to leave this machine.
    pub paths_staying: u64,
    /// Since the start, with what they reference.
    pub paths_pushed: u64,
    pub bytes_pushed: u64,
    pub current: Vec<UnderWay>,
    /// While the anchor is not to be had: seconds to the next attempt.
    pub retry_in: Option<u64>,
    pub problem: Option<String>,
}

/// Why no round can be pushed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Token(#[from] TokenFileError),
    #[error("got no token as a member: {0}")]
    NoToken(String),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Push(#[from] PushError),
    #[error("a thread that read a file has ended")]
    Stopped,
}

impl Uploader {
    /// `hidden` are paths that a person keeps here; one that is shown again is pushed after the next start.
    pub fn new(options: Options, hidden: watch::Receiver<Arc<Hidden>>) -> Uploader {
        Uploader {
            options,
            hidden,
            progress: Progress::default(),
            told: Mutex::default(),
        }
    }

    pub fn view(&self) -> View {
        let stage = self.progress.stage();
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (problem, retry_in) = match &told.trouble {
            Some((problem, at)) => {
                let seconds = at.saturating_duration_since(now).as_secs();
                (Some(problem.clone()), Some(seconds))
            }
            None => (told.count.problem.clone(), None),
        };
        View {
            cache: self.options.url.clone(),
            paths_waiting: told.count.waiting,
            bytes_waiting: told.count.waiting_bytes,
            paths_failed: told.count.failed,
            paths_staying: told.count.staying,
            paths_pushed: stage.paths_done,
            bytes_pushed: stage.nar_bytes_done,
            current: stage.current,
            retry_in,
            problem,
        }
    }

    /// Pushes until it is dropped, which may happen at any moment.
    pub async fn run(&self, store: Arc<dyn LocalStore>) -> Infallible {
        loop {
            let Err(error) = self.work(&store).await;
            warn!(%error, "could not use the upload queue, builds wait in the store");
            self.tell_trouble(error.to_string(), REOPEN);
            tokio::time::sleep(REOPEN).await;
            self.tell_well();
        }
    }

    async fn work(&self, store: &Arc<dyn LocalStore>) -> Result<Infallible, QueueError> {
        let (file, url) = (self.options.file.clone(), self.options.url.clone());
        let open = tokio::task::spawn_blocking(move || Queue::open(&file, &url));
        let queue = open.await.map_err(|_| QueueError::Stopped)??;
        queue.reconsider().await?;
        let (changes, marked) = mpsc::channel(MARKS_MAX);
        let marks = Marks::new(queue.begun(unix_time().0).await?, changes);
        let offered = Notify::new();
        tokio::select! {
            ended = self.follow(store, &queue, &offered) => ended,
            ended = self.drain(store, &queue, &offered, Arc::new(marks)) => ended,
            ended = write_marks(&queue, marked) => ended,
        }
    }

    /// Writes what the store gets into the queue, and takes out what it loses.
    async fn follow(
        &self,
        store: &Arc<dyn LocalStore>,
        queue: &Queue,
        offered: &Notify,
    ) -> Result<Infallible, QueueError> {
        let mut events = store.watch();
        // Those that were there from the beginning, until all have been seen.
        let mut present = Some(BTreeSet::new());
        while let Some(event) = events.recv().await {
            match event {
                StoreEvent::Added(infos) => {
                    let mut entries: Vec<_> = Vec::new();
                    for info in infos {
                        if !self.facts(&info).is_queued() {
                            continue;
                        }
                        if let Some(present) = &mut present {
                            present.insert(info.store_path.hash());
                        }
                        entries.push(Entry {
                            path: info.store_path,
                            nar_size: info.nar_size,
                            registered: info.id,
                        });
                    }
                    if !entries.is_empty() && queue.offer(entries).await? > 0 {
                        offered.notify_one();
                    }
                }
                StoreEvent::Complete => {
                    if let Some(present) = present.take() {
                        queue.retain(present).await?;
                        offered.notify_one();
                    }
                }
                StoreEvent::Removed(hashes) => {
                    queue.remove(hashes).await?;
                    offered.notify_one();
                }
            }
        }
        // The watcher ends with the runtime.
        std::future::pending().await
    }

    /// Pushes what is in the queue, round after round.
    async fn drain(
        &self,
        store: &Arc<dyn LocalStore>,
        queue: &Queue,
        offered: &Notify,
        marks: Arc<Marks>,
    ) -> Result<Infallible, QueueError> {
        let pace = self.options.rate.map(|rate| Arc::new(Pace::new(rate)));
        let mut target = None;
        let mut failures = 0;
        loop {
            self.tell_count(queue.count().await?);
            let mut due = queue.due(unix_time().0).await?;
            due.truncate(order::round(due.iter().map(|due| due.nar_size)));
            if due.is_empty() {
                self.idle(queue, offered).await?;
                continue;
            }
            let mut shown = None;
            let round = async {
                let token = self.token().await?;
                shown = bearer(&token).ok();
                let target = match &target {
                    Some(target) => target,
                    // Kept for its connections.
                    None => target.insert(
                        Target::new(&self.options.url, token.clone(), &self.authorities().await?)?
                            .with_pace(pace.clone())
                            .with_marks(marks.clone())
                            .asking_once(),
                    ),
                };
                let target = target.with_token(token);
                Ok(self.push(store, queue, &target, due).await?)
            };
            // The outer failure is the queue's, the inner one says that nothing can be pushed.
            let trouble: Option<Trouble> = match round.await {
                Ok(trouble) => trouble.map(Trouble::Push),
                Err(Stopped::Queue(error)) => return Err(error),
                Err(Stopped::Trouble(trouble)) => Some(trouble),
            };
            match trouble {
                None => {
                    if failures > 0 {
                        info!("pushing again");
                    }
                    failures = 0;
                    self.tell_well();
                }
                Some(trouble) => {
                    failures += 1;
                    let retry_after = match &trouble {
                        Trouble::Push(error) => error.retry_after(),
                        _ => None,
                    };
                    if let (Trouble::Push(error), Some(credential), Some(shown)) =
                        (&trouble, &self.options.credential, &shown)
                        && error.is_of_token()
                    {
                        credential.refuse(shown);
                    }
                    let pause = order::away_pause(failures, retry_after, chance());
                    let text = chain(&trouble);
                    match failures {
                        1 => warn!(error = text, "could not push, builds wait in the queue"),
                        _ => debug!(error = text, failures, "could not push"),
                    }
                    self.tell_count(queue.count().await?);
                    self.tell_trouble(text, pause);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Pushes one round and writes down what became of it; returns why nothing can be pushed, if so.
    async fn push(
        &self,
        store: &Arc<dyn LocalStore>,
        queue: &Queue,
        target: &Target,
        due: Vec<Due>,
    ) -> Result<Option<PushError>, QueueError> {
        let root = |due: &Due| Root {
            path: due.path.clone(),
            is_asked: due.is_asked,
        };
        let roots = due.iter().map(root).collect();
        let stays = |info: &PathInfo| self.facts(info).stays(self.options.sources);
        let trust = &self.options.trust;
        let mut round = push_round(store, target, roots, &stays, trust, &self.progress).await;
        let mut settled = Vec::new();
        for due in due {
            let outcome = round
                .outcomes
                .iter()
                .position(|(path, _)| *path == due.path);
            let outcome = outcome.map(|position| round.outcomes.swap_remove(position).1);
            let later = |problem: String| {
                let pause = order::path_pause(due.failures.saturating_add(1), chance());
                Settled::Later {
                    not_before: unix_time().0.saturating_add(pause.as_secs()),
                    problem,
                }
            };
            let became = match outcome {
                Some(Outcome::Pushed | Outcome::Present | Outcome::Upstream) => Settled::Done,
                Some(Outcome::Stays(path, reason)) => Settled::Stays(match path == due.path {
                    true => reason.to_string(),
                    false => format!("it references {path}: {reason}"),
                }),
                Some(Outcome::Failed(error)) => {
                    let text = chain(&*error);
                    match error.extent() == Extent::Gone && is_gone(store, &due.path).await {
                        true => Settled::Gone,
                        false => later(text),
                    }
                }
                // It was not its turn.
                None if round.trouble.is_some() => continue,
                None => later("it waits for itself: the Nix database is damaged".to_owned()),
            };
            debug!(path = %due.path, ?became, "settled an upload");
            settled.push((due.path, became));
        }
        queue.settle(settled).await?;
        Ok(round.trouble)
    }

    /// Waits until there may be something to do.
    async fn idle(&self, queue: &Queue, offered: &Notify) -> Result<(), QueueError> {
        let version = queue.version().await?;
        let until = queue.next_due().await?;
        loop {
            tokio::select! {
                () = offered.notified() => return Ok(()),
                () = tokio::time::sleep(POLL) => {}
            }
            let is_due = until.is_some_and(|time| time <= unix_time().0);
            if is_due || queue.version().await? != version {
                return Ok(());
            }
        }
    }

    async fn token(&self) -> Result<zeroize::Zeroizing<String>, Stopped> {
        let problem = self.options.credential.as_ref();
        let problem = problem.and_then(Credential::problem);
        if let Some(problem) = problem.filter(|_| !self.options.token_file.exists()) {
            return Err(Trouble::NoToken(problem).into());
        }
        let file = self.options.token_file.clone();
        let read = tokio::task::spawn_blocking(move || read_token(&file)).await;
        let token = read.map_err(|_| Trouble::Stopped)?;
        Ok(token.map_err(Trouble::from)?)
    }

    async fn authorities(&self) -> Result<Authorities, Stopped> {
        let file = self.options.ca_file.clone();
        let read = tokio::task::spawn_blocking(move || Authorities::read(file.as_deref())).await;
        let authorities = read.map_err(|_| Trouble::Stopped)?;
        Ok(authorities.map_err(Trouble::from)?)
    }

    fn facts(&self, info: &PathInfo) -> Facts {
        let name = info.store_path.name();
        let matches = |expressions: &[Regex]| expressions.iter().any(|one| one.is_match(name));
        Facts {
            is_derivation: info.store_path.is_derivation(),
            is_built_here: info.ultimate,
            is_source: info.ca.is_some() && info.signatures.is_empty() && !info.ultimate,
            is_denied: matches(&self.options.deny),
            is_hidden: self.hidden.borrow().contains(&info.store_path.hash()),
            is_wanted: self.options.filter.is_empty() || matches(&self.options.filter),
        }
    }

    fn tell_count(&self, count: Count) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.count = count;
    }

    fn tell_trouble(&self, problem: String, pause: Duration) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.trouble = Some((problem, Instant::now() + pause));
    }

    fn tell_well(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.trouble = None;
    }
}

/// Why a round was not pushed at all.
enum Stopped {
    Queue(QueueError),
    Trouble(Trouble),
}

impl From<QueueError> for Stopped {
    fn from(error: QueueError) -> Stopped {
        Stopped::Queue(error)
    }
}

impl From<PushError> for Stopped {
    fn from(error: PushError) -> Stopped {
        Stopped::Trouble(error.into())
    }
}

impl From<Trouble> for Stopped {
    fn from(trouble: Trouble) -> Stopped {
        Stopped::Trouble(trouble)
    }
}

/// Writes down which uploads were begun, while they run.
async fn write_marks(
    queue: &Queue,
    mut marked: mpsc::Receiver<(StorePathHash, Option<String>)>,
) -> Result<Infallible, QueueError> {
    while let Some((hash, upload)) = marked.recv().await {
        queue.mark(hash, upload, unix_time().0).await?;
    }
    // Whoever pushes holds the other end.
    std::future::pending().await
}

async fn is_gone(store: &Arc<dyn LocalStore>, path: &StorePath) -> bool {
    matches!(store.path_info(path.hash()).await, Ok(None))
}
