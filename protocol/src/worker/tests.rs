use super::*;
use proptest::prelude::*;

fn number(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = number(text.len() as u64);
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn version(minor: u64) -> Version {
    let greeting = [number(DAEMON_GREETING), number(MAJOR << 8 | minor)].concat();
    greeted(&greeting).unwrap().unwrap().0
}

/// What Nix 2.8's daemon really said (protocol 1.34): its greeting, its welcome, and an answer to a root.
const DAEMON_2_8: (&str, &str, &str) = (
    "6f697864000000002201000000000000",
    "0500000000000000322e382e3000000073746c6100000000",
    "73746c61000000000100000000000000",
);

fn hex(text: &str) -> Vec<u8> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap()
}

/// Feeds ever longer beginnings: all but the whole are too few, and nothing after it is taken.
fn check<T: std::fmt::Debug + PartialEq>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Parsed<T>,
    expected: T,
) {
    for length in 0..bytes.len() {
        assert_eq!(read(&bytes[..length]), Ok(None), "{length}");
    }
    let followed = [bytes, b"more"].concat();
    assert_eq!(read(&followed), Ok(Some((expected, bytes.len()))));
}

#[test]
fn what_a_real_daemon_said_is_understood() {
    let (greeting, said, added) = DAEMON_2_8;
    let version = Version { minor: 34 };
    check(&hex(greeting), greeted, version);
    check(&hex(said), |bytes| welcome(version, bytes), Answer::Done);
    check(
        &hex(added),
        |bytes| temp_root_added(version, bytes),
        Answer::Done,
    );
    assert_eq!(introduction(version).len(), 24);
}

#[test]
fn versions_meet_in_the_middle() {
    for (theirs, ours) in [(18, 18), (34, 34), (38, 38), (39, 38), (255, 38)] {
        assert_eq!(version(theirs), Version { minor: ours });
    }
    for (major, minor) in [(1, 17), (0, 30), (2, 0)] {
        let greeting = [number(DAEMON_GREETING), number(major << 8 | minor)].concat();
        assert_eq!(
            greeted(&greeting),
            Err(WorkerError::Version { major, minor })
        );
    }
    assert_eq!(
        greeted(b"HTTP/1.1"),
        Err(WorkerError::Greeting {
            found: u64::from_le_bytes(*b"HTTP/1.1")
        })
    );
}

#[test]
fn each_version_is_welcomed_in_its_own_words() {
    let last = number(LOG_LAST);
    for (minor, words) in [
        (18, vec![]),
        (32, vec![]),
        (33, vec![string("2.7.0")]),
        (35, vec![string("2.15.0"), number(1)]),
        (37, vec![string("2.20.0"), number(2)]),
        (
            38,
            vec![number(1), string("a-feature"), string("2.26.3"), number(0)],
        ),
    ] {
        let bytes = [words.concat(), last.clone()].concat();
        check(&bytes, |bytes| welcome(version(minor), bytes), Answer::Done);
        let words = 3 + usize::from(minor >= 38);
        assert_eq!(introduction(version(minor)).len(), 8 * words);
    }
    let untrusting = [string("2.15.0"), number(3)].concat();
    assert!(matches!(
        welcome(version(35), &untrusting),
        Err(WorkerError::Unknown { found: 3, .. })
    ));
}

#[test]
fn log_messages_and_errors_are_read_past() {
    let log = [
        number(LOG_NEXT),
        string("waiting for the big garbage collector lock..."),
        number(LOG_START_ACTIVITY),
        [number(7), number(3), number(105)].concat(),
        string("doing"),
        [number(2), number(0), number(9), number(1), string("field")].concat(),
        number(0),
        number(LOG_RESULT),
        [number(7), number(101), number(1), number(0), number(4)].concat(),
        number(LOG_STOP_ACTIVITY),
        number(7),
    ]
    .concat();
    let done = [log.clone(), number(LOG_LAST), number(1)].concat();
    let old = [
        log.clone(),
        number(LOG_ERROR),
        string("no such path"),
        number(1),
    ]
    .concat();
    let new = [
        log,
        number(LOG_ERROR),
        [string("Error"), number(0), string("Error")].concat(),
        string("no such path"),
        [number(0), number(1), number(0), string("while asked")].concat(),
    ]
    .concat();
    let refused = || Answer::Refused("no such path".into());
    for minor in [18, 25, 26, 38] {
        let read = |bytes: &[u8]| temp_root_added(version(minor), bytes);
        check(&done, read, Answer::Done);
        check(if minor < 26 { &old } else { &new }, read, refused());
    }
}

#[test]
fn what_is_too_long_or_unknown_is_refused_at_once() {
    let read = |bytes: &[u8]| temp_root_added(version(34), bytes);
    let cases = [
        [number(LOG_NEXT), number(1 << 40)].concat(),
        [number(LOG_RESULT), number(0), number(0), number(1 << 60)].concat(),
        [
            number(LOG_RESULT),
            number(0),
            number(0),
            number(1),
            number(2),
        ]
        .concat(),
        [number(LOG_NEXT), number(1), b"a\x01\0\0\0\0\0\0".to_vec()].concat(),
        number(0),
        [number(LOG_LAST), number(0)].concat(),
    ];
    for bytes in cases {
        assert!(read(&bytes).is_err(), "{bytes:?}");
    }
    // A daemon that logs without end.
    let line = [number(LOG_NEXT), string(&"a".repeat(1000))].concat();
    let endless = line.repeat(ANSWER_BYTES_MAX / line.len() + 1);
    assert!(matches!(
        read(&endless),
        Err(WorkerError::TooLong {
            what: "an answer",
            ..
        })
    ));
}

#[test]
fn a_root_is_asked_for_by_its_full_path() {
    let path =
        StorePath::from_base_name("00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60").unwrap();
    let bytes = add_temp_root(&StoreDir::default(), &path);
    let text = "/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60";
    assert_eq!(bytes, [number(11), string(text)].concat());
}

proptest! {
    /// Whatever a daemon says, a parser ends, and takes no more than there is.
    #[test]
    fn nothing_makes_a_parser_panic(minor in 18u64..40, words in proptest::collection::vec(
        prop_oneof![
            Just(LOG_NEXT), Just(LOG_ERROR), Just(LOG_LAST), Just(LOG_RESULT), Just(LOG_START_ACTIVITY),
            0u64..4, any::<u64>(),
        ], 0..40), cut in 0usize..320,
    ) {
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        let bytes = &bytes[..cut.min(bytes.len())];
        let version = version(minor);
        for parsed in [welcome(version, bytes), temp_root_added(version, bytes)] {
            if let Ok(Some((_, taken))) = parsed {
                prop_assert!(taken <= bytes.len());
            }
        }
        let _ = greeted(bytes);
    }
}
