//! Measures the cost of the protocol layer per call, in nanoseconds of one thread: decode a frame, parse
//! its body, encode the answer. `cargo bench --bench protocol`.
//!
//! Each figure is the fastest of several rounds, because other load on the machine only adds time.
#![allow(clippy::print_stdout)]

use preforkd::internals::frame::{self, DecodedFrame};
use preforkd::internals::{answer, call};
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 15;
const LIMIT: usize = 64 << 20;
const DEPTH: usize = 128;

fn main() {
    let large_string = format!(r#"{{"in":"ping","params":"{}"}}"#, "x".repeat(1 << 20));
    let large_numbers = format!(
        r#"{{"in":"ping","params":[{}1]}}"#,
        "12345,".repeat(1 << 17)
    );
    let escapes = format!(r#"{{"in":"ping","params":"{}"}}"#, r"\n\\x".repeat(1 << 17));
    let nested = "[".repeat(1 << 20);
    for (name, body) in [
        ("ping, 30 bytes", r#"{"in":"ping","params":"hello"}"#),
        (
            "ping with id and timeout",
            r#"{"in": "ping", "params": 1, "id": 7, "timeout_ms": 500}"#,
        ),
        (
            "params of 200 bytes",
            &format!(r#"{{"in":"ping","params":"{}"}}"#, "é".repeat(100)),
        ),
        ("a method with escapes", r#"{"in":"p\u0069ng","params":1}"#),
        ("no call at all", r#"{"out":"ping"}"#),
        ("1 MiB of letters", &large_string),
        ("768 KiB of numbers", &large_numbers),
        ("640 KiB of escapes", &escapes),
        ("1 MiB of [", &nested),
    ] {
        let nanoseconds = fastest(body);
        let rate = body.len() as f64 / nanoseconds;
        println!("{name:<26} {nanoseconds:>12.1} ns   {rate:>6.2} GB/s");
    }
}

/// Returns the nanoseconds per call in a buffer of many calls, as a connection has them.
fn fastest(body: &str) -> f64 {
    let calls = (1 << 21) / (body.len() + frame::HEADER) + 1;
    let mut received = Vec::new();
    for _ in 0..calls {
        let mark = frame::begin(&mut received);
        received.extend_from_slice(body.as_bytes());
        frame::finish(&mut received, mark);
    }
    let mut out = Vec::with_capacity(2 * received.len() + calls * 512);
    let times = (0..ROUNDS).map(|_| {
        let begun = Instant::now();
        out.clear();
        serve(black_box(&received), &mut out);
        black_box(&out);
        begun.elapsed().as_nanos() as f64 / calls as f64
    });
    times.fold(f64::INFINITY, f64::min)
}

fn serve(mut received: &[u8], out: &mut Vec<u8>) {
    while let DecodedFrame::Whole { body, used } = frame::decode(received, LIMIT) {
        let mark = frame::begin(out);
        match call::parse(body, DEPTH) {
            Ok(call) if call.method == "ping" => answer::result(out, "pong", call.params, call.id),
            Ok(call) => answer::result(out, &call.method, call.params, call.id),
            Err(refusal) => answer::error(out, &refusal.error, refusal.id, None),
        }
        frame::finish(out, mark);
        received = &received[used..];
    }
}
