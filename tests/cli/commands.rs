//! Tests commands as handlers: input and output, what a hostile caller can do with them, and their
//! errors.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::strace::Strace;
use crate::support::{Client, Daemon, PATIENCE, process, wait_for};

/// Methods for all kinds of programs.
const CONFIG: &str = r#"
[workers]
count = 1
threads = 8
drain-timeout = "120s"
[limits]
timeout = "20s"

[methods.cat]
command = ["cat"]
[methods.json]
command = ["cat"]
output = "json"
[methods.argument]
command = ["printf", "%s|", "first", "{value}", "last"]
[methods.behind]
command = ["printf", "%s|", "--", "{value}"]
[methods.text]
command = ["cat"]
stdin = "text"
output = "line"
[methods.brace]
command = ["printf", "%s", "{{value}"]
[methods.itself]
command = ["python3", "-c", "import os, sys; print(sys.executable, os.environ['PATH'])"]
[methods.fail]
command = ["sh", "-c", "echo so it goes >&2; exit 7"]
[methods.signal]
command = ["sh", "-c", "kill -SEGV $$"]
[methods.endless]
command = ["yes"]
timeout = "10s"
[methods.loud]
command = ["sh", "-c", "head -c 100000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 3"]
[methods.deaf]
command = ["sh", "-c", "exec 0<&-; sleep 0.1; echo done"]
[methods.silent]
command = ["true"]
output = "json"
[methods.half]
command = ["printf", "{\"a\": [1, "]
output = "json"
[methods.deep]
command = ["sh", "-c", "head -c 1000 /dev/zero | tr '\\0' '['"]
output = "json"
[methods.binary]
command = ["printf", "\\377"]
[methods.environment]
command = ["env"]
environment = { COLOR = "blue", LANG = "C.UTF-8" }
[methods.surroundings]
command = ["sh", "-c", "pwd; umask; ls /proc/$$/fd; ulimit -n; exec grep -E '^Sig(Blk|Ign)' /proc/self/status"]
directory = "/usr"
rlimits = { files = 40 }
[methods.descriptors]
command = ["ls", "/proc/self/fd"]
stdin = "none"
timeout = "120s"
[methods.memory]
command = ["python3", "-c", "x = bytearray(400_000_000)"]
rlimits = { memory = "200MiB" }
[methods.spin]
command = ["sh", "-c", "while :; do :; done"]
rlimits = { cpu = "1s" }
timeout = "15s"
"#;

fn daemon() -> Daemon {
    Daemon::builder().config(CONFIG).start()
}

fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))["result"].take()
}

