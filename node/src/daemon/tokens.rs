//! Tokens: what this machine shows to each `[[anchor]]`, be it that of a token file or the one that it gets as a member.

use std::path::Path;

use granary_protocol::assertion::CACHE_KEYS_MAX;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::StartError;
use crate::authority::Authorities;
use crate::config::{Anchor, Config};
use crate::credential::{self, Credential};
use crate::identity::Identity;
use crate::upload::exchange::{Exchange, Proof};
use crate::upload::member::{Kept, Membership, Pauses, keep};
use crate::upload::read_token;

/// Reads the tokens of the configuration, and begins to get those that members get; in the order of the anchors.
pub(super) fn gather(
    config: &Config,
    identity: &Identity,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Vec<Credential>, StartError> {
    let credential = |anchor: &Anchor| match &anchor.token_file {
        Some(path) => fixed(anchor.url.as_str(), path),
        None => as_member(config, anchor, identity, shutdown, tasks),
    };
    config.anchor.iter().map(credential).collect()
}

fn as_member(
    config: &Config,
    anchor: &Anchor,
    identity: &Identity,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Credential, StartError> {
    let without = |problem: &str| Ok(Credential::without(problem));
    let Some(file) = config.token_file_of(anchor) else {
        return without("its [[anchor]] has no token-file and no public-keys");
    };
    let Some(mesh) = config.mesh.key.clone() else {
        return without(
            "this machine is in no mesh (granary join), and its [[anchor]] has no token-file",
        );
    };
    let path = anchor.url.path().trim_end_matches('/');
    let cache = path.rsplit('/').next().unwrap_or_default();
    if cache.is_empty() {
        return without("the url of its [[anchor]] names no cache");
    }
    let keys = anchor.public_keys.iter().take(CACHE_KEYS_MAX);
    let membership = Membership {
        key: identity.key(),
        mesh,
        certificate_file: config.certificate_file(),
        cache: cache.to_owned(),
        cache_keys: keys.cloned().collect(),
    };
    let authorities = Authorities::read(anchor.ca_file.as_deref())?;
    let url = anchor.url.as_str();
    let exchange = Exchange::new(url, None, Proof::Member(Box::new(membership)), &authorities)?;
    let (credential, source) = credential::renewed();
    let kept = Kept::new(file, source);
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = keep(exchange, kept, Pauses::default()) => {}
        }
    });
    Ok(credential)
}

/// Reads the token for an anchor.
fn fixed(url: &str, path: &Path) -> Result<Credential, StartError> {
    let token = read_token(&path.to_owned()).map_err(|source| StartError::Token {
        url: url.to_owned(),
        source,
    })?;
    Credential::fixed(&token).map_err(|_| StartError::NoToken {
        url: url.to_owned(),
        path: path.to_owned(),
    })
}
