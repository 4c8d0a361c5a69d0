//! Place: in which networks this machine is, and so where the node may be heard and reached.
//!
//! Read from what Linux says: addresses, default routes and the hardware addresses of their gateways. The decision is
//! [`Reach`]'s. It is made anew when the network changed, and now and then, because a gateway's hardware address is known
//! only after somebody spoke to it. Until it is made, and when it cannot be, the node keeps quiet.
//!
//! Gateways are those of IPv4: Linux tells of IPv6's neighbours over netlink alone, and a network that has
//! IPv6 only can be named by its interface.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use granary_protocol::network::{HardwareAddress, Interface, Network, Reach};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often it is looked without a reason. Three small readings of the kernel's memory.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Bytes read of each of the kernel's tables: some thousand neighbours.
const TABLE_BYTES_MAX: u64 = 1 << 20;

/// Of a network, for ever unchanged while the process runs: `self` is where a sandbox still shows it.
const ROUTES: &str = "/proc/self/net/route";
const NEIGHBOURS: &str = "/proc/self/net/arp";

/// A default route that is up and leads through a gateway.
const ROUTE_FLAGS: u32 = 0x1 | 0x2;

/// A neighbour whose hardware address is known.
const NEIGHBOUR_COMPLETE: u32 = 0x2;

/// What others ask of where the machine is. Cheap to clone.
#[derive(Clone)]
pub struct Place {
    /// Changes when it was decided anew, be it to the same.
    pub reach: watch::Receiver<Arc<Reach>>,
    look: Arc<Notify>,
}

impl Place {
    /// Follows where the machine is, until `shutdown`. Must be called inside a tokio runtime.
    pub fn follow(networks: Vec<Network>, shutdown: CancellationToken) -> Place {
        let first = match networks.is_empty() {
            true => Reach::Everywhere,
            false => Reach::nowhere(),
        };
        let (sender, reach) = watch::channel(Arc::new(first));
        let look = Arc::new(Notify::new());
        if !networks.is_empty() {
            let look = look.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = shutdown.cancelled() => {}
                    () = run(networks, &look, &sender) => {}
                }
            });
        }
        Place { reach, look }
    }

    /// Has it decided anew at once, since the network changed.
    pub fn look_again(&self) {
        self.look.notify_one();
    }
}

async fn run(networks: Vec<Network>, look: &Notify, sender: &watch::Sender<Arc<Reach>>) {
    let mut is_asked = true;
    let mut has_warned = false;
    loop {
        let read = tokio::task::spawn_blocking(interfaces).await;
        let reach = match read {
            Ok(Ok(interfaces)) => Reach::decide(&networks, &interfaces),
            Ok(Err(error)) => {
                if !std::mem::replace(&mut has_warned, true) {
                    warn!(%error, "could not read in which network this machine is, keeping quiet");
                }
                Reach::nowhere()
            }
            // The runtime is going down.
            Err(_) => return,
        };
        sender.send_if_modified(|current| {
            let is_news = **current != reach;
            if is_news {
                let silent = reach.silent().collect::<Vec<_>>().join(", ");
                info!(%silent, "decided where to be heard, by mesh.networks");
                *current = Arc::new(reach);
            }
            // Who asked waits for an answer, be it the same.
            is_news || is_asked
        });
        is_asked = tokio::select! {
            () = look.notified() => true,
            () = tokio::time::sleep(LOOK_INTERVAL) => false,
        };
    }
}

/// What this machine knows of its interfaces.
fn interfaces() -> io::Result<Vec<Interface>> {
    let gateways = gateways(&table(ROUTES)?, &table(NEIGHBOURS)?);
    let mut interfaces = BTreeMap::<String, Interface>::new();
    for found in if_addrs::get_if_addrs()? {
        let interface = interfaces.entry(found.name.clone()).or_default();
        interface.is_loopback = found.is_loopback();
        interface.addresses.push(found.ip());
    }
    let named = interfaces.into_iter().map(|(name, interface)| Interface {
        gateways: gateways.get(&name).cloned().unwrap_or_default(),
        name,
        ..interface
    });
    Ok(named.collect())
}

