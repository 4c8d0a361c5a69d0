//! Secrets in files: which modes are refused, wherever one is read, and whose they are.
//!
//! A file with a secret is for its owner alone. systemd's credentials are the exception: they have mode
//! 0440, in a folder that only root and the unit may enter.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Component, Path};

/// Permission bits that nobody but the owner may have on a file with a secret.
const FOREIGN_PERMISSIONS: u32 = 0o077;

/// Where systemd keeps the credentials of all units; only root makes folders there. Who looks at a unit's
/// configuration from outside (`granary doctor`, as root) meets them without the unit's environment.
const CREDENTIALS_FOLDER: &str = "/run/credentials";

/// Returns the mode of a secret's file (permission bits alone) when others than its owner may read it.
pub fn exposed(file: &Path, metadata: &Metadata) -> Option<u32> {
    let mode = metadata.permissions().mode() & 0o7777;
    (mode & FOREIGN_PERMISSIONS != 0 && !is_credential(file)).then_some(mode)
}

/// Gives a file that root made at `path` to whom its folder belongs to: the node may run as somebody else
/// than the person who gives an order.
pub fn give_to_owner(file: &File, path: &Path) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let owner = fs::metadata(folder.unwrap_or(Path::new(".")))?;
        fchown(file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

/// Whether a file is one of systemd's credentials.
pub fn is_credential(file: &Path) -> bool {
    let ours = std::env::var_os("CREDENTIALS_DIRECTORY");
    is_in(file, ours.as_deref().map(Path::new)) || is_in(file, Some(Path::new(CREDENTIALS_FOLDER)))
}

/// Whether a file is named as one below a folder, without a way out of it.
fn is_in(file: &Path, folder: Option<&Path>) -> bool {
    let Some(folder) = folder.filter(|folder| folder.is_absolute()) else {
        return false;
    };
    let leaves = |part| part == Component::ParentDir;
    file.starts_with(folder) && !file.components().any(leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_below_the_folder_is_a_credential() {
        let check = |file: &str, folder: &str, expected| {
            let found = is_in(Path::new(file), Some(Path::new(folder)));
            assert_eq!(found, expected, "{file} in {folder}");
        };
        check("/run/credentials/a/token", "/run/credentials/a", true);
        check("/run/credentials/ab/token", "/run/credentials/a", false);
        check("/run/credentials/a/../token", "/run/credentials/a", false);
        check("token", "", false);
        check("/home/token", "", false);
        assert!(!is_in(Path::new("/home/token"), None));
    }
}
