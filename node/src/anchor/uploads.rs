//! Uploads: how `granary push` sends, and goes on sending after a break.
//!
//! All below `/api/v1/caches/<cache>/`, with a token that allows `push`:
//!
//! ```text
//! POST missing            {"hashes": [hash, …]}    → 200 {"missing": [hash, …]}
//! POST uploads            {"narinfo": text}        → 201 {"id", "offset"}, or 200 {"published": "Known"}
//! GET  uploads/<id>                                → 200 {"offset"}
//! PUT  uploads/<id>?offset=<offset>   body         → 200 {"offset"}, or 200 {"published": "Stored" | "Known"}
//! POST uploads?challenge              {"narinfo"}  → the same as above, or 201 {"id", "offset": 0, "challenge"}, or 409
//! PUT  uploads/<id>?proof=<digest>                 → 200 {"published": "Known"}
//! ```
//!
//! A pusher asks once which paths are missing, then begins an upload for each, references first. The
//! narinfo says what is promised; its URL and compression are of no account. The body is the NAR from
//! that raw offset on, as zstd (`application/zstd`) or as it is (anything else), and may end anywhere:
//! what came in counts, also when the connection broke, and the next body begins at the offset that
//! GET tells. So nothing depends on two compressors agreeing, and a break costs what was under way.
//! A NAR that the anchor has, for whatever cache, need not be sent. Who asked for a challenge gets some random bytes,
//! and proves by the SHA-256 of these and the NAR, both in Nix's base 32, that it has it: knowing the NAR's hash, or
//! an answer to another challenge, is not enough. One answer is looked at; after a wrong one the NAR is sent.
//! While somebody else is sending the NAR, who would rather prove it is asked to come back in a moment (409
//! `NarUnderway`); who asks for no challenge sends it at once. Who begins what the same token subject began and left
//! gets that, and the offset where it stands: a push that was killed goes on in the next one.
//!
//! With the last byte the path is published; should storage fail then, an empty body at the end publishes it.
//!
//! 404 for an id means that the upload is not known any more (an hour of silence, too many others): begin
//! again. A restart of the anchor takes at most the last frame of what came in ([`kept`]). 409 says that another request is filling it, or that the offset is another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::http::header::CONTENT_TYPE;
use ::http::{Method, StatusCode, request::Parts};
use futures::StreamExt;
use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::{NARINFO_BYTES_MAX, NarInfo};
use granary_protocol::nix32;
use granary_protocol::token::Permission;
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::cache::CacheName;
use super::catalog::{CacheRow, StoredNar};
use super::http::{Answer, Refusal, json_body, small_body};
use super::ingest::{IngestError, Outcome};
use super::intake::{Encoding, Intake, IntakeError, Taken};
use super::page::UploadView;
use super::read::parse_hashes;
use super::{Anchor, to_its_end};
use crate::serve::respond::{self, Body};

mod kept;

/// Uploads that wait for their next body, or to be published. Each holds a frame and its compressor, some 12 MiB; the one
/// that has waited longest makes room.
const WAITING_MAX: usize = 16;

/// How long an upload waits: a laptop's lid may be closed for lunch.
const WAITING_TIMEOUT: Duration = Duration::from_secs(3600);

/// How often those that waited for too long are removed: they hold memory, and room in the spool.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(300);

/// What the body of an upload that is complete may have: the end of an empty stream of zstd.
const EMPTY_BYTES_MAX: usize = 1024;

/// Hashes in one question for what is missing, and bytes of it: 36 for each hash.
const MISSING_MAX: usize = 10_000;
const MISSING_BYTES_MAX: usize = MISSING_MAX * 40;

/// A narinfo as JSON, whose lines take two bytes more each.
const BEGIN_BYTES_MAX: usize = 2 * NARINFO_BYTES_MAX;

/// Random bytes of a challenge.
const CHALLENGE_BYTES: usize = 32;

