//! Store paths: `/nix/store/<32 characters>-<name>`.
//!
//! A [`StorePath`] is the base name, without its store; a [`StoreDir`] turns it into a full path
//! and back. Caches, signatures and peers find a path by its [`StorePathHash`] alone.
//! Grammar: Nix manual, protocols/store-path, and `libstore/path.cc` (`checkName`).

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::hash::excerpt;
use crate::nix32::{self, Nix32Error};

/// Characters of the hash in front of a name.
pub const STORE_PATH_HASH_CHARS: usize = 32;

/// Longest name that Nix accepts: a file name of 255 bytes less the hash, the dash and suffixes
/// such as `.lock`.
pub const NAME_CHARS_MAX: usize = 211;

/// Longest store directory we take; far above any real one, far below a Unix path's 4,096.
const STORE_DIR_BYTES_MAX: usize = 1024;

/// Why a text is not a store path.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StorePathError {
    #[error("{text:?} is too short to be a store path")]
    TooShort { text: String },
    #[error("hash of store path {text:?} is not valid")]
    Hash { text: String, source: Nix32Error },
    #[error("store path {text:?} has no dash after its hash")]
    Dash { text: String },
    #[error("name of store path {text:?} is longer than {NAME_CHARS_MAX} characters")]
    NameTooLong { text: String },
    #[error("name of store path {text:?} contains {character:?}")]
    NameCharacter { text: String, character: char },
    #[error("name of store path {text:?} has \".\" or \"..\" before its first dash")]
    NameDots { text: String },
    #[error("{text:?} is not directly in the store {store_dir}")]
    OutsideStore { text: String, store_dir: StoreDir },
    #[error("store directory {text:?} is not a clean absolute path")]
    StoreDir { text: String },
}

/// The directory that holds all store paths. The default is `/nix/store`.
///
/// Absolute, without empty, `.` or `..` components, without control characters and without a
/// final slash, so that `dir + "/" + base name` is the one spelling of a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreDir(Box<str>);

impl StoreDir {
    /// Checks a store directory, for example from a configuration file.
    ///
    /// # Errors
    /// [`StorePathError::StoreDir`] when it is not clean; nothing is repaired silently.
    pub fn new(text: &str) -> Result<StoreDir, StorePathError> {
        let is_component =
            |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
        match text.strip_prefix('/') {
            Some(rest)
                if text.len() <= STORE_DIR_BYTES_MAX && rest.split('/').all(is_component) =>
            {
                Ok(StoreDir(text.into()))
            }
            _ => Err(StorePathError::StoreDir {
                text: excerpt(text),
            }),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads a full path that lies directly in this store.
    pub fn parse_path(&self, text: &str) -> Result<StorePath, StorePathError> {
        let outside = || StorePathError::OutsideStore {
            text: excerpt(text),
            store_dir: self.clone(),
        };
        let rest = text.strip_prefix(self.as_str()).ok_or_else(outside)?;
        StorePath::from_base_name(rest.strip_prefix('/').ok_or_else(outside)?)
    }

    /// Returns the full path.
    pub fn display(&self, path: &StorePath) -> String {
        format!("{self}/{path}")
    }
}

impl Default for StoreDir {
    fn default() -> Self {
        StoreDir("/nix/store".into())
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for StoreDir {
    type Err = StorePathError;

    fn from_str(text: &str) -> Result<Self, StorePathError> {
        StoreDir::new(text)
    }
}

/// The hash in a store path: what a path is looked up by. Sorts like its text.
///
/// It is a digest of how the path was made, not of its content, except for
/// [content-addressed](crate::content_address) paths.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StorePathHash([u8; 20]);

impl StorePathHash {
    pub const fn from_bytes(bytes: [u8; 20]) -> Self {
        StorePathHash(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }
}

impl Ord for StorePathHash {
    /// Nix32 writes the last byte first.
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.iter().rev().cmp(other.0.iter().rev())
    }
}

impl PartialOrd for StorePathHash {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&nix32::encode(&self.0))
    }
}

impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePathHash({self})")
    }
}

