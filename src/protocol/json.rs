//! Whether received bytes are JSON text that may be read further.
//!
//! [`text`] looks at what a parser must not be trusted with (nesting) or does not look at
//! (UTF-8); the grammar itself is serde_json's, whose raw values are checked strictly, without
//! recursion, and kept to the letter. Its own limit of nesting does not hold for them, hence the
//! scan here.
//!
//! Refusals are `parse-error` and say where, in bytes counted from 0.

use super::code::Code;
use super::rpc_error::RpcError;
use memchr::{memchr2, memchr2_iter};

/// The body as text that is not nested deeper than `depth`; the outermost array or object is
/// level 1. Whether it is JSON is not known yet.
///
/// A byte order mark is passed over, as a parser may do it (RFC 8259, section 8.1).
pub fn text(body: &[u8], depth: usize) -> Result<&str, RpcError> {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    if body.is_empty() {
        return Err(refused("an empty body is not JSON".to_owned()));
    }
    // The nesting first: a bomb is over within its first bytes.
    if let Some(at) = too_deep(body, depth) {
        return Err(refused(format!(
            "nested deeper than {depth} levels at byte {at}"
        )));
    }
    std::str::from_utf8(body)
        .map_err(|error| refused(format!("not UTF-8 at byte {}", error.valid_up_to())))
}

/// Makes one line of JSON that may stand on several: a line break can only stand between tokens,
/// where a blank does as well; in the dialect of lines it would end the answer.
pub fn flatten_to_one_line(json: &mut [u8]) {
    let mut at = 0;
    while let Some(found) = memchr2(b'\n', b'\r', &json[at..]) {
        at += found;
        json[at] = b' ';
    }
}

/// The refusal for what serde_json says about `text`.
#[cold]
pub fn not_json(text: &str, error: &serde_json::Error) -> RpcError {
    let said = error.to_string();
    // serde_json ends each message with a line and a column; frames have no lines.
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
    // Of the place serde_json is only certain to a byte or two.
    let at = (line_start + error.column().saturating_sub(1)).min(text.len());
    refused(format!("not JSON near byte {at}: {what}"))
}

fn refused(message: String) -> RpcError {
    RpcError::of(Code::ParseError, message, false)
}

/// Where the nesting passes `depth`. Exact on JSON; on anything else it may err, past the byte at
/// which the grammar refuses it.
fn too_deep(bytes: &[u8], depth: usize) -> Option<usize> {
    // Each level takes a bracket. Small calls, long strings and lists of numbers end here.
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

/// The closing quote of the string whose first byte is at `at`, or the end of the bytes.
fn string_end(bytes: &[u8], mut at: usize) -> usize {
    loop {
        // Runs of escapes are stepped over here: a search for each would cost more.
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
