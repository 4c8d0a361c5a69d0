//! How much a cache may hold: what goes when it is too large, and what is refused when it is full.

use std::time::Duration;

use granary::anchor::admin::Changes;
use granary_protocol::token::Permission::{Pull, Push};

use crate::command::Place;
use crate::rig::{Machine, Rig, Sample, bearer};

const HOUR: Duration = Duration::from_secs(3600);

async fn configure(rig: &Rig, cache: &str, changes: Changes) {
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let name = cache.parse().unwrap();
    anchor.configure_cache(&name, &changes).await.unwrap();
}

async fn stored(rig: &Rig, cache: &str) -> u64 {
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let row = anchor.catalog.cache(&cache.parse().unwrap()).await;
    let id = row.unwrap().unwrap().id;
    anchor.catalog.statistics(id).await.unwrap().file_bytes
}

fn has(rig: &Rig, sample: &Sample) -> bool {
    // Asked without a use: who reads a narinfo keeps it.
    rig.objects()
        .iter()
        .any(|key| key == &format!("caches/main/narinfo/{}.narinfo", sample.hash()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_too_large_loses_the_closures_that_were_not_used_for_longest() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let samples: Vec<Sample> = (0..6)
        .map(|number| {
            let mut sample = Sample::new(number, 20_000);
            // 1 references 0, and 5 references 2.
            let below = match number {
                1 => Some(Sample::new(0, 0)),
                5 => Some(Sample::new(2, 0)),
                _ => None,
            };
            let name = |below: Sample| below.path["/nix/store/".len()..].to_owned();
            sample.references = below.map(name).into_iter().collect();
            sample
        })
        .collect();
    for sample in &samples {
        assert_eq!(rig.upload(&token, "main", sample).status, 200);
        rig.clock.advance(HOUR);
    }
    let all = stored(&rig, "main").await;
    let pin = Changes {
        pinned: vec![samples[3].hash().parse().unwrap()],
        size_cap: Some(Some(all)),
        ..Changes::default()
    };
    configure(&rig, "main", pin).await;
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let left = |rig: &Rig| -> Vec<usize> {
        let samples = samples.iter().enumerate();
        let held = samples.filter(|(_, sample)| has(rig, sample));
        held.map(|(number, _)| number).collect()
    };
    rig.clock.advance(HOUR);
    assert_eq!(anchor.collect().await.unwrap().caches[0].over_cap, 0);
    assert_eq!(left(&rig), [0, 1, 2, 3, 4, 5]);

    // A byte too much: the oldest closure gives way from its top, only as far as it must.
    let cap = |bytes: u64| Changes {
        size_cap: Some(Some(bytes)),
        ..Changes::default()
    };
    configure(&rig, "main", cap(all - 1)).await;
    let plan = anchor.plan().await.unwrap();
    assert_eq!(
        plan.caches[0].paths,
        [&samples[1].path["/nix/store/".len()..]]
    );
    let done = anchor.collect().await.unwrap();
    assert_eq!((done.caches[0].over_cap, done.caches[0].of), (1, 6));
    assert_eq!(left(&rig), [0, 2, 3, 4, 5]);
    assert!(stored(&rig, "main").await < all);

    // What is pinned stays, and what was used a moment ago, with what it references.
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", samples[5].hash()))
            .status,
        200
    );
    configure(&rig, "main", cap(1)).await;
    assert_eq!(anchor.collect().await.unwrap().caches[0].over_cap, 2);
    assert_eq!(left(&rig), [2, 3, 5]);
    rig.clock.advance(HOUR + Duration::from_secs(60));
    anchor.collect().await.unwrap();
    assert_eq!(left(&rig), [3]);
    // Their NARs wait for a day, as always.
    let nars = |rig: &Rig| {
        rig.objects()
            .iter()
            .filter(|key| key.starts_with("nar/"))
            .count()
    };
    assert_eq!(nars(&rig), 6);
    rig.clock.advance(HOUR * 25);
    anchor.collect().await.unwrap();
    assert_eq!(nars(&rig), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_refuses_every_kind_of_push_with_the_reason_until_there_is_room() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let (first, second) = (Sample::new(1, 50_000), Sample::new(2, 50_000));
    assert_eq!(rig.upload(&token, "main", &first).status, 200);
    let quota = |bytes: Option<u64>| Changes {
        quota: Some(bytes),
        ..Changes::default()
    };
    let held = stored(&rig, "main").await;
    // Not full, but without room for another.
    configure(&rig, "main", quota(Some(held + 1000))).await;
    let refused = rig.upload(&token, "main", &second);
    assert_eq!(
        (refused.status, refused.error().as_str()),
        (413, "PathOverQuota")
    );
    assert!(
        refused.text().contains(&format!("holds {held} bytes")),
        "{refused:?}"
    );
    assert_eq!(stored(&rig, "main").await, held);
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", second.hash())).status,
        404
    );
    // Other caches have quotas of their own.
    assert_eq!(rig.upload(&token, "other", &second).status, 200);

    configure(&rig, "main", quota(Some(held))).await;
    let authorization = bearer(&token);
    let headers = [("Authorization", authorization.as_str())];
    let narinfo = format!(
        "StorePath: {}\nURL: nar/x\nNarHash: {}\nNarSize: {}\nReferences: \n",
        second.path,
        second.nar_hash(),
        second.nar.len()
    );
    let begin = serde_json::json!({ "narinfo": narinfo }).to_string();
    let uploads = "/api/v1/caches/main/uploads";
    let begun = rig.ask("POST", uploads, &headers, begin.as_bytes());
    assert_eq!(
        (begun.status, begun.error().as_str()),
        (413, "QuotaExceeded")
    );
    // A path that is here may be pushed again.
    assert_eq!(
        rig.upload(&token, "main", &first).json()["kind"],
        "Deduplicated"
    );
    let begin = begin.replace(&second.path, &first.path);
    let known = rig.ask("POST", uploads, &headers, begin.as_bytes());
    assert_eq!(known.status, 200, "{known:?}");

    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let url = rig.url("main");
    tokio::task::block_in_place(|| {
        let refused = builder.try_nix("nix", &["copy", "--to", &url, &closure[2]]);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains("413"), "{said}");
    });

    // Room is made, and noticed at once.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let row = anchor.catalog.cache(&"main".parse().unwrap()).await;
    let hash = first.hash().parse().unwrap();
    assert!(
        anchor
            .remove_path(&row.unwrap().unwrap(), hash)
            .await
            .unwrap()
    );
    assert_eq!(rig.upload(&token, "main", &first).status, 200);
    configure(&rig, "main", quota(None)).await;
    assert_eq!(rig.upload(&token, "main", &second).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_subject_that_has_enough_is_refused_and_others_are_not() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let elsewhere = {
        let mut claims = crate::rig::claims(&[("*", &[Pull, Push])]);
        claims.subject = "somebody else".to_owned();
        claims.mint(&granary::anchor::tokens::token_key(&rig.state()).unwrap())
    };
    let samples: Vec<_> = (1..=5).map(|number| Sample::new(number, 50_000)).collect();
    assert_eq!(rig.upload(&elsewhere, "main", &samples[0]).status, 200);
    assert_eq!(rig.upload(&token, "main", &samples[1]).status, 200);
    let held = stored(&rig, "main").await / 2;
    let quota = Changes {
        subject_quota: Some(Some(held + held / 2)),
        ..Changes::default()
    };
    configure(&rig, "main", quota).await;
    let refused = |token: &str, sample: &Sample| {
        let answer = rig.upload(token, "main", sample);
        (
            answer.status,
            answer.text().contains("that \\\"tester\\\" pushed"),
        )
    };
    assert_eq!(refused(&token, &samples[2]), (413, true));
    // What is here costs nothing, and was another's.
    assert_eq!(rig.upload(&token, "main", &samples[0]).status, 200);
    assert_eq!(rig.upload(&token, "main", &samples[1]).status, 200);
    assert_eq!(rig.upload(&token, "other", &samples[2]).status, 200);
    // The same NAR under another name neither.
    let mut again = Sample::new(6, 0);
    again.nar = samples[1].nar.clone();
    assert_eq!(rig.upload(&token, "main", &again).status, 200);
    let full = Changes {
        subject_quota: Some(Some(held)),
        ..Changes::default()
    };
    configure(&rig, "main", full).await;
    let authorization = bearer(&token);
    let put = rig.ask(
        "PUT",
        &format!("/main/nar/{}.nar", samples[3].nar_hash().nix32()),
        &[("Authorization", &authorization)],
        &samples[3].nar,
    );
    assert_eq!((put.status, put.error().as_str()), (413, "QuotaExceeded"));

    // Room is made, and noticed at once.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let row = anchor.catalog.cache(&"main".parse().unwrap()).await;
    let row = row.unwrap().unwrap();
    for sample in [&samples[1], &again] {
        let hash = sample.hash().parse().unwrap();
        assert!(anchor.remove_path(&row, hash).await.unwrap());
    }
    let enough = Changes {
        subject_quota: Some(Some(held + held / 2)),
        ..Changes::default()
    };
    configure(&rig, "main", enough).await;
    assert_eq!(rig.upload(&token, "main", &samples[3]).status, 200);
    assert_eq!(refused(&token, &samples[4]), (413, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn nars_that_no_path_names_yet_fill_a_cache_as_well() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = bearer(&rig.token(&[("main", &[Pull, Push])]).await);
    let headers = [("Authorization", token.as_str())];
    let samples: Vec<_> = (1..=3).map(|number| Sample::new(number, 50_000)).collect();
    let put = |sample: &Sample| {
        let target = format!("/main/nar/{}.nar", sample.nar_hash().nix32());
        let answer = rig.ask("PUT", &target, &headers, &sample.nar);
        let error = match answer.status {
            201 => String::new(),
            _ => answer.error(),
        };
        (answer.status, error)
    };
    assert_eq!(put(&samples[0]).0, 201);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let (_, held) = anchor.catalog.stored().await.unwrap();
    let quota = |bytes: u64| Changes {
        quota: Some(Some(bytes)),
        ..Changes::default()
    };
    configure(&rig, "main", quota(held + held / 2)).await;
    assert_eq!(put(&samples[1]), (413, "PathOverQuota".to_owned()));
    configure(&rig, "main", quota(held)).await;
    assert_eq!(put(&samples[1]), (413, "QuotaExceeded".to_owned()));
    // Named by a path it counts once, and goes with that.
    let narinfo = format!(
        "StorePath: {}\nURL: nar/{}.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: \n",
        samples[0].path,
        samples[0].nar_hash().nix32(),
        samples[0].nar_hash(),
        samples[0].nar.len()
    );
    let target = format!("/main/{}.narinfo", samples[0].hash());
    let described = rig.ask("PUT", &target, &headers, narinfo.as_bytes());
    assert_eq!(described.status, 201, "{described:?}");
    configure(&rig, "main", quota(2 * held + held / 2)).await;
    assert_eq!(put(&samples[1]).0, 201);
    assert_eq!(put(&samples[2]), (413, "PathOverQuota".to_owned()));
    let row = anchor.catalog.cache(&"main".parse().unwrap()).await;
    let row = row.unwrap().unwrap();
    let hash = samples[0].hash().parse().unwrap();
    assert!(anchor.remove_path(&row, hash).await.unwrap());
    assert_eq!(put(&samples[2]).0, 201);
}

#[test]
fn the_command_line_sets_limits_and_tells_how_full_a_cache_is() {
    let place = Place::new();
    let _anchor = place.start();
    place.run(&[
        "cache",
        "create",
        "team",
        "--quota",
        "2GB",
        "--size-cap",
        "1GB",
        "--subject-quota",
        "1GB",
    ]);
    let info = place.run(&["cache", "info", "team"]);
    assert!(
        info.contains("quota             1.9 GiB, 0 % of it in use"),
        "{info}"
    );
    assert!(
        info.contains("subject quota     953.7 MiB for each"),
        "{info}"
    );
    let json = place.run(&["cache", "info", "team", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["settings"]["size_cap"], 1_000_000_000);
    assert_eq!(
        (&json["paths"], &json["last_used"]),
        (&0.into(), &serde_json::Value::Null)
    );
    let refused = place.fail(&["cache", "configure", "team", "--quota", "1MB"]);
    assert!(refused.contains("could never be reached"), "{refused}");
    let refused = place.fail(&["cache", "configure", "team", "--quota", "much"]);
    assert!(refused.contains("expected none or a number"), "{refused}");
    place.run(&[
        "cache",
        "configure",
        "team",
        "--quota",
        "none",
        "--size-cap",
        "none",
        "--subject-quota",
        "none",
    ]);
    let info = place.run(&["cache", "info", "team"]);
    assert!(
        !info.contains("quota") && !info.contains("size cap"),
        "{info}"
    );
}
