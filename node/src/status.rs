//! Status: one snapshot of this node, and the reasons behind one answer.
//!
//! The running node gives both as JSON on its loopback endpoint (`/api/v1/status`,
//! `/api/v1/why/<path>`); `granary status` and `granary why` read them there and print them for a
//! person. The types are the format: fields are added, never renamed.

mod chart;
pub mod page;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use futures::future::BoxFuture;
use granary_protocol::mesh::{BreakerView, CacheView, LookupOutcome, PeerState};
use granary_protocol::narinfo::{Proof, VerifiedNarInfo};
use granary_protocol::peer::PeerId;
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};
use serde::{Deserialize, Serialize};

use crate::activity::{Activity, LookupView, TransferView};
use crate::binary_cache::{Told, WebCaches};
use crate::history::Spans;
use crate::mesh::MeshHandle;
use crate::metrics::{Gauges, Metrics, UploadGauges};
pub use crate::page::{counted, form, human_bytes, human_seconds};
use crate::store::LocalStore;
use crate::store::shared::SharingRules;
use crate::upload;

/// How long `/metrics` waits for the mesh: less than the patience of whoever scrapes it.
const GAUGES_TIMEOUT: Duration = Duration::from_secs(2);

/// What does not change while the node runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    pub peer_id: String,
    pub version: String,
    /// `None` on a machine that belongs to no mesh.
    pub mesh: Option<MeshAbout>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshAbout {
    pub key: String,
    /// `None` while there is no certificate.
    pub certificate: Option<CertificateAbout>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateAbout {
    pub name: String,
    pub permissions: String,
    /// Seconds since 1970.
    pub expires: u64,
}

/// The answer of `/api/v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    #[serde(flatten)]
    pub about: About,
    /// Paths that this node offers to others.
    pub paths_held: u64,
    pub peers: Vec<Peer>,
    /// Anchors and upstreams, in the order of the configuration.
    #[serde(default)]
    pub caches: Vec<Cache>,
    /// `None` where nothing is pushed by itself.
    #[serde(default)]
    pub upload: Option<upload::View>,
    /// NARs on their way to Nix.
    #[serde(default)]
    pub transfers: Vec<TransferView>,
    /// What Nix asked last, newest first.
    #[serde(default)]
    pub lookups: Vec<LookupView>,
    /// NAR bytes moved with peers since the start.
    pub bytes: Moved,
    pub narinfos: Answers,
    pub nars: Answers,
    /// What was counted in the last hours and days, restarts or not.
    #[serde(default)]
    pub history: Spans,
    /// NARs whose bytes did not have the promised hash.
    pub nars_mismatched: u64,
    pub store_errors: u64,
    /// Writes of the availability index that failed since the start.
    pub index_errors: u64,
    /// Connections refused and announcements passed over, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Number of the newest list of revocations; 0 before the first.
    #[serde(default)]
    pub revocations: u64,
    /// Interfaces on which this node keeps quiet, for they are on no network of `mesh.networks`.
    #[serde(default)]
    pub silent: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    pub peer_id: String,
    /// From its certificate, while it is linked.
    pub name: Option<String>,
    /// From its certificate: what it may do, and until when it is a member (seconds since 1970).
    #[serde(default)]
    pub permissions: Option<String>,
    #[serde(default)]
    pub expires: Option<u64>,
    /// 0 while it is linked, `None` if it was not since this node started.
    #[serde(default)]
    pub seen_seconds_ago: Option<u64>,
    pub address: Option<String>,
    /// `linked`, `greeting`, `dialling` or `away`.
    pub state: String,
    /// Paths it says it holds.
    pub paths: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub quarantine: Option<Quarantine>,
    /// Within what time it usually answers, once it has.
    #[serde(default)]
    pub answers_within_ms: Option<u64>,
    /// How fast NARs usually come from it, once one has.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    pub url: String,
    /// `anchor` or `upstream`.
    pub role: String,
    /// `None` while it is asked; otherwise it failed, and a probe is possible in so many seconds.
    pub failed_probe_in: Option<u64>,
    pub answers_within_ms: Option<u64>,
    pub bytes_per_second: Option<u64>,
    /// What an anchor of Granary told last of this cache of it; `None` while it told nothing.
    #[serde(default)]
    pub holds: Option<Told>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    pub seconds_left: u64,
    /// What the peer did.
    pub offence: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    pub sent: u64,
    pub received: u64,
}

