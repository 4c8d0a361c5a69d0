//! Anchors and upstreams: asked when no peer can answer, and not at all when they do not answer.

use super::*;

const MS: Duration = Duration::from_millis(1);

const BOTH: [CacheRole; 2] = [CacheRole::Upstream, CacheRole::Anchor];
const UPSTREAM: usize = 0;
const ANCHOR: usize = 1;

fn alone(caches: &[CacheRole]) -> Alone {
    Alone::with(0, 1, caches)
}

fn is_open(alone: &Alone, cache: usize) -> bool {
    alone.mind.caches(alone.now)[cache].breaker != BreakerView::Closed
}

/// A mind whose only cache, an anchor, has not answered twice.
fn given_up() -> Alone {
    let mut alone = alone(&[CacheRole::Anchor]);
    for path in [1, 2] {
        alone.look_up(path);
        alone.wait(900 * MS);
    }
    assert!(is_open(&alone, 0));
    alone
}

#[test]
fn what_no_peer_announced_is_asked_of_anchors_and_then_of_upstreams() {
    let mut alone = alone(&BOTH);
    let outputs = alone.look_up(7);
    let [(ANCHOR, request, hashes)] = &asked_caches(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(hashes, &[hash(7)]);
    assert_eq!(ended(&alone.cache_says(ANCHOR, *request, 7, None)), []);
    let outputs = alone.wait(2 * MS);
    let [(UPSTREAM, request, _)] = asked_caches(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    let outputs = alone.cache_says(UPSTREAM, request, 7, Some(narinfo(7)));
    assert_eq!(ended(&outputs), [(7, Some(7))]);
    let is_right = |output: &Output| {
        matches!(output, Output::LookupDone { outcome: LookupOutcome::Found { caches, providers, .. }, .. }
            if *caches == [UPSTREAM] && providers.is_empty())
    };
    assert!(outputs.iter().any(is_right));
}

#[test]
fn peers_are_asked_before_caches() {
    let mut alone = alone(&BOTH);
    alone.admit(1, prefixes([7]));
    let outputs = alone.look_up(7);
    assert_eq!(asked_caches(&outputs), []);
    let [(1, request, _)] = asked_peers(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    alone.peer_says(1, request, 7, None);
    assert_eq!(asked_caches(&alone.wait(2 * MS))[0].0, ANCHOR);
}

#[test]
fn a_cache_slower_than_it_usually_is_has_the_next_one_asked_as_well() {
    let mut alone = alone(&BOTH);
    assert_eq!(asked_caches(&alone.look_up(7)).len(), 1);
    assert_eq!(asked_caches(&alone.wait(149 * MS)), [], "a first guess");
    let outputs = alone.wait(3 * MS);
    assert_eq!(asked_caches(&outputs)[0].0, UPSTREAM);
}

#[test]
fn a_burst_travels_as_one_request_of_at_most_256_hashes() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let mut outputs = Vec::new();
    for number in 0..300u16 {
        let mut bytes = [9; 20];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        outputs.extend(alone.input(Input::Lookup {
            lookup: LookupId(number.into()),
            hash: StorePathHash::from_bytes(bytes),
        }));
    }
    outputs.extend(alone.wait(2 * MS));
    let asked: Vec<usize> = asked_caches(&outputs)
        .iter()
        .map(|(_, _, hashes)| hashes.len())
        .collect();
    assert_eq!(asked, [256, 44]);
}

#[test]
fn answers_may_come_in_pieces_and_what_fails_is_asked_elsewhere() {
    let mut alone = alone(&BOTH);
    let mut outputs = Vec::new();
    for path in 1..=3 {
        let (lookup, hash) = (LookupId(path.into()), hash(path));
        outputs.extend(alone.input(Input::Lookup { lookup, hash }));
    }
    outputs.extend(alone.wait(2 * MS));
    let request = asked_caches(&outputs)[0].1;
    let outputs = alone.cache_says(ANCHOR, request, 2, Some(narinfo(2)));
    assert_eq!(ended(&outputs), [(2, Some(2))]);
    let outputs = alone.cache_says(ANCHOR, request, 1, Some(narinfo(1)));
    assert_eq!(ended(&outputs), [(1, Some(1))]);
    let cache = ANCHOR;
    let mut outputs = alone.input(Input::CacheFailed { cache, request });
    outputs.extend(alone.wait(2 * MS));
    let asked = asked_caches(&outputs);
    assert_eq!(asked[0].0, UPSTREAM);
    assert_eq!(asked[0].2, [hash(3)]);
    assert!(!is_open(&alone, ANCHOR), "one failure may be bad luck");
}

#[test]
fn a_cache_that_is_still_answering_has_not_failed() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let mut requests = Vec::new();
    for (first, second) in [(1, 2), (3, 4)] {
        let (lookup, hash) = (LookupId(first.into()), hash(first));
        alone.input(Input::Lookup { lookup, hash });
        requests.push((asked_caches(&alone.look_up(second))[0].1, first));
    }
    alone.wait(600 * MS);
    for (request, path) in requests {
        let outputs = alone.cache_says(0, request, path, Some(narinfo(path)));
        assert_eq!(ended(&outputs).len(), 1);
    }
    // Past the deadline of the other half, and 400 ms after something came.
    assert_eq!(ended(&alone.wait(400 * MS)), [(2, None), (4, None)]);
    assert!(!is_open(&alone, 0));
    alone.wait(600 * MS);
    assert!(is_open(&alone, 0), "nothing came for a second");
}

#[test]
fn what_a_cache_does_not_have_is_not_asked_again_for_a_while() {
    let mut alone = alone(&BOTH);
    for _ in 0..2 {
        let cache_and_request = |outputs: &[Output]| asked_caches(outputs)[0].clone();
        let (cache, request, _) = cache_and_request(&alone.look_up(7));
        alone.cache_says(cache, request, 7, None);
    }
    // The second question went to the upstream only.
    let outputs = alone.wait(2 * MS);
    assert_eq!(asked_caches(&outputs), []);
    assert_eq!(ended(&alone.look_up(7)), [(7, None)]);
    alone.wait(Duration::from_secs(31));
    assert_eq!(asked_caches(&alone.look_up(7))[0].0, ANCHOR);
}

#[test]
fn a_miss_is_forgotten_when_somebody_announces_the_path_or_the_network_changes() {
    let check = |news: &dyn Fn(&mut Alone)| {
        let mut alone = alone(&[CacheRole::Upstream]);
        alone.admit(1, vec![]);
        let request = asked_caches(&alone.look_up(7))[0].1;
        assert_eq!(ended(&alone.cache_says(0, request, 7, None)), [(7, None)]);
        assert_eq!(ended(&alone.look_up(7)), [(7, None)]);
        news(&mut alone);
        let outputs = alone.look_up(7);
        // Whoever announced it is asked first.
        let outputs = match asked_peers(&outputs)[..] {
            [(_, request, _)] => {
                alone.peer_says(1, request, 7, None);
                alone.wait(2 * MS)
            }
            _ => outputs,
        };
        assert_eq!(asked_caches(&outputs).len(), 1, "{outputs:?}");
    };
    check(&|alone| {
        let after = Cursor {
            epoch: 1,
            sequence: 1,
        };
        let operations = vec![Operation::Add(HashPrefix::from(&hash(7)))];
        alone.receive(1, delta_of(1, after, operations));
    });
    check(&|alone| drop(alone.input(Input::NetworkChanged)));
    check(&|alone| drop(alone.input(Input::Woke)));
}

#[test]
fn what_we_cannot_trust_counts_as_a_miss_of_that_cache() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let stranger = SecretKey::from_seed("stranger".parse().unwrap(), [9; 32]);
    let mut parsed = NarInfo::parse(&narinfo(7), &StoreDir::default()).unwrap();
    parsed.signatures = vec![stranger.sign(b"anything")];
    let text = parsed.to_text(&StoreDir::default());
    let request = asked_caches(&alone.look_up(7))[0].1;
    let outputs = alone.cache_says(0, request, 7, Some(text));
    assert_eq!(ended(&outputs), [(7, None)]);
    assert_eq!(ended(&alone.look_up(7)), [(7, None)]);
    assert!(!is_open(&alone, 0));
}

