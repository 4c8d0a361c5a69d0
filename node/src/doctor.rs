//! Doctor: what usually goes wrong with a machine's set-up, and how to mend it.
//!
//! Looks at the configuration, the state folder, the store, nix.conf, the running node, its mesh and its
//! anchors, from the outside and without changing any of it. Each [`Finding`] that is bad has an advice,
//! and a command where one mends it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use granary_protocol::certificate::{NotAMember, SignedCertificate};
use granary_protocol::peer::PeerId;
use reqwest::StatusCode;
use reqwest::header::DATE;
use serde::Serialize;

use crate::authority::{self, Authorities};
use crate::clock::unix_time;
use crate::config::{Anchor, Config};
use crate::identity::Identity;
use crate::loopback;
use crate::nix_conf::{self, Effective, NEGATIVE_TTL, Wanted};
use crate::state_folder;
use crate::status::{Report, counted, form, human_bytes};
use crate::store::{NixStore, StoreError};
use crate::upload::{TokenFileError, read_token};

/// How long an anchor may take to answer. A person waits.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Seconds that a clock may differ from an anchor's: HTTP's dates have whole ones, and an answer takes a moment.
const CLOCK_TOLERANCE: u64 = 30;

/// Days before its end at which a certificate is worth a warning.
const CERTIFICATE_DAYS_MIN: u64 = 3;
const SECONDS_PER_DAY: u64 = 86_400;

/// Free bytes below which the index, the queue and the anchor's spool soon have no room.
const FREE_BYTES_MIN: u64 = 64 << 20;

/// Largest certificate file looked at.
const CERTIFICATE_BYTES_MAX: u64 = 16 * 1024;

/// A shorter memory of misses than this is fine, whoever chose it.
const NEGATIVE_TTL_MAX: u64 = 6 * NEGATIVE_TTL;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Fine,
    /// Works, with something to be said about it.
    Note,
    Failed,
}

/// What one look found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at, in one word or two; never changes its spelling.
    pub subject: &'static str,
    pub verdict: Verdict,
    pub found: String,
    /// How to mend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// A shell command that does, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
}

impl Finding {
    pub fn fine(subject: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            subject,
            verdict: Verdict::Fine,
            found: found.into(),
            advice: None,
            command: None,
        }
    }

    pub fn failed(
        subject: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            verdict: Verdict::Failed,
            advice: Some(advice.into()),
            ..Finding::fine(subject, found)
        }
    }

    fn note(subject: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding {
            verdict: Verdict::Note,
            ..Finding::failed(subject, found, advice)
        }
    }

    fn by(self, command: impl Into<String>) -> Finding {
        Finding {
            command: Some(command.into()),
            ..self
        }
    }
}

/// What is looked at.
pub struct Patient<'a> {
    pub config: &'a Config,
    /// What Nix should be told; an error says why it cannot be.
    pub wanted: Result<Wanted, String>,
    /// Nix's configuration.
    pub nix_conf: &'a Path,
}

/// Looks at everything.
pub async fn examine(patient: &Patient<'_>) -> Vec<Finding> {
    let config = patient.config;
    let mut findings = vec![state_dir(config), identity(config), space(config)];
    let store = store(patient).await;
    let is_needed = store.verdict != Verdict::Note;
    findings.push(store);
    if is_needed {
        findings.extend(nix(patient));
    }
    let report = node(config, &mut findings).await;
    findings.extend(mesh(config, report.as_ref()));
    findings.extend(share(config));
    for anchor in &config.anchor {
        findings.extend(self::anchor(config, anchor).await);
    }
    if let Some(upload) = report.and_then(|report| report.upload) {
        findings.push(match upload.problem {
            None => Finding::fine(
                "pushes",
                format!(
                    "{} {} for {}",
                    counted(upload.paths_waiting, "path"),
                    form(upload.paths_waiting, "waits", "wait"),
                    upload.cache
                ),
            ),
            Some(problem) if upload.retry_in.is_some() => Finding::failed(
                "pushes",
                problem,
                "see the anchor above; pushing goes on by itself when it answers",
            ),
            Some(problem) => Finding::note(
                "pushes",
                problem,
                "push it by name with granary push, or see upload.sources and share.deny",
            ),
        });
    }
    findings
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

fn state_dir(config: &Config) -> Finding {
    let path = &config.state_dir;
    let subject = "state folder";
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::note(
            subject,
            format!("{} does not exist", path.display()),
            "it is made at the first start; is state-dir the same for the node and for you?",
        ),
        Err(error) => Finding::failed(
            subject,
            format!("cannot look at {}: {error}", path.display()),
            "run granary doctor as the user that the node runs as, or as root",
        ),
        Ok(metadata) if !metadata.is_dir() => Finding::failed(
            subject,
            format!("{} is no folder", path.display()),
            "move it away, or set state-dir to another place",
        ),
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => Finding::failed(
            subject,
            format!(
                "others may look into {} (mode {:04o})",
                path.display(),
                metadata.permissions().mode() & 0o7777
            ),
            "take their rights away, for keys are in it",
        )
        .by(format!("chmod 0700 {}", quoted(path))),
        Ok(_) => Finding::fine(subject, path.display().to_string()),
    }
}

