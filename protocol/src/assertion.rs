//! Assertions: what a member shows an anchor to get a token for one of its caches.
//!
//! A member whose certificate has a `push:` permission needs no token from a person: it signs, with the key
//! of its machine, which cache it wants to push to and when it said so, beside its certificate
//! (after RFC 7523; the proof of possession is that of RFC 9449). One line of text,
//! `granary-assertion-1:<base64url>`.
//!
//! The audience is the cache's public keys, not an address: no other cache takes what was said to this one. It keeps
//! nobody who stands between the two from showing it to that cache first; TLS does. What it is good for is little and
//! short: one cache, minutes, once.

use data_encoding::BASE64URL_NOPAD;
use prost::Message as _;

use crate::certificate::{
    CERTIFICATE_BYTES_MAX, Certificate, NotAMember, Permissions, SignedCertificate, UnixTime,
};
use crate::line::{Line, LineError};
use crate::peer::PeerKey;
use crate::signature::PublicKey;
use crate::token::{Pattern, Permission};

/// Keeps the signature from being valid for anything else signed by the same key.
const SIGNING_CONTEXT: &[u8] = b"granary-assertion-1\n";

const TEXT_PREFIX: &str = "granary-assertion-1:";

/// Keys that a member may know of one cache: the old and the new one while they change, and some that are not its own.
pub const CACHE_KEYS_MAX: usize = 8;

/// Largest encoded assertion: a certificate, the name of a cache, its keys, and a signature.
pub const ASSERTION_BYTES_MAX: usize = CERTIFICATE_BYTES_MAX + 4096;

/// Longest text looked at: base-64 has four characters for three bytes.
pub const ASSERTION_TEXT_BYTES_MAX: usize = ASSERTION_BYTES_MAX / 3 * 4 + 64;

const LINE: Line = Line {
    prefix: TEXT_PREFIX,
    encoding: BASE64URL_NOPAD,
    text_bytes_max: ASSERTION_TEXT_BYTES_MAX,
};

/// How far the clocks of member and anchor may be apart, and so how long an anchor remembers what it was shown.
pub const ASSERTION_SECONDS: u64 = 300;

pub const NONCE_BYTES: usize = 16;

/// What a member's token allows on the cache that it asked for.
pub const GRANTED: [Permission; 2] = [Permission::Pull, Permission::Push];

/// What a member says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assertion {
    pub certificate: SignedCertificate,
    /// The cache that it wants to push to.
    pub cache: String,
    /// One of which this cache signs with; 1 to [`CACHE_KEYS_MAX`].
    pub cache_keys: Vec<PublicKey>,
    pub issued: UnixTime,
    /// Random: an assertion is good once.
    pub nonce: [u8; NONCE_BYTES],
}

/// An assertion as it travels: the exact signed bytes and the signature, nothing proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedAssertion {
    body: Vec<u8>,
    signature: [u8; 64],
    assertion: Assertion,
}

/// A text that is no assertion.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AssertionError {
    #[error("assertion has {0} characters, at most {ASSERTION_TEXT_BYTES_MAX} are read")]
    TooLong(usize),
    #[error("assertion does not start with {TEXT_PREFIX:?}")]
    NotAnAssertion,
    #[error("assertion is not base64")]
    NotBase64,
    #[error("assertion does not decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("assertion has a missing or malformed {0}")]
    Field(&'static str),
}

/// Why a well-formed assertion gets nobody a token.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum NotAsserted {
    #[error(
        "it was signed at {issued} (unix time), this clock reads {now}: the clocks are more than {ASSERTION_SECONDS} s apart, or it is old"
    )]
    Untimely { issued: u64, now: u64 },
    #[error("its signature is not of the machine that the certificate is about")]
    BadSignature,
    #[error(transparent)]
    NotAMember(#[from] NotAMember),
    #[error("the certificate of {name} does not allow push:{cache}")]
    MayNotPush { name: String, cache: String },
}