/// NARs below this are sent: another round trip takes as long.
const CHALLENGE_NAR_BYTES_MIN: u64 = 256 * 1024;

/// How long after its last byte an upload counts as one that others may wait for: pauses between bodies are shorter,
/// and one that broke off for good holds nobody up for longer.
const COMING_TIMEOUT: Duration = Duration::from_secs(5);

/// What a refusal is called that asks to wait for another's upload of the same NAR.
pub(super) const NAR_UNDERWAY: &str = "NarUnderway";

/// Random bytes in an id: nobody guesses another's.
const ID_BYTES: usize = 20;

/// Uploads that are not complete.
pub struct Uploads {
    known: Mutex<BTreeMap<String, Upload>>,
    spool: PathBuf,
    /// The anchor is ending: what is dropped is kept for the next one.
    is_closing: AtomicBool,
    /// Those of another run are taken up one at a time, and not while files are removed.
    reviving: Arc<tokio::sync::Mutex<()>>,
}

struct Upload {
    cache: i64,
    /// By whose token it was begun; `None` when it is not known who that was.
    subject: Option<String>,
    narinfo: NarInfo,
    stage: Stage,
    /// What it may be proved by that its sender has the NAR, until that was tried.
    challenge: Option<Challenge>,
    touched: Instant,
}

impl Upload {
    /// One that waits for its next body.
    fn waiting(cache: i64, narinfo: NarInfo, intake: Intake) -> Upload {
        Upload {
            cache,
            subject: None,
            narinfo,
            stage: Stage::Waiting(Box::new(intake)),
            challenge: None,
            touched: Instant::now(),
        }
    }
}

type Challenge = [u8; CHALLENGE_BYTES];

/// How far an upload has come.
enum Stage {
    /// It waits for its next body.
    Waiting(Box<Intake>),
    /// A request fills it.
    Busy,
    /// All of it is here, and it is being published, or could not be: asking again is enough.
    Complete(Arc<Taken>),
}