fn identity(config: &Config) -> Finding {
    let (subject, file) = ("identity", config.identity_file());
    if !file.exists() {
        let found = format!("there is none at {} yet", file.display());
        return Finding::note(subject, found, "it is made at the first start");
    }
    match Identity::load_or_create(&file) {
        Ok(identity) => Finding::fine(subject, identity.peer_id().to_string()),
        Err(error) => {
            let is_exposed = matches!(error, crate::identity::IdentityError::Exposed { .. });
            let failed = Finding::failed(
                subject,
                error.to_string(),
                "the node starts only with a key of its own",
            );
            match is_exposed {
                true => failed.by(format!("chmod 0600 {}", quoted(&file))),
                false => failed,
            }
        }
    }
}

fn space(config: &Config) -> Finding {
    let subject = "disk space";
    // Where the folder is not made yet, that of the place where it will be.
    let existing = config.state_dir.ancestors().find(|path| path.exists());
    match rustix::fs::statvfs(existing.unwrap_or(Path::new("/"))) {
        Err(error) => Finding::note(subject, format!("cannot tell: {error}"), "look with df"),
        Ok(about) => {
            let free = about.f_bavail.saturating_mul(about.f_frsize);
            let found = format!(
                "{} free for {}",
                human_bytes(free),
                config.state_dir.display()
            );
            match free < FREE_BYTES_MIN {
                true => Finding::failed(
                    subject,
                    found,
                    format!(
                        "make room: the index, the upload queue and an anchor's spool need {} at least",
                        human_bytes(FREE_BYTES_MIN)
                    ),
                ),
                false => Finding::fine(subject, found),
            }
        }
    }
}

async fn store(patient: &Patient<'_>) -> Finding {
    let config = patient.config;
    let is_nix_used = !config.keeps_anchor() || patient.nix_conf.exists();
    let place = config.store_config();
    match NixStore::open(place.clone()).await {
        Ok(_) => {
            let socket = match place.daemon_socket.exists() {
                true => "with a Nix daemon",
                false => "without a Nix daemon",
            };
            Finding::fine("store", format!("{}, {socket}", place.database.display()))
        }
        Err(StoreError::NoDatabase { file }) if !is_nix_used => Finding::note(
            "store",
            format!("no Nix is here: {} does not exist", file.display()),
            "none is needed to keep an anchor; one that comes later is found by granary up",
        ),
        Err(error) => Finding::failed(
            "store",
            crate::log::chain(&error),
            "set [store] database and real-dir to where this machine's Nix has them, and run the node as a user that may read them",
        ),
    }
}

/// What Nix is told, and what it should be.
fn nix(patient: &Patient<'_>) -> Vec<Finding> {
    let place = patient.nix_conf.display();
    let mend = format!("granary use --nix-conf {}", quoted(patient.nix_conf));
    let wanted = match &patient.wanted {
        Ok(wanted) => wanted,
        Err(problem) => {
            let advice = "give substituter.listen an address with a port";
            return vec![Finding::failed("nix substituter", problem, advice)];
        }
    };
    let read = nix_conf::read(patient.nix_conf);
    let effective =
        read.and_then(|text| Effective::of(&text.unwrap_or_default(), patient.nix_conf));
    let effective = match effective {
        Ok(effective) => effective,
        Err(error) => {
            let advice = "mend that file; Nix itself would refuse it";
            return vec![Finding::failed(
                "nix substituter",
                error.to_string(),
                advice,
            )];
        }
    };
    let mut findings = Vec::new();
    findings.push(match effective.asks(&wanted.substituter) {
        true => Finding::fine(
            "nix substituter",
            format!("{} is in {place}", wanted.substituter),
        ),
        false => Finding::failed(
            "nix substituter",
            format!(
                "{} is not among the substituters of {place}",
                wanted.substituter
            ),
            "add it, and restart the Nix daemon",
        )
        .by(&mend),
    });
    let untrusted = wanted.keys.iter().filter(|key| !effective.trusts(key));
    let untrusted: Vec<&str> = untrusted.map(String::as_str).collect();
    findings.push(match untrusted.is_empty() {
        true => Finding::fine("nix keys", format!("Nix trusts all {}", wanted.keys.len())),
        false => Finding::failed(
            "nix keys",
            format!("{place} does not trust {}", untrusted.join(" ")),
            "add them to trusted-public-keys, or Nix refuses what they signed",
        )
        .by(&mend),
    });
    findings.push(match effective.negative_ttl <= NEGATIVE_TTL_MAX {
        true => Finding::fine(
            "nix memory of misses",
            format!("{} s", effective.negative_ttl),
        ),
        false => Finding::failed(
            "nix memory of misses",
            format!(
                "Nix remembers for {} s that a path was not there",
                effective.negative_ttl
            ),
            "set narinfo-cache-negative-ttl to 10, or builds of your neighbours stay unseen",
        )
        .by(&mend),
    });
    findings
}

