//! The local store: one conformance suite for the real store, its twin in memory, stores made of others
//! ([`composed`]) and what an anchor publishes ([`published`]), then what only the real one has. Stores are made by the
//! `nix` that is installed, in temporary directories; without it these tests fail.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use granary::store::{
    BATCH_MAX, LocalStore, MemoryStore, Nar, NarError, NixStore, PathInfo, StoreConfig, StoreError,
    StoreEvent,
};
use granary_protocol::{
    hash::NarHasher,
    nar::Tree,
    store_path::{StoreDir, StorePath, StorePathHash},
};
use tempfile::TempDir;
use tokio::sync::mpsc;

#[path = "store/composed.rs"]
mod composed;
#[path = "store/published.rs"]
mod published;

/// How long an event may take in a test: far more than promised, for machines under load.
const GENEROUS: Duration = Duration::from_secs(20);

/// A store under test, and the hand that changes it.
trait Given {
    fn store(&self) -> &dyn LocalStore;
    fn add(&self, name: &str, tree: &Tree) -> StorePath;
    fn remove(&self, path: &StorePath);
}

impl Given for MemoryStore {
    fn store(&self) -> &dyn LocalStore {
        self
    }

    fn add(&self, name: &str, tree: &Tree) -> StorePath {
        MemoryStore::add(self, name, tree.clone())
            .unwrap()
            .store_path
    }

    fn remove(&self, path: &StorePath) {
        MemoryStore::remove(self, path.hash());
    }
}

/// A chroot store that the real nix writes.
struct RealStore {
    root: TempDir,
    store: NixStore,
}

impl RealStore {
    async fn new() -> RealStore {
        let root = TempDir::new().unwrap();
        nix(root.path(), "nix-store", &["--init".as_ref()]);
        let store = NixStore::open(config(root.path())).await.unwrap();
        RealStore { root, store }
    }

    fn nix(&self, program: &str, arguments: &[&str]) -> Vec<u8> {
        let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
        nix(self.root.path(), program, &arguments)
    }

    /// Where a path's files really are.
    fn file(&self, path: &StorePath) -> PathBuf {
        self.root.path().join("nix/store").join(path.base_name())
    }

    fn full(&self, path: &StorePath) -> String {
        self.store.dir().display(path)
    }

    async fn info(&self, path: &StorePath) -> PathInfo {
        self.store.path_info(path.hash()).await.unwrap().unwrap()
    }

    fn sql(&self, sql: &str) {
        let file = self.root.path().join("nix/var/nix/db/db.sqlite");
        rusqlite::Connection::open(file)
            .unwrap()
            .execute_batch(sql)
            .unwrap();
    }
}

impl Given for RealStore {
    fn store(&self) -> &dyn LocalStore {
        &self.store
    }

    fn add(&self, name: &str, tree: &Tree) -> StorePath {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join(name);
        write(&file, tree);
        let printed = nix(
            self.root.path(),
            "nix-store",
            &["--add".as_ref(), file.as_ref()],
        );
        self.parse(&printed)
    }

    fn remove(&self, path: &StorePath) {
        self.nix("nix-store", &["--delete", &self.full(path)]);
    }
}

impl RealStore {
    fn parse(&self, printed: &[u8]) -> StorePath {
        let printed = str::from_utf8(printed).unwrap().trim();
        self.store.dir().parse_path(printed).unwrap()
    }
}

fn config(root: &Path) -> StoreConfig {
    StoreConfig::chroot(StoreDir::default(), root)
}

/// Runs a program of the real nix on the store at `root` and returns what it prints.
fn nix(root: &Path, program: &str, arguments: &[&OsStr]) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .arg("--store")
        .arg(root)
        .env("HOME", root)
        .env_remove("NIX_REMOTE")
        .env(
            "NIX_CONFIG",
            "experimental-features = nix-command\nbuild-users-group =\nsubstituters =\n",
        )
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    output.stdout
}

fn write(file: &Path, tree: &Tree) {
    match tree {
        Tree::Regular {
            executable,
            contents,
        } => {
            fs::write(file, contents).unwrap();
            let mode = if *executable { 0o755 } else { 0o644 };
            fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        }
        Tree::Symlink { target } => {
            std::os::unix::fs::symlink(OsStr::from_bytes(target), file).unwrap();
        }
        Tree::Directory(entries) => {
            fs::create_dir(file).unwrap();
            for (name, tree) in entries {
                write(&file.join(OsStr::from_bytes(name)), tree);
            }
        }
    }
}

