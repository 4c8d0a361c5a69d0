//! Scrub: reads what is stored again, and keeps back what is not what it was.
//!
//! Disks rot, and buckets are changed behind our back. A scrub reads NARs as a client would, unpacks them
//! and compares FileHash, NarHash and both sizes with what the catalog promises. One that differs, or is
//! gone, is *damaged*: its paths are answered 404, so that clients go elsewhere and pushers push. It is put right by
//! whoever has it ([`super::heal`]), or by the next push of it. Storage that does not answer damages nothing, nor does storage that is
//! not the one the anchor began with.
//!
//! Two ways: [`Anchor::scrub`] goes through all NARs in order, a piece at a time, for `granary anchor scrub`;
//! [`keep_scrubbing`] reads, slowly and for ever, those that were not looked at for longest.
//!
//! Invariant: a NAR is marked under the lock that pushes of it take, after it was read again under it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::{Method, StatusCode, request::Parts};
use futures::StreamExt;
use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::NarInfo;
use granary_protocol::token::Permission;
use hyper::body::Incoming;
use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::catalog::{CatalogError, StoredNar, nar_row, signed, unsigned};
use super::http::{Answer, Refusal, json_body};
use super::ingest::IngestError;
use super::intake::{Encoding, Intake, IntakeError};
use super::tokens::{Bearer, Denied};
use super::{Anchor, FORMAT_KEY, nar_key, to_its_end};
use crate::serve::respond;

/// After how long a piece of a scrub ends, so that whoever asked sees that it goes on. It has one NAR at
/// least, whatever that takes.
const PIECE_TIME: Duration = Duration::from_secs(5);

/// NARs looked up at once.
const BATCH: usize = 64;

/// For each second of reading, as many of rest: the anchor has other things to do.
const REST: u32 = 4;

/// How long to wait when nothing is due, or storage fails.
const IDLE: Duration = Duration::from_secs(600);

/// After how long a NAR that could not be read is due again. The others go first, however many times it fails. One that
/// cannot be read then, of storage that answers otherwise, is damaged: servers that check what they store, as Garage
/// does, give an error in its place for ever.
const UNREAD_PAUSE: Duration = Duration::from_secs(24 * 3600);

/// Paths of a damaged NAR that are named; the others are counted.
const PATHS_SHOWN: usize = 5;

/// Largest question.
const QUESTION_BYTES_MAX: usize = 1024;

/// What a scrub found, so far or in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// NARs that were read, and their bytes in storage.
    pub nars: u64,
    pub file_bytes: u64,
    pub damaged: Vec<Damaged>,
    /// NARs that could not be read, of which nothing is known.
    pub unread: u64,
    /// After which NAR it goes on; `None` at the end.
    pub next: Option<String>,
}

/// A NAR that is not served any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    pub nar_hash: String,
    pub problem: String,
    /// `cache: base name`, at most [`PATHS_SHOWN`].
    pub paths: Vec<String>,
    /// Of how many.
    pub of: u64,
    /// It was brought again from elsewhere, and is served.
    #[serde(default)]
    pub healed: bool,
}

/// What is known of a NAR that was read.
#[derive(Debug)]
enum Verdict {
    Whole,
    /// Why not.
    Damaged(String),
}

/// Why a scrub cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ScrubError {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("cannot read what is to be scrubbed: {0}")]
    Storage(#[from] IngestError),
    #[error(
        "storage {location} has no {FORMAT_KEY}, it is not the one that the anchor began with, refusing to scrub it"
    )]
    Another { location: String },
}

impl Anchor {
    /// Reads the NARs after this one for a while; see [`Scrubbed::next`].
    pub async fn scrub(self: &Arc<Self>, after: Option<NarHash>) -> Result<Scrubbed, ScrubError> {
        let started = Instant::now();
        self.check_storage().await?;
        let mut scrubbed = Scrubbed::default();
        for nar in self.catalog.nars_after(after, BATCH).await? {
            scrubbed.next = Some(nar.nar_hash.nix32());
            self.scrub_nar(nar, &mut scrubbed).await?;
            if started.elapsed() > PIECE_TIME {
                return Ok(scrubbed);
            }
        }
        let last = scrubbed.next.as_deref().map(NarHash::from_nix32);
        if let Some(Ok(last)) = last
            && self.catalog.nars_after(Some(last), 1).await?.is_empty()
        {
            scrubbed.next = None;
        }
        Ok(scrubbed)
    }

    /// An empty folder, where a disk is not mounted, would damage everything.
    async fn check_storage(&self) -> Result<(), ScrubError> {
        match self.has_own_storage().await {
            Ok(true) => Ok(()),
            Ok(false) => Err(ScrubError::Another {
                location: self.storage.location().to_owned(),
            }),
            Err(error) => Err(ScrubError::Storage(error.into())),
        }
    }

