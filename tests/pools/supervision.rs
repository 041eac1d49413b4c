//! Tests pools: programs in any language that live long and answer many calls.
//!
//! A crash of a program costs only its call, an invalid or late answer reaches no caller, and no process
//! is left. The programs here are Python, with and without the shipped helper.

mod deaths;
mod life;
mod reloads;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::one_program;
use crate::support::{Client, Daemon, Dir, PATIENCE, assert_within, process, wait_for};

/// The behaviours of a program, one method each.
const PROGRAM: &str = r#"
import json, os, random, signal, socket, struct, sys, time

calls = socket.socket(fileno=3)

def take(length):
    data = b""
    while len(data) < length:
        piece = calls.recv(length - len(data))
        if not piece:
            sys.exit(0)
        data += piece
    return data

def frame(body):
    return struct.pack("<I", len(body)) + body

def say(body):
    calls.sendall(frame(body))

mode = sys.argv[1] if len(sys.argv) > 1 else ""
if mode == "slow":
    time.sleep(1.5)
if mode == "late":
    time.sleep(0.3)
if mode in ("ready", "slow", "late"):
    say(b'{"out": "ready"}')
if mode == "late":
    time.sleep(0.3)
asked = 0
while True:
    length, = struct.unpack("<I", take(4))
    body = take(length)
    asked += 1
    call = json.loads(body.decode())
    name, params = call["in"], call["params"]
    if name == "echo":
        say(b'{"out": "echo", "result": ' + body[body.index(b'"params":') + 9:-1] + b'}')
    elif name == "pid":
        say(json.dumps({"out": "pid", "result": os.getpid()}).encode())
    elif name == "asked":
        say(json.dumps({"out": "asked", "result": asked}).encode())
    elif name == "nap":
        time.sleep(params)
        say(json.dumps({"out": "nap", "result": params}).encode())
    elif name == "die":
        os.kill(os.getpid(), getattr(signal, params))
    elif name == "leave":
        sys.exit(params)
    elif name == "raw":
        calls.sendall(params.encode("latin-1"))
    elif name == "say":
        say(params.encode())
    elif name == "print":
        sys.stdout.write(params); sys.stdout.flush()
        say(b'{"out": "print", "result": null}')
    elif name == "complain":
        os.write(2, params.encode("latin-1"))
        say(b'{"out": "complain", "result": null}')
    elif name == "flood":
        while True:
            os.write(1 + params, b"flood\n" * 1000)
    elif name == "last":
        say(json.dumps({"out": "last", "result": params}).encode())
        sys.exit(0)
    elif name == "grow":
        kept = bytearray(params)
        say(b'{"out": "grow", "result": null}')
    elif name == "hang_up":
        os.close(3)
        time.sleep(3600)
    elif name == "twice":
        calls.sendall(frame(b'{"out": "twice", "result": 1}') * 2)
    elif name == "half":
        calls.sendall(frame(b'{"out": "half", "result": 1}')[:20])
        time.sleep(3600)
    elif name == "maybe":
        if random.random() < 0.02:
            os.kill(os.getpid(), random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        say(json.dumps({"out": "maybe", "result": params}).encode())
    elif name == "environment":
        lines = ["%s=%s" % pair for pair in sorted(os.environ.items())]
        status = open("/proc/self/status").read()
        signals = [line for line in status.splitlines() if line[:6] in ("SigBlk", "SigIgn")]
        fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1]
        say(json.dumps({"out": "e", "result": [lines, signals, fds, os.getcwd()]}).encode())
"#;

const METHODS: [&str; 18] = [
    "echo",
    "pid",
    "asked",
    "nap",
    "die",
    "leave",
    "raw",
    "say",
    "print",
    "complain",
    "flood",
    "last",
    "grow",
    "hang_up",
    "twice",
    "half",
    "maybe",
    "environment",
];

