//! Checks whether received bytes are text that the JSON parser may read.
//!
//! [`text`] checks nesting and UTF-8. serde_json checks the grammar: its raw values are strict, need no
//! recursion and keep every byte. Its own nesting limit does not apply to raw values, so this module
//! checks it.
//!
//! A refusal is a `parse-error` and names the position in bytes from 0.

use super::code::Code;
use super::rpc_error::RpcError;
use memchr::{memchr2, memchr2_iter};

/// Returns the body as text that is not nested deeper than `depth`; the outermost array or object is
/// level 1. The text is not yet known to be JSON.
///
/// A byte order mark is skipped, as RFC 8259, section 8.1 allows.
pub fn text(body: &[u8], depth: usize) -> Result<&str, RpcError> {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    if body.is_empty() {
        return Err(refused("an empty body is not JSON".to_owned()));
    }
    // Check the nesting first, so that deeply nested input is refused within its first bytes.
    if let Some(at) = too_deep(body, depth) {
        return Err(refused(format!(
            "nested deeper than {depth} levels at byte {at}"
        )));
    }
    std::str::from_utf8(body)
        .map_err(|error| refused(format!("not UTF-8 at byte {}", error.valid_up_to())))
}

/// Replaces line breaks in JSON by spaces. They can only be between tokens, where a space is equivalent.
/// In the line dialect they would end the answer.
pub fn flatten_to_one_line(json: &mut [u8]) {
    let mut at = 0;
    while let Some(found) = memchr2(b'\n', b'\r', &json[at..]) {
        at += found;
        json[at] = b' ';
    }
}

/// Returns the refusal for an error of serde_json about `text`.
#[cold]
pub fn not_json(text: &str, error: &serde_json::Error) -> RpcError {
    let said = error.to_string();
    // serde_json ends each message with a line and a column, but frames have no lines.
    let what = match said.rfind(" at line ") {
        Some(end) => &said[..end],
        None => &said,
    };
    if error.is_eof() {
        return refused(format!("not JSON, ended at byte {}: {what}", text.len()));
    }
    let line_start = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum::<usize>();
    // The position of serde_json is exact only to a byte or two.
    let at = (line_start + error.column().saturating_sub(1)).min(text.len());
    match error.is_data() {
        true => refused(format!("JSON of the wrong form near byte {at}: {what}")),
        false => refused(format!("not JSON near byte {at}: {what}")),
    }
}

fn refused(message: String) -> RpcError {
    RpcError::of(Code::ParseError, message, false)
}

/// Returns where the nesting exceeds `depth`. It is exact for JSON. For other bytes it may be wrong, but
/// only behind the byte at which the grammar refuses them.
fn too_deep(bytes: &[u8], depth: usize) -> Option<usize> {
    // Each level takes a bracket. So for small calls the check ends here, and for long strings and lists of numbers
    // at the search for brackets below.
    if bytes.len() <= depth {
        return None;
    }
    memchr2_iter(b'[', b'{', bytes).nth(depth)?;
    let (mut at, mut level) = (0, 0_usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'[' | b'{' if level == depth => return Some(at),
            b'[' | b'{' => level += 1,
            b']' | b'}' => level = level.saturating_sub(1),
            b'"' => at = string_end(bytes, at + 1),
            _ => {}
        }
        at += 1;
    }
    None
}

/// Returns the closing quote of the string whose first byte is at `at`, or the end of the bytes.
fn string_end(bytes: &[u8], mut at: usize) -> usize {
    loop {
        // Skip runs of escapes here, because a search for each would cost more.
        while bytes.get(at) == Some(&b'\\') {
            at += 2;
        }
        let rest = bytes.get(at..).unwrap_or_default();
        match memchr2(b'"', b'\\', rest) {
            Some(found) if rest[found] == b'"' => return at + found,
            Some(found) => at += found,
            None => return bytes.len(),
        }
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
