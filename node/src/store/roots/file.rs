//! Temporary roots as Nix's own processes have them: a file that the collector reads.
//!
//! `<state>/temproots/<pid>` holds full paths, each ended by NUL, and is locked as long as its process lives; the
//! collector removes what is not locked (Nix's `libstore/gc.cc`, the same from 2.0 on). `<state>/gc.lock` is held
//! exclusively by a running collection, which has read the files at its start and is told of later roots over
//! `<state>/gc-socket/socket` (Nix 2.5 on).
//!
//! The file is locked shared, where Nix locks it exclusively: that is enough for a collector to see that it is in use,
//! and one before Nix 2.5, which asks for a shared lock itself and waits for it, is not held up. The file is written
//! only while no collection runs, or while one that has acknowledged the root does, so no collector reads half a path.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use granary_protocol::store_path::{StoreDir, StorePath};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::RootError;
use super::daemon::{connect_now, left, talk_error};

/// Before a collection that has just begun, or just ended, is looked at again.
const COLLECTION_PAUSE: Duration = Duration::from_millis(5);

/// How often a collector may take the new file away before we have locked it.
const ATTEMPTS: usize = 5;

/// The file of one process.
pub struct RootsFile {
    dir: StoreDir,
    state_dir: PathBuf,
    open: Option<Open>,
    /// How many holds each path has.
    held: BTreeMap<StorePath, usize>,
    /// Whether the file names paths that are held no more.
    has_dead: bool,
}

struct Open {
    path: PathBuf,
    file: File,
    gc_lock: File,
    length: u64,
}

impl RootsFile {
    pub fn new(dir: StoreDir, state_dir: PathBuf) -> RootsFile {
        RootsFile {
            dir,
            state_dir,
            open: None,
            held: BTreeMap::new(),
            has_dead: false,
        }
    }

    /// Makes a path a temporary root.
    pub fn hold(&mut self, path: &StorePath, deadline: Instant) -> Result<(), RootError> {
        let mut open = match self.open.take().filter(Open::is_there) {
            Some(open) => open,
            None => self.create()?,
        };
        if let Some(holds) = self.held.get_mut(path) {
            *holds += 1;
            self.open = Some(open);
            return Ok(());
        }
        let line = self.line(path);
        let held = open.add(&self.state_dir, &line, deadline);
        match held {
            Ok(()) => {
                self.held.insert(path.clone(), 1);
                self.open = Some(open);
                Ok(())
            }
            // Half a line would make the collector fail; without its file the other holds are lost, too.
            Err(RootError::File { file, source }) => {
                open.abandon();
                Err(RootError::File { file, source })
            }
            Err(error) => {
                self.open = Some(open);
                Err(error)
            }
        }
    }

    pub fn release(&mut self, path: &StorePath) {
        if let Some(holds) = self.held.get_mut(path) {
            *holds -= 1;
            if *holds == 0 {
                self.held.remove(path);
                self.has_dead = true;
            }
        }
    }

    pub fn has_to_tidy(&self) -> bool {
        self.has_dead
    }

    /// Leaves only what is held in the file, unless a collection runs.
    pub fn tidy(&mut self) {
        if !self.has_dead {
            return;
        }
        let Some(open) = &mut self.open else {
            self.has_dead = false;
            return;
        };
        let lines: Vec<u8> = self
            .held
            .keys()
            .flat_map(|path| line(&self.dir, path))
            .collect();
        match open.without_collection(|open| open.rewrite(&lines)) {
            None => {}
            Some(Ok(())) => self.has_dead = false,
            Some(Err(error)) => {
                warn!(file = %open.path.display(), %error, "could not rewrite the temporary roots, gave them up");
                self.has_dead = false;
                if let Some(open) = self.open.take() {
                    open.abandon();
                }
            }
        }
    }

    fn line(&self, path: &StorePath) -> Vec<u8> {
        line(&self.dir, path)
    }

