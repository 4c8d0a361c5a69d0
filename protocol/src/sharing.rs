//! Sharing: which of this machine's store paths other members may know of and fetch.
//!
//! The default (DESIGN §3): paths that carry a signature by a trusted key, paths built here, and what a public cache of
//! an anchor beside the node holds.
//! Derivations, and sources added without a signature (`nix-store --add secret.txt`), stay private.
//! A path that is not shared is not announced, not served, and for a peer looks like an absent one.

use std::fmt;

use crate::signature::KeyName;

/// What the decision rests on, gathered by the caller about one valid path.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// `share.enable` of the configuration.
    pub enabled: bool,
    /// A person keeps this very path here (`granary hide`).
    pub is_hidden: bool,
    /// The first `share.deny` expression that matches the path's name.
    pub denied_by: Option<&'a str>,
    /// The path ends in `.drv`.
    pub is_derivation: bool,
    /// Nix registered the path as built on this machine.
    pub ultimate: bool,
    /// The first trusted key whose signature over the path verifies.
    pub signed_by: Option<&'a KeyName>,
    /// A public cache of the anchor beside this node holds it.
    pub is_published: bool,
}

/// Whether a path is shared, and the rule that said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharing {
    SignedBy(KeyName),
    BuiltHere,
    Published,
    Disabled,
    Hidden,
    DeniedBy(String),
    Derivation,
    Unsigned,
}

impl Sharing {
    /// Applies the rules in the order in which they win: switches, then exclusions, then grounds.
    pub fn decide(facts: Facts<'_>) -> Sharing {
        if !facts.enabled {
            Sharing::Disabled
        } else if facts.is_hidden {
            Sharing::Hidden
        } else if facts.is_derivation {
            Sharing::Derivation
        } else if let Some(expression) = facts.denied_by {
            Sharing::DeniedBy(expression.to_owned())
        } else if let Some(key) = facts.signed_by {
            Sharing::SignedBy(key.clone())
        } else if facts.ultimate {
            Sharing::BuiltHere
        } else if facts.is_published {
            Sharing::Published
        } else {
            Sharing::Unsigned
        }
    }

    pub fn is_shared(&self) -> bool {
        matches!(
            self,
            Sharing::SignedBy(_) | Sharing::BuiltHere | Sharing::Published
        )
    }
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sharing::SignedBy(key) => write!(f, "shared: signed by the trusted key {key}"),
            Sharing::BuiltHere => f.write_str("shared: built on this machine"),
            Sharing::Published => f.write_str("shared: in a public cache of the anchor here"),
            Sharing::Disabled => f.write_str("not shared: share.enable is false"),
            Sharing::Hidden => f.write_str("not shared: hidden by granary hide"),
            Sharing::DeniedBy(expression) => {
                write!(f, "not shared: its name matches share.deny {expression:?}")
            }
            Sharing::Derivation => f.write_str("not shared: derivations stay on this machine"),
            Sharing::Unsigned => f.write_str(
                "not shared: neither built here nor signed by a key in trust.keys (an added source?)",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts<'static> {
        Facts {
            enabled: true,
            is_hidden: false,
            denied_by: None,
            is_derivation: false,
            ultimate: false,
            signed_by: None,
            is_published: false,
        }
    }

    #[test]
    fn built_and_signed_paths_are_shared_and_nothing_else() {
        let key: KeyName = "builder-1".parse().unwrap();
        assert!(
            Sharing::decide(Facts {
                ultimate: true,
                ..facts()
            })
            .is_shared()
        );
        assert!(
            Sharing::decide(Facts {
                signed_by: Some(&key),
                ..facts()
            })
            .is_shared()
        );
        assert!(
            Sharing::decide(Facts {
                is_published: true,
                ..facts()
            })
            .is_shared()
        );
        assert_eq!(Sharing::decide(facts()), Sharing::Unsigned);
    }

    #[test]
    fn exclusions_win_over_grounds() {
        let key: KeyName = "builder-1".parse().unwrap();
        let good = Facts {
            ultimate: true,
            signed_by: Some(&key),
            ..facts()
        };
        assert_eq!(
            Sharing::decide(Facts {
                enabled: false,
                ..good.clone()
            }),
            Sharing::Disabled
        );
        assert_eq!(
            Sharing::decide(Facts {
                is_hidden: true,
                ..good.clone()
            }),
            Sharing::Hidden
        );
        assert_eq!(
            Sharing::decide(Facts {
                is_derivation: true,
                ..good.clone()
            }),
            Sharing::Derivation
        );
        assert_eq!(
            Sharing::decide(Facts {
                denied_by: Some("^secret"),
                ..good
            }),
            Sharing::DeniedBy("^secret".into())
        );
    }
}
