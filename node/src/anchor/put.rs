//! Putting: what `nix copy --to http://…/<cache>` sends.
//!
//! Nix puts each NAR under the hash of its compressed file, then the narinfo that names it, references
//! first. The NAR is taken in at once, whatever its compression, and remembered under the name it came
//! with; the narinfo publishes it. What is served later is our own narinfo, with our own URL and
//! signature. Logs, listings and realisations are kept as they came.

use std::sync::Arc;

use ::http::header::CONTENT_ENCODING;
use ::http::{HeaderMap, StatusCode, request::Parts};
use bytes::Bytes;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::hash::FileHash;
use granary_protocol::narinfo::{NARINFO_BYTES_MAX, NarInfo};
use granary_protocol::token::Permission;
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use serde::de::IgnoredAny;

use super::Anchor;
use super::cache::CacheName;
use super::catalog::{CacheRow, StoredNar};
use super::http::{Answer, Refusal, empty, small_body};
use super::ingest::IngestError;
use super::intake::{Encoding, Intake};

/// Largest log, listing or realisation: they are handled in memory.
pub const FILE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Longest name of such a file; the longest of Nix's is a store path with its output.
const FILE_NAME_BYTES_MAX: usize = 400;

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
    anchor.keep_nar(cache, taken, file.to_owned()).await?;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    pub encoding: Option<String>,
    pub body: Bytes,
}

impl StoredFile {
    fn to_object(&self) -> Bytes {
        let line = format!("{}\n", self.encoding.as_deref().unwrap_or_default());
        [line.as_bytes(), &self.body].concat().into()
    }

    pub fn from_object(object: Bytes) -> Option<StoredFile> {
        let end = object.iter().position(|byte| *byte == b'\n')?;
        let encoding = std::str::from_utf8(&object[..end]).ok()?.to_owned();
        let encoding = Some(encoding).filter(|encoding| !encoding.is_empty());
        Some(StoredFile {
            encoding,
            body: object.slice(end + 1..),
        })
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
    let body = small_body(body, FILE_BYTES_MAX).await?;
    if name.kind != "log" && encoding.is_none() {
        let json = serde_json::from_slice::<IgnoredAny>(&body);
        json.map_err(|error| Refusal::bad_request(format!("the file is not json: {error}")))?;
    }
    let file = StoredFile { encoding, body };
    let key = cache.name.file_key(name.key());
    anchor.storage.put(&key, file.to_object()).await?;
    Ok(empty(StatusCode::CREATED))
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

    #[test]
    fn stored_files_come_back_with_their_encoding() {
        for encoding in [None, Some("br".to_owned())] {
            let file = StoredFile {
                encoding,
                body: Bytes::from_static(b"\nbody\n"),
            };
            assert_eq!(StoredFile::from_object(file.to_object()), Some(file));
        }
        assert_eq!(
            StoredFile::from_object(Bytes::from_static(b"no line")),
            None
        );
    }
}
