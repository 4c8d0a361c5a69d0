//! Intake: from the body of a request to a NAR that is proved and packed.
//!
//! Whatever a client sends is decompressed, read by the strict NAR decoder, hashed, and packed into
//! frames in a spool file, all while it streams in and all on a blocking thread. What comes out is
//! known to be a NAR and what its hash is; nothing about it was believed. An [`Intake`] outlives the
//! request that fills it, so that an upload can be continued by the next one.
//!
//! Memory: [`PIECES_MAX`] pieces of the body, the decompressor, and a
//! [`FrameWriter`], some 16 MiB together.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use granary_protocol::hash::{FileHash, FileHasher, NarHash, NarHasher};
use granary_protocol::nar::{DecodeError, Decoder};
use granary_protocol::narinfo::Compression;
use tempfile::TempPath;
use tokio::sync::mpsc;

use super::frames::{FrameError, FrameWriter, Packed};

/// Pieces of a body between the reactor and the blocking thread; hyper's have at most some 400 KiB.
const PIECES_MAX: usize = 8;

/// Raw bytes handled at once: large enough for SHA-256, small enough for the processor's cache.
const RAW_CHUNK_BYTES: usize = 256 * 1024;

/// How long a body may stall before its slot is given to others. `nix copy` sends from memory, other
/// clients as fast as they compress.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

/// Memory of an xz decoder. `xz -9` needs 65 MiB.
const XZ_MEMORY_MAX: u64 = 128 * 1024 * 1024;

/// Window of a zstd decoder, as a power of two: 128 MiB, what `zstd` itself accepts without being asked.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Read buffer of the brotli decoder; its window of up to 16 MiB is its own.
const BROTLI_BUFFER_BYTES: usize = 64 * 1024;

/// How gzip begins. A NAR begins with the length of its first word, 13.
const GZIP_FIRST_BYTE: u8 = 0x1f;

/// How a body is packed; of what Nix can name, what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    None,
    Zstd,
    Xz,
    Bzip2,
    Gzip,
    Brotli,
    /// As it is or as gzip: Nix names both the same, and their first bytes differ.
    Bare,
}

impl Encoding {
    /// `None` for a compression that we cannot undo.
    pub fn of(compression: Compression) -> Option<Encoding> {
        match compression {
            Compression::None => Some(Encoding::None),
            Compression::Zstd => Some(Encoding::Zstd),
            Compression::Xz => Some(Encoding::Xz),
            Compression::Bzip2 => Some(Encoding::Bzip2),
            Compression::Gzip => Some(Encoding::Gzip),
            Compression::Brotli => Some(Encoding::Brotli),
            _ => None,
        }
    }
}

/// Why a body is not taken in.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    #[error("the body ended early: {source}")]
    Body { source: io::Error },
    #[error("no byte of the body came for {} s", STALL_TIMEOUT.as_secs())]
    Stalled,
    #[error("the request was given up")]
    Cancelled,
    #[error("the body cannot be decompressed as {encoding:?}: {source}")]
    Encoding {
        encoding: Encoding,
        source: io::Error,
    },
    #[error(transparent)]
    Nar(#[from] DecodeError),
    #[error("the nar has more than {max} bytes")]
    TooLarge { max: u64 },
    #[error("cannot keep the nar in the spool {path}: {source}", path = .path.display())]
    Spool { path: PathBuf, source: io::Error },
    #[error("cannot pack the nar: {source}")]
    Pack {
        #[from]
        source: FrameError,
    },
    #[error("the thread that took in the nar has stopped")]
    Stopped,
}

impl IntakeError {
    /// Whether the same body might be taken in another time.
    pub fn is_ours(&self) -> bool {
        matches!(
            self,
            IntakeError::Spool { .. } | IntakeError::Pack { .. } | IntakeError::Stopped
        )
    }
}

/// A NAR on its way in.
pub struct Intake {
    hasher: NarHasher,
    decoder: Decoder,
    frames: Option<(FrameWriter, TempPath)>,
    raw: u64,
    raw_max: u64,
}

/// A NAR that came in whole.
#[derive(Debug)]
pub struct Taken {
    pub nar_hash: NarHash,
    pub nar_size: u64,
    /// The file of frames, deleted when dropped; `None` when it was not wanted.
    pub packed: Option<(Packed, TempPath)>,
}

