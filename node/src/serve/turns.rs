//! Turns: how often one address may ask, where anybody may.
//!
//! Who asks too often waits, and is not refused: Nix fails a build upon a refusal, and a client that waits
//! for its answer asks nothing meanwhile. What an address asks at once is bounded by its connections.
//!
//! Invariant: at most [`ADDRESSES_MAX`] addresses are remembered; those beyond share one allowance.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Between two requests of one address in the long run: 500 a second, of which each takes some 0.1 ms.
const INTERVAL: Duration = Duration::from_millis(2);

/// What may be asked at once after a pause: the 2,000 paths of a large closure.
const CREDIT: Duration = Duration::from_secs(4);

/// The longest wait. Who closes a connection that waits and opens another one waits no longer for that.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Addresses that asked within the last seconds: more than a LAN has machines.
const ADDRESSES_MAX: usize = 4096;

/// Whose allowance those share that come when too many are remembered; no client has it.
const OTHERS: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// Between two looks for addresses that may be forgotten, or a crowd would make every request pay for one.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// Whose turn it is.
#[derive(Debug, Default)]
pub struct Turns(Mutex<Used>);

#[derive(Debug, Default)]
struct Used {
    /// When each address has used up what was granted to it.
    until: BTreeMap<IpAddr, Instant>,
    /// When some were last forgotten.
    forgot: Option<Instant>,
}

impl Turns {
    /// Waits until it is this address's turn. Cancel-safe, but what was waited for counts as asked.
    pub async fn take(&self, address: IpAddr) {
        let turn = self.grant(address, Instant::now());
        tokio::time::sleep_until(turn).await;
    }

    fn grant(&self, address: IpAddr, now: Instant) -> Instant {
        let earliest = now.checked_sub(CREDIT).unwrap_or(now);
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if used.has_no_room(&address)
            && used
                .forgot
                .is_none_or(|forgot| now >= forgot + FORGET_INTERVAL)
        {
            used.until.retain(|_, until| *until > earliest);
            used.forgot = Some(now);
        }
        let address = match used.has_no_room(&address) {
            true => OTHERS,
            false => address,
        };
        let until = used.until.entry(address).or_insert(earliest);
        let turn = (*until).clamp(earliest, now + WAIT_MAX);
        *until = turn + INTERVAL;
        turn
    }
}

impl Used {
    fn has_no_room(&self, address: &IpAddr) -> bool {
        self.until.len() >= ADDRESSES_MAX && !self.until.contains_key(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number))
    }

    /// Requests of one address that are answered within a second.
    fn asked(turns: &Turns, address: IpAddr, now: Instant) -> usize {
        let mut asked = 0;
        while turns.grant(address, now) < now + Duration::from_secs(1) {
            asked += 1;
        }
        asked
    }

    #[test]
    fn an_address_may_ask_a_closure_at_once_and_goes_on_slowly() {
        let turns = Turns::default();
        let start = Instant::now();
        let asked_first = asked(&turns, address(1), start);
        assert!((2400..=2600).contains(&asked_first), "{asked_first}");
        // The one that had to wait has used up a little of the next second.
        let second = start + Duration::from_secs(1);
        let asked_then = asked(&turns, address(1), second);
        assert!((400..=600).contains(&asked_then), "{asked_then}");
        assert_eq!(asked(&turns, address(2), second), asked_first);
        let flood = (0..10_000).map(|_| turns.grant(address(1), second));
        assert!(flood.max().unwrap() <= second + WAIT_MAX);
    }

    #[test]
    fn crowds_of_addresses_share_one_allowance_and_are_forgotten() {
        let turns = Turns::default();
        let start = Instant::now();
        for number in 0..2 * ADDRESSES_MAX {
            turns.grant(address(number as u32), start);
        }
        assert!(turns.0.lock().unwrap().until.len() <= ADDRESSES_MAX + 1);
        let later = start + 2 * CREDIT;
        assert!(turns.grant(address(u32::MAX >> 8), later) < later);
        assert_eq!(turns.0.lock().unwrap().until.len(), 1);
    }
}
