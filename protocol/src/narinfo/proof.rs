//! From what a cache says to what may be served: the proofs behind a [`VerifiedNarInfo`].
//!
//! Three proofs and one fact: a trusted key signed the [`Fingerprint`](super::Fingerprint), the path
//! follows from the content address, a member [vouches](crate::voucher) for it, or the path lies in this
//! machine's own store. What is known to be false is removed on the way, so that no client is told a
//! lie we saw through.

use std::collections::BTreeSet;

use thiserror::Error;

use super::{Compression, NarInfo, nar_url};
use crate::content_address::{ContentAddress, NoStorePath};
use crate::hash::{FileHash, NarHash};
use crate::peer::PeerId;
use crate::signature::{KeyName, SecretKey, Signature, TrustedKeys};
use crate::store_path::{StoreDir, StorePath};
use crate::voucher::vouched_by;

/// A narinfo that may be served to Nix, with the reason why.
///
/// Made by proof or from this machine's own store only. The signed part cannot be changed any more;
/// what a cache says about its own copy can, by [`VerifiedNarInfo::served_uncompressed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedNarInfo {
    narinfo: NarInfo,
    proof: Proof,
}

/// Why a narinfo is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// This trusted key signed the fingerprint.
    Signed(KeyName),
    /// The path follows from the content address; the NAR is proven where that pins its hash, and
    /// by Nix on import otherwise.
    ContentAddressed,
    /// This member built it, and may vouch as long as it is one.
    Vouched(PeerId),
    /// The path is valid in this machine's own store.
    Local,
}

impl VerifiedNarInfo {
    /// Proves a narinfo by a trusted signature, or else by its content address.
    ///
    /// What is known to be false is left out of the result: signatures under a trusted name that
    /// do not verify, and a content address that does not lead to the path.
    ///
    /// # Errors
    /// [`Unverified`], with the key names seen and what was wrong with the content address.
    pub fn verify(
        narinfo: NarInfo,
        keys: &TrustedKeys,
        dir: &StoreDir,
    ) -> Result<VerifiedNarInfo, Unverified> {
        VerifiedNarInfo::verify_vouched(narinfo, keys, dir, |_| false)
    }

    /// The same, or else by the voucher of a member that may vouch.
    ///
    /// # Errors
    /// As [`VerifiedNarInfo::verify`].
    pub fn verify_vouched(
        mut narinfo: NarInfo,
        keys: &TrustedKeys,
        dir: &StoreDir,
        may_vouch: impl Fn(&PeerId) -> bool,
    ) -> Result<VerifiedNarInfo, Unverified> {
        let key_names: BTreeSet<KeyName> = narinfo
            .signatures
            .iter()
            .map(|signature| signature.key_name().clone())
            .collect();
        narinfo.drop_false_signatures(keys, dir);
        // What is left under a trusted name is true.
        let mut names = narinfo.signatures.iter().map(Signature::key_name);
        let signer = names.find(|name| keys.contains_name(name)).cloned();
        let content_address = narinfo.verify_content_address(dir);
        let proof = match (signer, content_address) {
            (Some(key_name), Ok(())) => Proof::Signed(key_name),
            (Some(key_name), Err(_)) => {
                narinfo.ca = None;
                Proof::Signed(key_name)
            }
            (None, Ok(())) => Proof::ContentAddressed,
            (None, Err(false_address)) => {
                if let Some(peer) = vouched_by(&narinfo, dir, may_vouch) {
                    narinfo.ca = None;
                    let proof = Proof::Vouched(peer);
                    return Ok(VerifiedNarInfo { narinfo, proof });
                }
                return Err(Unverified::new(
                    narinfo.store_path,
                    key_names,
                    keys,
                    false_address,
                ));
            }
        };
        Ok(VerifiedNarInfo { narinfo, proof })
    }

    /// Wraps a narinfo made from this machine's own database, for a path valid there.
    pub fn local(narinfo: NarInfo) -> VerifiedNarInfo {
        VerifiedNarInfo {
            narinfo,
            proof: Proof::Local,
        }
    }

    pub fn narinfo(&self) -> &NarInfo {
        &self.narinfo
    }

    pub fn proof(&self) -> &Proof {
        &self.proof
    }

    pub fn into_narinfo(self) -> NarInfo {
        self.narinfo
    }

    /// Adds a signature of ours, so that whoever trusts this key need not know the original one.
    pub fn sign(&mut self, key: &SecretKey, dir: &StoreDir) {
        self.narinfo.sign(key, dir);
    }

    /// Says that the NAR is served as it is, under its canonical URL.
    ///
    /// File hash and size repeat those of the NAR: older clients assert that they are there when
    /// they write a narinfo back, as `nix store sign` does.
    pub fn served_uncompressed(mut self) -> VerifiedNarInfo {
        let narinfo = &mut self.narinfo;
        narinfo.url = nar_url(&narinfo.store_path.hash(), &narinfo.nar_hash);
        narinfo.compression = Compression::None;
        narinfo.file_hash = Some(FileHash::from(narinfo.nar_hash));
        narinfo.file_size = Some(narinfo.nar_size);
        self
    }
}

