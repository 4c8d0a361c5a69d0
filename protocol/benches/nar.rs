//! What a NAR costs beside its contents: laying out, finding an offset, framing, strict decoding.

use divan::{Bencher, counter::BytesCount, counter::ItemsCount};
use granary_protocol::nar::{Decoder, Layout, LayoutBuilder, Segment};

fn main() {
    // What one node of a layout costs in memory, beside the time.
    let layout = layout(20_000, 0);
    println!(
        "layout: {:.1} bytes per node",
        layout.memory_bytes() as f64 / layout.node_count() as f64
    );
    divan::main();
}

/// Files of `size` bytes in directories of a hundred, as in a package with many small files.
fn layout(files: usize, size: u64) -> Layout {
    let mut builder = LayoutBuilder::new();
    builder.directory(b"").unwrap();
    for directory in 0..files.div_ceil(100) {
        builder
            .directory(format!("directory-{directory:08}").as_bytes())
            .unwrap();
        for file in 0..100 {
            builder
                .regular(format!("file-{file:03}.h").as_bytes(), false, size)
                .unwrap();
        }
        builder.end().unwrap();
    }
    builder.end().unwrap();
    builder.finish().unwrap()
}

fn nar(layout: &Layout) -> Vec<u8> {
    let mut nar = Vec::new();
    for segment in layout.segments(0) {
        match segment {
            Segment::Framing(bytes) => nar.extend_from_slice(&bytes),
            Segment::Contents { length, .. } => nar.resize(nar.len() + length as usize, b'x'),
        }
    }
    nar
}

#[divan::bench]
fn lay_out_20_000_files(bencher: Bencher) {
    bencher
        .counter(ItemsCount::new(20_000usize))
        .bench(|| layout(20_000, 1000));
}

#[divan::bench]
fn frame_20_000_files(bencher: Bencher) {
    let layout = layout(20_000, 1000);
    bencher
        .counter(ItemsCount::new(20_000usize))
        .bench(|| layout.segments(0).count());
}

#[divan::bench]
fn find_an_offset_among_20_000_files(bencher: Bencher) {
    let layout = layout(20_000, 1000);
    let middle = layout.nar_size() / 2;
    bencher.bench(|| layout.segments(divan::black_box(middle)).next());
}

/// Files of this many bytes; 64 KiB pieces, as they come from a connection.
#[divan::bench(args = [0, 1_000, 1_000_000])]
fn decode(bencher: Bencher, size: u64) {
    let nar = nar(&layout(if size > 100_000 { 100 } else { 20_000 }, size));
    bencher.counter(BytesCount::new(nar.len())).bench(|| {
        let mut decoder = Decoder::new();
        for mut piece in nar.chunks(64 * 1024) {
            while let Some(event) = decoder.next(&mut piece).unwrap() {
                divan::black_box(event);
            }
        }
        decoder.finish().unwrap();
    });
}