#[test]
fn a_command_reads_its_params_and_its_output_is_the_result() {
    let daemon = daemon();
    let mut client = daemon.client();
    // Byte for byte, in and out.
    let params = r#"{"n": 1234567890123456789012345678901234567890.10, "é": [ ]}"#;
    assert_eq!(
        client.call_text(&format!(r#"{{"in": "json", "params": {params}}}"#)),
        format!(r#"{{"out":"json","result":{params}}}"#)
    );
    let text = result(&mut client, "cat", &json!("x\n\"y\""));
    assert_eq!(text, r#""x\n\"y\"""#);
    assert_eq!(result(&mut client, "cat", &Value::Null), "null");
    // More than a pipe holds, in both directions at once.
    let large = "x".repeat(900_000);
    assert_eq!(result(&mut client, "json", &json!(large)), large);
}

#[test]
fn text_goes_in_without_quotes_and_comes_out_without_its_last_newline() {
    let daemon = daemon();
    let mut client = daemon.client();
    for (text, output) in [
        ("a \"b\"\n", "a \"b\""),
        ("\n\n", "\n"),
        ("", ""),
        ("é", "é"),
    ] {
        assert_eq!(result(&mut client, "text", &json!(text)), output);
    }
    let refused = result(&mut client, "text", &json!({"a": 1}));
    assert_eq!(refused["name"], "invalid-params", "{refused}");
    assert_eq!(result(&mut client, "brace", &Value::Null), "{value}");
}

/// With only its name as argv[0] and no PATH, Python finds neither itself nor other programs.
#[test]
fn a_command_knows_its_own_path_and_has_a_path() {
    let daemon = daemon();
    let said = result(&mut daemon.client(), "itself", &Value::Null);
    let said = said.as_str().unwrap();
    let (python, path) = said.trim_end().split_once(' ').unwrap();
    assert!(std::path::Path::new(python).is_file(), "{said}");
    assert_eq!(
        path,
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    );
}

#[test]
fn a_placeholder_is_one_argument_whatever_the_value_is() {
    let daemon = daemon();
    let mut client = daemon.client();
    for value in [
        "a b", "", "; id", "$(id)", "a\nb", "{value}", "*", "%n", "'\"\\", "é",
    ] {
        let text = result(&mut client, "argument", &json!({"value": value}));
        assert_eq!(text, format!("first|{value}|last|"));
    }
    for (value, spelt) in [(json!(1.5), "1.5"), (json!(true), "true"), (json!(7), "7")] {
        let text = result(&mut client, "argument", &json!({"value": value}));
        assert_eq!(text, format!("first|{spelt}|last|"));
    }
    assert_eq!(
        result(&mut client, "behind", &json!({"value": "-rf"})),
        "--|-rf|"
    );
}

#[test]
fn params_that_can_be_no_argument_are_refused_unstarted() {
    let daemon = daemon();
    let mut client = daemon.client();
    for params in [
        json!(null),
        json!([1]),
        json!({}),
        json!({"value": null}),
        json!({"value": [1]}),
        json!({"value": "-x"}),
        json!({"value": "--help"}),
        json!({"value": -1}),
        json!({"value": "a\u{0}b"}),
        json!({"value": "x".repeat(200_000)}),
    ] {
        let error = result(&mut client, "argument", &params);
        assert_eq!(error["code"], -32602, "{params:.60}: {error}");
        assert_eq!(error["started"], false, "{error}");
    }
}

#[test]
fn a_command_that_fails_says_how_and_why() {
    let daemon = daemon();
    let mut client = daemon.client();
    let error = result(&mut client, "fail", &Value::Null);
    assert_eq!(error["code"], -32010, "{error}");
    assert_eq!(error["name"], "command-failed");
    assert_eq!(error["started"], true);
    assert_eq!(error["data"], json!({"exit": 7, "stderr": "so it goes\n"}));
    let error = result(&mut client, "signal", &Value::Null);
    assert_eq!(error["data"], json!({"signal": "SIGSEGV", "stderr": ""}));
    let error = result(&mut client, "loud", &Value::Null);
    assert_eq!(error["data"]["exit"], 3, "{error}");
    let text = error["data"]["stderr"].as_str().unwrap();
    assert!(
        text.ends_with("xxx\nthe end\n") || text.ends_with("xxxthe end\n"),
        "{text}"
    );
    assert!(text.len() <= 4096);
}

#[test]
fn output_that_can_be_no_result_is_bad_output() {
    let daemon = daemon();
    let mut client = daemon.client();
    for (method, reason) in [
        ("endless", "max-output"),
        ("silent", "empty"),
        ("half", "JSON"),
        ("deep", "nested deeper than 128"),
        ("binary", "UTF-8"),
    ] {
        let error = result(&mut client, method, &Value::Null);
        assert_eq!(error["code"], -32011, "{method}: {error}");
        assert_eq!(error["started"], true, "{method}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(reason), "{method}: {error}");
    }
    // A program that does not read its input is no error.
    let large = json!("x".repeat(500_000));
    assert_eq!(result(&mut client, "deaf", &large), "done\n");
    let worker = daemon.ready_workers()[0];
    wait_for("nothing left of yes", PATIENCE, || {
        process::children(worker).is_empty()
    });
}

#[test]
fn a_command_inherits_nothing_of_the_daemons() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .env("SECRET_X", "secret")
        .env("BIG", "x".repeat(100_000))
        .start();
    let mut client = daemon.client();
    let text = result(&mut client, "environment", &Value::Null);
    let mut lines: Vec<&str> = text.as_str().unwrap().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(lines[..2], ["COLOR=blue", "LANG=C.UTF-8"]);
    assert!(lines[2].starts_with("PATH=/usr/local/sbin:"), "{lines:?}");
    let call = format!("PREFORKD_CALL={}.", daemon.ready_workers()[0]);
    assert!(lines[3].starts_with(&call), "{lines:?}");

    let text = result(&mut client, "surroundings", &Value::Null);
    let words: Vec<&str> = text.as_str().unwrap().split_whitespace().collect();
    let none = "0000000000000000";
    let expected = [
        "/usr", "0022", "0", "1", "2", "40", "SigBlk:", none, "SigIgn:", none,
    ];
    assert_eq!(words, expected);
}

#[test]
fn limits_of_the_system_hold_in_the_command() {
    let daemon = daemon();
    let mut client = daemon.client();
    let error = result(&mut client, "memory", &Value::Null);
    assert_eq!(error["data"]["exit"], 1, "{error}");
    assert!(error.to_string().contains("MemoryError"), "{error}");
    let error = result(&mut client, "spin", &Value::Null);
    assert_eq!(error["data"]["signal"], "SIGXCPU", "{error}");
}

#[test]
fn a_thousand_commands_at_once_have_three_descriptors_each() {
    let daemon = daemon();
    let clients: Vec<_> = (0..10)
        .map(|_| {
            let mut client = daemon.client();
            std::thread::spawn(move || {
                for id in 0..100 {
                    client.send(&json!({"in": "descriptors", "id": id}).to_string());
                }
                let mut seen = BTreeSet::new();
                for _ in 0..100 {
                    let answer = client.recv_json();
                    // The fourth is the directory that ls itself has opened.
                    assert_eq!(answer["result"], "0\n1\n2\n3\n", "{answer}");
                    seen.insert(answer["id"].as_u64().unwrap());
                }
                seen.len()
            })
        })
        .collect();
    // Accept connections meanwhile.
    for _ in 0..100 {
        drop(daemon.client());
    }
    let answered: usize = clients.into_iter().map(|it| it.join().unwrap()).sum();
    println!("1000 commands in parallel: {answered} answered, descriptors 0, 1, 2 in each");
    assert_eq!(answered, 1000);
    let worker = daemon.ready_workers()[0];
    assert!(process::children(worker).is_empty(), "zombies or leftovers");
}

#[test]
fn concurrency_refuses_what_is_over_it() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 4\n[methods.nap]\ncommand = [\"sleep\", \"1\"]\n\
             concurrency = 2\n",
        )
        .start();
    let mut client = daemon.client();
    client.send_together((0..4).map(|id| json!({"in": "nap", "id": id})));
    let answers: Vec<Value> = (0..4).map(|_| client.recv_json()).collect();
    let refused = answers
        .iter()
        .filter(|it| it["result"]["name"] == "overloaded")
        .count();
    assert_eq!(refused, 2, "{answers:?}");
}

#[test]
fn a_program_that_went_away_is_told_and_nothing_dies() {
    let dir = crate::support::Dir::new();
    let program = dir.write("program", "#!/bin/sh\necho here\n");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, executable).unwrap();
    let path = program.to_str().unwrap();
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\n[methods.p]\ncommand = [\"{path}\"]\n"
        ))
        .expect_log("could not be started")
        .expect_log("reload refused")
        .start();
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "p", &Value::Null), "here\n");
    std::fs::remove_file(&program).unwrap();
    let error = result(&mut client, "p", &Value::Null);
    assert_eq!(error["code"], -32010, "{error}");
    assert!(error.to_string().contains("No such file"), "{error}");
    // A configuration that names it is refused from now on.
    let reload = daemon.command(&["reload"]);
    assert!(!reload.status.success());
    assert!(String::from_utf8_lossy(&reload.stderr).contains("there is no program"));
}

