//! Certificates: the mesh key's word that a peer is a member, until when, and what it may do.
//!
//! The mesh key is an ed25519 key in Nix's key format (`name:base64`), held by the anchor or by the
//! machine that ran `granary mesh create`; nodes know its public half only. A certificate travels
//! in the first message of a connection and rests in a file as one line of text,
//! `granary-certificate-1:<base64>`. What is signed is [`SIGNING_CONTEXT`] followed by the exact
//! bytes of the badge, so that a mesh signature can be mistaken for nothing else.
//!
//! The badge ([`SignedBadge`]) says whose certificate it is and when it holds, and has a hash of the
//! rest: name, permissions, serial number. So the badge alone proves membership, and who shows it to
//! somebody that may be nobody's member gives neither name nor permissions away. The serial number is
//! random, so the hash cannot be guessed at.

use std::collections::BTreeSet;
use std::fmt;

use data_encoding::BASE64;
use prost::Message as _;

use crate::hash::sha256;
use crate::line::{Line, LineError};
use crate::nix32;
use crate::peer::PeerId;
use crate::signature::{PublicKey, SecretKey, Signature};

/// Keeps a certificate's signature from being valid for anything else signed by the same key.
const SIGNING_CONTEXT: &[u8] = b"granary-certificate-1\n";

/// First word of a certificate file.
const TEXT_PREFIX: &str = "granary-certificate-1:";

/// A certificate file, with room for white space.
const LINE: Line = Line {
    prefix: TEXT_PREFIX,
    encoding: BASE64,
    text_bytes_max: 2 * CERTIFICATE_BYTES_MAX,
};

/// Largest encoded certificate. A full one needs about 300 bytes; the rest is room for push patterns.
pub const CERTIFICATE_BYTES_MAX: usize = 4096;

/// Largest encoded badge: a peer, two dates, a hash, and a signature by a key of the longest name.
pub const BADGE_BYTES_MAX: usize = 512;

/// Keeps the hash in a badge from being that of anything else.
const DETAILS_CONTEXT: &[u8] = b"granary-certificate-details-1\n";

/// Longest member name, as a DNS label would have it.
pub const MEMBER_NAME_BYTES_MAX: usize = 63;

/// Most `push:` patterns in one certificate.
const PUSH_PATTERNS_MAX: usize = 32;

/// How far a peer's clock may be ahead of ours before its new certificate is refused.
///
/// Machines without a working clock battery wake minutes off; an hour lets them in while
/// adding little to a lifetime of 30 days.
pub const CLOCK_SKEW_SECONDS: u64 = 3600;

/// Seconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(pub u64);

/// What the mesh key says about one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub peer: PeerId,
    /// What people call the machine; 1 to [`MEMBER_NAME_BYTES_MAX`] of `[0-9a-zA-Z._-]`.
    pub name: String,
    pub permissions: Permissions,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
    /// Random: distinguishes the certificates of one peer, and keeps its badge from telling the rest.
    pub serial: u64,
}

/// What a certificate shows to those who have not proved to be members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Badge {
    pub peer: PeerId,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
    /// Hash of what else the certificate says.
    details: [u8; 32],
}

/// A badge as it travels: the exact signed bytes and the signature, nothing proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedBadge {
    body: Vec<u8>,
    signature: Signature,
}

/// What a member may do, written `share,vouch,push:main`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Serve and fetch paths.
    pub share: bool,
    /// Its own builds count as trusted where `trust.members` is on.
    pub vouch: bool,
    /// Cache patterns it may push to.
    pub push: BTreeSet<String>,
}

/// A certificate as it travels: a badge and the details that it has the hash of, nothing proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedCertificate {
    badge: SignedBadge,
    details: Vec<u8>,
}

