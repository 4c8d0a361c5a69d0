//! `granary mesh`: the mesh key at work. It makes members, and puts them out again.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use granary_protocol::certificate::{Certificate, Permissions, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::{Revocations, SignedRevocations};
use granary_protocol::signature::{KeyName, SecretKey};
use zeroize::Zeroizing;

use super::{ConfigFile, SECONDS_PER_DAY, ask, print};
use crate::clock::unix_time;
use crate::config::Config;
use crate::daemon;
use crate::mesh::revocations;
use crate::state_folder;
use crate::status::Report;

/// How long a running node may take to close its links to whom it should; it takes milliseconds.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks at whether it has.
const NOTICE_PAUSE: Duration = Duration::from_millis(20);

/// Lifetime of a certificate unless told otherwise.
const CERTIFICATE_DAYS: u64 = 30;

#[derive(Subcommand)]
pub enum Command {
    /// Make a mesh key and print its public half, for mesh.key of every machine.
    Create {
        /// Where the secret key is written; keep it safe, it admits machines.
        #[arg(long, default_value = "mesh.key")]
        key_file: PathBuf,
        /// Also write the public key here.
        #[arg(long)]
        public_file: Option<PathBuf>,
        /// A name for the mesh.
        #[arg(long, default_value = "granary-mesh")]
        name: String,
    },
    /// Write a certificate that makes a machine a member.
    Admit {
        /// What `granary identity` printed on that machine.
        peer_id: PeerId,
        #[arg(long, default_value = "mesh.key")]
        key_file: PathBuf,
        /// Where the certificate is written; the machine expects it in mesh.certificate-file.
        #[arg(long, default_value = "certificate")]
        out: PathBuf,
        /// What to call the machine; default: the end of its peer id.
        #[arg(long)]
        name: Option<String>,
        /// Permissions: share, vouch, `push:<cache pattern>`.
        #[arg(long, default_value = "share,vouch")]
        allow: Permissions,
        #[arg(long, default_value_t = CERTIFICATE_DAYS)]
        days: u64,
    },
    /// Put machines out: every member closes its links to them, and their certificates are void.
    Revoke {
        /// Peer ids, or names as `granary status` shows them.
        #[arg(required = true)]
        members: Vec<String>,
        /// Default: `mesh.key` in the state folder, where `granary up` keeps it, else here.
        #[arg(long)]
        key_file: Option<PathBuf>,
        /// Add to the list in this file, to be put as `revocations` into the state folder of any
        /// member, instead of giving it to the node of this machine.
        #[arg(long)]
        list: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigFile,
    },
}

pub async fn run(command: Command) -> Result<()> {
    match command {
        Command::Create {
            key_file,
            public_file,
            name,
        } => create(&key_file, public_file.as_deref(), &name),
        Command::Admit {
            peer_id,
            key_file,
            out,
            name,
            allow,
            days,
        } => admit(peer_id, &key_file, &out, name, allow, days),
        Command::Revoke {
            members,
            key_file,
            list,
            config,
        } => revoke(&members, key_file, list, config.load()?).await,
    }
}

fn create(key_file: &Path, public_file: Option<&Path>, name: &str) -> Result<()> {
    let public = make_mesh_key(key_file, name)?.public_key();
    if let Some(public_file) = public_file {
        std::fs::write(public_file, format!("{public}\n"))
            .with_context(|| format!("cannot write the public key to {}", public_file.display()))?;
    }
    print(&format!("{public}\n"))
}

