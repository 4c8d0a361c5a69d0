//! A running anchor over a folder or S3, and machines with a real Nix that use it.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use granary::anchor::admin::Changes;
use granary::anchor::object_store::S3Options;
use granary::anchor::server::Server;
use granary::anchor::tls::Files;
use granary::anchor::tokens::token_key;
use granary::anchor::{Clock, Options};
use granary_protocol::certificate::UnixTime;
use granary_protocol::signature::TrustedKeys;
use granary_protocol::token::{Claims, Grant, Permission};
use tempfile::TempDir;

/// Long enough for a machine under load; a hang is what it is there to end.
pub const GENEROUS: Duration = Duration::from_secs(30);

/// An anchor that may be stopped and started again.
pub struct Rig {
    pub folder: TempDir,
    storage: String,
    s3: S3Options,
    tls: Option<Files>,
    pub clock: Clock,
    pub oidc: Vec<granary::anchor::oidc::Options>,
    pub members: Option<granary::anchor::members::Options>,
    pub heal_from: Vec<granary::anchor::heal::Source>,
    pub server: Option<Server>,
}

impl Rig {
    pub async fn new() -> Rig {
        let folder = TempDir::new().unwrap();
        let storage = format!("file://{}/storage", folder.path().display());
        Rig::with(folder, storage, S3Options::default(), None).await
    }

    pub async fn with_tls(files: Files) -> Rig {
        let folder = TempDir::new().unwrap();
        let storage = format!("file://{}/storage", folder.path().display());
        Rig::with(folder, storage, S3Options::default(), Some(files)).await
    }

    pub async fn on_s3(s3: &crate::s3::S3) -> Rig {
        let folder = TempDir::new().unwrap();
        let storage = "s3://granary-test/anchor".to_owned();
        Rig::with(folder, storage, s3.options(), None).await
    }

    /// The same, where clients are sent to S3 itself.
    pub async fn redirecting_to_s3(s3: &crate::s3::S3) -> Rig {
        let folder = TempDir::new().unwrap();
        let options = S3Options {
            redirect: true,
            ..s3.options()
        };
        Rig::with(folder, "s3://granary-test/anchor".to_owned(), options, None).await
    }

    async fn with(folder: TempDir, storage: String, s3: S3Options, tls: Option<Files>) -> Rig {
        let mut rig = Rig {
            folder,
            storage,
            s3,
            tls,
            clock: Clock::default(),
            oidc: Vec::new(),
            members: None,
            heal_from: Vec::new(),
            server: None,
        };
        rig.start().await;
        rig
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn options(&self) -> Options {
        Options {
            state: self.state(),
            storage: self.storage.clone(),
            s3: self.s3.clone(),
            trust: TrustedKeys::new(),
            attic_key: None,
            oidc: self.oidc.clone(),
            members: self.members.clone(),
            nar_bytes_max: 1 << 30,
            tls: self.tls.clone(),
            scrub_after: None,
            heal_from: self.heal_from.clone(),
            clock: self.clock.clone(),
        }
    }

    pub async fn start(&mut self) {
        self.start_at("127.0.0.1:0".parse().unwrap()).await;
    }

    pub async fn start_at(&mut self, listen: SocketAddr) {
        let server = Server::start(self.options(), listen, None).await;
        self.server = Some(server.unwrap());
    }

    /// Stops the anchor, and waits until its threads have closed the catalog: SQLite in the same process
    /// does not take well to files that are deleted under an open connection.
    pub async fn stop(&mut self) {
        self.server.take().unwrap().stop().await;
        let state = self.state();
        let is_open = || {
            let open = std::fs::read_dir("/proc/self/fd").unwrap();
            let mut files = open.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
            files.any(|file| file.starts_with(&state))
        };
        let started = std::time::Instant::now();
        while is_open() {
            assert!(started.elapsed() < GENEROUS, "the catalog stays open");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.server.as_ref().unwrap().address
    }

    pub fn url(&self, cache: &str) -> String {
        format!("http://{}/{cache}", self.address())
    }

    /// Makes a cache and returns its public key.
    pub async fn cache(&self, name: &str, public: bool) -> String {
        let changes = Changes {
            public: Some(public),
            ..Changes::default()
        };
        let anchor = &self.server.as_ref().unwrap().anchor;
        let name = name.parse().unwrap();
        let cache = anchor.create_cache(&name, &changes, None).await.unwrap();
        cache.settings.public_keys[0].clone()
    }

    /// Makes a token, listed as the command line does it.
    pub async fn token(&self, grants: &[(&str, &[Permission])]) -> String {
        let claims = claims(grants);
        let text = claims.mint(&token_key(&self.state()).unwrap());
        let anchor = &self.server.as_ref().unwrap().anchor;
        anchor.tokens.issued(claims, UnixTime(0)).await.unwrap();
        text
    }

    pub fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        ask(self.address(), method, target, headers, body)
    }

    pub fn get(&self, target: &str) -> Answer {
        self.ask("GET", target, &[], b"")
    }

    /// Every object of a folder's storage, relative to it.
    pub fn objects(&self) -> Vec<String> {
        let root = self.folder.path().join("storage");
        let mut objects = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => objects.push(path.strip_prefix(&root).unwrap().display().to_string()),
                }
            }
        }
        objects.sort();
        objects
    }
}

