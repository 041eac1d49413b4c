//! The master's child processes: forking them, reading their reports, cleaning up after them.

pub mod diagnosis;
pub mod generation_info;
pub mod keepers;
pub mod links;
pub mod mark_reader;
pub mod orphans;
pub mod startup_log;
pub mod workers;
pub mod workers_state;
