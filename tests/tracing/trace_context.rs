//! Tests trace context: where it is read, to whom it is passed, and that nothing of it happens without `[trace]`.

use std::io::{Read, Write};
use std::net::TcpStream;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{one_sided, result};
use crate::support::{Client, Daemon, Dir, PATIENCE, wait_for};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const OTHER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// Methods that answer with the context that they got: a command, and pool programs that use the Python helper, and one
/// that does not.
const METHODS: &str = r#"
[methods.command]
command = ["sh", "-c", "printf '[\"%s\", \"%s\", \"%s\"]' \"$PREFORKD_CALL\" \"$TRACEPARENT\" \"$TRACESTATE\""]
stdin = "none"
output = "json"
environment = { TRACEPARENT = "configured" }
[methods.sleep]
builtin = "sleep"
[methods.fail]
command = ["false"]
[methods.pooled]
pool = "one"
[methods.waits]
pool = "several"
[methods.frame]
pool = "plain"
[pools.one]
processes = 1
command = ["python3", "program.py"]
directory = "."
[pools.several]
processes = 1
command = ["python3", "program.py"]
directory = "."
concurrency = 4
[pools.plain]
processes = 1
command = ["python3", "plain.py"]
directory = "."
ready = "alive"
"#;

const PROGRAM: &str = r#"
import asyncio
from preforkd import current, method, serve

def seen():
    call = current()
    return [call.call, call.traceparent, call.tracestate, [call.child(), call.child()]]

@method(spread=False)
def pooled(params):
    if params == "raise":
        raise ValueError(params)
    return seen()

@method(spread=False)
async def waits(params):
    if params == "raise":
        raise ValueError(params)
    before = seen()[:3]
    await asyncio.sleep(0.05)
    assert seen()[:3] == before
    return seen()

serve()
"#;

/// Answers with the text of the call.
const PLAIN: &str = r#"
import json, socket, struct
calls = socket.socket(fileno=3)
while True:
    head = calls.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        break
    body = calls.recv(struct.unpack("<I", head)[0], socket.MSG_WAITALL)
    answer = json.dumps({"out": "frame", "result": body.decode()}).encode()
    calls.sendall(struct.pack("<I", len(answer)) + answer)
"#;

fn daemon(keys: &str) -> Daemon {
    Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n{METHODS}{keys}"))
        .python_program(PROGRAM)
        .file("plain.py", PLAIN)
        .start()
}

fn traced() -> Daemon {
    daemon("[trace]\n")
}

/// The body of the answer to a POST with these headers.
fn post(daemon: &Daemon, path: &str, headers: &[&str], body: &str) -> Value {
    let mut stream = TcpStream::connect(daemon.address()).unwrap();
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    serde_json::from_str(body).unwrap()
}

/// The parent and the state that a call of `command` got.
fn passed(result: &Value) -> (String, String) {
    let text = |index: usize| result[index].as_str().unwrap_or_default().to_owned();
    (text(1), text(2))
}

/// Checks that a call continues `from` with a span of its own.
#[track_caller]
fn assert_continues(parent: &str, from: &str) {
    assert_eq!(parent.len(), 55, "{parent}");
    assert_eq!((&parent[..36], &parent[52..]), (&from[..36], &from[52..]));
    assert_ne!(parent, from);
}

/// Checks that a call begins a trace.
#[track_caller]
fn assert_begins(parent: &str) {
    assert_eq!(parent.len(), 55, "{parent}");
    assert!(
        !parent.contains(TRACE) && parent.ends_with("-02"),
        "{parent}"
    );
}