/// A text or byte string that is no certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CertificateError {
    #[error("certificate has {0} bytes, at most {CERTIFICATE_BYTES_MAX} are read")]
    TooLong(usize),
    #[error("certificate text does not start with {TEXT_PREFIX:?}")]
    NotACertificate,
    #[error("certificate text is not base64")]
    NotBase64,
    #[error("certificate does not decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("certificate field {0} is missing or malformed")]
    Field(&'static str),
    #[error("permission {0:?} is unknown, expected share, vouch or push:<cache pattern>")]
    Permission(String),
    #[error(
        "member name {0:?} is not 1 to {MEMBER_NAME_BYTES_MAX} characters of letters, digits, '.', '_' and '-'"
    )]
    Name(String),
}

/// Why a well-formed certificate does not make its bearer a member.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotAMember {
    #[error("certificate is signed by mesh key {found:?}, this mesh is {expected:?}")]
    OtherMesh { found: String, expected: String },
    #[error("certificate signature does not verify")]
    BadSignature,
    #[error("certificate belongs to {certified}, the connection to {connected}")]
    OtherPeer {
        certified: PeerId,
        connected: PeerId,
    },
    #[error("certificate of {name} is valid from {from} (unix time) only, the clock reads {now}")]
    NotYetValid { name: String, from: u64, now: u64 },
    #[error("certificate of {name} expired at {until} (unix time), the clock reads {now}")]
    Expired { name: String, until: u64, now: u64 },
    #[error("certificate is malformed: {0}")]
    Malformed(String),
    #[error("certificate of {name} lacks the permission to share")]
    MayNotShare { name: String },
    #[error("certificate of {name} was revoked")]
    Revoked { name: String },
}

impl Certificate {
    /// Signs the certificate with the mesh key.
    ///
    /// # Errors
    /// [`CertificateError::Name`] and [`CertificateError::Permission`] when a field has a value
    /// that readers refuse.
    pub fn sign(&self, mesh: &SecretKey) -> Result<SignedCertificate, CertificateError> {
        check_name(&self.name)?;
        self.permissions.check()?;
        let details = DetailsBody {
            name: self.name.clone(),
            permissions: self.permissions.to_string(),
            serial: self.serial,
        }
        .encode_to_vec();
        let body = BadgeBody {
            peer: self.peer.as_public_key().to_vec(),
            not_before: self.not_before.0,
            not_after: self.not_after.0,
            details: hash_of_details(&details).to_vec(),
        }
        .encode_to_vec();
        let signature = mesh.sign(&signed_bytes(&body));
        let badge = SignedBadge { body, signature };
        Ok(SignedCertificate { badge, details })
    }

    /// Whether a machine may be called that.
    pub fn is_name(name: &str) -> bool {
        check_name(name).is_ok()
    }

    fn from_parts(badge: &Badge, details: &[u8]) -> Result<Certificate, CertificateError> {
        if hash_of_details(details) != badge.details {
            return Err(CertificateError::Field("details"));
        }
        let details = DetailsBody::decode(details)?;
        check_name(&details.name)?;
        Ok(Certificate {
            peer: badge.peer,
            name: details.name,
            permissions: details.permissions.parse()?,
            not_before: badge.not_before,
            not_after: badge.not_after,
            serial: details.serial,
        })
    }
}

impl Badge {
    fn from_body(bytes: &[u8]) -> Result<Badge, CertificateError> {
        let body = BadgeBody::decode(bytes)?;
        let bytes = |field, bytes: Vec<u8>| {
            <[u8; 32]>::try_from(bytes).map_err(|_| CertificateError::Field(field))
        };
        Ok(Badge {
            peer: PeerId::from_public_key(bytes("peer", body.peer)?),
            not_before: UnixTime(body.not_before),
            not_after: UnixTime(body.not_after),
            details: bytes("details", body.details)?,
        })
    }

