//! Granary never breaks a build: every fault, at every moment, with every kind of source left.
//!
//! The real Nix client builds one derivation per case. Its output is signed and held by a machine that
//! suffers the fault while it is asked or sends; it can come from elsewhere ([`Sources`]), or be built.
//! Nix always ends with exit status 0, the output is valid and sound, no cache is disabled, and the
//! node's log or status names the machine that was to blame.
//!
//! Faults at a byte happen at that byte of the encrypted answer, at whichever holder is sending; see
//! [`crate::proxy`]. Those before or after the narinfo happen before that request, or before the first
//! byte of an answer to the one for the NAR.

use std::fs::{self, OpenOptions, Permissions};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use crate::anchor::{Anchor, PORT};
use crate::http::{self, Reading};
use crate::machine::{Lan, MESH_PORT, Machine, SUBSTITUTER_PORT, TRANSFER_PORT};
use crate::nix;
use crate::process::wait_for;
use crate::proxy::{Fault, Request, Then, Watch};

/// Bytes of an output: far more than is held back, and not too many for a trickle.
const BYTES: u64 = 1_200_000;

/// Where Nix asks, before the endpoint.
const WATCH_PORT: u16 = SUBSTITUTER_PORT - 1;

/// A peer that fell silent is found out within two turns of the pulse.
const BLAMED: Duration = Duration::from_secs(15);
const KNOWN: Duration = Duration::from_secs(20);

/// Each suffers alone, on one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Killed,
    Stopped,
    Reset,
    BlackHole,
    Corrupt,
    Truncated,
    Trickle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    BeforeNarInfo,
    AfterNarInfo,
    /// Percent of the NAR.
    At(u64),
}

const PHASES: [Phase; 5] = [
    Phase::BeforeNarInfo,
    Phase::AfterNarInfo,
    Phase::At(1),
    Phase::At(50),
    Phase::At(99),
];

/// Where else the output can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sources {
    AnotherHolder,
    /// A second substituter in nix.conf.
    Cache,
    /// An anchor behind the node, which is Nix's only substituter.
    Anchor,
    Nobody,
}

impl Kind {
    fn then(self) -> Then {
        match self {
            Kind::Killed | Kind::Truncated => Then::Close,
            Kind::Stopped | Kind::BlackHole => Then::Silence,
            Kind::Reset => Then::Reset,
            Kind::Corrupt => Then::Carry,
            Kind::Trickle => Then::Trickle,
        }
    }

    /// Whether the machine itself suffers, and not only what it sends.
    fn befalls_machine(self) -> bool {
        matches!(self, Kind::Killed | Kind::Stopped | Kind::BlackHole)
    }

    /// Whether Nix must get the output from somewhere, or may build it.
    fn must_be_substituted(self, sources: Sources) -> bool {
        match sources {
            Sources::Cache => true,
            // Right bytes cannot follow wrong ones that Nix has already: the substitution is given up, and Nix goes on.
            Sources::AnotherHolder | Sources::Anchor => self != Kind::Corrupt,
            Sources::Nobody => self == Kind::Trickle,
        }
    }
}

/// The machines of all phases of one fault.
struct Rig {
    // The test's order of dropping: machines before their LAN.
    laptop: Machine,
    holders: Vec<Machine>,
    fault: Fault,
    watch: Watch,
    expressions: Vec<String>,
    paths: Vec<String>,
    cache: Option<tempfile::TempDir>,
    /// With its key.
    anchor: Option<(Anchor, String)>,
    /// Whether Nix may build what it could not substitute; 2.8 then aborts when it disabled a cache.
    is_fallback: bool,
}