/// Returns the configuration of a pool `p` with this program and further keys, which all methods use.
fn config(program: &Path, argument: &str, workers: &str, pool: &str) -> String {
    let program = program.to_str().unwrap();
    let ready = match pool.contains("ready =") {
        true => "",
        false => "ready = \"alive\"\n",
    };
    let one = one_program(pool);
    let mut text = format!(
        "[workers]\ncount = 1\n{workers}\n[pools.p]\n{one}command = [\"python3\", {program:?}, \
         \"{argument}\"]\n{ready}{pool}\n",
    );
    for method in METHODS {
        text += &format!("[methods.{method}]\npool = \"p\"\ntimeout = \"5s\"\n");
    }
    text
}

/// A daemon with such a pool.
struct Setting {
    daemon: Daemon,
    dir: Dir,
}

fn setting(workers: &str, pool: &str, expect: &[&str]) -> Setting {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let mut builder = Daemon::builder().config(&config(&program, "", workers, pool));
    for line in expect {
        builder = builder.expect_log(line);
    }
    let daemon = builder.start();
    Setting { daemon, dir }
}

fn call(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))
}

fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    call(client, method, params)["result"].take()
}

fn pid(client: &mut Client) -> i32 {
    let pid = result(client, "pid", &Value::Null);
    i32::try_from(pid.as_i64().unwrap_or_else(|| panic!("{pid}"))).unwrap()
}

