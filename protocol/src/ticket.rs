//! Tickets: what a new machine joins a mesh with, and what is said when it does.
//!
//! A ticket is one line of text, `granary-ticket-1:<base64url>`: the mesh's public key, where somebody
//! admits to it, and a secret that the admitting machine knows the hash of. It is signed by nobody,
//! since whoever hands it over is trusted with the key in it. The secret is shown only to an end that
//! proved to have the mesh key. Without the secret it is the memory of who admitted us.
//!
//! Invariant: a secret is wiped when dropped and never reaches `Debug`.

use std::fmt;
use std::mem;
use std::net::Ipv6Addr;

use data_encoding::BASE64URL_NOPAD;
use prost::Message as _;
use zeroize::{Zeroize, Zeroizing};

use crate::certificate::{CERTIFICATE_BYTES_MAX, SignedCertificate, UnixTime};
use crate::hash::sha256;
use crate::line::{Line, LineError};
use crate::signature::PublicKey;

/// First word of a ticket.
const TEXT_PREFIX: &str = "granary-ticket-1:";

/// Longest text looked at: eight long addresses of each kind and the longest key name fit.
pub const TICKET_TEXT_BYTES_MAX: usize = 8192;

/// What is handed over: letters that survive every terminal and mail.
const LINE: Line = Line {
    prefix: TEXT_PREFIX,
    encoding: BASE64URL_NOPAD,
    text_bytes_max: TICKET_TEXT_BYTES_MAX,
};

/// Most addresses of each kind: interfaces × families of an ordinary machine.
pub const TICKET_ADDRESSES_MAX: usize = 8;

/// Longest address: a host name of 253 characters, a colon and a port.
const ADDRESS_BYTES_MAX: usize = 259;

/// Nobody guesses 128 bits.
pub const SECRET_BYTES: usize = 16;

/// Largest message of joining: a certificate and some words.
pub const JOINING_BYTES_MAX: usize = CERTIFICATE_BYTES_MAX + 1024;

/// Longest name read in a request; longer ones are no member names.
const NAME_BYTES_MAX: usize = 256;

/// What admits a machine, once or as often as its issuer said.
pub struct Secret(Zeroizing<[u8; SECRET_BYTES]>);

/// What a new machine joins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    pub mesh: PublicKey,
    /// `host:port` of those who admit: the data plane of a machine with the mesh key.
    pub admits: Vec<String>,
    /// `host:port` of control planes, where multicast does not reach.
    pub peers: Vec<String>,
    /// `None` once it was used.
    pub secret: Option<Secret>,
    pub expires: UnixTime,
}

/// A text that is no ticket.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum TicketError {
    #[error("ticket has {0} characters, at most {TICKET_TEXT_BYTES_MAX} are read")]
    TooLong(usize),
    #[error("ticket does not start with {TEXT_PREFIX:?}, as what granary mesh ticket prints does")]
    NotATicket,
    #[error("ticket is not base64, was all of it copied?")]
    NotBase64,
    #[error("ticket does not decode, was all of it copied? {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("ticket has a missing or malformed {0}")]
    Field(&'static str),
}

/// Asks to be made a member, or to stay one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// By a ticket; `name` is what the machine calls itself.
    Join { secret: Secret, name: String },
    /// Without a ticket: a person is to admit it.
    Ask { name: String },
    /// By a certificate that ends soon, or has just ended.
    Renew { certificate: SignedCertificate },
}

/// What the holder of the mesh key says to that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Certificate(SignedCertificate),
    Refused(Refused),
}

