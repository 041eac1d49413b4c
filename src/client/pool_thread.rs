//! One connection of a pool in its own thread: takes a call, makes it, and passes on its result.
//!
//! The connection is opened when it is needed, and again when it was lost. [`Retry`] decides what is
//! repeated. The thread ends when no call can come any more.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::connection::{Client, patience, whole_millis};
use super::error::ClientError;
use super::reply::Reply;
use super::retry::Retry;
use super::stream::Stream;
use crate::sys::lock::lock;

/// The time limit for one step of opening a connection. The steps are short, because `terminate` cannot interrupt one.
const PIECE: Duration = Duration::from_secs(5);
/// The time limit for all steps together if there is no timeout: as long as TCP tries (tcp_syn_retries, tcp(7)).
const LONGEST: Duration = Duration::from_secs(127);

/// What is done with a result.
pub(super) type ClientResult = Box<dyn FnOnce(Result<Reply, ClientError>) + Send>;

/// A call to be made.
pub(super) struct ClientCall {
    pub(super) method: Arc<str>,
    /// As JSON.
    pub(super) params: Box<str>,
    /// Whether it may be sent again although it has begun: an enqueue with an id.
    pub(super) is_repeatable: bool,
    pub(super) done: ClientResult,
}

/// What a pool and its threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) address: String,
    /// The timeout of each call, which the server gets.
    pub(super) timeout: Option<Duration>,
    pub(super) retry: Retry,
    /// Whether the pool was terminated. Then no call is begun.
    pub(super) ended: AtomicBool,
    /// How often calls were repeated.
    pub(super) repeated: AtomicU64,
}

impl Shared {
    /// Opens a connection of the pool.
    pub(super) fn connect(&self) -> Result<Client, ClientError> {
        let patience = patience(self.timeout);
        let (begun, most) = (Instant::now(), patience.unwrap_or(LONGEST));
        loop {
            let left = most.saturating_sub(begun.elapsed());
            match Client::connect(&self.address, Some(left.min(PIECE))) {
                Ok(client) => return Ok(client.with_timeout(patience)),
                Err(ClientError::NoServer { source, .. })
                    // An error with a number comes from the system, which has given up.
                    if source.kind() == ErrorKind::TimedOut
                        && source.raw_os_error().is_none()
                        && begun.elapsed() < most
                        && !self.ended.load(Ordering::SeqCst) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Ends a thread's connection from outside.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionHandle(Arc<Mutex<Option<Stream>>>);

impl ConnectionHandle {
    fn set(&self, stream: Option<Stream>) {
        *lock(&self.0) = stream;
    }

    /// Ends the current connection.
    pub(super) fn end(&self) {
        let stream = lock(&self.0);
        if let Some(stream) = &*stream {
            stream.end();
        }
    }
}

/// One connection of a pool and its thread.
pub(super) struct PoolThread {
    pub(super) shared: Arc<Shared>,
    pub(super) wire: ConnectionHandle,
    /// `None` until this thread needs a connection; the first thread of a pool begins with one. It may be a connection
    /// that was lost.
    pub(super) client: Option<Client>,
    /// Disconnected when the pool is terminated. Nothing is ever sent.
    pub(super) stop: Receiver<()>,
}

impl PoolThread {
    /// Makes calls until there can be no more.
    pub(super) fn run(mut self, calls: &Receiver<ClientCall>) {
        if let Some(client) = &self.client {
            self.wire.set(client.second());
        }
        for call in calls {
            let outcome = self.call(&call);
            // A panic of a callback does not end the thread.
            if catch_unwind(AssertUnwindSafe(|| (call.done)(outcome))).is_err() {
                log::error!("a callback of the client panicked; its result is lost");
            }
        }
        // The second handle would keep the connection open, because the pool may live longer than this
        // thread.
        self.wire.set(None);
    }

    fn call(&mut self, call: &ClientCall) -> Result<Reply, ClientError> {
        let mut failures = 0;
        let (mut first, mut unclear) = (None, None);
        loop {
            if self.shared.ended.load(Ordering::SeqCst) {
                return Err(ClientError::Ended.or_earlier(unclear));
            }
            let error = match self.attempt(&call.method, &call.params) {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            failures += 1;
            let since = first.get_or_insert_with(Instant::now).elapsed();
            let retry = self.shared.retry;
            let delay = match call.is_repeatable {
                true => retry.after_repeatable(&error, failures, since),
                false => retry.after(&error, failures, since),
            };
            let Some(delay) = delay else {
                return Err(error.or_earlier(unclear));
            };
            // The end of the pool cuts the delay short.
            if self.stop.recv_timeout(delay) != Err(RecvTimeoutError::Timeout) {
                let last = match error.is_safe_to_repeat() {
                    true => ClientError::Ended,
                    false => error,
                };
                return Err(last.or_earlier(unclear));
            }
            if !error.is_safe_to_repeat() {
                unclear = Some(error);
            }
            self.shared.repeated.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn attempt(&mut self, method: &str, params: &str) -> Result<Reply, ClientError> {
        let timeout = self.shared.timeout;
        let client = match self.client.take().filter(Client::is_open) {
            Some(client) => self.client.insert(client),
            None => {
                let client = self.shared.connect()?;
                self.wire.set(client.second());
                // `terminate` sets the flag first and then looks for the handle.
                if self.shared.ended.load(Ordering::SeqCst) {
                    return Err(ClientError::Ended);
                }
                self.client.insert(client)
            }
        };
        let timeout_ms = timeout.map(whole_millis);
        let outcome = client.call_raw(method, params, None, timeout_ms);
        if !client.is_open() {
            // The second handle would keep the connection, and with it the abandoned call.
            self.wire.set(None);
        }
        outcome
    }
}
