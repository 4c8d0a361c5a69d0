//! Report: what a run measured, as figures that can be compared, as text and as a picture.
//!
//! Bytes of the control plane are those of frames with their length; TCP, Noise and yamux add about a
//! hundred to each. Every figure says whether less of it is better and by how much it may grow
//! before [`compare`] calls it worse.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::network::Frame;
use crate::scenario::Scenario;
use crate::workload::SINGLES;

pub mod compare;
pub mod picture;

/// One measured number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    pub value: u64,
    pub unit: String,
    /// How much more than before is worse, in percent; `None` where neither direction is.
    pub margin_percent: Option<u64>,
}

/// Everything that is told of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub scenario: String,
    pub seed: u64,
    pub machines: u64,
    pub trace_hash: String,
    pub violation: Option<String>,
    pub figures: BTreeMap<String, Figure>,
    /// Connections refused, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Frames and bytes sent, by kind of message.
    pub messages: BTreeMap<String, [u64; 2]>,
}

/// State of the mesh at one moment, for the picture.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub at: Duration,
    pub pairs: u64,
    pub exact: u64,
}

/// Where bytes of a NAR come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NarSource {
    Peer,
    /// The member that holds everything, or the cache of that role.
    Anchor,
    Upstream,
    /// A liar.
    Wrong,
}

/// Where NAR bytes came from, per second of the run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    pub peer: u64,
    pub anchor: u64,
    pub upstream: u64,
    pub wrong: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Meter {
    sent: u64,
    received: u64,
}

pub struct Report {
    scenario: Scenario,
    seed: u64,
    machines: usize,
    /// Control plane, by machine.
    meters: Vec<Meter>,
    /// What each had received when it started last, until joining is over.
    joins: BTreeMap<usize, Meter>,
    join_received: Vec<u64>,
    join_sent: Vec<u64>,
    marks: BTreeMap<&'static str, (Duration, u64)>,
    messages: BTreeMap<&'static str, [u64; 2]>,
    refusals: BTreeMap<&'static str, u64>,
    /// Microseconds, on the quiet network and before.
    pub learned_quiet: Vec<u64>,
    pub learned_before: Vec<u64>,
    everyone_quiet: Vec<u64>,
    everyone_before: Vec<u64>,
    lookups: Vec<u64>,
    lookups_found: u64,
    pub false_not_found: u64,
    deliveries: Vec<u64>,
    pub fetches_failed: u64,
    pub mismatches: u64,
    pub honest_in_quarantine_max: u64,
    pub liars_seen: u64,
    pub samples: Vec<Sample>,
    pub moved: BTreeMap<u64, Moved>,
    pub events: u64,
    pub trace_lines: u64,
    pub trace_hash: String,
    pub violation: Option<String>,
}

impl Report {
    pub fn new(scenario: &Scenario, seed: u64, machines: usize) -> Report {
        Report {
            scenario: scenario.clone(),
            seed,
            machines,
            meters: vec![Meter::default(); machines],
            joins: BTreeMap::new(),
            join_received: Vec::new(),
            join_sent: Vec::new(),
            marks: BTreeMap::new(),
            messages: BTreeMap::new(),
            refusals: BTreeMap::new(),
            learned_quiet: Vec::new(),
            learned_before: Vec::new(),
            everyone_quiet: Vec::new(),
            everyone_before: Vec::new(),
            lookups: Vec::new(),
            lookups_found: 0,
            false_not_found: 0,
            deliveries: Vec::new(),
            fetches_failed: 0,
            mismatches: 0,
            honest_in_quarantine_max: 0,
            liars_seen: 0,
            samples: Vec::new(),
            moved: BTreeMap::new(),
            events: 0,
            trace_lines: 0,
            trace_hash: String::new(),
            violation: None,
        }
    }

    pub fn sent(&mut self, from: usize, frame: &Frame) {
        self.meters[from].sent += frame.bytes;
        let [frames, bytes] = self.messages.entry(frame.kind).or_default();
        *frames += 1;
        *bytes += frame.bytes;
    }

    pub fn received(&mut self, to: usize, frame: &Frame) {
        self.meters[to].received += frame.bytes;
    }

    /// A machine starts. Those that start without knowing anybody's set join.
    pub fn started(&mut self, machine: usize) {
        let machines = &self.scenario.machines;
        let is_honest = machine < machines.count;
        let is_cold = !machines.warm || machine >= machines.count - machines.joiners;
        if is_honest && is_cold && !self.marks.contains_key("settled") {
            self.joins.insert(machine, self.meters[machine]);
        }
    }

    pub fn refused(&mut self, reason: &'static str) {
        *self.refusals.entry(reason).or_default() += 1;
    }

    pub fn looked_up(&mut self, took: Duration, is_found: bool) {
        self.lookups.push(micros(took));
        self.lookups_found += u64::from(is_found);
    }

    pub fn delivered(&mut self, took: Duration) {
        self.deliveries.push(micros(took));
    }

