//! Kills workers, pool processes, jobs processes and masters under load, and compares the ledger of the handlers with
//! what was acknowledged. PREFORKD_JOB_KILLS sets the number of kills of each kind; `tests/jobs --kills N` runs it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{jobs_processes, wait_job};
use crate::support::{
    Daemon, Dice, PATIENCE, SetOnDrop, alone, from_environment, pass, pause, percentile, wait_for,
};

/// The handlers write the id, the attempt, its begin or end, and the uptime into `ledger`.
const CONFIG: &str = r#"
[workers]
count = 2
threads = 4
respawn-burst = 100000
respawn-max-delay = "0s"
drain-timeout = "2s"
[jobs]
store = "sqlite:jobs.db"
concurrency = 4
backoff = "10ms"
max-attempts = 1000
[methods.command]
command = ["sh", "job.sh"]
directory = "."
[pools.books]
command = ["python3", "program.py"]
directory = "."
processes = 2
respawn-burst = 100000
respawn-max-delay = "0s"
[methods.pooled]
pool = "books"
"#;

const COMMAND: &str = r#"
note() { read -r up _ < /proc/uptime; echo "$PREFORKD_JOB $PREFORKD_ATTEMPT $1 $up" >> ledger; }
note begin
sleep 0.02
note end
echo null
"#;

const PROGRAM: &str = r#"
import os, time
from preforkd import job, method, serve
ledger = os.open("ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(what):
    up = open("/proc/uptime").read().split()[0]
    it = job()
    os.write(ledger, f"{it.id} {it.attempt} {what} {up}\n".encode())
@method
def pooled():
    note("begin")
    time.sleep(0.02)
    note("end")
serve()
"#;

/// What the clients know.
#[derive(Default)]
struct Acknowledged {
    jobs: Mutex<BTreeSet<String>>,
    /// The times of all acknowledgements.
    times: Mutex<Vec<Instant>>,
    last: AtomicU64,
    /// The uptimes at which workers were killed, in seconds.
    kills: Mutex<Vec<f64>>,
}

impl Acknowledged {
    /// Enqueues a job until it is acknowledged. Its id makes that safe.
    fn enqueue(&self, daemon: &Daemon) {
        let number = self.last.fetch_add(1, Relaxed);
        let id = format!("00000000-0000-4000-8000-{number:012x}");
        let method = ["command", "pooled"][number as usize % 2];
        let call = json!({"in": "rpc.job.enqueue", "params": {"method": method, "id": id}});
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let answer = daemon.try_client().ok().and_then(|mut client| {
                client.try_send(&call.to_string()).ok()?;
                serde_json::from_slice::<Value>(&client.recv().ok()?).ok()
            });
            if answer.is_some_and(|answer| answer["result"]["job"] == *id) {
                self.jobs.lock().unwrap().insert(id);
                self.times.lock().unwrap().push(Instant::now());
                return;
            }
            pause();
        }
        panic!("{id} is not acknowledged\n{}", daemon.log());
    }
}

/// A kind of process that is killed, and how its living processes are found.
type Victim = (&'static str, fn(&Daemon) -> Vec<i32>);

fn pool_processes(daemon: &Daemon) -> Vec<i32> {
    let pid = daemon.status()["pools"][0]["pid"].as_i64();
    pid.into_iter().map(|pid| pid as i32).collect()
}

const WORKER: &str = "worker";
const JOBS_PROCESS: &str = "jobs process";
const VICTIMS: [Victim; 3] = [
    (WORKER, Daemon::ready_workers),
    ("pool process", pool_processes),
    (JOBS_PROCESS, jobs_processes),
];

/// The time between two enqueues of a client. With less, jobs would wait for capacity, and not for the next attempt alone.
const BETWEEN: Duration = Duration::from_millis(20);
/// With at least this number of kills, the times are asserted.
const MANY: u64 = 200;
/// The longest time after which the attempt of a killed worker begins again, and after which jobs are acknowledged
/// again if the jobs process was killed, in milliseconds. Both are the 99th percentile.
const BEGINS_AGAIN_MS: u64 = 100;
const ACKNOWLEDGED_AGAIN_MS: u64 = 250;

/// Returns the time since the boot of this machine in seconds, as the handlers write it.
fn uptime() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Kills processes of a kind while two clients enqueue. Returns the times of the kills, and how long each time no job
/// was acknowledged, in milliseconds.
fn kill_under_load(
    daemon: &Daemon,
    acknowledged: &Acknowledged,
    (name, living): Victim,
    (kills, dice): (u64, &mut Dice),
) -> Vec<u64> {
    let is_over = AtomicBool::new(false);
    let mut waits = Vec::new();
    thread::scope(|scope| {
        let _over = SetOnDrop(&is_over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    acknowledged.enqueue(daemon);
                    pass(BETWEEN);
                }
            });
        }
        for _ in 0..kills {
            let mut all = Vec::new();
            wait_for("a process to kill", PATIENCE, || {
                all = living(daemon);
                !all.is_empty()
            });
            let victim = all[dice.roll(all.len())];
            let at = Instant::now();
            if name == WORKER {
                acknowledged.kills.lock().unwrap().push(uptime());
            }
            // It may have ended by itself, such as one that another kill has made superfluous.
            let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
            wait_for("another process, and an acknowledgement", PATIENCE, || {
                let times = acknowledged.times.lock().unwrap();
                let first = times.iter().rev().take_while(|time| **time > at).last();
                if let Some(first) = first {
                    waits.push(first.duration_since(at).as_millis() as u64);
                }
                first.is_some()
            });
            wait_for("another process", PATIENCE, || {
                let now = living(daemon);
                now.len() == all.len() && !now.contains(&victim)
            });
        }
    });
    waits.sort_unstable();
    waits
}

