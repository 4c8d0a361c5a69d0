//! A fetch, as those who move its bytes see it: the mind's orders come in, reports go out.
//!
//! Invariant: a fetch that is dropped ends, also when the loop is too busy to hear of it at once.

use std::time::Duration;

use granary_protocol::mesh::{Blame, FetchId, Input, Source};
use tokio::sync::mpsc;

use super::Command;

/// What the mind wants done about one fetch.
#[derive(Debug)]
pub enum Order {
    /// Transfer from this source, continuing where the last one ended.
    Open { attempt: u32, source: Source },
    /// Stop that attempt; another order follows.
    Stop { attempt: u32 },
    /// Every source was tried.
    Fail,
}

/// One NAR being fetched: orders come in, reports go out. Dropping it ends the fetch.
pub struct Fetch {
    pub(super) id: FetchId,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) commands: mpsc::Sender<Command>,
}

impl Fetch {
    /// The next order; [`Order::Fail`] when the mesh has stopped. Cancel-safe.
    pub async fn order(&mut self) -> Order {
        self.orders.recv().await.unwrap_or(Order::Fail)
    }

    /// The next order while a transfer runs; never one when the mesh has stopped, because what is
    /// under way may finish. Cancel-safe.
    pub async fn change(&mut self) -> Order {
        match self.orders.recv().await {
            Some(order) => order,
            None => std::future::pending().await,
        }
    }

    /// Reports that the transfer reached byte `at`, or is held up by the reader, and for how long it
    /// was in all.
    pub async fn progress(&self, attempt: u32, at: u64, held_up: Duration) {
        self.report(Input::TransferProgress {
            fetch: self.id,
            attempt,
            at,
            held_up,
        })
        .await;
    }

    pub async fn ended(&self, attempt: u32, outcome: Result<(), Blame>) {
        self.report(Input::TransferEnded {
            fetch: self.id,
            attempt,
            outcome,
        })
        .await;
    }

    /// The whole NAR has another hash than promised.
    pub async fn mismatch(&self) {
        self.report(Input::FetchMismatch { fetch: self.id }).await;
    }

    async fn report(&self, input: Input) {
        // A mesh that has stopped needs no reports.
        let _ = self.commands.send(Command::Report(input)).await;
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let done = Command::FetchDone(self.id);
        if let Err(mpsc::error::TrySendError::Full(done)) = self.commands.try_send(done)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let commands = self.commands.clone();
            runtime.spawn(async move { drop(commands.send(done).await) });
        }
    }
}
