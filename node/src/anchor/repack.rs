//! Repack: a stored NAR as the file that a client once sent.
//!
//! `nix copy --to` writes a narinfo of its own, and remembers it for 30 days: with the name that it gave to the file
//! of its NAR, and the packing. When the same user pulls from the cache, that file is asked for. It is made anew out
//! of the NAR that is kept: the same NAR in the same packing, in other bytes, which no client compares.

use std::io::{self, Write};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};

use super::intake::Encoding;

/// Levels that cost least: the packing is what the client expects, not what it needs.
const XZ_LEVEL: u32 = 0;
const BROTLI_LEVEL: u32 = 1;

/// Brotli's window, 2^18 bytes; and its buffer.
const BROTLI_WINDOW_LOG: u32 = 18;
const BROTLI_BUFFER_BYTES: usize = 64 * 1024;

/// Packs bytes as they come.
enum Packer {
    Xz(liblzma::write::XzEncoder<Vec<u8>>),
    Bzip2(bzip2::write::BzEncoder<Vec<u8>>),
    Gzip(flate2::write::GzEncoder<Vec<u8>>),
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
}

impl Packer {
    /// `None` for what is not packed, and for zstd, as which it is kept.
    fn new(encoding: Encoding) -> Option<Packer> {
        Some(match encoding {
            Encoding::Xz => Packer::Xz(liblzma::write::XzEncoder::new(Vec::new(), XZ_LEVEL)),
            Encoding::Bzip2 => Packer::Bzip2(bzip2::write::BzEncoder::new(
                Vec::new(),
                bzip2::Compression::fast(),
            )),
            Encoding::Brotli => Packer::Brotli(Box::new(brotli::CompressorWriter::new(
                Vec::new(),
                BROTLI_BUFFER_BYTES,
                BROTLI_LEVEL,
                BROTLI_WINDOW_LOG,
            ))),
            Encoding::Gzip => Packer::Gzip(flate2::write::GzEncoder::new(
                Vec::new(),
                flate2::Compression::fast(),
            )),
            Encoding::None | Encoding::Bare | Encoding::Zstd => return None,
        })
    }

    /// Packs the next bytes; returns what is ready of the file. Computes.
    fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        Ok(std::mem::take(match self {
            Packer::Xz(encoder) => {
                encoder.write_all(bytes)?;
                encoder.get_mut()
            }
            Packer::Bzip2(encoder) => {
                encoder.write_all(bytes)?;
                encoder.get_mut()
            }
            Packer::Gzip(encoder) => {
                encoder.write_all(bytes)?;
                encoder.get_mut()
            }
            Packer::Brotli(encoder) => {
                encoder.write_all(bytes)?;
                encoder.get_mut()
            }
        }))
    }

    /// Returns the end of the file. Computes.
    fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Packer::Xz(encoder) => encoder.finish(),
            Packer::Bzip2(encoder) => encoder.finish(),
            Packer::Gzip(encoder) => encoder.finish(),
            Packer::Brotli(encoder) => Ok(encoder.into_inner()),
        }
    }
}

/// Packs the raw bytes of a NAR. An error of theirs is the last item, so that nothing looks whole that is not.
pub fn packed(
    raw: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
    encoding: Encoding,
) -> BoxStream<'static, io::Result<Bytes>> {
    let Some(packer) = Packer::new(encoding) else {
        return raw.boxed();
    };
    stream::try_unfold((raw, Some(packer)), next)
        .try_filter(|bytes| std::future::ready(!bytes.is_empty()))
        .boxed()
}

type State<S> = (S, Option<Packer>);

async fn next<S>((mut raw, packer): State<S>) -> io::Result<Option<(Bytes, State<S>)>>
where
    S: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let Some(mut packer) = packer else {
        return Ok(None);
    };
    let bytes = raw.try_next().await?;
    let work = move || {
        Ok::<_, io::Error>(match bytes {
            Some(bytes) => (packer.push(&bytes)?, Some(packer)),
            None => (packer.finish()?, None),
        })
    };
    // Some milliseconds for each piece of 128 KiB.
    let done = tokio::task::spawn_blocking(work).await;
    let (bytes, packer) = done.map_err(io::Error::other)??;
    Ok(Some((bytes.into(), (raw, packer))))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn unpacked(encoding: Encoding, packed: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        let read = match encoding {
            Encoding::Xz => liblzma::read::XzDecoder::new(packed).read_to_end(&mut raw),
            Encoding::Bzip2 => bzip2::read::BzDecoder::new(packed).read_to_end(&mut raw),
            Encoding::Gzip => flate2::read::GzDecoder::new(packed).read_to_end(&mut raw),
            Encoding::Brotli => {
                brotli::Decompressor::new(packed, BROTLI_BUFFER_BYTES).read_to_end(&mut raw)
            }
            _ => (&mut { packed }).read_to_end(&mut raw),
        };
        read.unwrap();
        raw
    }

    fn pieces(length: u32) -> Vec<Bytes> {
        let bytes: Vec<u8> = (0..length).flat_map(|i| (i / 7).to_le_bytes()).collect();
        bytes.chunks(50_000).map(Bytes::copy_from_slice).collect()
    }

    #[tokio::test]
    async fn every_packing_is_undone_to_the_same_bytes() {
        for length in [0, 1, 300_000] {
            let pieces = pieces(length);
            for encoding in [
                Encoding::None,
                Encoding::Gzip,
                Encoding::Xz,
                Encoding::Bzip2,
                Encoding::Brotli,
            ] {
                let raw = stream::iter(pieces.clone().into_iter().map(Ok));
                let file: Vec<Bytes> = packed(raw, encoding).try_collect().await.unwrap();
                assert!(
                    unpacked(encoding, &file.concat()) == pieces.concat(),
                    "{encoding:?} {length}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_nar_that_breaks_off_ends_in_an_error() {
        let broken = io::Error::other("broken");
        let pieces = pieces(100_000).into_iter().map(Ok).chain([Err(broken)]);
        let file = packed(stream::iter(pieces), Encoding::Xz).collect::<Vec<_>>();
        assert_eq!(
            file.await.last().unwrap().as_ref().unwrap_err().to_string(),
            "broken"
        );
    }
}
