//! The command line. Parses, calls, prints; exit status 0 for success, 1 for failure, 2 for misuse.

mod anchor;
mod token;
mod import;
mod hide;
mod doctor;
mod mesh;
mod nix_conf;
mod pages;
mod pin;
mod push;
mod up;
mod watch;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use granary_protocol::peer::PeerId;
use rustix::process::{Resource, Rlimit};

use crate::clock::unix_time;
use crate::config::Config;
use crate::daemon::{self, Daemon, Holdings};
use crate::demo;
use crate::identity::Identity;
use crate::listener::Listener;
use crate::log::{self, Format};
use crate::loopback;
use crate::status::{self, Report, Why};
use crate::store::{NixStore, StoreError};
use crate::supervisor;

const SECONDS_PER_DAY: u64 = 86_400;

/// What stands below the long help, and in the man page.
const AFTER_HELP: &str = "\
Exit status: 0 for success, 1 for failure, 2 for misuse of the command line.

Files: /etc/granary/granary.toml is the configuration unless --config or GRANARY_CONFIG
names another; every key has a default. RUST_LOG sets what is logged
(RUST_LOG=granary=debug), --log-format in which form.";

/// Share Nix builds between the machines of a local network.
#[derive(Parser)]
#[command(name = "granary", version, max_term_width = 100, after_long_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Form of the log. Default: log.format of a daemon's configuration, else the journal where stderr is that, else text.
    #[arg(long, global = true, env = "GRANARY_LOG_FORMAT", value_enum)]
    log_format: Option<Format>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node and an anchor on local storage in one process; makes what is missing.
    Up(up::Arguments),
    /// Run a node: the substituter on loopback and its part of the mesh.
    Node(ConfigFile),
    /// Print this machine's peer id, making its identity at first use.
    Identity {
        #[command(flatten)]
        config: ConfigFile,
        /// Look here instead of in the configured state folder.
        #[arg(long)]
        state_dir: Option<PathBuf>,
    },
    /// Join a mesh with a ticket that `granary mesh ticket` printed on a machine of it.
    Join(mesh::JoinArguments),
    /// Make a mesh, admit machines to it, and put them out.
    #[command(subcommand)]
    Mesh(mesh::Command),
    /// Run an anchor: durable storage of caches, signed centrally.
    Anchor(anchor::Arguments),
    /// Make and manage the anchor's caches. Run where the anchor runs.
    Cache(anchor::CacheArguments),
    /// Make, list and revoke tokens for the anchor. Run where the anchor runs.
    Token(token::Arguments),
    /// Remove paths from a cache of the anchor. Run where the anchor runs.
    Rm(anchor::RmArguments),
    /// Delete what no cache of the anchor keeps any longer. Run where the anchor runs.
    Gc(anchor::GcArguments),
    /// Keep paths, with what they reference, whatever the retention says. Run where the anchor runs.
    Pin(pin::Arguments),
    /// Push paths and all they reference to a cache of an anchor.
    Push(push::Arguments),
    /// Make Nix on this machine ask this node: edits nix.conf, and says what it changed.
    Use(nix_conf::Arguments),
    /// Look for what usually goes wrong, and say how to mend it. Exit status 1 if anything is wrong.
    Doctor(doctor::Arguments),
    /// Show what the running node knows and did.
    Status {
        #[command(flatten)]
        config: ConfigFile,
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
        /// Draw it anew each second, until q or Ctrl-C.
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// Explain what Nix is told about a store path, and why.
    Why {
        /// A store path, its base name or its hash.
        path: String,
        #[command(flatten)]
        config: ConfigFile,
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Keep store paths to this machine: they are not announced to other members, nor served.
    Hide(hide::Arguments),
    /// Let the rules decide about hidden paths again.
    Unhide(hide::Arguments),
    /// Check a configuration file and what it refers to.
    CheckConfig {
        /// The file; `--config` says the same.
        #[arg(conflicts_with = "config")]
        file: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigFile,
        /// Only the file itself, not the store and certificate that it names.
        #[arg(long)]
        offline: bool,
    },
    /// Show the main job on this machine: two nodes, one closure, real transfers.
    Demo,
    /// Print what a shell sources to complete this command: `granary completions bash`.
    Completions(pages::CompletionsArguments),
    /// Write the man pages into a folder, as packages do.
    #[command(hide = true)]
    Man(pages::ManArguments),
}

#[derive(Args)]
struct ConfigFile {
    /// Configuration file (TOML). Default: /etc/granary/granary.toml if it exists, else defaults.
    #[arg(long, env = "GRANARY_CONFIG")]
    config: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let name = matches.subcommand_name().unwrap_or_default().to_owned();
    let Arguments {
        command,
        log_format,
    } = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let configured = || command.daemon()?.load().ok()?.log.format;
    let format = log::start(log_format.or_else(configured));
    let fail = |error| fail(&name, &error, format);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(anyhow::Error::new(error).context("cannot start the runtime")),
    };
    let outcome = runtime.block_on(execute(command));
    // A blocking read of a hung disk must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

fn fail(command: &str, error: &anyhow::Error, format: Format) -> ExitCode {
    let said = log::chain(error.as_ref());
    if format != Format::Text {
        tracing::error!(command, error = said, "gave up");
    }
    // The journal has it; whoever asked for JSON gets nothing else.
    let is_told = format == Format::Json || format == Format::Journald && log::is_journal();
    if !is_told {
        // A closed stderr leaves nobody to tell.
        let _ = writeln!(io::stderr(), "granary: {said}");
    }
    ExitCode::FAILURE
}

impl Command {
    /// The configuration of a command that runs until it is stopped. What is wrong with the file is said by
    /// the command itself.
    fn daemon(&self) -> Option<&ConfigFile> {
        match self {
            Command::Up(arguments) => Some(&arguments.config),
            Command::Node(config) => Some(config),
            Command::Anchor(arguments) => Some(&arguments.config),
            _ => None,
        }
    }
}

async fn execute(command: Command) -> Result<()> {
    match command {
        Command::Up(arguments) => up::run(arguments).await,
        Command::Node(config) => node(config.load()?, Holdings::Store, || Ok(())).await,
        Command::Identity { config, state_dir } => identity(&config, state_dir),
        Command::Join(arguments) => mesh::join(arguments).await,
        Command::Mesh(command) => mesh::run(command).await,
        Command::Anchor(arguments) => anchor::run(arguments).await,
        Command::Cache(arguments) => anchor::cache(arguments).await,
        Command::Token(arguments) => token::run(arguments).await,
        Command::Rm(arguments) => anchor::rm(arguments).await,
        Command::Gc(arguments) => anchor::gc(arguments).await,
        Command::Pin(arguments) => pin::run(arguments).await,
        Command::Push(arguments) => push::run(arguments).await,
        Command::Doctor(arguments) => doctor::run(arguments).await,
        Command::Use(arguments) => nix_conf::run(arguments),
        Command::Status {
            config,
            watch: true,
            ..
        } => watch::run(&config.load()?).await,
        Command::Status { config, json, .. } => {
            let text = ask(&config.load()?, "/api/v1/status").await?;
            let text = text.context("the node is still opening its store")?;
            let report: Report =
                serde_json::from_str(&text).context("the answer is no status report")?;
            print(&if json { text } else { report.to_string() })
        }
        Command::Why { path, config, json } => {
            let config = config.load()?;
            // Asked by hash: a name may contain what a URL gives another meaning, such as `?`.
            let hash = status::hash_of(&path, &config.store.dir)
                .with_context(|| format!("{path:?} is no store path and no hash of one"))?;
            let text = ask(&config, &format!("/api/v1/why/{hash}")).await?;
            let text = text.context("the node is still opening its store")?;
            let why: Why = serde_json::from_str(&text).context("the answer is no explanation")?;
            print(&if json { text } else { why.to_string() })
        }
        Command::Hide(arguments) => hide::hide(arguments).await,
        Command::Unhide(arguments) => hide::unhide(arguments).await,
        Command::CheckConfig {
            file,
            config,
            offline,
        } => {
            let config = match file {
                Some(file) => ConfigFile { config: Some(file) },
                None => config,
            };
            check_config(&config, offline).await
        }
        Command::Demo => demo::run().await,
        Command::Completions(arguments) => pages::completions(&arguments),
        Command::Man(arguments) => pages::man(&arguments),
    }
}

impl ConfigFile {
    fn path(&self) -> Option<PathBuf> {
        let system = Path::new("/etc/granary/granary.toml");
        self.config
            .clone()
            .or_else(|| system.exists().then(|| system.to_owned()))
    }

    fn load(&self) -> Result<Config> {
        Ok(Config::load(self.path().as_deref())?)
    }
}

/// Runs a node to its end; `started` is called once Nix is answered.
async fn node(
    config: Config,
    holdings: Holdings,
    started: impl FnOnce() -> Result<()>,
) -> Result<()> {
    raise_file_limit();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let inherited = Listener::inherited()?;
    let substituter = nix_conf::substituter(&config);
    let daemon = Daemon::start_with(holdings, inherited, config).await?;
    supervisor::ready();
    started()?;
    let end = async {
        tokio::select! {
            _ = terminate.recv() => {}
            interrupted = tokio::signal::ctrl_c() => interrupted?,
        }
        tracing::info!("stopping");
        supervisor::stopping(Daemon::STOP_TIMEOUT);
        daemon.stop().await;
        if let Ok(substituter) = &substituter {
            nix_conf::remind(substituter);
        }
        Ok(())
    };
    let watch = async {
        supervisor::watch(|| daemon.is_alive()).await;
        std::future::pending().await
    };
    tokio::select! {
        ended = end => ended,
        () = watch => unreachable!("it has no end"),
    }
}

/// Takes as many file descriptors as the system lets us: the usual 1,024 are fewer than the
/// connections and files of a busy machine.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // A unit that was given its share may be forbidden to ask for more.
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "could not raise the limit on open files");
    }
}

