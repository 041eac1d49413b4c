//! Closes descriptors whose close may block, on a thread of its own that is started when the first
//! one comes.
//!
//! A second thread, which ends at once, holds each of them while the first one closes it: what the
//! end of a thread closes waits for no unsent bytes (inet_release in Linux: no lingering where the
//! task is exiting). So one that would block for an hour keeps no other one open. What can't be
//! started is tried again with the next descriptor; until then they stay open.

#![allow(unsafe_code)]

use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::Builder;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::process::{Fork, exit_now, fork, thread_count};
use super::{descriptor, signal};

/// Bytes of a stack: these threads call next to nothing.
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

/// Closes a descriptor soon. Returns at once. Not for the master, which has one thread.
pub fn close(fd: OwnedFd) {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        while waiting.fds.is_empty() {
            waiting = CAME.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let fds = mem::take(&mut waiting.fds);
        drop(waiting);
        close_all(fds);
    }
}

/// Where the second thread can't be had, this one waits.
fn close_all(fds: Vec<OwnedFd>) {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let (holds, is_held) = sync_channel(1);
    let (closed, are_closed) = channel::<()>();
    let started = start(move || {
        signal::block_all();
        // A table of its own: the descriptors are open in both from here on.
        if unshare(CloneFlags::CLONE_FILES).is_ok() {
            // SAFETY: this thread has a descriptor table of its own, and uses none of the closed ones.
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

/// Closes a descriptor whose close may block, in a child: what the end of a process closes waits
/// for no unsent bytes. For the master, whose only thread must not wait. Without a process to be had
/// it stays open. A process with more threads leaves it to one of them.
pub fn close_in_child(fd: OwnedFd) {
    if thread_count() > 1 {
        return close(fd);
    }
    // The child must not take a signal to the pipe that it shares with this process.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    match io::pipe().and_then(|pipe| Ok((fork()?, pipe))) {
        Ok((Fork::Child, (mut closed, _))) => {
            // SAFETY: this child never returns to the code that owns the descriptors.
            unsafe { descriptor::close_all_but(&[fd.as_raw_fd(), closed.as_raw_fd()]) };
            // Until the other process has closed its own, or is gone.
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
