//! Network: in which networks a node lets itself be known, decided from what its machine knows of them.
//!
//! `mesh.networks` names networks by what tells one from another: the interface of this machine that leads there, or
//! the hardware address of the gateway. Neither is a proof (a gateway's address can be imitated); who comes in is
//! decided by certificates wherever a node is. This decides where it keeps quiet.
//!
//! Pure: the facts ([`Interface`]) are read by the caller.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Bytes of an interface's name: Linux' limit, IFNAMSIZ without its zero.
const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// The address of a network card, six bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HardwareAddress(pub [u8; 6]);

/// One entry of `mesh.networks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Whatever this interface of the machine leads to: `eth0`.
    Interface(String),
    /// The network whose gateway has this address: `a4:2b:b0:00:00:01`.
    Gateway(HardwareAddress),
}

/// Why a text names no network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NetworkError {
    #[error(
        "{text:?} names a network by its SSID, which this version cannot read; name its gateway by the hardware address that ip neighbour shows"
    )]
    Ssid { text: String },
    #[error(
        "{text:?} is neither the name of an interface nor a hardware address like a4:2b:b0:00:00:01"
    )]
    Malformed { text: String },
}

/// What is known of one interface of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub is_loopback: bool,
    /// This machine's addresses on it.
    pub addresses: Vec<IpAddr>,
    /// Of the gateways behind it that are known.
    pub gateways: Vec<HardwareAddress>,
}

/// Where a node is heard and can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    Everywhere,
    Within {
        /// On which it announces itself.
        interfaces: BTreeSet<String>,
        /// To which others may connect.
        addresses: BTreeSet<IpAddr>,
        /// Interfaces with addresses on which it keeps quiet.
        silent: BTreeSet<String>,
    },
}

impl Reach {
    /// What holds before anything is known.
    pub fn nowhere() -> Reach {
        Reach::Within {
            interfaces: BTreeSet::new(),
            addresses: BTreeSet::new(),
            silent: BTreeSet::new(),
        }
    }

    /// Decides by the networks of the configuration; without any a node is reachable everywhere.
    ///
    /// This machine itself reaches the node always. An address that an interface of another network has as well
    /// admits nobody.
    pub fn decide(networks: &[Network], interfaces: &[Interface]) -> Reach {
        if networks.is_empty() {
            return Reach::Everywhere;
        }
        let is_named = |interface: &Interface| {
            networks.iter().any(|network| match network {
                Network::Interface(name) => *name == interface.name,
                Network::Gateway(address) => interface.gateways.contains(address),
            })
        };
        let addresses_of = |interface: &Interface| {
            let addresses = interface.addresses.iter().map(IpAddr::to_canonical);
            addresses.collect::<Vec<_>>()
        };
        let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        let (mut silent, mut elsewhere) = (BTreeSet::new(), BTreeSet::new());
        for interface in interfaces {
            if interface.is_loopback {
                addresses.extend(addresses_of(interface));
            } else if is_named(interface) {
                names.insert(interface.name.clone());
                addresses.extend(addresses_of(interface));
            } else if !interface.addresses.is_empty() {
                silent.insert(interface.name.clone());
                elsewhere.extend(addresses_of(interface));
            }
        }
        Reach::Within {
            interfaces: names,
            addresses: &addresses - &elsewhere,
            silent,
        }
    }

    /// Whether who connected to this address of ours may be listened to.
    pub fn admits(&self, local: IpAddr) -> bool {
        let local = local.to_canonical();
        match self {
            Reach::Everywhere => true,
            Reach::Within { addresses, .. } => local.is_loopback() || addresses.contains(&local),
        }
    }

    /// Interfaces with addresses on which the node keeps quiet.
    pub fn silent(&self) -> impl Iterator<Item = &str> {
        let silent = match self {
            Reach::Everywhere => None,
            Reach::Within { silent, .. } => Some(silent),
        };
        silent.into_iter().flatten().map(String::as_str)
    }
}

impl FromStr for HardwareAddress {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<HardwareAddress, NetworkError> {
        let malformed = || NetworkError::Malformed {
            text: text.to_owned(),
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(malformed)?;
            let is_pair = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            let parsed = is_pair.then(|| u8::from_str_radix(part, 16).ok()).flatten();
            *byte = parsed.ok_or_else(malformed)?;
        }
        match parts.next() {
            None => Ok(HardwareAddress(bytes)),
            Some(_) => Err(malformed()),
        }
    }
}

