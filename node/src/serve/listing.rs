//! The listing of a path's NAR: `/<hash>.ls`.
//!
//! Of a local path it follows from a walk; of a path that only peers hold, from its NAR, streamed
//! here and proved like any other, since a listing itself is signed by nobody.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use granary_protocol::nar::{Decoder, Layout, LayoutRecorder};
use granary_protocol::store_path::StorePathHash;
use http::Response;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::respond::{self, Body};
use crate::store::{LocalStore, StoreError};

/// Files of one listing; a NixOS manual has 2,000, a kernel's sources 80,000. One entry takes some
/// 100 bytes, so this bounds a listing to some 50 MB; a larger tree has none.
const NODES_MAX: usize = 500_000;

/// Listings that are made or sent at once.
const LISTINGS_MAX: usize = 4;

/// How long a listing waits for a place among those.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of a listing that are handed on at once; a reader keeps its place until the last of them.
const SLICE_BYTES: usize = 64 * 1024;

/// Bytes of a NAR that is fetched from peers for its listing alone: a second on a fast LAN.
pub const FETCHED_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// The places for listings under way, and so their memory.
pub struct Listings(Arc<Semaphore>);

impl Default for Listings {
    fn default() -> Listings {
        Listings(Arc::new(Semaphore::new(LISTINGS_MAX)))
    }
}

impl Listings {
    /// Waits for a place; `None` when slow readers have them all for too long.
    pub async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = self.0.clone().acquire_owned();
        tokio::time::timeout(PLACE_TIMEOUT, place).await.ok()?.ok()
    }
}

/// Answers with the listing of a local path; gives the place back when the path is not here.
pub async fn local(
    store: &Arc<dyn LocalStore>,
    hash: StorePathHash,
    place: OwnedSemaphorePermit,
) -> Result<Result<Response<Body>, OwnedSemaphorePermit>, StoreError> {
    let Some(info) = store.path_info(hash).await? else {
        return Ok(Err(place));
    };
    let Some(nar) = store.nar(&info).await? else {
        return Ok(Err(place));
    };
    let text = move || nar.layout().and_then(|layout| text(hash, layout));
    let text = tokio::task::spawn_blocking(text)
        .await
        .map_err(|_| StoreError::Stopped)?;
    Ok(Ok(answer(text, place)))
}

/// The listing of a NAR that is fetched, piece by piece.
#[derive(Default)]
pub struct FetchedListing {
    decoder: Decoder,
    recorder: LayoutRecorder,
}

impl FetchedListing {
    /// Takes the next bytes of the NAR. False when it is none, or too large a tree.
    pub fn push(&mut self, mut piece: &[u8]) -> bool {
        loop {
            match self.decoder.next(&mut piece) {
                Ok(Some(event)) => {
                    if self.recorder.record(&event).is_err() {
                        return false;
                    }
                }
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Answers after the last byte, which comes only when the NAR's hash is right.
    pub async fn answer(self, hash: StorePathHash, place: OwnedSemaphorePermit) -> Response<Body> {
        let layout = self.decoder.finish().ok();
        let layout = layout.and_then(|()| self.recorder.finish().ok());
        let Some(layout) = layout else {
            return respond::not_found(false);
        };
        let text = tokio::task::spawn_blocking(move || text(hash, &layout)).await;
        answer(text.ok().flatten(), place)
    }
}

fn text(hash: StorePathHash, layout: &Layout) -> Option<String> {
    if layout.node_count() > NODES_MAX {
        debug!(%hash, nodes = layout.node_count(), "made no listing of a tree this large");
        return None;
    }
    match layout.listing() {
        Ok(text) => Some(text),
        Err(error) => {
            debug!(%hash, %error, "made no listing");
            None
        }
    }
}

fn answer(text: Option<String>, place: OwnedSemaphorePermit) -> Response<Body> {
    let Some(text) = text else {
        return respond::not_found(false);
    };
    let text = Bytes::from(text);
    let size = text.len() as u64;
    let slices = futures::stream::unfold((text, place), |(mut text, place)| async {
        let next = text.split_to(text.len().min(SLICE_BYTES));
        (!next.is_empty()).then_some((Ok::<_, std::io::Error>(next), (text, place)))
    });
    respond::sized("application/json", size, respond::stream(slices))
}
