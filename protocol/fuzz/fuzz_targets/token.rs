//! No text makes a token panic, none that was not signed is proved, and what claims say survives a token of ours.
#![no_main]

use data_encoding::BASE64URL_NOPAD;
use granary_protocol::certificate::UnixTime;
use granary_protocol::signature::SecretKey;
use granary_protocol::token::{Permission, TOKEN_BYTES_MAX, Token};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // As it stands, and as the claims of a token: base-64 hides them from the fuzzer.
    check(text);
    let encode = |part: &str| BASE64URL_NOPAD.encode(part.as_bytes());
    check(&format!("{}.{}.AAAA", encode(r#"{"alg":"HS256"}"#), encode(text)));
});

fn check(text: &str) {
    let Ok(token) = Token::parse(text) else {
        return;
    };
    // Not the one that signed the seeds.
    let key = SecretKey::from_seed("anchor".parse().expect("a key name"), [99; 32]);
    assert!(!token.is_signed_by(&key.public_key()));
    let _ = token.claims.check_time(UnixTime(1));
    let _ = token.claims.allows("main", Permission::Pull);
    let minted = token.claims.mint(&key);
    if minted.len() <= TOKEN_BYTES_MAX {
        let again = Token::parse(&minted).expect("what was read can be minted and read");
        assert_eq!(again.claims, token.claims);
        assert!(again.is_signed_by(&key.public_key()));
    }
}
