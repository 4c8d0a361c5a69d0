//! Tokens: what a bearer may do to which caches.
//!
//! A JSON web token (RFC 7519) whose claims have the names that Attic gave them, so that its tokens
//! and clients keep working: `{"sub", "exp", "nbf", "https://jwt.attic.rs/v1": {"caches": {pattern:
//! {"r", "w", "d", "cc", "cr", "cq", "cd"}}}}`. Ours are signed with EdDSA and have an id (`jti`), by
//! which they are listed and revoked; what Attic made is signed with HS256 or RS256, which is proved
//! elsewhere: this module reads, mints, and decides.
//!
//! Reading proves form only: what is in [`Token::claims`] counts once the signature was verified.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::certificate::UnixTime;
use crate::hash::excerpt;
use crate::signature::{PublicKey, SecretKey, Signature};

/// Longest token read; ours have some 400 bytes, and more than this no header holds.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// Patterns in one token.
pub const GRANTS_MAX: usize = 100;

/// Longest subject or id.
pub const SUBJECT_BYTES_MAX: usize = 255;

/// Longest pattern: that of a cache's name.
const PATTERN_BYTES_MAX: usize = 50;

/// How far clocks may differ before a token's dates count: a minute, as JWT libraries do.
const CLOCK_SKEW_SECONDS: u64 = 60;

const CLAIM: &str = "https://jwt.attic.rs/v1";

/// One thing that can be done to a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Permission {
    Pull,
    Push,
    Delete,
    Create,
    Configure,
    Retention,
    Destroy,
}

impl Permission {
    pub const ALL: [Permission; 7] = [
        Permission::Pull,
        Permission::Push,
        Permission::Delete,
        Permission::Create,
        Permission::Configure,
        Permission::Retention,
        Permission::Destroy,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Permission::Pull => "pull",
            Permission::Push => "push",
            Permission::Delete => "delete",
            Permission::Create => "create",
            Permission::Configure => "configure",
            Permission::Retention => "retention",
            Permission::Destroy => "destroy",
        }
    }

    /// Its name in a token.
    const fn claim(self) -> &'static str {
        match self {
            Permission::Pull => "r",
            Permission::Push => "w",
            Permission::Delete => "d",
            Permission::Create => "cc",
            Permission::Configure => "cr",
            Permission::Retention => "cq",
            Permission::Destroy => "cd",
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Permission {
    type Err = TokenError;

    fn from_str(name: &str) -> Result<Permission, TokenError> {
        let found = Permission::ALL
            .into_iter()
            .find(|permission| permission.name() == name);
        found.ok_or_else(|| TokenError::Permission {
            name: excerpt(name),
        })
    }
}

/// Which caches a grant is about: a name in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Whether the pattern covers a cache of this name.
    pub fn matches(&self, cache: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = cache.strip_prefix(first) else {
            return false;
        };
        let Some(mut part) = parts.next() else {
            return rest.is_empty();
        };
        // Each part but the last is found as early as possible, which leaves most to the others.
        for next in parts {
            match rest.split_once(part) {
                Some((_, after)) => rest = after,
                None => return false,
            }
            part = next;
        }
        rest.ends_with(part)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Pattern {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Pattern, TokenError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_+*".contains(&byte);
        let starts_well = text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'*');
        if starts_well && text.len() <= PATTERN_BYTES_MAX && text.bytes().all(is_allowed) {
            Ok(Pattern(text.into()))
        } else {
            Err(TokenError::Pattern {
                pattern: excerpt(text),
            })
        }
    }
}

/// What may be done to the caches of one pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    pub pattern: Pattern,
    pub permissions: Vec<Permission>,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// By which it is listed and revoked; ours have one.
    pub id: Option<String>,
    pub subject: String,
    pub not_before: Option<UnixTime>,
    pub expires: Option<UnixTime>,
    /// In the order of the token, which counts.
    pub grants: Vec<Grant>,
}

/// Why a token's dates forbid its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Untimely {
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid yet")]
    Early,
}

