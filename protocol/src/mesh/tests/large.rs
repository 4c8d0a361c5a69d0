//! Meshes in which not everybody is linked to everybody: neighbours, relaying, third parties.

use super::*;

const MANY: usize = 100;

/// `membership::SEED_REST`, without its jitter.
const SEED_REST: Duration = Duration::from_secs(300);

fn many() -> Lan {
    let mut lan = Lan::new(MANY);
    for number in 0..MANY {
        let addresses = vec![address(number)];
        lan.input(number, Input::OwnAddresses { addresses });
    }
    lan.introduce_everyone();
    lan.run(Duration::from_secs(60));
    lan
}

fn neighbours(lan: &Lan, number: usize) -> Vec<PeerId> {
    lan.nodes[number].mind.membership.neighbours()
}

/// Cuts every link of a node and lets nobody dial it any more.
fn isolate(lan: &mut Lan, number: usize) {
    let links: Vec<(usize, usize)> = lan.links.iter().copied().collect();
    for (one, other) in links {
        if one == number || other == number {
            lan.unlink(one, other);
        }
    }
    lan.is_gone.insert(number);
}

#[test]
fn everyone_keeps_eight_to_twelve_neighbours_and_both_sides_know_it() {
    let lan = many();
    for number in 0..MANY {
        let near = neighbours(&lan, number);
        assert!(
            (8..=12).contains(&near.len()),
            "{number} has {}",
            near.len()
        );
        for peer in near {
            let other = number_of(peer);
            assert!(
                neighbours(&lan, other).contains(&id(number)),
                "{number} and {other} disagree"
            );
        }
    }
}

#[test]
fn links_that_nobody_needs_are_closed() {
    let mut lan = many();
    lan.run(Duration::from_secs(180));
    let links = lan.links.len();
    assert!(links <= MANY * 12 / 2, "{links} links of {MANY} nodes");
}

#[test]
fn a_new_path_reaches_everyone_within_a_quarter_second_and_is_passed_on_once() {
    let mut lan = many();
    for node in &mut lan.nodes {
        node.sent.clear();
    }
    lan.share(3, &[7]);
    lan.run(Duration::from_millis(250));
    for number in 0..MANY {
        assert!(lan.knows(number, 3, 7), "{number} does not know");
        let deltas = lan.nodes[number]
            .sent
            .iter()
            .filter(|(_, kind)| *kind == "delta");
        let told: Vec<_> = deltas.map(|(peer, _)| *peer).collect();
        let once: BTreeSet<PeerId> = told.iter().copied().collect();
        assert_eq!(told.len(), once.len(), "{number} said it twice to somebody");
        assert!(told.len() <= 12);
    }
}

#[test]
fn a_large_change_is_pulled_once_by_everyone_instead_of_pushed_by_all_neighbours() {
    let mut lan = many();
    for node in &mut lan.nodes {
        node.sent.clear();
    }
    let hash = |number: u16| {
        let mut bytes = [0; 20];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        StorePathHash::from_bytes(bytes)
    };
    let added: Vec<StorePathHash> = (0..600).map(hash).collect();
    let last = HashPrefix::from(&added[599]);
    let removed = vec![];
    lan.input(3, Input::LocalChanged { added, removed });
    lan.run(Duration::from_secs(1));
    for (number, node) in lan.nodes.iter().enumerate() {
        assert_eq!(node.index.providers(last), [id(3)], "{number} lacks it");
    }
    let sent = lan.nodes.iter().flat_map(|node| &node.sent);
    let copies = sent.filter(|(_, kind)| *kind == "delta").count();
    assert!(copies < 2 * MANY, "{copies} copies for {MANY} nodes");
}

#[test]
fn a_seed_is_not_dialled_again_soon_by_whoever_has_neighbours() {
    let dials_after = |members: usize, wait: Duration| {
        let mut alone = Alone::new(1);
        alone.link(1, Some(0));
        for number in 1..=members {
            alone.admit(number, vec![]);
        }
        alone.input(Input::LinkDown { peer: id(1) });
        let outputs = alone.wait(wait);
        let is_dial = |output: &&Output| matches!(output, Output::DialSeed { .. });
        outputs.iter().filter(is_dial).count()
    };
    assert!(dials_after(70, SEED_REST / 2) == 0, "a storm on few seeds");
    assert!(dials_after(70, SEED_REST * 2) > 0, "it may join two halves");
    assert!(dials_after(10, SEED_REST / 2) > 0, "few can afford it");
}

