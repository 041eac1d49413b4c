//! Registers a program's methods and hooks.
//!
//! Nothing fails here. An invalid or repeated name is an error when the server runs.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::Server;
use crate::handler::handler_state::{StartError, Worker};
use crate::handler::{Context, Handler, Placement, function};
use crate::protocol::RpcError;

type Result<T> = std::result::Result<T, RpcError>;

impl Server {
    /// Adds a method that runs on a handler thread. Params and result go through serde. A panic is answered
    /// with `internal`, and the worker continues.
    #[must_use]
    pub fn method<P, R>(
        self,
        name: impl Into<String>,
        function: impl Fn(P) -> Result<R> + Send + Sync + 'static,
    ) -> Self
    where
        P: DeserializeOwned + 'static,
        R: Serialize + 'static,
    {
        self.method_with(name, move |_, params| function(params))
    }

    /// Adds a method like [`Server::method`], for a function that needs its [`Context`]: the time that is
    /// left, whether the caller still waits, who the caller is, the state of the worker.
    ///
    /// ```no_run
    /// use preforkd::{Context, RpcError};
    ///
    /// let server = preforkd::Server::new().method_with("count", |call: &Context<'_>, to: u64| {
    ///     let mut sum = 0_u64;
    ///     for number in 1..=to {
    ///         sum = sum.wrapping_add(number);
    ///         // Checked regularly, because nothing ends a function from outside.
    ///         if number % 100_000 == 0 && call.is_cancelled() {
    ///             return Err(RpcError::new(1, "no caller waits any more"));
    ///         }
    ///     }
    ///     Ok(sum)
    /// });
    /// # server.run();
    /// ```
    #[must_use]
    pub fn method_with<P, R>(
        self,
        name: impl Into<String>,
        function: impl Fn(&Context<'_>, P) -> Result<R> + Send + Sync + 'static,
    ) -> Self
    where
        P: DeserializeOwned + 'static,
        R: Serialize + 'static,
    {
        let handler = function::typed(Placement::Thread, function);
        self.add(name.into(), Arc::new(handler))
    }

    /// Adds a method that runs on the event loop. It must take microseconds and never wait, because every
    /// other call of the worker waits for it.
    #[must_use]
    pub fn inline<P, R>(
        self,
        name: impl Into<String>,
        function: impl Fn(P) -> Result<R> + Send + Sync + 'static,
    ) -> Self
    where
        P: DeserializeOwned + 'static,
        R: Serialize + 'static,
    {
        self.inline_with(name, move |_, params| function(params))
    }

    /// Adds a method like [`Server::inline`], for a function that needs its [`Context`].
    #[must_use]
    pub fn inline_with<P, R>(
        self,
        name: impl Into<String>,
        function: impl Fn(&Context<'_>, P) -> Result<R> + Send + Sync + 'static,
    ) -> Self
    where
        P: DeserializeOwned + 'static,
        R: Serialize + 'static,
    {
        let handler = function::typed(Placement::Inline, function);
        self.add(name.into(), Arc::new(handler))
    }

    /// Adds a method that gets its params as the JSON text that the caller has written (`null` if there are
    /// none), and returns JSON. So no digit of a number is lost, and nothing is copied without need. It
    /// runs on a handler thread.
    ///
    /// ```no_run
    /// use preforkd::{RawValue, RpcError};
    ///
    /// let server = preforkd::Server::new().raw("twice", |_, params| {
    ///     RawValue::from_string(format!("[{params}, {params}]"))
    ///         .map_err(|error| RpcError::new(1, error.to_string()))
    /// });
    /// # server.run();
    /// ```
    #[must_use]
    pub fn raw(
        self,
        name: impl Into<String>,
        function: impl Fn(&Context<'_>, &str) -> Result<Box<RawValue>> + Send + Sync + 'static,
    ) -> Self {
        self.add(name.into(), Arc::new(function::raw(function)))
    }

    /// Adds a method with any [`Handler`], which decides itself where it runs.
    #[must_use]
    pub fn handler(self, name: impl Into<String>, handler: impl Handler + 'static) -> Self {
        self.add(name.into(), Arc::new(handler))
    }

    /// Adds methods with a common prefix. A dot separates the prefix from each name.
    ///
    /// ```
    /// let server = preforkd::Server::new().namespace("math", |math| {
    ///     math.method("add", |(a, b): (f64, f64)| Ok(a + b))
    ///         .namespace("constant", |constant| constant.inline("pi", |()| Ok(3.14)))
    /// });
    /// assert!(server.functions().contains("math.add"));
    /// assert!(server.functions().contains("math.constant.pi"));
    /// ```
    #[must_use]
    pub fn namespace(mut self, name: &str, add: impl FnOnce(Self) -> Self) -> Self {
        let outer = self.prefix.clone();
        self.prefix = format!("{outer}{name}.");
        let mut server = add(self);
        server.prefix = outer;
        server
    }

    /// Creates a value once, in the master, before the workers are forked. The workers share its memory
    /// until one of them writes to it. The value exists as long as the master, through all reloads.
    /// Handlers get it by its type, with [`Context::state`]. Other commands (`check`, `status`, …) do not
    /// create it, but they would run code in `main`.
    ///
    /// A fork copies only one thread. So create everything that starts a thread (a client with a background thread, a
    /// connection pool) in [`Server::on_worker_start`]. Create there also everything that several processes must not
    /// share (a connection, an open transaction, a random seed). A thread that still runs after this hook is an error
    /// of the start; a joined thread may take up to a second to end. A file that is opened here stays open in all
    /// workers, as [`Server::run`] says.
    ///
    /// ```no_run
    /// struct Words(Vec<String>);
    ///
    /// let server = preforkd::Server::new()
    ///     .on_master_start(|| {
    ///         let text = std::fs::read_to_string("/usr/share/dict/words")?;
    ///         Ok(Words(text.lines().map(str::to_owned).collect()))
    ///     })
    ///     .method_with("word", |call, number: usize| {
    ///         Ok(call.state::<Words>().0.get(number).cloned())
    ///     });
    /// # server.run();
    /// ```
    #[must_use]
    pub fn on_master_start<T: Send + Sync + 'static>(
        mut self,
        make: impl Fn() -> std::result::Result<T, StartError> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.on_master_start(make);
        self
    }

    /// Creates a value once in each worker, after the fork and before the worker is ready: a database
    /// handle, a cache. Handlers get it by its type, with [`Context::state`]. They share it, so changes
    /// need a lock.
    ///
    /// If this fails, or takes longer than `workers.boot-timeout`, the worker does not become ready: a
    /// start fails with the reason, and a reload is undone. The function runs as the configured user and
    /// may start threads and programs.
    ///
    /// A panic of a handler that holds a [`std::sync::Mutex`] poisons it for all later calls. If a
    /// half-made change does no harm, take the value all the same, with
    /// [`into_inner`](std::sync::PoisonError::into_inner):
    ///
    /// ```no_run
    /// use std::sync::{Mutex, PoisonError};
    ///
    /// struct Hits(Mutex<u64>);
    ///
    /// let server = preforkd::Server::new()
    ///     .on_worker_start(|_| Ok(Hits(Mutex::new(0))))
    ///     .method_with("hit", |call, ()| {
    ///         let mut hits = call.state::<Hits>().0.lock().unwrap_or_else(PoisonError::into_inner);
    ///         *hits += 1;
    ///         Ok(*hits)
    ///     })
    ///     .on_worker_stop(|worker| {
    ///         let hits = worker.state::<Hits>().0.lock().unwrap_or_else(PoisonError::into_inner);
    ///         log::info!("{} hits", *hits);
    ///     });
    /// # server.run();
    /// ```
    #[must_use]
    pub fn on_worker_start<T: Send + Sync + 'static>(
        mut self,
        make: impl Fn(&Worker) -> std::result::Result<T, StartError> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.on_worker_start(make);
        self
    }

    /// Adds a function that is called in each worker that exits in order (a stop, a reload, a retirement),
    /// after the last call was answered. Functions that were added last are called first. They have the
    /// rest of `workers.drain-timeout`; after that the worker exits without them. A handler whose call has
    /// timed out may still run meanwhile. They are not called if a worker is stopped at once or dies.
    #[must_use]
    pub fn on_worker_stop(mut self, end: impl Fn(&Worker) + Send + Sync + 'static) -> Self {
        self.hooks.on_worker_stop(end);
        self
    }

    fn add(mut self, name: String, handler: Arc<dyn Handler>) -> Self {
        let name = format!("{}{name}", self.prefix);
        if self.methods.insert(name.clone(), handler).is_some() {
            self.twice.get_or_insert(name);
        }
        self
    }
}
