//! Attic's API, so that its client and CI that uses it keep working (PEERS.md §A).
//!
//! `/_api/v1/cache-config/<cache>` (GET, POST, PATCH, DELETE), `/_api/v1/get-missing-paths`,
//! `/_api/v1/upload-path`. An upload is a raw NAR with its metadata as JSON in a header or before the
//! body. Closures come in any order here, so references are checked for form only when the cache
//! leaves paths to an upstream, as caches made by this client do.
//!
//! Against Attic: metadata is validated, a malformed hash is 400 and not 500, a refusal says why, and
//! `"retention_period": "Global"`, which its client sends with every change, counts as "not mentioned"
//! from a token that may not change it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use ::http::header::HeaderName;
use ::http::{Method, StatusCode, request::Parts};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::{Compression, NarInfo, REFERENCES_MAX, SIGNATURES_MAX};
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::{StoreDir, StorePath, StorePathError};
use granary_protocol::token::Permission;
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};

use super::admin::Changes;
use super::cache::CacheName;
use super::catalog::CacheRow;
use super::http::{Answer, Refusal, empty, is_secure, json_body};
use super::ingest::{IngestError, Outcome};
use super::intake::{Encoding, Intake};
use super::read::parse_hashes;
use super::{Anchor, to_its_end};
use crate::serve::respond;

/// Hashes in one question for missing paths: the client sends a whole closure at once.
const MISSING_MAX: usize = 100_000;

/// Bytes of that: 36 for each hash, as JSON.
const MISSING_BYTES_MAX: usize = MISSING_MAX * 40;

/// Largest settings.
const SETTINGS_BYTES_MAX: usize = 64 * 1024;

/// Largest metadata of one path, in a header or before its body.
const METADATA_BYTES_MAX: usize = 1024 * 1024;

const METADATA: HeaderName = HeaderName::from_static("x-attic-nar-info");
const PREAMBLE_SIZE: HeaderName = HeaderName::from_static("x-attic-nar-info-preamble-size");
const VISIBILITY: HeaderName = HeaderName::from_static("x-attic-cache-visibility");

/// Answers what is below `/_api/v1/`.
pub async fn answer(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    rest: &[&str],
    body: &mut Incoming,
) -> Answer {
    match (rest, &parts.method) {
        (["cache-config", name], method) => {
            let name = CacheName::new(name)?;
            match *method {
                Method::GET | Method::HEAD => cache_config(anchor, parts, &name).await,
                Method::POST => create(anchor, parts, &name, body).await,
                Method::PATCH => configure(anchor, parts, &name, body).await,
                Method::DELETE => destroy(anchor, parts, &name).await,
                _ => Err(method_not_allowed()),
            }
        }
        (["get-missing-paths"], &Method::POST) => missing(anchor, parts, body).await,
        (["upload-path"], &Method::PUT) => upload(anchor, parts, body).await,
        (["get-missing-paths" | "upload-path"], _) => Err(method_not_allowed()),
        _ => Err(Refusal::not_found("there is nothing at this address")),
    }
}

fn method_not_allowed() -> Refusal {
    let message = "this method is not answered here";
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "RequestError", message)
}

/// How long paths are kept: for as long as the server says, or this many seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Retention {
    Global,
    Period(u64),
}

#[derive(Serialize)]
struct Config {
    substituter_endpoint: String,
    api_endpoint: String,
    public_key: String,
    is_public: bool,
    store_dir: String,
    priority: i32,
    upstream_cache_key_names: Vec<String>,
    retention_period: Retention,
}

/// Answers what `attic use` and every push begin with.
pub async fn cache_config(anchor: &Arc<Anchor>, parts: &Parts, name: &CacheName) -> Answer {
    // Who may do anything to a cache may know what it is.
    let read = anchor.cache_for(parts, name, Permission::Pull).await;
    let (cache, _) = match read {
        Ok(found) => found,
        Err(refusal) => known_cache(anchor, parts, name).await?.ok_or(refusal)?,
    };
    let endpoint = endpoint(parts)?;
    let settings = cache.settings;
    let is_public = settings.public;
    let config = Config {
        // Joined with `Url::join`, so an endpoint must end in a slash and a cache must not.
        substituter_endpoint: format!("{endpoint}{name}"),
        api_endpoint: endpoint,
        public_key: settings.public_keys.into_iter().next().unwrap_or_default(),
        is_public,
        store_dir: settings.store_dir,
        priority: settings.priority,
        upstream_cache_key_names: settings.upstream_keys,
        retention_period: settings
            .retention
            .map_or(Retention::Global, Retention::Period),
    };
    let text = serde_json::to_string(&config).map_err(|error| Refusal::ours(&error))?;
    let mut response = respond::json(text);
    if is_public {
        super::http::set(&mut response, VISIBILITY, "public");
    }
    Ok(response)
}

