//! Announcements: a writer's signed word about its own set, which anyone may pass on.
//!
//! A [`Head`] says where a writer's log stands and, by digests, what the whole set is at that
//! position and which operations led there from the position before. So one signature proves both
//! a [`Delta`] (the operations follow) and a snapshot (the set follows), whoever delivers them
//! (DESIGN §4: nothing is believed about a third party without that party's signature).
//!
//! A proof is computed at most once per value and kept beside it: a node that relays a delta to
//! twelve neighbours, or a simulation that hands one value to a thousand minds, verifies it once.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use crate::availability::{Cursor, HashPrefix, Operation};
use crate::peer::{PeerId, PeerKey};

/// Keeps the signature of a head from being valid for anything else signed by the same key.
const SIGNING_CONTEXT: &[u8] = b"granary-head-1\n";

/// SHA-256 of a set: its prefixes, ascending, 8 bytes each, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetDigest(pub [u8; 32]);

impl SetDigest {
    /// Digests prefixes that are strictly ascending.
    pub fn of<'a>(ascending: impl IntoIterator<Item = &'a HashPrefix>) -> SetDigest {
        let mut digest = Sha256::new();
        for prefix in ascending {
            digest.update(prefix.0.to_be_bytes());
        }
        SetDigest(digest.finalize().into())
    }
}

/// Where a writer's log stands, and what its set is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub writer: PeerId,
    /// Position after the last operation.
    pub cursor: Cursor,
    /// Size of the set at `cursor`.
    pub count: u64,
    pub set: SetDigest,
    /// Sequence number from which `operations` lead to `cursor`; equal to it when there are none.
    pub after: u64,
    /// SHA-256 of those operations: a byte for the kind and 8 for the prefix, each.
    pub operations: [u8; 32],
}

impl Head {
    fn signed_bytes(&self) -> Vec<u8> {
        let mut bytes = SIGNING_CONTEXT.to_vec();
        bytes.extend(self.writer.as_public_key());
        for number in [
            self.cursor.epoch,
            self.cursor.sequence,
            self.count,
            self.after,
        ] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(self.set.0);
        bytes.extend(self.operations);
        bytes
    }
}

/// A head with its writer's signature, which may not be right. Cheap to clone.
#[derive(Clone)]
pub struct SignedHead(Arc<Signed>);

struct Signed {
    head: Head,
    signature: [u8; 64],
    is_proved: OnceLock<bool>,
}

impl SignedHead {
    /// Signs what `key`'s node says of its own set, without operations that lead there.
    pub fn of_set(key: &PeerKey, cursor: Cursor, set: &BTreeSet<HashPrefix>) -> SignedHead {
        SignedHead::sign(key, cursor, set.len() as u64, SetDigest::of(set), &[])
    }

    fn sign(
        key: &PeerKey,
        cursor: Cursor,
        count: u64,
        set: SetDigest,
        operations: &[Operation],
    ) -> SignedHead {
        let head = Head {
            writer: key.peer_id(),
            cursor,
            count,
            set,
            after: cursor.sequence - operations.len() as u64,
            operations: operations_digest(operations),
        };
        let signature = key.sign(&head.signed_bytes());
        SignedHead(Arc::new(Signed {
            head,
            signature,
            is_proved: OnceLock::from(true),
        }))
    }

    /// Puts together what arrived; nothing is proved by that.
    pub fn from_parts(head: Head, signature: [u8; 64]) -> SignedHead {
        SignedHead(Arc::new(Signed {
            head,
            signature,
            is_proved: OnceLock::new(),
        }))
    }

    pub fn head(&self) -> &Head {
        &self.0.head
    }

    pub fn signature(&self) -> &[u8; 64] {
        &self.0.signature
    }

    /// Says whether the writer signed this.
    pub fn is_proved(&self) -> bool {
        let verify = || {
            let message = self.0.head.signed_bytes();
            self.0.head.writer.verify(&message, &self.0.signature)
        };
        *self.0.is_proved.get_or_init(verify)
    }
}

impl PartialEq for SignedHead {
    fn eq(&self, other: &SignedHead) -> bool {
        self.0.head == other.0.head && self.0.signature == other.0.signature
    }
}

impl Eq for SignedHead {}

impl fmt::Debug for SignedHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SignedHead").field(&self.0.head).finish()
    }
}

/// Operations of one writer that lead to a signed head. Cheap to clone.
#[derive(Clone)]
pub struct Delta(Arc<DeltaParts>);

struct DeltaParts {
    head: SignedHead,
    operations: Vec<Operation>,
    fits: OnceLock<bool>,
}

impl Delta {
    /// Signs `operations` that led `key`'s node to `cursor`, where its set has this size and digest.
    ///
    /// # Panics
    /// When there are more operations than `cursor` counts: a broken log of our own.
    pub fn sign(
        key: &PeerKey,
        cursor: Cursor,
        count: u64,
        set: SetDigest,
        operations: Vec<Operation>,
    ) -> Delta {
        assert!(operations.len() as u64 <= cursor.sequence);
        Delta(Arc::new(DeltaParts {
            head: SignedHead::sign(key, cursor, count, set, &operations),
            operations,
            fits: OnceLock::from(true),
        }))
    }

