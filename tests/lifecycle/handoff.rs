//! Tests handoffs of live connections between workers: no client notices a reload, a retirement or a
//! scale-down.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::client::frame;
use crate::support::wire::{Dialect, Wire, post};
use crate::support::{
    Client, Daemon, PATIENCE, alone, assert_within, pass, process, raise_descriptor_limit, wait_for,
};

const CONFIG: &str = "
[workers]
count = 2
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
";

/// Clients that keep `depth` calls in flight over one lasting connection each, and check each answer by
/// its id.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(address: SocketAddr, clients: usize, depth: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let clients = (0..clients)
            .map(|_| {
                let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
                thread::spawn(move || {
                    let mut client = Client::connect(address);
                    let mut next = 0;
                    while !stop.load(Ordering::Relaxed) {
                        run_batch(&mut client, next, depth);
                        next += depth;
                        answered.fetch_add(depth, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Load {
            stop,
            answered,
            clients,
        }
    }

    /// Waits until `more` further calls are answered.
    fn wait_for(&self, more: u64) {
        let target = self.answered.load(Ordering::Relaxed) + more;
        wait_for("calls answered", PATIENCE, || {
            // A client that lost a call has panicked, so waiting would be useless.
            assert!(self.clients.iter().all(|client| !client.is_finished()));
            self.answered.load(Ordering::Relaxed) >= target
        });
    }

    /// Stops it. A client that was closed or got a wrong answer fails the test here.
    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("no client loses a call");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

/// Sends calls with these ids ahead, every fifth of them for a handler thread.
fn run_batch(client: &mut Client, first: u64, depth: u64) {
    for id in first..first + depth {
        let method = if id % 5 == 0 { "sleep" } else { "echo" };
        client.send(&json!({"in": method, "params": 0.001, "id": id}).to_string());
    }
    let mut ids: Vec<u64> = (0..depth)
        .map(|_| {
            let answer = client.recv_json();
            assert_eq!(answer["result"], 0.001, "{answer}");
            answer["id"].as_u64().unwrap()
        })
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (first..first + depth).collect::<Vec<_>>());
}
fn wait_until_only_the_new_ones_are_left(daemon: &Daemon) {
    wait_for("the old workers gone", PATIENCE, || {
        let workers = daemon.workers();
        workers.iter().all(|worker| worker.state == "ready")
    });
}

#[test]
fn idle_connections_cross_a_reload_and_the_old_workers_leave_at_once() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut clients: Vec<Client> = (0..300).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
    }
    daemon.reload();
    // This is much earlier than the drain-timeout of 30 s, because nothing is left to wait for.
    wait_until_only_the_new_ones_are_left(&daemon);
    let workers = daemon.workers();
    assert!(
        workers.iter().all(|worker| worker.generation == 2),
        "{workers:?}"
    );
    wait_for("every connection taken up", PATIENCE, || {
        let held: u64 = daemon
            .workers()
            .iter()
            .map(|worker| worker.connections)
            .sum();
        held == 300
    });
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(
            client.call(&json!({"in": "ping", "params": number}))["result"],
            number
        );
    }
}

#[test]
fn a_half_sent_frame_crosses_whatever_its_size() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut halves: Vec<(Client, Vec<u8>, usize)> = [10, 50_000, 100_000, 8_000_000]
        .into_iter()
        .map(|length| {
            let params = "x".repeat(length);
            let body = json!({"in": "echo", "params": params}).to_string();
            let frame = frame(body.as_bytes());
            let mut client = daemon.client();
            client.send_raw(&frame[..frame.len() / 2]);
            (client, frame, length)
        })
        .collect();
    for _ in 0..3 {
        daemon.reload();
        wait_until_only_the_new_ones_are_left(&daemon);
    }
    for (client, frame, length) in &mut halves {
        client.send_raw(&frame[frame.len() / 2..]);
        let answer = client.recv_json();
        assert_eq!(answer["result"].as_str().map(str::len), Some(*length));
    }
}

/// Returns calls of each dialect, to be cut in two: what they are, their bytes and the dialect.
fn halves() -> Vec<(&'static str, String, Dialect)> {
    let text = "x".repeat(3000);
    let line = format!("{{\"in\":\"echo\",\"params\":\"{text}\"}}\n");
    let whole = post("/echo", &format!("\"{text}\""));
    let chunked = format!(
        "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n\"{text}\"\r\n\
         0\r\n\r\n",
        text.len() + 2
    );
    vec![
        ("a line", line, Dialect::Line),
        ("an HTTP body", whole.clone(), Dialect::Http),
        ("a chunk", chunked, Dialect::Http),
        ("an HTTP head", whole, Dialect::Http),
    ]
}

