//! The methods `rpc.job.*`: their answers in each dialect, and what bad input gets.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{CONFIG, LATER, call, enqueue, error, jobs_process, later, query, result};
use crate::support::{Client, Daemon, PATIENCE, assert_within, process, wait_for};

const UNKNOWN: &str = "01890000-0000-7000-8000-000000000000";

/// Returns all text until the server closes the connection.
fn read_to_end(client: &Client) -> String {
    let mut text = String::new();
    client.stream().read_to_string(&mut text).unwrap();
    text
}

/// Waits until this number of calls is in other processes than that of their connection.
fn wait_sent(daemon: &Daemon, count: u64) {
    wait_for("calls in the jobs process", PATIENCE, || {
        let status = daemon.status();
        let workers = status["workers"].as_array().unwrap().iter();
        workers.filter_map(|it| it["sent"].as_u64()).sum::<u64>() == count
    });
}

#[test]
fn a_job_is_stored_read_and_cancelled() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let stored = result(client, "rpc.job.enqueue", &later(&json!([1, 2.50])));
    let id = stored["job"].as_str().unwrap().to_owned();
    assert_eq!((id.len(), &id[14..15]), (36, "7"), "{stored}");
    assert_eq!(stored, json!({"job": id, "state": "waiting", "new": true}));
    let record = result(client, "rpc.job.get", &json!({"job": id}));
    let shown = |name: &str| record[name].clone();
    assert_eq!(shown("method"), "ping");
    assert_eq!(
        (shown("state"), shown("ended")),
        (json!("waiting"), json!(false))
    );
    assert_eq!(
        (shown("attempt"), shown("max_attempts")),
        (json!(0), json!(10))
    );
    let times = |name: &str| record[name].as_u64().unwrap();
    assert_eq!(times("due_at_ms"), times("created_at_ms") + LATER);

    // The same id with the same content is the same job, and with other content a conflict.
    let mut again = later(&json!([1, 2.50]));
    again["id"] = json!(id);
    let same = result(client, "rpc.job.enqueue", &again);
    assert_eq!(same, json!({"job": id, "state": "waiting", "new": false}));
    again["params"] = json!([2]);
    let conflict = error(client, "rpc.job.enqueue", &again);
    assert_eq!(
        (&conflict["code"], &conflict["started"]),
        (&json!(-32013), &json!(false))
    );
    assert_eq!(conflict["data"]["job"], id);

    assert_eq!(result(client, "rpc.job.cancel", &json!({"job": id})), true);
    assert_eq!(result(client, "rpc.job.cancel", &json!({"job": id})), false);
    let record = result(client, "rpc.job.wait", &json!({"job": id}));
    assert_eq!(
        (&record["state"], &record["ended"]),
        (&json!("cancelled"), &json!(true))
    );
    for method in ["rpc.job.get", "rpc.job.wait", "rpc.job.cancel"] {
        let unknown = error(client, method, &json!({"job": UNKNOWN}));
        assert_eq!(unknown["name"], "no-such-job", "{method}: {unknown}");
    }
}

#[test]
fn an_array_is_stored_as_a_whole_or_not_at_all() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let three = json!([later(&json!(1)), later(&json!(2)), later(&json!(3))]);
    let stored = result(client, "rpc.job.enqueue", &three);
    let ids: Vec<_> = stored
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["job"].as_str())
        .collect();
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), 3, "{stored}");
    let known = ids[0].unwrap();
    let mut repeated = later(&json!("other"));
    repeated["id"] = json!(known);
    let conflict = error(
        client,
        "rpc.job.enqueue",
        &json!([later(&json!(4)), repeated]),
    );
    assert_eq!(conflict["name"], "conflict");
    assert!(
        conflict["message"]
            .as_str()
            .unwrap()
            .starts_with("params[1]: ")
    );
    let store = daemon.dir().join("jobs.db");
    assert_eq!(query(&store, "SELECT count(*) FROM job"), 3);
}

#[test]
fn a_key_has_one_live_job() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let mut keyed = later(&json!(1));
    keyed["key"] = json!("nightly");
    let first = result(client, "rpc.job.enqueue", &keyed);
    let second = result(client, "rpc.job.enqueue", &keyed);
    assert_eq!(
        (&second["job"], &second["new"]),
        (&first["job"], &json!(false))
    );
    result(client, "rpc.job.cancel", &json!({"job": first["job"]}));
    let third = result(client, "rpc.job.enqueue", &keyed);
    assert_eq!(third["new"], true);
    assert_ne!(third["job"], first["job"]);
}

