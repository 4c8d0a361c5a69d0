//! The real Nix client on one machine's own store.
//!
//! Every machine has a chroot store (`--store <folder>`), a nix.conf and a narinfo cache of its
//! own. Builds run in Nix's sandbox with the host's `/bin` and `/usr` in it, which a chroot store
//! requires; so they take the same steps (build under `.drv.chroot`, rename, register) as anywhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::network::Namespace;
use crate::process::{self, Finished};

/// A closure of 300 paths; see the file.
pub const CLOSURE: &str = include_str!("closure.nix");
pub const CLOSURE_PATHS: usize = 300;
pub const CLOSURE_BYTES_MIN: u64 = 200 << 20;

/// Long enough for the large closure on a busy machine; a hang is what it is there to end.
const DEADLINE: Duration = Duration::from_secs(180);

/// Returns an expression for one store path: a folder with a file of `bytes` bytes.
pub fn folder_of(name: &str, bytes: usize) -> String {
    format!(
        r#"derivation {{
          name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
          args = [ "-e" "-c" "mkdir $out; yes {name} | head -c {bytes} >$out/content; echo $out >$out/self" ];
        }}"#
    )
}

/// The same with contents that nothing shrinks, so that every byte of it is one on the wire.
pub fn noise_of(name: &str, bytes: usize) -> String {
    format!(
        r#"derivation {{
          name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
          args = [ "-e" "-c" ''
            mkdir $out; echo $out >$out/self
            head -c {bytes} /dev/zero | openssl enc -aes-128-ctr -nosalt -pbkdf2 -pass pass:{name} >$out/content
          '' ];
        }}"#
    )
}