/// Where answers to Nix came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    pub local: u64,
    pub peer: u64,
    #[serde(default)]
    pub anchor: u64,
    #[serde(default)]
    pub upstream: u64,
    pub absent: u64,
}

/// The answer of `/api/v1/why/<path>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    pub hash: String,
    /// Full store path, where known.
    pub path: Option<String>,
    /// HTTP status that Nix would get for the narinfo.
    pub status: u16,
    /// Where the answer would come from: `local`, `peer`, `anchor`, `upstream` or `nowhere`.
    pub source: String,
    /// For the local path: whether it is shared, and by which rule.
    pub sharing: Option<String>,
    /// Whether `granary hide` keeps it here, valid or not.
    #[serde(default)]
    pub hidden: bool,
    /// Public caches of the anchor in this process that hold it, so that members are told of it.
    #[serde(default)]
    pub published_by: Vec<String>,
    /// Peers that announced it.
    pub announced_by: Vec<String>,
    /// Those of them that may be asked now, best first.
    pub usable: Vec<String>,
    /// The reasons in sentences, in the order in which they count.
    pub reasons: Vec<String>,
}

/// Says which public caches of an anchor in this process hold a path, by name.
pub type Publishers = Box<dyn Fn(StorePathHash) -> BoxFuture<'static, Vec<String>> + Send + Sync>;

/// Where the facts come from.
pub struct Sources<'a> {
    pub about: &'a About,
    pub store: &'a dyn LocalStore,
    pub rules: &'a SharingRules,
    /// `None` beside no anchor.
    pub publishers: Option<&'a Publishers>,
    /// `None` while this node is linked to no mesh.
    pub mesh: Option<&'a MeshHandle>,
    /// Of this node.
    pub certificate: Option<CertificateAbout>,
    /// The caches outside the mesh, which anchors tell of.
    pub caches: Option<&'a Arc<WebCaches>>,
    pub upload: Option<upload::View>,
    pub metrics: &'a Metrics,
    pub activity: &'a Activity,
    pub history: Spans,
    /// Whether what members built themselves is believed.
    pub trusts_members: bool,
}

