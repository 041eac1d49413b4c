//! Converts the output of a command to a result, or to the end of its standard error.
//!
//! Pure: bytes in, JSON or text out. A program can write anything; every output gives a result or a
//! reason why it cannot be one.

use serde_json::value::RawValue;

use crate::config::OutputFormat;
use crate::protocol::json;

/// The number of bytes kept from the end of standard error.
const STDERR_END: usize = 4096;

/// Appends the output of a command to `result`, as JSON on one line. `depth` is the deepest allowed
/// nesting, `most` the largest length. A text can be six times longer in JSON, so it is not encoded if it
/// would be over the limit.
///
/// # Errors
/// Why it cannot be a result; then `result` is unchanged.
pub fn append(
    output: OutputFormat,
    stdout: Vec<u8>,
    (depth, most): (usize, usize),
    result: &mut Vec<u8>,
) -> Result<(), String> {
    match output {
        OutputFormat::Text | OutputFormat::Line => {
            let mut text = String::from_utf8(stdout).map_err(|error| {
                format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())
            })?;
            if output == OutputFormat::Line && text.ends_with('\n') {
                text.pop();
            }
            let length = json_length(&text);
            if length > most {
                return Err(format!(
                    "a text that has {length} bytes in JSON; limits.frame allows {most}"
                ));
            }
            serde_json::to_writer(result, &text).map_err(|error| error.to_string())
        }
        OutputFormat::Json => {
            if stdout.trim_ascii().is_empty() {
                return Err("empty; one JSON value is expected".into());
            }
            let text = json::text(&stdout, depth).map_err(|error| error.message)?;
            let value: &RawValue =
                serde_json::from_str(text).map_err(|error| json::not_json(text, &error).message)?;
            let start = result.len();
            result.extend_from_slice(value.get().as_bytes());
            json::flatten_to_one_line(&mut result[start..]);
            Ok(())
        }
    }
}

/// Returns the number of bytes that serde_json writes for a text.
fn json_length(text: &str) -> usize {
    let escaped = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    2 + text.as_bytes().iter().map(escaped).sum::<usize>()
}

/// The end of a long text, for standard error.
#[derive(Debug, Default)]
pub struct Tail {
    bytes: Vec<u8>,
    is_cut: bool,
}

impl Tail {
    /// Appends bytes.
    pub fn add(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        // Cut rarely, so that many short writes do not move the bytes each time.
        if self.bytes.len() > 4 * STDERR_END {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.bytes.len() > STDERR_END {
            self.bytes.drain(..self.bytes.len() - STDERR_END);
            self.is_cut = true;
        }
    }

    /// Returns at most the last `most` of the kept bytes as text.
    pub fn end(&self, most: usize) -> String {
        let cut = self.bytes.len().saturating_sub(most);
        let end = Tail {
            bytes: self.bytes[cut..].to_vec(),
            is_cut: self.is_cut || cut > 0,
        };
        end.into_text()
    }

    /// Returns the kept bytes as text; invalid UTF-8 is replaced.
    pub fn into_text(mut self) -> String {
        self.cut();
        // The cut may be inside a character; skip its remaining bytes.
        let begin = if self.is_cut {
            let rest = |byte: &&u8| (**byte & 0xC0) == 0x80;
            self.bytes.iter().take(3).take_while(rest).count()
        } else {
            0
        };
        String::from_utf8_lossy(&self.bytes[begin..]).into_owned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn result(output: OutputFormat, stdout: &[u8]) -> Result<String, String> {
        let mut result = Vec::new();
        append(output, stdout.to_vec(), (3, 2000), &mut result)?;
        Ok(String::from_utf8_lossy(&result).into_owned())
    }

    #[test]
    fn output_is_one_string_or_one_json_value_on_one_line() {
        let text = |stdout| result(OutputFormat::Text, stdout);
        assert_eq!(text(b"a\r\n\"b\"\n"), Ok(r#""a\r\n\"b\"\n""#.into()));
        assert_eq!(text(b""), Ok(r#""""#.into()));
        let json = |stdout| result(OutputFormat::Json, stdout);
        assert_eq!(json(b" {\"a\":\r\n1.50}\n"), Ok("{\"a\":  1.50}".into()));
        for (stdout, reason) in [
            (&b""[..], "empty"),
            (b" \n", "empty"),
            (b"{\"a\":", "not JSON"),
            (b"1 2", "not JSON"),
            (b"[[[[]]]]", "3"),
            (b"\xff", "UTF-8"),
        ] {
            let why = json(stdout).unwrap_err();
            assert!(why.contains(reason), "{why}");
        }
    }

    #[test]
    fn a_text_longer_than_a_result_may_be_is_not_encoded() {
        for text in [
            "",
            "plain, naïve €",
            "\u{0}\u{1f}\u{7f}\u{2028}\"\\/\n\r\t\u{8}\u{c}",
        ] {
            let made = serde_json::to_string(text).unwrap().len();
            assert_eq!(json_length(text), made, "{text:?}");
        }
        assert!(result(OutputFormat::Text, &[b'x'; 1998]).is_ok());
        let why = result(OutputFormat::Text, &[0; 334]).unwrap_err();
        assert!(why.contains("2006 bytes in JSON"), "{why}");
    }

    #[test]
    fn a_tail_begins_with_a_whole_character() {
        let mut tail = Tail::default();
        for _ in 0..10_000 {
            tail.add("x€".as_bytes());
        }
        let text = tail.into_text();
        assert!(text.len() <= STDERR_END && text.len() > STDERR_END - 4);
        assert!(!text.contains('\u{FFFD}') && text.ends_with("x€"));
        let mut short = Tail::default();
        short.add(b"gone\xff");
        assert_eq!(short.into_text(), "gone\u{FFFD}");
    }
}
