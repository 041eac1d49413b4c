//! Decodes chunked bodies strictly (RFC 9112, section 7.1).
//!
//! A size consists only of hexadecimal digits. Extensions and trailers are checked and skipped. A trailer
//! must not contain a header that frames the message.

use super::refusal::{HEAD_MAX, RejectedRequest};
use memchr::memchr;

/// The longest line of a chunk size, with its extensions.
const SIZE_LINE_MAX: usize = 1024;

/// The result of `walk`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walked {
    Whole {
        /// The bytes of all chunks, including the last one and the trailers.
        used: usize,
    },
    /// More bytes are needed.
    Partial,
}

/// Walks over the chunks of `bytes` from `at` on and passes the content of each to `each`. `total` is the
/// content length so far. `at` and `total` stop at the first incomplete chunk.
pub fn walk(
    bytes: &[u8],
    at: &mut usize,
    total: &mut usize,
    limit: usize,
    mut each: impl FnMut(&[u8]),
) -> Result<Walked, RejectedRequest> {
    loop {
        let rest = bytes.get(*at..).unwrap_or_default();
        let Some((line, begin)) = line(rest, SIZE_LINE_MAX, "a chunk's size")? else {
            return Ok(Walked::Partial);
        };
        let size = size(line)?;
        if size == 0 {
            return Ok(match trailers(&rest[begin..])? {
                Some(length) => Walked::Whole {
                    used: *at + begin + length,
                },
                None => Walked::Partial,
            });
        }
        if size > (limit - *total) as u64 {
            let text = format!("a body of more than limits.frame allows, {limit} bytes");
            return Err(RejectedRequest::new(413, text));
        }
        // Small chunks use more bytes than their content, and all bytes are kept until the body is
        // complete.
        if *at > 2 * limit + HEAD_MAX {
            let text = "a body in chunks so small that together they exceed twice limits.frame";
            return Err(RejectedRequest::new(413, text));
        }
        let end = begin + size as usize;
        match rest.get(end..) {
            Some([b'\r', b'\n', ..]) => {}
            None | Some([] | [b'\r']) => return Ok(Walked::Partial),
            Some(_) => return Err(malformed("a chunk is longer than its size says")),
        }
        each(&rest[begin..end]);
        *total += size as usize;
        *at += end + 2;
    }
}

fn malformed(what: &str) -> RejectedRequest {
    RejectedRequest::new(400, format!("malformed chunks: {what}"))
}

/// Returns the line at the beginning of `bytes`, and where the next one begins; `None` if it is
/// incomplete.
fn line<'a>(
    bytes: &'a [u8],
    most: usize,
    what: &str,
) -> Result<Option<(&'a [u8], usize)>, RejectedRequest> {
    let seen = &bytes[..bytes.len().min(most + 2)];
    let Some(newline) = memchr(b'\n', seen) else {
        if seen.len() == most + 2 {
            return Err(malformed(&format!("{what} has no end")));
        }
        return Ok(None);
    };
    match seen[..newline].split_last() {
        // None of these lines may contain control characters, including a carriage return.
        Some((b'\r', line))
            if line
                .iter()
                .all(|b| *b == b'\t' || (*b >= 0x20 && *b != 0x7f)) =>
        {
            Ok(Some((line, newline + 1)))
        }
        _ => Err(malformed(&format!(
            "{what} has a control character, or ends without a carriage return"
        ))),
    }
}

fn size(line: &[u8]) -> Result<u64, RejectedRequest> {
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    let (digits, extensions) = line.split_at(digits);
    if digits.is_empty() || !(extensions.is_empty() || extensions[0] == b';') {
        return Err(malformed("a chunk size is not a hexadecimal number"));
    }
    let text = std::str::from_utf8(digits).unwrap_or_default();
    // Leading zeros are allowed as long as they fit into the line.
    let text = text.trim_start_matches('0');
    if text.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(text, 16)
        .map_err(|_| RejectedRequest::new(413, "a chunk of more than 2^64 bytes"))
}

/// Returns the length in bytes of the trailers and the empty line behind them; `None` if that has not arrived.
fn trailers(bytes: &[u8]) -> Result<Option<usize>, RejectedRequest> {
    let mut at = 0;
    loop {
        let room = HEAD_MAX - at;
        let Some((line, next)) = line(&bytes[at..], room, "a trailer")? else {
            return Ok(None);
        };
        at += next;
        if line.is_empty() {
            return Ok(Some(at));
        }
        let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
        let is_token = !name.is_empty() && name.len() < line.len() && name.iter().all(token);
        let frames = [
            &b"content-length"[..],
            b"transfer-encoding",
            b"host",
            b"trailer",
        ]
        .iter()
        .any(|known| name.eq_ignore_ascii_case(known));
        if !is_token || frames || at > HEAD_MAX - 2 {
            return Err(malformed("a header that must not be in a trailer"));
        }
    }
}

/// Returns whether a byte may occur in a header name (RFC 9110, section 5.6.2).
fn token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}
