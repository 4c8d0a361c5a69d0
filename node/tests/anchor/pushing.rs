//! `granary push`: closures from a real store, and lines that break.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use granary_protocol::signature::SecretKey;
use granary_protocol::token::Permission::{Pull, Push};

use crate::rig::{Machine, Rig, Sample, bearer, hash};

/// Runs `granary push` on a machine.
pub fn try_push(machine: &Machine, cache: &str, token: &str, paths: &[&str]) -> Output {
    push_as(machine, cache, token, paths, "")
}

/// The same with more in the configuration; then the token comes from there.
pub fn push_as(machine: &Machine, cache: &str, token: &str, paths: &[&str], extra: &str) -> Output {
    command(machine, cache, token, paths, extra)
        .output()
        .unwrap()
}

/// The same, to be run.
pub fn push_command(machine: &Machine, cache: &str, token: &str, paths: &[&str]) -> Command {
    command(machine, cache, token, paths, "")
}

fn command(machine: &Machine, cache: &str, token: &str, paths: &[&str], extra: &str) -> Command {
    use std::os::unix::fs::PermissionsExt;
    let root = machine.folder().display();
    let config = machine.folder().join("granary.toml");
    let key = SecretKey::from_seed("upstream-1".parse().unwrap(), [9; 32]).public_key();
    let text = format!(
        "state-dir = \"{root}/state\"\n[store]\nreal-dir = \"{root}/nix/store\"\n\
         database = \"{root}/nix/var/nix/db/db.sqlite\"\n[trust]\nkeys = [\"{key}\"]\n{extra}"
    );
    std::fs::write(&config, text).unwrap();
    let token_file = machine.folder().join("token");
    std::fs::write(&token_file, format!("{token}\n")).unwrap();
    std::fs::set_permissions(&token_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command.args(["push", "--json", cache]).args(paths);
    if extra.is_empty() {
        command.arg("--token-file").arg(&token_file);
    }
    command
        .env("GRANARY_CONFIG", config)
        .env_remove("http_proxy");
    command
}

fn push(machine: &Machine, cache: &str, token: &str, paths: &[&str]) -> serde_json::Value {
    let output = try_push(machine, cache, token, paths);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_is_pushed_once_and_substituted_elsewhere() {
    let rig = Rig::new().await;
    let key = rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let url = rig.url("main");
    tokio::task::block_in_place(|| {
        let first = push(&builder, &url, &token, &[&closure[2]]);
        assert_eq!(
            (&first["paths"], &first["pushed"]),
            (&3.into(), &3.into()),
            "{first}"
        );
        // By a symlink that leads there, from outside the store.
        let link = builder.folder().join("result");
        std::os::unix::fs::symlink(&closure[2], &link).unwrap();
        let again = push(&builder, &url, &token, &[link.to_str().unwrap()]);
        assert_eq!(
            (&again["present"], &again["pushed"]),
            (&3.into(), &0.into()),
            "{again}"
        );
        let client = Machine::new(&[&key]);
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
        assert!(client.nar(&closure[0]) == builder.nar(&closure[0]));

        // By the name of a configured anchor's cache.
        let anchor = format!(
            "[[anchor]]\nurl = \"{url}\"\ntoken-file = \"{}/token\"\n",
            builder.folder().display()
        );
        let named = push_as(&builder, "main", &token, &[&closure[2]], &anchor);
        assert!(
            named.status.success(),
            "{}",
            String::from_utf8_lossy(&named.stderr)
        );
        let unnamed = push_as(&builder, "other", &token, &[&closure[2]], &anchor);
        assert!(String::from_utf8_lossy(&unnamed.stderr).contains("has a cache other"));

        let missing = try_push(
            &builder,
            &url,
            &token,
            &["/nix/store/00000000000000000000000000000000-no"],
        );
        let said = String::from_utf8_lossy(&missing.stderr);
        assert!(
            !missing.status.success() && said.contains("is not in the local store"),
            "{said}"
        );
        let denied = try_push(&builder, &url, "x.y.z", &[&closure[2]]);
        let said = String::from_utf8_lossy(&denied.stderr);
        assert!(
            !denied.status.success() && said.contains("TokenInvalid"),
            "{said}"
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_upstream_really_signed_is_left_to_it() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let changes = granary::anchor::admin::Changes {
        upstream_keys: Some(vec!["upstream-1".to_owned()]),
        ..Default::default()
    };
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor
        .configure_cache(&"main".parse().unwrap(), &changes)
        .await
        .unwrap();
    let token = rig.token(&[("main", &[Pull, Push])]).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let sign = |seed: u8, path: &str| {
        let key = SecretKey::from_seed("upstream-1".parse().unwrap(), [seed; 32]);
        let file = builder.folder().join("key");
        std::fs::write(&file, key.to_nix_string().as_str()).unwrap();
        builder.nix(
            "nix",
            &["store", "sign", "--key-file", file.to_str().unwrap(), path],
        );
    };
    tokio::task::block_in_place(|| {
        sign(9, &closure[0]);
        // The right name over the wrong key is no signature.
        sign(8, &closure[1]);
        let pushed = push(&builder, &rig.url("main"), &token, &[&closure[2]]);
        assert_eq!(
            (&pushed["upstream"], &pushed["pushed"]),
            (&1.into(), &2.into()),
            "{pushed}"
        );
    });
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", hash(&closure[0])))
            .status,
        404
    );
}

/// Adds a path in which nothing compresses, so that a line carries all of it.
fn noise(machine: &Machine, bytes: u64) -> String {
    let file = machine.folder().join("large");
    let mut source = std::fs::File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut source, &mut std::fs::File::create(&file).unwrap()).unwrap();
    machine.nix("nix-store", &["--add", file.to_str().unwrap()])
}

/// A line to the anchor that breaks after so many bytes, on every connection.
pub fn brittle(anchor: SocketAddr, bytes: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let carried = Arc::new(AtomicU64::new(0));
    let counted = carried.clone();
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let server = TcpStream::connect(anchor).unwrap();
            let (mut up, mut down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let counted = counted.clone();
            std::thread::spawn(move || {
                let (mut from, mut to) = (client, server);
                let mut left = bytes;
                let mut buffer = [0; 16 * 1024];
                while let Ok(length @ 1..) = from.read(&mut buffer) {
                    let length = length.min(left as usize);
                    left -= length as u64;
                    counted.fetch_add(length as u64, Ordering::Relaxed);
                    if to.write_all(&buffer[..length]).is_err() || left == 0 {
                        break;
                    }
                }
                // Both ends see it break.
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut down, &mut up);
                let _ = up.shutdown(Shutdown::Both);
            });
        }
    });
    (address, carried)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_over_a_line_that_breaks_goes_on_where_it_was() {
    const BYTES: u64 = 40_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let machine = Machine::new(&[]);
    let path = noise(&machine, BYTES);
    let (line, carried) = brittle(rig.address(), BYTES / 5);
    let url = format!("http://{line}/main");
    tokio::task::block_in_place(|| {
        let pushed = push(&machine, &url, &token, &[&path]);
        assert_eq!(pushed["pushed"], 1, "{pushed}");
    });
    let carried = carried.load(Ordering::Relaxed);
    assert!(carried < BYTES * 3 / 2, "{carried} bytes for {BYTES}");
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", hash(&path))).status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_was_killed_goes_on_in_the_next_one() {
    const BYTES: u64 = 40_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let machine = Machine::new(&[]);
    let path = noise(&machine, BYTES);
    let (line, carried) = brittle(rig.address(), u64::MAX);
    let url = format!("http://{line}/main");
    tokio::task::block_in_place(|| {
        let mut command = push_command(&machine, &url, &token, &[&path]);
        let mut killed = command.spawn().unwrap();
        let started = std::time::Instant::now();
        while carried.load(Ordering::Relaxed) < BYTES / 2 {
            assert!(started.elapsed() < crate::rig::GENEROUS);
            assert!(killed.try_wait().unwrap().is_none(), "it ended");
            std::thread::yield_now();
        }
        killed.kill().unwrap();
        killed.wait().unwrap();
        let pushed = push(&machine, &url, &token, &[&path]);
        assert_eq!(pushed["pushed"], 1, "{pushed}");
    });
    let carried = carried.load(Ordering::Relaxed);
    assert!(carried < BYTES * 11 / 10, "{carried} bytes for {BYTES}");
    let narinfo = rig.get(&format!("/main/{}.narinfo", hash(&path)));
    assert_eq!(narinfo.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_was_left_is_for_its_subject_alone() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let sample = Sample::new(1, 100_000);
    let token = rig.token(&[("main", &[Push])]).await;
    let mut left = RawUpload::of(&sample, &token);
    left.begin(rig.address());
    left.ask(rig.address(), "PUT", "?offset=0", &sample.nar[..1000]);
    let begin = |token: &str| {
        let upload = RawUpload::of(&sample, token);
        let body = serde_json::json!({ "narinfo": upload.narinfo }).to_string();
        let headers = [("Authorization", upload.token.as_str())];
        rig.ask("POST", &upload.target, &headers, body.as_bytes())
            .json()
    };
    let again = begin(&token);
    assert_eq!(again["offset"], 1000, "{again}");
    assert!(left.target.ends_with(again["id"].as_str().unwrap()));
    let mut claims = crate::rig::claims(&[("main", &[Push])]);
    claims.subject = "somebody else".to_owned();
    let other = begin(&claims.mint(&granary::anchor::tokens::token_key(&rig.state()).unwrap()));
    assert_eq!(other["offset"], 0, "{other}");
    assert_ne!(other["id"], again["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_counts_what_came_in_and_takes_no_gaps() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = bearer(&rig.token(&[("*", &[Push])]).await);
    let sample = Sample::new(1, 1_000_000);
    let narinfo = format!(
        "StorePath: {}\nURL: nar/x\nNarHash: {}\nNarSize: {}\nReferences: \n",
        sample.path,
        sample.nar_hash(),
        sample.nar.len()
    );
    let api = "/api/v1/caches/main";
    let ask = |method: &str, target: &str, body: &[u8]| {
        rig.ask(method, target, &[("Authorization", &token)], body)
    };
    let begin = serde_json::json!({ "narinfo": narinfo }).to_string();
    let begun = ask("POST", &format!("{api}/uploads"), begin.as_bytes());
    assert_eq!(begun.status, 201, "{begun:?}");
    let upload = format!("{api}/uploads/{}", begun.json()["id"].as_str().unwrap());

    let put = |offset: usize, body: &[u8]| ask("PUT", &format!("{upload}?offset={offset}"), body);
    assert_eq!(put(7, &sample.nar[7..]).error(), "OtherOffset");
    let half = put(0, &sample.nar[..500_000]);
    assert_eq!(half.json()["offset"], 500_000, "{half:?}");
    assert_eq!(put(0, &sample.nar).error(), "OtherOffset");
    assert_eq!(ask("GET", &upload, b"").json()["offset"], 500_000);
    // Another cache's pusher knows nothing of it.
    assert_eq!(
        ask("GET", &upload.replace("main", "other"), b"").status,
        404
    );
    let whole = put(500_000, &sample.nar[500_000..]);
    assert_eq!(whole.json()["published"], "Stored", "{whole:?}");
    assert_eq!(put(1_000_000, b"").error(), "NoSuchUpload");
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", sample.hash())).status,
        200
    );
    let again = ask("POST", &format!("{api}/uploads"), begin.as_bytes());
    assert_eq!(again.json()["published"], "Known");

    // Wrong bytes end it, and publish nothing.
    let other = Sample::new(2, 1000);
    let narinfo = narinfo.replace(&sample.path, &other.path);
    let narinfo = narinfo.replace(&sample.nar.len().to_string(), &other.nar.len().to_string());
    let begun = ask(
        "POST",
        &format!("{api}/uploads"),
        serde_json::json!({ "narinfo": narinfo })
            .to_string()
            .as_bytes(),
    );
    let upload = format!("{api}/uploads/{}", begun.json()["id"].as_str().unwrap());
    let wrong = ask("PUT", &format!("{upload}?offset=0"), &other.nar);
    assert_eq!((wrong.status, wrong.error().as_str()), (400, "NarMismatch"));
    assert_eq!(ask("GET", &upload, b"").error(), "NoSuchUpload");
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", other.hash())).status,
        404
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_pushes_a_path_again_does_not_change_what_it_references() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let (below, mut sample) = (Sample::new(1, 100), Sample::new(2, 100));
    sample.references = vec![below.path["/nix/store/".len()..].to_owned()];
    for sample in [&below, &sample] {
        assert_eq!(rig.upload(&token, "main", sample).status, 200);
    }
    let target = format!("/main/{}.narinfo", sample.hash());
    let before = rig.get(&target).text().to_owned();
    assert!(before.contains("-sample-1\n"), "{before}");
    sample.references.clear();
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    assert_eq!(rig.get(&target).text(), before);
}

/// The raw requests of an upload.
pub struct RawUpload {
    token: String,
    pub narinfo: String,
    target: String,
}

impl RawUpload {
    pub fn of(sample: &Sample, token: &str) -> RawUpload {
        RawUpload {
            token: bearer(token),
            narinfo: format!(
                "StorePath: {}\nURL: nar/x\nNarHash: {}\nNarSize: {}\nReferences: \n",
                sample.path,
                sample.nar_hash(),
                sample.nar.len()
            ),
            target: "/api/v1/caches/main/uploads".to_owned(),
        }
    }

    pub fn ask(
        &self,
        anchor: SocketAddr,
        method: &str,
        more: &str,
        body: &[u8],
    ) -> serde_json::Value {
        let headers = [("Authorization", self.token.as_str())];
        let target = format!("{}{more}", self.target);
        crate::rig::ask(anchor, method, &target, &headers, body).json()
    }

    pub fn begin(&mut self, anchor: SocketAddr) {
        let begin = serde_json::json!({ "narinfo": self.narinfo }).to_string();
        let begun = self.ask(anchor, "POST", "", begin.as_bytes());
        self.target = format!("{}/{}", self.target, begun["id"].as_str().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_another_cache_has_is_proved_and_not_sent() {
    const BYTES: u64 = 3_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let machine = Machine::new(&[]);
    let path = noise(&machine, BYTES);
    let (line, carried) = brittle(rig.address(), u64::MAX);
    for (cache, at_most) in [("main", 2 * BYTES), ("other", 10_000)] {
        let before = carried.load(Ordering::Relaxed);
        tokio::task::block_in_place(|| {
            let pushed = push(
                &machine,
                &format!("http://{line}/{cache}"),
                &token,
                &[&path],
            );
            assert_eq!(pushed["pushed"], 1, "{pushed}");
        });
        let sent = carried.load(Ordering::Relaxed) - before;
        assert!(sent < at_most, "{sent} bytes to {cache}");
        let narinfo = rig.get(&format!("/{cache}/{}.narinfo", hash(&path)));
        assert_eq!(narinfo.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_that_somebody_else_is_sending_is_waited_for_and_not_sent_twice() {
    const BYTES: u64 = 3_000_000;
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let machine = Machine::new(&[]);
    let path = noise(&machine, BYTES);
    let nar = machine.nar(&path);
    let sample = Sample {
        path: path.clone(),
        nar: nar.clone(),
        references: Vec::new(),
    };
    let mut first = RawUpload::of(&sample, &token);
    let again = RawUpload::of(&sample, &token);
    first.begin(rig.address());
    first.ask(rig.address(), "PUT", "?offset=0", &nar[..1_000_000]);
    let begin = serde_json::json!({ "narinfo": again.narinfo }).to_string();
    let headers = [("Authorization", again.token.as_str())];
    let target = format!("{}?challenge", again.target);
    let refused = rig.ask("POST", &target, &headers, begin.as_bytes());
    assert_eq!(
        (refused.status, refused.error().as_str()),
        (409, "NarUnderway")
    );
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    // Who would not prove it need not wait.
    let second = rig.ask("POST", &again.target, &headers, begin.as_bytes());
    assert_eq!(second.status, 201, "{second:?}");

    let (line, carried) = brittle(rig.address(), u64::MAX);
    let (anchor, url) = (rig.address(), format!("http://{line}/main"));
    tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let pushing = scope.spawn(|| push(&machine, &url, &token, &[&path]));
            // It has asked what is missing, and whether to begin.
            let started = std::time::Instant::now();
            while carried.load(Ordering::Relaxed) < 1000 {
                assert!(started.elapsed() < crate::rig::GENEROUS);
                std::thread::yield_now();
            }
            let ended = first.ask(anchor, "PUT", "?offset=1000000", &nar[1_000_000..]);
            assert_eq!(ended["published"], "Stored");
            pushing.join().unwrap();
        });
    });
    let sent = carried.load(Ordering::Relaxed);
    assert!(sent < 20_000, "{sent} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_broke_off_holds_nobody_up_for_long() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let sample = Sample::new(1, 300_000);
    let mut dead = RawUpload::of(&sample, &token);
    dead.begin(rig.address());
    dead.ask(rig.address(), "PUT", "?offset=0", &sample.nar[..1000]);
    let upload = RawUpload::of(&sample, &token);
    let begin = serde_json::json!({ "narinfo": upload.narinfo }).to_string();
    let headers = [("Authorization", upload.token.as_str())];
    let target = format!("{}?challenge", upload.target);
    let started = std::time::Instant::now();
    while rig.ask("POST", &target, &headers, begin.as_bytes()).status == 409 {
        assert!(started.elapsed() < crate::rig::GENEROUS);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_a_nar_answers_a_challenge() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let sample = Sample::new(1, 300_000);
    let begin = |sample: &Sample| {
        let mut upload = RawUpload::of(sample, &token);
        let body = serde_json::json!({ "narinfo": upload.narinfo }).to_string();
        let begun = upload.ask(rig.address(), "POST", "?challenge", body.as_bytes());
        let id = begun["id"].as_str().unwrap();
        upload.target = format!("{}/{id}", upload.target);
        (upload, begun["challenge"].as_str().map(str::to_owned))
    };
    // What is not here is asked for, as is what is sent as quickly.
    assert_eq!(begin(&sample).1, None);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    let mut other = Sample::new(2, 0);
    other.nar = sample.nar.clone();
    let proof = |challenge: &str, nar: &[u8]| {
        let challenge = granary_protocol::nix32::decode(challenge).unwrap();
        let digest = granary_protocol::hash::sha256(&[&challenge[..], nar].concat());
        format!("?proof={}", granary_protocol::nix32::encode(&digest))
    };
    let (first, challenge) = begin(&other);
    let (second, another) = begin(&other);
    let (challenge, another) = (challenge.unwrap(), another.unwrap());
    assert_ne!(challenge, another);
    let refused = |upload: &RawUpload, proof: &str| {
        upload.ask(rig.address(), "PUT", proof, b"")["error"].clone()
    };
    // Another's answer, and after it the right one.
    let right = proof(&challenge, &sample.nar);
    assert_eq!(refused(&second, &right), "FalseProof");
    assert_eq!(
        refused(&second, &proof(&another, &sample.nar)),
        "NoChallenge"
    );
    let narinfo = format!("/main/{}.narinfo", other.hash());
    assert_eq!(rig.get(&narinfo).status, 404);
    // Its NAR may still be sent.
    assert_eq!(second.ask(rig.address(), "GET", "", b"")["offset"], 0);
    let published = first.ask(rig.address(), "PUT", &right, b"");
    assert_eq!(published["published"], "Known", "{published}");
    assert_eq!(rig.get(&narinfo).status, 200);
    let sent = second.ask(rig.address(), "PUT", "?offset=0", &sample.nar);
    assert_eq!(sent["published"], "Known", "{sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_storage_did_not_take_is_stored_without_being_sent_again() {
    use crate::s3::{Fault, S3};
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    // The NAR, then the narinfo.
    for (number, object) in [(1, "/nar/"), (2, "/narinfo/")] {
        let sample = Sample::new(number, 100_000);
        let mut upload = RawUpload::of(&sample, &token);
        upload.begin(rig.address());
        let deny = move |method: &str, target: &str| method == "PUT" && target.contains(object);
        s3.fail(Fault::Denied, deny);
        let failed = upload.ask(rig.address(), "PUT", "?offset=0", &sample.nar);
        assert_eq!(failed["error"], "InternalError", "{failed}");
        let stands = upload.ask(rig.address(), "GET", "", b"");
        assert_eq!(stands["offset"], sample.nar.len(), "{stands}");
        let end = format!("?offset={}", sample.nar.len());
        let published = upload.ask(rig.address(), "PUT", &end, b"");
        assert!(published["published"].is_string(), "{published}");
        let nar = rig.get(&format!("/main/nar/{}.nar.zst", sample.nar_hash().nix32()));
        assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
    }

    // As the client does it.
    const BYTES: u64 = 3_000_000;
    let machine = Machine::new(&[]);
    let path = noise(&machine, BYTES);
    let (line, carried) = brittle(rig.address(), u64::MAX);
    s3.fail(Fault::Denied, |method, target| {
        method == "PUT" && target.contains("/nar/")
    });
    tokio::task::block_in_place(|| {
        let pushed = push(&machine, &format!("http://{line}/main"), &token, &[&path]);
        assert_eq!(pushed["pushed"], 1, "{pushed}");
    });
    assert_eq!(s3.faults_left(), 0);
    let carried = carried.load(Ordering::Relaxed);
    assert!(carried < BYTES * 5 / 4, "{carried} bytes for {BYTES}");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_nobody_goes_on_with_leave_a_running_anchor() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let begin = |rig: &Rig, number| {
        let mut upload = RawUpload::of(&Sample::new(number, 1000), &token);
        upload.begin(rig.address());
        upload.target.rsplit_once('/').unwrap().1.to_owned()
    };
    let (abandoned, young) = (begin(&rig, 1), begin(&rig, 2));
    rig.stop().await;
    rig.start().await;
    let known = begin(&rig, 3);
    let spool = rig.state().join("spool");
    let file = |id: &str, suffix: &str| spool.join(format!("upload-{id}.{suffix}"));
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 3600);
    for id in [&abandoned, &known] {
        for suffix in ["json", "nar"] {
            let opened = std::fs::File::options()
                .write(true)
                .open(file(id, suffix))
                .unwrap();
            opened.set_modified(long_ago).unwrap();
        }
    }
    std::fs::write(spool.join("nar-on-its-way"), "x").unwrap();
    rig.server.as_ref().unwrap().anchor.expire_uploads().await;
    for suffix in ["json", "nar"] {
        assert!(!file(&abandoned, suffix).exists());
        assert!(file(&young, suffix).exists() && file(&known, suffix).exists());
    }
    assert!(spool.join("nar-on-its-way").exists());
}

#[test]
fn a_full_spool_refuses_cleanly_leaves_nothing_and_is_told_by_health() {
    let place = crate::command::Place::new();
    let spool = place.path().join("state/anchor/spool");
    std::fs::create_dir_all(&spool).unwrap();
    let anchor = place.start_with_small_disk(&spool, "80m");
    let arguments = ["token", "create", "--subject", "ci", "--cache", "main"];
    let token = place.run(&[&arguments[..], &["--allow", "pull,push"]].concat());
    let spool = anchor.sees(&spool);
    assert_eq!(anchor.get("/health", "").status, 200);
    // All but a frame.
    let ballast = spool.join("ballast");
    std::fs::write(&ballast, vec![1; 77 << 20]).unwrap();
    let authorization = bearer(&token);
    let sample = Sample::new(1, 12 << 20);
    let attic = |anchor: &crate::command::Anchor| {
        let metadata = sample.metadata("main").to_string();
        let headers = [
            ("Authorization", authorization.as_str()),
            ("X-Attic-Nar-Info", &metadata),
        ];
        let target = "/_api/v1/upload-path";
        crate::rig::ask(anchor.address, "PUT", target, &headers, &sample.nar)
    };
    let refused = attic(&anchor);
    assert_eq!(
        (refused.status, refused.error().as_str()),
        (507, "StorageFull")
    );
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    let mut upload = RawUpload::of(&sample, &token);
    upload.begin(anchor.address);
    let refused = upload.ask(anchor.address, "PUT", "?offset=0", &sample.nar);
    assert_eq!(refused["error"], "StorageFull", "{refused}");
    // Nix hangs upon 5xx.
    let packed = zstd::encode_all(&sample.nar[..], 1).unwrap();
    let name =
        granary_protocol::hash::FileHash::from_bytes(granary_protocol::hash::sha256(&packed));
    let put = crate::rig::ask(
        anchor.address,
        "PUT",
        &format!("/main/nar/{}.nar.zst", name.nix32()),
        &[("Authorization", &authorization)],
        &packed,
    );
    assert_eq!((put.status, put.error().as_str()), (424, "StorageFull"));
    let deadline = std::time::Instant::now() + crate::rig::GENEROUS;
    // A good answer is given again for a second.
    let health = |status| loop {
        let answer = anchor.get("/health", "");
        if answer.status == status {
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "{answer:?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let unwell = health(503);
    assert!(unwell.text().contains("full"), "{}", unwell.text());
    while std::fs::read_dir(&spool).unwrap().count() > 1 {
        assert!(std::time::Instant::now() < deadline, "something is left");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(!place.path().join("state/storage/nar").exists());
    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(attic(&anchor).json()["kind"], "Uploaded");
    health(200);
}

/// Raw bytes of a frame: what a restart may cost.
const FRAME: usize = granary_protocol::seekable::FRAME_RAW_BYTES as usize;

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_outlives_a_restart_of_the_anchor_but_for_its_last_frame() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let sample = Sample::new(1, 3 * FRAME);
    let mut upload = RawUpload::of(&sample, &token);
    upload.begin(rig.address());
    let half = 2 * FRAME + 1000;
    let put = upload.ask(rig.address(), "PUT", "?offset=0", &sample.nar[..half]);
    assert_eq!(put["offset"], half, "{put}");
    // What is none of ours goes at the next start.
    let spool = rig.state().join("spool");
    std::fs::write(spool.join("nar-abandoned"), "x").unwrap();
    rig.stop().await;
    rig.start().await;
    let files = || std::fs::read_dir(&spool).unwrap().count();
    assert_eq!(files(), 2);
    // Another cache's pusher gets nothing of it, nor does a name that is a path.
    let other = upload.target.replace("main", "other");
    let headers = [("Authorization", upload.token.as_str())];
    for target in [&other, &format!("{}x", upload.target)] {
        let stranger = rig.ask("GET", target, &headers, b"");
        assert_eq!(stranger.error(), "NoSuchUpload", "{target}");
    }
    let stands = upload.ask(rig.address(), "GET", "", b"");
    assert_eq!(stands["offset"], 2 * FRAME, "{stands}");
    // Once more, with nothing sent in between.
    rig.stop().await;
    rig.start().await;
    let rest = format!("?offset={}", 2 * FRAME);
    let whole = upload.ask(rig.address(), "PUT", &rest, &sample.nar[2 * FRAME..]);
    assert_eq!(whole["published"], "Stored", "{whole}");
    let nar = rig.get(&format!("/main/nar/{}.nar.zst", sample.nar_hash().nix32()));
    assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
    assert_eq!(
        upload.ask(rig.address(), "GET", "", b"")["error"],
        "NoSuchUpload"
    );
    let deadline = std::time::Instant::now() + crate::rig::GENEROUS;
    while files() > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "the spool is not emptied"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_what_a_crash_left_of_an_upload_only_whole_frames_count() {
    let mut rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let sample = Sample::new(1, 4 * FRAME);
    let mut upload = RawUpload::of(&sample, &token);
    upload.begin(rig.address());
    upload.ask(
        rig.address(),
        "PUT",
        "?offset=0",
        &sample.nar[..3 * FRAME + 5],
    );
    let spool = rig.state().join("spool");
    let frames = || {
        let mut files = std::fs::read_dir(&spool)
            .unwrap()
            .map(|file| file.unwrap().path());
        files.find(|file| file.extension().is_some_and(|kind| kind == "nar"))
    };
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let file = frames().unwrap();
        let mut bytes = std::fs::read(&file).unwrap();
        change(&mut bytes);
        std::fs::write(&file, bytes).unwrap();
    };
    // Half a frame at the end.
    rig.stop().await;
    change(&|bytes| bytes.truncate(bytes.len() - 1000));
    rig.start().await;
    let stands = upload.ask(rig.address(), "GET", "", b"");
    assert_eq!(stands["offset"], 2 * FRAME, "{stands}");
    // A flipped bit in the second.
    rig.stop().await;
    change(&|bytes| {
        let at = bytes.len() * 3 / 4;
        bytes[at] ^= 4;
    });
    rig.start().await;
    let stands = upload.ask(rig.address(), "GET", "", b"");
    assert_eq!(stands["offset"], FRAME, "{stands}");
    let whole = upload.ask(
        rig.address(),
        "PUT",
        &format!("?offset={FRAME}"),
        &sample.nar[FRAME..],
    );
    assert_eq!(whole["published"], "Stored", "{whole}");

    // One that nobody has touched for long is not waited for.
    let other = Sample::new(2, 2 * FRAME);
    let mut upload = RawUpload::of(&other, &token);
    upload.begin(rig.address());
    upload.ask(rig.address(), "PUT", "?offset=0", &other.nar[..FRAME + 5]);
    rig.stop().await;
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
    let file = std::fs::File::options().write(true).open(frames().unwrap());
    file.unwrap().set_modified(long_ago).unwrap();
    rig.start().await;
    assert_eq!(std::fs::read_dir(&spool).unwrap().count(), 0);
    assert_eq!(
        upload.ask(rig.address(), "GET", "", b"")["error"],
        "NoSuchUpload"
    );
}

#[test]
fn an_upload_outlives_an_anchor_that_is_killed_while_it_is_filled() {
    let place = crate::command::Place::new();
    let mut anchor = place.start();
    let arguments = ["token", "create", "--subject", "ci", "--cache", "main"];
    let token = place.run(&[&arguments[..], &["--allow", "pull,push"]].concat());
    let sample = Sample::new(1, 5 * FRAME);
    let mut upload = RawUpload::of(&sample, &token);
    upload.begin(anchor.address);
    // Most of a body that promises all of it, and then nothing more.
    let mut stream = TcpStream::connect(anchor.address).unwrap();
    let head = format!(
        "PUT {}?offset=0 HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\nContent-Length: {}\r\n\r\n",
        upload.target,
        upload.token,
        sample.nar.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&sample.nar[..4 * FRAME]).unwrap();
    let spool = place.path().join("state/anchor/spool");
    let received = || -> u64 {
        let files = std::fs::read_dir(&spool).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    };
    // Three frames compress to half of their size.
    let deadline = std::time::Instant::now() + crate::rig::GENEROUS;
    while received() < 5 * FRAME as u64 / 4 {
        assert!(
            std::time::Instant::now() < deadline,
            "{} bytes came in",
            received()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    anchor.kill();
    let anchor = place.start();
    let stands = upload.ask(anchor.address, "GET", "", b"");
    let offset = stands["offset"].as_u64().unwrap() as usize;
    assert!((2 * FRAME..=4 * FRAME).contains(&offset), "{stands}");
    let rest = format!("?offset={offset}");
    let whole = upload.ask(anchor.address, "PUT", &rest, &sample.nar[offset..]);
    assert_eq!(whole["published"], "Stored", "{whole}");
}
