//! What a program gives its server: methods as functions, and what is made around them.
//!
//! Nothing fails here; a name that is given twice or can't be one is told when the server is run.

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
    /// Adds a method that runs on a handler thread. Params and result go through serde; a panic
    /// is answered with `internal`, and the worker lives.
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
        self.add(
            name.into(),
            Arc::new(function::typed(Placement::Thread, move |_, params| {
                function(params)
            })),
        )
    }

    /// As [`Server::method`], for a function that asks about its call: how long it has, whether
    /// anybody still waits, who calls, what the worker keeps.
    ///
    /// ```no_run
    /// use preforkd::{Context, RpcError};
    ///
    /// let server = preforkd::Server::new().method_with("count", |call: &Context<'_>, to: u64| {
    ///     let mut sum = 0_u64;
    ///     for number in 1..=to {
    ///         sum = sum.wrapping_add(number);
    ///         // Looked at now and then: nothing ends a function from outside.
    ///         if number % 100_000 == 0 && call.is_cancelled() {
    ///             return Err(RpcError::new(1, "nobody waits any more"));
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

    /// Adds a method that runs on the event loop: for what takes microseconds and never waits,
    /// because every other call of the worker waits for it.
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
        self.add(
            name.into(),
            Arc::new(function::typed(Placement::Inline, move |_, params| {
                function(params)
            })),
        )
    }

    /// As [`Server::inline`], for a function that asks about its call.
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

    /// Adds a method that takes its params as the JSON text that the caller wrote (`null` where
    /// there were none) and answers JSON: no digit is lost on the way, and nothing is copied that
    /// need not be. It runs on a handler thread.
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

    /// Adds a method that is answered by any [`Handler`], which says itself where it runs.
    #[must_use]
    pub fn handler(self, name: impl Into<String>, handler: impl Handler + 'static) -> Self {
        self.add(name.into(), Arc::new(handler))
    }

    /// Adds methods under a common name, which stands before theirs with a dot.
    ///
    /// ```
    /// let server = preforkd::Server::new().namespace("math", |math| {
    ///     math.method("add", |(a, b): (i64, i64)| Ok(a + b))
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

    /// Makes something once, in the master, before the workers are forked: they share its memory
    /// until one of them writes to it. It is there for the master's life, through every reload;
    /// handlers find it by its type, with [`Context::state`]. It is not made for the commands
    /// (`check`, `status`, …), as what stands in `main` would be.
    ///
    /// A fork copies one thread and no other: whatever starts a thread (a client with a background
    /// thread, a pool of connections) belongs into [`Server::on_worker_start`], and so does what
    /// may not be shared by several processes (a connection, an open transaction, a random seed).
    /// A thread that is left running here is an error of the start. A thread that was joined may take up
    /// to a second to end. A file that is opened here stays open in all workers, as [`Server::run`] says.
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

    /// Makes something once in each worker, after the fork and before it is ready: a database
    /// handle, a cache of its own. Handlers find it by its type, with [`Context::state`], and
    /// share it, so what they change is behind a lock.
    ///
    /// A worker for which this fails, or takes longer than `workers.boot-timeout`, does not become
    /// ready: a start fails with the reason, and a reload is taken back. It runs as the
    /// configured user, and may start threads and programs.
    ///
    /// A panic of a handler that holds a [`std::sync::Mutex`] poisons it for all later calls. Where
    /// what it guards can't be left half changed, take it all the same, with
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

    /// Is called in each worker that leaves in order (a stop, a reload, a retirement), after the
    /// last call was answered; the functions given last are called first. It has the rest of
    /// `workers.drain-timeout`: then the worker leaves without it. A handler whose call has timed
    /// out may still run meanwhile. It is not called when a worker is stopped at once, or dies.
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