/// Kills the master, and starts another one with the same store.
fn kill_masters(mut daemon: Daemon, acknowledged: &Acknowledged, kills: u64) -> Daemon {
    for _ in 0..kills {
        for _ in 0..4 {
            acknowledged.enqueue(&daemon);
        }
        let _ = kill(Pid::from_raw(daemon.pid()), Signal::SIGKILL);
        daemon.wait_exit();
        daemon = daemon.start_again();
    }
    daemon
}

/// An attempt that did not end: when it began, and when the next one of its job began.
pub(super) type LostAttempt = (f64, f64);

/// Checks the ledger: no attempt ends after the next one of its job has begun. Returns the attempts that did not end.
pub(super) fn check_ledger(text: &str, done: &BTreeSet<String>) -> Vec<LostAttempt> {
    let mut of_job: BTreeMap<&str, Vec<(u32, bool, f64)>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [job, attempt, what, up] = words[..] else {
            panic!("a line of the ledger is cut: {line:?}");
        };
        let event = (attempt.parse().unwrap(), what == "end", up.parse().unwrap());
        of_job.entry(job).or_default().push(event);
    }
    let mut lost = Vec::new();
    for (job, events) in &of_job {
        let mut running: Option<(u32, f64)> = None;
        for &(attempt, is_end, up) in events {
            if is_end {
                let current = running.take().map(|(attempt, _)| attempt);
                assert_eq!(
                    current,
                    Some(attempt),
                    "attempts of {job} overlap: {events:?}"
                );
            } else if let Some((_, before)) = running.replace((attempt, up)) {
                lost.push((before, up));
            }
        }
    }
    for job in done {
        let events = of_job.get(job.as_str());
        let has_ended = events.is_some_and(|events| events.iter().any(|(_, is_end, _)| *is_end));
        assert!(has_ended, "{job} is done without an attempt");
    }
    lost
}

/// Returns after how many milliseconds the attempts that the kill of a worker has ended began again, sorted.
fn begins_after(kills: &[f64], lost: &[LostAttempt]) -> Vec<u64> {
    let after = lost.iter().filter_map(|(before, again)| {
        // At most one kill is in between, because each kill waits for another worker.
        let kill = kills.iter().find(|kill| (before..again).contains(kill))?;
        Some(((again - kill) * 1e3).round() as u64)
    });
    let mut after: Vec<u64> = after.collect();
    after.sort_unstable();
    after
}

#[test]
#[ignore = "long: tests/jobs runs it"]
fn nothing_is_lost_and_no_attempts_overlap_while_processes_are_killed() {
    let _alone = alone();
    let kills = from_environment("PREFORKD_JOB_KILLS", 50);
    let mut dice = Dice::of_the_day("PREFORKD_SEED");
    let mut daemon = Daemon::builder()
        .config(CONFIG)
        .file("job.sh", COMMAND)
        .python_program(PROGRAM)
        .expect_log("SIGKILL")
        .expect_log("the master has died")
        .start();
    let acknowledged = Acknowledged::default();
    for victim in VICTIMS {
        let waits = kill_under_load(&daemon, &acknowledged, victim, (kills, &mut dice));
        println!(
            "{kills} kills of a {}: acknowledged again after p50 {} ms, p99 {} ms",
            victim.0,
            percentile(&waits, 50),
            percentile(&waits, 99)
        );
        if kills >= MANY && victim.0 == JOBS_PROCESS {
            assert!(percentile(&waits, 99) <= ACKNOWLEDGED_AGAIN_MS, "{waits:?}");
        }
    }
    daemon = kill_masters(daemon, &acknowledged, kills);
    println!("{kills} kills of the master");
    let jobs = acknowledged.jobs.into_inner().unwrap();
    let mut client = daemon.client();
    let mut repeated = 0;
    for job in &jobs {
        let record = wait_job(&mut client, job);
        assert_eq!(record["state"], "done", "{record}");
        repeated += u32::from(record["attempt"].as_u64() > Some(1));
    }
    let ledger = fs::read_to_string(daemon.dir().join("ledger")).unwrap();
    let lost = check_ledger(&ledger, &jobs);
    println!(
        "{} jobs acknowledged and done, {repeated} with more than one attempt; {} attempts were lost",
        jobs.len(),
        lost.len(),
    );
    let after = begins_after(&acknowledged.kills.into_inner().unwrap(), &lost);
    if !after.is_empty() {
        println!(
            "{} attempts were lost with their worker, and began again after p50 {} ms, p99 {} ms",
            after.len(),
            percentile(&after, 50),
            percentile(&after, 99)
        );
    }
    if kills >= MANY {
        assert!(after.len() > 20, "only {} attempts were lost", after.len());
        assert!(percentile(&after, 99) <= BEGINS_AGAIN_MS, "{after:?}");
    }
    assert!(repeated > 0, "no kill has hit an attempt");
}
