//! Checks the text: which series there are, and what they count.

use std::fs;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::{assert_no_decrease, samples, scrape, sum, text, value, wait_value};
use crate::support::{Client, Daemon, PATIENCE, wait_for};

const CONFIG: &str = "[workers]\ncount = 2\nthreads = 2\n[methods.sleep]\nbuiltin = \"sleep\"\n\
                      [methods.fails]\ncommand = [\"/bin/false\"]\n";

#[test]
fn series_exist_at_zero_before_the_first_call() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let first = scrape(&daemon);
    for name in [
        "calls_total{method=\"sleep\"}",
        "calls_total{method=\"_OTHER\"}",
        "call_errors_total{method=\"ping\",code=\"timeout\",started=\"true\"}",
        "call_errors_total{method=\"ping\",code=\"overloaded\",started=\"false\"}",
        "call_errors_total{method=\"ping\",code=\"crashed\",started=\"true\"}",
        "call_duration_seconds_count{method=\"fails\"}",
        "call_queue_seconds_bucket{method=\"fails\",le=\"+Inf\"}",
        "connections_accepted_total",
        "connections_closed_total{reason=\"read_timeout\"}",
        "worker_exits_total{reason=\"oom\"}",
        "reloads_total{result=\"refused\"}",
        "requests_total{dialect=\"http\",form=\"jsonrpc\"}",
        "log_lines_lost_total{log=\"main\"}",
    ] {
        assert_eq!(value(&first, name), 0.0, "{name}");
    }
    assert_eq!(value(&first, "worker_starts_total"), 2.0);
    assert_eq!(value(&first, "workers{state=\"ready\"}"), 2.0);
    assert_eq!(value(&first, "last_reload_successful"), 1.0);
    assert_eq!(value(&first, "handler_threads"), 4.0);
}

#[test]
fn calls_count_by_method_and_code() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    for number in 0..20 {
        client.call(&json!({"in": "ping", "params": number}));
    }
    client.call(&json!({"in": "sleep", "params": 0.05}));
    client.call(&json!({"in": "sleep", "params": "no time"}));
    client.call(&json!({"in": "sleep", "params": 5, "timeout_ms": 50}));
    client.call(&json!({"in": "fails"}));
    client.call(&json!({"in": "nothing"}));
    client.call_text("{}");
    let seen = scrape(&daemon);
    let calls = |method: &str| value(&seen, &format!("calls_total{{method=\"{method}\"}}"));
    assert_eq!(calls("ping"), 20.0);
    assert_eq!(calls("sleep"), 3.0);
    assert_eq!(calls("fails"), 1.0);
    assert_eq!(calls("_OTHER"), 2.0);
    let errors = |method: &str, code: &str, started: bool| {
        let labels = format!("method=\"{method}\",code=\"{code}\",started=\"{started}\"");
        value(&seen, &format!("call_errors_total{{{labels}}}"))
    };
    assert_eq!(errors("sleep", "invalid-params", false), 1.0);
    let timeouts = [false, true].map(|started| errors("sleep", "timeout", started));
    assert_eq!(timeouts[0] + timeouts[1], 1.0);
    assert_eq!(errors("fails", "command-failed", true), 1.0);
    assert_eq!(errors("_OTHER", "method-not-found", false), 1.0);
    assert_eq!(errors("_OTHER", "invalid-request", false), 1.0);
    let times = |metric: &str, end: &str, method: &str| {
        value(
            &seen,
            &format!("{metric}_seconds_{end}{{method=\"{method}\"}}"),
        )
    };
    assert_eq!(times("call_duration", "count", "ping"), 20.0);
    assert_eq!(
        times("call_queue", "count", "ping"),
        0.0,
        "ping never waits"
    );
    assert_eq!(times("call_duration", "count", "sleep"), 3.0);
    let slept = times("call_duration", "sum", "sleep");
    // The beginning of each call is known to the millisecond.
    assert!((0.098..2.0).contains(&slept), "{slept}");
    assert!(times("call_queue", "sum", "sleep") < slept);
    let short = "call_duration_seconds_bucket{method=\"sleep\",le=\"0.025\"}";
    assert_eq!(value(&seen, short), 1.0, "the refused one");
    assert_eq!(
        times("call_duration", "count", "_OTHER"),
        0.0,
        "refused at once"
    );
    assert_eq!(
        value(&seen, "requests_total{dialect=\"frame\",form=\"plain\"}"),
        26.0
    );
    assert!(sum(&seen, "received_bytes_total") > 500.0);
    assert!(sum(&seen, "sent_bytes_total") > 500.0);
    assert_eq!(
        sum(&seen, "calls_forwarded_total"),
        0.0,
        "one call at a time"
    );
}

