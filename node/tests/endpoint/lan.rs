//! The LAN's port: machines without Granary read what is shared, in bounds, and nothing else.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use tokio::net::TcpSocket;

use crate::client::{Answer, Client};
use crate::machine::{LARGE_BYTES, Machine, SMALL_BYTES, own_address, until};
use crate::smuggling;

const LAN_PORT: u16 = 4729;

/// Requests that are granted at once, and those that follow in a second.
const BURST: usize = 2_000;
const FLOOD: usize = 3_000;
/// What is left of the second that 500 requests beyond the burst take, on a machine under load.
const FLOOD_MIN: Duration = Duration::from_millis(1_500);

/// More connections than one address may have, and those that go for it.
const CONNECTIONS: usize = 140;
const DROPPED: usize = 12;

/// The longest that anyone else may wait meanwhile.
const OTHERS_MAX: Duration = Duration::from_millis(1_000);

const ABSENT: &str = "0123456789abcdfghijklmnpqrsvwxyz";

/// Lets a machine share over HTTP, with further keys of `[share]`.
fn share(machine: &mut Machine, more: &str) {
    let address = machine.address;
    machine.extra = format!("[share]\nhttp = \"{address}:{LAN_PORT}\"\n{more}");
}

/// Connects as another machine of the LAN.
async fn connect_from(source: Ipv4Addr, machine: &Machine) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((source, 0))).unwrap();
    let address = SocketAddr::from((machine.address, LAN_PORT));
    let stream = socket.connect(address).await.unwrap();
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    Client::new(stream)
}

/// One request on a connection of its own, in the name that a client on the LAN uses.
async fn ask(machine: &Machine, method: &str, target: &str, headers: &str) -> Answer {
    let mut client = connect_from(own_address(), machine).await;
    let host = match headers.contains("Host:") {
        true => "",
        false => "Host: nas.lan:4729\r\n",
    };
    client.request(method, target, &format!("{host}{headers}"));
    client.answer(method == "HEAD")
}

