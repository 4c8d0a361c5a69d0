//! The state folder: files that commands of a person write and a running node reads.
//!
//! `granary hide`, `granary mesh revoke` and the like write a file beside the node's own, whole or not
//! at all, and the node notices. So an order holds with and without a running node, and who may give
//! one is decided by who may write to the folder.
//!
//! Invariants: a file is whole or absent, even after a crash; it belongs to whom the folder belongs to
//! and nobody else may read it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::watch;
use tracing::warn;

use crate::secret;

/// How often files are looked at when inotify cannot be had: a revocation is due within 5 s.
const POLL: Duration = Duration::from_secs(1);

/// Bytes of inotify events read at once: some 30 of them.
const INOTIFY_BUFFER_BYTES: usize = 4096;

/// Returns the text of a file of at most `bytes_max` bytes; `None` when there is none.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    // One more than may be, to tell a file that is too long from one that just fits.
    file.take(bytes_max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        return Err(io::Error::other(format!(
            "it has more than {bytes_max} bytes"
        )));
    }
    Ok(Some(text))
}

/// Replaces a file: temporary file, fsync, rename, fsync of the folder. Mode 0600.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = folder_of(path);
    // tempfile makes files with mode 0600, whatever the umask.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    secret::give_to_owner(file.as_file(), path)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// Holds others off who would change files of the folder at the same time, until it is dropped.
pub fn lock(folder: &Path) -> io::Result<File> {
    let folder = File::open(folder)?;
    folder.lock()?;
    Ok(folder)
}

/// Reports that files of the folder may have changed, until every receiver is dropped.
///
/// What changes after the call is reported. Must be called inside a tokio runtime.
pub fn changes(folder: &Path) -> watch::Receiver<()> {
    let (sender, receiver) = watch::channel(());
    let mut notices = notices(folder)
        .inspect_err(|error| warn!(%error, "could not set up inotify; looking at the state folder every second"))
        .ok();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = next(&mut notices) => sender.send_replace(()),
            }
        }
    });
    receiver
}

async fn next(notices: &mut Option<EventStream<Vec<u8>>>) {
    match notices {
        Some(stream) => {
            if !matches!(stream.next().await, Some(Ok(_))) {
                *notices = None;
            }
        }
        None => tokio::time::sleep(POLL).await,
    }
}

/// Files that were put there whole, or closed by an editor. The index, which is written all the time,
/// stays open.
fn notices(folder: &Path) -> io::Result<EventStream<Vec<u8>>> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE | WatchMask::DELETE;
    inotify.watches().add(folder, mask | WatchMask::ONLYDIR)?;
    inotify.into_event_stream(vec![0; INOTIFY_BUFFER_BYTES])
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_file_that_is_written_is_private_and_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list");
        let mut changes = changes(folder.path());
        write(&file, b"one").unwrap();
        let noticed = tokio::time::timeout(Duration::from_secs(20), changes.changed()).await;
        assert!(matches!(noticed, Ok(Ok(()))), "{noticed:?}");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(read(&file, 3).unwrap().as_deref(), Some("one"));
        assert!(read(&file, 2).is_err());
        assert_eq!(read(&folder.path().join("none"), 2).unwrap(), None);
    }
}
