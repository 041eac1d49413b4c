//! Tests stops: by order, which cuts no running call, and at once; and what remains if the master is
//! killed.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Client, Daemon, PATIENCE, assert_within, pass, process, wait_for};

/// Room for a hundred sleeping calls.
const WIDE: &str = "
[workers]
count = 2
threads = 110
[methods.sleep]
builtin = \"sleep\"
";

/// New connections must be refused within this time.
const REFUSED_WITHIN: Duration = Duration::from_millis(100);

/// Opens `count` connections, each with a running call.
fn running_calls(daemon: &Daemon, count: u64, seconds: f64) -> Vec<Client> {
    let clients = (0..count).map(|id| {
        let mut client = daemon.client();
        client.send(&json!({"in": "sleep", "params": seconds, "id": id}).to_string());
        client
    });
    let clients = clients.collect();
    wait_for("all calls to run", PATIENCE, || {
        daemon.workers().iter().map(|it| it.running).sum::<u64>() == count
    });
    clients
}

/// Waits until new connections are refused, and returns how long that took.
fn time_to_refusal(daemon: &Daemon) -> Duration {
    let begin = Instant::now();
    wait_for(
        "new connections refused",
        PATIENCE,
        || match TcpStream::connect(daemon.address()) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                true
            }
        },
    );
    begin.elapsed()
}

#[test]
fn term_with_a_hundred_running_calls_answers_them_all_and_refuses_new_ones() {
    let mut daemon = Daemon::builder().config(WIDE).start();
    // Idle connections are no reason to wait.
    let _idle: Vec<Client> = (0..20).map(|_| daemon.client()).collect();
    let mut clients = running_calls(&daemon, 100, 4.0);
    daemon.signal(Signal::SIGTERM);
    let refused = time_to_refusal(&daemon);
    let mut answered = 0;
    for (id, client) in clients.iter_mut().enumerate() {
        let answer = client.recv_json();
        answered += usize::from(answer["out"] == "sleep" && answer["id"] == id);
    }
    for client in &mut clients {
        client.assert_closed();
    }
    drop(clients);
    let status = daemon.wait_exit();
    println!("{answered} of 100 calls answered, new connections refused after {refused:?}");
    assert_eq!(answered, 100);
    assert_within("refused", refused, REFUSED_WITHIN);
    assert_eq!(status.code(), Some(0));
    daemon.wait_group_gone();
}

#[test]
fn a_second_term_leaves_at_once() {
    leaves_at_once(|daemon| {
        daemon.signal(Signal::SIGTERM);
        daemon.wait_log("stopping: 2 workers drain");
        // Within a tenth of a second, a second signal counts as the first one.
        pass(Duration::from_millis(150));
        daemon.signal(Signal::SIGTERM);
    });
}

#[test]
fn int_leaves_at_once() {
    leaves_at_once(|daemon| daemon.signal(Signal::SIGINT));
}

#[test]
fn quit_leaves_at_once() {
    leaves_at_once(|daemon| daemon.signal(Signal::SIGQUIT));
}

#[test]
fn stop_now_leaves_at_once() {
    leaves_at_once(|daemon| {
        let stopped = daemon.command(&["stop", "--now"]);
        assert!(stopped.status.success(), "{stopped:?}");
    });
}

#[track_caller]
fn leaves_at_once(order: impl FnOnce(&Daemon)) {
    let mut daemon = Daemon::builder().config(WIDE).start();
    let mut clients = running_calls(&daemon, 10, 15.0);
    let begin = Instant::now();
    order(&daemon);
    let status = daemon.wait_exit();
    let took = begin.elapsed();
    println!("left {took:?} after the order, with 10 calls running");
    assert_eq!(status.code(), Some(0));
    assert_within("left", took, Duration::from_secs(2));
    daemon.wait_group_gone();
    clients.iter_mut().for_each(Client::assert_closed);
}

