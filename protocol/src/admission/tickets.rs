//! Tickets: what was given out, and who came with it.
//!
//! Only the hash of a ticket's secret is kept, so that who reads the file cannot join by it. Who joined
//! by a ticket stands in it, so that a machine whose answer got lost may ask again. One line each.

use std::fmt::Write;

use data_encoding::HEXLOWER;

use crate::certificate::{Permissions, UnixTime};
use crate::peer::PeerId;
use crate::ticket::{Refused, Secret};

/// Tickets that hold at once. Each is made by hand.
pub const TICKETS_MAX: usize = 256;

/// Machines that may join by one ticket.
pub const USES_MAX: u32 = 1000;

/// What holders of one ticket get, and who did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    secret_hash: [u8; 32],
    expires: UnixTime,
    uses: u32,
    pub permissions: Permissions,
    /// How long the certificates last, and those that follow them.
    pub certificate_seconds: u64,
    used_by: Vec<PeerId>,
}

/// All tickets that were given out and have not expired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tickets(Vec<Issued>);

/// A text that is no list of tickets.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line} is no ticket")]
pub struct NotTickets {
    pub line: usize,
}

/// No further ticket can be made.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("there are {TICKETS_MAX} tickets that hold already")]
pub struct TooManyTickets;

impl Issued {
    pub fn new(
        secret: &Secret,
        expires: UnixTime,
        uses: u32,
        permissions: Permissions,
        certificate_seconds: u64,
    ) -> Issued {
        Issued {
            secret_hash: secret.hash(),
            expires,
            uses: uses.min(USES_MAX),
            permissions,
            certificate_seconds,
            used_by: Vec::new(),
        }
    }

    fn to_line(&self) -> String {
        let mut line = format!(
            "{} {} {} {} {}",
            HEXLOWER.encode(&self.secret_hash),
            self.expires.0,
            self.uses,
            self.certificate_seconds,
            self.permissions,
        );
        for peer in &self.used_by {
            // Writing to a string cannot fail.
            let _ = write!(line, " {peer}");
        }
        line
    }

    fn from_line(line: &str) -> Option<Issued> {
        let mut words = line.split(' ');
        let hash = HEXLOWER.decode(words.next()?.as_bytes()).ok()?;
        let issued = Issued {
            secret_hash: hash.try_into().ok()?,
            expires: UnixTime(words.next()?.parse().ok()?),
            uses: words.next()?.parse().ok()?,
            certificate_seconds: words.next()?.parse().ok()?,
            permissions: words.next()?.parse().ok()?,
            used_by: words.map(|word| word.parse().ok()).collect::<Option<_>>()?,
        };
        Some(issued)
    }
}

impl Tickets {
    /// # Errors
    /// [`NotTickets`] with the number of the first line that is wrong.
    pub fn from_text(text: &str) -> Result<Tickets, NotTickets> {
        let parse = |(number, line)| Issued::from_line(line).ok_or(NotTickets { line: number + 1 });
        let issued = text.lines().enumerate().map(parse);
        Ok(Tickets(issued.collect::<Result<_, _>>()?))
    }

    pub fn to_text(&self) -> String {
        self.0
            .iter()
            .map(|issued| issued.to_line() + "\n")
            .collect()
    }

    /// Adds a ticket, and forgets those that have expired.
    pub fn add(&mut self, issued: Issued, now: UnixTime) -> Result<(), TooManyTickets> {
        self.0.retain(|issued| issued.expires > now);
        if self.0.len() >= TICKETS_MAX {
            return Err(TooManyTickets);
        }
        self.0.push(issued);
        Ok(())
    }

    /// Takes a ticket for a machine, once more for one that has it already.
    pub fn redeem(
        &mut self,
        secret: &Secret,
        peer: PeerId,
        now: UnixTime,
    ) -> Result<&Issued, Refused> {
        let hash = secret.hash();
        let issued = self.0.iter_mut().find(|issued| issued.secret_hash == hash);
        let issued = issued.ok_or(Refused::UnknownTicket)?;
        if issued.expires <= now {
            return Err(Refused::Expired);
        }
        if !issued.used_by.contains(&peer) {
            if issued.used_by.len() >= issued.uses as usize {
                return Err(Refused::UsedUp);
            }
            issued.used_by.push(peer);
        }
        Ok(issued)
    }
}
