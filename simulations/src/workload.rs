//! Workload: what the people and the builders of a mesh do.

use std::time::Duration;

use granary_protocol::mesh::Input;

use crate::content::PathId;
use crate::machine::Brain;
use crate::scenario::Scenario;
use crate::world::{Event, World};

/// New paths announced one by one for the figures, and how far apart.
pub const SINGLES: u32 = 10;
const SINGLES_APART: Duration = Duration::from_secs(1);

/// New paths that others look up, how many others, and when.
const READS: u32 = 10;
const READERS: usize = 3;
const READ_AFTER: Duration = Duration::from_millis(500);

/// Paths of the batch, as after a large build.
const BATCH: usize = 1000;
const BATCH_WINDOW: Duration = Duration::from_secs(10);

/// The minute in which nothing is done.
const IDLE: Duration = Duration::from_secs(60);

/// Something that somebody does.
#[derive(Clone, Debug)]
pub enum Work {
    /// New paths appear in a machine's store; `None` is whoever is up.
    Build {
        machine: Option<usize>,
        count: usize,
        readers: usize,
    },
    /// Paths go from a machine's store.
    Collect { count: usize },
    /// A machine wants paths.
    Want { machine: usize, paths: Vec<PathId> },
}

/// Returns how long the figures take after the judgement.
pub fn measures_last(scenario: &Scenario) -> Duration {
    if scenario.phases.measures {
        SINGLES_APART * (SINGLES + READS + 2) + BATCH_WINDOW + IDLE + Duration::from_secs(10)
    } else {
        Duration::ZERO
    }
}

/// Makes what is wanted, puts it where it is held, and says when who does what.
pub fn plan(world: &mut World) -> Vec<(Duration, Work)> {
    let mut plan = Vec::new();
    let workload = world.scenario.workload.clone();
    let (settle, calm) = (world.scenario.settle(), world.scenario.calm());
    let count = world.scenario.machines.count;
    if let Some(pull) = &workload.morning_pull {
        let paths = closure(world, pull.paths, pull.holders);
        let spread = Duration::from_secs(pull.spread_s);
        for machine in 0..count {
            let at = settle + world.chance.duration(Duration::ZERO, spread);
            plan.push((
                at,
                Work::Want {
                    machine,
                    paths: paths.clone(),
                },
            ));
        }
    }
    if let Some(burst) = &workload.ci_burst {
        let builder = count - 1;
        for at in every(world, settle, calm, Duration::from_secs(burst.every_s)) {
            let machine = Some(builder);
            plan.push((
                at,
                Work::Build {
                    machine,
                    count: burst.paths,
                    readers: burst.readers,
                },
            ));
        }
    }
    if let Some(zipf) = &workload.zipf {
        let closures: Vec<Vec<PathId>> = (0..zipf.closures)
            .map(|_| closure(world, zipf.paths, zipf.holders))
            .collect();
        for at in every(world, settle, calm, Duration::from_millis(zipf.every_ms)) {
            let machine = world.chance.below(count);
            let paths = closures[world.chance.zipf(closures.len())].clone();
            plan.push((at, Work::Want { machine, paths }));
        }
    }
    if let Some(builds) = &workload.builds {
        for at in every(world, settle, calm, Duration::from_millis(builds.every_ms)) {
            let machine = Some(world.chance.below(count));
            plan.push((
                at,
                Work::Build {
                    machine,
                    count: 1,
                    readers: 1,
                },
            ));
        }
    }
    if let Some(collections) = &workload.collections {
        for at in every(
            world,
            settle,
            calm,
            Duration::from_secs(collections.every_s),
        ) {
            plan.push((
                at,
                Work::Collect {
                    count: collections.paths,
                },
            ));
        }
    }
    if world.scenario.phases.measures {
        measure(world, &mut plan);
    }
    plan
}

/// The figures: on a quiet network, after everything has been judged.
fn measure(world: &mut World, plan: &mut Vec<(Duration, Work)>) {
    let start = world.scenario.judgement() + Duration::from_millis(10);
    world.post(start, Event::Mark("singles"));
    let build = |at, count, readers| {
        let machine = None;
        let work = Work::Build {
            machine,
            count,
            readers,
        };
        (at + Duration::from_millis(1), work)
    };
    for number in 0..SINGLES {
        plan.push(build(start + SINGLES_APART * number, 1, 0));
    }
    let reads = start + SINGLES_APART * SINGLES;
    world.post(reads, Event::Mark("reads"));
    for number in 0..READS {
        plan.push(build(reads + SINGLES_APART * number, 1, READERS));
    }
    let batch = reads + SINGLES_APART * (READS + 2);
    world.post(batch, Event::Mark("batch"));
    plan.push(build(batch, BATCH, 0));
    let idle = batch + BATCH_WINDOW;
    world.post(idle, Event::Mark("idle"));
    world.post(idle + IDLE, Event::Mark("end"));
}