#[test]
fn at_the_drain_deadline_calls_are_answered_with_stopping() {
    let daemon = Daemon::builder()
        .config(
            "
[workers]
count = 1
threads = 1
drain-timeout = \"6s\"
[limits]
timeout = \"6s\"
[methods.sleep]
builtin = \"sleep\"
",
        )
        .expect_log("done when the drain time had passed")
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 2.7, "id": "first"}"#);
    daemon.wait_running(1);
    let begin = Instant::now();
    let worker = Pid::from_raw(daemon.ready_workers()[0]);
    kill(worker, Signal::SIGTERM).unwrap();
    // After the drain has begun, so that they have more time left than the drain. A running call keeps
    // the connection here. In this half of the drain it is still read.
    pass(Duration::from_secs(1));
    client.send_together(
        ["running", "queued"].map(|id| json!({"in": "sleep", "params": 5.9, "id": id})),
    );
    assert_eq!(client.recv_json()["id"], "first");
    let answers = [client.recv_json(), client.recv_json()];
    let took = begin.elapsed();
    println!("{took:?} after TERM to the worker: {answers:?}");
    for answer in &answers {
        assert_eq!(answer["result"]["code"], -32005, "{answer}");
        assert_eq!(answer["result"]["started"], answer["id"] == "running");
    }
    assert!(took >= Duration::from_millis(5900), "{took:?}");
    client.assert_closed();
    wait_for("the worker's end", PATIENCE, || {
        !process::runs(worker.as_raw())
    });
    assert_eq!(daemon.ready_workers().len(), 1);
}

#[test]
fn idle_workers_leave_a_killed_master_and_the_next_one_starts_over_its_pid_file() {
    let mut daemon = Daemon::builder()
        .config("[workers]\ncount = 4\n")
        .expect_log("the master has died")
        .start();
    let mut times = Vec::new();
    for signal in [Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGKILL] {
        let _idle: Vec<Client> = (0..4).map(|_| daemon.client()).collect();
        // A connection this young may have a call in transit, so it lingers before it is closed.
        let idle_since = Instant::now();
        wait_for("the connections to be idle", PATIENCE, || {
            idle_since.elapsed() > Duration::from_millis(1200)
        });
        let old = daemon.pid();
        daemon.signal(signal);
        let begin = Instant::now();
        let refused = time_to_refusal(&daemon);
        let status = daemon.wait_exit();
        assert_eq!(status.signal(), Some(signal as i32), "{status:?}");
        // Zombies are accepted here, because this test cannot reap orphans.
        wait_for("the workers' end", PATIENCE, || {
            daemon.processes().is_empty()
        });
        let gone = begin.elapsed();
        times.push((refused, gone));
        assert_within("refused", refused, REFUSED_WITHIN);
        assert_within("gone", gone, Duration::from_secs(1));
        let stale = daemon.dir().read("preforkd.pid");
        assert_eq!(stale.trim(), old.to_string());
        daemon.wait_group_gone();
        daemon = daemon.start_again();
        daemon.client().call(&json!({"in": "ping"}));
        assert_eq!(
            daemon.dir().read("preforkd.pid").trim(),
            daemon.pid().to_string()
        );
    }
    println!("refused after, all gone after: {times:?}");
}

#[test]
fn calls_that_run_when_the_master_is_killed_are_answered_first() {
    let mut daemon = Daemon::builder()
        .config(WIDE)
        .expect_log("the master has died")
        .start();
    let mut clients = running_calls(&daemon, 20, 3.0);
    daemon.signal(Signal::SIGKILL);
    let refused = time_to_refusal(&daemon);
    assert_within("refused", refused, REFUSED_WITHIN);
    let answered = clients
        .iter_mut()
        .filter_map(|client| (client.recv_json()["out"] == "sleep").then_some(()))
        .count();
    assert_eq!(answered, 20);
    drop(clients);
    daemon.wait_exit();
    daemon.wait_group_gone();
    println!("{answered} of 20 calls answered, new connections refused after {refused:?}");
    drop(daemon.start_again());
}

#[test]
fn a_stuck_worker_does_not_outlive_its_master_for_long() {
    let mut daemon = Daemon::builder()
        .config(
            "
[workers]
count = 1
drain-timeout = \"1s\"
[limits]
timeout = \"1s\"
[methods.sleep]
builtin = \"sleep\"
",
        )
        .expect_log("the master has died")
        .start();
    let worker = daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGSTOP).unwrap();
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    // A stopped process does nothing and does not even die by an alarm. When it continues, it exits.
    kill(Pid::from_raw(worker), Signal::SIGCONT).unwrap();
    wait_for("its end", PATIENCE, || !process::runs(worker));
}
