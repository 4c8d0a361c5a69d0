//! No bytes make a seek table panic, and one that is read prints the same bytes.
#![no_main]

use granary_protocol::seekable::SeekTable;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &[u8])| {
    let (file_size, bytes) = input;
    if let Ok(table) = SeekTable::from_bytes(bytes, file_size) {
        assert_eq!(table.to_bytes(), bytes);
        assert_eq!(table.locate(table.raw_size()), None);
    }
});
