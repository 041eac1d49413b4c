//! Tests what clients and operators see of jobs: HTTP headers, the client of the crate, status, metrics and the
//! example of a queue.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use preforkd::client::{Client, ClientError, EnqueueOptions, Options, Pool};
use serde_json::{Value, json};

use super::{JOBS, with_jobs};
use crate::support::wire::Wire;
use crate::support::{Daemon, PATIENCE, source, wait_for};

fn post(daemon: &Daemon, path: &str, headers: &str, body: &str) -> (u16, String, Value) {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut wire = Wire::to(daemon);
    let response = wire.send(request).response();
    (
        response.status,
        format!("{:?}", response.headers),
        response.json(),
    )
}

#[test]
fn a_request_that_prefers_it_becomes_a_job() {
    let daemon = with_jobs("").start();
    let keyed = "Prefer: respond-async\r\nIdempotency-Key: order-7\r\n";
    let (status, headers, first) = post(&daemon, "/echo", keyed, "[1e0,  2]");
    assert_eq!(
        (status, &first["state"], &first["new"]),
        (202, &json!("waiting"), &json!(true))
    );
    assert!(
        headers.to_lowercase().contains("preference-applied"),
        "{headers}"
    );
    let (_, _, again) = post(&daemon, "/echo", keyed, "[1e0,  2]");
    assert_eq!(
        (&again["job"], &again["new"]),
        (&first["job"], &json!(false))
    );
    let (status, _, error) = post(&daemon, "/echo", keyed, "[3]");
    assert_eq!((status, &error["name"]), (409, &json!("conflict")));
    // Another client may use the same key. It gets no id, because that is the right to read and cancel the job.
    let id = first["job"].as_str().unwrap();
    assert!(!error.to_string().contains(id), "{error}");

    let mut client = daemon.client();
    let wait = json!({"in": "rpc.job.wait", "params": {"job": first["job"]}}).to_string();
    let record = client.call_text(&wait);
    assert!(record.contains(r#""result":[1e0,  2]"#), "{record}");

    let (status, _, error) = post(&daemon, "/nothing", "Prefer: respond-async\r\n", "1");
    assert_eq!((status, &error["code"]), (404, &json!(-32601)));
    let (status, _, error) = post(&daemon, "/echo", "Prefer: respond-async\r\n", "{");
    assert_eq!((status, &error["code"]), (400, &json!(-32700)));
    let unknown = r#"{"job": "018f0000-0000-7000-8000-00000000000f"}"#;
    let (status, _, error) = post(
        &daemon,
        "/rpc.job.get",
        "Prefer: respond-async\r\n",
        unknown,
    );
    assert_eq!((status, &error["code"]), (404, &json!(-32014)));
    let (status, headers, result) = post(&daemon, "/echo", "Idempotency-Key: order-7\r\n", "7");
    assert_eq!((status, result), (200, json!(7)));
    assert!(
        !headers.to_lowercase().contains("preference-applied"),
        "{headers}"
    );
}

#[test]
fn pages_of_a_listed_origin_may_send_the_headers_if_there_are_jobs() {
    let preflight = "OPTIONS /echo HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n\
                     Access-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: content-type,idempotency-key,prefer\r\n\r\n";
    let origins = "http-origins = [\"https://app.example\"]\n";
    for (jobs, allowed) in [
        ("", "content-type"),
        (JOBS, "content-type, prefer, idempotency-key"),
    ] {
        let daemon = Daemon::builder()
            .config(&format!("{origins}{jobs}"))
            .start();
        let response = Wire::to(&daemon).send(preflight).response();
        assert_eq!(response.status, 204);
        let wanted = format!("access-control-allow-headers: {allowed}");
        assert!(response.headers.contains(&wanted), "{response:?}");
    }
}

#[test]
fn without_jobs_the_headers_have_no_effect() {
    let daemon = Daemon::start();
    let headers = "Prefer: respond-async\r\nIdempotency-Key: a\r\nIdempotency-Key: b\r\n";
    let (status, headers, result) = post(&daemon, "/ping", headers, "7");
    assert_eq!((status, result), (200, json!(7)));
    assert!(
        !headers.to_lowercase().contains("preference-applied"),
        "{headers}"
    );
}

#[test]
fn the_client_of_the_crate_enqueues_waits_and_cancels() {
    let daemon = with_jobs("").start();
    let address = daemon.address().to_string();
    let mut client = Client::connect(&address, Some(PATIENCE)).unwrap();
    let job = client.enqueue("echo", ("a", 7)).unwrap();
    assert!(job.is_new());
    let result: (String, i64) = client.wait_job(&job).unwrap();
    assert_eq!(result, ("a".to_owned(), 7));
    assert_eq!(client.job(job.id()).unwrap().state, "done");
    assert!(!client.cancel_job(&job).unwrap());

    let later = EnqueueOptions {
        delay: Some(Duration::from_secs(3600)),
        key: Some("k".into()),
        ..EnqueueOptions::default()
    };
    let job = client.enqueue_with("echo", 7, &later).unwrap();
    assert!(!client.enqueue_with("echo", 7, &later).unwrap().is_new());
    assert!(client.cancel_job(&job).unwrap());
    match client.wait_job::<i64>(&job) {
        Err(ClientError::Job(job)) => assert_eq!(job.state, "cancelled"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_jobs_of_a_pool_end_with_their_callbacks_across_a_reload() {
    let daemon = with_jobs("").start();
    let options = Options {
        connections: 2,
        timeout: Some(PATIENCE),
        patience: PATIENCE,
    };
    let pool = Pool::new(&daemon.address().to_string(), options).unwrap();
    let (sender, results) = mpsc::channel();
    for number in 0..40 {
        let sender = sender.clone();
        pool.enqueue_async("echo", number, move |result: Result<i64, ClientError>| {
            sender.send(result.unwrap()).unwrap();
        })
        .unwrap();
        if number == 20 {
            daemon.reload();
        }
    }
    drop(sender);
    pool.join();
    assert_eq!(results.iter().collect::<BTreeSet<i64>>(), (0..40).collect());
}

#[test]
fn status_and_metrics_show_the_store_and_each_queue() {
    let daemon = with_jobs("").start();
    let address = daemon.address().to_string();
    let mut client = Client::connect(&address, Some(PATIENCE)).unwrap();
    let job = client.enqueue("fails", 1).unwrap();
    assert!(client.wait_job::<Value>(&job).is_err());
    let later = EnqueueOptions {
        delay: Some(Duration::from_secs(3600)),
        ..EnqueueOptions::default()
    };
    client.enqueue_with("echo", 1, &later).unwrap();
    wait_for("the counts in the status", PATIENCE, || {
        let jobs = &daemon.status()["jobs"];
        jobs["waiting"] == 1 && jobs["dead"] == 1 && jobs["running"] == 0
    });
    let jobs = daemon.status()["jobs"].clone();
    assert_eq!(
        (&jobs["engine"], &jobs["state"]),
        (&json!("sqlite"), &json!("up"))
    );
    assert!(
        jobs["store"].as_str().unwrap().ends_with("/jobs.db"),
        "{jobs}"
    );
    assert!(
        jobs["pid"].is_i64() && jobs["commit_ms"]["p99"].is_f64(),
        "{jobs}"
    );
    assert_eq!(jobs["instance"].as_str().unwrap().len(), 36);
    let queue = |method: &str| {
        let all = jobs["methods"].as_array().unwrap();
        all.iter()
            .find(|it| it["method"] == method)
            .unwrap()
            .clone()
    };
    assert_eq!(
        (&queue("echo")["waiting"], &queue("echo")["due"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(
        (&queue("fails")["dead"], &queue("fails")["served"]),
        (&json!(1), &json!(true))
    );

    let output = daemon.command(&["metrics"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for sample in [
        "preforkd_jobs_enqueued_total 2",
        "preforkd_jobs_attempts_total{method=\"fails\",outcome=\"command-failed\"} 1",
        "preforkd_jobs_ended_total{method=\"fails\",state=\"dead\",reason=\"attempts\"} 1",
        "preforkd_jobs{state=\"waiting\"} 1",
        "preforkd_jobs_store_up 1",
        "preforkd_jobs_run_seconds_count 1",
        "preforkd_jobs_stale_total 0",
    ] {
        assert!(
            text.lines().any(|line| line == sample),
            "{sample} in\n{text}"
        );
    }
    // Counters survive the end of the jobs process.
    daemon.reload();
    let output = daemon.command(&["metrics"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("\npreforkd_jobs_enqueued_total 2\n"),
        "{text}"
    );
}

#[test]
fn the_example_of_a_queue_reads_each_letter_once() {
    let read =
        |name: &str| fs::read_to_string(source().join("examples/python").join(name)).unwrap();
    let config = read("queue.toml");
    let tables = config.split_once("[jobs]").unwrap().1;
    let daemon = Daemon::builder()
        .config(&format!("[jobs]{tables}"))
        .file("queue_consumer.py", &read("queue_consumer.py"))
        .file("preforkd.py", &read("preforkd.py"))
        .start();
    let producer = source().join("examples/python/queue_producer.py");
    let output = Command::new("python3")
        .arg(producer)
        .arg(daemon.address().port().to_string())
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "20 letters were read\n",
        "{output:?}"
    );
    let letters = fs::read_dir(daemon.dir().join("queue-done")).unwrap();
    let letters: BTreeSet<String> = letters
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    assert_eq!(
        letters,
        (0..20).map(|number| format!("letter {number}")).collect()
    );
}
