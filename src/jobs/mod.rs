//! Stores jobs durably and decides what happens to them.
//!
//! A job is a call that the server stores before it answers, and runs later (docs/jobs.md). This layer stands
//! beside `worker` and `master`. The jobs process runs it, and is the only process that opens the store.
//!
//! - [`policy`]: pure decisions. They take the time and return values: ids, states, backoff, turns of queues,
//!   validation of an enqueue, retention.
//! - [`store`]: the [`store::Engine`] that keeps the jobs. It executes a list of requests in one transaction.
//! - [`control`]: the commands of operators. [`figures`]: counters and status.
//! - [`process`]: the jobs process. [`open`]: the lock for a master, and the store.
//! - [`kill_point`]: where tests can kill the jobs process. [`record`]: jobs as JSON. [`rules`]: the configuration as
//!   the other modules need it.
//!
//! # How the jobs process uses it
//!
//! 1. The master takes `sys::instance_lock::InstanceLock`, and its children inherit the descriptor.
//! 2. `store::sqlite::open` returns an engine. If another instance ended uncleanly,
//!    [`store::Engine::leftovers`] names the processes that may still run its attempts. When they are gone,
//!    [`store::request::StoreRequest::Join`] registers this instance and frees those attempts.
//! 3. The writing thread collects requests in a [`store::group::RequestGroup`] while a commit runs, and gives
//!    them to [`store::Engine::execute`] as one group. It sends the replies after the return, because only
//!    then they are committed. Then it calls [`store::Engine::after_commit`], which does the postponed
//!    checkpoint.
//! 4. If nothing can be claimed, [`store::Engine::next_event_ms`] says when to look again.
//!    [`store::Engine::maintain`] is called every 10 s, and again at once if it returns `is_complete: false`.
//! 5. A second thread reads: [`store::StoreReader`] sees every committed group.
//!
//! A token, an owner and the engine's own clock are in each request that needs them. So an engine for several
//! machines can implement the same trait.

// Without an engine, all of it is unused.
#![cfg_attr(not(feature = "jobs-sqlite"), allow(dead_code))]

pub mod control;
pub mod figures;
mod kill_point;
pub mod open;
pub mod policy;
pub mod process;
pub mod record;
pub mod rules;
pub mod store;
