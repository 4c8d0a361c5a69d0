//! Kept: what of an upload outlives the anchor, so that a restart costs a frame and not a NAR.
//!
//! In the spool, beside each other: `upload-<id>.json`, what was promised, and `upload-<id>.nar`, the frames
//! that came in. Both go with the upload, complete or refused. After a crash the frames that are whole are
//! read again, hashed and decoded as when they came; the rest is cut off. Nothing of it is believed: the NAR
//! is proved at its end like any other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use granary_protocol::narinfo::{NARINFO_BYTES_MAX, NarInfo};
use granary_protocol::nix32;
use granary_protocol::store_path::StoreDir;
use serde::{Deserialize, Serialize};
use tracing::{debug, error};

use super::ID_BYTES;
use crate::anchor::cache::CacheName;
use crate::anchor::intake::{Intake, IntakeError};

/// Largest note: a narinfo as JSON.
const NOTE_BYTES_MAX: u64 = 2 * NARINFO_BYTES_MAX as u64;

const PREFIX: &str = "upload-";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    cache: String,
    narinfo: String,
}

/// Whether a text is an id of ours, and may be part of a file's name.
fn is_id(text: &str) -> bool {
    nix32::decode(text).is_ok_and(|bytes: Vec<u8>| bytes.len() == ID_BYTES)
}

fn frames_file(spool: &Path, id: &str) -> PathBuf {
    spool.join(format!("{PREFIX}{id}.nar"))
}

fn note_file(spool: &Path, id: &str) -> PathBuf {
    spool.join(format!("{PREFIX}{id}.json"))
}

/// Begins to take in a NAR that is kept. Blocks.
pub fn begin(
    spool: &Path,
    id: &str,
    cache: &CacheName,
    narinfo: &NarInfo,
    dir: &StoreDir,
) -> Result<Intake, IntakeError> {
    let note = Note {
        cache: cache.to_string(),
        narinfo: narinfo.to_text(dir),
    };
    let path = note_file(spool, id);
    let text = serde_json::to_vec(&note).map_err(io::Error::other);
    let written = text.and_then(|text| fs::write(&path, text));
    let written = written.map_err(|source| IntakeError::Spool { path, source });
    let begun = written.and_then(|()| Intake::kept(frames_file(spool, id), narinfo.nar_size));
    if begun.is_err() {
        // The disk may be full, and need every byte.
        remove(spool, id);
    }
    begun
}

/// Takes up an upload to this cache that another run of the anchor began; `None` when there is none that is of
/// use. Blocks, for some seconds with a large one.
pub fn revive(
    spool: &Path,
    id: &str,
    cache: &CacheName,
    dir: &StoreDir,
) -> Option<(NarInfo, Intake)> {
    if !is_id(id) {
        return None;
    }
    let path = note_file(spool, id);
    if fs::metadata(&path).ok()?.len() > NOTE_BYTES_MAX {
        return None;
    }
    let note: Note = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    if note.cache != cache.as_str() {
        return None;
    }
    let narinfo = NarInfo::parse(&note.narinfo, dir).ok()?;
    match Intake::resume(frames_file(spool, id), narinfo.nar_size) {
        Ok(intake) => Some((narinfo, intake)),
        Err(error) => {
            debug!(%error, "could not take up an upload");
            remove(spool, id);
            None
        }
    }
}

/// Removes what there is of an upload.
pub fn remove(spool: &Path, id: &str) {
    forget(spool, id);
    delete(&frames_file(spool, id));
}

/// Removes the note of an upload, without which it is not taken up.
pub fn forget(spool: &Path, id: &str) {
    delete(&note_file(spool, id));
}

/// Removes from the spool what the last run left, but for uploads that were touched within `young`. Blocks.
pub fn sweep(spool: &Path, young: Duration) {
    for (path, id) in files(spool) {
        match id {
            Some(id) if is_young(spool, &id, young) => continue,
            // Both at once, or its note would look like one that has just begun.
            Some(id) => remove(spool, &id),
            None => {}
        }
        delete(&path);
    }
}

/// Removes uploads that were not touched within `young`, unless they are known. Blocks.
pub fn expire(spool: &Path, young: Duration, is_known: impl Fn(&str) -> bool) {
    for (_, id) in files(spool) {
        if let Some(id) = id.filter(|id| !is_known(id) && !is_young(spool, id, young)) {
            debug!(id, "removed an upload that nobody went on with");
            remove(spool, &id);
        }
    }
}

/// Every file of the spool, with the id of its upload if it has one.
fn files(spool: &Path) -> impl Iterator<Item = (PathBuf, Option<String>)> {
    let entries = fs::read_dir(spool).into_iter().flatten().flatten();
    entries.map(|entry| {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let id = id.and_then(|name| name.split_once('.')).map(|(id, _)| id);
        (entry.path(), id.map(str::to_owned))
    })
}

fn is_young(spool: &Path, id: &str, young: Duration) -> bool {
    // The frames are the last that is touched; one that has just begun has none.
    let about = fs::metadata(frames_file(spool, id));
    let about = about.or_else(|_| fs::metadata(note_file(spool, id)));
    let touched = about.and_then(|about| about.modified());
    let age = touched.map(|touched| SystemTime::now().duration_since(touched));
    // A time to come is one of a moment ago, by another clock.
    age.is_ok_and(|age| age.unwrap_or_default() < young)
}

fn delete(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            error!(path = %path.display(), %error, "could not remove a file from the spool");
        }
        _ => {}
    }
}
