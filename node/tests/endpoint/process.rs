//! A node in a process of its own, as a service manager runs it.

use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::machine::Machine;

/// A real node in a process of its own.
pub struct Node(pub Child);

impl Node {
    /// Starts one that inherits `listener` as systemd passes sockets, or binds its own.
    pub fn start(
        machine: &Machine,
        listener: Option<&TcpListener>,
        variables: &[(&str, &str)],
    ) -> Node {
        let file = machine.folder().join("granary.toml");
        std::fs::write(&file, machine.config_text()).unwrap();
        let mut command = Command::new("sh");
        let script = match listener {
            Some(_) => {
                "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" node --config \"$1\""
            }
            None => "exec \"$0\" node --config \"$1\"",
        };
        command
            .args(["-c", script, env!("CARGO_BIN_EXE_granary")])
            .arg(file)
            .env("RUST_LOG", "granary=info")
            .envs(variables.iter().copied())
            .stdin(match listener {
                Some(listener) => Stdio::from(OwnedFd::from(listener.try_clone().unwrap())),
                None => Stdio::null(),
            })
            .stderr(Stdio::piped());
        Node(command.spawn().unwrap())
    }

    /// A number of kilobytes from the kernel's view of it, such as `VmHWM`.
    pub fn kilobytes(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let number = line.unwrap().trim().strip_suffix(" kB").unwrap();
        number.parse().unwrap()
    }

    /// How many files and sockets it holds.
    pub fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.0.id());
        std::fs::read_dir(folder).unwrap().count()
    }

    /// Ends it as a service manager does, and returns what it logged.
    pub fn stop(mut self) -> String {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let mut log = String::new();
        let mut stderr = self.0.stderr.take().unwrap();
        stderr.read_to_string(&mut log).unwrap();
        assert!(self.0.wait().unwrap().success(), "{log}");
        assert!(!log.contains("ERROR"), "{log}");
        log
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // For a test that failed; one that was stopped is gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
