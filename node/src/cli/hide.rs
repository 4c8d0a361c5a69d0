//! `granary hide` and `granary unhide`: store paths that stay on this machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use granary_protocol::store_path::StorePathHash;

use super::push::store_path;
use super::{ConfigFile, ask, print};
use crate::config::Config;
use crate::daemon;
use crate::state_folder;
use crate::status::{self, Why};
use crate::store::hidden::Hidden;

/// How long a running node may take to notice; it takes milliseconds.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks at whether it has.
const NOTICE_PAUSE: Duration = Duration::from_millis(20);

#[derive(Args)]
pub struct Arguments {
    /// Store paths, base names, hashes, or symlinks such as `./result`; none lists what is hidden.
    paths: Vec<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn hide(arguments: Arguments) -> Result<()> {
    change(arguments, true).await
}

pub async fn unhide(arguments: Arguments) -> Result<()> {
    change(arguments, false).await
}

async fn change(arguments: Arguments, shall_hide: bool) -> Result<()> {
    let config = arguments.config.load()?;
    let file = config.hidden_file();
    if arguments.paths.is_empty() {
        let hidden = Hidden::load(&file)?;
        let names: String = hidden.names().map(|name| format!("{name}\n")).collect();
        return print(&names);
    }
    let mut named = Vec::new();
    for path in &arguments.paths {
        named.push(name(&config, path)?);
    }
    let make = || {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    };
    daemon::make_state_dir(&config.state_dir).with_context(make)?;
    {
        let _lock = state_folder::lock(&config.state_dir)
            .with_context(|| format!("cannot lock {}", config.state_dir.display()))?;
        let mut hidden = Hidden::load(&file)?;
        for (hash, name) in &named {
            match shall_hide {
                true => hidden.insert(*hash, name)?,
                false => hidden.remove(hash),
            };
        }
        hidden.save(&file)?;
    }
    let word = if shall_hide { "hidden" } else { "shown again" };
    let mut text = String::new();
    for (_, name) in &named {
        text.push_str(&format!("{word}: {name}\n"));
    }
    match noticed(&config, &named, shall_hide).await? {
        Noticed::Running => {}
        Noticed::NoNode => text.push_str("no node answers here; it holds when one starts\n"),
    }
    print(&text)
}

/// Finds out which path is meant, and what to call it.
fn name(config: &Config, path: &Path) -> Result<(StorePathHash, String)> {
    let dir = &config.store.dir;
    if let Some(text) = path.to_str()
        && (text.starts_with(dir.as_str()) || !path.is_symlink())
        && let Some(hash) = status::hash_of(text, dir)
    {
        let base_name = text.strip_prefix(dir.as_str()).unwrap_or(text);
        let base_name = base_name.trim_start_matches('/').split('/').next();
        return Ok((hash, base_name.unwrap_or_default().to_owned()));
    }
    let found = store_path(dir, path)?;
    Ok((found.hash(), found.base_name()))
}

enum Noticed {
    Running,
    NoNode,
}

/// Waits until the running node does as it was told.
async fn noticed(
    config: &Config,
    named: &[(StorePathHash, String)],
    shall_hide: bool,
) -> Result<Noticed> {
    let deadline = Instant::now() + NOTICE_TIMEOUT;
    for (hash, name) in named {
        loop {
            let Ok(answer) = ask(config, &format!("/api/v1/why/{hash}")).await else {
                return Ok(Noticed::NoNode);
            };
            // Without an answer the node is still opening its store, and shares nothing.
            let Some(text) = answer else { break };
            let why: Why = serde_json::from_str(&text).context("the answer is no explanation")?;
            if why.hidden == shall_hide {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "the running node took no notice of {name}: is its state folder {}?",
                    config.state_dir.display()
                );
            }
            tokio::time::sleep(NOTICE_PAUSE).await;
        }
    }
    Ok(Noticed::Running)
}
