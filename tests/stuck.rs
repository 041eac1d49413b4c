//! Event loops that stand still, and a master that does: who is replaced, and who is not.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Callers, Daemon, PATIENCE, process, wait_for};

const SHORT: &str = "[workers]\ncount = 2\nthreads = 2\nheartbeat-timeout = \"1s\"\n";

/// Lets time pass in which nothing is to happen.
fn watch_for(time: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    wait_for(what, time + PATIENCE, || {
        assert!(holds(), "{what}: not after {:?}", begin.elapsed());
        begin.elapsed() >= time
    });
}

#[test]
fn a_stopped_worker_is_replaced_after_its_heartbeat_timeout() {
    let daemon = Daemon::builder()
        .config(SHORT)
        .expect_log("event loop stuck")
        .start();
    let before = daemon.ready_workers();
    let begin = Instant::now();
    kill(Pid::from_raw(before[0]), Signal::SIGSTOP).unwrap();
    wait_for("a successor", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 2 && now[0] != before[0]
    });
    let took = begin.elapsed();
    println!("replaced {took:?} after SIGSTOP, heartbeat-timeout 1 s");
    assert!(took <= Duration::from_secs(2), "{took:?}");
    assert_eq!(daemon.ready_workers()[1], before[1]);
    assert!(!process::runs(before[0]));
}

#[test]
fn idle_workers_live_with_the_shortest_heartbeat_timeout() {
    let daemon = Daemon::builder().config(SHORT).start();
    let before = process::children(daemon.pid());
    watch_for(Duration::from_secs(4), "the same workers", || {
        process::children(daemon.pid()) == before
    });
}

#[test]
fn a_master_that_was_stopped_ends_nobody() {
    let daemon = Daemon::builder().config(SHORT).start();
    let before = daemon.ready_workers();
    let load = Callers::lasting(daemon.address(), 2);
    daemon.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    wait_for("twice the timeout", PATIENCE, || {
        stopped.elapsed() > Duration::from_secs(2)
    });
    daemon.signal(Signal::SIGCONT);
    watch_for(Duration::from_secs(2), "the same workers", || {
        daemon.ready_workers() == before
    });
    load.stop_without_loss("a master stopped for 2 s");
}
