//! A call that is under way: whether it is done, and its result.
//!
//! A handle can be sent to another thread, and dropped: the call goes on, and its answer is nobody's.

use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde::de::DeserializeOwned;

use super::error::ClientError;
use super::pipelined_calls::Entry;
use super::reply::Reply;

/// A call whose result, of the type `R`, can be had later.
#[derive(Debug)]
pub struct Handle<R> {
    outcome: Receiver<Result<Reply, ClientError>>,
    /// When to give up, and after how long that is.
    limit: Option<(Instant, Duration)>,
    /// Held for its drop: the call of a pipeline is forgotten with its handle.
    _entry: Option<Entry>,
    result: PhantomData<fn() -> R>,
}

impl<R> Handle<R> {
    /// A handle of the call whose outcome will come there, once.
    pub(super) fn new(
        outcome: Receiver<Result<Reply, ClientError>>,
        limit: Option<Duration>,
    ) -> Self {
        let limit = limit.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
        Handle {
            outcome,
            limit,
            _entry: None,
            result: PhantomData,
        }
    }

    /// The same for a call of a pipeline, with its entry there.
    pub(super) fn with_entry(self, entry: Entry) -> Self {
        Handle {
            _entry: Some(entry),
            ..self
        }
    }

    /// Whether the outcome is there, so that taking it does not wait.
    pub fn is_ready(&self) -> bool {
        !self.outcome.is_empty()
    }

    /// Waits for the answer, to the letter.
    ///
    /// # Errors
    /// Why there is no result.
    pub fn wait_raw(self) -> Result<Reply, ClientError> {
        let received = match self.limit {
            Some((deadline, limit)) => match self.outcome.recv_deadline(deadline) {
                Err(RecvTimeoutError::Timeout) => return Err(ClientError::TimedOut(limit)),
                received => received.ok(),
            },
            None => self.outcome.recv().ok(),
        };
        // Whoever owed the outcome is gone without a word: it never began.
        received.unwrap_or(Err(ClientError::Ended))
    }
}

impl<R: DeserializeOwned> Handle<R> {
    /// Waits for the result.
    ///
    /// # Errors
    /// Why there is none, or that it is not an `R`.
    pub fn wait(self) -> Result<R, ClientError> {
        self.wait_raw().and_then(|reply| reply.read())
    }

    /// Waits for the result, but not for longer than this: the handle comes back if it is not
    /// there by then.
    ///
    /// # Errors
    /// The handle itself, to be asked again.
    pub fn wait_for(self, limit: Duration) -> Result<Result<R, ClientError>, Self> {
        match self.outcome.recv_timeout(limit) {
            Ok(outcome) => Ok(outcome.and_then(|reply| reply.read())),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(Err(ClientError::Ended)),
        }
    }
}
