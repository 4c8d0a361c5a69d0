//! Temporary roots at the Nix daemon, over its socket.
//!
//! A root lives as long as the connection over which it was asked for, and each connection is a process that the daemon
//! forks. So holds share one connection, which is given up when nothing on it is held any more; one that is old or full
//! takes no further holds, so that what was sent long ago does not stay held for ever.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use granary_protocol::store_path::{StoreDir, StorePath};
use granary_protocol::worker::{self, Answer, Parsed, Version};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tracing::debug;

use super::RootError;

/// Connections at once. One takes new holds; the others end with the transfers that began while they did.
const CONNECTIONS_MAX: usize = 4;

/// Roots of one connection: the daemon's collector reads all of them, and they are let go together.
const ROOTS_MAX: usize = 4096;

/// How long a connection takes new holds, and so how much longer than its transfer a path may stay held.
const AGE_MAX: Duration = Duration::from_secs(30);

/// How long a connection without holds is kept for the next one: Nix fetches one path after another, and each
/// connection costs the daemon a fork.
const LINGER: Duration = Duration::from_secs(1);

/// How long a daemon is left alone that could not be reached or did not answer, so that not every NAR waits for it.
const REST: Duration = Duration::from_secs(30);

/// Before a refused root is asked for again. A collection that is just starting refuses roots for a moment, until its
/// socket is there (Nix before 2.9).
const REFUSED_PAUSE: Duration = Duration::from_millis(10);

/// Bytes read at once; an answer has some 16.
const READ_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionNumber(u64);

/// The connections to one daemon.
pub struct Daemon {
    dir: StoreDir,
    socket: PathBuf,
    connections: BTreeMap<ConnectionNumber, Connection>,
    next: u64,
    rests_until: Option<Instant>,
    /// The connection that is never given up, because its process keeps the database open.
    kept: Option<ConnectionNumber>,
}

struct Connection {
    stream: UnixStream,
    version: Version,
    /// What the daemon said and was not read yet.
    heard: Vec<u8>,
    opened: Instant,
    /// Roots asked for since then.
    roots: usize,
    /// Holds that stand.
    holds: usize,
    idle_since: Instant,
    /// An answer is due that did not come in time: good for the holds that it has, and for nothing else.
    is_stuck: bool,
}

impl Daemon {
    pub fn new(dir: StoreDir, socket: PathBuf) -> Daemon {
        Daemon {
            dir,
            socket,
            connections: BTreeMap::new(),
            next: 0,
            rests_until: None,
            kept: None,
        }
    }

    /// Opens a connection that stays. Called when nobody has the database open, so an earlier one has ended.
    pub fn wake(&mut self, deadline: Instant) -> Result<(), RootError> {
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return Err(RootError::Resting);
        }
        if let Some(ended) = self.kept.take() {
            self.connections.remove(&ended);
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            return Err(RootError::Stuck);
        }
        self.kept = Some(self.open(deadline)?);
        Ok(())
    }

    /// Makes a path a temporary root; returns what is to be released.
    pub fn hold(
        &mut self,
        path: &StorePath,
        deadline: Instant,
    ) -> Result<ConnectionNumber, RootError> {
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return Err(RootError::Resting);
        }
        self.rests_until = None;
        let question = worker::add_temp_root(&self.dir, path);
        loop {
            let (number, is_new) = self.connection(deadline)?;
            let Some(connection) = self.connections.get_mut(&number) else {
                unreachable!("found or made above");
            };
            let answer = connection.ask(&question, deadline);
            match answer {
                Ok(Answer::Done) => {
                    connection.roots += 1;
                    connection.holds += 1;
                    return Ok(number);
                }
                Ok(Answer::Refused(text)) => {
                    if Instant::now() + REFUSED_PAUSE >= deadline {
                        return Err(RootError::Refused { text });
                    }
                    thread::sleep(REFUSED_PAUSE);
                }
                Err(RootError::TimedOut) => {
                    // Its other holds stand. A daemon that is not even quick on a new connection gets a rest.
                    connection.is_stuck = true;
                    if connection.holds == 0 {
                        self.connections.remove(&number);
                    }
                    if is_new {
                        self.rests_until = Some(Instant::now() + REST);
                    }
                    return Err(RootError::TimedOut);
                }
                Err(error) => {
                    debug!(%error, "lost a connection to the nix daemon");
                    self.connections.remove(&number);
                    // An old connection may just have ended; a new one that fails is a daemon that fails.
                    if is_new {
                        self.rests_until = Some(Instant::now() + REST);
                        return Err(error);
                    }
                }
            }
        }
    }

    pub fn release(&mut self, number: ConnectionNumber) {
        // A connection that was lost has nothing left to let go.
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.holds = connection.holds.saturating_sub(1);
            if connection.holds == 0 {
                connection.idle_since = Instant::now();
            }
        }
    }

    pub fn has_to_tidy(&self) -> bool {
        let kept = self.kept;
        self.connections
            .iter()
            .any(|(number, connection)| connection.holds == 0 && kept != Some(*number))
    }

    /// Ends the connections that hold nothing and wait for nothing.
    pub fn tidy(&mut self) {
        let kept = self.kept;
        self.connections.retain(|number, connection| {
            connection.holds > 0
                || kept == Some(*number)
                || (connection.takes_more() && connection.idle_since.elapsed() < LINGER)
        });
    }

    /// Returns the connection for the next hold, and whether it was made for it.
    fn connection(&mut self, deadline: Instant) -> Result<(ConnectionNumber, bool), RootError> {
        // The one that stays takes none: what it once held would be held for ever.
        let kept = self.kept;
        let youngest = self
            .connections
            .iter()
            .rev()
            .find(|(number, connection)| !connection.is_stuck && kept != Some(**number));
        let is_full = self.connections.len() >= CONNECTIONS_MAX;
        match youngest {
            Some((number, connection)) if is_full || connection.takes_more() => {
                return Ok((*number, false));
            }
            None if is_full => return Err(RootError::Stuck),
            _ => {}
        }
        Ok((self.open(deadline)?, true))
    }

    fn open(&mut self, deadline: Instant) -> Result<ConnectionNumber, RootError> {
        let opened = Connection::open(&self.socket, deadline);
        let connection = opened.inspect_err(|error| {
            // Nobody listens: cheap to find out again, and a daemon may be started at any time.
            if !matches!(error, RootError::Connect { .. }) {
                self.rests_until = Some(Instant::now() + REST);
            }
        })?;
        let number = ConnectionNumber(self.next);
        self.next += 1;
        self.connections.insert(number, connection);
        Ok(number)
    }
}

