//! `mesh.networks`: a node is heard and reached in the networks that it names, and in no other.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::machine::{Lan, MESH_PORT, Machine, TRANSFER_PORT};
use crate::network::{Bridge, Namespace};
use crate::process::{assert_throughout, wait_for};
use crate::tap::{Kind, Tap};

const LAN_PORT: u16 = 4729;

/// A node that starts mDNS announces itself within a second, and asks after one and three.
const WATCHED: Duration = Duration::from_secs(4);
const HEARD: Duration = Duration::from_secs(10);
/// How soon it is noticed that the network is another: the change comes to rest, or it is looked anyway.
const NOTICED: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(2);

const GATEWAY: &str = "10.47.0.254";
const HOME: &str = "02:00:00:00:00:01";
const CAFE: &str = "02:00:00:00:00:02";

/// Bytes that somebody who connects is told, if anybody listens: whatever the protocol, the first word is its.
fn told(from: &Namespace, address: SocketAddr) -> Vec<u8> {
    from.inside(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&address, PATIENCE) else {
            return Vec::new();
        };
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("set timeout");
        // What each of them answers: multistream, and HTTP. TLS answers an alert to either.
        let _ = stream.write_all(b"\x13/multistream/1.0.0\nGET / HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    })
}

fn assert_closed(from: &Namespace, address: &str) {
    for port in [MESH_PORT, TRANSFER_PORT, LAN_PORT] {
        let address = format!("{address}:{port}").parse().expect("an address");
        let answer = told(from, address);
        assert!(answer.is_empty(), "{address} said {answer:?}");
    }
}

/// A namespace that is the gateway of a bridge, by this hardware address.
fn gateway(bridge: &Bridge, name: &str, hardware: &str) -> Namespace {
    let router = bridge.plug(name);
    router.ip(&format!("link set eth0 address {hardware}"));
    router.ip(&format!("address add {GATEWAY}/24 dev eth0"));
    router
}

/// Sends something through the gateway, as every machine does sooner or later.
fn use_gateway(machine: &Machine) {
    machine.namespace.inside(|| {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).expect("bind");
        // Nobody answers; asking for the gateway's hardware address is what it is for.
        let _ = socket.send_to(b"x", (GATEWAY, 9));
    });
}

fn wait_silent(machine: &Machine, interface: &str) {
    let said = format!("silent    on {interface}");
    wait_for("the node says that it is silent", NOTICED, || {
        let status = machine.granary(&["status"]).expect_success();
        status.contains(&said).then_some(()).ok_or(status)
    });
}

fn assert_nothing_heard(tap: &Tap, since: Instant) {
    assert_throughout("nothing is heard by mDNS", WATCHED, || {
        match tap.since(since).count(Kind::Mdns) {
            0 => Ok(()),
            count => Err(format!("{count} packets")),
        }
    });
}

#[test]
fn a_node_is_heard_and_reached_on_the_interface_that_is_named_and_on_no_other() {
    let lan = Lan::new();
    let foreign = Bridge::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    foreign.join(&laptop.namespace, "eth1", "10.48.0.2/24");
    let watcher = foreign.plug("watcher");
    watcher.ip("address add 10.48.0.9/24 dev eth0");
    laptop.settings.mesh_extra = "networks = [\"eth0\"]\n".into();
    laptop.settings.extra = format!("http = \"0.0.0.0:{LAN_PORT}\"\n");
    let tap = Tap::new(&watcher);
    let start = Instant::now();
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    wait_silent(&laptop, "eth1");
    assert_nothing_heard(&tap, start);
    assert_closed(&watcher, "10.48.0.2");
    for port in [MESH_PORT, TRANSFER_PORT, LAN_PORT] {
        let answer = told(&desktop.namespace, laptop.at(port));
        assert!(!answer.is_empty(), "{port} is closed at home");
    }
    laptop.stop();

    // Without the key it is heard and answers there too, so that the test would have seen it.
    laptop.settings.mesh_extra.clear();
    laptop.start();
    wait_for("mDNS is heard", HEARD, || {
        match tap.since(start).count(Kind::Mdns) {
            0 => Err("nothing yet".to_owned()),
            _ => Ok(()),
        }
    });
    wait_for("the ports answer", HEARD, || {
        let address = format!("10.48.0.2:{MESH_PORT}")
            .parse()
            .expect("an address");
        match told(&watcher, address).is_empty() {
            true => Err("nothing yet".to_owned()),
            false => Ok(()),
        }
    });
    laptop.stop();
    desktop.stop();
}

#[test]
fn a_laptop_is_silent_in_the_cafe_and_heard_again_at_home() {
    let lan = Lan::new();
    let cafe = Bridge::new();
    let _home = gateway(lan.bridge(), "home", HOME);
    let stranger = gateway(&cafe, "cafe", CAFE);
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    laptop
        .namespace
        .ip(&format!("route add default via {GATEWAY}"));
    laptop.settings.mesh_extra = format!("networks = [{HOME:?}]\n");
    laptop.settings.extra = format!("http = \"0.0.0.0:{LAN_PORT}\"\n");
    let tap = Tap::new(&stranger);
    desktop.start();
    laptop.start();
    use_gateway(&laptop);
    laptop.wait_linked(&[&desktop]);

    let cable = laptop.namespace.cable();
    cable.pull();
    wait_silent(&laptop, "eth0");
    let cable = cable.move_to(&cafe);
    let arrived = Instant::now();
    cable.plug();
    use_gateway(&laptop);
    assert_nothing_heard(&tap, arrived);
    wait_silent(&laptop, "eth0");
    assert_closed(&stranger, &laptop.namespace.address.to_string());
    let doctor = laptop.granary(&["doctor"]);
    assert!(doctor.to_string().contains("silent on eth0"), "{doctor}");

    cable.pull();
    let cable = cable.move_to(lan.bridge());
    cable.plug();
    use_gateway(&laptop);
    laptop.wait_linked(&[&desktop]);
    assert_eq!(tap.since(arrived).count(Kind::Mdns), 0);
    laptop.stop();
    desktop.stop();
}
