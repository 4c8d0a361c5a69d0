//! Unpack: a packed NAR becomes a NAR while it streams.
//!
//! Decoders compute for milliseconds at a time, so each stream has a thread of its own between two
//! short queues: compressed bytes go in, NAR bytes come out, and neither end gets far ahead of the
//! other. Several frames or streams one after another are one NAR, as Nix reads them.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use bytes::{Buf, Bytes};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use granary_protocol::narinfo::Compression;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::SILENCE_TIMEOUT;

/// NARs unpacked at once, each on a thread: Nix asks for 16 at a time, and a few Nix at once share a
/// machine. Beyond it, they wait.
const UNPACKERS_MAX: usize = 64;

/// Size of the pieces that come out.
const PIECE_BYTES: usize = 128 * 1024;

/// Pieces waiting on either side of the decoder.
const PIECES_WAITING_MAX: usize = 2;

/// Memory that one xz decoder may take: `xz -9` needs 65 MiB. A header that demands more is a trap.
const XZ_MEMORY_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// Read buffer of the brotli decoder; its window of up to 16 MiB is its own.
const BROTLI_BUFFER_BYTES: usize = 64 * 1024;

/// Bounds how many NARs are unpacked at once.
#[derive(Clone)]
pub struct Unpackers(Arc<Semaphore>);

impl Default for Unpackers {
    fn default() -> Unpackers {
        Unpackers(Arc::new(Semaphore::new(UNPACKERS_MAX)))
    }
}

impl Unpackers {
    /// Starts to unpack `packed` and drops what comes before byte `from`; ends at byte `size`.
    ///
    /// `None` when as many are at work as may be.
    pub fn start(
        &self,
        layers: Vec<Compression>,
        packed: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
        from: u64,
        size: u64,
    ) -> io::Result<Option<Unpacked>> {
        let Ok(permit) = self.0.clone().try_acquire_owned() else {
            return Ok(None);
        };
        let (input, packed_pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let (output, pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let unwanted = CancellationToken::new();
        tokio::spawn(feed(packed, input, unwanted.clone()));
        let work = Work {
            layers,
            input: Pieces {
                pieces: packed_pieces,
                current: Bytes::new(),
            },
            output,
            from,
            size,
            _permit: permit,
        };
        thread::Builder::new()
            .name("unpack".into())
            .spawn(move || work.run())?;
        Ok(Some(Unpacked {
            pieces,
            _unwanted: unwanted.drop_guard(),
        }))
    }
}

/// A NAR as it comes out. Dropping it ends the work.
pub struct Unpacked {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    _unwanted: DropGuard,
}

impl Unpacked {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<io::Result<Bytes>> {
        self.pieces.recv().await
    }

    /// The same as a stream.
    pub fn into_stream(self) -> BoxStream<'static, io::Result<Bytes>> {
        let next = async |mut unpacked: Unpacked| Some((unpacked.next().await?, unpacked));
        futures::stream::unfold(self, next).boxed()
    }
}

/// Returns whether this node can undo a compression.
pub fn is_known(compression: Compression) -> bool {
    use Compression::*;
    matches!(compression, None | Xz | Bzip2 | Gzip | Zstd | Brotli)
}

/// Unpacks something small at once; an error when it is larger than `bytes_max`.
pub fn all(layer: Compression, packed: &[u8], bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    decoder(layer, packed)?
        .take(limit.saturating_add(1))
        .read_to_end(&mut unpacked)?;
    if unpacked.len() > bytes_max {
        return Err(io::Error::other(format!(
            "unpacks to more than {bytes_max} bytes"
        )));
    }
    Ok(unpacked)
}

/// Moves pieces from the network to the decoder until one of them ends.
async fn feed(
    mut packed: impl Stream<Item = io::Result<Bytes>> + Unpin,
    input: mpsc::Sender<io::Result<Bytes>>,
    unwanted: CancellationToken,
) {
    loop {
        let piece = tokio::select! {
            () = unwanted.cancelled() => return,
            piece = tokio::time::timeout(SILENCE_TIMEOUT, packed.next()) => piece,
        };
        let piece = match piece {
            Ok(Some(piece)) => piece,
            // Dropping the sender is the end of the input.
            Ok(None) => return,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("nothing came for {SILENCE_TIMEOUT:?}"),
            )),
        };
        let is_last = piece.is_err();
        tokio::select! {
            () = unwanted.cancelled() => return,
            sent = input.send(piece) => if sent.is_err() { return },
        }
        if is_last {
            return;
        }
    }
}

/// What a decoder's thread owns.
struct Work {
    layers: Vec<Compression>,
    input: Pieces,
    output: mpsc::Sender<io::Result<Bytes>>,
    from: u64,
    size: u64,
    _permit: OwnedSemaphorePermit,
}

impl Work {
    fn run(self) {
        let output = self.output.clone();
        if let Err(error) = self.unpack() {
            // Nobody may be left to hear it.
            let _ = output.blocking_send(Err(error));
        }
    }

