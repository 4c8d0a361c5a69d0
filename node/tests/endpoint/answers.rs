//! What is answered, whether the path is here or with a peer.

use std::io::{Read, Write};
use std::net::Shutdown;

use crate::machine::{Machine, SMALL_BYTES, Sample, until};

/// A provider and one who fetches from it; both run and know of each other's paths.
async fn pair(names: &[(&str, usize)]) -> (Machine, Machine, Vec<Sample>) {
    let mut provider = Machine::new();
    let paths: Vec<_> = names
        .iter()
        .map(|(name, bytes)| provider.add(name, *bytes))
        .collect();
    let mut asker = Machine::new();
    asker.peers.push(provider.address);
    provider.start().await;
    asker.start().await;
    for path in &paths {
        asker.wait_for(path);
    }
    (provider, asker, paths)
}

fn check_ranges(machine: &Machine, path: &Sample) {
    let url = format!("/{}", machine.get(&path.narinfo()).line("URL").unwrap());
    let size = path.nar.len();
    let whole = machine.get(&url);
    whole.assert_below_nar();
    assert_eq!((whole.status, whole.body == path.nar), (200, true));
    assert_eq!(whole.header("content-length").unwrap(), size.to_string());
    assert_eq!(whole.header("content-range"), None);
    let head = machine.ask("HEAD", &url, "");
    assert_eq!(head.timeless(), whole.timeless());
    assert!(head.body.is_empty());

    for (range, first, end) in [
        ("0-".to_owned(), 0, size),
        ("1-".to_owned(), 1, size),
        (format!("{}-", size / 2), size / 2, size),
        (format!("{}-", size - 1), size - 1, size),
        ("10-19".to_owned(), 10, 20),
        (format!("{}-{}", size / 2, size * 2), size / 2, size),
        ("-1".to_owned(), size - 1, size),
        ("-1000".to_owned(), size - 1000, size),
        (format!("-{}", size * 2), 0, size),
    ] {
        let headers = format!("Range: bytes={range}\r\nAccept-Encoding: gzip, br, zstd\r\n");
        let part = machine.ask("GET", &url, &headers);
        part.assert_below_nar();
        assert_eq!(part.status, 206, "{range}");
        assert_eq!(
            part.header("content-range").unwrap(),
            format!("bytes {first}-{}/{size}", end - 1)
        );
        assert_eq!(
            part.header("content-length").unwrap(),
            (end - first).to_string()
        );
        assert!(
            part.is_complete && part.body == path.nar[first..end],
            "{range}"
        );
        let head = machine.ask("HEAD", &url, &headers);
        assert_eq!(head.timeless(), part.timeless(), "{range}");
    }
    for range in [format!("{size}-"), format!("{}-", size * 2)] {
        let beyond = machine.ask("GET", &url, &format!("Range: bytes={range}\r\n"));
        beyond.assert_below_nar();
        assert_eq!(beyond.status, 416);
        assert_eq!(
            beyond.header("content-range").unwrap(),
            format!("bytes */{size}")
        );
        assert!(beyond.body.is_empty());
    }
    for range in ["0-1,5-6", "x", "5-1"] {
        let ignored = machine.ask("GET", &url, &format!("Range: bytes={range}\r\n"));
        assert_eq!(ignored.status, 200, "{range}");
    }
}

fn check_urls(machine: &Machine, path: &Sample) {
    let narinfo = machine.get(&path.narinfo());
    let url = narinfo.line("URL").unwrap();
    let nar_hash = narinfo
        .line("NarHash")
        .unwrap()
        .strip_prefix("sha256:")
        .unwrap();
    let hash = &path.hash;
    assert_eq!(url, format!("nar/{hash}-{nar_hash}.nar"));
    for url in [
        format!("/nar/{hash}-{nar_hash}.nar"),
        format!("/nar/{nar_hash}.nar?hash={hash}"),
        format!("/nar/{hash}.nar"),
    ] {
        let answer = machine.get(&url);
        assert!(answer.status == 200 && answer.body == path.nar, "{url}");
    }
    let other = nar_hash.replace(&nar_hash[5..8], "000");
    for url in [
        format!("/nar/{hash}-{other}.nar"),
        format!("/nar/{other}.nar?hash={hash}"),
    ] {
        for method in ["GET", "HEAD"] {
            let answer = machine.ask(method, &url, "");
            answer.assert_below_nar();
            assert_eq!(answer.status, 404, "{url}");
        }
    }
}

