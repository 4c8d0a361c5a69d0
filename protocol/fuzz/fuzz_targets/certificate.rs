//! No bytes or text make a certificate or an assertion panic, and none that was not signed verifies.
#![no_main]

use granary_protocol::assertion::SignedAssertion;
use granary_protocol::certificate::{Permissions, SignedBadge, SignedCertificate, UnixTime};
use granary_protocol::peer::PeerId;
use granary_protocol::signature::{PublicKey, SecretKey, Signature};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mesh = SecretKey::from_seed("home".parse().expect("a key name"), [1; 32]).public_key();
    if let Ok(signed) = SignedCertificate::from_bytes(bytes) {
        let _ = signed.claims();
        let peer = PeerId::from_public_key([7; 32]);
        assert!(signed.verify(&mesh, &peer, UnixTime(1)).is_err());
        assert_eq!(SignedCertificate::from_text(&signed.to_text()), Ok(signed));
    }
    if let Ok(badge) = SignedBadge::from_bytes(bytes) {
        let peer = PeerId::from_public_key([7; 32]);
        assert!(badge.verify(&mesh, &peer, UnixTime(1)).is_err());
        assert_eq!(SignedBadge::from_bytes(&badge.to_bytes()), Ok(badge));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = SignedCertificate::from_text(text);
        if let Ok(assertion) = SignedAssertion::from_text(text) {
            assert!(assertion.verify(&mesh, assertion.claims().issued).is_err());
            assert_eq!(SignedAssertion::from_text(&assertion.to_text()), Ok(assertion));
        }
        let _ = text.parse::<Permissions>();
        let _ = text.parse::<PeerId>();
        let _ = text.parse::<PublicKey>();
        let _ = text.parse::<Signature>();
    }
});
