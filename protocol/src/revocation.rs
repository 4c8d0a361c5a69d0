//! Revocations: whom the mesh key has put out, and since when.
//!
//! One list for the whole mesh, signed by the mesh key, with a number that rises. It names peers and
//! moments: every certificate of that peer that begins up to then is void, and one that is issued
//! later is not, so that a laptop that was lost and found can be admitted again. Members pass the
//! list on and keep it; a list with a lesser number is an old one, whoever shows it.
//!
//! Invariants: at most [`REVOKED_MAX`] peers, each once; nothing of a list counts before
//! [`SignedRevocations::verify`].

use std::collections::BTreeMap;
use std::sync::Arc;

use data_encoding::BASE64;
use prost::Message as _;

use crate::certificate::{Badge, Certificate, UnixTime};
use crate::line::{Line, LineError};
use crate::peer::PeerId;
use crate::signature::{PublicKey, SecretKey, Signature};

/// Keeps a list's signature from being valid for anything else signed by the same key.
const SIGNING_CONTEXT: &[u8] = b"granary-revocations-1\n";

/// First word of a file with a list.
const TEXT_PREFIX: &str = "granary-revocations-1:";

/// Most peers in a list: as many as the largest mesh that a node knows has members.
pub const REVOKED_MAX: usize = 4096;

/// Bytes of one entry: the peer's key, then the moment, big-endian.
const ENTRY_BYTES: usize = 40;

/// Largest encoded list: all entries, and a signature.
pub const REVOCATIONS_BYTES_MAX: usize = REVOKED_MAX * ENTRY_BYTES + 1024;

/// Largest text of a list, with room for white space.
pub const REVOCATIONS_TEXT_BYTES_MAX: usize = REVOCATIONS_BYTES_MAX / 3 * 4 + 1024;

/// A file with a list.
const LINE: Line = Line {
    prefix: TEXT_PREFIX,
    encoding: BASE64,
    text_bytes_max: REVOCATIONS_TEXT_BYTES_MAX,
};

/// Whom the mesh key has put out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    /// Rises with every list.
    pub number: u64,
    /// Certificates of these peers that begin up to this moment are void.
    pub revoked: BTreeMap<PeerId, UnixTime>,
}

/// A list as it travels, nothing proved. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRevocations(Arc<Signed>);

#[derive(Debug, PartialEq, Eq)]
struct Signed {
    list: Revocations,
    body: Vec<u8>,
    signature: Signature,
}

/// A text or byte string that is no list of revocations.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RevocationsError {
    #[error("list of revocations has {0} bytes, at most {REVOCATIONS_BYTES_MAX} are read")]
    TooLong(usize),
    #[error("list of revocations names {0} peers, at most {REVOKED_MAX} can be revoked")]
    TooMany(usize),
    #[error("text does not start with {TEXT_PREFIX:?}")]
    NotAList,
    #[error("list of revocations is not base64")]
    NotBase64,
    #[error("list of revocations does not decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("list of revocations has a missing or malformed {0}")]
    Field(&'static str),
}

/// Why a well-formed list does not count.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotOurRevocations {
    #[error("list of revocations is signed by mesh key {found:?}, this mesh is {expected:?}")]
    OtherMesh { found: String, expected: String },
    #[error("signature of the list of revocations does not verify")]
    BadSignature,
}

impl Revocations {
    /// Whether the certificate is void, although everything in it is right.
    pub fn is_revoked(&self, certificate: &Certificate) -> bool {
        self.is_void(&certificate.peer, certificate.not_before)
    }

    /// The same for a badge.
    pub fn is_revoked_badge(&self, badge: &Badge) -> bool {
        self.is_void(&badge.peer, badge.not_before)
    }

    /// Whether a certificate of `peer` that begins then is void.
    pub fn is_void(&self, peer: &PeerId, not_before: UnixTime) -> bool {
        let until = self.revoked.get(peer);
        until.is_some_and(|until| not_before <= *until)
    }

    /// Voids every certificate of `peer` that begins up to `until`.
    ///
    /// # Errors
    /// [`RevocationsError::TooMany`] when the list is full.
    pub fn revoke(&mut self, peer: PeerId, until: UnixTime) -> Result<(), RevocationsError> {
        if self.revoked.len() >= REVOKED_MAX && !self.revoked.contains_key(&peer) {
            return Err(RevocationsError::TooMany(REVOKED_MAX + 1));
        }
        let known = self.revoked.entry(peer).or_insert(until);
        *known = until.max(*known);
        Ok(())
    }

