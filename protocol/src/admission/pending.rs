//! Pending: machines that asked to join without a ticket, and wait for a person to say yes.
//!
//! Anybody on the network may ask, so there are few of them, none stays long, and nothing follows from
//! being here. One line each: peer, when it asked last, its name, and what a person granted.

use crate::certificate::{Certificate, UnixTime};
use crate::peer::PeerId;
use crate::ticket::Refused;

use super::Grant;

/// Machines that wait at once. A person looks at each; when strangers fill the list, there are tickets.
pub const PENDING_MAX: usize = 32;

/// Largest text of them: a line has at most 2 kB.
pub const PENDING_TEXT_BYTES_MAX: u64 = 128 * 1024;

/// How long one is remembered that asks no more, granted or not: until the person comes home.
const PENDING_SECONDS: u64 = 86_400;

/// A machine asks every few seconds; not every time is worth a write to disk.
const REFRESH_SECONDS: u64 = 60;

/// Stands for a name that is none; names have no such letter.
const NO_NAME: &str = "?";

/// One that asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub peer: PeerId,
    /// What it calls itself.
    pub name: Option<String>,
    /// When it asked last, or when it was granted what it asked for.
    pub at: UnixTime,
    pub granted: Option<Grant>,
}

/// All that asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending(Vec<Asked>);

/// A text that says nothing of machines that asked.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line} names no machine that asked to join")]
pub struct NotPending {
    pub line: usize,
}

impl Pending {
    pub fn all(&self) -> &[Asked] {
        &self.0
    }

    /// Takes in a question; `put_out` is when the peer was put out, if it was.
    ///
    /// # Errors
    /// [`Refused::Pending`] until a person grants it, and [`Refused::Crowded`] when too many wait.
    pub fn ask(
        &mut self,
        peer: PeerId,
        name: Option<String>,
        put_out: Option<UnixTime>,
        now: UnixTime,
    ) -> Result<Grant, Refused> {
        self.0
            .retain(|asked| now.0.abs_diff(asked.at.0) < PENDING_SECONDS);
        let Some(asked) = self.0.iter_mut().find(|asked| asked.peer == peer) else {
            if self.0.len() >= PENDING_MAX {
                return Err(Refused::Crowded);
            }
            self.0.push(Asked {
                peer,
                name,
                at: now,
                granted: None,
            });
            return Err(Refused::Pending);
        };
        let is_outdated = put_out.is_some_and(|put_out| put_out >= asked.at);
        match &asked.granted {
            // It stays, because an answer may get lost.
            Some(grant) if !is_outdated => Ok(grant.clone()),
            _ => {
                asked.granted = None;
                asked.name = name;
                if now.0.abs_diff(asked.at.0) >= REFRESH_SECONDS {
                    asked.at = now;
                }
                Err(Refused::Pending)
            }
        }
    }

    /// A person says yes; returns whether the peer waits.
    pub fn grant(&mut self, peer: &PeerId, grant: Grant, now: UnixTime) -> bool {
        let Some(asked) = self.0.iter_mut().find(|asked| asked.peer == *peer) else {
            return false;
        };
        asked.at = now;
        asked.granted = Some(grant);
        true
    }

    pub fn to_text(&self) -> String {
        let line = |asked: &Asked| {
            let granted = asked.granted.as_ref();
            let name = granted.map_or(&asked.name, |grant| &grant.name);
            let name = name.as_deref().unwrap_or(NO_NAME);
            let (peer, at) = (asked.peer, asked.at.0);
            match granted {
                None => format!("{peer} {at} {name}\n"),
                Some(grant) => {
                    format!(
                        "{peer} {at} {name} {} {}\n",
                        grant.seconds, grant.permissions
                    )
                }
            }
        };
        self.0.iter().map(line).collect()
    }

    /// # Errors
    /// [`NotPending`] with the number of the first line that is wrong.
    pub fn from_text(text: &str) -> Result<Pending, NotPending> {
        let parse = |(number, line)| from_line(line).ok_or(NotPending { line: number + 1 });
        let asked = text.lines().take(PENDING_MAX).enumerate().map(parse);
        Ok(Pending(asked.collect::<Result<_, _>>()?))
    }
}

fn from_line(line: &str) -> Option<Asked> {
    let mut words = line.split(' ');
    let peer = words.next()?.parse().ok()?;
    let at = UnixTime(words.next()?.parse().ok()?);
    let name = match words.next()? {
        NO_NAME => None,
        name => Some(name.to_owned()).filter(|name| Certificate::is_name(name)),
    };
    let granted = match words.next() {
        None => None,
        Some(seconds) => Some(Grant {
            name: name.clone(),
            seconds: seconds.parse().ok()?,
            permissions: words.next()?.parse().ok()?,
        }),
    };
    words.next().is_none().then_some(Asked {
        peer,
        name,
        at,
        granted,
    })
}
