//! Configuration: one TOML file, every key with a default that suffices.
//!
//! Unknown keys are errors that name the key and the nearest valid one, because a misspelt
//! `trust.key` that is silently ignored costs an evening. Secrets are never values here, only
//! names of files.

use std::env;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use granary_protocol::signature::{PublicKey, TrustedKeys};
use granary_protocol::store_path::StoreDir;
use regex::Regex;
use serde::{Deserialize, Deserializer, de};

use crate::store::StoreConfig;

/// Largest configuration file read; a real one has a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// What a node is told by its user.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Where the node keeps its identity and index. Default: `$STATE_DIRECTORY` (systemd), else
    /// `$XDG_STATE_HOME/granary`, else `~/.local/state/granary`.
    pub state_dir: PathBuf,
    pub store: Store,
    pub substituter: Substituter,
    pub mesh: Mesh,
    pub share: Share,
    pub trust: Trust,
    pub limits: Limits,
}

/// `[store]`: the Nix store of this machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Store {
    /// How store paths are spelled.
    #[serde(deserialize_with = "parsed")]
    pub dir: StoreDir,
    /// Where the files are, if elsewhere (a chroot store: `<root>/nix/store`).
    pub real_dir: Option<PathBuf>,
    pub database: PathBuf,
}

/// `[substituter]`: the endpoint that Nix asks.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Substituter {
    pub listen: SocketAddr,
    /// Lower is asked first; cache.nixos.org has 40.
    pub priority: i32,
}

/// `[mesh]`: who belongs, and where they are found.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Mesh {
    /// Public half of the mesh key. Without it the node serves this machine only.
    #[serde(deserialize_with = "parsed_option")]
    pub key: Option<PublicKey>,
    /// What `granary mesh admit` wrote for this node. Default: `certificate` in the state folder.
    pub certificate_file: Option<PathBuf>,
    /// Control plane.
    pub listen: Vec<SocketAddr>,
    /// Data plane.
    pub transfer: Vec<SocketAddr>,
    pub mdns: bool,
    /// UDP port of mDNS; 5353 wherever other machines are to be found.
    pub mdns_port: u16,
    /// `host:port` of nodes to find where mDNS does not reach.
    pub peers: Vec<String>,
    /// Names of network interfaces to discover on; all but loopback when empty.
    pub interfaces: Vec<String>,
}

/// `[share]`: what other members may fetch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Share {
    pub enable: bool,
    /// Regular expressions; a path whose name matches one stays here.
    #[serde(deserialize_with = "parsed_list")]
    pub deny: Vec<Regex>,
}

/// `[trust]`: whose word counts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Trust {
    /// Public keys in Nix's format; a narinfo signed by one is passed on to Nix.
    #[serde(deserialize_with = "parsed_list")]
    pub keys: Vec<PublicKey>,
}

/// `[limits]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Limits {
    /// NARs sent to one peer at once. Nix fetches 16 at a time.
    pub streams_per_peer: usize,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("configuration {path} has more than {CONFIG_BYTES_MAX} bytes", path = .path.display())]
    TooLarge { path: PathBuf },
    #[error("{path}: {problem}", path = .path.display())]
    Invalid { path: PathBuf, problem: String },
    #[error(
        "no place for the state: set state-dir, or one of $STATE_DIRECTORY, $XDG_STATE_HOME, $HOME"
    )]
    NoStateDir,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            state_dir: default_state_dir().unwrap_or_default(),
            store: Store::default(),
            substituter: Substituter::default(),
            mesh: Mesh::default(),
            share: Share::default(),
            trust: Trust::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Store {
    fn default() -> Store {
        Store {
            dir: StoreDir::default(),
            real_dir: None,
            database: PathBuf::from("/nix/var/nix/db/db.sqlite"),
        }
    }
}

impl Default for Substituter {
    fn default() -> Substituter {
        Substituter {
            listen: SocketAddr::from(([127, 0, 0, 1], 4726)),
            priority: 10,
        }
    }
}

impl Default for Mesh {
    fn default() -> Mesh {
        let everywhere = |port| {
            vec![
                SocketAddr::from(([0, 0, 0, 0], port)),
                SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)),
            ]
        };
        Mesh {
            key: None,
            certificate_file: None,
            listen: everywhere(4727),
            transfer: everywhere(4728),
            mdns: true,
            mdns_port: 5353,
            peers: Vec::new(),
            interfaces: Vec::new(),
        }
    }
}

impl Default for Share {
    fn default() -> Share {
        Share {
            enable: true,
            deny: Vec::new(),
        }
    }
}

impl Default for Trust {
    /// cache.nixos.org: its key is public knowledge and in every Nix's default configuration.
    fn default() -> Trust {
        let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        Trust {
            keys: vec![
                key.parse()
                    .expect("the key of cache.nixos.org is well-formed"),
            ],
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            streams_per_peer: 32,
        }
    }
}

