//! Tests that dead workers are replaced: how fast, and what their deaths leave behind.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, PATIENCE, assert_within, percentile, process, wait_for};

/// The causes of death: killed by an operator or the kernel, and the three signals of a bug.
const WAYS: [Signal; 4] = [
    Signal::SIGKILL,
    Signal::SIGSEGV,
    Signal::SIGABRT,
    Signal::SIGBUS,
];

/// Starts `count` workers without a throttle.
pub fn unthrottled(count: usize) -> Daemon {
    let config = format!("[workers]\ncount = {count}\nthreads = 2\nrespawn-max-delay = \"0s\"\n");
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("ended by SIG")
        .start();
    // Sent behind READY=1; otherwise it would be taken for the message of the first replacement.
    let full = format!("STATUS={count} of {count} workers ready");
    let told = daemon
        .notify()
        .wait(0, PATIENCE, |line| line.starts_with(&full));
    told.expect("a status line that tells of all workers");
    daemon
}

/// Kills one worker after the other, each when the previous one is replaced. Returns how long each took
/// from its death to a ready successor, shortest first.
pub fn replacement_times(daemon: &Daemon, count: usize, deaths: usize) -> Vec<Duration> {
    let full = format!("STATUS={count} of {count} workers ready");
    let mut seen = daemon.notify().count();
    let mut times: Vec<Duration> = (0..deaths)
        .map(|number| {
            let workers = process::workers(daemon.pid());
            let begin = Instant::now();
            end(workers[number % workers.len()], WAYS[number % WAYS.len()]);
            let ready = daemon
                .notify()
                .wait(seen, PATIENCE, |line| line.starts_with(&full));
            let (at, up_to) = ready.expect("a worker that died is replaced");
            seen = up_to;
            at - begin
        })
        .collect();
    times.sort();
    times
}

/// Prints a line about these times.
pub fn tell(what: &str, times: &[Duration]) {
    println!(
        "{what}: {} deaths, p50 {:?}, p99 {:?}, max {:?}",
        times.len(),
        percentile(times, 50),
        percentile(times, 99),
        percentile(times, 100),
    );
}

/// The resources of a process, to check that they do not grow.
#[derive(Debug, Clone, Copy)]
pub struct Weight {
    pub descriptors: usize,
    pub rss_bytes: u64,
}

impl Weight {
    /// Measures it when it has closed what the last command had opened.
    #[track_caller]
    pub fn of(pid: i32) -> Self {
        Weight {
            descriptors: process::descriptors_at_rest(pid),
            rss_bytes: process::rss_bytes(pid).unwrap(),
        }
    }
}

/// Kills all workers at once, repeatedly, ready or not, and looks for zombies meanwhile. Returns the most
/// zombies at one time.
pub fn massacre(daemon: &Daemon, count: usize, rounds: usize) -> usize {
    let mut most = 0;
    for round in 0..rounds {
        let workers = process::workers(daemon.pid());
        for worker in &workers {
            let signal = WAYS[round % WAYS.len()];
            // One whose keeper was killed for it may have retired meanwhile.
            if kill(Pid::from_raw(*worker), signal).is_err() {
                let mut other = None;
                wait_for("its successor", PATIENCE, || {
                    let now = process::workers(daemon.pid());
                    other = now.into_iter().find(|pid| !workers.contains(pid));
                    other.is_some()
                });
                end(other.unwrap(), signal);
            }
        }
        most = most.max(process::zombies(daemon.pid()).len());
        wait_for("all of them replaced", PATIENCE, || {
            let now = process::workers(daemon.pid());
            now.len() == count && now.iter().all(|pid| !workers.contains(pid))
        });
    }
    wait_for("all workers ready", PATIENCE, || {
        daemon.ready_workers().len() == count
    });
    most
}

/// Asserts that the log reports exactly `deaths` deaths. A process that is killed right after its start
/// by its name may be a keeper, whose death has another message. The same is true for a keeper that ended
/// with its worker and was reaped first.
#[track_caller]
fn assert_told(daemon: &Daemon, deaths: usize) {
    let log = daemon.log();
    let workers = log.matches("ended by SIG").count();
    let keepers = log.matches("the keeper of worker").count();
    println!("{deaths} deaths: {workers} of workers and {keepers} of keepers in the log");
    assert!(workers <= deaths && workers + keepers >= deaths);
}

/// Asserts that `deaths` deaths were counted and left nothing in the master.
#[track_caller]
pub fn assert_nothing_left(daemon: &Daemon, before: Weight, deaths: usize, most_zombies: usize) {
    process::wait_for_no_zombies(daemon.pid());
    let after = Weight::of(daemon.pid());
    println!(
        "{most_zombies} zombies at most at one time; master before {before:?}, after {after:?}"
    );
    assert_told(daemon, deaths);
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.rss_bytes < before.rss_bytes + (1 << 20));
}

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("a worker that was not reaped can be signalled");
}

#[test]
fn a_worker_is_replaced_at_once_however_it_died() {
    let daemon = unthrottled(2);
    let times = replacement_times(&daemon, 2, 100);
    tell("from death to a ready successor", &times);
    // Tests run concurrently here; the limit for p99 is in `bars`, which has the machine for itself.
    assert_within(
        "the median",
        percentile(&times, 50),
        Duration::from_millis(50),
    );
    assert_eq!(daemon.ready_workers().len(), 2);
}

#[test]
fn four_hundred_deaths_leave_nothing_behind() {
    let daemon = unthrottled(4);
    // Allocations at the first deaths and the first status are no growth.
    massacre(&daemon, 4, 25);
    assert_told(&daemon, 100);
    let before = Weight::of(daemon.pid());
    let most_zombies = massacre(&daemon, 4, 75);
    assert_nothing_left(&daemon, before, 400, most_zombies);
    assert_eq!(daemon.status()["deaths"].as_array().unwrap().len(), 100);
}
