//! Whatever decodes as a message, or as the proof of a set, encodes to something that decodes as the same.
#![no_main]

use granary_protocol::wire::{decode, decode_proof, encode, encode_proof};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode(bytes) {
        assert_eq!(decode(&encode(&message)), Ok(message));
    }
    if let Ok((contact, head)) = decode_proof(bytes) {
        assert_eq!(decode_proof(&encode_proof(&contact, &head)), Ok((contact, head)));
    }
});
