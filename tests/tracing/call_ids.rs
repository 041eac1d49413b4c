//! Tests the ids of calls: in the environment of commands and pool programs, and in death records.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{one_sided, result};
use crate::support::{Builder, Daemon, PATIENCE, wait_for};

const CONFIG: &str = r#"
[workers]
count = 1
respawn-max-delay = "0s"
[methods.mark]
command = ["sh", "-c", "printf %s \"$PREFORKD_CALL\""]
[methods.sleep]
builtin = "sleep"
"#;

/// A pool whose method answers with the mark of its program, or sleeps.
const POOL: &str = r#"
[pools.p]
command = ["python3", "program.py"]
directory = "."
respawn-max-delay = "0s"
processes = 1
[methods.pooled]
pool = "p"
"#;
const PROGRAM: &str = r#"
import os, time
from preforkd import method, serve
@method
def pooled(nap=0):
    time.sleep(nap)
    return os.environ["PREFORKD_CALL"]
serve()
"#;

fn with_pool() -> Builder {
    Daemon::builder()
        .config(&format!("{CONFIG}{POOL}"))
        .python_program(PROGRAM)
}

#[test]
fn a_command_gets_the_number_of_its_call() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let worker = daemon.ready_workers()[0];
    let mut client = daemon.client();
    assert_eq!(
        result(&mut client, "mark", &Value::Null),
        format!("{worker}.1")
    );
    client.call(&json!({"in": "ping"}));
    client.call(&json!({"in": "nope"}));
    client.call_text("no JSON");
    assert_eq!(
        result(&mut client, "mark", &Value::Null),
        format!("{worker}.5"),
        "refused calls have a number too"
    );
    let call = json!({"jsonrpc": "2.0", "method": "mark"});
    let numbered = |id: u32| {
        let mut call = call.clone();
        call["id"] = id.into();
        call
    };
    let answers = client.call(&json!([numbered(1), call, numbered(2)]));
    let mut marks: Vec<Value> = (answers.as_array().unwrap().iter())
        .map(|answer| answer["result"].clone())
        .collect();
    marks.sort_by_key(ToString::to_string);
    assert_eq!(marks, [6, 8].map(|number| format!("{worker}.{number}")));
}

#[test]
fn a_forwarded_command_has_a_number_of_its_runner() {
    let config = CONFIG.replace("count = 1", "count = 2\nthreads = 1");
    let (daemon, [home, other], mut clients) = one_sided(&config, 2);
    clients[0].send(&json!({"in": "sleep", "params": 1}).to_string());
    wait_for("a running call", PATIENCE, || {
        let status = daemon.status();
        let workers = status["workers"].as_array().unwrap();
        let home = workers.iter().find(|worker| worker["pid"] == home);
        home.is_some_and(|home| home["running"] == 1)
    });
    let mark = result(&mut clients[1], "mark", &Value::Null);
    assert_eq!(mark, format!("{other}.1"));
    clients[0].recv_json();
}

#[test]
fn a_pool_program_keeps_a_mark_that_no_call_has() {
    let daemon = with_pool().start();
    let pool = daemon.pool();
    let mut client = daemon.client();
    for _ in 0..3 {
        let mark = result(&mut client, "pooled", &json!([]));
        assert_eq!(mark, format!("{pool}.1000000000000000"));
    }
}

#[test]
fn death_records_name_the_call() {
    let daemon = with_pool().expect_log("ended by SIG").start();
    let (worker, mut client) = (daemon.ready_workers()[0], daemon.client());
    let dies = |pid: i32| kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let call_of = |kind: &str, count: usize| {
        let deaths = || daemon.status()["deaths"].as_array().unwrap().clone();
        wait_for("the death record", PATIENCE, || deaths().len() == count);
        let death = deaths().into_iter().find(|death| death["kind"] == kind);
        death.map(|death| (death["method"].clone(), death["call"].clone()))
    };
    client.call(&json!({"in": "ping"}));
    client.send(&json!({"in": "pooled", "params": 60}).to_string());
    daemon.wait_busy(1);
    let program = daemon.status()["pools"][0]["list"][0]["pid"].clone();
    dies(program.as_i64().unwrap() as i32);
    assert_eq!(client.recv_json()["result"]["name"], "crashed");
    let named = |method: &str, number: u32| {
        let call = format!("{worker}.{number}");
        Some((Value::from(method), Value::from(call)))
    };
    assert_eq!(call_of("program", 1), named("pooled", 2));
    client.send(&json!({"in": "sleep", "params": 60, "id": 1}).to_string());
    daemon.wait_running(1);
    dies(worker);
    assert_eq!(client.recv_json()["result"]["name"], "crashed");
    assert_eq!(call_of("worker", 2), named("sleep", 3));
    assert!(daemon.log().contains(&format!(" call={worker}.3")));
}
