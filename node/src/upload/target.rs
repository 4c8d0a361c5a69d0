//! Target: a cache of an anchor that is pushed to, and one path on its way there.
//!
//! What is said is described in `anchor/uploads.rs`. A path is sent in parts, each a request; a break
//! is waited out, and the NAR goes on at the byte that the anchor has. Every failure is put into one
//! of three [`Extent`]s, which is all that those who decide about retries look at.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use granary_protocol::hash::NarHasher;
use granary_protocol::narinfo::NarInfo;
use granary_protocol::nix32;
use granary_protocol::store_path::{StorePath, StorePathHash};
use reqwest::header::RETRY_AFTER;
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use super::order;
use super::pace::{self, Pace};
use super::progress::{Meter, Progress};
use crate::authority::{self, Authorities};
use crate::store::{LocalStore, NarError, PathInfo, StoreError};

/// zstd's level on the wire: 500 MiB/s a core, so a gigabit line is the limit and not the processor.
const LEVEL: i32 = 1;

/// Bytes of a NAR that are compressed at once, so that the next of them are read meanwhile.
const PIECE_BYTES: usize = 1024 * 1024;

/// Raw bytes in one request. Proxies commonly refuse bodies beyond 100 MB, and a request that ends soon
/// shows soon that the line is dead.
const PART_BYTES: u64 = 64 * 1024 * 1024;

/// How long a part may take at the rate that is allowed, and how small one gets at most.
const PART_TIME: Duration = Duration::from_secs(60);
const PART_BYTES_MIN: u64 = 1024 * 1024;

/// Hashes in one question; what the anchor answers at once.
const QUESTION_MAX: usize = 10_000;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the anchor may say nothing, from the first byte of a part on. It stores the whole NAR before
/// its last answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// Breaks in a row, none of which brought the upload forward, before it is given up.
const ATTEMPTS_MAX: u32 = 6;

/// How long a path waits for somebody else's upload of the same NAR before it is sent all the same: that may be over
/// a slow line.
const OTHERS_WAIT: Duration = Duration::from_secs(600);

/// Longest answer read.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// NARs below this are begun anew by another process; what is sent twice then is sent within seconds.
const MARKED_BYTES_MIN: u64 = 8 * 1024 * 1024;

/// Large uploads that were begun and are not complete, so that another process can go on with them.
pub struct Marks {
    known: Mutex<BTreeMap<StorePathHash, String>>,
    /// What is to be written down: the id of an upload that began, or that it is over.
    changes: mpsc::Sender<(StorePathHash, Option<String>)>,
}

impl Marks {
    pub fn new(
        known: BTreeMap<StorePathHash, String>,
        changes: mpsc::Sender<(StorePathHash, Option<String>)>,
    ) -> Marks {
        Marks {
            known: Mutex::new(known),
            changes,
        }
    }

    fn take(&self, hash: &StorePathHash) -> Option<String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(hash)
    }

    /// A mark that finds no room is not written: then the NAR is begun anew, should it come to that.
    fn change(&self, hash: StorePathHash, upload: Option<&str>) {
        let _ = self.changes.try_send((hash, upload.map(str::to_owned)));
    }
}

/// A cache of an anchor, and the right to push to it.
#[derive(Clone)]
pub struct Target {
    client: reqwest::Client,
    /// Ends in `/api/v1/caches/<cache>/`.
    base: Url,
    /// Ends in `/_api/v1/cache-config/<cache>`.
    config: Url,
    /// Replaced while it is in use, for all who have this target.
    token: Arc<Mutex<Arc<Zeroizing<String>>>>,
    pace: Option<Arc<Pace>>,
    marks: Option<Arc<Marks>>,
    /// How often a question is asked.
    attempts: u32,
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
    #[error("the closure has more than {max} paths")]
    TooLarge { max: usize },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot reach the anchor")]
    Unreachable { source: reqwest::Error },
    #[error(
        "{address} speaks HTTP without TLS\nhint: write http:// for https:// in the address of the cache"
    )]
    NoTls { address: String },
    #[error("cannot read what is to be sent: {source}")]
    Read { source: BodyError },
    #[error("the anchor refused: {error}: {message}")]
    Refused {
        status: StatusCode,
        error: String,
        message: String,
        /// What the anchor asks to wait.
        retry_after: Option<Duration>,
    },
    #[error("the anchor's answer makes no sense: {problem}")]
    Answer { problem: String },
    #[error("cannot push {path}")]
    Path {
        path: StorePath,
        source: Arc<PushError>,
    },
}

