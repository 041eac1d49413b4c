//! The records of an acceptor's sessions in the table that all acceptors of the listener share.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::link::ids::{Generation, Pid};
use crate::link::metrics_board::layout::Block;
use crate::link::session_table::{self, SessionRecord};
use crate::sys::process_tree;
use crate::worker_init::WorkerInit;

/// For how long the counted number of sessions of other acceptors is used.
const COUNT_MS: u64 = 50;
/// For how long a session of another acceptor that was seen alive is not looked at again.
const SEEN_MS: u64 = 1_000;

/// The records of one listener, and which of them this acceptor may claim next.
pub struct OwnRecords {
    pub all: &'static [SessionRecord],
    /// The place of the first record in the table of all listeners.
    first: usize,
    generation: Generation,
    acceptor: Pid,
    master: Pid,
    /// Where the sessions count.
    block: &'static Block,
    /// Records that were used before.
    free: Vec<usize>,
    /// Records without a process, as they were at the last search that found no free record.
    suspects: BTreeSet<usize>,
    /// How many sessions other acceptors have, and when that was counted.
    elsewhere: (usize, u64),
    /// The sessions of other acceptors: when each began, and when it was last seen.
    seen: BTreeMap<Pid, (u64, u64)>,
}

impl OwnRecords {
    pub fn new(boot: &WorkerInit<'_>) -> Self {
        let range = boot.isolated.as_ref().map(|isolated| isolated.range);
        let (all, first) = range.unwrap_or((&[], 0));
        OwnRecords {
            all,
            first,
            generation: boot.generation,
            acceptor: Pid::current(),
            master: boot.master,
            block: boot.metrics.block,
            free: Vec::new(),
            suspects: BTreeSet::new(),
            elsewhere: (0, 0),
            seen: BTreeMap::new(),
        }
    }

    /// The place of a record in the table of all listeners.
    pub fn place(&self, index: usize) -> usize {
        self.first + index
    }

    /// Returns the index of the record at a place in the table of all listeners. `None` for a place before those of
    /// this listener.
    pub fn index_of(&self, place: u32) -> Option<usize> {
        (place as usize).checked_sub(self.first)
    }

    /// Returns how many connections other acceptors of this listener have, including those of dead acceptors. A
    /// session can write any record, so each living session counts once. `is_own` returns whether a session belongs
    /// to this acceptor. If `is_exact`, a recent count is not reused.
    pub fn open_elsewhere(
        &mut self,
        is_own: impl Fn(Pid) -> bool,
        is_exact: bool,
        now_ms: u64,
    ) -> usize {
        let (count, at) = self.elsewhere;
        if at > 0 && now_ms < at + COUNT_MS && !is_exact {
            return count;
        }
        let used = session_table::claimed(self.all);
        let is_other =
            |record: &&SessionRecord| record.is_open() && record.acceptor() != self.acceptor;
        let mut seen = BTreeMap::new();
        for record in used.iter().filter(is_other) {
            let (pid, start) = (record.pid(), record.start_ticks());
            if is_own(pid) || seen.contains_key(&pid) {
                continue;
            }
            match self.seen.get(&pid) {
                Some(&(began, at)) if began == start && now_ms < at + SEEN_MS => {
                    seen.insert(pid, (start, at));
                }
                _ if self.is_session(pid, start) => {
                    seen.insert(pid, (start, now_ms));
                }
                _ => {}
            }
        }
        self.elsewhere = (seen.len(), now_ms);
        self.seen = seen;
        self.elsewhere.0
    }

    /// Returns the number of the session with this pid, if it is of this generation and its acceptor has died. Then
    /// it is a child of the master. Any session can write any record, so a record of a living session of this
    /// acceptor does not count. `is_living` returns whether a record has such a session.
    pub fn orphan(&self, pid: Pid, is_living: impl Fn(usize) -> bool) -> Option<usize> {
        let mut used = session_table::claimed(self.all).iter().enumerate();
        let is_its = |(index, record): &(usize, &SessionRecord)| {
            record.pid() == pid && self.is_of_another(record) && !is_living(*index)
        };
        let (index, record) = used.find(is_its)?;
        let is_orphan = process_tree::parent(pid) == Some(self.master)
            && process_tree::start_ticks(pid) == Some(record.start_ticks());
        is_orphan.then_some(index)
    }

    /// Returns the numbers of the sessions of this generation whose acceptor has died.
    pub fn orphans(&self) -> impl Iterator<Item = usize> {
        let used = session_table::claimed(self.all).iter().enumerate();
        let is_orphan = |record: &SessionRecord| {
            record.is_open()
                && self.is_of_another(record)
                && process_tree::parent(record.pid()) == Some(self.master)
        };
        used.filter(move |(_, record)| is_orphan(record))
            .map(|(index, _)| index)
    }

