//! Content addresses: the `CA` field, and the store path that follows from one.
//!
//! Most store paths are named after how they are built. A content-addressed one is named after
//! what it contains, so nobody has to sign it: recompute the path, compare. The computation is
//! `makeStorePath`, `makeTextPath` and `makeFixedOutputPath` of Nix's `libstore`.
//!
//! A path that follows from its content address proves the *claimed* content hash, not the
//! bytes: whoever receives the NAR still compares it with [`ContentAddress::nar_hash`] or, where
//! that is `None`, leaves it to Nix, which hashes the content again on import.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::hash::{Hash, HashAlgorithm, HashError, NarHash, compress_hash, excerpt, sha256};
use crate::store_path::{StoreDir, StorePath, StorePathError, StorePathHash};

/// How a store object was turned into the bytes that were hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// The content of a single file.
    Flat,
    /// The NAR of the object; in it, references to itself are blanked before hashing.
    Recursive,
    /// The object as a Git tree or blob.
    Git,
}

impl Method {
    /// Returns what stands before the hash, in `CA` and inside the computation alike.
    const fn prefix(self) -> &'static str {
        match self {
            Method::Flat => "",
            Method::Recursive => "r:",
            Method::Git => "git:",
        }
    }
}

/// What a content-addressed path is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentAddress {
    /// A text that may refer to other paths: `builtins.toFile` and every `.drv`.
    Text(Hash),
    /// An added source, a fixed-output build, or a floating content-addressed build.
    Fixed { method: Method, hash: Hash },
}

/// Why a text is no content address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ContentAddressError {
    #[error("content address {text:?} starts with neither \"text:\" nor \"fixed:\"")]
    Kind { text: String },
    #[error("hash of content address {text:?} is not valid")]
    Hash { text: String, source: HashError },
}

/// Why Nix gives no store path to a content address under a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoStorePath {
    #[error("{1:?}, addressed by {0}, cannot have references")]
    References(Box<ContentAddress>, String),
    #[error("{1:?}, addressed by {0}, cannot refer to itself")]
    SelfReference(Box<ContentAddress>, String),
    #[error("{1:?} cannot be addressed by {0}: wrong hash algorithm")]
    Algorithm(Box<ContentAddress>, String),
    #[error("{0:?} is no name for a store path")]
    Name(String, #[source] StorePathError),
}

impl ContentAddress {
    pub fn hash(&self) -> &Hash {
        match self {
            ContentAddress::Text(hash) | ContentAddress::Fixed { hash, .. } => hash,
        }
    }

    /// Returns the hash that the NAR must have, where the content address decides it alone.
    ///
    /// Only for NARs hashed whole with SHA-256: with a self-reference the hash is taken over a
    /// NAR with blanks, and flat, text and Git hashes are not over a NAR at all.
    pub fn nar_hash(&self, self_reference: bool) -> Option<NarHash> {
        match self {
            ContentAddress::Fixed {
                method: Method::Recursive,
                hash,
            } if !self_reference => NarHash::try_from(*hash).ok(),
            _ => None,
        }
    }

    /// Computes the store path that Nix gives to this content under this name.
    ///
    /// `references` are those to other paths; `self_reference` says whether there is one to the
    /// path itself, which cannot be in the set because it is what is being computed.
    ///
    /// # Errors
    /// When Nix would refuse the combination: only NARs hashed with SHA-256 and texts may have
    /// references, texts not to themselves and only with SHA-256, Git only SHA-1 or SHA-256.
    pub fn store_path(
        &self,
        dir: &StoreDir,
        name: &str,
        references: &BTreeSet<StorePath>,
        self_reference: bool,
    ) -> Result<StorePath, NoStorePath> {
        use HashAlgorithm::{Sha1, Sha256};
        let refusal = |variant: fn(Box<ContentAddress>, String) -> NoStorePath| {
            Err(variant(Box::new(*self), excerpt(name)))
        };
        let (method, hash) = match self {
            ContentAddress::Text(hash) => {
                return match hash.algorithm() {
                    _ if self_reference => refusal(NoStorePath::SelfReference),
                    Sha256 => make_path(dir, name, &kind("text", dir, references, false), hash),
                    _ => refusal(NoStorePath::Algorithm),
                };
            }
            ContentAddress::Fixed { method, hash } => (*method, hash),
        };
        match (method, hash.algorithm()) {
            (Method::Recursive, Sha256) => make_path(
                dir,
                name,
                &kind("source", dir, references, self_reference),
                hash,
            ),
            _ if self_reference => refusal(NoStorePath::SelfReference),
            _ if !references.is_empty() => refusal(NoStorePath::References),
            (Method::Git, algorithm) if !matches!(algorithm, Sha1 | Sha256) => {
                refusal(NoStorePath::Algorithm)
            }
            _ => {
                let inner = format!("fixed:out:{}{}:", method.prefix(), hash.to_base16());
                make_path(
                    dir,
                    name,
                    "output:out",
                    &Hash::sha256(sha256(inner.as_bytes())),
                )
            }
        }
    }
}

/// Nix's `makeStorePath`.
fn make_path(
    dir: &StoreDir,
    name: &str,
    kind: &str,
    hash: &Hash,
) -> Result<StorePath, NoStorePath> {
    let preimage = format!("{kind}:{}:{dir}:{name}", hash.to_base16());
    let digest = compress_hash(&sha256(preimage.as_bytes()));
    StorePath::new(StorePathHash::from_bytes(digest), name)
        .map_err(|source| NoStorePath::Name(excerpt(name), source))
}

