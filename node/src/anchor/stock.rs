//! Stock: what one cache holds and keeps, told to who may pull from it (`GET /api/v1/caches/<cache>`).
//!
//! Nodes ask it, with the token that they have for the cache, to show it to the users of their machine. So it says
//! nothing that is not of this cache alone; what is of all caches stands on the anchor's page, for tokens that may
//! pull from all.

use std::sync::Arc;

use ::http::request::Parts;
use granary_protocol::token::Permission;

use super::Anchor;
use super::cache::CacheName;
use super::http::{Answer, Refusal};
use crate::binary_cache::Stock;
use crate::serve::respond;

pub async fn answer(anchor: &Arc<Anchor>, parts: &Parts, name: &str) -> Answer {
    let name = CacheName::new(name)?;
    let (cache, _) = anchor.cache_for(parts, &name, Permission::Pull).await?;
    let sizes = anchor.sizes().await?;
    // One that was made since they were counted has next to nothing.
    let totals = sizes.caches.get(&name).cloned().unwrap_or_default();
    let arriving = anchor.uploads.views();
    let settings = cache.settings;
    let stock = Stock {
        public: settings.public,
        paths: totals.paths,
        nar_bytes: totals.nar_bytes,
        stored_bytes: totals.file_bytes,
        size_cap: settings.size_cap,
        quota: settings.quota,
        retention: settings.retention,
        collected: anchor.counts.last_collection_of(&name),
        arriving: arriving.iter().filter(|(id, _)| *id == cache.id).count() as u64,
    };
    let text = serde_json::to_string(&stock).map_err(|error| Refusal::ours(&error))?;
    Ok(respond::json(text))
}
