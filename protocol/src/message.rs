//! Message: every word that nodes exchange on the control plane.
//!
//! The types here are checked values; [`crate::wire`] turns them into frames and back. NAR bytes
//! never travel in messages, they have a plane of their own. The order on a connection: `Knock`
//! from the dialler, `Hello` from the other side once that proved membership, `Hello` from the dialler
//! once this one did, `About` from both, then anything.
//!
//! What is said about a writer ([`Message::Delta`], [`Message::Snapshot`], [`Message::Contact`]) carries
//! that writer's signature and may come from anyone; everything else the sender says for itself.

use crate::announcement::{Delta, SignedHead};
use crate::availability::{Cursor, HashPrefix};
use crate::certificate::{SignedBadge, SignedCertificate};
use crate::contact::SignedContact;
use crate::peer::PeerId;
use crate::revocation::SignedRevocations;
use crate::store_path::{StoreDir, StorePathHash};

/// The version of the conversation that this node speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Most hashes in one [`Message::Lookup`]: Nix asks for a few hundred at once; beyond that, several messages.
pub const LOOKUP_HASHES_MAX: usize = 256;

/// Most operations in one [`Message::Delta`]: 128 KiB, so that a burst never holds up lookups for long.
pub const DELTA_OPERATIONS_MAX: usize = 16_384;

/// Most prefixes in one [`Message::Snapshot`]: at most 10 bytes each, so that a page stays below 256 KiB.
pub const SNAPSHOT_PREFIXES_MAX: usize = 24_576;

/// Most writers in one [`Message::Cursors`]: 62 bytes each at most, so that it stays below 256 KiB.
pub const CURSORS_MAX: usize = 4096;

/// Most bytes of narinfo text in one [`Message::Answers`]; a sender splits what is larger.
pub const ANSWERS_BYTES_MAX: usize = 512 * 1024;

/// One message between two nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Proves membership of who dialled, and says no more of it: who is at the other end is not known yet.
    Knock { version: u32, badge: SignedBadge },
    /// Proves membership. Nothing but these two is read, or sent, before it is verified.
    Hello {
        version: u32,
        certificate: SignedCertificate,
    },
    /// What a member needs to know of another: where it is reached, where its log stands, what it
    /// knows of everybody, and whether it wants to exchange records with the receiver.
    About {
        store_dir: StoreDir,
        contact: SignedContact,
        cursor: Cursor,
        summary: Summary,
        wish: Wish,
    },
    /// The sender leaves on purpose; do not count it as a failure.
    Goodbye,
    /// Whether the sender wants to exchange records with the receiver.
    Neighbour { wish: Wish },
    /// What the sender knows of everybody; a receiver that knows otherwise answers with its cursors.
    Summary { summary: Summary },
    /// How far the sender knows the logs of some writers, or of all it knows of (`is_complete`); at most
    /// [`CURSORS_MAX`].
    Cursors {
        cursors: Vec<WriterCursor>,
        is_complete: bool,
    },
    /// Where a member is reached.
    Contact(SignedContact),
    /// Changes of one writer's set, in order; at most [`DELTA_OPERATIONS_MAX`].
    Delta(Delta),
    /// Asks for what follows `after` in a writer's log (all of its set for `None`), and for a contact
    /// with a greater number than `contact`.
    Pull {
        writer: PeerId,
        contact: u64,
        after: Option<Cursor>,
    },
    /// Asks for the page of a snapshot, made at `cursor`, that follows `after`.
    PullPage {
        writer: PeerId,
        cursor: Cursor,
        after: HashPrefix,
    },
    /// One page of a writer's set: everything greater than `after`, up to the last prefix given.
    ///
    /// All pages of a snapshot carry the same head, which proves the set they make up together.
    Snapshot {
        head: SignedHead,
        after: Option<HashPrefix>,
        prefixes: Vec<HashPrefix>,
        is_last: bool,
    },
    /// Answers a [`Message::Pull`]: the sender has nothing newer of that writer that it can prove.
    NothingNewer { writer: PeerId },
    /// Asks for the narinfos of at most [`LOOKUP_HASHES_MAX`] store path hashes.
    Lookup {
        request: u64,
        hashes: Vec<StorePathHash>,
    },
    /// Answers some hashes of a lookup: the narinfo's text, or `None` for HaveNot.
    Answers { request: u64, answers: Vec<Answer> },
    /// Whom the mesh key has put out.
    Revocations(SignedRevocations),
    /// The number of the list that the sender knows; a receiver that knows a greater one gives it, one that
    /// knows a lesser one says so.
    RevocationsKnown { number: u64 },
}

/// SHA-256 over every writer a node knows of, in order, with the number of its contact and its cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary(pub [u8; 32]);

/// How far one writer's contact and log are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterCursor {
    pub writer: PeerId,
    /// Number of the newest contact known of it.
    pub contact: u64,
    /// `None` when nothing is known of its set.
    pub cursor: Option<Cursor>,
}

/// Whether a node wants another one among those it exchanges records with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    No,
    Yes,
    /// It has no neighbour at all, and hears nothing of anybody.
    Urgent,
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
            Message::Knock { .. } => "knock",
            Message::Hello { .. } => "hello",
            Message::About { .. } => "about",
            Message::Goodbye => "goodbye",
            Message::Neighbour { .. } => "neighbour",
            Message::Summary { .. } => "summary",
            Message::Cursors { .. } => "cursors",
            Message::Contact(_) => "contact",
            Message::Delta(_) => "delta",
            Message::Pull { .. } => "pull",
            Message::PullPage { .. } => "pull_page",
            Message::Snapshot { .. } => "snapshot",
            Message::NothingNewer { .. } => "nothing_newer",
            Message::Lookup { .. } => "lookup",
            Message::Answers { .. } => "answers",
            Message::Revocations(_) => "revocations",
            Message::RevocationsKnown { .. } => "revocations_known",
        }
    }
}
