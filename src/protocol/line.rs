//! Lines: one JSON value a line, for `nc` and `jq`.
//!
//! A line ends with a newline, or with the end of what the client sends. Blank lines say nothing
//! and are passed over; a carriage return before the newline is JSON's white space. Knows nothing
//! of what a line says; borrows from the bytes it is given and keeps nothing.

use memchr::memchr;

/// What stands at the head of some received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodedLine<'a> {
    Whole {
        /// Its text, without the newline.
        body: &'a [u8],
        /// How many bytes it took, newline included.
        used: usize,
    },
    /// A line with nothing on it.
    Blank {
        /// How many bytes it took.
        used: usize,
    },
    /// The beginning of a line, or nothing.
    Partial,
    /// A line over the limit: refused before its end is known.
    TooLarge,
}

/// Reads the line at the head of `bytes`, of which the first `scanned` are known to have no
/// newline. `limit` is the longest line in bytes, `ended` tells that nothing follows.
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

/// Ends the line that was begun at `mark` of `out`. A handler may have written its result over
/// several lines: JSON has newlines between values only, where a space says the same.
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

    /// The lines of some bytes that come in two pieces.
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
    fn a_line_ends_with_a_newline_or_the_end() {
        let (found, refused) = lines(b"\r\n \n{}\r\n[1]\n\n2", 4);
        assert_eq!(found, [&b"{}\r"[..], b"[1]", b"2"]);
        assert!(!refused);
        assert_eq!(decode(b"", 0, 5, true), DecodedLine::Partial);
    }

    #[test]
    fn a_line_of_just_the_limit_is_taken_and_a_longer_one_refused_before_its_end() {
        assert!(matches!(
            decode(b"12345\n", 0, 5, false),
            DecodedLine::Whole { .. }
        ));
        assert_eq!(decode(b"123456", 0, 5, false), DecodedLine::TooLarge);
        assert_eq!(decode(b"12345", 0, 5, false), DecodedLine::Partial);
    }

    #[test]
    fn an_answer_is_one_line_whatever_its_handler_wrote() {
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
