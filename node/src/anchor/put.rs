//! Putting: what `nix copy --to http://…/<cache>` sends.
//!
//! Nix puts each NAR under the hash of its compressed file, then the narinfo that names it, references
//! first. The NAR is taken in at once, whatever its compression, and remembered under the name it came
//! with; the narinfo publishes it. What is served later is our own narinfo, with our own URL and
//! signature. Logs, listings and realisations are kept as they came, by way of the spool.

use std::io::{BufReader, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use ::http::header::CONTENT_ENCODING;
use ::http::{HeaderMap, StatusCode, request::Parts};
use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::hash::FileHash;
use granary_protocol::narinfo::{NARINFO_BYTES_MAX, NarInfo};
use granary_protocol::token::Permission;
use http_body_util::{BodyDataStream, Limited};
use hyper::body::Incoming;
use serde::de::IgnoredAny;
use tempfile::TempPath;
use tokio::io::AsyncWriteExt;

use super::Anchor;
use super::cache::CacheName;
use super::catalog::{CacheRow, StoredNar};
use super::http::{Answer, Refusal, broken_body, empty, in_time, small_body};
use super::ingest::IngestError;
use super::intake::{Encoding, Intake, IntakeError};
use super::object_store::{StorageError, Whole};
use super::sizes::Filling;

/// Largest log, listing or realisation. Logs of whole systems have some MiB.
const FILE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Longest name of such a file; the longest of Nix's is a store path with its output.
const FILE_NAME_BYTES_MAX: usize = 400;

/// Most bytes before the line of such a file ends: an encoding is one word.
const LINE_BYTES_MAX: usize = 64;

/// Encodings under which such a file may be kept: what Nix can undo.
const FILE_ENCODINGS: [&str; 5] = ["gzip", "br", "zstd", "xz", "bzip2"];

/// Answers PUT below a cache.
pub async fn answer(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    name: &CacheName,
    rest: &[&str],
    body: &mut Incoming,
) -> Answer {
    let (cache, bearer) = anchor.cache_for(parts, name, Permission::Push).await?;
    let subject = bearer.subject();
    match rest {
        ["nix-cache-info"] => cache_info(&cache, body).await,
        ["nar", file] => nar(anchor, &cache, subject, file, body).await,
        [file] if file.ends_with(".narinfo") => {
            narinfo(anchor, parts, &cache, subject, file, body).await
        }
        _ => match FileName::of(rest) {
            Some(name) => store_file(anchor, parts, &cache, &name, body).await,
            None => Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "RequestError",
                "a cache has no such file",
            )),
        },
    }
}

/// A client that finds no cache tries to make one by this; ours are there already.
async fn cache_info(cache: &CacheRow, body: &mut Incoming) -> Answer {
    let text = small_body(body, granary_protocol::cache_info::CACHE_INFO_BYTES_MAX).await?;
    let text = String::from_utf8_lossy(&text);
    let dir = cache
        .settings
        .store_dir()
        .map_err(|error| Refusal::ours(&error))?;
    let info = CacheInfo::parse(&text, &dir);
    let info = info.map_err(|error| Refusal::bad_request(error.to_string()))?;
    match info.store_dir == dir {
        true => Ok(empty(StatusCode::OK)),
        false => Err(Refusal::bad_request(format!(
            "this cache holds paths of {dir}, not of {}",
            info.store_dir
        ))),
    }
}

