//! Members of the mesh that show a certificate and get a token, and everything that must not get one.

use std::fs;

use granary::anchor::members::Options;
use granary_protocol::assertion::{Assertion, SignedAssertion};
use granary_protocol::certificate::{Certificate, UnixTime};
use granary_protocol::peer::PeerKey;
use granary_protocol::revocation::Revocations;
use granary_protocol::signature::{KeyName, SecretKey};
use serde_json::json;

use crate::rig::{Answer, Rig, Sample, bearer};

fn mesh(seed: u8) -> SecretKey {
    SecretKey::from_seed(KeyName::new("home-1").unwrap(), [seed; 32])
}

/// An anchor of a mesh, and the key of its private cache `main`.
async fn rig() -> (Rig, String) {
    let mut rig = Rig::new().await;
    rig.members = Some(Options {
        mesh: mesh(1).public_key(),
        revocations: rig.folder.path().join("revocations"),
    });
    rig.stop().await;
    rig.start().await;
    let key = rig.cache("main", false).await;
    (rig, key)
}

/// A machine, and what it would say.
struct Member {
    key: PeerKey,
    certificate: Certificate,
    assertion: Assertion,
}

impl Member {
    fn new(rig: &Rig, number: u8, permissions: &str, cache_key: &str) -> Member {
        let now = rig.clock.now();
        let key = PeerKey::from_seed([number; 32]);
        let certificate = Certificate {
            peer: key.peer_id(),
            name: format!("machine-{number}"),
            permissions: permissions.parse().unwrap(),
            not_before: UnixTime(now - 10),
            not_after: UnixTime(now + 30 * 86_400),
            serial: 5,
        };
        let assertion = Assertion {
            certificate: certificate.sign(&mesh(1)).unwrap(),
            cache: "main".to_owned(),
            cache_key: cache_key.parse().unwrap(),
            issued: UnixTime(now),
            nonce: [number; 16],
        };
        Member {
            key,
            certificate,
            assertion,
        }
    }

    fn says(&self) -> SignedAssertion {
        self.assertion.clone().sign(&self.key).unwrap()
    }
}

fn show(rig: &Rig, assertion: &SignedAssertion) -> Answer {
    show_text(rig, &assertion.to_text())
}

fn show_text(rig: &Rig, assertion: &str) -> Answer {
    let body = json!({ "assertion": assertion }).to_string();
    rig.ask("POST", "/api/v1/member/token", &[], body.as_bytes())
}

