//! Carries out a reload in a pool process that stays: adds the methods of the next generation, and replaces the
//! programs one by one if the table says so.
//!
//! The master sends the table in a memory file, and waits for a report. If the pool process cannot serve the
//! generation, it writes the reason to the file. If the reload fails, the added methods stay until a later table says
//! that the generation has no workers.

use std::os::fd::OwnedFd;

use super::call_dispatcher::CallDispatcher;
use super::method_stats::MethodStats;
use super::peer::{PoolUpdate, shown_generation};
use super::timers::CallKey;
use crate::handler::pool::Stage;
use crate::handler::pool::pool_table::PoolTable;
use crate::link::ids::Generation;
use crate::link::message::Report;
use crate::protocol::code::Code;
use crate::sys::memory_file;

/// The longest table, in bytes.
const MAX_TABLE_LEN: u64 = 64 * 1024 * 1024;

/// The time between two attempts to send the report, in milliseconds.
const REPORT_AGAIN_MS: u64 = 100;

/// The error that `unserved_calls` get.
pub const UNSERVED: (Code, &str) = (
    Code::Crashed,
    "the process of its pool has ended, and no other one serves this generation; try again",
);

/// Handles the table of the next generation, which this pool process will also serve. Call `report` until the result
/// is sent.
pub fn begin(service: &mut CallDispatcher, generation: Generation, file: Option<OwnedFd>) {
    let mut update = PoolUpdate {
        generation,
        stage: Stage::Ready,
        file,
        lane: 0,
        report_at_ms: Some(0),
    };
    match read(update.file.as_ref()) {
        Ok(table) => {
            update.lane = table.lane;
            learn_methods(service, generation, &table);
            if let Some(config) = table.config {
                update.stage = Stage::Starting;
                service.threads.pools().main_mut().prepare(config);
            }
        }
        Err(reason) => {
            update.stage = Stage::Failed(format!("it could not read the table: {reason}"))
        }
    }
    service.forwarding.pools.update = Some(update);
}

fn read(file: Option<&OwnedFd>) -> Result<PoolTable, String> {
    let file = file.ok_or("no descriptor was sent with the order")?;
    let bytes = file
        .try_clone()
        .and_then(|file| memory_file::read(file, MAX_TABLE_LEN));
    let bytes = bytes.map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}

/// Adds the methods of a generation, so that its calls are understood from now on.
fn learn_methods(service: &mut CallDispatcher, generation: Generation, table: &PoolTable) {
    let methods = &mut service.forwarding.pools.methods;
    methods.retain(&table.served);
    methods.add(generation.0, &table.methods);
    let lane = service.forwarding.lane;
    let Some(registry) = methods.complete(&service.registry, lane.saturating_sub(1)) else {
        return;
    };
    let calls = &mut service.calls;
    let count = registry.methods().len();
    calls
        .loads
        .resize_with(count, || MethodStats::in_lane(lane));
    calls.registry = registry.clone();
    service.threads.set_registry(&registry);
    service.registry = registry;
}

/// Returns the report that is due now. If the caller cannot send it, it is due again after `REPORT_AGAIN_MS`.
pub fn report(service: &mut CallDispatcher) -> Option<Report> {
    let update = service.forwarding.pools.update.as_mut()?;
    update.report_at_ms.filter(|at| *at <= service.now_ms)?;
    if update.stage == Stage::Starting
        && let Some(stage) = service.threads.pools().main_mut().next_stage()
    {
        update.stage = stage;
    }
    let is_ready = match &update.stage {
        Stage::Starting => return None,
        Stage::Ready => true,
        Stage::Failed(reason) => {
            if let Some(file) = &update.file
                && let Err(error) = memory_file::replace(file, reason.as_bytes())
            {
                log::warn!(
                    "could not send the reason of the failed reload to the master: {error}: {reason}"
                );
            }
            false
        }
    };
    update.report_at_ms = Some(service.now_ms + REPORT_AGAIN_MS);
    Some(Report::PoolUpdated(update.generation, is_ready))
}

/// Records that the report was sent.
pub fn reported(service: &mut CallDispatcher) {
    if let Some(update) = &mut service.forwarding.pools.update {
        update.report_at_ms = None;
    }
}

/// Handles the end of the reload: uses the new configuration if it has succeeded, or else the old one.
pub fn end(service: &mut CallDispatcher, generation: Generation, has_succeeded: bool) {
    let update = service.forwarding.pools.update.take();
    let update = update.filter(|update| has_succeeded && update.generation == generation);
    match update {
        Some(update) => {
            let forwarding = &mut service.forwarding;
            forwarding.generation = shown_generation(generation.0);
            forwarding.pools.shown_lane = Some(update.lane);
            forwarding.is_stale = true;
            service.threads.pools().main_mut().commit();
        }
        None => service.threads.pools().main_mut().revert(),
    }
}

/// Returns the calls that wait for a pool process that has ended and is not replaced. This happens after an upgrade, in
/// a worker of the program before it.
pub fn unserved_calls(service: &CallDispatcher) -> Vec<CallKey> {
    let forwarding = &service.forwarding;
    if !forwarding.pools.is_final {
        return Vec::new();
    }
    let calls = &service.calls;
    let has_no_pool_process = |key: &CallKey| {
        let Some(call) = calls.table.get(*key) else {
            return false;
        };
        let lane = calls.lane(call.method);
        // The programs of a session's own pools are in this process.
        let has_process = (1..=service.registry.pools().len()).contains(&lane);
        let mut peers = forwarding.peers.iter();
        has_process && call.sent_to.is_none() && !peers.any(|(_, peer)| peer.lane == lane)
    };
    calls
        .all()
        .into_iter()
        .filter(has_no_pool_process)
        .collect()
}
