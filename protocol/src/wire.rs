//! Wire: messages as bytes, and the limits of what is read.
//!
//! A frame is a big-endian `u32` length followed by that many bytes: one byte of
//! [`WIRE_VERSION`], then a protocol buffer. The length is checked against [`FRAME_BYTES_MAX`]
//! before anything is allocated; every count and text inside is checked again here, so that a
//! [`Message`] in memory always keeps its stated limits. Unknown fields are skipped, which is how
//! the format grows; an unknown kind of message is an error the sender is blamed for.

use prost::Message as _;

use crate::announcement::{Delta, Head, SetDigest, SignedHead};
use crate::availability::{Cursor, HashPrefix, Operation};
use crate::certificate::{
    BADGE_BYTES_MAX, CERTIFICATE_BYTES_MAX, CertificateError, SignedBadge, SignedCertificate,
};
use crate::contact::{ContactError, SignedContact};
use crate::message::{
    ANSWERS_BYTES_MAX, Answer, CURSORS_MAX, DELTA_OPERATIONS_MAX, LOOKUP_HASHES_MAX, Message,
    SNAPSHOT_PREFIXES_MAX, Summary, Wish, WriterCursor,
};
use crate::peer::PeerId;
use crate::revocation::{RevocationsError, SignedRevocations};
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
    #[error("message carries a bad certificate: {0}")]
    Certificate(#[from] CertificateError),
    #[error("message carries a bad list: {0}")]
    Revocations(#[from] RevocationsError),
    #[error("message carries a bad contact: {0}")]
    Contact(#[from] ContactError),
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
    #[prost(
        oneof = "Kind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17"
    )]
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
    Neighbour(Neighbour),
    #[prost(message, tag = "5")]
    Delta(OneDelta),
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
    #[prost(bytes = "vec", tag = "11")]
    Summary(Vec<u8>),
    #[prost(message, tag = "12")]
    Cursors(Cursors),
    #[prost(bytes = "vec", tag = "13")]
    Contact(Vec<u8>),
    #[prost(bytes = "vec", tag = "14")]
    NothingNewer(Vec<u8>),
    #[prost(bytes = "vec", tag = "15")]
    Revocations(Vec<u8>),
    #[prost(uint64, tag = "16")]
    RevocationsKnown(u64),
    #[prost(message, tag = "17")]
    Knock(Knock),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Knock {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(bytes = "vec", tag = "2")]
    badge: Vec<u8>,
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
    #[prost(bytes = "vec", tag = "2")]
    contact: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    cursor: Option<Position>,
    #[prost(bytes = "vec", tag = "4")]
    summary: Vec<u8>,
    #[prost(uint32, tag = "5")]
    wish: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Neighbour {
    #[prost(uint32, tag = "1")]
    wish: u32,
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
struct Statement {
    #[prost(bytes = "vec", tag = "1")]
    writer: Vec<u8>,
    #[prost(message, optional, tag = "2")]
    cursor: Option<Position>,
    #[prost(uint64, tag = "3")]
    count: u64,
    #[prost(bytes = "vec", tag = "4")]
    set: Vec<u8>,
    #[prost(uint64, tag = "5")]
    after: u64,
    #[prost(bytes = "vec", tag = "6")]
    operations: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    signature: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OneDelta {
    #[prost(message, optional, tag = "1")]
    head: Option<Statement>,
    #[prost(fixed64, repeated, tag = "2")]
    prefixes: Vec<u64>,
    /// Which of `prefixes` are removals, ascending.
    #[prost(uint32, repeated, tag = "3")]
    removed: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Cursors {
    #[prost(message, repeated, tag = "1")]
    cursors: Vec<OneCursor>,
    #[prost(bool, tag = "2")]
    is_complete: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OneCursor {
    #[prost(bytes = "vec", tag = "1")]
    writer: Vec<u8>,
    #[prost(uint64, tag = "2")]
    contact: u64,
    #[prost(message, optional, tag = "3")]
    cursor: Option<Position>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Pull {
    #[prost(bytes = "vec", tag = "1")]
    writer: Vec<u8>,
    #[prost(uint64, tag = "2")]
    contact: u64,
    #[prost(message, optional, tag = "3")]
    after: Option<Position>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullPage {
    #[prost(bytes = "vec", tag = "1")]
    writer: Vec<u8>,
    #[prost(message, optional, tag = "2")]
    cursor: Option<Position>,
    #[prost(fixed64, tag = "3")]
    after: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Snapshot {
    #[prost(message, optional, tag = "1")]
    head: Option<Statement>,
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
            Message::Knock { version, badge } => Kind::Knock(Knock {
                version: *version,
                badge: badge.to_bytes(),
            }),
            Message::Hello {
                version,
                certificate,
            } => Kind::Hello(Hello {
                version: *version,
                certificate: certificate.to_bytes(),
            }),
            Message::About {
                store_dir,
                contact,
                cursor,
                summary,
                wish,
            } => Kind::About(About {
                store_dir: store_dir.as_str().to_owned(),
                contact: contact.to_bytes(),
                cursor: Some((*cursor).into()),
                summary: summary.0.to_vec(),
                wish: wish_number(*wish),
            }),
            Message::Goodbye => Kind::Goodbye(Goodbye {}),
            Message::Neighbour { wish } => Kind::Neighbour(Neighbour {
                wish: wish_number(*wish),
            }),
            Message::Summary { summary } => Kind::Summary(summary.0.to_vec()),
            Message::Cursors {
                cursors,
                is_complete,
            } => {
                let one = |known: &WriterCursor| OneCursor {
                    writer: known.writer.as_public_key().to_vec(),
                    contact: known.contact,
                    cursor: known.cursor.map(Position::from),
                };
                Kind::Cursors(Cursors {
                    cursors: cursors.iter().map(one).collect(),
                    is_complete: *is_complete,
                })
            }
            Message::Contact(contact) => Kind::Contact(contact.to_bytes()),
            Message::Delta(delta) => {
                let operations = delta.operations();
                let removed = |(index, operation): (usize, &Operation)| {
                    matches!(operation, Operation::Remove(_)).then_some(index as u32)
                };
                Kind::Delta(OneDelta {
                    head: Some(delta.head().into()),
                    prefixes: operations
                        .iter()
                        .map(|operation| operation.prefix().0)
                        .collect(),
                    removed: operations.iter().enumerate().filter_map(removed).collect(),
                })
            }
            Message::Pull {
                writer,
                contact,
                after,
            } => Kind::Pull(Pull {
                writer: writer.as_public_key().to_vec(),
                contact: *contact,
                after: after.map(Position::from),
            }),
            Message::PullPage {
                writer,
                cursor,
                after,
            } => Kind::PullPage(PullPage {
                writer: writer.as_public_key().to_vec(),
                cursor: Some((*cursor).into()),
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
                    head: Some(head.into()),
                    after: after.map(|after| after.0),
                    steps: prefixes.iter().map(&mut step).collect(),
                    is_last: *is_last,
                })
            }
            Message::Revocations(list) => Kind::Revocations(list.to_bytes()),
            Message::RevocationsKnown { number } => Kind::RevocationsKnown(*number),
            Message::NothingNewer { writer } => Kind::NothingNewer(writer.as_public_key().to_vec()),
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
            Kind::Knock(knock) => {
                at_most(
                    "knock",
                    "bytes of badge",
                    knock.badge.len(),
                    BADGE_BYTES_MAX,
                )?;
                Message::Knock {
                    version: knock.version,
                    badge: SignedBadge::from_bytes(&knock.badge)?,
                }
            }
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
                contact: SignedContact::from_bytes(&about.contact)?,
                cursor: position("about", about.cursor)?,
                summary: Summary(digest("about", "summary", &about.summary)?),
                wish: wish("about", about.wish)?,
            },
            Kind::Goodbye(Goodbye {}) => Message::Goodbye,
            Kind::Neighbour(neighbour) => Message::Neighbour {
                wish: wish("neighbour", neighbour.wish)?,
            },
            Kind::Summary(summary) => Message::Summary {
                summary: Summary(digest("summary", "summary", &summary)?),
            },
            Kind::Cursors(cursors) => cursors_message(cursors)?,
            Kind::Contact(contact) => Message::Contact(SignedContact::from_bytes(&contact)?),
            Kind::Revocations(list) => Message::Revocations(SignedRevocations::from_bytes(&list)?),
            Kind::RevocationsKnown(number) => Message::RevocationsKnown { number },
            Kind::Delta(delta) => delta_message(delta)?,
            Kind::Pull(pull) => Message::Pull {
                writer: writer("pull", &pull.writer)?,
                contact: pull.contact,
                after: pull.after.map(Cursor::from),
            },
            Kind::PullPage(pull) => Message::PullPage {
                writer: writer("pull page", &pull.writer)?,
                cursor: position("pull page", pull.cursor)?,
                after: HashPrefix(pull.after),
            },
            Kind::Snapshot(snapshot) => snapshot_message(snapshot)?,
            Kind::NothingNewer(bytes) => Message::NothingNewer {
                writer: writer("nothing newer", &bytes)?,
            },
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

fn cursors_message(cursors: Cursors) -> Result<Message, WireError> {
    at_most("cursors", "writers", cursors.cursors.len(), CURSORS_MAX)?;
    let is_complete = cursors.is_complete;
    let one = |known: OneCursor| {
        Ok(WriterCursor {
            writer: writer("cursors", &known.writer)?,
            contact: known.contact,
            cursor: known.cursor.map(Cursor::from),
        })
    };
    let cursors = cursors.cursors.into_iter().map(one);
    let cursors = cursors.collect::<Result<Vec<_>, WireError>>()?;
    // Ascending, so that each stands once and both sides can be walked together.
    if !cursors.is_sorted_by(|one, next| one.writer < next.writer) {
        return Err(WireError::Field {
            message: "cursors",
            field: "writer",
        });
    }
    Ok(Message::Cursors {
        cursors,
        is_complete,
    })
}

fn delta_message(delta: OneDelta) -> Result<Message, WireError> {
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
    let head = signed_head("delta", delta.head)?;
    Ok(Message::Delta(Delta::from_parts(head, operations)))
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
        head: signed_head("snapshot", snapshot.head)?,
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

impl From<&SignedHead> for Statement {
    fn from(signed: &SignedHead) -> Statement {
        let head = signed.head();
        Statement {
            writer: head.writer.as_public_key().to_vec(),
            cursor: Some(head.cursor.into()),
            count: head.count,
            set: head.set.0.to_vec(),
            after: head.after,
            operations: head.operations.to_vec(),
            signature: signed.signature().to_vec(),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Evidence {
    #[prost(bytes = "vec", tag = "1")]
    contact: Vec<u8>,
    #[prost(message, optional, tag = "2")]
    head: Option<Statement>,
}

/// Encodes what proves a writer and its set, for an index to keep over a restart.
pub fn encode_proof(contact: &SignedContact, head: &SignedHead) -> Vec<u8> {
    Evidence {
        contact: contact.to_bytes(),
        head: Some(head.into()),
    }
    .encode_to_vec()
}

/// Decodes what [`encode_proof`] wrote; nothing is proved by that.
pub fn decode_proof(bytes: &[u8]) -> Result<(SignedContact, SignedHead), WireError> {
    let evidence = Evidence::decode(bytes)?;
    Ok((
        SignedContact::from_bytes(&evidence.contact)?,
        signed_head("proof", evidence.head)?,
    ))
}

fn signed_head(
    message: &'static str,
    statement: Option<Statement>,
) -> Result<SignedHead, WireError> {
    let malformed = |field| WireError::Field { message, field };
    let statement = statement.ok_or(malformed("head"))?;
    let signature = <[u8; 64]>::try_from(statement.signature.as_slice());
    let head = Head {
        writer: writer(message, &statement.writer)?,
        cursor: position(message, statement.cursor)?,
        count: statement.count,
        set: SetDigest(digest(message, "set", &statement.set)?),
        after: statement.after,
        operations: digest(message, "operations", &statement.operations)?,
    };
    Ok(SignedHead::from_parts(
        head,
        signature.map_err(|_| malformed("signature"))?,
    ))
}

fn writer(message: &'static str, bytes: &[u8]) -> Result<PeerId, WireError> {
    digest(message, "writer", bytes).map(PeerId::from_public_key)
}

fn digest(message: &'static str, field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    <[u8; 32]>::try_from(bytes).map_err(|_| WireError::Field { message, field })
}

fn wish_number(wish: Wish) -> u32 {
    match wish {
        Wish::No => 0,
        Wish::Yes => 1,
        Wish::Urgent => 2,
    }
}

fn wish(message: &'static str, number: u32) -> Result<Wish, WireError> {
    match number {
        0 => Ok(Wish::No),
        1 => Ok(Wish::Yes),
        2 => Ok(Wish::Urgent),
        _ => Err(WireError::Field {
            message,
            field: "wish",
        }),
    }
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
