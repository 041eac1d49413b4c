//! Signals: a pipe that wakes the loop, the masks around fork, the parent-death alarm.
//!
//! A handler sets a flag and writes a byte (signal-hook); the loop empties the pipe first and
//! looks at the flags second, so that none is missed. Signals are never counted: two of a kind
//! may arrive as one. Fails with the system's own error.

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

use super::process::Pid;

/// The signals that a process wants to hear of, through one descriptor.
#[derive(Debug)]
pub struct SignalPipe {
    reader: UnixStream,
    heard: Vec<(Signal, Arc<AtomicBool>)>,
    registrations: Vec<SigId>,
}

impl SignalPipe {
    /// Installs handlers for `signals`.
    ///
    /// # Errors
    /// When no socket pair can be had, or a signal can't be caught.
    pub fn new(signals: &[Signal]) -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let mut pipe = SignalPipe {
            reader,
            heard: Vec::new(),
            registrations: Vec::new(),
        };
        for &signal in signals {
            let flag = Arc::new(AtomicBool::new(false));
            // The flag first: a reader that was woken by the byte must find it set.
            let set = signal_hook::flag::register(signal as i32, Arc::clone(&flag))?;
            pipe.registrations.push(set);
            let wake = signal_hook::low_level::pipe::register(signal as i32, writer.try_clone()?)?;
            pipe.registrations.push(wake);
            pipe.heard.push((signal, flag));
        }
        Ok(pipe)
    }

    /// The signals that have come since the last call.
    pub fn take(&self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        while matches!((&self.reader).read(&mut bytes), Ok(1..)) {}
        self.heard
            .iter()
            .filter(|(_, flag)| flag.swap(false, Ordering::SeqCst))
            .map(|(signal, _)| *signal)
            .collect()
    }

    /// Makes those that have come since the last `take` pending once more, for the program that this
    /// process becomes. To be called while all are blocked.
    pub fn requeue_pending(&self) {
        for signal in self.take() {
            let _ = nix::sys::signal::raise(signal);
        }
    }

    /// Leaves a pipe that was inherited by fork, in the child: its signals would wake the parent.
    /// The handlers stay, and do nothing.
    pub fn detach(&mut self) {
        for registration in self.registrations.drain(..) {
            signal_hook::low_level::unregister(registration);
        }
        self.heard.clear();
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// A flag that the interrupt signal (Ctrl-C) sets; when it is set already, the signal ends the process
/// as it does by default.
///
/// # Errors
/// When the signal can't be caught.
pub fn interrupt_flag() -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    // In this order: the first signal must find the flag unset, and the second one set.
    signal_hook::flag::register_conditional_default(libc::SIGINT, Arc::clone(&flag))?;
    signal_hook::flag::register(libc::SIGINT, Arc::clone(&flag))?;
    Ok(flag)
}

/// Blocks every signal in the calling thread.
pub fn block_all() {
    set_mask(&SigSet::all());
}

/// Lets every signal through to the calling thread, whatever mask it was started with.
pub fn unblock_all() {
    set_mask(&SigSet::empty());
}

fn set_mask(set: &SigSet) {
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(set), None)
        .expect("a valid mask is always accepted (sigprocmask(2))");
}

/// Keeps a signal from this thread until it is dropped.
#[derive(Debug)]
pub struct SignalBlock(SigSet);

impl SignalBlock {
    /// Holds this one.
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
        // SAFETY: SIG_IGN runs no code of ours.
        let _ = unsafe { nix::sys::signal::sigaction(signal, &action) };
    }
}

/// The signals by which a process ends for a fault of its own.
const FAULTS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];

/// The handlers of these that std has installed; 0: none.
static OF_STD: [AtomicUsize; FAULTS.len()] = [const { AtomicUsize::new(0) }; FAULTS.len()];

/// Lets a SIGSEGV or SIGBUS that somebody sends end the process, as it does elsewhere. std's
/// handlers, which tell of an overflown stack, take any other cause for a fault that comes again
/// as soon as they return: one that was sent does not, and would be lost. What the processor
/// raises is still theirs. Threads and forked children inherit it. [`set_fault_report`] is served by
/// the same handler.
pub fn install_fault_handlers() {
    for (signal, of_std) in FAULTS.into_iter().zip(&OF_STD) {
        // SAFETY: the structures are plain data, and the handler has the signature that
        // SA_SIGINFO asks for; it is installed after the one it hands on to is known.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &raw mut action);
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                of_std.store(action.sa_sigaction, Ordering::SeqCst);
            } else if action.sa_sigaction != libc::SIG_DFL {
                continue; // somebody ignores it, or handles it already
            } else {
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            }
            action.sa_sigaction = faulted as FaultHandler as usize;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// What a process knows of its own end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Fault {
    /// Nothing: it left, or got a signal that nobody can see coming.
    Unknown = 0,
    /// One of its threads has failed.
    Own = 1,
    /// Somebody has sent the signal.
    Sent = 2,
}

