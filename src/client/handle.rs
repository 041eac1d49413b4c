//! A call that is under way: whether it is done, and its result.
//!
//! A handle can be sent to another thread. If it is dropped, the call continues and its answer is ignored.

use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use serde::de::DeserializeOwned;

use super::error::ClientError;
use super::pipelined_calls::Entry;
use super::reply::Reply;

/// A call under way. Its result has the type `R`.
#[derive(Debug)]
pub struct Handle<R> {
    outcome: Receiver<Result<Reply, ClientError>>,
    /// When to give up, and the time until then.
    limit: Option<(Instant, Duration)>,
    /// Removes the call from its pipeline when the handle is dropped.
    _entry: Option<Entry>,
    result: PhantomData<fn() -> R>,
}

impl<R> Handle<R> {
    /// Makes the handle of a call whose result arrives once at `outcome`.
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

    /// Adds the entry of a call in a pipeline.
    pub(super) fn with_entry(self, entry: Entry) -> Self {
        Handle {
            _entry: Some(entry),
            ..self
        }
    }

    /// Returns the channel of the result, to wait for several.
    pub(super) fn outcome(&self) -> &Receiver<Result<Reply, ClientError>> {
        &self.outcome
    }

    /// Returns whether the result is there, so that taking it does not wait.
    pub fn is_ready(&self) -> bool {
        !self.outcome.is_empty()
    }

    /// Waits for the answer, and returns it byte for byte.
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
        // The sender is gone without a result, so the call never began.
        received.unwrap_or(Err(ClientError::Ended))
    }
}

impl<R: DeserializeOwned> Handle<R> {
    /// Waits for the result.
    ///
    /// # Errors
    /// Why there is no result, or that it is not an `R`.
    pub fn wait(self) -> Result<R, ClientError> {
        self.wait_raw().and_then(|reply| reply.read())
    }

    /// Returns the result if it is there, else the handle.
    pub(super) fn try_wait(self) -> Result<Result<R, ClientError>, Self> {
        match self.outcome.try_recv() {
            Ok(outcome) => Ok(outcome.and_then(|reply| reply.read())),
            Err(TryRecvError::Empty) => Err(self),
            Err(TryRecvError::Disconnected) => Ok(Err(ClientError::Ended)),
        }
    }

    /// Waits for the result for at most this time. If the timeout of the pipeline ends before, the result is
    /// [`ClientError::TimedOut`].
    ///
    /// # Errors
    /// The handle, if the result is not there by then.
    pub fn wait_for(self, limit: Duration) -> Result<Result<R, ClientError>, Self> {
        let left = self
            .limit
            .map(|(deadline, _)| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left <= limit) {
            return Ok(self.wait());
        }
        match self.outcome.recv_timeout(limit) {
            Ok(outcome) => Ok(outcome.and_then(|reply| reply.read())),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(Err(ClientError::Ended)),
        }
    }
}
