//! Tests stuck event loops and a stuck master: which workers are replaced, and which are not.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::daemon::Builder;
use crate::support::{
    Callers, Client, Daemon, PATIENCE, alone, assert_within, example, pass, process, wait_for,
};

const SHORT: &str = "[workers]\ncount = 2\nthreads = 2\nheartbeat-timeout = \"1s\"\n";

/// Checks during this time that a condition stays true.
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
    assert_within(
        "replaced after a heartbeat-timeout of 1 s",
        took,
        Duration::from_secs(2),
    );
    assert_eq!(daemon.ready_workers()[1], before[1]);
    assert!(!process::runs(before[0]));
}

#[test]
fn idle_workers_live_with_the_shortest_heartbeat_timeout() {
    let daemon = Daemon::builder().config(SHORT).start();
    let _turn = alone();
    let before = process::workers(daemon.pid());
    watch_for(Duration::from_secs(4), "the same workers", || {
        process::workers(daemon.pid()) == before
    });
}

#[test]
fn a_master_that_was_stopped_ends_nobody() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nthreads = 2\nheartbeat-timeout = \"3s\"\n")
        .start();
    let before = daemon.ready_workers();
    let load = Callers::lasting(daemon.address(), 2);
    daemon.signal(Signal::SIGSTOP);
    pass(Duration::from_secs(6));
    daemon.signal(Signal::SIGCONT);
    watch_for(Duration::from_secs(5), "the same workers", || {
        daemon.ready_workers() == before
    });
    load.stop_without_loss("a master stopped for 6 s");
}

/// Returns two workers of `examples/misbehave`, or as many as `more` says.
fn misbehaving(more: &str) -> Builder {
    let config = format!(
        "[workers]\n{more}\nheartbeat-timeout = \"1s\"\n[methods.hang]\ntimeout = \"500ms\"\n\
         [methods.spin]\ntimeout = \"500ms\"\n"
    );
    Daemon::builder()
        .program(example("misbehave"))
        .config(&config)
}

/// Calls, and returns the error's name and `started`, and how long the answer took.
fn refused(client: &mut Client, call: &str) -> (String, bool, Duration) {
    let begin = Instant::now();
    let answer: Value = serde_json::from_str(&client.call_text(call)).unwrap();
    let error = &answer["result"];
    let name = error["name"].as_str().unwrap_or_default().to_owned();
    let started = error["started"].as_bool().unwrap_or_default();
    (name, started, begin.elapsed())
}

fn assert_on_time(took: Duration, deadline: Duration) {
    // Deadlines are counted in whole milliseconds from the last wake-up of the loop.
    assert!(took + Duration::from_millis(5) >= deadline, "{took:?}");
    assert_within("answered", took, deadline + Duration::from_millis(100));
}

/// Waits until slot 0 of a daemon with one worker has another worker.
fn wait_successor(daemon: &Daemon, before: &[i32]) {
    wait_for("a successor", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == before.len() && now != before
    });
}

/// Returns the last death in the status.
fn last_death(daemon: &Daemon) -> Value {
    let status = daemon.status();
    status["deaths"]
        .as_array()
        .unwrap()
        .last()
        .cloned()
        .unwrap_or_default()
}