#[test]
fn a_black_holed_anchor_is_waited_for_twice_and_then_not_at_all() {
    let mut alone = alone(&[CacheRole::Anchor]);
    for path in [1, 2] {
        assert_eq!(ended(&alone.look_up(path)), []);
        assert_eq!(ended(&alone.wait(897 * MS)), []);
        assert_eq!(ended(&alone.wait(3 * MS)), [(path.into(), None)]);
    }
    let (lookup, hash) = (LookupId(3), hash(3));
    let outputs = alone.input(Input::Lookup { lookup, hash });
    assert_eq!(ended(&outputs), [(3, None)], "at once");
    assert!(is_open(&alone, 0));
}

#[test]
fn whoever_waits_when_a_cache_is_given_up_is_answered_then() {
    let mut alone = alone(&[CacheRole::Anchor]);
    alone.look_up(1);
    alone.look_up(2);
    alone.wait(890 * MS);
    alone.look_up(3);
    // The second silence was noticed 904 ms after the first question was thought of.
    let outputs = alone.wait(10 * MS);
    assert!(ended(&outputs).contains(&(3, None)), "{outputs:?}");
}

#[test]
fn nonsense_and_reported_failures_count_against_a_cache() {
    let check = |fail: &dyn Fn(&mut Alone, u64, u8) -> Vec<Output>| {
        let mut alone = alone(&[CacheRole::Upstream]);
        for path in [1, 2] {
            let request = asked_caches(&alone.look_up(path))[0].1;
            let outputs = fail(&mut alone, request, path);
            assert_eq!(ended(&outputs), [(path.into(), None)]);
        }
        assert!(is_open(&alone, 0));
    };
    check(&|alone, request, _| alone.input(Input::CacheFailed { cache: 0, request }));
    check(&|alone, request, path| alone.cache_says(0, request, path, Some("nonsense".into())));
    check(&|alone, request, path| alone.cache_says(0, request, path, Some(narinfo(path + 1))));
}

