//! Ten thousand requests that nobody should send: no 5xx, no panic, nothing stored.

use granary_protocol::token::Permission;

use crate::rig::{Rig, Sample, ask, bearer};

const REQUESTS: u64 = 10_000;
const THREADS: u64 = 4;

/// Chance from a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }

    fn pick<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.roll(choices.len())]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.roll(most + 1);
        (0..length).map(|_| self.roll(256) as u8).collect()
    }

    /// Text without what would end the line of a request.
    fn text(&mut self, most: usize) -> String {
        const LETTERS: &[u8] = b"abcxyz0189.:/%?&=-_+*!~\\'\"{}[]<>|,;@#$^()";
        let length = self.roll(most + 1);
        (0..length)
            .map(|_| LETTERS[self.roll(LETTERS.len())] as char)
            .collect()
    }

    /// Changes some bytes, cuts some off, adds some.
    fn mutate(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + self.roll(4) {
            let at = self.roll(bytes.len() + 1);
            match self.roll(4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.roll(256) as u8),
                2 if at < bytes.len() => bytes[at] ^= 1 << self.roll(8),
                _ if at < bytes.len() => {
                    bytes.remove(at);
                }
                _ => bytes.push(0),
            }
        }
        bytes
    }
}

struct Request {
    method: &'static str,
    target: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

/// One request that is wrong in some way.
fn request(dice: &mut Dice, token: &str, sample: &Sample, other: &Sample) -> Request {
    let methods = [
        "GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "BREW",
    ];
    let mut request = Request {
        method: dice.pick(&methods),
        target: String::new(),
        headers: Vec::new(),
        body: Vec::new(),
    };
    // Half of them come from somebody who may do everything.
    match dice.roll(6) {
        0..3 => request.headers.push(("Authorization", bearer(token))),
        3 => {
            let broken = dice.mutate(token.as_bytes());
            let broken: String = broken
                .iter()
                .map(|byte| (byte & 0x7f).max(0x21) as char)
                .collect();
            request.headers.push(("Authorization", bearer(&broken)));
        }
        4 => request.headers.push(("Authorization", dice.text(40))),
        _ => {}
    }
    // Metadata may come out valid, but this NAR is never the one that it promises.
    let metadata = sample.metadata("main").to_string();
    match dice.roll(9) {
        0 => request.target = format!("/{}", dice.text(60)),
        1 => {
            request.target = format!("/main/{}", dice.text(60));
            // Authorised files of these kinds are kept as they are.
            request.method = dice.pick(&["GET", "HEAD", "POST", "DELETE"]);
        }
        2 => {
            request.target = format!("/main/{}.narinfo", sample.hash());
            let narinfo = format!(
                "StorePath: {}\nURL: nar/{}.nar\nCompression: none\nNarHash: {}\nNarSize: {}\nReferences: \n",
                sample.path,
                sample.nar_hash().nix32(),
                sample.nar_hash(),
                sample.nar.len()
            );
            (request.method, request.body) = ("PUT", dice.mutate(narinfo.as_bytes()));
        }
        3 => {
            let extension = dice.pick(&["", ".xz", ".zst", ".bz2", ".br", ".exe"]);
            request.target = format!("/main/nar/{}.nar{extension}", sample.nar_hash().nix32());
            (request.method, request.body) = ("PUT", dice.mutate(&other.nar));
        }
        4 => {
            request.target = "/_api/v1/upload-path".into();
            let metadata = dice.mutate(metadata.as_bytes());
            let metadata: String = metadata
                .iter()
                .map(|byte| (byte & 0x7f).max(0x20) as char)
                .collect();
            request.headers.push(("X-Attic-Nar-Info", metadata));
            (request.method, request.body) = ("PUT", other.nar.clone());
        }
        5 => {
            request.target = "/_api/v1/upload-path".into();
            request.headers.push(("X-Attic-Nar-Info", metadata));
            (request.method, request.body) = ("PUT", dice.mutate(&other.nar));
        }
        6 => {
            request.target = "/_api/v1/upload-path".into();
            let size = [metadata.len(), dice.roll(10_000), usize::MAX][dice.roll(3)];
            request
                .headers
                .push(("X-Attic-Nar-Info-Preamble-Size", size.to_string()));
            (request.method, request.body) = (
                "PUT",
                dice.mutate(&[metadata.as_bytes(), &other.nar].concat()),
            );
        }
        7 => {
            request.target = dice
                .pick(&[
                    "/_api/v1/get-missing-paths",
                    "/api/v1/caches/main/narinfos",
                    "/api/v1/caches/../narinfos",
                ])
                .into();
            let question = format!(
                "{{\"cache\":\"main\",\"store_path_hashes\":[\"{0}\"],\"hashes\":[\"{0}\"]}}",
                sample.hash()
            );
            (request.method, request.body) = ("POST", dice.mutate(question.as_bytes()));
        }
        _ => {
            // Creating needs a name that cannot be, changing a value that cannot be.
            request.target = format!(
                "/_api/v1/cache-config/{}",
                dice.pick(&["-x", "a%2fb", "api", "..", "%00", "main/x"])
            );
            request.body = dice.bytes(200);
        }
    }
    if dice.roll(4) == 0 {
        let value = dice.text(30);
        let name = dice.pick(&[
            "Range",
            "If-None-Match",
            "Content-Encoding",
            "Expect",
            "Host",
            "Content-Length",
        ]);
        request.headers.push((name, value));
    }
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_malformed_requests_break_and_store_nothing() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let token = rig.token(&[("*", &Permission::ALL)]).await;
    let (sample, other) = (Sample::new(1, 300), Sample::new(2, 300));
    let before = rig.objects();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (rig, token, sample, other) = (&rig, &token, &sample, &other);
            scope.spawn(move || {
                let mut dice = Dice(0x9e37_79b9_7f4a_7c15 + thread);
                for number in 0..REQUESTS / THREADS {
                    if number % 20 == 0 {
                        garbage(rig, &dice.bytes(2000));
                        continue;
                    }
                    let request = request(&mut dice, token, sample, other);
                    let headers: Vec<_> = request
                        .headers
                        .iter()
                        .map(|(name, value)| (*name, value.as_str()))
                        .collect();
                    let answer = ask(
                        rig.address(),
                        request.method,
                        &request.target,
                        &headers,
                        &request.body,
                    );
                    assert!(
                        answer.status < 500,
                        "{} {} {headers:?}: {answer:?}",
                        request.method,
                        request.target
                    );
                }
            });
        }
    });
    assert_eq!(rig.objects(), before);
    let spool = std::fs::read_dir(rig.state().join("spool")).unwrap();
    assert_eq!(spool.count(), 0, "left in the spool");
    // And it works as before.
    assert_eq!(rig.upload(&token, "main", &sample).status, 200);
}

