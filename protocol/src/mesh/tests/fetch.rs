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
            held_up: Duration::ZERO,
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
            held_up: Duration::ZERO,
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
                held_up: Duration::ZERO,
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
            held_up: Duration::ZERO,
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
            held_up: Duration::ZERO,
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

/// One mind that fetches path 7; reports say what the hands would.
struct Fetching {
    alone: Alone,
    held_up: Duration,
}

/// Who brings the NAR, by attempt: a peer's number, or a cache's after 1000.
fn transfers(outputs: &[Output]) -> Vec<(u32, usize, u64)> {
    let transfer = |output: &Output| match output {
        Output::Transfer {
            attempt,
            source,
            from,
            ..
        } => {
            let source = match source {
                Source::Peer { peer, .. } => number_of(*peer),
                Source::Cache { cache, narinfo } => {
                    assert_eq!(narinfo.narinfo().url, format!("nar/of-cache-{cache}"));
                    1000 + cache
                }
            };
            Some((*attempt, source, *from))
        }
        _ => None,
    };
    outputs.iter().filter_map(transfer).collect()
}

fn has_failed(outputs: &[Output]) -> bool {
    let is_failure = |output: &Output| matches!(output, Output::FetchFailed { .. });
    outputs.iter().any(is_failure)
}

/// What a cache says of path 7; the URL tells the cache.
fn of_cache(cache: usize, build: u8) -> Option<String> {
    let text = narinfo_of_build(7, build, &[]);
    Some(text.replace("nar/x.nar", &format!("nar/of-cache-{cache}")))
}

fn verified(build: u8) -> Arc<VerifiedNarInfo> {
    let dir = StoreDir::default();
    let narinfo = NarInfo::parse(&narinfo_of_build(7, build, &[]), &dir).unwrap();
    let trust = TrustedKeys::from_iter([builder().public_key()]);
    Arc::new(VerifiedNarInfo::verify(narinfo, &trust, &dir).unwrap())
}

impl Fetching {
    fn with(caches: &[CacheRole]) -> Fetching {
        Fetching {
            alone: Alone::with(0, 1, caches),
            held_up: Duration::ZERO,
        }
    }

    /// Members 1 and so on, all of whom hold path 7.
    fn of_peers(count: usize, caches: &[CacheRole]) -> Fetching {
        let mut fetching = Fetching::with(caches);
        for number in 1..=count {
            fetching.alone.admit(number, prefixes([7]));
        }
        fetching
    }

    fn fetch(&mut self, number: u64) -> Vec<Output> {
        self.alone.input(Input::Fetch {
            fetch: FetchId(number),
            narinfo: verified(7),
        })
    }

    fn progress(&mut self, number: u64, attempt: u32, at: u64) -> Vec<Output> {
        self.alone.input(Input::TransferProgress {
            fetch: FetchId(number),
            attempt,
            at,
            held_up: self.held_up,
        })
    }

    fn ended(&mut self, number: u64, attempt: u32, outcome: Result<(), Blame>) -> Vec<Output> {
        self.alone.input(Input::TransferEnded {
            fetch: FetchId(number),
            attempt,
            outcome,
        })
    }

    /// Reports every quarter of a second at `bytes_per_second`; returns what came of it.
    fn run_at(
        &mut self,
        number: u64,
        attempt: u32,
        from: u64,
        bytes_per_second: u64,
        duration: Duration,
    ) -> Vec<Output> {
        let mut outputs = Vec::new();
        for quarter in 1..=(duration.as_millis() / 250) as u64 {
            outputs.extend(self.alone.wait(Duration::from_millis(250)));
            let at = from + bytes_per_second / 4 * quarter;
            outputs.extend(self.progress(number, attempt, at));
        }
        outputs
    }

    /// A whole fetch, so that the speed of its source is known.
    fn learn(&mut self, bytes_per_second: u64) -> usize {
        let (attempt, source, _) = transfers(&self.fetch(1000))[0];
        self.run_at(1000, attempt, 0, bytes_per_second, Duration::from_secs(4));
        self.ended(1000, attempt, Ok(()));
        let fetch = FetchId(1000);
        self.alone.input(Input::FetchDone { fetch });
        source
    }

