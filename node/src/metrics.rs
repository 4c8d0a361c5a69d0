//! Metrics: what this node counts about itself, shown by `granary status` and `/metrics`.
//!
//! Counters only grow, and each is there from the start, so that the first failure is a change.
//! Peers are not labels of anything; the bytes moved with each are kept apart in [`Traffic`],
//! bounded by the number of members. `/metrics` ([`Metrics::exposition`]) is Prometheus' text format,
//! version 0.0.4; the unit is the last word of a name, before `_total`:
//!
//! | name | labels | |
//! |---|---|---|
//! | `granary_build_info` | `version` | always 1 |
//! | `granary_http_requests_total` | `route`, `status` | requests of Nix and others on the endpoint; `route` one of [`ROUTES`] |
//! | `granary_narinfo_seconds` | `le` | time to an answer about a narinfo |
//! | `granary_narinfos_total` | `source`: `local`, `peer`, `absent` | narinfos, by where the answer came from |
//! | `granary_nars_total` | the same | NARs |
//! | `granary_nar_bytes_total` | `source`: `peer`, `anchor`, `upstream` | NAR bytes brought for Nix, uncompressed |
//! | `granary_nars_mismatched_total` | | NARs whose bytes had another hash than promised |
//! | `granary_transfers_refused_total` | | connections to the transfer port without admission |
//! | `granary_refusals_total` | `reason` one of [`Refused`] and the mind's [`Refusal`] | peers, strangers and requests that were refused or made to wait |
//! | `granary_joins_total` | `outcome` one of [`JOIN_OUTCOMES`] | machines that asked this one to be admitted |
//! | `granary_transfer_bytes_total` | `direction`: `sent`, `received` | NAR bytes moved with peers |
//! | `granary_share_requests_total` | `to`: `lan`, `strangers`; `outcome`: `served`, `absent`, `refused` | requests of machines without Granary (`share.http`), and of strangers (`share.public`) |
//! | `granary_share_nar_bytes_total` | `to` | NAR bytes sent to them |
//! | `granary_share_connections_dropped_total` | `to` | connections of theirs that were too many |
//! | `granary_store_errors_total` | | the local store could not be read |
//! | `granary_index_errors_total` | | writes of the availability index that failed |
//! | `granary_ready` | | 1 once the store is open |
//! | `granary_mesh_joined` | | 1 while the mesh answers |
//! | `granary_peers_linked` | | members this node is linked to |
//! | `granary_paths_held` | | paths offered to others |
//! | `granary_uploads_total` | | paths pushed to the anchor by the node itself |
//! | `granary_upload_nar_bytes_total` | | bytes of their NARs, uncompressed |
//! | `granary_upload_paths_waiting` | | paths in the upload queue |
//! | `granary_upload_paths_failed` | | those of them that were refused before |
//! | `granary_upload_nar_bytes_waiting` | | bytes of the waiting NARs, without what they reference |
//! | `granary_upload_anchor_away` | | 1 while pushes wait for the anchor |

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use granary_protocol::mesh::{CacheRole, Refusal};
use granary_protocol::peer::PeerId;
use http::StatusCode;
use serde::Serialize;

/// Peers whose traffic is remembered; more than a mesh has members.
const PEERS_MAX: usize = 1024;

/// The values of the label `route`.
pub const ROUTES: [&str; 10] = [
    "about",
    "browse",
    "cache-info",
    "debuginfo",
    "listing",
    "log",
    "nar",
    "narinfo",
    "trace",
    "unknown",
];

/// The values of the label `status`; any other is counted as the last.
const STATUSES: [u16; 6] = [200, 206, 403, 404, 416, 503];