/// Bytes that are no HTTP.
fn garbage(rig: &Rig, bytes: &[u8]) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(rig.address()).unwrap();
    stream.set_read_timeout(Some(crate::rig::GENEROUS)).unwrap();
    // It may be closed at the first byte.
    let _ = stream
        .write_all(bytes)
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
        "{}",
        answer.escape_ascii()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_smuggled_past_an_anchor() {
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    for (name, bytes) in crate::smuggling::cases("/main/x.narinfo", "/main/nix-cache-info") {
        let stream = tokio::net::TcpStream::connect(rig.address()).await;
        crate::smuggling::check(name, &bytes, stream.unwrap()).await;
    }
}

/// More than may be there without having asked, of one address.
const SLOW: usize = 1_200;

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_end_their_first_request_keep_nobody_out() {
    use std::io::{Read, Write};
    let rig = Rig::new().await;
    rig.cache("main", true).await;
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut stream = std::net::TcpStream::connect(rig.address()).unwrap();
        stream.write_all(b"GET /main/nix-ca").unwrap();
        slow.push(stream);
    }
    assert_eq!(rig.get("/main/nix-cache-info").status, 200);
    // The oldest of them made room, and those that did ask stayed.
    let mut oldest = slow.swap_remove(0);
    oldest.set_read_timeout(Some(crate::rig::GENEROUS)).unwrap();
    let ended = oldest.read(&mut [0; 16]);
    let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(
        matches!(ended, Ok(0)) || ended.as_ref().is_err_and(is_reset),
        "{ended:?}"
    );
}
