//! The build trace: which output a content-addressed derivation turned out to have.
//!
//! Nix keeps it beside the valid paths when its experimental feature `ca-derivations` is on, in
//! tables of two generations: `Realisations` (Nix 2.4 to 2.34 and Lix), keyed by a hash of the
//! derivation, and `BuildTraceV3` (2.35), keyed by the derivation itself. A store has either, both
//! or neither; a table that is missing is an entry that is missing.

use std::{collections::BTreeMap, fmt, str::FromStr};

use granary_protocol::{
    hash::{Hash, HashAlgorithm},
    signature::Signature,
    store_path::StorePath,
};
use rusqlite::{OptionalExtension, params};

use super::{Database, StoreError, database::Open};

/// Bytes of an output's name; Nix puts it into a store path's name, which has at most 211.
const OUTPUT_NAME_BYTES_MAX: usize = 211;

/// Realisations that one depends on, at most. Nix 2.4 to 2.34 ask for each of them in turn.
const DEPENDENT_MAX: usize = 4096;

/// The name of a derivation's output, such as `out`: letters, digits and `+-._?=`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OutputName(String);

/// Why a text names no output.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not the name of an output")]
pub struct OutputNameError {
    text: String,
}

/// What Nix 2.4 to 2.34 call a realisation's id: `sha256:<base 16>!<output>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RealisationId {
    /// Of the derivation, modulo the hashes of its inputs.
    pub derivation: Hash,
    pub output: OutputName,
}

/// An entry of the older table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Realisation {
    pub output: StorePath,
    pub signatures: Vec<Signature>,
    /// Ids of the realisations that the build used, and what they were then.
    pub dependent: BTreeMap<String, StorePath>,
}

/// An entry of the newer table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    pub output: StorePath,
    pub signatures: Vec<Signature>,
}

impl Database {
    /// Returns what the older table says of one output.
    pub async fn realisation(&self, id: RealisationId) -> Result<Option<Realisation>, StoreError> {
        let derivation = id.derivation.to_base16();
        let output = id.output.0;
        self.run(move |open, _| {
            if !open.has_table("Realisations")? {
                return Ok(None);
            }
            let sql = "SELECT Realisations.id, path, signatures FROM Realisations \
                       JOIN ValidPaths ON outputPath = ValidPaths.id \
                       WHERE drvPath = ? AND outputName = ?";
            let mut statement = open.connection.prepare_cached(sql)?;
            let row = statement
                .query_row(params![derivation, output], |row| {
                    Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?))
                })
                .optional()?;
            let Some((number, path, signatures)) = row else {
                return Ok(None);
            };
            let Some(entry) = open.trace_entry(path, signatures) else {
                return Ok(None);
            };
            Ok(open
                .dependent_realisations(number)?
                .map(|dependent| Realisation {
                    output: entry.output,
                    signatures: entry.signatures,
                    dependent,
                }))
        })
        .await
    }

    /// Returns what the newer table says of one output.
    pub async fn trace_entry(
        &self,
        derivation: StorePath,
        output: OutputName,
    ) -> Result<Option<TraceEntry>, StoreError> {
        self.run(move |open, _| {
            if !open.has_table("BuildTraceV3")? {
                return Ok(None);
            }
            // Nix leaves a row behind when its output is collected, and makes no second one.
            let sql = "SELECT outputPath, signatures FROM BuildTraceV3 \
                       JOIN ValidPaths ON path = outputPath WHERE drvPath = ? AND outputName = ?";
            let mut statement = open.connection.prepare_cached(sql)?;
            let row = statement
                .query_row(params![derivation.base_name(), output.0], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            Ok(row.and_then(|(path, signatures)| open.trace_entry(path, signatures)))
        })
        .await
    }
}

impl Open<'_> {
    fn has_table(&self, name: &str) -> rusqlite::Result<bool> {
        let sql = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?";
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.exists([name])
    }

    /// `None` when the row is malformed: a client takes such an entry for an error.
    fn trace_entry(&self, path: String, signatures: Option<String>) -> Option<TraceEntry> {
        Some(TraceEntry {
            output: self.config.dir.parse_path(&path).ok()?,
            signatures: signatures
                .unwrap_or_default()
                .split_ascii_whitespace()
                .filter_map(|signature| signature.parse().ok())
                .collect(),
        })
    }

    /// `None` when one of them cannot be told: without it the entry would be wrong.
    fn dependent_realisations(
        &self,
        number: i64,
    ) -> rusqlite::Result<Option<BTreeMap<String, StorePath>>> {
        let mut dependent = BTreeMap::new();
        // Later versions of Nix keep no references.
        if !self.has_table("RealisationsRefs")? {
            return Ok(Some(dependent));
        }
        let sql = "SELECT drvPath, outputName, path FROM RealisationsRefs \
                   JOIN Realisations ON realisationReference = Realisations.id \
                   JOIN ValidPaths ON outputPath = ValidPaths.id WHERE referrer = ?";
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query([number])?;
        while let Some(row) = rows.next()? {
            let id = format!("{}!{}", row.get::<_, String>(0)?, row.get::<_, String>(1)?);
            let path = self.config.dir.parse_path(&row.get::<_, String>(2)?);
            let (Ok(path), Ok(_)) = (path, id.parse::<RealisationId>()) else {
                return Ok(None);
            };
            if dependent.len() == DEPENDENT_MAX {
                return Ok(None);
            }
            dependent.insert(id, path);
        }
        Ok(Some(dependent))
    }
}

impl fmt::Display for RealisationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}!{}", self.derivation.to_base16(), self.output.0)
    }
}

impl FromStr for RealisationId {
    type Err = OutputNameError;

    fn from_str(text: &str) -> Result<RealisationId, OutputNameError> {
        let malformed = || OutputNameError {
            text: text.chars().take(OUTPUT_NAME_BYTES_MAX).collect(),
        };
        let (derivation, output) = text.split_once('!').ok_or_else(malformed)?;
        let digest = derivation.strip_prefix("sha256:").ok_or_else(malformed)?;
        // Nix writes base 16 in lower case and compares texts.
        let is_base16 = digest
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if digest.len() != 2 * HashAlgorithm::Sha256.digest_len() || !is_base16 {
            return Err(malformed());
        }
        Ok(RealisationId {
            derivation: derivation.parse().map_err(|_| malformed())?,
            output: output.parse()?,
        })
    }
}

impl FromStr for OutputName {
    type Err = OutputNameError;

    fn from_str(text: &str) -> Result<OutputName, OutputNameError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
        if text.is_empty() || text.len() > OUTPUT_NAME_BYTES_MAX || !text.bytes().all(is_allowed) {
            return Err(OutputNameError {
                text: text.chars().take(OUTPUT_NAME_BYTES_MAX).collect(),
            });
        }
        Ok(OutputName(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_nix_writes_them_and_in_no_other_way() {
        let hex = "0123456789abcdef".repeat(4);
        let id = format!("sha256:{hex}!out");
        assert_eq!(id.parse::<RealisationId>().unwrap().to_string(), id);
        for text in [
            format!("sha256:{}!out", hex.to_uppercase()),
            format!("sha256:{hex}"),
            format!("sha256:{hex}!"),
            format!("sha256:{hex}!a/b"),
            format!("sha256:{hex}!out\0"),
            format!("sha256:{}!out", &hex[1..]),
            format!("sha1:{}!out", &hex[..40]),
            format!("sha256:{hex}!{}", "a".repeat(212)),
            String::new(),
        ] {
            assert!(text.parse::<RealisationId>().is_err(), "{text}");
        }
    }
}
