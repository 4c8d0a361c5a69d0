//! Messages as bytes and back: the three that make up the traffic of a mesh.

use divan::{Bencher, counter::BytesCount};
use granary_protocol::announcement::{Delta, SetDigest, SignedHead};
use granary_protocol::availability::{Cursor, HashPrefix, Operation};
use granary_protocol::message::{DELTA_OPERATIONS_MAX, Message, SNAPSHOT_PREFIXES_MAX};
use granary_protocol::peer::PeerKey;
use granary_protocol::store_path::StorePathHash;
use granary_protocol::wire::{decode, encode};

fn main() {
    divan::main();
}

const AT: Cursor = Cursor {
    epoch: 7,
    sequence: 1_000_000,
};

fn delta() -> Message {
    let operations = (0..DELTA_OPERATIONS_MAX as u64).map(|number| match number % 10 {
        0 => Operation::Remove(HashPrefix(number << 40)),
        _ => Operation::Add(HashPrefix(number << 40)),
    });
    let key = PeerKey::from_seed([1; 32]);
    let set = SetDigest([0; 32]);
    Message::Delta(Delta::sign(&key, AT, 1, set, operations.collect()))
}

fn snapshot() -> Message {
    let step = u64::MAX / SNAPSHOT_PREFIXES_MAX as u64;
    let prefixes = (1..=SNAPSHOT_PREFIXES_MAX as u64).map(|number| HashPrefix(number * step));
    let prefixes: Vec<HashPrefix> = prefixes.collect();
    let set = prefixes.iter().copied().collect();
    Message::Snapshot {
        head: SignedHead::of_set(&PeerKey::from_seed([1; 32]), AT, &set),
        after: None,
        prefixes,
        is_last: true,
    }
}

fn lookup() -> Message {
    let hashes = (0..=255).map(|byte| StorePathHash::from_bytes([byte; 20]));
    Message::Lookup {
        request: 1,
        hashes: hashes.collect(),
    }
}

fn example(name: &str) -> Message {
    match name {
        "delta" => delta(),
        "snapshot" => snapshot(),
        "lookup" => lookup(),
        other => panic!("there is no example {other}"),
    }
}

#[divan::bench(args = ["delta", "snapshot", "lookup"])]
fn encoding(bencher: Bencher, name: &str) {
    let message = example(name);
    let bytes = encode(&message).len();
    bencher
        .counter(BytesCount::new(bytes))
        .bench(|| encode(divan::black_box(&message)));
}

#[divan::bench(args = ["delta", "snapshot", "lookup"])]
fn decoding(bencher: Bencher, name: &str) {
    let bytes = encode(&example(name));
    bencher
        .counter(BytesCount::new(bytes.len()))
        .bench(|| decode(divan::black_box(&bytes)));
}