    /// Makes our file, locks it, and writes what is held already.
    fn create(&mut self) -> Result<Open, RootError> {
        let lock = self.state_dir.join("gc.lock");
        let gc_lock = open_lock_file(&lock)?;
        let path = self
            .state_dir
            .join("temproots")
            .join(std::process::id().to_string());
        for _ in 0..ATTEMPTS {
            let file = open_lock_file(&path)?;
            let error = |source: io::Error| RootError::File {
                file: path.clone(),
                source,
            };
            // What another living process has locked is its own, in another PID namespace perhaps.
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(RootError::InUse { file: path }),
                Err(errno) => return Err(error(errno.into())),
            }
            let mut open = Open {
                path: path.clone(),
                file,
                gc_lock: gc_lock.try_clone().map_err(error)?,
                length: 0,
            };
            if !open.is_there() {
                continue;
            }
            let lines: Vec<u8> = self
                .held
                .keys()
                .flat_map(|path| line(&self.dir, path))
                .collect();
            open.rewrite(&lines).map_err(error)?;
            // Not atomic: a collector that comes between finds the file unlocked and takes it away.
            let locked = flock(&open.file, FlockOperation::NonBlockingLockShared);
            if locked.is_ok() && open.is_there() {
                return Ok(open);
            }
        }
        Err(RootError::Unstable { file: path })
    }
}

impl Drop for RootsFile {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            open.abandon();
        }
    }
}

impl Open {
    /// Adds a line, so that neither a running collection nor a later one takes the path.
    fn add(&mut self, state_dir: &Path, line: &[u8], deadline: Instant) -> Result<(), RootError> {
        loop {
            if let Some(added) = self.without_collection(|open| open.append(line)) {
                return added.map_err(|source| self.error(source));
            }
            if tell_collection(state_dir, line, deadline)? {
                return self.append(line).map_err(|source| self.error(source));
            }
            left(deadline)?;
            thread::sleep(COLLECTION_PAUSE);
        }
    }

    /// Runs `work` while no collection can begin; `None` when one is running.
    fn without_collection<T>(&mut self, work: impl FnOnce(&mut Open) -> T) -> Option<T> {
        let locked = flock(&self.gc_lock, FlockOperation::NonBlockingLockShared);
        if locked.is_err() {
            return None;
        }
        let result = work(self);
        if let Err(error) = flock(&self.gc_lock, FlockOperation::Unlock) {
            debug!(%error, "could not unlock the collector's lock");
        }
        Some(result)
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        self.file.write_all_at(line, self.length)?;
        self.length += line.len() as u64;
        Ok(())
    }

    fn rewrite(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.set_len(0)?;
        self.length = 0;
        self.append(lines)
    }

    /// Whether the file still stands under its name, and so is one that a collector reads.
    fn is_there(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|metadata| metadata.nlink() > 0)
    }

    /// Removes the file, unless another one took its place.
    fn abandon(self) {
        let ours = self.file.metadata();
        let named = std::fs::symlink_metadata(&self.path);
        if let (Ok(ours), Ok(named)) = (ours, named)
            && (ours.dev(), ours.ino()) == (named.dev(), named.ino())
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            debug!(file = %self.path.display(), %error, "left a file of temporary roots behind");
        }
    }

    fn error(&self, source: io::Error) -> RootError {
        RootError::File {
            file: self.path.clone(),
            source,
        }
    }
}

/// Tells a running collection of a root; false when there is none, or none yet that listens.
fn tell_collection(state_dir: &Path, line: &[u8], deadline: Instant) -> Result<bool, RootError> {
    let socket = state_dir.join("gc-socket").join("socket");
    let mut stream: UnixStream = match connect_now(&socket) {
        Ok(stream) => stream,
        Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN) => return Ok(false),
        Err(error) => {
            return Err(RootError::Connect {
                socket,
                source: error.into(),
            });
        }
    };
    let path = line.strip_suffix(b"\0").unwrap_or(line);
    let question = [path, b"\n"].concat();
    let mut answer = [0];
    let asked = stream
        .set_write_timeout(Some(left(deadline)?))
        .and_then(|()| stream.write_all(&question))
        .and_then(|()| stream.set_read_timeout(Some(left(deadline).unwrap_or(COLLECTION_PAUSE))))
        .and_then(|()| stream.read_exact(&mut answer));
    match asked {
        Ok(()) => Ok(answer == *b"1"),
        // It ended meanwhile.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::UnexpectedEof
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(talk_error(error)),
    }
}

fn line(dir: &StoreDir, path: &StorePath) -> Vec<u8> {
    let mut line = dir.display(path).into_bytes();
    line.push(0);
    line
}

/// Opens a file as Nix opens its lock files: made when absent, for root alone.
fn open_lock_file(path: &Path) -> Result<File, RootError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| RootError::File {
            file: path.to_owned(),
            source,
        })
}
