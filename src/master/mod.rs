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
mod control;
pub mod deaths;
pub mod event;
mod evidence;
mod first_words;
pub mod fleet;
mod keepers;
mod leave;
mod life;
pub mod listeners;
mod marks;
pub mod orphans;
mod own_path;
pub mod pid_file;
mod reaping;
mod recycle;
mod reload;
mod reloading;
mod requests;
mod setup;
mod spread;
mod spreading;
mod start;
mod status;
mod strikes;
mod supervise;
pub mod upgrade;
pub mod view;
mod watch;
mod workers;

#[cfg(test)]
mod fleet_properties;
#[cfg(test)]
mod fleet_tests;
#[cfg(test)]
mod fleet_world;
#[cfg(test)]
mod recycle_tests;
#[cfg(test)]
mod watch_tests;

pub use event::{Action, Event, Exit, Millis, PolicyLimits};
pub use fleet::Fleet;
pub use setup::{Embedder, Setup};
pub use start::run;
