//! Handles signals: a pipe that wakes the loop, masks around fork, an alarm at the parent's death.
//!
//! A handler sets a flag and writes a byte (signal-hook). The loop empties the pipe first and then checks
//! the flags, so it misses no signal. Signals are never counted, because two of the same kind may be
//! merged. Fails with the system's error.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal};
use signal_hook::SigId;

use super::process::{Fork, Pid, fork};

/// Signals for the master, which its children ignore. A child has its own session, so neither Ctrl-C nor a
/// closing terminal reaches it. But an operator may send a signal to a child instead of the master.
pub const IGNORED_BY_CHILDREN: [Signal; 8] = [
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGPIPE,
    // A file-size limit is then an error of write(2), which a log can handle.
    Signal::SIGXFSZ,
];

/// Reports the chosen signals of a process through one descriptor.
#[derive(Debug)]
pub struct SignalPipe {
    reader: UnixStream,
    registered: Vec<(Signal, Arc<AtomicBool>)>,
    registrations: Vec<SigId>,
}

impl SignalPipe {
    /// Installs handlers for `signals`.
    ///
    /// # Errors
    /// If no socket pair can be created or a signal cannot be caught.
    pub fn new(signals: &[Signal]) -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let mut pipe = SignalPipe {
            reader,
            registered: Vec::new(),
            registrations: Vec::new(),
        };
        for &signal in signals {
            let flag = Arc::new(AtomicBool::new(false));
            // The flag comes first: a reader woken by the byte must find it set.
            let set = signal_hook::flag::register(signal as i32, Arc::clone(&flag))?;
            pipe.registrations.push(set);
            let wake = signal_hook::low_level::pipe::register(signal as i32, writer.try_clone()?)?;
            pipe.registrations.push(wake);
            pipe.registered.push((signal, flag));
        }
        Ok(pipe)
    }

    /// Returns the signals that have arrived since the last call.
    pub fn take(&self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        while matches!((&self.reader).read(&mut bytes), Ok(1..)) {}
        self.registered
            .iter()
            .filter(|(_, flag)| flag.swap(false, Ordering::SeqCst))
            .map(|(signal, _)| *signal)
            .collect()
    }

    /// Makes the signals since the last `take` pending again, for the program that this process executes
    /// next. Call it while all signals are blocked.
    pub fn requeue_pending(&self) {
        for signal in self.take() {
            let _ = nix::sys::signal::raise(signal);
        }
    }

    /// Leaves a pipe that was inherited by fork. Call it in the child, because its signals would wake the
    /// parent. The handlers stay installed but do nothing.
    pub fn detach(&mut self) {
        for registration in self.registrations.drain(..) {
            signal_hook::low_level::unregister(registration);
        }
        self.registered.clear();
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// Returns a flag that SIGINT (Ctrl-C) sets. If it is already set, SIGINT ends the process as by default.
///
/// # Errors
/// If the signal cannot be caught.
pub fn interrupt_flag() -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    // The order matters: the first signal must find the flag unset, and the second one set.
    signal_hook::flag::register_conditional_default(libc::SIGINT, Arc::clone(&flag))?;
    signal_hook::flag::register(libc::SIGINT, Arc::clone(&flag))?;
    Ok(flag)
}

/// Blocks every signal in the calling thread, except those of faults: if the thread itself raises one that is blocked,
/// the kernel kills the process and calls no handler, so the crash would not be recorded.
pub fn block_all() {
    set_mask(&all_but_faults());
}

fn all_but_faults() -> SigSet {
    let mut signals = SigSet::all();
    let faults = FAULTS
        .into_iter()
        .filter_map(|fault| Signal::try_from(fault).ok());
    faults.for_each(|fault| signals.remove(fault));
    signals
}

/// Unblocks every signal in the calling thread, whatever mask it inherited.
pub fn unblock_all() {
    set_mask(&SigSet::empty());
}

/// Runs `run` with the same signals blocked as by [`block_all`] in this thread, for example to start a thread that gets
/// none of them.
pub fn with_signals_blocked<T>(run: impl FnOnce() -> T) -> T {
    let before = all_but_faults().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let result = run();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
    result
}

/// Forks a child that starts with all signals blocked and runs `child(init)` for its whole life. Only the parent
/// returns.
///
/// # Errors
/// EAGAIN or ENOMEM if no process can be created.
pub fn fork_child<T>(init: T, child: fn(T) -> !) -> io::Result<Pid> {
    // A signal between fork and the child's own handlers would wake the parent, or be lost.
    block_all();
    let forked = match fork() {
        Ok(Fork::Child) => child(init),
        Ok(Fork::Parent(pid)) => Ok(pid),
        Err(error) => Err(error),
    };
    unblock_all();
    forked
}

fn set_mask(set: &SigSet) {
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(set), None)
        .expect("a valid mask is always accepted (sigprocmask(2))");
}