/// Upper bounds of the buckets of [`Histogram`], in microseconds: from a hit in memory to the
/// longest that a narinfo may wait.
const BUCKETS_US: [u64; 10] = [
    500, 1_000, 2_500, 5_000, 20_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000,
];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    /// narinfos answered from the local store.
    pub narinfos_local: Counter,
    /// narinfos answered by asking peers.
    pub narinfos_peer: Counter,
    /// narinfos answered by asking anchors.
    pub narinfos_anchor: Counter,
    /// narinfos answered by asking upstreams.
    pub narinfos_upstream: Counter,
    /// narinfos answered with 404.
    pub narinfos_absent: Counter,
    /// NARs started from the local store for Nix.
    pub nars_local: Counter,
    /// NARs brought whole and proved whose end came from a peer.
    pub nars_peer: Counter,
    /// NARs whose end came from an anchor.
    pub nars_anchor: Counter,
    /// NARs whose end came from an upstream.
    pub nars_upstream: Counter,
    /// NARs that were asked for and could not be brought.
    pub nars_absent: Counter,
    /// NAR bytes brought for Nix, uncompressed, whole or not, by where they came from.
    pub nar_bytes_peer: Counter,
    pub nar_bytes_anchor: Counter,
    pub nar_bytes_upstream: Counter,
    /// NARs whose bytes did not have the promised NarHash.
    pub nars_mismatched: Counter,
    /// Connections to the transfer port by peers that are not admitted, or that failed the handshake.
    pub transfers_refused: Counter,
    /// What was refused, by the node's hands.
    pub refusals: Refusals,
    /// Machines that asked to be admitted, where the mesh key is.
    pub joins: Joins,
    /// What machines without Granary were given over the LAN.
    pub lan: Arc<Share>,
    /// What strangers were given.
    pub strangers: Arc<Share>,
    /// Errors of the local store's database while answering.
    pub store_errors: Counter,
    /// NAR bytes moved with peers.
    pub traffic: Traffic,
    /// NAR bytes that went to peers packed, and what they took on the wire.
    pub packed_bytes: Counter,
    pub packed_wire_bytes: Counter,
    /// Requests to the endpoint.
    pub requests: Requests,
    /// Time to an answer about a narinfo.
    pub narinfo_time: Histogram,
}

/// What `/metrics` shows beside the counters: how things stand.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    pub is_ready: bool,
    pub is_mesh_joined: bool,
    pub peers_linked: u64,
    pub paths_held: u64,
    /// Counted by the mesh.
    pub index_errors: u64,
    /// Counted by the mind; what is not listed did not happen.
    pub refusals: Vec<(Refusal, u64)>,
    pub uploads: UploadGauges,
}

/// How the node's own pushes stand. All 0 where it pushes nothing by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct UploadGauges {
    pub paths_waiting: u64,
    pub bytes_waiting: u64,
    pub paths_failed: u64,
    /// Since the start.
    pub paths_pushed: u64,
    pub bytes_pushed: u64,
    pub is_anchor_away: bool,
}

/// Why something was refused, or made to wait, before the mind heard of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A Host header that is not ours: a web page whose name was made to lead here.
    Host,
    /// A request that is no HTTP, too long, or that another reader could take for a different one.
    Malformed,
    /// A request to the transfer port by who is no member.
    NotAdmitted,
    /// A handshake with the transfer port that led nowhere.
    Handshake,
    /// A stranger made room for another one.
    Crowded,
    /// An address was a stranger's too often in a short time.
    TooOften,
    /// A member has as many connections to the transfer port as it may, or made them too fast.
    Connections,
    /// A member has as many NARs under way as it may.
    Streams,
    /// A member asked faster than it may on the transfer port, and waited.
    RequestsSlowed,
    /// A member, or a stranger, said more than it may on the control plane, and was made to wait.
    MessagesSlowed,
}

impl Refused {
    pub const ALL: [Refused; 10] = [
        Refused::Host,
        Refused::Malformed,
        Refused::NotAdmitted,
        Refused::Handshake,
        Refused::Crowded,
        Refused::TooOften,
        Refused::Connections,
        Refused::Streams,
        Refused::RequestsSlowed,
        Refused::MessagesSlowed,
    ];

    /// The label of its counter.
    pub fn word(self) -> &'static str {
        match self {
            Refused::Host => "foreign_host",
            Refused::Malformed => "malformed",
            Refused::NotAdmitted => "not_admitted",
            Refused::Handshake => "handshake",
            Refused::Crowded => "crowded",
            Refused::TooOften => "too_often",
            Refused::Connections => "connections",
            Refused::Streams => "streams",
            Refused::RequestsSlowed => "requests_slowed",
            Refused::MessagesSlowed => "messages_slowed",
        }
    }
}

/// Counts what was refused.
#[derive(Debug, Default)]
pub struct Refusals([Counter; Refused::ALL.len()]);

impl Refusals {
    pub fn counts(&self) -> impl Iterator<Item = (Refused, u64)> + '_ {
        Refused::ALL
            .into_iter()
            .zip(self.0.iter().map(Counter::get))
    }
}