#[test]
fn a_batch_is_one_request_and_several_calls() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    let batch: Vec<_> = (0..5)
        .map(|id| json!({"jsonrpc": "2.0", "method": "ping", "id": id}))
        .collect();
    client.call(&json!(batch));
    let seen = scrape(&daemon);
    assert_eq!(
        value(&seen, "requests_total{dialect=\"frame\",form=\"jsonrpc\"}"),
        1.0
    );
    assert_eq!(value(&seen, "calls_total{method=\"ping\"}"), 5.0);
    client.send(r#"{"jsonrpc":"2.0","method":"ping"}"#);
    wait_value(&daemon, "calls_total{method=\"ping\"}", 6.0);
    let seen = scrape(&daemon);
    assert_eq!(
        value(&seen, "requests_total{dialect=\"frame\",form=\"jsonrpc\"}"),
        2.0,
        "a notification"
    );
}

#[test]
fn the_cpu_time_of_a_command_counts_once_wherever_it_runs() {
    const BUSY: &str = "[workers]\ncount = 2\nthreads = 1\n[access-log]\nfile = \"access.log\"\n\
                        [methods.busy]\ncommand = [\"sh\", \"-c\", \"i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo 1\"]\n";
    let daemon = Daemon::builder().config(BUSY).start();
    // Enough connections that each worker answers calls of its own, and has some run by the other one.
    let mut clients: Vec<Client> = (0..8).map(|_| daemon.client()).collect();
    for client in &mut clients {
        for _ in 0..2 {
            client.send(r#"{"in":"busy"}"#);
        }
    }
    for client in &mut clients {
        for _ in 0..2 {
            client.recv().unwrap();
        }
    }
    wait_value(&daemon, "calls_total{method=\"busy\"}", 16.0);
    let mut lines = String::new();
    wait_for("the lines", PATIENCE, || {
        lines = daemon.dir().read("access.log");
        lines.lines().count() == 16
    });
    let parse = |line: &str| {
        serde_json::from_str::<Value>(line).unwrap()["cpu_us"]
            .as_f64()
            .unwrap()
    };
    let used = lines.lines().map(parse).sum::<f64>() / 1e6;
    let seen = scrape(&daemon);
    let counted = value(&seen, "command_cpu_seconds_total{method=\"busy\"}");
    assert!(
        (counted - used).abs() < used / 100.0,
        "{counted} s counted, {used} s used"
    );
}

#[test]
fn unknown_methods_add_no_series() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    client.call(&json!({"in": "nothing"}));
    let before = scrape(&daemon);
    for number in 0..10_000 {
        client.send(&json!({"in": format!("nothing-{number}"), "id": number}).to_string());
        if number % 100 == 99 {
            (0..100).for_each(|_| drop(client.recv_json()));
        }
    }
    let after = scrape(&daemon);
    assert_eq!(before.len(), after.len());
    assert_eq!(value(&after, "calls_total{method=\"_OTHER\"}"), 10_001.0);
}

#[test]
fn more_methods_than_names_count_together() {
    let methods: Vec<String> = (0..300)
        .map(|number| format!("[methods.m{number:03}]\nbuiltin = \"sleep\"\n"))
        .collect();
    let config = format!("[workers]\ncount = 1\n{}", methods.concat());
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("there were more than 256 method names")
        .start();
    let mut client = daemon.client();
    client.call(&json!({"in": "m000", "params": 0}));
    client.call(&json!({"in": "m299", "params": 0}));
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "calls_total{method=\"m000\"}"), 1.0);
    assert_eq!(value(&seen, "calls_total{method=\"_OTHER\"}"), 1.0);
    daemon.reload();
    let warnings = daemon.log().matches("more than 256 method names").count();
    assert_eq!(warnings, 1, "{}", daemon.log());
}