/// Asks the running node how it is.
async fn node(config: &Config, findings: &mut Vec<Finding>) -> Option<Report> {
    let subject = "node";
    let address = config.substituter.listen.first()?;
    let answer = loopback::get(address, "/api/v1/status").await;
    let report = match answer {
        Ok(Some(text)) => match serde_json::from_slice::<Report>(&text) {
            Ok(report) => Some(report),
            Err(_) => {
                let found = format!("something that is no granary node answers on {address}");
                let advice = "stop it, or set substituter.listen to another port";
                findings.push(Finding::failed(subject, found, advice));
                return None;
            }
        },
        Ok(None) => {
            let found = format!("what answers on {address} has no store open");
            let advice = "if it is a granary node, see the store above; it looks again every 2 s";
            findings.push(Finding::failed(subject, found, advice));
            None
        }
        Err(error) => {
            let advice =
                "start it, with this configuration: granary node, or systemctl start granary";
            findings.push(Finding::failed(subject, format!("{error:#}"), advice));
            None
        }
    };
    if let Some(report) = &report {
        let found = format!("version {} answers on {address}", report.about.version);
        findings.push(Finding::fine(subject, found));
        if report.store_errors > 0 {
            let found = format!("the store failed to answer {} times", report.store_errors);
            findings.push(Finding::note("store errors", found, "see the node's log"));
        }
    }
    report
}

/// The certificate, the ports and the neighbours.
fn mesh(config: &Config, report: Option<&Report>) -> Vec<Finding> {
    let Some(key) = &config.mesh.key else {
        return vec![Finding::note(
            "mesh",
            "mesh.key is not set, this machine serves itself only",
            "granary join joins a mesh with a ticket; granary mesh create --here makes one",
        )];
    };
    let mut findings = Vec::new();
    let file = config.certificate_file();
    let peer = config.identity_file();
    let peer = peer
        .exists()
        .then(|| Identity::load_or_create(&peer).ok())
        .flatten();
    let peer = peer.map(|identity| PeerId::from_public_key(identity.public_key()));
    let admit = match &peer {
        Some(peer) => format!("granary mesh admit {peer} --out certificate"),
        None => "granary mesh admit <what granary identity prints here>".to_owned(),
    };
    let advice = format!(
        "where the mesh key is, run {admit}, and copy the file to {}",
        file.display()
    );
    findings.push(match state_folder::read(&file, CERTIFICATE_BYTES_MAX) {
        Ok(None) => {
            let found = format!("there is no certificate at {}", file.display());
            Finding::failed("certificate", found, advice)
        }
        Err(error) => {
            let found = format!("cannot read {}: {error}", file.display());
            Finding::failed("certificate", found, "let the node's user read it")
        }
        Ok(Some(text)) => match SignedCertificate::from_text(&text) {
            Err(error) => Finding::failed("certificate", error.to_string(), advice),
            Ok(certificate) => {
                let claimed = certificate.claims().ok().map(|claims| claims.peer);
                let now = unix_time();
                match peer
                    .or(claimed)
                    .map(|peer| certificate.verify(key, &peer, now))
                {
                    Some(Ok(own)) => {
                        let days = own.not_after.0.saturating_sub(now.0) / SECONDS_PER_DAY;
                        let found = format!("{}, for {} more", own.name, counted(days, "day"));
                        match days < CERTIFICATE_DAYS_MIN {
                            true => Finding::note("certificate", found, advice),
                            false => Finding::fine("certificate", found),
                        }
                    }
                    Some(Err(problem @ NotAMember::NotYetValid { .. })) => Finding::failed(
                        "certificate",
                        problem.to_string(),
                        "set this machine's clock, or that of the machine with the mesh key",
                    ),
                    Some(Err(problem)) => {
                        Finding::failed("certificate", problem.to_string(), advice)
                    }
                    None => Finding::failed("certificate", "it says nothing sensible", advice),
                }
            }
        },
    });
    findings.extend(ports(config, report.is_some()));
    if config.mesh.mdns {
        findings.push(multicast());
    }
    if let Some(report) = report {
        let linked = report.peers.iter().filter(|peer| peer.state == "linked");
        let linked = linked.count();
        findings.push(match linked {
            0 => Finding::note(
                "peers",
                "no other member is linked",
                "if one is on: open TCP 4727 and 4728 and UDP 5353 in both firewalls, or name it in mesh.peers where multicast does not reach",
            ),
            _ => Finding::fine("peers", format!("{linked} linked")),
        });
        if !report.silent.is_empty() {
            let found = format!(
                "silent on {}, which is on no network of mesh.networks",
                report.silent.join(", ")
            );
            let advice = "nothing, where that is meant; else add the interface, or the gateway's address (ip neighbour)";
            findings.push(Finding::note("networks", found, advice));
        }
        for (reason, count) in &report.refusals {
            let found = format!("{count} × {reason}");
            let advice = "others are refused or refuse us; see SECURITY.md and the node's log";
            findings.push(Finding::note("refusals", found, advice));
        }
    }
    findings
}

