//! `granary up`: from nothing to a running node with an anchor beside it, in one process.
//!
//! What is missing is made in the state folder, each file with mode 0600: the mesh key, a certificate
//! of this machine, a token for its own pushes. What is there and good is kept, so running it again
//! changes nothing. The configuration may say more, and wins.
//!
//! At a terminal it also makes a ticket for the next machine and shows it. Where what it says is kept, in a
//! journal or a file, it says how to make one: a ticket is a secret.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use granary_protocol::certificate::SignedCertificate;
use granary_protocol::peer::PeerId;
use granary_protocol::signature::PublicKey;
use granary_protocol::token::Permission;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use tracing::warn;
use zeroize::Zeroizing;

use super::anchor::{members, options};
use super::mesh::ticket::{self, Terms};
use super::mesh::{CERTIFICATE_DAYS, certify, make_own_mesh_key, remember_own_mesh};
use super::nix_conf;
use super::token::new_token;
use super::{ConfigFile, SECONDS_PER_DAY, node, print};
use crate::admission::{host_name, read_mesh_key};
use crate::anchor::Anchor;
use crate::anchor::cache::CacheName;
use crate::anchor::server::{Server, nearest};
use crate::clock::unix_time;
use crate::config::{self, Config};
use crate::daemon::{Holdings, make_state_dir};
use crate::identity::Identity;
use crate::log::chain;
use crate::state_folder;
use crate::upload::read_token;

/// Days that the token for this machine's own pushes is good for. Whoever has the state folder can make others, so
/// that a short life would protect nothing.
const TOKEN_DAYS: u64 = 365;

/// Days before its end at which it is made anew, at a start: a process that stays so long keeps it.
const TOKEN_RENEWAL_DAYS: u64 = 180;

/// Largest certificate file looked at.
const CERTIFICATE_BYTES_MAX: u64 = 16 * 1024;

/// How long the ticket is good that is shown at a terminal: whoever reads it goes to the next machine with it,
/// and who finds it in the scrollback later finds nothing.
const TICKET_LIFE: Duration = Duration::from_secs(3600);

const MESH_NAME: &str = "granary-mesh";

#[derive(Args)]
pub struct Arguments {
    /// Keep everything here instead of in the configured state folder.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub config: ConfigFile,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let mut config = arguments.config.load()?;
    let is_elsewhere = arguments.state_dir.is_some();
    if let Some(state_dir) = arguments.state_dir {
        config.state_dir = std::path::absolute(&state_dir)
            .with_context(|| format!("{} is no path", state_dir.display()))?;
    }
    make_state_dir(&config.state_dir).with_context(|| {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    })?;
    let admits = join_own_mesh(&mut config)?;
    let default_cache = config.anchor_server.default_cache.clone();
    if default_cache.is_empty() {
        bail!("anchor-server.default-cache is empty, and builds would have no place to go");
    }
    if config.anchor_server.tls_cert.is_some() {
        bail!(
            "with anchor-server.tls-cert, run granary anchor and granary node, and name the anchor in an [[anchor]], or granary anchor alone with anchor-server.member = true: granary up does not know by which name its certificate is good"
        );
    }
    let listen = config.anchor_server.listen;
    let mut options = options(&config)?;
    options.members = members(&config);
    let server = Server::start(options, listen, Some(&default_cache)).await?;
    let prepared = use_own_anchor(&mut config, &server, &default_cache).await;
    let outcome = match prepared {
        Ok(key) => {
            let text = lines(&config, server.address, &key, admits, is_elsewhere)?;
            let holdings = Holdings::StoreAndAnchor(server.anchor.clone());
            node(config, holdings, move || print(&text)).await
        }
        Err(error) => Err(error),
    };
    server.stop().await;
    outcome
}

/// Makes this machine a member of its mesh, which is made if there is none; returns whether it admits
/// others.
fn join_own_mesh(config: &mut Config) -> Result<bool> {
    let key_file = config.mesh_key_file();
    let key = match (key_file.exists(), &config.mesh.key) {
        (true, _) => read_mesh_key(&key_file)?,
        (false, None) => make_own_mesh_key(config, MESH_NAME)?,
        // A mesh that another machine admits to.
        (false, Some(_)) => return Ok(false),
    };
    let public = key.public_key();
    match &config.mesh.key {
        Some(configured) if *configured != public => return Ok(false),
        Some(_) => {}
        None => {
            remember_own_mesh(config, &public)?;
            config.mesh.key = Some(public.clone());
        }
    }
    let identity = Identity::load_or_create(&config.identity_file())?;
    let peer = PeerId::from_public_key(identity.public_key());
    let file = config.certificate_file();
    if !is_good(&file, &public, &peer) {
        let permissions = "share,vouch".parse()?;
        let (_, text) = certify(&key, peer, host_name(), permissions, CERTIFICATE_DAYS)?;
        state_folder::write(&file, format!("{text}\n").as_bytes())
            .with_context(|| format!("cannot write the certificate to {}", file.display()))?;
    }
    Ok(true)
}

/// Whether a certificate is there that makes this machine a member.
fn is_good(file: &Path, mesh: &PublicKey, peer: &PeerId) -> bool {
    let Ok(Some(text)) = state_folder::read(file, CERTIFICATE_BYTES_MAX) else {
        return false;
    };
    let Ok(certificate) = SignedCertificate::from_text(&text) else {
        return false;
    };
    // One that ends soon is renewed by the node that it lets start.
    certificate.verify(mesh, peer, unix_time()).is_ok()
}

