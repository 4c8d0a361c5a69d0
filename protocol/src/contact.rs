//! Contact: what a member says of itself, for those who are not linked to it.
//!
//! In a mesh of more than a few dozen nodes nobody is linked to everyone, yet everyone must be able
//! to ask everyone. So each member signs where it can be reached, beside the certificate that proves
//! it belongs, and members pass these on. A newer contact of the same member has a greater number;
//! numbers follow the wall clock, so that they rise even over a lost state folder.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

use prost::Message as _;

use crate::certificate::{
    CERTIFICATE_BYTES_MAX, Certificate, NotAMember, SignedCertificate, UnixTime,
};
use crate::peer::{PeerId, PeerKey};
use crate::signature::PublicKey;

/// Keeps the signature of a contact from being valid for anything else signed by the same key.
const SIGNING_CONTEXT: &[u8] = b"granary-contact-1\n";

/// Addresses in one contact: interfaces × families of an ordinary machine.
pub const CONTACT_ADDRESSES_MAX: usize = 8;

/// Largest encoded contact: a full certificate and eight addresses.
pub const CONTACT_BYTES_MAX: usize = CERTIFICATE_BYTES_MAX + 512;

/// Where a member can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact {
    pub certificate: SignedCertificate,
    /// Rises with every contact of the same member.
    pub number: u64,
    /// Where it listens for links, at most [`CONTACT_ADDRESSES_MAX`]; none if it is only called from.
    pub addresses: Vec<SocketAddr>,
    /// Where it serves NARs, if it does.
    pub transfer_port: Option<u16>,
}

/// A contact with its member's signature, which may not be right. Cheap to clone.
#[derive(Clone)]
pub struct SignedContact(Arc<Signed>);

struct Signed {
    contact: Contact,
    /// The peer that the certificate names, and that must have signed.
    peer: PeerId,
    body: Vec<u8>,
    signature: [u8; 64],
    is_signed: OnceLock<bool>,
}

/// Bytes that are no contact.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ContactError {
    #[error("contact has {0} bytes, at most {CONTACT_BYTES_MAX} are read")]
    TooLong(usize),
    #[error("contact does not decode: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("contact field {0} is missing or malformed")]
    Field(&'static str),
}

/// Why a well-formed contact proves nothing.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotAContact {
    #[error(transparent)]
    NotAMember(#[from] NotAMember),
    #[error("contact of {peer} is not signed by it")]
    BadSignature { peer: PeerId },
}

impl Contact {
    /// Signs what `key`'s node says of itself; at most [`CONTACT_ADDRESSES_MAX`] addresses are told.
    ///
    /// # Errors
    /// [`ContactError::Field`] when the certificate does not decode.
    pub fn sign(self, key: &PeerKey) -> Result<SignedContact, ContactError> {
        let mut contact = self;
        contact.addresses.truncate(CONTACT_ADDRESSES_MAX);
        let body = Body {
            certificate: contact.certificate.to_bytes(),
            number: contact.number,
            addresses: contact.addresses.iter().map(address_bytes).collect(),
            transfer_port: contact.transfer_port.map_or(0, u32::from),
        }
        .encode_to_vec();
        let signature = key.sign(&signed_bytes(&body));
        let peer = peer_of(&contact.certificate)?;
        Ok(SignedContact(Arc::new(Signed {
            contact,
            peer,
            body,
            signature,
            is_signed: OnceLock::new(),
        })))
    }
}

impl SignedContact {
    pub fn contact(&self) -> &Contact {
        &self.0.contact
    }

    /// The member that the certificate names.
    pub fn peer(&self) -> PeerId {
        self.0.peer
    }

    /// Proves that a member of `mesh`, at `now`, says this of itself.
    pub fn verify(&self, mesh: &PublicKey, now: UnixTime) -> Result<Certificate, NotAContact> {
        let (peer, certificate) = (self.0.peer, &self.0.contact.certificate);
        let certificate = certificate.verify(mesh, &peer, now)?;
        if self.is_signed() {
            Ok(certificate)
        } else {
            Err(NotAContact::BadSignature { peer })
        }
    }

    /// Checks everything but the signatures, of a contact that was verified before it was kept.
    pub fn recall(&self, mesh: &PublicKey, now: UnixTime) -> Result<Certificate, NotAContact> {
        let certificate = &self.0.contact.certificate;
        Ok(certificate.recall(mesh, &self.0.peer, now)?)
    }

    /// Says whether the member that the certificate names signed this.
    pub fn is_signed(&self) -> bool {
        let verify = || {
            let message = signed_bytes(&self.0.body);
            self.0.peer.verify(&message, &self.0.signature)
        };
        *self.0.is_signed.get_or_init(verify)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        Envelope {
            body: self.0.body.clone(),
            signature: self.0.signature.to_vec(),
        }
        .encode_to_vec()
    }

