//! Wraps fork(2), wait(2), kill(2) and exit, and reads /proc about processes.
//!
//! What a child does first is in `worker::post_fork`; which process is whose child is known to `master`.
//! Fails with the system's error. `fork` panics if this process has a second thread, because the child
//! would inherit locks that no thread can release (fork(2)).

#![allow(unsafe_code)]

use std::cell::Cell;
use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::libc;
use nix::poll::poll;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd;
use serde::{Deserialize, Serialize};

use super::bounded;

/// The id of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Pid {
    pub fn current() -> Self {
        Pid(unistd::getpid().as_raw())
    }

    /// Returns the parent of the calling process: pid 1 or a subreaper if the original parent has died.
    pub fn parent() -> Self {
        Pid(unistd::getppid().as_raw())
    }

    fn raw(self) -> unistd::Pid {
        unistd::Pid::from_raw(self.0)
    }
}

/// The process in which `fork` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The parent. Holds the pid of the new child.
    Parent(Pid),
    Child,
}

/// How a process ended (wait(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By `exit` with this code, 0 to 255.
    Code(i32),
    Signal {
        number: i32,
        core_dumped: bool,
    },
}

impl Exit {
    /// Decodes a status of wait(2).
    fn of(status: libc::c_int) -> Self {
        if libc::WIFSIGNALED(status) {
            Exit::Signal {
                number: libc::WTERMSIG(status),
                core_dumped: libc::WCOREDUMP(status),
            }
        } else {
            Exit::Code(libc::WEXITSTATUS(status))
        }
    }

    /// Returns the exit code, or `None` if a signal ended the process.
    pub fn code(self) -> Option<i32> {
        match self {
            Exit::Code(code) => Some(code),
            Exit::Signal { .. } => None,
        }
    }

    /// Returns the name of the signal that ended the process, such as `SIGSEGV`, or `SIG40` for one
    /// without a name.
    pub fn signal_name(self) -> Option<String> {
        match self {
            Exit::Code(_) => None,
            Exit::Signal { number, .. } => Some(match Signal::try_from(number) {
                Ok(signal) => signal.as_str().to_owned(),
                Err(_) => format!("SIG{number}"),
            }),
        }
    }

    /// Returns whether this signal ended the process.
    pub fn is_signal(self, signal: Signal) -> bool {
        matches!(self, Exit::Signal { number, .. } if number == signal as i32)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal { core_dumped, .. } => {
                f.write_str(&self.signal_name().unwrap_or_default())?;
                f.write_str(if *core_dumped { " (core dumped)" } else { "" })
            }
        }
    }
}

/// Makes a child that is a copy of this process.
///
/// # Panics
/// If this process has more than one thread. That breaks the caller's invariant, and a child that
/// inherits a locked lock would hang later.
///
/// # Errors
/// EAGAIN or ENOMEM if no process can be created.
pub fn fork() -> io::Result<Fork> {
    let threads = thread_count();
    assert!(
        threads <= 1,
        "fork with {threads} threads alive: the child would inherit their locks"
    );
    // SAFETY: there is one thread, so no other thread holds a lock and the child's memory is consistent.
    // The child runs `worker::post_fork` and leaves by `_exit`.
    match unsafe { unistd::fork() }? {
        unistd::ForkResult::Parent { child } => Ok(Fork::Parent(Pid(child.as_raw()))),
        unistd::ForkResult::Child => Ok(Fork::Child),
    }
}

/// Returns whether `pid` is a child of this process that is not reaped yet (waitid(2), WNOWAIT).
pub fn is_child(pid: Pid) -> bool {
    // SAFETY: the structure is plain data for the kernel to fill.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_PID, pid.0.unsigned_abs(), &raw mut info, flags) == 0
    }
}

