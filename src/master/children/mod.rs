//! The master's child processes: forks them, reads their reports, cleans up after them.

pub mod adopted_sessions;
pub mod diagnosis;
pub mod generation_info;
pub mod joining;
pub mod keepers;
pub mod links;
pub mod mark_reader;
mod metrics_access;
pub mod orphans;
pub mod own_programs;
pub mod pool_process;
pub mod program_deaths;
pub mod session_ranges;
pub mod sessions;
pub mod slow_calls;
pub mod source_counts;
pub mod startup_log;
pub mod workers;
pub mod workers_state;