    /// Parses the form that travels; at most [`CONTACT_BYTES_MAX`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<SignedContact, ContactError> {
        if bytes.len() > CONTACT_BYTES_MAX {
            return Err(ContactError::TooLong(bytes.len()));
        }
        let Envelope { body, signature } = Envelope::decode(bytes)?;
        let signature = signature
            .try_into()
            .map_err(|_| ContactError::Field("signature"))?;
        let fields = Body::decode(body.as_slice())?;
        if fields.addresses.len() > CONTACT_ADDRESSES_MAX {
            return Err(ContactError::Field("addresses"));
        }
        let addresses = fields.addresses.iter().map(|bytes| address_of(bytes));
        let addresses = addresses.collect::<Option<Vec<SocketAddr>>>();
        let certificate = SignedCertificate::from_bytes(&fields.certificate)
            .map_err(|_| ContactError::Field("certificate"))?;
        let peer = peer_of(&certificate)?;
        let contact = Contact {
            certificate,
            number: fields.number,
            addresses: addresses.ok_or(ContactError::Field("addresses"))?,
            transfer_port: match u16::try_from(fields.transfer_port) {
                Ok(port) => Some(port).filter(|port| *port > 0),
                Err(_) => return Err(ContactError::Field("transfer_port")),
            },
        };
        Ok(SignedContact(Arc::new(Signed {
            contact,
            peer,
            body,
            signature,
            is_signed: OnceLock::new(),
        })))
    }
}

impl PartialEq for SignedContact {
    fn eq(&self, other: &SignedContact) -> bool {
        self.0.body == other.0.body && self.0.signature == other.0.signature
    }
}

impl Eq for SignedContact {}

impl fmt::Debug for SignedContact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SignedContact")
            .field(&self.0.peer)
            .field(&self.0.contact.number)
            .finish()
    }
}

fn signed_bytes(body: &[u8]) -> Vec<u8> {
    [SIGNING_CONTEXT, body].concat()
}

fn peer_of(certificate: &SignedCertificate) -> Result<PeerId, ContactError> {
    match certificate.claims() {
        Ok(certificate) => Ok(certificate.peer),
        Err(_) => Err(ContactError::Field("certificate")),
    }
}

/// 4 or 16 bytes of address, then 2 of port, all big-endian.
fn address_bytes(address: &SocketAddr) -> Vec<u8> {
    let mut bytes = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.extend(address.port().to_be_bytes());
    bytes
}

fn address_of(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_last_chunk::<2>()?;
    let ip = match (<[u8; 4]>::try_from(ip), <[u8; 16]>::try_from(ip)) {
        (Ok(octets), _) => IpAddr::from(octets),
        (_, Ok(octets)) => IpAddr::from(octets),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(*port)))
}

#[derive(Clone, PartialEq, prost::Message)]
struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    body: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    signature: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    certificate: Vec<u8>,
    #[prost(uint64, tag = "2")]
    number: u64,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addresses: Vec<Vec<u8>>,
    /// 0 for a member that serves no NARs.
    #[prost(uint32, tag = "4")]
    transfer_port: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::SecretKey;

    const NOW: UnixTime = UnixTime(1_700_000_000);

    fn mesh() -> SecretKey {
        SecretKey::from_seed("home".parse().unwrap(), [1; 32])
    }

    fn key() -> PeerKey {
        PeerKey::from_seed([2; 32])
    }

    fn contact() -> Contact {
        let certificate = Certificate {
            peer: key().peer_id(),
            name: "desk".into(),
            permissions: "share".parse().unwrap(),
            not_before: NOW,
            not_after: UnixTime(NOW.0 + 60),
            serial: 1,
        };
        Contact {
            certificate: certificate.sign(&mesh()).unwrap(),
            number: 4,
            addresses: vec![
                "10.0.0.1:4727".parse().unwrap(),
                "[2001:db8::1]:4727".parse().unwrap(),
            ],
            transfer_port: Some(4728),
        }
    }

    fn travelled(signed: &SignedContact) -> SignedContact {
        SignedContact::from_bytes(&signed.to_bytes()).unwrap()
    }

    #[test]
    fn what_a_member_says_of_itself_is_proved_anywhere() {
        let signed = travelled(&contact().sign(&key()).unwrap());
        assert_eq!(*signed.contact(), contact());
        let certificate = signed.verify(&mesh().public_key(), NOW).unwrap();
        assert_eq!(certificate.name, "desk");
        assert_eq!(signed.peer(), key().peer_id());
    }

    #[test]
    fn a_contact_signed_by_another_key_proves_nothing() {
        let other = PeerKey::from_seed([3; 32]);
        let signed = travelled(&contact().sign(&other).unwrap());
        let peer = key().peer_id();
        assert_eq!(
            signed.verify(&mesh().public_key(), NOW),
            Err(NotAContact::BadSignature { peer })
        );
    }

    #[test]
    fn a_contact_lasts_as_long_as_its_certificate() {
        let signed = contact().sign(&key()).unwrap();
        let later = UnixTime(NOW.0 + 60);
        let expired = signed.verify(&mesh().public_key(), later);
        assert!(matches!(
            expired,
            Err(NotAContact::NotAMember(NotAMember::Expired { .. }))
        ));
    }

    #[test]
    fn a_changed_byte_is_an_error_or_ends_the_proof() {
        let bytes = contact().sign(&key()).unwrap().to_bytes();
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            if let Ok(signed) = SignedContact::from_bytes(&changed) {
                let proof = signed.verify(&mesh().public_key(), NOW);
                assert!(proof.is_err(), "byte {position} makes no difference");
            }
        }
    }

    #[test]
    fn only_the_first_addresses_are_told() {
        let mut many = contact();
        many.addresses = vec![many.addresses[0]; 20];
        let signed = travelled(&many.sign(&key()).unwrap());
        assert_eq!(signed.contact().addresses.len(), CONTACT_ADDRESSES_MAX);
    }

    #[test]
    fn oversized_contacts_are_refused_before_they_are_parsed() {
        let bytes = vec![0; CONTACT_BYTES_MAX + 1];
        assert_eq!(
            SignedContact::from_bytes(&bytes),
            Err(ContactError::TooLong(CONTACT_BYTES_MAX + 1))
        );
    }
}
