//! `[[anchor-server.oidc]]`: which jobs of CI get a token, and what it allows.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use granary_protocol::token::{Pattern, Permission};
use regex::Regex;
use reqwest::Url;
use serde::{Deserialize, Deserializer};

use super::{parsed, parsed_list, parsed_url};
use crate::authority::is_safe;

/// One `[[anchor-server.oidc]]`: what jobs may do whose issuer says this of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Oidc {
    /// As it stands in its tokens.
    pub issuer: String,
    /// Whom its tokens must be made for: a name of this anchor.
    pub audience: String,
    /// What claims must be like, all of them.
    pub claims: BTreeMap<String, Shape>,
    #[serde(deserialize_with = "parsed_list")]
    pub caches: Vec<Pattern>,
    #[serde(default = "pull_and_push", deserialize_with = "parsed_list")]
    pub allow: Vec<Permission>,
    /// Where its keys are, if its description does not say it.
    #[serde(default, deserialize_with = "parsed_url_option")]
    pub jwks_url: Option<Url>,
    /// Certificates (PEM) trusted beside the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
}

/// A text in which `*` stands for any characters, and never the whole of it.
#[derive(Clone, Debug)]
pub struct Shape(pub Regex);

/// Why a text is no shape.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    #[error("{text:?} fits any claim, and would let every job of the issuer in")]
    Anything { text: String },
    #[error("a text to compare claims with is too long")]
    TooLong,
}

impl FromStr for Shape {
    type Err = ShapeError;

    fn from_str(text: &str) -> Result<Shape, ShapeError> {
        if text.chars().all(|c| c == '*') {
            return Err(ShapeError::Anything {
                text: text.to_owned(),
            });
        }
        let parts: Vec<_> = text.split('*').map(regex::escape).collect();
        let regex = Regex::new(&format!("^(?s:{})$", parts.join(".*")));
        regex.map(Shape).map_err(|_| ShapeError::TooLong)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
        parsed(deserializer)
    }
}

fn pull_and_push() -> Vec<Permission> {
    vec![Permission::Pull, Permission::Push]
}

fn parsed_url_option<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    parsed_url(deserializer).map(Some)
}

impl Oidc {
    /// Why this lets in whom it should not, or nobody.
    pub(super) fn contradiction(&self) -> Option<String> {
        let issuer = &self.issuer;
        let about = |problem: &str| Some(format!("anchor-server.oidc of {issuer}: {problem}"));
        let is_safe = |url: &Url| is_safe(url);
        if !issuer.parse().is_ok_and(|url| is_safe(&url)) || !self.jwks_url.iter().all(is_safe) {
            return about("keys are taken over https, or from loopback, alone");
        }
        if self.claims.is_empty() {
            return about("claims are empty, every job of the issuer would be let in");
        }
        if self.audience.is_empty() {
            return about("audience is empty");
        }
        if self.caches.is_empty() || self.allow.is_empty() {
            return about("caches or allow are empty, its jobs could do nothing");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn shapes_match_whole_claims_and_never_everything() {
        let check = |shape: &str, text: &str, expected: bool| {
            let shape: Shape = shape.parse().unwrap();
            assert_eq!(shape.0.is_match(text), expected, "{shape:?} {text:?}");
        };
        check("me/project", "me/project", true);
        check("me/project", "me/project2", false);
        check("me/project", "xme/project", false);
        check("me/*", "me/", true);
        check("me/*", "meh/x", false);
        check("refs/tags/v*.0", "refs/tags/v1.0", true);
        check("refs/tags/v*.0", "refs/tags/v1x0", false);
        check("a.c", "abc", false);
        check("me/*", "me/\nx", true);
        check("me/project", "me/project\n", false);
        for anything in ["", "*", "**"] {
            assert!(anything.parse::<Shape>().is_err(), "{anything:?}");
        }
    }

    #[test]
    fn jobs_are_let_in_by_what_is_said_of_them_alone() {
        let file = |issuer: &str, claims: &str, more: &str| {
            format!(
                "[[anchor-server.oidc]]\nissuer = {issuer:?}\naudience = \"a\"\ncaches = [\"ci-*\"]\nclaims = {claims}\n{more}"
            )
        };
        let good = r#"{ repository = "me/*", environment = "prod" }"#;
        let config = Config::parse(&file("https://issuer.example", good, "")).unwrap();
        let oidc = &config.anchor_server.oidc[0];
        assert!(oidc.claims["repository"].0.is_match("me/project"));
        assert_eq!(oidc.allow, [Permission::Pull, Permission::Push]);
        for (issuer, claims, more, expected) in [
            ("http://issuer.example", good, "", "over https"),
            ("issuer.example", good, "", "over https"),
            (
                "https://x.example",
                good,
                "jwks-url = \"http://x.example/\"",
                "over https",
            ),
            ("https://x.example", "{}", "", "every job"),
            ("https://x.example", "{ ref = \"*\" }", "", "every job"),
            ("https://x.example", good, "allow = []", "could do nothing"),
            ("https://x.example", good, "allow = [\"admin\"]", "admin"),
            ("https://x.example", good, "rule = 1", "rule"),
        ] {
            let text = Config::parse(&file(issuer, claims, more)).unwrap_err();
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}
