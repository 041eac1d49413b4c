//! Starting another program from a process with threads: a child that shares our memory until its
//! exec (clone(2) with CLONE_VFORK, as posix_spawn(3) does it), and a pidfd to hold it by.
//!
//! posix_spawn itself knows neither resource limits nor another user. Between clone and exec the
//! child makes system calls and nothing else: no allocation, no lock, no libc wrapper that would
//! act on all threads of the parent (setuid). It leaves everything of ours: descriptors above 2,
//! blocked and ignored signals, environment, umask. Fails with the step that failed and the
//! system's error; there is no child then. Needs Linux 5.4 (pidfds that can be waited for).

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
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

pub use plan::{ProcessLimits, SpawnError, SpawnStep, SpawnTemplate};

use super::guard;
use super::process::{self, Exit, Pid};
use super::process_tree;
use super::process_tree::ends_within;
use child::{Plan, become_program};

/// The child's stack until its exec: its frames are small, and nothing of it recurses.
const STACK: usize = 64 * 1024;
/// How long a killed child may take to end; longer takes only one that hangs in the kernel.
const DYING: Duration = Duration::from_secs(1);
/// The descriptors of a child: 0, 1, 2, and for some one more, 3.
#[derive(Debug, Clone, Copy)]
pub struct Stdio<'a> {
    /// Its standard input.
    pub stdin: BorrowedFd<'a>,
    /// Its standard output.
    pub stdout: BorrowedFd<'a>,
    /// Its standard error.
    pub stderr: BorrowedFd<'a>,
    /// Descriptor 3, if it has one.
    pub calls: Option<BorrowedFd<'a>>,
}

/// Children that were started here and are not reaped: those that a look for adopted ones leaves.
static CHILDREN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Children that did not end when they were killed, to be reaped when they do.
static ABANDONED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Takes the status of those that did not end when they were killed, and have ended since.
pub fn reap_abandoned() {
    let mut abandoned = ABANDONED.lock().unwrap_or_else(PoisonError::into_inner);
    abandoned.retain(|&pid| {
        let ended = process::reap(pid, false).is_some();
        if ended {
            with_children(|children| children.remove(&pid.0));
        }
        !ended
    });
}

