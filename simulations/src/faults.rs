//! Faults: what goes wrong, and when; all of it from the scenario and the seed.

use std::time::Duration;

use granary_protocol::mesh::Input;

use crate::chance::Chance;
use crate::index::SharedIndex;
use crate::machine::Brain;
use crate::scenario::{Often, Scenario, Span};
use crate::world::{Event, World};

/// Time between Goodbye and the end of the process (`FAREWELL` of the node).
const FAREWELL: Duration = Duration::from_millis(300);

/// Until a machine has its new address after it left the old network.
const ROAMING: Duration = Duration::from_secs(2);

/// Something that goes wrong, or is over.
#[derive(Clone, Debug)]
pub enum Fault {
    Sleep(usize),
    Wake(usize),
    /// The process ends at once; with it, perhaps, its index.
    Crash {
        machine: usize,
        loses_state: bool,
    },
    /// The process says Goodbye first.
    Stop(usize),
    Stopped(usize),
    Start(usize),
    /// The machine is alone on its island.
    Offline(usize),
    Online(usize),
    /// Machines whose bit is set are on the other side.
    Partition(Vec<bool>),
    Heal,
    Roam(usize),
    Roamed(usize),
    /// One connection breaks.
    Cut {
        one: usize,
        other: usize,
    },
    /// The member and the caches of that role.
    AnchorLeaves,
    Full {
        machine: usize,
        is_full: bool,
    },
    Stall {
        machine: usize,
        is_stalled: bool,
    },
}

/// Lays out every fault of a run.
pub fn plan(scenario: &Scenario, chance: &mut Chance) -> Vec<(Duration, Fault)> {
    let mut plan = Vec::new();
    let faults = &scenario.faults;
    let count = scenario.machines.count;
    // The anchor does not sleep; where there is one, it leaves as a whole or not at all.
    let first = usize::from(scenario.machines.anchor);
    let anyone = |chance: &mut Chance| first + chance.below(count - first);
    spans(scenario, &faults.sleep, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        (Fault::Sleep(machine), Fault::Wake(machine))
    });
    let lose = faults.lose_state_percent * 10;
    spans(scenario, &faults.crash, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        let loses_state = chance.happens(lose);
        (
            Fault::Crash {
                machine,
                loses_state,
            },
            Fault::Start(machine),
        )
    });
    spans(scenario, &faults.restart, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        (Fault::Stop(machine), Fault::Start(machine))
    });
    spans(scenario, &faults.offline, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        (Fault::Offline(machine), Fault::Online(machine))
    });
    spans(scenario, &faults.partition, chance, &mut plan, |chance| {
        let sides = (0..count + scenario.machines.liars)
            .map(|_| chance.happens(500))
            .collect();
        (Fault::Partition(sides), Fault::Heal)
    });
    spans(scenario, &faults.full_disk, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        let full = |is_full| Fault::Full { machine, is_full };
        (full(true), full(false))
    });
    spans(scenario, &faults.stall, chance, &mut plan, |chance| {
        let machine = anyone(chance);
        let stall = |is_stalled| Fault::Stall {
            machine,
            is_stalled,
        };
        (stall(true), stall(false))
    });
    often(scenario, &faults.roam, chance, &mut plan, |chance| {
        Fault::Roam(anyone(chance))
    });
    often(scenario, &faults.cut, chance, &mut plan, |chance| {
        let one = chance.below(count);
        Fault::Cut {
            one,
            other: (one + 1 + chance.below(count - 1)) % count,
        }
    });
    if faults.anchor_leaves {
        let middle = scenario.settle() + Duration::from_secs(scenario.phases.faults_s / 4);
        plan.push((middle, Fault::AnchorLeaves));
    }
    plan
}

fn spans(
    scenario: &Scenario,
    span: &Option<Span>,
    chance: &mut Chance,
    plan: &mut Vec<(Duration, Fault)>,
    mut make: impl FnMut(&mut Chance) -> (Fault, Fault),
) {
    let Some(Span { every_s, lasts_s }) = span else {
        return;
    };
    for at in times(scenario, *every_s, chance) {
        let (begins, ends) = make(chance);
        let lasts = Duration::from_millis(chance.between(lasts_s.map(|seconds| seconds * 1000)));
        plan.push((at, begins));
        // What is not over when faults end is ended by the calm.
        if at + lasts < scenario.calm() {
            plan.push((at + lasts, ends));
        }
    }
}

fn often(
    scenario: &Scenario,
    often: &Option<Often>,
    chance: &mut Chance,
    plan: &mut Vec<(Duration, Fault)>,
    mut make: impl FnMut(&mut Chance) -> Fault,
) {
    let Some(Often { every_s }) = often else {
        return;
    };
    for at in times(scenario, *every_s, chance) {
        plan.push((at, make(chance)));
    }
}

