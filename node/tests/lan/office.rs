//! An office: ten nodes with 12,400 paths each, and what they say to each other on the wire.
//!
//! The same office stands in `simulations/scenarios/office-10.toml`; `simulations/README.md` has the figures of
//! both side by side. Asserted are bytes, which do not depend on the machine that runs this; times are printed. For
//! figures: `cargo nextest run -p granary --test lan office --no-capture`.

use std::thread;
use std::time::{Duration, Instant};

use granary_protocol::hash::{Hash, sha256};
use granary_protocol::signature::SecretKey;
use granary_protocol::store_path::{StorePath, StorePathHash};
use rusqlite::{Connection, params};

use crate::http;
use crate::machine::{Lan, Machine, SUBSTITUTER_PORT, hash_of};
use crate::process::{assert_throughout, wait_for};
use crate::status::Status;
use crate::tap::{Kind, Passed, Tap};

const NODES: usize = 10;
const PATHS: usize = 12_400;
/// Of these, as many are in everybody's store.
const COMMON: usize = PATHS / 10 * 8;
const SINGLES: usize = 50;
const BATCH: usize = 1_000;

/// The demands of DESIGN §4.
const JOIN_BYTES_MAX: u64 = 1_000_000;
const BATCH_BYTES_MAX: u64 = 1_000_000;
const IDLE_BYTES_PER_SECOND_MAX: f64 = 100.0;
/// On each of nine links one side asks for a pulse every 5 s and the other answers, and both do for yamux every 10 s:
/// 122 B/s. With both sides asking for a pulse it would be 191 B/s.
const HEARTBEAT_BYTES_PER_SECOND_MAX: f64 = 150.0;

/// How long the mind collects changes before it tells them (`gossip/own_log.rs`).
const ANNOUNCEMENTS_BATCHED: Duration = Duration::from_millis(50);

/// Of one path, with its signed head: 239 bytes. A comparison with a neighbour, which may come in between, has 69.
const ANNOUNCEMENT_BYTES_MIN: usize = 200;

/// Ten unoptimised nodes that verify 12,400 signatures each on two cores take some seconds.
const SETTLED: Duration = Duration::from_secs(120);
const KNOWN: Duration = Duration::from_secs(20);
/// How often an endpoint is asked about a path: what a time is too long by, at most.
const ASK_EVERY: Duration = Duration::from_millis(10);
/// Silence of the control plane after which an exchange is over.
const QUIET: Duration = Duration::from_secs(1);
/// Comparisons with neighbours, of which an office of ten has one every three seconds, may go on.
const QUIET_DEADLINE: Duration = Duration::from_secs(30);
const IDLE_SECONDS: u64 = 15;

/// A row of `ValidPaths`, as Nix writes one for a path that came from a builder.
struct Row {
    path: String,
    nar_hash: String,
    nar_size: i64,
    signature: String,
}

/// Makes signed rows; the same label and number always give the same.
struct Registrar(SecretKey);

impl Registrar {
    fn new(lan: &Lan) -> Registrar {
        let text = std::fs::read_to_string(&lan.builder_key.secret_file).expect("read key");
        Registrar(text.trim().parse().expect("a secret key"))
    }

    fn row(&self, label: &str, number: usize) -> Row {
        let name = format!("{label}-{number}");
        let digest = sha256(name.as_bytes());
        let mut hash = [0; 20];
        hash.copy_from_slice(&digest[..20]);
        let path = StorePath::new(StorePathHash::from_bytes(hash), &name).expect("a store path");
        let path = format!("/nix/store/{}", path.base_name());
        let nar_hash = Hash::sha256(digest);
        let nar_size = 100_000;
        // What a signature covers: the path, its NAR, and that it refers to nothing.
        let fingerprint = format!("1;{path};{};{nar_size};", nar_hash.to_nix32());
        Row {
            nar_hash: nar_hash.to_base16(),
            signature: self.0.sign(fingerprint.as_bytes()).to_string(),
            path,
            nar_size,
        }
    }

    fn rows(&self, label: &str, count: usize) -> Vec<Row> {
        (0..count).map(|number| self.row(label, number)).collect()
    }
}

/// Registers all rows in one transaction, as Nix does after a build; the paths have no files.
fn register(machine: &Machine, rows: &[Row]) {
    let mut database = Connection::open(machine.nix.database()).expect("open Nix's database");
    database
        .busy_timeout(KNOWN)
        .expect("set the database's timeout");
    // How long this disk takes to sync is no figure of Granary's.
    database
        .pragma_update(None, "synchronous", "off")
        .expect("set pragma");
    let transaction = database.transaction().expect("begin");
    for row in rows {
        transaction
            .execute(
                "INSERT INTO ValidPaths (path, hash, registrationTime, narSize, sigs)
                 VALUES (?, ?, 1, ?, ?)",
                params![row.path, row.nar_hash, row.nar_size, row.signature],
            )
            .expect("register");
    }
    transaction.commit().expect("commit");
}

