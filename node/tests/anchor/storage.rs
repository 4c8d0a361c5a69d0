//! What an anchor relies on, held against memory, a folder and S3.

use std::path::Path;

use bytes::Bytes;
use futures::TryStreamExt;
use granary::anchor::object_store::{ObjectStore, S3Options, SetupError, StorageError};
use tempfile::TempDir;

use crate::s3::{Fault, S3};

/// More than one part, and no multiple of one.
const LARGE_BYTES: usize = 20_000_001;

fn large() -> Vec<u8> {
    (0..LARGE_BYTES)
        .map(|at| (at / 251) as u8 ^ at as u8)
        .collect()
}

async fn body(store: &ObjectStore, key: &str, range: std::ops::Range<u64>) -> Option<Vec<u8>> {
    let stream = store.read(key, range).await.unwrap()?;
    let pieces: Vec<Bytes> = stream.try_collect().await.unwrap();
    Some(pieces.concat())
}

async fn keys(store: &ObjectStore, folder: &str) -> Vec<(String, u64)> {
    let listed: Vec<_> = store.list(folder).try_collect().await.unwrap();
    let mut keys: Vec<_> = listed
        .into_iter()
        .map(|object| (object.key, object.size))
        .collect();
    keys.sort();
    keys
}

/// Everything that the anchor relies on.
async fn conforms(store: &ObjectStore) {
    // What is not there is said to be absent.
    assert_eq!(store.get("a/b.txt", 100).await.unwrap(), None);
    assert_eq!(store.size("a/b.txt").await.unwrap(), None);
    assert!(store.read("a/b.txt", 0..1).await.unwrap().is_none());
    store.delete("a/b.txt").await.unwrap();
    assert_eq!(keys(store, "a").await, []);

    // What was put comes back, whole and in part, and may be replaced.
    store
        .put("a/b.txt", Bytes::from_static(b"one"))
        .await
        .unwrap();
    store
        .put("a/b.txt", Bytes::from_static(b"eleven"))
        .await
        .unwrap();
    store.put("a/c/d+e_f.txt", Bytes::new()).await.unwrap();
    store
        .put("ab", Bytes::from_static(b"beside"))
        .await
        .unwrap();
    assert_eq!(store.get("a/b.txt", 6).await.unwrap().unwrap(), "eleven");
    assert_eq!(store.get("a/c/d+e_f.txt", 0).await.unwrap().unwrap(), "");
    assert_eq!(store.size("a/b.txt").await.unwrap(), Some(6));
    assert_eq!(body(store, "a/b.txt", 0..6).await.unwrap(), b"eleven");
    assert_eq!(body(store, "a/b.txt", 2..4).await.unwrap(), b"ev");

    // More than was asked for is refused, not cut.
    let too_large = store.get("a/b.txt", 5).await;
    assert!(matches!(
        too_large,
        Err(StorageError::TooLarge {
            size: 6,
            max: 5,
            ..
        })
    ));
    assert!(
        store.read("a/b.txt", 0..7).await.is_err(),
        "a range beyond the end"
    );

    // A folder's listing has what is below it and nothing beside it.
    let listed = [("a/b.txt".to_owned(), 6), ("a/c/d+e_f.txt".to_owned(), 0)];
    assert_eq!(keys(store, "a").await, listed);

    // Large ones come from files.
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("large");
    let large = large();
    std::fs::write(&file, &large).unwrap();
    store.put_file("nar/l.nar", &file).await.unwrap();
    let size = LARGE_BYTES as u64;
    assert_eq!(store.size("nar/l.nar").await.unwrap(), Some(size));
    assert!(body(store, "nar/l.nar", 0..size).await.unwrap() == large);
    let tail = body(store, "nar/l.nar", size - 5..size).await.unwrap();
    assert_eq!(tail, large[LARGE_BYTES - 5..]);
    std::fs::write(&file, b"small").unwrap();
    store.put_file("nar/l.nar", &file).await.unwrap();
    assert_eq!(store.get("nar/l.nar", 10).await.unwrap().unwrap(), "small");

    // A file that cannot be read stores nothing.
    let missing = store.put_file("nar/m.nar", Path::new("/nonexistent")).await;
    assert!(matches!(missing, Err(StorageError::Source { .. })));
    assert_eq!(store.size("nar/m.nar").await.unwrap(), None);

    store.delete("a/b.txt").await.unwrap();
    assert_eq!(store.get("a/b.txt", 6).await.unwrap(), None);
    for key in ["../up", "a//b", "/a/../../b"] {
        assert!(store.put(key, Bytes::new()).await.is_err(), "{key}");
    }
}

#[tokio::test]
async fn memory_conforms() {
    conforms(&ObjectStore::open("memory:", &S3Options::default()).unwrap()).await;
}

#[tokio::test]
async fn a_folder_conforms_and_is_found_again() {
    let folder = TempDir::new().unwrap();
    let url = format!("file://{}/new/storage", folder.path().display());
    conforms(&ObjectStore::open(&url, &S3Options::default()).unwrap()).await;
    let again = ObjectStore::open(&url, &S3Options::default()).unwrap();
    assert_eq!(again.get("ab", 10).await.unwrap().unwrap(), "beside");
}

