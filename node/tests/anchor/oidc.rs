//! OIDC: jobs of CI that show an issuer's token and get one of the anchor's, and everything that must not get one.
//!
//! The issuer is made here: its keys, its documents, and its bad manners.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use data_encoding::BASE64URL_NOPAD;
use granary::anchor::oidc::{Options, Rule, TOKEN_SECONDS};
use granary_protocol::token::Grant;
use granary_protocol::token::Permission::{Pull, Push};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::rig::{Answer, GENEROUS, Machine, Rig, Sample, bearer};

const AUDIENCE: &str = "https://anchor.example";

/// An issuer, as its HTTP server has it.
#[derive(Default)]
struct Manners {
    /// Answers by path; anything else is 404.
    documents: Vec<(String, String)>,
    /// Paths with their queries, and the `Authorization` that came along.
    requests: Vec<(String, String)>,
    is_silent: bool,
    status: Option<String>,
}

struct Issuer {
    url: String,
    manners: Arc<Mutex<Manners>>,
}

impl Issuer {
    fn new() -> Issuer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let issuer = Issuer {
            url: format!("http://{}", listener.local_addr().unwrap()),
            manners: Arc::default(),
        };
        let manners = issuer.manners.clone();
        thread::spawn(move || {
            let mut silenced = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let Some(request) = lines.next() else {
                    continue;
                };
                let mut authorization = String::new();
                for line in lines.by_ref().take_while(|line| !line.is_empty()) {
                    if let Some(value) = line.to_lowercase().strip_prefix("authorization: ") {
                        authorization = value.to_owned();
                    }
                }
                let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
                let path = target.split('?').next().unwrap_or_default().to_owned();
                let mut manners = manners.lock().unwrap();
                manners.requests.push((target, authorization));
                if manners.is_silent {
                    silenced.push(stream);
                    continue;
                }
                let found = manners.documents.iter().find(|(known, _)| *known == path);
                let (status, body) = match (&manners.status, found) {
                    (Some(status), _) => (status.as_str(), ""),
                    (None, Some((_, body))) => ("200 OK", body.as_str()),
                    (None, None) => ("404 Not Found", ""),
                };
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                );
            }
        });
        issuer.describe(&issuer.url, &format!("{}/keys", issuer.url));
        issuer
    }

    fn answer(&self, path: &str, body: String) {
        let mut manners = self.manners.lock().unwrap();
        manners.documents.retain(|(known, _)| known != path);
        manners.documents.push((path.to_owned(), body));
    }

    fn describe(&self, issuer: &str, keys: &str) {
        let description = json!({"issuer": issuer, "jwks_uri": keys});
        self.answer("/.well-known/openid-configuration", description.to_string());
    }

    fn publish(&self, keys: &[&Key]) {
        let keys: Vec<_> = keys.iter().map(|key| key.public.clone()).collect();
        self.answer("/keys", json!({ "keys": keys }).to_string());
    }

    /// How often its keys were asked for.
    fn asked(&self) -> usize {
        let manners = self.manners.lock().unwrap();
        manners
            .requests
            .iter()
            .filter(|(path, _)| path == "/keys")
            .count()
    }

    /// What it says of a job.
    fn claims(&self, rig: &Rig) -> Value {
        let now = rig.clock.now();
        json!({
            "iss": self.url, "aud": AUDIENCE, "sub": "repo:me/project:ref:refs/heads/main",
            "repository": "me/project", "ref": "refs/heads/main", "run_number": 7,
            "iat": now, "nbf": now, "exp": now + 300,
        })
    }
}

/// A signing key of an issuer.
struct Key {
    id: String,
    algorithm: Algorithm,
    private: EncodingKey,
    public: Value,
}

impl Key {
    fn new(id: &str, algorithm: Algorithm, private: EncodingKey) -> Key {
        let public = Jwk::from_encoding_key(&private, algorithm).unwrap();
        let mut public = serde_json::to_value(public).unwrap();
        public["kid"] = json!(id);
        public["use"] = json!("sig");
        Key {
            id: id.to_owned(),
            algorithm,
            private,
            public,
        }
    }

    fn rsa(id: &str) -> Key {
        let pem = include_bytes!("attic-rs256.pem");
        Key::new(
            id,
            Algorithm::RS256,
            EncodingKey::from_rsa_pem(pem).unwrap(),
        )
    }

