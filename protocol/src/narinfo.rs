//! Narinfo: what a binary cache says about one store path.
//!
//! Text of `Key: value` lines; Nix manual, protocols/binary-cache/narinfo. [`NarInfo::parse`] follows
//! the algorithm of `libstore/nar-info.cc` byte by byte, so that we read what Nix reads;
//! [`NarInfo::to_text`] prints the one form that every client since 2.3 accepts. For Nix a malformed
//! narinfo is not a miss but the end of the build, so nothing that we received is passed on as
//! text: it is parsed and printed again.
//!
//! Parsing proves form only. [`VerifiedNarInfo::verify`] proves that a trusted key signed the
//! [`Fingerprint`] or that the path follows from its content; nothing unverified leaves this node.

mod proof;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::content_address::{ContentAddress, ContentAddressError};
use crate::hash::{FileHash, Hash, HashError, NarHash, excerpt};
use crate::signature::{SecretKey, Signature};
use crate::store_path::{StoreDir, StorePath, StorePathError, StorePathHash};

pub use proof::{FalseContentAddress, Proof, Unverified, VerifiedNarInfo};

/// Longest text we parse: room for more than 10,000 references of usual length. Beyond it, an error.
pub const NARINFO_BYTES_MAX: usize = 1024 * 1024;

/// Most references of one path; with usual names [`NARINFO_BYTES_MAX`] is reached earlier.
pub const REFERENCES_MAX: usize = 16 * 1024;

/// Most well-formed signatures of one path. Verifying costs time, so a flood is refused, not sifted.
pub const SIGNATURES_MAX: usize = 64;

/// What a cache says about one store path, grouped by who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    // Covered by signatures, through the fingerprint.
    pub store_path: StorePath,
    pub nar_hash: NarHash,
    /// Bytes of the uncompressed NAR; never 0 in a parsed narinfo.
    pub nar_size: u64,
    /// May contain `store_path` itself.
    pub references: BTreeSet<StorePath>,

    // Said by this cache about this copy; whoever passes the NAR on writes its own.
    /// Relative to the cache, or absolute; never empty in a parsed narinfo.
    pub url: String,
    pub compression: Compression,
    /// `None` also for a hash other than SHA-256, which Nix permits and nobody emits.
    pub file_hash: Option<FileHash>,
    pub file_size: Option<u64>,

    // Covered by nothing: true if the cache is honest.
    pub deriver: Option<StorePath>,
    /// Provable: see [`NarInfo::verify_content_address`].
    pub ca: Option<ContentAddress>,

    /// Well-formed signatures in the order found, each once.
    pub signatures: Vec<Signature>,
    /// How many `Sig` lines were malformed and left out; never printed.
    pub dropped_signatures: usize,
}

/// How the file behind a narinfo's URL is packed: every label that Nix gives to its decompressors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compression {
    None,
    Xz,
    Bzip2,
    Gzip,
    Zstd,
    Brotli,
    Lz4,
    Lzip,
    Lzma,
    Compress,
    Grzip,
    Lrzip,
    Lzop,
}

impl Compression {
    const ALL: [Compression; 13] = {
        use Compression::*;
        [
            None, Xz, Bzip2, Gzip, Zstd, Brotli, Lz4, Lzip, Lzma, Compress, Grzip, Lrzip, Lzop,
        ]
    };