    /// Returns whether another acceptor of this generation lives and has sessions.
    pub fn has_successor(&self) -> bool {
        let mut used = session_table::claimed(self.all).iter();
        used.any(|record| {
            self.is_of_another(record)
                && process_tree::parent(record.pid()) == Some(record.acceptor())
                && process_tree::parent(record.acceptor()) == Some(self.master)
        })
    }

    fn is_of_another(&self, record: &SessionRecord) -> bool {
        record.is_used()
            && record.acceptor() != self.acceptor
            && record.generation() == self.generation
    }

    /// Returns whether a process began then, and is a child of the master or of one of its children.
    fn is_session(&self, pid: Pid, start_ticks: u64) -> bool {
        let parent = process_tree::parent(pid);
        let is_near = parent == Some(self.master)
            || parent.and_then(process_tree::parent) == Some(self.master);
        is_near && process_tree::start_ticks(pid) == Some(start_ticks)
    }

    /// Claims a record for the next session. `is_living` says whether a session has the record already: it
    /// may have written that the record is free.
    ///
    /// # Errors
    /// If all are taken.
    pub fn claim(&mut self, is_living: impl Fn(usize) -> bool) -> io::Result<usize> {
        let (acceptor, generation) = (self.acceptor, self.generation);
        while let Some(index) = self.free.pop() {
            if !is_living(index) && self.all[index].claim(acceptor, generation) {
                return Ok(index);
            }
        }
        let mut records = self.all.iter().enumerate();
        let found = records
            .position(|(index, record)| !is_living(index) && record.claim(acceptor, generation));
        let index = found.or_else(|| self.seize(&is_living));
        let index = index.ok_or(io::ErrorKind::ResourceBusy)?;
        session_table::note_claim(self.all, index);
        Ok(index)
    }

    /// Takes a record that seems to be used but has no process, because a session has written to it. The record must
    /// have had no process at the previous search too, because another acceptor may just be forking its session.
    fn seize(&mut self, is_living: impl Fn(usize) -> bool) -> Option<usize> {
        let mut pids = BTreeSet::new();
        let mut has_process = |record: &SessionRecord| {
            let pid = record.pid();
            self.is_session(pid, record.start_ticks()) && pids.insert(pid)
        };
        let has_none =
            |(index, record): &(usize, &SessionRecord)| !is_living(*index) && !has_process(record);
        let suspects = self.all.iter().enumerate().filter(has_none);
        let suspects: BTreeSet<usize> = suspects.map(|(index, _)| index).collect();
        let index = suspects.intersection(&self.suspects).next().copied();
        self.suspects = suspects;
        if let Some(index) = index {
            self.all[index].seize(self.acceptor, self.generation);
        }
        index
    }

    /// Counts the lines of the access log that an ended session had not written.
    pub fn lose_lines(&self, index: usize) {
        self.block.access.lose(self.all[index].take_lines());
    }

    /// The session with this record was reaped, or never forked.
    pub fn release(&mut self, index: usize) {
        self.lose_lines(index);
        self.all[index].release();
        self.free.push(index);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::session_memory::SessionTable;
    use crate::sys::shared_memory::array;
    use std::num::NonZeroUsize;

    #[test]
    fn only_a_child_of_the_master_without_the_record_of_a_living_session_is_an_orphan() {
        let table = SessionTable::new().unwrap();
        let pid = Pid::current();
        let length = NonZeroUsize::MIN;
        let (blocks, _file) = array::<Block>(length).unwrap();
        let records = |master| OwnRecords {
            block: &blocks[0],
            all: table.range(0),
            first: 0,
            generation: Generation(1),
            acceptor: Pid(i32::MAX),
            master,
            free: Vec::new(),
            suspects: BTreeSet::new(),
            elsewhere: (0, 0),
            seen: BTreeMap::new(),
        };
        let parent = records(process_tree::parent(pid).unwrap());
        assert_eq!(parent.orphan(pid, |_| false), None);
        for index in [2, 3] {
            let record = &table.range(0)[index];
            assert!(record.claim(Pid(7), Generation(1)));
            session_table::note_claim(table.range(0), index);
            record.set_process(pid, process_tree::start_ticks(pid).unwrap());
            record.open((None, None), 1);
        }
        assert_eq!(parent.orphan(pid, |_| false), Some(2));
        assert_eq!(parent.orphan(pid, |index| index == 2), Some(3));
        assert_eq!(parent.orphan(pid, |_| true), None);
        assert_eq!(records(Pid(1 << 30)).orphan(pid, |_| false), None);
    }
}
