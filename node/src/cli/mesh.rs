//! `granary mesh`: the mesh key at work. It makes members, and puts them out again.

mod members;
pub mod ticket;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use granary_protocol::admission::fingerprint;
use granary_protocol::certificate::{Certificate, Permissions, SignedCertificate, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::{Revocations, SignedRevocations};
use granary_protocol::signature::{KeyName, PublicKey, SecretKey};
use granary_protocol::ticket::{Refused, Request, TICKET_TEXT_BYTES_MAX, Ticket};
use zeroize::Zeroizing;

use super::{ConfigFile, SECONDS_PER_DAY, ask, print};
use crate::admission::{self, AskError, read_mesh_key};
use crate::clock::unix_time;
use crate::config::Config;
use crate::daemon;
use crate::identity::Identity;
use crate::mesh::revocations;
use crate::secret;
use crate::state_folder;
use crate::status::{Report, counted};

/// How long a running node may take to close its links to whom it should; it takes milliseconds.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks at whether it has.
const NOTICE_PAUSE: Duration = Duration::from_millis(20);

/// Between two questions whether a person has admitted this machine.
const ASK_PAUSE: Duration = Duration::from_secs(2);

/// Lifetime of a certificate unless told otherwise.
pub const CERTIFICATE_DAYS: u64 = 30;

#[derive(Subcommand)]
pub enum Command {
    /// Make a mesh key and print its public half, for mesh.key of every machine.
    Create {
        /// Where the secret key is written; keep it safe, it admits machines.
        #[arg(long, default_value = "mesh.key")]
        key_file: PathBuf,
        /// Keep the key in the state folder, where tickets are made with it, and make this machine the
        /// first member.
        #[arg(long, conflicts_with = "key_file")]
        here: bool,
        /// Also write the public key here.
        #[arg(long)]
        public_file: Option<PathBuf>,
        /// A name for the mesh.
        #[arg(long, default_value = "granary-mesh")]
        name: String,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// List the machines that asked this one to be admitted (granary join --at). Run where the mesh key is.
    Pending(members::Arguments),
    /// List the members of the mesh that the node of this machine knows.
    Members(members::Arguments),
    /// Make a machine a member: one that waits (granary mesh pending), or any, by writing its certificate.
    Admit {
        /// Its fingerprint, as `granary mesh pending` shows it, or what `granary identity` printed there.
        #[arg(value_parser = members::machine)]
        machine: String,
        /// Default: `mesh.key` in the state folder, where `granary up` keeps it, else here.
        #[arg(long)]
        key_file: Option<PathBuf>,
        /// Where the certificate is written; the machine expects it in mesh.certificate-file. Without it a
        /// machine that waits gets its certificate when it asks again; of another, it is `certificate`.
        #[arg(long)]
        out: Option<PathBuf>,
        /// What to call the machine; default: the end of its peer id.
        #[arg(long)]
        name: Option<String>,
        /// Permissions: share, vouch, `push:<cache pattern>`.
        #[arg(long, default_value = "share,vouch")]
        allow: Permissions,
        /// For how many days the certificate is good.
        #[arg(long, default_value_t = CERTIFICATE_DAYS)]
        days: u64,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Print a ticket with which a machine joins (`granary join`). Run where the mesh key is.
    Ticket(ticket::Arguments),
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

#[derive(Args)]
pub struct JoinArguments {
    /// What `granary mesh ticket` printed.
    ticket: Option<String>,
    /// A file with it, so that it stands in no command line.
    #[arg(long, conflicts_with = "ticket")]
    ticket_file: Option<PathBuf>,
    /// Ask the machine with the mesh key at this `host:port` (its transfer port) without a ticket, and wait
    /// until a person admits this one there.
    #[arg(long, conflicts_with_all = ["ticket", "ticket_file"])]
    at: Option<String>,
    /// The public mesh key, with --at. Default: mesh.key of the configuration.
    #[arg(long, requires = "at")]
    mesh_key: Option<PublicKey>,
    /// How long to wait, with --at.
    #[arg(long, default_value = "10m", value_parser = ticket::span)]
    wait: Duration,
    /// What to call this machine; default: its host name.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    config: ConfigFile,
}

pub async fn run(command: Command) -> Result<()> {
    match command {
        Command::Create {
            here: true,
            public_file,
            name,
            config,
            ..
        } => found(config.load()?, public_file.as_deref(), &name).await,
        Command::Create {
            key_file,
            public_file,
            name,
            ..
        } => create(&key_file, public_file.as_deref(), &name),
        Command::Pending(arguments) => members::pending(&arguments),
        Command::Members(arguments) => members::members(&arguments).await,
        Command::Admit {
            machine,
            key_file,
            out,
            name,
            allow,
            days,
            config,
        } => {
            let is_waiting = match &out {
                None => members::grant(&config, &machine, name.clone(), allow.clone(), days)?,
                Some(_) => false,
            };
            let out = out.unwrap_or_else(|| PathBuf::from("certificate"));
            match is_waiting {
                true => Ok(()),
                false => admit(
                    machine.parse().with_context(|| {
                        format!("no machine {machine} waits to be admitted here")
                    })?,
                    &match key_file {
                        Some(file) => file,
                        None => usual_key_file(&config.load()?),
                    },
                    &out,
                    name,
                    allow,
                    days,
                ),
            }
        }
        Command::Ticket(arguments) => ticket::run(arguments),
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
    write_public(public_file, &public)?;
    print(&format!("{public}\n"))
}

fn write_public(file: Option<&Path>, public: &PublicKey) -> Result<()> {
    match file {
        None => Ok(()),
        Some(file) => std::fs::write(file, format!("{public}\n"))
            .with_context(|| format!("cannot write the public key to {}", file.display())),
    }
}

/// Makes a mesh whose key stays in the state folder, and whose first member is this machine.
async fn found(config: Config, public_file: Option<&Path>, name: &str) -> Result<()> {
    if let Some(mesh) = &config.mesh.key {
        bail!("this machine belongs to mesh {mesh} already");
    }
    daemon::make_state_dir(&config.state_dir).with_context(|| {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    })?;
    let key = make_own_mesh_key(&config, name)?;
    let public = key.public_key();
    let identity = Identity::load_or_create(&config.identity_file())?;
    let peer = PeerId::from_public_key(identity.public_key());
    let permissions = "share,vouch".parse()?;
    let host = admission::host_name();
    let (own, text) = certify(&key, peer, host, permissions, CERTIFICATE_DAYS)?;
    let file = config.certificate_file();
    state_folder::write(&file, format!("{text}\n").as_bytes())
        .with_context(|| format!("cannot write the certificate to {}", file.display()))?;
    remember_own_mesh(&config, &public)?;
    write_public(public_file, &public)?;
    let next = next_step(&config).await;
    print(&format!(
        "{public}\nthis machine is its first member, {}; granary mesh ticket admits others\n{next}\n",
        own.name
    ))
}

/// What a person does once this machine is a member.
async fn next_step(config: &Config) -> &'static str {
    if config.anchor_server.member {
        return "next: granary anchor; restart it if it runs";
    }
    match ask(config, "/health").await {
        Ok(_) if config.mesh.key.is_none() => "restart the node: it belongs to no mesh yet",
        Ok(_) => "the running node uses it",
        Err(_) => "next: granary node, and granary use for Nix",
    }
}

fn make_mesh_key(key_file: &Path, name: &str) -> Result<SecretKey> {
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

/// Keeps which mesh this machine made, as if it had come by a ticket: so no file needs to name it, and every
/// command knows it.
pub fn remember_own_mesh(config: &Config, public: &PublicKey) -> Result<()> {
    let ticket = Ticket {
        mesh: public.clone(),
        // Where the mesh key is, nobody needs to be asked.
        admits: Vec::new(),
        peers: Vec::new(),
        secret: None,
        expires: unix_time(),
    };
    let file = config.joined_file();
    admission::remember(&file, &ticket).with_context(|| format!("cannot write {}", file.display()))
}

/// Makes a mesh key in the state folder, for the node that runs there.
pub fn make_own_mesh_key(config: &Config, name: &str) -> Result<SecretKey> {
    let key_file = config.mesh_key_file();
    let key = make_mesh_key(&key_file, name)?;
    std::fs::File::open(&key_file)
        .and_then(|file| secret::give_to_owner(&file, &key_file))
        .with_context(|| format!("cannot give {} to the node", key_file.display()))?;
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
        "admitted {} as {} for {}: {}\n",
        peer,
        certificate.name,
        counted(days, "day"),
        out.display()
    ))
}

/// Makes a certificate, and the text of its file.
pub fn certify(
    key: &SecretKey,
    peer: PeerId,
    name: Option<String>,
    permissions: Permissions,
    days: u64,
) -> Result<(Certificate, String)> {
    let seconds = days.checked_mul(SECONDS_PER_DAY);
    let seconds = seconds.context("--days is too large")?;
    let signed = admission::certify(key, peer, name, permissions, seconds, unix_time())?;
    Ok((signed.claims()?, signed.to_text()))
}

pub async fn join(arguments: JoinArguments) -> Result<()> {
    let config = arguments.config.load()?;
    let ticket = match (&arguments.at, &arguments.ticket, &arguments.ticket_file) {
        // All that a ticket says but the secret, which a person stands for.
        (Some(at), ..) => Ticket {
            mesh: arguments
                .mesh_key
                .or_else(|| config.mesh.key.clone())
                .context("give --mesh-key, or set mesh.key: it proves who answers there")?,
            admits: vec![at.clone()],
            peers: Vec::new(),
            secret: None,
            expires: UnixTime(u64::MAX),
        },
        (None, Some(ticket), _) => Ticket::from_text(ticket)?,
        (None, None, Some(file)) => {
            let text = state_folder::read(file, TICKET_TEXT_BYTES_MAX as u64);
            let text = text.with_context(|| format!("cannot read {}", file.display()))?;
            let text = text.with_context(|| format!("there is no {}", file.display()))?;
            Ticket::from_text(&Zeroizing::new(text))?
        }
        (None, None, None) => bail!(
            "give a ticket, --ticket-file, or --at\nhint: granary mesh ticket prints one, on the machine that made the mesh"
        ),
    };
    // Refused now rather than after it was used.
    ticket.to_text()?;
    if let Some(other) = config.mesh.key.as_ref().filter(|key| **key != ticket.mesh) {
        bail!(
            "the ticket is for mesh {}, this machine belongs to {other}",
            ticket.mesh
        );
    }
    if arguments.at.is_none() && ticket.secret.is_none() {
        bail!("the ticket has no secret, it was used before");
    }
    daemon::make_state_dir(&config.state_dir).with_context(|| {
        format!(
            "cannot make the state folder {}",
            config.state_dir.display()
        )
    })?;
    let identity = Identity::load_or_create(&config.identity_file())?;
    let name = arguments.name.or_else(admission::host_name);
    let name = name.unwrap_or_default();
    let certificate = match ticket.secret.clone() {
        Some(secret) => {
            let request = Request::Join { secret, name };
            admission::ask(&identity, &ticket.mesh, &ticket.admits, &request).await?
        }
        None => wait_for_a_person(&identity, &ticket, name, arguments.wait).await?,
    };
    let file = config.certificate_file();
    state_folder::write(&file, format!("{}\n", certificate.to_text()).as_bytes())
        .with_context(|| format!("cannot write the certificate to {}", file.display()))?;
    let file = config.joined_file();
    admission::remember(&file, &ticket)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let own = certificate.claims()?;
    let next = next_step(&config).await;
    print(&format!(
        "joined {} as {} ({})\n{next}\n",
        ticket.mesh, own.name, own.permissions
    ))
}

/// Asks again and again until a person admits this machine.
async fn wait_for_a_person(
    identity: &Identity,
    ticket: &Ticket,
    name: String,
    wait: Duration,
) -> Result<SignedCertificate> {
    let deadline = Instant::now() + wait;
    let request = Request::Ask { name };
    let mine = fingerprint(
        &ticket.mesh,
        &PeerId::from_public_key(identity.public_key()),
    );
    let mut is_told = false;
    loop {
        match admission::ask(identity, &ticket.mesh, &ticket.admits, &request).await {
            Err(AskError::Refused {
                refused: Refused::Pending,
                ..
            }) if Instant::now() < deadline => {
                if !std::mem::replace(&mut is_told, true) {
                    // A closed stderr must not end the waiting.
                    let _ = writeln!(
                        std::io::stderr(),
                        "this machine is {mine}\nwaiting for a person: where the mesh key is, compare it and run granary mesh admit {mine}"
                    );
                }
                tokio::time::sleep(ASK_PAUSE).await;
            }
            outcome => return Ok(outcome?),
        }
    }
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
        let known = revocations::read(&file, &public)?;
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
    let kept = config.mesh_key_file();
    match kept.exists() {
        true => kept,
        false => PathBuf::from("mesh.key"),
    }
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
