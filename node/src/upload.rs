//! Upload: closures from the local store to a cache of an anchor.
//!
//! The anchor's side, and what is said between the two, is `anchor/uploads.rs`. A push asks what is
//! missing, then sends the NARs, references first and several at once, compressed while they are
//! read. A break is waited out and the NAR goes on at the byte that the anchor has.
//!
//! Memory: for each upload some chunks of a NAR and a compressor of a few MiB, whatever the NAR's size.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use granary_protocol::narinfo::NarInfo;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::{StorePath, StorePathHash};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::store::{BATCH_MAX, LocalStore, NarError, PathInfo, StoreError};

/// Uploads at once: enough to hide a round trip for each small path, few enough for a home's uplink.
const UPLOADS_PARALLEL: usize = 6;

/// zstd's level on the wire: 500 MiB/s a core, so a gigabit line is the limit and not the processor.
const LEVEL: i32 = 1;

/// Bytes of a NAR that are compressed at once, so that the next of them are read meanwhile.
const PIECE_BYTES: usize = 1024 * 1024;

/// Raw bytes in one request. Proxies commonly refuse bodies beyond 100 MB, and a request that ends soon
/// shows soon that the line is dead.
const PART_BYTES: u64 = 64 * 1024 * 1024;

/// Hashes in one question; what the anchor answers at once.
const QUESTION_MAX: usize = 10_000;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the anchor may say nothing, from the first byte of a part on. It stores the whole NAR before
/// its last answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// Breaks in a row, none of which brought the upload forward, before it is given up.
const ATTEMPTS_MAX: u32 = 6;

/// Pause after the first break; doubled after each, up to the maximum.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// Longest answer read.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Paths of one closure: an operating system has some thousands.
const CLOSURE_MAX: usize = 1_000_000;

/// A cache of an anchor, and the right to push to it.
#[derive(Clone)]
pub struct Target {
    client: reqwest::Client,
    /// Ends in `/api/v1/caches/<cache>/`.
    base: Url,
    /// Ends in `/_api/v1/cache-config/<cache>`.
    config: Url,
    token: Arc<Zeroizing<String>>,
}

/// Why something was not pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("{url} is no address of a cache, expected http://host:port/cache")]
    Address { url: String },
    #[error("cannot set up a client: {source}")]
    Client { source: reqwest::Error },
    #[error("{path} is not in the local store")]
    NotHere { path: String },
    #[error("{path} was collected while it was pushed")]
    Collected { path: StorePath },
    #[error("the closure has more than {CLOSURE_MAX} paths")]
    TooLarge,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot reach the anchor")]
    Unreachable { source: reqwest::Error },
    #[error("the anchor refused: {error}: {message}")]
    Refused {
        status: StatusCode,
        error: String,
        message: String,
    },
    #[error("the anchor's answer makes no sense: {problem}")]
    Answer { problem: String },
    #[error("cannot push {path}")]
    Path {
        path: StorePath,
        source: Box<PushError>,
    },
}

impl PushError {
    /// Whether the same may work a moment later.
    fn is_transient(&self) -> bool {
        match self {
            PushError::Unreachable { .. } => true,
            PushError::Refused { status, error, .. } => {
                // The last request may not have noticed yet that its connection broke.
                status.is_server_error() || error == "UploadBusy" || error == "OtherOffset"
            }
            _ => false,
        }
    }
}

/// What a push is about to do, or did.
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

/// Tells how far a push has come: paths done, paths to do, NAR bytes done.
pub type Progress = Box<dyn Fn(usize, usize, u64) + Send + Sync>;

#[derive(Deserialize)]
struct Refusal {
    error: String,
    message: String,
}

#[derive(Deserialize)]
struct Missing {
    missing: Vec<String>,
}