/// Waits until each of these knows of all the others that they hold so many paths.
fn wait_all_known(machines: &[Machine], paths: usize) {
    for machine in machines {
        let what = format!("{} knows what everybody holds", machine.name);
        wait_for(&what, SETTLED, || {
            let known = status(machine).linked_with_paths(paths as u64);
            match known == machines.len() - 1 {
                true => Ok(()),
                false => Err(format!("{known} of {}", machines.len() - 1)),
            }
        });
    }
}

/// Waits until all others know of `writer` that it holds so many paths.
fn wait_known(machines: &[Machine], writer: &Machine, paths: usize) {
    for machine in machines.iter().filter(|other| other.name != writer.name) {
        let what = format!("{} knows what {} holds", machine.name, writer.name);
        wait_for(&what, KNOWN, || {
            match status(machine).paths_of(&writer.peer_id) {
                Some(known) if known == paths as u64 => Ok(()),
                known => Err(format!("{known:?} of {paths} paths")),
            }
        });
    }
}

fn status(machine: &Machine) -> Status {
    Status::parse(&machine.get("/api/v1/status").text())
}

/// Waits until nobody has said anything for a while.
fn wait_quiet(taps: &[Tap], start: Instant) {
    wait_for("the control plane is quiet", QUIET_DEADLINE, || {
        let last = taps.iter().filter_map(|tap| tap.since(start).last()).max();
        match last {
            Some(last) if last.elapsed() < QUIET => Err(format!("{:?} ago", last.elapsed())),
            _ => Ok(()),
        }
    });
}

fn since(taps: &[Tap], start: Instant) -> Vec<Passed> {
    taps.iter().map(|tap| tap.since(start)).collect()
}

fn total(passed: &[Passed], figure: impl Fn(&Passed) -> u64) -> u64 {
    passed.iter().map(figure).sum()
}

/// Asserts that what one tap saw leave came by another: that none missed packets.
fn assert_all_seen(passed: &[Passed]) {
    let (sent, received) = (total(passed, Passed::sent), total(passed, Passed::received));
    assert!(
        sent.abs_diff(received) * 100 <= sent,
        "the taps saw {sent} bytes leave and {received} arrive"
    );
}

/// Asks every other machine's endpoint for the path until it has it; returns when each first did.
fn times_known(machines: &[Machine], writer: &Machine, row: &Row) -> (Instant, Vec<Instant>) {
    let target = format!("/{}.narinfo", hash_of(&row.path));
    thread::scope(|scope| {
        let readers: Vec<_> = machines
            .iter()
            .filter(|other| other.name != writer.name)
            .map(|other| {
                let (entrance, target, name) =
                    (other.namespace.entrance(), target.clone(), &other.name);
                scope.spawn(move || {
                    entrance.enter();
                    let address = ([127, 0, 0, 1], SUBSTITUTER_PORT).into();
                    let deadline = Instant::now() + KNOWN;
                    loop {
                        let asked = Instant::now();
                        let answer = http::get(address, &target).expect("an answer");
                        if answer.status == 200 {
                            return Instant::now();
                        }
                        assert!(asked < deadline, "{name} did not hear of {target}");
                        thread::sleep(ASK_EVERY.saturating_sub(asked.elapsed()));
                    }
                })
            })
            .collect();
        let registered = Instant::now();
        register(writer, std::slice::from_ref(row));
        let known = readers.into_iter().map(|reader| {
            reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        (registered, known.collect())
    })
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent).div_ceil(100).max(1) - 1;
        times.get(index).copied().unwrap_or_default()
    };
    format!("p50 {:.1?}, p99 {:.1?}", at(50), at(99))
}

