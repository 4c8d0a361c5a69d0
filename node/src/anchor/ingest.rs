//! Ingest: from a proved NAR and what is claimed about it to a path that is served.
//!
//! ```text
//! check → store the nar → write the path down → sign → store the narinfo → mark it ready → answer
//! ```
//!
//! A crash anywhere leaves at most an object that nothing names, or a row that is not ready;
//! [`Anchor::recover`] finishes or forgets the latter at the next start. Pushes of one NAR that meet
//! wait for each other, so it is stored once; who comes second has proved possession by sending it.
//!
//! Signatures that came along are kept if a key we know made them, and dropped otherwise. Ours is
//! given only to what was hashed here.

use std::collections::BTreeSet;
use std::sync::Arc;

use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::{Compression, NarInfo};
use granary_protocol::signature::{SecretKey, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use tracing::{info, warn};

use super::cache::{CacheName, KeysError, SettingsError};
use super::catalog::{Begun, CacheRow, CatalogError, NewPath, PathRow, PathState, StoredNar};
use super::gc::Failures;
use super::intake::Taken;
use super::object_store::{StorageError, problem};
use super::sizes::Filling;
use super::{Anchor, NARINFO_BYTES_MAX, nar_key, nar_url, to_its_end};
use crate::anchor::intake::IntakeError;
use crate::page::counted;

/// References that an error names; the others are counted.
const MISSING_SHOWN: usize = 5;

/// What a push came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The NAR was new.
    Stored { file_size: u64 },
    /// Its NAR, or the whole path, was here already.
    Known,
}

/// Why a path is not taken in.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    #[error(transparent)]
    Intake(#[from] IntakeError),
    #[error("nar of {path} is {found}, {promised} was promised")]
    NarHash {
        path: StorePath,
        found: NarHash,
        promised: NarHash,
    },
    #[error("nar of {path} has {found} bytes, {promised} were promised")]
    NarSize {
        path: StorePath,
        found: u64,
        promised: u64,
    },
    #[error("{path} has a false content address: {source}")]
    ContentAddress {
        path: StorePath,
        source: Box<granary_protocol::narinfo::FalseContentAddress>,
    },
    #[error(
        "{path} references {} that cache {cache} does not hold, push what it needs first: {}",
        counted(*.count as u64, "path"),
        list(.missing)
    )]
    MissingReferences {
        path: StorePath,
        cache: CacheName,
        count: usize,
        missing: Vec<StorePath>,
    },
    #[error(
        "cache {cache} holds {held} bytes of the {quota} that it may: remove paths, or ask who runs the anchor for a larger quota"
    )]
    Quota {
        cache: CacheName,
        held: u64,
        quota: u64,
    },
    #[error(
        "cache {cache} holds {held} bytes that {subject:?} pushed, of the {quota} that each may: remove paths, or ask who runs the anchor for a larger quota"
    )]
    SubjectQuota {
        cache: CacheName,
        subject: String,
        held: u64,
        quota: u64,
    },
    #[error("the nar of {path} is not here, send it before its narinfo")]
    NoNar { path: StorePath },
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl IngestError {
    /// Whether the same push may succeed another time.
    pub fn is_ours(&self) -> bool {
        match self {
            IngestError::Intake(error) => error.is_ours(),
            IngestError::Keys(_)
            | IngestError::Settings(_)
            | IngestError::Storage(_)
            | IngestError::Catalog(_) => true,
            IngestError::NarHash { .. }
            | IngestError::NarSize { .. }
            | IngestError::ContentAddress { .. }
            | IngestError::MissingReferences { .. }
            | IngestError::Quota { .. }
            | IngestError::SubjectQuota { .. }
            | IngestError::NoNar { .. } => false,
        }
    }
}

fn list(paths: &[StorePath]) -> String {
    let names: Vec<_> = paths.iter().map(StorePath::base_name).collect();
    names.join(", ")
}

