//! A pool of connections to one server, in the style of Python's `multiprocessing.Pool`.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::ClientError;
use super::handle::Handle;
use super::pool_thread::{ClientCall, ConnectionHandle, PoolThread, Shared};
use super::reply::Reply;
use super::retry::Retry;
use crate::sys::lock::lock;

/// The options of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The number of connections, which is the number of calls at once; at least 1.
    pub connections: usize,
    /// The timeout of each call. The server gets it and answers `timeout`. `None` means the server's own.
    pub timeout: Option<Duration>,
    /// How long a call is repeated that certainly did not begin, because the server restarts or is
    /// overloaded. Zero means never.
    pub patience: Duration,
}

impl Default for Options {
    /// Eight connections, the server's own timeout, 30 s of patience.
    fn default() -> Self {
        Options {
            connections: 8,
            timeout: None,
            patience: Duration::from_secs(30),
        }
    }
}

/// Connections to one server, each in a thread of its own with one call at a time.
///
/// Compared with Python's `multiprocessing.Pool`:
///
/// | there | here |
/// | --- | --- |
/// | `Pool(4)` | [`Pool::new`]`(address, Options { connections: 4, .. })` |
/// | `apply(f, x)` | [`Pool::apply`]`("f", x)` |
/// | `apply_async(f, x)`, then `get()` | [`Pool::submit`], then [`Handle::wait`] |
/// | `apply_async(f, x, callback=g)` | [`Pool::apply_async`]`("f", x, g)` |
/// | `map`, `imap`, `imap_unordered` | [`Pool::map`], [`Pool::imap`], [`Pool::imap_unordered`] |
/// | `close()`, `join()`, `terminate()` | [`Pool::close`], [`Pool::join`], [`Pool::terminate`]; dropping it terminates, as leaving `with` does there |
///
/// A lost connection is opened again. A call is repeated only if it certainly did not begin (`started` is
/// false, or the connection failed before all of it was sent) and another try may succeed. The caller
/// decides about other failures. The server cancels calls that run when the process ends, so join the pool
/// first.
///
/// ```no_run
/// use preforkd::client::{Options, Pool};
///
/// # fn main() -> Result<(), preforkd::client::ClientError> {
/// let pool = Pool::new("127.0.0.1:8080", Options::default())?;
/// let squares: Vec<i64> = pool.map("square", 0..1000)?;
/// # Ok(())
/// # }
/// ```
pub struct Pool {
    shared: Arc<Shared>,
    /// `None` after the pool was closed.
    jobs: Mutex<Option<Sender<ClientCall>>>,
    /// Dropped to wake threads that wait before they repeat a call.
    stop: Mutex<Option<Sender<()>>>,
    wires: Vec<ConnectionHandle>,
    pub(super) lanes: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Connects. Only the first connection is opened here, to check that there is a server. The others are
    /// opened when they have calls.
    ///
    /// # Errors
    /// [`ClientError::Address`], [`ClientError::NoServer`], [`ClientError::NoThread`].
    pub fn new(address: &str, options: Options) -> Result<Self, ClientError> {
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            timeout: options.timeout,
            retry: Retry {
                patience: options.patience,
            },
            ended: AtomicBool::new(false),
            repeated: AtomicU64::new(0),
        });
        let mut first = Some(shared.connect()?);
        let (jobs, taken) = unbounded::<ClientCall>();
        let (stop, stopped) = bounded(0);
        let mut pool = Pool {
            shared: Arc::clone(&shared),
            jobs: Mutex::new(Some(jobs)),
            stop: Mutex::new(Some(stop)),
            wires: Vec::new(),
            lanes: Vec::new(),
        };
        for number in 0..options.connections.max(1) {
            let wire = ConnectionHandle::default();
            let lane = PoolThread {
                shared: Arc::clone(&shared),
                wire: wire.clone(),
                client: first.take(),
                stop: stopped.clone(),
            };
            let taken = taken.clone();
            let thread = thread::Builder::new()
                .name(format!("lane {number}"))
                .spawn(move || lane.run(&taken))
                .map_err(ClientError::NoThread)?;
            pool.wires.push(wire);
            pool.lanes.push(thread);
        }
        Ok(pool)
    }

    /// Calls a method and waits for its result.
    ///
    /// # Errors
    /// Why there is no result.
    pub fn apply<R: DeserializeOwned>(
        &self,
        method: &str,
        params: impl Serialize,
    ) -> Result<R, ClientError> {
        self.submit(method, params)?.wait()
    }

    /// Calls a method without waiting. The handle gets the result.
    ///
    /// # Errors
    /// [`ClientError::Params`], and [`ClientError::Ended`] after [`Pool::close`].
    pub fn submit<R>(
        &self,
        method: &str,
        params: impl Serialize,
    ) -> Result<Handle<R>, ClientError> {
        let (sender, outcome) = bounded(1);
        let params = serde_json::to_string(&params).map_err(ClientError::Params)?;
        self.start(method.into(), params.into(), move |result| {
            // The receiver is gone if the handle was dropped.
            let _ = sender.send(result);
        })?;
        Ok(Handle::new(outcome, None))
    }

    /// Calls a method without waiting. `callback` gets the result in a thread of the pool, which makes no
    /// other call meanwhile. If it panics, that is logged and the pool continues.
    ///
    /// # Errors
    /// As for [`Pool::submit`]. Then the callback is not called.
    pub fn apply_async<R: DeserializeOwned>(
        &self,
        method: &str,
        params: impl Serialize,
        callback: impl FnOnce(Result<R, ClientError>) + Send + 'static,
    ) -> Result<(), ClientError> {
        let params = serde_json::to_string(&params).map_err(ClientError::Params)?;
        self.start(method.into(), params.into(), move |result| {
            callback(result.and_then(|reply| reply.read()));
        })
    }

    /// Calls a method with params that are JSON already. `callback` gets the answer byte for byte.
    ///
    /// # Errors
    /// As for [`Pool::submit`].
    pub fn apply_async_raw(
        &self,
        method: &Arc<str>,
        params_json: &str,
        callback: impl FnOnce(Result<Reply, ClientError>) + Send + 'static,
    ) -> Result<(), ClientError> {
        serde_json::from_str::<&RawValue>(params_json).map_err(ClientError::Params)?;
        self.start(Arc::clone(method), params_json.into(), callback)
    }

    /// Returns how often calls were repeated so far.
    pub fn repeated(&self) -> u64 {
        self.shared.repeated.load(Ordering::Relaxed)
    }

    /// Accepts no further calls. Those that were accepted are made.
    pub fn close(&self) {
        lock(&self.jobs).take();
    }

    /// Closes the pool, and waits until every call is answered and every callback has returned.
    pub fn join(mut self) {
        self.close();
        self.wait();
    }

    /// Ends the pool now. Calls that have not begun get [`ClientError::Ended`]. Running calls lose their
    /// connection and get [`ClientError::Gone`]. Returns when the last callback has returned.
    pub fn terminate(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.close();
        self.shared.ended.store(true, Ordering::SeqCst);
        lock(&self.stop).take();
        for wire in &self.wires {
            wire.end();
        }
        self.wait();
    }

    fn wait(&mut self) {
        for lane in self.lanes.drain(..) {
            // A callback that terminates the pool runs in one of its threads, which cannot join itself.
            if lane.thread().id() != thread::current().id() {
                let _ = lane.join();
            }
        }
    }

    /// Queues a call whose params are JSON.
    pub(super) fn start(
        &self,
        method: Arc<str>,
        params: Box<str>,
        done: impl FnOnce(Result<Reply, ClientError>) + Send + 'static,
    ) -> Result<(), ClientError> {
        let done = Box::new(done);
        let job = ClientCall {
            method,
            params,
            done,
        };
        match &*lock(&self.jobs) {
            Some(jobs) => jobs.send(job).map_err(|_| ClientError::Ended),
            None => Err(ClientError::Ended),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("shared", &self.shared)
            .field("connections", &self.lanes.len())
            .finish_non_exhaustive()
    }
}
