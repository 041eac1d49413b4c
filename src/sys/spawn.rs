//! Starting another program from a process with threads: a child that shares our memory until its
//! exec (clone(2) with CLONE_VFORK, as posix_spawn(3) does it), and a pidfd to hold it by.
//!
//! posix_spawn itself knows neither resource limits nor another user. Between clone and exec the
//! child makes system calls and nothing else: no allocation, no lock, no libc wrapper that would
//! act on all threads of the parent (setuid). It leaves everything of ours: descriptors above 2,
//! blocked and ignored signals, environment, umask. Fails with the step that failed and the
//! system's error; there is no child then. Needs Linux 5.4 (pidfds that can be waited for).

#![allow(unsafe_code)]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

use super::account::Account;
use super::process::{self, Exit, Pid};
use super::tree::ends_within;

/// The child's stack until its exec: its frames are small, and nothing of it recurses.
const STACK: usize = 64 * 1024;
/// What files a child creates can be read by all, and written by its user.
const UMASK: libc::mode_t = 0o022;
/// How long a killed child may take to end; longer takes only one that hangs in the kernel.
const DYING: Duration = Duration::from_secs(1);
/// The soft limit of descriptors where none is configured, as at a login: ours is raised, and
/// there are programs that close each number up to it, and some that can't count so far.
const FILES: u64 = 1024;

/// What all children of one kind have in common.
#[derive(Debug, Clone)]
pub struct Template {
    /// The program; absolute, for no search path is asked.
    pub program: CString,
    /// The working directory.
    pub directory: CString,
    /// Whom the child becomes, if anybody else.
    pub account: Option<Account>,
    /// Its resource limits.
    pub limits: Limits,
}

/// Resource limits (getrlimit(2)); `None` leaves ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Seconds of CPU time: then SIGXCPU, and SIGKILL one second later.
    pub cpu_seconds: Option<u64>,
    /// Bytes of address space.
    pub memory: Option<u64>,
    /// Open descriptors.
    pub files: Option<u64>,
    /// Processes of the child's user, threads counted.
    pub processes: Option<u64>,
}

/// Descriptors 0, 1 and 2 of a child.
#[derive(Debug, Clone, Copy)]
pub struct Stdio<'a> {
    /// Its standard input.
    pub stdin: BorrowedFd<'a>,
    /// Its standard output.
    pub stdout: BorrowedFd<'a>,
    /// Its standard error.
    pub stderr: BorrowedFd<'a>,
}

/// What a child could not do, which is why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Be created.
    Create,
    /// Lead a process group.
    Group,
    /// Take its descriptors.
    Descriptors,
    /// Take its limits.
    Limits,
    /// Become its user.
    Account,
    /// Enter its directory.
    Directory,
    /// Become its program.
    Execute,
}

/// Why there is no child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpawnError {
    /// What failed.
    pub step: Step,
    /// With what.
    pub errno: Errno,
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match self.step {
            Step::Create => "no process could be created",
            Step::Group => "it could not lead a process group",
            Step::Descriptors => "it could not take its descriptors",
            Step::Limits => "it could not take its limits",
            Step::Account => "it could not become its user",
            Step::Directory => "it could not enter its directory",
            Step::Execute => "the program could not be executed",
        };
        write!(f, "{step}: {}", self.errno.desc())
    }
}

impl std::error::Error for SpawnError {}

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

/// All of those children.
pub fn children() -> Vec<Pid> {
    with_children(|children| children.iter().copied().map(Pid).collect())
}

/// A child, leader of a process group of its own. Dropped, it is killed with its group and reaped.
#[derive(Debug)]
pub struct Child {
    /// Its pid, and its group's; nobody else's before it is reaped.
    pid: Pid,
    pidfd: OwnedFd,
    /// Whether its status was taken.
    reaped: bool,
}

