//! Network namespaces: a bridge and the machines plugged into it.
//!
//! The bridge stands in a namespace of its own, so no interface, address or route of the host is
//! touched, every LAN may use the same addresses, and deleting the namespaces removes everything.
//! Names carry the id of the test's process; what a killed test left behind is swept by the next.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process;

/// Where `ip netns` mounts its namespaces.
const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "granary-";
const IP_DEADLINE: Duration = Duration::from_secs(30);

/// A bridge to which machines are plugged.
pub struct Bridge {
    namespace: Namespace,
    prefix: String,
    ports: AtomicU32,
}

impl Bridge {
    pub fn new() -> Bridge {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "the LAN tests make network namespaces and chroot stores, and must run as root"
        );
        sweep();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX}{}-{count}", std::process::id());
        let namespace = Namespace::new(format!("{prefix}-bridge"));
        // Snooping would hold back multicast until a querier is heard, and there is none here.
        ip(&format!(
            "-n {} link add bridge type bridge mcast_snooping 0",
            namespace.name
        ));
        ip(&format!("-n {} link set bridge up", namespace.name));
        Bridge {
            namespace,
            prefix,
            ports: AtomicU32::new(0),
        }
    }

    /// Makes a namespace with one interface, `eth0`, plugged into this bridge.
    pub fn plug(&self, name: &str) -> Namespace {
        let port = self.ports.fetch_add(1, Ordering::Relaxed) + 1;
        let mut namespace = Namespace::new(format!("{}-{name}", self.prefix));
        namespace.cable = Some(Cable {
            bridge: self.namespace.name.clone(),
            port: format!("port{port}"),
        });
        namespace.address =
            Ipv4Addr::new(10, 47, 0, u8::try_from(port).expect("at most 254 ports"));
        let (own, bridge) = (&namespace.name, &self.namespace.name);
        ip(&format!(
            "-n {own} link add eth0 type veth peer name port{port} netns {bridge}"
        ));
        ip(&format!("-n {bridge} link set port{port} master bridge up"));
        ip(&format!(
            "-n {own} address add {}/24 broadcast + dev eth0",
            namespace.address
        ));
        ip(&format!("-n {own} link set eth0 up"));
        namespace
    }
}

impl Bridge {
    /// Gives a namespace that is plugged in elsewhere a further interface, on this bridge.
    pub fn join(&self, namespace: &Namespace, interface: &str, address: &str) {
        let port = self.ports.fetch_add(1, Ordering::Relaxed) + 1;
        let (own, bridge) = (&namespace.name, &self.namespace.name);
        ip(&format!(
            "-n {own} link add {interface} type veth peer name port{port} netns {bridge}"
        ));
        ip(&format!("-n {bridge} link set port{port} master bridge up"));
        ip(&format!(
            "-n {own} address add {address} broadcast + dev {interface}"
        ));
        ip(&format!("-n {own} link set {interface} up"));
    }
}

/// A network namespace; dropping it ends what still runs inside and removes it.
pub struct Namespace {
    pub name: String,
    /// Its address on the bridge; the loopback address of one that is not plugged.
    pub address: Ipv4Addr,
    /// `None` when it is not plugged.
    cable: Option<Cable>,
}

impl Namespace {
    fn new(name: String) -> Namespace {
        ip(&format!("netns add {name}"));
        let namespace = Namespace {
            name,
            address: Ipv4Addr::LOCALHOST,
            cable: None,
        };
        ip(&format!("-n {} link set lo up", namespace.name));
        namespace
    }

    /// Runs `ip` with these arguments inside.
    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    pub fn cable(&self) -> Cable {
        self.cable.clone().expect("a namespace on a bridge")
    }

    /// What a thread of its own needs to enter.
    pub fn entrance(&self) -> Entrance {
        Entrance(self.name.clone())
    }