fn file(contents: &[u8]) -> Tree {
    Tree::Regular {
        executable: false,
        contents: contents.to_vec(),
    }
}

fn directory<const N: usize>(entries: [(&[u8], Tree); N]) -> Tree {
    Tree::Directory(entries.map(|(name, tree)| (name.to_vec(), tree)).into())
}

/// Bytes that differ everywhere, so that a wrong offset shows.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .take(length)
        .collect()
}

/// Everything that a NAR can hold, and files larger and smaller than a chunk.
fn odd_tree() -> Tree {
    let many = (0..600)
        .map(|i| (format!("{i}").into_bytes(), file(&noise(i * 3))))
        .collect();
    let mut deep = file(b"deep");
    for _ in 0..61 {
        deep = directory([(b"d", deep)]);
    }
    directory([
        (b"A", file(b"")),
        (b"a", file(b"1234567")),
        (b"a\nb", file(b"12345678")),
        (b"a.b", directory([])),
        (b"deep", deep),
        (b"large", file(&noise(700_001))),
        (b"many", Tree::Directory(many)),
        (
            &[b'n'; 255],
            Tree::Regular {
                executable: true,
                contents: b"#!/bin/sh\n".to_vec(),
            },
        ),
        (
            b"link",
            Tree::Symlink {
                target: b"../../etc".to_vec(),
            },
        ),
        (
            b"long",
            Tree::Symlink {
                target: vec![b't'; 4095],
            },
        ),
        (b"\xff\xfe", directory([(b"\x80", file(b"not UTF-8"))])),
    ])
}

