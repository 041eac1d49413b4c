//! Turns a forked child into a worker, pool process, acceptor, session or jobs process: it closes and resets everything
//! that belongs to the master.
//!
//! It is one list whose order matters. Each step gives its reason. It fails with the error that the process logs before
//! it exits. Until then it has served no client.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::crash::keeper;
use super::crash::keeper::KeeperSetup;
use crate::logging;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::{descriptor, guard, privilege, process, shared_memory};
use crate::worker_init::WorkerInit;

/// Turns a copy of the master into a worker, with a keeper if one is configured and possible. All signals
/// are blocked at the call, and unblocked on success.
///
/// # Errors
/// The error of the system, with what was attempted.
pub fn init_worker_process(
    boot: &mut WorkerInit<'_>,
) -> Result<(SignalPipe, Option<KeeperSetup>), (&'static str, io::Error)> {
    let is_session = boot.slot.session().is_some();
    if is_session {
        leave_shared_memory(boot).map_err(|error| ("replace the shared scoreboard", error))?;
    } else {
        let protected = boot.metrics.protect_header();
        protected.map_err(|error| ("protect the header of the metrics board", error))?;
    }
    // 1. The lock of the pid file belongs to its open file description: kept open here, it would outlive
    //    the master.
    if let Some(pid_file) = boot.pid_file {
        // SAFETY: the owner of the descriptor is in this copy of the master's memory. It is never used or
        // dropped here, because a worker does not return to the master's code.
        unsafe { descriptor::close(pid_file) };
    }
    // 2. The master's signal pipe: a signal to this process would wake the master.
    boot.master_signals.detach();
    // 3. All other descriptors of the master: the control socket, the links of siblings (a sibling could
    //    not detect the master's death), listeners of other generations (they would keep their port).
    //    Descriptors that the program opened before the fork stay open: if a number were reused for a
    //    client's connection, a handler would write into that. Descriptors of the shell are closed. This
    //    worker's listeners are duplicated, because the master's values in this copy of its memory also
    //    own the numbers. They are never dropped, so a draining worker could not close them.
    for listener in &mut boot.listeners {
        let own = listener.try_clone();
        *listener = Rc::new(own.map_err(|error| ("take over its listeners", error))?);
    }
    let mut keep: Vec<RawFd> = boot.listeners.iter().map(|fd| fd.as_raw_fd()).collect();
    keep.push(boot.link.as_raw_fd());
    keep.push(boot.adoption.tx.as_raw_fd());
    keep.push(boot.adoption.rx.as_raw_fd());
    keep.extend(logging::output_descriptor());
    keep.extend(logging::forwarding_fd());
    keep.extend(boot.access_file.iter().map(|file| file.as_raw_fd()));
    keep.extend(boot.registry.program_descriptors());
    keep.extend(boot.jobs.iter().map(|jobs| jobs.lock.raw_descriptor()));
    if let Some(isolated) = &boot.isolated {
        keep.push(isolated.master_pipe.as_raw_fd());
        if !is_session {
            keep.push(isolated.scoreboard.as_raw_fd());
        }
    }
    // SAFETY: the same applies to everything that belongs to the master.
    unsafe { descriptor::close_all_but(&keep) };
    // 4. The session and the terminal of the user who started the master: with them a handler could read
    //    what the operator types, and type into the operator's shell. This comes before the keeper, which
    //    shares the descriptors and the session.
    process::leave_session().map_err(|error| ("leave the session of the master", error))?;
    signal::ignore(&signal::IGNORED_BY_CHILDREN);
    let signals = SignalPipe::new(match boot.isolated {
        None => &[Signal::SIGTERM, Signal::SIGQUIT],
        Some(_) if !is_session => &[Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGCHLD],
        // A service manager sends TERM to all processes. A session waits for the order of its acceptor.
        Some(_) => {
            signal::ignore(&[Signal::SIGTERM]);
            &[Signal::SIGQUIT]
        }
    })
    .map_err(|error| ("catch signals", error))?;
    // 5. Root is dropped before anything of a client is used.
    if let Some(account) = boot.account() {
        privilege::drop_to(account).map_err(|error| ("drop root privileges", error))?;
    }
    // 6. While this worker lives, it reaps the processes that handlers leave behind.
    process::become_subreaper().map_err(|error| ("become a subreaper", error))?;
    // 7. This comes after the last change of user, which would clear it. A session outlives its acceptor, so
    //    it watches a pipe of the master instead.
    let grace = boot.settings.longest_drain();
    let is_watched = is_session
        || signal::on_parent_death(boot.master, grace)
            .map_err(|error| ("request a signal at the master's death", error))?;
    if !is_watched {
        return Err(("serve", io::Error::other("the master has died meanwhile")));
    }
    // This comes before the first thread, because it applies to the calling thread and its children. From
    // here on this process can open no memory of its acceptor, of a worker or of another session.
    if is_session {
        guard::enter_here().map_err(|error| ("enter its guard", error))?;
    }
    // 8. The keeper. It is a copy of this process at this point: without the master's descriptors, and without
    //    anything that is created below. Pool processes have no connections, and a session ends with its connection,
    //    so they need no keeper.
    let has_keeper = boot.settings.workers.keep_connections && boot.slot.is_worker();
    let keeping = has_keeper
        .then(|| keeper::make(boot))
        .transpose()
        .unwrap_or_else(|error| {
            log::warn!(
                "this worker has no keeper: {error}; if it crashes, its connections are closed; \
                 workers.keep-connections = false disables keepers"
            );
            None
        });
    // 9. From here on `ps` shows the role. The title is set after the keeper was made, so that a keeper is never
    //    shown with the title of a worker.
    boot.show(boot.role());
    // 10. Generators of random numbers are seeded after this, in `assembly::build`. One that was seeded before the fork
    //    would give all siblings the same numbers.
    signal::unblock_all();
    Ok((signals, keeping))
}

/// Takes write access to shared memory from a session, because an untrusted session could harm workers with it. The
/// master checks workers by the scoreboard. Workers refuse calls by the quarantine, and connections by the counts of
/// sources. The session keeps write access to the table of sessions, which has its own record, and to its counters.
fn leave_shared_memory(boot: &mut WorkerInit<'_>) -> io::Result<()> {
    if let Some(isolated) = &boot.isolated {
        shared_memory::make_read_only(boot.records.0, &isolated.scoreboard)?;
    }
    if let Some(sources) = boot.sources.take() {
        shared_memory::make_private(std::slice::from_ref(sources.tables))?;
    }
    boot.quarantine.leave()
}
