//! Starts another program from a process with threads. The child shares the parent's memory until its
//! exec (clone(2) with CLONE_VFORK, as posix_spawn(3) does it). The parent gets a pidfd.
//!
//! posix_spawn itself supports neither resource limits nor another user. Between clone and exec the child makes only
//! system calls: no allocation, no lock, no libc wrapper that would act on all threads of the parent (setuid). The
//! child keeps none of these from its parent: descriptors above 2 (or 3), blocked or ignored signals, environment,
//! umask. Fails with the step that failed and the system's error; then there is no child. Needs Linux 5.4 (waiting for
//! a pidfd).

#![allow(unsafe_code)]

mod child;
mod plan;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CStr, c_char};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

pub use plan::{ProcessLimits, SpawnError, SpawnStep, SpawnTemplate};

use super::guard;
use super::lock::lock;
use super::process::{self, Pid, ReapedChild};
use super::process_tree;
use super::process_tree::ends_within;
use child::{Plan, become_program};

/// The size of the child's stack until its exec; its frames are small, and nothing recurses.
const STACK: usize = 64 * 1024;
/// The time that a killed child may take to end. Only a child that hangs in the kernel takes longer.
const DYING: Duration = Duration::from_secs(1);
/// The descriptors of a child: 0, 1, 2, and optionally 3.
#[derive(Debug, Clone, Copy)]
pub struct Stdio<'a> {
    pub stdin: BorrowedFd<'a>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// Descriptor 3: the socket for the calls of a pool program. `None` for other programs.
    pub calls: Option<BorrowedFd<'a>>,
}

/// Children that were started here and are not reaped. The search for adopted children skips them.
static CHILDREN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Killed children that did not end in time. They are reaped when they end.
static ABANDONED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Reaps the killed children that have ended since.
pub fn reap_abandoned() {
    let mut abandoned = lock(&ABANDONED);
    abandoned.retain(|&pid| {
        let ended = process::reap(pid, false).is_some();
        if ended {
            with_children(|children| children.remove(&pid.0));
        }
        !ended
    });
}

fn with_children<T>(look: impl FnOnce(&mut BTreeSet<i32>) -> T) -> T {
    look(&mut lock(&CHILDREN))
}

/// Returns whether `pid` is a child that was started here and is not reaped yet.
pub fn is_child(pid: Pid) -> bool {
    with_children(|children| children.contains(&pid.0))
}

pub fn children() -> Vec<Pid> {
    with_children(|children| children.iter().copied().map(Pid).collect())
}

/// A child that leads its own session and process group. When it is dropped, it is killed with its group
/// and reaped.
#[derive(Debug)]
pub struct ChildProcess {
    /// The pid of the child and of its group. It cannot be reused before it is reaped.
    pid: Pid,
    pidfd: OwnedFd,
    /// Whether its status was taken.
    reaped: bool,
}

/// Returns /dev/null for a child that must read nothing. Each process opens it when first needed; it is
/// never inherited.
///
/// # Errors
/// If no descriptor is left.
pub fn null() -> io::Result<BorrowedFd<'static>> {
    static NULL: OnceLock<File> = OnceLock::new();
    if let Some(file) = NULL.get() {
        return Ok(file.as_fd());
    }
    let file = File::open("/dev/null")?;
    Ok(NULL.get_or_init(|| file).as_fd())
}

