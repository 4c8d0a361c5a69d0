//! Listeners: where the endpoint is reached. TCP and Unix sockets, our own or the service manager's.
//!
//! A socket that was passed to us (systemd's socket activation, `sd_listen_fds(3)`) stays open in
//! the service manager: what arrives while no node runs waits in its backlog. One that we bound
//! ourselves is gone with us, so before it closes, [`Listener::waiting`] gives what is in its backlog.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use futures::FutureExt;
use rustix::net::{AddressFamily, SocketType, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::either::Either;
use tracing::debug;

/// Clients that wait to be accepted; the kernel cuts it to `net.core.somaxconn`, 4096 by default.
const BACKLOG: u32 = 1024;

/// Mode of a Unix socket: whoever may connect to loopback may connect here.
const SOCKET_MODE: u32 = 0o666;

/// Where to listen: `127.0.0.1:4726`, `[::1]:4726` or `unix:/run/granary/socket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Why a text is no address to listen on.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no address to listen on, expected ip:port or unix:/path")]
pub struct AddressError {
    text: String,
}

/// Why what the service manager passed cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    #[error("LISTEN_FDS names file descriptors that cannot be used: {source}")]
    Descriptors { source: io::Error },
    #[error(
        "file descriptor {number} from LISTEN_FDS is no listening stream socket, refusing to start; \
         use ListenStream= in the socket unit"
    )]
    NotListening { number: i32 },
}

/// A connection of either kind.
pub type Socket = Either<TcpStream, UnixStream>;

/// A socket that clients connect to.
pub struct Listener {
    socket: Either<TcpListener, UnixListener>,
    address: Address,
    /// The file of a Unix socket that is ours to remove.
    file: Option<SocketFile>,
    is_inherited: bool,
}

impl Listener {
    /// Binds an address. A Unix socket that nobody listens on any more is replaced.
    ///
    /// Must be called inside a tokio runtime.
    /// # Errors
    /// `AddrInUse` also when another process answers on the Unix socket, or a file of another kind
    /// stands in its place.
    pub fn bind(address: &Address) -> io::Result<Listener> {
        match address {
            Address::Tcp(address) => {
                let listener = bind_tcp(*address)?;
                Ok(Listener {
                    address: Address::Tcp(listener.local_addr()?),
                    socket: Either::Left(listener),
                    file: None,
                    is_inherited: false,
                })
            }
            Address::Unix(path) => {
                let listener = bind_unix(path)?;
                Ok(Listener {
                    socket: Either::Right(listener),
                    address: address.clone(),
                    file: Some(SocketFile::of(path)?),
                    is_inherited: false,
                })
            }
        }
    }

    /// Takes the sockets that the service manager passed to this process; none without one.
    ///
    /// Must be called inside a tokio runtime, and once per process: it becomes their owner.
    /// # Errors
    /// When one of them is no listening stream socket.
    pub fn inherited() -> Result<Vec<Listener>, InheritError> {
        let numbers =
            sd_notify::listen_fds().map_err(|source| InheritError::Descriptors { source })?;
        let mut listeners = Vec::new();
        for number in numbers {
            // SAFETY: `listen_fds` found it open, and LISTEN_PID says that it was passed to this very
            // process, in which nothing else has taken it: this function is called once.
            let socket = unsafe { OwnedFd::from_raw_fd(number) };
            let is_listening = matches!(sockopt::socket_acceptconn(&socket), Ok(true))
                && matches!(sockopt::socket_type(&socket), Ok(SocketType::STREAM));
            let listener = is_listening.then(|| Listener::adopt(socket));
            match listener {
                Some(Ok(listener)) => listeners.push(listener),
                Some(Err(source)) => return Err(InheritError::Descriptors { source }),
                None => return Err(InheritError::NotListening { number }),
            }
        }
        Ok(listeners)
    }

    fn adopt(socket: OwnedFd) -> io::Result<Listener> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let (socket, address) = if sockopt::socket_domain(&socket)? == AddressFamily::UNIX {
            let listener = UnixListener::from_std(socket.into())?;
            let address = listener.local_addr()?;
            let path = address.as_pathname().unwrap_or(Path::new("")).to_owned();
            (Either::Right(listener), Address::Unix(path))
        } else {
            let listener = TcpListener::from_std(socket.into())?;
            let address = listener.local_addr()?;
            (Either::Left(listener), Address::Tcp(address))
        };
        Ok(Listener {
            socket,
            address,
            file: None,
            is_inherited: true,
        })
    }

    /// Where this listens; of port 0, the port that it became.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next client. Cancel-safe.
    pub async fn accept(&self) -> io::Result<Socket> {
        match &self.socket {
            Either::Left(listener) => {
                let (socket, _) = listener.accept().await?;
                // Without it every small answer waits 40 ms for the client's delayed ACK.
                if let Err(error) = socket.set_nodelay(true) {
                    debug!(%error, "could not set TCP_NODELAY");
                }
                Ok(Either::Left(socket))
            }
            Either::Right(listener) => Ok(Either::Right(listener.accept().await?.0)),
        }
    }

    /// Gives a client whose connection stands already and would be reset when this closes; `None` when
    /// there is none, or when it waits for the next process on an inherited socket.
    pub fn waiting(&self) -> Option<Socket> {
        if self.is_inherited {
            return None;
        }
        self.accept().now_or_never()?.ok()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            file.remove();
        }
    }
}

/// The file of a Unix socket, by what identifies it: another process may have put its own there.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<SocketFile> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(SocketFile {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn remove(&self) {
        let found = SocketFile::of(&self.path);
        if found.is_ok_and(|found| (found.device, found.inode) == (self.device, self.inode))
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!(%error, path = %self.path.display(), "could not remove a socket");
        }
    }
}

/// Binds a TCP socket. IPv4 and IPv6 are separate, as the configuration writes them.
pub fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

/// Whether a socket was left behind by a process that ended without removing it.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let connected = || std::os::unix::net::UnixStream::connect(path);
    is_socket && connected().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let malformed = || AddressError {
            text: text.to_owned(),
        };
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Address::Unix(PathBuf::from(path))),
            Some(_) => Err(malformed()),
            None => text.parse().map(Address::Tcp).map_err(|_| malformed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["127.0.0.1:4726", "[::1]:4726", "unix:/run/granary/socket"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "unix:here",
            "localhost:1",
            "127.0.0.1",
            "/run/x",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn an_abandoned_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let address = Address::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves it behind");
        let listener = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o666);
        drop(listener);
        assert!(!path.exists(), "ours is removed");

        fs::write(&path, "a file").unwrap();
        assert!(Listener::bind(&address).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }

    #[tokio::test]
    async fn clients_in_the_backlog_are_found_before_a_listener_closes() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Address::Tcp(address) = *listener.address() else {
            panic!("bound to TCP");
        };
        let client = std::net::TcpStream::connect(address).unwrap();
        // The reactor learns of the connection.
        let mut waiting = listener.waiting();
        while waiting.is_none() {
            tokio::task::yield_now().await;
            waiting = listener.waiting();
        }
        assert!(listener.waiting().is_none());
        drop(client);
    }
}
