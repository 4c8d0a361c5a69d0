//! `granary anchor import attic`: what an atticd kept, made by hand after its schema, and what became of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use granary_protocol::hash::{Hash, NarHash, sha256};
use granary_protocol::signature::SecretKey;
use rusqlite::{Connection, params};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::Place;
use crate::killed::{assert_consistent, rounds, token};
use crate::rig::{Machine, Sample, hash};
use crate::s3::S3;

const NOW: &str = "2026-06-24 12:00:00.000 +00:00";

fn pack(compression: &str, bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    match compression {
        "none" => packed.extend_from_slice(bytes),
        "zstd" => packed = zstd::encode_all(bytes, 8).unwrap(),
        "xz" => {
            let mut encoder = liblzma::bufread::XzEncoder::new(bytes, 2);
            encoder.read_to_end(&mut packed).unwrap();
        }
        "br" => {
            let mut encoder = brotli::CompressorReader::new(bytes, 4096, 5, 20);
            encoder.read_to_end(&mut packed).unwrap();
        }
        other => panic!("{other}"),
    }
    packed
}

/// The state of an atticd.
struct Atticd<'a> {
    folder: TempDir,
    database: Connection,
    s3: Option<&'a S3>,
    chunks: BTreeMap<([u8; 32], String), i64>,
}