/// Why a machine is not made a member. The numbers are those on the wire.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    #[error("the ticket is not known there; ask for a new one (granary mesh ticket)")]
    UnknownTicket = 1,
    #[error("the ticket has expired; ask for a new one (granary mesh ticket)")]
    Expired = 2,
    #[error("the ticket was used as often as it may be; ask for a new one (granary mesh ticket)")]
    UsedUp = 3,
    #[error("this machine was put out of the mesh; granary mesh admit lets it in again")]
    Revoked = 4,
    #[error("the certificate is not one of this machine in that mesh, or ended too long ago")]
    NoMember = 5,
    #[error("the machine that admits could not read or write its files; see its log")]
    Trouble = 6,
    #[error("it waits for a person (granary mesh pending, and admit, where the mesh key is)")]
    Pending = 7,
    #[error("too many machines wait there for a person; ask for a ticket (granary mesh ticket)")]
    Crowded = 8,
}

impl Refused {
    const ALL: [Refused; 8] = [
        Refused::UnknownTicket,
        Refused::Expired,
        Refused::UsedUp,
        Refused::Revoked,
        Refused::NoMember,
        Refused::Trouble,
        Refused::Pending,
        Refused::Crowded,
    ];

    /// The label of its counter.
    pub fn word(self) -> &'static str {
        match self {
            Refused::UnknownTicket => "unknown_ticket",
            Refused::Expired => "expired_ticket",
            Refused::UsedUp => "used_ticket",
            Refused::Revoked => "revoked",
            Refused::NoMember => "no_member",
            Refused::Trouble => "trouble",
            Refused::Pending => "pending",
            Refused::Crowded => "crowded",
        }
    }
}

impl Secret {
    pub fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    /// What the admitting machine keeps of it.
    pub fn hash(&self) -> [u8; 32] {
        let context: &[u8] = b"granary-ticket-secret-1\n";
        sha256(&Zeroizing::new([context, self.0.as_slice()].concat()))
    }

    fn from_slice(bytes: &[u8]) -> Option<Secret> {
        Some(Secret::from_bytes(bytes.try_into().ok()?))
    }
}

impl Clone for Secret {
    fn clone(&self) -> Secret {
        Secret(self.0.clone())
    }
}

/// By hash, so that how long it takes tells nothing.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.hash() == other.hash()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Ticket {
    /// Returns the one line that is handed over. Whoever reads it can join.
    ///
    /// # Errors
    /// [`TicketError::Field`] for addresses that readers refuse.
    pub fn to_text(&self) -> Result<Zeroizing<String>, TicketError> {
        check_addresses("admits", &self.admits)?;
        check_addresses("peers", &self.peers)?;
        let secret = self.secret.as_ref();
        let body = TicketBody {
            mesh: self.mesh.to_string(),
            admits: self.admits.clone(),
            peers: self.peers.clone(),
            secret: secret.map_or_else(Vec::new, |secret| secret.0.to_vec()),
            expires: self.expires.0,
        };
        let bytes = Zeroizing::new(body.encode_to_vec());
        Ok(Zeroizing::new(LINE.write(&bytes)))
    }

    /// Parses the line; surrounding white space is ignored.
    pub fn from_text(text: &str) -> Result<Ticket, TicketError> {
        let mut body = TicketBody::decode(LINE.read(text)?.as_slice())?;
        check_addresses("admits", &body.admits)?;
        check_addresses("peers", &body.peers)?;
        let secret = match body.secret.is_empty() {
            true => None,
            false => {
                let secret = Secret::from_slice(&body.secret);
                Some(secret.ok_or(TicketError::Field("secret"))?)
            }
        };
        Ok(Ticket {
            mesh: body.mesh.parse().map_err(|_| TicketError::Field("mesh"))?,
            admits: mem::take(&mut body.admits),
            peers: mem::take(&mut body.peers),
            secret,
            expires: UnixTime(body.expires),
        })
    }
}

impl From<LineError> for TicketError {
    fn from(error: LineError) -> TicketError {
        match error {
            LineError::TooLong(length) => TicketError::TooLong(length),
            LineError::Prefix => TicketError::NotATicket,
            LineError::NotBase64 => TicketError::NotBase64,
        }
    }
}

fn check_addresses(field: &'static str, addresses: &[String]) -> Result<(), TicketError> {
    let is_good = |address: &String| is_address(address);
    match addresses.len() <= TICKET_ADDRESSES_MAX && addresses.iter().all(is_good) {
        true => Ok(()),
        false => Err(TicketError::Field(field)),
    }
}

