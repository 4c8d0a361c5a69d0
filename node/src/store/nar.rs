//! The NAR of a path in the store, from any offset, without ever holding it.
//!
//! A path is opened once ([`Opened`]) and everything below it is reached from that descriptor, one
//! component at a time and never through a symlink, so that nothing outside can be read. A walk
//! (names and sizes, no contents) gives its [`Layout`]; layouts of recent paths are kept, so a
//! range of a known path starts at once. A stream then reads in chunks on the blocking pool: each
//! hop fills one chunk from as many small files as fit, while the chunk before it is being sent.
//!
//! Plain `pread`: store files are mapped by nobody else, and a file truncated under a mapping
//! would be a SIGBUS. A file whose size is not the one laid out ends the stream in an error.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{Stream, stream};
use granary_protocol::{
    hash::NarHash,
    nar::{FileIndex, Layout, LayoutBuilder, LayoutError, Segment},
    store_path::{StorePath, StorePathHash},
};
use rustix::{
    buffer::spare_capacity,
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat},
    io::{Errno, pread},
};
use tokio::task::{JoinHandle, spawn_blocking};

use super::{PathInfo, StoreConfig, StoreError};

/// Bytes of one chunk: large enough that the hop to the blocking pool (some 10 µs) does not show,
/// small enough that the three a stream may hold (sent, ready, being read) stay below 1 MiB.
pub const CHUNK_BYTES: usize = 256 * 1024;

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
    layout: Arc<Layout>,
    contents: Arc<dyn Contents>,
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
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
    ) -> Result<(), NarError>;
}

impl Nar {
    pub(super) fn new(layout: Arc<Layout>, contents: Arc<dyn Contents>) -> Nar {
        Nar { layout, contents }
    }

    /// Returns the size of the whole NAR, the one that is registered.
    pub fn size(&self) -> u64 {
        self.layout.nar_size()
    }

