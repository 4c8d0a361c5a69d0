//! Source: what an atticd keeps, as its database and its storage have it; read, never changed.
//!
//! Only what every version since January 2023 has is asked for. A row of `object` is a path of a cache, and
//! names a row of `nar`; the rows of `chunkref`, by their numbers, name the chunks that make it up, each of them
//! compressed alone and kept under the name in its `remote_file`. Nothing of it is believed: what a chunk says
//! of itself is where it lies and how it is packed.
//!
//! Values may be text throughout, as in a database that was made from PostgreSQL's CSV: numbers as digits, truth as
//! `t`, nothing as an empty text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::stream::BoxStream;
use granary_protocol::store_path::StorePathHash;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::anchor::attic::Metadata;
use crate::anchor::intake::Encoding;
use crate::anchor::object_store::{ObjectStore, S3Options, SetupError, StorageError};

/// An atticd's database and storage.
pub struct Attic {
    database: Arc<Mutex<Connection>>,
    path: PathBuf,
    folder: Option<ObjectStore>,
    s3: S3Options,
    /// By region and name.
    buckets: Mutex<BTreeMap<(String, String), ObjectStore>>,
}

/// Why an atticd's state cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot open the database {path}: {source}", path = .path.display())]
    Open {
        path: PathBuf,
        source: rusqlite::Error,
    },
    #[error(
        "cannot read the database {path}, which is none of an atticd of 2023 or later: {source}",
        path = .path.display()
    )]
    Read {
        path: PathBuf,
        source: rusqlite::Error,
    },
    #[error("{path} is no folder with the files of an atticd", path = .path.display())]
    Folder { path: PathBuf },
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error("the thread that read the database has stopped")]
    Stopped,
}

/// Why a chunk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    #[error("a chunk is missing in the database")]
    NoRow,
    #[error("chunk {name} is missing in storage")]
    NoFile { name: String },
    #[error("chunk {name} lies in a folder, and none was named: say --storage")]
    NoFolder { name: String },
    #[error("chunk {name} is not what an atticd writes: {problem}")]
    Malformed { name: String, problem: String },
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// A row of `cache`, its texts as they stand there.
pub struct Cache {
    pub id: i64,
    pub name: String,
    pub keypair: Zeroizing<String>,
    pub is_public: bool,
    pub store_dir: String,
    pub priority: i32,
    /// JSON.
    pub upstream_keys: String,
    /// Seconds; what the server is configured with when absent, for ever when 0.
    pub retention: Option<u64>,
}

/// A path of a cache and what it references, by hash.
pub struct Listed {
    pub id: i64,
    pub hash: StorePathHash,
    pub references: Vec<StorePathHash>,
}

/// Those of a cache, and how many rows make no sense.
pub struct Listing {
    pub paths: Vec<Listed>,
    /// Their `store_path`.
    pub malformed: Vec<String>,
}

/// A path in full.
pub(super) struct Found {
    pub metadata: Metadata,
    pub nar: i64,
    pub chunks: usize,
}

/// A piece of a NAR.
pub struct Chunk {
    pub encoding: Encoding,
    /// As it is stored, when that was written down.
    file_size: Option<u64>,
    file: File,
}

/// Where a chunk lies, as atticd writes it down.
#[derive(Debug, Clone, Deserialize)]
enum File {
    S3 {
        region: String,
        bucket: String,
        key: String,
    },
    Local {
        name: String,
    },
    Http {
        url: String,
    },
}

/// The bytes of a chunk, as they are stored.
pub type ChunkBody = BoxStream<'static, Result<Bytes, StorageError>>;

