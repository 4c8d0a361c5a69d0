//! `granary anchor`, `cache`, `token` and `rm`: the anchor from the machine that it runs on.
//!
//! All but `anchor` itself open the anchor's state folder and storage, beside a running anchor or
//! without one; a running one sees what they did with its next request.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use granary_protocol::certificate::UnixTime;
use granary_protocol::hash::NarHash;
use granary_protocol::signature::SecretKey;
use granary_protocol::token::{Claims, Grant, Pattern, Permission};
use zeroize::Zeroizing;

use super::{ConfigFile, SECONDS_PER_DAY, import, node, print};
use crate::anchor::admin::Changes;
use crate::anchor::cache::CacheName;
use crate::anchor::catalog::{CacheRow, Totals};
use crate::anchor::gc::Collection;
use crate::anchor::object_store::S3Options;
use crate::anchor::scrub::{Damaged, Scrubbed};
use crate::anchor::server::{ADDRESS_FILE, Server, StartError, StateLock, nearest};
use crate::anchor::sizes::Statistics;
use crate::anchor::tls::Files;
use crate::anchor::tokens::token_key;
use crate::anchor::{Anchor, Clock, Options, heal, members, oidc, rebuild};
use crate::authority::Authorities;
use crate::clock::unix_time;
use crate::config::{self, Config};
use crate::daemon::Holdings;
use crate::listener::Address;
use crate::status::{self, counted, form, human_bytes};

/// How long the token is good for by which the command line asks a running anchor.
const OWN_TOKEN_SECONDS: u64 = 60;

/// Longest key file or token read from a file or standard input.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(flatten)]
    pub config: ConfigFile,
    #[command(subcommand)]
    command: Option<AnchorCommand>,
}

