//! Tests more, fewer and fresh workers: by command, by signal, one at a time.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Callers, Daemon, PATIENCE, wait_for};

fn wait_count(daemon: &Daemon, count: usize) {
    wait_for(&format!("{count} workers"), PATIENCE, || {
        let workers = daemon.workers();
        workers.len() == count && workers.iter().all(|worker| worker.state == "ready")
    });
}

#[test]
fn scale_and_ttin_and_ttou_change_the_count_and_a_reload_puts_it_back() {
    let daemon = Daemon::start();
    let load = Callers::connecting(daemon.address(), 2);
    let first = daemon.ready_workers();
    assert!(daemon.command(&["scale", "4"]).status.success());
    wait_count(&daemon, 4);
    daemon.signal(Signal::SIGTTOU);
    wait_count(&daemon, 3);
    daemon.signal(Signal::SIGTTIN);
    wait_count(&daemon, 4);
    assert!(daemon.command(&["scale", "1"]).status.success());
    wait_count(&daemon, 1);
    // One worker always stays.
    daemon.signal(Signal::SIGTTOU);
    daemon.wait_log("number of workers: 1 (was 1)");
    assert_eq!(daemon.ready_workers(), [first[0]]);
    let refused = daemon.command(&["scale", "0"]);
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
    assert!(daemon.command(&["reload"]).status.success());
    wait_count(&daemon, 2);
    load.stop_without_loss("scaled up and down");
}

#[test]
fn term_to_a_worker_retires_it_and_a_fresh_one_takes_its_slot() {
    let daemon = Daemon::start();
    let load = Callers::connecting(daemon.address(), 2);
    let before = daemon.ready_workers();
    kill(Pid::from_raw(before[0]), Signal::SIGTERM).unwrap();
    wait_for("a fresh worker in slot 0", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 2 && now[0] != before[0] && now[1] == before[1]
    });
    load.stop_without_loss("a worker retired");
    wait_count(&daemon, 2);
    // It was requested, so it is not reported as a death.
    assert_eq!(daemon.status()["deaths"].as_array().unwrap().len(), 0);
}

#[test]
fn quit_ends_a_worker_now_and_int_does_nothing_to_it() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .expect_log("exited without an order")
        .start();
    let before = daemon.ready_workers();
    kill(Pid::from_raw(before[1]), Signal::SIGINT).unwrap();
    kill(Pid::from_raw(before[0]), Signal::SIGQUIT).unwrap();
    wait_for("a fresh worker in slot 0", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 2 && now[0] != before[0] && now[1] == before[1]
    });
}