/// Has the node ask the anchor beside it, and push to it; returns the cache's public key.
async fn use_own_anchor(config: &mut Config, server: &Server, cache: &str) -> Result<String> {
    let name = CacheName::new(cache)?;
    let row = server.anchor.catalog.cache(&name).await?;
    let row = row.with_context(|| format!("the anchor has no cache {cache}"))?;
    let keys = row.settings.public_keys;
    let token_file = config.state_dir.join("anchor.token");
    if !allows_push(&server.anchor, &token_file, &name).await? {
        let subject = "this machine".to_owned();
        let patterns = vec![cache.parse()?];
        let allow = [Permission::Pull, Permission::Push];
        let token = new_token(
            config,
            &server.anchor,
            subject,
            patterns,
            &allow,
            TOKEN_DAYS,
        )
        .await?;
        state_folder::write(&token_file, format!("{token}\n").as_bytes())
            .with_context(|| format!("cannot write the token to {}", token_file.display()))?;
    }
    // What this anchor signs this machine's Nix shall believe, so `granary use` must know of it.
    let file = config.own_cache_keys_file();
    state_folder::write(&file, format!("{}\n", keys.join("\n")).as_bytes())
        .with_context(|| format!("cannot write {}", file.display()))?;
    let url = format!("http://{}/{cache}", nearest(server.address)).parse()?;
    let public_keys = keys.iter().map(|key| key.parse());
    let own = config::Anchor {
        url,
        token_file: Some(token_file),
        ca_file: None,
        public_keys: public_keys.collect::<Result<_, _>>()?,
    };
    if config.upload.cache.is_none() {
        config.upload.cache = Some(own.url.to_string());
    }
    // Unless the configuration has it, which then knows better.
    if !config.anchor.iter().any(|anchor| anchor.url == own.url) {
        config.anchor.insert(0, own);
    }
    keys.into_iter()
        .next()
        .with_context(|| format!("cache {cache} has no key"))
}

/// Whether the token in this file is good for a while.
async fn allows_push(anchor: &Anchor, file: &Path, cache: &CacheName) -> Result<bool> {
    if !file.exists() {
        return Ok(false);
    }
    let token = read_token(&file.to_owned())?;
    let Ok(value) = HeaderValue::from_str(&format!("Bearer {}", token.as_str())) else {
        return Ok(false);
    };
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, value);
    let mut soon = unix_time();
    soon.0 += TOKEN_RENEWAL_DAYS * SECONDS_PER_DAY;
    let bearer = anchor.tokens.bearer(&headers, soon).await;
    Ok(bearer.is_ok_and(|bearer| bearer.may(Permission::Push, cache).is_ok()))
}

/// What a person does next.
fn lines(
    config: &Config,
    anchor: SocketAddr,
    key: &str,
    admits: bool,
    is_elsewhere: bool,
) -> Result<String> {
    let cache = &config.anchor_server.default_cache;
    let port = anchor.port();
    let mut text = format!(
        "granary is up: Nix is answered at {}, the anchor at port {port}, state in {}\n\n{}",
        nix_conf::substituter(config)?,
        config.state_dir.display(),
        nix_conf::lines(config)?,
    );
    if let (true, Some(mesh)) = (admits, &config.mesh.key) {
        let place = match is_elsewhere {
            true => format!("STATE_DIRECTORY={} ", config.state_dir.display()),
            false => String::new(),
        };
        let allow = next_machine(cache);
        match ticket_to_show(config) {
            Some(ticket) => text.push_str(&format!(
                "\nThe next machine joins mesh {mesh} by this ticket, which is good for one machine and an hour\n\
                 ({place}granary mesh ticket --allow {allow} makes others); there:\n\n\
                 granary join {}\n",
                ticket.as_str()
            )),
            None => text.push_str(&format!(
                "\nThe next machine joins mesh {mesh} with what this prints, here:\n\n\
                 {place}granary mesh ticket --allow {allow}\n\n\
                 and there:\n\n\
                 granary join <ticket>\n"
            )),
        }
        text.push_str(&format!(
            "granary node\ngranary use\n\n\
             To use the anchor as well, it needs this in its granary.toml, with the address of this one:\n\n\
             [[anchor]]\nurl = \"http://<this machine>:{port}/{cache}\"\n\
             public-keys = [\"{key}\"]\n\
             [upload]\ncache = \"{cache}\"\n\n\
             Its certificate allows that (push:{cache}). A machine that is no such member has in its [[anchor]] a\n\
             token-file, of mode 0600, with the token that this prints, here:\n\n\
             {place}granary token create --subject <its name> --cache {cache} --allow pull,push\n",
        ));
    }
    Ok(text)
}

/// What the next machine may do: what this one may, which pushes to the anchor beside it.
fn next_machine(cache: &str) -> String {
    format!("share,vouch,push:{cache}")
}

/// A ticket for one machine, if a person reads what is printed and nothing keeps it.
fn ticket_to_show(config: &Config) -> Option<Zeroizing<String>> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let made = || {
        let terms = Terms {
            uses: 1,
            expires: TICKET_LIFE,
            allow: next_machine(&config.anchor_server.default_cache).parse()?,
            days: CERTIFICATE_DAYS,
        };
        ticket::issue(config, terms, &[])
    };
    made()
        .inspect_err(|error| {
            warn!(
                error = chain(error.as_ref()),
                "could not make a ticket to show"
            )
        })
        .ok()
}
