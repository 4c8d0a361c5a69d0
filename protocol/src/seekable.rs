//! Seekable zstd: a NAR as independent frames, with a table of where each begins.
//!
//! The format of zstd's `contrib/seekable_format`: ordinary frames one after the other, then a
//! skippable frame that holds the table. A decoder that knows nothing of it (every Nix since 2.4)
//! reads the whole as one stream; one that does begins at any frame. Only the table is handled here:
//! compression belongs to the hands.
//!
//! ```text
//! table  = 0x184D2A5E size { compressed raw } … count descriptor 0x8F92EAB1      all u32 little endian,
//! ```
//!
//! but for the descriptor, one byte: 0 for us, since the whole is proved by its NarHash and frames
//! carry checksums of their own. A table read from storage is bounded and must agree with the file's
//! size before anything is allocated from it.

use std::ops::Range;

use thiserror::Error;

/// Raw bytes in every frame but the last. 4 MiB cost next to nothing in ratio, and a range anywhere
/// decodes at most that much in vain.
pub const FRAME_RAW_BYTES: u32 = 4 * 1024 * 1024;

/// Most frames of one file: 4 TiB of NAR, and a table of 8 MiB.
pub const FRAMES_MAX: usize = 1 << 20;

/// Bytes behind the entries: count, descriptor, magic number.
pub const FOOTER_BYTES: usize = 9;

const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const HEADER_BYTES: usize = 8;
const ENTRY_BYTES: usize = 8;

/// One frame, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    pub compressed: u32,
    /// 1 to [`FRAME_RAW_BYTES`].
    pub raw: u32,
}

/// Where each frame of a file begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeekTable {
    frames: Vec<Frame>,
}

/// Where to begin reading for a raw offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The first frame's bytes in the file, up to the end of the last frame.
    pub file: Range<u64>,
    /// Raw bytes that come before the offset in the first frame.
    pub skip: u32,
}

/// Why bytes are no table of the file they stand in.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SeekTableError {
    #[error("seek table has {found} bytes, expected {expected}")]
    Length { found: u64, expected: u64 },
    #[error("seek table has magic number {found:#x}, expected {expected:#x}")]
    Magic { found: u32, expected: u32 },
    #[error("seek table has descriptor {found:#x}, only 0 is written here")]
    Descriptor { found: u8 },
    #[error("seek table has {found} frames, at most {FRAMES_MAX} are allowed")]
    TooManyFrames { found: u64 },
    #[error("frame {index} has {raw} raw bytes, 1 to {FRAME_RAW_BYTES} are allowed")]
    Frame { index: usize, raw: u32 },
    #[error("frames of seek table take {found} bytes, the file has {expected} for them")]
    FileSize { found: u64, expected: u64 },
}

impl SeekTable {
    pub fn new() -> SeekTable {
        SeekTable::default()
    }

