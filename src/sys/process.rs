//! Processes: the one `fork` of the crate, waiting, signalling, leaving, and what /proc knows.
//!
//! Leaves to others what a child does first (`worker::hygiene`) and who is whose (`master`).
//! Fails with the system's own error; `fork` panics when this process has a second thread,
//! because the child would inherit locks that nobody is left to release (fork(2)).

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::libc;
use nix::poll::poll;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd;

use super::bounded;

/// The id of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Pid {
    /// The calling process.
    pub fn current() -> Self {
        Pid(unistd::getpid().as_raw())
    }

    /// The parent of the calling process; 1 or a subreaper once the real one has died.
    pub fn parent() -> Self {
        Pid(unistd::getppid().as_raw())
    }

    fn raw(self) -> unistd::Pid {
        unistd::Pid::from_raw(self.0)
    }
}

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The parent, with the pid of the new child.
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
    /// What a status of wait(2) says.
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

    /// The exit code, unless a signal ended it.
    pub fn code(self) -> Option<i32> {
        match self {
            Exit::Code(code) => Some(code),
            Exit::Signal { .. } => None,
        }
    }

    /// The name of the signal that ended it, such as `SIGSEGV`; `SIG40` for one without a name.
    pub fn signal_name(self) -> Option<String> {
        match self {
            Exit::Code(_) => None,
            Exit::Signal { number, .. } => Some(match Signal::try_from(number) {
                Ok(signal) => signal.as_str().to_owned(),
                Err(_) => format!("SIG{number}"),
            }),
        }
    }

    /// Whether this signal ended it.
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
/// When this process has more than one thread: the caller's invariant is broken, and a child
/// that inherits a locked lock would hang at some later time instead.
///
/// # Errors
/// EAGAIN or ENOMEM when the system has no process to give.
pub fn fork() -> io::Result<Fork> {
    let threads = thread_count();
    assert!(
        threads <= 1,
        "fork with {threads} threads alive: the child would inherit their locks"
    );
    // SAFETY: there is one thread, so no lock is held by another one and the child's memory is
    // consistent; the child runs `worker::hygiene` and leaves by `_exit`.
    match unsafe { unistd::fork() }? {
        unistd::ForkResult::Parent { child } => {
            let pid = Pid(child.as_raw());
            with_forked(|forked| forked.insert(pid));
            Ok(Fork::Parent(pid))
        }
        unistd::ForkResult::Child => Ok(Fork::Child),
    }
}

/// Children by `fork` that are not reaped: what else is a child was adopted.
static FORKED: Mutex<BTreeSet<Pid>> = Mutex::new(BTreeSet::new());

