//! Reading: what a binary cache answers, for Nix and for nodes.
//!
//! narinfos come out of the catalog, so storage that fails does not hurt lookups: they are 200 or 404
//! whatever happens, since anything else ends a build. NARs come out of storage as they lie there;
//! who asks for one must be able to read a path that has it.
//!
//! A node that goes on at a raw offset asks `nar/<narhash>.nar.zst?from=<offset>`. The offset counts
//! bytes of the uncompressed NAR, and is served from here also where whole NARs of public caches are fetched from
//! S3 itself, by a redirect to a signed link. The answer is 200 with whole zstd frames up to the end, and says in
//! `Granary-Skip` how many raw bytes come before the offset in the first of them.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH,
    LOCATION,
};
use ::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, request::Parts};
use bytes::Bytes;
use futures::{Stream, TryStreamExt, stream};
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::hash::{NarHash, sha256};
use granary_protocol::narinfo::Compression;
use granary_protocol::nix32;
use granary_protocol::seekable::{FOOTER_BYTES, FRAME_RAW_BYTES, SeekTable};
use granary_protocol::store_path::StorePathHash;
use granary_protocol::token::Permission;
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tracing::error;

use super::cache::CacheName;
use super::catalog::{CacheRow, CatalogError, PathRow, StoredNar};
use super::http::{Answer, Refusal, empty, json_body, set};
use super::intake::Encoding;
use super::put::{FileName, StoredFile, name_of_nar};
use super::{Anchor, nar_key, repack};
use crate::serve::nar::Part;
use crate::serve::respond::{self, Body};

/// Hashes in one batch; a closure of an operating system has some thousands.
const BATCH_MAX: usize = 10_000;

/// Bytes of a batch: 36 for each hash, as JSON.
const BATCH_BYTES_MAX: usize = BATCH_MAX * 40;

/// How many raw bytes come before the offset that was asked for.
pub const SKIP_HEADER: HeaderName = HeaderName::from_static("granary-skip");

/// A NAR's bytes never change under their name.
const FOR_EVER: &str = "max-age=31536000, immutable";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchQuestion {
    hashes: Vec<String>,
}

/// Batches that are answered at once: each holds its hashes, some 1.5 MB while they are text, and [`PIECE_BYTES`] of
/// its answer with the narinfo that goes beyond.
const BATCHES_PARALLEL: usize = 32;

/// How long a batch may wait for its turn before it is told to come back.
const BATCH_WAIT: Duration = Duration::from_secs(10);

/// Bytes of narinfos that are looked up for a batch at once. What a client is behind with is not held.
const PIECE_BYTES: usize = 256 * 1024;

/// How long a client may take for a piece of its answer before its turn is given to others.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);

/// The turns of batches.
pub struct Batches(Arc<Semaphore>);

impl Default for Batches {
    fn default() -> Batches {
        Batches(Arc::new(Semaphore::new(BATCHES_PARALLEL)))
    }
}

impl Batches {
    async fn turn(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let turn = tokio::time::timeout(BATCH_WAIT, self.0.clone().acquire_owned()).await;
        match turn {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(busy("too many batches of narinfos are being answered")),
        }
    }
}

/// Answers GET and HEAD below a cache.
pub async fn answer(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
    rest: &[&str],
) -> Answer {
    // Whether it may be read comes first, whatever it is.
    let (cache, _) = match anchor.cache_for(parts, name, Permission::Pull).await {
        Ok(found) => found,
        // Anything but 200 and 404 would end a build.
        Err(refusal) if refusal.status.is_server_error() && is_narinfo(rest) => {
            return Err(not_here());
        }
        // A push looks whether its NAR is there, and may be allowed nothing else.
        Err(refusal) if matches!(rest, ["nar", _]) && parts.method == Method::HEAD => {
            let pushing = anchor.cache_for(parts, name, Permission::Push).await;
            pushing.map_err(|_| refusal)?
        }
        Err(refusal) => return Err(refusal),
    };
    match rest {
        [] | [""] => Ok(respond::small(
            StatusCode::OK,
            "text/plain; charset=utf-8",
            format!("This is the cache {name} of a Granary anchor.\n"),
        )),
        ["nix-cache-info"] => cache_info(&cache),
        ["nar", file] => nar(anchor, parts, &cache, file).await,
        [file] if is_narinfo(rest) => {
            let hash = file.trim_end_matches(".narinfo").parse();
            let hash = hash.map_err(|_| not_here())?;
            narinfo(anchor, parts, &cache, hash).await
        }
        _ => match FileName::of(rest) {
            Some(name) => stored_file(anchor, parts, &cache, &name).await,
            None => Err(not_here()),
        },
    }
}