impl NarInfo {
    /// Proves that the store path follows from the content address, as Nix does before it trusts an
    /// unsigned path.
    ///
    /// # Errors
    /// [`FalseContentAddress`] says which of the two hashes disagrees, or that there is none.
    pub fn verify_content_address(&self, dir: &StoreDir) -> Result<(), FalseContentAddress> {
        let path = &self.store_path;
        let content_address = self
            .ca
            .ok_or_else(|| FalseContentAddress::Missing { path: path.clone() })?;
        let mut references = self.references.clone();
        let self_reference = references.remove(path);
        let computed = content_address
            .store_path(dir, path.name(), &references, self_reference)
            .map_err(|source| FalseContentAddress::Impossible {
                path: path.clone(),
                source,
            })?;
        if computed != *path {
            return Err(FalseContentAddress::Path {
                path: path.clone(),
                content_address: Box::new(content_address),
                computed,
            });
        }
        match content_address.nar_hash(self_reference) {
            Some(nar_hash) if nar_hash != self.nar_hash => Err(FalseContentAddress::NarHash {
                path: path.clone(),
                content_address: Box::new(content_address),
                nar_hash: self.nar_hash,
            }),
            _ => Ok(()),
        }
    }

    /// Removes signatures under a trusted name that do not verify; returns how many.
    ///
    /// Those under unknown names stay: someone further on may know the key.
    pub fn drop_false_signatures(&mut self, keys: &TrustedKeys, dir: &StoreDir) -> usize {
        let fingerprint = self.fingerprint(dir);
        let before = self.signatures.len();
        self.signatures.retain(|signature| {
            !keys.contains_name(signature.key_name())
                || keys.verify(fingerprint.as_bytes(), [signature]).is_some()
        });
        before - self.signatures.len()
    }
}

/// Why a narinfo was not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unverified {
    #[error("narinfo of {path} is not signed and not content-addressed")]
    Unsigned { path: StorePath },
    #[error("narinfo of {path} is signed by {}, none of them trusted", list(.key_names))]
    UntrustedKeys {
        path: StorePath,
        key_names: Vec<KeyName>,
    },
    #[error("narinfo of {path} has signatures of trusted {} that do not verify", list(.key_names))]
    FalseSignatures {
        path: StorePath,
        key_names: Vec<KeyName>,
    },
    #[error("narinfo of {} has no trusted signature and a false content address", .source.path())]
    ContentAddress {
        key_names: Vec<KeyName>,
        source: Box<FalseContentAddress>,
    },
}

impl Unverified {
    fn new(
        path: StorePath,
        key_names: BTreeSet<KeyName>,
        keys: &TrustedKeys,
        content_address: FalseContentAddress,
    ) -> Unverified {
        let (known, unknown): (Vec<_>, Vec<_>) = key_names
            .into_iter()
            .partition(|name| keys.contains_name(name));
        match content_address {
            FalseContentAddress::Missing { .. } if !known.is_empty() => {
                Unverified::FalseSignatures {
                    path,
                    key_names: known,
                }
            }
            FalseContentAddress::Missing { .. } if !unknown.is_empty() => {
                Unverified::UntrustedKeys {
                    path,
                    key_names: unknown,
                }
            }
            FalseContentAddress::Missing { .. } => Unverified::Unsigned { path },
            source => Unverified::ContentAddress {
                key_names: [known, unknown].concat(),
                source: Box::new(source),
            },
        }
    }
}

/// Why a content address proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FalseContentAddress {
    #[error("{path} has no content address")]
    Missing { path: StorePath },
    #[error("{path} cannot be content-addressed")]
    Impossible {
        path: StorePath,
        source: NoStorePath,
    },
    #[error(
        "{path} claims to be content-addressed by {content_address}, which leads to {computed}"
    )]
    Path {
        path: StorePath,
        content_address: Box<ContentAddress>,
        computed: StorePath,
    },
    #[error(
        "{path} is content-addressed by {content_address}, its narinfo promises a nar of {nar_hash}"
    )]
    NarHash {
        path: StorePath,
        content_address: Box<ContentAddress>,
        nar_hash: NarHash,
    },
}

impl FalseContentAddress {
    pub fn path(&self) -> &StorePath {
        match self {
            FalseContentAddress::Missing { path }
            | FalseContentAddress::Impossible { path, .. }
            | FalseContentAddress::Path { path, .. }
            | FalseContentAddress::NarHash { path, .. } => path,
        }
    }
}

fn list(names: &[KeyName]) -> String {
    names
        .iter()
        .map(KeyName::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}
