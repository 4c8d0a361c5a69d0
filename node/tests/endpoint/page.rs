//! The status page in a real browser: that it shows what a person looks for, renews itself, asks for
//! nothing elsewhere, says nothing on the console, and takes a stranger's words for text.
//!
//! `GRANARY_SCREENSHOTS=folder` keeps pictures of every state, light, dark and narrow, to be looked at.

use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use granary::status::{Report, Why, page};
use granary_protocol::certificate::UnixTime;
use serde_json::{Value, json};

use crate::browser::Browser;
use crate::machine::{Machine, SMALL_BYTES, until};
use crate::pages::Pages;

/// What the clock reads while a page is written.
const NOW: UnixTime = UnixTime(1_800_000_000);

/// A browser's time that a page gets, in milliseconds; it runs ahead of the real one, answers excepted.
const BUDGET_MS: u32 = 7_000;

/// Runs Chromium without a screen, and returns what it printed.
fn chromium(arguments: &[&str], url: &str) -> (String, String) {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("chromium-headless-shell")
        .args([
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--no-proxy-server",
            "--hide-scrollbars",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--virtual-time-budget={BUDGET_MS}"))
        .args(arguments)
        .arg(url)
        .output()
        .expect("run chromium-headless-shell, which Debian's package of that name has");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    (String::from_utf8_lossy(&output.stdout).into_owned(), errors)
}

/// The page as it stands after some time in the browser, which must have had nothing to complain of.
fn dom(url: &str) -> String {
    let (dom, errors) = chromium(&["--dump-dom"], url);
    assert!(!errors.contains("CONSOLE"), "{errors}");
    dom
}

/// A report of a node that has nothing and nobody.
fn empty() -> Value {
    let answers = json!({"local": 0, "peer": 0, "absent": 0});
    json!({
        "peer_id": "12D3KooWEmpty", "version": "0.1.0", "mesh": null, "paths_held": 0, "peers": [],
        "bytes": {"sent": 0, "received": 0}, "narinfos": answers, "nars": answers,
        "nars_mismatched": 0, "store_errors": 0, "index_errors": 0, "refusals": {},
    })
}

fn with(mut report: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        report[name] = value.clone();
    }
    report
}

fn busy() -> Value {
    let peer = |name: &str, state: &str, ms: u64| {
        json!({
            "peer_id": format!("12D3KooW{name}PeerIdThatIsLong"), "name": name, "address": "192.168.1.20:4727",
            "state": state, "paths": 12_400, "bytes_sent": 3_000_000, "bytes_received": 5_000_000_000_u64,
            "quarantine": null, "answers_within_ms": ms, "bytes_per_second": 110_000_000,
        })
    };
    let lookup = |name: &str, source: &str, found: bool| {
        let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
        let path = found.then(|| format!("{hash}-{name}"));
        json!({"hash": hash, "path": path, "source": source, "microseconds": 1_234, "seconds_ago": 3})
    };
    with(
        empty(),
        json!({
            "mesh": {"key": "home:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
                     "certificate": {"name": "laptop", "permissions": "share,vouch", "expires": NOW.0 + 20 * 86_400}},
            "paths_held": 9_876,
            "peers": [peer("desk", "linked", 2), peer("nas", "linked", 4), peer("attic", "away", 9)],
            "caches": [{"url": "https://nas.lan:4730/main", "role": "anchor", "failed_probe_in": null,
                        "answers_within_ms": 12, "bytes_per_second": 50_000_000, "holds": holds()}],
            "upload": {"cache": "https://nas.lan:4730/main", "paths_waiting": 3, "bytes_waiting": 7_000_000, "paths_failed": 0,
                       "paths_staying": 0, "paths_pushed": 40, "bytes_pushed": 90_000_000, "current": [], "retry_in": null, "problem": null},
            "transfers": [{"path": "00bgd045z0d4icpbc2yyz4gx48ak44la-linux-6.18", "bytes": 60_000_000, "nar_size": 150_000_000,
                           "peer_id": "12D3KooWdeskPeerIdThatIsLong", "seconds": 1}],
            "lookups": [lookup("hello-2.12", "peer", true), lookup("", "nowhere", false), lookup("glibc-2.40", "upstream", true)],
            "bytes": {"sent": 3_000_000, "received": 5_000_000_000_u64},
            "narinfos": {"local": 120, "peer": 300, "anchor": 20, "upstream": 60, "absent": 9},
            "nars": {"local": 4, "peer": 280, "anchor": 18, "upstream": 55, "absent": 1},
            "history": history(),
        }),
    )
}

/// What an anchor told of its cache.
fn holds() -> Value {
    json!({
        "seconds_ago": 5, "public": false, "paths": 12_345, "nar_bytes": 80_000_000_000_u64, "stored_bytes": 30_000_000_000_u64,
        "size_cap": 200_000_000_000_u64, "quota": 250_000_000_000_u64, "retention": 90 * 86_400, "arriving": 2,
        "collected": {"seconds_ago": 900, "paths": 17, "refused": null},
    })
}

/// A day's work on a machine of an office: most from peers, the first of it from an upstream.
fn history() -> Value {
    let span = |from: u64, part: u64| {
        json!({"from": from, "local": 40 * part, "peer": 30 * part, "anchor": 4 * part, "upstream": 6, "absent": part,
               "peer_bytes": 300_000_000 * part, "anchor_bytes": 40_000_000 * part, "upstream_bytes": 90_000_000})
    };
    let hour = NOW.0 / 3600 * 3600;
    let hours: Vec<_> = [(9, 1), (8, 4), (7, 2), (6, 7), (4, 3), (1, 5), (0, 2)]
        .map(|(ago, part)| span(hour - ago * 3600, part))
        .into();
    let day = NOW.0 / 86_400 * 86_400;
    let days: Vec<_> = (0..22)
        .map(|ago| span(day - ago * 86_400, (ago * 7 + 3) % 11 + 1))
        .collect();
    json!({"hours": hours, "days": days.into_iter().rev().collect::<Vec<_>>()})
}

fn failing() -> Value {
    let mut report = busy();
    report["mesh"]["certificate"]["expires"] = json!(NOW.0 - 1);
    report["caches"][0]["failed_probe_in"] = json!(17);
    report["peers"][0]["quarantine"] = json!({"seconds_left": 25, "offence": "sent wrong bytes"});
    report["caches"][0]["holds"]["quota"] = json!(31_000_000_000_u64);
    report["caches"][0]["holds"]["collected"]["refused"] =
        json!("the clock reads 2099-01-01, refusing to collect garbage");
    report["silent"] = json!(["wlan0"]);
    report["upload"]["problem"] = json!("the token was refused");
    report["upload"]["retry_in"] = json!(30);
    with(
        report,
        json!({"store_errors": 4, "nars_mismatched": 1, "refusals": {"expired": 2}, "transfers": []}),
    )
}

fn render(report: Value) -> String {
    let report: Report = serde_json::from_value(report).expect("a report");
    page::page(&report, NOW)
}

#[test]
fn a_browser_shows_what_a_person_looks_for() {
    let folder = std::env::var_os("GRANARY_SCREENSHOTS");
    let mut browser = Browser::new();
    for (name, report, expected) in [
        (
            "empty",
            empty(),
            &[
                "Nothing is being fetched",
                "No peer was seen yet",
                "this machine only",
                "Nothing yet",
                "Nothing was counted in the last 30 days",
            ][..],
        ),
        (
            "busy",
            busy(),
            &[
                "laptop",
                "desk",
                "linked",
                "104.9 MiB/s",
                "4.7 GiB",
                "linux-6.18",
                "from desk",
                "hello-2.12",
                "nobody has it",
                "3 paths",
                "2 ms",
                "Anchor: cache main",
                "12345 paths, 74.5 GiB unpacked",
                "27.9 GiB of 232.8 GiB (quota)",
                "who has a token for it",
                "what was used within 90 days",
                "collected 15 min ago, 17 paths taken out",
                "2 paths",
                "5 s ago; more on the anchor's own page",
                "Last 24 hours: 6.7 GiB came from peers",
                "Last 30 days:",
                "up to 2.3 GiB",
                "23 h ago",
                "In numbers",
            ][..],
        ),
        (
            "failing",
            failing(),
            &[
                "The certificate has expired",
                "asked again in 17 s",
                "sent wrong bytes",
                "4 times the local store",
                "1 NAR had other bytes",
                "the token was refused",
                "Tried again in 30 s",
                "not collected 15 min ago: the clock reads 2099-01-01",
                "https://nas.lan:4730/main holds 27.9 GiB of 28.9 GiB; pushes that do not fit",
                "on wlan0: on no network of mesh.networks",
            ][..],
        ),
    ] {
        let pages = Pages::new(vec![render(report)]);
        for (look, width, is_dark) in [
            ("light", 1200, false),
            ("dark", 1200, true),
            ("phone", 360, false),
        ] {
            browser.look(width, 900, is_dark);
            browser.open(&pages.url());
            let shown = browser.text();
            for text in expected {
                assert!(
                    shown.contains(text),
                    "{name} {look}: no {text:?} in {shown}"
                );
            }
            let trouble = browser.value("!!document.getElementById('trouble')");
            assert_eq!(trouble, name == "failing", "{name}");
            let is_silent = browser.value("document.getElementById('away').hidden");
            assert_eq!(is_silent, true, "{name} says that the node is away");
            assert!(
                !browser.is_too_wide(),
                "{name} {look} is wider than its window"
            );
            if let Some(folder) = &folder {
                browser.picture(&Path::new(folder).join(format!("node-{name}-{look}.png")));
            }
        }
        let walked = browser.walk();
        assert!(
            walked.len() >= 4 && walked.contains(&"Why?".to_owned()),
            "{walked:?}"
        );
        assert_eq!(pages.elsewhere(), 0, "{name}");
    }
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn what_was_saved_over_time_is_seen_heard_and_read() {
    let pages = Pages::new(vec![render(busy())]);
    let mut browser = Browser::new();
    browser.look(360, 900, false);
    browser.open(&pages.url());
    // The highest bar fills its picture, others are as high as their part of it and a little for what would not be seen.
    let heights = browser.value(
        "[...document.querySelectorAll('#history figure:first-of-type svg[role=img]')].map((svg) => {
           const frame = svg.getBoundingClientRect();
           return [...svg.querySelectorAll('g')].map((bar) => {
             const parts = [...bar.querySelectorAll('rect')].map((part) => part.getBoundingClientRect());
             const inside = parts.every((one) => one.top > frame.top - 1 && one.bottom < frame.bottom + 1 && one.width > 2);
             return inside ? Math.round(100 * parts.reduce((sum, one) => sum + one.height, 0) / (frame.height - 1)) : 'outside';
           });
         })",
    );
    assert_eq!(
        heights,
        json!([[18, 59, 31, 100, 45, 72, 31], [19, 60, 32, 100, 46, 73, 32]])
    );
    let colours = browser.value(
        "new Set([...document.querySelectorAll('#history figure rect')].map((one) => getComputedStyle(one).fill)).size",
    );
    assert_eq!(colours, 5);
    let heard = browser.value("document.querySelector('#history svg[role=img]').ariaLabel");
    assert_eq!(
        heard,
        "Bytes of NARs, Last 24 hours: at most 2.3 GiB, 6 h ago"
    );
    let bar = browser.value("document.querySelector('#history g title').textContent");
    assert_eq!(
        bar,
        "9 h ago: 286.1 MiB from peers, 38.1 MiB from anchors, 85.8 MiB from upstreams"
    );
    // By the keyboard alone; and what is unfolded stays so when the page is renewed and another thing focused.
    browser.value("document.querySelector('#history summary').focus(), 0");
    browser.enter();
    browser.wait_for("document.querySelector('#history details').open");
    let text = browser.text();
    for expected in ["9 h ago", "30, 286.1 MiB", "this hour", "25 Dec", "today"] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
    browser.value("document.activeElement.blur(), document.querySelector('#history').lastChild.dataset.old = 1, 0");
    browser.wait_for("document.querySelector('#history').lastChild.dataset.old === undefined");
    assert_eq!(
        browser.value("document.querySelector('#history details').open"),
        true
    );
    assert!(!browser.is_too_wide());
    if let Some(folder) = std::env::var_os("GRANARY_SCREENSHOTS") {
        browser.picture(&Path::new(&folder).join("node-history-phone.png"));
    }
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    assert_eq!(pages.elsewhere(), 0);
}

