//! The access log of a process: one line for each call.
//!
//! `hooks` collects what a line says while the dispatcher takes and answers a call, and `rules` decides which
//! calls have one. The lines of a turn of the event loop go to `queue`, whose thread formats and writes them. So
//! neither a slow disk nor a full one delays a call. `line` has the fields.

pub mod crashed_calls;
pub mod hooks;
pub mod line;
pub mod queue;
mod rules;
pub mod turn;
