//! Tests `stack-signal`: the log has the stack of a slow pool program, and a program that does not handle the signal
//! dies.

use serde_json::json;

use super::{evidence, record};
use crate::support::Daemon;

const CONFIG: &str = r#"
[workers]
count = 1
[slow-log]
threshold = "200ms"
[methods.nap]
pool = "p"
[pools.p]
processes = 1
directory = "."
stack-signal = "USR2"
respawn-max-delay = "0s"
"#;

const PROGRAM: &str = r#"
import time
from preforkd import method, serve
def deep_inside(seconds):
    time.sleep(seconds)
@method
def nap(seconds):
    deep_inside(seconds)
    return seconds
serve()
"#;

#[test]
fn a_python_program_writes_its_stack_beside_the_call_and_serves_on() {
    let daemon = Daemon::builder()
        .config(&format!(
            "{CONFIG}command = [\"python3\", \"program.py\"]\n"
        ))
        .python_program(PROGRAM)
        .start();
    let mut client = daemon.client();
    assert_eq!(client.call(&json!({"in": "nap", "params": 1}))["result"], 1);
    let found = record(&daemon, "nap", |it| it["outcome"] == "done");
    let text = found["evidence"].as_str().unwrap();
    assert!(text.ends_with("; it got SIGUSR2"), "{text}");
    daemon.wait_log("in deep_inside");
    let log = daemon.log();
    let stack = log
        .lines()
        .find(|line| line.contains("in deep_inside"))
        .unwrap();
    let call = found["call"].as_str().unwrap();
    assert!(stack.ends_with(&format!(" call={call}")), "{stack}");
    let pid = |daemon: &Daemon| daemon.status()["pools"][0]["list"][0]["pid"].clone();
    let before = pid(&daemon);
    assert_eq!(client.call(&json!({"in": "nap", "params": 0}))["result"], 0);
    assert_eq!(pid(&daemon), before);
}

#[test]
fn a_program_without_a_handler_dies_and_is_named() {
    let script = r#"printf '\x10\0\0\0{"out": "ready"}' >&3; cat <&3 >/dev/null; true"#;
    let daemon = Daemon::builder()
        .config(&format!(
            "{CONFIG}command = [\"bash\", \"-c\", '''{script}''']\n"
        ))
        .start();
    let mut client = daemon.client();
    let answer = client.call(&json!({"in": "nap", "params": 1}));
    assert_eq!(answer["out"], "error", "{answer}");
    daemon.wait_log(
        "was ended by SIGUSR2, the stack-signal of its pool, which it must handle while it ran nap",
    );
    assert!(evidence(&daemon, "nap").starts_with("pool p program bash "));
    let end = record(&daemon, "nap", |it| it["done"] == true);
    assert_eq!(end["outcome"], "crashed");
    let metrics = String::from_utf8(daemon.command(&["metrics"]).stdout).unwrap();
    let counted = "preforkd_pool_program_exits_total{pool=\"p\",reason=\"signal\"} 1\n";
    assert!(metrics.contains(counted), "{metrics}");
}