#[test]
fn a_program_answers_many_calls_to_the_letter() {
    let setting = setting("", "", &[]);
    let mut client = setting.daemon.client();
    let params = r#"{"n": 1234567890123456789012345678901234567890.10, "é": [ ], "n": 1}"#;
    assert_eq!(
        client.call_text(&format!(r#"{{"in": "echo", "params": {params}, "id": 7}}"#)),
        format!(r#"{{"out":"echo","result":{params},"id":7}}"#)
    );
    assert_eq!(
        client.call_text(r#"{"in": "echo"}"#),
        r#"{"out":"echo","result":null}"#
    );
    // Larger than a socket holds, in both directions.
    let large = "x".repeat(3_000_000);
    assert_eq!(result(&mut client, "echo", &json!(large)), large);
    // The program can name its answer itself.
    let answer = call(
        &mut client,
        "say",
        &json!(r#"{"out": "pong", "result": [1, 2]}"#),
    );
    assert_eq!(answer, json!({"out": "pong", "result": [1, 2]}));
    let asked = result(&mut client, "asked", &Value::Null);
    assert_eq!(asked, 5, "one process has answered all");
}

#[test]
fn a_crash_costs_its_one_call() {
    let setting = setting(
        "",
        "processes = 2",
        &["was ended by SIGSEGV", "exit code 3"],
    );
    let mut other = setting.daemon.client();
    let mut client = setting.daemon.client();
    other.send(r#"{"in": "nap", "params": 3}"#);
    setting.daemon.wait_busy(1);
    for (method, params, word) in [
        ("die", json!("SIGSEGV"), "SIGSEGV"),
        ("leave", json!(3), "code 3"),
    ] {
        let error = result(&mut client, method, &params);
        assert_eq!(error["code"], -32003, "{error}");
        assert_eq!(error["name"], "crashed");
        assert_eq!(error["started"], true);
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
    assert_eq!(other.recv_json()["result"], 3);
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    let pool = setting.daemon.pool();
    wait_for("two programs and no zombie", PATIENCE, || {
        process::children(pool).len() == 2 && process::zombies(pool).is_empty()
    });
}

#[test]
fn a_timeout_kills_the_program_and_its_late_answer_reaches_nobody() {
    let setting = setting("", "when-abandoned = \"kill\"", &[]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    // The first call shows that the answer would come soon without the kill.
    assert_eq!(result(&mut client, "nap", &json!(0.4)), 0.4);
    let answer = client.call(&json!({"in": "nap", "params": 1.5, "timeout_ms": 200}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    assert_eq!(answer["result"]["started"], true);
    for n in 0..20 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
    assert_ne!(pid(&mut client), before);
    wait_for("its end", PATIENCE, || process::state(before).is_none());
}

/// Clients that disconnect repeatedly end no program.
#[test]
fn a_program_finishes_an_abandoned_call_and_goes_on() {
    let setting = setting("", "", &[]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    for _ in 0..10 {
        let mut leaver = setting.daemon.client();
        leaver.send(r#"{"in": "nap", "params": 0.02}"#);
        setting.daemon.wait_busy(1);
        leaver.reset();
    }
    let answer = client.call(&json!({"in": "nap", "params": 0.5, "timeout_ms": 100}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    assert_eq!(pid(&mut client), before);
    // At the timeout of the method, 5 s, it is ended in any case.
    let began = Instant::now();
    client.send(r#"{"in": "nap", "params": 60, "timeout_ms": 100}"#);
    assert_eq!(client.recv_json()["result"]["name"], "timeout");
    wait_for("its end", PATIENCE, || process::state(before).is_none());
    let took = began.elapsed();
    assert!(took > Duration::from_millis(4900), "{took:?}");
    assert_within("its end", took, Duration::from_secs(8));
    assert_eq!(result(&mut client, "echo", &json!(2)), 2);
}

#[test]
fn what_is_no_answer_is_bad_output_and_what_is_no_frame_ends_the_program() {
    let setting = setting(
        "",
        "respawn-max-delay = \"0s\"",
        &["was killed, because it sent"],
    );
    let mut client = setting.daemon.client();
    let deep = format!(
        "{{\"out\": \"x\", \"result\": {}1{}}}",
        "[".repeat(200),
        "]".repeat(200)
    );
    let cases = [
        ("say", json!("nonsense"), "not an object"),
        (
            "say",
            json!(r#"{"out": "say", "result": nonsense}"#),
            "expected",
        ),
        ("say", json!("[1, 2]"), "not an object"),
        ("say", json!(r#"{"result": 1}"#), "out"),
        ("say", json!(r#"{"out": "say"}"#), "result"),
        ("say", json!(r#"{"out": "ready"}"#), "second ready"),
        ("say", json!(""), "empty"),
        ("say", json!(deep), "nested deeper"),
        (
            "say",
            json!(r#"{"out": "error", "result": "no"}"#),
            "not an object",
        ),
        // Invalid lengths.
        ("raw", json!("\u{ff}\u{ff}\u{ff}\u{7f}"), "2147483647 bytes"),
        ("raw", json!("HTTP/1.1 200 OK"), "limits.frame"),
    ];
    for (method, params, reason) in cases {
        let before = pid(&mut client);
        let error = result(&mut client, method, &params);
        assert_eq!(error["code"], -32011, "{params:.40}: {error}");
        assert_eq!(error["started"], true, "{params:.40}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(reason), "{params:.40}: {error}");
        // The end of a complete frame is known, whatever its content.
        let goes_on = method == "say" && reason != "second ready";
        assert_eq!(pid(&mut client) == before, goes_on, "{params:.40}");
    }
    let error = call(
        &mut client,
        "say",
        &json!(r#"{"out": "error", "result": {"code": 42, "message": "no", "data": [1.50]}}"#),
    );
    assert_eq!(error["out"], "error", "{error}");
    assert_eq!(error["result"]["code"], 42);
    assert_eq!(error["result"]["data"].to_string(), "[1.5]");
    assert_eq!(error["result"]["started"], true);
}

#[test]
fn half_an_answer_and_a_closed_descriptor_wait_for_nothing() {
    let setting = setting(
        "",
        "when-abandoned = \"kill\"\nrespawn-max-delay = \"0s\"",
        &["closed its descriptor 3"],
    );
    let mut client = setting.daemon.client();
    let answer = client.call(&json!({"in": "half", "timeout_ms": 300}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    assert_eq!(answer["result"]["started"], true);
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    let began = Instant::now();
    let error = result(&mut client, "hang_up", &Value::Null);
    assert_eq!(error["name"], "crashed", "{error}");
    assert_within("told", began.elapsed(), Duration::from_secs(2));
    assert_eq!(result(&mut client, "echo", &json!(2)), 2);
}

/// The protocol has no ids: a second answer to a call is detected when it arrives.
#[test]
fn an_answer_that_nobody_asked_for_reaches_nobody() {
    let setting = setting(
        "",
        "respawn-max-delay = \"0s\"",
        &["was killed, because it sent"],
    );
    let mut client = setting.daemon.client();
    for n in 0..20 {
        let first = pid(&mut client);
        assert_eq!(result(&mut client, "twice", &Value::Null), 1);
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
        assert_ne!(pid(&mut client), first);
    }
}

#[test]
fn a_call_that_is_given_up_takes_its_program_along() {
    let setting = setting("", "processes = 2\nwhen-abandoned = \"kill\"", &[]);
    let mut client = setting.daemon.client();
    let pool = setting.daemon.pool();
    let programs = process::children(pool);
    assert_eq!(programs.len(), 2);
    client.send(r#"{"in": "nap", "params": 60, "id": 7}"#);
    setting.daemon.wait_busy(1);
    client.send(r#"{"in": "rpc.cancel", "params": {"id": 7}}"#);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "cancelled", "{answer}");
    assert_eq!(answer["result"]["started"], true, "{answer}");
    assert_eq!(client.recv_json()["result"], true);
    wait_for_the_end_of_one(&programs);
    wait_for("two again", PATIENCE, || process::children(pool).len() == 2);
    let programs = process::children(pool);
    let mut leaver = setting.daemon.client();
    leaver.send(r#"{"in": "nap", "params": 60}"#);
    setting.daemon.wait_busy(1);
    leaver.reset();
    wait_for_the_end_of_one(&programs);
}

/// Waits until one of two programs is gone.
fn wait_for_the_end_of_one(programs: &[i32]) {
    wait_for("the end of one program", PATIENCE, || {
        let there = |pid: &&i32| process::state(**pid).is_some();
        programs.iter().filter(there).count() == 1
    });
}

/// A call that a program has not read cannot have begun, so this is no crash of the call.
#[test]
fn a_call_that_a_leaving_program_has_not_read_goes_to_the_next() {
    let setting = setting("", "respawn-max-delay = \"0s\"", &["exit code 0"]);
    let mut client = setting.daemon.client();
    let rounds = 20;
    for n in 0..rounds {
        client.send(r#"{"in": "last", "params": 0}"#);
        client.send(&json!({"in": "echo", "params": n}).to_string());
        assert_eq!(client.recv_json()["result"], 0);
        assert_eq!(client.recv_json()["result"], n);
    }
}

#[test]
fn what_a_program_prints_goes_to_the_log_and_holds_up_nobody() {
    let setting = setting(
        "",
        "respawn-max-delay = \"0s\"\nprocesses = 2\nwhen-abandoned = \"kill\"",
        &["lines left out"],
    );
    let mut client = setting.daemon.client();
    result(
        &mut client,
        "print",
        &json!("hello\nw\u{1b}[0m\nlast without end"),
    );
    result(&mut client, "complain", &json!("caf\u{e9} \u{ff}\n"));
    setting.daemon.wait_log("]: hello");
    setting.daemon.wait_log("]: w\\u{1b}[0m");
    setting.daemon.wait_log("]: caf\\xe9 \\xff");
    let log = setting.daemon.log();
    let of = |text: &str| {
        log.lines()
            .find(|line| line.contains(text))
            .unwrap()
            .to_owned()
    };
    assert!(
        of("hello").contains("INFO") && of("hello").contains("pool p ["),
        "{log}"
    );
    assert!(of("caf").contains("WARN"), "{log}");
    // Endless output on both.
    let began = Instant::now();
    for output in [0, 1] {
        client.send(
            &json!({"in": "flood", "params": output, "timeout_ms": 1000, "id": output}).to_string(),
        );
    }
    let mut other = setting.daemon.client();
    for n in 0..100 {
        assert_eq!(other.call(&json!({"in": "ping", "params": n}))["result"], n);
    }
    let pings = began.elapsed();
    for _ in 0..2 {
        assert_eq!(client.recv_json()["result"]["name"], "timeout");
    }
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    setting.daemon.wait_log("lines left out");
    let lines = setting
        .daemon
        .log()
        .lines()
        .filter(|line| line.ends_with(": flood"))
        .count();
    println!("100 pings in {pings:?} beside two floods, of which {lines} lines are in the log");
    assert!(lines < 6000, "{lines}");
}