fn check_narinfo(machine: &Machine, path: &Sample) {
    let answer = machine.get(&path.narinfo());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-encoding"), None);
    assert_eq!(answer.header("content-type"), Some("text/x-nix-narinfo"));
    assert_eq!(
        answer.header("content-length").unwrap(),
        answer.body.len().to_string()
    );
    let text = str::from_utf8(&answer.body).unwrap();
    assert!(
        text.ends_with('\n') && !text.contains("\n\n") && !text.contains('\r'),
        "{text}"
    );
    let keys: Vec<_> = text
        .lines()
        .map(|line| line.split_once(": ").unwrap().0)
        .collect();
    let expected = [
        "StorePath",
        "URL",
        "Compression",
        "NarHash",
        "NarSize",
        "References",
        "Sig",
        "CA",
    ];
    let mut sorted = keys.clone();
    sorted.retain(|key| !["FileHash", "FileSize"].contains(key));
    assert_eq!(sorted, expected, "{text}");
    assert_eq!(answer.line("StorePath").unwrap(), path.path);
    assert_eq!(answer.line("Compression"), Some("none"));
    assert_eq!(answer.line("NarSize").unwrap(), path.nar.len().to_string());
    assert!(text.contains("\nReferences: \n"), "{text}");
    let head = machine.ask("HEAD", &path.narinfo(), "");
    assert_eq!(head.timeless(), answer.timeless());
    assert!(head.body.is_empty());
}

