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
    let [first, second] = lan.asked_in_order(2, 7)[..] else {
        panic!("two holders")
    };
    // The first holder lost it without noticing.
    lan.nodes[first].narinfos.clear();
    assert!(lan.is_found(2, 7));
    assert!(!lan.knows(2, first, 7) && lan.knows(2, second, 7));
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
    let [liar, honest] = lan.asked_in_order(2, 7)[..] else {
        panic!("two holders")
    };
    lan.nodes[liar].narinfos.insert(hash(7), narinfo(8));
    assert!(lan.is_found(2, 7), "the honest holder answers");
    let quarantine =
        |lan: &Lan, of: usize| lan.nodes[2].mind.peers(&lan.nodes[2].index, lan.now)[of].quarantine;
    let offence = quarantine(&lan, liar).unwrap().1;
    assert_eq!(offence, "sent a narinfo of another path");
    assert!(quarantine(&lan, honest).is_none());
    // It heals.
    lan.run(Duration::from_secs(31));
    assert!(quarantine(&lan, liar).is_none());
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

/// A mind that knows one peer nearby (1) and one far away (2), which both hold path 7.
fn near_and_far() -> Alone {
    let mut alone = Alone::new(0);
    alone.admit(1, prefixes([7]));
    let far = SocketAddr::from(([203, 0, 113, 9], 4727));
    alone.admit_at(2, far, prefixes([7]));
    alone
}

#[test]
fn the_local_network_is_asked_before_the_rest_of_the_world() {
    let mut alone = near_and_far();
    for seed in 0..20 {
        let hash = StorePathHash::from_bytes([seed; 20]);
        let providers = alone.mind.providers(&alone.index, &hash, alone.now);
        assert!(providers.is_empty() || providers == [id(1), id(2)]);
    }
    assert_eq!(asked_peers(&alone.look_up(7))[0].0, 1);
}

#[test]
fn an_answer_from_afar_waits_for_the_neighbour_within_its_own_window() {
    let check = |neighbour: Option<Option<u8>>, expected: u8| {
        let mut alone = near_and_far();
        let near = asked_peers(&alone.look_up(7))[0].1;
        let far = asked_peers(&alone.wait(Duration::from_millis(52)))[0].1;
        let text = Some(narinfo_of_build(7, 2, &[]));
        assert_eq!(ended(&alone.peer_says(2, far, 7, text)), []);
        let mut outputs = alone.wait(Duration::from_millis(40));
        assert_eq!(ended(&outputs), [], "the window is 50 ms");
        if let Some(answer) = neighbour {
            let text = answer.map(|build| narinfo_of_build(7, build, &[]));
            outputs = alone.peer_says(1, near, 7, text);
            assert_eq!(ended(&outputs).len(), 1, "at once");
        }
        outputs.extend(alone.wait(Duration::from_millis(10)));
        assert_eq!(ended(&outputs), [(7, Some(expected))]);
    };
    check(Some(Some(1)), 1);
    check(Some(None), 2);
    check(None, 2);
}

#[test]
fn a_neighbour_that_did_not_answer_the_last_time_is_not_waited_for() {
    let mut alone = near_and_far();
    alone.look_up(7);
    let far = asked_peers(&alone.wait(Duration::from_millis(52)))[0].1;
    alone.peer_says(2, far, 7, None);
    alone.wait(Duration::from_secs(1));
    let (after, operations) = (
        Cursor {
            epoch: 1,
            sequence: 1,
        },
        vec![Operation::Add(HashPrefix::from(&hash(7)))],
    );
    alone.receive(2, delta_of(2, after, operations));
    let outputs = alone.look_up(7);
    let [(2, far, _)] = asked_peers(&outputs)[..] else {
        panic!("who answers is asked first: {outputs:?}")
    };
    let outputs = alone.peer_says(2, far, 7, Some(narinfo(7)));
    assert_eq!(ended(&outputs), [(7, Some(7))]);
}