#[test]
fn a_page_renews_itself_and_says_when_the_node_is_away() {
    let pages = Pages::new(vec![render(empty()), render(busy())]);
    assert!(dom(&pages.url()).contains("hello-2.12"));
    let pages = Pages::new(vec![render(busy())]);
    pages.go_away();
    let (dom, _) = chromium(&["--dump-dom"], &pages.url());
    assert!(
        !dom.contains("hidden=\"\"") && dom.contains("hello-2.12"),
        "{dom}"
    );
}

#[test]
fn what_strangers_chose_is_text() {
    let evil =
        "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'>";
    let mut report = failing();
    for place in [
        "/mesh/certificate/name",
        "/peers/0/address",
        "/peers/1/name",
        "/peers/2/state",
        "/peers/0/quarantine/offence",
        "/transfers",
        "/caches/0/url",
        "/caches/0/holds/collected/refused",
        "/silent/0",
        "/upload/problem",
        "/lookups/0/path",
        "/version",
    ] {
        match place {
            "/transfers" => {
                report["transfers"] = json!([{"path": evil, "bytes": 1, "nar_size": 2, "peer_id": evil, "seconds": 1}])
            }
            place => *report.pointer_mut(place).unwrap() = json!(evil),
        }
    }
    report["refusals"] = json!({evil: 1});
    let mut linked = report.clone();
    linked["caches"][0]["url"] = json!("javascript:document.title='owned'//x/main");
    assert!(!render(linked).contains("href=\"javascript"));
    let why: Why = serde_json::from_value(json!({
        "hash": evil, "path": evil, "status": 404, "source": evil, "sharing": null,
        "announced_by": [evil], "usable": [], "reasons": [evil],
    }))
    .unwrap();
    for html in [
        render(report),
        page::why(evil, Some(&why)),
        page::why(evil, None),
    ] {
        assert!(
            !html.contains("<img") && !html.contains("<script>document"),
            "{html}"
        );
        let pages = Pages::new(vec![html]);
        let dom = dom(&pages.url());
        assert!(!dom.contains("<title>owned"), "{dom}");
        assert!(dom.contains("&lt;script&gt;"), "{dom}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_anchor_that_says_nothing_delays_no_page() {
    // Connections come to stand, and nobody answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut machine = Machine::new();
    let address = silent.local_addr().unwrap();
    machine.extra = format!("[[anchor]]\nurl = \"http://{address}/main\"\n");
    machine.start().await;
    until("the mind", || !machine.status().caches.is_empty());
    for target in ["/", "/api/v1/status", "/"] {
        let started = Instant::now();
        assert_eq!(machine.get(target).status, 200);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(1), "{target} took {took:?}");
    }
    assert_eq!(machine.status().caches[0].holds, None);
    // It was asked, all the same.
    let (mut asked, _) = silent.accept().unwrap();
    let mut line = [0; 27];
    asked.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"GET /api/v1/caches/main HTT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_endpoint_shows_itself_to_a_browser_and_disturbs_nothing() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    let answer = machine.get("/");
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.header("content-security-policy"),
        Some(page::policy())
    );
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("content-encoding"), None);
    assert_eq!(
        machine.ask("POST", "/", "Content-Length: 0\r\n").status,
        405
    );
    assert_eq!(
        machine.ask("GET", "/", "Host: evil.example\r\n").status,
        403
    );
    let url = machine.url();
    let (shown, why) = tokio::task::spawn_blocking(move || {
        let why = format!("{url}/why?path={}", path.path);
        (dom(&format!("{url}/")), dom(&why))
    })
    .await
    .unwrap();
    assert!(
        shown.contains("-small") && shown.contains("this store"),
        "{shown}"
    );
    assert!(why.contains("valid in the local store"), "{why}");
    assert_eq!(machine.get("/nix-cache-info").status, 200);
}
