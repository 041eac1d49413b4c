//! Tests the attempts of jobs: by commands, pool programs and functions, their retries, and what happens when a
//! process dies or drains.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{enqueue_job, jobs_process};
use crate::support::installed::{Installed, upgrade};
use crate::support::{Builder, Client, Daemon, PATIENCE, example, process, wait_for};

/// The programs of the methods write a line for each attempt into the file `attempts`.
const CONFIG: &str = r#"
[workers]
count = 2
threads = 2
respawn-max-delay = "0s"
[jobs]
store = "sqlite:jobs.db"
concurrency = 2
backoff = "10ms"
max-crashes = 2
[methods.show]
command = ["sh", "-c", "printf '%s %s' $PREFORKD_JOB $PREFORKD_ATTEMPT"]
[methods.fail]
command = ["sh", "-c", "echo x >> attempts; exit 3"]
directory = "."
[methods.second]
command = ["sh", "-c", "[ $PREFORKD_ATTEMPT = 2 ] && printf done"]
[methods.nap]
command = ["sh", "-c", "echo $$ >> attempts; exec sleep 60"]
directory = "."
[methods.short]
command = ["sh", "-c", "echo $$ >> attempts; sleep 1; printf done"]
directory = "."
"#;

const POOL: &str = r#"
[pools.p]
command = ["python3", "program.py"]
directory = "."
respawn-max-delay = "0s"
processes = 1
[methods.pooled]
pool = "p"
[methods.die]
pool = "p"
"#;
const PROGRAM: &str = r#"
import os, time
from preforkd import job, method, serve
@method
def pooled():
    it = job()
    return it and [it.id, it.attempt, it.max_attempts, it.is_last]
@method
def die():
    os.abort()
serve()
"#;

fn with_pool() -> Builder {
    Daemon::builder()
        .config(&format!("{CONFIG}{POOL}"))
        .python_program(PROGRAM)
}

fn record(client: &mut Client, id: &str) -> Value {
    let get = json!({"in": "rpc.job.get", "params": {"job": id}});
    client.call(&get)["result"].take()
}

/// Enqueues a job that ends its worker, and returns its id. The job can run, and end the worker of this client, before
/// the answer is sent. Then the client sends the enqueue again.
#[track_caller]
fn enqueue_deadly(daemon: &Daemon, job: &Value) -> String {
    let mut job = job.clone();
    job["id"] = json!("018f0000-0000-7000-8000-00000000dead");
    let request = json!({"in": "rpc.job.enqueue", "params": job});
    let mut answer = daemon.client().call(&request);
    for _ in 0..10 {
        if answer["result"]["name"] != "crashed" {
            break;
        }
        answer = daemon.client().call(&request);
    }
    let id = answer["result"]["job"].as_str();
    id.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Waits until a job has ended, and returns its record.
#[track_caller]
fn wait_ended(client: &mut Client, id: &str) -> Value {
    let mut last = Value::Null;
    wait_for(&format!("the end of {id}"), PATIENCE, || {
        last = record(client, id);
        last["ended"] == true
    });
    last
}

/// Waits until a job has ended, with a new connection for each question, because the job ends workers.
#[track_caller]
fn wait_ended_anew(daemon: &Daemon, id: &str, deadline: Duration) -> Value {
    let mut last = Value::Null;
    wait_for("the end of the job", deadline, || {
        last = record(&mut daemon.client(), id);
        last["ended"] == true
    });
    last
}

/// Returns the lines that programs have written, once there are `count`.
#[track_caller]
fn attempts(daemon: &Daemon, count: usize) -> Vec<String> {
    let path = daemon.dir().join("attempts");
    let lines = || -> Vec<String> {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    wait_for("attempts", PATIENCE, || lines().len() >= count);
    lines()
}

fn kill_with(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[test]
fn a_command_gets_the_id_of_its_job_and_the_number_of_the_attempt() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "show"}));
    let ended = wait_ended(&mut client, &id);
    assert_eq!(ended["state"], "done");
    assert_eq!(ended["result"], format!("{id} 1"));
    let call = client.call(&json!({"in": "show"}));
    assert_eq!(call["result"], " ", "a call has no such variables");
}

