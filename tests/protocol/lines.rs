//! Tests lines, and how the first bytes of a connection decide its dialect.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::wire::{DIALECTS, Dialect, Wire, post};
use crate::support::{Daemon, PATIENCE, assert_within, wait_for};

const CONFIG: &str = "
[workers]
count = 2
[limits]
read-timeout = \"300ms\"
[methods.sleep]
builtin = \"sleep\"
[methods.echo]
builtin = \"echo\"
";

fn start() -> Daemon {
    Daemon::builder().config(CONFIG).start()
}

#[test]
fn each_line_is_answered_by_a_line() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send(
        "{\"in\":\"ping\",\"params\":1}\r\n\n \t\r\n{\"in\":\"ping\",\"params\":2}\nnot JSON\n",
    );
    assert_eq!(wire.line(), r#"{"out":"pong","result":1}"#);
    assert_eq!(wire.line(), r#"{"out":"pong","result":2}"#);
    assert!(wire.line().contains("-32700"));
    wire.send("{\"in\":\"sleep\",\"params\":0.2}\n{\"in\":\"ping\",\"id\":\"fast\"}\n");
    assert_eq!(wire.line(), r#"{"out":"pong","result":null,"id":"fast"}"#);
    assert_eq!(wire.line(), r#"{"out":"sleep","result":0.2}"#);
}

#[test]
fn a_client_that_half_closes_gets_its_answers_first_in_every_dialect() {
    let daemon = start();
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        for number in 0..3 {
            wire.ask(dialect, r#"{"in":"sleep","params":0.1}"#);
            wire.ask(
                dialect,
                &json!({"in": "ping", "params": number}).to_string(),
            );
        }
        wire.half_close();
        for number in 0..3 {
            let answers = [wire.answer(dialect), wire.answer(dialect)].map(Option::unwrap);
            assert_eq!(answers[0], r#"{"out":"sleep","result":0.1}"#, "{dialect:?}");
            let pong = json!({"out": "pong", "result": number}).to_string();
            assert_eq!(answers[1], pong, "{dialect:?}");
        }
        assert_eq!(wire.rest(), b"", "{dialect:?}");
    }
    let mut wire = Wire::to(&daemon);
    wire.send(r#"{"in":"ping"}"#).half_close();
    assert_eq!(wire.rest(), b"{\"out\":\"pong\",\"result\":null}\n");
}

/// Returns what the server sends after only these first bytes, until it closes.
fn reaction(daemon: &Daemon, first: &[u8], half_close: bool) -> Vec<u8> {
    let mut wire = Wire::to(daemon);
    wire.send(first);
    if half_close {
        wire.half_close();
    }
    wire.rest()
}

/// Version 1, and version 2, which begins like empty lines.
#[test]
fn the_proxy_protocol_is_refused_by_its_name_and_logged() {
    let daemon = start();
    for first in [
        &b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n{\"in\": \"ping\"}\n"[..],
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02{\"in\": \"ping\"}\n",
    ] {
        let answer = reaction(&daemon, first, false);
        let body = String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned();
        assert!(body.contains("PROXY protocol"), "{body}");
    }
    daemon.wait_log("turn the protocol off in the proxy");
    daemon.wait_log("peer=127.0.0.1:");
    // The signature in two reads, split anywhere.
    let signature = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";
    for split in 1..signature.len() {
        let mut wire = Wire::to(&daemon);
        wire.send(&signature[..split]);
        // A whole call over another connection: the first piece is read by then.
        assert!(reaction(&daemon, b"{\"in\": \"ping\"}\n", true).starts_with(b"{\"out\":\"pong\""));
        wire.send(&signature[split..]);
        let answer = String::from_utf8_lossy(&wire.rest()).into_owned();
        assert!(answer.contains("PROXY protocol"), "{split}: {answer}");
    }
}

/// The hello of a client that speaks TLS looks like a frame that is too large.
#[test]
fn tls_is_refused_by_its_name_and_logged() {
    let daemon = start();
    let hello = [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        &[7; 32],
    ]
    .concat();
    let answer = String::from_utf8_lossy(&reaction(&daemon, &hello, false)).into_owned();
    assert!(
        answer.contains("too-large") && answer.contains("begins with TLS"),
        "{answer}"
    );
    daemon.wait_log("connect without TLS");
}

#[test]
fn a_byte_order_mark_is_passed_over() {
    let daemon = start();
    let mut wire = Wire::to(&daemon);
    wire.send(b"\xEF\xBB\xBF{\"in\": \"ping\", \"params\": 1}\n\xEF\xBB\xBF{\"in\": \"ping\", \"params\": 2}\n");
    for number in [1, 2] {
        assert_eq!(
            wire.line(),
            format!("{{\"out\":\"pong\",\"result\":{number}}}")
        );
    }
}

#[test]
fn the_first_bytes_tell_the_dialect_and_none_is_held_for_ever() {
    let daemon = start();
    let begun = Instant::now();
    let mut cases = 0;
    // Refused at once, without waiting for read-timeout.
    for first in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"\x16\x03\x01\x7a",
        b"SSH-2.0-x\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"null\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"\x01\x00\x00\x01",
        b"\xFF\xFF\xFF\xFF",
    ] {
        let answer = reaction(&daemon, first, false);
        let body = String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned();
        assert!(body.contains("-32004"), "{}: {body}", first.escape_ascii());
        assert_eq!(answer[..4], (body.len() as u32).to_le_bytes(), "as a frame");
        cases += 1;
    }
    // Cut off by read-timeout, with or without an answer; at half-close at once.
    for first in [
        &b"\n"[..],
        b" ",
        b"{",
        b"\x05",
        b"\x05\x00\x00",
        b"\x05\x00\x00\x00{}",
        b"\x00\x00",
        b"GE",
        b"POST / HTTP/1.1\r\nHost: x\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}",
        b"{\"in\":",
        b"\n\n\n{",
        b"[{\"j",
        b"a",
    ] {
        for half_close in [true, false] {
            let answer = String::from_utf8(reaction(&daemon, first, half_close)).unwrap();
            let line_cut =
                first.starts_with(b"{") || first.starts_with(b"[") || first.ends_with(b"{");
            let expected = if line_cut && half_close { "-32700" } else { "" };
            assert!(
                answer.contains(expected),
                "{}: {answer}",
                first.escape_ascii()
            );
            assert!(
                line_cut || answer.is_empty(),
                "{}: {answer}",
                first.escape_ascii()
            );
            cases += 1;
        }
    }
    // Answered at read-timeout, because only then it is known that no fourth byte follows.
    let mut wire = Wire::to(&daemon);
    wire.send("{}\n");
    assert!(wire.line().contains("-32600"));
    wire.send("{\"in\":\"ping\"}\n");
    assert_eq!(wire.line(), r#"{"out":"pong","result":null}"#);
    println!("first bytes: {} cases in {:?}", cases + 1, begun.elapsed());
}

#[test]
fn methods_of_http_are_told_from_lines_and_frames() {
    let daemon = start();
    for (method, status) in [
        ("GET", 405),
        ("HEAD", 405),
        ("PUT", 405),
        ("DELETE", 405),
        ("OPTIONS", 405),
        ("PATCH", 405),
        ("TRACE", 405),
        ("POST", 400),
    ] {
        let mut wire = Wire::to(&daemon);
        wire.send(format!("{method} / HTTP/1.1\r\nHost: x\r\n\r\n"));
        assert_eq!(wire.head().status, status, "{method}");
    }
    let mut wire = Wire::to(&daemon);
    wire.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(wire.response().status, 400);
    let mut wire = Wire::to(&daemon);
    wire.send(b"\0\0\0\0");
    assert!(wire.frame().contains("-32700"));
}

/// Single bytes are no progress: a call that has begun must be complete within one read-timeout.
#[test]
fn slow_senders_are_cut_in_every_dialect() {
    let daemon = start();
    for dialect in DIALECTS {
        let bytes: Vec<u8> = match dialect {
            Dialect::Frame => [&200_u32.to_le_bytes()[..], &[b' '; 200]].concat(),
            Dialect::Line => [b' '; 200].to_vec(),
            Dialect::Http => post("/", &" ".repeat(200)).into_bytes(),
        };
        let mut wire = Wire::to(&daemon);
        let begun = Instant::now();
        let mut sent = 0;
        wait_for("the cut", PATIENCE, || {
            // More than one byte per check of wait_for would be a fast sender.
            wire.send(&bytes[sent.min(bytes.len() - 2)..][..1]);
            sent += 1;
            wire.is_closed()
        });
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(250), "{dialect:?}: {took:?}");
        assert_within(
            &format!("{dialect:?}: cut after {sent} bytes"),
            took,
            Duration::from_secs(2),
        );
    }
}

#[test]
fn a_line_over_the_limit_is_refused_before_its_end() {
    let daemon = Daemon::builder()
        .config("[limits]\nframe = \"1KiB\"\n")
        .start();
    let mut wire = Wire::to(&daemon);
    wire.send(format!(
        "{{\"in\":\"ping\",\"params\":\"{}\"",
        "x".repeat(1200)
    ));
    let answer: Value = serde_json::from_str(&wire.line()).unwrap();
    assert_eq!(answer["result"]["code"], -32004, "{answer}");
    assert_eq!(wire.rest(), b"");
}

#[test]
fn ten_thousand_calls_ahead_come_back_in_order_in_every_dialect() {
    let daemon = start();
    for dialect in DIALECTS {
        let mut wire = Wire::to(&daemon);
        let mut writer = wire.twin();
        let sender = std::thread::spawn(move || {
            for number in 0..10_000 {
                writer.ask(
                    dialect,
                    &json!({"in": "echo", "params": number}).to_string(),
                );
            }
        });
        for number in 0..10_000 {
            let answer = wire.answer(dialect).unwrap();
            assert_eq!(answer, json!({"out": "echo", "result": number}).to_string());
        }
        sender.join().unwrap();
    }
}

#[test]
fn a_reload_hands_lines_and_requests_over_in_the_middle() {
    let config = CONFIG.replace("300ms", "30s");
    let daemon = Daemon::builder().config(&config).start();
    let mut lines = Wire::to(&daemon);
    let mut requests = Wire::to(&daemon);
    let request = post("/echo", "[1,2,3]");
    for round in 0..5 {
        lines.send("{\"in\":\"echo\",").send("\"params\":");
        requests.send(&request[..request.len() - 3]);
        let reloaded = daemon.command(&["reload"]);
        assert!(reloaded.status.success(), "{reloaded:?}");
        lines.send(format!("{round}}}\n"));
        requests.send(&request[request.len() - 3..]);
        assert_eq!(
            lines.line(),
            json!({"out": "echo", "result": round}).to_string()
        );
        assert_eq!(requests.response().body, "[1,2,3]");
    }
}
