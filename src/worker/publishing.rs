//! Publishes the state of a worker, pool process or session in shared memory.
//!
//! Each turn of the event loop writes the scoreboard record; each tick also writes what needs a system call.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use super::call_dispatcher::CallDispatcher;
use super::remote_calls;
use crate::handler::job_attempt::JobAttempt;
use crate::link::session_table::SessionRecord;
use crate::logging;
use crate::sys::process;

/// What was published at the last tick.
#[derive(Debug, Default)]
pub struct Published {
    cpu_ns: u64,
}

/// Publishes the state of this process in its scoreboard record.
pub fn publish(service: &CallDispatcher, connections: usize, spurious_wakes: u64) {
    let record = service.record;
    let (mut running, queued, given_up) = service.calls.counts(&service.threads);
    let lost = match given_up {
        0 => 0,
        _ => {
            let on_threads = service.threads.calls.keys();
            service
                .calls
                .table
                .stuck(on_threads, service.now_ms)
                .count()
        }
    };
    // A call that was cancelled, or whose client has left, is no fault of its function before its deadline.
    running += given_up.saturating_sub(lost);
    record.connections.store(connections as u32, Relaxed);
    record.running.store(running as u32, Relaxed);
    record.queued.store(queued as u32, Relaxed);
    let sent = remote_calls::sent(&service.calls) as u32;
    record.sent.store(sent, Relaxed);
    let for_others = service.forwarding.running_for_others() as u32;
    record.running_for_others.store(for_others, Relaxed);
    record.lost_threads.store(lost as u32, Relaxed);
    record.calls.store(service.read(), Relaxed);
    record.errors.store(service.errors, Relaxed);
    record.spurious_wakes.store(spurious_wakes as u32, Relaxed);
    let (last, longest) = (service.accept_wait.last_ms, service.accept_wait.longest_ms);
    record.last_wait_ms.store(last as u32, Relaxed);
    record.longest_wait_ms.store(longest as u32, Relaxed);
    let (serving, programs_down) = service.threads.programs();
    record.programs_down.store(programs_down as u32, Relaxed);
    if serving > 0 {
        record.pool_ready_ms.store(service.now_ms, Relaxed);
    }
    let (mut method, mut since) = (0, 0);
    if let Some(oldest) = service.calls.oldest(&service.threads) {
        (method, since) = (oldest.method as u32 + 1, oldest.read_ms);
        let identity = oldest.state.identity();
        let (home, number) = (identity.home).map_or((0, identity.number), |it| (it.pid, it.number));
        record.oldest_call.store(number, Relaxed);
        record.oldest_home.store(home, Relaxed);
        let attempt = identity.attempt.as_deref();
        record.set_oldest_job(attempt.map_or(0, JobAttempt::bits));
    }
    record.oldest_since_ms.store(since, Relaxed);
    record.oldest_method.store(method, Relaxed);
}

/// Publishes how many calls of each method run and wait, over connections of this process. A session publishes
/// them in its own record, because it shares the block; its acceptor adds them up.
fn publish_methods(service: &CallDispatcher, session: Option<&SessionRecord>) {
    let block = service.counts.writer.block;
    // Several methods may have the same place, so their numbers are added up.
    let methods = 0..service.registry.methods().len();
    let mut counts: BTreeMap<usize, (u64, u64)> = methods
        .map(|method| (service.counts.place(Some(method)), (0, 0)))
        .collect();
    for key in service.calls.all() {
        let Some(call) = service.calls.get(key).filter(|call| call.is_own()) else {
            continue;
        };
        let place = service.counts.place(Some(call.method));
        let (running, queued) = counts.entry(place).or_default();
        *(if call.is_running() { running } else { queued }) += 1;
    }
    let places = counts
        .into_iter()
        .map(|(place, (run, wait))| (place, run, wait));
    match session {
        Some(record) => record.set_methods(places),
        None => places.for_each(|(place, running, queued)| {
            block.running[place].store(running, Relaxed);
            block.queued[place].store(queued, Relaxed);
        }),
    }
}

impl Published {
    /// Publishes the CPU time of a worker and the lines that its log has lost. Call it at each tick and at the
    /// exit. `session` is the record of a session.
    pub fn tick(
        &mut self,
        service: &CallDispatcher,
        is_worker: bool,
        session: Option<&SessionRecord>,
    ) {
        logging::report_lost_lines();
        let lost = u32::try_from(logging::lost_lines()).unwrap_or(u32::MAX);
        service.record.lost_lines.store(lost, Relaxed);
        let writer = service.counts.writer;
        writer.add(&writer.block.lost_lines, logging::take_uncounted_lines());
        publish_methods(service, session);
        if is_worker && let Some(counter) = writer.block.cpu_ns.get(usize::from(service.slot)) {
            let cpu_ns = process::cpu_time().as_nanos() as u64;
            let more = cpu_ns.saturating_sub(std::mem::replace(&mut self.cpu_ns, cpu_ns));
            writer.add(counter, more);
        }
    }
}
