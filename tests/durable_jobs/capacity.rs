//! Tests for which capacity jobs are claimed: programs that run several attempts at once, and the workers in turn.

use std::collections::BTreeSet;
use std::fs;

use serde_json::json;

use super::{enqueue_job, wait_job, with_jobs};
use crate::support::{Builder, Client, Daemon, PATIENCE, process, wait_for};

/// One program runs three calls at once.
const PARALLEL: &str = r#"
[pools.p]
command = ["python3", "program.py"]
directory = "."
processes = 1
concurrency = 3
respawn-max-delay = "0s"
[methods.held]
pool = "p"
[methods.die]
pool = "p"
[methods.die.job]
max-crashes = 1
"#;

/// `held` writes its job and waits for the file `go`; `die` ends the program.
const PROGRAM: &str = r#"
import asyncio, os
from preforkd import current, job, method, serve

@method
async def held():
    it = job()
    with open("begun", "a") as begun:
        begun.write(f"{os.getpid()} {it.id}\n")
    while not os.path.exists("go"):
        await asyncio.sleep(0.01)
    call = current()
    return [job().id, it.attempt, call.traceparent if call else None]

@method
async def die():
    os.abort()

serve()
"#;

fn parallel(more: &str) -> Builder {
    with_jobs(&format!("{PARALLEL}{more}")).python_program(PROGRAM)
}

#[track_caller]
fn enqueue(client: &mut Client, method: &str) -> String {
    enqueue_job(client, &json!({"method": method}))
}

/// Waits until `count` lines are in the file that programs write. Returns the words of each line.
#[track_caller]
fn begun(daemon: &Daemon, count: usize) -> Vec<Vec<String>> {
    let path = daemon.dir().join("begun");
    let lines = || -> Vec<Vec<String>> {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        text.lines().map(words).collect()
    };
    wait_for("attempts", PATIENCE, || lines().len() >= count);
    lines()
}

#[test]
fn a_program_runs_several_attempts_at_once_and_each_knows_its_job() {
    let daemon = parallel("").start();
    let mut client = daemon.client();
    let jobs: Vec<String> = (0..5).map(|_| enqueue(&mut client, "held")).collect();
    let at_once = begun(&daemon, 3);
    assert_eq!(at_once.len(), 3, "{at_once:?}");
    let programs: BTreeSet<&String> = at_once.iter().map(|words| &words[0]).collect();
    assert_eq!(programs.len(), 1, "{at_once:?}");
    let first: BTreeSet<&String> = at_once.iter().map(|words| &words[1]).collect();
    assert_eq!(first, jobs[..3].iter().collect(), "first in, first out");
    wait_for("the other two in the status", PATIENCE, || {
        let queues = daemon.status()["jobs"]["methods"].take();
        queues[0]["running"] == 3 && queues[0]["due"] == 2
    });
    daemon.dir().write("go", "");
    for job in &jobs {
        let record = wait_job(&mut client, job);
        assert_eq!(record["result"], json!([job, 1, null]), "{record}");
    }
    assert_eq!(begun(&daemon, 5).len(), 5);
}

#[test]
fn a_program_that_dies_blames_no_job_of_several() {
    let daemon = parallel("[methods.held.job]\nmax-crashes = 3\n")
        .expect_log("was ended by SIGABRT")
        .start();
    let mut client = daemon.client();
    let jobs: Vec<String> = (0..2).map(|_| enqueue(&mut client, "held")).collect();
    begun(&daemon, 2);
    // It is known only that one of the three has ended the program, so the crash counts for each.
    let killer = enqueue(&mut client, "die");
    let dead = wait_job(&mut client, &killer);
    assert_eq!(
        (&dead["reason"], &dead["cause"], &dead["crashes"]),
        (&json!("crashes"), &json!("unclear"), &json!(1)),
        "{dead}"
    );
    begun(&daemon, 4);
    daemon.dir().write("go", "");
    for job in &jobs {
        let record = wait_job(&mut client, job);
        assert_eq!(
            (&record["state"], &record["attempt"], &record["crashes"]),
            (&json!("done"), &json!(2), &json!(1)),
            "{record}"
        );
    }
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[test]
fn each_attempt_gets_the_trace_context_of_its_enqueue() {
    let more = r#"
[trace]
propagate = true
[methods.command]
command = ["sh", "-c", "[ $PREFORKD_ATTEMPT = 2 ] && printf '[\"%s\", \"%s\"]' \"$TRACEPARENT\" \"$TRACESTATE\""]
output = "json"
"#;
    let daemon = parallel(more).start();
    daemon.dir().write("go", "");
    let mut client = daemon.client();
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let mut spans = BTreeSet::new();
    for method in ["command", "held"] {
        let call = json!({"in": "rpc.job.enqueue", "params": {"method": method}, "traceparent": parent,
            "tracestate": "a=1"});
        let stored = client.call(&call)["result"].take();
        let record = wait_job(&mut client, stored["job"].as_str().unwrap());
        let got = match method {
            // The first attempt has failed. So the context is that of the enqueue and of no earlier attempt.
            "command" => {
                assert_eq!(record["attempt"], 2, "{record}");
                assert_eq!(record["result"][1], "a=1", "{record}");
                record["result"][0].clone()
            }
            _ => record["result"][2].clone(),
        };
        let got = got.as_str().unwrap().to_owned();
        assert!(
            got.starts_with(&format!("00-{TRACE}-")) && got.ends_with("-01"),
            "{record}"
        );
        assert_ne!(got, parent, "an attempt has a span of its own");
        assert!(spans.insert(got), "{spans:?}");
    }
}

#[test]
fn jobs_begin_in_a_second_worker_when_the_first_is_full() {
    let config = r#"concurrency = 1
[workers]
count = 2
threads = 2
[methods.held]
command = ["sh", "-c", "echo $$ $PREFORKD_JOB >> begun; while ! [ -e go ]; do sleep 0.02; done"]
directory = "."
"#;
    // `[jobs]` is the last table of these, and `concurrency` its next key.
    let jobs = "[jobs]\nstore = \"sqlite:jobs.db\"\n";
    let daemon = Daemon::builder().config(&format!("{jobs}{config}")).start();
    let mut client = daemon.client();
    let jobs: Vec<String> = (0..3).map(|_| enqueue(&mut client, "held")).collect();
    let running = begun(&daemon, 2);
    let parent = |words: &Vec<String>| process::parent(words[0].parse().unwrap()).unwrap();
    let workers: BTreeSet<i32> = running.iter().map(parent).collect();
    assert_eq!(
        workers,
        daemon
            .ready_workers()
            .into_iter()
            .collect::<BTreeSet<i32>>(),
        "both workers run one"
    );
    wait_for("the third job, which waits", PATIENCE, || {
        let queues = daemon.status()["jobs"]["methods"].take();
        queues[0]["running"] == 2 && queues[0]["due"] == 1
    });
    assert_eq!(begun(&daemon, 2).len(), 2);
    daemon.dir().write("go", "");
    for job in &jobs {
        assert_eq!(wait_job(&mut client, job)["state"], "done");
    }
}
