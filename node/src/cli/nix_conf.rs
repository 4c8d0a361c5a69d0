//! `granary use`: makes Nix on this machine ask this node, and undoes it.

use std::fs::{self, Permissions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use granary_protocol::signature::SecretKey;

use super::{ConfigFile, print};
use crate::config::Config;
use crate::daemon::make_state_dir;
use crate::listener::Address;
use crate::loopback_key::{self, LoopbackKeyError};
use crate::nix_conf::{self, Wanted};

#[derive(Args)]
pub struct Arguments {
    /// Only print what would stand in the file.
    #[arg(long, conflicts_with = "undo")]
    print: bool,
    /// Take out what an earlier call put in.
    #[arg(long)]
    undo: bool,
    /// Only print a line with the key that is this machine's own, to be included by a nix.conf that
    /// something else makes, as NixOS does.
    #[arg(long, conflicts_with_all = ["undo", "print", "nix_conf"])]
    key: bool,
    /// Nix's configuration. Default: /etc/nix/nix.conf ($NIX_CONF_DIR/nix.conf) for root, else
    /// ~/.config/nix/nix.conf.
    #[arg(long, value_name = "FILE")]
    nix_conf: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
}

pub fn run(arguments: Arguments) -> Result<()> {
    if arguments.key {
        return print_key(&arguments.config);
    }
    let config = arguments.config.load()?;
    let wanted = wanted(&config)?;
    let place = match &arguments.nix_conf {
        Some(path) => path.clone(),
        None => default_place()?,
    };
    // A link is kept, and what it leads to is changed.
    let path = fs::canonicalize(&place).unwrap_or_else(|_| place.clone());
    if is_made_by_nixos(&path, &config) {
        return nixos(&place, &wanted, arguments.undo);
    }
    let before = nix_conf::read(&path)?;
    let after = match (&before, arguments.undo) {
        (None, true) => None,
        (Some(text), true) => nix_conf::take_out(text),
        (_, false) => Some(nix_conf::put_in(before.as_deref(), &path, &wanted)?),
    };
    if arguments.print {
        return print(&after.unwrap_or_default());
    }
    if after == before {
        return print(&format!("{} is as it should be\n", place.display()));
    }
    match &after {
        Some(text) => replace(&path, text)?,
        None => {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", place.display()))?
        }
    }
    let change = difference(
        before.as_deref().unwrap_or_default(),
        after.as_deref().unwrap_or_default(),
    );
    let is_own = !rustix::process::geteuid().is_root() && arguments.nix_conf.is_none();
    let next = match Path::new("/nix/var/nix/daemon-socket/socket").exists() {
        true if is_own => {
            "The Nix daemon takes substituters and keys from users in its trusted-users alone; as root, granary use makes every user's Nix ask the node\n"
        }
        true => "The Nix daemon reads it when it starts: systemctl restart nix-daemon\n",
        false => "",
    };
    print(&format!("changed {}:\n{change}{next}", place.display()))
}

/// Prints the line for the loopback key; it is made if need be, also before this machine is a member.
fn print_key(config: &ConfigFile) -> Result<()> {
    // The ticket is for the node's eyes.
    let config = Config::read(config.path().as_deref())?;
    if !config.trust.members {
        return Ok(());
    }
    let file = config.loopback_key_file();
    make_state_dir(&config.state_dir).with_context(|| {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    })?;
    let key = loopback_key::load_or_create(&file)?.public_key();
    print(&format!("extra-trusted-public-keys = {key}\n"))
}

/// Where Nix asks this node.
pub fn substituter(config: &Config) -> Result<String> {
    let tcp = config
        .substituter
        .listen
        .iter()
        .find_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        });
    let tcp = tcp.context("substituter.listen has no TCP address, and Nix speaks to no other")?;
    if tcp.port() == 0 {
        bail!("substituter.listen has port 0, which is another one at every start");
    }
    let host = match tcp.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    Ok(format!("http://{host}:{}", tcp.port()))
}

/// Says to a person at a terminal, whose node has ended, that Nix goes on asking it.
pub fn remind(substituter: &str) {
    let text = default_place().and_then(|place| Ok(nix_conf::read(&place)?));
    let is_asked = text.is_ok_and(|text| text.is_some_and(|text| text.contains(substituter)));
    if is_asked && std::io::stderr().is_terminal() {
        // A terminal that went away needs no word.
        let _ = writeln!(
            std::io::stderr(),
            "Nix still asks {substituter}, and older versions build nothing while it does not answer: start it again, or granary use --undo"
        );
    }
}

