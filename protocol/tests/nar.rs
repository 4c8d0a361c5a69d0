//! The NAR format against real Nix's archives, against every malformed input we know of, and
//! against itself: what a layout writes at any offset, a decoder reads at any chunking.

use granary_protocol::nar::{
    DecodeError, Decoder, Event, FRAMING_BYTES_MAX, Fault, Layout, LayoutRecorder, Segment, Tree,
};
use proptest::prelude::*;

/// Decodes a NAR given in pieces of the lengths in `pieces` (repeated), into the tree it holds.
fn decode(nar: &[u8], pieces: &[usize]) -> Result<(Tree, Layout), DecodeError> {
    let mut decoder = Decoder::new();
    let mut recorder = LayoutRecorder::new();
    // Open directories with the name that each will have in its parent, then what is being read.
    let mut open = Vec::new();
    let mut name = Vec::new();
    let mut done = None;
    let mut rest = nar;
    for &length in pieces.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (mut piece, after) = rest.split_at(length.clamp(1, rest.len()));
        rest = after;
        while let Some(event) = decoder.next(&mut piece)? {
            recorder.record(&event).unwrap();
            let node = match event {
                Event::Entry { name: of } => {
                    name = of.to_vec();
                    continue;
                }
                Event::Directory => {
                    open.push((
                        std::mem::take(&mut name),
                        Tree::Directory(Default::default()),
                    ));
                    continue;
                }
                Event::EndDirectory => {
                    let (of, tree) = open.pop().expect("a directory to end");
                    name = of;
                    tree
                }
                Event::Regular { executable, size } => Tree::Regular {
                    executable,
                    contents: Vec::with_capacity(size.min(1 << 20) as usize),
                },
                Event::Contents(bytes) => {
                    assert!(!bytes.is_empty());
                    let file = match open.last_mut() {
                        Some((_, Tree::Directory(entries))) => entries.get_mut(&name),
                        _ => done.as_mut(),
                    };
                    let Some(Tree::Regular { contents, .. }) = file else {
                        panic!("contents without a file");
                    };
                    contents.extend_from_slice(bytes);
                    continue;
                }
                Event::Symlink { target } => Tree::Symlink {
                    target: target.to_vec(),
                },
                Event::End => continue,
            };
            match open.last_mut() {
                Some((_, Tree::Directory(entries))) => {
                    assert_eq!(entries.insert(name.clone(), node), None);
                }
                _ => done = Some(node),
            }
        }
        assert!(piece.is_empty());
    }
    decoder.finish()?;
    let layout = recorder.finish().expect("a decoded nar has a layout");
    Ok((done.expect("a decoded nar has a root"), layout))
}

fn suffix(tree: &Tree, layout: &Layout, from: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in layout.segments(from) {
        match segment {
            Segment::Framing(bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= FRAMING_BYTES_MAX);
                out.extend_from_slice(&bytes);
            }
            Segment::Contents {
                file,
                offset,
                length,
            } => {
                assert_eq!(layout.size(file), offset + length);
                let contents = tree.contents(layout, file);
                out.extend_from_slice(&contents[offset as usize..(offset + length) as usize]);
            }
        }
    }
    out
}

fn file(contents: &[u8]) -> Tree {
    Tree::Regular {
        executable: false,
        contents: contents.to_vec(),
    }
}

fn symlink(target: &[u8]) -> Tree {
    Tree::Symlink {
        target: target.to_vec(),
    }
}

fn directory<const N: usize>(entries: [(&[u8], Tree); N]) -> Tree {
    Tree::Directory(entries.map(|(name, tree)| (name.to_vec(), tree)).into())
}

// Archives and listings made by nix 2.8 (`nix-store --dump`, `nix copy … write-nar-listing=true`).

macro_rules! vector {
    ($name:literal) => {
        include_bytes!(concat!("vectors/nar/", $name)).as_slice()
    };
}

const NARS: [(&str, &[u8]); 8] = [
    ("deep", vector!("deep.nar")),
    ("empty-directory", vector!("empty-directory.nar")),
    ("empty-file", vector!("empty-file.nar")),
    ("executable", vector!("executable.nar")),
    ("long-names", vector!("long-names.nar")),
    ("nested", vector!("nested.nar")),
    ("not-utf8", vector!("not-utf8.nar")),
    ("symlink", vector!("symlink.nar")),
];

