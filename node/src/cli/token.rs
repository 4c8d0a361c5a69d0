//! `granary token`: tokens for an anchor, made, listed and revoked where it runs.

use std::io::Read;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use granary_protocol::certificate::UnixTime;
use granary_protocol::token::{Claims, Grant, Pattern, Permission, TOKEN_BYTES_MAX};

use super::anchor::open;
use super::{ConfigFile, SECONDS_PER_DAY, print};
use crate::anchor::Anchor;
use crate::anchor::cache::CacheName;
use crate::anchor::tokens::token_key;
use crate::clock::unix_time;
use crate::config::Config;
use crate::status::counted;

/// Days that a token is good for unless told otherwise.
const TOKEN_DAYS: u64 = 365;

#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a token and print it.
    Create {
        /// Who will use it: a person, a machine, a job.
        #[arg(long)]
        subject: String,
        /// Cache, or pattern with `*`; may be repeated.
        #[arg(long = "cache", required = true)]
        caches: Vec<Pattern>,
        /// What it allows: pull, push, delete, create, configure, retention, destroy.
        #[arg(long, value_delimiter = ',', required = true)]
        allow: Vec<Permission>,
        /// For how many days it is good.
        #[arg(long, default_value_t = TOKEN_DAYS)]
        days: u64,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// List the tokens made here.
    List {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Revoke a token by its id; `-` reads a whole token from standard input.
    Revoke {
        /// As `granary token list` shows it first in a line.
        id: String,
        #[command(flatten)]
        config: ConfigFile,
    },
}

/// Makes a token, and lists it.
pub(super) async fn new_token(
    config: &Config,
    anchor: &Anchor,
    subject: String,
    caches: Vec<Pattern>,
    allow: &[Permission],
    days: u64,
) -> Result<String> {
    let now = unix_time();
    let mut id = [0u8; 10];
    getrandom::fill(&mut id).context("the system gave no random bytes")?;
    let lifetime = days
        .checked_mul(SECONDS_PER_DAY)
        .and_then(|seconds| now.0.checked_add(seconds));
    let grant = |pattern| Grant {
        pattern,
        permissions: allow.to_vec(),
    };
    let claims = Claims {
        id: Some(granary_protocol::nix32::encode(&id)),
        subject,
        not_before: None,
        expires: Some(UnixTime(lifetime.context("--days is too large")?)),
        grants: caches.into_iter().map(grant).collect(),
    };
    let text = claims.mint(&token_key(&config.anchor_dir())?);
    // Proves that whoever reads it will take it: a subject may be too long.
    granary_protocol::token::Token::parse(&text)?;
    anchor.tokens.issued(claims, now).await?;
    Ok(text)
}

pub async fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Create {
            subject,
            caches,
            allow,
            days,
            config,
        } => {
            let (config, anchor) = open(&config).await?;
            for pattern in &caches {
                let name = pattern.to_string().parse::<CacheName>();
                if let Ok(name) = name
                    && anchor.catalog.cache(&name).await?.is_none()
                {
                    eprintln!("note: there is no cache {name} yet: granary cache create {name}");
                }
            }
            let text = new_token(&config, &anchor, subject, caches, &allow, days).await?;
            print(&format!("{text}\n"))
        }
        Command::List { json, config } => {
            let (_, anchor) = open(&config).await?;
            let tokens = anchor.tokens.list().await?;
            if json {
                return print(&format!("{}\n", serde_json::to_string_pretty(&tokens)?));
            }
            let now = unix_time().0;
            let lines = tokens.iter().map(|token| {
                let state = match (token.revoked, token.expires) {
                    (Some(_), _) => "revoked".to_owned(),
                    (None, Some(expires)) if expires < now => "expired".to_owned(),
                    (None, Some(expires)) => {
                        let days = counted((expires - now) / SECONDS_PER_DAY, "day");
                        format!("{days} left")
                    }
                    (None, None) => "does not expire".to_owned(),
                };
                format!("{}  {}  {state}\n", token.id, token.subject)
            });
            print(&lines.collect::<String>())
        }
        Command::Revoke { id, config } => {
            let id = match id.as_str() {
                "-" => {
                    let mut text = String::new();
                    std::io::stdin()
                        .take(TOKEN_BYTES_MAX as u64)
                        .read_to_string(&mut text)?;
                    text.trim().to_owned()
                }
                _ => id,
            };
            let (_, anchor) = open(&config).await?;
            let is_listed = anchor
                .tokens
                .list()
                .await?
                .iter()
                .any(|token| token.id == id);
            if !is_listed && granary_protocol::token::Token::parse(&id).is_err() {
                bail!("there is no token {id}; see granary token list");
            }
            match anchor.tokens.revoke(&id, unix_time()).await? {
                true => Ok(()),
                false => bail!("the token was revoked before"),
            }
        }
    }
}