    /// A command that runs inside, and that is killed when the test's process dies.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "ip",
            "netns",
            "exec",
            &self.name,
            program,
        ]);
        command
    }

    /// Runs `work` on a thread whose sockets belong to this namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.entrance().enter();
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// The way from a bridge to a machine.
#[derive(Clone)]
pub struct Cable {
    bridge: String,
    port: String,
}

impl Cable {
    /// `eth0` has no carrier.
    pub fn pull(&self) {
        self.set("down");
    }

    pub fn plug(&self) {
        self.set("up");
    }

    /// Puts the other end into another bridge, where it is pulled until [`Cable::plug`].
    pub fn move_to(&self, bridge: &Bridge) -> Cable {
        let moved = Cable {
            bridge: bridge.namespace.name.clone(),
            port: format!("from-{}", bridge.ports.fetch_add(1, Ordering::Relaxed)),
        };
        let Cable { bridge, port } = self;
        ip(&format!("-n {bridge} link set {port} down"));
        ip(&format!(
            "-n {bridge} link set {port} netns {} name {}",
            moved.bridge, moved.port
        ));
        moved.set("master bridge");
        moved
    }

    /// Has the bridge drop every packet from and to the machine, which hears nothing of it.
    pub fn swallow_packets(&self) {
        self.set("nomaster");
    }

    pub fn pass_packets(&self) {
        self.set("master bridge");
    }

    fn set(&self, change: &str) {
        let Cable { bridge, port } = self;
        ip(&format!("-n {bridge} link set {port} {change}"));
    }
}

/// Where a namespace is entered.
#[derive(Clone)]
pub struct Entrance(String);

impl Entrance {
    /// From here on, the sockets of this thread belong to the namespace.
    pub fn enter(&self) {
        let file = File::open(Path::new(NAMESPACES).join(&self.0)).expect("open namespace");
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&file),
            Some(LinkNameSpaceType::Network),
        )
        .expect("enter namespace");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes the namespaces of tests whose process is gone (killed before it could clean up).
fn sweep() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove(&name);
        }
    }
}

/// Ends the processes of a namespace and deletes it; two sweeps may race, so failures are ignored.
fn remove(name: &str) {
    if let Ok(pids) = Command::new("ip").args(["netns", "pids", name]).output() {
        for pid in String::from_utf8_lossy(&pids.stdout)
            .lines()
            .filter_map(|pid| pid.parse().ok())
        {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
    let _ = Command::new("ip").args(["netns", "delete", name]).output();
}

fn ip(arguments: &str) {
    process::run(
        Command::new("ip").args(arguments.split_whitespace()),
        IP_DEADLINE,
    )
    .expect_success();
}

#[test]
fn machines_on_a_bridge_hear_each_other_and_leave_nothing_behind() {
    use std::net::UdpSocket;

    let group = Ipv4Addr::new(224, 0, 0, 251);
    let bridge = Bridge::new();
    let (left, right) = (bridge.plug("left"), bridge.plug("right"));
    let names = [
        left.name.clone(),
        right.name.clone(),
        bridge.namespace.name.clone(),
    ];
    let heard = right.inside(|| {
        let receiver = UdpSocket::bind((group, 5353)).expect("bind");
        receiver
            .join_multicast_v4(&group, &right.address)
            .expect("join");
        receiver
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("set timeout");
        let mut bytes = [0; 16];
        let (_, length) = process::wait_for(
            "multicast passes the bridge",
            Duration::from_secs(5),
            || {
                left.inside(|| {
                    let sender = UdpSocket::bind((left.address, 0)).expect("bind");
                    sender
                        .send_to(b"hello", (group, 5353))
                        .map_err(|error| error.to_string())
                })?;
                receiver.recv(&mut bytes).map_err(|error| error.to_string())
            },
        );
        bytes[..length].to_vec()
    });
    assert_eq!(heard, b"hello");
    drop((left, right, bridge));
    for name in names {
        assert!(
            !Path::new(NAMESPACES).join(&name).exists(),
            "{name} is still there"
        );
    }
}
