//! Trace context out of header values and out of bodies: it is none, or what is passed on reads back to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::body::{Body, read};
use preforkd::internals::trace_context::{ReceivedTrace, TraceContext, TraceFields};
use preforkd::internals::trace_search::TraceSearch;

/// What is passed on has the same trace, flags and state.
fn check(found: ReceivedTrace) {
    let ReceivedTrace::Valid(context) = found else {
        return;
    };
    let (parent, state) = (context.traceparent(), context.state.clone().unwrap_or_default());
    assert_eq!(parent.len(), 55);
    let mut again = TraceFields::default();
    again.add_header("traceparent", parent.as_bytes());
    again.add_header("tracestate", state.as_bytes());
    assert_eq!(again.received(), ReceivedTrace::Valid(context));
}

fuzz_target!(|input: &[u8]| {
    // Each line is the value of a header, the first one that of the parent.
    let mut lines = input.split(|byte| *byte == b'\n');
    let mut fields = TraceFields::default();
    fields.add_header("traceparent", lines.next().unwrap_or_default());
    lines.for_each(|line| fields.add_header("tracestate", line));
    check(fields.received());
    if let Some(context) = TraceContext::decode(input) {
        assert!(context.trace_id != 0 && context.parent_id != 0 && context.flags < 4);
    }
    if let Body::One(_, Ok(call)) = read(input, 128, 1) {
        for is_rpc in [false, true] {
            check(TraceSearch::default().find(input, call.params, is_rpc));
        }
    }
});
