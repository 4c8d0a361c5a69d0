//! Checker: what must hold at every event, and what must come about once faults have ended.
//!
//! One file per promise. A violation ends the run and says what was seen; the scenario and the seed say
//! how to see it again.

use std::time::Duration;

use granary_protocol::mesh::Output;

use crate::world::World;

pub mod admission;
pub mod answers;
pub mod bounds;
pub mod liveness;
pub mod quarantine;
pub mod transfers;
pub mod withdrawals;

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub at: Duration,
    pub machine: usize,
    /// The promise, by the name of its file.
    pub promise: &'static str,
    pub seen: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Violation {
            at,
            machine,
            promise,
            seen,
        } = self;
        write!(f, "{promise}: machine {machine} after {at:?}: {seen}")
    }
}

/// Looks at everything a mind wants, before it is done.
pub fn output(world: &mut World, machine: usize, output: &Output) {
    if world.machines[machine].is_liar {
        return;
    }
    admission::check(world, machine, output);
    answers::check(world, machine, output);
    withdrawals::check(world, machine, output);
    transfers::check(world, machine, output);
}

impl World {
    /// Notes the first broken promise; the run ends with it.
    pub fn violated(&mut self, machine: usize, promise: &'static str, seen: String) {
        if self.violation.is_none() {
            let at = self.now;
            self.violation = Some(Violation {
                at,
                machine,
                promise,
                seen,
            });
        }
    }
}

#[cfg(test)]
mod tests;
