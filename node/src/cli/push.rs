//! `granary push`: closures from this machine's store to an anchor.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use granary_protocol::store_path::{StoreDir, StorePath};
use granary_protocol::token::TOKEN_BYTES_MAX;
use zeroize::Zeroizing;

use super::{ConfigFile, print};
use crate::authority::Authorities;
use crate::config::Config;
use crate::daemon::{make_state_dir, upload_options};
use crate::status::{counted, form, human_bytes};
use crate::store::{BATCH_MAX, LocalStore, NixStore};
use crate::upload::exchange::{Exchange, Proof};
use crate::upload::progress::{Progress, Stage};
use crate::upload::queue::{Entry, Queue};
use crate::upload::{self, Target};

/// Symlinks followed from one to the next, as many as Linux follows.
const LINKS_MAX: usize = 40;

/// How often the bar is drawn.
const FRAME: Duration = Duration::from_millis(100);

/// Characters of the bar itself.
const BAR_WIDTH: usize = 24;

/// How often a token file is read again during a push: a member's is renewed twenty minutes before it is over.
const FILE_PAUSE: Duration = Duration::from_secs(60);

/// The environment variable that carries a token. It is no option, which would show in the list of processes
/// and in `--help`.
const TOKEN_VARIABLE: &str = "GRANARY_TOKEN";

#[derive(Args)]
pub struct Arguments {
    /// The cache: its address (`http://nas.lan:4730/main`), or the last word of an `[[anchor]]`'s url.
    cache: String,
    /// Store paths, or symlinks to them such as `./result`.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// A file with a token that allows to push, mode 0600. Default: the token itself in the environment
    /// variable GRANARY_TOKEN, else that `[[anchor]]`'s token-file, else what the node of this machine got as a member.
    #[arg(long, env = "GRANARY_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Prove who this job of CI is, and get a token from the anchor for that: in GitHub Actions with `permissions:
    /// id-token: write`, elsewhere by a proof in the environment variable GRANARY_OIDC_TOKEN.
    #[arg(long, conflicts_with_all = ["token_file", "queue"])]
    oidc: bool,
    /// Whom the proof is made for. Default: the anchor's address.
    #[arg(long, env = "GRANARY_OIDC_AUDIENCE")]
    oidc_audience: Option<String>,
    /// Certificates (PEM) trusted beside the system's. Default: that `[[anchor]]`'s ca-file.
    #[arg(long, env = "GRANARY_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Only put them first into the queue of the node on this machine, which pushes to that cache.
    #[arg(long, conflicts_with_all = ["token_file", "ca_file", "json"])]
    queue: bool,
    /// Print what was done as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let config = arguments.config.load()?;
    let store: Arc<dyn LocalStore> = Arc::new(NixStore::open(config.store_config()).await?);
    let mut roots = Vec::new();
    for path in &arguments.paths {
        roots.push(store_path(store.dir(), path)?);
    }
    if arguments.queue {
        return queue(&config, &arguments.cache, store.as_ref(), roots).await;
    }
    let place = place(&config, &arguments)?;
    let authorities = Authorities::read(place.ca_file.as_deref())?;
    let (token, renewal) = match arguments.oidc {
        true => {
            let audience = arguments.oidc_audience.as_deref();
            let exchange = Exchange::new(&place.url, audience, proof()?, &authorities)?;
            let token = exchange.token().await?;
            (
                token.text,
                Renewal::Exchange(Box::new(exchange), token.life),
            )
        }
        false => token(&place, std::env::var_os(TOKEN_VARIABLE))?,
    };
    let target = Target::new(&place.url, token, &authorities)?;
    let is_shown = std::io::stderr().is_terminal() && !arguments.json;
    let progress = Progress::default();
    let trust = config.trusted_keys();
    let push = async {
        tokio::select! {
            pushed = upload::push(&store, &target, roots, &trust, &progress) => pushed,
            () = renewal.keep(&target) => unreachable!("it has no end"),
        }
    };
    let summary = match is_shown {
        true => with_bar(push, &progress).await,
        false => push.await,
    }?;
    if arguments.json {
        return print(&format!("{}\n", serde_json::to_string(&summary)?));
    }
    print(&format!(
        "pushed {} of {} ({}); {} {} there, {} {} left to an upstream\n",
        summary.pushed,
        counted(summary.paths as u64, "path"),
        human_bytes(summary.nar_bytes),
        summary.present,
        form(summary.present as u64, "was", "were"),
        summary.upstream,
        form(summary.upstream as u64, "is", "are")
    ))
}

