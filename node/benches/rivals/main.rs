//! Granary beside harmonia and attic, in one run on one machine, as ratios (DESIGN.md §11).
//!
//! `HARMONIA=/path/to/harmonia-cache ATTICD=/path/to/atticd cargo bench -p granary --bench rivals`, as root.
//! `atticadm` is expected beside `atticd`; a rival that is not given is left out, and the run says so. Words after `--`
//! choose parts: `narinfo`, `nar`, `wire`, `copy`, `push` (and pull); `ROUNDS=5` is how often each side is measured, in turn.
//! `TMPDIR=/dev/shm` spares the disk, and hides that a node reads what a disk's cache holds without changing threads.
//! Every figure is the median. Machines are network namespaces, so nothing leaves this one; all ends share its processors.

mod load;
mod rivals;
mod push;
mod wire;

#[path = "../../tests/lan/network.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod network;
#[path = "../../tests/lan/process.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod process;
#[path = "../../tests/lan/http.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod http;
#[path = "../../tests/lan/nix.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod nix;
#[path = "../../tests/lan/admission.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod admission;
#[path = "../../tests/lan/status.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod status;
#[path = "../../tests/lan/machine.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod machine;
#[path = "../../tests/lan/anchor.rs"]
#[allow(dead_code, reason = "the LAN tests use all of it")]
mod anchor;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use load::Load;
use machine::{Lan, Machine, SUBSTITUTER_PORT, hash_of};
use rivals::{HARMONIA_PORT, Harmonia};

/// Nothing compresses it, so that no rival is flattered.
const LARGE_BYTES: usize = 1 << 30;

const FILES: usize = 20_000;

/// Long enough to even out the scheduler, short enough for some dozen samples.
const SAMPLE: Duration = Duration::from_secs(2);

/// What the neighbours are to hear of a path before the clock runs.
const OFFERED: Duration = Duration::from_secs(30);

fn main() {
    // A bench that ends up as a process of its own: the client of Attic.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == push::CLIENT) {
        return push::client(&arguments[1..]);
    }
    // `cargo bench` itself hands over `--bench`.
    let chosen: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let is_chosen = |part: &str| chosen.is_empty() || chosen.contains(&part);
    let program = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (harmonia, atticd) = (program("HARMONIA"), program("ATTICD"));
    for (name, given) in [("HARMONIA", &harmonia), ("ATTICD", &atticd)] {
        if given.is_none() {
            println!("{name} is not set: nothing is measured beside it");
        }
    }
    println!(
        "{:<52} {:>12} {:>12} {:>7}  target",
        "", "granary", "beside", "ratio"
    );

    let lan = Lan::new();
    let mut desktop = lan.builder("desktop");
    let top = desktop.build(nix::CLOSURE);
    let closure = desktop.closure(&top);
    let large = add_noise(&lan, &desktop, "large", LARGE_BYTES);
    let files = add_files(&lan, &desktop);
    desktop.start();

    if is_chosen("narinfo") || is_chosen("nar") {
        let rival = harmonia
            .as_deref()
            .map(|program| Harmonia::start(program, &lan, &desktop, true));
        if is_chosen("narinfo") {
            narinfos(&desktop, rival.is_some(), &closure);
        }
        if is_chosen("nar") {
            nars(&desktop, rival.is_some(), &closure, &large, &files);
        }
    }
    if is_chosen("wire") {
        wire::measure(&lan, &desktop, &large);
    }
    if is_chosen("copy") {
        copies(&lan, &mut desktop, harmonia.as_deref(), &top);
    }
    if is_chosen("push") {
        push::measure(&lan, &desktop, atticd.as_deref(), &top, &large);
    }
}

/// How often each side is measured.
fn rounds() -> usize {
    let given = std::env::var("ROUNDS").ok();
    given.map_or(5, |given| given.parse().expect("ROUNDS is a number"))
}

/// Measures both sides in turn, so that what else the machine does falls on both; returns the medians.
fn in_turn(mut one: impl FnMut() -> f64, other: Option<impl FnMut() -> f64>) -> (f64, Option<f64>) {
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    let mut other = other;
    for _ in 0..rounds() {
        ones.push(one());
        others.extend(other.as_mut().map(|other| other()));
    }
    (median(ones).expect("one round at least"), median(others))
}

fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

/// Prints a line of the table; `target` is what DESIGN.md §11 demands of the ratio, in words.
fn row(what: &str, unit: &str, (granary, beside): (f64, Option<f64>), target: &str) {
    let figure = |figure: f64| match figure {
        _ if figure >= 100.0 => format!("{figure:.0} {unit}"),
        _ => format!("{figure:.3} {unit}"),
    };
    let ratio = beside.map_or("-".to_owned(), |beside| format!("{:.2}", granary / beside));
    let beside = beside.map_or("-".to_owned(), figure);
    println!(
        "{what:<52} {:>12} {beside:>12} {ratio:>7}  {target}",
        figure(granary)
    );
}

/// Adds a file of noise.
fn add_noise(lan: &Lan, machine: &Machine, name: &str, bytes: usize) -> String {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join(name);
    let mut state = 1_u64;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        noise.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    std::fs::write(&file, noise).expect("write noise");
    add(lan, machine, &file)
}

