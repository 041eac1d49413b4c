//! Ends the processes that a call left behind. Such processes forked twice or created a session, and outlive their
//! program.
//!
//! A worker is a subreaper, so they become its children. Their environment says to which call they belong
//! (`marks` reads it). A pool program counts as one call for its whole life. After each call its
//! leftovers are killed and reaped; when a worker exits, everything below it.
//!
//! A process may clear its environment or make it unreadable. Then its call is not known, but that call began before
//! the process was first seen. So the process is killed when all calls that ran at that time have ended. If a worker
//! is killed, the master adopts its leftovers.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use super::marks::{Mark, Reader};
use crate::protocol::call_id::{CallId, PROGRAMS};
use crate::sys::lock::{lock, read, write};
use crate::sys::process::{self, Pid, monotonic};
use crate::sys::process_tree;
use crate::sys::process_tree::PidFd;
use crate::sys::spawn;

/// The variable with the call to which a process belongs: the pid of the process that runs the call, and the
/// number of the call there.
pub const VARIABLE: &str = "PREFORKD_CALL";

/// The time that killed leftovers may take to end.
const DYING: Duration = Duration::from_secs(1);

/// The number of the next program of a pool, which no call has.
static NEXT_PROGRAM: AtomicU64 = AtomicU64::new(PROGRAMS);
/// How many commands and programs this process has started.
static STARTS: AtomicU64 = AtomicU64::new(0);
/// The calls whose command runs, and the pool programs, each with the value of `STARTS` before it.
static RUNNING: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());
/// Whether this worker is exiting, so that no command may start.
static LEAVES: RwLock<bool> = RwLock::new(false);
/// Reads the marks of adopted processes.
static READER: Reader = Reader::new();
/// The adopted processes without a mark, each with the value of `STARTS` when it was seen first: only a command that
/// was started before can have created it. 0 once it was killed.
static UNMARKED: Mutex<BTreeMap<Pid, u64>> = Mutex::new(BTreeMap::new());
/// Held during a sweep. No other thread reaps adopted children then, so their pids cannot be reused.
static SWEEPING: Mutex<()> = Mutex::new(());

/// A command of a call, or a pool program with all its calls, from before its start until nothing of it
/// is left.
#[derive(Debug)]
pub(crate) struct RunningCommand(u64);

impl RunningCommand {
    /// Begins the command of the call with this number in this process. Returns `None` if the worker is
    /// exiting.
    pub fn begin(number: u64) -> Option<Self> {
        let leaves = read(&LEAVES);
        if *leaves {
            return None;
        }
        running(|calls| calls.insert(number, STARTS.fetch_add(1, Ordering::Relaxed)));
        Some(RunningCommand(number))
    }

    /// Begins a program of a pool. It has its mark for its whole life, and no call has the same.
    pub fn begin_program() -> Option<Self> {
        RunningCommand::begin(NEXT_PROGRAM.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the variable and its value, for the environment.
    pub fn variable(&self) -> CString {
        let call = CallId {
            pid: Pid::current().0,
            number: self.0,
        };
        let variable = format!("{VARIABLE}={call}");
        CString::new(variable).expect("digits and letters have no NUL")
    }

    /// Ends the leftovers of the command, which has ended.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        running(|calls| calls.remove(&self.0));
        spawn::reap_abandoned();
        // Most commands leave nothing.
        if !adopted_children().is_empty() {
            sweep_ended();
        }
    }
}

/// Kills the leftovers of ended calls.
fn sweep_ended() {
    let me = Pid::current();
    let own_session = process_tree::session(me);
    sweep(|mut pids| {
        let marks = READER.marks(&pids, call_of, sweep_ended);
        let mut unmarked = lock(&UNMARKED);
        unmarked.retain(|pid, _| pids.contains(pid));
        pids.retain(|pid| match marks.get(pid) {
            Some(&(worker, number)) if worker == me => !is_running(number),
            // Each command and program has a session of its own, and this process has the worker's. So a Rust
            // function has started it, and it must not be killed.
            _ if process_tree::session(*pid) == own_session => false,
            _ => {
                let starts = STARTS.load(Ordering::Relaxed);
                let starts = unmarked.entry(*pid).or_insert(starts);
                let is_over = !running(|calls| calls.values().any(|before| before < starts));
                // Once only: a process of another user, for example, cannot be killed.
                is_over && std::mem::take(starts) > 0
            }
        });
        pids
    });
}

fn running<T>(look: impl FnOnce(&mut BTreeMap<u64, u64>) -> T) -> T {
    look(&mut lock(&RUNNING))
}

fn is_running(number: u64) -> bool {
    running(|calls| calls.contains_key(&number))
}

/// Returns the call to which a process belongs, according to its environment. It may block for as long as
/// the owner of that process wants, so call it only in a thread or process that may block.
pub fn call_of(pid: Pid) -> Option<Mark> {
    let call: CallId = process_tree::variable(pid, VARIABLE)?.parse().ok()?;
    Some((Pid(call.pid), call.number))
}

/// Kills the running commands of this worker and everything that commands have left behind. After that no command can
/// start. Call it when the worker exits.
pub fn kill_all() {
    *write(&LEAVES) = true;
    if STARTS.load(Ordering::Relaxed) == 0 {
        return;
    }
    let end = monotonic().saturating_add(DYING);
    // Repeat while a thread is about to start a command, or has not noticed its end.
    while running(|calls| !calls.is_empty()) && monotonic() < end {
        let held = process_tree::open_with_descendants(&spawn::children(), spawn::is_child);
        held.iter().for_each(PidFd::kill);
        wait(&held);
        std::thread::yield_now();
    }
    // This also finds processes that cleared their environment, because the first thread has no other
    // children.
    sweep(|pids| pids);
}

/// Reaps adopted children that have ended. The first thread, whose children they are, calls it now and
/// then.
pub fn reap_adopted() {
    while let Some(pid) = process::ended_child().filter(|&pid| !spawn::is_child(pid)) {
        let Ok(_one_at_a_time) = SWEEPING.try_lock() else {
            return;
        };
        reap(pid);
    }
}

/// Reaps an adopted child that has ended. Then another process can get its pid.
fn reap(pid: Pid) {
    lock(&UNMARKED).remove(&pid);
    process::reap(pid, false);
}

/// Returns the children that the first thread has adopted and not started.
fn adopted_children() -> Vec<Pid> {
    let mut pids = process_tree::direct_children();
    pids.retain(|&pid| !spawn::is_child(pid));
    pids
}

/// Kills the adopted children that `choose` picks, with all their descendants, and reaps them. Repeats
/// until none is left, because they may have forked meanwhile, and their descendants are adopted after
/// their death.
fn sweep(choose: impl Fn(Vec<Pid>) -> Vec<Pid>) {
    let _one_at_a_time = lock(&SWEEPING);
    let end = monotonic().saturating_add(DYING);
    loop {
        let mut living = adopted_children();
        living.retain(|&pid| {
            let is_zombie = process_tree::is_zombie(pid);
            if is_zombie {
                reap(pid);
            }
            !is_zombie
        });
        if living.is_empty() {
            return;
        }
        let over = choose(living);
        if over.is_empty() || monotonic() > end {
            return;
        }
        // No other thread reaps them, so these pids cannot be reused yet.
        let held = process_tree::open_with_descendants(&over, |_| true);
        held.iter().for_each(PidFd::kill);
        wait(&held);
    }
}

fn wait(held: &[PidFd]) {
    use std::os::fd::AsFd;
    let pidfds: Vec<_> = held.iter().map(AsFd::as_fd).collect();
    process_tree::ends_within(&pidfds, DYING);
}
