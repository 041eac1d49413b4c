//! Tests the shipped pool programs in each language: they answer, also with more than a socket holds, and
//! exit when asked to.
//!
//! Each runs as it is in `examples/`. If an interpreter is missing, the test prints that and counts as
//! passed; `tests/run` installs them.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::one_program;
use crate::support::{Client, Daemon, Dir, PATIENCE, markdown, process, source, wait_for};

/// The path of the interpreters, for the tests and for the programs.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

fn example(path: &str) -> String {
    let path = source().join("examples").join(path);
    path.to_str().unwrap().to_owned()
}

/// Returns whether a program exists and runs.
fn has(program: &str, arguments: &[&str]) -> bool {
    let ran = Command::new(program)
        .env("PATH", PATH)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let has = ran.is_ok_and(|status| status.success());
    if !has {
        println!("not run: there is no {program} here");
    }
    has
}

/// Starts a daemon with one pool of this command, which answers these methods.
fn daemon(command: &[&str], keys: &str, methods: &[&str]) -> Daemon {
    let keys = match keys.contains("ready =") {
        true => keys.to_owned(),
        false => format!("ready = \"alive\"\n{keys}"),
    };
    let one = one_program(&keys);
    let mut text = format!(
        "[workers]\ncount = 1\n[pools.p]\n{one}command = {command:?}\n\
         environment = {{ PATH = {PATH:?} }}\n{keys}\n"
    );
    for method in methods {
        text += &format!("[methods.{method:?}]\npool = \"p\"\n");
    }
    Daemon::builder().config(&text).start()
}

fn answer(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))
}

/// Stops the daemon and asserts that its programs have exited without a signal.
fn leaves(mut daemon: Daemon) {
    let programs = process::children(daemon.pool());
    assert_eq!(programs.len(), 1);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait_exit();
    wait_for("the program's end", PATIENCE, || {
        process::state(programs[0]).is_none()
    });
}

/// Starts a daemon with the configuration that is shipped with the helper.
fn with_the_helper() -> Daemon {
    let config = format!(
        "include = [{:?}]\n[workers]\ncount = 1\n",
        example("python/pool.toml")
    );
    Daemon::builder().config(&config).start()
}

#[test]
fn python_with_the_helper() {
    if !has("python3", &["-c", ""]) {
        return;
    }
    let daemon = with_the_helper();
    let mut client = daemon.client();
    for params in [
        json!(["a great day"]),
        json!({"text": "a great day"}),
        json!("a great day"),
    ] {
        let score = answer(&mut client, "score", &params)["result"]
            .as_f64()
            .unwrap();
        assert!((score - 2.0 / 3.0).abs() < 1e-9);
    }
    let first = answer(&mut client, "model.age", &Value::Null)["result"]
        .as_f64()
        .unwrap();
    let second = answer(&mut client, "model.age", &json!([]))["result"]
        .as_f64()
        .unwrap();
    assert!(first <= second, "it was loaded once");
    let large = "great ".repeat(500_000);
    assert_eq!(answer(&mut client, "score", &json!([large]))["result"], 2.0);
    let error = &answer(&mut client, "score", &json!(""))["result"];
    assert_eq!(error["code"], 1, "{error}");
    assert_eq!(error["message"], "there is nothing to score");
    let error = &answer(&mut client, "score", &json!([1, 2]))["result"];
    assert_eq!(
        (&error["code"], &error["started"]),
        (&json!(-32602), &json!(false)),
        "{error}"
    );
    leaves(daemon);
}

/// Only the server knows whether a call began. A program that denies it would make clients send it again.
#[test]
fn a_program_cannot_say_that_a_call_did_not_begin() {
    let program = r#"
import json, os, struct
pipe = os.fdopen(3, "r+b", buffering=0)
def send(message):
    body = json.dumps(message).encode()
    pipe.write(struct.pack("<I", len(body)) + body)
send({"out": "ready"})
while True:
    length = struct.unpack("<I", pipe.read(4))[0]
    pipe.read(length)
    send({"out": "error", "result": {"code": -32002, "message": "later", "started": False}})
"#;
    let dir = Dir::new();
    let program = dir.write("denies.py", program);
    let config = format!(
        "[workers]\ncount = 1\n[pools.p]\nprocesses = 1\ncommand = [\"python3\", {program:?}]\n[methods.m]\npool = \"p\"\n"
    );
    let daemon = Daemon::builder().config(&config).start();
    let error = &answer(&mut daemon.client(), "m", &json!(1))["result"];
    assert_eq!(
        (&error["code"], &error["started"]),
        (&json!(-32002), &json!(true)),
        "{error}"
    );
}

/// The README shows a whole program and its configuration. Returns the directory of the program, `model.py`, and a
/// configuration with its pool.
fn pool_of_the_readme() -> (Dir, String) {
    let readme = std::fs::read_to_string(source().join("README.md")).unwrap();
    let blocks = markdown::blocks(&readme);
    let program = blocks.iter().find(|block| block.language == "py").unwrap();
    let pool = blocks
        .iter()
        .find(|block| block.text.contains("[pools.model]"))
        .unwrap();
    let dir = Dir::new();
    let path = dir.write("model.py", &program.text);
    std::fs::copy(example("python/preforkd.py"), dir.join("preforkd.py")).unwrap();
    let pool = pool.text.replace("/srv/model.py", path.to_str().unwrap());
    (dir, format!("[workers]\ncount = 1\n{pool}"))
}