async fn read(nar: &Nar, from: u64, to: u64) -> Result<Vec<u8>, NarError> {
    let mut stream = nar.stream(from..to);
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        assert!(!chunk.is_empty());
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn event(events: &mut mpsc::Receiver<StoreEvent>) -> StoreEvent {
    tokio::time::timeout(GENEROUS, events.recv())
        .await
        .expect("an event in time")
        .expect("a watcher that lives")
}

/// Takes events until the set is complete and returns the hashes in it.
async fn complete(events: &mut mpsc::Receiver<StoreEvent>) -> Vec<StorePathHash> {
    let mut hashes = Vec::new();
    loop {
        match event(events).await {
            StoreEvent::Added(infos) => {
                hashes.extend(infos.iter().map(|info| info.store_path.hash()));
            }
            StoreEvent::Complete => return hashes,
            StoreEvent::Removed(_) => panic!("nothing was removed"),
        }
    }
}

fn absent() -> StorePathHash {
    "00000000000000000000000000000000".parse().unwrap()
}

// The conformance suite.

mod conformance {
    use super::*;

    pub async fn what_is_added_is_known_with_its_hash_and_size(given: &dyn Given) {
        let tree = odd_tree();
        let nar = tree.nar().unwrap();
        let path = given.add("odd", &tree);
        assert_eq!(path.name(), "odd");
        let info = given.store().path_info(path.hash()).await.unwrap().unwrap();
        let mut hasher = NarHasher::new();
        hasher.update(&nar);
        assert_eq!(info.store_path, path);
        assert_eq!(info.nar_hash, hasher.finish());
        assert_eq!(info.nar_size, nar.len() as u64);
        assert!(info.references.is_empty());
        assert_eq!(info.deriver, None);
    }

    pub async fn what_was_never_added_is_absent(given: &dyn Given) {
        given.add("present", &file(b"x"));
        assert_eq!(given.store().path_info(absent()).await.unwrap(), None);
        let last = "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz".parse().unwrap();
        assert_eq!(given.store().path_info(last).await.unwrap(), None);
    }

    pub async fn a_batch_is_answered_in_its_order(given: &dyn Given) {
        let one = given.add("one", &file(b"1"));
        let two = given.add("two", &file(b"2"));
        let mut hashes = vec![two.hash(), absent(), one.hash(), two.hash()];
        hashes.resize(BATCH_MAX, absent());
        let infos = given.store().path_infos(hashes).await.unwrap();
        assert_eq!(infos.len(), BATCH_MAX);
        let paths: Vec<_> = infos
            .into_iter()
            .map(|info| info.map(|info| info.store_path))
            .take(4)
            .collect();
        assert_eq!(paths, [Some(two.clone()), None, Some(one), Some(two)]);
    }

    pub async fn a_nar_can_be_read_from_any_offset(given: &dyn Given) {
        let roots = [
            file(b""),
            file(&noise(300_000)),
            Tree::Symlink {
                target: b"/nowhere".to_vec(),
            },
            directory([]),
            odd_tree(),
        ];
        for (number, tree) in roots.iter().enumerate() {
            let path = given.add(&format!("root-{number}"), tree);
            let info = given.store().path_info(path.hash()).await.unwrap().unwrap();
            let nar = given.store().nar(&info).await.unwrap().unwrap();
            let expected = tree.nar().unwrap();
            let size = expected.len() as u64;
            assert_eq!(nar.size(), size);
            if let Some(layout) = nar.layout() {
                assert_eq!(layout, &tree.layout().unwrap());
            }
            let step = expected.len() / 23 + 1;
            for from in (0..expected.len())
                .step_by(step)
                .chain([expected.len() - 1])
            {
                let bytes = read(&nar, from as u64, size).await.unwrap();
                assert!(bytes == expected[from..], "root {number} from {from}");
                let to = (from + 5 * step / 2).min(expected.len());
                let bytes = read(&nar, from as u64, to as u64).await.unwrap();
                assert!(bytes == expected[from..to], "root {number} {from}..{to}");
            }
            assert!(read(&nar, size, size).await.unwrap().is_empty());
            assert!(read(&nar, size + 1, u64::MAX).await.unwrap().is_empty());
            assert!(read(&nar, 8, 8).await.unwrap().is_empty());
            assert_eq!(read(&nar, 0, u64::MAX).await.unwrap().len(), expected.len());
        }
    }

    pub async fn what_is_removed_is_absent_and_has_no_nar(given: &dyn Given) {
        let path = given.add("gone", &file(b"x"));
        let info = given.store().path_info(path.hash()).await.unwrap().unwrap();
        given.remove(&path);
        assert_eq!(given.store().path_info(path.hash()).await.unwrap(), None);
        assert!(given.store().nar(&info).await.unwrap().is_none());
    }

    pub async fn a_watcher_sees_what_is_there_then_what_comes_and_goes(given: &dyn Given) {
        let before = given.add("before", &file(b"x"));
        let mut events = given.store().watch();
        assert_eq!(complete(&mut events).await, [before.hash()]);

        let after = given.add("after", &file(b"y"));
        let info = given
            .store()
            .path_info(after.hash())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(event(&mut events).await, StoreEvent::Added(vec![info]));

        given.remove(&before);
        let removed = StoreEvent::Removed(vec![before.hash()]);
        assert_eq!(event(&mut events).await, removed);

        // The same path again is a new registration.
        given.add("before", &file(b"x"));
        match event(&mut events).await {
            StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, before),
            other => panic!("{other:?}"),
        }
    }

    pub async fn every_watcher_sees_everything(given: &dyn Given) {
        let mut first = given.store().watch();
        let mut second = given.store().watch();
        assert!(complete(&mut first).await.is_empty());
        assert!(complete(&mut second).await.is_empty());
        let path = given.add("shared", &file(b"x"));
        for events in [&mut first, &mut second] {
            match event(events).await {
                StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, path),
                other => panic!("{other:?}"),
            }
        }
    }
}

macro_rules! conforms {
    ($($behaviour:ident)*) => {
        mod real {
            $(#[tokio::test]
            async fn $behaviour() {
                super::conformance::$behaviour(&super::RealStore::new().await).await;
            })*
        }
        mod memory {
            $(#[tokio::test]
            async fn $behaviour() {
                let store = super::MemoryStore::new(super::StoreDir::default());
                super::conformance::$behaviour(&store).await;
            })*
        }
        mod beside {
            $(#[tokio::test]
            async fn $behaviour() {
                super::conformance::$behaviour(&super::composed::BesideEmpty::new()).await;
            })*
        }
        mod arrived {
            $(#[tokio::test]
            async fn $behaviour() {
                super::conformance::$behaviour(&super::composed::Arrived::new()).await;
            })*
        }
        mod publishing {
            $(#[tokio::test]
            async fn $behaviour() {
                super::conformance::$behaviour(&super::published::Publishing::new()).await;
            })*
        }
    };
}