async fn nar(
    anchor: &Arc<Anchor>,
    cache: &CacheRow,
    subject: Option<&str>,
    file: &str,
    body: &mut Incoming,
) -> Answer {
    let (file_hash, encoding) = name_of_nar(file)?;
    let slot = anchor.intakes.acquire().await;
    // One that came before is only hashed, and kept as if it came for the first time.
    let known = anchor
        .catalog
        .hold_received(cache.id, file.to_owned(), anchor.now())
        .await?;
    if known.is_none() {
        anchor.check_full(cache, subject).await?;
    }
    let spool = known.is_none().then_some(anchor.spool.as_path());
    let intake = Intake::new(spool, anchor.nar_bytes_max).map_err(IngestError::from)?;
    let (intake, outcome) = intake.fill(BodyDataStream::new(body), encoding).await;
    let about = outcome.map_err(IngestError::from)?;
    if about.hash != file_hash {
        return Err(Refusal::bad_request(format!(
            "the body is {}, its name says {file_hash}",
            about.hash
        )));
    }
    let Some(intake) = intake else {
        return Err(Refusal::bad_request("the body ended early"));
    };
    let taken = tokio::task::spawn_blocking(move || intake.finish()).await;
    let taken = taken
        .map_err(|error| Refusal::ours(&error))?
        .map_err(IngestError::from)?;
    // No path says yet whose it is, so the quota of its subject counts it with the narinfo.
    let filling = match &taken.packed {
        Some((packed, _)) => {
            anchor
                .check_quota(cache, subject, taken.nar_hash, packed.file_size)
                .await?
        }
        None => Filling::default(),
    };
    anchor.keep_nar(cache, taken, file.to_owned()).await?;
    anchor.filled(cache, None, filling);
    drop(slot);
    Ok(empty(StatusCode::CREATED))
}

/// Reads `<hash>.nar`, `<hash>.nar.xz` and so on.
pub(super) fn name_of_nar(file: &str) -> Result<(FileHash, Encoding), Refusal> {
    let refuse = || Refusal::bad_request(format!("{file:?} is no name of a nar"));
    let (hash, extension) = file.split_once(".nar").ok_or_else(refuse)?;
    let hash = FileHash::from_nix32(hash).map_err(|_| refuse())?;
    let encoding = match extension {
        "" => Encoding::Bare,
        ".zst" => Encoding::Zstd,
        ".xz" => Encoding::Xz,
        ".bz2" => Encoding::Bzip2,
        ".br" => Encoding::Brotli,
        ".gz" => Encoding::Gzip,
        ".lz4" | ".lzip" | ".lzma" => {
            return Err(Refusal::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "RequestError",
                format!(
                    "nars are taken as none, zstd, xz, bzip2, gzip or br, not as {extension}: add ?compression=zstd to the store's address"
                ),
            ));
        }
        _ => return Err(refuse()),
    };
    Ok((hash, encoding))
}

async fn narinfo(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    subject: Option<&str>,
    file: &str,
    body: &mut Incoming,
) -> Answer {
    let hash = file.trim_end_matches(".narinfo").parse();
    let hash =
        hash.map_err(|_| Refusal::bad_request(format!("{file:?} is no name of a narinfo")))?;
    let bytes = small_body(body, NARINFO_BYTES_MAX).await?;
    let bytes = decoded(&parts.headers, bytes)?;
    let text = std::str::from_utf8(&bytes);
    let text = text.map_err(|_| Refusal::bad_request("the narinfo is not utf-8"))?;
    let dir = cache
        .settings
        .store_dir()
        .map_err(|error| Refusal::ours(&error))?;
    let narinfo = NarInfo::parse(text, &dir);
    let narinfo = narinfo.map_err(|error| Refusal::bad_request(error.to_string()))?;
    let path = &narinfo.store_path;
    if path.hash() != hash {
        return Err(Refusal::bad_request(format!(
            "the narinfo of {path} was put as {file}"
        )));
    }
    let stored = named_nar(anchor, cache, &narinfo).await?;
    if stored.nar_hash != narinfo.nar_hash {
        return Err(IngestError::NarHash {
            path: path.clone(),
            found: stored.nar_hash,
            promised: narinfo.nar_hash,
        }
        .into());
    }
    let subject = subject.map(str::to_owned);
    anchor.describe(cache, narinfo, stored, subject).await?;
    anchor.catalog.described(cache.id, stored.nar_hash).await?;
    Ok(empty(StatusCode::CREATED))
}

