//! A tap: every packet that passes a machine's network interface, by what it belongs to.
//!
//! It is a packet socket inside the machine's namespace, so it sees what a capture there would see. The payload
//! of the control plane is encrypted, but segments of heartbeats give themselves away by their length.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};

use crate::machine::MESH_PORT;
use crate::network::Namespace;

/// A snapshot comes in segments of 64 KiB each, and the kernel counts more than that for each.
const BUFFER_BYTES: usize = 64 << 20;
/// Enough of a packet for its Ethernet, IP and TCP headers.
const HEADERS_BYTES: usize = 128;
/// How soon a tap that is to end looks whether it is.
const LOOK: Duration = Duration::from_millis(100);

const MDNS_PORT: u16 = 5353;

/// Segments of one yamux frame in one Noise message: 2 bytes of length, 12 of yamux's header, 16 of Noise's
/// tag. The pulse (`mesh/pulse.rs`) adds its 8; yamux measures round trips with empty frames every 10 s. The
/// least message of the control plane with its frame is longer than one of each, and not a sum of them.
const YAMUX_PING_BYTES: usize = 2 + 12 + 16;
const PULSE_BYTES: usize = YAMUX_PING_BYTES + 8;
/// As many beats as may stand in one segment.
const BEATS_MAX: usize = 4;

/// What a packet belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A segment of the control plane's port with something in it.
    Control,
    /// The same, and nothing in it but beats of the pulse or of yamux.
    Heartbeat,
    /// TCP alone on the control plane's port: acknowledgements, keep-alives, beginnings and ends.
    Bare,
    Mdns,
    /// ARP, IPv6's neighbours, group membership, the data plane.
    Other,
}

#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub at: Instant,
    pub kind: Kind,
    pub is_sent: bool,
    /// Bytes of the segment without any header; 0 where it is not TCP of the control plane.
    pub payload: usize,
    /// Bytes of the packet with its Ethernet header.
    pub bytes: usize,
}

/// A running tap.
pub struct Tap {
    packets: Arc<Mutex<Vec<Packet>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tap {
    /// Begins to listen; what passes from here on is seen.
    pub fn new(namespace: &Namespace) -> Tap {
        let packets = Arc::<Mutex<Vec<Packet>>>::default();
        let is_over = Arc::<AtomicBool>::default();
        let socket = namespace.inside(open);
        let address = namespace.address.octets();
        let (seen, over) = (packets.clone(), is_over.clone());
        let thread = thread::spawn(move || {
            let mut headers = [0; HEADERS_BYTES];
            let mut hardware = None;
            while !over.load(Ordering::Relaxed) {
                // What ends the wait without a packet is the timeout.
                let Ok((held, bytes)) = recv(&socket, &mut headers, RecvFlags::TRUNC) else {
                    continue;
                };
                if let Some(packet) = read(&headers[..held], bytes, address, &mut hardware) {
                    seen.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(packet);
                }
            }
        });
        Tap {
            packets,
            is_over,
            thread: Some(thread),
        }
    }

    /// What passed since the time.
    pub fn since(&self, start: Instant) -> Passed {
        let packets = self.packets.lock().unwrap_or_else(PoisonError::into_inner);
        let first = packets.partition_point(|packet| packet.at < start);
        Passed(packets[first..].to_vec())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket that sees every packet of the namespace that the thread is in.
pub fn open() -> OwnedFd {
    let (family, kind) = (AddressFamily::PACKET, SocketType::RAW);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, Some(eth::ALL))
        .expect("open a packet socket");
    set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).expect("enlarge the buffer");
    set_socket_timeout(&socket, Timeout::Recv, Some(LOOK)).expect("set timeout");
    socket
}

/// Reads the headers of a packet of `bytes` bytes; `None` for one that stays on the machine.
///
/// The machine's hardware address, by which sent IPv6 is known, is learned from what it sends over IPv4.
fn read(
    headers: &[u8],
    bytes: usize,
    own: [u8; 4],
    hardware: &mut Option<[u8; 6]>,
) -> Option<Packet> {
    let at = Instant::now();
    let (ethernet, network) = headers.split_at_checked(14)?;
    // The loopback interface has no hardware addresses.
    if ethernet[..12] == [0; 12] {
        return None;
    }
    let mut from = [0; 6];
    from.copy_from_slice(&ethernet[6..12]);
    let mut packet = Packet {
        at,
        kind: Kind::Other,
        is_sent: *hardware == Some(from),
        payload: 0,
        bytes,
    };
    let port = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
    let is_ipv4 = ethernet[12..] == [0x08, 0x00] && network.len() >= 20;
    if !is_ipv4 {
        // Of IPv6 only mDNS is of interest: the nodes listen on IPv4.
        let is_mdns = ethernet[12..] == [0x86, 0xdd]
            && network.len() >= 44
            && network[6] == 17
            && port(&network[42..]) == MDNS_PORT;
        if is_mdns {
            packet.kind = Kind::Mdns;
        }
        return Some(packet);
    }
    packet.is_sent = network[12..16] == own;
    if packet.is_sent {
        *hardware = Some(from);
    }
    let header = usize::from(network[0] & 0x0f) * 4;
    let transport = network.get(header..)?;
    if transport.len() < 20 {
        return Some(packet);
    }
    let (source, target) = (port(transport), port(&transport[2..]));
    match network[9] {
        6 if source == MESH_PORT || target == MESH_PORT => {
            let total = usize::from(port(&network[2..]));
            packet.payload = total.saturating_sub(header + usize::from(transport[12] >> 4) * 4);
            packet.kind = match packet.payload {
                // A keep-alive has no byte, or one that was sent before.
                0 | 1 => Kind::Bare,
                length if is_heartbeat(length) => Kind::Heartbeat,
                _ => Kind::Control,
            };
        }
        17 if target == MDNS_PORT => packet.kind = Kind::Mdns,
        _ => {}
    }
    Some(packet)
}

fn is_heartbeat(length: usize) -> bool {
    (1..=BEATS_MAX).any(|beats| {
        (0..=beats).any(|pulses| {
            length == beats * YAMUX_PING_BYTES + pulses * (PULSE_BYTES - YAMUX_PING_BYTES)
        })
    })
}

/// Packets in the order in which they passed.
pub struct Passed(Vec<Packet>);

impl Passed {
    /// Packets of a kind, in either direction.
    pub fn count(&self, kind: Kind) -> usize {
        let all = self.0.iter();
        all.filter(|packet| packet.kind == kind).count()
    }

