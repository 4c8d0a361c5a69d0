//! An honest peer is never quarantined for good, and not at all where nobody lies.

use crate::machine::Brain;
use crate::world::World;

/// Looks at every machine; now and then while liars are about, and when the run ends.
pub fn check(world: &mut World, is_end: bool) {
    let is_honest_world = world.scenario.machines.liars == 0;
    for number in 0..world.machines.len() {
        let machine = &world.machines[number];
        let Brain::Honest(mind) = &machine.brain else {
            continue;
        };
        let views = mind.peers(&machine.index, world.instant());
        let mut honest = 0;
        let mut wrong = None;
        for view in views {
            let Some((left, offence)) = view.quarantine else {
                continue;
            };
            let Some(peer) = world.number_of(&view.peer) else {
                continue;
            };
            if world.machines[peer].is_liar {
                world.liars_seen.insert((number, peer));
                continue;
            }
            honest += 1;
            if is_honest_world || is_end {
                wrong = Some(format!(
                    "machine {peer} is quarantined for {left:?}: {offence}"
                ));
            }
        }
        world.report.honest_in_quarantine_max = world.report.honest_in_quarantine_max.max(honest);
        if let Some(seen) = wrong {
            world.violated(number, "quarantine", seen);
        }
    }
}
