//! Object storage: where an anchor keeps everything that it needs to start again.
//!
//! A small face over the `object_store` crate, with what we rely on and nothing else: whole small
//! objects, large ones from a file, ranges, deletion, listing. One conformance suite
//! (`tests/anchor/storage.rs`) holds for memory, a folder and S3.
//!
//! Invariants: a `put` that returned is durable, and until then the object is whole or absent (a
//! folder is written by temporary file, fsync, rename, fsync of the folder; S3 by its own promise,
//! [`multipart`] uploads being aborted on failure; what a crash leaves of either goes at the next start). A read gives the bytes it promised or ends in an
//! error. Nothing rests on conditional puts, which Garage accepts and ignores.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use http::Method;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    Certificate, ClientOptions, GetOptions, GetRange, ObjectStore as Backend, ObjectStoreExt,
    PutPayload, RetryConfig, WriteMultipart,
};
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::secret::exposed;

mod multipart;
mod staging;

use multipart::Multipart;

/// Bytes of one part of a multipart upload. S3 takes at most 10,000 parts, so this allows 78 GiB;
/// at least 5 MiB are demanded.
const PART_BYTES: usize = 8 * 1024 * 1024;

/// Parts under way at once for one object: enough to hide a round trip, and 32 MiB of memory.
const PARTS_PARALLEL: usize = 4;

/// Parts of all objects that are in memory at once: 128 MiB, so that sixteen pushes that end together do not take
/// four times that.
const PARTS_IN_ALL: usize = 16;

/// Files up to this size are one request.
const SINGLE_PUT_BYTES_MAX: u64 = PART_BYTES as u64;

/// How long a connection to the storage may take, and how long it may then say nothing. There is no
/// limit on a whole request: a NAR of many GiB over a slow line is fine as long as it moves.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a link to an object is good for. A NAR that is begun within it is sent to its end; one that breaks off and
/// is resumed later is asked for here again.
const LINK_TIME: Duration = Duration::from_secs(3600);

/// Attempts at one request, and how long all of them may take: what waits for us is a person or Nix.
const RETRIES_MAX: usize = 5;
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest credentials or certificate file read.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Where objects are kept; `Clone` is cheap.
#[derive(Clone)]
pub struct ObjectStore {
    backend: Arc<dyn Backend>,
    prefix: Path,
    location: String,
    /// One permit for each of [`PARTS_IN_ALL`].
    parts: Arc<Semaphore>,
    s3: Option<Arc<AmazonS3>>,
    /// Whether clients may be sent to S3 itself.
    may_redirect: bool,
    /// How large objects are stored in S3, where that is noted.
    multipart: Option<Multipart>,
    /// Of a folder.
    folder: Option<PathBuf>,
}

/// What S3 wants to know beyond the URL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Options {
    /// `https://host:port`; AWS when absent.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// `key = value` lines with `aws_access_key_id`, `aws_secret_access_key` and perhaps
    /// `aws_session_token`; else the systemd credential `s3`, else the environment.
    pub credentials_file: Option<PathBuf>,
    /// PEM; trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// The bucket stands in the host name rather than in the path.
    pub virtual_hosted: bool,
    /// Whether clients may be sent to S3 itself ([`ObjectStore::link`]).
    pub redirect: bool,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub size: u64,
    /// Seconds since 1970.
    pub modified: u64,
}

/// One object as it comes.
pub struct Whole {
    pub size: u64,
    /// What storage calls this state of the object, if it does.
    pub version: Option<String>,
    pub bytes: BoxStream<'static, Result<Bytes, StorageError>>,
}

