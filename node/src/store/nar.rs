//! The NAR of a path in the store, from any offset, without ever holding it.
//!
//! A path is opened once ([`Opened`]) and everything below it is reached from that descriptor, one
//! component at a time and never through a symlink, so that nothing outside can be read. A walk
//! (names and sizes, no contents) gives its [`Layout`]; layouts of recent paths are kept, so a
//! range of a known path starts at once. A stream then reads in chunks, each filled from as many small
//! files as fit. What the kernel has in memory is read at once, by calls that never wait for a disk;
//! for the rest a stream goes to the blocking pool, a chunk ahead of the one that is being sent.
//! A small path is read whole before it is answered from, and so needs no hold.
//!
//! Plain `pread`: store files are mapped by nobody else, and a file truncated under a mapping
//! would be a SIGBUS. A file whose size is not the one laid out ends the stream in an error.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, IoSliceMut},
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use granary_protocol::{
    hash::NarHash,
    nar::{FileIndex, Layout, LayoutBuilder, LayoutError, Segment},
    store_path::{StorePath, StorePathHash},
};
use rustix::{
    buffer::spare_capacity,
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2,
        readlinkat, statat,
    },
    io::{Errno, ReadWriteFlags, pread, preadv2},
};
use tokio::task::{JoinHandle, spawn_blocking};

use super::roots::Hold;
use super::{PathInfo, StoreConfig, StoreError};

/// Bytes of one chunk: large enough that the hop to the blocking pool (some 10 µs) does not show,
/// small enough that the three a stream may hold (sent, ready, being read) stay below 1 MiB.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Bytes of chunks that all streams of this process hold together before they take smaller ones:
/// what 64 streams at full speed hold. A slow reader keeps its two chunks for long; 500 of them
/// held 250 MB of full ones, and hold some 80 MB.
const CHUNKS_BYTES: usize = 32 * 1024 * 1024;

/// The least chunk, however many streams there are.
const CHUNK_BYTES_MIN: usize = 16 * 1024;

/// A NAR of at most so many bytes is read at once, in the hop that opens it: it is held by nobody meanwhile, and
/// a thousand clients that take their time with one hold 64 MB.
pub(super) const WHOLE_BYTES_MAX: u64 = 64 * 1024;

/// Chunks that a stream fetches from the blocking pool, reading ahead, before it looks again whether the kernel
/// has the next one in memory: the disk is what such a stream waits for, and it should not be left idle.
const CHUNKS_AHEAD: u32 = 16;

/// Streams of this process. Memory is the process', so this is no part of any store.
static STREAMS: AtomicUsize = AtomicUsize::new(0);

/// Bytes of layouts kept: some 1.5 million files, or all of a NixOS system's larger paths.
const LAYOUT_CACHE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Flags for everything opened below a path. `NONBLOCK` for the FIFO that is no regular file.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// The NAR of one path. Holds the path open; clones share the descriptor.
#[derive(Clone)]
pub struct Nar {
    size: u64,
    source: Source,
}

#[derive(Clone)]
enum Source {
    /// All of its bytes.
    Whole(Arc<Layout>, Bytes),
    Contents(Arc<Layout>, Arc<dyn Contents>),
    Kept(Arc<dyn Kept>),
}

/// A NAR that is kept as one, not as a tree of files.
pub trait Kept: Send + Sync {
    /// Streams a range of its bytes that is not empty and lies within it, in chunks of at most [`CHUNK_BYTES`].
    ///
    /// An error is the last item.
    fn stream(self: Arc<Self>, range: Range<u64>) -> BoxStream<'static, Result<Bytes, NarError>>;
}

/// Why a stream ended before its last byte.
///
/// The bytes given so far are those of the NAR; the rest can come from another provider.
#[derive(Debug, thiserror::Error)]
pub enum NarError {
    #[error("{file} vanished while its nar was being sent")]
    Vanished { file: String },
    #[error("{file} has {found} bytes, but {laid_out} when its nar was laid out")]
    Changed {
        file: String,
        laid_out: u64,
        found: u64,
    },
    #[error("cannot read {file}")]
    Read { file: String, source: io::Error },
    #[error("cannot read the stored nar {nar}")]
    Kept { nar: String, source: io::Error },
    #[error("the blocking pool is gone")]
    Stopped,
}