fn is_narinfo(rest: &[&str]) -> bool {
    matches!(rest, [file] if file.ends_with(".narinfo"))
}

fn not_here() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "NoSuchObject",
        "the requested object does not exist",
    )
}

fn cache_info(cache: &CacheRow) -> Answer {
    let info = CacheInfo {
        store_dir: cache
            .settings
            .store_dir()
            .map_err(|error| Refusal::ours(&error))?,
        want_mass_query: true,
        priority: cache.settings.priority,
    };
    Ok(respond::cache_info(info.to_string()))
}

async fn narinfo(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    hash: StorePathHash,
) -> Answer {
    let found = async {
        match anchor.relied_on(cache.id, vec![hash]).await?.pop() {
            Some(hash) => anchor.catalog.path(cache.id, hash).await,
            None => Ok(None),
        }
    };
    let path = match found.await {
        Ok(path) => path,
        Err(error) => {
            error!(cache = %cache.name, %hash, %error, "could not look up a narinfo");
            anchor.counts.of(&cache.name).requests_failed.add(1);
            None
        }
    };
    let counts = anchor.counts.of(&cache.name);
    match &path {
        Some(_) => counts.narinfos_found.add(1),
        None => counts.narinfos_absent.add(1),
    }
    let path = path.ok_or_else(not_here)?;
    let etag = etag(&sha256(path.narinfo.as_bytes()));
    if is_known(&parts.headers, &etag) {
        return Ok(not_modified(&etag));
    }
    let mut response = respond::narinfo(path.narinfo);
    set(&mut response, ETAG, &etag);
    Ok(response)
}

impl Anchor {
    /// Returns those of the paths that are here, for somebody who will come for their NARs: they stay. They are to be
    /// looked up after this, for what went before it was noted is not here after all.
    async fn relied_on(
        &self,
        cache: i64,
        mut hashes: Vec<StorePathHash>,
    ) -> Result<Vec<StorePathHash>, CatalogError> {
        // Most of what Nix asks for is not here, and leaves no note.
        let absent = self.catalog.missing(cache, hashes.clone()).await?;
        let absent: BTreeSet<StorePathHash> = absent.into_iter().collect();
        hashes.retain(|hash| !absent.contains(hash) && self.note_use(cache, *hash));
        Ok(hashes)
    }
}

/// A strong tag: it changes whenever the bytes do.
fn etag(digest: &[u8; 32]) -> String {
    format!("\"{}\"", nix32::encode(digest))
}

fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let mut values = headers.get_all(IF_NONE_MATCH).iter();
    values.any(|value| {
        let value = value.to_str().unwrap_or_default();
        let mut tags = value.split(',').map(str::trim);
        tags.any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
    })
}

fn not_modified(etag: &str) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    set(&mut response, ETAG, etag);
    response
}

