//! Many slow calls: `lines` limits the records, and the rest is counted.

use std::time::Instant;

use serde_json::json;

use super::{events, records, slow_calls};
use crate::support::{Daemon, PATIENCE, example, wait_for};

const CONFIG: &str = r#"
[workers]
count = 2
threads = 50
[limits]
queue = 100000
[log]
format = "json"
[slow-log]
threshold = "1ms"
lines = 20
[methods.sleep]
builtin = "sleep"
timeout = "30s"
"#;

#[test]
fn a_storm_is_counted_and_only_some_of_it_recorded() {
    const CALLS: u64 = 10_000;
    let daemon = Daemon::builder().config(CONFIG).start();
    let begin = Instant::now();
    let mut clients: Vec<_> = (0..20).map(|_| daemon.client()).collect();
    for client in &mut clients {
        let calls = (0..CALLS / 20).map(|id| json!({"in": "sleep", "params": 0.004, "id": id}));
        client.send_together(calls);
    }
    for client in &mut clients {
        (0..CALLS / 20).for_each(|_| assert_eq!(client.recv_json()["out"], "sleep"));
    }
    wait_for("the count", PATIENCE, || {
        slow_calls(&daemon, "sleep") == CALLS
    });
    let begun = || events(&daemon, "slow-call").len();
    wait_for("the ends", PATIENCE, || {
        events(&daemon, "slow-call-end").len() == begun()
    });
    let seconds = begin.elapsed().as_secs() + 2;
    let lines = begun() as u64;
    println!(
        "{lines} records of {CALLS} slow calls in {:?}",
        begin.elapsed()
    );
    assert!(
        (20..=seconds * 2 * 20).contains(&lines),
        "{lines} in {seconds} s"
    );
    assert_eq!(records(&daemon).len() as u64, lines.min(128));
}

#[test]
fn an_inline_call_is_recorded_at_its_end() {
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config(
            "[workers]\ncount = 1\n[log]\nformat = \"json\"\n[slow-log]\nthreshold = \"300ms\"\n",
        )
        .start();
    let mut client = daemon.client();
    client.call(&json!({"in": "ping"}));
    client.call(&json!({"in": "block", "params": 1}));
    wait_for("the end", PATIENCE, || {
        events(&daemon, "slow-call-end").len() == 1
    });
    let (begin, end) = (
        &events(&daemon, "slow-call")[0],
        &events(&daemon, "slow-call-end")[0],
    );
    assert_eq!(
        (&begin["method"], &begin["kind"]),
        (&"block".into(), &"function".into())
    );
    assert_eq!(begin["evidence"], "held the event loop");
    let run_us = end["run_us"].as_u64().unwrap();
    assert!((950_000..2_000_000).contains(&run_us), "{end}");
    assert_eq!(
        (slow_calls(&daemon, "block"), slow_calls(&daemon, "ping")),
        (1, 0)
    );
}
