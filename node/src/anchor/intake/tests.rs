use std::convert::Infallible;
use std::io::Write;

use futures::stream;
use granary_protocol::nar::Tree;

use super::*;

fn nar(bytes: usize) -> Vec<u8> {
    let contents: Vec<u8> = (0..bytes).map(|at| (at / 7) as u8).collect();
    let tree = Tree::Regular {
        executable: false,
        contents,
    };
    tree.nar().unwrap()
}

fn body(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin {
    let pieces: Vec<_> = bytes
        .chunks(10_007)
        .map(Bytes::copy_from_slice)
        .map(Ok)
        .collect();
    stream::iter(pieces)
}

async fn take(
    bytes: &[u8],
    encoding: Encoding,
    raw_max: u64,
) -> Result<(Taken, BodyAbout), IntakeError> {
    let folder = tempfile::tempdir().unwrap();
    let intake = Intake::new(Some(folder.path()), raw_max)?;
    let (intake, outcome) = intake.fill(body(bytes), encoding).await;
    let about = outcome?;
    Ok((intake.unwrap().finish()?, about))
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn brotli(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    brotli::CompressorWriter::new(&mut packed, 4096, 1, 20)
        .write_all(bytes)
        .unwrap();
    packed
}

#[tokio::test]
async fn every_encoding_gives_the_same_nar() {
    let nar = nar(300_000);
    let mut hasher = NarHasher::new();
    hasher.update(&nar);
    let expected = hasher.finish();
    for (encoding, bytes) in [
        (Encoding::None, nar.clone()),
        (Encoding::Zstd, zstd::encode_all(&nar[..], 1).unwrap()),
        (Encoding::Xz, xz(&nar)),
        (Encoding::Bzip2, bzip2(&nar)),
        (Encoding::Gzip, gzip(&nar)),
        (Encoding::Brotli, brotli(&nar)),
        (Encoding::Bare, nar.clone()),
        (Encoding::Bare, gzip(&nar)),
        // Several streams one after the other, as parallel compressors write them.
        (
            Encoding::Zstd,
            [
                zstd::encode_all(&nar[..99], 1).unwrap(),
                zstd::encode_all(&nar[99..], 1).unwrap(),
            ]
            .concat(),
        ),
        (Encoding::Xz, [xz(&nar[..99]), xz(&nar[99..])].concat()),
        (
            Encoding::Bzip2,
            [bzip2(&nar[..99]), bzip2(&nar[99..])].concat(),
        ),
        (
            Encoding::Gzip,
            [gzip(&nar[..99]), gzip(&nar[99..])].concat(),
        ),
    ] {
        let (taken, about) = take(&bytes, encoding, u64::MAX).await.unwrap();
        assert_eq!(taken.nar_hash, expected, "{encoding:?}");
        assert_eq!(taken.nar_size, nar.len() as u64);
        assert_eq!(about.size, bytes.len() as u64);
        let (packed, _) = taken.packed.unwrap();
        assert_eq!(packed.table.raw_size(), nar.len() as u64);
    }
}

#[tokio::test]
async fn what_is_no_nar_is_refused_and_leaves_nothing() {
    let nar = nar(1000);
    let mut unpadded = nar.clone();
    unpadded.push(0);
    for (bytes, encoding) in [
        (vec![], Encoding::None),
        (b"hello".to_vec(), Encoding::None),
        (nar[..nar.len() - 1].to_vec(), Encoding::None),
        (unpadded, Encoding::None),
        (nar.clone(), Encoding::Zstd),
        (nar.clone(), Encoding::Xz),
        (nar.clone(), Encoding::Bzip2),
        (nar.clone(), Encoding::Gzip),
        (nar.clone(), Encoding::Brotli),
        (vec![], Encoding::Bare),
        (vec![0x1f], Encoding::Bare),
        (gzip(&nar)[..60].to_vec(), Encoding::Bare),
        (brotli(&nar)[..60].to_vec(), Encoding::Brotli),
        (xz(&nar)[..60].to_vec(), Encoding::Xz),
        (
            zstd::encode_all(&nar[..], 1).unwrap()[..60].to_vec(),
            Encoding::Zstd,
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let intake = Intake::new(Some(folder.path()), u64::MAX).unwrap();
        let (intake, outcome) = intake.fill(body(&bytes), encoding).await;
        let ended = outcome.and_then(|_| intake.map_or(Err(IntakeError::Stopped), Intake::finish));
        let error = ended.expect_err("it is no nar");
        assert!(
            matches!(error, IntakeError::Nar(_) | IntakeError::Encoding { .. }),
            "{error}"
        );
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_bomb_ends_at_the_promised_size() {
    let bomb = zstd::encode_all(&nar(50_000_000)[..], 1).unwrap();
    let error = take(&bomb, Encoding::Zstd, 1_000_000).await.unwrap_err();
    assert!(matches!(error, IntakeError::TooLarge { max: 1_000_000 }));
}

#[tokio::test]
async fn a_body_that_is_cut_can_be_continued() {
    let nar = nar(500_000);
    let folder = tempfile::tempdir().unwrap();
    let mut intake = Intake::new(Some(folder.path()), u64::MAX).unwrap();
    let mut rounds = 0;
    while intake.offset() < nar.len() as u64 {
        let rest = &nar[intake.offset() as usize..];
        let cut = rest.len().min(180_000);
        let pieces = [
            Ok(Bytes::copy_from_slice(&rest[..cut])),
            Err(io::Error::from(io::ErrorKind::ConnectionReset)),
        ];
        let (back, outcome) = intake.fill(stream::iter(pieces), Encoding::None).await;
        assert!(matches!(outcome, Err(IntakeError::Body { .. })));
        intake = back.unwrap();
        rounds += 1;
    }
    assert_eq!(rounds, 3);
    let taken = intake.finish().unwrap();
    assert_eq!(taken.nar_size, nar.len() as u64);
}
