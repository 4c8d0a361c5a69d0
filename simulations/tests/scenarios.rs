//! Every scenario that comes with the program keeps every promise, on many seeds.

use granary_simulations::scenario::{BUILT_IN, Scenario};
use granary_simulations::world::World;

fn run(scenario: &Scenario, seed: u64) {
    let outcome = World::new(scenario.clone(), seed, None)
        .run()
        .expect("nothing is written");
    if let Some(violation) = outcome.violation {
        panic!(
            "granary-simulations run {} --seed {seed}: {violation}",
            scenario.name
        );
    }
}

fn passes(name: &str) {
    let scenario = Scenario::load(name).unwrap();
    (1..=32).for_each(|seed| run(&scenario, seed));
}

#[test]
fn every_scenario_file_parses_and_says_what_it_proves() {
    for (name, _) in BUILT_IN {
        let scenario = Scenario::load(name).unwrap();
        assert!(scenario.about.len() > 20, "{name}");
    }
}

#[test]
fn an_unknown_key_is_refused() {
    let error = Scenario::parse("x", "about = \"y\"\nnods = 3\n").unwrap_err();
    assert!(error.to_string().contains("nods"), "{error}");
}

#[test]
fn an_office_of_ten_joins_announces_and_idles_within_its_bounds() {
    passes("office-10");
}

#[test]
fn an_office_of_fifty_survives_crashes_cuts_and_stalls() {
    passes("office-50");
}

#[test]
fn laptops_that_slept_and_roamed_know_everything_soon_after() {
    passes("sleepy-laptops");
}

#[test]
fn halves_of_a_split_mesh_agree_again() {
    passes("split-brain");
}

#[test]
fn liars_are_not_believed_and_everything_wanted_arrives() {
    passes("lying-peer");
}

#[test]
fn a_mesh_that_starts_cold_and_at_once_delivers() {
    passes("cold-start");
}

#[test]
fn what_peers_hold_arrives_while_the_anchor_is_away() {
    passes("anchor-away");
}

#[test]
fn lost_doubled_and_reordered_frames_break_no_promise() {
    passes("datagrams");
}

#[test]
fn a_small_campus_keeps_every_promise() {
    let scenario = Scenario::load("campus-1000")
        .unwrap()
        .with_nodes(60)
        .unwrap();
    run(&scenario, 1);
}
