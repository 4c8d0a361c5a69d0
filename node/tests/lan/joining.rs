//! A machine that joins: by one line from another one, and stays a member by itself.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use granary::admission;
use granary::identity::Identity;
use granary_protocol::certificate::{Certificate, SignedCertificate, UnixTime};
use granary_protocol::ticket::{Refused, Request, Ticket};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use serde_json::Value;

use crate::machine::{Lan, Machine};
use crate::nix;
use crate::process::{Finished, wait_for};

const OFFERED: Duration = Duration::from_secs(10);
const JOINED: Duration = Duration::from_secs(30);
const DAY: u64 = 86_400;
/// Several times those that are attended to at once.
const CROWD: usize = 100;

/// A member with the mesh key in its state folder.
fn admitting(lan: &Lan, name: &str) -> Machine {
    let mut machine = lan.stranger(name);
    machine.nix.take_host_release();
    machine.admit(&lan.mesh, &["--name", name]);
    let key = machine.state().join("mesh.key");
    fs::copy(&lan.mesh.secret_file, key).expect("copy the mesh key");
    machine
}

/// A machine that knows of no mesh.
fn newcomer(lan: &Lan, name: &str) -> Machine {
    let mut machine = lan.stranger(name);
    machine.settings.mesh_key = None;
    machine
}

fn ticket(at: &Machine, more: &[&str]) -> String {
    let command = [&["mesh", "ticket"], more].concat();
    at.granary(&command).expect_success()
}

fn join(machine: &Machine, ticket: &str) -> Finished {
    machine.granary(&["join", ticket, "--name", &machine.name])
}

fn unix_time() -> u64 {
    granary::clock::unix_time().0
}

#[test]
fn a_second_machine_joins_with_one_line_and_substitutes() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    let path = desktop.build(&nix::folder_of("shared", 100_000));
    desktop.start();
    let mut laptop = newcomer(&lan, "laptop");
    let said = join(&laptop, &ticket(&desktop, &[])).expect_success();
    assert!(said.contains("as laptop (share,vouch)"), "{said}");
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    laptop.wait_offered(&path, OFFERED);
    let file = laptop.nix.configuration_file();
    let file = file.to_str().expect("a path of letters");
    laptop
        .granary(&["use", "--nix-conf", file])
        .expect_success();
    laptop.realise(&path).expect_success();
    laptop.assert_sound();
    assert_eq!(desktop.status().linked(), [laptop.peer_id.as_str()]);
}

#[test]
fn a_ticket_is_good_for_what_it_says_and_not_for_who_was_put_out() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    desktop.start();
    let once = ticket(&desktop, &["--allow", "share"]);
    let twice = ticket(&desktop, &["--uses", "2"]);
    // Last, since making a ticket forgets those that have expired.
    let short = ticket(&desktop, &["--expires", "0s"]);
    let (first, second) = (newcomer(&lan, "first"), newcomer(&lan, "second"));

    let said = join(&first, &once).expect_success();
    assert!(said.contains("(share)"), "{said}");
    // An answer that got lost may be asked for again; by the same machine.
    join(&first, &once).expect_success();
    let refused = |machine: &Machine, ticket: &str, reason: &str| {
        let finished = join(machine, ticket);
        assert!(
            !finished.status.success() && finished.stderr.contains(reason),
            "{finished}"
        );
        assert!(!machine.state().join("certificate").exists());
    };
    refused(&second, &once, "used as often as it may be");
    refused(&second, &short, "the ticket has expired");
    let mut forged = Ticket::from_text(&twice).expect("a ticket");
    forged.secret = Some(admission::new_secret().expect("randomness"));
    refused(
        &second,
        &forged.to_text().expect("a ticket"),
        "is not known there",
    );
    // Who answers must have the mesh key: nobody else is told the secret.
    let mut misled = Ticket::from_text(&twice).expect("a ticket");
    let key = lan.other_mesh().public;
    misled.mesh = key.parse().expect("a key");
    refused(
        &second,
        &misled.to_text().expect("a ticket"),
        "was expected, closed",
    );

    let key = lan.mesh.secret_file.to_str().expect("a path of letters");
    let revoke = ["mesh", "revoke", &second.peer_id, "--key-file", key];
    desktop.granary(&revoke).expect_success();
    refused(&second, &twice, "was put out of the mesh");
    let status = desktop.status();
    for reason in ["used_ticket", "expired_ticket", "unknown_ticket", "revoked"] {
        assert_eq!(status.refusals_of(&format!("join_{reason}")), 1, "{status}");
    }
}