#[test]
fn a_holder_that_is_not_linked_is_dialled_and_asked() {
    let mut lan = many();
    lan.share(3, &[7]);
    lan.run(Duration::from_secs(1));
    let stranger = (0..MANY)
        .find(|number| *number != 3 && !lan.links.contains(&(3.min(*number), 3.max(*number))))
        .unwrap();
    assert!(lan.is_found(stranger, 7));
    // What is fetched from it needs the link as well.
    let LookupOutcome::Found { narinfo, .. } = lan.look_up(stranger, 7) else {
        panic!("found a moment ago");
    };
    let fetch = FetchId(1);
    lan.input(stranger, Input::Fetch { fetch, narinfo });
    lan.run(Duration::from_millis(100));
    assert_eq!(lan.nodes[stranger].transfers, [(fetch, 1, id(3), 0)]);
}

#[test]
fn a_holder_that_cannot_be_dialled_does_not_hold_up_a_lookup() {
    let mut lan = many();
    lan.share(3, &[7]);
    lan.share(4, &[7]);
    lan.run(Duration::from_secs(1));
    isolate(&mut lan, 3);
    lan.run(Duration::from_millis(100));
    let asker = (0..MANY)
        .find(|number| {
            ![3, 4].contains(number) && !lan.links.contains(&(4.min(*number), 4.max(*number)))
        })
        .unwrap();
    assert!(lan.is_found(asker, 7), "4 has it too");
}

#[test]
fn a_holder_that_does_not_answer_a_dial_holds_up_lookups_once_and_briefly() {
    let mut lan = many();
    lan.share(3, &[7]);
    lan.run(Duration::from_secs(1));
    let asker = (0..MANY)
        .find(|number| *number != 3 && !lan.links.contains(&(3.min(*number), 3.max(*number))))
        .unwrap();
    // Asleep, or behind a firewall: packets to it are swallowed.
    lan.is_silent.insert(3);
    let ask = |lan: &mut Lan, number: u64| {
        let (lookup, hash) = (LookupId(number), hash(7));
        lan.input(asker, Input::Lookup { lookup, hash });
        let before = lan.now;
        while lan.nodes[asker].outcomes.len() < number as usize {
            lan.run(Duration::from_millis(10));
        }
        lan.now - before
    };
    let took = ask(&mut lan, 1);
    assert!(took <= Duration::from_millis(520), "{took:?}");
    assert!(ask(&mut lan, 2) <= Duration::from_millis(10), "remembered");
}

#[test]
fn a_newcomer_learns_everything_from_its_neighbours() {
    let mut lan = many();
    for number in 0..MANY - 1 {
        lan.share(number, &[number as u8]);
    }
    lan.run(Duration::from_secs(1));
    // The last node starts anew, without its index.
    let last = MANY - 1;
    isolate(&mut lan, last);
    lan.run(Duration::from_millis(10));
    let config = lan.nodes[last].mind.config.clone();
    lan.nodes[last].index = MemoryIndex::new();
    lan.nodes[last].mind = Mesh::new(id(last), config, 5, lan.now);
    lan.nodes[last].admitted.clear();
    lan.is_gone.clear();
    lan.input(last, Input::ClockRead { unix: START });
    // It finds two of the others; the rest it knows by their contacts.
    for number in [0, 1] {
        let (peer, addresses) = (id(number), vec![address(number)]);
        lan.input(last, Input::Discovered { peer, addresses });
    }
    lan.run(Duration::from_secs(20));
    for number in 0..MANY - 1 {
        assert!(lan.knows(last, number, number as u8), "nothing of {number}");
    }
    assert!((8..=12).contains(&neighbours(&lan, last).len()));
}

#[test]
fn a_third_partys_set_is_taken_from_whoever_has_it_while_the_writer_is_away() {
    let mut lan = Lan::new(3);
    lan.share(2, &[7]);
    lan.meet(1, 2);
    assert!(lan.knows(1, 2, 7));
    isolate(&mut lan, 2);
    lan.meet(0, 1);
    assert!(lan.knows(0, 2, 7));
}