/// How the token of a push is kept good that takes longer than it.
enum Renewal {
    /// It is not: nobody gives another one.
    No,
    /// A job of CI proves again who it is.
    Exchange(Box<Exchange>, Duration),
    /// The node of this machine, or a person, puts a new one there.
    File(PathBuf),
}

impl Renewal {
    /// Has no end.
    async fn keep(&self, target: &Target) {
        match self {
            Renewal::No => {}
            Renewal::Exchange(exchange, life) => exchange.keep(target, *life).await,
            Renewal::File(path) => loop {
                tokio::time::sleep(FILE_PAUSE).await;
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || upload::read_token(&path)).await;
                // While there is none the push goes on with the one that it has.
                if let Ok(Ok(token)) = read {
                    target.renew(token);
                }
            },
        }
        std::future::pending().await
    }
}

/// Puts the paths into the queue of the node, running or not.
async fn queue(
    config: &Config,
    cache: &str,
    store: &dyn LocalStore,
    roots: Vec<StorePath>,
) -> Result<()> {
    let options = upload_options(config);
    let options = options.context("the node pushes nothing by itself: upload.cache is not set")?;
    let meant = config.anchor_of(cache).map(|anchor| anchor.url.as_str());
    if meant != Some(options.url.as_str()) {
        bail!("the node pushes to {}, not to {cache}", options.url);
    }
    let mut entries = Vec::new();
    for roots in roots.chunks(BATCH_MAX) {
        let hashes = roots.iter().map(StorePath::hash).collect();
        for (path, info) in roots.iter().zip(store.path_infos(hashes).await?) {
            let info = info.filter(|info| info.store_path == *path);
            let info = info.with_context(|| format!("{path} is not in the local store"))?;
            entries.push(Entry {
                path: info.store_path,
                nar_size: info.nar_size,
                registered: info.id,
            });
        }
    }
    let count = entries.len();
    make_state_dir(&config.state_dir).with_context(|| {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    })?;
    let queue = Queue::open(&options.file, &options.url)?;
    queue.ask(entries).await?;
    print(&format!(
        "queued {} for {}\n",
        counted(count as u64, "path"),
        options.url
    ))
}

/// Draws a bar on the terminal for as long as the work takes.
async fn with_bar<T>(work: impl Future<Output = T>, progress: &Progress) -> T {
    let started = Instant::now();
    let draw = async {
        loop {
            tokio::time::sleep(FRAME).await;
            // Over the line before. A terminal that went away is no reason to stop.
            let line = bar(&progress.stage(), started.elapsed());
            let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
        }
    };
    let done = tokio::select! {
        done = work => done,
        () = draw => unreachable!("it has no end"),
    };
    let _ = write!(std::io::stderr(), "\r\x1b[K");
    done
}

fn bar(stage: &Stage, elapsed: Duration) -> String {
    if stage.paths == 0 {
        return "asking what is missing".to_owned();
    }
    let part = stage.nar_bytes_done as f64 / stage.nar_bytes.max(1) as f64;
    let filled = ((part * BAR_WIDTH as f64) as usize).min(BAR_WIDTH);
    let speed = stage.nar_bytes_done as f64 / elapsed.as_secs_f64().max(0.1);
    format!(
        "[{}{}] {}/{} paths, {} of {}, {}/s",
        "=".repeat(filled),
        " ".repeat(BAR_WIDTH - filled),
        stage.paths_done,
        stage.paths,
        human_bytes(stage.nar_bytes_done),
        human_bytes(stage.nar_bytes),
        human_bytes(speed as u64),
    )
}

/// Where to push, and as whom.
struct Place {
    url: String,
    /// Named for this push.
    token_file: Option<PathBuf>,
    /// Named by the configuration.
    configured_token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
}