impl FromStr for StorePathHash {
    type Err = StorePathError;

    /// Reads the 32 characters before the dash.
    fn from_str(text: &str) -> Result<Self, StorePathError> {
        let mut bytes = [0; 20];
        nix32::decode_into(text, &mut bytes).map_err(|source| StorePathError::Hash {
            text: excerpt(text),
            source,
        })?;
        Ok(StorePathHash(bytes))
    }
}

/// One path of a store, without the store's directory. `Display` and order are the base name's.
///
/// The name is 1 to 211 of `0-9 a-z A-Z + - . _ ? =` and its part before the first dash is
/// neither `.` nor `..`. Other leading dots are accepted as current Nix does; several releases
/// before 2.21 refuse them all, and such paths do not occur in their stores.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath {
    // The order of fields is the order of base names: hashes have one length.
    hash: StorePathHash,
    name: Box<str>,
}

impl StorePath {
    /// Joins a hash and a name.
    ///
    /// # Errors
    /// When the name breaks the grammar above.
    pub fn new(hash: StorePathHash, name: &str) -> Result<StorePath, StorePathError> {
        check_name(name, name)?;
        Ok(StorePath {
            hash,
            name: name.into(),
        })
    }

    /// Reads `<hash>-<name>`, as in a narinfo's `References`.
    pub fn from_base_name(text: &str) -> Result<StorePath, StorePathError> {
        let Some((hash, rest)) = text.split_at_checked(STORE_PATH_HASH_CHARS) else {
            return Err(StorePathError::TooShort {
                text: excerpt(text),
            });
        };
        let mut bytes = [0; 20];
        nix32::decode_into(hash, &mut bytes).map_err(|source| StorePathError::Hash {
            text: excerpt(text),
            source,
        })?;
        let name = match rest.strip_prefix('-') {
            Some(name) => name,
            None if rest.is_empty() => {
                return Err(StorePathError::TooShort {
                    text: excerpt(text),
                });
            }
            None => {
                return Err(StorePathError::Dash {
                    text: excerpt(text),
                });
            }
        };
        check_name(text, name)?;
        Ok(StorePath {
            hash: StorePathHash(bytes),
            name: name.into(),
        })
    }

    /// Returns `<hash>-<name>`.
    pub fn base_name(&self) -> String {
        self.to_string()
    }

    pub fn hash(&self) -> StorePathHash {
        self.hash
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says whether this is a build recipe rather than something built.
    pub fn is_derivation(&self) -> bool {
        self.name.ends_with(".drv")
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.hash, self.name)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePath({self})")
    }
}

impl FromStr for StorePath {
    type Err = StorePathError;

    /// Reads a base name; full paths go through [`StoreDir::parse_path`].
    fn from_str(text: &str) -> Result<Self, StorePathError> {
        StorePath::from_base_name(text)
    }
}

