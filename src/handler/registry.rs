//! Holds the table of methods. The master makes it before the fork and the workers read it. It also holds
//! the program's state for its handlers.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustc_hash::FxHashMap;
use serde_json::{Value, json};

use super::Handler;
use super::handler_state::{HandlerState, Hooks, Worker};
use super::job_methods::{self, JobMethod};
use super::pool::definition::Pool;
use crate::protocol::call::{CANCEL, DISCOVER};

/// The methods of the protocol itself, each with a description.
const OWN: [(&str, &str); 2] = [
    (
        CANCEL,
        "Cancels the call of this connection with the id in params, {\"id\": ID}",
    ),
    (DISCOVER, "Answers this document"),
];

/// A method: its handler and its limits.
#[derive(Clone)]
pub struct Method {
    pub name: String,
    pub handler: Arc<dyn Handler>,
    /// The time limit of a call, including its time in the queue.
    pub timeout: Duration,
    /// The largest number of concurrent calls per worker, including waiting ones; 0 means no limit of its own.
    pub concurrency: usize,
    /// The largest number of calls per second and worker; 0 means no limit.
    pub rate: u32,
    /// Whether the program of a pool is killed as soon as its call is abandoned.
    pub kills_abandoned: bool,
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Method")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// All methods of a generation. Names match only as a whole and exactly.
#[derive(Debug, Default)]
pub struct Registry {
    methods: Vec<Method>,
    /// Clients choose the names that are looked up, but not those in the table, so a fast hash does.
    by_name: FxHashMap<String, usize>,
    /// The answer of [`DISCOVER`], built once: the event loop must not build it for each call.
    document: String,
    /// The answer of [`DISCOVER`] on shared listeners; empty if it has the same methods as `document`.
    shared_document: String,
    hooks: Arc<Hooks>,
    /// The state that the master has made for all workers.
    kept: HandlerState,
    /// Set in a worker when its own state is made.
    worker: OnceLock<Worker>,
    /// By the number that the handlers of their methods have.
    pools: Vec<Arc<Pool>>,
    /// How many of them have a pool process. The others belong to connections.
    pool_processes: usize,
    /// The number of the first method of jobs, and their lane; `None` without jobs.
    jobs: Option<(usize, usize)>,
}

impl Registry {
    /// Creates a table of these methods. If two have the same name, the later one counts.
    pub fn new(methods: Vec<Method>) -> Self {
        let by_name: FxHashMap<String, usize> = methods
            .iter()
            .enumerate()
            .map(|(number, method)| (method.name.clone(), number))
            .collect();
        Registry {
            document: describe(by_name.keys()),
            methods,
            by_name,
            ..Registry::default()
        }
    }

    /// Adds the functions of the program and the state of the master.
    #[must_use]
    pub fn with(self, hooks: Arc<Hooks>, kept: HandlerState) -> Self {
        Registry {
            hooks,
            kept,
            ..self
        }
    }

    /// Adds the pools; the handlers of methods refer to them by number. The first `pool_processes` have a pool
    /// process, and the others belong to connections.
    #[must_use]
    pub fn with_pools(mut self, pools: Vec<Arc<Pool>>, pool_processes: usize) -> Self {
        (self.pools, self.pool_processes) = (pools, pool_processes);
        self.build_documents();
        self
    }

    /// Adds the methods of durable jobs. Call it after `with_pools`. `timeout` is `limits.timeout`.
    #[must_use]
    pub fn with_jobs(mut self, timeout: Duration) -> Self {
        let (first, pools) = (self.methods.len(), self.pools.len());
        self.jobs = Some((first, pools + 1));
        let handler = job_methods::handler(pools);
        for method in JobMethod::ALL {
            let name = method.name().to_owned();
            self.by_name.insert(name.clone(), self.methods.len());
            self.methods.push(Method {
                name,
                handler: Arc::clone(&handler),
                timeout,
                concurrency: 0,
                rate: 0,
                kills_abandoned: false,
            });
        }
        self.build_documents();
        self
    }

    /// Builds the answers of [`DISCOVER`].
    fn build_documents(&mut self) {
        self.document = describe(self.by_name.keys());
        if self.pools.len() > self.pool_processes {
            let all = self.by_name.iter();
            let shared = all.filter(|(_, number)| !self.is_of_connections(**number));
            self.shared_document = describe(shared.map(|(name, _)| name));
        }
    }

    /// Returns the lane of the jobs process; `None` without jobs. It is behind those of all pools.
    pub fn jobs_lane(&self) -> Option<usize> {
        self.jobs.map(|(_, lane)| lane)
    }

    /// Returns the method of durable jobs that has this number.
    pub fn job_method(&self, number: usize) -> Option<JobMethod> {
        let (first, _) = self.jobs?;
        JobMethod::ALL.get(number.checked_sub(first)?).copied()
    }

