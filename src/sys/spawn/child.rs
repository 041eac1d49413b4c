//! Runs in a child between clone and exec, while it shares the memory of its parent. It drops everything
//! inherited from this process, sets limits and user, and executes the program.
//!
//! It makes only system calls: no allocation, no lock, no libc wrapper that would act on all threads of
//! the parent. Fails with the step that failed; then the child exits.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;

use nix::errno::Errno;
use nix::libc;

use super::plan::{ProcessLimits, SpawnError, SpawnStep, SpawnTemplate};
use crate::sys::account::Account;
use crate::sys::guard;

/// All users can read the files that a child creates; only its user can write them.
const UMASK: libc::mode_t = 0o022;
/// The soft limit of descriptors if none is configured, as after a login. The limit of this process is
/// raised, and some programs close each number up to it or cannot handle numbers that large.
const FILES: u64 = 1024;

/// The input of the child, and where it writes its error.
pub(crate) struct Plan<'a> {
    pub template: &'a SpawnTemplate,
    pub argv: &'a [*const c_char],
    pub envp: &'a [*const c_char],
    /// The descriptors of the child, by their number there.
    pub stdio: &'a [RawFd],
    /// The rule set of its guard, if it has one.
    pub ruleset: Option<RawFd>,
    /// The pid of this process. The kernel kills the child when the thread that starts it ends.
    pub parent: libc::pid_t,
    pub failed: Cell<Option<SpawnError>>,
}

pub(crate) extern "C" fn become_program(plan: *mut c_void) -> c_int {
    // SAFETY: the plan belongs to the parent, which waits for the child and does not change it.
    let plan = unsafe { &*plan.cast_const().cast::<Plan<'_>>() };
    // SAFETY: this is the child of the clone in `spawn`.
    let Err(error) = unsafe { execute(plan) };
    plan.failed.set(Some(error));
    // SAFETY: `_exit` runs no clean-up of the parent.
    unsafe { libc::_exit(127) }
}

/// Turns the copy of this process into the program.
///
/// # Safety
/// Call it only in a child that shares memory with its suspended parent.
unsafe fn execute(plan: &Plan<'_>) -> Result<std::convert::Infallible, SpawnError> {
    let template = plan.template;
    let check = |step: SpawnStep, result: c_int| {
        Errno::result(result)
            .map(drop)
            .map_err(|errno| SpawnError { step, errno })
    };
    // SAFETY: system calls with plain numbers, and pointers to memory that the parent keeps alive. The wrappers used
    // here are plain system calls in glibc and musl. The wrappers of setuid(2) and similar calls are not, because
    // they change all threads. So they are not used here.
    unsafe {
        default_signals();
        // Give the child its own session and process group: with the terminal of our session it could
        // type into the operator's shell. A session leader without a terminal cannot open /dev/tty. A new
        // clone leads no group, so setsid does not fail.
        check(SpawnStep::Session, libc::setsid())?;
        for (number, &fd) in plan.stdio.iter().enumerate() {
            check(SpawnStep::Descriptors, libc::dup2(fd, number as c_int))?;
        }
        // All our descriptors have CLOEXEC; this covers a library that opened one without it.
        libc::syscall(
            libc::SYS_close_range,
            plan.stdio.len(),
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        set_limits(&template.limits).map_err(|errno| SpawnError {
            step: SpawnStep::Limits,
            errno,
        })?;
        // A process that already is that user needs no privilege to change, and may have none.
        if let Some(account) = &template.account
            && (libc::geteuid(), libc::getegid()) != (account.uid, account.gid)
        {
            become_account(account).map_err(|errno| SpawnError {
                step: SpawnStep::Account,
                errno,
            })?;
        }
        if let Some(ruleset) = plan.ruleset {
            // Do this before the death signal, because a change of credentials can clear that.
            guard::enter(ruleset).map_err(|errno| SpawnError {
                step: SpawnStep::Guard,
                errno,
            })?;
        }
        // Do this after the last change of user, which would clear it.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // If the parent died before the call, the signal never comes.
        if libc::getppid() != plan.parent {
            libc::_exit(127);
        }
        // Do this as the new user, who may have fewer rights to directories than this process.
        check(
            SpawnStep::Directory,
            libc::chdir(template.directory.as_ptr()),
        )?;
        libc::umask(UMASK);
        // Do this last: from here on a signal ends the child.
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        let path = template.program.as_ptr();
        libc::execve(path, plan.argv.as_ptr(), plan.envp.as_ptr());
    }
    Err(SpawnError {
        step: SpawnStep::Execute,
        errno: Errno::last(),
    })
}

/// Sets every signal to its default action, because exec keeps ignored signals ignored. It uses raw
/// system calls: libc reserves two signals, which the parent process may still have ignored.
///
/// # Safety
/// As for `execute`.
unsafe fn default_signals() {
    // Larger than the structure of any architecture; zero is SIG_DFL without flags and mask.
    let default = [0_u64; 8];
    for signal in 1..=64 {
        let (new, old) = (default.as_ptr(), ptr::null_mut::<c_void>());
        // SAFETY: SIG_DFL runs no code; the kernel refuses numbers that cannot be set.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, 8) };
    }
}

/// # Safety
/// As `execute`.
unsafe fn set_limits(limits: &ProcessLimits) -> Result<(), Errno> {
    let set = |resource, soft: u64, hard: u64| {
        let limit = libc::rlimit {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: the pointer is to a live structure.
        Errno::result(unsafe { libc::setrlimit(resource, &raw const limit) }).map(drop)
    };
    // No limit is raised above the one of this process.
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

/// Changes to the account in the order of `privilege`, for the same reasons. It uses raw system calls,
/// because the wrappers of libc would change all threads of the parent.
///
/// # Safety
/// As for `execute`.
unsafe fn become_account(account: &Account) -> Result<(), Errno> {
    let call = |result: libc::c_long| Errno::result(result).map(drop);
    let (uid, gid) = (account.uid, account.gid);
    // SAFETY: plain numbers, and a pointer to as many groups as the length says.
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
