//! Wire: messages as bytes, and the limits of what is read.
//!
//! A frame is a big-endian `u32` length followed by that many bytes: one byte of
//! [`WIRE_VERSION`], then a protocol buffer. The length is checked against [`FRAME_BYTES_MAX`]
//! before anything is allocated; every count and text inside is checked again here, so that a
//! [`Message`] in memory always keeps its stated limits. Unknown fields are skipped, which is how
//! the format grows; an unknown kind of message is an error the sender is blamed for.

use prost::Message as _;

use crate::availability::{Cursor, HashPrefix, Operation};
use crate::certificate::{CERTIFICATE_BYTES_MAX, CertificateError, SignedCertificate};
use crate::message::{
    ANSWERS_BYTES_MAX, Answer, DELTA_OPERATIONS_MAX, LOOKUP_HASHES_MAX, Message,
    SNAPSHOT_PREFIXES_MAX,
};
use crate::store_path::{StoreDir, StorePathHash};

/// First byte of every frame's body. A change that old readers would misread gets a new number.
pub const WIRE_VERSION: u8 = 1;

/// Largest body of a frame. The largest message is [`Message::Answers`] with 512 KiB of text.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;

/// Why bytes are not a message. Always the sender's fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    #[error("frame of {0} bytes exceeds {FRAME_BYTES_MAX}")]
    FrameTooLarge(usize),
    #[error("empty frame")]
    Empty,
    #[error("frame has wire version {found}, this node reads {WIRE_VERSION}")]
    Version { found: u8 },
    #[error("frame is not a protocol buffer of ours: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("frame holds a message of unknown kind")]
    UnknownKind,
    #[error("{message} has {found} {unit}, at most {limit} are read")]
    TooMany {
        message: &'static str,
        unit: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("{message} has a malformed {field}")]
    Field {
        message: &'static str,
        field: &'static str,
    },
    #[error("hello carries a bad certificate: {0}")]
    Certificate(#[from] CertificateError),
}

/// Encodes a message as the body of a frame (the length before it is the link's).
pub fn encode(message: &Message) -> Vec<u8> {
    let frame = Frame {
        kind: Some(Kind::from(message)),
    };
    let mut bytes = Vec::with_capacity(1 + frame.encoded_len());
    bytes.push(WIRE_VERSION);
    frame.encode_raw(&mut bytes);
    debug_assert!(bytes.len() <= FRAME_BYTES_MAX);
    bytes
}

/// Decodes the body of a frame.
///
/// Allocates in proportion to `body`, which is at most [`FRAME_BYTES_MAX`].
pub fn decode(body: &[u8]) -> Result<Message, WireError> {
    if body.len() > FRAME_BYTES_MAX {
        return Err(WireError::FrameTooLarge(body.len()));
    }
    let (version, body) = body.split_first().ok_or(WireError::Empty)?;
    if *version != WIRE_VERSION {
        return Err(WireError::Version { found: *version });
    }
    Frame::decode(body)?
        .kind
        .ok_or(WireError::UnknownKind)?
        .try_into()
}