impl fmt::Display for HardwareAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, byte) in self.0.iter().enumerate() {
            let colon = if place > 0 { ":" } else { "" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Network, NetworkError> {
        if let Ok(address) = text.parse() {
            return Ok(Network::Gateway(address));
        }
        let text = text.to_owned();
        if text.starts_with("ssid:") {
            return Err(NetworkError::Ssid { text });
        }
        let is_plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':');
        let is_name =
            (1..=INTERFACE_NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_plain);
        match is_name {
            true => Ok(Network::Interface(text)),
            false => Err(NetworkError::Malformed { text }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: &str = "a4:2b:b0:00:00:01";

    fn interface(name: &str, address: &str, gateway: Option<&str>) -> Interface {
        Interface {
            name: name.into(),
            is_loopback: name == "lo",
            addresses: vec![address.parse().unwrap()],
            gateways: gateway
                .map(|one| one.parse().unwrap())
                .into_iter()
                .collect(),
        }
    }

    fn reach(networks: &[&str], interfaces: &[Interface]) -> Reach {
        let networks: Vec<_> = networks.iter().map(|one| one.parse().unwrap()).collect();
        Reach::decide(&networks, interfaces)
    }

    fn admitted(reach: &Reach, addresses: &[&str]) -> Vec<bool> {
        let admits = |address: &&str| reach.admits(address.parse().unwrap());
        addresses.iter().map(admits).collect()
    }

    #[test]
    fn without_networks_a_node_is_reachable_everywhere() {
        let reach = reach(&[], &[interface("eth0", "10.0.0.1", None)]);
        assert_eq!(reach, Reach::Everywhere);
        assert!(reach.admits("192.0.2.1".parse().unwrap()));
        assert_eq!(reach.silent().count(), 0);
    }

    #[test]
    fn only_named_networks_hear_and_reach_a_node() {
        let machine = [
            interface("lo", "127.0.0.1", None),
            interface("eth0", "10.0.0.1", Some(HOME)),
            interface("wlan0", "10.9.0.1", Some("a4:2b:b0:00:00:02")),
            interface("wg0", "fd00::1", None),
        ];
        let local = [
            "127.0.0.1",
            "10.0.0.1",
            "10.9.0.1",
            "fd00::1",
            "::ffff:10.0.0.1",
        ];
        for (networks, expected, silent) in [
            (&["eth0"][..], [true, true, false, false, true], "wg0 wlan0"),
            (&[HOME], [true, true, false, false, true], "wg0 wlan0"),
            (
                &["A4:2B:B0:00:00:02"],
                [true, false, true, false, false],
                "eth0 wg0",
            ),
            (&[HOME, "wg0"], [true, true, false, true, true], "wlan0"),
            (
                &["eth9"],
                [true, false, false, false, false],
                "eth0 wg0 wlan0",
            ),
        ] {
            let reach = reach(networks, &machine);
            assert_eq!(admitted(&reach, &local), expected, "{networks:?}");
            let found: Vec<_> = reach.silent().collect();
            assert_eq!(found.join(" "), silent, "{networks:?}");
        }
        assert_eq!(
            admitted(&Reach::nowhere(), &local),
            [true, false, false, false, false]
        );
    }

    #[test]
    fn an_address_that_another_network_has_as_well_admits_nobody() {
        let machine = [
            interface("eth0", "192.168.1.5", None),
            interface("wlan0", "192.168.1.5", None),
        ];
        let reach = reach(&["eth0"], &machine);
        assert!(!reach.admits("192.168.1.5".parse().unwrap()));
    }

    #[test]
    fn networks_are_read_strictly() {
        let gateway: Network = HOME.parse().unwrap();
        assert!(matches!(gateway, Network::Gateway(address) if address.to_string() == HOME));
        for name in ["eth0", "wlp0s20f3", "br-lan", "enp3s0.100"] {
            assert_eq!(name.parse(), Ok(Network::Interface(name.into())));
        }
        for text in [
            "",
            "a name",
            "a/b",
            "eth0:1",
            "an-interface-too-long",
            "a4:2b:b0:00:00",
            "a4:2b:b0:00:00:01:02",
            "+4:2b:b0:00:00:01",
            "a4:2b:b0:0:00:01",
            "ß",
        ] {
            let read = text.parse::<Network>();
            assert!(
                matches!(read, Err(NetworkError::Malformed { .. })),
                "{text}"
            );
        }
        assert!(matches!(
            "ssid:Home".parse::<Network>(),
            Err(NetworkError::Ssid { .. })
        ));
    }
}