pub fn make_mesh_key(key_file: &Path, name: &str) -> Result<SecretKey> {
    let name = KeyName::new(name)?;
    let mut seed = Zeroizing::new([0u8; 32]);
    getrandom::fill(seed.as_mut()).context("the system gave no random bytes")?;
    let key = SecretKey::from_seed(name, *seed);
    // Never over an existing key: the members of its mesh would be lost.
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(key_file)
        .with_context(|| format!("cannot write the mesh key to {}", key_file.display()))?;
    file.write_all(key.to_nix_string().as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write the mesh key to {}", key_file.display()))?;
    Ok(key)
}

fn admit(
    peer: PeerId,
    key_file: &Path,
    out: &Path,
    name: Option<String>,
    permissions: Permissions,
    days: u64,
) -> Result<()> {
    let key = read_mesh_key(key_file)?;
    let (certificate, text) = certify(&key, peer, name, permissions, days)?;
    std::fs::write(out, format!("{text}\n"))
        .with_context(|| format!("cannot write the certificate to {}", out.display()))?;
    print(&format!(
        "admitted {} as {} for {days} days: {}\n",
        peer,
        certificate.name,
        out.display()
    ))
}

pub fn read_mesh_key(key_file: &Path) -> Result<SecretKey> {
    let read = || {
        format!(
            "cannot read the mesh key {} (made by granary mesh create)",
            key_file.display()
        )
    };
    let mode = std::fs::metadata(key_file)
        .with_context(read)?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        bail!(
            "the mesh key {0} has mode {1:04o}, others may read it, refusing to use it; run chmod 0600 {0}",
            key_file.display(),
            mode & 0o7777
        );
    }
    let text = std::fs::read_to_string(key_file)
        .map(Zeroizing::new)
        .with_context(read)?;
    text.trim()
        .parse()
        .with_context(|| format!("{} is no mesh key", key_file.display()))
}

/// Makes a certificate, and the text of its file.
pub fn certify(
    key: &SecretKey,
    peer: PeerId,
    name: Option<String>,
    permissions: Permissions,
    days: u64,
) -> Result<(Certificate, String)> {
    let now = unix_time();
    let mut serial = [0u8; 8];
    getrandom::fill(&mut serial).context("the system gave no random bytes")?;
    let lifetime = days
        .checked_mul(SECONDS_PER_DAY)
        .and_then(|seconds| now.0.checked_add(seconds));
    let certificate = Certificate {
        peer,
        // All peer ids begin alike; the end tells them apart.
        name: name.unwrap_or_else(|| {
            let text = peer.to_string();
            format!("node-{}", &text[text.len() - 8..])
        }),
        permissions,
        not_before: now,
        not_after: UnixTime(lifetime.context("--days is too large")?),
        serial: u64::from_ne_bytes(serial),
    };
    let text = certificate.sign(key)?.to_text();
    Ok((certificate, text))
}

async fn revoke(
    members: &[String],
    key_file: Option<PathBuf>,
    list: Option<PathBuf>,
    config: Config,
) -> Result<()> {
    let key = read_mesh_key(&key_file.unwrap_or_else(|| usual_key_file(&config)))?;
    let public = key.public_key();
    if let Some(configured) = config.mesh.key.as_ref().filter(|other| **other != public) {
        bail!("the key is that of mesh {public}, this machine belongs to {configured}");
    }
    let report = running(&config).await?;
    let mut peers = Vec::new();
    for member in members {
        peers.push(named(member, report.as_ref())?);
    }
    let is_for_this_node = list.is_none();
    let file = list.unwrap_or_else(|| config.revocations_file());
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    if is_for_this_node {
        daemon::make_state_dir(&folder)
            .with_context(|| format!("cannot make the state folder {}", folder.display()))?;
    }
    let number = {
        let _lock = state_folder::lock(&folder)
            .with_context(|| format!("cannot lock {}", folder.display()))?;
        let known = revocations::read(&file)?;
        let signed = with(known.as_ref(), &peers, &key, unix_time())
            .with_context(|| format!("cannot add to the list {}", file.display()))?;
        revocations::write(&file, &signed)
            .with_context(|| format!("cannot write {}", file.display()))?;
        signed.claims().number
    };
    let mut text: String = peers
        .iter()
        .map(|peer| format!("revoked: {peer}\n"))
        .collect();
    match (is_for_this_node, report) {
        (true, Some(_)) => await_notice(&config, number, &peers).await?,
        (true, None) => {
            text.push_str("no node answers here; the others hear of it when one starts\n")
        }
        (false, _) => text.push_str(&format!(
            "put {} as `revocations` into the state folder of any member\n",
            file.display()
        )),
    }
    print(&text)
}