impl Anchor {
    /// Stores a NAR that came in whole, unless it is stored already.
    ///
    /// The caller holds the NAR's lock.
    async fn store_nar(
        &self,
        cache: &CacheRow,
        taken: &Taken,
    ) -> Result<(StoredNar, Outcome), IngestError> {
        if let Some(stored) = self.catalog.nar(taken.nar_hash).await? {
            return Ok((stored, Outcome::Known));
        }
        let Some((packed, path)) = &taken.packed else {
            // It was stored when the intake began, and has been collected since.
            return Err(IngestError::Intake(IntakeError::Stopped));
        };
        let key = nar_key(&taken.nar_hash);
        self.storage.put_file(&key, path).await?;
        let stored = StoredNar {
            nar_hash: taken.nar_hash,
            nar_size: taken.nar_size,
            file_hash: packed.file_hash,
            file_size: packed.file_size,
        };
        let file_size = packed.file_size;
        let counts = self.counts.of(&cache.name);
        counts.nar_stored_bytes.add(file_size);
        Ok((stored, Outcome::Stored { file_size }))
    }

    /// Stores a NAR that came in whole and writes it down, under the name that it came by; one that was
    /// damaged is put right.
    ///
    /// The caller holds the NAR's lock.
    pub(super) async fn take_nar(
        &self,
        cache: &CacheRow,
        taken: &Taken,
        name: Option<String>,
    ) -> Result<(StoredNar, Outcome), IngestError> {
        let row = self.catalog.nar_row(taken.nar_hash).await?;
        let (stored, outcome) = self.store_nar(cache, taken).await?;
        let damaged = row.filter(|_| outcome != Outcome::Known);
        if damaged.is_some() {
            // Before anybody is shown it again.
            self.correct_narinfos(&stored).await?;
        }
        let came = name.map(|name| (cache.id, name));
        // So that the collector sees it from now on, whatever happens next.
        self.catalog.received(stored, came, self.now()).await?;
        if damaged.is_some() {
            info!(nar_hash = %stored.nar_hash, "a damaged nar was put right");
            self.counts.healed_nars.add(1);
        }
        Ok((stored, outcome))
    }

    /// Keeps a NAR that will be described later, as `nix copy` does it, under the name it was given.
    pub async fn keep_nar(
        self: &Arc<Self>,
        cache: &CacheRow,
        taken: Taken,
        name: String,
    ) -> Result<Outcome, IngestError> {
        let (anchor, cache) = (self.clone(), cache.clone());
        to_its_end(async move {
            let _held = anchor.nar_locks.lock(taken.nar_hash).await;
            let (_, outcome) = anchor.take_nar(&cache, &taken, Some(name)).await?;
            Ok(outcome)
        })
        .await
    }

    /// Publishes a path whose NAR has come in with it, by a token of this subject. Its file is there for as long as
    /// this runs.
    pub async fn publish(
        self: &Arc<Self>,
        cache: &CacheRow,
        narinfo: NarInfo,
        taken: Arc<Taken>,
        subject: Option<String>,
    ) -> Result<Outcome, IngestError> {
        if taken.nar_hash != narinfo.nar_hash {
            return Err(IngestError::NarHash {
                path: narinfo.store_path,
                found: taken.nar_hash,
                promised: narinfo.nar_hash,
            });
        }
        let (anchor, cache) = (self.clone(), cache.clone());
        to_its_end(async move {
            let _held = anchor.nar_locks.lock(narinfo.nar_hash).await;
            let (stored, outcome) = anchor.take_nar(&cache, &taken, None).await?;
            anchor
                .describe_held(&cache, narinfo, stored, subject)
                .await?;
            Ok(outcome)
        })
        .await
    }

    /// Publishes a path whose NAR is stored, or adds signatures to one that is published.
    pub async fn describe(
        self: &Arc<Self>,
        cache: &CacheRow,
        narinfo: NarInfo,
        stored: StoredNar,
        subject: Option<String>,
    ) -> Result<(), IngestError> {
        let (anchor, cache) = (self.clone(), cache.clone());
        to_its_end(async move {
            let _held = anchor.nar_locks.lock(narinfo.nar_hash).await;
            // It may have been collected while we waited, or packed anew.
            let Some(stored) = anchor.catalog.nar(stored.nar_hash).await? else {
                return Err(IngestError::NoNar {
                    path: narinfo.store_path,
                });
            };
            anchor.describe_held(&cache, narinfo, stored, subject).await
        })
        .await
    }

