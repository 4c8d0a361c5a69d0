//! Frames: NARs on disk and in storage as seekable zstd, written and read.
//!
//! [`FrameWriter`] compresses what is pushed into it, in frames of
//! [`FRAME_RAW_BYTES`], and ends with the table;
//! `raw_of` undoes one frame. Everything here blocks and belongs on a blocking thread. Memory: two
//! buffers of one frame each, and what zstd needs for one frame at [`LEVEL`] (some 6 MiB).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use granary_protocol::hash::{FileHash, FileHasher};
use granary_protocol::seekable::{FRAME_RAW_BYTES, Frame, SeekTable, SeekTableError};

/// zstd's level: 3 costs a third of level 8's time, for a few per cent more bytes.
const LEVEL: i32 = 3;

const FRAME_BYTES: usize = FRAME_RAW_BYTES as usize;

/// Why frames could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("cannot {action} compressed frames")]
    Io {
        action: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Table(#[from] SeekTableError),
}

/// Writes one file of frames.
pub struct FrameWriter {
    file: File,
    compressor: zstd::bulk::Compressor<'static>,
    raw: Vec<u8>,
    compressed: Vec<u8>,
    table: SeekTable,
    hasher: FileHasher,
    file_size: u64,
}

/// A file of frames that is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    pub file_hash: FileHash,
    pub file_size: u64,
    pub table: SeekTable,
}

impl FrameWriter {
    /// Writes to the start of an empty file.
    pub fn new(file: File) -> Result<FrameWriter, FrameError> {
        let new = || {
            let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
            compressor.include_checksum(true)?;
            compressor.include_contentsize(true)?;
            Ok(compressor)
        };
        Ok(FrameWriter {
            file,
            compressor: new().map_err(failed("prepare"))?,
            raw: Vec::with_capacity(FRAME_BYTES),
            compressed: vec![0; zstd::zstd_safe::compress_bound(FRAME_BYTES)],
            table: SeekTable::new(),
            hasher: FileHasher::new(),
            file_size: 0,
        })
    }

    /// Goes on with a file that another process left: shows the raw bytes of each whole frame to `raw`, and
    /// cuts off what follows them. A frame that is shorter than others ended a file, and is cut off as well.
    pub fn resume<E: From<FrameError>>(
        file: File,
        mut raw: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<FrameWriter, E> {
        let mut writer = FrameWriter::new(file)?;
        let mut decompressor =
            zstd::bulk::Decompressor::new().map_err(failed("prepare to read"))?;
        let mut compressed = Vec::new();
        loop {
            let room = writer.compressed.len() - compressed.len();
            let mut next = (&mut writer.file).take(room as u64);
            next.read_to_end(&mut compressed).map_err(failed("read"))?;
            let Ok(length) = zstd::zstd_safe::find_frame_compressed_size(&compressed) else {
                break;
            };
            let Some(frame) = compressed.get(..length) else {
                break;
            };
            match decompressor.decompress(frame, FRAME_BYTES) {
                Ok(bytes) if bytes.len() == FRAME_BYTES => raw(&bytes)?,
                // What was cut, and tables.
                Ok(_) | Err(_) => break,
            }
            let frame = Frame {
                compressed: length as u32,
                raw: FRAME_RAW_BYTES,
            };
            writer.table.push(frame).map_err(FrameError::from)?;
            writer.hasher.update(&compressed[..length]);
            writer.file_size += length as u64;
            compressed.drain(..length);
        }
        let size = writer.file_size;
        let cut = writer.file.set_len(size);
        cut.and_then(|()| writer.file.seek(SeekFrom::Start(size)))
            .map_err(failed("cut"))?;
        Ok(writer)
    }

    /// Takes the next raw bytes.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            let room = FRAME_BYTES - self.raw.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.raw.extend_from_slice(now);
            bytes = later;
            if self.raw.len() == FRAME_BYTES {
                self.end_frame()?;
            }
        }
        Ok(())
    }

    /// Ends the file with its table, and makes it durable.
    pub fn finish(mut self) -> Result<Packed, FrameError> {
        if !self.raw.is_empty() {
            self.end_frame()?;
        }
        let table = self.table.to_bytes();
        self.append(&table)?;
        self.file.sync_all().map_err(failed("write"))?;
        Ok(Packed {
            file_hash: self.hasher.finish(),
            file_size: self.file_size,
            table: self.table,
        })
    }

    fn end_frame(&mut self) -> Result<(), FrameError> {
        let length = self
            .compressor
            .compress_to_buffer(&self.raw, self.compressed.as_mut_slice())
            .map_err(failed("compress"))?;
        self.table.push(Frame {
            // Both are bounded by a frame, or zstd's bound on one.
            compressed: length as u32,
            raw: self.raw.len() as u32,
        })?;
        let compressed = std::mem::take(&mut self.compressed);
        let appended = self.append(&compressed[..length]);
        self.compressed = compressed;
        self.raw.clear();
        appended
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        self.file.write_all(bytes).map_err(failed("write"))?;
        self.hasher.update(bytes);
        self.file_size += bytes.len() as u64;
        Ok(())
    }
}