/// Whether a text is `name:port`, `1.2.3.4:port` or `[1:2::3]:port`.
fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    // Digits alone: Rust's own parser takes a sign as well.
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit())
        && port.parse::<u16>().is_ok_and(|port| port > 0);
    let bracketed = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let is_host = match bracketed {
        Some(ip) => ip.parse::<Ipv6Addr>().is_ok(),
        None => {
            let is_of_names =
                |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            !host.is_empty() && host.bytes().all(is_of_names)
        }
    };
    text.len() <= ADDRESS_BYTES_MAX && is_port && is_host
}

impl Request {
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let body = match self {
            Request::Join { secret, name } => RequestBody {
                secret: secret.0.to_vec(),
                name: name.clone(),
                certificate: Vec::new(),
                asks: false,
            },
            Request::Ask { name } => RequestBody {
                secret: Vec::new(),
                name: name.clone(),
                certificate: Vec::new(),
                asks: true,
            },
            Request::Renew { certificate } => RequestBody {
                secret: Vec::new(),
                name: String::new(),
                certificate: certificate.to_bytes(),
                asks: false,
            },
        };
        Zeroizing::new(body.encode_to_vec())
    }

    /// Parses the form that travels; at most [`JOINING_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Request, TicketError> {
        if bytes.len() > JOINING_BYTES_MAX {
            return Err(TicketError::TooLong(bytes.len()));
        }
        let mut body = RequestBody::decode(bytes)?;
        if body.name.len() > NAME_BYTES_MAX {
            return Err(TicketError::Field("name"));
        }
        let is_given = (!body.secret.is_empty(), !body.certificate.is_empty());
        match (is_given, body.asks) {
            ((false, false), true) => {
                let name = mem::take(&mut body.name);
                Ok(Request::Ask { name })
            }
            ((true, false), false) => {
                let secret = Secret::from_slice(&body.secret);
                let secret = secret.ok_or(TicketError::Field("secret"))?;
                let name = mem::take(&mut body.name);
                Ok(Request::Join { secret, name })
            }
            ((false, true), false) => {
                let certificate = SignedCertificate::from_bytes(&body.certificate);
                let certificate = certificate.map_err(|_| TicketError::Field("certificate"))?;
                Ok(Request::Renew { certificate })
            }
            _ => Err(TicketError::Field("secret or certificate")),
        }
    }
}

impl Reply {
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Reply::Certificate(certificate) => ReplyBody {
                certificate: certificate.to_bytes(),
                refused: 0,
            },
            Reply::Refused(refused) => ReplyBody {
                certificate: Vec::new(),
                refused: *refused as u32,
            },
        }
        .encode_to_vec()
    }

    /// Parses the form that travels; at most [`JOINING_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Reply, TicketError> {
        if bytes.len() > JOINING_BYTES_MAX {
            return Err(TicketError::TooLong(bytes.len()));
        }
        let body = ReplyBody::decode(bytes)?;
        if body.refused != 0 {
            let mut all = Refused::ALL.into_iter();
            let refused = all.find(|one| *one as u32 == body.refused);
            return refused
                .map(Reply::Refused)
                .ok_or(TicketError::Field("refusal"));
        }
        SignedCertificate::from_bytes(&body.certificate)
            .map(Reply::Certificate)
            .map_err(|_| TicketError::Field("certificate"))
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct TicketBody {
    #[prost(string, tag = "1")]
    mesh: String,
    #[prost(string, repeated, tag = "2")]
    admits: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    peers: Vec<String>,
    #[prost(bytes = "vec", tag = "4")]
    secret: Vec<u8>,
    #[prost(uint64, tag = "5")]
    expires: u64,
}

