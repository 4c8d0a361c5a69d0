//! Discovery: neighbours on the local network, by mDNS service discovery (RFC 6762, RFC 6763).
//!
//! A node announces `_granary._tcp` with four TXT values: its peer id, the protocol version, a tag that tells its mesh
//! from others (a hash, not the key), and the port of its data plane; and a fifth, `public`, if it shares in public. Names of the instance and of the host are made
//! from the peer id, so a listener in a café learns that a node is there, and nothing about the machine or its owner.
//!
//! What is found is a hint: anybody may announce anything. The Noise handshake proves the peer id, Hello the membership.
//!
//! Invariants: everything read from the network is bounded and parsed strictly, and never panics; no mDNS at all (no
//! socket, no multicast) costs a warning and the neighbours, nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libp2p::PeerId;
use mdns_sd::{
    DaemonEvent, IfKind, Receiver, ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo,
    TxtProperties,
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::identity::ed25519_of;

/// The service under which nodes find each other; RFC 6763 allows 15 characters before `._tcp`.
const SERVICE: &str = "_granary._tcp.local.";

/// Peers that are remembered. Beyond it new ones are ignored until others leave: a mesh of this size has anchors and
/// configured peers, and a flood of invented names must not fill memory.
pub const PEERS_MAX: usize = 1024;

/// Addresses taken from one announcement, best first. A machine with more has bridges that lead nowhere.
pub const ADDRESSES_MAX: usize = 8;

/// The TXT value of a node that shares in public; it is 1, or not there.
const PUBLIC: &str = "public";

/// Characters of a TXT value. A peer id has 52, a tag is a hash in base 32 or 16.
const TXT_VALUE_MAX: usize = 64;

/// A daemon that announced nothing for so long has no socket, or the machine no network. mdns-sd opens its sockets once,
/// keeps silent when it cannot, and never tries again: so it is started anew, as often as this. Announcing takes 1 s.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Before browsing again when the channel closed under us; keeps a broken daemon from spinning.
const BROWSE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// For the goodbye to leave; mdns-sd's thread needs milliseconds.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// What a node says about itself, and where it listens.
#[derive(Clone, Debug)]
pub struct Config {
    pub me: PeerId,
    /// The version of the messages that we speak; nodes with another one are found too, and the mind decides.
    pub version: u32,
    /// Tells our mesh from others: lower-case letters and digits, at most [`TXT_VALUE_MAX`] of them.
    pub mesh_tag: String,
    /// Of the control plane.
    pub listen_port: u16,
    /// Of the data plane.
    pub transfer_port: u16,
    /// [`mdns_sd::MDNS_PORT`], another one in tests.
    pub mdns_port: u16,
    /// Whether strangers may ask this node for what is shared in public.
    pub is_public: bool,
    /// Whether nodes of other meshes that share in public are told of.
    pub finds_strangers: bool,
    /// Names of the interfaces to use, loopback only if it is named here; empty means all but loopback.
    pub interfaces: Vec<String>,
}

/// Who is there and who left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiscoveryEvent {
    /// A peer of our mesh, new or with other addresses than before.
    Found {
        peer: PeerId,
        /// Of its control plane: IPv4, then global and unique local IPv6; never empty.
        addresses: Vec<SocketAddr>,
        transfer_port: u16,
        mesh_tag: String,
        version: u32,
    },
    /// It said goodbye, or its announcement expired.
    Lost {
        peer: PeerId,
    },
    /// A node of another mesh that shares in public, and where its data plane is.
    FoundStranger {
        peer: PeerId,
        address: SocketAddr,
    },
    LostStranger {
        peer: PeerId,
    },
}

