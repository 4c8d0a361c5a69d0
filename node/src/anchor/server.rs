//! Server: an anchor that answers, and what it does beside.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::cache::{CacheName, CacheNameError};
use super::ingest::IngestError;
use super::object_store::problem;
use super::tls::{RENEWAL_INTERVAL, Tls, TlsError};
use super::{Anchor, OpenError, Options, admin, heal, http, scrub, uploads};

/// How often uses of paths are written down. A crash loses as much, which retention does not feel.
const USED_INTERVAL: Duration = Duration::from_secs(30);

/// How often garbage is collected. A grace of a day makes it no matter of minutes.
const COLLECT_INTERVAL: Duration = Duration::from_secs(3600);

/// Where a running anchor says how it is reached in plain HTTP, for the command line beside it.
pub const ADDRESS_FILE: &str = "address";

/// How long running answers may take to end at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an anchor does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "cannot listen on {address} for anchor clients: {source}\nhint: see [anchor-server] in the configuration"
    )]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("cannot finish what the last run left: {0}")]
    Recover(#[from] IngestError),
    #[error(transparent)]
    DefaultCache(#[from] admin::AdminError),
    #[error(transparent)]
    CacheName(#[from] CacheNameError),
    #[error("another granary anchor works in {path}\nhint: granary up runs one too; stop that first, or give this one a state-dir of its own", path = .path.display())]
    Running { path: std::path::PathBuf },
    #[error("cannot lock the anchor's state folder {path}: {source}", path = .path.display())]
    Lock {
        path: std::path::PathBuf,
        source: io::Error,
    },
}

/// Holds the anchor's state folder for one process.
#[derive(Debug)]
pub struct StateLock(
    #[expect(dead_code, reason = "the lock lasts as long as the file is open")] std::fs::File,
);

impl StateLock {
    /// Takes the lock, or says who has it. Ends with the process, however that ends.
    pub fn take(state: &std::path::Path) -> Result<StateLock, StartError> {
        let path = state.join("lock");
        let failed = |source| StartError::Lock {
            path: path.clone(),
            source,
        };
        std::fs::create_dir_all(state).map_err(failed)?;
        let file = std::fs::File::create(&path).map_err(failed)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(StateLock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Running {
                path: state.to_owned(),
            }),
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

/// A running anchor.
pub struct Server {
    pub anchor: Arc<Anchor>,
    pub address: SocketAddr,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    _lock: StateLock,
}

impl Server {
    /// Starts an anchor; returns once it answers.
    ///
    /// Makes the cache `default_cache` if there is none yet.
    /// # Errors
    /// What a person must mend.
    pub async fn start(
        options: Options,
        listen: SocketAddr,
        default_cache: Option<&str>,
    ) -> Result<Server, StartError> {
        let lock = StateLock::take(&options.state)?;
        let failed = |source| StartError::Listen {
            address: listen,
            source,
        };
        let tls = options
            .tls
            .clone()
            .map(Tls::open)
            .transpose()?
            .map(Arc::new);
        let listener = http::listen(listen).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        // The command line on this machine knows nothing of names and authorities: beside TLS it has a door
        // of its own, on loopback, at a port that nobody else is told.
        let side_door = match &tls {
            Some(_) => Some(http::listen((Ipv4Addr::LOCALHOST, 0).into()).map_err(failed)?),
            None => None,
        };
        let nearby = match &side_door {
            Some(side_door) => side_door.local_addr().map_err(failed)?,
            None => nearest(address),
        };
        uploads::sweep(&options.state.join("spool"));
        let address_file = options.state.join(ADDRESS_FILE);
        std::fs::write(&address_file, nearby.to_string()).map_err(|source| StartError::Lock {
            path: address_file,
            source,
        })?;
        let scrub_after = options.scrub_after;
        let may_heal = !options.heal_from.is_empty();
        let anchor = Anchor::open(options).await?;
        sweep(&anchor).await;
        let aborting = anchor.storage.abort_left();
        anchor.recover().await?;
        if let Some(name) = default_cache {
            let name = CacheName::new(name)?;
            match anchor
                .create_cache(&name, &admin::Changes::default(), None)
                .await
            {
                Ok(cache) => {
                    let key = cache.settings.public_keys.first().map(String::as_str);
                    info!(cache = %name, key, "made the default cache");
                }
                Err(admin::AdminError::Exists { .. }) => {}
                // It was deleted, and storage refuses to delete what is left of it.
                Err(admin::AdminError::Storage(error))
                    if anchor.is_being_deleted(&name).await? =>
                {
                    let problem = problem(&error);
                    warn!(cache = %name, problem, "could not make the default cache anew");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let shutdown = CancellationToken::new();
        let tasks = TaskTracker::new();
        let end = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = end.cancelled() => {}
                () = aborting => {}
            }
        });
        let resuming = anchor.clone();
        tasks.spawn(async move {
            // Interrupted anywhere, the next start goes on.
            resume_deletions(&resuming).await;
            if let Err(error) = resuming.resume_rotations().await {
                let storage = resuming.storage.location();
                error!(storage, %error, "could not look for rotations of keys that were interrupted");
            }
        });
        let keeping = anchor.clone();
        tasks.spawn(async move {
            if let Err(error) = keeping.tokens.keep_revoked().await {
                let storage = keeping.storage.location();
                warn!(storage, %error, "could not look whether storage knows every revoked token");
            }
        });
        if let Some(after) = scrub_after {
            let scrubbing = scrub::keep_scrubbing(anchor.clone(), after, shutdown.clone());
            tasks.spawn(scrubbing);
        }
        if may_heal {
            tasks.spawn(heal::keep_healing(anchor.clone(), shutdown.clone()));
        }
        if let Some(tls) = &tls {
            tasks.spawn(renew(tls.clone(), shutdown.clone()));
        }
        let is_tls = tls.is_some();
        let doors = [Some((listener, tls)), side_door.map(|door| (door, None))];
        for (listener, tls) in doors.into_iter().flatten() {
            tasks.spawn(http::accept(
                anchor.clone(),
                listener,
                tls,
                shutdown.clone(),
                tasks.clone(),
            ));
        }
        tasks.spawn(write_used(anchor.clone(), shutdown.clone()));
        tasks.spawn(collect(anchor.clone(), shutdown.clone()));
        tasks.spawn(uploads::keep_expiring(anchor.clone(), shutdown.clone()));
        info!(%address, tls = is_tls, storage = anchor.storage.location(), "anchor is answering");
        Ok(Server {
            anchor,
            address,
            shutdown,
            tasks,
            _lock: lock,
        })
    }

    /// Stops: no new connections, running answers may end.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.anchor.uploads.close();
        self.tasks.close();
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait()).await;
    }
}

/// Removes what was being written into storage when the last run was killed. What stays costs space, and nothing else.
async fn sweep(anchor: &Arc<Anchor>) {
    // Commands that change caches write beside us, and may take their time: then the next start looks.
    let _held = match anchor.administration.try_hold().await {
        Ok(Some(held)) => held,
        Ok(None) => return,
        Err(error) => {
            warn!(%error, "could not look for what was being written when the last run ended");
            return;
        }
    };
    let storage = anchor.storage.clone();
    let swept = tokio::task::spawn_blocking(move || storage.sweep()).await;
    let storage = anchor.storage.location();
    match swept.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())) {
        Ok(0) => {}
        Ok(files) => info!(
            storage,
            files, "removed what was being written when the last run ended"
        ),
        Err(error) => {
            warn!(storage, %error, "could not remove all that was being written when the last run ended");
        }
    }
}

