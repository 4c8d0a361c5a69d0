//! The others, as processes: harmonia on a machine's store, atticd over a folder.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::http;
use crate::machine::{Lan, Machine};
use crate::network::Namespace;
use crate::process::{self, wait_for};

pub const HARMONIA_PORT: u16 = 5000;
pub const ATTIC_PORT: u16 = 8080;

const DEADLINE: Duration = Duration::from_secs(30);

/// A process that ends with what holds it.
struct Daemon(Child);

impl Daemon {
    fn start(mut command: Command, log: &Path) -> Daemon {
        let log = fs::File::create(log).expect("make a log");
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicate log"))
            .stderr(log);
        Daemon(command.spawn().expect("start a rival"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// harmonia on a machine's store and with the builders' key.
pub struct Harmonia {
    _daemon: Daemon,
    _folder: TempDir,
}

impl Harmonia {
    pub fn start(program: &Path, lan: &Lan, machine: &Machine, compression: bool) -> Harmonia {
        let folder = TempDir::new().expect("temporary folder");
        let config = folder.path().join("harmonia.toml");
        let text = format!(
            "bind = \"0.0.0.0:{HARMONIA_PORT}\"\nreal_nix_store = {:?}\nnix_db_path = {:?}\n\
             sign_key_paths = [{:?}]\nenable_compression = {compression}\n",
            machine.nix.store_folder(),
            machine.nix.database(),
            lan.builder_key.secret_file,
        );
        fs::write(&config, text).expect("write configuration");
        let program = program.to_str().expect("UTF-8 path");
        let mut command = machine.namespace.command(program);
        command.env("CONFIG_FILE", config).env("RUST_LOG", "warn");
        let daemon = Daemon::start(command, &folder.path().join("log"));
        let address = SocketAddr::from(([127, 0, 0, 1], HARMONIA_PORT));
        answers(&machine.namespace, address, "/nix-cache-info", &folder);
        Harmonia {
            _daemon: daemon,
            _folder: folder,
        }
    }
}

/// atticd with SQLite and a folder, as its own first start configures it.
pub struct Attic {
    _daemon: Daemon,
    folder: TempDir,
    program: PathBuf,
}

impl Attic {
    pub fn start(program: &Path, namespace: &Namespace) -> Attic {
        let folder = TempDir::new().expect("temporary folder");
        let at = folder.path().display();
        let text = format!(
            "listen = \"0.0.0.0:{ATTIC_PORT}\"\n\
             [database]\nurl = \"sqlite://{at}/server.db?mode=rwc\"\n\
             [storage]\ntype = \"local\"\npath = \"{at}/storage\"\n\
             [chunking]\nnar-size-threshold = 65536\nmin-size = 16384\navg-size = 65536\nmax-size = 262144\n\
             [compression]\ntype = \"zstd\"\n\
             [garbage-collection]\ninterval = \"12 hours\"\n\
             [jwt.signing]\ntoken-hs256-secret-base64 = \"Z3JhbmFyeSBpcyBmYXN0ZXIsIGxldCB1cyBzZWUgaG93IG11Y2g=\"\n"
        );
        fs::create_dir(folder.path().join("storage")).expect("make folder");
        fs::write(folder.path().join("server.toml"), text).expect("write configuration");
        let mut command = namespace.command(program.to_str().expect("UTF-8 path"));
        command
            .arg("--config")
            .arg(folder.path().join("server.toml"))
            .env("RUST_LOG", "warn");
        let daemon = Daemon::start(command, &folder.path().join("log"));
        let address = SocketAddr::from((namespace.address, ATTIC_PORT));
        answers(namespace, address, "/", &folder);
        Attic {
            _daemon: daemon,
            folder,
            program: program.to_owned(),
        }
    }

    /// A token that may do anything with any cache.
    pub fn token(&self) -> String {
        let mut command = Command::new(self.program.with_file_name("atticadm"));
        command
            .arg("--config")
            .arg(self.folder.path().join("server.toml"))
            .args(["make-token", "--sub", "bench", "--validity", "1 day"])
            .args(["--pull", "*", "--push", "*", "--create-cache", "*"]);
        process::run(&mut command, DEADLINE).expect_success()
    }
}

fn answers(namespace: &Namespace, address: SocketAddr, target: &str, folder: &TempDir) {
    wait_for("a rival answers", DEADLINE, || {
        match namespace.inside(|| http::get(address, target)) {
            Ok(answer) if answer.status == 200 => Ok(()),
            Ok(answer) => Err(format!("status {}", answer.status)),
            Err(error) => {
                let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
                Err(format!("{error}\n{log}"))
            }
        }
    });
}