#[test]
fn the_next_is_asked_after_nine_of_ten_answers_of_the_last_would_have_come() {
    let mut alone = Alone::new(0);
    alone.admit(1, prefixes(1..=40));
    // Number 1 usually takes 100 ms.
    for path in 1..=20 {
        let request = asked_peers(&alone.look_up(path))[0].1;
        alone.wait(Duration::from_millis(if path % 7 == 0 { 110 } else { 100 }));
        alone.peer_says(1, request, path, Some(narinfo(path)));
    }
    assert_eq!(
        alone.view(1).unwrap().answers_within,
        Some(Duration::from_millis(110))
    );
    let far = SocketAddr::from(([203, 0, 113, 9], 4727));
    alone.admit_at(2, far, prefixes(1..=40));
    assert_eq!(asked_peers(&alone.look_up(30))[0].0, 1);
    let outputs = alone.wait(Duration::from_millis(109));
    assert_eq!(asked_peers(&outputs), []);
    let outputs = alone.wait(Duration::from_millis(3));
    assert_eq!(asked_peers(&outputs)[0].0, 2);
}

#[test]
fn equal_peers_share_the_questions_and_every_node_shares_them_out_differently() {
    let order_of = |seed: u64| {
        let mut alone = Alone::with(0, seed, &[]);
        for peer in 1..=8 {
            alone.admit(peer, prefixes(0..=255));
        }
        let first = |path: u8| alone.mind.providers(&alone.index, &hash(path), alone.now)[0];
        (0..=255).map(first).collect::<Vec<PeerId>>()
    };
    let firsts = order_of(1);
    for peer in 1..=8 {
        let share = firsts.iter().filter(|first| **first == id(peer)).count();
        assert!((16..=48).contains(&share), "{share} of 256 for one of 8");
    }
    assert_eq!(firsts, order_of(1));
    let differing = firsts
        .iter()
        .zip(order_of(2))
        .filter(|(one, other)| *one != other);
    assert!(differing.count() > 192);
}

#[test]
fn a_peer_with_much_to_answer_is_asked_after_its_equals() {
    let mut alone = Alone::new(0);
    alone.admit(1, prefixes(0..=99));
    for path in 0..=99 {
        let (lookup, hash) = (LookupId(path.into()), hash(path));
        alone.input(Input::Lookup { lookup, hash });
    }
    alone.admit(2, prefixes(0..=255));
    let after = Cursor {
        epoch: 1,
        sequence: 1,
    };
    let added = prefixes(100..=255).into_iter().map(Operation::Add);
    alone.receive(1, delta_of(1, after, added.collect()));
    let first = |path: u8| alone.mind.providers(&alone.index, &hash(path), alone.now)[0];
    assert!((100..=255).all(|path| first(path) == id(2)));
}

#[test]
fn a_narinfo_is_answered_from_memory_while_one_who_told_it_is_there() {
    let mut alone = Alone::new(0);
    alone.admit(1, prefixes([7]));
    let request = asked_peers(&alone.look_up(7))[0].1;
    alone.peer_says(1, request, 7, Some(narinfo_of_build(7, 1, &[])));
    let outputs = alone.look_up(7);
    assert_eq!(
        (asked_peers(&outputs).len(), ended(&outputs)),
        (0, vec![(7, Some(1))])
    );
    // Number 2 has another build of it, which its announcement does not tell.
    alone.admit(2, prefixes([7]));
    alone.input(Input::LinkDown { peer: id(1) });
    let outputs = alone.look_up(7);
    assert_eq!(ended(&outputs), []);
    let [(2, request, _)] = asked_peers(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    let outputs = alone.peer_says(2, request, 7, Some(narinfo_of_build(7, 2, &[])));
    assert_eq!(ended(&outputs), [(7, Some(2))]);
}

#[test]
fn who_joins_late_waits_as_long_as_anybody_and_holds_nobody_up() {
    let mut alone = Alone::new(0);
    alone.admit(1, prefixes([7]));
    let lookup = |number| Input::Lookup {
        lookup: LookupId(number),
        hash: hash(7),
    };
    alone.input(lookup(1));
    alone.wait(Duration::from_millis(500));
    alone.input(lookup(2));
    assert_eq!(ended(&alone.wait(Duration::from_millis(400))), [(1, None)]);
    assert_eq!(ended(&alone.wait(Duration::from_millis(500))), [(2, None)]);
}
