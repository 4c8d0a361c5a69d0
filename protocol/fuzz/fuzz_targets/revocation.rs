//! No bytes or text make a list of revocations panic, and none that was not signed verifies.
#![no_main]

use granary_protocol::revocation::{REVOKED_MAX, SignedRevocations};
use granary_protocol::signature::SecretKey;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mesh = SecretKey::from_seed("home".parse().expect("a key name"), [1; 32]).public_key();
    if let Ok(signed) = SignedRevocations::from_bytes(bytes) {
        assert!(signed.claims().revoked.len() <= REVOKED_MAX);
        assert!(signed.verify(&mesh).is_err());
        assert_eq!(SignedRevocations::from_text(&signed.to_text()), Ok(signed));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = SignedRevocations::from_text(text);
    }
});
