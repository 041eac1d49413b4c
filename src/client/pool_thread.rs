//! One connection of a pool, in a thread of its own: takes a job, makes the call, tells its outcome.
//!
//! The connection is made when it is needed and again when it was lost; what is repeated is
//! [`Retry`]'s decision. A lane ends when no job can come any more.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::connection::Client;
use super::error::ClientError;
use super::reply::Reply;
use super::retry::Retry;
use super::stream::Stream;

/// How much longer than the server this side waits: it is the server that answers `timeout`, and
/// its answer needs time to arrive.
const GRACE: Duration = Duration::from_secs(5);

/// A server that does not answer is waited for in pieces of this, for whoever terminates the pool has no
/// other way to end that; and without a limit for so long in all as TCP tries (tcp_syn_retries, tcp(7)).
const PIECE: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(127);

/// What is done with an outcome.
pub(super) type ClientResult = Box<dyn FnOnce(Result<Reply, ClientError>) + Send>;

/// A call to be made.
pub(super) struct ClientCall {
    pub(super) method: Arc<str>,
    /// JSON.
    pub(super) params: Box<str>,
    pub(super) done: ClientResult,
}

/// What a pool and its lanes share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) address: String,
    /// How long a call may take, as the server is told.
    pub(super) timeout: Option<Duration>,
    pub(super) retry: Retry,
    /// The pool was terminated: nothing is begun any more.
    pub(super) ended: AtomicBool,
    /// How often a call was made again.
    pub(super) repeated: AtomicU64,
}

impl Shared {
    /// A connection of the pool.
    pub(super) fn connect(&self) -> Result<Client, ClientError> {
        let patience = self.timeout.map(|limit| limit.saturating_add(GRACE));
        let (begun, most) = (Instant::now(), patience.unwrap_or(LONGEST));
        loop {
            let left = most.saturating_sub(begun.elapsed());
            match Client::connect(&self.address, Some(left.min(PIECE))) {
                Ok(client) => return Ok(client.with_timeout(patience)),
                Err(ClientError::NoServer { source, .. })
                    // one with a number is the system's, which has given up
                    if source.kind() == ErrorKind::TimedOut
                        && source.raw_os_error().is_none()
                        && begun.elapsed() < most
                        && !self.ended.load(Ordering::SeqCst) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The way to end a lane's connection from outside.
#[derive(Debug, Clone, Default)]
pub(super) struct ConnectionHandle(Arc<Mutex<Option<Stream>>>);

impl ConnectionHandle {
    fn set(&self, stream: Option<Stream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }

    /// Ends the connection that there is.
    pub(super) fn end(&self) {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*stream {
            stream.end();
        }
    }
}

/// See the module.
pub(super) struct PoolThread {
    pub(super) shared: Arc<Shared>,
    pub(super) wire: ConnectionHandle,
    /// `None` until the first call, and after the connection was lost.
    pub(super) client: Option<Client>,
    /// Disconnected when the pool is terminated; nothing is ever sent.
    pub(super) stop: Receiver<()>,
}

impl PoolThread {
    /// Takes jobs until there can't be any more.
    pub(super) fn run(mut self, jobs: &Receiver<ClientCall>) {
        if let Some(client) = &self.client {
            self.wire.set(client.second());
        }
        for job in jobs {
            let outcome = self.call(&job.method, &job.params);
            // A callback's panic is its own affair: the lane serves the other jobs.
            if catch_unwind(AssertUnwindSafe(|| (job.done)(outcome))).is_err() {
                log::error!("a callback of the client panicked; its result is lost");
            }
        }
        // The second handle keeps the connection open, and the pool may outlive the lane.
        self.wire.set(None);
    }

    fn call(&mut self, method: &str, params: &str) -> Result<Reply, ClientError> {
        let mut failures = 0;
        let mut first = None;
        loop {
            if self.shared.ended.load(Ordering::SeqCst) {
                return Err(ClientError::Ended);
            }
            let error = match self.attempt(method, params) {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            failures += 1;
            let since = first.get_or_insert_with(Instant::now).elapsed();
            let Some(delay) = self.shared.retry.after(&error, failures, since) else {
                return Err(error);
            };
            // Waits for the pool's end, which cuts the delay short.
            if self.stop.recv_timeout(delay) != Err(RecvTimeoutError::Timeout) {
                return Err(error);
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
                // Who terminates sets the mark first and then looks for the wire.
                if self.shared.ended.load(Ordering::SeqCst) {
                    return Err(ClientError::Ended);
                }
                self.client.insert(client)
            }
        };
        let timeout_ms = timeout.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        let outcome = client.call_raw(method, params, None, timeout_ms);
        if !client.is_open() {
            // The other handle would keep the connection, and the call that was given up with it.
            self.wire.set(None);
        }
        outcome
    }
}

impl Client {
    /// The same with another limit for answers.
    fn with_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// A second handle of the connection.
    pub(super) fn second(&self) -> Option<Stream> {
        self.stream.as_ref()?.try_clone().ok()
    }
}