impl Config {
    /// Reads the file, or the defaults when there is none.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let config = match path {
            None => Config::default(),
            Some(path) => {
                let read = |source| ConfigError::Read {
                    path: path.to_owned(),
                    source,
                };
                if fs::metadata(path).map_err(read)?.len() > CONFIG_BYTES_MAX {
                    return Err(ConfigError::TooLarge {
                        path: path.to_owned(),
                    });
                }
                let text = fs::read_to_string(path).map_err(read)?;
                Config::parse(&text).map_err(|problem| ConfigError::Invalid {
                    path: path.to_owned(),
                    problem,
                })?
            }
        };
        if config.state_dir.as_os_str().is_empty() {
            return Err(ConfigError::NoStateDir);
        }
        Ok(config)
    }

    /// Parses TOML. The error is text for a person: place, problem, nearest valid key.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start].matches('\n').count());
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            format!("{place}{}", with_nearest_key(error.message()))
        })?;
        match config.contradiction() {
            Some(problem) => Err(problem),
            None => Ok(config),
        }
    }

    pub fn certificate_file(&self) -> PathBuf {
        self.mesh
            .certificate_file
            .clone()
            .unwrap_or_else(|| self.state_dir.join("certificate"))
    }

    pub fn identity_file(&self) -> PathBuf {
        self.state_dir.join("identity")
    }

    pub fn index_file(&self) -> PathBuf {
        self.state_dir.join("index.sqlite")
    }

    pub fn store_config(&self) -> StoreConfig {
        StoreConfig {
            dir: self.store.dir.clone(),
            real_dir: self
                .store
                .real_dir
                .clone()
                .unwrap_or_else(|| PathBuf::from(self.store.dir.as_str())),
            database: self.store.database.clone(),
        }
    }

    pub fn trusted_keys(&self) -> TrustedKeys {
        self.trust.keys.iter().cloned().collect()
    }

    fn contradiction(&self) -> Option<String> {
        let malformed = |peer: &&String| {
            let port = peer
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse::<u16>().ok());
            port.is_none_or(|port| port == 0)
        };
        if let Some(peer) = self.mesh.peers.iter().find(malformed) {
            return Some(format!("mesh.peers has {peer:?}, expected host:port"));
        }
        if self.mesh.key.is_some() && self.mesh.listen.is_empty() {
            return Some("mesh.listen is empty, no peer could reach this node; remove mesh.key to serve this machine only".into());
        }
        if self.limits.streams_per_peer == 0 {
            return Some("limits.streams-per-peer is 0, nobody could fetch; use share.enable = false to share nothing".into());
        }
        None
    }
}

fn default_state_dir() -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("STATE_DIRECTORY")
        .or_else(|| variable("XDG_STATE_HOME").map(|home| home.join("granary")))
        .or_else(|| variable("HOME").map(|home| home.join(".local/state/granary")))
}

/// Appends "did you mean" to serde's message about an unknown field.
fn with_nearest_key(message: &str) -> String {
    let mut words = message.split('`').skip(1).step_by(2);
    let nearest = message
        .starts_with("unknown field")
        .then(|| words.next())
        .flatten()
        .and_then(|unknown| words.min_by_key(|valid| strsim::damerau_levenshtein(unknown, valid)));
    match nearest {
        Some(nearest) => format!("{message}\nhint: did you mean `{nearest}`?"),
        None => message.to_owned(),
    }
}

// The value is not repeated: a secret key in the wrong place would end up in a log.
fn parse<T>(text: &str) -> Result<T, String>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn parsed<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<T, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn parsed_option<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    parsed(deserializer).map(Some)
}

fn parsed_list<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| parse(text).map_err(de::Error::custom))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.substituter.listen.to_string(), "127.0.0.1:4726");
        assert_eq!(config.mesh.listen.len(), 2);
        assert!(config.share.enable && config.mesh.mdns);
        assert_eq!(config.trust.keys[0].name().as_str(), "cache.nixos.org-1");
    }

    #[test]
    fn a_full_file_is_read() {
        let config = Config::parse(
            r#"
            state-dir = "/s"
            [store]
            dir = "/nix/store"
            real-dir = "/x/nix/store"
            database = "/x/nix/var/nix/db/db.sqlite"
            [substituter]
            listen = "127.0.0.1:1"
            priority = 5
            [mesh]
            key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
            certificate-file = "/c"
            listen = ["0.0.0.0:2"]
            transfer = []
            mdns = false
            mdns-port = 15353
            peers = ["nas.lan:4727", "[fe80::1]:4727"]
            interfaces = ["eth0"]
            [share]
            enable = false
            deny = ["^secret-", "\\.key$"]
            [trust]
            keys = []
            [limits]
            streams-per-peer = 4
            "#,
        )
        .unwrap();
        assert_eq!(config.certificate_file(), PathBuf::from("/c"));
        assert_eq!(config.identity_file(), PathBuf::from("/s/identity"));
        assert!(config.share.deny[1].is_match("my.key"));
        assert_eq!(
            config.store_config().real_dir,
            PathBuf::from("/x/nix/store")
        );
    }

    fn problem(text: &str) -> String {
        Config::parse(text).expect_err(text)
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_valid_one() {
        let text = problem("[trust]\n\nkey = []");
        assert!(
            text.contains("line 3")
                && text.contains("`key`")
                && text.contains("did you mean `keys`"),
            "{text}"
        );
        let text = problem("[meshes]");
        assert!(text.contains("did you mean `mesh`"), "{text}");
        let text = problem("[store]\nrealdir = 1");
        assert!(text.contains("did you mean `real-dir`"), "{text}");
    }

    #[test]
    fn wrong_values_are_named() {
        assert!(problem("[substituter]\nlisten = \"here\"").contains("line 2"));
        // The value is not repeated: it may be a secret key in the wrong place.
        assert!(problem("[mesh]\nkey = \"home\"").contains("line 2: public key"));
        assert!(problem("[mesh]\npeers = [\"nas\"]").contains("nas"));
        assert!(problem("[share]\ndeny = [\"(\"]").contains("regex"));
        assert!(problem("[store]\ndir = \"nix\"").contains("nix"));
        let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        assert!(problem(&format!("[mesh]\nkey = {key:?}\nlisten = []")).contains("mesh.listen"));
        assert!(problem("[limits]\nstreams-per-peer = 0").contains("streams-per-peer"));
    }
}
