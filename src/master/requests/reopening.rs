//! Opens the log files again after a rotation (SIGUSR1) or a removal, and passes them to the children.
//!
//! A file that cannot be opened is an error in the log, and its writers continue with the old one. Lines that wait
//! in a queue go to the old or the new file.

use std::os::fd::AsFd;
use std::path::PathBuf;

use crate::link::ids::Generation;
use crate::link::message::Order;
use crate::logging::{self, AccessFile, LogOutput};
use crate::master::children::workers::{Children, GenerationContext, WorkerHandle};
use crate::master::core::Master;
use crate::throttle::Millis;

/// The time between two looks for removed files, in milliseconds.
const LOOK: Millis = 2_000;
/// The time until the next try if a removed file cannot be created again.
const RETRY: Millis = 30_000;

/// Returns when `restore_removed_logs` is due; `None` if there is no log file.
pub fn next_look(master: &Master<'_>) -> Option<Millis> {
    let serving = &master.contexts.serving;
    let has_file = serving.settings.log.file.is_some() || serving.access_file.is_some();
    has_file.then_some(master.next_log_look)
}

/// Creates the log files of the serving generation again if they were removed. It looks for that every few seconds.
pub fn restore_removed_logs(master: &mut Master<'_>, now: Millis) {
    if next_look(master).is_none_or(|at| at > now) {
        return;
    }
    master.next_log_look = now + LOOK;
    let (log, access) = removed_logs(&master.contexts.serving);
    if log.is_some() {
        reopen_log(master);
    }
    if access.is_some() {
        reopen_access_log(master);
    }
    let removed = log.into_iter().chain(access);
    let (log, access) = removed_logs(&master.contexts.serving);
    let left = [log, access];
    for path in removed.filter(|path| !left.contains(&Some(path.clone()))) {
        log::warn!(
            "the log file {} was removed: its lines were lost, and it is opened again",
            path.display()
        );
    }
    if left.iter().any(Option::is_some) {
        master.next_log_look = now + RETRY;
    }
}

/// Returns the paths of the log and of the access log, if they were removed.
fn removed_logs(context: &GenerationContext) -> (Option<PathBuf>, Option<PathBuf>) {
    let log = context.settings.log.file.as_ref();
    let log = log.filter(|path| logging::is_output_removed(path));
    let access = context.settings.access_log.as_ref();
    let access = access.and_then(|config| config.file.as_ref());
    let open = context.access_file.as_ref();
    let access = access.filter(|path| open.is_some_and(|file| file.is_removed(path)));
    (log.cloned(), access.cloned())
}

/// Opens the log and the access log again.
pub fn reopen_logs(master: &mut Master<'_>) {
    let has_access_log = reopen_access_log(master);
    let has_log = reopen_log(master);
    if !has_log && !has_access_log && master.contexts.serving.settings.log.file.is_none() {
        log::info!("SIGUSR1: the log goes to standard error, nothing to reopen");
    }
}

/// Opens the log again. Returns whether that was done.
fn reopen_log(master: &mut Master<'_>) -> bool {
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
    let is_done = new.is_some() || old.is_some();
    if is_done {
        if let Some(output) = new {
            logging::set_output(output);
        }
        master.previous_log = old.or(master.previous_log.take());
        log::info!("log file reopened");
    }
    is_done
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
            let follows = match logging::is_output_removed(file) {
                true => "its lines are lost until it can be opened",
                false => "logging continues to the old file",
            };
            log::error!("could not reopen {}: {error}; {follows}", file.display());
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
        Err(error) => {
            let follows = match file.is_removed(path) {
                true => "its lines are lost until it can be opened",
                false => "the access log continues in the old file",
            };
            log::error!("could not reopen {}: {error}; {follows}", path.display());
        }
    }
    true
}
