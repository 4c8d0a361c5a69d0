//! Mesh keys and certificates, made with the command line as a person makes them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use granary_protocol::revocation::Revocations;
use granary_protocol::signature::SecretKey;

use crate::process;

const DEADLINE: Duration = Duration::from_secs(30);

/// A command of the `granary` binary under test, outside of any namespace.
pub fn granary(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granary"));
    command.args(arguments);
    command
}

/// The key of one mesh.
pub struct MeshKey {
    pub secret_file: PathBuf,
    pub public: String,
}

impl MeshKey {
    pub fn create(folder: &Path, name: &str) -> MeshKey {
        let (secret_file, public_file) = (
            folder.join(format!("{name}.key")),
            folder.join(format!("{name}.pub")),
        );
        let mut command = granary(&["mesh", "create", "--key-file"]);
        command
            .arg(&secret_file)
            .arg("--public-file")
            .arg(&public_file);
        process::run(&mut command, DEADLINE).expect_success();
        let public = std::fs::read_to_string(public_file)
            .expect("read mesh key")
            .trim()
            .to_owned();
        MeshKey {
            secret_file,
            public,
        }
    }

    /// The file of a list of revocations that is well signed, with nobody on it.
    pub fn revocations(&self, number: u64) -> String {
        let secret = std::fs::read_to_string(&self.secret_file).expect("read mesh key");
        let secret: SecretKey = secret.trim().parse().expect("a key");
        let list = Revocations {
            number,
            ..Revocations::default()
        };
        list.sign(&secret).expect("a short list").to_text()
    }

    /// Writes a certificate for a peer; `more` are further arguments of `mesh admit`.
    pub fn admit(&self, peer_id: &str, file: &Path, more: &[&str]) {
        let mut command = granary(&["mesh", "admit", peer_id, "--key-file"]);
        command
            .arg(&self.secret_file)
            .arg("--out")
            .arg(file)
            .args(more);
        process::run(&mut command, DEADLINE).expect_success();
    }
}

/// Returns the peer id of a state folder, making its identity when there is none.
pub fn peer_id(state: &Path) -> String {
    let mut command = granary(&["identity", "--state-dir"]);
    command.arg(state);
    let text = process::run(&mut command, DEADLINE).expect_success();
    text.split_whitespace()
        .last()
        .expect("identity prints the peer id")
        .to_owned()
}
