//! Tests calls that one worker sends to another: no call waits while a thread or a program is idle.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{
    Client, Daemon, PATIENCE, alone, assert_within, from_environment, pass, source, wait_for,
};

/// One thread for each of two workers, so that a second call of a worker must go to the other one.
const TWO: &str = "
[workers]
count = 2
threads = 1
respawn-max-delay = \"0s\"
[methods.sleep]
builtin = \"sleep\"
[methods.few]
builtin = \"sleep\"
concurrency = 5
";

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Returns a member of a worker's status, by pid.
fn member(daemon: &Daemon, name: &str, pid: i32) -> Value {
    let status = daemon.status();
    let workers = status["workers"].as_array().unwrap().iter();
    let found = workers.filter(|worker| worker["pid"] == pid);
    found
        .map(|worker| worker[name].clone())
        .next()
        .unwrap_or_default()
}

/// Starts two workers; the first one has all `count` connections.
fn one_sided(builder: crate::support::Builder, count: usize) -> (Daemon, [i32; 2], Vec<Client>) {
    let daemon = builder.config(TWO).start();
    let workers = daemon.ready_workers();
    let [home, other] = workers[..] else {
        panic!("{workers:?}")
    };
    signal(other, Signal::SIGSTOP);
    let mut clients: Vec<Client> = (0..count).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
    }
    signal(other, Signal::SIGCONT);
    (daemon, [home, other], clients)
}

/// Sends a call on each connection. The first runs at home, the second in the other worker.
fn send_two(daemon: &Daemon, workers: [i32; 2], clients: &mut [Client], seconds: f64) {
    for (client, count) in clients.iter_mut().zip([("running", 1), ("sent", 1)]) {
        client.send(&json!({"in": "sleep", "params": seconds, "id": 1}).to_string());
        wait_for("the call to run", PATIENCE, || {
            member(daemon, count.0, workers[0]) == count.1
        });
    }
    wait_for("the other worker to run it", PATIENCE, || {
        member(daemon, "running_for_others", workers[1]) == 1
    });
}

fn assert_error(answer: &Value, name: &str, started: bool) {
    let error = &answer["result"];
    assert_eq!(
        (&error["name"], &error["started"]),
        (&json!(name), &json!(started)),
        "{answer}"
    );
}

#[test]
fn no_call_waits_while_a_thread_or_a_program_of_any_worker_is_idle() {
    let _alone = alone();
    let program = source().join("benches/capacity/sleep.py");
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 4\nthreads = 2\n[methods.thread]\nbuiltin = \"sleep\"\n\
             [pools.p]\ncommand = [\"python3\", {program:?}]\nprocesses = 8\n\
             [methods.pool]\npool = \"p\"\n"
        ))
        .start();
    for method in ["thread", "pool"] {
        for round in 0..3 {
            let mut clients: Vec<Client> = (0..8).map(|_| daemon.client()).collect();
            let begin = Instant::now();
            for client in &mut clients {
                client.send(&json!({"in": method, "params": 0.5}).to_string());
            }
            for client in &mut clients {
                assert_eq!(client.recv_json()["result"], 0.5);
            }
            let what = format!("8 calls of 0.5 s on 8 of {method}, round {round}");
            assert_within(&what, begin.elapsed(), Duration::from_millis(700));
        }
        // One client that sends ahead also uses all of them.
        let mut client = daemon.client();
        let begin = Instant::now();
        client.send_together((0..16).map(|id| json!({"in": method, "params": 0.3, "id": id})));
        (0..16).for_each(|_| drop(client.recv()));
        let what = format!("16 calls of 0.3 s ahead, {method}");
        assert_within(&what, begin.elapsed(), Duration::from_millis(850));
    }
}

