//! Tests that a client that uses up a shared limit does not block the others.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Client, Daemon, frame, raise_descriptor_limit};

/// Sends `calls` calls ahead and one more for each answer, until the connection is shut down from
/// outside.
fn greedy(daemon: &Daemon, calls: usize) -> (thread::JoinHandle<()>, Client) {
    let mut client = daemon.client();
    let handle = client.second();
    let of = |id: usize| json!({"in": "sleep", "params": 0.05, "id": id});
    client.send_together((0..calls).map(of));
    let running = thread::spawn(move || {
        while client.recv().is_ok() && client.try_send(&of(1).to_string()).is_ok() {}
    });
    (running, handle)
}

#[test]
fn a_client_with_one_call_finds_room_in_a_queue_that_another_client_fills() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 4\n[limits]\nqueue = 200\n[methods.sleep]\nbuiltin = \"sleep\"\n",
        )
        .start();
    let greedy: Vec<_> = (0..4).map(|_| greedy(&daemon, 200)).collect();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(5) && daemon.workers()[0].queued < 150 {
        thread::yield_now();
    }
    for n in 0..30 {
        let answer = daemon.client().call(&json!({"in": "sleep", "params": 0}));
        assert_eq!(answer["out"], "sleep", "{n}: {answer}");
    }
    for (running, handle) in greedy {
        handle.stream().shutdown(std::net::Shutdown::Both).unwrap();
        running.join().unwrap();
    }
}

#[test]
fn a_client_with_a_call_in_pieces_finds_room_beside_one_with_many_unfinished_ones() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[limits]\nunfinished = \"16MiB\"\n[methods.echo]\nbuiltin = \"echo\"\n",
        )
        .expect_log("limits.unfinished")
        .start();
    let greedy: Vec<Client> = (0..400)
        .map(|_| {
            let mut client = daemon.client();
            client.send_raw(&(1_u32 << 20).to_le_bytes());
            client.send_raw(&[b' '; 61440]);
            client
        })
        .collect();
    let text = "x".repeat(40_000);
    let call = frame(json!({"in": "echo", "params": text}).to_string().as_bytes());
    for n in 0..10 {
        let mut client = daemon.client();
        client.send_raw(&call[..20_000]);
        // The second piece is read alone.
        assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
        client.send_raw(&call[20_000..]);
        let answer = client.recv_json();
        assert_eq!(answer["out"], "echo", "{n}: {:.200}", answer.to_string());
    }
    drop(greedy);
}

#[test]
fn commands_find_descriptors_however_many_connections_there_are() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[methods.cat]\ncommand = [\"cat\"]\n")
        .before("ulimit -n 256")
        .expect_log("has room for")
        .start();
    let mut served = daemon.client();
    assert_eq!(served.call(&json!({"in": "ping"}))["out"], "pong");
    raise_descriptor_limit();
    // More than the worker accepts; the others wait in the kernel.
    let others: Vec<_> = (0..300).map(|_| daemon.try_client()).collect();
    for n in 0..20 {
        let answer = served.call(&json!({"in": "cat", "params": n}));
        assert_eq!(answer["result"], n.to_string(), "{answer}");
    }
    drop(others);
}
