//! Frames, what one input makes a mind want, and what a mind keeps, stay within their limits.

use granary_protocol::message::Message;
use granary_protocol::wire;

use crate::machine::Brain;
use crate::world::World;

/// Outputs of one input beyond a few for each machine: the answers to a full batch of lookups and
/// their next questions.
const OUTPUTS_BASE: usize = 1024;
const OUTPUTS_PER_MACHINE: usize = 8;

pub fn frame(world: &mut World, machine: usize, message: &Message, body: &[u8]) {
    if body.len() > wire::FRAME_BYTES_MAX {
        let seen = format!("a {} of {} bytes", message.kind(), body.len());
        world.violated(machine, "bounds", seen);
    }
    // Whatever a mind says, others can read.
    let is_large = world.machines.len() > DECODED_UP_TO;
    if !is_large && wire::decode(body).as_ref() != Ok(message) {
        world.violated(
            machine,
            "bounds",
            format!("a {} that does not survive its encoding", message.kind()),
        );
    }
}

/// Above this many machines, what honest ones say is not decoded again.
const DECODED_UP_TO: usize = 64;

pub fn outputs(world: &mut World, machine: usize, count: usize) {
    if count > OUTPUTS_BASE + OUTPUTS_PER_MACHINE * world.machines.len() {
        world.violated(machine, "bounds", format!("{count} outputs of one input"));
    }
}

/// Looks at what every mind keeps, now and then and when the run ends.
pub fn sizes(world: &mut World) {
    for number in 0..world.machines.len() {
        let Brain::Honest(mind) = &world.machines[number].brain else {
            continue;
        };
        let excess = mind
            .sizes()
            .into_iter()
            .find(|size| size.count > size.limit);
        if let Some(size) = excess {
            let seen = format!("{} {}, of {} at most", size.count, size.what, size.limit);
            world.violated(number, "bounds", seen);
        }
    }
}