    /// Whether it is the `connected` peer's and holds at `now`. `name` is for who reads the error.
    fn check(&self, name: &str, connected: &PeerId, now: UnixTime) -> Result<(), NotAMember> {
        if self.peer != *connected {
            return Err(NotAMember::OtherPeer {
                certified: self.peer,
                connected: *connected,
            });
        }
        if self.not_before.0 > now.0.saturating_add(CLOCK_SKEW_SECONDS) {
            return Err(NotAMember::NotYetValid {
                name: name.to_owned(),
                from: self.not_before.0,
                now: now.0,
            });
        }
        if now >= self.not_after {
            return Err(NotAMember::Expired {
                name: name.to_owned(),
                until: self.not_after.0,
                now: now.0,
            });
        }
        Ok(())
    }
}

impl SignedBadge {
    /// Proves membership: signed by `mesh`, for the `connected` peer, valid at `now`.
    ///
    /// # Errors
    /// The first thing that is wrong, in that order.
    pub fn verify(
        &self,
        mesh: &PublicKey,
        connected: &PeerId,
        now: UnixTime,
    ) -> Result<Badge, NotAMember> {
        self.check_signature(mesh)?;
        let badge = Badge::from_body(&self.body)
            .map_err(|error| NotAMember::Malformed(error.to_string()))?;
        badge.check(&badge.peer.to_string(), connected, now)?;
        Ok(badge)
    }

    fn check_signature(&self, mesh: &PublicKey) -> Result<(), NotAMember> {
        self.check_mesh(mesh)?;
        match mesh.verify(&signed_bytes(&self.body), &self.signature) {
            true => Ok(()),
            false => Err(NotAMember::BadSignature),
        }
    }

    fn check_mesh(&self, mesh: &PublicKey) -> Result<(), NotAMember> {
        match self.signature.key_name() == mesh.name() {
            true => Ok(()),
            false => Err(NotAMember::OtherMesh {
                found: self.signature.key_name().to_string(),
                expected: mesh.name().to_string(),
            }),
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.envelope(Vec::new()).encode_to_vec()
    }

    /// Parses the form that travels; at most [`BADGE_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedBadge, CertificateError> {
        if bytes.len() > BADGE_BYTES_MAX {
            return Err(CertificateError::TooLong(bytes.len()));
        }
        let SignedCertificate { badge, details } = SignedCertificate::from_bytes(bytes)?;
        match details.is_empty() {
            true => Ok(badge),
            // It was not meant for us to see.
            false => Err(CertificateError::Field("details")),
        }
    }

    fn envelope(&self, details: Vec<u8>) -> Envelope {
        Envelope {
            body: self.body.clone(),
            signature: self.signature.to_string(),
            details,
        }
    }
}

impl SignedCertificate {
    /// What of it may be shown to anybody.
    pub fn badge(&self) -> &SignedBadge {
        &self.badge
    }

    /// Proves membership: signed by `mesh`, for the `connected` peer, valid at `now`, may share.
    ///
    /// # Errors
    /// The first thing that is wrong, in that order.
    pub fn verify(
        &self,
        mesh: &PublicKey,
        connected: &PeerId,
        now: UnixTime,
    ) -> Result<Certificate, NotAMember> {
        self.badge.check_signature(mesh)?;
        self.recall(mesh, connected, now)
    }

    /// Checks everything but the signature, of a certificate that was verified before it was kept.
    ///
    /// # Errors
    /// As [`SignedCertificate::verify`].
    pub fn recall(
        &self,
        mesh: &PublicKey,
        connected: &PeerId,
        now: UnixTime,
    ) -> Result<Certificate, NotAMember> {
        self.badge.check_mesh(mesh)?;
        let malformed = |error: CertificateError| NotAMember::Malformed(error.to_string());
        let badge = Badge::from_body(&self.badge.body).map_err(malformed)?;
        let certificate = Certificate::from_parts(&badge, &self.details).map_err(malformed)?;
        badge.check(&certificate.name, connected, now)?;
        if !certificate.permissions.share {
            return Err(NotAMember::MayNotShare {
                name: certificate.name,
            });
        }
        Ok(certificate)
    }

