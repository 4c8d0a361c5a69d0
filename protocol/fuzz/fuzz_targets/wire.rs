//! Whatever decodes as a message encodes to something that decodes as the same message.
#![no_main]

use granary_protocol::wire::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode(bytes) {
        assert_eq!(decode(&encode(&message)), Ok(message));
    }
});