#[test]
fn context_is_read_from_headers_members_and_metadata() {
    let daemon = traced();
    let mut client = daemon.client();
    let header = format!("TraceParent: \t{PARENT} ");
    let headers = [
        header.as_str(),
        "tracestate: a=1",
        "tracestate:",
        "tracestate: b=2 \t",
    ];
    let (parent, state) = passed(&post(&daemon, "/command", &headers, ""));
    assert_continues(&parent, PARENT);
    assert_eq!(state, "a=1,b=2");

    let call = json!({"in": "command", "traceparent": PARENT, "tracestate": "c=3"});
    let (parent, state) = passed(&client.call(&call)["result"]);
    assert_continues(&parent, PARENT);
    assert_eq!(state, "c=3");
    let (parent, _) = passed(
        &post(
            &daemon,
            "/",
            &[&format!("traceparent: {OTHER}")],
            &call.to_string(),
        )["result"],
    );
    assert_continues(&parent, PARENT);

    let rpc = |params: Value, beside: Value| json!({"jsonrpc": "2.0", "method": "command", "id": 1, "params": params, "traceparent": beside});
    let meta = json!({"_meta": {"traceparent": PARENT}});
    for (call, from) in [
        (rpc(meta.clone(), json!(OTHER)), PARENT),
        (
            rpc(json!({"_meta": {"progressToken": 1}}), json!(OTHER)),
            OTHER,
        ),
        (rpc(json!([]), json!(PARENT)), PARENT),
    ] {
        assert_continues(&passed(&client.call(&call)["result"]).0, from);
    }
    // One header for all calls of a batch, and one call that says something else.
    let batch =
        json!([rpc(json!([]), json!(OTHER)), {"jsonrpc": "2.0", "method": "command", "id": 2}]);
    let answers = post(
        &daemon,
        "/",
        &[&format!("traceparent: {PARENT}")],
        &batch.to_string(),
    );
    for answer in answers.as_array().unwrap() {
        let from = if answer["id"] == 1 { OTHER } else { PARENT };
        assert_continues(&passed(&answer["result"]).0, from);
    }
    // The header of a request is not that of the next one on its connection.
    let (parent, state) = passed(&post(&daemon, "/command", &[], ""));
    assert_begins(&parent);
    assert_eq!(state, "");
}

