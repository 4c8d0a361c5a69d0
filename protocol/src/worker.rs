//! The worker protocol: what a client and the Nix daemon say to each other, as far as this node speaks it.
//!
//! Nix's `libstore/worker-protocol.hh`, versions 1.18 (Nix 2.0) to 1.38. Numbers are 64 bits, little endian; a string
//! is its length, its bytes, and zeros up to a multiple of eight. The client greets, the daemon greets with its
//! version, the client introduces itself ([`introduction`]), the daemon says welcome ([`welcome`]); then questions and
//! answers alternate. Before each answer stand any number of log messages, which are read past.
//!
//! Reading is strict and needs no state: each parser gets all bytes received so far and returns `None` while they are
//! too few, so the hands only collect. What the daemon may make them collect is bounded by [`ANSWER_BYTES_MAX`].

use crate::store_path::{StoreDir, StorePath};

/// Most bytes of one answer, its log messages included. A daemon's error has some hundred; what goes beyond is nothing
/// that we asked for.
pub const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// Longest string in an answer: the text of an error.
const STRING_BYTES_MAX: u64 = 64 * 1024;

/// Most elements of one list: fields of a log message, traces of an error, features of the protocol.
const ELEMENTS_MAX: u64 = 256;

/// What each side says first.
const CLIENT_GREETING: u64 = 0x6e69_7863;
const DAEMON_GREETING: u64 = 0x6478_696f;

const MAJOR: u64 = 1;

/// The messages before an answer.
const LOG_WRITE: u64 = 0x6461_7416;
const LOG_NEXT: u64 = 0x6f6c_6d67;
const LOG_START_ACTIVITY: u64 = 0x5354_5254;
const LOG_STOP_ACTIVITY: u64 = 0x5354_4f50;
const LOG_RESULT: u64 = 0x5253_4c54;
const LOG_ERROR: u64 = 0x6378_7470;
const LOG_LAST: u64 = 0x616c_7473;

/// The one question that this node asks.
const ADD_TEMP_ROOT: u64 = 11;

/// A version of the protocol that both sides speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Of major version 1.
    minor: u64,
}

/// What the daemon answered to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// In the daemon's words.
    Refused(String),
}

/// Why bytes are none of a Nix daemon that we understand. The connection is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerError {
    #[error("greeted with {found:#x}, a nix daemon says {DAEMON_GREETING:#x}")]
    Greeting { found: u64 },
    #[error("speaks version {major}.{minor} of the worker protocol, this node 1.18 and newer 1.x")]
    Version { major: u64, minor: u64 },
    #[error("{what} has {found} bytes or elements, at most {max} are read")]
    TooLong {
        what: &'static str,
        found: u64,
        max: u64,
    },
    #[error("a string is padded with other bytes than zeros")]
    Padding,
    #[error("{what} is {found:#x}, which is none that the protocol knows")]
    Unknown { what: &'static str, found: u64 },
}

/// What a parser found: a value and how many bytes it took, `None` while there are too few.
pub type Parsed<T> = Result<Option<(T, usize)>, WorkerError>;

/// Returns what a client says first.
pub fn greeting() -> Vec<u8> {
    CLIENT_GREETING.to_le_bytes().to_vec()
}

/// Reads the daemon's greeting: the version that both speak.
pub fn greeted(bytes: &[u8]) -> Parsed<Version> {
    parse(bytes, |reader| {
        let found = reader.number()?;
        if found != DAEMON_GREETING {
            return Err(WorkerError::Greeting { found }.into());
        }
        let version = reader.number()?;
        let (major, minor) = (version >> 8, version & 0xff);
        if major != MAJOR || minor < Version::OLDEST.minor {
            return Err(WorkerError::Version { major, minor }.into());
        }
        let minor = minor.min(Version::NEWEST.minor);
        Ok(Version { minor })
    })
}