/// Runs `method` with `params` on all threads; its deadline is 500 ms. The callers get `timeout`, the
/// worker is replaced, and its connections survive. Returns the evidence.
fn wedge(method: &str, params: &str) -> String {
    let _turn = alone();
    let daemon = misbehaving("count = 1\nthreads = 2").start();
    let before = daemon.ready_workers();
    let deadline = Duration::from_millis(500);
    let others = Callers::lasting(daemon.address(), 2);
    let mut held = daemon.client();
    held.send(r#"{"in":"spin","params":0,"id":"before"}"#);
    assert_eq!(held.recv_json()["result"], 0);
    let call = format!(r#"{{"in":"{method}","params":{params},"id":7}}"#);
    let stuck: Vec<_> = (0..2)
        .map(|_| {
            let (mut client, call) = (daemon.client(), call.clone());
            std::thread::spawn(move || (refused(&mut client, &call), client))
        })
        .collect();
    daemon.wait_running(2);
    // A call behind them waits for a thread.
    let behind = std::thread::spawn(move || {
        let told = refused(&mut held, r#"{"in":"spin","params":0,"id":8}"#);
        (told, held)
    });
    let mut clients: Vec<Client> = Vec::new();
    for caller in stuck {
        let ((name, started, took), client) = caller.join().unwrap();
        assert_eq!((name.as_str(), started), ("timeout", true));
        assert_on_time(took, deadline);
        clients.push(client);
    }
    let ((name, started, took), held) = behind.join().unwrap();
    assert_eq!((name.as_str(), started), ("timeout", false));
    assert_on_time(took, deadline);
    wait_successor(&daemon, &before);
    wait_for("the end of the wedged one", PATIENCE, || {
        !process::runs(before[0])
    });
    // The same connections, and a fresh worker.
    clients.push(held);
    for client in &mut clients {
        let answer = client.call_text(r#"{"in":"spin","params":0}"#);
        assert_eq!(answer, r#"{"out":"spin","result":0}"#);
    }
    others.stop_without_loss("beside a worker whose threads are all stuck");
    // It has ended before the master reaps it.
    wait_for("its record", PATIENCE, || {
        last_death(&daemon)["pid"] == before[0]
    });
    let death = last_death(&daemon);
    let evidence = death["reason"].as_str().unwrap().to_owned();
    println!("{evidence}");
    assert_eq!(death["exit"], 0);
    let begin = format!("all 2 handler threads are stuck: {method} (id 7) for ");
    assert!(evidence.starts_with(&begin), "{evidence}");
    assert_eq!(evidence.matches(" on handler-").count(), 2, "{evidence}");
    assert!(
        daemon.log().contains(&evidence),
        "the log has it before it is needed"
    );
    daemon.wait_log("is recycled once its successor is ready: all its handler threads are stuck");
    evidence
}

#[test]
fn callers_of_hung_threads_hear_timeout_and_the_worker_is_replaced_without_loss() {
    let evidence = wedge("hang", "null");
    assert!(evidence.contains(": S asleep"), "{evidence}");
}

#[test]
fn threads_that_spin_are_as_stuck_as_those_that_sleep() {
    let evidence = wedge("spin", "60");
    assert!(evidence.contains(": R running"), "{evidence}");
}

#[test]
fn one_thread_that_spins_is_lost_until_it_comes_back_and_costs_nothing_else() {
    let _turn = alone();
    let daemon = misbehaving("count = 1\nthreads = 2").start();
    let before = daemon.ready_workers();
    let others = Callers::lasting(daemon.address(), 2);
    let mut client = daemon.client();
    let (name, started, took) = refused(&mut client, r#"{"in":"spin","params":4,"id":7}"#);
    assert_eq!((name.as_str(), started), ("timeout", true));
    assert_on_time(took, Duration::from_millis(500));
    let lost = || daemon.status()["workers"][0]["lost_threads"].clone();
    wait_for("the thread to count as lost", PATIENCE, || lost() == 1);
    let table = daemon.command(&["status"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("1 of 2 threads lost"), "{table}");
    // The other thread serves on the same connection.
    let answer = client.call_text(r#"{"in":"spin","params":0}"#);
    assert_eq!(answer, r#"{"out":"spin","result":0}"#);
    daemon.wait_log("1 of 2 handler threads are stuck past their deadline");
    assert!(daemon.log().contains("spin (id 7) has run for"));
    wait_for("the thread to come back", PATIENCE, || lost() == 0);
    assert_eq!(daemon.ready_workers(), before);
    others.stop_without_loss("beside a lost thread");
}

#[test]
fn a_blocked_event_loop_is_replaced_and_its_record_says_what_it_ran() {
    let daemon = misbehaving("count = 2")
        .expect_log("event loop stuck")
        .start();
    let before = daemon.ready_workers();
    let mut client = daemon.client();
    let begin = Instant::now();
    client.send(r#"{"in":"block","params":60}"#);
    wait_successor(&daemon, &before);
    let took = begin.elapsed();
    assert_within(
        "replaced after a heartbeat-timeout of 1 s",
        took,
        Duration::from_secs(2),
    );
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "crashed", "{answer}");
    let death = last_death(&daemon);
    let reason = death["reason"].as_str().unwrap();
    println!("{reason}");
    assert_eq!(
        (&death["signal"], &death["method"]),
        (&"SIGABRT".into(), &"block".into())
    );
    assert!(reason.starts_with("event loop stuck for "), "{reason}");
    assert!(reason.contains("; event loop: R running"), "{reason}");
    assert!(reason.contains("; it runs block"), "{reason}");
}

#[test]
fn a_draining_worker_whose_event_loop_is_blocked_is_ended_by_its_heartbeat_too() {
    let daemon = misbehaving("count = 1")
        .expect_log("while it drained")
        .start();
    let before = daemon.ready_workers();
    let mut client = daemon.client();
    let ticks = || process::cpu_ticks(before[0]);
    let idle = ticks();
    client.send(r#"{"in":"block","params":60}"#);
    wait_for("it to be blocked", PATIENCE, || {
        ticks() > idle.map(|it| it + 2)
    });
    let reload = daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    let begin = Instant::now();
    wait_for("the end of the blocked one", PATIENCE, || {
        !process::runs(before[0])
    });
    let took = begin.elapsed();
    assert_within(
        "gone after a heartbeat-timeout of 1 s",
        took,
        Duration::from_secs(2),
    );
    wait_for("its record", PATIENCE, || {
        last_death(&daemon)["signal"] == "SIGABRT"
    });
}

#[test]
fn no_new_connection_waits_a_second_for_a_stopped_worker_and_its_record_says_that_it_was_stopped() {
    const CONNECTIONS: u32 = 200;
    let _turn = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nheartbeat-timeout = \"10s\"\n")
        .expect_log("event loop stuck")
        .start();
    let before = daemon.ready_workers();
    let begin = Instant::now();
    kill(Pid::from_raw(before[0]), Signal::SIGSTOP).unwrap();
    let mut waits: Vec<Duration> = (0..CONNECTIONS)
        .map(|_| {
            let begin = Instant::now();
            let mut client = daemon.client();
            assert_eq!(
                client.call_text(r#"{"in":"ping"}"#),
                r#"{"out":"pong","result":null}"#
            );
            begin.elapsed()
        })
        .collect();
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "all while it is stopped"
    );
    waits.sort_unstable();
    let longest = waits[waits.len() - 1];
    println!(
        "{CONNECTIONS} connections beside a stopped worker: median {:?}, longest {longest:?}",
        waits[100]
    );
    assert_within(
        "the longest wait beside a stopped worker, a tick of the other",
        longest,
        Duration::from_secs(1),
    );
    wait_successor(&daemon, &before);
    let took = begin.elapsed();
    assert_within(
        "replaced after a heartbeat-timeout of 10 s",
        took,
        Duration::from_secs(11),
    );
    let reason = last_death(&daemon)["reason"].as_str().unwrap().to_owned();
    assert!(
        reason.contains("event loop: T stopped by a signal"),
        "{reason}"
    );
}