/// A certificate of this machine, which began and ends so many days from now.
fn certificate(lan: &Lan, machine: &Machine, began: u64, ends: i64) -> SignedCertificate {
    let mesh = admission::read_mesh_key(&lan.mesh.secret_file).expect("a mesh key");
    let now = unix_time();
    Certificate {
        peer: machine.peer_id.parse().expect("a peer id"),
        name: machine.name.clone(),
        permissions: "share,vouch".parse().expect("permissions"),
        not_before: UnixTime(now - began * DAY),
        not_after: UnixTime(now.saturating_add_signed(ends * DAY as i64)),
        serial: 1,
    }
    .sign(&mesh)
    .expect("a certificate")
}

fn put(machine: &Machine, certificate: &SignedCertificate) {
    let file = machine.state().join("certificate");
    fs::write(file, certificate.to_text()).expect("write the certificate");
}

fn held(machine: &Machine) -> Certificate {
    let text = fs::read_to_string(machine.state().join("certificate")).expect("a certificate");
    let certificate = SignedCertificate::from_text(&text).expect("a certificate");
    certificate.claims().expect("a certificate")
}

#[test]
fn certificates_are_renewed_before_they_end_and_for_a_while_after() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    desktop.settings.certificate = None;
    put(&desktop, &certificate(&lan, &desktop, 25, 5));
    desktop.start();
    let mut ending = newcomer(&lan, "ending");
    let mut ended = newcomer(&lan, "ended");
    for machine in [&ending, &ended] {
        join(machine, &ticket(&desktop, &[])).expect_success();
    }
    put(&ending, &certificate(&lan, &ending, 29, 1));
    put(&ended, &certificate(&lan, &ended, 40, -10));
    ending.start();
    ended.start();
    for machine in [&desktop, &ending, &ended] {
        wait_for("the certificate is renewed", JOINED, || {
            let held = held(machine);
            match held.not_after.0 > unix_time() + 29 * DAY {
                true => Ok(()),
                false => Err(format!("{held:?}")),
            }
        });
        assert_eq!(held(machine).name, machine.name);
    }
    // It is shown without a restart.
    ended.wait_linked(&[&desktop, &ending]);

    // One that ended long ago is gone for good, as is one of somebody else.
    let identity = Identity::load_or_create(&ended.state().join("identity")).expect("an identity");
    let admits = [desktop.at(crate::machine::TRANSFER_PORT).to_string()];
    let mesh = lan.mesh.public.parse().expect("a key");
    let ask = |certificate: SignedCertificate| {
        let request = Request::Renew { certificate };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let ask = || runtime.block_on(admission::ask(&identity, &mesh, &admits, &request));
        desktop.namespace.inside(ask)
    };
    for lost in [
        certificate(&lan, &ended, 90, -31),
        certificate(&lan, &ending, 1, 1),
    ] {
        let error = ask(lost).expect_err("refused");
        let is_refused = matches!(
            error,
            admission::AskError::Refused {
                refused: Refused::NoMember,
                ..
            }
        );
        assert!(is_refused, "{error}");
    }
    assert!(ask(certificate(&lan, &ended, 1, 1)).is_ok());
}

#[test]
fn a_node_joins_by_itself_with_a_ticket_from_a_file() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    desktop.settings.mdns = false;
    desktop.start();
    let mut laptop = newcomer(&lan, "laptop");
    // The ticket also says where the others are.
    laptop.settings.mdns = false;
    let file = laptop.state().join("ticket-from-outside");
    fs::write(&file, ticket(&desktop, &[])).expect("write the ticket");
    laptop.settings.ticket_file = Some(file);
    laptop.start();
    laptop.wait_linked(&[&desktop]);
}