    fn unpack(self) -> io::Result<()> {
        let mut reader: Box<dyn Read> = Box::new(self.input);
        for layer in self.layers {
            reader = decoder(layer, reader)?;
        }
        let skipped = io::copy(&mut reader.by_ref().take(self.from), &mut io::sink())?;
        let too_short = |bytes: u64| {
            let problem = format!("ends after {bytes} of {} bytes", self.size);
            io::Error::new(io::ErrorKind::UnexpectedEof, problem)
        };
        if skipped < self.from {
            return Err(too_short(skipped));
        }
        let mut at = self.from;
        while at < self.size {
            let left = usize::try_from(self.size - at).unwrap_or(usize::MAX);
            let mut piece = vec![0; PIECE_BYTES.min(left)];
            let length = fill(&mut reader, &mut piece)?;
            if length == 0 {
                return Err(too_short(at));
            }
            piece.truncate(length);
            at += length as u64;
            if self.output.blocking_send(Ok(piece.into())).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn decoder<'a>(layer: Compression, packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match layer {
        Compression::None => Box::new(packed),
        Compression::Xz => {
            let concatenated = liblzma::stream::CONCATENATED;
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, concatenated)?;
            Box::new(liblzma::read::XzDecoder::new_stream(packed, stream))
        }
        Compression::Bzip2 => Box::new(bzip2::read::MultiBzDecoder::new(packed)),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(packed)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::new(packed)?),
        Compression::Brotli => Box::new(brotli::Decompressor::new(packed, BROTLI_BUFFER_BYTES)),
        other => {
            let problem = format!("this node does not unpack {other}");
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        }
    })
}

/// Reads until `piece` is full or the end has come.
fn fill(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < piece.len() {
        match reader.read(&mut piece[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What came before it is worth having; the error comes again.
            Err(error) if length == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(length)
}

/// Pieces of the network as something to read, on a thread that may wait for them.
struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const ALL: [Compression; 6] = [
        Compression::None,
        Compression::Xz,
        Compression::Bzip2,
        Compression::Gzip,
        Compression::Zstd,
        Compression::Brotli,
    ];

    fn pack(layer: Compression, plain: &[u8]) -> Vec<u8> {
        match layer {
            Compression::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Bzip2 => {
                let level = bzip2::Compression::default();
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Gzip => {
                let level = flate2::Compression::default();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Zstd => zstd::stream::encode_all(plain, 3).unwrap(),
            Compression::Brotli => {
                let mut packed = Vec::new();
                let mut encoder = brotli::CompressorWriter::new(&mut packed, 4096, 5, 20);
                encoder.write_all(plain).unwrap();
                drop(encoder);
                packed
            }
            _ => plain.to_vec(),
        }
    }

    fn plain() -> Vec<u8> {
        (0..300_000u32)
            .flat_map(|number| (number / 7).to_le_bytes())
            .collect()
    }

    async fn unpack(
        layer: Compression,
        packed: Vec<u8>,
        from: u64,
        size: u64,
    ) -> io::Result<Vec<u8>> {
        let pieces: Vec<io::Result<Bytes>> = packed
            .chunks(10_000)
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        let stream = futures::stream::iter(pieces);
        let mut unpacked = Unpackers::default()
            .start(vec![layer], stream, from, size)?
            .unwrap();
        let mut all = Vec::new();
        while let Some(piece) = unpacked.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn every_compression_is_undone_from_any_offset() {
        let plain = plain();
        let size = plain.len() as u64;
        for layer in ALL {
            let packed = pack(layer, &plain);
            for from in [0, 1, 500_000, size - 1, size] {
                let unpacked = unpack(layer, packed.clone(), from, size).await.unwrap();
                assert!(unpacked == plain[from as usize..], "{layer} from {from}");
            }
        }
    }

    #[tokio::test]
    async fn streams_one_after_another_are_one() {
        let plain = plain();
        let (first, second) = plain.split_at(400_001);
        for layer in ALL
            .into_iter()
            .filter(|layer| *layer != Compression::Brotli)
        {
            let packed = [pack(layer, first), pack(layer, second)].concat();
            let unpacked = unpack(layer, packed, 0, plain.len() as u64).await.unwrap();
            assert!(unpacked == plain, "{layer}");
        }
    }

    #[tokio::test]
    async fn what_is_cut_short_or_damaged_is_an_error_at_its_place() {
        let plain = plain();
        let size = plain.len() as u64;
        for layer in ALL {
            let packed = pack(layer, &plain);
            let cut = packed[..packed.len() / 2].to_vec();
            assert!(unpack(layer, cut, 0, size).await.is_err(), "{layer}");
            if layer == Compression::None {
                continue;
            }
            let mut damaged = packed;
            damaged[0] ^= 0x55;
            let outcome = unpack(layer, damaged, 0, size).await;
            assert!(outcome.is_err() || outcome.unwrap() != plain, "{layer}");
        }
    }

    #[tokio::test]
    async fn a_bomb_goes_off_at_the_promised_size() {
        let bomb = pack(Compression::Zstd, &vec![0; 64 * 1024 * 1024]);
        let unpacked = unpack(Compression::Zstd, bomb.clone(), 0, 1000)
            .await
            .unwrap();
        assert_eq!(unpacked.len(), 1000);
        assert!(all(Compression::Zstd, &bomb, 1000).is_err());
    }

    #[tokio::test]
    async fn what_nobody_reads_any_more_ends_its_thread() {
        let unpackers = Unpackers::default();
        let endless = futures::stream::iter(std::iter::repeat_with(|| {
            Ok(Bytes::from_static(&[0; 4096]))
        }));
        let layers = vec![Compression::None];
        let unpacked = unpackers
            .start(layers.clone(), endless, 0, u64::MAX)
            .unwrap();
        // One whose input stops coming, as well.
        let silent = futures::stream::pending();
        let waiting = unpackers.start(layers, silent, 0, u64::MAX).unwrap();
        assert_eq!(unpackers.0.available_permits(), UNPACKERS_MAX - 2);
        drop((unpacked, waiting));
        let all = u32::try_from(UNPACKERS_MAX).unwrap();
        let permits = unpackers.0.acquire_many(all);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(20), permits).await;
        assert!(ended.is_ok(), "a thread was left behind");
    }
}