#[test]
fn archives_of_real_nix_are_read_and_written_back_from_every_offset() {
    for (name, nar) in NARS {
        let (tree, layout) = decode(nar, &[7]).unwrap();
        assert_eq!(layout, tree.layout().unwrap(), "{name}");
        assert_eq!(layout.nar_size(), nar.len() as u64, "{name}");
        for from in 0..=nar.len() + 1 {
            let expected = nar.get(from..).unwrap_or(&[]);
            assert_eq!(
                suffix(&tree, &layout, from as u64),
                expected,
                "{name} from {from}"
            );
        }
    }
}

#[test]
fn archives_of_real_nix_hold_what_was_archived() {
    let tree = |name: &str| {
        let (_, nar) = NARS.iter().find(|(of, _)| *of == name).unwrap();
        decode(nar, &[nar.len()]).unwrap().0
    };
    assert_eq!(tree("empty-file"), file(b""));
    assert_eq!(tree("empty-directory"), directory([]));
    assert_eq!(tree("symlink"), symlink(b"/nix/store/nowhere"));
    assert_eq!(
        tree("executable"),
        Tree::Regular {
            executable: true,
            contents: b"#!/bin/sh\nexit 0\n".to_vec()
        }
    );
    assert_eq!(
        tree("not-utf8"),
        directory([
            (b"\xff\xfe", file(b"invalid")),
            (
                b"\xc3\x28",
                directory([(
                    b"\x80",
                    Tree::Regular {
                        executable: true,
                        contents: vec![]
                    }
                )])
            ),
            (b"z", symlink(b"\xf0\x28")),
        ])
    );
}

#[test]
fn listings_are_those_of_real_nix() {
    for (listing, nar) in [
        (
            vector!("empty-directory.ls"),
            vector!("empty-directory.nar"),
        ),
        (vector!("empty-file.ls"), vector!("empty-file.nar")),
        (vector!("executable.ls"), vector!("executable.nar")),
        (vector!("long-names.ls"), vector!("long-names.nar")),
        (vector!("nested.ls"), vector!("nested.nar")),
        (vector!("symlink.ls"), vector!("symlink.nar")),
    ] {
        let (_, layout) = decode(nar, &[4096]).unwrap();
        let ours = layout.listing().unwrap();
        let value: serde_json::Value = serde_json::from_str(&ours).unwrap();
        assert_eq!(
            value,
            serde_json::from_slice::<serde_json::Value>(listing).unwrap()
        );
        // Sorted keys without spaces, as current Nix writes them, is also how serde_json does.
        assert_eq!(ours, value.to_string());
    }
}

#[test]
fn trees_with_names_that_are_not_utf8_have_no_listing() {
    let (_, layout) = decode(vector!("not-utf8.nar"), &[64]).unwrap();
    assert_eq!(
        layout.listing().unwrap_err().to_string(),
        r#""z" is not UTF-8, so the tree cannot be listed as JSON"#
    );
}

#[test]
fn listing_offset_is_where_the_contents_are() {
    let tree = directory([
        (b"a", file(b"")),
        (b"b", directory([(b"c", file(b"here"))])),
    ]);
    let layout = tree.layout().unwrap();
    let listing: serde_json::Value = serde_json::from_str(&layout.listing().unwrap()).unwrap();
    let offset = listing["root"]["entries"]["b"]["entries"]["c"]["narOffset"]
        .as_u64()
        .unwrap();
    assert_eq!(&tree.nar().unwrap()[offset as usize..][..4], b"here");
}

#[test]
fn paths_are_relative_to_the_root() {
    let tree = directory([
        (b"a", directory([(b"\xff", file(b"1"))])),
        (b"b", file(b"2")),
    ]);
    let layout = tree.layout().unwrap();
    let paths: Vec<_> = layout
        .segments(0)
        .filter_map(|segment| match segment {
            Segment::Contents { file, .. } => Some(layout.path(file)),
            Segment::Framing(_) => None,
        })
        .collect();
    assert_eq!(paths, [&b"a/\xff"[..], b"b"]);
}

// Malformed input: the list of NIX.md §2.2.

/// A piece of a hand-made archive.
enum Part {
    /// A well-formed string.
    S(Vec<u8>),
    /// Bytes as they are.
    Raw(Vec<u8>),
}

fn encode(parts: &[Part]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in parts {
        match part {
            Part::S(string) => {
                out.extend_from_slice(&(string.len() as u64).to_le_bytes());
                out.extend_from_slice(string);
                out.resize(out.len().next_multiple_of(8), 0);
            }
            Part::Raw(bytes) => out.extend_from_slice(bytes),
        }
    }
    out
}

/// Splits a line into strings: `''` is the empty one, `#n` a bare 64-bit length.
fn words(line: &str) -> Vec<Part> {
    line.split_whitespace()
        .map(|word| match (word, word.strip_prefix('#')) {
            ("''", _) => Part::S(Vec::new()),
            (_, Some(length)) => Part::Raw(length.parse::<u64>().unwrap().to_le_bytes().to_vec()),
            _ => Part::S(word.as_bytes().to_vec()),
        })
        .collect()
}