/// The cache, if the bearer may do anything at all to it.
async fn known_cache(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
) -> Result<Option<(CacheRow, super::tokens::Bearer)>, Refusal> {
    for permission in Permission::ALL {
        if let Ok(found) = anchor.cache_for(parts, name, permission).await {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The address under which the client reached us.
fn endpoint(parts: &Parts) -> Result<String, Refusal> {
    let host = parts.headers.get(::http::header::HOST);
    let host = host.and_then(|host| host.to_str().ok());
    // HTTP/2 has it in the address.
    let host = host.or(parts.uri.authority().map(|authority| authority.as_str()));
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    match host {
        Some(host) if !host.is_empty() && host.bytes().all(is_allowed) => {
            let scheme = match is_secure(parts) {
                true => "https",
                false => "http",
            };
            Ok(format!("{scheme}://{host}/"))
        }
        _ => Err(Refusal::bad_request("the request has no usable Host")),
    }
}

#[derive(Deserialize)]
enum Keypair {
    Generate,
    Keypair(String),
}

impl Keypair {
    fn key(&self) -> Result<Option<SecretKey>, Refusal> {
        match self {
            Keypair::Generate => Ok(None),
            Keypair::Keypair(text) => {
                let key = text.parse::<SecretKey>();
                key.map(Some)
                    .map_err(|error| Refusal::bad_request(error.to_string()))
            }
        }
    }
}

#[derive(Deserialize)]
struct Create {
    keypair: Keypair,
    is_public: bool,
    store_dir: String,
    priority: i32,
    #[serde(default)]
    upstream_cache_key_names: Vec<String>,
}

async fn create(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
    body: &mut Incoming,
) -> Answer {
    authorize(anchor, parts, name, Permission::Create).await?;
    let create: Create = json_body(body, SETTINGS_BYTES_MAX).await?;
    let changes = Changes {
        public: Some(create.is_public),
        priority: Some(create.priority),
        store_dir: Some(create.store_dir),
        upstream_keys: Some(create.upstream_cache_key_names),
        ..Changes::default()
    };
    let (creating, name, key) = (anchor.clone(), name.clone(), create.keypair.key()?);
    to_its_end(async move { creating.create_cache(&name, &changes, key).await }).await?;
    Ok(empty(StatusCode::OK))
}

#[derive(Deserialize)]
struct Configure {
    keypair: Option<Keypair>,
    is_public: Option<bool>,
    store_dir: Option<String>,
    priority: Option<i32>,
    upstream_cache_key_names: Option<Vec<String>>,
    retention_period: Option<Retention>,
}

async fn configure(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
    body: &mut Incoming,
) -> Answer {
    let bearer = authorize(anchor, parts, name, Permission::Configure).await?;
    let configure: Configure = json_body(body, SETTINGS_BYTES_MAX).await?;
    let retention = match configure.retention_period {
        None => None,
        Some(retention) => match (bearer.may(Permission::Retention, name), retention) {
            (Ok(()), Retention::Global) => Some(None),
            (Ok(()), Retention::Period(seconds)) => Some(Some(seconds)),
            // Its client sends this whatever was asked of it.
            (Err(_), Retention::Global) => None,
            (Err(denied), Retention::Period(_)) => return Err(denied.into()),
        },
    };
    let changes = Changes {
        public: configure.is_public,
        priority: configure.priority,
        store_dir: configure.store_dir,
        upstream_keys: configure.upstream_cache_key_names,
        retention,
        ..Changes::default()
    };
    if changes == Changes::default()
        && configure.keypair.is_none()
        && configure.retention_period.is_none()
    {
        return Err(Refusal::bad_request("nothing is to be changed"));
    }
    if let Some(keypair) = &configure.keypair {
        let (changing, name, key) = (anchor.clone(), name.clone(), keypair.key()?);
        to_its_end(async move { changing.rotate_key(&name, key, false).await }).await?;
    }
    let (changing, name) = (anchor.clone(), name.clone());
    to_its_end(async move { changing.configure_cache(&name, &changes).await }).await?;
    Ok(empty(StatusCode::OK))
}

async fn destroy(anchor: &Arc<Anchor>, parts: &Parts, name: &CacheName) -> Answer {
    authorize(anchor, parts, name, Permission::Destroy).await?;
    let (deleting, name) = (anchor.clone(), name.clone());
    to_its_end(async move { deleting.delete_cache(&name).await }).await?;
    Ok(empty(StatusCode::OK))
}

/// Proves a permission on a cache that may or may not exist.
async fn authorize(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
    permission: Permission,
) -> Result<super::tokens::Bearer, Refusal> {
    let bearer = anchor.bearer(parts).await?;
    bearer.may(permission, name)?;
    Ok(bearer)
}

#[derive(Deserialize)]
struct MissingQuestion {
    cache: String,
    store_path_hashes: Vec<String>,
}

#[derive(Serialize)]
struct MissingAnswer {
    missing_paths: Vec<String>,
}

async fn missing(anchor: &Arc<Anchor>, parts: &Parts, body: &mut Incoming) -> Answer {
    // The cache is named in the body, which strangers need not send.
    require_somebody(anchor, parts).await?;
    let question: MissingQuestion = json_body(body, MISSING_BYTES_MAX).await?;
    let name = CacheName::new(&question.cache)?;
    let (cache, _) = anchor.cache_for(parts, &name, Permission::Push).await?;
    let hashes = parse_hashes(&question.store_path_hashes, MISSING_MAX)?;
    let missing = anchor.missing(cache.id, hashes).await?;
    let answer = MissingAnswer {
        missing_paths: missing.iter().map(ToString::to_string).collect(),
    };
    let text = serde_json::to_string(&answer).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::json(text))
}

async fn require_somebody(anchor: &Arc<Anchor>, parts: &Parts) -> Result<(), Refusal> {
    match anchor.bearer(parts).await? {
        super::tokens::Bearer::Nobody => Err(super::tokens::Denied::Unauthorized.into()),
        super::tokens::Bearer::Somebody(_) => Ok(()),
    }
}

/// What is claimed about an upload.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    pub(super) cache: String,
    pub(super) store_path_hash: String,
    pub(super) store_path: String,
    pub(super) references: Vec<String>,
    pub(super) deriver: Option<String>,
    #[serde(default)]
    pub(super) sigs: Vec<String>,
    pub(super) ca: Option<String>,
    pub(super) nar_hash: String,
    pub(super) nar_size: u64,
}

impl Metadata {
    fn read(json: &[u8]) -> Result<Metadata, Refusal> {
        serde_json::from_slice(json).map_err(|error| {
            Refusal::bad_request(format!("the nar's metadata is malformed: {error}"))
        })
    }

    /// Proves every value; what comes out can be printed line by line.
    pub(super) fn narinfo(&self, dir: &StoreDir) -> Result<NarInfo, Refusal> {
        let refuse = |field: &str, problem: String| {
            Refusal::bad_request(format!("{field} of the nar's metadata: {problem}"))
        };
        let store_path = dir.parse_path(&self.store_path);
        let store_path = store_path.map_err(|error| refuse("store_path", error.to_string()))?;
        if store_path.hash().to_string() != self.store_path_hash {
            let problem = format!("{} is not the hash of {store_path}", self.store_path_hash);
            return Err(refuse("store_path_hash", problem));
        }
        if self.references.len() > REFERENCES_MAX || self.sigs.len() > SIGNATURES_MAX {
            return Err(refuse("references", "too many".to_owned()));
        }
        let references = self.references.iter().map(|name| base_name(name, dir));
        let references: Result<BTreeSet<StorePath>, _> = references.collect();
        let nar_hash = self.nar_hash.parse::<NarHash>();
        let deriver = self
            .deriver
            .as_deref()
            .filter(|deriver| !deriver.is_empty());
        let deriver = deriver.map(|deriver| base_name(deriver, dir)).transpose();
        let ca = self
            .ca
            .as_deref()
            .filter(|ca| !ca.is_empty())
            .map(str::parse)
            .transpose();
        if self.nar_size == 0 {
            return Err(refuse("nar_size", "it is 0".to_owned()));
        }
        let dropped_signatures = self
            .sigs
            .iter()
            .filter(|sig| {
                sig.parse::<granary_protocol::signature::Signature>()
                    .is_err()
            })
            .count();
        Ok(NarInfo {
            store_path,
            nar_hash: nar_hash.map_err(|error| refuse("nar_hash", error.to_string()))?,
            nar_size: self.nar_size,
            references: references.map_err(|error| refuse("references", error.to_string()))?,
            url: "nar/unnamed".to_owned(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            deriver: deriver.map_err(|error| refuse("deriver", error.to_string()))?,
            ca: ca.map_err(
                |error: granary_protocol::content_address::ContentAddressError| {
                    refuse("ca", error.to_string())
                },
            )?,
            signatures: self
                .sigs
                .iter()
                .filter_map(|sig| sig.parse().ok())
                .collect(),
            dropped_signatures,
        })
    }
}

fn base_name(text: &str, dir: &StoreDir) -> Result<StorePath, StorePathError> {
    match text.starts_with('/') {
        true => dir.parse_path(text),
        false => StorePath::from_base_name(text),
    }
}

#[derive(Serialize)]
struct UploadAnswer {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_size: Option<u64>,
    frac_deduplicated: Option<f64>,
}

async fn upload(anchor: &Arc<Anchor>, parts: &Parts, body: &mut Incoming) -> Answer {
    require_somebody(anchor, parts).await?;
    let mut body = BodyDataStream::new(body);
    let (metadata, first) = match parts.headers.get(METADATA) {
        Some(value) => (Metadata::read(value.as_bytes())?, Bytes::new()),
        None => {
            let (json, rest) = preamble(parts, &mut body).await?;
            (Metadata::read(&json)?, rest)
        }
    };
    let name = CacheName::new(&metadata.cache)?;
    let (cache, bearer) = anchor.cache_for(parts, &name, Permission::Push).await?;
    let subject = bearer.subject();
    let dir = cache
        .settings
        .store_dir()
        .map_err(|error| Refusal::ours(&error))?;
    let narinfo = metadata.narinfo(&dir)?;
    if narinfo.nar_size > anchor.nar_bytes_max {
        return Err(Refusal::too_large(anchor.nar_bytes_max));
    }
    let _slot = anchor.intakes.acquire().await;
    // A NAR that is here is only hashed, as proof that its sender has it.
    let known = anchor.catalog.hold_nar(narinfo.nar_hash).await?;
    if known.is_none() {
        anchor.check_full(&cache, subject).await?;
    }
    let spool = known.is_none().then_some(anchor.spool.as_path());
    let intake = Intake::new(spool, narinfo.nar_size).map_err(IngestError::from)?;
    let pieces = stream::once(async move { Ok(first) });
    let pieces = std::pin::pin!(pieces.chain(body.map(|piece| piece.map_err(io::Error::other))));
    let (intake, outcome) = intake.fill(pieces, Encoding::None).await;
    outcome.map_err(IngestError::from)?;
    let Some(intake) = intake else {
        return Err(Refusal::bad_request("the body ended early"));
    };
    let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
    let taken = taken
        .map_err(|error| Refusal::ours(&error))?
        .map_err(IngestError::from)?;
    let (taken, subject) = (Arc::new(taken), subject.map(str::to_owned));
    let published = anchor.publish(&cache, narinfo, taken, subject).await?;
    let answer = match published {
        Outcome::Stored { file_size } => UploadAnswer {
            kind: "Uploaded",
            file_size: Some(file_size),
            frac_deduplicated: None,
        },
        Outcome::Known => UploadAnswer {
            kind: "Deduplicated",
            file_size: None,
            frac_deduplicated: Some(1.0),
        },
    };
    let text = serde_json::to_string(&answer).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::json(text))
}

/// Reads the metadata that stands before the NAR, and returns what of the NAR came with it.
async fn preamble(
    parts: &Parts,
    body: &mut BodyDataStream<&mut Incoming>,
) -> Result<(Bytes, Bytes), Refusal> {
    let size = parts
        .headers
        .get(PREAMBLE_SIZE)
        .and_then(|value| value.to_str().ok());
    let size = size.and_then(|size| size.parse::<usize>().ok());
    let size = size.ok_or_else(|| Refusal::bad_request("the nar's metadata is missing"))?;
    if size > METADATA_BYTES_MAX {
        return Err(Refusal::bad_request(format!(
            "the nar's metadata has {size} bytes, at most {METADATA_BYTES_MAX} are read"
        )));
    }
    let mut read = BytesMut::new();
    while read.len() < size {
        match body.next().await {
            Some(Ok(piece)) => read.extend_from_slice(&piece),
            Some(Err(_)) | None => return Err(Refusal::bad_request("the body ended early")),
        }
    }
    let json = read.split_to(size).freeze();
    Ok((json, read.freeze()))
}
