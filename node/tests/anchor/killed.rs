//! kill -9 at every moment of pushes, collections and rotations: what was acknowledged is there, and the
//! bucket and the catalog tell the same.
//!
//! `GRANARY_KILL_ROUNDS` sets how often; each round kills a little later than the one before.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use granary_protocol::narinfo::{NarInfo, VerifiedNarInfo};
use granary_protocol::signature::{PublicKey, TrustedKeys};

use crate::command::{Anchor, Place};
use crate::rig::{GENEROUS, Sample, ask, bearer};
use crate::s3::{Fault, S3};

pub fn rounds(default: u64) -> u64 {
    let rounds = std::env::var("GRANARY_KILL_ROUNDS").ok();
    rounds.map_or(default, |rounds| rounds.parse().unwrap())
}

pub fn token(place: &Place) -> String {
    let _anchor = place.start();
    let allow = "pull,push,delete,configure,destroy";
    let token = [
        "token",
        "create",
        "--subject",
        "t",
        "--cache",
        "*",
        "--allow",
        allow,
    ];
    place.run(&token)
}

/// What the storage crate writes before it renames it.
fn being_written(storage: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut folders = vec![storage.to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.to_str().unwrap().contains('#') => found.push(path),
                false => {}
            }
        }
    }
    found
}

/// What must hold however the anchor ended: nothing half written lies about, no narinfo without its NAR, and what was
/// acknowledged is there and right.
pub fn assert_consistent(place: &Place, anchor: &Anchor, token: &str, acknowledged: &[Sample]) {
    let storage = place.path().join("state/storage");
    let left = being_written(&storage);
    assert!(left.is_empty(), "{left:?}");
    let narinfos = std::fs::read_dir(storage.join("caches/main/narinfo"));
    for entry in narinfos.into_iter().flatten() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "narinfo")
        {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let narinfo =
            granary_protocol::narinfo::NarInfo::parse(&text, &Default::default()).unwrap();
        let nar = storage.join(granary::anchor::nar_key(&narinfo.nar_hash));
        let size = std::fs::metadata(&nar)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
            .len();
        assert_eq!(Some(size), narinfo.file_size);
        // What is in the bucket is what is answered.
        let target = format!("/main/{}.narinfo", narinfo.store_path.hash());
        assert_eq!(anchor.get(&target, token).text(), text);
    }
    // And what the catalog knows is in the bucket.
    let catalog = rusqlite::Connection::open(place.catalog()).unwrap();
    let mut nars = catalog
        .prepare("SELECT nar_hash, file_size FROM nars")
        .unwrap();
    let nars = nars.query_map([], |row| {
        Ok((row.get::<_, [u8; 32]>(0)?, row.get::<_, i64>(1)?))
    });
    for nar in nars.unwrap() {
        let (nar_hash, size) = nar.unwrap();
        let key = granary::anchor::nar_key(&granary_protocol::hash::NarHash::from_bytes(nar_hash));
        let found = std::fs::metadata(storage.join(&key)).map(|about| about.len() as i64);
        assert_eq!(found.ok(), Some(size), "{key}");
    }
    let mut paths = catalog
        .prepare("SELECT base_name, narinfo, state FROM paths")
        .unwrap();
    let paths = paths.query_map([], |row| {
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, String>(1)?,
            row.get::<_, i64>(2)?,
        ))
    });
    for path in paths.unwrap() {
        let (name, text, state) = path.unwrap();
        assert_eq!(state, 1, "{name}");
        let key = format!("caches/main/narinfo/{}.narinfo", &name[..32]);
        assert_eq!(std::fs::read_to_string(storage.join(&key)).unwrap(), text);
    }
    for sample in acknowledged {
        let narinfo = anchor.get(&format!("/main/{}.narinfo", sample.hash()), token);
        assert_eq!(
            narinfo.status, 200,
            "an acknowledged push is lost: {}",
            sample.path
        );
        let url = narinfo
            .text()
            .lines()
            .find_map(|line| line.strip_prefix("URL: "))
            .unwrap();
        let nar = anchor.get(&format!("/main/{url}"), token);
        assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
    }
}

type Pushing = std::thread::JoinHandle<(Vec<Sample>, bool)>;

