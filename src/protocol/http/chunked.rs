//! Bodies in chunks (RFC 9112, section 7.1), held to the letter.
//!
//! A size is hexadecimal digits and nothing else; extensions and trailers are checked and passed
//! over. What frames the message may not stand in a trailer.

use super::refusal::{HEAD_MAX, RejectedRequest};
use memchr::memchr;

/// The longest line of a chunk's size with its extensions.
const SIZE_LINE_MAX: usize = 1024;

/// How far it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walked {
    /// To the end.
    Whole {
        /// Bytes of all chunks, the last one and the trailers included.
        used: usize,
    },
    /// More has to come.
    Partial,
}

/// Walks over the chunks of `bytes` from `at` on, and gives each one's content to `each`. `total`
/// is how much they held so far; with `at` it stays at the first chunk that is not whole.
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
        // Small chunks cost more than they hold, and all of it is kept until the body is whole.
        if *at > 2 * limit + HEAD_MAX {
            let text = "a body in chunks so small that they take thrice its room";
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

/// The line at the head of `bytes` and where the next begins; `None` while it is unfinished.
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
        // Control characters, a carriage return among them, have no place in any of these lines.
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
        return Err(malformed("a size is no hexadecimal number"));
    }
    let text = std::str::from_utf8(digits).unwrap_or_default();
    // Leading zeros are many ways to write one number, and all of them fit the line.
    let text = text.trim_start_matches('0');
    if text.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(text, 16)
        .map_err(|_| RejectedRequest::new(413, "a chunk of more than 2^64 bytes"))
}

/// Bytes of the trailers and the empty line behind them; `None` while that has not come.
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
            return Err(malformed("a trailer that has no place there"));
        }
    }
}

/// Whether a byte may stand in a header's name (RFC 9110, section 5.6.2).
fn token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}