impl Atticd<'_> {
    fn new(s3: Option<&S3>) -> Atticd<'_> {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("storage")).unwrap();
        let database = Connection::open(folder.path().join("server.db")).unwrap();
        let schema = include_str!("attic-schema.sql");
        database.execute_batch(schema).unwrap();
        Atticd {
            folder,
            database,
            s3,
            chunks: BTreeMap::new(),
        }
    }

    fn database(&self) -> PathBuf {
        self.folder.path().join("server.db")
    }

    fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    /// Makes a cache; returns its number.
    fn cache(&self, name: &str, key: &SecretKey, is_public: bool, upstream: &[&str]) -> i64 {
        let insert = "INSERT INTO cache (name, keypair, is_public, store_dir, priority, upstream_cache_key_names, created_at)
                      VALUES (?1, ?2, ?3, '/nix/store', 37, ?4, ?5)";
        let keypair = key.to_nix_string();
        let row = params![
            name,
            keypair.as_str(),
            is_public,
            json!(upstream).to_string(),
            NOW
        ];
        self.database.execute(insert, row).unwrap();
        self.database.last_insert_rowid()
    }

    fn file(&self, name: &str) -> PathBuf {
        match self.s3 {
            Some(s3) => s3.folder.path().join("granary-test").join(name),
            None => self.storage().join(&name[..1]).join(&name[..2]).join(name),
        }
    }

    fn chunk(&mut self, bytes: &[u8], compression: &str) -> i64 {
        let key = (sha256(bytes), compression.to_owned());
        if let Some(id) = self.chunks.get(&key) {
            return *id;
        }
        let packed = pack(compression, bytes);
        let name = format!(
            "{:08x}-1111-4000-8000-000000000000.chunk",
            self.chunks.len() + 0xab00_0000
        );
        let file = self.file(&name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, &packed).unwrap();
        let remote = match self.s3 {
            Some(_) => {
                json!({"S3": {"region": "us-east-1", "bucket": "granary-test", "key": name}})
            }
            None => json!({"Local": {"name": name}}),
        };
        let hex = |bytes: &[u8]| Hash::from(NarHash::from_bytes(sha256(bytes))).to_base16();
        let insert = "INSERT INTO chunk (state, chunk_hash, chunk_size, file_hash, file_size, compression, remote_file,
                      remote_file_id, created_at) VALUES ('V', ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let row = params![
            hex(bytes),
            bytes.len() as i64,
            hex(&packed),
            packed.len() as i64,
            compression,
            remote.to_string(),
            name,
            NOW
        ];
        self.database.execute(insert, row).unwrap();
        let id = self.database.last_insert_rowid();
        self.chunks.insert(key, id);
        id
    }

    /// Keeps a NAR in pieces of so many bytes, each packed as one of these says; returns its number.
    fn nar(&mut self, nar: &[u8], piece: usize, compressions: &[&str]) -> i64 {
        let pieces: Vec<_> = nar.chunks(piece).collect();
        let ids: Vec<_> = pieces
            .iter()
            .zip(compressions.iter().cycle())
            .map(|(piece, compression)| self.chunk(piece, compression))
            .collect();
        let insert =
            "INSERT INTO nar (state, nar_hash, nar_size, compression, num_chunks, created_at)
                      VALUES ('V', ?1, ?2, ?3, ?4, ?5)";
        let nar_hash = Hash::from(NarHash::from_bytes(sha256(nar))).to_base16();
        let row = params![
            nar_hash,
            nar.len() as i64,
            compressions[0],
            ids.len() as i64,
            NOW
        ];
        self.database.execute(insert, row).unwrap();
        let id = self.database.last_insert_rowid();
        let insert = "INSERT INTO chunkref (nar_id, seq, chunk_id) VALUES (?1, ?2, ?3)";
        // They need not stand in order.
        for (seq, chunk) in ids.iter().enumerate().rev() {
            let row = params![id, seq as i64, chunk];
            self.database.execute(insert, row).unwrap();
        }
        id
    }

    fn object(&self, cache: i64, nar: i64, path: &str, references: &[&str]) {
        let insert = "INSERT INTO object (cache_id, nar_id, store_path_hash, store_path, \"references\", sigs, created_at)
                      VALUES (?1, ?2, ?3, ?4, ?5, '[]', ?6)";
        let references: Vec<_> = references
            .iter()
            .map(|path| path.trim_start_matches("/nix/store/"))
            .collect();
        let row = params![
            cache,
            nar,
            hash(path),
            path,
            json!(references).to_string(),
            NOW
        ];
        self.database.execute(insert, row).unwrap();
    }

    fn sample(&mut self, cache: i64, sample: &Sample, references: &[&str]) {
        let nar = self.nar(&sample.nar, 3000, &["zstd"]);
        self.object(cache, nar, &sample.path, references);
    }

    fn command(&self, place: &Place) -> Command {
        let mut command = place.command();
        command.args(["anchor", "import", "attic", "--json", "--database"]);
        command.arg(self.database()).arg("--storage");
        command.arg(self.storage());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs an import into a place; returns what it says and its exit status.
    fn import(&self, place: &Place, more: &[&str]) -> (Value, Option<i32>) {
        let database = self.database();
        let mut arguments = vec!["anchor", "import", "attic", "--json", "--database"];
        arguments.push(database.to_str().unwrap());
        let storage = self.storage();
        if self.s3.is_none() {
            arguments.extend(["--storage", storage.to_str().unwrap()]);
        }
        arguments.extend(more);
        let output = place.granary(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        let report = serde_json::from_slice(&output.stdout);
        let report = report.unwrap_or_else(|_| panic!("{arguments:?}: {said}"));
        (report, output.status.code())
    }
}

fn key(name: &str, seed: u8) -> SecretKey {
    SecretKey::from_seed(name.parse().unwrap(), [seed; 32])
}

fn old_token(secret: &[u8]) -> String {
    let claims = json!({
        "sub": "alice", "exp": 4_102_324_986u64,
        "https://jwt.attic.rs/v1": {"caches": {"team": {"r": 1}}},
    });
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    let key = jsonwebtoken::EncodingKey::from_secret(secret);
    jsonwebtoken::encode(&header, &claims, &key).unwrap()
}

#[test]
fn nix_pulls_what_attic_kept_with_the_old_keys_and_tokens() {
    use std::os::unix::fs::PermissionsExt;
    let mut attic = Atticd::new(None);
    let builder = Machine::new(&[]);
    let closure = builder.build();
    let (public, team) = (key("main", 3), key("team-signs", 4));
    let main = attic.cache("main", &public, true, &["cache.nixos.org-1"]);
    let private = attic.cache("team", &team, false, &[]);
    let gone = attic.cache("gone", &key("gone", 5), true, &[]);
    let update = "UPDATE cache SET deleted_at = ?1 WHERE id = ?2";
    attic.database.execute(update, params![NOW, gone]).unwrap();
    let update = "UPDATE cache SET retention_period = 864000 WHERE id = ?1";
    attic.database.execute(update, [private]).unwrap();
    // Referrers first, each NAR another way: chunks of every kind, one of them many times; a single one.
    let ways: [(usize, &[&str]); 3] = [
        (100_003, &["zstd", "none", "xz", "br"]),
        (7, &["none"]),
        (usize::MAX, &["xz"]),
    ];
    for (path, (piece, compressions)) in closure.iter().zip(ways).rev() {
        let references = builder.nix("nix-store", &["--query", "--references", path]);
        let references: Vec<_> = references.lines().collect();
        let nar = attic.nar(&builder.nar(path), piece, compressions);
        for cache in [main, private, gone] {
            attic.object(cache, nar, path, &references);
        }
    }

    // Beside a cache of that name that the anchor made by itself.
    let secret = b"an old secret of thirty-two bytes";
    let token_key = attic.folder.path().join("token-key");
    let text = format!("hs256:{}\n", data_encoding::BASE64.encode(secret));
    std::fs::write(&token_key, text).unwrap();
    std::fs::set_permissions(&token_key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let place = Place::with(&format!(
        "attic-token-key-file = \"{}\"\n",
        token_key.display()
    ));
    let running = place.start();
    let database = attic.database();
    let refused = place.fail(&[
        "anchor",
        "import",
        "attic",
        "--database",
        database.to_str().unwrap(),
    ]);
    assert!(
        refused.contains("another granary anchor works"),
        "{refused}"
    );
    drop(running);
    let (report, status) = attic.import(&place, &[]);
    assert_eq!((status, &report["paths"]), (Some(0), &6.into()), "{report}");
    assert_eq!(report["caches"].as_array().unwrap().len(), 2, "{report}");
    let (report, status) = attic.import(&place, &[]);
    assert_eq!(status, Some(0), "{report}");
    assert_eq!(
        (&report["paths"], &report["present"]),
        (&0.into(), &6.into())
    );

    let anchor = place.start();
    let info = place.run(&["cache", "info", "team", "--json"]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["settings"]["retention"], 864_000, "{info}");
    assert_eq!(info["settings"]["priority"], 37, "{info}");
    assert_eq!(
        info["settings"]["public_keys"],
        json!([team.public_key().to_string()])
    );
    assert!(!place.run(&["cache", "list"]).contains("gone"));
    for (cache, key, token) in [
        ("main", &public, String::new()),
        ("team", &team, old_token(secret)),
    ] {
        let client = Machine::new(&[&key.public_key().to_string()]);
        client.login(&token);
        let url = format!("http://{}/{cache}", anchor.address);
        client.nix("nix", &["copy", "--from", &url, &closure[2]]);
        client.nix("nix", &["store", "verify", "--all"]);
        assert!(client.nar(&closure[0]) == builder.nar(&closure[0]));
    }
    let stranger = anchor.get(&format!("/team/{}.narinfo", hash(&closure[0])), "");
    assert_eq!(stranger.status, 401);
}

#[test]
fn what_does_not_prove_right_is_left_out_and_taken_once_it_does() {
    let mut attic = Atticd::new(None);
    let whole = attic.cache("whole", &key("whole", 1), true, &[]);
    let bad = attic.cache("bad", &key("bad", 2), true, &[]);
    let update = "UPDATE cache SET keypair = 'bad:AAAA' WHERE id = ?1";
    attic.database.execute(update, [bad]).unwrap();
    let samples: Vec<_> = (1..=8).map(|number| Sample::new(number, 10_000)).collect();
    for sample in &samples[..5] {
        attic.sample(whole, sample, &[]);
    }
    let first_chunk = |attic: &Atticd<'_>, nar: &str| {
        let question = "SELECT chunk.id, json_extract(remote_file, '$.Local.name') FROM nar
                        JOIN chunkref ON nar_id = nar.id JOIN chunk ON chunk_id = chunk.id
                        WHERE nar_hash = ?1 AND seq = 0";
        attic
            .database
            .query_row(question, [nar], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
            })
            .unwrap()
    };
    let nar_hash = |sample: &Sample| Hash::from(sample.nar_hash()).to_base16();
    // 0 is whole. 1: another chunk's bytes; 2: no file; 3: no row; 4: it never came in whole.
    let (_, changed) = first_chunk(&attic, &nar_hash(&samples[1]));
    let changed = attic.file(&changed);
    let original = std::fs::read(&changed).unwrap();
    std::fs::write(&changed, pack("zstd", &[7; 3000])).unwrap();
    let (_, lost) = first_chunk(&attic, &nar_hash(&samples[2]));
    let (lost, kept) = (attic.file(&lost), attic.folder.path().join("kept"));
    std::fs::rename(&lost, &kept).unwrap();
    let (id, _) = first_chunk(&attic, &nar_hash(&samples[3]));
    let update = "UPDATE chunkref SET chunk_id = NULL WHERE chunk_id = ?1";
    attic.database.execute(update, [id]).unwrap();
    let update = "UPDATE nar SET state = 'P' WHERE nar_hash = ?1";
    attic
        .database
        .execute(update, [nar_hash(&samples[4])])
        .unwrap();
    // 5 references what is not there, 6 claims what would be a line of its own, 7 another hash.
    attic.sample(whole, &samples[5], &[&samples[1].path]);
    attic.sample(whole, &samples[6], &[]);
    let update =
        "UPDATE object SET deriver = ?1 || '.drv' || char(10) || 'Sig: x' WHERE store_path = ?2";
    let base = samples[6].path["/nix/store/".len()..].to_owned();
    attic
        .database
        .execute(update, [base, samples[6].path.clone()])
        .unwrap();
    attic.sample(whole, &samples[7], &[]);
    let update = "UPDATE object SET store_path_hash = replace(store_path_hash, substr(store_path_hash, 1, 1), 'z')
                  WHERE store_path = ?1";
    attic.database.execute(update, [&samples[7].path]).unwrap();

    let place = Place::new();
    let (report, status) = attic.import(&place, &[]);
    assert_eq!((status, &report["paths"]), (Some(1), &1.into()), "{report}");
    let reasons = |report: &Value| -> Vec<String> {
        let reasons = report["reasons"].as_array().unwrap().iter();
        let line = |reason: &Value| {
            let path = reason["path"].as_str();
            let number = path.map_or("cache", |path| path.rsplit('-').next().unwrap());
            format!("{number}: {}", reason["reason"].as_str().unwrap())
        };
        let mut lines: Vec<_> = reasons.map(line).collect();
        lines.sort();
        lines
    };
    let found = reasons(&report);
    let expected = [
        "2: ",
        "3: chunk ",
        "4: a chunk is missing in the database",
        ": its nar never came in whole",
        "6: ",
        "7: deriver",
        "8: store_path_hash",
        "cache: ",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for expected in expected {
        assert!(
            found.iter().any(|line| line.contains(expected)),
            "{expected} in {found:#?}"
        );
    }
    // What is mended is taken, and what waited for it.
    std::fs::write(&changed, original).unwrap();
    std::fs::rename(&kept, &lost).unwrap();
    let (report, status) = attic.import(&place, &["--cache", "whole"]);
    assert_eq!(status, Some(1), "{report}");
    assert_eq!(
        (&report["paths"], &report["present"], &report["left_out"]),
        (&3.into(), &1.into(), &4.into()),
        "{report}"
    );
    let anchor = place.start();
    for sample in [&samples[0], &samples[1], &samples[2], &samples[5]] {
        let name = sample.nar_hash().nix32();
        let nar = anchor.get(&format!("/whole/nar/{name}.nar.zst"), "");
        assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
    }
    // Nothing of what failed is left.
    let spool = place.path().join("state/anchor/spool");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
}

#[test]
fn an_import_that_is_killed_again_and_again_goes_on_to_its_end() {
    let mut attic = Atticd::new(None);
    let main = attic.cache("main", &key("main", 1), false, &[]);
    let samples: Vec<_> = (0..24).map(|number| Sample::new(number, 20_000)).collect();
    for (number, sample) in samples.iter().enumerate() {
        let below = number
            .checked_sub(7)
            .map(|below| samples[below].path.as_str());
        attic.sample(main, sample, below.as_slice());
    }
    let started = Instant::now();
    let status = attic.command(&Place::new()).status().unwrap();
    assert!(status.success());
    let whole = started.elapsed();

    let place = Place::new();
    let token = token(&place);
    let rounds = rounds(4);
    let mut present = BTreeSet::new();
    for round in 1..=rounds {
        let mut importing = attic.command(&place).spawn().unwrap();
        let end = Instant::now() + whole * round as u32 / rounds as u32 / 2;
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        importing.kill().unwrap();
        importing.wait().unwrap();
        let anchor = place.start();
        assert_consistent(&place, &anchor, &token, &[]);
        let found = samples.iter().filter(|sample| {
            let target = format!("/main/{}.narinfo", sample.hash());
            anchor.get(&target, &token).status == 200
        });
        present.insert(found.count());
    }
    assert!(
        present.len() > 1,
        "the kill came always as early: {present:?}"
    );
    let (report, status) = attic.import(&place, &[]);
    assert_eq!(status, Some(0), "{report}");
    let anchor = place.start();
    assert_consistent(&place, &anchor, &token, &samples);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_in_s3_are_read_as_text_from_another_database_too() {
    let s3 = S3::start().await;
    let mut attic = Atticd::new(Some(&s3));
    let signing = key("main", 1);
    let main = attic.cache("main", &signing, true, &[]);
    let samples: Vec<_> = (1..=3).map(|number| Sample::new(number, 50_000)).collect();
    for sample in &samples {
        attic.sample(main, sample, &[]);
    }
    // As PostgreSQL's CSV comes into such tables: `t` for true, nothing for NULL.
    let text = "UPDATE cache SET is_public = 't', deleted_at = '', retention_period = '';
                UPDATE object SET deriver = '', ca = '', system = '';
                UPDATE chunk SET file_size = '' WHERE id % 2 = 0";
    attic.database.execute_batch(text).unwrap();
    let credentials = s3.options().credentials_file.unwrap();
    let (endpoint, place) = (s3.endpoint(), Place::new());
    let arguments = [
        "--s3-endpoint",
        &endpoint,
        "--s3-credentials-file",
        credentials.to_str().unwrap(),
    ];
    tokio::task::block_in_place(|| {
        let (report, status) = attic.import(&place, &arguments);
        assert_eq!((status, &report["paths"]), (Some(0), &3.into()), "{report}");
        let anchor = place.start();
        for sample in &samples {
            let narinfo = anchor.get(&format!("/main/{}.narinfo", sample.hash()), "");
            assert!(narinfo.text().contains("Sig: main:"), "{narinfo:?}");
            let name = sample.nar_hash().nix32();
            let nar = anchor.get(&format!("/main/nar/{name}.nar.zst"), "");
            assert!(zstd::decode_all(&nar.body[..]).unwrap() == sample.nar);
        }
    });
}
