//! Configuration: one TOML file, every key with a default that suffices.
//!
//! Unknown keys are errors that name the key and the nearest valid one, because a misspelt
//! `trust.key` that is silently ignored costs an evening. Secrets are never values here, only
//! names of files. What the keys are for stands in [`keys`], of which the manual is made.

pub mod keys;
mod check;
mod oidc;

pub use oidc::{Oidc, Shape};

use std::env;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use granary_protocol::hash::sha256;
use granary_protocol::network::Network;
use granary_protocol::nix32;
use granary_protocol::signature::{PublicKey, TrustedKeys};
use granary_protocol::store_path::StoreDir;
use granary_protocol::ticket::{TICKET_TEXT_BYTES_MAX, Ticket};
use regex::Regex;
use reqwest::Url;
use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use crate::listener::Address;
use crate::log::Format;
use crate::state_folder;
use crate::store::{StoreConfig, daemon_socket, state_dir};

/// Largest configuration file read; a real one has a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;

/// Largest file of keys that `granary up` left; a cache has four keys at most, of some 100 bytes each.
const OWN_CACHE_KEYS_BYTES_MAX: u64 = 4096;

/// What a node is told by its user.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Where the node keeps its identity and index. Default: `$STATE_DIRECTORY` (systemd), else
    /// `$XDG_STATE_HOME/granary`, else `~/.local/state/granary`.
    pub state_dir: PathBuf,
    pub log: Log,
    pub store: Store,
    pub substituter: Substituter,
    pub mesh: Mesh,
    pub share: Share,
    pub trust: Trust,
    /// `[[anchor]]`: binary caches of ours, asked when no member has a path. In order of preference.
    pub anchor: Vec<Anchor>,
    /// `[[upstream]]`: other binary caches, asked after those.
    pub upstream: Vec<Upstream>,
    pub upload: Upload,
    pub limits: Limits,
    pub anchor_server: AnchorServer,
    /// Keys of the cache that `granary up` made on this machine; trusted as if they stood in `trust.keys`.
    #[serde(skip)]
    pub own_cache_keys: Vec<PublicKey>,
}

/// `[log]`: what daemons say about their work.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Log {
    /// Default: the journal where stderr is that, else text.
    pub format: Option<Format>,
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
    /// Where Nix keeps build logs. Default: `log/nix` beside the folder of the database's folder.
    pub log_dir: Option<PathBuf>,
    /// Of the Nix daemon that serves this store. Default: where a daemon of the database's store has it.
    pub daemon_socket: Option<PathBuf>,
}

/// `[substituter]`: the endpoint that Nix asks.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Substituter {
    /// Addresses, or one: `ip:port` or `unix:/path`. Sockets that systemd passes stand in for them.
    #[serde(deserialize_with = "one_or_several")]
    pub listen: Vec<Address>,
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
    /// A ticket (`granary mesh ticket`) with which the node joins by itself; it says the key as well.
    pub ticket_file: Option<PathBuf>,
    /// `host:port` of those who admit and renew, from tickets.
    #[serde(skip)]
    pub admits: Vec<String>,
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
    /// The networks in which this node is heard and reached; all when empty.
    #[serde(deserialize_with = "parsed_list")]
    pub networks: Vec<Network>,
    /// Whether nodes of other meshes that share in public are asked for what nobody else has.
    pub strangers: bool,
}

/// `[share]`: what others may fetch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Share {
    pub enable: bool,
    /// Regular expressions; a path whose name matches one stays here.
    #[serde(deserialize_with = "parsed_list")]
    pub deny: Vec<Regex>,
    /// Where machines without Granary read over plain HTTP; nowhere when empty.
    #[serde(deserialize_with = "one_or_several")]
    pub http: Vec<SocketAddr>,
    /// A file with the token that they must show. Everybody may read without.
    pub http_token_file: Option<PathBuf>,
    /// A file with the key, in Nix's format, that signs what they are given.
    pub http_sign_key_file: Option<PathBuf>,
    /// Names of this machine that they use beside addresses and names of private networks.
    pub http_hosts: Vec<String>,
    /// Whether strangers, nodes of other meshes, may fetch what a key of `public_keys` signed.
    pub public: bool,
    #[serde(deserialize_with = "parsed_list")]
    pub public_keys: Vec<PublicKey>,
}

