//! Seeds that once showed something, each with one line of what it was.

use granary_simulations::scenario::Scenario;
use granary_simulations::world::World;

fn passes(name: &str, seed: u64) {
    let scenario = Scenario::load(name).unwrap();
    let outcome = World::new(scenario, seed, None)
        .run()
        .expect("nothing is written");
    if let Some(violation) = outcome.violation {
        panic!("granary-simulations run {name} --seed {seed}: {violation}");
    }
}

/// What a laptop wanted while it slept was never asked for after it woke (the simulator's hands).
#[test]
fn wants_of_a_sleeper_are_asked_for_when_it_wakes() {
    passes("sleepy-laptops", 2);
}

/// A machine that came back with the calm was taken for one that had been there all along, and its paths
/// counted as falsely not found (the checker).
#[test]
fn a_machine_that_just_came_back_may_be_unknown_for_a_moment() {
    passes("sleepy-laptops", 27);
}

/// Two machines behind firewalls can never link, and were still expected to know of each other (the
/// checker).
#[test]
fn nothing_is_demanded_of_two_machines_behind_firewalls() {
    passes("office-50", 1);
}
