//! The master: keeps the workers alive, and decides nothing by itself.
//!
//! Every "what now" about deaths, reloads, drains and stops is answered by [`Fleet`], which takes
//! `now` and events and returns actions. It makes no system call, never sleeps and has no clock, so
//! all of it is tested without a process.
//!
//! | file | concern |
//! | --- | --- |
//! | [`event`] | the words between policy and mechanism: events in, actions out |
//! | [`fleet`] | the door: one event, one answer; scale, stop |
//! | `leave` | who is told to leave, how, and what follows when it does not |
//! | `life` | a worker's life: forked, ready, retiring, dead |
//! | `reload` | start-up and reload: a generation's verdict |
//! | `watch` | what time brings: deadlines, heartbeats, a master that was paused |
//! | `recycle` | workers that have had enough: a successor first, then they drain |
//! | `children` | the child table: who is where, in which stage |
//! | [`deaths`] | the last deaths, and how a death is told |
//! | `spread` | who gives how many lasting connections to whom |
//! | [`view`] | what `status` shows |
//! | [`upgrade`] | another program in the same process |

mod children;
mod endpoints;
mod main_loop;
mod policy;
mod reaping;
mod rebalance;
mod requests;
pub mod resume;
mod setup;
mod start;
pub mod upgrade;

#[cfg(feature = "internals")]
pub use endpoints::pid_file::pid_in;
pub use setup::{Embedder, Setup};
pub use start::run;
