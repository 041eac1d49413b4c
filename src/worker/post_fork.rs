//! What a new worker does first: leave everything that is the master's, become its own process.
//!
//! One list, in an order that matters; each step says why it stands where it does. Fails with
//! what the worker then tells the log before it leaves; it has served nobody yet.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::crash::keeper;
use super::crash::keeper::KeeperSetup;
use crate::logging;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::{descriptor, privilege, process};
use crate::worker_init::WorkerInit;

/// Signals that are the master's business. A worker is in a session of its own, so neither Ctrl-C nor
/// a closing terminal reaches it; but an operator may take a worker for the master.
const NOT_OURS: [Signal; 8] = [
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGPIPE,
    // A limit of file sizes is an error of write(2) then, which a log can live with.
    Signal::SIGXFSZ,
];

/// Turns a copy of the master into a worker, with a keeper where one is wanted and can be had. All
/// signals are blocked on entry, and are let through on success.
///
/// # Errors
/// What the system refused, with what was tried.
pub fn init_worker_process(
    boot: &mut WorkerInit<'_>,
) -> Result<(SignalPipe, Option<KeeperSetup>), (&'static str, io::Error)> {
    // 1. The pid file's lock belongs to the open file: kept here, it would outlive the master.
    // SAFETY: the master's value that owns it is in this copy of its memory, and is never used or
    // dropped here: a worker does not return to the master's code.
    unsafe { descriptor::close(boot.pid_file) };
    // 2. The master's signal pipe: a signal to this process would wake the master.
    boot.master_signals.detach();
    // 3. Every other descriptor of the master's: control socket, the siblings' links (a sibling
    //    could not tell that the master died), listeners of other generations (which would keep
    //    their port). What the program has opened before the fork stays open: if its number went to
    //    a client's connection, a handler would write into that. What the shell has passed on goes.
    //    Its own listeners too: the master's values in this copy of its memory own the numbers as
    //    well and are never dropped, so that a worker which drains could not close them.
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
    keep.extend(boot.registry.program_descriptors());
    // SAFETY: likewise for all that belongs to the master.
    unsafe { descriptor::close_all_but(&keep) };
    // 4. The session and the terminal of whoever has started the master: a handler with them could
    //    read what the operator types, and type into the operator's shell. Before the keeper is made,
    //    which shares the descriptors and the session.
    process::leave_session().map_err(|error| ("leave the session of the master", error))?;
    signal::ignore(&NOT_OURS);
    let signals = SignalPipe::new(&[Signal::SIGTERM, Signal::SIGQUIT])
        .map_err(|error| ("catch signals", error))?;
    // 5. Root is given up before anything of a client's is touched.
    if let Some(account) = &boot.settings.account {
        privilege::drop_to(account).map_err(|error| ("give up root", error))?;
    }
    // 6. What handlers leave behind is this worker's to end, not the master's while we live.
    process::become_subreaper().map_err(|error| ("become a subreaper", error))?;
    // 7. After the last change of user, which would take it back.
    let grace = boot.settings.workers.drain_timeout;
    match signal::on_parent_death(boot.master, grace) {
        Ok(true) => {}
        Ok(false) => {
            return Err(("serve", io::Error::other("the master has died meanwhile")));
        }
        Err(error) => return Err(("ask to be told of the master's death", error)),
    }
    // 8. The keeper, which is a copy of what has become of this process by now: it has nothing of
    //    the master's either, and nothing yet of what is to come.
    // A pool process has no connection.
    let has_keeper = boot.settings.workers.keep_connections && boot.slot.pool().is_none();
    let keeping = has_keeper
        .then(|| keeper::make(boot))
        .transpose()
        .unwrap_or_else(|error| {
            log::warn!(
                "this worker has no keeper: {error}; should it crash, its connections end with it. \
                 workers.keep-connections = false does without keepers"
            );
            None
        });
    // 9. From here on `ps` says who this is: not before, so that a keeper never bears that name, nor
    //    this process a keeper's.
    boot.show(boot.role());
    // 10. Nothing here draws random numbers yet; what will is to be seeded in this place, for the
    //    siblings have inherited the same state.
    signal::unblock_all();
    Ok((signals, keeping))
}