fn table(path: &str) -> io::Result<String> {
    let mut text = String::new();
    let mut file = File::open(path)?.take(TABLE_BYTES_MAX);
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// The hardware addresses of gateways by interface, as far as they are known.
fn gateways(routes: &str, neighbours: &str) -> BTreeMap<String, Vec<HardwareAddress>> {
    let mut gateways = BTreeMap::<String, Vec<HardwareAddress>>::new();
    for (interface, gateway) in routes.lines().filter_map(default_route) {
        let known = neighbours.lines().filter_map(neighbour);
        let known =
            known.filter(|(address, _, device)| *address == gateway && *device == interface);
        let addresses = known.map(|(_, address, _)| address);
        gateways
            .entry(interface.to_owned())
            .or_default()
            .extend(addresses);
    }
    gateways
}

/// Interface, destination, gateway, flags, …, mask, in hexadecimal numbers as they stand in memory.
fn default_route(line: &str) -> Option<(&str, Ipv4Addr)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [
        interface,
        "00000000",
        gateway,
        flags,
        _,
        _,
        _,
        "00000000",
        ..,
    ] = words[..]
    else {
        return None;
    };
    let flags = u32::from_str_radix(flags, 16).ok()?;
    let gateway = u32::from_str_radix(gateway, 16).ok()?;
    (flags & ROUTE_FLAGS == ROUTE_FLAGS)
        .then_some((interface, Ipv4Addr::from(gateway.to_ne_bytes())))
}

/// IP address, type, flags, hardware address, mask, interface.
fn neighbour(line: &str) -> Option<(Ipv4Addr, HardwareAddress, &str)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [address, _, flags, hardware, _, interface] = words[..] else {
        return None;
    };
    let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
    let is_known = flags & NEIGHBOUR_COMPLETE != 0;
    is_known.then_some((address.parse().ok()?, hardware.parse().ok()?, interface))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
wlan0\t00000000\t0100000A\t0003\t0\t0\t600\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
";
    const NEIGHBOURS: &str = "\
IP address       HW type     Flags       HW address            Mask     Device
192.168.1.1      0x1         0x2         a4:2b:b0:00:00:01     *        eth0
192.168.1.9      0x1         0x2         a4:2b:b0:00:00:09     *        eth0
192.168.1.1      0x1         0x2         66:66:66:66:66:66     *        wlan0
10.0.0.1         0x1         0x0         00:00:00:00:00:00     *        wlan0
";

    #[test]
    fn a_gateway_is_who_the_default_route_leads_through_once_it_has_answered() {
        let home: HardwareAddress = "a4:2b:b0:00:00:01".parse().unwrap();
        let found = gateways(ROUTES, NEIGHBOURS);
        assert_eq!(found["eth0"], [home]);
        assert!(found["wlan0"].is_empty());
        assert!(!found.contains_key("tun0"));
        let answered = NEIGHBOURS.replace(
            "0x0         00:00:00:00:00:00",
            "0x2         a4:2b:b0:00:00:02",
        );
        assert_eq!(gateways(ROUTES, &answered)["wlan0"].len(), 1);
        for garbage in [
            "",
            "x",
            "eth0\t00000000\tzz\t0003\t0\t0\t0\t00000000\n",
            "\t\t\n",
        ] {
            assert!(
                gateways(garbage, NEIGHBOURS).values().all(Vec::is_empty),
                "{garbage:?}"
            );
            assert!(
                gateways(ROUTES, garbage).values().all(Vec::is_empty),
                "{garbage:?}"
            );
        }
    }

    #[test]
    fn this_machine_has_a_loopback_interface() {
        let found = interfaces().unwrap();
        assert!(
            found
                .iter()
                .any(|interface| interface.is_loopback && !interface.addresses.is_empty())
        );
    }
}
