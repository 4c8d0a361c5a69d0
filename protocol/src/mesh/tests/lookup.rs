//! From a hash to a narinfo.

use super::*;

#[test]
fn a_withdrawn_path_is_not_found_any_more() {
    let mut lan = Lan::new(2);
    lan.share(0, &[7]);
    lan.introduce_everyone();
    assert!(lan.is_found(1, 7));
    lan.input(
        0,
        Input::LocalChanged {
            added: vec![],
            removed: vec![hash(7)],
        },
    );
    lan.run(Duration::from_millis(100));
    assert_eq!(lan.look_up(1, 7), LookupOutcome::NotFound);
}

#[test]
fn have_not_drops_the_hint_and_the_next_holder_is_asked() {
    let mut lan = Lan::new(3);
    lan.share(0, &[7]);
    lan.share(1, &[7]);
    lan.introduce_everyone();
    // The first holder lost it without noticing.
    lan.nodes[0].narinfos.clear();
    assert!(lan.is_found(2, 7));
    assert!(!lan.knows(2, 0, 7) && lan.knows(2, 1, 7));
}

#[test]
fn what_nobody_holds_is_answered_without_a_packet() {
    let mut lan = Lan::new(3);
    lan.introduce_everyone();
    let sent = lan.nodes[0].sent.len();
    lan.input(
        0,
        Input::Lookup {
            lookup: LookupId(1),
            hash: hash(9),
        },
    );
    assert_eq!(
        lan.nodes[0].outcomes,
        [(LookupId(1), LookupOutcome::NotFound)]
    );
    assert_eq!(lan.nodes[0].sent.len(), sent);
}

#[test]
fn a_burst_of_lookups_travels_as_one_message() {
    let mut lan = Lan::new(2);
    lan.share(0, &(0..100).collect::<Vec<u8>>());
    lan.introduce_everyone();
    for path in 0..100 {
        lan.input(
            1,
            Input::Lookup {
                lookup: LookupId(path.into()),
                hash: hash(path),
            },
        );
    }
    lan.run(Duration::from_secs(1));
    assert_eq!(lan.nodes[1].outcomes.len(), 100);
    let is_found =
        |(_, outcome): &(LookupId, LookupOutcome)| matches!(outcome, LookupOutcome::Found { .. });
    assert!(lan.nodes[1].outcomes.iter().all(is_found));
    let asked = lan.nodes[1]
        .sent
        .iter()
        .filter(|(_, kind)| *kind == "lookup")
        .count();
    assert_eq!(asked, 1);
}

#[test]
fn those_who_wait_for_the_same_path_share_one_question() {
    let mut lan = Lan::new(2);
    lan.share(0, &[7]);
    lan.introduce_everyone();
    for number in 0..10 {
        lan.input(
            1,
            Input::Lookup {
                lookup: LookupId(number),
                hash: hash(7),
            },
        );
    }
    lan.input(
        1,
        Input::CancelLookup {
            lookup: LookupId(3),
            hash: hash(7),
        },
    );
    lan.run(Duration::from_secs(1));
    assert_eq!(lan.nodes[1].outcomes.len(), 9);
    assert_eq!(
        lan.nodes[1]
            .sent
            .iter()
            .filter(|(_, kind)| *kind == "lookup")
            .count(),
        1
    );
}

#[test]
fn a_silent_peer_is_hedged_and_a_lookup_always_ends() {
    let mut lan = Lan::new(3);
    lan.share(0, &[7, 8]);
    lan.share(1, &[7]);
    lan.introduce_everyone();
    lan.nodes[0].is_deaf = true;
    assert!(lan.is_found(2, 7), "the other holder answers");
    lan.input(
        2,
        Input::Lookup {
            lookup: LookupId(99),
            hash: hash(8),
        },
    );
    lan.run(Duration::from_millis(1000));
    assert_eq!(
        lan.nodes[2].outcomes.last(),
        Some(&(LookupId(99), LookupOutcome::NotFound))
    );
}

#[test]
fn an_untrusted_signature_is_not_found_and_nobody_is_blamed() {
    let mut lan = Lan::new(2);
    lan.share(0, &[7]);
    let stranger = SecretKey::from_seed("stranger".parse().unwrap(), [9; 32]);
    let text = narinfo(7);
    let mut parsed = NarInfo::parse(&text, &StoreDir::default()).unwrap();
    parsed.signatures = vec![stranger.sign(b"anything")];
    lan.nodes[0]
        .narinfos
        .insert(hash(7), parsed.to_text(&StoreDir::default()));
    lan.introduce_everyone();
    assert_eq!(lan.look_up(1, 7), LookupOutcome::NotFound);
    assert!(
        lan.nodes[1].mind.peers(&lan.nodes[1].index, lan.now)[0]
            .quarantine
            .is_none()
    );
}

#[test]
fn a_narinfo_of_another_path_puts_the_liar_in_quarantine() {
    let mut lan = Lan::new(3);
    lan.share(0, &[7]);
    lan.share(1, &[7]);
    lan.introduce_everyone();
    lan.nodes[0].narinfos.insert(hash(7), narinfo(8));
    assert!(lan.is_found(2, 7), "the honest holder answers");
    let views = lan.nodes[2].mind.peers(&lan.nodes[2].index, lan.now);
    assert_eq!(
        views[0].quarantine.unwrap().1,
        "sent a narinfo of another path"
    );
    assert!(views[1].quarantine.is_none());
    // It heals.
    lan.run(Duration::from_secs(31));
    assert!(
        lan.nodes[2].mind.peers(&lan.nodes[2].index, lan.now)[0]
            .quarantine
            .is_none()
    );
}

#[test]
fn lies_in_one_message_are_one_offence() {
    let mut alone = Alone::new(0);
    alone.admit(1, (1..=9).map(|n| HashPrefix::from(&hash(n))).collect());
    for path in 1..=9 {
        let (lookup, hash) = (LookupId(path.into()), hash(path));
        alone.input(Input::Lookup { lookup, hash });
    }
    alone.wait(Duration::from_millis(5));
    let answer = |path| Answer {
        hash: hash(path),
        narinfo: Some("nonsense".into()),
    };
    let (request, answers) = (0, (1..=9).map(answer).collect());
    alone.receive(1, Message::Answers { request, answers });
    let (left, _) = alone.view(1).unwrap().quarantine.unwrap();
    assert_eq!(left, Duration::from_secs(30));
}

#[test]
fn a_member_that_asks_without_end_is_read_for_a_bounded_number_of_times() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    let lookup = |request| Message::Lookup {
        request,
        hashes: vec![hash(1)],
    };
    let reads = |outputs: Vec<Output>| {
        let is_read = |output: &&Output| matches!(output, Output::ReadLocal { .. });
        outputs.iter().filter(is_read).count()
    };
    let asked: usize = (0..1000)
        .map(|request| reads(alone.receive(1, lookup(request))))
        .sum();
    assert_eq!(asked, 64);
    let answer = |alone: &mut Alone, request| {
        let (peer, answers) = (
            id(1),
            vec![Answer {
                hash: hash(1),
                narinfo: None,
            }],
        );
        alone.input(Input::LocalAnswers {
            peer,
            request,
            answers,
        })
    };
    assert_eq!(answer(&mut alone, 0).len(), 1);
    assert_eq!(reads(alone.receive(1, lookup(1000))), 1);
    // What was read over an earlier link is no answer on this one.
    alone.input(Input::LinkDown { peer: id(1) });
    alone.admit(1, vec![]);
    assert_eq!(answer(&mut alone, 5), []);
}
