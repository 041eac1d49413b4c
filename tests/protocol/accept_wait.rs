//! Tests the kernel's accept queue: the status shows it, and the time in it counts towards the timeout of
//! a call.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::installed::wait_for_children;
use crate::support::{Client, Daemon, PATIENCE, pass, wait_for};

const CONFIG: &str = "
[workers]
count = 2
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
";

fn signal(workers: &[i32], signal: Signal) {
    for worker in workers {
        kill(Pid::from_raw(*worker), signal).unwrap();
    }
}

fn call(method: &str, timeout_ms: u64) -> String {
    json!({"in": method, "params": 0, "id": 1, "timeout_ms": timeout_ms}).to_string()
}

/// Returns the longest wait of all workers in milliseconds.
fn longest_wait(daemon: &Daemon) -> u64 {
    let status = daemon.status();
    let workers = status["workers"].as_array().unwrap().iter();
    let longest = workers.map(|worker| worker["accept_wait"]["longest_ms"].as_u64().unwrap());
    longest.max().unwrap()
}

#[test]
fn what_a_call_waits_to_be_accepted_counts_towards_its_time() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let workers = daemon.ready_workers();
    daemon.client().call(&json!({"in": "ping"}));
    assert!(longest_wait(&daemon) < 900);
    signal(&workers, Signal::SIGSTOP);
    // An inline call, one on a thread, one with enough time, and a connection that waits without sending.
    let mut late: Vec<Client> = ["echo", "sleep"]
        .into_iter()
        .map(|method| {
            let mut client = daemon.client();
            client.send(&call(method, 300));
            client
        })
        .collect();
    let mut patient = daemon.client();
    patient.send(&call("sleep", 10_000));
    let mut silent = daemon.client();
    let queue = || daemon.status()["listeners"][0]["queue"].clone();
    wait_for("all of them in the queue", PATIENCE, || queue() == 4);
    pass(Duration::from_secs(1));
    signal(&workers, Signal::SIGCONT);
    for client in &mut late {
        let answer = client.recv_json();
        assert_eq!(answer["result"]["name"], "timeout", "{answer}");
        assert_eq!(answer["result"]["started"], false, "{answer}");
    }
    assert_eq!(patient.recv_json()["result"], 0);
    silent.send(&call("sleep", 900));
    assert_eq!(silent.recv_json()["result"], 0);
    let longest = longest_wait(&daemon);
    println!("the longest wait: {longest} ms");
    assert!((900..10_000).contains(&longest), "{longest}");
    assert_eq!(queue(), 0);
    // The wait counts only for the first call.
    late[0].send(&call("echo", 5000));
    assert_eq!(late[0].recv_json()["result"], 0);
}

#[test]
fn the_queue_and_its_limit_stand_in_the_status_where_the_kernel_tells_them() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let own = daemon.address();
    daemon.configure(&format!(
        "{CONFIG}[[listen]]\naddress = \"{own}\"\nbacklog = 50\n\
         [[listen]]\naddress = \"unix:rpc.sock\"\nbacklog = 20\n"
    ));
    assert!(daemon.command(&["reload"]).status.success());
    // A worker of the old generation may still accept until it reads the order to drain.
    wait_for_children(&daemon, 2);
    let workers = daemon.ready_workers();
    signal(&workers, Signal::SIGSTOP);
    let _tcp: Vec<Client> = (0..3).map(|_| daemon.client()).collect();
    let _unix: Vec<Client> = (0..2)
        .map(|_| Client::connect_unix(&daemon.dir().join("rpc.sock")))
        .collect();
    let mut listeners = Value::Null;
    wait_for("three in the queue", PATIENCE, || {
        listeners = daemon.status()["listeners"].clone();
        listeners[0]["queue"] == 3
    });
    println!("{listeners}");
    assert_eq!(listeners[0]["backlog"], 50);
    assert_eq!(listeners[1]["backlog"], 20);
    assert_eq!(listeners[1]["queue"], Value::Null);
    signal(&workers, Signal::SIGCONT);
    wait_for("the queue empty", PATIENCE, || {
        daemon.status()["listeners"][0]["queue"] == 0
    });
}