fn with_forked<T>(look: impl FnOnce(&mut BTreeSet<Pid>) -> T) -> T {
    look(&mut FORKED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// From now on `pid` counts as forked here: the program that this process ran before has done it.
pub fn has_forked(pid: Pid) {
    with_forked(|forked| forked.insert(pid));
}

/// From now on it does not: nobody here will reap it.
pub fn forget_forked(pid: Pid) {
    with_forked(|forked| forked.remove(&pid));
}

/// Whether `pid` is a child of this process that is not reaped yet (waitid(2), WNOWAIT).
pub fn is_child(pid: Pid) -> bool {
    // SAFETY: the structure is plain data for the kernel to fill.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_PID, pid.0.unsigned_abs(), &raw mut info, flags) == 0
    }
}

/// Whether `pid` is a child that was forked here and is not reaped yet.
pub fn is_forked(pid: Pid) -> bool {
    with_forked(|forked| forked.contains(&pid))
}

/// Waits until this process has one thread, at most `limit`. A thread that was joined is counted until
/// the kernel has taken it down, and no event tells when that is done (a pidfd of a thread needs Linux
/// 6.9), so this looks every millisecond. Returns the number of threads, 0 where /proc is not mounted.
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

/// The threads of this process, or 0 where /proc is not mounted.
pub fn thread_count() -> u64 {
    // A directory's link count is two more than its subdirectories: one stat(2), no listing.
    fs::metadata("/proc/self/task").map_or(0, |task| task.nlink().saturating_sub(2))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReapedChild {
    pub pid: Pid,
    pub exit: Exit,
    /// The most memory that it ever had resident, in bytes (ru_maxrss, getrusage(2)).
    pub peak_rss_bytes: u64,
}

/// Takes the status of one ended child, whichever it is, without waiting (wait4(2)). `None`: no
/// child has ended, or there is none.
pub fn reap_any() -> Option<ReapedChild> {
    loop {
        let mut status = 0;
        // SAFETY: the structure is plain data for the kernel to fill; zero is a valid value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live values of the right type.
        let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
        match Errno::result(pid) {
            Err(Errno::EINTR) => continue,
            Ok(1..) => {}
            _ => return None,
        }
        with_forked(|forked| forked.remove(&Pid(pid)));
        return Some(ReapedChild {
            pid: Pid(pid),
            exit: Exit::of(status),
            peak_rss_bytes: usage.ru_maxrss.unsigned_abs() * 1024,
        });
    }
}

/// Takes the status of this one child; `waits` for its end, or gives `None` when it has not come.
/// A worker has threads that each wait for children of their own, so never for just any.
pub fn reap(pid: Pid, waits: bool) -> Option<Exit> {
    let mut status = 0;
    let flags = if waits { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: the pointer is to a live value of the right type.
        let done = unsafe { libc::waitpid(pid.0, &raw mut status, flags) };
        match Errno::result(done) {
            Err(Errno::EINTR) => {}
            Ok(1..) => return Some(Exit::of(status)),
            _ => return None,
        }
    }
}

/// A child of the calling thread that has ended, adopted ones being the first thread's; it is not
/// reaped, for it may be somebody's who waits for it (waitid(2), __WNOTHREAD).
pub fn ended_child() -> Option<Pid> {
    // SAFETY: the structure is plain data for the kernel to fill; without a child it stays zero.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WNOTHREAD;
        let done = libc::waitid(libc::P_ALL, 0, &raw mut info, flags);
        (done == 0 && info.si_pid() > 0).then(|| Pid(info.si_pid()))
    }
}

/// Sends a signal to a child that has not been reaped yet (so its pid can't be another's).
/// One that is already gone is no error.
pub fn kill(pid: Pid, signal: Signal) {
    let _ = nix::sys::signal::kill(pid.raw(), signal);
}

/// Ends this process at once: no destructor, no atexit handler, no flush. The only way out of a
/// forked child, which shares the parent's files and must not run its clean-up (_exit(2)).
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` is async-signal-safe and does not return.
    unsafe { libc::_exit(code) }
}

/// Lets orphaned descendants become this process's children, so that they are reaped
/// (PR_SET_CHILD_SUBREAPER(2const)).
///
/// # Errors
/// None known on Linux since 3.4.
pub fn become_subreaper() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Leaves the session, the process group and the terminal of the process that forked this one
/// (setsid(2)). Descriptor 0 becomes /dev/null and descriptor 1 a copy of descriptor 2. Otherwise a
/// handler could read what the operator types, or type into the operator's shell (TIOCSTI,
/// ioctl_tty(2)). To be called by a forked child, because the leader of a process group is refused.
///
/// # Errors
/// EPERM in the leader of a process group; what open(2) says of /dev/null.
pub fn leave_session() -> io::Result<()> {
    unistd::setsid()?;
    unistd::dup2_stdin(fs::File::open("/dev/null")?)?;
    unistd::dup2_stdout(io::stderr())?;
    Ok(())
}

/// Raises the soft limit of open descriptors to the hard one and returns it (getrlimit(2)).
///
/// # Errors
/// What getrlimit or setrlimit answer.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// The soft limit of open descriptors, and how many more this process may open if those that are open have
/// the lowest numbers.
pub fn descriptors_left() -> (usize, usize) {
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let soft = usize::try_from(soft).unwrap_or(usize::MAX);
    let lowest = io::stderr().as_fd().try_clone_to_owned();
    let lowest = lowest.map_or(soft, |fd| fd.as_raw_fd().unsigned_abs() as usize);
    (soft, soft.saturating_sub(lowest))
}

/// Resident memory of a process in bytes, or 0 where it can't be read (proc_pid_statm(5)).
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

/// CPU time of this process so far, user and system, all threads (getrusage(2)).
pub fn cpu_time() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeVal;
    let length = |time: TimeVal| {
        let micros = u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0);
        Duration::from_micros(micros)
    };
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        length(usage.user_time()) + length(usage.system_time())
    })
}

/// Seconds since 1970, for people and other machines; it may jump.
pub fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Time since boot, suspended time left out (CLOCK_MONOTONIC): the same in all processes of one
/// machine, and deaf to changes of the wall clock.
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has CLOCK_MONOTONIC (clock_gettime(2))");
    Duration::new(
        now.num_seconds().unsigned_abs(),
        now.tv_nsec().unsigned_abs() as u32,
    )
}

/// The same in milliseconds.
pub fn monotonic_ms() -> u64 {
    u64::try_from(monotonic().as_millis()).unwrap_or(u64::MAX)
}

/// The directory of this process by the name that its user has for it: `PWD` keeps the symbolic links
/// of the path that a shell was led by, and getcwd(2) does not. It is believed only if it names this
/// directory and has no `.` or `..` part (as in pwd(1)).
///
/// # Errors
/// When the directory has no name, because it was deleted.
pub fn current_directory() -> io::Result<PathBuf> {
    named_directory(env::var_os("PWD").map(PathBuf::from)).map_or_else(env::current_dir, Ok)
}

fn named_directory(name: Option<PathBuf>) -> Option<PathBuf> {
    name.filter(|name| {
        let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
        name.is_absolute() && name.components().all(is_plain) && is_same_file(name, Path::new("."))
    })
}

/// Whether two paths lead to one file or directory.
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
    fn another_thread_is_waited_for_until_the_limit() {
        let (_hold, wait) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || wait.recv());
        let begin = monotonic();
        assert!(wait_for_one_thread(Duration::from_millis(20)) > 1);
        assert!(monotonic() - begin >= Duration::from_millis(20));
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn the_name_of_the_directory_is_the_users_as_long_as_it_is_one() {
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
