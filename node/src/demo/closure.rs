//! A closure made for the demo: signed paths that refer to each other, of many shapes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::Result;
use granary_protocol::cache_info::CacheInfo;
use granary_protocol::hash::{FileHash, NarHasher, sha256};
use granary_protocol::nar::Tree;
use granary_protocol::narinfo::{Compression, NarInfo, VerifiedNarInfo};
use granary_protocol::signature::{SecretKey, TrustedKeys};
use granary_protocol::store_path::{StoreDir, StorePath, StorePathHash};

/// Small paths; each refers to the one before it and to every path that divides its number.
const SMALL_PATHS: usize = 40;

/// Contents of the one large path: enough to see a rate, little enough for a small disk.
const LARGE_BYTES: usize = 128 * 1024 * 1024;

/// Signed paths, references before referrers; the last one refers to all others.
pub struct Closure {
    pub key: SecretKey,
    pub paths: Vec<MadePath>,
}

/// One path with its NAR.
pub struct MadePath {
    pub narinfo: NarInfo,
    pub nar: Vec<u8>,
}

pub fn store_dir() -> StoreDir {
    StoreDir::default()
}

impl Closure {
    /// Makes the paths and signs them with a new key.
    pub fn make() -> Result<Closure> {
        let mut closure = Closure {
            key: super::secret_key("demo-builder-1")?,
            paths: Vec::new(),
        };
        closure.add(
            "large",
            Tree::Directory(BTreeMap::from([(b"data".to_vec(), noise(LARGE_BYTES))])),
            &[],
        )?;
        for number in 1..=SMALL_PATHS {
            let name = format!("small-{number}");
            let references: Vec<usize> = (0..number)
                .filter(|other| *other + 1 == number || *other > 0 && number % other == 0)
                .collect();
            let tree = small_tree(
                &name,
                &references
                    .iter()
                    .map(|other| closure.full_path(*other))
                    .collect::<Vec<_>>(),
            );
            closure.add(&name, tree, &references)?;
        }
        let all: Vec<usize> = (0..closure.paths.len()).collect();
        let links = all.iter().map(|number| {
            let target = closure.full_path(*number).into_bytes();
            (
                format!("path-{number}").into_bytes(),
                Tree::Symlink { target },
            )
        });
        let tree = Tree::Directory(links.collect());
        closure.add("everything", tree, &all)?;
        Ok(closure)
    }

    /// What a client asks for to get everything.
    pub fn roots(&self) -> Option<String> {
        self.paths
            .last()
            .map(|path| store_dir().display(&path.narinfo.store_path))
    }

    pub fn nar_bytes(&self) -> u64 {
        self.paths.iter().map(|path| path.narinfo.nar_size).sum()
    }

    /// Parses a narinfo and makes sure that this closure's key signed it, as Nix would.
    pub fn check(&self, text: &str) -> Result<NarInfo> {
        let narinfo = NarInfo::parse(text, &store_dir())?;
        let trust: TrustedKeys = [self.key.public_key()].into_iter().collect();
        Ok(VerifiedNarInfo::verify(narinfo, &trust, &store_dir())?.into_narinfo())
    }

    /// Writes the closure in the form that `nix copy --from file://` reads.
    pub fn write_binary_cache(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder.join("nar"))?;
        let info = CacheInfo {
            store_dir: store_dir(),
            want_mass_query: true,
            priority: 10,
        };
        fs::write(folder.join("nix-cache-info"), info.to_string())?;
        for MadePath { narinfo, nar } in &self.paths {
            fs::write(folder.join(&narinfo.url), nar)?;
            let file = format!("{}.narinfo", narinfo.store_path.hash());
            fs::write(folder.join(file), narinfo.to_text(&store_dir()))?;
        }
        Ok(())
    }

    fn full_path(&self, number: usize) -> String {
        store_dir().display(&self.paths[number].narinfo.store_path)
    }

    fn add(&mut self, name: &str, tree: Tree, references: &[usize]) -> Result<()> {
        let nar = tree.nar()?;
        let mut hasher = NarHasher::new();
        hasher.update(&nar);
        let nar_hash = hasher.finish();
        // Named after its contents and the demo's key, so that two demos never share a path.
        let digest = sha256(format!("{name} {nar_hash} {}", self.key.public_key()).as_bytes());
        let mut hash = [0u8; 20];
        hash.copy_from_slice(&digest[..20]);
        let store_path = StorePath::new(
            StorePathHash::from_bytes(hash),
            &format!("granary-demo-{name}"),
        )?;
        let references: BTreeSet<StorePath> = references
            .iter()
            .map(|other| self.paths[*other].narinfo.store_path.clone())
            .collect();
        let mut narinfo = NarInfo {
            url: format!("nar/{}.nar", nar_hash.nix32()),
            compression: Compression::None,
            file_hash: Some(FileHash::from_bytes(*nar_hash.as_bytes())),
            file_size: Some(nar.len() as u64),
            nar_hash,
            nar_size: nar.len() as u64,
            references,
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            dropped_signatures: 0,
            store_path,
        };
        narinfo.sign(&self.key, &store_dir());
        self.paths.push(MadePath { narinfo, nar });
        Ok(())
    }
}

/// A little of everything that a NAR can hold.
fn small_tree(name: &str, references: &[String]) -> Tree {
    let file = |contents: String| Tree::Regular {
        executable: false,
        contents: contents.into_bytes(),
    };
    let script = format!("#!/bin/sh\necho {name}\n").into_bytes();
    let bin = BTreeMap::from([
        (
            b"run".to_vec(),
            Tree::Regular {
                executable: true,
                contents: script,
            },
        ),
        (
            b"start".to_vec(),
            Tree::Symlink {
                target: b"run".to_vec(),
            },
        ),
    ]);
    Tree::Directory(BTreeMap::from([
        (b"bin".to_vec(), Tree::Directory(bin)),
        (b"empty".to_vec(), file(String::new())),
        (b"nothing".to_vec(), Tree::Directory(BTreeMap::new())),
        (b"references".to_vec(), file(references.join("\n"))),
    ]))
}

/// A file that no compression helps with: a simple generator, since nobody judges its numbers.
fn noise(bytes: usize) -> Tree {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut contents = Vec::with_capacity(bytes);
    while contents.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        contents.extend_from_slice(&state.to_le_bytes());
    }
    contents.truncate(bytes);
    Tree::Regular {
        executable: false,
        contents,
    }
}