    /// Puts together what arrived; nothing is proved by that.
    pub fn from_parts(head: SignedHead, operations: Vec<Operation>) -> Delta {
        Delta(Arc::new(DeltaParts {
            head,
            operations,
            fits: OnceLock::new(),
        }))
    }

    pub fn head(&self) -> &SignedHead {
        &self.0.head
    }

    pub fn writer(&self) -> PeerId {
        self.0.head.head().writer
    }

    /// Position that the operations follow.
    pub fn after(&self) -> Cursor {
        let head = self.0.head.head();
        Cursor {
            epoch: head.cursor.epoch,
            sequence: head.after,
        }
    }

    pub fn operations(&self) -> &[Operation] {
        &self.0.operations
    }

    /// Says whether the writer signed exactly these operations.
    pub fn is_proved(&self) -> bool {
        let fits = || {
            let head = self.0.head.head();
            let counted = head.after.checked_add(self.0.operations.len() as u64);
            counted == Some(head.cursor.sequence)
                && operations_digest(&self.0.operations) == head.operations
        };
        *self.0.fits.get_or_init(fits) && self.0.head.is_proved()
    }
}

impl PartialEq for Delta {
    fn eq(&self, other: &Delta) -> bool {
        self.0.head == other.0.head && self.0.operations == other.0.operations
    }
}

impl Eq for Delta {}

impl fmt::Debug for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delta")
            .field("head", &self.0.head)
            .field("operations", &self.0.operations)
            .finish()
    }
}

fn operations_digest(operations: &[Operation]) -> [u8; 32] {
    let mut digest = Sha256::new();
    for operation in operations {
        let kind = match operation {
            Operation::Add(_) => 0u8,
            Operation::Remove(_) => 1,
        };
        digest.update([kind]);
        digest.update(operation.prefix().0.to_be_bytes());
    }
    digest.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> PeerKey {
        PeerKey::from_seed([7; 32])
    }

    fn cursor(sequence: u64) -> Cursor {
        Cursor { epoch: 5, sequence }
    }

    fn delta() -> Delta {
        let set = BTreeSet::from([HashPrefix(1), HashPrefix(2)]);
        let operations = vec![
            Operation::Add(HashPrefix(2)),
            Operation::Remove(HashPrefix(3)),
        ];
        Delta::sign(&key(), cursor(9), 2, SetDigest::of(&set), operations)
    }

    /// The same delta as it arrives somewhere else, with one thing changed.
    fn arrived(change: impl FnOnce(&mut Head, &mut [u8; 64], &mut Vec<Operation>)) -> Delta {
        let delta = delta();
        let mut head = delta.head().head().clone();
        let mut signature = *delta.head().signature();
        let mut operations = delta.operations().to_vec();
        change(&mut head, &mut signature, &mut operations);
        Delta::from_parts(SignedHead::from_parts(head, signature), operations)
    }

    #[test]
    fn what_the_writer_signed_is_proved_wherever_it_arrives() {
        let delta = arrived(|_, _, _| {});
        assert!(delta.is_proved());
        assert_eq!(delta.after(), cursor(7));
        assert_eq!(delta.writer(), key().peer_id());
    }

    #[test]
    fn any_change_on_the_way_ends_the_proof() {
        let changed = [
            arrived(|head, _, _| head.writer = PeerKey::from_seed([8; 32]).peer_id()),
            arrived(|head, _, _| head.cursor.epoch += 1),
            arrived(|head, _, _| head.cursor.sequence += 1),
            arrived(|head, _, _| {
                head.cursor.sequence += 1;
                head.after += 1;
            }),
            arrived(|head, _, _| head.count += 1),
            arrived(|head, _, _| head.set.0[0] ^= 1),
            arrived(|head, _, _| head.operations[0] ^= 1),
            arrived(|_, signature, _| signature[0] ^= 1),
            arrived(|_, _, operations| operations.truncate(1)),
            arrived(|_, _, operations| operations.push(Operation::Add(HashPrefix(9)))),
            arrived(|_, _, operations| operations[1] = Operation::Add(HashPrefix(3))),
            arrived(|_, _, operations| operations.swap(0, 1)),
            arrived(|head, _, _| head.after = u64::MAX),
        ];
        for (number, delta) in changed.iter().enumerate() {
            assert!(!delta.is_proved(), "change {number}: {delta:?}");
        }
    }

    #[test]
    fn a_head_of_a_set_has_no_operations() {
        let set = BTreeSet::from([HashPrefix(4)]);
        let head = SignedHead::of_set(&key(), cursor(3), &set);
        assert!(Delta::from_parts(head.clone(), vec![]).is_proved());
        assert_eq!((head.head().after, head.head().count), (3, 1));
    }
}
