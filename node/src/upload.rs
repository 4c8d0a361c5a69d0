//! Upload: closures from the local store to a cache of an anchor.
//!
//! `granary push` and the node's own [`uploader`] push in the same rounds: find the closures of some
//! paths, ask what is missing, and send the NARs, references first and several at once, compressed
//! while they are read ([`target`]). The uploader takes its paths from a durable [`queue`]; what goes
//! first, what stays here and when to try again is decided in [`order`].
//!
//! Memory: for each upload some chunks of a NAR and a compressor of a few MiB, whatever the NAR's size.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use zeroize::Zeroizing;

use crate::secret::exposed;
use crate::store::{BATCH_MAX, LocalStore, Nar, PathInfo};

pub mod order;
pub mod pace;
pub mod exchange;
pub mod member;
pub mod progress;
pub mod target;
pub mod queue;
pub mod uploader;

use order::Reason;
use progress::Progress;
pub use target::{Extent, PushError, Target};
pub use uploader::{Uploader, View};

/// Uploads at once: enough to hide a round trip for each small path, few enough for a home's uplink.
const UPLOADS_PARALLEL: usize = 6;

/// Paths of the closures of one round: an operating system has some thousands.
const CLOSURE_MAX: usize = 1_000_000;

/// What a push did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// Paths of the closure.
    pub paths: usize,
    /// Left out, because the cache leaves them to an upstream and a key of that one signed them.
    pub upstream: usize,
    /// There already.
    pub present: usize,
    pub pushed: usize,
    /// Of those that were pushed, uncompressed.
    pub nar_bytes: u64,
}

/// A path whose closure is to be pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    pub path: StorePath,
    /// Somebody named it, so that all it references goes along; else what a `Stays` names does not.
    pub is_asked: bool,
}

/// What became of one root.
#[derive(Debug)]
pub enum Outcome {
    Pushed,
    /// The anchor had it.
    Present,
    /// The cache leaves it to an upstream, a key of which signed it.
    Upstream,
    /// It references this path, or is it, which is not to leave this machine.
    Stays(StorePath, Reason),
    Failed(Arc<PushError>),
}

/// What a round came to.
#[derive(Debug, Default)]
pub struct Round {
    pub summary: Summary,
    /// Roots that are missing here were not got to.
    pub outcomes: Vec<(StorePath, Outcome)>,
    /// Why the round ended early.
    pub trouble: Option<PushError>,
}

/// What keeps a path from going along with one that references it.
pub type Stays<'a> = dyn Fn(&PathInfo) -> Option<Reason> + Send + Sync + 'a;

/// Pushes the closures of these paths, each of which somebody named.
///
/// Goes on when one path fails, without those that reference it, and returns the first error.
pub async fn push(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    paths: Vec<StorePath>,
    trust: &TrustedKeys,
    progress: &Progress,
) -> Result<Summary, PushError> {
    let asked = |path| Root {
        path,
        is_asked: true,
    };
    let roots = paths.into_iter().map(asked).collect();
    let round = push_round(store, target, roots, &|_| None, trust, progress).await;
    if let Some(trouble) = round.trouble {
        return Err(trouble);
    }
    for (path, outcome) in round.outcomes {
        if let Outcome::Failed(source) = outcome {
            return Err(PushError::Path { path, source });
        }
    }
    Ok(round.summary)
}

/// Pushes the closures of these roots as far as it can.
///
/// Cancel-safe: what the anchor had published stays, the rest is begun anew.
pub async fn push_round(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    roots: Vec<Root>,
    stays: &Stays<'_>,
    trust: &TrustedKeys,
    progress: &Progress,
) -> Round {
    let mut round = Round::default();
    if let Err(trouble) = advance(store, target, roots, stays, trust, progress, &mut round).await {
        round.trouble = Some(trouble);
    }
    round
}