    /// Appends a frame.
    ///
    /// # Errors
    /// When it has no or too many raw bytes, or is one too many.
    pub fn push(&mut self, frame: Frame) -> Result<(), SeekTableError> {
        check_frame(self.frames.len(), frame)?;
        if self.frames.len() == FRAMES_MAX {
            return Err(SeekTableError::TooManyFrames {
                found: FRAMES_MAX as u64 + 1,
            });
        }
        self.frames.push(frame);
        Ok(())
    }

    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Bytes of the NAR.
    pub fn raw_size(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.raw)).sum()
    }

    /// Bytes of all frames, without the table.
    pub fn frames_size(&self) -> u64 {
        let sizes = self.frames.iter().map(|frame| u64::from(frame.compressed));
        sizes.sum()
    }

    /// Bytes of the table itself.
    pub fn table_size(&self) -> u64 {
        table_bytes(self.frames.len()) as u64
    }

    /// Prints the skippable frame that ends the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(table_bytes(self.frames.len()));
        let mut number = |number: u32| bytes.extend_from_slice(&number.to_le_bytes());
        number(SKIPPABLE_MAGIC);
        // At most 8 MiB, see FRAMES_MAX.
        number((table_bytes(self.frames.len()) - HEADER_BYTES) as u32);
        for frame in &self.frames {
            number(frame.compressed);
            number(frame.raw);
        }
        number(self.frames.len() as u32);
        bytes.push(0);
        bytes.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
        bytes
    }

    /// Reads from a file's last [`FOOTER_BYTES`] how many bytes its table has.
    ///
    /// # Errors
    /// When they are no footer, or the table would not fit into `file_size`.
    pub fn size_in(footer: &[u8], file_size: u64) -> Result<u64, SeekTableError> {
        let [a, b, c, d, descriptor, magic @ ..] = footer else {
            return Err(footer_length(footer));
        };
        let Ok(magic) = <[u8; 4]>::try_from(magic) else {
            return Err(footer_length(footer));
        };
        let magic = u32::from_le_bytes(magic);
        if magic != SEEKABLE_MAGIC {
            return Err(SeekTableError::Magic {
                found: magic,
                expected: SEEKABLE_MAGIC,
            });
        }
        if *descriptor != 0 {
            return Err(SeekTableError::Descriptor { found: *descriptor });
        }
        let count = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        if count > FRAMES_MAX {
            return Err(SeekTableError::TooManyFrames {
                found: count as u64,
            });
        }
        let size = table_bytes(count) as u64;
        if size > file_size {
            return Err(SeekTableError::Length {
                found: file_size,
                expected: size,
            });
        }
        Ok(size)
    }

    /// Reads the table that ends a file of `file_size` bytes.
    ///
    /// # Errors
    /// [`SeekTableError`] for anything that [`SeekTable::to_bytes`] does not print, and for frames
    /// that do not fill the file.
    pub fn from_bytes(bytes: &[u8], file_size: u64) -> Result<SeekTable, SeekTableError> {
        let footer_start = bytes.len().saturating_sub(FOOTER_BYTES);
        let footer = bytes.get(footer_start..).unwrap_or_default();
        let expected = SeekTable::size_in(footer, file_size)?;
        if bytes.len() as u64 != expected {
            return Err(SeekTableError::Length {
                found: bytes.len() as u64,
                expected,
            });
        }
        let (words, _) = bytes[..footer_start].as_chunks::<4>();
        let mut numbers = words.iter().map(|word| u32::from_le_bytes(*word));
        for expected in [SKIPPABLE_MAGIC, (bytes.len() - HEADER_BYTES) as u32] {
            let found = numbers.next().unwrap_or(0);
            if found != expected {
                return Err(SeekTableError::Magic { found, expected });
            }
        }
        let mut table = SeekTable::new();
        while let (Some(compressed), Some(raw)) = (numbers.next(), numbers.next()) {
            table.push(Frame { compressed, raw })?;
        }
        let found = table.frames_size() + expected;
        if found != file_size {
            return Err(SeekTableError::FileSize {
                found,
                expected: file_size,
            });
        }
        Ok(table)
    }

    /// Finds where to read for the raw bytes from `offset` on; `None` at or beyond the end.
    pub fn locate(&self, offset: u64) -> Option<Position> {
        let (mut raw, mut file) = (0u64, 0u64);
        for frame in &self.frames {
            let end = raw + u64::from(frame.raw);
            if offset < end {
                return Some(Position {
                    file: file..self.frames_size(),
                    // Less than the frame's raw bytes, which are a u32.
                    skip: (offset - raw) as u32,
                });
            }
            raw = end;
            file += u64::from(frame.compressed);
        }
        None
    }
}

fn footer_length(footer: &[u8]) -> SeekTableError {
    SeekTableError::Length {
        found: footer.len() as u64,
        expected: FOOTER_BYTES as u64,
    }
}

const fn table_bytes(frames: usize) -> usize {
    HEADER_BYTES + frames * ENTRY_BYTES + FOOTER_BYTES
}