conforms! {
    what_is_added_is_known_with_its_hash_and_size
    what_was_never_added_is_absent
    a_batch_is_answered_in_its_order
    a_nar_can_be_read_from_any_offset
    what_is_removed_is_absent_and_has_no_nar
    a_watcher_sees_what_is_there_then_what_comes_and_goes
    every_watcher_sees_everything
}

// What only the real store has: NARs.

#[tokio::test]
async fn nars_and_listings_are_those_of_nix() {
    let given = RealStore::new().await;
    let path = given.add("odd", &odd_tree());
    let nar = given
        .store
        .nar(&given.info(&path).await)
        .await
        .unwrap()
        .unwrap();
    let dump = nix(
        given.root.path(),
        "nix-store",
        &["--dump".as_ref(), given.file(&path).as_ref()],
    );
    assert!(read(&nar, 0, nar.size()).await.unwrap() == dump);
    for from in [1, 96, 4096, 262_143, 262_144, 262_145, dump.len() - 1] {
        assert!(read(&nar, from as u64, nar.size()).await.unwrap() == dump[from..]);
    }

    let path = given.add(
        "listed",
        &directory([
            (b"b", file(b"four")),
            (
                b"a",
                directory([(
                    b"link",
                    Tree::Symlink {
                        target: b"../b".to_vec(),
                    },
                )]),
            ),
        ]),
    );
    let nar = given
        .store
        .nar(&given.info(&path).await)
        .await
        .unwrap()
        .unwrap();
    let ours = nar.layout().unwrap().listing().unwrap();
    let to = TempDir::new().unwrap();
    let url = format!("file://{}?write-nar-listing=true", to.path().display());
    given.nix("nix", &["copy", "--to", &url, &given.full(&path)]);
    let theirs = fs::read(to.path().join(format!("{}.ls", path.hash()))).unwrap();
    let value = |json: &[u8]| serde_json::from_slice::<serde_json::Value>(json).unwrap();
    assert_eq!(value(ours.as_bytes()), value(&theirs));
}

#[tokio::test]
async fn a_file_that_changes_under_a_stream_ends_it_without_padding() {
    let given = RealStore::new().await;
    let tree = || {
        directory([
            (b"a", file(&noise(1_000_000))),
            (b"b", file(b"1234")),
            (b"c", directory([(b"d", file(b"5678"))])),
        ])
    };
    let path = given.add("changing", &tree());
    let info = given.info(&path).await;
    let expected = tree().nar().unwrap();
    let open = async || given.store.nar(&info).await.unwrap().unwrap();
    let root = given.file(&path);
    make_writable(&root);

    let check = async |nar: Nar, change: &dyn Fn()| -> NarError {
        let mut stream = nar.stream(0..nar.size());
        let mut bytes = stream.next().await.unwrap().unwrap().to_vec();
        change();
        let error = loop {
            match stream.next().await.expect("an error before the end") {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(error) => break error,
            }
        };
        assert!(stream.next().await.is_none());
        assert!(expected.starts_with(&bytes) && bytes.len() < expected.len());
        error
    };

    let error = check(open().await, &|| {
        fs::write(root.join("b"), "longer").unwrap()
    })
    .await;
    assert!(
        matches!(
            &error,
            NarError::Changed {
                laid_out: 4,
                found: 6,
                ..
            }
        ),
        "{error}"
    );
    let error = check(open().await, &|| fs::write(root.join("b"), "").unwrap()).await;
    assert!(
        matches!(&error, NarError::Changed { found: 0, .. }),
        "{error}"
    );
    let error = check(open().await, &|| fs::remove_file(root.join("b")).unwrap()).await;
    let vanished = format!("{path}/b vanished while its nar was being sent");
    assert_eq!(error.to_string(), vanished);
    // A link in the place of a file, or of a directory on the way, leads nowhere.
    std::os::unix::fs::symlink(root.join("c/d"), root.join("b")).unwrap();
    let error = check(open().await, &|| ()).await;
    assert!(matches!(&error, NarError::Read { .. }), "{error}");
    fs::remove_file(root.join("b")).unwrap();
    fs::write(root.join("b"), "1234").unwrap();
    let error = check(open().await, &|| {
        fs::rename(root.join("c"), root.join("moved")).unwrap();
        std::os::unix::fs::symlink("moved", root.join("c")).unwrap();
    })
    .await;
    assert!(matches!(&error, NarError::Read { .. }), "{error}");
}