impl Claims {
    /// Whether these permissions cover one on a cache of this name.
    ///
    /// As in Attic the exact name counts, else the first pattern that matches; what several allow is
    /// not added up.
    pub fn allows(&self, cache: &str, permission: Permission) -> bool {
        let grant = self.grant(cache);
        grant.is_some_and(|grant| grant.permissions.contains(&permission))
    }

    /// Whether anything at all is allowed on a cache, which implies to know that it exists.
    pub fn knows(&self, cache: &str) -> bool {
        let grant = self.grant(cache);
        grant.is_some_and(|grant| !grant.permissions.is_empty())
    }

    /// Whether the token may be used at this time.
    pub fn check_time(&self, now: UnixTime) -> Result<(), Untimely> {
        let is_over = |expires: UnixTime| now.0 > expires.0.saturating_add(CLOCK_SKEW_SECONDS);
        if self.expires.is_some_and(is_over) {
            return Err(Untimely::Expired);
        }
        let is_ahead = |start: UnixTime| now.0.saturating_add(CLOCK_SKEW_SECONDS) < start.0;
        match self.not_before.is_some_and(is_ahead) {
            true => Err(Untimely::Early),
            false => Ok(()),
        }
    }

    /// Prints the claims as they stand in a token.
    pub fn to_json(&self) -> String {
        let grants: Vec<String> = self
            .grants
            .iter()
            .map(|grant| {
                let permissions: Vec<_> = grant
                    .permissions
                    .iter()
                    .map(|permission| format!("{:?}:1", permission.claim()))
                    .collect();
                // A pattern needs no escaping.
                format!("\"{}\":{{{}}}", grant.pattern, permissions.join(","))
            })
            .collect();
        let outside = Outside {
            jti: self.id.as_deref(),
            sub: &self.subject,
            nbf: self.not_before.map(|time| time.0),
            exp: self.expires.map(|time| time.0),
        };
        let outside =
            serde_json::to_string(&outside).unwrap_or_else(|_| unreachable!("strings and numbers"));
        // Written by hand, because serde_json's map would sort the patterns.
        let outside = outside.trim_end_matches('}');
        format!(
            "{outside},\"{CLAIM}\":{{\"caches\":{{{}}}}}}}",
            grants.join(",")
        )
    }

    /// Signs these claims with a key of ours.
    pub fn mint(&self, key: &SecretKey) -> String {
        let header = BASE64URL_NOPAD.encode(br#"{"alg":"EdDSA","typ":"JWT"}"#);
        let claims = BASE64URL_NOPAD.encode(self.to_json().as_bytes());
        let message = format!("{header}.{claims}");
        let signature = key.sign(message.as_bytes());
        format!("{message}.{}", BASE64URL_NOPAD.encode(signature.as_bytes()))
    }

    fn grant(&self, cache: &str) -> Option<&Grant> {
        let exact = self.grants.iter().find(|grant| *grant.pattern.0 == *cache);
        exact.or_else(|| {
            self.grants
                .iter()
                .find(|grant| grant.pattern.matches(cache))
        })
    }
}

/// How a token is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    EdDsa,
    Hs256,
    Rs256,
}

/// A token that was read, and not yet proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub algorithm: Algorithm,
    /// What the signature is over.
    pub message: String,
    /// In URL-safe base-64, as it stands in the token.
    pub signature: String,
    pub claims: Claims,
}

/// Why a text is no token. Never shows the token, which may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    #[error("the token has {bytes} bytes, at most {TOKEN_BYTES_MAX} are read")]
    TooLong { bytes: usize },
    #[error("the token is not three parts of url-safe base-64 with dots between them")]
    Form,
    #[error("the token's {part} is not the json that is expected")]
    Json { part: &'static str },
    #[error("the token is signed by {algorithm:?}, only EdDSA, HS256 and RS256 are accepted")]
    Algorithm { algorithm: String },
    #[error("{pattern:?} is no pattern of cache names")]
    Pattern { pattern: String },
    #[error("{name:?} is none of pull, push, delete, create, configure, retention, destroy")]
    Permission { name: String },
    #[error("the token has more than {GRANTS_MAX} patterns")]
    TooManyGrants,
}