/// What was learned about the body itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyAbout {
    pub hash: FileHash,
    pub size: u64,
}

impl Intake {
    /// Begins to take in a NAR of at most `raw_max` bytes.
    ///
    /// With a `spool` folder it is packed; without, it is only proved.
    pub fn new(spool: Option<&Path>, raw_max: u64) -> Result<Intake, IntakeError> {
        let frames = match spool {
            None => None,
            Some(folder) => Some(open_spool(folder)?),
        };
        Ok(Intake {
            hasher: NarHasher::new(),
            decoder: Decoder::new(),
            frames,
            raw: 0,
            raw_max,
        })
    }

    /// Begins one that is only proved, and whose hash is that of these bytes with the NAR after them.
    pub fn after(bytes: &[u8], raw_max: u64) -> Intake {
        let mut hasher = NarHasher::new();
        hasher.update(bytes);
        Intake {
            hasher,
            decoder: Decoder::new(),
            frames: None,
            raw: 0,
            raw_max,
        }
    }

    /// Begins one whose frames go into a file of this name, which is the caller's to remove. Blocks.
    pub fn kept(path: PathBuf, raw_max: u64) -> Result<Intake, IntakeError> {
        Intake::in_file(path, raw_max, true)
    }

    /// Goes on with what [`Intake::kept`] has left in that file, in this process or another. Blocks.
    pub fn resume(path: PathBuf, raw_max: u64) -> Result<Intake, IntakeError> {
        Intake::in_file(path, raw_max, false)
    }

    fn in_file(path: PathBuf, raw_max: u64, is_new: bool) -> Result<Intake, IntakeError> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(is_new)
            .open(&path);
        let failed = |source| IntakeError::Spool {
            path: path.clone(),
            source,
        };
        let file = file.map_err(failed)?;
        let mut kept = TempPath::try_from_path(&path).map_err(failed)?;
        kept.disable_cleanup(true);
        let mut intake = Intake::new(None, raw_max)?;
        let frames = FrameWriter::resume(file, |bytes| intake.write(bytes))?;
        intake.frames = Some((frames, kept));
        Ok(intake)
    }

    /// Raw bytes taken in so far.
    pub fn offset(&self) -> u64 {
        self.raw
    }

    /// Takes the next raw bytes. Blocks. After an error the intake is of no use.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), IntakeError> {
        self.raw = self.raw.saturating_add(bytes.len() as u64);
        if self.raw > self.raw_max {
            return Err(IntakeError::TooLarge { max: self.raw_max });
        }
        let mut input = bytes;
        while self.decoder.next(&mut input)?.is_some() {}
        self.hasher.update(bytes);
        match &mut self.frames {
            Some((frames, _)) => frames
                .write(bytes)
                .map_err(|source| IntakeError::Pack { source }),
            None => Ok(()),
        }
    }

    /// Ends the NAR. Blocks.
    ///
    /// # Errors
    /// [`IntakeError::Nar`] when it is not complete.
    pub fn finish(self) -> Result<Taken, IntakeError> {
        self.decoder.finish()?;
        let packed = match self.frames {
            None => None,
            Some((frames, path)) => {
                let packed = frames.finish();
                Some((packed.map_err(|source| IntakeError::Pack { source })?, path))
            }
        };
        Ok(Taken {
            nar_hash: self.hasher.finish(),
            nar_size: self.raw,
            packed,
        })
    }

    /// Fills the intake from a body until it ends; gives back the intake, with the error if there was
    /// one.
    ///
    /// [`IntakeError::Body`], [`IntakeError::Stalled`] and [`IntakeError::Cancelled`] leave the intake
    /// at an offset from where another body may continue; after any other it is dropped.
    pub async fn fill<E>(
        self,
        mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
        encoding: Encoding,
    ) -> (Option<Intake>, Result<BodyAbout, IntakeError>)
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let worker = tokio::task::spawn_blocking(move || self.read_all(receiver, encoding));
        loop {
            let piece = match tokio::time::timeout(STALL_TIMEOUT, body.next()).await {
                Err(_) => Piece::Failed(IntakeError::Stalled),
                Ok(None) => Piece::End,
                Ok(Some(Ok(bytes))) => Piece::Bytes(bytes),
                Ok(Some(Err(source))) => Piece::Failed(IntakeError::Body {
                    source: io::Error::other(source),
                }),
            };
            let is_last = !matches!(piece, Piece::Bytes(_));
            // A worker that has ended has its reason, which is told below.
            if pieces.send(piece).await.is_err() || is_last {
                break;
            }
        }
        drop(pieces);
        worker.await.unwrap_or((None, Err(IntakeError::Stopped)))
    }

    fn read_all(
        mut self,
        pieces: mpsc::Receiver<Piece>,
        encoding: Encoding,
    ) -> (Option<Intake>, Result<BodyAbout, IntakeError>) {
        let mut body = Body::new(pieces);
        let outcome = self.copy(&mut body, encoding);
        match (outcome, body.failed.take()) {
            // The decompressor only knows that something went wrong with its input.
            (Err(IntakeError::Encoding { .. }) | Ok(()), Some(failed)) => (Some(self), Err(failed)),
            (Err(error), _) => (None, Err(error)),
            (Ok(()), None) => (Some(self), Ok(body.about())),
        }
    }

    fn copy(&mut self, body: &mut Body, encoding: Encoding) -> Result<(), IntakeError> {
        let failed = |source| IntakeError::Encoding { encoding, source };
        let encoding = match encoding {
            Encoding::Bare
                if body.fill_buf().map_err(failed)?.first() == Some(&GZIP_FIRST_BYTE) =>
            {
                Encoding::Gzip
            }
            Encoding::Bare => Encoding::None,
            named => named,
        };
        let mut raw: Box<dyn Read + '_> = match encoding {
            Encoding::None | Encoding::Bare => Box::new(body),
            Encoding::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(body).map_err(failed)?;
                decoder
                    .window_log_max(ZSTD_WINDOW_LOG_MAX)
                    .map_err(failed)?;
                Box::new(decoder)
            }
            Encoding::Xz => {
                let flags = liblzma::stream::CONCATENATED;
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, flags)
                    .map_err(|error| failed(error.into()))?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(body, stream))
            }
            Encoding::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(body)),
            Encoding::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(body)),
            Encoding::Brotli => Box::new(brotli::Decompressor::new(body, BROTLI_BUFFER_BYTES)),
        };
        let mut chunk = vec![0; RAW_CHUNK_BYTES];
        loop {
            match raw.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(length) => self.write(&chunk[..length])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(failed(source)),
            }
        }
    }
}