/// What the chunks of a NAR are filled from: a real tree, or one in memory.
pub(super) trait Contents: Send + Sync {
    /// Starts reading; called once per stream.
    fn reader(self: Arc<Self>) -> Box<dyn ReadContents>;
}

/// The files of one NAR as one stream reads them, mostly forwards.
pub(super) trait ReadContents: Send {
    /// Appends bytes of `file` from `offset` on to `chunk`: at least one, at most `length`.
    ///
    /// With [`Patience::None`] it never waits for a disk; it may say [`Progress::WouldWait`], having appended nothing.
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
        patience: Patience,
    ) -> Result<Progress, NarError>;
}

/// Whether a read may wait for a disk. Only the blocking pool has any.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    None,
    Any,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Read,
    WouldWait,
}

impl Nar {
    pub(super) fn new(layout: Arc<Layout>, contents: Arc<dyn Contents>) -> Nar {
        Nar {
            size: layout.nar_size(),
            source: Source::Contents(layout, contents),
        }
    }

    /// A NAR of `size` bytes that is kept as one.
    pub fn kept(size: u64, kept: Arc<dyn Kept>) -> Nar {
        Nar {
            size,
            source: Source::Kept(kept),
        }
    }

    /// Reads all of a NAR that has at most [`WHOLE_BYTES_MAX`]; blocks on the disk.
    pub(super) fn read(layout: Arc<Layout>, contents: Arc<dyn Contents>) -> Result<Nar, NarError> {
        let mut producer = Producer::new(layout.clone(), contents, 0..layout.nar_size());
        let mut whole = Vec::new();
        while !producer.is_done() {
            whole.extend_from_slice(&producer.fill(Patience::Any)?.unwrap_or_default());
        }
        Ok(Nar {
            size: layout.nar_size(),
            source: Source::Whole(layout, whole.into()),
        })
    }

    /// Returns the size of the whole NAR, the one that is registered.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns what the NAR holds; [`Layout::listing`] is its `.ls`. `None` for one that is kept as one.
    pub fn layout(&self) -> Option<&Layout> {
        match &self.source {
            Source::Whole(layout, _) | Source::Contents(layout, _) => Some(layout),
            Source::Kept(_) => None,
        }
    }

    /// Streams the bytes in `range` of the NAR, in chunks of at most [`CHUNK_BYTES`].
    ///
    /// Bytes beyond the end do not exist, so such a range ends early. Reading is at most one chunk ahead of
    /// the receiver. Cancel-safe: dropping the stream ends the reading after the chunk under way.
    /// # Errors
    /// The first [`NarError`] ends the stream; chunks are never padded.
    pub fn stream(
        &self,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, NarError>> + Send + Unpin + use<> {
        let range = range.start..range.end.min(self.size);
        let next = match &self.source {
            _ if range.is_empty() => Next::End,
            // As long as `CHUNK_BYTES` at most, and in memory already.
            Source::Whole(_, bytes) => {
                let (from, to) = (range.start as usize, range.end as usize);
                Next::Ready(bytes.slice(from..to))
            }
            Source::Contents(layout, contents) => {
                let producer = Producer::new(layout.clone(), contents.clone(), range);
                Next::Idle(producer)
            }
            Source::Kept(kept) => return kept.clone().stream(range),
        };
        stream::unfold(next, Next::step).boxed()
    }
}

/// The state of a stream between chunks.
enum Next {
    /// The only chunk.
    Ready(Bytes),
    Idle(Producer),
    /// On the blocking pool, where this many chunks more are to be read.
    Reading(Reading, u32),
    End,
}

type Reading = JoinHandle<(Producer, Result<Bytes, NarError>)>;

impl Next {
    async fn step(self) -> Option<(Result<Bytes, NarError>, Next)> {
        let (reading, more) = match self {
            Next::End => return None,
            Next::Ready(bytes) => return Some((Ok(bytes), Next::End)),
            Next::Idle(mut producer) => match producer.fill(Patience::None) {
                Ok(Some(chunk)) => return Some((Ok(chunk), producer.rest())),
                Ok(None) => (spawn_blocking(|| producer.chunk()), CHUNKS_AHEAD),
                Err(error) => return Some((Err(error), Next::End)),
            },
            Next::Reading(reading, more) => (reading, more),
        };
        Some(match reading.await {
            Ok((producer, Ok(chunk))) => {
                let next = match more {
                    0 => producer.rest(),
                    _ if producer.is_done() => Next::End,
                    _ => Next::Reading(spawn_blocking(|| producer.chunk()), more - 1),
                };
                (Ok(chunk), next)
            }
            Ok((_, Err(error))) => (Err(error), Next::End),
            Err(_) => (Err(NarError::Stopped), Next::End),
        })
    }
}

/// Fills chunks; its place in the NAR is `at`, found anew for each chunk by binary search.
struct Producer {
    layout: Arc<Layout>,
    contents: Box<dyn ReadContents>,
    at: u64,
    end: u64,
    /// The beginning of the next chunk, as far as it could be read without waiting, and how long it is to be.
    begun: Option<(Vec<u8>, usize)>,
    counted: Counted,
}

/// One of [`STREAMS`], as long as it lives.
struct Counted;

impl Counted {
    fn new() -> Counted {
        STREAMS.fetch_add(1, Ordering::Relaxed);
        Counted
    }