async fn nar(anchor: &Arc<Anchor>, parts: &Parts, cache: &CacheRow, file: &str) -> Answer {
    let own = file.strip_suffix(".nar.zst").map(NarHash::from_nix32);
    if let Some(Ok(nar_hash)) = own
        && anchor.catalog.cache_has_nar(cache.id, nar_hash).await?
        && let Some(stored) = anchor.catalog.nar(nar_hash).await?
    {
        return match parts
            .uri
            .query()
            .and_then(|query| query.strip_prefix("from="))
        {
            Some(offset) => {
                let offset = offset.parse();
                let offset = offset.map_err(|_| Refusal::bad_request("from= is no offset"))?;
                frames_from(anchor, parts, cache, &stored, offset).await
            }
            None => whole(anchor, parts, cache, &stored).await,
        };
    }
    // What `nix copy --to` has put is there for its own question.
    if parts.method == Method::HEAD {
        let received = anchor
            .catalog
            .hold_received(cache.id, file.to_owned(), anchor.now())
            .await?;
        return received.map(|_| empty(StatusCode::OK)).ok_or_else(not_here);
    }
    match anchor
        .catalog
        .received_as(cache.id, file.to_owned())
        .await?
    {
        Some(stored)
            if anchor
                .catalog
                .cache_has_nar(cache.id, stored.nar_hash)
                .await? =>
        {
            as_received(anchor, parts, cache, &stored, file).await
        }
        _ => Err(not_here()),
    }
}

/// Answers with a NAR under the name, and in the packing, in which a client put it.
async fn as_received(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    stored: &StoredNar,
    file: &str,
) -> Answer {
    let encoding = match name_of_nar(file)? {
        // The name is the hash of the file: one of the NAR itself was not packed.
        (hash, Encoding::Bare) if hash.as_bytes() == stored.nar_hash.as_bytes() => Encoding::None,
        (_, Encoding::Bare) => Encoding::Gzip,
        (_, encoding) => encoding,
    };
    let file = object_body(anchor, parts, cache, stored, 0..stored.file_size).await?;
    let body = match encoding {
        Encoding::Zstd => file,
        encoding => {
            let frames = BodyDataStream::new(file).map_err(io::Error::other);
            let size = stored.nar_size;
            let started = anchor
                .unpackers
                .start(vec![Compression::Zstd], frames, 0, size);
            let unpacked = started
                .map_err(|error| Refusal::ours(&error))?
                .ok_or_else(|| busy("too many nars are being packed for clients"))?;
            respond::stream(repack::packed(unpacked.into_stream(), encoding))
        }
    };
    // Its length is known when it was made, and it is made anew each time: no ranges, no tag.
    let mut response = Response::new(body);
    let nar = HeaderValue::from_static("application/x-nix-nar");
    response.headers_mut().insert(CONTENT_TYPE, nar);
    Ok(response)
}

fn busy(why: &str) -> Refusal {
    let message = format!("{why}, try again later");
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "Busy", message)
}

async fn whole(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    stored: &StoredNar,
) -> Answer {
    let etag = etag(stored.file_hash.as_bytes());
    if is_known(&parts.headers, &etag) {
        return Ok(not_modified(&etag));
    }
    // A link is signed for GET alone, and tells whoever has it; so a private NAR does not get one.
    if cache.settings.public
        && parts.method == Method::GET
        && let Some(link) = anchor.storage.link(&nar_key(&stored.nar_hash)).await?
    {
        anchor.counts.of(&cache.name).nars.add(1);
        let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
        set(&mut response, LOCATION, &link);
        // It ends before a NAR does.
        set(&mut response, CACHE_CONTROL, "no-store");
        return Ok(response);
    }
    let part = Part::of(&parts.headers, stored.file_size);
    let range = part.bytes(stored.file_size);
    let body = match part {
        Part::Unsatisfiable => Body::default(),
        _ => object_body(anchor, parts, cache, stored, range).await?,
    };
    let mut response = crate::serve::nar::answer(&part, stored.file_size, body);
    set(&mut response, ETAG, &etag);
    set(&mut response, CACHE_CONTROL, FOR_EVER);
    Ok(response)
}

