//! Opens the log files again after a rotation (SIGUSR1), and passes them to the children.
//!
//! A file that cannot be opened is an error in the log, and its writers continue with the old one. Lines that wait
//! in a queue go to the old or the new file.

use std::os::fd::AsFd;

use crate::link::ids::Generation;
use crate::link::message::Order;
use crate::logging::{self, AccessFile, LogOutput};
use crate::master::children::workers::{Children, GenerationContext, WorkerHandle};
use crate::master::core::Master;

/// Opens the log and the access log again.
pub fn reopen_logs(master: &mut Master<'_>) {
    let has_access_log = reopen_access_log(master);
    let serving = master.fleet.generation();
    let (new, old) = match &master.contexts.next {
        None => (
            reopen_log_of(master, &master.contexts.serving, |_| true),
            None,
        ),
        // This process logs to the file of the next generation, unless the reload fails.
        Some(upcoming) => (
            reopen_log_of(master, upcoming, |generation| generation > serving),
            reopen_log_of(master, &master.contexts.serving, |generation| {
                generation <= serving
            }),
        ),
    };
    if new.is_some() || old.is_some() {
        if let Some(output) = new {
            logging::set_output(output);
        }
        master.previous_log = old.or(master.previous_log.take());
        log::info!("log file reopened");
    } else if master.contexts.serving.settings.log.file.is_none() && !has_access_log {
        log::info!("SIGUSR1: the log goes to standard error, nothing to reopen");
    }
}

/// Opens a log file again, and passes it to the workers of the generations for which `is_theirs`
/// returns true. Returns `None` if there is no file or it cannot be opened.
fn reopen_log_of(
    master: &Master<'_>,
    context: &GenerationContext,
    is_theirs: impl Fn(Generation) -> bool,
) -> Option<LogOutput> {
    let file = context.settings.log.file.as_ref()?;
    match logging::open(Some(file)) {
        Ok(output) => {
            let theirs = |worker: &WorkerHandle| is_theirs(worker.generation);
            for (pid, _) in master.workers.iter().filter(|(_, worker)| theirs(worker)) {
                master
                    .workers
                    .order(pid, Order::ReopenLog, Some(output.as_fd()));
            }
            Some(output)
        }
        Err(error) => {
            log::error!(
                "could not reopen {}: {error}; logging continues to the old file",
                file.display()
            );
            None
        }
    }
}

/// Opens the access logs of the serving and of the next generation again. Returns whether there is one.
fn reopen_access_log(master: &Master<'_>) -> bool {
    let serving = master.fleet.generation();
    let (workers, contexts) = (&master.workers, &master.contexts);
    let is_next = |generation: Generation| generation > serving;
    let mut has_one = reopen_access_log_of(workers, &contexts.serving, |it| !is_next(it));
    if let Some(upcoming) = &contexts.next {
        has_one |= reopen_access_log_of(workers, upcoming, is_next);
    }
    has_one
}

/// Opens the access log of a context again, and passes it to the children of the generations for which `is_theirs`
/// returns true. Returns whether there is one.
fn reopen_access_log_of(
    workers: &Children,
    context: &GenerationContext,
    is_theirs: impl Fn(Generation) -> bool,
) -> bool {
    let config = context.settings.access_log.as_ref();
    let path = config.and_then(|config| config.file.as_ref());
    let Some((file, path)) = context.access_file.as_ref().zip(path) else {
        return false;
    };
    let pass_on = |new: AccessFile| {
        let theirs = |worker: &WorkerHandle| worker.has_access_file && is_theirs(worker.generation);
        for (pid, worker) in workers.iter().filter(|(_, worker)| theirs(worker)) {
            let own = new.for_child(worker.slot.is_worker())?;
            workers.order(pid, Order::ReopenAccessLog, Some(own.as_fd()));
            if let Some(kept) = &worker.kept_file {
                kept.replace(own)?;
            }
        }
        file.replace(new.into_fd())
    };
    match AccessFile::open(path).and_then(pass_on) {
        Ok(()) => log::info!("access log reopened"),
        Err(error) => log::error!(
            "could not reopen {}: {error}; the access log continues in the old file",
            path.display()
        ),
    }
    true
}
