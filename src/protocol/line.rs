//! Encodes and decodes lines: one JSON value per line, for `nc` and `jq`.
//!
//! A line ends with a line feed or at the end of the stream. Blank lines are skipped. A carriage return
//! before the line feed is white space of JSON. This module does not interpret lines. It borrows from the
//! given bytes and keeps nothing.

use memchr::memchr;

/// The result of decoding the beginning of received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodedLine<'a> {
    Whole {
        /// The text without the line feed.
        body: &'a [u8],
        /// The bytes of the line, including the line feed.
        used: usize,
    },
    /// A line without content.
    Blank {
        /// The bytes of the line, including the line feed.
        used: usize,
    },
    /// An incomplete line, or nothing.
    Partial,
    /// A line over the limit. It is refused before its end is known.
    TooLarge,
}

/// Decodes the line at the beginning of `bytes`. The first `scanned` bytes are known to have no line
/// feed. `limit` is the longest line in bytes; `ended` says that no more bytes follow.
pub fn decode(bytes: &[u8], scanned: usize, limit: usize, ended: bool) -> DecodedLine<'_> {
    let rest = bytes.get(scanned..).unwrap_or_default();
    let newline = memchr(b'\n', rest).map(|at| scanned + at);
    let length = newline.unwrap_or(bytes.len());
    if length > limit {
        return DecodedLine::TooLarge;
    }
    let used = match newline {
        Some(at) => at + 1,
        None if ended && length > 0 => length,
        None => return DecodedLine::Partial,
    };
    let body = &bytes[..length];
    if body.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r')) {
        return DecodedLine::Blank { used };
    }
    DecodedLine::Whole { body, used }
}

/// Ends the line that begins at `mark` of `out`. A handler may have written its result in several lines.
/// JSON has line feeds only between values, where a space is equivalent.
pub fn finish(out: &mut Vec<u8>, mark: usize) {
    let mut at = mark;
    while let Some(found) = memchr(b'\n', &out[at..]) {
        at += found;
        out[at] = b' ';
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Splits bytes that arrive in two pieces into lines.
    fn lines(bytes: &[u8], split: usize) -> (Vec<Vec<u8>>, bool) {
        let (mut found, mut at, mut scanned) = (Vec::new(), 0, 0);
        for (end, ended) in [(split, false), (bytes.len(), true)] {
            loop {
                match decode(&bytes[at..end], scanned, 20, ended) {
                    DecodedLine::Whole { body, used } => {
                        found.push(body.to_vec());
                        (at, scanned) = (at + used, 0);
                    }
                    DecodedLine::Blank { used } => (at, scanned) = (at + used, 0),
                    DecodedLine::Partial => {
                        scanned = end - at;
                        break;
                    }
                    DecodedLine::TooLarge => return (found, true),
                }
            }
        }
        (found, false)
    }

    #[test]
    fn a_line_ends_at_a_line_feed_or_the_end_of_the_stream() {
        let (found, refused) = lines(b"\r\n \n{}\r\n[1]\n\n2", 4);
        assert_eq!(found, [&b"{}\r"[..], b"[1]", b"2"]);
        assert!(!refused);
        assert_eq!(decode(b"", 0, 5, true), DecodedLine::Partial);
    }

    #[test]
    fn a_line_at_the_limit_is_accepted_and_a_longer_one_refused_before_its_end() {
        assert!(matches!(
            decode(b"12345\n", 0, 5, false),
            DecodedLine::Whole { .. }
        ));
        assert_eq!(decode(b"123456", 0, 5, false), DecodedLine::TooLarge);
        assert_eq!(decode(b"12345", 0, 5, false), DecodedLine::Partial);
    }

    #[test]
    fn every_answer_is_one_line() {
        let mut out = b"before\n".to_vec();
        out.extend_from_slice(b"{\n\"a\":\n1}");
        finish(&mut out, 7);
        assert_eq!(out, b"before\n{ \"a\": 1}\n");
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_lines(text in "[ {}\r\n1]{0,60}", at: prop::sample::Index) {
            let bytes = text.as_bytes();
            let split = at.index(bytes.len() + 1);
            prop_assert_eq!(lines(bytes, split), lines(bytes, 0));
        }
    }
}