fn identity(config: &ConfigFile, state_dir: Option<PathBuf>) -> Result<()> {
    let file = match state_dir {
        Some(state_dir) => state_dir.join("identity"),
        None => config.load()?.identity_file(),
    };
    if let Some(folder) = file.parent() {
        daemon::make_state_dir(folder)
            .with_context(|| format!("cannot make the state folder {}", folder.display()))?;
    }
    print(&format!("{}\n", Identity::load_or_create(&file)?.peer_id()))
}

async fn check_config(config: &ConfigFile, offline: bool) -> Result<()> {
    // A ticket is a secret that the machine which checks has not.
    let read = if offline { Config::read } else { Config::load };
    let config = read(config.path().as_deref())?;
    if !offline {
        match NixStore::open(config.store_config()).await {
            Ok(_) => {}
            Err(StoreError::NoDatabase { file }) if config.keeps_anchor() => {
                eprintln!(
                    "note: no Nix is here ({} is missing), which an anchor does not need",
                    file.display()
                );
            }
            Err(error) => return Err(error.into()),
        }
        let file = config.certificate_file();
        // What joins by a ticket has no certificate before its first start.
        if config.mesh.key.is_some() && (config.mesh.ticket_file.is_none() || file.exists()) {
            let text = std::fs::read_to_string(&file).with_context(|| {
                format!(
                    "mesh.key is set, but there is no certificate at {}",
                    file.display()
                )
            })?;
            let certificate = granary_protocol::certificate::SignedCertificate::from_text(&text)
                .with_context(|| format!("{} is no certificate", file.display()))?;
            // Before the first start there is no identity that it could belong to.
            let peer = match config.identity_file() {
                file if file.exists() => {
                    PeerId::from_public_key(Identity::load_or_create(&file)?.public_key())
                }
                _ => certificate.claims()?.peer,
            };
            if let Some(mesh) = &config.mesh.key {
                certificate
                    .verify(mesh, &peer, unix_time())
                    .with_context(|| format!("the certificate {} is not valid", file.display()))?;
            }
        }
    }
    if !offline {
        daemon::share::read(&config)?;
    }
    for remark in config.remarks() {
        eprintln!("note: {remark}");
    }
    print("the configuration is fine\n")
}

/// Asks the running node; `None` for 404.
async fn ask(config: &Config, target: &str) -> Result<Option<String>> {
    // A configuration names at least one address.
    let address = config.substituter.listen.first();
    let address = address.context("substituter.listen is empty")?;
    let answer = loopback::get(address, target).await?;
    Ok(answer.map(String::from_utf8).transpose()?)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        // Whoever reads us has read enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a person is told nothing of, by the words that lead to it.
    fn undescribed(command: &clap::Command, words: &str, found: &mut Vec<String>) {
        for argument in command.get_arguments().filter(|one| !one.is_hide_set()) {
            if argument.get_help().is_none() {
                found.push(format!("{words} {}", argument.get_id()));
            }
        }
        for inner in command.get_subcommands() {
            let words = format!("{words} {}", inner.get_name());
            if inner.get_about().is_none() {
                found.push(words.clone());
            }
            undescribed(inner, &words, found);
        }
    }

    #[test]
    fn every_command_and_option_says_what_it_is() {
        let mut found = Vec::new();
        undescribed(&Arguments::command(), "granary", &mut found);
        assert!(found.is_empty(), "{found:#?}");
    }
}
