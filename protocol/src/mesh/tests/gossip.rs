//! What each says it holds, and how the others keep up.

use super::*;

#[test]
fn a_new_path_is_known_everywhere_within_a_quarter_second() {
    let mut lan = Lan::new(5);
    lan.introduce_everyone();
    lan.share(3, &[7]);
    lan.run(Duration::from_millis(250));
    assert!((0..5).all(|number| lan.knows(number, 3, 7)));
}

#[test]
fn a_lost_delta_is_noticed_and_pulled() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    lan.nodes[1].is_deaf = true;
    lan.share(0, &[7]);
    lan.run(Duration::from_secs(1));
    assert!(!lan.knows(1, 0, 7));
    lan.nodes[1].is_deaf = false;
    lan.share(0, &[8]);
    lan.run(Duration::from_secs(1));
    assert!(
        lan.knows(1, 0, 7) && lan.knows(1, 0, 8),
        "the gap before 8 was pulled"
    );
}

#[test]
fn the_last_delta_lost_is_repaired_within_36_seconds() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    lan.nodes[1].is_deaf = true;
    lan.share(0, &[7]);
    lan.run(Duration::from_millis(100));
    lan.nodes[1].is_deaf = false;
    lan.run(Duration::from_secs(36));
    assert!(lan.knows(1, 0, 7));
}

#[test]
fn a_reconnected_reader_gets_only_what_it_missed() {
    let mut lan = Lan::new(2);
    lan.share(0, &(0..200).collect::<Vec<u8>>());
    lan.introduce_everyone();
    lan.unlink(0, 1);
    lan.run(Duration::from_millis(10));
    lan.share(0, &[201]);
    lan.nodes[0].sent.clear();
    lan.run(Duration::from_secs(5));
    assert!(lan.knows(1, 0, 201));
    assert!(
        lan.nodes[0]
            .sent
            .iter()
            .all(|(_, kind)| *kind != "snapshot")
    );
}

#[test]
fn a_set_of_many_pages_arrives_whole_while_it_changes() {
    let mut lan = Lan::new(2);
    let all: Vec<StorePathHash> = (0..60_000u32)
        .map(|number| {
            let digest = crate::hash::sha256(&number.to_be_bytes());
            StorePathHash::from_bytes(digest[..20].try_into().unwrap())
        })
        .collect();
    lan.input(0, Input::LocalPaths { all: all.clone() });
    lan.run(Duration::from_secs(1));
    // So much has changed since that the log does not reach back.
    lan.input(0, Input::LocalPaths { all: vec![] });
    lan.run(Duration::from_secs(1));
    lan.input(0, Input::LocalPaths { all: all.clone() });
    lan.run(Duration::from_secs(1));
    lan.introduce_everyone();
    lan.input(
        0,
        Input::LocalChanged {
            added: vec![],
            removed: all[..100].to_vec(),
        },
    );
    lan.run(Duration::from_secs(40));
    let theirs = lan.nodes[0].index.prefixes(&id(0), None, usize::MAX);
    assert_eq!(theirs.len(), 59_900);
    assert_eq!(
        lan.nodes[1].index.prefixes(&id(0), None, usize::MAX),
        theirs
    );
    assert_eq!(
        lan.nodes[1].index.cursor(&id(0)),
        lan.nodes[0].index.cursor(&id(0))
    );
}

#[test]
fn a_writer_that_lost_its_state_starts_a_new_epoch() {
    let mut lan = Lan::new(2);
    lan.share(0, &[1, 2, 3]);
    lan.introduce_everyone();
    assert!(lan.knows(1, 0, 3));
    // It restarts from an older backup of its index: same epoch, fewer operations.
    let Cursor { epoch, .. } = lan.nodes[0].mind.head();
    let config = lan.nodes[0].mind.config.clone();
    lan.unlink(0, 1);
    lan.run(Duration::from_millis(5));
    lan.nodes[0].index = MemoryIndex::new();
    lan.nodes[0].index.apply(
        &id(0),
        Cursor { epoch, sequence: 1 },
        &[Operation::Add(HashPrefix::from(&hash(1)))],
    );
    lan.nodes[0].mind = Mesh::new(id(0), config, 77, lan.now);
    lan.nodes[0].admitted.clear();
    lan.input(0, Input::ClockRead { unix: START });
    lan.input(
        0,
        Input::LocalPaths {
            all: vec![hash(1), hash(9)],
        },
    );
    lan.run(Duration::from_secs(5));
    assert_ne!(lan.nodes[0].mind.head().epoch, epoch);
    assert!(lan.knows(1, 0, 9) && !lan.knows(1, 0, 3));
}

