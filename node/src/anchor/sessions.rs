//! Sessions: who is logged in to the anchor's status page, with which token.
//!
//! A browser shows a token once and gets a cookie for it; the cookie opens the page and nothing else, no
//! API looks at it. The token is proved again at each use, so one that expires or is revoked ends its session. Kept
//! in memory alone, for [`SESSION_SECONDS`]; a restart ends all. Sessions are found by the SHA-256 of what the
//! cookie says, so the time that takes tells nothing of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use ::http::header::COOKIE;
use ::http::{HeaderMap, HeaderValue};
use granary_protocol::hash::sha256;
use granary_protocol::nix32;
use zeroize::Zeroizing;

/// A day of work.
const SESSION_SECONDS: u64 = 8 * 3600;

/// Sessions at once; each has a token of a few hundred bytes. The one that ends first makes room.
const SESSIONS_MAX: usize = 1000;

/// Random bytes in a cookie.
const ID_BYTES: usize = 32;

/// Names of the cookie: browsers take the first over TLS alone, and of this host alone.
const COOKIE_OVER_TLS: &str = "__Host-granary";
const COOKIE_PLAIN: &str = "granary";

#[derive(Default)]
pub struct Sessions(Mutex<BTreeMap<[u8; 32], Session>>);

struct Session {
    token: Zeroizing<String>,
    /// Seconds since 1970.
    ends: u64,
}

impl Sessions {
    /// Begins a session; returns what the cookie says.
    pub fn open(&self, token: Zeroizing<String>, now: u64) -> Result<String, getrandom::Error> {
        let mut id = [0; ID_BYTES];
        getrandom::fill(&mut id)?;
        let id = nix32::encode(&id);
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, session| session.ends > now);
        if sessions.len() >= SESSIONS_MAX {
            let first = sessions.iter().min_by_key(|(_, session)| session.ends);
            if let Some(first) = first.map(|(key, _)| *key) {
                sessions.remove(&first);
            }
        }
        let ends = now.saturating_add(SESSION_SECONDS);
        sessions.insert(sha256(id.as_bytes()), Session { token, ends });
        Ok(id)
    }

    /// The token of the session that a request is part of.
    pub fn token(
        &self,
        headers: &HeaderMap,
        is_secure: bool,
        now: u64,
    ) -> Option<Zeroizing<String>> {
        let key = key(headers, is_secure)?;
        let sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let session = sessions.get(&key).filter(|session| session.ends > now)?;
        Some(session.token.clone())
    }

    /// Ends the session that a request is part of.
    pub fn close(&self, headers: &HeaderMap, is_secure: bool) {
        if let Some(key) = key(headers, is_secure) {
            let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            sessions.remove(&key);
        }
    }
}

/// The cookie that begins a session, or, without an id, the one that ends it.
pub fn cookie(id: Option<&str>, is_secure: bool) -> Option<HeaderValue> {
    let (name, more) = match is_secure {
        true => (COOKIE_OVER_TLS, "; Secure"),
        false => (COOKIE_PLAIN, ""),
    };
    let (value, seconds) = match id {
        Some(id) => (id, SESSION_SECONDS),
        None => ("", 0),
    };
    let text =
        format!("{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{more}");
    HeaderValue::from_str(&text).ok()
}

fn key(headers: &HeaderMap, is_secure: bool) -> Option<[u8; 32]> {
    let wanted = match is_secure {
        true => COOKIE_OVER_TLS,
        false => COOKIE_PLAIN,
    };
    let texts = headers.get_all(COOKIE).into_iter();
    let texts = texts.filter_map(|value| value.to_str().ok());
    let mut pairs = texts.flat_map(|text| text.split(';'));
    pairs.find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == wanted).then(|| sha256(value.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(cookie: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(COOKIE, cookie.parse().unwrap());
        headers
    }

    fn open(sessions: &Sessions, token: &str, now: u64) -> String {
        sessions
            .open(Zeroizing::new(token.to_owned()), now)
            .unwrap()
    }

    #[test]
    fn a_session_is_found_by_its_cookie_until_it_ends() {
        let sessions = Sessions::default();
        let id = open(&sessions, "secret", 100);
        let token = |cookie: &str, now| {
            let token = sessions.token(&asking(cookie), false, now);
            token.map(|token| token.to_string())
        };
        assert_eq!(
            token(&format!("granary={id}"), 101).as_deref(),
            Some("secret")
        );
        assert_eq!(
            token(&format!("a=b; granary={id};x"), 101).as_deref(),
            Some("secret")
        );
        for wrong in [
            "granary=".to_owned(),
            format!("granary={}", &id[1..]),
            format!("granary={id} x"),
            format!("grana={id}"),
            // What is good over TLS is asked for there.
            format!("__Host-granary={id}"),
        ] {
            assert_eq!(token(&wrong, 101), None, "{wrong}");
        }
        assert_eq!(token(&format!("granary={id}"), 100 + SESSION_SECONDS), None);
        sessions.close(&asking(&format!("granary={id}")), false);
        assert_eq!(token(&format!("granary={id}"), 101), None);
    }

    #[test]
    fn sessions_are_bounded_and_the_oldest_makes_room() {
        let sessions = Sessions::default();
        let ids: Vec<_> = (0..=SESSIONS_MAX as u64)
            .map(|now| open(&sessions, "t", now))
            .collect();
        let is_there = |id: &String| {
            let headers = asking(&format!("granary={id}"));
            sessions.token(&headers, false, 2000).is_some()
        };
        assert!(!is_there(&ids[0]) && is_there(&ids[1]) && is_there(&ids[SESSIONS_MAX]));
    }

    #[test]
    fn the_cookie_is_for_the_page_and_no_script() {
        let text = |id, is_secure| cookie(id, is_secure).unwrap().to_str().unwrap().to_owned();
        assert_eq!(
            text(Some("x"), true),
            "__Host-granary=x; Path=/; Max-Age=28800; HttpOnly; SameSite=Strict; Secure"
        );
        assert_eq!(
            text(None, false),
            "granary=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict"
        );
    }
}