/// Starts the program of `template`. `arguments` begin with argv[0]. `environment` is the whole environment of the
/// child. The kernel kills the child when this thread ends (PR_SET_PDEATHSIG(2const)). So call it in a thread that
/// waits for the child, or that lives as long as its process.
///
/// # Errors
/// The step that failed; then no child remains.
pub fn spawn(
    template: &SpawnTemplate,
    arguments: &[&CStr],
    environment: &[&CStr],
    stdio: Stdio<'_>,
) -> Result<ChildProcess, SpawnError> {
    // SAFETY: it has no arguments and cannot fail.
    let parent = unsafe { libc::getpid() };
    let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
        let strings = strings.iter().map(|string| string.as_ptr());
        strings.chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // The numbers must be above 3, because the child would overwrite lower ones. So duplicate those that
    // are lower.
    let (mut kept, mut fds) = (Vec::new(), Vec::with_capacity(4));
    let wanted = [stdio.stdin, stdio.stdout, stdio.stderr].into_iter();
    for fd in wanted.chain(stdio.calls) {
        let mut raw = fd.as_raw_fd();
        if raw <= 3 {
            // SAFETY: plain numbers; the call returns a new descriptor.
            let clone = unsafe { libc::fcntl(raw, libc::F_DUPFD_CLOEXEC, 4) };
            raw = Errno::result(clone).map_err(|errno| SpawnError {
                step: SpawnStep::Descriptors,
                errno,
            })?;
            // SAFETY: as above.
            kept.push(unsafe { OwnedFd::from_raw_fd(raw) });
        }
        fds.push(raw);
    }
    let ruleset = if template.guard {
        guard::ruleset().map_err(|errno| SpawnError {
            step: SpawnStep::Guard,
            errno,
        })?
    } else {
        None
    };
    let plan = Plan {
        template,
        argv: &argv,
        envp: &envp,
        stdio: &fds,
        ruleset,
        parent,
        failed: Cell::new(None),
    };
    let mut stack = Vec::<u8>::with_capacity(STACK);
    let mut pidfd: RawFd = -1;
    // SAFETY: the top of the allocation, aligned downwards to 16 bytes as the ABI requires.
    let top = unsafe { stack.as_mut_ptr().add(STACK) };
    let top = top.map_addr(|address| address & !15);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut mask = Mask::block_all();
    // SAFETY: the child runs `become_program` on its own stack. CLONE_VFORK suspends this thread until
    // the child has executed or exited, so the stack, `plan` and `pidfd` outlive that. All signals are
    // blocked, so no handler of this process runs in shared memory.
    let pid = unsafe {
        libc::clone(
            become_program,
            top.cast(),
            flags,
            ptr::from_ref(&plan).cast_mut().cast(),
            &raw mut pidfd,
        )
    };
    let created = Errno::result(pid);
    mask.restore();
    drop(stack);
    let pid = created.map_err(|errno| SpawnError {
        step: SpawnStep::Create,
        errno,
    })?;
    with_children(|children| children.insert(pid));
    let mut child = ChildProcess {
        pid: Pid(pid),
        // SAFETY: clone has stored a new descriptor there, which has no other owner.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        reaped: false,
    };
    match plan.failed.get() {
        None => Ok(child),
        Some(error) => {
            // The child has exited or is exiting, so this does not wait.
            child.reap();
            Err(error)
        }
    }
}

impl ChildProcess {
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Kills every process of its group, and the child itself if it has left the group.
    pub fn kill(&self) {
        if self.reaped {
            return;
        }
        // SAFETY: plain numbers; the group id cannot be reused while the child is not reaped.
        unsafe { libc::kill(-self.pid.0, libc::SIGKILL) };
        process::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
    }

    /// Asks only the child to exit (SIGTERM). It has to end the processes that it started.
    pub fn terminate(&self) {
        if !self.reaped {
            process::kill(self.pid, nix::sys::signal::Signal::SIGTERM);
        }
    }

    /// Kills it, its group, and all that descends from it, and takes its status. Waits for the child for
    /// at most one second. Returns `None` if it has not ended by then, because it is stuck in the kernel.
    pub fn kill_with_descendants(&mut self) -> Option<ReapedChild> {
        // Before the kill, because afterwards their parents are unknown.
        let below = process_tree::descendants(&[self.pid]);
        self.kill();
        below.iter().for_each(process_tree::PidFd::kill);
        if self.ends_within(DYING) {
            self.reap()
        } else {
            None
        }
    }

    /// Waits until the child has ended, at most `limit`. Returns whether it has.
    pub fn ends_within(&self, limit: Duration) -> bool {
        ends_within(&[self.pidfd.as_fd()], limit)
    }

    /// Records that the status was taken by code that waits for any child.
    pub fn set_reaped(&mut self) {
        self.reaped = true;
        with_children(|children| children.remove(&self.pid.0));
    }

    /// Reaps the child and returns its status. Waits for its end, so call it only when the child is known to have
    /// ended.
    pub fn reap(&mut self) -> Option<ReapedChild> {
        if self.reaped {
            return None;
        }
        self.reaped = true;
        let child = process::reap(self.pid, true);
        with_children(|children| children.remove(&self.pid.0));
        child
    }
}

impl AsFd for ChildProcess {
    /// The descriptor is readable once the child has ended (pidfd_open(2)).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.kill();
        if self.ends_within(DYING) {
            self.reap();
        } else {
            // The child hangs in the kernel, or belongs to another user.
            lock(&ABANDONED).push(self.pid);
        }
    }
}

/// The signal mask that the calling thread had before. `restore` sets it again; a drop does not.
struct Mask(libc::sigset_t);

impl Mask {
    fn block_all() -> Self {
        // SAFETY: both sets are plain data on this stack.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Mask(before)
        }
    }

    fn restore(&mut self) {
        // SAFETY: as above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
