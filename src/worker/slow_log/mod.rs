//! Writes the slow log of a process: what its calls are doing when they run longer than their threshold.
//!
//! `watch` finds the slow calls, on the event loop; `inline` those that run on the loop itself. `recorder` is a
//! thread that writes the records. It asks `evidence` what a call is doing. `record` has the lines of the log.

mod evidence;
pub mod inline;
pub mod record;
mod recorder;
pub mod watch;