    /// The caller holds the NAR's lock.
    async fn describe_held(
        &self,
        cache: &CacheRow,
        mut narinfo: NarInfo,
        stored: StoredNar,
        subject: Option<String>,
    ) -> Result<(), IngestError> {
        let dir = cache.settings.store_dir()?;
        if stored.nar_size != narinfo.nar_size {
            return Err(IngestError::NarSize {
                path: narinfo.store_path,
                found: stored.nar_size,
                promised: narinfo.nar_size,
            });
        }
        self.check_claims(cache, &narinfo).await?;
        let hash = narinfo.store_path.hash();
        let _held = self.path_locks.lock((cache.id, hash)).await;
        // Whoever pushes what is here relies on it from now on. What is on its way out is pushed anew.
        let previous = match self.note_use(cache.id, hash) {
            true => self.catalog.path(cache.id, hash).await?,
            false => None,
        };
        let counts = self.counts.of(&cache.name);
        if previous.is_some() {
            counts.pushes_known.add(1);
        }
        let is_new = previous.is_none();
        if let Some(previous) = &previous {
            let previous = NarInfo::parse(&previous.narinfo, &dir).ok();
            match previous {
                // Two builds of one path that differ: clients have been told of the first.
                Some(previous) if previous.nar_hash != narinfo.nar_hash => return Ok(()),
                Some(previous) => {
                    self.keep_description(&mut narinfo, &previous, &dir);
                    for signature in previous.signatures {
                        if !narinfo.signatures.contains(&signature) {
                            narinfo.signatures.push(signature);
                        }
                    }
                }
                None => {}
            }
        }
        let _signing = self.signing.read().await;
        let keys = self.signing_keys(&cache.name).await?;
        finish(&mut narinfo, &stored, &keys, &self.trust, &dir);
        let text = narinfo.to_text(&dir);
        if previous
            .as_ref()
            .is_some_and(|previous| previous.narinfo == text)
        {
            return Ok(());
        }
        let filling = match is_new {
            true => {
                let (nar_hash, file_size) = (stored.nar_hash, stored.file_size);
                self.check_quota(cache, subject.as_deref(), nar_hash, file_size)
                    .await?
            }
            false => Filling::default(),
        };
        let references = narinfo.references.iter().map(StorePath::hash);
        let new = NewPath {
            cache: cache.id,
            path: PathRow {
                hash,
                base_name: narinfo.store_path.base_name(),
                nar_hash: narinfo.nar_hash,
                narinfo: text.clone(),
            },
            references: references.filter(|reference| *reference != hash).collect(),
            nar: stored,
            is_complete: !cache.settings.is_incomplete(),
            subject: subject.clone(),
            now: self.now(),
        };
        match self.catalog.begin_path(new).await? {
            Begun::Written => {}
            // As above, where it was damaged a moment ago.
            Begun::AnotherBuild => return Ok(()),
            Begun::NoReference => {
                // It was collected since it was looked for.
                self.check_references(cache, &narinfo).await?;
                return Err(IngestError::NoNar {
                    path: narinfo.store_path,
                });
            }
        }
        let key = cache.name.narinfo_key(&hash);
        self.storage.put(&key, text.clone().into()).await?;
        self.catalog.finish_path(cache.id, hash, text).await?;
        if is_new {
            counts.pushes_stored.add(1);
            self.filled(cache, subject.as_deref(), filling);
        }
        Ok(())
    }