impl Assertion {
    /// Signs with the key of the machine that the certificate is about.
    ///
    /// # Errors
    /// [`AssertionError::Field`] for a cache that readers refuse.
    pub fn sign(self, key: &PeerKey) -> Result<SignedAssertion, AssertionError> {
        check_cache(&self.cache)?;
        check_keys(&self.cache_keys)?;
        let body = AssertionBody {
            certificate: self.certificate.to_bytes(),
            cache: self.cache.clone(),
            cache_keys: self.cache_keys.iter().map(PublicKey::to_string).collect(),
            issued: self.issued.0,
            nonce: self.nonce.to_vec(),
        }
        .encode_to_vec();
        Ok(SignedAssertion {
            signature: key.sign(&signed_bytes(&body)),
            body,
            assertion: self,
        })
    }

    fn from_body(bytes: &[u8]) -> Result<Assertion, AssertionError> {
        let body = AssertionBody::decode(bytes)?;
        check_cache(&body.cache)?;
        check_keys(&body.cache_keys)?;
        let keys = body.cache_keys.iter().map(|key| key.parse());
        let certificate = SignedCertificate::from_bytes(&body.certificate);
        Ok(Assertion {
            certificate: certificate.map_err(|_| AssertionError::Field("certificate"))?,
            cache: body.cache,
            cache_keys: keys
                .collect::<Result<_, _>>()
                .map_err(|_| AssertionError::Field("cache key"))?,
            issued: UnixTime(body.issued),
            nonce: body
                .nonce
                .try_into()
                .map_err(|_| AssertionError::Field("nonce"))?,
        })
    }
}

impl SignedAssertion {
    /// Proves that a member of `mesh` said it just now, who may push to the cache; returns who that is.
    ///
    /// Whether the member was revoked, the cache has that key, and the nonce is new, remains to be asked.
    ///
    /// # Errors
    /// The first thing that is wrong, what costs least first.
    pub fn verify(&self, mesh: &PublicKey, now: UnixTime) -> Result<Certificate, NotAsserted> {
        let assertion = &self.assertion;
        if assertion.issued.0.abs_diff(now.0) > ASSERTION_SECONDS {
            return Err(NotAsserted::Untimely {
                issued: assertion.issued.0,
                now: now.0,
            });
        }
        let claims = assertion.certificate.claims();
        let peer = claims
            .map_err(|error| NotAMember::Malformed(error.to_string()))?
            .peer;
        if !peer.verify(&signed_bytes(&self.body), &self.signature) {
            return Err(NotAsserted::BadSignature);
        }
        let certificate = assertion.certificate.verify(mesh, &peer, now)?;
        match may_push(&certificate.permissions, &assertion.cache) {
            true => Ok(certificate),
            false => Err(NotAsserted::MayNotPush {
                name: certificate.name,
                cache: assertion.cache.clone(),
            }),
        }
    }

    /// What it says; nothing is proved.
    pub fn claims(&self) -> &Assertion {
        &self.assertion
    }

    /// Returns the line that is sent.
    pub fn to_text(&self) -> String {
        let envelope = Envelope {
            body: self.body.clone(),
            signature: self.signature.to_vec(),
        };
        LINE.write(&envelope.encode_to_vec())
    }

    /// Parses the line; surrounding white space is ignored.
    pub fn from_text(text: &str) -> Result<SignedAssertion, AssertionError> {
        let envelope = Envelope::decode(LINE.read(text)?.as_slice())?;
        let assertion = Assertion::from_body(&envelope.body)?;
        Ok(SignedAssertion {
            signature: envelope
                .signature
                .try_into()
                .map_err(|_| AssertionError::Field("signature"))?,
            body: envelope.body,
            assertion,
        })
    }
}

impl From<LineError> for AssertionError {
    fn from(error: LineError) -> AssertionError {
        match error {
            LineError::TooLong(length) => AssertionError::TooLong(length),
            LineError::Prefix => AssertionError::NotAnAssertion,
            LineError::NotBase64 => AssertionError::NotBase64,
        }
    }
}

