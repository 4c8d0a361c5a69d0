//! Digests as Nix writes them, and the two that a narinfo promises.
//!
//! [`struct@Hash`] is any digest that Nix can name; content addresses need all four algorithms.
//! [`NarHash`] (of the uncompressed NAR) and [`FileHash`] (of the file as it lies in a cache) are
//! always SHA-256 and never interchangeable: only the first is covered by signatures.
//! Forms follow `libutil/hash.cc`: `algorithm:digest` with the digest in nix32, base-16 or
//! base-64, told apart by length, and the web's SRI `algorithm-base64`.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64, BASE64_NOPAD, HEXLOWER, HEXLOWER_PERMISSIVE};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::nix32;

/// Bytes of the longest digest, SHA-512.
const DIGEST_BYTES_MAX: usize = 64;

/// What an error message shows at most of a text it complains about, in characters.
const EXCERPT_CHARS_MAX: usize = 80;

/// The algorithms that every version of Nix knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HashAlgorithm {
    Md5,
    Sha1,
    Sha256,
    Sha512,
}

impl HashAlgorithm {
    /// Returns the name as it stands before a digest.
    pub const fn name(self) -> &'static str {
        match self {
            HashAlgorithm::Md5 => "md5",
            HashAlgorithm::Sha1 => "sha1",
            HashAlgorithm::Sha256 => "sha256",
            HashAlgorithm::Sha512 => "sha512",
        }
    }

    /// Returns the length of a digest in bytes.
    pub const fn digest_len(self) -> usize {
        match self {
            HashAlgorithm::Md5 => 16,
            HashAlgorithm::Sha1 => 20,
            HashAlgorithm::Sha256 => 32,
            HashAlgorithm::Sha512 => 64,
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HashAlgorithm {
    type Err = HashError;

    fn from_str(name: &str) -> Result<Self, HashError> {
        match name {
            "md5" => Ok(HashAlgorithm::Md5),
            "sha1" => Ok(HashAlgorithm::Sha1),
            "sha256" => Ok(HashAlgorithm::Sha256),
            "sha512" => Ok(HashAlgorithm::Sha512),
            _ => Err(HashError::Algorithm {
                name: excerpt(name),
            }),
        }
    }
}

/// Why a text is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HashError {
    #[error("hash algorithm {name:?} is none of md5, sha1, sha256, sha512")]
    Algorithm { name: String },
    #[error("hash {text:?} does not say its algorithm")]
    AlgorithmMissing { text: String },
    #[error("hash {text:?} is {found}, expected {expected}")]
    OtherAlgorithm {
        text: String,
        expected: HashAlgorithm,
        found: HashAlgorithm,
    },
    #[error("{algorithm} digest {text:?} has {length} characters, which is no form of it")]
    Length {
        algorithm: HashAlgorithm,
        text: String,
        length: usize,
    },
    #[error("{algorithm} digest {text:?} is not valid nix32")]
    Nix32 {
        algorithm: HashAlgorithm,
        text: String,
        source: nix32::Nix32Error,
    },
    #[error("{algorithm} digest {text:?} is not valid base-16 or base-64")]
    Encoding {
        algorithm: HashAlgorithm,
        text: String,
        source: data_encoding::DecodeError,
    },
}

/// A digest together with its algorithm. `Display` is [`Hash::to_nix32`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash {
    algorithm: HashAlgorithm,
    /// Zero beyond the digest, so that derived comparison is comparison of digests.
    bytes: [u8; DIGEST_BYTES_MAX],
}

impl Hash {
    /// Wraps a digest; `None` when its length is not the algorithm's.
    pub fn new(algorithm: HashAlgorithm, digest: &[u8]) -> Option<Hash> {
        let mut bytes = [0; DIGEST_BYTES_MAX];
        (digest.len() == algorithm.digest_len()).then(|| {
            bytes[..digest.len()].copy_from_slice(digest);
            Hash { algorithm, bytes }
        })
    }

