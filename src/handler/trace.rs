//! The place of a call in a trace (W3C Trace Context), for its handler.
//!
//! A call whose client sent no context begins a trace. Its ids are computed from its number when they are
//! needed, so such a call stores nothing. The sequences are seeded after the fork, because otherwise all
//! workers would make the same ids.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::job_attempt::JobAttempt;
use crate::logging::LoggedCall;
use crate::protocol::call_id::CallId;
use crate::protocol::trace_context::{RANDOM, SAMPLED, TraceContext, sample_hash, sample_limit};
use crate::sys::process::Pid;
use crate::sys::random::RandomSequence;

/// The two halves of trace ids, by the number of the call.
static TRACE_IDS: [RandomSequence; 2] = [const { RandomSequence::unseeded() }; 2];
/// The spans of calls, by their numbers.
static SPANS: RandomSequence = RandomSequence::unseeded();
/// The parent ids of requests that handlers send.
static CHILDREN: RandomSequence = RandomSequence::unseeded();
static NEXT_CHILD: AtomicU64 = AtomicU64::new(0);
/// New traces with a hash below this get the sampled flag; 0: none.
static SAMPLED_BELOW: AtomicU64 = AtomicU64::new(0);

/// Seeds the ids of this process. Call it after the fork, before the first call.
///
/// # Errors
/// If the kernel gives no random numbers.
pub fn seed() -> io::Result<()> {
    let mut sequences = TRACE_IDS.iter().chain([&SPANS, &CHILDREN]);
    sequences.try_for_each(RandomSequence::seed)
}

/// Sets the share of new traces with the sampled flag: those of which the access log has the lines.
pub fn sample(share: f64) {
    SAMPLED_BELOW.store(sample_limit(share).unwrap_or(u64::MAX), Relaxed);
}

/// Returns the flags of a new trace.
fn new_flags(trace_id: u128) -> u8 {
    let is_sampled = match SAMPLED_BELOW.load(Relaxed) {
        0 => false,
        u64::MAX => true,
        below => sample_hash(trace_id) < below,
    };
    if is_sampled { RANDOM | SAMPLED } else { RANDOM }
}

/// Where the trace of a call comes from.
#[derive(Debug, Default)]
pub enum TraceSource {
    /// Without `[trace]` no call has one.
    #[default]
    Off,
    /// The call begins a trace.
    New,
    /// The context of the client, with the span of the call as its parent id.
    Given(Box<TraceContext>),
}

impl TraceSource {
    /// Returns the trace of the call with this number. `context` is what its client has sent.
    pub fn of_call(context: Option<Box<TraceContext>>, number: u64) -> Self {
        match context {
            Some(mut context) => {
                context.parent_id = SPANS.at(number);
                TraceSource::Given(context)
            }
            None => TraceSource::New,
        }
    }

    /// Returns the trace of the call with this number.
    pub(super) fn trace(&self, number: u64) -> Option<Trace<'_>> {
        match self {
            TraceSource::Off => None,
            TraceSource::New => {
                let [high, low] = TRACE_IDS.each_ref().map(|ids| u128::from(ids.at(number)));
                let trace_id = high << 64 | low;
                Some(Trace(Cow::Owned(TraceContext {
                    trace_id,
                    parent_id: SPANS.at(number),
                    flags: new_flags(trace_id),
                    state: None,
                })))
            }
            TraceSource::Given(context) => Some(Trace(Cow::Borrowed(context))),
        }
    }
}

/// The place of a call in a trace, as in the headers of W3C Trace Context.
#[derive(Debug, Clone)]
pub struct Trace<'a>(Cow<'a, TraceContext>);

impl<'a> Trace<'a> {
    /// Returns the `traceparent` whose parent id is the span of the call.
    pub fn traceparent(&self) -> String {
        self.0.traceparent()
    }

    /// Returns the `tracestate`, if the client sent one.
    pub fn tracestate(&self) -> Option<&str> {
        self.0.state.as_deref()
    }

    /// Returns the id of the trace in 32 hexadecimal digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.0.trace_id)
    }

    /// Returns a `traceparent` for one request that the handler sends: with a parent id of its own.
    pub fn child(&self) -> String {
        let number = NEXT_CHILD.fetch_add(1, Relaxed);
        self.0.traceparent_of(CHILDREN.at(number))
    }

    /// Returns the context, to pass it on.
    pub(crate) fn into_context(self) -> Cow<'a, TraceContext> {
        self.0
    }
}

/// What identifies a call in logs and in other processes.
#[derive(Debug, Default)]
pub struct CallIdentity {
    /// Its number in this process.
    pub number: u64,
    /// Its id, if another process has its connection.
    pub home: Option<CallId>,
    pub trace: TraceSource,
    /// The attempt of a job that this is; `None` for a call.
    pub attempt: Option<Box<JobAttempt>>,
}

impl CallIdentity {
    /// The identity of a context until `Context::identified` sets one.
    pub(super) const NONE: &'static CallIdentity = &CallIdentity {
        number: 0,
        home: None,
        trace: TraceSource::Off,
        attempt: None,
    };

    /// Returns the place of the call in a trace; `None` without `[trace]`.
    pub fn trace(&self) -> Option<Trace<'_>> {
        self.trace.trace(self.number)
    }

    /// Returns how log lines name the call; `None` without `[trace]`.
    #[inline]
    pub fn logged(&self) -> Option<LoggedCall> {
        match (&self.trace, self.home) {
            (TraceSource::Off, _) => None,
            (_, Some(home)) => Some((home.pid, home.number)),
            (_, None) => Some((0, self.number)),
        }
    }

    /// Returns the id of the call.
    pub fn id(&self) -> CallId {
        self.home.unwrap_or_else(|| CallId {
            pid: Pid::current().0,
            number: self.number,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Once;

    use super::*;

    /// Seeds the ids once, because the tests run side by side.
    fn seed_once() {
        static SEEDED: Once = Once::new();
        SEEDED.call_once(|| seed().unwrap());
    }

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_call_continues_the_trace_of_its_client_with_a_span_of_its_own() {
        seed_once();
        let mut context = TraceContext::decode(PARENT.as_bytes()).unwrap();
        context.state = Some("a=1".into());
        let source = |number| TraceSource::of_call(Some(Box::new(context.clone())), number);
        let (one, other) = (source(1), source(2));
        let trace = one.trace(1).unwrap();
        let (sent, child) = (trace.traceparent(), trace.child());
        assert_eq!(trace.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(trace.tracestate(), Some("a=1"));
        for text in [&sent, &child, &trace.child()] {
            assert_eq!((&text[..36], &text[52..]), (&PARENT[..36], "-01"));
            assert_ne!(text, PARENT);
        }
        assert_ne!(sent, child);
        assert_ne!(child, trace.child());
        assert_ne!(sent, other.trace(2).unwrap().traceparent());
        assert_eq!(sent, one.trace(1).unwrap().traceparent());
    }

    #[test]
    fn a_call_without_context_begins_a_trace() {
        seed_once();
        let source = TraceSource::of_call(None, 7);
        let sent = |number| source.trace(number).unwrap().traceparent();
        assert_eq!(sent(7), sent(7));
        assert_ne!(sent(7)[..35], sent(8)[..35]);
        assert!(sent(7).ends_with("-02"), "{}", sent(7));
        let read = TraceContext::decode(sent(7).as_bytes()).unwrap();
        assert_eq!(read.traceparent(), sent(7));
        assert!(TraceSource::default().trace(7).is_none());
    }
}
