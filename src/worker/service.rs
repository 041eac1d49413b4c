//! From a frame to its answer: what a worker does with each call it reads.
//!
//! Parses, finds the method, checks the limits, runs what is inline, lets the rest wait for a
//! thread, and writes every answer. It knows one connection at a time and no socket: answers are
//! collected in `out`, and whoever called sends them, one write for a batch. Every call that was
//! taken gets exactly one answer from here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::calls::{Calls, Ended};
use super::connection::{Connection, Phase, Place};
use super::threads::{Threads, panicked};
use super::timers::{CallKey, Target, Timers};
use crate::config::Limits;
use crate::handler::registry::Registry;
use crate::handler::{Context, Placement};
use crate::link::scoreboard::Record;
use crate::protocol::code::Code;
use crate::protocol::detect::{self, Dialect};
use crate::protocol::frame::{self, Decoded};
use crate::protocol::rpc_error::{RpcError, excerpt};
use crate::protocol::{answer, call, cancel};

/// What answers calls.
#[derive(Debug)]
pub struct Service {
    /// The methods.
    pub registry: Arc<Registry>,
    /// Calls that wait or run.
    pub calls: Calls,
    /// What runs them.
    pub threads: Threads,
    /// All deadlines of the worker.
    pub timers: Timers,
    /// The configured limits.
    pub limits: Limits,
    /// Answers of one connection that are not sent yet.
    pub out: Vec<u8>,
    /// The time, in milliseconds (CLOCK_MONOTONIC), as of the last wake-up.
    pub now_ms: u64,
    /// No further call begins: the server stops.
    pub stopping: bool,
    /// Calls read so far.
    pub read: u64,
    /// Answers that were errors so far.
    pub errors: u64,
    /// Where this worker shows what it does.
    pub record: &'static Record,
    /// Its slot.
    pub slot: u16,
}

impl Service {
    /// Takes as many whole frames from `input` as may be taken, with `unsent` bytes of earlier
    /// answers still on their way. Returns how many bytes were consumed.
    pub fn consume(&mut self, connection: &mut Connection, input: &[u8], unsent: usize) -> usize {
        let mut at = 0;
        while connection.takes_calls(self.limits.pipeline, unsent + self.out.len()) {
            match frame::decode(&input[at..], self.limits.frame) {
                Decoded::Whole { body, used } => {
                    connection.spoken = true;
                    at += used;
                    self.take(connection, body);
                }
                Decoded::Partial { .. } => break,
                Decoded::TooLarge { length } => {
                    let error = self.too_large(connection, &input[at..], length);
                    self.refuse(connection, None, &error);
                    // What follows can't be told apart from the rest of this frame.
                    return input.len();
                }
            }
        }
        at
    }

    fn too_large(&self, connection: &Connection, input: &[u8], length: u32) -> RpcError {
        let first: Option<[u8; 4]> = input.first_chunk().copied();
        let text = match first.map(detect::detect) {
            Some(dialect @ (Dialect::Line | Dialect::Http)) if !connection.spoken => format!(
                "this looks like {}, which is not served here: send a frame, a 4-byte \
                 little-endian length and that many bytes of JSON",
                if dialect == Dialect::Http {
                    "HTTP"
                } else {
                    "a line of JSON"
                },
            ),
            _ => format!(
                "a frame of {length} bytes; limits.frame allows {}",
                self.limits.frame
            ),
        };
        RpcError::of(Code::TooLarge, text, false)
    }

    /// Takes one call.
    fn take(&mut self, connection: &mut Connection, body: &[u8]) {
        self.read += 1;
        let call = match call::parse(body, self.limits.depth) {
            Ok(call) => call,
            Err(refusal) => return self.refuse(connection, refusal.id, &refusal.error),
        };
        if self.stopping {
            let error = RpcError::of(Code::Stopping, "the server stops", false);
            return self.refuse(connection, call.id, &error);
        }
        let Some(method) = self.registry.find(&call.method) else {
            if call.method == cancel::METHOD {
                return self.cancel(connection, call.id, call.params);
            }
            let text = format!("there is no method {:?} here", excerpt(&call.method));
            let error = RpcError::of(Code::MethodNotFound, text, false);
            return self.refuse(connection, call.id, &error);
        };
        let own_ms = millis(self.registry.methods()[method].timeout);
        let timeout_ms = call.timeout_ms.map_or(own_ms, |asked| asked.min(own_ms));
        let inline = self.registry.methods()[method].handler.placement() == Placement::Inline;
        let admitted = if timeout_ms == 0 {
            Err(RpcError::of(
                Code::Timeout,
                "its time was over when it came",
                false,
            ))
        } else if inline {
            self.calls.admit(method, self.now_ms)
        } else {
            self.calls
                .has_room(method, call.params.len(), self.threads.count())
                .and_then(|()| self.calls.admit(method, self.now_ms))
        };
        if let Err(error) = admitted {
            return self.refuse(connection, call.id, &error);
        }
        let place = connection.take(call.id.is_some());
        let deadline_ms = self.now_ms.saturating_add(timeout_ms);
        if inline {
            return self.run_inline(
                connection,
                place,
                (method, call.params),
                call.id,
                deadline_ms,
            );
        }
        let key = self.calls.add(
            (connection.token, place, call.id),
            (method, call.params),
            (self.now_ms, deadline_ms),
        );
        connection.pending += call.params.len() + call.id.map_or(0, str::len);
        if let Some(added) = self.calls.get_mut(key) {
            self.timers
                .arm(&mut added.timer, deadline_ms, Target::Call(key));
        }
    }

