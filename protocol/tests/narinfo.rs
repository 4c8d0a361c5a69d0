//! Narinfos of the wild, of Nix itself, and of nobody sane.
//!
//! `corpus/narinfo/README.md` says where the files come from. Real Nix 2.8.0 accepts every file
//! and decides the tables of edits below as they say.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use granary_protocol::content_address::ContentAddress;
use granary_protocol::hash::{FileHash, NarHash};
use granary_protocol::narinfo::{
    Compression, FalseContentAddress, NARINFO_BYTES_MAX, NarInfo, NarInfoError, NarUrl, Proof,
    REFERENCES_MAX, SIGNATURES_MAX, Unverified, VerifiedNarInfo, nar_url,
};
use granary_protocol::signature::{KeyName, SecretKey, Signature, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePath};
use proptest::prelude::*;

const CACHE_NIXOS_ORG: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
const NIX_COMMUNITY: &str =
    "nix-community.cachix.org-1:mB9FSh9qf2dCimDSUo8Zy7bkq5CX+/rkCWyvRCYg3Fs=";
const TEST_PUBLIC: &str = include_str!("vectors/public-key");
const TEST_SECRET: &str = include_str!("vectors/secret-key");

fn corpus() -> Vec<(String, String)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/narinfo");
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "narinfo")
    });
    files.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    files
        .iter()
        .map(|path| (name(path), fs::read_to_string(path).unwrap()))
        .collect()
}

fn text_of(name: &str) -> String {
    let found = corpus()
        .into_iter()
        .find(|(file, _)| file.starts_with(name));
    found.unwrap_or_else(|| panic!("no {name} in the corpus")).1
}

fn parse(text: &str) -> Result<NarInfo, NarInfoError> {
    NarInfo::parse(text, &StoreDir::default())
}