    fn ec(id: &str) -> Key {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes());
        Key::new(id, Algorithm::ES256, key.unwrap())
    }

    fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(self.id.clone());
        jsonwebtoken::encode(&header, claims, &self.private).unwrap()
    }
}

fn with(mut claims: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims
}

fn rule(claims: &[(&str, &str)], pattern: &str) -> Rule {
    let shape =
        |(name, regex): &(&str, &str)| ((*name).to_owned(), regex::Regex::new(regex).unwrap());
    Rule {
        claims: claims.iter().map(shape).collect(),
        grants: vec![Grant {
            pattern: pattern.parse().unwrap(),
            permissions: vec![Pull, Push],
        }],
    }
}

async fn rig(issuer: &Issuer) -> Rig {
    rig_for(issuer, TOKEN_SECONDS).await
}

/// An anchor whose tokens are good for so long.
async fn rig_for(issuer: &Issuer, token_seconds: u64) -> Rig {
    let mut rig = Rig::new().await;
    rig.oidc = vec![Options {
        issuer: issuer.url.clone(),
        audience: AUDIENCE.to_owned(),
        jwks_url: None,
        ca_file: None,
        token_seconds,
        rules: vec![
            rule(
                &[("repository", "^me/project$"), ("ref", "^refs/heads/main$")],
                "main",
            ),
            rule(
                &[
                    ("repository", "^me/project$"),
                    ("run_number", "^7$"),
                    ("ref", "^refs/tags/.*$"),
                ],
                "releases",
            ),
        ],
    }];
    rig.stop().await;
    rig.start().await;
    rig.cache("main", false).await;
    rig
}

fn trade(rig: &Rig, token: &str) -> Answer {
    let body = json!({ "token": token }).to_string();
    rig.ask("POST", "/api/v1/oidc/token", &[], body.as_bytes())
}

