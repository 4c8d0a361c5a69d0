//! What is kept, what is deleted, and that nobody who relies on a path loses it.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use granary::anchor::admin::Changes;
use granary::anchor::gc::{Collection, GRACE};
use granary_protocol::token::Permission::{Delete, Pull, Push};

use crate::rig::{Rig, Sample, bearer};
use crate::s3::{Fault, S3};

const DAY: Duration = Duration::from_secs(24 * 3600);

async fn retain(rig: &Rig, cache: &str, days: u64) {
    let changes = Changes {
        retention: Some(Some(days * DAY.as_secs())),
        ..Changes::default()
    };
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor
        .configure_cache(&cache.parse().unwrap(), &changes)
        .await
        .unwrap();
}

async fn collect(rig: &Rig) -> Collection {
    rig.server.as_ref().unwrap().anchor.collect().await.unwrap()
}

fn has(rig: &Rig, cache: &str, sample: &Sample) -> bool {
    rig.get(&format!("/{cache}/{}.narinfo", sample.hash()))
        .status
        == 200
}

fn nars(rig: &Rig) -> usize {
    rig.objects()
        .iter()
        .filter(|key| key.starts_with("nar/"))
        .count()
}

/// A path that references others.
fn sample(number: u64, references: &[&Sample]) -> Sample {
    let mut sample = Sample::new(number, 1000);
    let base_name = |path: &&Sample| path.path["/nix/store/".len()..].to_owned();
    sample.references = references.iter().map(base_name).collect();
    sample
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_is_kept_while_its_top_is_used_or_pinned_and_goes_with_its_nars_after_that() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let low = sample(1, &[]);
    let top = sample(2, &[&low]);
    let other = sample(3, &[]);
    for path in [&low, &top, &other] {
        assert_eq!(rig.upload(&token, "main", path).status, 200);
    }
    // Without a retention everything stays.
    rig.clock.advance(DAY * 1000);
    assert_eq!(collect(&rig).await, Collection::default());

    // The top alone was asked for, and keeps what it references.
    retain(&rig, "main", 30).await;
    assert!(has(&rig, "main", &top));
    let plan = rig.server.as_ref().unwrap().anchor.plan().await.unwrap();
    assert_eq!(plan.caches[0].paths, [&other.path["/nix/store/".len()..]]);
    assert!(has(&rig, "main", &top), "a plan deletes nothing");
    rig.clock.advance(DAY * 29);
    let done = collect(&rig).await;
    assert_eq!(
        (done.caches[0].paths.len(), done.nars, done.waiting),
        (1, 0, 1)
    );
    // Looking at it has been a use.
    assert!(!has(&rig, "main", &other) && nars(&rig) == 3);
    rig.clock.advance(GRACE);
    assert_eq!(collect(&rig).await.nars, 1);
    assert_eq!(nars(&rig), 2);

    // Pinned, it stays; unpinned, it goes, and the cache may be emptied.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let hash = top.hash().parse().unwrap();
    let pin = Changes {
        pinned: vec![hash],
        ..Changes::default()
    };
    anchor
        .configure_cache(&"main".parse().unwrap(), &pin)
        .await
        .unwrap();
    rig.clock.advance(DAY * 400);
    assert_eq!(collect(&rig).await.caches[0].paths.len(), 0);
    let unpin = Changes {
        unpinned: vec![hash],
        ..Changes::default()
    };
    anchor
        .configure_cache(&"main".parse().unwrap(), &unpin)
        .await
        .unwrap();
    assert_eq!(collect(&rig).await.caches[0].paths.len(), 2);
    rig.clock.advance(GRACE);
    assert_eq!(collect(&rig).await.nars, 2);
    assert_eq!(rig.objects(), ["caches/main/cache.json", "granary.json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_pins_with_a_name_the_newest_stay_and_of_others_all() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let samples = [1, 2, 3, 4, 5].map(|number| sample(number, &[]));
    for path in &samples {
        assert_eq!(rig.upload(&token, "main", path).status, 200);
    }
    retain(&rig, "main", 30).await;
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    let configure = async |changes: Changes| {
        let name = "main".parse().unwrap();
        anchor.configure_cache(&name, &changes).await.unwrap()
    };
    let hash = |number: usize| samples[number].hash().parse().unwrap();
    let pin = async |name: &str, numbers: &[usize], keep| {
        configure(Changes {
            pinned: numbers.iter().map(|number| hash(*number)).collect(),
            pinned_as: Some((name.parse().unwrap(), keep)),
            ..Changes::default()
        })
        .await
    };
    // An old release, and the system of one machine three times: the first of them again at last.
    pin("release", &[0], Some(1)).await;
    pin("nas", &[1], Some(2)).await;
    pin("nas", &[2, 3], None).await;
    pin("nas", &[1], Some(2)).await;
    let kept = async || {
        rig.clock.advance(DAY * 400);
        collect(&rig).await;
        // In the bucket, for to ask is to use.
        let objects = rig.objects();
        let is_kept = |sample: &Sample| {
            let key = format!("caches/main/narinfo/{}.narinfo", sample.hash());
            objects.contains(&key)
        };
        samples.each_ref().map(is_kept)
    };
    assert_eq!(kept().await, [true, true, false, true, false]);
    configure(Changes {
        unpinned: vec![hash(3)],
        ..Changes::default()
    })
    .await;
    assert_eq!(kept().await, [true, true, false, false, false]);
    let cache = configure(Changes {
        unpinned_name: Some("nas".parse().unwrap()),
        ..Changes::default()
    })
    .await;
    assert_eq!(cache.settings.pinned().count(), 1);
    assert_eq!(kept().await, [true, false, false, false, false]);
    for name in ["", "-a", "a b", "a/b", &"a".repeat(51)] {
        let parsed = name.parse::<granary::anchor::cache::PinName>();
        assert!(parsed.is_err(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_cache_has_is_never_freed() {
    let rig = Rig::new().await;
    rig.cache("one", true).await;
    rig.cache("two", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let shared = sample(1, &[]);
    for cache in ["one", "two"] {
        assert_eq!(rig.upload(&token, cache, &shared).status, 200);
    }
    retain(&rig, "one", 1).await;
    for _ in 0..4 {
        rig.clock.advance(DAY * 2);
        collect(&rig).await;
    }
    assert!(!has(&rig, "one", &shared) && has(&rig, "two", &shared));
    assert_eq!(nars(&rig), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_crashes_left_in_the_bucket_goes_after_a_day_and_nothing_else() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let kept = sample(1, &[]);
    assert_eq!(rig.upload(&token, "main", &kept).status, 200);
    let key = granary::anchor::nar_key(&sample(2, &[]).nar_hash());
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor.storage.put(&key, "left".into()).await.unwrap();
    anchor
        .storage
        .put("nar/of-somebody-else", "theirs".into())
        .await
        .unwrap();
    assert_eq!(collect(&rig).await.orphans, 0);
    rig.clock.advance(GRACE);
    assert_eq!(collect(&rig).await.orphans, 1);
    assert!(has(&rig, "main", &kept));
    assert_eq!(nars(&rig), 2);
}

/// Forgets paths behind the anchor's back, as a catalog from a backup never knew them.
fn forget(rig: &Rig, sample: &Sample) {
    let catalog = rusqlite::Connection::open(rig.state().join("catalog.sqlite")).unwrap();
    let hash: granary_protocol::store_path::StorePathHash = sample.hash().parse().unwrap();
    let path = "DELETE FROM paths WHERE hash = ?1";
    catalog.execute(path, [hash.as_bytes()]).unwrap();
    let nar = "DELETE FROM nars WHERE nar_hash = ?1";
    let gone = catalog.execute(nar, [sample.nar_hash().as_bytes()]);
    assert_eq!(gone, Ok(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_catalog_from_a_backup_does_not_know_is_not_deleted_and_can_be_taken_up() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let (known, since) = (sample(1, &[]), sample(2, &[]));
    for path in [&known, &since] {
        assert_eq!(rig.upload(&token, "main", path).status, 200);
    }
    rig.stop().await;
    forget(&rig, &since);
    rig.start().await;
    let left = granary::anchor::nar_key(&sample(3, &[]).nar_hash());
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    anchor.storage.put(&left, "left".into()).await.unwrap();
    rig.clock.advance(GRACE);
    let plan = anchor.plan().await.unwrap();
    assert_eq!((plan.orphans, plan.spared), (1, 1));
    // What no narinfo names goes all the same.
    let done = collect(&rig).await;
    assert_eq!((done.orphans, done.spared), (1, 1));
    assert_eq!(nars(&rig), 2);

    drop(anchor);
    rig.stop().await;
    granary::anchor::rebuild::rebuild(&rig.options())
        .await
        .unwrap();
    rig.start().await;
    assert!(has(&rig, "main", &known) && has(&rig, "main", &since));
    rig.clock.advance(GRACE);
    assert_eq!(collect(&rig).await.spared, 0);
    assert_eq!(nars(&rig), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rebuild_left_out_keeps_its_nars_also_those_that_another_cache_let_go() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("team", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let (own, shared) = (sample(1, &[]), sample(2, &[]));
    for (cache, path) in [("team", &own), ("team", &shared), ("main", &shared)] {
        assert_eq!(rig.upload(&token, cache, path).status, 200);
    }
    rig.stop().await;
    let settings = rig.folder.path().join("storage/caches/team/cache.json");
    let whole = std::fs::read(&settings).unwrap();
    std::fs::write(&settings, "{").unwrap();
    let rebuild = async |rig: &Rig| {
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(rig.state().join(format!("catalog.sqlite{suffix}")));
        }
        let found = granary::anchor::rebuild::rebuild(&rig.options()).await;
        let found = found.unwrap();
        (found.caches, found.left_out)
    };
    assert_eq!(rebuild(&rig).await, (1, 1));
    rig.start().await;
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    let main = anchor.catalog.cache(&"main".parse().unwrap()).await;
    let main = main.unwrap().unwrap();
    let gone = anchor.remove_path(&main, shared.hash().parse().unwrap());
    assert!(gone.await.unwrap());
    drop(anchor);
    for spared in [1, 2, 2] {
        rig.clock.advance(GRACE);
        let done = collect(&rig).await;
        assert_eq!((done.nars, done.orphans, done.spared), (0, 0, spared));
    }
    rig.stop().await;
    std::fs::write(&settings, whole).unwrap();
    assert_eq!(rebuild(&rig).await, (2, 0));
    rig.start().await;
    assert!(has(&rig, "team", &own) && has(&rig, "team", &shared));
    assert_eq!(nars(&rig), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_narinfo_that_cannot_be_read_keeps_all_nars() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let since = sample(1, &[]);
    assert_eq!(rig.upload(&token, "main", &since).status, 200);
    rig.stop().await;
    forget(&rig, &since);
    let key = format!("storage/caches/main/narinfo/{}.narinfo", since.hash());
    let narinfo = rig.folder.path().join(key);
    std::fs::write(&narinfo, "StorePath: ").unwrap();
    rig.start().await;
    rig.clock.advance(GRACE);
    let done = collect(&rig).await;
    assert_eq!((done.orphans, done.spared, nars(&rig)), (0, 1, 1));
    std::fs::remove_file(narinfo).unwrap();
    let done = collect(&rig).await;
    assert_eq!((done.orphans, done.spared, nars(&rig)), (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_cannot_be_deleted_keeps_no_other_and_no_anchor_from_starting() {
    let s3 = S3::start().await;
    let mut rig = Rig::on_s3(&s3).await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    // Two that go by hand, two whose time is over, two NARs that nothing has.
    let samples: Vec<Sample> = (0..6).map(|number| sample(number, &[])).collect();
    for path in &samples {
        assert_eq!(rig.upload(&token, "main", path).status, 200);
    }
    // As a rule of the bucket would: each time that it is asked.
    let deny = |keys: Vec<String>| {
        for key in &keys {
            let key = key.clone();
            s3.fail(Fault::Denied, move |method, target| {
                method == "DELETE" && target.contains(&key)
            });
        }
    };
    let narinfo = |sample: &Sample| format!("{}.narinfo", sample.hash());
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    let main = anchor.catalog.cache(&"main".parse().unwrap()).await;
    let main = main.unwrap().unwrap();
    deny(vec![narinfo(&samples[0])]);
    for number in [0, 1] {
        let gone = anchor.remove_path(&main, samples[number].hash().parse().unwrap());
        assert_eq!(gone.await.is_err(), number == 0);
    }
    drop(anchor);
    rig.stop().await;
    deny(vec![narinfo(&samples[0])]);
    rig.start().await;
    assert_eq!(s3.faults_left(), 0);
    assert!(!has(&rig, "main", &samples[0]) && has(&rig, "main", &samples[2]));

    retain(&rig, "main", 1).await;
    rig.clock.advance(DAY * 2);
    deny(vec![narinfo(&samples[0]), narinfo(&samples[2])]);
    let done = collect(&rig).await;
    assert_eq!((done.caches[0].paths.len(), done.failed), (3, 2));
    assert_eq!(s3.faults_left(), 0);
    rig.clock.advance(GRACE);
    let nar = granary::anchor::nar_key(&samples[1].nar_hash());
    deny(vec![narinfo(&samples[0]), nar.clone()]);
    let done = collect(&rig).await;
    assert_eq!((done.nars, done.failed), (3, 2));
    // What fails no more goes.
    rig.clock.advance(GRACE);
    let done = collect(&rig).await;
    assert_eq!((done.nars, done.orphans, done.waiting), (1, 1, 1));
    assert_eq!(done.failed, 0);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert_eq!(anchor.storage.size(&nar).await.unwrap(), None);
    let metrics = bearer(&rig.token(&[("*", &[Pull])]).await);
    let metrics = rig.ask("GET", "/metrics", &[("Authorization", &metrics)], b"");
    let line = "granary_anchor_collect_failures_total 4\n";
    assert!(metrics.text().contains(line), "{}", metrics.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_listing_of_a_path_goes_with_it() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = bearer(&rig.token(&[("*", &[Push, Delete])]).await);
    let ask = |method: &str, target: &str, body: &[u8]| {
        let headers = [("Authorization", token.as_str())];
        rig.ask(method, target, &headers, body).status
    };
    let path = sample(1, &[]);
    let listing = format!("/main/{}.ls", path.hash());
    // Nix puts it before the path.
    assert_eq!(ask("PUT", &listing, b"{\"version\":1}"), 201);
    assert_eq!(rig.get(&listing).status, 404);
    let push = rig.token(&[("*", &[Push])]).await;
    assert_eq!(rig.upload(&push, "main", &path).status, 200);
    assert_eq!(rig.get(&listing).status, 200);
    let target = format!("/api/v1/caches/main/paths/{}", path.hash());
    assert_eq!(ask("DELETE", &target, b""), 204);
    assert_eq!(rig.get(&listing).status, 404);
    let key = format!("caches/main/files/ls/{}.ls", path.hash());
    assert!(!rig.objects().contains(&key));
    // Also from who pushes the path again without one.
    assert_eq!(rig.upload(&push, "main", &path).status, 200);
    assert_eq!(rig.get(&listing).status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_wrong_does_not_empty_a_cache() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    for number in 0..12 {
        assert_eq!(rig.upload(&token, "main", &sample(number, &[])).status, 200);
    }
    retain(&rig, "main", 30).await;
    rig.clock.advance(DAY * 365 * 70);
    let done = collect(&rig).await;
    let refused = done.caches[0].refused.as_ref().unwrap();
    assert!(refused.contains("would delete all 12 paths"), "{refused}");
    assert!(has(&rig, "main", &sample(3, &[])));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_delete_everywhere_collects_and_who_may_delete_here_removes() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let push = rig.token(&[("*", &[Push])]).await;
    let path = sample(1, &[]);
    assert_eq!(rig.upload(&push, "main", &path).status, 200);
    let here = bearer(&rig.token(&[("main", &[Delete])]).await);
    let everywhere = bearer(&rig.token(&[("*", &[Delete])]).await);
    let push = bearer(&push);
    let status = |method: &str, target: &str, token: &str| {
        rig.ask(method, target, &[("Authorization", token)], b"")
            .status
    };
    for method in ["GET", "POST"] {
        assert_eq!(rig.ask(method, "/api/v1/collection", &[], b"").status, 401);
        assert_eq!(status(method, "/api/v1/collection", &here), 403);
        assert_eq!(status(method, "/api/v1/collection", &everywhere), 200);
    }
    let target = format!("/api/v1/caches/main/paths/{}", path.hash());
    assert_eq!(status("DELETE", &target, &push), 403);
    assert!(has(&rig, "main", &path));
    assert_eq!(status("DELETE", &target, &here), 204);
    assert!(!has(&rig, "main", &path));
    assert_eq!(status("DELETE", &target, &here), 404);
}

/// Ends the collector with the first pusher, however that ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Pushers, pullers and a collector at once, over paths that keep expiring and coming back: whatever
/// was reported present can be pulled, and no narinfo is without its NAR.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_reported_present_can_be_pulled_while_garbage_is_collected() {
    // By hand for a minute and longer: GRANARY_STORM_SECONDS=60.
    let seconds = std::env::var("GRANARY_STORM_SECONDS").ok();
    let seconds = seconds.map_or(5, |seconds| seconds.parse().unwrap());
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    retain(&rig, "main", 1).await;
    // Never used again, so that a collection does not empty the cache and is not refused.
    let samples: Vec<Sample> = (0..30).map(|number| sample(number, &[])).collect();
    let is_over = AtomicBool::new(false);
    // Time goes on in leaps, and a leap of days within a pull would be a long pull.
    let leap = RwLock::new(());
    let (pulled, collected) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(seconds);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            for pusher in 0..3 {
                let leap = &leap;
                let (rig, samples, token, is_over, pulled) =
                    (&rig, &samples, &token, &is_over, &pulled);
                scope.spawn(move || {
                    let token = bearer(token);
                    let _over = Over(is_over);
                    for round in (0u64..).take_while(|_| Instant::now() < end) {
                        let _still = leap.read().unwrap();
                        let sample = &samples[((round * 7 + pusher * 11) % 30) as usize];
                        let question = serde_json::json!({ "hashes": [sample.hash()] }).to_string();
                        let headers = [("Authorization", token.as_str())];
                        let answer = rig.ask(
                            "POST",
                            "/api/v1/caches/main/missing",
                            &headers,
                            question.as_bytes(),
                        );
                        let is_missing = !answer.json()["missing"].as_array().unwrap().is_empty();
                        if is_missing {
                            let pushed = rig.upload(&token["Bearer ".len()..], "main", sample);
                            assert_eq!(pushed.status, 200, "{pushed:?}");
                        }
                        let narinfo = rig.get(&format!("/main/{}.narinfo", sample.hash()));
                        assert_eq!(narinfo.status, 200, "missing: {is_missing}, {narinfo:?}");
                        let url = narinfo
                            .text()
                            .lines()
                            .find_map(|line| line.strip_prefix("URL: "))
                            .unwrap();
                        let nar = rig.get(&format!("/main/{url}"));
                        assert_eq!(nar.status, 200, "{nar:?}");
                        assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
                        pulled.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let (rig, is_over, collected, leap) = (&rig, &is_over, &collected, &leap);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let done = handle.block_on(collect(rig));
                    let paths: usize = done.caches.iter().map(|expired| expired.paths.len()).sum();
                    collected.fetch_add(paths as u64 + done.nars, Ordering::Relaxed);
                    // Everything that is not used from now on is past its time.
                    let _leaping = leap.write().unwrap();
                    rig.clock.advance(GRACE * 2);
                }
            });
        });
    });
    assert!(pulled.load(Ordering::Relaxed) > 50, "{pulled:?} pulled");
    println!("{pulled:?} pulled, {collected:?} collected");
    assert!(
        collected.load(Ordering::Relaxed) > 20,
        "{collected:?} collected"
    );
    // A last look at the bucket itself.
    for key in rig.objects().iter().filter(|key| key.ends_with(".narinfo")) {
        let text = std::fs::read_to_string(rig.folder.path().join("storage").join(key)).unwrap();
        let narinfo =
            granary_protocol::narinfo::NarInfo::parse(&text, &Default::default()).unwrap();
        let nar = granary::anchor::nar_key(&narinfo.nar_hash);
        assert!(
            rig.folder.path().join("storage").join(&nar).exists(),
            "{key} without {nar}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_a_push_asked_for_is_kept_as_if_it_had_come_just_then() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = bearer(&rig.token(&[("main", &[Pull, Push])]).await);
    let (asked, forgotten) = (Sample::new(1, 1000), Sample::new(2, 1000));
    let ask = |method: &str, sample: &Sample, body: &[u8]| {
        let target = format!("/main/nar/{}.nar", sample.nar_hash().nix32());
        let headers = [("Authorization", token.as_str())];
        rig.ask(method, &target, &headers, body).status
    };
    for sample in [&asked, &forgotten] {
        assert_eq!(ask("PUT", sample, &sample.nar), 201);
    }
    rig.clock.advance(GRACE * 3 / 4);
    assert_eq!(ask("HEAD", &asked, b""), 200);
    rig.clock.advance(GRACE / 2);
    collect(&rig).await;
    assert_eq!(ask("HEAD", &asked, b""), 200);
    // The other is due to be sent again, and its NAR goes a day later.
    assert_eq!(ask("HEAD", &forgotten, b""), 404);
    rig.clock.advance(GRACE * 3 / 4);
    collect(&rig).await;
    assert_eq!(ask("HEAD", &asked, b""), 200);
    rig.clock.advance(GRACE / 2);
    collect(&rig).await;
    assert_eq!(nars(&rig), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_what_a_cache_does_not_hold_is_refused() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let (held, absent) = (sample(1, &[]), sample(2, &[]));
    assert_eq!(rig.upload(&token, "main", &held).status, 200);
    let pin = |samples: &[&Sample]| Changes {
        pinned: samples
            .iter()
            .map(|sample| sample.hash().parse().unwrap())
            .collect(),
        ..Changes::default()
    };
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let name = "main".parse().unwrap();
    let refused = anchor.configure_cache(&name, &pin(&[&held, &absent])).await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("does not hold 1 of the paths"),
        "{refused}"
    );
    anchor.configure_cache(&name, &pin(&[&held])).await.unwrap();
    // Nothing of a refused change is kept, and no older pin let go for it.
    let newest = |sample: &Sample| Changes {
        pinned_as: Some(("nas".parse().unwrap(), Some(1))),
        ..pin(&[sample])
    };
    let before = anchor.configure_cache(&name, &newest(&held)).await.unwrap();
    let refused = anchor.configure_cache(&name, &newest(&absent)).await;
    assert!(refused.is_err());
    let after = anchor.catalog.cache(&name).await.unwrap().unwrap();
    assert_eq!(after.settings, before.settings);
    assert_eq!(after.settings.pinned().count(), 2);
}