#[test]
fn no_descriptors_left_is_overloaded_and_recovers() {
    let daemon = daemon();
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "cat", &json!(1)), "1");
    let worker = daemon.ready_workers()[0];
    let set = |limit: u64| {
        let limit = nix::libc::rlimit {
            rlim_cur: limit,
            rlim_max: 4096,
        };
        let arguments = [
            format!("--pid={worker}"),
            format!("--nofile={}:", limit.rlim_cur),
        ];
        let status = Command::new("prlimit").args(arguments).status().unwrap();
        assert!(status.success());
    };
    let open = process::descriptors(worker) as u64;
    set(open + 2);
    let error = result(&mut client, "cat", &json!(1));
    assert_eq!(error["name"], "overloaded", "{error}");
    assert_eq!(error["started"], false, "{error}");
    set(1024);
    assert_eq!(result(&mut client, "cat", &json!(1)), "1");
}

/// strace watches every execve of the daemon and its processes.
#[test]
fn no_caller_makes_anything_else_run() {
    let daemon = daemon();
    let mut client = daemon.client();
    let Some(strace) = Strace::attach(&daemon, daemon.ready_workers()[0], "execve") else {
        return;
    };
    let evil = [
        ";id",
        "$(id)",
        "`id`",
        "a\nid",
        "--help",
        "-x",
        "../../bin/sh",
        "() { :;}; id",
        "%n%n",
        "|id",
        "&& id",
        "a\u{0}b",
        "{value}",
        "/bin/sh",
        "${IFS}id",
        "'",
        "\"",
        "\\",
        "~",
        "*",
    ];
    let (mut attempts, mut ran) = (0, 0);
    for round in 0..10 {
        for text in evil {
            attempts += 2;
            let value = format!("{text}{}", " ".repeat(round));
            let as_method = client.call(&json!({"in": value, "params": {"value": text}}));
            assert_eq!(as_method["result"]["code"], -32601, "{as_method}");
            let answer = client.call(&json!({"in": "argument", "params": {"value": value}}));
            if answer["out"] == "argument" {
                ran += 1;
                assert_eq!(answer["result"], format!("first|{value}|last|"));
            } else {
                assert_eq!(answer["result"]["code"], -32602, "{answer}");
            }
        }
    }
    let mut executed = strace.end();
    executed.retain(|line| line.contains("execve("));
    let others: Vec<&String> = executed
        .iter()
        .filter(|line| !line.contains("/printf\", \"%s|\", \"first\", "))
        .collect();
    println!(
        "{attempts} hostile calls, {ran} ran, {} execve, {} of others",
        executed.len(),
        others.len()
    );
    assert_eq!(executed.len(), ran);
    assert!(others.is_empty(), "{others:#?}");
}

