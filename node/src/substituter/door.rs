//! The door: connections to the endpoint, from the first to the last.
//!
//! A listener is open from before there is a store until after the mesh is gone. At the end clients
//! are told to go, those with an answer running are waited for, and new ones are let in meanwhile; the
//! listeners close last ([`Substituter::retire`], [`drain`](Substituter::drain),
//! [`close`](Substituter::close), in this order).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::Substituter;
use crate::listener::{Address, Listener, Socket};
use crate::metrics::Refused;
use crate::serve::{Ended, connection};

/// How long an idle connection is kept. curl reuses connections for 118 s and is annoyed by one
/// that closes as it writes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Connections at once on one listener. Nix opens 25 per process.
const CONNECTIONS_MAX: usize = 4096;

/// Pause after accept failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long clients whose connections are idle have to ask something, so as to learn from the answer
/// that the connection ends. One that asks later finds it closed, and asks on another.
const GOODBYE: Duration = Duration::from_millis(250);

/// What is open, and how far the end has come.
#[derive(Default)]
pub(super) struct Door {
    /// Set when the end begins: nothing long is begun any more, and clients are told to go.
    is_retiring: AtomicBool,
    closing: CancellationToken,
    listeners: TaskTracker,
    /// Connections from before the end began, which hold up the end while they have an answer running.
    early: Connections,
    late: Connections,
}

/// Connections that end together.
#[derive(Default)]
struct Connections {
    /// Lets each finish the answer that it has running.
    ending: CancellationToken,
    tasks: TaskTracker,
}

impl Connections {
    async fn end(&self, limit: Duration) {
        self.ending.cancel();
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait())
            .await
            .is_err()
        {
            info!(
                connections = self.tasks.len(),
                "cut the answers that were still running"
            );
        }
    }
}

impl Substituter {
    /// Closes the listeners when the guard is dropped.
    pub fn close_on_drop(&self) -> DropGuard {
        self.door.closing.clone().drop_guard()
    }

    /// Answers on a listener until [`Substituter::close`].
    pub fn open(self: &Arc<Substituter>, listener: Listener) {
        self.door.listeners.spawn(self.clone().accept(listener));
    }

    /// Begins the end: everything is still answered, but nothing more is fetched from peers, and
    /// each client hears `Connection: close`, so that none sends a request into a closing socket.
    pub fn retire(&self) {
        self.door.is_retiring.store(true, Ordering::Relaxed);
    }

    /// Waits until the clients from before [`Substituter::retire`] have their answers, or for `limit`.
    ///
    /// New ones are answered meanwhile.
    pub async fn drain(&self, limit: Duration) {
        tokio::time::sleep(GOODBYE).await;
        self.door.early.end(limit).await;
    }

    /// Closes the listeners, and answers the clients that are here, for at most `limit`.
    pub async fn close(&self, limit: Duration) {
        self.door.closing.cancel();
        self.door.listeners.close();
        self.door.listeners.wait().await;
        self.door.late.end(limit).await;
    }

    async fn accept(self: Arc<Substituter>, listener: Listener) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let address = Arc::new(listener.address().clone());
        loop {
            // Waiting clients stay in the backlog rather than being refused.
            let Ok(permit) = connections.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.door.closing.cancelled() => break,
            };
            match accepted {
                Ok(socket) => self.serve(socket, address.clone(), permit),
                Err(error) => {
                    warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        while let Ok(permit) = connections.clone().try_acquire_owned()
            && let Some(socket) = listener.waiting()
        {
            self.serve(socket, address.clone(), permit);
        }
    }

    fn serve(
        self: &Arc<Substituter>,
        socket: Socket,
        address: Arc<Address>,
        permit: OwnedSemaphorePermit,
    ) {
        let substituter = self.clone();
        let connections = match self.is_retiring() {
            true => &self.door.late,
            false => &self.door.early,
        };
        let ending = connections.ending.clone();
        connections.tasks.spawn(async move {
            let ended = connection(socket, PATIENCE, ending, |request| {
                let (substituter, address) = (substituter.clone(), address.clone());
                async move { substituter.answer(request, &address).await }
            })
            .await;
            if ended == Ended::Malformed {
                substituter.metrics.refused(Refused::Malformed);
            }
            drop(permit);
        });
    }

    /// Whether the end has begun.
    pub(super) fn is_retiring(&self) -> bool {
        self.door.is_retiring.load(Ordering::Relaxed)
    }
}
