//! Who may do what, and what a refusal gives away.

use granary_protocol::certificate::UnixTime;
use granary_protocol::signature::SecretKey;
use granary_protocol::token::Permission::{self, Configure, Pull, Push};

use crate::rig::{Rig, Sample, bearer, claims};

#[tokio::test(flavor = "multi_thread")]
async fn a_private_cache_is_no_oracle() {
    let rig = Rig::new().await;
    rig.cache("secret", false).await;
    rig.cache("other", true).await;
    let token = rig.token(&[("secret", &[Push, Pull])]).await;
    let stranger = rig.token(&[("other", &[Push, Pull])]).await;
    let sample = Sample::new(1, 100);
    assert_eq!(rig.upload(&token, "secret", &sample).status, 200);
    let nar = format!("nar/{}.nar.zst", sample.nar_hash().nix32());
    let rest = [
        "nix-cache-info".to_owned(),
        format!("{}.narinfo", sample.hash()),
        "00000000000000000000000000000000.narinfo".to_owned(),
        nar.clone(),
        "nar/x".to_owned(),
        "log/x".to_owned(),
        "x".to_owned(),
    ];
    // Timing aside, nothing tells a path that is there from one that is not, nor from a cache that is not.
    let stranger = bearer(&stranger);
    for headers in [&[][..], &[("Authorization", stranger.as_str())]] {
        let mut answers = Vec::new();
        for cache in ["secret", "absent"] {
            for rest in &rest {
                for method in ["GET", "HEAD"] {
                    let answer = rig.ask(method, &format!("/{cache}/{rest}"), headers, b"");
                    let text = String::from_utf8(answer.body)
                        .unwrap()
                        .replace("absent", "secret");
                    answers.push((answer.status, text, method));
                }
            }
        }
        answers.sort();
        answers.dedup();
        // One for each method.
        assert_eq!(answers.len(), 2, "{answers:?}");
        assert_eq!(answers[0].0, if headers.is_empty() { 401 } else { 403 });
    }
    // The NAR is not to be had by way of a cache that does not have it.
    assert_eq!(rig.get(&format!("/other/{nar}")).status, 404);
    let token = bearer(&token);
    assert_eq!(
        rig.ask(
            "GET",
            &format!("/secret/{nar}"),
            &[("Authorization", &token)],
            b""
        )
        .status,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_says_why() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    let key = granary::anchor::tokens::token_key(&rig.state()).unwrap();
    let other = SecretKey::from_seed("granary-tokens".parse().unwrap(), [7; 32]);
    let check = |token: &str, status: u16, error: &str| {
        let answer = rig.ask(
            "GET",
            "/main/nix-cache-info",
            &[("Authorization", &bearer(token))],
            b"",
        );
        assert_eq!(
            (answer.status, answer.error().as_str()),
            (status, error),
            "{answer:?}"
        );
        let challenge = answer.header("www-authenticate").unwrap_or_default();
        let expected = match error {
            "MissingPermission" => "error=\"insufficient_scope\"",
            name => name,
        };
        assert!(challenge.contains(expected), "{challenge:?}");
    };
    let mut claims = claims(&[("main", &[Pull])]);
    claims.expires = Some(UnixTime(1));
    check(&claims.mint(&key), 401, "TokenExpired");
    claims.expires = None;
    claims.not_before = Some(UnixTime(u64::MAX / 2));
    check(&claims.mint(&key), 401, "TokenNotYetValid");
    claims.not_before = None;
    check(&claims.mint(&other), 401, "TokenInvalid");
    check("garbage", 401, "TokenInvalid");
    claims.grants[0].permissions = vec![Push];
    check(&claims.mint(&key), 403, "MissingPermission");
    claims.grants[0].permissions = vec![Pull];
    let good = claims.mint(&key);
    let answer = rig.ask(
        "GET",
        "/main/nix-cache-info",
        &[("Authorization", &bearer(&good))],
        b"",
    );
    assert_eq!(answer.status, 200);

    // Revoked, it is refused with the next request.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let id = claims.id.clone().unwrap();
    assert!(anchor.tokens.revoke(&id, UnixTime(5)).await.unwrap());
    check(&good, 401, "TokenRevoked");
    let anonymous = rig.get("/main/nix-cache-info");
    assert_eq!(
        (anonymous.status, anonymous.error().as_str()),
        (401, "Unauthorized")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_stays_revoked_after_the_state_is_lost() {
    let mut rig = Rig::new().await;
    rig.cache("main", false).await;
    let revoked = rig.token(&[("main", &[Pull])]).await;
    let older = rig.token(&[("main", &[Pull])]).await;
    let good = rig.token(&[("main", &[Pull])]).await;
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert!(anchor.tokens.revoke(&revoked, UnixTime(5)).await.unwrap());
    // By a version that told the catalog alone.
    let id = granary_protocol::token::Token::parse(&older)
        .unwrap()
        .claims
        .id;
    let insert = "INSERT INTO revoked (id, at) VALUES (?1, 5)";
    let inserted = anchor
        .catalog
        .write(move |transaction| transaction.execute(insert, [id]));
    inserted.await.unwrap();
    rig.stop().await;
    rig.start().await;
    let started = std::time::Instant::now();
    let kept = || {
        let objects = rig.objects();
        objects
            .iter()
            .filter(|key| key.starts_with("revoked/"))
            .count()
    };
    while kept() < 2 {
        assert!(
            started.elapsed() < crate::rig::GENEROUS,
            "{:?}",
            rig.objects()
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    rig.stop().await;
    let key = std::fs::read(rig.state().join("token-key")).unwrap();
    std::fs::remove_dir_all(rig.state()).unwrap();
    let rebuilt = granary::anchor::rebuild::rebuild(&rig.options()).await;
    assert_eq!(rebuilt.unwrap().left_out, 0);
    let file = rig.state().join("token-key");
    std::fs::write(&file, key).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&file, mode).unwrap();
    rig.start().await;
    for (token, expected) in [(&revoked, 401), (&older, 401), (&good, 200)] {
        let answer = rig.ask(
            "GET",
            "/main/nix-cache-info",
            &[("Authorization", &bearer(token))],
            b"",
        );
        assert_eq!(answer.status, expected, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_token_does_not_keep_anybody_from_a_public_cache() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let stale = [("Authorization", "Basic eDpnYXJiYWdl")];
    assert_eq!(
        rig.ask("GET", "/main/nix-cache-info", &stale, b"").status,
        200
    );
    assert_eq!(
        rig.ask("PUT", "/main/nix-cache-info", &stale, b"").status,
        401
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_with_what_became_of_them() {
    let rig = Rig::new().await;
    rig.token(&[("a*", &[Pull])]).await;
    let second = claims(&[("*", &Permission::ALL)]);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    anchor
        .tokens
        .issued(second.clone(), UnixTime(100))
        .await
        .unwrap();
    anchor
        .tokens
        .revoke(second.id.as_ref().unwrap(), UnixTime(200))
        .await
        .unwrap();
    let listed = anchor.tokens.list().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[0].issued, listed[0].revoked), (100, Some(200)));
    assert_eq!(listed[0].claims, second.to_json());
    assert_eq!(listed[1].revoked, None);
    let again = anchor
        .tokens
        .revoke(second.id.as_ref().unwrap(), UnixTime(300))
        .await
        .unwrap();
    assert!(!again);
}

/// What `atticd` has in its tokens.
fn attic_claims() -> serde_json::Value {
    serde_json::json!({
        "sub": "alice", "exp": 4102324986u64, "nbf": 1700000000,
        "https://jwt.attic.rs/v1": {"caches": {"dev-*": {"r": 1, "w": 1}}},
    })
}

/// An anchor with a private cache `dev-x`, which proves Attic's tokens with this key.
async fn rig_with_attic_key(key: &str) -> Rig {
    use std::os::unix::fs::PermissionsExt;
    let mut rig = Rig::new().await;
    rig.cache("dev-x", false).await;
    rig.stop().await;
    let file = rig.folder.path().join("attic-key");
    std::fs::write(&file, key).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut options = rig.options();
    options.attic_key = Some(file);
    let listen = "127.0.0.1:0".parse().unwrap();
    let server = granary::anchor::server::Server::start(options, listen, None);
    rig.server = Some(server.await.unwrap());
    rig
}

/// Reads that cache as Nix does with a token from its netrc.
fn status_with(rig: &Rig, token: &str) -> u16 {
    let basic = data_encoding::BASE64.encode(format!("x:{token}").as_bytes());
    let headers = [("Authorization", &*format!("Basic {basic}"))];
    rig.ask("GET", "/dev-x/nix-cache-info", &headers, b"")
        .status
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_attic_made_with_a_secret_are_taken_when_it_is_configured() {
    let secret = b"a secret that atticd and we share";
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    let sign = |secret: &[u8]| {
        let key = jsonwebtoken::EncodingKey::from_secret(secret);
        jsonwebtoken::encode(&header, &attic_claims(), &key).unwrap()
    };
    let (genuine, forged) = (sign(secret), sign(b"another secret"));
    let key = format!("hs256:{}\n", data_encoding::BASE64.encode(secret));
    let rig = rig_with_attic_key(&key).await;
    assert_eq!(status_with(&rig, &genuine), 200);
    assert_eq!(status_with(&rig, &forged), 401);
    // Without an id it is revoked by its own text.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert!(anchor.tokens.revoke(&genuine, UnixTime(5)).await.unwrap());
    assert_eq!(status_with(&rig, &genuine), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_attic_made_with_an_rsa_key_are_taken_and_the_public_half_signs_none() {
    // Made for this test by `openssl genrsa -traditional`, as `atticd` makes its own.
    let private = include_bytes!("attic-rs256.pem");
    let public = include_str!("attic-rs256.pub.pem");
    let algorithm = jsonwebtoken::Algorithm::RS256;
    let header = jsonwebtoken::Header::new(algorithm);
    let key = jsonwebtoken::EncodingKey::from_rsa_pem(private).unwrap();
    let genuine = jsonwebtoken::encode(&header, &attic_claims(), &key).unwrap();
    let mut changed = attic_claims();
    changed["https://jwt.attic.rs/v1"]["caches"]["*"] = serde_json::json!({"cd": 1});
    let changed = data_encoding::BASE64URL_NOPAD.encode(changed.to_string().as_bytes());
    let mut words: Vec<&str> = genuine.split('.').collect();
    words[1] = &changed;
    let changed = words.join(".");
    // What everybody knows, taken for a shared secret: the classic confusion of algorithms.
    let confused = jsonwebtoken::encode(
        &jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256),
        &attic_claims(),
        &jsonwebtoken::EncodingKey::from_secret(public.as_bytes()),
    );
    let confused = confused.unwrap();
    // As a file of `openssl rsa -pubout`, and as it stands in Attic's configuration.
    let packed = data_encoding::BASE64.encode(public.as_bytes());
    for key in [public, &packed, &format!("rs256:{packed}\n")] {
        let rig = rig_with_attic_key(key).await;
        assert_eq!(status_with(&rig, &genuine), 200, "{key}");
        assert_eq!(status_with(&rig, &changed), 401, "{key}");
        assert_eq!(status_with(&rig, &confused), 401, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_permission_opens_its_own_door() {
    let rig = Rig::new().await;
    rig.cache("main", false).await;
    for permission in Permission::ALL {
        let token = bearer(&rig.token(&[("main", &[permission])]).await);
        let status = |method: &str, target: &str, body: &[u8]| {
            rig.ask(method, target, &[("Authorization", &token)], body)
                .status
        };
        let may =
            |wanted: Permission, allowed: u16| if permission == wanted { allowed } else { 403 };
        assert_eq!(
            status("GET", "/main/nix-cache-info", b""),
            may(Pull, 200),
            "{permission}"
        );
        assert_eq!(
            status("PUT", "/main/log/x", b"x"),
            may(Push, 201),
            "{permission}"
        );
        let missing = br#"{"cache":"main","store_path_hashes":[]}"#;
        assert_eq!(
            status("POST", "/_api/v1/get-missing-paths", missing),
            may(Push, 200),
            "{permission}"
        );
        let configured = status("PATCH", "/_api/v1/cache-config/main", br#"{"priority":7}"#);
        assert_eq!(configured, may(Configure, 200), "{permission}");
        // Whoever may do anything may know what it is.
        assert_eq!(
            status("GET", "/_api/v1/cache-config/main", b""),
            200,
            "{permission}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifth_signing_key_is_refused_and_changes_nothing() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let configure = bearer(&rig.token(&[("main", &[Configure])]).await);
    let push = rig.token(&[("main", &[Push])]).await;
    let rotate = |body: &[u8]| {
        let headers = [("Authorization", configure.as_str())];
        rig.ask("POST", "/api/v1/caches/main/keys", &headers, body)
    };
    let keys = |answer: &crate::rig::Answer| answer.json()["public_keys"].as_array().unwrap().len();
    for count in 2..=4 {
        assert_eq!(keys(&rotate(b"{}")), count);
    }
    let refused = rotate(b"{}");
    assert_eq!(refused.status, 400);
    assert!(
        refused.text().contains("end a rotation first"),
        "{refused:?}"
    );
    let sample = Sample::new(1, 100);
    assert_eq!(rig.upload(&push, "main", &sample).status, 200);
    let narinfo = rig.get(&format!("/main/{}.narinfo", sample.hash()));
    assert_eq!(narinfo.text().matches("Sig: main-").count(), 4);
    assert_eq!(keys(&rotate(br#"{"retire": true}"#)), 1);
    assert_eq!(keys(&rotate(b"{}")), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_cannot_be_read_keep_no_other_rotation_from_being_finished() {
    use std::os::unix::fs::PermissionsExt;
    let mut rig = Rig::new().await;
    for cache in ["a", "b", "c"] {
        rig.cache(cache, true).await;
    }
    rig.stop().await;
    let file = rig.state().join("catalog.sqlite");
    let catalog = || rusqlite::Connection::open(&file).unwrap();
    let mark = "INSERT INTO rotations (cache) SELECT id FROM caches";
    catalog().execute(mark, []).unwrap();
    let keys = rig.state().join("keys/a");
    let mode = |mode| {
        std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(0o644);
    rig.start().await;
    let rotating = || {
        let question = "SELECT name FROM rotations JOIN caches ON caches.id = rotations.cache";
        let catalog = catalog();
        let mut rows = catalog.prepare(question).unwrap();
        let names = rows.query_map([], |row| row.get(0)).unwrap();
        names.collect::<Result<Vec<String>, _>>().unwrap()
    };
    let until = async |expected: &[&str]| {
        let started = std::time::Instant::now();
        while rotating() != expected {
            assert!(started.elapsed() < crate::rig::GENEROUS, "{:?}", rotating());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    until(&["a"]).await;
    rig.stop().await;
    mode(0o600);
    rig.start().await;
    until(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_not_asked_yet_is_answered_as_the_anchor_ends() {
    use std::io::{Read, Write};
    let mut rig = Rig::new().await;
    let address = rig.address();
    let mut silent = std::net::TcpStream::connect(address).unwrap();
    // Others that have asked before, which are closed at once, tell that the end has come. Connections are let in
    // one after the other.
    let mut idle: Vec<_> = (0..8)
        .map(|_| {
            let mut idle = std::net::TcpStream::connect(address).unwrap();
            let request = b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n";
            idle.write_all(request).unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                idle.read_exact(&mut byte).unwrap();
                answer.push(byte[0]);
            }
            idle
        })
        .collect();
    let stopping = tokio::spawn(rig.server.take().unwrap().stop());
    for idle in &mut idle {
        assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    }
    silent
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    silent.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    stopping.await.unwrap();
}