async fn advance(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    roots: Vec<Root>,
    stays: &Stays<'_>,
    trust: &TrustedKeys,
    progress: &Progress,
    round: &mut Round,
) -> Result<(), PushError> {
    let upstream_keys = target.upstream_keys().await?;
    let mut known = BTreeMap::new();
    let mut closures = Vec::new();
    for root in roots {
        // A closure in memory takes no time of anybody's, but thousands of them would.
        tokio::task::yield_now().await;
        let members = match closure(store, &root.path, &mut known).await {
            Ok(members) => members,
            Err(error) if error.extent() == Extent::Everything => return Err(error),
            Err(error) => {
                let outcome = Outcome::Failed(Arc::new(error));
                round.outcomes.push((root.path, outcome));
                continue;
            }
        };
        let mut infos = members.iter().filter_map(|hash| known.get(hash));
        let hindrance = match root.is_asked {
            true => None,
            false => infos.find_map(|info| Some((info.store_path.clone(), stays(info)?))),
        };
        match hindrance {
            Some((path, reason)) => {
                let outcome = Outcome::Stays(path, reason);
                round.outcomes.push((root.path, outcome));
            }
            None => closures.push((root.path, members)),
        }
    }
    let hashes: BTreeSet<StorePathHash> = closures
        .iter()
        .flat_map(|(_, members)| members)
        .copied()
        .collect();
    let hashes: Vec<_> = hashes.into_iter().collect();
    round.summary.paths = hashes.len();
    let missing = target.missing(&hashes).await?;
    round.summary.present = hashes.len() - missing.len();
    let mut wanted = BTreeMap::new();
    let mut upstream = BTreeSet::new();
    for hash in missing {
        let Some(info) = known.remove(&hash) else {
            let problem = format!("it misses {hash}, which it was not asked for");
            return Err(PushError::Answer { problem });
        };
        if is_upstream(&info, store.dir(), trust, &upstream_keys) {
            upstream.insert(hash);
        } else {
            wanted.insert(hash, info);
        }
    }
    round.summary.upstream = upstream.len();
    let roots: Vec<StorePath> = closures.into_iter().map(|(path, _)| path).collect();
    let _held = hold(store, &roots, &wanted).await;
    let bytes = wanted.values().map(|info| info.nar_size).sum();
    progress.plan(wanted.len() as u64, bytes);
    let mut sent = send_all(store, target, &wanted, progress).await;
    round.summary.pushed = sent.done.len();
    round.summary.nar_bytes = sent.nar_bytes;
    for path in roots {
        let hash = path.hash();
        let outcome = if upstream.contains(&hash) {
            Outcome::Upstream
        } else if !wanted.contains_key(&hash) {
            Outcome::Present
        } else if sent.done.contains(&hash) {
            Outcome::Pushed
        } else if let Some(error) = sent.failed.remove(&hash) {
            Outcome::Failed(error)
        } else {
            continue;
        };
        round.outcomes.push((path, outcome));
    }
    sent.trouble.map_or(Ok(()), Err)
}

/// Whether a key of this name really signed the path: the name alone says nothing.
fn is_upstream(info: &PathInfo, dir: &StoreDir, trust: &TrustedKeys, names: &[String]) -> bool {
    let named: TrustedKeys = trust
        .iter()
        .filter(|key| names.iter().any(|name| name == key.name().as_str()))
        .cloned()
        .collect();
    let fingerprint = info.to_narinfo().fingerprint(dir);
    named
        .verify(fingerprint.as_bytes(), &info.signatures)
        .is_some()
}

/// Keeps the paths, and so all that they reference, from being collected until the result is dropped.
///
/// As many as a round of the queue has: whoever names more by hand has roots of theirs. What cannot be
/// held is found out when it is sent.
async fn hold(
    store: &Arc<dyn LocalStore>,
    roots: &[StorePath],
    wanted: &BTreeMap<StorePathHash, PathInfo>,
) -> Vec<Nar> {
    let mut held = Vec::new();
    let infos = roots.iter().filter_map(|path| wanted.get(&path.hash()));
    for info in infos.take(order::ROUND_MAX) {
        match store.nar(info).await {
            Ok(nar) => held.extend(nar),
            Err(error) => {
                tracing::debug!(path = %info.store_path, %error, "could not hold a path");
            }
        }
    }
    held
}

/// Finds everything that a path references, itself included; adds to `known` what was not there.
async fn closure(
    store: &Arc<dyn LocalStore>,
    root: &StorePath,
    known: &mut BTreeMap<StorePathHash, PathInfo>,
) -> Result<BTreeSet<StorePathHash>, PushError> {
    let mut members = BTreeSet::new();
    let mut waiting = BTreeMap::from([(root.hash(), root.clone())]);
    while !waiting.is_empty() {
        let unknown = |path: &&StorePath| !known.contains_key(&path.hash());
        let batch: Vec<_> = waiting.values().filter(unknown).take(BATCH_MAX).collect();
        let hashes = batch.iter().map(|path| path.hash()).collect();
        let infos = match batch.is_empty() {
            true => Vec::new(),
            false => store.path_infos(hashes).await?,
        };
        for (path, info) in batch.into_iter().zip(infos) {
            let info = info.filter(|info| info.store_path == *path);
            let info = info.ok_or_else(|| PushError::NotHere {
                path: store.dir().display(path),
            })?;
            known.insert(path.hash(), info);
        }
        if known.len() > CLOSURE_MAX {
            return Err(PushError::TooLarge { max: CLOSURE_MAX });
        }
        let mut next = BTreeMap::new();
        for (hash, path) in waiting {
            let Some(info) = known.get(&hash) else {
                next.insert(hash, path);
                continue;
            };
            members.insert(hash);
            for reference in &info.references {
                if !members.contains(&reference.hash()) {
                    next.insert(reference.hash(), reference.clone());
                }
            }
        }
        next.retain(|hash, _| !members.contains(hash));
        waiting = next;
    }
    Ok(members)
}

