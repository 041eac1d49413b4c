//! Kills what a dead worker leaves behind: commands that it ran, and their descendants. The master is a
//! subreaper and adopts them. Nothing else waits for them.
//!
//! The sweep begins with a worker's death and ends when nothing is adopted any more: the children of a killed process
//! are adopted when it is reaped. Children that the process had before it became the master (from a shell that exec'd
//! it) are left alone. As PID 1 the master adopts all orphans of the system, and kills only those with the mark of a
//! dead worker (the variable PREFORKD_CALL). After an upgrade, marks distinguish leftovers from children that functions
//! of the new host program started. [`super::mark_reader`] reads marks. Nothing here waits: each death raises SIGCHLD,
//! and then the main loop calls this code again.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::mark_reader::{MOST_ASKED, MarkReader, ReaderTitle};
use super::workers::Children;
use crate::logging::{HumanDuration, pluralize};
use crate::master::policy::event::Millis;
use crate::sys::process::Pid;
use crate::sys::process_tree;
use crate::sys::process_tree::PidFd;
use crate::sys::spawn;
use crate::throttle::limiter::SharedLimiter;

/// The largest number of late readers that still run. At this limit no further reader starts, and no process is killed
/// because of its mark.
const MOST_LATE: usize = 4;
/// The time until the next try when no reader could be forked.
const RETRY: Millis = 1_000;

#[derive(Debug, Default)]
pub(crate) struct Orphans {
    /// Children from before the start, such as those of a shell that has exec'd the master.
    preexisting: BTreeSet<Pid>,
    /// Children that were found after an upgrade. They are left alone until their mark is read.
    unclear: BTreeSet<Pid>,
    /// Whether a worker has died and some of its leftovers may still run.
    is_sweep_pending: bool,
    /// Children whose marks were read since the last death of a worker.
    read: BTreeSet<Pid>,
    /// Children whose marks could not be read in time.
    unreadable: BTreeSet<Pid>,
    /// Children that were killed and not reaped.
    killed: BTreeSet<Pid>,
    reader: Option<MarkReader>,
    /// Readers that were killed at their deadline and not reaped.
    late: BTreeSet<Pid>,
    /// When to try again to fork a reader.
    retry_at: Option<Millis>,
}

/// The children of the master that are not in the other tables.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrphansState {
    /// Children from before the start.
    pub others: Vec<i32>,
    /// Every child right before the exec. A child that is new since the exec was started by the program's own
    /// functions, or was adopted. `None` if the old program did not know this member.
    #[serde(default)]
    pub children: Option<Vec<i32>>,
    /// Whether leftovers of a dead worker may exist.
    pub hunts: bool,
}

impl Orphans {
    /// Records the existing children. Call it before the first fork.
    pub fn new() -> Self {
        Orphans {
            preexisting: process_tree::direct_children().into_iter().collect(),
            ..Orphans::default()
        }
    }

    /// Returns the state for an upgrade. `ours` has the pool processes and acceptors. They are in the state so that a
    /// program that does not know them does not kill them.
    pub fn export(&self, ours: impl Iterator<Item = Pid>) -> OrphansState {
        // Leave out unclear children: the next program then treats them as new and reads their marks itself.
        let is_clear = |pid: &Pid| !self.unclear.contains(pid);
        let children = process_tree::direct_children().into_iter().filter(is_clear);
        OrphansState {
            others: (self.preexisting.iter().copied().chain(ours))
                .map(|pid| pid.0)
                .collect(),
            children: Some(children.map(|pid| pid.0).collect()),
            hunts: self.is_sweep_pending,
        }
    }

    /// Restores the state after an upgrade. Call it when workers and keepers are known. A child that is new
    /// since the exec was started by the program's own functions, or was adopted. Its mark tells the two apart.
    pub fn import(state: OrphansState, workers: &Children) -> Self {
        let others: BTreeSet<Pid> = state.others.into_iter().map(Pid).collect();
        let mut unclear = BTreeSet::new();
        if let Some(before) = state.children {
            let is_new = |pid: &Pid| {
                !before.contains(&pid.0) && !others.contains(pid) && !workers.is_own(*pid)
            };
            unclear.extend(process_tree::direct_children().into_iter().filter(is_new));
        }
        Orphans {
            preexisting: others,
            unclear,
            is_sweep_pending: state.hunts,
            ..Orphans::default()
        }
    }

    /// Returns whether a child cannot be a keeper: it was there before the start, or it is a reader.
    pub fn cannot_be_keeper(&self, pid: Pid) -> bool {
        self.preexisting.contains(&pid) || self.unclear.contains(&pid) || self.is_reader(pid)
    }

    fn is_reader(&self, pid: Pid) -> bool {
        self.late.contains(&pid) || self.reader.as_ref().is_some_and(|it| it.pid == pid)
    }

    /// Forgets a child that was reaped. `is_worker` also covers pool processes, acceptors and sessions.
    pub fn reaped(&mut self, pid: Pid, is_worker: bool) {
        if !is_worker {
            // The master is PID 1 or a subreaper and adopts orphans.
            log::debug!("reaped {pid}, which is not a worker");
        }
        let sets = [
            &mut self.preexisting,
            &mut self.unclear,
            &mut self.read,
            &mut self.unreadable,
            &mut self.killed,
        ];
        for set in sets {
            set.remove(&pid);
        }
        if let Some(reader) = &mut self.reader {
            reader.forget(pid);
        }
        if is_worker {
            self.is_sweep_pending = true;
            // A child whose mark was read may belong to this worker.
            self.read.clear();
        }
    }

