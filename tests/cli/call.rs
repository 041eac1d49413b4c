//! Tests `call`: where its params come from, which form it uses, and its exit codes.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Daemon, Dir, PATIENCE, binary, example, wait_for};

const WITH_SLEEP: &str = "
[workers]
count = 2
[methods.sleep]
builtin = \"sleep\"
";

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs `call` with these arguments and this stdin.
fn call(words: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(binary())
        .arg("call")
        .args(words)
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that refuses its arguments reads nothing.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

#[test]
fn params_come_from_stdin_and_the_timeout_is_kept() {
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let address = daemon.address().to_string();
    let words = [
        "ping",
        "-",
        "--id",
        "7",
        "--timeout",
        "10s",
        "--address",
        &address,
    ];
    let output = call(&words, "{\"n\": 1.50}\n");
    assert_eq!(text(&output.stdout), "{\"n\": 1.50}\n", "{output:?}");

    let late = daemon.command(&["call", "sleep", "20", "--timeout", "100ms"]);
    assert_eq!(late.status.code(), Some(1), "{late:?}");
    assert!(text(&late.stderr).contains("timeout"), "{late:?}");
}

/// Other errors of the configuration are the server's; but no other server is called instead.
#[test]
fn a_broken_configuration_still_says_where_the_server_is() {
    let daemon = Daemon::start();
    let address = daemon.address();
    for (broken, code) in [
        (
            format!("nonsense = 1\n[[listen]]\naddress = \"{address}\"\n"),
            0,
        ),
        (
            format!("user = \"nobody-of-that-name\"\n[[listen]]\naddress = \"{address}\"\n"),
            0,
        ),
        (
            format!("[[listen]]\naddress = \"{address}\"\nnonsense = 1\n"),
            78,
        ),
        (format!("[[lisden]]\naddress = \"{address}\"\n"), 78),
        ("daemon = \n".to_owned(), 78),
    ] {
        let config = daemon.dir().write("broken.toml", &broken);
        let output = call(&["ping", "1", "--config", config.to_str().unwrap()], "");
        assert_eq!(output.status.code(), Some(code), "{broken}: {output:?}");
    }
}

#[test]
fn the_exit_code_tells_what_went_wrong() {
    let daemon = Daemon::start();
    let address = daemon.address().to_string();
    for (words, stdin, code, told) in [
        (&["ping", "1", "--address", &address][..], "", 0, ""),
        (&["nope", "--address", &address], "", 1, "method-not-found"),
        (
            &["ping", "-", "--address", &address],
            "{",
            64,
            "stdin is not JSON",
        ),
        (
            &["ping", "{", "--address", &address],
            "",
            64,
            "PARAMS is not JSON",
        ),
        (&["ping", "--timeout", "soon"], "", 64, "500ms"),
        (&["ping", "--address", "nowhere"], "", 64, "not an address"),
        (
            &["ping", "--address", "http://127.0.0.1:18100"],
            "",
            64,
            "leave out http://",
        ),
        (
            &["ping", "--address", "127.0.0.1:99999"],
            "",
            64,
            "a port is 1 to 65535",
        ),
        (
            &["ping", "--address", "unix:/nonexistent/x"],
            "",
            69,
            "no server",
        ),
    ] {
        let output = call(words, stdin);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(told), "{words:?}: {stderr}");
        assert_eq!(stderr.is_empty(), code == 0, "{words:?}: {stderr}");
        assert_eq!(output.stdout.is_empty(), code != 0, "{words:?}");
    }
}

#[test]
fn who_ends_a_call_or_a_map_by_a_signal_has_cancelled_what_runs() {
    let config = "
[methods.nap]
command = [\"sleep\", \"4712\"]
stdin = \"none\"
timeout = \"30s\"
";
    let daemon = Daemon::builder().config(config).start();
    let running = |count: u64| {
        let workers = daemon.workers();
        workers.iter().map(|worker| worker.running).sum::<u64>() == count
    };
    for (command, calls) in [("call", 1), ("map", 2)] {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            // In the background of a shell it would ignore the first of these signals.
            let mut child = Command::new("env")
                .arg("--default-signal=INT,TERM")
                .arg(binary())
                .args([command, "nap", "--address", &daemon.address().to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // The input stays open, as on a terminal.
            let mut stdin = child.stdin.take().unwrap();
            let _ = stdin.write_all(b"1\n2\n");
            wait_for("its calls to run", PATIENCE, || running(calls));
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
            assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
            wait_for("no call to run any more", PATIENCE, || running(0));
        }
    }
}

#[test]
fn a_call_in_the_json_rpc_form_has_the_same_result_and_the_same_errors() {
    let daemon = Daemon::builder()
        .program(example("arithmetic"))
        .config(WITH_SLEEP)
        .start();
    let address = daemon.address().to_string();
    let number = "1234567890123456789012345678901234567890";
    let long = format!("[{number}]");
    for (words, result) in [
        (&["subtract", "[42, 23]"][..], "19"),
        (
            &[
                "subtract",
                r#"{"subtrahend": 23, "minuend": 42}"#,
                "--id",
                "x",
            ],
            "19",
        ),
        (&["ping"], "null"),
        (&["ping", long.as_str(), "--id", number], long.as_str()),
    ] {
        let mut words = words.to_vec();
        words.extend(["--jsonrpc", "--address", &address]);
        let output = call(&words, "");
        assert_eq!(
            text(&output.stdout),
            format!("{result}\n"),
            "{words:?}: {output:?}"
        );
        assert!(output.status.success());
    }
    for (words, told) in [
        (&["nope"][..], "nope: method-not-found (-32601)"),
        (&["subtract", "[\"a\"]"], "invalid-params (-32602)"),
        (&["ping", "7"], "invalid-request (-32600)"),
    ] {
        let mut words = words.to_vec();
        words.extend(["--jsonrpc", "--address", &address]);
        let output = call(&words, "");
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(told), "{stderr}");
        assert!(stderr.contains("did not begin"), "{stderr}");
    }
}

#[test]
fn a_unix_socket_is_called_by_its_path_or_by_the_configuration() {
    let dir = Dir::new();
    let socket = dir.join("rpc.sock");
    let listen = format!("[[listen]]\naddress = \"unix:{}\"\n", socket.display());
    let daemon = Daemon::builder().config(&listen).start();
    let address = format!("unix:{}", socket.display());
    let output = call(&["ping", "[1]", "--address", &address], "");
    assert_eq!(text(&output.stdout), "[1]\n", "{output:?}");
    let config = dir.write("preforkd.toml", &listen);
    let output = call(
        &[
            "ping",
            "[2]",
            "--jsonrpc",
            "--config",
            config.to_str().unwrap(),
        ],
        "",
    );
    assert_eq!(text(&output.stdout), "[2]\n", "{output:?}");
    drop(daemon);
}

/// The printed result cannot control a terminal, and has the same value.
#[test]
fn a_result_is_printed_without_characters_that_steer_a_terminal() {
    let daemon = Daemon::start();
    let address = daemon.address().to_string();
    let steering = "\"\u{9b}2J\u{7f}\u{202e}\u{2028}é\"";
    let output = call(&["ping", steering, "--address", &address], "");
    assert_eq!(
        text(&output.stdout),
        "\"\\u009b2J\\u007f\\u202e\\u2028é\"\n"
    );
}
