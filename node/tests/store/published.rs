//! The public caches of an anchor under the suite of every store, and what is theirs alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use granary::anchor::admin::Changes;
use granary::anchor::catalog::CacheRow;
use granary::anchor::intake::Intake;
use granary::anchor::published::Published;
use granary::anchor::{Anchor, Clock, Options};
use granary::store::hidden::Hidden;
use granary::store::shared::SharingRules;
use granary_protocol::hash::{compress_hash, sha256};
use granary_protocol::narinfo::{Compression, NarInfo};
use granary_protocol::signature::TrustedKeys;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::*;

/// An anchor in memory with a public cache.
pub struct Publishing {
    anchor: Arc<Anchor>,
    cache: CacheRow,
    store: Published,
    hide: watch::Sender<Arc<Hidden>>,
    /// Where the anchor works; `None` once it ended.
    runtime: Option<Runtime>,
    folder: TempDir,
}

impl Publishing {
    pub fn new() -> Publishing {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let folder = TempDir::new().unwrap();
        let options = Options {
            state: folder.path().to_owned(),
            storage: "memory:".to_owned(),
            s3: Default::default(),
            trust: TrustedKeys::default(),
            attic_key: None,
            oidc: Vec::new(),
            members: None,
            nar_bytes_max: 1 << 30,
            tls: None,
            scrub_after: None,
            heal_from: Vec::new(),
            clock: Clock::default(),
        };
        let anchor = run(&runtime, Anchor::open(options)).unwrap();
        let cache = make_cache(&runtime, &anchor, "main", true);
        let (hide, hidden) = watch::channel(Arc::default());
        let rules = SharingRules {
            enabled: true,
            deny: vec![regex::Regex::new("^denied").unwrap()],
            trust: TrustedKeys::default(),
            hidden,
        };
        Publishing {
            store: Published::new(anchor.clone(), StoreDir::default(), Arc::new(rules)),
            anchor,
            cache,
            hide,
            runtime: Some(runtime),
            folder,
        }
    }

    fn run<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        run(self.runtime.as_ref().unwrap(), work)
    }

    /// Another cache of the anchor.
    fn make_cache(&self, name: &str, public: bool) -> CacheRow {
        make_cache(self.runtime.as_ref().unwrap(), &self.anchor, name, public)
    }

    fn configure(&self, cache: &CacheRow, public: bool) {
        let changes = Changes {
            public: Some(public),
            ..Changes::default()
        };
        let changed = self.anchor.configure_cache(&cache.name, &changes);
        self.run(changed).unwrap();
    }

    /// Publishes a tree in a cache, as a push would.
    fn publish(&self, cache: &CacheRow, name: &str, tree: &Tree) -> StorePath {
        let nar = tree.nar().unwrap();
        let made_of = [name.as_bytes(), b"\0", &nar].concat();
        let hash = StorePathHash::from_bytes(compress_hash(&sha256(&made_of)));
        let store_path = StorePath::new(hash, name).unwrap();
        let spool = self.folder.path().join("spool");
        let mut intake = Intake::new(Some(&spool), 1 << 30).unwrap();
        intake.write(&nar).unwrap();
        let taken = intake.finish().unwrap();
        let narinfo = NarInfo {
            store_path: store_path.clone(),
            url: String::new(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            nar_hash: taken.nar_hash,
            nar_size: taken.nar_size,
            references: BTreeSet::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            dropped_signatures: 0,
        };
        let published = self.anchor.publish(cache, narinfo, Arc::new(taken), None);
        self.run(published).unwrap();
        store_path
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Its tasks hold nothing that outlives the test.
            runtime.shutdown_background();
        }
    }
}

impl Given for Publishing {
    fn store(&self) -> &dyn LocalStore {
        &self.store
    }

    fn add(&self, name: &str, tree: &Tree) -> StorePath {
        self.publish(&self.cache, name, tree)
    }

    fn remove(&self, path: &StorePath) {
        let removed = self.anchor.remove_path(&self.cache, path.hash());
        assert!(self.run(removed).unwrap());
    }
}

/// Runs work on the anchor's own threads, while the test's thread waits.
fn run<T: Send>(runtime: &Runtime, work: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let done = scope.spawn(|| runtime.block_on(work));
        done.join().unwrap()
    })
}

fn make_cache(runtime: &Runtime, anchor: &Arc<Anchor>, name: &str, public: bool) -> CacheRow {
    let changes = Changes {
        public: Some(public),
        ..Changes::default()
    };
    let name = name.parse().unwrap();
    run(runtime, anchor.create_cache(&name, &changes, None)).unwrap()
}