/// The method was short before, so its calls are sent ahead.
#[test]
fn short_calls_do_not_wait_behind_a_long_one() {
    let _alone = alone();
    let (_daemon, _, mut clients) = one_sided(Daemon::builder(), 12);
    for client in &mut clients {
        for _ in 0..5 {
            client.call(&json!({"in": "sleep", "params": 0}));
        }
    }
    let begin = Instant::now();
    let (long, short) = clients.split_first_mut().unwrap();
    long.send(r#"{"in": "sleep", "params": 5}"#);
    pass(Duration::from_millis(100));
    for _ in 0..5 {
        for client in &mut *short {
            client.send(r#"{"in": "sleep", "params": 0}"#);
        }
        for client in &mut *short {
            assert_eq!(client.recv_json()["result"], 0);
        }
    }
    assert_within("55 short calls", begin.elapsed(), Duration::from_secs(2));
    assert_eq!(long.recv_json()["result"], 5);
}

#[test]
fn a_method_with_a_concurrency_runs_at_home() {
    let (daemon, workers, mut clients) = one_sided(Daemon::builder(), 2);
    for client in &mut clients {
        client.send(&json!({"in": "few", "params": 0.3}).to_string());
    }
    wait_for("the second one to wait", PATIENCE, || {
        member(&daemon, "queued", workers[0]) == 1
    });
    assert_eq!(member(&daemon, "sent", workers[0]), 0);
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], 0.3);
    }
}

#[test]
fn the_death_of_a_runner_costs_the_call_that_it_ran() {
    let (daemon, workers, mut clients) =
        one_sided(Daemon::builder().expect_log("ended by SIGKILL"), 3);
    send_two(&daemon, workers, &mut clients, 1.5);
    // It waits in its home worker.
    clients[2].send(&json!({"in": "sleep", "params": 0.1}).to_string());
    wait_for("the third one to wait", PATIENCE, || {
        member(&daemon, "queued", workers[0]) == 1
    });
    signal(workers[1], Signal::SIGKILL);
    assert_error(&clients[1].recv_json(), "crashed", true);
    assert_eq!(clients[0].recv_json()["result"], 1.5);
    assert_eq!(clients[2].recv_json()["result"], 0.1);
    assert_eq!(member(&daemon, "sent", workers[0]), 0);
}

#[test]
fn the_death_of_a_home_worker_ends_its_calls_elsewhere() {
    let (daemon, workers, mut clients) =
        one_sided(Daemon::builder().expect_log("ended by SIGKILL"), 2);
    send_two(&daemon, workers, &mut clients, 60.0);
    signal(workers[0], Signal::SIGKILL);
    for client in &mut clients {
        assert_error(&client.recv_json(), "crashed", true);
        // The connection continues.
        assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    }
    wait_for("the runner to be free", PATIENCE, || {
        member(&daemon, "running_for_others", workers[1]) == 0
            && member(&daemon, "running", workers[1]) == 0
    });
}

#[test]
fn a_cancelled_call_ends_in_the_worker_that_runs_it() {
    let (daemon, workers, mut clients) = one_sided(Daemon::builder(), 2);
    send_two(&daemon, workers, &mut clients, 60.0);
    let is_free = || {
        member(&daemon, "running_for_others", workers[1]) == 0
            && member(&daemon, "running", workers[1]) == 0
    };
    clients[1].send(&json!({"in": "rpc.cancel", "params": {"id": 1}, "id": 2}).to_string());
    assert_error(&clients[1].recv_json(), "cancelled", true);
    assert_eq!(clients[1].recv_json()["result"], true);
    wait_for("the runner to be free", PATIENCE, is_free);
    // The same if the client resets its connection.
    clients[1].send(&json!({"in": "sleep", "params": 60, "id": 3}).to_string());
    wait_for("it to run", PATIENCE, || !is_free());
    clients.remove(1).reset();
    wait_for("the runner to be free again", PATIENCE, is_free);
    clients[0].send(&json!({"in": "rpc.cancel", "params": {"id": 1}}).to_string());
    assert_eq!(clients[0].recv_json()["result"]["name"], "cancelled");
}

