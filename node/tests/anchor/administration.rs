//! What is done to caches is done whole, whatever interrupts it and whoever else does something.

use std::sync::Arc;
use std::time::Instant;

use granary::anchor::Anchor;
use granary::anchor::admin::Changes;
use granary::anchor::rebuild::rebuild;
use granary::anchor::server::Server;
use granary_protocol::token::Permission::{Create, Destroy, Push};

use crate::rig::{GENEROUS, Rig, Sample, bearer};
use crate::s3::{Fault, S3};

/// Everything that storage has of a cache.
async fn left(rig: &Rig, cache: &str) -> Vec<String> {
    use futures::TryStreamExt;
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let listed = anchor.storage.list(&format!("caches/{cache}"));
    listed
        .map_ok(|object| object.key)
        .try_collect()
        .await
        .unwrap()
}

/// A rig with a private cache of three paths, whose deletion fails at one of them.
async fn half_deleted(s3: &S3) -> (Rig, Vec<Sample>, String) {
    let rig = Rig::on_s3(s3).await;
    rig.cache("team", false).await;
    let token = rig.token(&[("*", &[Push, Create, Destroy])]).await;
    let samples: Vec<Sample> = (0..3).map(|number| Sample::new(number, 1000)).collect();
    for path in &samples {
        assert_eq!(rig.upload(&token, "team", path).status, 200);
    }
    fail_at(s3, &samples[1]);
    assert_eq!(delete(&rig, &token), 503);
    assert_eq!(s3.faults_left(), 0);
    assert_eq!(left(&rig, "team").await.len(), 1);
    (rig, samples, token)
}

fn fail_at(s3: &S3, sample: &Sample) {
    let narinfo = format!("{}.narinfo", sample.hash());
    s3.fail(Fault::Denied, move |method, target| {
        method == "DELETE" && target.contains(&narinfo)
    });
}

fn delete(rig: &Rig, token: &str) -> u16 {
    let headers = [("Authorization", bearer(token))];
    let headers = headers
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let target = "/_api/v1/cache-config/team";
    rig.ask("DELETE", target, &headers, b"").status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_storage_interrupted_is_finished_by_the_next_start() {
    let s3 = S3::start().await;
    let (mut rig, _, token) = half_deleted(&s3).await;
    assert!(!rig.state().join("keys/team").exists());
    rig.stop().await;
    // Not taken for a cache by who looks at the bucket alone.
    let found = rebuild(&rig.options()).await.unwrap();
    assert_eq!((found.caches, found.paths), (0, 0));
    rig.start().await;
    let started = Instant::now();
    while !left(&rig, "team").await.is_empty() {
        assert!(started.elapsed() < GENEROUS, "the deletion does not end");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // The note goes after the last object.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    while !anchor.catalog.deletions().await.unwrap().is_empty() {
        assert!(started.elapsed() < GENEROUS, "the deletion stays noted");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(delete(&rig, &token), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_deleted_of_the_default_cache_keeps_no_anchor_from_starting() {
    let s3 = S3::start().await;
    let (mut rig, samples, _) = half_deleted(&s3).await;
    rig.stop().await;
    // Asked for by who makes the cache anew, and perhaps once more by who goes on.
    for _ in 0..2 {
        fail_at(&s3, &samples[1]);
    }
    let listen = "127.0.0.1:0".parse().unwrap();
    let server = Server::start(rig.options(), listen, Some("team")).await;
    rig.server = Some(server.unwrap());
    assert!(s3.faults_left() < 2);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let team = anchor.catalog.cache(&"team".parse().unwrap()).await;
    assert_eq!(team.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_storage_interrupted_is_finished_by_who_asks_again() {
    let s3 = S3::start().await;
    let (rig, _, token) = half_deleted(&s3).await;
    assert_eq!(delete(&rig, &token), 200);
    assert_eq!(left(&rig, "team").await, [""; 0]);
    assert_eq!(delete(&rig, &token), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_made_again_has_nothing_of_the_one_that_was_deleted() {
    let s3 = S3::start().await;
    let (mut rig, samples, token) = half_deleted(&s3).await;
    let create = |rig: &Rig| {
        let body = br#"{"keypair": "Generate", "is_public": true, "store_dir": "/nix/store", "priority": 41, "upstream_cache_key_names": []}"#;
        let token = bearer(&token);
        let headers = [("Authorization", token.as_str())];
        let target = "/_api/v1/cache-config/team";
        rig.ask("POST", target, &headers, body).status
    };
    fail_at(&s3, &samples[1]);
    assert_eq!(create(&rig), 503);
    assert_eq!(create(&rig), 200);
    assert_eq!(left(&rig, "team").await, ["caches/team/cache.json"]);
    rig.stop().await;
    rebuild(&rig.options()).await.unwrap();
    rig.start().await;
    for path in &samples {
        let target = format!("/team/{}.narinfo", path.hash());
        assert_eq!(rig.get(&target).status, 404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_change_of_a_cache_is_lost_between_an_anchor_and_commands_beside_it() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let samples: Vec<Sample> = (0..40).map(|number| Sample::new(number, 100)).collect();
    for path in &samples {
        assert_eq!(rig.upload(&token, "main", path).status, 200);
    }
    let server = rig.server.as_ref().unwrap().anchor.clone();
    // As another process has it.
    let command = Anchor::open(rig.options()).await.unwrap();
    let pin = |anchor: Arc<Anchor>, sample: &Sample| {
        let changes = Changes {
            pinned: vec![sample.hash().parse().unwrap()],
            ..Changes::default()
        };
        tokio::spawn(async move {
            let name = "main".parse().unwrap();
            anchor.configure_cache(&name, &changes).await.map(drop)
        })
    };
    let pins = samples.chunks(2).flat_map(|pair| {
        [
            pin(server.clone(), &pair[0]),
            pin(command.clone(), &pair[1]),
        ]
    });
    let pins: Vec<_> = pins.collect();
    let main = "main".parse().unwrap();
    let rotated = command.rotate_key(&main, None, false);
    assert_eq!(rotated.await.unwrap().settings.public_keys.len(), 2);
    for pinned in pins {
        pinned.await.unwrap().unwrap();
    }
    let main = server.catalog.cache(&main).await;
    let settings = main.unwrap().unwrap().settings;
    assert_eq!((settings.pins.len(), settings.public_keys.len()), (40, 2));
}
