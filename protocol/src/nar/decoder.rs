//! Decoder: the strict reading of a NAR that arrives in pieces of any size.
//!
//! Push-driven and free of I/O: the caller hands in what it has and takes events until the piece
//! is used up. Contents are borrowed from the piece, everything else from a buffer of at most
//! 4.1 KiB; with the last name of each of 64 levels a decoder holds at most 20 KiB, whatever
//! lengths the input declares.
//!
//! Accepts exactly the strings that a [`Layout`](super::Layout) produces (up to the number of
//! nodes, which a decoder does not count): canonical order of fields, zero padding, names strictly
//! ascending, nothing after the end.

use super::{
    LEVELS_MAX, MAGIC, NAME_BYTES_MAX, NameError, Printable, SIZE_MAX, TARGET_BYTES_MAX,
    TargetError, check_name, check_target, padding, string_bytes,
};

/// Bytes of a keyword as the input declares it, before it is compared; Nix uses the same bound.
const KEYWORD_BYTES_MAX: usize = 32;

/// What a NAR says next.
///
/// A node is one of `Directory` … `EndDirectory`, `Regular` followed by `Contents` until `size`
/// bytes were given, or `Symlink`. Within a directory each node is preceded by its `Entry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// The node that follows is a directory's entry of this name.
    Entry { name: &'a [u8] },
    /// A directory starts.
    Directory,
    /// The directory that started last ends.
    EndDirectory,
    /// A regular file of `size` bytes starts.
    Regular { executable: bool, size: u64 },
    /// The next bytes of the file that started last; never empty.
    Contents(&'a [u8]),
    /// A symlink.
    Symlink { target: &'a [u8] },
    /// The NAR is complete; any further byte is an error.
    End,
}

/// Why a string is not a NAR, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("nar is malformed at byte {offset}: {fault}")]
pub struct DecodeError {
    /// The first byte of the string (length included) that is wrong, or of the bytes missing.
    pub offset: u64,
    pub fault: Fault,
}

/// What is wrong with a NAR.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("expected {expected}, found {found}")]
    Unexpected {
        expected: &'static str,
        found: Printable,
    },
    #[error("{what} claims {length} bytes, at most {max} are allowed")]
    TooLong {
        what: &'static str,
        length: u64,
        max: u64,
    },
    #[error("padding is not zero")]
    Padding,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("entry {name} does not sort after {previous}, its predecessor")]
    Unsorted {
        name: Printable,
        previous: Printable,
    },
    #[error("nodes are nested deeper than {LEVELS_MAX} levels")]
    TooDeep,
    #[error("bytes follow the end")]
    Trailing,
    #[error("the nar ends before it is complete")]
    Truncated,
}

/// Reads one NAR, piece by piece.
///
/// ```
/// # use granary_protocol::nar::{Decoder, DecodeError, Event};
/// # fn take<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<(), DecodeError> {
/// let mut decoder = Decoder::new();
/// for mut piece in pieces {
///     while let Some(event) = decoder.next(&mut piece)? {
///         if let Event::Contents(bytes) = event { /* write them */ }
///     }
/// }
/// decoder.finish()
/// # }
/// # take(std::iter::empty()).unwrap_err();
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    /// Bytes consumed so far.
    offset: u64,
    /// The string being read: its length as 8 bytes, itself, its padding.
    string: Vec<u8>,
    /// Whether `string` was judged, so that the next one replaces it. Until then it stays, for its
    /// event borrows it.
    is_judged: bool,
    /// The last entry of every open directory; those beyond `open` are kept for their memory.
    last: Vec<Vec<u8>>,
    /// Directories that have not ended, which is the depth of the node being read.
    open: usize,
    failed: Option<DecodeError>,
}

/// What comes next. Variants carry what their predecessors told.
#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Magic,
    NodeOpen,
    TypeKeyword,
    Type,
    ExecutableOrContents,
    ExecutableMark,
    ContentsKeyword,
    ContentsLength {
        executable: bool,
    },
    Contents {
        remaining: u64,
        padding: u8,
    },
    ContentsPadding {
        remaining: u8,
    },
    TargetKeyword,
    Target,
    EntryOrClose,
    EntryOpen,
    NameKeyword,
    Name,
    NodeKeyword,
    NodeClose,
    EntryClose,
    /// The root has been closed; [`Event::End`] has not been given.
    Closed,
    Finished,
}

/// An event whose bytes are still in the decoder's buffer.
enum Ready<'i> {
    Entry,
    Directory,
    EndDirectory,
    Regular { executable: bool, size: u64 },
    Contents(&'i [u8]),
    Symlink,
    End,
}