/// Why storage could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("storage {url:?} is none of file:///folder, s3://bucket/prefix, memory:")]
    Url { url: String },
    #[error("cannot read {what} {path}: {source}", path = .path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{what} {path} has more than {FILE_BYTES_MAX} bytes", path = .path.display())]
    FileTooLarge { what: &'static str, path: PathBuf },
    #[error("storage credentials {path} have mode {mode:04o}, others may read them, refusing to use them; run chmod 0600 {path}", path = .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("storage credentials {path} have no {key}", path = .path.display())]
    Credential { path: PathBuf, key: &'static str },
    #[error("cannot set up storage {url}: {source}")]
    Backend {
        url: String,
        source: object_store::Error,
    },
    #[error("cannot make the storage folder {path}: {source}", path = .path.display())]
    Folder { path: PathBuf, source: io::Error },
}

/// Why an object could not be read or written. Absence is not an error.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("cannot {action} object {key}")]
    Backend {
        action: &'static str,
        key: String,
        source: object_store::Error,
    },
    #[error("cannot read {path}, which is to be stored as {key}", path = .path.display())]
    Source {
        path: PathBuf,
        key: String,
        source: io::Error,
    },
    #[error("object {key} has {found} bytes where {expected} were promised")]
    Short {
        key: String,
        expected: u64,
        found: u64,
    },
    #[error("object {key} has {size} bytes, at most {max} are read")]
    TooLarge { key: String, size: u64, max: u64 },
    #[error("{key:?} is no key of an object")]
    Key { key: String },
    #[error(
        "storage {location} has no {key}, it is not the one that the anchor began with, refusing to change it"
    )]
    Another { location: String, key: &'static str },
}