fn parsed(name: &str) -> NarInfo {
    parse(&text_of(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn print(narinfo: &NarInfo) -> String {
    narinfo.to_text(&StoreDir::default())
}

fn keys(text: &str) -> TrustedKeys {
    text.parse().unwrap()
}

fn verify(narinfo: NarInfo, trusted: &str) -> Result<VerifiedNarInfo, Unverified> {
    VerifiedNarInfo::verify(narinfo, &keys(trusted), &StoreDir::default())
}

fn signed_by(name: &str) -> Proof {
    Proof::Signed(KeyName::new(name).unwrap())
}

#[test]
fn whole_corpus_parses_and_its_print_parses_to_the_same() {
    let corpus = corpus();
    assert!(corpus.len() >= 100);
    for (name, text) in corpus {
        let narinfo = parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let printed = print(&narinfo);
        let mut again = parse(&printed).unwrap();
        again.dropped_signatures = narinfo.dropped_signatures;
        assert_eq!(again, narinfo, "{name}");
        assert_canonical(&printed);
    }
}

/// Every line `Key: value` in the order of Nix, one newline at the end, nothing else.
fn assert_canonical(text: &str) {
    let order = [
        "StorePath",
        "URL",
        "Compression",
        "FileHash",
        "FileSize",
        "NarHash",
        "NarSize",
        "References",
        "Deriver",
        "Sig",
        "CA",
    ];
    assert!(text.ends_with('\n') && !text.ends_with("\n\n"), "{text:?}");
    assert!(
        !text.chars().any(|c| c.is_control() && c != '\n'),
        "{text:?}"
    );
    let names: Vec<usize> = text
        .lines()
        .map(|line| {
            line.split_once(": ")
                .unwrap_or_else(|| panic!("{line:?}"))
                .0
        })
        .map(|name| order.iter().position(|known| *known == name).unwrap())
        .collect();
    assert!(
        names.windows(2).all(|w| w[0] < w[1] || (w == [9, 9])),
        "{text}"
    );
    for required in [0, 1, 2, 5, 6, 7] {
        assert!(
            names.contains(&required),
            "no {} in {text}",
            order[required]
        );
    }
}

#[test]
fn what_nix_wrote_is_printed_byte_for_byte() {
    for (name, text) in corpus() {
        if name.starts_with("nix-2.8") || name.starts_with("cache.nixos.org") {
            assert_eq!(print(&parse(&text).unwrap()), text, "{name}");
        }
    }
}

#[test]
fn our_signatures_are_those_that_nix_made() {
    let key: SecretKey = TEST_SECRET.parse().unwrap();
    let mut signed = 0;
    for (name, text) in corpus()
        .iter()
        .filter(|(name, _)| name.starts_with("nix-2.8"))
    {
        let theirs = parse(text).unwrap();
        let mut ours = theirs.clone();
        ours.signatures.clear();
        ours.sign(&key, &StoreDir::default());
        ours.sign(&key, &StoreDir::default());
        assert_eq!(ours.signatures.len(), 1, "{name}");
        if !name.contains("unsigned") {
            assert_eq!(ours.signatures, theirs.signatures, "{name}");
            signed += 1;
        }
    }
    assert!(signed >= 30);
}

#[test]
fn narinfos_of_cache_nixos_org_verify_under_its_key() {
    let mut verified = 0;
    for (name, text) in corpus() {
        if name.starts_with("cache.nixos.org") || name.starts_with("ncps") {
            let narinfo = verify(parse(&text).unwrap(), CACHE_NIXOS_ORG).unwrap();
            assert_eq!(*narinfo.proof(), signed_by("cache.nixos.org-1"), "{name}");
            verified += 1;
        }
    }
    assert_eq!(verified, 7);
    let cachix = verify(parsed("cachix-"), NIX_COMMUNITY).unwrap();
    assert_eq!(*cachix.proof(), signed_by("nix-community.cachix.org-1"));
}

#[test]
fn recipe_of_cache_nixos_org_proves_itself_by_its_content() {
    let narinfo = parsed("cache.nixos.org-gnutls");
    assert_eq!(
        *verify(narinfo, "").unwrap().proof(),
        Proof::ContentAddressed
    );
}

#[test]
fn oddities_are_read_as_nix_reads_them() {
    let plain = parsed("nix-2.8-xz-many");
    for name in [
        "unknown-fields",
        "system-field",
        "double-spaces",
        "trailing-space-references",
        "duplicate-references",
        "unsorted-references",
        "sri-hashes",
        "base64-hash",
        "ca-empty",
        "plus-sizes",
        "sig-repeated",
        "repeated-fields-last-counts",
        "tab-after-colon",
        "any-byte-after-colon",
    ] {
        assert_eq!(parsed(&format!("handwritten-{name}")), plain, "{name}");
    }
    let odd = |name: &str| parsed(&format!("handwritten-{name}"));
    assert_eq!(odd("no-compression-line").compression, Compression::Bzip2);
    assert_eq!(odd("empty-compression").compression, Compression::Bzip2);
    assert_eq!(odd("unknown-deriver").deriver, None);
    assert_eq!(odd("no-references-line").references, BTreeSet::new());
    assert_eq!(odd("attic-zstd").file_hash, None);
    assert_eq!(odd("file-hash-sha1").file_hash, None);
    assert_eq!(odd("cachix-hex").file_hash, plain.file_hash);
    assert_eq!(odd("three-hundred-references").references.len(), 300);
    let malformed = odd("sig-malformed-among-good");
    assert_eq!(
        (&malformed.signatures, malformed.dropped_signatures),
        (&plain.signatures, 4)
    );
    assert_eq!(odd("sig-two-keys").signatures.len(), 2);
}

/// Takes a good narinfo and changes one thing.
fn edited(edit: &str) -> String {
    let good = text_of("nix-2.8-xz-many");
    let (name, line) = edit.split_once('|').unwrap_or((edit, ""));
    let kept: Vec<&str> = good
        .split_inclusive('\n')
        .filter(|l| !l.starts_with(&format!("{name}:")))
        .collect();
    format!("{}{line}", kept.concat())
}

/// Edits of a good narinfo that no Nix takes.
fn malformed() -> Vec<String> {
    let zero = "0".repeat(52);
    let plain = [
        "StorePath",
        "StorePath|StorePath: \n",
        "StorePath|StorePath: /nix/store\n",
        "StorePath|StorePath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn\n",
        "StorePath|StorePath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-\n",
        "StorePath|StorePath: nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0\n",
        "StorePath|StorePath: /gnu/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0\n",
        "StorePath|StorePath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many/refs\n",
        "StorePath|StorePath: /nix/store/ek65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0\n",
        "StorePath|StorePath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many refs\n",
        "StorePath|storepath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0\n",
        "URL",
        "URL|URL: \n",
        "URL|URL: x\nURL: \n",
        "NarHash",
        "NarHash|NarHash: \n",
        "NarHash|NarHash: sha256:\n",
        "NarHash|NarHash: sha256:xyz\n",
        "NarSize",
        "NarSize|NarSize: \n",
        "NarSize|NarSize: 0\n",
        "NarSize|NarSize: -1\n",
        "NarSize|NarSize: 1e3\n",
        "NarSize|NarSize: 0x10\n",
        "NarSize|NarSize: 5 \n",
        "NarSize|NarSize: 1.5\n",
        "NarSize|NarSize: 18446744073709551616\n",
        "FileSize|FileSize: \n",
        "FileSize|FileSize: -1\n",
        "FileSize|FileSize: many\n",
        "FileHash|FileHash: \n",
        "FileHash|FileHash: sha256:\n",
        "References|References: /nix/store/jinj7pj7i8fwi4m19k7vfqgbfxp2zif2-zero-refs-1.0\n",
        "References|References: jinj7pj7i8fwi4m19k7vfqgbfxp2zif2\n",
        "References|References:\n",
        "References|References: jinj7pj7i8fwi4m19k7vfqgbfxp2zif2-a\nReferences: jinj7pj7i8fwi4m19k7vfqgbfxp2zif2-b\n",
        "References|References: jinj7pj7i8fwi4m19k7vfqgbfxp2zif2-a\nReferences: \n",
        "Deriver|Deriver: \n",
        "Deriver|Deriver: /nix/store/474nbs8hp8xa42kgfc7k31q70cdm0ma0-many-refs-2.0.drv\n",
        "Deriver|Deriver: unknown\n",
        "CA|CA: garbage\n",
        "CA|CA: fixed:r:sha256:\n",
        "-|\n",
        "-|\n\n",
        "-|no colon\n",
        "-|no newline: at the end",
        "-|Sig:",
        "-|:",
        "-|:\n",
        "-|\r\n",
        "NarSize|NarSize: 5\r\n",
        "StorePath|StorePath: /nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0\r\n",
    ];
    let with_hash = [
        format!("NarHash|NarHash: {zero}\n"),
        format!("NarHash|NarHash: sha256:z{}\n", &zero[1..]),
        format!("NarHash|NarHash: sha256:{zero} \n"),
        format!("FileHash|FileHash: {zero}\n"),
        format!("CA|CA: text:sha256:{zero}\nCA: text:sha256:{zero}\n"),
    ];
    plain
        .into_iter()
        .map(str::to_owned)
        .chain(with_hash)
        .collect()
}

#[test]
fn malformed_narinfos_are_refused() {
    for edit in malformed() {
        assert!(parse(&edited(&edit)).is_err(), "{edit:?}");
    }
    let crlf = text_of("nix-2.8-xz-many").replace('\n', "\r\n");
    assert!(parse(&crlf).is_err());
    assert!(parse("").is_err());
}

#[test]
fn real_nix_decides_as_we_do() {
    let accepted = corpus()
        .into_iter()
        .filter(|(name, _)| !name.contains(".drv"));
    let refused = malformed()
        .into_iter()
        .map(|edit| (edit.clone(), edited(&edit)));
    for (name, text) in accepted.chain(refused) {
        let ours = parse(&text);
        assert_eq!(nix_accepts(&text), ours.is_ok(), "{name:?}: {ours:?}");
        if let Ok(narinfo) = ours {
            assert!(nix_accepts(&print(&narinfo)), "our print of {name}");
        }
    }
}

/// Asks `nix path-info` about a binary cache with this narinfo alone.
fn nix_accepts(text: &str) -> bool {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("asked-cache");
    let _ = fs::remove_dir_all(&cache);
    fs::create_dir_all(&cache).unwrap();
    let known = "/nix/store/nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0";
    let path = parse(text).map_or(known.to_owned(), |narinfo| {
        StoreDir::default().display(&narinfo.store_path)
    });
    let hash = &path["/nix/store/".len()..][..32];
    fs::write(cache.join(format!("{hash}.narinfo")), text).unwrap();
    let output = Command::new("nix")
        .args([
            "--extra-experimental-features",
            "nix-command",
            "path-info",
            "--store",
        ])
        .args([&format!("file://{}", cache.display()), &path])
        .env("HOME", &cache)
        .output()
        .expect("nix is installed");
    output.status.success()
}

/// Nix takes these; the first two would break a client further on, the last one our own promise.
#[test]
fn narinfos_that_only_some_clients_take_are_refused() {
    for (edit, says) in [
        (
            "Compression|Compression: zst\n",
            "compression of narinfo \"zst\" is unknown",
        ),
        ("URL|URL: nar/a\tb\n", "control character"),
        (
            "NarHash|NarHash: sha1:00000000000000000000000000000000\n",
            "NarHash of narinfo",
        ),
    ] {
        let error = parse(&edited(edit)).unwrap_err().to_string();
        assert!(error.contains(says), "{edit:?}: {error}");
    }
}

#[test]
fn byte_after_the_colon_is_skipped_even_within_a_character() {
    assert_eq!(parse(&edited("-|X:é\n")), parse(&edited("-|")));
    let error = parse(&edited("URL|URL:énar/x\n")).unwrap_err();
    assert_eq!(error, NarInfoError::Utf8 { field: "URL" });
    // The skipped byte may be the end of the line: then the next line is the value.
    let swallowed = parse(&edited("-|X:\nNarSize: none\n"));
    assert_eq!(swallowed, parse(&edited("-|")));
}

#[test]
fn what_is_beyond_a_limit_is_refused() {
    let long = edited(&format!("-|X: {}\n", "x".repeat(NARINFO_BYTES_MAX)));
    assert_eq!(
        parse(&long),
        Err(NarInfoError::TooLong { bytes: long.len() })
    );
    // Decimal digits are nix32 digits too.
    let reference = |i: usize| format!("{i:032}-d");
    let references = |count: usize| (0..count).map(reference).collect::<Vec<_>>().join(" ");
    let with = |count| {
        parse(&edited(&format!(
            "References|References: {}\n",
            references(count)
        )))
    };
    assert_eq!(
        with(REFERENCES_MAX).unwrap().references.len(),
        REFERENCES_MAX
    );
    assert_eq!(
        with(REFERENCES_MAX + 1),
        Err(NarInfoError::TooManyReferences)
    );
    let signature = |i: usize| {
        let name = KeyName::new(&format!("key-{i}")).unwrap();
        format!("Sig: {}\n", Signature::from_bytes(name, [7; 64]))
    };
    let with = |count| {
        parse(&edited(&format!(
            "Sig|{}",
            (0..count).map(signature).collect::<String>()
        )))
    };
    assert_eq!(
        with(SIGNATURES_MAX).unwrap().signatures.len(),
        SIGNATURES_MAX
    );
    assert_eq!(
        with(SIGNATURES_MAX + 1),
        Err(NarInfoError::TooManySignatures)
    );
}

#[test]
fn url_with_a_line_of_its_own_cannot_inject_one() {
    let mut narinfo = parsed("nix-2.8-none-zero");
    narinfo.url = "nar/x\nSig: evil-1:AAAA\r\u{85}".into();
    let text = print(&narinfo);
    assert_canonical(&text);
    assert!(
        text.contains("\nURL: nar/x%0ASig: evil-1:AAAA%0D%C2%85\n"),
        "{text}"
    );
}

#[test]
fn changing_anything_signed_breaks_the_signature() {
    let good = parsed("nix-2.8-xz-many");
    let verdict = |edit: fn(&mut NarInfo)| {
        let mut narinfo = good.clone();
        edit(&mut narinfo);
        verify(narinfo, TEST_PUBLIC).map(|verified| verified.proof().clone())
    };
    let signed = Ok(signed_by("granary-test-1"));
    assert_eq!(verdict(|_| ()), signed);
    assert_eq!(verdict(|n| n.url = "nar/elsewhere".into()), signed);
    assert_eq!(verdict(|n| n.compression = Compression::Zstd), signed);
    assert_eq!(verdict(|n| n.deriver = None), signed);
    assert_eq!(verdict(|n| n.file_hash = None), signed);
    for edit in [
        (|n| n.nar_size += 1) as fn(&mut NarInfo),
        |n| n.nar_hash = NarHash::from_bytes([0; 32]),
        |n| drop(n.references.pop_first()),
        |n| n.store_path = StorePath::new(n.store_path.hash(), "other").unwrap(),
    ] {
        assert!(matches!(
            verdict(edit),
            Err(Unverified::FalseSignatures { .. })
        ));
    }
}

#[test]
fn unverified_says_which_keys_were_seen() {
    let refused =
        |name: &str, trusted: &str| verify(parsed(name), trusted).unwrap_err().to_string();
    let path = "nk65ijbiv6iw1jh71aahg1yavd1j2nnn-many-refs-2.0";
    assert_eq!(
        refused("nix-2.8-unsigned-many", TEST_PUBLIC),
        format!("narinfo of {path} is not signed and not content-addressed")
    );
    assert_eq!(
        refused("handwritten-sig-two-keys", CACHE_NIXOS_ORG),
        format!("narinfo of {path} is signed by granary-test-1, other-1, none of them trusted")
    );
    assert!(
        refused("handwritten-nar-hash-base16-false-sig", CACHE_NIXOS_ORG)
            .ends_with("has signatures of trusted cache.nixos.org-1 that do not verify")
    );
}

#[test]
fn content_addressed_paths_need_no_signature() {
    let mut proven = 0;
    for (name, text) in corpus()
        .iter()
        .filter(|(name, _)| name.starts_with("nix-2.8-unsigned"))
    {
        let narinfo = parse(text).unwrap();
        let is_addressed = narinfo.ca.is_some();
        let verdict = verify(narinfo, TEST_PUBLIC);
        assert_eq!(verdict.is_ok(), is_addressed, "{name}");
        proven += usize::from(is_addressed);
    }
    assert!(proven >= 12);
}

#[test]
fn false_content_address_is_refused_unsigned_and_removed_signed() {
    let good = parsed("nix-2.8-xz-ca-with-refs");
    let other: ContentAddress = parsed("nix-2.8-xz-ca-self").ca.unwrap();

    let mut unsigned = NarInfo {
        ca: Some(other),
        ..good.clone()
    };
    unsigned.signatures.clear();
    let Err(Unverified::ContentAddress { source, .. }) = verify(unsigned, "") else {
        panic!("a foreign content address was believed");
    };
    assert!(matches!(*source, FalseContentAddress::Path { .. }));

    let mut other_nar = NarInfo {
        nar_hash: NarHash::from_bytes([1; 32]),
        ..good.clone()
    };
    other_nar.signatures.clear();
    let Err(Unverified::ContentAddress { source, .. }) = verify(other_nar, "") else {
        panic!("a nar that is not the content was believed");
    };
    assert!(matches!(*source, FalseContentAddress::NarHash { .. }));

    let signed = NarInfo {
        ca: Some(other),
        ..good.clone()
    };
    let verified = verify(signed, TEST_PUBLIC).unwrap();
    assert_eq!(verified.narinfo().ca, None);
    assert_eq!(
        verify(good.clone(), TEST_PUBLIC).unwrap().narinfo().ca,
        good.ca
    );
}

#[test]
fn false_signatures_under_trusted_names_are_not_passed_on() {
    let mut narinfo = parsed("handwritten-sig-two-keys");
    let good = narinfo.signatures[0].clone();
    let foreign = narinfo.signatures[1].clone();
    let mistaken = Signature::from_bytes(good.key_name().clone(), [9; 64]);
    narinfo.signatures = vec![mistaken, foreign.clone(), good.clone()];
    let verified = verify(narinfo.clone(), TEST_PUBLIC).unwrap();
    assert_eq!(verified.narinfo().signatures, [foreign, good]);
    assert_eq!(
        narinfo.drop_false_signatures(&keys(TEST_PUBLIC), &StoreDir::default()),
        1
    );
}

#[test]
fn served_narinfo_keeps_its_signature_under_the_canonical_url() {
    let served = verify(parsed("nix-2.8-xz-self"), TEST_PUBLIC)
        .unwrap()
        .served_uncompressed();
    let narinfo = served.narinfo();
    assert_eq!(narinfo.compression, Compression::None);
    assert_eq!(narinfo.file_hash, Some(FileHash::from(narinfo.nar_hash)));
    assert_eq!(narinfo.file_size, Some(narinfo.nar_size));
    let url = NarUrl::parse(&narinfo.url).unwrap();
    assert_eq!(url.store_path_hash, narinfo.store_path.hash());
    assert_eq!(url.nar_hash, Some(narinfo.nar_hash));
    let again = parse(&print(narinfo)).unwrap();
    assert_eq!(
        *verify(again, TEST_PUBLIC).unwrap().proof(),
        signed_by("granary-test-1")
    );
}

#[test]
fn loopback_signature_joins_the_original_ones() {
    let key = SecretKey::from_seed(KeyName::new("loopback-1").unwrap(), [3; 32]);
    let mut local = VerifiedNarInfo::local(parsed("nix-2.8-none-many"));
    local.sign(&key, &StoreDir::default());
    assert_eq!(
        (local.proof(), local.narinfo().signatures.len()),
        (&Proof::Local, 2)
    );
    let trusted = key.public_key().to_string();
    assert_eq!(
        *verify(local.into_narinfo(), &trusted).unwrap().proof(),
        signed_by("loopback-1")
    );
}

#[test]
fn nar_urls_of_three_kinds_of_cache_are_read() {
    let narinfo = parsed("nix-2.8-none-many");
    let (path, nar) = (narinfo.store_path.hash(), narinfo.nar_hash);
    let known = Some(NarUrl {
        store_path_hash: path,
        nar_hash: Some(nar),
    });
    assert_eq!(
        nar_url(&path, &nar),
        format!("nar/{path}-{}.nar", nar.nix32())
    );
    assert_eq!(NarUrl::parse(&nar_url(&path, &nar)), known);
    assert_eq!(
        NarUrl::parse(&parsed("handwritten-nix-serve-new-url").url),
        known
    );
    assert_eq!(
        NarUrl::parse(&parsed("handwritten-harmonia-none").url),
        known
    );
    assert_eq!(
        NarUrl::parse(&format!("{}.nar?hash={path}", nar.nix32())),
        known
    );
    let old = Some(NarUrl {
        store_path_hash: path,
        nar_hash: None,
    });
    assert_eq!(
        NarUrl::parse(&parsed("handwritten-nix-serve-old-url").url),
        old
    );
    let nar = nar.nix32();
    for url in [
        String::new(),
        "nar/".into(),
        ".nar".into(),
        format!("{path}-{nar}"),
        format!("{path}-{nar}.nar.xz"),
        format!("{nar}.nar"),
        format!("{nar}-{path}.nar"),
        format!("{path}-{nar}-x.nar"),
        format!("{path}.nar?hash={path}"),
        format!("{nar}.nar?hash={path}&x"),
        format!("{nar}.nar?Hash={path}"),
        format!("/nar/{path}-{nar}.nar"),
        format!("nar/../{path}-{nar}.nar"),
        format!("{}-{nar}.nar", path.to_string().to_uppercase()),
    ] {
        assert_eq!(NarUrl::parse(&url), None, "{url:?}");
    }
}

fn store_path() -> impl Strategy<Value = StorePath> {
    let base_name = "[0-9a-df-np-sv-z]{32}-[a-zA-Z0-9+_?=][a-zA-Z0-9+._?=-]{0,20}";
    base_name.prop_map(|text| StorePath::from_base_name(&text).unwrap())
}

fn compression() -> impl Strategy<Value = Compression> {
    const LABELS: [&str; 10] = [
        "none", "xz", "bzip2", "gzip", "zstd", "br", "lz4", "lzip", "lzma", "lrzip",
    ];
    prop::sample::select(&LABELS[..]).prop_map(|label| label.parse().unwrap())
}

prop_compose! {
    fn narinfo()(
        store_path in store_path(),
        (nar_hash, file_hash) in any::<([u8; 32], Option<[u8; 32]>)>(),
        nar_size in 1..=u64::MAX,
        references in prop::collection::btree_set(store_path(), 0..6),
        url in "[!-~][ -~é]{0,30}",
        compression in compression(),
        file_size in any::<Option<u64>>(),
        deriver in prop::option::of(store_path()),
        ca in prop::option::of("[0-9a-f]{64}".prop_map(|hex| format!("fixed:r:sha256:{hex}").parse().unwrap())),
        signatures in prop::collection::btree_set(("[a-z.]{1,9}-[0-9]", any::<[u8; 32]>()), 0..4),
    ) -> NarInfo {
        let signature = |(name, half): (String, [u8; 32])| {
            let bytes = [half, half].concat().try_into().unwrap();
            Signature::from_bytes(name.parse().unwrap(), bytes)
        };
        NarInfo {
            store_path,
            nar_hash: NarHash::from_bytes(nar_hash),
            nar_size,
            references,
            url,
            compression,
            file_hash: file_hash.map(FileHash::from_bytes),
            file_size,
            deriver,
            ca,
            signatures: signatures.into_iter().map(signature).collect(),
            dropped_signatures: 0,
        }
    }
}

proptest! {
    #[test]
    fn every_narinfo_comes_back_from_its_print(narinfo in narinfo()) {
        let text = print(&narinfo);
        assert_canonical(&text);
        prop_assert_eq!(parse(&text), Ok(narinfo));
    }

    #[test]
    fn signed_narinfo_verifies_in_any_store(mut narinfo in narinfo(), seed: [u8; 32]) {
        let dir = StoreDir::new("/tmp/other/store").unwrap();
        let key = SecretKey::from_seed(KeyName::new("k-1").unwrap(), seed);
        let trusted: TrustedKeys = [key.public_key()].into_iter().collect();
        narinfo.signatures.clear();
        narinfo.sign(&key, &dir);
        prop_assert!(VerifiedNarInfo::verify(narinfo.clone(), &trusted, &dir).is_ok());
        prop_assert!(VerifiedNarInfo::verify(narinfo, &trusted, &StoreDir::default()).is_err());
    }

    #[test]
    fn arbitrary_text_never_panics(text in "((StorePath|URL|NarHash|Sig|CA|References)?:?.{0,60}\n?){0,8}") {
        let _ = parse(&text);
        let _ = NarUrl::parse(&text);
    }

    #[test]
    fn damaged_narinfo_never_panics_and_never_prints_badly(position: prop::sample::Index, byte: u8, cut: bool) {
        let mut bytes = text_of("nix-2.8-xz-ca-with-refs").into_bytes();
        let at = position.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(if cut { at + 1 } else { bytes.len() });
        if let Ok(narinfo) = parse(&String::from_utf8_lossy(&bytes)) {
            assert_canonical(&print(&narinfo));
        }
    }
}
