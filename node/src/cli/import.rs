//! `granary anchor import`: takes over what another server kept.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::anchor::options;
use super::{ConfigFile, print};
use crate::anchor::Anchor;
use crate::anchor::cache::CacheName;
use crate::anchor::import::source::Attic;
use crate::anchor::import::{self, Imported};
use crate::anchor::object_store::S3Options;
use crate::anchor::server::StateLock;
use crate::status::{counted, form, human_bytes};

/// How often the line that says how far an import is changes.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Subcommand)]
pub enum Arguments {
    /// Caches, their signing keys and all paths of an atticd; nothing of it is changed.
    ///
    /// Ends with status 1 when something was left out, and says why. Stop atticd meanwhile, or have it collect
    /// no garbage.
    Attic(Box<AtticArguments>),
}

#[derive(Args)]
pub struct AtticArguments {
    /// Its SQLite database (`database.url` in its server.toml).
    #[arg(long)]
    database: PathBuf,
    /// The folder of its files (`storage.path`), if they are not in S3.
    #[arg(long)]
    storage: Option<PathBuf>,
    /// The address of its S3 (`storage.endpoint`), if that is not AWS. Regions and buckets stand in the database.
    #[arg(long)]
    s3_endpoint: Option<String>,
    /// Lines `aws_access_key_id = …` and `aws_secret_access_key = …`; without, the environment has them.
    #[arg(long)]
    s3_credentials_file: Option<PathBuf>,
    /// Certificates that its S3 is trusted by, beside the system's.
    #[arg(long)]
    s3_ca_file: Option<PathBuf>,
    /// Only this cache; may be repeated.
    #[arg(long = "cache")]
    caches: Vec<CacheName>,
    /// Print JSON, for scripts.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(Arguments::Attic(arguments): Arguments) -> Result<()> {
    let options = options(&arguments.config.load()?)?;
    let _lock = StateLock::take(&options.state)?;
    let s3 = S3Options {
        endpoint: arguments.s3_endpoint,
        region: None,
        credentials_file: arguments.s3_credentials_file,
        ca_file: arguments.s3_ca_file,
        virtual_hosted: false,
        redirect: false,
    };
    let attic = Attic::open(&arguments.database, arguments.storage.as_deref(), s3)?;
    let anchor = Anchor::open(options).await?;
    // What an import that was interrupted has left.
    anchor.recover().await?;
    anchor.resume_rotations().await?;
    let progress = import::Progress::default();
    let importing = import::attic(&anchor, &attic, &arguments.caches, &progress);
    let imported = match std::io::stderr().is_terminal() && !arguments.json {
        true => shown(importing, &progress).await,
        false => importing.await,
    };
    let imported = imported.context("the import ended early; run it again to go on")?;
    match arguments.json {
        true => print(&format!("{}\n", serde_json::to_string_pretty(&imported)?))?,
        false => print(&imported_text(&imported))?,
    }
    match imported.left_out {
        0 => Ok(()),
        left_out => bail!(
            "{left_out} were left out\nhint: run it again once their reasons are gone; what is here is skipped"
        ),
    }
}

/// Runs an import under a line that says how far it is.
async fn shown<T>(importing: impl Future<Output = T>, progress: &import::Progress) -> T {
    let mut importing = std::pin::pin!(importing);
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    loop {
        tokio::select! {
            outcome = importing.as_mut() => {
                // A terminal that is gone is no reason to stop.
                let _ = write!(std::io::stderr(), "\r\x1b[K");
                return outcome;
            }
            _ = ticks.tick() => {
                let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
                let line = format!(
                    "{} of {} paths, {} read",
                    read(&progress.paths_done),
                    read(&progress.paths),
                    human_bytes(read(&progress.nar_bytes)),
                );
                let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
            }
        }
    }
}

fn imported_text(imported: &Imported) -> String {
    let mut text = String::new();
    for cache in &imported.caches {
        let made = if cache.is_new {
            "taken over"
        } else {
            "was here"
        };
        text.push_str(&format!(
            "cache {}  {made}, {} there, key {}\n",
            cache.name,
            counted(cache.paths, "path"),
            cache.public_key
        ));
        if cache.is_new && cache.has_default_retention {
            text.push_str(&format!(
                "  is kept for ever; if atticd had a default-retention-period: granary cache configure {} --retention DAYS\n",
                cache.name
            ));
        }
    }
    for left_out in &imported.reasons {
        let path = left_out.path.as_deref().unwrap_or("the cache");
        text.push_str(&format!(
            "left out {path} of {}: {}\n",
            left_out.cache, left_out.reason
        ));
    }
    let more = imported
        .left_out
        .saturating_sub(imported.reasons.len() as u64);
    if more > 0 {
        text.push_str(&format!("left out {more} more\n"));
    }
    text.push_str(&format!(
        "took over {} ({} of NARs), {} {} here\n",
        counted(imported.paths, "path"),
        human_bytes(imported.nar_bytes),
        imported.present,
        form(imported.present, "was", "were")
    ));
    text
}
