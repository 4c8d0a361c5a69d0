//! The status page: a [`Report`] as HTML, for a browser on this machine.
//!
//! Its frame, style, script and policy are those of every page ([`crate::page`]).

use granary_protocol::certificate::UnixTime;
use maud::{Markup, html};

use super::chart::history;
use super::{Answers, Cache, Peer, Report, Why, counted, form, human_bytes, human_seconds};
use crate::activity::{LookupView, TransferView};
use crate::binary_cache::{Collected, Told};
use crate::page::Frame;
pub use crate::page::policy;

const SECONDS_PER_DAY: u64 = 86_400;

/// A certificate that ends within so many days is shown as trouble.
const CERTIFICATE_WARNING_DAYS: u64 = 3;

/// A cache that is so full, in hundredths of its quota, is shown as trouble, as on the anchor's page.
const FULL_PERCENT: u64 = 90;

/// The page while the store is not open.
pub fn starting() -> String {
    let section = html! {
        section #node.wide {
            h2 { "Starting" }
            p { "The store is not open yet. Nix hears that nothing is here, and goes on." }
        }
    };
    whole("starting", &section, true)
}

/// The page about a running node; `now` is for how long the certificate lasts.
pub fn page(report: &Report, now: UnixTime) -> String {
    let certificate = report
        .about
        .mesh
        .as_ref()
        .and_then(|mesh| mesh.certificate.as_ref());
    let name = certificate.map_or("this node", |certificate| &certificate.name);
    let sections = html! {
        (trouble(report, now))
        (node(report, now))
        (sources(report))
        (history(&report.history, now))
        (transfers(report))
        (peers(&report.peers))
        (caches(report))
        @for (number, cache) in report.caches.iter().enumerate() {
            @if let Some(told) = &cache.holds { (anchor(number, &cache.url, told)) }
        }
        (lookups(&report.lookups))
    };
    whole(name, &sections, true)
}

/// The page that explains the answer about one path; `None` when the text names none.
pub fn why(asked: &str, why: Option<&Why>) -> String {
    let section = html! {
        section #why.wide {
            h2 { "Why" }
            (question(asked))
            @match why {
                None => p.bad { "That is no store path and no hash of one." },
                Some(why) => {
                    p { code { (why.path.as_deref().unwrap_or(&why.hash)) } }
                    p {
                        "Nix is told " strong { (why.status) }
                        @if why.source != "nowhere" { ", from: " strong { (why.source) } }
                    }
                    ul { @for reason in &why.reasons { li { (reason) } } }
                    @if !why.announced_by.is_empty() {
                        p { "Held by" }
                        ul {
                            @for holder in &why.announced_by {
                                li {
                                    code { (holder) }
                                    @if !why.usable.contains(holder) { " (not usable now)" }
                                }
                            }
                        }
                    }
                },
            }
            p { a href="/" { "Back to the node" } }
        }
    };
    // Not renewed, which would ask the mesh again each time.
    whole("why", &section, false)
}

fn whole(title: &str, sections: &Markup, is_renewed: bool) -> String {
    let frame = Frame {
        title,
        role: "node",
        aside: html! {},
        footer: html! { "The same for scripts: " a href="/api/v1/status" { "JSON" } ", " a href="/metrics" { "metrics" } "." },
        is_renewed,
    };
    frame.around(sections)
}

