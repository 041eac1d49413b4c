//! Tests accepting: how connections are spread, and what happens at the limit.

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{
    Client, Daemon, PATIENCE, Sweep, alone, assert_within, pass, process, raise_descriptor_limit,
    wait_for,
};

/// Returns the number of connections of each worker, while they are open.
fn shares(daemon: &Daemon) -> Vec<u64> {
    daemon.workers().iter().map(|it| it.connections).collect()
}

#[test]
fn connections_that_come_slowly_are_shared_fairly() {
    const CONNECTIONS: usize = 400;
    let _alone = alone();
    let daemon = Daemon::builder().config("[workers]\ncount = 4\n").start();
    let sweep = Sweep::of(&daemon);
    let clients: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| {
            pass(Duration::from_millis(2));
            TcpStream::connect(daemon.address()).unwrap()
        })
        .collect();
    let mut seen = Vec::new();
    wait_for("all of them to be accepted", PATIENCE, || {
        seen = shares(&daemon);
        seen.iter().sum::<u64>() == CONNECTIONS as u64
    });
    let fullest = seen.iter().copied().max().unwrap() as f64;
    let ratio = fullest * 4.0 / CONNECTIONS as f64;
    println!("{CONNECTIONS} connections 2 ms apart: {seen:?}, the fullest {ratio:.3} of the mean");
    assert!(ratio <= 1.25, "{seen:?}");
    drop(clients);
    sweep.assert_same(&daemon);
}

/// A worker accepts when it reports ready: the next client does not wait for the next tick of its clock.
#[test]
fn who_comes_right_after_a_start_or_a_reload_is_let_in_at_once() {
    let mut waits = Vec::new();
    for _ in 0..3 {
        let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
        for _ in 0..3 {
            let begin = Instant::now();
            daemon.client().call(&json!({"in": "ping"}));
            waits.push(begin.elapsed());
            assert!(daemon.command(&["reload"]).status.success());
        }
    }
    waits.sort();
    println!("first calls after a start or a reload: {waits:?}");
    assert!(waits[2] < Duration::from_millis(300), "{waits:?}");
}

#[test]
fn connections_that_come_together_are_shared_too() {
    let _alone = alone();
    for together in [1, 16, 64] {
        let daemon = Daemon::builder().config("[workers]\ncount = 4\n").start();
        let rounds = 640 / together;
        let mut calls = vec![0; 4];
        for _ in 0..rounds {
            let mut clients: Vec<Client> = (0..together).map(|_| daemon.client()).collect();
            for client in &mut clients {
                client.send(r#"{"in": "ping"}"#);
            }
            for client in &mut clients {
                client.recv().unwrap();
            }
        }
        wait_for("all calls to be counted", PATIENCE, || {
            calls = daemon.workers().iter().map(|it| it.calls).collect();
            calls.iter().sum::<u64>() == (rounds * together) as u64
        });
        let fullest = calls.iter().copied().max().unwrap() as f64;
        let ratio = fullest * 4.0 / (rounds * together) as f64;
        println!("{together} at a time: {calls:?}, the fullest {ratio:.2} of the mean");
        assert!(ratio <= 2.0, "{together} at a time: {calls:?}");
    }
}

/// The worker whose only thread is busy leaves accepting to the other one, so few calls have to be sent there.
#[test]
fn new_connections_go_to_the_worker_that_has_an_idle_thread() {
    let config = "[workers]\ncount = 2\nthreads = 1\n[methods.sleep]\nbuiltin = \"sleep\"\n";
    let daemon = Daemon::builder().config(config).start();
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 10}"#);
    let busy = daemon.wait_running(1);
    let calls_of_busy = || {
        let workers = daemon.workers();
        let found = workers.iter().find(|worker| worker.pid == busy);
        found.map(|worker| worker.calls).unwrap()
    };
    // Without the rule it takes half of them. It may, while the machine keeps the other one waiting.
    wait_for("a batch that goes to the other one", PATIENCE, || {
        let before = calls_of_busy();
        for _ in 0..64 {
            let begin = Instant::now();
            let call = json!({"in": "sleep", "params": 0});
            assert_eq!(daemon.client().call(&call)["out"], "sleep");
            assert_within("a call", begin.elapsed(), Duration::from_millis(100));
        }
        calls_of_busy() - before <= 64 / 5
    });
}

