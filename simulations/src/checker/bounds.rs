//! Frames, and what one input makes a mind want, stay within their limits.

use granary_protocol::message::Message;
use granary_protocol::wire;

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
