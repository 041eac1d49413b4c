//! Tests hostile input: one answer if one is due, otherwise none, and the same workers with the same
//! descriptors afterwards.

use std::thread;

use serde_json::Value;

use crate::protocol::errors::assert_error;
use crate::protocol::frames::WITH_BUILTINS;
use crate::support::{Client, Daemon, Dice, PATIENCE, Sweep, frame, process, wait_for};

/// The limit of most tests here: small, so that exceeding it costs little.
const LIMIT: usize = 64 * 1024;

fn daemon() -> Daemon {
    Daemon::builder()
        .config(&format!(
            "{WITH_BUILTINS}\n[limits]\nframe = \"{LIMIT}B\"\nread-timeout = \"2s\"\n"
        ))
        .start()
}

/// Valid calls to start from: every member, every kind of value, escapes, nesting.
fn valid() -> Vec<Vec<u8>> {
    [
        r#"{"in": "ping"}"#,
        r#"{"in": "ping", "params": "hello"}"#,
        r#"{"in":"echo","params":{"a":[1,2.5e3,-0,true,false,null],"b":{"c":"\u00e9\n"}},"id":7}"#,
        r#"{"in": "echo", "params": [[[[]]]], "id": "seven", "timeout_ms": 500}"#,
        r#"{"in": "sleep", "params": 0, "id": 1234567890123456789012345678901234567890}"#,
        r#"{"in": "rpc.cancel", "params": {"id": 7}}"#,
        r#"{"id": null, "params": "né", "in": "pi\u006eg", "more": [1]}"#,
        r#" {"in" : "nope" , "id" : 1 } "#,
    ]
    .iter()
    .map(|body| frame(body.as_bytes()))
    .collect()
}

fn mutate(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[dice.roll(seeds.len())].clone();
    if dice.roll(3) == 0 {
        bytes.extend_from_slice(&seeds[dice.roll(seeds.len())]);
    }
    for _ in 0..=dice.roll(4) {
        let at = dice.roll(bytes.len().max(1));
        match dice.roll(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.roll(8),
            1 if !bytes.is_empty() => bytes[at] = dice.roll(256) as u8,
            2 if !bytes.is_empty() => drop(bytes.remove(at)),
            3 => bytes.insert(at.min(bytes.len()), dice.roll(256) as u8),
            4 => bytes.truncate(at),
            5 => {
                let from = dice.roll(bytes.len().max(1));
                let part = bytes[from.min(at)..from.max(at)].to_vec();
                bytes.splice(at.min(bytes.len())..at.min(bytes.len()), part);
            }
            _ => {
                let odd = *b"[]{}\":,\\e\x00\xff\xc3";
                bytes.insert(at.min(bytes.len()), odd[dice.roll(odd.len())]);
            }
        }
    }
    bytes
}

/// Returns how many answers these bytes must get if the stream ends behind them. Returns `None` if the
/// first four bytes belong to another dialect.
fn due(mut bytes: &[u8]) -> Option<usize> {
    if bytes.len() >= 4 && bytes[3] >= 9 {
        return None;
    }
    // With fewer than four bytes the dialect may be another one too.
    if (1..4).contains(&bytes.len()) {
        return None;
    }
    let mut answers = 0;
    while let Some((header, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*header) as usize;
        if length > LIMIT {
            return Some(answers + 1);
        }
        let Some(rest) = rest.get(length..) else {
            break;
        };
        answers += 1;
        bytes = rest;
    }
    Some(answers)
}

