//! `granary pin`: paths that a cache of the anchor keeps whatever its retention says.

use anyhow::{Context, Result, bail};
use clap::Args;

use super::ConfigFile;
use super::anchor::open;
use crate::anchor::admin::Changes;
use crate::anchor::cache::{CacheName, PinName};
use crate::status;

#[derive(Args)]
pub struct Arguments {
    /// The cache.
    cache: CacheName,
    /// Store paths, their base names or hashes.
    #[arg(required_unless_present = "remove")]
    paths: Vec<String>,
    /// Pin them under a name, as the newest of that name: `nas-system`, `release`.
    #[arg(long)]
    name: Option<PinName>,
    /// Keep so many of that name, and let older ones go. All stay without it.
    #[arg(long, requires = "name", conflicts_with = "remove", value_parser = clap::value_parser!(u16).range(1..))]
    keep: Option<u16>,
    /// Pin them no longer; with --name and no path, nothing of that name.
    #[arg(long)]
    remove: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let (_, anchor) = open(&arguments.config).await?;
    let name = &arguments.cache;
    let cache = anchor.catalog.cache(name).await?;
    let cache = cache.with_context(|| format!("there is no cache {name}"))?;
    let dir = cache.settings.store_dir()?;
    let mut hashes = Vec::new();
    for path in &arguments.paths {
        let hash = status::hash_of(path, &dir);
        let hash = hash.with_context(|| format!("{path:?} is no store path and no hash of one"))?;
        if !arguments.remove && anchor.catalog.path(cache.id, hash).await?.is_none() {
            bail!("cache {name} does not hold {path}");
        }
        hashes.push(hash);
    }
    let changes = match (arguments.remove, arguments.name) {
        (true, None) if hashes.is_empty() => bail!("name paths, or the --name of pins, to remove"),
        (true, Some(_)) if !hashes.is_empty() => {
            bail!("--remove takes paths, whatever name they have, or a --name, not both")
        }
        (true, unpinned_name) => Changes {
            unpinned: hashes,
            unpinned_name,
            ..Changes::default()
        },
        (false, pins) => Changes {
            pinned: hashes,
            pinned_as: pins.map(|pins| (pins, arguments.keep.map(usize::from))),
            ..Changes::default()
        },
    };
    anchor.configure_cache(name, &changes).await?;
    Ok(())
}
