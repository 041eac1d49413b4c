//! Processes below this one, by /proc (proc(5)): who they are, and ending them without mistaking
//! another process for one that has left meanwhile.
//!
//! A pid found in /proc may be another process's a moment later. So a process is held first
//! (pidfd_open(2)), then looked at once more, and only then signalled through what holds it.
//! Nothing here fails: who can't be seen or held is left out, and looked for again by the caller.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::bounded;
use super::process::{Pid, monotonic};

/// A process that is held: its pid may be another's by now, this is still it.
#[derive(Debug)]
pub struct PidFd {
    pidfd: OwnedFd,
}

impl PidFd {
    /// Holds whoever has this pid now.
    fn open(pid: Pid) -> Option<Self> {
        // SAFETY: plain numbers; what is returned is a descriptor of nobody else's.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid.0, 0);
            let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
            Some(PidFd {
                pidfd: OwnedFd::from_raw_fd(fd),
            })
        }
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        use std::os::fd::AsRawFd;
        // SAFETY: a null pointer asks for the siginfo that kill(2) would make.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
}

impl AsFd for PidFd {
    /// Readable once it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Waits until the processes of all these pidfds have ended, `limit` at most; tells whether they have.
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

/// The children of this process's first thread. Those are the ones that it has started itself, and
/// those that it adopts as a subreaper, whose parents have died; not what other threads start.
pub fn direct_children() -> Vec<Pid> {
    let me = Pid::current();
    let path = format!("/proc/self/task/{me}/children");
    // Beyond the limit they are found when those before them are gone.
    match bounded::read_pieces(path, b' ', bounded::PIDS) {
        Ok(text) => {
            let pids = text.split(u8::is_ascii_whitespace);
            let pids = pids.filter_map(|pid| std::str::from_utf8(pid).ok()?.parse().ok());
            pids.map(Pid).collect()
        }
        // A kernel without that file (CONFIG_PROC_CHILDREN): all children, then.
        Err(_) => {
            let parents = parents().into_iter();
            parents
                .filter(|(_, parent)| *parent == me)
                .map(|(pid, _)| pid)
                .collect()
        }
    }
}

/// Whether a process has ended and waits to be reaped.
pub fn is_zombie(pid: Pid) -> bool {
    stat(pid).is_some_and(|(state, _)| state == 'Z')
}

/// Holds each of `roots` that is (still) what `is_one` says, and all that descend from those.
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

/// Holds all that descend from `roots`, themselves left out.
pub fn descendants(roots: &[Pid]) -> Vec<PidFd> {
    let mut held = Vec::new();
    if roots.is_empty() {
        return held;
    }
    let parents = parents();
    let mut above = roots.to_vec();
    while let Some(parent) = above.pop() {
        for (&pid, _) in parents.iter().filter(|(_, of)| **of == parent) {
            // Its pid may be another's by now; that one has another parent then.
            let one = PidFd::open(pid).filter(|_| stat(pid).is_some_and(|(_, of)| of == parent));
            held.extend(one);
            above.push(pid);
        }
    }
    held
}

/// The value that a process was started with for this variable of its environment; `None` also
/// where that can't be read (another user's process), or stands beyond [`bounded::ENVIRONMENT`]. May
/// block for as long as the owner of the process likes.
pub fn variable(pid: Pid, name: &str) -> Option<String> {
    let path = format!("/proc/{pid}/environ");
    let bytes = bounded::read_pieces(path, 0, bounded::ENVIRONMENT).ok()?;
    bytes.split(|&byte| byte == 0).find_map(|pair| {
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(String::from_utf8_lossy(value).into_owned())
    })
}

/// Every process with its parent.
fn parents() -> BTreeMap<Pid, Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    entries
        .filter_map(|entry| {
            let pid = Pid(entry.ok()?.file_name().to_str()?.parse().ok()?);
            Some((pid, stat(pid)?.1))
        })
        .collect()
}

/// A process's state and parent. The name before them may hold blanks and parentheses.
fn stat(pid: Pid) -> Option<(char, Pid)> {
    let text = bounded::read_lines(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, Pid(fields.next()?.parse().ok()?)))
}