/// The error with its cause, which has the reason.
pub(super) fn problem(error: &StorageError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl ObjectStore {
    /// Opens what a URL names: `file:///folder`, `s3://bucket/prefix`, or `memory:` for tests.
    ///
    /// # Errors
    /// [`SetupError`]. That S3 answers is found out by the first request only.
    pub fn open(url: &str, s3: &S3Options) -> Result<ObjectStore, SetupError> {
        let backend = |source| SetupError::Backend {
            url: url.to_owned(),
            source,
        };
        let mut amazon = None;
        let (store, prefix): (Arc<dyn Backend>, Path) = if url == "memory:" {
            (Arc::new(InMemory::new()), Path::default())
        } else if let Some(folder) = url.strip_prefix("file://") {
            if !folder.starts_with('/') {
                return Err(SetupError::Url {
                    url: url.to_owned(),
                });
            }
            fs::create_dir_all(folder).map_err(|source| SetupError::Folder {
                path: folder.into(),
                source,
            })?;
            let store = LocalFileSystem::new_with_prefix(folder).map_err(backend)?;
            (
                // Without it a power cut may lose what was acknowledged.
                Arc::new(store.with_fsync(true).with_automatic_cleanup(false)),
                Path::default(),
            )
        } else if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(SetupError::Url {
                    url: url.to_owned(),
                });
            }
            let prefix =
                Path::parse(prefix.trim_end_matches('/')).map_err(|_| SetupError::Url {
                    url: url.to_owned(),
                })?;
            let store = Arc::new(s3_builder(bucket, s3)?.build().map_err(backend)?);
            amazon = Some(store.clone());
            (store, prefix)
        } else {
            return Err(SetupError::Url {
                url: url.to_owned(),
            });
        };
        Ok(ObjectStore {
            backend: store,
            prefix,
            location: url.to_owned(),
            parts: Arc::new(Semaphore::new(PARTS_IN_ALL)),
            s3: amazon,
            may_redirect: s3.redirect,
            multipart: None,
            folder: url.strip_prefix("file://").map(PathBuf::from),
        })
    }

    /// Notes uploads under way in this folder, for [`ObjectStore::abort_left`] of a later run.
    pub fn noting(mut self, folder: &FilePath) -> ObjectStore {
        let multipart = |s3| Multipart::new(s3, &self.location, folder);
        self.multipart = self.s3.clone().map(multipart);
        self
    }

    /// Looks for uploads that earlier runs noted and did not end, and returns what aborts them. Blocks for a moment.
    ///
    /// To be called while nobody else works with the folder, and before the first object of this run is stored; the
    /// future may run beside everything.
    pub fn abort_left(&self) -> impl Future<Output = ()> + Send + 'static {
        let left = self.multipart.clone().map(|multipart| {
            let left = multipart.left().unwrap_or_else(|error| {
                tracing::warn!(%error, "could not look for uploads that were interrupted");
                Vec::new()
            });
            (multipart, left)
        });
        async move {
            if let Some((multipart, left)) = left {
                multipart.abort(left).await;
            }
        }
    }

    /// Removes what a process that was killed left of objects that it was writing; returns how many. In S3 that is
    /// [`ObjectStore::abort_left`].
    ///
    /// To be called while nobody else writes. Blocks: a million objects in a folder take seconds.
    pub fn sweep(&self) -> io::Result<u64> {
        self.folder.as_deref().map_or(Ok(0), staging::sweep)
    }

    /// The URL it was opened with.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Stores a small object, replacing one that is there.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StorageError> {
        let path = self.path(key)?;
        let outcome = self.backend.put(&path, PutPayload::from(bytes)).await;
        outcome.map(drop).map_err(failed("store", key))
    }

    /// Stores the contents of a file, with memory bounded by [`PARTS_PARALLEL`] parts, and for all calls together by
    /// [`PARTS_IN_ALL`]: then it waits for others.
    ///
    /// Not cancel-safe for the storage's space: a call that is dropped may leave parts behind until the next run.
    pub async fn put_file(&self, key: &str, file: &FilePath) -> Result<(), StorageError> {
        let path = self.path(key)?;
        let unreadable = |source| StorageError::Source {
            path: file.to_owned(),
            key: key.to_owned(),
            source,
        };
        let mut source = tokio::fs::File::open(file).await.map_err(unreadable)?;
        let size = source.metadata().await.map_err(unreadable)?.len();
        let parts = size.div_ceil(PART_BYTES as u64);
        let parts = parts.clamp(1, PARTS_PARALLEL as u64) as u32;
        // Nobody closes it.
        let _held = self.parts.acquire_many(parts).await;
        if size <= SINGLE_PUT_BYTES_MAX {
            let mut bytes = Vec::new();
            source.read_to_end(&mut bytes).await.map_err(unreadable)?;
            return self.put(key, bytes.into()).await;
        }
        let upload = match &self.multipart {
            Some(multipart) => multipart.begin(path).await,
            None => self.backend.put_multipart(&path).await,
        };
        let upload = upload.map_err(failed("begin to store", key))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let written = async {
            let mut total = 0;
            while total < size {
                let waited = upload.wait_for_capacity(PARTS_PARALLEL).await;
                waited.map_err(failed("store", key))?;
                let mut part = Vec::with_capacity(PART_BYTES);
                let mut limited = (&mut source).take(PART_BYTES as u64);
                let length = limited.read_to_end(&mut part).await.map_err(unreadable)?;
                if length == 0 {
                    return Err(unreadable(io::ErrorKind::UnexpectedEof.into()));
                }
                total += length as u64;
                upload.put(part.into());
            }
            Ok(())
        };
        match written.await {
            // Aborts by itself when a part or the completion fails.
            Ok(()) => upload
                .finish()
                .await
                .map(drop)
                .map_err(failed("store", key)),
            Err(error) => {
                if let Err(abort) = upload.abort().await {
                    tracing::warn!(key, error = %abort, "could not abort an upload to storage");
                }
                Err(error)
            }
        }
    }

    /// Returns a small object; `None` when there is none.
    pub async fn get(&self, key: &str, bytes_max: u64) -> Result<Option<Bytes>, StorageError> {
        let path = self.path(key)?;
        let found = match self.backend.get(&path).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed("read", key))?,
        };
        let size = found.meta.size;
        if size > bytes_max {
            return Err(StorageError::TooLarge {
                key: key.to_owned(),
                size,
                max: bytes_max,
            });
        }
        let bytes = found.bytes().await.map_err(failed("read", key))?;
        if bytes.len() as u64 == size {
            Ok(Some(bytes))
        } else {
            Err(StorageError::Short {
                key: key.to_owned(),
                expected: size,
                found: bytes.len() as u64,
            })
        }
    }

    /// Returns the size of an object in bytes; `None` when there is none.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, StorageError> {
        match self.backend.head(&self.path(key)?).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(failed("examine", key)(source)),
        }
    }

    /// Streams a part of an object, of which the caller knows that it is not beyond its end.
    ///
    /// Returns once storage has answered, so that an error is known before the first byte of a
    /// response; `None` when there is no object. A body that ends early ends in
    /// [`StorageError::Short`].
    pub async fn read(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<Option<BoxStream<'static, Result<Bytes, StorageError>>>, StorageError> {
        let path = self.path(key)?;
        let expected = range.end.saturating_sub(range.start);
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
        let found = match self.backend.get_opts(&path, options).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed("read", key))?,
        };
        if found.range != range {
            return Err(StorageError::Short {
                key: key.to_owned(),
                expected,
                found: found.range.end.saturating_sub(found.range.start),
            });
        }
        Ok(Some(checked(found.into_stream(), key, expected)))
    }

    /// Streams a whole object; `None` when there is none. Like [`ObjectStore::read`] otherwise.
    pub async fn whole(&self, key: &str) -> Result<Option<Whole>, StorageError> {
        let found = match self.backend.get(&self.path(key)?).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(failed("read", key))?,
        };
        let (size, version) = (found.meta.size, found.meta.e_tag.clone());
        Ok(Some(Whole {
            size,
            version,
            bytes: checked(found.into_stream(), key, size),
        }))
    }

    /// Returns an address from where anybody can read an object for a while, without asking whether it is there;
    /// `None` where clients are not to be sent elsewhere.
    pub async fn link(&self, key: &str) -> Result<Option<String>, StorageError> {
        let Some(signer) = self.s3.as_ref().filter(|_| self.may_redirect) else {
            return Ok(None);
        };
        let path = self.path(key)?;
        let signed = signer.signed_url(Method::GET, &path, LINK_TIME).await;
        let url = signed.map_err(failed("make a link to", key))?;
        Ok(Some(url.into()))
    }

    /// Deletes an object; one that is not there is as good as deleted.
    pub async fn delete(&self, key: &str) -> Result<(), StorageError> {
        match self.backend.delete(&self.path(key)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(failed("delete", key)(source)),
        }
    }

    /// Lists every object below a folder, in no order.
    pub fn list(&self, folder: &str) -> BoxStream<'static, Result<Listed, StorageError>> {
        let path = match self.path(folder) {
            Ok(path) => path,
            Err(error) => return futures::stream::once(async { Err(error) }).boxed(),
        };
        let folder = folder.to_owned();
        let prefix = self.prefix.clone();
        self.backend
            .list(Some(&path))
            .map_err(move |source| failed("list", &folder)(source))
            .try_filter_map(move |meta| {
                let key = meta.location.prefix_match(&prefix).map(|parts| {
                    let parts: Vec<_> = parts.map(|part| part.as_ref().to_owned()).collect();
                    parts.join("/")
                });
                let listed = key.map(|key| Listed {
                    key,
                    size: meta.size,
                    modified: u64::try_from(meta.last_modified.timestamp()).unwrap_or(0),
                });
                async move { Ok(listed) }
            })
            .boxed()
    }

    /// Keys are made by us of letters, digits and a few signs, so a strange one is our mistake.
    fn path(&self, key: &str) -> Result<Path, StorageError> {
        let path = Path::parse(key).map_err(|_| StorageError::Key {
            key: key.to_owned(),
        })?;
        let parts = self.prefix.parts().chain(path.parts());
        Ok(parts.collect())
    }
}

