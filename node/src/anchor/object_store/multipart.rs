//! Multipart: uploads to S3 in parts, of which a killed process leaves none in the bucket for ever.
//!
//! The parts of an upload that was neither completed nor aborted are kept by S3, in no listing of objects, and paid for. So each
//! upload is noted in a file before its first part is sent, and the note goes when the upload does; what an earlier run
//! left noted is aborted by the next one. A crash between the beginning and the note leaves an upload without parts.

use std::fs;
use std::io::{self, Write};
use std::path::{Path as FilePath, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use object_store::aws::AmazonS3;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Error, MultipartId, MultipartUpload, PutPayload, PutResult, Result, UploadPart,
};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

/// Largest note read: a key of some 100 bytes and an id, for which S3 promises no length; AWS's have 128 bytes.
const NOTE_BYTES_MAX: u64 = 16 * 1024;

/// Uploads of earlier runs that one run aborts. A run has sixteen under way at most, so that this is what many crashes
/// left; the next one takes the rest.
const LEFT_MAX: usize = 1_000;

/// Where uploads go, and where they are noted; `Clone` is cheap.
#[derive(Clone)]
pub(super) struct Multipart {
    store: Arc<AmazonS3>,
    /// Of the bucket: notes about another are not ours to act on.
    location: String,
    folder: PathBuf,
}

/// What stands in a note.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    location: String,
    key: String,
    upload: MultipartId,
}

/// An upload that an earlier run left, by its note.
pub struct Left {
    file: PathBuf,
    note: Note,
}

impl Multipart {
    pub(super) fn new(store: Arc<AmazonS3>, location: &str, folder: &FilePath) -> Multipart {
        Multipart {
            store,
            location: location.to_owned(),
            folder: folder.to_owned(),
        }
    }

    /// Begins an upload and notes it.
    pub(super) async fn begin(&self, key: Path) -> Result<Box<dyn MultipartUpload>> {
        let id = self.store.create_multipart(&key).await?;
        let note = Note {
            location: self.location.clone(),
            key: key.to_string(),
            upload: id.clone(),
        };
        let folder = self.folder.clone();
        let noted = tokio::task::spawn_blocking(move || note.write(&folder)).await;
        let noted = noted.map_err(io::Error::other).flatten();
        let file = match noted {
            Ok(file) => file,
            Err(error) => {
                // It has no parts yet; the error that matters is the first.
                let _ = self.store.abort_multipart(&key, &id).await;
                return Err(Error::Generic {
                    store: "S3",
                    source: Box::new(error),
                });
            }
        };
        Ok(Box::new(Upload {
            store: self.store.clone(),
            key,
            id,
            file,
            sent: Arc::default(),
            parts: 0,
        }))
    }

    /// Returns what earlier runs left; blocks for a moment. What this run begins would be among it.
    pub(super) fn left(&self) -> io::Result<Vec<Left>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut left = Vec::new();
        for entry in entries {
            // Those of another bucket count for nothing, or enough of them would hide ours for ever.
            if left.len() >= LEFT_MAX {
                break;
            }
            let file = entry?.path();
            match Note::read(&file) {
                Ok(Some(note)) if note.location == self.location => {
                    left.push(Left { file, note });
                }
                Ok(Some(_)) => {}
                // It was never whole, so no part followed it.
                Ok(None) => forget(&file),
                // A disk in trouble must not make us forget what is paid for.
                Err(error) => {
                    warn!(file = %file.display(), %error, "could not read the note of an upload, it stays");
                }
            }
        }
        Ok(left)
    }

    /// Aborts what earlier runs left. What cannot be aborted stays noted for the next run.
    pub(super) async fn abort(&self, left: Vec<Left>) {
        for Left { file, note } in left {
            let key = note.key.as_str();
            let path = match Path::parse(key) {
                Ok(path) => path,
                Err(error) => {
                    warn!(key, %error, "an upload that was interrupted has no key");
                    continue;
                }
            };
            match self.store.abort_multipart(&path, &note.upload).await {
                Ok(()) => {
                    info!(key, "aborted an upload that was interrupted");
                    forget(&file);
                }
                // It was completed, or aborted by a rule of the bucket.
                Err(Error::NotFound { .. }) => forget(&file),
                Err(error) => {
                    warn!(key, %error, "could not abort an upload that was interrupted, trying again at the next start");
                }
            }
        }
    }
}

