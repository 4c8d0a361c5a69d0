//! Credentials: the token that a request shows, as Nix, curl and people send it.

use data_encoding::BASE64;
use granary_protocol::token::TOKEN_BYTES_MAX;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use zeroize::Zeroizing;

/// Finds the token in `Authorization: Bearer …`, or the password of `Basic …` (netrc); `None` without the header.
///
/// # Errors
/// What is wrong with the header, in words for who sent it.
pub fn presented(headers: &HeaderMap) -> Result<Option<Zeroizing<String>>, &'static str> {
    let Some(value) = headers.get(AUTHORIZATION) else {
        return Ok(None);
    };
    let value = value
        .to_str()
        .map_err(|_| "the Authorization header is not text")?;
    let (scheme, rest) = value
        .split_once(' ')
        .ok_or("the Authorization header has one word")?;
    if rest.len() > 2 * TOKEN_BYTES_MAX {
        return Err("the Authorization header is too long");
    }
    // `attic` writes the scheme in lower case.
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Some(Zeroizing::new(rest.trim().to_owned())));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err("the Authorization header is neither Bearer nor Basic");
    }
    let decoded = BASE64.decode(rest.trim().as_bytes()).ok();
    let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok().map(Zeroizing::new));
    let password = decoded.as_ref().and_then(|text| text.split_once(':'));
    match password {
        Some((_, password)) => Ok(Some(Zeroizing::new(password.to_owned()))),
        None => Err("the Basic credentials are malformed"),
    }
}