fn make_writable(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            make_writable(&entry.path());
        } else if entry.file_type().unwrap().is_file() {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o644)).unwrap();
        }
    }
}

#[tokio::test]
async fn a_tree_that_is_not_the_registered_one_is_refused_before_its_first_byte() {
    let given = RealStore::new().await;
    let path = given.add("damaged", &directory([(b"a", file(b"1"))]));
    let info = given.info(&path).await;
    make_writable(&given.file(&path));
    fs::write(given.file(&path).join("b"), "2").unwrap();
    match given.store.nar(&info).await.map(drop) {
        Err(StoreError::Corrupt {
            found, registered, ..
        }) => assert!(found > registered),
        other => panic!("{other:?}"),
    }
    rustix::fs::mknodat(
        rustix::fs::CWD,
        given.file(&path).join("c"),
        rustix::fs::FileType::Fifo,
        0o644.into(),
        0,
    )
    .unwrap();
    assert_eq!(
        given
            .store
            .nar(&info)
            .await
            .map(drop)
            .unwrap_err()
            .to_string(),
        format!("{path}/c is neither a file, a directory nor a symlink: no nar can hold it")
    );
    fs::remove_dir_all(given.file(&path)).unwrap();
    assert!(given.store.nar(&info).await.unwrap().is_none());
}

// What only the real store has: its database.

#[tokio::test]
async fn a_build_is_known_with_its_deriver_references_and_signatures() {
    let given = RealStore::new().await;
    let expression = r#"derivation {
        name = "built"; system = "builtin"; builder = "builtin:buildenv";
        derivations = ""; manifest = builtins.toFile "manifest" "x";
    }"#;
    let printed = given.nix("nix-build", &["--no-out-link", "--expr", expression]);
    let built = given.parse(&printed);
    let secret = given.root.path().join("secret");
    let key = given.nix("nix", &["key", "generate-secret", "--key-name", "test-1"]);
    fs::write(&secret, key).unwrap();
    given.nix(
        "nix",
        &[
            "store",
            "sign",
            "--key-file",
            secret.to_str().unwrap(),
            &given.full(&built),
        ],
    );

    let info = given.info(&built).await;
    assert!(info.ultimate);
    assert_eq!(info.ca, None);
    let deriver = given.info(&info.deriver.unwrap()).await;
    assert_eq!(deriver.store_path.name(), "built.drv");
    assert!(deriver.ca.unwrap().to_string().starts_with("text:sha256:"));
    assert!(!deriver.ultimate);
    let names = |info: &std::collections::BTreeSet<StorePath>| {
        info.iter()
            .map(|path| path.name().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&info.references), ["manifest"]);
    assert_eq!(names(&deriver.references), ["manifest"]);
    assert_eq!(info.signatures.len(), 1);
    assert_eq!(info.signatures[0].key_name().as_str(), "test-1");
    assert!(info.registration_time.elapsed().unwrap() < Duration::from_secs(3600));

    // A copy in another store has the same, but was not built there.
    let copy = RealStore::new().await;
    let from = format!("local?root={}", given.root.path().display());
    let to = format!("local?root={}", copy.root.path().display());
    let arguments = ["copy", "--no-check-sigs", "--from", &from, "--to", &to];
    given.nix("nix", &[&arguments[..], &[&given.full(&built)]].concat());
    let copied = copy.info(&built).await;
    assert!(!copied.ultimate);
    assert_eq!(
        (copied.nar_hash, copied.signatures),
        (info.nar_hash, info.signatures)
    );
    assert_eq!(names(&copied.references), ["manifest"]);
}