/// Whether a certificate's permissions cover pushing to a cache; a pattern that no token could have covers none.
pub fn may_push(permissions: &Permissions, cache: &str) -> bool {
    let mut patterns = permissions.push.iter();
    patterns.any(|pattern| {
        let pattern = pattern.parse::<Pattern>();
        pattern.is_ok_and(|pattern| pattern.matches(cache))
    })
}

/// A name that is a pattern for itself alone.
fn check_cache(cache: &str) -> Result<(), AssertionError> {
    let is_name = !cache.contains('*') && cache.parse::<Pattern>().is_ok();
    match is_name {
        true => Ok(()),
        false => Err(AssertionError::Field("cache")),
    }
}

fn check_keys<T>(keys: &[T]) -> Result<(), AssertionError> {
    match (1..=CACHE_KEYS_MAX).contains(&keys.len()) {
        true => Ok(()),
        false => Err(AssertionError::Field("cache key")),
    }
}

fn signed_bytes(body: &[u8]) -> Vec<u8> {
    [SIGNING_CONTEXT, body].concat()
}

#[derive(Clone, PartialEq, prost::Message)]
struct AssertionBody {
    #[prost(bytes = "vec", tag = "1")]
    certificate: Vec<u8>,
    #[prost(string, tag = "2")]
    cache: String,
    #[prost(string, repeated, tag = "3")]
    cache_keys: Vec<String>,
    #[prost(uint64, tag = "4")]
    issued: u64,
    #[prost(bytes = "vec", tag = "5")]
    nonce: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    body: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    signature: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::signature::{KEY_NAME_BYTES_MAX, KeyName, SecretKey};

    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn mesh() -> SecretKey {
        SecretKey::from_seed(KeyName::new("mesh").unwrap(), [1; 32])
    }

    fn key() -> PeerKey {
        PeerKey::from_seed([2; 32])
    }

    fn cache_key(seed: u8) -> PublicKey {
        SecretKey::from_seed(KeyName::new("main").unwrap(), [seed; 32]).public_key()
    }

    fn certificate(permissions: &str) -> SignedCertificate {
        let certificate = Certificate {
            peer: key().peer_id(),
            name: "laptop".to_owned(),
            permissions: permissions.parse().unwrap(),
            not_before: UnixTime(NOW.0 - 100),
            not_after: UnixTime(NOW.0 + 1000),
            serial: 7,
        };
        certificate.sign(&mesh()).unwrap()
    }

    fn assertion(permissions: &str, cache: &str) -> Assertion {
        Assertion {
            certificate: certificate(permissions),
            cache: cache.to_owned(),
            cache_keys: vec![cache_key(4), cache_key(3)],
            issued: NOW,
            nonce: [9; NONCE_BYTES],
        }
    }

    fn verify(assertion: Assertion) -> Result<Certificate, NotAsserted> {
        let signed = assertion.sign(&key()).unwrap();
        signed.verify(&mesh().public_key(), NOW)
    }

    #[test]
    fn what_a_member_signed_is_read_and_proved() {
        let assertion = assertion("share,push:main,push:ci-*", "ci-nightly");
        let signed = assertion.clone().sign(&key()).unwrap();
        let read = SignedAssertion::from_text(&format!("{}\n", signed.to_text())).unwrap();
        assert_eq!(read, signed);
        assert_eq!(*read.claims(), assertion);
        let member = read.verify(&mesh().public_key(), NOW).unwrap();
        assert_eq!(member.name, "laptop");
    }

    #[test]
    fn what_the_certificate_does_not_allow_is_refused() {
        for (permissions, cache) in [
            ("share", "main"),
            ("share,vouch", "main"),
            ("share,push:main", "mains"),
            ("share,push:ci-*", "main"),
        ] {
            let refused = verify(assertion(permissions, cache));
            let expected = NotAsserted::MayNotPush {
                name: "laptop".to_owned(),
                cache: cache.to_owned(),
            };
            assert_eq!(refused, Err(expected), "{permissions} {cache}");
        }
        let refused = verify(assertion("push:main", "main"));
        assert!(matches!(
            refused,
            Err(NotAsserted::NotAMember(NotAMember::MayNotShare { .. }))
        ));
    }

