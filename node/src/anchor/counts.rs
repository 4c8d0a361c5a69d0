//! Counts: what an anchor did, cache by cache, shown by `/metrics` and the access log.
//!
//! Counters only grow and begin at 0 with each start. Their only labels are names of caches that there
//! are, and words of ours; so who asks for strange names leaves nothing here. Since private caches are
//! named, `/metrics` wants a token that allows to pull from every cache (`--cache '*' --allow pull`).
//!
//! | name, after `granary_anchor_` | labels | |
//! |---|---|---|
//! | `narinfos_total` | `cache`, `outcome`: `found`, `absent` | lookups of paths |
//! | `nars_total`, `nar_sent_bytes_total` | `cache` | NARs read, and what was sent of them, packed |
//! | `pushes_total` | `cache`, `outcome`: `stored`, `known` | paths pushed; `known` were here |
//! | `nar_stored_bytes_total` | `cache` | what pushes added to storage, packed |
//! | `requests_refused_total`, `requests_failed_total` | `cache` | requests that ended in 4xx other than 404, and those that were our fault |
//! | `requests_denied_total` | | requests without the right to what they named |
//! | `paths`, `nar_bytes`, `stored_bytes` | `cache` | what it holds; a NAR of several caches counts in each |
//! | `storage_nars`, `storage_bytes`, `damaged_nars` | | all of storage, and what of it is not served |
//! | `scrubbed_nars_total`, `scrub_damaged_total`, `scrub_unread_total`, `healed_nars_total` | | NARs that were read again, those that were damaged, readings that failed, NARs that a push put right |
//! | `collections_total`, `collected_paths_total`, `collected_nars_total`, `collected_bytes_total` | | collections of garbage; the first with `outcome`: `done`, `failed` |
//! | `collect_failures_total` | | objects that storage would not delete, each time that it was asked |

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ::http::request::Parts;
use granary_protocol::certificate::UnixTime;
use granary_protocol::token::Permission;

use super::Anchor;
use super::cache::CacheName;
use super::catalog::{CatalogError, Totals};
use super::gc::Collection;
use super::http::{Answer, Refusal};
use super::page::Collected;
use super::tokens::{Bearer, Denied};
use crate::binary_cache;
use crate::metrics::{Counter, Exposition};
use crate::serve::respond;

/// For how long sizes are told again before the catalog is asked: adding up a million paths takes it a
/// second, and several may watch.
const TOTALS_INTERVAL: Duration = Duration::from_secs(30);

/// What was done for one cache.
#[derive(Debug, Default)]
pub struct CacheCounts {
    pub narinfos_found: Counter,
    pub narinfos_absent: Counter,
    pub nars: Counter,
    pub nar_sent_bytes: Counter,
    pub pushes_stored: Counter,
    pub pushes_known: Counter,
    pub nar_stored_bytes: Counter,
    pub requests_refused: Counter,
    pub requests_failed: Counter,
}

/// Everything that is counted.
#[derive(Default)]
pub struct Counts {
    caches: Mutex<BTreeMap<CacheName, Arc<CacheCounts>>>,
    pub requests_denied: Counter,
    collections: Counter,
    collections_failed: Counter,
    collected_paths: Counter,
    collected_nars: Counter,
    collected_bytes: Counter,
    collect_failures: Counter,
    /// When the last one was, and what came of it.
    last_collection: Mutex<Option<LastCollection>>,
    pub scrubbed_nars: Counter,
    pub scrub_damaged: Counter,
    pub scrub_unread: Counter,
    pub healed_nars: Counter,
    sizes: tokio::sync::Mutex<Option<(Instant, Sizes)>>,
}

struct LastCollection {
    at: Instant,
    whole: Collected,
    /// Of caches of which something was to go, by name: how much, and why it stays.
    caches: BTreeMap<String, (u64, Option<String>)>,
    has_failed: bool,
}

/// What there is: of each cache, and of all.
#[derive(Clone, Default)]
pub(super) struct Sizes {
    pub caches: BTreeMap<CacheName, Totals>,
    pub storage_nars: u64,
    pub storage_bytes: u64,
    pub damaged_nars: u64,
}

/// What is learned about a request on the way to its answer, for the log; among its extensions.
#[derive(Clone, Default)]
pub struct Noted(Arc<Facts>);

#[derive(Default)]
struct Facts {
    subject: OnceLock<String>,
    cache: OnceLock<(CacheName, Arc<CacheCounts>)>,
}

impl Noted {
    fn of(parts: &Parts) -> Option<&Noted> {
        parts.extensions.get()
    }

    /// Who asked, by the name in the token.
    pub fn subject(&self) -> Option<&str> {
        self.0.subject.get().map(String::as_str)
    }

    /// The cache that was asked, if the asker may know it.
    pub fn cache(&self) -> Option<&CacheCounts> {
        self.0.cache.get().map(|(_, counts)| counts.as_ref())
    }

    /// Its name.
    pub fn cache_name(&self) -> Option<&CacheName> {
        self.0.cache.get().map(|(name, _)| name)
    }
}

