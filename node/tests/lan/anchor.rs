//! An anchor that is a process on the LAN, and what machines need to use it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use tempfile::TempDir;

use crate::http;
use crate::machine::{Lan, Machine};
use crate::network::Namespace;
use crate::process::{self, wait_for};

pub const PORT: u16 = 4730;

const DEADLINE: Duration = Duration::from_secs(30);

/// An anchor in a namespace of its own.
pub struct Anchor {
    pub namespace: Namespace,
    folder: TempDir,
    /// `[anchor-server]`, without its state.
    pub settings: String,
    pub process: Option<Child>,
}

impl Anchor {
    pub fn new(lan: &Lan, name: &str, settings: &str) -> Anchor {
        Anchor {
            namespace: lan.plug(name),
            folder: TempDir::new().expect("temporary folder"),
            settings: settings.to_owned(),
            process: None,
        }
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let config = self.folder.path().join("granary.toml");
        let text = format!(
            "state-dir = {:?}\n[anchor-server]\ndefault-cache = \"\"\n{}",
            self.state(),
            self.settings
        );
        fs::write(&config, text).expect("write configuration");
        let mut command = self.namespace.command(env!("CARGO_BIN_EXE_granary"));
        command.args(arguments).arg("--config").arg(config);
        command.env("NO_COLOR", "1");
        command
    }

    pub fn run(&self, arguments: &[&str]) -> String {
        process::run(&mut self.command(arguments), DEADLINE).expect_success()
    }

    pub fn start(&mut self) {
        let log = self.folder.path().join("log");
        let log = File::options().create(true).append(true).open(log);
        let log = log.expect("open log");
        let mut command = self.command(&["anchor"]);
        command
            .stdout(log.try_clone().expect("duplicate log"))
            .stderr(log);
        self.process = Some(command.spawn().expect("start the anchor"));
        wait_for("the anchor answers", DEADLINE, || {
            let cache = self.get("/team/nix-cache-info");
            match cache.map(|response| response.status) {
                // Without the cache as well.
                Ok(200 | 401 | 404) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn get(&self, target: &str) -> std::io::Result<http::Response> {
        let address = SocketAddr::from((self.namespace.address, PORT));
        self.namespace.inside(|| http::get(address, target))
    }

    /// What a machine's configuration says to use it, with a token of its own.
    pub fn table(&self, machine: &Machine, token: &str) -> String {
        let file = self.folder.path().join(format!("{}.token", machine.name));
        fs::write(&file, token).expect("write token");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set mode");
        let address = self.namespace.address;
        format!("[[anchor]]\nurl = \"http://{address}:{PORT}/team\"\ntoken-file = {file:?}\n")
    }

    pub fn token(&self) -> String {
        self.run(&[
            "token",
            "create",
            "--subject",
            "lan",
            "--cache",
            "team",
            "--allow",
            "pull,push",
        ])
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.kill();
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        if std::thread::panicking() {
            eprintln!("-- the anchor logged:\n{log}");
        } else {
            assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
        }
    }
}