    /// Returns whether a reaped child was a reader. Its answers are handled by `kill_leftovers`, which
    /// knows who else was reaped.
    pub fn reader_ended(&mut self, pid: Pid) -> bool {
        match &mut self.reader {
            Some(reader) if reader.pid == pid => {
                reader.was_reaped = true;
                true
            }
            _ => self.late.remove(&pid),
        }
    }

    /// Returns the reader's pipe for poll(2).
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.reader.as_ref().and_then(MarkReader::output)
    }

    /// Returns when `kill_leftovers` must be called at the latest.
    pub fn deadline(&self) -> Option<Millis> {
        let reader = self.reader.as_ref().map(|reader| reader.deadline);
        reader.or(self.retry_at)
    }

    /// Kills the leftovers of dead workers. Call it after each round of deaths, and at the deadline. A child of
    /// `sys::closer` may be killed too. That does no harm, because its work is done by then.
    pub fn kill_leftovers(
        &mut self,
        now: Millis,
        reader_title: ReaderTitle<'_>,
        workers: &Children,
    ) {
        self.read_marks(now, workers);
        if !self.is_sweep_pending && self.unclear.is_empty() {
            self.retry_at = None;
            return;
        }
        let is_known = |pid: Pid| {
            workers.is_own(pid)
                || spawn::is_child(pid)
                || self.is_reader(pid)
                || self.preexisting.contains(&pid)
        };
        let mut left = process_tree::direct_children();
        left.retain(|&pid| !is_known(pid));
        let is_init = Pid::current() == Pid(1);
        if self.is_sweep_pending && !is_init {
            let mut all = left.clone();
            all.retain(|pid| !self.unclear.contains(pid));
            kill(&all);
            // A zombie is still in the list. After it was reaped, this function is called again.
            self.is_sweep_pending = !all.is_empty();
        }
        left.retain(|pid| {
            let is_wanted = is_init && self.is_sweep_pending || self.unclear.contains(pid);
            is_wanted && !self.is_read(*pid) && !process_tree::is_zombie(*pid)
        });
        if is_init && left.is_empty() && self.reader.is_none() && self.killed.is_empty() {
            self.is_sweep_pending = false;
        }
        self.ask(left, now, reader_title);
    }

    /// Returns whether reading the mark of a process would bring nothing new.
    fn is_read(&self, pid: Pid) -> bool {
        self.read.contains(&pid) || self.unreadable.contains(&pid) || self.killed.contains(&pid)
    }

    /// Starts a reader for these processes, if none is running.
    fn ask(&mut self, mut pids: Vec<Pid>, now: Millis, reader_title: ReaderTitle<'_>) {
        if pids.is_empty() {
            self.retry_at = None;
            return;
        }
        let is_too_early = self.retry_at.is_some_and(|at| now < at);
        if self.reader.is_some() || is_too_early {
            return;
        }
        self.retry_at = None;
        if self.late.len() >= MOST_LATE {
            return pids.into_iter().for_each(|pid| self.cannot_read(pid));
        }
        pids.truncate(MOST_ASKED);
        match MarkReader::start(pids, reader_title, now) {
            Ok(reader) => self.reader = Some(reader),
            Err(error) => {
                log::warn!(
                    "could not start a process that looks for leftovers of a dead worker: {error}; \
                     next try in {}",
                    HumanDuration(RETRY)
                );
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    /// Handles the answers of a reader that has ended or is late.
    fn read_marks(&mut self, now: Millis, workers: &Children) {
        let is_done = |reader: &mut MarkReader| {
            reader.listen();
            reader.was_reaped || now >= reader.deadline
        };
        let Some(reader) = self.reader.take_if(is_done) else {
            return;
        };
        if !reader.was_reaped {
            reader.kill();
            self.late.insert(reader.pid);
        }
        let (answers, missing) = reader.answers();
        let mut left = Vec::new();
        for (pid, worker) in answers {
            let was_unclear = self.unclear.remove(&pid);
            match worker {
                Some(worker) if workers.get(worker).is_none() => {
                    self.killed.insert(pid);
                    left.push(pid);
                }
                Some(_) => {
                    self.read.insert(pid);
                }
                None => {
                    self.read.insert(pid);
                    if was_unclear {
                        self.preexisting.insert(pid);
                    }
                }
            }
        }
        kill(&left);
        // Their children are adopted when they are reaped.
        self.is_sweep_pending |= !left.is_empty();
        missing.into_iter().for_each(|pid| self.cannot_read(pid));
    }

    /// Leaves a process alone because nothing is known of it.
    fn cannot_read(&mut self, pid: Pid) {
        // A command can leave thousands of such processes behind.
        static UNREADABLE: SharedLimiter = SharedLimiter::new();
        let text = format!(
            "could not read the environment of process {pid} in time: it may be a leftover of a dead \
             worker and is left alone; end it if it is not needed pid={pid}"
        );
        UNREADABLE.log(log::Level::Warn, text);
        self.unreadable.insert(pid);
        if self.unclear.remove(&pid) {
            self.preexisting.insert(pid);
        }
    }
}

/// Kills these children and their descendants. The children are not reaped, so their pids are valid.
fn kill(pids: &[Pid]) {
    if pids.is_empty() {
        return;
    }
    let held = process_tree::open_with_descendants(pids, |_| true);
    let killed = pluralize(held.len(), "process", "processes");
    log::debug!("killed {killed} that a dead worker has left behind");
    held.iter().for_each(PidFd::kill);
}