#[derive(Clone, PartialEq, prost::Message)]
struct Frame {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Kind {
    #[prost(message, tag = "1")]
    Hello(Hello),
    #[prost(message, tag = "2")]
    About(About),
    #[prost(message, tag = "3")]
    Goodbye(Goodbye),
    #[prost(message, tag = "4")]
    Head(Position),
    #[prost(message, tag = "5")]
    Delta(Delta),
    #[prost(message, tag = "6")]
    Pull(Pull),
    #[prost(message, tag = "7")]
    PullPage(PullPage),
    #[prost(message, tag = "8")]
    Snapshot(Snapshot),
    #[prost(message, tag = "9")]
    Lookup(Lookup),
    #[prost(message, tag = "10")]
    Answers(Answers),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Hello {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(bytes = "vec", tag = "2")]
    certificate: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct About {
    #[prost(string, tag = "1")]
    store_dir: String,
    /// 0 for a node that offers no transfers.
    #[prost(uint32, tag = "2")]
    transfer_port: u32,
    #[prost(message, optional, tag = "3")]
    head: Option<Position>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Goodbye {}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Position {
    #[prost(fixed64, tag = "1")]
    epoch: u64,
    #[prost(uint64, tag = "2")]
    sequence: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Delta {
    #[prost(message, optional, tag = "1")]
    after: Option<Position>,
    #[prost(fixed64, repeated, tag = "2")]
    prefixes: Vec<u64>,
    /// Which of `prefixes` are removals, ascending.
    #[prost(uint32, repeated, tag = "3")]
    removed: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Pull {
    #[prost(message, optional, tag = "1")]
    after: Option<Position>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullPage {
    #[prost(fixed64, tag = "1")]
    epoch: u64,
    #[prost(fixed64, tag = "2")]
    after: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Snapshot {
    #[prost(message, optional, tag = "1")]
    head: Option<Position>,
    #[prost(fixed64, optional, tag = "2")]
    after: Option<u64>,
    /// Each prefix less the one before it; the first less `after` (or 0).
    #[prost(uint64, repeated, tag = "3")]
    steps: Vec<u64>,
    #[prost(bool, tag = "4")]
    is_last: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Lookup {
    #[prost(uint64, tag = "1")]
    request: u64,
    /// 20 bytes each, one after another.
    #[prost(bytes = "vec", tag = "2")]
    hashes: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Answers {
    #[prost(uint64, tag = "1")]
    request: u64,
    #[prost(message, repeated, tag = "2")]
    answers: Vec<OneAnswer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OneAnswer {
    #[prost(bytes = "vec", tag = "1")]
    hash: Vec<u8>,
    #[prost(string, optional, tag = "2")]
    narinfo: Option<String>,
}

impl From<Cursor> for Position {
    fn from(cursor: Cursor) -> Position {
        Position {
            epoch: cursor.epoch,
            sequence: cursor.sequence,
        }
    }
}

impl From<Position> for Cursor {
    fn from(position: Position) -> Cursor {
        Cursor {
            epoch: position.epoch,
            sequence: position.sequence,
        }
    }
}

impl From<&Message> for Kind {
    fn from(message: &Message) -> Kind {
        match message {
            Message::Hello {
                version,
                certificate,
            } => Kind::Hello(Hello {
                version: *version,
                certificate: certificate.to_bytes(),
            }),
            Message::About {
                store_dir,
                transfer_port,
                head,
            } => Kind::About(About {
                store_dir: store_dir.as_str().to_owned(),
                transfer_port: transfer_port.map_or(0, u32::from),
                head: Some((*head).into()),
            }),
            Message::Goodbye => Kind::Goodbye(Goodbye {}),
            Message::Head { head } => Kind::Head((*head).into()),
            Message::Delta { after, operations } => {
                let removed = |(index, operation): (usize, &Operation)| {
                    matches!(operation, Operation::Remove(_)).then_some(index as u32)
                };
                Kind::Delta(Delta {
                    after: Some((*after).into()),
                    prefixes: operations
                        .iter()
                        .map(|operation| operation.prefix().0)
                        .collect(),
                    removed: operations.iter().enumerate().filter_map(removed).collect(),
                })
            }
            Message::Pull { after } => Kind::Pull(Pull {
                after: after.map(Position::from),
            }),
            Message::PullPage { epoch, after } => Kind::PullPage(PullPage {
                epoch: *epoch,
                after: after.0,
            }),
            Message::Snapshot {
                head,
                after,
                prefixes,
                is_last,
            } => {
                let mut previous = after.map_or(0, |after| after.0);
                let mut step = |prefix: &HashPrefix| {
                    let step = prefix.0.wrapping_sub(previous);
                    previous = prefix.0;
                    step
                };
                Kind::Snapshot(Snapshot {
                    head: Some((*head).into()),
                    after: after.map(|after| after.0),
                    steps: prefixes.iter().map(&mut step).collect(),
                    is_last: *is_last,
                })
            }
            Message::Lookup { request, hashes } => Kind::Lookup(Lookup {
                request: *request,
                hashes: hashes.iter().flat_map(|hash| *hash.as_bytes()).collect(),
            }),
            Message::Answers { request, answers } => Kind::Answers(Answers {
                request: *request,
                answers: answers
                    .iter()
                    .map(|answer| OneAnswer {
                        hash: answer.hash.as_bytes().to_vec(),
                        narinfo: answer.narinfo.clone(),
                    })
                    .collect(),
            }),
        }
    }
}

impl TryFrom<Kind> for Message {
    type Error = WireError;

    fn try_from(kind: Kind) -> Result<Message, WireError> {
        Ok(match kind {
            Kind::Hello(hello) => {
                at_most(
                    "hello",
                    "bytes of certificate",
                    hello.certificate.len(),
                    CERTIFICATE_BYTES_MAX,
                )?;
                Message::Hello {
                    version: hello.version,
                    certificate: SignedCertificate::from_bytes(&hello.certificate)?,
                }
            }
            Kind::About(about) => Message::About {
                store_dir: StoreDir::new(&about.store_dir).map_err(|_| WireError::Field {
                    message: "about",
                    field: "store_dir",
                })?,
                transfer_port: match u16::try_from(about.transfer_port) {
                    Ok(0) => None,
                    Ok(port) => Some(port),
                    Err(_) => {
                        return Err(WireError::Field {
                            message: "about",
                            field: "transfer_port",
                        });
                    }
                },
                head: position("about", about.head)?,
            },
            Kind::Goodbye(Goodbye {}) => Message::Goodbye,
            Kind::Head(head) => Message::Head { head: head.into() },
            Kind::Delta(delta) => delta_message(delta)?,
            Kind::Pull(pull) => Message::Pull {
                after: pull.after.map(Cursor::from),
            },
            Kind::PullPage(pull) => Message::PullPage {
                epoch: pull.epoch,
                after: HashPrefix(pull.after),
            },
            Kind::Snapshot(snapshot) => snapshot_message(snapshot)?,
            Kind::Lookup(lookup) => {
                let (hashes, rest) = lookup.hashes.as_chunks::<20>();
                if !rest.is_empty() {
                    return Err(WireError::Field {
                        message: "lookup",
                        field: "hashes",
                    });
                }
                at_most("lookup", "hashes", hashes.len(), LOOKUP_HASHES_MAX)?;
                let hashes = hashes
                    .iter()
                    .map(|hash| StorePathHash::from_bytes(*hash))
                    .collect();
                Message::Lookup {
                    request: lookup.request,
                    hashes,
                }
            }
            Kind::Answers(answers) => answers_message(answers)?,
        })
    }
}

fn delta_message(delta: Delta) -> Result<Message, WireError> {
    at_most(
        "delta",
        "operations",
        delta.prefixes.len(),
        DELTA_OPERATIONS_MAX,
    )?;
    at_most(
        "delta",
        "removals",
        delta.removed.len(),
        delta.prefixes.len(),
    )?;
    let mut operations: Vec<Operation> = delta
        .prefixes
        .iter()
        .map(|prefix| Operation::Add(HashPrefix(*prefix)))
        .collect();
    if !delta.removed.is_sorted_by(|one, next| one < next) {
        return Err(WireError::Field {
            message: "delta",
            field: "removed",
        });
    }
    for index in &delta.removed {
        let operation = operations
            .get_mut(*index as usize)
            .ok_or(WireError::Field {
                message: "delta",
                field: "removed",
            })?;
        *operation = Operation::Remove(operation.prefix());
    }
    Ok(Message::Delta {
        after: position("delta", delta.after)?,
        operations,
    })
}

fn snapshot_message(snapshot: Snapshot) -> Result<Message, WireError> {
    at_most(
        "snapshot",
        "prefixes",
        snapshot.steps.len(),
        SNAPSHOT_PREFIXES_MAX,
    )?;
    let mut prefixes = Vec::with_capacity(snapshot.steps.len());
    let mut previous = snapshot.after;
    for step in snapshot.steps {
        let next = previous.unwrap_or(0).checked_add(step);
        // Only the very first prefix of a set may be reached by a step of nothing: prefix 0.
        let prefix = next.filter(|_| step > 0 || previous.is_none());
        let prefix = prefix.ok_or(WireError::Field {
            message: "snapshot",
            field: "steps",
        })?;
        prefixes.push(HashPrefix(prefix));
        previous = Some(prefix);
    }
    Ok(Message::Snapshot {
        head: position("snapshot", snapshot.head)?,
        after: snapshot.after.map(HashPrefix),
        prefixes,
        is_last: snapshot.is_last,
    })
}

fn answers_message(answers: Answers) -> Result<Message, WireError> {
    at_most(
        "answers",
        "answers",
        answers.answers.len(),
        LOOKUP_HASHES_MAX,
    )?;
    let text = answers
        .answers
        .iter()
        .filter_map(|answer| answer.narinfo.as_ref());
    at_most(
        "answers",
        "bytes of narinfo",
        text.map(String::len).sum(),
        ANSWERS_BYTES_MAX,
    )?;
    let answer = |answer: OneAnswer| {
        let hash = <[u8; 20]>::try_from(answer.hash.as_slice()).map_err(|_| WireError::Field {
            message: "answers",
            field: "hash",
        })?;
        Ok(Answer {
            hash: StorePathHash::from_bytes(hash),
            narinfo: answer.narinfo,
        })
    };
    Ok(Message::Answers {
        request: answers.request,
        answers: answers
            .answers
            .into_iter()
            .map(answer)
            .collect::<Result<_, WireError>>()?,
    })
}

fn position(message: &'static str, position: Option<Position>) -> Result<Cursor, WireError> {
    position.map(Cursor::from).ok_or(WireError::Field {
        message,
        field: "position",
    })
}

fn at_most(
    message: &'static str,
    unit: &'static str,
    found: usize,
    limit: usize,
) -> Result<(), WireError> {
    if found <= limit {
        Ok(())
    } else {
        Err(WireError::TooMany {
            message,
            unit,
            found,
            limit,
        })
    }
}

#[cfg(test)]
mod tests;
