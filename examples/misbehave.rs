//! Functions that harm their server, to show how the server reacts:
//!
//! - memory that is never freed
//! - threads that never return
//! - an event loop that is stuck
//! - a crash
//!
//! Set `max-memory`, `heartbeat-timeout` or a short `limits.timeout` in the configuration. Run
//! `cargo run --example misbehave -- run`, then `preforkd call leak 1000000` and `preforkd status`.

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
        // Leaks this number of bytes until the worker ends.
        .method("leak", |bytes: usize| {
            Ok(Box::leak(vec![1_u8; bytes].into_boxed_slice()).len())
        })
        // Waits for an event that never happens, and ignores its deadline.
        .method("hang", |(): ()| -> Result<(), _> {
            loop {
                thread::park();
            }
        })
        // Keeps its thread busy for this number of seconds, and ignores its deadline.
        .method("spin", |seconds: u64| {
            spin(Duration::from_secs(seconds));
            Ok(seconds)
        })
        // Blocks the event loop for this number of seconds.
        .inline("block", |seconds: u64| {
            spin(Duration::from_secs(seconds));
            Ok(seconds)
        })
        // The same for JSON-RPC, whose params are a list.
        .inline("block-for", |(seconds,): (u64,)| {
            spin(Duration::from_secs(seconds));
            Ok(seconds)
        })
        // Ends the worker by an abort on a thread if the text is "abort". Any other text overflows the
        // stack.
        .method("crash", |how: String| -> Result<usize, _> {
            if how == "abort" {
                std::process::abort();
            }
            Ok(deeper(how.len()))
        })
        // Makes the worker exit with this code. The second number is ignored.
        .method("exit", |(code, _): (i32, u64)| -> Result<(), _> {
            std::process::exit(code)
        })
        // The same, from a thread that runs no call.
        .method(
            "exit-from-thread",
            |(code, _): (i32, u64)| -> Result<(), _> {
                let _ = thread::spawn(move || std::process::exit(code)).join();
                loop {
                    thread::park();
                }
            },
        )
        // Ends the worker from its event loop.
        .inline("crash-inline", |(): ()| -> Result<(), _> {
            std::process::abort()
        })
        // Returns after this number of milliseconds.
        .method("wait", |millis: u64| {
            thread::sleep(Duration::from_millis(millis));
            Ok(millis)
        })
        .run()
}