#[track_caller]
fn refused(parts: Vec<Part>, offset: u64, fault: &str) {
    let nar = encode(&parts);
    for pieces in [&[nar.len()][..], &[1], &[3, 8, 1]] {
        let error = decode(&nar, pieces).map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("nar is malformed at byte {offset}: {fault}")
        );
    }
}

#[track_caller]
fn refused_line(line: &str, offset: u64, fault: &str) {
    refused(words(&format!("nix-archive-1 {line}")), offset, fault);
}

/// An archive of one directory with an empty file under each of these names.
fn with_names(names: &[&[u8]]) -> Vec<Part> {
    let mut parts = words("nix-archive-1 ( type directory");
    for name in names {
        parts.extend(words("entry ( name"));
        parts.push(Part::S(name.to_vec()));
        parts.extend(words("node ( type regular contents '' ) )"));
    }
    parts.extend(words(")"));
    parts
}

fn with_target(target: &[u8]) -> Vec<Part> {
    let mut parts = words("nix-archive-1 ( type symlink target");
    parts.push(Part::S(target.to_vec()));
    parts.extend(words(")"));
    parts
}

#[test]
fn names_that_are_not_one_path_component_are_refused() {
    refused(with_names(&[b""]), 128, "an entry has an empty name");
    refused(
        with_names(&[b"."]),
        128,
        r#"entry name "." would leave its directory"#,
    );
    refused(
        with_names(&[b".."]),
        128,
        r#"entry name ".." would leave its directory"#,
    );
    refused(
        with_names(&[b"a/b"]),
        128,
        r#"entry name "a/b" contains a slash"#,
    );
    refused(
        with_names(&[b"/etc"]),
        128,
        r#"entry name "/etc" contains a slash"#,
    );
    refused(
        with_names(&[b"a\0b"]),
        128,
        r#"entry name "a\x00b" contains a NUL byte"#,
    );
    let long = "an entry's name claims 256 bytes, at most 255 are allowed";
    refused(with_names(&[&[b'n'; 256]]), 128, long);
    decode(&encode(&with_names(&[&[b'n'; 255]])), &[9]).unwrap();
    for legal in [
        &b"a\nb"[..],
        b"\xff",
        b"...",
        b" ",
        b"a\\b",
        b"a~nix~case~hack~1",
    ] {
        decode(&encode(&with_names(&[legal])), &[9]).unwrap();
    }
    decode(&encode(&with_names(&[b"A", b"a"])), &[9]).unwrap();
}

