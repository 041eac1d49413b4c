//! Keeps the bytes of one connection that the kernel has not taken yet.
//!
//! Its memory stays proportional to those bytes, because a slow reader may leave a small part of a large
//! answer unread for a long time.

use std::mem;

/// Bytes to be sent, in order.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    bytes: Vec<u8>,
    /// The kernel has taken this many of `bytes`.
    sent: usize,
}

impl SendBuffer {
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Returns how many bytes it keeps, including sent ones: at most about twice `len`.
    pub fn memory(&self) -> usize {
        self.bytes.len()
    }

    pub fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Adds `more` behind the existing bytes.
    pub fn append(&mut self, more: &[u8]) {
        // If the reader always leaves some bytes, the sent part must not grow without limit.
        if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..mem::take(&mut self.sent));
        }
        self.bytes.extend_from_slice(more);
    }

    /// Replaces the content by `bytes` without the first `sent` bytes, and leaves `bytes` empty. It takes
    /// the memory of `bytes` only if most of it is needed.
    pub fn fill(&mut self, bytes: &mut Vec<u8>, sent: usize) {
        if bytes.capacity() / 2 > bytes.len() - sent {
            *self = SendBuffer {
                bytes: bytes[sent..].to_vec(),
                sent: 0,
            };
            bytes.clear();
        } else {
            let mut bytes = mem::take(bytes);
            bytes.shrink_to_fit();
            *self = SendBuffer { bytes, sent };
        }
    }

    /// Drops the first `sent` bytes. Frees memory when most of it is unused, so each byte is moved a
    /// bounded number of times.
    pub fn consume(&mut self, sent: usize) {
        self.sent += sent;
        if self.bytes.capacity() / 2 > self.len() {
            self.bytes.drain(..mem::take(&mut self.sent));
            self.bytes.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_sent_in_order_and_a_small_rest_keeps_little_memory() {
        let mut out: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let whole = [&out[..], b"more"].concat();
        let mut buffer = SendBuffer::default();
        buffer.fill(&mut out, 10);
        buffer.append(b"more");
        let mut seen = whole[..10].to_vec();
        while buffer.len() > 0 {
            let step = buffer.len().min(999);
            seen.extend_from_slice(&buffer.pending()[..step]);
            buffer.consume(step);
            let memory = buffer.bytes.capacity();
            assert!(memory <= 4 * buffer.len(), "{memory} for {}", buffer.len());
        }
        assert!(seen == whole);
    }

    #[test]
    fn the_rest_of_an_answer_does_not_take_a_larger_buffer_over() {
        let mut out = Vec::with_capacity(1 << 20);
        out.extend_from_slice(&[b'x'; 1000]);
        let mut buffer = SendBuffer::default();
        buffer.fill(&mut out, 900);
        assert_eq!((buffer.len(), out.len()), (100, 0));
        assert!(buffer.bytes.capacity() < 1000);
        assert_eq!(out.capacity(), 1 << 20);
    }
}
