//! What a member built itself: whose word counts for it, and how long.

use super::*;
use crate::narinfo::Proof;
use crate::revocation::Revocations;
use crate::voucher::Voucher;

/// What this node says of a path that it built, which no builder's key signed.
fn vouched(number: usize, path: u8) -> String {
    let dir = StoreDir::default();
    let mut info = NarInfo::parse(&narinfo(path), &dir).unwrap();
    let voucher = Voucher::new(key(number));
    info.signatures = vec![voucher.sign(&info.fingerprint(&dir))];
    info.to_text(&dir)
}

/// Lets a node share a path with this narinfo.
fn share(lan: &mut Lan, number: usize, path: u8, text: &str) {
    lan.share(number, &[path]);
    lan.nodes[number].narinfos.insert(hash(path), text.into());
}

/// A LAN on which only these nodes may vouch.
fn lan(count: usize, vouching: &[usize]) -> Lan {
    Lan::with(count, |number| {
        let mut claims = certificate(id(number), &mesh_key("home")).claims().unwrap();
        claims.permissions.vouch = vouching.contains(&number);
        claims.sign(&mesh_key("home")).unwrap()
    })
}

#[test]
fn what_a_member_that_may_vouch_built_is_found() {
    let mut lan = lan(3, &[0]);
    share(&mut lan, 0, 7, &vouched(0, 7));
    share(&mut lan, 1, 8, &vouched(1, 8));
    lan.introduce_everyone();
    assert!(lan.is_found(2, 7));
    assert_eq!(lan.look_up(2, 8), LookupOutcome::NotFound);
    // No lie: it was only not allowed to say so.
    assert!(lan.nodes[2].admitted.contains(&id(1)));
}

#[test]
fn who_does_not_trust_members_believes_keys_alone() {
    let mut lan = lan(2, &[0]);
    let config = Config {
        trusts_members: false,
        ..config(1, certificate(id(1), &mesh_key("home")))
    };
    lan.nodes[1].mind = Mesh::new(id(1), config, 1, lan.now);
    lan.input(1, Input::ClockRead { unix: START });
    lan.input(1, Input::LocalPaths { all: vec![] });
    share(&mut lan, 0, 7, &vouched(0, 7));
    lan.share(0, &[8]);
    lan.introduce_everyone();
    assert_eq!(lan.look_up(1, 7), LookupOutcome::NotFound);
    assert!(lan.is_found(1, 8));
}

#[test]
fn a_voucher_ends_with_its_member_whoever_passes_it_on() {
    let mut lan = lan(3, &[0]);
    // The second has it from the first, and its own word would not count.
    share(&mut lan, 1, 7, &vouched(0, 7));
    lan.introduce_everyone();
    assert!(lan.is_found(2, 7));
    let mut list = Revocations {
        number: 1,
        ..Revocations::default()
    };
    list.revoke(id(0), START).unwrap();
    let list = list.sign(&mesh_key("home")).unwrap();
    lan.input(1, Input::Revocations { list });
    lan.run(Duration::from_secs(1));
    assert!(lan.nodes[2].admitted.contains(&id(1)) && lan.knows(2, 1, 7));
    assert_eq!(lan.look_up(2, 7), LookupOutcome::NotFound);
}

#[test]
fn a_signature_by_a_trusted_key_outlasts_the_voucher_that_came_first() {
    let mut lan = lan(3, &[0]);
    share(&mut lan, 0, 7, &vouched(0, 7));
    lan.introduce_everyone();
    assert!(lan.is_found(2, 7));
    lan.share(1, &[7]);
    lan.run(Duration::from_secs(1));
    lan.unlink(0, 2);
    lan.is_gone.insert(0);
    lan.run(Duration::from_secs(1));
    let LookupOutcome::Found { narinfo, .. } = lan.look_up(2, 7) else {
        panic!("the other one holds it");
    };
    let signer = builder().public_key().name().clone();
    assert_eq!(*narinfo.proof(), Proof::Signed(signer));
}