    /// Returns how large a chunk may be: two of them are a stream's share.
    fn chunk_bytes(&self) -> usize {
        let streams = STREAMS.load(Ordering::Relaxed).max(1);
        (CHUNKS_BYTES / (2 * streams)).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        STREAMS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Producer {
    fn new(layout: Arc<Layout>, contents: Arc<dyn Contents>, range: Range<u64>) -> Producer {
        Producer {
            layout,
            contents: contents.reader(),
            at: range.start,
            end: range.end,
            begun: None,
            counted: Counted::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.at >= self.end
    }

    fn rest(self) -> Next {
        match self.is_done() {
            true => Next::End,
            false => Next::Idle(self),
        }
    }

    /// Reads the next chunk; blocks on the disk.
    fn chunk(mut self) -> (Producer, Result<Bytes, NarError>) {
        let result = self.fill(Patience::Any);
        // Whoever has patience gets it.
        (self, result.map(Option::unwrap_or_default))
    }

    /// Returns the next chunk; `None` when that would mean to wait, and what was read of it is kept.
    fn fill(&mut self, patience: Patience) -> Result<Option<Bytes>, NarError> {
        let (mut chunk, size) = self.begun.take().unwrap_or_else(|| {
            let size = (self.end - self.at).min(self.counted.chunk_bytes() as u64) as usize;
            (Vec::with_capacity(size), size)
        });
        for segment in self.layout.segments(self.at + chunk.len() as u64) {
            match segment {
                Segment::Framing(framing) => {
                    let length = framing.len().min(size - chunk.len());
                    chunk.extend_from_slice(&framing[..length]);
                }
                Segment::Contents {
                    file,
                    offset,
                    length,
                } => {
                    let end = offset + length;
                    let mut offset = offset;
                    while offset < end && chunk.len() < size {
                        let before = chunk.len();
                        let length = (end - offset).min((size - before) as u64) as usize;
                        let read = self.contents.read(
                            &self.layout,
                            file,
                            offset,
                            length,
                            &mut chunk,
                            patience,
                        );
                        if read? == Progress::WouldWait {
                            self.begun = Some((chunk, size));
                            return Ok(None);
                        }
                        offset += (chunk.len() - before) as u64;
                    }
                }
            }
            if chunk.len() == size {
                break;
            }
        }
        assert_eq!(chunk.len(), size, "a layout covers all of its nar");
        self.at += size as u64;
        Ok(Some(chunk.into()))
    }
}

/// A path of the real store, held open.
pub(super) struct Opened {
    /// The path itself: a directory or file opened for reading, or an `O_PATH` of a symlink.
    root: OwnedFd,
    stat: Stat,
    store_path: StorePath,
    /// Keeps the path until the last stream is done; `None` when there is no way to.
    _hold: Option<Hold>,
}

impl Opened {
    /// Opens a path of the store; `None` when there is no such file. Blocks on the disk.
    pub(super) fn open(
        config: &StoreConfig,
        store_path: &StorePath,
        hold: Option<Hold>,
    ) -> Result<Option<Arc<Opened>>, StoreError> {
        let file = config.real_dir.join(store_path.base_name());
        let open = |flags| openat(CWD, &file, flags, Mode::empty());
        let root = match open(READ) {
            // The path is a symlink: nothing to read, but it can be held.
            Err(Errno::LOOP) => open(OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC),
            // A socket.
            Err(Errno::NXIO) => {
                return Err(StoreError::Special {
                    path: store_path.base_name(),
                });
            }
            root => root,
        };
        let opened = root.and_then(|root| {
            Ok(Opened {
                stat: fstat(&root)?,
                root,
                store_path: store_path.clone(),
                _hold: hold,
            })
        });
        match opened {
            Ok(opened) => Ok(Some(Arc::new(opened))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(StoreError::File {
                file,
                source: error.into(),
            }),
        }
    }

    /// Reads a small path whole; `None` when a part of it vanished meanwhile. Blocks on the disk.
    pub(super) fn read_whole(self: Arc<Self>, nar_size: u64) -> Result<Option<Nar>, StoreError> {
        let Some(layout) = self.lay_out()? else {
            return Ok(None);
        };
        self.check_size(&layout, nar_size)?;
        match Nar::read(Arc::new(layout), self) {
            Ok(nar) => Ok(Some(nar)),
            Err(NarError::Vanished { .. }) => Ok(None),
            Err(source) => Err(StoreError::Contents { source }),
        }
    }

    fn check_size(&self, layout: &Layout, registered: u64) -> Result<(), StoreError> {
        match layout.nar_size() {
            size if size == registered => Ok(()),
            found => Err(StoreError::Corrupt {
                path: self.store_path.base_name(),
                found,
                registered,
            }),
        }
    }

    /// Walks the tree; `None` when a part of it vanished meanwhile. Blocks on the disk.
    fn lay_out(&self) -> Result<Option<Layout>, StoreError> {
        let mut walk = Walk {
            builder: LayoutBuilder::new(),
            path: Vec::new(),
        };
        let result = match FileType::from_raw_mode(self.stat.st_mode) {
            FileType::Directory => match self.root.try_clone() {
                Ok(root) => walk.directory(b"", root),
                Err(source) => Err(WalkError::Read(source)),
            },
            FileType::Symlink => walk.symlink(&self.root, b""),
            _ => walk.file(b"", &self.stat),
        };
        let path = self.describe(&walk.path);
        match result.and_then(|()| walk.builder.finish().map_err(WalkError::Layout)) {
            Ok(layout) => Ok(Some(layout)),
            Err(WalkError::Read(source)) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(WalkError::Read(source)) => Err(StoreError::File {
                file: path.into(),
                source,
            }),
            Err(WalkError::Special) => Err(StoreError::Special { path }),
            Err(WalkError::Layout(source)) => Err(StoreError::Layout { path, source }),
        }
    }

    /// Names a file below the path, for errors.
    fn describe(&self, below: &[u8]) -> String {
        match below {
            b"" => self.store_path.base_name(),
            _ => format!("{}/{}", self.store_path, below.escape_ascii()),
        }
    }
}

impl Contents for Opened {
    fn reader(self: Arc<Self>) -> Box<dyn ReadContents> {
        Box::new(FileReader {
            opened: self,
            file: None,
            directory: None,
            can_tell: true,
        })
    }
}

/// A walk over one tree, in NAR order.
struct Walk {
    builder: LayoutBuilder,
    /// Where the walk is, to name it in an error.
    path: Vec<u8>,
}

enum WalkError {
    Read(io::Error),
    Special,
    Layout(LayoutError),
}

impl From<Errno> for WalkError {
    fn from(error: Errno) -> WalkError {
        WalkError::Read(error.into())
    }
}

impl From<LayoutError> for WalkError {
    fn from(error: LayoutError) -> WalkError {
        WalkError::Layout(error)
    }
}

impl Walk {
    /// Adds a directory and all below it. Recursion ends at the layout's limit of levels.
    fn directory(&mut self, name: &[u8], directory: OwnedFd) -> Result<(), WalkError> {
        self.builder.directory(name)?;
        let mut names = Vec::new();
        // A descriptor of its own: `Dir` would move the offset of one that others share.
        let list = openat(&directory, c".", READ | OFlags::DIRECTORY, Mode::empty())?;
        for entry in Dir::new(list)? {
            let entry = entry?;
            match entry.file_name().to_bytes() {
                b"." | b".." => {}
                _ => names.push(entry.file_name().to_owned()),
            }
        }
        names.sort_unstable();
        for name in &names {
            let parent = self.path.len();
            if parent > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let flags = READ | OFlags::DIRECTORY;
                    let below = openat(&directory, name, flags, Mode::empty())?;
                    self.directory(name.to_bytes(), below)?;
                }
                FileType::Symlink => {
                    let target = readlinkat(&directory, name, Vec::new())?;
                    self.builder.symlink(name.to_bytes(), target.to_bytes())?;
                }
                _ => self.file(name.to_bytes(), &stat)?,
            }
            self.path.truncate(parent);
        }
        self.builder.end()?;
        Ok(())
    }

    fn file(&mut self, name: &[u8], stat: &Stat) -> Result<(), WalkError> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(WalkError::Special);
        }
        // Nix looks at the owner's bit alone.
        let is_executable = stat.st_mode & 0o100 != 0;
        self.builder
            .regular(name, is_executable, stat.st_size as u64)?;
        Ok(())
    }