#[track_caller]
fn expect(answer: &Answer, status: u16, words: &str) {
    let text = answer.text();
    assert!(
        answer.status == status && text.contains(words),
        "{words:?}: {} {text}",
        answer.status
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_gets_a_token_for_an_hour_and_what_its_rules_say() {
    let issuer = Issuer::new();
    let (rsa, ec) = (Key::rsa("one"), Key::ec("two"));
    issuer.publish(&[&rsa, &ec]);
    let rig = rig(&issuer).await;
    for key in [&rsa, &ec] {
        let answer = trade(&rig, &key.sign(&issuer.claims(&rig)));
        expect(&answer, 200, "expires");
        let token = answer.json()["token"].as_str().unwrap().to_owned();
        let authorized = ("Authorization", &*bearer(&token));
        let info = |cache: &str| {
            rig.ask(
                "GET",
                &format!("/{cache}/nix-cache-info"),
                &[authorized],
                b"",
            )
            .status
        };
        assert_eq!((info("main"), info("releases")), (200, 403));
        assert_eq!(
            rig.upload(&token, "main", &Sample::new(1, 1000)).status,
            200
        );
    }
    // Its audience may be one of several.
    let several = with(issuer.claims(&rig), json!({"aud": ["x", AUDIENCE]}));
    let token = trade(&rig, &rsa.sign(&several)).json()["token"]
        .as_str()
        .unwrap()
        .to_owned();
    // It is listed, and ends like any other.
    let tokens = rig.server.as_ref().unwrap().anchor.tokens.clone();
    let listed = tokens.list().await.unwrap();
    assert_eq!(listed.len(), 3);
    assert!(
        listed[0].subject == "repo:me/project:ref:refs/heads/main"
            && listed[0].id.starts_with("oidc-")
    );
    tokens
        .revoke(&token, granary_protocol::certificate::UnixTime(0))
        .await
        .unwrap();
    let authorized = ("Authorization", &*bearer(&token));
    expect(
        &rig.ask("GET", "/main/nix-cache-info", &[authorized], b""),
        401,
        "revoked",
    );
    let last = trade(&rig, &rsa.sign(&issuer.claims(&rig))).json()["token"]
        .as_str()
        .unwrap()
        .to_owned();
    rig.clock.advance(Duration::from_secs(3600 + 61));
    let authorized = ("Authorization", &*bearer(&last));
    expect(
        &rig.ask("GET", "/main/nix-cache-info", &[authorized], b""),
        401,
        "expired",
    );
    // What is over is not listed for ever.
    rig.clock.advance(Duration::from_secs(2 * 86_400));
    expect(&trade(&rig, &rsa.sign(&issuer.claims(&rig))), 200, "token");
    assert_eq!(tokens.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_exactly_right_gets_no_token() {
    let issuer = Issuer::new();
    let (rsa, ec) = (Key::rsa("one"), Key::ec("two"));
    issuer.publish(&[&rsa, &ec]);
    let rig = rig(&issuer).await;
    let now = granary::clock::unix_time().0;
    let claims = issuer.claims(&rig);
    expect(&trade(&rig, &rsa.sign(&claims)), 200, "token");
    for (changes, status, words) in [
        (
            json!({"iss": "https://evil.example"}),
            403,
            "none that this anchor believes",
        ),
        (
            json!({"iss": format!("{}/", issuer.url)}),
            403,
            "none that this anchor believes",
        ),
        (json!({"iss": null}), 403, "none that this anchor believes"),
        (json!({"aud": "https://other.example"}), 403, "audience"),
        (json!({"aud": null}), 403, "audience"),
        (
            json!({"aud": [["https://anchor.example"]]}),
            403,
            "audience",
        ),
        (json!({"exp": now - 120}), 403, "expired"),
        (json!({"exp": null}), 400, "does not say when it ends"),
        (json!({"exp": "never"}), 400, "no numbers"),
        (json!({"exp": now + 48 * 3600}), 403, "more than a day"),
        (json!({"nbf": now + 120}), 403, "not valid yet"),
        (json!({"iat": now + 120}), 403, "not valid yet"),
        (json!({"repository": "me/project2"}), 403, "no rule"),
        (json!({"repository": "xme/project"}), 403, "no rule"),
        (json!({"repository": null}), 403, "no rule"),
        (json!({"repository": ["me/project"]}), 403, "no rule"),
        (json!({"ref": "refs/pull/1/merge"}), 403, "no rule"),
        (
            json!({"ref": "refs/tags/v1", "run_number": 8}),
            403,
            "no rule",
        ),
    ] {
        let answer = trade(&rig, &rsa.sign(&with(claims.clone(), changes.clone())));
        assert!(
            answer.status == status && answer.text().contains(words),
            "{changes}: {}",
            answer.text()
        );
    }
    // Numbers are facts as well.
    let tag = with(claims.clone(), json!({"ref": "refs/tags/v1"}));
    expect(&trade(&rig, &rsa.sign(&tag)), 200, "token");

    let good = rsa.sign(&claims);
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (head, body) = message.split_once('.').unwrap();
    let encode = |value: Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    // None, and secrets made of what is public.
    let none = encode(json!({"alg": "none", "kid": "one"}));
    expect(
        &trade(&rig, &format!("{none}.{body}.")),
        403,
        "only RS256 and ES256",
    );
    expect(
        &trade(&rig, &format!("{none}.{body}.{signature}")),
        403,
        "only RS256 and ES256",
    );
    for secret in [
        include_bytes!("attic-rs256.pub.pem").to_vec(),
        rsa.public["n"].as_str().unwrap().into(),
    ] {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("one".to_owned());
        let confused = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(&secret));
        expect(
            &trade(&rig, &confused.unwrap()),
            403,
            "only RS256 and ES256",
        );
    }
    // Another key's name, another kind of key, no name, and other words under the signature.
    let mut other = Key::ec("two");
    expect(&trade(&rig, &other.sign(&claims)), 403, "does not verify");
    other.id = "one".to_owned();
    expect(&trade(&rig, &other.sign(&claims)), 403, "does not verify");
    let es = encode(json!({"alg": "ES256", "kid": "one"}));
    expect(
        &trade(&rig, &format!("{es}.{body}.{signature}")),
        403,
        "does not verify",
    );
    let unnamed = encode(json!({"alg": "RS256"}));
    expect(
        &trade(&rig, &format!("{unnamed}.{body}.{signature}")),
        400,
        "names no key",
    );
    let critical = encode(json!({"alg": "RS256", "kid": "one", "crit": ["b64"]}));
    expect(
        &trade(&rig, &format!("{critical}.{body}.{signature}")),
        400,
        "must be understood",
    );
    let forged = encode(with(claims.clone(), json!({"sub": "root"})));
    expect(
        &trade(&rig, &format!("{head}.{forged}.{signature}")),
        403,
        "does not verify",
    );
    other.id = "three".to_owned();
    expect(
        &trade(&rig, &other.sign(&claims)),
        403,
        "none of the issuer's",
    );
    for garbage in [
        "",
        "a.b.c",
        "....",
        "ä",
        &good[1..],
        &format!("{message}.!"),
        &"x".repeat(8193),
    ] {
        assert_eq!(trade(&rig, garbage).status, 400, "{garbage:?}");
    }
    assert_eq!(trade(&rig, &"x".repeat(100_000)).status, 413);
    assert_eq!(
        rig.ask("POST", "/api/v1/oidc/token", &[], b"{}").status,
        400
    );
    assert_eq!(rig.get("/api/v1/oidc/token").status, 405);
    // Nobody had the issuer asked more than once for all that.
    assert_eq!(issuer.asked(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_kept_rotated_and_asked_for_at_a_limited_rate() {
    let issuer = Issuer::new();
    let (old, new) = (Key::ec("old"), Key::ec("new"));
    issuer.publish(&[&old]);
    let rig = rig(&issuer).await;
    let show = |key: &Key| trade(&rig, &key.sign(&issuer.claims(&rig)));
    let pass = |seconds| rig.clock.advance(Duration::from_secs(seconds));
    expect(&show(&old), 200, "token");
    expect(&show(&old), 200, "token");
    assert_eq!(issuer.asked(), 1);
    // An unknown one is asked for, but not at once again.
    issuer.publish(&[&old, &new]);
    expect(&show(&new), 403, "none of the issuer's");
    pass(61);
    expect(&show(&new), 200, "token");
    for stranger in ["a", "b", "c"] {
        expect(&show(&Key::ec(stranger)), 403, "none of the issuer's");
    }
    assert_eq!(issuer.asked(), 2);
    // One that was withdrawn ends within the hour.
    issuer.publish(&[&new]);
    expect(&show(&old), 200, "token");
    pass(3601);
    expect(&show(&old), 403, "none of the issuer's");
    assert_eq!(issuer.asked(), 3);
    // Without the issuer they are used for a day.
    issuer.manners.lock().unwrap().status = Some("500 Internal Server Error".to_owned());
    pass(3601);
    expect(&show(&new), 200, "token");
    pass(83_000);
    expect(&show(&new), 503, "not known at the moment");
    issuer.manners.lock().unwrap().status = None;
    pass(61);
    expect(&show(&new), 200, "token");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_with_bad_manners_harms_nobody() {
    let issuer = Issuer::new();
    let key = Key::ec("one");
    let rig = rig(&issuer).await;
    let show = || {
        rig.clock.advance(Duration::from_secs(61));
        trade(&rig, &key.sign(&issuer.claims(&rig)))
    };
    let public = key.public.clone();
    let padded = json!({"keys": [public], "padding": "x".repeat(300_000)}).to_string();
    let crowded = json!({"keys": vec![public.clone(); 101]}).to_string();
    let mut other_use = public.clone();
    other_use["use"] = json!("enc");
    let mut other_algorithm = public.clone();
    other_algorithm["alg"] = json!("RS256");
    let mut other_curve = public.clone();
    other_curve["crv"] = json!("P-384");
    for document in [
        padded,
        crowded,
        "{".to_owned(),
        "[]".to_owned(),
        "{\"keys\": 1}".to_owned(),
    ] {
        issuer.answer("/keys", document.clone());
        expect(&show(), 503, "not known at the moment");
    }
    for useless in [
        json!({"kty": "oct", "k": "AAAA", "kid": "one"}),
        json!(1),
        other_use,
        other_algorithm,
        other_curve,
    ] {
        issuer.answer("/keys", json!({ "keys": [useless] }).to_string());
        expect(&show(), 403, "none of the issuer's");
    }
    // Beside what is of no use stands what is.
    issuer.answer(
        "/keys",
        json!({ "keys": [1, {"kty": "oct", "kid": "one"}, public] }).to_string(),
    );
    expect(&show(), 200, "token");

    // Another's description, a redirect, and keys over plain HTTP from elsewhere; an hour later, when it counts.
    let fresh = || rig.clock.advance(Duration::from_secs(86_400));
    for (described, keys) in [
        (
            "https://evil.example".to_owned(),
            format!("{}/keys", issuer.url),
        ),
        (issuer.url.clone(), "http://keys.example/keys".to_owned()),
        (issuer.url.clone(), "file:///etc/passwd".to_owned()),
    ] {
        fresh();
        issuer.describe(&described, &keys);
        expect(&show(), 503, "not known at the moment");
    }
    issuer.describe(&issuer.url, &format!("{}/keys", issuer.url));
    issuer.manners.lock().unwrap().status = Some("302 Found\r\nLocation: /keys".to_owned());
    expect(&show(), 503, "not known at the moment");
    issuer.manners.lock().unwrap().status = None;
    expect(&show(), 200, "token");
    // One that says nothing is given up, and holds up nobody whose key is known.
    rig.clock.advance(Duration::from_secs(61));
    let claims = issuer.claims(&rig);
    let (known, stranger) = (key.sign(&claims), Key::ec("stranger").sign(&claims));
    let before = {
        let mut manners = issuer.manners.lock().unwrap();
        manners.is_silent = true;
        manners.requests.len()
    };
    thread::scope(|scope| {
        let asking = scope.spawn(|| trade(&rig, &stranger));
        while issuer.manners.lock().unwrap().requests.len() == before {
            assert!(!asking.is_finished(), "the issuer was not asked");
            thread::yield_now();
        }
        expect(&trade(&rig, &known), 200, "token");
        assert!(!asking.is_finished(), "the issuer was not waited for");
        expect(&asking.join().unwrap(), 403, "none of the issuer's");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_github_pushes_without_a_secret() {
    let issuer = Issuer::new();
    let key = Key::rsa("one");
    issuer.publish(&[&key]);
    let rig = rig(&issuer).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let root = builder.folder().display().to_string();
    let config = builder.folder().join("granary.toml");
    let text = format!(
        "[store]\nreal-dir = \"{root}/nix/store\"\ndatabase = \"{root}/nix/var/nix/db/db.sqlite\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let answer =
        |token: &str| issuer.answer("/proof", json!({"count": 1, "value": token}).to_string());
    let push = |more: &[&str], environment: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        command
            .arg("push")
            .args(more)
            .arg(rig.url("main"))
            .arg(&closure[2]);
        command
            .env_clear()
            .env("GRANARY_CONFIG", &config)
            .env("XDG_STATE_HOME", builder.folder());
        let output = command.envs(environment.iter().copied()).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text.into_owned())
    };
    let url = format!("{}/proof?api-version=2.0", issuer.url);
    let actions = [
        ("ACTIONS_ID_TOKEN_REQUEST_URL", url.as_str()),
        ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "runner-secret"),
    ];
    let visit = || {
        answer(&key.sign(&issuer.claims(&rig)));
        let (status, said) = push(&["--oidc", "--oidc-audience", AUDIENCE], &actions);
        assert!(
            status == Some(0) && said.contains("pushed 3 of 3"),
            "{said}"
        );
        {
            let manners = issuer.manners.lock().unwrap();
            let asked = manners
                .requests
                .iter()
                .find(|(path, _)| path.starts_with("/proof"))
                .unwrap();
            assert_eq!(
                asked.0,
                "/proof?api-version=2.0&audience=https%3A%2F%2Fanchor.example"
            );
            assert_eq!(asked.1, "bearer runner-secret");
        }
        // Other systems put the proof into the environment.
        let proof = key.sign(&issuer.claims(&rig));
        let given = [("GRANARY_OIDC_TOKEN", proof.as_str())];
        let (status, said) = push(&["--oidc"], &given);
        assert!(status == Some(0) && said.contains("3 were there"), "{said}");
        // What does not suffice says why, and no secret with it.
        answer(&key.sign(&with(
            issuer.claims(&rig),
            json!({"ref": "refs/heads/other"}),
        )));
        let (status, said) = push(&["--oidc"], &actions);
        assert!(
            status == Some(1) && said.contains("no rule of this anchor fits"),
            "{said}"
        );
        assert!(
            !said.contains("runner-secret") && !said.contains("eyJ"),
            "{said}"
        );
        let (status, said) = push(&["--oidc"], &[]);
        assert!(
            status == Some(1) && said.contains("id-token: write"),
            "{said}"
        );
        let insecure = [
            ("ACTIONS_ID_TOKEN_REQUEST_URL", "http://runner.example/x"),
            actions[1],
        ];
        let (status, said) = push(&["--oidc"], &insecure);
        assert!(
            status == Some(1) && said.contains("neither https nor on loopback"),
            "{said}"
        );
        // Nothing is asked of anybody without the flag.
        let (status, said) = push(&[], &actions);
        assert!(status == Some(1) && said.contains("no token for"), "{said}");
        let (status, _) = push(&["--oidc", "--token-file", "x"], &actions);
        assert_eq!(status, Some(2));
    };
    tokio::task::block_in_place(visit);
}

/// A line to an anchor on which nothing is heard of it, but for tokens, until it is opened.
#[derive(Default)]
struct Line {
    /// How many answers wait, and whether it is open.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Line {
    fn to(anchor: SocketAddr) -> (SocketAddr, Arc<Line>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let line = Arc::new(Line::default());
        let held = line.clone();
        thread::spawn(move || {
            while let Ok((mut client, _)) = listener.accept() {
                let (line, mut server) = (held.clone(), TcpStream::connect(anchor).unwrap());
                thread::spawn(move || {
                    let mut first = [0; 4096];
                    let length = client.read(&mut first).unwrap();
                    let is_for_token = first.starts_with(b"POST /api/v1/oidc/token");
                    server.write_all(&first[..length]).unwrap();
                    let (mut down, mut up) =
                        (server.try_clone().unwrap(), client.try_clone().unwrap());
                    thread::spawn(move || {
                        if !is_for_token {
                            // The anchor has looked at the token when it answers.
                            down.peek(&mut [0]).unwrap();
                            line.wait();
                        }
                        let _ = std::io::copy(&mut down, &mut up);
                    });
                    let _ = std::io::copy(&mut client, &mut server);
                });
            }
        });
        (address, line)
    }

    fn wait(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        let open = self.changed.wait_while(state, |state| !state.1);
        drop(open.unwrap());
    }

    /// Waits until an answer waits.
    fn is_in_use(&self) {
        let state = self.state.lock().unwrap();
        let used = self
            .changed
            .wait_timeout_while(state, GENEROUS, |state| state.0 == 0);
        assert!(!used.unwrap().1.timed_out(), "nobody asked the anchor");
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_takes_longer_than_a_token_lives_proves_itself_again() {
    let issuer = Issuer::new();
    let key = Key::ec("one");
    issuer.publish(&[&key]);
    let rig = rig_for(&issuer, 3).await;
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let root = builder.folder().display();
    let config = builder.folder().join("granary.toml");
    let text = format!(
        "[store]\nreal-dir = \"{root}/nix/store\"\ndatabase = \"{root}/nix/var/nix/db/db.sqlite\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let proof = key.sign(&issuer.claims(&rig));
    issuer.answer("/proof", json!({"value": proof}).to_string());
    let (anchor, line) = Line::to(rig.address());
    let log = builder.folder().join("log");
    let said = || std::fs::read_to_string(&log).unwrap();
    let wait_for = |words: &str| {
        let deadline = Instant::now() + GENEROUS;
        while !said().contains(words) {
            assert!(Instant::now() < deadline, "no {words:?} in {}", said());
            thread::sleep(Duration::from_millis(20));
        }
    };
    tokio::task::block_in_place(|| {
        let mut push = Command::new(env!("CARGO_BIN_EXE_granary"))
            .args(["push", "--oidc", "--oidc-audience", AUDIENCE])
            .arg(format!("http://{anchor}/main"))
            .arg(&closure[2])
            .env_clear()
            .env("GRANARY_CONFIG", &config)
            .env("XDG_STATE_HOME", builder.folder())
            .env("RUST_LOG", "granary=debug")
            .env(
                "ACTIONS_ID_TOKEN_REQUEST_URL",
                format!("{}/proof", issuer.url),
            )
            .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "runner-secret")
            .stdout(std::process::Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        line.is_in_use();
        // The token that the push began with is over, and the issuer is away when it is to be renewed first.
        rig.clock.advance(Duration::from_secs(120));
        issuer.manners.lock().unwrap().status = Some("500 Internal Server Error".to_owned());
        wait_for("could not renew the token");
        issuer.manners.lock().unwrap().status = None;
        wait_for("renewed the token");
        line.open();
        assert!(push.wait().unwrap().success(), "{}", said());
    });
    let said = said();
    assert!(
        !said.contains("runner-secret") && !said.contains("eyJ"),
        "{said}"
    );
    let hash = &closure[2]["/nix/store/".len()..][..32];
    let token = rig.token(&[("main", &[Pull])]).await;
    let found = rig.ask(
        "GET",
        &format!("/main/{hash}.narinfo"),
        &[("Authorization", &bearer(&token))],
        b"",
    );
    assert_eq!(found.status, 200);
}