    /// Wraps a SHA-256 digest.
    pub fn sha256(digest: [u8; 32]) -> Hash {
        let mut bytes = [0; DIGEST_BYTES_MAX];
        bytes[..32].copy_from_slice(&digest);
        Hash {
            algorithm: HashAlgorithm::Sha256,
            bytes,
        }
    }

    /// Reads any form, with the algorithm in the text or taken from the caller.
    ///
    /// # Errors
    /// [`HashError::OtherAlgorithm`] when the text names another one than expected.
    pub fn parse_as(expected: HashAlgorithm, text: &str) -> Result<Hash, HashError> {
        if !text.contains([':', '-']) {
            return parse_digest(expected, text);
        }
        let hash: Hash = text.parse()?;
        if hash.algorithm != expected {
            return Err(HashError::OtherAlgorithm {
                text: excerpt(text),
                expected,
                found: hash.algorithm,
            });
        }
        Ok(hash)
    }

    pub fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    pub fn digest(&self) -> &[u8] {
        &self.bytes[..self.algorithm.digest_len()]
    }

    /// Returns `algorithm:nix32`.
    pub fn to_nix32(&self) -> String {
        format!("{}:{}", self.algorithm, nix32::encode(self.digest()))
    }

    /// Returns `algorithm:hex`, in lower case.
    pub fn to_base16(&self) -> String {
        format!("{}:{}", self.algorithm, HEXLOWER.encode(self.digest()))
    }

    /// Returns `algorithm:base64`.
    pub fn to_base64(&self) -> String {
        format!("{}:{}", self.algorithm, BASE64.encode(self.digest()))
    }

    /// Returns `algorithm-base64`, as in a web page's `integrity`.
    pub fn to_sri(&self) -> String {
        format!("{}-{}", self.algorithm, BASE64.encode(self.digest()))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_nix32())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl FromStr for Hash {
    type Err = HashError;

    /// Reads `algorithm:digest` in any base, or SRI; a bare digest is refused.
    fn from_str(text: &str) -> Result<Hash, HashError> {
        if let Some((name, digest)) = text.split_once(':') {
            return parse_digest(name.parse()?, digest);
        }
        let Some((name, digest)) = text.split_once('-') else {
            return Err(HashError::AlgorithmMissing {
                text: excerpt(text),
            });
        };
        let algorithm = name.parse()?;
        let base64 = base64_len(algorithm);
        if digest.len() != base64
            && digest.trim_end_matches('=').len() != base64_unpadded_len(algorithm)
        {
            return Err(HashError::Length {
                algorithm,
                text: excerpt(digest),
                length: digest.len(),
            });
        }
        parse_base64(algorithm, digest)
    }
}

/// Tells the base by the length, which differs for every algorithm.
fn parse_digest(algorithm: HashAlgorithm, text: &str) -> Result<Hash, HashError> {
    let length = text.len();
    if length == nix32::encoded_len(algorithm.digest_len()) {
        let mut hash = Hash {
            algorithm,
            bytes: [0; DIGEST_BYTES_MAX],
        };
        nix32::decode_into(text, &mut hash.bytes[..algorithm.digest_len()]).map_err(|source| {
            HashError::Nix32 {
                algorithm,
                text: excerpt(text),
                source,
            }
        })?;
        Ok(hash)
    } else if length == algorithm.digest_len() * 2 {
        from_decoded(algorithm, text, HEXLOWER_PERMISSIVE.decode(text.as_bytes()))
    } else if length == base64_len(algorithm) {
        parse_base64(algorithm, text)
    } else {
        Err(HashError::Length {
            algorithm,
            text: excerpt(text),
            length,
        })
    }
}

/// Reads base-64 with its padding; SRI in the wild also comes without.
fn parse_base64(algorithm: HashAlgorithm, text: &str) -> Result<Hash, HashError> {
    let base = if text.len() == base64_len(algorithm) {
        BASE64
    } else {
        BASE64_NOPAD
    };
    from_decoded(algorithm, text, base.decode(text.as_bytes()))
}

fn from_decoded(
    algorithm: HashAlgorithm,
    text: &str,
    decoded: Result<Vec<u8>, data_encoding::DecodeError>,
) -> Result<Hash, HashError> {
    let digest = decoded.map_err(|source| HashError::Encoding {
        algorithm,
        text: excerpt(text),
        source,
    })?;
    Hash::new(algorithm, &digest).ok_or(HashError::Length {
        algorithm,
        text: excerpt(text),
        length: text.len(),
    })
}

const fn base64_len(algorithm: HashAlgorithm) -> usize {
    algorithm.digest_len().div_ceil(3) * 4
}

const fn base64_unpadded_len(algorithm: HashAlgorithm) -> usize {
    (algorithm.digest_len() * 4).div_ceil(3)
}

/// Defines one of the two SHA-256 newtypes; they share every line except their meaning.
macro_rules! sha256_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// Returns the 52 characters without `sha256:`.
            pub fn nix32(&self) -> String {
                nix32::encode(&self.0)
            }

