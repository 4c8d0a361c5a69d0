//! Who is in: links, certificates, back-off.

use super::*;

#[test]
fn a_renewed_certificate_keeps_the_link_beyond_the_end_of_the_old_one() {
    let until = |number: usize, seconds: u64| {
        let mut claims = certificate(id(number), &mesh_key("home")).claims().unwrap();
        claims.not_after = UnixTime(START.0 + seconds);
        claims.sign(&mesh_key("home")).unwrap()
    };
    let mut lan = Lan::with(3, |number| until(number, [1000, 10_000, 1000][number]));
    lan.introduce_everyone();
    lan.run(Duration::from_secs(900));
    let certificate = until(0, 10_000);
    lan.input(0, Input::Certificate { certificate });
    lan.run(Duration::from_secs(200));
    // The third had its renewed by nobody.
    assert_eq!(lan.nodes[1].admitted, BTreeSet::from([id(0)]));
    // Nor is it the old one that is shown to who comes later.
    lan.unlink(0, 1);
    lan.run(Duration::from_secs(60));
    assert_eq!(lan.nodes[1].admitted, BTreeSet::from([id(0)]));
}

#[test]
fn members_that_discover_each_other_link_once_and_learn_what_the_other_holds() {
    let mut lan = Lan::new(3);
    lan.share(0, &[1, 2]);
    lan.introduce_everyone();
    assert_eq!(lan.links.len(), 3);
    for number in 0..3 {
        assert_eq!(lan.nodes[number].admitted.len(), 2);
        assert!(lan.refusals(number).is_empty());
    }
    assert!(lan.knows(1, 0, 1) && lan.knows(2, 0, 2));
    assert!(lan.is_found(1, 1));
}

#[test]
fn a_stranger_learns_nothing_and_is_counted() {
    let other_mesh = |number| {
        certificate(
            id(number),
            &mesh_key(if number == 2 { "office" } else { "home" }),
        )
    };
    let mut lan = Lan::with(3, other_mesh);
    lan.share(0, &[7]);
    lan.introduce_everyone();
    assert!(lan.knows(1, 0, 7));
    assert!(!lan.knows(2, 0, 7));
    let said: Vec<_> = lan.nodes[0]
        .sent
        .iter()
        .filter(|(peer, _)| *peer == id(2))
        .collect();
    // Its badge, which tells whose it is and until when.
    assert!(said.iter().all(|(_, kind)| *kind == "knock"), "{said:?}");
    let refused = lan.refusals(0);
    assert!(
        refused
            .iter()
            .any(|(refusal, _)| *refusal == Refusal::OtherMesh),
        "{refused:?}"
    );
}

#[test]
fn whoever_dials_us_without_a_certificate_hears_no_word() {
    let mut lan = Lan::new(1);
    let stranger = id(5);
    let link = Input::LinkUp {
        peer: stranger,
        address: address(5),
        outbound: false,
        seed: None,
    };
    let node = &mut lan.nodes[0];
    node.mind.handle(&mut node.index, link, lan.now);
    assert_eq!(node.mind.poll(), None);
    let message = Message::Lookup {
        request: 1,
        hashes: vec![hash(1)],
    };
    let input = Input::Received {
        peer: stranger,
        message,
    };
    node.mind.handle(&mut node.index, input, lan.now);
    let hangup = Output::Hangup {
        peer: stranger,
        refusal: Some(Refusal::OutOfTurn),
    };
    assert_eq!(node.mind.poll(), Some(hangup));
    assert_eq!(node.mind.poll(), None);
}

#[test]
fn a_connection_without_hello_is_closed_after_five_seconds() {
    let mut lan = Lan::new(1);
    let link = Input::LinkUp {
        peer: id(5),
        address: address(5),
        outbound: false,
        seed: None,
    };
    let node = &mut lan.nodes[0];
    node.mind.handle(&mut node.index, link, lan.now);
    let (at, why) = node.mind.deadline().unwrap();
    assert_eq!(
        (at - lan.now, why),
        (Duration::from_secs(5), "hello overdue")
    );
    node.mind.handle(&mut node.index, Input::Tick, at);
    let hangup = Output::Hangup {
        peer: id(5),
        refusal: Some(Refusal::NoHello),
    };
    assert_eq!(node.mind.poll(), Some(hangup));
}

#[test]
fn a_stolen_certificate_does_not_admit_another_key() {
    let stolen = |number| certificate(id(if number == 1 { 0 } else { number }), &mesh_key("home"));
    let mut lan = Lan::with(2, stolen);
    lan.introduce_everyone();
    assert!(lan.nodes[0].admitted.is_empty());
    assert_eq!(lan.refusals(0)[0].0, Refusal::OtherPeer);
}

#[test]
fn an_expiring_certificate_ends_a_live_link() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    assert_eq!(lan.nodes[0].admitted.len(), 1);
    lan.run(Duration::from_secs(86_401));
    assert!(lan.nodes[0].admitted.is_empty());
    assert!(
        lan.refusals(0)
            .iter()
            .any(|(refusal, _)| *refusal == Refusal::Expired)
    );
}

