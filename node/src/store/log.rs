//! Build logs: what Nix keeps of builds on this machine, whether they succeeded or not.
//!
//! `drvs/<first two characters>/<the rest of the derivation's base name>`, bzip2'd or plain
//! (setting `compress-build-log`). A log is decoded while it is read, in chunks on the blocking
//! pool; its length is found by decoding it once before, since a client that sees no length cannot
//! tell a whole log from a part. A log that is still being written ends in the middle of a bzip2
//! block and is given once it is whole.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use bytes::Bytes;
use bzip2::read::MultiBzDecoder;
use futures::{Stream, stream};
use granary_protocol::store_path::StorePath;
use rustix::fs::OFlags;
use tokio::task::spawn_blocking;

/// Decoded bytes of a log that is given: a build that prints for hours makes less. Beyond it there
/// is no log, rather than a decoder that is busy for minutes (it makes some 30 MB/s).
pub const LOG_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Bytes of one chunk of a log.
const CHUNK_BYTES: usize = 64 * 1024;

/// The folder with the logs of builds.
#[derive(Clone, Debug)]
pub struct BuildLogs {
    folder: PathBuf,
}

/// Why a log could not be read. Absence is not an error.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("cannot read the build log {file}: {source}", file = .file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("the build log {file} has more than {LOG_BYTES_MAX} bytes, refusing to decode it", file = .file.display())]
    TooLarge { file: PathBuf },
    #[error("the build log {file} became shorter while it was being read", file = .file.display())]
    Shrunk { file: PathBuf },
    #[error("the blocking pool is gone")]
    Stopped,
}

/// One log, opened and measured.
pub struct BuildLog {
    /// Decoded bytes.
    pub size: u64,
    reader: LogReader,
}

struct LogReader {
    file: PathBuf,
    decoder: Box<dyn Read + Send>,
    left: u64,
}

impl BuildLogs {
    /// `folder` is Nix's log folder: `/nix/var/log/nix`.
    pub fn new(folder: PathBuf) -> BuildLogs {
        BuildLogs { folder }
    }

    /// Opens the log of a derivation; `None` when there is none.
    pub async fn open(&self, derivation: &StorePath) -> Result<Option<BuildLog>, LogError> {
        let base_name = derivation.base_name();
        // A base name begins with 32 characters of ASCII.
        let (folder, rest) = base_name.split_at(2);
        let plain = self.folder.join("drvs").join(folder).join(rest);
        let packed = plain.with_file_name(format!("{rest}.bz2"));
        spawn_blocking(move || {
            for (file, is_packed) in [(packed, true), (plain, false)] {
                if let Some(log) = open_file(file, is_packed)? {
                    return Ok(Some(log));
                }
            }
            Ok(None)
        })
        .await
        .map_err(|_| LogError::Stopped)?
    }
}

impl BuildLog {
    /// Streams the decoded log.
    ///
    /// # Errors
    /// The first [`LogError`] ends the stream; it never has more or fewer bytes than `size` otherwise.
    pub fn stream(self) -> impl Stream<Item = Result<Bytes, LogError>> + Send + 'static {
        stream::try_unfold(self.reader, |reader| async {
            if reader.left == 0 {
                return Ok(None);
            }
            spawn_blocking(|| reader.chunk())
                .await
                .map_err(|_| LogError::Stopped)?
                .map(Some)
        })
    }
}

impl LogReader {
    /// Reads the next chunk; blocks on the disk.
    fn chunk(mut self) -> Result<(Bytes, LogReader), LogError> {
        let length = self.left.min(CHUNK_BYTES as u64);
        let mut chunk = Vec::with_capacity(length as usize);
        let read = (&mut self.decoder).take(length).read_to_end(&mut chunk);
        match read {
            Ok(0) => Err(LogError::Shrunk { file: self.file }),
            Ok(read) => {
                self.left -= read as u64;
                Ok((chunk.into(), self))
            }
            Err(source) => Err(LogError::Read {
                file: self.file,
                source,
            }),
        }
    }
}

fn open_file(path: PathBuf, is_packed: bool) -> Result<Option<BuildLog>, LogError> {
    let read = |source| LogError::Read {
        file: path.clone(),
        source,
    };
    // `NONBLOCK` for the FIFO that is no log.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let mut options = File::options();
    options.read(true).custom_flags(flags as i32);
    let mut file = match options.open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    let metadata = file.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let size = match is_packed {
        false => metadata.len(),
        true => {
            let mut decoder = MultiBzDecoder::new(&mut file).take(LOG_BYTES_MAX + 1);
            let size = io::copy(&mut decoder, &mut io::sink()).map_err(read)?;
            file.rewind().map_err(read)?;
            size
        }
    };
    if size > LOG_BYTES_MAX {
        return Err(LogError::TooLarge { file: path });
    }
    let decoder: Box<dyn Read + Send> = match is_packed {
        false => Box::new(file),
        true => Box::new(MultiBzDecoder::new(file)),
    };
    Ok(Some(BuildLog {
        size,
        reader: LogReader {
            file: path,
            decoder,
            left: size,
        },
    }))
}
