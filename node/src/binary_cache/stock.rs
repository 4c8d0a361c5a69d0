//! Stock: what an anchor tells a node of the cache that the node uses of it, for status.
//!
//! `GET <root>/api/v1/caches/<cache>` beside the cache's own address `<root>/<cache>`, with the node's own token: so a
//! node shows nobody more than what it may read, which is what its endpoint gives to every user of the machine.
//! Whoever looks gets what was told before, and an older word has the anchor asked anew meanwhile; where nobody
//! looks, nobody asks.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use reqwest::{Response, Url};
use serde::{Deserialize, Serialize};

/// After how long the anchor is asked again. It counts no more often itself.
const INTERVAL: Duration = Duration::from_secs(30);

/// How long one question may take. The next look may bring another.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer read; one of ours has 500 bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Longest word of an anchor that is shown.
const WORDS_MAX: usize = 300;

/// What a cache holds and keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stock {
    /// Whether anybody may read it.
    pub public: bool,
    pub paths: u64,
    /// Bytes of its NARs, unpacked.
    pub nar_bytes: u64,
    /// Bytes of them in the anchor's storage.
    pub stored_bytes: u64,
    /// Beyond which collections delete what was not used for longest.
    #[serde(default)]
    pub size_cap: Option<u64>,
    /// Beyond which pushes are refused.
    #[serde(default)]
    pub quota: Option<u64>,
    /// Seconds since its last use that a path is kept; `None` is for ever.
    #[serde(default)]
    pub retention: Option<u64>,
    /// The last collection of garbage since the anchor started.
    #[serde(default)]
    pub collected: Option<Collected>,
    /// Paths that are being pushed in parts.
    #[serde(default)]
    pub arriving: u64,
}

/// What a collection of garbage did to a cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    pub seconds_ago: u64,
    /// Paths that it took out.
    pub paths: u64,
    /// Why it did nothing.
    #[serde(default)]
    pub refused: Option<String>,
}

impl Stock {
    /// The bytes in storage at which something happens, and what it is called.
    pub fn limit(&self) -> Option<(u64, &'static str)> {
        let quota = self.quota.map(|bytes| (bytes, "quota"));
        quota.or(self.size_cap.map(|bytes| (bytes, "cap")))
    }
}

/// What was told, and how long ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pub seconds_ago: u64,
    #[serde(flatten)]
    pub stock: Stock,
}

/// Why an anchor told nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum StockError {
    #[error("request failed: {0}")]
    Request(#[from] reqwest::Error),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("the answer has more than {ANSWER_BYTES_MAX} bytes")]
    TooLarge,
    #[error("the answer is something else: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("did not answer within {TIMEOUT:?}")]
    TimedOut,
}

/// What one anchor told last.
#[derive(Default)]
pub(super) struct Memory(Mutex<State>);

#[derive(Default)]
struct State {
    told: Option<(Instant, Stock)>,
    /// When it was asked last, whatever came of it.
    asked: Option<Instant>,
}

impl Memory {
    /// Whether it is time to ask; whoever hears so does it.
    pub fn is_due(&self, now: Instant) -> bool {
        let mut state = self.state();
        let is_due = state.asked.is_none_or(|at| now - at >= INTERVAL);
        if is_due {
            state.asked = Some(now);
        }
        is_due
    }

    pub fn tell(&self, stock: Stock, now: Instant) {
        self.state().told = Some((now, stock));
    }

    /// `None` while nothing was told.
    pub fn told(&self, now: Instant) -> Option<Told> {
        let (at, mut stock) = self.state().told.clone()?;
        let seconds_ago = (now - at).as_secs();
        if let Some(last) = &mut stock.collected {
            last.seconds_ago = last.seconds_ago.saturating_add(seconds_ago);
        }
        Some(Told { seconds_ago, stock })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the stock of the cache at `base` is told; `None` for an address without a cache's name.
pub(super) fn address(base: &Url) -> Option<Url> {
    let name = base.path_segments()?.rfind(|segment| !segment.is_empty())?;
    let mut url = base.clone();
    url.set_query(None);
    url.set_fragment(None);
    let mut segments = url.path_segments_mut().ok()?;
    segments.pop_if_empty().pop();
    segments.extend(["api", "v1", "caches", name]);
    drop(segments);
    Some(url)
}

/// Reads an answer.
pub(super) async fn read(mut response: Response) -> Result<Stock, StockError> {
    if response.status() != StatusCode::OK {
        return Err(StockError::Status(response.status()));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(StockError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    parse(&body)
}

fn parse(body: &[u8]) -> Result<Stock, StockError> {
    let mut stock: Stock = serde_json::from_slice(body)?;
    if let Some(words) = stock
        .collected
        .as_mut()
        .and_then(|last| last.refused.as_mut())
    {
        // It is printed to terminals.
        let plain = words.chars().filter(|c| !c.is_control()).take(WORDS_MAX);
        *words = plain.collect();
    }
    Ok(stock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_is_asked_beside_its_cache() {
        for (base, expected) in [
            (
                "http://nas:4730/main/",
                "http://nas:4730/api/v1/caches/main",
            ),
            (
                "https://nas/granary/main",
                "https://nas/granary/api/v1/caches/main",
            ),
            ("https://me@nas/a?b#c", "https://me@nas/api/v1/caches/a"),
        ] {
            let address = address(&base.parse().unwrap()).unwrap();
            assert_eq!(address.as_str(), expected);
        }
        assert_eq!(address(&"https://cache.example/".parse().unwrap()), None);
    }

    #[test]
    fn an_anchor_is_asked_once_in_a_while_and_its_last_word_stays() {
        let (memory, begin) = (Memory::default(), Instant::now());
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!(memory.is_due(begin));
        assert!(!memory.is_due(after(29)));
        assert_eq!(memory.told(after(29)), None);
        let stock = Stock {
            paths: 3,
            collected: Some(Collected {
                seconds_ago: 60,
                ..Collected::default()
            }),
            ..Stock::default()
        };
        memory.tell(stock, after(1));
        assert!(memory.is_due(after(30)));
        let told = memory.told(after(3601)).unwrap();
        assert_eq!((told.seconds_ago, told.stock.paths), (3600, 3));
        assert_eq!(told.stock.collected.unwrap().seconds_ago, 3660);
    }

    #[test]
    fn words_of_an_anchor_are_few_and_plain() {
        let of = |text: &str| parse(text.as_bytes());
        let long = "x".repeat(1000);
        let text = format!(
            r#"{{"public":true,"paths":1,"nar_bytes":2,"stored_bytes":3,"more":[],
                "collected":{{"seconds_ago":4,"paths":0,"refused":"\u001b[2J{long}"}}}}"#
        );
        let refused = of(&text).unwrap().collected.unwrap().refused.unwrap();
        assert_eq!(refused, format!("[2J{}", &long[..WORDS_MAX - 3]));
        for wrong in [
            "",
            "{}",
            "<html>",
            r#"{"public":1,"paths":-1,"nar_bytes":0,"stored_bytes":0}"#,
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
