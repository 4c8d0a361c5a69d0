//! Nix's signing keys and signatures: `name:base64` of ed25519, three lengths for three things.
//!
//! A signature is over a narinfo's [`Fingerprint`](crate::narinfo::Fingerprint). Its key name only
//! says which key to try; trust is in the key. Nix verifies with libsodium; we verify with
//! dalek's strict rules, which refuse the same weak keys and malleable signatures.
//!
//! Parsing is stricter than old Nix (canonical base-64, exact length). Where a signature under a
//! trusted name has another length, every Nix fails the whole build, however good the others are;
//! since 2.34 any malformed one makes the narinfo corrupt.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64;
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::hash::excerpt;

/// Longest key name we read; real ones are host names with a number.
pub const KEY_NAME_BYTES_MAX: usize = 255;

const PUBLIC_KEY_BYTES: usize = 32;
const SECRET_KEY_BYTES: usize = 64;
const SIGNATURE_BYTES: usize = 64;

/// Why a text is no key or signature. Never shows a secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SignatureError {
    #[error(
        "key name {name:?} is empty, too long, or contains ':', white space or control characters"
    )]
    Name { name: String },
    #[error("{what} has no ':' between name and base-64")]
    Colon { what: &'static str },
    #[error("{what} of key {name} is not valid base-64")]
    Base64 {
        what: &'static str,
        name: KeyName,
        source: data_encoding::DecodeError,
    },
    #[error("{what} of key {name} has {length} bytes, expected {expected}")]
    Length {
        what: &'static str,
        name: KeyName,
        length: usize,
        expected: usize,
    },
    #[error("public key {name} is not a usable point on the curve")]
    Point { name: KeyName },
    #[error("secret key {name} does not match the public key it contains")]
    Halves { name: KeyName },
}

/// The name in front of a key: `cache.nixos.org-1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyName(Box<str>);

impl KeyName {
    /// Checks a name: it must survive `nix.conf`, where keys are separated by white space.
    pub fn new(name: &str) -> Result<KeyName, SignatureError> {
        let is_allowed = |c: char| c != ':' && !c.is_whitespace() && !c.is_control();
        if name.is_empty() || name.len() > KEY_NAME_BYTES_MAX || !name.chars().all(is_allowed) {
            return Err(SignatureError::Name {
                name: excerpt(name),
            });
        }
        Ok(KeyName(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for KeyName {
    type Err = SignatureError;

    fn from_str(name: &str) -> Result<Self, SignatureError> {
        KeyName::new(name)
    }
}

/// Reads `name:base64` with exactly `N` bytes behind the colon.
fn parse_named<const N: usize>(
    what: &'static str,
    text: &str,
) -> Result<(KeyName, Zeroizing<[u8; N]>), SignatureError> {
    let (name, base64) = text.split_once(':').ok_or(SignatureError::Colon { what })?;
    let name = KeyName::new(name)?;
    // What is too long to be right is not decoded: it may be long on purpose.
    let length_max = N.div_ceil(3) * 4;
    let bytes = if base64.len() > length_max {
        Err(base64.len() / 4 * 3)
    } else {
        match BASE64.decode(base64.as_bytes()) {
            Ok(bytes) => <[u8; N]>::try_from(Zeroizing::new(bytes).as_slice())
                .map_err(|_| base64.len() / 4 * 3),
            Err(source) => return Err(SignatureError::Base64 { what, name, source }),
        }
    };
    match bytes {
        Ok(bytes) => Ok((name, Zeroizing::new(bytes))),
        Err(length) => Err(SignatureError::Length {
            what,
            name,
            length,
            expected: N,
        }),
    }
}

/// The half of a key that everyone may know, as in `trusted-public-keys`. Sorts by name, then bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: KeyName,
    key: VerifyingKey,
}

impl PublicKey {
    /// Names 32 bytes of ed25519 public key.
    ///
    /// # Errors
    /// [`SignatureError::Point`] for bytes that are no point, or one under which anyone can sign.
    pub fn from_bytes(name: KeyName, bytes: &[u8; 32]) -> Result<PublicKey, SignatureError> {
        match VerifyingKey::from_bytes(bytes) {
            Ok(key) if !key.is_weak() => Ok(PublicKey { name, key }),
            _ => Err(SignatureError::Point { name }),
        }
    }

    pub fn name(&self) -> &KeyName {
        &self.name
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        self.key.as_bytes()
    }

    /// Says whether this key made this signature of this message. The names must agree too.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        let bytes = ed25519_dalek::Signature::from_bytes(&signature.bytes);
        self.name == signature.key_name && self.key.verify_strict(message, &bytes).is_ok()
    }
}

impl Ord for PublicKey {
    fn cmp(&self, other: &Self) -> Ordering {
        (&self.name, self.as_bytes()).cmp(&(&other.name, other.as_bytes()))
    }
}

impl PartialOrd for PublicKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(self.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_named::<PUBLIC_KEY_BYTES>("public key", text)?;
        PublicKey::from_bytes(name, &bytes)
    }
}

/// A key that can sign. Wiped from memory when dropped; `Debug` shows its name only.
#[derive(Clone)]
pub struct SecretKey {
    name: KeyName,
    key: SigningKey,
}

impl SecretKey {
    /// Makes a key of 32 secret random bytes, which the caller draws and wipes.
    pub fn from_seed(name: KeyName, seed: [u8; 32]) -> SecretKey {
        SecretKey {
            name,
            key: SigningKey::from_bytes(&Zeroizing::new(seed)),
        }
    }