fn open_spool(folder: &Path) -> Result<(FrameWriter, TempPath), IntakeError> {
    let failed = |source| IntakeError::Spool {
        path: folder.to_owned(),
        source,
    };
    let (file, path) = tempfile::Builder::new()
        .prefix("nar-")
        .tempfile_in(folder)
        .map_err(failed)?
        .into_parts();
    let file: File = file;
    let frames = FrameWriter::new(file).map_err(|source| IntakeError::Pack { source })?;
    Ok((frames, path))
}

/// What comes from the reactor. That nothing more comes is said, for a sender that is dropped is a
/// request that was given up.
enum Piece {
    Bytes(Bytes),
    Failed(IntakeError),
    End,
}

/// The body as a blocking reader.
struct Body {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    has_ended: bool,
    failed: Option<IntakeError>,
    hasher: FileHasher,
    size: u64,
}

impl Body {
    fn new(pieces: mpsc::Receiver<Piece>) -> Body {
        Body {
            pieces,
            current: Bytes::new(),
            has_ended: false,
            failed: None,
            hasher: FileHasher::new(),
            size: 0,
        }
    }

    fn about(self) -> BodyAbout {
        BodyAbout {
            hash: self.hasher.finish(),
            size: self.size,
        }
    }
}

impl BufRead for Body {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.has_ended {
            let failed = match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => {
                    self.hasher.update(&bytes);
                    self.size += bytes.len() as u64;
                    self.current = bytes;
                    continue;
                }
                Some(Piece::End) => {
                    self.has_ended = true;
                    continue;
                }
                Some(Piece::Failed(failed)) => failed,
                None => IntakeError::Cancelled,
            };
            self.failed = Some(failed);
            self.has_ended = true;
        }
        match self.failed {
            Some(_) if self.current.is_empty() => Err(io::ErrorKind::ConnectionAborted.into()),
            _ => Ok(&self.current),
        }
    }

    fn consume(&mut self, amount: usize) {
        let _ = self.current.split_to(amount);
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests;