fn info(rig: &Rig, token: &str, cache: &str) -> Answer {
    let authorization = bearer(token);
    let headers = [("Authorization", authorization.as_str())];
    rig.ask("GET", &format!("/{cache}/nix-cache-info"), &headers, b"")
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
async fn a_member_gets_a_token_for_the_cache_that_it_named_and_no_other() {
    let (rig, key) = rig().await;
    rig.cache("other", false).await;
    let mut member = Member::new(&rig, 2, "share,push:*", &key);
    let answer = show(&rig, &member.says());
    expect(&answer, 200, "expires");
    assert_eq!(answer.json()["expires_in"], 3600);
    let token = answer.json()["token"].as_str().unwrap().to_owned();
    let sample = Sample::new(1, 1000);
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
    assert_eq!(info(&rig, &token, "main").status, 200);
    expect(&info(&rig, &token, "other"), 403, "MissingPermission");
    let authorization = bearer(&token);
    let headers = [("Authorization", authorization.as_str())];
    let path = format!("/api/v1/caches/main/paths/{}", sample.hash());
    let deleted = rig.ask("DELETE", &path, &headers, b"");
    expect(&deleted, 403, "MissingPermission");

    let anchor = &rig.server.as_ref().unwrap().anchor;
    let listed = anchor.tokens.list().await.unwrap();
    assert_eq!(listed[0].subject, "machine-2");
    let peer = member.key.peer_id().to_string();
    assert!(listed[0].id.contains(&peer), "{}", listed[0].id);

    // A certificate that ends within the hour ends its token.
    member.certificate.not_after = UnixTime(rig.clock.now() + 60);
    member.assertion.certificate = member.certificate.sign(&mesh(1)).unwrap();
    member.assertion.nonce = [9; 16];
    let answer = show(&rig, &member.says());
    let life = answer.json()["expires_in"].as_u64().unwrap();
    assert!((1..=60).contains(&life), "{life}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_proves_too_little_gets_no_token() {
    let (rig, key) = rig().await;
    let other_key = rig.cache("other", false).await;
    let good = || Member::new(&rig, 2, "share,push:main", &key);

    let permissions = Member::new(&rig, 2, "share,vouch,push:other", &key);
    expect(&show(&rig, &permissions.says()), 403, "MissingPermission");
    let mut member = good();
    member.assertion.cache = "nowhere".to_owned();
    expect(&show(&rig, &member.says()), 403, "MissingPermission");
    // The key is another cache's, or another anchor's.
    let mut member = good();
    member.assertion.cache_key = other_key.parse().unwrap();
    expect(
        &show(&rig, &member.says()),
        403,
        "no cache main with the key",
    );
    let mut member = good();
    member.key = PeerKey::from_seed([7; 32]);
    expect(&show(&rig, &member.says()), 403, "signature");
    let mut member = good();
    member.assertion.certificate = member.certificate.sign(&mesh(8)).unwrap();
    expect(&show(&rig, &member.says()), 403, "does not verify");
    for apart in [-301_i64, 301] {
        let mut member = good();
        let issued = rig.clock.now().checked_add_signed(apart * 2).unwrap();
        member.assertion.issued = UnixTime(issued);
        expect(&show(&rig, &member.says()), 403, "clocks");
    }
    let mut member = good();
    member.certificate.not_after = UnixTime(rig.clock.now() - 1);
    member.assertion.certificate = member.certificate.sign(&mesh(1)).unwrap();
    expect(&show(&rig, &member.says()), 403, "expired");

    let text = good().says().to_text();
    for wrong in [
        "",
        "granary-assertion-1:",
        "x",
        &text[..text.len() - 4],
        &text.repeat(20),
    ] {
        let status = show_text(&rig, wrong).status;
        assert!(matches!(status, 400 | 413), "{status} for {wrong:?}");
    }
    let get = rig.ask("GET", "/api/v1/member/token", &[], b"");
    assert_eq!(get.status, 405);
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert!(anchor.tokens.list().await.unwrap().is_empty());

    // What was good is good once.
    let says = Member::new(&rig, 3, "share,push:main", &key).says();
    expect(&show(&rig, &says), 200, "token");
    expect(&show(&rig, &says), 403, "shown before");
    // And one machine may not ask without end, which keeps no other out.
    let mut member = good();
    let statuses: Vec<u16> = (100..140)
        .map(|number| {
            member.assertion.nonce = [number; 16];
            show(&rig, &member.says()).status
        })
        .collect();
    assert!(
        statuses.ends_with(&[429]) && statuses.starts_with(&[200]),
        "{statuses:?}"
    );
    let other = Member::new(&rig, 4, "share,push:main", &key);
    expect(&show(&rig, &other.says()), 200, "token");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_put_out_loses_the_token_at_once_and_gets_no_other() {
    let (mut rig, key) = rig().await;
    let mut member = Member::new(&rig, 2, "share,push:main", &key);
    let answer = show(&rig, &member.says());
    let token = answer.json()["token"].as_str().unwrap().to_owned();
    let bystander = Member::new(&rig, 3, "share,push:main", &key);
    let answer = show(&rig, &bystander.says());
    let others = answer.json()["token"].as_str().unwrap().to_owned();
    assert_eq!(info(&rig, &token, "main").status, 200);

    let mut list = Revocations {
        number: 1,
        ..Revocations::default()
    };
    list.revoke(member.key.peer_id(), UnixTime(rig.clock.now()))
        .unwrap();
    let list = list.sign(&mesh(1)).unwrap();
    let file = rig.folder.path().join("revocations");
    fs::write(&file, list.to_text()).unwrap();
    expect(&info(&rig, &token, "main"), 401, "TokenRevoked");
    assert_eq!(info(&rig, &others, "main").status, 200);
    member.assertion.nonce = [8; 16];
    expect(&show(&rig, &member.says()), 403, "revoked");

    // A list that cannot be read does not let anybody back in.
    fs::write(&file, "nonsense").unwrap();
    expect(&info(&rig, &token, "main"), 401, "TokenRevoked");
    fs::write(&file, list.to_text()).unwrap();
    rig.stop().await;
    rig.start().await;
    expect(&info(&rig, &token, "main"), 401, "TokenRevoked");
    assert_eq!(info(&rig, &others, "main").status, 200);

    // Out of the mesh, its members are nobody.
    rig.members = None;
    rig.stop().await;
    rig.start().await;
    expect(&info(&rig, &others, "main"), 401, "TokenRevoked");
    expect(&show(&rig, &bystander.says()), 404, "no member of a mesh");
}
