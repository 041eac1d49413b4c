//! A server with the methods of the JSON-RPC 2.0 specification's examples: a few closures, and it
//! is a daemon with all commands. `cargo run --example arithmetic -- run`, then
//! `curl 127.0.0.1:8080 -d '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}'`.

use serde::Deserialize;
use serde::de::IgnoredAny;

/// By name or in this order, as the caller likes: serde reads both.
#[derive(Deserialize)]
struct Subtract {
    minuend: i64,
    subtrahend: i64,
}

fn main() -> std::process::ExitCode {
    preforkd::Server::new()
        .inline("subtract", |of: Subtract| Ok(of.minuend - of.subtrahend))
        .method("sum", |numbers: Vec<i64>| Ok(numbers.iter().sum::<i64>()))
        .method("get_data", |_: IgnoredAny| Ok(("hello", 5)))
        .method("update", |_: IgnoredAny| Ok(()))
        .inline("notify_hello", |_: IgnoredAny| Ok(()))
        .method("notify_sum", |_: IgnoredAny| Ok(()))
        .run()
}