/// Finds the address of the cache, and what belongs to it.
fn place(config: &Config, arguments: &Arguments) -> Result<Place> {
    let cache = arguments.cache.trim_end_matches('/');
    let anchor = config.anchor_of(cache);
    let url = match anchor {
        Some(anchor) => anchor.url.to_string(),
        None if cache.contains("://") => cache.to_owned(),
        None => {
            bail!(
                "no [[anchor]] in the configuration has a cache {cache}, and it is no address such as http://nas.lan:4730/main"
            )
        }
    };
    let configured_ca_file = anchor.and_then(|anchor| anchor.ca_file.clone());
    Ok(Place {
        url,
        token_file: arguments.token_file.clone(),
        // A member's own is there when its node got one.
        configured_token_file: anchor
            .and_then(|anchor| config.token_file_of(anchor))
            .filter(|file| {
                anchor.is_some_and(|anchor| anchor.token_file.is_some()) || file.exists()
            }),
        ca_file: arguments.ca_file.clone().or(configured_ca_file),
    })
}

/// Finds the token: what was named for this push, else the environment's, else the configuration's or the member's own.
fn token(place: &Place, variable: Option<OsString>) -> Result<(Zeroizing<String>, Renewal)> {
    let from_file = |file: &PathBuf| Ok((upload::read_token(file)?, Renewal::File(file.clone())));
    if let Some(file) = &place.token_file {
        return from_file(file);
    }
    // Systems for CI set a variable to nothing for whoever may not see the secret.
    let is_empty = variable.as_deref().is_some_and(OsStr::is_empty);
    if let Some(variable) = variable.filter(|variable| !variable.is_empty()) {
        let token = variable.into_string();
        let token = token.map_err(|_| anyhow!("{TOKEN_VARIABLE} is no token: it is not UTF-8"))?;
        let token = Zeroizing::new(token);
        if token.len() > TOKEN_BYTES_MAX {
            bail!(
                "{TOKEN_VARIABLE} is no token: it has {} bytes, a token has at most {TOKEN_BYTES_MAX}",
                token.len()
            );
        }
        return Ok((Zeroizing::new(token.trim().to_owned()), Renewal::No));
    }
    if let Some(file) = &place.configured_token_file {
        return from_file(file);
    }
    let url = &place.url;
    match is_empty {
        true => bail!(
            "no token for {url}: {TOKEN_VARIABLE} is empty; the secret is not set, or this job may not see it"
        ),
        false => bail!(
            "no token for {url}: give --token-file, {TOKEN_VARIABLE} in the environment, or token-file in its [[anchor]]; the node of a machine whose certificate allows push:{cache} gets one by itself while it runs\nhint: where the anchor runs, granary token create --subject NAME --cache {cache} --allow pull,push prints one",
            cache = url.rsplit('/').next().unwrap_or_default()
        ),
    }
}

/// What proves who this job is, or says where that is got.
fn proof() -> Result<Proof> {
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    if let Some(proof) = variable("GRANARY_OIDC_TOKEN") {
        return Ok(Proof::Given(Zeroizing::new(proof)));
    }
    let url = variable("ACTIONS_ID_TOKEN_REQUEST_URL");
    let bearer = variable("ACTIONS_ID_TOKEN_REQUEST_TOKEN");
    let (Some(url), Some(bearer)) = (url, bearer) else {
        bail!(
            "this job cannot prove who it is: neither ACTIONS_ID_TOKEN_REQUEST_URL and …_TOKEN nor GRANARY_OIDC_TOKEN are set\nhint: in GitHub Actions, give the job permissions: id-token: write"
        );
    };
    Ok(Proof::Asked {
        url: url
            .parse()
            .context("ACTIONS_ID_TOKEN_REQUEST_URL is no address")?,
        bearer: Zeroizing::new(bearer),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_how_far_it_is() {
        let mut stage = Stage::default();
        let second = Duration::from_secs(1);
        assert_eq!(bar(&stage, second), "asking what is missing");
        stage.paths = 4;
        stage.paths_done = 1;
        stage.nar_bytes = 4096;
        stage.nar_bytes_done = 2048;
        assert_eq!(
            bar(&stage, second),
            "[============            ] 1/4 paths, 2.0 KiB of 4.0 KiB, 2.0 KiB/s"
        );
        // A path that grew under our hands.
        stage.nar_bytes_done = 8192;
        assert!(bar(&stage, second).contains("[========================]"));
    }
}
