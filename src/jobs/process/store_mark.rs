//! Shows the other jobs processes of the instance whether this one has the store open, and learns the same of them.
//!
//! A process alone with the store checks its log, and empties it. Another one that writes meanwhile would look like
//! damage. So a process shows that it opens the store before it looks at the others. Each record has a mark: the end of
//! the id of the instance, and whether the store is open. The master clears the mark of a dead process.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use crate::jobs::store::Opening;
use crate::link::scoreboard::WorkerRecord;
use crate::worker_init::JobsInstance;

/// The bit of a mark that says that the store is open. Without it, it is being opened.
const OPEN: u32 = 1;
/// After this number of unused records in a row, no further process is expected.
const GAP: usize = 64;
/// Each mark has it, so that none is zero.
const IS_MARK: u32 = 2;

/// The mark of this process, and those of the others.
#[derive(Debug, Clone, Copy)]
pub struct StoreMark {
    records: &'static [WorkerRecord],
    own: usize,
    /// Without `OPEN`.
    mark: u32,
}

impl StoreMark {
    /// `own` is the index of the record of this process.
    pub fn new((records, own): (&'static [WorkerRecord], usize), instance: &JobsInstance) -> Self {
        let [.., a, b, c, d] = instance.id;
        let end = u32::from_be_bytes([a, b, c, d]);
        StoreMark {
            records,
            own,
            mark: (end | IS_MARK) & !OPEN,
        }
    }

    /// Shows that this process opens the store. Returns how; `None` if another process of the instance is opening it,
    /// so that this one must begin again later. `was_opened` is whether the instance has had the store open.
    pub fn begin(&self, was_opened: bool) -> Option<Opening> {
        self.show(self.mark);
        let (mut is_open, mut is_opening, mut unused) = (false, false, 0);
        for (index, record) in self.records.iter().enumerate() {
            let mark = record.store.load(SeqCst);
            if index == self.own {
                continue;
            }
            is_open |= mark == self.mark | OPEN;
            if mark == self.mark {
                // If two begin at once, both see it. The one that comes first in the scoreboard keeps its mark, and
                // opens the store when the other has hidden its own.
                is_opening = true;
                if index < self.own {
                    self.show(0);
                    return None;
                }
            }
            // Behind a long gap there are no processes. Reading all records would allocate their memory.
            unused = match mark == 0 && record.heartbeat_ms.load(Relaxed) == 0 {
                true => unused + 1,
                false => 0,
            };
            if unused > GAP && index > self.own {
                break;
            }
        }
        match (is_opening, is_open, was_opened) {
            (true, _, _) => None,
            (false, true, _) => Some(Opening::Beside),
            (false, false, true) => Some(Opening::Again),
            (false, false, false) => Some(Opening::First),
        }
    }

    /// Shows that the store is open.
    pub fn opened(&self) {
        self.show(self.mark | OPEN);
    }

    /// Shows that this process does not have the store open.
    pub fn closed(&self) {
        self.show(0);
    }

    fn show(&self, mark: u32) {
        self.records[self.own].store.store(mark, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::scoreboard::Scoreboard;

    fn mark(board: &Scoreboard, own: usize, mark: u32) -> StoreMark {
        StoreMark {
            records: board.records(),
            own,
            mark,
        }
    }

    #[test]
    fn only_a_process_of_the_instance_that_has_the_store_open_counts() {
        let board = Scoreboard::new().unwrap();
        let (own, other, foreign) = (mark(&board, 5, 8), mark(&board, 7, 8), mark(&board, 6, 10));
        assert_eq!(own.begin(false), Some(Opening::First));
        assert_eq!(own.begin(true), Some(Opening::Again));
        foreign.opened();
        assert_eq!(own.begin(true), Some(Opening::Again));
        other.opened();
        assert_eq!(own.begin(true), Some(Opening::Beside));
        other.closed();
        assert_eq!(own.begin(true), Some(Opening::Again));
        own.opened();
        assert_eq!(other.begin(true), Some(Opening::Beside));
        board.record(5).clear_capacity();
        assert_eq!(other.begin(true), Some(Opening::Again), "it is dead");
    }

    #[test]
    fn of_two_that_open_at_once_one_waits() {
        let board = Scoreboard::new().unwrap();
        let (first, second) = (mark(&board, 5, 8), mark(&board, 7, 8));
        assert_eq!(first.begin(false), Some(Opening::First));
        assert_eq!(second.begin(false), None);
        assert_eq!(first.begin(false), Some(Opening::First));
        first.opened();
        assert_eq!(second.begin(true), Some(Opening::Beside));
        first.closed();
        second.closed();
        // In the other order the first one waits, and then opens the store.
        assert_eq!(second.begin(true), Some(Opening::Again));
        assert_eq!(first.begin(true), None);
        assert_eq!(second.begin(true), None, "it hides its mark");
        assert_eq!(first.begin(true), Some(Opening::Again));
        first.closed();
        assert_eq!(second.begin(true), Some(Opening::Again));
    }
}