#[test]
fn a_clock_that_is_hours_off_shuts_nobody_out_for_good() {
    // Certificates last from START for a day.
    for (hours, refusal) in [(-5, Refusal::NotYetValid), (30, Refusal::Expired)] {
        let mut lan = Lan::new(2);
        let off = UnixTime(START.0.saturating_add_signed(hours * 3600));
        lan.input(0, Input::ClockRead { unix: off });
        lan.introduce_everyone();
        lan.run(Duration::from_secs(5));
        assert!(lan.nodes[0].admitted.is_empty(), "{hours} hours");
        let refusals = lan.refusals(0);
        let is_refused = refusals.iter().any(|(found, _)| *found == refusal);
        assert!(is_refused, "{hours} hours: {refusals:?}");
        lan.input(0, Input::ClockRead { unix: START });
        lan.run(Duration::from_secs(120));
        assert_eq!(lan.nodes[0].admitted.len(), 1, "{hours} hours");
    }
}

#[test]
fn a_clock_that_was_behind_lets_nobody_stay_whose_certificate_ended() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    assert_eq!(lan.nodes[0].admitted.len(), 1);
    let unix = UnixTime(START.0 + 86_400);
    lan.input(0, Input::ClockRead { unix });
    lan.run(Duration::from_millis(10));
    assert!(lan.nodes[0].admitted.is_empty());
    let refusals = lan.refusals(0);
    assert!(
        refusals
            .iter()
            .any(|(refusal, _)| *refusal == Refusal::Expired),
        "{refusals:?}"
    );
}

#[test]
fn a_lost_link_is_dialled_again() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    lan.unlink(0, 1);
    lan.run(Duration::from_millis(5));
    assert!(lan.nodes[0].admitted.is_empty());
    lan.run(Duration::from_secs(3));
    assert_eq!(lan.nodes[0].admitted.len(), 1);
}

#[test]
fn garbage_ends_the_acquaintance() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    lan.input(0, Input::Garbage { peer: id(1) });
    lan.run(Duration::from_millis(10));
    assert!(lan.nodes[0].admitted.is_empty());
    assert_eq!(lan.refusals(0), [(Refusal::Garbage, 1)]);
}

#[test]
fn another_store_dir_is_refused() {
    let mut lan = Lan::new(2);
    lan.nodes[1].mind.config.store_dir = StoreDir::new("/gnu/store").unwrap();
    lan.introduce_everyone();
    assert!(
        lan.refusals(0)
            .iter()
            .any(|(refusal, _)| *refusal == Refusal::OtherStoreDir)
    );
    assert!(lan.nodes[0].admitted.is_empty());
}

#[test]
fn an_older_version_is_refused() {
    let mut lan = Lan::new(1);
    let link = Input::LinkUp {
        peer: id(1),
        address: address(1),
        outbound: false,
        seed: None,
    };
    let message = Message::Hello {
        version: PROTOCOL_VERSION - 1,
        certificate: certificate(id(1), &mesh_key("home")),
    };
    let node = &mut lan.nodes[0];
    node.mind.handle(&mut node.index, link, lan.now);
    node.mind.handle(
        &mut node.index,
        Input::Received {
            peer: id(1),
            message,
        },
        lan.now,
    );
    let hangup = Output::Hangup {
        peer: id(1),
        refusal: Some(Refusal::Version),
    };
    assert_eq!(node.mind.poll(), Some(hangup));
}

#[test]
fn a_configured_peer_that_is_no_member_is_not_dialled_every_second() {
    let mut alone = Alone::new(1);
    alone.wait(Duration::ZERO);
    for _ in 0..2 {
        alone.link(1, Some(0));
        alone.receive(1, hello(1, "office"));
        alone.input(Input::LinkDown { peer: id(1) });
        assert_eq!(dials(&alone.wait(Duration::from_secs(59))), 0);
        alone.wait(Duration::from_secs(2));
    }
}

#[test]
fn a_configured_peer_that_hangs_up_on_us_is_dialled_less_and_less() {
    let mut alone = Alone::new(1);
    let mut count = 0;
    for _ in 0..20 {
        alone.link(1, Some(0));
        alone.input(Input::LinkDown { peer: id(1) });
        let outputs = alone.wait(Duration::from_secs(10));
        count += outputs
            .iter()
            .filter(|output| matches!(output, Output::DialSeed { .. }))
            .count();
    }
    assert!(count < 10, "{count} dials in 200 s");
}

#[test]
fn a_configured_peer_whose_link_was_gone_when_it_was_found_is_dialled_again() {
    let mut alone = Alone::new(1);
    alone.wait(Duration::ZERO);
    alone.input(Input::SeedFound {
        seed: 0,
        peer: id(1),
    });
    assert_eq!(dials(&alone.wait(Duration::from_secs(2))), 1);
}