#[tokio::test]
async fn a_malformed_row_is_an_error_that_names_the_path_and_hides_no_other() {
    let given = RealStore::new().await;
    let good = given.add("good", &file(b"good"));
    let bad = given.add("bad", &file(b"bad"));
    let full = given.full(&bad);
    for (set, problem) in [
        ("hash = 'sha256:zz'", "its hash is malformed"),
        ("hash = x'ff'", "column hash is unreadable"),
        ("narSize = 0", "its nar size is Some(0)"),
        ("narSize = NULL", "its nar size is None"),
        ("narSize = -1", "its nar size is Some(-1)"),
        ("deriver = 'nonsense'", "its deriver is not a store path"),
        ("ca = 'nonsense'", "its content address is malformed"),
        ("path = path || '!'", "its path is not a store path"),
    ] {
        given.sql(&format!(
            "CREATE TABLE Saved AS SELECT * FROM ValidPaths; UPDATE ValidPaths SET {set} WHERE path = '{full}'"
        ));
        match given.store.path_info(bad.hash()).await {
            Err(StoreError::Row { path, source }) => {
                assert!(path.starts_with(&full), "{path}");
                assert_eq!(source.to_string(), problem);
            }
            other => panic!("{set}: {other:?}"),
        }
        let infos = given
            .store
            .path_infos(vec![bad.hash(), good.hash()])
            .await
            .unwrap();
        assert!(infos[0].is_none() && infos[1].is_some());
        let mut events = given.store.watch();
        assert_eq!(complete(&mut events).await, [good.hash()]);
        given.sql(
            "UPDATE ValidPaths SET (path, hash, narSize, deriver, ca) = \
             (SELECT path, hash, narSize, deriver, ca FROM Saved WHERE Saved.id = ValidPaths.id); DROP TABLE Saved",
        );
    }
    given.sql(&format!(
        "UPDATE ValidPaths SET sigs = 'x: k:AAAA nonsense' WHERE path = '{full}'"
    ));
    assert!(given.info(&bad).await.signatures.is_empty());
}

#[tokio::test]
async fn databases_that_cannot_be_read_are_named() {
    let root = TempDir::new().unwrap();
    let open = async || {
        NixStore::open(config(root.path()))
            .await
            .map(drop)
            .unwrap_err()
    };
    let db = root.path().join("nix/var/nix/db");
    let file = db.join("db.sqlite");
    let expected = format!(
        "there is no Nix database at {}: is Nix installed, and is [store] database right?",
        file.display()
    );
    assert_eq!(open().await.to_string(), expected);

    fs::create_dir_all(&db).unwrap();
    fs::write(
        &file,
        "this is no database, and long enough to be told from one".repeat(100),
    )
    .unwrap();
    let expected = format!("cannot read {}", db.join("schema").display());
    assert_eq!(open().await.to_string(), expected);

    fs::write(db.join("schema"), "7\n").unwrap();
    let expected = format!(
        "the Nix database at {} has schema \"7\", refusing to read it: only schema 10 is known",
        db.join("schema").display()
    );
    assert_eq!(open().await.to_string(), expected);

    fs::write(db.join("schema"), "10").unwrap();
    let expected = format!("cannot read the Nix database {}", file.display());
    assert_eq!(open().await.to_string(), expected);
    // Empty is a database to SQLite, but not one of Nix.
    fs::write(&file, "").unwrap();
    assert_eq!(open().await.to_string(), expected);
}

#[tokio::test]
async fn rows_in_the_wal_are_seen_while_nix_writes() {
    let given = RealStore::new().await;
    let path = given.add("first", &file(b"x"));
    // A writer that stays, as a daemon does, and never checkpoints.
    let writer = rusqlite::Connection::open(config(given.root.path()).database).unwrap();
    writer
        .execute_batch("PRAGMA journal_mode = wal; PRAGMA wal_autocheckpoint = 0; BEGIN IMMEDIATE")
        .unwrap();
    writer
        .execute(
            "INSERT INTO ValidPaths (path, hash, registrationTime, narSize) \
             SELECT '/nix/store/00000000000000000000000000000000-wal', hash, 1, 120 FROM ValidPaths",
            [],
        )
        .unwrap();
    assert_eq!(given.store.path_info(absent()).await.unwrap(), None);
    assert_eq!(given.info(&path).await.store_path, path);
    writer.execute_batch("COMMIT").unwrap();
    assert!(given.store.path_info(absent()).await.unwrap().is_some());
}

// What only the real store has: events.