    /// Reads what the certificate says without proving any of it; for display.
    pub fn claims(&self) -> Result<Certificate, CertificateError> {
        Certificate::from_parts(&Badge::from_body(&self.badge.body)?, &self.details)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.badge.envelope(self.details.clone()).encode_to_vec()
    }

    /// Parses the form that travels; at most [`CERTIFICATE_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedCertificate, CertificateError> {
        if bytes.len() > CERTIFICATE_BYTES_MAX {
            return Err(CertificateError::TooLong(bytes.len()));
        }
        let envelope = Envelope::decode(bytes)?;
        let signature = envelope
            .signature
            .parse()
            .map_err(|_| CertificateError::Field("signature"))?;
        Ok(SignedCertificate {
            badge: SignedBadge {
                body: envelope.body,
                signature,
            },
            details: envelope.details,
        })
    }

    /// Returns the one line of a certificate file, without a line break.
    pub fn to_text(&self) -> String {
        LINE.write(&self.to_bytes())
    }

    /// Parses the line of a certificate file; surrounding white space is ignored.
    pub fn from_text(text: &str) -> Result<SignedCertificate, CertificateError> {
        SignedCertificate::from_bytes(&LINE.read(text)?)
    }
}

impl From<LineError> for CertificateError {
    fn from(error: LineError) -> CertificateError {
        match error {
            LineError::TooLong(length) => CertificateError::TooLong(length),
            LineError::Prefix => CertificateError::NotACertificate,
            LineError::NotBase64 => CertificateError::NotBase64,
        }
    }
}

/// Returns the tag that a mesh announces by mDNS: a hash of its public key, not the key.
pub fn mesh_tag(mesh: &PublicKey) -> String {
    let hash = sha256(format!("granary-mesh-tag-1\n{mesh}").as_bytes());
    nix32::encode(&hash[..10])
}

impl Permissions {
    fn check(&self) -> Result<(), CertificateError> {
        if self.push.len() > PUSH_PATTERNS_MAX {
            return Err(CertificateError::Field("permissions"));
        }
        match self.push.iter().find(|pattern| !is_cache_pattern(pattern)) {
            Some(pattern) => Err(CertificateError::Permission(format!("push:{pattern}"))),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [self.share.then_some("share"), self.vouch.then_some("vouch")];
        let mut words: Vec<String> = words.into_iter().flatten().map(str::to_owned).collect();
        words.extend(self.push.iter().map(|pattern| format!("push:{pattern}")));
        f.write_str(&words.join(","))
    }
}

impl std::str::FromStr for Permissions {
    type Err = CertificateError;

    fn from_str(text: &str) -> Result<Permissions, CertificateError> {
        let mut permissions = Permissions::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match word.split_once(':') {
                None if word == "share" => permissions.share = true,
                None if word == "vouch" => permissions.vouch = true,
                Some(("push", pattern)) => {
                    permissions.push.insert(pattern.to_owned());
                }
                _ => return Err(CertificateError::Permission(word.to_owned())),
            }
        }
        permissions.check()?;
        Ok(permissions)
    }
}

fn signed_bytes(body: &[u8]) -> Vec<u8> {
    [SIGNING_CONTEXT, body].concat()
}

fn check_name(name: &str) -> Result<(), CertificateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=MEMBER_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(CertificateError::Name(
            name.chars().take(MEMBER_NAME_BYTES_MAX).collect(),
        ))
    }
}

/// Attic's grammar of cache patterns, so that one rule serves tokens and certificates.
fn is_cache_pattern(pattern: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_+*".contains(&byte);
    (1..=50).contains(&pattern.len()) && pattern.bytes().all(allowed)
}

fn hash_of_details(details: &[u8]) -> [u8; 32] {
    sha256(&[DETAILS_CONTEXT, details].concat())
}

