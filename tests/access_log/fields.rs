//! What a line says, for each kind of call.

use serde_json::{Value, json};

use super::{CONFIG, balance, lines_of, wait_lines};
use crate::support::wire::{Wire, post};
use crate::support::{Daemon, PATIENCE, wait_for};

fn start() -> Daemon {
    Daemon::builder().config(CONFIG).start()
}

/// Returns the only line of a method.
#[track_caller]
fn line<'a>(lines: &'a [Value], method: &str) -> &'a Value {
    let found: Vec<&Value> = lines.iter().filter(|it| it["method"] == method).collect();
    assert_eq!(found.len(), 1, "{method}: {lines:#?}");
    found[0]
}

#[test]
fn each_kind_of_handler_has_its_fields() {
    let daemon = start();
    let mut client = daemon.client();
    client.call(&json!({"in": "ping", "params": "Ada"}));
    client.call(&json!({"in": "sleep", "params": 0.05}));
    client.call(&json!({"in": "shell"}));
    client.call(&json!({"in": "rpc.discover"}));
    client.call(&json!({"in": "none"}));
    client.send("{");
    client.recv_json();
    let lines = wait_lines(&daemon, 6);
    let peer = client.stream().local_addr().unwrap().to_string();
    let worker = daemon.ready_workers()[0];
    for line in &lines {
        assert_eq!(line["peer"], peer);
        assert_eq!(line["worker"], worker);
        assert_eq!(
            (&line["dialect"], &line["form"]),
            (&json!("frame"), &json!("plain"))
        );
        assert_eq!((&line["slot"], &line["generation"]), (&json!(0), &json!(1)));
        assert!(
            line.get("runner").is_none() && line.get("trace_id").is_none(),
            "{line}"
        );
        let call = line["call"].as_str().unwrap();
        assert!(call.starts_with(&format!("{worker}.")), "{line}");
    }
    let ping = line(&lines, "ping");
    assert_eq!(
        (&ping["kind"], &ping["outcome"]),
        (&json!("builtin"), &json!("done"))
    );
    assert_eq!((&ping["started"], ping.get("code")), (&json!(true), None));
    assert_eq!(
        ping["received_bytes"],
        r#"{"in":"ping","params":"Ada"}"#.len()
    );
    assert_eq!(ping["sent_bytes"], r#"{"out":"ping","result":"Ada"}"#.len());
    let sleep = line(&lines, "sleep");
    let us = |line: &Value, name: &str| line[name].as_u64().unwrap();
    assert!(
        (50_000..5_000_000).contains(&us(sleep, "run_us")),
        "{sleep}"
    );
    assert!(
        us(sleep, "total_us") >= us(sleep, "run_us") + us(sleep, "queue_us"),
        "{sleep}"
    );
    let shell = line(&lines, "shell");
    assert_eq!(shell["kind"], "command");
    assert!(
        us(shell, "program") > 0 && us(shell, "max_rss_bytes") > 0,
        "{shell}"
    );
    assert!(shell.get("cpu_us").is_some(), "{shell}");
    assert_eq!(line(&lines, "rpc.discover")["kind"], "builtin");
    let none = line(&lines, "none");
    assert_eq!(
        (&none["outcome"], &none["code"]),
        (&json!("error"), &json!("method-not-found"))
    );
    assert_eq!((&none["started"], none.get("kind")), (&json!(false), None));
    let broken = lines.iter().find(|it| it["code"] == "parse-error").unwrap();
    assert_eq!(
        (broken.get("method"), &broken["received_bytes"]),
        (None, &json!(1))
    );
    balance(&daemon);
}

#[test]
fn each_outcome_has_its_word() {
    let config = format!("{CONFIG}[methods.one]\nbuiltin = \"sleep\"\nconcurrency = 1\n");
    let daemon = Daemon::builder().config(&config).start();
    let mut client = daemon.client();
    let answer = client.call(&json!({"in": "sleep", "params": 5, "timeout_ms": 50}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    // Cancelled by its client.
    client.send(&json!({"in": "sleep", "params": 5, "id": 7}).to_string());
    daemon.wait_running(1);
    client.send(&json!({"in": "rpc.cancel", "params": {"id": 7}, "id": 8}).to_string());
    client.recv_json();
    client.recv_json();
    // Refused, because one runs.
    client.send(&json!({"in": "one", "params": 0.3, "id": 1}).to_string());
    let shed = client.call(&json!({"in": "one", "params": 0, "id": 2}));
    assert_eq!(shed["result"]["name"], "overloaded", "{shed}");
    client.recv_json();
    // Its client is gone.
    let mut gone = daemon.client();
    gone.send(&json!({"in": "sleep", "params": 5}).to_string());
    daemon.wait_running(1);
    gone.reset();
    let lines = wait_lines(&daemon, 6);
    let mut found: Vec<(String, bool)> = lines
        .iter()
        .map(|line| {
            let text = |name: &str| line[name].as_str().unwrap_or("-");
            let words = [text("method"), text("outcome"), text("code")];
            (words.join(" "), line["started"].as_bool().unwrap())
        })
        .collect();
    found.sort();
    let expected = [
        ("one done -", true),
        ("one shed overloaded", false),
        ("rpc.cancel done -", true),
        ("sleep cancelled cancelled", true),
        ("sleep disconnected cancelled", true),
        ("sleep timeout timeout", true),
    ];
    assert_eq!(
        found,
        expected.map(|(words, started)| (words.to_owned(), started))
    );
    let timeout = lines.iter().find(|it| it["outcome"] == "timeout").unwrap();
    assert!(timeout["run_us"].as_u64() >= Some(40_000), "{timeout}");
    balance(&daemon);
}

#[test]
fn http_lines_batches_and_notifications_have_lines_of_their_own() {
    let daemon = start();
    let mut http = Wire::to(&daemon);
    let request = post("/ping", "[1]").replacen("\r\n", "\r\nX-Request-Id: abc-1\r\n", 1);
    http.send(&request);
    http.response();
    // An id that is no printable ASCII is left out.
    http.send(post("/ping", "[2]").replacen("\r\n", "\r\nX-Request-Id: \u{e9}\r\n", 1));
    http.response();
    let batch = r#"[{"jsonrpc":"2.0","method":"ping","id":1},{"jsonrpc":"2.0","method":"ping"},{"jsonrpc":"2.0","method":"sleep","params":0,"id":2}]"#;
    http.send(post("/", batch).replacen("\r\n", "\r\nX-Request-Id: of-all\r\n", 1));
    http.response();
    let mut lines = Wire::to(&daemon);
    lines.send("{\"in\": \"ping\"}\n");
    lines.line();
    let lines = wait_lines(&daemon, 6);
    let ids: Vec<&Value> = lines.iter().map(|line| &line["request_id"]).collect();
    let of = |id: &str| ids.iter().filter(|it| **it == id).count();
    assert_eq!((of("abc-1"), of("of-all")), (1, 3), "{lines:#?}");
    let count = |dialect: &str, form: &str| {
        let is_one = |it: &&Value| it["dialect"] == dialect && it["form"] == form;
        lines.iter().filter(is_one).count()
    };
    assert_eq!(
        (
            count("http", "plain"),
            count("http", "jsonrpc"),
            count("line", "plain")
        ),
        (2, 3, 1)
    );
    let notification = lines.iter().filter(|it| it["sent_bytes"] == 0);
    assert_eq!(notification.count(), 1, "{lines:#?}");
    let first = lines.iter().find(|it| it["request_id"] == "abc-1").unwrap();
    assert_eq!(
        (&first["received_bytes"], &first["sent_bytes"]),
        (&json!(3), &json!(3))
    );
    balance(&daemon);
}

#[test]
fn a_call_of_a_pool_names_its_process_and_its_program() {
    let config = r#"
[workers]
count = 1
[access-log]
file = "access.log"
[methods.word]
pool = "p"
[pools.p]
command = ["python3", "program.py"]
processes = 1
directory = "."
"#;
    let daemon = Daemon::builder()
        .config(config)
        .python_program(
            "from preforkd import method, serve\n@method\ndef word():\n    return 1\nserve()\n",
        )
        .start();
    let answer = daemon.client().call(&json!({"in": "word"}));
    assert_eq!(answer["result"], 1, "{answer}");
    let lines = wait_lines(&daemon, 1);
    let status = daemon.status();
    assert_eq!(lines[0]["kind"], "pool");
    assert_eq!(lines[0]["runner"], daemon.pool());
    assert_eq!(lines[0]["program"], status["pools"][0]["list"][0]["pid"]);
    assert!(lines[0].get("cpu_us").is_none(), "{}", lines[0]);
    balance(&daemon);
}

#[test]
fn a_trace_has_its_ids_in_the_line() {
    let daemon = Daemon::builder()
        .config(&format!("{CONFIG}[trace]\npropagate = true\n"))
        .start();
    let mut client = daemon.client();
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for method in ["ping", "sleep"] {
        client.call(&json!({"in": method, "params": 0, "traceparent": parent}));
    }
    client.call(&json!({"in": "none"}));
    let lines = wait_lines(&daemon, 3);
    for method in ["ping", "sleep"] {
        let line = line(&lines, method);
        assert_eq!(line["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(
            (&line["parent_id"], &line["trace_flags"]),
            (&json!("00f067aa0ba902b7"), &json!("01"))
        );
        assert_ne!(line["span_id"], line["parent_id"]);
    }
    // A new trace is sampled, because its line is taken.
    let new = line(&lines, "none");
    assert_eq!(
        (&new["trace_flags"], new.get("parent_id")),
        (&json!("03"), None)
    );
}

/// Names of methods and ids with all bytes that a client can send, and 1 MB long.
#[test]
fn no_client_can_begin_a_line_or_break_one() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    let hostile: String = (0..=255_u8)
        .map(char::from)
        .chain(['\u{2028}', '\u{202e}', '"'])
        .collect();
    let long = format!("{hostile}{}", "x\u{1b}[2J".repeat(200_000));
    for name in [&hostile, &long] {
        let text = |it: &str| serde_json::to_string(it).unwrap();
        wire.send(format!(
            "{{\"in\": {}, \"id\": {}}}\n",
            text(name),
            text(name)
        ));
        wire.line();
    }
    let mut raw = Wire::to(&daemon);
    let bytes: Vec<u8> = (1..=255).filter(|byte| !b"\n\r".contains(byte)).collect();
    raw.send([b"{\"in\": \"", &bytes[..], b"\"}\n"].concat());
    raw.line();
    let lines = wait_lines(&daemon, 3);
    let methods: Vec<&str> = lines
        .iter()
        .filter_map(|it| it["method"].as_str())
        .collect();
    assert!(
        methods
            .iter()
            .all(|it| it.len() <= 128 && hostile.starts_with(it)),
        "{methods:?}"
    );
    assert_eq!(methods.len(), 2);
    let text = daemon.dir().read("access.log");
    assert!(!text.contains(['\u{1b}', '\u{7f}', '\u{2028}', '\u{202e}', '\u{9b}', '\r']));
    balance(&daemon);
}

#[test]
fn params_are_in_no_line() {
    let daemon = start();
    let mut client = daemon.client();
    for method in ["ping", "sleep", "shell", "none"] {
        client.call(&json!({"in": method, "params": "geheimnis"}));
    }
    wait_lines(&daemon, 4);
    assert!(!daemon.dir().read("access.log").contains("geheimnis"));
}

#[test]
fn lines_of_text_and_lines_in_the_log_have_the_same_facts() {
    let text = CONFIG.replace(
        "file = \"access.log\"",
        "file = \"access.log\"\nformat = \"text\"",
    );
    let daemon = Daemon::builder().config(&text).start();
    daemon.client().call(&json!({"in": "ping"}));
    wait_for("a line", PATIENCE, || {
        daemon.dir().read("access.log").ends_with('\n')
    });
    let line = daemon.dir().read("access.log");
    assert!(
        line.contains(" ping done total=0.0") && line.contains(" started=true"),
        "{line}"
    );
    for (format, words) in [("text", " INFO "), ("json", "\"outcome\":\"done\"")] {
        let log = CONFIG.replace("file = \"access.log\"", "");
        let daemon = Daemon::builder()
            .config(&format!("log.format = \"{format}\"\n{log}"))
            .start();
        daemon.client().call(&json!({"in": "ping"}));
        daemon.wait_log(" ping done total=");
        let log = daemon.log();
        let line = log.lines().find(|it| it.contains(" ping done total="));
        assert!(line.unwrap().contains(words), "{line:?}");
        balance(&daemon);
    }
}

#[test]
fn each_connection_with_a_process_of_its_own_has_lines() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .listen("isolation = \"connection\"\n")
        .start();
    let mut clients = [daemon.client(), daemon.client()];
    for client in &mut clients {
        for _ in 0..3 {
            client.call(&json!({"in": "ping"}));
        }
    }
    let lines = wait_lines(&daemon, 6);
    let mut pids: Vec<u64> = lines
        .iter()
        .map(|it| it["worker"].as_u64().unwrap())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 2, "{lines:#?}");
    drop(clients);
    balance(&daemon);
    assert_eq!(lines_of(&daemon, "access.log").len(), 6);
}

#[test]
fn a_call_that_another_worker_runs_names_that_worker() {
    let config = CONFIG.replace("count = 1\nthreads = 2", "count = 2\nthreads = 1");
    let (daemon, [home, other], mut clients) = crate::tracing::one_sided(&config, 2);
    for client in &mut clients {
        client.send(&json!({"in": "shell"}).to_string());
        client.send(&json!({"in": "sleep", "params": 0.2}).to_string());
    }
    for client in &mut clients {
        client.recv_json();
        client.recv_json();
    }
    let lines = wait_lines(&daemon, 6);
    assert!(lines.iter().all(|it| it["worker"] == home), "{lines:#?}");
    let foreign: Vec<&Value> = lines.iter().filter(|it| it["runner"] == other).collect();
    assert!(!foreign.is_empty(), "{lines:#?}");
    balance(&daemon);
}