impl Decoder {
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Returns the next event, taking from the front of `input` what it needs.
    ///
    /// `None` means that `input` is used up and more is needed, or that the NAR has ended. After an
    /// error every further call returns the same error.
    pub fn next<'e, 'i: 'e>(
        &'e mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Event<'e>>, DecodeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let ready = self.advance(input).inspect_err(|error| {
            self.failed = Some(error.clone());
        })?;
        Ok(ready.map(|ready| match ready {
            Ready::Entry => Event::Entry {
                name: string_of(&self.string),
            },
            Ready::Directory => Event::Directory,
            Ready::EndDirectory => Event::EndDirectory,
            Ready::Regular { executable, size } => Event::Regular { executable, size },
            Ready::Contents(bytes) => Event::Contents(bytes),
            Ready::Symlink => Event::Symlink {
                target: string_of(&self.string),
            },
            Ready::End => Event::End,
        }))
    }

    /// Returns how many bytes were consumed.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Says that no more input comes.
    ///
    /// # Errors
    /// [`Fault::Truncated`] unless [`Event::End`] was given; an earlier error again.
    pub fn finish(self) -> Result<(), DecodeError> {
        match (self.failed, self.state) {
            (Some(error), _) => Err(error),
            (None, State::Finished) => Ok(()),
            (None, _) => Err(DecodeError {
                offset: self.offset,
                fault: Fault::Truncated,
            }),
        }
    }

    fn advance<'i>(&mut self, input: &mut &'i [u8]) -> Result<Option<Ready<'i>>, DecodeError> {
        loop {
            match self.state {
                State::Contents {
                    remaining: 0,
                    padding,
                } => {
                    self.state = State::ContentsPadding { remaining: padding };
                }
                State::Contents { remaining, padding } => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let length = usize::try_from(remaining)
                        .map_or(input.len(), |remaining| remaining.min(input.len()));
                    self.state = State::Contents {
                        remaining: remaining - length as u64,
                        padding,
                    };
                    return Ok(Some(Ready::Contents(self.take(input, length))));
                }
                State::ContentsPadding { remaining: 0 } => self.state = State::NodeClose,
                State::ContentsPadding { remaining } => {
                    let length = input.len().min(usize::from(remaining));
                    if length == 0 {
                        return Ok(None);
                    }
                    let zeros = self.take(input, length);
                    if zeros.iter().any(|&byte| byte != 0) {
                        return Err(self.error_before(length as u64, Fault::Padding));
                    }
                    self.state = State::ContentsPadding {
                        remaining: remaining - length as u8,
                    };
                }
                State::ContentsLength { executable } => {
                    let Some(size) = self.read_length(input) else {
                        return Ok(None);
                    };
                    self.is_judged = true;
                    if size > SIZE_MAX {
                        let fault = Fault::TooLong {
                            what: "a file's contents",
                            length: size,
                            max: SIZE_MAX,
                        };
                        return Err(self.error_before(8, fault));
                    }
                    self.state = State::Contents {
                        remaining: size,
                        padding: padding(size) as u8,
                    };
                    return Ok(Some(Ready::Regular { executable, size }));
                }
                State::Closed => {
                    self.state = State::Finished;
                    return Ok(Some(Ready::End));
                }
                State::Finished if input.is_empty() => return Ok(None),
                State::Finished => return Err(self.error_before(0, Fault::Trailing)),
                _ => {
                    if !self.read_string(input)? {
                        return Ok(None);
                    }
                    let at = self.string.len() as u64;
                    let ready = self
                        .take_string()
                        .map_err(|fault| self.error_before(at, fault))?;
                    if ready.is_some() {
                        return Ok(ready);
                    }
                }
            }
        }
    }

    /// Judges the complete string in the buffer and moves on.
    fn take_string(&mut self) -> Result<Option<Ready<'static>>, Fault> {
        let string = string_of(&self.string);
        let (state, ready) = match (self.state, string) {
            (State::Magic, _) if string == MAGIC.as_bytes() => (State::NodeOpen, None),
            (State::Magic, _) => return unexpected("the magic \"nix-archive-1\"", string),

            (State::NodeOpen, b"(") if self.open < LEVELS_MAX => (State::TypeKeyword, None),
            (State::NodeOpen, b"(") => return Err(Fault::TooDeep),
            (State::NodeOpen, _) => return unexpected("\"(\" of a node", string),
            (State::TypeKeyword, b"type") => (State::Type, None),
            (State::TypeKeyword, _) => return unexpected("\"type\"", string),
            (State::Type, b"regular") => (State::ExecutableOrContents, None),
            (State::Type, b"symlink") => (State::TargetKeyword, None),
            (State::Type, b"directory") => {
                match self.last.get_mut(self.open) {
                    Some(last) => last.clear(),
                    None => self.last.push(Vec::new()),
                }
                self.open += 1;
                (State::EntryOrClose, Some(Ready::Directory))
            }
            (State::Type, _) => {
                return unexpected("the type \"regular\", \"symlink\" or \"directory\"", string);
            }

            (State::ExecutableOrContents, b"executable") => (State::ExecutableMark, None),
            (State::ExecutableOrContents, b"contents") => {
                (State::ContentsLength { executable: false }, None)
            }
            (State::ExecutableOrContents, _) => {
                return unexpected("\"executable\" or \"contents\"", string);
            }
            (State::ExecutableMark, b"") => (State::ContentsKeyword, None),
            (State::ExecutableMark, _) => return unexpected("an empty \"executable\"", string),
            (State::ContentsKeyword, b"contents") => {
                (State::ContentsLength { executable: true }, None)
            }
            (State::ContentsKeyword, _) => return unexpected("\"contents\"", string),

            (State::TargetKeyword, b"target") => (State::Target, None),
            (State::TargetKeyword, _) => return unexpected("\"target\"", string),
            (State::Target, target) => {
                check_target(target)?;
                (State::NodeClose, Some(Ready::Symlink))
            }

            (State::EntryOrClose, b"entry") => (State::EntryOpen, None),
            (State::EntryOrClose, b")") => {
                self.open -= 1;
                (self.after_node(), Some(Ready::EndDirectory))
            }
            (State::EntryOrClose, _) => {
                return unexpected("\"entry\" or \")\" of a directory", string);
            }
            (State::EntryOpen, b"(") => (State::NameKeyword, None),
            (State::EntryOpen, _) => return unexpected("\"(\" of an entry", string),
            (State::NameKeyword, b"name") => (State::Name, None),
            (State::NameKeyword, _) => return unexpected("\"name\"", string),
            (State::Name, name) => {
                check_name(name)?;
                let last = &mut self.last[self.open - 1];
                // An empty `last` is the start of the directory; every name is greater.
                if name <= last.as_slice() {
                    return Err(Fault::Unsorted {
                        name: name.into(),
                        previous: last.as_slice().into(),
                    });
                }
                last.clear();
                last.extend_from_slice(name);
                (State::NodeKeyword, Some(Ready::Entry))
            }
            (State::NodeKeyword, b"node") => (State::NodeOpen, None),
            (State::NodeKeyword, _) => return unexpected("\"node\"", string),

            (State::NodeClose, b")") => (self.after_node(), None),
            (State::NodeClose, _) => return unexpected("\")\" of a node", string),
            (State::EntryClose, b")") => (State::EntryOrClose, None),
            (State::EntryClose, _) => return unexpected("\")\" of an entry", string),

            (
                State::ContentsLength { .. }
                | State::Contents { .. }
                | State::ContentsPadding { .. }
                | State::Closed
                | State::Finished,
                _,
            ) => unreachable!("these states read no string"),
        };
        self.is_judged = true;
        self.state = state;
        Ok(ready)
    }

    fn after_node(&self) -> State {
        match self.open {
            0 => State::Closed,
            _ => State::EntryClose,
        }
    }

    /// Reads on until the buffer holds a whole string with its padding; `false` wants more input.
    fn read_string(&mut self, input: &mut &[u8]) -> Result<bool, DecodeError> {
        let Some(length) = self.read_length(input) else {
            return Ok(false);
        };
        let (what, max) = match self.state {
            State::Name => ("an entry's name", NAME_BYTES_MAX),
            State::Target => ("a symlink's target", TARGET_BYTES_MAX),
            _ => ("a keyword", KEYWORD_BYTES_MAX),
        };
        if length > max as u64 {
            let fault = Fault::TooLong {
                what,
                length,
                max: max as u64,
            };
            return Err(self.error_before(self.string.len() as u64, fault));
        }
        let whole = string_bytes(length) as usize;
        let missing = whole - self.string.len();
        let bytes = self.take(input, missing.min(input.len()));
        self.string.extend_from_slice(bytes);
        if self.string.len() < whole {
            return Ok(false);
        }
        let zeros = &self.string[8 + length as usize..];
        if zeros.iter().any(|&byte| byte != 0) {
            return Err(self.error_before(zeros.len() as u64, Fault::Padding));
        }
        Ok(true)
    }

    /// Reads on until the buffer holds a length, and returns it; `None` wants more input.
    fn read_length(&mut self, input: &mut &[u8]) -> Option<u64> {
        if std::mem::take(&mut self.is_judged) {
            self.string.clear();
        }
        let missing = 8usize.saturating_sub(self.string.len());
        let bytes = self.take(input, missing.min(input.len()));
        self.string.extend_from_slice(bytes);
        let length = self.string.first_chunk()?;
        Some(u64::from_le_bytes(*length))
    }

    fn take<'i>(&mut self, input: &mut &'i [u8], length: usize) -> &'i [u8] {
        let (taken, rest) = input.split_at(length);
        *input = rest;
        self.offset += length as u64;
        taken
    }

    /// An error `back` bytes before the last byte consumed.
    fn error_before(&self, back: u64, fault: Fault) -> DecodeError {
        DecodeError {
            offset: self.offset - back,
            fault,
        }
    }
}

/// Returns the string in a buffer that holds it whole.
fn string_of(buffer: &[u8]) -> &[u8] {
    let length = buffer
        .first_chunk()
        .map_or(0, |length| u64::from_le_bytes(*length));
    &buffer[8..8 + length as usize]
}

fn unexpected<T>(expected: &'static str, found: &[u8]) -> Result<T, Fault> {
    Err(Fault::Unexpected {
        expected,
        found: found.into(),
    })
}