    fn run_inline(
        &mut self,
        connection: &mut Connection,
        place: Place,
        (number, params): (usize, &str),
        id: Option<&str>,
        deadline_ms: u64,
    ) {
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[number];
        let context = Context::inline(&method.name, self.slot, Duration::from_millis(deadline_ms));
        // Seen by the master should this call be the last thing that the worker does.
        self.record.last_method.store(number as u32 + 1, Relaxed);
        self.record.inline_running.store(1, Relaxed);
        let limit = self.limits.frame;
        let mut failed = false;
        self.write(connection, place, |out| {
            let mark = frame::begin(out);
            answer::begin(out, method.handler.answer_name().unwrap_or(&method.name));
            let start = out.len();
            let run = AssertUnwindSafe(|| method.handler.call(params, &context, out));
            let outcome = catch_unwind(run).unwrap_or_else(|payload| {
                // A payload may panic in its drop: better never dropped.
                std::mem::forget(payload);
                Err(panicked(&method.name))
            });
            let outcome = outcome.and_then(|()| check_size(out.len() - start, limit));
            match outcome {
                Ok(()) => answer::end(out, id),
                Err(error) => {
                    failed = true;
                    out.truncate(mark + frame::HEADER);
                    answer::error(out, &error, id);
                }
            }
            frame::finish(out, mark);
        });
        self.errors += u64::from(failed);
        self.record.inline_running.store(0, Relaxed);
    }

    /// `rpc.cancel`: ends the call with that id, and answers whether there was one.
    fn cancel(&mut self, connection: &mut Connection, id: Option<&str>, params: &str) {
        let Some(wanted) = cancel::wanted(params) else {
            let error = RpcError::invalid_params("rpc.cancel takes {\"id\": ID}");
            return self.refuse(connection, id, &error);
        };
        let key = self.calls.find(connection.token, wanted);
        if let Some(ended) = key.and_then(|key| self.give_up(key)) {
            let error = RpcError::of(Code::Cancelled, "cancelled by its caller", ended.begun);
            self.answer(connection, &ended, Err(error));
        }
        let place = connection.take(id.is_some());
        self.write(connection, place, |out| {
            let mark = frame::begin(out);
            answer::result(
                out,
                cancel::METHOD,
                if key.is_some() { "true" } else { "false" },
                id,
            );
            frame::finish(out, mark);
        });
    }

    /// Answers a call that is not begun, in its turn; ends the connection where the code says so.
    fn refuse(&mut self, connection: &mut Connection, id: Option<&str>, error: &RpcError) {
        let place = connection.take(id.is_some());
        self.errors += 1;
        self.write(connection, place, |out| write_error(out, error, id));
        if error.table_code().is_some_and(Code::closes) {
            connection.phase = Phase::Closing;
        }
    }

    /// Gives up a call that waits or runs, and its timer with it.
    pub fn give_up(&mut self, key: CallKey) -> Option<Ended> {
        let mut ended = self.calls.give_up(key)?;
        self.timers.disarm(&mut ended.timer, Target::Call(key));
        Some(ended)
    }

    /// Answers a call that had waited or run.
    pub fn answer(
        &mut self,
        connection: &mut Connection,
        ended: &Ended,
        outcome: Result<Vec<u8>, RpcError>,
    ) {
        connection.pending -= ended.size;
        let id = ended.id.as_deref();
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[ended.method];
        let outcome = outcome.and_then(|result| {
            check_size(result.len(), self.limits.frame)?;
            Ok(result)
        });
        self.errors += u64::from(outcome.is_err());
        self.write(connection, ended.place, |out| match &outcome {
            Ok(result) => {
                let mark = frame::begin(out);
                answer::begin(out, method.handler.answer_name().unwrap_or(&method.name));
                out.extend_from_slice(result);
                answer::end(out, id);
                frame::finish(out, mark);
            }
            Err(error) => write_error(out, error, id),
        });
        let closes = outcome.is_err_and(|error| error.table_code().is_some_and(Code::closes));
        if closes {
            connection.phase = Phase::Closing;
        }
    }

    /// Writes an answer to the output when it is its turn, else keeps it with the connection.
    fn write(
        &mut self,
        connection: &mut Connection,
        place: Place,
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        if connection.is_next(place) {
            write(&mut self.out);
            connection.answered(place, &mut self.out);
        } else {
            let mut answer = Vec::new();
            write(&mut answer);
            connection.hold(place, answer);
        }
    }
}

fn write_error(out: &mut Vec<u8>, error: &RpcError, id: Option<&str>) {
    let mark = frame::begin(out);
    answer::error(out, error, id);
    frame::finish(out, mark);
}

fn check_size(length: usize, limit: usize) -> Result<(), RpcError> {
    if length <= limit {
        return Ok(());
    }
    let text = format!("a result of {length} bytes; limits.frame allows {limit}");
    Err(RpcError::of(Code::BadOutput, text, true))
}

/// A duration in milliseconds, as long as can be said.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