#[derive(Deserialize)]
struct CacheConfig {
    #[serde(default)]
    upstream_cache_key_names: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct State {
    id: Option<String>,
    offset: Option<u64>,
    published: Option<String>,
}

impl Target {
    /// Reads the address of a cache: `http://host:port/cache`, or below a path of a proxy.
    pub fn new(url: &str, token: Zeroizing<String>) -> Result<Target, PushError> {
        let address = || PushError::Address {
            url: url.to_owned(),
        };
        let cache_url = Url::parse(url.trim_end_matches('/')).map_err(|_| address())?;
        let is_web = matches!(cache_url.scheme(), "http" | "https") && cache_url.has_host();
        let (root, cache) = cache_url.path().rsplit_once('/').ok_or_else(address)?;
        if !is_web || cache.is_empty() || cache_url.query().is_some() {
            return Err(address());
        }
        let below = |path: String| {
            let mut url = cache_url.clone();
            url.set_path(&path);
            url
        };
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(ANSWER_TIMEOUT)
            .user_agent(concat!("granary/", env!("CARGO_PKG_VERSION")))
            // A redirect would send the token elsewhere, and a body cannot be sent twice.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|source| PushError::Client { source })?;
        Ok(Target {
            client,
            base: below(format!("{root}/api/v1/caches/{cache}/")),
            config: below(format!("{root}/_api/v1/cache-config/{cache}")),
            token: Arc::new(token),
        })
    }

    fn url(&self, rest: &str) -> Result<Url, PushError> {
        self.base.join(rest).map_err(|error| PushError::Answer {
            problem: error.to_string(),
        })
    }

    async fn send<T: serde::de::DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<T, PushError> {
        let request = request.bearer_auth(self.token.as_str());
        let unreachable = |source| PushError::Unreachable { source };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let mut body = Vec::new();
        let mut pieces = response.bytes_stream();
        while let Some(piece) = pieces.next().await {
            body.extend_from_slice(&piece.map_err(unreachable)?);
            if body.len() > ANSWER_BYTES_MAX {
                let problem = format!("it has more than {ANSWER_BYTES_MAX} bytes");
                return Err(PushError::Answer { problem });
            }
        }
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| PushError::Answer {
                problem: error.to_string(),
            });
        }
        let refusal = serde_json::from_slice(&body).unwrap_or(Refusal {
            error: status.to_string(),
            message: "no reason was given".to_owned(),
        });
        Err(PushError::Refused {
            status,
            error: refusal.error,
            message: refusal.message,
        })
    }

    /// Returns those of the paths that the cache does not hold.
    async fn missing(
        &self,
        hashes: &[StorePathHash],
    ) -> Result<BTreeSet<StorePathHash>, PushError> {
        let mut missing = BTreeSet::new();
        for hashes in hashes.chunks(QUESTION_MAX) {
            let hashes: Vec<String> = hashes.iter().map(ToString::to_string).collect();
            let question = serde_json::json!({ "hashes": hashes }).to_string();
            let answer: Missing = retrying(async || {
                let request = self.client.post(self.url("missing")?);
                self.send(request.body(question.clone())).await
            })
            .await?;
            for hash in answer.missing {
                missing.insert(hash.parse().map_err(|_| PushError::Answer {
                    problem: format!("{hash:?} is no hash of a store path"),
                })?);
            }
        }
        Ok(missing)
    }
}

/// Repeats what may work a moment later.
async fn retrying<T>(attempt: impl AsyncFn() -> Result<T, PushError>) -> Result<T, PushError> {
    let mut failures = 0;
    loop {
        match attempt().await {
            Err(error) if error.is_transient() && failures + 1 < ATTEMPTS_MAX => {
                tracing::debug!(%error, "a request to the anchor failed, trying again");
                failures += 1;
                pause(failures).await;
            }
            outcome => return outcome,
        }
    }
}

async fn pause(failures: u32) {
    let doubled = PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    tokio::time::sleep(doubled.min(PAUSE_MAX)).await;
}

/// Pushes the closures of these paths.
///
/// Goes on when one path fails, without those that reference it, and returns the first error.
pub async fn push(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    roots: Vec<StorePath>,
    trust: &TrustedKeys,
    progress: Progress,
) -> Result<Summary, PushError> {
    let closure = closure(store, roots).await?;
    let mut summary = Summary {
        paths: closure.len(),
        ..Summary::default()
    };
    let config: CacheConfig =
        retrying(async || target.send(target.client.get(target.config.clone())).await).await?;
    let hashes: Vec<_> = closure.keys().copied().collect();
    let missing = target.missing(&hashes).await?;
    summary.present = closure.len() - missing.len();
    let mut wanted = BTreeMap::new();
    for (hash, info) in closure {
        if !missing.contains(&hash) {
            continue;
        }
        if is_upstream(&info, store.dir(), trust, &config.upstream_cache_key_names) {
            summary.upstream += 1;
        } else {
            wanted.insert(hash, info);
        }
    }
    send_all(store, target, wanted, &mut summary, progress).await?;
    Ok(summary)
}

