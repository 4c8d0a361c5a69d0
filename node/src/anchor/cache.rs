//! Cache: a named collection with its own readers, settings and signing keys.
//!
//! Settings lie in the bucket as `caches/<name>/cache.json`. Secret keys never do: they are files
//! of mode 0600 in the anchor's state folder, or systemd credentials, one line for each key in Nix's
//! format. The first key signs; while a key is being replaced all of them do, so that a client that
//! trusts only one of them is content.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use granary_protocol::signature::{KeyName, PublicKey, SecretKey, SignatureError};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::secret;

/// Longest name of a cache, as in Attic.
pub const NAME_BYTES_MAX: usize = 50;

/// First words of the anchor's own routes, which a cache of that name would hide.
const RESERVED: [&str; 6] = ["api", "health", "metrics", "nar", "log", "nix-cache-info"];

/// Priority of a new cache: after a node on loopback, about where cache.nixos.org (40) stands.
pub const DEFAULT_PRIORITY: i32 = 41;

/// Keys of one cache: an old and a new one, and room for a rotation on top of a rotation.
pub const KEYS_MAX: usize = 4;

/// Largest file of keys read; a key has some 100 bytes.
const KEYS_BYTES_MAX: u64 = 16 * 1024;

/// Names of upstream keys that one cache can list.
const UPSTREAM_KEYS_MAX: usize = 64;

/// Pins of one cache: releases and machines, not builds. They lie in its settings.
const PINS_MAX: usize = 10_000;

/// The name of a cache: a letter or digit, then up to 49 of these, `-`, `_` and `+`, as in Attic.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CacheName(Box<str>);

/// A text that cannot name a cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheNameError {
    #[error(
        "a cache cannot be called {name:?}: letters, digits, -, _ and + are allowed, {NAME_BYTES_MAX} at most, a letter or digit first"
    )]
    Grammar { name: String },
    #[error("a cache cannot be called {name:?}, which the anchor's own addresses begin with")]
    Reserved { name: String },
}

impl CacheName {
    pub fn new(name: &str) -> Result<CacheName, CacheNameError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_+".contains(&byte);
        let starts_well = name
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !starts_well || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_allowed) {
            let name = name.chars().take(NAME_BYTES_MAX + 1).collect();
            return Err(CacheNameError::Grammar { name });
        }
        if RESERVED.contains(&name) {
            return Err(CacheNameError::Reserved {
                name: name.to_owned(),
            });
        }
        Ok(CacheName(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where its settings lie in the bucket.
    pub fn settings_key(&self) -> String {
        format!("caches/{self}/cache.json")
    }

    /// The folder of its narinfos.
    pub fn narinfo_folder(&self) -> String {
        format!("caches/{self}/narinfo")
    }

    pub fn narinfo_key(&self, hash: &StorePathHash) -> String {
        format!("caches/{self}/narinfo/{hash}.narinfo")
    }

    /// Where the listing of a path lies, if a client uploaded one.
    pub fn listing_key(&self, hash: &StorePathHash) -> String {
        self.file_key(&format!("ls/{hash}.ls"))
    }

    /// Where logs, listings and realisations lie that clients uploaded.
    pub fn file_key(&self, name: &str) -> String {
        format!("caches/{self}/files/{name}")
    }
}

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for CacheName {
    type Err = CacheNameError;

    fn from_str(name: &str) -> Result<CacheName, CacheNameError> {
        CacheName::new(name)
    }
}

/// What can be configured about a cache; `cache.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Whether anybody may read it.
    pub public: bool,
    pub priority: i32,
    pub store_dir: String,
    /// Public halves of its signing keys, the one that signs first.
    pub public_keys: Vec<String>,
    /// Names of keys whose paths clients need not push. A cache that names any is taken for
    /// incomplete: references that it does not hold are accepted.
    #[serde(default)]
    pub upstream_keys: Vec<String>,
    /// Seconds that a path is kept since its closure was last used; for ever when absent.
    #[serde(default)]
    pub retention: Option<u64>,
    /// Bytes in storage to which a collection brings it down; no limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_cap: Option<u64>,
    /// Bytes in storage beyond which nothing is taken in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<u64>,
    /// Bytes in storage that came by one token subject, beyond which nothing more is taken in from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_quota: Option<u64>,
    /// Hashes of store paths that are kept, with what they reference, whatever the retention says.
    #[serde(default)]
    pub pins: BTreeSet<String>,
    /// The same under a name, of which a new one may let an old one go: the newest first.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named_pins: BTreeMap<PinName, Vec<String>>,
}

