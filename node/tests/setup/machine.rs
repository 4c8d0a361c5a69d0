//! A machine: a folder with a configuration, a nix.conf and a store that the real Nix made.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

pub struct Machine {
    folder: TempDir,
    /// What is asked; a port that nobody uses until a node is started.
    pub port: u16,
    /// Further tables of granary.toml.
    pub extra: String,
}

impl Machine {
    pub fn new() -> Machine {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("conf")).unwrap();
        Machine {
            folder,
            port: free_port(),
            extra: String::new(),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn nix_conf(&self) -> PathBuf {
        self.file("conf/nix.conf")
    }

    pub fn granary(&self, arguments: &[&str]) -> Command {
        let root = self.path().display();
        let text = format!(
            "state-dir = \"{root}/state\"\n\
             [store]\nreal-dir = \"{root}/nix/store\"\ndatabase = \"{root}/nix/var/nix/db/db.sqlite\"\n\
             [substituter]\nlisten = \"127.0.0.1:{}\"\n{}",
            self.port, self.extra
        );
        let config = self.file("granary.toml");
        // A node that starts must not find it half written.
        if fs::read_to_string(&config).ok().as_ref() != Some(&text) {
            fs::write(&config, text).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
        command
            .args(arguments)
            .env("GRANARY_CONFIG", config)
            .env("NIX_CONF_DIR", self.file("conf"))
            .env("HOME", self.path())
            .env_remove("NIX_CONFIG")
            .env_remove("RUST_LOG");
        command
    }

    /// What a command that must succeed prints.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.granary(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "granary {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a program of Nix with this machine's nix.conf.
    pub fn try_nix(&self, program: &str, arguments: &[&str]) -> Output {
        let prefix = std::env::var("GRANARY_LAN_NIX").unwrap_or_default();
        let mut words = prefix.split_whitespace().map(str::to_owned);
        let environment = [
            "env".to_owned(),
            format!("HOME={}", self.path().display()),
            format!("NIX_CONF_DIR={}", self.file("conf").display()),
            program.to_owned(),
        ];
        let first = words.next();
        let (command, rest) = match first {
            Some(first) => (first, words.chain(environment).collect::<Vec<_>>()),
            None => ("env".to_owned(), environment[1..].to_vec()),
        };
        Command::new(command)
            .args(rest)
            .args(arguments)
            .env_remove("NIX_REMOTE")
            .env_remove("NIX_CONFIG")
            .output()
            .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"))
    }

    pub fn nix(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_nix(program, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes an empty store.
    pub fn make_store(&self) {
        self.nix(
            "nix-store",
            &["--init", "--store", &self.path().display().to_string()],
        );
    }

    /// Builds a path into the store.
    pub fn build(&self, name: &str) -> String {
        let paths = ["/bin", "/usr", "/lib", "/lib64"];
        let paths: Vec<_> = paths
            .into_iter()
            .filter(|path| Path::new(path).exists())
            .collect();
        let file = self.file("build.nix");
        let text = format!(
            "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\";\n\
             PATH = \"/bin:/usr/bin\"; args = [ \"-c\" \"echo {name} > $out\" ]; }}"
        );
        fs::write(&file, text).unwrap();
        let (file, root) = (
            file.display().to_string(),
            self.path().display().to_string(),
        );
        let sandbox = ["--option", "sandbox-paths", &paths.join(" ")];
        let options = ["--option", "build-users-group", ""];
        let arguments = [
            &["--no-out-link", &file, "--store", &root],
            &sandbox[..],
            &options[..],
        ];
        self.nix("nix-build", &arguments.concat()).trim().to_owned()
    }

    /// Everything that Nix is configured with, as Nix says it.
    pub fn settings(&self) -> String {
        let features = ["--extra-experimental-features", "nix-command"];
        let old = self.try_nix("nix", &[&features[..], &["show-config"]].concat());
        match old.status.success() {
            true => String::from_utf8(old.stdout).unwrap(),
            false => self.nix("nix", &[&features[..], &["config", "show"]].concat()),
        }
    }

    pub fn setting(&self, name: &str) -> Vec<String> {
        let settings = self.settings();
        let value = settings
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(" ="));
        let value = value.unwrap_or_else(|| panic!("Nix has no setting {name}"));
        value.split_whitespace().map(str::to_owned).collect()
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
