//! Ends a turn of the event loop for the metrics and the access log, and counts calls that get no answer.
//!
//! First the calls are counted and then their lines are written. In the other order a worker that is killed between
//! the two would have more lines than calls.

use super::hooks::AnswerFacts;
use crate::worker::call_dispatcher::CallDispatcher;
use crate::worker::call_errors::caller_gone;
use crate::worker::call_scheduler::FinishedCall;

/// Ends a turn: counts the inline calls and sends the lines to their thread.
#[inline]
pub fn end(service: &mut CallDispatcher) {
    service.counts.flush();
    service.access.flush(&service.counts);
}

/// In a long turn, counts the inline calls so far if they have taken long, and sends their lines if they are many.
#[inline]
pub fn between_answers(service: &mut CallDispatcher) {
    if service.counts.flush_if_late() {
        service.access.end_inline(service.counts.now_ns());
    }
    if service.access.is_full() {
        end(service);
    }
}

/// Counts a call whose connection is gone, so that it gets no answer.
pub fn count_unanswered(service: &mut CallDispatcher, ended: &FinishedCall) {
    let error = caller_gone(ended.begun);
    let counted = service.counts.count_unanswered(ended, &error);
    let before = service.access.switch_to(ended);
    let counts = (&service.counts, counted, service.last_call);
    let answer: AnswerFacts<'_> = (ended.reply.shape.form, Some(&error), 0);
    service.access.answered(None, answer, counts);
    service.access.switch_back(before);
}
