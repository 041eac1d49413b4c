//! Measures durable jobs: acknowledgements, whole cycles, the time to the begin of a handler, what jobs cost calls, and
//! an idle store. `cargo bench --bench jobs [-- --bar] [--short] [--rows N]`.
//!
//! *Raw* is the same statements with as many jobs per commit, in one process and in the same run. The stores are below
//! `target/`, because a temporary directory may be in memory.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rusqlite::Connection;
use serde_json::{Value, json};

use support::cores;
use support::figures::{MissedBars, median, quantile};
use support::load::{Call, Load, Until, frame};
use support::server::Server;
use support::{Failure, words};

#[derive(Parser)]
struct Words {
    /// Seconds of each load [default: 5, or 1 with --short]
    #[arg(long)]
    seconds: Option<u64>,
    /// Ended jobs, and a tenth as many delayed ones, in the store beside an empty one
    #[arg(long)]
    rows: Option<u64>,
    /// Fail beyond the bars
    #[arg(long)]
    bar: bool,
    /// Measure for about a minute
    #[arg(long)]
    short: bool,
}

/// How often calls are measured alone and beside jobs.
const TURNS: usize = 5;

/// Due in a day, so that no attempt begins.
const LATER: &str = r#""method":"ping","params":1,"delay_ms":86400000"#;

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["jobs".to_owned()].into_iter().chain(words()));
    let seconds = words.seconds.unwrap_or(if words.short { 1 } else { 5 });
    let span = Duration::from_secs(seconds);
    let mut missed = MissedBars::default();
    let sync_ms = sync_ms()?;
    println!("time to sync 4 KiB, p50 in ms: {sync_ms:.3}");
    acknowledgements(&mut missed, sync_ms, span)?;
    cycles(&mut missed, if words.short { 10_000 } else { 60_000 })?;
    begin(
        &mut missed,
        words.rows,
        if words.short { 300 } else { 2_000 },
    )?;
    calls_beside_jobs(&mut missed, span)?;
    idle(
        &mut missed,
        Duration::from_secs(if words.short { 10 } else { 60 }),
    )?;
    missed.end(words.bar)
}

/// A directory for a store, which is removed at the end.
struct StoreDirectory(PathBuf);

impl StoreDirectory {
    fn new() -> Result<Self, Failure> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "jobs-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Relaxed)
        );
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path)?;
        Ok(StoreDirectory(path))
    }

    fn store(&self) -> PathBuf {
        self.0.join("jobs.db")
    }

    /// Starts a server with this store and four threads in each of two workers.
    fn server(&self) -> Result<Server, Failure> {
        self.server_with(4)
    }

    /// Starts a server with this store. Half of the threads of its two workers may run jobs. Its heartbeat permits to
    /// stop the jobs process.
    fn server_with(&self, threads: usize) -> Result<Server, Failure> {
        let store = self.store();
        Server::preforkd_with(&format!(
            "[workers]\ncount = 2\nthreads = {threads}\nheartbeat-timeout = \"60s\"\n[jobs]\nstore = \"sqlite:{}\"\n\
             max-jobs = 100000000\nmax-size = \"100GiB\"\n[methods.nap]\nbuiltin = \"sleep\"\n",
            store.display()
        ))
    }

    /// Creates a store by the schema that the program prints.
    fn create(&self) -> Result<Connection, Failure> {
        let schema = Command::new(env!("CARGO_BIN_EXE_preforkd"))
            .args(["job", "schema"])
            .output()?;
        let connection = Connection::open(self.store())?;
        connection.execute_batch(&String::from_utf8(schema.stdout)?)?;
        connection.execute_batch(
            "INSERT INTO meta (name, value) VALUES ('secret', randomblob(32)), ('full', x'00')",
        )?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        Ok(connection)
    }
}

impl Drop for StoreDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One connection with one call at a time.
struct JobClient(TcpStream);

