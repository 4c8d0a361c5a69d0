//! `granary push`: closures from this machine's store to an anchor.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Args;
use granary_protocol::store_path::{StoreDir, StorePath};

use super::{ConfigFile, print};
use crate::config::{self, Config};
use crate::store::{LocalStore, NixStore};
use crate::upload::{self, Target};

/// Symlinks followed from one to the next, as many as Linux follows.
const LINKS_MAX: usize = 40;

#[derive(Args)]
pub struct Arguments {
    /// The cache: its address (`http://nas.lan:4730/main`), or the last word of an `[[anchor]]`'s url.
    cache: String,
    /// Store paths, or symlinks to them such as `./result`.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// A file with a token that allows to push, mode 0600. Default: that `[[anchor]]`'s token-file.
    #[arg(long, env = "GRANARY_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Print what was done as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let config = arguments.config.load()?;
    let (url, token_file) = place(&config, &arguments)?;
    let target = Target::new(&url, upload::read_token(&token_file)?)?;
    let store: Arc<dyn LocalStore> = Arc::new(NixStore::open(config.store_config()).await?);
    let mut roots = Vec::new();
    for path in &arguments.paths {
        roots.push(store_path(store.dir(), path)?);
    }
    let is_shown = std::io::stderr().is_terminal() && !arguments.json;
    let progress = Box::new(move |done: usize, total: usize, bytes: u64| {
        if is_shown {
            // Over the line before; a terminal that went away is no reason to stop.
            let _ = write!(
                std::io::stderr(),
                "\rpushed {done} of {total} paths, {} MiB ",
                bytes >> 20
            );
        }
    });
    let summary = upload::push(&store, &target, roots, &config.trusted_keys(), progress).await;
    if is_shown {
        let _ = writeln!(std::io::stderr());
    }
    let summary = summary?;
    if arguments.json {
        return print(&format!("{}\n", serde_json::to_string(&summary)?));
    }
    print(&format!(
        "pushed {} of {} paths ({} MiB); {} were there, {} are left to an upstream\n",
        summary.pushed,
        summary.paths,
        summary.nar_bytes >> 20,
        summary.present,
        summary.upstream
    ))
}

/// Finds the address of the cache, and the token for it.
fn place(config: &Config, arguments: &Arguments) -> Result<(String, PathBuf)> {
    let cache = arguments.cache.trim_end_matches('/');
    let is_meant = |anchor: &&config::Anchor| {
        let url = anchor.url.as_str().trim_end_matches('/');
        url == cache || url.rsplit('/').next() == Some(cache)
    };
    let anchor = config.anchor.iter().find(is_meant);
    let url = match anchor {
        Some(anchor) => anchor.url.to_string(),
        None if cache.contains("://") => cache.to_owned(),
        None => {
            bail!("no [[anchor]] in the configuration has a cache {cache}, and it is no address")
        }
    };
    let configured = anchor.and_then(|anchor| anchor.token_file.clone());
    match arguments.token_file.clone().or(configured) {
        Some(token_file) => Ok((url, token_file)),
        None => bail!("no token for {url}: give --token-file, or token-file in its [[anchor]]"),
    }
}

/// Reads a store path, or finds the one that a symlink leads to.
pub fn store_path(dir: &StoreDir, path: &std::path::Path) -> Result<StorePath> {
    let in_store = |path: &std::path::Path| {
        let rest = path.strip_prefix(dir.as_str()).ok()?;
        let base_name = rest.components().next()?.as_os_str().to_str()?;
        StorePath::from_base_name(base_name).ok()
    };
    if let Some(found) = in_store(path) {
        return Ok(found);
    }
    // Link by link, for what a link leads to may be in a store whose files are elsewhere.
    let mut target = path.to_owned();
    for _ in 0..LINKS_MAX {
        let Ok(next) = std::fs::read_link(&target) else {
            break;
        };
        target = match target.parent() {
            Some(folder) => folder.join(next),
            None => next,
        };
        if let Some(found) = in_store(&target) {
            return Ok(found);
        }
    }
    bail!("{} is no store path, and no symlink to one", path.display())
}
