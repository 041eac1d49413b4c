//! What one client may take of the jobs process, and what it may learn of the jobs of others.

use std::time::{Duration, Instant};

use hmac_sha256::HMAC;
use serde_json::json;

use super::{CONFIG, enqueue, enqueue_job, error, later, result, wait_job};
use crate::support::{Daemon, assert_within};

#[test]
fn an_object_of_many_members_delays_no_other_call() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let id = enqueue(&mut daemon.client(), &json!(1));
    let members: serde_json::Map<_, _> = (0..100_000)
        .map(|n| (format!("{n:06}"), json!(1)))
        .collect();
    let mut client = daemon.client();
    let refused = error(&mut client, "rpc.job.enqueue", &json!(members));
    assert_eq!(refused["name"], "invalid-params", "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("more than 64 members"), "{message}");
    let begun = Instant::now();
    result(&mut daemon.client(), "rpc.job.get", &json!({"job": id}));
    assert_within("a call beside it", begun.elapsed(), Duration::from_secs(2));
}

#[test]
fn waits_take_no_room_of_enqueues() {
    let config = CONFIG.replace("count = 2", "count = 1");
    let daemon = Daemon::builder().config(&config).start();
    let id = enqueue(&mut daemon.client(), &json!(1));
    let padded = format!(
        "{{\"job\":\"{id}\",{}\"timeout_ms\":60000}}",
        " ".repeat(1024)
    );
    let mut client = daemon.client();
    let answer = client.call_text(&format!(r#"{{"in":"rpc.job.wait","params":{padded}}}"#));
    assert!(answer.contains("at most 1024,"), "{answer}");
    // A wait counts nowhere, so its id must be short too.
    let long = "i".repeat(1024);
    let params = format!("{{\"job\":\"{id}\"}}");
    let answer = client.call_text(&format!(
        r#"{{"in":"rpc.job.wait","id":"{long}","params":{params}}}"#
    ));
    assert!(answer.contains("at most 1024,"), "{answer}");
    // As many bytes as all enqueues of a worker may have.
    let params = format!(
        "{{\"job\":\"{id}\",{}\"timeout_ms\":60000}}",
        " ".repeat(900)
    );
    let waits: Vec<_> = (0..5)
        .map(|_| {
            let mut client = daemon.client();
            for number in 0..1000 {
                let call = format!(r#"{{"in":"rpc.job.wait","id":{number},"params":{params}}}"#);
                client.send(&call);
            }
            client
        })
        .collect();
    let big = json!({"method": "ping", "params": "x".repeat(500_000), "delay_ms": 3_600_000});
    result(&mut daemon.client(), "rpc.job.enqueue", &big);
    drop(waits);
}

#[test]
fn the_ids_of_an_array_do_not_follow_from_each_other() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let stored = result(
        &mut client,
        "rpc.job.enqueue",
        &json!([later(&json!(1)), later(&json!(2))]),
    );
    let bytes = |at: usize| {
        let id = stored[at]["job"].as_str().unwrap().replace('-', "");
        u128::from_str_radix(&id, 16).unwrap().to_be_bytes()
    };
    for number in 0..4_u64 {
        // The ids of an array are made of its seed in this way.
        let random = HMAC::mac(number.to_be_bytes(), bytes(0));
        assert_ne!(random[3..10], bytes(1)[9..], "{stored}");
    }
}

#[test]
fn a_waiting_job_ends_when_its_expiry_is_over() {
    let daemon = Daemon::builder().config(CONFIG).start();
    assert!(daemon.command(&["job", "pause", "ping"]).status.success());
    let mut client = daemon.client();
    let begun = Instant::now();
    let job = enqueue_job(&mut client, &json!({"method": "ping", "expires_ms": 1_500}));
    let record = wait_job(&mut client, &job);
    assert_eq!(record["state"], "dead", "{record}");
    assert_eq!(record["reason"], "expired", "{record}");
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1_400), "{took:?}");
    assert_within("the end of the job", took, Duration::from_secs(5));
}