/// Why there is no discovery. The node goes on without.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("cannot start mDNS on port {port}: {source}")]
    Start { port: u16, source: mdns_sd::Error },
    #[error("cannot announce this node by mDNS: {0}")]
    Announce(#[source] mdns_sd::Error),
    #[error("cannot look for nodes by mDNS: {0}")]
    Browse(#[source] mdns_sd::Error),
    #[error("mesh tag {tag:?} is not 1 to {TXT_VALUE_MAX} lower-case letters or digits")]
    MeshTag { tag: String },
}

/// The announcement of this node and the neighbours that it sees.
pub struct Discovery {
    config: Config,
    daemon: ServiceDaemon,
    browser: Receiver<ServiceEvent>,
    monitor: Option<Receiver<DaemonEvent>>,
    /// When to start again, unless the daemon announces something before.
    silent_until: Option<Instant>,
    has_warned: bool,
    /// By the full name of the service, which is all that a removal tells.
    found: BTreeMap<String, Found>,
    /// Nodes of other meshes that share in public, in the same way.
    strangers: BTreeMap<String, (PeerId, SocketAddr)>,
    foreign: u64,
    malformed: u64,
}

#[derive(PartialEq, Eq)]
struct Found {
    peer: PeerId,
    addresses: Vec<SocketAddr>,
    transfer_port: u16,
    version: u32,
}

impl Discovery {
    /// Announces this node and starts to look for others.
    ///
    /// # Errors
    /// Only what fails at once. When sockets cannot be opened, [`Discovery::next`] warns once and starts again every
    /// [`SILENCE_MAX`].
    pub fn new(config: Config) -> Result<Self, DiscoveryError> {
        if !is_tag(&config.mesh_tag) {
            return Err(DiscoveryError::MeshTag {
                tag: config.mesh_tag,
            });
        }
        let (daemon, browser) = start(&config)?;
        Ok(Self {
            monitor: daemon.monitor().ok(),
            daemon,
            browser,
            silent_until: Some(Instant::now() + SILENCE_MAX),
            has_warned: false,
            config,
            found: BTreeMap::new(),
            strangers: BTreeMap::new(),
            foreign: 0,
            malformed: 0,
        })
    }

    /// Announces this node anew, after a change of the network or of what it says.
    ///
    /// New addresses of known interfaces are noticed without it, within seconds.
    pub fn announce_again(&self) -> Result<(), DiscoveryError> {
        let service = announcement(&self.config).map_err(DiscoveryError::Announce)?;
        self.daemon
            .register(service)
            .map_err(DiscoveryError::Announce)
    }

    /// Announcements of other meshes that were ignored.
    pub fn foreign_total(&self) -> u64 {
        self.foreign
    }

    /// Announcements that made no sense, or came when [`PEERS_MAX`] were known.
    pub fn malformed_total(&self) -> u64 {
        self.malformed
    }

    /// Waits for the next event. Cancel-safe. Never ends: without mDNS it waits for ever.
    pub async fn next(&mut self) -> DiscoveryEvent {
        loop {
            tokio::select! {
                event = self.browser.recv_async() => match event {
                    Ok(event) => {
                        if let Some(event) = self.take(event) {
                            return event;
                        }
                    }
                    // mdns-sd closes the channel of a receiver that lagged, without a word.
                    Err(_) => self.browse_again().await,
                },
                event = recv(&self.monitor) => match event {
                    Some(DaemonEvent::Announce(..)) => self.silent_until = None,
                    Some(event) => note(event),
                    None => self.monitor = None,
                },
                () = until(self.silent_until) => self.start_again(),
            }
        }
    }

    /// Withdraws the announcement, so that neighbours need not wait for it to expire, and stops.
    pub async fn shutdown(self) {
        // The daemon says goodbye for every service on its way out. It wants to be asked again when its queue is full.
        let farewell = async {
            loop {
                match self.daemon.shutdown() {
                    Ok(done) => return drop(done.recv_async().await),
                    Err(mdns_sd::Error::Again) => sleep(Duration::from_millis(10)).await,
                    Err(_) => return,
                }
            }
        };
        if timeout(SHUTDOWN_DEADLINE, farewell).await.is_err() {
            debug!("left mDNS without goodbye");
        }
    }

    /// Stops without a word, as on a network that is not to hear of this node.
    pub fn hush(self) {
        // Before it is dropped, which says goodbye on every interface that is left.
        if let Err(error) = self.daemon.disable_interface(IfKind::All) {
            debug!(%error, "could not keep mDNS quiet");
        }
    }

    async fn browse_again(&mut self) {
        // Before the new channel exists, so that a cancelled wait changes nothing.
        sleep(BROWSE_AGAIN_AFTER).await;
        match self.daemon.browse(SERVICE) {
            Ok(browser) => {
                info!("looked for neighbours again, the events had been cut off");
                self.browser = browser;
                // Who left in the meantime is not told; who is there is found again.
                self.forget();
            }
            Err(error) => debug!(%error, "failed to look for neighbours again"),
        }
    }

    /// Leaves and begins anew, after the network changed.
    ///
    /// mdns-sd looks for new interfaces every few seconds only, and does not ask again on one that came back.
    pub fn restart(&mut self) {
        self.silent_until = Some(Instant::now() + SILENCE_MAX);
        match start(&self.config) {
            Ok((daemon, browser)) => {
                let _ = self.daemon.shutdown();
                self.monitor = daemon.monitor().ok();
                self.daemon = daemon;
                self.browser = browser;
                self.forget();
            }
            Err(error) => debug!(%error, "failed to start mDNS again"),
        }
    }

    fn forget(&mut self) {
        self.found.clear();
        self.strangers.clear();
    }

    fn start_again(&mut self) {
        if !self.has_warned {
            self.has_warned = true;
            let port = self.config.mdns_port;
            warn!(
                port,
                "announced nothing by mDNS, neighbours will not be found; is the port free and a network up?"
            );
        }
        self.restart();
    }

    fn take(&mut self, event: ServiceEvent) -> Option<DiscoveryEvent> {
        match event {
            ServiceEvent::ServiceResolved(service) => self.resolved(&service),
            ServiceEvent::ServiceRemoved(_, name) => self.removed(&name),
            _ => None,
        }
    }

    fn resolved(&mut self, service: &ResolvedService) -> Option<DiscoveryEvent> {
        let Some(announced) = Announced::parse(service) else {
            self.malformed += 1;
            debug!("ignored malformed announcement");
            return None;
        };
        if announced.peer == self.config.me {
            return None;
        }
        if announced.mesh_tag != self.config.mesh_tag {
            self.foreign += 1;
            if self.config.finds_strangers && announced.is_public {
                let address = usable(addresses_of(service), announced.transfer_port);
                return self.stranger(&service.fullname, announced.peer, *address.first()?);
            }
            debug!(peer = %announced.peer, "ignored node of another mesh");
            return self.removed(&service.fullname);
        }
        let ips = addresses_of(service);
        let addresses = usable(ips, service.port);
        if addresses.is_empty() {
            // Addresses arrive one by one; a link-local one may be the first.
            return None;
        }
        let found = Found {
            peer: announced.peer,
            addresses: addresses.clone(),
            transfer_port: announced.transfer_port,
            version: announced.version,
        };
        // The same name may come with another id: a conflict, or somebody who plays with us. The handshake will tell.
        match self.found.get(&service.fullname) {
            Some(known) if *known == found => return None,
            None if self.found.len() >= PEERS_MAX => {
                self.malformed += 1;
                return None;
            }
            _ => self.found.insert(service.fullname.clone(), found),
        };
        Some(DiscoveryEvent::Found {
            peer: announced.peer,
            addresses,
            transfer_port: announced.transfer_port,
            mesh_tag: announced.mesh_tag,
            version: announced.version,
        })
    }

    fn stranger(
        &mut self,
        name: &str,
        peer: PeerId,
        address: SocketAddr,
    ) -> Option<DiscoveryEvent> {
        match self.strangers.get(name) {
            Some(known) if *known == (peer, address) => return None,
            None if self.strangers.len() >= PEERS_MAX => return None,
            _ => self.strangers.insert(name.to_owned(), (peer, address)),
        };
        Some(DiscoveryEvent::FoundStranger { peer, address })
    }

    fn removed(&mut self, name: &str) -> Option<DiscoveryEvent> {
        if let Some((peer, _)) = self.strangers.remove(name) {
            return Some(DiscoveryEvent::LostStranger { peer });
        }
        let Found { peer, .. } = self.found.remove(name)?;
        // The same peer under another name is still there.
        if self.found.values().any(|other| other.peer == peer) {
            return None;
        }
        Some(DiscoveryEvent::Lost { peer })
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        // Its thread would outlive us otherwise, and go on announcing. After `shutdown` this is refused, as it should.
        let _ = self.daemon.shutdown();
    }
}

/// Starts a daemon that announces this node and looks for others.
fn start(config: &Config) -> Result<(ServiceDaemon, Receiver<ServiceEvent>), DiscoveryError> {
    let port = config.mdns_port;
    let error = |source| DiscoveryError::Start { port, source };
    let daemon = ServiceDaemon::new_with_port(port).map_err(error)?;
    // The last word counts: first none, or all but loopback, then what was asked for.
    if config.interfaces.is_empty() {
        daemon
            .disable_interface(vec![IfKind::LoopbackV4, IfKind::LoopbackV6])
            .map_err(error)?;
    } else {
        daemon.disable_interface(IfKind::All).map_err(error)?;
        daemon.enable_interface(interfaces(config)).map_err(error)?;
    }
    let browser = daemon.browse(SERVICE).map_err(DiscoveryError::Browse)?;
    let service = announcement(config).map_err(DiscoveryError::Announce)?;
    daemon.register(service).map_err(DiscoveryError::Announce)?;
    Ok((daemon, browser))
}

/// What the TXT record of an announcement says, once it is known to make sense.
struct Announced {
    peer: PeerId,
    version: u32,
    mesh_tag: String,
    transfer_port: u16,
    is_public: bool,
}

impl Announced {
    fn parse(service: &ResolvedService) -> Option<Self> {
        if service.port == 0 {
            return None;
        }
        Self::parse_txt(&service.txt_properties)
    }

    fn parse_txt(txt: &TxtProperties) -> Option<Self> {
        let value = |key| {
            let value = txt.get(key)?.val()?;
            if value.is_empty() || value.len() > TXT_VALUE_MAX {
                return None;
            }
            std::str::from_utf8(value).ok()
        };
        let peer: PeerId = value("id")?.parse().ok()?;
        ed25519_of(&peer)?;
        let mesh_tag = value("mesh")?.to_owned();
        if !is_tag(&mesh_tag) {
            return None;
        }
        let transfer_port = u16::try_from(number(value("transfer")?)?).ok()?;
        if transfer_port == 0 {
            return None;
        }
        Some(Self {
            peer,
            version: number(value("v")?)?,
            mesh_tag,
            transfer_port,
            is_public: value(PUBLIC) == Some("1"),
        })
    }
}

fn addresses_of(service: &ResolvedService) -> BTreeSet<IpAddr> {
    let addresses = service.addresses.iter();
    addresses.map(|address| address.to_ip_addr()).collect()
}

/// A decimal number without sign or leading zeros: one form for each.
fn number(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    (is_plain && (text == "0" || !text.starts_with('0')))
        .then(|| text.parse().ok())
        .flatten()
}

fn is_tag(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=TXT_VALUE_MAX).contains(&text.len()) && text.bytes().all(is_plain)
}

