//! Machines to follow the manual on: namespaces and an overlay of the root file system each, on one switch.
//!
//! Default paths, default ports, root, a package that `apt` installs: everything is as a reader has it, and nothing of
//! the machine that runs the test is touched. `boot` says what is on one.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Names that the manual uses, in the order of their addresses (`boot` has them in /etc/hosts).
pub const NAMES: [&str; 3] = ["desk", "laptop", "nas"];

/// A boot takes a second, a command some tenths; the longest, an installation, ten seconds.
const DEADLINE: Duration = Duration::from_secs(120);

/// Between two looks at something that comes by itself.
const PAUSE: Duration = Duration::from_millis(100);

/// A switch, and the machines that were named so far.
pub struct Lan {
    // Machines end before their switch does.
    machines: Vec<Machine>,
    switch: Process,
}

impl Lan {
    pub fn new() -> Lan {
        assert!(
            rustix::process::geteuid().is_root(),
            "the tests of the manual make machines of namespaces, and must run as root"
        );
        let switch = Process(unshare(&["--net", "sleep", "infinity"]).spawn().unwrap());
        let lan = Lan {
            machines: Vec::new(),
            switch,
        };
        lan.await_namespace(&lan.switch);
        let inside = format!("nsenter --net=/proc/{}/ns/net", lan.switch.0.id());
        run(&format!(
            "{inside} ip link add bridge type bridge mcast_snooping 0"
        ));
        run(&format!("{inside} ip link set bridge up"));
        lan
    }