/// Each on a separate connection that is half-closed at once: the due answers arrive, then the end.
#[test]
fn ten_thousand_mutants_get_what_they_are_due_and_kill_nobody() {
    const MUTANTS: usize = 10_000;
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let seeds = valid();
    let mut dice = Dice::new(0x9E37_79B9_7F4A_7C15);
    let (mut answers, mut errors, mut others) = (0, 0, 0);
    for number in 0..MUTANTS {
        let bytes = mutate(&mut dice, &seeds);
        let mut client = daemon.client();
        client.send_raw(&bytes);
        client.half_close();
        let received = client.recv_all();
        match due(&bytes) {
            Some(due) => assert_eq!(
                received.len(),
                due,
                "mutant {number}: {}",
                bytes.escape_ascii()
            ),
            None => others += 1,
        }
        for body in received {
            answers += 1;
            // They contain numbers of any size, so parse as little as possible.
            errors += usize::from(body.starts_with(br#"{"out":"error""#));
        }
    }
    println!(
        "{MUTANTS} mutants ({others} in another dialect's bytes): {answers} answers, {errors} of \
         them errors"
    );
    assert!(others < MUTANTS / 4 && errors > MUTANTS / 4);
    sweep.assert_same(&daemon);
}

/// The same mutants one behind the other in whole frames: none affects the next one.
#[test]
fn mutated_bodies_in_whole_frames_keep_their_connection() {
    const MUTANTS: usize = 10_000;
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let seeds: Vec<Vec<u8>> = valid().iter().map(|frame| frame[4..].to_vec()).collect();
    let mut dice = Dice::new(42);
    let mut client = daemon.client();
    for number in 0..MUTANTS {
        let body = mutate(&mut dice, &seeds);
        client.send_raw(&frame(&body));
        let answer = client.recv();
        assert!(
            answer.is_ok(),
            "{number}: {answer:?}: {}",
            body.escape_ascii()
        );
        if number % 100 == 0 {
            client.send(r#"{"in": "ping", "id": "between"}"#);
            assert_eq!(client.recv_json()["id"], "between");
        }
    }
    println!("{MUTANTS} mutated bodies on one connection, one answer each");
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn every_declared_length_is_judged_by_its_four_bytes() {
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let call = r#"{"in": "ping", "params": 1}"#;
    let mut fits = format!("{call}{}", " ".repeat(LIMIT - call.len()));
    let mut client = daemon.client();
    for body in ["", " ", "1", "{}"] {
        client.send(body);
        let answer = client.recv_json();
        assert_eq!(answer["out"], "error", "{body:?}: {answer}");
    }
    assert_eq!(client.call_text(&fits), r#"{"out":"pong","result":1}"#);
    fits.pop();
    assert_eq!(client.call_text(&fits), r#"{"out":"pong","result":1}"#);
    drop(client);
    let before: Vec<u64> = memory(&daemon);
    for length in [
        LIMIT as u32 + 1,
        0x08FF_FFFF,
        0x7FFF_FFFF,
        0x8000_0000,
        0xFFFF_FFFF,
    ] {
        for first in [true, false] {
            let mut client = daemon.client();
            if !first {
                client.send(r#"{"in": "ping"}"#);
                assert_eq!(client.recv_json()["out"], "pong");
            }
            client.send_raw(&length.to_le_bytes());
            // No byte of the body and no end: only the four bytes are checked.
            assert_error(&client.recv_json(), -32004, "too-large", false);
            client.assert_closed();
        }
    }
    for (before, after) in before.iter().zip(memory(&daemon)) {
        println!("memory {before} and after {after}");
        assert!(after < before + (1 << 20), "grew by a declared length");
    }
    sweep.assert_same(&daemon);
}

fn memory(daemon: &Daemon) -> Vec<u64> {
    let pids = daemon.ready_workers();
    pids.into_iter()
        .filter_map(process::anonymous_bytes)
        .collect()
}

#[test]
fn every_prefix_of_a_frame_is_closed_without_an_answer() {
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let mut prefixes = 0;
    for bytes in valid() {
        for length in 0..bytes.len() {
            let mut client = daemon.client();
            client.send_raw(&bytes[..length]);
            client.half_close();
            let answers = client.recv_all();
            assert!(answers.is_empty(), "{length} of {}", bytes.escape_ascii());
            prefixes += 1;
        }
    }
    println!("{prefixes} prefixes, no answer to any, all closed");
    sweep.assert_same(&daemon);
}

/// The same, and then silence: `limits.read-timeout` ends it.
#[test]
fn a_prefix_and_silence_is_cut_at_the_read_timeout() {
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let bytes = &valid()[1];
    let mut clients: Vec<Client> = (1..bytes.len())
        .map(|length| {
            let mut client = daemon.client();
            client.send_raw(&bytes[..length]);
            client
        })
        .collect();
    for client in &mut clients {
        client.assert_closed();
    }
    println!("{} unfinished frames cut", clients.len());
    sweep.assert_same(&daemon);
}

#[test]
fn a_depth_of_a_hundred_thousand_is_refused_in_one_answer() {
    let daemon = Daemon::builder().config(WITH_BUILTINS).start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}"), ("[", ""), (r#"{"a":"#, "")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        for body in [
            deep.clone(),
            format!(r#"{{"in": "echo", "params": {deep}}}"#),
        ] {
            client.send(&body);
            assert_error(&client.recv_json(), -32700, "parse-error", false);
        }
    }
    // As deep as limits.depth allows; the call itself is the first level.
    let params = format!("{}{}", "[".repeat(127), "]".repeat(127));
    let answer = client.call_text(&format!(r#"{{"in": "echo", "params": {params}}}"#));
    assert_eq!(answer, format!(r#"{{"out":"echo","result":{params}}}"#));
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn a_reset_after_any_number_of_bytes_leaves_nothing() {
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let mut resets = 0;
    for bytes in valid() {
        let doubled = [&bytes[..], &bytes[..]].concat();
        for length in 0..=doubled.len() {
            let mut client = daemon.client();
            client.send_raw(&doubled[..length]);
            client.reset();
            resets += 1;
        }
    }
    println!("{resets} connections reset");
    sweep.assert_same(&daemon);
    assert_eq!(
        daemon.client().call(&serde_json::json!({"in": "ping"}))["out"],
        "pong"
    );
}

/// Clients disconnect while their calls run: the threads are free again, and nothing is left.
#[test]
fn callers_that_leave_take_their_waiting_calls_along() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\nthreads = 2\n[methods.sleep]\nbuiltin = \"sleep\"\n")
        .start();
    let sweep = Sweep::of(&daemon);
    for _ in 0..50 {
        let mut client = daemon.client();
        for id in 0..20 {
            client.send(&format!(r#"{{"in": "sleep", "params": 30, "id": {id}}}"#));
        }
        client.reset();
    }
    wait_for("nothing to run or wait", PATIENCE, || {
        let worker = &daemon.workers()[0];
        worker.running == 0 && worker.queued == 0 && worker.connections == 0
    });
    let answer: Value = daemon
        .client()
        .call(&serde_json::json!({"in": "sleep", "params": 0}));
    assert_eq!(answer["result"], 0);
    sweep.assert_same(&daemon);
}

/// The method name contains bytes of a client: the log must not contain them unescaped.
#[test]
fn control_bytes_in_a_name_are_refused_and_never_logged_raw() {
    let daemon = daemon();
    let mut client = daemon.client();
    for name in [
        r"\u0000",
        r"ping\u0000",
        r"\u001b[31m",
        r"a\nERROR b",
        "\u{9b}",
        "ping ",
    ] {
        client.send(&format!(r#"{{"in": "{name}"}}"#));
        assert_error(&client.recv_json(), -32601, "method-not-found", false);
    }
    let log = daemon.log();
    assert!(!log.contains('\u{1b}') && !log.contains('\0') && !log.contains("ERROR"));
}

/// Hostile clients run beside a correct client.
#[test]
fn noise_on_other_connections_costs_a_well_meaning_client_nothing() {
    let daemon = daemon();
    let sweep = Sweep::of(&daemon);
    let address = daemon.address();
    let strangers: Vec<_> = (0..4)
        .map(|seed| {
            thread::spawn(move || {
                let mut dice = Dice::new(seed + 1);
                for _ in 0..500 {
                    let length = dice.roll(3000);
                    let noise: Vec<u8> = (0..length).map(|_| dice.roll(256) as u8).collect();
                    let mut client = Client::connect(address);
                    // It may be cut off in the middle.
                    let _ = client.try_send_raw(&noise);
                    if dice.roll(2) == 0 {
                        client.reset();
                    }
                }
            })
        })
        .collect();
    let load = crate::support::load::Load::start(address, 2, crate::support::load::Shape::Lasting);
    for stranger in strangers {
        stranger.join().unwrap();
    }
    load.stop().assert_whole("beside 2000 connections of noise");
    sweep.assert_same(&daemon);
}
