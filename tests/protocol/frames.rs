//! Tests the frame dialect with correct clients: order, ids, sizes, splits, exact numbers.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Client, Daemon, PATIENCE, Sweep, wait_for};

pub const WITH_BUILTINS: &str = "
[workers]
count = 2
[methods.echo]
builtin = \"echo\"
[methods.sleep]
builtin = \"sleep\"
";

#[test]
fn a_hundred_thousand_calls_sent_ahead_come_back_in_order() {
    const CALLS: usize = 100_000;
    let daemon = Daemon::start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    let mut writer = client.second();
    let sender = thread::spawn(move || {
        for batch in 0..CALLS / 100 {
            let mut bytes = Vec::new();
            for number in batch * 100..(batch + 1) * 100 {
                let body = format!(r#"{{"in": "ping", "params": {number}}}"#);
                bytes.extend(crate::support::frame(body.as_bytes()));
            }
            writer.send_raw(&bytes);
        }
    });
    for number in 0..CALLS {
        assert_eq!(
            client.recv_text(),
            format!(r#"{{"out":"pong","result":{number}}}"#)
        );
    }
    sender.join().unwrap();
    println!("{CALLS} calls sent ahead, {CALLS} answers in their order");
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn an_id_overtakes_a_slow_call_and_order_is_kept_without_one() {
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let mut client = daemon.client();
    client.send_together([
        json!({"in": "sleep", "params": 2}),
        json!({"in": "ping", "params": "behind"}),
        json!({"in": "ping", "params": "ahead", "id": "a"}),
        json!({"in": "sleep", "params": 0.1, "id": 2}),
    ]);
    assert_eq!(client.recv_json()["id"], "a");
    assert_eq!(client.recv_json()["id"], 2);
    assert_eq!(client.recv_json()["out"], "sleep");
    assert_eq!(client.recv_json()["result"], "behind");
}

#[test]
fn ten_mebibytes_of_params_come_back_equal() {
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let sweep = Sweep::of(&daemon);
    let params = format!("\"{}\"", "0123456789abcdef".repeat(10 << 16));
    assert_eq!(params.len(), (10 << 20) + 2);
    let mut client = daemon.client();
    let answer = client.call_text(&format!(r#"{{"in": "echo", "params": {params}}}"#));
    assert!(answer == format!(r#"{{"out":"echo","result":{params}}}"#));
    drop(client);
    sweep.assert_same(&daemon);
}

/// More calls than a connection may have unanswered (`limits.pipeline`): the rest waits unread.
#[test]
fn slow_and_fast_calls_sent_ahead_are_answered_once_each() {
    const CALLS: usize = 6000;
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    let mut writer = client.second();
    let sender = thread::spawn(move || {
        for number in 0..CALLS {
            let id = if number % 3 == 0 {
                String::new()
            } else {
                format!(r#", "id": {number}"#)
            };
            let call = match number % 5 {
                0 => r#""in": "sleep", "params": 0.001"#.to_owned(),
                _ => format!(r#""in": "ping", "params": {number}"#),
            };
            writer.send(&format!("{{{call}{id}}}"));
        }
    });
    let mut seen = vec![0; CALLS];
    // Answers without an id come in order; those of sleep do not show to which call they belong.
    let mut plain = (0..CALLS).filter(|number| number % 3 == 0);
    for _ in 0..CALLS {
        let answer = client.recv_json();
        assert_ne!(answer["out"], "error", "{answer}");
        let number = match answer["id"].as_u64() {
            Some(id) => id as usize,
            None => plain.next().unwrap(),
        };
        if number % 5 == 0 {
            assert_eq!(answer["out"], "sleep", "{number}: {answer}");
        } else {
            assert_eq!(answer["result"], number, "{answer}");
        }
        seen[number] += 1;
    }
    sender.join().unwrap();
    assert!(seen.iter().all(|&times| times == 1));
    println!("{CALLS} slow and fast calls sent ahead, each answered once");
    drop(client);
    sweep.assert_same(&daemon);
}

/// One segment per piece: each is sent at once (TCP_NODELAY), and usually read before the next. The
/// assertion holds in either case.
#[test]
fn two_frames_are_answered_in_every_split_and_byte_by_byte() {
    let daemon = Daemon::start();
    let sweep = Sweep::of(&daemon);
    let mut bytes = crate::support::frame(br#"{"in": "ping", "params": 1}"#);
    bytes.extend(crate::support::frame(
        r#"{"in": "ping", "params": "é", "id": 2}"#.as_bytes(),
    ));
    let mut client = daemon.client();
    let check = |client: &mut Client| {
        assert_eq!(client.recv_json(), json!({"out": "pong", "result": 1}));
        assert_eq!(
            client.recv_json(),
            json!({"out": "pong", "result": "é", "id": 2})
        );
    };
    for split in 0..=bytes.len() {
        client.send_raw(&bytes[..split]);
        // Wait for an answer on another connection, so that this one has been read.
        daemon.client().call(&json!({"in": "ping"}));
        client.send_raw(&bytes[split..]);
        check(&mut client);
    }
    for _ in 0..20 {
        for byte in &bytes {
            client.send_raw(&[*byte]);
        }
        check(&mut client);
    }
    println!(
        "{} splits and 20 times {} single bytes, all answered",
        bytes.len() + 1,
        bytes.len()
    );
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn ids_and_params_keep_every_digit() {
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let mut client = daemon.client();
    for text in [
        "0",
        "-0",
        "9007199254740993",
        "18446744073709551615",
        "18446744073709551616",
        "1234567890123456789012345678901234567890",
        "1e400",
        "1.0",
        r#""\u0000""#,
        r#""\ud83d\ude00 \/""#,
        r#""""#,
    ] {
        let call = format!(r#"{{"in": "echo", "params": [{text}], "id": {text}}}"#);
        let answer = client.call_text(&call);
        assert_eq!(
            answer,
            format!(r#"{{"out":"echo","result":[{text}],"id":{text}}}"#)
        );
    }
    // Only the handler interprets the params.
    let twice = r#"{"a":1,"a":2}"#;
    assert_eq!(
        client.call_text(&format!(r#"{{"in": "echo", "params": {twice}}}"#)),
        format!(r#"{{"out":"echo","result":{twice}}}"#)
    );
}

#[test]
fn who_half_closes_gets_all_answers_first() {
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 0.2}"#);
    client.send(r#"{"in": "ping", "params": 2}"#);
    client.send(r#"{"in": "sleep", "params": 0.1, "id": 3}"#);
    // And the beginning of another frame, which is no call.
    client.send_raw(&[9, 0, 0]);
    client.stream().shutdown(Shutdown::Write).unwrap();
    let answers = client.recv_all();
    assert_eq!(answers.len(), 3);
    wait_for("the connection's end", PATIENCE, || {
        daemon.workers().iter().all(|it| it.connections == 0)
    });
    sweep.assert_same(&daemon);
}

/// Without TCP_NODELAY the client's kernel holds the second piece until the first one is acknowledged,
/// which the server's kernel would delay by 40 ms.
#[test]
fn a_call_in_two_writes_is_as_fast_as_in_one() {
    const CALLS: usize = 300;
    let daemon = Daemon::start();
    for (name, first, second) in [
        ("frame", &b"\x0d\0\0\0"[..], &br#"{"in":"ping"}"#[..]),
        ("line", br#"{"in":"#, b"\"ping\"}\n"),
        (
            "HTTP",
            b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n",
            b"1",
        ),
    ] {
        let median = |pieces: &[&[u8]]| {
            let mut stream = TcpStream::connect(daemon.address()).unwrap();
            let mut times: Vec<Duration> = (0..CALLS)
                .map(|_| {
                    let begun = Instant::now();
                    for piece in pieces {
                        stream.write_all(piece).unwrap();
                    }
                    assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                    begun.elapsed()
                })
                .collect();
            times.sort();
            times[CALLS / 2]
        };
        let whole = median(&[&[first, second].concat()]);
        let split = median(&[first, second]);
        println!("{name}: {whole:?} in one write, {split:?} in two");
        assert!(
            split <= whole * 2 + Duration::from_millis(10),
            "{name}: {split:?}"
        );
    }
}