#[test]
fn strangers_that_were_refused_make_room_for_new_peers() {
    let mut alone = Alone::new(0);
    let stranger = |number: u16| {
        let mut key = [9; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        PeerId::from_public_key(key)
    };
    for number in 0..1024 {
        let peer = stranger(number);
        alone.input(Input::Discovered {
            peer,
            addresses: vec![address(1)],
        });
        alone.input(Input::LinkUp {
            peer,
            address: address(1),
            outbound: true,
            seed: None,
        });
        alone.input(Input::Garbage { peer });
        alone.input(Input::LinkDown { peer });
        // A record without addresses is worth no place at all.
        let (peer, addresses) = (stranger(2000 + number), vec![]);
        alone.input(Input::Discovered { peer, addresses });
    }
    alone.admit(1, vec![]);
    assert_eq!(alone.view(1).unwrap().state, PeerState::Linked);
}

#[test]
fn a_peer_that_said_goodbye_and_restarts_is_linked_again_within_seconds() {
    let mut alone = Alone::new(0);
    let (peer, addresses) = (id(1), vec![address(1)]);
    alone.input(Input::Discovered { peer, addresses });
    alone.admit(1, vec![]);
    alone.receive(1, Message::Goodbye);
    alone.input(Input::LinkDown { peer: id(1) });
    // The record of the restarted peer says what we know already, so discovery is silent.
    assert_eq!(dials(&alone.wait(Duration::from_secs(1))), 0);
    assert_eq!(dials(&alone.wait(Duration::from_secs(5))), 1);
}

#[test]
fn changing_records_of_a_peer_do_not_put_off_its_dial() {
    let mut alone = Alone::new(0);
    // One that we need not wait for, whoever we are.
    let lesser = PeerId::from_public_key([0; 32]);
    let mut outputs = Vec::new();
    for number in 0..10 {
        let (peer, addresses) = (lesser, vec![address(number)]);
        outputs.extend(alone.input(Input::Discovered { peer, addresses }));
        outputs.extend(alone.wait(Duration::from_millis(100)));
    }
    assert_eq!(dials(&outputs), 1);
}

#[test]
fn a_long_list_of_addresses_is_news_only_once() {
    let mut alone = Alone::new(0);
    let addresses: Vec<SocketAddr> = (0..12).map(address).collect();
    let discover = |alone: &mut Alone| {
        let (peer, addresses) = (id(1), addresses.clone());
        let mut outputs = alone.input(Input::Discovered { peer, addresses });
        outputs.extend(alone.wait(Duration::from_millis(10)));
        outputs
    };
    assert_eq!(dials(&discover(&mut alone)), 1);
    alone.input(Input::DialFailed { peer: id(1) });
    assert_eq!(dials(&discover(&mut alone)), 0, "the back-off holds");
}

#[test]
fn whoever_we_dial_sees_our_badge_and_no_more_before_it_proved_membership() {
    let mut alone = Alone::new(1);
    let knock = |number: usize, mesh: &str| Message::Knock {
        version: PROTOCOL_VERSION,
        badge: certificate(id(number), &mesh_key(mesh)).badge().clone(),
    };
    let said = |outputs: &[Output]| -> Vec<&'static str> {
        let kind = |output: &Output| match output {
            Output::Send { message, .. } => Some(message.kind()),
            Output::Hangup { refusal, .. } => refusal.map(Refusal::word),
            _ => None,
        };
        outputs.iter().filter_map(kind).collect()
    };
    assert_eq!(said(&alone.link(1, Some(0))), ["knock"]);
    // One that dialled us at the same time; however often it does.
    assert_eq!(said(&alone.receive(1, knock(1, "home"))), ["hello"]);
    assert_eq!(said(&alone.receive(1, knock(1, "home"))), [""; 0]);
    let after = said(&alone.receive(1, hello(1, "home")));
    assert!(!after.contains(&"hello") && after.contains(&"about"));
    // Those who answer with a badge of somebody else, of another mesh, or of an older version.
    let older = Message::Knock {
        version: PROTOCOL_VERSION - 1,
        badge: certificate(id(2), &mesh_key("home")).badge().clone(),
    };
    for (answer, refusal) in [
        (knock(1, "home"), "other_peer"),
        (knock(2, "office"), "other_mesh"),
        (older, "version"),
    ] {
        assert_eq!(said(&alone.link(2, Some(0))), ["knock"]);
        assert_eq!(said(&alone.receive(2, answer)), [refusal]);
    }
}

#[test]
fn a_revoked_member_that_knocks_hears_no_word() {
    let mut alone = Alone::new(1);
    let mut list = crate::revocation::Revocations {
        number: 1,
        ..Default::default()
    };
    list.revoke(id(1), START).unwrap();
    let list = list.sign(&mesh_key("home")).unwrap();
    alone.input(Input::Revocations { list });
    alone.link(1, None);
    let badge = certificate(id(1), &mesh_key("home")).badge().clone();
    let version = PROTOCOL_VERSION;
    let outputs = alone.receive(1, Message::Knock { version, badge });
    let hangup = Output::Hangup {
        peer: id(1),
        refusal: Some(Refusal::Revoked),
    };
    assert_eq!(outputs, [hangup]);
}
