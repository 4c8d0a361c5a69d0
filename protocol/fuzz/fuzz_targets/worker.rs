//! Whatever a Nix daemon says, reading it ends, and a longer beginning never changes what was read.
#![no_main]

use granary_protocol::worker::{greeted, temp_root_added, welcome};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(Some((version, taken))) = greeted(bytes) else {
        return;
    };
    let rest = &bytes[taken..];
    for read in [welcome, temp_root_added] {
        if let Ok(Some((answer, taken))) = read(version, rest) {
            assert!(taken <= rest.len());
            assert_eq!(read(version, &rest[..taken]), Ok(Some((answer, taken))));
        }
    }
});
