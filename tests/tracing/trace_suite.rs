//! Runs the test suite of W3C Trace Context against a pool program behind `POST /METHOD`.
//!
//! The suite calls the program, and the program calls back with its context. It is no package, so
//! `TRACE_CONTEXT_SUITE` names the directory with its `test.py`. It needs Python with aiohttp, which
//! `TRACE_CONTEXT_PYTHON` names.

use std::process::Command;

use crate::support::Daemon;

/// Calls back as often as it is asked to, with a parent id of its own for each request.
const PROGRAM: &str = r#"
import json, urllib.request
from preforkd import current, method, serve

@method(spread=False)
def test(wanted):
    call = current()
    for request in wanted:
        headers = {"content-type": "application/json", "traceparent": call.child()}
        if call.tracestate:
            headers["tracestate"] = call.tracestate
        body = json.dumps(request["arguments"]).encode()
        urllib.request.urlopen(urllib.request.Request(request["url"], body, headers), timeout=5).read()

serve()
"#;

const CONFIG: &str = r#"
[trace]
[pools.suite]
command = ["python3", "program.py"]
directory = "."
processes = 2
[methods.test]
pool = "suite"
"#;

#[test]
#[ignore = "needs the suite: TRACE_CONTEXT_SUITE names its directory, TRACE_CONTEXT_PYTHON a Python with aiohttp"]
fn the_suite_of_the_specification_passes() {
    let suite = std::env::var("TRACE_CONTEXT_SUITE").expect("TRACE_CONTEXT_SUITE is set");
    let python = std::env::var("TRACE_CONTEXT_PYTHON").unwrap_or_else(|_| "python3".into());
    let daemon = Daemon::builder()
        .config(CONFIG)
        .python_program(PROGRAM)
        .start();
    // The suite can only be given a port, so this one must be free again when it starts.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let run = Command::new(python)
        .current_dir(suite)
        .arg("test.py")
        .arg(format!("http://{}/test", daemon.address()))
        .env("STRICT_LEVEL", "2")
        .env("SPEC_LEVEL", "2")
        .env("HARNESS_PORT", port)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&run.stderr);
    println!("{told}");
    assert!(run.status.success(), "{told}");
    assert!(!told.contains("skipped"), "{told}");
}