#[test]
fn the_program_in_the_readme() {
    if !has("python3", &["-c", ""]) {
        return;
    }
    let (_dir, config) = pool_of_the_readme();
    let daemon = Daemon::builder().config(&config).start();
    let mut client = daemon.client();
    assert_eq!(
        answer(&mut client, "score", &json!("a good day"))["result"],
        1
    );
}

#[test]
fn python_that_raises_answers_internal_and_lives() {
    if !has("python3", &["-c", ""]) {
        return;
    }
    let daemon = with_the_helper();
    let mut client = daemon.client();
    // A number has no words.
    let error = &answer(&mut client, "score", &json!(5))["result"];
    assert_eq!(error["code"], -32603, "{error}");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("AttributeError"),
        "{error}"
    );
    daemon.wait_log("Traceback");
    // JSON, and more digits than Python accepts for a number.
    let digits = format!(r#"{{"in": "score", "params": [{}]}}"#, "9".repeat(5000));
    let error: Value = serde_json::from_str(&client.call_text(&digits)).unwrap();
    let code = &error["result"]["code"];
    assert!(*code == -32602 || *code == -32603, "{error}");
    assert!(answer(&mut client, "score", &json!("good"))["result"].is_number());
}

#[test]
fn python_without_help() {
    for python in ["python3", "python2"] {
        if !has(python, &["-c", ""]) {
            continue;
        }
        let program = example("python/plain.py");
        let daemon = daemon(&[python, &program], "", &["plain.reverse", "plain.other"]);
        let mut client = daemon.client();
        assert_eq!(
            answer(&mut client, "plain.reverse", &json!("abc"))["result"],
            "cba"
        );
        let large = "xy".repeat(1_000_000);
        let reversed = "yx".repeat(1_000_000);
        assert_eq!(
            answer(&mut client, "plain.reverse", &json!(large))["result"],
            reversed
        );
        assert_eq!(
            answer(&mut client, "plain.other", &Value::Null)["result"]["code"],
            1
        );
        leaves(daemon);
    }
}

/// Debian has no Python 2 any more; lib2to3 still knows its grammar.
#[test]
fn the_plain_program_is_python_2_as_well() {
    const PARSE: &str = "import sys, warnings\n\
         warnings.simplefilter('ignore')\n\
         from lib2to3 import pygram, pytree\n\
         from lib2to3.pgen2 import driver\n\
         grammar = driver.Driver(pygram.python_grammar, convert=pytree.convert)\n\
         grammar.parse_string(open(sys.argv[1]).read())\n";
    if !has("python3", &["-W", "ignore", "-c", "import lib2to3"]) {
        return;
    }
    let parsed = Command::new("python3")
        .env("PATH", PATH)
        .args(["-W", "ignore", "-c", PARSE, &example("python/plain.py")])
        .output()
        .unwrap();
    assert!(
        parsed.status.success(),
        "{}",
        String::from_utf8_lossy(&parsed.stderr)
    );
}

#[test]
fn node() {
    if !has("node", &["-e", ""]) {
        return;
    }
    let program = example("node/pool.js");
    let methods = ["js.upper", "js.sum", "js.none"];
    let daemon = daemon(&["node", &program], "ready = \"message\"", &methods);
    let mut client = daemon.client();
    assert_eq!(
        answer(&mut client, "js.upper", &json!("straße"))["result"],
        "STRASSE"
    );
    assert_eq!(
        answer(&mut client, "js.sum", &json!([1, 2, 3.5]))["result"],
        6.5
    );
    let large = "x".repeat(2_000_000);
    let upper = "X".repeat(2_000_000);
    assert_eq!(
        answer(&mut client, "js.upper", &json!(large))["result"],
        upper
    );
    for params in [json!(null), json!(1)] {
        let error = &answer(&mut client, "js.sum", &params)["result"];
        assert_eq!(error["code"], 1, "{error}");
    }
    assert_eq!(
        answer(&mut client, "js.none", &Value::Null)["result"]["code"],
        1
    );
    leaves(daemon);
}

#[test]
fn shell() {
    if !has("bash", &["-c", ""]) || !has("jq", &["-n", "1"]) {
        return;
    }
    let program = example("shell/pool.sh");
    let daemon = daemon(&[&program], "", &["sh.words", "sh.none"]);
    let mut client = daemon.client();
    assert_eq!(
        answer(&mut client, "sh.words", &json!("to be or nöt"))["result"],
        4
    );
    let large = "word ".repeat(200_000) + "end";
    assert_eq!(
        answer(&mut client, "sh.words", &json!(large))["result"],
        200_001
    );
    assert_eq!(
        answer(&mut client, "sh.none", &Value::Null)["result"]["code"],
        1
    );
    leaves(daemon);
}

/// It fails later than after the time for which a program with `ready = "alive"` must live.
#[test]
fn the_pool_in_the_readme_takes_no_program_that_fails_while_it_loads() {
    if !has("python3", &["-c", ""]) {
        return;
    }
    let (dir, config) = pool_of_the_readme();
    let daemon = Daemon::builder()
        .config(&config)
        .expect_log("before it was ready")
        .expect_log("no_such_module")
        .start();
    dir.write(
        "model.py",
        "import time\ntime.sleep(0.3)\nimport no_such_module\n",
    );
    let reload = daemon.command(&["reload"]);
    let said = String::from_utf8_lossy(&reload.stderr).into_owned();
    assert_eq!(reload.status.code(), Some(1), "{said}");
    assert!(said.contains("before it was ready"), "{said}");
    let good = json!("a good day");
    assert_eq!(answer(&mut daemon.client(), "score", &good)["result"], 1);
}
