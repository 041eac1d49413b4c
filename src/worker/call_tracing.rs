//! Reads the trace context of the calls of a worker, if `[trace]` wants it.
//!
//! A context comes from the header of an HTTP request or from the body of a call. The body wins. A header
//! holds for all calls of a batch. The dispatcher passes each body to `read`, and then asks for the identity
//! of the call.

use crate::handler::trace::{CallIdentity, TraceSource};
use crate::protocol::body::Form;
use crate::protocol::call::{Call, InvalidCall};
use crate::protocol::call_id::CallId;
use crate::protocol::trace_context::{ReceivedTrace, TraceContext};
use crate::protocol::trace_search::TraceSearch;
use crate::sys::process::Pid;

/// Whether calls are traced, and the context of the current one.
#[derive(Debug)]
pub struct CallTracing {
    /// Whether context is read and passed on.
    pub is_on: bool,
    /// The pid in the ids of calls.
    pid: i32,
    search: TraceSearch,
    /// The context of the current HTTP request.
    pub header: Option<Box<TraceContext>>,
    /// The context in the body of the current call.
    body: ReceivedTrace,
    /// The parent id that the client of the current call has sent; 0: none.
    pub parent_id: u64,
}

impl CallTracing {
    /// Creates the tracing of this process.
    pub fn new(is_on: bool) -> Self {
        CallTracing {
            is_on,
            pid: Pid::current().0,
            search: TraceSearch::default(),
            header: None,
            body: ReceivedTrace::Absent,
            parent_id: 0,
        }
    }

    /// Reads the context in the body of a call, which is the current one from now on.
    #[inline]
    pub fn read(&mut self, body: &[u8], call: &Call<'_>, form: Form) {
        if self.is_on {
            self.search_body(body, call, form);
        }
    }

    // Not inlined, so that without `[trace]` a call pays only for the check above.
    #[inline(never)]
    fn search_body(&mut self, body: &[u8], call: &Call<'_>, form: Form) {
        self.body = self.search.find(body, call.params, form != Form::Plain);
    }

    /// Reads the trace context of a call of a batch; `member` is the text of the call.
    #[inline]
    pub fn read_member(&mut self, member: &str, call: &Result<Call<'_>, InvalidCall<'_>>) {
        if let Ok(call) = call {
            self.read(member.as_bytes(), call, Form::JsonRpc);
        }
    }

    /// Returns the identity of the current call of this process, which has this number.
    #[inline]
    pub fn identity(&mut self, number: u64) -> CallIdentity {
        CallIdentity {
            number,
            home: None,
            trace: match self.is_on {
                true => self.take(number),
                false => TraceSource::Off,
            },
            attempt: None,
        }
    }

    fn take(&mut self, number: u64) -> TraceSource {
        let context = match std::mem::take(&mut self.body) {
            ReceivedTrace::Absent => self.header.clone(),
            received => received.valid(),
        };
        self.parent_id = context.as_ref().map_or(0, |context| context.parent_id);
        TraceSource::of_call(context, number)
    }

    /// Returns the id of the call with this number, if errors have ids.
    #[inline]
    pub fn id(&self, number: u64) -> Option<CallId> {
        let pid = self.pid;
        self.is_on.then_some(CallId { pid, number })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_body_wins_over_a_header_and_a_header_holds_for_all_calls() {
        let mut tracing = CallTracing::new(true);
        let context = TraceContext::decode(PARENT.as_bytes()).unwrap();
        tracing.header = Some(Box::new(context));
        let call = |params| Call {
            method: "a".into(),
            params,
            id: None,
            timeout_ms: None,
        };
        for (body, expected) in [
            (r#"{"in": "a"}"#, Some(PARENT.get(3..35).unwrap())),
            (r#"{"in": "a", "traceparent": "x"}"#, None),
            (r#"{"in": "a"}"#, Some(PARENT.get(3..35).unwrap())),
            (
                r#"{"in": "a", "traceparent": "00-00000000000000000000000000000001-00f067aa0ba902b7-01"}"#,
                Some("00000000000000000000000000000001"),
            ),
        ] {
            tracing.read(body.as_bytes(), &call("null"), Form::Plain);
            let given = match tracing.take(1) {
                TraceSource::Given(context) => Some(format!("{:032x}", context.trace_id)),
                TraceSource::New | TraceSource::Off => None,
            };
            assert_eq!(given.as_deref(), expected, "{body}");
        }
        assert_eq!(tracing.id(3).unwrap().number, 3);
        assert!(CallTracing::new(false).id(3).is_none());
    }
}