/// Opens a part of a NAR's object; an error is known before the head of the answer is sent.
async fn object_body(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    stored: &StoredNar,
    range: Range<u64>,
) -> Result<Body, Refusal> {
    if parts.method == Method::HEAD {
        return Ok(Body::default());
    }
    let key = nar_key(&stored.nar_hash);
    match anchor.storage.read(&key, range).await? {
        Some(stream) => {
            let counts = anchor.counts.of(&cache.name);
            counts.nars.add(1);
            Ok(respond::stream(stream.inspect_ok(move |bytes| {
                counts.nar_sent_bytes.add(bytes.len() as u64);
            })))
        }
        None => {
            error!(
                key,
                "a nar is missing from storage, answered as if it had never been there"
            );
            Err(not_here())
        }
    }
}

async fn frames_from(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    stored: &StoredNar,
    offset: u64,
) -> Answer {
    let table = seek_table(anchor, stored).await?;
    let Some(position) = table.locate(offset) else {
        let message = format!(
            "the nar has {} bytes, none from {offset} on",
            stored.nar_size
        );
        return Err(Refusal::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "RequestError",
            message,
        ));
    };
    let length = position.file.end - position.file.start;
    let body = object_body(anchor, parts, cache, stored, position.file).await?;
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/zstd"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(SKIP_HEADER, HeaderValue::from(position.skip));
    Ok(response)
}

/// Reads the table at the end of a NAR's object, in one request: its size follows from the NAR's.
pub(super) async fn seek_table(anchor: &Anchor, stored: &StoredNar) -> Result<SeekTable, Refusal> {
    let damaged = |problem: String| {
        error!(nar_hash = %stored.nar_hash, problem, "the seek table of a nar is damaged");
        Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "InternalError",
            "the nar is damaged",
        )
    };
    let frames = stored.nar_size.div_ceil(u64::from(FRAME_RAW_BYTES));
    let size = frames
        .saturating_mul(8)
        .saturating_add(8 + FOOTER_BYTES as u64);
    if size > stored.file_size || frames > granary_protocol::seekable::FRAMES_MAX as u64 {
        return Err(damaged(format!("a file of {} bytes", stored.file_size)));
    }
    let range = stored.file_size - size..stored.file_size;
    let Some(stream) = anchor
        .storage
        .read(&nar_key(&stored.nar_hash), range)
        .await?
    else {
        return Err(not_here());
    };
    let pieces: Vec<Bytes> = stream.try_collect().await?;
    SeekTable::from_bytes(&pieces.concat(), stored.file_size)
        .map_err(|error| damaged(error.to_string()))
}

async fn stored_file(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    name: &FileName,
) -> Answer {
    // A listing says what is in a path, and goes with it.
    let listed = name
        .key()
        .strip_prefix("ls/")
        .map(|file| file.trim_end_matches(".ls"));
    if let Some(Ok(hash)) = listed.map(str::parse)
        && anchor.catalog.path(cache.id, hash).await?.is_none()
    {
        return Err(not_here());
    }
    let key = cache.name.file_key(name.key());
    let object = anchor.storage.whole(&key).await?.ok_or_else(not_here)?;
    let file = StoredFile::open(object).await?.ok_or_else(not_here)?;
    let etag = file
        .version
        .map(|version| etag(&sha256(version.as_bytes())));
    if let Some(etag) = etag
        .as_deref()
        .filter(|etag| is_known(&parts.headers, etag))
    {
        return Ok(not_modified(etag));
    }
    let body = respond::stream(file.body);
    let mut response = respond::sized(name.content_type(), file.size, body);
    if let Some(encoding) = &file.encoding {
        set(&mut response, CONTENT_ENCODING, encoding);
    }
    if let Some(etag) = &etag {
        set(&mut response, ETAG, etag);
    }
    Ok(response)
}