    #[test]
    fn another_time_another_machine_and_another_mesh_are_refused() {
        let signed = assertion("share,push:*", "main").sign(&key()).unwrap();
        let mesh = mesh().public_key();
        for apart in [-301, 301] {
            let now = UnixTime(NOW.0.checked_add_signed(apart).unwrap());
            let refused = signed.verify(&mesh, now);
            assert!(matches!(refused, Err(NotAsserted::Untimely { .. })));
        }
        assert!(signed.verify(&mesh, UnixTime(NOW.0 + 300)).is_ok());

        let other = assertion("share,push:*", "main");
        let other = other.sign(&PeerKey::from_seed([4; 32])).unwrap();
        assert_eq!(other.verify(&mesh, NOW), Err(NotAsserted::BadSignature));

        let stranger = SecretKey::from_seed(KeyName::new("mesh").unwrap(), [5; 32]);
        let refused = signed.verify(&stranger.public_key(), NOW);
        assert_eq!(
            refused,
            Err(NotAsserted::NotAMember(NotAMember::BadSignature))
        );
    }

    #[test]
    fn names_that_are_patterns_or_no_names_are_not_signed() {
        for cache in ["", "*", "ci-*", "a/b", "a\nb", &"a".repeat(65)] {
            let refused = assertion("share,push:*", cache).sign(&key());
            assert_eq!(refused, Err(AssertionError::Field("cache")), "{cache:?}");
        }
    }

    #[test]
    fn a_cache_has_one_key_at_least_and_some_at_most() {
        for count in [0, CACHE_KEYS_MAX + 1] {
            let mut assertion = assertion("share,push:*", "main");
            assertion.cache_keys = vec![cache_key(3); count];
            let refused = assertion.sign(&key());
            assert_eq!(refused, Err(AssertionError::Field("cache key")), "{count}");
        }
        let name = KeyName::new(&"k".repeat(KEY_NAME_BYTES_MAX)).unwrap();
        let mut most = assertion("share,push:*", "main");
        most.cache_keys = (0..8)
            .map(|seed| SecretKey::from_seed(name.clone(), [seed; 32]).public_key())
            .collect();
        let text = most.sign(&key()).unwrap().to_text();
        assert!(SignedAssertion::from_text(&text).is_ok());
    }

    #[test]
    fn other_texts_are_no_assertions() {
        let text = assertion("share", "main").sign(&key()).unwrap().to_text();
        let read = SignedAssertion::from_text;
        assert_eq!(read(""), Err(AssertionError::NotAnAssertion));
        assert_eq!(read(&format!("{text}=")), Err(AssertionError::NotBase64));
        let long = " ".repeat(ASSERTION_TEXT_BYTES_MAX + 1);
        assert_eq!(read(&long), Err(AssertionError::TooLong(long.len())));
        let empty = LINE.write(&[]);
        assert_eq!(read(&empty), Err(AssertionError::Field("cache")));
    }

    proptest! {
        #[test]
        fn a_changed_assertion_proves_nothing(position in 0usize..1000, bit in 0u8..8) {
            let signed = assertion("share,push:*", "main").sign(&key()).unwrap();
            let mut envelope = Envelope {
                body: signed.body.clone(),
                signature: signed.signature.to_vec(),
            };
            let length = envelope.body.len();
            match position % (length + 64) {
                position if position < length => envelope.body[position] ^= 1 << bit,
                position => envelope.signature[position - length] ^= 1 << bit,
            }
            let text = LINE.write(&envelope.encode_to_vec());
            if let Ok(read) = SignedAssertion::from_text(&text) {
                prop_assert!(read.verify(&mesh().public_key(), NOW).is_err());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(read) = SignedAssertion::from_text(&LINE.write(&bytes)) {
                let _ = read.verify(&mesh().public_key(), NOW);
            }
        }
    }
}
