//! How much memory an anchor and those who push to it take, however large a path is.
//!
//! `GRANARY_LARGE_MIB` and `GRANARY_PUSHED_MIB` set how large: of each of sixteen clients at once, and of the one
//! that `granary push` sends. The bounds are the same for any.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use granary_protocol::hash::{Hash, NarHash, NarHasher};
use serde_json::json;

use crate::command::{Anchor, Place};
use crate::rig::{GENEROUS, Machine, Sample, ask, bearer, hash};

const CLIENTS: u64 = 16;

/// Kilobytes. With what they have by default, one that kept NARs in memory would take more.
const ANCHOR_KILOBYTES_MAX: u64 = 512 * 1024;
const CLIENT_KILOBYTES_MAX: u64 = 128 * 1024;

const BLOCK_BYTES: usize = 1024 * 1024;

fn mebibytes(variable: &str, default: u64) -> u64 {
    let given = std::env::var(variable).ok();
    given.map_or(default, |given| given.parse().unwrap())
}

/// A file of a store path, made as it is sent.
#[derive(Clone)]
struct Large {
    number: u64,
    blocks: u64,
    block: Vec<u8>,
}

impl Large {
    fn new(number: u64, blocks: u64) -> Large {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state & 0xffff_ffff).to_le_bytes()
        };
        let block = (0..BLOCK_BYTES / 8).flat_map(|_| next()).collect();
        Large {
            number,
            blocks,
            block,
        }
    }

    fn path(&self) -> String {
        let digest = granary_protocol::hash::sha256(&self.number.to_le_bytes());
        let hash = granary_protocol::nix32::encode(&digest[..20]);
        format!("/nix/store/{hash}-large-{}", self.number)
    }

    /// The NAR in pieces.
    fn nar(&self) -> impl Iterator<Item = Vec<u8>> {
        let word = |word: &str| {
            let mut bytes = (word.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(word.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let mut head: Vec<u8> = ["nix-archive-1", "(", "type", "regular", "contents"]
            .into_iter()
            .flat_map(word)
            .collect();
        head.extend_from_slice(&(self.blocks * BLOCK_BYTES as u64).to_le_bytes());
        [head].into_iter().chain(self.blocks()).chain([word(")")])
    }

    fn blocks(&self) -> impl Iterator<Item = Vec<u8>> {
        (0..self.blocks).map(|index| {
            let mut block = self.block.clone();
            block[..8].copy_from_slice(&index.to_le_bytes());
            block
        })
    }

    fn about(&self) -> (NarHash, u64) {
        let (mut hasher, mut size) = (NarHasher::new(), 0);
        for piece in self.nar() {
            hasher.update(&piece);
            size += piece.len() as u64;
        }
        (hasher.finish(), size)
    }

    fn push(&self, anchor: SocketAddr, token: &str) {
        let (nar_hash, nar_size) = self.about();
        let path = self.path();
        let metadata = json!({
            "cache": "main", "store_path_hash": hash(&path), "store_path": path, "references": [],
            "system": null, "deriver": null, "sigs": [], "ca": null,
            "nar_hash": Hash::from(nar_hash).to_base16(), "nar_size": nar_size,
        });
        let mut stream = TcpStream::connect(anchor).unwrap();
        let head = format!(
            "PUT /_api/v1/upload-path HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {}\r\n\
             Content-Length: {nar_size}\r\nX-Attic-Nar-Info: {metadata}\r\n\r\n",
            bearer(token)
        );
        stream.write_all(head.as_bytes()).unwrap();
        for piece in self.nar() {
            stream.write_all(&piece).unwrap();
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// Reads it as nix does, or from its middle as a node does.
    fn pull(&self, anchor: SocketAddr, token: &str, is_from_middle: bool) {
        let (nar_hash, nar_size) = self.about();
        let from = match is_from_middle {
            true => format!("?from={}", nar_size / 2),
            false => String::new(),
        };
        let mut stream = TcpStream::connect(anchor).unwrap();
        let request = format!(
            "GET /main/nar/{}.nar.zst{from} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {}\r\n\r\n",
            nar_hash.nix32(),
            bearer(token)
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 20"), "{head}");
        let mut hasher = NarHasher::new();
        let mut size = 0;
        let mut decoder = zstd::stream::read::Decoder::new(stream).unwrap();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = decoder.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            hasher.update(&buffer[..length]);
            size += length as u64;
        }
        match is_from_middle {
            // Whole frames, the first of which begins before.
            true => assert!(size >= nar_size / 2 && size < nar_size, "{size}"),
            false => assert_eq!((hasher.finish(), size), (nar_hash, nar_size)),
        }
    }
}

/// What a process took at most, in kilobytes; `None` when it has ended.
fn memory(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

fn place() -> (Place, Anchor, String) {
    let place = Place::new();
    let anchor = place.start();
    let arguments = ["token", "create", "--subject", "ci", "--cache", "main"];
    let token = place.run(&[&arguments[..], &["--allow", "pull,push"]].concat());
    (place, anchor, token)
}

#[test]
fn sixteen_clients_at_once_push_and_pull_large_paths_within_512_mebibytes() {
    let blocks = mebibytes("GRANARY_LARGE_MIB", 32);
    let (_place, anchor, token) = place();
    let large: Vec<_> = (0..CLIENTS)
        .map(|number| Large::new(number, blocks))
        .collect();
    let idle = memory(anchor.id()).unwrap();
    let address = anchor.address;
    let all = |act: &(dyn Fn(&Large) + Sync)| {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for large in &large {
                scope.spawn(move || act(large));
            }
        });
        let took = started.elapsed();
        (memory(anchor.id()).unwrap(), took)
    };
    let pushed = all(&|large| large.push(address, &token));
    let pulled = all(&|large| large.pull(address, &token, large.number % 2 == 1));
    println!("anchor: {idle} kB idle, {pushed:?} after pushes, {pulled:?} after pulls");
    assert!(
        pulled.0 < ANCHOR_KILOBYTES_MAX,
        "{idle}, {pushed:?}, {pulled:?}"
    );
}

#[test]
fn a_push_of_a_large_path_takes_less_than_128_mebibytes() {
    let blocks = mebibytes("GRANARY_PUSHED_MIB", 160);
    let (_place, anchor, token) = place();
    let machine = Machine::new(&[]);
    let file = machine.folder().join("large");
    let mut contents = std::fs::File::create(&file).unwrap();
    let large = Large::new(1, blocks);
    for block in large.blocks() {
        contents.write_all(&block).unwrap();
    }
    drop(contents);
    // A path whose database row is all that Nix makes: copying it would take Nix as much memory as it has bytes.
    let path = large.path();
    let real = machine.real(&path);
    std::fs::create_dir_all(real.parent().unwrap()).unwrap();
    std::fs::rename(&file, &real).unwrap();
    let (nar_hash, nar_size) = large.about();
    let hex = Hash::from(nar_hash).to_base16();
    let registration = format!("{path}\n{hex}\n{nar_size}\n\n0\n");
    let mut register = Command::new("nix-store")
        .args(["--load-db", "--store"])
        .arg(machine.folder())
        .env("HOME", machine.folder())
        .env("NIX_CONF_DIR", machine.folder())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    register
        .stdin
        .take()
        .unwrap()
        .write_all(registration.as_bytes())
        .unwrap();
    assert!(register.wait().unwrap().success());

    let mut push = crate::pushing::push_command(
        &machine,
        &format!("http://{}/main", anchor.address),
        &token,
        &[&path],
    );
    let mut pushing = push.stdout(Stdio::null()).spawn().unwrap();
    let (mut most, started) = (0, Instant::now());
    let status = loop {
        most = most.max(memory(pushing.id()).unwrap_or(0));
        if let Some(status) = pushing.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < GENEROUS * u32::try_from(1 + blocks / 160).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(status.success());
    let anchors = memory(anchor.id()).unwrap();
    println!(
        "client: {most} kB, anchor: {anchors} kB, {:?}",
        started.elapsed()
    );
    assert!(most > 0 && most < CLIENT_KILOBYTES_MAX, "{most} kB");
    assert!(anchors < ANCHOR_KILOBYTES_MAX, "{anchors} kB");
    let narinfo = anchor.get(&format!("/main/{}.narinfo", hash(&path)), &token);
    assert_eq!(narinfo.status, 200);
}

/// Grows by at most so many kilobytes, whatever one client without a token asks for.
const ASKED_KILOBYTES_MAX: u64 = 192 * 1024;

#[test]
fn a_batch_of_lookups_takes_the_anchor_the_memory_of_a_part_of_its_answer() {
    const PATHS: u64 = 12;
    let (place, anchor, token) = place();
    place.run(&[
        "cache",
        "configure",
        "main",
        "--public",
        "--upstream-key",
        "elsewhere-1",
    ]);
    // With so many references that each has 30 kB.
    let references: Vec<_> = (1000..1700)
        .map(|number| Sample::new(number, 0).path["/nix/store/".len()..].to_owned())
        .collect();
    let references = references.join(" ");
    let mut expected = serde_json::Map::new();
    for number in 0..PATHS {
        let sample = Sample::new(number, 100);
        let mut upload = crate::pushing::RawUpload::of(&sample, &token);
        let without = "References: ";
        upload.narinfo = upload
            .narinfo
            .replace(without, &format!("{without}{references}"));
        upload.begin(anchor.address);
        upload.ask(anchor.address, "PUT", "?offset=0", &sample.nar);
        let narinfo = anchor.get(&format!("/main/{}.narinfo", sample.hash()), "");
        assert!(narinfo.body.len() > 30_000, "{}", narinfo.head);
        expected.insert(sample.hash().to_owned(), narinfo.text().into());
    }
    let idle = memory(anchor.id()).unwrap();
    let target = "/api/v1/caches/main/narinfos";
    let hashes: Vec<_> = expected.keys().cycle().take(10_000).collect();
    let question = json!({ "hashes": hashes }).to_string();
    let answer = ask(anchor.address, "POST", target, &[], question.as_bytes());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["narinfos"], serde_json::Value::from(expected));
    let most = memory(anchor.id()).unwrap();
    println!("anchor: {idle} kB, {most} kB after the batch");
    assert!(most < idle + 32 * 1024, "{idle} kB, {most} kB");
}

#[test]
fn files_beside_narinfos_are_not_held_in_memory_on_their_way_in_or_out() {
    const READERS: usize = 16;
    let (place, anchor, token) = place();
    place.run(&["cache", "configure", "main", "--public"]);
    let log = vec![b'x'; 24 * 1024 * 1024];
    let idle = memory(anchor.id()).unwrap();
    let authorization = bearer(&token);
    let headers = [("Authorization", authorization.as_str())];
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (log, headers) = (&log, &headers);
            scope.spawn(move || {
                let target = format!("/main/log/{number}.drv");
                let answer = ask(anchor.address, "PUT", &target, headers, log);
                assert_eq!(answer.status, 201, "{answer:?}");
            });
        }
    });
    let stored = memory(anchor.id()).unwrap();
    // Who reads nothing of it but how it begins.
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let mut stream = TcpStream::connect(anchor.address).unwrap();
            let request = "GET /main/log/1.drv HTTP/1.1\r\nHost: x\r\n\r\n";
            stream.write_all(request.as_bytes()).unwrap();
            stream.read_exact(&mut [0; 12]).unwrap();
            stream
        })
        .collect();
    let read = memory(anchor.id()).unwrap();
    println!("anchor: {idle} kB, {stored} kB after eight logs, {read} kB for {READERS} readers");
    assert!(
        read < idle + ASKED_KILOBYTES_MAX,
        "{idle}, {stored}, {read}"
    );
    drop(readers);
    let answer = ask(anchor.address, "GET", "/main/log/7.drv", &[], b"");
    assert!(answer.is_complete && answer.body == log);
}
