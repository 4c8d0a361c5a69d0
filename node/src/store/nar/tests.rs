use super::*;
use granary_protocol::nar::Tree;

fn key(number: u8) -> Key {
    let hash = StorePathHash::from_bytes([number; 20]);
    (hash, granary_protocol::hash::NarHasher::new().finish())
}

#[test]
fn layouts_used_least_recently_make_room() {
    let link = Tree::Symlink {
        target: vec![b't'; 4000],
    };
    let tree = (0..1000).map(|number| (format!("{number:04}").into_bytes(), link.clone()));
    let layout = Arc::new(Tree::Directory(tree.collect()).layout().unwrap());
    let fit = LAYOUT_CACHE_BYTES_MAX / layout.memory_bytes();
    assert!(fit < 100);
    let mut recent = Recent::default();
    for number in 0..fit as u8 {
        recent.insert(key(number), layout.clone());
    }
    assert!(recent.get(&key(0)).is_some());
    recent.insert(key(200), layout.clone());
    assert!(recent.get(&key(0)).is_some(), "it was used");
    assert!(recent.get(&key(1)).is_none(), "the oldest went");
    assert!(recent.get(&key(2)).is_some());
    assert_eq!(recent.bytes, recent.layouts.len() * layout.memory_bytes());
    assert_eq!(recent.order.len(), recent.layouts.len());
}

/// A tree of which every other call that must not wait finds nothing in memory.
struct Sluggish {
    tree: Tree,
    impatient: std::sync::atomic::AtomicU32,
    patient: std::sync::atomic::AtomicU32,
}

struct SluggishReader(Arc<Sluggish>);

impl Contents for Sluggish {
    fn reader(self: Arc<Self>) -> Box<dyn ReadContents> {
        Box::new(SluggishReader(self))
    }
}

impl ReadContents for SluggishReader {
    fn read(
        &mut self,
        layout: &Layout,
        file: FileIndex,
        offset: u64,
        length: usize,
        chunk: &mut Vec<u8>,
        patience: Patience,
    ) -> Result<Progress, NarError> {
        match patience {
            Patience::None if self.0.impatient.fetch_add(1, Ordering::Relaxed) % 2 == 1 => {
                return Ok(Progress::WouldWait);
            }
            Patience::None => {}
            Patience::Any => drop(self.0.patient.fetch_add(1, Ordering::Relaxed)),
        }
        let contents = self.0.tree.contents(layout, file);
        let offset = offset as usize;
        chunk.extend_from_slice(&contents[offset..offset + length]);
        Ok(Progress::Read)
    }
}

#[tokio::test]
async fn what_is_not_in_memory_is_waited_for_elsewhere_and_nothing_is_read_twice() {
    use futures::StreamExt;

    let file = |number: usize| Tree::Regular {
        executable: false,
        contents: (0..100_000).map(|at| (at * number % 251) as u8).collect(),
    };
    let files = (1..120).map(|number| (format!("{number:03}").into_bytes(), file(number)));
    let tree = Tree::Directory(files.collect());
    let (layout, nar) = (Arc::new(tree.layout().unwrap()), tree.nar().unwrap());
    let sluggish = Arc::new(Sluggish {
        tree,
        impatient: 0.into(),
        patient: 0.into(),
    });
    let stream = Nar::new(layout, sluggish.clone()).stream(7..u64::MAX);
    let chunks: Vec<Bytes> = stream.map(|chunk| chunk.unwrap()).collect().await;
    assert!(chunks.concat() == nar[7..]);
    let (full, last) = chunks.split_at(chunks.len() - 1);
    assert!(full.iter().all(|chunk| chunk.len() == CHUNK_BYTES));
    assert!(last[0].len() <= CHUNK_BYTES);
    let counts = [&sluggish.impatient, &sluggish.patient];
    let [impatient, patient] = counts.map(|count| count.load(Ordering::Relaxed));
    assert!(impatient > 4, "it is asked again whether it is in memory");
    assert!(patient > impatient, "{patient} reads waited");
}
