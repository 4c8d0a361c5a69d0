//! Who gets in, by what, and who does not.

use super::*;
use crate::certificate::SignedCertificate;
use crate::signature::SecretKey;
use crate::ticket::Secret;

fn mesh() -> SecretKey {
    SecretKey::from_seed("home".parse().unwrap(), [1; 32])
}

fn secret(number: u8) -> Secret {
    Secret::from_bytes([number; 16])
}

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

fn issued(uses: u32) -> Issued {
    let permissions = "share,vouch,push:main".parse().unwrap();
    Issued::new(&secret(1), UnixTime(100), uses, permissions, 3600)
}

#[test]
fn a_ticket_admits_as_many_machines_as_it_says_and_each_as_often_as_it_asks() {
    let mut tickets = Tickets::default();
    tickets.add(issued(2), UnixTime(0)).unwrap();
    for machine in [1, 2, 1, 2] {
        let got = tickets.redeem(&secret(1), peer(machine), UnixTime(99));
        assert_eq!(got.unwrap().certificate_seconds, 3600);
    }
    let mut refused = |secret, machine, now| {
        tickets
            .redeem(&secret, peer(machine), UnixTime(now))
            .unwrap_err()
    };
    assert_eq!(refused(secret(1), 3, 99), Refused::UsedUp);
    assert_eq!(refused(secret(1), 1, 100), Refused::Expired);
    assert_eq!(refused(secret(2), 1, 0), Refused::UnknownTicket);
}

#[test]
fn tickets_survive_their_text_which_tells_no_secret() {
    let mut tickets = Tickets::default();
    tickets.add(issued(2), UnixTime(0)).unwrap();
    tickets.redeem(&secret(1), peer(1), UnixTime(0)).unwrap();
    let text = tickets.to_text();
    assert_eq!(Tickets::from_text(&text), Ok(tickets));
    assert!(!text.contains(&data_encoding::HEXLOWER.encode(&[1; 16])));
    let wrong = Tickets::from_text(&format!("{text}nonsense\n"));
    assert_eq!(wrong, Err(NotTickets { line: 2 }));
}

#[test]
fn expired_tickets_make_room_and_others_do_not() {
    let mut tickets = Tickets::default();
    for _ in 0..TICKETS_MAX {
        tickets.add(issued(1), UnixTime(0)).unwrap();
    }
    assert!(tickets.add(issued(1), UnixTime(99)).is_err());
    tickets.add(issued(1), UnixTime(100)).unwrap();
    assert_eq!(tickets.to_text().lines().count(), 1);
}

fn certificate(began: u64, ends: u64) -> SignedCertificate {
    Certificate {
        peer: peer(1),
        name: "desk".into(),
        permissions: "share".parse().unwrap(),
        not_before: UnixTime(began),
        not_after: UnixTime(ends),
        serial: 1,
    }
    .sign(&mesh())
    .unwrap()
}

fn put_out(at: u64) -> Revocations {
    let mut list = Revocations::default();
    list.revoke(peer(1), UnixTime(at)).unwrap();
    list
}

fn ask(
    books: &mut Books,
    number: u8,
    revoked: Option<&Revocations>,
    now: u64,
) -> Result<Grant, Refused> {
    let name = format!("machine-{number}");
    let request = Request::Ask { name };
    let mesh = mesh().public_key();
    decide(books, peer(number), &request, &mesh, revoked, UnixTime(now))
}

fn grant() -> Grant {
    Grant {
        name: Some("laptop".into()),
        permissions: "share".parse().unwrap(),
        seconds: 3600,
    }
}

#[test]
fn a_certificate_is_renewed_in_time_and_for_a_while_after_unless_it_was_revoked() {
    let renew = |revoked: Option<&Revocations>, now: u64| {
        let request = Request::Renew {
            certificate: certificate(100, 200),
        };
        let mesh = mesh().public_key();
        let books = &mut Books::default();
        decide(books, peer(1), &request, &mesh, revoked, UnixTime(now))
    };
    let expected = Grant {
        name: Some("desk".into()),
        permissions: "share".parse().unwrap(),
        seconds: 100,
    };
    for now in [150, 200, 199 + RENEWAL_GRACE_SECONDS] {
        assert_eq!(renew(None, now), Ok(expected.clone()));
    }
    let late = 200 + RENEWAL_GRACE_SECONDS;
    assert_eq!(renew(None, late), Err(Refused::NoMember));
    assert_eq!(renew(Some(&put_out(100)), 150), Err(Refused::Revoked));
    assert_eq!(renew(Some(&put_out(99)), 150), Ok(expected));
}

#[test]
fn a_machine_without_a_ticket_waits_until_a_person_grants_it() {
    let mut books = Books::default();
    assert_eq!(ask(&mut books, 1, None, 10), Err(Refused::Pending));
    assert_eq!(ask(&mut books, 1, None, 20), Err(Refused::Pending));
    assert_eq!(books.pending.all().len(), 1);
    assert_eq!(
        books.pending.all()[0].at,
        UnixTime(10),
        "no write each time"
    );
    assert!(books.pending.grant(&peer(1), grant(), UnixTime(30)));
    assert!(!books.pending.grant(&peer(2), grant(), UnixTime(30)));
    // Again, for an answer may get lost; also after a restart, and nobody else.
    let text = books.pending.to_text();
    books.pending = Pending::from_text(&text).unwrap();
    assert_eq!(ask(&mut books, 1, None, 40), Ok(grant()));
    assert_eq!(ask(&mut books, 1, None, 41), Ok(grant()));
    assert_eq!(ask(&mut books, 2, None, 40), Err(Refused::Pending));
    // What was granted does not outlast being put out.
    assert_eq!(
        ask(&mut books, 1, Some(&put_out(50)), 60),
        Err(Refused::Pending)
    );
    assert_eq!(ask(&mut books, 1, None, 61), Err(Refused::Pending));
}

#[test]
fn those_who_wait_are_few_and_forgotten_after_a_day() {
    let mut books = Books::default();
    for number in 0..PENDING_MAX as u8 {
        assert_eq!(ask(&mut books, number, None, 10), Err(Refused::Pending));
    }
    assert_eq!(ask(&mut books, 99, None, 10), Err(Refused::Crowded));
    assert_eq!(ask(&mut books, 1, None, 11), Err(Refused::Pending));
    assert_eq!(
        ask(&mut books, 99, None, 10 + 86_400),
        Err(Refused::Pending)
    );
    assert_eq!(books.pending.all().len(), 1);
}

#[test]
fn a_text_of_those_who_wait_is_read_strictly() {
    let id = peer(1);
    for line in [
        "nonsense",
        &format!("{id}"),
        &format!("{id} 1 a share"),
        &format!("{id} 1 a 2 share x"),
    ] {
        assert_eq!(
            Pending::from_text(line),
            Err(NotPending { line: 1 }),
            "{line}"
        );
    }
    let nameless = format!("{id} 7 ?\n");
    let read = Pending::from_text(&nameless).unwrap();
    assert_eq!(
        (read.all()[0].name.clone(), read.to_text()),
        (None, nameless)
    );
}

#[test]
fn a_fingerprint_differs_by_machine_and_by_mesh() {
    let home = mesh().public_key();
    let office = SecretKey::from_seed("home".parse().unwrap(), [2; 32]).public_key();
    let text = fingerprint(&home, &peer(1));
    assert_eq!(text.len(), FINGERPRINT_LETTERS);
    assert_eq!(text.matches('-').count(), 3);
    assert_ne!(text, fingerprint(&home, &peer(2)));
    assert_ne!(text, fingerprint(&office, &peer(1)));
}