    async fn scrub_nar(
        self: &Arc<Self>,
        nar: StoredNar,
        scrubbed: &mut Scrubbed,
    ) -> Result<(), ScrubError> {
        scrubbed.nars += 1;
        scrubbed.file_bytes += nar.file_size;
        let read = {
            let _slot = self.intakes.acquire().await;
            self.verdict(&nar).await
        };
        let mut is_lasting = false;
        let problem = match read {
            Ok(Verdict::Whole) => {
                self.catalog.scrubbed(nar, None, self.now()).await?;
                self.counts.scrubbed_nars.add(1);
                return Ok(());
            }
            Ok(Verdict::Damaged(problem)) => problem,
            Err(error) => {
                let since = self.catalog.unread(nar, self.now()).await?;
                if self.now().saturating_sub(since) < UNREAD_PAUSE.as_secs() {
                    self.unread(nar, error, scrubbed);
                    return Ok(());
                }
                is_lasting = true;
                format!("it cannot be read for a day: {error}")
            }
        };
        self.check_storage().await?;
        let anchor = self.clone();
        let marking = async move { anchor.mark(nar, problem, is_lasting).await };
        match to_its_end(marking).await {
            Ok(None) => {}
            Ok(Some(mut found)) => {
                match self.heal(nar).await {
                    Ok(healed) => found.healed = healed,
                    // It stays damaged, and is tried again.
                    Err(error) => {
                        warn!(nar_hash = %nar.nar_hash, %error, "could not store a damaged nar anew");
                    }
                }
                scrubbed.damaged.push(found);
            }
            Err(ScrubError::Storage(error)) => {
                self.catalog.unread(nar, self.now()).await?;
                self.unread(nar, error, scrubbed);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Counts a NAR of which nothing is known.
    fn unread(&self, nar: StoredNar, error: IngestError, scrubbed: &mut Scrubbed) {
        warn!(nar_hash = %nar.nar_hash, %error, "could not read a nar to scrub it");
        scrubbed.unread += 1;
        self.counts.scrub_unread.add(1);
    }

    /// Marks a NAR that was found damaged; `None` when it is not any more.
    ///
    /// # Errors
    /// [`ScrubError::Storage`] when it could not be read the second time, unless that `is_lasting`.
    async fn mark(
        self: &Arc<Self>,
        nar: StoredNar,
        problem: String,
        is_lasting: bool,
    ) -> Result<Option<Damaged>, ScrubError> {
        // A slot before the lock, as pushes take them.
        let _slot = self.intakes.acquire().await;
        let _held = self.nar_locks.lock(nar.nar_hash).await;
        // It may have been pushed, or collected, while it was read.
        if self.catalog.nar_row(nar.nar_hash).await? != Some(nar) {
            return Ok(None);
        }
        let now = self.now();
        match self.verdict(&nar).await {
            Ok(Verdict::Damaged(_)) => {}
            Err(_) if is_lasting => {}
            Err(error) => return Err(error.into()),
            Ok(Verdict::Whole) => {
                self.catalog.scrubbed(nar, None, now).await?;
                self.counts.scrubbed_nars.add(1);
                return Ok(None);
            }
        }
        self.catalog.scrubbed(nar, Some(now), now).await?;
        self.counts.scrubbed_nars.add(1);
        self.counts.scrub_damaged.add(1);
        let (paths, of) = self.catalog.paths_of(nar.nar_hash, PATHS_SHOWN).await?;
        error!(nar_hash = %nar.nar_hash, problem, paths = of, "a stored nar is damaged, it is not served until it is brought or pushed again");
        Ok(Some(Damaged {
            nar_hash: nar.nar_hash.to_string(),
            problem,
            paths,
            of,
            healed: false,
        }))
    }

    /// Reads a NAR and compares. An error says that nothing is known.
    async fn verdict(&self, nar: &StoredNar) -> Result<Verdict, IngestError> {
        let damaged = |problem: String| Ok(Verdict::Damaged(problem));
        let key = nar_key(&nar.nar_hash);
        match self.storage.size(&key).await? {
            None => return damaged("it is not in storage".to_owned()),
            Some(size) if size != nar.file_size => {
                return damaged(format!(
                    "it has {size} bytes, {} were stored",
                    nar.file_size
                ));
            }
            Some(_) => {}
        }
        let Some(file) = self.storage.read(&key, 0..nar.file_size).await? else {
            return damaged("it is not in storage".to_owned());
        };
        let (intake, outcome) = Intake::new(None, nar.nar_size)?
            .fill(file.boxed(), Encoding::Zstd)
            .await;
        let about = match outcome {
            Ok(about) => about,
            Err(
                error @ (IntakeError::Encoding { .. }
                | IntakeError::Nar(_)
                | IntakeError::TooLarge { .. }),
            ) => return damaged(error.to_string()),
            Err(error) => return Err(error.into()),
        };
        if about.hash != nar.file_hash {
            return damaged(format!(
                "its file is {}, {} was stored",
                about.hash, nar.file_hash
            ));
        }
        let Some(intake) = intake else {
            return Err(IntakeError::Stopped.into());
        };
        match tokio::task::spawn_blocking(move || intake.finish()).await {
            Ok(Ok(taken)) if (taken.nar_hash, taken.nar_size) == (nar.nar_hash, nar.nar_size) => {
                Ok(Verdict::Whole)
            }
            Ok(Ok(taken)) => damaged(format!(
                "it is {} of {} bytes, {} of {} were stored",
                taken.nar_hash, taken.nar_size, nar.nar_hash, nar.nar_size
            )),
            Ok(Err(error)) => damaged(error.to_string()),
            Err(_) => Err(IntakeError::Stopped.into()),
        }
    }

    /// Makes narinfos say what is true of a damaged NAR's new file, which another compressor may have
    /// packed. Signatures do not cover that.
    ///
    /// The caller holds the NAR's lock.
    pub(super) async fn correct_narinfos(&self, stored: &StoredNar) -> Result<(), IngestError> {
        let caches = self.catalog.caches().await?;
        for (cache, hash) in self.catalog.rows_of(stored.nar_hash).await? {
            let Some(cache) = caches.iter().find(|row| row.id == cache) else {
                continue;
            };
            let _held = self.path_locks.lock((cache.id, hash)).await;
            let dir = cache.settings.store_dir()?;
            let row = self.catalog.path_row(cache.id, hash).await?;
            let row = row.filter(|row| row.nar_hash == stored.nar_hash);
            let narinfo = row.and_then(|row| NarInfo::parse(&row.narinfo, &dir).ok());
            let Some(mut narinfo) = narinfo else {
                continue;
            };
            if narinfo.file_hash == Some(stored.file_hash) {
                continue;
            }
            narinfo.file_hash = Some(stored.file_hash);
            narinfo.file_size = Some(stored.file_size);
            let text = narinfo.to_text(&dir);
            self.catalog.begin_rewrites(cache.id, vec![hash]).await?;
            let key = cache.name.narinfo_key(&hash);
            self.storage.put(&key, text.clone().into()).await?;
            self.catalog.finish_path(cache.id, hash, text).await?;
        }
        Ok(())
    }
}

/// Reads NARs that were not looked at for `after`, one by one and with rests between them.
pub async fn keep_scrubbing(anchor: Arc<Anchor>, after: Duration, shutdown: CancellationToken) {
    loop {
        let started = Instant::now();
        let scrubbing = anchor.scrub_due(after);
        let found = tokio::select! {
            () = shutdown.cancelled() => return,
            found = scrubbing => found,
        };
        let rest = match found {
            Ok(true) => started.elapsed() * REST,
            Ok(false) => IDLE,
            Err(error) => {
                error!(storage = anchor.storage.location(), %error, "could not scrub");
                IDLE
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(rest) => {}
        }
    }
}

impl Anchor {
    /// Reads the NAR that was not looked at for longest; `false` when none is due, or it cannot be read.
    pub async fn scrub_due(self: &Arc<Self>, after: Duration) -> Result<bool, ScrubError> {
        let now = self.now();
        let before = now.saturating_sub(after.as_secs());
        let unread_before = now.saturating_sub(UNREAD_PAUSE.as_secs());
        let Some(nar) = self.catalog.due(before, unread_before).await? else {
            return Ok(false);
        };
        self.check_storage().await?;
        let mut scrubbed = Scrubbed::default();
        self.scrub_nar(nar, &mut scrubbed).await?;
        Ok(scrubbed.unread == 0)
    }
}

impl super::catalog::Catalog {
    /// Returns NARs in the order of their hashes, damaged ones as well.
    async fn nars_after(
        &self,
        after: Option<NarHash>,
        limit: usize,
    ) -> Result<Vec<StoredNar>, CatalogError> {
        self.read(move |connection| {
            let after = after.map_or(Vec::new(), |hash| hash.as_bytes().to_vec());
            connection
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars
                     WHERE nar_hash > ?1 ORDER BY nar_hash LIMIT ?2",
                )?
                .query_map(params![after, signed(limit as u64)], nar_row)?
                .collect()
        })
        .await
    }

    /// Returns the NAR that was not looked at for longest, if that is before this time, without those that
    /// could not be read since another.
    async fn due(
        &self,
        before: u64,
        unread_before: u64,
    ) -> Result<Option<StoredNar>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached(
                    "SELECT nar_hash, nar_size, file_hash, file_size FROM nars
                     WHERE scrubbed < ?1 AND (unread IS NULL OR unread < ?2)
                     ORDER BY scrubbed LIMIT 1",
                )?
                .query_row([signed(before), signed(unread_before)], nar_row)
                .optional()
        })
        .await
    }