/// Orders addresses by how likely they are to work: IPv4, then IPv6. Link-local IPv6 is left out, because libp2p has
/// no place for its zone.
fn usable(ips: BTreeSet<IpAddr>, port: u16) -> Vec<SocketAddr> {
    ips.into_iter()
        .filter(|ip| match ip {
            IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast(),
            IpAddr::V6(ip) => {
                !ip.is_unspecified() && !ip.is_multicast() && !ip.is_unicast_link_local()
            }
        })
        .take(ADDRESSES_MAX)
        .map(|ip| SocketAddr::new(ip, port))
        .collect()
}

fn interfaces(config: &Config) -> Vec<IfKind> {
    config
        .interfaces
        .iter()
        .map(|name| IfKind::Name(name.clone()))
        .collect()
}

fn announcement(config: &Config) -> Result<ServiceInfo, mdns_sd::Error> {
    let id = config.me.to_string();
    let version = config.version.to_string();
    let transfer = config.transfer_port.to_string();
    let mut txt = vec![
        ("id", id.as_str()),
        ("v", &version),
        ("mesh", &config.mesh_tag),
        ("transfer", &transfer),
    ];
    if config.is_public {
        txt.push((PUBLIC, "1"));
    }
    // DNS labels have at most 63 bytes; a peer id of an ed25519 key has 52.
    let host = format!("granary-{}.local.", id.to_ascii_lowercase());
    let mut service =
        ServiceInfo::new(SERVICE, &id, &host, "", config.listen_port, &txt[..])?.enable_addr_auto();
    if !config.interfaces.is_empty() {
        service.set_interfaces(interfaces(config));
    }
    Ok(service)
}

