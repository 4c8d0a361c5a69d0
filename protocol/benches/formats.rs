//! How long the formats take per path: what every lookup pays.

use divan::{Bencher, black_box, counter::BytesCount};
use granary_protocol::hash::{NarHasher, sha256};
use granary_protocol::narinfo::{NarInfo, VerifiedNarInfo};
use granary_protocol::nix32;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::StoreDir;

const FEW: &str = include_str!("../tests/corpus/narinfo/cache.nixos.org-ruby-2.7.3.narinfo");
const MANY: &str =
    include_str!("../tests/corpus/narinfo/handwritten-three-hundred-references.narinfo");

/// Narinfos by their number of references.
const REFERENCES: [usize; 2] = [12, 300];

const KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

fn narinfo_with(references: usize) -> &'static str {
    if references == 12 { FEW } else { MANY }
}

fn main() {
    divan::main();
}

#[divan::bench(args = REFERENCES)]
fn parse_narinfo(bencher: Bencher<'_, '_>, references: usize) {
    let text = narinfo_with(references);
    let dir = StoreDir::default();
    bencher
        .counter(BytesCount::of_str(text))
        .bench(|| NarInfo::parse(black_box(text), &dir));
}

#[divan::bench(args = REFERENCES)]
fn print_narinfo(bencher: Bencher<'_, '_>, references: usize) {
    let text = narinfo_with(references);
    let dir = StoreDir::default();
    let narinfo = NarInfo::parse(text, &dir).expect("the corpus parses");
    bencher.bench(|| black_box(&narinfo).to_text(&dir));
}

#[divan::bench]
fn verify_narinfo(bencher: Bencher<'_, '_>) {
    let dir = StoreDir::default();
    let keys: TrustedKeys = KEY.parse().expect("the key is well-known");
    let narinfo = NarInfo::parse(FEW, &dir).expect("the corpus parses");
    bencher
        .with_inputs(|| narinfo.clone())
        .bench_values(|narinfo| VerifiedNarInfo::verify(narinfo, &keys, &dir));
}

#[divan::bench]
fn encode_nix32(bencher: Bencher<'_, '_>) {
    let digest = sha256(b"granary");
    bencher.bench(|| nix32::encode(black_box(&digest)));
}

#[divan::bench]
fn decode_nix32(bencher: Bencher<'_, '_>) {
    let text = nix32::encode(&sha256(b"granary"));
    bencher.bench(|| nix32::decode(black_box(&text)));
}

#[divan::bench]
fn hash_nar(bencher: Bencher<'_, '_>) {
    let chunk = vec![7; 1024 * 1024];
    bencher.counter(BytesCount::of_slice(&chunk)).bench(|| {
        let mut hasher = NarHasher::new();
        hasher.update(black_box(&chunk));
        hasher.finish()
    });
}
