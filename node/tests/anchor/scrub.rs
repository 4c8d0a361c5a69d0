//! What becomes of stored bytes that are not what they were.

use std::path::PathBuf;

use granary::anchor::scrub::Scrubbed;
use granary::anchor::server::Server;
use granary_protocol::hash::NarHash;
use granary_protocol::token::Permission::{Pull, Push};

use crate::command::Place;
use crate::rig::{Machine, Rig, Sample, bearer, hash};
use crate::s3::{Fault, S3};

fn object(rig: &Rig, nar_hash: &NarHash) -> PathBuf {
    let key = granary::anchor::nar_key(nar_hash);
    rig.folder.path().join("storage").join(key)
}

/// All pieces of a scrub, one after the other.
async fn scrub(rig: &Rig) -> Scrubbed {
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let mut all = Scrubbed::default();
    loop {
        let after = all.next.take();
        let after = after.map(|after| NarHash::from_nix32(&after).unwrap());
        let piece = anchor.scrub(after).await.unwrap();
        all.nars += piece.nars;
        all.unread += piece.unread;
        all.damaged.extend(piece.damaged);
        all.next = piece.next;
        if all.next.is_none() {
            return all;
        }
    }
}

fn narinfo_status(rig: &Rig, cache: &str, sample: &Sample) -> u16 {
    let target = format!("/{cache}/{}.narinfo", sample.hash());
    rig.get(&target).status
}

