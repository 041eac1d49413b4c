//! Turns a forked child into the observer: it leaves everything that is not its own.
//!
//! It is one list whose order matters, as for workers (`src/worker/post_fork.rs`). It fails with the error
//! that the observer logs before it exits. It keeps its listening socket, a socket to the master and the
//! file of the metrics board, which was opened for reading only.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;

use crate::logging;
use crate::sys::clone_files::end_with_parent;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::title;
use crate::sys::{descriptor, privilege, process, shared_memory};
use crate::worker_init::ObserverInit;

/// The descriptors and signals of the observer.
pub struct OwnParts {
    pub listener: OwnedFd,
    pub signals: SignalPipe,
    pub board: Option<OwnedFd>,
}

/// Turns a copy of the master into the observer. All signals are blocked at the call, and unblocked on
/// success.
///
/// # Errors
/// The error of the system, with what was attempted.
pub fn init_observer_process(
    init: &mut ObserverInit<'_>,
) -> Result<OwnParts, (&'static str, io::Error)> {
    // 1. The lock of the pid file belongs to its open file description: kept open here, it would outlive
    //    the master.
    // SAFETY: the owner of the descriptor is in this copy of the master's memory. It is never used or
    // dropped here, because the observer does not return to the master's code.
    unsafe { descriptor::close(init.pid_file) };
    // 2. The master's signal pipe: a signal to this process would wake the master.
    init.master_signals.detach();
    // 3. All other descriptors of the master. The master's value in this copy of its memory owns the number
    //    of the listener too, so it is duplicated. The log stays until this list is done.
    let listener = init.listener.try_clone();
    let listener = listener.map_err(|error| ("take over its socket", error))?;
    let board = init.board.take();
    let mut keep: Vec<RawFd> = vec![listener.as_raw_fd(), init.link.as_raw_fd()];
    keep.extend(board.as_ref().map(AsRawFd::as_raw_fd));
    keep.extend(logging::output_descriptor());
    // SAFETY: the same applies to everything that belongs to the master.
    unsafe { descriptor::close_all_but(&keep) };
    // 4. Memory that workers and the master write. An attacker who has this process must not reach it.
    // SAFETY: only code of master and workers uses it, which never runs here. The handlers of faults write only
    // to an address that a worker has set.
    unsafe { shared_memory::unmap_shared() }.map_err(|error| ("leave shared memory", error))?;
    // 5. The session and the terminal of the user who started the master.
    process::leave_session().map_err(|error| ("leave the session of the master", error))?;
    signal::ignore(&signal::IGNORED_BY_CHILDREN);
    // See `PageServer::serve` for SIGTERM. The master orders the exit with SIGQUIT.
    let signals = SignalPipe::new(&[Signal::SIGTERM, Signal::SIGQUIT]);
    let signals = signals.map_err(|error| ("catch signals", error))?;
    // 6. Root is dropped before a byte of a client is read.
    if let Some(account) = &init.settings.account {
        privilege::drop_to(account).map_err(|error| ("drop root privileges", error))?;
    }
    // 7. After the last change of user, which would clear it.
    let is_watched = end_with_parent(init.master);
    if !is_watched.map_err(|error| ("request a signal at the master's death", error))? {
        return Err(("serve", io::Error::other("the master has died meanwhile")));
    }
    if let Some(area) = init.title {
        area.set(&format!("{}: observer", init.program));
    }
    title::set_comm(&init.program, "observer");
    // The log file is closed, because a rotated one must not stay open here.
    if init.settings.log.file.is_some() {
        logging::close_output();
    }
    signal::unblock_all();
    Ok(OwnParts {
        listener,
        signals,
        board,
    })
}
