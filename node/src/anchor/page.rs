//! The anchor's status page: caches, sizes, garbage, uploads, health, and what was asked last, for a browser.
//!
//! ```text
//! GET  /         the page, or the form that asks for a token
//! POST /login    token=…  → a session (sessions.rs)
//! POST /logout   ends it
//! ```
//!
//! Who is logged in sees of each cache what its token may pull, and of the others nothing, not that they
//! exist. The rest (storage, garbage, uploads, accesses, health) names any cache, so it is for tokens that may pull
//! from all of them, as `/metrics` is. Forms are taken from pages of this anchor alone: the browser says where
//! one came from, and a cookie of a session travels with nothing that another site begins.

use std::sync::Arc;
use std::time::Duration;

use ::http::header::{ACCEPT, HOST, LOCATION, ORIGIN, SET_COOKIE};
use ::http::request::Parts;
use ::http::{HeaderValue, StatusCode};
use granary_protocol::certificate::UnixTime;
use granary_protocol::token::{Claims, Permission, TOKEN_BYTES_MAX};
use hyper::body::Incoming;
use maud::{Markup, html};
use reqwest::Url;
use zeroize::Zeroizing;

use super::accesses::Access;
use super::http::{Answer, Refusal, empty, is_secure, small_body};
use super::sessions::cookie;
use super::{Anchor, health};
use crate::page::{self, Frame, counted, human_bytes, human_seconds};
use crate::serve::respond::{self, TEXT};

/// What those hear who do not ask for HTML.
const GREETING: &str = "This is a Granary anchor. Its caches are at /<cache>/.\n";

/// A form with a token: each of its characters may be written as three.
const FORM_BYTES_MAX: usize = 3 * TOKEN_BYTES_MAX + 64;

/// How long the page waits for storage to say that it is well: less than the two seconds until the next.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(1);

/// Uploads that are shown; the rest is a number.
const UPLOADS_MAX: usize = 30;

/// A cache that is so full, in hundredths of its quota, is shown as trouble.
const FULL_PERCENT: u64 = 90;

/// What the page shows.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Of the token.
    pub subject: String,
    /// Seconds until the token ends, if it does.
    pub token_ends_in: Option<u64>,
    /// Those that the token may pull from.
    pub caches: Vec<CacheView>,
    /// For who may pull from all of them.
    pub whole: Option<Whole>,
}

/// A cache, for who may pull from it.
#[derive(Debug, Clone, Default)]
pub struct CacheView {
    pub name: String,
    pub is_public: bool,
    /// What the token may do to it.
    pub allows: String,
    pub paths: u64,
    /// Of its NARs in storage.
    pub file_bytes: u64,
    /// Of its NARs, unpacked.
    pub nar_bytes: u64,
    pub size_cap: Option<u64>,
    pub quota: Option<u64>,
    /// What each subject may have in it, and what this one has.
    pub own: Option<Share>,
    /// Seconds since its last use that a path is kept.
    pub retention: Option<u64>,
    pub pins: usize,
    pub public_keys: Vec<String>,
    /// Since the start.
    pub found: u64,
    pub absent: u64,
    pub sent_bytes: u64,
    pub pushed: u64,
}

/// What of a cache came by one subject.
#[derive(Debug, Clone, Copy, Default)]
pub struct Share {
    pub quota: u64,
    /// Bytes in storage.
    pub held: u64,
}

/// What is not of one cache alone.
#[derive(Debug, Clone, Default)]
pub struct Whole {
    pub storage: String,
    pub nars: u64,
    pub file_bytes: u64,
    pub damaged_nars: u64,
    /// Since the start.
    pub requests_failed: u64,
    pub requests_denied: u64,
    /// What is wrong with storage, catalog or spool.
    pub problem: Option<String>,
    pub collection: Option<Collected>,
    pub uploads: Vec<UploadView>,
    pub accesses: Vec<AccessView>,
}

/// The last collection of garbage.
#[derive(Debug, Clone, Default)]
pub struct Collected {
    pub seconds_ago: u64,
    pub paths: u64,
    pub nars: u64,
    pub file_bytes: u64,
    /// NARs that no path has, which wait for their day.
    pub waiting: u64,
    /// Why nothing, or nothing of a cache, was done.
    pub refused: Vec<String>,
}

