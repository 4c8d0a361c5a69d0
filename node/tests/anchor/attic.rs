//! The requests that Attic's client makes, as it makes them (PEERS.md §A 1.5, 1.12).

use granary_protocol::token::Permission::{Configure, Create, Destroy, Pull, Push, Retention};

use crate::rig::{Answer, Rig, Sample, bearer};

struct Client<'a> {
    rig: &'a Rig,
    authorization: String,
}

impl Client<'_> {
    fn ask(&self, method: &str, target: &str, body: &serde_json::Value) -> Answer {
        // Its scheme is in lower case.
        let headers = [
            ("authorization", self.authorization.as_str()),
            ("content-type", "application/json"),
        ];
        self.rig
            .ask(method, target, &headers, body.to_string().as_bytes())
    }

    fn config(&self, cache: &str) -> serde_json::Value {
        let answer = self.rig.ask(
            "GET",
            &format!("/_api/v1/cache-config/{cache}"),
            &[("authorization", &self.authorization)],
            b"",
        );
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }
}

async fn client<'a>(
    rig: &'a Rig,
    permissions: &[granary_protocol::token::Permission],
) -> Client<'a> {
    let token = rig.token(&[("*", permissions)]).await;
    Client {
        rig,
        authorization: format!("bearer {token}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_is_created_used_configured_and_destroyed() {
    let rig = Rig::new().await;
    let all = client(&rig, &[Pull, Push, Create, Configure, Retention, Destroy]).await;
    let create = serde_json::json!({
        "keypair": "Generate", "is_public": false, "store_dir": "/nix/store", "priority": 41,
        "upstream_cache_key_names": ["cache.nixos.org-1"],
    });
    assert_eq!(
        all.ask("POST", "/_api/v1/cache-config/team", &create)
            .status,
        200
    );
    let again = all.ask("POST", "/_api/v1/cache-config/team", &create);
    assert_eq!(
        (again.status, again.error().as_str()),
        (400, "CacheAlreadyExists")
    );
    assert_eq!(again.json()["code"], 400);

    let config = all.config("team");
    assert_eq!(
        config["substituter_endpoint"],
        format!("http://{}/team", rig.address())
    );
    assert_eq!(config["api_endpoint"], format!("http://{}/", rig.address()));
    assert_eq!(config["retention_period"], "Global");
    assert_eq!(config["upstream_cache_key_names"][0], "cache.nixos.org-1");
    assert!(
        config["public_key"]
            .as_str()
            .unwrap()
            .starts_with("team-1:")
    );
    assert_eq!(config["is_public"], false);

    let change = serde_json::json!({"is_public": true, "priority": 30, "retention_period": {"Period": 3600}});
    assert_eq!(
        all.ask("PATCH", "/_api/v1/cache-config/team", &change)
            .status,
        200
    );
    let config = all.config("team");
    assert_eq!(
        (&config["is_public"], &config["priority"]),
        (&true.into(), &30.into())
    );
    assert_eq!(config["retention_period"]["Period"], 3600);
    let public = rig.get("/team/attic-cache-info");
    assert_eq!(public.header("x-attic-cache-visibility"), Some("public"));
    assert_eq!(
        all.ask(
            "PATCH",
            "/_api/v1/cache-config/team",
            &serde_json::json!({})
        )
        .status,
        400
    );

    // What its client sends with `configure --private`, and may not.
    let some = client(&rig, &[Pull, Configure]).await;
    let change = serde_json::json!({"is_public": false, "retention_period": "Global"});
    assert_eq!(
        some.ask("PATCH", "/_api/v1/cache-config/team", &change)
            .status,
        200
    );
    assert_eq!(all.config("team")["retention_period"]["Period"], 3600);
    assert_eq!(all.config("team")["is_public"], false);
    let period = serde_json::json!({"retention_period": {"Period": 1}});
    assert_eq!(
        some.ask("PATCH", "/_api/v1/cache-config/team", &period)
            .status,
        403
    );
    // With the right it is a reset, as the old client means it.
    assert_eq!(
        all.ask("PATCH", "/_api/v1/cache-config/team", &change)
            .status,
        200
    );
    assert_eq!(all.config("team")["retention_period"], "Global");

    assert_eq!(
        some.ask(
            "DELETE",
            "/_api/v1/cache-config/team",
            &serde_json::Value::Null
        )
        .status,
        403
    );
    assert_eq!(
        all.ask(
            "DELETE",
            "/_api/v1/cache-config/team",
            &serde_json::Value::Null
        )
        .status,
        200
    );
    let gone = all.ask(
        "DELETE",
        "/_api/v1/cache-config/team",
        &serde_json::Value::Null,
    );
    assert_eq!((gone.status, gone.error().as_str()), (404, "NoSuchCache"));
    assert_eq!(rig.objects(), ["granary.json"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_key_signs() {
    let rig = Rig::new().await;
    let all = client(&rig, &[Pull, Push, Create]).await;
    let key = granary_protocol::signature::SecretKey::from_seed(
        "old.example.org-1".parse().unwrap(),
        [3; 32],
    );
    let create = serde_json::json!({
        "keypair": {"Keypair": key.to_nix_string().as_str()}, "is_public": true, "store_dir": "/nix/store",
        "priority": 41, "upstream_cache_key_names": [],
    });
    assert_eq!(
        all.ask("POST", "/_api/v1/cache-config/old", &create).status,
        200
    );
    assert_eq!(
        all.config("old")["public_key"],
        key.public_key().to_string()
    );
    let sample = Sample::new(1, 10);
    let token = rig.token(&[("old", &[Push])]).await;
    assert_eq!(rig.upload(&token, "old", &sample).status, 200);
    let narinfo = rig.get(&format!("/old/{}.narinfo", sample.hash()));
    let narinfo =
        granary_protocol::narinfo::NarInfo::parse(narinfo.text(), &Default::default()).unwrap();
    let fingerprint = narinfo.fingerprint(&Default::default());
    assert!(
        key.public_key()
            .verify(fingerprint.as_bytes(), &narinfo.signatures[0])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_pushed_with_its_metadata_before_or_beside_it() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let push = client(&rig, &[Push]).await;
    let (one, two) = (Sample::new(1, 100_000), Sample::new(2, 100_000));
    let question =
        serde_json::json!({"cache": "main", "store_path_hashes": [one.hash(), two.hash()]});
    let missing = push
        .ask("POST", "/_api/v1/get-missing-paths", &question)
        .json();
    assert_eq!(
        missing["missing_paths"],
        serde_json::json!([one.hash(), two.hash()])
    );

    let token = rig.token(&[("main", &[Push])]).await;
    let first = rig.upload(&token, "main", &one);
    assert_eq!(
        (first.status, &first.json()["kind"]),
        (200, &"Uploaded".into())
    );
    assert!(first.json()["file_size"].as_u64().unwrap() < 100_000);

    // Chunked, and with the metadata before the NAR, as for long lists of references.
    let metadata = two.metadata("main").to_string();
    let mut body = Vec::new();
    for piece in [metadata.as_bytes(), &two.nar].concat().chunks(30_000) {
        body.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        body.extend_from_slice(piece);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"0\r\n\r\n");
    let size = metadata.len().to_string();
    // `ask` adds a length only where there is none, and this transfer has none.
    let headers = format!(
        "PUT /_api/v1/upload-path HTTP/1.1\r\nHost: x\r\nConnection: close\r\nauthorization: {}\r\nX-Attic-Nar-Info-Preamble-Size: {size}\r\nTransfer-Encoding: chunked\r\n\r\n",
        bearer(&token)
    );
    let answer = raw(&rig, headers.as_bytes(), &body);
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("\"Uploaded\""),
        "{answer}"
    );

    let missing = push
        .ask("POST", "/_api/v1/get-missing-paths", &question)
        .json();
    assert_eq!(missing["missing_paths"], serde_json::json!([]));
    let again = rig.upload(&token, "main", &one);
    assert_eq!(
        (again.status, &again.json()["kind"]),
        (200, &"Deduplicated".into())
    );
}

fn raw(rig: &Rig, head: &[u8], body: &[u8]) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(rig.address()).unwrap();
    stream.set_read_timeout(Some(crate::rig::GENEROUS)).unwrap();
    stream.write_all(head).unwrap();
    stream.write_all(body).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_that_is_not_true_is_refused_and_nothing_is_stored() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("main", &[Push])]).await;
    let (sample, other) = (Sample::new(1, 1000), Sample::new(2, 1000));
    let absent = "00000000000000000000000000000000-absent";
    for (field, value) in [
        ("store_path_hash", serde_json::json!(other.hash())),
        ("store_path_hash", serde_json::json!("x")),
        ("store_path", serde_json::json!("/etc/passwd")),
        (
            "store_path",
            serde_json::json!(format!("{}\nSig: x:y", sample.path)),
        ),
        (
            "store_path",
            serde_json::json!(sample.path.replace("/nix/store", "/gnu/store")),
        ),
        ("references", serde_json::json!(["x\ny"])),
        ("references", serde_json::json!([absent])),
        ("references", serde_json::json!("x")),
        ("deriver", serde_json::json!("a\nSig: b:c")),
        ("ca", serde_json::json!("fixed:\nSig: b:c")),
        (
            "ca",
            serde_json::json!(
                "fixed:r:sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s"
            ),
        ),
        ("nar_hash", serde_json::json!(other.nar_hash().to_string())),
        ("nar_hash", serde_json::json!("sha256:zz")),
        ("nar_size", serde_json::json!(sample.nar.len() + 1)),
        ("nar_size", serde_json::json!(sample.nar.len() - 1)),
        ("nar_size", serde_json::json!(0)),
        ("nar_size", serde_json::json!(-1)),
        ("nar_size", serde_json::json!(u64::MAX)),
        ("cache", serde_json::json!("../main")),
        ("cache", serde_json::Value::Null),
    ] {
        let mut metadata = sample.metadata("main");
        metadata[field] = value.clone();
        let answer = rig.upload_as(&token, &metadata, &sample.nar);
        assert!(
            matches!(answer.status, 400 | 413),
            "{field} {value}: {answer:?}"
        );
        let narinfo = rig.get(&format!("/main/{}.narinfo", sample.hash()));
        assert_eq!(narinfo.status, 404, "{field} {value}");
    }
    let mut trailing = sample.nar.clone();
    trailing.push(0);
    for nar in [
        &b""[..],
        b"hello",
        &sample.nar[..sample.nar.len() - 1],
        &trailing,
        &other.nar,
    ] {
        assert_eq!(
            rig.upload_as(&token, &sample.metadata("main"), nar).status,
            400
        );
    }
    assert!(!rig.objects().iter().any(|key| key.ends_with(".narinfo")));
    // Signatures that nobody here can check are left out, not believed.
    let mut metadata = sample.metadata("main");
    metadata["sigs"] = serde_json::json!([
        "main-1:AAAA",
        "x",
        "stranger-1:".to_owned() + &"A".repeat(86) + "=="
    ]);
    assert_eq!(rig.upload_as(&token, &metadata, &sample.nar).status, 200);
    let narinfo = rig.get(&format!("/main/{}.narinfo", sample.hash()));
    assert_eq!(
        narinfo.text().matches("Sig: ").count(),
        1,
        "{}",
        narinfo.text()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_of_one_path_that_meet_store_it_once() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("*", &[Push])]).await;
    let sample = Sample::new(1, 5_000_000);
    let kinds: Vec<String> = std::thread::scope(|scope| {
        let pushes: Vec<_> = (0..8)
            .map(|number| {
                let (rig, token, sample) = (&rig, &token, &sample);
                let cache = if number % 2 == 0 { "main" } else { "other" };
                scope.spawn(move || {
                    let answer = rig.upload(token, cache, sample);
                    assert_eq!(answer.status, 200, "{answer:?}");
                    answer.json()["kind"].as_str().unwrap().to_owned()
                })
            })
            .collect();
        pushes
            .into_iter()
            .map(|push| push.join().unwrap())
            .collect()
    });
    assert_eq!(
        kinds.iter().filter(|kind| *kind == "Uploaded").count(),
        1,
        "{kinds:?}"
    );
    for cache in ["main", "other"] {
        assert_eq!(
            rig.get(&format!("/{cache}/{}.narinfo", sample.hash()))
                .status,
            200
        );
    }
}