    /// Adds the root, which is a symlink opened with `O_PATH`.
    fn symlink(&mut self, link: &OwnedFd, name: &[u8]) -> Result<(), WalkError> {
        let target = readlinkat(link, c"", Vec::new())?;
        Ok(self.builder.symlink(name, target.to_bytes())?)
    }
}

/// Reads the files of one path for one stream; keeps the last file and its directory open.
struct FileReader {
    opened: Arc<Opened>,
    file: Option<(FileIndex, OwnedFd)>,
    directory: Option<(FileIndex, OwnedFd)>,
    /// Whether this kernel, filesystem and sandbox can tell that a read would wait.
    can_tell: bool,
}

impl ReadContents for FileReader {
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
        patience: Patience,
    ) -> Result<Progress, NarError> {
        let before = chunk.len();
        let result = self.read_file(layout, file, offset, length, chunk, patience);
        let Err(error) = result else {
            return Ok(Progress::Read);
        };
        if patience == Patience::None
            && let ReadError::Io(errno) = error
            && self.would_wait(errno)
        {
            chunk.truncate(before);
            return Ok(Progress::WouldWait);
        }
        Err({
            let name = self.opened.describe(&layout.path(file));
            match error {
                ReadError::Io(Errno::NOENT) => NarError::Vanished { file: name },
                ReadError::Io(error) => NarError::Read {
                    file: name,
                    source: error.into(),
                },
                ReadError::Size(found) => NarError::Changed {
                    file: name,
                    laid_out: layout.size(file),
                    found,
                },
            }
        })
    }
}