#[test]
fn an_answer_of_any_kind_forgives_earlier_failures() {
    let mut alone = alone(&[CacheRole::Upstream]);
    for path in [1, 2, 3, 4] {
        let request = asked_caches(&alone.look_up(path))[0].1;
        if path % 2 == 0 {
            alone.cache_says(0, request, path, None);
        } else {
            alone.input(Input::CacheFailed { cache: 0, request });
        }
    }
    assert!(!is_open(&alone, 0));
}

#[test]
fn a_cache_that_was_given_up_is_probed_with_what_is_wanted_one_probe_at_a_time() {
    let mut alone = given_up();
    let outputs = alone.wait(Duration::from_secs(60));
    assert_eq!(asked_caches(&outputs), [], "nobody wanted anything");
    assert_eq!(ended(&alone.look_up(3))[..], [(3, None)]);
    let outputs = alone.wait(1 * MS);
    assert_eq!(
        asked_caches(&outputs),
        [],
        "the probe is on its way already"
    );
    alone.look_up(4);
    assert_eq!(asked_caches(&alone.wait(800 * MS)), [], "one at a time");
}

#[test]
fn pauses_between_probes_grow_to_five_minutes() {
    let mut alone = given_up();
    let mut pauses = Vec::new();
    let mut last = alone.now;
    for _ in 0..9 {
        // Somebody always wants something.
        let probed = (0..4000).find_map(|_| {
            let mut outputs = alone.look_up(3);
            outputs.extend(alone.wait(98 * MS));
            (!asked_caches(&outputs).is_empty()).then_some(alone.now)
        });
        let probed = probed.expect("a probe within 400 s");
        pauses.push((probed - last).as_secs_f64());
        // It is silent again.
        alone.wait(901 * MS);
        last = alone.now;
    }
    let expected = [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0];
    for (pause, expected) in pauses.iter().zip(expected) {
        let jitter = 0.25 * expected + 0.2;
        assert!((pause - expected).abs() <= jitter, "{pauses:?}");
    }
}

#[test]
fn a_probe_that_is_answered_opens_the_way_again() {
    let mut alone = given_up();
    alone.wait(Duration::from_secs(10));
    let outputs = alone.look_up(3);
    assert_eq!(ended(&outputs), [(3, None)], "nobody waits for a probe");
    let request = asked_caches(&outputs)[0].1;
    alone.cache_says(0, request, 3, Some(narinfo(3)));
    assert!(!is_open(&alone, 0));
    assert_eq!(ended(&alone.look_up(3)), [(3, Some(3))], "and was of use");
}

#[test]
fn another_network_or_waking_gives_caches_another_chance() {
    for news in [Input::NetworkChanged, Input::Woke] {
        let mut alone = given_up();
        alone.input(news);
        assert_eq!(asked_caches(&alone.look_up(3)).len(), 1);
    }
}

