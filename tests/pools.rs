//! Pools: programs in any language that live long and answer many calls.
//!
//! A program's crash costs its one call, what is no answer or comes late reaches nobody, and nothing
//! of it is left. The programs here are Python, with and without the shipped helper.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Client, Daemon, Dir, PATIENCE, process, wait_for};

/// The ways in which a program can behave, each a method of it.
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
if mode in ("ready", "slow"):
    say(b'{"out": "ready"}')
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

/// The configuration of a pool `p` with that program and these further keys, which all methods use.
fn config(program: &Path, argument: &str, workers: &str, pool: &str) -> String {
    let program = program.to_str().unwrap();
    let mut text = format!(
        "[workers]\ncount = 1\n{workers}\n[pools.p]\ncommand = [\"python3\", {program:?}, \
         \"{argument}\"]\n{pool}\n",
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
    // larger than what a socket holds, both ways
    let large = "x".repeat(3_000_000);
    assert_eq!(result(&mut client, "echo", &json!(large)), large);
    // the program names its answer itself where it wants to
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
    other.send(r#"{"in": "nap", "params": 0.5}"#);
    wait_for("the nap", PATIENCE, || {
        setting.daemon.workers()[0].running == 1
    });
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
    assert_eq!(other.recv_json()["result"], 0.5);
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    let worker = setting.daemon.ready_workers()[0];
    wait_for("two programs and no zombie", PATIENCE, || {
        process::children(worker).len() == 2 && process::zombies(worker).is_empty()
    });
}

#[test]
fn a_timeout_kills_the_program_and_its_late_answer_reaches_nobody() {
    let setting = setting("", "", &[]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    let began = Instant::now();
    let answer = client.call(&json!({"in": "nap", "params": 0.4, "timeout_ms": 200}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    assert_eq!(answer["result"]["started"], true);
    assert!(began.elapsed() < Duration::from_millis(390));
    for n in 0..20 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
    assert_ne!(pid(&mut client), before);
    wait_for("its end", PATIENCE, || process::state(before).is_none());
}

#[test]
fn what_is_no_answer_is_bad_output_and_what_is_no_frame_ends_the_program() {
    let setting = setting(
        "",
        "respawn-max-delay = \"0s\"",
        &["is killed, for what it sent"],
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
        ("say", json!(r#"{"out": "ready"}"#), "once more"),
        ("say", json!(""), "empty"),
        ("say", json!(deep), "nested deeper"),
        (
            "say",
            json!(r#"{"out": "error", "result": "no"}"#),
            "not an object",
        ),
        // lengths that are none
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
        // A frame that came whole can be told from the next, whatever stands in it.
        let goes_on = method == "say" && reason != "once more";
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
        "respawn-max-delay = \"0s\"",
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
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(result(&mut client, "echo", &json!(2)), 2);
}

/// The protocol has no ids: who answers twice is found out by the second answer.
#[test]
fn an_answer_that_nobody_asked_for_reaches_nobody() {
    let setting = setting(
        "",
        "respawn-max-delay = \"0s\"",
        &["is killed, for what it sent"],
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
    let setting = setting("", "processes = 2", &[]);
    let mut client = setting.daemon.client();
    let worker = setting.daemon.ready_workers()[0];
    let programs = process::children(worker);
    assert_eq!(programs.len(), 2);
    client.send(r#"{"in": "nap", "params": 60, "id": 7}"#);
    wait_for("the nap", PATIENCE, || {
        setting.daemon.workers()[0].running == 1
    });
    client.send(r#"{"in": "rpc.cancel", "params": {"id": 7}}"#);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "cancelled", "{answer}");
    assert_eq!(answer["result"]["started"], true, "{answer}");
    assert_eq!(client.recv_json()["result"], true);
    wait_for_the_end_of_one(&programs);
    wait_for("two again", PATIENCE, || {
        process::children(worker).len() == 2
    });
    let programs = process::children(worker);
    let mut leaver = setting.daemon.client();
    leaver.send(r#"{"in": "nap", "params": 60}"#);
    wait_for("the nap", PATIENCE, || {
        setting.daemon.workers()[0].running == 1
    });
    leaver.reset();
    wait_for_the_end_of_one(&programs);
}

/// Waits until one of two programs is there no more.
fn wait_for_the_end_of_one(programs: &[i32]) {
    wait_for("the end of one program", PATIENCE, || {
        let there = |pid: &&i32| process::state(**pid).is_some();
        programs.iter().filter(there).count() == 1
    });
}

/// What a program has not read can't have begun: that is no crash of it.
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
        "respawn-max-delay = \"0s\"\nprocesses = 2",
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
    // no end of it, on either
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

#[test]
fn a_program_inherits_nothing_but_its_calls() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let daemon = Daemon::builder()
        .config(&config(&program, "", "", ""))
        .env("SECRET_X", "secret")
        .start();
    let mut client = daemon.client();
    let found = result(&mut client, "environment", &Value::Null);
    let lines = found[0].as_array().unwrap();
    let is_python = |line: &&Value| !line.as_str().unwrap().starts_with("LC_CTYPE=");
    let lines: Vec<&Value> = lines.iter().filter(is_python).collect();
    assert_eq!(lines.len(), 1, "{found}");
    let call = format!("PREFORKD_CALL={}.", daemon.ready_workers()[0]);
    assert!(lines[0].as_str().unwrap().starts_with(&call), "{found}");
    // Python itself ignores SIGPIPE and SIGXFSZ
    assert_eq!(
        found[1],
        json!(["SigBlk:\t0000000000000000", "SigIgn:\t0000000001001000"])
    );
    assert_eq!(found[2], json!([0, 1, 2, 3]));
    assert_eq!(found[3], "/");
}

#[test]
fn a_program_that_says_when_it_is_ready_is_waited_for() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let daemon = Daemon::builder()
        .config(&config(
            &program,
            "ready",
            "",
            "ready = \"message\"\nprocesses = 2",
        ))
        .start();
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "echo", &json!(1)), 1);
    assert_eq!(result(&mut client, "asked", &Value::Null), 2);
    // and one that says so unasked is believed all the same
    let daemon = Daemon::builder()
        .config(&config(&program, "ready", "", ""))
        .start();
    let mut client = daemon.client();
    for n in 0..3 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
}

#[test]
fn a_start_fails_with_the_reason_when_a_program_cant_start() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let start = |config: &str| {
        let began = Instant::now();
        let failure = Daemon::builder()
            .config(config)
            .try_start()
            .map(|_| ())
            .unwrap_err();
        println!("refused after {:?}", began.elapsed());
        assert_ne!(failure.code, Some(0));
        failure.log
    };
    let waits = "ready = \"message\"";
    let log = start(&config(&dir.join("missing.py"), "", "", waits));
    assert!(
        log.contains("the program of the pool p has left with exit code 2 before it was ready"),
        "{log}"
    );
    // and the program's own words beside it
    assert!(log.contains("missing.py"), "{log}");
    let silent = "ready = \"message\"\nboot-timeout = \"300ms\"";
    let log = start(&config(&program, "", "", silent));
    assert!(
        log.contains("has not sent {\"out\": \"ready\"} on descriptor 3 within 300ms"),
        "{log}"
    );
}

#[test]
fn a_reload_to_a_program_that_cant_start_changes_nothing() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let setting = setting("", "", &["before it was ready", "can't open file"]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    setting.daemon.configure(&config(
        &dir.join("missing.py"),
        "",
        "",
        "ready = \"message\"",
    ));
    let reload = setting.daemon.command(&["reload"]);
    assert!(!reload.status.success());
    let said = String::from_utf8_lossy(&reload.stderr).into_owned();
    assert!(
        said.contains("exit code 2 before it was ready") && said.contains("can't open file"),
        "{said}"
    );
    assert_eq!(pid(&mut client), before);
    // and a good one brings new programs, and ends the old ones
    setting
        .daemon
        .configure(&config(&program, "", "", "processes = 2"));
    let reload = setting.daemon.command(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    wait_for("a new program's answers", PATIENCE, || {
        pid(&mut client) != before
    });
    wait_for("the end of the old program", PATIENCE, || {
        process::state(before).is_none()
    });
}

#[test]
fn a_worker_whose_programs_are_not_ready_lets_nobody_in() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let setting = setting("", "", &[]);
    let slow = config(&program, "slow", "", "ready = \"message\"");
    setting.daemon.configure(&slow);
    std::thread::scope(|scope| {
        let reload = scope.spawn(|| setting.daemon.command(&["reload"]));
        wait_for("a worker that starts", PATIENCE, || {
            setting
                .daemon
                .workers()
                .iter()
                .any(|it| it.state == "starting")
        });
        let mut longest = Duration::ZERO;
        let mut calls = 0;
        while setting
            .daemon
            .workers()
            .iter()
            .any(|it| it.state == "starting")
        {
            let began = Instant::now();
            let mut client = setting.daemon.client();
            assert_eq!(result(&mut client, "echo", &json!(calls)), calls);
            longest = longest.max(began.elapsed());
            calls += 1;
        }
        println!("{calls} new clients during a start of 1.5 s: at most {longest:?} each");
        assert!(reload.join().unwrap().status.success());
        assert!(
            calls > 3 && longest < Duration::from_secs(1),
            "{calls} {longest:?}"
        );
    });
}

#[test]
fn a_program_that_keeps_dying_is_throttled_and_its_calls_are_told() {
    let setting = setting(
        "",
        "respawn-burst = 1\nrespawn-max-delay = \"400ms\"",
        &["young deaths in a row"],
    );
    let mut client = setting.daemon.client();
    let is_refused = |answer: &Value| {
        let error = &answer["result"];
        assert_eq!(error["name"], "crashed", "{answer}");
        let is_refused = error["started"] == false;
        if is_refused {
            // told at once, safe to send again
            assert!(answer.to_string().contains("exit code 1"), "{answer}");
        }
        is_refused
    };
    wait_for("a refusal", PATIENCE, || {
        is_refused(&call(&mut client, "leave", &json!(1)))
    });
    wait_for("a recovery", PATIENCE, || {
        let answer = call(&mut client, "echo", &json!(1));
        answer["out"] == "echo" || !is_refused(&answer)
    });
}

#[test]
fn an_idle_program_is_ended_and_the_next_call_starts_another() {
    let setting = setting("", "idle-timeout = \"200ms\"\nprocesses = 2", &[]);
    let worker = setting.daemon.ready_workers()[0];
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    wait_for("no program", PATIENCE, || {
        process::children(worker).is_empty()
    });
    assert_ne!(pid(&mut client), before);
    assert_eq!(process::children(worker).len(), 1, "one call, one program");
}

#[test]
fn programs_are_recycled_and_the_fresh_one_is_ready_first() {
    for (keys, method, params) in [
        ("max-calls = 10", "pid", Value::Null),
        ("max-lifetime = \"300ms\"", "pid", Value::Null),
        ("max-memory = \"60MiB\"", "grow", json!(100_000_000)),
    ] {
        let setting = setting("", keys, &[]);
        let worker = setting.daemon.ready_workers()[0];
        let mut client = setting.daemon.client();
        let first = pid(&mut client);
        let mut calls = 0;
        wait_for(&format!("another program, by {keys}"), PATIENCE, || {
            let answer = call(&mut client, method, &params);
            assert_eq!(answer["out"], method, "{answer}");
            calls += 1;
            assert!(process::children(worker).len() <= 3);
            pid(&mut client) != first
        });
        let key = keys.split(' ').next().unwrap();
        setting
            .daemon
            .wait_log(&format!("is replaced, as {key} says"));
        wait_for("the end of the first", PATIENCE, || {
            process::state(first).is_none()
        });
        println!("{keys}: replaced after {calls} calls, none lost");
    }
}

#[test]
fn a_slow_pool_and_busy_threads_keep_each_other_waiting_for_nothing() {
    let dir = Dir::new();
    let program = dir.write("program.py", PROGRAM);
    let mut text = config(&program, "", "threads = 1", "");
    text += "[methods.sleep]\nbuiltin = \"sleep\"\n[methods.plain]\nbuiltin = \"echo\"\n\
             [limits]\nqueue = 5\n";
    let daemon = Daemon::builder().config(&text).start();
    let mut client = daemon.client();
    // the pool is full: one runs, five wait, and one more stands ready
    for id in 0..12 {
        client.send(&json!({"in": "nap", "params": 0.3, "id": id}).to_string());
    }
    let refused = client.recv_json();
    assert_eq!(refused["result"]["name"], "overloaded", "{refused}");
    assert_eq!(refused["result"]["started"], false, "{refused}");
    let began = Instant::now();
    let mut other = daemon.client();
    for n in 0..50 {
        assert_eq!(
            other.call(&json!({"in": "plain", "params": n}))["result"],
            n
        );
    }
    let beside = began.elapsed();
    for _ in 1..12 {
        client.recv_json();
    }
    // the one thread is busy
    other.send(r#"{"in": "sleep", "params": 2}"#);
    wait_for("the sleep", PATIENCE, || daemon.workers()[0].running == 1);
    let began = Instant::now();
    for n in 0..50 {
        assert_eq!(result(&mut client, "echo", &json!(n)), n);
    }
    println!(
        "50 calls of threads beside a full pool: {beside:?}; the other way round: {:?}",
        began.elapsed()
    );
    assert!(beside < Duration::from_millis(300) && began.elapsed() < Duration::from_millis(1500));
}

#[test]
fn a_stop_and_a_reload_let_the_running_call_finish() {
    let mut setting = setting("", "", &[]);
    let mut client = setting.daemon.client();
    let before = pid(&mut client);
    client.send(r#"{"in": "nap", "params": 0.7}"#);
    wait_for("the nap", PATIENCE, || {
        setting.daemon.workers()[0].running == 1
    });
    assert!(setting.daemon.command(&["reload"]).status.success());
    assert_eq!(client.recv_json()["result"], 0.7);
    wait_for("the end of the old program", PATIENCE, || {
        process::state(before).is_none()
    });
    let last = pid(&mut client);
    client.send(r#"{"in": "nap", "params": 0.6}"#);
    wait_for("the nap", PATIENCE, || {
        setting
            .daemon
            .workers()
            .iter()
            .any(|worker| worker.running == 1)
    });
    setting.daemon.signal(Signal::SIGTERM);
    assert_eq!(client.recv_json()["result"], 0.6);
    assert!(setting.daemon.wait_exit().success());
    setting.daemon.wait_group_gone();
    assert!(process::state(last).is_none());
}

/// The bar: each call answered, none wrong, `crashed` for those that ran, nothing left.
#[test]
fn ten_thousand_calls_to_programs_that_die_at_random() {
    const CALLS: usize = 10_000;
    const CLIENTS: usize = 8;
    let setting = setting(
        "",
        "processes = 4\nrespawn-max-delay = \"0s\"",
        &["while it ran maybe", "SIGKILL"],
    );
    let worker = setting.daemon.ready_workers()[0];
    let began = Instant::now();
    let threads: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let mut connection = setting.daemon.client();
            std::thread::spawn(move || {
                let (mut right, mut crashed) = (0, 0);
                for n in 0..CALLS / CLIENTS {
                    let params = json!([client, n, "x".repeat(n % 200)]);
                    let answer = call(&mut connection, "maybe", &params);
                    if answer["out"] == "maybe" {
                        assert_eq!(answer["result"], params);
                        right += 1;
                    } else {
                        assert_eq!(answer["result"]["name"], "crashed", "{answer}");
                        assert_eq!(answer["result"]["started"], true, "{answer}");
                        crashed += 1;
                    }
                }
                (right, crashed)
            })
        })
        .collect();
    let (mut right, mut crashed, mut zombies) = (0, 0, 0);
    for thread in threads {
        while !thread.is_finished() {
            zombies = zombies.max(process::zombies(worker).len());
            std::thread::yield_now();
        }
        let (its_right, its_crashed) = thread.join().unwrap();
        right += its_right;
        crashed += its_crashed;
    }
    let took = began.elapsed();
    let deaths = setting.daemon.log().matches("while it ran maybe").count();
    wait_for("four programs, no zombie", PATIENCE, || {
        process::children(worker).len() == 4 && process::zombies(worker).is_empty()
    });
    println!(
        "{CALLS} calls in {took:?}: {right} right, 0 wrong, {crashed} crashed by {deaths} deaths; \
         zombies: at most {zombies} at a look, 0 at the end"
    );
    assert_eq!(right + crashed, CALLS);
    assert_eq!(crashed, deaths);
    assert!(crashed > 100, "{crashed}");
    assert!(zombies <= 4);
    let Setting {
        mut daemon,
        dir: _dir,
    } = setting;
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    daemon.wait_group_gone();
}