fn trouble(report: &Report, now: UnixTime) -> Markup {
    let mut said = Vec::new();
    if let Some(mesh) = &report.about.mesh {
        match &mesh.certificate {
            None => said.push(
                "Not a member yet: there is no certificate. Other nodes do not talk to this one."
                    .to_owned(),
            ),
            Some(certificate) if certificate.expires <= now.0 => {
                said.push(
                    "The certificate has expired. Other nodes do not talk to this one.".to_owned(),
                );
            }
            Some(certificate) if days(certificate.expires, now) < CERTIFICATE_WARNING_DAYS => {
                said.push("The certificate ends within three days.".to_owned());
            }
            Some(_) => {}
        }
    }
    for (count, noun, text) in [
        (
            report.store_errors,
            "time",
            "the local store could not be read",
        ),
        (
            report.index_errors,
            "write",
            "of the availability index failed",
        ),
        (
            report.nars_mismatched,
            "NAR",
            "had other bytes than promised, which never reach Nix whole",
        ),
    ] {
        if count > 0 {
            said.push(format!("{} {text}.", counted(count, noun)));
        }
    }
    let failed = report
        .caches
        .iter()
        .filter_map(|cache| Some((cache, cache.failed_probe_in?)));
    for (cache, probe_in) in failed {
        said.push(format!(
            "{} {} does not answer; asked again in {probe_in} s at the earliest.",
            cache.role, cache.url
        ));
    }
    for cache in &report.caches {
        let Some(told) = &cache.holds else { continue };
        let refused = told.stock.collected.as_ref();
        if let Some(why) = refused.and_then(|last| last.refused.as_ref()) {
            said.push(format!(
                "Garbage of {} was not collected: {why}.",
                cache.url
            ));
        }
        let quota = told.stock.quota.filter(|quota| {
            let full = u128::from(told.stock.stored_bytes) * 100;
            full >= u128::from(*quota) * u128::from(FULL_PERCENT)
        });
        if let Some(quota) = quota {
            said.push(format!(
                "{} holds {} of {}; pushes that do not fit are refused.",
                cache.url,
                human_bytes(told.stock.stored_bytes),
                human_bytes(quota)
            ));
        }
    }
    if let Some(problem) = report
        .upload
        .as_ref()
        .and_then(|upload| upload.problem.as_ref())
    {
        said.push(format!("Pushing: {problem}"));
    }
    html! {
        @if !said.is_empty() {
            section #trouble.wide {
                h2.bad { "Trouble" }
                ul { @for one in &said { li { (one) } } }
            }
        }
    }
}

fn node(report: &Report, now: UnixTime) -> Markup {
    html! {
        section #node {
            h2 { "This node" }
            dl {
                @match &report.about.mesh {
                    None => { dt { "Mesh" } dd { "none: it serves this machine only" } },
                    Some(mesh) => {
                        dt { "Mesh" } dd { code { (mesh.key) } }
                        @if let Some(certificate) = &mesh.certificate {
                            dt { "Member" }
                            dd {
                                "as " strong { (certificate.name) } " (" (certificate.permissions) "), "
                                @if certificate.expires <= now.0 { span.bad { "until it expired" } } @else { "for " (counted(days(certificate.expires, now), "more day")) }
                            }
                        }
                    },
                }
                @if !report.silent.is_empty() {
                    dt { "Silent" }
                    dd { "on " (report.silent.join(", ")) ": on no network of mesh.networks, nobody there hears this node or reaches it" }
                }
                dt { "Offers" } dd { (counted(report.paths_held, "path")) }
                dt { "Sent to peers" } dd { (human_bytes(report.bytes.sent)) }
                dt { "Saved" } dd { (human_bytes(report.bytes.received)) " came from peers, not over the internet" }
                dt { "Peer id" } dd { code { (report.about.peer_id) } }
                dt { "Version" } dd { (report.about.version) }
                @for (reason, count) in &report.refusals {
                    dt { "Refused" } dd { (count) " × " (reason) }
                }
            }
        }
    }
}

fn sources(report: &Report) -> Markup {
    let row = |name: &str, of: fn(&Answers) -> u64| {
        let (narinfos, nars) = (of(&report.narinfos), of(&report.nars));
        let most = 1.max(total(&report.narinfos));
        html! {
            tr {
                td { (name) }
                td.number { (narinfos) }
                td.bar { progress value=(narinfos) max=(most) aria-label={ "share of " (name) } {} }
                td.number { (nars) }
            }
        }
    };
    html! {
        section #sources {
            h2 { "Where answers came from" }
            table {
                tr { th { "Source" } th.number { "Lookups" } th {} th.number { "NARs" } }
                (row("this store", |answers| answers.local))
                (row("peers", |answers| answers.peer))
                (row("anchors", |answers| answers.anchor))
                (row("upstreams", |answers| answers.upstream))
                (row("nobody", |answers| answers.absent))
            }
        }
    }
}