#[test]
fn what_was_asked_over_the_old_network_does_not_count_on_the_new_one() {
    let mut alone = alone(&[CacheRole::Anchor]);
    alone.look_up(1);
    alone.look_up(2);
    alone.input(Input::NetworkChanged);
    alone.wait(Duration::from_secs(2));
    assert!(!is_open(&alone, 0));
}

#[test]
fn an_answer_after_the_deadline_fills_the_memory() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let request = asked_caches(&alone.look_up(7))[0].1;
    assert_eq!(ended(&alone.wait(Duration::from_secs(3))), [(7, None)]);
    assert_eq!(
        ended(&alone.cache_says(0, request, 7, Some(narinfo(7)))),
        []
    );
    assert_eq!(ended(&alone.look_up(7)), [(7, Some(7))]);
    // Too late to remember what it was about.
    let request = asked_caches(&alone.look_up(8))[0].1;
    alone.wait(Duration::from_secs(11));
    alone.cache_says(0, request, 8, Some(narinfo(8)));
    assert_eq!(asked_caches(&alone.look_up(8)).len(), 1);
}

#[test]
fn a_remembered_narinfo_is_answered_only_while_its_cache_is_well() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let request = asked_caches(&alone.look_up(7))[0].1;
    alone.cache_says(0, request, 7, Some(narinfo(7)));
    let outputs = alone.look_up(7);
    assert_eq!(ended(&outputs), [(7, Some(7))]);
    assert_eq!(asked_caches(&outputs), []);
    for path in [1, 2] {
        let request = asked_caches(&alone.look_up(path))[0].1;
        alone.input(Input::CacheFailed { cache: 0, request });
    }
    assert_eq!(ended(&alone.look_up(7)), [(7, None)]);
}

#[test]
fn an_anchor_that_has_a_path_is_asked_again_after_half_a_minute() {
    let mut alone = alone(&[CacheRole::Anchor]);
    let mut request = asked_caches(&alone.look_up(7))[0].1;
    for _ in 0..2 {
        alone.cache_says(0, request, 7, Some(narinfo(7)));
        // However often it is of use meanwhile.
        for _ in 0..2 {
            alone.wait(Duration::from_secs(14));
            let outputs = alone.look_up(7);
            assert_eq!(ended(&outputs), [(7, Some(7))]);
            assert_eq!(asked_caches(&outputs), []);
        }
        alone.wait(Duration::from_secs(3));
        let outputs = alone.look_up(7);
        assert_eq!(ended(&outputs), []);
        request = asked_caches(&outputs)[0].1;
    }
    // It was taken out of the anchor.
    let outputs = alone.cache_says(0, request, 7, None);
    assert_eq!(ended(&outputs), [(7, None)]);
    assert_eq!(ended(&alone.look_up(7)), [(7, None)]);
}

#[test]
fn what_an_anchor_told_long_ago_is_looked_up_ahead_again() {
    let mut alone = alone(&[CacheRole::Anchor]);
    let request = asked_caches(&alone.look_up(2))[0].1;
    alone.cache_says(0, request, 2, Some(narinfo(2)));
    alone.wait(Duration::from_secs(31));
    let request = asked_caches(&alone.look_up(1))[0].1;
    let text = narinfo_of_build(1, 1, &[2]);
    let mut outputs = alone.cache_says(0, request, 1, Some(text));
    outputs.extend(alone.wait(5 * MS));
    let asked = asked_caches(&outputs);
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].2, [hash(2)]);
}

#[test]
fn an_upstream_that_has_a_path_is_believed_for_an_hour() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let request = asked_caches(&alone.look_up(7))[0].1;
    alone.cache_says(0, request, 7, Some(narinfo(7)));
    alone.wait(Duration::from_secs(3599));
    assert_eq!(asked_caches(&alone.look_up(7)), []);
    alone.wait(Duration::from_secs(2));
    assert_eq!(asked_caches(&alone.look_up(7)).len(), 1);
}

