//! Streaming a NAR out of the store, beside plainly reading the same files in the same order.

use std::{fs::File, io::Read, path::Path};

use divan::{Bencher, counter::BytesCount};
use futures::StreamExt;
use granary::store::{LocalStore, Nar, NixStore, PathInfo, StoreConfig};
use granary_protocol::store_path::{StoreDir, StorePath};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

fn main() {
    divan::main();
}

/// A chroot store made by the real nix with one path in it.
struct Given {
    root: TempDir,
    runtime: Runtime,
    store: NixStore,
    info: PathInfo,
}

fn given(write: impl FnOnce(&Path)) -> Given {
    let root = TempDir::new().unwrap();
    let source = root.path().join("source");
    write(&source);
    let output = std::process::Command::new("nix-store")
        .arg("--store")
        .arg(root.path())
        .arg("--add")
        .arg(&source)
        .env("HOME", root.path())
        .output()
        .expect("nix-store");
    assert!(output.status.success());
    let dir = StoreDir::default();
    let path: StorePath = dir
        .parse_path(str::from_utf8(&output.stdout).unwrap().trim())
        .unwrap();
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    let config = StoreConfig::chroot(dir, root.path());
    let store = runtime.block_on(NixStore::open(config)).unwrap();
    let info = runtime.block_on(store.path_info(path.hash()));
    let info = info.unwrap().unwrap();
    Given {
        root,
        runtime,
        store,
        info,
    }
}

fn one_large_file() -> Given {
    given(|source| std::fs::write(source, vec![b'x'; 256 << 20]).unwrap())
}

fn many_small_files() -> Given {
    given(|source| {
        for directory in 0..200 {
            let directory = source.join(format!("directory-{directory}"));
            std::fs::create_dir_all(&directory).unwrap();
            for file in 0..100 {
                std::fs::write(directory.join(format!("{file}")), vec![b'x'; 4000]).unwrap();
            }
        }
    })
}

impl Given {
    fn nar(&self) -> Nar {
        let nar = self.runtime.block_on(self.store.nar(&self.info));
        nar.unwrap().unwrap()
    }

    fn stream(&self, from: u64) -> u64 {
        let nar = self.nar();
        self.runtime.block_on(async {
            // As a connection does: another task than the one that waits.
            let task = tokio::spawn(async move {
                let mut bytes = 0;
                let mut stream = nar.stream(from..nar.size());
                while let Some(chunk) = stream.next().await {
                    bytes += divan::black_box(chunk.unwrap()).len() as u64;
                }
                bytes
            });
            task.await.unwrap()
        })
    }

    fn read_plainly(&self) -> u64 {
        let store = self.root.path().join("nix/store");
        let mut buffer = vec![0; 256 * 1024];
        read_below(&store.join(self.info.store_path.base_name()), &mut buffer)
    }
}

fn read_below(path: &Path, buffer: &mut [u8]) -> u64 {
    if path.is_dir() {
        let names = path.read_dir().unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().path()).collect();
        names.sort();
        return names.iter().map(|name| read_below(name, buffer)).sum();
    }
    let mut file = File::open(path).unwrap();
    let mut bytes = 0;
    loop {
        match file.read(buffer).unwrap() {
            0 => return bytes,
            read => bytes += divan::black_box(&buffer[..read]).len() as u64,
        }
    }
}

fn run(bencher: Bencher<'_, '_>, given: Given, read: impl Fn(&Given) -> u64) {
    bencher
        .counter(BytesCount::new(given.info.nar_size))
        .bench_local(|| read(&given));
}

#[divan::bench(sample_count = 15, sample_size = 1)]
fn large_file_streamed(bencher: Bencher<'_, '_>) {
    run(bencher, one_large_file(), |given| given.stream(0));
}

#[divan::bench(sample_count = 15, sample_size = 1)]
fn large_file_read_plainly(bencher: Bencher<'_, '_>) {
    run(bencher, one_large_file(), Given::read_plainly);
}

/// What `cp` does without the kernel's short cuts: read, then write.
#[divan::bench(sample_count = 15, sample_size = 1)]
fn large_file_copied(bencher: Bencher<'_, '_>) {
    run(bencher, one_large_file(), |given| {
        let store = given.root.path().join("nix/store");
        let mut from = File::open(store.join(given.info.store_path.base_name())).unwrap();
        let mut to = File::create(given.root.path().join("copy")).unwrap();
        // A `Take` hides the file from the copy in the kernel.
        std::io::copy(&mut from.by_ref().take(u64::MAX), &mut to).unwrap()
    });
}

#[divan::bench(sample_count = 15, sample_size = 1)]
fn small_files_streamed(bencher: Bencher<'_, '_>) {
    run(bencher, many_small_files(), |given| given.stream(0));
}

#[divan::bench(sample_count = 15, sample_size = 1)]
fn small_files_read_plainly(bencher: Bencher<'_, '_>) {
    run(bencher, many_small_files(), Given::read_plainly);
}

/// The row, the descriptor, the layout from memory, one chunk.
#[divan::bench(sample_count = 50, sample_size = 1)]
fn last_byte_of_many_small_files(bencher: Bencher<'_, '_>) {
    let given = many_small_files();
    bencher.bench_local(|| given.stream(given.info.nar_size - 1));
}