fn with_children<T>(look: impl FnOnce(&mut BTreeSet<i32>) -> T) -> T {
    look(&mut CHILDREN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether `pid` is a child that was started here and is not reaped yet.
pub fn is_child(pid: Pid) -> bool {
    with_children(|children| children.contains(&pid.0))
}

pub fn children() -> Vec<Pid> {
    with_children(|children| children.iter().copied().map(Pid).collect())
}

/// A child, leader of a session and a process group of its own. Dropped, it is killed with its group
/// and reaped.
#[derive(Debug)]
pub struct ChildProcess {
    /// Its pid, and its group's; nobody else's before it is reaped.
    pid: Pid,
    pidfd: OwnedFd,
    /// Whether its status was taken.
    reaped: bool,
}

/// /dev/null, for a child that is to read nothing; of each process of ours opened when it is first
/// needed, never inherited.
///
/// # Errors
/// When there is no descriptor left.
pub fn null() -> io::Result<BorrowedFd<'static>> {
    static NULL: OnceLock<File> = OnceLock::new();
    if let Some(file) = NULL.get() {
        return Ok(file.as_fd());
    }
    let file = File::open("/dev/null")?;
    Ok(NULL.get_or_init(|| file).as_fd())
}

/// Starts the program of `template`. `arguments` begin with the program's name for itself;
/// `environment` is all that it gets.
///
/// # Errors
/// What failed; nothing of the child is left then.
pub fn spawn(
    template: &SpawnTemplate,
    arguments: &[&CStr],
    environment: &[&CStr],
    stdio: Stdio<'_>,
) -> Result<ChildProcess, SpawnError> {
    start(template, arguments, environment, stdio, None)
}

/// The same, and the kernel kills the child when this thread ends (PR_SET_PDEATHSIG(2const)): for a
/// thread that waits for the end of the child, or that lives as long as its process.
///
/// # Errors
/// As `spawn`.
pub fn spawn_dying_with_us(
    template: &SpawnTemplate,
    arguments: &[&CStr],
    environment: &[&CStr],
    stdio: Stdio<'_>,
) -> Result<ChildProcess, SpawnError> {
    // SAFETY: it has no arguments and cannot fail.
    let parent = unsafe { libc::getpid() };
    start(template, arguments, environment, stdio, Some(parent))
}

fn start(
    template: &SpawnTemplate,
    arguments: &[&CStr],
    environment: &[&CStr],
    stdio: Stdio<'_>,
    dies_with: Option<libc::pid_t>,
) -> Result<ChildProcess, SpawnError> {
    let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
        let strings = strings.iter().map(|string| string.as_ptr());
        strings.chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // Above 3, or one of them would be overwritten by another: clones, where need be.
    let (mut kept, mut fds) = (Vec::new(), Vec::with_capacity(4));
    let wanted = [stdio.stdin, stdio.stdout, stdio.stderr].into_iter();
    for fd in wanted.chain(stdio.calls) {
        let mut raw = fd.as_raw_fd();
        if raw <= 3 {
            // SAFETY: plain numbers; what is returned is a descriptor of nobody else's.
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
        dies_with,
        failed: Cell::new(None),
    };
    let mut stack = Vec::<u8>::with_capacity(STACK);
    let mut pidfd: RawFd = -1;
    // SAFETY: the top of the allocation, aligned downwards to 16 bytes as the ABI asks.
    let top = unsafe { stack.as_mut_ptr().add(STACK) };
    let top = top.map_addr(|address| address & !15);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut mask = Mask::block_all();
    // SAFETY: the child runs `become_program` on a stack of its own, which outlives it, because
    // CLONE_VFORK suspends this thread until the child has executed or left; `plan` and `pidfd`
    // live as long. All signals are blocked, so no handler of ours runs in shared memory.
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
        // SAFETY: clone has put a descriptor there that nobody else owns.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        reaped: false,
    };
    match plan.failed.get() {
        None => Ok(child),
        Some(error) => {
            // It has left already, or is on its way: nothing is waited for.
            child.reap();
            Err(error)
        }
    }
}

impl ChildProcess {
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends every process of its group, and itself should it have left that.
    pub fn kill(&self) {
        if self.reaped {
            return;
        }
        // SAFETY: plain numbers; the group's number is taken as long as the child is not reaped.
        unsafe { libc::kill(-self.pid.0, libc::SIGKILL) };
        process::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
    }

    /// Asks it to leave (SIGTERM), and nobody else of its group: what it started is its business.
    pub fn terminate(&self) {
        if !self.reaped {
            process::kill(self.pid, nix::sys::signal::Signal::SIGTERM);
        }
    }

    /// Kills it, its group, and all that descends from it, and takes its status. Waits until it
    /// has ended, which takes long only for what hangs in the kernel.
    pub fn kill_with_descendants(&mut self) -> Option<Exit> {
        // Before the kill: afterwards nobody could say whose children they were.
        let below = process_tree::descendants(&[self.pid]);
        self.kill();
        below.iter().for_each(process_tree::PidFd::kill);
        if self.ends_within(DYING) {
            self.reap()
        } else {
            None
        }
    }

    /// Waits until it has ended, `limit` at most; tells whether it has.
    pub fn ends_within(&self, limit: Duration) -> bool {
        ends_within(&[self.pidfd.as_fd()], limit)
    }

    /// Its status was taken by who waits for any child.
    pub fn was_reaped(&mut self) {
        self.reaped = true;
        with_children(|children| children.remove(&self.pid.0));
    }

    /// Takes its status. Waits for its end, so that is to be known before.
    pub fn reap(&mut self) -> Option<Exit> {
        if self.reaped {
            return None;
        }
        self.reaped = true;
        let exit = process::reap(self.pid, true);
        with_children(|children| children.remove(&self.pid.0));
        exit
    }
}

impl AsFd for ChildProcess {
    /// Readable once it has ended (pidfd_open(2)).
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
            // It hangs in the kernel, or is another user's.
            ABANDONED
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(self.pid);
        }
    }
}

/// The calling thread's signal mask, to be put back.
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