/// `[trust]`: whose word counts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Trust {
    /// Public keys in Nix's format; a narinfo signed by one is passed on to Nix.
    #[serde(deserialize_with = "parsed_list")]
    pub keys: Vec<PublicKey>,
    /// Whether what members built themselves and may vouch for is passed on to Nix as well.
    pub members: bool,
}

/// One `[[anchor]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Anchor {
    /// Where `nix-cache-info` is, without it.
    #[serde(deserialize_with = "parsed_url")]
    pub url: Url,
    /// A file with the token that is sent with every request to it.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) trusted beside the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Keys that it signs with; trusted as if they stood in `trust.keys`.
    #[serde(default, deserialize_with = "parsed_list")]
    pub public_keys: Vec<PublicKey>,
}

/// One `[[upstream]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Upstream {
    #[serde(deserialize_with = "parsed_url")]
    pub url: Url,
    /// Certificates (PEM) trusted beside the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "parsed_list")]
    pub public_keys: Vec<PublicKey>,
}

/// `[upload]`: what the node pushes by itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Upload {
    /// Where to: an `[[anchor]]`, by its url or by the last word of it. Without it nothing is pushed.
    pub cache: Option<String>,
    /// Regular expressions; of what is built here, names that match one are pushed. All when empty.
    #[serde(deserialize_with = "parsed_list")]
    pub filter: Vec<Regex>,
    /// Whether unsigned sources that a path references are pushed with it; without them it stays here.
    pub sources: bool,
    /// The most that leaves in a second; no limit when absent.
    #[serde(deserialize_with = "parsed_option")]
    pub rate: Option<Rate>,
}

/// Bytes in a second, written as `500kB/s` or `50MB/s`; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

/// Why a text is no rate.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no rate, expected a number with B/s, kB/s, MB/s or GB/s: 50MB/s")]
pub struct RateError {
    text: String,
}

impl std::str::FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Rate, RateError> {
        let error = || RateError {
            text: text.to_owned(),
        };
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let (number, unit) = text.split_at(digits);
        let unit: u64 = match unit.trim_start() {
            "B/s" => 1,
            "kB/s" => 1_000,
            "MB/s" => 1_000_000,
            "GB/s" => 1_000_000_000,
            _ => return Err(error()),
        };
        let rate = number
            .parse()
            .ok()
            .and_then(|number| unit.checked_mul(number));
        match rate {
            None | Some(0) => Err(error()),
            Some(rate) => Ok(Rate(rate)),
        }
    }
}

/// `[limits]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Limits {
    /// NARs sent to one peer at once. Nix fetches 16 at a time.
    pub streams_per_peer: usize,
}

/// `[anchor-server]`: what `granary anchor` runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct AnchorServer {
    pub listen: SocketAddr,
    /// `file:///folder` or `s3://bucket/prefix`. Default: `storage` in the state folder.
    pub storage: Option<String>,
    /// Made at the first start; empty for none.
    pub default_cache: String,
    /// Whether `granary anchor` is a member of the mesh by itself; `granary up` always is.
    pub member: bool,
    /// Largest NAR taken in, in bytes.
    pub nar_bytes_max: u64,
    /// The certificate chain that is shown to clients, and its private key (PEM). Plain HTTP without.
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    /// Days after which a stored NAR is read again and compared, by and by; never when absent.
    pub scrub_days: Option<u64>,
    /// A file with the key that proves tokens of Attic.
    pub attic_token_key_file: Option<PathBuf>,
    /// `[[anchor-server.oidc]]`: jobs of CI that get tokens for showing who they are.
    pub oidc: Vec<Oidc>,
    pub s3: S3,
}

/// `[anchor-server.s3]`: what is not in the storage's URL.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct S3 {
    /// `https://host:port`; AWS when absent.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// Default: the systemd credential `s3`, else AWS's variables of the environment.
    pub credentials_file: Option<PathBuf>,
    /// Certificates (PEM) trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// The bucket stands in the host name.
    pub virtual_hosted: bool,
    /// NARs of public caches are fetched from S3 itself, by links of an hour.
    pub redirect: bool,
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
            log: Log::default(),
            store: Store::default(),
            substituter: Substituter::default(),
            mesh: Mesh::default(),
            share: Share::default(),
            trust: Trust::default(),
            anchor: Vec::new(),
            upstream: Vec::new(),
            upload: Upload::default(),
            limits: Limits::default(),
            anchor_server: AnchorServer::default(),
            own_cache_keys: Vec::new(),
        }
    }
}

