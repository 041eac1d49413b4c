//! Passes the tasks of operators' commands to the threads of the store, and their replies back.
//!
//! A change that the store has not begun within [`PATIENCE_MS`] is withdrawn, and the command says that the store is
//! away.

use super::attempts;
use super::command_tasks::{AwaitedTask, TaskReply};
use super::core::JobsCore;
use super::store_event::{ReadReply, ReadRequest};
use super::ticket::Ticket;
use crate::jobs::control::{ControlReply, ControlTask};
use crate::jobs::store::LIST_PAGE;
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::StoreReply;

/// How long a task may wait for a store that is away, in milliseconds.
const PATIENCE_MS: u64 = 30_000;

/// Takes the tasks that have arrived.
pub fn take_tasks(core: &mut JobsCore) {
    // A command sends one task after another. A drain that took them would have to wait for the whole command.
    let is_over = core.is_draining && core.executors.is_settled() && core.waits.is_empty();
    while let Ok((task, reply)) = core.commands.tasks.try_recv() {
        if is_over {
            let text =
                "the jobs process is exiting, because the server stops or reloads; try again";
            let _ = reply.send(Err(text.to_owned()));
            continue;
        }
        let number = core.commands.next;
        core.commands.next += 1;
        let ticket = Ticket::Command(number);
        let hold = match task {
            ControlTask::Write(request) => Some(core.store.submit_held(request, ticket)),
            ControlTask::List(filter) => {
                core.store
                    .read(ReadRequest::List(filter, LIST_PAGE), ticket);
                None
            }
            ControlTask::Details(job) => {
                core.store.read(ReadRequest::Details(job), ticket);
                None
            }
            ControlTask::Export(after) => {
                core.store.read(ReadRequest::Export(after), ticket);
                None
            }
        };
        let due_ms = core.now_ms.saturating_add(PATIENCE_MS);
        let task = AwaitedTask {
            reply,
            hold,
            due_ms,
        };
        core.commands.awaited.insert(number, task);
    }
}

/// Withdraws the changes that the store has not begun in time. Others get their replies.
pub fn pass_time(core: &mut JobsCore) {
    let due = (core.commands.awaited.iter_mut()).filter(|(_, task)| task.due_ms <= core.now_ms);
    let mut withdrawn = Vec::new();
    for (number, task) in due {
        // Otherwise it is being executed, or it is a read: its reply is on its way.
        if task.hold.as_ref().is_some_and(|hold| hold.withdraw()) {
            withdrawn.push(*number);
        } else {
            task.due_ms = core.now_ms.saturating_add(PATIENCE_MS);
        }
    }
    for number in withdrawn {
        core.store.note_withdrawn();
        let state = core.store.state.name();
        let text = format!("the store is {state}: nothing was changed; try again later");
        finish(core, number, Err(text));
    }
}

/// Handles the reply to a change. Jobs may be due now that were not before.
pub fn written(core: &mut JobsCore, number: u64, reply: StoreReply) {
    attempts::look(core);
    finish(core, number, Ok(ControlReply::Written(reply)));
}

/// Handles a change that has failed: it is not stored, or it is unknown whether it is.
pub fn failed(core: &mut JobsCore, number: u64, error: &StoreError) {
    let what = match error.is_maybe_stored {
        true => "it is unknown whether the change is stored",
        false => "nothing was changed",
    };
    finish(
        core,
        number,
        Err(format!("could not write the store: {error}; {what}")),
    );
}

/// Handles the result of a read.
pub fn was_read(core: &mut JobsCore, number: u64, read: Result<ReadReply, StoreError>) {
    let reply = match read {
        Ok(ReadReply::List(page)) => Ok(ControlReply::Listed(page)),
        Ok(ReadReply::Details(job)) => Ok(ControlReply::Details(job.map(Box::new))),
        Ok(ReadReply::Export(jobs, last)) => Ok(ControlReply::Exported(jobs, last)),
        Ok(other) => Err(format!("the store gave an unexpected reply: {other:?}")),
        Err(error) => Err(format!("could not read the store: {error}")),
    };
    finish(core, number, reply);
}

fn finish(core: &mut JobsCore, number: u64, reply: TaskReply) {
    if let Some(task) = core.commands.awaited.remove(&number) {
        // The thread is gone only if the process is exiting.
        let _ = task.reply.send(reply);
    }
}