/// Gathers the report.
pub async fn report(sources: Sources<'_>) -> Report {
    let metrics = sources.metrics;
    let snapshot = match sources.mesh {
        Some(mesh) => mesh.snapshot().await,
        None => None,
    };
    let mut refusals = BTreeMap::new();
    let mut peers = Vec::new();
    let mut caches = Vec::new();
    let mut paths_held = 0;
    let mut index_errors = 0;
    let mut revocations = 0;
    let mut silent = Vec::new();
    if let Some(snapshot) = snapshot {
        silent = snapshot.silent;
        paths_held = snapshot.paths;
        index_errors = snapshot.index_errors;
        revocations = snapshot.revocations;
        for (word, count) in [
            ("announced_other_mesh", snapshot.foreign_announcements),
            ("announced_nonsense", snapshot.malformed_announcements),
        ] {
            if count > 0 {
                refusals.insert(word.to_owned(), count);
            }
        }
        for (refusal, count) in snapshot.refusals {
            refusals.insert(refusal.word().to_owned(), count);
        }
        for view in snapshot.peers {
            let moved = metrics.traffic.with(&view.peer);
            peers.push(Peer {
                peer_id: view.peer.to_string(),
                name: view.name,
                permissions: view.permissions.map(|one| one.to_string()),
                expires: view.expires.map(|at| at.0),
                seen_seconds_ago: view.seen.map(|ago| ago.as_secs()),
                address: view.address.map(|address| address.to_string()),
                state: view.state.word().to_owned(),
                paths: view.paths,
                bytes_sent: moved.sent,
                bytes_received: moved.received,
                quarantine: view.quarantine.map(|(left, offence)| Quarantine {
                    seconds_left: left.as_secs(),
                    offence: offence.to_owned(),
                }),
                answers_within_ms: view.answers_within.map(milliseconds),
                bytes_per_second: view.bytes_per_second,
            });
        }
        let cache = |(number, (url, view)): (usize, (Arc<str>, CacheView))| Cache {
            url: url.to_string(),
            role: view.role.word().to_owned(),
            failed_probe_in: match view.breaker {
                BreakerView::Closed => None,
                BreakerView::Open { probe_in } => Some(probe_in.as_secs()),
            },
            answers_within_ms: view.answers_within.map(milliseconds),
            bytes_per_second: view.bytes_per_second,
            holds: sources.caches.and_then(|caches| caches.stock(number)),
        };
        caches = snapshot.caches.into_iter().enumerate().map(cache).collect();
    }
    let refused = metrics.transfers_refused.get();
    if refused > 0 {
        refusals.insert("transfer".to_owned(), refused);
    }
    for (refused, count) in metrics.refusals.counts() {
        if count > 0 {
            refusals.insert(refused.word().to_owned(), count);
        }
    }
    for (outcome, count) in metrics.joins.counts() {
        if outcome != "admitted" && count > 0 {
            refusals.insert(format!("join_{outcome}"), count);
        }
    }
    let mut about = sources.about.clone();
    if let Some(mesh) = &mut about.mesh {
        mesh.certificate = sources.certificate;
    }
    let total = metrics.traffic.total();
    Report {
        about,
        silent,
        paths_held,
        peers,
        caches,
        upload: sources.upload,
        transfers: sources.activity.transfers(),
        lookups: sources.activity.lookups(),
        bytes: Moved {
            sent: total.sent,
            received: total.received,
        },
        narinfos: Answers {
            local: metrics.narinfos_local.get(),
            peer: metrics.narinfos_peer.get(),
            anchor: metrics.narinfos_anchor.get(),
            upstream: metrics.narinfos_upstream.get(),
            absent: metrics.narinfos_absent.get(),
        },
        nars: Answers {
            local: metrics.nars_local.get(),
            peer: metrics.nars_peer.get(),
            anchor: metrics.nars_anchor.get(),
            upstream: metrics.nars_upstream.get(),
            absent: metrics.nars_absent.get(),
        },
        history: sources.history,
        nars_mismatched: metrics.nars_mismatched.get(),
        store_errors: metrics.store_errors.get(),
        index_errors,
        refusals,
        revocations,
    }
}

/// Gathers what `/metrics` shows beside the counters. A mesh that does not answer in time counts as
/// not joined.
pub async fn gauges(
    is_ready: bool,
    mesh: Option<&MeshHandle>,
    upload: Option<&upload::View>,
) -> Gauges {
    let uploads = upload.map_or_else(UploadGauges::default, |view| UploadGauges {
        paths_waiting: view.paths_waiting,
        bytes_waiting: view.bytes_waiting,
        paths_failed: view.paths_failed,
        paths_pushed: view.paths_pushed,
        bytes_pushed: view.bytes_pushed,
        is_anchor_away: view.retry_in.is_some(),
    });
    let snapshot = match mesh {
        Some(mesh) => tokio::time::timeout(GAUGES_TIMEOUT, mesh.snapshot()).await,
        None => Ok(None),
    };
    let Ok(Some(snapshot)) = snapshot else {
        return Gauges {
            is_ready,
            uploads,
            ..Gauges::default()
        };
    };
    let is_linked = |view: &&granary_protocol::mesh::PeerView| view.state == PeerState::Linked;
    Gauges {
        is_ready,
        is_mesh_joined: true,
        peers_linked: snapshot.peers.iter().filter(is_linked).count() as u64,
        paths_held: snapshot.paths,
        index_errors: snapshot.index_errors,
        refusals: snapshot.refusals,
        uploads,
    }
}

