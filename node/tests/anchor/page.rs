//! The anchor's status page: who sees what, what a session is worth, and how it looks and renews itself in a
//! real browser.
//!
//! `GRANARY_SCREENSHOTS=folder` keeps pictures of every state, light, dark and narrow, to be looked at.

use std::path::Path;
use std::time::Duration;

use granary::anchor::admin::Changes;
use granary::anchor::page::{
    AccessView, CacheView, Collected, Share, UploadView, View, Whole, login, render,
};
use granary::page::policy;
use granary_protocol::token::Permission::{Configure, Pull, Push};

use crate::browser::Browser;
use crate::rig::{Answer, Rig, Sample, bearer};

const HTML: (&str, &str) = ("Accept", "text/html,*/*;q=0.8");
const OWN: (&str, &str) = ("Sec-Fetch-Site", "same-origin");

/// Sends the form of the login.
fn log_in(rig: &Rig, token: &str, headers: &[(&str, &str)]) -> Answer {
    let form = format!("token={token}");
    let kind = ("Content-Type", "application/x-www-form-urlencoded");
    rig.ask(
        "POST",
        "/login",
        &[headers, &[kind]].concat(),
        form.as_bytes(),
    )
}

/// The cookie of a new session.
fn session(rig: &Rig, token: &str) -> String {
    let answer = log_in(rig, token, &[OWN]);
    assert_eq!((answer.status, answer.header("location")), (303, Some("/")));
    let cookie = answer.header("set-cookie").unwrap();
    cookie.split(';').next().unwrap().to_owned()
}

fn page(rig: &Rig, cookie: &str) -> String {
    let answer = rig.ask("GET", "/", &[HTML, ("Cookie", cookie)], b"");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-security-policy"), Some(policy()));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    answer.text().to_owned()
}

