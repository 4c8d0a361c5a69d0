//! No bytes or text make a ticket or a word about joining panic, and what is read is written the same.
#![no_main]

use granary_protocol::ticket::{Reply, Request, Ticket};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(ticket) = Ticket::from_text(text)
    {
        let text = ticket.to_text().expect("its addresses were checked");
        assert_eq!(Ticket::from_text(&text), Ok(ticket));
    }
    if let Ok(request) = Request::from_bytes(bytes) {
        assert_eq!(Request::from_bytes(&request.to_bytes()), Ok(request));
    }
    if let Ok(reply) = Reply::from_bytes(bytes) {
        assert_eq!(Reply::from_bytes(&reply.to_bytes()), Ok(reply));
    }
});