/// Explains what Nix would be told about a path; `None` when the text names none.
pub async fn why(sources: Sources<'_>, text: &str) -> Option<Why> {
    let dir = sources.store.dir();
    let hash = hash_of(text, dir)?;
    let mut why = Why {
        hash: hash.to_string(),
        path: None,
        status: 404,
        source: "nowhere".into(),
        sharing: None,
        hidden: sources.rules.is_hidden(&hash),
        published_by: Vec::new(),
        announced_by: Vec::new(),
        usable: Vec::new(),
        reasons: Vec::new(),
    };
    match sources.store.path_info(hash).await {
        Ok(Some(info)) => {
            let sharing = sources.rules.decide(&info, dir);
            why.path = Some(dir.display(&info.store_path));
            why.status = 200;
            why.source = "local".into();
            why.reasons.push("valid in the local store".into());
            why.reasons.push(sharing.to_string());
            why.sharing = Some(sharing.to_string());
        }
        Ok(None) => why.reasons.push("not in the local store".into()),
        Err(error) => why
            .reasons
            .push(format!("the local store cannot be asked: {error}")),
    }
    if let Some(publishers) = sources.publishers {
        why.published_by = publishers(hash).await;
        if !why.published_by.is_empty() {
            let caches = why.published_by.as_slice();
            why.reasons.push(format!(
                "shared with members: the public {} {} of this machine's anchor {} it",
                form(caches.len() as u64, "cache", "caches"),
                caches.join(", "),
                form(caches.len() as u64, "publishes", "publish"),
            ));
        }
    }
    match sources.mesh {
        None => why.reasons.push("this node is linked to no mesh".into()),
        Some(mesh) => {
            if let Some(knowledge) = mesh.knowledge(hash).await {
                let name = |peer: &PeerId| {
                    let view = knowledge.peers.iter().find(|view| view.peer == *peer);
                    let name = view.and_then(|view| view.name.clone());
                    name.map_or_else(|| peer.to_string(), |name| format!("{name} ({peer})"))
                };
                why.announced_by = knowledge.announced_by.iter().map(name).collect();
                why.usable = knowledge.usable.iter().map(name).collect();
                for peer in &knowledge.announced_by {
                    if knowledge.usable.contains(peer) {
                        continue;
                    }
                    let view = knowledge.peers.iter().find(|view| view.peer == *peer);
                    why.reasons
                        .push(format!("{} holds it, but {}", name(peer), hindrance(view)));
                }
                if knowledge.announced_by.is_empty() {
                    why.reasons.push("no member announces it".into());
                }
            }
            let snapshot = mesh.snapshot().await;
            let (caches, peers) = snapshot.map_or_else(Default::default, |snapshot| {
                (snapshot.caches, snapshot.peers)
            });
            if why.status != 200 && !(why.usable.is_empty() && caches.is_empty()) {
                match mesh.lookup(hash).await {
                    LookupOutcome::Found {
                        narinfo,
                        providers,
                        caches: holders,
                    } => {
                        let cache = holders.first().filter(|_| providers.is_empty());
                        let cache = cache.and_then(|cache| caches.get(*cache));
                        found(&mut why, dir, &narinfo, cache, &peers);
                    }
                    LookupOutcome::NotFound => {
                        if !why.usable.is_empty() {
                            let whose = match sources.trusts_members {
                                true => ", nor may they vouch for it",
                                false => {
                                    "; trust.members is false, so their own word does not count"
                                }
                            };
                            why.reasons.push(format!("those who announce it gave no narinfo that a key in trust.keys signed{whose}"));
                        }
                        why.reasons.extend(caches.iter().map(of_no_help));
                    }
                }
            }
        }
    }
    Some(why)
}

