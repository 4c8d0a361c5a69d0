//! PeerId: the public ed25519 key that names a node, in libp2p's text form; PeerKey: its secret half.
//!
//! libp2p peer-ids specification: the identity multihash of the protobuf-encoded public key,
//! written in base58btc. For ed25519 that is a fixed 6-byte prefix before the 32 bytes of the key,
//! so every text form starts with `12D3KooW`.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

/// Identity multihash code, its length (36), then the protobuf fields `Type = Ed25519`, `Data = 32 bytes`.
const MULTIHASH_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// Longest text looked at; a valid PeerId has 52 characters.
const TEXT_BYTES_MAX: usize = 64;

/// The name of a node: its ed25519 public key.
///
/// Holding one says nothing about whether the node is a member; a
/// [`Certificate`](crate::certificate::Certificate) does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId([u8; 32]);

/// A text that is not the libp2p form of an ed25519 public key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PeerIdError {
    #[error("peer id {0:?} is not base58")]
    NotBase58(String),
    #[error("peer id {0:?} does not name an ed25519 key (they start with 12D3KooW)")]
    NotEd25519(String),
    #[error("peer id has {0} bytes of text, at most {TEXT_BYTES_MAX} are read")]
    TooLong(usize),
}

impl PeerId {
    /// Wraps the 32 bytes of an ed25519 public key.
    pub const fn from_public_key(key: [u8; 32]) -> PeerId {
        PeerId(key)
    }

    /// Reads libp2p's binary form; `None` for an id of any other kind of key.
    pub fn from_multihash(bytes: &[u8]) -> Option<PeerId> {
        let key = bytes.strip_prefix(&MULTIHASH_PREFIX)?;
        Some(PeerId(key.try_into().ok()?))
    }

    /// Returns libp2p's binary form.
    pub fn to_multihash(&self) -> [u8; 38] {
        let mut bytes = [0u8; 38];
        bytes[..6].copy_from_slice(&MULTIHASH_PREFIX);
        bytes[6..].copy_from_slice(&self.0);
        bytes
    }

    /// Returns the 32 bytes of the ed25519 public key.
    pub const fn as_public_key(&self) -> &[u8; 32] {
        &self.0
    }

    /// Says whether this node signed `message`. False for a name that is no point of the curve.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        VerifyingKey::from_bytes(&self.0)
            .is_ok_and(|key| key.verify_strict(message, &signature).is_ok())
    }
}

/// The secret half of a node's identity, with which it signs what it says of itself.
///
/// Wiped from memory when dropped; `Debug` shows the public half only. What is signed starts with
/// a context of its own each time, so that one kind of statement is never taken for another.
#[derive(Clone)]
pub struct PeerKey(SigningKey);

impl PeerKey {
    /// Takes the 32 secret bytes of an ed25519 key, which the caller wipes.
    pub fn from_seed(seed: [u8; 32]) -> PeerKey {
        PeerKey(SigningKey::from_bytes(&Zeroizing::new(seed)))
    }

    pub fn peer_id(&self) -> PeerId {
        PeerId(self.0.verifying_key().to_bytes())
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerKey(of {})", self.peer_id())
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_multihash()).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    fn from_str(text: &str) -> Result<PeerId, PeerIdError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(PeerIdError::TooLong(text.len()));
        }
        let bytes = bs58::decode(text)
            .into_vec()
            .map_err(|_| PeerIdError::NotBase58(text.into()))?;
        PeerId::from_multihash(&bytes).ok_or_else(|| PeerIdError::NotEd25519(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_is_the_one_libp2p_prints() {
        // The example key of the libp2p peer-ids specification.
        let text = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA";
        let peer: PeerId = text.parse().unwrap();
        assert_eq!(peer.to_string(), text);
    }

    #[test]
    fn other_key_types_and_garbage_are_refused() {
        let rsa = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";
        assert_eq!(
            rsa.parse::<PeerId>(),
            Err(PeerIdError::NotEd25519(rsa.into()))
        );
        assert_eq!(
            "0OIl".parse::<PeerId>(),
            Err(PeerIdError::NotBase58("0OIl".into()))
        );
        assert_eq!(
            "1".repeat(65).parse::<PeerId>(),
            Err(PeerIdError::TooLong(65))
        );
    }
}