/// An upload that is not complete.
#[derive(Debug, Clone, Default)]
pub struct UploadView {
    pub cache: String,
    /// Name of the store path, with its hash.
    pub path: String,
    /// Raw bytes that came in; `None` while a body does.
    pub bytes: Option<u64>,
    pub nar_size: u64,
    pub seconds_ago: u64,
}

/// A request that was answered.
#[derive(Debug, Clone, Default)]
pub struct AccessView {
    pub cache: String,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub subject: Option<String>,
    pub elapsed_ms: u64,
    pub seconds_ago: u64,
}

/// Answers `/`.
pub(super) async fn answer(anchor: &Arc<Anchor>, parts: &Parts) -> Answer {
    // Programs that look whether somebody is here hear a line.
    let accepts = parts.headers.get(ACCEPT);
    let wants_html = accepts.is_some_and(|value| {
        let text = value.to_str().unwrap_or_default();
        text.contains("text/html")
    });
    if !wants_html {
        return Ok(respond::small(StatusCode::OK, TEXT, GREETING));
    }
    let token = anchor
        .sessions
        .token(&parts.headers, is_secure(parts), anchor.now());
    let html = match token {
        None => login(None),
        Some(token) => match anchor.tokens.prove(&token, UnixTime(anchor.now())).await {
            Ok(claims) => render(&view(anchor, &claims).await?),
            Err(denied) => login(Some(&denied.to_string())),
        },
    };
    Ok(respond::page(html, page::policy()))
}

/// Begins a session: `POST /login`.
pub(super) async fn log_in(anchor: &Arc<Anchor>, parts: &Parts, body: &mut Incoming) -> Answer {
    check_origin(parts)?;
    let form = small_body(body, FORM_BYTES_MAX).await?;
    let token = token_of(&form);
    let proved = match &token {
        Some(token) => anchor.tokens.prove(token, UnixTime(anchor.now())).await,
        None => {
            return Err(Refusal::bad_request("the form has no token"));
        }
    };
    let (Some(token), Ok(_)) = (token, &proved) else {
        let problem = proved.err().map(|denied| denied.to_string());
        let mut response = respond::page(login(problem.as_deref()), page::policy());
        *response.status_mut() = StatusCode::FORBIDDEN;
        return Ok(response);
    };
    let id = anchor.sessions.open(token, anchor.now());
    let id = id.map_err(|error| Refusal::ours(&error))?;
    Ok(to_the_page(cookie(Some(&id), is_secure(parts))))
}

/// Ends a session: `POST /logout`.
pub(super) fn log_out(anchor: &Anchor, parts: &Parts) -> Answer {
    check_origin(parts)?;
    let is_secure = is_secure(parts);
    anchor.sessions.close(&parts.headers, is_secure);
    Ok(to_the_page(cookie(None, is_secure)))
}

fn to_the_page(cookie: Option<HeaderValue>) -> ::http::Response<respond::Body> {
    let mut response = empty(StatusCode::SEE_OTHER);
    let headers = response.headers_mut();
    headers.insert(LOCATION, HeaderValue::from_static("/"));
    if let Some(cookie) = cookie {
        headers.insert(SET_COOKIE, cookie);
    }
    response
}

/// The token of a form, without the blanks that came along when it was copied.
fn token_of(form: &[u8]) -> Option<Zeroizing<String>> {
    let form = std::str::from_utf8(form).ok()?;
    // The URL is a vessel: this crate reads forms as queries.
    let mut url = Url::parse("http://form/").ok()?;
    url.set_query(Some(form));
    let mut pairs = url.query_pairs();
    let (_, token) = pairs.find(|(name, _)| name == "token")?;
    Some(Zeroizing::new(token.trim().to_owned()))
}

/// Refuses a form that did not come from a page of this anchor.
fn check_origin(parts: &Parts) -> Result<(), Refusal> {
    let text = |name| {
        parts
            .headers
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let is_own = match text("sec-fetch-site") {
        Some(site) => site == "same-origin",
        // Browsers before 2023, over plain HTTP, and tools.
        None => {
            let host = text(HOST.as_str());
            let host = host.or(parts.uri.authority().map(|authority| authority.as_str()));
            let origin = text(ORIGIN.as_str()).and_then(|origin| origin.split_once("://"));
            origin.is_some_and(|(_, origin)| Some(origin) == host)
        }
    };
    match is_own {
        true => Ok(()),
        false => Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "ForeignForm",
            "this form did not come from a page of this anchor",
        )),
    }
}