/// What is to be said of a found narinfo, which is `cache`'s or else a member's.
fn found(
    why: &mut Why,
    dir: &StoreDir,
    narinfo: &VerifiedNarInfo,
    cache: Option<&(Arc<str>, CacheView)>,
    peers: &[granary_protocol::mesh::PeerView],
) {
    why.path = Some(dir.display(&narinfo.narinfo().store_path));
    why.status = 200;
    let (source, holder) = match cache {
        None => ("peer", "a member".to_owned()),
        Some((url, view)) => (view.role.word(), format!("{} {url}", view.role.word())),
    };
    why.source = source.into();
    why.reasons.push(match narinfo.proof() {
        Proof::Signed(key) => format!("{holder} holds it, signed by the trusted key {key}"),
        Proof::ContentAddressed => {
            format!("{holder} holds it, and its path follows from its contents")
        }
        Proof::Vouched(peer) => {
            let view = peers.iter().find(|view| view.peer == *peer);
            let name = view.and_then(|view| view.name.as_deref());
            let builder = name.map_or_else(|| peer.to_string(), |name| format!("{name} ({peer})"));
            format!("{holder} holds it, built by {builder}, who may vouch for that; signed for this machine by its loopback key")
        }
        Proof::Local => "valid in the local store".into(),
    });
}

/// Why a cache did not help with a path.
fn of_no_help((url, view): &(Arc<str>, CacheView)) -> String {
    let role = view.role.word();
    match view.breaker {
        BreakerView::Open { probe_in } => format!(
            "{role} {url} does not answer, it is asked again in {} s at the earliest",
            probe_in.as_secs()
        ),
        BreakerView::Closed => {
            format!("{role} {url} gave no narinfo of it that a trusted key signed")
        }
    }
}