async fn resume_deletions(anchor: &Arc<Anchor>) {
    if let Err(error) = anchor.resume_deletions().await {
        let storage = anchor.storage.location();
        error!(storage, %error, "could not look for deletions of caches that were interrupted");
    }
}

/// Where this machine reaches what listens on an address.
pub fn nearest(address: SocketAddr) -> SocketAddr {
    let here = match address {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    match address.ip().is_unspecified() {
        true => SocketAddr::new(here, address.port()),
        false => address,
    }
}

/// Takes a renewed certificate.
async fn renew(tls: Arc<Tls>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RENEWAL_INTERVAL) => {}
        }
        let renewing = tls.clone();
        match tokio::task::spawn_blocking(move || renewing.renew()).await {
            Ok(Ok(false)) => {}
            Ok(Ok(true)) => info!("took a renewed certificate"),
            Ok(Err(error)) => {
                warn!(file = %tls.certificate().display(), %error, "kept the old certificate")
            }
            Err(error) => {
                error!(file = %tls.certificate().display(), %error, "could not look at the certificate")
            }
        }
    }
}

async fn write_used(anchor: Arc<Anchor>, shutdown: CancellationToken) {
    loop {
        let is_over = tokio::select! {
            () = shutdown.cancelled() => true,
            () = tokio::time::sleep(USED_INTERVAL) => false,
        };
        if let Err(error) = anchor.write_used().await {
            error!(storage = anchor.storage.location(), %error, "could not write down which paths were used");
        }
        if is_over {
            return;
        }
    }
}

async fn collect(anchor: Arc<Anchor>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(COLLECT_INTERVAL) => {}
        }
        // Interrupted anywhere, the next one goes on.
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = resume_deletions(&anchor) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            collected = anchor.collect() => if let Err(error) = collected {
                error!(storage = anchor.storage.location(), %error, "could not collect garbage");
            },
        }
    }
}
