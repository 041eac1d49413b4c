//! Functions that do their server harm, to see what becomes of it: memory that never comes back,
//! threads that never come back, an event loop that stands still, a crash.
//!
//! `cargo run --example misbehave -- run`, with `max-memory`, `heartbeat-timeout` or a short
//! `limits.timeout` in the configuration, then `preforkd call leak 1000000` and
//! `preforkd status`.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

fn spin(length: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < length {
        std::hint::spin_loop();
    }
}

#[allow(unconditional_recursion)]
fn deeper(depth: usize) -> usize {
    std::hint::black_box([depth; 64]);
    deeper(depth + 1) + 1
}

fn main() -> ExitCode {
    preforkd::Server::new()
        // So many bytes more, for as long as the worker lives.
        .method("leak", |bytes: usize| {
            Ok(Box::leak(vec![1_u8; bytes].into_boxed_slice()).len())
        })
        // Waits for what never comes, and hears of no deadline.
        .method("hang", |(): ()| -> Result<(), _> {
            loop {
                thread::park();
            }
        })
        // Keeps its thread busy for so many seconds, and hears of no deadline.
        .method("spin", |seconds: u64| {
            spin(Duration::from_secs(seconds));
            Ok(seconds)
        })
        // Keeps the event loop from everything else for so many seconds.
        .inline("block", |seconds: u64| {
            spin(Duration::from_secs(seconds));
            Ok(seconds)
        })
        // Ends the worker: with "abort" on a thread, else by filling its stack.
        .method("crash", |how: String| -> Result<usize, _> {
            if how == "abort" {
                std::process::abort();
            }
            Ok(deeper(how.len()))
        })
        // Has the worker exit with this code, whatever the second number is.
        .method("exit", |(code, _): (i32, u64)| -> Result<(), _> {
            std::process::exit(code)
        })
        // Ends the worker from its event loop.
        .inline("crash-inline", |(): ()| -> Result<(), _> {
            std::process::abort()
        })
        // Is done after so many milliseconds.
        .method("wait", |millis: u64| {
            thread::sleep(Duration::from_millis(millis));
            Ok(millis)
        })
        .run()
}