fn times(scenario: &Scenario, every_s: u64, chance: &mut Chance) -> Vec<Duration> {
    let mut times = Vec::new();
    let mut at = scenario.settle();
    loop {
        at += Duration::from_millis(chance.between([every_s * 500, every_s * 1500]).max(1));
        if at >= scenario.calm() {
            return times;
        }
        times.push(at);
    }
}

impl World {
    pub fn strike(&mut self, fault: Fault) {
        if self.is_calm && !matches!(fault, Fault::Roamed(_) | Fault::Stopped(_)) {
            return;
        }
        self.trace
            .record(self.now, 0, format_args!("fault {fault:?}"));
        match fault {
            Fault::Sleep(machine) => {
                self.disturb(machine);
                self.machines[machine].is_asleep = true;
                self.machines[machine].tick_at = None;
                self.reachability_changed();
            }
            Fault::Wake(machine) => self.wake(machine),
            Fault::Crash {
                machine,
                loses_state,
            } => {
                // One that sleeps is not running anything that could crash, and goes on with what it has.
                if self.machines[machine].is_asleep {
                    return;
                }
                self.end_process(machine);
                if loses_state {
                    self.machines[machine].index = SharedIndex::new(&self.pool);
                }
            }
            Fault::Stop(machine) => {
                if self.machines[machine].is_up() {
                    self.disturb(machine);
                    self.think(machine, Input::Shutdown);
                    self.post(FAREWELL, Event::Fault(Fault::Stopped(machine)));
                }
            }
            Fault::Stopped(machine) => {
                self.farewell(machine);
                self.end_process(machine);
                if self.is_calm {
                    self.start(machine);
                }
            }
            Fault::Start(machine) => {
                if !self.machines[machine].is_asleep {
                    self.start(machine);
                }
            }
            Fault::Offline(machine) => {
                self.disturb(machine);
                self.network.hosts[machine].island = machine + 2;
                self.reachability_changed();
            }
            Fault::Online(machine) => {
                self.disturb(machine);
                self.network.hosts[machine].island = 0;
                self.reachability_changed();
                self.network_changed(machine);
            }
            Fault::Partition(sides) => {
                for (machine, is_other) in sides.into_iter().enumerate() {
                    self.disturb(machine);
                    self.network.hosts[machine].island = usize::from(is_other);
                }
                self.reachability_changed();
            }
            Fault::Heal => {
                for machine in 0..self.machines.len() {
                    self.disturb(machine);
                    self.network.hosts[machine].island = 0;
                }
                self.reachability_changed();
            }
            Fault::Roam(machine) => {
                self.disturb(machine);
                self.network.hosts[machine].island = machine + 2;
                self.reachability_changed();
                self.post(ROAMING, Event::Fault(Fault::Roamed(machine)));
            }
            Fault::Roamed(machine) => {
                self.disturb(machine);
                self.network.hosts[machine].island = 0;
                // Connections from the old address are dead for good.
                for key in self.links_of(machine) {
                    self.abandon(key, machine);
                }
                self.network.move_away(machine);
                self.reachability_changed();
                self.network_changed(machine);
            }
            Fault::Cut { one, other } => self.hangup(one, other),
            Fault::AnchorLeaves => {
                self.is_anchor_away = true;
                if self.scenario.machines.anchor {
                    self.end_process(0);
                }
            }
            Fault::Full { machine, is_full } => self.machines[machine].is_full = is_full,
            Fault::Stall {
                machine,
                is_stalled,
            } => self.machines[machine].is_stalled = is_stalled,
        }
    }

    fn disturb(&mut self, machine: usize) {
        self.machines[machine].disturbed_at = self.now;
    }

    fn network_changed(&mut self, machine: usize) {
        if self.machines[machine].is_up() {
            self.think(machine, Input::NetworkChanged);
            self.tell_addresses(machine);
            self.advertise(machine);
        }
    }

    /// mDNS says farewell to whoever hears it.
    fn farewell(&mut self, machine: usize) {
        let peer = self.machines[machine].peer;
        for other in 0..self.machines.len() {
            let is_near = self.network.hosts[other].subnet == self.network.hosts[machine].subnet;
            if other != machine
                && is_near
                && self.machines[other].is_up()
                && self.can_talk(machine, other)
            {
                let incarnation = self.machines[other].incarnation;
                let input = Box::new(Input::Lost { peer });
                self.post(
                    Duration::from_millis(1),
                    Event::Input {
                        machine: other,
                        incarnation,
                        input,
                    },
                );
            }
        }
    }

    fn end_process(&mut self, machine: usize) {
        if matches!(self.machines[machine].brain, Brain::Off) || self.machines[machine].is_asleep {
            return;
        }
        self.disturb(machine);
        self.trace
            .record(self.now, machine, format_args!("process ends"));
        self.machines[machine].lose_memory();
        self.process_ends(machine);
    }
}