/// Pushes one after the other; returns those that were acknowledged, and whether the connection broke.
fn push(anchor: &Anchor, token: &str, samples: Vec<Sample>) -> Pushing {
    let (address, token) = (anchor.address, bearer(token));
    std::thread::spawn(move || {
        let mut done = Vec::new();
        for sample in samples {
            let metadata = sample.metadata("main").to_string();
            let headers = [
                ("Authorization", token.as_str()),
                ("X-Attic-Nar-Info", &metadata),
            ];
            let target = "/_api/v1/upload-path";
            let ask = || ask(address, "PUT", target, &headers, &sample.nar).status;
            match std::panic::catch_unwind(ask) {
                Ok(200) => done.push(sample),
                Ok(status) => panic!("a push was answered {status}"),
                // The connection broke.
                Err(_) => return (done, true),
            }
        }
        (done, false)
    })
}

/// Asks for something that the kill will interrupt.
fn interrupted(anchor: &Anchor, token: &str, target: &'static str, body: &'static str) {
    let (address, token) = (anchor.address, bearer(token));
    std::thread::spawn(move || {
        let headers = [("Authorization", token.as_str())];
        std::panic::catch_unwind(|| ask(address, "POST", target, &headers, body.as_bytes()))
    });
}

fn kill_after(anchor: &mut Anchor, delay: Duration) {
    let end = Instant::now() + delay;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    anchor.kill();
}

#[test]
fn an_anchor_that_is_killed_again_and_again_loses_nothing_it_acknowledged() {
    let rounds = rounds(20);
    let place = Place::new();
    let token = token(&place);
    // As long as some pushes take on this machine at the moment.
    let (mut acknowledged, span) = {
        let anchor = place.start();
        let samples = (0..12).map(|number| Sample::new(900_000 + number, 20_000));
        let started = Instant::now();
        let (done, _) = push(&anchor, &token, samples.collect()).join().unwrap();
        (done, started.elapsed().max(Duration::from_millis(85)))
    };
    let before = acknowledged.len();
    let mut interrupted = 0;
    for round in 0..rounds {
        let mut anchor = place.start();
        assert_consistent(
            &place,
            &anchor,
            &token,
            &acknowledged[acknowledged.len().saturating_sub(6)..],
        );
        // Pushes go on while the kill comes, a little later in each round, so that every step is hit.
        let samples = (0..40).map(|number| Sample::new(round * 1000 + number, 20_000));
        let pushing = push(&anchor, &token, samples.collect());
        kill_after(&mut anchor, span * round as u32 / rounds as u32);
        let (done, was_interrupted) = pushing.join().unwrap();
        interrupted += u64::from(was_interrupted);
        acknowledged.extend(done);
    }
    assert!(
        interrupted > rounds / 2,
        "the kill came too late in most rounds"
    );
    assert!(
        acknowledged.len() > before + 10,
        "the kill came too early in most rounds"
    );
    let anchor = place.start();
    let started = Instant::now();
    assert_consistent(&place, &anchor, &token, &acknowledged);
    assert!(started.elapsed() < GENEROUS * 4);
    drop(anchor);

    // And the bucket alone tells the same.
    std::fs::remove_file(place.catalog()).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(
            place
                .path()
                .join(format!("state/anchor/catalog.sqlite{suffix}")),
        );
    }
    place.run(&["anchor", "rebuild"]);
    let anchor = place.start();
    assert_consistent(&place, &anchor, &token, &acknowledged);
}

