//! Encodes and decodes frames: a 4-byte little-endian length, then a body of that many bytes.
//!
//! It does not interpret bodies. [`decode`] borrows from the given bytes and keeps nothing, because the
//! caller owns the buffer and limits it. A length over the limit is refused after its four bytes.

/// The bytes of the length before each body.
pub const HEADER: usize = 4;

/// The result of decoding the beginning of received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodedFrame<'a> {
    Whole {
        /// The body; empty for length 0.
        body: &'a [u8],
        /// The bytes of the frame, including the header.
        used: usize,
    },
    /// An incomplete frame.
    Partial {
        /// The bytes of the whole frame, including the header; 4 while the length is unknown.
        need: usize,
    },
    /// A length over the limit. No later frame boundary can be trusted.
    TooLarge { length: u32 },
}

/// Returns the message for a length over the limit. Text instead of a frame has such a length.
pub fn too_large(length: u32, limit: usize) -> String {
    let bytes = length.to_le_bytes();
    let is_text = bytes
        .iter()
        .all(|byte| byte.is_ascii_graphic() || *byte == b' ' || *byte == b'\n');
    let hint = match std::str::from_utf8(&bytes) {
        Ok(text) if is_text => {
            format!("; these four bytes are {text:?}, so it may be text without a length")
        }
        _ => String::new(),
    };
    format!("a frame of {length} bytes; limits.frame allows {limit}{hint}")
}

/// Decodes the frame at the beginning of `bytes`. `limit` is the largest body in bytes, inclusive.
#[inline]
pub fn decode(bytes: &[u8], limit: usize) -> DecodedFrame<'_> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return DecodedFrame::Partial { need: HEADER };
    };
    let length = u32::from_le_bytes(*header);
    let size = length as usize;
    if size > limit {
        return DecodedFrame::TooLarge { length };
    }
    match rest.get(..size) {
        Some(body) => DecodedFrame::Whole {
            body,
            used: HEADER + size,
        },
        None => DecodedFrame::Partial {
            need: HEADER + size,
        },
    }
}

/// Begins a frame at the end of `out`. Everything appended until [`finish`] is its body. Returns the mark
/// for `finish`.
#[inline]
pub fn begin(out: &mut Vec<u8>) -> usize {
    let mark = out.len();
    out.extend_from_slice(&[0; HEADER]);
    mark
}

/// Ends the frame that [`begin`] began at `mark`, by writing its length.
///
/// A body of 4 GiB or more has no length. Then the frame is removed from `out`, and the function returns
/// false. Results have limits far below that.
///
/// # Panics
/// If `mark` is not from `begin` on the same buffer.
#[inline]
pub fn finish(out: &mut Vec<u8>, mark: usize) -> bool {
    let body = mark + HEADER;
    let Ok(length) = u32::try_from(out.len() - body) else {
        out.truncate(mark);
        return false;
    };
    out[mark..body].copy_from_slice(&length.to_le_bytes());
    true
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
