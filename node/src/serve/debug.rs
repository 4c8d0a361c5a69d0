//! Debug information: `/debuginfo/<build id>`, which names a NAR and the file in it.
//!
//! What `nix copy` writes with `index-debug-info=true`, and `dwarffs` reads.

use http::Response;
use serde_json::json;

use super::respond::{self, Body};
use crate::store::debug::{BuildId, DebugInfo};
use crate::store::{LocalStore, StoreError};

/// Answers with the place of a build id's debug information, or 404.
pub async fn answer(
    store: &dyn LocalStore,
    debug_info: &DebugInfo,
    id: &BuildId,
) -> Result<Response<Body>, StoreError> {
    for hash in debug_info.find(id).await? {
        // What is on the disk may be valid no longer.
        let Some(info) = store.path_info(hash).await? else {
            continue;
        };
        let value = json!({
            "archive": format!("../{}", info.to_narinfo().url),
            "member": id.member(),
        });
        return Ok(respond::json(value.to_string()));
    }
    Ok(respond::not_found(false))
}
