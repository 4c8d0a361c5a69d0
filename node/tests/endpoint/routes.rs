//! What stands beside narinfos and NARs: listings, logs, the build trace, debug information,
//! browsing, health and metrics. Where Nix writes the same, it is the measure.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::exposition::parse;
use crate::machine::{Machine, SMALL_BYTES, Sample, until};

/// A derivation with a folder that has some of everything.
const TREE: &str = r#"derivation {
    name = "tree"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
    args = [ "-e" "-c" ''
        echo building a tree
        mkdir -p $out/bin $out/empty $out/lib/debug/.build-id/ab
        echo text >$out/bin/program; chmod +x $out/bin/program
        ln -s ../bin/program $out/lib/link
        : >$out/empty/file
        echo symbols >$out/lib/debug/.build-id/ab/cdef0123456789abcdef0123456789abcdef01.debug
    '' ];
}"#;

fn json_of(machine: &Machine, target: &str) -> Value {
    let answer = machine.get(target);
    assert_eq!(answer.status, 200, "{target}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("content-encoding"), None);
    serde_json::from_slice(&answer.body).unwrap()
}

fn read_json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// A HEAD is answered like a GET, without the body.
fn assert_head(machine: &Machine, target: &str) {
    let (head, get) = (machine.ask("HEAD", target, ""), machine.get(target));
    assert_eq!(head.timeless(), get.timeless(), "{target}");
    assert!(head.body.is_empty());
    let length = get.header("content-length").unwrap();
    assert_eq!(length, get.body.len().to_string(), "{target}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_narinfo_is_given_as_json_too() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);
    let target = format!("{}?json", path.narinfo());
    let narinfo = machine.get(&path.narinfo());
    let value = json_of(&machine, &target);
    assert_head(&machine, &target);
    // What Nix says of the same path in its own JSON, where the formats agree.
    let cache = machine.cache_of(&[&path.path], "compression=none");
    let url = format!("file://{}", cache.path().display());
    let nix = machine.try_nix("nix", &["path-info", "--store", &url, "--json", &path.path]);
    let nix: Value = serde_json::from_slice(&nix.stdout).unwrap();
    let nix = &nix[0];
    assert_eq!(value["narHash"], nix["narHash"]);
    assert_eq!(value["narSize"], nix["narSize"]);
    assert_eq!(value["downloadHash"], value["narHash"]);
    assert_eq!(value["downloadSize"], value["narSize"]);
    let signature = narinfo.line("Sig").unwrap();
    assert_eq!(nix["signatures"], json!([signature]));
    let (name, sig) = signature.split_once(':').unwrap();
    assert_eq!(value["signatures"], json!([{"keyName": name, "sig": sig}]));
    assert_eq!(
        value["ca"],
        json!({"method": "nar", "hash": value["narHash"]})
    );
    assert_eq!(value["url"], json!(narinfo.line("URL").unwrap()));
    assert_eq!(
        (&value["version"], &value["storeDir"], &value["compression"]),
        (&json!(3), &json!("/nix/store"), &json!("none"))
    );
    assert_eq!(
        format!("/nix/store/{}", value["path"].as_str().unwrap()),
        path.path
    );
    assert_eq!(
        machine
            .get("/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo?json")
            .status,
        404
    );
    machine.stop().await;
}

/// Compares with what Nix lists, and every file's place with its contents.
fn check_listing(machine: &Machine, path: &Sample, nix: &Value) {
    let target = format!("/{}.ls", path.hash);
    let ours = json_of(machine, &target);
    assert_head(machine, &target);
    let mut root = ours["root"].clone();
    let mut files = 0;
    check_places(&mut root, path, &mut files);
    assert_eq!(files, 3);
    assert_eq!(ours["root"], *nix);
}

fn check_places(node: &mut Value, path: &Sample, files: &mut usize) {
    match node["type"].as_str().unwrap() {
        "directory" => {
            for entry in node["entries"].as_object_mut().unwrap().values_mut() {
                check_places(entry, path, files);
            }
        }
        "regular" => {
            let size = node["size"].as_u64().unwrap() as usize;
            let offset = node["narOffset"].as_u64().unwrap() as usize;
            let contents = str::from_utf8(&path.nar[offset..offset + size]).unwrap();
            assert!(
                ["", "text\n", "symbols\n"].contains(&contents),
                "{contents}"
            );
            *files += 1;
        }
        kind => assert_eq!(kind, "symlink"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_is_what_nix_lists_here_and_through_the_mesh() {
    let mut provider = Machine::new();
    provider.equip();
    let (_, output) = provider.build(TREE);
    let path = provider.sample(&output);
    let nar = provider.folder().join("tree.nar");
    fs::write(&nar, &path.nar).unwrap();
    let listed = provider.try_nix(
        "nix",
        &[
            "nar",
            "ls",
            "--json",
            "--recursive",
            nar.to_str().unwrap(),
            "/",
        ],
    );
    let nix: Value = serde_json::from_slice(&listed.stdout).unwrap();

    let mut asker = Machine::new();
    asker.peers.push(provider.address);
    provider.start().await;
    asker.start().await;
    asker.wait_for(&path);
    check_listing(&provider, &path, &nix);
    check_listing(&asker, &path, &nix);
    assert_eq!(
        asker.get("/00bgd045z0d4icpbc2yyz4gx48ak44la.ls").status,
        404
    );
    // Whoever sends another NAR than promised gets nothing listed.
    provider.corrupt(&format!("{output}/bin/program"));
    assert_eq!(asker.get(&format!("/{}.ls", path.hash)).status, 404);
    asker.stop().await;
    provider.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_log_is_decoded_and_read_by_the_real_client() {
    let mut machine = Machine::new();
    machine.equip();
    let (derivation, output) = machine.build(TREE);
    let path = machine.sample(&output);
    machine.start().await;
    machine.wait_for(&path);
    let base_name = derivation.strip_prefix("/nix/store/").unwrap();
    let target = format!("/log/{base_name}");
    let answer = machine.get(&target);
    assert_eq!(answer.body, b"building a tree\n");
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(answer.header("content-encoding"), None);
    assert_head(&machine, &target);

    let client = Machine::new();
    let said = client.try_nix("nix", &["log", "--store", &machine.url(), &output]);
    assert_eq!(said.stdout, b"building a tree\n");

    // Plain, large, empty and broken ones.
    let folder = machine
        .folder()
        .join("nix/var/log/nix/drvs")
        .join(&base_name[..2]);
    let packed = folder.join(format!("{}.bz2", &base_name[2..]));
    let whole = fs::read(&packed).unwrap();
    fs::write(&packed, &whole[..whole.len() - 4]).unwrap();
    assert_eq!(machine.get(&target).status, 404);
    fs::remove_file(&packed).unwrap();
    assert_eq!(machine.get(&target).status, 404);
    let plain = folder.join(&base_name[2..]);
    for text in [String::new(), "line after line\n".repeat(100_000)] {
        fs::write(&plain, &text).unwrap();
        assert!(machine.get(&target).body == text.as_bytes());
    }
    // Nothing is followed out of the folder.
    fs::remove_file(&plain).unwrap();
    symlink("/etc/passwd", &plain).unwrap();
    assert_eq!(machine.get(&target).status, 404);
    for target in [
        format!("/log/{}", path.path.strip_prefix("/nix/store/").unwrap()),
        format!("/log/{base_name}/../{base_name}"),
        format!("/log/..%2f{base_name}"),
        "/log/".into(),
        format!("/log/{base_name}%00"),
    ] {
        assert_eq!(machine.get(&target).status, 404, "{target}");
    }
    machine.stop().await;
}

/// Two content-addressed derivations, one of which uses the other.
const CONTENT_ADDRESSED: &str = r#"let
    of = name: script: derivation {
        inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
        args = [ "-e" "-c" "mkdir $out; ${script}" ];
        __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
    };
    base = of "base" "echo base >$out/file";
in of "top" "echo ${base} >$out/file""#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn realisations_are_what_nix_writes_and_let_a_client_skip_the_build() {
    let mut machine = Machine::new();
    machine.equip();
    let (_, output) = machine.build(CONTENT_ADDRESSED);
    let path = machine.sample(&output);
    let expression = machine.folder().join("build.nix");
    let cache = machine.cache_of(&["-f", expression.to_str().unwrap()], "compression=none");
    machine.start().await;
    machine.wait_for(&path);

    let files: Vec<_> = fs::read_dir(cache.path().join("realisations"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect();
    assert_eq!(files.len(), 2);
    for file in &files {
        let name = file.file_name().into_string().unwrap();
        let escaped = name.replace(':', "%3A").replace('!', "%21");
        for name in [&name, &escaped] {
            let target = format!("/realisations/{name}");
            assert_eq!(json_of(&machine, &target), read_json(&file.path()));
            assert_head(&machine, &target);
        }
    }
    let absent = format!("/realisations/sha256:{}!out.doi", "0".repeat(64));
    assert_eq!(machine.get(&absent).status, 404);

    // A client that may not build gets both outputs.
    let mut client = Machine::new();
    client.equip();
    client.nix_conf += &format!("substituters = {}\n", machine.url());
    fs::copy(&expression, client.folder().join("build.nix")).unwrap();
    let file = client.folder().join("build.nix");
    let built = client.nix(
        "nix-build",
        &["--no-out-link", "--max-jobs", "0", file.to_str().unwrap()],
    );
    assert_eq!(built, output);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newer_build_trace_is_read_where_there_is_one() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    machine.start().await;
    machine.wait_for(&path);
    let derivation = "00bgd045z0d4icpbc2yyz4gx48ak44la-top.drv";
    let target = format!("/build-trace-v2/{derivation}/out.doi");
    assert_eq!(machine.get(&target).status, 404);
    // As Nix 2.35 makes it; no such Nix is at hand.
    let db = machine.folder().join("nix/var/nix/db/db.sqlite");
    let db = rusqlite::Connection::open(db).unwrap();
    db.execute_batch(
        "CREATE TABLE BuildTraceV3 (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, drvPath TEXT NOT NULL,
         outputName TEXT NOT NULL, outputPath TEXT NOT NULL, signatures TEXT)",
    )
    .unwrap();
    let narinfo = machine.get(&path.narinfo());
    let signature = narinfo.line("Sig").unwrap();
    let row = "INSERT INTO BuildTraceV3 (drvPath, outputName, outputPath, signatures) VALUES (?, ?, ?, ?)";
    db.execute(row, [derivation, "out", &path.path, signature])
        .unwrap();
    let gone = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-gone";
    db.execute(row, [derivation, "dev", gone, ""]).unwrap();
    let (name, sig) = signature.split_once(':').unwrap();
    assert_eq!(
        json_of(&machine, &target),
        json!({
            "outPath": path.path.strip_prefix("/nix/store/").unwrap(),
            "signatures": [{"keyName": name, "sig": sig}],
        })
    );
    assert_head(&machine, &target);
    for target in [
        format!("/build-trace-v2/{derivation}/dev.doi"),
        format!("/build-trace-v2/{derivation}/lib.doi"),
        format!("/build-trace-v2/{derivation}/out"),
        format!("/build-trace-v2/{derivation}/../out.doi"),
        "/build-trace-v2/x.drv/out.doi".into(),
    ] {
        assert_eq!(machine.get(&target).status, 404, "{target}");
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debug_information_is_found_as_nix_indexes_it() {
    let mut machine = Machine::new();
    machine.equip();
    machine.start().await;
    let targets = [
        "/debuginfo/abcdef0123456789abcdef0123456789abcdef01",
        "/debuginfo/abcdef0123456789abcdef0123456789abcdef01.debug",
    ];
    until("the store", || machine.get("/health").status == 200);
    assert_eq!(machine.get(targets[0]).status, 404);
    // Another path with the same file, whose name does not say that it holds debug information.
    machine.build(TREE);
    assert_eq!(machine.get(targets[0]).status, 404);
    let (_, output) = machine.build(&TREE.replace("\"tree\"", "\"tree-debug\""));
    let cache = machine.cache_of(&[&output], "compression=none&index-debug-info=true");
    let nix = read_json(
        &cache
            .path()
            .join("debuginfo/abcdef0123456789abcdef0123456789abcdef01.debug"),
    );
    for target in targets {
        let ours = json_of(&machine, target);
        assert_eq!(ours["member"], nix["member"]);
        let archive = ours["archive"]
            .as_str()
            .unwrap()
            .strip_prefix("..")
            .unwrap();
        assert!(machine.get(archive).body == machine.sample(&output).nar);
        assert_head(&machine, target);
    }
    for target in [
        "/debuginfo/abcdef0123456789abcdef0123456789abcdef02",
        "/debuginfo/ABcdef0123456789abcdef0123456789abcdef01",
        "/debuginfo/ab",
        "/debuginfo/..",
        "/debuginfo/abcd/../ef",
    ] {
        assert_eq!(machine.get(target).status, 404, "{target}");
    }
    machine.nix("nix-store", &["--delete", &output]);
    assert_eq!(machine.get(targets[0]).status, 404);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_path_is_browsed_without_scripts_and_without_leaving_it() {
    let mut machine = Machine::new();
    machine.equip();
    let odd = "<script>alert(1)</script>\"'&";
    let folder = machine.folder().join("odd");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join(odd.replace('/', "")), "harmless").unwrap();
    fs::write(folder.join("page.html"), "<script>alert(1)</script>").unwrap();
    fs::write(folder.join("data.bin"), [0u8, 1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    fs::write(folder.join("sub/inner"), "inside").unwrap();
    symlink("/etc/passwd", folder.join("outside")).unwrap();
    symlink("../../../../../etc", folder.join("sub/up")).unwrap();
    symlink("sub/inner", folder.join("near")).unwrap();
    let path = machine.nix("nix-store", &["--add", folder.to_str().unwrap()]);
    let path = machine.sample(&path);
    machine.start().await;
    machine.wait_for(&path);
    let root = format!("/serve/{}", path.hash);
    let text = |target: &str| {
        let answer = machine.get(target);
        assert_eq!(answer.status, 200, "{target}");
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none';") && policy.contains("sandbox"));
        assert!(!policy.contains("script"));
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_head(&machine, target);
        String::from_utf8(answer.body).unwrap()
    };
    let page = text(&format!("{root}/"));
    assert!(!page.contains("<script"), "{page}");
    assert!(page.contains("&lt;script&gt;"), "{page}");
    assert!(page.contains("<a href=\"sub/\">sub/</a>"), "{page}");
    assert!(page.contains("outside</a> → /etc/passwd"), "{page}");
    // Without the slash the links take another way to the same place.
    assert!(text(&root).contains(&format!("<a href=\"{}/sub/\">", path.hash)));
    assert!(text(&format!("{root}/sub")).contains("<a href=\"sub/inner\">"));

    let answer = machine.get(&format!("{root}/page.html"));
    assert_eq!(
        answer.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert_eq!(text(&format!("{root}/sub/inner")), "inside");
    let name: String = odd
        .replace('/', "")
        .bytes()
        .map(|byte| format!("%{byte:02x}"))
        .collect();
    assert_eq!(text(&format!("{root}/{name}")), "harmless");

    // Symlinks are shown, with a link where they lead into the store; never followed.
    assert!(!text(&format!("{root}/outside")).contains("href"));
    assert!(!text(&format!("{root}/sub/up")).contains("href"));
    let near = text(&format!("{root}/near"));
    assert!(
        near.contains(&format!("href=\"../{}/sub/inner\"", path.hash)),
        "{near}"
    );
    assert_eq!(machine.get(&format!("{root}/sub/up/passwd")).status, 404);

    // Ranges, as a player or a resumed download wants them.
    let target = format!("{root}/data.bin");
    for (range, status, body) in [
        ("2-4", 206, &[2u8, 3, 4][..]),
        ("8-", 206, &[8, 9]),
        ("-1", 206, &[9]),
        ("10-", 416, &[]),
    ] {
        let part = machine.ask("GET", &target, &format!("Range: bytes={range}\r\n"));
        assert_eq!((part.status, &part.body[..]), (status, body), "{range}");
        assert_eq!(part.header("accept-ranges"), Some("bytes"));
    }
    for below in [
        "absent",
        "data.bin/x",
        "..",
        "sub/../data.bin",
        "%2e%2e/%2e%2e/etc/passwd",
        "sub%2finner",
        "sub//inner",
        "%00",
    ] {
        assert_eq!(
            machine.get(&format!("{root}/{below}")).status,
            404,
            "{below}"
        );
    }
    for target in [
        "/serve/",
        "/serve/x",
        "/serve/00bgd045z0d4icpbc2yyz4gx48ak44la/",
    ] {
        assert_eq!(machine.get(target).status, 404, "{target}");
    }
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_metrics_tell_how_it_stands() {
    let mut machine = Machine::new();
    let path = machine.add("small", SMALL_BYTES);
    let (db, aside) = (
        machine.folder().join("nix/var/nix/db"),
        machine.folder().join("aside"),
    );
    fs::rename(&db, &aside).unwrap();
    machine.start().await;
    let health = machine.get("/health");
    assert_eq!(health.status, 503);
    let body: Value = serde_json::from_slice(&health.body).unwrap();
    assert_eq!(
        body,
        json!({"ready": false, "store": "waiting", "mesh": "waiting"})
    );
    // Counters are there before anything is counted.
    let answer = machine.get("/metrics");
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let before = parse(str::from_utf8(&answer.body).unwrap()).samples;
    assert_eq!(before["granary_narinfos_total{source=\"local\"}"], 0.0);
    assert_eq!(before["granary_nars_mismatched_total"], 0.0);
    assert_eq!(before["granary_ready"], 0.0);
    assert_eq!(
        before["granary_http_requests_total{route=\"narinfo\",status=\"200\"}"],
        0.0
    );

    fs::rename(&aside, &db).unwrap();
    let joined = json!({"ready": true, "store": "open", "mesh": "joined"});
    until("health", || {
        let body: Value = serde_json::from_slice(&machine.get("/health").body).unwrap();
        body == joined
    });
    // The store is looked through while it is announced.
    until("announcements", || {
        let answer = machine.get("/metrics");
        parse(str::from_utf8(&answer.body).unwrap()).samples["granary_paths_held"] == 1.0
    });
    machine.get(&path.narinfo());
    machine.get(&path.short());
    machine.get("/00bgd045z0d4icpbc2yyz4gx48ak44la.narinfo");
    let answer = machine.get("/metrics");
    let after = parse(str::from_utf8(&answer.body).unwrap()).samples;
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>(),
        "labels are bounded"
    );
    for (name, value) in [
        ("granary_narinfos_total{source=\"local\"}", 1.0),
        ("granary_narinfos_total{source=\"absent\"}", 1.0),
        ("granary_nars_total{source=\"local\"}", 1.0),
        (
            "granary_http_requests_total{route=\"narinfo\",status=\"404\"}",
            1.0,
        ),
        (
            "granary_http_requests_total{route=\"nar\",status=\"200\"}",
            1.0,
        ),
        ("granary_narinfo_seconds_count", 2.0),
        ("granary_narinfo_seconds_bucket{le=\"+Inf\"}", 2.0),
        ("granary_ready", 1.0),
        ("granary_mesh_joined", 1.0),
    ] {
        assert_eq!(after[name], value, "{name}");
    }
    assert!(after["granary_http_requests_total{route=\"about\",status=\"503\"}"] >= 1.0);
    machine.stop().await;
}
