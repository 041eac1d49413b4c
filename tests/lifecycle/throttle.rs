//! Tests a slot that cannot keep a worker: it is throttled while the others serve, and recovers without
//! help.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Client, Daemon, PATIENCE, assert_within, process, wait_for};

/// Returns a slot, as in the status.
fn slot(daemon: &Daemon, slot: usize) -> Value {
    daemon.status()["workers"][slot].take()
}

/// Kills each worker of slot 0 until `enough` returns true. Returns the number of workers.
pub fn kill_slot_0(daemon: &Daemon, mut enough: impl FnMut(usize) -> bool) -> usize {
    let other = daemon.ready_workers()[1];
    let mut ended = 0;
    while !enough(ended) {
        let workers = process::workers(daemon.pid());
        let victim = workers
            .iter()
            .find(|&&pid| pid != other && process::runs(pid));
        match victim {
            // It may have exited by itself, but its pid cannot be reused before it is reaped, and the
            // master is slower than this test.
            Some(&pid) if kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() => {
                ended += 1;
                wait_for("its death noticed", PATIENCE, || !process::runs(pid));
            }
            _ => pause_a_little(),
        }
    }
    ended
}

fn pause_a_little() {
    let mut first = true;
    wait_for("a moment", PATIENCE, || !std::mem::take(&mut first));
}

/// Returns clients whose connections are on the worker of slot 1, found by a call on each.
pub fn clients_of_slot_1(daemon: &Daemon, want: usize) -> Vec<Client> {
    let mut clients = Vec::new();
    let mut others = Vec::new();
    while clients.len() < want {
        let before = [0, 1].map(|slot| connections(daemon, slot));
        let mut client = daemon.client();
        client.call_text(r#"{"in":"ping"}"#);
        let mut after = before;
        wait_for("it to be counted", PATIENCE, || {
            after = [0, 1].map(|slot| connections(daemon, slot));
            after != before
        });
        match after[1] > before[1] {
            true => clients.push(client),
            false => others.push(client),
        }
        assert!(others.len() < 200, "slot 1 never accepts");
    }
    clients
}

fn connections(daemon: &Daemon, slot_number: usize) -> u64 {
    slot(daemon, slot_number)["connections"].as_u64().unwrap()
}

#[test]
fn a_slot_whose_workers_keep_dying_is_throttled_and_the_other_loses_no_call() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nthreads = 2\n")
        .expect_log("ended by SIGKILL")
        .start();
    let mut clients = clients_of_slot_1(&daemon, 2);
    let begin = Instant::now();
    let mut answered = 0;
    let deaths = kill_slot_0(&daemon, |_| {
        for client in &mut clients {
            assert_eq!(
                client.call_text(r#"{"in":"ping","params":5}"#),
                r#"{"out":"pong","result":5}"#
            );
            answered += 1;
        }
        begin.elapsed() > Duration::from_secs(3) && slot(&daemon, 0)["state"] == "throttled"
    });
    // 5 at once, then after 100, 200, 400, 800, 1600 ms: the first one and at most 10 more.
    println!("{deaths} deaths in 3 s, {answered} calls answered by the other slot, 0 lost");
    assert!((8..=11).contains(&deaths), "{deaths}");
    let throttled = slot(&daemon, 0);
    assert_eq!(throttled["state"], "throttled", "{throttled}");
    assert!(throttled["pid"].is_null(), "{throttled}");
    assert!(!throttled["throttle"].is_null(), "{throttled}");

    // A reload clears the count, so the delay need not be waited for.
    let reload = daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    assert_eq!(daemon.ready_workers().len(), 2);
}

#[test]
fn a_throttled_slot_comes_back_by_itself() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nrespawn-burst = 1\nrespawn-max-delay = \"300ms\"\n")
        .expect_log("ended by SIGKILL")
        .start();
    let deaths = kill_slot_0(&daemon, |ended| ended >= 4);
    let begin = Instant::now();
    wait_for("both slots ready again", PATIENCE, || {
        let status = daemon.status();
        let workers = status["workers"].as_array().unwrap();
        workers.iter().all(|worker| worker["state"] == "ready")
    });
    let took = begin.elapsed();
    assert_within(
        &format!("back after {deaths} deaths"),
        took,
        Duration::from_secs(2),
    );
}

/// RLIMIT_NPROC counts per user and does not limit root, so the daemon runs as a user that has no other
/// process.
#[test]
#[ignore = "needs root, to become another user; tests/run runs it"]
fn refused_forks_cost_a_line_now_and_then_and_end_with_the_limit() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nthreads = 2\n")
        .user(54_321)
        .expect_log("killed from outside")
        .expect_log("fork was refused")
        .start();
    let limit = |limit: &str| {
        // As the same user, which may do it even if root lacks CAP_SYS_RESOURCE.
        let done = Command::new("setpriv")
            .args(["--reuid", "54321", "--regid", "54321", "--clear-groups"])
            .args(["prlimit", "--pid", &daemon.pid().to_string()])
            .arg(format!("--nproc={limit}"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    limit("1:");
    let lines = daemon.log().lines().count();
    let ticks = process::cpu_ticks(daemon.pid()).unwrap();
    let begin = Instant::now();
    for worker in daemon.ready_workers() {
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    }
    let hold = Duration::from_secs(5);
    wait_for("some time without a fork", PATIENCE, || {
        assert!(process::runs(daemon.pid()), "{}", daemon.log());
        begin.elapsed() > hold
    });
    assert!(process::children(daemon.pid()).is_empty());
    let ticks = process::cpu_ticks(daemon.pid()).unwrap() - ticks;
    let lines = daemon.log().lines().count() - lines;
    limit("500:");
    let lifted = Instant::now();
    wait_for("full strength", PATIENCE, || {
        daemon.ready_workers().len() == 2
    });
    assert_within("full strength", lifted.elapsed(), Duration::from_secs(2));
    println!(
        "{hold:?} without a fork: {lines} lines logged, {ticks} ticks of CPU; full strength {:?} \
         after the limit was lifted",
        lifted.elapsed()
    );
    assert!(lines <= 5 + 2, "{}", daemon.log());
    assert!(ticks <= 10, "{ticks}");
}