#[test]
fn what_a_killed_anchor_was_writing_does_not_stay_in_its_folder() {
    let place = Place::new();
    let token = token(&place);
    let sample = Sample::new(1, 1000);
    {
        let anchor = place.start();
        push(&anchor, &token, vec![Sample::new(1, 1000)])
            .join()
            .unwrap();
    }
    let nar = granary::anchor::nar_key(&sample.nar_hash());
    let storage = place.path().join("state/storage");
    let narinfo = format!("caches/main/narinfo/{}.narinfo", sample.hash());
    for key in [&nar, &narinfo, "caches/main/cache.json", "granary.json"] {
        std::fs::write(storage.join(format!("{key}#1")), "half").unwrap();
    }
    let anchor = place.start();
    assert_consistent(&place, &anchor, &token, &[sample]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_anchor_had_sent_of_an_object_does_not_stay_in_the_bucket() {
    let s3 = S3::start().await;
    let credentials = s3.options().credentials_file.unwrap();
    let place = Place::with(&format!(
        "storage = \"s3://granary-test/some/prefix\"\n[anchor-server.s3]\n\
         endpoint = {:?}\nregion = \"us-east-1\"\ncredentials-file = {credentials:?}\n",
        s3.endpoint()
    ));
    let token = token(&place);
    // What s3s-fs keeps of uploads under way.
    let in_parts = || {
        let entries = std::fs::read_dir(s3.folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".upload")).count()
    };
    let noted = || {
        let entries = std::fs::read_dir(place.path().join("state/anchor/multipart"));
        entries.map_or(0, |entries| entries.count())
    };
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !is_so() {
            assert!(started.elapsed() < GENEROUS, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for round in 0..2 {
        let mut anchor = place.start();
        wait("the parts of the last round go", &|| in_parts() == 0);
        wait("the note of the last round goes", &|| noted() == 0);
        // The second of two parts is never answered.
        s3.fail(Fault::Silence, |_, target| target.contains("partNumber=2"));
        let samples = vec![Sample::new(round, 20 << 20)];
        let pushing = push(&anchor, &token, samples);
        wait("the parts come", &|| {
            in_parts() >= 2 && s3.faults_left() == 0
        });
        assert_eq!(noted(), 1);
        anchor.kill();
        let (done, was_interrupted) = pushing.join().unwrap();
        assert!(done.is_empty() && was_interrupted);
        assert!(in_parts() >= 2);
    }
    let anchor = place.start();
    wait("the parts of the last round go", &|| in_parts() == 0);
    // What is completed is noted no longer.
    let samples = vec![Sample::new(0, 20 << 20)];
    let (done, _) = push(&anchor, &token, samples).join().unwrap();
    assert_eq!((done.len(), in_parts(), noted()), (1, 0, 0));
    let narinfo = anchor.get(&format!("/main/{}.narinfo", done[0].hash()), &token);
    assert_eq!(narinfo.status, 200);
}

/// Lets days pass for everything that an anchor knows, while it does not run.
fn age(place: &Place) {
    let catalog = rusqlite::Connection::open(place.catalog()).unwrap();
    let aged = "UPDATE paths SET last_used = 1 WHERE base_name NOT LIKE '%sample-0';
                UPDATE nars SET unused_since = 1 WHERE unused_since IS NOT NULL";
    catalog.execute_batch(aged).unwrap();
}

#[test]
fn a_collection_that_is_killed_again_and_again_takes_nothing_that_was_pushed_since() {
    let rounds = rounds(12);
    let place = Place::new();
    let token = token(&place);
    place.run(&["cache", "configure", "main", "--retention", "30"]);
    let mut collected = BTreeSet::new();
    let mut acknowledged = Vec::new();
    for round in 0..=rounds {
        let anchor = place.start();
        assert_consistent(&place, &anchor, &token, &acknowledged);
        drop(anchor);
        let catalog = rusqlite::Connection::open(place.catalog()).unwrap();
        let count = |table: &str| -> i64 {
            let question = format!("SELECT count(*) FROM {table}");
            catalog.query_row(&question, [], |row| row.get(0)).unwrap()
        };
        collected.insert((count("paths"), count("nars")));
        age(&place);
        // Half of what is pushed has just become garbage, and is under the collector's hands. One path
        // stays, or the collector would refuse to empty the cache.
        let mut anchor = place.start();
        interrupted(&anchor, &token, "/api/v1/collection", "");
        let samples = (0..30).map(|number| Sample::new((round % 2) * 15 + number, 20_000));
        let pushing = push(&anchor, &token, samples.collect());
        kill_after(&mut anchor, Duration::from_micros(round * 150_000 / rounds));
        let (done, _) = pushing.join().unwrap();
        acknowledged = done;
    }
    assert!(
        collected.len() > 2,
        "the collector did nothing: {collected:?}"
    );
    let anchor = place.start();
    assert_consistent(&place, &anchor, &token, &acknowledged);
}

#[test]
fn a_deletion_of_a_cache_that_is_killed_again_and_again_leaves_nothing_of_it() {
    let rounds = rounds(8);
    let place = Place::new();
    let token = token(&place);
    for round in 0..rounds {
        let mut anchor = place.start();
        let samples = (0..20).map(|number| Sample::new(number, 1000));
        let (done, _) = push(&anchor, &token, samples.collect()).join().unwrap();
        assert_eq!(done.len(), 20);
        let (address, bearer) = (anchor.address, bearer(&token));
        std::thread::spawn(move || {
            let headers = [("Authorization", bearer.as_str())];
            let target = "/_api/v1/cache-config/main";
            std::panic::catch_unwind(|| ask(address, "DELETE", target, &headers, b""))
        });
        kill_after(&mut anchor, Duration::from_micros(round * 40_000 / rounds));
        // It had not begun, or ends by itself: the default cache, made anew, has nothing of it.
        let anchor = place.start();
        let answered = samples_held(&anchor, &token);
        assert!(
            [0, 20].contains(&answered),
            "{answered} paths of a cache that was deleted"
        );
        let storage = place.path().join("state/storage/caches/main/narinfo");
        let stored = std::fs::read_dir(storage).map_or(0, |entries| entries.count());
        assert_eq!(stored, answered);
    }
}

/// How many of the first twenty samples are answered.
fn samples_held(anchor: &Anchor, token: &str) -> usize {
    let samples = (0..20).map(|number| Sample::new(number, 1000));
    let narinfo = |sample: Sample| format!("/main/{}.narinfo", sample.hash());
    let statuses = samples.map(|sample| anchor.get(&narinfo(sample), token).status);
    statuses.filter(|status| *status == 200).count()
}

#[test]
fn a_rotation_that_is_killed_again_and_again_leaves_every_path_signed() {
    let rounds = rounds(12);
    let place = Place::new();
    let token = token(&place);
    let mut acknowledged = {
        let anchor = place.start();
        let samples = (0..30).map(|number| Sample::new(number, 1000));
        push(&anchor, &token, samples.collect()).join().unwrap().0
    };
    for round in 0..rounds {
        let mut anchor = place.start();
        let body = match round % 3 {
            2 => r#"{"retire": true}"#,
            _ => "{}",
        };
        interrupted(&anchor, &token, "/api/v1/caches/main/keys", body);
        let samples = (0..20).map(|number| Sample::new(1000 + round * 100 + number, 1000));
        let pushing = push(&anchor, &token, samples.collect());
        kill_after(&mut anchor, Duration::from_micros(round * 100_000 / rounds));
        acknowledged.extend(pushing.join().unwrap().0);

        // What was interrupted is finished by itself: every key that the cache tells signs every path.
        let anchor = place.start();
        wait_for_rotation(&place);
        let recent = acknowledged.len().saturating_sub(8);
        assert_consistent(&place, &anchor, &token, &acknowledged[recent..]);
        let keys = keys(&place);
        assert_signed(&place, &anchor, &token, &acknowledged, |narinfo| {
            keys.iter().all(|key| {
                let trusted: TrustedKeys = [key.clone()].into_iter().collect();
                VerifiedNarInfo::verify(narinfo.clone(), &trusted, &Default::default()).is_ok()
            })
        });
        if round % 3 == 2 {
            place.run(&["cache", "rotate-key", "main", "--retire"]);
        }
    }
    // A rotation that is not interrupted makes it whole: each key signs every path.
    let anchor = place.start();
    place.run(&["cache", "rotate-key", "main", "--retire"]);
    place.run(&["cache", "rotate-key", "main"]);
    let keys = keys(&place);
    assert_eq!(keys.len(), 2);
    assert_signed(&place, &anchor, &token, &acknowledged, |narinfo| {
        keys.iter().all(|key| {
            let trusted: TrustedKeys = [key.clone()].into_iter().collect();
            VerifiedNarInfo::verify(narinfo.clone(), &trusted, &Default::default()).is_ok()
        })
    });
    assert_consistent(&place, &anchor, &token, &acknowledged);
}

fn wait_for_rotation(place: &Place) {
    let catalog = rusqlite::Connection::open(place.catalog()).unwrap();
    let is_rotating = || {
        let count = catalog.query_row("SELECT count(*) FROM rotations", [], |row| row.get(0));
        count.is_ok_and(|count: i64| count > 0)
    };
    let started = Instant::now();
    while is_rotating() {
        assert!(started.elapsed() < GENEROUS, "the rotation does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The public keys that a cache tells.
fn keys(place: &Place) -> Vec<PublicKey> {
    let info = place.run(&["cache", "info", "main", "--json"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let keys = info["settings"]["public_keys"].as_array().unwrap().iter();
    keys.map(|key| key.as_str().unwrap().parse().unwrap())
        .collect()
}

fn assert_signed(
    place: &Place,
    anchor: &Anchor,
    token: &str,
    samples: &[Sample],
    is_signed: impl Fn(&NarInfo) -> bool,
) {
    for sample in samples {
        let answer = anchor.get(&format!("/main/{}.narinfo", sample.hash()), token);
        let narinfo = NarInfo::parse(answer.text(), &Default::default()).unwrap();
        assert!(is_signed(&narinfo), "{:?} {}", keys(place), answer.text());
    }
}
