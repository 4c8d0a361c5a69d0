//! TLS: the anchor's certificate, shown to every client, and a new one as soon as its files change.
//!
//! Two PEM files, as ACME clients write them: the chain, leaf first, and the leaf's private key. They
//! are looked at every [`RENEWAL_INTERVAL`]; a pair that cannot be used is told once, and the one before
//! it stays. Clients choose HTTP/2 or HTTP/1.1 by ALPN.
//!
//! Not the members' TLS ([`crate::serve::tls`]), whose certificates are identities: here it is the
//! host's name that a client checks, by authorities of its own.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

use crate::secret::is_credential;

/// How often the files are looked at. Certificates are renewed weeks before they expire; this is for the
/// person who waits for the one that was put there just now.
pub const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);

/// How long a client may take to agree on keys, behind bad Wi-Fi and to a machine under load.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest file read; a chain of four RSA certificates has some 8 KiB.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// Permission bits that a private key must not have. A group may read it: ACME clients give theirs to one.
const FOREIGN_PERMISSIONS: u32 = 0o007;

pub const HTTP_2: &[u8] = b"h2";
const HTTP_1: &[u8] = b"http/1.1";

/// What is read of a request in the clear, so that its sender hears the answer before the connection ends.
const CLEAR_BYTES_MAX: u64 = 256 * 1024;

/// Where certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read the {what} {path}: {source}", path = .path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("the {what} {path} has {size} bytes, at most {FILE_BYTES_MAX} are read", path = .path.display())]
    TooLarge {
        what: &'static str,
        path: PathBuf,
        size: u64,
    },
    #[error("the private key {path} has mode {mode:04o}, others may read it, refusing to use it; run chmod o-rwx {path}", path = .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the {what} {path} is malformed: {source}", path = .path.display())]
    Malformed {
        what: &'static str,
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    #[error("there is no certificate in {path}", path = .path.display())]
    Empty { path: PathBuf },
    #[error("the certificate {certificate} and the private key {key} cannot be used together: {source}", certificate = .files.certificate.display(), key = .files.key.display())]
    Pair { files: Files, source: rustls::Error },
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
}

/// What tells one state of the files from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp([(u64, i64, i64, u64); 2]);

/// Speaks TLS with the certificate of the moment.
pub struct Tls {
    files: Files,
    acceptor: TlsAcceptor,
    current: Arc<Current>,
    /// The files that were read last, whatever came of it; `None` when they could not be looked at.
    seen: Mutex<Option<Stamp>>,
}

struct Current(RwLock<Arc<CertifiedKey>>);

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Current")
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(
            self.0
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        )
    }
}

impl Tls {
    /// Reads certificate and key. Blocks.
    pub fn open(files: Files) -> Result<Tls, TlsError> {
        // Before the files, so that what changes meanwhile is seen as a change.
        let seen = stamp(&files).ok();
        let pair = read_pair(&files)?;
        let current = Arc::new(Current(RwLock::new(Arc::new(pair))));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![HTTP_2.to_vec(), HTTP_1.to_vec()];
        Ok(Tls {
            files,
            acceptor: TlsAcceptor::from(Arc::new(config)),
            current,
            seen: Mutex::new(seen),
        })
    }

    /// The file with the chain, for the log.
    pub fn certificate(&self) -> &Path {
        &self.files.certificate
    }

    /// Agrees on keys with a client. One that speaks HTTP in the clear hears so in its own language.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let agreed = async {
            let mut first = [0];
            // A record of TLS begins with 22, a request with a letter.
            if stream.peek(&mut first).await? == 1 && first[0].is_ascii_alphabetic() {
                say_that_tls_is_spoken(stream).await?;
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it speaks HTTP without TLS",
                ));
            }
            self.acceptor.accept(stream).await
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, agreed).await?
    }

    /// Takes the certificate that is in the files, if they changed since they were read; `false` when they
    /// did not. Blocks.
    ///
    /// # Errors
    /// For each state of the files once: half of a renewal is such a state.
    pub fn renew(&self) -> Result<bool, TlsError> {
        let found = stamp(&self.files);
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let is_known = *seen == found.as_ref().ok().copied();
            if is_known {
                return Ok(false);
            }
            *seen = found.as_ref().ok().copied();
        }
        found?;
        let pair = Arc::new(read_pair(&self.files)?);
        *self
            .current
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner) = pair;
        Ok(true)
    }
}