/// Returns times between `from` and `to`, `apart` on average.
fn every(world: &mut World, from: Duration, to: Duration, apart: Duration) -> Vec<Duration> {
    let mut times = Vec::new();
    let mut at = from;
    loop {
        at += world
            .chance
            .duration(apart / 2, apart * 3 / 2)
            .max(Duration::from_millis(1));
        if at >= to {
            return times;
        }
        times.push(at);
    }
}

/// Makes paths that some machines hold from the start, the anchor among them if there is one.
fn closure(world: &mut World, count: usize, holders: usize) -> Vec<PathId> {
    let paths: Vec<PathId> = (0..count)
        .map(|_| world.content.add(&mut world.chance))
        .collect();
    let machines = world.scenario.machines.clone();
    // Those who join later hold nothing that is needed before.
    let early = machines.count - machines.joiners;
    let mut holders = world.chance.sample(holders, early);
    if machines.anchor && !holders.contains(&0) {
        holders.push(0);
    }
    for machine in holders {
        for path in &paths {
            world.machines[machine].add(*path, &world.content);
        }
    }
    paths
}

impl World {
    pub fn work(&mut self, work: Work) {
        match work {
            Work::Build {
                machine,
                count,
                readers,
            } => self.build(machine, count, readers),
            Work::Collect { count } => self.collect(count),
            Work::Want { machine, paths } => {
                for path in paths {
                    self.want(machine, path);
                }
            }
        }
    }

    fn is_working(&self, machine: usize) -> bool {
        self.machines[machine].is_up() && matches!(self.machines[machine].brain, Brain::Honest(_))
    }

    fn someone(&mut self) -> Option<usize> {
        let working: Vec<usize> = (0..self.machines.len())
            .filter(|one| self.is_working(*one))
            .collect();
        self.chance.pick(&working)
    }

    fn build(&mut self, machine: Option<usize>, count: usize, readers: usize) {
        let machine = match machine {
            Some(machine) => Some(machine).filter(|machine| self.is_working(*machine)),
            None => self.someone(),
        };
        let Some(machine) = machine else { return };
        let paths: Vec<PathId> = (0..count)
            .map(|_| self.content.add(&mut self.chance))
            .collect();
        self.trace
            .record(self.now, machine, format_args!("builds {count}"));
        self.store_changes(machine, &paths, &[]);
        for _ in 0..readers {
            if let Some(reader) = self.someone().filter(|reader| *reader != machine) {
                self.post(
                    READ_AFTER,
                    Event::Work(Work::Want {
                        machine: reader,
                        paths: paths.clone(),
                    }),
                );
            }
        }
    }

    /// Some paths of a machine go; the store's watcher is a little late with that.
    fn collect(&mut self, count: usize) {
        let Some(machine) = self.someone() else {
            return;
        };
        let store: Vec<PathId> = self.machines[machine].store.iter().copied().collect();
        let gone = self.chance.sample(count, store.len());
        let gone: Vec<PathId> = gone.into_iter().map(|place| store[place]).collect();
        let mut removed = Vec::new();
        for path in gone {
            if self.machines[machine].remove(path, &self.content) {
                removed.push(path);
            }
        }
        self.trace.record(
            self.now,
            machine,
            format_args!("collects {}", removed.len()),
        );
        self.machines[machine].untold.push(self.now);
        let late = self
            .noise
            .duration(Duration::from_millis(50), Duration::from_secs(1));
        let incarnation = self.machines[machine].incarnation;
        let event = Event::Collected {
            machine,
            incarnation,
            removed,
        };
        self.post(late, event);
    }

    /// The watcher looks, and tells what is gone by then.
    pub fn collected(&mut self, machine: usize, mut removed: Vec<PathId>) {
        removed.retain(|path| !self.machines[machine].store.contains(path));
        let removed = removed.iter().map(|path| self.content.hash(*path));
        let removed = removed.collect();
        let added = Vec::new();
        self.think(machine, Input::LocalChanged { added, removed });
    }
}