#[test]
fn a_slow_command_keeps_nobody_else_waiting() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\nthreads = 2\n[methods.nap]\ncommand = [\"sleep\", \"60\"]\n\
             timeout = \"5s\"\n",
        )
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap", "id": 1}"#);
    let began = Instant::now();
    for n in 0..100 {
        assert_eq!(
            client.call(&json!({"in": "ping", "params": n, "id": 2}))["id"],
            2
        );
    }
    let pings = began.elapsed();
    let answer = client.recv_json();
    let took = began.elapsed();
    println!("100 pings in {pings:?} beside a command; its timeout of 5 s came after {took:?}");
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    assert!(took < Duration::from_secs(10) && pings < Duration::from_secs(5));
}

#[test]
#[ignore = "needs root, which alone can become another user: tests/run runs it"]
fn a_command_runs_as_its_user_with_no_rights_left() {
    let methods = "[workers]\ncount = 1\n[methods.who]\ncommand = [\"sh\", \"-c\", \"id -u; id -G; \
                   grep -E '^(CapInh|CapPrm|CapEff|CapAmb)' /proc/self/status\"]\nuser = \"nobody\"\n";
    let of_workers = format!("user = \"nobody\"\n{methods}");
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let mut expected = vec![nobody.uid.to_string(), nobody.gid.to_string()];
    for name in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        expected.extend([name.to_owned(), "0".repeat(16)]);
    }
    let assert_nobody = |daemon: &Daemon| {
        let text = result(&mut daemon.client(), "who", &Value::Null);
        let words: Vec<&str> = text.as_str().unwrap().split_whitespace().collect();
        assert_eq!(words, expected);
    };
    // Also if the workers already are that user.
    assert_nobody(&Daemon::builder().config(&of_workers).start());
    let daemon = Daemon::builder().config(methods).start();
    assert_nobody(&daemon);
    // Also if the file says so and a reload cannot change it.
    daemon.configure(&of_workers);
    let done = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.contains("user cannot change"), "{done:?}");
    wait_for("the old worker gone", PATIENCE, || {
        daemon.workers().iter().all(|it| it.generation == 2)
    });
    assert_nobody(&daemon);
}

/// A missing program would otherwise log a line for each call.
#[test]
fn calls_of_a_program_that_is_gone_do_not_fill_the_log() {
    let dir = crate::support::Dir::new();
    let program = dir.write("program", "#!/bin/sh\n");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).unwrap();
    let daemon = Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\n[methods.gone]\ncommand = [\"{}\"]\n",
            program.display()
        ))
        .expect_log("could not be started")
        .start();
    std::fs::remove_file(&program).unwrap();
    let mut client = daemon.client();
    for _ in 0..200 {
        assert_eq!(
            result(&mut client, "gone", &json!(1))["name"],
            "command-failed"
        );
    }
    let lines = daemon.log().matches("could not be started").count();
    assert!((1..=10).contains(&lines), "{lines} lines");
}

#[test]
fn check_names_commands_that_run_text_of_a_caller_as_a_program() {
    let dir = crate::support::Dir::new();
    let path = dir.write(
        "p.toml",
        r#"[methods.any]
command = ["sh", "-c", "{script}"]
[methods.launched]
command = ["env", "{program}"]
[methods.safe]
command = ["sh", "-c", "echo \"$1\"", "sh", "{name}"]
"#,
    );
    let output = crate::support::check(&path);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    for part in [
        "methods.any.command: ",
        "-c runs whatever a caller sends in {script} as a program",
        "methods.launched.command: ",
        "runs the program that a caller names in {program}",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(!said.contains("methods.safe"), "{said}");
}
