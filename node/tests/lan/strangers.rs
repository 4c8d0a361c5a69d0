//! Who was not admitted gets nothing, on either plane.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::http;
use crate::machine::{Lan, MESH_PORT, Machine, SUBSTITUTER_PORT, TRANSFER_PORT, hash_of};
use crate::network::Namespace;
use crate::nix;
use crate::process::{assert_throughout, wait_for};

const OFFERED: Duration = Duration::from_secs(10);
/// Discovery, dialling and a refusal take about a second; a refused peer is tried again after more.
const REFUSED: Duration = Duration::from_secs(20);
/// How long a stranger is watched getting nothing after it had its chance.
const WATCHED: Duration = Duration::from_secs(3);
/// How long an answer to a stranger is awaited on a bare connection.
const SILENCE: Duration = Duration::from_secs(2);

/// Two members that share a path, and the name under which its NAR is served.
struct Members {
    desktop: Machine,
    laptop: Machine,
    path: String,
    nar: String,
}

impl Members {
    fn new(lan: &Lan) -> Members {
        let mut desktop = lan.builder("desktop");
        let mut laptop = lan.machine("laptop");
        let path = desktop.build(&nix::folder_of("private", 100_000));
        desktop.start();
        laptop.start();
        laptop.wait_linked(&[&desktop]);
        laptop.wait_offered(&path, OFFERED);
        let nar = laptop
            .narinfo(&path)
            .line("URL")
            .expect("a narinfo has a URL");
        Members {
            desktop,
            laptop,
            path,
            nar: format!("/{nar}"),
        }
    }

    /// Starts a node that must be refused, and asserts that it gets nothing and is counted.
    fn refuse(&self, mut stranger: Machine) {
        stranger.settings.peers = vec![self.desktop.at(MESH_PORT).to_string()];
        // Its operator must act on a certificate that cannot be used.
        stranger.may_log_errors = true;
        stranger.start();
        wait_for("a refusal is counted", REFUSED, || {
            let (desktop, own) = (self.desktop.status(), stranger.status());
            if desktop.refusals() + own.refusals() > 0 {
                Ok(())
            } else {
                Err(format!("desktop {desktop}, stranger {own}"))
            }
        });
        self.assert_nothing_for(&stranger);
        assert_eq!(
            self.desktop.status().linked(),
            [self.laptop.peer_id.as_str()]
        );
        // The members are none the worse for it.
        self.laptop.realise(&self.path).expect_success();
        self.laptop.assert_sound();
    }

    fn assert_nothing_for(&self, stranger: &Machine) {
        assert_throughout("a stranger gets nothing", WATCHED, || {
            let narinfo = stranger.narinfo(&self.path).status;
            let nar = stranger.get(&self.nar).status;
            if (narinfo, nar) == (404, 404) {
                Ok(())
            } else {
                Err(format!("narinfo {narinfo}, nar {nar}"))
            }
        });
        let status = stranger.status();
        assert!(status.linked().is_empty(), "{status}");
        assert_eq!(status.bytes_received(), 0, "{status}");
        assert!(!stranger.realise(&self.path).status.success());
        assert!(!stranger.is_valid(&self.path));
    }

    /// Asserts that the bytes a stranger got tell nothing about what is in the store.
    fn assert_tells_nothing(&self, what: &str, answer: &[u8]) {
        let text = String::from_utf8_lossy(answer);
        for secret in [
            hash_of(&self.path),
            "private",
            "StorePath",
            "StoreDir",
            "NarHash",
            "HTTP/1.1 200",
            "nix-archive-1",
        ] {
            assert!(!text.contains(secret), "{what} told {secret:?}: {text:?}");
        }
    }
}

#[test]
fn node_of_another_mesh_gets_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let mut stranger = lan.stranger("stranger");
    stranger.admit(&lan.other_mesh(), &[]);
    members.refuse(stranger);
}

#[test]
fn node_with_a_certificate_of_another_mesh_gets_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let mut stranger = lan.stranger("stranger");
    stranger.admit(&lan.other_mesh(), &[]);
    stranger.settings.mesh_key = Some(lan.mesh.public.clone());
    members.refuse(stranger);
}

#[test]
fn node_with_an_expired_certificate_gets_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let mut stranger = lan.stranger("stranger");
    stranger.admit(&lan.mesh, &["--days", "0"]);
    members.refuse(stranger);
}

#[test]
fn node_with_the_certificate_of_another_peer_gets_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let mut stranger = lan.stranger("stranger");
    stranger.admit_as(&lan.mesh, &members.laptop.peer_id, &[]);
    members.refuse(stranger);
}

#[test]
fn node_without_a_certificate_gets_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let mut stranger = lan.stranger("stranger");
    stranger.settings.peers = vec![members.desktop.at(MESH_PORT).to_string()];
    stranger.may_log_errors = true;
    stranger.start();
    members.assert_nothing_for(&stranger);
    assert_eq!(
        members.desktop.status().linked(),
        [members.laptop.peer_id.as_str()]
    );
}

