//! The build trace as its two generations of clients read it.
//!
//! Nix 2.4 to 2.34 and Lix ask for `/realisations/<id>.doi` and read one flat object; Nix 2.35 asks for
//! `/build-trace-v2/<derivation>/<output>.doi` and reads the value alone, with structured signatures.

use granary_protocol::store_path::StorePath;
use http::Response;
use serde_json::{Map, Value, json};

use super::narinfo::signature;
use super::respond::{self, Body};
use crate::store::trace::{OutputName, RealisationId};
use crate::store::{Database, StoreError};

/// Answers Nix 2.4 to 2.34, or 404.
pub async fn realisation(
    database: &Database,
    id: RealisationId,
) -> Result<Response<Body>, StoreError> {
    let Some(realisation) = database.realisation(id.clone()).await? else {
        return Ok(respond::not_found(false));
    };
    let dependent: Map<String, Value> = realisation
        .dependent
        .into_iter()
        .map(|(id, path)| (id, path.base_name().into()))
        .collect();
    let signatures = realisation.signatures.iter().map(ToString::to_string);
    let value = json!({
        "id": id.to_string(),
        "outPath": realisation.output.base_name(),
        "signatures": signatures.collect::<Vec<_>>(),
        "dependentRealisations": dependent,
    });
    Ok(respond::json(value.to_string()))
}

/// Answers Nix 2.35, or 404.
pub async fn entry(
    database: &Database,
    derivation: StorePath,
    output: OutputName,
) -> Result<Response<Body>, StoreError> {
    let Some(entry) = database.trace_entry(derivation, output).await? else {
        return Ok(respond::not_found(false));
    };
    let value = json!({
        "outPath": entry.output.base_name(),
        "signatures": entry.signatures.iter().map(signature).collect::<Vec<_>>(),
    });
    Ok(respond::json(value.to_string()))
}