#[test]
fn office_of_ten_keeps_to_the_bytes_that_the_design_allows() {
    let lan = Lan::new();
    let registrar = Registrar::new(&lan);
    let common = registrar.rows("common", COMMON);
    let mut machines: Vec<Machine> = (0..NODES)
        .map(|number| {
            let machine = lan.machine(&format!("desk-{number}"));
            register(&machine, &common);
            register(&machine, &registrar.rows(&machine.name, PATHS - COMMON));
            machine
        })
        .collect();
    let taps: Vec<Tap> = machines
        .iter()
        .map(|machine| Tap::new(&machine.namespace))
        .collect();

    // The tenth joins nine that know each other.
    for machine in &mut machines[..NODES - 1] {
        machine.start();
    }
    wait_all_known(&machines[..NODES - 1], PATHS);
    let begun = Instant::now();
    machines[NODES - 1].start();
    wait_all_known(&machines, PATHS);
    println!(
        "join: everybody knows everything {:.1?} after the tenth was started",
        begun.elapsed()
    );
    wait_quiet(&taps, begun);
    let joined = since(&taps, begun);
    assert_all_seen(&joined);
    let newcomer = &joined[NODES - 1];
    println!(
        "join: the tenth received {} B and sent {} B; another at most {} B and {} B",
        newcomer.received(),
        newcomer.sent(),
        joined[..NODES - 1]
            .iter()
            .map(Passed::received)
            .max()
            .unwrap_or(0),
        joined[..NODES - 1]
            .iter()
            .map(Passed::sent)
            .max()
            .unwrap_or(0),
    );
    for passed in &joined {
        assert!(passed.received() <= JOIN_BYTES_MAX, "{passed}");
        assert!(passed.sent() <= JOIN_BYTES_MAX, "{passed}");
    }
    assert!(
        newcomer.received() > 6 * (PATHS * (NODES - 1)) as u64,
        "so little cannot name all paths:{newcomer}"
    );

    // New paths, one by one, each at another machine.
    let (mut known, mut announced, mut told) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..SINGLES {
        let writer = number % NODES;
        let row = registrar.row("single", number);
        let (registered, times) = times_known(&machines, &machines[writer], &row);
        let first = taps[writer]
            .since(registered)
            .first_sent(ANNOUNCEMENT_BYTES_MIN);
        let first = first.expect("it was announced");
        announced.push(first - registered);
        known.extend(times.iter().map(|time| *time - registered));
        // What the mind counts begins before its batch window.
        told.extend(
            times
                .iter()
                .map(|time| time.saturating_duration_since(first) + ANNOUNCEMENTS_BATCHED),
        );
    }
    println!(
        "new path: registered → known at each of nine: {}",
        percentiles(known)
    );
    println!(
        "new path: registered → announced on the wire: {}",
        percentiles(announced)
    );
    println!(
        "new path: told to the mind → known at each of nine: {}",
        percentiles(told)
    );

    // One, without anybody asking for it, and a thousand at once.
    let mut held = PATHS + SINGLES / NODES;
    for (label, count) in [("alone", 1), ("batch", BATCH)] {
        wait_quiet(&taps, begun);
        let rows = registrar.rows(label, count);
        let start = Instant::now();
        register(&machines[0], &rows);
        held += count;
        wait_known(&machines, &machines[0], held);
        let elapsed = start.elapsed();
        wait_quiet(&taps, start);
        let passed = since(&taps, start);
        assert_all_seen(&passed);
        let sent = total(&passed, Passed::sent);
        println!("{count} new: {sent} B over the LAN, known everywhere after {elapsed:.1?}");
        println!("{count} new: the writer sent{}", passed[0]);
        assert!(sent <= BATCH_BYTES_MAX, "{}", passed[0]);
        // Eight bytes name a path, for each of nine readers.
        assert!(sent > (8 * count * (NODES - 1)) as u64, "{}", passed[0]);
    }

    // Nothing happens.
    let seconds = std::env::var("GRANARY_LAN_IDLE_SECONDS").map_or(IDLE_SECONDS, |text| {
        text.parse().expect("GRANARY_LAN_IDLE_SECONDS is a number")
    });
    let start = Instant::now();
    assert_throughout("an idle office", Duration::from_secs(seconds), || {
        match status(&machines[0]).linked().len() == NODES - 1 {
            true => Ok(()),
            false => Err("a link was lost".to_owned()),
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    let passed = since(&taps, start);
    let per_second =
        |figure: &dyn Fn(&Passed) -> u64| total(&passed, figure) as f64 / NODES as f64 / elapsed;
    let messages = per_second(&Passed::sent);
    let heartbeats = per_second(&Passed::heartbeats_sent);
    println!("idle for {elapsed:.0} s, sent per node and second:");
    println!(
        "  messages {messages:.2} B, or {:.2} B as the simulator counts them, without cipher and muxer",
        per_second(&Passed::frames_sent)
    );
    println!("  heartbeats {heartbeats:.1} B");
    println!(
        "  headers and acknowledgements {:.1} B",
        per_second(&Passed::headers_sent)
    );
    println!(
        "  mDNS {:.1} B",
        per_second(&|passed| passed.bytes_sent(Kind::Mdns))
    );
    println!(
        "  other {:.1} B",
        per_second(&|passed| passed.bytes_sent(Kind::Other))
    );
    println!("  one of them:{}", passed[0]);
    assert!(
        messages <= IDLE_BYTES_PER_SECOND_MAX,
        "{messages} B/s:{}",
        passed[0]
    );
    assert!(
        heartbeats <= HEARTBEAT_BYTES_PER_SECOND_MAX,
        "{heartbeats} B/s:{}",
        passed[0]
    );
}
