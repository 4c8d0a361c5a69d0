//! Tokens: what this machine shows to each `[[anchor]]`, be it that of a token file or the one that it gets as a member.

use std::path::Path;

use http::HeaderValue;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use super::StartError;
use crate::authority::Authorities;
use crate::config::{Anchor, Config};
use crate::identity::Identity;
use crate::upload::exchange::{Exchange, Proof};
use crate::upload::member::{Kept, Membership, keep};
use crate::upload::read_token;

/// What is shown to one anchor.
pub(super) struct Shown {
    pub header: watch::Receiver<Option<HeaderValue>>,
    /// Why a member has no token yet; `None` where it needs none.
    pub problem: Option<watch::Receiver<Option<String>>>,
}

/// Reads the tokens of the configuration, and begins to get those that members get; in the order of the anchors.
pub(super) fn gather(
    config: &Config,
    identity: &Identity,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Vec<Shown>, StartError> {
    let shown = |anchor: &Anchor| match &anchor.token_file {
        Some(path) => Ok(Shown {
            header: watch::channel(Some(bearer(anchor.url.as_str(), path)?)).1,
            problem: None,
        }),
        None => as_member(config, anchor, identity, shutdown, tasks),
    };
    config.anchor.iter().map(shown).collect()
}

fn as_member(
    config: &Config,
    anchor: &Anchor,
    identity: &Identity,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Shown, StartError> {
    let (header, reader) = watch::channel(None);
    let url = anchor.url.as_str().trim_end_matches('/');
    let without = |problem: &str| Shown {
        header: reader.clone(),
        problem: Some(watch::channel(Some(problem.to_owned())).1),
    };
    let Some(file) = config.token_file_of(anchor) else {
        return Ok(without(
            "its [[anchor]] has no token-file and no public-keys",
        ));
    };
    if config.mesh.key.is_none() {
        return Ok(without(
            "this machine is in no mesh (granary join), and its [[anchor]] has no token-file",
        ));
    }
    let key = anchor.public_keys.first().cloned();
    let cache = url.rsplit('/').next();
    let Some((cache_key, cache)) = key.zip(cache) else {
        return Ok(without("its [[anchor]] names no cache"));
    };
    let membership = Membership {
        key: identity.key(),
        certificate_file: config.certificate_file(),
        cache: cache.to_owned(),
        cache_key,
    };
    let authorities = Authorities::read(anchor.ca_file.as_deref())?;
    let exchange = Exchange::new(url, None, Proof::Member(Box::new(membership)), &authorities)?;
    let (problem, problems) = watch::channel(None);
    let kept = Kept {
        file,
        header,
        problem,
    };
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = keep(exchange, kept) => {}
        }
    });
    Ok(Shown {
        header: reader,
        problem: Some(problems),
    })
}

/// Reads the token for an anchor as the value of the header that carries it.
fn bearer(url: &str, path: &Path) -> Result<HeaderValue, StartError> {
    let token = read_token(&path.to_owned()).map_err(|source| StartError::Token {
        url: url.to_owned(),
        source,
    })?;
    let bearer = Zeroizing::new(format!("Bearer {}", token.as_str()));
    let mut value = HeaderValue::from_str(&bearer).map_err(|_| StartError::NoToken {
        url: url.to_owned(),
        path: path.to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}
