//! Roaming: notices that this machine's network changed.
//!
//! Linux tells of addresses, interfaces and routes over a netlink socket (rtnetlink(7)), and repeats itself: a router's
//! advertisement renews an address every few minutes, a Wi-Fi scan announces its interface again. So what was said is
//! remembered, and only what differs is a change. It is reported when nothing more has come for [`QUIET`], because a
//! new network arrives in pieces.
//!
//! The kernel is believed, its messages are read with bounds all the same. Without netlink (a sandbox that forbids it)
//! nothing is ever noticed, and the pulse of the links has to do.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use tracing::debug;

/// How long nothing may have come before a change is reported, and how long a change waits at most for that.
const QUIET: Duration = Duration::from_millis(250);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Bytes of one reading; the kernel's messages have at most a few kilobytes.
const MESSAGE_BYTES_MAX: usize = 32 * 1024;

/// Things remembered of each kind. Beyond it everything is forgotten, which costs a report too many.
const REMEMBERED_MAX: usize = 4096;

/// The groups of messages wanted: interfaces, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DEL_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;

/// An IPv6 address that is still being checked for duplicates; it comes again when it may be used.
const TENTATIVE: u8 = 0x40;

/// From this scope on an address leads nowhere else: link-local, host. IPv4's link-local addresses do, among themselves.
const SCOPE_LINK: u8 = 253;
const FAMILY_IPV6: u8 = 10;

/// Up, and with a cable or an access point at its other end.
const IS_USABLE: u32 = 0x1 | 0x1_0000;

const ROUTE_TABLE_MAIN: u8 = 254;
const ROUTE_UNICAST: u8 = 1;

/// Where attributes of an address and a route stand.
const ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ROUTE_INTERFACE: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// What Linux says about this machine's network.
pub struct Roaming {
    socket: AsyncFd<OwnedFd>,
    seen: Seen,
    /// When the change that is not reported yet began, and when something came last.
    changed: Option<(Instant, Instant)>,
}

impl Roaming {
    /// Starts to listen. Must run inside a tokio runtime.
    pub fn new() -> io::Result<Roaming> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        #[expect(
            deprecated,
            reason = "its successor is an unsafe function; an OwnedFd keeps what that one asks for"
        )]
        let socket = AsyncFd::new(socket)?;
        Ok(Roaming {
            socket,
            seen: Seen::default(),
            changed: None,
        })
    }

    /// Waits until the network has changed and come to rest. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            let rest = self
                .changed
                .map(|(first, last)| (last + QUIET).min(first + WAIT_MAX));
            tokio::select! {
                is_change = read(&self.socket, &mut self.seen) => if is_change {
                    let now = Instant::now();
                    let first = self.changed.map_or(now, |(first, _)| first);
                    self.changed = Some((first, now));
                },
                () = at(rest) => {
                    self.changed = None;
                    return;
                }
            }
        }
    }
}

async fn at(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then).await,
        None => std::future::pending().await,
    }
}

/// Takes one reading and tells whether it is a change.
async fn read(socket: &AsyncFd<OwnedFd>, seen: &mut Seen) -> bool {
    let Ok(mut ready) = socket.readable().await else {
        // The runtime is going down.
        return std::future::pending().await;
    };
    let mut bytes = [0; MESSAGE_BYTES_MAX];
    match recv(socket.get_ref(), &mut bytes[..], RecvFlags::empty()) {
        Ok((_, length)) => seen.note(bytes.get(..length).unwrap_or_default()),
        Err(Errno::AGAIN) => {
            ready.clear_ready();
            false
        }
        Err(Errno::INTR) => false,
        // More than the socket held: something changed, we do not know what.
        Err(Errno::NOBUFS) => true,
        Err(error) => {
            debug!(%error, "could not read what changed in the network");
            ready.clear_ready();
            false
        }
    }
}

/// What was said so far.
#[derive(Default)]
struct Seen {
    /// Interfaces by number, and whether they are usable.
    interfaces: BTreeMap<u32, bool>,
    addresses: BTreeSet<(u32, Vec<u8>)>,
    /// Default routes: family, interface, gateway.
    routes: BTreeSet<(u8, Vec<u8>, Vec<u8>)>,
}