#[test]
fn a_half_sent_call_of_each_dialect_crosses_and_so_does_a_connection_that_has_said_nearly_nothing()
{
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut cut: Vec<_> = halves()
        .into_iter()
        .map(|(what, call, dialect)| {
            let at = if what == "an HTTP head" {
                20
            } else {
                call.len() / 2
            };
            let (first, second) = call.split_at(at);
            let mut wire = Wire::to(&daemon);
            // A complete call first: the connection has its dialect, and a call boundary behind it.
            wire.send(&call)
                .answer(dialect)
                .expect("a whole call is answered");
            wire.send(first);
            (what, wire, second.to_owned(), dialect)
        })
        .collect();
    // Fewer than four bytes do not give the dialect.
    let mut short = Wire::to(&daemon);
    short.send("{\"i");
    let mut silent = Wire::to(&daemon);
    wait_for("all of them accepted", PATIENCE, || {
        daemon
            .workers()
            .iter()
            .map(|it| it.connections)
            .sum::<u64>()
            == 6
    });
    for _ in 0..3 {
        daemon.reload();
        wait_until_only_the_new_ones_are_left(&daemon);
    }
    for (what, wire, rest, dialect) in &mut cut {
        let answer = wire.send(&rest).answer(*dialect);
        let answer = answer.unwrap_or_else(|| panic!("{what} is not answered"));
        assert!(answer.contains("xxx"), "{what}: {answer}");
    }
    short.send("n\": \"ping\"}\n");
    assert!(short.line().contains("pong"));
    silent.send(post("/ping", "7"));
    assert_eq!(silent.response().body, "7");
}

#[test]
fn a_half_sent_frame_has_read_timeout_and_an_idle_connection_its_idle_time_across_workers() {
    let config = format!("{CONFIG}[limits]\nread-timeout = \"3s\"\nidle-timeout = \"4s\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let mut half = daemon.client();
    half.send_raw(&frame(b"{\"in\": \"ping\"}")[..7]);
    let mut idle = daemon.client();
    idle.call(&json!({"in": "ping"}));
    let begin = Instant::now();
    // If its time started again, each reload would give an idle connection another four seconds.
    for seconds in [1, 2, 3] {
        wait_for("another second", PATIENCE, || {
            begin.elapsed().as_secs() >= seconds
        });
        daemon.reload();
    }
    idle.assert_closed();
    let closed_after = begin.elapsed();
    half.assert_closed();
    let cut_after = begin.elapsed();
    println!("idle: closed after {closed_after:?}; half a frame: cut after {cut_after:?}");
    assert!(closed_after.as_secs_f64() < 6.0, "{closed_after:?}");
}

#[test]
fn a_running_call_is_answered_where_it_runs_and_the_next_one_elsewhere() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 1}).to_string());
    daemon.wait_running(1);
    daemon.reload();
    assert_eq!(client.recv_json()["result"], 1);
    wait_until_only_the_new_ones_are_left(&daemon);
    assert_eq!(
        client.call(&json!({"in": "ping", "params": 2}))["result"],
        2
    );
}

#[test]
fn a_client_that_has_half_closed_gets_all_its_answers_across_a_reload() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 0.5}).to_string());
    for number in 0..50 {
        client.send(&json!({"in": "echo", "params": number}).to_string());
    }
    client.half_close();
    daemon.reload();
    assert_eq!(client.recv_json()["result"], 0.5);
    for number in 0..50 {
        assert_eq!(client.recv_json()["result"], number);
    }
    client.assert_closed();
}

#[test]
fn nothing_is_lost_on_lasting_pipelined_connections_over_twenty_reloads() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let load = Load::start(daemon.address(), 4, 16);
    for _ in 0..20 {
        load.wait_for(200);
        daemon.reload();
    }
    println!("{} calls over 20 reloads, 0 lost", load.finish());
    assert!(deaths(&daemon).is_empty());
}

/// A connection that always has calls in flight never becomes quiescent by itself. One of its calls is
/// long for a time, and must not delay the others.
#[test]
fn a_connection_that_never_rests_is_handed_over_in_a_moment() {
    const DEPTH: u64 = 16;
    let _alone = alone();
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let send = |client: &mut Client, id: u64, seconds: f64| {
        client.send(&json!({"in": "sleep", "params": seconds, "id": id}).to_string());
    };
    (1..=DEPTH).for_each(|id| send(&mut client, id, 0.01));
    let mut next = DEPTH;
    let mut one_more = |client: &mut Client| {
        let id = client.recv_json()["id"].as_u64().unwrap();
        next += 1;
        send(client, next, 0.01);
        id
    };
    for _ in 0..100 {
        one_more(&mut client);
    }
    // The long call is in flight when the reload begins, and each short one overtakes it.
    send(&mut client, 0, 5.0);
    let old = daemon.ready_workers();
    for _ in 0..30 {
        assert_ne!(one_more(&mut client), 0);
    }
    daemon.reload();
    let mut before = 0;
    while one_more(&mut client) != 0 {
        before += 1;
    }
    let begin = Instant::now();
    while old.iter().any(|&pid| process::runs(pid)) {
        one_more(&mut client);
        assert!(begin.elapsed() < PATIENCE, "it is held on to");
    }
    let took = begin.elapsed();
    println!(
        "{before} calls overtook a long one in the drain; the old workers left {took:?} later"
    );
    assert!(before > 20, "{before}");
    // drain-timeout is 30 s.
    assert!(took < Duration::from_secs(5), "{took:?}");
    for _ in 0..=DEPTH {
        client.recv_json();
    }
}