impl JobClient {
    fn connect(address: SocketAddr) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(JobClient(stream))
    }

    /// Sends a frame, and returns the body of the answer, which must not be an error.
    fn call(&mut self, request: &[u8]) -> Result<Vec<u8>, Failure> {
        self.0.write_all(request)?;
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.0.read_exact(&mut body)?;
        match body.starts_with(br#"{"out":"error""#) {
            true => Err(String::from_utf8_lossy(&body).into()),
            false => Ok(body),
        }
    }

    /// Does the same with a method and its params, and returns the result.
    fn result(&mut self, method: &str, params: &str) -> Result<Value, Failure> {
        let request = frame(&format!(r#"{{"in":"{method}","params":{params}}}"#));
        let mut answer: Value = serde_json::from_slice(&self.call(&request)?)?;
        Ok(answer["result"].take())
    }
}

/// Returns the median time of a write of 4 KiB with fdatasync(2), in milliseconds.
fn sync_ms() -> Result<f64, Failure> {
    let directory = StoreDirectory::new()?;
    let file = File::create(directory.0.join("sync"))?;
    file.write_all_at(&[1; 4096 * 256], 0)?;
    file.sync_all()?;
    let times = (0..200_u64).map(|at| -> Result<f64, Failure> {
        let begin = Instant::now();
        file.write_all_at(&[2; 4096], at * 4096)?;
        file.sync_data()?;
        Ok(milliseconds(begin.elapsed()))
    });
    Ok(median(&times.collect::<Result<Vec<_>, _>>()?))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Enqueues over `clients` connections, `array` jobs per call. Returns jobs per second, and the times in milliseconds.
fn enqueue(
    address: SocketAddr,
    (clients, array): (usize, usize),
    span: Duration,
) -> Result<(f64, Vec<f64>), Failure> {
    let params = match array {
        1 => format!("{{{LATER}}}"),
        _ => format!("[{}]", vec![format!("{{{LATER}}}"); array].join(",")),
    };
    let request = frame(&format!(r#"{{"in":"rpc.job.enqueue","params":{params}}}"#));
    let begin = Instant::now();
    let run = || -> Result<Vec<f64>, String> {
        let said = |error: Failure| error.to_string();
        let mut client = JobClient::connect(address).map_err(said)?;
        let mut times = Vec::new();
        while begin.elapsed() < span {
            let sent = Instant::now();
            client.call(&request).map_err(said)?;
            times.push(milliseconds(sent.elapsed()));
        }
        Ok(times)
    };
    let times: Result<Vec<Vec<f64>>, String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(run)).collect();
        let joined = threads.into_iter();
        joined
            .map(|thread| {
                thread
                    .join()
                    .map_err(|_| "a client panicked".to_owned())
                    .flatten()
            })
            .collect()
    });
    let elapsed = begin.elapsed().as_secs_f64();
    let times = times?.concat();
    Ok(((times.len() * array) as f64 / elapsed, times))
}

/// Returns how many jobs per second one process stores, with this many in each commit.
fn raw(batch: usize, span: Duration) -> Result<f64, Failure> {
    let directory = StoreDirectory::new()?;
    let mut connection = directory.create()?;
    let (begin, mut jobs) = (Instant::now(), 0);
    while begin.elapsed() < span {
        let transaction = connection.transaction()?;
        for _ in 0..batch {
            insert(&transaction, "ping", 1 << 50)?;
        }
        transaction.commit()?;
        jobs += batch;
    }
    Ok(jobs as f64 / begin.elapsed().as_secs_f64())
}

/// Stores a job as an enqueue does.
fn insert(connection: &Connection, method: &str, due_at: i64) -> Result<(), Failure> {
    let mut job = connection.prepare_cached(
        "INSERT INTO job (id, method, params, key, priority, max_attempts, timeout_ms, trace, created_at, due_at, \
         expires_at) VALUES (randomblob(16), ?1, '1', NULL, 0, 10, 600000, NULL, 1, ?2, NULL)",
    )?;
    job.execute((method, due_at))?;
    let mut queue = connection.prepare_cached(
        "INSERT INTO queue (seq, id, method, key, priority, due_at, max_attempts, timeout_ms, expires_at) \
         SELECT seq, id, method, key, priority, due_at, max_attempts, timeout_ms, expires_at FROM job \
         WHERE seq = last_insert_rowid()",
    )?;
    queue.execute([])?;
    Ok(())
}

fn acknowledgements(missed: &mut MissedBars, sync_ms: f64, span: Duration) -> Result<(), Failure> {
    let directory = StoreDirectory::new()?;
    let server = directory.server()?;
    let (_, times) = enqueue(server.address, (1, 1), span)?;
    missed.check(
        "acknowledgement, one client, p50 in ms above the sync",
        median(&times) - sync_ms,
        0.4,
    );
    for (clients, array, bar) in [(64, 1, 15_000.0), (4, 1_000, 30_000.0)] {
        let (per_s, _) = enqueue(server.address, (clients, array), span)?;
        let raw = raw(clients.max(array), span)?;
        let what = format!("acknowledgements per second, {clients} clients, {array} jobs per call");
        missed.check_least(&what, per_s, bar);
        missed.check_least(
            &format!("  the same, compared with raw ({raw:.0})"),
            per_s / raw,
            0.4,
        );
    }
    Ok(())
}

/// Measures whole cycles of an empty function. A job is claimed only for a thread that is free, so with few threads each
/// transaction has few jobs.
fn cycles(missed: &mut MissedBars, jobs: usize) -> Result<(), Failure> {
    let what = "whole cycles per second, empty function";
    let few = cycles_per_s(4, jobs / 4)?;
    println!("{what}, 2 jobs at once in each worker: {few:.0}");
    let many = cycles_per_s(64, jobs)?;
    let what = format!("{what}, 32 jobs at once in each worker");
    missed.check_least(&what, many, 8_000.0);
    Ok(())
}

/// Enqueues jobs of an empty function, and waits until all have ended.
fn cycles_per_s(threads: usize, jobs: usize) -> Result<f64, Failure> {
    let directory = StoreDirectory::new()?;
    let server = directory.server_with(threads)?;
    let array = vec![r#"{"method":"ping","params":1}"#; 500].join(",");
    let mut client = JobClient::connect(server.address)?;
    let begin = Instant::now();
    let mut last = Value::Null;
    for _ in 0..jobs / 500 {
        last = client.result("rpc.job.enqueue", &format!("[{array}]"))?;
    }
    // They begin in the order of their enqueue.
    for job in last.as_array().into_iter().flatten() {
        let wait = json!({"job": job["job"]}).to_string();
        while client.result("rpc.job.wait", &wait)?["ended"] != true {}
    }
    Ok(jobs as f64 / begin.elapsed().as_secs_f64())
}

fn has_live_jobs(server: &Server) -> Result<bool, Failure> {
    let status = server.status()?;
    let count = |state: &str| status["jobs"][state].as_u64();
    Ok(count("waiting") > Some(0) || count("running") > Some(0))
}

/// Measures from an enqueue to the answer of a wait, which comes after the begin of the handler.
fn begin(missed: &mut MissedBars, rows: Option<u64>, jobs: usize) -> Result<(), Failure> {
    let measured = |directory: &StoreDirectory| -> Result<Vec<f64>, Failure> {
        let server = directory.server()?;
        let mut client = JobClient::connect(server.address)?;
        let mut times = Vec::new();
        for _ in 0..jobs {
            let begin = Instant::now();
            let stored = client.result("rpc.job.enqueue", r#"{"method":"ping","params":1}"#)?;
            let record =
                client.result("rpc.job.wait", &json!({"job": stored["job"]}).to_string())?;
            times.push(milliseconds(begin.elapsed()));
            if record["state"] != "done" {
                return Err(format!("not done: {record}").into());
            }
        }
        Ok(times)
    };
    let times = measured(&StoreDirectory::new()?)?;
    let what = "enqueue to the end of an empty function, idle";
    missed.check(&format!("{what}, p50 in ms"), median(&times), 2.0);
    let empty_p99 = quantile(&times, 0.99);
    missed.check(&format!("{what}, p99 in ms"), empty_p99, 10.0);
    let Some(rows) = rows else {
        return Ok(());
    };
    let directory = StoreDirectory::new()?;
    fill(&directory, rows)?;
    let full_p99 = quantile(&measured(&directory)?, 0.99);
    missed.check(
        &format!(
            "  p99 with {rows} ended and {} delayed jobs, compared",
            rows / 10
        ),
        full_p99 / empty_p99,
        2.0,
    );
    Ok(())
}

/// Fills a store with ended and delayed jobs.
fn fill(directory: &StoreDirectory, rows: u64) -> Result<(), Failure> {
    let mut connection = directory.create()?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    let transaction = connection.transaction()?;
    let now_ms = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_millis() as i64;
    for _ in 0..rows {
        transaction
            .prepare_cached(
                "INSERT INTO job (id, method, params, priority, max_attempts, timeout_ms, created_at, due_at, state, \
                 cause, outcome, attempt, token, started_at, finished_at) \
                 VALUES (randomblob(16), 'ping', '1', 0, 10, 600000, ?1, ?1, 2, 1, '1', 1, 1, ?1, ?1)",
            )?
            .execute([now_ms])?;
    }
    for _ in 0..rows / 10 {
        insert(&transaction, "ping", now_ms + 86_400_000)?;
    }
    transaction.commit()?;
    Ok(())
}

/// A server under a load of short calls on handler threads.
struct Called {
    load: Load,
    client: JobClient,
    server: Server,
    _directory: StoreDirectory,
}

impl Called {
    /// The server and the load run on different cores. Otherwise they would delay each other.
    fn start() -> Result<Self, Failure> {
        let (server_cpu, load_cpu) = cores::two()?;
        let directory = StoreDirectory::new()?;
        cores::pin(server_cpu)?;
        let server = directory.server()?;
        cores::pin(load_cpu)?;
        let call = Call {
            method: "nap",
            params: "0",
            result: "0",
            http: false,
        };
        Ok(Called {
            // As many connections as threads that run no jobs.
            load: Load::calling(server.address, 4, &call)?,
            client: JobClient::connect(server.address)?,
            server,
            _directory: directory,
        })
    }

    /// Enqueues jobs in arrays.
    fn enqueue(&mut self, job: &str, count: usize) -> Result<(), Failure> {
        let array = vec![job; 100].join(",");
        for _ in 0..count.div_ceil(100) {
            self.client
                .result("rpc.job.enqueue", &format!("[{array}]"))?;
        }
        Ok(())
    }

    /// Returns the p99 of its calls in milliseconds.
    fn p99(&mut self, span: Duration) -> Result<f64, Failure> {
        let outcome = self.load.run(Until::Elapsed(span))?;
        Ok(outcome.latencies.value_at_quantile(0.99) as f64 / 1e6)
    }

    /// Measures the p99 of its calls alone and beside what `begin` does, in turn. `end` is called after each turn.
    fn compare(
        &mut self,
        span: Duration,
        mut begin: impl FnMut(&mut Self) -> Result<(), Failure>,
        mut end: impl FnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<f64, Failure> {
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        self.p99(span)?;
        for _ in 0..TURNS {
            alone.push(self.p99(span)?);
            begin(self)?;
            let p99 = self.p99(span);
            end(self)?;
            beside.push(p99?);
        }
        let (alone, beside) = (median(&alone), median(&beside));
        println!("  p99 of calls in ms, alone and beside: {alone:.3}, {beside:.3}");
        Ok(beside / alone)
    }

    /// Waits until all jobs have ended.
    fn wait_for_jobs(&mut self) -> Result<(), Failure> {
        while has_live_jobs(&self.server)? {
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

/// Measures calls alone, beside jobs that fill their capacity, beside empty jobs, and while the jobs process is stopped.
fn calls_beside_jobs(missed: &mut MissedBars, span: Duration) -> Result<(), Failure> {
    let seconds = span.as_secs() as usize;
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut called = Called::start()?;
    // Four at once are 80 per second.
    let begin =
        |called: &mut Called| called.enqueue(r#"{"method":"nap","params":0.05}"#, 100 * seconds);
    let ratio = called.compare(span, begin, Called::wait_for_jobs)?;
    missed.check("p99 of calls beside jobs of 50 ms, compared", ratio, 1.1);
    let begin =
        |called: &mut Called| called.enqueue(r#"{"method":"ping","params":1}"#, 4_000 * seconds);
    let ratio = called.compare(span, begin, Called::wait_for_jobs)?;
    missed.check(
        "p99 of calls beside empty jobs at full rate, compared",
        ratio,
        3.0,
    );
    let pid = called.server.status()?["jobs"]["pid"].as_i64();
    let pid = Pid::from_raw(i32::try_from(pid.ok_or("no jobs process")?)?);
    let stop = |_: &mut Called| Ok(kill(pid, Signal::SIGSTOP)?);
    let go_on = |_: &mut Called| Ok(kill(pid, Signal::SIGCONT)?);
    let ratio = called.compare(span, stop, go_on)?;
    missed.check(
        "p99 of calls while the jobs process is stopped, compared",
        ratio,
        1.1,
    );
    Ok(sched_setaffinity(Pid::from_raw(0), &before)?)
}

/// Measures the CPU time of all processes, and what the jobs process writes, while no job is there.
fn idle(missed: &mut MissedBars, span: Duration) -> Result<(), Failure> {
    let directory = StoreDirectory::new()?;
    let server = directory.server()?;
    let mut client = JobClient::connect(server.address)?;
    let stored = client.result("rpc.job.enqueue", r#"{"method":"ping","params":1}"#)?;
    client.result("rpc.job.wait", &json!({"job": stored["job"]}).to_string())?;
    let pid = server.status()?["jobs"]["pid"]
        .as_u64()
        .ok_or("no jobs process")?;
    let written = || -> Result<u64, Failure> {
        let text = fs::read_to_string(format!("/proc/{pid}/io"))?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("write_bytes: "));
        Ok(line.ok_or("no write_bytes")?.parse()?)
    };
    // What the last job has begun ends.
    thread::sleep(Duration::from_secs(2));
    let (time, bytes) = (server.cpu_time()?, written()?);
    thread::sleep(span);
    let ticks = (server.cpu_time()? - time).as_secs_f64() * 100.0;
    let what = format!("idle for {} s", span.as_secs());
    missed.check(&format!("{what}: clock ticks of all processes"), ticks, 0.0);
    let more = (written()? - bytes) as f64;
    missed.check(&format!("{what}: bytes written"), more, 0.0);
    Ok(())
}
