//! Checks `per-source`, on shared and on isolated listeners.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{METHODS, acceptor, ping};
use crate::support::wire::{DIALECTS, Dialect, Wire};
use crate::support::{Builder, Client, Daemon, PATIENCE, pass, process, wait_for};

const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Builds a daemon with two workers and a listener with these keys.
fn builder(workers: &str, keys: &str) -> Builder {
    let config = format!("{METHODS}[workers]\ncount = 2\n{workers}");
    Daemon::builder().config(&config).listen(keys)
}

/// Opens connections from one address until it has `count` of them.
fn fill(daemon: &Daemon, count: usize) -> Vec<Client> {
    let mut clients: Vec<_> = (0..count).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    clients
}

/// Checks that another connection gets `overloaded`, and then the end.
#[track_caller]
fn assert_refused(daemon: &Daemon, dialect: Dialect) {
    let mut wire = Wire::to(daemon);
    wire.ask(dialect, r#"{"in": "ping"}"#);
    let answer: Value = match dialect {
        Dialect::Http => {
            let response = wire.response();
            assert_eq!(response.status, 503);
            assert!(response.closes(), "{response:?}");
            response.json()
        }
        _ => {
            let answer = wire.answer(dialect).unwrap();
            let answer: Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(answer["out"], "error");
            answer["result"].clone()
        }
    };
    assert_eq!(
        (&answer["name"], &answer["started"]),
        (&json!("overloaded"), &json!(false)),
        "{answer}"
    );
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("127.0.0.1 has 4 connections"), "{message}");
    assert_eq!(wire.rest(), b"");
}

/// Waits until a connection of the same address is served.
fn wait_for_room(daemon: &Daemon) -> Client {
    let mut found = None;
    wait_for("room for another connection", PATIENCE, || {
        let mut client = daemon.client();
        client.send(r#"{"in": "ping"}"#);
        let answer = client.recv_json();
        found = (answer["out"] == "pong").then_some(client);
        found.is_some()
    });
    found.unwrap()
}

fn refused(daemon: &Daemon) -> u64 {
    let status = daemon.status();
    let of_listener = &status["listeners"][0]["refused_per_source"];
    if let Some(isolated) = status["isolated"][0].as_object() {
        assert_eq!(&isolated["refused_per_source"], of_listener);
    }
    of_listener.as_u64().unwrap()
}

fn limits_one_source_and_no_other(keys: &str) {
    let daemon = builder("", keys).start();
    let mut clients = fill(&daemon, 4);
    DIALECTS.iter().for_each(|it| assert_refused(&daemon, *it));
    assert_eq!(refused(&daemon), 3);
    daemon.wait_log("per-source of the listener allows: another one is refused");
    daemon.wait_log("peer=127.0.0.1:");
    let mut others: Vec<_> = (0..4)
        .map(|_| Client::connect_from(OTHER, daemon.address()))
        .collect();
    others.iter_mut().for_each(ping);
    clients.truncate(3);
    ping(&mut wait_for_room(&daemon));
    clients.iter_mut().for_each(ping);
    let lines = daemon.log().matches("another one is refused").count();
    assert_eq!(lines, 1, "of all processes together, in 10 s");
}

#[test]
fn a_source_has_a_limit_on_all_workers_together() {
    limits_one_source_and_no_other("per-source = 4\n");
}

#[test]
fn a_source_has_a_limit_on_an_isolated_listener() {
    limits_one_source_and_no_other("isolation = \"connection\"\nper-source = 4\n");
}

#[test]
fn a_refused_connection_that_says_nothing_is_closed_within_a_second() {
    for keys in ["", "isolation = \"connection\"\n"] {
        let daemon = builder("", &format!("{keys}per-source = 4\n")).start();
        let _clients = fill(&daemon, 4);
        let begin = Instant::now();
        let mut silent: Vec<_> = (0..70).map(|_| Wire::to(&daemon)).collect();
        wait_for("their refusal", PATIENCE, || refused(&daemon) == 70);
        let closed = silent.iter().filter(|wire| wire.is_closed()).count();
        if begin.elapsed().as_millis() < 900 {
            // 64 wait in the acceptor, or in each of the workers.
            assert!(closed <= 6, "{closed} are closed at once");
        }
        for wire in &mut silent {
            assert_eq!(wire.rest(), b"");
        }
        let mut other = Client::connect_from(OTHER, daemon.address());
        ping(&mut other);
    }
}

#[test]
fn the_connections_of_a_dead_worker_do_not_count() {
    let builder = builder("keep-connections = false\n", "per-source = 4\n");
    let daemon = builder.expect_log("SIGKILL").start();
    let clients = fill(&daemon, 4);
    assert_refused(&daemon, Dialect::Frame);
    for worker in process::workers(daemon.pid()) {
        kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    }
    let mut clients: Vec<_> = (clients.len()..8).map(|_| wait_for_room(&daemon)).collect();
    clients.iter_mut().for_each(ping);
    assert_refused(&daemon, Dialect::Frame);
}

#[test]
fn connections_count_while_they_move_to_another_generation_or_program() {
    for keys in ["", "isolation = \"connection\"\n"] {
        let daemon = builder("", &format!("{keys}per-source = 4\n")).start();
        let mut clients = fill(&daemon, 4);
        for change in ["reload", "upgrade", "reload"] {
            assert!(daemon.command(&[change]).status.success(), "{change}");
            // The acceptor of the program before looks whether the next one serves. A connection on its way
            // does not count.
            pass(Duration::from_millis(500));
            clients.iter_mut().for_each(ping);
            assert_refused(&daemon, Dialect::Frame);
        }
        assert_eq!(refused(&daemon), 3, "the count crosses an upgrade");
        clients.clear();
        let mut clients: Vec<_> = (0..4).map(|_| wait_for_room(&daemon)).collect();
        clients.iter_mut().for_each(ping);
    }
}

#[test]
fn sessions_without_an_acceptor_count() {
    let builder = builder("", "isolation = \"connection\"\nper-source = 4\n");
    let daemon = builder.expect_log("SIGKILL").start();
    let mut clients = fill(&daemon, 4);
    let first = acceptor(&daemon);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    ping(&mut Client::connect_from(OTHER, daemon.address()));
    assert_ne!(acceptor(&daemon), first);
    assert_refused(&daemon, Dialect::Line);
    clients.iter_mut().for_each(ping);
}