    /// A machine knows at `now` of another one what `happened`.
    pub fn learned(&mut self, happened: Duration, now: Duration) {
        let (took, is_quiet) = (now - happened, self.is_quiet(happened));
        let learned = if is_quiet {
            &mut self.learned_quiet
        } else {
            &mut self.learned_before
        };
        learned.push(micros(took));
    }

    /// All machines do.
    pub fn everyone_learned(&mut self, happened: Duration, now: Duration) {
        let (took, is_quiet) = (now - happened, self.is_quiet(happened));
        let learned = if is_quiet {
            &mut self.everyone_quiet
        } else {
            &mut self.everyone_before
        };
        learned.push(micros(took));
    }

    fn is_quiet(&self, at: Duration) -> bool {
        self.marks
            .get("singles")
            .is_some_and(|(since, _)| at >= *since)
    }

    pub fn moved(&mut self, source: NarSource, bytes: u64, now: Duration) {
        let moved = self.moved.entry(now.as_secs()).or_default();
        *match source {
            NarSource::Peer => &mut moved.peer,
            NarSource::Anchor => &mut moved.anchor,
            NarSource::Upstream => &mut moved.upstream,
            NarSource::Wrong => &mut moved.wrong,
        } += bytes;
    }

    pub fn sample(&mut self, at: Duration, pairs: u64, exact: u64) {
        self.samples.push(Sample { at, pairs, exact });
    }

    /// A window ends, and the next begins.
    pub fn mark(&mut self, word: &'static str, now: Duration) {
        self.marks.insert(word, (now, self.control_bytes()));
        if word == "settled" {
            for (machine, before) in std::mem::take(&mut self.joins) {
                let meter = self.meters[machine];
                self.join_received.push(meter.received - before.received);
                self.join_sent.push(meter.sent - before.sent);
            }
        }
    }

    pub fn mark_of(&self, word: &str) -> Option<Duration> {
        self.marks.get(word).map(|(at, _)| *at)
    }

    fn control_bytes(&self) -> u64 {
        self.meters.iter().map(|meter| meter.sent).sum()
    }

    fn bytes_between(&self, from: &str, to: &str) -> Option<u64> {
        Some(self.marks.get(to)?.1 - self.marks.get(from)?.1)
    }

    fn seconds_between(&self, from: &str, to: &str) -> Option<u64> {
        let seconds = (self.marks.get(to)?.0 - self.marks.get(from)?.0).as_secs();
        Some(seconds.max(1))
    }

    /// Bytes that one node sends in a second of idleness.
    fn idle_bytes_per_s(&self) -> Option<u64> {
        let bytes = self.bytes_between("idle", "end")?;
        Some(bytes / self.seconds_between("idle", "end")? / self.machines as u64)
    }

    /// Returns the bounds that the figures exceed.
    pub fn check_bounds(&self) -> Vec<String> {
        let bounds = &self.scenario.bounds;
        let checks = [
            (
                "bytes received by a joining node",
                self.join_received.iter().max().copied(),
                bounds.join_bytes_max,
            ),
            (
                "milliseconds until a new path is known, p99",
                percentile(&self.learned_quiet, 99).map(|micros| micros / 1000),
                bounds.new_path_p99_ms_max,
            ),
            (
                "bytes sent for a batch of 1,000 paths",
                self.bytes_between("batch", "idle"),
                bounds.batch_bytes_max,
            ),
            (
                "bytes a second sent by an idle node",
                self.idle_bytes_per_s(),
                bounds.idle_bytes_per_s_max,
            ),
            (
                "lookups of held paths answered not found",
                Some(self.false_not_found),
                bounds.false_not_found_max,
            ),
        ];
        let exceeds = |(what, value, bound): (&str, Option<u64>, Option<u64>)| {
            let bound = bound?;
            match value {
                Some(value) if value <= bound => None,
                Some(value) => Some(format!("{value} {what}, at most {bound} are promised")),
                None => Some(format!(
                    "{what}: not measured, at most {bound} are promised"
                )),
            }
        };
        checks.into_iter().filter_map(exceeds).collect()
    }

