//! Message: every word that nodes exchange on the control plane.
//!
//! The types here are checked values; [`crate::wire`] turns them into frames and back. NAR bytes
//! never travel in messages, they have a plane of their own. The order on a connection: `Hello`
//! from the dialler, `Hello` from the other side once the first one proved membership, `About` from
//! both, then anything.

use crate::availability::{Cursor, HashPrefix, Operation};
use crate::certificate::SignedCertificate;
use crate::store_path::{StoreDir, StorePathHash};

/// The version of the conversation that this node speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Most hashes in one [`Message::Lookup`]: Nix asks for a few hundred at once; beyond that, several messages.
pub const LOOKUP_HASHES_MAX: usize = 256;

/// Most operations in one [`Message::Delta`]: 128 KiB, so that a burst never holds up lookups for long.
pub const DELTA_OPERATIONS_MAX: usize = 16_384;

/// Most prefixes in one [`Message::Snapshot`]: at most 10 bytes each, so that a page stays below 256 KiB.
pub const SNAPSHOT_PREFIXES_MAX: usize = 24_576;

/// Most bytes of narinfo text in one [`Message::Answers`]; a sender splits what is larger.
pub const ANSWERS_BYTES_MAX: usize = 512 * 1024;

/// One message between two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Proves membership. Nothing else is read, and nothing sent, before it is verified.
    Hello {
        version: u32,
        certificate: SignedCertificate,
    },
    /// What a member needs to know of another: where its NARs are, and where its log stands.
    About {
        store_dir: StoreDir,
        transfer_port: Option<u16>,
        head: Cursor,
    },
    /// The sender leaves on purpose; do not count it as a failure.
    Goodbye,
    /// Where the sender's log stands; the receiver pulls when it is behind.
    Head { head: Cursor },
    /// Changes of the sender's set that follow `after`, in order; at most [`DELTA_OPERATIONS_MAX`].
    Delta {
        after: Cursor,
        operations: Vec<Operation>,
    },
    /// Asks for what follows `after`, or for the whole set when the asker has nothing (`None`).
    Pull { after: Option<Cursor> },
    /// Asks for the page of the snapshot that follows `after`.
    PullPage { epoch: u64, after: HashPrefix },
    /// One page of the sender's set: everything greater than `after`, up to the last prefix given.
    ///
    /// `head` is the position of the log when this page was made. A reader that took the first page
    /// at `head` and applies the deltas that follow it has the exact set, since operations are
    /// idempotent and arrive in order.
    Snapshot {
        head: Cursor,
        after: Option<HashPrefix>,
        prefixes: Vec<HashPrefix>,
        is_last: bool,
    },
    /// Asks for the narinfos of at most [`LOOKUP_HASHES_MAX`] store path hashes.
    Lookup {
        request: u64,
        hashes: Vec<StorePathHash>,
    },
    /// Answers some hashes of a lookup: the narinfo's text, or `None` for HaveNot.
    Answers { request: u64, answers: Vec<Answer> },
}

/// What the sender has to say about one store path hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub hash: StorePathHash,
    /// Text in the narinfo grammar, not parsed yet; `None` is HaveNot.
    pub narinfo: Option<String>,
}

impl Message {
    /// A word for logs and counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Message::Hello { .. } => "hello",
            Message::About { .. } => "about",
            Message::Goodbye => "goodbye",
            Message::Head { .. } => "head",
            Message::Delta { .. } => "delta",
            Message::Pull { .. } => "pull",
            Message::PullPage { .. } => "pull_page",
            Message::Snapshot { .. } => "snapshot",
            Message::Lookup { .. } => "lookup",
            Message::Answers { .. } => "answers",
        }
    }
}
