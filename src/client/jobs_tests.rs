//! Jobs of the client and of the pool with simulated servers.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::pool_tests::{Then, pool, refusal, server};
use super::*;

const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

fn answer(call: &Value, result: &Value) -> Then {
    let mut answer = json!({"out": call["in"], "result": result});
    if !call["id"].is_null() {
        answer["id"] = call["id"].clone();
    }
    Then::Answer(answer.to_string())
}

fn record(job: &str, state: &str, result: Option<Value>) -> Value {
    let mut record = json!({
        "job": job, "method": "double", "state": state, "ended": state != "running", "attempt": 1,
        "max_attempts": 10, "crashes": 0, "interruptions": 0, "priority": 0,
        "created_at_ms": 1, "due_at_ms": 1
    });
    match (state, result) {
        ("done", result) => record["result"] = result.unwrap_or_default(),
        ("dead", Some(error)) => {
            record["reason"] = "attempts".into();
            record["error"] = error;
        }
        _ => {}
    }
    record
}

/// Starts a server that stores jobs of `double`. A wait is answered twice with a running job. Jobs with odd
/// params die.
fn job_server() -> (String, Arc<Mutex<Vec<Value>>>) {
    let jobs = Mutex::new(BTreeMap::<String, (Value, u32)>::new());
    server(move |_, call| {
        let params = &call["params"];
        let mut jobs = jobs.lock().unwrap();
        match call["in"].as_str().unwrap() {
            "rpc.job.enqueue" => {
                let id = params["id"].as_str().unwrap().to_owned();
                let is_new = jobs
                    .insert(id.clone(), (params["params"].clone(), 0))
                    .is_none();
                answer(call, &json!({"job": id, "state": "waiting", "new": is_new}))
            }
            "rpc.job.cancel" => answer(call, &json!(true)),
            _ => {
                let id = params["job"].as_str().unwrap();
                let Some((params, waits)) = jobs.get_mut(id) else {
                    return Then::Answer(refusal(-32014, false));
                };
                *waits += 1;
                let number = params.as_i64().unwrap();
                let record = match (*waits > 2, number % 2 == 0) {
                    (false, _) => record(id, "running", None),
                    (true, true) => record(id, "done", Some((2 * number).into())),
                    (true, false) => {
                        let error = json!({"code": 7, "name": "error", "message": "odd"});
                        record(id, "dead", Some(error))
                    }
                };
                answer(call, &record)
            }
        }
    })
}

#[test]
fn a_client_waits_until_the_job_has_ended() {
    let (address, calls) = job_server();
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let job = client.enqueue("double", 4).unwrap();
    assert!(job.is_new());
    assert_eq!(client.job(&job).unwrap().state, "running");
    assert_eq!(client.wait_job::<i64>(&job).unwrap(), 8);
    assert_eq!(client.wait_job::<i64>(job.id()).unwrap(), 8);
    assert!(client.cancel_job(&job).unwrap());
    let calls = calls.lock().unwrap();
    let methods: Vec<&str> = calls.iter().map(|it| it["in"].as_str().unwrap()).collect();
    let expected = ["enqueue", "get", "wait", "wait", "wait", "cancel"];
    assert_eq!(methods, expected.map(|name| format!("rpc.job.{name}")));
    assert_eq!(calls[2]["params"]["timeout_ms"], 5_000);
    assert_eq!(calls[0]["params"]["id"].as_str().unwrap().len(), 36);
}

#[test]
fn a_dead_job_is_an_error_and_an_unknown_one_is_refused() {
    let (address, _) = job_server();
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let id = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f";
    let options = EnqueueOptions {
        id: Some(id.into()),
        ..EnqueueOptions::default()
    };
    let job = client.enqueue_with("double", 3, &options).unwrap();
    assert!(!client.enqueue_with("double", 3, &options).unwrap().is_new());
    let error = client.wait_job::<i64>(&job).unwrap_err();
    let text = format!("job {id} is dead (attempts) after 1 attempt: error: odd");
    assert_eq!(error.to_string(), text);
    assert!(!error.is_safe_to_repeat());
    assert_eq!(crate::error::Error::from(error).exit_code(), 1);
    let error = client.job("unknown").unwrap_err();
    assert!(matches!(error, ClientError::Refused(error) if error.code == -32014));
}