/// Checks a name and complains about the text it was found in.
fn check_name(text: &str, name: &str) -> Result<(), StorePathError> {
    let text = || excerpt(text);
    if name.is_empty() {
        return Err(StorePathError::TooShort { text: text() });
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "+-._?=".contains(c);
    if let Some(character) = name.chars().find(|c| !is_allowed(*c)) {
        return Err(StorePathError::NameCharacter {
            text: text(),
            character,
        });
    }
    if name.len() > NAME_CHARS_MAX {
        return Err(StorePathError::NameTooLong { text: text() });
    }
    if matches!(name.split('-').next(), Some("." | "..")) {
        return Err(StorePathError::NameDots { text: text() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HASH: &str = "w9yy7v61ipb5rx6i35zq1mvc2iqfmps1";

    fn named(name: &str) -> Result<StorePath, StorePathError> {
        StorePath::from_base_name(&format!("{HASH}-{name}"))
    }

    #[test]
    fn full_path_comes_apart_and_together() {
        let dir = StoreDir::default();
        let path = dir
            .parse_path("/nix/store/w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10")
            .unwrap();
        assert_eq!(
            (path.hash().to_string().as_str(), path.name()),
            (HASH, "hello-2.10")
        );
        assert_eq!(
            dir.display(&path),
            "/nix/store/w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello-2.10"
        );
        assert!(!path.is_derivation() && named("hello-2.10.drv").unwrap().is_derivation());
    }

    #[test]
    fn unusual_names_of_the_wild_are_accepted() {
        let longest = "x".repeat(NAME_CHARS_MAX);
        for name in [
            "a",
            "-",
            "a?b=c+d_e.f-g",
            ".gitignore",
            "...",
            "..a",
            "gtk+-2.24.33",
            longest.as_str(),
        ] {
            assert_eq!(named(name).unwrap().name(), name);
        }
    }

    #[test]
    fn broken_names_are_refused() {
        let too_long = "x".repeat(NAME_CHARS_MAX + 1);
        for name in [
            "",
            ".",
            "..",
            ".-a",
            "..-a",
            "a b",
            "a/b",
            "a\nb",
            "a\0",
            "é",
            "a:b",
            "a,b",
            "a;b",
            too_long.as_str(),
        ] {
            assert!(named(name).is_err(), "{name:?}");
            assert!(
                StorePath::new(StorePathHash::from_bytes([0; 20]), name).is_err(),
                "{name:?}"
            );
        }
    }

    #[test]
    fn broken_base_names_are_refused() {
        for text in [
            "",
            "x",
            HASH,
            "w9yy7v61ipb5rx6i35zq1mvc2iqfmps1-",
            "w9yy7v61ipb5rx6i35zq1mvc2iqfmps1_hello",
            "w9yy7v61ipb5rx6i35zq1mvc2iqfmps-hello",
            "e9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello",
            "W9yy7v61ipb5rx6i35zq1mvc2iqfmps1-hello",
            "éééééééééééééééé-hello",
            "9yy7v61ipb5rx6i35zq1mvc2iqfmps1éhello",
        ] {
            assert!(StorePath::from_base_name(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn paths_outside_the_store_are_refused() {
        let dir = StoreDir::new("/tmp/store").unwrap();
        for prefix in [
            "/nix/store/",
            "/tmp/store",
            "/tmp/store//",
            "/tmp/store2/",
            "",
            "tmp/store/",
            "/tmp/store/x/",
        ] {
            assert!(
                dir.parse_path(&format!("{prefix}{HASH}-a")).is_err(),
                "{prefix:?}"
            );
        }
        for suffix in ["/", "/bin", "/.."] {
            assert!(
                dir.parse_path(&format!("/tmp/store/{HASH}-a{suffix}"))
                    .is_err(),
                "{suffix:?}"
            );
        }
    }

    #[test]
    fn unclean_store_directories_are_refused() {
        for text in [
            "",
            "/",
            "nix/store",
            "/nix/store/",
            "//nix",
            "/nix//store",
            "/nix/./store",
            "/nix/..",
            "/a\nb",
        ] {
            assert!(StoreDir::new(text).is_err(), "{text:?}");
        }
        assert!(StoreDir::new(&"/x".repeat(STORE_DIR_BYTES_MAX)).is_err());
    }

    proptest! {
        #[test]
        fn order_is_the_order_of_base_names(a in "[0-9a-df-np-sv-z]{32}-[a-z?=.+]{1,3}x", b in "[0-9a-df-np-sv-z]{32}-[a-z?=.+]{1,3}x") {
            let (first, second) = (StorePath::from_base_name(&a).unwrap(), StorePath::from_base_name(&b).unwrap());
            prop_assert_eq!(first.cmp(&second), a.cmp(&b));
            prop_assert_eq!(first.hash().cmp(&second.hash()), a[..32].cmp(&b[..32]));
            prop_assert_eq!(first.base_name(), a);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "([0-9a-df-np-sv-z]{32})?.{0,40}") {
            if let Ok(path) = StorePath::from_base_name(&text) {
                prop_assert_eq!(path.base_name(), text);
            }
        }
    }
}