    /// A cache answers a question about path 7.
    fn told(&mut self, outputs: &[Output], build: Option<u8>) -> Vec<Output> {
        let (cache, request, _) = asked_caches(outputs)[0];
        let text = build.and_then(|build| of_cache(cache, build));
        let mut outputs = self.alone.cache_says(cache, request, 7, text);
        outputs.extend(self.alone.wait(Duration::from_millis(2)));
        outputs
    }
}

#[test]
fn a_source_far_below_its_usual_speed_is_replaced_within_seconds() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let slow = fetching.learn(10_000_000);
    // The other one is worse, as far as is known.
    let other = 3 - slow;
    assert_eq!(
        transfers(&fetching.fetch(1))[0].1,
        other,
        "newcomers are tried"
    );
    fetching.run_at(1, 1, 0, 2_000_000, Duration::from_secs(4));
    fetching.ended(1, 1, Ok(()));

    assert_eq!(transfers(&fetching.fetch(2)), [(1, slow, 0)]);
    let outputs = fetching.run_at(2, 1, 0, 900_000, Duration::from_millis(4750));
    assert_eq!(transfers(&outputs), [], "not before five seconds");
    let outputs = fetching.run_at(2, 1, 4_275_000, 900_000, Duration::from_millis(500));
    let stop = Output::StopTransfer {
        fetch: FetchId(2),
        attempt: 1,
    };
    assert!(outputs.contains(&stop));
    assert_eq!(transfers(&outputs), [(2, other, 4_500_000)]);
}

#[test]
fn speed_is_measured_over_the_last_seconds_not_over_the_whole() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let slow = fetching.learn(10_000_000);
    fetching.fetch(1);
    fetching.run_at(1, 1, 0, 1_000_000, Duration::from_secs(4));
    fetching.ended(1, 1, Ok(()));
    assert_eq!(transfers(&fetching.fetch(2))[0].1, slow);
    // A minute at full speed, which would hide a crawl for a minute more.
    fetching.run_at(2, 1, 0, 10_000_000, Duration::from_secs(60));
    let outputs = fetching.run_at(2, 1, 600_000_000, 500_000, Duration::from_millis(6500));
    assert_eq!(transfers(&outputs).len(), 1);
}

#[test]
fn a_slow_source_without_another_one_goes_on() {
    let mut fetching = Fetching::of_peers(1, &[]);
    fetching.learn(10_000_000);
    fetching.fetch(1);
    let outputs = fetching.run_at(1, 1, 0, 100_000, Duration::from_secs(60));
    assert!(transfers(&outputs).is_empty() && !has_failed(&outputs));
}

#[test]
fn a_reader_that_crawls_is_not_its_sources_fault() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let source = fetching.learn(10_000_000);
    fetching.fetch(1);
    fetching.run_at(1, 1, 0, 1_000_000, Duration::from_secs(4));
    fetching.ended(1, 1, Ok(()));
    assert_eq!(transfers(&fetching.fetch(2))[0].1, source);
    for quarter in 1..=240 {
        fetching.held_up += Duration::from_millis(240);
        let outputs = fetching.run_at(2, 1, quarter * 25_000, 0, Duration::from_millis(250));
        assert_eq!(transfers(&outputs), []);
    }
    // Nor does it make the source a slow one.
    fetching.ended(2, 1, Ok(()));
    let number = source;
    let speed = fetching.alone.view(number).unwrap().bytes_per_second;
    assert!(speed.unwrap() > 8_000_000, "{speed:?}");
}

#[test]
fn transfers_that_broke_off_tell_of_speed_too() {
    let mut fetching = Fetching::of_peers(1, &[]);
    fetching.fetch(1);
    fetching.run_at(1, 1, 0, 400_000, Duration::from_secs(2));
    assert_eq!(fetching.alone.view(1).unwrap().bytes_per_second, None);
    fetching.ended(1, 1, Err(Blame::Peer));
    assert_eq!(
        fetching.alone.view(1).unwrap().bytes_per_second,
        Some(400_000)
    );
}

