//! Frames: a 4-byte little-endian length, then that many bytes of body.
//!
//! Knows nothing of what a body says. [`decode`] borrows from the bytes it is given and keeps
//! nothing: the caller owns the buffer and decides how much of it to hold. A length over the
//! limit is known, and refused, from its four bytes alone.

/// Bytes of the length before each body.
pub const HEADER: usize = 4;

/// What stands at the head of some received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodedFrame<'a> {
    Whole {
        /// Its body; empty for a length of 0.
        body: &'a [u8],
        /// How many bytes it took, header included.
        used: usize,
    },
    /// The beginning of one.
    Partial {
        /// How many bytes, header included, make it whole; 4 as long as the length is unknown.
        need: usize,
    },
    /// A length over the limit: no frame boundary after it can be trusted.
    TooLarge { length: u32 },
}

/// Reads the frame at the head of `bytes`. `limit` is the largest body in bytes; a body of just
/// that size is taken.
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

/// Begins a frame at the end of `out`: whatever is appended from here is its body, until
/// [`finish`] is given the mark returned.
#[inline]
pub fn begin(out: &mut Vec<u8>) -> usize {
    let mark = out.len();
    out.extend_from_slice(&[0; HEADER]);
    mark
}

/// Ends the frame that [`begin`] began at `mark`, by writing the length in its place.
///
/// A body that no length can tell (4 GiB or more) is taken out of `out` again, header included,
/// and the answer is false; results have limits far below that.
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
