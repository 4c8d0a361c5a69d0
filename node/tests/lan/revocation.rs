//! A member that is put out: gone within seconds, on both planes, and for good.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::http;
use crate::machine::{Lan, Machine, TRANSFER_PORT};
use crate::nix;
use crate::process::{Finished, wait_for};

const OFFERED: Duration = Duration::from_secs(10);
/// The promise.
const CUT: Duration = Duration::from_secs(5);
/// A node that lost its links looks for others again within 25 s.
const BACK: Duration = Duration::from_secs(40);
/// Beyond what both ends of a connection buffer, so that most of it is not sent yet.
const LARGE_BYTES: usize = 48_000_000;

type Connection = StreamOwned<ClientConnection, TcpStream>;

/// Connects to a transfer port with the machine's own identity, and asks for something.
fn ask(machine: &Machine, address: SocketAddr, target: &str) -> Connection {
    let mut config =
        libp2p_tls::make_client_config(&machine.keypair(), None).expect("client configuration");
    config.alpn_protocols = vec![b"granary/1".to_vec()];
    let name = ServerName::try_from("node.invalid").expect("a name");
    let connection = ClientConnection::new(config.into(), name).expect("client connection");
    let stream = machine
        .namespace
        .inside(|| TcpStream::connect_timeout(&address, CUT))
        .expect("the port is open");
    stream.set_read_timeout(Some(CUT)).expect("set timeout");
    let mut connection = StreamOwned::new(connection, stream);
    // The other side may have closed already.
    let _ = connection.write_all(http::request(address, target).as_bytes());
    connection
}

/// How many bytes still come until the other side hangs up; panics when it just falls silent.
fn rest_of(mut connection: Connection) -> usize {
    let mut buffer = vec![0; 64 * 1024];
    let mut count = 0;
    loop {
        match connection.read(&mut buffer) {
            Ok(0) => return count,
            Ok(length) => count += length,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the connection stayed open, {count} bytes came")
            }
            Err(_) => return count,
        }
    }
}

fn revoke(lan: &Lan, at: &Machine, member: &str) -> Finished {
    let key = lan.mesh.secret_file.to_str().expect("a path of letters");
    at.granary(&["mesh", "revoke", member, "--key-file", key])
}

fn wait_refused(at: &Machine, before: u64) {
    wait_for("who was put out is refused", BACK, || {
        let status = at.status();
        match status.refusals_of("revoked") > before {
            true => Ok(()),
            false => Err(status.to_string()),
        }
    });
}

#[test]
fn a_revoked_member_is_cut_on_both_planes_within_seconds_and_stays_out() {
    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let mut laptop = lan.machine("laptop");
    let mut lost = lan.builder("lost");
    lost.admit(&lan.mesh, &["--name", "lost-laptop"]);
    let large = desktop.build(&nix::folder_of("large", LARGE_BYTES));
    let path = lost.build(&nix::folder_of("of-the-lost", 100_000));
    desktop.start();
    laptop.start();
    lost.start();
    desktop.wait_linked(&[&laptop, &lost]);
    laptop.wait_linked(&[&desktop, &lost]);
    laptop.wait_offered(&path, OFFERED);
    lost.wait_offered(&large, OFFERED);

    // It has begun to fetch what the desktop has.
    let url = lost.narinfo(&large).line("URL").expect("a URL").to_owned();
    let nar = format!("/{url}");
    let mut download = ask(&lost, desktop.at(TRANSFER_PORT), &nar);
    let mut first = [0; 1000];
    download.read_exact(&mut first).expect("a member is served");
    assert!(first.starts_with(b"HTTP/1.1 200"));

    let unknown = revoke(&lan, &laptop, "nobody");
    assert!(
        unknown.stderr.contains("no peer known here is called"),
        "{unknown}"
    );
    // Whoever has the key may do it, on any machine.
    let said = revoke(&lan, &laptop, "lost-laptop").expect_success();
    assert_eq!(said, format!("revoked: {}", lost.peer_id));
    laptop.wait_linked(&[&desktop]);
    let (elapsed, ()) = wait_for("the desktop hangs up", CUT, || {
        let status = desktop.status();
        match status.linked() == [laptop.peer_id.as_str()] {
            true => Ok(()),
            false => Err(status.to_string()),
        }
    });
    println!("cut {elapsed:.2?} after the command had ended");
    laptop.wait_gone(&path, CUT);
    let got = rest_of(download);
    assert!(got < LARGE_BYTES, "the transfer ran to its end");
    assert_eq!(rest_of(ask(&lost, desktop.at(TRANSFER_PORT), &nar)), 0);

    // The desktop has it on disk: nobody tells it again who was put out.
    let number = desktop.status().revocations();
    assert!(number > 0);
    laptop.stop();
    desktop.stop();
    desktop.start();
    assert_eq!(desktop.status().revocations(), number);
    wait_refused(&desktop, 0);
    assert!(desktop.status().linked().is_empty());

    // Nor does an older list undo it, wherever it comes from.
    let kept = desktop.state().join("revocations");
    let newest = std::fs::read(&kept).expect("a list of revocations");
    let old = lan.mesh.revocations(number - 1);
    std::fs::write(&kept, old).expect("replace the list");
    wait_for("the list is put back", CUT, || match std::fs::read(&kept) {
        Ok(list) if list == newest => Ok(()),
        other => Err(format!("{:?}", other.map(|list| list.len()))),
    });
    assert_eq!(desktop.status().refusals_of("old_revocations"), 1);
    wait_refused(&desktop, desktop.status().refusals_of("revoked"));
    assert!(desktop.status().linked().is_empty());
}
