//! Whatever the decoder accepts is exactly what its layout would produce, however it is cut.
#![no_main]

use granary_protocol::nar::{Decoder, Event, LayoutRecorder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The length decides how the input is cut, so that any NAR may be in the corpus as it is.
    let chunk = bytes.len() % 61 + 1;
    let mut decoder = Decoder::new();
    let mut recorder = LayoutRecorder::new();
    let mut is_complete = false;
    for mut piece in bytes.chunks(chunk) {
        loop {
            match decoder.next(&mut piece) {
                Ok(Some(event)) => {
                    is_complete = matches!(event, Event::End);
                    if recorder.record(&event).is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    if decoder.finish().is_ok() {
        assert!(is_complete);
        let layout = recorder.finish().expect("what decodes has a layout");
        assert_eq!(layout.nar_size(), bytes.len() as u64);
    }
});
