//! Once faults have ended, every index equals the union of the truth, and what is wanted is delivered.

use std::time::Duration;

use granary_protocol::availability::AvailabilityIndex;

use crate::machine::Brain;
use crate::world::World;

/// Repair after faults takes at most this long.
pub const INDEX_WITHIN: Duration = Duration::from_secs(35);

/// What a writer gained so recently may be on its way: such a writer is judged again after this long.
pub const NEWS_WITHIN: Duration = Duration::from_secs(1);

/// How often the indexes are judged again at most: somebody has news all the time while much is fetched.
pub const JUDGED_AGAIN_MAX: u32 = 10;

/// Counts pairs of machines, and those of which the reader knows exactly what the writer holds.
pub fn agreement(world: &World, readers: impl Iterator<Item = usize>) -> (u64, u64) {
    let (mut pairs, mut exact) = (0, 0);
    for reader in readers {
        for writer in 0..world.machines.len() {
            if let Some(is_exact) = knows(world, reader, writer) {
                pairs += 1;
                exact += u64::from(is_exact);
            }
        }
    }
    (pairs, exact)
}

/// `None` where nothing can be demanded: of liars, and of pairs that no link can join.
fn knows(world: &World, reader: usize, writer: usize) -> Option<bool> {
    let (one, other) = (&world.machines[reader], &world.machines[writer]);
    let is_honest = |machine: usize| matches!(world.machines[machine].brain, Brain::Honest(_));
    if !is_honest(reader) || !is_honest(writer) || !can_link(world, reader, writer) {
        return None;
    }
    let truth = (other.truth, other.store.len() as u64);
    Some(one.index.fingerprint(&other.peer).unwrap_or_default() == truth)
}

fn can_link(world: &World, one: usize, other: usize) -> bool {
    world.can_connect(one, other) || world.can_connect(other, one)
}

/// Demands that every index is right, and returns whether some writer had news too fresh to tell.
pub fn indexes(world: &mut World) -> bool {
    let count = world.machines.len();
    let is_fresh = |writer: usize| {
        let since = world.machines[writer].held_since.values().max();
        since.is_some_and(|since| *since + NEWS_WITHIN > world.now)
    };
    let fresh: Vec<bool> = (0..count).map(is_fresh).collect();
    let mut has_news = false;
    for reader in 0..count {
        for (writer, is_fresh) in fresh.iter().enumerate() {
            if knows(world, reader, writer) == Some(false) {
                if *is_fresh {
                    has_news = true;
                    continue;
                }
                let known = world.machines[reader]
                    .index
                    .count(&world.machines[writer].peer);
                let seen = format!(
                    "{INDEX_WITHIN:?} after the faults it knows {known} paths of machine {writer}, which holds {} of them or others",
                    world.machines[writer].store.len(),
                );
                world.violated(reader, "liveness", seen);
                return false;
            }
        }
    }
    has_news
}

/// Demands that every path is delivered that somebody holds who can be reached.
pub fn deliveries(world: &mut World) {
    for number in 0..world.machines.len() {
        let machine = &world.machines[number];
        if !machine.is_up() {
            continue;
        }
        for (path, want) in &machine.wants {
            let holds = |other: &usize| {
                let one = &world.machines[*other];
                !one.is_liar
                    && one.is_up()
                    && one.store.contains(path)
                    && world.can_connect(number, *other)
            };
            if let Some(holder) = (0..world.machines.len()).find(holds) {
                let seen = format!(
                    "path {} is wanted since {:?} and at machine {holder}: {:?}",
                    path.0, want.since, want.stage
                );
                return world.violated(number, "liveness", seen);
            }
        }
    }
}