/// Returns what the client says about itself: the version spoken, and no wishes.
pub fn introduction(version: Version) -> Vec<u8> {
    let mut words = vec![MAJOR << 8 | version.minor];
    if version.has_features() {
        // None of the optional features is asked for.
        words.push(0);
    }
    // No CPU to be bound to, no space to be reserved: both long without meaning, and still in their places.
    words.extend([0, 0]);
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Reads the daemon's answer to the introduction.
pub fn welcome(version: Version, bytes: &[u8]) -> Parsed<Answer> {
    parse(bytes, |reader| {
        if version.has_features() {
            for _ in 0..reader.count("the list of features")? {
                reader.string()?;
            }
        }
        if version.minor >= 33 {
            // Nix's own version.
            reader.string()?;
        }
        if version.minor >= 35 {
            // Whether we are trusted: 0 for unknown.
            let found = reader.number()?;
            if found > 2 {
                let what = "the daemon's trust";
                return Err(WorkerError::Unknown { what, found }.into());
            }
        }
        reader.log(version)
    })
}

/// Asks to keep a path from being collected until the connection ends.
pub fn add_temp_root(dir: &StoreDir, path: &StorePath) -> Vec<u8> {
    let path = dir.display(path);
    let mut bytes = Vec::with_capacity(24 + path.len());
    bytes.extend(ADD_TEMP_ROOT.to_le_bytes());
    bytes.extend((path.len() as u64).to_le_bytes());
    bytes.extend(path.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Reads the answer to [`add_temp_root`].
pub fn temp_root_added(version: Version, bytes: &[u8]) -> Parsed<Answer> {
    parse(bytes, |reader| {
        let answer = reader.log(version)?;
        if answer == Answer::Done {
            let found = reader.number()?;
            if found != 1 {
                let what = "the answer to a temporary root";
                return Err(WorkerError::Unknown { what, found }.into());
            }
        }
        Ok(answer)
    })
}

impl Version {
    /// The oldest version understood, that of Nix 2.0.
    pub const OLDEST: Version = Version { minor: 18 };
    /// The newest; a daemon comes down to it.
    pub const NEWEST: Version = Version { minor: 38 };

    fn has_features(self) -> bool {
        self.minor >= 38
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{MAJOR}.{}", self.minor)
    }
}

enum Stop {
    TooFew,
    Wrong(WorkerError),
}

impl From<WorkerError> for Stop {
    fn from(error: WorkerError) -> Stop {
        Stop::Wrong(error)
    }
}

fn parse<T>(bytes: &[u8], read: impl FnOnce(&mut Reader<'_>) -> Result<T, Stop>) -> Parsed<T> {
    let mut reader = Reader { rest: bytes };
    match read(&mut reader) {
        Ok(value) => Ok(Some((value, bytes.len() - reader.rest.len()))),
        Err(Stop::Wrong(error)) => Err(error),
        Err(Stop::TooFew) if bytes.len() >= ANSWER_BYTES_MAX => Err(WorkerError::TooLong {
            what: "an answer",
            found: bytes.len() as u64,
            max: ANSWER_BYTES_MAX as u64,
        }),
        Err(Stop::TooFew) => Ok(None),
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Stop::TooFew)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64, Stop> {
        let bytes = self.take(8)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    fn count(&mut self, what: &'static str) -> Result<u64, Stop> {
        match self.number()? {
            found if found > ELEMENTS_MAX => {
                let max = ELEMENTS_MAX;
                Err(WorkerError::TooLong { what, found, max }.into())
            }
            count => Ok(count),
        }
    }

    fn string(&mut self) -> Result<&'a [u8], Stop> {
        let found = self.number()?;
        if found > STRING_BYTES_MAX {
            let (what, max) = ("a string", STRING_BYTES_MAX);
            return Err(WorkerError::TooLong { what, found, max }.into());
        }
        // At most STRING_BYTES_MAX.
        let length = found as usize;
        let padded = self.take(length.next_multiple_of(8))?;
        let (string, padding) = padded.split_at(length);
        match padding.iter().all(|byte| *byte == 0) {
            true => Ok(string),
            false => Err(WorkerError::Padding.into()),
        }
    }

    /// Reads log messages to the one that says how the question fared.
    fn log(&mut self, version: Version) -> Result<Answer, Stop> {
        loop {
            match self.number()? {
                LOG_LAST => return Ok(Answer::Done),
                LOG_ERROR => return Ok(Answer::Refused(self.error(version)?)),
                LOG_NEXT | LOG_WRITE => {
                    self.string()?;
                }
                LOG_START_ACTIVITY => {
                    // The activity's number, level and kind; its text; its fields; its parent.
                    self.take(24)?;
                    self.string()?;
                    self.fields()?;
                    self.number()?;
                }
                LOG_STOP_ACTIVITY => {
                    self.number()?;
                }
                LOG_RESULT => {
                    self.take(16)?;
                    self.fields()?;
                }
                found => {
                    let what = "a message before the answer";
                    return Err(WorkerError::Unknown { what, found }.into());
                }
            }
        }
    }

    fn fields(&mut self) -> Result<(), Stop> {
        for _ in 0..self.count("the fields of a log message")? {
            match self.number()? {
                0 => {
                    self.number()?;
                }
                1 => {
                    self.string()?;
                }
                found => {
                    let what = "the kind of a log message's field";
                    return Err(WorkerError::Unknown { what, found }.into());
                }
            }
        }
        Ok(())
    }

    fn error(&mut self, version: Version) -> Result<String, Stop> {
        let text = if version.minor >= 26 {
            // The word `Error`, a level, a name; then the text.
            self.string()?;
            self.number()?;
            self.string()?;
            let text = self.string()?;
            self.position()?;
            for _ in 0..self.count("the traces of an error")? {
                self.position()?;
                self.string()?;
            }
            text
        } else {
            let text = self.string()?;
            // The exit status that a command line would end with.
            self.number()?;
            text
        };
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// Nix has never sent a position over this protocol, only the 0 that says there is none.
    fn position(&mut self) -> Result<(), Stop> {
        match self.number()? {
            0 => Ok(()),
            found => {
                let what = "the position of an error";
                Err(WorkerError::Unknown { what, found }.into())
            }
        }
    }
}

#[cfg(test)]
mod tests;
