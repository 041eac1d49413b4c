//! Tests the Python helper with typical uses of Python: print, start processes, run by hand; and with the
//! signals of a service manager.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::one_program;
use crate::support::{Client, Daemon, Dir, process, source};

const PROGRAM: &str = r#"
import multiprocessing, os, subprocess, sys, time
from preforkd import method, serve

@method
def say(text, nap=0):
    print("SAID", text)
    time.sleep(nap)

@method
def warn(text):
    sys.stderr.write(text + "\n")

@method(spread=False)
def kind(params):
    return type(params).__name__

def square(number):
    return number * number

@method
def squares(way, numbers):
    with multiprocessing.get_context(way).Pool(2) as pool:
        return pool.map(square, numbers)

@method
def children():
    """How a program and a fork end that get SIGTERM."""
    program = subprocess.run(["sh", "-c", "kill -TERM $$; sleep 1"]).returncode
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), 15)
        os._exit(0)
    return [program, os.waitpid(pid, 0)[1]]

serve()
"#;

fn helper() -> String {
    std::fs::read_to_string(source().join("examples/python/preforkd.py")).unwrap()
}

fn daemon(keys: &str, expected: &[&str]) -> Daemon {
    let one = one_program(keys);
    let mut text = format!(
        "[workers]\ncount = 1\n[pools.p]\n{one}command = [\"python3\", \"program.py\"]\ndirectory = \".\"\n{keys}\n"
    );
    for method in ["say", "warn", "kind", "squares", "children"] {
        text += &format!("[methods.{method}]\npool = \"p\"\ntimeout = \"10s\"\n");
    }
    let mut builder = Daemon::builder()
        .file("program.py", PROGRAM)
        .file("preforkd.py", &helper())
        .config(&text.replace("\"10s\"\n[methods.warn]", "\"1s\"\n[methods.warn]"));
    for text in expected {
        builder = builder.expect_log(text);
    }
    builder.start()
}

fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))["result"].take()
}

#[test]
fn what_a_program_prints_is_logged_at_once_and_not_lost_when_it_is_killed() {
    let daemon = daemon("", &[]);
    let mut client = daemon.client();
    result(&mut client, "say", &json!(["first"]));
    daemon.wait_log("SAID first");
    let late = result(&mut client, "say", &json!(["second", 20]));
    assert_eq!(late["name"], "timeout", "{late}");
    daemon.wait_log("SAID second");
    daemon.wait_log("was killed while it ran say");
}

#[test]
fn a_list_is_one_argument_where_it_is_not_spread() {
    let daemon = daemon("", &[]);
    let mut client = daemon.client();
    for (params, kind) in [
        (json!([1, 2]), "list"),
        (json!({"a": 1}), "dict"),
        (Value::Null, "NoneType"),
        (json!("text"), "str"),
    ] {
        assert_eq!(result(&mut client, "kind", &params), kind);
    }
}

/// They need `sys.executable`, which Python finds by argv[0], and run the program's file again.
#[test]
fn children_of_multiprocessing_do_not_serve() {
    let daemon = daemon("", &[]);
    let mut client = daemon.client();
    for way in ["spawn", "forkserver", "fork"] {
        let squares = result(&mut client, "squares", &json!([way, [1, 2, 3]]));
        assert_eq!(squares, json!([1, 4, 9]), "{way}");
    }
}

/// As with systemd's default KillMode, which signals all processes of a service.
#[test]
fn sigterm_ends_no_call_and_reaches_the_children() {
    let daemon = daemon("", &[]);
    let programs = process::children(daemon.pool());
    assert_eq!(programs.len(), 1);
    let mut client = daemon.client();
    client.send(&json!({"in": "say", "params": ["slowly", 0.5]}).to_string());
    daemon.wait_log("SAID slowly");
    kill(Pid::from_raw(programs[0]), Signal::SIGTERM).unwrap();
    assert_eq!(client.recv_json(), json!({"out": "say", "result": null}));
    assert_eq!(process::children(daemon.pool()), programs);
    let ends = result(&mut client, "children", &Value::Null);
    assert_eq!(ends, json!([-15, 15]));
}

#[test]
fn sigterm_to_all_processes_of_the_server_ends_no_call() {
    let mut daemon = daemon("", &[]);
    let mut all = daemon.processes();
    all.extend(process::children(daemon.pool()));
    let mut client = daemon.client();
    client.send(&json!({"in": "say", "params": ["slowly", 0.5]}).to_string());
    daemon.wait_log("SAID slowly");
    for pid in all {
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
    assert_eq!(client.recv_json(), json!({"out": "say", "result": null}));
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
}

#[test]
fn standard_error_has_the_configured_level_and_lines_their_own() {
    let daemon = daemon("stderr-level = \"info\"", &["ERROR"]);
    let mut client = daemon.client();
    for text in ["quiet", "<3>broken", "<4>odd"] {
        result(&mut client, "warn", &json!([text]));
    }
    for (level, text) in [("INFO", "quiet"), ("ERROR", "broken"), ("WARN", "odd")] {
        daemon.wait_log(&format!("]: {text}"));
        let log = daemon.log();
        let line = log
            .lines()
            .find(|line| line.contains(&format!("]: {text}")));
        assert!(line.is_some_and(|line| line.contains(level)), "{line:?}");
    }
}

/// Runs the program without preforkd and types this.
fn by_hand(terminal: bool, typed: &str) -> Output {
    const TERMINAL: &str = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";
    let dir = Dir::new();
    dir.write("program.py", PROGRAM);
    dir.write("preforkd.py", helper());
    let mut command = Command::new("python3");
    if terminal {
        command.args(["-c", TERMINAL, "python3"]);
    }
    let mut child = command
        .arg("program.py")
        .current_dir(&*dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(typed.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_program_that_is_started_by_hand_says_that_preforkd_starts_it() {
    let output = by_hand(false, "");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("preforkd starts it") && said.contains("preforkd run"),
        "{said}"
    );
}

#[test]
fn a_program_that_is_started_in_a_terminal_reads_calls_from_it() {
    // The last character ends the input of a terminal.
    let output = by_hand(true, "{\"in\": \"kind\", \"params\": [1]}\nnonsense\n\u{4}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains(r#"{"out": "kind", "result": "list"}"#),
        "{said}"
    );
    assert!(said.contains("this is no call"), "{said}");
}
