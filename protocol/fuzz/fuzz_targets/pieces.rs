//! No bytes make the head of a piece panic, and one that is read fits into the NAR and prints the same bytes.
#![no_main]

use granary_protocol::pieces::{HEAD_BYTES, Piece};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, [u8; HEAD_BYTES])| {
    let (left, head) = input;
    if let Ok(piece) = Piece::read(head, left) {
        assert_eq!(piece.to_head(), head);
        assert!(piece.bytes() as u64 <= left);
        assert!(piece.wire_bytes() <= piece.bytes());
    }
});