/// Returns a reader of the raw bytes of consecutive frames.
pub fn raw_of<R: Read>(frames: R) -> Result<impl Read, FrameError> {
    zstd::stream::read::Decoder::new(frames).map_err(failed("read"))
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> FrameError {
    move |source| FrameError::Io { action, source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Bytes that compress a little and differ everywhere.
    fn bytes(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 26) as u8
        };
        (0..length).map(next).collect()
    }

    fn pack(raw: &[u8]) -> (Vec<u8>, Packed) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = FrameWriter::new(file.reopen().unwrap()).unwrap();
        for piece in raw.chunks(100_003) {
            writer.write(piece).unwrap();
        }
        let packed = writer.finish().unwrap();
        (fs::read(file.path()).unwrap(), packed)
    }

    fn unpack(frames: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        raw_of(frames).unwrap().read_to_end(&mut raw).unwrap();
        raw
    }

    #[test]
    fn a_file_of_frames_is_one_ordinary_zstd_stream() {
        for length in [
            0,
            1,
            FRAME_BYTES - 1,
            FRAME_BYTES,
            FRAME_BYTES + 1,
            3 * FRAME_BYTES - 7,
        ] {
            let raw = bytes(length);
            let (file, packed) = pack(&raw);
            assert_eq!(packed.file_size, file.len() as u64);
            assert_eq!(packed.table.raw_size(), length as u64);
            assert!(unpack(&file) == raw, "{length}");
            let table_at = packed.table.frames_size() as usize;
            let read = SeekTable::from_bytes(&file[table_at..], file.len() as u64);
            assert_eq!(read, Ok(packed.table));
        }
    }

    #[test]
    fn any_raw_offset_is_read_without_what_precedes_it() {
        let raw = bytes(2 * FRAME_BYTES + 100_000);
        let (mut file, packed) = pack(&raw);
        for offset in [
            0,
            1,
            FRAME_BYTES - 1,
            FRAME_BYTES,
            FRAME_BYTES + 1,
            raw.len() - 1,
        ] {
            let at = packed.table.locate(offset as u64).unwrap();
            // What precedes is not only unread, it is not there.
            file[..at.file.start as usize].fill(0xff);
            let part = unpack(&file[at.file.start as usize..at.file.end as usize]);
            assert!(part[at.skip as usize..] == raw[offset..], "{offset}");
        }
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let (mut file, packed) = pack(&bytes(100_000));
        let middle = packed.table.frames_size() as usize / 2;
        file[middle] ^= 1;
        assert!(
            raw_of(&file[..])
                .unwrap()
                .read_to_end(&mut Vec::new())
                .is_err()
        );
    }
}