#[derive(Clone, PartialEq, prost::Message)]
struct BadgeBody {
    #[prost(bytes = "vec", tag = "1")]
    peer: Vec<u8>,
    #[prost(uint64, tag = "2")]
    not_before: u64,
    #[prost(uint64, tag = "3")]
    not_after: u64,
    #[prost(bytes = "vec", tag = "4")]
    details: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DetailsBody {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    permissions: String,
    #[prost(uint64, tag = "3")]
    serial: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    body: Vec<u8>,
    #[prost(string, tag = "2")]
    signature: String,
    /// Empty around a badge.
    #[prost(bytes = "vec", tag = "3")]
    details: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: u64 = 86_400;
    const ME: PeerId = PeerId::from_public_key([7; 32]);

    fn mesh(seed: u8) -> SecretKey {
        SecretKey::from_seed("home".parse().unwrap(), [seed; 32])
    }

    fn certificate() -> Certificate {
        Certificate {
            peer: ME,
            name: "desk-1.lan".into(),
            permissions: "share,vouch,push:main,push:team-*".parse().unwrap(),
            not_before: UnixTime(100 * DAY),
            not_after: UnixTime(130 * DAY),
            serial: 42,
        }
    }

    fn verify(signed: &SignedCertificate, day: u64) -> Result<Certificate, NotAMember> {
        signed.verify(&mesh(1).public_key(), &ME, UnixTime(day * DAY))
    }

    #[test]
    fn a_signed_certificate_survives_its_file_and_verifies() {
        let signed = certificate().sign(&mesh(1)).unwrap();
        let read = SignedCertificate::from_text(&format!("{}\n", signed.to_text())).unwrap();
        assert_eq!(read, signed);
        assert_eq!(verify(&read, 110), Ok(certificate()));
        assert!(signed.to_bytes().len() < CERTIFICATE_BYTES_MAX);
    }

    #[test]
    fn another_mesh_key_of_the_same_name_is_a_bad_signature() {
        let signed = certificate().sign(&mesh(2)).unwrap();
        assert_eq!(verify(&signed, 110), Err(NotAMember::BadSignature));
    }

    #[test]
    fn another_mesh_is_named() {
        let other = SecretKey::from_seed("office".parse().unwrap(), [1; 32]);
        let signed = certificate().sign(&other).unwrap();
        assert!(matches!(
            verify(&signed, 110),
            Err(NotAMember::OtherMesh { .. })
        ));
    }

    #[test]
    fn a_certificate_does_not_work_for_another_peer() {
        let signed = certificate().sign(&mesh(1)).unwrap();
        let thief = PeerId::from_public_key([8; 32]);
        let outcome = signed.verify(&mesh(1).public_key(), &thief, UnixTime(110 * DAY));
        assert_eq!(
            outcome,
            Err(NotAMember::OtherPeer {
                certified: ME,
                connected: thief
            })
        );
    }

    #[test]
    fn dates_bound_membership_with_an_hour_of_skew_at_the_start_only() {
        let signed = certificate().sign(&mesh(1)).unwrap();
        let at = |now| signed.verify(&mesh(1).public_key(), &ME, UnixTime(now));
        assert!(matches!(
            at(100 * DAY - CLOCK_SKEW_SECONDS - 1),
            Err(NotAMember::NotYetValid { .. })
        ));
        assert!(at(100 * DAY - CLOCK_SKEW_SECONDS).is_ok());
        assert!(at(130 * DAY - 1).is_ok());
        assert!(matches!(at(130 * DAY), Err(NotAMember::Expired { .. })));
    }

    #[test]
    fn a_badge_proves_membership_and_tells_neither_name_nor_permissions() {
        let signed = certificate().sign(&mesh(1)).unwrap();
        let bytes = signed.badge().to_bytes();
        for secret in ["desk-1.lan", "share", "vouch", "main"] {
            let is_there = bytes.windows(secret.len()).any(|w| w == secret.as_bytes());
            assert!(!is_there, "{secret}");
        }
        let badge = SignedBadge::from_bytes(&bytes).unwrap();
        let verify = |badge: &SignedBadge, peer: &PeerId, day: u64| {
            badge.verify(&mesh(1).public_key(), peer, UnixTime(day * DAY))
        };
        let proved = verify(&badge, &ME, 110).unwrap();
        assert_eq!(
            (proved.not_before, proved.not_after),
            (UnixTime(100 * DAY), UnixTime(130 * DAY))
        );
        let thief = PeerId::from_public_key([8; 32]);
        assert!(matches!(
            verify(&badge, &thief, 110),
            Err(NotAMember::OtherPeer { .. })
        ));
        assert!(matches!(
            verify(&badge, &ME, 130),
            Err(NotAMember::Expired { .. })
        ));
        assert!(matches!(
            verify(&badge, &ME, 90),
            Err(NotAMember::NotYetValid { .. })
        ));
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            let accepted =
                SignedBadge::from_bytes(&changed).is_ok_and(|b| verify(&b, &ME, 110).is_ok());
            assert!(!accepted, "byte {position} may be changed unnoticed");
        }
        // One is no certificate, and a certificate is no badge.
        let certificate = SignedCertificate::from_bytes(&bytes).unwrap();
        assert!(matches!(
            super::tests::verify(&certificate, 110),
            Err(NotAMember::Malformed(_))
        ));
        assert!(SignedBadge::from_bytes(&signed.to_bytes()).is_err());
    }