    /// Until the process has left our network.
    fn await_namespace(&self, process: &Process) {
        let of = |id: &str| fs::read_link(format!("/proc/{id}/ns/net")).ok();
        let (ours, id) = (of("self"), process.0.id().to_string());
        let started = Instant::now();
        while of(&id).is_none_or(|theirs| Some(theirs) == ours) {
            assert!(started.elapsed() < DEADLINE, "no network namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn machine(&mut self, name: &str) -> &mut Machine {
        let at = match self.machines.iter().position(|one| one.name == name) {
            Some(at) => at,
            None => {
                let machine = self.boot(name);
                self.machines.push(machine);
                self.machines.len() - 1
            }
        };
        &mut self.machines[at]
    }

    pub fn machines(&mut self) -> impl Iterator<Item = &mut Machine> {
        self.machines.iter_mut()
    }

    fn boot(&self, name: &str) -> Machine {
        let number = NAMES.iter().position(|one| *one == name);
        let number = 1 + number.unwrap_or_else(|| panic!("no machine is called {name}"));
        let folder = TempDir::new().unwrap();
        for part in ["disk", "scripts"] {
            fs::create_dir(folder.path().join(part)).unwrap();
        }
        // Whoever is on the machine reads what it shall run.
        run(&format!(
            "chmod 0755 {0} {0}/scripts",
            folder.path().display()
        ));
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tree = fs::canonicalize(package.join("..")).unwrap();
        let kinds = [
            "--mount",
            "--net",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
        ];
        let mut command = unshare(&kinds);
        command
            .arg(package.join("tests/docs/boot"))
            .arg(name)
            .args([
                folder.path(),
                &tree,
                Path::new(env!("CARGO_BIN_EXE_granary")),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = Process(command.spawn().unwrap());
        self.await_namespace(&process);
        let (id, switch) = (process.0.id(), self.switch.0.id());
        run(&format!(
            "ip link add eth0 netns {id} type veth peer name port{number} netns {switch}"
        ));
        run(&format!(
            "nsenter --net=/proc/{switch}/ns/net ip link set port{number} master bridge up"
        ));
        let stdout = BufReader::new(process.0.stdout.take().unwrap());
        // One line answers one command, and is waited for.
        let (sender, said) = sync_channel(1);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut machine = Machine {
            name: name.to_owned(),
            stdin: process.0.stdin.take().unwrap(),
            said,
            ran: 0,
            foreground: None,
            logs: Vec::new(),
            _process: process,
            folder,
        };
        assert_eq!(machine.hear(), "ready");
        let network = format!(
            "ip address add 10.47.0.{number}/24 broadcast + dev eth0 && ip link set eth0 up"
        );
        assert_eq!(machine.run(&network, true).status, 0);
        machine
    }
}

/// What a command left.
#[derive(Debug)]
pub struct Outcome {
    pub status: i32,
    /// Standard output and standard error as they came.
    pub output: String,
}

pub struct Machine {
    pub name: String,
    stdin: ChildStdin,
    said: Receiver<String>,
    ran: usize,
    /// The process that stays, by the number of its script.
    foreground: Option<usize>,
    logs: Vec<PathBuf>,
    _process: Process,
    folder: TempDir,
}

impl Machine {
    /// Runs a command, as root in a shell that lives on, or as the user `you` in a new one.
    pub fn run(&mut self, command: &str, is_root: bool) -> Outcome {
        self.ran += 1;
        let number = self.ran;
        let script = match is_root {
            true => command.to_owned(),
            false => {
                self.write(&format!("{number}.you"), command);
                format!("runuser --login you --command 'bash /.docs/{number}.you'")
            }
        };
        self.write(&number.to_string(), &script);
        writeln!(self.stdin, "{number}").unwrap();
        let heard = self.hear();
        let status = heard.strip_prefix(&format!("{number} "));
        let status = status.unwrap_or_else(|| panic!("{} said {heard:?}", self.name));
        Outcome {
            status: status.parse().unwrap(),
            output: self.output(number),
        }
    }

    /// Starts a command that does not end by itself, at a terminal, as a person does, and in place of the one before;
    /// waits until the text holds.
    pub fn start(&mut self, command: &str, is_up: impl Fn(&str) -> bool) -> Outcome {
        self.end();
        self.ran += 1;
        let number = self.ran;
        // Its log goes past the terminal, which would give it colours.
        self.write(
            &format!("{number}.stays"),
            &format!("echo $$ >/.docs/{number}.id; exec 2>>/.docs/{number}.out\nexec {command}"),
        );
        let started = self.run(
            &format!(
                "script --quiet --command 'bash /.docs/{number}.stays' /dev/null </dev/null >>/.docs/{number}.out 2>&1 & \
                 (for i in $(seq 100); do [ -s /.docs/{number}.id ] && exit; sleep 0.05; done; exit 1)"
            ),
            true,
        );
        assert_eq!(started.status, 0, "{started:?}");
        self.foreground = Some(number);
        self.logs.push(self.file(&format!("{number}.out")));
        let since = Instant::now();
        loop {
            let output = self.output(number);
            let lives = format!("kill -0 $(cat /.docs/{number}.id)");
            let has_ended = self.run(&lives, true).status != 0;
            if is_up(&output) || has_ended || since.elapsed() > DEADLINE {
                let status = i32::from(!is_up(&output));
                return Outcome { status, output };
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends what was started, as Ctrl-C does.
    pub fn end(&mut self) {
        if let Some(number) = self.foreground.take() {
            let end = format!(
                "id=$(cat /.docs/{number}.id); kill -INT $id; while kill -0 $id 2>/dev/null; do sleep 0.05; done"
            );
            self.run(&end, true);
        }
    }

    /// Lines by which a daemon asked for help.
    pub fn errors(&mut self) -> String {
        let units = self
            .run("cat /var/log/*.service.log 2>/dev/null", true)
            .output;
        let logs = self.logs.iter().map(|log| fs::read_to_string(log).unwrap());
        let all: String = logs.chain([units]).collect();
        let lines = all.lines().filter(|line| line.contains(" ERROR "));
        lines.map(|line| format!("{line}\n")).collect()
    }

    fn hear(&self) -> String {
        match self.said.recv_timeout(DEADLINE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!(
                "{} takes more than {DEADLINE:?}: {}",
                self.name,
                self.output(self.ran)
            ),
            Err(RecvTimeoutError::Disconnected) => panic!("{} ended", self.name),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("scripts").join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.file(name), format!("{text}\n")).unwrap();
    }

    fn output(&self, number: usize) -> String {
        let bytes = fs::read(self.file(&format!("{number}.out"))).unwrap_or_default();
        // A terminal puts a return before each line feed.
        String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
    }
}

/// A process that ends with us, and all in its namespaces with it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command in namespaces of its own, with an environment that says nothing of ours.
fn unshare(arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    command
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(arguments)
        .env_clear()
        .envs([
            ("PATH", path),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
        ])
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Nobody is to download the package.
        .env("GRANARY_DEB_COMPRESSION", "none")
        .stdin(Stdio::null());
    command
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command");
    let output = Command::new(program).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
}
