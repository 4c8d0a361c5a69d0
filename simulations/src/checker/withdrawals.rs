//! A path is not said to be at a holder that said HaveNot, until the holder announces it anew.

use granary_protocol::availability::HashPrefix;
use granary_protocol::mesh::{LookupOutcome, Output, Source};
use granary_protocol::message::Message;

use crate::world::World;

pub fn check(world: &mut World, machine: usize, output: &Output) {
    let (hash, peers) = match output {
        Output::LookupDone {
            outcome: LookupOutcome::Found {
                narinfo, providers, ..
            },
            ..
        } => (narinfo.narinfo().store_path.hash(), providers.clone()),
        Output::Transfer {
            fetch,
            source: Source::Peer { peer, .. },
            ..
        } => {
            let Some(assembly) = world.machines[machine].assemblies.get(fetch) else {
                return;
            };
            (world.content.hash(assembly.path), vec![*peer])
        }
        _ => return,
    };
    let prefix = HashPrefix::from(&hash);
    let index = &world.machines[machine].index;
    if let Some(peer) = peers.iter().find(|peer| index.is_denied(peer, prefix)) {
        let seen = format!(
            "{hash} is expected of machine {:?}, which said HaveNot",
            world.number_of(peer)
        );
        world.violated(machine, "withdrawals", seen);
    }
}

impl World {
    /// Remembers what a holder denied, as the mind hears it.
    pub fn noted(&mut self, machine: usize, from: usize, message: &Message) {
        let Message::Answers { answers, .. } = message else {
            return;
        };
        let peer = self.machines[from].peer;
        for answer in answers.iter().filter(|answer| answer.narinfo.is_none()) {
            // What was not asked is not an answer; the path must at least have been expected there.
            let prefix = HashPrefix::from(&answer.hash);
            if self.content.find(&answer.hash).is_some() && !self.machines[from].is_liar {
                self.machines[machine].index.deny(peer, prefix);
            }
        }
    }
}
