//! Who was put out: how the list spreads, and what it ends.

use super::*;
use crate::revocation::{Revocations, SignedRevocations};

/// A list that voids every certificate of these nodes that these tests make.
fn list(number: u64, revoked: &[usize]) -> SignedRevocations {
    list_by("home", number, revoked)
}

fn list_by(mesh: &str, number: u64, revoked: &[usize]) -> SignedRevocations {
    let mut list = Revocations {
        number,
        ..Revocations::default()
    };
    for node in revoked {
        list.revoke(id(*node), START).unwrap();
    }
    list.sign(&mesh_key(mesh)).unwrap()
}

fn give(lan: &mut Lan, number: usize, list: SignedRevocations) {
    lan.input(number, Input::Revocations { list });
    lan.run(Duration::from_secs(1));
}

fn refused(lan: &Lan, number: usize, refusal: Refusal) -> bool {
    let refusals = lan.refusals(number);
    refusals.iter().any(|(one, _)| *one == refusal)
}

#[test]
fn a_revoked_member_is_hung_up_on_by_everybody_and_forgotten() {
    let mut lan = Lan::new(4);
    lan.share(3, &[1]);
    lan.introduce_everyone();
    assert!(lan.is_found(1, 1));
    give(&mut lan, 0, list(1, &[3]));
    for number in 0..3 {
        assert!(!lan.nodes[number].admitted.contains(&id(3)), "{number}");
        assert!(refused(&lan, number, Refusal::Revoked), "{number}");
        assert_eq!(lan.nodes[number].kept, Some(list(1, &[3])), "{number}");
        assert!(!lan.knows(number, 3, 1), "{number} still counts on it");
        assert_eq!(lan.nodes[number].admitted.len(), 2);
    }
    assert!(!lan.is_found(1, 1));
    // It comes back, and is refused again.
    lan.run(Duration::from_secs(300));
    assert!(!lan.nodes[0].admitted.contains(&id(3)));
}

#[test]
fn whoever_was_away_hears_of_it_from_the_first_member_that_knows() {
    let mut lan = Lan::new(3);
    lan.meet(1, 2);
    assert!(lan.nodes[1].admitted.contains(&id(2)));
    // The list is given while nobody else can be reached.
    give(&mut lan, 0, list(4, &[2]));
    lan.meet(0, 1);
    assert_eq!(lan.nodes[1].kept, Some(list(4, &[2])));
    assert!(!lan.nodes[1].admitted.contains(&id(2)));
}

#[test]
fn an_older_list_is_refused_and_the_newer_one_is_given_instead() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    give(&mut lan, 0, list(5, &[7]));
    give(&mut lan, 1, list(4, &[]));
    assert_eq!(lan.nodes[1].kept, Some(list(5, &[7])));
    assert!(refused(&lan, 1, Refusal::OldRevocations));
    // A member that shows an old one stays a member, and is told better.
    let message = Message::Revocations(list(3, &[]));
    lan.input(
        0,
        Input::Received {
            peer: id(1),
            message,
        },
    );
    assert!(refused(&lan, 0, Refusal::OldRevocations));
    assert!(lan.nodes[0].admitted.contains(&id(1)));
    assert_eq!(lan.nodes[0].kept, Some(list(5, &[7])));
}

#[test]
fn a_list_that_the_mesh_key_did_not_sign_changes_nothing_but_its_sender() {
    let mut lan = Lan::new(3);
    lan.introduce_everyone();
    let forged = list_by("office", 9, &[2]);
    give(&mut lan, 0, forged.clone());
    assert_eq!(lan.nodes[0].kept, None);
    let message = Message::Revocations(forged);
    lan.input(
        0,
        Input::Received {
            peer: id(1),
            message,
        },
    );
    assert_eq!(lan.nodes[0].kept, None);
    assert!(lan.nodes[0].admitted.contains(&id(2)));
    assert!(refused(&lan, 0, Refusal::Garbage));
    assert!(!lan.nodes[0].admitted.contains(&id(1)));
}

#[test]
fn a_certificate_issued_after_the_revocation_lets_a_machine_in_again() {
    let later = |number: usize| {
        let mut claims = certificate(id(number), &mesh_key("home")).claims().unwrap();
        if number == 1 {
            claims.not_before = UnixTime(START.0 + 1);
        }
        claims.sign(&mesh_key("home")).unwrap()
    };
    let mut lan = Lan::with(2, later);
    give(&mut lan, 0, list(1, &[1]));
    lan.introduce_everyone();
    assert!(lan.nodes[0].admitted.contains(&id(1)));
}

#[test]
fn a_transfer_from_a_revoked_member_is_stopped_and_goes_on_elsewhere() {
    let mut lan = Lan::new(3);
    lan.share(1, &[1]);
    lan.share(2, &[1]);
    lan.introduce_everyone();
    let LookupOutcome::Found { narinfo, .. } = lan.look_up(0, 1) else {
        panic!("it is there");
    };
    let fetch = FetchId(1);
    lan.input(0, Input::Fetch { fetch, narinfo });
    let (_, attempt, from, _) = *lan.nodes[0].transfers.last().unwrap();
    let (first, other) = (number_of(from), 3 - number_of(from));
    give(&mut lan, 0, list(1, &[first]));
    assert_eq!(lan.nodes[0].stopped, [(fetch, attempt)]);
    let (.., next, _) = *lan.nodes[0].transfers.last().unwrap();
    assert_eq!(next, id(other));
}

#[test]
fn a_member_that_asks_for_the_list_again_and_again_is_given_it_once() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    give(&mut lan, 0, list(5, &[7]));
    lan.nodes[0].sent.clear();
    let ask = |lan: &mut Lan| {
        let message = Message::RevocationsKnown { number: 0 };
        let peer = id(1);
        lan.input(0, Input::Received { peer, message });
    };
    let given = |lan: &Lan| {
        let sent = lan.nodes[0].sent.iter();
        sent.filter(|(_, kind)| *kind == "revocations").count()
    };
    for _ in 0..100 {
        ask(&mut lan);
    }
    assert_eq!(given(&lan), 0, "it was given when it was news");
    // Whoever comes back may have forgotten.
    lan.unlink(0, 1);
    lan.run(Duration::from_secs(60));
    assert!(lan.nodes[0].admitted.contains(&id(1)));
    for _ in 0..100 {
        ask(&mut lan);
    }
    assert_eq!(given(&lan), 1);
    // And a newer one is another.
    give(&mut lan, 0, list(6, &[7]));
    assert_eq!(given(&lan), 2);
}
