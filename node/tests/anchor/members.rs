//! Members of the mesh that show a certificate and get a token, and everything that must not get one.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::StreamExt;
use granary::anchor::members::Options;
use granary::authority::Authorities;
use granary::binary_cache::{WebCache, WebCaches};
use granary::credential::{self, Credential};
use granary::upload::exchange::{Exchange, Proof};
use granary::upload::member::{Kept, Membership, Pauses, keep};
use granary_protocol::assertion::{Assertion, SignedAssertion};
use granary_protocol::certificate::{Certificate, UnixTime, mesh_tag};
use granary_protocol::mesh::CacheRole;
use granary_protocol::peer::PeerKey;
use granary_protocol::revocation::Revocations;
use granary_protocol::signature::{KeyName, SecretKey};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::rig::{Answer, GENEROUS, Rig, Sample, bearer};

fn mesh(seed: u8) -> SecretKey {
    SecretKey::from_seed(KeyName::new("home-1").unwrap(), [seed; 32])
}

/// An anchor of a mesh, and the key of its private cache `main`.
async fn rig() -> (Rig, String) {
    let mut rig = Rig::new().await;
    rig.members = Some(options(&rig, 1));
    admit(&rig, 1);
    restart(&mut rig).await;
    let key = rig.cache("main", false).await;
    (rig, key)
}

fn options(rig: &Rig, mesh_seed: u8) -> Options {
    Options {
        mesh: mesh(mesh_seed).public_key(),
        revocations: rig.folder.path().join("revocations"),
        certificate: own_certificate(rig),
    }
}

fn own_certificate(rig: &Rig) -> PathBuf {
    rig.folder.path().join("certificate")
}

/// Makes the anchor's machine a member.
fn admit(rig: &Rig, mesh_seed: u8) {
    let certificate = certificate(rig, &PeerKey::from_seed([200; 32]), "nas", "share");
    let signed = certificate.sign(&mesh(mesh_seed)).unwrap();
    fs::write(own_certificate(rig), signed.to_text()).unwrap();
}

async fn restart(rig: &mut Rig) {
    rig.stop().await;
    rig.start().await;
}