/// What pins are called that follow each other: `nas-system`, `release`. Up to 50 letters, digits, `-`, `_`, `.` and
/// `+`, a letter or digit first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct PinName(String);

/// A text that cannot name pins.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "pins cannot be called {name:?}: letters, digits, -, _, . and + are allowed, {NAME_BYTES_MAX} at most, a letter or digit first"
)]
pub struct PinNameError {
    name: String,
}

impl TryFrom<String> for PinName {
    type Error = PinNameError;

    fn try_from(name: String) -> Result<PinName, PinNameError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
        let first = name.bytes().next();
        match first.is_some_and(|byte| byte.is_ascii_alphanumeric())
            && name.len() <= NAME_BYTES_MAX
            && name.bytes().all(is_allowed)
        {
            true => Ok(PinName(name)),
            false => Err(PinNameError {
                name: name.chars().take(NAME_BYTES_MAX + 1).collect(),
            }),
        }
    }
}

impl FromStr for PinName {
    type Err = PinNameError;

    fn from_str(name: &str) -> Result<PinName, PinNameError> {
        PinName::try_from(name.to_owned())
    }
}

/// Settings that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cache settings are malformed: {source}")]
    Json { source: serde_json::Error },
    #[error("cache settings name an impossible store directory: {source}")]
    StoreDir {
        source: granary_protocol::store_path::StorePathError,
    },
    #[error("cache settings have a malformed key: {source}")]
    Key { source: SignatureError },
    #[error("cache settings have {found} pins, at most {PINS_MAX} are allowed")]
    TooManyPins { found: usize },
    #[error("cache settings pin what is no hash of a store path: {source}")]
    Pin {
        source: granary_protocol::store_path::StorePathError,
    },
    #[error(
        "cache settings have a quota of {quota} bytes and a size cap of {size_cap}, which could never be reached"
    )]
    Sizes { quota: u64, size_cap: u64 },
    #[error("cache settings name {found} upstream keys, at most {UPSTREAM_KEYS_MAX} are allowed")]
    TooManyKeys { found: usize },
}

impl Settings {
    pub fn new(public_key: &PublicKey) -> Settings {
        Settings {
            public: false,
            priority: DEFAULT_PRIORITY,
            store_dir: StoreDir::default().to_string(),
            public_keys: vec![public_key.to_string()],
            upstream_keys: Vec::new(),
            retention: None,
            size_cap: None,
            quota: None,
            subject_quota: None,
            pins: BTreeSet::new(),
            named_pins: BTreeMap::new(),
        }
    }

    /// Reads settings and checks every value.
    pub fn from_json(bytes: &[u8]) -> Result<Settings, SettingsError> {
        let settings: Settings =
            serde_json::from_slice(bytes).map_err(|source| SettingsError::Json { source })?;
        settings.check()?;
        Ok(settings)
    }

    /// The hashes of all that is pinned, under a name or not; one that is both comes twice.
    pub fn pinned(&self) -> impl Iterator<Item = &String> {
        self.pins.iter().chain(self.named_pins.values().flatten())
    }

    /// Proves that the values can be used, and shown to clients line by line.
    pub fn check(&self) -> Result<(), SettingsError> {
        self.store_dir()?;
        if self.upstream_keys.len() > UPSTREAM_KEYS_MAX {
            return Err(SettingsError::TooManyKeys {
                found: self.upstream_keys.len(),
            });
        }
        if let (Some(quota), Some(size_cap)) = (self.quota, self.size_cap)
            && quota < size_cap
        {
            return Err(SettingsError::Sizes { quota, size_cap });
        }
        let found = self.pinned().count();
        if found > PINS_MAX {
            return Err(SettingsError::TooManyPins { found });
        }
        let mut pins = self.pinned().map(|pin| pin.parse::<StorePathHash>());
        pins.try_for_each(|pin| pin.map(drop))
            .map_err(|source| SettingsError::Pin { source })?;
        let names = self
            .upstream_keys
            .iter()
            .map(|name| KeyName::new(name).map(drop));
        let keys = self
            .public_keys
            .iter()
            .map(|key| key.parse::<PublicKey>().map(drop));
        let mut checks = names.chain(keys);
        checks.try_for_each(|check| check.map_err(|source| SettingsError::Key { source }))
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_else(|_| unreachable!("strings and numbers"))
    }

