//! Writes the totals of a board by names, without its layout, and adds them to a new board.
//!
//! A master that does not know the version of a board cannot read it. So in an upgrade each master also passes
//! the totals on, and the next master uses them as the base of a new board. The names are those of the labels;
//! counters that the next version does not have are left out. Calls are then not counted if they end in older
//! processes after the totals were passed on.

use std::collections::BTreeMap;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::grid::{BOUNDS, BUCKETS, bound_ns};
use super::job_cells::{ENDS, JobCells, OUTCOMES};
use super::layout::{
    Block, BoardHeader, CODES, HANDLER_CODE, HandlerKind, HistogramCells, NAMES, OTHER_NAME, POOLS,
    SLOTS, labels, offset_of_block,
};
use crate::protocol::Code;

/// The totals of a board.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardTotals {
    /// The names of methods with the place of their kind, in the order of their places.
    methods: Vec<(String, Option<usize>)>,
    pools: Vec<String>,
    /// The counters that are not 0.
    counters: BTreeMap<String, u64>,
}

/// How the values of several blocks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Joining {
    Sum,
    Highest,
}

impl BoardTotals {
    /// Sums the blocks of a board, given with their records.
    pub fn of(
        header: &BoardHeader,
        blocks: impl Iterator<Item = (usize, &'static Block)>,
        file: &OwnedFd,
    ) -> Self {
        let kinds = header.methods.kinds(NAMES);
        let place = |kind: &str| labels::KINDS.iter().position(|known| *known == kind);
        let methods = header.methods.names(NAMES).into_iter().zip(kinds);
        let mut totals = BoardTotals {
            methods: methods
                .map(|(name, kind)| (name, kind.and_then(place)))
                .collect(),
            pools: header.pools.names(POOLS),
            counters: BTreeMap::new(),
        };
        let mut counters = BTreeMap::new();
        let mut add = |name: &dyn Fn() -> String, counter: &AtomicU64, joining: Joining| {
            let value = counter.load(Relaxed);
            if value > 0 {
                let sum = counters.entry(name()).or_insert(0_u64);
                *sum = match joining {
                    Joining::Sum => sum.wrapping_add(value),
                    Joining::Highest => value.max(*sum),
                };
            }
        };
        each_of_header(header, &mut add);
        for (record, block) in blocks {
            each_of_block(block, &totals, false, &mut add);
            for (place, method) in totals.places() {
                if block.calls[place].load(Relaxed) == 0 {
                    continue;
                }
                for (cell, value) in run_counts(file, record, place).into_iter().enumerate() {
                    let name = || match cell < BUCKETS {
                        true => bucket_name(&format!("run/{method}"), cell),
                        false => format!("run/{method}/sum_ns"),
                    };
                    add(&name, &AtomicU64::new(value), Joining::Sum);
                }
            }
        }
        totals.counters = counters;
        totals
    }

    /// Returns the names of methods with their kinds, in the order of their places.
    pub fn methods(&self) -> impl Iterator<Item = (&str, Option<HandlerKind>)> {
        const KINDS: [HandlerKind; 4] = [
            HandlerKind::Builtin,
            HandlerKind::Function,
            HandlerKind::Command,
            HandlerKind::Pool,
        ];
        let kind = |kind: Option<usize>| kind.and_then(|kind| KINDS.get(kind).copied());
        let methods = self.methods.iter();
        methods.map(move |(name, place)| (name.as_str(), kind(*place)))
    }

    /// Returns the names of pools, in the order of their places.
    pub fn pools(&self) -> &[String] {
        &self.pools
    }

    /// Writes the totals into a board on which nothing is counted yet. Its names must have the same places.
    pub fn write_to(&self, header: &BoardHeader, block: &Block) {
        let mut put = |name: &dyn Fn() -> String, counter: &AtomicU64, _: Joining| {
            if let Some(value) = self.counters.get(&name()) {
                counter.store(*value, Relaxed);
            }
        };
        each_of_header(header, &mut put);
        each_of_block(block, self, true, &mut put);
    }

    /// Adds the counters of jobs processes.
    pub fn add_jobs(&mut self, jobs: impl Iterator<Item = &'static JobCells>) {
        let mut counters = std::mem::take(&mut self.counters);
        for cells in jobs {
            each_of_jobs(cells, self, &mut |name, counter, _| {
                let value = counter.load(Relaxed);
                if value > 0 {
                    let sum = counters.entry(name()).or_insert(0_u64);
                    *sum = sum.wrapping_add(value);
                }
            });
        }
        self.counters = counters;
    }

    /// Returns whether there are counters of jobs.
    pub fn has_jobs(&self) -> bool {
        let first = self.counters.range(JOBS.to_owned()..).next();
        first.is_some_and(|(name, _)| name.starts_with(JOBS))
    }

    /// Writes the counters of jobs into cells in which nothing is counted yet.
    pub fn write_jobs(&self, cells: &JobCells) {
        each_of_jobs(cells, self, &mut |name, counter, _| {
            if let Some(value) = self.counters.get(&name()) {
                counter.store(*value, Relaxed);
            }
        });
    }

    /// Returns the places of methods with their names; the last one is that of all others.
    fn places(&self) -> impl Iterator<Item = (usize, &str)> {
        let names = self.methods.iter().map(|(name, _)| name.as_str());
        let methods = names.take(NAMES).enumerate();
        methods.chain([(NAMES, OTHER_NAME)])
    }
}

/// Reads the run times of a method without mapping them. Most are not recorded, and reading mapped memory would
/// allocate it.
fn run_counts(file: &OwnedFd, record: usize, place: usize) -> Vec<u64> {
    let size = size_of::<HistogramCells>();
    let at = offset_of_block(record) + (offset_of!(Block, runs) + place * size) as u64;
    let mut bytes = vec![0; size];
    let file = file.try_clone().map(File::from);
    if !file.is_ok_and(|file| file.read_exact_at(&mut bytes, at).is_ok()) {
        return Vec::new();
    }
    let words = bytes.chunks_exact(8).map(TryInto::try_into);
    words.flatten().map(u64::from_ne_bytes).collect()
}

/// Visits a counter. The first argument makes its name; call it only if the name is needed.
type Visit<'a> = &'a mut dyn FnMut(&dyn Fn() -> String, &AtomicU64, Joining);

fn each_of_header(header: &BoardHeader, visit: Visit<'_>) {
    use Joining::{Highest, Sum};
    for (place, label) in labels::RESULTS.iter().enumerate() {
        visit(&|| format!("reloads/{label}"), &header.reloads[place], Sum);
        visit(
            &|| format!("upgrades/{label}"),
            &header.upgrades[place],
            Sum,
        );
    }
    visit(&|| "worker_starts".into(), &header.worker_starts, Sum);
    for (label, counter) in labels::WORKER_EXITS.iter().zip(&header.worker_exits) {
        visit(&|| format!("worker_exits/{label}"), counter, Sum);
    }
    visit(&|| "master_lost_lines".into(), &header.lost_lines, Sum);
    let lost = &header.lost_access_lines;
    visit(&|| "session_access_lost".into(), lost, Sum);
    let lost = &header.lost_connections;
    visit(&|| "session_connections_lost".into(), lost, Sum);
    visit(&|| "slots".into(), &header.slots, Highest);
}

/// Visits the counters of a block. Unless `all`, leaves out methods without calls, and run times.
fn each_of_block(block: &Block, names: &BoardTotals, all: bool, visit: Visit<'_>) {
    use Joining::{Highest, Sum};
    visit(&|| "accepted".into(), &block.accepted, Sum);
    visit(&|| "forwarded".into(), &block.forwarded, Sum);
    visit(&|| "returned".into(), &block.returned, Sum);
    let refusals = &block.quarantine_refusals;
    visit(&|| "quarantine_refusals".into(), refusals, Sum);
    visit(&|| "lost_lines".into(), &block.lost_lines, Sum);
    let access = &block.access;
    visit(&|| "access_written".into(), &access.written, Sum);
    visit(&|| "access_lost".into(), &access.lost, Sum);
    visit(&|| "slow_calls".into(), &block.slow_calls, Sum);
    for (label, counter) in labels::MOVED.iter().zip(&block.moved) {
        visit(&|| format!("moved/{label}"), counter, Sum);
    }
    for (label, counter) in labels::CLOSED.iter().zip(&block.closed) {
        visit(&|| format!("closed/{label}"), counter, Sum);
    }
    for (place, dialect) in labels::DIALECTS.iter().enumerate() {
        let received = &block.received_bytes[place];
        visit(&|| format!("received_bytes/{dialect}"), received, Sum);
        visit(
            &|| format!("sent_bytes/{dialect}"),
            &block.sent_bytes[place],
            Sum,
        );
        for (form, counter) in labels::FORMS.iter().zip(&block.requests[place]) {
            visit(&|| format!("requests/{dialect}/{form}"), counter, Sum);
        }
    }
    each_of_histogram("accept_wait", &block.accept_wait, visit);
    for slot in 0..SLOTS {
        visit(&|| format!("cpu_ns/{slot}"), &block.cpu_ns[slot], Sum);
    }
    for (place, pool) in names.pools.iter().enumerate().take(POOLS) {
        let starts = &block.program_starts[place];
        visit(&|| format!("program_starts/{pool}"), starts, Sum);
        let exits = labels::PROGRAM_EXITS
            .iter()
            .zip(&block.program_exits[place]);
        for (reason, counter) in exits {
            visit(&|| format!("program_exits/{pool}/{reason}"), counter, Sum);
        }
    }
    for (place, method) in names.places() {
        // Unused counters take no memory as long as they are not read.
        let cpu = &block.command_cpu_ns[place];
        let counts = [&block.calls[place], &block.slow_calls, cpu];
        if !all && counts.iter().all(|count| count.load(Relaxed) == 0) {
            continue;
        }
        let cells = &block.methods[place];
        visit(&|| format!("calls/{method}"), &block.calls[place], Sum);
        visit(&|| format!("command_cpu_ns/{method}"), cpu, Sum);
        visit(&|| format!("slow/{method}"), &cells.slow, Sum);
        visit(
            &|| format!("longest_ns/{method}"),
            &cells.longest_ns,
            Highest,
        );
        let codes = Code::ALL.map(|code| (code as usize, code.name()));
        for (code, label) in codes.into_iter().chain([(HANDLER_CODE, "handler")]) {
            for started in [0, 1] {
                let counter = &cells.errors[code + CODES * started];
                visit(
                    &|| format!("errors/{method}/{label}/{started}"),
                    counter,
                    Sum,
                );
            }
        }
        each_of_histogram(&format!("duration/{method}"), &cells.duration, visit);
        each_of_histogram(&format!("queue/{method}"), &cells.queue, visit);
        if all {
            each_of_histogram(&format!("run/{method}"), &block.runs[place], visit);
        }
    }
}

/// How the names of the counters of jobs begin.
const JOBS: &str = "jobs/";

fn each_of_jobs(cells: &JobCells, names: &BoardTotals, visit: Visit<'_>) {
    use Joining::Sum;
    visit(&|| format!("{JOBS}enqueued"), &cells.enqueued, Sum);
    visit(&|| format!("{JOBS}stale"), &cells.stale, Sum);
    each_of_histogram(&format!("{JOBS}commit"), &cells.commit, visit);
    each_of_histogram(&format!("{JOBS}wait"), &cells.wait, visit);
    each_of_histogram(&format!("{JOBS}run"), &cells.run, visit);
    for (place, method) in names.places() {
        let counters = &cells.methods[place];
        for (outcome, counter) in OUTCOMES.iter().zip(&counters.attempts) {
            visit(
                &|| format!("{JOBS}attempts/{method}/{outcome}"),
                counter,
                Sum,
            );
        }
        for ((state, reason), counter) in ENDS.iter().zip(&counters.ended) {
            visit(
                &|| format!("{JOBS}ended/{method}/{state}/{reason}"),
                counter,
                Sum,
            );
        }
    }
}

/// Returns the name of a bucket, which contains its bound in nanoseconds.
fn bucket_name(name: &str, bucket: usize) -> String {
    match bucket < BOUNDS {
        true => format!("{name}/{}", bound_ns(bucket)),
        false => format!("{name}/inf"),
    }
}

fn each_of_histogram(name: &str, cells: &HistogramCells, visit: Visit<'_>) {
    for (bucket, counter) in cells.counts.iter().enumerate() {
        visit(&|| bucket_name(name, bucket), counter, Joining::Sum);
    }
    visit(&|| format!("{name}/sum_ns"), &cells.sum_ns, Joining::Sum);
}