fn check_real_nix(machine: &Machine, path: &Sample) {
    let client = Machine::new();
    let url = machine.url();
    let info = client.try_nix("nix", &["path-info", "--store", &url, "--json", &path.path]);
    assert!(
        info.status.success(),
        "{}",
        String::from_utf8_lossy(&info.stderr)
    );
    assert!(String::from_utf8_lossy(&info.stdout).contains("test-1:"));
    let to = client.folder().to_str().unwrap();
    let copied = client.try_nix("nix", &["copy", "--from", &url, "--to", to, &path.path]);
    assert!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    client.nix(
        "nix",
        &["store", "verify", "--sigs-needed", "1", &path.path],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_paths_are_answered_by_the_book() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    let large = machine.add("large", 1_000_000);
    machine.start().await;
    machine.wait_for(&path);
    check_narinfo(&machine, &path);
    check_ranges(&machine, &path);
    check_ranges(&machine, &large);
    check_urls(&machine, &path);
    check_real_nix(&machine, &large);

    // A row that vanished is 404 on the next request.
    machine.nix("nix-store", &["--delete", &path.path]);
    assert_eq!(machine.get(&path.narinfo()).status, 404);
    let gone = machine.get(&path.short());
    assert_eq!(gone.status, 404);
    gone.assert_below_nar();
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peers_paths_are_answered_as_local_ones_are() {
    let (mut provider, mut asker, paths) =
        pair(&[("small", SMALL_BYTES), ("large", 1_000_000)]).await;
    for path in &paths {
        check_narinfo(&asker, path);
        check_ranges(&asker, path);
        check_urls(&asker, path);
        check_real_nix(&asker, path);
        let (near, far) = (asker.get(&path.narinfo()), provider.get(&path.narinfo()));
        assert_eq!(near.timeless(), far.timeless());
        assert_eq!(near.body, far.body);
        let why = asker.get(&format!("/api/v1/why/{}", path.hash));
        assert!(
            String::from_utf8_lossy(&why.body).contains(&format!("machine-{}", provider.address))
        );
    }
    let report = asker.status();
    assert_eq!((report.nars_mismatched, report.store_errors), (0, 0));
    assert!(report.peers[0].quarantine.is_none());
    // Gone from everywhere: 404 before the first byte.
    provider.stop().await;
    until("departure", || asker.get(&paths[0].narinfo()).status == 404);
    let gone = asker.get(&paths[0].short());
    gone.assert_below_nar();
    assert_eq!(gone.status, 404);
    asker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_requests_get_quick_and_harmless_answers() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);

    for method in ["PUT", "POST", "DELETE", "OPTIONS", "PATCH"] {
        for target in ["/nix-cache-info", &path.narinfo(), &path.short(), "/nar/x"] {
            let answer = machine.ask(method, target, "Content-Length: 0\r\n");
            assert_eq!(answer.status, 405, "{method} {target}");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"));
            if target.starts_with("/nar/") {
                answer.assert_below_nar();
            }
        }
    }
    let absent = "/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo";
    let long = format!("/{}", "a".repeat(8000));
    for target in [
        absent,
        "/favicon.ico",
        "/..",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/%00",
        "/x.narinfo",
        "/nar/../nix-cache-info",
        "/nar/",
        "/nar/x",
        "/nar/%2e%2e",
        "/nar/..%2f..%2fetc%2fpasswd",
        &long,
        &format!("/nar{long}"),
        "/log/x.drv",
        "/realisations/sha256:0!out.doi",
        "/api/v1/why/",
        "/api/v1/why/x",
    ] {
        let answer = machine.get(target);
        assert_eq!((answer.status, answer.body.len()), (404, 0), "{target}");
        assert_eq!(
            machine.ask("HEAD", target, "").timeless(),
            answer.timeless(),
            "{target}"
        );
        if target.starts_with("/nar/") {
            answer.assert_below_nar();
        }
    }
    // Only names of this machine: a web page's name may resolve to loopback.
    for (host, status) in [
        ("evil.example", 403),
        ("localhost:80", 200),
        ("[::1]", 200),
        ("", 403),
    ] {
        let answer = machine.ask("GET", &path.narinfo(), &format!("Host: {host}\r\n"));
        assert_eq!(answer.status, status, "{host}");
        let answer = machine.ask("GET", &path.short(), &format!("Host: {host}\r\n"));
        assert_eq!(answer.status, status, "{host}");
        answer.assert_below_nar();
    }

    // What is no HTTP ends the connection, and only that.
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        &[b'x'; 40_000],
        format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(40_000)).as_bytes(),
    ] {
        let mut client = machine.connect();
        // The other end may close while we still write.
        let _ = client.stream.write_all(garbage);
        let _ = client.stream.shutdown(Shutdown::Write);
        while client.read() {}
        let said = String::from_utf8_lossy(&client.rest).into_owned();
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    }
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_kept_closed_and_pipelined_as_clients_wish() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);

    // Small answers come in one segment each, on a connection that stays.
    let mut client = machine.connect();
    for _ in 0..50 {
        for target in ["/nix-cache-info", &path.narinfo(), "/x.narinfo"] {
            client.request("GET", target, "");
            assert!(client.read());
            let answer = client.answer(false);
            let length = answer.header("content-length").unwrap();
            assert_eq!(length, answer.body.len().to_string());
            assert!(client.rest.is_empty());
        }
    }
    // The segments: after one read, nothing was missing.
    client.request("GET", &path.narinfo(), "");
    let mut segment = vec![0; 64 * 1024];
    let length = client.stream.read(&mut segment).unwrap();
    client.rest = segment[..length].to_vec();
    client.stream.set_nonblocking(true).unwrap();
    assert!(client.answer(false).is_complete);
    client.stream.set_nonblocking(false).unwrap();

    // Pipelined: answers in order, bodies and all.
    let mut both = String::new();
    for target in [
        path.short(),
        path.narinfo(),
        path.short(),
        "/nix-cache-info".into(),
    ] {
        both += &format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    client.send(both.as_bytes());
    assert!(client.answer(false).body == path.nar);
    assert_eq!(client.answer(false).line("StorePath").unwrap(), path.path);
    assert!(client.answer(false).body == path.nar);
    let info = client.answer(false);
    assert_eq!(
        str::from_utf8(&info.body).unwrap(),
        "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 10\n"
    );

    // A HEAD is followed by no body.
    client.request("HEAD", &path.short(), "");
    client.request("GET", &path.narinfo(), "");
    client.answer(true);
    assert_eq!(client.answer(false).line("StorePath").unwrap(), path.path);

    client.request("GET", &path.short(), "Connection: close\r\n");
    assert!(client.answer(false).body == path.nar);
    assert!(client.is_closed());

    // HTTP/1.0, with and without a Host.
    for host in ["", "Host: localhost\r\n"] {
        let mut client = machine.connect();
        client.send(format!("GET {} HTTP/1.0\r\n{host}\r\n", path.short()).as_bytes());
        let answer = client.answer(false);
        assert!(answer.status == 200 && answer.body == path.nar);
        assert!(client.is_closed());
    }

    // A client that goes away in the middle harms nobody.
    let mut client = machine.connect();
    client.request("GET", &path.short(), "");
    drop(client);
    assert_eq!(machine.get(&path.narinfo()).status, 200);
    machine.stop().await;
}
