//! Checks the calculators of examples/, and that a client and a handler of a fork-per-connection server work on
//! an isolated listener without a change.

use std::process::Command;

use serde_json::{Value, json};

use super::builder;
use crate::support::{Client, example, source};

#[track_caller]
fn enter(client: &mut Client, items: Value) -> Value {
    client.call(&json!({"in": "enter", "params": items}))["result"].clone()
}

fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap_or_else(|| panic!("{value}"));
    list.iter().map(|it| it.as_f64().unwrap()).collect()
}

#[test]
fn a_calculator_in_python_and_in_rust_keeps_a_stack_for_each_connection() {
    let read = |name: &str| std::fs::read_to_string(source().join("examples/python").join(name));
    let rust = example("calculator");
    let python = "[\"python3\", \"calculator.py\"]".to_owned();
    for command in [python, format!("[{rust:?}]")] {
        let tables = format!(
            "[pools.calculator]\ncommand = {command}\ndirectory = \".\"\nscope = \"connection\"\n\
             [methods.enter]\npool = \"calculator\"\n"
        );
        let daemon = builder(&tables, "")
            .file("calculator.py", &read("calculator.py").unwrap())
            .file("preforkd.py", &read("preforkd.py").unwrap())
            .start();
        let (mut one, mut other) = (daemon.client(), daemon.client());
        assert_eq!(numbers(&enter(&mut one, json!([1, 2, "+"]))), [3.0]);
        assert_eq!(numbers(&enter(&mut other, json!([5]))), [5.0]);
        assert_eq!(numbers(&enter(&mut one, json!([4, "*"]))), [12.0]);
        assert_eq!(
            enter(&mut one, json!([0, "/"]))["code"]
                .as_i64()
                .map(|it| it > 0),
            Some(true)
        );
        assert_eq!(
            numbers(&enter(&mut one, json!([]))),
            [12.0],
            "the error changed nothing"
        );
        assert_eq!(numbers(&enter(&mut other, json!([]))), [5.0]);
    }
    let config = read("calculator.toml").unwrap();
    assert!(
        config.contains("isolation = \"connection\"") && config.contains("scope = \"connection\"")
    );
}

/// The handler of a fork-per-connection server, with the socket of its connection.
const HANDLER: &str = r#"
import json, socket, struct

def handle_conn(conn, addr, handlers):
    while True:
        length_prefix = conn.recv(4)
        if not length_prefix:
            conn.close()
            break
        length, = struct.unpack("I", length_prefix)
        request = json.loads(conn.recv(length).decode())
        handler = handlers[request["in"]]
        handler(conn, request["params"])

def send_result(conn, out, result):
    response = json.dumps({"out": out, "result": result}).encode()
    conn.sendall(struct.pack("I", len(response)))
    conn.sendall(response)

seen = []

def remember(conn, params):
    seen.append(params)
    send_result(conn, "remembered", seen)

if __name__ == "__main__":
    conn = socket.fromfd(3, socket.AF_UNIX, socket.SOCK_STREAM)
    handle_conn(conn, None, {"remember": remember})
"#;

/// The client that comes with it.
const CLIENT: &str = r#"
import json, socket, struct, sys

def rpc(sock, in_, params):
    request = json.dumps({"in": in_, "params": params}).encode()
    sock.sendall(struct.pack("I", len(request)))
    sock.sendall(request)
    length, = struct.unpack("I", sock.recv(4))
    response = json.loads(sock.recv(length).decode())
    return response["out"], response["result"]

s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.connect(("127.0.0.1", int(sys.argv[1])))
for i in range(3):
    out, result = rpc(s, "remember", "ireader %d" % i)
    print("%s %d" % (out, len(result)))
print("%s %s" % rpc(s, "ping", "ireader"))
s.close()
"#;

#[test]
fn a_client_and_a_handler_of_a_fork_per_connection_server_work_unchanged() {
    let is_there = |python: &str| {
        let asked = Command::new(python).arg("-c").arg("pass").output();
        asked.is_ok_and(|it| it.status.success())
    };
    let pythons = ["python3", "python2.7"];
    for python in pythons.into_iter().filter(|it| is_there(it)) {
        let tables = format!(
            "[pools.old]\ncommand = [{python:?}, \"handler.py\"]\ndirectory = \".\"\nready = \"alive\"\n\
             scope = \"connection\"\n[methods.remember]\npool = \"old\"\n"
        );
        let daemon = builder(&tables, "")
            .file("handler.py", HANDLER)
            .file("client.py", CLIENT)
            .start();
        for _ in 0..2 {
            let output = Command::new(python)
                .arg(daemon.dir().join("client.py"))
                .arg(daemon.address().port().to_string())
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let expected = "remembered 1\nremembered 2\nremembered 3\npong ireader\n";
            assert_eq!(text, expected, "{python}: {output:?}");
        }
    }
}
