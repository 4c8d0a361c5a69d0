//! Attacks on what speaks HTTP, and on what stands between two members: every one is refused, and counted by its reason.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use granary::identity::Identity;
use granary::serve::tls;
use tokio::io::AsyncWriteExt;

use crate::machine::{
    GENEROUS, MESH_PORT, Machine, SMALL_BYTES, TRANSFER_PORT, key, own_address, until,
};
use crate::smuggling;

/// Connections that say a request byte by byte, at each listener.
const SLOW: usize = 100;

/// Bytes of such a request between which another client is answered.
const SLOW_ROUNDS: usize = 10;

fn refusals(machine: &Machine, reason: &str) -> u64 {
    let report = machine.status();
    report.refusals.get(reason).copied().unwrap_or(0)
}

fn identity(machine: &Machine) -> Identity {
    Identity::load_or_create(&machine.state().join("identity")).unwrap()
}

/// Two members, of which the second knows the first, and a path of the first.
async fn members() -> (Machine, Machine, crate::machine::Sample) {
    let (mut holder, mut asker) = (Machine::new(), Machine::new());
    let path = holder.add("small", SMALL_BYTES);
    holder.start().await;
    asker.peers = vec![holder.address];
    asker.start().await;
    asker.wait_for(&path);
    (holder, asker, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_smuggled_past_the_endpoint_or_the_members_port() {
    let (mut holder, mut asker, path) = members().await;
    let connector = tls::connector(&identity(&asker), GENEROUS).unwrap();
    let transfer = SocketAddr::from((holder.address, TRANSFER_PORT));
    let cases = smuggling::cases(&path.narinfo(), "/nix-cache-info");
    for (name, bytes) in &cases {
        let stream = tokio::net::TcpStream::connect(holder.endpoint()).await;
        smuggling::check(name, bytes, stream.unwrap()).await;
        let stream = connector
            .connect(transfer, identity(&holder).peer_id())
            .await;
        smuggling::check(name, bytes, stream.unwrap()).await;
    }
    assert_eq!(refusals(&holder, "malformed"), 2 * cases.len() as u64);
    asker.stop().await;
    holder.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_without_end_are_cut_and_slow_ones_hold_nobody_up() {
    let (mut holder, mut asker, path) = members().await;
    let connector = tls::connector(&identity(&asker), GENEROUS).unwrap();
    let transfer = SocketAddr::from((holder.address, TRANSFER_PORT));
    let expected = identity(&holder).peer_id();
    // More than any head has, in one line and in many.
    for flood in [
        "X: ".to_owned() + &"y".repeat(64 * 1024),
        "X: y\r\n".repeat(10_000),
    ] {
        let head = format!(
            "GET {} HTTP/1.1\r\nHost: localhost\r\n{flood}",
            path.narinfo()
        );
        let stream = tokio::net::TcpStream::connect(holder.endpoint()).await;
        smuggling::check("a long head", head.as_bytes(), stream.unwrap()).await;
        let stream = connector.connect(transfer, expected).await;
        smuggling::check("a long head", head.as_bytes(), stream.unwrap()).await;
    }
    assert_eq!(refusals(&holder, "malformed"), 4);

    let mut slow = Vec::new();
    for _ in 0..SLOW {
        slow.push(
            tokio::net::TcpStream::connect(holder.endpoint())
                .await
                .unwrap(),
        );
    }
    // A member may have 64; the rest are dropped.
    let mut slow_members = Vec::new();
    for _ in 0..32 {
        slow_members.push(connector.connect(transfer, expected).await.unwrap());
    }
    let head = format!("GET {} HTTP/1.1\r\n", path.narinfo());
    for byte in head.as_bytes().chunks(1).take(SLOW_ROUNDS) {
        for stream in &mut slow {
            stream.write_all(byte).await.unwrap();
        }
        for stream in &mut slow_members {
            stream.write_all(byte).await.unwrap();
        }
        assert_eq!(holder.get(&path.narinfo()).status, 200);
        let answer = asker.get(&path.short());
        assert!(answer.status == 200 && answer.body == path.nar);
    }
    drop((slow, slow_members));
    asker.stop().await;
    holder.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_headers_of_web_pages_are_refused_and_counted() {
    let mut machine = Machine::new();
    machine.start().await;
    let targets = [
        "/nix-cache-info",
        "/metrics",
        "/api/v1/status",
        "/nar/x.nar",
    ];
    for target in targets {
        let answer = machine.ask("GET", target, "Host: rebound.example:4726\r\n");
        assert_eq!(answer.status, 403, "{target}");
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(
            !said.contains("WantMassQuery") && !said.contains("granary_"),
            "{said}"
        );
    }
    assert_eq!(refusals(&machine, "foreign_host"), targets.len() as u64);
    let metrics = machine.get("/metrics");
    let metrics = String::from_utf8(metrics.body).unwrap();
    let line = "granary_refusals_total{reason=\"foreign_host\"} 4";
    assert!(metrics.contains(line), "{metrics}");
    machine.stop().await;
}

/// Stands between two control planes, and changes a byte of what passes when told to.
fn tampering_relay(behind: SocketAddr, tampers: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind((own_address(), MESH_PORT)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(behind) else {
                continue;
            };
            let clone = |stream: &TcpStream| stream.try_clone().unwrap();
            for (from, to) in [(clone(&near), clone(&far)), (far, near)] {
                let tampers = tampers.clone();
                std::thread::spawn(move || relay(from, to, &tampers));
            }
        }
    });
    address
}

fn relay(mut from: TcpStream, mut to: TcpStream, tampers: &AtomicBool) {
    use std::io::{Read, Write};
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if tampers.load(Ordering::SeqCst) {
            buffer[length / 2] ^= 1;
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for end in [from, to] {
        let _ = end.shutdown(std::net::Shutdown::Both);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_changes_a_byte_of_the_control_plane_ends_the_link_and_nothing_more() {
    let (mut holder, mut asker) = (Machine::new(), Machine::new());
    let path = holder.add("small", SMALL_BYTES);
    holder.start().await;
    let tampers = Arc::new(AtomicBool::new(false));
    let behind = SocketAddr::from((holder.address, MESH_PORT));
    let relay = tampering_relay(behind, tampers.clone());
    let std::net::IpAddr::V4(relay) = relay.ip() else {
        unreachable!("an address of IPv4");
    };
    asker.peers = vec![relay];
    asker.start().await;
    asker.wait_linked(1);
    tampers.store(true, Ordering::SeqCst);
    // A pulse is enough to pass through it.
    until("the link to end", || {
        let linked = |peer: &granary::status::Peer| peer.state == "linked";
        !asker.status().peers.iter().any(linked)
    });
    // What was changed did not get through the cipher: nobody is blamed for words that it did not say.
    for machine in [&holder, &asker] {
        let report = machine.status();
        for reason in ["garbage", "bad_signature", "other_peer"] {
            assert_eq!(report.refusals.get(reason), None, "{:?}", report.refusals);
        }
        assert!(report.peers.iter().all(|peer| peer.quarantine.is_none()));
    }
    // And while it goes on, no handshake succeeds.
    assert_eq!(asker.get(&path.narinfo()).status, 404);
    tampers.store(false, Ordering::SeqCst);
    asker.wait_linked(1);
    asker.wait_for(&path);
    asker.stop().await;
    holder.stop().await;
}

/// An anchor that hears a token, and refuses it.
fn deaf_anchor() -> SocketAddr {
    use std::io::{Read, Write};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let answer =
                b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.write_all(answer);
        }
    });
    address
}

fn write_secret(file: &std::path::Path, text: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Runs a command line of a machine, as talkative as it can be; returns everything that it said.
fn granary(machine: &Machine, arguments: &[&str]) -> (bool, String) {
    let file = machine.folder().join("granary.toml");
    std::fs::write(&file, machine.config_text()).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(arguments)
        .arg("--config")
        .arg(&file)
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn no_secret_stands_in_a_log_an_answer_an_argument_or_the_environment() {
    use data_encoding::{BASE64, BASE64URL_NOPAD, HEXLOWER};
    let mut machine = Machine::new();
    machine.admit();
    let token = "a-token-that-nobody-may-see-0123456789";
    let token_file = machine.folder().join("token");
    write_secret(&token_file, token.as_bytes());
    machine.extra = format!(
        "[[anchor]]\nurl = \"http://{}/main\"\ntoken-file = {token_file:?}\n",
        deaf_anchor()
    );
    // Where the mesh key is, tickets are made and machines admitted.
    let mesh_key = key("mesh").to_nix_string();
    write_secret(&machine.state().join("mesh.key"), mesh_key.as_bytes());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap();
    let node = crate::process::Node::start(&machine, Some(&listener), &[("RUST_LOG", "trace")]);
    let get = |target: &str| {
        let mut client = crate::client::Client::new(TcpStream::connect(endpoint).unwrap());
        client.request("GET", target, "");
        client.answer(false)
    };
    // The token goes to the anchor, with a question.
    let absent = "00bgd045z0d4icpbc2yyz4gx48ak44la";
    until("the node to answer", || get("/health").status == 200);
    assert_eq!(get(&format!("/{absent}.narinfo")).status, 404);

    let address = machine.address.to_string();
    let (is_made, said) = granary(&machine, &["mesh", "ticket", "--host", &address]);
    assert!(is_made, "{said}");
    let ticket = said
        .lines()
        .find(|line| line.starts_with("granary-ticket-1:"));
    let ticket = ticket.unwrap().to_owned();
    let laptop = Machine::new();
    let ticket_file = laptop.folder().join("ticket");
    write_secret(&ticket_file, ticket.as_bytes());
    let config = laptop.folder().join("laptop.toml");
    std::fs::write(&config, format!("state-dir = {:?}\n", laptop.state())).unwrap();
    let joined = std::process::Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["join", "--ticket-file"])
        .arg(&ticket_file)
        .arg("--config")
        .arg(&config)
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    let joining = String::from_utf8_lossy(&[joined.stdout, joined.stderr].concat()).into_owned();
    assert!(joined.status.success(), "{joining}");
    // A second time it is refused, which is told without its secret.
    let again = std::process::Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["join", "--ticket-file"])
        .arg(&ticket_file)
        .args(["--name", "another"])
        .arg("--config")
        .arg(&config)
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    let refused = String::from_utf8_lossy(&[again.stdout, again.stderr].concat()).into_owned();

    let process = node.0.id();
    let of_process = |name: &str| {
        let bytes = std::fs::read(format!("/proc/{process}/{name}")).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let mut places = vec![
        ("arguments", of_process("cmdline")),
        ("environment", of_process("environ")),
        ("joining", joining),
        ("joining again", refused),
    ];
    for target in [
        "/",
        "/metrics",
        "/api/v1/status",
        &format!("/api/v1/why/{absent}"),
    ] {
        let body = get(target).body;
        places.push(("an answer", String::from_utf8_lossy(&body).into_owned()));
    }
    places.push(("the log", node.stop()));
    let log = &places.last().unwrap().1;
    assert!(
        log.contains("TRACE") && log.contains("admitted a machine"),
        "{}",
        log.len()
    );

    let seed = std::fs::read(machine.state().join("identity")).unwrap();
    let loopback = std::fs::read_to_string(machine.state().join("loopback-key")).unwrap();
    let bytes_of_key = |text: &str| {
        let (_, base64) = text.trim().split_once(':').unwrap();
        BASE64.decode(base64.as_bytes()).unwrap()
    };
    let ticket = ticket.split_once(':').unwrap().1;
    let secrets = [
        ("identity", seed),
        ("loopback key", bytes_of_key(&loopback)),
        ("mesh key", bytes_of_key(&mesh_key)),
        ("token", token.as_bytes().to_vec()),
        ("ticket", BASE64URL_NOPAD.decode(ticket.as_bytes()).unwrap()),
    ];
    for (name, secret) in secrets {
        // Of keys the first half is the secret one.
        let secret = &secret[..secret.len().min(32)];
        let forms = [
            HEXLOWER.encode(secret),
            // The last digit depends on what follows.
            BASE64.encode(secret)[..40].to_owned(),
            BASE64URL_NOPAD.encode(secret)[..40].to_owned(),
            format!("{secret:?}").trim_matches(['[', ']']).to_owned(),
            String::from_utf8(secret.to_vec()).unwrap_or_else(|_| "\0".into()),
        ];
        for (place, text) in &places {
            let found = forms
                .iter()
                .find(|form| **form != "\0" && text.contains(*form));
            assert_eq!(found, None, "{name} in {place}");
        }
    }
}