/// What became of machines that asked to be admitted: the words of a refusal, and what came to no answer.
pub const JOIN_OUTCOMES: [&str; 11] = [
    "admitted",
    "unknown_ticket",
    "expired_ticket",
    "used_ticket",
    "revoked",
    "no_member",
    "trouble",
    "pending",
    "crowded",
    // There were too many at once.
    "dropped",
    "broken_off",
];

/// Machines that asked to be admitted, by what became of it.
#[derive(Debug, Default)]
pub struct Joins([Counter; JOIN_OUTCOMES.len()]);

impl Joins {
    /// Counts one; `outcome` is one of [`JOIN_OUTCOMES`].
    pub fn count(&self, outcome: &str) {
        let known = JOIN_OUTCOMES.iter().position(|known| *known == outcome);
        self.0[known.unwrap_or(JOIN_OUTCOMES.len() - 1)].add(1);
    }

    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        JOIN_OUTCOMES
            .into_iter()
            .zip(self.0.iter().map(Counter::get))
    }
}

/// What those were given who are no members.
#[derive(Debug, Default)]
pub struct Share {
    served: Counter,
    absent: Counter,
    /// For want of a token, or for a foreign name in Host.
    refused: Counter,
    pub nar_bytes: Counter,
    pub connections_dropped: Counter,
}

impl Share {
    /// Counts an answer.
    pub fn count(&self, status: StatusCode) {
        let counter = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => &self.refused,
            status if status.is_success() => &self.served,
            _ => &self.absent,
        };
        counter.add(1);
    }
}

/// Requests by route and status.
#[derive(Debug, Default)]
pub struct Requests([[Counter; STATUSES.len()]; ROUTES.len()]);

impl Requests {
    /// Counts one; `route` is one of [`ROUTES`].
    pub fn count(&self, route: &str, status: u16) {
        let row = ROUTES.iter().position(|known| *known == route);
        let column = STATUSES.iter().position(|known| *known == status);
        let row = &self.0[row.unwrap_or(ROUTES.len() - 1)];
        row[column.unwrap_or(STATUSES.len() - 1)].add(1);
    }
}

/// How long something took, in buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    /// Each counts what fell into it alone; the last has what is longer than every bound.
    buckets: [Counter; BUCKETS_US.len() + 1],
    sum_us: Counter,
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|bound| *bound < us);
        self.buckets[bucket].add(1);
        self.sum_us.add(us);
    }
}

impl Metrics {
    /// Counts something that was refused.
    pub fn refused(&self, why: Refused) {
        // In the order of `ALL`, which is that of the declaration.
        self.refusals.0[why as usize].add(1);
    }

    pub fn refused_count(&self, why: Refused) -> u64 {
        self.refusals.0[why as usize].get()
    }