#[test]
fn a_method_keeps_its_series_when_its_number_changes() {
    let daemon = Daemon::builder().config(CONFIG).start();
    daemon.client().call(&json!({"in": "sleep", "params": 0}));
    let before = scrape(&daemon);
    // The numbers of methods follow their names.
    daemon.reload_with("[workers]\ncount = 2\n[methods.a]\nbuiltin = \"sleep\"\n");
    // A worker of the old generation may still accept a connection.
    wait_for("the new method", PATIENCE, || {
        daemon.client().call(&json!({"in": "a", "params": 0}))["out"] == "a"
    });
    let after = scrape(&daemon);
    assert_eq!(value(&after, "calls_total{method=\"a\"}"), 1.0);
    assert_no_decrease(&before, &after);
    assert_eq!(value(&after, "calls_total{method=\"sleep\"}"), 1.0);
    assert_eq!(value(&after, "reloads_total{result=\"ok\"}"), 1.0);
    wait_value(&daemon, "worker_exits_total{reason=\"ordered\"}", 2.0);
}

#[test]
fn accepted_minus_closed_connections_are_the_open_ones() {
    let config = format!("{CONFIG}[limits]\nidle-timeout = \"300ms\"\nread-timeout = \"300ms\"\n");
    let daemon = Daemon::builder().config(&config).start();
    let ping = |client: &mut Client| drop(client.call(&json!({"in": "ping"})));
    let mut clients: Vec<Client> = (0..4).map(|_| daemon.client()).collect();
    clients.iter_mut().for_each(ping);
    drop(clients.pop());
    let mut slow = clients.pop().unwrap();
    slow.send_raw(&[9, 0, 0, 0, b'{']);
    let mut wrong = clients.pop().unwrap();
    wrong.send_raw(&[0xFF; 4]);
    wait_for("three closed connections", PATIENCE, || {
        let seen = scrape(&daemon);
        let closed = |reason: &str| {
            value(
                &seen,
                &format!("connections_closed_total{{reason=\"{reason}\"}}"),
            )
        };
        closed("read_timeout") == 1.0 && closed("protocol") == 1.0 && closed("client") >= 1.0
    });
    wait_value(&daemon, "connections_closed_total{reason=\"idle\"}", 1.0);
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "connections_accepted_total"), 4.0);
    assert_eq!(sum(&seen, "connections_closed_total"), 4.0);
    assert_eq!(sum(&seen, "worker_connections"), 0.0);
}

#[test]
fn a_connection_process_counts_in_the_block_of_its_acceptor() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .listen("isolation = \"connection\"\n")
        .start();
    let mut clients: Vec<Client> = (0..3).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.call(&json!({"in": "ping"}));
        client.call(&json!({"in": "sleep", "params": 0}));
    }
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "calls_total{method=\"ping\"}"), 3.0);
    assert_eq!(value(&seen, "calls_total{method=\"sleep\"}"), 3.0);
    assert_eq!(value(&seen, "connections_accepted_total"), 3.0);
    drop(clients);
    wait_value(&daemon, "connections_closed_total{reason=\"client\"}", 3.0);
}

#[test]
fn histograms_are_those_of_the_configuration_and_run_times_are_off_by_default() {
    let daemon = Daemon::builder().config(CONFIG).start();
    daemon.client().call(&json!({"in": "sleep", "params": 0}));
    assert!(!text(&daemon).contains("call_run_seconds"));
    let observe = "[observe]\nhistograms = [\"run\"]\nbuckets = [\"1ms\", \"20s\"]\n";
    daemon.reload_with(&format!("{CONFIG}{observe}"));
    wait_value(&daemon, "workers{state=\"draining\"}", 0.0);
    daemon
        .client()
        .call(&json!({"in": "sleep", "params": 0.02}));
    let seen = scrape(&daemon);
    let run = |rest: &str| {
        let name = format!("call_run_seconds_{rest}");
        value(&seen, &name)
    };
    assert_eq!(
        run("count{method=\"sleep\"}"),
        1.0,
        "not the call before the reload"
    );
    assert_eq!(run("bucket{method=\"sleep\",le=\"0.001\"}"), 0.0);
    assert_eq!(run("bucket{method=\"sleep\",le=\"20\"}"), 1.0);
    assert_eq!(run("count{method=\"ping\"}"), 0.0);
    let others = ["call_duration_seconds", "call_queue_seconds"];
    assert!(others.iter().all(|name| sum(&seen, name) == 0.0));
    let bounds = text(&daemon)
        .matches("call_run_seconds_bucket{method=\"ping\"")
        .count();
    assert_eq!(bounds, 3, "with that of all");
}

