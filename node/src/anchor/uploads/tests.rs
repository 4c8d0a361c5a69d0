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

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_taken_up_alone_also_when_its_request_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let anchor = Anchor::open(Options {
        state: folder.path().to_owned(),
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
    let cache = cache.unwrap();
    let text = "StorePath: /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-a\nURL: nar/x\n\
                NarHash: sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s\n\
                NarSize: 100\nReferences: \n";
    let dir = StoreDir::default();
    let narinfo = NarInfo::parse(text, &dir).unwrap();
    let id = granary_protocol::nix32::encode(&[7; ID_BYTES]);
    drop(kept::begin(&anchor.spool, &id, &name, &narinfo, &dir).unwrap());
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