#[test]
fn names_out_of_order_are_refused() {
    let fault = |name: &str, previous: &str| {
        format!(r#"entry "{name}" does not sort after "{previous}", its predecessor"#)
    };
    refused(with_names(&[b"a", b"a"]), 312, &fault("a", "a"));
    refused(with_names(&[b"b", b"a"]), 312, &fault("a", "b"));
    // The order of locales: case ignored.
    refused(with_names(&[b"a", b"B"]), 312, &fault("B", "a"));
    refused(with_names(&[b"ab", b"a"]), 312, &fault("a", "ab"));
    refused(
        with_names(&[b"\xff", b"\x7f"]),
        312,
        &fault(r"\x7f", r"\xff"),
    );
    // The escape attempt: a link to a directory, then that directory again.
    refused_line(
        "( type directory entry ( name a node ( type symlink target /etc ) ) \
         entry ( name a node ( type directory ) ) )",
        320,
        &fault("a", "a"),
    );
    // The predecessor is that of the same directory, not of the one that ended in between.
    refused_line(
        "( type directory entry ( name b node ( type directory entry ( name z node \
         ( type directory ) ) ) ) entry ( name a node ( type directory ) ) )",
        464,
        &fault("a", "b"),
    );
}

#[test]
fn symlinks_that_point_nowhere_are_refused() {
    refused(with_target(b""), 88, "a symlink has an empty target");
    refused(
        with_target(b"a\0b"),
        88,
        r#"symlink target "a\x00b" contains a NUL byte"#,
    );
    let long = "a symlink's target claims 4096 bytes, at most 4095 are allowed";
    refused(with_target(&[b't'; 4096]), 88, long);
    decode(&encode(&with_target(&[b't'; 4095])), &[9]).unwrap();
    for legal in [&b"."[..], b"/", b"/etc/passwd", b"../../..", b"\xff\n"] {
        decode(&encode(&with_target(legal)), &[9]).unwrap();
    }
}

#[test]
fn fields_other_than_the_canonical_ones_are_refused() {
    refused(
        words("nix-archive-2"),
        0,
        r#"expected the magic "nix-archive-1", found "nix-archive-2""#,
    );
    refused(
        words("( type regular"),
        0,
        r#"expected the magic "nix-archive-1", found "(""#,
    );
    refused_line(") type", 24, r#"expected "(" of a node, found ")""#);
    refused_line("( regular", 40, r#"expected "type", found "regular""#);
    refused_line(
        "( type type",
        56,
        r#"expected the type "regular", "symlink" or "directory", found "type""#,
    );
    refused_line(
        "( type socket",
        56,
        r#"expected the type "regular", "symlink" or "directory", found "socket""#,
    );
    refused_line(
        "( type regular type",
        72,
        r#"expected "executable" or "contents", found "type""#,
    );
    refused_line(
        "( type regular )",
        72,
        r#"expected "executable" or "contents", found ")""#,
    );
    refused_line(
        "( type regular executable yes",
        96,
        r#"expected an empty "executable", found "yes""#,
    );
    refused_line(
        "( type regular executable '' )",
        104,
        r#"expected "contents", found ")""#,
    );
    refused_line(
        "( type regular executable '' executable",
        104,
        r#"expected "contents", found "executable""#,
    );
    refused_line(
        "( type regular contents '' executable",
        96,
        r#"expected ")" of a node, found "executable""#,
    );
    refused_line(
        "( type regular contents '' contents",
        96,
        r#"expected ")" of a node, found "contents""#,
    );
    refused_line("( type symlink )", 72, r#"expected "target", found ")""#);
    refused_line(
        "( type symlink target a target",
        104,
        r#"expected ")" of a node, found "target""#,
    );
    refused_line(
        "( type directory contents",
        80,
        r#"expected "entry" or ")" of a directory, found "contents""#,
    );
    refused_line(
        "( type directory entry name",
        96,
        r#"expected "(" of an entry, found "name""#,
    );
    refused_line(
        "( type directory entry ( node",
        112,
        r#"expected "name", found "node""#,
    );
    refused_line(
        "( type directory entry ( )",
        112,
        r#"expected "name", found ")""#,
    );
    refused_line(
        "( type directory entry ( name a )",
        144,
        r#"expected "node", found ")""#,
    );
    refused_line(
        "( type directory entry ( name a name",
        144,
        r#"expected "node", found "name""#,
    );
    refused_line(
        "( type directory entry ( name a node ( type directory ) node",
        232,
        r#"expected ")" of an entry, found "node""#,
    );
}

#[test]
fn padding_other_than_zeros_is_refused() {
    let zeros = "padding is not zero";
    let with = |line: &str, raw: &[u8]| {
        let mut parts = words(line);
        parts.push(Part::Raw(raw.to_vec()));
        parts
    };
    refused(
        with("", b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\x01"),
        21,
        zeros,
    );
    refused(
        with("nix-archive-1", b"\x01\0\0\0\0\0\0\0(______ "),
        33,
        zeros,
    );
    let regular = "nix-archive-1 ( type regular contents";
    let nar = encode(&with(regular, b"\x01\0\0\0\0\0\0\0x\0\0\0\0\0\x01\0"));
    for pieces in [&[nar.len()][..], &[1]] {
        assert_eq!(
            decode(&nar, pieces).map(drop).unwrap_err().fault,
            Fault::Padding
        );
    }
}

#[test]
fn lengths_beyond_every_limit_are_refused_before_anything_is_allocated() {
    let length = 1u64 << 40;
    refused(
        words(&format!("#{length}")),
        0,
        "a keyword claims 1099511627776 bytes, at most 32 are allowed",
    );
    refused_line(
        &format!("( type directory entry ( name #{}", 1 << 30),
        128,
        "an entry's name claims 1073741824 bytes, at most 255 are allowed",
    );
    refused_line(
        &format!("( type symlink target #{}", u64::MAX),
        88,
        "a symlink's target claims 18446744073709551615 bytes, at most 4095 are allowed",
    );
    refused_line(
        &format!("( type regular contents #{}", 1u64 << 63),
        88,
        "a file's contents claims 9223372036854775808 bytes, at most 9223372036854775807 are allowed",
    );
    // A terabyte is legal to declare; what is missing is the terabyte.
    let line = format!("( type regular contents #{length} abc");
    refused_line(&line, 112, "the nar ends before it is complete");
}

#[test]
fn more_than_sixty_four_levels_are_refused() {
    let levels = |count: usize| {
        let mut parts = words("nix-archive-1 ( type directory");
        for _ in 1..count {
            parts.extend(words("entry ( name d node ( type directory"));
        }
        for _ in 1..count {
            parts.extend(words(") )"));
        }
        parts.extend(words(")"));
        encode(&parts)
    };
    decode(&levels(64), &[100]).unwrap();
    for count in [65, 2000] {
        let error = decode(&levels(count), &[100]).map(drop).unwrap_err();
        assert_eq!(error.fault, Fault::TooDeep);
    }
}

#[test]
fn truncation_at_every_offset_is_refused() {
    for (name, nar) in NARS {
        for length in 0..nar.len() {
            let error = decode(&nar[..length], &[usize::MAX]).map(drop).unwrap_err();
            let expected = DecodeError {
                offset: length as u64,
                fault: Fault::Truncated,
            };
            assert_eq!(error, expected, "{name} cut at {length}");
        }
    }
}

#[test]
fn bytes_after_the_end_are_refused_and_the_error_stays() {
    for (_, nar) in NARS {
        let mut nar = nar.to_vec();
        let length = nar.len() as u64;
        nar.push(0);
        let expected = DecodeError {
            offset: length,
            fault: Fault::Trailing,
        };
        assert_eq!(decode(&nar, &[nar.len()]).map(drop), Err(expected.clone()));

        let mut decoder = Decoder::new();
        let mut input = &nar[..];
        while let Ok(event) = decoder.next(&mut input) {
            assert!(event.is_some());
        }
        assert_eq!(decoder.next(&mut &b""[..]), Err(expected.clone()));
        assert_eq!(decoder.finish(), Err(expected));
    }
}

// Properties.

fn names() -> impl Strategy<Value = Vec<u8>> {
    let any_bytes = proptest::collection::vec(any::<u8>(), 1..12);
    prop_oneof![
        4 => "[a-c.]{1,3}".prop_map(String::into_bytes),
        2 => any_bytes,
        1 => Just(vec![b'n'; 255]),
    ]
    .prop_filter("a path component", |name| {
        name != b"." && name != b".." && !name.contains(&0) && !name.contains(&b'/')
    })
}

fn trees() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)).prop_map(
            |(executable, contents)| Tree::Regular {
                executable,
                contents
            }
        ),
        proptest::collection::vec(1..=255u8, 1..40).prop_map(|target| Tree::Symlink { target }),
        Just(Tree::Directory(Default::default())),
    ];
    leaf.prop_recursive(6, 40, 6, |inner| {
        proptest::collection::btree_map(names(), inner, 0..6).prop_map(Tree::Directory)
    })
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(1..40usize, 1..8)
}

proptest! {
    #[test]
    fn every_suffix_is_produced_from_its_offset(tree in trees()) {
        let nar = tree.nar().unwrap();
        let layout = tree.layout().unwrap();
        prop_assert_eq!(layout.nar_size(), nar.len() as u64);
        for from in 0..=nar.len() {
            prop_assert_eq!(&suffix(&tree, &layout, from as u64), &nar[from..]);
        }
    }

    #[test]
    fn decoding_inverts_encoding_at_any_chunking(tree in trees(), pieces in pieces()) {
        let (decoded, layout) = decode(&tree.nar().unwrap(), &pieces).unwrap();
        prop_assert_eq!(&layout, &tree.layout().unwrap());
        prop_assert_eq!(decoded, tree);
    }

    #[test]
    fn a_mutated_nar_is_refused_or_is_the_nar_of_another_tree(
        tree in trees(),
        mutations in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        pieces in pieces(),
    ) {
        let mut nar = tree.nar().unwrap();
        for (index, byte) in mutations {
            let index = index.index(nar.len());
            nar[index] = byte;
        }
        if let Ok((decoded, _)) = decode(&nar, &pieces) {
            prop_assert_eq!(decoded.nar().unwrap(), nar);
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), pieces in pieces()) {
        prop_assert!(decode(&bytes, &pieces).is_err());
    }

    #[test]
    fn arbitrary_words_of_the_format_never_panic(
        words in proptest::collection::vec(proptest::sample::select(&[
            "(", ")", "type", "regular", "directory", "symlink", "executable", "", "contents",
            "target", "entry", "name", "node", "a", "b",
        ][..]), 0..40),
        pieces in pieces(),
    ) {
        let mut parts = vec![Part::S(b"nix-archive-1".to_vec())];
        parts.extend(words.iter().map(|word| Part::S(word.as_bytes().to_vec())));
        let nar = encode(&parts);
        if let Ok((decoded, _)) = decode(&nar, &pieces) {
            prop_assert_eq!(decoded.nar().unwrap(), nar);
        }
    }
}