impl Stage {
    /// Where the next body begins, of `nar_size` bytes in all; `None` while one comes in.
    fn offset(&self, nar_size: u64) -> Option<u64> {
        match self {
            Stage::Waiting(intake) => Some(intake.offset()),
            Stage::Complete(_) => Some(nar_size),
            Stage::Busy => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hashes {
    hashes: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    narinfo: String,
}

/// What an upload has come to.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct State {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Raw bytes that came in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub challenge: Option<String>,
    /// `Stored` or `Known`, once it is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<String>,
}

impl State {
    fn begun(id: String, offset: u64) -> State {
        State {
            id: Some(id),
            offset: Some(offset),
            ..State::default()
        }
    }
}

impl Uploads {
    pub fn new(spool: &Path) -> Uploads {
        Uploads {
            known: Mutex::default(),
            spool: spool.to_owned(),
            is_closing: AtomicBool::new(false),
            reviving: Arc::default(),
        }
    }

    /// What is not complete, with the number of its cache.
    pub fn views(&self) -> Vec<(i64, UploadView)> {
        let uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let view = |upload: &Upload| {
            let view = UploadView {
                cache: String::new(),
                path: upload.narinfo.store_path.to_string(),
                bytes: upload.stage.offset(upload.narinfo.nar_size),
                nar_size: upload.narinfo.nar_size,
                seconds_ago: upload.touched.elapsed().as_secs(),
            };
            (upload.cache, view)
        };
        uploads.values().map(view).collect()
    }

    /// Says that the anchor is ending.
    pub fn close(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
    }

    fn is_known(&self, id: &str) -> bool {
        let uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.contains_key(id)
    }

    fn insert(&self, id: String, upload: Upload) {
        self.expire();
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |upload: &Upload| !matches!(upload.stage, Stage::Busy);
        if uploads.values().filter(|upload| waiting(upload)).count() >= WAITING_MAX {
            let oldest = uploads.iter().filter(|(_, upload)| waiting(upload));
            let oldest = oldest.min_by_key(|(_, upload)| upload.touched);
            if let Some(oldest) = oldest.map(|(id, _)| id.clone()) {
                uploads.remove(&oldest);
                self.delete(&oldest);
            }
        }
        uploads.insert(id, upload);
    }

    /// Forgets uploads that have waited for too long.
    fn expire(&self) {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        uploads.retain(|id, upload| {
            // A body may take however long it takes.
            let is_busy = matches!(upload.stage, Stage::Busy);
            let is_kept = is_busy || now.duration_since(upload.touched) < WAITING_TIMEOUT;
            if !is_kept {
                self.delete(id);
            }
            is_kept
        });
    }

    /// Whether somebody is sending this NAR.
    fn is_coming(&self, nar_hash: &NarHash) -> bool {
        let uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.values().any(|upload| {
            upload.narinfo.nar_hash == *nar_hash && upload.touched.elapsed() < COMING_TIMEOUT
        })
    }

    /// Finds what a subject sent of a path before it was interrupted, and how much that is.
    fn left(&self, cache: i64, subject: &str, narinfo: &NarInfo) -> Option<(String, u64)> {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, upload) = uploads.iter_mut().find(|(_, upload)| {
            let is_theirs = upload.cache == cache && upload.subject.as_deref() == Some(subject);
            is_theirs && upload.narinfo == *narinfo && matches!(upload.stage, Stage::Waiting(_))
        })?;
        upload.touched = Instant::now();
        let offset = upload.stage.offset(upload.narinfo.nar_size)?;
        Some((id.clone(), offset))
    }

    /// Notes that something of an upload came.
    fn touch(&self, id: &str) {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(upload) = uploads.get_mut(id) {
            upload.touched = Instant::now();
        }
    }

    /// Where an upload stands.
    fn offset(&self, id: &str, cache: i64) -> Result<u64, Refusal> {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let upload = uploads.get_mut(id).filter(|upload| upload.cache == cache);
        let upload = upload.ok_or_else(unknown)?;
        upload.touched = Instant::now();
        let offset = upload.stage.offset(upload.narinfo.nar_size);
        offset.ok_or_else(being_filled)
    }

    /// Takes an upload out to be filled from an offset; one that is complete stays.
    fn take(&self, id: &str, cache: i64, offset: u64) -> Result<(Stage, NarInfo), Refusal> {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let upload = uploads.get_mut(id).filter(|upload| upload.cache == cache);
        let upload = upload.ok_or_else(unknown)?;
        upload.touched = Instant::now();
        let stands = upload.stage.offset(upload.narinfo.nar_size);
        let stands = stands.ok_or_else(being_filled)?;
        if stands != offset {
            return Err(Refusal::new(
                StatusCode::CONFLICT,
                "OtherOffset",
                format!("the upload stands at byte {stands}, not at {offset}"),
            ));
        }
        let stage = match &upload.stage {
            Stage::Complete(taken) => Stage::Complete(taken.clone()),
            Stage::Waiting(_) | Stage::Busy => std::mem::replace(&mut upload.stage, Stage::Busy),
        };
        Ok((stage, upload.narinfo.clone()))
    }

    /// Takes an upload out to be proved by a challenge, which is not asked again.
    fn challenge(
        &self,
        id: &str,
        cache: i64,
    ) -> Result<(Challenge, Box<Intake>, NarInfo), Refusal> {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let upload = uploads.get_mut(id).filter(|upload| upload.cache == cache);
        let upload = upload.ok_or_else(unknown)?;
        upload.touched = Instant::now();
        let challenge = upload.challenge.take().ok_or_else(no_challenge)?;
        match std::mem::replace(&mut upload.stage, Stage::Busy) {
            Stage::Waiting(intake) => Ok((challenge, intake, upload.narinfo.clone())),
            stage => {
                upload.stage = stage;
                Err(being_filled())
            }
        }
    }

    /// Puts an upload back, to be continued or published.
    fn put_back(&self, id: &str, stage: Stage) {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(upload) = uploads.get_mut(id) {
            upload.touched = Instant::now();
            upload.stage = stage;
        }
    }

    /// Forgets an upload that is complete or refused.
    fn end(&self, id: &str) {
        let mut uploads = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.remove(id);
        self.delete(id);
    }

    /// Forgets an upload whose request was dropped, unless that is because the anchor is ending: then the next
    /// one goes on with it.
    fn drop_unfinished(&self, id: &str) {
        if !self.is_closing.load(Ordering::Relaxed) {
            self.end(id);
        }
    }

    /// Deletes its files, those that may be large elsewhere. To be called while `known` is locked: without its note
    /// nobody takes it up from the moment on that it is not known.
    fn delete(&self, id: &str) {
        kept::forget(&self.spool, id);
        let (spool, id) = (self.spool.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || kept::remove(&spool, &id));
    }
}

fn unknown() -> Refusal {
    let message = "this upload is not known, begin it again";
    Refusal::new(StatusCode::NOT_FOUND, "NoSuchUpload", message)
}

fn no_challenge() -> Refusal {
    let message = "this upload has no challenge any more, send the nar";
    Refusal::new(StatusCode::CONFLICT, "NoChallenge", message)
}

fn underway() -> Refusal {
    let message = "somebody else is sending this nar, ask again in a moment";
    Refusal::new(StatusCode::CONFLICT, NAR_UNDERWAY, message)
}

fn being_filled() -> Refusal {
    let message = "another request is sending this upload";
    Refusal::new(StatusCode::CONFLICT, "UploadBusy", message)
}

/// Answers what is about pushing below `/api/v1/caches/<cache>/`.
pub async fn answer(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &str,
    rest: &[&str],
    body: &mut Incoming,
) -> Answer {
    let name = CacheName::new(cache)?;
    let (cache, bearer) = anchor.cache_for(parts, &name, Permission::Push).await?;
    let subject = bearer.subject();
    match (rest, &parts.method) {
        (["missing"], &Method::POST) => {
            let question: Hashes = json_body(body, MISSING_BYTES_MAX).await?;
            let hashes = parse_hashes(&question.hashes, MISSING_MAX)?;
            let missing = anchor.missing(cache.id, hashes).await?;
            let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
            Ok(respond::json(
                serde_json::json!({ "missing": missing }).to_string(),
            ))
        }
        (["uploads"], &Method::POST) => {
            let may_prove = parts.uri.query() == Some("challenge");
            begin(anchor, &cache, subject, may_prove, body).await
        }
        (["uploads", id], &Method::GET) => {
            anchor.revive(&cache, id).await?;
            let offset = anchor.uploads.offset(id, cache.id)?;
            told(
                StatusCode::OK,
                &State {
                    offset: Some(offset),
                    ..State::default()
                },
            )
        }
        (["uploads", id], &Method::PUT) => fill(anchor, parts, &cache, subject, id, body).await,
        _ => Err(Refusal::not_found("there is nothing at this address")),
    }
}

fn told(status: StatusCode, state: &State) -> Result<::http::Response<Body>, Refusal> {
    let text = serde_json::to_string(state).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::small(status, "application/json", text))
}

