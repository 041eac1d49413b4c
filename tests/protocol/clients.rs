//! Tests clients of other projects: curl, and JSON-RPC libraries from PyPI.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::support::{Daemon, Dir, example, source};

/// Returns the Python of a virtual environment with the libraries, made by `tests/run`.
fn python() -> PathBuf {
    std::env::var_os("CLIENTS_PYTHON")
        .map_or_else(|| source().join("target/clients/bin/python"), PathBuf::from)
}

fn arithmetic() -> Daemon {
    Daemon::builder()
        .program(example("arithmetic"))
        .config("[workers]\ncount = 2\n[methods.echo]\nbuiltin = \"echo\"\n")
        .start()
}

/// Runs a program and compares its output.
#[track_caller]
fn prints(daemon: &Daemon, program: &str, expected: &str) {
    let dir = Dir::new();
    let file = dir.write("client.py", program);
    let output: Output = Command::new(python())
        .arg(file)
        .arg(daemon.address().port().to_string())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", python().display()));
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(printed.trim_end(), expected.trim(), "{output:?}");
}

#[test]
#[ignore = "needs jsonrpclib-pelix: tests/run installs it and runs this"]
fn jsonrpclib_pelix_calls_over_http() {
    prints(
        &arithmetic(),
        r#"
import sys
import jsonrpclib

url = "http://127.0.0.1:" + sys.argv[1]
server = jsonrpclib.ServerProxy(url)
print(server.subtract(42, 23))
print(server.subtract(minuend=42, subtrahend=23))
print(server.get_data())
try:
    jsonrpclib.ServerProxy(url)._notify.update(1, 2, 3)
except jsonrpclib.jsonrpc.TransportError as error:
    print(error.args[1])  # it takes the 204 of a notification for an error, and stumbles over it
batch = jsonrpclib.MultiCall(server)
batch.sum(1, 2, 4)
batch.subtract(2, 1)
print(sorted(batch()))
try:
    server.foobar()
except jsonrpclib.ProtocolError as error:
    print(error.args[0][0])
for number in range(200):
    assert server.sum(number, 1) == number + 1
print("done")
"#,
        "19\n19\n['hello', 5]\n204\n[1, 7]\n-32601\ndone",
    );
}

#[test]
#[ignore = "needs tinyrpc: tests/run installs it and runs this"]
fn tinyrpc_calls_over_http() {
    prints(
        &arithmetic(),
        r#"
import sys
from tinyrpc import RPCClient
from tinyrpc.exc import RPCError
from tinyrpc.protocols.jsonrpc import JSONRPCProtocol
from tinyrpc.transports.http import HttpPostClientTransport

transport = HttpPostClientTransport("http://127.0.0.1:" + sys.argv[1] + "/")
server = RPCClient(JSONRPCProtocol(), transport).get_proxy()
print(server.subtract(42, 23))
print(server.get_data())
try:
    server.foobar()
except RPCError as error:
    print("refused")
"#,
        "19\n['hello', 5]\nrefused",
    );
}

#[test]
#[ignore = "needs aiorpcx: tests/run installs it and runs this"]
fn aiorpcx_calls_over_lines() {
    prints(
        &arithmetic(),
        r#"
import asyncio, sys
import aiorpcx

async def main():
    async with aiorpcx.connect_rs("127.0.0.1", int(sys.argv[1])) as session:
        print(await session.send_request("subtract", [42, 23]))
        print(await session.send_request("subtract", {"subtrahend": 23, "minuend": 42}))
        await session.send_notification("update", [1, 2])
        async with session.send_batch() as batch:
            batch.add_request("sum", [1, 2, 4])
            batch.add_notification("notify_hello", [7])
            batch.add_request("get_data")
        print(list(batch.results))
        try:
            await session.send_request("foobar")
        except aiorpcx.RPCError as error:
            print(error.code, error.message)
        calls = [session.send_request("sum", [number, 1]) for number in range(200)]
        print(sum(await asyncio.gather(*calls)))

asyncio.run(main())
"#,
        "19\n19\n[7, ['hello', 5]]\n-32601 Method not found\n20100",
    );
}

#[test]
fn curl_gets_two_megabytes_back_with_a_length_and_in_chunks() {
    let daemon = arithmetic();
    let dir = Dir::new();
    let body = format!("[\"{}\"]", "0123456789".repeat(200_000));
    let file = dir.write("body", &body);
    let url = format!("http://{}/echo", daemon.address());
    let data = format!("@{}", file.display());
    for more in [
        &[][..],
        &["-H", "Expect: 100-continue"],
        &["-H", "Expect:"],
        &["-H", "Transfer-Encoding: chunked"],
        &["-0"],
    ] {
        let output = Command::new("curl")
            .args(["--verbose", "--fail", "--expect100-timeout", "20"])
            .args(["--data-binary", &data])
            .args(more)
            .arg(&url)
            .output()
            .unwrap();
        assert!(output.status.success(), "{more:?}: {output:?}");
        assert!(output.stdout == body.as_bytes(), "{more:?}");
        // curl waits for "100 Continue" only if it has asked for it, as it does for large bodies.
        let told = String::from_utf8_lossy(&output.stderr);
        let waits = told.contains("> Expect: 100-continue");
        assert_eq!(told.contains("< HTTP/1.1 100"), waits, "{more:?}: {told}");
        assert!(waits || more != ["-H", "Expect: 100-continue"], "{told}");
    }
}
