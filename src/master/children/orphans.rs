//! What a dead worker leaves behind: the commands that it ran, and what came from them. As a
//! subreaper the master adopts them; nobody waits for them any more, so they are killed.
//!
//! It begins with a worker's death and goes on until nothing is adopted any more: what a killed one
//! had below it is adopted when that one is reaped. Children that the master had before it was one
//! are left alone. As PID 1 it is given everybody's orphans, and takes only those that carry a
//! worker's mark; after an upgrade the mark tells them from what the new program has started. `marks` reads
//! marks. Nothing is waited for here: each death is a signal, and the loop looks again.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;

use super::mark_reader::{MOST_ASKED, MarkReader, Origin};
use crate::logging::pluralize;
use crate::master::main_loop::{Master, now};
use crate::master::policy::event::{HumanDuration, Millis};
use crate::master::upgrade::state::OrphansState;
use crate::sys::process::{self, Pid};
use crate::sys::process_tree;
use crate::sys::process_tree::PidFd;
use crate::sys::spawn;

/// Readers that are late and have not ended; with so many, marks are not read any more.
const MOST_LATE: usize = 4;
/// Between two tries when there is no process to be had.
const RETRY: Millis = 1_000;

#[derive(Debug, Default)]
pub(crate) struct Orphans {
    /// Children from before, such as a shell's that became us by exec.
    preexisting: BTreeSet<Pid>,
    /// Children that were found after an upgrade. The mark tells whether a worker has left them, or the
    /// new program has started them; they are left alone until it is read.
    unclear: BTreeSet<Pid>,
    /// A worker has died, and what it left may not be gone yet.
    is_sweep_pending: bool,
    /// Children whose marks were read since a worker has died.
    read: BTreeSet<Pid>,
    /// Children whose marks could not be read in time.
    unreadable: BTreeSet<Pid>,
    /// Children that were killed for their marks, and are not reaped yet.
    killed: BTreeSet<Pid>,
    reader: Option<MarkReader>,
    /// Readers that were killed at their deadline, and are not reaped yet.
    late: BTreeSet<Pid>,
    /// When to try again to fork a reader.
    retry_at: Option<Millis>,
}

impl Orphans {
    /// To be made before the first fork.
    pub fn new() -> Self {
        Orphans {
            preexisting: process_tree::direct_children().into_iter().collect(),
            ..Orphans::default()
        }
    }

    /// What the program after this one has to know.
    /// `pools` are the pool processes: a program that does not know them must not end them.
    pub fn export(&self, pools: impl Iterator<Item = Pid>) -> OrphansState {
        // What is unclear is new to the next program too, which finds out what it is.
        let is_clear = |pid: &Pid| !self.unclear.contains(pid);
        let children = process_tree::direct_children().into_iter().filter(is_clear);
        OrphansState {
            others: (self.preexisting.iter().copied().chain(pools))
                .map(|pid| pid.0)
                .collect(),
            children: Some(children.map(|pid| pid.0).collect()),
            hunts: self.is_sweep_pending,
        }
    }

