//! Takes the reports of the threads of the store, and passes each to the part that made the request.

use super::attempts;
use super::calls;
use super::commands;
use super::core::JobsCore;
use super::status;
use super::store_event::{ReadReply, StoreEvent};
use super::ticket::Ticket;
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::StoreReply;

/// What a report means for the whole process.
#[derive(Debug, PartialEq, Eq)]
pub enum StoreStep {
    /// The store is open, or it is known that it is away: workers may send calls.
    Serve,
    /// The process must exit.
    Fail(String),
    /// The store is closed after the last request.
    Closed,
}

/// Handles a report.
pub fn handle(core: &mut JobsCore, event: StoreEvent) -> Option<StoreStep> {
    match event {
        StoreEvent::Opened(mut opened) => {
            let freed = std::mem::take(&mut opened.freed);
            core.store.opened = Some(*opened);
            attempts::store_opened(core);
            for freed in freed {
                attempts::freed(core, &freed);
            }
            core.has_changed = true;
            status::count(core);
            // Calls that waited before have not seen a record yet.
            calls::look(core);
            return Some(StoreStep::Serve);
        }
        StoreEvent::State(state) => {
            core.store.state = state;
            status::publish(core);
            return Some(StoreStep::Serve);
        }
        StoreEvent::Refused(reason) => return Some(StoreStep::Fail(reason)),
        StoreEvent::SyncFailed(reason) => {
            let reason = format!("a sync of the job store failed: {reason}");
            return Some(StoreStep::Fail(reason));
        }
        StoreEvent::Closed => return Some(StoreStep::Closed),
        StoreEvent::Committed(took) => {
            core.has_changed = true;
            if let Some(counters) = &core.counters {
                counters.committed(took.as_nanos() as u64);
            }
        }
        StoreEvent::Replied(ticket, reply) => replied(core, ticket, reply),
        StoreEvent::Claimed(ticket, jobs, next_ms) => {
            attempts::claimed(core, &ticket, jobs, next_ms)
        }
        StoreEvent::Failed(ticket, error) => failed(core, &ticket, &error),
        StoreEvent::Read(ticket, read) => was_read(core, &ticket, read),
        StoreEvent::Maintained(maintained) => {
            core.has_changed |= maintained.removed > 0 || !maintained.expired.is_empty();
            // The clock of the system may have been set.
            attempts::look(core);
            for job in maintained.expired {
                let end = (job.state, job.reason);
                attempts::job_ended(core, (job.id, &job.method), end, None);
            }
        }
    }
    None
}

/// Handles the reply to a request, by what it was made for.
fn replied(core: &mut JobsCore, ticket: Ticket, reply: StoreReply) {
    match (ticket, reply) {
        (Ticket::Enqueue(call), StoreReply::Enqueued(reply)) => calls::enqueued(core, call, reply),
        (Ticket::Command(number), reply) => commands::written(core, number, reply),
        (Ticket::Cancel(call, job), reply) => {
            attempts::cancelled(core, job, &reply);
            calls::cancelled(core, call, job, &reply);
        }
        (Ticket::Settle(id), StoreReply::Settled(reply)) => attempts::settled(core, id, &reply),
        (Ticket::Process, _) => {}
        (ticket, reply) => log::debug!("no use for the reply {reply:?} to {ticket:?}"),
    }
}

/// Handles a request that is not stored, by what it was made for.
fn failed(core: &mut JobsCore, ticket: &Ticket, error: &StoreError) {
    match ticket {
        Ticket::Enqueue(call) | Ticket::Cancel(call, _) => calls::failed(core, *call, error),
        Ticket::Command(number) => commands::failed(core, *number, error),
        Ticket::Claim(_) | Ticket::Settle(_) => attempts::failed(core, ticket),
        ticket => log::debug!("the request of {ticket:?} failed: {error}"),
    }
}

/// Handles the result of a read, by what it was made for.
fn was_read(core: &mut JobsCore, ticket: &Ticket, read: Result<ReadReply, StoreError>) {
    match ticket {
        Ticket::Get(call) => calls::got(core, *call, read),
        Ticket::Wait(job) => calls::read_for_waits(core, *job, read),
        Ticket::Look(job) => calls::looked(core, *job, read),
        Ticket::Command(number) => commands::was_read(core, *number, read),
        Ticket::Counts => status::counted(core, read),
        Ticket::Running => attempts::running_read(core, read),
        ticket => log::debug!("no use for the read of {ticket:?}"),
    }
}