/// Starts the program of `template`. `arguments` begin with the program's name for itself;
/// `environment` is all that it gets.
///
/// # Errors
/// What failed; nothing of the child is left then.
pub fn spawn(
    template: &Template,
    arguments: &[&CStr],
    environment: &[&CStr],
    stdio: Stdio<'_>,
) -> Result<Child, SpawnError> {
    let pointers = |strings: &[&CStr]| -> Vec<*const c_char> {
        let strings = strings.iter().map(|string| string.as_ptr());
        strings.chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // Above 2, or one of them would be overwritten by another: clones, where need be.
    let (mut kept, mut fds) = (Vec::new(), [0; 3]);
    for (at, fd) in [stdio.stdin, stdio.stdout, stdio.stderr]
        .into_iter()
        .enumerate()
    {
        fds[at] = fd.as_raw_fd();
        if fds[at] <= 2 {
            let clone = fd.try_clone_to_owned().map_err(|error| SpawnError {
                step: Step::Descriptors,
                errno: errno_of(&error),
            })?;
            fds[at] = clone.as_raw_fd();
            kept.push(clone);
        }
    }
    let plan = Plan {
        template,
        argv: &argv,
        envp: &envp,
        stdio: fds,
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
        step: Step::Create,
        errno,
    })?;
    with_children(|children| children.insert(pid));
    let mut child = Child {
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

fn errno_of(error: &io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::UnknownErrno, Errno::from_raw)
}

impl Child {
    /// Its pid.
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

    /// Waits until it has ended, `limit` at most; tells whether it has.
    pub fn ends_within(&self, limit: Duration) -> bool {
        ends_within(&[self.pidfd.as_fd()], limit)
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

impl AsFd for Child {
    /// Readable once it has ended (pidfd_open(2)).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
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

/// What the child reads, and writes why it failed.
struct Plan<'a> {
    template: &'a Template,
    argv: &'a [*const c_char],
    envp: &'a [*const c_char],
    stdio: [RawFd; 3],
    failed: Cell<Option<SpawnError>>,
}

extern "C" fn become_program(plan: *mut c_void) -> c_int {
    // SAFETY: it is the parent's plan, which waits for us and touches nothing.
    let plan = unsafe { &*plan.cast_const().cast::<Plan<'_>>() };
    // SAFETY: we are the child of the clone in `spawn`.
    let Err(error) = unsafe { execute(plan) };
    plan.failed.set(Some(error));
    // SAFETY: leaves without anything of the parent's being undone.
    unsafe { libc::_exit(127) }
}

/// The way from a copy of ours to the program.
///
/// # Safety
/// To be called in a child that shares memory with its suspended parent, and nowhere else.
unsafe fn execute(plan: &Plan<'_>) -> Result<std::convert::Infallible, SpawnError> {
    let template = plan.template;
    let check = |step: Step, result: c_int| {
        Errno::result(result)
            .map(drop)
            .map_err(|errno| SpawnError { step, errno })
    };
    // SAFETY: system calls with plain numbers, and pointers to what the parent keeps alive. The
    // wrappers used are bare system calls in glibc and musl; those of setuid and its like are not,
    // and are gone around.
    unsafe {
        default_signals();
        check(Step::Group, libc::setpgid(0, 0))?;
        for (number, &fd) in plan.stdio.iter().enumerate() {
            check(Step::Descriptors, libc::dup2(fd, number as c_int))?;
        }
        // All of ours have CLOEXEC: a belt, for a library that opened one without.
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        set_limits(&template.limits).map_err(|errno| SpawnError {
            step: Step::Limits,
            errno,
        })?;
        if let Some(account) = &template.account {
            become_account(account).map_err(|errno| SpawnError {
                step: Step::Account,
                errno,
            })?;
        }
        // As that user, who may not enter what we may.
        check(Step::Directory, libc::chdir(template.directory.as_ptr()))?;
        libc::umask(UMASK);
        // Last: from here on a signal ends us.
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        let path = template.program.as_ptr();
        libc::execve(path, plan.argv.as_ptr(), plan.envp.as_ptr());
    }
    Err(SpawnError {
        step: Step::Execute,
        errno: Errno::last(),
    })
}

/// Every signal's default: exec keeps what is ignored. By raw calls, for libc keeps two signals to
/// itself, which whoever started us may ignore all the same.
///
/// # Safety
/// As `execute`.
unsafe fn default_signals() {
    // Larger than any architecture's; zero is SIG_DFL with neither flags nor mask.
    let default = [0_u64; 8];
    for signal in 1..=64 {
        let (new, old) = (default.as_ptr(), ptr::null_mut::<c_void>());
        // SAFETY: SIG_DFL runs no code; numbers that may not be set are refused.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, 8) };
    }
}

/// # Safety
/// As `execute`.
unsafe fn set_limits(limits: &Limits) -> Result<(), Errno> {
    let set = |resource, soft: u64, hard: u64| {
        let limit = libc::rlimit {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: a pointer to a live structure.
        Errno::result(unsafe { libc::setrlimit(resource, &raw const limit) }).map(drop)
    };
    // Nobody's limit is raised above ours.
    let within = |resource, wanted: u64| {
        let mut ours = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: likewise.
        Errno::result(unsafe { libc::getrlimit(resource, &raw mut ours) })?;
        Ok::<u64, Errno>(wanted.min(ours.rlim_max))
    };
    if let Some(seconds) = limits.cpu_seconds {
        let seconds = within(libc::RLIMIT_CPU, seconds)?;
        let hard = within(libc::RLIMIT_CPU, seconds.saturating_add(1))?;
        set(libc::RLIMIT_CPU, seconds, hard)?;
    }
    for (resource, wanted) in [
        (libc::RLIMIT_AS, limits.memory),
        (libc::RLIMIT_NPROC, limits.processes),
        (libc::RLIMIT_NOFILE, limits.files),
    ] {
        if let Some(wanted) = wanted {
            let value = within(resource, wanted)?;
            set(resource, value, value)?;
        }
    }
    if limits.files.is_none() {
        let hard = within(libc::RLIMIT_NOFILE, u64::MAX)?;
        set(libc::RLIMIT_NOFILE, hard.min(FILES), hard)?;
    }
    Ok(())
}

/// The order is `privilege`'s, and so are the reasons; by raw calls, because libc's wrappers would
/// ask all threads of the parent to change as well.
///
/// # Safety
/// As `execute`.
unsafe fn become_account(account: &Account) -> Result<(), Errno> {
    let call = |result: libc::c_long| Errno::result(result).map(drop);
    let (uid, gid) = (account.uid, account.gid);
    // SAFETY: plain numbers, and a pointer to as many groups as are said.
    unsafe {
        let groups = account.groups.as_ptr();
        call(libc::syscall(
            libc::SYS_setgroups,
            account.groups.len(),
            groups,
        ))?;
        for capability in 0..64 {
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 {
                break;
            }
        }
        call(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        call(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        Errno::result(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
    }
    Ok(())
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
#[path = "spawn_tests.rs"]
mod tests;