impl Fault {
    /// The fault of a number; what is none is unknown.
    pub fn of(number: u32) -> Self {
        match number {
            1 => Fault::Own,
            2 => Fault::Sent,
            _ => Fault::Unknown,
        }
    }
}

/// Where a fault is told; null until somebody asks for it.
static FAULT: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static CULPRIT: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

/// The process that tells.
static REPORTER: AtomicI32 = AtomicI32::new(0);

thread_local! {
    /// What this thread is at. It needs no destructor, so a signal handler may look at it.
    static AT: Cell<u64> = const { Cell::new(0) };
}

/// Has a fault of this process told as it ends: which kind it was, and what the thread was at that
/// has failed.
pub fn set_fault_report(fault: &'static AtomicU32, culprit: &'static AtomicU64) {
    CULPRIT.store(std::ptr::from_ref(culprit).cast_mut(), Ordering::SeqCst);
    FAULT.store(std::ptr::from_ref(fault).cast_mut(), Ordering::SeqCst);
    REPORTER.store(Pid::current().0, Ordering::SeqCst);
    // SAFETY: the hook is a function of this program, which is never unloaded. Without it, calls of exit(3)
    // name no thread.
    let _ = unsafe { libc::atexit(exits) };
}

/// Runs in the thread that has called exit(3): that is a failure like any other where it runs a call. A
/// process that a handler has forked exits for itself.
extern "C" fn exits() {
    let (fault, culprit) = (FAULT.load(Ordering::SeqCst), CULPRIT.load(Ordering::SeqCst));
    if AT.get() == 0 || fault.is_null() || REPORTER.load(Ordering::SeqCst) != Pid::current().0 {
        return;
    }
    // SAFETY: what was stored are references that live for ever.
    unsafe {
        if (*fault).load(Ordering::SeqCst) == Fault::Unknown as u32 {
            (*culprit).store(AT.get(), Ordering::SeqCst);
            (*fault).store(Fault::Own as u32, Ordering::SeqCst);
        }
    }
}

/// This thread is at something with this number; 0: at nothing that is to be told.
#[inline]
pub fn set_current_call(number: u64) {
    AT.set(number);
}

type FaultHandler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Only what signal-safety(7) allows, and std's own handler, which keeps to it.
extern "C" fn faulted(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = FAULTS.iter().position(|&it| it == signal).unwrap_or(0);
    // SAFETY: the kernel passes a valid siginfo; what was stored is a handler of this signature, and
    // references that live for ever; getpid, sigaction and raise are async-signal-safe, and so are
    // atomics and a thread-local value that needs no initialisation.
    unsafe {
        // abort(3) sends itself the signal.
        let by_itself = (*info).si_code == libc::SI_TKILL && (*info).si_pid() == libc::getpid();
        let own = (*info).si_code > 0 || by_itself;
        let (fault, culprit) = (FAULT.load(Ordering::SeqCst), CULPRIT.load(Ordering::SeqCst));
        // The first word counts: std's handler aborts when a stack is full. An ABRT that is sent is
        // the master's, to a process that is stuck: whose doing that is can't be told here.
        let told = own || signal != libc::SIGABRT;
        if told && !fault.is_null() && (*fault).load(Ordering::SeqCst) == Fault::Unknown as u32 {
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
        // Blocked while we are in here: it ends the process on the way out.
        libc::raise(signal);
    }
}

/// Gives a signal its default action back, whatever this process was started with.
pub fn default_action(signal: Signal) {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_DFL runs no code of ours.
    let _ = unsafe { nix::sys::signal::sigaction(signal, &action) };
}

/// What `on_parent_death` hands to its handler, in seconds.
static ALARM_SECONDS: AtomicU32 = AtomicU32::new(0);

/// Only what signal-safety(7) allows: one atomic load and alarm(2).
extern "C" fn start_alarm(_signal: libc::c_int) {
    // SAFETY: alarm is async-signal-safe.
    unsafe { libc::alarm(ALARM_SECONDS.load(Ordering::Relaxed)) };
}

/// Ends this process `grace` after its parent has died, even when its own loop is stuck: the
/// kernel sends a real-time signal at that moment, its handler sets an alarm, and SIGALRM's
/// default action does the rest (PR_SET_PDEATHSIG(2const), alarm(2)).
///
/// To be called after the last change of user or group, which would clear it. Returns whether
/// `parent` still lived afterwards; if not, the signal may never come and the caller has to leave.
///
/// # Errors
/// When the system refuses the handler or the request.
pub fn on_parent_death(parent: Pid, grace: Duration) -> io::Result<bool> {
    let seconds = u32::try_from(grace.as_secs().saturating_add(1)).unwrap_or(u32::MAX);
    ALARM_SECONDS.store(seconds, Ordering::Relaxed);
    // Its end is what the alarm is for.
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
    fn a_signal_is_heard_once_and_not_after_detaching() {
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
