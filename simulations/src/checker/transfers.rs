//! A transfer continues at the byte where the last one ended, one at a time, until its fetch is over.

use granary_protocol::mesh::Output;

use crate::world::World;

pub fn check(world: &mut World, machine: usize, output: &Output) {
    let Output::Transfer {
        fetch,
        attempt,
        from,
        ..
    } = output
    else {
        return;
    };
    let Some(assembly) = world.machines[machine].assemblies.get(fetch) else {
        let seen = format!("a transfer for fetch {}, which is over", fetch.0);
        return world.violated(machine, "transfers", seen);
    };
    let wrong = [
        (assembly.flow.is_some(), "another transfer is under way"),
        (*attempt <= assembly.attempt, "attempts do not rise"),
        (*from > assembly.at, "it leaves a gap"),
    ];
    if let Some((_, what)) = wrong.iter().find(|(is_wrong, _)| *is_wrong) {
        let seen = format!(
            "{what}: attempt {attempt} from byte {from}, assembled {}",
            assembly.at
        );
        world.violated(machine, "transfers", seen);
    }
}