impl Note {
    /// Writes it under a new name; once it returns, a crash of the machine does not lose it.
    fn write(&self, folder: &FilePath) -> io::Result<PathBuf> {
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(io::Error::other)?;
        let name = format!("{:016x}", u64::from_ne_bytes(name));
        fs::create_dir_all(folder)?;
        let path = folder.join(name);
        let mut file = fs::File::create_new(&path)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::File::open(folder)?.sync_all()?;
        Ok(path)
    }

    /// Returns `None` for what is no whole note.
    fn read(file: &FilePath) -> io::Result<Option<Note>> {
        if fs::metadata(file)?.len() > NOTE_BYTES_MAX {
            return Ok(None);
        }
        let bytes = fs::read(file)?;
        Ok(serde_json::from_slice(&bytes).ok())
    }
}

/// Removes a note; one that stays costs the next run a question.
fn forget(file: &FilePath) {
    if let Err(error) = fs::remove_file(file) {
        debug!(file = %file.display(), %error, "could not remove the note of an upload");
    }
}

/// An upload under way. One that is dropped stays noted.
#[derive(Debug)]
struct Upload {
    store: Arc<AmazonS3>,
    key: Path,
    id: MultipartId,
    file: PathBuf,
    /// What S3 said of the parts that it has, by their number.
    sent: Arc<Mutex<Sent>>,
    parts: usize,
}

type Sent = Vec<(usize, PartId)>;

fn lock(sent: &Mutex<Sent>) -> MutexGuard<'_, Sent> {
    sent.lock().unwrap_or_else(PoisonError::into_inner)
}

type Ends<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// The futures are those that `async_trait` makes, spelled out.
impl MultipartUpload for Upload {
    fn put_part(&mut self, bytes: PutPayload) -> UploadPart {
        let (store, key, id) = (self.store.clone(), self.key.clone(), self.id.clone());
        let (number, sent) = (self.parts, self.sent.clone());
        self.parts += 1;
        async move {
            let part = store.put_part(&key, &id, number, bytes).await?;
            lock(&sent).push((number, part));
            Ok(())
        }
        .boxed()
    }

    fn complete<'s, 'a>(&'s mut self) -> Ends<'a, PutResult>
    where
        's: 'a,
        Self: 'a,
    {
        Box::pin(async move {
            let mut sent = std::mem::take(&mut *lock(&self.sent));
            sent.sort_unstable_by_key(|(number, _)| *number);
            let parts = sent.into_iter().map(|(_, part)| part).collect();
            let put = self
                .store
                .complete_multipart(&self.key, &self.id, parts)
                .await?;
            forget(&self.file);
            Ok(put)
        })
    }

    fn abort<'s, 'a>(&'s mut self) -> Ends<'a, ()>
    where
        's: 'a,
        Self: 'a,
    {
        Box::pin(async move {
            match self.store.abort_multipart(&self.key, &self.id).await {
                Ok(()) | Err(Error::NotFound { .. }) => {
                    forget(&self.file);
                    Ok(())
                }
                Err(error) => Err(error),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use object_store::aws::AmazonS3Builder;

    use super::*;

    fn multipart(folder: &FilePath) -> Multipart {
        let store = AmazonS3Builder::new()
            .with_bucket_name("b")
            .with_region("x")
            .build()
            .unwrap();
        Multipart::new(Arc::new(store), "s3://b", folder)
    }

    fn note(location: &str) -> Note {
        Note {
            location: location.to_owned(),
            key: "nar/x".to_owned(),
            upload: "id".to_owned(),
        }
    }

    #[test]
    fn notes_of_another_bucket_do_not_hide_ours() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..3 * LEFT_MAX {
            let location = match number % 100 {
                0 => "s3://b",
                _ => "s3://elsewhere",
            };
            let note = serde_json::to_vec(&note(location)).unwrap();
            fs::write(folder.path().join(number.to_string()), note).unwrap();
        }
        let left = multipart(folder.path()).left().unwrap();
        assert_eq!(left.len(), 3 * LEFT_MAX / 100);
    }

    #[test]
    fn what_is_no_note_is_removed_and_what_cannot_be_read_stays_and_hides_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let multipart = multipart(folder.path());
        let own = note("s3://b").write(folder.path()).unwrap();
        let other = note("s3://elsewhere").write(folder.path()).unwrap();
        let (torn, unreadable) = (folder.path().join("torn"), folder.path().join("unreadable"));
        fs::write(&torn, "{\"location\":\"s3://b\"").unwrap();
        fs::create_dir(&unreadable).unwrap();
        let left = multipart.left().unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file, own);
        assert!(other.exists() && unreadable.exists() && !torn.exists());
    }
}
