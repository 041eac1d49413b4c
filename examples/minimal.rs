//! A whole daemon around a few functions: `cargo run --example minimal -- run`, then
//! `preforkd call add '[1, 2]'`.
//!
//! It has all commands, signals and the configuration of the `preforkd` program. Beside the sum
//! stand the things that a function may do to its server: panic, take its time, refuse its params,
//! answer a lot.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use preforkd::RpcError;

fn main() -> ExitCode {
    preforkd::Server::new()
        .method("add", |(a, b): (i64, i64)| {
            a.checked_add(b)
                .ok_or_else(|| RpcError::invalid_params("the sum is no 64-bit integer"))
        })
        // A panic is answered with `internal`, and the worker lives.
        .method("divide", |(a, b): (i64, i64)| Ok(a / b))
        // On the event loop: for what takes microseconds. It may panic no less.
        .inline("divide_inline", |(a, b): (i64, i64)| Ok(a / b))
        // Keeps its thread busy for so many milliseconds; nothing can end it early.
        .method("spin", |milliseconds: u64| {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(milliseconds) {
                std::hint::spin_loop();
            }
            Ok(milliseconds)
        })
        // So many letters, from a handler thread.
        .method("letters", |count: usize| Ok("x".repeat(count)))
        // An error of the function's own.
        .method("refuse", |reason: String| {
            Err::<(), _>(RpcError::new(1, reason).with_data(["its", "own", "data"]))
        })
        .run()
}
