//! Clients that ask over kept connections as fast as they are answered, and throw the answers away.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::http;
use crate::machine::Machine;

/// Larger than a socket's buffer, so that reading is not what is measured.
const BUFFER_BYTES: usize = 256 << 10;

/// What all clients together got in a second.
pub struct Load {
    pub requests: f64,
    pub bytes: f64,
}

impl Load {
    /// Asks for the targets again and again, from inside the machine, until the time is over.
    pub fn run(
        machine: &Machine,
        address: SocketAddr,
        targets: &[String],
        connections: usize,
        time: Duration,
    ) -> Load {
        let started = Instant::now();
        let counts: Vec<(u64, u64)> = thread::scope(|scope| {
            let clients: Vec<_> = (0..connections)
                .map(|number| {
                    scope.spawn(move || {
                        machine.namespace.entrance().enter();
                        let mut client = Client::connect(address);
                        let (mut requests, mut bytes) = (0, 0);
                        // Not all of them the same at the same time.
                        let from = number * targets.len() / connections;
                        for target in targets.iter().cycle().skip(from) {
                            let (length, is_whole) =
                                client.get(target, || started.elapsed() < time);
                            bytes += length;
                            requests += u64::from(is_whole);
                            if started.elapsed() >= time {
                                break;
                            }
                        }
                        (requests, bytes)
                    })
                })
                .collect();
            let joined = clients.into_iter().map(|client| client.join());
            joined.map(|counts| counts.expect("a client")).collect()
        });
        let seconds = started.elapsed().as_secs_f64();
        let sum = |pick: fn(&(u64, u64)) -> u64| counts.iter().map(pick).sum::<u64>() as f64;
        Load {
            requests: sum(|counts| counts.0) / seconds,
            bytes: sum(|counts| counts.1) / seconds,
        }
    }
}

/// Where a cache says that the NAR of a path is.
pub fn nar_url(machine: &Machine, address: SocketAddr, hash: &str) -> String {
    let narinfo = format!("/{hash}.narinfo");
    let answer = machine.namespace.inside(|| http::get(address, &narinfo));
    let url = answer.expect("a narinfo").line("URL").expect("a URL");
    format!("/{url}")
}

/// A kept connection.
struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_nodelay(true).expect("no delay");
        Client {
            stream,
            buffer: vec![0; BUFFER_BYTES],
        }
    }

    /// Returns the bytes of the body that came while `goes_on`, and whether that was all of it; after less than
    /// all of it the connection is of no use.
    fn get(&mut self, target: &str, goes_on: impl Fn() -> bool) -> (u64, bool) {
        let request = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.stream.write_all(request.as_bytes()).expect("write");
        let mut filled = 0;
        let end = loop {
            filled += self.read(filled);
            let head = &self.buffer[..filled];
            if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200"), "{target}: {head}");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .unwrap_or_else(|| panic!("no length: {head}"));
        let length: u64 = length.parse().expect("a length");
        let mut got = (filled - end) as u64;
        while got < length {
            if !goes_on() {
                return (got, false);
            }
            got += self.read(0) as u64;
        }
        (got, true)
    }

    fn read(&mut self, from: usize) -> usize {
        let read = self.stream.read(&mut self.buffer[from..]).expect("read");
        assert!(read > 0, "the connection was closed");
        read
    }
}
