//! Checks on the endpoint that real Nix clients depend on, where no other file has them
//! (`tests/CONFORMANCE.md` names the test of each).

use std::fs::{self, File};
use std::io::Read;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::machine::{Machine, SMALL_BYTES, Sample, until};

/// A closure of 121 paths: 60 pairs below one that uses them all.
const CLOSURE: &str = r#"let
    of = name: script: derivation {
        inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
        args = [ "-e" "-c" "mkdir $out; ${script}" ];
    };
    numbers = builtins.genList (number: toString number) 60;
    leaf = number: of "leaf-${number}" "echo ${number} >$out/number";
    pair = number: of "pair-${number}" "echo ${leaf number} $out >$out/both";
in of "top" "echo ${toString (map pair numbers)} >$out/all""#;
const CLOSURE_PATHS: usize = 121;

/// The longest that a path which nobody has may hold up Nix.
const ABSENT_MAX: Duration = Duration::from_secs(1);

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

fn succeed(output: Output) -> String {
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A machine whose endpoint answers for one signed path.
async fn one_path() -> (Machine, Sample) {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);
    (machine, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cache_info_is_there_from_the_first_connection_on() {
    let mut machine = Machine::new();
    machine.start().await;
    // No waiting: the daemon says that it has started once this is so.
    let started = Instant::now();
    let info = machine.get("/nix-cache-info");
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(info.status, 200);
    assert_eq!(info.line("StoreDir"), Some("/nix/store"));
    assert_eq!(info.line("WantMassQuery"), Some("1"));
    let priority: i32 = info.line("Priority").unwrap().parse().unwrap();
    assert!((0..40).contains(&priority), "before cache.nixos.org");
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_is_an_empty_404_at_once() {
    let (mut machine, _) = one_path().await;
    for number in 0..100 {
        let target = format!("/00bgd045z0d4icpbc2yyz4gx48ak{number:03}a.narinfo");
        let asked = Instant::now();
        let answer = machine.get(&target);
        assert_eq!((answer.status, answer.body.len()), (404, 0), "{target}");
        assert!(asked.elapsed() < ABSENT_MAX, "{target}");
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_answers_come_in_one_segment_and_none_changes_its_encoding_or_tag() {
    let mut machine = Machine::new();
    machine.equip();
    let (derivation, output) = machine.build(
        r#"derivation { name = "a"; system = builtins.currentSystem; builder = "/bin/sh";
           args = [ "-c" "echo hello; echo b >$out" ]; }"#,
    );
    let path = machine.sample(&output);
    machine.start().await;
    machine.wait_for(&path);
    let log = derivation.replace("/nix/store/", "/log/");
    for target in [
        "/nix-cache-info".to_owned(),
        path.narinfo(),
        format!("{}?json", path.narinfo()),
        "/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo".into(),
        path.short(),
        "/nar/00bgd045z0d4icpbc2yyz4gx48ak44la.nar".into(),
        format!("/{}.ls", path.hash),
        "/health".into(),
        "/metrics".into(),
        format!("/realisations/sha256:{}!out.doi", "0".repeat(64)),
        "/favicon.ico".into(),
    ] {
        let mut client = machine.connect();
        client.request("GET", &target, "Accept-Encoding: gzip, br, zstd\r\n");
        let mut segment = vec![0; 64 * 1024];
        let length = client.stream.read(&mut segment).unwrap();
        client.rest = segment[..length].to_vec();
        client.stream.set_nonblocking(true).unwrap();
        // Would have to read again, and cannot, if anything were missing.
        let answer = client.answer(false);
        assert!(answer.is_complete && client.rest.is_empty(), "{target}");
        let length = answer.body.len().to_string();
        assert_eq!(
            answer.header("content-length"),
            Some(&length[..]),
            "{target}"
        );
    }
    for target in [
        path.narinfo(),
        path.short(),
        log,
        format!("/serve/{}", path.hash),
    ] {
        let answer = machine.ask("GET", &target, "Accept-Encoding: gzip, br, zstd\r\n");
        assert_eq!(answer.status, 200, "{target}");
        for header in [
            "content-encoding",
            "transfer-encoding",
            "etag",
            "last-modified",
        ] {
            assert_eq!(answer.header(header), None, "{target}");
        }
        let again = machine.ask("GET", &target, "If-None-Match: *\r\nIf-Range: \"x\"\r\n");
        assert!(again.status == 200 && again.body == answer.body, "{target}");
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_the_real_client_find_what_they_ask_for() {
    let mut machine = Machine::new();
    machine.equip();
    let (derivation, output) = machine.build(CLOSURE);
    let path = machine.sample(&output);
    machine.start().await;
    machine.wait_for(&path);
    let url = machine.url();
    let client = Machine::new();
    let nix = |arguments: &[&str]| {
        succeed(client.try_nix("nix", &[arguments, &["--store", &url]].concat()))
    };
    assert_eq!(
        nix(&["path-info", "-r", &output]).lines().count(),
        CLOSURE_PATHS
    );
    assert_eq!(nix(&["store", "ls", &output]), "./all");
    let all = nix(&["store", "cat", &format!("{output}/all")]);
    assert_eq!(all.split(' ').count(), 60);
    nix(&["store", "verify", "--sigs-needed", "1", "-r", &output]);
    assert_eq!(nix(&["log", &derivation]), "");
    let valid = ["--check-validity", &output, "--store", &url];
    succeed(client.try_nix("nix-store", &valid));
    // What is substitutable, which asks for many narinfos at once.
    let file = client.folder().join("closure.nix");
    fs::write(
        &file,
        format!("{{ top = ({CLOSURE}) // {{ type = \"derivation\"; name = \"top\"; }}; }}"),
    )
    .unwrap();
    let store = client.folder().to_str().unwrap().to_owned();
    let listed = succeed(client.try_nix(
        "nix-env",
        &[
            "-f",
            file.to_str().unwrap(),
            "-qas",
            "--store",
            &store,
            "--option",
            "substituters",
            &url,
        ],
    ));
    assert!(listed.contains("--S"), "{listed}");
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_is_substituted_however_many_connections_and_jobs_there_are() {
    let mut machine = Machine::new();
    machine.equip();
    let (_, output) = machine.build(CLOSURE);
    let path = machine.sample(&output);
    machine.start().await;
    machine.wait_for(&path);
    for (connections, jobs) in [("25", "1"), ("25", "16"), ("0", "16"), ("1", "4")] {
        let client = Machine::new();
        let url = machine.url();
        client.nix(
            "nix-store",
            &[
                "-r",
                &output,
                "--option",
                "substituters",
                &url,
                "--max-jobs",
                jobs,
                "--option",
                "http-connections",
                connections,
            ],
        );
        let got = client.nix("nix-store", &["--query", "--requisites", &output]);
        assert_eq!(got.lines().count(), CLOSURE_PATHS);
        client.nix("nix", &["store", "verify", "--all", "--sigs-needed", "1"]);
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_addressed_paths_need_no_signature_and_others_are_skipped_without_one() {
    let mut machine = Machine::new();
    let file = machine.folder().join("source");
    fs::write(&file, "unsigned").unwrap();
    let source = machine.nix("nix-store", &["--add", file.to_str().unwrap()]);
    machine.equip();
    // Built here, and signed by a key that the client below does not trust.
    let (_, built) = machine.build(
        r#"derivation { name = "a"; system = builtins.currentSystem; builder = "/bin/sh";
           args = [ "-c" "echo b >$out" ]; }"#,
    );
    machine.start().await;
    machine.wait_for(&machine.sample(&built));
    let (client, url) = (Machine::new(), machine.url());
    let untrusting = ["--option", "trusted-public-keys", ""];
    let copy = |paths: &str, from: &str| {
        let to = client.folder().to_str().unwrap().to_owned();
        let arguments = ["copy", "--from", from, "--to", &to, paths];
        client.try_nix("nix", &[&arguments[..], &untrusting].concat())
    };
    succeed(copy(&source, &url));
    let refused = copy(&built, &url);
    assert!(!refused.status.success());
    assert!(said(&refused).contains("lacks a"), "{}", said(&refused));

    // A substituter that is trusted as such needs none; and with another cache behind us, a client that
    // trusts none of our keys goes on to it without a fuss.
    let cache = machine.cache_of(&[&built], "compression=none");
    let behind = format!("file://{}?trusted=1", cache.path().display());
    for substituters in [format!("{url}?trusted=1"), format!("{url} {behind}")] {
        let mut client = Machine::new();
        client.nix_conf = "trusted-public-keys =\n".into();
        let arguments = ["-r", &built, "--option", "substituters", &substituters];
        client.nix("nix-store", &arguments);
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_credentials_and_repeated_questions_change_no_answer() {
    let (mut machine, path) = one_path().await;
    let host = machine.endpoint();
    let client = Machine::new();
    let netrc = client.folder().join("netrc");
    fs::write(&netrc, "machine 127.0.0.1 login a password b\n").unwrap();
    for url in [
        format!("http://{host}?priority=5&want-mass-query=false"),
        format!("http://{host}/?compression=xz&parallel-compression=true"),
        format!("http://user:secret@{host}"),
    ] {
        let arguments = [
            "path-info",
            "--store",
            &url,
            &path.path,
            "--option",
            "netrc-file",
        ];
        let netrc = netrc.to_str().unwrap();
        let found = client.try_nix("nix", &[&arguments[..], &[netrc]].concat());
        assert_eq!(succeed(found), path.path, "{url}");
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_is_gone_since_nix_heard_of_it_is_built_instead() {
    let mut machine = Machine::new();
    machine.equip();
    let expression = r#"derivation { name = "a"; system = builtins.currentSystem; builder = "/bin/sh";
        args = [ "-c" "echo b >$out" ]; }"#;
    let (_, output) = machine.build(expression);
    machine.start().await;
    machine.wait_for(&machine.sample(&output));
    let mut client = Machine::new();
    client.equip();
    client.nix_conf += &format!("substituters = {}\n", machine.url());
    // Nix remembers for 30 days that we have it.
    let url = machine.url();
    succeed(client.try_nix("nix", &["path-info", "--store", &url, &output]));
    machine.nix("nix-store", &["--delete", &output]);
    let (_, built) = client.build(expression);
    assert_eq!(built, output);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_four_gigabytes_are_counted_right_to_the_last_byte() {
    let mut machine = Machine::new();
    let hash = "00bgd045z0d4icpbc2yyz4gx48ak44la";
    let size: u64 = (5 << 30) + 3;
    let file = machine.folder().join(format!("nix/store/{hash}-large"));
    File::create(&file).unwrap().set_len(size).unwrap();
    // Around the contents stand 104 bytes, their padding to a multiple of 8, and 8 for a parenthesis.
    let nar_size = 112 + size.next_multiple_of(8);
    let db = machine.folder().join("nix/var/nix/db/db.sqlite");
    rusqlite::Connection::open(db)
        .unwrap()
        .execute(
            "INSERT INTO ValidPaths (path, hash, registrationTime, narSize) VALUES (?, ?, 1, ?)",
            rusqlite::params![
                format!("/nix/store/{hash}-large"),
                format!("sha256:{}", "0".repeat(64)),
                nar_size as i64
            ],
        )
        .unwrap();
    machine.start().await;
    let narinfo = format!("/{hash}.narinfo");
    until("the store", || machine.get(&narinfo).status == 200);
    let size_text = nar_size.to_string();
    assert_eq!(machine.get(&narinfo).line("NarSize"), Some(&size_text[..]));
    let target = format!("/nar/{hash}.nar");
    let head = machine.ask("HEAD", &target, "");
    assert_eq!(head.header("content-length"), Some(&size_text[..]));
    let from = nar_size - 32;
    let tail = machine.ask("GET", &target, &format!("Range: bytes={from}-\r\n"));
    assert_eq!(tail.status, 206);
    assert_eq!(
        tail.header("content-range").unwrap(),
        format!("bytes {from}-{}/{nar_size}", nar_size - 1)
    );
    // The last zeros, their padding, and a closing parenthesis.
    let closing = [1u8, 0, 0, 0, 0, 0, 0, 0, b')', 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(tail.body, [&[0; 16][..], &closing].concat());
    machine.stop().await;
}