impl std::fmt::Debug for ObjectStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectStore({})", self.location)
    }
}

/// A body that ends in an error unless all of its bytes came.
fn checked(
    body: BoxStream<'static, object_store::Result<Bytes>>,
    key: &str,
    expected: u64,
) -> BoxStream<'static, Result<Bytes, StorageError>> {
    let state = (body, 0u64, key.to_owned(), false);
    let checked = futures::stream::unfold(state, move |(mut body, seen, key, ended)| async move {
        if ended {
            return None;
        }
        match body.next().await {
            Some(Ok(bytes)) => {
                let seen = seen + bytes.len() as u64;
                Some((Ok(bytes), (body, seen, key, false)))
            }
            Some(Err(source)) => {
                let error = failed("read", &key)(source);
                Some((Err(error), (body, seen, key, true)))
            }
            None if seen == expected => None,
            None => {
                let error = StorageError::Short {
                    key: key.clone(),
                    expected,
                    found: seen,
                };
                Some((Err(error), (body, seen, key, true)))
            }
        }
    });
    checked.boxed()
}

fn failed(action: &'static str, key: &str) -> impl FnOnce(object_store::Error) -> StorageError {
    let key = key.to_owned();
    move |source| StorageError::Backend {
        action,
        key,
        source,
    }
}

