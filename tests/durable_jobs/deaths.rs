//! Tests that the records of deaths name the job that a worker or program ran.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{NAP, enqueue_job, first_nap, result, with_jobs};
use crate::support::{Daemon, PATIENCE, process, wait_for};

/// A program that dies.
const POOL: &str = r#"
[pools.p]
processes = 1
command = ["python3", "program.py"]
directory = "."
respawn-max-delay = "0s"
[methods.die]
pool = "p"
[methods.die.job]
max-crashes = 1
"#;

const PROGRAM: &str = "
import os
from preforkd import method, serve
@method
def die():
    os.abort()
serve()
";

/// Returns the death record of this kind of process.
#[track_caller]
fn death(daemon: &Daemon, kind: &str) -> Value {
    let mut found = None;
    wait_for("the death record", PATIENCE, || {
        let status = daemon.status();
        let mut deaths = status["deaths"].as_array().unwrap().iter();
        found = deaths.find(|it| it["kind"] == kind).cloned();
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn the_death_of_a_worker_or_program_names_the_job_that_it_ran() {
    let daemon = with_jobs(&format!("{NAP}{POOL}"))
        .python_program(PROGRAM)
        .expect_log("ended by SIGKILL")
        .expect_log("was ended by SIGABRT")
        .start();
    let mut client = daemon.client();
    let of_program = enqueue_job(&mut client, &json!({"method": "die"}));
    let record = death(&daemon, "program");
    assert_eq!(
        (&record["method"], &record["job"]),
        (&json!("die"), &json!(of_program)),
        "{record}"
    );

    let job = enqueue_job(&mut client, &json!({"method": "nap"}));
    let worker = process::parent(first_nap(&daemon)).unwrap();
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let record = death(&daemon, "worker");
    assert_eq!(
        (&record["pid"], &record["method"], &record["job"]),
        (&json!(worker), &json!("nap"), &json!(job)),
        "{record}"
    );
    daemon.wait_log(&format!(" job={job}"));
    let cancel = json!({"job": job});
    result(&mut daemon.client(), "rpc.job.cancel", &cancel);
}

#[test]
fn the_death_of_a_worker_that_ran_a_call_names_no_job() {
    let config = "[methods.sleep]\nbuiltin = \"sleep\"\n";
    let daemon = with_jobs(config).expect_log("ended by SIGKILL").start();
    let mut client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 60}).to_string());
    let worker = daemon.wait_running(1);
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let record = death(&daemon, "worker");
    assert_eq!(
        (&record["method"], &record["job"]),
        (&json!("sleep"), &Value::Null),
        "{record}"
    );
}
