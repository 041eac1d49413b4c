//! Sums the primes of a range on all processors. Run
//! `cargo run --release --example parallel_sum -- run`, then
//! `cargo run --release --example parallel_sum_client -- 127.0.0.1:8080 2000000`.
//!
//! It is the usual example for Python's `multiprocessing.Pool`, but over a socket. The caller cuts the
//! range into pieces, and the workers sum one piece each at a time.

use std::process::ExitCode;

use preforkd::{Context, RpcError, Server};

fn main() -> ExitCode {
    Server::new().method_with("sum_primes", sum_primes).run()
}

/// Returns the sum of the primes from `from` (included) to `to` (excluded).
fn sum_primes(call: &Context<'_>, (from, to): (u64, u64)) -> Result<u64, RpcError> {
    let mut sum: u64 = 0;
    for number in from..to {
        // If the caller has disconnected or no longer waits, it needs no sum.
        if number % 1024 == 0 && call.is_cancelled() {
            return Err(RpcError::new(1, format!("left at {number}")));
        }
        if is_prime(number) {
            sum = sum
                .checked_add(number)
                .ok_or_else(|| RpcError::invalid_params("their sum has more than 64 bits"))?;
        }
    }
    Ok(sum)
}

fn is_prime(number: u64) -> bool {
    number >= 2
        && (2..)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|divisor| !number.is_multiple_of(divisor))
}