    /// Signs the list with the mesh key.
    ///
    /// # Errors
    /// [`RevocationsError::TooMany`], which readers would refuse.
    pub fn sign(self, mesh: &SecretKey) -> Result<SignedRevocations, RevocationsError> {
        if self.revoked.len() > REVOKED_MAX {
            return Err(RevocationsError::TooMany(self.revoked.len()));
        }
        let entry = |(peer, until): (&PeerId, &UnixTime)| {
            let mut entry = peer.as_public_key().to_vec();
            entry.extend(until.0.to_be_bytes());
            entry
        };
        let body = Body {
            number: self.number,
            revoked: self.revoked.iter().flat_map(entry).collect(),
        }
        .encode_to_vec();
        let signature = mesh.sign(&signed_bytes(&body));
        Ok(SignedRevocations(Arc::new(Signed {
            list: self,
            body,
            signature,
        })))
    }

    fn from_body(bytes: &[u8]) -> Result<Revocations, RevocationsError> {
        let body = Body::decode(bytes)?;
        let (entries, rest) = body.revoked.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() {
            return Err(RevocationsError::Field("entry"));
        }
        if entries.len() > REVOKED_MAX {
            return Err(RevocationsError::TooMany(entries.len()));
        }
        let mut revoked = BTreeMap::new();
        for entry in entries {
            let malformed = RevocationsError::Field("entry");
            let (peer, until) = entry.split_first_chunk::<32>().ok_or(malformed.clone())?;
            let until = <[u8; 8]>::try_from(until).map_err(|_| malformed.clone())?;
            let peer = PeerId::from_public_key(*peer);
            // Ascending, so that each stands once.
            if revoked
                .last_key_value()
                .is_some_and(|(last, _)| *last >= peer)
            {
                return Err(malformed);
            }
            revoked.insert(peer, UnixTime(u64::from_be_bytes(until)));
        }
        Ok(Revocations {
            number: body.number,
            revoked,
        })
    }
}

impl SignedRevocations {
    /// Proves that the mesh key signed the list.
    pub fn verify(&self, mesh: &PublicKey) -> Result<&Revocations, NotOurRevocations> {
        let Signed {
            list,
            body,
            signature,
        } = self.0.as_ref();
        if signature.key_name() != mesh.name() {
            return Err(NotOurRevocations::OtherMesh {
                found: signature.key_name().to_string(),
                expected: mesh.name().to_string(),
            });
        }
        match mesh.verify(&signed_bytes(body), signature) {
            true => Ok(list),
            false => Err(NotOurRevocations::BadSignature),
        }
    }

    /// Reads what the list says without proving any of it.
    pub fn claims(&self) -> &Revocations {
        &self.0.list
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        Envelope {
            body: self.0.body.clone(),
            signature: self.0.signature.to_string(),
        }
        .encode_to_vec()
    }

    /// Parses the form that travels; at most [`REVOCATIONS_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedRevocations, RevocationsError> {
        if bytes.len() > REVOCATIONS_BYTES_MAX {
            return Err(RevocationsError::TooLong(bytes.len()));
        }
        let Envelope { body, signature } = Envelope::decode(bytes)?;
        let signature = signature.parse();
        Ok(SignedRevocations(Arc::new(Signed {
            list: Revocations::from_body(&body)?,
            body,
            signature: signature.map_err(|_| RevocationsError::Field("signature"))?,
        })))
    }

    /// Returns the one line of a file with the list, without a line break.
    pub fn to_text(&self) -> String {
        LINE.write(&self.to_bytes())
    }

    /// Parses the line of a file; surrounding white space is ignored.
    pub fn from_text(text: &str) -> Result<SignedRevocations, RevocationsError> {
        SignedRevocations::from_bytes(&LINE.read(text)?)
    }
}

impl From<LineError> for RevocationsError {
    fn from(error: LineError) -> RevocationsError {
        match error {
            LineError::TooLong(length) => RevocationsError::TooLong(length),
            LineError::Prefix => RevocationsError::NotAList,
            LineError::NotBase64 => RevocationsError::NotBase64,
        }
    }
}