async fn begin(
    anchor: &Arc<Anchor>,
    cache: &CacheRow,
    subject: Option<&str>,
    may_prove: bool,
    body: &mut Incoming,
) -> Answer {
    let begin: Begin = json_body(body, BEGIN_BYTES_MAX).await?;
    let dir = cache
        .settings
        .store_dir()
        .map_err(|error| Refusal::ours(&error))?;
    let narinfo = NarInfo::parse(&begin.narinfo, &dir);
    let narinfo = narinfo.map_err(|error| Refusal::bad_request(error.to_string()))?;
    if narinfo.nar_size > anchor.nar_bytes_max {
        return Err(Refusal::too_large(anchor.nar_bytes_max));
    }
    // Whoever names a path that is here may add signatures to it, as with `nix store sign`.
    let known = anchor
        .catalog
        .path(cache.id, narinfo.store_path.hash())
        .await?;
    if let Some(known) = known {
        if known.nar_hash == narinfo.nar_hash
            && let Some(stored) = anchor.catalog.nar(known.nar_hash).await?
        {
            let subject = subject.map(str::to_owned);
            anchor.describe(cache, narinfo, stored, subject).await?;
        }
        let published = Some("Known".to_owned());
        return told(
            StatusCode::OK,
            &State {
                published,
                ..State::default()
            },
        );
    }
    anchor.check_full(cache, subject).await?;
    anchor.check_claims(cache, &narinfo).await?;
    let id = nix32::encode(&random::<ID_BYTES>()?);
    // A NAR that is here is only hashed, as proof that its sender has it.
    let stored = anchor.catalog.hold_nar(narinfo.nar_hash).await?;
    let is_challenged = may_prove && narinfo.nar_size >= CHALLENGE_NAR_BYTES_MIN;
    let challenge = match stored {
        Some(stored) => {
            let (nar_hash, file_size) = (stored.nar_hash, stored.file_size);
            anchor
                .check_quota(cache, subject, nar_hash, file_size)
                .await?;
            is_challenged.then(random::<CHALLENGE_BYTES>).transpose()?
        }
        None if is_challenged && anchor.uploads.is_coming(&narinfo.nar_hash) => {
            return Err(underway());
        }
        None => {
            let left = subject.and_then(|subject| anchor.uploads.left(cache.id, subject, &narinfo));
            if let Some((id, offset)) = left {
                return told(StatusCode::CREATED, &State::begun(id, offset));
            }
            None
        }
    };
    let intake = match stored {
        Some(_) => Intake::new(None, narinfo.nar_size),
        None => {
            let (spool, id, name) = (anchor.spool.clone(), id.clone(), cache.name.clone());
            let promised = narinfo.clone();
            let begin = move || kept::begin(&spool, &id, &name, &promised, &dir);
            let begun = tokio::task::spawn_blocking(begin).await;
            begun.unwrap_or(Err(IntakeError::Stopped))
        }
    };
    let intake = intake.map_err(IngestError::from)?;
    let upload = Upload {
        subject: subject.map(str::to_owned),
        challenge,
        ..Upload::waiting(cache.id, narinfo, intake)
    };
    anchor.uploads.insert(id.clone(), upload);
    let state = State {
        challenge: challenge.map(|challenge| nix32::encode(&challenge)),
        ..State::begun(id, 0)
    };
    told(StatusCode::CREATED, &state)
}