    /// Returns how many of the `size` bytes of a call count in its lane: none if the call only names a job. A wait is
    /// open for a long time, and would take the room of enqueues.
    pub fn counted_size(&self, method: usize, size: usize) -> usize {
        match self.job_method(method) {
            None | Some(JobMethod::Enqueue) => size,
            Some(_) => 0,
        }
    }

    /// Returns the lanes whose calls other processes may run: those of handler threads and pool processes, and that of
    /// the jobs process.
    pub fn shared_lanes(&self) -> impl Iterator<Item = usize> + use<> {
        (0..=self.pool_processes).chain(self.jobs_lane())
    }

    /// Whether a method exists only on isolated listeners.
    pub fn is_of_connections(&self, method: usize) -> bool {
        let method = self.methods.get(method);
        let lane = method.map_or(0, |method| method.handler.placement().lane());
        lane > self.pool_processes && Some(lane) != self.jobs_lane()
    }

    /// Returns a copy with further methods, for a pool process. In it, no method can be found by its name.
    pub fn with_more(&self, methods: Vec<Method>) -> Self {
        Registry {
            methods: self.methods.iter().cloned().chain(methods).collect(),
            pools: self.pools.clone(),
            pool_processes: self.pool_processes,
            jobs: self.jobs,
            ..Registry::default()
        }
    }

    /// Returns the pools that have a pool process.
    pub fn pools(&self) -> &[Arc<Pool>] {
        &self.pools[..self.pool_processes]
    }

    /// All pools: those of connections come last.
    pub fn all_pools(&self) -> &[Arc<Pool>] {
        &self.pools
    }

    /// Returns the descriptors that the program has opened before the fork. Its handlers may use them.
    pub fn program_descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.kept.descriptors()
    }

    /// Makes the program's state for this worker: once per worker, before any call.
    ///
    /// # Errors
    /// Why it could not be made.
    pub fn start_worker(&self, slot: u16) -> Result<(), String> {
        let worker = self.hooks.start_worker(slot, &self.kept)?;
        self.worker
            .set(worker)
            .map_err(|_| "it has started already".to_owned())
    }

    /// Returns this worker, after its start.
    pub fn worker(&self) -> Option<&Worker> {
        self.worker.get()
    }

    /// Returns whether the program has functions for the end of a worker.
    pub fn has_stop_hooks(&self) -> bool {
        self.hooks.has_stop_hooks()
    }

    /// Calls them.
    pub fn stop_worker(&self) {
        if let Some(worker) = self.worker() {
            self.hooks.stop_worker(worker);
        }
    }

    /// Returns the number of the method with this name. Methods whose pool has `scope = "connection"` are found only
    /// if `has_all`.
    pub fn find(&self, name: &str, has_all: bool) -> Option<usize> {
        let found = self.by_name.get(name).copied();
        found.filter(|method| has_all || !self.is_of_connections(*method))
    }

    pub fn methods(&self) -> &[Method] {
        &self.methods
    }

    /// Returns the methods as an OpenRPC document (spec.open-rpc.org) in JSON. Methods whose pool has `scope =
    /// "connection"` are in it only if `has_all`.
    pub fn document(&self, has_all: bool) -> &str {
        match has_all || self.shared_document.is_empty() {
            true => &self.document,
            false => &self.shared_document,
        }
    }

    /// Returns the `out` of a method's answers, by its number.
    pub fn answer_name(&self, number: usize) -> &str {
        let own = self.methods.get(number);
        let own = own.and_then(|method| method.handler.answer_name());
        own.unwrap_or_else(|| self.name(number))
    }

    /// Returns the name of a method by its number, such as the one in the scoreboard; a question mark for
    /// a number of another generation.
    pub fn name(&self, number: usize) -> &str {
        self.methods.get(number).map_or("?", |method| &method.name)
    }
}

/// Builds the OpenRPC document of methods with these names. The types of params and results are not known, so the
/// document says that any JSON is possible.
fn describe<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let any = |name| json!({"name": name, "schema": {}});
    let method = |name: &str, summary: Option<&str>| {
        let mut method = json!({
            "name": name,
            "params": [any("params")],
            "result": any("result"),
        });
        if let Some(summary) = summary {
            method["summary"] = summary.into();
        }
        method
    };
    let mut names: Vec<&str> = names.map(String::as_str).collect();
    names.sort_unstable();
    let job = |name: &str| JobMethod::ALL.into_iter().find(|job| job.name() == name);
    let methods: Vec<Value> = names
        .into_iter()
        .map(|name| method(name, job(name).map(JobMethod::summary)))
        .chain(OWN.map(|(name, summary)| method(name, Some(summary))))
        .collect();
    json!({
        "openrpc": "1.3.2",
        "info": {"title": "preforkd", "version": env!("CARGO_PKG_VERSION")},
        "methods": methods,
    })
    .to_string()
}