#[test]
fn a_call_whose_runner_is_stopped_gets_its_timeout() {
    let (daemon, workers, mut clients) = one_sided(Daemon::builder(), 2);
    send_two(&daemon, workers, &mut clients, 0.2);
    assert_eq!(clients[0].recv_json()["result"], 0.2);
    assert_eq!(clients[1].recv_json()["result"], 0.2);
    signal(workers[1], Signal::SIGSTOP);
    let begin = Instant::now();
    clients[0].send(&json!({"in": "sleep", "params": 1.2, "id": 1}).to_string());
    wait_for("the call to run", PATIENCE, || {
        member(&daemon, "running", workers[0]) == 1
    });
    clients[1].send(&json!({"in": "sleep", "params": 0.1, "id": 1, "timeout_ms": 700}).to_string());
    assert_error(&clients[1].recv_json(), "timeout", true);
    assert!(begin.elapsed() >= Duration::from_millis(600));
    signal(workers[1], Signal::SIGCONT);
    assert_eq!(clients[0].recv_json()["result"], 1.2);
    wait_for("the runner to be free", PATIENCE, || {
        member(&daemon, "running_for_others", workers[1]) == 0
    });
    assert_eq!(
        clients[1].call(&json!({"in": "sleep", "params": 0.0}))["result"],
        0.0
    );
}

#[test]
fn a_reload_waits_for_calls_that_run_elsewhere() {
    let (daemon, workers, mut clients) = one_sided(Daemon::builder(), 2);
    send_two(&daemon, workers, &mut clients, 1.0);
    assert!(daemon.command(&["reload"]).status.success());
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], 1.0);
        assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
    }
}

/// Workers are killed under load, one after the other: each call is answered once, and an answer says if
/// the call had begun. A connection may end only with its worker.
#[test]
fn kills_under_load_lose_no_call() {
    let _alone = alone();
    let kills = from_environment("PREFORKD_KILLS", 12);
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 3\nthreads = 1\nrespawn-max-delay = \"0s\"\n\
             respawn-burst = 1000\n[methods.sleep]\nbuiltin = \"sleep\"\n",
        )
        .expect_log("ended by SIGKILL")
        .start();
    let (stop, failures) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let (done, crashed, closed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 0..9 {
            let (daemon, stop, failures) = (&daemon, &stop, &failures);
            let (done, crashed, closed) = (&done, &crashed, &closed);
            scope.spawn(move || {
                let mut client = daemon.client();
                let mut id: u64 = number * 1_000_000;
                while !stop.load(Relaxed) {
                    id += 1;
                    let call = json!({"in": "sleep", "params": 0.01, "id": id});
                    let answer = client
                        .try_send(&call.to_string())
                        .and_then(|()| client.recv());
                    let Ok(answer) = answer else {
                        closed.fetch_add(1, Relaxed);
                        client = daemon.client();
                        continue;
                    };
                    let answer: Value = serde_json::from_slice(&answer).unwrap();
                    let is_own = answer["id"] == id;
                    match answer["result"]["name"].as_str() {
                        None if is_own && answer["result"] == 0.01 => done.fetch_add(1, Relaxed),
                        Some("crashed") if is_own => crashed.fetch_add(1, Relaxed),
                        _ => {
                            failures.lock().unwrap().push(answer.to_string());
                            0
                        }
                    };
                }
            });
        }
        for kill in 0..kills {
            pass(Duration::from_millis(150));
            wait_for("all workers", PATIENCE, || {
                daemon.ready_workers().len() == 3
            });
            let workers = daemon.ready_workers();
            signal(workers[kill as usize % 3], Signal::SIGKILL);
        }
        pass(Duration::from_millis(200));
        stop.store(true, Relaxed);
    });
    let count = |number: &AtomicU64| number.load(Relaxed);
    println!(
        "{kills} kills: {} calls done, {} crashed, {} connections closed",
        count(&done),
        count(&crashed),
        count(&closed)
    );
    assert_eq!(failures.into_inner().unwrap(), Vec::<String>::new());
    assert!(count(&done) > 100);
    // At most one for each client: calls that run elsewhere, and those that wait in the worker.
    assert!(count(&crashed) <= 9 * kills);
    // A worker can die while it receives or sends. Then its connection is reset, because the state of the
    // stream is unknown.
    assert!(count(&closed) <= kills);
}