impl Attic {
    /// Opens the database, and the folder that holds the files if they are not in S3. Blocks.
    pub fn open(
        database: &Path,
        folder: Option<&Path>,
        s3: S3Options,
    ) -> Result<Attic, SourceError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(database, flags);
        let connection = connection.map_err(|source| SourceError::Open {
            path: database.to_owned(),
            source,
        })?;
        let folder = match folder {
            None => None,
            Some(folder) => {
                let no_folder = || SourceError::Folder {
                    path: folder.to_owned(),
                };
                let absolute = folder.canonicalize().map_err(|_| no_folder())?;
                if !absolute.is_dir() {
                    return Err(no_folder());
                }
                let url = format!("file://{}", absolute.display());
                Some(ObjectStore::open(&url, &S3Options::default())?)
            }
        };
        Ok(Attic {
            database: Arc::new(Mutex::new(connection)),
            path: database.to_owned(),
            folder,
            s3,
            buckets: Mutex::default(),
        })
    }

    async fn read<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, SourceError> {
        let database = self.database.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let connection = database.lock().unwrap_or_else(PoisonError::into_inner);
            question(&connection)
        });
        let read = reading.await.map_err(|_| SourceError::Stopped)?;
        read.map_err(|source| SourceError::Read {
            path: self.path.clone(),
            source,
        })
    }

    /// Returns every cache that was not deleted, by name.
    pub async fn caches(&self) -> Result<Vec<Cache>, SourceError> {
        self.read(|connection| {
            connection
                .prepare(
                    "SELECT CAST(id AS INTEGER), name, keypair, is_public IN (1, '1', 't', 'true'), store_dir,
                            CAST(priority AS INTEGER), upstream_cache_key_names,
                            CAST(nullif(retention_period, '') AS INTEGER)
                     FROM cache WHERE coalesce(deleted_at, '') = '' ORDER BY name",
                )?
                .query_map([], |row| {
                    let retention: Option<i64> = row.get(7)?;
                    Ok(Cache {
                        id: row.get(0)?,
                        name: row.get(1)?,
                        keypair: Zeroizing::new(row.get(2)?),
                        is_public: row.get(3)?,
                        store_dir: row.get(4)?,
                        priority: row.get(5)?,
                        upstream_keys: row.get(6)?,
                        retention: retention.and_then(|seconds| u64::try_from(seconds).ok()),
                    })
                })?
                .collect()
        })
        .await
    }

    /// Returns the paths of a cache, whether their NARs are complete or not.
    pub async fn paths(&self, cache: i64) -> Result<Listing, SourceError> {
        self.read(move |connection| {
            let mut statement = connection.prepare(
                "SELECT CAST(id AS INTEGER), store_path, store_path_hash, \"references\" FROM object
                 WHERE cache_id = ?1 ORDER BY store_path_hash",
            )?;
            let mut rows = statement.query([cache])?;
            let mut listing = Listing {
                paths: Vec::new(),
                malformed: Vec::new(),
            };
            while let Some(row) = rows.next()? {
                let references: String = row.get(3)?;
                let hash = row.get_ref(2)?.as_str()?.parse();
                match (hash, hashes(&references)) {
                    (Ok(hash), Some(references)) => listing.paths.push(Listed {
                        id: row.get(0)?,
                        hash,
                        references,
                    }),
                    _ => listing.malformed.push(row.get(1)?),
                }
            }
            Ok(listing)
        })
        .await
    }

    /// Returns a path in full; `None` when its NAR never came in whole.
    pub(super) async fn path(&self, id: i64) -> Result<Option<Found>, SourceError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT store_path_hash, store_path, \"references\", nullif(deriver, ''), sigs, nullif(ca, ''),
                            nar_hash, CAST(nar_size AS INTEGER), CAST(nar.id AS INTEGER),
                            CAST(num_chunks AS INTEGER)
                     FROM object JOIN nar ON nar.id = nar_id
                     WHERE object.id = ?1 AND nar.state = 'V'",
                )?
                .query_row([id], found)
                .optional()
        })
        .await
    }

    /// Returns the chunks of a NAR, in order.
    pub async fn chunks(&self, nar: i64) -> Result<Vec<Result<Chunk, ChunkError>>, SourceError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT chunk.compression, remote_file, remote_file_id, CAST(nullif(file_size, '') AS INTEGER)
                     FROM chunkref LEFT JOIN chunk ON chunk.id = chunk_id AND chunk.state = 'V'
                     WHERE nar_id = ?1 ORDER BY CAST(seq AS INTEGER)",
                )?
                .query_map([nar], |row| {
                    let compression: Option<String> = row.get(0)?;
                    let (file, name) = (row.get(1)?, row.get(2)?);
                    let size: Option<i64> = row.get(3)?;
                    let size = size.and_then(|size| u64::try_from(size).ok());
                    Ok(match (compression, file, name) {
                        (Some(compression), Some(file), Some(name)) => {
                            Chunk::new(&compression, file, name, size)
                        }
                        _ => Err(ChunkError::NoRow),
                    })
                })?
                .collect()
        })
        .await
    }

    /// Begins to read a chunk.
    pub async fn open_chunk(&self, chunk: &Chunk) -> Result<ChunkBody, ChunkError> {
        match &chunk.file {
            File::Local { name } => {
                let folder = self
                    .folder
                    .as_ref()
                    .ok_or_else(|| ChunkError::NoFolder { name: name.clone() })?;
                // As atticd lays them out, and as it did before its first start of 2023.
                let (one, two) = (name.get(..1), name.get(..2));
                let nested = one.zip(two).map(|(one, two)| format!("{one}/{two}/{name}"));
                for key in nested.iter().chain([name]) {
                    if let Some(body) = whole(folder, key, chunk.file_size).await? {
                        return Ok(body);
                    }
                }
                Err(ChunkError::NoFile { name: name.clone() })
            }
            File::S3 {
                region,
                bucket,
                key,
            } => {
                let bucket = self.bucket(region, bucket)?;
                let body = whole(&bucket, key, chunk.file_size).await?;
                body.ok_or_else(|| ChunkError::NoFile { name: key.clone() })
            }
            File::Http { url } => Err(ChunkError::Malformed {
                name: url.clone(),
                problem: "it lies on a web server".to_owned(),
            }),
        }
    }

    fn bucket(&self, region: &str, name: &str) -> Result<ObjectStore, SetupError> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (region.to_owned(), name.to_owned());
        if let Some(bucket) = buckets.get(&key) {
            return Ok(bucket.clone());
        }
        let options = S3Options {
            region: Some(region.to_owned()),
            ..self.s3.clone()
        };
        let bucket = ObjectStore::open(&format!("s3://{name}"), &options)?;
        buckets.insert(key, bucket.clone());
        Ok(bucket)
    }
}

