//! Counts what happens to jobs, and publishes the status of the store.
//!
//! The counters lie on the metrics board, which outlives the jobs process. The status is a text beside them, which
//! the master reads without asking.

use std::collections::HashMap;

use super::policy::UnixMs;
use super::policy::states::{AttemptCause, EndReason, JobState};
use crate::link::metrics_board::job_cells::{ENDS, JobCells, MOST_STATUS};
use crate::link::metrics_board::layout::{HistogramCells, OTHER};
use crate::link::metrics_board::{BlockWriter, HistogramCounts, MetricsAccess};
use crate::protocol::control::{CommitTimes, JobsStatus, QueueStatus};

/// The counters and the status of one jobs process.
#[derive(Debug)]
pub struct JobFigures {
    writer: BlockWriter,
    cells: &'static JobCells,
    /// The places of methods on the board.
    places: HashMap<String, usize>,
}

impl JobFigures {
    /// `access` belongs to this process, and `methods` are the names by their numbers in it. `None` if the process
    /// has no counters of jobs.
    pub fn new<'a>(access: &MetricsAccess, methods: impl Iterator<Item = &'a str>) -> Option<Self> {
        let methods = methods.enumerate();
        Some(JobFigures {
            writer: BlockWriter::new(access.block, false),
            cells: access.jobs?,
            places: methods
                .map(|(number, name)| (name.to_owned(), access.method(number)))
                .collect(),
        })
    }

    /// Counts stored jobs.
    pub fn enqueued(&self, jobs: u64) {
        self.writer.add(&self.cells.enqueued, jobs);
    }

    /// Counts an outcome that was refused because its attempt was not the current one.
    pub fn stale(&self) {
        self.writer.add(&self.cells.stale, 1);
    }

    /// Counts a commit that took this time.
    pub fn committed(&self, ns: u64) {
        self.writer.observe(&self.cells.commit, ns, 1);
    }

    /// Counts a claim. `due` is when the job was due.
    pub fn claimed(&self, due: UnixMs, now: UnixMs) {
        let waited_ns = now.saturating_sub(due).saturating_mul(1_000_000);
        self.writer.observe(&self.cells.wait, waited_ns, 1);
    }

    /// Counts an attempt that has ended. `ran_ns` is `None` if it never began.
    pub fn attempted(&self, method: &str, cause: AttemptCause, ran_ns: Option<u64>) {
        let attempts = &self.cells.methods[self.place(method)].attempts;
        if let Some(counter) = attempts.get(cause.number() as usize - 1) {
            self.writer.add(counter, 1);
        }
        if let Some(ran_ns) = ran_ns {
            self.writer.observe(&self.cells.run, ran_ns, 1);
        }
    }

    /// Counts a job that has ended.
    pub fn ended(&self, method: &str, state: JobState, reason: Option<EndReason>) {
        let reason = reason.map_or("", EndReason::name);
        let end = ENDS.iter().position(|end| *end == (state.name(), reason));
        let ended = &self.cells.methods[self.place(method)].ended;
        if let Some(counter) = end.and_then(|end| ended.get(end)) {
            self.writer.add(counter, 1);
        }
    }

    /// Publishes the status of the store. Methods that have no room are left out, those with the fewest jobs first.
    pub fn publish(&self, mut status: JobsStatus) {
        status.commit_ms = commit_times(&self.cells.commit);
        let stale = &self.cells.stale;
        status.stale = stale.load(std::sync::atomic::Ordering::Relaxed);
        loop {
            // Plain data cannot fail.
            let text = serde_json::to_string(&status).unwrap_or_default();
            if text.len() <= MOST_STATUS || status.methods.is_empty() {
                return self.cells.status.write(&text);
            }
            let jobs = |queue: &QueueStatus| queue.waiting + queue.running + queue.dead;
            status
                .methods
                .sort_by_key(|queue| std::cmp::Reverse(jobs(queue)));
            status.methods.truncate(status.methods.len() / 2);
        }
    }

    fn place(&self, method: &str) -> usize {
        self.places.get(method).copied().unwrap_or(OTHER)
    }
}