#[derive(Subcommand)]
enum AnchorCommand {
    /// Make the catalog anew from what is in storage, while no anchor runs.
    Rebuild(ConfigFile),
    /// Take over what another server kept, while no anchor runs. Run again, it goes on.
    #[command(subcommand)]
    Import(import::Arguments),
    /// Read everything that is stored again; bring what is damaged from whoever has it, and keep back the rest.
    ///
    /// Ends with status 1 when something stays damaged, or could not be read. Beside a running anchor, or without one.
    Scrub {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
}

#[derive(Args)]
pub struct CacheArguments {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Subcommand)]
enum CacheCommand {
    /// Make a cache and print its public key.
    Create {
        /// The cache.
        name: CacheName,
        #[command(flatten)]
        settings: Settings,
        /// Sign with the key in this file (as `nix-store --generate-binary-cache-key` writes it).
        #[arg(long)]
        key_file: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// List all caches.
    List {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Show a cache: its keys, settings and size.
    Info {
        /// The cache.
        name: CacheName,
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Change settings of a cache.
    Configure {
        /// The cache.
        name: CacheName,
        #[command(flatten)]
        settings: Settings,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Sign with another key; the old one goes on signing until it is retired.
    RotateKey {
        /// The cache.
        name: CacheName,
        /// The key in this file rather than a new one.
        #[arg(long, conflicts_with = "retire")]
        key_file: Option<PathBuf>,
        /// End the rotation: only the newest key signs, and older signatures are removed.
        #[arg(long)]
        retire: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Delete a cache and everything in it.
    Delete {
        /// The cache.
        name: CacheName,
        /// Really.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
}

/// Settings that can be given and changed.
#[derive(Args)]
struct Settings {
    /// Anybody may read it.
    #[arg(long, conflicts_with = "private")]
    public: bool,
    /// Only bearers of a token may read it.
    #[arg(long)]
    private: bool,
    /// Lower is asked earlier by Nix; cache.nixos.org has 40.
    #[arg(long, allow_negative_numbers = true)]
    priority: Option<i32>,
    /// Name of a key whose paths need not be pushed; may be repeated. With any, references that the
    /// cache does not hold are accepted.
    #[arg(long = "upstream-key")]
    upstream_keys: Vec<String>,
    /// Days that a path is kept since it, or something that references it, was last used; or `forever`.
    #[arg(long, value_parser = retention)]
    retention: Option<Retention>,
    /// What a collection brings it down to in storage, least recently used closures first: 200GB, or `none`.
    #[arg(long, value_parser = size_limit)]
    size_cap: Option<SizeLimit>,
    /// What it may have in storage, beyond which pushes are refused: 250GB, or `none`.
    #[arg(long, value_parser = size_limit)]
    quota: Option<SizeLimit>,
    /// What each token subject may have pushed of that, beyond which its pushes are refused: 20GB, or `none`.
    #[arg(long, value_parser = size_limit)]
    subject_quota: Option<SizeLimit>,
}

/// Bytes in storage; `None` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SizeLimit(Option<u64>);

fn size_limit(text: &str) -> Result<SizeLimit, String> {
    if text == "none" {
        return Ok(SizeLimit(None));
    }
    let error =
        || format!("{text:?} is no size, expected none or a number with MB, GB or TB: 200GB");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
    let (number, unit) = text.split_at(digits);
    let unit: u64 = match unit.trim_start() {
        "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(error()),
    };
    let bytes = number
        .parse()
        .ok()
        .and_then(|number| unit.checked_mul(number));
    let bytes = bytes.filter(|bytes| *bytes > 0).ok_or_else(error)?;
    Ok(SizeLimit(Some(bytes)))
}

/// How long paths are kept, in seconds; `None` for ever.
#[derive(Clone, Copy)]
struct Retention(Option<u64>);

fn retention(text: &str) -> Result<Retention, String> {
    if text == "forever" {
        return Ok(Retention(None));
    }
    let days = text.parse::<u64>().ok().filter(|days| *days > 0);
    let seconds = days.and_then(|days| days.checked_mul(SECONDS_PER_DAY));
    let seconds = seconds.ok_or("expected a number of days, or forever")?;
    Ok(Retention(Some(seconds)))
}

impl Settings {
    fn changes(self) -> Changes {
        Changes {
            public: match (self.public, self.private) {
                (true, _) => Some(true),
                (_, true) => Some(false),
                _ => None,
            },
            priority: self.priority,
            store_dir: None,
            upstream_keys: Some(self.upstream_keys).filter(|keys| !keys.is_empty()),
            retention: self.retention.map(|Retention(seconds)| seconds),
            size_cap: self.size_cap.map(|SizeLimit(bytes)| bytes),
            quota: self.quota.map(|SizeLimit(bytes)| bytes),
            subject_quota: self.subject_quota.map(|SizeLimit(bytes)| bytes),
            ..Changes::default()
        }
    }
}

#[derive(Args)]
pub struct RmArguments {
    /// The cache.
    cache: CacheName,
    /// Store paths, their base names or hashes.
    #[arg(required = true)]
    paths: Vec<String>,
    #[command(flatten)]
    config: ConfigFile,
}

#[derive(Args)]
pub struct GcArguments {
    /// Only say what would be deleted.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub(super) fn options(config: &Config) -> Result<Options> {
    let server = &config.anchor_server;
    Ok(Options {
        state: config.anchor_dir(),
        storage: config.anchor_storage(),
        s3: S3Options {
            endpoint: server.s3.endpoint.clone(),
            region: server.s3.region.clone(),
            credentials_file: server.s3.credentials_file.clone(),
            ca_file: server.s3.ca_file.clone(),
            virtual_hosted: server.s3.virtual_hosted,
            redirect: server.s3.redirect,
        },
        trust: config.trusted_keys(),
        attic_key: server.attic_token_key_file.clone(),
        oidc: issuers(&server.oidc),
        // Who was put out is heard by members.
        members: server.member.then(|| members(config)).flatten(),
        nar_bytes_max: server.nar_bytes_max,
        tls: match (&server.tls_cert, &server.tls_key) {
            (Some(certificate), Some(key)) => Some(Files {
                certificate: certificate.clone(),
                key: key.clone(),
            }),
            // One without the other is no configuration.
            _ => None,
        },
        scrub_after: server
            .scrub_days
            .map(|days| Duration::from_secs(days * SECONDS_PER_DAY)),
        heal_from: sources(config)?,
        clock: Clock::default(),
    })
}

/// Whose certificates get tokens.
pub(super) fn members(config: &Config) -> Option<members::Options> {
    Some(members::Options {
        mesh: config.mesh.key.clone()?,
        revocations: config.revocations_file(),
        certificate: config.certificate_file(),
    })
}

/// Who may have what storage lost: the node on this machine, whether it runs or not, and upstreams.
fn sources(config: &Config) -> Result<Vec<heal::Source>> {
    let mut sources = Vec::new();
    let tcp = |address: &Address| match address {
        Address::Tcp(address) => Some(nearest(*address)),
        Address::Unix(_) => None,
    };
    if let Some(address) = config.substituter.listen.iter().find_map(tcp) {
        sources.push(heal::Source {
            url: format!("http://{address}").parse()?,
            authorities: Authorities::default(),
        });
    }
    for upstream in &config.upstream {
        sources.push(heal::Source {
            url: upstream.url.clone(),
            authorities: Authorities::read(upstream.ca_file.as_deref())?,
        });
    }
    Ok(sources)
}

/// Entries about one issuer, made for one audience, share its keys.
fn issuers(entries: &[config::Oidc]) -> Vec<oidc::Options> {
    let mut issuers: Vec<oidc::Options> = Vec::new();
    for entry in entries {
        let shapes = entry.claims.iter();
        let grant = |pattern: &Pattern| Grant {
            pattern: pattern.clone(),
            permissions: entry.allow.clone(),
        };
        let rule = oidc::Rule {
            claims: shapes
                .map(|(name, shape)| (name.clone(), shape.0.clone()))
                .collect(),
            grants: entry.caches.iter().map(grant).collect(),
        };
        let known = issuers.iter_mut().find(|known| {
            known.issuer == entry.issuer
                && known.audience == entry.audience
                && known.jwks_url == entry.jwks_url
                && known.ca_file == entry.ca_file
        });
        match known {
            Some(known) => known.rules.push(rule),
            None => issuers.push(oidc::Options {
                issuer: entry.issuer.clone(),
                audience: entry.audience.clone(),
                jwks_url: entry.jwks_url.clone(),
                ca_file: entry.ca_file.clone(),
                token_seconds: oidc::TOKEN_SECONDS,
                rules: vec![rule],
            }),
        }
    }
    issuers
}

pub(super) async fn open(config: &ConfigFile) -> Result<(Config, Arc<Anchor>)> {
    let config = config.load()?;
    let folder = config.anchor_dir();
    let is_new = !folder.exists();
    let anchor = Anchor::open(options(&config)?).await?;
    if is_new {
        // Likelier than an anchor that is to be made is one elsewhere, of which this would know nothing.
        eprintln!(
            "note: no anchor has run with {}, which was made; if yours is another machine's or user's, say this there (with the package: granary-anchor instead of granary)",
            folder.display()
        );
    }
    Ok((config, anchor))
}

pub async fn run(arguments: Arguments) -> Result<()> {
    if let Some(AnchorCommand::Scrub { json, config }) = arguments.command {
        return scrub(&config.load()?, json).await;
    }
    if let Some(AnchorCommand::Rebuild(config)) = arguments.command {
        let options = options(&config.load()?)?;
        let _lock = StateLock::take(&options.state)?;
        let found = rebuild::rebuild(&options).await?;
        return print(&format!(
            "found {} with {}; left out {}\n",
            counted(found.caches as u64, "cache"),
            counted(found.paths as u64, "path"),
            counted(found.left_out as u64, "object")
        ));
    }
    if let Some(AnchorCommand::Import(arguments)) = arguments.command {
        return import::run(arguments).await;
    }
    let config = arguments.config.load()?;
    if config.anchor_server.member && config.mesh.key.is_none() {
        bail!(
            "anchor-server.member is true, but this anchor has joined no mesh, refusing to start\nhint: run granary join <ticket> (with the package: granary-anchor join <ticket>), or set mesh.ticket-file"
        );
    }
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let default_cache =
        Some(config.anchor_server.default_cache.as_str()).filter(|name| !name.is_empty());
    let server = Server::start(
        options(&config)?,
        config.anchor_server.listen,
        default_cache,
    )
    .await?;
    let outcome = if config.anchor_server.member {
        let holdings = Holdings::Anchor(server.anchor.clone());
        node(config, holdings, || Ok(())).await
    } else {
        tokio::select! {
            _ = terminate.recv() => {}
            interrupted = tokio::signal::ctrl_c() => interrupted?,
        }
        tracing::info!("stopping");
        Ok(())
    };
    server.stop().await;
    outcome
}

pub async fn cache(arguments: CacheArguments) -> Result<()> {
    match arguments.command {
        CacheCommand::Create {
            name,
            settings,
            key_file,
            config,
        } => {
            let key = key_file.as_deref().map(read_key).transpose()?;
            let (_, anchor) = open(&config).await?;
            let cache = anchor.create_cache(&name, &settings.changes(), key).await?;
            print(&format!("{}\n", cache.settings.public_keys.join("\n")))
        }
        CacheCommand::List { json, config } => {
            let (_, anchor) = open(&config).await?;
            let mut rows = Vec::new();
            for cache in anchor.catalog.caches().await? {
                let totals = anchor.catalog.totals(Some(cache.id)).await?;
                rows.push((cache, totals));
            }
            if json {
                let rows: Vec<_> = rows
                    .iter()
                    .map(|(cache, totals)| as_json(cache, totals))
                    .collect();
                return print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
            }
            let lines = rows.iter().map(|(cache, totals)| {
                let access = if cache.settings.public {
                    "public"
                } else {
                    "private"
                };
                format!(
                    "{}  {access}  {}, {} in storage\n",
                    cache.name,
                    counted(totals.paths, "path"),
                    human_bytes(totals.file_bytes)
                )
            });
            print(&lines.collect::<String>())
        }
        CacheCommand::Info { name, json, config } => {
            let (config, anchor) = open(&config).await?;
            let cache = anchor.catalog.cache(&name).await?;
            let cache = cache.with_context(|| format!("there is no cache {name}"))?;
            let statistics = anchor.catalog.statistics(cache.id).await?;
            if json {
                let mut told = serde_json::to_value(statistics)?;
                told["name"] = cache.name.as_str().into();
                told["settings"] = serde_json::to_value(&cache.settings)?;
                return print(&format!("{}\n", serde_json::to_string_pretty(&told)?));
            }
            let server = &config.anchor_server;
            let scheme = if server.tls_cert.is_some() {
                "https"
            } else {
                "http"
            };
            let address = format!("{scheme}://<this machine>:{}", server.listen.port());
            print(&info(&cache, &statistics, &address, unix_time().0))
        }
        CacheCommand::Configure {
            name,
            settings,
            config,
        } => {
            let (_, anchor) = open(&config).await?;
            let changes = settings.changes();
            if changes == Changes::default() {
                bail!("nothing is to be changed; see granary cache configure --help");
            }
            anchor.configure_cache(&name, &changes).await?;
            Ok(())
        }
        CacheCommand::RotateKey {
            name,
            key_file,
            retire,
            config,
        } => {
            let key = key_file.as_deref().map(read_key).transpose()?;
            let config = config.load()?;
            let keys = match Running::find(&config)? {
                Ok(running) => {
                    let key = key.as_ref().map(|key| key.to_nix_string().to_string());
                    let body = serde_json::json!({ "key": key, "retire": retire }).to_string();
                    let target = format!("caches/{name}/keys");
                    let answer = running.ask(reqwest::Method::POST, &target, body).await?;
                    serde_json::from_str::<Rotated>(&answer)?.public_keys
                }
                Err(_lock) => {
                    let anchor = Anchor::open(options(&config)?).await?;
                    let cache = anchor.rotate_key(&name, key, retire).await?;
                    cache.settings.public_keys
                }
            };
            print(&format!("{}\n", keys.join("\n")))
        }
        CacheCommand::Delete { name, yes, config } => {
            if !yes {
                bail!("this deletes cache {name} and every path in it; say --yes");
            }
            let (_, anchor) = open(&config).await?;
            Ok(anchor.delete_cache(&name).await?)
        }
    }
}

fn info(cache: &CacheRow, statistics: &Statistics, server: &str, now: u64) -> String {
    let settings = &cache.settings;
    let access = if settings.public { "public" } else { "private" };
    let mut text = format!("{}  {access}, priority {}\n", cache.name, settings.priority);
    text.push_str(&format!("  address           {server}/{}\n", cache.name));
    for key in &settings.public_keys {
        text.push_str(&format!("  public key        {key}\n"));
    }
    for name in &settings.upstream_keys {
        text.push_str(&format!("  upstream key      {name}\n"));
    }
    let retention = match settings.retention {
        Some(seconds) => {
            let days = counted(seconds / SECONDS_PER_DAY, "day");
            format!("{days} since last use")
        }
        None => "for ever".to_owned(),
    };
    text.push_str(&format!(
        "  kept              {retention}, {} pinned\n",
        settings.pinned().count()
    ));
    let limits = [("size cap", settings.size_cap), ("quota", settings.quota)];
    for (limit, bytes) in limits {
        if let Some(bytes) = bytes {
            let part = statistics.file_bytes as f64 * 100.0 / bytes as f64;
            text.push_str(&format!(
                "  {limit:<18}{}, {part:.0} % of it in use\n",
                human_bytes(bytes)
            ));
        }
    }
    if let Some(bytes) = settings.subject_quota {
        let bytes = human_bytes(bytes);
        text.push_str(&format!("  subject quota     {bytes} for each\n"));
    }
    text.push_str(&format!("  paths             {}\n", statistics.paths));
    if statistics.damaged_paths > 0 {
        text.push_str(&format!(
            "  damaged           {} of them, not served until they are pushed again\n",
            statistics.damaged_paths
        ));
    }
    text.push_str(&format!(
        "  nars              {}, {} unpacked, {} in storage, {} of it shared with other caches\n",
        statistics.nars,
        human_bytes(statistics.nar_bytes),
        human_bytes(statistics.file_bytes),
        human_bytes(statistics.shared_file_bytes),
    ));
    let times = [
        ("last push", statistics.last_pushed),
        ("last use", statistics.last_used),
        ("longest unused", statistics.least_recently_used),
    ];
    for (what, time) in times {
        if let Some(time) = time {
            let age = human_age(now.saturating_sub(time));
            text.push_str(&format!("  {what:<18}{age} ago\n"));
        }
    }
    text
}

fn human_age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} seconds"),
        120..7200 => format!("{} minutes", seconds / 60),
        7200..172_800 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / SECONDS_PER_DAY),
    }
}

fn as_json(cache: &CacheRow, totals: &Totals) -> serde_json::Value {
    serde_json::json!({
        "name": cache.name.as_str(),
        "settings": cache.settings,
        "paths": totals.paths,
        "nar_bytes": totals.nar_bytes,
        "file_bytes": totals.file_bytes,
    })
}

fn read_key(path: &Path) -> Result<SecretKey> {
    let read = || format!("cannot read the signing key {}", path.display());
    let file = std::fs::File::open(path).with_context(read)?;
    let mut text = Zeroizing::new(String::new());
    file.take(SECRET_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(read)?;
    text.trim()
        .parse()
        .with_context(|| format!("{} is no signing key", path.display()))
}

/// What the running anchor says of a rotation.
#[derive(serde::Deserialize)]
struct Rotated {
    public_keys: Vec<String>,
}

/// Asks the running anchor to do what must not be done beside it, as somebody who may.
struct Running {
    client: reqwest::Client,
    base: String,
    key: SecretKey,
}

impl Running {
    /// `None` when no anchor runs; then the lock keeps one from starting meanwhile.
    fn find(config: &Config) -> Result<Result<Running, StateLock>> {
        let state = config.anchor_dir();
        match StateLock::take(&state) {
            Ok(lock) => return Ok(Err(lock)),
            Err(StartError::Running { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let file = state.join(ADDRESS_FILE);
        let address = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "cannot read where the anchor listens from {}",
                file.display()
            )
        })?;
        let address: SocketAddr = address.trim().parse()?;
        // The anchor is here: no proxy leads to it.
        let client = reqwest::Client::builder().no_proxy().build()?;
        Ok(Ok(Running {
            client,
            base: format!("http://{address}/api/v1"),
            key: token_key(&state)?,
        }))
    }

    async fn ask(&self, method: reqwest::Method, rest: &str, body: String) -> Result<String> {
        let claims = Claims {
            // Too short-lived to be listed or revoked.
            id: None,
            subject: "command line".to_owned(),
            not_before: None,
            expires: Some(UnixTime(unix_time().0 + OWN_TOKEN_SECONDS)),
            grants: vec![Grant {
                pattern: "*".parse()?,
                permissions: vec![Permission::Delete, Permission::Configure],
            }],
        };
        let token = claims.mint(&self.key);
        let request = self.client.request(method, format!("{}/{rest}", self.base));
        let request = request.body(body);
        let response = request.bearer_auth(&token).send().await;
        let response = response.context("cannot reach the running anchor")?;
        let status = response.status();
        let text = response.text().await?;
        if !status.is_success() {
            let reason: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            bail!("{}", reason["message"].as_str().unwrap_or(status.as_str()));
        }
        Ok(text)
    }
}

pub async fn rm(arguments: RmArguments) -> Result<()> {
    let config = arguments.config.load()?;
    let running = Running::find(&config)?;
    let anchor = Anchor::open(options(&config)?).await?;
    let name = &arguments.cache;
    let cache = anchor.catalog.cache(name).await?;
    let cache = cache.with_context(|| format!("there is no cache {name}"))?;
    let dir = cache.settings.store_dir()?;
    for path in &arguments.paths {
        let hash = status::hash_of(path, &dir);
        let hash = hash.with_context(|| format!("{path:?} is no store path and no hash of one"))?;
        match &running {
            Ok(running) => {
                let target = format!("caches/{name}/paths/{hash}");
                running
                    .ask(reqwest::Method::DELETE, &target, String::new())
                    .await
                    .with_context(|| path.clone())?;
            }
            Err(_lock) => {
                if !anchor.remove_path(&cache, hash).await? {
                    bail!("{path}: cache {name} does not hold it");
                }
            }
        }
    }
    Ok(())
}

async fn scrub(config: &Config, json: bool) -> Result<()> {
    let running = Running::find(config)?;
    let own = match &running {
        Ok(_) => None,
        Err(_lock) => Some(Anchor::open(options(config)?).await?),
    };
    let mut all = Scrubbed::default();
    loop {
        let after = all.next.take();
        let piece: Scrubbed = match (&running, &own) {
            (_, Some(anchor)) => {
                let after = after.as_deref().map(NarHash::from_nix32).transpose()?;
                anchor.scrub(after).await?
            }
            (Ok(running), None) => {
                let question = serde_json::json!({ "after": after }).to_string();
                let answer = running
                    .ask(reqwest::Method::POST, "scrub", question)
                    .await?;
                serde_json::from_str(&answer)?
            }
            (Err(_lock), None) => unreachable!("without a running anchor there is our own"),
        };
        all.nars += piece.nars;
        all.file_bytes += piece.file_bytes;
        all.unread += piece.unread;
        if !json {
            for damaged in &piece.damaged {
                print(&damaged_line(damaged))?;
            }
        }
        all.damaged.extend(piece.damaged);
        all.next = piece.next;
        if all.next.is_none() {
            break;
        }
    }
    match json {
        true => print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?,
        false => print(&format!(
            "read {} ({})\n",
            counted(all.nars, "nar"),
            human_bytes(all.file_bytes)
        ))?,
    }
    let damaged = all.damaged.iter().filter(|damaged| !damaged.healed);
    match (damaged.count(), all.unread) {
        (0, 0) => Ok(()),
        (damaged, unread) => bail!(
            "{damaged} nars are damaged, {unread} could not be read\nhint: a damaged path is served again when a machine that has it comes back, or pushes it"
        ),
    }
}

fn damaged_line(damaged: &Damaged) -> String {
    let mut paths = damaged.paths.join(", ");
    let more = damaged.of.saturating_sub(damaged.paths.len() as u64);
    if more > 0 {
        paths.push_str(&format!(" and {more} more"));
    }
    let healed = match damaged.healed {
        true => ", brought again and served",
        false => "",
    };
    format!(
        "{}: {}{healed} ({paths})\n",
        damaged.nar_hash, damaged.problem
    )
}

pub async fn gc(arguments: GcArguments) -> Result<()> {
    let config = arguments.config.load()?;
    let collection = match (Running::find(&config)?, arguments.dry_run) {
        (Ok(running), is_plan) => {
            let method = match is_plan {
                true => reqwest::Method::GET,
                false => reqwest::Method::POST,
            };
            let answer = running.ask(method, "collection", String::new()).await?;
            serde_json::from_str(&answer)?
        }
        (Err(_lock), true) => Anchor::open(options(&config)?).await?.plan().await?,
        (Err(_lock), false) => {
            let anchor = Anchor::open(options(&config)?).await?;
            anchor.collect().await?
        }
    };
    if arguments.json {
        return print(&format!("{}\n", serde_json::to_string_pretty(&collection)?));
    }
    print(&collected(&collection, arguments.dry_run))
}

fn collected(collection: &Collection, is_plan: bool) -> String {
    let verb = if is_plan { "would delete" } else { "deleted" };
    let mut text = String::new();
    for expired in &collection.caches {
        if let Some(refused) = &expired.refused {
            text.push_str(&format!("{refused}\n"));
            continue;
        }
        for path in expired.paths.iter().filter(|_| is_plan) {
            text.push_str(&format!("{}  {path}\n", expired.cache));
        }
        let for_cap = match expired.over_cap {
            0 => String::new(),
            count => format!(", {count} of them for the size cap"),
        };
        text.push_str(&format!(
            "{}: {verb} {} of {}{for_cap}\n",
            expired.cache,
            expired.paths.len(),
            counted(expired.of as u64, "path")
        ));
    }
    text.push_str(&format!(
        "{verb} {} ({}) and {}; {} without a path {} for a day\n",
        counted(collection.nars, "nar"),
        human_bytes(collection.nar_file_bytes),
        counted(collection.orphans, "unknown object"),
        counted(collection.waiting, "nar"),
        form(collection.waiting, "waits", "wait"),
    ));
    if collection.spared > 0 {
        text.push_str(&format!(
            "kept {} that narinfos in storage name which the catalog does not know, see the log\n",
            counted(collection.spared, "nar")
        ));
    }
    if collection.failed > 0 {
        text.push_str(&format!(
            "storage failed for {}, see the log; the next collection tries again\n",
            counted(collection.failed, "object")
        ));
    }
    text
}