/// How far a failure reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Nothing can be pushed: the anchor is away, or refuses us.
    Everything,
    /// This path, and those that reference it.
    Path,
    /// The path is not in the store any more.
    Gone,
}

impl PushError {
    /// Whether the same may work a moment later.
    fn is_transient(&self) -> bool {
        match self {
            PushError::Unreachable { .. } => true,
            PushError::Refused { status, error, .. } => {
                // The last request may not have noticed yet that its connection broke.
                status.is_server_error()
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || error == "UploadBusy"
                    || error == "OtherOffset"
            }
            _ => false,
        }
    }

    /// Whether somebody else is sending the NAR, which needs not be sent after that.
    fn is_underway(&self) -> bool {
        matches!(self, PushError::Refused { error, .. } if error == "NarUnderway")
    }

    pub fn extent(&self) -> Extent {
        match self {
            PushError::Path { source, .. } => source.extent(),
            PushError::NotHere { .. } | PushError::Collected { .. } => Extent::Gone,
            PushError::Store(
                StoreError::Corrupt { .. }
                | StoreError::Layout { .. }
                | StoreError::Special { .. }
                | StoreError::Row { .. },
            )
            | PushError::Read { .. }
            | PushError::TooLarge { .. } => Extent::Path,
            PushError::Refused { status, error, .. } => {
                let is_about_us = status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS
                            | StatusCode::UNAUTHORIZED
                            | StatusCode::FORBIDDEN
                            | StatusCode::REQUEST_TIMEOUT
                    )
                    || matches!(
                        error.as_str(),
                        "NoSuchCache" | "NoSigningKey" | "NotFound" | "QuotaExceeded"
                    );
                match is_about_us {
                    true => Extent::Everything,
                    false => Extent::Path,
                }
            }
            PushError::Address { .. }
            | PushError::Client { .. }
            | PushError::Store(_)
            | PushError::Unreachable { .. }
            | PushError::NoTls { .. }
            | PushError::Answer { .. } => Extent::Everything,
        }
    }

    /// Whether the anchor does not take the token.
    pub fn is_of_token(&self) -> bool {
        match self {
            PushError::Refused { status, .. } => *status == StatusCode::UNAUTHORIZED,
            PushError::Path { source, .. } => source.is_of_token(),
            _ => false,
        }
    }

    /// What the anchor asks to wait, if it does.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            PushError::Refused { retry_after, .. } => *retry_after,
            PushError::Path { source, .. } => source.retry_after(),
            _ => None,
        }
    }
}

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
    challenge: Option<String>,
    published: Option<String>,
}

impl Target {
    /// Reads the address of a cache: `http://host:port/cache`, or below a path of a proxy.
    pub fn new(
        url: &str,
        token: Zeroizing<String>,
        authorities: &Authorities,
    ) -> Result<Target, PushError> {
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
        let client = authorities.client(|| {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(ANSWER_TIMEOUT)
                .user_agent(concat!("granary/", env!("CARGO_PKG_VERSION")))
                // A redirect would send the token elsewhere, and a body cannot be sent twice.
                .redirect(reqwest::redirect::Policy::none())
        });
        let client = client.map_err(|source| PushError::Client { source })?;
        Ok(Target {
            client,
            base: below(format!("{root}/api/v1/caches/{cache}/")),
            config: below(format!("{root}/_api/v1/cache-config/{cache}")),
            token: Arc::new(Mutex::new(Arc::new(token))),
            pace: None,
            marks: None,
            attempts: ATTEMPTS_MAX,
        })
    }

