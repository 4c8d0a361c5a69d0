//! Each checker sees the broken promise it is there for.

use granary_protocol::mesh::{FetchId, LookupId, LookupOutcome, Output, Source};
use granary_protocol::message::{Answer, Message};
use granary_protocol::narinfo::{NarInfo, VerifiedNarInfo};
use granary_protocol::signature::TrustedKeys;

use super::*;
use crate::content::PathId;
use crate::machine::Assembly;
use crate::scenario::Scenario;

/// Two machines of a small office, the first of which holds path 0.
fn world() -> World {
    let scenario = Scenario::load("office-10").unwrap().with_nodes(2).unwrap();
    World::new(scenario, 1, None)
}

fn proved(world: &mut World, path: PathId) -> std::sync::Arc<VerifiedNarInfo> {
    let text = world.content.narinfo(path);
    let narinfo = NarInfo::parse(&text, world.content.dir()).unwrap();
    let trust = TrustedKeys::from_iter([world.content.builder()]);
    VerifiedNarInfo::verify(narinfo, &trust, world.content.dir())
        .unwrap()
        .into()
}

fn promise(mut world: World, wanted: &Output) -> Option<&'static str> {
    output(&mut world, 0, wanted);
    world.violation.map(|violation| violation.promise)
}

#[test]
fn a_question_for_a_stranger_is_seen() {
    let world = world();
    let peer = world.machines[1].peer;
    let wanted = Output::Send {
        peer,
        message: Message::Lookup {
            request: 1,
            hashes: Vec::new(),
        },
    };
    assert_eq!(promise(world, &wanted), Some("admission"));
}

#[test]
fn an_answer_about_another_path_is_seen() {
    let mut world = world();
    world.machines[0].lookups.insert(LookupId(1), PathId(0));
    let narinfo = proved(&mut world, PathId(1));
    let outcome = LookupOutcome::Found {
        narinfo,
        providers: Vec::new(),
        caches: Vec::new(),
    };
    assert_eq!(
        promise(
            world,
            &Output::LookupDone {
                lookup: LookupId(1),
                outcome
            }
        ),
        Some("answers")
    );
}

#[test]
fn a_provider_that_said_have_not_is_seen() {
    let mut world = world();
    world.machines[0].lookups.insert(LookupId(1), PathId(0));
    let hash = world.content.hash(PathId(0));
    let answers = vec![Answer {
        hash,
        narinfo: None,
    }];
    world.noted(
        0,
        1,
        &Message::Answers {
            request: 1,
            answers,
        },
    );
    let (narinfo, peer) = (proved(&mut world, PathId(0)), world.machines[1].peer);
    let outcome = LookupOutcome::Found {
        narinfo,
        providers: vec![peer],
        caches: Vec::new(),
    };
    assert_eq!(
        promise(
            world,
            &Output::LookupDone {
                lookup: LookupId(1),
                outcome
            }
        ),
        Some("withdrawals")
    );
}

#[test]
fn a_transfer_that_leaves_a_gap_is_seen() {
    let mut world = world();
    let narinfo = proved(&mut world, PathId(0));
    let peer = world.machines[1].peer;
    world.machines[0].admitted.insert(peer);
    let assembly = Assembly {
        path: PathId(0),
        narinfo,
        started: Duration::ZERO,
        at: 10,
        is_wrong: false,
        attempt: 1,
        source: None,
        flow: None,
        is_busy: false,
        lies: 0,
        is_over: false,
    };
    world.machines[0].assemblies.insert(FetchId(7), assembly);
    let address = world.network.hosts[1].address;
    let wanted = Output::Transfer {
        fetch: FetchId(7),
        attempt: 2,
        source: Source::Peer { peer, address },
        from: 11,
    };
    assert_eq!(promise(world, &wanted), Some("transfers"));
}

#[test]
fn an_index_that_is_behind_is_seen() {
    let mut world = world();
    world.start(0);
    world.start(1);
    liveness::indexes(&mut world);
    assert_eq!(
        world.violation.map(|violation| violation.promise),
        Some("liveness")
    );
}

#[test]
fn a_want_that_is_not_delivered_is_seen() {
    let mut world = world();
    world.start(0);
    world.start(1);
    let unshared = world.machines[1]
        .store
        .difference(&world.machines[0].store)
        .next()
        .copied();
    world.want(0, unshared.expect("machines have paths of their own"));
    liveness::deliveries(&mut world);
    assert_eq!(
        world.violation.map(|violation| violation.promise),
        Some("liveness")
    );
}