fn random<const LENGTH: usize>() -> Result<[u8; LENGTH], Refusal> {
    let mut random = [0; LENGTH];
    match getrandom::fill(&mut random) {
        Ok(()) => Ok(random),
        Err(error) => Err(Refusal::ours(&std::io::Error::other(error.to_string()))),
    }
}

/// Publishes a path whose sender proves that it has the NAR, which is here.
async fn prove(
    anchor: &Arc<Anchor>,
    cache: &CacheRow,
    subject: Option<&str>,
    id: &str,
    proof: &str,
) -> Answer {
    let proof = NarHash::from_nix32(proof);
    let proof = proof.map_err(|error| Refusal::bad_request(error.to_string()))?;
    let _slot = anchor.intakes.acquire().await;
    let (challenge, intake, narinfo) = anchor.uploads.challenge(id, cache.id)?;
    let mut forget = Forget {
        uploads: &anchor.uploads,
        id,
        how: Uploads::drop_unfinished,
    };
    let answered = match anchor.catalog.hold_nar(narinfo.nar_hash).await? {
        Some(stored) => match anchor.answer_challenge(&stored, &challenge).await {
            Ok(digest) => digest.map(|digest| (stored, digest)),
            Err(error) => {
                // Its sender has it, however storage is.
                warn!(nar_hash = %stored.nar_hash, %error, "could not read a nar to have it proved");
                None
            }
        },
        None => None,
    };
    // Whatever comes of it, its NAR may be sent.
    anchor.uploads.put_back(id, Stage::Waiting(intake));
    forget.how = |_, _| {};
    let (stored, expected) = answered.ok_or_else(no_challenge)?;
    if proof != expected {
        let message = "this does not prove that you have the nar, send it";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "FalseProof", message));
    }
    let subject = subject.map(str::to_owned);
    anchor.describe(cache, narinfo, stored, subject).await?;
    anchor.uploads.end(id);
    told(
        StatusCode::OK,
        &State {
            published: Some("Known".to_owned()),
            ..State::default()
        },
    )
}