/// Finds the NAR that a narinfo names: as it came, or by our own URL when the narinfo was ours.
async fn named_nar(
    anchor: &Arc<Anchor>,
    cache: &CacheRow,
    narinfo: &NarInfo,
) -> Result<StoredNar, Refusal> {
    let no_nar = || IngestError::NoNar {
        path: narinfo.store_path.clone(),
    };
    let file = narinfo.url.strip_prefix("nar/").ok_or_else(no_nar)?;
    if let Some(stored) = anchor
        .catalog
        .received_as(cache.id, file.to_owned())
        .await?
    {
        return Ok(stored);
    }
    let is_own = narinfo.url == super::nar_url(&narinfo.nar_hash)
        && anchor
            .catalog
            .cache_has_nar(cache.id, narinfo.nar_hash)
            .await?;
    let stored = match is_own {
        true => anchor.catalog.nar(narinfo.nar_hash).await?,
        false => None,
    };
    Ok(stored.ok_or_else(no_nar)?)
}

/// Undoes the encoding of a narinfo (`narinfo-compression`), since ours is another text anyway.
fn decoded(headers: &HeaderMap, bytes: Bytes) -> Result<Bytes, Refusal> {
    let Some(encoding) = headers.get(CONTENT_ENCODING) else {
        return Ok(bytes);
    };
    let refuse =
        |problem: String| Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "RequestError", problem);
    let limited = |reader: &mut dyn std::io::Read| {
        let mut text = Vec::new();
        let mut reader = std::io::Read::take(reader, NARINFO_BYTES_MAX as u64 + 1);
        std::io::Read::read_to_end(&mut reader, &mut text)
            .map_err(|error| refuse(format!("the narinfo cannot be decompressed: {error}")))?;
        match text.len() > NARINFO_BYTES_MAX {
            true => Err(refuse("the narinfo is too long".to_owned())),
            false => Ok(Bytes::from(text)),
        }
    };
    match encoding.to_str().unwrap_or_default() {
        "" | "identity" | "none" => Ok(bytes),
        "zstd" => {
            let mut reader = zstd::stream::read::Decoder::with_buffer(&bytes[..])
                .map_err(|error| refuse(error.to_string()))?;
            limited(&mut reader)
        }
        "xz" => limited(&mut liblzma::bufread::XzDecoder::new_multi_decoder(
            &bytes[..],
        )),
        "bzip2" => limited(&mut bzip2::bufread::MultiBzDecoder::new(&bytes[..])),
        "gzip" => limited(&mut flate2::bufread::MultiGzDecoder::new(&bytes[..])),
        "br" => limited(&mut brotli::Decompressor::new(
            &bytes[..],
            NARINFO_BYTES_MAX,
        )),
        other => Err(refuse(format!(
            "narinfos are taken as they are, or as zstd, xz, bzip2, gzip or br, not as {other:?}"
        ))),
    }
}

/// The name of a file that a cache keeps beside narinfos and NARs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName {
    kind: &'static str,
    key: String,
}

impl FileName {
    /// Reads the rest of an address; `None` for what no cache has.
    pub fn of(rest: &[&str]) -> Option<FileName> {
        let (kind, name) = match rest {
            [file] if file.ends_with(".ls") => ("ls", (*file).to_owned()),
            [kind @ ("log" | "realisations" | "debuginfo"), file] => {
                (known(kind)?, (*file).to_owned())
            }
            ["build-trace-v2", derivation, output] => {
                ("build-trace-v2", format!("{derivation}/{output}"))
            }
            _ => return None,
        };
        let name = name
            .replace("%3A", ":")
            .replace("%3a", ":")
            .replace("%21", "!");
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=:!/".contains(&byte);
        let is_name = !name.is_empty()
            && name.len() <= FILE_NAME_BYTES_MAX
            && name.bytes().all(is_allowed)
            && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        // Keys keep to what every storage takes: the rest is spelled out, `_` first of all.
        let mut key = format!("{kind}/");
        for character in name.chars() {
            match character {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.' | '+' | '=' | '/' => {
                    key.push(character)
                }
                other => key.push_str(&format!("_{:02x}", u32::from(other))),
            }
        }
        is_name.then_some(FileName { kind, key })
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn content_type(&self) -> &'static str {
        match self.kind {
            "log" => "text/plain; charset=utf-8",
            _ => "application/json",
        }
    }
}