    /// Returns the label in the `Compression` line.
    pub const fn label(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Xz => "xz",
            Compression::Bzip2 => "bzip2",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
            Compression::Brotli => "br",
            Compression::Lz4 => "lz4",
            Compression::Lzip => "lzip",
            Compression::Lzma => "lzma",
            Compression::Compress => "compress",
            Compression::Grzip => "grzip",
            Compression::Lrzip => "lrzip",
            Compression::Lzop => "lzop",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl FromStr for Compression {
    type Err = NarInfoError;

    fn from_str(label: &str) -> Result<Self, NarInfoError> {
        Compression::ALL
            .into_iter()
            .find(|compression| compression.label() == label)
            .ok_or_else(|| NarInfoError::Compression {
                label: excerpt(label),
            })
    }
}

/// Why a text is no narinfo. Offsets are bytes from its start.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NarInfoError {
    #[error("narinfo has {bytes} bytes, more than the {NARINFO_BYTES_MAX} we read")]
    TooLong { bytes: usize },
    #[error("line of narinfo at byte {offset} has no ':'")]
    Colon { offset: usize },
    #[error("line of narinfo at byte {offset} does not end")]
    LineEnd { offset: usize },
    #[error("{field} of narinfo starts within a character")]
    Utf8 { field: &'static str },
    #[error("narinfo has no {field}")]
    Missing { field: &'static str },
    #[error("narinfo has a second {field}")]
    Repeated { field: &'static str },
    #[error("{field} of narinfo is not valid")]
    StorePath {
        field: &'static str,
        source: StorePathError,
    },
    #[error("{field} of narinfo is not valid")]
    Hash {
        field: &'static str,
        source: HashError,
    },
    #[error("{field} of narinfo is {text:?}, which is no size in bytes")]
    Size { field: &'static str, text: String },
    #[error("url of narinfo {text:?} contains a control character")]
    Url { text: String },
    #[error("compression of narinfo {label:?} is unknown")]
    Compression { label: String },
    #[error("content address of narinfo is not valid")]
    ContentAddress { source: ContentAddressError },
    #[error("narinfo has more than {REFERENCES_MAX} references")]
    TooManyReferences,
    #[error("narinfo has more than {SIGNATURES_MAX} signatures")]
    TooManySignatures,
}

impl NarInfo {
    /// Reads a narinfo exactly as Nix does, within our limits.
    ///
    /// Order is free, unknown fields are ignored, of a repeated field the last counts (a second
    /// `CA` or non-empty `References` is an error). One difference, out of mercy with a bad cache:
    /// malformed signatures are counted and left out, where Nix would fail the build.
    ///
    /// # Errors
    /// [`NarInfoError`] names the field. A narinfo of another store is an error too.
    pub fn parse(text: &str, dir: &StoreDir) -> Result<NarInfo, NarInfoError> {
        if text.len() > NARINFO_BYTES_MAX {
            return Err(NarInfoError::TooLong { bytes: text.len() });
        }
        let mut fields = Fields::default();
        let mut offset = 0;
        while offset < text.len() {
            let line = &text.as_bytes()[offset..];
            let colon = line
                .iter()
                .position(|b| *b == b':')
                .ok_or(NarInfoError::Colon { offset })?;
            // Nix skips the byte after the colon without a look: "References:\n" swallows a line.
            let start = colon + 2;
            let rest = line.get(start..).ok_or(NarInfoError::LineEnd { offset })?;
            let length = rest
                .iter()
                .position(|b| *b == b'\n')
                .ok_or(NarInfoError::LineEnd { offset })?;
            fields.read(&line[..colon], &rest[..length], dir)?;
            offset += start + length + 1;
        }
        fields.into_narinfo()
    }

    /// Prints the form that every client accepts, ending in exactly one newline.
    ///
    /// Always with `Compression` and `References: `; hashes in nix32; no `Deriver` when unknown.
    /// Control characters in the URL, which parsing refuses, are percent-encoded, so no field can
    /// begin a line of its own.
    pub fn to_text(&self, dir: &StoreDir) -> String {
        Text { narinfo: self, dir }.to_string()
    }

    /// Returns what signatures of this narinfo sign.
    pub fn fingerprint(&self, dir: &StoreDir) -> Fingerprint {
        let references: Vec<String> = self
            .references
            .iter()
            .map(|path| dir.display(path))
            .collect();
        Fingerprint(format!(
            "1;{};{};{};{}",
            dir.display(&self.store_path),
            self.nar_hash,
            self.nar_size,
            references.join(",")
        ))
    }

    /// Adds this key's signature, unless it is there already.
    pub fn sign(&mut self, key: &SecretKey, dir: &StoreDir) {
        let signature = key.sign(self.fingerprint(dir).as_bytes());
        if !self.signatures.contains(&signature) {
            self.signatures.push(signature);
        }
    }
}

/// The fields as far as they have been read.
#[derive(Default)]
struct Fields {
    store_path: Option<StorePath>,
    nar_hash: Option<NarHash>,
    nar_size: Option<u64>,
    references: BTreeSet<StorePath>,
    url: String,
    compression: Option<Compression>,
    file_hash: Option<FileHash>,
    file_size: Option<u64>,
    deriver: Option<StorePath>,
    ca: Option<ContentAddress>,
    signatures: Vec<Signature>,
    dropped_signatures: usize,
}

impl Fields {
    /// Takes one line. Bytes, because the skipped one may have been half a character.
    fn read(&mut self, name: &[u8], value: &[u8], dir: &StoreDir) -> Result<(), NarInfoError> {
        let Some(field) = FIELDS.into_iter().find(|field| field.as_bytes() == name) else {
            return Ok(());
        };
        let value = str::from_utf8(value).map_err(|_| NarInfoError::Utf8 { field })?;
        match field {
            "StorePath" => {
                let path = dir.parse_path(value);
                self.store_path =
                    Some(path.map_err(|source| NarInfoError::StorePath { field, source })?);
            }
            "URL" => {
                if value.contains(char::is_control) {
                    return Err(NarInfoError::Url {
                        text: excerpt(value),
                    });
                }
                value.clone_into(&mut self.url);
            }
            "Compression" => {
                self.compression = if value.is_empty() {
                    None
                } else {
                    Some(value.parse()?)
                }
            }
            "FileHash" => {
                let hash = prefixed_hash(field, value)?;
                self.file_hash = FileHash::try_from(hash).ok();
            }
            "FileSize" => self.file_size = Some(size(field, value)?),
            "NarHash" => {
                let hash = NarHash::try_from(prefixed_hash(field, value)?);
                self.nar_hash = Some(hash.map_err(|source| NarInfoError::Hash { field, source })?);
            }
            "NarSize" => self.nar_size = Some(size(field, value)?),
            "References" => self.read_references(field, value)?,
            "Deriver" if value == "unknown-deriver" => {}
            "Deriver" => {
                let path = StorePath::from_base_name(value);
                self.deriver =
                    Some(path.map_err(|source| NarInfoError::StorePath { field, source })?);
            }
            "Sig" => self.read_signature(value)?,
            "CA" if self.ca.is_some() => return Err(NarInfoError::Repeated { field }),
            "CA" if value.is_empty() => {}
            "CA" => {
                self.ca = Some(
                    value
                        .parse()
                        .map_err(|source| NarInfoError::ContentAddress { source })?,
                )
            }
            _ => unreachable!("{field} is one of FIELDS"),
        }
        Ok(())
    }

    fn read_references(&mut self, field: &'static str, value: &str) -> Result<(), NarInfoError> {
        if !self.references.is_empty() {
            return Err(NarInfoError::Repeated { field });
        }
        for base_name in value.split(' ').filter(|base_name| !base_name.is_empty()) {
            let path = StorePath::from_base_name(base_name);
            self.references
                .insert(path.map_err(|source| NarInfoError::StorePath { field, source })?);
            if self.references.len() > REFERENCES_MAX {
                return Err(NarInfoError::TooManyReferences);
            }
        }
        Ok(())
    }

    fn read_signature(&mut self, value: &str) -> Result<(), NarInfoError> {
        match value.parse() {
            Ok(signature) if self.signatures.contains(&signature) => {}
            Ok(_) if self.signatures.len() == SIGNATURES_MAX => {
                return Err(NarInfoError::TooManySignatures);
            }
            Ok(signature) => self.signatures.push(signature),
            Err(_) => self.dropped_signatures += 1,
        }
        Ok(())
    }

    fn into_narinfo(self) -> Result<NarInfo, NarInfoError> {
        let missing = |field| NarInfoError::Missing { field };
        if self.url.is_empty() {
            return Err(missing("URL"));
        }
        Ok(NarInfo {
            store_path: self.store_path.ok_or(missing("StorePath"))?,
            nar_hash: self.nar_hash.ok_or(missing("NarHash"))?,
            nar_size: self
                .nar_size
                .filter(|bytes| *bytes > 0)
                .ok_or(missing("NarSize"))?,
            references: self.references,
            url: self.url,
            // Nix takes a missing label for bzip2.
            compression: self.compression.unwrap_or(Compression::Bzip2),
            file_hash: self.file_hash,
            file_size: self.file_size,
            deriver: self.deriver,
            ca: self.ca,
            signatures: self.signatures,
            dropped_signatures: self.dropped_signatures,
        })
    }
}

/// Every field that we read; Nix before 2.11 also reads `System`, and does nothing with it.
const FIELDS: [&str; 11] = [
    "StorePath",
    "URL",
    "Compression",
    "FileHash",
    "FileSize",
    "NarHash",
    "NarSize",
    "References",
    "Deriver",
    "Sig",
    "CA",
];

fn prefixed_hash(field: &'static str, value: &str) -> Result<Hash, NarInfoError> {
    value
        .parse()
        .map_err(|source| NarInfoError::Hash { field, source })
}

/// Reads decimal digits, with the leading `+` that Nix lets pass.
fn size(field: &'static str, value: &str) -> Result<u64, NarInfoError> {
    value.parse().map_err(|_| NarInfoError::Size {
        field,
        text: excerpt(value),
    })
}

/// A narinfo with the store it is printed for.
struct Text<'a> {
    narinfo: &'a NarInfo,
    dir: &'a StoreDir,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NarInfo {
            store_path,
            nar_hash,
            nar_size,
            compression,
            ..
        } = self.narinfo;
        writeln!(f, "StorePath: {}/{store_path}", self.dir)?;
        f.write_str("URL: ")?;
        for character in self.narinfo.url.chars() {
            match character.is_control() {
                true => character
                    .encode_utf8(&mut [0; 4])
                    .bytes()
                    .try_for_each(|byte| write!(f, "%{byte:02X}"))?,
                false => write!(f, "{character}")?,
            }
        }
        writeln!(f, "\nCompression: {compression}")?;
        if let Some(file_hash) = &self.narinfo.file_hash {
            writeln!(f, "FileHash: {file_hash}")?;
        }
        if let Some(file_size) = self.narinfo.file_size {
            writeln!(f, "FileSize: {file_size}")?;
        }
        writeln!(f, "NarHash: {nar_hash}\nNarSize: {nar_size}")?;
        // The space stays when there are none: every client skips it unseen.
        f.write_str("References:")?;
        if self.narinfo.references.is_empty() {
            f.write_str(" ")?;
        }
        for reference in &self.narinfo.references {
            write!(f, " {reference}")?;
        }
        f.write_str("\n")?;
        if let Some(deriver) = &self.narinfo.deriver {
            writeln!(f, "Deriver: {deriver}")?;
        }
        for signature in &self.narinfo.signatures {
            writeln!(f, "Sig: {signature}")?;
        }
        if let Some(ca) = &self.narinfo.ca {
            writeln!(f, "CA: {ca}")?;
        }
        Ok(())
    }
}

/// What a signature signs: `1;<path>;<nar hash>;<nar size>;<references>`, full paths, sorted.
///
/// URL, compression, file hash and size, deriver and content address are not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(String);

impl Fingerprint {
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the URL under which every node serves this NAR, relative to the cache.
///
/// It says all there is to know, so it is the same from every peer and stays true over restarts:
/// clients remember it for 30 days. No colon, no leading slash, no query.
pub fn nar_url(store_path_hash: &StorePathHash, nar_hash: &NarHash) -> String {
    format!("nar/{store_path_hash}-{}.nar", nar_hash.nix32())
}

/// What a NAR's URL says about the NAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NarUrl {
    pub store_path_hash: StorePathHash,
    /// `None` in the oldest form, which means whatever NAR the path has.
    pub nar_hash: Option<NarHash>,
}

impl NarUrl {
    /// Reads ours (`<path hash>-<nar hash>.nar`), harmonia's (`<nar hash>.nar?hash=<path hash>`) and
    /// nix-serve's (`<path hash>.nar`), each with or without `nar/` in front.
    ///
    /// `None` for anything else, such as a name for a compressed file.
    pub fn parse(url: &str) -> Option<NarUrl> {
        let url = url.strip_prefix("nar/").unwrap_or(url);
        if let Some((file, store_path_hash)) = url.split_once("?hash=") {
            let nar_hash = NarHash::from_nix32(file.strip_suffix(".nar")?).ok()?;
            return Some(NarUrl {
                store_path_hash: store_path_hash.parse().ok()?,
                nar_hash: Some(nar_hash),
            });
        }
        let stem = url.strip_suffix(".nar")?;
        let Some((store_path_hash, nar_hash)) = stem.split_once('-') else {
            return Some(NarUrl {
                store_path_hash: stem.parse().ok()?,
                nar_hash: None,
            });
        };
        let nar_hash = NarHash::from_nix32(nar_hash).ok()?;
        Some(NarUrl {
            store_path_hash: store_path_hash.parse().ok()?,
            nar_hash: Some(nar_hash),
        })
    }
}