    /// Writes everything in Prometheus' text format.
    pub fn exposition(&self, gauges: Gauges) -> String {
        let mut out = Exposition::default();
        let version = env!("CARGO_PKG_VERSION");
        out.family("granary_build_info", "gauge", "The version that runs.");
        out.sample("granary_build_info", &format!("version=\"{version}\""), 1);

        let name = "granary_http_requests_total";
        out.family(name, "counter", "Requests to the endpoint that Nix asks.");
        for (route, row) in ROUTES.iter().zip(&self.requests.0) {
            for (status, count) in STATUSES.iter().zip(row) {
                let labels = format!("route=\"{route}\",status=\"{status}\"");
                out.sample(name, &labels, count.get());
            }
        }
        out.histogram(
            "granary_narinfo_seconds",
            "Time to an answer about a narinfo.",
            &self.narinfo_time,
        );
        let sources = |out: &mut Exposition, name, help, counts: [&Counter; 5]| {
            out.family(name, "counter", help);
            let words = ["local", "peer", "anchor", "upstream", "absent"];
            for (source, count) in words.iter().zip(counts) {
                out.sample(name, &format!("source=\"{source}\""), count.get());
            }
        };
        sources(
            &mut out,
            "granary_narinfos_total",
            "Narinfos by where the answer came from.",
            [
                &self.narinfos_local,
                &self.narinfos_peer,
                &self.narinfos_anchor,
                &self.narinfos_upstream,
                &self.narinfos_absent,
            ],
        );
        sources(
            &mut out,
            "granary_nars_total",
            "NARs by where they came from.",
            [
                &self.nars_local,
                &self.nars_peer,
                &self.nars_anchor,
                &self.nars_upstream,
                &self.nars_absent,
            ],
        );
        let name = "granary_nar_bytes_total";
        let help = "NAR bytes brought for Nix, uncompressed, by where they came from.";
        out.family(name, "counter", help);
        for kind in [SourceKind::Peer, SourceKind::Anchor, SourceKind::Upstream] {
            let labels = format!("source=\"{}\"", kind.word());
            out.sample(name, &labels, kind.nar_bytes(self).get());
        }
        for (name, help, count) in [
            (
                "granary_nars_mismatched_total",
                "NARs whose bytes had another hash than promised.",
                self.nars_mismatched.get(),
            ),
            (
                "granary_transfers_refused_total",
                "Connections to the transfer port without admission.",
                self.transfers_refused.get(),
            ),
            (
                "granary_store_errors_total",
                "Times that the local store could not be read.",
                self.store_errors.get(),
            ),
            (
                "granary_index_errors_total",
                "Writes of the availability index that failed.",
                gauges.index_errors,
            ),
            (
                "granary_uploads_total",
                "Paths pushed to the anchor by the node itself.",
                gauges.uploads.paths_pushed,
            ),
            (
                "granary_upload_nar_bytes_total",
                "Bytes of NARs pushed to the anchor, uncompressed.",
                gauges.uploads.bytes_pushed,
            ),
        ] {
            out.family(name, "counter", help);
            out.sample(name, "", count);
        }
        let name = "granary_refusals_total";
        out.family(
            name,
            "counter",
            "Peers, strangers and requests that were refused or made to wait.",
        );
        for (refused, count) in self.refusals.counts() {
            out.sample(name, &format!("reason=\"{}\"", refused.word()), count);
        }
        for refusal in Refusal::ALL {
            let counted = gauges.refusals.iter().find(|(known, _)| *known == refusal);
            let count = counted.map_or(0, |(_, count)| *count);
            out.sample(name, &format!("reason=\"{refusal}\""), count);
        }
        let name = "granary_joins_total";
        out.family(
            name,
            "counter",
            "Machines that asked this one to be admitted to the mesh.",
        );
        for (outcome, count) in self.joins.counts() {
            out.sample(name, &format!("outcome=\"{outcome}\""), count);
        }
        self.shares(&mut out);
        let moved = self.traffic.total();
        let name = "granary_transfer_bytes_total";
        out.family(name, "counter", "NAR bytes moved with peers.");
        out.sample(name, "direction=\"sent\"", moved.sent);
        out.sample(name, "direction=\"received\"", moved.received);
        let name = "granary_packed_bytes_total";
        let help =
            "NAR bytes sent to peers packed, as zstd finds them and as they went over the wire.";
        out.family(name, "counter", help);
        out.sample(name, "form=\"nar\"", self.packed_bytes.get());
        out.sample(name, "form=\"wire\"", self.packed_wire_bytes.get());
        for (name, help, value) in [
            (
                "granary_ready",
                "1 once the store is open.",
                u64::from(gauges.is_ready),
            ),
            (
                "granary_mesh_joined",
                "1 while the mesh answers.",
                u64::from(gauges.is_mesh_joined),
            ),
            (
                "granary_peers_linked",
                "Members this node is linked to.",
                gauges.peers_linked,
            ),
            (
                "granary_paths_held",
                "Paths offered to others.",
                gauges.paths_held,
            ),
            (
                "granary_upload_paths_waiting",
                "Paths in the upload queue.",
                gauges.uploads.paths_waiting,
            ),
            (
                "granary_upload_paths_failed",
                "Paths in the upload queue that were refused before.",
                gauges.uploads.paths_failed,
            ),
            (
                "granary_upload_nar_bytes_waiting",
                "Bytes of the NARs in the upload queue, without what they reference.",
                gauges.uploads.bytes_waiting,
            ),
            (
                "granary_upload_anchor_away",
                "1 while pushes wait for the anchor.",
                u64::from(gauges.uploads.is_anchor_away),
            ),
        ] {
            out.family(name, "gauge", help);
            out.sample(name, "", value);
        }
        out.into_text()
    }
}

