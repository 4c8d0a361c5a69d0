//! Orphans: objects of NARs that the catalog does not know, and whether the bucket knows better.
//!
//! A catalog may know less than lies in the bucket: one made anew without a cache whose settings are malformed,
//! one from a backup, that of a second anchor on the same bucket. So before NARs are deleted, those are spared
//! that a narinfo names of which the catalog has no row. Read are only such narinfos, of which there are none as a
//! rule; one that cannot be read may name anything, and spares all.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt, stream};
use granary_protocol::hash::NarHash;
use granary_protocol::store_path::StorePathHash;
use tracing::warn;

use super::GRACE;
use crate::anchor::catalog::{Catalog, CatalogError};
use crate::anchor::object_store::problem;
use crate::anchor::rebuild::CACHES_FOLDER;
use crate::anchor::{Anchor, NARINFO_BYTES_MAX};

/// Objects of which the catalog is asked at once, so that a large bucket is not held in memory.
const BATCH: usize = 1_000;

/// Narinfos that are read at once: enough to hide the round trips to S3.
const READS_PARALLEL: usize = 16;

/// A narinfo in the bucket, by where it lies.
struct Lying {
    key: String,
    cache: String,
    hash: StorePathHash,
}

impl Lying {
    fn at(key: String) -> Option<Lying> {
        let mut parts = key.split('/').skip(1);
        let (Some(cache), Some("narinfo"), Some(file), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let hash = file.strip_suffix(".narinfo")?.parse().ok()?;
        let cache = cache.to_owned();
        Some(Lying { key, cache, hash })
    }
}

impl Anchor {
    /// NARs in the bucket that the catalog does not know, older than [`GRACE`].
    ///
    /// A million of them take 40 MiB.
    pub(super) async fn orphans(&self, now: u64) -> Result<BTreeSet<NarHash>, super::IngestError> {
        let mut orphans = BTreeSet::new();
        let mut objects = self.storage.list("nar").try_chunks(BATCH);
        while let Some(objects) = objects.next().await {
            let objects = objects.map_err(|error| error.1)?;
            let old = objects
                .into_iter()
                .filter(|object| object.modified.saturating_add(GRACE.as_secs()) <= now)
                .filter_map(|object| {
                    let name = object.key.rsplit('/').next()?.strip_suffix(".nar.zst")?;
                    NarHash::from_nix32(name).ok()
                });
            orphans.extend(self.catalog.unknown_nars(old.collect()).await?);
        }
        Ok(orphans)
    }

    /// Takes from NARs that are to go those that a narinfo names which the catalog does not know; returns how many.
    pub(super) async fn spare_named(
        &self,
        going: &mut BTreeSet<NarHash>,
    ) -> Result<u64, super::IngestError> {
        let count = going.len();
        if count == 0 {
            return Ok(0);
        }
        let mut narinfos = 0;
        let listed = self.storage.list(CACHES_FOLDER);
        let lying = listed.try_filter_map(async |object| Ok(Lying::at(object.key)));
        let mut lying = std::pin::pin!(lying.try_chunks(BATCH));
        while !going.is_empty()
            && let Some(lying) = lying.next().await
        {
            let lying = lying.map_err(|error| error.1)?;
            let unknown = self.catalog.unknown_narinfos(lying).await?;
            let reads = unknown.into_iter().map(|narinfo| self.named_by(narinfo));
            let mut reads = stream::iter(reads).buffer_unordered(READS_PARALLEL);
            while let Some(read) = reads.next().await {
                match read {
                    Named::Nothing => {}
                    Named::Nar(nar_hash) => {
                        narinfos += 1;
                        going.remove(&nar_hash);
                    }
                    Named::Anything { key, problem } => {
                        warn!(
                            key,
                            problem,
                            nars = count,
                            "kept all nars, a narinfo that the catalog does not know cannot be read"
                        );
                        going.clear();
                        return Ok(count as u64);
                    }
                }
            }
        }
        let spared = (count - going.len()) as u64;
        if spared > 0 {
            warn!(
                nars = spared,
                narinfos,
                "kept nars that narinfos in storage name, of which the catalog does not know, granary anchor rebuild takes them up"
            );
        }
        Ok(spared)
    }

