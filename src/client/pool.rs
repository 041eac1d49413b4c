//! A pool of connections to one server, in the style of Python's `multiprocessing.Pool`.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};

use super::error::ClientError;
use super::handle::Handle;
use super::job_waits::{JobWait, JobWaiter};
use super::jobs::{EnqueueOptions, EnqueueParams, JobHandle, new_job_id, result_of};
use super::pool_thread::{ClientCall, ConnectionHandle, PoolThread, Shared};
use super::reply::Reply;
use super::retry::Retry;
use crate::protocol::call::JOB_ENQUEUE;
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
/// | the same, but the call survives a crash | [`Pool::enqueue_async`]`("f", x, g)` |
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
    calls: Mutex<Option<Sender<ClientCall>>>,
    /// Dropped to wake threads that wait before they repeat a call.
    stop: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
    /// The thread that waits for jobs; `None` before the first job.
    job_waits: Mutex<Option<(Sender<JobWait>, JoinHandle<()>)>>,
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
        let (calls, taken) = unbounded::<ClientCall>();
        let (stop, stopped) = bounded(0);
        let mut pool = Pool {
            shared: Arc::clone(&shared),
            calls: Mutex::new(Some(calls)),
            stop: Mutex::new(Some(stop)),
            stopped: stopped.clone(),
            job_waits: Mutex::new(None),
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

    /// Stores a call as a durable job without waiting. `callback` gets its result in a thread of the pool when
    /// the job has ended. The enqueue is repeated until it is answered, because the server stores a job with the
    /// same id once. The job survives this process; only the callback does not.
    ///
    /// # Errors
    /// As for [`Pool::submit`], and [`ClientError::NoThread`]. Then the callback is not called. The callback gets
    /// [`ClientError::Job`] for a job that is dead or cancelled.
    pub fn enqueue_async<R: DeserializeOwned>(
        &self,
        method: &str,
        params: impl Serialize,
        callback: impl FnOnce(Result<R, ClientError>) + Send + 'static,
    ) -> Result<(), ClientError> {
        let params = to_raw_value(&params).map_err(ClientError::Params)?;
        let (id, options) = (new_job_id()?, EnqueueOptions::default());
        let params = EnqueueParams::new((method, &params), &id, &options);
        let params = serde_json::to_string(&params).map_err(ClientError::Params)?;
        let waits = self.job_waits()?;
        let stored = move |result: Result<Reply, ClientError>| {
            let job = match result.and_then(|reply| reply.read::<JobHandle>()) {
                Ok(job) => job,
                Err(error) => return callback(Err(error)),
            };
            let wait = JobWait {
                job: job.id().to_owned(),
                done: Box::new(|ended| callback(ended.and_then(result_of))),
            };
            // The thread has left only if the pool was terminated.
            if let Err(unsent) = waits.send(wait) {
                (unsent.0.done)(Err(ClientError::Ended));
            }
        };
        self.start_call(ClientCall {
            method: JOB_ENQUEUE.into(),
            params: params.into(),
            is_repeatable: true,
            done: Box::new(stored),
        })
    }

    /// Returns the way to the thread that waits for jobs, which is started if there is none.
    fn job_waits(&self) -> Result<Sender<JobWait>, ClientError> {
        let mut waits = lock(&self.job_waits);
        if let Some((sender, _)) = &*waits {
            return Ok(sender.clone());
        }
        let (sender, jobs) = unbounded();
        let waiter = JobWaiter::new(Arc::clone(&self.shared), self.stopped.clone());
        let thread = thread::Builder::new()
            .name("job waits".into())
            .spawn(move || waiter.run(&jobs))
            .map_err(ClientError::NoThread)?;
        *waits = Some((sender.clone(), thread));
        Ok(sender)
    }

    /// Returns how often calls were repeated so far.
    pub fn repeated(&self) -> u64 {
        self.shared.repeated.load(Ordering::Relaxed)
    }

    /// Accepts no further calls. Calls that were accepted before are still made.
    pub fn close(&self) {
        lock(&self.calls).take();
    }

    /// Closes the pool, and waits until every call is answered and every callback has returned.
    pub fn join(mut self) {
        self.close();
        self.wait();
    }

    /// Ends the pool now. Calls that have not begun get [`ClientError::Ended`]. Running calls lose their
    /// connection and get [`ClientError::Gone`]. Stored jobs continue in the server, but their callbacks get
    /// [`ClientError::Ended`]. Returns when the last callback has returned.
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
        // A callback that terminates the pool runs in one of its threads, which cannot join itself.
        let join = |lane: JoinHandle<()>| {
            if lane.thread().id() != thread::current().id() {
                let _ = lane.join();
            }
        };
        self.lanes.drain(..).for_each(join);
        // The enqueues are answered, so the thread has all jobs. It leaves when they have ended.
        if let Some((sender, waits)) = lock(&self.job_waits).take() {
            drop(sender);
            join(waits);
        }
    }

    /// Queues a call whose params are JSON.
    pub(super) fn start(
        &self,
        method: Arc<str>,
        params: Box<str>,
        done: impl FnOnce(Result<Reply, ClientError>) + Send + 'static,
    ) -> Result<(), ClientError> {
        self.start_call(ClientCall {
            method,
            params,
            is_repeatable: false,
            done: Box::new(done),
        })
    }

    fn start_call(&self, call: ClientCall) -> Result<(), ClientError> {
        match &*lock(&self.calls) {
            Some(calls) => calls.send(call).map_err(|_| ClientError::Ended),
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