#[tokio::test]
async fn s3_conforms() {
    let s3 = S3::start().await;
    conforms(&s3.store()).await;
    let elsewhere =
        |line: &&String| !line.contains("/some/prefix/") && !line.contains("prefix=some");
    let requests = s3.requests();
    let elsewhere: Vec<_> = requests.iter().filter(elsewhere).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

#[tokio::test]
async fn s3_that_asks_for_patience_gets_it() {
    let s3 = S3::start().await;
    let store = s3.store();
    s3.fail(Fault::SlowDown, |method, _| method == "PUT");
    s3.fail(Fault::InternalError, |method, _| method == "PUT");
    store.put("a", Bytes::from_static(b"kept")).await.unwrap();
    s3.fail(Fault::SlowDown, |method, _| method == "GET");
    assert_eq!(store.get("a", 10).await.unwrap().unwrap(), "kept");
    assert_eq!(s3.faults_left(), 0);
}

#[tokio::test]
async fn a_body_that_s3_cuts_is_continued_or_an_error_but_never_short() {
    let s3 = S3::start().await;
    let store = s3.store();
    let large = large();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("large");
    std::fs::write(&file, &large).unwrap();
    store.put_file("l", &file).await.unwrap();
    for _ in 0..3 {
        s3.fail(Fault::CutBody, |method, _| method == "GET");
        let stream = store
            .read("l", 0..LARGE_BYTES as u64)
            .await
            .unwrap()
            .unwrap();
        match stream.try_collect::<Vec<Bytes>>().await {
            Ok(pieces) => assert!(pieces.concat() == large),
            Err(error) => assert!(matches!(
                error,
                StorageError::Backend { .. } | StorageError::Short { .. }
            )),
        }
    }
    assert_eq!(s3.faults_left(), 0);
}

#[tokio::test]
async fn a_multipart_upload_that_fails_is_aborted() {
    let s3 = S3::start().await;
    let store = s3.store();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("large");
    std::fs::write(&file, large()).unwrap();
    for _ in 0..10 {
        s3.fail(Fault::InternalError, |method, target| {
            method == "PUT" && target.contains("partNumber=2")
        });
    }
    assert!(store.put_file("l", &file).await.is_err());
    assert_eq!(store.size("l").await.unwrap(), None);
    let aborted = |line: &String| line.starts_with("DELETE") && line.contains("uploadId");
    assert!(s3.requests().iter().any(aborted), "{:?}", s3.requests());
}

#[tokio::test]
async fn many_large_objects_that_are_stored_at_once_take_turns() {
    let s3 = S3::start().await;
    let store = s3.store();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("large");
    let large = std::fs::File::create(&file).unwrap();
    large.set_len(40 << 20).unwrap();
    // Parts that are never answered stay in memory.
    for _ in 0..64 {
        s3.fail(Fault::Silence, |method, target| {
            method == "PUT" && target.contains("partNumber")
        });
    }
    let key = |number: usize| format!("l{number}");
    let storing: Vec<_> = (0..8)
        .map(|number| {
            let (store, file) = (store.clone(), file.clone());
            tokio::spawn(async move { store.put_file(&key(number), &file).await })
        })
        .collect();
    let parts = || {
        let requests = s3.requests();
        let parts = requests.iter().filter(|line| line.contains("partNumber"));
        parts.count()
    };
    let started = std::time::Instant::now();
    while parts() < 16 {
        assert!(started.elapsed() < crate::rig::GENEROUS, "{}", parts());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // Objects that are begun; with all eight, twice as many parts would be on their way.
    let begun = s3.requests();
    let begun = begun.iter().filter(|line| line.starts_with("POST"));
    assert_eq!(begun.count(), 4);
    for storing in storing {
        storing.abort();
    }
}

#[test]
fn storage_that_cannot_be_is_refused_with_a_reason() {
    let open = |url: &str| ObjectStore::open(url, &S3Options::default());
    for url in [
        "",
        "/var/lib",
        "file://relative",
        "s3://",
        "http://x/y",
        "s3:///prefix",
    ] {
        assert!(matches!(open(url), Err(SetupError::Url { .. })), "{url}");
    }
    assert!(matches!(
        open("file:///proc/nowhere"),
        Err(SetupError::Folder { .. })
    ));
}

#[test]
fn credentials_that_others_may_read_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("credentials");
    std::fs::write(&file, "aws_access_key_id = a\naws_secret_access_key = b\n").unwrap();
    let options = S3Options {
        credentials_file: Some(file.clone()),
        ..S3Options::default()
    };
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let exposed = ObjectStore::open("s3://b", &options)
        .unwrap_err()
        .to_string();
    assert!(
        exposed.contains("0644") && exposed.contains("chmod"),
        "{exposed}"
    );
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(ObjectStore::open("s3://b", &options).is_ok());
    std::fs::write(&file, "aws_access_key_id = a\n").unwrap();
    let incomplete = ObjectStore::open("s3://b", &options)
        .unwrap_err()
        .to_string();
    assert!(incomplete.contains("aws_secret_access_key"), "{incomplete}");
}
