//! Measures what counting costs: CPU time per call of this build, beside a build that leaves all counting out.
//! `cargo bench --bench metrics [-- --bar] [--short]`.
//!
//! The other build is made by this program, with `--cfg preforkd_uncounted` for this crate alone. The servers have
//! one CPU and the load another one. They take turns in pairs, forward and backward (ABBA), so that what changes
//! slowly affects both. A second server of this build shows the noise: the same binary against itself. If they
//! differ by more than 0.004, instructions decide: those of the CPU if the kernel counts them, else those that
//! `tests/instructions` counts under valgrind.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;

use support::figures::{MissedBars, median, quantile};
use support::instructions::Instructions;
use support::load::{Load, Until};
use support::server::Server;
use support::{Failure, bare, cores, words};

#[derive(Parser)]
struct Words {
    /// Pairs of each row [default: 200, or 16 with --short]
    #[arg(long)]
    pairs: Option<usize>,
    /// Calls of each server in each pair, as a multiple of what takes about 0.2 s
    #[arg(long, default_value_t = 1.0)]
    calls: f64,
    /// The profile with which cargo has built this program
    #[arg(long, default_value = "bench")]
    profile: String,
    /// Fail beyond the bar
    #[arg(long)]
    bar: bool,
    /// Measure for about a minute. The noise is added to the bar then
    #[arg(long)]
    short: bool,
}

/// The highest ratio of the CPU time per call to that without counting.
const BAR: f64 = 1.010;
/// If the same binary differs from itself by more, instructions decide.
const NOISE: f64 = 0.004;
/// Pairs after which all servers are started again: where a process has its memory changes its speed.
const PAIRS_PER_START: usize = 10;

/// Connections, calls that each has outstanding, and calls that take about 0.2 s.
const ROWS: [(usize, usize, u64); 3] = [(1, 1, 4_000), (64, 1, 12_000), (64, 16, 64_000)];

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["metrics".to_owned()].into_iter().chain(words()));
    let pairs = words.pairs.unwrap_or(if words.short { 16 } else { 200 });
    let counted = PathBuf::from(env!("CARGO_BIN_EXE_preforkd"));
    let uncounted = build_uncounted(&counted, &words.profile)?;
    let cpus = cores::two()?;
    let mut missed = MissedBars::default();
    let mut is_undecided = false;
    for (connections, depth, calls) in ROWS {
        let calls = (calls as f64 * words.calls) as u64 / depth as u64;
        let row = Row {
            binaries: [&counted, &uncounted, &counted],
            connections,
            depth,
            batches: calls.max(1),
            cpus,
        };
        let ratios = row.measure(pairs)?;
        let itself = median(&ratios.itself);
        let noise = (itself - 1.0).abs();
        println!(
            "{connections} x {depth}: counted against uncounted {:.4} ({:.3} to {:.3}), against itself {itself:.4}, \
             {pairs} pairs",
            median(&ratios.time),
            quantile(&ratios.time, 0.05),
            quantile(&ratios.time, 0.95)
        );
        let what = format!("  CPU time per call at {connections} x {depth}, ratio");
        match noise > NOISE {
            false => missed.check(&what, median(&ratios.time), BAR),
            true if !ratios.instructions.is_empty() => {
                missed.check(
                    &format!("  instructions per call at {connections} x {depth}, ratio"),
                    median(&ratios.instructions),
                    BAR,
                );
            }
            true if words.short => {
                missed.check(&what, median(&ratios.time), BAR + noise);
            }
            true => {
                println!("  not decided by time: the same binary differs from itself");
                is_undecided = true;
            }
        }
    }
    if is_undecided {
        println!("instructions decide (tests/instructions):");
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/instructions");
        let status = Command::new(program).args(["--runs", "1"]).status()?;
        let figure = if status.success() { 0.0 } else { 1.0 };
        missed.check("bars of tests/instructions missed", figure, 0.0);
    }
    missed.end(words.bar)
}