#[test]
fn a_restarted_writer_with_its_state_continues_its_log() {
    let mut lan = Lan::new(2);
    lan.share(0, &[1, 2, 3]);
    lan.introduce_everyone();
    let before = lan.nodes[0].mind.head();
    let config = lan.nodes[0].mind.config.clone();
    lan.unlink(0, 1);
    lan.run(Duration::from_millis(5));
    lan.nodes[0].mind = Mesh::new(id(0), config, 77, lan.now);
    lan.nodes[0].admitted.clear();
    lan.nodes[0].sent.clear();
    lan.input(0, Input::ClockRead { unix: START });
    lan.input(
        0,
        Input::LocalPaths {
            all: vec![hash(1), hash(2), hash(3)],
        },
    );
    lan.run(Duration::from_secs(5));
    assert_eq!(lan.nodes[0].mind.head(), before);
    let told: Vec<_> = lan.nodes[0].sent.iter().map(|(_, kind)| *kind).collect();
    assert!(
        !told.contains(&"snapshot") && !told.contains(&"delta"),
        "{told:?}"
    );
    assert!(lan.knows(1, 0, 3));
}

#[test]
fn a_full_scan_does_not_swallow_what_was_about_to_be_told() {
    let mut lan = Lan::new(2);
    lan.introduce_everyone();
    lan.share(0, &[7]);
    lan.input(0, Input::LocalPaths { all: vec![hash(7)] });
    lan.run(Duration::from_millis(250));
    assert!(lan.knows(1, 0, 7));
}

#[test]
fn a_reader_cannot_make_a_writer_start_over_at_will() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    let head = alone.mind.head();
    let ahead = Cursor {
        sequence: head.sequence + 1,
        ..head
    };
    let pull = Message::Pull {
        writer: id(0),
        contact: u64::MAX,
        after: Some(ahead),
    };
    let outputs = alone.receive(1, pull);
    assert_eq!(alone.mind.head(), head, "this process lost nothing");
    assert!(
        matches!(
            &outputs[..],
            [Output::Send {
                message: Message::NothingNewer { .. },
                ..
            }]
        ),
        "{outputs:?}"
    );
}

#[test]
fn a_set_does_not_grow_beyond_its_limit_by_deltas() {
    let mut alone = Alone::new(0);
    alone.admit(1, vec![]);
    let all: Vec<HashPrefix> = (0..=4_194_304).map(HashPrefix).collect();
    let after = Cursor {
        epoch: 1,
        sequence: 65_535,
    };
    alone.index.replace(&id(1), after, &all);
    let operations = vec![Operation::Add(HashPrefix(u64::MAX))];
    // The writer signs a count that hides how much it is.
    let cursor = Cursor {
        sequence: after.sequence + 1,
        ..after
    };
    let delta = Delta::sign(&key(1), cursor, 1, SetDigest([0; 32]), operations);
    alone.receive(1, Message::Delta(delta));
    assert_eq!(alone.index.cursor(&id(1)), Some(after));
    assert_eq!(
        alone.mind.refusals().collect::<Vec<_>>(),
        [(Refusal::Garbage, 1)]
    );
}

#[test]
fn what_was_never_announced_is_not_withdrawn_aloud() {
    let mut lan = Lan::new(2);
    lan.share(0, &[1]);
    lan.introduce_everyone();
    lan.nodes[0].sent.clear();
    let removed = vec![hash(9)];
    lan.input(
        0,
        Input::LocalChanged {
            added: vec![],
            removed,
        },
    );
    lan.run(Duration::from_secs(1));
    assert_eq!(lan.nodes[0].sent, []);
    // What was announced is, even if it came and went within one batch.
    lan.input(
        0,
        Input::LocalChanged {
            added: vec![hash(2)],
            removed: vec![],
        },
    );
    lan.input(
        0,
        Input::LocalChanged {
            added: vec![],
            removed: vec![hash(1), hash(2)],
        },
    );
    lan.run(Duration::from_secs(1));
    assert!(!lan.knows(1, 0, 1) && !lan.knows(1, 0, 2));
}