#[tokio::test]
async fn a_collection_withdraws_every_path_and_announces_none() {
    let given = RealStore::new().await;
    let mut events = given.store.watch();
    complete(&mut events).await;
    let mut paths = Vec::new();
    for number in 0..5 {
        paths.push(given.add(&format!("garbage-{number}"), &file(b"x")).hash());
    }
    let mut added = Vec::new();
    while added.len() < paths.len() {
        match event(&mut events).await {
            StoreEvent::Added(infos) => {
                added.extend(infos.iter().map(|info| info.store_path.hash()))
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(added, paths);

    given.nix("nix-store", &["--gc"]);
    let mut removed = Vec::new();
    while removed.len() < paths.len() {
        match event(&mut events).await {
            StoreEvent::Removed(hashes) => removed.extend(hashes),
            other => panic!("{other:?}"),
        }
    }
    removed.sort();
    paths.sort();
    assert_eq!(removed, paths);
}

#[tokio::test]
async fn a_path_that_fails_to_be_registered_is_never_announced() {
    let given = RealStore::new().await;
    let mut events = given.store.watch();
    complete(&mut events).await;
    // As an interrupted substitution leaves it: files and a lock, the lock later tidied away.
    let store = given.root.path().join("nix/store");
    let stale = "00000000000000000000000000000000-stale";
    fs::write(store.join(stale), "half").unwrap();
    fs::write(store.join(format!("{stale}.lock")), "").unwrap();
    fs::remove_file(store.join(format!("{stale}.lock"))).unwrap();
    let path = given.add("registered", &file(b"x"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => {
            assert_eq!(infos.len(), 1);
            assert_eq!(infos[0].store_path, path);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_database_put_in_the_place_of_another_is_compared_with_it() {
    let given = RealStore::new().await;
    let kept = given.add("kept", &file(b"kept"));
    let lost = given.add("lost", &file(b"lost"));
    let signed = given.add("signed", &file(b"signed"));
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await.len(), 3);

    // Ids of the new database start again: its rows say nothing by their numbers.
    let db = config(given.root.path()).database;
    let new = db.with_file_name("new.sqlite");
    let connection = rusqlite::Connection::open(&db).unwrap();
    connection
        .execute_batch(&format!(
            "PRAGMA wal_checkpoint(TRUNCATE); VACUUM INTO '{}'",
            new.display()
        ))
        .unwrap();
    drop(connection);
    let connection = rusqlite::Connection::open(&new).unwrap();
    connection
        .execute_batch(&format!(
            "DELETE FROM ValidPaths WHERE path = '{}';
             UPDATE ValidPaths SET id = 7 WHERE path = '{}';
             UPDATE ValidPaths SET sigs = 'k-1:' || '{}' WHERE path = '{}';",
            given.full(&lost),
            given.full(&kept),
            "A".repeat(86) + "==",
            given.full(&signed),
        ))
        .unwrap();
    drop(connection);
    for side in ["db.sqlite-wal", "db.sqlite-shm"] {
        let _ = fs::remove_file(db.with_file_name(side));
    }
    fs::rename(&new, &db).unwrap();

    assert_eq!(
        event(&mut events).await,
        StoreEvent::Removed(vec![lost.hash()])
    );
    match event(&mut events).await {
        StoreEvent::Added(infos) => {
            assert_eq!(infos.len(), 1);
            assert_eq!(infos[0].store_path, signed);
            assert_eq!(infos[0].signatures.len(), 1);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(given.info(&kept).await.id, 7);
    let path = given.add("later", &file(b"later"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, path),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn without_inotify_the_database_is_looked_at_every_second() {
    let given = RealStore::new().await;
    // What cannot be watched is as good as no inotify.
    let config = StoreConfig {
        real_dir: given.root.path().join("missing"),
        ..config(given.root.path())
    };
    let store = NixStore::open(config).await.unwrap();
    let mut events = store.watch();
    complete(&mut events).await;
    let path = given.add("polled", &file(b"x"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, path),
        other => panic!("{other:?}"),
    }
    given.remove(&path);
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
}

#[tokio::test]
async fn a_watcher_outlives_a_database_that_is_missing_for_a_while() {
    let given = RealStore::new().await;
    let kept = given.add("kept", &file(b"x"));
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await, [kept.hash()]);

    let db = given.root.path().join("nix/var/nix/db");
    let away = db.with_file_name("away");
    fs::rename(&db, &away).unwrap();
    match given.store.path_info(kept.hash()).await {
        Err(StoreError::NoDatabase { .. }) => {}
        other => panic!("{other:?}"),
    }
    fs::rename(&away, &db).unwrap();
    // Nothing was removed meanwhile; the next event is the next path.
    let path = given.add("later", &file(b"y"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, path),
        other => panic!("{other:?}"),
    }
}
