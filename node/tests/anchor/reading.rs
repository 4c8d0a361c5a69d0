//! The binary-cache protocol, byte for byte, and what nodes ask beyond it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use granary_protocol::token::Permission::{Pull, Push};

use crate::rig::{GENEROUS, Machine, Rig, Sample, bearer, hash};
use crate::s3::{Fault, S3};

/// Two frames and a piece.
const LARGE_BYTES: usize = 9_000_000;

async fn with_sample(rig: &Rig, bytes: usize) -> (Sample, String) {
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let sample = Sample::new(7, bytes);
    let answer = rig.upload(&token, "main", &sample);
    assert_eq!(answer.status, 200, "{answer:?}");
    (sample, token)
}

fn nar_target(rig: &Rig, sample: &Sample) -> String {
    let narinfo = rig.get(&format!("/main/{}.narinfo", sample.hash()));
    let url = narinfo
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("URL: "));
    format!("/main/{}", url.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_have_the_form_that_every_client_reads() {
    let rig = Rig::new().await;
    let (sample, _) = with_sample(&rig, 1000).await;
    let info = rig.get("/main/nix-cache-info");
    assert_eq!(
        info.text(),
        "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 41\n"
    );
    assert_eq!(info.header("content-type"), Some("text/x-nix-cache-info"));

    let target = format!("/main/{}.narinfo", sample.hash());
    let narinfo = rig.get(&target);
    let text = narinfo.text();
    assert!(
        text.starts_with(&format!("StorePath: {}\nURL: nar/", sample.path)),
        "{text}"
    );
    assert!(
        text.contains("\nCompression: zstd\nFileHash: sha256:"),
        "{text}"
    );
    assert!(
        text.contains(&format!(
            "\nNarHash: {}\nNarSize: {}\nReferences: \nSig: main-1:",
            sample.nar_hash(),
            sample.nar.len()
        )),
        "{text}"
    );
    let etag = narinfo.header("etag").unwrap();
    assert!(etag.starts_with('"'), "a weak tag: {etag}");
    let known = rig.ask("GET", &target, &[("If-None-Match", etag)], b"");
    assert_eq!((known.status, known.body.len()), (304, 0));
    let head = rig.ask("HEAD", &target, &[], b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(
        head.header("content-length"),
        narinfo.header("content-length")
    );

    for absent in [
        "/main/00000000000000000000000000000000.narinfo",
        "/main/x.narinfo",
        "/main/.narinfo",
        "/main/nar/x",
        "/main/x",
        "/nothing/nix-cache-info/x",
    ] {
        let answer = rig.get(absent);
        assert!(matches!(answer.status, 404 | 401), "{absent}: {answer:?}");
        assert_eq!(answer.header("content-encoding"), None);
    }
    assert_eq!(
        rig.get("/main/nar/x").header("accept-ranges"),
        Some("bytes")
    );
    assert_eq!(rig.get("/health").status, 200);
    assert_eq!(rig.ask("DELETE", "/main/x", &[], b"").status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nar_is_read_whole_and_in_parts_under_a_constant_tag() {
    let rig = Rig::new().await;
    let (sample, _) = with_sample(&rig, LARGE_BYTES).await;
    let target = nar_target(&rig, &sample);
    let whole = rig.get(&target);
    assert_eq!(whole.status, 200);
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    assert!(zstd::decode_all(&whole.body[..]).unwrap() == sample.nar);
    let size = whole.body.len();
    for (range, from, to) in [
        ("bytes=0-", 0, size),
        ("bytes=5-9", 5, 10),
        ("bytes=-7", size - 7, size),
    ] {
        let part = rig.ask("GET", &target, &[("Range", range)], b"");
        assert_eq!(part.status, 206);
        assert_eq!(
            part.header("content-range"),
            Some(format!("bytes {from}-{}/{size}", to - 1).as_str())
        );
        assert!(part.body == whole.body[from..to], "{range}");
        assert_eq!(part.header("etag"), whole.header("etag"));
    }
    let beyond = rig.ask("GET", &target, &[("Range", &format!("bytes={size}-"))], b"");
    assert_eq!(
        (beyond.status, beyond.header("accept-ranges")),
        (416, Some("bytes"))
    );
    let head = rig.ask("HEAD", &target, &[], b"");
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some(size.to_string().as_str()))
    );
    let known = rig.ask(
        "GET",
        &target,
        &[("If-None-Match", whole.header("etag").unwrap())],
        b"",
    );
    assert_eq!(known.status, 304);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_goes_on_at_any_raw_offset() {
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    let (sample, _) = with_sample(&rig, LARGE_BYTES).await;
    let target = nar_target(&rig, &sample);
    let whole = rig.get(&target).body.len();
    for offset in [0, 1, 4_194_303, 4_194_304, 8_388_609, sample.nar.len() - 1] {
        let answer = rig.get(&format!("{target}?from={offset}"));
        assert_eq!(answer.status, 200, "{answer:?}");
        let skip: usize = answer.header("granary-skip").unwrap().parse().unwrap();
        let raw = zstd::decode_all(&answer.body[..]).unwrap();
        assert!(raw[skip..] == sample.nar[offset..], "{offset}");
        assert!(skip < 4_194_304);
        assert!(
            offset < 4_194_304 || answer.body.len() < whole * 3 / 4,
            "{offset}"
        );
    }
    assert_eq!(
        rig.get(&format!("{target}?from={}", sample.nar.len()))
            .status,
        416
    );
    for bad in ["x", "-1", "", "99999999999999999999999"] {
        assert_eq!(
            rig.get(&format!("{target}?from={bad}")).status,
            400,
            "{bad}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_narinfos_are_asked_for_at_once() {
    let rig = Rig::new().await;
    let (sample, _) = with_sample(&rig, 100).await;
    let absent = "00000000000000000000000000000000";
    let question = serde_json::json!({"hashes": [absent, sample.hash()]}).to_string();
    let answer = rig.ask(
        "POST",
        "/api/v1/caches/main/narinfos",
        &[],
        question.as_bytes(),
    );
    let narinfos = answer.json()["narinfos"].as_object().unwrap().clone();
    assert_eq!(narinfos.len(), 1);
    let alone = rig.get(&format!("/main/{}.narinfo", sample.hash()));
    assert_eq!(narinfos[sample.hash()], alone.text());
    for bad in ["", "[]", "{\"hashes\":[\"x\"]}", "{\"hashes\":7}"] {
        let answer = rig.ask("POST", "/api/v1/caches/main/narinfos", &[], bad.as_bytes());
        assert_eq!(answer.status, 400, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_beside_narinfos_come_back_as_they_were_sent() {
    let rig = Rig::new().await;
    let (sample, token) = with_sample(&rig, 100).await;
    let token = bearer(&token);
    let put = |target: &str, encoding: &str, body: &[u8]| {
        let headers = [
            ("Authorization", token.as_str()),
            ("Content-Encoding", encoding),
        ];
        rig.ask("PUT", target, &headers, body).status
    };
    let listing = format!("/main/{}.ls", sample.hash());
    let realisation = "/main/realisations/sha256:00!out.doi";
    for (target, encoding, body) in [
        ("/main/log/abc-x.drv", "identity", &b"built\n"[..]),
        ("/main/log/abc-y.drv", "br", b"\x01\x02"),
        (&listing, "identity", b"{\"version\":1}"),
        (realisation, "identity", b"{}"),
        ("/main/build-trace-v2/abc.drv/out.doi", "identity", b"{}"),
        ("/main/debuginfo/0123.debug", "identity", b"{}"),
    ] {
        assert_eq!(put(target, encoding, body), 201, "{target}");
        let answer = rig.get(target);
        assert_eq!((answer.status, &answer.body[..]), (200, body), "{target}");
        let expected = Some(encoding).filter(|encoding| *encoding != "identity");
        assert_eq!(answer.header("content-encoding"), expected);
    }
    assert_eq!(
        rig.get("/main/realisations/sha256%3A00%21out.doi").status,
        200
    );
    // A tag that lasts for as long as its bytes do.
    let log = "/main/log/abc-x.drv";
    let tag = rig.get(log).header("etag").unwrap().to_owned();
    let known = || rig.ask("GET", log, &[("If-None-Match", &tag)], b"").status;
    assert_eq!(known(), 304);
    let head = rig.ask("HEAD", log, &[], b"");
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("6"))
    );
    assert_eq!(put(log, "identity", b"again"), 201);
    assert_eq!(known(), 200);
    assert_eq!(rig.get("/main/log/absent").status, 404);
    assert_eq!(put("/main/log/abc-z.drv", "rot13", b"x"), 415);
    assert_eq!(put(&listing, "identity", b"no json"), 400);
    assert_eq!(put("/main/etc/passwd", "identity", b"x"), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_before_a_body_is_told_to_go_on() {
    let rig = Rig::new().await;
    let (_, token) = with_sample(&rig, 100).await;
    let put = |target: &str, token: &str, body: &str| {
        let mut stream = TcpStream::connect(rig.address()).unwrap();
        stream.set_read_timeout(Some(GENEROUS)).unwrap();
        let head = format!(
            "PUT {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n\
             Authorization: {}\r\nContent-Length: {}\r\n\r\n",
            bearer(token),
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        lines.read_line(&mut answer).unwrap();
        if answer.starts_with("HTTP/1.1 100") {
            stream.write_all(body.as_bytes()).unwrap();
        }
        lines.read_to_string(&mut answer).unwrap();
        answer
    };
    let info = "StoreDir: /nix/store\nWantMassQuery: 1\n";
    for (target, body) in [
        ("/main/log/abc-x.drv", "built"),
        ("/main/nix-cache-info", info),
    ] {
        let answer = put(target, &token, body);
        assert!(answer.starts_with("HTTP/1.1 100"), "{target}: {answer}");
        assert!(answer.contains("\r\nHTTP/1.1 20"), "{target}: {answer}");
    }
    // Who may not is told so before a byte of it is sent.
    let refused = put("/main/log/abc-x.drv", "stranger", "built");
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_fails_is_an_error_before_the_first_byte_or_a_short_body_never_a_whole_one() {
    let s3 = S3::start().await;
    let rig = Rig::on_s3(&s3).await;
    let (sample, token) = with_sample(&rig, 3_000_000).await;
    let target = nar_target(&rig, &sample);
    let is_nar = |method: &str, target: &str| method == "GET" && target.contains("/nar/");

    // Asked for patience, it has some.
    s3.fail(Fault::SlowDown, is_nar);
    assert!(zstd::decode_all(&rig.get(&target).body[..]).unwrap() == sample.nar);

    // A body that is cut is taken up again, or cut for our client too.
    s3.fail(Fault::CutBody, is_nar);
    let cut = rig.get(&target);
    let is_right =
        cut.is_complete && zstd::decode_all(&cut.body[..]).is_ok_and(|raw| raw == sample.nar);
    assert!(is_right || !cut.is_complete);

    // Storage that does not come back is said so, and lookups do not notice.
    for _ in 0..20 {
        s3.fail(Fault::InternalError, is_nar);
    }
    let failed = rig.get(&target);
    assert_eq!(failed.status, 503, "{failed:?}");
    assert_eq!(failed.header("accept-ranges"), Some("bytes"));
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", sample.hash())).status,
        200
    );
    while s3.faults_left() > 0 {
        rig.get(&target);
    }

    // A push that storage does not take is not acknowledged, and works when it is repeated.
    let other = Sample::new(8, 1000);
    for _ in 0..6 {
        s3.fail(Fault::InternalError, |method, target| {
            method == "PUT" && target.contains(".narinfo")
        });
    }
    assert_eq!(rig.upload(&token, "main", &other).status, 503);
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", other.hash())).status,
        404
    );
    assert_eq!(s3.faults_left(), 0);
    assert_eq!(rig.upload(&token, "main", &other).status, 200);
    assert_eq!(
        rig.get(&format!("/main/{}.narinfo", other.hash())).status,
        200
    );

    // An object that is gone is absent, not empty.
    let bucket = s3.folder.path().join("granary-test/anchor/nar");
    std::fs::remove_dir_all(bucket).unwrap();
    assert_eq!(rig.get(&target).status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn nars_of_public_caches_come_from_s3_itself_where_that_is_configured() {
    let s3 = S3::start().await;
    let rig = Rig::redirecting_to_s3(&s3).await;
    let key = rig.cache("open", true).await;
    rig.cache("closed", false).await;
    let token = rig.token(&[("*", &[Pull, Push])]).await;
    let builder = Machine::new(&[]);
    builder.login(&token);
    let closure = builder.build();
    let (open, closed) = (rig.url("open"), rig.url("closed"));
    tokio::task::block_in_place(|| {
        for url in [&open, &closed] {
            builder.nix("nix", &["copy", "--to", url, &closure[2]]);
        }
        let client = Machine::new(&[&key]);
        client.nix("nix", &["copy", "--from", &open, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
    });
    let signed = |line: &&String| line.starts_with("GET") && line.contains("X-Amz-Signature=");
    let requests = s3.requests();
    assert_eq!(requests.iter().filter(signed).count(), 3, "{requests:#?}");

    let narinfo = rig.get(&format!("/open/{}.narinfo", hash(&closure[0])));
    let url = narinfo
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("URL: "));
    let url = url.unwrap();
    let answer = rig.get(&format!("/open/{url}"));
    assert_eq!((answer.status, answer.body.len()), (307, 0));
    assert!(
        answer
            .header("location")
            .unwrap()
            .starts_with(&s3.endpoint())
    );
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    // What a link is no good for comes from here: other methods, raw offsets, what not everybody may read.
    assert_eq!(
        rig.ask("HEAD", &format!("/open/{url}"), &[], b"").status,
        200
    );
    assert_eq!(rig.get(&format!("/open/{url}?from=5000000")).status, 200);
    let authorization = bearer(&token);
    let headers = [("Authorization", authorization.as_str())];
    let private = rig.ask("GET", &format!("/closed/{url}"), &headers, b"");
    assert_eq!(private.status, 200);
    assert_eq!(rig.get(&format!("/closed/{url}")).status, 401);
}
