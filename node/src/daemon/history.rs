//! The file of the history: read at the start, written when something was counted, and at the end.
//!
//! A history that cannot be read is begun anew, one that cannot be written costs a picture: neither stops a node.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use crate::history::{History, TEXT_BYTES_MAX};
use crate::state_folder;
use crate::substituter::Substituter;

/// How often what was counted is written down, if anything was: what a crash may lose, and how often a disk wakes
/// up for it.
const WRITE_INTERVAL: Duration = Duration::from_secs(300);

/// Keeps the history of an endpoint.
pub(super) struct Keeper {
    file: PathBuf,
    endpoint: Arc<Substituter>,
}

impl Keeper {
    /// Gives the endpoint the history that there is.
    pub fn new(file: PathBuf, endpoint: Arc<Substituter>) -> Keeper {
        match load(&file) {
            Ok(history) => endpoint.remember(history),
            Err(problem) => {
                warn!(file = %file.display(), %problem, "could not read the history, beginning a new one");
            }
        }
        Keeper { file, endpoint }
    }

    /// Writes it from time to time. Has no end; may be dropped at any time.
    pub async fn run(&self) {
        let mut written = self.endpoint.history();
        loop {
            tokio::time::sleep(WRITE_INTERVAL).await;
            let history = self.endpoint.history();
            if history != written {
                self.write(&history).await;
                written = history;
            }
        }
    }

    /// Writes it as it is at this moment.
    pub async fn finish(&self) {
        self.write(&self.endpoint.history()).await;
    }

    async fn write(&self, history: &History) {
        let (file, text) = (self.file.clone(), history.to_text());
        let write = move || state_folder::write(&file, text.as_bytes());
        match tokio::task::spawn_blocking(write).await {
            Ok(Ok(())) => debug!("wrote the history"),
            Ok(Err(error)) => {
                warn!(file = %self.file.display(), %error, "could not write the history");
            }
            Err(error) => warn!(%error, "could not write the history"),
        }
    }
}

fn load(file: &Path) -> Result<History, String> {
    let text = state_folder::read(file, TEXT_BYTES_MAX).map_err(|error| error.to_string())?;
    match text {
        Some(text) => History::parse(&text).map_err(|error| error.to_string()),
        None => Ok(History::default()),
    }
}
