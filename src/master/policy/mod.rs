//! Decides what the master does about deaths, reloads, drains and stops.
//!
//! `Fleet` takes events and the time and returns actions. Nothing here makes a system call, sleeps
//! or reads a clock, so all of it is tested without a process. The main loop carries out the actions.

pub mod action;
pub mod crash_counts;
pub mod death_log;
pub mod event;
pub mod executor_causes;
pub mod fleet;
#[cfg(test)]
pub mod fleet_properties;
pub mod fleet_state;
#[cfg(test)]
pub mod fleet_tests;
#[cfg(test)]
pub mod fleet_world;
pub mod generation;
pub mod keeper_rules;
pub mod lifecycle;
pub mod observer_rules;
#[cfg(test)]
pub mod pool_tests;
pub mod rebalancer;
pub mod recycle;
#[cfg(test)]
pub mod recycle_tests;
pub mod reload_history;
pub mod reload_queue;
pub mod shutdown;
pub mod slots;
pub mod status_view;
pub mod timeouts;
#[cfg(test)]
pub mod timeouts_tests;