/// How far [`send_all`] came.
#[derive(Default)]
struct Sent {
    done: BTreeSet<StorePathHash>,
    nar_bytes: u64,
    /// Those that failed, and those that reference them.
    failed: BTreeMap<StorePathHash, Arc<PushError>>,
    /// Why it stopped.
    trouble: Option<PushError>,
}

/// Sends the paths, each when those of its references that are sent too have been published.
async fn send_all(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    wanted: &BTreeMap<StorePathHash, PathInfo>,
    progress: &Progress,
) -> Sent {
    let mut blocked: BTreeMap<StorePathHash, usize> = BTreeMap::new();
    let mut referrers: BTreeMap<StorePathHash, Vec<StorePathHash>> = BTreeMap::new();
    for (hash, info) in wanted {
        let references = info.references.iter().map(StorePath::hash);
        let references: Vec<_> = references
            .filter(|reference| reference != hash && wanted.contains_key(reference))
            .collect();
        blocked.insert(*hash, references.len());
        for reference in references {
            referrers.entry(reference).or_default().push(*hash);
        }
    }
    let is_free = |(hash, count): (&StorePathHash, &usize)| (*count == 0).then_some(*hash);
    let mut ready: Vec<_> = blocked.iter().filter_map(is_free).collect();
    let mut running = FuturesUnordered::new();
    let mut sent = Sent::default();
    loop {
        while sent.trouble.is_none()
            && running.len() < UPLOADS_PARALLEL
            && let Some(info) = ready.pop().and_then(|hash| wanted.get(&hash))
        {
            running.push(async move { (info, target.send_path(store, info, progress).await) });
        }
        let Some((info, outcome)) = running.next().await else {
            return sent;
        };
        let hash = info.store_path.hash();
        match outcome {
            Ok(()) => {
                sent.done.insert(hash);
                sent.nar_bytes += info.nar_size;
                for referrer in referrers.remove(&hash).unwrap_or_default() {
                    if let Some(count) = blocked.get_mut(&referrer) {
                        *count -= 1;
                        if *count == 0 {
                            ready.push(referrer);
                        }
                    }
                }
            }
            Err(error) => {
                let path = info.store_path.clone();
                tracing::debug!(%path, %error, "could not push a path");
                let source = Arc::new(error);
                if source.extent() == Extent::Everything {
                    sent.trouble.get_or_insert(PushError::Path { path, source });
                } else {
                    fail(hash, &path, source, &referrers, &mut sent.failed);
                }
            }
        }
    }
}

/// Writes down a failure for a path and for all that cannot be published without it.
fn fail(
    hash: StorePathHash,
    path: &StorePath,
    error: Arc<PushError>,
    referrers: &BTreeMap<StorePathHash, Vec<StorePathHash>>,
    failed: &mut BTreeMap<StorePathHash, Arc<PushError>>,
) {
    let blocking = Arc::new(PushError::Path {
        path: path.clone(),
        source: error.clone(),
    });
    let mut waiting = referrers.get(&hash).cloned().unwrap_or_default();
    failed.insert(hash, error);
    while let Some(referrer) = waiting.pop() {
        if let Entry::Vacant(place) = failed.entry(referrer) {
            place.insert(blocking.clone());
            waiting.extend(referrers.get(&referrer).into_iter().flatten());
        }
    }
}

/// Reads a token from its file.
///
/// # Errors
/// When others may read it, as for every secret that is no credential of systemd.
pub fn read_token(path: &PathBuf) -> Result<Zeroizing<String>, TokenFileError> {
    let read = |source| TokenFileError::Read {
        path: path.clone(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(read)?;
    if let Some(mode) = exposed(path, &metadata) {
        return Err(TokenFileError::Exposed {
            path: path.clone(),
            mode,
        });
    }
    if metadata.len() > granary_protocol::token::TOKEN_BYTES_MAX as u64 {
        return Err(TokenFileError::TooLong { path: path.clone() });
    }
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(read)?);
    Ok(Zeroizing::new(text.trim().to_owned()))
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    #[error("cannot read the token {path}: {source}", path = .path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the token {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod 0600 {path}", path = .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{path} is too long for a token", path = .path.display())]
    TooLong { path: PathBuf },
}
