//! Tests that a dead worker costs no connection: its keeper answers its running calls with `crashed`, and
//! another worker continues with the connection.
//!
//! A hundred workers are killed under each kind of load, or as many as `PREFORKD_CRASHES` says.

mod load;

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::lifecycle::worker_deaths::Weight;
use crate::support::wire::{DIALECTS, Wire, post};
use crate::support::{Client, Daemon, PATIENCE, Sweep, from_environment, pass, process, wait_for};
use load::{Load, Tally};

const METHODS: &str = "
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
";

fn daemon(workers: usize, more: &str) -> Daemon {
    Daemon::builder()
        .config(&format!(
            "[workers]\ncount = {workers}\nthreads = 2\nrespawn-max-delay = \"0s\"\n{more}{METHODS}"
        ))
        .expect_log("ended by SIGSEGV")
        .start()
}

fn crash(worker: i32) {
    kill(Pid::from_raw(worker), Signal::SIGSEGV).unwrap();
}

fn keepers(daemon: &Daemon) -> Vec<i32> {
    process::keepers(daemon.pid())
}

/// Kills one of two workers repeatedly under a load, and prints the losses.
fn kill_under_load(clients: usize, depth: u64) {
    let kills = from_environment("PREFORKD_CRASHES", 100);
    let daemon = daemon(2, "");
    // Allocations at the first status and the first clients are no growth.
    daemon.client().call(&json!({"in": "ping"}));
    let sweep = Sweep::of(&daemon);
    let before = Weight::of(daemon.pid());
    let load = Load::start(&daemon, clients, depth);
    let mut killed = 0;
    let mut victims = Vec::new();
    while killed < kills {
        let answered = Tally::get(&load.tally.ok);
        wait_for("more calls answered", PATIENCE, || {
            Tally::get(&load.tally.ok) > answered + 20 * depth
        });
        let ready = daemon.ready_workers();
        if let Some(&worker) = ready.get(killed as usize % ready.len().max(1)) {
            crash(worker);
            victims.push(worker);
            killed += 1;
        }
    }
    let tally = load.finish();
    let [ok, crashed, wrong, lost, closed] = [
        &tally.ok,
        &tally.crashed,
        &tally.wrong,
        &tally.lost,
        &tally.closed,
    ]
    .map(Tally::get);
    println!(
        "{killed} workers killed under {clients} connections with {depth} outstanding calls each: \
         {} attempts, {ok} ok, {crashed} crashed, {lost} lost, {closed} connections closed",
        Tally::get(&tally.attempts)
    );
    assert_eq!(wrong, 0, "{}", tally.first_wrong.lock().unwrap());
    assert_eq!((lost, closed), (0, 0));
    assert!(crashed <= killed * clients as u64 * depth);
    victims.sort_unstable();
    victims.dedup();
    wait_for("each death in the status", PATIENCE, || {
        daemon.status()["deaths"].as_array().unwrap().len() == victims.len().min(100)
    });
    wait_for("the dead ones' keepers gone", PATIENCE, || {
        keepers(&daemon).len() == 2 && process::zombies(daemon.pid()).is_empty()
    });
    let after = Weight::of(daemon.pid());
    println!("the master before {before:?}, after {after:?}");
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.rss_bytes < before.rss_bytes + (1 << 20));
    sweep.assert_as_many(&daemon);
}

#[test]
fn a_crash_under_load_costs_only_the_calls_that_ran() {
    kill_under_load(8, 1);
}

#[test]
fn a_crash_under_pipelines_costs_only_the_calls_that_were_taken() {
    kill_under_load(4, 16);
}

