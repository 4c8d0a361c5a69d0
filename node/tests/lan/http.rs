//! A small HTTP/1.1 client: one request per connection, so that every answer is seen to its end.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use granary_protocol::hash::NarHasher;

/// A local endpoint that says nothing for this long is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);

/// One answer, whole or cut short.
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Response {
    /// True when as many bytes came as were promised.
    pub fn is_complete(&self) -> bool {
        self.headers
            .get("content-length")
            .and_then(|length| length.parse().ok())
            == Some(self.body.len())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The value of a narinfo's or cache info's `Key: value` line.
    pub fn line(&self, key: &str) -> Option<String> {
        self.text().lines().find_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(": ")
                .map(str::to_owned)
        })
    }
}

/// A large body as it came.
pub struct Reading {
    pub status: u16,
    pub bytes: u64,
    pub nar_hash: String,
    pub longest_pause: Duration,
    pub elapsed: Duration,
}

/// Sends a GET and reads to the end, keeping nothing of the body.
pub fn read(address: SocketAddr, path: &str) -> io::Result<Reading> {
    let mut stream = TcpStream::connect_timeout(&address, SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let start = Instant::now();
    stream.write_all(request(address, path).as_bytes())?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let status = parse(&head).map_or(0, |response| response.status);
    let mut hasher = NarHasher::new();
    let (mut bytes, mut longest_pause, mut last) = (0, Duration::ZERO, Instant::now());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = stream.read(&mut buffer)?;
        longest_pause = longest_pause.max(last.elapsed());
        if count == 0 {
            break;
        }
        bytes += count as u64;
        hasher.update(&buffer[..count]);
        last = Instant::now();
    }
    Ok(Reading {
        status,
        bytes,
        nar_hash: hasher.finish().to_string(),
        longest_pause,
        elapsed: start.elapsed(),
    })
}

/// Sends a GET to `address` and reads until the other side closes.
pub fn get(address: SocketAddr, path: &str) -> io::Result<Response> {
    let mut stream = TcpStream::connect_timeout(&address, SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(request(address, path).as_bytes())?;
    let mut bytes = Vec::new();
    // A body that is cut short is an answer too: what came before the end is kept.
    match stream.read_to_end(&mut bytes) {
        Err(error) if bytes.is_empty() => return Err(error),
        _ => {}
    }
    parse(&bytes).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("not HTTP: {:?}", &bytes[..bytes.len().min(40)]),
        )
    })
}

/// The request that [`get`] sends.
pub fn request(address: SocketAddr, path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: granary-lan-test\r\nConnection: close\r\n\r\n"
    )
}

fn parse(bytes: &[u8]) -> Option<Response> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]);
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
        .collect();
    Some(Response {
        status,
        headers,
        body: bytes[end + 4..].to_vec(),
    })
}
