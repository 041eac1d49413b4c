//! Reads what children report, and passes it to the policy.

use super::children::{diagnosis, joining, program_deaths};
use super::core::{Master, now};
use super::leftovers::{send_executor_ends, send_recent_ends};
use super::policy::event::Event;
use super::session_orders::note_crashed_sessions;
use crate::link::message::Report;
use crate::sys::process::{self, Pid};

/// Passes the reports of a child to the policy, and queues the actions that follow.
pub fn queue_reports(master: &mut Master<'_>, pid: Pid) {
    master.workers.read_startup_log(pid);
    for report in master.workers.read_reports(pid) {
        let event = match report {
            Report::Ready => Event::Ready { pid },
            Report::Retiring => Event::Retiring { pid },
            Report::MaxCallsReached(calls) => Event::MaxCallsReached { pid, calls },
            // A worker that repeats this must not keep the master busy.
            Report::AllThreadsStuck(_) if !master.fleet.wants_diagnosis(pid) => continue,
            Report::AllThreadsStuck(count) => {
                let Some(worker) = master.workers.get(pid) else {
                    continue;
                };
                let evidence = diagnosis::threads(pid, count, worker);
                Event::AllThreadsStuck { pid, evidence }
            }
            Report::Uneven => {
                master.rebalancer.look_soon(now());
                continue;
            }
            Report::SessionLink(link) => {
                joining::join_session(&master.workers, pid, link);
                continue;
            }
            Report::SessionCrashed(_) => {
                note_crashed_sessions(master);
                continue;
            }
            Report::SlowCalls => {
                diagnosis::answer_slow_calls(&mut master.workers, pid, now());
                continue;
            }
            Report::LinkWanted(record) => {
                joining::join_as_asked(&mut master.workers, pid, record as usize);
                continue;
            }
            Report::PoolUpdated(of, is_ready) => {
                joining::answer_to_update(&mut master.workers, pid, of, is_ready)
            }
        };
        master.queue_actions(event);
        if report == Report::Ready {
            joining::join_pools(&mut master.workers, pid);
            send_recent_ends(master, pid);
            // A jobs process may have been missing when executors ended.
            send_executor_ends(master);
        }
    }
}

/// Keeps the records of programs that have died in pool processes. Call it before the records are read,
/// and before a pool process is removed.
pub fn keep_deaths_of_programs(master: &mut Master<'_>) {
    note_crashed_sessions(master);
    for death in master.workers.sessions.take_program_deaths() {
        master.fleet.keep_death_of_program(death);
    }
    for (_, process) in master.workers.iter() {
        for death in program_deaths::take(process, process::unix_seconds()) {
            master.fleet.keep_death_of_program(death);
        }
    }
}

/// Stops requests of workers that the next program may not know, and reads those that were sent.
pub fn queue_last_requests(master: &mut Master<'_>) {
    master.workers.forbid_requests();
    let pids: Vec<_> = master.workers.iter().map(|(pid, _)| pid).collect();
    for pid in pids {
        queue_reports(master, pid);
    }
    keep_deaths_of_programs(master);
}
