//! Holds the calls of a JSON-RPC batch that are not taken yet.
//!
//! The event loop takes a long batch in parts, so that other connections are served in between. All
//! answers of a batch are held back until the last one is done, so they share limits. Pure: the
//! dispatcher takes the calls, and the connection has their answers.

use std::ops::Range;

use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::protocol::trace_context::TraceContext;

/// The largest number of calls of a batch that are taken in one turn of the event loop.
pub const MEMBERS_PER_TURN: usize = 64;

/// The calls of a batch that are not taken yet. No other call of its connection is taken before them.
#[derive(Debug)]
pub struct UntakenMembers {
    /// The key of the batch in its connection.
    pub batch: usize,
    /// The body of the batch.
    pub text: Box<str>,
    /// The positions of the calls in `text`.
    members: Vec<Range<usize>>,
    /// The number of calls already taken.
    taken: usize,
    /// When the batch was received, in milliseconds.
    pub received_ms: u64,
    /// The trace context of its HTTP request.
    pub header: Option<Box<TraceContext>>,
    /// Its `X-Request-Id`.
    pub request_id: Option<Box<str>>,
}

impl UntakenMembers {
    pub fn new(batch: usize, text: &str, members: &[&str], received_ms: u64) -> Self {
        let range = |member: &&str| {
            let start = member.as_ptr().addr() - text.as_ptr().addr();
            start..start + member.len()
        };
        UntakenMembers {
            batch,
            text: text.into(),
            members: members.iter().map(range).collect(),
            taken: 0,
            received_ms,
            header: None,
            request_id: None,
        }
    }

    /// Adds the trace context and the `X-Request-Id` of its HTTP request.
    #[must_use]
    pub fn of_request(
        self,
        header: &Option<Box<TraceContext>>,
        request_id: &Option<Box<str>>,
    ) -> Self {
        UntakenMembers {
            header: header.clone(),
            request_id: request_id.clone(),
            ..self
        }
    }

    pub fn members(&self) -> impl Iterator<Item = &str> {
        let left = self.members[self.taken..].iter();
        left.map(|range| &self.text[range.clone()])
    }

    /// Counts `taken` more calls as taken. Returns whether any remain.
    pub fn advance(&mut self, taken: usize) -> bool {
        self.taken += taken;
        self.taken < self.members.len()
    }
}

/// Returns the error of a call whose answer would make the answer of its batch longer than `limit`
/// (`limits.frame`).
pub fn too_long(limit: usize, started: bool) -> RpcError {
    let what = match started {
        true => "the answers of its batch are longer than limits.frame allows",
        false => "not started, because the answers of its batch are as long as limits.frame allows",
    };
    let text = format!("{what}, {limit} bytes; send fewer calls in one batch");
    RpcError::of(Code::BadOutput, text, started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_parts_of_the_text_and_are_taken_in_their_order() {
        let text = "[1, 22, 333]";
        let members = [&text[4..6], &text[8..11]];
        let mut left = UntakenMembers::new(7, text, &members, 5);
        assert_eq!(left.members().collect::<Vec<_>>(), ["22", "333"]);
        assert!(left.advance(1));
        assert_eq!(left.members().collect::<Vec<_>>(), ["333"]);
        assert!(!left.advance(1));
    }
}