impl Rig {
    fn new(lan: &Lan, sources: Sources) -> Rig {
        let names = match sources {
            Sources::AnotherHolder => &["desktop", "tower"][..],
            _ => &["desktop"],
        };
        let expressions: Vec<String> = (0..PHASES.len())
            .map(|number| nix::noise_of(&format!("case-{number}"), BYTES as usize))
            .collect();
        let fault = Fault::default();
        let mut holders = Vec::new();
        let mut paths = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let mut holder = lan.builder(name);
            holder.settings.mdns = false;
            let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, TRANSFER_PORT));
            holder.settings.transfer = behind;
            paths = expressions.iter().map(|text| holder.build(text)).collect();
            fault.stand_before(number, &holder.namespace, holder.at(TRANSFER_PORT), behind);
            holder.start();
            holders.push(holder);
        }
        let mut laptop = lan.machine("laptop");
        laptop.settings.mdns = false;
        let addresses = holders
            .iter()
            .map(|holder| holder.at(MESH_PORT).to_string());
        laptop.settings.peers = addresses.collect();
        let watch = Watch::default();
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        watch.stand_before(&laptop.namespace, at(WATCH_PORT), at(SUBSTITUTER_PORT));
        let cache = (sources == Sources::Cache).then(|| {
            let folder = tempfile::tempdir().expect("temporary folder");
            let url = format!("file://{}", folder.path().display());
            let arguments = [&["copy", "--to", &url][..], &as_words(&paths)].concat();
            let holder = &holders[0];
            holder
                .nix
                .run(&holder.namespace, "nix", &arguments)
                .expect_success();
            folder
        });
        let anchor = (sources == Sources::Anchor).then(|| {
            let mut anchor = Anchor::new(lan, "nas", &format!("listen = \"0.0.0.0:{PORT}\"\n"));
            anchor.start();
            let key = anchor.run(&["cache", "create", "team", "--public"]);
            let token = anchor.token();
            let holder = &mut holders[0];
            holder.settings.extra = anchor.table(holder, &token);
            let arguments = [&["push", "team"][..], &as_words(&paths)].concat();
            holder.granary(&arguments).expect_success();
            laptop.settings.extra = anchor.table(&laptop, &token);
            laptop.settings.trusted_keys.push(key.clone());
            (anchor, key)
        });
        Rig {
            laptop,
            holders,
            fault,
            watch,
            expressions,
            paths,
            cache,
            anchor,
            is_fallback: false,
        }
    }

    /// Everybody runs and the laptop knows what the holders have, but has asked for nothing yet.
    fn bring_in_order(&mut self) {
        self.fault.clear();
        for holder in &mut self.holders {
            if !holder.is_running() {
                holder.kill();
                holder.start();
            }
        }
        // A fresh node: no memory of misses, of failures, of a quarantine.
        self.laptop.kill();
        self.laptop.start();
        let expected = self.holders.len();
        wait_for("the laptop knows what there is", KNOWN, || {
            let status = self.laptop.status();
            match status.linked_with_paths(PHASES.len() as u64) == expected {
                true => Ok(()),
                false => Err(status.to_string()),
            }
        });
    }

    fn check(&mut self, kind: Kind, sources: Sources, number: usize) {
        let phase = PHASES[number];
        let path = self.paths[number].clone();
        self.bring_in_order();
        let logged = self.laptop.log().len();

        let act = self.act(kind, phase, &path);
        let (at, request) = match phase {
            Phase::BeforeNarInfo => (0, Request::NarInfo),
            Phase::AfterNarInfo => (0, Request::Nar),
            Phase::At(_) if kind == Kind::Corrupt => (0, Request::Nar),
            Phase::At(percent) => (BYTES * percent / 100, Request::Nar),
        };
        let fault = self.fault.clone();
        let is_at_once = phase == Phase::BeforeNarInfo && kind.befalls_machine();
        let before = move || match is_at_once {
            true => act(0),
            false => fault.arm(at, kind.then(), act),
        };
        self.watch.expect(request, Box::new(before));

        let mut substituters = format!("http://127.0.0.1:{WATCH_PORT}");
        if let Some(cache) = &self.cache {
            substituters += &format!(" file://{}?priority=50", cache.path().display());
        }
        let file = self.laptop.nix.root.with_file_name("case.nix");
        fs::write(&file, &self.expressions[number]).expect("write expression");
        let file = file.to_str().expect("UTF-8 path");
        let key = self.anchor.as_ref().map_or("", |(_, key)| key);
        let built = self.laptop.nix.run(
            &self.laptop.namespace,
            "nix-build",
            &[
                "--no-out-link",
                "--option",
                "substituters",
                &substituters,
                "--option",
                "extra-trusted-public-keys",
                key,
                "--option",
                "fallback",
                if self.is_fallback { "true" } else { "false" },
                file,
            ],
        );
        let befallen = match is_at_once {
            true => Some(0),
            false => self.fault.befallen(),
        };
        let is_built = built.stderr.contains("building '/nix/store/");
        println!(
            "{kind:?} {phase:?} {sources:?}: {} after {:.1?}, {} for the NAR, befell {befallen:?}",
            if is_built { "built" } else { "substituted" },
            built.elapsed,
            self.watch.nars(),
        );
        assert!(!built.stderr.contains("disabling binary cache"), "{built}");
        assert!(built.status.success(), "{built}");
        assert_eq!(built.stdout.trim(), path);
        if kind.must_be_substituted(sources) {
            assert!(!is_built, "{built}");
        }
        if matches!(sources, Sources::AnotherHolder | Sources::Anchor) && kind != Kind::Corrupt {
            assert_eq!(self.watch.nars(), 1, "Nix noticed");
        }
        let verify = ["--verify-path", &path];
        self.laptop
            .nix
            .run(&self.laptop.namespace, "nix-store", &verify)
            .expect_success();

        let befallen = befallen.expect("the fault happened");
        self.assert_blamed(kind, befallen, logged);
        self.remedy(kind, befallen);
    }

    /// What is done to a holder, by its number.
    fn act(&self, kind: Kind, phase: Phase, path: &str) -> Box<dyn Fn(usize) + Send> {
        let pids: Vec<_> = self.holders.iter().map(Machine::pid).collect();
        match kind {
            Kind::Killed => Box::new(move |holder| {
                kill_process(pids[holder], Signal::KILL).expect("kill");
            }),
            Kind::Stopped => Box::new(move |holder| {
                kill_process(pids[holder], Signal::STOP).expect("stop");
            }),
            Kind::BlackHole => {
                let cables: Vec<_> = self
                    .holders
                    .iter()
                    .map(|holder| holder.namespace.cable())
                    .collect();
                Box::new(move |holder| cables[holder].swallow_packets())
            }
            Kind::Corrupt => {
                let content = |holder: &Machine| holder.nix.real_path(path).join("content");
                let files: Vec<_> = self.holders.iter().map(content).collect();
                let percent = match phase {
                    Phase::BeforeNarInfo => 0,
                    Phase::AfterNarInfo => 30,
                    Phase::At(percent) => percent,
                };
                Box::new(move |holder| flip_a_bit(&files[holder], BYTES * percent / 100))
            }
            Kind::Reset | Kind::Truncated | Kind::Trickle => Box::new(|_| {}),
        }
    }

    fn assert_blamed(&self, kind: Kind, befallen: usize, logged: usize) {
        let peer = &self.holders[befallen].peer_id;
        if kind == Kind::Corrupt {
            let status = self.laptop.status();
            assert!(status.is_quarantined(peer), "{status}");
            let log = self.laptop.log();
            let is_blame = |line: &str| line.contains("wrong bytes") && line.contains(peer);
            assert!(log[logged..].lines().any(is_blame), "{log}");
            return;
        }
        // Slow is not wrong, and this one is not slow for long.
        if kind == Kind::Trickle {
            return;
        }
        wait_for("the log says who was to blame", BLAMED, || {
            let log = self.laptop.log();
            let is_blame = |line: &&str| {
                line.contains(peer.as_str())
                    && ["transfer failed", "stopped a transfer", "lost the link"]
                        .iter()
                        .any(|words| line.contains(words))
            };
            match log[logged..].lines().find(is_blame) {
                Some(_) => Ok(()),
                None => Err(log[logged..].to_owned()),
            }
        });
    }

    fn remedy(&mut self, kind: Kind, befallen: usize) {
        let holder = &self.holders[befallen];
        match kind {
            Kind::Stopped => holder.signal(Signal::CONT),
            Kind::BlackHole => holder.namespace.cable().pass_packets(),
            _ => {}
        }
    }
}