impl Token {
    /// Reads a token.
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::TooLong { bytes: text.len() });
        }
        let (message, signature) = text.rsplit_once('.').ok_or(TokenError::Form)?;
        let (header, claims) = message.split_once('.').ok_or(TokenError::Form)?;
        let decode = |part: &str| {
            BASE64URL_NOPAD
                .decode(part.as_bytes())
                .map_err(|_| TokenError::Form)
        };
        decode(signature)?;
        let header: Header = read("header", &decode(header)?)?;
        let algorithm = match header.alg.as_str() {
            "EdDSA" => Algorithm::EdDsa,
            "HS256" => Algorithm::Hs256,
            "RS256" => Algorithm::Rs256,
            other => {
                return Err(TokenError::Algorithm {
                    algorithm: excerpt(other),
                });
            }
        };
        let read_claims: Body = read("claims", &decode(claims)?)?;
        Ok(Token {
            algorithm,
            message: message.to_owned(),
            signature: signature.to_owned(),
            claims: read_claims.into_claims()?,
        })
    }

    /// Whether this key of ours signed the token.
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        let bytes = BASE64URL_NOPAD.decode(self.signature.as_bytes());
        let bytes = bytes
            .ok()
            .and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
        self.algorithm == Algorithm::EdDsa
            && bytes.is_some_and(|bytes| {
                let signature = Signature::from_bytes(key.name().clone(), bytes);
                key.verify(self.message.as_bytes(), &signature)
            })
    }
}

fn read<'a, T: Deserialize<'a>>(part: &'static str, json: &'a [u8]) -> Result<T, TokenError> {
    serde_json::from_slice(json).map_err(|_| TokenError::Json { part })
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

/// Everything but the grants.
#[derive(Serialize)]
struct Outside<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    jti: Option<&'a str>,
    sub: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    nbf: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
}

#[derive(Deserialize)]
struct Body {
    jti: Option<String>,
    #[serde(default)]
    sub: String,
    nbf: Option<u64>,
    exp: Option<u64>,
    #[serde(rename = "https://jwt.attic.rs/v1")]
    attic: Attic,
}

#[derive(Deserialize)]
struct Attic {
    caches: InOrder,
}

impl Body {
    fn into_claims(self) -> Result<Claims, TokenError> {
        let is_long =
            |text: &str| text.len() > SUBJECT_BYTES_MAX || text.contains(char::is_control);
        if is_long(&self.sub) || self.jti.as_deref().is_some_and(is_long) {
            return Err(TokenError::Json { part: "claims" });
        }
        let mut grants = Vec::new();
        for (pattern, claims) in self.attic.caches.0 {
            if grants.len() == GRANTS_MAX {
                return Err(TokenError::TooManyGrants);
            }
            grants.push(Grant {
                pattern: pattern.parse()?,
                permissions: claims,
            });
        }
        Ok(Claims {
            id: self.jti,
            subject: self.sub,
            not_before: self.nbf.map(UnixTime),
            expires: self.exp.map(UnixTime),
            grants,
        })
    }
}

/// A map that keeps the order in which it was written.
struct InOrder(Vec<(String, Vec<Permission>)>);

impl<'de> Deserialize<'de> for InOrder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<InOrder, D::Error> {
        struct Caches;
        impl<'de> Visitor<'de> for Caches {
            type Value = InOrder;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of cache patterns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<InOrder, A::Error> {
                let mut caches = Vec::new();
                while let Some((pattern, Flags(permissions))) = map.next_entry()? {
                    caches.push((pattern, permissions));
                }
                Ok(InOrder(caches))
            }
        }
        deserializer.deserialize_map(Caches)
    }
}

/// `{"r": 1, "w": 0}`: the permissions whose flag is set.
struct Flags(Vec<Permission>);