    pub fn store_dir(&self) -> Result<StoreDir, SettingsError> {
        StoreDir::new(&self.store_dir).map_err(|source| SettingsError::StoreDir { source })
    }

    /// Whether references that are not here are to be expected elsewhere.
    pub fn is_incomplete(&self) -> bool {
        !self.upstream_keys.is_empty()
    }
}

/// The folder of signing keys.
#[derive(Debug, Clone)]
pub struct Keys {
    folder: PathBuf,
    credentials: Option<PathBuf>,
}

/// Why a cache cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error(
        "cache {cache} has no signing key at {path}: import one, or make one with granary cache rotate-key {cache}",
        path = .path.display()
    )]
    Missing { cache: CacheName, path: PathBuf },
    #[error("cannot {action} the signing keys {path}: {source}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the signing keys {path} have mode {mode:04o}, others may read them, refusing to use them; run chmod 0600 {path}",
        path = .path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the signing keys {path} have more than {KEYS_BYTES_MAX} bytes or {KEYS_MAX} keys", path = .path.display())]
    TooMany { path: PathBuf },
    #[error(
        "cache {cache} has {KEYS_MAX} signing keys already, end a rotation first: granary cache rotate-key {cache} --retire"
    )]
    Enough { cache: CacheName },
    #[error("the signing keys {path} are malformed: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: SignatureError,
    },
    #[error("the system gave no random bytes for a signing key: {0}")]
    NoRandomness(getrandom::Error),
    #[error(
        "the signing keys of cache {cache} come from a credential, which granary cannot change"
    )]
    Credential { cache: CacheName },
}

impl Keys {
    /// Looks in `<state>/keys`, after systemd's credentials.
    pub fn in_folder(state: &Path) -> Keys {
        Keys {
            folder: state.join("keys"),
            credentials: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
        }
    }

