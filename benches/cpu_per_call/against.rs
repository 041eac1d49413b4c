//! Compares the CPU time per call of this build with another binary of preforkd.
//!
//! Each round starts a fresh server of each binary for each row. The servers take turns in serving slices
//! of the calls, each the same number. The servers have one CPU and the load generator another one. It
//! counts the time of the processes that run the binary, and of the commands that they have waited for,
//! but not pool programs. A round gives one ratio (new to old) for each row. It prints the median and the
//! range of these ratios.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Words;
use super::support::figures::median;
use super::support::instructions::Instructions;
use super::support::load::{self, Call, Load, Until};
use super::support::server::Server;
use super::support::{Failure, cores};

/// The highest ratio of a call's cost to its cost with the other binary.
const BAR: f64 = 1.02;

/// If the same binary differs from itself by more, instructions decide.
const NOISE: f64 = 0.01;

/// The parts of a round. The servers take turns this often, because the load of a busy machine changes
/// within a second.
const SLICES: usize = 10;

/// Calls before the measurement, as a fraction (1/10) of the measured ones.
const WARM_UP: u64 = 10;

/// A kind of call.
struct Row {
    name: &'static str,
    /// How many times fewer calls are made than inline ones, because each takes longer.
    fewer: u64,
    /// Its part of the configuration.
    tables: String,
    call: Call<'static>,
}

/// The average cost of one call.
#[derive(Clone, Copy)]
struct Cost {
    micros: f64,
    instructions: Option<f64>,
}

/// The ratios of one row, one for each round.
struct Comparison {
    row: Row,
    /// CPU time, new to old.
    time: Vec<f64>,
    /// Instructions, new to old; empty if they are not counted.
    instructions: Vec<f64>,
    /// CPU time, old to old; empty without `--self-check`.
    itself: Vec<f64>,
}

impl Comparison {
    fn of(row: Row) -> Self {
        Comparison {
            row,
            time: Vec::new(),
            instructions: Vec::new(),
            itself: Vec::new(),
        }
    }

    /// Adds a round: the costs of old, new and optionally old again.
    fn add(&mut self, costs: &[Cost]) {
        let (old, new) = (costs[0], costs[1]);
        self.time.push(new.micros / old.micros);
        let instructions = new.instructions.zip(old.instructions);
        self.instructions
            .extend(instructions.map(|(new, old)| new / old));
        self.itself
            .extend(costs.get(2).map(|again| again.micros / old.micros));
    }

    /// Returns the ratios that are compared with the bar.
    fn deciding(&self) -> &[f64] {
        let noisy = (median(&self.itself) - 1.0).abs() > NOISE;
        match noisy && !self.instructions.is_empty() {
            true => &self.instructions,
            false => &self.time,
        }
    }

    fn shown(&self) -> String {
        let mut line = shown(&self.time);
        if !self.instructions.is_empty() {
            line += &format!("; instructions {}", shown(&self.instructions));
        }
        if !self.itself.is_empty() {
            line += &format!("; old/old {}", shown(&self.itself));
        }
        line
    }
}

/// Formats the median and the range of ratios.
fn shown(ratios: &[f64]) -> String {
    let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = ratios.iter().copied().fold(0.0, f64::max);
    format!("{:.3} ({lowest:.3} to {highest:.3})", median(ratios))
}

fn rows() -> Result<Vec<Row>, Failure> {
    let ping = Call {
        method: "ping",
        params: "\"hello\"",
        result: "\"hello\"",
        http: false,
    };
    let row = |name, fewer, tables: &str, call| Row {
        name,
        fewer,
        tables: tables.to_owned(),
        call,
    };
    let program = std::env::current_exe()?;
    let pool = format!(
        "[pools.p]\ncommand = [{program:?}, \"answer\"]\nprocesses = 2\nready = \"alive\"\n[methods.pool]\npool = \"p\"\n"
    );
    let thread = Call {
        method: "sleep",
        params: "0",
        result: "0",
        ..ping
    };
    let command = Call {
        method: "true",
        result: "\"\"",
        ..ping
    };
    let method = Call {
        method: "pool",
        ..ping
    };
    Ok(vec![
        row("inline", 1, "", ping),
        row(
            "thread",
            2,
            "[methods.sleep]\nbuiltin = \"sleep\"\n",
            thread,
        ),
        row("pool", 4, &pool, method),
        row(
            "command",
            50,
            "[methods.true]\ncommand = [\"/bin/true\"]\n",
            command,
        ),
        row("http", 1, "", Call { http: true, ..ping }),
    ])
}

