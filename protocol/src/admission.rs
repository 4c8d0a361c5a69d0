//! Admission: what the holder of the mesh key decides about a machine that asks.
//!
//! A machine becomes a member by a ticket, or because a person that was shown its [`fingerprint`] admits it;
//! it stays one by having its certificate renewed. [`decide`] takes what is known and says what to certify;
//! files, the key and the clock are the node's.
//!
//! Invariant: who was put out gets nothing by ticket or renewal, and nothing by what a person said before
//! it was put out.

use crate::certificate::{Certificate, NotAMember, Permissions, UnixTime};
use crate::hash::sha256;
use crate::nix32;
use crate::peer::PeerId;
use crate::revocation::Revocations;
use crate::signature::PublicKey;
use crate::ticket::{Refused, Request};

mod tickets;
mod pending;

pub use pending::{Asked, NotPending, PENDING_MAX, PENDING_TEXT_BYTES_MAX, Pending};
pub use tickets::{Issued, NotTickets, TICKETS_MAX, Tickets, TooManyTickets, USES_MAX};

/// For how long a certificate that has ended is renewed: a laptop that was in a drawer, a clock that was
/// wrong. Who must not come back is revoked.
const RENEWAL_GRACE_SECONDS: u64 = 30 * 86_400;

/// Bytes of a hash that people compare: nobody finds a second key with the same 80 bits.
const FINGERPRINT_BYTES: usize = 10;

/// Letters between two dashes of a fingerprint.
const FINGERPRINT_GROUP: usize = 4;

/// Length of a fingerprint, its dashes included.
pub const FINGERPRINT_LETTERS: usize = 19;

/// What a machine gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// `None` for one that gave no usable name.
    pub name: Option<String>,
    pub permissions: Permissions,
    /// How long the certificate lasts.
    pub seconds: u64,
}

/// What the holder of the mesh key knows and writes down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Books {
    pub tickets: Tickets,
    pub pending: Pending,
}

/// Decides about one request of a machine that proved to be `peer`; what is to be kept changes in `books`.
///
/// # Errors
/// Why it gets no certificate.
pub fn decide(
    books: &mut Books,
    peer: PeerId,
    request: &Request,
    mesh: &PublicKey,
    revoked: Option<&Revocations>,
    now: UnixTime,
) -> Result<Grant, Refused> {
    let put_out = revoked.and_then(|list| list.revoked.get(&peer));
    match request {
        Request::Join { secret, name } => {
            // A person lets in again whom a person put out.
            if put_out.is_some() {
                return Err(Refused::Revoked);
            }
            let issued = books.tickets.redeem(secret, peer, now)?;
            Ok(Grant {
                name: Certificate::is_name(name).then(|| name.clone()),
                permissions: issued.permissions.clone(),
                seconds: issued.certificate_seconds,
            })
        }
        Request::Ask { name } => {
            let name = Certificate::is_name(name).then(|| name.clone());
            books.pending.ask(peer, name, put_out.copied(), now)
        }
        Request::Renew { certificate } => {
            let held = match certificate.verify(mesh, &peer, now) {
                Ok(held) => Some(held),
                // Signature and peer are right, or something else would have been said.
                Err(NotAMember::Expired { until, .. })
                    if now.0 < until.saturating_add(RENEWAL_GRACE_SECONDS) =>
                {
                    certificate.claims().ok()
                }
                Err(_) => None,
            };
            let held = held.ok_or(Refused::NoMember)?;
            if revoked.is_some_and(|list| list.is_revoked(&held)) {
                return Err(Refused::Revoked);
            }
            Ok(Grant {
                seconds: held.not_after.0.saturating_sub(held.not_before.0),
                name: Some(held.name),
                permissions: held.permissions,
            })
        }
    }
}

/// What people compare on two screens before one admits the other: `k3fd-9x2m-…`.
pub fn fingerprint(mesh: &PublicKey, peer: &PeerId) -> String {
    let hash = sha256(format!("granary-fingerprint-1\n{mesh}\n{peer}").as_bytes());
    let letters = nix32::encode(&hash[..FINGERPRINT_BYTES]);
    let mut text = String::new();
    for (position, letter) in letters.chars().enumerate() {
        if position > 0 && position % FINGERPRINT_GROUP == 0 {
            text.push('-');
        }
        text.push(letter);
    }
    text
}

#[cfg(test)]
mod tests;