fn commit_times(cells: &HistogramCells) -> CommitTimes {
    let mut counts = HistogramCounts::default();
    counts.add(cells);
    CommitTimes {
        p50_us: counts.quantile_us(0.5),
        p99_us: counts.quantile_us(0.99),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::metrics_board::job_cells::OUTCOMES;
    use crate::link::metrics_board::layout::HandlerKind;
    use crate::link::metrics_board::{BoardReader, JobTotals, MetricsBoard};

    fn figures() -> (MetricsBoard, JobFigures) {
        let mut board = MetricsBoard::new(1).unwrap();
        let methods = [("a", HandlerKind::Function)];
        let mut access = board
            .access(2, methods.into_iter(), [].into_iter())
            .unwrap();
        assert!(JobFigures::new(&access, ["a"].into_iter()).is_none());
        access.jobs = Some(board.job_cells(2).unwrap());
        let figures = JobFigures::new(&access, ["a"].into_iter()).unwrap();
        (board, figures)
    }

    #[test]
    fn the_labels_of_the_board_are_the_names_of_the_policy() {
        let causes: Vec<&str> = AttemptCause::ALL.iter().map(|cause| cause.name()).collect();
        assert_eq!(causes, OUTCOMES);
        let numbers = AttemptCause::ALL.iter().zip(1..);
        assert!(
            numbers
                .into_iter()
                .all(|(cause, number)| cause.number() == number)
        );
        let dead = EndReason::ALL.iter().map(|reason| ("dead", reason.name()));
        let ends: Vec<_> = [("done", ""), ("cancelled", "")]
            .into_iter()
            .chain(dead)
            .collect();
        assert_eq!(ends, ENDS);
    }

    #[test]
    fn what_happens_to_jobs_is_counted_by_method() {
        let (board, counters) = figures();
        counters.enqueued(3);
        counters.stale();
        counters.committed(2_000_000);
        counters.claimed(1_000, 1_250);
        counters.attempted("a", AttemptCause::Error, Some(5_000_000));
        counters.attempted("a", AttemptCause::NeverBegun, None);
        counters.attempted("gone", AttemptCause::Result, Some(1));
        counters.ended("a", JobState::Dead, Some(EndReason::Attempts));
        counters.ended("a", JobState::Cancelled, None);
        let reader = BoardReader::new(board.file().try_clone().unwrap()).unwrap();
        let totals = JobTotals::of(&reader).unwrap();
        assert_eq!((totals.enqueued, totals.stale), (3, 1));
        assert_eq!((totals.commit.count(), totals.run.count()), (1, 2));
        let waited = totals.wait.quantile_us(0.5).unwrap();
        assert!((225_000..=250_000).contains(&waited), "{waited}");
        let [own, others] = &totals.methods[..] else {
            panic!("{totals:?}");
        };
        assert_eq!(
            (
                own.attempts[1],
                own.attempts[10],
                own.ended[3],
                own.ended[1]
            ),
            (1, 1, 1, 1)
        );
        assert_eq!((others.name.as_str(), others.attempts[0]), ("_OTHER", 1));
    }

    #[test]
    fn a_status_with_too_many_methods_keeps_those_with_most_jobs() {
        let (board, figures) = figures();
        let queues = (0..2_000).map(|number| QueueStatus {
            method: format!("method-{number:04}"),
            waiting: number,
            ..QueueStatus::default()
        });
        figures.committed(1_000_000);
        figures.publish(JobsStatus {
            waiting: 1_999_000,
            methods: queues.collect(),
            ..JobsStatus::default()
        });
        let text = board.job_status(2).unwrap();
        let read: JobsStatus = serde_json::from_str(&text).unwrap();
        assert_eq!(read.waiting, 1_999_000, "the sums are complete");
        assert_eq!(read.methods[0].method, "method-1999");
        assert!(read.methods.len() >= 250, "{}", read.methods.len());
        assert!(read.commit_ms.p50_us.is_some());
    }
}