/// Adds a folder of many small files, as a source tree or a set of icons is.
fn add_files(lan: &Lan, machine: &Machine) -> String {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = folder.path().join("files");
    for number in 0..FILES {
        let below = root.join(format!("folder-{}", number / 100));
        std::fs::create_dir_all(&below).expect("make folder");
        let text = format!("{number} ").repeat(number % 500);
        std::fs::write(below.join(format!("file-{number}")), text).expect("write file");
    }
    add(lan, machine, &root)
}

/// Adds a file or folder to a machine's store, signed as its builds are.
fn add(lan: &Lan, machine: &Machine, file: &Path) -> String {
    let file = file.to_str().expect("UTF-8 path");
    let (nix, namespace) = (&machine.nix, &machine.namespace);
    let path = nix
        .run(namespace, "nix-store", &["--add", file])
        .expect_success();
    let key = lan.builder_key.secret_file.to_str().expect("UTF-8 path");
    nix.run(
        namespace,
        "nix",
        &["store", "sign", "--key-file", key, &path],
    )
    .expect_success();
    path
}

fn narinfos(desktop: &Machine, has_rival: bool, closure: &[String]) {
    let targets: Vec<String> = closure
        .iter()
        .map(|path| format!("/{}.narinfo", hash_of(path)))
        .collect();
    for connections in [1, 64] {
        let load = |port: u16| {
            let targets = targets.clone();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            move || Load::run(desktop, address, &targets, connections, SAMPLE).requests
        };
        row(
            &format!("narinfo of a local path, {connections} connections"),
            "/s",
            in_turn(
                load(SUBSTITUTER_PORT),
                has_rival.then(|| load(HARMONIA_PORT)),
            ),
            ">= 1.0",
        );
    }
}

fn nars(desktop: &Machine, has_rival: bool, closure: &[String], large: &str, files: &str) {
    let urls = |port: u16, paths: &[String]| -> Vec<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let url = |path: &String| load::nar_url(desktop, address, hash_of(path));
        paths.iter().map(url).collect()
    };
    let (large, files) = ([large.to_owned()], [files.to_owned()]);
    // All but the one of 200 MiB, which would be most of the bytes.
    let small = closure.iter().filter(|path| !path.ends_with("-big"));
    let small: Vec<String> = small.cloned().collect();
    for (what, unit, paths) in [
        ("nar of 1 GiB", "MB/s", &large[..]),
        ("nar of 20,000 small files", "MB/s", &files[..]),
        ("nars of 299 small paths", "/s", &small[..]),
    ] {
        for connections in [1, 4, 16] {
            let load = |port: u16| {
                let targets = urls(port, paths);
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                move || {
                    let done = Load::run(desktop, address, &targets, connections, SAMPLE);
                    match unit {
                        "/s" => done.requests,
                        _ => done.bytes / 1e6,
                    }
                }
            };
            row(
                &format!("{what} of the local store, {connections} connections"),
                unit,
                in_turn(
                    load(SUBSTITUTER_PORT),
                    has_rival.then(|| load(HARMONIA_PORT)),
                ),
                match unit {
                    "/s" => ">= 3.0",
                    _ => ">= 1.0",
                },
            );
        }
    }
}

/// The real client takes the closure into an empty store: through two nodes, and straight from harmonia.
fn copies(lan: &Lan, desktop: &mut Machine, harmonia: Option<&Path>, top: &str) {
    for (link, rate, compression, target) in [
        ("no limit", None, true, "<= 1.15"),
        ("1 Gbit/s, harmonia plain", Some("1gbit"), false, "<= 0.6"),
        ("1 Gbit/s, harmonia compressing", Some("1gbit"), true, ""),
        (
            "100 Mbit/s, harmonia plain",
            Some("100mbit"),
            false,
            "<= 0.5",
        ),
        (
            "100 Mbit/s, harmonia compressing",
            Some("100mbit"),
            true,
            "",
        ),
    ] {
        if let Some(rate) = rate {
            shape(
                desktop,
                &format!("replace dev eth0 root tbf rate {rate} burst 256kb latency 50ms"),
            );
        }
        let rival = harmonia.map(|program| Harmonia::start(program, lan, desktop, compression));
        let source = SocketAddr::from((desktop.namespace.address, HARMONIA_PORT));
        let through_nodes = || {
            let mut laptop = lan.machine("laptop");
            laptop.start();
            laptop.wait_linked(&[desktop]);
            laptop.wait_offered(top, OFFERED);
            let done = laptop.copy(top);
            let took = done.elapsed.as_secs_f64();
            done.expect_success();
            took
        };
        let straight = || {
            let laptop = lan.machine("laptop");
            let from = format!("http://{source}");
            let done = laptop
                .nix
                .run(&laptop.namespace, "nix", &["copy", "--from", &from, top]);
            let took = done.elapsed.as_secs_f64();
            done.expect_success();
            took
        };
        row(
            &format!("nix copy of 300 paths, {link}"),
            "s",
            in_turn(through_nodes, rival.is_some().then_some(straight)),
            target,
        );
        if rate.is_some() {
            shape(desktop, "del dev eth0 root");
        }
    }
}

/// Runs `tc qdisc` where the machine is.
fn shape(machine: &Machine, arguments: &str) {
    let mut command = machine.namespace.command("tc");
    command.arg("qdisc").args(arguments.split_whitespace());
    process::run(&mut command, OFFERED).expect_success();
}