fn as_words(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

/// Behind Nix's back.
fn flip_a_bit(file: &PathBuf, at: u64) {
    fs::set_permissions(file, Permissions::from_mode(0o644)).expect("make writable");
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .expect("open");
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).expect("read");
    open.write_all_at(&[byte[0] ^ 1], at).expect("write");
    drop(open);
    fs::set_permissions(file, Permissions::from_mode(0o444)).expect("make read-only");
}

fn check(kind: Kind, sources: Sources) {
    check_with(kind, sources, false);
}

fn check_with(kind: Kind, sources: Sources, is_fallback: bool) {
    let lan = Lan::new();
    let mut rig = Rig::new(&lan, sources);
    rig.is_fallback = is_fallback;
    for number in 0..PHASES.len() {
        rig.check(kind, sources, number);
    }
}

/// The promise for what a person waits for: a large download whose source dies goes on by itself.
const GIGABYTE: usize = 1_000_000_000;
const STALL_MAX: Duration = Duration::from_millis(2500);

#[test]
fn gigabyte_whose_holder_is_killed_halfway_comes_in_one_answer_without_a_long_pause() {
    let lan = Lan::new();
    let expression = nix::noise_of("gigabyte", GIGABYTE);
    let fault = Fault::default();
    let behind = SocketAddr::from((Ipv4Addr::LOCALHOST, TRANSFER_PORT));
    let mut path = String::new();
    let mut holders = ["desktop", "tower"].map(|name| lan.builder(name));
    for (number, holder) in holders.iter_mut().enumerate() {
        path = holder.build(&expression);
        holder.settings.transfer = behind;
        fault.stand_before(number, &holder.namespace, holder.at(TRANSFER_PORT), behind);
        holder.start();
    }
    let mut laptop = lan.machine("laptop");
    laptop.start();
    laptop.wait_linked(&[&holders[0], &holders[1]]);
    laptop.wait_offered(&path, KNOWN);
    let pids = [holders[0].pid(), holders[1].pid()];
    let kill = move |holder: usize| kill_process(pids[holder], Signal::KILL).expect("kill");
    fault.arm(GIGABYTE as u64 / 2, Then::Close, Box::new(kill));

    let narinfo = laptop.narinfo(&path);
    let url = narinfo.line("URL").expect("a URL");
    let endpoint = SocketAddr::from((Ipv4Addr::LOCALHOST, SUBSTITUTER_PORT));
    let read = || http::read(endpoint, &format!("/{url}")).expect("an answer");
    let Reading {
        status,
        bytes,
        nar_hash,
        longest_pause,
        elapsed,
    } = laptop.namespace.inside(read);
    println!("{bytes} bytes in {elapsed:.1?}, longest pause {longest_pause:.0?}");
    assert!(fault.befallen().is_some());
    assert_eq!(status, 200);
    assert_eq!(Some(bytes.to_string()), narinfo.line("NarSize"));
    assert_eq!(Some(nar_hash), narinfo.line("NarHash"));
    assert!(longest_pause < STALL_MAX, "a pause of {longest_pause:?}");
}

