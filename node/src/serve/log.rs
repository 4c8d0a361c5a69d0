//! Build logs: `/log/<derivation>`, decoded.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use granary_protocol::store_path::StorePath;
use http::{Method, Response};
use tokio::sync::Semaphore;
use tracing::warn;

use super::respond::{self, Body};
use crate::store::log::BuildLogs;

/// Logs that are measured or sent at once: a decoder of bzip2 takes some 4 MiB.
const LOGS_MAX: usize = 16;

/// How long a log waits for a place among those.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);

/// The places for logs under way.
pub struct LogPlaces(Arc<Semaphore>);

impl Default for LogPlaces {
    fn default() -> LogPlaces {
        LogPlaces(Arc::new(Semaphore::new(LOGS_MAX)))
    }
}

/// Answers with the log of a derivation, or 404.
pub async fn answer(
    logs: &BuildLogs,
    places: &LogPlaces,
    derivation: &StorePath,
    method: &Method,
) -> Response<Body> {
    let place = places.0.clone().acquire_owned();
    let Ok(Ok(place)) = tokio::time::timeout(PLACE_TIMEOUT, place).await else {
        return respond::not_found(false);
    };
    let log = match logs.open(derivation).await {
        Ok(Some(log)) => log,
        Ok(None) => return respond::not_found(false),
        Err(error) => {
            warn!(%error, "could not give a build log");
            return respond::not_found(false);
        }
    };
    let size = log.size;
    let body = match *method {
        Method::HEAD => Body::default(),
        _ => respond::stream(log.stream().inspect(move |_| {
            // The place is taken for as long as the decoder lives.
            let _ = &place;
        })),
    };
    respond::sized(respond::TEXT, size, body)
}
