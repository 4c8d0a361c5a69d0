//! What a node has to share: the store of its Nix, what an anchor beside it publishes, or both.
//!
//! A node by itself waits for its store, for without one it has nothing to give and nobody to ask for. Beside an anchor it
//! waits for nothing: a NAS has no Nix, or has it on a disk that is mounted late.

use super::*;
use crate::store::{Awaited, NixStore, StoreError};

/// What a node shares.
pub enum Holdings {
    /// The store of this machine's Nix.
    Store,
    /// That, if and when there is one, and what the public caches of this process's anchor hold.
    StoreAndAnchor(Arc<Anchor>),
    /// The latter alone.
    Anchor(Arc<Anchor>),
}

impl Start {
    /// Opens the store and does the rest after it; before it, where there is something to share without.
    pub(super) async fn open(&mut self, mesh_ports: Vec<SocketAddr>, transfer: Vec<TcpListener>) {
        let share = std::mem::take(&mut self.share);
        let mut told = String::new();
        let first = match &self.holdings {
            Holdings::Store => Some(self.await_store(&mut told).await),
            Holdings::StoreAndAnchor(_) => self.try_store(&mut told).await,
            Holdings::Anchor(_) => None,
        };
        if let Some(store) = first {
            let records = Some(store.records(self.config.log_dir()));
            self.start_engine(store.clone(), records);
            self.push_builds(store.clone());
            return self.bring_up(store, share, mesh_ports, transfer).await;
        }
        let (awaited, arrival) = Awaited::new(self.config.store.dir.clone());
        let awaited = Arc::new(awaited);
        self.start_engine(awaited.clone(), None);
        let arriving = async {
            if let Holdings::Anchor(_) = self.holdings {
                return;
            }
            let store = self.await_store(&mut told).await;
            info!("found the store, sharing it as well");
            if let Some(engine) = self.endpoint.engine() {
                // Set once: one store comes.
                let _ = engine.records.set(store.records(self.config.log_dir()));
            }
            // Earlier, what is not here yet would look like what is gone.
            self.push_builds(store.clone());
            arrival.send_replace(Some(store));
        };
        tokio::join!(
            self.bring_up(awaited, share, mesh_ports, transfer),
            arriving
        );
    }

    /// Opens the store, as soon as that can be.
    async fn await_store(&self, told: &mut String) -> Arc<NixStore> {
        loop {
            if let Some(store) = self.try_store(told).await {
                return store;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Opens the store if that can be, and says why not if that was not `told` yet.
    async fn try_store(&self, told: &mut String) -> Option<Arc<NixStore>> {
        let error = match NixStore::open(self.config.store_config()).await {
            Ok(store) => return Some(Arc::new(store)),
            Err(error) => error,
        };
        let trouble = chain(&error);
        if *told == trouble {
            return None;
        }
        let database = self.config.store.database.display();
        match (&error, &self.holdings) {
            (StoreError::NoDatabase { .. }, Holdings::StoreAndAnchor(_)) => {
                info!(%database, "no Nix is here, sharing what the anchor's public caches hold");
            }
            _ => {
                error!(%database, error = trouble, "could not open the store, trying again until it opens")
            }
        }
        *told = trouble;
        None
    }
}