#[test]
fn what_ran_is_answered_in_its_form_and_its_connection_goes_on() {
    let daemon = daemon(1, "");
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        wire.ask(dialect, r#"{"in":"echo","params":1}"#);
        wire.answer(dialect);
        wire.ask(dialect, r#"{"in":"sleep","params":60}"#);
        let worker = daemon.wait_running(1);
        crash(worker);
        let answer: Value = serde_json::from_str(&wire.answer(dialect).unwrap()).unwrap();
        assert_eq!(answer["out"], "error", "{dialect:?}: {answer}");
        assert_eq!(answer["result"]["code"], -32003, "{answer}");
        assert_eq!(answer["result"]["started"], true, "{answer}");
        wire.ask(dialect, r#"{"in":"echo","params":2}"#);
        let answer: Value = serde_json::from_str(&wire.answer(dialect).unwrap()).unwrap();
        assert_eq!(answer["result"], 2, "{dialect:?}: {answer}");

        let call = r#"{"jsonrpc":"2.0","method":"sleep","params":[60],"id":"a-b-c"}"#;
        wire.ask(dialect, call);
        let answer: Value = serde_json::from_str(&wire.answer(dialect).unwrap()).unwrap();
        assert_eq!(answer["error"]["code"], -32602, "sleep takes a number");
        let call = r#"{"jsonrpc":"2.0","method":"rpc.discover","id":1}"#;
        wire.ask(dialect, call);
        assert!(wire.answer(dialect).unwrap().contains("openrpc"));
    }
}

#[test]
fn what_had_not_begun_says_so_and_answers_keep_their_order() {
    let daemon = daemon(1, "");
    let mut client = daemon.client();
    // Two threads: the third and the fourth call wait; the fifth is done and waits for its turn.
    for seconds in [60, 61, 62, 63] {
        client.send(&json!({"in": "sleep", "params": seconds}).to_string());
    }
    client.send(&json!({"in": "ping", "params": "done"}).to_string());
    client.send(&json!({"in": "sleep", "params": 64, "id": "with one"}).to_string());
    let worker = daemon.wait_running(2);
    wait_for("all of them taken", PATIENCE, || {
        daemon.workers().iter().any(|worker| worker.queued == 3)
    });
    crash(worker);
    let mut with_id = 0;
    let mut started = Vec::new();
    for _ in 0..6 {
        let answer = client.recv_json();
        assert_eq!(answer["result"]["name"], "crashed", "{answer}");
        let begun = answer["result"]["started"].as_bool().unwrap();
        if answer["id"] == "with one" {
            with_id += 1;
            assert!(!begun, "{answer}");
        } else {
            started.push(begun);
        }
    }
    assert_eq!(with_id, 1);
    // A thread that got one of the first two calls may not have woken yet.
    assert_eq!(started[2..], [false, false, true], "{started:?}");
    assert!(started[..2].contains(&true), "{started:?}");
    assert_eq!(
        client.call(&json!({"in": "ping", "params": 7}))["result"],
        7
    );
}

#[test]
fn idle_connections_live_on_and_a_half_sent_frame_is_reset() {
    let daemon = daemon(2, "");
    let mut idle: Vec<Client> = (0..200).map(|_| daemon.client()).collect();
    for client in &mut idle {
        client.call(&json!({"in": "ping"}));
    }
    let mut fresh: Vec<Client> = (0..20).map(|_| daemon.client()).collect();
    let mut half = daemon.client();
    half.send_raw(b"\x20\0\0\0{\"in\"");
    wait_for("all accepted", PATIENCE, || {
        let workers = daemon.workers();
        workers.iter().map(|it| it.connections).sum::<u64>() == 221
    });
    for worker in daemon.ready_workers() {
        crash(worker);
    }
    half.assert_closed();
    for (number, client) in idle.iter_mut().chain(&mut fresh).enumerate() {
        let answer = client.call(&json!({"in": "ping", "params": number}));
        assert_eq!(answer["result"], number);
    }
    daemon.wait_log("connections handed over");
}

#[test]
fn an_http_client_that_wants_its_connection_closed_gets_the_answer_first() {
    let daemon = daemon(1, "");
    let mut wire = Wire::to(&daemon);
    let request = post("/sleep", "60").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    wire.send(request);
    crash(daemon.wait_running(1));
    let response = wire.response();
    assert_eq!(response.status, 500);
    assert!(response.closes(), "{response:?}");
    assert_eq!(response.json()["name"], "crashed");
    assert_eq!(wire.rest(), b"");
}

#[test]
fn a_client_that_has_half_closed_is_answered_and_closed() {
    let daemon = daemon(1, "");
    let mut client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 60}).to_string());
    client.half_close();
    crash(daemon.wait_running(1));
    assert_eq!(client.recv_json()["result"]["name"], "crashed");
    client.assert_closed();
}

