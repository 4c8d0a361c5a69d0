//! Content: every path that exists in a run, and the truth about each.
//!
//! A path is a number; its hashes, size and narinfo follow from that number and the run's seed.
//! Narinfos are signed by the one builder everybody trusts, when they are first asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use granary_protocol::availability::HashPrefix;
use granary_protocol::hash::NarHash;
use granary_protocol::narinfo::NarInfo;
use granary_protocol::signature::{PublicKey, SecretKey};
use granary_protocol::store_path::{StoreDir, StorePathHash};
use sha2::{Digest, Sha256};

use crate::chance::Chance;

/// Number of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathId(pub u32);

struct Path {
    hash: StorePathHash,
    nar_size: u64,
    narinfo: Option<Arc<str>>,
}

pub struct Content {
    seed: u64,
    builder: SecretKey,
    dir: StoreDir,
    paths: Vec<Path>,
    by_hash: BTreeMap<StorePathHash, PathId>,
}

impl Content {
    pub fn new(seed: u64) -> Content {
        let name = "builder-1".parse().expect("a key name");
        Content {
            seed,
            builder: SecretKey::from_seed(name, digest(seed, "builder", 0)),
            dir: StoreDir::default(),
            paths: Vec::new(),
            by_hash: BTreeMap::new(),
        }
    }

    /// The key that signs every narinfo.
    pub fn builder(&self) -> PublicKey {
        self.builder.public_key()
    }

    pub fn dir(&self) -> &StoreDir {
        &self.dir
    }

    /// Makes a path that nobody holds yet. Sizes double from class to class, 1 KiB to 16 MiB, as
    /// those of nixpkgs roughly do: many small ones, the bytes in few.
    pub fn add(&mut self, chance: &mut Chance) -> PathId {
        let id = self.next();
        let digest = digest(self.seed, "path", u64::from(id.0));
        let mut hash = [0u8; 20];
        hash.copy_from_slice(&digest[..20]);
        let class = 1024u64 << chance.below(14);
        let path = Path {
            hash: StorePathHash::from_bytes(hash),
            nar_size: (class + chance.number() % class) & !7,
            narinfo: None,
        };
        self.by_hash.insert(path.hash, id);
        self.paths.push(path);
        id
    }

    /// The path that will be made next.
    pub fn next(&self) -> PathId {
        PathId(u32::try_from(self.paths.len()).expect("fewer than 4 G paths"))
    }

    pub fn hash(&self, id: PathId) -> StorePathHash {
        self.paths[id.0 as usize].hash
    }

    pub fn prefix(&self, id: PathId) -> HashPrefix {
        HashPrefix::from(&self.hash(id))
    }

    pub fn nar_size(&self, id: PathId) -> u64 {
        self.paths[id.0 as usize].nar_size
    }

    pub fn nar_hash(&self, id: PathId) -> NarHash {
        NarHash::from_bytes(digest(self.seed, "nar", u64::from(id.0)))
    }

    /// Returns the path of this hash; a hash that a liar made up has none.
    pub fn find(&self, hash: &StorePathHash) -> Option<PathId> {
        self.by_hash.get(hash).copied()
    }

    /// Returns the text that an honest holder answers with.
    pub fn narinfo(&mut self, id: PathId) -> Arc<str> {
        if let Some(text) = &self.paths[id.0 as usize].narinfo {
            return text.clone();
        }
        let text: Arc<str> = self.narinfo_signed(id, &self.builder).into();
        self.paths[id.0 as usize].narinfo = Some(text.clone());
        text
    }

    /// Returns the narinfo of a path with the signature of some key.
    pub fn narinfo_signed(&self, id: PathId, key: &SecretKey) -> String {
        let text = format!(
            "StorePath: {}/{}-package-{}\nURL: nar/x.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: \n",
            self.dir.as_str(),
            self.hash(id),
            id.0,
            self.nar_hash(id),
            self.nar_size(id),
        );
        let mut narinfo = NarInfo::parse(&text, &self.dir).expect("an ordinary narinfo");
        narinfo.sign(key, &self.dir);
        narinfo.to_text(&self.dir)
    }
}

/// Returns 32 bytes that follow from the seed, a word and a number.
pub fn digest(seed: u64, word: &str, number: u64) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(seed.to_be_bytes());
    digest.update(word.as_bytes());
    digest.update(number.to_be_bytes());
    digest.finalize().into()
}
