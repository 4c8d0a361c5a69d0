//! Held back: a NAR that is passed on while it arrives, except for its end.
//!
//! This is what makes it safe to pass bytes on before the whole is known, from whatever source they
//! come: Nix cannot finish a path without its end, and gets that only when the hash of everything
//! is right.

use std::collections::VecDeque;

use bytes::Bytes;
use granary_protocol::hash::{NarHash, NarHasher};
use granary_protocol::store_path::StorePathHash;

use super::Wanted;

/// Bytes of a NAR that reach Nix only when the hash of the whole is right (DESIGN §5). Nix cannot
/// finish a path without them, whatever it has already written.
pub const HELD_BACK_BYTES: u64 = 64 * 1024;

/// A NAR that is passed on while it arrives, except for its end.
///
/// At most [`HELD_BACK_BYTES`] and one chunk are kept.
pub struct HeldBack {
    wanted: Wanted,
    hasher: NarHasher,
    at: u64,
    held: VecDeque<Bytes>,
    held_bytes: u64,
}

/// Why bytes are not those of the promised NAR.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum WrongBytes {
    #[error("nar of {hash} is {found}, its narinfo promises {promised}; dropped {bytes} bytes")]
    Hash {
        hash: StorePathHash,
        found: NarHash,
        promised: NarHash,
        bytes: u64,
    },
    #[error("nar of {hash} has more than the promised {promised} bytes")]
    TooLong { hash: StorePathHash, promised: u64 },
}

impl HeldBack {
    pub fn new(wanted: Wanted) -> HeldBack {
        HeldBack {
            wanted,
            hasher: NarHasher::new(),
            at: 0,
            held: VecDeque::new(),
            held_bytes: 0,
        }
    }

    /// How many bytes have arrived.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// How many bytes have been given out.
    pub fn released(&self) -> u64 {
        self.at - self.held_bytes
    }

    /// Takes bytes in; [`HeldBack::release`] gives out what may go.
    pub fn push(&mut self, bytes: Bytes) -> Result<(), WrongBytes> {
        let length = bytes.len() as u64;
        if length > self.wanted.nar_size - self.at {
            let (hash, promised) = (self.wanted.store_path_hash, self.wanted.nar_size);
            return Err(WrongBytes::TooLong { hash, promised });
        }
        self.hasher.update(&bytes);
        self.at += length;
        self.held_bytes += length;
        self.held.push_back(bytes);
        Ok(())
    }

    /// Returns bytes that more than [`HELD_BACK_BYTES`] have followed.
    pub fn release(&mut self) -> Option<Bytes> {
        let excess = self
            .held_bytes
            .checked_sub(HELD_BACK_BYTES)
            .filter(|excess| *excess > 0)?;
        let first = self.held.front_mut()?;
        // What is beyond usize is certainly more than one chunk.
        let excess = usize::try_from(excess).unwrap_or(usize::MAX);
        let released = if excess >= first.len() {
            self.held.pop_front()?
        } else {
            first.split_to(excess)
        };
        self.held_bytes -= released.len() as u64;
        Some(released)
    }

    /// Gives the end out, if all bytes together are the promised NAR. To be called once, at the end.
    pub fn finish(&mut self) -> Result<VecDeque<Bytes>, WrongBytes> {
        let found = std::mem::take(&mut self.hasher).finish();
        if self.at == self.wanted.nar_size && found == self.wanted.nar_hash {
            Ok(std::mem::take(&mut self.held))
        } else {
            Err(WrongBytes::Hash {
                hash: self.wanted.store_path_hash,
                found,
                promised: self.wanted.nar_hash,
                bytes: self.held_bytes,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(nar: &[u8]) -> Wanted {
        let mut hasher = NarHasher::new();
        hasher.update(nar);
        Wanted {
            store_path_hash: StorePathHash::from_bytes([1; 20]),
            nar_hash: hasher.finish(),
            nar_size: nar.len() as u64,
        }
    }

    /// Pushes `nar` in chunks; returns what was given out before the end, and the end.
    fn pass(nar: &[u8], wanted: Wanted, chunk: usize) -> (Vec<u8>, Result<Vec<u8>, WrongBytes>) {
        let mut held = HeldBack::new(wanted);
        let mut out = Vec::new();
        for chunk in nar.chunks(chunk) {
            if let Err(wrong) = held.push(Bytes::copy_from_slice(chunk)) {
                return (out, Err(wrong));
            }
            while let Some(released) = held.release() {
                out.extend_from_slice(&released);
            }
            assert!(held.held_bytes <= HELD_BACK_BYTES);
        }
        (
            out,
            held.finish()
                .map(|rest| rest.into_iter().flatten().collect()),
        )
    }

    #[test]
    fn a_true_nar_passes_byte_for_byte_at_any_chunking() {
        let nar: Vec<u8> = (0..300_000u32).map(|number| (number % 251) as u8).collect();
        for chunk in [1000, 65_536, 65_537, 300_000] {
            let (mut out, rest) = pass(&nar, wanted(&nar), chunk);
            assert_eq!(out.len() as u64, nar.len() as u64 - HELD_BACK_BYTES);
            out.extend(rest.unwrap());
            assert!(out == nar);
        }
    }

    #[test]
    fn a_false_byte_anywhere_keeps_the_end_back() {
        let nar = vec![7u8; 200_000];
        for position in [0, 100_000, 199_999] {
            let mut changed = nar.clone();
            changed[position] = 8;
            let (out, rest) = pass(&changed, wanted(&nar), 10_000);
            assert_eq!(out.len() as u64, 200_000 - HELD_BACK_BYTES);
            assert!(matches!(rest, Err(WrongBytes::Hash { .. })));
        }
    }

    #[test]
    fn a_small_nar_is_held_back_whole() {
        let nar = vec![7u8; 500];
        let (out, rest) = pass(&nar, wanted(&nar), 100);
        assert!(out.is_empty());
        assert_eq!(rest.unwrap(), nar);
    }

    #[test]
    fn too_short_and_too_long_are_wrong() {
        let nar = vec![7u8; 1000];
        let (_, rest) = pass(&nar[..999], wanted(&nar), 100);
        assert!(matches!(rest, Err(WrongBytes::Hash { .. })));
        let long = vec![7u8; 1001];
        let (_, rest) = pass(&long, wanted(&nar), 100);
        assert!(matches!(
            rest,
            Err(WrongBytes::TooLong { promised: 1000, .. })
        ));
    }
}