    /// Gives a narinfo the references of the one before it, unless only its own are signed by an upstream.
    ///
    /// Signatures hold for the references that they were made over: whoever pushes a path again with others would
    /// undo them.
    fn keep_description(&self, narinfo: &mut NarInfo, previous: &NarInfo, dir: &StoreDir) {
        let fingerprint = narinfo.fingerprint(dir);
        if fingerprint == previous.fingerprint(dir) {
            return;
        }
        let is_signed = |narinfo: &NarInfo| {
            let fingerprint = narinfo.fingerprint(dir);
            let signatures = &narinfo.signatures;
            self.trust
                .verify(fingerprint.as_bytes(), signatures)
                .is_some()
        };
        if is_signed(previous) || !is_signed(narinfo) {
            narinfo.references = previous.references.clone();
            narinfo.deriver = previous.deriver.clone();
            narinfo.ca = previous.ca;
        }
    }

    /// Checks what is claimed about a path, apart from its NAR.
    pub(super) async fn check_claims(
        &self,
        cache: &CacheRow,
        narinfo: &NarInfo,
    ) -> Result<(), IngestError> {
        let dir = cache.settings.store_dir()?;
        if narinfo.ca.is_some()
            && let Err(source) = narinfo.verify_content_address(&dir)
        {
            return Err(IngestError::ContentAddress {
                path: narinfo.store_path.clone(),
                source: Box::new(source),
            });
        }
        self.check_references(cache, narinfo).await
    }

    /// Every reference must be here, unless the cache leaves some to an upstream.
    async fn check_references(
        &self,
        cache: &CacheRow,
        narinfo: &NarInfo,
    ) -> Result<(), IngestError> {
        if cache.settings.is_incomplete() {
            return Ok(());
        }
        let own = narinfo.store_path.hash();
        let references = narinfo.references.iter().map(StorePath::hash);
        let references: Vec<StorePathHash> = references.filter(|hash| *hash != own).collect();
        let missing = self.catalog.missing(cache.id, references).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let named = |path: &&StorePath| missing.contains(&path.hash());
        Err(IngestError::MissingReferences {
            path: narinfo.store_path.clone(),
            cache: cache.name.clone(),
            count: missing.len(),
            missing: narinfo
                .references
                .iter()
                .filter(named)
                .take(MISSING_SHOWN)
                .cloned()
                .collect(),
        })
    }

    /// Tells which paths are not here. Those that are count as used: whoever asks will not push them, and
    /// relies on them.
    pub(super) async fn missing(
        &self,
        cache: i64,
        hashes: Vec<StorePathHash>,
    ) -> Result<Vec<StorePathHash>, CatalogError> {
        let mut missing = self.catalog.missing(cache, hashes.clone()).await?;
        let absent: BTreeSet<StorePathHash> = missing.iter().copied().collect();
        let mut relied_on = Vec::new();
        for hash in hashes.into_iter().filter(|hash| !absent.contains(hash)) {
            match self.note_use(cache, hash) {
                true => relied_on.push(hash),
                false => missing.push(hash),
            }
        }
        // What went before it was noted is missing after all.
        missing.extend(self.catalog.missing(cache, relied_on).await?);
        Ok(missing)
    }

    /// The keys that sign for a cache.
    pub(super) async fn signing_keys(
        &self,
        cache: &CacheName,
    ) -> Result<Vec<SecretKey>, KeysError> {
        let (keys, name) = (self.keys.clone(), cache.clone());
        let path = std::path::PathBuf::from(cache.as_str());
        let loaded = tokio::task::spawn_blocking(move || keys.load(&name)).await;
        loaded.unwrap_or_else(|source| {
            Err(KeysError::Io {
                action: "read",
                path,
                source: std::io::Error::other(source),
            })
        })
    }