/// Whether a key of this name really signed the path: the name alone says nothing.
fn is_upstream(
    info: &PathInfo,
    dir: &granary_protocol::store_path::StoreDir,
    trust: &TrustedKeys,
    names: &[String],
) -> bool {
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

/// Finds everything that the paths reference.
async fn closure(
    store: &Arc<dyn LocalStore>,
    roots: Vec<StorePath>,
) -> Result<BTreeMap<StorePathHash, PathInfo>, PushError> {
    let mut found = BTreeMap::new();
    let mut waiting: BTreeMap<StorePathHash, StorePath> =
        roots.into_iter().map(|path| (path.hash(), path)).collect();
    while !waiting.is_empty() {
        let batch: Vec<_> = waiting.values().take(BATCH_MAX).cloned().collect();
        let hashes = batch.iter().map(StorePath::hash).collect();
        let infos = store.path_infos(hashes).await?;
        for (path, info) in batch.into_iter().zip(infos) {
            waiting.remove(&path.hash());
            let info = info.filter(|info| info.store_path == path);
            let info = info.ok_or_else(|| PushError::NotHere {
                path: store.dir().display(&path),
            })?;
            for reference in &info.references {
                if !found.contains_key(&reference.hash()) && *reference != path {
                    waiting.insert(reference.hash(), reference.clone());
                }
            }
            found.insert(path.hash(), info);
            if found.len() > CLOSURE_MAX {
                return Err(PushError::TooLarge);
            }
        }
        waiting.retain(|hash, _| !found.contains_key(hash));
    }
    Ok(found)
}

/// Sends the paths, each when those of its references that are sent too have been published.
async fn send_all(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    wanted: BTreeMap<StorePathHash, PathInfo>,
    summary: &mut Summary,
    progress: Progress,
) -> Result<(), PushError> {
    let total = wanted.len();
    let mut blocked: BTreeMap<StorePathHash, usize> = BTreeMap::new();
    let mut referrers: BTreeMap<StorePathHash, Vec<StorePathHash>> = BTreeMap::new();
    for (hash, info) in &wanted {
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
    let mut first_error = None;
    loop {
        while running.len() < UPLOADS_PARALLEL
            && let Some(info) = ready.pop().and_then(|hash| wanted.get(&hash))
        {
            running.push(async move { (info, send(store, target, info).await) });
        }
        let Some((info, outcome)) = running.next().await else {
            break;
        };
        match outcome {
            Ok(()) => {
                summary.pushed += 1;
                summary.nar_bytes += info.nar_size;
                progress(summary.pushed, total, summary.nar_bytes);
                for referrer in referrers
                    .remove(&info.store_path.hash())
                    .unwrap_or_default()
                {
                    if let Some(count) = blocked.get_mut(&referrer) {
                        *count -= 1;
                        if *count == 0 {
                            ready.push(referrer);
                        }
                    }
                }
            }
            Err(source) => {
                let path = info.store_path.clone();
                tracing::warn!(%path, error = %source, "could not push a path");
                let source = Box::new(source);
                first_error.get_or_insert(PushError::Path { path, source });
            }
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Sends one path, as often as it takes.
async fn send(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    info: &PathInfo,
) -> Result<(), PushError> {
    let mut failures = 0;
    let mut progress = (None::<String>, 0u64);
    loop {
        let before = progress.1;
        let error = match attempt(store, target, info, &mut progress).await {
            Ok(true) => return Ok(()),
            Ok(false) => continue,
            Err(error) => error,
        };
        if progress.1 > before {
            failures = 0;
        }
        failures += 1;
        let is_forgotten =
            matches!(&error, PushError::Refused { error, .. } if error == "NoSuchUpload");
        if is_forgotten {
            progress = (None, 0);
        }
        if failures >= ATTEMPTS_MAX || !(is_forgotten || error.is_transient()) {
            return Err(error);
        }
        tracing::debug!(path = %info.store_path, %error, offset = progress.1, "an upload broke, going on");
        pause(failures).await;
    }
}

/// Begins an upload, or sends the next part of one; returns whether it is complete.
///
/// `progress` has its id and the offset that the anchor told last.
async fn attempt(
    store: &Arc<dyn LocalStore>,
    target: &Target,
    info: &PathInfo,
    progress: &mut (Option<String>, u64),
) -> Result<bool, PushError> {
    let id = match &progress.0 {
        Some(id) => {
            let url = target.url(&format!("uploads/{id}"))?;
            let state: State = target.send(target.client.get(url)).await?;
            progress.1 = state.offset.unwrap_or(0);
            id.clone()
        }
        None => {
            let narinfo: NarInfo = info.to_narinfo();
            let text = narinfo.to_text(store.dir());
            let request = target.client.post(target.url("uploads")?);
            let begin = serde_json::json!({ "narinfo": text }).to_string();
            let state: State = target.send(request.body(begin)).await?;
            if state.published.is_some() {
                return Ok(true);
            }
            let id = state.id.ok_or_else(|| PushError::Answer {
                problem: "an upload without an id".to_owned(),
            })?;
            *progress = (Some(id.clone()), 0);
            id
        }
    };
    let nar = store.nar(info).await?.ok_or_else(|| PushError::Collected {
        path: info.store_path.clone(),
    })?;
    let offset = progress.1;
    let end = info.nar_size.min(offset.saturating_add(PART_BYTES));
    let body = compressed(nar.stream(offset..end));
    let url = target.url(&format!("uploads/{id}?offset={offset}"))?;
    let request = target
        .client
        .put(url)
        .header("content-type", "application/zstd");
    let request = request.body(reqwest::Body::wrap_stream(body));
    let state: State = target.send(request).await?;
    if state.published.is_some() {
        return Ok(true);
    }
    progress.1 = state.offset.unwrap_or(0);
    match progress.1 == end {
        true => Ok(false),
        false => Err(PushError::Answer {
            problem: format!("it took {} bytes, {end} were sent", progress.1),
        }),
    }
}

/// Why the body of an upload ended early.
#[derive(Debug, thiserror::Error)]
enum BodyError {
    #[error(transparent)]
    Nar(#[from] NarError),
    #[error("cannot compress: {0}")]
    Compress(std::io::Error),
    #[error("the compressing thread has stopped")]
    Stopped,
}

type Encoder = zstd::stream::write::Encoder<'static, Vec<u8>>;

/// Compresses a NAR as it is read, on blocking threads.
fn compressed(
    nar: impl Stream<Item = Result<Bytes, NarError>> + Send + Unpin + 'static,
) -> impl Stream<Item = Result<Bytes, BodyError>> + Send + 'static {
    futures::stream::try_unfold(
        (nar, None::<Encoder>, false),
        |(mut nar, encoder, is_over)| async move {
            if is_over {
                return Ok(None);
            }
            let mut pieces = Vec::new();
            let mut bytes = 0;
            let mut is_over = false;
            while bytes < PIECE_BYTES {
                match nar.next().await {
                    Some(piece) => {
                        let piece = piece?;
                        bytes += piece.len();
                        pieces.push(piece);
                    }
                    None => {
                        is_over = true;
                        break;
                    }
                }
            }
            let work = tokio::task::spawn_blocking(move || compress(encoder, &pieces, is_over));
            let (output, encoder) = work
                .await
                .map_err(|_| BodyError::Stopped)?
                .map_err(BodyError::Compress)?;
            Ok(Some((Bytes::from(output), (nar, encoder, is_over))))
        },
    )
}

fn compress(
    encoder: Option<Encoder>,
    pieces: &[Bytes],
    is_last: bool,
) -> std::io::Result<(Vec<u8>, Option<Encoder>)> {
    let mut encoder = match encoder {
        Some(encoder) => encoder,
        None => Encoder::new(Vec::new(), LEVEL)?,
    };
    for piece in pieces {
        encoder.write_all(piece)?;
    }
    if is_last {
        return Ok((encoder.finish()?, None));
    }
    // What is compressed is of use at once: should the line break, it has been taken.
    encoder.flush()?;
    let output = std::mem::take(encoder.get_mut());
    Ok((output, Some(encoder)))
}

/// Reads a token from its file.
///
/// # Errors
/// When others may read it, as for every secret.
pub fn read_token(path: &PathBuf) -> Result<Zeroizing<String>, TokenFileError> {
    use std::os::unix::fs::PermissionsExt;
    let read = |source| TokenFileError::Read {
        path: path.clone(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(read)?;
    let mode = metadata.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(TokenFileError::Exposed {
            path: path.clone(),
            mode: mode & 0o7777,
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