async fn view(anchor: &Arc<Anchor>, claims: &Claims) -> Result<View, Refusal> {
    let sizes = anchor.sizes().await?;
    let sees_all = claims.allows("*", Permission::Pull);
    let mut view = View {
        subject: claims.subject.clone(),
        token_ends_in: claims
            .expires
            .map(|ends| ends.0.saturating_sub(anchor.now())),
        ..View::default()
    };
    let (mut names, mut requests_failed) = (Vec::new(), 0);
    for cache in anchor.catalog.caches().await? {
        let counts = anchor.counts.of(&cache.name);
        requests_failed += counts.requests_failed.get();
        names.push((cache.id, cache.name.to_string()));
        let name = cache.name.as_str();
        if !claims.allows(name, Permission::Pull) {
            continue;
        }
        let totals = sizes.caches.get(&cache.name).cloned().unwrap_or_default();
        let own = match cache.settings.subject_quota {
            None => None,
            Some(quota) => Some(Share {
                quota,
                held: anchor.held_by(cache.id, &claims.subject).await?,
            }),
        };
        let allowed = Permission::ALL
            .into_iter()
            .filter(|permission| claims.allows(name, *permission));
        let allowed: Vec<_> = allowed.map(Permission::name).collect();
        view.caches.push(CacheView {
            name: name.to_owned(),
            is_public: cache.settings.public,
            allows: allowed.join(", "),
            paths: totals.paths,
            file_bytes: totals.file_bytes,
            nar_bytes: totals.nar_bytes,
            size_cap: cache.settings.size_cap,
            quota: cache.settings.quota,
            own,
            retention: cache.settings.retention,
            pins: cache.settings.pinned().count(),
            public_keys: cache.settings.public_keys,
            found: counts.narinfos_found.get(),
            absent: counts.narinfos_absent.get(),
            sent_bytes: counts.nar_sent_bytes.get(),
            pushed: counts.pushes_stored.get(),
        });
    }
    if sees_all {
        let uploads = anchor.uploads.views().into_iter().filter_map(|mut upload| {
            let (_, name) = names.iter().find(|(id, _)| *id == upload.0)?;
            upload.1.cache = name.clone();
            Some(upload.1)
        });
        view.whole = Some(Whole {
            storage: anchor.storage.location().to_owned(),
            nars: sizes.storage_nars,
            file_bytes: sizes.storage_bytes,
            damaged_nars: sizes.damaged_nars,
            requests_failed,
            requests_denied: anchor.counts.requests_denied.get(),
            problem: health::problem(anchor, HEALTH_TIMEOUT).await,
            collection: anchor.counts.last_collection(),
            uploads: uploads.collect(),
            accesses: anchor.accesses.all().iter().map(access_view).collect(),
        });
    }
    Ok(view)
}

fn access_view(access: &Access) -> AccessView {
    AccessView {
        cache: access.cache.to_string(),
        method: access.method.clone(),
        path: access.path.clone(),
        status: access.status,
        subject: access.subject.clone(),
        elapsed_ms: access.elapsed_ms,
        seconds_ago: access.at.elapsed().as_secs(),
    }
}

/// The page for who is not logged in; `problem` says why a token was not taken.
pub fn login(problem: Option<&str>) -> String {
    let section = html! {
        section #login.wide {
            h2 { "Log in" }
            p { "A token of this anchor shows what it may see: caches that it may pull from, and, when it may pull from every cache, the anchor itself." }
            @if let Some(problem) = problem { p.bad role="alert" { "Not logged in: " (problem) "." } }
            form action="/login" method="post" {
                input name="token" type="password" autocomplete="off" spellcheck="false" aria-label="Token" placeholder="Token" required;
                button { "Log in" }
            }
            p.dim { "Beside the anchor, this makes one: " code { "granary token create --subject me --cache '*' --allow pull" } }
        }
    };
    let frame = Frame {
        title: "anchor",
        role: "anchor",
        aside: html! {},
        footer: html! { "Caches are at " code { "/<cache>/" } "." },
        is_renewed: false,
    };
    frame.around(&section)
}