macro_rules! cases {
    ($($name:ident: $kind:ident, $sources:ident;)*) => {
        $(#[test]
        fn $name() {
            check(Kind::$kind, Sources::$sources);
        })*
    };
}

cases! {
    killed_holder_beside_another: Killed, AnotherHolder;
    killed_holder_before_a_cache: Killed, Cache;
    killed_holder_before_the_anchor: Killed, Anchor;
    killed_holder_alone: Killed, Nobody;
    stopped_holder_beside_another: Stopped, AnotherHolder;
    stopped_holder_before_a_cache: Stopped, Cache;
    stopped_holder_before_the_anchor: Stopped, Anchor;
    stopped_holder_alone: Stopped, Nobody;
    reset_connection_beside_another: Reset, AnotherHolder;
    reset_connection_before_a_cache: Reset, Cache;
    reset_connection_before_the_anchor: Reset, Anchor;
    reset_connection_alone: Reset, Nobody;
    black_hole_beside_another: BlackHole, AnotherHolder;
    black_hole_before_a_cache: BlackHole, Cache;
    black_hole_before_the_anchor: BlackHole, Anchor;
    black_hole_alone: BlackHole, Nobody;
    corrupt_byte_beside_another: Corrupt, AnotherHolder;
    corrupt_byte_before_a_cache: Corrupt, Cache;
    corrupt_byte_before_the_anchor: Corrupt, Anchor;
    corrupt_byte_alone: Corrupt, Nobody;
    truncated_body_beside_another: Truncated, AnotherHolder;
    truncated_body_before_a_cache: Truncated, Cache;
    truncated_body_before_the_anchor: Truncated, Anchor;
    truncated_body_alone: Truncated, Nobody;
    trickle_beside_another: Trickle, AnotherHolder;
    trickle_before_a_cache: Trickle, Cache;
    trickle_before_the_anchor: Trickle, Anchor;
    trickle_alone: Trickle, Nobody;
}

#[test]
fn nix_that_may_fall_back_to_building_does_not_abort() {
    for kind in [Kind::Killed, Kind::Reset, Kind::Corrupt, Kind::Truncated] {
        check_with(kind, Sources::Nobody, true);
    }
}
