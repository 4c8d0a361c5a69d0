//! Roots: keeps paths from Nix's garbage collector while they are being sent.
//!
//! Three ways, the first that works: a temporary root at the Nix daemon ([`daemon`]); as root without a daemon, a file
//! of temporary roots as Nix's own processes have one ([`mod@file`]); and else only the descriptor that every open
//! [`Nar`](super::Nar) has on its path, which a collector of the same file system that may look into `/proc` respects
//! when it was open before the collection began.
//!
//! One thread talks to the daemon and writes the file, so that nothing here blocks the reactor. Invariants: a hold is
//! asked for at most [`HOLD_LIMIT`], and a NAR is served without one then; what is held is let go when the last
//! [`Hold`] is dropped; a hold that is lost (the daemon died) costs the path its protection and nothing else, because
//! whoever sends a path checks that it is still there.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use granary_protocol::store_path::StorePath;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::{StoreConfig, StoreError};

mod daemon;
mod file;

use daemon::Daemon;
use file::RootsFile;

/// How long a NAR waits for its path to be held. A peer gives a provider up that is silent for 2 s; an idle daemon
/// answers in 0.1 ms, one that forks for a new connection in some 10 ms.
pub const HOLD_LIMIT: Duration = Duration::from_secs(1);

/// What the ways may use of it, one after the other.
const DAEMON_LIMIT: Duration = Duration::from_millis(600);
const FILE_LIMIT: Duration = Duration::from_millis(300);

/// How often the thread looks after what is to be let go later. Nothing to let go, no waking.
const TIDY_INTERVAL: Duration = Duration::from_millis(250);

/// Why one way to hold a path does not work.
#[derive(Debug, thiserror::Error)]
enum RootError {
    #[error("cannot reach {socket}: {source}", socket = .socket.display())]
    Connect {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error("the nix daemon did not answer, it is left alone for a while")]
    Resting,
    #[error("every connection to the nix daemon waits for an answer")]
    Stuck,
    #[error("no answer in time")]
    TimedOut,
    #[error("talking to the nix daemon or its collector failed: {source}")]
    Talk { source: std::io::Error },
    #[error(transparent)]
    Protocol(#[from] granary_protocol::worker::WorkerError),
    #[error("the nix daemon refused: {text}")]
    Refused { text: String },
    #[error("cannot use {file}: {source}", file = .file.display())]
    File {
        file: PathBuf,
        source: std::io::Error,
    },
    #[error("{file} belongs to another process", file = .file.display())]
    InUse { file: PathBuf },
    #[error("{file} was taken away again and again", file = .file.display())]
    Unstable { file: PathBuf },
}

/// Asks for holds. Dropping it and every [`Hold`] ends the thread.
pub struct Roots {
    commands: Sender<Command>,
}

/// A path that is kept from being collected until this is dropped.
pub struct Hold {
    ticket: Option<Ticket>,
    commands: Sender<Command>,
}

enum Command {
    Hold {
        path: StorePath,
        /// Without a ticket yet. It travels both ways, so that an answer that nobody waits for lets go by itself.
        hold: Hold,
        answer: oneshot::Sender<Hold>,
    },
    Release(Ticket),
    Wake(oneshot::Sender<bool>),
}

/// Where a hold was made, so where it is to be let go.
enum Ticket {
    Daemon(daemon::ConnectionNumber),
    File(StorePath),
}

/// Which way the last hold went, to tell when it changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Daemon,
    File,
    None,
}