#[test]
fn an_invalid_or_repeated_parent_begins_a_trace_without_the_state() {
    let daemon = traced();
    let header = format!("traceparent: {PARENT}");
    for headers in [
        vec![header.as_str(), &header],
        vec!["traceparent: 00-1-2-3"],
        vec![],
    ] {
        let headers: Vec<&str> = headers.into_iter().chain(["tracestate: a=1"]).collect();
        let (parent, state) = passed(&post(&daemon, "/command", &headers, ""));
        assert_begins(&parent);
        assert_eq!(state, "", "{headers:?}");
    }
    let mut client = daemon.client();
    for members in [
        format!(r#""traceparent": "{PARENT}", "traceparent": "{PARENT}""#),
        r#""traceparent": 7"#.to_owned(),
        r#""traceparent": "00""#.to_owned(),
    ] {
        let call = format!(r#"{{"in": "command", {members}, "tracestate": "a=1"}}"#);
        let answer: Value = serde_json::from_str(&client.call_text(&call)).unwrap();
        let (parent, state) = passed(&answer["result"]);
        assert_begins(&parent);
        assert_eq!(state, "", "{call}");
    }
    let call = json!({"in": "command", "traceparent": PARENT, "tracestate": "A=1"});
    let (parent, state) = passed(&client.call(&call)["result"]);
    assert_continues(&parent, PARENT);
    assert_eq!(state, "", "an invalid state is dropped alone");
}

#[test]
fn the_helper_names_the_call_of_a_traceback() {
    let daemon = traced();
    let mut client = daemon.client();
    for method in ["pooled", "waits"] {
        let answer = client.call(&json!({"in": method, "params": "raise"}));
        let call = answer["result"]["call"].as_str().unwrap();
        daemon.wait_log(&format!("call {call} failed:"));
    }
}

#[test]
fn pool_programs_get_members_and_the_helper_gives_children() {
    let daemon = traced();
    let mut client = daemon.client();
    let worker = daemon.ready_workers()[0];
    for (number, method) in ["pooled", "waits"].into_iter().enumerate() {
        let call = json!({"in": method, "traceparent": PARENT, "tracestate": "a=\"1\\,b=2"});
        let result = client.call(&call)["result"].clone();
        assert_eq!(result[0], format!("{worker}.{}", number + 1));
        let (parent, state) = passed(&result);
        assert_continues(&parent, PARENT);
        assert_eq!(state, "a=\"1\\,b=2");
        let children: Vec<&str> = (0..2).map(|n| result[3][n].as_str().unwrap()).collect();
        assert_continues(children[0], &parent);
        assert_continues(children[1], &parent);
        assert_ne!(children[0], children[1]);
    }
    // Concurrent calls do not see each other's context.
    let calls = (0..4).map(|id| {
        let parent = format!("00-{:032x}-00f067aa0ba902b7-01", id + 1);
        json!({"in": "waits", "id": id, "traceparent": parent})
    });
    client.send_together(calls);
    for _ in 0..4 {
        let answer = client.recv_json();
        let id = answer["id"].as_u64().unwrap() + 1;
        let (parent, _) = passed(&answer["result"]);
        assert!(parent.starts_with(&format!("00-{id:032x}-")), "{answer}");
    }
    let text = result(&mut client, "frame", &json!([1]));
    let text = text.as_str().unwrap();
    let call = format!(r#"{{"in":"frame","params":[1],"call":"{worker}.7","traceparent":"00-"#);
    assert!(
        text.starts_with(&call) && text.ends_with("-02\"}"),
        "{text}"
    );
}

#[test]
fn a_forwarded_call_keeps_its_trace_and_its_errors_their_id() {
    let config = format!("[workers]\ncount = 2\nthreads = 1\n[trace]\n{METHODS}");
    let config = config.split("[methods.pooled]").next().unwrap();
    let (daemon, [home, other], mut clients) = one_sided(config, 2);
    clients[0].send(&json!({"in": "sleep", "params": 4}).to_string());
    wait_for("a running call", PATIENCE, || {
        let status = daemon.status();
        let mut workers = status["workers"].as_array().unwrap().iter();
        workers.any(|worker| worker["pid"] == home && worker["running"] == 1)
    });
    let call = json!({"in": "command", "traceparent": PARENT, "tracestate": "a=1"});
    let result = clients[1].call(&call)["result"].clone();
    assert_eq!(result[0], format!("{other}.1"), "it ran there");
    let (parent, state) = passed(&result);
    assert_continues(&parent, PARENT);
    assert_eq!(state, "a=1");
    let error = clients[1].call(&json!({"in": "fail"}))["result"].clone();
    assert_eq!(error["call"], format!("{home}.5"), "{error}");
    let traces: Vec<String> = (0..2)
        .map(|_| passed(&clients[1].call(&json!({"in": "command"}))["result"]).0)
        .collect();
    assert_begins(&traces[0]);
    assert_ne!(traces[0][..35], traces[1][..35]);
    clients[0].recv_json();
}

#[test]
fn errors_name_their_call_in_every_form() {
    let daemon = traced();
    let worker = daemon.ready_workers()[0];
    let mut client = daemon.client();
    let id = |number: u32| format!("{worker}.{number}");
    let error = client.call(&json!({"in": "nope"}))["result"].clone();
    assert_eq!(
        (&error["started"], &error["call"]),
        (&json!(false), &json!(id(1)))
    );
    let error = client.call(&json!({"in": "fail"}))["result"].clone();
    assert_eq!(
        (&error["started"], &error["call"]),
        (&json!(true), &json!(id(2)))
    );
    let error = client.call(&json!({"jsonrpc": "2.0", "method": "nope", "id": 1}));
    assert_eq!(error["error"]["data"]["call"], id(3));
    assert_eq!(post(&daemon, "/nope", &[], "")["call"], id(4));
    // Answered in another order than they came.
    client.send_together([
        json!({"in": "sleep", "params": 60, "id": 1, "timeout_ms": 300}),
        json!({"in": "nope", "id": 2}),
    ]);
    assert_eq!(client.recv_json()["result"]["call"], id(6));
    assert_eq!(client.recv_json()["result"]["call"], id(5));
}

#[test]
fn log_lines_during_a_call_name_it() {
    let directory = Dir::new();
    let gone = format!(
        "[methods.gone]\ncommand = [\"true\"]\ndirectory = {:?}\n",
        &*directory
    );
    let program = "import sys, time\nfrom preforkd import method, serve\n@method\ndef tell(text):\n    print(text)\n    time.sleep(1)\nserve()\n";
    let pool = "[pools.p]\nprocesses = 1\ncommand = [\"python3\", \"program.py\"]\ndirectory = \".\"\n[methods.tell]\npool = \"p\"\n";
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n[trace]\n{gone}{pool}"))
        .python_program(program)
        .expect_log("could not be started")
        .start();
    drop(directory);
    let (worker, mut client) = (daemon.ready_workers()[0], daemon.client());
    client.call(&json!({"in": "gone"}));
    client.call(&json!({"in": "tell", "params": ["heard"]}));
    client.call(&json!({"in": "ping"}));
    daemon.wait_log("heard");
    let log = daemon.log();
    let line = |text: &str| log.lines().find(|line| line.contains(text)).unwrap();
    assert!(
        line("could not be started").ends_with(&format!(" call={worker}.1")),
        "{log}"
    );
    assert!(
        line("heard").ends_with(&format!("heard call={worker}.2")),
        "{log}"
    );
    assert_eq!(log.matches(" call=").count(), 2, "{log}");
}

#[test]
fn the_keeper_of_a_dead_worker_names_the_call() {
    let config = format!("[workers]\ncount = 1\nrespawn-max-delay = \"0s\"\n[trace]\n{METHODS}");
    let config = config.split("[methods.pooled]").next().unwrap();
    let daemon = Daemon::builder()
        .config(config)
        .expect_log("ended by SIGKILL")
        .start();
    let worker = daemon.ready_workers()[0];
    let mut client: Client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 60, "id": 1}).to_string());
    daemon.wait_running(1);
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let error = client.recv_json()["result"].clone();
    assert_eq!(
        (&error["name"], &error["call"]),
        (&json!("crashed"), &json!(format!("{worker}.1")))
    );
}