/// CPU ticks and bytes of log of all workers over three seconds.
fn cost(daemon: &Daemon) -> (u64, usize) {
    let ticks = || -> u64 {
        let pids = daemon.ready_workers();
        pids.into_iter().filter_map(process::cpu_ticks).sum()
    };
    let (ticks_before, log_before) = (ticks(), daemon.log().len());
    pass(Duration::from_secs(3));
    (ticks() - ticks_before, daemon.log().len() - log_before)
}

/// Connects more clients than can be served. Accepted ones continue, the others wait, nothing spins, and
/// waiting clients are served within a second after there is room.
fn crowd(daemon: &Daemon, at_most: usize) {
    const CLIENTS: usize = 200;
    // Each has a call, so that none is closed to make room for those that wait.
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|_| {
            let mut client = daemon.client();
            client.send(r#"{"in": "ping"}"#);
            client
        })
        .collect();
    let open = || shares(daemon).iter().sum::<u64>() as usize;
    let mut accepted = 0;
    wait_for("as many connections as can be", PATIENCE, || {
        let before = accepted;
        accepted = open();
        accepted > 0
            && accepted == before
            && (daemon.log().contains("accepting is paused")
                || daemon.log().contains("no connection can be accepted"))
    });
    assert!(accepted <= at_most, "{accepted} connections");
    // A shared queue hands them out in the order of arrival.
    let waiting = clients.split_off(accepted);
    let (ticks, log) = cost(daemon);
    for client in &mut clients {
        assert_eq!(client.recv_json()["out"], "pong");
    }
    for round in 0..10 {
        for client in &mut clients {
            assert_eq!(
                client.call(&json!({"in": "ping", "params": round}))["result"],
                round
            );
        }
    }
    println!(
        "{accepted} of {CLIENTS} accepted, all answered; in 3 s {ticks} ticks of CPU, {log} bytes \
         of log"
    );
    assert!(ticks <= 15, "{ticks} ticks: does it spin?");
    assert!(log <= 600, "{log} bytes of log in 3 s");
    let begin = Instant::now();
    drop(clients);
    let mut waiting = waiting;
    let mut slowest = Duration::ZERO;
    while !waiting.is_empty() {
        let rest = waiting.split_off(waiting.len().min(at_most / 2));
        for client in &mut waiting {
            assert_eq!(client.recv_json()["out"], "pong");
        }
        slowest = slowest.max(begin.elapsed());
        waiting = rest;
        if slowest > Duration::from_secs(3) {
            break;
        }
    }
    assert!(waiting.is_empty(), "{} still wait", waiting.len());
    println!("the others were answered up to {slowest:?} after there was room");
}

#[test]
fn a_worker_without_descriptors_serves_on_and_recovers() {
    let _alone = alone();
    raise_descriptor_limit();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .before("ulimit -n 64")
        .start();
    let sweep = Sweep::of(&daemon);
    crowd(&daemon, 128);
    sweep.assert_same(&daemon);
    let begin = Instant::now();
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_full_worker_serves_on_and_recovers() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n[limits]\nconnections = 30\n")
        .start();
    let sweep = Sweep::of(&daemon);
    crowd(&daemon, 60);
    sweep.assert_same(&daemon);
    let begin = Instant::now();
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "{:?}",
        begin.elapsed()
    );
}

/// Clients connect and disconnect while there is room for one.
#[test]
fn coming_and_going_at_the_limit_fills_no_log() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[limits]\nconnections = 1\n")
        .start();
    let before = daemon.log().len();
    for number in 0..500 {
        assert_eq!(
            daemon
                .client()
                .call(&json!({"in": "ping", "params": number}))["result"],
            number
        );
    }
    let grown = daemon.log().len() - before;
    println!("500 times at the limit: {grown} bytes of log");
    assert!(grown < 1000, "{grown}");
}

#[test]
fn a_unix_socket_has_its_mode_and_serves() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n[[listen]]\naddress = \"unix:rpc.sock\"\nmode = \"0620\"\n")
        .start();
    let path = daemon.dir().join("rpc.sock");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o620, "{mode:o}");
    let mut clients: Vec<Client> = (0..50).map(|_| Client::connect_unix(&path)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(
            client.call(&json!({"in": "ping", "params": number}))["result"],
            number
        );
    }
    let mut client = clients.pop().unwrap();
    client.send(r#"{"in": "ping"}"#);
    client.half_close();
    assert_eq!(client.recv_all().len(), 1);
}