fn signed_bytes(body: &[u8]) -> Vec<u8> {
    [SIGNING_CONTEXT, body].concat()
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(uint64, tag = "1")]
    number: u64,
    /// [`ENTRY_BYTES`] each, one after another.
    #[prost(bytes = "vec", tag = "2")]
    revoked: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    body: Vec<u8>,
    #[prost(string, tag = "2")]
    signature: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mesh(seed: u8) -> SecretKey {
        SecretKey::from_seed("home".parse().unwrap(), [seed; 32])
    }

    fn peer(number: u8) -> PeerId {
        PeerId::from_public_key([number; 32])
    }

    fn list() -> Revocations {
        let mut list = Revocations {
            number: 7,
            ..Revocations::default()
        };
        list.revoke(peer(1), UnixTime(100)).unwrap();
        list.revoke(peer(2), UnixTime(200)).unwrap();
        list
    }

    fn certificate(number: u8, not_before: u64) -> Certificate {
        Certificate {
            peer: peer(number),
            name: "desk".into(),
            permissions: "share".parse().unwrap(),
            not_before: UnixTime(not_before),
            not_after: UnixTime(1000),
            serial: 1,
        }
    }

    #[test]
    fn a_list_survives_its_file_and_verifies() {
        let signed = list().sign(&mesh(1)).unwrap();
        let read = SignedRevocations::from_text(&format!("{}\n", signed.to_text())).unwrap();
        assert_eq!(read, signed);
        assert_eq!(read.verify(&mesh(1).public_key()), Ok(&list()));
        assert_eq!(
            read.verify(&mesh(2).public_key()),
            Err(NotOurRevocations::BadSignature)
        );
        let other = SecretKey::from_seed("office".parse().unwrap(), [1; 32]);
        assert!(matches!(
            read.verify(&other.public_key()),
            Err(NotOurRevocations::OtherMesh { .. })
        ));
    }

    #[test]
    fn what_was_issued_before_is_void_and_what_comes_after_is_not() {
        let list = list();
        assert!(list.is_revoked(&certificate(1, 50)));
        assert!(list.is_revoked(&certificate(1, 100)));
        assert!(!list.is_revoked(&certificate(1, 101)));
        assert!(!list.is_revoked(&certificate(3, 50)));
    }

    #[test]
    fn a_peer_is_not_revoked_less_by_being_revoked_again() {
        let mut list = list();
        list.revoke(peer(2), UnixTime(150)).unwrap();
        assert!(list.is_revoked(&certificate(2, 200)));
    }

    #[test]
    fn a_full_list_fits_and_takes_no_more() {
        let mut full = Revocations::default();
        for number in 0..REVOKED_MAX {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&(number as u64).to_be_bytes());
            full.revoke(PeerId::from_public_key(key), UnixTime(u64::MAX))
                .unwrap();
        }
        assert_eq!(
            full.revoke(peer(9), UnixTime(1)),
            Err(RevocationsError::TooMany(REVOKED_MAX + 1))
        );
        full.number = u64::MAX;
        let text = full.sign(&mesh(1)).unwrap().to_text();
        assert!(SignedRevocations::from_text(&text).is_ok());
    }

    #[test]
    fn a_changed_byte_is_an_error_or_ends_the_proof() {
        let bytes = list().sign(&mesh(1)).unwrap().to_bytes();
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            if let Ok(signed) = SignedRevocations::from_bytes(&changed) {
                let proof = signed.verify(&mesh(1).public_key());
                assert!(proof.is_err(), "byte {position} makes no difference");
            }
        }
    }

    #[test]
    fn entries_out_of_order_and_in_part_are_refused() {
        let entry = |number: u8| [&[number; 32][..], &[0; 8]].concat();
        let parse = |revoked: Vec<u8>| {
            let body = Body { number: 1, revoked }.encode_to_vec();
            let signature = mesh(1).sign(&signed_bytes(&body)).to_string();
            SignedRevocations::from_bytes(&Envelope { body, signature }.encode_to_vec())
        };
        assert!(parse([entry(1), entry(2)].concat()).is_ok());
        for wrong in [
            [entry(2), entry(1)].concat(),
            [entry(1), entry(1)].concat(),
            entry(1)[..39].to_vec(),
        ] {
            assert_eq!(parse(wrong), Err(RevocationsError::Field("entry")));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = SignedRevocations::from_bytes(&bytes);
            let _ = SignedRevocations::from_text(&String::from_utf8_lossy(&bytes));
        }
    }
}