/// Measures every row with both binaries, and prints the ratios.
pub fn compare(old: &Path, words: &Words) -> Result<(), Failure> {
    let new = match &words.binary {
        Some(path) => path.clone(),
        None => env!("CARGO_BIN_EXE_preforkd").into(),
    };
    let new: PathBuf = new.canonicalize()?;
    let old = old.canonicalize()?;
    let cpus = cores::two()?;
    println!(
        "old {}, new {}; servers on CPU {}, load on CPU {}",
        old.display(),
        new.display(),
        cpus.0,
        cpus.1
    );
    let mut binaries = vec![("old", old.as_path()), ("new", new.as_path())];
    if words.self_check {
        binaries.push(("old again", old.as_path()));
    }
    let rounds = words.rounds.unwrap_or(9);
    let mut refused = None;
    let mut results: Vec<Comparison> = rows()?.into_iter().map(Comparison::of).collect();
    for round in 0..rounds {
        for result in &mut results {
            let mut subjects = Vec::new();
            for (_, binary) in &binaries {
                let subject = Subject::start(binary, &result.row, words, cpus, &mut refused)?;
                subjects.push(subject);
            }
            let calls = (words.calls / result.row.fewer / SLICES as u64).max(1);
            for slice in 0..SLICES {
                for turn in 0..subjects.len() {
                    let number = (turn + slice + round) % subjects.len();
                    subjects[number].call(calls)?;
                }
            }
            let costs: Vec<Cost> = subjects.iter().map(Subject::cost).collect();
            result.add(&costs);
            let shown = |((name, _), cost): (&(&str, &Path), &Cost)| {
                format!("{name} {:.2} us", cost.micros)
            };
            let costs: Vec<String> = binaries.iter().zip(&costs).map(shown).collect();
            println!(
                "{:>2} {:<8} {}",
                round + 1,
                result.row.name,
                costs.join(", ")
            );
        }
    }
    println!("CPU time per call, new/old, median of {rounds} rounds (lowest to highest):");
    for result in &results {
        println!("  {:<8} {}", result.row.name, result.shown());
    }
    if let Some(error) = refused {
        println!("instructions are not counted here: perf_event_open: {error}");
    }
    let above: Vec<String> = results
        .iter()
        .map(|result| (result.row.name, median(result.deciding())))
        .filter(|(_, ratio)| ratio.is_nan() || *ratio > BAR)
        .map(|(name, ratio)| format!("{name} {ratio:.3}"))
        .collect();
    if words.bar && !above.is_empty() {
        return Err(format!("above the bar of {BAR}: {}", above.join(", ")).into());
    }
    Ok(())
}

/// A server of one binary with its load, and the cost of its calls so far.
struct Subject {
    server: Server,
    load: Load,
    counter: Option<Instructions>,
    calls: u64,
    time: Duration,
    instructions: u64,
}

impl Subject {
    /// Starts it for this row and makes some calls. If instructions cannot be counted, `refused` gets the
    /// reason.
    fn start(
        binary: &Path,
        row: &Row,
        words: &Words,
        (server_cpu, load_cpu): (usize, usize),
        refused: &mut Option<io::Error>,
    ) -> Result<Self, Failure> {
        // Set the number of threads, because it would otherwise depend on the number of CPUs.
        let tables = format!(
            "[log]\nlevel = \"error\"\n[workers]\ncount = {}\nthreads = 4\n{}",
            words.workers.unwrap_or(1),
            row.tables
        );
        // The server and all its processes inherit the CPU.
        cores::pin(server_cpu)?;
        let server = Server::program(binary.to_owned(), &tables)?;
        cores::pin(load_cpu)?;
        let mut load = Load::calling(server.address, words.connections, &row.call)?;
        load.run(Until::Calls((words.calls / row.fewer / WARM_UP).max(1)))?;
        let counter = match refused {
            Some(_) => None,
            None => Instructions::of(&server.own_processes()?)
                .map_err(|error| *refused = Some(error))
                .ok(),
        };
        Ok(Subject {
            server,
            load,
            counter,
            calls: 0,
            time: Duration::ZERO,
            instructions: 0,
        })
    }

    fn count(&mut self) -> io::Result<u64> {
        self.counter.as_mut().map_or(Ok(0), Instructions::count)
    }

    /// Makes `calls` calls and measures them.
    fn call(&mut self, calls: u64) -> Result<(), Failure> {
        let (counted, before) = (self.count()?, self.server.own_cpu_time()?);
        self.calls += self.load.run(Until::Calls(calls))?.calls;
        self.time += self.server.own_cpu_time()?.saturating_sub(before);
        self.instructions += self.count()? - counted;
        Ok(())
    }

    fn cost(&self) -> Cost {
        let calls = self.calls as f64;
        Cost {
            micros: self.time.as_secs_f64() * 1e6 / calls,
            instructions: self
                .counter
                .as_ref()
                .map(|_| self.instructions as f64 / calls),
        }
    }
}

/// Runs a pool program that gives the answer of the `pool` row to each call on descriptor 3.
pub fn answer() -> Result<(), Failure> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: a pool program has its connection as descriptor 3, and nothing else here uses that number.
    let mut calls = UnixStream::from(unsafe { OwnedFd::from_raw_fd(3) });
    let answer = load::frame(r#"{"out":"pool","result":"hello"}"#);
    let mut length = [0; 4];
    let mut body = Vec::new();
    while calls.read_exact(&mut length).is_ok() {
        body.resize(u32::from_le_bytes(length) as usize, 0);
        calls.read_exact(&mut body)?;
        calls.write_all(&answer)?;
    }
    Ok(())
}
