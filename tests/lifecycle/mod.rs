//! Tests the life of the server: start, reload, upgrade, drain, stop, and replaced workers.

mod audit;
mod deployment;
mod handoff;
mod listeners;
mod names;
mod rebalance;
mod recycle;
mod reload;
pub mod reload_matrix;
mod removed_files;
mod scaling;
mod serving;
pub mod start;
mod start_races;
mod startup_errors;
mod stop;
mod stop_after;
mod systemd;
pub mod throttle;
pub mod upgrade;
mod upgrade_baseline;
mod upgrade_failures;
pub mod worker_deaths;
