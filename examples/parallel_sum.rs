//! Work for all processors: sums the primes of a range. `cargo run --release --example parallel_sum --
//! run`, then `cargo run --release --example parallel_sum_client -- 127.0.0.1:8080 2000000`.
//!
//! It is the example that Python's `multiprocessing.Pool` is shown with, over a socket: the caller
//! cuts the range into pieces, the workers do one each at a time.

use std::process::ExitCode;

use preforkd::{Context, RpcError, Server};

fn main() -> ExitCode {
    Server::new().method_with("sum_primes", sum_primes).run()
}

/// The sum of the primes from `from` up to, and without, `to`.
fn sum_primes(call: &Context<'_>, (from, to): (u64, u64)) -> Result<u64, RpcError> {
    let mut sum: u64 = 0;
    for number in from..to {
        // A caller who has left, or waits no longer, needs no sum.
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