async fn fill(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    subject: Option<&str>,
    id: &str,
    body: &mut Incoming,
) -> Answer {
    let query = parts.uri.query();
    if let Some(proof) = query.and_then(|query| query.strip_prefix("proof=")) {
        return prove(anchor, cache, subject, id, proof).await;
    }
    let offset = query.and_then(|query| query.strip_prefix("offset="));
    let offset = offset.and_then(|offset| offset.parse().ok());
    let offset = offset.ok_or_else(|| Refusal::bad_request("?offset= is missing or no number"))?;
    let encoding = match parts
        .headers
        .get(CONTENT_TYPE)
        .map(|value| value.as_bytes())
    {
        Some(b"application/zstd") => Encoding::Zstd,
        _ => Encoding::None,
    };
    anchor.revive(cache, id).await?;
    let _slot = anchor.intakes.acquire().await;
    let (stage, narinfo) = anchor.uploads.take(id, cache.id, offset)?;
    let intake = match stage {
        Stage::Waiting(intake) => *intake,
        Stage::Busy => return Err(being_filled()),
        Stage::Complete(taken) => {
            // Its bytes are here, so nothing but the end of an empty body can come.
            small_body(body, EMPTY_BYTES_MAX).await?;
            return publish(anchor, cache, subject, id, narinfo, taken).await;
        }
    };
    // Should this request be given up by hyper, the upload goes with it.
    let mut forget = Forget {
        uploads: &anchor.uploads,
        id,
        how: Uploads::drop_unfinished,
    };
    let body = BodyDataStream::new(body).inspect(|_| anchor.uploads.touch(id));
    let (intake, outcome) = intake.fill(body, encoding).await;
    forget.how = Uploads::end;
    let Some(intake) = intake else {
        let refused = outcome.err().unwrap_or(IntakeError::Stopped);
        return Err(IngestError::from(refused).into());
    };
    if intake.offset() < narinfo.nar_size {
        let offset = intake.offset();
        let waiting = Stage::Waiting(Box::new(intake));
        anchor.uploads.put_back(id, waiting);
        forget.how = |_, _| {};
        outcome.map_err(IngestError::from)?;
        return told(
            StatusCode::OK,
            &State {
                offset: Some(offset),
                ..State::default()
            },
        );
    }
    // All of it is here, however the body ended.
    let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
    let taken: Taken = taken
        .map_err(|error| Refusal::ours(&error))?
        .map_err(IngestError::from)?;
    let taken = Arc::new(taken);
    let complete = Stage::Complete(taken.clone());
    anchor.uploads.put_back(id, complete);
    forget.how = |_, _| {};
    publish(anchor, cache, subject, id, narinfo, taken).await
}