#[test]
fn every_dialect_has_the_methods_and_the_codes() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    let id = enqueue(client, &json!(null));
    let batch = json!([
        {"jsonrpc": "2.0", "method": "rpc.job.get", "params": {"job": id}, "id": 1},
        {"jsonrpc": "2.0", "method": "rpc.job.get", "params": {"job": UNKNOWN}, "id": 2},
        {"jsonrpc": "2.0", "method": "rpc.job.enqueue", "params": later(&json!(1)), "id": 3},
    ]);
    let answers = client.call(&batch);
    let of = |number: u64| {
        let all = answers.as_array().unwrap().iter();
        all.clone().find(|it| it["id"] == number).unwrap().clone()
    };
    assert_eq!(of(1)["result"]["job"], id);
    assert_eq!(of(2)["error"]["code"], -32014);
    assert_eq!(of(3)["result"]["state"], "waiting");

    let line = &mut daemon.client();
    line.send_raw(
        format!("{{\"in\":\"rpc.job.get\",\"params\":{{\"job\":\"{id}\"}}}}\n").as_bytes(),
    );
    line.half_close();
    let answer = read_to_end(line);
    assert!(answer.contains(&format!("\"job\":\"{id}\"")), "{answer}");

    let mut conflict = later(&json!("other"));
    conflict["id"] = json!(id);
    for (method, params, status) in [
        ("rpc.job.get", json!({"job": id}), "200 OK"),
        ("rpc.job.get", json!({"job": UNKNOWN}), "404 Not Found"),
        ("rpc.job.enqueue", conflict, "409 Conflict"),
        (
            "rpc.job.enqueue",
            json!({"method": "none"}),
            "404 Not Found",
        ),
        (
            "rpc.job.enqueue",
            json!({"method": "ping", "priority": 10}),
            "400 Bad Request",
        ),
    ] {
        let http = &mut daemon.client();
        let body = params.to_string();
        http.send_raw(
            format!(
                "POST /{method} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        let answer = read_to_end(http);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
    }
    let discovered = result(client, "rpc.discover", &json!(null));
    let names = discovered["methods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["name"].clone());
    let names: Vec<_> = names
        .filter(|name| name.as_str().unwrap().starts_with("rpc.job."))
        .collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

#[test]
fn bad_input_names_the_member_and_stores_nothing() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let client = &mut daemon.client();
    for (params, name, says) in [
        (json!({"method": "none"}), "method-not-found", "\"none\""),
        (
            json!({"method": "rpc.discover"}),
            "method-not-found",
            "cannot be a job",
        ),
        (
            json!({"method": "rpc.job.enqueue"}),
            "method-not-found",
            "cannot be a job",
        ),
        (json!({}), "invalid-params", "`method`"),
        (json!([]), "invalid-params", "at least one"),
        (
            json!({"method": "ping", "id": "7"}),
            "invalid-params",
            "`id`",
        ),
        (
            json!({"method": "ping", "key": ""}),
            "invalid-params",
            "`key`",
        ),
        (
            json!({"method": "ping", "delay_ms": 1, "at_ms": 1}),
            "invalid-params",
            "`at_ms`",
        ),
        (
            json!({"method": "ping", "delay_ms": -1}),
            "invalid-params",
            "`delay_ms`",
        ),
        (
            json!({"method": "ping", "at_ms": u64::MAX}),
            "invalid-params",
            "`at_ms`",
        ),
        (
            json!({"method": "ping", "priority": 10}),
            "invalid-params",
            "`priority`",
        ),
        (
            json!({"method": "ping", "max_attempts": 0}),
            "invalid-params",
            "`max_attempts`",
        ),
        (
            json!({"method": "ping", "group": "a"}),
            "invalid-params",
            "`group`",
        ),
        (
            json!({"method": "ping", "colour": 1}),
            "invalid-params",
            "colour",
        ),
        (
            json!([{"method": "ping"}, {"method": "none"}]),
            "method-not-found",
            "params[1]",
        ),
    ] {
        let error = error(client, "rpc.job.enqueue", &params);
        assert_eq!(error["name"], name, "{params}: {error}");
        assert_eq!(error["started"], false, "{params}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(says),
            "{params}: {error}"
        );
    }
    for (method, params) in [
        ("rpc.job.get", json!({"job": "x"})),
        ("rpc.job.get", json!({"job": UNKNOWN, "timeout_ms": 1})),
        ("rpc.job.wait", json!({"job": UNKNOWN, "timeout_ms": -1})),
        ("rpc.job.cancel", json!(null)),
    ] {
        let error = error(client, method, &params);
        assert_eq!(
            error["name"], "invalid-params",
            "{method} {params}: {error}"
        );
    }
    let store = daemon.dir().join("jobs.db");
    assert_eq!(query(&store, "SELECT count(*) FROM job"), 0);
}

#[test]
fn a_server_without_jobs_has_no_such_method_and_no_jobs_process() {
    let daemon = Daemon::start();
    let client = &mut daemon.client();
    let error = error(client, "rpc.job.enqueue", &later(&json!(1)));
    assert_eq!(error["name"], "method-not-found");
    assert!(super::jobs_processes(&daemon).is_empty());
    assert!(!daemon.dir().join("jobs.db").exists());
}

#[test]
fn a_wait_ends_with_the_job_with_its_own_time_and_with_its_worker() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let (client, waiting) = (&mut daemon.client(), &mut daemon.client());
    let id = enqueue(client, &json!(1));
    let begun = Instant::now();
    let record = result(
        client,
        "rpc.job.wait",
        &json!({"job": id, "timeout_ms": 300}),
    );
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_within("a wait of 300 ms", begun.elapsed(), Duration::from_secs(2));
    assert_eq!(
        (&record["state"], &record["ended"]),
        (&json!("waiting"), &json!(false))
    );

    // Another client cancels the job.
    let wait = json!({"in": "rpc.job.wait", "params": {"job": id}, "id": 1});
    waiting.send(&wait.to_string());
    wait_sent(&daemon, 1);
    assert_eq!(result(client, "rpc.job.cancel", &json!({"job": id})), true);
    let answer = waiting.recv_json();
    assert_eq!(answer["result"]["state"], "cancelled", "{answer}");

    // A reload drains the worker.
    let id = enqueue(client, &json!(2));
    let wait = json!({"in": "rpc.job.wait", "params": {"job": id}, "id": 2});
    waiting.send(&wait.to_string());
    wait_sent(&daemon, 1);
    let begun = Instant::now();
    let reader = thread::spawn({
        let mut waiting = waiting.second();
        move || waiting.recv_json()
    });
    daemon.reload();
    let answer = reader.join().unwrap();
    assert_within(
        "an answer to the wait at the reload",
        begun.elapsed(),
        Duration::from_secs(5),
    );
    assert_eq!(answer["result"]["ended"], false, "{answer}");
    let record = result(&mut daemon.client(), "rpc.job.get", &json!({"job": id}));
    assert_eq!(record["state"], "waiting");
    let _ = call(&mut daemon.client(), "rpc.job.cancel", &json!({"job": id}));
}

#[test]
fn many_waits_occupy_no_thread_and_end_together() {
    let config = CONFIG.replace("count = 2", "count = 2\nthreads = 1");
    let daemon = Daemon::builder().config(&config).start();
    let client = &mut daemon.client();
    let id = enqueue(client, &json!(1));
    let mut waiting: Vec<Client> = (0..10).map(|_| daemon.client()).collect();
    for client in &mut waiting {
        let wait = |number| json!({"in": "rpc.job.wait", "params": {"job": id}, "id": number});
        client.send_together((0..100).map(wait));
    }
    wait_sent(&daemon, 1000);
    let begun = Instant::now();
    assert_eq!(call(client, "ping", &json!(null))["result"], json!(null));
    assert_eq!(result(client, "rpc.job.cancel", &json!({"job": id})), true);
    for client in &mut waiting {
        for _ in 0..100 {
            assert_eq!(client.recv_json()["result"]["state"], "cancelled");
        }
    }
    assert_within("1000 answers", begun.elapsed(), Duration::from_secs(5));
}

#[test]
fn an_enqueue_that_waits_for_the_jobs_process_is_stored_although_its_client_is_gone() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[jobs]\nstore = \"sqlite:jobs.db\"\n")
        .expect_log("ended by SIGKILL")
        .start();
    let master = Pid::from_raw(daemon.pid());
    // A stopped master replaces no process.
    kill(master, Signal::SIGSTOP).unwrap();
    let jobs = jobs_process(&daemon);
    kill(Pid::from_raw(jobs), Signal::SIGKILL).unwrap();
    wait_for("the jobs process to be dead", PATIENCE, || {
        process::state(jobs) == Some('Z')
    });
    let mut client = daemon.client();
    client.send_together([
        json!({"in": "rpc.job.enqueue", "params": later(&json!(1)), "id": 1}),
        json!({"in": "ping", "id": 2}),
    ]);
    assert_eq!(client.recv_json()["id"], 2);
    client.reset();
    // The worker handles the reset before this call.
    result(&mut daemon.client(), "ping", &json!(null));
    kill(master, Signal::SIGCONT).unwrap();
    let store = daemon.dir().join("jobs.db");
    wait_for("the job", PATIENCE, || {
        query(&store, "SELECT count(*) FROM queue") == 1
    });
}