#[test]
fn a_pool_program_gets_the_job_in_its_frame() {
    let daemon = with_pool().start();
    let mut client = daemon.client();
    let job = json!({"method": "pooled", "max_attempts": 1});
    let id = enqueue_job(&mut client, &job);
    let ended = wait_ended(&mut client, &id);
    assert_eq!(ended["result"], json!([id, 1, 1, true]), "{ended}");
    let call = client.call(&json!({"in": "pooled", "params": []}));
    assert_eq!(call["result"], Value::Null);
}

#[test]
fn a_failed_attempt_is_repeated_until_the_last_one() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "second"}));
    let ended = wait_ended(&mut client, &id);
    assert_eq!(
        (&ended["result"], &ended["attempt"]),
        (&json!("done"), &json!(2))
    );
    let job = json!({"method": "fail", "max_attempts": 3});
    let id = enqueue_job(&mut client, &job);
    let ended = wait_ended(&mut client, &id);
    assert_eq!(ended["state"], "dead");
    assert_eq!(
        (&ended["reason"], &ended["attempt"]),
        (&json!("attempts"), &json!(3))
    );
    assert_eq!(ended["error"]["name"], "command-failed");
    assert_eq!(attempts(&daemon, 3).len(), 3);
    daemon.wait_log("job dead after 3 attempts: see preforkd job show");
}

#[test]
fn an_attempt_is_killed_at_its_timeout() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let job = json!({"method": "nap", "timeout_ms": 200, "max_attempts": 1});
    let id = enqueue_job(&mut client, &job);
    let ended = wait_ended(&mut client, &id);
    assert_eq!(ended["state"], "dead");
    assert_eq!(ended["error"]["code"], -32001, "{ended}");
    let pid: i32 = attempts(&daemon, 1)[0].parse().unwrap();
    assert!(!process::runs(pid));
}

#[test]
fn a_cancel_ends_a_running_attempt() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "nap"}));
    let pid: i32 = attempts(&daemon, 1)[0].parse().unwrap();
    assert_eq!(record(&mut client, &id)["state"], "running");
    let cancel = json!({"in": "rpc.job.cancel", "params": {"job": id}});
    assert_eq!(client.call(&cancel)["result"], true);
    assert_eq!(wait_ended(&mut client, &id)["state"], "cancelled");
    assert!(!process::runs(pid));
    assert_eq!(client.call(&cancel)["result"], false);
}

#[test]
fn an_attempt_whose_worker_is_killed_begins_again_at_once() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "nap"}));
    let pid: i32 = attempts(&daemon, 1)[0].parse().unwrap();
    kill_with(process::parent(pid).unwrap(), Signal::SIGKILL);
    let pids = attempts(&daemon, 2);
    assert!(!process::runs(pid));
    let mut client = daemon.client();
    let running = record(&mut client, &id);
    assert_eq!(
        (&running["attempt"], &running["crashes"]),
        (&json!(2), &json!(0))
    );
    let cancel = json!({"in": "rpc.job.cancel", "params": {"job": id}});
    client.call(&cancel);
    assert_eq!(wait_ended(&mut client, &id)["state"], "cancelled");
    assert!(!process::runs(pids[1].parse().unwrap()));
}

#[test]
fn a_job_that_crashes_its_worker_is_dead_after_max_crashes() {
    let config = CONFIG.split("[methods.show]").next().unwrap();
    let daemon = Daemon::builder()
        .config(config)
        .program(example("misbehave"))
        .expect_log("ended by SIGABRT")
        .start();
    let mut client = daemon.client();
    // A function runs as a job too, also an inline one.
    let id = enqueue_job(&mut client, &json!({"method": "block", "params": 0}));
    assert_eq!(wait_ended(&mut client, &id)["result"], 0);
    let job = json!({"method": "crash", "params": "abort"});
    let id = enqueue_deadly(&daemon, &job);
    let last = wait_ended_anew(&daemon, &id, PATIENCE);
    assert_eq!(
        (&last["state"], &last["reason"]),
        (&json!("dead"), &json!("crashes"))
    );
    assert_eq!((&last["crashes"], &last["attempt"]), (&json!(2), &json!(2)));
    assert_eq!(last["error"]["name"], "crashed");
    let quarantined = daemon.status()["quarantine"].clone();
    assert!(
        quarantined.as_array().is_none_or(Vec::is_empty),
        "{quarantined}"
    );
}

