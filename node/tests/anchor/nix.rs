//! What the real Nix client sees of an anchor.

use std::sync::atomic::Ordering;

use granary_protocol::token::Permission::{Delete, Pull, Push};

use crate::pushing::{brittle, try_push};
use crate::rig::{Machine, Rig, Sample, bearer, hash};
use crate::s3::S3;

/// Pushes a closure with `nix copy --to`, takes it back on another machine that trusts the anchor only.
async fn round_trip(rig: &Rig, parameters: &str) {
    let key = rig.cache("main", false).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let top = &closure[2];
    let url = rig.url("main");
    let target = format!("{url}{parameters}");
    tokio::task::block_in_place(|| {
        builder.nix("nix", &["copy", "--to", &target, top]);
        let client = Machine::new(&[&key]);
        client.login(&token);
        client.nix("nix", &["copy", "--from", &url, top]);
        for path in &closure {
            assert!(client.nar(path) == builder.nar(path), "{path}");
        }
        client.nix("nix", &["store", "verify", "--all", "--sigs-needed", "1"]);

        let other = Machine::new(&[&key]);
        other.login(&token);
        other.nix("nix-store", &["-r", top, "--option", "substituters", &url]);
        assert!(other.is_valid(top));
        let wary = Machine::new(&[]);
        wary.login(&token);
        let refused = wary.try_nix("nix-store", &["-r", top, "--option", "substituters", &url]);
        assert!(
            !refused.status.success(),
            "nix took what no trusted key had signed"
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_goes_to_the_anchor_by_nix_copy_and_comes_back_signed() {
    round_trip(&Rig::new().await, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_comes_back_from_s3_in_another_compression() {
    let s3 = S3::start().await;
    round_trip(
        &Rig::on_s3(&s3).await,
        "?compression=zstd&write-nar-listing=1",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_we_take_is_taken_and_another_is_refused_with_a_reason() {
    let rig = Rig::new().await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    for compression in ["none", "bzip2", "xz", "zstd", "gzip", "br"] {
        let name = format!("c-{compression}");
        rig.cache(&name, true).await;
        let target = format!(
            "{}?compression={compression}&narinfo-compression={compression}",
            rig.url(&name)
        );
        tokio::task::block_in_place(|| builder.nix("nix", &["copy", "--to", &target, &closure[2]]));
        let narinfo = rig.get(&format!("/{name}/{}.narinfo", hash(&closure[0])));
        assert_eq!(narinfo.status, 200, "{compression}");
        assert!(
            narinfo.text().contains("Compression: zstd"),
            "{}",
            narinfo.text()
        );
        // Who pushed it remembers the narinfo that it wrote, and asks for its own file.
        let nars = closure.iter().map(|path| builder.nar(path));
        let nars: Vec<_> = nars.collect();
        let url = rig.url(&name);
        tokio::task::block_in_place(|| {
            let [a, b, top] = [&closure[0], &closure[1], &closure[2]];
            // Tests beside this one build the same paths, and Nix takes what processes name for alive.
            let delete = ["--delete", "--ignore-liveness", top, b, a];
            builder.nix("nix-store", &delete);
            let days = ["--option", "narinfo-cache-positive-ttl", "2592000"];
            let copy = ["copy", "--no-check-sigs", "--from", &url, top];
            builder.nix("nix", &[&copy[..], &days[..]].concat());
        });
        for (path, nar) in closure.iter().zip(nars) {
            assert!(builder.nar(path) == nar, "{compression} {path}");
        }
    }
    // One NAR, whatever it came as and wherever it went.
    let nars = rig
        .objects()
        .iter()
        .filter(|key| key.starts_with("nar/"))
        .count();
    assert_eq!(nars, closure.len());
    rig.cache("c-lz4", true).await;
    let target = format!("{}?compression=lz4", rig.url("c-lz4"));
    let refused = tokio::task::block_in_place(|| {
        builder.try_nix("nix", &["copy", "--to", &target, &closure[2]])
    });
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("compression=zstd"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_copy_puts_nothing_and_signing_keeps_older_signatures() {
    let rig = Rig::new().await;
    let key = rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let (line, carried) = brittle(rig.address(), u64::MAX);
    let url = format!("http://{line}/main");
    let carried = || carried.load(Ordering::Relaxed);
    tokio::task::block_in_place(|| {
        builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
        let before = (rig.objects(), carried());
        builder.nix("nix", &["copy", "--to", &url, &closure[2]]);
        assert_eq!(rig.objects(), before.0);
        // Less than three narinfos with their heads have.
        let asked = carried() - before.1;
        assert!(asked < 1500, "{asked} bytes");

        // The anchor is told to keep this key's word? No: it keeps what it can check, and its own.
        let secret = builder.folder().join("secret");
        let public = builder.folder().join("public");
        let (secret, public) = (secret.to_str().unwrap(), public.to_str().unwrap());
        std::process::Command::new("nix-store")
            .args(["--generate-binary-cache-key", "stranger-1", secret, public])
            .status()
            .unwrap();
        let output = std::process::Command::new("nix")
            .args([
                "store",
                "sign",
                "--store",
                &url,
                "--key-file",
                secret,
                &closure[0],
            ])
            .env("HOME", builder.folder())
            .env(
                "NIX_CONFIG",
                format!(
                    "experimental-features = nix-command\nnetrc-file = {}/netrc",
                    builder.folder().display()
                ),
            )
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    });
    let narinfo = rig.get(&format!("/main/{}.narinfo", hash(&closure[0])));
    let name = key.split(':').next().unwrap();
    assert!(
        narinfo.text().contains(&format!("Sig: {name}:")),
        "{}",
        narinfo.text()
    );
    assert!(!narinfo.text().contains("stranger"), "{}", narinfo.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_path_is_pushed_again_by_granary_at_once_and_by_nix_when_it_asks_anew() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Pull, Push, Delete])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let (url, top) = (rig.url("main"), &closure[2]);
    let remove = || {
        let target = format!("/api/v1/caches/main/paths/{}", hash(top));
        let headers = [("Authorization", bearer(&token))];
        let headers = headers
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        assert_eq!(rig.ask("DELETE", &target, &headers, b"").status, 204);
    };
    let is_there = || rig.get(&format!("/main/{}.narinfo", hash(top))).status == 200;
    // Nix's own default, of thirty days.
    let as_usual = ["--option", "narinfo-cache-positive-ttl", "2592000"];
    let copy = ["copy", "--to", &url, top];
    tokio::task::block_in_place(|| {
        builder.nix("nix", &[&copy[..], &as_usual].concat());
        let narinfo = rig.get(&format!("/main/{}.narinfo", hash(top)));
        let nar = narinfo
            .text()
            .lines()
            .find_map(|line| line.strip_prefix("URL: "));
        let nar = format!("/main/{}", nar.unwrap());
        assert_eq!(rig.get(&nar).status, 200);
        remove();
        // Whoever remembers the narinfo hears that its NAR is gone.
        assert_eq!(rig.get(&nar).status, 404);
        // It remembers that the cache has the path.
        builder.nix("nix", &[&copy[..], &as_usual].concat());
        assert!(!is_there());
        builder.nix("nix", &[&copy[..], &as_usual, &["--refresh"]].concat());
        assert!(is_there());
        remove();
        let pushed = try_push(&builder, &url, &token, &[top]);
        assert!(pushed.status.success() && is_there(), "{pushed:?}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_without_the_right_ends_at_once_with_the_reason() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let reader = rig.token(&[("main", &[Pull])]).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let url = rig.url("main");
    for token in ["", &reader, "not.a.token"] {
        builder.login(token);
        let started = std::time::Instant::now();
        let refused = tokio::task::block_in_place(|| {
            builder.try_nix("nix", &["copy", "--to", &url, &closure[2]])
        });
        assert!(!refused.status.success());
        // A client that was answered 5xx would repeat it for minutes.
        assert!(started.elapsed() < crate::rig::GENEROUS, "{token}");
    }
    assert!(!rig.objects().iter().any(|key| key.starts_with("nar/")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_forgets_what_the_bucket_does_not_have() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("gone", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let kept = Sample::new(1, 1000);
    let lost = Sample::new(2, 1000);
    for sample in [&kept, &lost] {
        assert_eq!(rig.upload(&token, "main", sample).status, 200);
    }
    assert_eq!(rig.upload(&token, "gone", &lost).status, 200);
    rig.stop().await;
    let storage = rig.folder.path().join("storage");
    for key in rig.objects() {
        let is_lost = key.contains(lost.hash()) || key.contains("/gone/");
        if is_lost || key.contains(&lost.nar_hash().nix32()) {
            std::fs::remove_file(storage.join(key)).unwrap();
        }
    }
    let found = granary::anchor::rebuild::rebuild(&rig.options()).await;
    let found = found.unwrap();
    assert_eq!((found.caches, found.paths, found.left_out), (1, 1, 0));
    rig.start().await;
    let status = |path: &Sample| rig.get(&format!("/main/{}.narinfo", path.hash())).status;
    assert_eq!((status(&kept), status(&lost)), (200, 404));
    // As one that is private.
    assert_eq!(rig.get("/gone/nix-cache-info").status, 401);
    // Whoever has it may push it again, with all of its bytes.
    assert_eq!(rig.upload(&token, "main", &lost).status, 200);
    let nar = rig.get(&format!("/main/nar/{}.nar.zst", lost.nar_hash().nix32()));
    assert_eq!(zstd::decode_all(&nar.body[..]).unwrap(), lost.nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_state_is_lost_the_bucket_tells_everything() {
    let mut rig = Rig::new().await;
    let key = rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let url = rig.url("main");
    tokio::task::block_in_place(|| builder.nix("nix", &["copy", "--to", &url, &closure[2]]));
    rig.stop().await;
    std::fs::remove_dir_all(rig.state()).unwrap();
    let lost = granary::anchor::Anchor::open(rig.options()).await;
    let refused = lost
        .err()
        .expect("an empty catalog over a full bucket")
        .to_string();
    assert!(refused.contains("anchor rebuild"), "{refused}");

    let found = granary::anchor::rebuild::rebuild(&rig.options())
        .await
        .unwrap();
    assert_eq!((found.caches, found.paths, found.left_out), (1, 3, 0));
    rig.start().await;
    let client = Machine::new(&[&key]);
    let url = rig.url("main");
    tokio::task::block_in_place(|| {
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
    });
    // Nothing can be pushed before it has a key again, and the refusal says so.
    let token = rig.token(&[("main", &[Push])]).await;
    let narinfo = rig.get(&format!("/main/{}.narinfo", hash(&closure[0])));
    let file = format!("/main/{}.narinfo", hash(&closure[0]));
    let put = rig.ask(
        "PUT",
        &file,
        &[("Authorization", &bearer(&token))],
        &narinfo.body,
    );
    assert_eq!(
        (put.status, put.error().as_str()),
        (409, "NoSigningKey"),
        "{put:?}"
    );
}