/// Blocks a signal in this thread until it is dropped.
#[derive(Debug)]
pub struct SignalBlock(SigSet);

impl SignalBlock {
    pub fn of(signal: Signal) -> Self {
        let mut before = SigSet::empty();
        let one = SigSet::from(signal);
        nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&one), Some(&mut before))
            .expect("a valid mask is always accepted (sigprocmask(2))");
        SignalBlock(before)
    }
}

impl Drop for SignalBlock {
    fn drop(&mut self) {
        set_mask(&self.0);
    }
}

/// Ignores `signals` in this process.
pub fn ignore(signals: &[Signal]) {
    let action = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for &signal in signals {
        // SAFETY: SIG_IGN runs no code of this process.
        let _ = unsafe { nix::sys::signal::sigaction(signal, &action) };
    }
}

/// The signals that the kernel sends for a fault of the process itself.
const FAULTS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];

/// The handlers that std has installed for these signals; 0 means none.
static OF_STD: [AtomicUsize; FAULTS.len()] = [const { AtomicUsize::new(0) }; FAULTS.len()];

/// Installs a handler so that a SIGSEGV or SIGBUS from another process ends this process. The handlers of std, which
/// report a stack overflow, would return from a sent signal and lose it: they expect that the fault
/// occurs again. Signals that the processor raises still go to the handlers of std. Threads and forked
/// children inherit this. The same handler serves [`set_fault_report`].
pub fn install_fault_handlers() {
    for (signal, of_std) in FAULTS.into_iter().zip(&OF_STD) {
        // SAFETY: the structures are plain data, and the handler has the signature that SA_SIGINFO
        // requires. It is installed after the previous handler is recorded.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &raw mut action);
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                of_std.store(action.sa_sigaction, Ordering::SeqCst);
            } else if action.sa_sigaction != libc::SIG_DFL {
                continue; // another handler is installed, or the signal is ignored
            } else {
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            }
            action.sa_sigaction = faulted as FaultHandler as usize;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// What a process has recorded about the cause of its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Fault {
    /// Nothing is known: it exited, or got a signal that cannot be caught.
    Unknown = 0,
    /// One of its threads failed.
    Own = 1,
    /// Another process sent the signal.
    Sent = 2,
}

impl Fault {
    /// Decodes a number; an unknown number is `Unknown`.
    pub fn of(number: u32) -> Self {
        match number {
            1 => Fault::Own,
            2 => Fault::Sent,
            _ => Fault::Unknown,
        }
    }
}

/// Where a fault is recorded; null until `set_fault_report`.
static FAULT: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static CULPRIT: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

/// The pid of the process that records its fault.
static REPORTER: AtomicI32 = AtomicI32::new(0);

thread_local! {
    /// The number of this thread's current call. It needs no destructor, so a signal handler may read it.
    static AT: Cell<u64> = const { Cell::new(0) };
}

/// Records a fault of this process at its end: its kind, and the current call of the thread that failed.
pub fn set_fault_report(fault: &'static AtomicU32, culprit: &'static AtomicU64) {
    CULPRIT.store(std::ptr::from_ref(culprit).cast_mut(), Ordering::SeqCst);
    FAULT.store(std::ptr::from_ref(fault).cast_mut(), Ordering::SeqCst);
    REPORTER.store(Pid::current().0, Ordering::SeqCst);
    // SAFETY: the hook is a function of this program, which is never unloaded. If it cannot be
    // registered, exit(3) records no call.
    let _ = unsafe { libc::atexit(exits) };
}

/// Runs in the thread that has called exit(3). If that thread runs a call, this is a failure of the call. The exit of
/// a process that a handler has forked is not recorded.
extern "C" fn exits() {
    let (fault, culprit) = (FAULT.load(Ordering::SeqCst), CULPRIT.load(Ordering::SeqCst));
    if AT.get() == 0 || fault.is_null() || REPORTER.load(Ordering::SeqCst) != Pid::current().0 {
        return;
    }
    // SAFETY: the stored pointers are references that live for ever.
    unsafe {
        if (*fault).load(Ordering::SeqCst) == Fault::Unknown as u32 {
            (*culprit).store(AT.get(), Ordering::SeqCst);
            (*fault).store(Fault::Own as u32, Ordering::SeqCst);
        }
    }
}

/// Records that this process ends because of a fault of its own, in none of its calls.
pub fn record_own_fault() {
    let fault = FAULT.load(Ordering::SeqCst);
    if !fault.is_null() && REPORTER.load(Ordering::SeqCst) == Pid::current().0 {
        let (unknown, own) = (Fault::Unknown as u32, Fault::Own as u32);
        let (order, if_not) = (Ordering::SeqCst, Ordering::SeqCst);
        // SAFETY: the stored pointer is a reference that lives for ever.
        let _ = unsafe { (*fault).compare_exchange(unknown, own, order, if_not) };
    }
}

