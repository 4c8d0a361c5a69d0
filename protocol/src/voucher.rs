//! Vouchers: a member's own word that it built a path, and that these are the contents.
//!
//! A voucher travels as a signature of the narinfo whose key name is the member's [`PeerId`], made with
//! the member's identity key. It counts where the member's certificate allows it to vouch and as long
//! as it is a member, wherever the narinfo comes from. What is signed is [`SIGNING_CONTEXT`] and the
//! [`Fingerprint`], so Nix itself takes it for a signature by a key that it does not know, and nothing
//! else that an identity key signs can be taken for a voucher.

use crate::narinfo::{Fingerprint, NarInfo, SIGNATURES_MAX};
use crate::peer::{PeerId, PeerKey};
use crate::signature::{KeyName, Signature};
use crate::store_path::StoreDir;

const SIGNING_CONTEXT: &[u8] = b"granary-voucher-1\n";

/// Vouchers of one narinfo that are verified at most. One is enough, and each costs 50 µs.
const VERIFIED_MAX: usize = 4;

/// Makes vouchers in the name of this node.
#[derive(Clone, Debug)]
pub struct Voucher {
    key: PeerKey,
    key_name: KeyName,
}

impl Voucher {
    pub fn new(key: PeerKey) -> Voucher {
        let name = key.peer_id().to_string();
        let key_name = KeyName::new(&name).expect("a peer id has letters and digits only");
        Voucher { key, key_name }
    }

    /// Returns the signature that says: this node built it.
    pub fn sign(&self, fingerprint: &Fingerprint) -> Signature {
        let bytes = self.key.sign(&signed_bytes(fingerprint));
        Signature::from_bytes(self.key_name.clone(), bytes)
    }
}

/// Returns the first member that truly vouches for what the narinfo says and that may.
pub fn vouched_by(
    narinfo: &NarInfo,
    dir: &StoreDir,
    may_vouch: impl Fn(&PeerId) -> bool,
) -> Option<PeerId> {
    let named = narinfo.signatures.iter().take(SIGNATURES_MAX);
    let named = named.filter_map(|signature| {
        let peer: PeerId = signature.key_name().as_str().parse().ok()?;
        may_vouch(&peer).then_some((peer, signature))
    });
    let mut fingerprint = None;
    for (peer, signature) in named.take(VERIFIED_MAX) {
        let bytes = fingerprint.get_or_insert_with(|| signed_bytes(&narinfo.fingerprint(dir)));
        if peer.verify(bytes, signature.as_bytes()) {
            return Some(peer);
        }
    }
    None
}

fn signed_bytes(fingerprint: &Fingerprint) -> Vec<u8> {
    [SIGNING_CONTEXT, fingerprint.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::NarHash;
    use crate::narinfo::{Proof, Unverified, VerifiedNarInfo};
    use crate::signature::TrustedKeys;

    fn narinfo() -> NarInfo {
        let text = format!(
            "StorePath: /nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60\nURL: nar/x.nar\n\
             Compression: none\nNarHash: {}\nNarSize: 1000\nReferences: \n",
            NarHash::from_bytes([7; 32])
        );
        NarInfo::parse(&text, &StoreDir::default()).unwrap()
    }

    fn voucher(number: u8) -> Voucher {
        Voucher::new(PeerKey::from_seed([number; 32]))
    }

    fn peer(number: u8) -> PeerId {
        PeerKey::from_seed([number; 32]).peer_id()
    }

    fn vouched(number: u8) -> NarInfo {
        let mut narinfo = narinfo();
        let fingerprint = narinfo.fingerprint(&StoreDir::default());
        narinfo.signatures.push(voucher(number).sign(&fingerprint));
        narinfo
    }

    fn verify(narinfo: NarInfo, may_vouch: impl Fn(&PeerId) -> bool) -> Result<Proof, Unverified> {
        let dir = StoreDir::default();
        VerifiedNarInfo::verify_vouched(narinfo, &TrustedKeys::new(), &dir, may_vouch)
            .map(|verified| verified.proof().clone())
    }

    #[test]
    fn a_voucher_counts_if_its_member_may_vouch_and_only_then() {
        assert_eq!(
            verify(vouched(1), |one| *one == peer(1)),
            Ok(Proof::Vouched(peer(1)))
        );
        assert!(verify(vouched(1), |_| false).is_err());
        assert!(verify(vouched(1), |one| *one == peer(2)).is_err());
        assert!(verify(narinfo(), |_| true).is_err());
        // It survives its text.
        let text = vouched(1).to_text(&StoreDir::default());
        let read = NarInfo::parse(&text, &StoreDir::default()).unwrap();
        assert!(verify(read, |_| true).is_ok());
    }

    #[test]
    fn a_voucher_for_other_bytes_or_in_another_name_proves_nothing() {
        let mut other = vouched(1);
        other.nar_hash = NarHash::from_bytes([8; 32]);
        assert!(verify(other, |_| true).is_err());
        let mut forged = vouched(1);
        let signature = Signature::from_bytes(
            peer(2).to_string().parse().unwrap(),
            *forged.signatures[0].as_bytes(),
        );
        forged.signatures = vec![signature];
        assert!(verify(forged, |_| true).is_err());
        // Nor does a signature as Nix makes it, without our context.
        let mut plain = narinfo();
        let fingerprint = plain.fingerprint(&StoreDir::default());
        let bytes = PeerKey::from_seed([1; 32]).sign(fingerprint.as_bytes());
        let name = peer(1).to_string().parse().unwrap();
        plain.signatures = vec![Signature::from_bytes(name, bytes)];
        assert!(verify(plain, |_| true).is_err());
    }

    #[test]
    fn many_false_vouchers_are_not_all_looked_at() {
        let mut flood = narinfo();
        let good = vouched(1).signatures.remove(0);
        let name: KeyName = peer(1).to_string().parse().unwrap();
        let false_one = |number| Signature::from_bytes(name.clone(), [number; 64]);
        flood.signatures = (1..=VERIFIED_MAX as u8).map(false_one).collect();
        flood.signatures.push(good.clone());
        assert!(verify(flood.clone(), |_| true).is_err());
        // Those in names that count for nothing do not push out one that does.
        let strange =
            |number| Signature::from_bytes(peer(number).to_string().parse().unwrap(), [number; 64]);
        flood.signatures = (2..60).map(strange).collect();
        flood.signatures.push(good);
        assert!(verify(flood, |one| *one == peer(1)).is_ok());
    }
}