impl Counts {
    /// The counts of a cache that there is.
    pub fn of(&self, cache: &CacheName) -> Arc<CacheCounts> {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        match caches.get(cache) {
            Some(counts) => counts.clone(),
            None => caches.entry(cache.clone()).or_default().clone(),
        }
    }

    pub fn forget(&self, cache: &CacheName) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.remove(cache);
    }

    /// What came of a collection.
    pub fn collected<E: std::fmt::Display>(&self, outcome: &Result<Collection, E>) {
        let mut caches = BTreeMap::new();
        let whole = match outcome {
            Ok(done) => {
                for one in &done.caches {
                    let gone = match one.refused {
                        None => one.paths.len() as u64,
                        Some(_) => 0,
                    };
                    caches.insert(one.cache.clone(), (gone, one.refused.clone()));
                }
                let paths: usize = done.caches.iter().map(|expired| expired.paths.len()).sum();
                let paths = paths as u64;
                self.collections.add(1);
                self.collected_paths.add(paths);
                self.collected_nars.add(done.nars);
                self.collected_bytes.add(done.nar_file_bytes);
                self.collect_failures.add(done.failed);
                let refused = done.caches.iter().filter_map(|one| one.refused.clone());
                Collected {
                    paths,
                    nars: done.nars,
                    file_bytes: done.nar_file_bytes,
                    waiting: done.waiting,
                    refused: refused.collect(),
                    ..Collected::default()
                }
            }
            Err(error) => {
                self.collections_failed.add(1);
                Collected {
                    refused: vec![error.to_string()],
                    ..Collected::default()
                }
            }
        };
        let mut known = self
            .last_collection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known = Some(LastCollection {
            at: Instant::now(),
            whole,
            caches,
            has_failed: outcome.is_err(),
        });
    }

    /// What the last collection since the start did to one cache, for who may know of no other.
    pub fn last_collection_of(&self, cache: &CacheName) -> Option<binary_cache::Collected> {
        let known = self
            .last_collection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let last = known.as_ref()?;
        let (paths, refused) = match (last.caches.get(cache.as_str()), last.has_failed) {
            (Some((paths, refused)), _) => (*paths, refused.clone()),
            (None, false) => (0, None),
            // What stood in the way may name any cache.
            (None, true) => (0, Some("it failed, the anchor's log says why".to_owned())),
        };
        Some(binary_cache::Collected {
            seconds_ago: last.at.elapsed().as_secs(),
            paths,
            refused,
        })
    }

    /// The last collection since the start.
    pub fn last_collection(&self) -> Option<Collected> {
        let known = self
            .last_collection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let last = known.as_ref()?;
        Some(Collected {
            seconds_ago: last.at.elapsed().as_secs(),
            ..last.whole.clone()
        })
    }

    fn exposition(&self, sizes: &Sizes) -> String {
        let mut out = Exposition::default();
        let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
        out.family("granary_build_info", "gauge", "The version that runs.");
        out.sample("granary_build_info", &version, 1);
        let named = |cache: &CacheName| (cache.clone(), self.of(cache));
        let caches: Vec<_> = sizes.caches.keys().map(named).collect();
        // Name, help, and each counter after its further labels.
        type Read = fn(&CacheCounts) -> &Counter;
        type Family<'a> = (&'a str, &'a str, &'a [(&'a str, Read)]);
        let families: [Family<'_>; 7] = [
            (
                "narinfos_total",
                "Lookups of paths.",
                &[
                    (",outcome=\"found\"", |counts| &counts.narinfos_found),
                    (",outcome=\"absent\"", |counts| &counts.narinfos_absent),
                ],
            ),
            ("nars_total", "NARs read.", &[("", |counts| &counts.nars)]),
            (
                "nar_sent_bytes_total",
                "What was sent of NARs, packed.",
                &[("", |counts| &counts.nar_sent_bytes)],
            ),
            (
                "pushes_total",
                "Paths pushed; known ones were here.",
                &[
                    (",outcome=\"stored\"", |counts| &counts.pushes_stored),
                    (",outcome=\"known\"", |counts| &counts.pushes_known),
                ],
            ),
            (
                "nar_stored_bytes_total",
                "What pushes added to storage, packed.",
                &[("", |counts| &counts.nar_stored_bytes)],
            ),
            (
                "requests_refused_total",
                "Requests that ended in 4xx other than 404.",
                &[("", |counts| &counts.requests_refused)],
            ),
            (
                "requests_failed_total",
                "Requests that failed by our fault.",
                &[("", |counts| &counts.requests_failed)],
            ),
        ];
        for (name, help, counters) in families {
            let name = format!("granary_anchor_{name}");
            out.family(&name, "counter", help);
            for (cache, counts) in &caches {
                for (more, counter) in counters {
                    let labels = format!("cache=\"{cache}\"{more}");
                    out.sample(&name, &labels, counter(counts).get());
                }
            }
        }
        type Gauge<'a> = (&'a str, &'a str, fn(&Totals) -> u64);
        let gauges: [Gauge<'_>; 3] = [
            ("paths", "Paths that a cache holds.", |totals| totals.paths),
            ("nar_bytes", "Their NARs, unpacked.", |totals| {
                totals.nar_bytes
            }),
            ("stored_bytes", "Their NARs in storage.", |totals| {
                totals.file_bytes
            }),
        ];
        for (name, help, value) in gauges {
            let name = format!("granary_anchor_{name}");
            out.family(&name, "gauge", help);
            for (cache, totals) in &sizes.caches {
                out.sample(&name, &format!("cache=\"{cache}\""), value(totals));
            }
        }
        let name = "granary_anchor_collections_total";
        out.family(name, "counter", "Collections of garbage.");
        out.sample(name, "outcome=\"done\"", self.collections.get());
        out.sample(name, "outcome=\"failed\"", self.collections_failed.get());
        for (name, kind, help, value) in [
            (
                "requests_denied_total",
                "counter",
                "Requests without the right to what they named.",
                self.requests_denied.get(),
            ),
            (
                "collected_paths_total",
                "counter",
                "Paths that collections took out of caches.",
                self.collected_paths.get(),
            ),
            (
                "collected_nars_total",
                "counter",
                "NARs that collections deleted.",
                self.collected_nars.get(),
            ),
            (
                "collected_bytes_total",
                "counter",
                "Their bytes in storage.",
                self.collected_bytes.get(),
            ),
            (
                "collect_failures_total",
                "counter",
                "Objects that storage would not delete for a collection, each time that it was asked.",
                self.collect_failures.get(),
            ),
            (
                "scrubbed_nars_total",
                "counter",
                "Stored NARs that were read again and compared.",
                self.scrubbed_nars.get(),
            ),
            (
                "scrub_damaged_total",
                "counter",
                "Those that were found damaged.",
                self.scrub_damaged.get(),
            ),
            (
                "scrub_unread_total",
                "counter",
                "Readings that failed, so that nothing is known.",
                self.scrub_unread.get(),
            ),
            (
                "healed_nars_total",
                "counter",
                "Damaged NARs that a push has put right.",
                self.healed_nars.get(),
            ),
            (
                "damaged_nars",
                "gauge",
                "NARs that are not served until they are pushed again.",
                sizes.damaged_nars,
            ),
            (
                "storage_nars",
                "gauge",
                "NARs in storage.",
                sizes.storage_nars,
            ),
            (
                "storage_bytes",
                "gauge",
                "Their bytes.",
                sizes.storage_bytes,
            ),
        ] {
            let name = format!("granary_anchor_{name}");
            out.family(&name, kind, help);
            out.sample(&name, "", value);
        }
        out.into_text()
    }
}

impl Anchor {
    /// Reads who asks, and notes it.
    ///
    /// # Errors
    /// For a token that does not count.
    pub(super) async fn bearer(&self, parts: &Parts) -> Result<Bearer, Denied> {
        let now = UnixTime(self.now());
        let bearer = self.tokens.bearer(&parts.headers, now).await?;
        if let (Some(Noted(facts)), Bearer::Somebody(claims)) = (Noted::of(parts), &bearer) {
            // A request may be looked at twice, and has one token.
            let _ = facts.subject.set(claims.subject.clone());
        }
        Ok(bearer)
    }

    /// Notes which cache a request is about; only one that the asker may know.
    pub(super) fn note_cache(&self, parts: &Parts, cache: &CacheName) {
        if let Some(Noted(facts)) = Noted::of(parts) {
            let _ = facts.cache.set((cache.clone(), self.counts.of(cache)));
        }
    }

    pub(super) async fn sizes(&self) -> Result<Sizes, CatalogError> {
        let mut known = self.counts.sizes.lock().await;
        if let Some((at, sizes)) = known.as_ref()
            && at.elapsed() < TOTALS_INTERVAL
        {
            return Ok(sizes.clone());
        }
        let mut sizes = Sizes::default();
        for cache in self.catalog.caches().await? {
            let totals = self.catalog.totals(Some(cache.id)).await?;
            sizes.caches.insert(cache.name, totals);
        }
        (sizes.storage_nars, sizes.storage_bytes) = self.catalog.stored().await?;
        sizes.damaged_nars = self.catalog.damaged().await?;
        *known = Some((Instant::now(), sizes.clone()));
        Ok(sizes)
    }
}

/// Answers `/metrics`.
pub async fn answer(anchor: &Anchor, parts: &Parts) -> Answer {
    match anchor.bearer(parts).await? {
        Bearer::Nobody => return Err(Denied::Unauthorized.into()),
        Bearer::Somebody(claims) if claims.allows("*", Permission::Pull) => {}
        Bearer::Somebody(claims) => {
            return Err(Refusal::from(Denied::MissingPermission {
                subject: claims.subject,
                permission: Permission::Pull,
                cache: "*".to_owned(),
            }));
        }
    }
    let sizes = anchor.sizes().await?;
    Ok(respond::metrics(anchor.counts.exposition(&sizes)))
}