    /// Finishes what a crash or a failure of storage left half done: what is in the bucket is served, what
    /// is not is forgotten. Safe beside pushes.
    ///
    /// Storage that fails is no error: what is half done is not shown, and waits for the next collection.
    pub async fn recover(self: &Arc<Self>) -> Result<(), IngestError> {
        match self.recover_sparing(&mut Failures::default()).await {
            Err(IngestError::Storage(error)) => {
                let problem = problem(&error);
                warn!(problem, "could not finish what the last run left");
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// The same as a part of a run that goes on with what does not fail.
    pub(super) async fn recover_sparing(
        self: &Arc<Self>,
        failures: &mut Failures,
    ) -> Result<(), IngestError> {
        let mut halves = self.catalog.in_state(PathState::Storing).await?;
        halves.extend(self.catalog.in_state(PathState::Leaving).await?);
        for (cache, name, path) in halves {
            let anchor = self.clone();
            let recovering = async move { anchor.recover_path(cache, &name, path).await };
            failures.spare(to_its_end(recovering)).await?;
        }
        for (cache, name, hash) in self.catalog.rewrites().await? {
            let anchor = self.clone();
            let recovering = async move { anchor.recover_rewrite(cache, &name, hash).await };
            failures.spare(to_its_end(recovering)).await?;
        }
        Ok(())
    }

    /// Takes the narinfo that lies in the bucket for the one that holds.
    async fn recover_rewrite(
        &self,
        cache: i64,
        name: &CacheName,
        hash: StorePathHash,
    ) -> Result<(), IngestError> {
        let _held = self.path_locks.lock((cache, hash)).await;
        let is_ready = self.catalog.state(cache, hash).await? == Some(PathState::Ready);
        let stored = self
            .storage
            .get(&name.narinfo_key(&hash), NARINFO_BYTES_MAX)
            .await?;
        let text = stored.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
        match text.filter(|_| is_ready) {
            Some(text) => self.catalog.finish_path(cache, hash, text).await?,
            None => self.catalog.forget_rewrite(cache, hash).await?,
        }
        Ok(())
    }

    async fn recover_path(
        &self,
        cache: i64,
        name: &CacheName,
        PathRow { hash, narinfo, .. }: PathRow,
    ) -> Result<(), IngestError> {
        let _held = self.path_locks.lock((cache, hash)).await;
        let key = name.narinfo_key(&hash);
        match self.catalog.state(cache, hash).await? {
            // Somebody was at work on it.
            None | Some(PathState::Ready) => {}
            Some(PathState::Storing) => {
                let stored = self.storage.get(&key, NARINFO_BYTES_MAX).await?;
                let stored = stored.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
                // What lies there may be the narinfo of another build, which this one was to replace.
                match stored.filter(|text| *text == narinfo) {
                    Some(text) => {
                        info!(cache = %name, %hash, "took up a push that was interrupted");
                        self.catalog.finish_path(cache, hash, text).await?;
                    }
                    None => {
                        warn!(cache = %name, %hash, "forgot a push that was interrupted");
                        self.storage.delete(&key).await?;
                        self.catalog.forget_path(cache, hash).await?;
                    }
                }
            }
            Some(PathState::Leaving) => {
                self.delete_objects(name, &hash).await?;
                self.catalog.forget_path(cache, hash).await?;
            }
        }
        Ok(())
    }

    /// Removes a path from a cache: from the answers at once, then from the bucket.
    ///
    /// Its NAR stays until the collector finds that nothing names it. `false` when it is not there.
    pub async fn remove_path(
        self: &Arc<Self>,
        cache: &CacheRow,
        hash: StorePathHash,
    ) -> Result<bool, IngestError> {
        self.remove(cache, hash, None).await
    }
}

/// Writes into a narinfo what is true of the copy here, and signs it.
pub(super) fn finish(
    narinfo: &mut NarInfo,
    stored: &StoredNar,
    keys: &[SecretKey],
    trust: &TrustedKeys,
    dir: &StoreDir,
) {
    narinfo.url = nar_url(&stored.nar_hash);
    narinfo.compression = Compression::Zstd;
    narinfo.file_hash = Some(stored.file_hash);
    narinfo.file_size = Some(stored.file_size);
    let mut known = trust.clone();
    known.extend(keys.iter().map(SecretKey::public_key));
    let fingerprint = narinfo.fingerprint(dir);
    // A signature that nobody here can check would be our word for a stranger's.
    narinfo
        .signatures
        .retain(|signature| known.verify(fingerprint.as_bytes(), [signature]).is_some());
    for key in keys {
        narinfo.sign(key, dir);
    }
}
