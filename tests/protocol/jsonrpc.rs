//! Tests JSON-RPC 2.0: every example of its specification in each dialect, byte for byte.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::wire::{DIALECTS, Dialect, Wire};
use crate::support::{Daemon, Dir, PATIENCE, example, process, wait_for};

/// The examples of the specification (section 7): the request, and the answer if there is one.
const EXAMPLES: [(&str, Option<&str>); 15] = [
    (
        r#"{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}"#,
        Some(r#"{"jsonrpc": "2.0", "result": 19, "id": 1}"#),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}"#,
        Some(r#"{"jsonrpc": "2.0", "result": -19, "id": 2}"#),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}"#,
        Some(r#"{"jsonrpc": "2.0", "result": 19, "id": 3}"#),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}"#,
        Some(r#"{"jsonrpc": "2.0", "result": 19, "id": 4}"#),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}"#,
        None,
    ),
    (r#"{"jsonrpc": "2.0", "method": "foobar"}"#, None),
    (
        r#"{"jsonrpc": "2.0", "method": "foobar", "id": "1"}"#,
        Some(
            r#"{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}"#,
        ),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]"#,
        Some(
            r#"{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}"#,
        ),
    ),
    (
        r#"{"jsonrpc": "2.0", "method": 1, "params": "bar"}"#,
        Some(
            r#"{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}"#,
        ),
    ),
    (
        r#"[
  {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
  {"jsonrpc": "2.0", "method"
]"#,
        Some(
            r#"{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}"#,
        ),
    ),
    (
        "[]",
        Some(
            r#"{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}"#,
        ),
    ),
    (
        "[1]",
        Some(
            r#"[{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}]"#,
        ),
    ),
    (
        "[1,2,3]",
        Some(
            r#"[
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}
]"#,
        ),
    ),
    (
        r#"[
    {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
    {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
    {"foo": "boo"},
    {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
    {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
]"#,
        Some(
            r#"[
    {"jsonrpc": "2.0", "result": 7, "id": "1"},
    {"jsonrpc": "2.0", "result": 19, "id": "2"},
    {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
    {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
    {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
]"#,
        ),
    ),
    (
        r#"[
    {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
]"#,
        None,
    ),
];

fn arithmetic(config: &str) -> Daemon {
    let config = format!("[workers]\ncount = 2\n{config}");
    Daemon::builder()
        .program(example("arithmetic"))
        .config(&config)
        .start()
}

/// Returns an answer without `error.data`, which the specification leaves to the server, and with sorted
/// batch answers, whose order it leaves open.
fn comparable(text: &str) -> Value {
    let strip = |value: &mut Value| {
        if let Some(error) = value.get_mut("error").and_then(Value::as_object_mut)
            && let Some(data) = error.remove("data")
        {
            assert!(
                data["name"].is_string() && data["started"] == false,
                "{data}"
            );
        }
    };
    let mut value: Value = serde_json::from_str(text).unwrap();
    match &mut value {
        Value::Array(answers) => {
            answers.iter_mut().for_each(strip);
            answers.sort_by_key(Value::to_string);
        }
        one => strip(one),
    }
    value
}

#[test]
fn every_example_of_the_specification_in_every_dialect() {
    let daemon = arithmetic("");
    let mut right = 0;
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        for (sent, expected) in EXAMPLES {
            wire.ask(dialect, sent);
            if dialect == Dialect::Http || expected.is_some() {
                let answer = wire.answer(dialect);
                assert_eq!(
                    answer.as_deref().map(comparable),
                    expected.map(comparable),
                    "{dialect:?}: {sent}"
                );
            }
            // A notification must leave nothing before the next answer.
            wire.ask(dialect, r#"{"in":"ping","params":0}"#);
            let next = wire.answer(dialect);
            assert_eq!(
                next.as_deref(),
                Some(r#"{"out":"pong","result":0}"#),
                "{sent}"
            );
            right += 1;
        }
    }
    println!(
        "JSON-RPC 2.0: {right} of {} examples right",
        3 * EXAMPLES.len()
    );
}

#[test]
fn a_null_id_is_an_id_and_params_are_structured() {
    let daemon = arithmetic("");
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        let mut ask = |body: &str| {
            let answer = wire.ask(dialect, body).answer(dialect).unwrap();
            serde_json::from_str::<Value>(&answer).unwrap()
        };
        assert_eq!(
            ask(r#"{"jsonrpc":"2.0","method":"subtract","params":[2,1],"id":null}"#),
            json!({"jsonrpc": "2.0", "result": 1, "id": null})
        );
        for wrong in [
            r#"{"jsonrpc":"2.0","method":"subtract","params":7,"id":1}"#,
            r#"{"jsonrpc":"1.0","method":"subtract","params":[2,1],"id":1}"#,
            r#"{"jsonrpc":"2.0","method":"a","method":"subtract","params":[2,1],"id":1}"#,
            r#"{"jsonrpc":"2.0","in":"ping","method":"subtract","params":[2,1],"id":1}"#,
        ] {
            let answer = ask(wrong);
            assert_eq!(answer["error"]["code"], -32600, "{wrong}: {answer}");
            assert_eq!(answer["id"], 1, "{wrong}: {answer}");
            assert!(answer["error"]["data"]["detail"].is_string(), "{answer}");
        }
        let answer = ask(r#"{"jsonrpc":"2.0","method":"subtract","params":["a"],"id":1}"#);
        assert_eq!(answer["error"]["code"], -32602, "{answer}");
        assert_eq!(answer["error"]["data"]["name"], "invalid-params");
    }
}

#[test]
fn a_batch_has_a_limit_and_its_answers_too() {
    let daemon = arithmetic("[limits]\nbatch = 3\nframe = \"1KiB\"\n");
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        let mut ask = |body: &str| {
            let answer = wire.ask(dialect, body).answer(dialect).unwrap();
            serde_json::from_str::<Value>(&answer).unwrap()
        };
        let call = r#"{"jsonrpc":"2.0","method":"get_data","id":1}"#;
        assert_eq!(
            ask(&format!("[{call},{call},{call}]"))
                .as_array()
                .unwrap()
                .len(),
            3
        );
        let refused = ask(&format!("[{call},{call},{call},{call}]"));
        assert_eq!(refused["error"]["code"], -32600, "{refused}");
        let detail = refused["error"]["data"]["detail"].as_str().unwrap();
        assert!(detail.contains("limits.batch"), "{detail}");

        let discover = r#"{"jsonrpc":"2.0","method":"rpc.discover","id":1}"#;
        let answer = ask(discover);
        assert_eq!(answer["error"]["code"], -32011, "{answer}");
    }
}

/// When an answer of a batch found no room, no further call of it is started: neither one that waits for
/// a thread nor one that is not taken yet. Notifications have no answer, so they run.
#[test]
fn calls_of_a_batch_whose_answer_is_too_long_are_not_started() {
    let dir = Dir::new();
    let notes = dir.join("notes").display().to_string();
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\nthreads = 1\n[limits]\nframe = \"16KiB\"\n[methods.sleep]\n\
             builtin = \"sleep\"\n[methods.note]\ncommand = [\"sh\", \"-c\", \"echo $1 >> {notes}\", \"sh\", \
             \"{{text}}\"]\n"
        ))
        .start();
    let call = |method: &str, params: Value, id: usize| json!({"jsonrpc": "2.0", "method": method, "params": params, "id": id});
    let note = |text: &str, id| call("note", json!({"text": text}), id);
    let mut silent = note("notified", 0);
    silent.as_object_mut().unwrap().remove("id");
    let discover = |id: usize| json!({"jsonrpc": "2.0", "method": "rpc.discover", "id": id});
    // The thread is busy, so the first call waits.
    let mut busy = daemon.client();
    busy.send(&json!({"in": "sleep", "params": 1}).to_string());
    daemon.wait_running(1);
    let mut calls = vec![note("waited", 1)];
    calls.extend((2..100).map(discover));
    calls.extend([silent, note("refused", 100)]);
    let mut client = daemon.client();
    let answers = client.call(&Value::from(calls));
    let answers = answers.as_array().unwrap();
    assert_eq!(answers.len(), 100);
    let of = |id: usize| answers.iter().find(|answer| answer["id"] == id).unwrap();
    for id in [1, 99, 100] {
        let error = &of(id)["error"];
        assert_eq!(error["code"], -32011, "{error}");
        assert_eq!(error["data"]["started"], false, "{error}");
        let text = error["message"].as_str().unwrap();
        assert!(text.contains("fewer calls in one batch"), "{text}");
    }
    assert!(of(2)["result"]["openrpc"].is_string());
    let started = answers
        .iter()
        .filter(|answer| answer["error"]["data"]["started"] == true);
    assert_eq!(started.count(), 1, "the one that found no room");
    wait_for("the notification", PATIENCE, || {
        dir.join("notes").exists() && dir.read("notes").ends_with('\n')
    });
    assert_eq!(dir.read("notes"), "notified\n");
}

/// The event loop serves other connections between the calls of a long batch.
#[test]
fn a_long_batch_of_inline_calls_lets_other_connections_in_between() {
    let daemon = Daemon::builder()
        .program(example("misbehave"))
        .config("[workers]\ncount = 1\n")
        .start();
    let ping = json!({"in": "ping"});
    let mut clients = [daemon.client(), daemon.client(), daemon.client()];
    for client in &mut clients {
        assert_eq!(client.call(&ping)["out"], "pong");
    }
    let [mut first, mut batch, mut other] = clients;
    let call = |method: &str, params: u64| json!({"jsonrpc": "2.0", "method": method, "params": [params], "id": 1});
    // Both arrive meanwhile and are read at once: a batch whose last call blocks the loop, and a ping.
    first.send(&json!({"in": "block", "params": 1}).to_string());
    let mut calls = vec![call("block-for", 0); 300];
    calls.push(call("block-for", 2));
    batch.send(&Value::from(calls).to_string());
    other.send(&ping.to_string());
    assert_eq!(other.recv_json()["out"], "pong");
    let answered = Instant::now();
    assert_eq!(batch.recv_json().as_array().unwrap().len(), 301);
    let earlier = answered.elapsed();
    assert!(earlier > Duration::from_secs(1), "{earlier:?}");
}

#[test]
fn rpc_discover_answers_an_openrpc_document_of_all_methods() {
    let daemon = arithmetic("[methods.echo]\nbuiltin = \"echo\"\n");
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        wire.ask(
            dialect,
            r#"{"jsonrpc":"2.0","method":"rpc.discover","id":1}"#,
        );
        let answer: Value = serde_json::from_str(&wire.answer(dialect).unwrap()).unwrap();
        let document = &answer["result"];
        assert!(document["openrpc"].as_str().unwrap().starts_with("1."));
        assert!(document["info"]["version"].is_string());
        let names: Vec<&str> = document["methods"]
            .as_array()
            .unwrap()
            .iter()
            .map(|method| method["name"].as_str().unwrap())
            .collect();
        for name in ["echo", "ping", "subtract", "get_data", "rpc.cancel"] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
    }
}

#[test]
fn rpc_cancel_in_one_form_ends_a_call_in_the_other() {
    let config = "[workers]\ncount = 1\n[methods.sleep]\nbuiltin = \"sleep\"\n";
    let daemon = Daemon::builder().config(config).start();
    for dialect in [Dialect::Frame, Dialect::Line] {
        let mut wire = Wire::to(&daemon);
        wire.ask(
            dialect,
            r#"[{"jsonrpc":"2.0","method":"sleep","id":"s"},{"jsonrpc":"2.0","method":"ping","id":2}]"#,
        );
        let answer = wire.answer(dialect).unwrap();
        assert!(
            answer.contains("-32602") && answer.contains("\"id\":2"),
            "{answer}"
        );
        wire.ask(dialect, r#"{"in":"sleep","params":3600,"id":7}"#);
        wire.ask(
            dialect,
            r#"{"jsonrpc":"2.0","method":"rpc.cancel","params":{"id":70e-1},"id":"c"}"#,
        );
        let ended = wire.answer(dialect).unwrap();
        assert!(
            ended.contains("-32006") && ended.contains("\"id\":7"),
            "{ended}"
        );
        assert_eq!(
            wire.answer(dialect).unwrap(),
            r#"{"jsonrpc":"2.0","result":true,"id":"c"}"#
        );
    }
}

/// Starts a worker with one handler thread and a unix socket; each call of `note` appends a line to a
/// file in `dir`.
fn notebook(dir: &Dir, limits: &str) -> Daemon {
    let config = format!(
        "[workers]\ncount = 1\nthreads = 1\n[limits]\n{limits}\n\
         [[listen]]\naddress = \"unix:rpc.sock\"\n\
         [methods.sleep]\nbuiltin = \"sleep\"\n\
         [methods.note]\ncommand = [\"sh\", \"-c\", \"echo noted >> {}/notes\"]\n",
        dir.display()
    );
    Daemon::builder().config(&config).start()
}

fn notes(dir: &Dir) -> usize {
    dir.read("notes").lines().count()
}

/// Sends these lines over the unix socket and closes it at once.
fn send_and_close(daemon: &Daemon, lines: &str) {
    let mut stream = UnixStream::connect(daemon.dir().join("rpc.sock")).unwrap();
    stream.write_all(lines.as_bytes()).unwrap();
}

const NOTIFICATION: &str = "{\"jsonrpc\":\"2.0\",\"method\":\"note\"}\n";

#[test]
fn notifications_before_a_close_run_over_unix() {
    // With the second limit the worker has not read all of them when the client closes.
    for limits in ["", "pipeline = 4"] {
        let dir = Dir::new();
        let daemon = notebook(&dir, limits);
        send_and_close(&daemon, &NOTIFICATION.repeat(20));
        wait_for("all notifications", PATIENCE, || notes(&dir) == 20);
    }
}

#[test]
fn a_close_over_unix_cancels_the_calls_that_expect_an_answer_and_no_others() {
    let dir = Dir::new();
    let daemon = notebook(&dir, "pipeline = 4");
    // The first call has the thread and the others wait for it; the last ones are not read yet.
    let sleep = "{\"in\":\"sleep\",\"params\":3600,\"id\":1}\n";
    let call = "{\"in\":\"note\",\"id\":2}\n";
    let in_order = "{\"in\":\"note\"}\n";
    let batch = "[{\"jsonrpc\":\"2.0\",\"method\":\"note\"},{\"jsonrpc\":\"2.0\",\"method\":\"note\",\"id\":3}]\n";
    let lines = [sleep, call, in_order, &NOTIFICATION.repeat(3), batch, call];
    send_and_close(&daemon, &lines.concat());
    wait_for("all notifications", PATIENCE, || notes(&dir) == 4);
    wait_for("the end of the connection", PATIENCE, || {
        daemon.status()["workers"][0]["connections"] == 0
    });
    assert_eq!(notes(&dir), 4);
}

/// It is built once for each generation.
#[test]
fn an_answer_of_rpc_discover_costs_no_work_for_each_method() {
    const CALLS: usize = 200;
    let methods: String = (0..2000)
        .map(|number| format!("[methods.m{number}]\nbuiltin = \"echo\"\n"))
        .collect();
    let daemon = Daemon::builder()
        .config(&format!("[workers]\ncount = 1\n{methods}"))
        .start();
    let worker = daemon.ready_workers()[0];
    let mut client = daemon.client();
    let discover = r#"{"jsonrpc":"2.0","method":"rpc.discover","id":1}"#;
    assert!(client.call_text(discover).contains("\"m1999\""));
    let before = process::cpu_ticks(worker).unwrap();
    for _ in 0..CALLS {
        client.call_text(discover);
    }
    let ticks = process::cpu_ticks(worker).unwrap() - before;
    println!("{CALLS} documents of 2000 methods: {ticks} ticks of CPU");
    // Building it takes about a tick (10 ms) or more.
    assert!(ticks < 100, "{ticks} ticks");
}