    #[test]
    fn details_of_another_certificate_do_not_fit() {
        let allowed = certificate().sign(&mesh(1)).unwrap();
        let other = Certificate {
            permissions: "share".parse().unwrap(),
            ..certificate()
        };
        let mixed = SignedCertificate {
            badge: other.sign(&mesh(1)).unwrap().badge,
            details: allowed.details,
        };
        assert!(matches!(verify(&mixed, 110), Err(NotAMember::Malformed(_))));
    }

    #[test]
    fn without_share_nobody_is_a_member() {
        let mut certificate = certificate();
        certificate.permissions.share = false;
        let signed = certificate.sign(&mesh(1)).unwrap();
        assert!(matches!(
            verify(&signed, 110),
            Err(NotAMember::MayNotShare { .. })
        ));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let bytes = certificate().sign(&mesh(1)).unwrap().to_bytes();
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            let accepted =
                SignedCertificate::from_bytes(&changed).is_ok_and(|c| verify(&c, 110).is_ok());
            assert!(!accepted, "byte {position} may be changed unnoticed");
        }
    }

    #[test]
    fn names_and_permissions_are_strict() {
        for name in ["", "a b", "a\nb", "ä", &"x".repeat(64)] {
            let refused = Certificate {
                name: name.into(),
                ..certificate()
            }
            .sign(&mesh(1));
            assert!(
                matches!(refused, Err(CertificateError::Name(_))),
                "{name:?}"
            );
        }
        for word in ["admin", "push", "push:", "push:a b", "share:x"] {
            assert!(word.parse::<Permissions>().is_err(), "{word:?}");
        }
        assert_eq!(
            "vouch,share".parse::<Permissions>().unwrap().to_string(),
            "share,vouch"
        );
    }

    #[test]
    fn the_tag_tells_meshes_apart_without_showing_the_key() {
        let (one, two) = (
            mesh_tag(&mesh(1).public_key()),
            mesh_tag(&mesh(2).public_key()),
        );
        assert_ne!(one, two);
        assert_eq!(one.len(), 16);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(signed) = SignedCertificate::from_bytes(&bytes) {
                let _ = signed.claims();
                prop_assert!(verify(&signed, 110).is_err());
            }
            if let Ok(badge) = SignedBadge::from_bytes(&bytes) {
                let now = UnixTime(110 * DAY);
                prop_assert!(badge.verify(&mesh(1).public_key(), &ME, now).is_err());
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            let _ = SignedCertificate::from_text(&format!("{TEXT_PREFIX}{text}"));
            let _ = text.parse::<Permissions>();
        }
    }
}