#[test]
fn stranger_on_the_wire_learns_nothing() {
    let lan = Lan::new();
    let members = Members::new(&lan);
    let stranger = lan.plug("stranger");
    let narinfo = format!("/{}.narinfo", hash_of(&members.path));
    let paths = [
        narinfo.as_str(),
        &members.nar,
        "/nix-cache-info",
        "/",
        "/health",
        "/metrics",
        "/api/v1/status",
    ];
    for port in [MESH_PORT, TRANSFER_PORT] {
        let address = members.desktop.at(port);
        members.assert_tells_nothing("a silent connection", &say(&stranger, address, b""));
        members.assert_tells_nothing(
            "multistream",
            &say(&stranger, address, b"\x13/multistream/1.0.0\n\x03ls\n"),
        );
        for path in paths {
            let request = http::request(address, path);
            members
                .assert_tells_nothing("plain HTTP", &say(&stranger, address, request.as_bytes()));
        }
    }
    for path in paths {
        let answer = say_over_tls(&stranger, members.desktop.at(TRANSFER_PORT), path);
        members.assert_tells_nothing("TLS with an unknown identity", &answer);
    }
    let endpoint = members.desktop.at(SUBSTITUTER_PORT);
    let connected = stranger.inside(|| TcpStream::connect_timeout(&endpoint, SILENCE).is_ok());
    assert!(!connected, "the endpoint for Nix is reachable from the LAN");
}

/// Everything that passes a machine's interfaces, byte for byte, until it is stopped.
struct Capture {
    is_over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<u8>>,
}

impl Capture {
    fn new(namespace: &Namespace) -> Capture {
        let socket = namespace.inside(crate::tap::open);
        let is_over = Arc::<AtomicBool>::default();
        let over = is_over.clone();
        let thread = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let mut packet = vec![0; 1 << 17];
            while !over.load(Ordering::Relaxed) {
                // What ends the wait without a packet is the timeout.
                if let Ok((held, _)) =
                    rustix::net::recv(&socket, &mut packet[..], rustix::net::RecvFlags::empty())
                {
                    bytes.extend_from_slice(&packet[..held]);
                }
            }
            bytes
        });
        Capture { is_over, thread }
    }

    fn stop(self) -> Vec<u8> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("nothing panics there")
    }
}

#[test]
fn what_passes_on_the_wire_names_no_path_no_machine_and_no_permission() {
    let lan = Lan::new();
    let mut desktop = lan.builder("deskmachine");
    let mut laptop = lan.machine("lapmachine");
    let path = desktop.build(&nix::folder_of("wiretapped", 100_000));
    let capture = Capture::new(&desktop.namespace);
    // Announcements, handshakes, what they say of each other and of the path, a lookup, a transfer.
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    laptop.realise(&path).expect_success();
    let bytes = capture.stop();
    assert!(bytes.len() > 100_000, "{} bytes", bytes.len());
    let has = |word: &str| {
        let word = word.as_bytes();
        bytes.windows(word.len()).any(|part| part == word)
    };
    assert!(has("_granary"), "no announcement was seen");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    // A name of two letters stands by chance in whatever is encrypted.
    let host = Some(host.trim()).filter(|host| host.len() > 4);
    let words = [
        hash_of(&path),
        "wiretapped",
        "StorePath",
        "nix-archive-1",
        "deskmachine",
        "lapmachine",
        "vouch",
        "/granary/control",
        lan.mesh.public.as_str(),
    ];
    for word in words.into_iter().chain(host) {
        assert!(!has(word), "{word:?} is on the wire");
    }
}

/// Sends bytes and returns what comes back until the other side closes or falls silent.
fn say(from: &Namespace, address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    from.inside(|| {
        let mut stream = TcpStream::connect_timeout(&address, SILENCE).expect("the port is open");
        stream.set_read_timeout(Some(SILENCE)).expect("set timeout");
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    })
}

/// Sends a GET over TLS 1.3 with a well-formed libp2p identity that nobody admitted.
fn say_over_tls(from: &Namespace, address: SocketAddr, path: &str) -> Vec<u8> {
    let identity = libp2p::identity::Keypair::generate_ed25519();
    let mut config = libp2p_tls::make_client_config(&identity, None).expect("client configuration");
    config.alpn_protocols = vec![b"granary/1".to_vec()];
    let config = Arc::new(config);
    from.inside(|| {
        let name = rustls::pki_types::ServerName::try_from("node.invalid").expect("a name");
        let mut connection =
            rustls::ClientConnection::new(config, name).expect("client connection");
        let mut stream = TcpStream::connect_timeout(&address, SILENCE).expect("the port is open");
        stream.set_read_timeout(Some(SILENCE)).expect("set timeout");
        let mut tls = rustls::Stream::new(&mut connection, &mut stream);
        let _ = tls.write_all(http::request(address, path).as_bytes());
        let mut answer = Vec::new();
        let _ = tls.read_to_end(&mut answer);
        answer
    })
}