/// The page for who is.
pub fn render(view: &View) -> String {
    let sections = html! {
        (trouble(view))
        (caches(&view.caches))
        @if let Some(whole) = &view.whole {
            (storage(whole))
            (garbage(whole))
            (uploads(&whole.uploads))
            (accesses(&whole.accesses))
        }
    };
    let frame = Frame {
        title: "anchor",
        role: "anchor",
        aside: html! {
            form.logout action="/logout" method="post" {
                span.dim {
                    "as " strong { (view.subject) }
                    @if let Some(seconds) = view.token_ends_in { ", for " (human_seconds(seconds)) }
                }
                button { "Log out" }
            }
        },
        footer: html! { "For Prometheus, with a token: " code { "/metrics" } ". For monitors: " a href="/health" { "health" } "." },
        is_renewed: true,
    };
    frame.around(&sections)
}

fn trouble(view: &View) -> Markup {
    let mut said = Vec::new();
    if let Some(whole) = &view.whole {
        said.extend(
            whole
                .problem
                .clone()
                .map(|problem| format!("Not well: {problem}.")),
        );
        if whole.damaged_nars > 0 {
            said.push(format!(
                "{} stored NARs are damaged; their paths are absent until somebody pushes them again.",
                whole.damaged_nars
            ));
        }
        if whole.requests_failed > 0 {
            said.push(format!(
                "{} requests failed by our own fault since the start; the log says why.",
                whole.requests_failed
            ));
        }
        let refused = whole.collection.iter().flat_map(|last| &last.refused);
        said.extend(refused.map(|why| format!("Garbage was not collected: {why}.")));
    }
    for cache in &view.caches {
        if cache.public_keys.is_empty() {
            said.push(format!(
                "Cache {} has no signing key, and takes nothing in.",
                cache.name
            ));
        }
        let full = cache.quota.map(|quota| percent(cache.file_bytes, quota));
        if let Some(percent) = full.filter(|percent| *percent >= FULL_PERCENT) {
            said.push(format!(
                "Cache {} is {percent} % full; pushes that do not fit are refused.",
                cache.name
            ));
        }
        let full = cache.own.map(|own| percent(own.held, own.quota));
        if let Some(percent) = full.filter(|percent| *percent >= FULL_PERCENT) {
            said.push(format!(
                "{} has {percent} % of what each may have in cache {}; pushes that do not fit are refused.",
                view.subject, cache.name
            ));
        }
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

fn percent(part: u64, of: u64) -> u64 {
    let percent = u128::from(part) * 100 / u128::from(of.max(1));
    u64::try_from(percent).unwrap_or(u64::MAX)
}

fn caches(caches: &[CacheView]) -> Markup {
    html! {
        section #caches.wide {
            h2 { "Caches" }
            @if caches.is_empty() { p.dim { "This token may pull from no cache that there is." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label="Caches" {
                    table {
                        tr {
                            th { "Cache" } th.number { "Paths" } th.number { "Stored" } th { "Limit" } th { "Keeps" }
                            th.number { "Found" } th.number { "Absent" } th.number { "Sent" } th.number { "Pushed" } th { "May" }
                        }
                        @for cache in caches { (cache_row(cache)) }
                    }
                }
                p.dim { "Found, absent, sent and pushed: since the anchor started." }
                dl.keys {
                    @for cache in caches.iter().filter(|cache| !cache.public_keys.is_empty()) {
                        dt { (cache.name) " signs with" }
                        dd { @for key in &cache.public_keys { code { (key) } " " } }
                    }
                }
            }
        }
    }
}

fn cache_row(cache: &CacheView) -> Markup {
    let limit = match (cache.quota, cache.size_cap) {
        (Some(quota), _) => Some((quota, "quota")),
        (None, Some(cap)) => Some((cap, "cap")),
        (None, None) => None,
    };
    let own = cache.own;
    html! {
        tr {
            td { strong { (cache.name) } @if cache.is_public { " " span.dim { "public" } } }
            td.number { (cache.paths) }
            td.number title={ (human_bytes(cache.nar_bytes)) " unpacked" } { (human_bytes(cache.file_bytes)) }
            td.limit {
                @match limit {
                    Some((bytes, word)) => {
                        span.dim { (human_bytes(bytes)) " " (word) }
                        progress value=(cache.file_bytes.min(bytes)) max=(bytes.max(1)) aria-label={ "of the " (word) " of " (cache.name) } {}
                    },
                    None if own.is_none() => span.dim { "none" },
                    None => {}
                }
                @if let Some(Share { quota, held }) = own {
                    span.dim { (human_bytes(quota)) " each, " (human_bytes(held)) " yours" }
                    progress value=(held.min(quota)) max=(quota.max(1)) aria-label={ "of your share of " (cache.name) } {}
                }
            }
            td.keeps {
                @match cache.retention { Some(seconds) => (human_seconds(seconds)), None => "for ever" }
                @if cache.pins > 0 { span.dim { ", " (cache.pins) " pinned" } }
            }
            td.number { (cache.found) }
            td.number { (cache.absent) }
            td.number { (human_bytes(cache.sent_bytes)) }
            td.number { (cache.pushed) }
            td.dim { (cache.allows) }
        }
    }
}

fn storage(whole: &Whole) -> Markup {
    html! {
        section #storage {
            h2 { "Storage" }
            dl {
                dt { "Place" } dd { code { (whole.storage) } }
                dt { "Holds" } dd { (counted(whole.nars, "NAR")) ", " (human_bytes(whole.file_bytes)) }
                dt { "Health" }
                dd { @match &whole.problem { None => span.good { "well" }, Some(problem) => span.bad { (problem) } } }
                dt { "Denied" } dd { (counted(whole.requests_denied, "request")) " without the right to what they named" }
                dt { "Version" } dd { (env!("CARGO_PKG_VERSION")) }
            }
        }
    }
}

fn garbage(whole: &Whole) -> Markup {
    html! {
        section #garbage {
            h2 { "Garbage" }
            @match &whole.collection {
                None => p.dim { "Not collected since the start; that is done every hour." },
                Some(last) => dl {
                    dt { "Collected" } dd { (human_seconds(last.seconds_ago)) " ago" }
                    dt { "Took out" } dd { (counted(last.paths, "path")) }
                    dt { "Deleted" } dd { (counted(last.nars, "NAR")) ", " (human_bytes(last.file_bytes)) }
                    dt { "Waiting" } dd { (counted(last.waiting, "NAR")) " of no path, for a day" }
                },
            }
        }
    }
}