/// The list that follows `known`, on which these peers stand as well.
fn with(
    known: Option<&SignedRevocations>,
    peers: &[PeerId],
    key: &SecretKey,
    now: UnixTime,
) -> Result<SignedRevocations> {
    let mut list = match known {
        // One of another mesh must not be signed anew by this one's key.
        Some(known) => known.verify(&key.public_key())?.clone(),
        None => Revocations::default(),
    };
    // As time goes on, so that a list made without knowing the last one is newer all the same.
    list.number = list.number.saturating_add(1).max(now.0);
    for peer in peers {
        list.revoke(*peer, now)?;
    }
    Ok(list.sign(key)?)
}

/// The peer of an id, or of a name that one peer alone has.
fn named(member: &str, report: Option<&Report>) -> Result<PeerId> {
    if let Ok(peer) = member.parse() {
        return Ok(peer);
    }
    let Some(report) = report else {
        bail!("no node answers here that would know who is called {member:?}; give the peer id");
    };
    let is_it = |name: &Option<String>| name.as_deref() == Some(member);
    let called: Vec<&str> = report
        .peers
        .iter()
        .filter(|peer| is_it(&peer.name))
        .map(|peer| peer.peer_id.as_str())
        .collect();
    match called[..] {
        [one] => one.parse().context("the node names a malformed peer id"),
        [] => bail!(
            "no peer known here is called {member:?}; see granary status, or give the peer id"
        ),
        _ => bail!(
            "{} peers are called {member:?}, give the id of one: {}",
            called.len(),
            called.join(" ")
        ),
    }
}

/// Waits until the running node knows the list and has no link to these peers.
async fn await_notice(config: &Config, number: u64, peers: &[PeerId]) -> Result<()> {
    let peers: Vec<String> = peers.iter().map(PeerId::to_string).collect();
    let deadline = Instant::now() + NOTICE_TIMEOUT;
    loop {
        let report = running(config).await?;
        let report = report.context("the running node ended, the list holds when it starts")?;
        let is_linked =
            |peer: &crate::status::Peer| peer.state == "linked" && peers.contains(&peer.peer_id);
        let still = report.peers.iter().find(|peer| is_linked(peer));
        if report.revocations >= number && still.is_none() {
            return Ok(());
        }
        if Instant::now() > deadline {
            match still {
                Some(peer) if report.revocations >= number => bail!(
                    "{} is still a member: its certificate begins later than this clock reads",
                    peer.peer_id
                ),
                _ => bail!(
                    "the running node took no notice: is its state folder {}, and has it joined a mesh?",
                    config.state_dir.display()
                ),
            }
        }
        tokio::time::sleep(NOTICE_PAUSE).await;
    }
}

/// What the node of this machine knows; `None` when none is running.
async fn running(config: &Config) -> Result<Option<Report>> {
    let Ok(answer) = ask(config, "/api/v1/status").await else {
        return Ok(None);
    };
    let report = answer.map(|text| serde_json::from_str(&text));
    report.transpose().context("the answer is no status report")
}

/// Where `granary up` keeps the mesh key, or where `granary mesh create` puts it.
fn usual_key_file(config: &Config) -> PathBuf {
    let kept = mesh_key_file(config);
    match kept.exists() {
        true => kept,
        false => PathBuf::from("mesh.key"),
    }
}

pub fn mesh_key_file(config: &Config) -> PathBuf {
    config.state_dir.join("mesh.key")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> SecretKey {
        SecretKey::from_seed(name.parse().unwrap(), [1; 32])
    }

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    #[test]
    fn each_list_is_newer_than_the_last_and_forgets_nobody() {
        let home = key("home");
        let first = with(None, &[peer(1)], &home, UnixTime(100)).unwrap();
        assert_eq!(first.claims().number, 100);
        // The clock was set back.
        let second = with(Some(&first), &[peer(2)], &home, UnixTime(50)).unwrap();
        assert_eq!(second.claims().number, 101);
        let revoked: Vec<_> = second.claims().revoked.iter().collect();
        assert_eq!(
            revoked,
            [(&peer(1), &UnixTime(100)), (&peer(2), &UnixTime(50))]
        );
        assert!(with(Some(&second), &[peer(3)], &key("office"), UnixTime(200)).is_err());
    }
}