/// Answers many lookups at once: `{"hashes": […]}` → `{"narinfos": {hash: text}}`, without those that are not here.
///
/// The answer is looked up as its reader takes it. Should it end early, it is no JSON.
pub async fn narinfos(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &str,
    body: &mut Incoming,
) -> Answer {
    let name = CacheName::new(cache)?;
    let (cache, _) = anchor.cache_for(parts, &name, Permission::Pull).await?;
    let turn = anchor.batches.turn().await?;
    let question: BatchQuestion = json_body(body, BATCH_BYTES_MAX).await?;
    // One that is asked for twice is answered once.
    let hashes: BTreeSet<_> = parse_hashes(&question.hashes, BATCH_MAX)?
        .into_iter()
        .collect();
    drop(question);
    let asked = hashes.len();
    let found = anchor
        .relied_on(cache.id, hashes.into_iter().collect())
        .await?;
    let counts = anchor.counts.of(&cache.name);
    counts.narinfos_found.add(found.len() as u64);
    let absent = asked.saturating_sub(found.len());
    counts.narinfos_absent.add(absent as u64);
    let mut batch = Batch {
        anchor: anchor.clone(),
        cache: cache.id,
        left: found,
        has_begun: false,
        is_over: false,
        _turn: turn,
    };
    let first = batch.piece().await?;
    if batch.is_over {
        return Ok(respond::json(first));
    }
    let mut response = Response::new(respond::stream(batch.into_stream(first)));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    Ok(response)
}

/// An answer to many lookups, made as it is taken.
struct Batch {
    anchor: Arc<Anchor>,
    cache: i64,
    left: Vec<StorePathHash>,
    has_begun: bool,
    /// What came last is the end.
    is_over: bool,
    _turn: OwnedSemaphorePermit,
}

impl Batch {
    /// Returns the next piece of the text.
    async fn piece(&mut self) -> Result<String, CatalogError> {
        let left = std::mem::take(&mut self.left);
        let (found, left) = self
            .anchor
            .catalog
            .some_paths(self.cache, left, PIECE_BYTES)
            .await?;
        self.left = left;
        self.is_over = self.left.is_empty();
        let mut text = String::new();
        if !self.has_begun {
            text.push_str("{\"narinfos\":{");
        }
        for PathRow { hash, narinfo, .. } in found {
            if std::mem::replace(&mut self.has_begun, true) {
                text.push(',');
            }
            // As JSON writes a string.
            let narinfo = serde_json::Value::from(narinfo);
            text.push_str(&format!("\"{hash}\":{narinfo}"));
        }
        if self.is_over {
            text.push_str("}}");
        }
        Ok(text)
    }

    /// Answers with the first piece and all that follow. One whose reader does not come for them loses its turn, and
    /// its connection when it does.
    fn into_stream(mut self, first: String) -> impl Stream<Item = io::Result<Bytes>> {
        let (sender, pieces) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut piece = Ok((first, false));
            loop {
                let is_last = !matches!(piece, Ok((_, false)));
                let sent = tokio::time::timeout(PIECE_TIMEOUT, sender.send(piece)).await;
                if is_last || !matches!(sent, Ok(Ok(()))) {
                    return;
                }
                piece = self.piece().await.map(|text| (text, self.is_over));
            }
        });
        stream::try_unfold(Some(pieces), async |pieces| {
            let Some(mut pieces) = pieces else {
                return Ok(None);
            };
            match pieces.recv().await {
                None => Err(io::ErrorKind::TimedOut.into()),
                Some(Err(error)) => Err(io::Error::other(error)),
                Some(Ok((text, is_over))) => {
                    let pieces = (!is_over).then_some(pieces);
                    Ok(Some((Bytes::from(text), pieces)))
                }
            }
        })
    }
}

/// Reads hashes of store paths that a client sent.
pub fn parse_hashes(texts: &[String], max: usize) -> Result<Vec<StorePathHash>, Refusal> {
    if texts.len() > max {
        let message = format!("{} hashes, at most {max} are answered at once", texts.len());
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestError",
            message,
        ));
    }
    let hashes = texts.iter().map(|hash| hash.parse());
    hashes.collect::<Result<_, _>>().map_err(
        |error: granary_protocol::store_path::StorePathError| {
            Refusal::bad_request(error.to_string())
        },
    )
}
