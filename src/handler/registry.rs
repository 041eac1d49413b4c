//! The table of methods: made by the master before it forks, read by its workers; and what the program
//! keeps for them.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};

use super::Handler;
use super::handler_state::{HandlerState, Hooks, Worker};
use super::pool::Pool;

/// The method that answers with [`Registry::document`].
pub const DISCOVER: &str = "rpc.discover";

/// The protocol's own methods, with a word about each.
const OWN: [(&str, &str); 2] = [
    (
        "rpc.cancel",
        "Cancels the call of this connection with the id in params, {\"id\": ID}",
    ),
    (DISCOVER, "Answers this document"),
];

/// A method: its handler and its limits.
#[derive(Clone)]
pub struct Method {
    pub name: String,
    /// What answers it.
    pub handler: Arc<dyn Handler>,
    /// How long a call may take, waiting included.
    pub timeout: Duration,
    /// Calls at once per worker, waiting ones included; 0 means no limit of its own.
    pub concurrency: usize,
    /// Calls a second per worker; 0 means no limit.
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

/// All methods of a generation. Names are matched whole and exactly.
#[derive(Debug, Default)]
pub struct Registry {
    methods: Vec<Method>,
    by_name: HashMap<String, usize>,
    /// The answer of [`DISCOVER`], built once: the event loop must not build it for each call.
    document: String,
    hooks: Arc<Hooks>,
    /// What the master keeps for all workers.
    kept: HandlerState,
    /// Set in a worker, once what it keeps for itself is there.
    worker: OnceLock<Worker>,
    /// By the number that the methods' handlers have.
    pools: Vec<Arc<Pool>>,
}

impl Registry {
    /// A table of these methods; of two with one name the later one counts.
    pub fn new(methods: Vec<Method>) -> Self {
        let by_name = methods
            .iter()
            .enumerate()
            .map(|(number, method)| (method.name.clone(), number))
            .collect();
        Registry {
            document: describe(&by_name),
            methods,
            by_name,
            ..Registry::default()
        }
    }

    /// The same with what the program does around its methods, and keeps in the master.
    #[must_use]
    pub fn with(self, hooks: Arc<Hooks>, kept: HandlerState) -> Self {
        Registry {
            hooks,
            kept,
            ..self
        }
    }

    /// The same with the pools that the methods' handlers have the numbers of.
    #[must_use]
    pub fn with_pools(self, pools: Vec<Arc<Pool>>) -> Self {
        Registry { pools, ..self }
    }

    pub fn pools(&self) -> &[Arc<Pool>] {
        &self.pools
    }

    /// The descriptors that the program has opened before the fork: its handlers may use them.
    pub fn program_descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.kept.descriptors()
    }

    /// Lets the program make what each worker has for itself: once, in a worker, before any call.
    ///
    /// # Errors
    /// Why it could not.
    pub fn start_worker(&self, slot: u16) -> Result<(), String> {
        let worker = self.hooks.start_worker(slot, &self.kept)?;
        self.worker
            .set(worker)
            .map_err(|_| "it has started already".to_owned())
    }

    /// This worker, once it has started.
    pub fn worker(&self) -> Option<&Worker> {
        self.worker.get()
    }

    /// Whether the program wants to be told of a worker's end.
    pub fn has_stop_hooks(&self) -> bool {
        self.hooks.has_stop_hooks()
    }

    /// Tells it.
    pub fn stop_worker(&self) {
        if let Some(worker) = self.worker() {
            self.hooks.stop_worker(worker);
        }
    }

    /// The number of the method of that name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub fn methods(&self) -> &[Method] {
        &self.methods
    }

    /// The methods as an OpenRPC document (spec.open-rpc.org), as JSON.
    pub fn document(&self) -> &str {
        &self.document
    }

    /// What stands in `out` of a method's answers, by its number.
    pub fn answer_name(&self, number: usize) -> &str {
        let own = self.methods.get(number);
        let own = own.and_then(|method| method.handler.answer_name());
        own.unwrap_or_else(|| self.name(number))
    }

    /// The name of a method by its number, such as the scoreboard has; a question mark for a
    /// number of another generation's.
    pub fn name(&self, number: usize) -> &str {
        self.methods.get(number).map_or("?", |method| &method.name)
    }
}

/// The OpenRPC document of methods with these names. What a handler takes and answers is its own affair:
/// any JSON.
fn describe(by_name: &HashMap<String, usize>) -> String {
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
    let mut names: Vec<&str> = by_name.keys().map(String::as_str).collect();
    names.sort_unstable();
    let methods: Vec<Value> = names
        .into_iter()
        .map(|name| method(name, None))
        .chain(OWN.map(|(name, summary)| method(name, Some(summary))))
        .collect();
    json!({
        "openrpc": "1.3.2",
        "info": {"title": "preforkd", "version": env!("CARGO_PKG_VERSION")},
        "methods": methods,
    })
    .to_string()
}