enum ReadError {
    Io(Errno),
    Size(u64),
}

impl From<Errno> for ReadError {
    fn from(error: Errno) -> ReadError {
        ReadError::Io(error)
    }
}

impl FileReader {
    fn read_file(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
        patience: Patience,
    ) -> Result<(), ReadError> {
        if patience == Patience::None && !self.can_tell {
            return Err(Errno::AGAIN.into());
        }
        let opened = self.opened.clone();
        let fd = match &self.file {
            _ if file == FileIndex::ROOT => &opened.root,
            Some((open, fd)) if *open == file => fd,
            _ => {
                let fd = self.open(layout, file, patience)?;
                &self.file.insert((file, fd)).1
            }
        };
        let before = chunk.len();
        let read = loop {
            let result = match patience {
                Patience::Any => pread(fd, spare_capacity(chunk), offset),
                Patience::None => pread_cached(fd, chunk, length, offset),
            };
            match result {
                Err(Errno::INTR) => chunk.truncate(before),
                result => break result?,
            }
        };
        let size = layout.size(file);
        if read == 0 || offset + read as u64 > size {
            // Shorter or longer than when it was opened.
            return Err(ReadError::Size(fstat(fd)?.st_size as u64));
        }
        chunk.truncate(before + read.min(length));
        if offset + read as u64 == size {
            self.file = None;
        }
        Ok(())
    }