    pub fn name(&self) -> &KeyName {
        &self.name
    }

    pub fn public_key(&self) -> PublicKey {
        PublicKey {
            name: self.name.clone(),
            key: self.key.verifying_key(),
        }
    }

    /// Returns the 32 secret bytes that the key is made of.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature {
            key_name: self.name.clone(),
            bytes: self.key.sign(message).to_bytes(),
        }
    }

    /// Returns the text that Nix keeps in a `secret-key-files` file, without a final newline.
    ///
    /// Deliberately not `Display`: whoever writes a secret shall have to spell it.
    pub fn to_nix_string(&self) -> Zeroizing<String> {
        let bytes = Zeroizing::new(self.key.to_keypair_bytes());
        let base64 = Zeroizing::new(BASE64.encode(bytes.as_slice()));
        Zeroizing::new(format!("{}:{}", self.name, base64.as_str()))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}:…)", self.name)
    }
}

impl FromStr for SecretKey {
    type Err = SignatureError;

    /// Reads what [`SecretKey::to_nix_string`] or `nix-store --generate-binary-cache-key` wrote.
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let (name, bytes) = parse_named::<SECRET_KEY_BYTES>("secret key", text.trim_end())?;
        match SigningKey::from_keypair_bytes(&bytes) {
            Ok(key) => Ok(SecretKey { name, key }),
            Err(_) => Err(SignatureError::Halves { name }),
        }
    }
}

/// One `Sig` line: well-formed, which says nothing about whether it is true.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature {
    key_name: KeyName,
    bytes: [u8; SIGNATURE_BYTES],
}

impl Signature {
    pub fn from_bytes(key_name: KeyName, bytes: [u8; 64]) -> Signature {
        Signature { key_name, bytes }
    }

    pub fn key_name(&self) -> &KeyName {
        &self.key_name
    }

    pub fn as_bytes(&self) -> &[u8; 64] {
        &self.bytes
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key_name, BASE64.encode(&self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

impl FromStr for Signature {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let (key_name, bytes) = parse_named::<SIGNATURE_BYTES>("signature", text)?;
        Ok(Signature {
            key_name,
            bytes: *bytes,
        })
    }
}

/// The keys whose word counts. Several may share a name, as while a key is being replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedKeys(BTreeSet<PublicKey>);

impl TrustedKeys {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key; `false` when it was there already.
    pub fn insert(&mut self, key: PublicKey) -> bool {
        self.0.insert(key)
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &PublicKey> {
        self.0.iter()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Says whether a signature under this name could be proven or disproven.
    pub fn contains_name(&self, name: &KeyName) -> bool {
        self.named(name).next().is_some()
    }

    /// Returns the first key, in order of the signatures, that signed the message.
    ///
    /// Wrong signatures and unknown names are passed over, as Nix does.
    pub fn verify<'k, 's>(
        &'k self,
        message: &[u8],
        signatures: impl IntoIterator<Item = &'s Signature>,
    ) -> Option<&'k PublicKey> {
        signatures.into_iter().find_map(|signature| {
            self.named(&signature.key_name)
                .find(|key| key.verify(message, signature))
        })
    }

    fn named<'k>(&'k self, name: &KeyName) -> impl Iterator<Item = &'k PublicKey> {
        self.0.iter().filter(move |key| key.name == *name)
    }
}

impl FromIterator<PublicKey> for TrustedKeys {
    fn from_iter<I: IntoIterator<Item = PublicKey>>(keys: I) -> Self {
        TrustedKeys(keys.into_iter().collect())
    }
}

impl Extend<PublicKey> for TrustedKeys {
    fn extend<I: IntoIterator<Item = PublicKey>>(&mut self, keys: I) {
        self.0.extend(keys);
    }
}

impl FromStr for TrustedKeys {
    type Err = SignatureError;