#[test]
fn a_changed_record_of_a_third_party_ends_the_acquaintance_with_the_teller() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    alone.admit(2, vec![]);
    let cursor = Cursor {
        epoch: 1,
        sequence: 2,
    };
    let operations = vec![Operation::Add(HashPrefix(5))];
    let true_one = Delta::sign(&key(2), cursor, 1, SetDigest([0; 32]), operations);
    let changed = vec![Operation::Add(HashPrefix(6))];
    let forged = Delta::from_parts(true_one.head().clone(), changed);
    alone.receive(1, Message::Delta(forged));
    assert!(alone.index.providers(HashPrefix(6)).is_empty());
    assert_eq!(
        alone.mind.refusals().collect::<Vec<_>>(),
        [(Refusal::Garbage, 1)]
    );
    assert_eq!(alone.view(1).unwrap().state, PeerState::Away);
    assert_eq!(alone.view(2).unwrap().state, PeerState::Linked);
    // The true one is believed, whoever says it.
    alone.admit(3, vec![]);
    alone.receive(3, Message::Delta(true_one));
    assert_eq!(alone.index.providers(HashPrefix(5)), [id(2)]);
}

#[test]
fn a_set_that_does_not_match_its_signed_digest_is_not_taken() {
    let mut alone = Alone::new(0);
    let head = Cursor {
        epoch: 1,
        sequence: 1,
    };
    alone.link(1, None);
    alone.receive(1, hello(1, "home"));
    alone.receive(1, about(1, head));
    let snapshot = Message::Snapshot {
        head: head_of(1, head, &[HashPrefix(1), HashPrefix(2)]),
        after: None,
        prefixes: vec![HashPrefix(1), HashPrefix(3)],
        is_last: true,
    };
    alone.receive(1, snapshot);
    assert_eq!(alone.index.cursor(&id(1)), None);
    assert_eq!(
        alone.mind.refusals().collect::<Vec<_>>(),
        [(Refusal::Garbage, 1)]
    );
}

#[test]
fn nothing_is_kept_of_a_writer_that_did_not_prove_to_be_a_member() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    let cursor = Cursor {
        epoch: 1,
        sequence: 1,
    };
    let operations = vec![Operation::Add(HashPrefix(5))];
    let delta = Delta::sign(&key(2), cursor, 1, SetDigest([0; 32]), operations);
    let outputs = alone.receive(1, Message::Delta(delta));
    assert!(alone.index.providers(HashPrefix(5)).is_empty());
    // It may be a member whose contact was not heard yet: whoever told of it is asked.
    let asks = |output: &Output| {
        let Output::Send { peer, message } = output else {
            return false;
        };
        *peer == id(1) && matches!(message, Message::Pull { writer, .. } if *writer == id(2))
    };
    assert!(outputs.iter().any(asks), "{outputs:?}");
    // A contact with a certificate of another mesh does not help.
    let mut foreign = Contact {
        certificate: certificate(id(2), &mesh_key("office")),
        number: 1,
        addresses: vec![],
        transfer_port: None,
    };
    foreign.addresses.push(address(2));
    let foreign = foreign.sign(&key(2)).unwrap();
    alone.receive(1, Message::Contact(foreign));
    assert!(alone.view(2).is_none());
}

#[test]
fn a_contact_makes_nobody_dial_itself() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    let contact = Contact {
        certificate: certificate(id(2), &mesh_key("home")),
        number: 1,
        addresses: vec![
            "127.0.0.1:22".parse().unwrap(),
            "0.0.0.0:1".parse().unwrap(),
            "224.0.0.251:5353".parse().unwrap(),
            "10.0.0.9:0".parse().unwrap(),
        ],
        transfer_port: Some(4728),
    };
    let mut outputs = alone.receive(1, Message::Contact(contact.sign(&key(2)).unwrap()));
    outputs.extend(alone.wait(Duration::from_secs(60)));
    assert_eq!(dials(&outputs), 0);
}

