//! A daemon with the methods from the examples in the JSON-RPC 2.0 specification. A few closures are
//! enough, and it has all commands. Run `cargo run --example arithmetic -- run`, then
//! `curl 127.0.0.1:8080 -d '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}'`.

use serde::Deserialize;
use serde::de::IgnoredAny;

/// The caller gives the params by name, or as a list in this order. serde reads both.
#[derive(Deserialize)]
struct Subtract {
    minuend: i64,
    subtrahend: i64,
}

fn too_large() -> preforkd::RpcError {
    preforkd::RpcError::invalid_params("the result is no 64-bit integer")
}

fn main() -> std::process::ExitCode {
    preforkd::Server::new()
        .inline("subtract", |of: Subtract| {
            of.minuend.checked_sub(of.subtrahend).ok_or_else(too_large)
        })
        .method("sum", |numbers: Vec<i64>| {
            let mut numbers = numbers.iter();
            let sum = numbers.try_fold(0_i64, |sum, number| sum.checked_add(*number));
            sum.ok_or_else(too_large)
        })
        .method("get_data", |_: IgnoredAny| Ok(("hello", 5)))
        .method("update", |_: IgnoredAny| Ok(()))
        .inline("notify_hello", |_: IgnoredAny| Ok(()))
        .method("notify_sum", |_: IgnoredAny| Ok(()))
        .run()
}