    /// The same with another token.
    pub fn with_token(&self, token: Zeroizing<String>) -> Target {
        Target {
            token: Arc::new(Mutex::new(Arc::new(token))),
            ..self.clone()
        }
    }

    /// Sends what begins from here on with this token, here and wherever this target was cloned to.
    pub fn renew(&self, token: Zeroizing<String>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(token);
    }

    fn token(&self) -> Arc<Zeroizing<String>> {
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        token.clone()
    }

    /// The same within a limit on what leaves.
    pub fn with_pace(self, pace: Option<Arc<Pace>>) -> Target {
        Target { pace, ..self }
    }

    /// The same, which goes on with large uploads that another process began.
    pub fn with_marks(self, marks: Arc<Marks>) -> Target {
        Target {
            marks: Some(marks),
            ..self
        }
    }

    /// The same, whose questions are asked once: for those who come back later by themselves.
    pub fn asking_once(self) -> Target {
        Target {
            attempts: 1,
            ..self
        }
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
        let request = request.bearer_auth(self.token().as_str());
        let unreachable = |source| match authority::speaks_no_tls(&source) {
            true => PushError::NoTls {
                address: self.base.origin().ascii_serialization(),
            },
            false => PushError::Unreachable { source },
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let retry_after = response.headers().get(RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()?.parse().ok());
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
            retry_after: retry_after.map(Duration::from_secs),
        })
    }

    /// Returns the names of the keys whose paths the cache leaves to their upstream.
    pub(super) async fn upstream_keys(&self) -> Result<Vec<String>, PushError> {
        let config: CacheConfig = self
            .retrying(|| self.send(self.client.get(self.config.clone())))
            .await?;
        Ok(config.upstream_cache_key_names)
    }

    /// Returns those of the paths that the cache does not hold.
    pub(super) async fn missing(
        &self,
        hashes: &[StorePathHash],
    ) -> Result<BTreeSet<StorePathHash>, PushError> {
        let mut missing = BTreeSet::new();
        for hashes in hashes.chunks(QUESTION_MAX) {
            let hashes: Vec<String> = hashes.iter().map(ToString::to_string).collect();
            let question = serde_json::json!({ "hashes": hashes }).to_string();
            let url = self.url("missing")?;
            let ask = || self.send(self.client.post(url.clone()).body(question.clone()));
            let answer: Missing = self.retrying(ask).await?;
            for hash in answer.missing {
                missing.insert(hash.parse().map_err(|_| PushError::Answer {
                    problem: format!("{hash:?} is no hash of a store path"),
                })?);
            }
        }
        Ok(missing)
    }

    /// Repeats what may work a moment later.
    async fn retrying<T, F: Future<Output = Result<T, PushError>>>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, PushError> {
        let mut failures = 0;
        loop {
            match attempt().await {
                Err(error) if error.is_transient() && failures + 1 < self.attempts => {
                    tracing::debug!(%error, "a request to the anchor failed, trying again");
                    failures += 1;
                    pause(failures, &error).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Sends one path, as often as it takes.
    pub(super) async fn send_path(
        &self,
        store: &Arc<dyn LocalStore>,
        info: &PathInfo,
        progress: &Progress,
    ) -> Result<(), PushError> {
        let place = progress.begin(&info.store_path, info.nar_size);
        let hash = info.store_path.hash();
        let marks = self.marks.as_deref();
        let marks = marks.filter(|_| info.nar_size >= MARKED_BYTES_MIN);
        let mut failures = 0;
        let mut upload = Upload {
            id: marks.and_then(|marks| marks.take(&hash)),
            offset: 0,
        };
        let mut marked = upload.id.clone();
        // For somebody else's upload.
        let mut waiting: Option<Instant> = None;
        loop {
            let before = upload.offset;
            let meter = place.meter();
            let may_wait = waiting.is_none_or(|since| since.elapsed() < OTHERS_WAIT);
            let attempt = self.attempt(store, info, may_wait, &mut upload, |id, offset| {
                if let Some(marks) = marks
                    && marked.as_deref() != Some(id)
                {
                    marks.change(hash, Some(id));
                    marked = Some(id.to_owned());
                }
                place.at(offset);
                meter
            });
            let outcome = attempt.await;
            let is_over = match &outcome {
                Ok(is_complete) => *is_complete,
                Err(error) => !error.is_transient() && error.extent() != Extent::Everything,
            };
            if let Some(marks) = marks.filter(|_| is_over) {
                marks.change(hash, None);
            }
            let error = match outcome {
                Ok(true) => {
                    place.done();
                    return Ok(());
                }
                Ok(false) => continue,
                Err(error) => error,
            };
            if error.is_underway() {
                waiting.get_or_insert_with(Instant::now);
                tracing::debug!(path = %info.store_path, "somebody else is sending the nar, waiting for it");
                pause(1, &error).await;
                continue;
            }
            if upload.offset > before {
                failures = 0;
            }
            failures += 1;
            let is_forgotten =
                matches!(&error, PushError::Refused { error, .. } if error == "NoSuchUpload");
            if is_forgotten {
                upload = Upload::default();
            }
            if failures >= ATTEMPTS_MAX || !(is_forgotten || error.is_transient()) {
                return Err(error);
            }
            tracing::debug!(path = %info.store_path, %error, offset = upload.offset, "an upload broke, going on");
            pause(failures, &error).await;
        }
    }

    /// Begins an upload, or sends the next part of one; returns whether it is complete. One that may wait is refused
    /// while somebody else sends the NAR.
    async fn attempt(
        &self,
        store: &Arc<dyn LocalStore>,
        info: &PathInfo,
        may_wait: bool,
        upload: &mut Upload,
        at: impl FnOnce(&str, u64) -> Meter,
    ) -> Result<bool, PushError> {
        let id = match &upload.id {
            Some(id) => {
                let url = self.url(&format!("uploads/{id}"))?;
                let state: State = self.send(self.client.get(url)).await?;
                upload.offset = state.offset.unwrap_or(0);
                id.clone()
            }
            None => {
                let mut info = info.clone();
                info.drop_own_signatures();
                let narinfo: NarInfo = info.to_narinfo();
                let text = narinfo.to_text(store.dir());
                let uploads = match may_wait {
                    true => "uploads?challenge",
                    false => "uploads",
                };
                let request = self.client.post(self.url(uploads)?);
                let begin = serde_json::json!({ "narinfo": text }).to_string();
                let state: State = self.send(request.body(begin)).await?;
                if state.published.is_some() {
                    return Ok(true);
                }
                let id = state.id.ok_or_else(|| PushError::Answer {
                    problem: "an upload without an id".to_owned(),
                })?;
                *upload = Upload {
                    id: Some(id.clone()),
                    // Where a push before this one left it.
                    offset: state.offset.unwrap_or(0),
                };
                if let Some(challenge) = state.challenge
                    && self.prove(store, &info, &id, &challenge).await?
                {
                    return Ok(true);
                }
                id
            }
        };
        let nar = store.nar(info).await?.ok_or_else(|| PushError::Collected {
            path: info.store_path.clone(),
        })?;
        let offset = upload.offset;
        let end = info.nar_size.min(offset.saturating_add(self.part_bytes()));
        let meter = at(&id, offset);
        let nar = nar.stream(offset..end).inspect(move |piece| {
            if let Ok(piece) = piece {
                meter.add(piece.len() as u64);
            }
        });
        let trouble = Arc::new(Mutex::new(None));
        let body = paced(compressed(nar), self.pace.clone(), trouble.clone());
        let url = self.url(&format!("uploads/{id}?offset={offset}"))?;
        let request = self
            .client
            .put(url)
            .header("content-type", "application/zstd");
        let request = request.body(reqwest::Body::wrap_stream(body));
        let sent = self.send(request).await;
        // What the line says of a body that we could not make is that it broke.
        if let Some(source) = trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            return Err(PushError::Read { source });
        }
        let state: State = sent?;
        if state.published.is_some() {
            return Ok(true);
        }
        upload.offset = state.offset.unwrap_or(0);
        match upload.offset == end {
            true => Ok(false),
            false => Err(PushError::Answer {
                problem: format!("it took {} bytes, {end} were sent", upload.offset),
            }),
        }
    }

    /// Answers a challenge, so that a NAR that the anchor has need not be sent; `false` when it is to be sent after
    /// all.
    async fn prove(
        &self,
        store: &Arc<dyn LocalStore>,
        info: &PathInfo,
        id: &str,
        challenge: &str,
    ) -> Result<bool, PushError> {
        let challenge = nix32::decode(challenge).map_err(|error| PushError::Answer {
            problem: error.to_string(),
        })?;
        let nar = store.nar(info).await?.ok_or_else(|| PushError::Collected {
            path: info.store_path.clone(),
        })?;
        let mut hasher = NarHasher::new();
        hasher.update(&challenge);
        let mut pieces = nar.stream(0..info.nar_size);
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| PushError::Read {
                source: error.into(),
            })?;
            let hashing = tokio::task::spawn_blocking(move || {
                hasher.update(&piece);
                hasher
            });
            hasher = hashing.await.map_err(|_| PushError::Read {
                source: BodyError::Stopped,
            })?;
        }
        let proof = hasher.finish().nix32();
        let url = self.url(&format!("uploads/{id}?proof={proof}"))?;
        match self.send::<State>(self.client.put(url)).await {
            Ok(state) => Ok(state.published.is_some()),
            Err(PushError::Refused { error, .. })
                if matches!(error.as_str(), "FalseProof" | "NoChallenge") =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn part_bytes(&self) -> u64 {
        match &self.pace {
            Some(pace) => pace.bytes_in(PART_TIME).clamp(PART_BYTES_MIN, PART_BYTES),
            None => PART_BYTES,
        }
    }
}

/// An upload under way, as the anchor told last.
#[derive(Default)]
struct Upload {
    id: Option<String>,
    offset: u64,
}

async fn pause(failures: u32, error: &PushError) {
    let pause = order::attempt_pause(failures, error.retry_after(), chance());
    tokio::time::sleep(pause).await;
}

/// Any number; the same one always if the system gives no randomness, which costs the jitter alone.
pub(super) fn chance() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

/// Why the body of an upload ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
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

/// Why a body could not be made, for whoever sent it.
type Trouble = Arc<Mutex<Option<BodyError>>>;

/// Lets a body out at the pace, and keeps the error that ends it.
fn paced(
    body: impl Stream<Item = Result<Bytes, BodyError>> + Send + 'static,
    pace: Option<Arc<Pace>>,
    trouble: Trouble,
) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    let start = (Box::pin(body), Bytes::new(), pace, trouble);
    futures::stream::try_unfold(start, |(mut body, mut rest, pace, trouble)| async move {
        if rest.is_empty() {
            rest = match body.next().await {
                None => return Ok(None),
                Some(Ok(piece)) => piece,
                Some(Err(error)) => {
                    let text = error.to_string();
                    *trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(std::io::Error::other(text));
                }
            };
        }
        let piece = match &pace {
            None => std::mem::take(&mut rest),
            Some(pace) => {
                let piece = rest.split_to(rest.len().min(pace::PIECE_BYTES));
                pace.take(piece.len()).await;
                piece
            }
        };
        Ok(Some((piece, (body, rest, pace, trouble))))
    })
}