#[test]
fn references_of_what_was_found_are_looked_up_ahead() {
    let mut alone = alone(&[CacheRole::Upstream]);
    // Number 4 is here already.
    let (added, removed) = (vec![hash(4)], vec![]);
    alone.input(Input::LocalChanged { added, removed });
    alone.wait(100 * MS);
    let request = asked_caches(&alone.look_up(1))[0].1;
    let text = narinfo_of_build(1, 1, &[1, 2, 3, 4]);
    let mut outputs = alone.cache_says(0, request, 1, Some(text));
    assert_eq!(ended(&outputs), [(1, Some(1))], "not held up by it");
    outputs.extend(alone.wait(5 * MS));
    let [(_, request, hashes)] = &asked_caches(&outputs)[..] else {
        panic!("{outputs:?}")
    };
    assert_eq!(hashes, &[hash(2), hash(3)]);
    alone.cache_says(0, *request, 2, Some(narinfo(2)));
    let outputs = alone.look_up(2);
    assert_eq!(ended(&outputs), [(2, Some(2))]);
    assert_eq!(asked_caches(&outputs), []);
    // The other one is still being asked for: whoever wants it waits for that.
    assert_eq!(asked_caches(&alone.look_up(3)), []);
    assert_eq!(
        ended(&alone.cache_says(0, *request, 3, Some(narinfo(3)))),
        [(3, Some(3))]
    );
}

#[test]
fn looking_ahead_is_bounded_at_once_and_in_all() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let references: Vec<u8> = (2..=255).collect();
    let wide = |alone: &mut Alone, path: u8| {
        let request = asked_caches(&alone.look_up(path))[0].1;
        let text = narinfo_of_build(path, path, &references);
        let mut outputs = alone.cache_says(0, request, path, Some(text));
        outputs.extend(alone.wait(20 * MS));
        outputs
    };
    let outputs = wide(&mut alone, 1);
    let asked = |outputs: &[Output]| -> usize {
        let asked = asked_caches(outputs).into_iter();
        asked.map(|(_, _, hashes)| hashes.len()).sum()
    };
    assert_eq!(asked(&outputs), 32, "so many at once");
    // Whatever the cache says, every answer asks for more, until it is no longer paid for.
    let mut total = asked(&outputs);
    let mut open = VecDeque::from(asked_caches(&outputs));
    while let Some((cache, request, hashes)) = open.pop_front() {
        for hash in hashes {
            let answers = vec![Answer {
                hash,
                narinfo: None,
            }];
            let mut outputs = alone.input(Input::CacheAnswers {
                cache,
                request,
                answers,
            });
            outputs.extend(alone.wait(5 * MS));
            total += asked(&outputs);
            open.extend(asked_caches(&outputs));
        }
    }
    assert_eq!(total, 254);
    // What was missing is not asked for again by the next one, nor is more than was paid for.
    assert!(asked(&wide(&mut alone, 0)) <= 10);
}

#[test]
fn a_lookup_does_not_wait_behind_what_is_looked_up_ahead() {
    let mut alone = alone(&[CacheRole::Upstream]);
    let request = asked_caches(&alone.look_up(1))[0].1;
    let references: Vec<u8> = (100..=255).collect();
    let text = narinfo_of_build(1, 1, &references);
    alone.cache_says(0, request, 1, Some(text));
    let (lookup, hash) = (LookupId(2), hash(2));
    let mut outputs = alone.input(Input::Lookup { lookup, hash });
    outputs.extend(alone.wait(2 * MS));
    let asked = asked_caches(&outputs).into_iter();
    let own: Vec<_> = asked.filter(|(_, _, hashes)| *hashes == [hash]).collect();
    assert_eq!(own.len(), 1, "in a request of its own");
}

#[test]
fn status_knows_the_state_of_every_cache() {
    let mut alone = alone(&BOTH);
    let request = asked_caches(&alone.look_up(7))[0].1;
    alone.wait(30 * MS);
    alone.cache_says(ANCHOR, request, 7, Some(narinfo(7)));
    let views = alone.mind.caches(alone.now);
    assert_eq!(views[UPSTREAM].role, CacheRole::Upstream);
    assert_eq!(views[UPSTREAM].answers_within, None);
    assert_eq!(views[ANCHOR].role, CacheRole::Anchor);
    assert_eq!(views[ANCHOR].answers_within, Some(30 * MS));
    let given_up = given_up();
    let breaker = given_up.mind.caches(given_up.now)[0].breaker;
    let BreakerView::Open { probe_in } = breaker else {
        panic!("{breaker:?}")
    };
    assert!(probe_in > Duration::from_secs(3) && probe_in < Duration::from_secs(7));
}
