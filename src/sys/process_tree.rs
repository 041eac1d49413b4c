//! Finds the processes below this one in /proc (proc(5)), and kills them without hitting another process.
//!
//! A pid found in /proc may soon belong to another process. So a process is first opened (pidfd_open(2)),
//! then checked again, and only then signalled through the pidfd. Nothing here fails: a process that
//! cannot be read or opened is skipped, and the caller tries again.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::bounded;
use super::process::{Pid, monotonic};

/// An open process. Even if its pid is reused, this still refers to the same process.
#[derive(Debug)]
pub struct PidFd {
    pidfd: OwnedFd,
}

impl PidFd {
    /// Opens the process that has this pid now; `None` if there is none, or no descriptor is left.
    pub fn open(pid: Pid) -> Option<Self> {
        // SAFETY: plain numbers; the call returns a new descriptor.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid.0, 0);
            let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
            Some(PidFd {
                pidfd: OwnedFd::from_raw_fd(fd),
            })
        }
    }

    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends it a signal. Does nothing if it has ended.
    pub fn signal(&self, signal: Signal) {
        use std::os::fd::AsRawFd;
        // SAFETY: with a null pointer the kernel makes the same siginfo as for kill(2).
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
}

impl AsFd for PidFd {
    /// The descriptor is readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Waits until all these processes have ended, for at most `limit`. Returns whether all have ended.
pub fn ends_within(pidfds: &[BorrowedFd<'_>], limit: Duration) -> bool {
    let end = monotonic().saturating_add(limit);
    for &pidfd in pidfds {
        loop {
            let left = end.saturating_sub(monotonic());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout) {
                Err(Errno::EINTR) => {}
                Ok(0) if left > Duration::from_millis(1) => {}
                Ok(1..) => break,
                _ => return false,
            }
        }
    }
    true
}

/// Returns the children of the first thread: those that it has started, and those that it adopted as a
/// subreaper because their parents have died. Children of other threads are not included.
pub fn direct_children() -> Vec<Pid> {
    let me = Pid::current();
    let path = format!("/proc/self/task/{me}/children");
    // Pids beyond the limit are found by a later call, when earlier processes are gone.
    match bounded::read_pieces(path, b' ', bounded::PIDS) {
        Ok(text) => {
            let pids = text.split(u8::is_ascii_whitespace);
            let pids = pids.filter_map(|pid| std::str::from_utf8(pid).ok()?.parse().ok());
            pids.map(Pid).collect()
        }
        // Without that file (a kernel without CONFIG_PROC_CHILDREN), use all children.
        Err(_) => {
            let parents = parents().into_iter();
            parents
                .filter(|(_, parent)| *parent == me)
                .map(|(pid, _)| pid)
                .collect()
        }
    }
}

/// Returns whether a process has ended and waits to be reaped.
pub fn is_zombie(pid: Pid) -> bool {
    stat(pid).is_some_and(|stat| stat.state == 'Z')
}

/// Returns the parent of a process.
pub fn parent(pid: Pid) -> Option<Pid> {
    stat(pid).map(|stat| stat.parent)
}

/// Returns the session of a process.
pub fn session(pid: Pid) -> Option<Pid> {
    stat(pid).map(|stat| stat.session)
}

/// Opens each of `roots` for which `is_one` still returns true after it was opened, and all its descendants.
pub fn open_with_descendants(roots: &[Pid], is_one: impl Fn(Pid) -> bool) -> Vec<PidFd> {
    let mut held = Vec::new();
    let mut above = Vec::new();
    for &root in roots {
        if let Some(one) = PidFd::open(root).filter(|_| is_one(root)) {
            held.push(one);
            above.push(root);
        }
    }
    held.extend(descendants(&above));
    held
}

/// Opens all descendants of `roots`, without `roots`.
pub fn descendants(roots: &[Pid]) -> Vec<PidFd> {
    let mut held = Vec::new();
    if roots.is_empty() {
        return held;
    }
    let parents = parents();
    let mut above = roots.to_vec();
    while let Some(parent) = above.pop() {
        for (&pid, _) in parents.iter().filter(|(_, of)| **of == parent) {
            // If the pid was reused, that process has another parent.
            let one = PidFd::open(pid).filter(|_| self::parent(pid) == Some(parent));
            held.extend(one);
            above.push(pid);
        }
    }
    held
}

/// Returns when a process began, in clock ticks since boot: field 22 of proc_pid_stat(5).
pub fn start_ticks(pid: Pid) -> Option<u64> {
    let text = bounded::read_lines(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Returns what [`start_ticks`] returns; `None` if the process has ended, even if it is not reaped yet.
pub fn living_since(pid: Pid) -> Option<u64> {
    start_ticks(pid).filter(|_| !is_zombie(pid))
}

/// Returns the value of an environment variable with which a process was started. Returns `None` also if the
/// environment cannot be read (another user's process), or if the variable is beyond [`bounded::ENVIRONMENT`]. It may
/// block for as long as the owner of the process wants.
pub fn variable(pid: Pid, name: &str) -> Option<String> {
    let path = format!("/proc/{pid}/environ");
    let bytes = bounded::read_pieces(path, 0, bounded::ENVIRONMENT).ok()?;
    bytes.split(|&byte| byte == 0).find_map(|pair| {
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(String::from_utf8_lossy(value).into_owned())
    })
}

/// Returns each process and its parent.
fn parents() -> BTreeMap<Pid, Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    entries
        .filter_map(|entry| {
            let pid = Pid(entry.ok()?.file_name().to_str()?.parse().ok()?);
            Some((pid, parent(pid)?))
        })
        .collect()
}

/// What proc_pid_stat(5) says of a process.
struct ProcessStat {
    state: char,
    parent: Pid,
    session: Pid,
}

/// Reads the state of a process. The name before it may contain spaces and parentheses.
fn stat(pid: Pid) -> Option<ProcessStat> {
    let text = bounded::read_lines(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = Pid(fields.next()?.parse().ok()?);
    let session = Pid(fields.nth(1)?.parse().ok()?);
    Some(ProcessStat {
        state,
        parent,
        session,
    })
}