fn count(machine: &Machine, series: &str) -> u64 {
    let text = String::from_utf8(machine.get("/metrics").body).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    line.unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_smuggled_past_the_port_of_the_lan() {
    let mut desktop = Machine::new();
    share(&mut desktop, "");
    let path = desktop.add("shared", SMALL_BYTES);
    desktop.start().await;
    let cases = smuggling::cases(&path.narinfo(), "/nix-cache-info");
    for (name, bytes) in &cases {
        let address = SocketAddr::from((desktop.address, LAN_PORT));
        let stream = tokio::net::TcpStream::connect(address).await;
        smuggling::check(name, bytes, stream.unwrap()).await;
    }
    let report = desktop.status();
    assert_eq!(
        report.refusals.get("malformed"),
        Some(&(cases.len() as u64)),
        "{:?}",
        report.refusals
    );
    // What was hidden would have been answered.
    let info = ask(&desktop, "GET", "/nix-cache-info", "Host: localhost\r\n").await;
    assert_eq!(info.line("WantMassQuery"), Some("1"));
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_without_a_node_read_what_is_shared_and_nothing_else() {
    let mut desktop = Machine::new();
    desktop.equip();
    share(&mut desktop, "deny = [\"^private-\"]\n");
    let shared = desktop.add("shared", SMALL_BYTES);
    let hidden = desktop.add("hidden", SMALL_BYTES);
    let denied = desktop.add("private-notes", SMALL_BYTES);
    let file = desktop.folder().join("added");
    fs::write(&file, "a secret").unwrap();
    let added = desktop.nix("nix-store", &["--add", file.to_str().unwrap()]);
    let added = desktop.sample(&added);
    let build = |name: &str| {
        format!(
            "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-c\" \"echo x >$out\" ]; }}"
        )
    };
    let (derivation, signed) = desktop.build(&build("signed"));
    let (derivation, signed) = (desktop.sample(&derivation), desktop.sample(&signed));
    // What is built without a key nobody could prove.
    let secret = desktop.folder().join("secret").display().to_string();
    desktop.nix_conf = desktop.nix_conf.replace(&secret, "");
    let (_, unsigned) = desktop.build(&build("unsigned"));
    let unsigned = desktop.sample(&unsigned);
    fs::create_dir_all(desktop.state()).unwrap();
    fs::write(desktop.state().join("hidden"), format!("{}\n", hidden.hash)).unwrap();
    desktop.start().await;

    let info = ask(&desktop, "GET", "/nix-cache-info", "").await;
    assert_eq!(info.status, 200);
    assert_eq!(info.line("Priority"), Some("30"));
    for path in [&shared, &signed] {
        let own = desktop.get(&path.narinfo());
        let told = ask(&desktop, "GET", &path.narinfo(), "").await;
        assert_eq!(told.status, 200, "{}", path.path);
        assert_eq!(told.body, own.body, "nothing is added without a key");
        let head = ask(&desktop, "HEAD", &path.narinfo(), "").await;
        assert_eq!(head.timeless(), told.timeless());
        let nar = ask(&desktop, "GET", &path.short(), "").await;
        assert!(nar.status == 200 && nar.body == path.nar);
        nar.assert_below_nar();
        let rest = ask(&desktop, "GET", &path.short(), "Range: bytes=10-\r\n").await;
        assert!(rest.status == 206 && rest.body == path.nar[10..]);
        let listing = format!("/{}.ls", path.hash);
        let told = ask(&desktop, "GET", &listing, "").await;
        assert_eq!(told.body, desktop.get(&listing).body);
    }
    for (what, path) in [
        ("hidden", &hidden),
        ("denied", &denied),
        ("added", &added),
        ("unsigned", &unsigned),
        ("derivation", &derivation),
    ] {
        assert_eq!(desktop.get(&path.narinfo()).status, 200, "{what}");
        let name = &path.path["/nix/store/".len()..];
        for target in [
            "/@.narinfo",
            "/@.narinfo?json",
            "/@.ls",
            "/nar/@.nar",
            "/serve/@",
            "/api/v1/why/@",
            &format!("/log/{name}").replace(&path.hash, "@"),
        ] {
            for (method, headers) in [("GET", ""), ("HEAD", ""), ("GET", "Range: bytes=10-\r\n")] {
                let of_absent = ask(&desktop, method, &target.replace('@', ABSENT), headers).await;
                let target = target.replace('@', &path.hash);
                let of_private = ask(&desktop, method, &target, headers).await;
                assert_eq!(
                    (of_private.timeless(), &of_private.body),
                    (of_absent.timeless(), &of_absent.body),
                    "{what}: {method} {target} {headers}"
                );
                assert_eq!(of_absent.status, 404, "{target}");
            }
        }
    }
    // Nor anything about the machine.
    for target in ["/", "/metrics", "/health", "/api/v1/status", "/why?path=x"] {
        assert_eq!(ask(&desktop, "GET", target, "").await.status, 404);
    }
    assert_eq!(ask(&desktop, "POST", "/x", "").await.status, 405);
    // A page of the internet that resolves its name to this machine learns nothing of what is here.
    for target in [shared.narinfo(), format!("/{ABSENT}.narinfo")] {
        let host = "Host: nas.evil.example:4729\r\n";
        let refused = ask(&desktop, "GET", &target, host).await;
        assert_eq!(refused.status, 403, "{target}");
    }
    assert_eq!(
        count(
            &desktop,
            "granary_share_requests_total{to=\"lan\",outcome=\"refused\"}"
        ),
        2
    );
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_neighbours_have_is_not_fetched_for_machines_without_a_node() {
    let mut desktop = Machine::new();
    let mut laptop = Machine::new();
    let path = desktop.add("remote", SMALL_BYTES);
    laptop.peers = vec![desktop.address];
    share(&mut laptop, "");
    desktop.start().await;
    laptop.start().await;
    laptop.wait_for(&path);
    for target in [
        path.narinfo(),
        path.short(),
        format!("/{}.ls", path.hash),
        format!("/{ABSENT}.narinfo"),
    ] {
        assert_eq!(
            ask(&laptop, "GET", &target, "").await.status,
            404,
            "{target}"
        );
    }
    let report = laptop.status();
    let received: u64 = report.peers.iter().map(|peer| peer.bytes_received).sum();
    assert_eq!(received, 0);
    laptop.stop().await;
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_comes_before_everything_else() {
    let mut desktop = Machine::new();
    let path = desktop.add("shared", SMALL_BYTES);
    let token = desktop.folder().join("token");
    fs::write(&token, "correct-horse\n").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    share(
        &mut desktop,
        &format!("http-token-file = \"{}\"\n", token.display()),
    );
    desktop.start().await;
    let targets = [
        path.narinfo(),
        format!("/{ABSENT}.narinfo"),
        "/nix-cache-info".into(),
        "/".into(),
    ];
    // `printf nix:correct-horse | base64`, and `printf nix:wrong | base64`.
    for headers in [
        "",
        "Authorization: Bearer correct-hors\r\n",
        "Authorization: Basic bml4Ondyb25n\r\n",
        "Host: evil.example\r\n",
    ] {
        let mut answers = Vec::new();
        for target in &targets {
            let answer = ask(&desktop, "GET", target, headers).await;
            assert_eq!(answer.status, 401, "{target} {headers}");
            let asks = answer.header("www-authenticate");
            assert_eq!(asks, Some("Basic realm=\"granary\""));
            let head: Vec<_> = answer.timeless().into_iter().map(str::to_owned).collect();
            answers.push((head, answer.body));
        }
        assert!(answers.iter().all(|answer| *answer == answers[0]));
    }
    for headers in [
        "Authorization: Bearer correct-horse\r\n",
        "Authorization: Basic bml4OmNvcnJlY3QtaG9yc2U=\r\n",
        // No page knows it, so any name will do.
        "Host: nas.example.org\r\nAuthorization: Bearer correct-horse\r\n",
    ] {
        let answer = ask(&desktop, "GET", &path.narinfo(), headers).await;
        assert_eq!(answer.status, 200, "{headers}");
    }
    desktop.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_from_one_address_waits_and_harms_nobody_else() {
    let mut desktop = Machine::new();
    let path = desktop.add("shared", LARGE_BYTES);
    share(&mut desktop, "");
    desktop.start().await;
    let (flooder, other) = (own_address(), own_address());

    let mut client = connect_from(flooder, &desktop).await;
    let mut writer = client.stream.try_clone().unwrap();
    let started = Instant::now();
    let flood = std::thread::spawn(move || {
        let request = format!("HEAD /{ABSENT}.narinfo HTTP/1.1\r\nHost: nas\r\n\r\n");
        std::io::Write::write_all(&mut writer, request.repeat(FLOOD).as_bytes()).unwrap();
    });
    for number in 0..FLOOD {
        assert_eq!(client.answer(true).status, 404);
        if number == BURST + 100 {
            // Somebody else asks while the flooder waits for its turns.
            let asked = Instant::now();
            let mut client = connect_from(other, &desktop).await;
            client.request("GET", &path.narinfo(), "Host: nas\r\n");
            assert_eq!(client.answer(false).status, 200);
            assert!(asked.elapsed() < OTHERS_MAX, "{:?}", asked.elapsed());
        }
    }
    flood.join().unwrap();
    assert!(started.elapsed() > FLOOD_MIN, "{:?}", started.elapsed());

    // Silent connections: the oldest of that address go, and nobody else's.
    let mut early = connect_from(other, &desktop).await;
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        silent.push(connect_from(flooder, &desktop).await);
    }
    until("the oldest are dropped", || {
        // The connection that flooded stands among them, and goes first.
        count(
            &desktop,
            "granary_share_connections_dropped_total{to=\"lan\"}",
        ) == DROPPED as u64 + 1
    });
    assert!(client.is_closed() && silent[DROPPED - 1].is_closed());
    for client in [&mut early, silent.last_mut().unwrap()] {
        client.request("HEAD", &path.short(), "Host: nas\r\n");
        assert_eq!(client.answer(true).status, 200);
    }
    desktop.stop().await;
}