impl Default for AnchorServer {
    fn default() -> AnchorServer {
        AnchorServer {
            listen: SocketAddr::from(([0, 0, 0, 0], 4730)),
            storage: None,
            default_cache: "main".to_owned(),
            member: false,
            // Far above real ones, far below what a hostile pusher would need to fill a disk at once.
            nar_bytes_max: 128 << 30,
            tls_cert: None,
            tls_key: None,
            scrub_days: None,
            attic_token_key_file: None,
            oidc: Vec::new(),
            s3: S3::default(),
        }
    }
}

impl Default for Store {
    fn default() -> Store {
        Store {
            dir: StoreDir::default(),
            real_dir: None,
            database: PathBuf::from("/nix/var/nix/db/db.sqlite"),
            log_dir: None,
            daemon_socket: None,
        }
    }
}

impl Default for Substituter {
    fn default() -> Substituter {
        Substituter {
            listen: vec![Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 4726)))],
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
            ticket_file: None,
            admits: Vec::new(),
            listen: everywhere(4727),
            transfer: everywhere(4728),
            mdns: true,
            mdns_port: 5353,
            peers: Vec::new(),
            interfaces: Vec::new(),
            networks: Vec::new(),
            strangers: false,
        }
    }
}

impl Default for Share {
    fn default() -> Share {
        Share {
            enable: true,
            deny: Vec::new(),
            http: Vec::new(),
            http_token_file: None,
            http_sign_key_file: None,
            http_hosts: Vec::new(),
            public: false,
            public_keys: vec![nixos_key()],
        }
    }
}

impl Default for Trust {
    fn default() -> Trust {
        Trust {
            keys: vec![nixos_key()],
            members: true,
        }
    }
}

/// That of cache.nixos.org, which is public knowledge and in every Nix's default configuration.
fn nixos_key() -> PublicKey {
    let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
    key.parse()
        .expect("the key of cache.nixos.org is well-formed")
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            streams_per_peer: 32,
        }
    }
}