pub fn claims(grants: &[(&str, &[Permission])]) -> Claims {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let grant = |(pattern, permissions): &(&str, &[Permission])| Grant {
        pattern: pattern.parse().unwrap(),
        permissions: permissions.to_vec(),
    };
    Claims {
        id: Some(format!("id-{number}")),
        subject: "tester".to_owned(),
        not_before: None,
        expires: None,
        grants: grants.iter().map(grant).collect(),
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// Whether as many bytes came as were promised.
    pub is_complete: bool,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.split("\r\n").skip(1);
        lines.find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{self:?}"))
    }

    /// What a refusal is called.
    pub fn error(&self) -> String {
        self.json()["error"].as_str().unwrap_or_default().to_owned()
    }
}

/// One request on a connection of its own.
pub fn ask(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Answer {
    let mut request =
        format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    let has_length = headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    if !has_length && (!body.is_empty() || matches!(method, "PUT" | "POST" | "PATCH")) {
        request.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    request.push_str("\r\n");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(GENEROUS)).unwrap();
    // A server that refuses may close before it has read everything.
    let _ = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.write_all(body));
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer to {request}: {}", bytes.escape_ascii()));
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut answer = Answer {
        status: head[9..12].parse().unwrap(),
        body: bytes[end + 4..].to_vec(),
        is_complete: true,
        head,
    };
    if let Some(length) = answer.header("content-length").filter(|_| method != "HEAD") {
        answer.is_complete = length.parse() == Ok(answer.body.len());
    }
    if answer.header("transfer-encoding") == Some("chunked") {
        let body = unchunked(&answer.body);
        answer.is_complete = body.is_some();
        answer.body = body.unwrap_or_default();
    }
    answer
}

/// A body that came in chunks; `None` unless its end came.
fn unchunked(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    loop {
        let end = body.windows(2).position(|two| two == b"\r\n")?;
        let length = std::str::from_utf8(&body[..end]).ok()?;
        let length = usize::from_str_radix(length, 16).ok()?;
        body = &body[end + 2..];
        if length == 0 {
            return Some(whole);
        }
        whole.extend_from_slice(body.get(..length)?);
        body = body.get(length + 2..)?;
    }
}

pub fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// A machine with Nix and a store of its own.
pub struct Machine {
    pub root: TempDir,
    trusted: Vec<String>,
    /// Certificates that count in place of the system's.
    pub authority: Option<PathBuf>,
}

/// Three paths that reference each other, one of them itself, with more than one frame of contents.
const CLOSURE: &str = r#"
let
  build = name: text: derivation {
    inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/bin:/usr/bin";
    args = [ "-c" text ];
  };
  a = build "a" "mkdir $out; echo one > $out/one; ln -s one $out/two; head -c 6000000 /dev/zero > $out/zero";
  b = build "b" "echo ${a} > $out";
in build "c" "mkdir $out; echo ${a} ${b} $out > $out/all"
"#;

impl Machine {
    pub fn new(trusted: &[&str]) -> Machine {
        let machine = Machine {
            root: TempDir::new().unwrap(),
            trusted: trusted.iter().map(|key| (*key).to_owned()).collect(),
            authority: None,
        };
        machine.nix("nix-store", &["--init"]);
        machine
    }

    pub fn folder(&self) -> &Path {
        self.root.path()
    }

    pub fn real(&self, path: &str) -> PathBuf {
        self.folder().join(path.trim_start_matches('/'))
    }

    /// Lets Nix use a token on this host, as `netrc-file` has it.
    pub fn login(&self, token: &str) {
        let text = format!("machine 127.0.0.1\nlogin x\npassword {token}\n");
        fs::write(self.folder().join("netrc"), text).unwrap();
    }

