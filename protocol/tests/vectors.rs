//! What the real Nix printed, computed again.
//!
//! `vectors/generate.sh` made the files with Nix 2.8.0 in a mount namespace of its own; its line
//! formats are described where they are read.

use std::collections::BTreeSet;

use granary_protocol::content_address::ContentAddress;
use granary_protocol::hash::{Hash, HashAlgorithm, sha256};
use granary_protocol::signature::{PublicKey, SecretKey};
use granary_protocol::store_path::{StoreDir, StorePath};

const HASHES: &str = include_str!("vectors/hashes.txt");
const CONTENT_ADDRESSES: &str = include_str!("vectors/content-addresses.txt");
const FIXED_PATHS: &str = include_str!("vectors/fixed-paths.txt");
const SECRET_KEY: &str = include_str!("vectors/secret-key");
const PUBLIC_KEY: &str = include_str!("vectors/public-key");

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// Lines of `algorithm base16 base32 base64 sri`, from `nix hash to-…`.
#[test]
fn every_base_of_every_algorithm_is_what_nix_hash_prints() {
    for line in HASHES.lines() {
        let [name, base16, nix32, base64, sri] = words(line)[..] else {
            panic!("{line}");
        };
        let algorithm: HashAlgorithm = name.parse().unwrap();
        let hash = Hash::parse_as(algorithm, base16).unwrap();
        assert_eq!(hash.to_base16(), format!("{name}:{base16}"));
        assert_eq!(hash.to_nix32(), format!("{name}:{nix32}"));
        assert_eq!(hash.to_base64(), format!("{name}:{base64}"));
        assert_eq!(hash.to_sri(), sri);
        for text in [base16, nix32, base64, sri] {
            assert_eq!(Hash::parse_as(algorithm, text), Ok(hash), "{text}");
        }
    }
    assert_eq!(HASHES.lines().count(), 12);
    assert!(HASHES.contains(Hash::sha256(sha256(b"hello\n")).to_sri().as_str()));
}

/// Lines of `ca path reference…`, from `nix path-info --json` of built and added paths.
#[test]
fn store_paths_follow_from_content_as_nix_computes_them() {
    let dir = StoreDir::default();
    let (mut with_references, mut with_self) = (0, 0);
    for line in CONTENT_ADDRESSES.lines() {
        let (ca, paths) = line.split_once(' ').unwrap();
        let content_address: ContentAddress = ca.parse().unwrap();
        let mut paths = paths.split(' ').map(|path| dir.parse_path(path).unwrap());
        let path = paths.next().unwrap();
        let mut references: BTreeSet<StorePath> = paths.collect();
        let self_reference = references.remove(&path);
        with_references += usize::from(!references.is_empty());
        with_self += usize::from(self_reference);
        let computed = content_address.store_path(&dir, path.name(), &references, self_reference);
        assert_eq!(computed.as_ref(), Ok(&path), "{line}");
        assert_eq!(content_address.to_string(), ca);
    }
    assert!(with_references >= 3 && with_self >= 1);
}

/// Lines of `ca path`, from `nix-store --print-fixed-path` for all algorithms and odd names.
#[test]
fn fixed_output_paths_are_those_that_nix_predicts() {
    let dir = StoreDir::default();
    for line in FIXED_PATHS.lines() {
        let [ca, path] = words(line)[..] else {
            panic!("{line}");
        };
        let path = dir.parse_path(path).unwrap();
        let content_address: ContentAddress = ca.parse().unwrap();
        let computed = content_address.store_path(&dir, path.name(), &BTreeSet::new(), false);
        assert_eq!(computed, Ok(path), "{line}");
    }
    assert_eq!(FIXED_PATHS.lines().count(), 24);
}

#[test]
fn other_store_directories_give_other_paths() {
    let ca: ContentAddress = FIXED_PATHS
        .lines()
        .next()
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let path = |dir: &str| {
        ca.store_path(&StoreDir::new(dir).unwrap(), "x", &BTreeSet::new(), false)
            .unwrap()
    };
    assert_ne!(path("/nix/store"), path("/gnu/store"));
}

/// Files of `nix-store --generate-binary-cache-key`.
#[test]
fn key_pair_of_nix_is_read_and_written_unchanged() {
    let secret: SecretKey = SECRET_KEY.parse().unwrap();
    let public: PublicKey = PUBLIC_KEY.parse().unwrap();
    assert_eq!(secret.to_nix_string().as_str(), SECRET_KEY.trim_end());
    assert_eq!(public.to_string(), PUBLIC_KEY.trim_end());
    assert_eq!(secret.public_key(), public);
}
