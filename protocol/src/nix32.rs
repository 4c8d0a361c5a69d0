//! Nix's base-32: how digests are written in store paths, narinfos and NAR URLs.
//!
//! Thirty-two letters and digits without `e`, `o`, `t` and `u`, so that no hash spells a word by
//! accident. Digits are written from the most significant end, which makes the text sort like
//! the bytes read backwards. Source: `libutil/hash.cc` of Nix (`printHash32`).
//!
//! Decoding is strict: one text for each byte string, so a decoded value can be compared by its
//! text and the other way round.

use thiserror::Error;

/// The digits in ascending value; also ascending in ASCII.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Value of each ASCII character as a digit, [`NOT_A_DIGIT`] where it is none.
const VALUES: [u8; 128] = {
    let mut values = [NOT_A_DIGIT; 128];
    let mut value = 0;
    while value < ALPHABET.len() {
        values[ALPHABET[value] as usize] = value as u8;
        value += 1;
    }
    values
};

const NOT_A_DIGIT: u8 = 0xff;

/// Why a text is not Nix base-32.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Nix32Error {
    /// No byte string has an encoding this long.
    #[error("nix32 text cannot be {length} characters long")]
    Length { length: usize },
    /// A character outside [`ALPHABET`]; upper case is outside too.
    #[error("{character:?} at position {position} is not a nix32 digit")]
    Digit { character: char, position: usize },
    /// The first digit carries bits beyond the last byte.
    #[error("nix32 text has non-zero bits beyond its last byte")]
    TrailingBits,
}

/// Returns the number of characters that `bytes` bytes take: 32 for 20, 52 for 32.
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Writes bytes as Nix base-32.
pub fn encode(bytes: &[u8]) -> String {
    (0..encoded_len(bytes.len()))
        .rev()
        .map(|digit| {
            let (byte, shift) = (digit * 5 / 8, digit * 5 % 8);
            let low = u16::from(bytes[byte]);
            let high = u16::from(bytes.get(byte + 1).copied().unwrap_or(0));
            let value = ((high << 8 | low) >> shift) & 0x1f;
            char::from(ALPHABET[usize::from(value)])
        })
        .collect()
}

/// Reads Nix base-32; the inverse of [`encode`] and of nothing else.
///
/// # Errors
/// [`Nix32Error`] when the length fits no byte string, a character is no digit, or the unused
/// bits of the first digit are not zero.
pub fn decode(text: &str) -> Result<Vec<u8>, Nix32Error> {
    let mut bytes = vec![0; text.len() * 5 / 8];
    decode_into(text, &mut bytes)?;
    Ok(bytes)
}

/// Reads exactly `bytes.len()` bytes, without allocating.
pub(crate) fn decode_into(text: &str, bytes: &mut [u8]) -> Result<(), Nix32Error> {
    if text.len() != encoded_len(bytes.len()) {
        return Err(Nix32Error::Length { length: text.len() });
    }
    bytes.fill(0);
    for (digit, character) in text.bytes().rev().enumerate() {
        let value = VALUES
            .get(usize::from(character))
            .copied()
            .unwrap_or(NOT_A_DIGIT);
        if value == NOT_A_DIGIT {
            return Err(not_a_digit(text));
        }
        let (byte, shift) = (digit * 5 / 8, digit * 5 % 8);
        let bits = u16::from(value) << shift;
        bytes[byte] |= bits as u8;
        let carry = (bits >> 8) as u8;
        match bytes.get_mut(byte + 1) {
            Some(next) => *next |= carry,
            None if carry != 0 => return Err(Nix32Error::TrailingBits),
            None => {}
        }
    }
    Ok(())
}

/// Names the first offending character as a person would see it.
fn not_a_digit(text: &str) -> Nix32Error {
    let is_digit = |c: char| c.is_ascii() && VALUES[c as usize] != NOT_A_DIGIT;
    let (position, character) = text
        .chars()
        .enumerate()
        .find(|(_, c)| !is_digit(*c))
        .expect("the caller saw a character that is no digit");
    Nix32Error::Digit {
        character,
        position,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(bytes: &[u8], text: &str) {
        assert_eq!(encode(bytes), text);
        assert_eq!(decode(text).as_deref(), Ok(bytes));
    }

    #[test]
    fn small_values_are_written_from_the_most_significant_end() {
        check(&[], "");
        check(&[0], "00");
        check(&[1], "01");
        check(&[0x1f], "0z");
        check(&[0xff], "7z");
        check(&[1, 0], "0001");
        check(&[0, 0x80], "1000");
        check(&[0xff; 5], "zzzzzzzz");
    }

    #[test]
    fn lengths_match_those_nix_prints() {
        for (bytes, length) in [(0, 0), (1, 2), (16, 26), (20, 32), (32, 52), (64, 103)] {
            assert_eq!(encoded_len(bytes), length);
        }
    }

    #[test]
    fn malformed_text_is_refused() {
        use Nix32Error::*;
        let cases = [
            ("0", Length { length: 1 }),
            ("000", Length { length: 3 }),
            ("000000", Length { length: 6 }),
            ("8z", TrailingBits),
            ("zz", TrailingBits),
            (
                "0e",
                Digit {
                    character: 'e',
                    position: 1,
                },
            ),
            (
                "0A",
                Digit {
                    character: 'A',
                    position: 1,
                },
            ),
            (
                "0 ",
                Digit {
                    character: ' ',
                    position: 1,
                },
            ),
            (
                "é",
                Digit {
                    character: 'é',
                    position: 0,
                },
            ),
            (
                "0é0",
                Digit {
                    character: 'é',
                    position: 1,
                },
            ),
        ];
        for (text, error) in cases {
            assert_eq!(decode(text), Err(error), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn every_byte_string_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            check(&bytes, &encode(&bytes));
        }

        #[test]
        fn each_byte_string_has_one_text(text in "[0-9a-df-np-sv-z]{0,110}") {
            if let Ok(bytes) = decode(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }

        #[test]
        fn text_sorts_like_reversed_bytes(a: [u8; 20], b: [u8; 20]) {
            let by_bytes = a.iter().rev().cmp(b.iter().rev());
            prop_assert_eq!(encode(&a).cmp(&encode(&b)), by_bytes);
        }

        #[test]
        fn arbitrary_text_never_panics(text in any::<String>()) {
            let _ = decode(&text);
        }
    }
}