impl Chunk {
    fn new(
        compression: &str,
        file: String,
        name: String,
        file_size: Option<u64>,
    ) -> Result<Chunk, ChunkError> {
        let encoding = match compression {
            "none" => Encoding::None,
            "zstd" => Encoding::Zstd,
            "xz" => Encoding::Xz,
            "br" | "brotli" => Encoding::Brotli,
            "bzip2" => Encoding::Bzip2,
            other => {
                let problem = format!("it is compressed as {other:?}");
                return Err(ChunkError::Malformed { name, problem });
            }
        };
        match serde_json::from_str(&file) {
            Ok(file) => Ok(Chunk {
                encoding,
                file_size,
                file,
            }),
            Err(error) => Err(ChunkError::Malformed {
                name,
                problem: error.to_string(),
            }),
        }
    }
}

async fn whole(
    store: &ObjectStore,
    key: &str,
    file_size: Option<u64>,
) -> Result<Option<ChunkBody>, StorageError> {
    let size = match file_size {
        Some(size) => Some(size),
        None => store.size(key).await?,
    };
    match size {
        None => Ok(None),
        // A range of nothing is none.
        Some(0) => Ok(Some(Box::pin(futures::stream::empty()))),
        Some(size) => store.read(key, 0..size).await,
    }
}

/// The hashes of base names or paths in a list; `None` when it is none.
fn hashes(references: &str) -> Option<Vec<StorePathHash>> {
    let names: Vec<String> = serde_json::from_str(references).ok()?;
    let hash = |name: &String| {
        let base = name.rsplit('/').next().unwrap_or_default();
        base.get(..32)?.parse().ok()
    };
    names.iter().map(hash).collect()
}

fn found(row: &Row<'_>) -> rusqlite::Result<Found> {
    let list = |column| -> rusqlite::Result<Vec<String>> {
        let text: String = row.get(column)?;
        serde_json::from_str(&text).map_err(|error| {
            let kind = rusqlite::types::Type::Text;
            rusqlite::Error::FromSqlConversionFailure(column, kind, Box::new(error))
        })
    };
    let number = |column| -> rusqlite::Result<u64> {
        Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
    };
    Ok(Found {
        metadata: Metadata {
            cache: String::new(),
            store_path_hash: row.get(0)?,
            store_path: row.get(1)?,
            references: list(2)?,
            deriver: row.get(3)?,
            sigs: list(4)?,
            ca: row.get(5)?,
            nar_hash: row.get(6)?,
            nar_size: number(7)?,
        },
        nar: row.get(8)?,
        chunks: usize::try_from(number(9)?).unwrap_or(usize::MAX),
    })
}