    /// What the program before this one knew; and what the program's own functions have started since
    /// the exec, as they may before the first fork. To be called once workers and keepers (`ours`)
    /// are known. What was adopted meanwhile is told from that by a worker's mark, later.
    pub fn import(state: OrphansState, ours: impl Fn(Pid) -> bool) -> Self {
        let others: BTreeSet<Pid> = state.others.into_iter().map(Pid).collect();
        let mut unclear = BTreeSet::new();
        if let Some(before) = state.children {
            let is_new = |pid: &Pid| {
                !before.contains(&pid.0)
                    && !others.contains(pid)
                    && !process::is_forked(*pid)
                    && !ours(*pid)
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

    /// Whether a child is none of the server's, as far as is known: it was there before.
    pub fn is_from_before(&self, pid: Pid) -> bool {
        self.preexisting.contains(&pid) || self.unclear.contains(&pid)
    }

    /// A child was reaped: a worker, or one that is not ours.
    pub fn reaped(&mut self, pid: Pid, is_worker: bool) {
        if !is_worker {
            // As PID 1 or subreaper we are given the orphans of others.
            log::debug!("reaped {pid}, which is no worker");
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
            // What belongs to it did not belong to a dead worker when it was read.
            self.read.clear();
        }
    }

    /// A child was reaped: whether it was a reader of marks. What follows from its answers is for `kill_leftovers`,
    /// which knows who else was reaped.
    pub fn reader_ended(&mut self, pid: Pid) -> bool {
        match &mut self.reader {
            Some(reader) if reader.pid == pid => {
                reader.was_reaped = true;
                true
            }
            _ => self.late.remove(&pid),
        }
    }

    /// What a reader writes to, to be polled.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.reader.as_ref().and_then(MarkReader::output)
    }

    /// When `kill_leftovers` is to be called at the latest.
    pub fn deadline(&self) -> Option<Millis> {
        let reader = self.reader.as_ref().map(|reader| reader.deadline);
        reader.or(self.retry_at)
    }

    /// Kills what is adopted from dead workers, but for those that are `ours` without having been
    /// forked here. To be called after each round of deaths, and at the deadline.
    pub fn kill_leftovers(&mut self, now: Millis, origin: Origin<'_>, ours: impl Fn(Pid) -> bool) {
        self.read_marks(now);
        if !self.is_sweep_pending && self.unclear.is_empty() {
            return;
        }
        let is_known = |pid: Pid| process::is_forked(pid) || spawn::is_child(pid) || ours(pid);
        let mut left = process_tree::direct_children();
        left.retain(|&pid| !is_known(pid) && !self.preexisting.contains(&pid));
        let is_init = Pid::current() == Pid(1);
        if self.is_sweep_pending && !is_init {
            let mut all = left.clone();
            all.retain(|pid| !self.unclear.contains(pid));
            kill(&all);
            // A zombie is among them until it is reaped, which is when this is asked again.
            self.is_sweep_pending = !all.is_empty();
        }
        left.retain(|pid| {
            let is_wanted = is_init && self.is_sweep_pending || self.unclear.contains(pid);
            is_wanted && !self.is_read(*pid) && !process_tree::is_zombie(*pid)
        });
        if is_init && left.is_empty() && self.reader.is_none() && self.killed.is_empty() {
            self.is_sweep_pending = false;
        }
        self.ask(left, now, origin);
    }

    /// Whether it is of no use to have the mark of this one read.
    fn is_read(&self, pid: Pid) -> bool {
        self.read.contains(&pid) || self.unreadable.contains(&pid) || self.killed.contains(&pid)
    }

    /// Has the marks of these read, if no reader is at work.
    fn ask(&mut self, mut pids: Vec<Pid>, now: Millis, origin: Origin<'_>) {
        let is_too_early = self.retry_at.is_some_and(|at| now < at);
        if pids.is_empty() || self.reader.is_some() || is_too_early {
            return;
        }
        self.retry_at = None;
        if self.late.len() >= MOST_LATE {
            return pids.into_iter().for_each(|pid| self.cannot_read(pid));
        }
        pids.truncate(MOST_ASKED);
        match MarkReader::start(pids, origin, now) {
            Ok(reader) => self.reader = Some(reader),
            Err(error) => {
                log::warn!(
                    "no process could be started that looks for what a dead worker has left: {error}; \
                     tried again in {}",
                    HumanDuration(RETRY)
                );
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    /// Takes in what a reader has found out, once it has ended or is late.
    fn read_marks(&mut self, now: Millis) {
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
                Some(worker) if !process::is_forked(worker) => {
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
        // What they had below them is adopted when they are reaped.
        self.is_sweep_pending |= !left.is_empty();
        missing.into_iter().for_each(|pid| self.cannot_read(pid));
    }

    /// Leaves alone what nobody can tell about.
    fn cannot_read(&mut self, pid: Pid) {
        log::warn!(
            "the environment of process {pid} could not be read in time, so whether a dead worker has \
             left it is not known: it is left alone; end it by hand if nobody needs it pid={pid}"
        );
        self.unreadable.insert(pid);
        if self.unclear.remove(&pid) {
            self.preexisting.insert(pid);
        }
    }
}

impl Master<'_> {
    /// Ends what dead workers have left; takes in what a reader of marks has found out.
    pub(crate) fn end_orphans(&mut self) {
        let origin = Origin {
            title: self.setup.title,
            program: &self.setup.program,
        };
        let is_keeper = |pid| self.workers.is_keeper(pid);
        self.orphans.kill_leftovers(now(), origin, is_keeper);
    }
}

/// Kills these and all below them: children that are not reaped, so their pids are theirs.
fn kill(pids: &[Pid]) {
    if pids.is_empty() {
        return;
    }
    let held = process_tree::open_with_descendants(pids, |_| true);
    let killed = pluralize(held.len(), "process", "processes");
    log::debug!("killed {killed} that a dead worker left");
    held.iter().for_each(PidFd::kill);
}
