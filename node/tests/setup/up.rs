//! `granary up`: one command, and what it made is what a second one finds.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::machine::{Machine, free_port};

const GENEROUS: Duration = Duration::from_secs(30);

pub struct Up {
    process: Child,
    said: Arc<Mutex<String>>,
}

impl Up {
    pub fn start(machine: &Machine) -> Up {
        let mut process = machine
            .granary(&["up"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(process.stdout.take().unwrap()),
            Box::new(process.stderr.take().unwrap()),
        ];
        for stream in streams {
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
    let (mesh, transfer, anchor) = (free_port(), free_port(), free_port());
    machine.extra = format!(
        "[mesh]\nlisten = [\"127.0.0.1:{mesh}\"]\ntransfer = [\"127.0.0.1:{transfer}\"]\nmdns = false\n\
         [anchor-server]\nlisten = \"127.0.0.1:{anchor}\"\n"
    );
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
}
