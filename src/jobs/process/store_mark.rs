//! Shows the other jobs processes of the instance whether this one has the store open, and learns the same of them.
//!
//! A process alone with the store checks its log, and empties it. Another one that writes meanwhile would look like
//! damage. So a process shows that it opens the store before it looks at the others. Each record has a mark: the end of
//! the id of the instance, and whether the store is open. The master clears the mark of a dead process.

use std::sync::atomic::Ordering::SeqCst;

use crate::jobs::store::Opening;
use crate::link::scoreboard::WorkerRecord;
use crate::worker_init::JobsInstance;

/// The bit of a mark that says that the store is open. Without it, it is being opened.
const OPEN: u32 = 1;
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
    /// so that this one must wait. `was_opened` is whether the instance has had the store open.
    pub fn begin(&self, was_opened: bool) -> Option<Opening> {
        self.show(self.mark);
        let others = (self.records.iter().enumerate()).filter(|(index, _)| *index != self.own);
        let mut opening = if was_opened {
            Opening::Again
        } else {
            Opening::First
        };
        for (index, record) in others {
            match record.store.load(SeqCst) {
                mark if mark == self.mark | OPEN => opening = Opening::Beside,
                // If two begin at once, the first in the scoreboard goes on.
                mark if mark == self.mark && index < self.own => {
                    self.show(0);
                    return None;
                }
                _ => {}
            }
        }
        Some(opening)
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
    }
}
