//! This node's certificate: waited for, joined for, and renewed before it ends.
//!
//! A person may put one in its place at any time, and it is shown from then on.

use std::time::{Duration, Instant};

use granary_protocol::certificate::{Certificate, SignedCertificate};
use granary_protocol::peer::PeerId;
use granary_protocol::ticket::{Reply, Request, TICKET_TEXT_BYTES_MAX, Ticket};
use tokio::sync::watch;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::*;
use crate::admission::{self, Admission, AskError};

/// How often a ticket is tried that did not help, or whose machine could not be reached.
const JOIN_INTERVAL: Duration = Duration::from_secs(15);

/// How often it is looked whether the certificate ends soon, and tried again to have it renewed.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(3600);

/// A certificate is renewed when only this part of its life is left: ten days of thirty, in which a
/// laptop is on at home some time.
const RENEWAL_PART: u64 = 3;

/// Largest certificate file looked at.
const CERTIFICATE_FILE_BYTES_MAX: u64 = 16 * 1024;

/// Cares for the certificate.
pub(super) struct Keeper {
    pub config: Config,
    pub identity: Identity,
    /// Where the mesh key is, nobody needs to be asked.
    pub admission: Option<Arc<Admission>>,
}

/// Why the certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("this machine, which has the mesh key, refused: {0}")]
    Refused(granary_protocol::ticket::Refused),
    #[error("the task that renews it ended: {0}")]
    Ended(#[source] tokio::task::JoinError),
    #[error("mesh.key is not set")]
    NoMesh,
    #[error("cannot write the certificate to {path}: {source}", path = .path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Keeper {
    pub fn read(&self) -> Result<SignedCertificate, String> {
        let path = self.config.certificate_file();
        let read = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = state_folder::read(&path, CERTIFICATE_FILE_BYTES_MAX);
        let text = text.map_err(|error| read(&error))?;
        let text = text.ok_or_else(|| read(&"there is none"))?;
        SignedCertificate::from_text(&text).map_err(|error| read(&error))
    }

    /// Reads our certificate, as soon as there is one; joins by the configured ticket meanwhile.
    pub async fn wait(&self) -> SignedCertificate {
        let mut last_problem = String::new();
        let mut join_at = Instant::now();
        loop {
            if join_at <= Instant::now() {
                join_at = Instant::now() + JOIN_INTERVAL;
                if let Err(error) = self.join_by_ticket().await {
                    warn!(error = %chain(&error), "could not join by the ticket");
                }
            }
            match self.read() {
                Ok(certificate) => return certificate,
                Err(problem) if problem != last_problem => {
                    let peer_id = self.identity.peer_id();
                    warn!(
                        %problem, %peer_id,
                        "not a member yet, waiting for a certificate: granary mesh admit <peer id>"
                    );
                    last_problem = problem;
                }
                Err(_) => {}
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn join_by_ticket(&self) -> Result<(), RenewalError> {
        let Some(file) = &self.config.mesh.ticket_file else {
            return Ok(());
        };
        // It was read at start; what became of it is said by what comes of it.
        let text = state_folder::read(file, TICKET_TEXT_BYTES_MAX as u64);
        let text = Zeroizing::new(text.ok().flatten().unwrap_or_default());
        let Ok(Ticket {
            secret: Some(secret),
            ..
        }) = Ticket::from_text(&text)
        else {
            return Ok(());
        };
        let name = admission::host_name().unwrap_or_default();
        self.ask(&Request::Join { secret, name }).await.map(drop)
    }

    /// Shows a new certificate when there is one, and has it renewed in time. Never ends.
    pub async fn keep(
        self,
        mesh: mesh::MeshHandle,
        about: watch::Sender<Option<CertificateAbout>>,
        mut changes: watch::Receiver<()>,
        mut shown: SignedCertificate,
    ) {
        let mut attempt_at = Instant::now();
        loop {
            // One that cannot be read is in the middle of being replaced, or what is shown is better.
            if let Ok(certificate) = self.read()
                && certificate != shown
            {
                shown = certificate.clone();
                about.send_replace(about_certificate(&certificate));
                mesh.renew(certificate).await;
            }
            let now = unix_time();
            let ends_soon = shown.claims().is_ok_and(|own| ends_soon(&own, now));
            let can_ask = self.admission.is_some() || !self.config.mesh.admits.is_empty();
            if ends_soon && can_ask && attempt_at <= Instant::now() {
                attempt_at = Instant::now() + RENEWAL_INTERVAL;
                let certificate = shown.clone();
                match self.ask(&Request::Renew { certificate }).await {
                    Ok(_) => {
                        info!("renewed the certificate");
                        continue;
                    }
                    Err(error) => warn!(
                        error = %chain(&error),
                        "could not have the certificate renewed, trying again in an hour"
                    ),
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RENEWAL_INTERVAL) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Has a certificate made and puts it in its place.
    async fn ask(&self, request: &Request) -> Result<SignedCertificate, RenewalError> {
        let mesh = self.config.mesh.key.as_ref().ok_or(RenewalError::NoMesh)?;
        let certificate = match &self.admission {
            None => admission::ask(&self.identity, mesh, &self.config.mesh.admits, request).await?,
            Some(admission) => {
                let me = PeerId::from_public_key(self.identity.public_key());
                let (admission, request) = (admission.clone(), request.clone());
                let reply = move || admission.reply(me, request, unix_time());
                match tokio::task::spawn_blocking(reply).await {
                    Ok(Reply::Certificate(certificate)) => certificate,
                    Ok(Reply::Refused(refused)) => return Err(RenewalError::Refused(refused)),
                    Err(ended) => return Err(RenewalError::Ended(ended)),
                }
            }
        };
        let path = self.config.certificate_file();
        let text = format!("{}\n", certificate.to_text());
        match state_folder::write(&path, text.as_bytes()) {
            Ok(()) => Ok(certificate),
            Err(source) => Err(RenewalError::Write { path, source }),
        }
    }
}

fn ends_soon(own: &Certificate, now: UnixTime) -> bool {
    let life = own.not_after.0.saturating_sub(own.not_before.0);
    own.not_after.0.saturating_sub(now.0) <= life / RENEWAL_PART
}

/// What status shows of our certificate; `None` when it says nothing sensible.
pub(super) fn about_certificate(certificate: &SignedCertificate) -> Option<CertificateAbout> {
    let own = certificate.claims().ok()?;
    Some(CertificateAbout {
        name: own.name,
        permissions: own.permissions.to_string(),
        expires: own.not_after.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_ends_soon_when_a_third_of_its_life_is_left() {
        let own = Certificate {
            peer: PeerId::from_public_key([7; 32]),
            name: "desk".into(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(1000),
            not_after: UnixTime(1300),
            serial: 1,
        };
        assert!(!ends_soon(&own, UnixTime(1199)));
        assert!(ends_soon(&own, UnixTime(1200)));
        assert!(ends_soon(&own, UnixTime(5000)));
        // A clock far behind is no reason.
        assert!(!ends_soon(&own, UnixTime(0)));
    }
}
