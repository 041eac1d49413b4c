//! A complete daemon with a few functions. Run `cargo run --example minimal -- run`, then
//! `preforkd call add '[1, 2]'`.
//!
//! It has all commands, signals and the configuration of the `preforkd` program. `add` computes a sum.
//! The other functions show what else a function can do:
//!
//! - panic
//! - take a long time
//! - refuse its params
//! - return a large result

use std::process::ExitCode;
use std::time::{Duration, Instant};

use preforkd::RpcError;

fn main() -> ExitCode {
    preforkd::Server::new()
        .method("add", |(a, b): (i64, i64)| {
            a.checked_add(b)
                .ok_or_else(|| RpcError::invalid_params("the sum is no 64-bit integer"))
        })
        // A panic is answered with `internal`, and the worker survives.
        .method("divide", |(a, b): (i64, i64)| Ok(a / b))
        // Runs on the event loop, for calls that take microseconds. It may panic too.
        .inline("divide_inline", |(a, b): (i64, i64)| Ok(a / b))
        // Keeps its thread busy for this number of milliseconds. Nothing can end it early.
        .method("spin", |milliseconds: u64| {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(milliseconds) {
                std::hint::spin_loop();
            }
            Ok(milliseconds)
        })
        // Returns this number of letters, from a handler thread.
        .method("letters", |count: usize| Ok("x".repeat(count)))
        // Returns an error with a code and data of the function.
        .method("refuse", |reason: String| {
            Err::<(), _>(RpcError::new(1, reason).with_data(["its", "own", "data"]))
        })
        .run()
}
