//! Reads the state of a thread from /proc: its state, its system call, the kernel function in which it
//! sleeps, and the kernel stack (proc_pid_stat(5), proc_pid_syscall(5), proc_pid_wchan(5),
//! proc_pid_stack(5)).
//!
//! It is for stuck threads. So it reads only files that do not take the process's memory lock, because a
//! stuck thread may hold it (cmdline, maps and smaps take it). What may not be read is left out: the
//! system call needs the rights of ptrace(2), and the kernel stack those of an administrator.

use std::fmt;
use std::io;
use std::time::Duration;

use nix::libc;
use nix::unistd::{SysconfVar, sysconf};

use super::bounded;
use super::process::Pid;

/// The largest number of frames of a kernel stack that are reported, innermost first.
const MOST_FRAMES: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadState {
    pub name: String,
    /// The letter of its state, such as `R` or `S`.
    pub state: char,
    /// CPU time so far: user and system.
    pub cpu: Duration,
    /// The system call in which it waits, if it is in one and this process may read it.
    pub call: Option<BlockedSyscall>,
    /// The kernel function in which it sleeps.
    pub place: Option<String>,
    /// The kernel functions of its stack, innermost first.
    pub stack: Vec<String>,
    /// The process that traces it (ptrace(2)).
    pub tracer: Option<Pid>,
    /// Whether the kernel refused to name the system call.
    pub is_refused: bool,
}

/// A system call in which a thread waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedSyscall {
    pub number: i64,
    /// Its first argument, often a descriptor.
    pub first: String,
}

/// Reads the state of a thread of a process; `None` if it is gone.
pub fn look(pid: Pid, thread: Pid) -> Option<ThreadState> {
    let path = |file: &str| format!("/proc/{pid}/task/{thread}/{file}");
    let read = |file: &str| bounded::read_lines(path(file)).ok();
    let stat = read("stat")?;
    // The name may contain spaces and parentheses; the last one ends it.
    let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let place = read("wchan").map(|place| place.trim().to_owned());
    let stack = read("stack").unwrap_or_default();
    let status = read("status").unwrap_or_default();
    let syscall = bounded::read_lines(path("syscall"));
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    Some(ThreadState {
        name: name.to_owned(),
        state: fields.first()?.chars().next()?,
        cpu: of_ticks(ticks(11)? + ticks(12)?),
        is_refused: syscall.as_ref().is_err_and(denied),
        call: syscall.ok().and_then(|line| call(&line)),
        place: place.filter(|place| !place.is_empty() && place != "0"),
        stack: stack
            .lines()
            .filter_map(frame)
            .take(MOST_FRAMES)
            .map(str::to_owned)
            .collect(),
        tracer: tracer(&status),
    })
}

/// Parses a line of `syscall`: the number and six arguments, `running`, or -1 outside a system call.
fn call(line: &str) -> Option<BlockedSyscall> {
    let mut fields = line.split_ascii_whitespace();
    let number: i64 = fields.next()?.parse().ok().filter(|&number| number >= 0)?;
    let first = fields.next()?.to_owned();
    Some(BlockedSyscall { number, first })
}

/// Parses a line of `stack`, such as `[<0>] futex_wait+0x1f/0x40`.
fn frame(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(']')?;
    let name = rest.trim().split('+').next()?;
    (!name.is_empty() && !name.starts_with("0x")).then_some(name)
}

fn tracer(status: &str) -> Option<Pid> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))?;
    line.trim().parse().ok().filter(|&pid| pid != 0).map(Pid)
}

/// Returns the time of a number of clock ticks.
pub fn of_ticks(ticks: u64) -> Duration {
    let a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Duration::from_millis(ticks * 1000 / a_second.unsigned_abs().max(1))
}

impl fmt::Display for ThreadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self.state {
            'R' => "running",
            'S' => "asleep",
            'D' => "asleep, not interruptible",
            'T' => "stopped by a signal",
            't' => "stopped by a debugger",
            'Z' | 'X' => "dead",
            _ => "idle",
        };
        write!(f, "{} {words}", self.state)?;
        if let Some(BlockedSyscall { number, first }) = &self.call {
            match name_of(*number) {
                Some(name) => write!(f, " in {name}({first}, ...)")?,
                None => write!(f, " in system call {number}({first}, ...)")?,
            }
        }
        if let Some(place) = &self.place {
            write!(f, " at {place}")?;
        }
        if !self.stack.is_empty() {
            write!(f, " stack {}", self.stack.join(" < "))?;
        }
        if let Some(tracer) = self.tracer {
            write!(f, " traced by {tracer}")?;
        }
        write!(f, " cpu {:.2} s", self.cpu.as_secs_f64())?;
        match self.is_refused {
            true => f.write_str(" (the kernel refused its system call)"),
            false => Ok(()),
        }
    }
}

