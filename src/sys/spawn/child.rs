//! What a child does between clone and exec, while it shares the memory of its parent: it leaves
//! everything of ours, takes its limits and its user, and becomes its program.
//!
//! System calls and nothing else: no allocation, no lock, no libc wrapper that would act on all threads
//! of the parent. Fails with the step that failed; the child leaves then.

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

/// What files a child creates can be read by all, and written by its user.
const UMASK: libc::mode_t = 0o022;
/// The soft limit of descriptors where none is configured, as at a login: ours is raised, and
/// there are programs that close each number up to it, and some that can't count so far.
const FILES: u64 = 1024;

/// What the child reads, and writes why it failed.
pub(crate) struct Plan<'a> {
    pub template: &'a SpawnTemplate,
    pub argv: &'a [*const c_char],
    pub envp: &'a [*const c_char],
    /// By the number that each has in the child.
    pub stdio: &'a [RawFd],
    /// The rule set of its guard, if it is guarded.
    pub ruleset: Option<RawFd>,
    /// This process, if the kernel kills the child when the thread that starts it ends.
    pub dies_with: Option<libc::pid_t>,
    pub failed: Cell<Option<SpawnError>>,
}

pub(crate) extern "C" fn become_program(plan: *mut c_void) -> c_int {
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
    let check = |step: SpawnStep, result: c_int| {
        Errno::result(result)
            .map(drop)
            .map_err(|errno| SpawnError { step, errno })
    };
    // SAFETY: system calls with plain numbers, and pointers to what the parent keeps alive. The
    // wrappers used are bare system calls in glibc and musl; those of setuid and its like are not,
    // and are gone around.
    unsafe {
        default_signals();
        // A session of its own, and so a process group of its own: with the terminal of our session
        // it could type into the operator's shell. As a session leader it has no terminal, and
        // opens /dev/tty in vain. A fresh clone leads no group yet, so setsid is not refused.
        check(SpawnStep::Session, libc::setsid())?;
        for (number, &fd) in plan.stdio.iter().enumerate() {
            check(SpawnStep::Descriptors, libc::dup2(fd, number as c_int))?;
        }
        // All of ours have CLOEXEC: a belt, for a library that opened one without.
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
        // Who is that user already needs no rights for it, and may have none.
        if let Some(account) = &template.account
            && (libc::geteuid(), libc::getegid()) != (account.uid, account.gid)
        {
            become_account(account).map_err(|errno| SpawnError {
                step: SpawnStep::Account,
                errno,
            })?;
        }
        if let Some(ruleset) = plan.ruleset {
            // Before the death signal, which a change of credentials can take back.
            guard::enter(ruleset).map_err(|errno| SpawnError {
                step: SpawnStep::Guard,
                errno,
            })?;
        }
        if let Some(parent) = plan.dies_with {
            // After the last change of user, which would take it back.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before, and then nothing would kill this process.
            if libc::getppid() != parent {
                libc::_exit(127);
            }
        }
        // As that user, who may not enter what we may.
        check(
            SpawnStep::Directory,
            libc::chdir(template.directory.as_ptr()),
        )?;
        libc::umask(UMASK);
        // Last: from here on a signal ends us.
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
unsafe fn set_limits(limits: &ProcessLimits) -> Result<(), Errno> {
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
