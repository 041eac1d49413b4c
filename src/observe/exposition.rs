//! Writes the metrics of a server as Prometheus text.
//!
//! If the master does not answer, the metrics that only the master knows are left out. A wrong value in shared memory
//! is no error: the text stays valid.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::board_figures::{add_board, seconds, value};
use super::facts::{add_facts, flag};
use super::families::Families;
use crate::config::ObserveConfig;
use crate::link::metrics_board::BoardReader;
use crate::link::metrics_board::layout::labels;
use crate::protocol::control::Status;

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns all metrics as Prometheus text. `board` is `None` if its version is unknown; `facts` is `None` if
/// the master did not answer within 1 s. `now` is in seconds since 1970. `took` returns how long building the
/// text took so far.
pub fn exposition(
    board: Option<&BoardReader>,
    facts: Option<&Status>,
    config: &ObserveConfig,
    now: f64,
    took: impl FnOnce() -> Duration,
) -> String {
    let mut families = Families::new();
    families.add("build_info", &[env!("CARGO_PKG_VERSION")], 1.0);
    families.add("master_responding", &[], flag(facts.is_some()));
    let started_at = board.map(|board| board.header().started_at.load(Relaxed));
    if let Some(facts) = facts {
        add_facts(&mut families, facts, now, started_at);
    }
    if let Some(board) = board {
        add_master(&mut families, board);
        add_pools(&mut families, board);
        add_board(&mut families, board, config);
    }
    families.add("scrape_duration_seconds", &[], took().as_secs_f64());
    families.into_text()
}

/// Adds what the master writes on the board, and the CPU time of its slots.
fn add_master(families: &mut Families, board: &BoardReader) {
    let header = board.header();
    families.add("start_time_seconds", &[], value(&header.started_at));
    for (place, label) in labels::RESULTS.iter().enumerate() {
        families.add("reloads_total", &[label], value(&header.reloads[place]));
        families.add("upgrades_total", &[label], value(&header.upgrades[place]));
    }
    families.add("worker_starts_total", &[], value(&header.worker_starts));
    for (label, exits) in labels::WORKER_EXITS.iter().zip(&header.worker_exits) {
        families.add("worker_exits_total", &[label], value(exits));
    }
    for (slot, ns) in board.cpu_ns().into_iter().enumerate() {
        families.add(
            "worker_cpu_seconds_total",
            &[&slot.to_string()],
            seconds(ns),
        );
    }
}

/// Adds the starts and ends of programs.
fn add_pools(families: &mut Families, board: &BoardReader) {
    for pool in board.pool_programs() {
        let name = pool.name.as_str();
        let starts = pool.starts as f64;
        families.add("pool_program_starts_total", &[name], starts);
        for (label, exits) in labels::PROGRAM_EXITS.iter().zip(pool.exits) {
            families.add("pool_program_exits_total", &[name, label], exits as f64);
        }
    }
}