/// Names the system calls in which a thread can be stuck.
macro_rules! names {
    ($number:expr, $($(#[$when:meta])? $name:ident = $constant:ident),* $(,)?) => {{
        let number = $number;
        $($(#[$when])? if number == libc::$constant { return Some(stringify!($name)); })*
        None
    }};
}

fn name_of(number: i64) -> Option<&'static str> {
    names!(
        number,
        read = SYS_read,
        write = SYS_write,
        readv = SYS_readv,
        writev = SYS_writev,
        pread64 = SYS_pread64,
        pwrite64 = SYS_pwrite64,
        openat = SYS_openat,
        close = SYS_close,
        futex = SYS_futex,
        nanosleep = SYS_nanosleep,
        clock_nanosleep = SYS_clock_nanosleep,
        restart_syscall = SYS_restart_syscall,
        ppoll = SYS_ppoll,
        pselect6 = SYS_pselect6,
        epoll_pwait = SYS_epoll_pwait,
        epoll_pwait2 = SYS_epoll_pwait2,
        recvfrom = SYS_recvfrom,
        recvmsg = SYS_recvmsg,
        sendto = SYS_sendto,
        sendmsg = SYS_sendmsg,
        connect = SYS_connect,
        accept = SYS_accept,
        accept4 = SYS_accept4,
        fsync = SYS_fsync,
        fdatasync = SYS_fdatasync,
        sync = SYS_sync,
        msync = SYS_msync,
        flock = SYS_flock,
        fcntl = SYS_fcntl,
        ioctl = SYS_ioctl,
        wait4 = SYS_wait4,
        waitid = SYS_waitid,
        rt_sigtimedwait = SYS_rt_sigtimedwait,
        rt_sigsuspend = SYS_rt_sigsuspend,
        newfstatat = SYS_newfstatat,
        statx = SYS_statx,
        getdents64 = SYS_getdents64,
        unlinkat = SYS_unlinkat,
        renameat2 = SYS_renameat2,
        mkdirat = SYS_mkdirat,
        mmap = SYS_mmap,
        munmap = SYS_munmap,
        mprotect = SYS_mprotect,
        brk = SYS_brk,
        madvise = SYS_madvise,
        sched_yield = SYS_sched_yield,
        splice = SYS_splice,
        sendfile = SYS_sendfile,
        io_uring_enter = SYS_io_uring_enter,
        semtimedop = SYS_semtimedop,
        msgrcv = SYS_msgrcv,
        msgsnd = SYS_msgsnd,
        getrandom = SYS_getrandom,
        clone = SYS_clone,
        clone3 = SYS_clone3,
        execve = SYS_execve,
        #[cfg(target_arch = "x86_64")]
        open = SYS_open,
        #[cfg(target_arch = "x86_64")]
        stat = SYS_stat,
        #[cfg(target_arch = "x86_64")]
        poll = SYS_poll,
        #[cfg(target_arch = "x86_64")]
        select = SYS_select,
        #[cfg(target_arch = "x86_64")]
        epoll_wait = SYS_epoll_wait,
        #[cfg(target_arch = "x86_64")]
        pause = SYS_pause,
        #[cfg(target_arch = "x86_64")]
        vfork = SYS_vfork,
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Returns the state of a thread of this process that waits in read(2).
    fn reader() -> (ThreadState, io::PipeWriter) {
        let (mut from, to) = io::pipe().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("a (reader)".into())
            .spawn(move || {
                sender.send(nix::unistd::gettid().as_raw()).unwrap();
                let _ = from.read(&mut [0]);
            })
            .unwrap();
        let thread = Pid(receiver.recv().unwrap());
        let asleep = || look(Pid::current(), thread).filter(|look| look.place_or_call());
        let look = loop {
            if let Some(look) = asleep() {
                break look;
            }
            std::thread::yield_now();
        };
        (look, to)
    }

    impl ThreadState {
        fn place_or_call(&self) -> bool {
            self.state == 'S'
                && (self
                    .call
                    .as_ref()
                    .is_some_and(|call| call.number == libc::SYS_read))
        }
    }

    #[test]
    fn a_thread_in_a_read_is_shown_in_that_system_call() {
        let (look, _to) = reader();
        assert_eq!(look.name, "a (reader)");
        let text = look.to_string();
        assert!(text.starts_with("S asleep in read(0x"), "{text}");
    }

    #[test]
    fn lines_of_proc_are_parsed() {
        assert_eq!(call("running\n"), None);
        assert_eq!(call("-1 0x7ffe 0x7f\n"), None);
        let first = "0x5".to_owned();
        assert_eq!(
            call("0 0x5 0x7f 0x1 0x0 0x0 0x0 0x7ff 0x7f\n"),
            Some(BlockedSyscall { number: 0, first })
        );
        assert_eq!(frame("[<0>] futex_wait+0x1f/0x40"), Some("futex_wait"));
        assert_eq!(frame("[<0>] 0xffffffff"), None);
        assert_eq!(tracer("Name:\tx\nTracerPid:\t0\n"), None);
        assert_eq!(tracer("Name:\tx\nTracerPid:\t42\n"), Some(Pid(42)));
        assert_eq!(look(Pid(-1), Pid(-1)), None);
    }

    #[test]
    fn a_thread_state_is_printed_in_words() {
        let look = ThreadState {
            name: "handler-0".into(),
            state: 'D',
            cpu: Duration::from_millis(1234),
            call: Some(BlockedSyscall {
                number: 9_999,
                first: "0x1".into(),
            }),
            place: Some("nfs_wait".into()),
            stack: vec!["nfs_wait".into(), "nfs_read".into()],
            tracer: Some(Pid(7)),
            is_refused: false,
        };
        assert_eq!(
            look.to_string(),
            "D asleep, not interruptible in system call 9999(0x1, ...) at nfs_wait stack nfs_wait < nfs_read \
             traced by 7 cpu 1.23 s"
        );
    }
}
