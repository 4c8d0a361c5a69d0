//! Pieces: a NAR on a slow link between two nodes, each part of it packed or as it is.
//!
//! A NAR travels between nodes as its plain bytes (HTTP, Range). Where the link is slower than zstd it
//! travels in pieces instead, and each says for itself how it is sent ([`Pace`] decides that while the
//! NAR streams):
//!
//! ```text
//! body   = piece …                              until the last byte of the NAR
//! piece  = wire-bytes bytes contents            u32 big endian: how many follow, how many of the NAR they are
//! ```
//!
//! Contents of as many bytes as they stand for are plain; fewer are one zstd frame. So each piece is
//! read by itself, a decoder keeps nothing between two, and nothing unpacks to more than
//! [`PIECE_BYTES_MAX`]. The offset at which the body begins counts bytes of the NAR, and is said in the
//! request and in the answer ([`OFFER_HEADER`]).

use thiserror::Error;

mod pace;

pub use pace::{Costs, Form, LEVELS, Pace, Thirst};

/// Most bytes of a NAR in one piece: what a stream reads at once, and for zstd as good as all of it
/// (2.35 : 1 of a program beside 2.30 : 1 in one stream).
pub const PIECE_BYTES_MAX: u32 = 256 * 1024;

/// Bytes before the contents of a piece.
pub const HEAD_BYTES: usize = 8;

/// Names the offset from which a NAR may come in pieces, in the request; in the answer, from which it does.
/// Whoever does not know it sends the range that is asked for beside it.
pub const OFFER_HEADER: &str = "granary-pieces";

/// The type of a body in pieces.
pub const CONTENT_TYPE: &str = "application/x-granary-pieces";

/// What comes before the contents of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    wire_bytes: u32,
    bytes: u32,
}

/// Why a body is none of the NAR that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PieceError {
    #[error("piece has {wire_bytes} bytes for {bytes} of the nar, expected 1 to as many")]
    Contents { wire_bytes: u32, bytes: u32 },
    #[error("piece has {bytes} bytes of the nar, at most {PIECE_BYTES_MAX} are allowed")]
    TooLarge { bytes: u32 },
    #[error("piece has {bytes} bytes of the nar, {left} are left")]
    BeyondEnd { bytes: u32, left: u64 },
}

impl Piece {
    /// A piece of `bytes` of a NAR, packed to `wire_bytes`; `None` when there can be none.
    pub fn new(wire_bytes: usize, bytes: usize) -> Option<Piece> {
        let wire_bytes = u32::try_from(wire_bytes).ok()?;
        let bytes = u32::try_from(bytes).ok()?;
        Piece { wire_bytes, bytes }.checked(bytes.into()).ok()
    }

    /// Reads the head of a piece, where `left` bytes of the NAR are still to come.
    ///
    /// # Errors
    /// [`PieceError`] when no such piece can follow.
    pub fn read(head: [u8; HEAD_BYTES], left: u64) -> Result<Piece, PieceError> {
        let [a, b, c, d, e, f, g, h] = head;
        let piece = Piece {
            wire_bytes: u32::from_be_bytes([a, b, c, d]),
            bytes: u32::from_be_bytes([e, f, g, h]),
        };
        piece.checked(left)
    }

    fn checked(self, left: u64) -> Result<Piece, PieceError> {
        let Piece { wire_bytes, bytes } = self;
        if wire_bytes == 0 || wire_bytes > bytes {
            return Err(PieceError::Contents { wire_bytes, bytes });
        }
        if bytes > PIECE_BYTES_MAX {
            return Err(PieceError::TooLarge { bytes });
        }
        if u64::from(bytes) > left {
            return Err(PieceError::BeyondEnd { bytes, left });
        }
        Ok(self)
    }

    pub fn to_head(self) -> [u8; HEAD_BYTES] {
        let [a, b, c, d] = self.wire_bytes.to_be_bytes();
        let [e, f, g, h] = self.bytes.to_be_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// Bytes that follow the head; 1 to [`PIECE_BYTES_MAX`].
    pub fn wire_bytes(&self) -> usize {
        self.wire_bytes as usize
    }

    /// Bytes of the NAR.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// Whether the contents are a zstd frame.
    pub fn is_packed(&self) -> bool {
        self.wire_bytes < self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_is_two_numbers_of_four_bytes() {
        let piece = Piece::new(0x0102, 0x0003_0405).unwrap();
        assert_eq!(piece.to_head(), [0, 0, 1, 2, 0, 3, 4, 5]);
        assert!(piece.is_packed());
        assert!(!Piece::new(7, 7).unwrap().is_packed());
    }

    #[test]
    fn a_piece_that_cannot_be_is_refused() {
        let head = |wire_bytes: u32, bytes: u32| {
            let [a, b, c, d] = wire_bytes.to_be_bytes();
            let [e, f, g, h] = bytes.to_be_bytes();
            [a, b, c, d, e, f, g, h]
        };
        let read = |wire_bytes, bytes| Piece::read(head(wire_bytes, bytes), 1000);
        assert!(read(1000, 1000).is_ok());
        for (wire_bytes, bytes) in [(0, 0), (0, 1), (2, 1), (u32::MAX, 5)] {
            let expected = PieceError::Contents { wire_bytes, bytes };
            assert_eq!(read(wire_bytes, bytes), Err(expected));
        }
        let left = 1000;
        let bytes = 1001;
        assert_eq!(read(1, bytes), Err(PieceError::BeyondEnd { bytes, left }));
        for bytes in [PIECE_BYTES_MAX + 1, u32::MAX] {
            let found = Piece::read(head(1, bytes), u64::MAX);
            assert_eq!(found, Err(PieceError::TooLarge { bytes }));
        }
        assert_eq!(Piece::new(0, 0), None);
        assert_eq!(Piece::new(usize::MAX, usize::MAX), None);
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(head: [u8; HEAD_BYTES], left: u64) {
            if let Ok(piece) = Piece::read(head, left) {
                prop_assert_eq!(piece.to_head(), head);
                prop_assert!(piece.bytes() as u64 <= left);
                prop_assert!(piece.wire_bytes() <= piece.bytes());
                prop_assert!(piece.bytes() <= PIECE_BYTES_MAX as usize);
            }
        }
    }
}