#[test]
fn a_job_that_exits_its_worker_is_dead_after_max_crashes() {
    let daemon = misbehaving("max-crashes = 2\n")
        .expect_log("exited without an order")
        .start();
    let job = json!({"method": "exit", "params": [0, 0]});
    let id = enqueue_deadly(&daemon, &job);
    let last = wait_ended_anew(&daemon, &id, PATIENCE);
    assert_eq!(
        (&last["state"], &last["reason"], &last["crashes"]),
        (&json!("dead"), &json!("crashes"), &json!(2))
    );
}

#[test]
fn a_job_that_crashes_its_program_is_dead_after_max_crashes() {
    let daemon = with_pool().expect_log("was ended by SIGABRT").start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "die"}));
    let ended = wait_ended(&mut client, &id);
    assert_eq!(
        (&ended["reason"], &ended["crashes"]),
        (&json!("crashes"), &json!(2))
    );
    let id = enqueue_job(&mut client, &json!({"method": "pooled"}));
    assert_eq!(wait_ended(&mut client, &id)["state"], "done");
}

#[test]
fn a_reload_lets_attempts_end_and_interrupts_those_that_take_too_long() {
    let config = CONFIG.replace("max-crashes = 2", "max-crashes = 2\ndrain-timeout = \"2s\"");
    let daemon = Daemon::builder().config(&config).start();
    let mut client = daemon.client();
    let short = enqueue_job(&mut client, &json!({"method": "short"}));
    let nap = enqueue_job(&mut client, &json!({"method": "nap"}));
    attempts(&daemon, 2);
    daemon.reload();
    let mut client = daemon.client();
    let ended = wait_ended(&mut client, &short);
    assert_eq!(
        (&ended["state"], &ended["attempt"]),
        (&json!("done"), &json!(1))
    );
    let pids = attempts(&daemon, 3);
    let mut running = Value::Null;
    wait_for("the next attempt", PATIENCE, || {
        running = record(&mut client, &nap);
        running["state"] == "running" && running["interruptions"] == 1
    });
    assert_eq!(
        running["attempt"], 1,
        "an interrupted attempt is not counted"
    );
    let cancel = json!({"in": "rpc.job.cancel", "params": {"job": nap}});
    client.call(&cancel);
    assert_eq!(wait_ended(&mut client, &nap)["state"], "cancelled");
    assert!(!process::runs(pids[2].parse().unwrap()));
}

#[test]
fn an_outcome_is_kept_while_the_jobs_process_is_replaced() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "short"}));
    attempts(&daemon, 1);
    let before = jobs_process(&daemon);
    kill_with(before, Signal::SIGKILL);
    let ended = wait_ended(&mut client, &id);
    assert_eq!(
        (&ended["result"], &ended["attempt"]),
        (&json!("done"), &json!(1))
    );
    assert_eq!(attempts(&daemon, 1).len(), 1, "it ran once");
    assert_ne!(jobs_process(&daemon), before);
}

#[test]
fn attempts_of_a_worker_are_limited_by_concurrency() {
    let config = CONFIG
        .replace("count = 2", "count = 1")
        .replace("concurrency = 2", "concurrency = 1");
    let daemon = Daemon::builder().config(&config).start();
    let mut client = daemon.client();
    let [one, two] = [(); 2].map(|()| enqueue_job(&mut client, &json!({"method": "nap"})));
    attempts(&daemon, 1);
    // A call still gets the other thread.
    assert_eq!(client.call(&json!({"in": "show"}))["result"], " ");
    assert_eq!(record(&mut client, &two)["state"], "waiting");
    let cancel = |job: &str| json!({"in": "rpc.job.cancel", "params": {"job": job}});
    client.call(&cancel(&one));
    attempts(&daemon, 2);
    client.call(&cancel(&two));
    assert_eq!(wait_ended(&mut client, &two)["state"], "cancelled");
}