    /// Bytes that the control plane sent, heartbeats left out: the payload of TCP.
    pub fn sent(&self) -> u64 {
        self.payload(Kind::Control, true)
    }

    /// The same without what the muxer and the cipher add, where each segment is one message.
    pub fn frames_sent(&self) -> u64 {
        let all = self.0.iter();
        let sent = all.filter(|packet| packet.kind == Kind::Control && packet.is_sent);
        sent.map(|packet| (packet.payload - YAMUX_PING_BYTES.min(packet.payload)) as u64)
            .sum()
    }

    pub fn received(&self) -> u64 {
        self.payload(Kind::Control, false)
    }

    pub fn heartbeats_sent(&self) -> u64 {
        self.payload(Kind::Heartbeat, true)
    }

    fn payload(&self, kind: Kind, is_sent: bool) -> u64 {
        let all = self.0.iter();
        all.filter(|packet| packet.kind == kind && packet.is_sent == is_sent)
            .map(|packet| packet.payload as u64)
            .sum()
    }

    /// Bytes of all headers on the control plane's port, Ethernet's included, and of packets without payload.
    pub fn headers_sent(&self) -> u64 {
        let kinds = [Kind::Control, Kind::Heartbeat, Kind::Bare];
        let all = self.0.iter();
        all.filter(|packet| packet.is_sent && kinds.contains(&packet.kind))
            .map(|packet| (packet.bytes - packet.payload) as u64)
            .sum()
    }

    /// Bytes of these packets with all headers.
    pub fn bytes_sent(&self, kind: Kind) -> u64 {
        let all = self.0.iter();
        all.filter(|packet| packet.kind == kind && packet.is_sent)
            .map(|packet| packet.bytes as u64)
            .sum()
    }

    /// When the control plane first sent a message of so many bytes or more.
    pub fn first_sent(&self, bytes_min: usize) -> Option<Instant> {
        let is_one = |packet: &&Packet| {
            packet.kind == Kind::Control && packet.is_sent && packet.payload >= bytes_min
        };
        self.0.iter().find(is_one).map(|packet| packet.at)
    }

    /// When the control plane last said something in either direction.
    pub fn last(&self) -> Option<Instant> {
        let mut all = self.0.iter().rev();
        all.find(|packet| packet.kind == Kind::Control)
            .map(|packet| packet.at)
    }
}

/// How often segments of which length were sent by the control plane.
impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts = std::collections::BTreeMap::<(Kind, usize), usize>::new();
        let sent = self.0.iter().filter(|packet| packet.is_sent);
        for packet in sent {
            let length = match packet.kind {
                Kind::Control | Kind::Heartbeat => packet.payload,
                Kind::Bare | Kind::Mdns | Kind::Other => packet.bytes,
            };
            *counts.entry((packet.kind, length)).or_default() += 1;
        }
        for ((kind, length), count) in counts {
            write!(f, " {count}×{kind:?} {length}")?;
        }
        Ok(())
    }
}

#[test]
fn segments_of_beats_alone_are_told_from_messages() {
    for beats in [30, 38, 60, 68, 76, 98, 106, 152] {
        assert!(is_heartbeat(beats), "{beats}");
    }
    // The least messages: a summary of what is known, and "nothing newer".
    for message in [1, 29, 31, 69, 70, 75, 80, 160] {
        assert!(!is_heartbeat(message), "{message}");
    }
}
