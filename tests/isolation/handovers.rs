//! Checks that connections move to processes of the new generation and no client notices.

use std::time::Duration;

use serde_json::json;

use super::{acceptor, isolated, ping, session_of, status, wait_running};
use crate::support::{PATIENCE, pass, process, wait_for};

#[test]
fn a_reload_moves_resting_connections_and_lets_calls_end() {
    let daemon = isolated("");
    let mut clients: Vec<_> = (0..5).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    let before: Vec<i32> = clients.iter().map(session_of).collect();
    let old = acceptor(&daemon);
    let mut busy = daemon.client();
    busy.send(r#"{"in": "sleep", "params": 2.5}"#);
    let busy_before = session_of(&busy);
    wait_running(&daemon, busy_before);
    assert!(daemon.command(&["reload"]).status.success());
    wait_for("other processes", PATIENCE, || {
        before.iter().all(|&pid| !process::runs(pid))
    });
    assert!(process::runs(busy_before), "its call runs");
    clients.iter_mut().for_each(ping);
    assert_eq!(busy.recv_json()["result"], 2.5);
    ping(&mut busy);
    // The old process may still have read that one.
    wait_for("another process for it", PATIENCE, || {
        !process::runs(busy_before)
    });
    ping(&mut busy);
    wait_for("the end of the old acceptor", PATIENCE, || {
        !process::runs(old)
    });
    assert_eq!(status(&daemon)["running"], 6);
}

#[test]
fn bytes_of_an_unfinished_call_move_with_their_connection() {
    let daemon = isolated("");
    let mut client = daemon.client();
    ping(&mut client);
    let before = session_of(&client);
    let frame = crate::support::client::frame(br#"{"in": "ping", "params": 5}"#);
    client.send_raw(&frame[..9]);
    pass(Duration::from_millis(100));
    assert!(daemon.command(&["reload"]).status.success());
    client.send_raw(&frame[9..]);
    assert_eq!(client.recv_json()["out"], "pong");
    ping(&mut client);
    wait_for("another process", PATIENCE, || !process::runs(before));
    ping(&mut client);
}

#[test]
fn connections_cross_an_upgrade() {
    let daemon = isolated("");
    let mut clients: Vec<_> = (0..3).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    let before: Vec<i32> = clients.iter().map(session_of).collect();
    let upgrade = daemon.command(&["upgrade"]);
    assert!(upgrade.status.success(), "{upgrade:?}");
    wait_for("other processes", PATIENCE, || {
        before.iter().all(|&pid| !process::runs(pid))
    });
    clients.iter_mut().for_each(ping);
    ping(&mut daemon.client());
    let slept = clients[0].call(&json!({"in": "sleep", "params": 0.01}));
    assert_eq!(slept["result"], 0.01, "{slept}");
}

#[test]
fn connections_of_a_listener_that_is_shared_from_now_on_end_after_their_answers() {
    let daemon = isolated("");
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 0.5}"#);
    wait_running(&daemon, session_of(&client));
    let listen = format!("[[listen]]\naddress = \"{}\"\n", daemon.address());
    daemon.configure(&(super::METHODS.to_owned() + &listen));
    assert!(daemon.command(&["reload"]).status.success());
    assert_eq!(client.recv_json()["result"], 0.5);
    client.assert_closed();
    ping(&mut daemon.client());
    wait_for("the end of the acceptor", PATIENCE, || {
        daemon.status()["isolated"].as_array().unwrap().is_empty()
    });
}