fn is_form(page: &str) -> bool {
    page.contains("action=\"/login\"")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_what_its_token_may_see_and_is_no_oracle_for_the_rest() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    rig.cache("secret", false).await;
    let narrow = rig
        .token(&[("main", &[Pull, Push]), ("other", &[Push])])
        .await;
    let whole = rig.token(&[("*", &[Pull])]).await;
    let sample = Sample::new(1, 100_000);
    assert_eq!(rig.upload(&narrow, "main", &sample).status, 200);
    let read = format!("/secret/{}.narinfo", sample.hash());
    rig.ask("GET", &read, &[("Authorization", &bearer(&whole))], b"");

    // Programs get a line; browsers a form, whatever caches there are.
    assert!(rig.get("/").text().starts_with("This is a Granary anchor"));
    let stranger = page(&rig, "a=b");
    assert!(
        is_form(&stranger) && !stranger.contains("secret"),
        "{stranger}"
    );

    let (narrow_cookie, whole_cookie) = (session(&rig, &narrow), session(&rig, &whole));
    let seen = page(&rig, &narrow_cookie);
    assert!(
        seen.contains("<strong>main</strong>") && seen.contains("pull, push"),
        "{seen}"
    );
    for hidden in [
        "secret",
        "id=\"storage\"",
        "id=\"accesses\"",
        "id=\"garbage\"",
        "file://",
    ] {
        assert!(!seen.contains(hidden), "{hidden} in {seen}");
    }
    let all = page(&rig, &whole_cookie);
    for shown in [
        "main",
        "secret",
        "id=\"storage\"",
        "file://",
        &read,
        "tester",
    ] {
        assert!(all.contains(shown), "no {shown} in {all}");
    }
    // A private cache that comes into being changes nothing for who may not know it; nor does one that it may
    // push to but not read.
    rig.cache("another", false).await;
    rig.cache("other", false).await;
    assert_eq!(page(&rig, &narrow_cookie), seen);
    assert_eq!(page(&rig, "a=b"), stranger);
    // The cookie opens the page and no cache.
    let cookie = ("Cookie", whole_cookie.as_str());
    assert_eq!(
        rig.ask("GET", "/secret/nix-cache-info", &[cookie], b"")
            .status,
        401
    );
    assert_eq!(rig.ask("GET", "/metrics", &[cookie], b"").status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_with_its_token_by_its_owner_and_after_eight_hours() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    let token = rig.token(&[("main", &[Pull])]).await;
    // By its owner.
    let cookie = session(&rig, &token);
    assert!(!is_form(&page(&rig, &cookie)));
    let out = rig.ask("POST", "/logout", &[OWN, ("Cookie", &cookie)], b"");
    assert!(out.status == 303 && out.header("set-cookie").unwrap().contains("Max-Age=0"));
    assert!(is_form(&page(&rig, &cookie)));
    // With its token.
    let revoked = session(&rig, &token);
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    anchor
        .tokens
        .revoke(&token, granary_protocol::certificate::UnixTime(0))
        .await
        .unwrap();
    let shown = page(&rig, &revoked);
    assert!(
        is_form(&shown) && shown.contains("the token was revoked"),
        "{shown}"
    );
    // After eight hours.
    let token = rig.token(&[("main", &[Pull])]).await;
    let cookie = session(&rig, &token);
    rig.clock.advance(Duration::from_secs(8 * 3600 - 60));
    assert!(!is_form(&page(&rig, &cookie)));
    rig.clock.advance(Duration::from_secs(61));
    assert!(is_form(&page(&rig, &cookie)));
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_come_from_this_anchor_and_cookies_stay_with_it() {
    let rig = Rig::new().await;
    let token = rig.token(&[("*", &[Pull])]).await;
    let host = rig.address().to_string();
    let (own, foreign) = (format!("http://{host}"), "http://evil.example");
    for (headers, expected) in [
        (&[OWN][..], 303),
        (&[("Origin", own.as_str())], 303),
        (&[], 403),
        (&[("Origin", foreign)], 403),
        (&[("Origin", "null")], 403),
        (&[("Sec-Fetch-Site", "cross-site")], 403),
        (
            &[("Sec-Fetch-Site", "same-site"), ("Origin", own.as_str())],
            403,
        ),
        (&[("Sec-Fetch-Site", "none")], 403),
    ] {
        assert_eq!(
            log_in(&rig, &token, headers).status,
            expected,
            "{headers:?}"
        );
    }
    // Nobody else's form ends a session either.
    let cookie = session(&rig, &token);
    let out = rig.ask(
        "POST",
        "/logout",
        &[("Cookie", &cookie), ("Origin", foreign)],
        b"",
    );
    assert_eq!(out.status, 403);
    assert!(!is_form(&page(&rig, &cookie)));

    let plain = log_in(&rig, &token, &[OWN]);
    let plain = plain.header("set-cookie").unwrap();
    assert!(
        plain.starts_with("granary=")
            && plain.ends_with("; Path=/; Max-Age=28800; HttpOnly; SameSite=Strict"),
        "{plain}"
    );
    // Behind a proxy that speaks TLS.
    let secure = log_in(&rig, &token, &[OWN, ("X-Forwarded-Proto", "https")]);
    let secure = secure.header("set-cookie").unwrap();
    assert!(
        secure.starts_with("__Host-granary=") && secure.ends_with("; Secure"),
        "{secure}"
    );

    for (wrong, status) in [
        ("", 403),
        ("nonsense", 403),
        (&token[1..], 403),
        (&token[..token.len() - 9], 403),
    ] {
        let answer = log_in(&rig, wrong, &[OWN]);
        assert_eq!(
            (answer.status, answer.header("set-cookie")),
            (status, None),
            "{wrong:?}"
        );
        assert!(is_form(answer.text()) && answer.text().contains("Not logged in"));
        assert_eq!(answer.header("content-security-policy"), Some(policy()));
    }
    assert_eq!(rig.ask("POST", "/login", &[OWN], b"other=x").status, 400);
    assert_eq!(
        rig.ask("POST", "/login", &[OWN], &vec![b'a'; 100_000])
            .status,
        413
    );
    assert_eq!(rig.ask("GET", "/login", &[HTML], b"").status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_with_a_keyboard_logs_in_and_watches() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    let token = rig.token(&[("*", &[Pull, Configure])]).await;
    let secret = format!("Bearer {token}");
    let url = format!("http://{}/", rig.address());
    let visit = || {
        let mut browser = Browser::new();
        browser.open(&url);
        assert_eq!(browser.walk(), ["Granary", "Token", "Log in"]);
        browser.value("document.querySelector('[name=token]').focus()");
        browser.type_text("nonsense");
        browser.enter();
        browser.wait_for("document.body.innerText.includes('Not logged in')");
        // A page that says no is one that the browser reports.
        browser.complaints.clear();
        browser.value("document.querySelector('[name=token]').focus()");
        browser.type_text(&token);
        browser.enter();
        browser.wait_for("document.body.innerText.includes('signs with')");
        let text = browser.text();
        assert!(
            text.contains("as tester") && text.contains("Nothing yet."),
            "{text}"
        );
        assert_eq!(
            browser.value("document.cookie"),
            "",
            "a script sees the session"
        );
        // It renews itself, and leaves alone whoever walks through it.
        rig.ask(
            "GET",
            "/main/nix-cache-info",
            &[("Authorization", &secret)],
            b"",
        );
        browser.wait_for("document.body.innerText.includes('/main/nix-cache-info')");
        assert_eq!(
            browser.walk(),
            [
                "Granary",
                "Log out",
                "Caches",
                "What was asked last",
                "health"
            ]
        );
        browser.value("[...document.querySelectorAll('button')].at(-1).focus()");
        browser.enter();
        browser.wait_for("!!document.querySelector('[name=token]')");
        let elsewhere: Vec<_> = browser
            .requests
            .iter()
            .filter(|one| !one.starts_with(&url) && !one.starts_with("data:"))
            .collect();
        assert!(elsewhere.is_empty(), "{elsewhere:?}");
        assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    };
    tokio::task::block_in_place(visit);
}

fn empty() -> View {
    View {
        subject: "admin".to_owned(),
        whole: Some(Whole {
            storage: "file:///var/lib/granary/storage".to_owned(),
            ..Whole::default()
        }),
        ..View::default()
    }
}

fn busy() -> View {
    let cache = |name: &str, is_public, paths, file_bytes| CacheView {
        name: name.to_owned(),
        is_public,
        allows: "pull, push".to_owned(),
        paths,
        file_bytes,
        nar_bytes: 3 * file_bytes,
        public_keys: vec![format!(
            "{name}-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
        )],
        found: 48_120,
        absent: 3_002,
        sent_bytes: 90_000_000_000,
        pushed: 412,
        ..CacheView::default()
    };
    let access = |method: &str, path: &str, status, subject: Option<&str>| AccessView {
        cache: "team".to_owned(),
        method: method.to_owned(),
        path: path.to_owned(),
        status,
        subject: subject.map(str::to_owned),
        elapsed_ms: 3,
        seconds_ago: 4,
    };
    let upload = |path: &str, bytes| UploadView {
        cache: "team".to_owned(),
        path: path.to_owned(),
        bytes,
        nar_size: 150_000_000,
        seconds_ago: 2,
    };
    View {
        subject: "admin".to_owned(),
        token_ends_in: Some(40 * 86_400),
        caches: vec![
            cache("main", true, 104_020, 310_000_000_000),
            CacheView {
                quota: Some(250_000_000_000),
                own: Some(Share {
                    quota: 20_000_000_000,
                    held: 3_000_000_000,
                }),
                retention: Some(90 * 86_400),
                pins: 12,
                ..cache("team", false, 18_204, 81_000_000_000)
            },
        ],
        whole: Some(Whole {
            storage: "s3://granary/anchor".to_owned(),
            nars: 110_020,
            file_bytes: 370_000_000_000,
            requests_denied: 17,
            collection: Some(Collected {
                seconds_ago: 1_500,
                paths: 321,
                nars: 300,
                file_bytes: 7_000_000_000,
                waiting: 12,
                refused: Vec::new(),
            }),
            uploads: vec![
                upload(
                    "00bgd045z0d4icpbc2yyz4gx48ak44la-linux-6.18",
                    Some(60_000_000),
                ),
                upload("5zmzvpdk1xmrijvcpg8s2k8l4z8rbp4p-chromium-140.0", None),
            ],
            accesses: vec![
                access(
                    "GET",
                    "/team/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo",
                    200,
                    Some("laptop"),
                ),
                access(
                    "PUT",
                    "/team/nar/0q2cd045z0d4icpbc2yyz4gx48ak44la0q2cd045z0d4icpbc2yy.nar.xz",
                    200,
                    Some("ci"),
                ),
                access(
                    "GET",
                    "/team/5zmzvpdk1xmrijvcpg8s2k8l4z8rbp4p.narinfo",
                    404,
                    None,
                ),
            ],
            ..Whole::default()
        }),
    }
}

fn failing() -> View {
    let mut view = busy();
    view.caches[1].file_bytes = 240_000_000_000;
    view.caches[0].public_keys.clear();
    if let Some(whole) = &mut view.whole {
        whole.problem = Some("storage or catalog did not answer within 1s".to_owned());
        whole.damaged_nars = 3;
        whole.requests_failed = 41;
        whole.accesses[0].status = 503;
        whole.collection = Some(Collected {
            refused: vec![
                "retention of cache \"team\" would delete all 18,204 paths, refusing".to_owned(),
            ],
            ..Collected::default()
        });
    }
    view
}

#[test]
fn what_a_person_looks_for_stands_on_the_page_in_any_window() {
    let folder = std::env::var_os("GRANARY_SCREENSHOTS");
    let mut browser = Browser::new();
    let narrow_token = View {
        whole: None,
        ..busy()
    };
    for (name, html, expected) in [
        (
            "login",
            login(None),
            &["Log in", "granary token create"][..],
        ),
        (
            "empty",
            render(&empty()),
            &[
                "may pull from no cache",
                "Nothing is being pushed",
                "Nothing yet",
                "well",
            ],
        ),
        (
            "busy",
            render(&busy()),
            &[
                "104020",
                "75.4 GiB",
                "232.8 GiB quota",
                "18.6 GiB each, 2.8 GiB yours",
                "90 days, 12 pinned",
                "for ever",
                "linux-6.18",
                "57.2 MiB of 143.1 MiB",
                "arriving",
                "laptop",
                "anybody",
                "25 min ago",
                "6.5 GiB",
                "for 40 days",
            ],
        ),
        (
            "failing",
            render(&failing()),
            &[
                "Trouble",
                "did not answer within 1s",
                "3 stored NARs are damaged",
                "Cache team is 96 % full",
                "Cache main has no signing key",
                "41 requests failed",
                "Garbage was not collected",
            ],
        ),
        ("narrow-token", render(&narrow_token), &["team-1:6NCH"]),
    ] {
        let pages = crate::pages::Pages::new(vec![html]);
        for (look, width, is_dark) in [
            ("light", 1200, false),
            ("dark", 1200, true),
            ("phone", 360, false),
        ] {
            browser.look(width, 900, is_dark);
            browser.open(&pages.url());
            let text = browser.text();
            for words in expected {
                assert!(
                    text.contains(words),
                    "{name} {look}: no {words:?} in {text}"
                );
            }
            assert_eq!(text.contains("Trouble"), name == "failing", "{name}");
            assert_eq!(
                browser.value("document.getElementById('away').hidden"),
                true
            );
            assert!(
                !browser.is_too_wide(),
                "{name} {look} is wider than its window"
            );
            if let Some(folder) = &folder {
                browser.picture(&Path::new(folder).join(format!("anchor-{name}-{look}.png")));
            }
        }
        if name != "login" {
            browser.walk();
        }
        assert_eq!(pages.elsewhere(), 0, "{name}");
    }
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn what_strangers_chose_is_text_on_the_anchors_page() {
    let evil = "<img src=x onerror=alert(1)>\"'";
    let mut view = failing();
    view.subject = evil.to_owned();
    view.caches[0].name = evil.to_owned();
    view.caches[0].public_keys = vec![evil.to_owned()];
    if let Some(whole) = &mut view.whole {
        whole.problem = Some(evil.to_owned());
        whole.storage = evil.to_owned();
        whole.uploads[0].path = evil.to_owned();
        whole.accesses[0].path = evil.to_owned();
        whole.accesses[0].subject = Some(evil.to_owned());
    }
    for html in [render(&view), login(Some(evil))] {
        assert!(!html.contains("<img") && html.contains("&lt;img"), "{html}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_names_a_cache_that_is_nearly_full() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    assert_eq!(
        rig.upload(&token, "main", &Sample::new(1, 100_000)).status,
        200
    );
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    let (_, stored) = anchor.catalog.stored().await.unwrap();
    let changes = Changes {
        quota: Some(Some(stored + 1)),
        ..Changes::default()
    };
    anchor
        .configure_cache(&"main".parse().unwrap(), &changes)
        .await
        .unwrap();
    let shown = page(&rig, &session(&rig, &token));
    assert!(
        shown.contains("Cache main is") && shown.contains("% full"),
        "{shown}"
    );
    let changes = Changes {
        quota: Some(None),
        subject_quota: Some(Some(stored + 1)),
        ..Changes::default()
    };
    anchor
        .configure_cache(&"main".parse().unwrap(), &changes)
        .await
        .unwrap();
    let shown = page(&rig, &session(&rig, &token));
    assert!(
        !shown.contains("% full") && shown.contains("% of what each may have in cache main"),
        "{shown}"
    );
}