impl Connection {
    fn open(socket: &std::path::Path, deadline: Instant) -> Result<Connection, RootError> {
        let stream = connect_now(socket).map_err(|error| RootError::Connect {
            socket: socket.to_owned(),
            source: error.into(),
        })?;
        let mut connection = Connection {
            stream,
            // Until it has said which.
            version: Version::OLDEST,
            heard: Vec::new(),
            opened: Instant::now(),
            roots: 0,
            holds: 0,
            idle_since: Instant::now(),
            is_stuck: false,
        };
        connection.say(&worker::greeting(), deadline)?;
        let version = connection.hear(deadline, worker::greeted)?;
        connection.version = version;
        connection.say(&worker::introduction(version), deadline)?;
        match connection.hear(deadline, |bytes| worker::welcome(version, bytes))? {
            Answer::Done => Ok(connection),
            Answer::Refused(text) => Err(RootError::Refused { text }),
        }
    }

    fn takes_more(&self) -> bool {
        !self.is_stuck && self.roots < ROOTS_MAX && self.opened.elapsed() < AGE_MAX
    }

    fn ask(&mut self, question: &[u8], deadline: Instant) -> Result<Answer, RootError> {
        self.say(question, deadline)?;
        let version = self.version;
        self.hear(deadline, |bytes| worker::temp_root_added(version, bytes))
    }

    fn say(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), RootError> {
        self.stream
            .set_write_timeout(Some(left(deadline)?))
            .and_then(|()| self.stream.write_all(bytes))
            .map_err(talk_error)
    }

    /// Collects bytes until they say something.
    fn hear<T>(
        &mut self,
        deadline: Instant,
        read: impl Fn(&[u8]) -> Parsed<T>,
    ) -> Result<T, RootError> {
        loop {
            if let Some((said, taken)) = read(&self.heard)? {
                self.heard.drain(..taken);
                return Ok(said);
            }
            let mut bytes = [0; READ_BYTES];
            self.stream
                .set_read_timeout(Some(left(deadline)?))
                .map_err(talk_error)?;
            match self.stream.read(&mut bytes).map_err(talk_error)? {
                0 => return Err(talk_error(io::ErrorKind::UnexpectedEof.into())),
                count => self.heard.extend(bytes.iter().take(count)),
            }
        }
    }
}

/// Connects without waiting: a daemon that accepts nothing would hold us for ever once its queue is full.
pub fn connect_now(path: &std::path::Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    rustix::io::ioctl_fionbio(&stream, false)?;
    Ok(stream)
}

/// The time that is left, never 0, which a socket would take for no limit.
pub fn left(deadline: Instant) -> Result<Duration, RootError> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(RootError::TimedOut),
        false => Ok(left),
    }
}

pub fn talk_error(source: io::Error) -> RootError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => RootError::TimedOut,
        _ => RootError::Talk { source },
    }
}