impl Roots {
    /// Starts the thread. The daemon and the file are first touched by the first hold.
    ///
    /// # Errors
    /// [`StoreError::Thread`].
    pub fn start(config: &Arc<StoreConfig>) -> Result<Roots, StoreError> {
        #[expect(
            clippy::disallowed_methods,
            reason = "at most two commands for each NAR that is open, which the listeners bound; a release must not be lost, and Drop cannot wait"
        )]
        let (commands, receiver) = channel();
        let keeper = Keeper {
            daemon: Daemon::new(config.dir.clone(), config.daemon_socket.clone()),
            file: RootsFile::new(config.dir.clone(), config.state_dir().to_owned()),
            way: None,
        };
        thread::Builder::new()
            .name("store-roots".into())
            .spawn(move || keeper.run(receiver))
            .map_err(|source| StoreError::Thread { source })?;
        Ok(Roots { commands })
    }

    /// Keeps a path from being collected, if there is a way to, within [`HOLD_LIMIT`].
    ///
    /// Says nothing about whether the path is there: ask the database afterwards. Cancel-safe.
    pub async fn hold(&self, path: &StorePath) -> Option<Hold> {
        let (answer, held) = oneshot::channel();
        let hold = Hold {
            ticket: None,
            commands: self.commands.clone(),
        };
        let path = path.clone();
        let command = Command::Hold { path, hold, answer };
        self.commands.send(command).ok()?;
        match tokio::time::timeout(HOLD_LIMIT, held).await {
            // Dropped by the thread when there is no way to hold the path.
            Ok(held) => held.ok(),
            Err(_) => {
                debug!("a path could not be held in time");
                None
            }
        }
    }

    /// Has the Nix daemon open the database, and keep it open from now on; false when it cannot be reached.
    ///
    /// An idle Nix before 2.22 leaves no `-wal` file, and a user who may not make one cannot read without.
    pub async fn wake_daemon(&self) -> bool {
        let (answer, is_awake) = oneshot::channel();
        if self.commands.send(Command::Wake(answer)).is_err() {
            return false;
        }
        let is_awake = tokio::time::timeout(HOLD_LIMIT, is_awake).await;
        matches!(is_awake, Ok(Ok(true)))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            // A thread that ended has let everything go.
            let _ = self.commands.send(Command::Release(ticket));
        }
    }
}

/// The thread's own: both ways, and what was said about them.
struct Keeper {
    daemon: Daemon,
    file: RootsFile,
    way: Option<Way>,
}

impl Keeper {
    fn run(mut self, commands: Receiver<Command>) {
        loop {
            let has_to_tidy = self.daemon.has_to_tidy() || self.file.has_to_tidy();
            let command = match has_to_tidy {
                true => commands.recv_timeout(TIDY_INTERVAL),
                false => commands.recv().map_err(RecvTimeoutError::from),
            };
            match command {
                Ok(Command::Hold {
                    path,
                    mut hold,
                    answer,
                }) => {
                    if answer.is_closed() {
                        continue;
                    }
                    hold.ticket = self.hold(&path);
                    if hold.ticket.is_some() {
                        // Who gave up waiting gets it all the same: dropping it lets go.
                        let _ = answer.send(hold);
                    }
                }
                Ok(Command::Release(Ticket::Daemon(connection))) => self.daemon.release(connection),
                Ok(Command::Release(Ticket::File(path))) => self.file.release(&path),
                Ok(Command::Wake(answer)) => {
                    let woken = self.daemon.wake(Instant::now() + DAEMON_LIMIT);
                    if let Err(error) = &woken {
                        debug!(%error, "could not have the nix daemon open the database");
                    }
                    // Who gave up waiting asks again.
                    let _ = answer.send(woken.is_ok());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.daemon.tidy();
            self.file.tidy();
        }
    }

    fn hold(&mut self, path: &StorePath) -> Option<Ticket> {
        let by_daemon = self.daemon.hold(path, Instant::now() + DAEMON_LIMIT);
        let (ticket, way) = match by_daemon {
            Ok(connection) => (Some(Ticket::Daemon(connection)), Way::Daemon),
            Err(daemon) => match self.file.hold(path, Instant::now() + FILE_LIMIT) {
                Ok(()) => (Some(Ticket::File(path.clone())), Way::File),
                Err(file) => {
                    if self.way != Some(Way::None) {
                        warn!(
                            %daemon, %file,
                            "cannot hold paths against garbage collection: one that is collected while it is sent is cut"
                        );
                    }
                    (None, Way::None)
                }
            },
        };
        if self.way != Some(way) {
            match way {
                Way::Daemon => info!("holding paths that are sent through the nix daemon"),
                Way::File => info!("holding paths that are sent by a file of temporary roots"),
                Way::None => {}
            }
            self.way = Some(way);
        }
        ticket
    }
}
