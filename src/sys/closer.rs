//! Closes descriptors whose close may block, on a thread that is started when the first one arrives.
//!
//! A second thread holds each descriptor while the first one closes it, and then ends. The close at
//! the end of a thread does not wait for unsent bytes (inet_release in Linux: no lingering if the task is
//! exiting). So a close that would block for an hour does not keep other descriptors open. If no thread
//! can be started, the descriptors stay open, and the next call tries again.

#![allow(unsafe_code)]

use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::Builder;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::lock::lock;
use super::process::{Fork, exit_now, fork, thread_count};
use super::{descriptor, signal};

/// The stack size in bytes; these threads have few frames.
const STACK: usize = 64 * 1024;

struct Waiting {
    fds: Vec<OwnedFd>,
    has_thread: bool,
}

static WAITING: Mutex<Waiting> = Mutex::new(Waiting {
    fds: Vec::new(),
    has_thread: false,
});
static CAME: Condvar = Condvar::new();

/// Closes a descriptor soon and returns at once. The master must not call it, because it has only one
/// thread.
pub fn close(fd: OwnedFd) {
    let mut waiting = lock(&WAITING);
    waiting.fds.push(fd);
    if !waiting.has_thread {
        waiting.has_thread = start(run).is_ok();
    }
    CAME.notify_one();
}

fn start(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = Builder::new().name("closer".into()).stack_size(STACK);
    builder.spawn(run).map(drop)
}

fn run() {
    signal::block_all();
    loop {
        let mut waiting = lock(&WAITING);
        while waiting.fds.is_empty() {
            waiting = CAME.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let fds = mem::take(&mut waiting.fds);
        drop(waiting);
        close_all(fds);
    }
}

/// Closes the descriptors. If no second thread can be started, this thread waits for each close.
fn close_all(fds: Vec<OwnedFd>) {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (holds, is_held) = sync_channel(1);
    let (closed, are_closed) = channel::<()>();
    let started = start(move || {
        signal::block_all();
        // Get a separate descriptor table: from here on the descriptors are open in both.
        if unshare(CloneFlags::CLONE_FILES).is_ok() {
            // SAFETY: this thread has its own descriptor table and uses none of the closed descriptors.
            unsafe { descriptor::close_all_but(&numbers) };
        }
        let _ = holds.send(());
        let _ = are_closed.recv();
    });
    if started.is_ok() {
        let _ = is_held.recv();
    }
    drop(fds);
    drop(closed);
}

/// Closes a descriptor whose close may block, in a child: the close at the end of a process does not wait
/// for unsent bytes. It is for the master, whose only thread must not wait. If no process can be created,
/// the descriptor stays open. A process with more threads uses `close`.
pub fn close_in_child(fd: OwnedFd) {
    if thread_count() > 1 {
        return close(fd);
    }
    // A signal in the child must not write to the signal pipe that it shares with this process.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    match io::pipe().and_then(|pipe| Ok((fork()?, pipe))) {
        Ok((Fork::Child, (mut closed, _))) => {
            // SAFETY: this child never returns to the code that owns the descriptors.
            unsafe { descriptor::close_all_but(&[fd.as_raw_fd(), closed.as_raw_fd()]) };
            // Wait until the parent has closed its descriptor, or has ended.
            let _ = closed.read(&mut [0]);
            exit_now(0);
        }
        Ok((Fork::Parent(_), pipe)) => {
            drop(fd);
            drop(pipe);
        }
        Err(_) => drop(fd.into_raw_fd()),
    }
    if let Ok(mask) = mask {
        let _ = mask.thread_set_mask();
    }
}
