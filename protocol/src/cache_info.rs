//! `nix-cache-info`: the first thing a client reads from a cache.
//!
//! `Key: value` lines, read far more leniently than a narinfo: any line without a
//! colon and any unknown key is passed over, values are trimmed, everything may be missing.
//! Only one thing is deadly: a `Priority` that C++'s `stoi` refuses ends the client's process.
//! An `i32` cannot print such a one.

use std::fmt;

use thiserror::Error;

use crate::hash::excerpt;
use crate::store_path::{StoreDir, StorePathError};

/// Longest text we read; real ones have three lines.
pub const CACHE_INFO_BYTES_MAX: usize = 64 * 1024;

/// What a cache says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheInfo {
    /// Must equal the client's, or it refuses the cache.
    pub store_dir: StoreDir,
    /// Whether the cache likes to be asked for many paths at once.
    pub want_mass_query: bool,
    /// Lower is asked earlier; cache.nixos.org says 40.
    pub priority: i32,
}

/// Why a client could not use this text.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CacheInfoError {
    #[error("nix-cache-info has {bytes} bytes, more than the {CACHE_INFO_BYTES_MAX} we read")]
    TooLong { bytes: usize },
    #[error("nix-cache-info names an impossible store directory")]
    StoreDir { source: StorePathError },
    #[error(
        "nix-cache-info has priority {text:?}, which is no number from {} to {}",
        i32::MIN,
        i32::MAX
    )]
    Priority { text: String },
}

impl CacheInfo {
    /// Reads what a cache says; what it leaves out is `ours`, false and 0, as for Nix.
    ///
    /// The store directory is reported, not compared: the caller knows whether another is an error.
    pub fn parse(text: &str, ours: &StoreDir) -> Result<CacheInfo, CacheInfoError> {
        if text.len() > CACHE_INFO_BYTES_MAX {
            return Err(CacheInfoError::TooLong { bytes: text.len() });
        }
        let mut info = CacheInfo {
            store_dir: ours.clone(),
            want_mass_query: false,
            priority: 0,
        };
        for (name, value) in text.split('\n').filter_map(|line| line.split_once(':')) {
            let value = value.trim_matches([' ', '\t', '\r']);
            match name {
                "StoreDir" => {
                    info.store_dir = StoreDir::new(value)
                        .map_err(|source| CacheInfoError::StoreDir { source })?;
                }
                "WantMassQuery" => info.want_mass_query = value == "1",
                "Priority" => info.priority = parse_priority(value)?,
                _ => {}
            }
        }
        Ok(info)
    }
}

impl fmt::Display for CacheInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "StoreDir: {}", self.store_dir)?;
        writeln!(f, "WantMassQuery: {}", u8::from(self.want_mass_query))?;
        writeln!(f, "Priority: {}", self.priority)
    }
}

/// Reads like `stoi`: an optional sign, digits, and whatever follows is ignored (`1.5` is 1).
fn parse_priority(text: &str) -> Result<i32, CacheInfoError> {
    let sign = usize::from(text.starts_with(['+', '-']));
    let digits = text[sign..].bytes().take_while(u8::is_ascii_digit).count();
    text[..sign + digits]
        .parse()
        .map_err(|_| CacheInfoError::Priority {
            text: excerpt(text),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<CacheInfo, CacheInfoError> {
        CacheInfo::parse(text, &StoreDir::default())
    }

    #[test]
    fn cache_nixos_org_is_read_and_printed_exactly() {
        let text = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n";
        let info = read(text).unwrap();
        assert_eq!((info.want_mass_query, info.priority), (true, 40));
        assert_eq!(info.to_string(), text);
    }

    #[test]
    fn sloppy_texts_are_read_as_nix_reads_them() {
        for (text, store_dir, want_mass_query, priority) in [
            ("", "/nix/store", false, 0),
            ("hello", "/nix/store", false, 0),
            (
                "StoreDir: /nix/store\r\nWantMassQuery: 1\r\nPriority: 41\r\n",
                "/nix/store",
                true,
                41,
            ),
            ("StoreDir:/gnu/store", "/gnu/store", false, 0),
            ("Priority: 1.5\n", "/nix/store", false, 1),
            ("Priority: -7 # first\nX: y\n\n", "/nix/store", false, -7),
            ("Priority: +3", "/nix/store", false, 3),
            ("Priority: 1\nPriority: 2", "/nix/store", false, 2),
            ("WantMassQuery: true", "/nix/store", false, 0),
            (
                "priority: x\n Priority: x\nPriority : x",
                "/nix/store",
                false,
                0,
            ),
            ("Priority: 2147483647", "/nix/store", false, i32::MAX),
        ] {
            let store_dir = StoreDir::new(store_dir).unwrap();
            assert_eq!(
                read(text),
                Ok(CacheInfo {
                    store_dir,
                    want_mass_query,
                    priority
                }),
                "{text:?}"
            );
        }
    }

    #[test]
    fn texts_that_break_clients_are_refused() {
        for text in [
            "Priority: ",
            "Priority: x",
            "Priority: -",
            "Priority: +-1",
            "Priority: 2147483648",
            "Priority: 99999999999999999999",
            "StoreDir: ",
            "StoreDir: nix/store",
        ] {
            assert!(read(text).is_err(), "{text:?}");
        }
        assert!(read(&"x".repeat(CACHE_INFO_BYTES_MAX + 1)).is_err());
    }

    proptest! {
        #[test]
        fn every_info_comes_back(want_mass_query: bool, priority: i32) {
            let info = CacheInfo { store_dir: StoreDir::new("/a/b c").unwrap(), want_mass_query, priority };
            prop_assert_eq!(read(&info.to_string()), Ok(info));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "((StoreDir|Priority|WantMassQuery):)?.*\n?.*") {
            let _ = read(&text);
        }
    }
}
