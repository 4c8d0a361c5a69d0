//! The crowd: who connected and is nobody in particular, for it has not proved yet to be a member or need not.
//!
//! Strangers have room of their own, so that they take none from members. A handshake takes milliseconds;
//! so when the room is full the one that has stood there longest goes, first of the address that most of
//! them came from. A member that knocks meanwhile always gets in.
//!
//! Who leaves without having proved to be a member is held against its address and its network: a handshake
//! costs us a signature and two agreements of keys, and must not be had without end. Addresses at which members
//! were seen have much more of that, so that one machine behind a router does not shut out the others.
//!
//! Invariant: at most [`Bounds::all`] stand here, at most [`Bounds::per_address`] of one address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::allowance::{Allowance, Rate};
use crate::metrics::{Metrics, Refused};

/// Handshakes under way at once. A member makes a few; a home whose machines all wake makes some dozen.
const STRANGERS_MAX: usize = 256;

/// Of these, from one address: several machines may stand behind one router.
const STRANGERS_PER_ADDRESS_MAX: usize = 64;

/// Whoever has one IPv6 address has a network of them, of which this many bits name the network.
const IPV6_NETWORK_BITS: u32 = 64;

/// The same of IPv4, where somebody on the same cable takes what addresses are free.
const IPV4_NETWORK_BITS: u32 = 24;

/// Failures of one address: a home behind one router whose certificates ended, which all try again, has some
/// dozen a minute. 16 handshakes in a second are a hundredth of a core.
const ADDRESS: Rate = Rate {
    burst: 64.0,
    per_second: 16.0,
};

/// Failures of one network, and of an address at which a member was: an eighth of a core at most, which the
/// node does not miss.
const NETWORK: Rate = Rate {
    burst: 2048.0,
    per_second: 256.0,
};

/// Addresses and networks of which something is remembered. Beyond it whatever was longest forgiven goes.
const REMEMBERED_MAX: usize = 4096;

/// How long an address counts as one of members after one was seen there.
const MEMBER_MEMORY: Duration = Duration::from_secs(3600);

/// How many may stand in a crowd.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub all: usize,
    pub per_address: usize,
}

/// Those who are nobody in particular.
#[derive(Debug)]
pub struct Crowd {
    bounds: Bounds,
    standing: Mutex<Standing>,
    /// Where it is counted who is not let in; `None` where nobody need prove anything, and nothing is held against
    /// those who go.
    metrics: Option<Arc<Metrics>>,
}

#[derive(Debug, Default)]
struct Standing {
    /// What was held against addresses and networks.
    failures: BTreeMap<Origin, Allowance>,
    /// When a member was seen last at an address.
    members: BTreeMap<IpAddr, Instant>,
    next: u64,
    /// By the order in which they came.
    tokens: BTreeMap<u64, CancellationToken>,
    by_address: BTreeMap<IpAddr, BTreeSet<u64>>,
}

/// Where somebody comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    Address(IpAddr),
    Network(IpAddr),
}

impl Origin {
    /// What is forgiven where no member is.
    fn rate(self) -> Rate {
        match self {
            Origin::Address(_) => ADDRESS,
            Origin::Network(_) => NETWORK,
        }
    }
}

/// A place in the crowd, until it is dropped.
#[derive(Debug)]
pub struct Stranger {
    crowd: Arc<Crowd>,
    number: u64,
    address: IpAddr,
    is_member: bool,
    sent_away: CancellationToken,
}

impl Crowd {
    /// Those who are to prove to be members, on both planes together.
    pub fn before_members(metrics: Arc<Metrics>) -> Arc<Crowd> {
        Arc::new(Crowd {
            bounds: Bounds {
                all: STRANGERS_MAX,
                per_address: STRANGERS_PER_ADDRESS_MAX,
            },
            standing: Mutex::default(),
            metrics: Some(metrics),
        })
    }

    /// Those who may come as they are.
    pub fn of_anybody(bounds: Bounds) -> Arc<Crowd> {
        Arc::new(Crowd {
            bounds,
            standing: Mutex::default(),
            metrics: None,
        })
    }

    /// Takes in a stranger; where there is no room, another one is sent away for it. `None` for one of an address
    /// that was a stranger's too often: its connection is to be closed.
    pub fn enter(self: &Arc<Crowd>, address: IpAddr) -> Option<Stranger> {
        self.enter_at(address, Instant::now())
    }