    /// Reads keys separated by white space, as in `trusted-public-keys` of `nix.conf`.
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        text.split_whitespace().map(str::parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(name: &str, seed: u8) -> SecretKey {
        SecretKey::from_seed(name.parse().unwrap(), [seed; 32])
    }

    #[test]
    fn signature_verifies_under_its_key_and_message_only() {
        let key = key("here-1", 1);
        let signature = key.sign(b"message");
        let public = key.public_key();
        assert!(public.verify(b"message", &signature));
        assert!(!public.verify(b"massage", &signature));
        let mut bytes = *signature.as_bytes();
        bytes[0] ^= 1;
        assert!(!public.verify(
            b"message",
            &Signature::from_bytes("here-1".parse().unwrap(), bytes)
        ));
    }

    #[test]
    fn signature_under_another_name_does_not_count() {
        let signature = key("here-1", 1).sign(b"message");
        assert!(
            !key("there-1", 1)
                .public_key()
                .verify(b"message", &signature)
        );
    }

    #[test]
    fn texts_come_back_and_secrets_stay_hidden() {
        let secret = key("here-1", 1);
        let text = secret.to_nix_string();
        let again: SecretKey = text.parse().unwrap();
        assert_eq!(again.to_nix_string(), text);
        assert_eq!(
            again.public_key().to_string().parse(),
            Ok(secret.public_key())
        );
        assert_eq!(format!("{secret:?}"), "SecretKey(here-1:…)");
        let signature = secret.sign(b"");
        assert_eq!(signature.to_string().parse(), Ok(signature));
    }

    #[test]
    fn keys_sharing_a_name_are_all_tried() {
        let (old, new, other) = (key("team-1", 1), key("team-1", 2), key("team-2", 3));
        let trusted: TrustedKeys = [old.public_key(), new.public_key()].into_iter().collect();
        let signatures = [
            other.sign(b"m"),
            key("team-1", 9).sign(b"m"),
            new.sign(b"m"),
        ];
        assert_eq!(trusted.verify(b"m", &signatures), Some(&new.public_key()));
        assert_eq!(trusted.verify(b"m", &signatures[..2]), None);
        assert!(trusted.contains_name(old.name()) && !trusted.contains_name(other.name()));
    }

    #[test]
    fn trusted_keys_are_read_as_in_nix_conf() {
        let text = format!(
            "{}  {}\n",
            key("a", 1).public_key(),
            key("b", 2).public_key()
        );
        let keys: TrustedKeys = text.parse().unwrap();
        assert_eq!(
            keys.iter()
                .map(|key| key.name().as_str())
                .collect::<Vec<_>>(),
            ["a", "b"]
        );
        assert!("".parse::<TrustedKeys>().unwrap().is_empty());
        assert!(format!("{text} c:").parse::<TrustedKeys>().is_err());
    }

    #[test]
    fn weak_and_impossible_public_keys_are_refused() {
        let zero = format!("weak:{}", BASE64.encode(&[0; 32]));
        let one = format!(
            "weak:{}",
            BASE64.encode(&[[1].as_slice(), &[0; 31]].concat())
        );
        let not_a_point = format!(
            "off:{}",
            BASE64.encode(&[[2].as_slice(), &[0; 31]].concat())
        );
        for text in [zero, one, not_a_point] {
            assert!(
                matches!(text.parse::<PublicKey>(), Err(SignatureError::Point { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn secret_key_with_foreign_public_half_is_refused() {
        let mut bytes = key("a", 1).key.to_keypair_bytes();
        bytes[32..].copy_from_slice(key("b", 2).public_key().as_bytes());
        let text = format!("a:{}", BASE64.encode(&bytes));
        assert!(matches!(
            text.parse::<SecretKey>(),
            Err(SignatureError::Halves { .. })
        ));
    }

    #[test]
    fn malformed_signatures_are_refused() {
        let good = key("here-1", 1).sign(b"").to_string();
        let (_, base64) = good.split_once(':').unwrap();
        for text in [
            String::new(),
            ":".into(),
            base64.into(),
            format!(":{base64}"),
            format!("a b:{base64}"),
            format!("a\r:{base64}"),
            format!("{}:{base64}", "n".repeat(KEY_NAME_BYTES_MAX + 1)),
            "here-1:".into(),
            "here-1:AAAA".into(),
            format!("here-1: {base64}"),
            format!("{good} "),
            format!("{good}\r"),
            good.trim_end_matches('=').to_owned(),
            format!("{good}AAAA"),
            format!("{good}{}", "A".repeat(1_000_000)),
            // 64 bytes leave four unused bits in the last digit; only zero is canonical.
            format!("here-1:{}B==", "A".repeat(85)),
            format!("here-1:{}", "-".repeat(88)),
        ] {
            assert!(text.parse::<Signature>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "([a-z]{1,3}:)?[A-Za-z0-9+/=]{0,100}|.*") {
            let _ = text.parse::<Signature>();
            let _ = text.parse::<PublicKey>();
            let _ = text.parse::<SecretKey>();
        }
    }
}