fn certificate(rig: &Rig, key: &PeerKey, name: &str, permissions: &str) -> Certificate {
    let now = rig.clock.now();
    Certificate {
        peer: key.peer_id(),
        name: name.to_owned(),
        permissions: permissions.parse().unwrap(),
        not_before: UnixTime(now - 10),
        not_after: UnixTime(now + 30 * 86_400),
        serial: 5,
    }
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
        let certificate = certificate(rig, &key, &format!("machine-{number}"), permissions);
        let assertion = Assertion {
            certificate: certificate.sign(&mesh(1)).unwrap(),
            cache: "main".to_owned(),
            cache_keys: vec![cache_key.parse().unwrap()],
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
    // As during a rotation, or beside an upstream's.
    let stale = mesh(9).public_key();
    member.assertion.cache_keys.insert(0, stale);
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
    assert_eq!(listed[0].subject, "member:machine-2");
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
    let (mut rig, key) = rig().await;
    let other_key = rig.cache("other", false).await;
    let good = || Member::new(&rig, 2, "share,push:main", &key);

    let permissions = Member::new(&rig, 2, "share,vouch,push:other", &key);
    expect(&show(&rig, &permissions.says()), 403, "MissingPermission");
    let mut member = good();
    member.assertion.cache = "nowhere".to_owned();
    expect(&show(&rig, &member.says()), 403, "MissingPermission");
    // The key is another cache's, or another anchor's.
    let mut member = good();
    member.assertion.cache_keys = vec![other_key.parse().unwrap()];
    expect(&show(&rig, &member.says()), 403, "no cache main with a key");
    let mut member = good();
    member.key = PeerKey::from_seed([7; 32]);
    expect(&show(&rig, &member.says()), 403, "signature");
    let mut member = good();
    member.assertion.certificate = member.certificate.sign(&mesh(8)).unwrap();
    expect(&show(&rig, &member.says()), 403, "does not verify");
    // The clock of the test goes on.
    for apart in [-301_i64, 310] {
        let mut member = good();
        let issued = rig.clock.now().checked_add_signed(apart).unwrap();
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
    let put = rig.ask("PUT", "/api/v1/member/token", &[], b"");
    assert_eq!(put.status, 405);
    let get = rig.ask("GET", "/api/v1/member/token", &[], b"");
    assert_eq!(get.json()["mesh"], mesh_tag(&mesh(1).public_key()));
    let anchor = &rig.server.as_ref().unwrap().anchor;
    assert!(anchor.tokens.list().await.unwrap().is_empty());

    // What is refused for its cache's sake does not use up what a machine may ask.
    let mut member = good();
    member.assertion.cache_keys = vec![other_key.parse().unwrap()];
    for nonce in 0..40 {
        member.assertion.nonce = [nonce; 16];
        expect(&show(&rig, &member.says()), 403, "OtherCache");
    }

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
    restart(&mut rig).await;
    expect(&show(&rig, &says), 403, "shown before");
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

    // In another mesh, or in none, the members of this one are nobody.
    fs::remove_file(&file).unwrap();
    admit(&rig, 8);
    for members in [Some(options(&rig, 8)), None] {
        rig.members = members;
        restart(&mut rig).await;
        expect(&info(&rig, &others, "main"), 401, "TokenRevoked");
    }
    expect(&show(&rig, &bystander.says()), 404, "no member of a mesh");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_that_is_no_member_now_gives_no_tokens() {
    let (rig, key) = rig().await;
    let mut member = Member::new(&rig, 2, "share,push:main", &key);
    let mut nonce = 0;
    let mut status = || {
        nonce += 1;
        member.assertion.nonce = [nonce; 16];
        show(&rig, &member.says()).status
    };
    fs::remove_file(own_certificate(&rig)).unwrap();
    assert_eq!(status(), 503);
    admit(&rig, 8);
    assert_eq!(status(), 503);
    let mut expired = certificate(&rig, &PeerKey::from_seed([200; 32]), "nas", "share");
    expired.not_after = UnixTime(rig.clock.now() - 1);
    let expired = expired.sign(&mesh(1)).unwrap();
    fs::write(own_certificate(&rig), expired.to_text()).unwrap();
    assert_eq!(status(), 503);
    admit(&rig, 1);
    assert_eq!(status(), 200);
}

/// A node that keeps a token by its certificate, in a folder.
struct Keeper {
    folder: PathBuf,
    credential: Credential,
    task: JoinHandle<()>,
}

impl Keeper {
    fn new(rig: &Rig, member: &Member, mesh_seed: u8) -> Keeper {
        let folder = rig.folder.path().join("node");
        fs::create_dir_all(&folder).unwrap();
        let membership = Membership {
            key: member.key.clone(),
            mesh: mesh(mesh_seed).public_key(),
            certificate_file: folder.join("certificate"),
            cache: "main".to_owned(),
            cache_keys: member.assertion.cache_keys.clone(),
        };
        let proof = Proof::Member(Box::new(membership));
        let exchange = Exchange::new(&rig.url("main"), None, proof, &Authorities::default());
        let (credential, source) = credential::renewed();
        let kept = Kept::new(folder.join("token"), source);
        let soon = Duration::from_millis(20);
        let pauses = Pauses {
            least: soon,
            to_refusal: soon,
            to_certificate: soon,
        };
        let task = tokio::spawn(keep(exchange.unwrap(), kept, pauses));
        Keeper {
            folder,
            credential,
            task,
        }
    }

    fn file(&self) -> Option<String> {
        fs::read_to_string(self.folder.join("token")).ok()
    }

    async fn wait(&self, is_so: impl Fn(&Keeper) -> bool) {
        let started = Instant::now();
        while !is_so(self) {
            let problem = self.credential.problem();
            assert!(started.elapsed() < GENEROUS, "{problem:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn wait_for_problem(&self, words: &str) {
        self.wait(|keeper| {
            let problem = keeper.credential.problem();
            problem.is_some_and(|problem| problem.contains(words))
        })
        .await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_keeps_its_token_good_and_shows_none_that_is_refused() {
    let (rig, key) = rig().await;
    let member = Member::new(&rig, 2, "share,push:main", &key);
    let keeper = Keeper::new(&rig, &member, 1);
    keeper.wait_for_problem("no certificate yet").await;
    let admit = |permissions: &str| {
        let certificate = certificate(&rig, &member.key, "desk", permissions);
        let text = certificate.sign(&mesh(1)).unwrap().to_text();
        fs::write(keeper.folder.join("certificate"), text).unwrap();
    };
    admit("share");
    keeper.wait_for_problem("not push:main").await;
    assert!(keeper.file().is_none());
    admit("share,push:main");
    keeper.wait(|keeper| keeper.file().is_some()).await;
    let first = keeper.credential.header().unwrap();
    let token = keeper.file().unwrap().trim().to_owned();
    assert_eq!(first, bearer(&token));
    assert_eq!(info(&rig, &token, "main").status, 200);

    // One that is refused is replaced.
    let anchor = &rig.server.as_ref().unwrap().anchor;
    let id = anchor.tokens.list().await.unwrap()[0].id.clone();
    anchor
        .tokens
        .revoke(&id, UnixTime(rig.clock.now()))
        .await
        .unwrap();
    let caches = WebCache {
        role: CacheRole::Anchor,
        url: rig.url("main").parse().unwrap(),
        credential: keeper.credential.clone(),
        authorities: Authorities::default(),
    };
    let caches = WebCaches::new(vec![caches], None).unwrap();
    let sample = Sample::new(1, 1000);
    let hashes = vec![sample.hash().parse().unwrap()];
    let _: Vec<_> = caches.narinfos(0, hashes).collect().await;
    keeper
        .wait(|keeper| {
            keeper
                .credential
                .header()
                .is_some_and(|header| header != first)
        })
        .await;

    // What a process before had is shown before the anchor has answered; where there is no other, it is taken back.
    keeper
        .wait(|keeper| keeper.file() != Some(format!("{token}\n")))
        .await;
    let second = keeper.credential.header().unwrap();
    drop(keeper);
    let keeper = Keeper::new(&rig, &member, 1);
    assert_eq!(keeper.credential.header().unwrap(), second);
    fs::remove_file(keeper.folder.join("certificate")).unwrap();
    keeper.credential.refuse(&second);
    keeper
        .wait(|keeper| keeper.credential.header().is_none())
        .await;
    keeper.wait(|keeper| keeper.file().is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_no_anchor_of_another_mesh_who_it_is() {
    let (mut rig, key) = rig().await;
    let member = Member::new(&rig, 2, "share,push:main", &key);
    let write = || {
        let folder = rig.folder.path().join("node");
        fs::create_dir_all(&folder).unwrap();
        let text = member.certificate.sign(&mesh(1)).unwrap().to_text();
        fs::write(folder.join("certificate"), text).unwrap();
    };
    write();
    let keeper = Keeper::new(&rig, &member, 8);
    keeper.wait_for_problem("of another mesh").await;
    drop(keeper);
    rig.members = None;
    restart(&mut rig).await;
    let keeper = Keeper::new(&rig, &member, 1);
    keeper.wait_for_problem("gives members no tokens").await;
}
