//! The crowd: who connected and is nobody in particular, for it has not proved yet who it is or need not.
//!
//! Strangers have room of their own, so that they take none from members. A handshake takes milliseconds;
//! so when the room is full the one that has stood there longest goes, first of the address that most of
//! them came from. A member that knocks meanwhile always gets in.
//!
//! Invariant: at most [`Bounds::all`] stand here, at most [`Bounds::per_address`] of one address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Handshakes under way at once. A member makes a few; a home whose machines all wake makes some dozen.
const STRANGERS_MAX: usize = 256;

/// Of these, from one address: several machines may stand behind one router.
const STRANGERS_PER_ADDRESS_MAX: usize = 64;

/// Whoever has one IPv6 address has a network of them, of which this many bits name the network.
const IPV6_NETWORK_BITS: u32 = 64;

/// How many may stand in a crowd.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub all: usize,
    pub per_address: usize,
}

/// Those who have not proved who they are.
#[derive(Debug)]
pub struct Crowd {
    bounds: Bounds,
    standing: Mutex<Standing>,
}

/// The crowd before the members' port.
impl Default for Crowd {
    fn default() -> Crowd {
        Crowd::new(Bounds {
            all: STRANGERS_MAX,
            per_address: STRANGERS_PER_ADDRESS_MAX,
        })
    }
}

#[derive(Debug, Default)]
struct Standing {
    next: u64,
    /// By the order in which they came.
    tokens: BTreeMap<u64, CancellationToken>,
    by_address: BTreeMap<IpAddr, BTreeSet<u64>>,
}

/// A place in the crowd, until it is dropped.
#[derive(Debug)]
pub struct Stranger {
    crowd: Arc<Crowd>,
    number: u64,
    address: IpAddr,
    sent_away: CancellationToken,
}

impl Crowd {
    pub fn new(bounds: Bounds) -> Crowd {
        Crowd {
            bounds,
            standing: Mutex::default(),
        }
    }

    /// Takes in a stranger; where there is no room, another one is sent away for it.
    pub fn enter(self: &Arc<Crowd>, address: IpAddr) -> Stranger {
        let address = network(address);
        let sent_away = CancellationToken::new();
        let mut standing = self.standing();
        let number = standing.next;
        standing.next += 1;
        standing.tokens.insert(number, sent_away.clone());
        standing
            .by_address
            .entry(address)
            .or_default()
            .insert(number);
        if let Some(gone) = standing.one_too_many(&address, self.bounds)
            && let Some(token) = standing.leave(gone.0, &gone.1)
        {
            token.cancel();
        }
        drop(standing);
        Stranger {
            crowd: self.clone(),
            number,
            address,
            sent_away,
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Who has to go after somebody came from `newest`.
    fn one_too_many(&self, newest: &IpAddr, bounds: Bounds) -> Option<(u64, IpAddr)> {
        let of_newest = self.by_address.get(newest)?;
        let address = if of_newest.len() > bounds.per_address {
            *newest
        } else if self.tokens.len() > bounds.all {
            let most = self.by_address.iter().max_by_key(|(_, of)| of.len());
            *most?.0
        } else {
            return None;
        };
        let oldest = self.by_address.get(&address)?.first()?;
        Some((*oldest, address))
    }

    fn leave(&mut self, number: u64, address: &IpAddr) -> Option<CancellationToken> {
        if let Some(of_address) = self.by_address.get_mut(address) {
            of_address.remove(&number);
            if of_address.is_empty() {
                self.by_address.remove(address);
            }
        }
        self.tokens.remove(&number)
    }
}

impl Stranger {
    /// Waits until this one has to go.
    pub async fn sent_away(&self) {
        self.sent_away.cancelled().await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.crowd.standing().leave(self.number, &self.address);
    }
}

/// What all addresses of one machine have in common.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => {
            let mask = u128::MAX << (u128::BITS - IPV6_NETWORK_BITS);
            IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn is_away(stranger: &Stranger) -> bool {
        stranger.sent_away.is_cancelled()
    }

    #[test]
    fn an_address_that_sends_many_loses_its_oldest_and_no_other_does() {
        let crowd = Arc::new(Crowd::default());
        let other = crowd.enter(ip("10.0.0.2"));
        let many: Vec<_> = (0..STRANGERS_PER_ADDRESS_MAX + 3)
            // One machine, whatever end of its network it names.
            .map(|number| crowd.enter(ip(&format!("fd00::{number}"))))
            .collect();
        assert!(!is_away(&other));
        let away = many.iter().filter(|one| is_away(one)).count();
        assert_eq!(away, 3);
        assert!(many[..3].iter().all(is_away));
    }

    #[test]
    fn a_full_crowd_sends_the_oldest_of_the_busiest_address_away() {
        let crowd = Arc::new(Crowd::default());
        let early = crowd.enter(ip("10.1.0.1"));
        let busy: Vec<_> = (0..2).map(|_| crowd.enter(ip("10.1.0.2"))).collect();
        let rest: Vec<_> = (3..STRANGERS_MAX)
            .map(|number| crowd.enter(ip(&format!("10.2.{}.{}", number / 256, number % 256))))
            .collect();
        assert!(!is_away(&busy[0]));
        let newest = crowd.enter(ip("10.1.0.1"));
        // Two addresses have two each; which of them loses one is of no account.
        assert!(is_away(&busy[0]) || is_away(&early));
        assert!(!is_away(&newest) && !rest.iter().any(is_away));
        drop((early, busy, rest, newest));
        let standing = crowd.standing();
        assert!(standing.tokens.is_empty() && standing.by_address.is_empty());
    }
}