fn transfers(report: &Report) -> Markup {
    let sender = |transfer: &TransferView| {
        let peer = report
            .peers
            .iter()
            .find(|peer| Some(&peer.peer_id) == transfer.peer_id.as_ref());
        match (peer, &transfer.peer_id) {
            (Some(peer), _) => peer_name(peer),
            (None, Some(peer_id)) => peer_id.clone(),
            (None, None) => "a cache".to_owned(),
        }
    };
    html! {
        section #transfers.wide {
            h2 { "Under way" }
            @if report.transfers.is_empty() { p.dim { "Nothing is being fetched." } }
            @for transfer in &report.transfers {
                p {
                    code { (transfer.path) } " "
                    span.dim { (human_bytes(transfer.bytes)) " of " (human_bytes(transfer.nar_size)) " from " (sender(transfer)) }
                    progress value=(transfer.bytes) max=(1.max(transfer.nar_size)) aria-label=(transfer.path) {}
                }
            }
        }
    }
}

fn peers(peers: &[Peer]) -> Markup {
    html! {
        section #peers.wide {
            h2 { "Peers" }
            @if peers.is_empty() { p.dim { "No peer was seen yet." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label="Peers" {
                    table {
                        tr { th { "Name" } th { "State" } th.number { "Answers in" } th.number { "Speed" } th.number { "Paths" } th.number { "Gave" } th.number { "Took" } th { "Address" } }
                        @for peer in peers {
                            tr {
                                td title=(peer.peer_id) { (peer_name(peer)) }
                                td {
                                    @match &peer.quarantine {
                                        Some(quarantine) => span.bad { "quarantine " (quarantine.seconds_left) " s: " (quarantine.offence) },
                                        None if peer.state == "linked" => span.good { "linked" },
                                        None => span.dim { (peer.state) },
                                    }
                                }
                                td.number { @if let Some(within) = peer.answers_within_ms { (within) " ms" } }
                                td.number { @if let Some(speed) = peer.bytes_per_second { (human_bytes(speed)) "/s" } }
                                td.number { (peer.paths) }
                                td.number { (human_bytes(peer.bytes_received)) }
                                td.number { (human_bytes(peer.bytes_sent)) }
                                td { code { (peer.address.as_deref().unwrap_or("")) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn caches(report: &Report) -> Markup {
    let row = |cache: &Cache| {
        html! {
            tr {
                td { (cache.role) } td { code { (cache.url) } }
                td { @match cache.failed_probe_in { Some(_) => span.bad { "does not answer" }, None => span.good { "asked" } } }
                td.number { @if let Some(within) = cache.answers_within_ms { (within) " ms" } }
                td.number { @if let Some(speed) = cache.bytes_per_second { (human_bytes(speed)) "/s" } }
            }
        }
    };
    html! {
        @if !report.caches.is_empty() || report.upload.is_some() {
            section #caches.wide {
                h2 { "Anchors and upstreams" }
                @if !report.caches.is_empty() { div.scroll tabindex="0" role="region" aria-label="Anchors and upstreams" { table { @for cache in &report.caches { (row(cache)) } } } }
                @if let Some(upload) = &report.upload {
                    p {
                        (counted(upload.paths_waiting, "path")) " (" (human_bytes(upload.bytes_waiting)) ") " (form(upload.paths_waiting, "waits", "wait")) " for " code { (upload.cache) } "; "
                        (upload.paths_pushed) " (" (human_bytes(upload.bytes_pushed)) ") pushed, " (upload.paths_failed) " refused before."
                    }
                    @for one in &upload.current {
                        p { code { (one.path) } progress value=(one.bytes) max=(1.max(one.nar_size)) aria-label=(one.path) {} }
                    }
                    @if let Some(seconds) = upload.retry_in { p.bad { "Tried again in " (seconds) " s." } }
                }
            }
        }
    }
}

/// An anchor, as far as this node's own token sees it: the cache that the node uses of it.
fn anchor(number: usize, url: &str, told: &Told) -> Markup {
    let of = &told.stock;
    let (root, name) = url.rsplit_once('/').unwrap_or(("", url));
    let is_web = ["http://", "https://"]
        .iter()
        .any(|scheme| root.starts_with(scheme));
    html! {
        section.wide id={ "anchor-" (number) } {
            h2 { "Anchor: cache " (name) }
            div.columns { dl {
                dt { "Holds" } dd { (counted(of.paths, "path")) ", " (human_bytes(of.nar_bytes)) " unpacked" }
                dt { "In storage" }
                dd {
                    (human_bytes(of.stored_bytes))
                    @if let Some((bytes, word)) = of.limit() {
                        " of " (human_bytes(bytes)) " (" (word) ") "
                        progress value=(of.stored_bytes.min(bytes)) max=(bytes.max(1)) aria-label={ "of the " (word) " of " (name) } {}
                    }
                }
                dt { "Read by" } dd { @if of.public { "anybody" } @else { "who has a token for it" } }
                dt { "Keeps" } dd { @match of.retention { Some(seconds) => { "what was used within " (human_seconds(seconds)) }, None => "all" } }
            } dl {
                dt { "Garbage" }
                dd {
                    @match &of.collected {
                        None => span.dim { "not collected since the anchor started" },
                        Some(Collected { refused: Some(why), seconds_ago, .. }) => span.bad { "not collected " (human_seconds(*seconds_ago)) " ago: " (why) },
                        Some(last) => { "collected " (human_seconds(last.seconds_ago)) " ago, " (counted(last.paths, "path")) " taken out" },
                    }
                }
                dt { "Coming in" } dd { @if of.arriving == 0 { span.dim { "nothing" } } @else { (counted(of.arriving, "path")) } }
                dt { "Address" } dd { code { (url) } }
                dt { "Told" }
                dd {
                    (human_seconds(told.seconds_ago)) " ago"
                    @if is_web { "; more on " a href={ (root) "/" } rel="noreferrer" { "the anchor's own page" } ", with a token" }
                }
            } }
        }
    }
}

fn lookups(lookups: &[LookupView]) -> Markup {
    html! {
        section #lookups.wide {
            h2 { "What Nix asked last" }
            (question(""))
            @if lookups.is_empty() { p.dim { "Nothing yet." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label="What Nix asked last" {
                    table {
                        tr { th { "Path" } th { "Answer" } th.number { "Took" } th.number { "Ago" } }
                        @for one in lookups {
                            tr {
                                td { a href={ "/why?path=" (one.hash) } { code { (one.path.as_deref().unwrap_or(&one.hash)) } } }
                                td { @if one.source == "nowhere" { span.dim { "nobody has it" } } @else { (one.source) } }
                                td.number { (format!("{:.1} ms", one.microseconds as f64 / 1000.0)) }
                                td.number { (one.seconds_ago) " s" }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn question(asked: &str) -> Markup {
    html! {
        form action="/why" method="get" {
            input name="path" value=(asked) aria-label="A store path or its hash" placeholder="/nix/store/…" required;
            button { "Why?" }
        }
    }
}

fn peer_name(peer: &Peer) -> String {
    // All peer ids begin alike; the end tells them apart.
    let end = || {
        peer.peer_id
            .chars()
            .rev()
            .take(8)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect()
    };
    peer.name.clone().unwrap_or_else(end)
}

fn days(expires: u64, now: UnixTime) -> u64 {
    expires.saturating_sub(now.0) / SECONDS_PER_DAY
}

fn total(answers: &Answers) -> u64 {
    answers.local + answers.peer + answers.anchor + answers.upstream + answers.absent
}