/// What machines without Granary may read, if anything.
fn share(config: &Config) -> Vec<Finding> {
    let subject = "share";
    if config.share.http.is_empty() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    findings.push(match crate::daemon::share::read(config) {
        Ok(_) => {
            let addresses = config.share.http.iter().map(SocketAddr::to_string);
            let addresses = addresses.collect::<Vec<_>>().join(", ");
            let found = format!("machines without Granary read what is shared at {addresses}");
            Finding::fine(subject, found)
        }
        Err(error) => {
            let advice = "mend that file; the node does not start with it";
            Finding::failed(subject, error.to_string(), advice)
        }
    });
    let notes = config.remarks().into_iter().map(|remark| {
        let advice =
            "see without-granary.md of the manual; nothing is to be done where it is meant so";
        Finding::note(subject, remark, advice)
    });
    findings.extend(notes);
    findings
}

/// Whether the mesh's ports are the node's, or free for it.
fn ports(config: &Config, is_running: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let all = [
        ("mesh.listen", &config.mesh.listen),
        ("mesh.transfer", &config.mesh.transfer),
    ];
    for (key, addresses) in all {
        for address in addresses {
            let finding = match (TcpListener::bind(address), is_running) {
                // A machine without IPv6.
                (Err(error), _) if is_missing(*address, &error) => continue,
                (Ok(_), true) => Finding::note(
                    "mesh ports",
                    format!("nothing listens on {address}, {key}"),
                    "the node opens it when it has a certificate; see its log",
                ),
                (Ok(_), false) | (Err(_), true) => {
                    Finding::fine("mesh ports", format!("{address}, {key}"))
                }
                (Err(error), false) => Finding::failed(
                    "mesh ports",
                    format!("{key} {address} cannot be had: {error}"),
                    format!("stop the program that has it, or set {key} to another port"),
                ),
            };
            findings.push(finding);
        }
    }
    findings
}

fn is_missing(address: SocketAddr, error: &io::Error) -> bool {
    address.is_ipv6() && error.kind() != io::ErrorKind::AddrInUse
}

/// Whether multicast can be sent at all.
fn multicast() -> Finding {
    const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
    // From an address of an interface, as the node does: so no route is needed, which a network that leads nowhere
    // has not.
    let attempt = |ip: Ipv4Addr| -> io::Result<()> {
        let socket = UdpSocket::bind((ip, 0))?;
        socket.join_multicast_v4(&GROUP, &ip)?;
        // An empty datagram, which everybody passes over.
        socket.send_to(&[], (GROUP, 5353)).map(drop)
    };
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let addresses = interfaces
        .iter()
        .filter_map(|interface| match interface.ip() {
            IpAddr::V4(ip) if !ip.is_loopback() => Some(ip),
            _ => None,
        });
    let none = Err(io::Error::other("there is no interface but loopback"));
    match addresses.map(attempt).reduce(Result::or).unwrap_or(none) {
        Ok(()) => Finding::fine("multicast", "can be sent"),
        Err(error) => Finding::note(
            "multicast",
            format!("cannot be sent: {error}"),
            "without a network there is nothing to mend; else name the others in mesh.peers",
        ),
    }
}

