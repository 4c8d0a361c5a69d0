//! No output names a peer that is not admitted, except to dial it, to knock, to say Hello and to hang up.

use granary_protocol::mesh::{Output, Source};
use granary_protocol::message::Message;

use crate::world::World;

pub fn check(world: &mut World, machine: usize, output: &Output) {
    let admitted = |peer| world.machines[machine].admitted.contains(peer);
    let wrong = match output {
        Output::Send {
            message: Message::Knock { .. } | Message::Hello { .. },
            ..
        } => None,
        Output::Send { peer, message } if !admitted(peer) => Some((peer, message.kind())),
        Output::ReadLocal { peer, .. } if !admitted(peer) => Some((peer, "read-local")),
        Output::Transfer {
            source: Source::Peer { peer, .. },
            ..
        } if !admitted(peer) => Some((peer, "transfer")),
        Output::Admitted { peer, .. } if admitted(peer) => Some((peer, "admitted twice")),
        Output::Departed { peer } if !admitted(peer) => Some((peer, "departed")),
        _ => None,
    };
    if let Some((peer, what)) = wrong {
        let seen = format!(
            "{what} for machine {:?}, which is not admitted",
            world.number_of(peer)
        );
        world.violated(machine, "admission", seen);
    }
}