impl Config {
    /// Reads the file, or the defaults when there is none, and what the state folder adds to it.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let mut config = Config::read(path)?;
        config.take_tickets()?;
        config.take_own_cache_keys()?;
        Ok(config)
    }

    /// Reads the file alone, which may be meant for another machine.
    pub fn read(path: Option<&Path>) -> Result<Config, ConfigError> {
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
        match config.state_dir.as_os_str().is_empty() {
            true => Err(ConfigError::NoStateDir),
            false => Ok(config),
        }
    }

    /// Learns what the anchor of `granary up` signs with.
    fn take_own_cache_keys(&mut self) -> Result<(), ConfigError> {
        let path = self.own_cache_keys_file();
        let text = match state_folder::read(&path, OWN_CACHE_KEYS_BYTES_MAX) {
            // It may be none of this user's business, who asks the node only.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Err(source) => return Err(ConfigError::Read { path, source }),
            Ok(text) => text,
        };
        let keys = text.as_deref().unwrap_or_default().lines().map(str::parse);
        match keys.collect::<Result<_, _>>() {
            Ok(keys) => self.own_cache_keys = keys,
            Err(error) => {
                let problem = error.to_string();
                return Err(ConfigError::Invalid { path, problem });
            }
        }
        Ok(())
    }

    /// Learns from tickets which mesh it is, who admits to it, and where to look for it.
    fn take_tickets(&mut self) -> Result<(), ConfigError> {
        let joined = self.joined_file();
        // What was joined by hand may be none of this user's business, who asks the node only.
        if let Some(ticket) = self.ticket(&joined, true)? {
            self.take_ticket(ticket);
        }
        let credential = env::var_os("CREDENTIALS_DIRECTORY")
            .map(|folder| Path::new(&folder).join("ticket"))
            .filter(|file| file.exists());
        self.mesh.ticket_file = self.mesh.ticket_file.take().or(credential);
        if let Some(file) = self.mesh.ticket_file.clone()
            && let Some(ticket) = self.ticket(&file, false)?
        {
            self.take_ticket(ticket);
        }
        Ok(())
    }

    fn ticket(&self, path: &Path, may_be_absent: bool) -> Result<Option<Ticket>, ConfigError> {
        let read = match state_folder::read(path, TICKET_TEXT_BYTES_MAX as u64) {
            Err(error) if may_be_absent && error.kind() == io::ErrorKind::PermissionDenied => None,
            read => read.map_err(|source| ConfigError::Read {
                path: path.to_owned(),
                source,
            })?,
        };
        match read.map(Zeroizing::new) {
            None if may_be_absent => Ok(None),
            None => Err(ConfigError::Read {
                path: path.to_owned(),
                source: io::ErrorKind::NotFound.into(),
            }),
            Some(text) => match Ticket::from_text(&text) {
                Ok(ticket) => Ok(Some(ticket)),
                Err(problem) => Err(ConfigError::Invalid {
                    path: path.to_owned(),
                    problem: problem.to_string(),
                }),
            },
        }
    }

    fn take_ticket(&mut self, ticket: Ticket) {
        let mesh = &mut self.mesh;
        // A key in the file itself knows better, and who admits elsewhere is of no use.
        if *mesh.key.get_or_insert_with(|| ticket.mesh.clone()) != ticket.mesh {
            return;
        }
        for (list, more) in [
            (&mut mesh.admits, ticket.admits),
            (&mut mesh.peers, ticket.peers),
        ] {
            for address in more {
                if !list.contains(&address) {
                    list.push(address);
                }
            }
        }
    }

    /// Parses TOML. The error is text for a person: place, problem, nearest valid key.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| 1 + text[..span.start].matches('\n').count());
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            let list = "this table may be there several times: write its name in [[ ]]";
            let message = error
                .message()
                .replace("invalid type: map, expected a sequence", list);
            format!("{place}{}", with_nearest_key(&message))
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

    /// What `granary hide` keeps to this machine.
    pub fn hidden_file(&self) -> PathBuf {
        self.state_dir.join("hidden")
    }

    /// What was counted in the last days.
    pub fn history_file(&self) -> PathBuf {
        self.state_dir.join("history.json")
    }

    /// What the ticket said by which `granary join` joined, without its secret.
    pub fn joined_file(&self) -> PathBuf {
        self.state_dir.join("joined")
    }

    /// The secret half of the mesh key, on a machine that admits others.
    pub fn mesh_key_file(&self) -> PathBuf {
        self.state_dir.join("mesh.key")
    }

    /// The tickets that this machine gave out.
    pub fn tickets_file(&self) -> PathBuf {
        self.state_dir.join("tickets")
    }

    /// The public keys of the cache that `granary up` made, one a line.
    pub fn own_cache_keys_file(&self) -> PathBuf {
        self.state_dir.join("anchor.public-keys")
    }

    /// The machines that asked this one to be admitted.
    pub fn pending_file(&self) -> PathBuf {
        self.state_dir.join("pending")
    }

    /// The key that only this machine's nix.conf trusts.
    pub fn loopback_key_file(&self) -> PathBuf {
        self.state_dir.join("loopback-key")
    }

    /// Whom the mesh key has put out, as far as this node knows.
    pub fn revocations_file(&self) -> PathBuf {
        self.state_dir.join("revocations")
    }

    pub fn index_file(&self) -> PathBuf {
        self.state_dir.join("index.sqlite")
    }

    pub fn uploads_file(&self) -> PathBuf {
        self.state_dir.join("uploads.sqlite")
    }

    /// The `[[anchor]]` that is meant by its url, or by the last word of it, which is the cache's name.
    pub fn anchor_of(&self, cache: &str) -> Option<&Anchor> {
        let cache = cache.trim_end_matches('/');
        self.anchor.iter().find(|anchor| {
            let url = anchor.url.as_str().trim_end_matches('/');
            url == cache || url.rsplit('/').next() == Some(cache)
        })
    }

    /// Where the token for an anchor's cache is: that of the configuration, else the one that this machine gets as a
    /// member, for which it must know a key of the cache.
    pub fn token_file_of(&self, anchor: &Anchor) -> Option<PathBuf> {
        let own = || {
            // Without one the anchor is not known.
            anchor.public_keys.first()?;
            let hash = sha256(anchor.url.as_str().as_bytes());
            let name = format!("member-{}.token", nix32::encode(&hash[..10]));
            Some(self.state_dir.join(name))
        };
        anchor.token_file.clone().or_else(own)
    }

    /// The folder of the anchor's catalog, keys and spool.
    pub fn anchor_dir(&self) -> PathBuf {
        self.state_dir.join("anchor")
    }

    /// Whether this machine's configuration is an anchor's: an anchor was here, or is to be a member.
    pub fn keeps_anchor(&self) -> bool {
        self.anchor_server.member || self.anchor_dir().exists()
    }

    /// Where the anchor keeps its objects.
    pub fn anchor_storage(&self) -> String {
        match &self.anchor_server.storage {
            Some(storage) => storage.clone(),
            None => format!("file://{}", self.state_dir.join("storage").display()),
        }
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
            // Not `/nix/var/nix/…` for every store: a daemon that serves another one would hold nothing.
            daemon_socket: self
                .store
                .daemon_socket
                .clone()
                .unwrap_or_else(|| daemon_socket(state_dir(&self.store.database))),
        }
    }

    /// The folder of build logs: for `/nix/var/nix/db/db.sqlite`, `/nix/var/log/nix`.
    pub fn log_dir(&self) -> PathBuf {
        let beside = || Some(self.store.database.ancestors().nth(3)?.join("log/nix"));
        let log_dir = self.store.log_dir.clone().or_else(beside);
        log_dir.unwrap_or_else(|| PathBuf::from("/nix/var/log/nix"))
    }

    pub fn trusted_keys(&self) -> TrustedKeys {
        let anchors = self.anchor.iter().flat_map(|anchor| &anchor.public_keys);
        let upstreams = self.upstream.iter().flat_map(|one| &one.public_keys);
        let keys = self.trust.keys.iter().chain(anchors).chain(upstreams);
        keys.chain(&self.own_cache_keys).cloned().collect()
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

/// Appends "did you mean" to serde's message about an unknown field, if a valid one is near: at most one letter in three
/// differs. A guess at something else would only mislead.
fn with_nearest_key(message: &str) -> String {
    let mut words = message.split('`').skip(1).step_by(2);
    let unknown = match message.starts_with("unknown field") {
        true => words.next(),
        false => None,
    };
    let nearest = unknown.and_then(|unknown| {
        let with_distance = |valid| (strsim::damerau_levenshtein(unknown, valid), valid);
        let (distance, nearest) = words
            .map(with_distance)
            .min_by_key(|(distance, _)| *distance)?;
        let letters = unknown.chars().count().max(nearest.chars().count());
        (distance * 3 <= letters).then_some(nearest)
    });
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

fn parsed_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Url, D::Error> {
    let text = String::deserialize(deserializer)?;
    let url: Url = parse(&text).map_err(de::Error::custom)?;
    let is_web = matches!(url.scheme(), "http" | "https") && url.has_host();
    // A password in it would end up in logs; a token has a file of its own.
    let has_secret = !url.username().is_empty() || url.password().is_some();
    match (is_web, has_secret) {
        (true, false) => Ok(url),
        (true, true) => Err(de::Error::custom("url holds a user name or password")),
        (false, _) => Err(de::Error::custom(
            "url does not begin with http:// or https://",
        )),
    }
}

fn parsed_option<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    parsed(deserializer).map(Some)
}

fn one_or_several<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        Several(Vec<String>),
    }
    let texts = match Texts::deserialize(deserializer) {
        Ok(Texts::One(text)) => vec![text],
        Ok(Texts::Several(texts)) => texts,
        Err(_) => return Err(de::Error::custom("expected a text or a list of texts")),
    };
    texts
        .iter()
        .map(|text| parse(text).map_err(de::Error::custom))
        .collect()
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
        assert_eq!(config.substituter.listen[0].to_string(), "127.0.0.1:4726");
        assert_eq!(config.mesh.listen.len(), 2);
        assert!(config.share.enable && config.mesh.mdns);
        assert_eq!(
            config.store_config().daemon_socket,
            PathBuf::from("/nix/var/nix/daemon-socket/socket")
        );
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
            daemon-socket = "/x/socket"
            [substituter]
            listen = ["127.0.0.1:1", "unix:/run/granary/socket"]
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
            [[anchor]]
            url = "https://nas.lan:4730/main"
            token-file = "/t"
            [[upstream]]
            url = "https://cache.nixos.org"
            [[upstream]]
            url = "http://other.example/cache"
            public-keys = ["cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]
            [upload]
            cache = "main"
            filter = ["^linux-"]
            sources = true
            rate = "50MB/s"
            [limits]
            streams-per-peer = 4
            [anchor-server]
            listen = "0.0.0.0:3"
            storage = "s3://bucket/prefix"
            default-cache = "team"
            nar-bytes-max = 1000
            attic-token-key-file = "/a"
            [anchor-server.s3]
            endpoint = "http://127.0.0.1:9000"
            region = "garage"
            credentials-file = "/k"
            ca-file = "/ca"
            virtual-hosted = true
            "#,
        )
        .unwrap();
        assert_eq!(config.certificate_file(), PathBuf::from("/c"));
        assert_eq!(config.log_dir(), PathBuf::from("/x/nix/var/log/nix"));
        assert_eq!(config.substituter.listen.len(), 2);
        assert_eq!(config.identity_file(), PathBuf::from("/s/identity"));
        assert!(config.share.deny[1].is_match("my.key"));
        assert_eq!(config.anchor_storage(), "s3://bucket/prefix");
        assert_eq!(config.anchor_dir(), PathBuf::from("/s/anchor"));
        assert_eq!(config.anchor[0].token_file, Some(PathBuf::from("/t")));
        assert_eq!(
            config.upstream[1].url.as_str(),
            "http://other.example/cache"
        );
        assert_eq!(config.upload.rate, Some(Rate(50_000_000)));
        let target = config.anchor_of(config.upload.cache.as_deref().unwrap());
        assert_eq!(target.unwrap().url, config.anchor[0].url);
        let name = config.upstream[1].public_keys[0].name();
        assert!(config.trusted_keys().contains_name(name));
        assert_eq!(
            config.store_config().real_dir,
            PathBuf::from("/x/nix/store")
        );
        assert_eq!(
            config.store_config().daemon_socket,
            PathBuf::from("/x/socket")
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
        let text = problem("[substituter]\nlitsen = \"127.0.0.1:1\"");
        assert!(text.contains("did you mean `listen`"), "{text}");
        // What is like nothing there is gets no guess; serde lists what there is.
        for unknown in ["[mesh]\npassword = 1", "[trust]\nx = 1", "[cachix]"] {
            let text = problem(unknown);
            assert!(
                text.contains("unknown field") && !text.contains("did you mean"),
                "{text}"
            );
            assert!(text.contains("expected"), "{text}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        assert!(problem("[substituter]\nlisten = \"here\"").contains("line 2"));
        assert!(problem("[substituter]\nlisten = [\"unix:here\"]").contains("unix:here"));
        assert!(problem("[substituter]\nlisten = 4726").contains("line 2"));
        assert!(problem("[substituter]\nlisten = []").contains("substituter.listen"));
        // The value is not repeated: it may be a secret key in the wrong place.
        assert!(problem("[mesh]\nkey = \"home\"").contains("line 2: public key"));
        assert!(problem("[mesh]\npeers = [\"nas\"]").contains("nas"));
        assert!(problem("[share]\ndeny = [\"(\"]").contains("regex"));
        assert!(problem("[store]\ndir = \"nix\"").contains("nix"));
        let key = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        assert!(problem(&format!("[mesh]\nkey = {key:?}\nlisten = []")).contains("mesh.listen"));
        assert!(problem("[limits]\nstreams-per-peer = 0").contains("streams-per-peer"));
        assert!(problem("[[upstream]]\nurl = \"file:///x\"").contains("http://"));
        let closed = problem("[share]\nenable = false\nhttp = \"0.0.0.0:4729\"");
        assert!(closed.contains("share.enable"), "{closed}");
        let remarks = |text: &str| Config::parse(text).unwrap().remarks().len();
        assert_eq!(remarks("[share]\nhttp = \"0.0.0.0:4729\""), 2);
        assert_eq!(remarks("[share]\nhttp = \"127.0.0.1:4729\""), 1);
        assert!(problem("[[upstream]]").contains("url"));
        for rate in ["0MB/s", "1", "fast", "1MB", "99999999999999GB/s", "-1kB/s"] {
            assert!(problem(&format!("[upload]\nrate = {rate:?}")).contains("50MB/s"));
        }
        let anchor = "[[anchor]]\nurl = \"http://nas.lan:4730/main\"\n";
        assert!(problem(&format!("{anchor}[upload]\ncache = \"team\"")).contains("ends in it"));
        assert!(problem(&format!("{anchor}[upload]\ncache = \"main\"")).contains("token-file"));
        let text = problem("[[anchor]]\nurl = \"https://me:secret@nas.lan\"");
        assert!(text.contains("password"), "{text}");
    }
}