#[test]
fn without_the_table_nothing_is_read_passed_or_named() {
    for keys in ["", "[trace]\npropagate = false\n"] {
        let daemon = daemon(keys);
        let mut client = daemon.client();
        let header = format!("traceparent: {PARENT}");
        let got = post(&daemon, "/command", &[&header], "");
        assert_eq!(passed(&got), ("configured".to_owned(), String::new()));
        let call = json!({"in": "frame", "params": [1], "traceparent": PARENT});
        let text = client.call(&call)["result"].clone();
        assert_eq!(text, r#"{"in":"frame","params":[1]}"#);
        let none = json!([null, null, null, [null, null]]);
        assert_eq!(result(&mut client, "pooled", &Value::Null), none);
        let error = client.call(&json!({"in": "nope"}))["result"].clone();
        assert_eq!(error.get("call"), None);
    }
}

#[test]
fn a_reload_turns_tracing_on_and_off() {
    let daemon = daemon("");
    let config = format!("[workers]\ncount = 1\n{METHODS}");
    let parent = |daemon: &Daemon| {
        let call = json!({"in": "frame", "params": 1, "traceparent": PARENT});
        daemon.client().call(&call)["result"]
            .to_string()
            .contains(TRACE)
    };
    assert!(!parent(&daemon));
    daemon.reload_with(&format!("{config}[trace]\n"));
    // An old worker may accept a connection before it drains.
    wait_for("a worker with the table", PATIENCE, || parent(&daemon));
    daemon.reload_with(&config);
    wait_for("a worker without it", PATIENCE, || !parent(&daemon));
}
