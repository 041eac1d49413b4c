//! Reloads and upgrades under a load of jobs: no acknowledged job is lost, no attempt is counted twice, and no client
//! waits long for an acknowledgement.
//!
//! PREFORKD_JOB_RELOADS and PREFORKD_JOB_UPGRADES set how often these are done. The upgrades go to
//! PREFORKD_JOBS_BASELINE, an older version, and back; without it, each goes to a new copy of the binary under test.
//! `tests/jobs --reloads N` runs it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{jobs_processes, wait_job};
use crate::support::installed::{Installed, upgrade};
use crate::support::{
    Client, Daemon, PATIENCE, SetOnDrop, alone, assert_within, binary, from_environment, pass,
    pause, percentile, wait_for,
};

/// An attempt of `long` takes longer than `drain-timeout`, so reloads interrupt it.
const CONFIG: &str = r#"
[workers]
count = 2
threads = 4
drain-timeout = "2s"
[jobs]
store = "sqlite:jobs.db"
drain-timeout = "1s"
[methods.echo]
builtin = "echo"
[methods.short]
command = ["sleep", "0.05"]
[methods.long]
command = ["sleep", "3"]
[pools.books]
command = ["python3", "program.py"]
directory = "."
processes = 2
[methods.pooled]
pool = "books"
"#;

const PROGRAM: &str = "
import time
from preforkd import method, serve
@method
def pooled():
    time.sleep(0.05)
serve()
";

/// With at least this number of reloads, the test is in its long form, and the longest gap is asserted.
const LONG: u64 = 100;
const LONGEST_GAP: Duration = Duration::from_millis(250);
const CLIENTS: u64 = 4;

/// What one client saw.
#[derive(Default)]
struct Seen {
    /// The acknowledged jobs.
    jobs: Vec<String>,
    /// The time between two acknowledgements of this client.
    gaps: Vec<Duration>,
}

/// Returns the method of a job. Most are short, so that attempts do not use up the machine.
fn method(number: u64) -> &'static str {
    match number % 32 {
        0 | 16 => "short",
        8 | 24 => "pooled",
        _ if number == 1 || number == 2 => "long",
        _ => "echo",
    }
}

/// Enqueues jobs until `is_over`. A job is sent until it is acknowledged; its id makes that safe.
fn enqueue_until(daemon: &Daemon, is_over: &AtomicBool, next: &AtomicU64) -> Seen {
    let mut seen = Seen::default();
    let mut client: Option<Client> = None;
    let mut last = Instant::now();
    while !is_over.load(Relaxed) {
        let number = next.fetch_add(1, Relaxed);
        let id = format!("00000000-0000-4000-8000-{number:012x}");
        let params = json!({"method": method(number), "id": id});
        let call = json!({"in": "rpc.job.enqueue", "params": params}).to_string();
        loop {
            let open = client.get_or_insert_with(|| daemon.client());
            let answer = open.try_send(&call).ok().and_then(|()| open.recv().ok());
            // The server may close a connection of a worker that drains.
            let Some(answer) = answer else {
                client = None;
                continue;
            };
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(answer["result"]["job"], id, "{answer}");
            break;
        }
        seen.jobs.push(id);
        seen.gaps.push(last.elapsed());
        last = Instant::now();
        pause();
    }
    seen
}

/// Calls `act` as often as `times` says while clients enqueue. Prints how long they waited, and returns their jobs and
/// the longest gap.
fn act_under_load(
    daemon: &Daemon,
    next: &AtomicU64,
    (times, what): (u64, &str),
    mut act: impl FnMut(u64),
) -> (Vec<String>, Duration) {
    let is_over = AtomicBool::new(false);
    let mut all = Seen::default();
    thread::scope(|scope| {
        let over = SetOnDrop(&is_over);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(|| enqueue_until(daemon, &is_over, next)))
            .collect();
        for number in 0..times {
            act(number);
            pass(Duration::from_millis(100));
        }
        drop(over);
        for client in clients {
            let seen = client.join().unwrap();
            all.jobs.extend(seen.jobs);
            all.gaps.extend(seen.gaps);
        }
    });
    all.gaps.sort_unstable();
    let longest = *all.gaps.last().unwrap();
    println!(
        "{times} {what}: {} jobs acknowledged; the gap between two acknowledgements of a client: p50 {:?}, p99 {:?}, \
         at most {longest:?}",
        all.jobs.len(),
        percentile(&all.gaps, 50),
        percentile(&all.gaps, 99),
    );
    (all.jobs, longest)
}

/// Asserts that a job ends, done in its first attempt. Returns how often that attempt was interrupted.
fn interruptions(client: &mut Client, job: &str) -> u64 {
    let record = wait_job(client, job);
    let attempt = (&record["state"], &record["attempt"], &record["crashes"]);
    assert_eq!(attempt, (&json!("done"), &json!(1), &json!(0)), "{record}");
    record["interruptions"].as_u64().unwrap()
}

#[test]
#[ignore = "long: tests/jobs runs it"]
fn reloads_and_upgrades_lose_no_job_and_count_no_attempt() {
    let _alone = alone();
    let reloads = from_environment("PREFORKD_JOB_RELOADS", 5);
    let upgrades = from_environment("PREFORKD_JOB_UPGRADES", 1);
    let other = std::env::var_os("PREFORKD_JOBS_BASELINE").map(PathBuf::from);
    let installed = Installed::new();
    let daemon = installed.daemon(CONFIG).python_program(PROGRAM).start();
    let next = AtomicU64::new(0);
    let (mut jobs, by_reload) =
        act_under_load(&daemon, &next, (reloads, "reloads"), |_| daemon.reload());
    let (more, by_upgrade) = act_under_load(&daemon, &next, (upgrades, "upgrades"), |number| {
        match &other {
            Some(other) if number % 2 == 0 => installed.put(other),
            _ => installed.put(&binary()),
        }
        upgrade(&daemon);
    });
    jobs.extend(more);
    let mut client = daemon.client();
    let interrupted: u64 = jobs.iter().map(|job| interruptions(&mut client, job)).sum();
    println!(
        "{} jobs done in their first attempt; attempts were interrupted {interrupted} times",
        jobs.len()
    );
    assert!(interrupted > 0, "no attempt was interrupted");
    wait_for("one jobs process", PATIENCE, || {
        jobs_processes(&daemon).len() == 1
    });
    let gap = by_reload.max(by_upgrade);
    match reloads >= LONG {
        true => assert!(gap <= LONGEST_GAP, "a gap of {gap:?}"),
        false => assert_within("the gap between two acknowledgements", gap, LONGEST_GAP),
    }
}
