//! Bytes that no peer should send: the endpoint keeps answering, and members keep working.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::machine::{Lan, MESH_PORT, Machine, TRANSFER_PORT};
use crate::network::Namespace;
use crate::nix;

const OFFERED: Duration = Duration::from_secs(10);
/// Far above what an idle endpoint needs, far below what Nix's user would notice.
const ANSWERED: Duration = Duration::from_secs(1);
const IDLE_CONNECTIONS: usize = 200;

/// Bytes without meaning, the same in every run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What is sent, from nothing at all to the first words of each protocol and then nonsense.
fn nonsense() -> Vec<Vec<u8>> {
    let noise_handshake = b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff";
    let client_hello = b"\x16\x03\x01\xff\xff\x01\x00\xff\xfb\x03\x03";
    vec![
        Vec::new(),
        vec![0; 1 << 16],
        vec![0xff; 1 << 16],
        noise(1 << 20),
        // A length that continues for ever, where multistream expects a short one.
        vec![0x80; 64],
        [&noise_handshake[..], &noise(70_000)].concat(),
        [&client_hello[..], &noise(70_000)].concat(),
        [
            b"GET /nix-cache-info HTTP/1.1\r\nX: ".to_vec(),
            vec![b'a'; 1 << 20],
        ]
        .concat(),
    ]
}

fn throw(from: &Namespace, address: SocketAddr, bytes: &[u8]) {
    from.inside(|| {
        let mut stream = TcpStream::connect_timeout(&address, ANSWERED).expect("the port is open");
        stream
            .set_write_timeout(Some(ANSWERED))
            .expect("set timeout");
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .expect("set timeout");
        let _ = stream.write_all(bytes);
        let _ = stream.read(&mut [0; 1024]);
    });
}

fn assert_answers(machine: &Machine, store_path: &str) {
    let start = Instant::now();
    assert_eq!(machine.get("/health").status, 200);
    assert_eq!(machine.narinfo(store_path).status, 200);
    assert!(
        start.elapsed() < ANSWERED,
        "{} took {:.1?} to answer",
        machine.name,
        start.elapsed()
    );
}

#[test]
fn garbage_on_either_port_disturbs_nobody() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let path = desktop.build(&nix::folder_of("calm", 1_000_000));
    desktop.start();
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);

    let vandal = lan.plug("vandal");
    for port in [MESH_PORT, TRANSFER_PORT] {
        let address = desktop.at(port);
        for bytes in nonsense() {
            throw(&vandal, address, &bytes);
            assert_answers(&desktop, &path);
        }
        let idle: Vec<TcpStream> = vandal.inside(|| {
            (0..IDLE_CONNECTIONS)
                .filter_map(|_| TcpStream::connect_timeout(&address, ANSWERED).ok())
                .collect()
        });
        assert_answers(&desktop, &path);
        drop(idle);
    }

    assert_eq!(desktop.status().linked(), [laptop.peer_id.as_str()]);
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    let later = desktop.build(&nix::folder_of("later", 1_000));
    laptop.wait_offered(&later, OFFERED);
    desktop.stop();
    laptop.stop();
}