fn known(kind: &str) -> Option<&'static str> {
    ["log", "realisations", "debuginfo"]
        .into_iter()
        .find(|known| *known == kind)
}

/// Such a file as it lies in the bucket: a line with its encoding, then its bytes.
pub struct StoredFile {
    pub encoding: Option<String>,
    pub size: u64,
    pub version: Option<String>,
    pub body: BoxStream<'static, Result<Bytes, StorageError>>,
}

impl StoredFile {
    /// Reads the line; `None` of an object without one.
    pub async fn open(object: Whole) -> Result<Option<StoredFile>, StorageError> {
        let Whole {
            size,
            version,
            mut bytes,
        } = object;
        let mut head = BytesMut::new();
        let end = loop {
            if let Some(end) = head.iter().position(|byte| *byte == b'\n') {
                break end;
            }
            match bytes.try_next().await? {
                Some(more) if head.len() <= LINE_BYTES_MAX => head.extend_from_slice(&more),
                _ => return Ok(None),
            }
        };
        let first = head.split_off(end + 1).freeze();
        let Ok(encoding) = String::from_utf8(head[..end].to_vec()) else {
            return Ok(None);
        };
        Ok(Some(StoredFile {
            encoding: Some(encoding).filter(|encoding| !encoding.is_empty()),
            size: size.saturating_sub(end as u64 + 1),
            version,
            body: stream::once(async { Ok(first) }).chain(bytes).boxed(),
        }))
    }
}

async fn store_file(
    anchor: &Arc<Anchor>,
    parts: &Parts,
    cache: &CacheRow,
    name: &FileName,
    body: &mut Incoming,
) -> Answer {
    let encoding = match parts
        .headers
        .get(CONTENT_ENCODING)
        .map(|value| value.to_str())
    {
        None | Some(Ok("" | "identity" | "none")) => None,
        Some(Ok(encoding)) if FILE_ENCODINGS.contains(&encoding) => Some(encoding.to_owned()),
        Some(_) => {
            return Err(Refusal::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "RequestError",
                format!(
                    "a file may be encoded as one of {}",
                    FILE_ENCODINGS.join(", ")
                ),
            ));
        }
    };
    // With a slot, so that slow senders of files are no more than those of NARs.
    let _slot = anchor.intakes.acquire().await;
    let line = format!("{}\n", encoding.as_deref().unwrap_or_default());
    let file = spooled(&anchor.spool, &line, body).await?;
    if name.kind != "log" && encoding.is_none() {
        let (path, skip) = (file.to_path_buf(), line.len() as u64);
        let checked = tokio::task::spawn_blocking(move || check_json(&path, skip)).await;
        checked.map_err(|error| Refusal::ours(&error))??;
    }
    let key = cache.name.file_key(name.key());
    anchor.storage.put_file(&key, &file).await?;
    Ok(empty(StatusCode::CREATED))
}

/// Writes a line and the body after it into a file of the spool, which goes when it is dropped.
async fn spooled(spool: &Path, line: &str, body: &mut Incoming) -> Result<TempPath, Refusal> {
    let failed = |source| {
        Refusal::from(IngestError::from(IntakeError::Spool {
            path: spool.to_owned(),
            source,
        }))
    };
    let made = tempfile::Builder::new().prefix("file-").tempfile_in(spool);
    let (file, path) = made.map_err(failed)?.into_parts();
    let mut file = tokio::fs::File::from_std(file);
    let reading = async {
        file.write_all(line.as_bytes()).await.map_err(failed)?;
        let mut body = BodyDataStream::new(Limited::new(body, FILE_BYTES_MAX));
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(|error| broken_body(&*error, FILE_BYTES_MAX))?;
            file.write_all(&bytes).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)
    };
    in_time(reading).await?;
    Ok(path)
}

