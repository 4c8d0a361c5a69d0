//! Whatever parses prints as something that parses as the same, with its false claims dropped.
#![no_main]

use granary_protocol::cache_info::CacheInfo;
use granary_protocol::narinfo::{NarInfo, NarUrl, VerifiedNarInfo};
use granary_protocol::signature::TrustedKeys;
use granary_protocol::store_path::StoreDir;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let dir = StoreDir::default();
    let _ = CacheInfo::parse(text, &dir);
    let _ = NarUrl::parse(text);
    if let Ok(mut narinfo) = NarInfo::parse(text, &dir) {
        narinfo.dropped_signatures = 0;
        assert_eq!(NarInfo::parse(&narinfo.to_text(&dir), &dir).as_ref(), Ok(&narinfo));
        let _ = VerifiedNarInfo::verify(narinfo, &TrustedKeys::new(), &dir);
    }
});
