//! Admission: how a machine becomes a member and stays one, from both ends.
//!
//! A machine that has the mesh key in its state folder admits ([`Admission`]): on the data plane's
//! port, under a protocol name and a TLS identity of their own, which is the mesh key's. So whoever
//! joins knows that the holder of the mesh key hears its ticket's secret and nobody else, and the holder
//! knows the newcomer's identity, which the certificate is made for. [`ask`] is the other end.
//!
//! Two messages ([`granary_protocol::ticket`]), each behind its length in two bytes.
//!
//! What is decided stands in [`granary_protocol::admission`]; here are the files, the key and the talk.
//!
//! Invariants: a ticket counts as used before its certificate leaves; who was revoked gets none by ticket
//! or by renewal, only from a person (`granary mesh admit`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use granary_protocol::admission::{
    self, Books, Grant, NotPending, NotTickets, PENDING_TEXT_BYTES_MAX, Pending, Tickets,
};
use granary_protocol::certificate::{
    Certificate, CertificateError, MEMBER_NAME_BYTES_MAX, NotAMember, Permissions,
    SignedCertificate, UnixTime,
};
use granary_protocol::peer::PeerId;
use granary_protocol::revocation::SignedRevocations;
use granary_protocol::signature::{PublicKey, SecretKey};
use granary_protocol::ticket::{
    JOINING_BYTES_MAX, Refused, Reply, Request, Secret, Ticket, TicketError,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info, warn};
use zeroize::Zeroizing;

use crate::clock::unix_time;
use crate::identity::{self, Identity};
use crate::mesh::revocations::{self, RevocationsFileError};
use crate::secret;
use crate::serve::tls::{self, TlsError, TlsSetupError};
use crate::state_folder;

/// How long one exchange may take, TLS aside: a few small files are read and written.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest file of tickets read: so many, each with a list of so many peers of 53 bytes.
const TICKETS_FILE_BYTES_MAX: u64 = 16 << 20;

/// Machines that are attended to at once; further ones are dropped, and try again. Anybody may come, and
/// shall take no room from transfers.
const ATTENDED_MAX: usize = 16;

/// Addresses of one name that are tried, each until TLS gives up.
const RESOLVED_MAX: usize = 4;

/// Largest secret key file read; a key has some 130 bytes.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// Linux has 64.
const HOST_NAME_BYTES_MAX: u64 = 256;

/// Why the mesh key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MeshKeyError {
    #[error(
        "there is no mesh key at {path}\nhint: run this on the machine that made the mesh by granary up or granary mesh create --here, as whom the node runs",
        path = .path.display()
    )]
    Absent { path: PathBuf },
    #[error("cannot read the mesh key {path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "the mesh key {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod 0600 {path}",
        path = .path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{path} is no mesh key: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: granary_protocol::signature::SignatureError,
    },
}

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    #[error("the system gave no random bytes for a serial number: {0}")]
    NoRandomness(getrandom::Error),
    #[error("a certificate of {0} seconds would never end")]
    TooLong(u64),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// Why we were not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] TlsSetupError),
    #[error("the mesh key is no point of the curve")]
    MeshKey,
    #[error("nobody is known who admits to this mesh")]
    Nobody,
    #[error("cannot reach who admits at {address}: {source}")]
    Resolve { address: String, source: io::Error },
    #[error("{0}")]
    Connect(#[source] Box<TlsError>),
    #[error("the talk with {address} broke off: {source}")]
    Talk { address: String, source: io::Error },
    #[error("{address} did not answer within {EXCHANGE_TIMEOUT:?}")]
    TimedOut { address: String },
    #[error("{address} answered nonsense: {source}")]
    Nonsense {
        address: String,
        source: TicketError,
    },
    #[error("{address} made a certificate that does not make us a member: {source}")]
    NotAMember {
        address: String,
        source: Box<NotAMember>,
    },
    #[error("{address} refused: {refused}")]
    Refused { address: String, refused: Refused },
}