    pub fn summary(&self) -> Summary {
        let mut figures = BTreeMap::new();
        let mut figure =
            |name: &str, value: Option<u64>, unit: &str, margin_percent: Option<u64>| {
                if let Some(value) = value {
                    let unit = unit.to_owned();
                    figures.insert(
                        name.to_owned(),
                        Figure {
                            value,
                            unit,
                            margin_percent,
                        },
                    );
                }
            };
        // Time may vary by a tenth, bytes by a twentieth; what should not happen, not at all.
        let (time, bytes, never) = (Some(10), Some(5), Some(0));
        figure(
            "join_received_max",
            self.join_received.iter().max().copied(),
            "bytes",
            bytes,
        );
        figure(
            "join_sent_max",
            self.join_sent.iter().max().copied(),
            "bytes",
            bytes,
        );
        figure(
            "new_path_known_p50",
            percentile(&self.learned_quiet, 50),
            "us",
            time,
        );
        figure(
            "new_path_known_p99",
            percentile(&self.learned_quiet, 99),
            "us",
            time,
        );
        figure(
            "new_path_known_by_all_p50",
            percentile(&self.everyone_quiet, 50),
            "us",
            time,
        );
        figure(
            "new_path_known_by_all_p99",
            percentile(&self.everyone_quiet, 99),
            "us",
            time,
        );
        figure(
            "faulty_known_p50",
            percentile(&self.learned_before, 50),
            "us",
            time,
        );
        figure(
            "faulty_known_p99",
            percentile(&self.learned_before, 99),
            "us",
            Some(50),
        );
        figure(
            "faulty_known_by_all_p99",
            percentile(&self.everyone_before, 99),
            "us",
            Some(50),
        );
        let singles = self.bytes_between("singles", "reads");
        figure(
            "new_path_sent",
            singles.map(|bytes| bytes / u64::from(SINGLES)),
            "bytes",
            bytes,
        );
        figure(
            "batch_of_1000_sent",
            self.bytes_between("batch", "idle"),
            "bytes",
            bytes,
        );
        let idle = self
            .bytes_between("idle", "end")
            .map(|bytes| bytes / self.machines as u64);
        figure("idle_minute_per_node", idle, "bytes", bytes);
        figure("control_sent", Some(self.control_bytes()), "bytes", bytes);
        figure("lookups", Some(self.lookups.len() as u64), "", None);
        figure("lookups_found", Some(self.lookups_found), "", None);
        figure("lookup_p50", percentile(&self.lookups, 50), "us", time);
        figure("lookup_p99", percentile(&self.lookups, 99), "us", time);
        figure("false_not_found", Some(self.false_not_found), "", never);
        figure("delivered", Some(self.deliveries.len() as u64), "", None);
        figure("delivery_p50", percentile(&self.deliveries, 50), "us", time);
        figure(
            "delivery_p99",
            percentile(&self.deliveries, 99),
            "us",
            Some(50),
        );
        figure("fetches_failed", Some(self.fetches_failed), "", None);
        figure("wrong_nars_caught", Some(self.mismatches), "", None);
        let moved = |source: fn(&Moved) -> u64| Some(self.moved.values().map(source).sum());
        figure(
            "nar_bytes_from_peers",
            moved(|moved| moved.peer),
            "bytes",
            None,
        );
        figure(
            "nar_bytes_from_anchor",
            moved(|moved| moved.anchor),
            "bytes",
            None,
        );
        figure(
            "nar_bytes_from_upstream",
            moved(|moved| moved.upstream),
            "bytes",
            None,
        );
        figure("nar_bytes_wrong", moved(|moved| moved.wrong), "bytes", None);
        figure("refusals", Some(self.refusals.values().sum()), "", None);
        figure(
            "honest_in_quarantine_max",
            Some(self.honest_in_quarantine_max),
            "",
            never,
        );
        figure("liars_in_quarantine", Some(self.liars_seen), "", None);
        figure("events", Some(self.events), "", None);
        let named = |map: &BTreeMap<&'static str, u64>| {
            map.iter()
                .map(|(word, count)| ((*word).to_owned(), *count))
                .collect()
        };
        Summary {
            scenario: self.scenario.name.clone(),
            seed: self.seed,
            machines: self.machines as u64,
            trace_hash: self.trace_hash.clone(),
            violation: self.violation.clone(),
            refusals: named(&self.refusals),
            messages: self
                .messages
                .iter()
                .map(|(kind, sent)| ((*kind).to_owned(), *sent))
                .collect(),
            figures,
        }
    }
}

impl Summary {
    /// Returns the report for a person.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{} · seed {} · {} machines · trace {}\n",
            self.scenario, self.seed, self.machines, self.trace_hash
        );
        for (name, figure) in &self.figures {
            let shown = shown(figure);
            writeln!(text, "  {name:<28} {shown:>14}").expect("writing to a string succeeds");
        }
        for (kind, [frames, bytes]) in &self.messages {
            writeln!(
                text,
                "  sent {kind:<23} {frames:>14} frames {bytes:>14} bytes"
            )
            .expect("writing to a string succeeds");
        }
        for (reason, count) in &self.refusals {
            writeln!(text, "  refused {reason:<20} {count:>14}")
                .expect("writing to a string succeeds");
        }
        match &self.violation {
            Some(violation) => text.push_str(&format!("  FAILED {violation}\n")),
            None => text.push_str("  every promise was kept\n"),
        }
        text
    }
}

/// Returns a figure with a unit that a person reads easily.
pub fn shown(figure: &Figure) -> String {
    let value = figure.value;
    let scaled =
        |per: u64, unit: &str| format!("{}.{} {unit}", value / per, value % per * 10 / per);
    match (figure.unit.as_str(), value) {
        ("us", 1_000_000..) => scaled(1_000_000, "s"),
        ("us", 1000..) => scaled(1000, "ms"),
        ("us", _) => format!("{value} us"),
        ("bytes", 1_000_000..) => scaled(1_000_000, "MB"),
        ("bytes", 1000..) => scaled(1000, "kB"),
        ("bytes", _) => format!("{value} B"),
        _ => value.to_string(),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Returns the value that `percent` of the samples do not exceed.
pub fn percentile(samples: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let samples: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentile(&samples, 50), Some(50));
        assert_eq!(percentile(&samples, 99), Some(99));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }
}
