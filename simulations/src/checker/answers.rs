//! A lookup answers with the truth that the builder signed, or with nothing.

use granary_protocol::mesh::{LookupOutcome, Output};

use crate::world::World;

pub fn check(world: &mut World, machine: usize, output: &Output) {
    let Output::LookupDone {
        lookup,
        outcome: LookupOutcome::Found { narinfo, .. },
    } = output
    else {
        return;
    };
    let narinfo = narinfo.narinfo();
    let hash = narinfo.store_path.hash();
    let Some(asked) = world.machines[machine].lookups.get(lookup).copied() else {
        return world.violated(
            machine,
            "answers",
            format!("an answer to a lookup that is over: {hash}"),
        );
    };
    let content = &world.content;
    let is_true = content.hash(asked) == hash
        && content.nar_hash(asked) == narinfo.nar_hash
        && content.nar_size(asked) == narinfo.nar_size;
    if !is_true {
        let seen = format!("asked for {}, got {narinfo:?}", content.hash(asked));
        world.violated(machine, "answers", seen);
    }
}
