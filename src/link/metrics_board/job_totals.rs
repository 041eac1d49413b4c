//! Sums the counters of durable jobs over all jobs processes that the board has.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed};

use super::job_cells::{ENDS, JobCells, OUTCOMES, offset_of_jobs};
use super::layout::{NAMES, OTHER_NAME};
use super::reader::{BoardReader, HistogramCounts};

/// The summed counters of all jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobTotals {
    pub enqueued: u64,
    pub stale: u64,
    pub commit: HistogramCounts,
    pub wait: HistogramCounts,
    pub run: HistogramCounts,
    /// In the order of their places. The last one has those of all others.
    pub methods: Vec<JobMethodTotals>,
}

/// The summed counters of the jobs of a method.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobMethodTotals {
    pub name: String,
    /// By `OUTCOMES`.
    pub attempts: [u64; OUTCOMES.len()],
    /// By `ENDS`.
    pub ended: [u64; ENDS.len()],
}

impl JobTotals {
    /// Sums the counters of a board; `None` if it never had a jobs process.
    pub fn of(board: &BoardReader) -> Option<Self> {
        let names = board.method_names().into_iter();
        let names = names.chain([OTHER_NAME.to_owned()]);
        let mut methods: Vec<JobMethodTotals> = names
            .map(|name| JobMethodTotals {
                name,
                ..JobMethodTotals::default()
            })
            .collect();
        let mut totals = JobTotals::default();
        let mut has_jobs = false;
        for (record, block) in board.numbered_blocks() {
            if block.has_jobs.load(Acquire) == 0 {
                continue;
            }
            let Some(cells) = board.record::<JobCells>(offset_of_jobs(record)) else {
                continue;
            };
            has_jobs = true;
            add(&mut totals.enqueued, &cells.enqueued);
            add(&mut totals.stale, &cells.stale);
            totals.commit.add(&cells.commit);
            totals.wait.add(&cells.wait);
            totals.run.add(&cells.run);
            let last = methods.len() - 1;
            for (number, method) in methods.iter_mut().enumerate() {
                let place = if number == last { NAMES } else { number };
                let counters = &cells.methods[place];
                let attempts = method.attempts.iter_mut().zip(&counters.attempts);
                attempts.for_each(|(sum, counter)| add(sum, counter));
                let ended = method.ended.iter_mut().zip(&counters.ended);
                ended.for_each(|(sum, counter)| add(sum, counter));
            }
        }
        totals.methods = methods;
        has_jobs.then_some(totals)
    }
}

fn add(sum: &mut u64, counter: &AtomicU64) {
    *sum = sum.wrapping_add(counter.load(Relaxed));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::layout::HandlerKind;
    use super::super::{BlockWriter, MetricsBoard};
    use super::*;

    #[test]
    fn the_counters_of_all_jobs_processes_are_summed_and_become_the_base_of_another_board() {
        let mut board = MetricsBoard::new(50).unwrap();
        let names = [("a", HandlerKind::Function), ("b", HandlerKind::Pool)];
        let reader =
            |board: &MetricsBoard| BoardReader::new(board.file().try_clone().unwrap()).unwrap();
        let access = board.access(1, names.into_iter(), [].into_iter()).unwrap();
        assert_eq!(JobTotals::of(&reader(&board)), None);
        for record in [3, 4] {
            let access = board.access(record, names.into_iter(), [].into_iter());
            let cells = board.job_cells(record).unwrap();
            let writer = BlockWriter::new(access.unwrap().block, false);
            writer.add(&cells.enqueued, 5);
            writer.observe(&cells.commit, 2_000_000, 3);
            writer.add(&cells.methods[1].attempts[1], 2);
            writer.add(&cells.methods[NAMES].ended[3], 1);
            assert_eq!(board.job_status(record), None);
            cells.status.write("{}");
            assert_eq!(board.job_status(record).as_deref(), Some("{}"));
        }
        let totals = JobTotals::of(&reader(&board)).unwrap();
        assert_eq!((totals.enqueued, totals.commit.count()), (10, 6));
        let methods: Vec<_> = totals.methods.iter().map(|it| &*it.name).collect();
        assert_eq!(methods, ["a", "b", OTHER_NAME]);
        assert_eq!(
            (totals.methods[1].attempts[1], totals.methods[2].ended[3]),
            (4, 2)
        );

        let mut next = MetricsBoard::new(50).unwrap();
        next.add_base(&board.totals()).unwrap();
        assert_eq!(JobTotals::of(&reader(&next)).as_ref(), Some(&totals));
        let again = MetricsBoard::of(next.file().try_clone().unwrap())
            .unwrap()
            .unwrap();
        assert_eq!(again.totals(), board.totals());
        assert_eq!(access.method(0), 0);
    }
}
