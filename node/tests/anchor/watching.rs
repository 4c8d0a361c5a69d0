//! What whoever watches an anchor learns: metrics, health, and who did what.

use std::time::Instant;

use granary_protocol::token::Permission::{Pull, Push};

use crate::command::Place;
use crate::rig::{Rig, Sample, bearer};
use crate::s3::{Fault, S3};

/// The value of a line of metrics.
fn value(text: &str, name: &str) -> u64 {
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix(&format!("granary_anchor_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_of_each_cache_what_was_done_to_those_who_may_read_all_of_them() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("secret", false).await;
    let token = rig
        .token(&[("secret", &[Pull, Push]), ("main", &[Push])])
        .await;
    let (watcher, pusher) = (bearer(&rig.token(&[("*", &[Pull])]).await), bearer(&token));
    let scrape = || rig.ask("GET", "/metrics", &[("Authorization", &watcher)], b"");
    // Names of private caches stand there.
    assert_eq!(rig.get("/metrics").status, 401);
    let narrow = rig.ask("GET", "/metrics", &[("Authorization", &pusher)], b"");
    assert_eq!(
        (narrow.status, narrow.error().as_str()),
        (403, "MissingPermission")
    );

    let sample = Sample::new(1, 100_000);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    assert_eq!(rig.upload(&token, "secret", &sample).status, 200);
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", sample.hash())).status,
        200
    );
    assert_eq!(
        rig.get("/main/00000000000000000000000000000000.narinfo")
            .status,
        404
    );
    let nar = rig.get(&format!("/main/nar/{}.nar.zst", sample.nar_hash().nix32()));
    assert_eq!(rig.get("/secret/nix-cache-info").status, 401);
    // A name that no cache has is no label.
    assert_eq!(rig.get("/strange/nix-cache-info").status, 401);
    let bad = rig.ask(
        "PUT",
        "/main/x.narinfo",
        &[("Authorization", &pusher)],
        b"x",
    );
    assert_eq!(bad.status, 400);

    let text = scrape();
    let text = text.text();
    for (name, expected) in [
        ("narinfos_total{cache=\"main\",outcome=\"found\"}", 1),
        ("narinfos_total{cache=\"main\",outcome=\"absent\"}", 1),
        ("nars_total{cache=\"main\"}", 1),
        (
            "nar_sent_bytes_total{cache=\"main\"}",
            nar.body.len() as u64,
        ),
        ("pushes_total{cache=\"main\",outcome=\"stored\"}", 1),
        ("pushes_total{cache=\"main\",outcome=\"known\"}", 1),
        ("pushes_total{cache=\"secret\",outcome=\"stored\"}", 1),
        (
            "nar_stored_bytes_total{cache=\"main\"}",
            nar.body.len() as u64,
        ),
        ("nar_stored_bytes_total{cache=\"secret\"}", 0),
        ("requests_refused_total{cache=\"main\"}", 1),
        ("requests_failed_total{cache=\"main\"}", 0),
        // Two before, two after.
        ("requests_denied_total", 4),
        ("paths{cache=\"main\"}", 1),
        ("nar_bytes{cache=\"main\"}", sample.nar.len() as u64),
        ("stored_bytes{cache=\"secret\"}", nar.body.len() as u64),
        ("storage_nars", 1),
        ("storage_bytes", nar.body.len() as u64),
        ("collections_total{outcome=\"done\"}", 0),
    ] {
        assert_eq!(value(text, name), expected, "{name}");
    }
    assert!(!text.contains("strange"), "{text}");
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor.collect().await.unwrap();
    let text = scrape();
    assert_eq!(value(text.text(), "collections_total{outcome=\"done\"}"), 1);
}

#[test]
fn the_access_log_says_who_by_the_name_in_the_token() {
    let place = Place::new();
    let anchor = place.start();
    let subject = "the \"nightly\" job";
    let arguments = ["token", "create", "--subject", subject, "--cache", "main"];
    let token = place.run(&[&arguments[..], &["--allow", "pull"]].concat());
    assert_eq!(anchor.get("/main/nix-cache-info", &token).status, 200);
    let line = anchor.logged("path=\"/main/nix-cache-info\"");
    assert!(
        line.contains("subject=\"the \\\"nightly\\\" job\""),
        "{line}"
    );
    assert_eq!(anchor.get("/main/log/x", "a.b.c").status, 401);
    let line = anchor.logged("path=\"/main/log/x\"");
    assert!(!line.contains("subject"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_is_not_well_when_its_storage_is_another() {
    let rig = Rig::new().await;
    assert_eq!(rig.get("/health").status, 200);
    let storage = rig.folder.path().join("storage");
    // As when a disk is not mounted.
    let format = std::fs::read(storage.join("granary.json")).unwrap();
    std::fs::remove_file(storage.join("granary.json")).unwrap();
    let deadline = Instant::now() + crate::rig::GENEROUS;
    while rig.get("/health").status == 200 {
        assert!(Instant::now() < deadline, "it is still well");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(rig.get("/health").status, 503);
    std::fs::write(storage.join("granary.json"), format).unwrap();
    assert_eq!(rig.get("/health").status, 200);
}

#[test]
fn the_log_tells_once_that_storage_fails_and_once_that_it_is_well_however_often_it_is_asked() {
    let place = Place::new();
    let anchor = place.start();
    let format = place.path().join("state/storage/granary.json");
    let aside = place.path().join("granary.json");
    let ask_until = |status| {
        let deadline = Instant::now() + crate::rig::GENEROUS;
        while anchor.get("/health", "").status != status {
            assert!(Instant::now() < deadline, "it is not {status}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    for round in 1..=2 {
        std::fs::rename(&format, &aside).unwrap();
        ask_until(503);
        for _ in 0..10 {
            assert_eq!(anchor.get("/health", "").status, 503);
        }
        let told = anchor.logged_times("storage or catalog is not well", round);
        assert_eq!(told, round);
        std::fs::rename(&aside, &format).unwrap();
        ask_until(200);
        let told = anchor.logged_times("the anchor is well again", round);
        assert_eq!(told, round);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_hangs_makes_an_anchor_unwell_in_bounded_time_and_is_asked_once() {
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    let asked = || {
        let requests = s3.requests();
        let probes = requests
            .iter()
            .filter(|request| request.contains("granary.json"));
        probes.count()
    };
    let before = asked();
    // Enough for each question, if there were more than one.
    for _ in 0..8 {
        s3.fail(Fault::Silence, |_, target| target.contains("granary.json"));
    }
    let address = rig.address();
    let started = Instant::now();
    let ask = move || crate::rig::ask(address, "GET", "/health", &[], b"");
    let several = (0..4).map(|_| tokio::task::spawn_blocking(ask));
    for answer in futures::future::join_all(several).await {
        let answer = answer.unwrap();
        assert_eq!(
            (answer.status, answer.error().as_str()),
            (503, "InternalError")
        );
    }
    assert!(started.elapsed().as_secs() < 15, "{:?}", started.elapsed());
    assert_eq!(asked(), before + 1);
}
