//! Workers that die are replaced: how soon, and what their deaths leave behind.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, PATIENCE, assert_within, percentile, process, wait_for};

/// The ways to die: by hand or for want of memory, and the three that a bug takes.
const WAYS: [Signal; 4] = [
    Signal::SIGKILL,
    Signal::SIGSEGV,
    Signal::SIGABRT,
    Signal::SIGBUS,
];

/// So many workers, and no throttle.
pub fn unthrottled(count: usize) -> Daemon {
    let config = format!("[workers]\ncount = {count}\nthreads = 2\nrespawn-max-delay = \"0s\"\n");
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("ended by SIG")
        .start();
    // Told behind READY=1: else it would be taken for the first replacement's.
    let full = format!("STATUS={count} of {count} workers ready");
    let told = daemon
        .notify()
        .wait(0, PATIENCE, |line| line.starts_with(&full));
    told.expect("a status line that tells of all workers");
    daemon
}

/// Kills worker after worker, each as soon as the one before it is replaced. Answers how long
/// each took from its death to a successor that is ready, shortest first.
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

/// One line about how long it took.
pub fn tell(what: &str, times: &[Duration]) {
    println!(
        "{what}: {} deaths, p50 {:?}, p99 {:?}, max {:?}",
        times.len(),
        percentile(times, 50),
        percentile(times, 99),
        percentile(times, 100),
    );
}

/// What a process has, to see that it does not grow.
#[derive(Debug, Clone, Copy)]
pub struct Weight {
    pub descriptors: usize,
    pub rss_bytes: u64,
}

impl Weight {
    /// Once it has closed what the last command had opened.
    #[track_caller]
    pub fn of(pid: i32) -> Self {
        Weight {
            descriptors: process::descriptors_at_rest(pid),
            rss_bytes: process::rss_bytes(pid).unwrap(),
        }
    }
}

/// Ends all workers at once, again and again, ready or not, and looks for zombies all the while.
/// Answers the most that there were at one time.
pub fn massacre(daemon: &Daemon, count: usize, rounds: usize) -> usize {
    let mut most = 0;
    for round in 0..rounds {
        let workers = process::workers(daemon.pid());
        for worker in &workers {
            end(*worker, WAYS[round % WAYS.len()]);
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

/// Asserts that the log tells of so many deaths and no more. Who is killed by its name in its first
/// moment may turn out to be a keeper, whose death is told in words of its own; so may be that of one
/// that ended with its worker and was reaped before it.
#[track_caller]
fn assert_told(daemon: &Daemon, deaths: usize) {
    let log = daemon.log();
    let workers = log.matches("ended by SIG").count();
    let keepers = log.matches("the keeper of worker").count();
    println!("{deaths} deaths: {workers} of workers and {keepers} of keepers in the log");
    assert!(workers <= deaths && workers + keepers >= deaths);
}

/// Asserts that so many deaths were counted, and left nothing in the master.
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
    // Tests run beside each other here: the bar for p99 is in `bars`, which has the machine alone.
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
    // What is made once, by the first deaths and the first status, is no growth.
    massacre(&daemon, 4, 25);
    assert_told(&daemon, 100);
    let before = Weight::of(daemon.pid());
    let most_zombies = massacre(&daemon, 4, 75);
    assert_nothing_left(&daemon, before, 400, most_zombies);
    assert_eq!(daemon.status()["deaths"].as_array().unwrap().len(), 100);
}