#[test]
fn a_batch_that_ran_resets_its_connection_and_no_other() {
    let daemon = daemon(1, "");
    let (mut batch, mut other) = (daemon.client(), daemon.client());
    other.call(&json!({"in": "ping"}));
    let call = json!({"jsonrpc": "2.0", "method": "echo", "params": [1], "id": 1});
    batch.send(&json!([call]).to_string());
    assert_eq!(batch.recv_json()[0]["result"], json!([1]));
    batch.send(&json!({"in": "sleep", "params": 60}).to_string());
    crash(daemon.wait_running(1));
    assert_eq!(batch.recv_json()["result"]["name"], "crashed");
    other.call(&json!({"in": "ping"}));
}

/// Every way in which a connection ends, although a keeper has the same descriptors: a client that waits
/// for the end must see it.
#[test]
fn a_connection_that_ends_has_ended_for_its_client() {
    let config = "[limits]\nidle-timeout = \"1s\"\nread-timeout = \"1s\"\nframe = \"64KiB\"\n";
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 2\n{config}{METHODS}"))
        .start();
    let before = wait_for_descriptors(&daemon, None);
    // An idle one, and one in the middle of a frame.
    let (mut idle, mut slow) = (daemon.client(), daemon.client());
    idle.call(&json!({"in": "ping"}));
    slow.call(&json!({"in": "ping"}));
    slow.send_raw(b"\x20\0\0\0{");
    idle.assert_closed();
    slow.assert_closed();
    // Half-closed by the client.
    let mut half = daemon.client();
    half.call(&json!({"in": "ping"}));
    half.half_close();
    half.assert_closed();
    // Closed because of an error.
    let mut large = daemon.client();
    large.call(&json!({"in": "ping"}));
    large.send_raw(b"\0\0\x10\0");
    assert_eq!(large.recv_json()["result"]["name"], "too-large");
    large.assert_closed();
    // Requested in HTTP.
    let mut wire = Wire::to(&daemon);
    wire.send(post("/ping", "1"));
    wire.response();
    wire.send(post("/ping", "2").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"));
    assert!(wire.response().closes());
    assert_eq!(wire.rest(), b"");
    // Reset by the client.
    let mut gone = daemon.client();
    gone.call(&json!({"in": "ping"}));
    gone.reset();
    let after = wait_for_descriptors(&daemon, Some(&before));
    assert_eq!(after, before);
}

/// Returns the descriptors of each keeper, once their number is as expected.
fn wait_for_descriptors(daemon: &Daemon, expected: Option<&Vec<usize>>) -> Vec<usize> {
    let mut seen = Vec::new();
    wait_for("the workers at rest", PATIENCE, || {
        let all_ready = daemon.workers().iter().all(|it| it.state == "ready");
        seen = keepers(daemon)
            .into_iter()
            .map(process::descriptors_at_rest)
            .collect();
        all_ready && seen.len() == 2 && expected.is_none_or(|expected| *expected == seen)
    });
    seen
}

#[test]
fn a_worker_that_leaves_in_order_ends_its_connections_and_its_keeper() {
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n{METHODS}"))
        .expect_log("exited without an order")
        .start();
    let mut clients: Vec<Client> = (0..50).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
    }
    let worker = daemon.ready_workers()[0];
    let keeper = process::wait_for_keepers(daemon.pid(), 1)[0];
    kill(Pid::from_raw(worker), Signal::SIGQUIT).unwrap();
    for client in &mut clients {
        client.assert_closed();
    }
    wait_for("its keeper gone", PATIENCE, || !process::runs(keeper));
    daemon.wait_log("kept=0 crashed=0 reset=50");
}

#[test]
fn a_stop_ends_every_connection_and_leaves_no_keeper() {
    for now in [false, true] {
        let mut daemon = Daemon::builder()
            .config(&format!("[workers]\ncount = 2\n{METHODS}"))
            .start();
        let mut clients: Vec<Client> = (0..50).map(|_| daemon.client()).collect();
        for client in &mut clients {
            client.call(&json!({"in": "ping"}));
        }
        wait_for("the keepers' titles", PATIENCE, || {
            let titles = keepers(&daemon).into_iter().map(process::title);
            let mut titles: Vec<String> = titles.collect();
            titles.sort();
            titles == ["preforkd: keeper 0", "preforkd: keeper 1"]
        });
        daemon.signal(if now {
            Signal::SIGQUIT
        } else {
            Signal::SIGTERM
        });
        for client in &mut clients {
            client.assert_closed();
        }
        assert!(daemon.wait_exit().success());
        assert!(daemon.processes().is_empty(), "left with it");
        // The port is free at once.
        std::net::TcpListener::bind(daemon.address()).unwrap();
    }
}

