//! Stores made of others, two as one and one that may come later, and what is theirs alone.

use granary::store::{Awaited, Beside};

use super::*;

/// Two stores as one, of which the second changes.
pub struct BesideEmpty {
    changing: Arc<MemoryStore>,
    both: Beside,
}

impl BesideEmpty {
    pub fn new() -> BesideEmpty {
        let empty = Arc::new(MemoryStore::new(StoreDir::default()));
        let changing = Arc::new(MemoryStore::new(StoreDir::default()));
        BesideEmpty {
            both: Beside::new(empty, changing.clone()),
            changing,
        }
    }
}

impl Given for BesideEmpty {
    fn store(&self) -> &dyn LocalStore {
        &self.both
    }

    fn add(&self, name: &str, tree: &Tree) -> StorePath {
        Given::add(self.changing.as_ref(), name, tree)
    }

    fn remove(&self, path: &StorePath) {
        Given::remove(self.changing.as_ref(), path);
    }
}

/// A store that came after it was waited for.
pub struct Arrived {
    changing: Arc<MemoryStore>,
    awaited: Awaited,
}

impl Arrived {
    pub fn new() -> Arrived {
        let changing = Arc::new(MemoryStore::new(StoreDir::default()));
        let (awaited, arrival) = Awaited::new(StoreDir::default());
        arrival.send_replace(Some(changing.clone()));
        Arrived { changing, awaited }
    }
}

impl Given for Arrived {
    fn store(&self) -> &dyn LocalStore {
        &self.awaited
    }

    fn add(&self, name: &str, tree: &Tree) -> StorePath {
        Given::add(self.changing.as_ref(), name, tree)
    }

    fn remove(&self, path: &StorePath) {
        Given::remove(self.changing.as_ref(), path);
    }
}

#[tokio::test]
async fn a_path_of_two_stores_goes_with_the_last_of_them() {
    let stores = [(); 2].map(|()| Arc::new(MemoryStore::new(StoreDir::default())));
    let both = Beside::new(stores[0].clone(), stores[1].clone());
    let path = Given::add(stores[0].as_ref(), "both", &file(b"x"));
    Given::add(stores[1].as_ref(), "both", &file(b"x"));
    let info = both.path_info(path.hash()).await.unwrap().unwrap();
    let mut events = both.watch();
    let mut all = complete(&mut events).await;
    all.dedup();
    assert_eq!(all, [path.hash()]);

    stores[0].remove(path.hash());
    let nar = both.nar(&info).await.unwrap().unwrap();
    assert_eq!(nar.size(), info.nar_size);
    // Had its going been told, that would come before this.
    let other = Given::add(stores[0].as_ref(), "other", &file(b"y"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, other),
        event => panic!("{event:?}"),
    }
    stores[1].remove(path.hash());
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);
    assert!(both.nar(&info).await.unwrap().is_none());
}

#[tokio::test]
async fn a_store_is_empty_until_it_comes_and_then_told_as_changes() {
    let coming = Arc::new(MemoryStore::new(StoreDir::default()));
    let path = Given::add(coming.as_ref(), "early", &file(b"x"));
    let info = coming.path_info(path.hash()).await.unwrap().unwrap();
    let (awaited, arrival) = Awaited::new(StoreDir::default());
    let mut events = awaited.watch();
    assert!(complete(&mut events).await.is_empty());
    assert_eq!(awaited.path_info(path.hash()).await.unwrap(), None);
    let infos = awaited.path_infos(vec![path.hash(), absent()]).await;
    assert_eq!(infos.unwrap(), [None, None]);
    assert!(awaited.nar(&info).await.unwrap().is_none());

    arrival.send_replace(Some(coming.clone()));
    // Its being complete is no news to who was told that before.
    let added = StoreEvent::Added(vec![info.clone()]);
    assert_eq!(event(&mut events).await, added);
    assert!(awaited.nar(&info).await.unwrap().is_some());
    coming.remove(path.hash());
    let removed = StoreEvent::Removed(vec![path.hash()]);
    assert_eq!(event(&mut events).await, removed);

    // Whoever comes later is told of what is there as of any store.
    let path = Given::add(coming.as_ref(), "late", &file(b"y"));
    assert_eq!(complete(&mut awaited.watch()).await, [path.hash()]);
}

#[tokio::test]
async fn a_store_that_never_comes_goes_on_being_watched() {
    let (awaited, arrival) = Awaited::new(StoreDir::default());
    drop(arrival);
    let beside = Arc::new(MemoryStore::new(StoreDir::default()));
    let both = Beside::new(Arc::new(awaited), beside.clone());
    let mut events = both.watch();
    assert!(complete(&mut events).await.is_empty());
    let path = Given::add(beside.as_ref(), "beside", &file(b"x"));
    match event(&mut events).await {
        StoreEvent::Added(infos) => assert_eq!(infos[0].store_path, path),
        event => panic!("{event:?}"),
    }
}