    pub fn try_nix(&self, program: &str, arguments: &[&str]) -> Output {
        let sandbox_paths = ["/bin", "/usr", "/lib", "/lib64"]
            .into_iter()
            .filter(|path| Path::new(path).exists());
        let sandbox_paths: Vec<_> = sandbox_paths.collect();
        let mut command = Command::new(program);
        if let Some(authority) = &self.authority {
            // The only way to tell 2.8.
            command.env("NIX_SSL_CERT_FILE", authority);
        }
        command
            .args(arguments)
            .args(["--store", self.folder().to_str().unwrap()])
            .env("HOME", self.folder())
            .env("XDG_CACHE_HOME", self.folder().join("cache"))
            .env_remove("NIX_REMOTE")
            .env_remove("NIX_PATH")
            .env("NIX_CONF_DIR", self.folder())
            .env(
                "NIX_CONFIG",
                format!(
                    "experimental-features = nix-command\nbuild-users-group =\nsubstituters =\n\
                     trusted-public-keys = {}\nnetrc-file = {}/netrc\nnarinfo-cache-negative-ttl = 0\n\
                     narinfo-cache-positive-ttl = 0\nsandbox = true\nsandbox-fallback = false\nsandbox-paths = {}\n",
                    self.trusted.join(" "),
                    self.folder().display(),
                    sandbox_paths.join(" "),
                ),
            )
            .output()
            .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"))
    }

    pub fn nix(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_nix(program, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Builds [`CLOSURE`] and returns its paths, the top one last.
    pub fn build(&self) -> Vec<String> {
        let file = self.folder().join("closure.nix");
        fs::write(&file, CLOSURE).unwrap();
        let top = self.nix("nix-build", &["--no-out-link", file.to_str().unwrap()]);
        let closure = self.nix("nix-store", &["--query", "--requisites", &top]);
        let closure: Vec<_> = closure.lines().map(str::to_owned).collect();
        assert_eq!(closure.len(), 3);
        assert_eq!(closure[2], top);
        closure
    }

    pub fn is_valid(&self, path: &str) -> bool {
        self.try_nix("nix-store", &["--check-validity", path])
            .status
            .success()
    }

    /// The NAR of a path, as Nix itself makes it.
    pub fn nar(&self, path: &str) -> Vec<u8> {
        let dumped = Command::new("nix-store")
            .arg("--dump")
            .arg(self.real(path))
            .output();
        dumped.unwrap().stdout
    }
}

/// The 32 characters by which a path is looked up.
pub fn hash(path: &str) -> &str {
    &path["/nix/store/".len()..][..32]
}

/// A path that no Nix made, for what needs many or strange ones.
pub struct Sample {
    pub path: String,
    pub nar: Vec<u8>,
    pub references: Vec<String>,
}

impl Sample {
    /// A file of that many bytes, of which the number decides every one.
    pub fn new(number: u64, bytes: usize) -> Sample {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut contents = Vec::with_capacity(bytes + 8);
        while contents.len() < bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Half of it compresses.
            contents.extend_from_slice(&(state & 0xffff_ffff).to_le_bytes());
        }
        contents.truncate(bytes);
        let tree = granary_protocol::nar::Tree::Regular {
            executable: false,
            contents,
        };
        let digest = granary_protocol::hash::sha256(&number.to_le_bytes());
        let hash = granary_protocol::nix32::encode(&digest[..20]);
        Sample {
            path: format!("/nix/store/{hash}-sample-{number}"),
            nar: tree.nar().unwrap(),
            references: Vec::new(),
        }
    }

    pub fn hash(&self) -> &str {
        hash(&self.path)
    }

    pub fn nar_hash(&self) -> granary_protocol::hash::NarHash {
        granary_protocol::hash::NarHash::from_bytes(granary_protocol::hash::sha256(&self.nar))
    }

    /// What Attic's client says about it.
    pub fn metadata(&self, cache: &str) -> serde_json::Value {
        let hash = granary_protocol::hash::Hash::from(self.nar_hash());
        serde_json::json!({
            "cache": cache,
            "store_path_hash": self.hash(),
            "store_path": self.path,
            "references": self.references,
            "system": null,
            "deriver": null,
            "sigs": [],
            "ca": null,
            "nar_hash": hash.to_base16(),
            "nar_size": self.nar.len(),
        })
    }
}

impl Rig {
    /// Pushes a sample as Attic's client does.
    pub fn upload(&self, token: &str, cache: &str, sample: &Sample) -> Answer {
        self.upload_as(token, &sample.metadata(cache), &sample.nar)
    }

    pub fn upload_as(&self, token: &str, metadata: &serde_json::Value, nar: &[u8]) -> Answer {
        let (metadata, token) = (metadata.to_string(), bearer(token));
        let headers = [
            ("Authorization", token.as_str()),
            ("X-Attic-Nar-Info", &metadata),
        ];
        self.ask("PUT", "/_api/v1/upload-path", &headers, nar)
    }
}