#[test]
fn one_that_failed_a_moment_ago_is_asked_after_its_equals() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let failed = transfers(&fetching.fetch(1))[0].1;
    let next = fetching.ended(1, 1, Err(Blame::Peer));
    assert_eq!(transfers(&next)[0].1, 3 - failed);
    fetching.ended(1, 2, Ok(()));
    assert_eq!(transfers(&fetching.fetch(2))[0].1, 3 - failed);
    fetching.ended(2, 1, Ok(()));
    fetching.alone.wait(Duration::from_secs(61));
    assert_eq!(transfers(&fetching.fetch(3))[0].1, failed);
}

#[test]
fn equal_providers_share_the_transfers_of_a_mesh() {
    let mut first = BTreeSet::new();
    for seed in 0..32 {
        let mut fetching = Fetching::with(&[]);
        fetching.alone = Alone::with(0, seed, &[]);
        for number in 1..=4 {
            fetching.alone.admit(number, prefixes([7]));
        }
        first.insert(transfers(&fetching.fetch(1))[0].1);
    }
    assert_eq!(first, BTreeSet::from([1, 2, 3, 4]));
}

#[test]
fn a_cache_takes_over_when_no_peer_is_left() {
    let mut fetching = Fetching::of_peers(1, &[CacheRole::Upstream]);
    fetching.fetch(1);
    fetching.progress(1, 1, 500);
    // The peer had merely a broken connection, perhaps: another try while the cache is asked.
    let mut outputs = fetching.ended(1, 1, Err(Blame::Peer));
    assert_eq!(transfers(&outputs), [(2, 1, 500)]);
    outputs.extend(fetching.alone.wait(Duration::from_millis(2)));
    assert_eq!(asked_caches(&outputs).len(), 1);
    let told = fetching.told(&outputs, Some(7));
    assert_eq!(transfers(&told), [], "the peer is at it");
    let outputs = fetching.ended(1, 2, Err(Blame::Peer));
    assert_eq!(transfers(&outputs), [(3, 1000, 500)]);
    fetching.ended(1, 3, Ok(()));
    assert_eq!(
        fetching.alone.mind.caches(fetching.alone.now)[0].bytes_per_second,
        None
    );
}

#[test]
fn a_fetch_waits_for_what_the_caches_say() {
    let mut fetching = Fetching::of_peers(1, &[CacheRole::Upstream]);
    fetching.fetch(1);
    fetching.progress(1, 1, 500);
    let mut outputs = fetching.ended(1, 1, Err(Blame::Absent));
    assert!(!has_failed(&outputs) && transfers(&outputs).is_empty());
    outputs.extend(fetching.alone.wait(Duration::from_millis(50)));
    let outputs = fetching.told(&outputs, Some(7));
    assert_eq!(transfers(&outputs), [(2, 1000, 500)]);
}

#[test]
fn another_build_of_the_path_is_no_continuation() {
    let mut fetching = Fetching::of_peers(1, &[CacheRole::Anchor, CacheRole::Upstream]);
    fetching.fetch(1);
    let mut outputs = fetching.ended(1, 1, Err(Blame::Absent));
    outputs.extend(fetching.alone.wait(Duration::from_millis(2)));
    let outputs = fetching.told(&outputs, Some(9));
    assert_eq!(asked_caches(&outputs)[0].0, 1, "the next cache is asked");
    let outputs = fetching.told(&outputs, Some(9));
    assert!(has_failed(&outputs));
}

#[test]
fn a_fetch_fails_when_the_caches_do_not_answer() {
    let mut fetching = Fetching::of_peers(1, &[CacheRole::Upstream]);
    fetching.fetch(1);
    fetching.ended(1, 1, Err(Blame::Absent));
    assert!(!has_failed(
        &fetching.alone.wait(Duration::from_millis(890))
    ));
    assert!(has_failed(&fetching.alone.wait(Duration::from_millis(20))));
}