#[test]
fn a_crowd_at_the_door_keeps_nobody_from_transfers() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    let path = desktop.build(&nix::folder_of("wanted", 100_000));
    desktop.start();
    let mut laptop = newcomer(&lan, "laptop");
    join(&laptop, &ticket(&desktop, &[])).expect_success();
    laptop.start();
    laptop.wait_offered(&path, OFFERED);
    // Each proves a key of its own, asks to join, and then says nothing, or nonsense.
    let address = desktop.at(crate::machine::TRANSFER_PORT);
    let stranger = lan.plug("stranger");
    let crowd: Vec<_> = (0..CROWD)
        .map(|number| stranger.inside(|| knock(address, number)))
        .collect();
    let url = laptop.narinfo(&path).line("URL").expect("a URL").to_owned();
    assert_eq!(laptop.get(&format!("/{url}")).status, 200);
    drop(crowd);
    // The door is open again when the crowd is gone.
    let other = newcomer(&lan, "other");
    let ticket = ticket(&desktop, &[]);
    wait_for("a machine joins", JOINED, || {
        let finished = join(&other, &ticket);
        match finished.status.success() {
            true => Ok(()),
            false => Err(finished.to_string()),
        }
    });
}

#[test]
fn a_machine_without_a_ticket_is_admitted_by_a_person_who_compares_fingerprints() {
    let lan = Lan::new();
    let mut desktop = admitting(&lan, "desktop");
    desktop.start();
    let mut laptop = newcomer(&lan, "laptop");
    let address = desktop.at(crate::machine::TRANSFER_PORT).to_string();
    let key = lan.mesh.public.clone();
    let shown = |what: &str| -> Value {
        let said = desktop.granary(&["mesh", what, "--json"]).expect_success();
        serde_json::from_str(&said).expect("JSON")
    };
    let ask = |wait: &str| {
        let ask = ["join", "--at", &address, "--mesh-key", &key, "--wait", wait];
        laptop.granary(&[&ask[..], &["--name", "laptop"]].concat())
    };
    // Nobody says yes.
    let finished = ask("0s");
    assert!(
        !finished.status.success() && finished.stderr.contains("waits for a person"),
        "{finished}"
    );
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask("30s"));
        let waiting = &shown("pending")[0];
        assert_eq!(waiting["name"], "laptop");
        assert_eq!(waiting["was_put_out"], false);
        let fingerprint = waiting["fingerprint"].as_str().expect("a fingerprint");
        let admit = ["mesh", "admit", fingerprint, "--allow", "share"];
        desktop.granary(&admit).expect_success();
        let finished = asking.join().expect("the command ran");
        // The same on both screens, unless it was admitted before it could say so.
        assert!(
            finished.stderr.is_empty() || finished.stderr.contains(fingerprint),
            "{finished}"
        );
        let said = finished.expect_success();
        assert!(said.contains("as laptop (share)"), "{said}");
    });
    laptop.start();
    laptop.wait_linked(&[&desktop]);
    let members = shown("members");
    let names: Vec<_> = members.as_array().expect("a list").iter().collect();
    assert_eq!(names.len(), 2, "{members:#}");
    assert_eq!(names[0]["name"], "desktop");
    assert_eq!(names[1]["name"], "laptop");
    assert_eq!(names[1]["permissions"], "share");
    assert_eq!(names[1]["seen_seconds_ago"], 0);
    let left = names[1]["expires_in_seconds"].as_u64().expect("a number");
    assert!((29 * DAY..=30 * DAY).contains(&left), "{members:#}");
    let table = desktop.granary(&["mesh", "members"]).expect_success();
    assert!(
        table.contains("laptop") && table.contains(&laptop.peer_id),
        "{table}"
    );
}

/// Connects as somebody who wants to join; half of them then send a frame that is none.
fn knock(address: SocketAddr, number: usize) -> StreamOwned<ClientConnection, TcpStream> {
    let identity = libp2p::identity::Keypair::generate_ed25519();
    let mut config = libp2p_tls::make_client_config(&identity, None).expect("a configuration");
    config.alpn_protocols = vec![b"granary-join/1".to_vec()];
    let name = ServerName::try_from("node.invalid").expect("a name");
    let connection = ClientConnection::new(config.into(), name).expect("a connection");
    let stream = TcpStream::connect_timeout(&address, OFFERED).expect("the port is open");
    let mut stream = StreamOwned::new(connection, stream);
    let words: &[u8] = match number % 2 {
        0 => b"",
        _ => &[0xff; 64],
    };
    // The other side may have closed already.
    let _ = stream.write_all(words);
    let _ = stream.flush();
    stream
}