fn added(event: StoreEvent) -> StorePathHash {
    match event {
        StoreEvent::Added(infos) if infos.len() == 1 => infos[0].store_path.hash(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_private_cache_publishes_nothing_until_it_is_public() {
    let given = Publishing::new();
    let private = given.make_cache("private", false);
    let before = given.publish(&private, "before", &file(b"x"));
    let mut events = given.store.watch();
    assert!(complete(&mut events).await.is_empty());
    let after = given.publish(&private, "after", &file(b"y"));
    // What would be told of it would come before this.
    let public = given.add("public", &file(b"z"));
    assert_eq!(added(event(&mut events).await), public.hash());
    for path in [&before, &after] {
        assert_eq!(given.store.path_info(path.hash()).await.unwrap(), None);
    }

    given.configure(&private, true);
    let mut told = BTreeSet::new();
    while told.len() < 2 {
        match event(&mut events).await {
            StoreEvent::Added(infos) => {
                told.extend(infos.iter().map(|info| info.store_path.hash()))
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told, BTreeSet::from([before.hash(), after.hash()]));
    let info = given.store.path_info(after.hash()).await.unwrap().unwrap();
    assert!(given.store.nar(&info).await.unwrap().is_some());

    given.configure(&private, false);
    // At once, whenever members hear of it.
    assert_eq!(given.store.path_info(after.hash()).await.unwrap(), None);
    assert!(given.store.nar(&info).await.unwrap().is_none());
    match event(&mut events).await {
        StoreEvent::Removed(gone) => assert_eq!(BTreeSet::from_iter(gone), told),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_path_of_two_public_caches_is_told_once_with_both_signatures_and_stays_while_one_has_it()
{
    let given = Publishing::new();
    let other = given.make_cache("other", true);
    let path = given.add("both", &file(b"x"));
    assert_eq!(given.publish(&other, "both", &file(b"x")), path);
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await, [path.hash()]);
    let info = given.store.path_info(path.hash()).await.unwrap().unwrap();
    let names = info.signatures.iter();
    let names: BTreeSet<_> = names.map(|one| one.key_name().as_str()).collect();
    assert_eq!(names, BTreeSet::from(["main-1", "other-1"]));

    given.remove(&path);
    let info = given.store.path_info(path.hash()).await.unwrap().unwrap();
    assert_eq!(info.signatures.len(), 1);
    let removed = given.anchor.remove_path(&other, path.hash());
    assert!(given.run(removed).unwrap());
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
}

#[tokio::test]
async fn what_a_person_hides_or_denies_is_not_published() {
    let given = Publishing::new();
    given.add("denied", &file(b"x"));
    given.add("made.drv", &file(b"y"));
    let path = given.add("shown", &file(b"z"));
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await, [path.hash()]);
    let info = given.store.path_info(path.hash()).await.unwrap().unwrap();
    let mut hidden = Hidden::default();
    hidden.insert(path.hash(), "shown").unwrap();
    given.hide.send_replace(Arc::new(hidden));
    assert_eq!(given.store.path_info(path.hash()).await.unwrap(), None);
    assert!(given.store.nar(&info).await.unwrap().is_none());
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
    given.hide.send_replace(Arc::default());
    assert_eq!(added(event(&mut events).await), path.hash());
}

#[tokio::test]
async fn a_cache_that_is_deleted_is_withdrawn() {
    let given = Publishing::new();
    let path = given.add("gone", &file(b"x"));
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await, [path.hash()]);
    given
        .run(given.anchor.delete_cache(&given.cache.name))
        .unwrap();
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
}

#[tokio::test]
async fn what_other_processes_do_is_told_as_well() {
    let given = Publishing::new();
    let path = given.add("known", &file(b"x"));
    let mut events = given.store.watch();
    assert_eq!(complete(&mut events).await, [path.hash()]);
    let catalog = given.folder.path().join("catalog.sqlite");
    let other = rusqlite::Connection::open(catalog).unwrap();
    let private = "UPDATE caches SET settings = json_set(settings, '$.public', json('false'))";
    assert_eq!(other.execute(private, []).unwrap(), 1);
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
}

#[tokio::test]
async fn nars_that_are_read_have_a_bound_and_give_their_place_back() {
    let given = Publishing::new();
    let path = given.add("wanted", &file(b"x"));
    let info = given.store.path_info(path.hash()).await.unwrap().unwrap();
    let mut reading = Vec::new();
    let busy = loop {
        match given.store.nar(&info).await {
            Ok(nar) => reading.push(nar.unwrap()),
            Err(error) => break error,
        }
    };
    assert!(matches!(busy, StoreError::Busy), "{busy}");
    assert_eq!(reading.len(), 32);
    // A stream holds the place, not only what it came from.
    let last = reading.pop().unwrap();
    let mut stream = last.stream(0..last.size());
    drop(last);
    assert!(given.store.nar(&info).await.is_err());
    while stream.next().await.is_some() {}
    drop(stream);
    assert!(given.store.nar(&info).await.is_ok());
}