/// An anchor's cache: whether it answers, whether the token counts, and whose clock is right.
async fn anchor(config: &Config, anchor: &Anchor) -> Vec<Finding> {
    let url = anchor.url.as_str().trim_end_matches('/');
    let file = config.token_file_of(anchor);
    // A member's own is there when its node got one.
    let file = file.filter(|file| anchor.token_file.is_some() || file.exists());
    let token = match &file {
        None => None,
        Some(file) => match read_token(file) {
            Ok(token) => Some(token),
            Err(error) => {
                let failed = Finding::failed(
                    "token",
                    error.to_string(),
                    "give it a token file that only the node's user may read",
                );
                let is_exposed = matches!(error, TokenFileError::Exposed { .. });
                return vec![match is_exposed {
                    true => failed.by(format!("chmod 0600 {}", quoted(file))),
                    false => failed,
                }];
            }
        },
    };
    let pushes = config.upload.cache.as_deref();
    let pushes = pushes.and_then(|cache| config.anchor_of(cache));
    let pushes = pushes.is_some_and(|target| target.url == anchor.url);
    let authorities = match Authorities::read(anchor.ca_file.as_deref()) {
        Ok(authorities) => authorities,
        Err(error) => {
            let advice = "put the authority's certificate there (PEM), or take ca-file out";
            return vec![Finding::failed("ca-file", error.to_string(), advice)];
        }
    };
    let client = authorities.client(|| reqwest::Client::builder().timeout(ANSWER_TIMEOUT));
    let request = client.map(|client| {
        // What a push asks first, of which an empty question is one.
        match (pushes, url.rsplit_once('/')) {
            (true, Some((root, cache))) => client
                .post(format!("{root}/api/v1/caches/{cache}/missing"))
                .body("{\"hashes\":[]}"),
            _ => client.get(format!("{url}/nix-cache-info")),
        }
    });
    let token_is_shown = token.is_some();
    let answer = match request {
        Ok(request) => match token {
            Some(token) => request.bearer_auth(token.as_str()).send().await,
            None => request.send().await,
        },
        Err(error) => Err(error),
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            let found = crate::log::chain(&error);
            let advice = match authority::speaks_no_tls(&error) {
                true => format!(
                    "write http:// for https:// in {url}: what answers there speaks HTTP without TLS"
                ),
                false => format!(
                    "is the anchor running, and is {url} its address? Away from home this is as it should be"
                ),
            };
            return vec![Finding::failed("anchor", found, advice)];
        }
    };
    let mut findings = Vec::new();
    let date = answer
        .headers()
        .get(DATE)
        .and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| httpdate::parse_http_date(date).ok());
    let date = date.and_then(|date| date.duration_since(UNIX_EPOCH).ok());
    if let Some(date) = date {
        let now = unix_time().0;
        let apart = now.abs_diff(date.as_secs());
        findings.push(match apart > CLOCK_TOLERANCE {
            true => Finding::failed(
                "clock",
                format!("this machine's is {apart} s apart from that of {url}"),
                "set the one that is wrong (timedatectl set-ntp true): certificates and tokens have dates",
            ),
            false => Finding::fine("clock", format!("agrees with that of {url}")),
        });
    }
    if token_is_shown && answer.status().is_success() {
        let allows = if pushes { "pushes" } else { "reading" };
        findings.push(Finding::fine("token", format!("allows {allows}")));
    }
    let allowed = if pushes { "pull,push" } else { "pull" };
    findings.push(match answer.status() {
        status if status.is_success() => Finding::fine("anchor", format!("{url} answers")),
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            let text = answer.text().await.unwrap_or_default();
            let name = serde_json::from_str::<serde_json::Value>(&text).ok();
            let name = name.and_then(|value| Some(value.get("error")?.as_str()?.to_owned()));
            let cache = url.rsplit('/').next().unwrap_or_default();
            Finding::failed(
                "token",
                format!("{url} refuses it: {}", name.unwrap_or(status.to_string())),
                format!("where the anchor runs, granary token create --subject <this machine> --cache {cache} --allow {allowed}, and put it into token-file, or join by a ticket that allows push:{cache}; or is the last word of the url no cache of it?"),
            )
        }
        status => Finding::failed(
            "anchor",
            format!("{url} answers {status}"),
            "is the last word of the url a cache of it (granary cache list)? A private one wants a token-file",
        ),
    });
    findings
}