/// Nix's `makeType`: the kind of path, followed by what it refers to.
fn kind(
    base: &str,
    dir: &StoreDir,
    references: &BTreeSet<StorePath>,
    self_reference: bool,
) -> String {
    let mut kind = base.to_owned();
    for reference in references {
        kind.push(':');
        kind.push_str(&dir.display(reference));
    }
    if self_reference {
        kind.push_str(":self");
    }
    kind
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ContentAddress::Text(hash) => write!(f, "text:{hash}"),
            ContentAddress::Fixed { method, hash } => write!(f, "fixed:{}{hash}", method.prefix()),
        }
    }
}

impl FromStr for ContentAddress {
    type Err = ContentAddressError;

    /// Reads `text:…`, `fixed:…`, `fixed:r:…` or `fixed:git:…`, each followed by `algorithm:digest`.
    ///
    /// The digest may be in any base, but not SRI: Nix reads no dash here.
    fn from_str(text: &str) -> Result<Self, ContentAddressError> {
        let hash = |rest: &str| match rest.parse::<Hash>() {
            Ok(hash) if rest.contains(':') => Ok(hash),
            Ok(_) => Err(ContentAddressError::Hash {
                text: excerpt(text),
                source: HashError::AlgorithmMissing {
                    text: excerpt(rest),
                },
            }),
            Err(source) => Err(ContentAddressError::Hash {
                text: excerpt(text),
                source,
            }),
        };
        if let Some(rest) = text.strip_prefix("text:") {
            return Ok(ContentAddress::Text(hash(rest)?));
        }
        let Some(rest) = text.strip_prefix("fixed:") else {
            return Err(ContentAddressError::Kind {
                text: excerpt(text),
            });
        };
        let (method, rest) = if let Some(rest) = rest.strip_prefix(Method::Recursive.prefix()) {
            (Method::Recursive, rest)
        } else if let Some(rest) = rest.strip_prefix(Method::Git.prefix()) {
            (Method::Git, rest)
        } else {
            (Method::Flat, rest)
        };
        Ok(ContentAddress::Fixed {
            method,
            hash: hash(rest)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: &str = "sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s";
    const SHA1: &str = "sha1:1rgdy0rzwvg7ghj3kyhmcph6qcyjxkfh";

    fn address(text: String) -> ContentAddress {
        text.parse().unwrap()
    }

    fn path(text: &str) -> StorePath {
        StorePath::from_base_name(text).unwrap()
    }

    #[test]
    fn every_kind_prints_as_it_was_read() {
        for text in [
            format!("text:{SHA256}"),
            format!("fixed:{SHA256}"),
            format!("fixed:r:{SHA256}"),
            format!("fixed:git:{SHA1}"),
        ] {
            assert_eq!(address(text.clone()).to_string(), text);
        }
    }

    #[test]
    fn other_bases_are_read_and_printed_as_nix32() {
        let hash: Hash = SHA256.parse().unwrap();
        for digest in [hash.to_base16(), hash.to_base64()] {
            assert_eq!(
                address(format!("fixed:r:{digest}")).to_string(),
                format!("fixed:r:{SHA256}")
            );
        }
    }

    #[test]
    fn malformed_addresses_are_refused() {
        let sri = SHA256.parse::<Hash>().unwrap().to_sri();
        for text in [
            "".to_owned(),
            "text".into(),
            SHA256.into(),
            format!("text:r:{SHA256}"),
            format!("fixed:r:git:{SHA256}"),
            format!("fixed:x:{SHA256}"),
            format!("Fixed:{SHA256}"),
            format!("fixed:{SHA256} "),
            format!("fixed:{sri}"),
            "fixed:sha256".into(),
            "fixed:sha256:".into(),
            "fixed:md5:xyz".into(),
        ] {
            assert!(text.parse::<ContentAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn combinations_that_nix_refuses_have_no_path() {
        let (dir, none) = (StoreDir::default(), BTreeSet::new());
        let some = BTreeSet::from([path("w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10")]);
        let sha512 = Hash::new(HashAlgorithm::Sha512, &[0; 64]).unwrap();
        let refused = |text: String, references, self_reference| {
            assert!(
                address(text.clone())
                    .store_path(&dir, "x", references, self_reference)
                    .is_err(),
                "{text}"
            );
        };
        refused(format!("text:{SHA1}"), &none, false);
        refused(format!("text:{SHA256}"), &none, true);
        refused(format!("fixed:{SHA256}"), &some, false);
        refused(format!("fixed:{SHA256}"), &none, true);
        refused(format!("fixed:r:{SHA1}"), &some, false);
        refused(format!("fixed:r:{SHA1}"), &none, true);
        refused(format!("fixed:git:{SHA1}"), &some, false);
        refused(format!("fixed:git:{sha512}"), &none, false);
        assert!(
            address(format!("fixed:{SHA256}"))
                .store_path(&dir, "a b", &none, false)
                .is_err()
        );
    }

    #[test]
    fn only_a_whole_nar_pins_the_nar_hash() {
        let pinned = |text: String, self_reference| {
            address(text)
                .nar_hash(self_reference)
                .map(|h| h.to_string())
        };
        assert_eq!(
            pinned(format!("fixed:r:{SHA256}"), false).as_deref(),
            Some(SHA256)
        );
        assert_eq!(pinned(format!("fixed:r:{SHA256}"), true), None);
        assert_eq!(pinned(format!("fixed:r:{SHA1}"), false), None);
        assert_eq!(pinned(format!("fixed:{SHA256}"), false), None);
        assert_eq!(pinned(format!("text:{SHA256}"), false), None);
    }
}
