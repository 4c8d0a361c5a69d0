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
fn try_push(machine: &Machine, cache: &str, token: &str, paths: &[&str]) -> Output {
    push_as(machine, cache, token, paths, "")
}

/// The same with more in the configuration; then the token comes from there.
pub fn push_as(machine: &Machine, cache: &str, token: &str, paths: &[&str], extra: &str) -> Output {
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
        .env_remove("http_proxy")
        .output()
        .unwrap()
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
    let file = machine.folder().join("large");
    // Nothing in it compresses, so that the line carries all of it.
    let mut source = std::fs::File::open("/dev/urandom").unwrap().take(BYTES);
    std::io::copy(&mut source, &mut std::fs::File::create(&file).unwrap()).unwrap();
    let path = machine.nix("nix-store", &["--add", file.to_str().unwrap()]);
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
