use std::io::Write;

use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::StoreDir;

use super::*;
use crate::anchor::admin::Changes;
use crate::anchor::object_store::S3Options;
use crate::anchor::{Clock, Options};

/// Ends whoever waits for a pipe to be written, should the test fail before it writes it.
struct Release(std::path::PathBuf);

impl Drop for Release {
    fn drop(&mut self) {
        // With both ends nobody is waited for.
        let _ = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&self.0);
    }
}

async fn anchor_in(state: &Path) -> (Arc<Anchor>, CacheRow) {
    let anchor = Anchor::open(Options {
        state: state.to_owned(),
        storage: "memory:".to_owned(),
        s3: S3Options::default(),
        trust: TrustedKeys::new(),
        attic_key: None,
        oidc: Vec::new(),
        members: None,
        nar_bytes_max: 1 << 20,
        tls: None,
        scrub_after: None,
        heal_from: Vec::new(),
        clock: Clock::default(),
    });
    let anchor = anchor.await.unwrap();
    let name = "main".parse().unwrap();
    let cache = anchor.create_cache(&name, &Changes::default(), None).await;
    (anchor, cache.unwrap())
}

fn promised() -> NarInfo {
    let text = "StorePath: /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a\nURL: nar/x\n\
                NarHash: sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s\n\
                NarSize: 100\nReferences: \n";
    NarInfo::parse(text, &StoreDir::default()).unwrap()
}

#[tokio::test]
async fn an_upload_that_was_let_go_is_not_taken_up_while_its_files_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (anchor, cache) = anchor_in(folder.path()).await;
    let (dir, narinfo) = (StoreDir::default(), promised());
    let id = granary_protocol::nix32::encode(&[7; ID_BYTES]);
    let intake = kept::begin(&anchor.spool, &id, &cache.name, &narinfo, &dir).unwrap();
    let upload = Upload::waiting(cache.id, narinfo, intake);
    anchor.uploads.insert(id.clone(), upload);
    anchor.uploads.end(&id);
    assert!(kept::revive(&anchor.spool, &id, &cache.name, &dir).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_taken_up_alone_also_when_its_request_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (anchor, cache) = anchor_in(folder.path()).await;
    let narinfo = promised();
    let id = granary_protocol::nix32::encode(&[7; ID_BYTES]);
    let dir = StoreDir::default();
    drop(kept::begin(&anchor.spool, &id, &cache.name, &narinfo, &dir).unwrap());
    // A note that is not read before somebody writes it.
    let note = anchor.spool.join(format!("upload-{id}.json"));
    let text = std::fs::read(&note).unwrap();
    std::fs::remove_file(&note).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&note).status();
    assert!(made.unwrap().success());
    let _release = Release(note.clone());
    {
        let mut revive = std::pin::pin!(anchor.revive(&cache, &id));
        // Until it holds the lock and has handed the rest to a thread.
        let started = Instant::now();
        while anchor.uploads.reviving.try_lock().is_ok() {
            assert!(started.elapsed() < Duration::from_secs(10), "no lock");
            assert!(futures::poll!(revive.as_mut()).is_pending());
        }
    }
    assert!(anchor.uploads.reviving.try_lock().is_err(), "it goes on");
    let mut writer = std::fs::File::options().write(true).open(&note).unwrap();
    writer.write_all(&text).unwrap();
    drop(writer);
    let lock = tokio::time::timeout(
        Duration::from_secs(30),
        anchor.uploads.reviving.clone().lock_owned(),
    );
    lock.await.expect("it ended");
}