fn s3_builder(bucket: &str, options: &S3Options) -> Result<AmazonS3Builder, SetupError> {
    let mut client = ClientOptions::new()
        // The crate's default ends any request after 30 s, however well its body flows.
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_read_timeout(READ_TIMEOUT);
    if let Some(file) = &options.ca_file {
        let pem = read_small("storage certificate", file)?;
        let certificates =
            Certificate::from_pem_bundle(&pem).map_err(|source| SetupError::Backend {
                url: file.display().to_string(),
                source,
            })?;
        for certificate in certificates {
            client = client.with_root_certificate(certificate);
        }
    }
    if let Some(endpoint) = &options.endpoint {
        client = client.with_allow_http(endpoint.starts_with("http://"));
    }
    // From the environment come keys, token, region and endpoint, under AWS's names.
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_client_options(client)
        .with_virtual_hosted_style_request(options.virtual_hosted)
        // We delete one object at a time; the bulk request is the one that small servers lack.
        .with_disable_bulk_delete(true)
        .with_retry(RetryConfig {
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_TIMEOUT,
            ..RetryConfig::default()
        });
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
        .map(|folder| FilePath::new(&folder).join("s3"))
        .filter(|file| file.exists());
    if let Some(file) = options.credentials_file.as_ref().or(credential.as_ref()) {
        builder = with_credentials(builder, file)?;
    }
    Ok(builder)
}

fn with_credentials(
    mut builder: AmazonS3Builder,
    file: &FilePath,
) -> Result<AmazonS3Builder, SetupError> {
    let metadata = fs::metadata(file).map_err(|source| SetupError::File {
        what: "storage credentials",
        path: file.to_owned(),
        source,
    })?;
    if let Some(mode) = exposed(file, &metadata) {
        return Err(SetupError::Exposed {
            path: file.to_owned(),
            mode,
        });
    }
    let bytes = Zeroizing::new(read_small("storage credentials", file)?);
    let text = Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned());
    let value = |key: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim().eq_ignore_ascii_case(key)).then(|| value.trim().to_owned())
        })
    };
    let needed = |key: &'static str| {
        value(key).ok_or_else(|| SetupError::Credential {
            path: file.to_owned(),
            key,
        })
    };
    builder = builder
        .with_access_key_id(needed("aws_access_key_id")?)
        .with_secret_access_key(needed("aws_secret_access_key")?);
    if let Some(token) = value("aws_session_token") {
        builder = builder.with_token(token);
    }
    Ok(builder)
}

fn read_small(what: &'static str, path: &FilePath) -> Result<Vec<u8>, SetupError> {
    let unreadable = |source| SetupError::File {
        what,
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(unreadable)?.len() > FILE_BYTES_MAX {
        return Err(SetupError::FileTooLarge {
            what,
            path: path.to_owned(),
        });
    }
    fs::read(path).map_err(unreadable)
}