    fn enter_at(self: &Arc<Crowd>, address: IpAddr, now: Instant) -> Option<Stranger> {
        let exact = address.to_canonical();
        let sent_away = CancellationToken::new();
        let mut standing = self.standing();
        if !standing.may_come(exact, now) {
            self.count(Refused::TooOften);
            return None;
        }
        let address = crowd_of(exact);
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
            self.count(Refused::Crowded);
            token.cancel();
        }
        drop(standing);
        Some(Stranger {
            crowd: self.clone(),
            number,
            address: exact,
            is_member: false,
            sent_away,
        })
    }

    /// Counts that somebody said more than it may, and waits.
    pub fn slowed(&self) {
        self.count(Refused::MessagesSlowed);
    }

    fn count(&self, refused: Refused) {
        if let Some(metrics) = &self.metrics {
            metrics.refused(refused);
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    fn may_come(&self, address: IpAddr, now: Instant) -> bool {
        let origins = self.origins(address, now);
        origins.into_iter().flatten().all(|(origin, rate)| {
            let known = self.failures.get(&origin);
            known.is_none_or(|allowance| allowance.owed(rate, now).is_zero())
        })
    }

    fn failed(&mut self, address: IpAddr, now: Instant) {
        for (origin, rate) in self.origins(address, now).into_iter().flatten() {
            if self.failures.len() >= REMEMBERED_MAX && !self.failures.contains_key(&origin) {
                self.failures
                    .retain(|origin, allowance| !allowance.is_full(origin.rate(), now));
            }
            if self.failures.len() < REMEMBERED_MAX || self.failures.contains_key(&origin) {
                let fresh = || Allowance::new(rate, now);
                let allowance = self.failures.entry(origin).or_insert_with(fresh);
                allowance.take(rate, 1.0, now);
            }
        }
    }

    fn proved(&mut self, address: IpAddr, now: Instant) {
        if self.members.len() >= REMEMBERED_MAX && !self.members.contains_key(&address) {
            self.members
                .retain(|_, seen| now.saturating_duration_since(*seen) < MEMBER_MEMORY);
        }
        if self.members.len() < REMEMBERED_MAX || self.members.contains_key(&address) {
            self.members.insert(address, now);
        }
    }

    /// What a failure at this address is held against, and how much of it there may be.
    fn origins(&self, address: IpAddr, now: Instant) -> [Option<(Origin, Rate)>; 2] {
        let is_members = self
            .members
            .get(&address)
            .is_some_and(|seen| now.saturating_duration_since(*seen) < MEMBER_MEMORY);
        let (exact, around) = (Origin::Address(address), Origin::Network(network(address)));
        match is_members {
            true => [Some((exact, NETWORK)), None],
            false => [Some((exact, exact.rate())), Some((around, around.rate()))],
        }
    }

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
    pub fn sent_away(&self) -> WaitForCancellationFutureOwned {
        self.sent_away.clone().cancelled_owned()
    }

    /// It is a member, and leaves the crowd.
    pub fn prove(mut self) {
        self.is_member = true;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut standing = self.crowd.standing();
        standing.leave(self.number, &crowd_of(self.address));
        match self.is_member {
            _ if self.crowd.metrics.is_none() => {}
            true => standing.proved(self.address, Instant::now()),
            false => standing.failed(self.address, Instant::now()),
        }
    }
}

/// With whom somebody shares the room of one address.
pub fn crowd_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(_) => network(address),
    }
}

/// What all addresses that one machine may take have in common.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX << (u32::BITS - IPV4_NETWORK_BITS);
            IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
        }
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
        let crowd = Crowd::before_members(Arc::default());
        let other = crowd.enter(ip("10.0.0.2")).unwrap();
        let many: Vec<_> = (0..STRANGERS_PER_ADDRESS_MAX + 3)
            // One machine, whatever end of its network it names.
            .map(|number| crowd.enter(ip(&format!("fd00::{number}"))).unwrap())
            .collect();
        assert!(!is_away(&other));
        let away = many.iter().filter(|one| is_away(one)).count();
        assert_eq!(away, 3);
        assert!(many[..3].iter().all(is_away));
    }

    #[test]
    fn a_full_crowd_sends_the_oldest_of_the_busiest_address_away() {
        let crowd = Crowd::before_members(Arc::default());
        let enter = |address: &str| crowd.enter(ip(address)).unwrap();
        let early = enter("10.1.0.1");
        let busy: Vec<_> = (0..2).map(|_| enter("10.1.0.2")).collect();
        let rest: Vec<_> = (3..STRANGERS_MAX)
            .map(|number| enter(&format!("10.2.{}.{}", number / 256, number % 256)))
            .collect();
        assert!(!is_away(&busy[0]));
        let newest = enter("10.1.0.1");
        // Two addresses have two each; which of them loses one is of no account.
        assert!(is_away(&busy[0]) || is_away(&early));
        assert!(!is_away(&newest) && !rest.iter().any(is_away));
        drop((early, busy, rest, newest));
        let standing = crowd.standing();
        assert!(standing.tokens.is_empty() && standing.by_address.is_empty());
    }
    #[test]
    fn an_address_of_strangers_alone_is_shut_out_and_forgiven_with_time() {
        let metrics = Arc::new(Metrics::default());
        let crowd = Crowd::before_members(metrics.clone());
        let (stranger, members) = (ip("10.3.0.1"), ip("10.3.0.2"));
        crowd.enter(members).unwrap().prove();
        let failures = |address, most: usize| {
            let came = (0..most).take_while(|_| crowd.enter(address).is_some());
            came.count()
        };
        let came = failures(stranger, 1_000);
        assert!((64..100).contains(&came), "{came}");
        assert!(metrics.refused_count(Refused::TooOften) > 0);
        // Where members are, one that knocks many times keeps none of them out.
        assert_eq!(failures(members, 1_000), 1_000);
        let later = Instant::now() + Duration::from_secs(10);
        assert!(crowd.enter_at(stranger, later).is_some());
    }

    #[test]
    fn whoever_takes_many_addresses_of_one_network_is_shut_out_too() {
        let crowd = Crowd::before_members(Arc::default());
        let came = (0..u16::MAX).take_while(|number| {
            let address = format!("fd00::{:x}:{number:x}", number % 7);
            crowd.enter(ip(&address)).is_some()
        });
        let came = came.count();
        assert!((2_048..6_000).contains(&came), "{came}");
        assert!(crowd.enter(ip("fd00:0:0:1::1")).is_some());
    }
}