#[test]
fn a_stop_interrupts_attempts_and_the_next_start_runs_them_again() {
    let config = CONFIG.replace("max-crashes = 2", "max-crashes = 2\ndrain-timeout = \"1s\"");
    let mut daemon = Daemon::builder().config(&config).start();
    let id = enqueue_job(&mut daemon.client(), &json!({"method": "nap"}));
    let pid: i32 = attempts(&daemon, 1)[0].parse().unwrap();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    let daemon = daemon.start_again();
    assert!(!process::runs(pid));
    attempts(&daemon, 2);
    let mut client = daemon.client();
    let running = record(&mut client, &id);
    assert_eq!(
        (&running["attempt"], &running["interruptions"]),
        (&json!(1), &json!(1))
    );
    let cancel = json!({"in": "rpc.job.cancel", "params": {"job": id}});
    client.call(&cancel);
    assert_eq!(wait_ended(&mut client, &id)["state"], "cancelled");
}

#[test]
fn a_thousand_jobs_run_once_each() {
    let daemon = Daemon::builder()
        .config(&CONFIG.replace(
            "[methods.show]",
            "[methods.echo]\nbuiltin = \"echo\"\n[methods.show]",
        ))
        .start();
    let mut client = daemon.client();
    let jobs: Vec<Value> = (0..100)
        .map(|number| json!({"method": "echo", "params": number}))
        .collect();
    let mut ids = Vec::new();
    for _ in 0..10 {
        let answer = client.call(&json!({"in": "rpc.job.enqueue", "params": jobs}));
        let stored = answer["result"].as_array().unwrap().clone();
        ids.extend(
            stored
                .into_iter()
                .map(|job| job["job"].as_str().unwrap().to_owned()),
        );
    }
    for (number, id) in ids.iter().enumerate() {
        let ended = wait_ended(&mut client, id);
        assert_eq!(
            (&ended["result"], &ended["attempt"]),
            (&json!(number % 100), &json!(1))
        );
    }
}

/// A server of `examples/misbehave` with one worker, and more keys of `[jobs]`.
fn misbehaving(keys: &str) -> Builder {
    let config = format!(
        "[workers]\ncount = 1\nthreads = 3\nrespawn-max-delay = \"0s\"\n\
         [jobs]\nstore = \"sqlite:jobs.db\"\nconcurrency = 2\nbackoff = \"10ms\"\n{keys}"
    );
    Daemon::builder()
        .config(&config)
        .program(example("misbehave"))
}

#[test]
fn a_job_is_not_blamed_for_the_crash_of_a_call() {
    let daemon = misbehaving("").expect_log("ended by SIGABRT").start();
    let mut client = daemon.client();
    let job = json!({"method": "wait", "params": 1000});
    let id = enqueue_job(&mut client, &job);
    wait_for("the attempt", PATIENCE, || {
        record(&mut client, &id)["state"] == "running"
    });
    daemon.wait_running(1);
    client.send(&json!({"in": "crash", "params": "abort"}).to_string());
    let last = wait_ended_anew(&daemon, &id, PATIENCE);
    assert_eq!(
        (&last["result"], &last["attempt"]),
        (&json!(1000), &json!(1))
    );
    assert_eq!(
        (&last["crashes"], &last["interruptions"]),
        (&json!(0), &json!(1))
    );
}

#[test]
fn a_worker_is_replaced_if_an_attempt_ignores_its_timeout() {
    let daemon = misbehaving("").start();
    let worker = daemon.ready_workers()[0];
    let job = json!({"method": "hang", "timeout_ms": 100, "max_attempts": 1});
    let id = enqueue_job(&mut daemon.client(), &job);
    let last = wait_ended_anew(&daemon, &id, 2 * PATIENCE);
    assert_eq!(
        (&last["state"], &last["attempt"]),
        (&json!("dead"), &json!(1))
    );
    assert_eq!(last["error"]["name"], "timeout", "{last}");
    assert!(!process::runs(worker));
    daemon.wait_log("an attempt of a job still runs 10 s after its timeout");
}