impl Metrics {
    fn shares(&self, out: &mut Exposition) {
        let shares = [("lan", &self.lan), ("strangers", &self.strangers)];
        let name = "granary_share_requests_total";
        let help =
            "Requests of machines without Granary (share.http), and of strangers (share.public).";
        out.family(name, "counter", help);
        for (to, share) in shares {
            for (outcome, count) in [
                ("served", &share.served),
                ("absent", &share.absent),
                ("refused", &share.refused),
            ] {
                let labels = format!("to=\"{to}\",outcome=\"{outcome}\"");
                out.sample(name, &labels, count.get());
            }
        }
        let name = "granary_share_nar_bytes_total";
        out.family(name, "counter", "NAR bytes sent to them.");
        for (to, share) in shares {
            out.sample(name, &format!("to=\"{to}\""), share.nar_bytes.get());
        }
        let name = "granary_share_connections_dropped_total";
        out.family(name, "counter", "Connections of theirs that were too many.");
        for (to, share) in shares {
            let dropped = share.connections_dropped.get();
            out.sample(name, &format!("to=\"{to}\""), dropped);
        }
    }
}

/// The text format as it is written. Writing to text does not fail.
#[derive(Default)]
pub struct Exposition(String);

impl Exposition {
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub fn sample(&mut self, name: &str, labels: &str, value: u64) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    pub fn into_text(self) -> String {
        self.0
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, "histogram", help);
        let mut count = 0;
        let bounds = BUCKETS_US.iter().map(|us| (*us as f64 / 1e6).to_string());
        let bounds = bounds.chain(["+Inf".to_owned()]);
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            count += bucket.get();
            self.sample(&format!("{name}_bucket"), &format!("le=\"{bound}\""), count);
        }
        let _ = writeln!(self.0, "{name}_sum {}", histogram.sum_us.get() as f64 / 1e6);
        self.sample(&format!("{name}_count"), "", count);
    }
}

/// Which kind of source something came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    Peer,
    Anchor,
    Upstream,
}

impl SourceKind {
    /// `None` is a cache that is not configured, which nothing comes from.
    pub fn of(role: Option<&CacheRole>) -> SourceKind {
        match role {
            Some(CacheRole::Anchor) => SourceKind::Anchor,
            Some(CacheRole::Upstream | CacheRole::Strangers) | None => SourceKind::Upstream,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            SourceKind::Peer => "peer",
            SourceKind::Anchor => "anchor",
            SourceKind::Upstream => "upstream",
        }
    }

    pub fn narinfos(self, metrics: &Metrics) -> &Counter {
        match self {
            SourceKind::Peer => &metrics.narinfos_peer,
            SourceKind::Anchor => &metrics.narinfos_anchor,
            SourceKind::Upstream => &metrics.narinfos_upstream,
        }
    }

    pub fn nars(self, metrics: &Metrics) -> &Counter {
        match self {
            SourceKind::Peer => &metrics.nars_peer,
            SourceKind::Anchor => &metrics.nars_anchor,
            SourceKind::Upstream => &metrics.nars_upstream,
        }
    }

    pub fn nar_bytes(self, metrics: &Metrics) -> &Counter {
        match self {
            SourceKind::Peer => &metrics.nar_bytes_peer,
            SourceKind::Anchor => &metrics.nar_bytes_anchor,
            SourceKind::Upstream => &metrics.nar_bytes_upstream,
        }
    }
}

/// NAR bytes moved with each peer.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<BTreeMap<PeerId, Bytes>>);

/// NAR bytes in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    pub sent: u64,
    pub received: u64,
}

impl Traffic {
    pub fn sent(&self, peer: &PeerId, bytes: u64) {
        self.change(peer, |moved| moved.sent += bytes);
    }

    pub fn received(&self, peer: &PeerId, bytes: u64) {
        self.change(peer, |moved| moved.received += bytes);
    }

    pub fn with(&self, peer: &PeerId) -> Bytes {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers.get(peer).copied().unwrap_or_default()
    }

    pub fn total(&self) -> Bytes {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers.values().fold(Bytes::default(), |total, moved| Bytes {
            sent: total.sent + moved.sent,
            received: total.received + moved.received,
        })
    }

    fn change(&self, peer: &PeerId, change: impl FnOnce(&mut Bytes)) {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.contains_key(peer) || peers.len() < PEERS_MAX {
            change(peers.entry(*peer).or_default());
        }
    }
}