    async fn named_by(&self, narinfo: Lying) -> Named {
        let key = narinfo.key;
        match self.storage.get(&key, NARINFO_BYTES_MAX).await {
            Ok(Some(bytes)) => match nar_named(&bytes) {
                Some(nar_hash) => Named::Nar(nar_hash),
                None => Named::Anything {
                    key,
                    problem: "it has no URL of ours".to_owned(),
                },
            },
            // Removed since it was listed.
            Ok(None) => Named::Nothing,
            Err(error) => Named::Anything {
                key,
                problem: problem(&error),
            },
        }
    }
}

/// What a narinfo keeps.
enum Named {
    Nothing,
    Nar(NarHash),
    Anything { key: String, problem: String },
}

/// Returns the NAR that a narinfo of ours names, whatever the store directory is.
fn nar_named(bytes: &[u8]) -> Option<NarHash> {
    let text = std::str::from_utf8(bytes).ok()?;
    let url = text.lines().find_map(|line| line.strip_prefix("URL: "))?;
    let name = url.strip_prefix("nar/")?.strip_suffix(".nar.zst")?;
    NarHash::from_nix32(name).ok()
}

impl Catalog {
    /// Returns those of the NARs that have no row.
    async fn unknown_nars(&self, nars: Vec<NarHash>) -> Result<Vec<NarHash>, CatalogError> {
        self.read(move |connection| {
            let mut row = connection.prepare_cached("SELECT 1 FROM nars WHERE nar_hash = ?1")?;
            let mut unknown = Vec::new();
            for nar_hash in nars {
                if !row.exists([nar_hash.as_bytes()])? {
                    unknown.push(nar_hash);
                }
            }
            Ok(unknown)
        })
        .await
    }

    /// Returns those of the narinfos whose path has no row, without those of caches that are being deleted. A row keeps
    /// its NAR by itself, in whichever state.
    async fn unknown_narinfos(&self, narinfos: Vec<Lying>) -> Result<Vec<Lying>, CatalogError> {
        self.read(move |connection| {
            let mut row = connection.prepare_cached(
                "SELECT 1 FROM paths JOIN caches ON caches.id = paths.cache WHERE name = ?1 AND hash = ?2
                 UNION ALL SELECT 1 FROM deletions WHERE deletions.cache = ?1",
            )?;
            let mut unknown = Vec::new();
            for narinfo in narinfos {
                if !row.exists((&narinfo.cache, narinfo.hash.as_bytes()))? {
                    unknown.push(narinfo);
                }
            }
            Ok(unknown)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_narinfo_is_told_from_what_else_lies_in_a_cache() {
        let hash = "0".repeat(32);
        let lies = |key: &str| Lying::at(key.to_owned()).map(|lying| lying.cache);
        let key = format!("caches/main/narinfo/{hash}.narinfo");
        assert_eq!(lies(&key), Some("main".to_owned()));
        for key in [
            "caches/main/cache.json",
            "caches/main/narinfo/x.narinfo",
            "caches/main/narinfo",
            &format!("caches/main/files/ls/{hash}.ls"),
            &format!("{key}/more"),
        ] {
            assert_eq!(lies(key), None, "{key}");
        }
    }

    #[test]
    fn the_nar_of_a_narinfo_is_read_whatever_its_store_directory() {
        let nar_hash = NarHash::from_bytes([7; 32]);
        let url = crate::anchor::nar_url(&nar_hash);
        let text = format!("StorePath: /gnu/store/x\nURL: {url}\nCompression: zstd\n");
        assert_eq!(nar_named(text.as_bytes()), Some(nar_hash));
        for text in [
            "",
            "StorePath: /nix/store/x\n",
            "URL: nar/x.nar.zst\n",
            "\u{0}",
        ] {
            assert_eq!(nar_named(text.as_bytes()), None, "{text}");
        }
    }
}
