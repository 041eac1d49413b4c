//! What a call has left behind: processes that forked twice, took a session of their own, and
//! outlive the program that they came from.
//!
//! A worker is a subreaper, so they become its children, and their environment says which call
//! they belong to (`marks` reads it); a program of a pool counts as one call for life. After each call its
//! leftovers are killed and reaped; after the last one of a worker, everything below it. One that
//! clears its environment, or makes it unreadable, is found only then. What the kill of a worker leaves is
//! the master's, which adopts it and knows the same variable.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use nix::libc::pid_t;

use super::marks::{Mark, Reader};
use crate::sys::process::{self, Pid, monotonic};
use crate::sys::process_tree;
use crate::sys::process_tree::PidFd;
use crate::sys::spawn;

/// The variable that says which call a process belongs to: `WORKER.NUMBER`.
pub const VARIABLE: &str = "PREFORKD_CALL";

/// How long leftovers may take to end once they are killed.
const DYING: Duration = Duration::from_secs(1);

/// The number of the next call of this worker.
static NEXT: AtomicU64 = AtomicU64::new(1);
/// Calls whose command runs, and programs of pools.
static RUNNING: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());
/// Whether this worker leaves, so that no command may begin.
static LEAVES: RwLock<bool> = RwLock::new(false);
/// What reads the marks of adopted ones.
static READER: Reader = Reader::new();
/// Held by who sweeps: what is adopted is reaped by nobody else then, so pids stay whose they are.
static SWEEPING: Mutex<()> = Mutex::new(());

/// A command of a call, or a program of a pool with all its calls, from before it is started until
/// nothing of it is left.
#[derive(Debug)]
pub(crate) struct RunningCommand(u64);

impl RunningCommand {
    /// `None`: the worker leaves.
    pub fn begin() -> Option<Self> {
        let leaves = LEAVES.read().unwrap_or_else(PoisonError::into_inner);
        if *leaves {
            return None;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        running(|calls| calls.insert(number));
        Some(RunningCommand(number))
    }

    /// The variable with its value, for the environment.
    pub fn variable(&self) -> CString {
        let variable = format!("{VARIABLE}={}.{}", Pid::current(), self.0);
        CString::new(variable).expect("digits and letters have no NUL")
    }

    /// It has ended: sees to what it left behind.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        running(|calls| calls.remove(&self.0));
        spawn::reap_abandoned();
        // Most leave nothing.
        if !adopted_children().is_empty() {
            sweep_ended();
        }
    }
}

/// Ends what calls have left that have ended.
fn sweep_ended() {
    let me = Pid::current();
    sweep(|mut pids| {
        let marks = READER.marks(&pids, call_of, sweep_ended);
        let is_over = |&(worker, number): &Mark| worker == me && !is_running(number);
        pids.retain(|pid| marks.get(pid).is_some_and(is_over));
        pids
    });
}

fn running<T>(look: impl FnOnce(&mut BTreeSet<u64>) -> T) -> T {
    look(&mut RUNNING.lock().unwrap_or_else(PoisonError::into_inner))
}

fn is_running(number: u64) -> bool {
    running(|calls| calls.contains(&number))
}

/// The call that a process belongs to, as far as its environment says. May block for as long as the
/// owner of that process likes: for a thread or a process that nobody waits for.
pub fn call_of(pid: Pid) -> Option<Mark> {
    let value = process_tree::variable(pid, VARIABLE)?;
    let (worker, number) = value.split_once('.')?;
    Some((Pid(worker.parse::<pid_t>().ok()?), number.parse().ok()?))
}

/// Ends everything that this worker's commands have left or still run; none begins any more. To be
/// called when it leaves.
pub fn kill_all() {
    *LEAVES.write().unwrap_or_else(PoisonError::into_inner) = true;
    if NEXT.load(Ordering::Relaxed) == 1 {
        return;
    }
    let end = monotonic().saturating_add(DYING);
    // Again while a thread is about to start one, or has not noticed its end.
    while running(|calls| !calls.is_empty()) && monotonic() < end {
        let held = process_tree::open_with_descendants(&spawn::children(), spawn::is_child);
        held.iter().for_each(PidFd::kill);
        wait(&held);
        std::thread::yield_now();
    }
    // What cleared its environment as well: nothing else is a child of the first thread.
    sweep(|pids| pids);
}

/// Reaps adopted ones that have ended. To be called now and then by the first thread, whose
/// children they are.
pub fn reap_adopted() {
    while let Some(pid) = process::ended_child().filter(|&pid| !spawn::is_child(pid)) {
        let Ok(_one_at_a_time) = SWEEPING.try_lock() else {
            return;
        };
        process::reap(pid, false);
    }
}

/// Children of the first thread that it has not started: those that were adopted.
fn adopted_children() -> Vec<Pid> {
    let mut pids = process_tree::direct_children();
    pids.retain(|&pid| !spawn::is_child(pid));
    pids
}

/// Kills those adopted ones that `choose` picks, with all below them, and reaps them; again until none
/// is left, for they may have forked meanwhile, and what was below them is adopted then.
fn sweep(choose: impl Fn(Vec<Pid>) -> Vec<Pid>) {
    let _one_at_a_time = SWEEPING.lock().unwrap_or_else(PoisonError::into_inner);
    let end = monotonic().saturating_add(DYING);
    loop {
        let mut living = adopted_children();
        living.retain(|&pid| {
            let is_zombie = process_tree::is_zombie(pid);
            if is_zombie {
                process::reap(pid, false);
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
        // Nobody else reaps them, so none of these pids can be another process's by now.
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