fn nar(rig: &Rig, cache: &str, sample: &Sample) -> Option<Vec<u8>> {
    let hash = sample.nar_hash().nix32();
    let answer = rig.get(&format!("/{cache}/nar/{hash}.nar.zst"));
    match answer.status {
        200 => Some(zstd::decode_all(&answer.body[..]).unwrap()),
        status => {
            assert_eq!(status, 404);
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_absent_until_a_push_puts_it_right() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let good = Sample::new(1, 50_000);
    assert_eq!(rig.upload(&token, "main", &good).status, 200);
    let whole = std::fs::read(object(&rig, &good.nar_hash())).unwrap();
    type Harm = fn(Vec<u8>, &[u8]) -> Option<Vec<u8>>;
    let harms: [(&str, Harm); 5] = [
        ("a flipped bit", |mut bytes, _| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        }),
        ("another nar", |_, other| Some(other.to_vec())),
        ("a missing end", |bytes, _| {
            Some(bytes[..bytes.len() - 9].to_vec())
        }),
        ("a damaged seek table", |mut bytes, _| {
            let at = bytes.len() - 12;
            bytes[at] ^= 1;
            Some(bytes)
        }),
        ("no object", |_, _| None),
    ];
    let mut samples = Vec::new();
    for (number, (harm, change)) in (2..).zip(harms) {
        let sample = Sample::new(number, 50_000);
        for cache in ["main", "other"] {
            assert_eq!(rig.upload(&token, cache, &sample).status, 200);
        }
        let file = object(&rig, &sample.nar_hash());
        match change(std::fs::read(&file).unwrap(), &whole) {
            Some(bytes) => std::fs::write(&file, bytes).unwrap(),
            None => std::fs::remove_file(&file).unwrap(),
        }
        samples.push((harm, sample));
    }
    let found = scrub(&rig).await;
    assert_eq!((found.nars, found.unread), (6, 0));
    assert_eq!(found.damaged.len(), samples.len(), "{found:?}");
    let question = serde_json::json!({"hashes": samples.iter().map(|(_, sample)| sample.hash()).collect::<Vec<_>>()});
    let authorization = bearer(&token);
    let missing = || {
        let headers = [("Authorization", authorization.as_str())];
        let target = "/api/v1/caches/main/missing";
        let answer = rig.ask("POST", target, &headers, question.to_string().as_bytes());
        answer.json()["missing"].as_array().unwrap().len()
    };
    assert_eq!(missing(), samples.len());
    for (harm, sample) in &samples {
        let told = found.damaged.iter();
        let told = told.filter(|damaged| damaged.nar_hash == sample.nar_hash().to_string());
        let told: Vec<_> = told.collect();
        assert_eq!((told.len(), told[0].of), (1, 2), "{harm}");
        assert!(told[0].paths[0].starts_with("main: "), "{harm}: {told:?}");
        assert_eq!(narinfo_status(&rig, "main", sample), 404, "{harm}");
        assert_eq!(nar(&rig, "other", sample), None, "{harm}");
    }
    assert_eq!(narinfo_status(&rig, "main", &good), 200);

    // A push to one cache puts it right in both.
    for (harm, sample) in &samples {
        let pushed = rig.upload(&token, "main", sample);
        assert_eq!(pushed.json()["kind"], "Uploaded", "{harm}");
        for cache in ["main", "other"] {
            assert_eq!(narinfo_status(&rig, cache, sample), 200, "{harm}");
            assert!(nar(&rig, cache, sample).unwrap() == sample.nar, "{harm}");
        }
    }
    assert_eq!(missing(), 0);
    assert_eq!(scrub(&rig).await.damaged, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_brought_from_who_has_it_and_from_nobody_else() {
    let [mut rig, liar, elsewhere] = [Rig::new().await, Rig::new().await, Rig::new().await];
    rig.stop().await;
    rig.heal_from = [liar.url("main"), elsewhere.url("main")]
        .map(|url| granary::anchor::heal::Source {
            url: url.parse().unwrap(),
            authorities: Default::default(),
        })
        .into();
    rig.start().await;
    // Of the first everybody has a copy, of the second the one who lies, of the third nobody.
    let samples = [1, 2, 3].map(|number| Sample::new(number, 5_000_000));
    for (rig, held) in [(&rig, 3), (&liar, 2), (&elsewhere, 1)] {
        rig.cache("main", true).await;
        let token = rig.token(&[("main", &[Push])]).await;
        for sample in &samples[..held] {
            assert_eq!(rig.upload(&token, "main", sample).status, 200);
        }
    }
    for sample in &samples {
        let file = object(&rig, &sample.nar_hash());
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
    }
    // Its narinfos are right and its bytes are not: those of the third.
    let other = std::fs::read(object(&liar, &samples[1].nar_hash())).unwrap();
    std::fs::write(object(&liar, &samples[0].nar_hash()), &other).unwrap();
    std::fs::write(
        object(&liar, &samples[1].nar_hash()),
        &other[..other.len() / 2],
    )
    .unwrap();

    let found = scrub(&rig).await.damaged;
    let is_healed = |sample: &Sample| {
        let hash = sample.nar_hash().to_string();
        let damaged = found.iter().find(|damaged| damaged.nar_hash == hash);
        damaged.expect("it is found").healed
    };
    assert_eq!(samples.each_ref().map(is_healed), [true, false, false]);
    assert_eq!(narinfo_status(&rig, "main", &samples[0]), 200);
    assert!(nar(&rig, "main", &samples[0]).unwrap() == samples[0].nar);
    for sample in &samples[1..] {
        assert_eq!(narinfo_status(&rig, "main", sample), 404);
        assert_eq!(nar(&rig, "main", sample), None);
    }
    // What one source could not give later another does.
    let token = elsewhere.token(&[("main", &[Push])]).await;
    assert_eq!(elsewhere.upload(&token, "main", &samples[2]).status, 200);
    let found = scrub(&rig).await.damaged;
    assert_eq!(found.len(), 2);
    assert_eq!(narinfo_status(&rig, "main", &samples[2]), 200);
    assert!(nar(&rig, "main", &samples[2]).unwrap() == samples[2].nar);
    assert_eq!(narinfo_status(&rig, "main", &samples[1]), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_nar_that_cannot_be_stored_anew_holds_up_no_other() {
    let s3 = S3::start().await;
    let elsewhere = Rig::new().await;
    let mut rig = Rig::on_s3(&s3).await;
    rig.stop().await;
    rig.heal_from = vec![granary::anchor::heal::Source {
        url: elsewhere.url("main").parse().unwrap(),
        authorities: Default::default(),
    }];
    rig.start().await;
    let mut samples = [1, 2].map(|number| Sample::new(number, 1000));
    samples.sort_by_key(|sample| *sample.nar_hash().as_bytes());
    for rig in [&rig, &elsewhere] {
        rig.cache("main", true).await;
        let token = rig.token(&[("main", &[Push])]).await;
        for sample in &samples {
            assert_eq!(rig.upload(&token, "main", sample).status, 200);
        }
    }
    let anchor = rig.server.as_ref().unwrap().anchor.clone();
    let deny = |sample: &Sample| {
        let key = granary::anchor::nar_key(&sample.nar_hash());
        s3.fail(Fault::Denied, move |method, target| {
            method == "PUT" && target.contains(&key)
        });
    };
    for sample in &samples {
        let key = granary::anchor::nar_key(&sample.nar_hash());
        anchor.storage.delete(&key).await.unwrap();
        deny(sample);
    }
    let found = anchor.scrub(None).await.unwrap().damaged;
    assert_eq!(found.iter().filter(|damaged| !damaged.healed).count(), 2);
    deny(&samples[0]);
    let (after, _) = anchor.heal_some(None).await.unwrap_err();
    assert_eq!(after, Some(samples[0].nar_hash()));
    assert_eq!(s3.faults_left(), 0);
    deny(&samples[0]);
    assert_eq!(anchor.heal_some(after).await.unwrap(), None);
    let statuses = [0, 1].map(|number| narinfo_status(&rig, "main", &samples[number]));
    assert_eq!(statuses, [404, 200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_build_takes_the_place_of_a_damaged_one_and_of_no_other() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let (reference, first) = (Sample::new(1, 1000), Sample::new(2, 10_000));
    let mut second = Sample::new(3, 10_000);
    second.path = first.path.clone();
    second.references = vec![reference.path["/nix/store/".len()..].to_owned()];
    for sample in [&reference, &first, &second] {
        assert_eq!(rig.upload(&token, "main", sample).status, 200);
    }
    let target = format!("/main/{}.narinfo", first.hash());
    let promised = |rig: &Rig| {
        let text = rig.get(&target).text().to_owned();
        let line = text.lines().find(|line| line.starts_with("NarHash: "));
        line.unwrap()["NarHash: ".len()..].to_owned()
    };
    assert_eq!(promised(&rig), first.nar_hash().to_string());
    std::fs::remove_file(object(&rig, &first.nar_hash())).unwrap();
    assert_eq!(scrub(&rig).await.damaged.len(), 1);
    assert_eq!(rig.upload(&token, "main", &second).status, 200);
    assert_eq!(promised(&rig), second.nar_hash().to_string());
    assert!(nar(&rig, "main", &second).unwrap() == second.nar);
    // After a restart, and made anew from the bucket, it is the same.
    rig.stop().await;
    rig.start().await;
    assert_eq!(promised(&rig), second.nar_hash().to_string());
    rig.stop().await;
    std::fs::remove_dir_all(rig.state()).unwrap();
    let rebuilt = granary::anchor::rebuild::rebuild(&rig.options()).await;
    assert_eq!(rebuilt.unwrap().left_out, 0);
    rig.start().await;
    assert_eq!(promised(&rig), second.nar_hash().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn narinfos_tell_of_the_file_that_a_push_put_there() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let sample = Sample::new(1, 10_000);
    for cache in ["main", "other"] {
        assert_eq!(rig.upload(&token, cache, &sample).status, 200);
    }
    let target = format!("/other/{}.narinfo", sample.hash());
    let true_text = rig.get(&target).text().to_owned();
    rig.stop().await;
    // As if another version of zstd had packed it, and what that made were lost.
    let zeros = granary_protocol::hash::FileHash::from_bytes([0; 32]).to_string();
    let line = true_text
        .lines()
        .find(|line| line.starts_with("FileHash: "));
    let changed = true_text.replace(&line.unwrap()["FileHash: ".len()..], &zeros);
    let catalog = rusqlite::Connection::open(rig.state().join("catalog.sqlite")).unwrap();
    catalog
        .execute("UPDATE nars SET file_hash = zeroblob(32)", [])
        .unwrap();
    catalog
        .execute("UPDATE paths SET narinfo = ?1 WHERE cache = 2", [&changed])
        .unwrap();
    catalog.close().unwrap();
    rig.start().await;
    assert_eq!(rig.get(&target).text(), changed);
    assert_eq!(scrub(&rig).await.damaged.len(), 1);
    let token = rig.token(&[("*", &[Push])]).await;
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    assert_eq!(rig.get(&target).text(), true_text);
    let stored = rig.folder.path().join("storage/caches/other/narinfo");
    let stored = stored.join(format!("{}.narinfo", sample.hash()));
    assert_eq!(std::fs::read_to_string(stored).unwrap(), true_text);
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_does_not_answer_damages_nothing() {
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let sample = Sample::new(1, 100_000);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    // Three times as often as a request is repeated.
    for _ in 0..16 {
        s3.fail(Fault::CutBody, |method, target| {
            method == "GET" && target.contains("/nar/")
        });
    }
    let found = scrub(&rig).await;
    assert_eq!((found.unread, found.damaged.len()), (1, 0), "{found:?}");
    assert_eq!(narinfo_status(&rig, "main", &sample), 200);

    // Nor does a disk that is not mounted.
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    let storage = rig.folder.path().join("storage");
    std::fs::rename(&storage, rig.folder.path().join("elsewhere")).unwrap();
    std::fs::create_dir(&storage).unwrap();
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let refused = anchor.scrub(None).await.unwrap_err().to_string();
    assert!(refused.contains("refusing to scrub"), "{refused}");
    assert_eq!(narinfo_status(&rig, "main", &sample), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_looked_at_for_longest_is_read_first_and_then_not_again_for_a_while() {
    use std::time::Duration;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let week = Duration::from_secs(7 * 24 * 3600);
    let (first, second) = (Sample::new(1, 1000), Sample::new(2, 1000));
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert_eq!(rig.upload(&token, "main", &first).status, 200);
    rig.clock.advance(week / 2);
    assert_eq!(rig.upload(&token, "main", &second).status, 200);
    // What comes in is hashed.
    assert!(!anchor.scrub_due(week).await.unwrap());
    std::fs::remove_file(object(&rig, &first.nar_hash())).unwrap();
    std::fs::remove_file(object(&rig, &second.nar_hash())).unwrap();
    rig.clock.advance(week / 2 + Duration::from_secs(5));
    assert!(anchor.scrub_due(week).await.unwrap());
    assert_eq!(narinfo_status(&rig, "main", &first), 404);
    assert_eq!(narinfo_status(&rig, "main", &second), 200);
    assert!(!anchor.scrub_due(week).await.unwrap());
    rig.clock.advance(week / 2);
    assert!(anchor.scrub_due(week).await.unwrap());
    assert_eq!(narinfo_status(&rig, "main", &second), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_does_not_begin_anew_where_its_disk_is_not_mounted() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let path = Sample::new(1, 1000);
    assert_eq!(rig.upload(&token, "main", &path).status, 200);
    rig.stop().await;
    let storage = rig.folder.path().join("storage");
    let disk = rig.folder.path().join("disk");
    std::fs::rename(&storage, &disk).unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    for _ in 0..2 {
        let refused = Server::start(rig.options(), listen, Some("main")).await;
        let refused = refused.err().expect("an empty folder").to_string();
        assert!(refused.contains("has no granary.json"), "{refused}");
        let refused = granary::anchor::rebuild::rebuild(&rig.options()).await;
        let refused = refused.expect_err("an empty folder").to_string();
        assert!(refused.contains("mount its disk"), "{refused}");
    }
    // Nothing was written that would make it the right one.
    assert_eq!(rig.objects(), [""; 0]);
    std::fs::remove_dir(&storage).unwrap();
    std::fs::rename(&disk, &storage).unwrap();
    rig.start().await;
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let scrubbed = anchor.scrub(None).await.unwrap();
    assert_eq!((scrubbed.nars, scrubbed.damaged.len()), (1, 0));
    assert_eq!(narinfo_status(&rig, "main", &path), 200);
    // Nor is anything forgotten while it is gone under a running anchor.
    std::fs::rename(&storage, &disk).unwrap();
    let refused = anchor.collect().await.unwrap_err().to_string();
    assert!(refused.contains("refusing to change it"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_cannot_be_read_holds_up_no_other() {
    use std::time::Duration;
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let week = Duration::from_secs(7 * 24 * 3600);
    let (denied, other) = (Sample::new(1, 1000), Sample::new(2, 1000));
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert_eq!(rig.upload(&token, "main", &denied).status, 200);
    rig.clock.advance(Duration::from_secs(60));
    assert_eq!(rig.upload(&token, "main", &other).status, 200);
    rig.clock.advance(week + Duration::from_secs(60));
    let key = granary::anchor::nar_key(&denied.nar_hash());
    let deny = || {
        let key = key.clone();
        s3.fail(Fault::Denied, move |_, target| target.contains(&key));
    };
    deny();
    assert!(!anchor.scrub_due(week).await.unwrap(), "it was read");
    let before = s3.requests().len();
    assert!(anchor.scrub_due(week).await.unwrap());
    let other_key = granary::anchor::nar_key(&other.nar_hash());
    let read = s3.requests().split_off(before);
    assert!(read.iter().any(|request| request.contains(&other_key)));
    assert!(!read.iter().any(|request| request.contains(&key)));
    assert!(
        !anchor.scrub_due(week).await.unwrap(),
        "both were looked at"
    );
    // A day later it is tried again.
    rig.clock.advance(Duration::from_secs(25 * 3600));
    assert!(anchor.scrub_due(week).await.unwrap());

    // One that cannot be read a day later either, while storage answers otherwise, is kept back until it can.
    rig.clock.advance(week * 2);
    let deny_all = || (0..3).for_each(|_| deny());
    deny();
    assert_eq!(scrub(&rig).await.unread, 1);
    rig.clock.advance(Duration::from_secs(23 * 3600));
    deny();
    assert_eq!(scrub(&rig).await.unread, 1);
    assert_eq!(narinfo_status(&rig, "main", &denied), 200);
    rig.clock.advance(Duration::from_secs(2 * 3600));
    deny_all();
    let found = scrub(&rig).await;
    assert_eq!((found.unread, found.damaged.len()), (0, 1), "{found:?}");
    assert!(found.damaged[0].problem.contains("for a day"), "{found:?}");
    assert_eq!(narinfo_status(&rig, "main", &denied), 404);
    while s3.faults_left() > 0 {
        // Whatever it says: it takes the place of what was asked once less than foreseen.
        let _ = anchor.storage.size(&key).await;
    }
    assert_eq!(scrub(&rig).await.damaged, []);
    assert_eq!(narinfo_status(&rig, "main", &denied), 200);

    // One that is damaged at the first look and cannot be read at the second is not known to be either.
    let object = s3.folder.path().join("granary-test/anchor").join(&key);
    std::fs::remove_file(&object).unwrap();
    let seen = std::sync::atomic::AtomicU32::new(0);
    let counted = key.clone();
    s3.fail(Fault::Denied, move |_, target| {
        let is_it = target.contains(&counted);
        is_it && seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 0
    });
    let found = scrub(&rig).await;
    assert_eq!((found.unread, found.damaged.len()), (1, 0), "{found:?}");
    assert_eq!(scrub(&rig).await.damaged.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_was_put_right_while_another_was_described_stays() {
    use granary::anchor::catalog::{Begun, NewPath, PathRow};
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let (first, second) = (Sample::new(1, 1000), Sample::new(2, 1000));
    for sample in [&first, &second] {
        assert_eq!(rig.upload(&token, "main", sample).status, 200);
    }
    // As a push of another build does it that found the first damaged a moment ago.
    let catalog = &rig.server.as_ref().unwrap().anchor.catalog;
    let cache = catalog.cache(&"main".parse().unwrap()).await.unwrap();
    let cache = cache.unwrap().id;
    let hash = first.hash().parse().unwrap();
    let nar = catalog.nar(second.nar_hash()).await.unwrap().unwrap();
    let before = catalog.path(cache, hash).await.unwrap().unwrap();
    let new = |nar_hash| NewPath {
        cache,
        path: PathRow {
            nar_hash,
            narinfo: "of another build".to_owned(),
            ..before.clone()
        },
        references: vec![second.hash().parse().unwrap()],
        nar,
        is_complete: true,
        subject: None,
        now: 1,
    };
    let begun = catalog.begin_path(new(second.nar_hash())).await.unwrap();
    assert_eq!(begun, Begun::AnotherBuild);
    assert_eq!(catalog.rewrites().await.unwrap(), []);
    assert_eq!(catalog.path(cache, hash).await.unwrap().unwrap(), before);
    // Its own narinfo may be replaced.
    let begun = catalog.begin_path(new(first.nar_hash())).await.unwrap();
    assert_eq!(begun, Begun::Written);
    assert_eq!(catalog.rewrites().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nix_puts_right_what_the_command_line_found_damaged() {
    let place = Place::new();
    let mut anchor = place.start();
    let arguments = ["token", "create", "--subject", "ci", "--cache", "main"];
    let token = place.run(&[&arguments[..], &["--allow", "pull,push"]].concat());
    let key = place.run(&["cache", "rotate-key", "main"]);
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let url = format!("http://{}/main", anchor.address);
    tokio::task::block_in_place(|| {
        builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
        assert!(place.run(&["anchor", "scrub"]).contains("read 3 nars"));
        let text = anchor.get(&format!("/main/{}.narinfo", hash(&closure[0])), &token);
        let nar_hash = text.text().lines().find(|line| line.starts_with("NarHash"));
        let nar_hash: NarHash = nar_hash.unwrap()["NarHash: ".len()..].parse().unwrap();
        let object = place.path().join("state/storage");
        let object = object.join(granary::anchor::nar_key(&nar_hash));
        let mut bytes = std::fs::read(&object).unwrap();
        bytes[100] ^= 0x10;
        std::fs::write(&object, bytes).unwrap();

        let output = place.granary(&["anchor", "scrub"]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stdout).unwrap();
        let base_name = &closure[0]["/nix/store/".len()..];
        assert!(said.contains(&format!("(main: {base_name})")), "{said}");
        anchor.logged("a stored nar is damaged");
        let gone = anchor.get(&format!("/main/{}.narinfo", hash(&closure[0])), &token);
        assert_eq!(gone.status, 404);
        // The same without a running anchor.
        anchor.kill();
        let found = place.granary(&["anchor", "scrub", "--json"]).stdout;
        let found: Scrubbed = serde_json::from_slice(&found).unwrap();
        assert_eq!((found.nars, found.damaged.len()), (3, 1));

        anchor = place.start();
        let url = format!("http://{}/main", anchor.address);
        builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
        assert!(place.run(&["anchor", "scrub"]).contains("read 3 nars"));
        let client = Machine::new(&[key.lines().next().unwrap()]);
        client.login(&token);
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_delete_everything_may_scrub() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = bearer(&rig.token(&[("*", &[Pull, Push])]).await);
    let ask = |headers: &[(&str, &str)]| rig.ask("POST", "/api/v1/scrub", headers, b"{}").status;
    assert_eq!(ask(&[]), 401);
    assert_eq!(ask(&[("Authorization", &token)]), 403);
}
