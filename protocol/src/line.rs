//! Lines: how certificates, lists of revocations and tickets stand in files and are handed over.
//!
//! One line of text: a word that says what follows, a colon, and its bytes in base64.

use data_encoding::Encoding;
use zeroize::Zeroizing;

/// One kind of line.
pub(crate) struct Line {
    /// With its colon.
    pub prefix: &'static str,
    pub encoding: Encoding,
    /// Longest text that is looked at, white space around it included.
    pub text_bytes_max: usize,
}

/// A text that is no line of the wanted kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LineError {
    TooLong(usize),
    Prefix,
    NotBase64,
}

impl Line {
    /// Returns the line, without a line break. Leaves no copy of the bytes elsewhere.
    pub fn write(&self, bytes: &[u8]) -> String {
        // All of it at once: text that moves as it grows would leave what it held behind.
        let length = self.prefix.len() + self.encoding.encode_len(bytes.len());
        let mut text = String::with_capacity(length);
        text.push_str(self.prefix);
        self.encoding.encode_append(bytes, &mut text);
        text
    }

    /// Returns the bytes of a line; white space around it is ignored.
    pub fn read(&self, text: &str) -> Result<Zeroizing<Vec<u8>>, LineError> {
        if text.len() > self.text_bytes_max {
            return Err(LineError::TooLong(text.len()));
        }
        let encoded = text
            .trim()
            .strip_prefix(self.prefix)
            .ok_or(LineError::Prefix)?;
        let bytes = self.encoding.decode(encoded.as_bytes());
        bytes.map(Zeroizing::new).map_err(|_| LineError::NotBase64)
    }
}

#[cfg(test)]
mod tests {
    use data_encoding::BASE64;

    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written_and_nothing_else_is() {
        let line = Line {
            prefix: "granary-thing-1:",
            encoding: BASE64,
            text_bytes_max: 40,
        };
        let text = line.write(b"hello");
        assert_eq!(text, "granary-thing-1:aGVsbG8=");
        let check = |text: &str, expected: Result<&[u8], LineError>| {
            let found = line.read(text).map(|bytes| bytes.to_vec());
            assert_eq!(found, expected.map(<[u8]>::to_vec), "{text}");
        };
        check(&text, Ok(b"hello"));
        check(&format!(" {text}\n"), Ok(b"hello"));
        check("granary-thing-2:aGVsbG8=", Err(LineError::Prefix));
        check("granary-thing-1:aGVsbG8", Err(LineError::NotBase64));
        check("granary-thing-1:aGVs bG8=", Err(LineError::NotBase64));
        check(&" ".repeat(41), Err(LineError::TooLong(41)));
    }
}