    /// Writes down that a NAR could not be read; returns since when.
    async fn unread(&self, nar: StoredNar, now: u64) -> Result<u64, CatalogError> {
        self.write(move |transaction| {
            let since = transaction
                .prepare_cached(
                    "UPDATE nars SET unread = coalesce(unread, ?2) WHERE nar_hash = ?1 RETURNING unread",
                )?
                .query_row(params![nar.nar_hash.as_bytes(), signed(now)], |row| unsigned(row, 0))
                .optional()?;
            // Collected meanwhile.
            Ok(since.unwrap_or(now))
        })
        .await
    }

    /// Writes down what was found of a NAR, unless it was stored anew meanwhile.
    async fn scrubbed(
        &self,
        nar: StoredNar,
        damaged: Option<u64>,
        now: u64,
    ) -> Result<(), CatalogError> {
        self.write(move |transaction| {
            transaction
                .prepare_cached(
                    "UPDATE nars SET scrubbed = ?3, damaged = ?4, unread = NULL
                     WHERE nar_hash = ?1 AND file_hash = ?2",
                )?
                .execute(params![
                    nar.nar_hash.as_bytes(),
                    nar.file_hash.as_bytes(),
                    signed(now),
                    damaged.map(signed)
                ])
                .map(drop)
        })
        .await
    }