/// Returns whether a child is stopped by a signal such as SIGSTOP (waitid(2), WNOWAIT).
pub fn is_stopped(pid: Pid) -> bool {
    // SAFETY: the structure is plain data for the kernel to fill; without a stopped child it stays zero.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
        let done = libc::waitid(libc::P_PID, pid.0.unsigned_abs(), &raw mut info, flags);
        done == 0 && info.si_pid() == pid.0
    }
}

/// Waits until this process has one thread, at most `limit`. A joined thread is counted until the kernel
/// has removed it. No event reports that (a pidfd of a thread needs Linux 6.9), so this checks every
/// millisecond. Returns the number of threads, or 0 if /proc is not mounted.
pub fn wait_for_one_thread(limit: Duration) -> u64 {
    let end = monotonic().saturating_add(limit);
    loop {
        let threads = thread_count();
        if threads <= 1 || monotonic() >= end {
            return threads;
        }
        let _ = poll(&mut [], 1_u8);
    }
}

/// Returns the number of threads of this process, or 0 if /proc is not mounted.
pub fn thread_count() -> u64 {
    // The link count of a directory is the number of its subdirectories plus two. So one stat(2) is
    // enough.
    fs::metadata("/proc/self/task").map_or(0, |task| task.nlink().saturating_sub(2))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReapedChild {
    pub pid: Pid,
    pub exit: Exit,
    /// The highest resident memory in bytes (ru_maxrss, getrusage(2)).
    pub peak_rss_bytes: u64,
}

/// Reaps one ended child, without waiting, and returns its status. Returns `None` if no child has ended, or there is
/// no child.
pub fn reap_any() -> Option<ReapedChild> {
    wait_child(-1, libc::WNOHANG)
}

/// Reaps this child and returns its status. If `waits`, waits for its end; otherwise returns `None` if it has not
/// ended. A worker has threads that each wait for their own children, so it must use this and not `reap_any`.
pub fn reap(pid: Pid, waits: bool) -> Option<ReapedChild> {
    wait_child(pid.0, if waits { 0 } else { libc::WNOHANG })
}

thread_local! {
    static REAPED: Cell<ReapedUse> = const { Cell::new((Pid(0), Duration::ZERO, 0)) };
}

/// What reaped children have used: the pid of the last one; the CPU time of all of them and of the children that they
/// have reaped (ru_utime and ru_stime, getrusage(2)); and the highest resident memory of one in bytes.
pub type ReapedUse = (Pid, Duration, u64);

/// Returns the resource use of the children that this thread has reaped since the last call, and resets it. All values
/// are 0 if there were none.
pub fn take_reaped_use() -> ReapedUse {
    REAPED.replace((Pid(0), Duration::ZERO, 0))
}

fn length(time: libc::timeval) -> Duration {
    let micros = time.tv_sec * 1_000_000 + time.tv_usec;
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// wait4(2); `None` if no such child has ended.
fn wait_child(pid: libc::pid_t, flags: libc::c_int) -> Option<ReapedChild> {
    loop {
        let mut status = 0;
        // SAFETY: the structure is plain data for the kernel to fill; zero is a valid value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live values of the right type.
        let done = unsafe { libc::wait4(pid, &raw mut status, flags, &raw mut usage) };
        match Errno::result(done) {
            Err(Errno::EINTR) => {}
            Ok(pid @ 1..) => {
                let peak_rss_bytes = usage.ru_maxrss.unsigned_abs() * 1024;
                let (_, cpu, most) = REAPED.get();
                let cpu = cpu + length(usage.ru_utime) + length(usage.ru_stime);
                REAPED.set((Pid(pid), cpu, most.max(peak_rss_bytes)));
                return Some(ReapedChild {
                    pid: Pid(pid),
                    exit: Exit::of(status),
                    peak_rss_bytes,
                });
            }
            _ => return None,
        }
    }
}

/// Returns an ended child of the calling thread without reaping it, because another thread may wait for
/// it (waitid(2), __WNOTHREAD). Adopted children belong to the first thread.
pub fn ended_child() -> Option<Pid> {
    // SAFETY: the structure is plain data for the kernel to fill; without a child it stays zero.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WNOTHREAD;
        let done = libc::waitid(libc::P_ALL, 0, &raw mut info, flags);
        (done == 0 && info.si_pid() > 0).then(|| Pid(info.si_pid()))
    }
}

/// Sends a signal to a child that is not reaped yet, so its pid cannot belong to another process. A child
/// that has already ended is no error.
pub fn kill(pid: Pid, signal: Signal) {
    let _ = nix::sys::signal::kill(pid.raw(), signal);
}

/// Ends this process at once: no destructor, no atexit handler, no flush. A forked child must exit in
/// this way, because it shares the parent's files and must not run the parent's clean-up (_exit(2)).
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` is async-signal-safe and does not return.
    unsafe { libc::_exit(code) }
}

/// Makes orphaned descendants children of this process, so that it can reap them
/// (PR_SET_CHILD_SUBREAPER(2const)).
///
/// # Errors
/// None known on Linux since 3.4.
pub fn become_subreaper() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Leaves the session, the process group and the terminal of the parent (setsid(2)). Descriptor 0 becomes
/// /dev/null and descriptor 1 a copy of descriptor 2. Otherwise a handler could read what the operator
/// types, or type into the operator's shell (TIOCSTI, ioctl_tty(2)). Call it in a forked child, because
/// the leader of a process group cannot call setsid(2).
///
/// # Errors
/// EPERM in the leader of a process group; the errors of open(2) for /dev/null.
pub fn leave_session() -> io::Result<()> {
    unistd::setsid()?;
    unistd::dup2_stdin(fs::File::open("/dev/null")?)?;
    unistd::dup2_stdout(io::stderr())?;
    Ok(())
}

/// Raises the soft limit of open descriptors to the hard one and returns it (getrlimit(2)).
///
/// # Errors
/// Those of getrlimit and setrlimit.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// Returns the soft limit of open descriptors, and how many more this process may open. The second number
/// assumes that the open descriptors have the lowest numbers.
pub fn descriptors_left() -> (usize, usize) {
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let soft = usize::try_from(soft).unwrap_or(usize::MAX);
    let lowest = io::stderr().as_fd().try_clone_to_owned();
    let lowest = lowest.map_or(soft, |fd| fd.as_raw_fd().unsigned_abs() as usize);
    (soft, soft.saturating_sub(lowest))
}

/// Returns the soft limit of the processes of this user (RLIMIT_NPROC, getrlimit(2)); `None` if there is none, as
/// for root.
pub fn process_limit() -> Option<usize> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NPROC).ok()?;
    let is_limited = soft != RLIM_INFINITY && !unistd::geteuid().is_root();
    is_limited.then(|| usize::try_from(soft).unwrap_or(usize::MAX))
}

/// Returns the resident memory of a process in bytes, or 0 if it cannot be read (proc_pid_statm(5)).
pub fn resident_bytes(pid: Pid) -> u64 {
    let Ok(statm) = bounded::read_lines(format!("/proc/{pid}/statm")) else {
        return 0;
    };
    let pages: u64 = statm
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|field| field.parse().ok())
        .unwrap_or(0);
    let page_size = unistd::sysconf(unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .map_or(4096, |size| size.unsigned_abs());
    pages * page_size
}

/// Returns the CPU time of this process so far: user and system, all threads (getrusage(2)).
pub fn cpu_time() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        length(*usage.user_time().as_ref()) + length(*usage.system_time().as_ref())
    })
}

/// Returns the time since 1970, for people and other machines. The clock may jump.
pub fn unix_time() -> Duration {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default()
}

/// Returns the same time in seconds.
pub fn unix_seconds() -> u64 {
    unix_time().as_secs()
}

/// Returns the same time in milliseconds.
pub fn unix_time_ms() -> u64 {
    unix_time().as_millis() as u64
}

/// Returns the same time with its fraction.
pub fn unix_seconds_exact() -> f64 {
    unix_time().as_secs_f64()
}

/// Returns the time since boot without suspended time (CLOCK_MONOTONIC). It is the same in all processes
/// of a machine, and changes of the wall clock do not affect it.
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has CLOCK_MONOTONIC (clock_gettime(2))");
    Duration::new(
        now.num_seconds().unsigned_abs(),
        now.tv_nsec().unsigned_abs() as u32,
    )
}

/// Returns the same time in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = monotonic();
    now.as_secs() * 1_000_000_000 + u64::from(now.subsec_nanos())
}

/// Returns the time since boot with suspended time (CLOCK_BOOTTIME), in which start times of processes are given.
pub fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    now.unwrap_or_else(|_| monotonic())
}

/// Returns the time of the last tick of the kernel in milliseconds, at most 10 ms ago. A tenth of the cost of
/// the others (CLOCK_MONOTONIC_COARSE).
pub fn monotonic_coarse_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .expect("every Linux has CLOCK_MONOTONIC_COARSE (clock_gettime(2))");
    now.num_milliseconds().unsigned_abs()
}

/// Returns the time of CLOCK_MONOTONIC in milliseconds.
pub fn monotonic_ms() -> u64 {
    u64::try_from(monotonic().as_millis()).unwrap_or(u64::MAX)
}

/// Returns the current directory under the name that the user knows. `PWD` keeps the symbolic links of
/// the path that a shell followed; getcwd(2) does not. `PWD` is used only if it names this directory and
/// has no `.` or `..` component (as in pwd(1)).
///
/// # Errors
/// If the directory has no name, because it was deleted.
pub fn current_directory() -> io::Result<PathBuf> {
    named_directory(env::var_os("PWD").map(PathBuf::from)).map_or_else(env::current_dir, Ok)
}

fn named_directory(name: Option<PathBuf>) -> Option<PathBuf> {
    name.filter(|name| {
        let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        name.is_absolute() && name.components().all(is_plain) && is_same_file(name, Path::new("."))
    })
}

/// Returns whether two paths lead to the same file or directory.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "threads alive")]
    fn fork_refuses_to_run_beside_another_thread() {
        let (_hold, wait) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || wait.recv());
        let _ = fork();
    }

    #[test]
    fn ends_are_said_as_people_say_them() {
        let by = |number, core_dumped| Exit::Signal {
            number,
            core_dumped,
        };
        assert_eq!(by(11, true).to_string(), "SIGSEGV (core dumped)");
        assert_eq!(by(40, false).to_string(), "SIG40");
        assert_eq!(Exit::Code(3).to_string(), "exit code 3");
    }

    #[test]
    fn another_thread_is_waited_for_until_the_limit() {
        let (_hold, wait) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || wait.recv());
        let begin = monotonic();
        assert!(wait_for_one_thread(Duration::from_millis(20)) > 1);
        assert!(monotonic() - begin >= Duration::from_millis(20));
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn the_directory_keeps_the_users_name_while_that_is_valid() {
        let here = env::current_dir().unwrap();
        let place = tempfile::tempdir().unwrap();
        let link = place.path().join("link");
        std::os::unix::fs::symlink(&here, &link).unwrap();
        for good in [&here, &link] {
            assert_eq!(named_directory(Some(good.clone())).as_ref(), Some(good));
        }
        for bad in [".", "/", "/no/such", link.join("src/..").to_str().unwrap()] {
            assert_eq!(named_directory(Some(bad.into())), None, "{bad}");
        }
        assert_eq!(named_directory(None), None);
    }

    #[test]
    fn proc_knows_this_process() {
        assert!(thread_count() >= 1);
        assert!(resident_bytes(Pid::current()) > 100_000);
        assert_eq!(resident_bytes(Pid(-1)), 0);
    }
}