#[test]
fn the_anchor_comes_before_the_upstream_and_both_before_second_tries() {
    let caches = [CacheRole::Upstream, CacheRole::Anchor];
    let mut fetching = Fetching::of_peers(1, &caches);
    // Both caches told of it when the peer was not there yet.
    fetching.alone.input(Input::LinkDown { peer: id(1) });
    let mut outputs = fetching.alone.look_up(7);
    outputs.extend(fetching.alone.wait(Duration::from_millis(160)));
    for (cache, request, _) in asked_caches(&outputs) {
        fetching
            .alone
            .cache_says(cache, request, 7, of_cache(cache, 7));
    }
    fetching.alone.admit(1, prefixes([7]));
    let mut order = vec![transfers(&fetching.fetch(1))[0].1];
    for attempt in 1..6 {
        let outputs = fetching.ended(1, attempt, Err(Blame::Peer));
        order.extend(transfers(&outputs).iter().map(|(_, source, _)| *source));
    }
    assert_eq!(order, [1, 1001, 1000, 1, 1001, 1000]);
    assert!(has_failed(&fetching.ended(1, 6, Err(Blame::Peer))));
}

#[test]
fn transfers_from_a_cache_that_fail_count_against_it() {
    let mut fetching = Fetching::with(&[CacheRole::Upstream]);
    let outputs = fetching.alone.look_up(7);
    fetching.told(&outputs, Some(7));
    assert_eq!(transfers(&fetching.fetch(1)), [(1, 1000, 0)]);
    assert_eq!(
        transfers(&fetching.ended(1, 1, Err(Blame::Peer))),
        [(2, 1000, 0)]
    );
    // A stall is one as well.
    let outputs = fetching.alone.wait(Duration::from_secs(2));
    assert!(has_failed(&outputs));
    let view = &fetching.alone.mind.caches(fetching.alone.now)[0];
    assert_ne!(view.breaker, BreakerView::Closed);
}

#[test]
fn a_cache_that_sent_wrong_bytes_is_not_asked_for_that_path_for_a_while() {
    let mut fetching = Fetching::with(&[CacheRole::Upstream]);
    let outputs = fetching.alone.look_up(7);
    fetching.told(&outputs, Some(7));
    fetching.fetch(1);
    fetching.progress(1, 1, 1000);
    fetching
        .alone
        .input(Input::FetchMismatch { fetch: FetchId(1) });
    assert!(has_failed(&fetching.fetch(2)));
    assert_eq!(ended(&fetching.alone.look_up(7)), [(7, None)]);
    fetching.alone.wait(Duration::from_secs(61));
    assert_eq!(asked_caches(&fetching.alone.look_up(7)).len(), 1);
}

#[test]
fn a_peer_with_another_build_keeps_its_hint() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let outputs = fetching.alone.look_up(7);
    let (teller, request, _) = asked_peers(&outputs)[0];
    fetching
        .alone
        .peer_says(teller, request, 7, Some(narinfo(7)));
    fetching.fetch(1);
    fetching.ended(1, 1, Err(Blame::Absent));
    assert!(has_failed(&fetching.ended(1, 2, Err(Blame::Absent))));
    let left = fetching.alone.index.providers(HashPrefix::from(&hash(7)));
    assert_eq!(
        left,
        [id(3 - teller)],
        "only who had told of it is believed to have lost it"
    );
    let outputs = fetching.alone.look_up(7);
    let (asked, request, _) = asked_peers(&outputs)[0];
    assert_eq!(asked, 3 - teller);
    let text = narinfo_of_build(7, 9, &[]);
    let outputs = fetching.alone.peer_says(asked, request, 7, Some(text));
    assert_eq!(ended(&outputs), [(7, Some(9))]);
}

#[test]
fn a_peer_that_is_gone_when_its_turn_comes_is_passed_over() {
    let mut fetching = Fetching::of_peers(2, &[]);
    let first = transfers(&fetching.fetch(1))[0].1;
    fetching.alone.input(Input::LinkDown {
        peer: id(3 - first),
    });
    let outputs = fetching.ended(1, 1, Err(Blame::Peer));
    assert_eq!(transfers(&outputs), [(2, first, 0)]);
    fetching.alone.input(Input::LinkDown { peer: id(first) });
    assert!(has_failed(&fetching.ended(1, 2, Err(Blame::Peer))));
}