/// Calls that are read from a connection that is to become quiescent run concurrently, as usual.
#[test]
fn a_burst_in_a_drain_is_not_worked_off_one_by_one() {
    const CALLS: u64 = 500;
    const AHEAD: u64 = 20;
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(&CONFIG.replace("count = 2", "count = 2\nthreads = 10"))
        .start();
    let call = |id: u64| json!({"in": "sleep", "params": 0.02, "id": id});
    for _ in 0..3 {
        let mut client = daemon.client();
        client.call(&call(0));
        let holder = || {
            let workers = daemon.workers();
            Some(workers.iter().find(|it| it.connections == 1)?.pid)
        };
        wait_for("its worker", PATIENCE, || holder().is_some());
        let worker = holder().unwrap();
        // Recent calls are always in flight; then the order to drain arrives, and the burst.
        client.send_together((1..=AHEAD).map(call));
        for id in 0..50 {
            client.recv_json();
            client.send(&call(id).to_string());
        }
        kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
        let begin = Instant::now();
        client.send_together((1..=CALLS).map(call));
        for _ in 0..CALLS + AHEAD {
            assert_eq!(client.recv_json()["out"], "sleep");
        }
        // If the calls ran one after the other, they would take 10 s.
        assert_within(
            "500 calls of 20 ms",
            begin.elapsed(),
            Duration::from_secs(2),
        );
        drop(client);
        wait_for("the drained one gone", PATIENCE, || !process::runs(worker));
        wait_for("no connection", PATIENCE, || {
            let workers = daemon.workers();
            workers.len() == 2
                && workers
                    .iter()
                    .all(|it| it.connections == 0 && it.state == "ready")
        });
    }
}

#[test]
fn nothing_is_lost_when_workers_retire_and_when_their_number_changes() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let load = Load::start(daemon.address(), 4, 16);
    for round in 0..12 {
        load.wait_for(200);
        match round % 4 {
            0 => drop(daemon.command(&["scale", "4"])),
            1 => daemon.signal(Signal::SIGTTOU),
            2 => drop(daemon.command(&["scale", "1"])),
            _ => {
                let worker = daemon.ready_workers()[0];
                kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
            }
        }
    }
    println!("{} calls over 12 changes, 0 lost", load.finish());
}

fn deaths(daemon: &Daemon) -> Vec<Value> {
    let output = daemon.command(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["deaths"].as_array().unwrap().clone()
}

/// A worker that is exiting and cannot hand all connections over, because its only sibling is stopped.
struct Held {
    daemon: Daemon,
    clients: Vec<Client>,
    stopped: i32,
    leaving: i32,
}

impl Held {
    fn start(config: &str) -> Self {
        // More than fit into the queue.
        const CLIENTS: usize = 600;
        raise_descriptor_limit();
        let config = format!("[workers]\ncount = 2\nheartbeat-timeout = \"60s\"\n{config}");
        let daemon = Daemon::builder().config(&config).start();
        let workers = daemon.ready_workers();
        kill(Pid::from_raw(workers[0]), Signal::SIGSTOP).unwrap();
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| daemon.client()).collect();
        for client in &mut clients {
            client.call(&json!({"in": "ping"}));
        }
        assert!(daemon.command(&["scale", "1"]).status.success());
        wait_for("some handed over, others waiting", PATIENCE, || {
            let workers = daemon.workers();
            let leaving = workers.iter().find(|it| it.state == "draining");
            leaving.is_some_and(|it| (1..CLIENTS as u64).contains(&it.connections))
        });
        Held {
            daemon,
            clients,
            stopped: workers[0],
            leaving: workers[1],
        }
    }

    fn signal(&self, signal: Signal, pids: &[i32]) {
        for pid in pids {
            kill(Pid::from_raw(*pid), signal).unwrap();
        }
    }

    fn assert_all_live(mut self) {
        for client in &mut self.clients {
            assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
        }
        wait_until_only_the_new_ones_are_left(&self.daemon);
        assert_eq!(self.daemon.ready_workers(), [self.stopped]);
    }
}

#[test]
fn a_server_that_was_paused_beyond_a_drain_hands_over_what_is_left() {
    let _alone = alone();
    let held = Held::start("drain-timeout = \"4s\"\n");
    let (master, leaving) = (held.daemon.pid(), held.leaving);
    held.signal(Signal::SIGSTOP, &[master, leaving]);
    pass(Duration::from_secs(6));
    held.signal(Signal::SIGCONT, &[held.stopped, leaving, master]);
    held.assert_all_live();
}

#[test]
fn who_calls_while_it_waits_to_be_handed_over_is_not_idle() {
    let _alone = alone();
    let mut held = Held::start("[limits]\nidle-timeout = \"6s\"\n");
    for client in &mut held.clients {
        client.send(r#"{"in": "ping"}"#);
    }
    pass(Duration::from_secs(8));
    held.signal(Signal::SIGCONT, &[held.stopped]);
    for client in &mut held.clients {
        assert_eq!(client.recv_json()["out"], "pong");
    }
    held.assert_all_live();
}