fn stamp(files: &Files) -> Result<Stamp, TlsError> {
    let of = |what, path: &Path| {
        let metadata = fs::metadata(path).map_err(|source| TlsError::Read {
            what,
            path: path.to_owned(),
            source,
        })?;
        Ok::<_, TlsError>((
            metadata.ino(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.len(),
        ))
    };
    Ok(Stamp([
        of("certificate", &files.certificate)?,
        of("private key", &files.key)?,
    ]))
}

fn read_pair(files: &Files) -> Result<CertifiedKey, TlsError> {
    let malformed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Malformed { what, path, source }
    };
    let pem = read_file("certificate", &files.certificate)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(malformed("certificate", &files.certificate))?;
    if chain.is_empty() {
        return Err(TlsError::Empty {
            path: files.certificate.clone(),
        });
    }
    let mode = fs::metadata(&files.key).map_err(|source| TlsError::Read {
        what: "private key",
        path: files.key.clone(),
        source,
    })?;
    let mode = mode.permissions().mode();
    if mode & FOREIGN_PERMISSIONS != 0 && !is_credential(&files.key) {
        return Err(TlsError::Exposed {
            path: files.key.clone(),
            mode: mode & 0o7777,
        });
    }
    let pem = read_file("private key", &files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(malformed("private key", &files.key))?;
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()).map_err(|source| {
        TlsError::Pair {
            files: files.clone(),
            source,
        }
    })
}

fn read_file(what: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let failed = |source| TlsError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > FILE_BYTES_MAX {
        return Err(TlsError::TooLarge {
            what,
            path: path.to_owned(),
            size,
        });
    }
    fs::read(path).map(Zeroizing::new).map_err(failed)
}

/// Answers a request that came in the clear, as the anchor refuses others.
async fn say_that_tls_is_spoken(mut stream: TcpStream) -> io::Result<()> {
    let body = "{\"code\":400,\"error\":\"TlsExpected\",\"message\":\"this anchor speaks TLS: write https:// for http:// in its address\"}\n";
    let head = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + body).as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(CLEAR_BYTES_MAX);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn files(folder: &Path) -> Files {
        Files {
            certificate: folder.join("tls.pem"),
            key: folder.join("tls.key"),
        }
    }

    /// A certificate for a name, and its key, as PEM.
    fn pair(name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// As ACME clients do it: beside, then over the old one.
    fn put(file: &Path, text: &str, mode: u32) {
        let beside = file.with_extension("new");
        fs::write(&beside, text).unwrap();
        fs::set_permissions(&beside, fs::Permissions::from_mode(mode)).unwrap();
        fs::rename(&beside, file).unwrap();
    }

    fn shown(tls: &Tls) -> Vec<u8> {
        let current = tls.current.0.read().unwrap();
        current.cert[0].to_vec()
    }

    #[test]
    fn a_renewed_certificate_is_taken_once_both_halves_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let (old, new) = (pair("old"), pair("new"));
        put(&files.certificate, &old.0, 0o644);
        put(&files.key, &old.1, 0o600);
        let tls = Tls::open(files.clone()).unwrap();
        let first = shown(&tls);
        assert!(!tls.renew().unwrap());
        put(&files.certificate, &new.0, 0o644);
        let half = tls.renew().unwrap_err();
        assert!(matches!(half, TlsError::Pair { .. }), "{half}");
        // Told once.
        assert!(!tls.renew().unwrap());
        assert_eq!(shown(&tls), first);
        put(&files.key, &new.1, 0o600);
        assert!(tls.renew().unwrap());
        assert_ne!(shown(&tls), first);
        assert!(!tls.renew().unwrap());
        fs::remove_file(&files.key).unwrap();
        assert!(tls.renew().is_err());
        assert!(!tls.renew().unwrap());
    }

    #[test]
    fn a_pair_that_cannot_be_used_is_refused_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let problem = || match Tls::open(files.clone()) {
            Ok(_) => "none".to_owned(),
            Err(error) => error.to_string(),
        };
        let (certificate, key) = pair("one");
        assert!(problem().contains("tls.pem: No such file"), "{}", problem());
        put(&files.certificate, "nothing", 0o644);
        assert!(problem().contains("no certificate in"), "{}", problem());
        put(&files.certificate, &certificate, 0o644);
        assert!(problem().contains("tls.key: No such file"), "{}", problem());
        put(&files.key, &key, 0o644);
        assert!(problem().contains("mode 0644"), "{}", problem());
        put(&files.key, "nothing", 0o600);
        assert!(problem().contains("tls.key is malformed"), "{}", problem());
        put(&files.key, &pair("other").1, 0o600);
        assert!(
            problem().contains("cannot be used together"),
            "{}",
            problem()
        );
        put(&files.key, &key, 0o640);
        assert_eq!(problem(), "none");
    }
}