/// What this node wants of Nix.
pub fn wanted(config: &Config) -> Result<Wanted> {
    let mut keys: Vec<String> = config
        .trusted_keys()
        .iter()
        .map(ToString::to_string)
        .collect();
    keys.extend(loopback_key(config)?.map(|key| key.public_key().to_string()));
    Ok(Wanted {
        substituter: substituter(config)?,
        keys,
    })
}

/// The key with which the node passes on what members vouch for; `None` where they are not believed.
fn loopback_key(config: &Config) -> Result<Option<SecretKey>> {
    let file = config.loopback_key_file();
    if !config.trust.members {
        return Ok(None);
    }
    let key = match config.mesh.key {
        Some(_) => make_state_dir(&config.state_dir)
            .map_err(|source| LoopbackKeyError::Io {
                action: "make",
                path: file.clone(),
                source,
            })
            .and_then(|()| loopback_key::load_or_create(&file).map(Some)),
        // `granary up` made a mesh that no file speaks of.
        None => loopback_key::load(&file),
    };
    match key {
        // The rest can be said without it.
        Err(error @ LoopbackKeyError::Io { .. }) => {
            tracing::warn!(%error, "left out the key for what members build; run this as root, or as whom the node runs");
            Ok(None)
        }
        key => Ok(key?),
    }
}

/// Where this user's Nix is configured.
pub fn default_place() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("NIX_CONF_DIR") {
        return Ok(PathBuf::from(folder).join("nix.conf"));
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/etc/nix/nix.conf"));
    }
    let folder = match (variable("XDG_CONFIG_HOME"), variable("HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(home)) => PathBuf::from(home).join(".config"),
        (None, None) => bail!("neither $HOME nor $XDG_CONFIG_HOME is set; give --nix-conf"),
    };
    Ok(folder.join("nix/nix.conf"))
}

/// What this user's Nix must be told to ask the node, in the form in which this machine is configured.
pub fn lines(config: &Config) -> Result<String> {
    let wanted = wanted(config)?;
    // Where there is no home there is no file either, and a file's lines say as much.
    let place = default_place().and_then(|place| Ok(fs::canonicalize(place)?));
    Ok(
        match place.is_ok_and(|path| is_made_by_nixos(&path, config)) {
            true => format!(
                "Nix on this machine asks it with this in the system's configuration:\n\n{}",
                nix_conf::for_nixos(&wanted)
            ),
            false => format!(
                "Nix on this machine asks it with these lines in nix.conf (granary use puts them there):\n\n{}",
                nix_conf::for_nix_conf(&wanted)
            ),
        },
    )
}

/// Whether the file belongs to the system's configuration, which makes it anew at every switch; `path` leads to no link.
fn is_made_by_nixos(path: &Path, config: &Config) -> bool {
    path.starts_with(config.store.dir.as_str())
}

/// Says what to do about a file that was made by NixOS.
fn nixos(place: &Path, wanted: &Wanted, is_undo: bool) -> Result<()> {
    let said = match is_undo {
        true => "take these lines out of",
        false => "put these lines into",
    };
    print(&format!(
        "{} is made by NixOS and was not changed; {said} the system's configuration:\n\n{}",
        place.display(),
        nix_conf::for_nixos(wanted)
    ))
}

/// Replaces a file, whole or not at all; owner and mode stay.
fn replace(path: &Path, text: &str) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(failed)?;
    file.write_all(text.as_bytes()).with_context(failed)?;
    let mode = match fs::metadata(path) {
        Ok(metadata) => {
            let owner = (Some(metadata.uid()), Some(metadata.gid()));
            // Who is not root owns what it may replace, or says so here.
            fchown(file.as_file(), owner.0, owner.1).with_context(failed)?;
            metadata.permissions().mode() & 0o7777
        }
        Err(_) => 0o644,
    };
    fs::set_permissions(file.path(), Permissions::from_mode(mode)).with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path).with_context(failed)?;
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    synced.with_context(failed)
}

/// Lines that went and lines that came, for a person.
fn difference(before: &str, after: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let gone = old.iter().filter(|line| !new.contains(line));
    let came = new.iter().filter(|line| !old.contains(line));
    let gone = gone.map(|line| format!("- {line}\n"));
    gone.chain(came.map(|line| format!("+ {line}\n"))).collect()
}