/// Waits until then, or for ever.
async fn until(then: Option<Instant>) {
    match then {
        Some(then) => sleep_until(then).await,
        None => std::future::pending().await,
    }
}

/// The next event of a channel that may be absent or over; waits for ever if it is absent.
async fn recv(channel: &Option<Receiver<DaemonEvent>>) -> Option<DaemonEvent> {
    match channel {
        Some(channel) => channel.recv_async().await.ok(),
        None => std::future::pending().await,
    }
}

fn note(event: DaemonEvent) {
    match event {
        DaemonEvent::Error(error) => warn!(%error, "mDNS failed, neighbours may not be found"),
        DaemonEvent::NameChange(change) => {
            // Two machines with one key, for example a cloned disk.
            warn!(name = %change.original, "another machine announces the peer id of this one");
        }
        other => debug!(?other, "mDNS reported"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::identity::Identity;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A private port per test, so that tests that run together do not hear each other.
    fn free_port() -> u16 {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.local_addr().unwrap().port()
    }

    fn config(seed: u8, mesh_tag: &str, mdns_port: u16) -> Config {
        Config {
            me: Identity::from_seed(&[seed; 32]).peer_id(),
            version: 1,
            mesh_tag: mesh_tag.to_owned(),
            listen_port: 4700 + u16::from(seed),
            transfer_port: 4800 + u16::from(seed),
            mdns_port,
            is_public: false,
            finds_strangers: false,
            interfaces: vec!["lo".to_owned()],
        }
    }

    async fn next(discovery: &mut Discovery) -> DiscoveryEvent {
        timeout(PATIENCE, discovery.next()).await.expect("an event")
    }

    fn expect_found(event: DiscoveryEvent, seed: u8) {
        let wanted = config(seed, "red", 1);
        match event {
            DiscoveryEvent::Found {
                peer,
                addresses,
                transfer_port,
                mesh_tag,
                version,
            } => {
                assert_eq!(peer, wanted.me);
                assert!(!addresses.is_empty());
                for address in addresses {
                    assert!(address.ip().is_loopback(), "{address}");
                    assert_eq!(address.port(), wanted.listen_port);
                }
                assert_eq!(transfer_port, wanted.transfer_port);
                assert_eq!((mesh_tag.as_str(), version), ("red", 1));
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn two_nodes_find_each_other_and_hear_goodbye() {
        let port = free_port();
        let mut one = Discovery::new(config(1, "red", port)).unwrap();
        let mut two = Discovery::new(config(2, "red", port)).unwrap();
        expect_found(next(&mut one).await, 2);
        expect_found(next(&mut two).await, 1);
        // A daemon that announced is not started again.
        while one.silent_until.is_some() {
            let _ = timeout(Duration::from_millis(50), one.next()).await;
        }
        assert!(!one.has_warned);
        let left = config(2, "red", port).me;
        two.shutdown().await;
        loop {
            match next(&mut one).await {
                DiscoveryEvent::Lost { peer } => return assert_eq!(peer, left),
                // The other family's addresses may have come in between.
                found => expect_found(found, 2),
            }
        }
    }

    #[tokio::test]
    async fn node_of_another_mesh_is_counted_and_ignored() {
        let port = free_port();
        let mut red = Discovery::new(config(1, "red", port)).unwrap();
        let _blue = Discovery::new(config(2, "blue", port)).unwrap();
        while red.foreign_total() == 0 {
            tokio::select! {
                event = red.next() => panic!("{event:?}"),
                () = sleep(Duration::from_millis(20)) => {}
            }
        }
        // And one of ours is still found.
        let _other = Discovery::new(config(3, "red", port)).unwrap();
        expect_found(next(&mut red).await, 3);
    }

    #[tokio::test]
    async fn node_of_another_mesh_that_shares_in_public_is_found_by_who_wants_that() {
        let port = free_port();
        let mut red = Discovery::new(Config {
            finds_strangers: true,
            ..config(1, "red", port)
        });
        let red = red.as_mut().unwrap();
        let _silent = Discovery::new(config(2, "blue", port)).unwrap();
        let public = Discovery::new(Config {
            is_public: true,
            ..config(3, "blue", port)
        });
        let wanted = config(3, "blue", port);
        match next(red).await {
            DiscoveryEvent::FoundStranger { peer, address } => {
                assert_eq!(peer, wanted.me);
                assert_eq!(address.port(), wanted.transfer_port);
            }
            other => panic!("{other:?}"),
        }
        public.unwrap().shutdown().await;
        loop {
            match next(red).await {
                DiscoveryEvent::LostStranger { peer } => return assert_eq!(peer, wanted.me),
                // The other family's addresses may have come in between.
                DiscoveryEvent::FoundStranger { peer, .. } => assert_eq!(peer, wanted.me),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn closed_channel_is_opened_again() {
        let port = free_port();
        let mut one = Discovery::new(config(1, "red", port)).unwrap();
        // A channel that is over, as mdns-sd leaves it when it drops a slow receiver.
        let over = one.daemon.browse("_other._tcp.local.").unwrap();
        one.daemon.stop_browse("_other._tcp.local.").unwrap();
        while over.recv_async().await.is_ok() {}
        one.browser = over;
        let _two = Discovery::new(config(2, "red", port)).unwrap();
        expect_found(next(&mut one).await, 2);
    }

    /// Without mDNS a node waits, announces into the void and stops as usual.
    async fn check_is_harmless(config: Config) {
        let mut discovery = Discovery::new(config).unwrap();
        let waited = timeout(Duration::from_millis(500), discovery.next()).await;
        assert!(waited.is_err(), "{waited:?}");
        // The daemon may be gone by now, which is an answer; a panic would not be one.
        let _ = discovery.announce_again();
        timeout(PATIENCE, discovery.shutdown()).await.unwrap();
    }

    #[tokio::test]
    async fn absent_interface_is_no_disaster() {
        check_is_harmless(Config {
            interfaces: vec!["no-such-interface".to_owned()],
            ..config(1, "red", free_port())
        })
        .await;
    }

    #[tokio::test]
    async fn unusable_socket_is_no_disaster_and_is_tried_again() {
        // Both families, and not to be shared.
        let taken = UdpSocket::bind("[::]:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        check_is_harmless(config(1, "red", port)).await;

        let mut one = Discovery::new(config(1, "red", port)).unwrap();
        let waited = timeout(Duration::from_secs(2), one.next()).await;
        assert!(waited.is_err(), "{waited:?}");
        assert!(one.silent_until.is_some(), "announced without a socket");
        drop(taken);
        one.silent_until = Some(Instant::now());
        let _two = Discovery::new(config(2, "red", port)).unwrap();
        expect_found(next(&mut one).await, 2);
        assert!(one.has_warned);
    }

    #[test]
    fn announcement_tells_nothing_about_the_machine() {
        let config = config(1, "red", 1);
        let service = announcement(&config).unwrap();
        let id = config.me.to_string();
        assert_eq!(service.get_fullname(), format!("{id}.{SERVICE}"));
        assert_eq!(
            service.get_hostname(),
            format!("granary-{}.local.", id.to_lowercase())
        );
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert!(!service.get_hostname().contains(host.trim()));
        let mut keys: Vec<_> = service
            .get_properties()
            .iter()
            .map(|txt| txt.key())
            .collect();
        keys.sort_unstable();
        assert_eq!(keys, ["id", "mesh", "transfer", "v"]);
    }

    #[test]
    fn announcements_are_parsed_strictly() {
        let id = config(1, "red", 1).me.to_string();
        let check = |id: &str, version: &str, mesh: &str, transfer: &str| {
            let pairs = [
                ("id", id),
                ("v", version),
                ("mesh", mesh),
                ("transfer", transfer),
            ];
            let mut bytes = Vec::new();
            for (key, value) in pairs.iter().filter(|(_, value)| *value != "absent") {
                bytes.push((key.len() + 1 + value.len()) as u8);
                bytes.extend_from_slice(format!("{key}={value}").as_bytes());
            }
            Announced::parse_txt(&TxtProperties::from(&bytes[..])).is_some()
        };
        assert!(check(&id, "1", "abc123", "4728"));
        assert!(check(&id, "4294967295", "a", "65535"));
        let long = "a".repeat(65);
        for (version, mesh, transfer) in [
            ("absent", "abc", "4728"),
            ("1", "absent", "4728"),
            ("1", "abc", "absent"),
            ("", "abc", "4728"),
            ("+1", "abc", "4728"),
            ("01", "abc", "4728"),
            ("4294967296", "abc", "4728"),
            ("1", "ABC", "4728"),
            ("1", "a c", "4728"),
            ("1", &long, "4728"),
            ("1", "abc", "0"),
            ("1", "abc", "65536"),
            ("1", "abc", "-1"),
        ] {
            assert!(
                !check(&id, version, mesh, transfer),
                "{version:?} {mesh:?} {transfer:?}"
            );
        }
        let rsa_like = PeerId::random().to_string();
        for id in ["absent", "", "nobody", &rsa_like, &long, &id[..51]] {
            assert!(!check(id, "1", "abc", "4728"), "{id:?}");
        }
    }

    #[test]
    fn addresses_are_ordered_and_bounded() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let addresses = usable(
            ips(&[
                "fe80::1",
                "fd00::1",
                "192.168.1.2",
                "224.0.0.1",
                "::",
                "0.0.0.0",
            ]),
            7,
        );
        assert_eq!(
            addresses,
            [
                "192.168.1.2:7".parse().unwrap(),
                "[fd00::1]:7".parse().unwrap()
            ]
        );
        let many = (0..100).map(|n| IpAddr::from([10, 0, 0, n + 1])).collect();
        assert_eq!(usable(many, 7).len(), ADDRESSES_MAX);
    }
}