fn words_of(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// A key pair in Nix's format, as a builder signs with.
pub struct SigningKey {
    pub secret_file: PathBuf,
    pub public: String,
}

impl SigningKey {
    pub fn create(folder: &Path, name: &str) -> SigningKey {
        let (secret_file, public_file) = (
            folder.join(format!("{name}.secret")),
            folder.join(format!("{name}.public")),
        );
        let mut command = std::process::Command::new("nix-store");
        command
            .args(["--generate-binary-cache-key", name])
            .args([&secret_file, &public_file]);
        process::run(&mut command, DEADLINE).expect_success();
        let public = std::fs::read_to_string(public_file)
            .expect("read public key")
            .trim()
            .to_owned();
        SigningKey {
            secret_file,
            public,
        }
    }
}

/// Nix on one machine.
pub struct Nix {
    /// The chroot store: Nix's `/nix` is `<root>/nix`.
    pub root: PathBuf,
    configuration: PathBuf,
    cache: PathBuf,
    scratch: PathBuf,
    /// Words before every command; see `GRANARY_LAN_NIX` in `main.rs`.
    prefix: Vec<String>,
}

impl Nix {
    /// Writes a nix.conf that asks the node first, believes `trusted`, and signs with `signing`.
    pub fn new(folder: &Path, trusted: &[&str], signing: Option<&SigningKey>) -> Nix {
        let nix = Nix {
            root: folder.join("root"),
            configuration: folder.join("nix-conf"),
            cache: folder.join("cache"),
            scratch: folder.join("expressions"),
            // Builders keep the host's Nix, so that what they build is the same; clients take the other.
            prefix: match signing {
                Some(_) => Vec::new(),
                None => words_of(&std::env::var("GRANARY_LAN_NIX").unwrap_or_default()),
            },
        };
        for folder in [&nix.root, &nix.configuration, &nix.cache, &nix.scratch] {
            std::fs::create_dir(folder).expect("make folder");
        }
        let sandbox_paths: Vec<&str> = ["/bin", "/usr", "/lib", "/lib64"]
            .into_iter()
            .filter(|path| Path::new(path).exists())
            .collect();
        let signing = signing
            .map(|key| format!("secret-key-files = {}\n", key.secret_file.display()))
            .unwrap_or_default();
        let text = format!(
            "experimental-features = nix-command\n\
             substituters = http://127.0.0.1:4726\n\
             trusted-public-keys = {}\n\
             require-sigs = true\n\
             narinfo-cache-negative-ttl = 0\n\
             build-users-group =\n\
             max-jobs = 4\n\
             sandbox = true\n\
             sandbox-fallback = false\n\
             sandbox-paths = {}\n{signing}",
            trusted.join(" "),
            sandbox_paths.join(" "),
        );
        std::fs::write(nix.configuration.join("nix.conf"), text).expect("write nix.conf");
        nix
    }

    /// Takes the host's release, as builders do; see `GRANARY_LAN_NIX` in `main.rs`.
    pub fn take_host_release(&mut self) {
        self.prefix.clear();
    }

    /// Where this machine's Nix is configured.
    pub fn configuration_file(&self) -> PathBuf {
        self.configuration.join("nix.conf")
    }

    pub fn store_folder(&self) -> PathBuf {
        self.root.join("nix/store")
    }

    pub fn database(&self) -> PathBuf {
        self.root.join("nix/var/nix/db/db.sqlite")
    }

    /// Where a store path stands on this disk.
    pub fn real_path(&self, store_path: &str) -> PathBuf {
        self.store_folder().join(
            store_path
                .strip_prefix("/nix/store/")
                .expect("a store path"),
        )
    }

    /// Makes the (empty) store and its database.
    pub fn initialize(&self, namespace: &Namespace) {
        self.run(namespace, "nix-store", &["--init"])
            .expect_success();
    }

    /// Runs one of Nix's commands on this store, inside the machine.
    pub fn run(&self, namespace: &Namespace, program: &str, arguments: &[&str]) -> Finished {
        let mut words = self.prefix.clone();
        words.extend(["env", "-u", "NIX_REMOTE", "-u", "NIX_PATH"].map(str::to_owned));
        words.push(format!("HOME={}", self.cache.display()));
        words.push(format!("NIX_CONF_DIR={}", self.configuration.display()));
        words.push(format!("XDG_CACHE_HOME={}", self.cache.display()));
        words.push(program.to_owned());
        let mut command = namespace.command(&words[0]);
        command
            .args(&words[1..])
            .args(arguments)
            .arg("--store")
            .arg(&self.root);
        command.current_dir(&self.scratch);
        process::run(&mut command, DEADLINE)
    }

    /// Builds an expression and returns its output path.
    pub fn build(&self, namespace: &Namespace, expression: &str, ask_node: bool) -> String {
        let file = self.scratch.join("build.nix");
        std::fs::write(&file, expression).expect("write expression");
        let substitute = if ask_node { "true" } else { "false" };
        let file = file.to_str().expect("UTF-8 path");
        self.run(
            namespace,
            "nix-build",
            &["--no-out-link", "--option", "substitute", substitute, file],
        )
        .expect_success()
    }

    /// Returns the output path that building the expression would give.
    pub fn output_of(&self, namespace: &Namespace, expression: &str) -> String {
        let file = self.scratch.join("instantiate.nix");
        std::fs::write(&file, expression).expect("write expression");
        let file = file.to_str().expect("UTF-8 path");
        let derivation = self
            .run(namespace, "nix-instantiate", &[file])
            .expect_success();
        self.run(
            namespace,
            "nix-store",
            &["--query", "--outputs", &derivation],
        )
        .expect_success()
    }

    /// True when the store's database says that the path is there.
    pub fn is_valid(&self, namespace: &Namespace, path: &str) -> bool {
        self.run(namespace, "nix-store", &["--check-validity", path])
            .status
            .success()
    }

    /// The paths of a closure, as this store knows them.
    pub fn closure(&self, namespace: &Namespace, path: &str) -> Vec<String> {
        let text = self
            .run(namespace, "nix-store", &["--query", "--requisites", path])
            .expect_success();
        text.lines().map(str::to_owned).collect()
    }

    /// Asserts that every path is signed by a trusted key and has the bytes its hash promises.
    pub fn assert_sound(&self, namespace: &Namespace) {
        self.run(namespace, "nix", &["store", "verify", "--all"])
            .expect_success();
        self.run(namespace, "nix-store", &["--verify", "--check-contents"])
            .expect_success();
    }
}

#[test]
fn chroot_store_builds_the_closure_signed_and_sound() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let bridge = crate::network::Bridge::new();
    let namespace = bridge.plug("builder");
    let key = SigningKey::create(folder.path(), "builder-1");
    let nix = Nix::new(folder.path(), &[&key.public], Some(&key));
    nix.initialize(&namespace);
    let top = nix.build(&namespace, CLOSURE, false);
    let closure = nix.closure(&namespace, &top);
    assert_eq!(closure.len(), CLOSURE_PATHS);
    let size = nix
        .run(&namespace, "nix", &["path-info", "--closure-size", &top])
        .expect_success();
    let bytes: u64 = size
        .split_whitespace()
        .last()
        .expect("a size")
        .parse()
        .expect("a number");
    assert!(bytes > CLOSURE_BYTES_MIN, "{bytes}");
    nix.assert_sound(&namespace);
    assert!(nix.is_valid(&namespace, &top));
    nix.run(&namespace, "nix-store", &["--delete", &top])
        .expect_success();
    assert!(!nix.is_valid(&namespace, &top));
    assert!(nix.real_path(&closure[0]).symlink_metadata().is_ok());
}