/// Refuses a file that is not JSON after so many bytes. Blocks.
fn check_json(path: &Path, skip: u64) -> Result<(), Refusal> {
    let ours = |error: std::io::Error| Refusal::ours(&error);
    let mut file = std::fs::File::open(path).map_err(ours)?;
    file.seek(SeekFrom::Start(skip)).map_err(ours)?;
    let json: Result<IgnoredAny, _> = serde_json::from_reader(BufReader::new(file));
    let json = json.map(drop);
    json.map_err(|error| Refusal::bad_request(format!("the file is not json: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nars_tell_their_encoding() {
        let hash = "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s";
        for (extension, expected) in [
            ("", Some(Encoding::Bare)),
            (".xz", Some(Encoding::Xz)),
            (".zst", Some(Encoding::Zstd)),
            (".bz2", Some(Encoding::Bzip2)),
            (".br", Some(Encoding::Brotli)),
            (".gz", Some(Encoding::Gzip)),
            (".lz4", None),
            (".exe", None),
            (".xz/..", None),
        ] {
            let encoding = name_of_nar(&format!("{hash}.nar{extension}"))
                .ok()
                .map(|(_, encoding)| encoding);
            assert_eq!(encoding, expected, "{extension}");
        }
        for bad in ["", ".nar", "x.nar", "../x.nar", hash] {
            assert!(name_of_nar(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_beside_narinfos_have_keys_that_every_storage_takes() {
        let check = |rest: &[&str], key: Option<&str>| {
            let name = FileName::of(rest);
            assert_eq!(name.as_ref().map(FileName::key), key, "{rest:?}");
        };
        check(&["abc.ls"], Some("ls/abc.ls"));
        check(&["log", "abc-x_1.drv"], Some("log/abc-x_5f1.drv"));
        check(
            &["realisations", "sha256:00!out.doi"],
            Some("realisations/sha256_3a00_21out.doi"),
        );
        check(
            &["realisations", "sha256%3A00%21out.doi"],
            Some("realisations/sha256_3a00_21out.doi"),
        );
        check(
            &["build-trace-v2", "abc.drv", "out.doi"],
            Some("build-trace-v2/abc.drv/out.doi"),
        );
        for bad in [
            &["log", ".."][..],
            &["log", ""],
            &["log", "a%2fb"],
            &["etc", "passwd"],
            &["build-trace-v2", "..", "x"],
            &["log", "a\nb"],
            &[],
        ] {
            check(bad, None);
        }
        check(&["log", &"a".repeat(401)], None);
    }

    #[tokio::test]
    async fn stored_files_come_back_with_their_encoding() {
        let check = async |object: &'static [u8], chunk: usize, expected: Option<(&str, &[u8])>| {
            let chunks: Vec<_> = object
                .chunks(chunk)
                .map(Bytes::from_static)
                .map(Ok)
                .collect();
            let whole = Whole {
                size: object.len() as u64,
                version: None,
                bytes: stream::iter(chunks).boxed(),
            };
            let file = StoredFile::open(whole).await.unwrap();
            let Some(file) = file else {
                return assert_eq!(expected, None);
            };
            let (encoding, size) = (file.encoding.unwrap_or_default(), file.size);
            let body: Vec<Bytes> = file.body.try_collect().await.unwrap();
            let body = body.concat();
            assert_eq!(expected, Some((&encoding[..], &body[..])));
            assert_eq!(size, body.len() as u64);
        };
        for chunk in [1, 3, 1000] {
            check(b"\n\nbody\n", chunk, Some(("", b"\nbody\n"))).await;
            check(b"br\nbody", chunk, Some(("br", b"body"))).await;
            check(b"br\n", chunk, Some(("br", b""))).await;
            check(b"no line", chunk, None).await;
        }
        check(&[b'x'; 1000], 10, None).await;
    }
}