    /// Makes a key for a cache; not yet written anywhere.
    pub fn generate(name: KeyName) -> Result<SecretKey, KeysError> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut()).map_err(KeysError::NoRandomness)?;
        Ok(SecretKey::from_seed(name, *seed))
    }

    /// Reads the keys of a cache, the one that signs first. Blocks.
    ///
    /// # Errors
    /// [`KeysError::Missing`] when there is none: the cache can be read, not pushed to.
    pub fn load(&self, cache: &CacheName) -> Result<Vec<SecretKey>, KeysError> {
        let (path, is_credential) = self.place(cache);
        let failed = |action| {
            let path = path.clone();
            move |source| KeysError::Io {
                action,
                path,
                source,
            }
        };
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(KeysError::Missing {
                    cache: cache.clone(),
                    path,
                });
            }
            metadata => metadata.map_err(failed("examine"))?,
        };
        if !is_credential && let Some(mode) = secret::exposed(&path, &metadata) {
            return Err(KeysError::Exposed { path, mode });
        }
        if metadata.len() > KEYS_BYTES_MAX {
            return Err(KeysError::TooMany { path });
        }
        let text = Zeroizing::new(fs::read_to_string(&path).map_err(failed("read"))?);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let keys: Result<Vec<SecretKey>, SignatureError> = lines.map(str::parse).collect();
        match keys {
            Ok(keys) if keys.is_empty() => Err(KeysError::Missing {
                cache: cache.clone(),
                path,
            }),
            Ok(keys) if keys.len() > KEYS_MAX => Err(KeysError::TooMany { path }),
            Ok(keys) => Ok(keys),
            Err(source) => Err(KeysError::Malformed { path, source }),
        }
    }

    /// Proves that the keys of a cache are ours to change. Blocks.
    pub fn check_changeable(&self, cache: &CacheName) -> Result<(), KeysError> {
        match self.place(cache) {
            (_, true) => Err(KeysError::Credential {
                cache: cache.clone(),
            }),
            (_, false) => Ok(()),
        }
    }

    /// Writes the keys of a cache: whole, durable and for the owner alone. Blocks.
    pub fn store(&self, cache: &CacheName, keys: &[SecretKey]) -> Result<(), KeysError> {
        self.check_changeable(cache)?;
        let (path, _) = self.place(cache);
        let lines: Vec<_> = keys.iter().map(SecretKey::to_nix_string).collect();
        let mut text = Zeroizing::new(String::new());
        for line in &lines {
            text.push_str(line);
            text.push('\n');
        }
        write_secret(&path, text.as_bytes()).map_err(|source| KeysError::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Deletes the keys of a cache that is no more. Blocks.
    pub fn delete(&self, cache: &CacheName) -> Result<(), KeysError> {
        let path = self.folder.join(cache.as_str());
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(KeysError::Io {
                action: "delete",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }

    fn place(&self, cache: &CacheName) -> (PathBuf, bool) {
        let credential = self
            .credentials
            .as_ref()
            .map(|folder| folder.join(format!("cache-{cache}")))
            .filter(|file| file.exists());
        match credential {
            Some(file) => (file, true),
            None => (self.folder.join(cache.as_str()), false),
        }
    }
}

/// Returns the name that the next key of a cache shall have: `<cache>-<number>`.
///
/// A number of its own, because Nix keeps one key for each name.
pub fn next_key_name(cache: &CacheName, public_keys: &[String]) -> KeyName {
    let number = public_keys
        .iter()
        .filter_map(|key| {
            key.split(':')
                .next()?
                .rsplit_once('-')?
                .1
                .parse::<u32>()
                .ok()
        })
        .max()
        .map_or(1, |last| last.saturating_add(1));
    KeyName::new(&format!("{cache}-{number}"))
        .unwrap_or_else(|_| unreachable!("names of caches are names of keys"))
}

/// Writes a file that is whole or not there, durable, mode 0600, in a folder of mode 0700.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    // Made with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn name(text: &str) -> CacheName {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_those_of_attic_without_our_own_words() {
        for good in ["a", "0", "main", "Team_1+x-y", &"a".repeat(50)] {
            assert!(CacheName::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "_api",
            "a/b",
            "a b",
            "ä",
            "..",
            "a\n",
            &"a".repeat(51),
            "api",
            "health",
        ] {
            assert!(CacheName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn settings_come_back_and_strange_ones_are_refused() {
        let key = Keys::generate("main-1".parse().unwrap()).unwrap();
        let settings = Settings::new(&key.public_key());
        assert_eq!(
            Settings::from_json(settings.to_json().as_bytes()).unwrap(),
            settings
        );
        for bad in [
            "",
            "{}",
            "[]",
            &settings.to_json().replace("/nix/store", "nix"),
            &settings.to_json().replace("main-1:", "main"),
            &settings.to_json().replace("\"public\"", "\"pubic\""),
            &settings
                .to_json()
                .replace("\"upstream_keys\": []", "\"upstream_keys\": [\"a\\nb\"]"),
        ] {
            assert!(Settings::from_json(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_kept_for_the_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys {
            folder: folder.path().join("keys"),
            credentials: None,
        };
        let cache = name("main");
        assert!(matches!(keys.load(&cache), Err(KeysError::Missing { .. })));
        let made = [
            Keys::generate("main-2".parse().unwrap()).unwrap(),
            Keys::generate("main-1".parse().unwrap()).unwrap(),
        ];
        keys.store(&cache, &made).unwrap();
        let names: Vec<_> = keys
            .load(&cache)
            .unwrap()
            .iter()
            .map(|key| key.name().to_string())
            .collect();
        assert_eq!(names, ["main-2", "main-1"]);
        let file = folder.path().join("keys/main");
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            keys.load(&cache),
            Err(KeysError::Exposed { mode: 0o640, .. })
        ));
        keys.delete(&cache).unwrap();
        keys.delete(&cache).unwrap();
    }

    #[test]
    fn a_credential_goes_first_and_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = folder.path().join("credentials");
        fs::create_dir(&credentials).unwrap();
        let keys = Keys {
            folder: folder.path().join("keys"),
            credentials: Some(credentials.clone()),
        };
        let key = Keys::generate("team-7".parse().unwrap()).unwrap();
        fs::write(credentials.join("cache-team"), &*key.to_nix_string()).unwrap();
        let loaded = keys.load(&name("team")).unwrap();
        assert_eq!(loaded[0].public_key(), key.public_key());
        assert!(matches!(
            keys.store(&name("team"), &loaded),
            Err(KeysError::Credential { .. })
        ));
    }

    #[test]
    fn every_key_of_a_cache_has_a_name_of_its_own() {
        let next = |keys: &[&str]| {
            let keys: Vec<_> = keys.iter().map(|key| (*key).to_owned()).collect();
            next_key_name(&name("main"), &keys).to_string()
        };
        assert_eq!(next(&[]), "main-1");
        assert_eq!(next(&["main-1:x"]), "main-2");
        assert_eq!(next(&["main-9:x", "cache.example.org-12:y"]), "main-13");
        assert_eq!(next(&["imported:x"]), "main-1");
    }
}