    /// Returns some of the paths that have a NAR, as text, and how many there are.
    async fn paths_of(
        &self,
        nar_hash: NarHash,
        limit: usize,
    ) -> Result<(Vec<String>, u64), CatalogError> {
        self.read(move |connection| {
            let names: Vec<String> = connection
                .prepare_cached(
                    "SELECT caches.name || ': ' || base_name FROM paths
                     JOIN caches ON caches.id = paths.cache WHERE nar_hash = ?1 AND state = 1
                     ORDER BY caches.name, base_name",
                )?
                .query_map([nar_hash.as_bytes()], |row| row.get(0))?
                .collect::<Result<_, _>>()?;
            let of = names.len() as u64;
            Ok((names.into_iter().take(limit).collect(), of))
        })
        .await
    }

    /// Returns the complete paths that have a NAR.
    pub(super) async fn rows_of(
        &self,
        nar_hash: NarHash,
    ) -> Result<Vec<super::uses::CachePath>, CatalogError> {
        self.read(move |connection| {
            connection
                .prepare_cached("SELECT cache, hash FROM paths WHERE nar_hash = ?1 AND state = 1")?
                .query_map([nar_hash.as_bytes()], |row| {
                    let hash = row.get(1)?;
                    let hash = granary_protocol::store_path::StorePathHash::from_bytes(hash);
                    Ok((row.get(0)?, hash))
                })?
                .collect()
        })
        .await
    }

    /// Returns how many NARs are damaged.
    pub(super) async fn damaged(&self) -> Result<u64, CatalogError> {
        self.read(|connection| {
            let query = "SELECT count(*) FROM nars WHERE damaged IS NOT NULL";
            connection
                .prepare_cached(query)?
                .query_row([], |row| unsigned(row, 0))
        })
        .await
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    after: Option<String>,
}

/// Goes on with a scrub: POST `{"after": hash or null}` → [`Scrubbed`]; for who may delete from every cache.
pub async fn answer(anchor: &Arc<Anchor>, parts: &Parts, body: &mut Incoming) -> Answer {
    if parts.method != Method::POST {
        let message = "this method is not answered here";
        return Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "RequestError",
            message,
        ));
    }
    match anchor.bearer(parts).await? {
        Bearer::Nobody => return Err(Denied::Unauthorized.into()),
        Bearer::Somebody(claims) if claims.allows("*", Permission::Delete) => {}
        Bearer::Somebody(claims) => {
            return Err(Refusal::from(Denied::MissingPermission {
                subject: claims.subject,
                permission: Permission::Delete,
                cache: "*".to_owned(),
            }));
        }
    }
    let Question { after } = json_body(body, QUESTION_BYTES_MAX).await?;
    let after = after.as_deref().map(NarHash::from_nix32).transpose();
    let after = after.map_err(|error| Refusal::bad_request(error.to_string()))?;
    let scrubbed = anchor.scrub(after).await;
    let scrubbed = scrubbed.map_err(|error| Refusal::ours(&error))?;
    let text = serde_json::to_string(&scrubbed).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::json(text))
}
