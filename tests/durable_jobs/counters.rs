//! Tests the counters of jobs that end without an attempt, or with their server, and the log line about a queue without
//! a method.

use std::time::Duration;

use serde_json::json;

use super::{
    JOBS, LATER, NAP, enqueue_job, first_nap, kill_all, later, result, wait_metric, with_jobs,
};
use crate::support::{PATIENCE, pass, wait_for};

#[test]
fn a_queue_without_a_method_is_logged_once() {
    let daemon = with_jobs("[methods.old]\nbuiltin = \"echo\"\n").start();
    let mut client = daemon.client();
    enqueue_job(
        &mut client,
        &json!({"method": "old", "params": 1, "delay_ms": LATER}),
    );
    enqueue_job(&mut client, &later(&json!(1)));
    let served = |wanted: bool| {
        wait_for("the queue in the status", PATIENCE, || {
            let jobs = daemon.status()["jobs"].take();
            let mut queues = jobs["methods"].as_array().unwrap().iter();
            queues.any(|it| it["method"] == "old" && it["served"] == wanted)
        });
    };
    served(true);
    let line = "queue has jobs, but no method of this name exists method=old waiting=1";
    assert!(!daemon.log().contains("queue has jobs"));
    daemon.reload_with(JOBS);
    daemon.wait_log(line);
    served(false);
    // The counts are read once per second.
    pass(Duration::from_millis(2_500));
    assert_eq!(daemon.log().matches("queue has jobs").count(), 1);
}

#[test]
fn a_cancelled_job_is_counted_whether_it_waits_or_runs() {
    let daemon = with_jobs(NAP).start();
    let mut client = daemon.client();
    let waiting = enqueue_job(
        &mut client,
        &json!({"method": "echo", "params": 1, "delay_ms": LATER}),
    );
    let running = enqueue_job(&mut client, &json!({"method": "nap"}));
    first_nap(&daemon);
    for job in [waiting, running] {
        let cancel = json!({"job": job});
        assert_eq!(result(&mut client, "rpc.job.cancel", &cancel), true);
        // A second cancel counts nothing.
        result(&mut client, "rpc.job.cancel", &cancel);
    }
    for method in ["echo", "nap"] {
        let labels = format!("method=\"{method}\",state=\"cancelled\",reason=\"\"");
        wait_metric(&daemon, &format!("preforkd_jobs_ended_total{{{labels}}} 1"));
    }
}

#[test]
fn an_attempt_that_was_lost_with_its_server_is_counted_by_the_next_one() {
    let mut daemon = with_jobs(&format!("{NAP}[methods.nap.job]\nmax-attempts = 1\n")).start();
    let job = enqueue_job(&mut daemon.client(), &json!({"method": "nap"}));
    first_nap(&daemon);
    kill_all(&mut daemon);
    let daemon = daemon.start_again();
    for line in [
        "preforkd_jobs_attempts_total{method=\"nap\",outcome=\"lost\"} 1",
        "preforkd_jobs_ended_total{method=\"nap\",state=\"dead\",reason=\"attempts\"} 1",
    ] {
        wait_metric(&daemon, line);
    }
    let record = result(&mut daemon.client(), "rpc.job.get", &json!({"job": job}));
    assert_eq!(record["cause"], "lost", "{record}");
}
