//! Staging: what a killed process left of objects that it was writing into a folder.
//!
//! The `object_store` crate writes an object as `<key>#<number>` beside its place, and renames that. One that a kill
//! left is in no listing and is never taken up again: the next write takes the next number.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Folders of ours in storage, beside what lies in storage itself. What else is there is not ours to look at, but for
/// revocations, which are some bytes each, and which a command may be writing.
const FOLDERS: [&str; 2] = ["nar", "caches"];

/// Removes all that is left; returns how many files. Blocks for as long as it takes to list the folder.
pub(super) fn sweep(root: &Path) -> io::Result<u64> {
    let mut removed = 0;
    let mut folders: Vec<PathBuf> = FOLDERS.map(|folder| root.join(folder)).into();
    remove_from(root, &mut removed, &mut Vec::new())?;
    while let Some(folder) = folders.pop() {
        remove_from(&folder, &mut removed, &mut folders)?;
    }
    Ok(removed)
}

fn remove_from(folder: &Path, removed: &mut u64, below: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            below.push(entry.path());
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(is_staging) {
            fs::remove_file(entry.path())?;
            *removed += 1;
        }
    }
    Ok(())
}

/// No object has such a name: the crate refuses it.
fn is_staging(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_being_written_goes_and_all_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        let going = [
            "granary.json#1",
            "nar/0a/x.nar.zst#1",
            "nar/0a/x.nar.zst#12",
            "caches/main/cache.json#3",
            "caches/main/narinfo/x.narinfo#1",
        ];
        let staying = [
            "granary.json",
            "nar/0a/x.nar.zst",
            "caches/main/files/log/x#y",
            "caches/main/files/log/x#",
            "lost+found/#1",
        ];
        going.into_iter().chain(staying).for_each(make);
        assert_eq!(sweep(root.path()).unwrap(), going.len() as u64);
        assert!(going.iter().all(|name| !root.path().join(name).exists()));
        assert!(staying.iter().all(|name| root.path().join(name).exists()));
        assert_eq!(sweep(&root.path().join("absent")).unwrap(), 0);
    }
}