/// Sets the number of this thread's current call; 0 means that there is none to report.
#[inline]
pub fn set_current_call(number: u64) {
    AT.set(number);
}

type FaultHandler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Calls only what signal-safety(7) allows, and the handler of std, which also obeys it.
extern "C" fn faulted(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = FAULTS.iter().position(|&it| it == signal).unwrap_or(0);
    // SAFETY: the kernel passes a valid siginfo. The stored values are a handler of this signature, and
    // references that live for ever. getpid, sigaction and raise are async-signal-safe. So are atomics
    // and a thread-local value that needs no initialisation.
    unsafe {
        // abort(3) sends the signal to its own process.
        let by_itself = (*info).si_code == libc::SI_TKILL && (*info).si_pid() == libc::getpid();
        let own = (*info).si_code > 0 || by_itself;
        let (fault, culprit) = (FAULT.load(Ordering::SeqCst), CULPRIT.load(Ordering::SeqCst));
        // Only the first record counts, because the handler of std aborts after a stack overflow.
        if !fault.is_null() && (*fault).load(Ordering::SeqCst) == Fault::Unknown as u32 {
            (*culprit).store(AT.get(), Ordering::SeqCst);
            let kind = if own { Fault::Own } else { Fault::Sent };
            (*fault).store(kind as u32, Ordering::SeqCst);
        }
        let handler = OF_STD[index].load(Ordering::SeqCst);
        if (*info).si_code > 0 && handler != 0 {
            return std::mem::transmute::<usize, FaultHandler>(handler)(signal, info, context);
        }
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        // The signal is blocked in this handler, so it ends the process when the handler returns.
        libc::raise(signal);
    }
}

/// Restores the default action of a signal, whatever this process inherited.
pub fn default_action(signal: Signal) {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_DFL runs no code of this process.
    let _ = unsafe { nix::sys::signal::sigaction(signal, &action) };
}

/// The grace period of `on_parent_death` for its handler, in seconds.
static ALARM_SECONDS: AtomicU32 = AtomicU32::new(0);

/// When the parent of `on_parent_death` died, in milliseconds (CLOCK_MONOTONIC); 0 while it lives.
static PARENT_DIED_MS: AtomicU64 = AtomicU64::new(0);

/// Returns when the parent that was given to `on_parent_death` died, in milliseconds (CLOCK_MONOTONIC); `None` while it
/// lives.
pub fn parent_died_ms() -> Option<u64> {
    Some(PARENT_DIED_MS.load(Ordering::Relaxed)).filter(|at| *at > 0)
}

/// Calls only what signal-safety(7) allows: atomics, clock_gettime(2) and alarm(2).
extern "C" fn start_alarm(_signal: libc::c_int) {
    // SAFETY: both functions are async-signal-safe, and zeroes are a valid timespec.
    let now = unsafe {
        libc::alarm(ALARM_SECONDS.load(Ordering::Relaxed));
        let mut now: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now);
        now
    };
    let now_ms = now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000;
    PARENT_DIED_MS.store(now_ms.max(1), Ordering::Relaxed);
}

/// Ends this process `grace` after its parent has died, even if its own loop is stuck. At the parent's
/// death the kernel sends a real-time signal, its handler sets an alarm, and the default action of
/// SIGALRM ends the process (PR_SET_PDEATHSIG(2const), alarm(2)).
///
/// Call it after the last change of user or group, which would clear it. Returns whether `parent` was
/// still alive afterwards. If not, the signal may never come, and the caller has to exit.
///
/// # Errors
/// If the system refuses the handler or the request.
pub fn on_parent_death(parent: Pid, grace: Duration) -> io::Result<bool> {
    let seconds = u32::try_from(grace.as_secs().saturating_add(1)).unwrap_or(u32::MAX);
    ALARM_SECONDS.store(seconds, Ordering::Relaxed);
    // The alarm relies on the default action, which ends the process.
    default_action(Signal::SIGALRM);
    let number = libc::SIGRTMIN();
    // SAFETY: the structure is plain data, zero is a valid value of each field, and the handler
    // has the signature that sa_handler asks for.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = start_alarm as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(number, &raw const action, std::ptr::null_mut())
    };
    nix::errno::Errno::result(installed)?;
    // SAFETY: no pointer is passed.
    let asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, number) };
    nix::errno::Errno::result(asked)?;
    Ok(Pid::parent() == parent)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_reported_once_and_not_after_detaching() {
        let mut pipe = SignalPipe::new(&[Signal::SIGWINCH]).unwrap();
        assert!(pipe.take().is_empty());
        signal_hook::low_level::raise(Signal::SIGWINCH as i32).unwrap();
        assert_eq!(pipe.take(), [Signal::SIGWINCH]);
        assert!(pipe.take().is_empty());
        pipe.detach();
        signal_hook::low_level::raise(Signal::SIGWINCH as i32).unwrap();
        assert!(pipe.take().is_empty());
    }
}