/// Publishes an upload that is complete. When that fails through no fault of its sender, it is kept, so that
/// asking again does not mean sending again.
async fn publish(
    anchor: &Arc<Anchor>,
    cache: &CacheRow,
    subject: Option<&str>,
    id: &str,
    narinfo: NarInfo,
    taken: Arc<Taken>,
) -> Answer {
    let subject = subject.map(str::to_owned);
    let (publishing, cache, id) = (anchor.clone(), cache.clone(), id.to_owned());
    // Its file stays until this is over, whether or not the request does.
    let published = to_its_end(async move {
        let published = publishing.publish(&cache, narinfo, taken, subject).await;
        let may_succeed = match &published {
            // What was only hashed is not here any more, and has to be sent after all.
            Err(IngestError::Intake(_)) | Ok(_) => false,
            Err(error) => error.is_ours(),
        };
        if !may_succeed {
            publishing.uploads.end(&id);
        }
        published
    });
    let published = match published.await? {
        Outcome::Stored { .. } => "Stored",
        Outcome::Known => "Known",
    };
    let published = Some(published.to_owned());
    told(
        StatusCode::OK,
        &State {
            published,
            ..State::default()
        },
    )
}

impl Anchor {
    /// Returns the right answer to a challenge, which takes reading the NAR; `None` when it is not in storage.
    async fn answer_challenge(
        &self,
        stored: &StoredNar,
        challenge: &Challenge,
    ) -> Result<Option<NarHash>, IngestError> {
        let key = super::nar_key(&stored.nar_hash);
        let Some(file) = self.storage.read(&key, 0..stored.file_size).await? else {
            return Ok(None);
        };
        let intake = Intake::after(challenge, stored.nar_size);
        let (intake, outcome) = intake.fill(file, Encoding::Zstd).await;
        outcome?;
        let intake = intake.ok_or(IntakeError::Stopped)?;
        let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
        Ok(Some(taken.map_err(|_| IntakeError::Stopped)??.nar_hash))
    }

    /// Removes uploads that have waited for too long.
    pub async fn expire_uploads(self: &Arc<Self>) {
        self.uploads.expire();
        // None is taken up meanwhile.
        let alone = self.uploads.reviving.clone().lock_owned().await;
        let anchor = self.clone();
        let expire = move || {
            let is_known = |id: &str| anchor.uploads.is_known(id);
            kept::expire(&anchor.spool, WAITING_TIMEOUT, is_known);
            drop(alone);
        };
        if let Err(error) = tokio::task::spawn_blocking(expire).await {
            error!(spool = %self.spool.display(), %error, "could not look for uploads that were given up");
        }
    }

    /// Takes up an upload that another run of the anchor began, if there is one of this id.
    async fn revive(&self, cache: &CacheRow, id: &str) -> Result<(), Refusal> {
        if self.uploads.is_known(id) {
            return Ok(());
        }
        // Given up here or not, nothing else happens to its files until what follows is over.
        let alone = self.uploads.reviving.clone().lock_owned().await;
        if self.uploads.is_known(id) {
            return Ok(());
        }
        let dir = cache
            .settings
            .store_dir()
            .map_err(|error| Refusal::ours(&error))?;
        let (spool, name) = (self.spool.clone(), cache.name.clone());
        let asked = id.to_owned();
        let revive = move || (kept::revive(&spool, &asked, &name, &dir), alone);
        let revived = tokio::task::spawn_blocking(revive).await;
        let (revived, _alone) = revived.map_err(|error| Refusal::ours(&error))?;
        if let Some((narinfo, intake)) = revived {
            let upload = Upload::waiting(cache.id, narinfo, intake);
            self.uploads.insert(id.to_owned(), upload);
        }
        Ok(())
    }
}

/// Removes from the spool what the last run of the anchor left and nobody will go on with. Blocks.
pub fn sweep(spool: &Path) {
    kept::sweep(spool, WAITING_TIMEOUT);
}

/// Removes uploads that have waited for too long, of this run and of others, every few minutes.
pub async fn keep_expiring(anchor: Arc<Anchor>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EXPIRE_INTERVAL) => {}
        }
        anchor.expire_uploads().await;
    }
}

/// What becomes of an upload at the end of a request, however that ends.
struct Forget<'a> {
    uploads: &'a Uploads,
    id: &'a str,
    how: fn(&Uploads, &str),
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        (self.how)(self.uploads, self.id);
    }
}

#[cfg(test)]
mod tests;
