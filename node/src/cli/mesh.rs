//! `granary mesh`: the mesh key at work. It makes members, and puts them out again.

mod members;

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use granary_protocol::admission::{Issued, USES_MAX, fingerprint};
use granary_protocol::certificate::{Certificate, Permissions, SignedCertificate, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::{Revocations, SignedRevocations};
use granary_protocol::signature::{KeyName, PublicKey, SecretKey};
use granary_protocol::ticket::{
    Refused, Request, TICKET_ADDRESSES_MAX, TICKET_TEXT_BYTES_MAX, Ticket,
};
use zeroize::Zeroizing;

use super::{ConfigFile, SECONDS_PER_DAY, ask, print};
use crate::admission::{self, AskError, read_mesh_key};
use crate::clock::unix_time;
use crate::config::Config;
use crate::daemon;
use crate::identity::Identity;
use crate::mesh::is_reachable;
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
const CERTIFICATE_DAYS: u64 = 30;

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
    Ticket(TicketArguments),
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
pub struct TicketArguments {
    /// How many machines may join with it.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=USES_MAX as i64))]
    uses: u32,
    /// For how long: `30m`, `12h`, `7d`.
    #[arg(long, default_value = "7d", value_parser = span)]
    expires: Duration,
    /// Permissions: share, vouch, `push:<cache pattern>`.
    #[arg(long, default_value = "share,vouch")]
    allow: Permissions,
    /// Days that certificates are good for; they renew themselves.
    #[arg(long, default_value_t = CERTIFICATE_DAYS)]
    days: u64,
    /// Names or addresses by which the others reach this machine. Default: those of its interfaces.
    #[arg(long)]
    host: Vec<String>,
    #[command(flatten)]
    config: ConfigFile,
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
    #[arg(long, default_value = "10m", value_parser = span)]
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
        Command::Ticket(arguments) => ticket(arguments),
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
    let next = match ask(&config, "/health").await {
        Ok(_) => "restart the node: it belongs to no mesh yet",
        Err(_) => "next: granary node, and granary use for Nix",
    };
    print(&format!(
        "{public}\nthis machine is its first member, {}; granary mesh ticket admits others\n{next}\n",
        own.name
    ))
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

/// Makes a ticket, which the running node of this machine knows at once.
fn ticket(arguments: TicketArguments) -> Result<()> {
    let config = arguments.config.load()?;
    let key_file = config.mesh_key_file();
    let key = read_mesh_key(&key_file)?;
    let public = key.public_key();
    if let Some(configured) = config.mesh.key.as_ref().filter(|other| **other != public) {
        bail!("the key is that of mesh {public}, this machine belongs to {configured}");
    }
    let (admits, peers) = match arguments.host.is_empty() {
        false => (
            with_port(&arguments.host, &config.mesh.transfer),
            with_port(&arguments.host, &config.mesh.listen),
        ),
        true => (
            reachable(&config.mesh.transfer)?,
            reachable(&config.mesh.listen)?,
        ),
    };
    if admits.is_empty() {
        bail!("this machine has no address but loopback; give --host");
    }
    let now = unix_time();
    let secret = admission::new_secret().context("the system gave no random bytes")?;
    let seconds = arguments.days.checked_mul(SECONDS_PER_DAY);
    let expires = UnixTime(now.0.saturating_add(arguments.expires.as_secs()));
    let issued = Issued::new(
        &secret,
        expires,
        arguments.uses,
        arguments.allow,
        seconds.context("--days is too large")?,
    );
    {
        let _lock = state_folder::lock(&config.state_dir)
            .with_context(|| format!("cannot lock {}", config.state_dir.display()))?;
        let file = config.tickets_file();
        let mut tickets = admission::read_tickets(&file)?;
        tickets.add(issued, now)?;
        admission::write_tickets(&file, &tickets)?;
    }
    let ticket = Ticket {
        mesh: public,
        admits,
        peers,
        secret: Some(secret),
        expires,
    };
    print(&format!("{}\n", ticket.to_text()?.as_str()))
}

/// A span of time as a person writes it: `90s`, `30m`, `12h`, `7d`.
fn span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no span of time such as 30m, 12h or 7d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => SECONDS_PER_DAY,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let seconds = number.checked_mul(seconds).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

fn with_port(hosts: &[String], listen: &[SocketAddr]) -> Vec<String> {
    let Some(port) = listen.first().map(SocketAddr::port) else {
        return Vec::new();
    };
    let hosts = hosts.iter().take(TICKET_ADDRESSES_MAX);
    let with_port = |host: &String| match host.parse() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    };
    hosts.map(with_port).collect()
}

/// Where others reach what listens here.
fn reachable(listen: &[SocketAddr]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for address in listen {
        if !address.ip().is_unspecified() {
            found.push(*address);
            continue;
        }
        let interfaces = if_addrs::get_if_addrs().context("cannot list the network interfaces")?;
        let ips = interfaces.iter().map(if_addrs::Interface::ip);
        let ips = ips.filter(|ip| ip.is_ipv4() == address.is_ipv4() && is_reachable(*ip));
        found.extend(ips.map(|ip| SocketAddr::new(ip, address.port())));
    }
    let found = found.iter().take(TICKET_ADDRESSES_MAX);
    Ok(found.map(SocketAddr::to_string).collect())
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
    let next = match ask(&config, "/health").await {
        Ok(_) if config.mesh.key.is_none() => "restart the node: it belongs to no mesh yet",
        Ok(_) => "the running node uses it",
        Err(_) => "next: granary node, and granary use for Nix",
    };
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
    fn spans_are_read_as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(span(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "7", "d", "-1d", "1w", "99999999999999999999d", "1é"] {
            assert!(span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hosts_get_the_port_as_a_ticket_has_it() {
        let hosts = ["nas.lan", "10.0.0.1", "fd00::1"].map(str::to_owned);
        let listen = ["0.0.0.0:4728".parse().unwrap()];
        assert_eq!(
            with_port(&hosts, &listen),
            ["nas.lan:4728", "10.0.0.1:4728", "[fd00::1]:4728"]
        );
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