fn uploads(uploads: &[UploadView]) -> Markup {
    html! {
        section #uploads.wide {
            h2 { "Coming in" }
            @if uploads.is_empty() { p.dim { "Nothing is being pushed in parts." } }
            @for upload in uploads.iter().take(UPLOADS_MAX) {
                p {
                    code { (upload.path) } " "
                    span.dim {
                        "to " (upload.cache) ", "
                        @match upload.bytes {
                            Some(bytes) => { (human_bytes(bytes)) " of " (human_bytes(upload.nar_size)) ", silent for " (human_seconds(upload.seconds_ago)) },
                            None => { (human_bytes(upload.nar_size)) ", arriving" },
                        }
                    }
                    @if let Some(bytes) = upload.bytes { progress value=(bytes) max=(upload.nar_size.max(1)) aria-label=(upload.path) {} }
                }
            }
            @if let Some(more @ 1..) = uploads.len().checked_sub(UPLOADS_MAX) { p.dim { "and " (more) " more" } }
        }
    }
}

fn accesses(accesses: &[AccessView]) -> Markup {
    html! {
        section #accesses.wide {
            h2 { "What was asked last" }
            @if accesses.is_empty() { p.dim { "Nothing yet." } }
            @else {
                div.scroll tabindex="0" role="region" aria-label="What was asked last" {
                    table {
                        tr { th { "Cache" } th { "Who" } th { "Request" } th.number { "Answer" } th.number { "Took" } th.number { "Ago" } }
                        @for one in accesses {
                            tr {
                                td { (one.cache) }
                                td { @match &one.subject { Some(subject) => (subject), None => span.dim { "anybody" } } }
                                td.request { code { (one.method) " " (one.path) } }
                                td.number { @if one.status >= 500 { span.bad { (one.status) } } @else { (one.status) } }
                                td.number { (one.elapsed_ms) " ms" }
                                td.number { (human_seconds(one.seconds_ago)) }
                            }
                        }
                    }
                }
            }
        }
    }
}