/// Builds preforkd without counting, unless that is done. Dependencies are those of the build that counts.
fn build_uncounted(counted: &Path, profile: &str) -> Result<PathBuf, Failure> {
    let directory = counted.parent().ok_or("the binary has no directory")?;
    let target = directory.parent().ok_or("no target directory")?;
    let kept = target.join("uncounted").join("preforkd");
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let build = |wrapper: Option<&Path>| -> Result<(), Failure> {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(source);
        cargo.args([
            "build",
            "--quiet",
            "--offline",
            "--bin",
            "preforkd",
            "--profile",
        ]);
        cargo.arg(profile).arg("--target-dir").arg(target);
        match wrapper {
            Some(wrapper) => cargo.env("RUSTC_WORKSPACE_WRAPPER", wrapper),
            None => cargo.env_remove("RUSTC_WORKSPACE_WRAPPER"),
        };
        match cargo.status()? {
            status if status.success() => Ok(()),
            status => Err(format!("cargo build: {status}").into()),
        }
    };
    // Both have the same path. So the uncounted one is copied, and the counted one, which exists, put back.
    let built = build(Some(&source.join("benches/metrics/rustc-uncounted"))).and_then(|()| {
        fs::create_dir_all(target.join("uncounted"))?;
        fs::copy(counted, &kept)?;
        Ok(())
    });
    build(None)?;
    built?;
    if fs::read(counted)? == fs::read(&kept)? {
        return Err("both builds are the same".into());
    }
    Ok(kept)
}

/// A kind of load.
struct Row<'a> {
    /// Counted, uncounted, and counted again.
    binaries: [&'a Path; 3],
    connections: usize,
    depth: usize,
    /// What each server answers in a pair, `depth` calls each.
    batches: u64,
    /// Of the servers and of the load.
    cpus: (usize, usize),
}

/// One figure for each pair.
#[derive(Default)]
struct Ratios {
    time: Vec<f64>,
    /// Empty if the kernel does not count them.
    instructions: Vec<f64>,
    itself: Vec<f64>,
}

impl Row<'_> {
    fn measure(&self, pairs: usize) -> Result<Ratios, Failure> {
        let mut ratios = Ratios::default();
        let mut left = pairs;
        while left > 0 {
            let mut subjects = Vec::new();
            for binary in self.binaries {
                subjects.push(Subject::start(binary, self)?);
            }
            let count = left.min(PAIRS_PER_START);
            for pair in 0..count {
                let mut costs = [Cost::default(); 3];
                let order = if pair % 2 == 0 { [0, 1, 2] } else { [2, 1, 0] };
                for number in order {
                    costs[number] = subjects[number].run(self.batches)?;
                }
                let [counted, uncounted, again] = costs;
                // The mean of both servers of one build, so that neither is always the first.
                let mean = (counted.time + again.time) / 2.0;
                ratios.time.push(mean / uncounted.time);
                ratios.itself.push(counted.time / again.time);
                if uncounted.instructions > 0.0 {
                    let counted = (counted.instructions + again.instructions) / 2.0;
                    ratios.instructions.push(counted / uncounted.instructions);
                }
            }
            for (number, subject) in subjects.iter().enumerate() {
                subject.check(number != 1)?;
            }
            left -= count;
        }
        Ok(ratios)
    }
}

#[derive(Clone, Copy, Default)]
struct Cost {
    /// Seconds of CPU time.
    time: f64,
    instructions: f64,
}

/// A server under load.
struct Subject {
    server: Server,
    load: Load,
    counter: Option<Instructions>,
}

impl Subject {
    fn start(binary: &Path, row: &Row<'_>) -> Result<Self, Failure> {
        cores::pin(row.cpus.0)?;
        let server = Server::program(binary.to_owned(), "[workers]\ncount = 1\nthreads = 1\n")?;
        cores::pin(row.cpus.1)?;
        let mut load = Load::open(server.address, row.connections, bare::PARAMS)?;
        load.send_together(row.depth);
        let counter = Instructions::of(&server.own_processes()?).ok();
        let mut subject = Subject {
            server,
            load,
            counter,
        };
        // Bring caches, buffers and clock speed into the state under load.
        subject.run(row.batches)?;
        Ok(subject)
    }

    fn run(&mut self, batches: u64) -> Result<Cost, Failure> {
        let count = |counter: &mut Option<Instructions>| {
            counter.as_mut().map_or(Ok(0), Instructions::count)
        };
        let (counted, before) = (count(&mut self.counter)?, self.server.own_cpu_time()?);
        self.load.run(Until::Calls(batches))?;
        let time = self.server.own_cpu_time()?.saturating_sub(before);
        Ok(Cost {
            time: time.as_secs_f64(),
            instructions: (count(&mut self.counter)? - counted) as f64,
        })
    }

    /// Checks that this build counts, or does not.
    fn check(&self, counts: bool) -> Result<(), Failure> {
        let calls = self.server.status()?["totals"]["calls"].as_u64();
        match calls.ok_or("no totals")? > 0 {
            seen if seen == counts => Ok(()),
            _ => Err(format!("calls are {calls:?}, but counts: {counts}").into()),
        }
    }
}
