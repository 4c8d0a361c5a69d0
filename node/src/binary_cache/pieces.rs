//! Pieces of a NAR as they arrive: taken apart, and unpacked one by one.

use std::io;

use bytes::{Buf, Bytes};
use granary_protocol::pieces::{HEAD_BYTES, Piece, PieceError};
use tokio::task::{JoinHandle, spawn_blocking};
use zstd::bulk::Decompressor;

/// A body in pieces, of which `left` bytes of the NAR are still to come.
pub(super) struct Pieces {
    left: u64,
    arrived: Bytes,
    place: Place,
    /// Kept from one piece to the next.
    decompressor: Option<Decompressor<'static>>,
    /// The piece that is being unpacked.
    unpacking: Option<JoinHandle<Unpacked>>,
}

type Unpacked = (Decompressor<'static>, Result<Vec<u8>, PiecesError>);

/// Where in a piece the body is.
enum Place {
    Head([u8; HEAD_BYTES], usize),
    /// So many plain bytes are still to come.
    Plain(usize),
    Packed(Piece, Vec<u8>),
}

/// Why a body in pieces cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum PiecesError {
    #[error(transparent)]
    Piece(#[from] PieceError),
    #[error("piece of {bytes} bytes does not unpack: {source}")]
    Unpack { bytes: usize, source: io::Error },
    #[error("answer ended where {left} bytes of the nar were left")]
    Short { left: u64 },
    #[error("the blocking pool is gone")]
    Stopped,
}

impl Pieces {
    /// A body that has `left` bytes of a NAR in it.
    pub(super) fn new(left: u64) -> Pieces {
        Pieces {
            left,
            arrived: Bytes::new(),
            place: Place::Head([0; HEAD_BYTES], 0),
            decompressor: None,
            unpacking: None,
        }
    }

    /// Bytes of the NAR that have not come out.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Takes in what arrived. Only when [`Pieces::next`] wants more.
    pub(super) fn arrived(&mut self, bytes: Bytes) {
        self.arrived = bytes;
    }

    /// The next bytes of the NAR; `None` when more must arrive. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, PiecesError> {
        loop {
            if self.unpacking.is_some() {
                return self.unpacked().await.map(Some);
            }
            if self.arrived.is_empty() {
                return Ok(None);
            }
            match &mut self.place {
                Place::Head(head, filled) => {
                    let length = self.arrived.len().min(HEAD_BYTES - *filled);
                    self.arrived
                        .copy_to_slice(&mut head[*filled..*filled + length]);
                    *filled += length;
                    if *filled == HEAD_BYTES {
                        let piece = Piece::read(*head, self.left)?;
                        self.place = match piece.is_packed() {
                            false => Place::Plain(piece.bytes()),
                            true => Place::Packed(piece, Vec::with_capacity(piece.wire_bytes())),
                        };
                    }
                }
                Place::Plain(left) => {
                    let bytes = self.arrived.split_to(self.arrived.len().min(*left));
                    *left -= bytes.len();
                    self.left -= bytes.len() as u64;
                    if *left == 0 {
                        self.place = Place::Head([0; HEAD_BYTES], 0);
                    }
                    return Ok(Some(bytes));
                }
                Place::Packed(piece, frame) => {
                    let missing = piece.wire_bytes() - frame.len();
                    let bytes = self.arrived.split_to(self.arrived.len().min(missing));
                    frame.extend_from_slice(&bytes);
                    if frame.len() == piece.wire_bytes() {
                        let (piece, frame) = (*piece, std::mem::take(frame));
                        self.place = Place::Head([0; HEAD_BYTES], 0);
                        self.unpack(piece, frame)?;
                    }
                }
            }
        }
    }

    fn unpack(&mut self, piece: Piece, frame: Vec<u8>) -> Result<(), PiecesError> {
        let bytes = piece.bytes();
        let mut decompressor = match self.decompressor.take() {
            Some(decompressor) => decompressor,
            None => Decompressor::new().map_err(|source| PiecesError::Unpack { bytes, source })?,
        };
        self.unpacking = Some(spawn_blocking(move || {
            let mut contents = vec![0; bytes];
            let length = decompressor.decompress_to_buffer(&frame, &mut contents);
            let exact = match length {
                Ok(length) if length == bytes => Ok(contents),
                Ok(length) => Err(io::Error::other(format!("it has {length}"))),
                Err(error) => Err(error),
            };
            let exact = exact.map_err(|source| PiecesError::Unpack { bytes, source });
            (decompressor, exact)
        }));
        Ok(())
    }

    async fn unpacked(&mut self) -> Result<Bytes, PiecesError> {
        let Some(unpacking) = &mut self.unpacking else {
            return Err(PiecesError::Stopped);
        };
        let ended = unpacking.await;
        self.unpacking = None;
        let (decompressor, contents) = ended.map_err(|_| PiecesError::Stopped)?;
        self.decompressor = Some(decompressor);
        let contents = contents?;
        self.left -= contents.len() as u64;
        Ok(contents.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents() -> Vec<u8> {
        (0..40_000_u32)
            .flat_map(|number| (number / 7).to_le_bytes())
            .collect()
    }

    fn packed(contents: &[u8]) -> Vec<u8> {
        let frame = zstd::bulk::compress(contents, 1).unwrap();
        let head = Piece::new(frame.len(), contents.len()).unwrap();
        [&head.to_head()[..], &frame].concat()
    }

    fn plain(contents: &[u8]) -> Vec<u8> {
        let head = Piece::new(contents.len(), contents.len()).unwrap();
        [&head.to_head()[..], contents].concat()
    }

    /// Reads a body that arrives in parts of so many bytes.
    fn read(body: &[u8], parts: &[usize], size: usize) -> Result<Vec<u8>, PiecesError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut pieces = Pieces::new(size as u64);
            let mut out = Vec::new();
            let mut rest = Bytes::copy_from_slice(body);
            let mut parts = parts.iter().cycle();
            while pieces.left() > 0 {
                match pieces.next().await? {
                    Some(bytes) => out.extend_from_slice(&bytes),
                    None if rest.is_empty() => {
                        let left = pieces.left();
                        return Err(PiecesError::Short { left });
                    }
                    None => {
                        let length = (*parts.next().unwrap()).clamp(1, rest.len());
                        pieces.arrived(rest.split_to(length));
                    }
                }
            }
            Ok(out)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_are_read_however_they_arrive(
            parts in prop::collection::vec(1_usize..50_000, 1..20),
            cuts in prop::collection::vec(1_usize..160_000, 0..6),
        ) {
            let contents = contents();
            let mut cuts = cuts;
            cuts.extend([0, contents.len()]);
            cuts.sort_unstable();
            cuts.dedup();
            let mut body = Vec::new();
            for (index, ends) in cuts.windows(2).enumerate() {
                let part = &contents[ends[0]..ends[1]];
                body.extend(match index % 2 {
                    // What is too short to shrink can only be plain.
                    0 if part.len() > 1000 => packed(part),
                    _ => plain(part),
                });
            }
            let found = read(&body, &parts, contents.len());
            prop_assert_eq!(found.unwrap(), contents);
        }

        #[test]
        fn garbage_is_an_error_and_no_more(body: Vec<u8>, parts in prop::collection::vec(1_usize..9, 1..5)) {
            let _ = read(&body, &parts, 1000);
        }
    }

    #[test]
    fn what_unpacks_to_anything_but_its_size_is_refused() {
        let contents = contents();
        let frame = zstd::bulk::compress(&contents, 1).unwrap();
        for size in [contents.len() - 1, contents.len() + 1] {
            let head = Piece::new(frame.len(), size).unwrap().to_head();
            let body = [&head[..], &frame].concat();
            let found = read(&body, &[10_000], size).unwrap_err();
            assert!(
                matches!(found, PiecesError::Unpack { bytes, .. } if bytes == size),
                "{found}"
            );
        }
        let mut damaged = packed(&contents);
        damaged[HEAD_BYTES + 1] ^= 0xff;
        assert!(read(&damaged, &[10_000], contents.len()).is_err());
    }

    #[test]
    fn a_body_that_ends_early_or_late_is_no_nar() {
        let contents = contents();
        let body = packed(&contents);
        let found = read(&body[..body.len() - 1], &[1000], contents.len()).unwrap_err();
        assert!(matches!(found, PiecesError::Short { .. }), "{found}");
        let found = read(&body, &[1000], contents.len() - 1).unwrap_err();
        assert!(
            matches!(found, PiecesError::Piece(PieceError::BeyondEnd { .. })),
            "{found}"
        );
    }
}