#[test]
fn a_file_is_replaced_as_a_whole() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let file = daemon.dir().write("preforkd.prom", "old");
    let reader = fs::File::open(&file).unwrap();
    let path = file.to_str().unwrap();
    let done = daemon.command(&["metrics", "--textfile", path]);
    assert!(done.status.success() && done.stdout.is_empty(), "{done:?}");
    let old = std::io::read_to_string(reader).unwrap();
    assert_eq!(old, "old", "who has opened the old file reads that");
    let new = samples(&fs::read_to_string(&file).unwrap());
    assert_eq!(value(&new, "workers_target"), 2.0);
    let missing = daemon.dir().join("missing/file");
    let done = daemon.command(&["metrics", "--textfile", missing.to_str().unwrap()]);
    assert_eq!(done.status.code(), Some(71), "{done:?}");
}

#[test]
fn status_has_totals_and_methods() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let mut client = daemon.client();
    client.call(&json!({"in": "fails"}));
    client.call(&json!({"in": "ping"}));
    let done = daemon.command(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&done.stdout).unwrap();
    let totals = &status["totals"];
    assert_eq!(
        (&totals["calls"], &totals["errors"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(totals["accepted"], 1);
    let methods = status["methods"].as_array().unwrap();
    let method = |name: &str| {
        methods
            .iter()
            .find(|method| method["name"] == name)
            .unwrap()
    };
    let fails = method("fails");
    assert_eq!(fails["kind"], "command");
    assert_eq!(fails["errors"], json!({"command-failed": 1}));
    assert!(fails["p50_us"].as_u64() > Some(100), "{fails}");
    assert!(method("sleep")["p50_us"].is_null());
    assert_eq!(method("_OTHER")["kind"], json!(null));
}

#[test]
fn status_has_the_last_reloads_and_the_starts_of_programs() {
    let pool = "[pools.cat]\ncommand = [\"/bin/sleep\", \"1000\"]\nprocesses = 2\nready = \"alive\"\n\
                [methods.cat]\npool = \"cat\"\n";
    let config = format!("{CONFIG}{pool}");
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("reload refused")
        .start();
    assert_eq!(daemon.status()["reloads"], json!([]));
    assert_eq!(daemon.status()["pools"][0]["starts"], 2);
    daemon.refused_reload("nonsense = 1\n");
    daemon.reload_with(&config);
    let status = daemon.status();
    let reloads = status["reloads"].as_array().unwrap();
    assert_eq!(reloads.len(), 2, "{reloads:?}");
    let (refused, done) = (&reloads[0], &reloads[1]);
    assert_eq!(
        (&refused["ok"], &refused["generation"]),
        (&json!(false), &json!(1))
    );
    assert!(
        refused["error"].as_str().unwrap().contains("nonsense"),
        "{refused}"
    );
    assert_eq!(
        (&done["ok"], &done["generation"]),
        (&json!(true), &json!(2))
    );
    assert!(
        done["error"].is_null() && done["took_ms"].as_u64() > Some(0),
        "{done}"
    );
    assert_eq!(done["at"], status["master"]["last_reload"]["at"]);
    let starts = status["pools"].as_array().unwrap().iter();
    let serving = starts
        .filter(|pool| pool["generation"] == 2)
        .map(|pool| &pool["starts"]);
    assert_eq!(serving.collect::<Vec<_>>(), [&json!(4)]);
    // Those of the generation before have ended with their pool process.
    let ordered = "pool_program_exits_total{pool=\"cat\",reason=\"ordered\"}";
    wait_value(&daemon, ordered, 2.0);
    assert_eq!(sum(&scrape(&daemon), "pool_program_exits_total"), 2.0);
}

#[test]
fn quotes_and_backslashes_in_the_path_of_a_listener_harm_neither_text_nor_status() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let path = daemon.dir().join("a\"b\\c.sock");
    let address = format!("unix:{}", path.display());
    // The socket that was passed on stays with its address.
    let listen = format!(
        "[[listen]]\naddress = \"{}\"\n[[listen]]\naddress = '{address}'\nmode = \"0600\"\n",
        daemon.address()
    );
    daemon.reload_with(&format!("{CONFIG}{listen}"));
    UnixStream::connect(&path).unwrap();
    let status = daemon.status();
    assert_eq!(status["listeners"][1]["address"], address);
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "workers_target"), 2.0);
    let escaped = address.replace('\\', "\\\\").replace('"', "\\\"");
    let series = format!(
        "listener_refused_connections_total{{address=\"{escaped}\",reason=\"per_source\"}}"
    );
    assert_eq!(value(&seen, &series), 0.0);
    let top = daemon.command(&["top", "--json", "--once", "--interval", "100ms"]);
    let top: Value = serde_json::from_slice(&top.stdout).unwrap();
    assert_eq!(top["listeners"][1]["address"], address);
}
