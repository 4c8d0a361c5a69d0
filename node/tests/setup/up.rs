//! `granary up`: one command, and what it made is what a second one finds.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use granary_protocol::ticket::Ticket;

use crate::machine::{Machine, free_port};
use crate::terminal;

const GENEROUS: Duration = Duration::from_secs(30);

pub struct Up {
    process: Child,
    said: Arc<Mutex<String>>,
}

impl Up {
    pub fn start(machine: &Machine) -> Up {
        let mut process = machine.granary(&["up"]);
        process.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = process.spawn().unwrap();
        let stdout = process.stdout.take().unwrap();
        Up::follow(process, Box::new(stdout))
    }

    /// The same, with a terminal to speak to.
    fn start_at_a_terminal(machine: &Machine, options: &[&str]) -> Up {
        let (screen, program) = terminal::open();
        let mut process = machine.granary(&[&["up"], options].concat());
        process.stdout(program).stderr(Stdio::piped());
        Up::follow(process.spawn().unwrap(), Box::new(screen))
    }

    fn follow(mut process: Child, stdout: Box<dyn Read + Send>) -> Up {
        let said = Arc::new(Mutex::new(String::new()));
        let stderr = process.stderr.take().unwrap();
        for stream in [stdout, Box::new(stderr)] {
            let said = said.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    said.lock().unwrap().push_str(&format!("{line}\n"));
                }
            });
        }
        Up { process, said }
    }

    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    pub fn wait(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let started = Instant::now();
        while !is_so() {
            assert!(started.elapsed() < GENEROUS, "{what}: {}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success(), "{}", self.said());
        self.said()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// A configuration that disturbs no other machine.
fn free_ports() -> String {
    let (mesh, transfer, anchor) = (free_port(), free_port(), free_port());
    format!(
        "[mesh]\nlisten = [\"127.0.0.1:{mesh}\"]\ntransfer = [\"127.0.0.1:{transfer}\"]\nmdns = false\n\
         [anchor-server]\nlisten = \"127.0.0.1:{anchor}\"\n"
    )
}

/// The lines to copy, which name nothing that changes between starts.
fn lines(said: &str) -> Vec<String> {
    let lines = said
        .lines()
        .skip_while(|line| !line.starts_with("granary is up"));
    let lines = lines.filter(|line| !line.contains("INFO"));
    lines.map(str::to_owned).collect()
}

#[test]
fn one_command_makes_everything_and_a_second_changes_nothing() {
    let mut machine = Machine::new();
    machine.make_store();
    machine.extra = free_ports();
    // No test speaks to the world.
    fs::write(machine.nix_conf(), "substituters =\n").unwrap();
    machine.build("built-here");
    let up = Up::start(&machine);
    up.wait("the lines", || up.said().contains("granary token create"));
    up.wait("the build at the anchor", || {
        let status: serde_json::Value =
            serde_json::from_str(&machine.run(&["status", "--json"])).unwrap_or_default();
        status["upload"]["paths_pushed"] == 1
    });
    let listed = machine.run(&["cache", "list"]);
    assert!(listed.starts_with("main  private  1 path,"), "{listed}");
    let status = machine.run(&["status"]);
    assert!(status.contains("member    as ") && status.contains("anchor    http://127.0.0.1"));

    for name in [
        "mesh.key",
        "identity",
        "certificate",
        "anchor.token",
        "anchor/token-key",
    ] {
        let mode = fs::metadata(machine.file("state").join(name)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o077, 0, "{name}");
    }
    // The node shows the cache of the anchor beside it.
    up.wait("what the anchor tells", || {
        let status = machine.run(&["status"]);
        status.contains("  holds ") && status.contains("; private, keeps all; told")
    });
    // As the manual says of every certificate; the node renews it in time.
    let status: serde_json::Value =
        serde_json::from_str(&machine.run(&["status", "--json"])).unwrap();
    let ends = status["mesh"]["certificate"]["expires"].as_u64().unwrap();
    let left = ends - now();
    assert!((29 * 86_400..=30 * 86_400).contains(&left), "{left}");
    let kept = |machine: &Machine| {
        ["mesh.key", "certificate", "anchor.token"]
            .map(|name| fs::read(machine.file("state").join(name)).unwrap())
    };
    let (before, said) = (kept(&machine), up.stop());
    assert!(!said.contains("ERROR"), "{said}");

    let up = Up::start(&machine);
    up.wait("the lines", || up.said().contains("granary token create"));
    assert_eq!(kept(&machine), before);
    let again = up.stop();
    assert_eq!(lines(&again), lines(&said));
    // The lines are those that `granary use` makes.
    let printed = machine.run(&["use", "--print"]);
    for key in ["main-1:", "granary-loopback-"] {
        assert!(printed.contains(key), "{printed}");
    }
    assert!(said.contains(&format!("substituters = http://127.0.0.1:{}", machine.port)));
    assert!(said.contains("main-1:"));
    // Somebody may keep what goes into a pipe, and a ticket lets its reader in.
    assert!(said.contains("granary mesh ticket") && !said.contains("granary-ticket-1:"));
    assert!(!machine.file("state/tickets").exists());
}

/// The tickets that were shown.
fn tickets(said: &str) -> Vec<String> {
    let shown = |line: &str| line.trim().strip_prefix("granary join ").map(str::to_owned);
    said.lines().filter_map(shown).collect()
}

#[test]
fn a_ticket_is_shown_at_a_terminal_and_lets_one_machine_in_within_the_hour() {
    let mut desk = Machine::new();
    desk.make_store();
    desk.extra = free_ports();
    fs::write(desk.nix_conf(), "substituters =\n").unwrap();
    let up = Up::start_at_a_terminal(&desk, &[]);
    up.wait("a ticket", || !tickets(&up.said()).is_empty());
    let shown = tickets(&up.said()).remove(0);
    let ends = Ticket::from_text(&shown).unwrap().expires.0;
    let left = ends.saturating_sub(now());
    assert!((3500..=3600).contains(&left), "{left}");
    let mut laptop = Machine::new();
    laptop.extra = free_ports();
    let joined = laptop.run(&["join", &shown, "--name", "laptop"]);
    assert!(
        joined.contains(" as laptop (share,vouch,push:main)"),
        "{joined}"
    );
    let other = Machine::new().granary(&["join", &shown]).output().unwrap();
    let refused = String::from_utf8_lossy(&other.stderr);
    assert!(
        !other.status.success() && refused.contains("used as often as it may be"),
        "{refused}"
    );
    let said = up.stop();
    assert!(!said.contains("ERROR"), "{said}");
    assert!(
        said.contains("nix.conf (granary use puts them there)"),
        "{said}"
    );
    // Each start shows a ticket of its own, and NixOS what belongs into its configuration.
    let store = desk.file("store");
    fs::create_dir(&store).unwrap();
    let made = store.join("00000000000000000000000000000000-nix.conf");
    fs::rename(desk.nix_conf(), &made).unwrap();
    symlink(&made, desk.nix_conf()).unwrap();
    let (dir, other) = (store.display(), desk.file("other.toml"));
    let text = fs::read_to_string(desk.file("granary.toml")).unwrap();
    let text = text.replace("[store]\n", &format!("[store]\ndir = \"{dir}\"\n"));
    fs::write(&other, text).unwrap();
    let up = Up::start_at_a_terminal(&desk, &["--config", other.to_str().unwrap()]);
    up.wait("a ticket", || !tickets(&up.said()).is_empty());
    let said = up.stop();
    assert_ne!(tickets(&said)[0], shown);
    assert!(
        said.contains("nix.settings = {") && !said.contains("granary use puts"),
        "{said}"
    );
}