    /// Returns what the NAR holds; [`Layout::listing`] is its `.ls`.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Streams the bytes in `range` of the NAR, in chunks of at most [`CHUNK_BYTES`].
    ///
    /// Bytes beyond the end do not exist, so such a range ends early. Reading is one chunk ahead of
    /// the receiver. Cancel-safe: dropping the stream ends the reading after the chunk under way.
    /// # Errors
    /// The first [`NarError`] ends the stream; chunks are never padded.
    pub fn stream(
        &self,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, NarError>> + Send + Unpin + use<> {
        let producer = Producer {
            layout: self.layout.clone(),
            contents: self.contents.clone().reader(),
            at: range.start,
            end: range.end.min(self.layout.nar_size()),
        };
        Box::pin(stream::unfold(Next::Start(producer), Next::step))
    }
}

/// The state of a stream between chunks.
enum Next {
    Start(Producer),
    Reading(JoinHandle<(Producer, Result<Bytes, NarError>)>),
    End,
}

impl Next {
    async fn step(self) -> Option<(Result<Bytes, NarError>, Next)> {
        let reading = match self {
            Next::Start(producer) if producer.is_done() => return None,
            Next::Start(producer) => spawn_blocking(|| producer.chunk()),
            Next::Reading(reading) => reading,
            Next::End => return None,
        };
        Some(match reading.await {
            Ok((producer, Ok(chunk))) => {
                let next = match producer.is_done() {
                    true => Next::End,
                    false => Next::Reading(spawn_blocking(|| producer.chunk())),
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
}

impl Producer {
    fn is_done(&self) -> bool {
        self.at >= self.end
    }

    /// Reads the next chunk; blocks on the disk.
    fn chunk(mut self) -> (Producer, Result<Bytes, NarError>) {
        let result = self.fill();
        (self, result)
    }

    fn fill(&mut self) -> Result<Bytes, NarError> {
        let size = (self.end - self.at).min(CHUNK_BYTES as u64) as usize;
        let mut chunk = Vec::with_capacity(size);
        for segment in self.layout.segments(self.at) {
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
                        self.contents
                            .read(&self.layout, file, offset, length, &mut chunk)?;
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
        Ok(chunk.into())
    }
}

/// A path of the real store, held open.
pub(super) struct Opened {
    /// The path itself: a directory or file opened for reading, or an `O_PATH` of a symlink.
    root: OwnedFd,
    stat: Stat,
    store_path: StorePath,
}

impl Opened {
    /// Opens a path of the store on the blocking pool; `None` when there is no such file.
    pub(super) async fn open(
        config: &Arc<StoreConfig>,
        store_path: &StorePath,
    ) -> Result<Option<Arc<Opened>>, StoreError> {
        let config = config.clone();
        let store_path = store_path.clone();
        blocking(move || {
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
                    store_path,
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
        })
        .await
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
}

impl ReadContents for FileReader {
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
    ) -> Result<(), NarError> {
        let result = self.read_file(layout, file, offset, length, chunk);
        result.map_err(|error| {
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
    ) -> Result<(), ReadError> {
        let opened = self.opened.clone();
        let fd = match &self.file {
            _ if file == FileIndex::ROOT => &opened.root,
            Some((open, fd)) if *open == file => fd,
            _ => {
                let fd = self.open(layout, file)?;
                &self.file.insert((file, fd)).1
            }
        };
        let before = chunk.len();
        let read = loop {
            match pread(fd, spare_capacity(chunk), offset) {
                Err(Errno::INTR) => {}
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
    fn open(&mut self, layout: &Layout, file: FileIndex) -> Result<OwnedFd, ReadError> {
        let Some(parent) = layout.parent(file) else {
            unreachable!("the root is held open");
        };
        let directory = match &self.directory {
            Some((open, fd)) if *open == parent => fd,
            _ => {
                let fd = self.open_directory(layout, parent)?;
                &self.directory.insert((parent, fd)).1
            }
        };
        let fd = openat(directory, layout.name(file), READ, Mode::empty())?;
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
    fn open_directory(&self, layout: &Layout, directory: FileIndex) -> Result<OwnedFd, ReadError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut names = Vec::new();
        let mut at = directory;
        while let Some(parent) = layout.parent(at) {
            names.push(layout.name(at));
            at = parent;
        }
        let mut fd = openat(&self.opened.root, c".", flags, Mode::empty())?;
        for name in names.into_iter().rev() {
            fd = openat(&fd, name, flags, Mode::empty())?;
        }
        Ok(fd)
    }
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
        if layout.nar_size() != info.nar_size {
            return Err(StoreError::Corrupt {
                path: info.store_path.base_name(),
                found: layout.nar_size(),
                registered: info.nar_size,
            });
        }
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

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    spawn_blocking(work)
        .await
        .map_err(|_| StoreError::Stopped)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use granary_protocol::nar::Tree;

    fn key(number: u8) -> Key {
        let hash = StorePathHash::from_bytes([number; 20]);
        (hash, granary_protocol::hash::NarHasher::new().finish())
    }

    #[test]
    fn layouts_used_least_recently_make_room() {
        let link = Tree::Symlink {
            target: vec![b't'; 4000],
        };
        let tree = (0..1000).map(|number| (format!("{number:04}").into_bytes(), link.clone()));
        let layout = Arc::new(Tree::Directory(tree.collect()).layout().unwrap());
        let fit = LAYOUT_CACHE_BYTES_MAX / layout.memory_bytes();
        assert!(fit < 100);
        let mut recent = Recent::default();
        for number in 0..fit as u8 {
            recent.insert(key(number), layout.clone());
        }
        assert!(recent.get(&key(0)).is_some());
        recent.insert(key(200), layout.clone());
        assert!(recent.get(&key(0)).is_some(), "it was used");
        assert!(recent.get(&key(1)).is_none(), "the oldest went");
        assert!(recent.get(&key(2)).is_some());
        assert_eq!(recent.bytes, recent.layouts.len() * layout.memory_bytes());
        assert_eq!(recent.order.len(), recent.layouts.len());
    }
}