#[test]
fn who_hears_of_its_own_future_begins_a_new_epoch() {
    let mut lan = Lan::new(3);
    lan.share(0, &[1, 2, 3]);
    lan.meet(0, 1);
    lan.meet(1, 2);
    assert!(lan.knows(2, 0, 3));
    let before = lan.nodes[0].mind.head();
    // It comes back with a backup of its index, and meets only one that heard of it from others.
    let config = lan.nodes[0].mind.config.clone();
    isolate(&mut lan, 0);
    lan.run(Duration::from_millis(10));
    lan.nodes[0].index = MemoryIndex::new();
    let restored = Cursor {
        sequence: 1,
        ..before
    };
    let first = [Operation::Add(HashPrefix::from(&hash(1)))];
    lan.nodes[0].index.apply(&id(0), restored, &first);
    lan.nodes[0].mind = Mesh::new(id(0), config, 77, lan.now);
    lan.nodes[0].admitted.clear();
    lan.is_gone.clear();
    lan.input(0, Input::ClockRead { unix: START });
    let all = vec![hash(1), hash(9)];
    lan.input(0, Input::LocalPaths { all });
    lan.meet(0, 2);
    lan.run(Duration::from_secs(40));
    assert!(lan.nodes[0].mind.head().epoch > before.epoch);
    for number in [1, 2] {
        assert!(lan.knows(number, 0, 9), "{number}");
        assert!(!lan.knows(number, 0, 3), "{number}");
    }
}

#[test]
fn a_restart_knows_members_and_sets_from_its_index_and_sends_cursors_only() {
    let mut lan = Lan::new(3);
    lan.share(2, &[7]);
    lan.introduce_everyone();
    let config = lan.nodes[0].mind.config.clone();
    isolate(&mut lan, 0);
    lan.run(Duration::from_millis(10));
    lan.nodes[0].mind = Mesh::new(id(0), config, 9, lan.now);
    lan.nodes[0].admitted.clear();
    lan.is_gone.clear();
    for node in &mut lan.nodes {
        node.sent.clear();
    }
    lan.input(0, Input::ClockRead { unix: START });
    lan.input(0, Input::LocalPaths { all: vec![] });
    // Nothing discovers anybody: the contacts kept in the index do.
    lan.run(Duration::from_secs(5));
    assert_eq!(lan.nodes[0].admitted.len(), 2, "all are linked again");
    let sets = ["snapshot", "delta"];
    for node in &lan.nodes {
        assert!(node.sent.iter().all(|(_, kind)| !sets.contains(kind)));
    }
    // And it can prove to others what it kept.
    isolate(&mut lan, 2);
    let config = lan.nodes[1].mind.config.clone();
    isolate(&mut lan, 1);
    lan.run(Duration::from_millis(10));
    lan.nodes[1].index = MemoryIndex::new();
    lan.nodes[1].mind = Mesh::new(id(1), config, 9, lan.now);
    lan.nodes[1].admitted.clear();
    lan.is_gone.remove(&1);
    lan.input(1, Input::ClockRead { unix: START });
    lan.meet(0, 1);
    lan.run(Duration::from_secs(40));
    assert!(lan.knows(1, 2, 7));
}

#[test]
fn a_member_whose_certificate_ended_is_forgotten_with_its_set() {
    let mut lan = Lan::new(3);
    lan.share(2, &[7]);
    lan.introduce_everyone();
    isolate(&mut lan, 2);
    lan.run(Duration::from_secs(3600));
    assert!(lan.knows(0, 2, 7), "it may come back");
    lan.run(Duration::from_secs(86_400));
    assert!(!lan.knows(0, 2, 7));
    assert_eq!(lan.nodes[0].index.cursor(&id(2)), None);
}

#[test]
fn a_withdrawn_hint_does_not_spoil_what_others_are_told() {
    let mut lan = Lan::new(3);
    lan.share(2, &[7, 8]);
    lan.meet(1, 2);
    lan.nodes[2].narinfos.remove(&hash(7));
    assert!(!lan.is_found(1, 7));
    assert!(!lan.knows(1, 2, 7), "the hint is hidden");
    isolate(&mut lan, 2);
    lan.meet(0, 1);
    assert!(lan.knows(0, 2, 8));
    assert_eq!(lan.refusals(0), []);
}