            /// Reads the 52 characters that [`Self::nix32`] writes.
            pub fn from_nix32(text: &str) -> Result<Self, HashError> {
                let mut bytes = [0; 32];
                nix32::decode_into(text, &mut bytes).map_err(|source| HashError::Nix32 {
                    algorithm: HashAlgorithm::Sha256,
                    text: excerpt(text),
                    source,
                })?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<Hash> for $name {
            type Error = HashError;

            fn try_from(hash: Hash) -> Result<Self, HashError> {
                match <[u8; 32]>::try_from(hash.digest()) {
                    Ok(bytes) if hash.algorithm == HashAlgorithm::Sha256 => Ok(Self(bytes)),
                    _ => Err(HashError::OtherAlgorithm {
                        text: hash.to_nix32(),
                        expected: HashAlgorithm::Sha256,
                        found: hash.algorithm,
                    }),
                }
            }
        }

        impl From<$name> for Hash {
            fn from(hash: $name) -> Hash {
                Hash::sha256(hash.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "sha256:{}", self.nix32())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.nix32())
            }
        }

        impl FromStr for $name {
            type Err = HashError;

            /// Reads any form of a SHA-256 digest, bare ones included.
            fn from_str(text: &str) -> Result<Self, HashError> {
                Hash::parse_as(HashAlgorithm::Sha256, text)?.try_into()
            }
        }
    };
}

sha256_newtype! {
    /// SHA-256 of the uncompressed NAR of a store path: what signatures promise.
    NarHash
}

sha256_newtype! {
    /// SHA-256 of the file a cache serves, compressed or not: a name, never a proof.
    FileHash
}

impl From<NarHash> for FileHash {
    /// The file of an uncompressed NAR is that NAR.
    fn from(hash: NarHash) -> FileHash {
        FileHash(hash.0)
    }
}

/// Hashes a NAR as it streams by.
#[derive(Debug, Clone, Default)]
pub struct NarHasher(Sha256);

impl NarHasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> NarHash {
        NarHash(self.0.finalize().into())
    }
}

/// Hashes a file of a cache as it streams by.
#[derive(Debug, Clone, Default)]
pub struct FileHasher(Sha256);

impl FileHasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> FileHash {
        FileHash(self.0.finalize().into())
    }
}

/// Returns the SHA-256 of bytes at hand.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Folds a digest to the 20 bytes of a store path hash by XOR, as Nix's `compressHash` does.
pub fn compress_hash(digest: &[u8]) -> [u8; 20] {
    let mut folded = [0; 20];
    for (position, byte) in digest.iter().enumerate() {
        folded[position % 20] ^= byte;
    }
    folded
}

