//! Encodes and decodes the fields of the frames of an internal link.
//!
//! Pure. Numbers are little-endian. A field of variable length has its length before it, or is the last one
//! of its frame. A field that is not complete or not valid is `None`, and its frame is invalid.

use std::borrow::Cow;

use crate::protocol::trace_context::TraceContext;

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends the length plus one and the bytes; a length of 0 means `None`.
pub(super) fn put_option(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        // More than 4 GiB make the whole frame too long, which `Frame::encode` detects.
        Some(bytes) => {
            put_u32(out, bytes.len() as u32 + 1);
            out.extend_from_slice(bytes);
        }
        None => put_u32(out, 0),
    }
}

pub(super) fn put_trace(out: &mut Vec<u8>, trace: Option<&TraceContext>) {
    let parent = trace.map(TraceContext::traceparent);
    put_option(out, parent.as_deref().map(str::as_bytes));
    if let Some(trace) = trace {
        put_option(out, trace.state.as_deref().map(str::as_bytes));
    }
}

/// Returns the bytes as text, if they are UTF-8.
pub(super) fn text(bytes: &[u8]) -> Option<Cow<'_, str>> {
    std::str::from_utf8(bytes).ok().map(Cow::Borrowed)
}

/// The fields of a frame that are not decoded yet.
pub(super) struct FrameFields<'a>(&'a [u8]);

impl<'a> FrameFields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        FrameFields(bytes)
    }

    /// Returns whether all of them are decoded.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> Option<u8> {
        let (&value, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(value)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn option(&mut self) -> Option<Option<&'a [u8]>> {
        let Some(length) = self.u32()?.checked_sub(1) else {
            return Some(None);
        };
        let (value, rest) = self.0.split_at_checked(length as usize)?;
        self.0 = rest;
        Some(Some(value))
    }

    pub fn text_option(&mut self) -> Option<Option<Cow<'a, str>>> {
        match self.option()? {
            Some(bytes) => text(bytes).map(Some),
            None => Some(None),
        }
    }

    pub fn array<const LENGTH: usize>(&mut self) -> Option<[u8; LENGTH]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    pub fn trace(&mut self) -> Option<Option<Cow<'a, TraceContext>>> {
        let Some(parent) = self.option()? else {
            return Some(None);
        };
        let state = self.text_option()?;
        let context = TraceContext {
            state: state.map(|state| state.into_owned().into()),
            ..TraceContext::decode(parent)?
        };
        Some(Some(Cow::Owned(context)))
    }

    /// Returns all remaining bytes.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
