//! Scenario: what a run consists of besides its seed; read from TOML, unknown keys refused.

use std::time::Duration;

use serde::Deserialize;

/// The scenarios that come with the program, by name.
pub const BUILT_IN: [(&str, &str); 9] = [
    ("office-10", include_str!("../scenarios/office-10.toml")),
    ("office-50", include_str!("../scenarios/office-50.toml")),
    ("campus-1000", include_str!("../scenarios/campus-1000.toml")),
    (
        "sleepy-laptops",
        include_str!("../scenarios/sleepy-laptops.toml"),
    ),
    ("split-brain", include_str!("../scenarios/split-brain.toml")),
    ("lying-peer", include_str!("../scenarios/lying-peer.toml")),
    ("cold-start", include_str!("../scenarios/cold-start.toml")),
    ("anchor-away", include_str!("../scenarios/anchor-away.toml")),
    ("datagrams", include_str!("../scenarios/datagrams.toml")),
];

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("scenario {name:?} is neither a file nor one of {known}")]
    Unknown { name: String, known: String },
    #[error("cannot read scenario {name:?}: {source}")]
    Unreadable {
        name: String,
        #[source]
        source: std::io::Error,
    },
    #[error("scenario {name:?}: {source}")]
    Malformed {
        name: String,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("scenario {name:?}: {what}")]
    Impossible { name: String, what: &'static str },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Scenario {
    #[serde(skip)]
    pub name: String,
    /// One sentence: what it proves.
    pub about: String,
    pub machines: Machines,
    pub network: Network,
    /// Caches outside the mesh that every machine knows, in order of preference.
    #[serde(default)]
    pub cache: Vec<Cache>,
    pub phases: Phases,
    #[serde(default)]
    pub workload: Workload,
    #[serde(default)]
    pub faults: Faults,
    #[serde(default)]
    pub bounds: Bounds,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Machines {
    /// Honest machines.
    pub count: usize,
    /// Paths that each holds at start.
    pub paths: usize,
    /// Which part of these all machines of a pin hold.
    #[serde(default)]
    pub common_percent: usize,
    /// Pins of nixpkgs, among which machines are spread.
    #[serde(default = "one")]
    pub pins: usize,
    #[serde(default = "one")]
    pub subnets: usize,
    /// Everyone knows everyone's set from before, except the joiners.
    #[serde(default)]
    pub warm: bool,
    /// How many of the machines start with an empty index, after the others have settled.
    #[serde(default)]
    pub joiners: usize,
    /// Machines start within this time.
    pub boot_spread_ms: u64,
    #[serde(default)]
    pub wifi_percent: usize,
    /// Machines that accept no connections from outside (a firewall).
    #[serde(default)]
    pub walled_percent: usize,
    /// Members that lie, beyond `count`.
    #[serde(default)]
    pub liars: usize,
    /// The first machine holds everything there is at start.
    #[serde(default)]
    pub anchor: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Network {
    /// One way, within a subnet.
    pub latency_us: [u64; 2],
    /// One way, in addition, between subnets.
    #[serde(default)]
    pub routed_us: [u64; 2],
    pub wired_mbit: u64,
    #[serde(default = "wifi_mbit")]
    pub wifi_mbit: u64,
    /// Frames that Wi-Fi delays by a retransmission.
    #[serde(default)]
    pub wifi_resend_permille: u32,
    /// Whether mDNS is heard in other subnets.
    #[serde(default)]
    pub mdns_is_routed: bool,
    /// How many machines everybody has in `mesh.peers`; the way between subnets.
    #[serde(default)]
    pub seeds: usize,
    /// Beyond what a stream does: frames that vanish, arrive twice or out of order.
    #[serde(default)]
    pub drop_permille: u32,
    #[serde(default)]
    pub duplicate_permille: u32,
    #[serde(default)]
    pub reorder_permille: u32,
}

/// A binary cache over HTTP. It holds everything that exists at the start, and nothing built later.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cache {
    pub role: Role,
    /// One way.
    pub latency_us: [u64; 2],
    /// Of its interface, shared by all who read from it.
    pub mbit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Anchor,
    Upstream,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Phases {
    /// Before faults and workloads begin; joining is measured here.
    pub settle_s: u64,
    pub faults_s: u64,
    /// After faults end, until every index must be right and every want delivered.
    pub liveness_s: u64,
    /// Afterwards, on a quiet network: announcements one by one and in a batch, then an idle minute.
    #[serde(default)]
    pub measures: bool,
    /// Whether liveness is demanded; not where frames vanish from links that stand, which links never do.
    #[serde(default = "yes")]
    pub judges: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Workload {
    /// Everyone pulls one closure.
    pub morning_pull: Option<MorningPull>,
    /// One machine builds many paths at once, again and again.
    pub ci_burst: Option<CiBurst>,
    /// Machines pull closures, some of them far more often than others.
    pub zipf: Option<Zipf>,
    /// Machines build a path now and then, wherever they are.
    pub builds: Option<Every>,
    /// Machines collect garbage: some of their paths go.
    pub collections: Option<Collections>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MorningPull {
    pub paths: usize,
    /// How many machines hold it at first.
    pub holders: usize,
    pub spread_s: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CiBurst {
    pub paths: usize,
    pub every_s: u64,
    /// Machines that pull each burst right away.
    pub readers: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Zipf {
    pub closures: usize,
    pub paths: usize,
    pub holders: usize,
    pub every_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Every {
    pub every_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Collections {
    pub every_s: u64,
    pub paths: usize,
}

/// Faults over the whole mesh: how often one begins, on average, and how long it lasts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Faults {
    /// A machine is suspended and wakes.
    pub sleep: Option<Span>,
    /// A process ends without a word and starts again.
    pub crash: Option<Span>,
    /// Which part of the crashes loses the index.
    #[serde(default)]
    pub lose_state_percent: u32,
    /// A machine stops in order and starts again.
    pub restart: Option<Span>,
    /// A machine has no network, and goes on.
    pub offline: Option<Span>,
    /// The network falls into two halves.
    pub partition: Option<Span>,
    /// A machine gets another address.
    pub roam: Option<Often>,
    /// A connection breaks.
    pub cut: Option<Often>,
    /// A machine has no room for what it fetches.
    pub full_disk: Option<Span>,
    /// A machine serves nothing of what was asked, and says nothing.
    pub stall: Option<Span>,
    /// Anchors, the cache as well as the member, are away from early in the faults until their end.
    #[serde(default)]
    pub anchor_leaves: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Span {
    pub every_s: u64,
    pub lasts_s: [u64; 2],
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Often {
    pub every_s: u64,
}

/// What the figures of a run must keep; a run that exceeds one fails.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Bounds {
    pub join_bytes_max: Option<u64>,
    pub new_path_p99_ms_max: Option<u64>,
    pub batch_bytes_max: Option<u64>,
    pub idle_bytes_per_s_max: Option<u64>,
    pub false_not_found_max: Option<u64>,
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn wifi_mbit() -> u64 {
    200
}

impl Scenario {
    /// Takes a built-in scenario by name, or reads a file.
    pub fn load(name: &str) -> Result<Scenario, ScenarioError> {
        let built_in = BUILT_IN.iter().find(|(known, _)| *known == name);
        if let Some((_, text)) = built_in {
            return Scenario::parse(name, text);
        }
        if !name.ends_with(".toml") {
            let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
            return Err(ScenarioError::Unknown {
                name: name.to_owned(),
                known: known.join(", "),
            });
        }
        let text = std::fs::read_to_string(name).map_err(|source| ScenarioError::Unreadable {
            name: name.to_owned(),
            source,
        })?;
        Scenario::parse(name, &text)
    }

    pub fn parse(name: &str, text: &str) -> Result<Scenario, ScenarioError> {
        let parsed: Result<Scenario, _> = toml::from_str(text);
        let mut scenario = parsed.map_err(|source| ScenarioError::Malformed {
            name: name.to_owned(),
            source: Box::new(source),
        })?;
        scenario.name = name.to_owned();
        scenario.check()?;
        Ok(scenario)
    }

    /// Runs the scenario with another number of machines; what depends on it is kept in proportion.
    pub fn with_nodes(mut self, count: usize) -> Result<Scenario, ScenarioError> {
        let machines = &mut self.machines;
        machines.joiners = machines.joiners * count / machines.count.max(1);
        machines.subnets = (machines.subnets * count / machines.count.max(1)).max(1);
        machines.count = count;
        self.check()?;
        Ok(self)
    }

    fn check(&self) -> Result<(), ScenarioError> {
        let machines = &self.machines;
        let pull = self.workload.morning_pull.as_ref();
        let wrong = [
            (machines.count < 2, "a mesh has at least two machines"),
            (
                machines.count + machines.liars > 4096,
                "at most 4096 machines are simulated",
            ),
            (
                machines.joiners >= machines.count,
                "somebody must be there before the joiners",
            ),
            (machines.subnets > 250, "at most 250 subnets have addresses"),
            (machines.subnets == 0, "machines live in a subnet"),
            (machines.pins == 0, "machines follow a pin"),
            (machines.common_percent > 100, "common-percent exceeds 100"),
            (
                self.cache.iter().any(|cache| cache.mbit == 0),
                "a cache sends something",
            ),
            (self.network.wired_mbit == 0, "a network carries something"),
            (
                pull.is_some_and(|pull| pull.holders == 0),
                "somebody must hold what is pulled",
            ),
        ];
        match wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, what)) => Err(ScenarioError::Impossible {
                name: self.name.clone(),
                what,
            }),
            None => Ok(()),
        }
    }

    pub fn settle(&self) -> Duration {
        Duration::from_secs(self.phases.settle_s)
    }

    /// When faults end.
    pub fn calm(&self) -> Duration {
        self.settle() + Duration::from_secs(self.phases.faults_s)
    }

    /// When liveness is demanded.
    pub fn judgement(&self) -> Duration {
        self.calm() + Duration::from_secs(self.phases.liveness_s)
    }
}
