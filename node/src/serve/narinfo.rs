//! A narinfo as JSON: Nix's format for store objects, version 3, in its variant for binary caches.
//!
//! `/<hash>.narinfo?json`, for scripts; Nix itself reads the lines. Nix manual,
//! protocols/json/store-object-info. Nix 2.34 prints version 2, which differs in `signatures`.

use granary_protocol::content_address::{ContentAddress, Method};
use granary_protocol::narinfo::NarInfo;
use granary_protocol::store_path::{StoreDir, StorePath};
use serde_json::{Value, json};

/// Version of the format.
const VERSION: u32 = 3;

/// Writes a narinfo as one line of JSON.
pub fn to_json(narinfo: &NarInfo, dir: &StoreDir) -> String {
    let sri = |digest: &[u8; 32]| granary_protocol::hash::Hash::sha256(*digest).to_sri();
    let signatures: Vec<_> = narinfo.signatures.iter().map(signature).collect();
    let references: Vec<_> = narinfo
        .references
        .iter()
        .map(StorePath::base_name)
        .collect();
    let value = json!({
        "version": VERSION,
        "storeDir": dir.as_str(),
        "path": narinfo.store_path.base_name(),
        "narHash": sri(narinfo.nar_hash.as_bytes()),
        "narSize": narinfo.nar_size,
        "references": references,
        "ca": narinfo.ca.as_ref().map(content_address),
        "deriver": narinfo.deriver.as_ref().map(StorePath::base_name),
        // A binary cache does not say when it got a path, nor who built it.
        "registrationTime": Value::Null,
        "ultimate": false,
        "signatures": signatures,
        "url": narinfo.url,
        "compression": narinfo.compression.to_string(),
        "downloadHash": narinfo.file_hash.as_ref().map(|hash| sri(hash.as_bytes())),
        "downloadSize": narinfo.file_size,
    });
    format!("{value}\n")
}

/// A signature as current Nix writes it.
pub fn signature(signature: &granary_protocol::signature::Signature) -> Value {
    let text = signature.to_string();
    // A signature is printed as a name, a colon, and base 64.
    let (name, sig) = text.split_once(':').unwrap_or_default();
    json!({ "keyName": name, "sig": sig })
}

fn content_address(ca: &ContentAddress) -> Value {
    let method = match ca {
        ContentAddress::Text(_) => "text",
        ContentAddress::Fixed { method, .. } => match method {
            Method::Flat => "flat",
            Method::Recursive => "nar",
            Method::Git => "git",
        },
    };
    json!({ "method": method, "hash": ca.hash().to_sri() })
}
