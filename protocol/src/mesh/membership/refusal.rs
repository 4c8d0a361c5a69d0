//! Refusals: why a connection was closed by us.

use std::fmt;

use crate::certificate::NotAMember;

/// Why a connection was closed by us, or a word not heeded. Each is counted; the words are the labels of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    OtherMesh,
    BadSignature,
    OtherPeer,
    NotYetValid,
    Expired,
    MalformedCertificate,
    MayNotShare,
    Revoked,
    NoHello,
    OutOfTurn,
    Garbage,
    Version,
    OtherStoreDir,
    TooManyPeers,
    /// A list of revocations that is older than ours; the connection stays.
    OldRevocations,
}

impl Refusal {
    pub const ALL: [Refusal; 15] = [
        Refusal::OtherMesh,
        Refusal::BadSignature,
        Refusal::OtherPeer,
        Refusal::NotYetValid,
        Refusal::Expired,
        Refusal::MalformedCertificate,
        Refusal::MayNotShare,
        Refusal::Revoked,
        Refusal::NoHello,
        Refusal::OutOfTurn,
        Refusal::Garbage,
        Refusal::Version,
        Refusal::OtherStoreDir,
        Refusal::TooManyPeers,
        Refusal::OldRevocations,
    ];

    pub fn word(self) -> &'static str {
        match self {
            Refusal::OtherMesh => "other_mesh",
            Refusal::BadSignature => "bad_signature",
            Refusal::OtherPeer => "other_peer",
            Refusal::NotYetValid => "not_yet_valid",
            Refusal::Expired => "expired",
            Refusal::MalformedCertificate => "malformed_certificate",
            Refusal::MayNotShare => "may_not_share",
            Refusal::Revoked => "revoked",
            Refusal::NoHello => "no_hello",
            Refusal::OutOfTurn => "out_of_turn",
            Refusal::Garbage => "garbage",
            Refusal::Version => "version",
            Refusal::OtherStoreDir => "other_store_dir",
            Refusal::TooManyPeers => "too_many_peers",
            Refusal::OldRevocations => "old_revocations",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl From<&NotAMember> for Refusal {
    fn from(reason: &NotAMember) -> Refusal {
        match reason {
            NotAMember::OtherMesh { .. } => Refusal::OtherMesh,
            NotAMember::BadSignature => Refusal::BadSignature,
            NotAMember::OtherPeer { .. } => Refusal::OtherPeer,
            NotAMember::NotYetValid { .. } => Refusal::NotYetValid,
            NotAMember::Expired { .. } => Refusal::Expired,
            NotAMember::Malformed(_) => Refusal::MalformedCertificate,
            NotAMember::MayNotShare { .. } => Refusal::MayNotShare,
            NotAMember::Revoked { .. } => Refusal::Revoked,
        }
    }
}