    /// Opens a file and proves that it is the one laid out, as far as its size tells.
    fn open(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        patience: Patience,
    ) -> Result<OwnedFd, ReadError> {
        let Some(parent) = layout.parent(file) else {
            unreachable!("the root is held open");
        };
        let directory = match &self.directory {
            Some((open, fd)) if *open == parent => fd,
            _ => {
                let fd = self.open_directory(layout, parent, patience)?;
                &self.directory.insert((parent, fd)).1
            }
        };
        let fd = open_below(directory, layout.name(file), READ, patience)?;
        let stat = fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::NOENT.into());
        }
        match stat.st_size as u64 {
            size if size == layout.size(file) => Ok(fd),
            size => Err(ReadError::Size(size)),
        }
    }

    /// Opens a directory from the root down, one component at a time.
    fn open_directory(
        &self,
        layout: &Layout,
        directory: FileIndex,
        patience: Patience,
    ) -> Result<OwnedFd, ReadError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut names = Vec::new();
        let mut at = directory;
        while let Some(parent) = layout.parent(at) {
            names.push(layout.name(at));
            at = parent;
        }
        let mut fd = open_below(&self.opened.root, b".", flags, patience)?;
        for name in names.into_iter().rev() {
            fd = open_below(&fd, name, flags, patience)?;
        }
        Ok(fd)
    }

    /// Whether an impatient call failed only because it was one.
    fn would_wait(&mut self, errno: Errno) -> bool {
        match errno {
            Errno::AGAIN => true,
            // A filesystem (tmpfs, NFS), a kernel before 5.12 or a filter of system calls that does not know such
            // calls. Whoever waits finds out what else is wrong.
            Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM => {
                self.can_tell = false;
                true
            }
            _ => false,
        }
    }
}

fn open_below(
    directory: &OwnedFd,
    name: &[u8],
    flags: OFlags,
    patience: Patience,
) -> Result<OwnedFd, Errno> {
    match patience {
        Patience::Any => openat(directory, name, flags, Mode::empty()),
        Patience::None => openat2(directory, name, flags, Mode::empty(), ResolveFlags::CACHED),
    }
}

/// Appends what the page cache has, and at most one byte more than `length`: a file that grew is found out.
fn pread_cached(
    fd: &OwnedFd,
    chunk: &mut Vec<u8>,
    length: usize,
    offset: u64,
) -> Result<usize, Errno> {
    let before = chunk.len();
    chunk.resize(before + length + 1, 0);
    let buffer = &mut [IoSliceMut::new(&mut chunk[before..])];
    let read = preadv2(fd, buffer, offset, ReadWriteFlags::NOWAIT)?;
    chunk.truncate(before + read);
    Ok(read)
}

/// Layouts of the paths served last.
///
/// Keyed by hash and NarHash: a path collected and made anew may differ.
#[derive(Default)]
pub(super) struct LayoutCache(Mutex<Recent>);

type Key = (StorePathHash, NarHash);

#[derive(Default)]
struct Recent {
    layouts: HashMap<Key, (u64, Arc<Layout>)>,
    /// The keys by their last use; each use has a number of its own.
    order: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
}

impl LayoutCache {
    /// Returns the layout of an opened path, from memory or by a walk; `None` when it vanished.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when its NAR would not have the registered size.
    pub(super) async fn layout(
        &self,
        opened: &Arc<Opened>,
        info: &PathInfo,
    ) -> Result<Option<Arc<Layout>>, StoreError> {
        let key = (info.store_path.hash(), info.nar_hash);
        if let Some(layout) = self.recent().get(&key) {
            return Ok(Some(layout));
        }
        let walked = opened.clone();
        let Some(layout) = blocking(move || walked.lay_out()).await? else {
            return Ok(None);
        };
        opened.check_size(&layout, info.nar_size)?;
        let layout = Arc::new(layout);
        self.recent().insert(key, layout.clone());
        Ok(Some(layout))
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.0.lock().unwrap_or_else(|error| error.into_inner())
    }
}

impl Recent {
    fn get(&mut self, key: &Key) -> Option<Arc<Layout>> {
        let (used, layout) = self.layouts.get_mut(key)?;
        self.order.remove(used);
        self.uses += 1;
        self.order.insert(self.uses, *key);
        *used = self.uses;
        Some(layout.clone())
    }

    /// Adds a layout and drops those used least recently; one larger than the bound is not kept.
    fn insert(&mut self, key: Key, layout: Arc<Layout>) {
        if self.get(&key).is_some() || layout.memory_bytes() > LAYOUT_CACHE_BYTES_MAX {
            return;
        }
        self.uses += 1;
        self.bytes += layout.memory_bytes();
        self.order.insert(self.uses, key);
        self.layouts.insert(key, (self.uses, layout));
        while self.bytes > LAYOUT_CACHE_BYTES_MAX {
            let Some((_, oldest)) = self.order.pop_first() else {
                break;
            };
            if let Some((_, layout)) = self.layouts.remove(&oldest) {
                self.bytes -= layout.memory_bytes();
            }
        }
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    spawn_blocking(work)
        .await
        .map_err(|_| StoreError::Stopped)?
}

#[cfg(test)]
mod tests;
