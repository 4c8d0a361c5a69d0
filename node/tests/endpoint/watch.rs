//! `granary status --watch` on a real pseudo-terminal: what stands on the screen, in windows of different
//! sizes, while the node is there and while it is away, and what the terminal is like afterwards.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::machine::{Machine, until};
use crate::terminal;

/// A terminal with a watch on it.
struct Terminal {
    master: File,
    /// Keeps the terminal's state while nobody else has it open.
    slave: File,
    written: Arc<Mutex<String>>,
    child: Child,
}

impl Terminal {
    fn watch(machine: &Machine, columns: u16, rows: u16) -> Terminal {
        let (master, slave) = terminal::open();
        let config = machine.folder().join("watched.toml");
        fs::write(&config, machine.config_text()).unwrap();
        let io = || slave.try_clone().unwrap();
        let mut terminal = Terminal {
            written: Arc::default(),
            // It takes the terminal as its own, so that Ctrl-C typed there is a signal.
            child: Command::new("setsid")
                .args(["--ctty", env!("CARGO_BIN_EXE_granary"), "status", "--watch"])
                .arg("--config")
                .arg(config)
                .env("RUST_LOG", "warn")
                .stdin(io())
                .stdout(io())
                .stderr(io())
                .spawn()
                .unwrap(),
            master,
            slave,
        };
        terminal.resize(columns, rows);
        let (mut master, written) = (
            terminal.master.try_clone().unwrap(),
            terminal.written.clone(),
        );
        thread::spawn(move || {
            let mut text = Vec::new();
            let mut buffer = [0; 4096];
            // Until the last one who has the terminal open is gone.
            while let Ok(read @ 1..) = master.read(&mut buffer) {
                text.extend_from_slice(&buffer[..read]);
                *written.lock().unwrap() = String::from_utf8_lossy(&text).into_owned();
            }
        });
        until("a watch", || terminal.written().contains("\x1b[?1049h"));
        assert!(terminal.child.try_wait().unwrap().is_none());
        terminal
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn written(&self) -> String {
        self.written.lock().unwrap().clone()
    }

    /// The lines of the last picture that is whole.
    fn lines(&self) -> Vec<String> {
        let written = self.written();
        let end = written.rfind("\x1b[J").unwrap_or(0);
        let start = written[..end].rfind("\x1b[H").unwrap_or(0);
        let picture = written[start..end].replace("\x1b[H", "");
        // The terminal itself puts a return before each line feed.
        let text = picture.replace("\x1b[K", "").replace('\r', "");
        text.split('\n').map(str::to_owned).collect()
    }

    fn wait_for(&self, text: &str) {
        until(text, || self.lines().join(" ").contains(text));
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The letter that Linux has for what the process does: `T` is stopped.
    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, rest) = stat.rsplit_once(") ").unwrap();
        rest.chars().next().unwrap()
    }

    /// Whether keys are read as they are typed, without an echo.
    fn is_taken(&self) -> bool {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Whoever is in front of the terminal has it as it was.
    fn assert_given_back(&self) {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        until("the terminal's first screen", || {
            self.written().ends_with("\x1b[?25h\x1b[?1049l")
        });
    }

    /// Asks the watch to end, upon which it must do so well and leave the terminal as it was.
    fn end(mut self, ask: impl FnOnce(&mut Terminal)) {
        assert!(self.is_taken());
        ask(&mut self);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.written());
        self.assert_given_back();
    }

    fn quit(self, keys: &[u8]) {
        self.end(|terminal| terminal.type_in(keys));
    }
}

fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.listen = format!("\"{}:4726\"", machine.address);
    machine
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_follows_the_window_and_the_node() {
    let mut machine = machine();
    let path = machine.add("watched", 100);
    machine.start().await;
    machine.wait_for(&path);
    let terminal = Terminal::watch(&machine, 120, 50);
    terminal.wait_for("narinfos  1 local");
    let wide = terminal.lines();
    assert!(
        wide.iter().any(|line| line.starts_with("narinfos  ")),
        "{wide:#?}"
    );
    assert!(wide.iter().all(|line| line.chars().count() <= 120));
    terminal.resize(40, 50);
    until("a narrow picture", || {
        let lines = terminal.lines();
        lines.len() > wide.len() && lines.iter().all(|line| line.chars().count() <= 40)
    });
    // Nothing is lost in the narrow window.
    let words = |lines: &[String]| lines.join(" ").split_whitespace().collect::<String>();
    assert_eq!(words(&terminal.lines()), words(&wide));

    assert_eq!(machine.get(&path.narinfo()).status, 200);
    terminal.wait_for("narinfos  2 local");
    machine.stop().await;
    terminal.wait_for("The node is away");
    // What was known stands there still.
    assert!(terminal.lines().join(" ").contains("narinfos  2 local"));
    machine.start().await;
    until("the node's return", || {
        let text = terminal.lines().join(" ");
        !text.contains("away") && text.contains("narinfos  0 local")
    });
    terminal.quit(b"xq");
    machine.stop().await;
}

#[test]
fn a_suspended_watch_gives_the_terminal_back_and_takes_it_again() {
    let mut terminal = Terminal::watch(&machine(), 60, 12);
    terminal.wait_for("The node is away");
    for _ in 0..2 {
        terminal.type_in(b"\x1a");
        until("a stopped watch", || terminal.state() == 'T');
        terminal.assert_given_back();
        let before = terminal.written().len();
        // The window is another one when it goes on.
        terminal.resize(40, 12);
        terminal.send(Signal::CONT);
        until("a watch that goes on", || terminal.is_taken());
        until("a picture", || {
            let written = terminal.written();
            let fresh = &written[before..];
            fresh.starts_with("\x1b[?1049h\x1b[?25l") && fresh.contains("q quits")
        });
    }
    assert!(
        terminal
            .lines()
            .iter()
            .all(|line| line.chars().count() <= 40)
    );
    terminal.quit(b"q");
}

#[test]
fn a_watch_that_is_told_to_end_leaves_the_terminal_as_it_was() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let terminal = Terminal::watch(&machine(), 40, 12);
        terminal.end(|terminal| terminal.send(signal));
    }
    // Stopped from outside, it has no chance to give the terminal back, but ends as soon as it goes on.
    let terminal = Terminal::watch(&machine(), 40, 12);
    terminal.send(Signal::STOP);
    until("a stopped watch", || terminal.state() == 'T');
    terminal.end(|terminal| {
        terminal.send(Signal::TERM);
        terminal.send(Signal::CONT);
    });
}

#[test]
fn a_watch_of_nothing_ends_by_ctrl_c_and_draws_on_terminals_only() {
    let machine = machine();
    let terminal = Terminal::watch(&machine, 40, 12);
    terminal.wait_for("The node is away");
    assert!(
        terminal
            .lines()
            .iter()
            .all(|line| line.chars().count() <= 40)
    );
    terminal.quit(b"\x03");
    let config = machine.folder().join("watched.toml");
    let output = Command::new(env!("CARGO_BIN_EXE_granary"))
        .args(["status", "--watch", "--config"])
        .arg(config)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no terminal"));
}
