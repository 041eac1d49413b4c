//! What a dead worker leaves behind: the commands that it ran, and what came from them. As a
//! subreaper the master adopts them; nobody waits for them any more, so they are killed.
//!
//! It begins with a worker's death and goes on until nothing is adopted any more: what a killed one
//! had below it is adopted when that one is reaped. Children that the master had before it was one
//! are left alone. As PID 1 it is given everybody's orphans, and takes only those that carry a
//! worker's mark. Nothing is waited for here: each death is a signal, and the loop looks again.

use std::collections::BTreeSet;

use super::upgrade::state::OrphansState;
use crate::handler::command::sweep::call_of;
use crate::logging::counted;
use crate::sys::process::{self, Pid};
use crate::sys::spawn;
use crate::sys::tree::{self, Held};

/// See the module.
#[derive(Debug)]
pub(super) struct Orphans {
    /// Children from before, such as a shell's that became us by exec.
    others: BTreeSet<Pid>,
    /// A worker has died, and what it left may not be gone yet.
    hunts: bool,
}

impl Orphans {
    /// To be made before the first fork.
    pub fn new() -> Self {
        Orphans {
            others: tree::adopted().into_iter().collect(),
            hunts: false,
        }
    }

    /// What the program after this one has to know.
    pub fn export(&self) -> OrphansState {
        OrphansState {
            others: self.others.iter().map(|pid| pid.0).collect(),
            children: Some(tree::adopted().into_iter().map(|pid| pid.0).collect()),
            hunts: self.hunts,
        }
    }

    /// What the program before this one knew; and what the program's own functions have started since
    /// the exec, as they may before the first fork. To be called once workers and keepers (`ours`)
    /// are known. What was adopted meanwhile is told from that by a worker's mark.
    pub fn import(state: OrphansState, ours: impl Fn(Pid) -> bool) -> Self {
        let mut others: BTreeSet<Pid> = state.others.into_iter().map(Pid).collect();
        if let Some(before) = state.children {
            let is_new =
                |pid: &Pid| !before.contains(&pid.0) && !process::is_forked(*pid) && !ours(*pid);
            let started = tree::adopted().into_iter().filter(is_new);
            others.extend(started.filter(|pid| call_of(*pid).is_none()));
        }
        Orphans {
            others,
            hunts: state.hunts,
        }
    }

    /// Whether a child is none of the server's: it was there before.
    pub fn is_from_before(&self, pid: Pid) -> bool {
        self.others.contains(&pid)
    }

    /// A child was reaped: a worker, or one that is not ours.
    pub fn reaped(&mut self, pid: Pid, is_worker: bool) {
        if !is_worker {
            // As PID 1 or subreaper we are given the orphans of others.
            log::debug!("reaped {pid}, which is no worker");
        }
        self.others.remove(&pid);
        self.hunts |= is_worker;
    }

    /// Kills what is adopted from dead workers, but for those that are `ours` without having been
    /// forked here.
    pub fn end(&mut self, ours: impl Fn(Pid) -> bool) {
        if !self.hunts {
            return;
        }
        let is_init = Pid::current() == Pid(1);
        let is_left = |pid: Pid| {
            if is_init {
                call_of(pid).is_some_and(|(worker, _)| !process::is_forked(worker))
            } else {
                let known = process::is_forked(pid) || spawn::is_child(pid) || ours(pid);
                !known && !self.others.contains(&pid)
            }
        };
        let mut left = tree::adopted();
        left.retain(|&pid| is_left(pid));
        if !left.is_empty() {
            let held = tree::hold_with_descendants(&left, is_left);
            let killed = counted(held.len(), "process", "processes");
            log::debug!("killed {killed} that a dead worker left");
            held.iter().for_each(Held::kill);
        }
        // A zombie is among them until it is reaped, which is when this is asked again.
        self.hunts = !left.is_empty();
    }
}
