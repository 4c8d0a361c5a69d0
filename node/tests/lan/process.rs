//! Commands with a deadline, and waiting without sleeping blindly.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at again while waiting for it.
const POLL: Duration = Duration::from_millis(10);

/// What a finished command left behind.
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

impl Finished {
    /// Asserts success and returns what the command printed, without the last newline.
    pub fn expect_success(self) -> String {
        assert!(self.status.success(), "{self}");
        self.stdout.trim_end().to_owned()
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Finished {
            status,
            stdout,
            stderr,
            elapsed,
        } = self;
        write!(
            f,
            "{status} after {elapsed:.1?}\n-- stdout\n{stdout}\n-- stderr\n{stderr}"
        )
    }
}

/// Runs a command to its end; kills it and panics when the deadline passes first.
pub fn run(command: &mut Command, deadline: Duration) -> Finished {
    // Files, not pipes: a command that prints more than a pipe holds must not wait for us.
    let mut stdout = tempfile::tempfile().expect("temporary file");
    let mut stderr = tempfile::tempfile().expect("temporary file");
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().expect("duplicate file"))
        .stderr(stderr.try_clone().expect("duplicate file"))
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait for child") {
            break status;
        }
        if start.elapsed() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            let (stdout, stderr) = (text(&mut stdout), text(&mut stderr));
            panic!(
                "{command:?} did not end within {deadline:?}\n-- stdout\n{stdout}\n-- stderr\n{stderr}"
            );
        }
        thread::sleep(POLL);
    };
    Finished {
        status,
        elapsed: start.elapsed(),
        stdout: text(&mut stdout),
        stderr: text(&mut stderr),
    }
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .expect("read output");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns how long it took until `probe` gave a value, and the value.
///
/// Panics with `what` and the last reason when `deadline` passes first.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> (Duration, T) {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return (start.elapsed(), value),
            Err(reason) if start.elapsed() > deadline => {
                panic!("{what}: not within {deadline:?}; last seen: {reason}")
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// Asserts that `probe` finds nothing wrong, again and again, for the whole of `window`.
pub fn assert_throughout(
    what: &str,
    window: Duration,
    mut probe: impl FnMut() -> Result<(), String>,
) {
    let start = Instant::now();
    while start.elapsed() < window {
        if let Err(reason) = probe() {
            panic!("{what}: broken after {:.1?}: {reason}", start.elapsed());
        }
        thread::sleep(POLL);
    }
}
