//! NARs over HTTP: ranges, headers, and the NAR of a local path.

use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, stream};
use granary_protocol::narinfo::NarUrl;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use tracing::info;

use super::respond::{self, Body};
use crate::store::{LocalStore, Nar, PathInfo, StoreError};

/// Which part of a representation is asked for (RFC 9110 §14).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    Range(Range<u64>),
    /// Begins at or after the end.
    Unsatisfiable,
}

impl Part {
    /// Reads the Range header for a representation of `size` bytes.
    ///
    /// What is not one range of bytes is ignored, as the RFC wants it: several ranges, another unit,
    /// garbage. Nix asks for `bytes=N-` and takes 416 as fatal, so it is said only when true.
    pub fn of(headers: &HeaderMap, size: u64) -> Part {
        let mut values = headers.get_all(RANGE).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Part::Whole;
        };
        let Some(spec) = value
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("bytes="))
        else {
            return Part::Whole;
        };
        let Some((first, last)) = spec.trim().split_once('-') else {
            return Part::Whole;
        };
        let range = match (number(first), number(last)) {
            (Some(Some(first)), Some(None)) => first..size,
            (Some(Some(first)), Some(Some(last))) if first <= last => {
                first..last.saturating_add(1).min(size)
            }
            (Some(None), Some(Some(suffix))) => {
                if suffix == 0 {
                    return Part::Unsatisfiable;
                }
                size.saturating_sub(suffix)..size
            }
            _ => return Part::Whole,
        };
        if range.start < size {
            Part::Range(range)
        } else {
            Part::Unsatisfiable
        }
    }

    /// The bytes to send; empty when there are none.
    pub fn bytes(&self, size: u64) -> Range<u64> {
        match self {
            Part::Whole => 0..size,
            Part::Range(range) => range.clone(),
            Part::Unsatisfiable => size..size,
        }
    }
}

/// `None` for what is no number, `Some(None)` for nothing at all.
fn number(text: &str) -> Option<Option<u64>> {
    if text.is_empty() {
        return Some(None);
    }
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    is_number
        .then(|| text.parse().unwrap_or(u64::MAX))
        .map(Some)
}

/// The head of an answer with `part` of a NAR of `size` bytes; the body is `body`.
pub fn answer(part: &Part, size: u64, body: Body) -> Response<Body> {
    let bytes = part.bytes(size);
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/x-nix-nar"),
    );
    headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.end - bytes.start));
    let (status, range) = match part {
        Part::Whole => (StatusCode::OK, None),
        Part::Range(range) => {
            let range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            (StatusCode::PARTIAL_CONTENT, Some(range))
        }
        Part::Unsatisfiable => (
            StatusCode::RANGE_NOT_SATISFIABLE,
            Some(format!("bytes */{size}")),
        ),
    };
    if let Some(range) = range.and_then(|range| HeaderValue::from_str(&range).ok()) {
        headers.insert(CONTENT_RANGE, range);
    }
    *response.status_mut() = status;
    respond::with_ranges(response, true)
}

/// A NAR of the local store, opened and ready to be sent.
pub struct LocalNar {
    pub info: PathInfo,
    pub nar: Nar,
}

/// Opens the NAR that a URL names; `None` when the path is not here or has other contents.
pub async fn open(
    store: &Arc<dyn LocalStore>,
    url: &NarUrl,
) -> Result<Option<LocalNar>, StoreError> {
    match store.path_info(url.store_path_hash).await? {
        Some(info) => open_known(store, url, info).await,
        None => Ok(None),
    }
}

/// The same for a path of which the store has told what it knows.
pub async fn open_known(
    store: &Arc<dyn LocalStore>,
    url: &NarUrl,
    info: PathInfo,
) -> Result<Option<LocalNar>, StoreError> {
    if url
        .nar_hash
        .is_some_and(|nar_hash| nar_hash != info.nar_hash)
    {
        return Ok(None);
    }
    let nar = store.nar(&info).await?;
    Ok(nar.map(|nar| LocalNar { info, nar }))
}

impl LocalNar {
    /// Answers with the part that is asked for. `sent` hears of every chunk that hyper takes.
    ///
    /// The first chunk is read before the answer begins: `None` for a path that vanished, and a small NAR
    /// goes out in one segment with its head.
    pub async fn respond(
        self,
        method: &Method,
        headers: &HeaderMap,
        sent: impl Fn(u64) + Send + 'static,
    ) -> Option<Response<Body>> {
        let size = self.nar.size();
        let part = Part::of(headers, size);
        let bytes = part.bytes(size);
        let body = if *method == Method::HEAD || bytes.is_empty() {
            Body::default()
        } else {
            let mut chunks = self.nar.stream(bytes);
            let first = match chunks.next().await {
                Some(Ok(first)) => first,
                Some(Err(error)) => {
                    info!(%error, "could not begin a nar");
                    return None;
                }
                // The part is not empty, so neither is its stream.
                None => return None,
            };
            let chunks = stream::iter([Ok(first)]).chain(chunks);
            respond::stream(chunks.inspect(move |chunk| {
                if let Ok(chunk) = chunk {
                    sent(chunk.len() as u64);
                }
            }))
        };
        Some(answer(&part, size, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(range: &str) -> Part {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, HeaderValue::from_str(range).unwrap());
        Part::of(&headers, 1000)
    }

    #[test]
    fn single_ranges_are_read() {
        assert_eq!(part("bytes=0-"), Part::Range(0..1000));
        assert_eq!(part("bytes=1-"), Part::Range(1..1000));
        assert_eq!(part("bytes=999-"), Part::Range(999..1000));
        assert_eq!(part("bytes=10-19"), Part::Range(10..20));
        assert_eq!(part("bytes=10-5000"), Part::Range(10..1000));
        assert_eq!(part("bytes=0-18446744073709551615"), Part::Range(0..1000));
        assert_eq!(part("bytes=-1"), Part::Range(999..1000));
        assert_eq!(part("bytes=-5000"), Part::Range(0..1000));
    }

    #[test]
    fn what_begins_behind_the_end_is_unsatisfiable() {
        for range in [
            "bytes=1000-",
            "bytes=2000-3000",
            "bytes=-0",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(part(range), Part::Unsatisfiable, "{range}");
        }
    }

    #[test]
    fn what_is_not_one_range_of_bytes_is_ignored() {
        for range in [
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=5-1",
            "bytes=0-1,5-6",
            "items=0-1",
            "0-1",
            "bytes=+1-",
            "bytes=1 -",
            "bytes=--1",
        ] {
            assert_eq!(part(range), Part::Whole, "{range}");
        }
        assert_eq!(Part::of(&HeaderMap::new(), 1000), Part::Whole);
    }
}
