//! Check: what the keys say together, beyond what each says alone.

use std::net::SocketAddr;

use super::{Config, Oidc};

/// Days between two looks at a stored NAR: more often than daily wears disks out, and in ten years none is new.
const SCRUB_DAYS: std::ops::RangeInclusive<u64> = 1..=3650;

impl Config {
    /// What is allowed and worth a second thought, in sentences.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let is_open = |address: &&SocketAddr| !address.ip().is_loopback();
        if self.share.http_token_file.is_none()
            && let Some(address) = self.share.http.iter().find(is_open)
        {
            remarks.push(format!(
                "share.http is {address} without share.http-token-file: whoever reaches it may read what is shared"
            ));
        }
        if !self.share.http.is_empty() && self.share.http_sign_key_file.is_none() {
            remarks.push(
                "share.http without share.http-sign-key-file gives only paths that carry a signature: what Nix builds here without secret-key-files is not among them".to_owned(),
            );
        }
        if self.share.public {
            let names = self.share.public_keys.iter().map(|key| key.name().as_str());
            remarks.push(format!(
                "share.public tells every node near by which of the paths are here that {} signed",
                names.collect::<Vec<_>>().join(", ")
            ));
        }
        if self.mesh.strangers {
            remarks.push(
                "mesh.strangers tells nodes of other meshes which paths are looked for".to_owned(),
            );
        }
        remarks
    }

    /// What cannot be meant, in a sentence; `None` when everything fits together.
    pub(super) fn contradiction(&self) -> Option<String> {
        let malformed = |peer: &&String| {
            let port = peer
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse::<u16>().ok());
            port.is_none_or(|port| port == 0)
        };
        if let Some(peer) = self.mesh.peers.iter().find(malformed) {
            return Some(format!("mesh.peers has {peer:?}, expected host:port"));
        }
        if self.mesh.key.is_some() && self.mesh.listen.is_empty() {
            return Some("mesh.listen is empty, no peer could reach this node; remove mesh.key to serve this machine only".into());
        }
        if !self.share.http.is_empty() && !self.share.enable {
            return Some("share.http is set, but share.enable is false, nothing would be read there; remove one of them".into());
        }
        if self.share.public && !self.share.enable {
            return Some("share.public is set, but share.enable is false, nothing would be shared; remove one of them".into());
        }
        if self.share.public && self.share.public_keys.is_empty() {
            return Some(
                "share.public is set, but share.public-keys is empty, nothing would be shared"
                    .into(),
            );
        }
        if self.substituter.listen.is_empty() && !self.anchor_server.member {
            return Some("substituter.listen is empty, Nix could not ask this node".into());
        }
        if let Some(cache) = &self.upload.cache {
            match self.anchor_of(cache) {
                None => {
                    return Some(format!(
                        "upload.cache is {cache:?}, but no [[anchor]] has a url that ends in it"
                    ));
                }
                Some(anchor) if self.token_file_of(anchor).is_none() => {
                    return Some(format!(
                        "upload.cache is {cache:?}, but its [[anchor]] {} has neither a token-file, which must allow to push, nor public-keys, by which a member whose certificate allows push:<cache> gets a token",
                        anchor.url
                    ));
                }
                Some(_) => {}
            }
        }
        let server = &self.anchor_server;
        if server
            .scrub_days
            .is_some_and(|days| !SCRUB_DAYS.contains(&days))
        {
            return Some(format!(
                "anchor-server.scrub-days is {}, expected {} to {}",
                server.scrub_days.unwrap_or_default(),
                SCRUB_DAYS.start(),
                SCRUB_DAYS.end()
            ));
        }
        if let Some(problem) = server.oidc.iter().find_map(Oidc::contradiction) {
            return Some(problem);
        }
        if server.tls_cert.is_some() != server.tls_key.is_some() {
            return Some(
                "of anchor-server.tls-cert and anchor-server.tls-key one is set; TLS needs both"
                    .into(),
            );
        }
        if self.limits.streams_per_peer == 0 {
            return Some("limits.streams-per-peer is 0, nobody could fetch; use share.enable = false to share nothing".into());
        }
        None
    }
}