fn hindrance(view: Option<&granary_protocol::mesh::PeerView>) -> String {
    match view {
        None => "it is not known where that peer is".into(),
        Some(view) => match (&view.quarantine, view.state) {
            (Some((left, offence)), _) => {
                format!("it is in quarantine for {} s: it {offence}", left.as_secs())
            }
            (None, PeerState::Linked) => "it offers no transfers".into(),
            (None, state) => format!("it is {}", state.word()),
        },
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Reads a full store path, a base name or a hash.
pub fn hash_of(text: &str, dir: &StoreDir) -> Option<StorePathHash> {
    let base_name = text
        .strip_prefix(dir.as_str())
        .map_or(text, |rest| rest.trim_start_matches('/'));
    // A file inside a store path is a question about that path.
    let base_name = base_name.split('/').next()?;
    let path = StorePath::from_base_name(base_name).map(|path| path.hash());
    path.ok().or_else(|| base_name.parse().ok())
}

/// A report or explanation as JSON.
pub fn to_json(value: &impl Serialize) -> String {
    // These types have no maps with keys that are not text, the only thing that can fail.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

/// Says until when something holds; `at` is unix time.
fn until(at: u64) -> String {
    date(at).map_or_else(|| "for good".to_owned(), |date| format!("until {date}"))
}

/// A date of HTTP (RFC 9110 §5.6.7); `None` beyond the last that it can say, the end of the year 9999.
fn date(at: u64) -> Option<String> {
    const DATES_END: u64 = 253_402_300_800;
    let at = (at < DATES_END).then(|| UNIX_EPOCH + Duration::from_secs(at));
    at.map(httpdate::fmt_http_date)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "node      {}", self.about.peer_id)?;
        writeln!(f, "version   {}", self.about.version)?;
        match &self.about.mesh {
            None => writeln!(f, "mesh      none (mesh.key is not set)")?,
            Some(mesh) => {
                writeln!(f, "mesh      {}", mesh.key)?;
                match &mesh.certificate {
                    None => writeln!(f, "member    no: there is no certificate")?,
                    Some(certificate) => writeln!(
                        f,
                        "member    as {} ({}), {}",
                        certificate.name,
                        certificate.permissions,
                        until(certificate.expires)
                    )?,
                }
            }
        }
        writeln!(f, "shares    {}", counted(self.paths_held, "path"))?;
        writeln!(
            f,
            "moved     {} sent, {} received",
            human_bytes(self.bytes.sent),
            human_bytes(self.bytes.received)
        )?;
        let answers = |answers: &Answers| {
            format!(
                "{} local, {} from peers, {} from anchors, {} from upstreams, {} absent",
                answers.local, answers.peer, answers.anchor, answers.upstream, answers.absent
            )
        };
        writeln!(f, "narinfos  {}", answers(&self.narinfos))?;
        writeln!(f, "nars      {}", answers(&self.nars))?;
        writeln!(
            f,
            "saved     {} came from peers in the last 24 hours, {} in 30 days",
            human_bytes(Spans::total(&self.history.hours).peer_bytes),
            human_bytes(Spans::total(&self.history.days).peer_bytes),
        )?;
        if self.nars_mismatched > 0 {
            writeln!(
                f,
                "wrong     {} had other bytes than promised",
                counted(self.nars_mismatched, "NAR")
            )?;
        }
        if !self.silent.is_empty() {
            writeln!(
                f,
                "silent    on {}: on no network of mesh.networks",
                self.silent.join(", ")
            )?;
        }
        for (reason, count) in &self.refusals {
            writeln!(f, "refused   {count} × {reason}")?;
        }
        for one in &self.transfers {
            let percent = one.bytes.saturating_mul(100) / one.nar_size.max(1);
            write!(
                f,
                "fetching  {percent:>3} % of {}  {}",
                human_bytes(one.nar_size),
                one.path
            )?;
            if let Some(peer_id) = &one.peer_id {
                let sender = self.peers.iter().find(|peer| peer.peer_id == *peer_id);
                let name = sender.and_then(|peer| peer.name.as_ref());
                write!(f, " from {}", name.unwrap_or(peer_id))?;
            }
            writeln!(f)?;
        }
        if self.peers.is_empty() {
            writeln!(f, "peers     none")?;
        }
        for peer in &self.peers {
            write!(
                f,
                "peer      {:<9} {:<16} {:<22} {:>13}  ↑ {}  ↓ {}  {}",
                peer.state,
                peer.name.as_deref().unwrap_or("-"),
                peer.address.as_deref().unwrap_or("-"),
                counted(peer.paths, "path"),
                human_bytes(peer.bytes_sent),
                human_bytes(peer.bytes_received),
                peer.peer_id,
            )?;
            if let Some(quarantine) = &peer.quarantine {
                write!(
                    f,
                    "  quarantine {} s: {}",
                    quarantine.seconds_left, quarantine.offence
                )?;
            }
            writeln!(f)?;
        }
        for cache in &self.caches {
            write!(f, "{:<9} {}", cache.role, cache.url)?;
            if let Some(within) = cache.answers_within_ms {
                write!(f, "  answers within {within} ms")?;
            }
            if let Some(speed) = cache.bytes_per_second {
                write!(f, "  {}/s", human_bytes(speed))?;
            }
            if let Some(probe_in) = cache.failed_probe_in {
                write!(f, "  failed, asked again in {probe_in} s at the earliest")?;
            }
            writeln!(f)?;
            if let Some(told) = &cache.holds {
                write_stock(f, told)?;
            }
        }
        if let Some(upload) = &self.upload {
            writeln!(
                f,
                "pushes    {} ({}) {} for {}; {} ({}) pushed",
                counted(upload.paths_waiting, "path"),
                human_bytes(upload.bytes_waiting),
                form(upload.paths_waiting, "waits", "wait"),
                upload.cache,
                upload.paths_pushed,
                human_bytes(upload.bytes_pushed),
            )?;
            for one in &upload.current {
                let percent = one.bytes.saturating_mul(100) / one.nar_size.max(1);
                writeln!(
                    f,
                    "  sending {percent:>3} % of {}  {}",
                    human_bytes(one.nar_size),
                    one.path
                )?;
            }
            if upload.paths_staying > 0 {
                writeln!(
                    f,
                    "  staying {} that {} not to leave this machine",
                    counted(upload.paths_staying, "path"),
                    form(upload.paths_staying, "is", "are")
                )?;
            }
            if let Some(problem) = &upload.problem {
                writeln!(f, "  problem {problem}")?;
            }
            if let Some(seconds) = upload.retry_in {
                writeln!(f, "  pausing tried again in {seconds} s")?;
            }
        }
        Ok(())
    }
}

fn write_stock(f: &mut fmt::Formatter<'_>, told: &Told) -> fmt::Result {
    let Told {
        seconds_ago,
        stock: of,
    } = told;
    write!(
        f,
        "  holds   {}, {} in {} of storage",
        counted(of.paths, "path"),
        human_bytes(of.nar_bytes),
        human_bytes(of.stored_bytes),
    )?;
    if let Some((bytes, word)) = of.limit() {
        write!(f, " of {} ({word})", human_bytes(bytes))?;
    }
    let readers = match of.public {
        true => "anybody reads it",
        false => "private",
    };
    write!(f, "; {readers}, keeps ")?;
    match of.retention {
        Some(seconds) => write!(f, "what was used within {}", human_seconds(seconds))?,
        None => write!(f, "all")?,
    }
    if of.arriving > 0 {
        write!(f, "; {} coming in", counted(of.arriving, "path"))?;
    }
    writeln!(f, "; told {} ago", human_seconds(*seconds_ago))?;
    if let Some(last) = &of.collected {
        let ago = human_seconds(last.seconds_ago);
        match &last.refused {
            None => {
                let paths = counted(last.paths, "path");
                writeln!(f, "  garbage collected {ago} ago, {paths} taken out")
            }
            Some(why) => writeln!(f, "  garbage not collected {ago} ago: {why}"),
        }?;
    }
    Ok(())
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path.as_deref().unwrap_or(&self.hash))?;
        let source = match self.source.as_str() {
            "nowhere" => String::new(),
            source => format!(
                " from the {}",
                match source {
                    "local" => "local store",
                    "peer" => "mesh",
                    cache => cache,
                }
            ),
        };
        writeln!(f, "answer to Nix: {}{source}", self.status)?;
        for reason in &self.reasons {
            writeln!(f, "  - {reason}")?;
        }
        for holder in &self.announced_by {
            let note = if self.usable.contains(holder) {
                ""
            } else {
                " (not usable now)"
            };
            writeln!(f, "held by {holder}{note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_a_date_for_people() {
        assert_eq!(until(1_798_214_377), "until Fri, 25 Dec 2026 15:59:37 GMT");
        assert_eq!(
            until(253_402_300_799),
            "until Fri, 31 Dec 9999 23:59:59 GMT"
        );
        assert_eq!(until(253_402_300_800), "for good");
        assert_eq!(until(u64::MAX), "for good");
    }

    #[test]
    fn paths_base_names_and_hashes_name_the_same() {
        let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
        for text in [
            hash.to_owned(),
            format!("{hash}-net-tools-1.60"),
            format!("/nix/store/{hash}-net-tools-1.60"),
            format!("/nix/store/{hash}-net-tools-1.60/bin/arp"),
        ] {
            assert_eq!(
                hash_of(&text, &StoreDir::default()),
                Some(hash.parse().unwrap()),
                "{text}"
            );
        }
        assert_eq!(hash_of("/nix/store", &StoreDir::default()), None);
        assert_eq!(hash_of("hello", &StoreDir::default()), None);
    }
}
