//! Who brings a NAR, and who takes over.

use super::*;

const FETCH: FetchId = FetchId(1);

/// Three members, of which 0 and 1 hold path 7 and 2 wants it.
fn wanting() -> Lan {
    let mut lan = Lan::new(3);
    lan.share(0, &[7]);
    lan.share(1, &[7]);
    lan.introduce_everyone();
    let LookupOutcome::Found { narinfo, .. } = lan.look_up(2, 7) else {
        panic!("not found")
    };
    lan.input(
        2,
        Input::Fetch {
            fetch: FETCH,
            narinfo,
        },
    );
    lan
}

fn first(lan: &Lan) -> PeerId {
    lan.nodes[2].transfers[0].2
}

fn second(lan: &Lan) -> PeerId {
    if first(lan) == id(0) { id(1) } else { id(0) }
}

#[test]
fn a_provider_that_breaks_off_is_replaced_at_the_same_byte() {
    let mut lan = wanting();
    assert_eq!(lan.nodes[2].transfers, [(FETCH, 1, first(&lan), 0)]);
    lan.input(
        2,
        Input::TransferProgress {
            fetch: FETCH,
            attempt: 1,
            at: 500,
        },
    );
    lan.input(
        2,
        Input::TransferEnded {
            fetch: FETCH,
            attempt: 1,
            outcome: Err(Blame::Peer),
        },
    );
    assert_eq!(lan.nodes[2].transfers[1], (FETCH, 2, second(&lan), 500));
    assert!(
        lan.nodes[2]
            .mind
            .peers(&lan.nodes[2].index, lan.now)
            .iter()
            .all(|peer| peer.quarantine.is_none())
    );
}

#[test]
fn a_provider_that_stalls_is_replaced_after_two_seconds() {
    let mut lan = wanting();
    lan.input(
        2,
        Input::TransferProgress {
            fetch: FETCH,
            attempt: 1,
            at: 500,
        },
    );
    lan.run(Duration::from_millis(1999));
    assert_eq!(lan.nodes[2].transfers.len(), 1);
    lan.run(Duration::from_millis(2));
    assert_eq!(lan.nodes[2].stopped, [(FETCH, 1)]);
    assert_eq!(lan.nodes[2].transfers[1], (FETCH, 2, second(&lan), 500));
    // What the first one still reports is of no interest.
    lan.input(
        2,
        Input::TransferEnded {
            fetch: FETCH,
            attempt: 1,
            outcome: Err(Blame::Peer),
        },
    );
    assert_eq!(lan.nodes[2].transfers.len(), 2);
}

#[test]
fn a_slow_reader_is_not_the_providers_fault() {
    let mut lan = wanting();
    for _ in 0..10 {
        lan.input(
            2,
            Input::TransferProgress {
                fetch: FETCH,
                attempt: 1,
                at: 500,
            },
        );
        lan.run(Duration::from_millis(1500));
    }
    assert_eq!(lan.nodes[2].transfers.len(), 1);
}

#[test]
fn a_provider_that_lost_the_path_is_not_asked_again() {
    let mut lan = wanting();
    let gone = first(&lan);
    lan.input(
        2,
        Input::TransferEnded {
            fetch: FETCH,
            attempt: 1,
            outcome: Err(Blame::Absent),
        },
    );
    assert_eq!(lan.nodes[2].transfers[1], (FETCH, 2, second(&lan), 0));
    let number = number_of(gone);
    assert!(!lan.knows(2, number, 7));
}

#[test]
fn a_fetch_fails_when_everyone_was_tried_twice() {
    let mut lan = wanting();
    for attempt in 1..=4 {
        assert!(lan.nodes[2].failed.is_empty());
        lan.input(
            2,
            Input::TransferEnded {
                fetch: FETCH,
                attempt,
                outcome: Err(Blame::Peer),
            },
        );
    }
    assert_eq!(lan.nodes[2].failed, [FETCH]);
    assert_eq!(lan.nodes[2].transfers.len(), 4);
}

#[test]
fn our_own_trouble_ends_a_fetch_at_once() {
    let mut lan = wanting();
    lan.input(
        2,
        Input::TransferEnded {
            fetch: FETCH,
            attempt: 1,
            outcome: Err(Blame::Local),
        },
    );
    assert_eq!(lan.nodes[2].failed, [FETCH]);
    assert_eq!(lan.nodes[2].transfers.len(), 1);
}

#[test]
fn wrong_bytes_put_their_senders_in_quarantine_longer_each_time() {
    let mut lan = wanting();
    let liar = first(&lan);
    lan.input(
        2,
        Input::TransferProgress {
            fetch: FETCH,
            attempt: 1,
            at: 1000,
        },
    );
    lan.input(2, Input::FetchMismatch { fetch: FETCH });
    let quarantine = |lan: &Lan| {
        let views = lan.nodes[2].mind.peers(&lan.nodes[2].index, lan.now);
        views
            .into_iter()
            .find(|view| view.peer == liar)
            .unwrap()
            .quarantine
    };
    assert_eq!(quarantine(&lan).unwrap().0, Duration::from_secs(30));
    let providers = lan.nodes[2]
        .mind
        .providers(&lan.nodes[2].index, &hash(7), lan.now);
    assert_eq!(providers, [second(&lan)]);
    lan.run(Duration::from_secs(31));
    assert!(quarantine(&lan).is_none());
}

#[test]
fn the_faster_provider_is_preferred_and_load_is_spread() {
    let mut lan = wanting();
    let slow = first(&lan);
    lan.input(
        2,
        Input::TransferProgress {
            fetch: FETCH,
            attempt: 1,
            at: 2 << 20,
        },
    );
    lan.run(Duration::from_millis(1900));
    lan.input(
        2,
        Input::TransferEnded {
            fetch: FETCH,
            attempt: 1,
            outcome: Ok(()),
        },
    );
    lan.input(2, Input::FetchDone { fetch: FETCH });
    let LookupOutcome::Found { narinfo, .. } = lan.look_up(2, 7) else {
        panic!("not found")
    };
    lan.input(
        2,
        Input::Fetch {
            fetch: FetchId(2),
            narinfo: narinfo.clone(),
        },
    );
    assert_ne!(
        lan.nodes[2].transfers[1].2, slow,
        "1 MB/s is worse than an untried peer"
    );
    // An untried peer is worth 100 MB/s shared among its transfers.
    for number in 3..10 {
        lan.input(
            2,
            Input::Fetch {
                fetch: FetchId(number),
                narinfo: narinfo.clone(),
            },
        );
    }
    assert!(
        lan.nodes[2].transfers[2..]
            .iter()
            .all(|transfer| transfer.2 != slow)
    );
}