/// What is encoded and decoded holds the secret once more.
impl Drop for TicketBody {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct RequestBody {
    #[prost(bytes = "vec", tag = "1")]
    secret: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bytes = "vec", tag = "3")]
    certificate: Vec<u8>,
    #[prost(bool, tag = "4")]
    asks: bool,
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReplyBody {
    #[prost(bytes = "vec", tag = "1")]
    certificate: Vec<u8>,
    #[prost(uint32, tag = "2")]
    refused: u32,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::certificate::Certificate;
    use crate::peer::PeerId;
    use crate::signature::SecretKey;

    fn mesh() -> SecretKey {
        SecretKey::from_seed("home".parse().unwrap(), [1; 32])
    }

    fn ticket() -> Ticket {
        Ticket {
            mesh: mesh().public_key(),
            admits: vec!["10.0.0.1:4728".into(), "[fd00::1]:4728".into()],
            peers: vec!["desk.lan:4727".into()],
            secret: Some(Secret::from_bytes([9; SECRET_BYTES])),
            expires: UnixTime(1000),
        }
    }

    fn certificate() -> SignedCertificate {
        Certificate {
            peer: PeerId::from_public_key([7; 32]),
            name: "desk".into(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(1),
            not_after: UnixTime(2),
            serial: 3,
        }
        .sign(&mesh())
        .unwrap()
    }

    #[test]
    fn a_ticket_survives_its_text_with_and_without_its_secret() {
        let text = ticket().to_text().unwrap();
        assert_eq!(
            Ticket::from_text(&format!(" {}\n", text.as_str())),
            Ok(ticket())
        );
        let used = Ticket {
            secret: None,
            ..ticket()
        };
        assert_eq!(Ticket::from_text(&used.to_text().unwrap()), Ok(used));
        assert!(format!("{:?}", ticket()).contains("Some(Secret(…))"));
    }

    #[test]
    fn a_ticket_that_was_cut_or_names_nonsense_is_refused() {
        let text = ticket().to_text().unwrap();
        for length in 0..text.len() {
            assert_ne!(Ticket::from_text(&text[..length]), Ok(ticket()), "{length}");
        }
        for address in [
            "",
            "host",
            ":80",
            "host:",
            "host:0",
            "host:+80",
            "host:70000",
            "ho st:1",
            "a\nb:1",
            "user@host:1",
            "host/path:1",
            "fd00::1:4728",
            "[fd00::1]4728",
            "[]:1",
            "[host]:1",
            "[10.0.0.1]:1",
            "[fe80::1%eth0]:1",
        ] {
            assert!(!is_address(address), "{address}");
            let wrong = Ticket {
                admits: vec![address.into()],
                ..ticket()
            };
            assert_eq!(wrong.to_text(), Err(TicketError::Field("admits")));
        }
        let many = Ticket {
            peers: vec!["a:1".into(); TICKET_ADDRESSES_MAX + 1],
            ..ticket()
        };
        assert_eq!(many.to_text(), Err(TicketError::Field("peers")));
    }

    #[test]
    fn requests_and_replies_survive_their_bytes() {
        let secret = Secret::from_bytes([9; SECRET_BYTES]);
        let name = "laptop".to_owned();
        let certificate = certificate();
        for request in [
            Request::Ask { name: name.clone() },
            Request::Join { secret, name },
            Request::Renew {
                certificate: certificate.clone(),
            },
        ] {
            assert_eq!(Request::from_bytes(&request.to_bytes()), Ok(request));
        }
        let refusals = Refused::ALL.map(Reply::Refused);
        for reply in refusals
            .into_iter()
            .chain([Reply::Certificate(certificate)])
        {
            assert_eq!(Reply::from_bytes(&reply.to_bytes()), Ok(reply));
        }
        assert!(Request::from_bytes(&[]).is_err());
        assert!(Reply::from_bytes(&[]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Ticket::from_text(&String::from_utf8_lossy(&bytes));
            let _ = Ticket::from_text(&format!("{TEXT_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes)));
            let _ = Request::from_bytes(&bytes);
            let _ = Reply::from_bytes(&bytes);
        }
    }
}
