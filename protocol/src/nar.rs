//! NAR: one file tree as one byte string, and the strict reading of such strings.
//!
//! A NAR is what Nix hashes, signs and transfers. Every peer must produce the same bytes for a
//! store path, from any offset, so the format has one writer here and one reader:
//!
//! - [`Layout`] describes a tree (names, sizes, no contents) and lays its NAR out: any byte offset
//!   is found by binary search, and what precedes it is neither encoded nor read.
//! - [`Decoder`] reads a NAR pushed in arbitrary pieces and yields [`Event`]s; it accepts exactly
//!   the strings that a `Layout` can produce and nothing else.
//! - [`Layout::listing`] is the `.ls` JSON that a binary cache offers beside a NAR.
//! - [`Tree`] is a tree in memory, for tests and for the in-memory store.
//!
//! Format: `str(x)` is the length of x as 64-bit little endian, x, and zeros up to a multiple of
//! eight. A NAR is `str(nix-archive-1)` and a node:
//!
//! ```text
//! node = "(" "type" ( "regular" ["executable" ""] "contents" bytes
//!                   | "symlink" "target" bytes
//!                   | "directory" { "entry" "(" "name" bytes "node" node ")" } ) ")"
//! ```
//!
//! Source: Nix manual, protocols/nix-archive; limits from Nix 2.35's `archive.cc`. Strictness is
//! ours to keep: Nix up to 2.24.5 accepts unsorted entries and permuted fields, and a NAR with
//! those can match the hash in its narinfo.
//!
//! Invariants: entries of a directory are strictly ascending by unsigned bytes; a name is one path
//! component; nothing is allocated from a length that the input merely declares.

mod decoder;
mod layout;
mod listing;
mod tree;

use std::fmt;

pub use decoder::{DecodeError, Decoder, Event, Fault};
pub use layout::{
    FRAMING_BYTES_MAX, FileIndex, Layout, LayoutBuilder, LayoutError, LayoutRecorder, Segment,
    Segments,
};
pub use listing::ListingError;
pub use tree::Tree;

/// Levels of nodes in one NAR, the root included (Nix 2.35 and its backports refuse the 65th).
///
/// It bounds the decoder's memory to 64 names, and the recursion of every consumer.
pub const LEVELS_MAX: usize = 64;

/// Bytes of one entry's name: Nix's bound and that of Linux file systems.
pub const NAME_BYTES_MAX: usize = 255;

/// Bytes of a symlink's target: Nix's bound and that of Linux (`PATH_MAX` less its NUL).
pub const TARGET_BYTES_MAX: usize = 4095;

/// Bytes of one file, and of a whole NAR: `i64::MAX`, the largest file a file system can hold.
///
/// Nix stores NarSize in a signed SQLite column, so a larger one could not be registered.
pub const SIZE_MAX: u64 = i64::MAX as u64;

/// Nodes of one tree: a [`Layout`] of that many takes 512 MiB and names.
///
/// Ten times the largest trees seen in nixpkgs; beyond it a tree is refused rather than shared.
pub const NODES_MAX: usize = 1 << 24;

/// The string that every NAR starts with.
const MAGIC: &str = "nix-archive-1";

/// A name that no directory entry may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("an entry has an empty name")]
    Empty,
    #[error("entry name {0} would leave its directory")]
    Dots(Printable),
    #[error("entry name {0} contains a slash")]
    Slash(Printable),
    #[error("entry name {0} contains a NUL byte")]
    Nul(Printable),
    #[error("entry name {name} has {length} bytes, at most {NAME_BYTES_MAX} are allowed", length = .name.0.len())]
    Long { name: Printable },
}

/// A target that no symlink may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("a symlink has an empty target")]
    Empty,
    #[error("symlink target {0} contains a NUL byte")]
    Nul(Printable),
    #[error("a symlink target has {length} bytes, at most {TARGET_BYTES_MAX} are allowed")]
    Long { length: usize },
}

/// Bytes of a name or target, shown in errors quoted and escaped, for they may be anything.
#[derive(Clone, PartialEq, Eq)]
pub struct Printable(pub Vec<u8>);

impl fmt::Display for Printable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Debug for Printable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<&[u8]> for Printable {
    fn from(bytes: &[u8]) -> Printable {
        Printable(bytes.to_vec())
    }
}

/// Proves that `name` is one path component: what both the writer and the reader accept.
///
/// Newlines, invalid UTF-8, names differing only in case and macOS's case-hack suffix are legal.
fn check_name(name: &[u8]) -> Result<(), NameError> {
    match name {
        b"" => Err(NameError::Empty),
        b"." | b".." => Err(NameError::Dots(name.into())),
        _ if name.len() > NAME_BYTES_MAX => Err(NameError::Long { name: name.into() }),
        _ if name.contains(&b'/') => Err(NameError::Slash(name.into())),
        _ if name.contains(&0) => Err(NameError::Nul(name.into())),
        _ => Ok(()),
    }
}

/// Proves that a symlink may point to `target`: anywhere, dangling or absolute, but somewhere.
fn check_target(target: &[u8]) -> Result<(), TargetError> {
    match target {
        b"" => Err(TargetError::Empty),
        _ if target.len() > TARGET_BYTES_MAX => Err(TargetError::Long {
            length: target.len(),
        }),
        _ if target.contains(&0) => Err(TargetError::Nul(target.into())),
        _ => Ok(()),
    }
}

/// Returns how many zeros follow `length` bytes of a string.
const fn padding(length: u64) -> u64 {
    length.wrapping_neg() & 7
}

/// Returns the bytes that a string of `length` bytes takes; `length` ≤ [`SIZE_MAX`].
const fn string_bytes(length: u64) -> u64 {
    8 + length + padding(length)
}