/// Cuts a text for an error message: what a peer sends must not fill the log.
pub(crate) fn excerpt(text: &str) -> String {
    match text.char_indices().nth(EXCERPT_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EMPTY_SHA256: &str = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    fn refusal(text: &str) -> String {
        text.parse::<Hash>().expect_err(text).to_string()
    }

    #[test]
    fn streamed_and_whole_input_have_one_hash() {
        let mut hasher = NarHasher::new();
        let empty = hasher.clone().finish();
        hasher.update(b"gra");
        hasher.update(b"nary");
        assert_eq!(empty.to_string(), EMPTY_SHA256);
        assert_eq!(hasher.finish(), NarHash::from_bytes(sha256(b"granary")));
    }

    #[test]
    fn bare_digest_needs_a_known_algorithm() {
        let bare = &EMPTY_SHA256["sha256:".len()..];
        assert_eq!(
            Hash::parse_as(HashAlgorithm::Sha256, bare)
                .unwrap()
                .to_nix32(),
            EMPTY_SHA256
        );
        assert_eq!(bare.parse::<NarHash>().unwrap().nix32(), bare);
        assert!(refusal(bare).contains("does not say its algorithm"));
    }

    #[test]
    fn sri_is_read_with_and_without_padding() {
        let sri = EMPTY_SHA256.parse::<Hash>().unwrap().to_sri();
        assert_eq!(sri, "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        assert_eq!(
            sri.trim_end_matches('=').parse::<Hash>().unwrap().to_sri(),
            sri
        );
    }

    #[test]
    fn malformed_hashes_are_refused_with_their_text() {
        for (text, says) in [
            ("", "does not say its algorithm"),
            (":", "\"\" is none of"),
            ("blake3:00", "\"blake3\" is none of"),
            ("SHA256:00", "\"SHA256\" is none of"),
            ("sha256:", "has 0 characters"),
            ("sha256:0", "has 1 characters"),
            (
                "sha256-0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
                "has 52 characters",
            ),
            (
                "sha256:zmdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
                "not valid nix32",
            ),
            (
                "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c7e",
                "not valid nix32",
            ),
            (
                "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFV=",
                "not valid base-16 or base-64",
            ),
            (
                "sha1:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
                "sha1 digest",
            ),
        ] {
            assert!(refusal(text).contains(says), "{text:?}: {}", refusal(text));
        }
    }

    #[test]
    fn other_algorithms_are_no_nar_hash() {
        let sha1 = Hash::new(HashAlgorithm::Sha1, &[7; 20]).unwrap();
        assert!(matches!(
            sha1.to_base16().parse::<NarHash>(),
            Err(HashError::OtherAlgorithm {
                found: HashAlgorithm::Sha1,
                ..
            })
        ));
        assert!(NarHash::try_from(sha1).is_err());
    }

    #[test]
    fn error_shows_an_excerpt_of_endless_text() {
        let message = refusal(&format!("sha256:{}", "é".repeat(100_000)));
        assert!(message.len() < 400, "{} bytes", message.len());
    }

    #[test]
    fn folding_wraps_around_at_twenty_bytes() {
        let mut digest = [0; 32];
        (digest[0], digest[20], digest[31]) = (0b01, 0b11, 0xff);
        let folded = compress_hash(&digest);
        assert_eq!((folded[0], folded[11]), (0b10, 0xff));
    }

    proptest! {
        #[test]
        fn every_form_of_every_algorithm_comes_back(bytes: [u8; 32], more: [u8; 32]) {
            use HashAlgorithm::*;
            let bytes = [bytes, more].concat();
            for algorithm in [Md5, Sha1, Sha256, Sha512] {
                let hash = Hash::new(algorithm, &bytes[..algorithm.digest_len()]).unwrap();
                for text in [hash.to_nix32(), hash.to_base16(), hash.to_base64(), hash.to_sri()] {
                    prop_assert_eq!(text.parse::<Hash>(), Ok(hash));
                    prop_assert_eq!(Hash::parse_as(algorithm, &text), Ok(hash));
                    if let Some((_, bare)) = text.split_once(':') {
                        prop_assert_eq!(Hash::parse_as(algorithm, bare), Ok(hash));
                    }
                }
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in "((md5|sha1|sha256|sha512)[:-])?.{0,140}") {
            let _ = text.parse::<Hash>();
            let _ = text.parse::<NarHash>();
        }
    }
}