impl<'de> Deserialize<'de> for Flags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Flags, D::Error> {
        struct Claims;
        impl<'de> Visitor<'de> for Claims {
            type Value = Flags;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of permissions to 0 or 1")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Flags, A::Error> {
                let mut permissions = Vec::new();
                while let Some(claim) = map.next_key::<String>()? {
                    let known = Permission::ALL
                        .into_iter()
                        .find(|known| known.claim() == claim);
                    match known {
                        Some(permission) => {
                            if map.next_value::<Flag>()?.0 && !permissions.contains(&permission) {
                                permissions.push(permission);
                            }
                        }
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(Flags(permissions))
            }
        }
        deserializer.deserialize_map(Claims)
    }
}

/// 0 or 1, or false or true; anything else is malformed, for a grant must not be guessed.
struct Flag(bool);

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Flag, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Bool(bool),
            Number(u64),
        }
        match Either::deserialize(deserializer)? {
            Either::Bool(flag) => Ok(Flag(flag)),
            Either::Number(0) => Ok(Flag(false)),
            Either::Number(1) => Ok(Flag(true)),
            Either::Number(_) => Err(serde::de::Error::custom("a permission is 0 or 1")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(seed: u8) -> SecretKey {
        SecretKey::from_seed("anchor".parse().unwrap(), [seed; 32])
    }

    fn claims(grants: &[(&str, &[Permission])]) -> Claims {
        Claims {
            id: Some("abc".into()),
            subject: "alice \"the\" \u{1F980}".into(),
            not_before: Some(UnixTime(1000)),
            expires: Some(UnixTime(2000)),
            grants: grants
                .iter()
                .map(|(pattern, permissions)| Grant {
                    pattern: pattern.parse().unwrap(),
                    permissions: permissions.to_vec(),
                })
                .collect(),
        }
    }

    fn unsigned(claims: &str) -> String {
        let encode = |text: &str| BASE64URL_NOPAD.encode(text.as_bytes());
        format!("{}.{}.AAAA", encode(r#"{"alg":"HS256"}"#), encode(claims))
    }

    #[test]
    fn a_minted_token_is_read_and_proved_by_its_key_only() {
        let minted = claims(&[("main", &[Permission::Pull, Permission::Push]), ("*", &[])]);
        let text = minted.mint(&key(1));
        let token = Token::parse(&text).unwrap();
        assert_eq!(token.claims, minted);
        assert!(token.is_signed_by(&key(1).public_key()));
        assert!(!token.is_signed_by(&key(2).public_key()));
        let mut changed = token.clone();
        changed.message.push('A');
        assert!(!changed.is_signed_by(&key(1).public_key()));
        let mut renamed = token;
        renamed.algorithm = Algorithm::Hs256;
        assert!(!renamed.is_signed_by(&key(1).public_key()));
    }

    #[test]
    fn the_token_in_attics_documentation_is_read() {
        let text = unsigned(
            r#"{"sub":"alice","exp":4102324986,"nbf":1700000000,"iss":"x","aud":["y"],
            "https://jwt.attic.rs/v1":{"caches":{"dev-*":{"r":1,"w":1,"d":1,"cc":1,"cr":1,"cq":1,"cd":1,"zz":7}}}}"#,
        );
        let token = Token::parse(&text).unwrap();
        assert_eq!(token.claims.subject, "alice");
        for permission in Permission::ALL {
            assert!(token.claims.allows("dev-alice", permission));
            assert!(!token.claims.allows("prod", permission));
        }
    }

    #[test]
    fn the_exact_name_counts_then_the_first_pattern_and_nothing_is_added_up() {
        use Permission::*;
        let claims = claims(&[
            ("te*", &[Push]),
            ("*", &[Pull, Delete]),
            ("team", &[Pull]),
            ("zero", &[]),
        ]);
        assert!(claims.allows("team", Pull) && !claims.allows("team", Push));
        assert!(claims.allows("test", Push) && !claims.allows("test", Pull));
        assert!(claims.allows("other", Pull) && !claims.allows("other", Push));
        assert!(claims.knows("other") && !claims.knows("zero"));
        let json = r#"{"https://jwt.attic.rs/v1":{"caches":{"z*":{"r":1},"*":{"w":1}}}}"#;
        let token = Token::parse(&unsigned(json)).unwrap();
        assert!(
            token.claims.allows("zoo", Pull),
            "the order of the text is lost"
        );
    }

    #[test]
    fn patterns_match_like_a_shells_star() {
        let check = |pattern: &str, matched: &[&str], others: &[&str]| {
            let pattern: Pattern = pattern.parse().unwrap();
            for name in matched {
                assert!(pattern.matches(name), "{pattern} {name}");
            }
            for name in others {
                assert!(!pattern.matches(name), "{pattern} {name}");
            }
        };
        check("main", &["main"], &["", "main2", "amain", "mai"]);
        check("*", &["", "a", "main"], &[]);
        check("dev-*", &["dev-", "dev-a"], &["dev", "adev-a"]);
        check("*-dev", &["-dev", "a-dev"], &["dev", "a-dev-b"]);
        check(
            "a*b*c",
            &["abc", "axbxc", "abbcc", "abcbc"],
            &["ac", "abcd", "ab", "acb"],
        );
        check("a*a", &["aa", "aba"], &["a"]);
        for bad in ["", "-a", "a/b", "a b", "[a]", "?", &"a".repeat(51)] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_are_kept_with_a_minute_of_patience() {
        let claims = claims(&[]);
        assert_eq!(claims.check_time(UnixTime(939)), Err(Untimely::Early));
        assert_eq!(claims.check_time(UnixTime(940)), Ok(()));
        assert_eq!(claims.check_time(UnixTime(2060)), Ok(()));
        assert_eq!(claims.check_time(UnixTime(2061)), Err(Untimely::Expired));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let encode = |text: &str| BASE64URL_NOPAD.encode(text.as_bytes());
        let with_header = |header: &str| format!("{}.{}.AAAA", encode(header), encode("{}"));
        for text in [
            String::new(),
            ".".into(),
            "..".into(),
            "a.b.c.d".into(),
            "!.!.!".into(),
            with_header(r#"{"alg":"none"}"#),
            with_header(r#"{"alg":"ES256"}"#),
            with_header(r#"{"alg":7}"#),
            with_header(r#"{"alg":"HS256"}"#),
            unsigned("[]"),
            unsigned(r#"{"https://jwt.attic.rs/v1":{}}"#),
            unsigned(r#"{"https://jwt.attic.rs/v1":{"caches":[]}}"#),
            unsigned(r#"{"https://jwt.attic.rs/v1":{"caches":{"a":{"r":2}}}}"#),
            unsigned(r#"{"https://jwt.attic.rs/v1":{"caches":{"a":{"r":"1"}}}}"#),
            unsigned(r#"{"https://jwt.attic.rs/v1":{"caches":{"a/b":{"r":1}}}}"#),
            unsigned(r#"{"exp":-1,"https://jwt.attic.rs/v1":{"caches":{}}}"#),
            unsigned(&format!(
                r#"{{"sub":"{}","https://jwt.attic.rs/v1":{{"caches":{{}}}}}}"#,
                "a".repeat(256)
            )),
            "a".repeat(TOKEN_BYTES_MAX + 1),
        ] {
            assert!(Token::parse(&text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".*", json in "[{}:,\"a-z0-9\\[\\]]{0,60}", pattern in "[a*]{1,8}", name in "[a]{0,8}") {
            let _ = Token::parse(&text);
            let _ = Token::parse(&unsigned(&json));
            if let Ok(pattern) = pattern.parse::<Pattern>() {
                // A star matches anything, so as many letters as the pattern has are enough or not.
                let letters = pattern.to_string().matches('a').count();
                let expected = if pattern.to_string().contains('*') { name.len() >= letters } else { name.len() == letters };
                prop_assert_eq!(pattern.matches(&name), expected);
            }
        }
    }
}
