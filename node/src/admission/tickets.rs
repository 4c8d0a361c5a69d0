//! The tickets that this machine gave out: a file of the state folder, one a line.
//!
//! Only the hash of a ticket's secret is kept, so that who reads the file cannot join by it. Who joined
//! by a ticket stands in it, so that a machine whose answer got lost may ask again.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use granary_protocol::certificate::{Permissions, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::ticket::{Refused, Secret};

use crate::state_folder;

/// Tickets that hold at once. Each is made by hand.
pub const TICKETS_MAX: usize = 256;

/// Machines that may join by one ticket.
pub const USES_MAX: u32 = 1000;

/// Largest file read: so many tickets, each with a list of so many peers of 53 bytes.
const FILE_BYTES_MAX: u64 = 16 << 20;

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
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tickets(Vec<Issued>);

/// Why the tickets are not known, or no further one can be made.
#[derive(Debug, thiserror::Error)]
pub enum TicketsError {
    #[error("cannot {action} the tickets in {path}: {source}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("line {line} of {path} is no ticket", path = .path.display())]
    Line { path: PathBuf, line: usize },
    #[error("there are {TICKETS_MAX} tickets that hold already")]
    TooMany,
}

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
    pub fn load(path: &Path) -> Result<Tickets, TicketsError> {
        let text = state_folder::read(path, FILE_BYTES_MAX).map_err(|source| TicketsError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let text = text.unwrap_or_default();
        let issued = text.lines().enumerate().map(|(number, line)| {
            Issued::from_line(line).ok_or(TicketsError::Line {
                path: path.to_owned(),
                line: number + 1,
            })
        });
        Ok(Tickets(issued.collect::<Result<_, _>>()?))
    }

    pub fn save(&self, path: &Path) -> Result<(), TicketsError> {
        let text: String = self
            .0
            .iter()
            .map(|issued| issued.to_line() + "\n")
            .collect();
        state_folder::write(path, text.as_bytes()).map_err(|source| TicketsError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Adds a ticket, and forgets those that have expired.
    pub fn add(&mut self, issued: Issued, now: UnixTime) -> Result<(), TicketsError> {
        self.0.retain(|issued| issued.expires > now);
        if self.0.len() >= TICKETS_MAX {
            return Err(TicketsError::TooMany);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(number: u8) -> Secret {
        Secret::from_bytes([number; 16])
    }

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    fn issued(uses: u32) -> Issued {
        let permissions = "share,vouch,push:main".parse().unwrap();
        Issued::new(&secret(1), UnixTime(100), uses, permissions, 3600)
    }

    #[test]
    fn a_ticket_admits_as_many_machines_as_it_says_and_each_as_often_as_it_asks() {
        let mut tickets = Tickets::default();
        tickets.add(issued(2), UnixTime(0)).unwrap();
        for machine in [1, 2, 1, 2] {
            let got = tickets.redeem(&secret(1), peer(machine), UnixTime(99));
            assert_eq!(got.unwrap().certificate_seconds, 3600);
        }
        let mut refused = |secret, machine, now| {
            tickets
                .redeem(&secret, peer(machine), UnixTime(now))
                .unwrap_err()
        };
        assert_eq!(refused(secret(1), 3, 99), Refused::UsedUp);
        assert_eq!(refused(secret(1), 1, 100), Refused::Expired);
        assert_eq!(refused(secret(2), 1, 0), Refused::UnknownTicket);
    }

    #[test]
    fn tickets_survive_their_file_which_tells_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tickets");
        let mut tickets = Tickets::default();
        tickets.add(issued(2), UnixTime(0)).unwrap();
        tickets.redeem(&secret(1), peer(1), UnixTime(0)).unwrap();
        tickets.save(&file).unwrap();
        assert_eq!(Tickets::load(&file).unwrap(), tickets);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!text.contains(&HEXLOWER.encode(&[1; 16])), "{text}");
        std::fs::write(&file, format!("{text}nonsense\n")).unwrap();
        let error = Tickets::load(&file).unwrap_err();
        assert!(
            matches!(error, TicketsError::Line { line: 2, .. }),
            "{error}"
        );
    }

    #[test]
    fn expired_tickets_make_room_and_others_do_not() {
        let mut tickets = Tickets::default();
        for _ in 0..TICKETS_MAX {
            tickets.add(issued(1), UnixTime(0)).unwrap();
        }
        assert!(tickets.add(issued(1), UnixTime(99)).is_err());
        tickets.add(issued(1), UnixTime(100)).unwrap();
        assert_eq!(tickets.0.len(), 1);
    }
}