impl Seen {
    /// Takes in messages and tells whether one of them is news.
    fn note(&mut self, mut bytes: &[u8]) -> bool {
        let mut is_change = false;
        // Length, kind, and three things that do not matter here; then the message, padded to a multiple of four.
        while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
            let Some(message) = bytes.get(16..length as usize) else {
                break;
            };
            is_change |= match kind {
                NEW_LINK | DEL_LINK => self.interface(kind == NEW_LINK, message),
                NEW_ADDRESS | DEL_ADDRESS => self.address(kind == NEW_ADDRESS, message),
                NEW_ROUTE | DEL_ROUTE => self.route(kind == NEW_ROUTE, message),
                _ => None,
            }
            .unwrap_or(false);
            let next = (length as usize).next_multiple_of(4);
            bytes = bytes.get(next..).unwrap_or_default();
        }
        is_change
    }

    fn interface(&mut self, is_new: bool, message: &[u8]) -> Option<bool> {
        // A bridge tells of its ports with a family of its own.
        if *message.first()? != 0 {
            return None;
        }
        let number = u32_at(message, 4)?;
        let is_usable = is_new && u32_at(message, 8)? & IS_USABLE == IS_USABLE;
        if self.interfaces.len() >= REMEMBERED_MAX {
            self.interfaces.clear();
        }
        Some(self.interfaces.insert(number, is_usable) != Some(is_usable))
    }

    fn address(&mut self, is_new: bool, message: &[u8]) -> Option<bool> {
        let [family, _, flags, scope] = *message.first_chunk()?;
        if (family == FAMILY_IPV6 && scope >= SCOPE_LINK) || (is_new && flags & TENTATIVE != 0) {
            return None;
        }
        let interface = u32_at(message, 4)?;
        let attributes = message.get(8..)?;
        let address =
            attribute(attributes, ADDRESS_LOCAL).or_else(|| attribute(attributes, ADDRESS))?;
        let address = (interface, address.to_vec());
        if !is_new {
            // One that was there before we listened is not among those seen.
            self.addresses.remove(&address);
            return Some(true);
        }
        if self.addresses.len() >= REMEMBERED_MAX {
            self.addresses.clear();
        }
        Some(self.addresses.insert(address))
    }

    fn route(&mut self, is_new: bool, message: &[u8]) -> Option<bool> {
        let [family, bits, _, _, table, _, _, kind] = *message.first_chunk()?;
        if bits != 0 || table != ROUTE_TABLE_MAIN || kind != ROUTE_UNICAST {
            return None;
        }
        let attributes = message.get(12..)?;
        let part = |kind| attribute(attributes, kind).unwrap_or_default().to_vec();
        let route = (family, part(ROUTE_INTERFACE), part(ROUTE_GATEWAY));
        if !is_new {
            self.routes.remove(&route);
            return Some(true);
        }
        if self.routes.len() >= REMEMBERED_MAX {
            self.routes.clear();
        }
        Some(self.routes.insert(route))
    }
}

/// Finds an attribute: each has its length, its kind, and its value, padded to a multiple of four.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        if u16_at(bytes, 2)? == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = 16 + body.len() as u32;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = 4 + value.len() as u16;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn address(kind: u16, flags: u8, last: u8) -> Vec<u8> {
        let head = [2, 24, flags, 0, 3, 0, 0, 0];
        let parts = [
            &head[..],
            &attribute(ADDRESS, &[10, 0, 0, 255]),
            &attribute(ADDRESS_LOCAL, &[10, 0, 0, last]),
        ];
        message(kind, &parts.concat())
    }

    fn interface(flags: u32) -> Vec<u8> {
        let head = [0, 0, 1, 0, 3, 0, 0, 0];
        message(
            NEW_LINK,
            &[&head[..], &flags.to_ne_bytes(), &[0; 4]].concat(),
        )
    }

    fn route(kind: u16, bits: u8, table: u8, gateway: u8) -> Vec<u8> {
        let head = [2, bits, 0, 0, table, 3, 0, 1, 0, 0, 0, 0];
        let parts = [
            &head[..],
            &attribute(ROUTE_GATEWAY, &[10, 0, 0, gateway]),
            &attribute(ROUTE_INTERFACE, &[3, 0, 0, 0]),
        ];
        message(kind, &parts.concat())
    }

    #[test]
    fn only_what_differs_is_a_change() {
        let mut seen = Seen::default();
        let mut check = |bytes: &[u8], expected: bool| {
            assert_eq!(seen.note(bytes), expected, "{bytes:?}");
        };
        check(&address(NEW_ADDRESS, 0, 7), true);
        // Renewed.
        check(&address(NEW_ADDRESS, 0, 7), false);
        check(&address(NEW_ADDRESS, TENTATIVE, 8), false);
        check(&address(NEW_ADDRESS, 0, 8), true);
        check(&address(DEL_ADDRESS, 0, 7), true);
        check(&address(NEW_ADDRESS, 0, 7), true);

        check(&interface(IS_USABLE), true);
        // A scan.
        check(&interface(IS_USABLE | 0x40), false);
        // The cable is pulled, and plugged in again.
        check(&interface(0x1), true);
        check(&interface(IS_USABLE), true);

        check(&route(NEW_ROUTE, 0, ROUTE_TABLE_MAIN, 1), true);
        check(&route(NEW_ROUTE, 0, ROUTE_TABLE_MAIN, 1), false);
        check(&route(NEW_ROUTE, 0, ROUTE_TABLE_MAIN, 2), true);
        check(&route(NEW_ROUTE, 24, ROUTE_TABLE_MAIN, 3), false);
        check(&route(NEW_ROUTE, 0, 255, 3), false);
        check(&route(DEL_ROUTE, 0, ROUTE_TABLE_MAIN, 1), true);

        // Several in one reading, the news at the end.
        let several = [interface(IS_USABLE), address(NEW_ADDRESS, 0, 9)].concat();
        check(&several, true);
        check(&several, false);
    }

    proptest! {
        #[test]
        fn nothing_the_kernel_might_say_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            kind in 16u16..26,
            length in 0u32..300,
        ) {
            let mut seen = Seen::default();
            seen.note(&bytes);
            let mut framed = message(kind, &bytes);
            seen.note(&framed);
            framed[..4].copy_from_slice(&length.to_ne_bytes());
            seen.note(&framed);
        }
    }
}