#[test]
fn keepers_end_with_a_killed_master_and_clients_see_the_end() {
    let mut daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 2\ndrain-timeout = \"3s\"\n{METHODS}"
        ))
        .expect_log("the master has died")
        .start();
    let mut clients: Vec<Client> = (0..20).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
    }
    let keepers = process::wait_for_keepers(daemon.pid(), 2);
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    for client in &mut clients {
        client.assert_closed();
    }
    daemon.wait_group_gone();
    assert!(keepers.into_iter().all(|pid| !process::runs(pid)));
}

#[test]
fn a_worker_without_its_keeper_serves_on_and_is_replaced_by_one_that_has_one() {
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 2\n{METHODS}"))
        .start();
    let load = Load::start(&daemon, 4, 1);
    for round in 0..4 {
        let before = daemon.ready_workers();
        let keeper = process::wait_for_keepers(daemon.pid(), 2)[round % 2];
        kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
        wait_for("two workers with keepers", PATIENCE, || {
            let ready = daemon.ready_workers();
            ready != before && ready.len() == 2 && keepers(&daemon).len() == 2
        });
    }
    let tally = load.finish();
    let [crashed, wrong, lost] = [&tally.crashed, &tally.wrong, &tally.lost].map(Tally::get);
    assert_eq!(
        (crashed, wrong, lost, Tally::get(&tally.closed)),
        (0, 0, 0, 0)
    );
}

#[test]
fn without_keepers_a_crash_ends_the_connections_of_its_worker() {
    let daemon = daemon(1, "keep-connections = false\n");
    assert!(keepers(&daemon).is_empty());
    let mut client = daemon.client();
    client.call(&json!({"in": "ping"}));
    crash(daemon.ready_workers()[0]);
    client.assert_closed();
}

#[test]
fn a_kept_connection_moves_on_through_reloads_and_further_crashes() {
    let daemon = daemon(2, "");
    let mut clients: Vec<Client> = (0..30).map(|_| daemon.client()).collect();
    for round in 0..10_u32 {
        for client in &mut clients {
            let answer = client.call(&json!({"in": "echo", "params": round}));
            assert_eq!(answer["result"], round);
        }
        if round % 2 == 0 {
            daemon.ready_workers().into_iter().for_each(crash);
        } else {
            assert!(daemon.command(&["reload"]).status.success());
        }
    }
    // No connection is handed over twice.
    pass(Duration::from_millis(50));
    wait_for("each connection in one place", PATIENCE, || {
        let workers = daemon.workers();
        workers.iter().map(|it| it.connections).sum::<u64>() == 30
    });
}

#[test]
fn a_keeper_that_stands_still_is_ended_and_its_clients_wait_for_nothing() {
    let config = format!("[workers]\ncount = 1\nheartbeat-timeout = \"2s\"\n{METHODS}");
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("ended by SIGSEGV")
        .expect_log("does not respond")
        .start();
    let mut client = daemon.client();
    client.call(&json!({"in": "ping"}));
    for keeper in process::wait_for_keepers(daemon.pid(), 1) {
        kill(Pid::from_raw(keeper), Signal::SIGSTOP).unwrap();
    }
    client.send(r#"{"in": "sleep", "params": 5}"#);
    crash(daemon.wait_running(1));
    client.assert_closed();
    daemon.wait_log("does not respond: it gets SIGKILL");
    wait_for("a keeper for the new worker alone", PATIENCE, || {
        keepers(&daemon).len() == 1 && process::zombies(daemon.pid()).is_empty()
    });
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
}

/// A service manager may send SIGTERM to all processes.
#[test]
fn a_keeper_that_gets_term_hands_the_connections_over_all_the_same() {
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n{METHODS}"))
        .expect_log("ended by SIGKILL")
        .start();
    let worker = daemon.ready_workers()[0];
    let keeper = process::wait_for_keepers(daemon.pid(), 1)[0];
    let mut client = daemon.client();
    client.call(&json!({"in": "ping"}));
    for (pid, signal) in [(keeper, Signal::SIGTERM), (worker, Signal::SIGKILL)] {
        kill(Pid::from_raw(pid), signal).unwrap();
    }
    daemon.wait_log(&format!(
        "worker {worker} crashed: 1 connection handed over"
    ));
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}