#[test]
fn an_attempt_may_drain_longer_than_calls() {
    let config = CONFIG
        .replace("threads = 2", "threads = 2\ndrain-timeout = \"1s\"")
        .replace(
            "max-crashes = 2",
            "max-crashes = 2\ndrain-timeout = \"20s\"",
        )
        .replace("sleep 1;", "sleep 4;");
    let daemon = Daemon::builder().config(&config).start();
    let id = enqueue_job(&mut daemon.client(), &json!({"method": "short"}));
    attempts(&daemon, 1);
    // The connection of this client has no call, and is handed over.
    let mut client = daemon.client();
    daemon.reload();
    let ended = wait_ended(&mut client, &id);
    assert_eq!(
        (&ended["result"], &ended["attempt"]),
        (&json!("done"), &json!(1))
    );
    assert_eq!(ended["interruptions"], 0);
}

#[test]
fn attempts_take_the_concurrency_of_their_method() {
    let config = CONFIG
        .replace("count = 2", "count = 1")
        .replace("[methods.nap]", "[methods.nap]\nconcurrency = 1");
    let daemon = Daemon::builder().config(&config).start();
    let mut client = daemon.client();
    let [one, two] = [(); 2].map(|()| enqueue_job(&mut client, &json!({"method": "nap"})));
    attempts(&daemon, 1);
    let call = client.call(&json!({"in": "nap"}));
    assert_eq!(call["result"]["name"], "overloaded", "{call}");
    // Another queue does not wait for it.
    let id = enqueue_job(&mut client, &json!({"method": "show"}));
    assert_eq!(wait_ended(&mut client, &id)["state"], "done");
    assert_eq!(record(&mut client, &two)["state"], "waiting");
    for job in [one, two] {
        client.call(&json!({"in": "rpc.job.cancel", "params": {"job": job}}));
        assert_eq!(wait_ended(&mut client, &job)["state"], "cancelled");
    }
}

#[test]
fn a_pool_process_that_stays_at_a_reload_runs_jobs_of_both_generations() {
    let program = format!(
        "{}\n",
        PROGRAM.replace(
            "@method\ndef die",
            "@method\ndef slow():\n    open('attempts', 'a').write('x\\n')\n    time.sleep(2)\n    \
             return job().attempt\n@method\ndef die",
        )
    );
    let pool = POOL.replace("processes = 1", "processes = 2\nreload = \"keep\"");
    let daemon = Daemon::builder()
        .config(&format!("{CONFIG}{pool}[methods.slow]\npool = \"p\"\n"))
        .python_program(&program)
        .start();
    let mut client = daemon.client();
    let slow = enqueue_job(&mut client, &json!({"method": "slow"}));
    attempts(&daemon, 1);
    let pool = daemon.pool();
    daemon.reload();
    assert_eq!(daemon.pool(), pool);
    let mut client = daemon.client();
    let job = json!({"method": "pooled", "max_attempts": 1});
    let id = enqueue_job(&mut client, &job);
    let ended = wait_ended(&mut client, &id);
    assert_eq!(ended["result"], json!([id, 1, 1, true]), "{ended}");
    let ended = wait_ended(&mut client, &slow);
    assert_eq!(
        (&ended["result"], &ended["state"]),
        (&json!(1), &json!("done"))
    );
    assert_eq!(attempts(&daemon, 1).len(), 1, "it ran once");
}

#[test]
fn an_attempt_continues_across_an_upgrade() {
    let installed = Installed::new();
    let config = CONFIG.replace("sleep 1;", "sleep 3;");
    let daemon = installed.daemon(&config).start();
    let mut client = daemon.client();
    let id = enqueue_job(&mut client, &json!({"method": "short"}));
    attempts(&daemon, 1);
    installed.renew();
    upgrade(&daemon);
    let mut client = daemon.client();
    let ended = wait_ended(&mut client, &id);
    assert_eq!(
        (&ended["result"], &ended["attempt"]),
        (&json!("done"), &json!(1))
    );
    assert_eq!(attempts(&daemon, 1).len(), 1, "it ran once");
    let id = enqueue_job(&mut client, &json!({"method": "show"}));
    assert_eq!(wait_ended(&mut client, &id)["state"], "done");
}
