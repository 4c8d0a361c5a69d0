//! One seed decides everything: in this process, in another, and in another build of the same code
//! (this test and the program are two).

use std::io::{self, Write};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use granary_simulations::scenario::Scenario;
use granary_simulations::world::World;
use sha2::{Digest, Sha256};

fn program(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_granary-simulations");
    Command::new(program)
        .args(arguments)
        .output()
        .expect("the program starts")
}

fn hash(name: &str, seed: u64, nodes: usize) -> String {
    let scenario = Scenario::load(name).unwrap().with_nodes(nodes).unwrap();
    World::new(scenario, seed, None)
        .run()
        .unwrap()
        .hash
        .to_string()
}

#[test]
fn one_seed_makes_one_trace_in_two_processes() {
    for (name, seed) in [
        ("sleepy-laptops", "11"),
        ("lying-peer", "12"),
        ("datagrams", "13"),
    ] {
        let output = program(&["run", name, "--seed", seed, "--nodes", "8", "--json"]);
        let reports: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let here = hash(name, seed.parse().unwrap(), 8);
        assert_eq!(reports[0]["trace_hash"], here, "{name}");
        assert_eq!(
            here,
            hash(name, seed.parse().unwrap(), 8),
            "{name}, twice here"
        );
    }
}

#[test]
fn another_seed_makes_another_trace() {
    assert_ne!(hash("office-10", 1, 4), hash("office-10", 2, 4));
}

#[test]
fn a_replay_prints_exactly_what_is_hashed() {
    let output = program(&["replay", "split-brain", "--seed", "5", "--nodes", "6"]);
    assert!(output.status.success());
    let digest = Sha256::digest(&output.stdout);
    let printed: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(printed, hash("split-brain", 5, 6));
}

/// What a run writes, kept in memory.
#[derive(Clone, Default)]
struct Copy(Arc<Mutex<Vec<u8>>>);

impl Write for Copy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn looking_on_changes_nothing() {
    let scenario = Scenario::load("office-10").unwrap().with_nodes(4).unwrap();
    let copy = Copy::default();
    let watched = World::new(scenario, 3, Some(Box::new(copy.clone())))
        .run()
        .unwrap();
    assert_eq!(watched.hash.to_string(), hash("office-10", 3, 4));
    assert!(!copy.0.lock().unwrap().is_empty());
}