/// Reads the secret half of a mesh key.
pub fn read_mesh_key(path: &Path) -> Result<SecretKey, MeshKeyError> {
    let failed = |source: io::Error| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => MeshKeyError::Absent { path },
            _ => MeshKeyError::Io { path, source },
        }
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if let Some(mode) = secret::exposed(path, &metadata) {
        return Err(MeshKeyError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let text = state_folder::read(path, KEY_FILE_BYTES_MAX).map_err(failed)?;
    let text = Zeroizing::new(text.unwrap_or_default());
    text.trim()
        .parse()
        .map_err(|source| MeshKeyError::Malformed {
            path: path.to_owned(),
            source,
        })
}

/// Makes a certificate that begins at `now`.
pub fn certify(
    key: &SecretKey,
    peer: PeerId,
    name: Option<String>,
    permissions: Permissions,
    seconds: u64,
    now: UnixTime,
) -> Result<SignedCertificate, CertifyError> {
    let mut serial = [0u8; 8];
    getrandom::fill(&mut serial).map_err(CertifyError::NoRandomness)?;
    let not_after = now.0.checked_add(seconds);
    let certificate = Certificate {
        peer,
        // All peer ids begin alike; the end tells them apart.
        name: name.unwrap_or_else(|| {
            let text = peer.to_string();
            format!("node-{}", &text[text.len() - 8..])
        }),
        permissions,
        not_before: now,
        not_after: UnixTime(not_after.ok_or(CertifyError::TooLong(seconds))?),
        serial: u64::from_ne_bytes(serial),
    };
    Ok(certificate.sign(key)?)
}

/// Admits machines, where the mesh key is.
pub struct Admission {
    key: SecretKey,
    state_dir: PathBuf,
    tickets: PathBuf,
    pending: PathBuf,
    revocations: PathBuf,
    attended: Semaphore,
}

/// What stood in the way of an answer.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Books(#[from] BooksError),
    #[error(transparent)]
    Revocations(#[from] RevocationsFileError),
    #[error(transparent)]
    Certify(#[from] CertifyError),
    #[error("cannot lock the state folder: {0}")]
    Lock(#[source] io::Error),
}

impl Admission {
    pub fn new(
        key: SecretKey,
        state_dir: PathBuf,
        tickets: PathBuf,
        pending: PathBuf,
        revocations: PathBuf,
    ) -> Admission {
        Admission {
            key,
            state_dir,
            tickets,
            pending,
            revocations,
            attended: Semaphore::new(ATTENDED_MAX),
        }
    }

    /// The identity under which newcomers meet this machine.
    pub fn identity(&self) -> Identity {
        Identity::from_seed(&self.key.seed())
    }

    /// Talks to one machine that proved to be `peer`; returns what became of it, as a label of a counter.
    pub async fn attend(
        self: Arc<Admission>,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        peer: PeerId,
    ) -> &'static str {
        let Ok(_permit) = self.attended.try_acquire() else {
            debug!(%peer, "dropped a machine that wanted to join, there are too many");
            return "dropped";
        };
        let talk = async {
            let request = Request::from_bytes(&read_frame(&mut stream).await?);
            let request =
                request.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let admission = self.clone();
            let reply =
                tokio::task::spawn_blocking(move || admission.reply(peer, request, unix_time()));
            let reply = reply.await.map_err(io::Error::other)?;
            let outcome = match &reply {
                Reply::Refused(refused @ (Refused::UnknownTicket | Refused::Pending)) => {
                    debug!(%peer, reason = refused.word(), "refused to admit a machine");
                    refused.word()
                }
                Reply::Refused(refused) => {
                    warn!(%peer, reason = refused.word(), "refused to admit a machine");
                    refused.word()
                }
                Reply::Certificate(_) => {
                    info!(%peer, "admitted a machine");
                    "admitted"
                }
            };
            write_frame(&mut stream, &reply.to_bytes()).await?;
            // It has its answer, and may be gone.
            let _ = stream.shutdown().await;
            Ok::<_, io::Error>(outcome)
        };
        match timeout(EXCHANGE_TIMEOUT, talk).await {
            Ok(Ok(outcome)) => return outcome,
            // Anybody may do that as often as it likes.
            Ok(Err(error)) => debug!(%peer, %error, "a machine that wanted to join broke off"),
            Err(_) => debug!(%peer, "a machine that wanted to join said nothing in time"),
        }
        "broken_off"
    }

    /// Decides about one request. Reads and writes files.
    pub fn reply(&self, peer: PeerId, request: Request, now: UnixTime) -> Reply {
        match self.certificate(peer, request, now) {
            Ok(Ok(certificate)) => Reply::Certificate(certificate),
            Ok(Err(refused)) => Reply::Refused(refused),
            Err(trouble) => {
                warn!(%peer, error = %trouble, "could not admit a machine");
                Reply::Refused(Refused::Trouble)
            }
        }
    }

    fn certificate(
        &self,
        peer: PeerId,
        request: Request,
        now: UnixTime,
    ) -> Result<Result<SignedCertificate, Refused>, Trouble> {
        let mesh = self.key.public_key();
        let revoked = revocations::read(&self.revocations, &mesh)?;
        let revoked = revoked.as_ref().map(SignedRevocations::claims);
        let decided = match &request {
            // No file is needed for it, and none that is broken may keep members out.
            Request::Renew { .. } => {
                let books = &mut Books::default();
                admission::decide(books, peer, &request, &mesh, revoked, now)
            }
            Request::Join { .. } | Request::Ask { .. } => {
                let _lock = state_folder::lock(&self.state_dir).map_err(Trouble::Lock)?;
                let mut books = Books {
                    tickets: read_tickets(&self.tickets)?,
                    pending: read_pending(&self.pending)?,
                };
                let known = books.clone();
                let decided = admission::decide(&mut books, peer, &request, &mesh, revoked, now);
                // Before the certificate leaves.
                if books.tickets != known.tickets {
                    write_tickets(&self.tickets, &books.tickets)?;
                }
                if books.pending != known.pending {
                    write_pending(&self.pending, &books.pending)?;
                }
                decided
            }
        };
        let grant = match decided {
            Ok(grant) => grant,
            Err(refused) => return Ok(Err(refused)),
        };
        let Grant {
            name,
            permissions,
            seconds,
        } = grant;
        let certificate = certify(&self.key, peer, name, permissions, seconds, now)?;
        Ok(Ok(certificate))
    }
}

/// Why it is not known who may join, or cannot be written down.
#[derive(Debug, thiserror::Error)]
pub enum BooksError {
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path}: {source}", path = .path.display())]
    Tickets { path: PathBuf, source: NotTickets },
    #[error("{path}: {source}", path = .path.display())]
    Pending { path: PathBuf, source: NotPending },
}

/// Reads the tickets that were given out; none where there is no file.
pub fn read_tickets(path: &Path) -> Result<Tickets, BooksError> {
    let text = read_book(path, TICKETS_FILE_BYTES_MAX)?;
    Tickets::from_text(&text).map_err(|source| BooksError::Tickets {
        path: path.to_owned(),
        source,
    })
}

pub fn write_tickets(path: &Path, tickets: &Tickets) -> Result<(), BooksError> {
    write_book(path, &tickets.to_text())
}

/// Reads who asked to join; nobody where there is no file.
pub fn read_pending(path: &Path) -> Result<Pending, BooksError> {
    let text = read_book(path, PENDING_TEXT_BYTES_MAX)?;
    Pending::from_text(&text).map_err(|source| BooksError::Pending {
        path: path.to_owned(),
        source,
    })
}

pub fn write_pending(path: &Path, pending: &Pending) -> Result<(), BooksError> {
    write_book(path, &pending.to_text())
}

fn read_book(path: &Path, bytes_max: u64) -> Result<String, BooksError> {
    let text = state_folder::read(path, bytes_max).map_err(|source| BooksError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    Ok(text.unwrap_or_default())
}

fn write_book(path: &Path, text: &str) -> Result<(), BooksError> {
    state_folder::write(path, text.as_bytes()).map_err(|source| BooksError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

/// Asks those who admit, one after another, until one answers.
///
/// # Errors
/// What the last one said, or a refusal, which the others would only repeat.
pub async fn ask(
    own: &Identity,
    mesh: &PublicKey,
    admits: &[String],
    request: &Request,
) -> Result<SignedCertificate, AskError> {
    let expected = identity::peer_id_of(mesh.as_bytes()).ok_or(AskError::MeshKey)?;
    let connector = tls::newcomer(own, tls::HANDSHAKE_DEADLINE)?;
    let me = PeerId::from_public_key(own.public_key());
    let mut last = AskError::Nobody;
    for address in admits {
        match ask_one(&connector, expected, address, request).await {
            Ok(Reply::Certificate(certificate)) => {
                let verified = certificate.verify(mesh, &me, unix_time());
                match verified {
                    // Our clock is behind theirs: it will be right one day, and they will judge by theirs.
                    Ok(_) | Err(NotAMember::NotYetValid { .. } | NotAMember::Expired { .. }) => {
                        return Ok(certificate);
                    }
                    Err(source) => {
                        let (address, source) = (address.clone(), Box::new(source));
                        last = AskError::NotAMember { address, source };
                    }
                }
            }
            Ok(Reply::Refused(refused)) => {
                return Err(AskError::Refused {
                    address: address.clone(),
                    refused,
                });
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn ask_one(
    connector: &tls::Connector,
    expected: libp2p::PeerId,
    address: &str,
    request: &Request,
) -> Result<Reply, AskError> {
    let resolve = |source| AskError::Resolve {
        address: address.to_owned(),
        source,
    };
    let resolved = tokio::net::lookup_host(address).await.map_err(resolve)?;
    let mut connected = Err(resolve(io::ErrorKind::NotFound.into()));
    // A name may stand for an IPv6 address as well, from where nobody is reached.
    for address in resolved.take(RESOLVED_MAX) {
        let attempt = connector.connect(address, expected).await;
        connected = attempt.map_err(|source| AskError::Connect(Box::new(source)));
        if connected.is_ok() {
            break;
        }
    }
    let mut stream = connected?;
    let talk = async {
        write_frame(&mut stream, &request.to_bytes()).await?;
        read_frame(&mut stream).await
    };
    let answer = timeout(EXCHANGE_TIMEOUT, talk).await;
    let answer = answer.map_err(|_| AskError::TimedOut {
        address: address.to_owned(),
    })?;
    let answer = answer.map_err(|source| AskError::Talk {
        address: address.to_owned(),
        source,
    })?;
    Reply::from_bytes(&answer).map_err(|source| AskError::Nonsense {
        address: address.to_owned(),
        source,
    })
}

async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_u16(length).await?;
    stream.write_all(bytes).await?;
    stream.flush().await
}

async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Zeroizing<Vec<u8>>> {
    let length = usize::from(stream.read_u16().await?);
    if length > JOINING_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "a message of {length} bytes was announced, at most {JOINING_BYTES_MAX} are read"
            ),
        ));
    }
    let mut bytes = Zeroizing::new(vec![0; length]);
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Draws the secret of a new ticket.
pub fn new_secret() -> Result<Secret, getrandom::Error> {
    let mut bytes = Zeroizing::new([0; granary_protocol::ticket::SECRET_BYTES]);
    getrandom::fill(bytes.as_mut())?;
    Ok(Secret::from_bytes(*bytes))
}

/// Keeps what a ticket says of its mesh, without the secret.
pub fn remember(file: &Path, ticket: &Ticket) -> io::Result<()> {
    let used = Ticket {
        secret: None,
        ..ticket.clone()
    };
    let text = used.to_text().map_err(io::Error::other)?;
    state_folder::write(file, format!("{}\n", text.as_str()).as_bytes())
}

/// What this machine calls itself; `None` when that is no name for a member.
pub fn host_name() -> Option<String> {
    let name = state_folder::read(Path::new("/proc/sys/kernel/hostname"), HOST_NAME_BYTES_MAX);
    let name = name.ok()??;
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    // As a certificate has names, so that no host name keeps a machine from starting.
    let name: String = name
        .chars()
        .filter(is_allowed)
        .take(MEMBER_NAME_BYTES_MAX)
        .collect();
    Some(name).filter(|name| !name.is_empty())
}
