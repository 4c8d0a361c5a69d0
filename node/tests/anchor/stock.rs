//! What an anchor tells of a cache to who may pull from it, and what a node shows of that.

use std::time::Instant;

use granary_protocol::token::Permission::{Pull, Push};
use serde_json::{Value, json};

use crate::queue::Pusher;
use crate::rig::{GENEROUS, Rig, Sample, bearer};

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_tells_what_it_holds_to_who_may_pull_from_it_and_nothing_of_others() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("secret", false).await;
    let token = rig.token(&[("secret", &[Pull, Push])]).await;
    let other = bearer(&rig.token(&[("main", &[Pull, Push])]).await);
    let own = bearer(&token);
    let sample = Sample::new(1, 100_000);
    assert_eq!(rig.upload(&token, "secret", &sample).status, 200);
    let ask = |cache: &str, token: &str| {
        let target = format!("/api/v1/caches/{cache}");
        rig.ask("GET", &target, &[("Authorization", token)], b"")
    };
    let held = ask("secret", &own).json();
    let stored = held["stored_bytes"].as_u64().unwrap();
    assert!((1..=200_000).contains(&stored), "{held}");
    assert_eq!(
        held,
        json!({
            "public": false, "paths": 1, "nar_bytes": sample.nar.len(), "stored_bytes": stored, "size_cap": null,
            "quota": null, "retention": null, "collected": null, "arriving": 0,
        })
    );
    // A private cache cannot be told from one that is not there.
    for cache in ["secret", "absent"] {
        let answer = rig.get(&format!("/api/v1/caches/{cache}"));
        assert_eq!(answer.status, 401, "{cache}");
        assert_eq!(ask(cache, &other).status, 403, "{cache}");
    }
    // Of a public one everybody hears.
    let held = rig.get("/api/v1/caches/main").json();
    assert_eq!((&held["public"], &held["paths"]), (&json!(true), &json!(0)));
    assert_eq!(rig.get("/api/v1/caches/Not%20a%20name").status, 400);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor.collect().await.unwrap();
    let collected = &ask("secret", &own).json()["collected"];
    assert_eq!(
        (&collected["paths"], &collected["refused"]),
        (&json!(0), &Value::Null)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_shows_the_cache_that_it_uses_of_an_anchor_and_no_other() {
    let mut rig = Rig::new().await;
    rig.cache("main", false).await;
    rig.cache("hidden-from-users", false).await;
    // More than it needs: its users shall see no more for it.
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let sample = Sample::new(1, 100_000);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    let mut pusher = Pusher::new(&rig.url("main"), &token);
    pusher.start();
    let status = |pusher: &Pusher| {
        let output = pusher.granary(&["status", "--json"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let started = Instant::now();
    let told = loop {
        let text = status(&pusher);
        let report: Value = serde_json::from_str(&text).unwrap_or_default();
        let told = report["caches"][0]["holds"].clone();
        if told["paths"] == 1 {
            assert!(!text.contains("hidden-from-users"), "{text}");
            break told;
        }
        assert!(started.elapsed() < GENEROUS, "{text}");
    };
    assert_eq!(told["nar_bytes"], sample.nar.len());
    // What was told stays to be seen while the anchor is away.
    rig.stop().await;
    let output = pusher.granary(&["status"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("  holds "));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    assert!(
        line.contains("1 path, 97.8 KiB in") && line.contains("; private, keeps all; told"),
        "{line}"
    );
}
