//! Authority: certificates that count beside the system's, for an anchor with a name that only this
//! network knows.
//!
//! Read once, where a client is made; a client that is made later reads the file again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use reqwest::{Certificate, Client, ClientBuilder};
use rustls::InvalidMessage;
use tracing::warn;

/// Largest file read: the bundle of a whole system has some 250 KiB.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Certificates beside the system's; `Clone` is cheap enough for a client.
#[derive(Clone, Debug, Default)]
pub struct Authorities(Vec<Certificate>);

/// Why there are no such certificates.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot read the certificates {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the certificates {path} have {size} bytes, at most {FILE_BYTES_MAX} are read", path = .path.display())]
    TooLarge { path: PathBuf, size: u64 },
    #[error("{path} is malformed: {source}", path = .path.display())]
    Malformed {
        path: PathBuf,
        source: reqwest::Error,
    },
    #[error("there is no certificate in {path}, PEM is expected", path = .path.display())]
    Empty { path: PathBuf },
}

impl Authorities {
    /// Reads the certificates of a file (PEM); none without a file. Blocks.
    pub fn read(file: Option<&Path>) -> Result<Authorities, AuthorityError> {
        let Some(path) = file else {
            return Ok(Authorities::default());
        };
        let failed = |source| AuthorityError::Read {
            path: path.to_owned(),
            source,
        };
        let size = fs::metadata(path).map_err(failed)?.len();
        if size > FILE_BYTES_MAX {
            return Err(AuthorityError::TooLarge {
                path: path.to_owned(),
                size,
            });
        }
        let pem = fs::read(path).map_err(failed)?;
        let certificates = Certificate::from_pem_bundle(&pem);
        let certificates = certificates.map_err(|source| AuthorityError::Malformed {
            path: path.to_owned(),
            source,
        })?;
        match certificates.is_empty() {
            true => Err(AuthorityError::Empty {
                path: path.to_owned(),
            }),
            false => Ok(Authorities(certificates)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes a client out of what `begin` begins, which trusts them beside the system's.
    ///
    /// Where the system has none either, as a bare container, nobody is trusted: https fails when it is used,
    /// and what speaks HTTP goes on. A node that does not start would be worse.
    pub fn client(&self, begin: impl Fn() -> ClientBuilder) -> Result<Client, reqwest::Error> {
        if !self.is_empty() {
            return begin().tls_certs_merge(self.0.iter().cloned()).build();
        }
        begin().build().or_else(|error| {
            let client = begin().tls_certs_only([]).build()?;
            warn!(%error, "found no certificate authorities on this system; https will be refused");
            Ok(client)
        })
    }
}

/// Whether a request over https failed because the other end speaks HTTP without TLS.
///
/// rustls says that of a first record of no known kind, in words that tell a person nothing.
pub fn speaks_no_tls(error: &reqwest::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) =
            error.downcast_ref()
        {
            return true;
        }
        // An I/O error names as its source what the error in it has for one, and not that error itself.
        let held = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        cause = match held {
            Some(held) => Some(held),
            None => error.source(),
        };
    }
    false
}

/// Whether nobody on the way can change what comes from there.
pub fn is_safe(url: &reqwest::Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = host
        .parse::<std::net::IpAddr>()
        .is_ok_and(|ip| ip.is_loopback());
    url.scheme() == "https" || url.scheme() == "http" && (is_loopback || host == "localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_no_certificate_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let problem = || Authorities::read(Some(&file)).unwrap_err().to_string();
        assert!(problem().contains("ca.pem: No such file"), "{}", problem());
        fs::write(&file, "no certificate").unwrap();
        assert!(problem().contains("there is no certificate in"));
        let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
        fs::write(&file, broken).unwrap();
        assert!(problem().contains("is malformed"), "{}", problem());
        fs::File::create(&file)
            .unwrap()
            .set_len(FILE_BYTES_MAX + 1)
            .unwrap();
        assert!(problem().contains("at most 4194304"), "{}", problem());
        assert!(Authorities::read(None).unwrap().is_empty());
    }

    #[test]
    fn what_is_neither_https_nor_on_loopback_is_not_safe() {
        for (url, expected) in [
            ("https://issuer.example/keys", true),
            ("http://127.0.0.1:1/keys", true),
            ("http://[::1]:1/keys", true),
            ("http://localhost/keys", true),
            ("http://issuer.example/keys", false),
            ("http://127.0.0.1.example/keys", false),
            ("http://10.0.0.1/keys", false),
            ("file:///keys", false),
        ] {
            assert_eq!(
                is_safe(&reqwest::Url::parse(url).unwrap()),
                expected,
                "{url}"
            );
        }
    }
}