fn check_frame(index: usize, frame: Frame) -> Result<(), SeekTableError> {
    match frame.raw {
        1..=FRAME_RAW_BYTES => Ok(()),
        raw => Err(SeekTableError::Frame { index, raw }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(frames: &[(u32, u32)]) -> SeekTable {
        let mut table = SeekTable::new();
        for (compressed, raw) in frames {
            let (compressed, raw) = (*compressed, *raw);
            table.push(Frame { compressed, raw }).unwrap();
        }
        table
    }

    #[test]
    fn a_table_has_the_bytes_of_the_specification() {
        let bytes = table(&[(10, 20)]).to_bytes();
        let expected = [
            [0x5e, 0x2a, 0x4d, 0x18],
            [17, 0, 0, 0],
            [10, 0, 0, 0],
            [20, 0, 0, 0],
            [1, 0, 0, 0],
        ];
        assert_eq!(bytes[..20], expected.concat());
        assert_eq!(bytes[20..], [0, 0xb1, 0xea, 0x92, 0x8f]);
    }

    #[test]
    fn an_offset_leads_to_its_frame() {
        let table = table(&[(100, 40), (50, 40), (7, 3)]);
        let check = |offset, file, skip| {
            assert_eq!(
                table.locate(offset),
                Some(Position { file, skip }),
                "{offset}"
            );
        };
        check(0, 0..157, 0);
        check(39, 0..157, 39);
        check(40, 100..157, 0);
        check(81, 150..157, 1);
        check(82, 150..157, 2);
        assert_eq!(table.locate(83), None);
        assert_eq!(table.locate(u64::MAX), None);
        assert_eq!(SeekTable::new().locate(0), None);
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let good = table(&[(100, 40), (50, 40)]);
        let bytes = good.to_bytes();
        let size = good.frames_size() + good.table_size();
        assert_eq!(SeekTable::from_bytes(&bytes, size), Ok(good));
        for (position, byte) in [
            (0, 1),
            (4, 1),
            (bytes.len() - 1, 1),
            (bytes.len() - 5, 0x80),
        ] {
            let mut changed = bytes.clone();
            changed[position] ^= byte;
            assert!(SeekTable::from_bytes(&changed, size).is_err(), "{position}");
        }
        // A frame's compressed size, its raw size, the count of frames.
        for (position, byte) in [(8, 1), (14, 0x40), (24, 1)] {
            let mut changed = bytes.clone();
            changed[position] ^= byte;
            assert!(SeekTable::from_bytes(&changed, size).is_err(), "{position}");
        }
        for length in 0..bytes.len() {
            assert!(SeekTable::from_bytes(&bytes[..length], size).is_err());
        }
        assert!(SeekTable::from_bytes(&bytes, size + 1).is_err());
        let many = [0xff, 0xff, 0xff, 0xff, 0, 0xb1, 0xea, 0x92, 0x8f];
        assert!(SeekTable::size_in(&many, u64::MAX).is_err());
    }

    #[test]
    fn frames_without_or_with_too_many_raw_bytes_are_refused() {
        for raw in [0, FRAME_RAW_BYTES + 1] {
            let frame = Frame { compressed: 1, raw };
            assert!(SeekTable::new().push(frame).is_err());
        }
    }

    proptest! {
        #[test]
        fn every_table_comes_back(frames in proptest::collection::vec((0u32..5_000_000, 1..=FRAME_RAW_BYTES), 0..50), offset: u64) {
            let table = table(&frames);
            let bytes = table.to_bytes();
            let size = table.frames_size() + table.table_size();
            prop_assert_eq!(SeekTable::size_in(&bytes[bytes.len() - FOOTER_BYTES..], size), Ok(bytes.len() as u64));
            prop_assert_eq!(SeekTable::from_bytes(&bytes, size), Ok(table.clone()));
            let offset = offset % (table.raw_size() + 1);
            match table.locate(offset) {
                None => prop_assert_eq!(offset, table.raw_size()),
                Some(position) => {
                    let before: Vec<_> = table.frames().iter().scan(0u64, |at, frame| { *at += u64::from(frame.compressed); Some(*at) }).collect();
                    prop_assert!(position.file.start == 0 || before.contains(&position.file.start));
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), size: u64) {
            let _ = SeekTable::from_bytes(&bytes, size);
            let _ = SeekTable::size_in(&bytes, size);
        }
    }
}
