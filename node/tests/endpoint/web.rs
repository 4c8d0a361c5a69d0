//! A web server for binary caches: serves a folder that the real nix wrote, and fails on demand.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::machine::{Machine, Sample, own_address};

const PORT: u16 = 8080;

/// What the server does to requests.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// Accepts, reads and never answers.
    pub is_silent: bool,
    /// Answers everything with this.
    pub status: Option<u16>,
    /// Ends the next answer with a NAR after so many bytes of it.
    pub cut_next_nar_at: Option<usize>,
    /// Changes a byte in the middle of NARs.
    pub is_lying: bool,
    pub ignores_ranges: bool,
    /// Whoever does not show it gets 403.
    pub token: Option<String>,
    /// Before every answer.
    pub delay: Duration,
}

/// A binary cache on the web.
pub struct Web {
    pub folder: TempDir,
    pub address: Ipv4Addr,
    pub manners: Mutex<Manners>,
    /// Paths asked for, and from which byte.
    pub requests: Mutex<Vec<(String, u64)>>,
}

impl Web {
    pub fn new() -> Arc<Web> {
        let web = Arc::new(Web {
            folder: TempDir::new().unwrap(),
            address: own_address(),
            manners: Mutex::default(),
            requests: Mutex::default(),
        });
        let listener = TcpListener::bind((web.address, PORT)).unwrap();
        let this = web.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (this, stream) = (this.clone(), stream.unwrap());
                thread::spawn(move || this.serve(&stream));
            }
        });
        web
    }

    pub fn url(&self) -> String {
        format!("http://{}:{PORT}", self.address)
    }

    /// The lines of configuration for it.
    pub fn as_upstream(&self) -> String {
        format!("[[upstream]]\nurl = \"{}\"\n", self.url())
    }

    /// Lets the real nix copy a path here.
    pub fn take(&self, from: &Machine, path: &Sample, compression: &str) {
        let target = format!(
            "file://{}?compression={compression}",
            self.folder.path().display()
        );
        from.nix("nix", &["copy", "--to", &target, &path.path]);
    }

    pub fn set(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.manners.lock().unwrap());
    }

    /// From which bytes NARs were asked for.
    pub fn nars_asked(&self) -> Vec<u64> {
        let requests = self.requests.lock().unwrap();
        let nars = requests
            .iter()
            .filter(|(path, _)| path.starts_with("/nar/"));
        nars.map(|(_, from)| *from).collect()
    }

    pub fn narinfos_asked(&self) -> usize {
        let requests = self.requests.lock().unwrap();
        let is_narinfo = |(path, _): &&(String, u64)| path.ends_with(".narinfo");
        requests.iter().filter(is_narinfo).count()
    }

    fn serve(&self, stream: &TcpStream) {
        let mut reader = BufReader::new(stream);
        loop {
            let mut head = Vec::new();
            loop {
                let mut line = String::new();
                match reader.read_line(&mut line) {
                    Ok(1..) if line.trim().is_empty() => break,
                    Ok(1..) => head.push(line.trim().to_owned()),
                    _ => return,
                }
            }
            if !self.answer(&head, stream) {
                return;
            }
        }
    }

    /// False when the connection ends.
    fn answer(&self, head: &[String], mut stream: &TcpStream) -> bool {
        let header = |name: &str| {
            let lines = head.iter().skip(1);
            let mut found = lines.filter_map(|line| line.split_once(": "));
            let found = found.find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_owned())
        };
        let path = head[0].split(' ').nth(1).unwrap().to_owned();
        let is_nar = path.starts_with("/nar/");
        let manners = self.manners.lock().unwrap().clone();
        let range = header("range").filter(|_| !manners.ignores_ranges);
        let from = range.as_ref().map_or(0, |range| {
            let from = range.trim_start_matches("bytes=").trim_end_matches('-');
            from.parse::<usize>().unwrap()
        });
        self.requests
            .lock()
            .unwrap()
            .push((path.clone(), from as u64));
        if manners.is_silent {
            // Until the other side gives up.
            let _ = stream.read(&mut [0]);
            return false;
        }
        thread::sleep(manners.delay);
        let file = self.folder.path().join(path.trim_start_matches('/'));
        let is_welcome = manners
            .token
            .is_none_or(|token| header("authorization") == Some(format!("Bearer {token}")));
        let (status, mut body) = match (manners.status, is_welcome, fs::read(file)) {
            (Some(status), _, _) => (status, b"trouble".to_vec()),
            (None, false, _) => (403, Vec::new()),
            (None, true, Ok(body)) => (if range.is_some() { 206 } else { 200 }, body),
            (None, true, Err(_)) => (404, Vec::new()),
        };
        if manners.is_lying && is_nar {
            let middle = body.len() / 2;
            body[middle] ^= 1;
        }
        let size = body.len();
        body.drain(..from.min(size));
        let mut answer = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n", body.len());
        if status == 206 {
            let last = size - 1;
            answer += &format!("Content-Range: bytes {from}-{last}/{size}\r\n");
        }
        if body.starts_with(&[0x1f, 0x8b]) && path.ends_with(".narinfo") {
            answer += "Content-Encoding: gzip\r\n";
        }
        answer += "\r\n";
        let mut is_cut = false;
        if is_nar && let Some(at) = self.manners.lock().unwrap().cut_next_nar_at.take() {
            body.truncate(at);
            is_cut = true;
        }
        let sent = stream.write_all(&[answer.into_bytes(), body].concat());
        sent.is_ok() && !is_cut
    }
}

/// Packs a narinfo as some object stores hold it.
pub fn gzip_narinfo(folder: &Path, path: &Sample) {
    let file = folder.join(path.narinfo().trim_start_matches('/'));
    let packed = std::process::Command::new("gzip")
        .arg("-c")
        .arg(&file)
        .output()
        .unwrap();
    fs::write(file, packed.stdout).unwrap();
}