#[test]
fn a_pool_passes_the_results_of_its_jobs_to_their_callbacks() {
    let (address, calls) = job_server();
    let pool = pool(&address, 2);
    let (sender, results) = mpsc::channel();
    // More than the waits at one time.
    for number in 0..200 {
        let sender = sender.clone();
        pool.enqueue_async("double", number, move |result: Result<i64, _>| {
            sender.send((number, result)).unwrap();
        })
        .unwrap();
    }
    drop(sender);
    pool.join();
    let results: BTreeMap<i64, _> = results.iter().collect();
    assert_eq!(results.len(), 200);
    for (number, result) in results {
        match result {
            Ok(double) => assert_eq!((double, number % 2), (2 * number, 0)),
            Err(ClientError::Job(job)) => assert_eq!((&*job.state, number % 2), ("dead", 1)),
            Err(error) => panic!("{number}: {error:?}"),
        }
    }
    let calls = calls.lock().unwrap();
    let enqueues = calls.iter().filter(|it| it["in"] == "rpc.job.enqueue");
    assert_eq!(enqueues.count(), 200);
}

#[test]
fn an_enqueue_and_a_wait_without_an_answer_are_repeated_with_the_same_id() {
    let (address, calls) = server(|number, call| {
        let id = call["params"]["id"]
            .as_str()
            .or(call["params"]["job"].as_str());
        let id = id.unwrap();
        match number {
            0 => Then::Close,
            1 => Then::Answer(refusal(-32012, true)),
            2 => answer(call, &json!({"job": id, "state": "waiting", "new": false})),
            3 => Then::Close,
            _ => answer(call, &record(id, "done", Some(json!("x")))),
        }
    });
    let pool = pool(&address, 1);
    let (sender, results) = mpsc::channel();
    pool.enqueue_async("double", 1, move |result: Result<String, _>| {
        sender.send(result).unwrap();
    })
    .unwrap();
    pool.join();
    assert_eq!(results.recv().unwrap().unwrap(), "x");
    let calls = calls.lock().unwrap();
    let ids = calls.iter().map(|call| &call["params"]);
    let ids: Vec<&Value> = ids
        .map(|params| {
            if params["id"].is_null() {
                &params["job"]
            } else {
                &params["id"]
            }
        })
        .collect();
    assert_eq!(ids.len(), 5);
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
}

#[test]
fn a_terminated_pool_leaves_its_jobs_to_the_server() {
    let (address, _) = server(|number, call| match number {
        0 => {
            let id = &call["params"]["id"];
            answer(call, &json!({"job": id, "state": "waiting", "new": true}))
        }
        _ => answer(
            call,
            &record(call["params"]["job"].as_str().unwrap(), "running", None),
        ),
    });
    let pool = pool(&address, 1);
    let (sender, results) = mpsc::channel();
    pool.enqueue_async("double", 1, move |result: Result<i64, _>| {
        sender.send(result).unwrap();
    })
    .unwrap();
    pool.terminate();
    let error = results.recv().unwrap().unwrap_err();
    // The connection may end before the enqueue is sent.
    let is_expected = matches!(
        error,
        ClientError::Ended | ClientError::Gone(_) | ClientError::NotSent(_)
    );
    assert!(is_expected, "{error:?}");
}

#[test]
fn a_client_repeats_an_enqueue_whose_connection_breaks_with_the_same_id() {
    let (address, calls) = server(|number, call| match number {
        0 => Then::Close,
        _ => answer(
            call,
            &json!({"job": call["params"]["id"], "state": "waiting", "new": true}),
        ),
    });
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let job = client.enqueue("double", 1).unwrap();
    let calls = calls.lock().unwrap();
    let ids: Vec<&Value> = calls.iter().map(|call| &call["params"]["id"]).collect();
    assert_eq!(ids, [job.id(), job.id()]);
}

/// What happens to the second try says nothing about the first one.
#[test]
fn an_enqueue_that_may_be_stored_is_never_said_to_be_safe_to_repeat() {
    let (address, _) = server(|number, _| match number {
        0 => Then::Close,
        _ => Then::Answer(refusal(-32002, false)),
    });
    let mut client = Client::connect(&address, PATIENCE).unwrap();
    let error = client.enqueue("double", 1).unwrap_err();
    assert!(!error.is_safe_to_repeat(), "{error:?}");
}
